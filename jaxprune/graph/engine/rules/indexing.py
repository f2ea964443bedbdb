"""Indexing by numbers known only at run time: an axis that is indexed is pinned, all others are free."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, both
from jaxprune.graph.engine.ir import Op, concrete, other_axes, same_size
from jaxprune.graph.engine.rules.base import (
    Frame,
    Rule,
    emit_unchanged,
    learn_moved,
    register_rule,
    tie_or_pin,
)
from jaxprune.graph.engine.rules.slices import take_dense

_PICKED = "an axis is kept whole where slices are picked by numbers that are known only at run time"
_WRITTEN = "an axis is kept whole where only some of its slices are written"


# Gather. Each axis of the output is one of the indices, or a window into one of the operand.


def _windows(op: Op) -> dict[int, int]:
    """Return the axes of the operand that appear in the output, each with its axis of the output."""
    numbers = op.params["dimension_numbers"]
    left = other_axes(op.inputs[0], numbers.collapsed_slice_dims, numbers.operand_batching_dims)
    return dict(zip(left, numbers.offset_dims, strict=True))


def _index_axes(op: Op) -> dict[int, int]:
    """Return the axes of the indices, except the last, each with its axis of the output."""
    return dict(enumerate(other_axes(op.outputs[0], op.params["dimension_numbers"].offset_dims)))


def _known_take(op: Op) -> tuple[int, int, np.ndarray] | None:
    """Return the axis that a gather takes constant indices of, its place in the output, and the indices.

    None for any other gather.
    """
    numbers = op.params["dimension_numbers"]
    if len(numbers.start_index_map) != 1 or numbers.start_index_map != numbers.collapsed_slice_dims:
        return None
    if numbers.operand_batching_dims or len(op.inputs[1].shape) != 2:
        return None
    if any(not same_size(op.params["slice_sizes"][axis], op.inputs[0].shape[axis]) for axis in _windows(op)):
        return None
    if "known take" not in op.memo:
        found, axis = concrete(op.inputs[1]), numbers.start_index_map[0]
        op.memo["known take"] = None
        if found is not None and found.size and 0 <= found.min() <= found.max() < op.inputs[0].shape[axis]:
            op.memo["known take"] = axis, _index_axes(op)[0], found[:, 0]
    return op.memo["known take"]


def _link_gather(op: Op, graph: AxisGraph) -> None:
    (operand, indices), (output,) = op.inputs, op.outputs
    numbers, sizes, known = op.params["dimension_numbers"], op.params["slice_sizes"], _known_take(op)
    windows = _windows(op)
    for axis, node in enumerate(operand.axes):
        if axis in windows and same_size(sizes[axis], operand.shape[axis]):
            graph.same(node, output.axes[windows[axis]])
        elif known is not None and axis == known[0]:
            graph.link(node, known[2], output.axes[known[1]], np.arange(len(known[2])))
        elif axis not in numbers.operand_batching_dims:
            graph.pin(node, f"{op} looks slices of it up by index")
            if axis in windows:
                graph.pin(output.axes[windows[axis]], f"{op} looks slices of it up by index")
    for axis, place in _index_axes(op).items():
        if known is None:
            graph.same(indices.axes[axis], output.axes[place])
    graph.pin(indices.axes[-1], "it holds the coordinates of an index")
    for axis, other in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        graph.same(operand.axes[axis], indices.axes[other])


def _flow_gather(op: Op, facts: Facts) -> None:
    (operand, _), (output,) = op.inputs, op.outputs
    zeros: list[Vector | None] = [None] * len(output.shape)
    if _fills_with_number(op) and _known_take(op) is None:
        return facts.learn(output)
    for axis, place in _windows(op).items():
        if same_size(op.params["slice_sizes"][axis], operand.shape[axis]):
            zeros[place] = facts.zero(operand, axis)
    if (known := _known_take(op)) is not None:
        zero = facts.zero(operand, known[0])
        zeros[known[1]] = None if zero is None else zero[known[2]]
    facts.learn(output, zeros, fill=0 if facts.all_zero(operand) else None)
    return None


def _fills_with_number(op: Op) -> bool:
    """Whether indices out of bounds read a number other than zero.

    A NaN fill does not count: every slice reads it, so the remaining slices still contain it.
    """
    if lax.GatherScatterMode.from_any(op.params["mode"]) != lax.GatherScatterMode.FILL_OR_DROP:
        return False
    fill = op.params["fill_value"]
    if fill is None:  # NaN for floats; the largest or smallest integer otherwise
        return not jnp.issubdtype(op.outputs[0].dtype, jnp.inexact)
    return not (np.isnan(fill) or fill == 0)


def _emit_gather(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    operand, output, known = op.inputs[0], op.outputs[0], _known_take(op)
    if known is not None:
        axis, place, dense = known
        after = frame.indices(output, place)
        taken = take_dense(
            frame, args[0], axis, dense if after is None else dense[after], frame.indices(operand, axis)
        )
        order = [a for a in range(taken.ndim) if a != axis]
        order.insert(place, axis)
        return [taken.transpose(order) if isinstance(taken, np.ndarray) else lax.transpose(taken, order)]
    sizes = list(op.params["slice_sizes"])
    for axis in _windows(op):
        if same_size(sizes[axis], operand.shape[axis]):
            sizes[axis] = frame.shape(operand)[axis]
    names = ("dimension_numbers", "unique_indices", "indices_are_sorted", "mode", "fill_value")
    return [lax.gather(*args, slice_sizes=sizes, **{name: op.params[name] for name in names})]


register_rule("gather", rule=Rule(_link_gather, _flow_gather, _emit_gather, conservative=_PICKED))


def _link_dynamic_slice(op: Op, graph: AxisGraph) -> None:
    operand, (output,) = op.inputs[0], op.outputs
    for axis, nodes in enumerate(zip(operand.axes, output.axes, strict=True)):
        is_whole = same_size(operand.shape[axis], output.shape[axis])
        tie_or_pin(graph, nodes, is_whole, f"{op} takes part of it")


def _flow_dynamic_slice(op: Op, facts: Facts) -> None:
    operand, (output,) = op.inputs[0], op.outputs
    sizes = enumerate(zip(operand.shape, output.shape, strict=True))
    axes = [axis if same_size(a, b) else None for axis, (a, b) in sizes]
    learn_moved(facts, operand, output, axes, keeps_fill=True)


def _emit_dynamic_slice(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    return [lax.dynamic_slice(args[0], args[1:], frame.shape(op.outputs[0]))]


register_rule(
    "dynamic_slice",
    rule=Rule(_link_dynamic_slice, _flow_dynamic_slice, _emit_dynamic_slice, conservative=_PICKED),
)


def _link_update(op: Op, graph: AxisGraph) -> None:
    (operand, update), (output,) = op.inputs[:2], op.outputs
    for axis, (a, u, b) in enumerate(zip(operand.axes, update.axes, output.axes, strict=True)):
        graph.same(a, b)
        is_whole = same_size(operand.shape[axis], update.shape[axis])
        tie_or_pin(graph, (a, u), is_whole, f"{op} writes part of it")


def _flow_update(op: Op, facts: Facts) -> None:
    (operand, update), (output,) = op.inputs[:2], op.outputs
    axes = range(len(output.shape))
    written = [same_size(operand.shape[axis], update.shape[axis]) for axis in axes]  # along all of the axis
    zeros = [
        both(facts.zero(operand, axis), facts.zero(update, axis)) if written[axis] else None for axis in axes
    ]
    if all(written):  # nothing of the operand is left, since starts are clamped so that the update fits
        zeros = [facts.zero(update, axis) for axis in axes]
    nothing = (all(written) or facts.all_zero(operand)) and facts.all_zero(update)
    facts.learn(output, zeros, fill=0 if nothing else None)


register_rule(
    "dynamic_update_slice", rule=Rule(_link_update, _flow_update, emit_unchanged, conservative=_WRITTEN)
)


# Scatter: an axis along which windows are as long as the operand is free, one that is indexed is pinned.


def _scatter_windows(op: Op) -> dict[int, int]:
    """Return the axes of the operand that updates write in full, each with its axis of the updates."""
    operand, _, updates = op.inputs
    numbers = op.params["dimension_numbers"]
    left = other_axes(operand, numbers.inserted_window_dims, numbers.operand_batching_dims)
    pairs = zip(left, numbers.update_window_dims, strict=True)
    return {axis: place for axis, place in pairs if same_size(operand.shape[axis], updates.shape[place])}


def _link_scatter(op: Op, graph: AxisGraph) -> None:
    (operand, indices, updates), (output,) = op.inputs, op.outputs
    windows = _scatter_windows(op)
    for axis, (a, b) in enumerate(zip(operand.axes, output.axes, strict=True)):
        graph.same(a, b)
        if axis in windows:
            graph.same(a, updates.axes[windows[axis]])
        else:
            graph.pin(a, f"{op} writes slices of it by index")
    for axis, node in enumerate(updates.axes):
        if axis not in windows.values():
            graph.pin(node, f"{op} writes slices of it by index")
    for node in indices.axes:
        graph.pin(node, f"{op} writes slices by it")


def _flow_scatter(op: Op, facts: Facts) -> None:
    (operand, _, updates), (output,) = op.inputs, op.outputs
    windows = _scatter_windows(op)
    additive = op.name in ("scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter_sub")
    zeros = [
        both(facts.zero(operand, axis), facts.zero(updates, windows[axis]))
        if axis in windows and additive
        else None
        for axis in range(len(output.shape))
    ]
    facts.learn(output, zeros)


register_rule(
    "scatter",
    *(f"scatter{dash}{name}" for dash in "-_" for name in ("add", "sub", "mul", "min", "max")),
    rule=Rule(_link_scatter, _flow_scatter, emit_unchanged, conservative=_WRITTEN),
)
