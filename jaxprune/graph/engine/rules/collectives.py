"""Sums and gathers over devices, or over an axis that `vmap` mapped.

Under `vmap`, `psum` names axes of its input by number: it is then a reduction like any other. Inside
`shard_map` axes have names, and each device sums entries at the same positions.
"""

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, other_axes
from jaxprune.graph.engine.rules.base import (
    Rule,
    emit_unchanged,
    learn_moved,
    learn_nothing,
    link_moved,
    register_rule,
)
from jaxprune.graph.engine.rules.elementwise import link_each


def _reduced(op: Op) -> tuple[int, ...]:
    """Return the axes of the inputs that are reduced."""
    return tuple(axis for axis in op.params["axes"] if isinstance(axis, int))


def _link_reduction(op: Op, graph: AxisGraph) -> None:
    for value, output in zip(op.inputs, op.outputs, strict=True):
        link_moved(graph, value, output, other_axes(value, _reduced(op)))
        if op.name != "psum":
            for axis in _reduced(op):
                graph.pin(value.axes[axis], f"{op} reads all of it")


def _flow_reduction(op: Op, facts: Facts) -> None:
    for value, output in zip(op.inputs, op.outputs, strict=True):
        for axis in _reduced(op) if op.name == "psum" else ():
            facts.need(op, value, axis, facts.zero(value, axis))
        learn_moved(facts, value, output, other_axes(value, _reduced(op)))


register_rule("psum", "psum_invariant", rule=Rule(_link_reduction, _flow_reduction, emit_unchanged))
register_rule(
    *("pmax", "pmin"),
    rule=Rule(_link_reduction, _flow_reduction, emit_unchanged, "a reduced axis of the input is kept whole"),
)


# Entry by entry, on each device or from one device to another.


def _flow_each(op: Op, facts: Facts) -> None:
    for value, output in zip(op.inputs, op.outputs, strict=True):
        learn_moved(facts, value, output, range(len(value.shape)))


register_rule("ppermute", "pbroadcast", "pvary", rule=Rule(link_each, _flow_each, emit_unchanged))


# Gathers and scatters along an axis, which is pinned. An axis may be added, or removed.


def _touched(op: Op) -> tuple[set[int], set[int]]:
    """Return the axes of the input and those of the output that are gathered or scattered along."""
    params = op.params
    if op.name == "all_to_all":
        split, joined = params["split_axis"], params["concat_axis"]
        return {split, joined}, {split, joined}
    along = params["scatter_dimension" if op.name == "reduce_scatter" else "all_gather_dimension"]
    if params["tiled"]:
        return {along}, {along}
    return ({along}, set()) if op.name == "reduce_scatter" else (set(), {along})


def _untouched(op: Op) -> list[int | None]:
    """Return, for each axis of the output, the axis of the input that it is; None for one of `_touched`."""
    before, after = _touched(op)
    left = iter(other_axes(op.inputs[0], before))
    return [None if axis in after else next(left) for axis in range(len(op.outputs[0].shape))]


def _link_along(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for array, axes in zip((value, output), _touched(op), strict=True):
        for axis in axes:
            graph.pin(array.axes[axis], f"{op} moves it between devices")
    link_moved(graph, value, output, _untouched(op))


def _flow_along(op: Op, facts: Facts) -> None:
    learn_moved(facts, op.inputs[0], op.outputs[0], _untouched(op))


_ALONG = "the axis that is gathered, scattered or exchanged is kept whole"
register_rule(
    *("all_gather", "reduce_scatter", "all_to_all"),
    rule=Rule(_link_along, _flow_along, emit_unchanged, _ALONG),
)
register_rule("axis_index", rule=Rule(lambda op, graph: None, learn_nothing, emit_unchanged))
