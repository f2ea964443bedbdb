"""Metrics: what was asked, what was achieved."""

from jaxprune.metrics.macs import Macs, macs
from jaxprune.metrics.sizes import Sparsity, collapsed, density, nonzeros, sparsity, table

__all__ = ["Macs", "Sparsity", "collapsed", "density", "macs", "nonzeros", "sparsity", "table"]
