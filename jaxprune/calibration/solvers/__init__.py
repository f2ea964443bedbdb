"""Solvers: which entries of a matrix to remove, and the values of those that stay.

A solver is a function `solver(weight, gram, counts, pattern) -> (weight, mask)` of matrices in batches. It
keeps the output of a layer, `X W^T`, near to what it was, where X are the layer's inputs and `gram` is `X^T
X`.
"""

from jaxprune.calibration.solvers.admm import alps
from jaxprune.calibration.solvers.greedy import obc
from jaxprune.calibration.solvers.masking import mask_only
from jaxprune.calibration.solvers.pattern import Pattern, Solver
from jaxprune.calibration.solvers.sparse_gpt import sparsegpt
from jaxprune.calibration.solvers.swapping import with_swaps

__all__ = ["Pattern", "Solver", "alps", "mask_only", "obc", "sparsegpt", "with_swaps"]
