"""Primitives whose output slices are slices of the input, or new ones: slice, split, concatenate, pad, ..."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, all_of, is_zero
from jaxprune.graph.engine.ir import Op, other_axes, same_size
from jaxprune.graph.engine.rules.base import (
    Frame,
    Rule,
    emit_unchanged,
    link_moved,
    register_rule,
)
from jaxprune.graph.engine.rules.shapes import is_static


def take_slices(array: Any, axis: int, positions: np.ndarray) -> Any:
    """Return the slices of an array at known positions, without copying where they are all, or contiguous."""
    size = array.shape[axis]
    if np.array_equal(positions, np.arange(size)):
        return array
    if len(positions) and np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
        return lax.slice_in_dim(array, int(positions[0]), int(positions[0]) + len(positions), axis=axis)
    if isinstance(array, np.ndarray):
        return np.take(array, positions, axis=axis)
    return jnp.take(array, positions, axis=axis, mode="clip")


def take_dense(frame: Frame, array: Any, axis: int, dense: np.ndarray, kept: np.ndarray | None) -> Any:
    """Return the slices at known dense positions of an array that has only the `kept` ones."""
    return frame.take(array, axis, dense if kept is None else np.searchsorted(kept, dense))


def _slice_indices(op: Op, axis: int) -> np.ndarray:
    params = op.params
    stride = 1 if params["strides"] is None else params["strides"][axis]
    return np.arange(params["start_indices"][axis], params["limit_indices"][axis], stride)


def _sliced_axes(op: Op) -> list[int]:
    """Return the axes that a slice shortens."""
    value, output = op.inputs[0], op.outputs[0]
    pairs = enumerate(zip(value.shape, output.shape, strict=True))
    return [axis for axis, (old, new) in pairs if not same_size(old, new)]


def _link_slice(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for axis, (a, b) in enumerate(zip(value.axes, output.axes, strict=True)):
        if axis not in _sliced_axes(op):
            graph.same(a, b)
        elif not (is_static(value.shape[axis]) and is_static(output.shape[axis])):
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
                frame, array, axis, taken if kept is None else taken[kept], frame.indices(value, axis)
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
            elif not (is_static(value.shape[axis]) and is_static(output.shape[axis])):
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


register_rule("concatenate", rule=Rule(_link_concatenate, _flow_concatenate, emit_unchanged))


_STACKED = "the axis that is made, or taken apart, is kept whole"


def _link_stack(op: Op, graph: AxisGraph) -> None:
    """Link a stack and its parts, whichever is made of the other: the axis of the parts is pinned."""
    along = op.params["axis"]
    joins = op.name in ("stack", "join_layers")
    stacked, parts = (op.outputs[0], op.inputs) if joins else (op.inputs[0], op.outputs)
    graph.pin(stacked.axes[along], f"{op.source if op.name == 'take_layer' else op} runs along it")
    for part in parts:
        link_moved(graph, stacked, part, other_axes(stacked, (along,)))


def _flow_stack(op: Op, facts: Facts) -> None:
    along, (output,) = op.params["axis"], op.outputs
    zeros = [all_of(facts.zero(v, axis) for v in op.inputs) for axis in range(len(output.shape) - 1)]
    nothing = np.array([facts.all_zero(value) for value in op.inputs])
    facts.learn(output, [*zeros[:along], nothing, *zeros[along:]])


def _flow_unstack(op: Op, facts: Facts) -> None:
    along, known = op.params["axis"], facts.of(op.inputs[0])
    zeros, zero = [known.zero[axis] for axis in other_axes(op.inputs[0], (along,))], known.zero[along]
    for index, output in enumerate(op.outputs, op.params.get("index", 0)):
        facts.learn(output, zeros, 0 if zero is not None and zero[index] else known.fill)


# `take_layer` and `join_layers` are ops of the engine: see `building`.
register_rule("stack", "join_layers", rule=Rule(_link_stack, _flow_stack, emit_unchanged, _STACKED))
register_rule("unstack", rule=Rule(_link_stack, _flow_unstack, emit_unchanged, _STACKED))
register_rule("take_layer", rule=Rule(_link_stack, _flow_unstack, emit_unchanged))


def _reordered(source: Any) -> Rule:
    """Return a rule for ops that repeat or reorder slices.

    `source(op, axis)` returns, for each slice of the output, which slice of the input it is; None for an axis
    that does not change.
    """

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

    return Rule(link, flow, emit_unchanged)


def _reversed(op: Op, axis: int) -> np.ndarray | None:
    size = op.inputs[0].shape[axis]
    return np.arange(size)[::-1] if axis in op.params["dimensions"] else None


def _tiled(op: Op, axis: int) -> np.ndarray | None:
    size, reps = op.inputs[0].shape[axis], op.params["reps"][axis]
    return np.tile(np.arange(size), reps) if reps != 1 else None


register_rule("rev", rule=_reordered(_reversed))
register_rule("tile", rule=_reordered(_tiled))


def _padded(op: Op, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the input's slices before and after padding, without those cut off."""
    low, _, interior = op.params["padding_config"][axis]
    after = low + np.arange(op.inputs[0].shape[axis]) * (interior + 1)
    inside = (after >= 0) & (after < op.outputs[0].shape[axis])
    return np.flatnonzero(inside), after[inside]


def _link_pad(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for axis, (a, b) in enumerate(zip(value.axes, output.axes, strict=True)):
        if not any(op.params["padding_config"][axis]):
            graph.same(a, b)
        elif not (is_static(value.shape[axis]) and is_static(output.shape[axis])):
            graph.pin(a, f"{op} pads an axis of symbolic size")
            graph.pin(b, f"{op} pads an axis of symbolic size")
        else:
            before, after = _padded(op, axis)
            graph.link(a, before, b, after)


def _flow_pad(op: Op, facts: Facts) -> None:
    value, output = op.inputs[0], op.outputs[0]
    with_zero = is_zero(facts.of(op.inputs[1]).fill)
    padded = [axis for axis in range(len(value.shape)) if any(op.params["padding_config"][axis])]
    zeros: list[Vector | None] = []
    for axis in range(len(value.shape)):
        zero = facts.zero(value, axis)
        if axis not in padded:
            zeros.append(zero if with_zero or not padded else None)
        elif not (with_zero and is_static(output.shape[axis]) and is_static(value.shape[axis])):
            zeros.append(None)
        else:
            before, after = _padded(op, axis)
            marks = np.ones(output.shape[axis], bool)
            marks[after] = False if zero is None else zero[before]
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
        # Where slice n of the small array goes: the kept ones to their places, padding (the last slice,
        # number len(kept)) to all others.
        kept = np.arange(value.shape[axis]) if before is None else before
        source = np.full(output.shape[axis], len(kept))
        is_kept = np.isin(places[0], kept)
        source[places[1][is_kept]] = np.searchsorted(kept, places[0][is_kept])
        array = frame.take(array, axis, source if after is None else source[after])
    return [array]


register_rule("pad", rule=Rule(_link_pad, _flow_pad, _emit_pad))
