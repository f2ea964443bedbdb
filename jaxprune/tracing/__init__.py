"""What is read off, or done to, a traced function."""
