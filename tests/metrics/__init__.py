"""Tests of `jaxprune.metrics`."""
