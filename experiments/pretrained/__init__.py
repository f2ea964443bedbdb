"""Networks that others have trained, pruned without training: `python -m experiments.pretrained`."""
