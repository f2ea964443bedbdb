"""What tests share that is no oracle: trees, devices, a browser."""
