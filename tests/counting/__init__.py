"""Tests of `jaxprune.counting`."""
