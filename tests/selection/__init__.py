"""Tests of `jaxprune.selection`."""
