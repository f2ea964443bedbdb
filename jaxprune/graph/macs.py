"""Multiply-adds of a function's matrix products and convolutions."""

import math
from collections.abc import Callable
from typing import Any

from jaxprune.graph.ir import Op, Region, trace
from jaxprune.graph.program import split_static


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """The multiply-adds of a function's matrix products and convolutions.

    One multiplication with its addition counts as one, as in most papers on pruning (others count
    two operations). A convolution counts all places of its window, also those on padding. The body
    of a scan counts once per step, of branches the dearest, of a while loop one round. Elementwise
    work does not count.

    Args:
      function: a function of pytrees of arrays.
      *arguments: arrays or `jax.ShapeDtypeStruct`; bools and strings are static.

    Returns:
      The number, for the whole batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.graph import multiply_adds
      >>> multiply_adds(lambda x, w: x @ w, jnp.ones((5, 3)), jnp.ones((3, 2)))
      30
    """
    arrays, rebuild = split_static(arguments)
    return _region(trace(lambda arrays: function(*rebuild(arrays)), arrays).region)


def _region(region: Region) -> int:
    return sum(map(_op, region.ops))


def _op(op: Op) -> int:
    if op.name == "dot_general":
        (left_sum, _), _ = op.params["dimension_numbers"]
        summed = math.prod(op.inputs[0].shape[axis] for axis in left_sum)
        return math.prod(op.outputs[0].shape) * summed
    if op.name == "conv_general_dilated":
        kernel, axes = op.inputs[1].shape, op.params["dimension_numbers"].rhs_spec
        window = math.prod(kernel[axis] for axis in axes[1:])
        return math.prod(op.outputs[0].shape) * window
    if op.name == "scan":
        return op.params["length"] * _region(op.regions["body"])
    if op.name == "cond":
        return max(map(_region, op.regions.values()))
    return _region(op.regions["body"]) if "body" in op.regions else 0
