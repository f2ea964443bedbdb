"""Hostile input: files, flags, pages, recipes and values."""
