"""Sparse inference: the masked network with products that skip its zeros, and faster convolutions."""

from jaxprune.sparse.network import Sparsified, sparsify
from jaxprune.sparse.replay import SparseParams
from jaxprune.sparse.report import SparseReport

__all__ = ["SparseParams", "SparseReport", "Sparsified", "sparsify"]
