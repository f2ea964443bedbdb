"""Tests of `jaxprune.tree`."""
