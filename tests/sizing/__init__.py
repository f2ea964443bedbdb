"""Tests of `jaxprune.sizing`."""
