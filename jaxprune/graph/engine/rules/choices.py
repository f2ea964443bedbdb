"""Choosing the largest: `argmax`, `argmin`, `top_k`, which route tokens to experts.

A choice needs all of its axis, because a masked slice is a number like any other: the logit of an expert
whose router column is masked is 0, and may be the largest. But slices that are alike, as those of all masked
experts are, can be put back for the choice. So experts can be dropped with their weights, and the choice is
the same as before: where it falls on a dropped expert, that adds nothing, as its zeros did.

This is done only for an axis that a product sums over elsewhere, as it sums over experts. The classes that a
network chooses from are read by no product, and are pinned.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, Region
from jaxprune.graph.engine.rules.base import (
    Frame,
    Rule,
    learn_moved,
    learn_nothing,
    link_moved,
    register_rule,
)

_NAMES = ("argmax", "argmin", "top_k")


def _axis(op: Op) -> int:
    """Return the axis that is chosen along."""
    if op.name == "top_k":
        return op.params.get("axis", -1) % len(op.inputs[0].shape)
    return op.params["axes"][0]


def _other_axes(op: Op) -> list[int | None]:
    """Return, for each axis of the outputs, the axis of the input that it is; None for the chosen places."""
    along, rank = _axis(op), len(op.inputs[0].shape)
    axes = [None if axis == along else axis for axis in range(rank)]
    return axes if op.name == "top_k" else [axis for axis in axes if axis is not None]


def _link(op: Op, graph: AxisGraph) -> None:
    for output in op.outputs:
        link_moved(graph, op.inputs[0], output, _other_axes(op))
        if op.name == "top_k":
            graph.pin(output.axes[_axis(op)], f"{op} orders it")


def pin_choices(region: Region, graph: AxisGraph) -> None:
    """Pin the axes that are chosen along, except those that a product sums over; to be called last."""
    summed = {
        graph.find(value.axes[axis])
        for op in _ops(region)
        if op.name == "dot_general"
        for value, axes in zip(op.inputs, op.params["dimension_numbers"][0], strict=True)
        for axis in axes
    }
    for op in _ops(region):
        if op.name in _NAMES and graph.find(node := op.inputs[0].axes[_axis(op)]) not in summed:
            graph.pin(node, f"{op} reads all of it")


def _ops(region: Region) -> Iterator[Op]:
    for op in region.ops:
        yield op
        for inner in op.regions.values():
            yield from _ops(inner)


def _flow(op: Op, facts: Facts) -> None:
    (value,), along = op.inputs, _axis(op)
    facts.need(op, value, along, facts.alike(value, along))
    learn_nothing(op, facts)
    if op.name == "top_k":
        learn_moved(facts, value, op.outputs[0], _other_axes(op))


def _emit(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    (value,), (array,), along = op.inputs, args, _axis(op)
    kept = frame.indices(value, along)
    if kept is None:
        return op.bind(array)
    # The dropped slices are put back, by their representative, in the places that they had.
    source = np.full(value.shape[along], len(kept))
    source[kept] = np.arange(len(kept))
    dropped = jnp.asarray(frame.representative(value, along), array.dtype)
    shape = [1 if axis == along else size for axis, size in enumerate(array.shape)]
    both = jnp.concatenate([array, jnp.broadcast_to(dropped, shape)], axis=along)
    return op.bind(frame.take(both, along, source))


register_rule(
    *_NAMES,
    rule=Rule(
        _link,
        _flow,
        _emit,
        conservative="the axis that is chosen along is kept whole, except slices that are alike and summed "
        "over by a product elsewhere, as experts are",
    ),
)
