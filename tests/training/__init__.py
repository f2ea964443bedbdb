"""Tests of `jaxprune.training`."""
