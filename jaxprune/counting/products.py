"""The multiply-adds of one matrix product or convolution.

Each function takes an equation of a jaxpr and, for either operand, which of its entries count (None: all). It
returns the multiply-adds with and without those that read padding.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Alive = Sequence[np.ndarray | None]


def dot(eqn: Any, alive: Alive) -> tuple[int, int]:
    """Count a `dot_general`: at each batch and summed index, entries on the left times those on the right."""
    (sums, batches) = eqn.params["dimension_numbers"]
    shapes = [atom.aval.shape for atom in eqn.invars]
    if all(a is None for a in alive):
        total = math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in sums[0])
        return total, total
    counts = []  # of the live entries of each operand, at each place of the batch and of the sum
    for shape, own, batch, entries in zip(shapes, batches, sums, alive, strict=True):
        axes = (*own, *batch)
        free = [axis for axis in range(len(shape)) if axis not in axes]
        if entries is None:
            counts.append(np.full([shape[a] for a in axes], math.prod(shape[a] for a in free), np.int64))
        else:
            ordered = np.transpose(entries, (*axes, *free))
            counts.append(
                np.count_nonzero(ordered, axis=tuple(range(len(axes), len(shape)))).astype(np.int64)
            )
    total = int(np.sum(counts[0] * counts[1]))
    return total, total


def convolution(eqn: Any, alive: Alive) -> tuple[int, int]:
    """Count a `conv_general_dilated`; all entries of its input count."""
    params = eqn.params
    inputs, kernel = (atom.aval.shape for atom in eqn.invars)
    lhs, rhs, out = params["dimension_numbers"]
    outputs = eqn.outvars[0].aval.shape
    places = [kernel[axis] for axis in rhs[2:]]
    channels = kernel[rhs[0]] * kernel[rhs[1]]
    if alive[1] is None:
        weights = np.full(places, channels, np.int64)  # entries of the kernel at each place
    else:
        weights = np.count_nonzero(np.transpose(alive[1], rhs), axis=(0, 1)).astype(np.int64)
    images, positions = outputs[out[0]], [outputs[axis] for axis in out[2:]]
    real = weights
    for axis in range(len(places)):  # the outputs at which a place of the window meets an input
        starts = np.arange(positions[axis]) * params["window_strides"][axis] - params["padding"][axis][0]
        reads = starts[:, None] + np.arange(places[axis]) * params["rhs_dilation"][axis]
        spread = params["lhs_dilation"][axis]
        extent = (inputs[lhs[axis + 2]] - 1) * spread + 1
        hits = np.count_nonzero((reads >= 0) & (reads < extent) & (reads % spread == 0), axis=0)
        real = real * hits.reshape([-1 if n == axis else 1 for n in range(len(places))])
    return images * math.prod(positions) * int(weights.sum()), images * int(real.sum())


def ragged_dot(eqn: Any, alive: Alive) -> tuple[int, int]:
    """Count a `ragged_dot_general` as if its groups held all rows."""
    del alive  # which rows meet which group is known only when it runs
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, sums), (_, batch) = numbers.dot_dimension_numbers
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    taken = {*sums, *batch, *numbers.rhs_group_dimensions}
    free = math.prod(size for axis, size in enumerate(right) if axis not in taken)
    return math.prod(left) * free, math.prod(left) * free


MACS_OF = {"dot_general": dot, "conv_general_dilated": convolution, "ragged_dot_general": ragged_dot}
