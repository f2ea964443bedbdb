"""Reductions, cumulative and windowed ops, sorting.

A sum does not need slices that are zero. If m slices of its operand are alike, with value c, and are dropped,
the sum adds m * c for them; a maximum is taken over the kept slices and copies of c. So a norm over channels
is exact after some of these were dropped: in a two-pass variance the dropped channels of x - mean are not
zero, but they are all -mean.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, either
from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.rules.base import Frame, Rule, emit_unchanged, register_rule

_REDUCED = "the reduced axes are kept whole"
_EXTREMA = ("reduce_max", "reduce_min", "reduce_or", "reduce_and")


def _left(op: Op) -> list[tuple[int, int]]:
    """Return the axes that are not reduced, as pairs: in the input and in the output."""
    left = [axis for axis in range(len(op.inputs[0].shape)) if axis not in op.params["axes"]]
    return [(axis, place) for place, axis in enumerate(left)]


def _link_left(op: Op, graph: AxisGraph) -> None:
    for axis, place in _left(op):
        graph.same(op.inputs[0].axes[axis], op.outputs[0].axes[place])


def _flow_left(op: Op, facts: Facts, empty: bool = False) -> None:
    (value,) = op.inputs
    zeros = [facts.zero(value, axis) for axis, _ in _left(op)]
    facts.learn(op.outputs[0], zeros, fill=0 if empty or facts.all_zero(value) else None)


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
    (value,) = op.inputs
    _flow_left(op, facts, empty=any(facts.zero(value, axis) is not None for axis in op.params["axes"]))


register_rule("reduce_prod", rule=Rule(_link_pinned, _flow_product, emit_unchanged, conservative=_REDUCED))
register_rule("reduce_xor", rule=Rule(_link_pinned, _flow_left, emit_unchanged, conservative=_REDUCED))


# Ops that move or mix entries along some axes, and do the same to each slice along the others.


def _along(axes_of: Any, keeps_zero: bool = True) -> Rule:
    """Return a rule for ops all of whose values have the same axes, of which `axes_of(op)` are pinned."""

    def link(op: Op, graph: AxisGraph) -> None:
        first = op.inputs[0]
        for value in (*op.inputs, *op.outputs):
            for axis in range(len(first.shape)):
                if axis in axes_of(op):
                    graph.pin(value.axes[axis], f"{op} reads all of it")
                else:
                    graph.same(first.axes[axis], value.axes[axis])

    def flow(op: Op, facts: Facts) -> None:
        for value, output in zip(op.inputs, op.outputs, strict=False):
            if keeps_zero and facts.all_zero(value):
                facts.learn(output, fill=0)
                continue
            zeros = [
                None if axis in axes_of(op) or not keeps_zero else facts.zero(value, axis)
                for axis in range(len(output.shape))
            ]
            facts.learn(output, zeros)
        for output in op.outputs[len(op.inputs) :]:
            facts.learn(output)

    return Rule(link, flow, emit_unchanged, conservative="the axis that it runs along is kept whole")


def _axis(op: Op) -> tuple[int, ...]:
    return (op.params["axis"],)


register_rule("cumsum", "cumprod", "cummax", "cummin", rule=_along(_axis))
register_rule("cumlogsumexp", rule=_along(_axis, keeps_zero=False))
register_rule("sort", rule=_along(lambda op: (op.params["dimension"],)))


def _fft_axes(op: Op) -> tuple[int, ...]:
    rank = len(op.inputs[0].shape)
    return tuple(range(rank - len(op.params["fft_lengths"]), rank))


register_rule("fft", rule=_along(_fft_axes))


# Windows: an axis that the window does not slide along is free.


_WINDOW = "axes that the window slides along are kept whole"


def _window(op: Op, axis: int) -> tuple[Any, ...]:
    params = op.params
    rank = len(op.inputs[0].shape)
    ones = (1,) * rank
    return (
        params["window_dimensions"][axis],
        (params.get("window_strides") or ones)[axis],
        tuple(params["padding"][axis]),
        (params.get("base_dilation") or ones)[axis],
        (params.get("window_dilation") or ones)[axis],
    )


def _link_window(op: Op, graph: AxisGraph) -> None:
    arrays = [value for value in (*op.inputs, *op.outputs) if value.shape]
    for axis in range(len(op.inputs[0].shape)):
        still = _window(op, axis) == (1, 1, (0, 0), 1, 1)
        for value in arrays:
            if still:
                graph.same(arrays[0].axes[axis], value.axes[axis])
            else:
                graph.pin(value.axes[axis], f"{op} slides a window along it")


def _flow_window(op: Op, facts: Facts) -> None:
    value, (output,) = op.inputs[0], op.outputs
    zeros: list[Vector | None] = [None] * len(output.shape)
    # Padding counts as 0 in a sum. In a maximum it is -inf, which is what a window of padding alone gives.
    sums = op.name == "reduce_window_sum"
    if sums or all(windows_hold_an_entry(op, axis) for axis in range(len(output.shape))):
        zeros = [
            facts.zero(value, axis) if _window(op, axis) == (1, 1, (0, 0), 1, 1) else None
            for axis in range(len(output.shape))
        ]
    facts.learn(output, zeros, fill=0 if sums and facts.all_zero(value) else None)


def windows_hold_an_entry(op: Op, axis: int) -> bool:
    """Whether every window certainly contains an entry that is not padding."""
    window, _, padding, base, dilation = _window(op, axis)
    return dilation == 1 and base == 1 and min(padding) >= 0 and max(padding) < window


register_rule(
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    rule=Rule(_link_window, _flow_window, emit_unchanged, conservative=_WINDOW),
)


def _link_scatter_windows(op: Op, graph: AxisGraph) -> None:
    """Link `select_and_scatter_add(source, operand)` or `select_and_gather_add(tangents, operand)`."""
    arrays = (*op.inputs, *op.outputs)
    for axis in range(len(op.inputs[0].shape)):
        params = op.params
        still = params["window_dimensions"][axis] == 1 and params["window_strides"][axis] == 1
        still = still and tuple(params["padding"][axis]) == (0, 0)
        for value in arrays:
            if still:
                graph.same(arrays[0].axes[axis], value.axes[axis])
            else:
                graph.pin(value.axes[axis], f"{op} slides a window along it")


def _flow_scatter_windows(op: Op, facts: Facts) -> None:
    moved, (output,) = op.inputs[0], op.outputs
    zeros = [
        facts.zero(moved, axis) if moved.shape[axis] == output.shape[axis] and size == 1 else None
        for axis, size in enumerate(op.params["window_dimensions"])
    ]
    facts.learn(output, zeros, fill=0 if facts.all_zero(moved) else None)


register_rule(
    "select_and_scatter_add",
    "select_and_gather_add",
    rule=Rule(_link_scatter_windows, _flow_scatter_windows, emit_unchanged, conservative=_WINDOW),
)
