"""Pruning of whole channels: `python -m experiments.channel_pruning`."""
