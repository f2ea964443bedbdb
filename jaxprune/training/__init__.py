"""Masks inside a training loop: optimizers, straight-through gradients, lottery tickets."""
