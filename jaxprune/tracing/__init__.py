"""Traced functions: walking their jaxprs, and what these show of values."""
