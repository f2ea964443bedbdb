"""Small versions of the studies."""
