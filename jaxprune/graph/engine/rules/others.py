"""All other primitives: bits, random keys, generic reductions and windows."""

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, is_zero
from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.rules.base import Rule, emit_unchanged, learn_nothing, pin_inputs, register_rule

# An array reinterpreted as another type: with a smaller type it has one more axis, of the parts of an entry.


def _link_cast(op: Op, graph: AxisGraph) -> None:
    for value in (*op.inputs, *op.outputs):
        for axis, node in enumerate(value.axes):
            if axis < min(len(op.inputs[0].shape), len(op.outputs[0].shape)):
                graph.same(op.inputs[0].axes[axis], node)
            else:
                graph.pin(node, f"{op} takes entries apart along it")


register_rule(
    "bitcast_convert_type",
    "random_wrap",
    "random_unwrap",
    "random_clone",
    rule=Rule(
        _link_cast,
        learn_nothing,
        emit_unchanged,
        conservative="the axis of the parts of an entry is kept whole",
    ),
)


# Random numbers are drawn as in the dense program and cut afterwards, so that the kept ones are the same.

register_rule(
    *("random_bits", "random_gamma", "random_seed", "random_split", "random_fold_in"),
    "rng_bit_generator",
    rule=Rule(
        pin_inputs,
        learn_nothing,
        emit_unchanged,
        conservative="drawn whole, then cut, so that the kept bits are the same",
    ),
)


# `lax.reduce` with a computation that JAX has no primitive for, or over several arrays at once.


def _operands(op: Op) -> list[Value]:
    return op.inputs[: len(op.inputs) // 2]


def _is_sum(op: Op) -> bool:
    """Whether one array is reduced by addition."""
    eqns = op.params["jaxpr"].jaxpr.eqns
    if len(op.inputs) != 2 or len(eqns) != 1 or eqns[0].primitive.name != "add":
        return False
    jaxpr = op.params["jaxpr"].jaxpr
    return set(map(id, eqns[0].invars)) == set(map(id, jaxpr.invars)) and jaxpr.outvars == eqns[0].outvars


def _left(op: Op) -> list[int]:
    return [axis for axis in range(len(op.inputs[0].shape)) if axis not in op.params["dimensions"]]


def _link_reduce(op: Op, graph: AxisGraph) -> None:
    first = op.inputs[0]
    for value in _operands(op):
        for axis, node in enumerate(value.axes):
            graph.same(first.axes[axis], node)
    for output in op.outputs:
        for axis, node in zip(_left(op), output.axes, strict=True):
            graph.same(first.axes[axis], node)
    if not _is_sum(op):
        for axis in op.params["dimensions"]:
            graph.pin(first.axes[axis], f"{op} reads all of it")


def _flow_reduce(op: Op, facts: Facts) -> None:
    if not _is_sum(op):
        return learn_nothing(op, facts)
    (value, start), (output,) = op.inputs, op.outputs
    for axis in op.params["dimensions"]:
        facts.need(op, value, axis, facts.zero(value, axis))
    zeros: list[Vector | None] = [None] * len(output.shape)
    from_zero = is_zero(facts.of(start).fill)
    if from_zero:
        zeros = [facts.zero(value, axis) for axis in _left(op)]
    return facts.learn(output, zeros, fill=0 if from_zero and facts.all_zero(value) else None)


register_rule(
    "reduce",
    rule=Rule(
        _link_reduce,
        _flow_reduce,
        emit_unchanged,
        conservative="except for a sum, the reduced axes are kept whole",
    ),
)


# Windows with a custom computation: axes that the window does not slide along are free.


def _still(op: Op, axis: int) -> bool:
    params = op.params
    ones = (1,) * len(op.inputs[0].shape)
    settings = [params["window_dimensions"], params["window_strides"]]
    settings += [params.get(name) or ones for name in ("base_dilation", "window_dilation")]
    return all(each[axis] == 1 for each in settings) and tuple(params["padding"][axis]) == (0, 0)


def _link_window(op: Op, graph: AxisGraph) -> None:
    first = op.inputs[0]
    for value in (*op.inputs, *op.outputs):
        for axis, node in enumerate(value.axes if value.shape else ()):
            if _still(op, axis):
                graph.same(first.axes[axis], node)
            else:
                graph.pin(node, f"{op} slides a window along it")


register_rule(
    "reduce_window",
    rule=Rule(
        _link_window,
        learn_nothing,
        emit_unchanged,
        conservative="axes that the window slides along are kept whole",
    ),
)


def _link_approximate(op: Op, graph: AxisGraph) -> None:
    along = op.params["reduction_dimension"] % len(op.inputs[0].shape)
    for value in (*op.inputs, *op.outputs):
        for axis, node in enumerate(value.axes):
            if axis == along:
                graph.pin(node, f"{op} reads all of it")
            else:
                graph.same(op.inputs[0].axes[axis], node)


def _flow_approximate(op: Op, facts: Facts) -> None:
    value, (values, places) = op.inputs[0], op.outputs
    along = op.params["reduction_dimension"] % len(value.shape)
    zeros = [None if axis == along else facts.zero(value, axis) for axis in range(len(value.shape))]
    facts.learn(values, zeros, fill=0 if facts.all_zero(value) else None)
    facts.learn(places)


register_rule(
    "approx_top_k",
    rule=Rule(
        _link_approximate,
        _flow_approximate,
        emit_unchanged,
        conservative="the axis that is searched is kept whole",
    ),
)
