"""Tests of `jaxprune.recipes`."""
