"""Sums and gathers over devices, or over an axis that `vmap` mapped.

Under `vmap`, `psum` names axes of its input by number: it is then a reduction like any other. Inside
`shard_map` axes have names, and each device sums entries at the same positions.
"""

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.rules.base import Rule, emit_unchanged, learn_nothing, register_rule
from jaxprune.graph.engine.rules.elementwise import link_each


def _reduced(op: Op) -> tuple[int, ...]:
    """Return the axes of the inputs that are reduced."""
    return tuple(axis for axis in op.params["axes"] if isinstance(axis, int))


def _left(op: Op, value: Value) -> list[int]:
    return [axis for axis in range(len(value.shape)) if axis not in _reduced(op)]


def _link_reduction(op: Op, graph: AxisGraph) -> None:
    for value, output in zip(op.inputs, op.outputs, strict=True):
        for axis, node in zip(_left(op, value), output.axes, strict=True):
            graph.same(value.axes[axis], node)
        if op.name != "psum":
            for axis in _reduced(op):
                graph.pin(value.axes[axis], f"{op} reads all of it")


def _flow_reduction(op: Op, facts: Facts) -> None:
    for value, output in zip(op.inputs, op.outputs, strict=True):
        zeros = [facts.zero(value, axis) for axis in _left(op, value)]
        nothing = facts.all_zero(value)
        for axis in _reduced(op) if op.name == "psum" else ():
            facts.need(op, value, axis, facts.zero(value, axis))
        facts.learn(output, zeros, fill=0 if nothing else None)


register_rule("psum", "psum_invariant", rule=Rule(_link_reduction, _flow_reduction, emit_unchanged))
register_rule(
    "pmax",
    "pmin",
    rule=Rule(
        _link_reduction,
        _flow_reduction,
        emit_unchanged,
        conservative="a reduced axis of the input is kept whole",
    ),
)


# Entry by entry, on each device or from one device to another.


def _flow_each(op: Op, facts: Facts) -> None:
    for value, output in zip(op.inputs, op.outputs, strict=True):
        facts.learn(output, facts.of(value).zero, fill=0 if facts.all_zero(value) else None)


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


def _pairs(op: Op) -> list[tuple[int, int]]:
    """Return the axes that are left alone, as pairs: in the input and in the output."""
    value, output = op.inputs[0], op.outputs[0]
    before, after = _touched(op)
    old = [axis for axis in range(len(value.shape)) if axis not in before]
    new = [axis for axis in range(len(output.shape)) if axis not in after]
    return list(zip(old, new, strict=True))


def _link_along(op: Op, graph: AxisGraph) -> None:
    value, output = op.inputs[0], op.outputs[0]
    for array, axes in zip((value, output), _touched(op), strict=True):
        for axis in axes:
            graph.pin(array.axes[axis], f"{op} moves it between devices")
    for a, b in _pairs(op):
        graph.same(value.axes[a], output.axes[b])


def _flow_along(op: Op, facts: Facts) -> None:
    value, output = op.inputs[0], op.outputs[0]
    zeros: list[Vector | None] = [None] * len(output.shape)
    for a, b in _pairs(op):
        zeros[b] = facts.zero(value, a)
    facts.learn(output, zeros, fill=0 if facts.all_zero(value) else None)


_ALONG = "the axis that is gathered, scattered or exchanged is kept whole"
register_rule(
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    rule=Rule(_link_along, _flow_along, emit_unchanged, conservative=_ALONG),
)


register_rule("axis_index", rule=Rule(lambda op, graph: None, learn_nothing, emit_unchanged))
