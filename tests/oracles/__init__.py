"""What the library promises, computed in another way."""
