"""Elementwise primitives: all operands have the axes of the output, and any slice can be dropped."""

from typing import Any

import numpy as np

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, ValueFacts, all_of, both, either, evaluate
from jaxprune.graph.engine.ir import Op, Value, same_size
from jaxprune.graph.engine.rules.base import Rule, emit_unchanged, register_rule

# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type",
    "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "ge_to", "gt", "gt_to", "igamma", "igamma_grad_a", "igammac", "imag",
    "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "logistic", "lt", "lt_to", "max",
    "min", "mul", "mulhi", "name", "ne", "neg", "nextafter", "not", "one_minus_square", "or", "polygamma",
    "population_count", "pow", "real", "reduce_precision", "regularized_incomplete_beta", "rem", "round",
    "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "zeta",
)
# fmt: on
"""The elementwise primitives: each entry of the output is made of the entries at its place."""


def matching_axes(value: Value, like: Value) -> list[int]:
    """Return the axes of an operand that are those of the output, without axes that are broadcast."""
    if len(value.shape) != len(like.shape):
        return []
    return [axis for axis, size in enumerate(value.shape) if same_size(size, like.shape[axis])]


def _link(op: Op, graph: AxisGraph) -> None:
    (output,) = op.outputs
    for value in op.inputs:
        for axis in matching_axes(value, output):
            graph.same(value.axes[axis], output.axes[axis])


def _flow(op: Op, facts: Facts) -> None:
    (output,) = op.outputs
    known = [facts.of(value) for value in op.inputs]
    fills = [k.fill for k in known]
    if all(fill is not None for fill in fills):
        return facts.learn(output, fill=evaluate(op, fills))
    along = [matching_axes(value, output) for value in op.inputs]
    zero_to_zero, signed = _zeros_give_zero(op, facts), _reads_sign(op)

    def zero(axis: int) -> Vector | None:
        marks = [k.zero[axis] if axis in a else None for k, a in zip(known, along, strict=True)]
        if op.name in ("mul", "and"):
            return either(*marks) if len(marks) == 2 else None
        if op.name == "div":
            return marks[0]
        if op.name == "select_n":
            # The condition may be known: that of `jnp.var` depends on sizes alone.
            if fills[0] is not None:
                return marks[1 + int(fills[0])]
            # Where it is False, as "is this NaN?" is for zeros, the first case is selected.
            return either(all_of(marks[1:]), both(marks[0], marks[1]))
        if not zero_to_zero:
            return None
        return all_of(mark for mark, fill in zip(marks, fills, strict=True) if fill is None)

    def alike(axis: int) -> Vector | None:
        size = output.shape[axis]
        if not isinstance(size, (int, np.integer)):
            return None
        everywhere = np.broadcast_to(True, (int(size),))
        triples = enumerate(zip(op.inputs, along, strict=True))
        if any(n in signed and axis in a and _are_zeros(facts.of(v), axis) for n, (v, a) in triples):
            return None
        pairs = zip(op.inputs, along, strict=True)
        return all_of(facts.alike(v, axis) if axis in a else everywhere for v, a in pairs)

    axes = range(len(output.shape))
    zeros = [zero(axis) for axis in axes]
    if op.name in ("mul", "and") and any(facts.all_zero(v) for v in op.inputs):
        return facts.learn(output, fill=0)
    facts.learn(output, zeros, alike=[alike(axis) for axis in axes])
    return None


def _zeros_give_zero(op: Op, facts: Facts) -> bool:
    """Whether the op gives 0 where its inputs are 0, or the numbers that they are known to be."""
    known = [facts.of(value) for value in op.inputs]
    if not all(k.fill is not None or any(z is not None for z in k.zero) for k in known):
        return False
    result = evaluate(op, [0 if k.fill is None else k.fill for k in known])
    return result is not None and bool(result == 0)


def _reads_sign(op: Op) -> tuple[int, ...]:
    """Return the operands for which the sign of a zero matters: 1 / -0 is not 1 / 0."""
    if op.name == "integer_pow":
        return (0,) if op.params["y"] < 0 else ()
    return {"atan2": (0, 1), "div": (1,), "pow": (0,), "rsqrt": (0,)}.get(op.name, ())


def _are_zeros(known: ValueFacts, axis: int) -> bool:
    """Whether slices along an axis are alike only in that they are zero, of either sign."""
    return known.zero[axis] is not None and (known.fill is not None or known.alike[axis] is None)


elementwise = Rule(_link, _flow, emit_unchanged)
register_rule(*ELEMENTWISE, rule=elementwise)


def link_each(op: Op, graph: AxisGraph) -> None:
    """A `link` that ties each output to the input at its place."""
    for value, output in zip(op.inputs, op.outputs, strict=True):
        for a, b in zip(value.axes, output.axes, strict=True):
            graph.same(a, b)


def _flow_each(op: Op, facts: Facts) -> None:
    for value, output in zip(op.inputs, op.outputs, strict=True):
        known = facts.of(value)
        facts.learn(output, known.zero, known.fill)


def _emit_unconstrained(op: Op, args: list[Any], frame: Any) -> list[Any]:
    """Drop a hint of where an array lies, which its new size may not allow.

    On a mesh with explicit axes the sharding is part of the type of the output, and replaying restores it.
    """
    del op, frame
    return args


register_rule("optimization_barrier", rule=Rule(link_each, _flow_each, emit_unchanged))
register_rule(
    "sharding_constraint",
    "device_put",
    "reshard",
    rule=Rule(link_each, _flow_each, _emit_unconstrained),
)
