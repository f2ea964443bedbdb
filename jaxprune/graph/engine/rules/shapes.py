"""Primitives that rename, spread, split and merge axes: transpose, broadcast, reshape, ..."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, either
from jaxprune.graph.engine.ir import Op, other_axes, same_size
from jaxprune.graph.engine.rules.base import Frame, Rule, emit_unchanged, link_moved, register_rule


def is_static(size: Any) -> bool:
    """Whether a size is a number, not a symbol."""
    return isinstance(size, (int, np.integer))


def _renamed(axes_of: Any, emit: Any) -> Rule:
    """Return a rule for ops that rename axes and make new ones, along which all slices are alike.

    `axes_of(op)` returns, for each axis of the output, which axis of the input it is; None for a new one.
    """

    def link(op: Op, graph: AxisGraph) -> None:
        link_moved(graph, op.inputs[0], op.outputs[0], axes_of(op))

    def flow(op: Op, facts: Facts) -> None:
        (value,), (output,) = op.inputs[:1], op.outputs
        zeros, alike = [], []
        for size, axis in zip(output.shape, axes_of(op), strict=True):
            zeros.append(None if axis is None else facts.zero(value, axis))
            new = np.broadcast_to(True, (size,)) if axis is None and is_static(size) else None
            alike.append(new if axis is None else facts.alike(value, axis))
        facts.learn(output, zeros, facts.of(value).fill, alike)

    return Rule(link, flow, emit)


def _broadcast_axes(op: Op) -> list[int | None]:
    (value,), (output,) = op.inputs[:1], op.outputs
    axes: list[int | None] = [None] * len(output.shape)
    for axis, place in enumerate(op.params["broadcast_dimensions"]):
        if same_size(value.shape[axis], output.shape[place]):
            axes[place] = axis
    return axes


def _emit_broadcast(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    shape = frame.shape(op.outputs[0])
    return [lax.broadcast_in_dim(args[0], shape, op.params["broadcast_dimensions"])]


register_rule("broadcast_in_dim", rule=_renamed(_broadcast_axes, _emit_broadcast))
register_rule("transpose", rule=_renamed(lambda op: list(op.params["permutation"]), emit_unchanged))


register_rule(
    "squeeze",
    rule=_renamed(lambda op: other_axes(op.inputs[0], op.params["dimensions"]), emit_unchanged),
)


def _flow_iota(op: Op, facts: Facts) -> None:
    (output,), along = op.outputs, op.params["dimension"]
    alike = [
        None if axis == along or not is_static(size) else np.ones(size, bool)
        for axis, size in enumerate(output.shape)
    ]
    facts.learn(output, alike=alike)


register_rule("iota", rule=Rule(lambda op, graph: None, _flow_iota, emit_unchanged))


# Reshape: both shapes are row-major products of common factors, where they have such factors. A factor is a
# node; an axis before or after the reshape is the product of some of them. So (2, 12) to (2, 3, 4) has the
# factors 2, 3, 4: the 12 is the product 3 x 4, and what it can lose are slices of the 3 or of the 4.


class Segment(NamedTuple):
    """Axes before and after a reshape that hold the same entries, each with the factors that it has."""

    sizes: tuple[int, ...] | None  # the common factors, major first; None as between 2 x 3 and 3 x 2
    before: list[tuple[int, tuple[int, ...]]]
    after: list[tuple[int, tuple[int, ...]]]


def segments(old: Sequence[Any], new: Sequence[Any]) -> list[Segment]:
    """Split the axes of a reshape into segments, without axes of size 1.

    Example:
      >>> from jaxprune.graph.engine.rules.shapes import segments
      >>> for segment in segments((2, 12, 5), (2, 3, 4, 5)):
      ...     print(segment.sizes, segment.before, segment.after)
      (2,) [(0, (0,))] [(0, (0,))]
      (3, 4) [(1, (0, 1))] [(1, (0,)), (2, (1,))]
      (5,) [(2, (0,))] [(3, (0,))]
    """
    before = [axis for axis, size in enumerate(old) if not (is_static(size) and size == 1)]
    after = [axis for axis, size in enumerate(new) if not (is_static(size) and size == 1)]
    if any(is_static(size) and size == 0 for size in (*old, *new)):  # no entries: no factors either
        return [Segment(None, [(a, ()) for a in before], [(a, ()) for a in after])]
    first, last = [], []
    while before and after and old[before[0]] == new[after[0]]:
        first.append(Segment((old[before[0]],), [(before.pop(0), (0,))], [(after.pop(0), (0,))]))
    while before and after and old[before[-1]] == new[after[-1]]:
        last.insert(0, Segment((old[before[-1]],), [(before.pop(), (0,))], [(after.pop(), (0,))]))
    middle: list[Segment] = []
    if not all(is_static(n) for n in [*(old[a] for a in before), *(new[a] for a in after)]):
        middle = [Segment(None, [(a, ()) for a in before], [(a, ()) for a in after])]
    else:
        while before or after:
            middle.append(_next_segment(old, new, before, after))
    return first + middle + last


def _next_segment(old: Sequence[int], new: Sequence[int], before: list[int], after: list[int]) -> Segment:
    """Take the fewest axes with equal products from both lists."""
    ins, outs = [before.pop(0)] if before else [], [after.pop(0)] if after else []
    while (a := math.prod(old[i] for i in ins)) != (b := math.prod(new[i] for i in outs)):
        if (a < b and before) or not after:
            ins.append(before.pop(0))
        else:
            outs.append(after.pop(0))
    cuts = sorted({*_bounds([old[i] for i in ins]), *_bounds([new[i] for i in outs])})
    if cuts[0] == 0 or any(high % low for low, high in pairwise(cuts)):
        return Segment(None, [(a, ()) for a in ins], [(a, ()) for a in outs])
    # Cuts are counted from the minor end; factors are numbered from the major end.
    number = len(cuts) - 1
    sizes = tuple(cuts[n + 1] // cuts[n] for n in reversed(range(number)))

    def factors(axes: list[int], shape: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        bounds = _bounds([shape[axis] for axis in axes])[::-1]
        return [
            (axis, tuple(range(number - cuts.index(high), number - cuts.index(low))))
            for axis, (high, low) in zip(axes, pairwise(bounds), strict=True)
        ]

    return Segment(sizes, factors(ins, old), factors(outs, new))


def _bounds(sizes: Sequence[int]) -> list[int]:
    """Return the products of the last 0, 1, 2, ... sizes."""
    bounds = [1]
    for size in reversed(sizes):
        bounds.append(bounds[-1] * size)
    return bounds


def _reshaped_segments(op: Op) -> list[Segment]:
    """Return the segments of a reshape, by the axes of its operand; `dimensions` may permute these first."""
    value, output = op.inputs[0], op.outputs[0]
    order = op.params["dimensions"]
    if order is None:
        return list(segments(value.shape, output.shape))
    found = segments([value.shape[axis] for axis in order], output.shape)
    return [s._replace(before=[(order[axis], factors) for axis, factors in s.before]) for s in found]


def _link_reshape(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for segment in _reshaped_segments(op):
        if segment.sizes is None:
            for array, axes in ((value, segment.before), (output, segment.after)):
                for axis, _ in axes:
                    graph.pin(array.axes[axis], f"{op} mixes it with another axis")
        elif len(segment.sizes) == 1:
            graph.same(value.axes[segment.before[0][0]], output.axes[segment.after[0][0]])
        else:
            nodes = [graph.node(size) for size in segment.sizes]
            for array, axes in ((value, segment.before), (output, segment.after)):
                for axis, factors in axes:
                    graph.product(array.axes[axis], [nodes[f] for f in factors])


def _flow_reshape(op: Op, facts: Facts) -> None:
    value, output = op.inputs[0], op.outputs[0]
    zeros: list[Vector | None] = [None] * len(output.shape)
    for segment in _reshaped_segments(op):
        if segment.sizes is None:
            continue
        for axis, factors in segment.after:
            for old_axis, old_factors in segment.before:
                zero = facts.zero(value, old_axis)
                if zero is not None:
                    zeros[axis] = either(zeros[axis], _reshaped(zero, old_factors, factors, segment.sizes))
    facts.learn(output, zeros, facts.of(value).fill)


def _reshaped(zero: Vector, old: Sequence[int], new: Sequence[int], sizes: Sequence[int]) -> Vector:
    """Return the marks of an axis with factors `new`, given those of an axis with factors `old`.

    A slice of the new axis is zero if all slices of the old axis are that it has entries in.
    """
    grid = zero.reshape([size if f in old else 1 for f, size in enumerate(sizes)])
    grid = grid.all(axis=tuple(f for f in old if f not in new), keepdims=True)
    return np.broadcast_to(grid, [size if f in new else 1 for f, size in enumerate(sizes)]).ravel()


def _emit_reshape(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    return [lax.reshape(args[0], frame.shape(op.outputs[0]), op.params["dimensions"])]


register_rule(
    "reshape",
    rule=Rule(
        _link_reshape,
        _flow_reshape,
        _emit_reshape,
        conservative="axes mixed with others without a common factor are kept whole (2 x 3 to 3 x 2)",
    ),
)
