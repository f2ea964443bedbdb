"""Tests of `jaxprune.structures`."""
