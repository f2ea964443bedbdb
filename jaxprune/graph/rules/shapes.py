"""Primitives that move entries about: transpose, broadcast, reshape, slice, concatenate, pad, ..."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.axes import AxisGraph, Vector
from jaxprune.graph.facts import Facts, all_of, either, is_zero
from jaxprune.graph.ir import Op
from jaxprune.graph.rules.base import Frame, Rule, as_it_was, register_rule


def _is_static(size: Any) -> bool:
    return isinstance(size, (int, np.integer))


# One input, one output, and for each axis of the output the axis of the input it is, or None.


def _renamed(axes_of: Any, emit: Any) -> Rule:
    """A rule for ops that rename axes and make new ones, along which all slices are alike."""

    def link(op: Op, graph: AxisGraph) -> None:
        for node, axis in zip(op.outputs[0].axes, axes_of(op), strict=True):
            if axis is not None:
                graph.same(op.inputs[0].axes[axis], node)

    def flow(op: Op, facts: Facts) -> None:
        (value,), (output,) = op.inputs[:1], op.outputs
        zeros, alike = [], []
        for size, axis in zip(output.shape, axes_of(op), strict=True):
            zeros.append(None if axis is None else facts.zero(value, axis))
            new = np.broadcast_to(True, (size,)) if axis is None and _is_static(size) else None
            alike.append(new if axis is None else facts.alike(value, axis))
        facts.learn(output, zeros, facts.of(value).fill, alike)

    return Rule(link, flow, emit)


def _broadcast_axes(op: Op) -> list[int | None]:
    (value,), (output,) = op.inputs[:1], op.outputs
    axes: list[int | None] = [None] * len(output.shape)
    for axis, place in enumerate(op.params["broadcast_dimensions"]):
        size = output.shape[place]
        if value.shape[axis] is size or value.shape[axis] == size:
            axes[place] = axis
    return axes


def _emit_broadcast(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    shape = frame.shape(op.outputs[0])
    return [lax.broadcast_in_dim(args[0], shape, op.params["broadcast_dimensions"])]


register_rule("broadcast_in_dim", rule=_renamed(_broadcast_axes, _emit_broadcast))
register_rule("transpose", rule=_renamed(lambda op: list(op.params["permutation"]), as_it_was))


def _squeezed_axes(op: Op) -> list[int | None]:
    gone = op.params["dimensions"]
    return [axis for axis in range(len(op.inputs[0].shape)) if axis not in gone]


register_rule("squeeze", rule=_renamed(_squeezed_axes, as_it_was))
register_rule(
    "iota",
    rule=Rule(
        lambda op, graph: None,
        lambda op, facts: facts.learn(
            op.outputs[0],
            alike=[
                None if axis == op.params["dimension"] or not _is_static(size) else np.ones(size, bool)
                for axis, size in enumerate(op.outputs[0].shape)
            ],
        ),
        as_it_was,
    ),
)


# Reshape: both shapes are products of common factors, as far as they have any.


class Segment(NamedTuple):
    """Some axes before a reshape and those after it that hold the same entries.

    Attributes:
      sizes: the common factors, major first; None where the two have none, such as 2 x 3 and 3 x 2.
      before, after: each axis with the indices of the factors it is the product of.
    """

    sizes: tuple[int, ...] | None
    before: list[tuple[int, tuple[int, ...]]]
    after: list[tuple[int, tuple[int, ...]]]


def segments(old: Sequence[Any], new: Sequence[Any]) -> list[Segment]:
    """The axes of a reshape in segments, without those of size 1.

    Example:
      >>> from jaxprune.graph.rules.shapes import segments
      >>> for segment in segments((2, 12, 5), (2, 3, 4, 5)):
      ...     print(segment.sizes, segment.before, segment.after)
      (2,) [(0, (0,))] [(0, (0,))]
      (3, 4) [(1, (0, 1))] [(1, (0,)), (2, (1,))]
      (5,) [(2, (0,))] [(3, (0,))]
    """
    before = [axis for axis, size in enumerate(old) if not (_is_static(size) and size == 1)]
    after = [axis for axis, size in enumerate(new) if not (_is_static(size) and size == 1)]
    if any(_is_static(size) and size == 0 for size in (*old, *new)):  # no entries: no factors either
        return [Segment(None, [(a, ()) for a in before], [(a, ()) for a in after])]
    first, last = [], []
    while before and after and old[before[0]] == new[after[0]]:
        first.append(Segment((old[before[0]],), [(before.pop(0), (0,))], [(after.pop(0), (0,))]))
    while before and after and old[before[-1]] == new[after[-1]]:
        last.insert(0, Segment((old[before[-1]],), [(before.pop(), (0,))], [(after.pop(), (0,))]))
    middle: list[Segment] = []
    if not all(_is_static(n) for n in [*(old[a] for a in before), *(new[a] for a in after)]):
        middle = [Segment(None, [(a, ()) for a in before], [(a, ()) for a in after])]
    else:
        while before or after:
            middle.append(_next_segment(old, new, before, after))
    return first + middle + last


def _next_segment(old: Sequence[int], new: Sequence[int], before: list[int], after: list[int]) -> Segment:
    """Takes from both lists the fewest axes with equal products."""
    ins, outs = [before.pop(0)] if before else [], [after.pop(0)] if after else []
    while (a := math.prod(old[i] for i in ins)) != (b := math.prod(new[i] for i in outs)):
        if (a < b and before) or not after:
            ins.append(before.pop(0))
        else:
            outs.append(after.pop(0))
    cuts = sorted({*_bounds([old[i] for i in ins]), *_bounds([new[i] for i in outs])})
    if cuts[0] == 0 or any(high % low for low, high in pairwise(cuts)):
        return Segment(None, [(a, ()) for a in ins], [(a, ()) for a in outs])
    # Cut points count from the minor end; factors are numbered from the major one.
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
    """The products of the last 0, 1, 2, ... sizes."""
    bounds = [1]
    for size in reversed(sizes):
        bounds.append(bounds[-1] * size)
    return bounds


def _link_reshape(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for segment in segments(value.shape, output.shape):
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
    for segment in segments(value.shape, output.shape):
        if segment.sizes is None:
            continue
        for axis, factors in segment.after:
            for old_axis, old_factors in segment.before:
                zero = facts.zero(value, old_axis)
                if zero is not None:
                    zeros[axis] = either(zeros[axis], _reshaped(zero, old_factors, factors, segment.sizes))
    facts.learn(output, zeros, facts.of(value).fill)


def _reshaped(zero: Vector, old: Sequence[int], new: Sequence[int], sizes: Sequence[int]) -> Vector:
    """Marks of an axis with factors `old` for one with factors `new`.

    A slice of the new axis is zero if the old axis is, at all places that the slice meets.
    """
    grid = zero.reshape([size if f in old else 1 for f, size in enumerate(sizes)])
    grid = grid.all(axis=tuple(f for f in old if f not in new), keepdims=True)
    return np.broadcast_to(grid, [size if f in new else 1 for f, size in enumerate(sizes)]).ravel()


def _emit_reshape(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    return [lax.reshape(args[0], frame.shape(op.outputs[0]))]


register_rule("reshape", rule=Rule(_link_reshape, _flow_reshape, _emit_reshape))


# Ops whose output slices along an axis are slices of the input, or new.


def take(array: Any, axis: int, positions: np.ndarray) -> Any:
    """Slices of an array at known positions."""
    size = array.shape[axis]
    if np.array_equal(positions, np.arange(size)):
        return array
    if len(positions) and np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
        return lax.slice_in_dim(array, int(positions[0]), int(positions[0]) + len(positions), axis=axis)
    if isinstance(array, np.ndarray):
        return np.take(array, positions, axis=axis)
    return jnp.take(array, positions, axis=axis, mode="clip")


def take_dense(array: Any, axis: int, dense: np.ndarray, kept: np.ndarray | None) -> Any:
    """Slices at known dense positions of an array that has only the `kept` ones."""
    return take(array, axis, dense if kept is None else np.searchsorted(kept, dense))


def _slice_indices(op: Op, axis: int) -> np.ndarray:
    params = op.params
    stride = 1 if params["strides"] is None else params["strides"][axis]
    return np.arange(params["start_indices"][axis], params["limit_indices"][axis], stride)


def _sliced_axes(op: Op) -> list[int]:
    """The axes that a slice shortens."""
    value, output = op.inputs[0], op.outputs[0]
    pairs = enumerate(zip(value.shape, output.shape, strict=True))
    return [axis for axis, (old, new) in pairs if not (old is new or old == new)]


def _link_slice(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for axis, (a, b) in enumerate(zip(value.axes, output.axes, strict=True)):
        if axis not in _sliced_axes(op):
            graph.same(a, b)
        elif not (_is_static(value.shape[axis]) and _is_static(output.shape[axis])):
            graph.pin(a, f"{op} cuts an axis of symbolic size")
        else:
            taken = _slice_indices(op, axis)
            graph.link(a, taken, b, np.arange(len(taken)))


def _flow_slice(op: Op, facts: Facts) -> None:
    value, output = op.inputs[0], op.outputs[0]
    zeros = [facts.zero(value, axis) for axis in range(len(value.shape))]
    for axis in _sliced_axes(op):
        zero = zeros[axis]
        zeros[axis] = None if zero is None else zero[_slice_indices(op, axis)]
    facts.learn(output, zeros, facts.of(value).fill)


def _emit_slice(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    (array,), value, output = args, op.inputs[0], op.outputs[0]
    start, limit = list(op.params["start_indices"]), list(op.params["limit_indices"])
    strides = list(op.params["strides"] or [1] * len(start))
    cut = [axis for axis in range(len(start)) if frame.shape(value)[axis] is not value.shape[axis]]
    for axis in cut:
        start[axis], limit[axis], strides[axis] = 0, array.shape[axis], 1
    array = lax.slice(array, start, limit, strides)
    for axis in cut:
        if axis in _sliced_axes(op):
            kept = frame.indices(output, axis)
            taken = _slice_indices(op, axis)
            array = take_dense(
                array, axis, taken if kept is None else taken[kept], frame.indices(value, axis)
            )
    return [array]


register_rule("slice", rule=Rule(_link_slice, _flow_slice, _emit_slice))


def _link_split(op: Op, graph: AxisGraph) -> None:
    (value,), start = op.inputs, 0
    for output, size in zip(op.outputs, op.params["sizes"], strict=True):
        for axis, (a, b) in enumerate(zip(value.axes, output.axes, strict=True)):
            if axis == op.params["axis"]:
                graph.link(a, np.arange(start, start + size), b, np.arange(size))
            else:
                graph.same(a, b)
        start += size


def _flow_split(op: Op, facts: Facts) -> None:
    (value,), start = op.inputs, 0
    known, along = facts.of(value), op.params["axis"]
    for output, size in zip(op.outputs, op.params["sizes"], strict=True):
        zeros = list(known.zero)
        zero = zeros[along]
        zeros[along] = None if zero is None else zero[start : start + size]
        facts.learn(output, zeros, known.fill)
        start += size


def _emit_split(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    axis = op.params["axis"]
    return list(lax.split(args[0], [frame.shape(output)[axis] for output in op.outputs], axis))


register_rule("split", rule=Rule(_link_split, _flow_split, _emit_split))


def _link_concatenate(op: Op, graph: AxisGraph) -> None:
    (output,), along, start = op.outputs, op.params["dimension"], 0
    for value in op.inputs:
        for axis, (a, b) in enumerate(zip(value.axes, output.axes, strict=True)):
            if axis != along:
                graph.same(a, b)
            elif not (_is_static(value.shape[axis]) and _is_static(output.shape[axis])):
                graph.pin(a, f"{op} joins axes of symbolic size")
                graph.pin(b, f"{op} joins axes of symbolic size")
            else:
                size = value.shape[axis]
                graph.link(a, np.arange(size), b, np.arange(start, start + size))
                start += size


def _flow_concatenate(op: Op, facts: Facts) -> None:
    (output,), along = op.outputs, op.params["dimension"]
    if all(facts.all_zero(value) for value in op.inputs):
        return facts.learn(output, fill=0)
    zeros = []
    for axis in range(len(output.shape)):
        marks = [facts.zero(value, axis) for value in op.inputs]
        if axis != along:
            zeros.append(all_of(marks))
        elif all(mark is None for mark in marks):
            zeros.append(None)
        else:
            pairs = zip(marks, op.inputs, strict=True)
            zeros.append(
                np.concatenate([np.zeros(v.shape[axis], bool) if m is None else m for m, v in pairs])
            )
    facts.learn(output, zeros)
    return None


register_rule("concatenate", rule=Rule(_link_concatenate, _flow_concatenate, as_it_was))


def _link_stack(op: Op, graph: AxisGraph) -> None:
    """`stack`, and `unstack` the other way round: the axis made or taken apart stays whole."""
    along = op.params["axis"]
    whole, parts = (op.outputs[0], op.inputs) if op.name == "stack" else (op.inputs[0], op.outputs)
    rest = [node for axis, node in enumerate(whole.axes) if axis != along]
    graph.pin(whole.axes[along], f"{op} runs along it")
    for part in parts:
        for a, b in zip(part.axes, rest, strict=True):
            graph.same(a, b)


def _flow_stack(op: Op, facts: Facts) -> None:
    along, (output,) = op.params["axis"], op.outputs
    zeros = [all_of(facts.zero(v, axis) for v in op.inputs) for axis in range(len(output.shape) - 1)]
    nothing = np.array([facts.all_zero(value) for value in op.inputs])
    facts.learn(output, [*zeros[:along], nothing, *zeros[along:]])


def _flow_unstack(op: Op, facts: Facts) -> None:
    along, known = op.params["axis"], facts.of(op.inputs[0])
    zeros = [zero for axis, zero in enumerate(known.zero) if axis != along]
    for index, output in enumerate(op.outputs):
        zero = known.zero[along]
        fill = 0 if zero is not None and zero[index] else known.fill
        facts.learn(output, zeros, fill)


register_rule("stack", rule=Rule(_link_stack, _flow_stack, as_it_was))
register_rule("unstack", rule=Rule(_link_stack, _flow_unstack, as_it_was))


def _reordered(source: Any) -> Rule:
    """A rule for ops that repeat or reorder slices: `source(op, axis)` tells which, or None."""

    def link(op: Op, graph: AxisGraph) -> None:
        value, output = op.inputs[0], op.outputs[0]
        for axis, (a, b) in enumerate(zip(value.axes, output.axes, strict=True)):
            dense = source(op, axis)
            if dense is None:
                graph.same(a, b)
            else:
                graph.link(a, dense, b, np.arange(len(dense)))

    def flow(op: Op, facts: Facts) -> None:
        known, zeros = facts.of(op.inputs[0]), []
        for axis, zero in enumerate(known.zero):
            dense = source(op, axis)
            zeros.append(zero if zero is None or dense is None else zero[dense])
        facts.learn(op.outputs[0], zeros, known.fill)

    return Rule(link, flow, as_it_was)


def _reversed(op: Op, axis: int) -> np.ndarray | None:
    size = op.inputs[0].shape[axis]
    return np.arange(size)[::-1] if axis in op.params["dimensions"] else None


def _tiled(op: Op, axis: int) -> np.ndarray | None:
    size, reps = op.inputs[0].shape[axis], op.params["reps"][axis]
    return np.tile(np.arange(size), reps) if reps != 1 else None


register_rule("rev", rule=_reordered(_reversed))
register_rule("tile", rule=_reordered(_tiled))


def _padded(op: Op, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Where the input's slices go: their indices before and after, without those cut off."""
    low, high, interior = op.params["padding_config"][axis]
    if not (low or high or interior):
        return None
    after = low + np.arange(op.inputs[0].shape[axis]) * (interior + 1)
    inside = (after >= 0) & (after < op.outputs[0].shape[axis])
    return np.flatnonzero(inside), after[inside]


def _link_pad(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for axis, (a, b) in enumerate(zip(value.axes, output.axes, strict=True)):
        if not any(op.params["padding_config"][axis]):
            graph.same(a, b)
        elif not (_is_static(value.shape[axis]) and _is_static(output.shape[axis])):
            graph.pin(a, f"{op} pads an axis of symbolic size")
            graph.pin(b, f"{op} pads an axis of symbolic size")
        else:
            places = _padded(op, axis)
            assert places is not None
            graph.link(a, places[0], b, places[1])


def _flow_pad(op: Op, facts: Facts) -> None:
    value, output = op.inputs[0], op.outputs[0]
    with_zero = is_zero(facts.of(op.inputs[1]).fill)
    padded = [axis for axis in range(len(value.shape)) if any(op.params["padding_config"][axis])]
    zeros: list[Vector | None] = []
    for axis in range(len(value.shape)):
        zero = facts.zero(value, axis)
        if axis not in padded:
            zeros.append(zero if with_zero or not padded else None)
        elif not (with_zero and _is_static(output.shape[axis]) and _is_static(value.shape[axis])):
            zeros.append(None)
        else:
            places = _padded(op, axis)
            assert places is not None
            marks = np.ones(output.shape[axis], bool)
            marks[places[1]] = False if zero is None else zero[places[0]]
            zeros.append(marks)
    facts.learn(output, zeros, fill=0 if with_zero and facts.all_zero(value) else None)


def _emit_pad(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    (array, filler), value, output = args, op.inputs[0], op.outputs[0]
    config = list(op.params["padding_config"])
    cut = {}
    for axis, places in enumerate(config):
        before, after = frame.indices(value, axis), frame.indices(output, axis)
        if any(places) and (before is not None or after is not None):
            cut[axis] = before, after
            config[axis] = (0, 1, 0)  # one slice of padding, to be taken as often as needed
    array = lax.pad(array, filler, config)
    for axis, (before, after) in cut.items():
        places = _padded(op, axis)
        assert places is not None
        kept = np.arange(value.shape[axis]) if before is None else before
        source = np.full(output.shape[axis], len(kept))
        stays = np.isin(places[0], kept)
        source[places[1][stays]] = np.searchsorted(kept, places[0][stays])
        array = take(array, axis, source if after is None else source[after])
    return [array]


register_rule("pad", rule=Rule(_link_pad, _flow_pad, _emit_pad))
