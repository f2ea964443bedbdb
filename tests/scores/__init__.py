"""Tests of `jaxprune.scores`."""
