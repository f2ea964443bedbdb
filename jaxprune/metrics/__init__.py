"""Metrics: what was asked, what was achieved, and what it costs; each number says what it counts."""

from jaxprune.metrics.activations import Activation, Activations, activation_sparsity
from jaxprune.metrics.cost import Cost, cost
from jaxprune.metrics.distances import Overlap, overlap
from jaxprune.metrics.latency import Latency, latency
from jaxprune.metrics.macs import Macs, Operation, macs
from jaxprune.metrics.sizes import Sparsity, collapsed, compression, density, nonzeros, sparsity, table
from jaxprune.metrics.summary import Row, Summary, summary

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
    "activation_sparsity",
    "collapsed",
    "compression",
    "cost",
    "density",
    "latency",
    "macs",
    "nonzeros",
    "overlap",
    "sparsity",
    "summary",
    "table",
]
