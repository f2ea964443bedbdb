"""Reductions, cumulative and windowed ops, sorting.

A sum does not need slices that are zero. If m slices of its operand are alike, with value c, and are dropped,
the sum adds m * c for them; a maximum is taken over the kept slices and copies of c. So a norm over channels
is exact after some of these were dropped: in a two-pass variance the dropped channels of x - mean are not
zero, but they are all -mean.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts, either, is_zero
from jaxprune.graph.engine.ir import Op, Value, other_axes
from jaxprune.graph.engine.rules.base import (
    Frame,
    Rule,
    emit_unchanged,
    learn_moved,
    learn_nothing,
    link_moved,
    register_rule,
    tie_or_pin,
)

_REDUCED = "the reduced axes are kept whole"
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
_EXTREMA = ("reduce_max", "reduce_min", "reduce_or", "reduce_and")


def _left(op: Op) -> list[int]:
    """Return the axes that are not reduced, in the order of the output."""
    return other_axes(op.inputs[0], op.params["axes"])


def _link_left(op: Op, graph: AxisGraph) -> None:
    link_moved(graph, op.inputs[0], op.outputs[0], _left(op))


def _flow_left(op: Op, facts: Facts) -> None:
    learn_moved(facts, op.inputs[0], op.outputs[0], _left(op))


def _alike_axis(op: Op, facts: Facts, besides_zero: bool) -> int | None:
    """Return the one reduced axis along which alike slices may be dropped: the last that has any.

    It is only one, because slices that are dropped along two axes would have entries in common, and those
    would be counted twice.
    """
    (value,) = op.inputs
    marks = (
        facts.of(value).alike if besides_zero else [facts.alike(value, a) for a in range(len(value.shape))]
    )
    some = [a for a in op.params["axes"] if marks[a] is not None and value.shape[a] != 1]
    return max(some, default=None)


def _flow_sum(op: Op, facts: Facts) -> None:
    (value,), counted = op.inputs, _alike_axis(op, facts, besides_zero=True)
    for axis in op.params["axes"]:
        dispensable = facts.zero(value, axis)
        if axis == counted:
            dispensable = either(dispensable, facts.alike(value, axis))
        facts.need(op, value, axis, dispensable)
    _flow_left(op, facts)


def _emit_sum(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    (value,), axis = op.inputs, _alike_axis(op, frame.facts, besides_zero=True)
    (total,) = op.bind(*args)
    left_out = 0 if axis is None else _left_out(value, axis, frame)
    if axis is not None and left_out:
        (each,) = op.bind(frame.representative(value, axis))
        total = total + each * jnp.asarray(left_out, total.dtype)
    return [total]


def _left_out(value: Value, axis: int, frame: Frame) -> int:
    """Return how many slices are dropped that are not zero."""
    kept = frame.indices(value, axis)
    if kept is None:
        return 0
    dropped = np.ones(value.shape[axis], bool)
    dropped[kept] = False
    zero = frame.facts.zero(value, axis)
    return int(dropped.sum() if zero is None else (dropped & ~zero).sum())


def _flow_extremum(op: Op, facts: Facts) -> None:
    (value,), counted = op.inputs, _alike_axis(op, facts, besides_zero=False)
    for axis in op.params["axes"]:
        facts.need(op, value, axis, facts.alike(value, axis) if axis == counted else None)
    _flow_left(op, facts)


def _emit_extremum(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    (value,), axis = op.inputs, _alike_axis(op, frame.facts, besides_zero=False)
    kept = None if axis is None else frame.indices(value, axis)
    if axis is None or kept is None:
        return op.bind(*args)
    # As many copies as slices were dropped: where several are largest, the derivative is shared by all.
    shape = list(args[0].shape)
    shape[axis] = value.shape[axis] - len(kept)
    others = jnp.broadcast_to(frame.representative(value, axis), shape)
    return op.bind(jnp.concatenate([args[0], others], axis=axis))


register_rule("reduce_sum", rule=Rule(_link_left, _flow_sum, _emit_sum))
register_rule(*_EXTREMA, rule=Rule(_link_left, _flow_extremum, _emit_extremum))


def _link_pinned(op: Op, graph: AxisGraph) -> None:
    for axis in op.params["axes"]:
        graph.pin(op.inputs[0].axes[axis], f"{op} reads all of it")
    _link_left(op, graph)


def _flow_product(op: Op, facts: Facts) -> None:
    if any(facts.zero(op.inputs[0], axis) is not None for axis in op.params["axes"]):
        facts.learn(op.outputs[0], fill=0)
    else:
        _flow_left(op, facts)


register_rule("reduce_prod", rule=Rule(_link_pinned, _flow_product, emit_unchanged, conservative=_REDUCED))
register_rule("reduce_xor", rule=Rule(_link_pinned, _flow_left, emit_unchanged, conservative=_REDUCED))


# `lax.reduce` with a computation that JAX has no primitive for, or over several arrays at once.


def _is_sum(op: Op) -> bool:
    """Whether one array is reduced by addition."""
    jaxpr = op.params["jaxpr"].jaxpr
    if len(op.inputs) != 2 or [eqn.primitive.name for eqn in jaxpr.eqns] != ["add"]:
        return False
    (eqn,) = jaxpr.eqns
    return set(map(id, eqn.invars)) == set(map(id, jaxpr.invars)) and jaxpr.outvars == eqn.outvars


def _link_reduce(op: Op, graph: AxisGraph) -> None:
    first, reduced = op.inputs[0], op.params["dimensions"]
    for value in op.inputs[: len(op.inputs) // 2]:
        link_moved(graph, first, value, range(len(first.shape)))
    for output in op.outputs:
        link_moved(graph, first, output, other_axes(first, reduced))
    if not _is_sum(op):
        for axis in reduced:
            graph.pin(first.axes[axis], f"{op} reads all of it")


def _flow_reduce(op: Op, facts: Facts) -> None:
    if not _is_sum(op):
        return learn_nothing(op, facts)
    (value, start), reduced = op.inputs, op.params["dimensions"]
    for axis in reduced:
        facts.need(op, value, axis, facts.zero(value, axis))
    if is_zero(facts.of(start).fill):
        return learn_moved(facts, value, op.outputs[0], other_axes(value, reduced))
    return facts.learn(op.outputs[0])


register_rule(
    "reduce",
    rule=Rule(
        _link_reduce, _flow_reduce, emit_unchanged, "except for a sum, the reduced axes are kept whole"
    ),
)


# Ops that move or mix entries along some axes, and do the same to each slice along the others.


def _link_by_axis(op: Op, graph: AxisGraph, is_free: Callable[[int], bool], why: str) -> None:
    """Tie the axes of all arrays of an op that are free, and pin the others."""
    arrays = [value for value in (*op.inputs, *op.outputs) if value.shape]
    for axis in range(len(op.inputs[0].shape)):
        tie_or_pin(graph, [value.axes[axis] for value in arrays], is_free(axis), f"{op} {why}")


def _along(
    axes_of: Callable[[Op], Collection[int]],
    keeps_zero: bool = True,
    conservative: str = "the axis that it runs along is kept whole",
) -> Rule:
    """Return a rule for ops all of whose values have the same axes, of which `axes_of(op)` are pinned."""

    def link(op: Op, graph: AxisGraph) -> None:
        _link_by_axis(op, graph, lambda axis: axis not in axes_of(op), "reads all of it")

    def flow(op: Op, facts: Facts) -> None:
        learn_nothing(op, facts)
        for value, output in zip(op.inputs, op.outputs, strict=False) if keeps_zero else ():
            axes = [None if axis in axes_of(op) else axis for axis in range(len(output.shape))]
            learn_moved(facts, value, output, axes)

    return Rule(link, flow, emit_unchanged, conservative)


def _fft_axes(op: Op) -> range:
    rank = len(op.inputs[0].shape)
    return range(rank - len(op.params["fft_lengths"]), rank)


register_rule("cumsum", "cumprod", "cummax", "cummin", rule=_along(lambda op: (op.params["axis"],)))
register_rule("cumlogsumexp", rule=_along(lambda op: (op.params["axis"],), keeps_zero=False))
register_rule("sort", rule=_along(lambda op: (op.params["dimension"],)))
register_rule("fft", rule=_along(_fft_axes))
register_rule(
    "approx_top_k",
    rule=_along(
        lambda op: (op.params["reduction_dimension"] % len(op.inputs[0].shape),),
        conservative="the axis that is searched is kept whole",
    ),
)


# Windows: an axis that the window does not slide along is free.


_WINDOW = "axes that the window slides along are kept whole"


def _window(op: Op, axis: int) -> tuple[Any, ...]:
    """Return the size of the window along an axis, its stride, padding, and both dilations."""
    params, ones = op.params, (1,) * len(op.inputs[0].shape)
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    size, stride, base, dilation = ((params.get(name) or ones)[axis] for name in names)
    return size, stride, tuple(params["padding"][axis]), base, dilation


def _is_still(op: Op, axis: int) -> bool:
    return _window(op, axis) == (1, 1, (0, 0), 1, 1)


def _link_window(op: Op, graph: AxisGraph) -> None:
    _link_by_axis(op, graph, lambda axis: _is_still(op, axis), "slides a window along it")


def _flow_window(op: Op, facts: Facts) -> None:
    value, (output,) = op.inputs[0], op.outputs
    axes = range(len(output.shape))
    # Padding counts as 0 in a sum. In a maximum it is -inf, which is what a window of padding alone gives.
    if op.name == "reduce_window_sum":
        learn_moved(facts, value, output, [axis if _is_still(op, axis) else None for axis in axes])
    elif all(windows_hold_an_entry(op, axis) for axis in axes):
        facts.learn(output, [facts.zero(value, axis) if _is_still(op, axis) else None for axis in axes])
    else:
        facts.learn(output)


def windows_hold_an_entry(op: Op, axis: int) -> bool:
    """Whether every window certainly contains an entry that is not padding."""
    window, _, padding, base, dilation = _window(op, axis)
    return dilation == 1 and base == 1 and min(padding) >= 0 and max(padding) < window


def _flow_scatter_windows(op: Op, facts: Facts) -> None:
    """Learn from `select_and_scatter_add(source, operand)` or `select_and_gather_add(tangents, operand)`."""
    moved, (output,) = op.inputs[0], op.outputs
    sizes = enumerate(op.params["window_dimensions"])
    axes = [axis if moved.shape[axis] == output.shape[axis] and size == 1 else None for axis, size in sizes]
    learn_moved(facts, moved, output, axes)


register_rule(
    *("reduce_window_sum", "reduce_window_max", "reduce_window_min"),
    rule=Rule(_link_window, _flow_window, emit_unchanged, _WINDOW),
)
register_rule(
    *("select_and_scatter_add", "select_and_gather_add"),
    rule=Rule(_link_window, _flow_scatter_windows, emit_unchanged, _WINDOW),
)
register_rule("reduce_window", rule=Rule(_link_window, learn_nothing, emit_unchanged, _WINDOW))
