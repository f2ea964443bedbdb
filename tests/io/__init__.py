"""Tests of `jaxprune.io`."""
