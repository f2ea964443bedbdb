"""Tests of `jaxprune.pruning`."""
