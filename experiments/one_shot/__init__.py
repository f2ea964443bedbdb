"""Pruning of trained networks without training them: `python -m experiments.one_shot`."""
