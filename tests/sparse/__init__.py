"""Tests of `jaxprune.sparse`."""
