"""Tests of `jaxprune.graph`."""
