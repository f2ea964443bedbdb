"""Other people's models, pruned and compacted: `python -m experiments.real_models`."""
