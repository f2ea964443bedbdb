"""Pruning on many devices: `python -m experiments.distributed`."""
