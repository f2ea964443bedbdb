"""Pruning trained networks without training them: statistics of what each layer reads, and solvers."""
