"""Metrics: the sparsity asked for and achieved, and what a network costs; each number says what it counts."""

from jaxprune.counting.multiply_adds import Macs, Operation, macs
from jaxprune.counting.sizes import Sparsity, collapsed, compression, density, nonzeros, sparsity, table
from jaxprune.counting.timing import Latency, latency
from jaxprune.counting.width_times import good_widths
from jaxprune.counting.xla import Cost, cost
from jaxprune.metrics.activations import Activation, Activations, activation_sparsity
from jaxprune.metrics.distances import Overlap, overlap
from jaxprune.metrics.overview import Row, Summary, summary
from jaxprune.tree.widths import Widths

__all__ = [
    "Activation",
    "Activations",
    "Cost",
    "Latency",
    "Macs",
    "Operation",
    "Overlap",
    "Row",
    "Sparsity",
    "Summary",
    "Widths",
    "activation_sparsity",
    "collapsed",
    "compression",
    "cost",
    "density",
    "good_widths",
    "latency",
    "macs",
    "nonzeros",
    "overlap",
    "sparsity",
    "summary",
    "table",
]
