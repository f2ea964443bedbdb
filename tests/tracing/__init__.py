"""Tests of `jaxprune.tracing`."""
