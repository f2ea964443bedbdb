"""Benchmarks: `python -m experiments.benchmarks`, or one of its modules."""
