"""Values that equal earlier values of a program, given what is zero there.

`x + f(x)` is `x` where `f(x)` is zero. `aliases` maps each value that provably equals an earlier one to that
one. Both proofs that a residual block is the identity when its params are zero rest on it: that of `passage`,
for `residual_blocks`, and that of `shortening`, for `compact`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune.graph.engine.facts import Facts, is_zero
from jaxprune.graph.engine.ir import Op, Region, Value, bodies_of, is_differentiable
from jaxprune.graph.engine.rules.calls import CHECKPOINTS

# Ops that return their inputs, one by one. `stop_gradient` does not: dropping it would change gradients.
_COPIES = frozenset(
    (
        *("copy", "copy_p", "name", "optimization_barrier", "sharding_constraint", "reshard", "per_reader"),
        *("device_put", "pvary", "inline"),
    )
)
# Ops that keep the entries and their row-major order, where the number of entries stays the same.
_RESHAPES = frozenset(("reshape", "squeeze", "expand_dims", "broadcast_in_dim"))

Aliases = dict[int, Value]
"""By the id of a value, the earliest value that it equals; values that equal no other are not in it."""


def aliases(region: Region, facts: Facts) -> Aliases:
    """Return the values of a region that equal earlier ones, entry by entry and with the same derivative.

    An op passes a value on if it adds or subtracts zero, multiplies or divides by one, selects by a known
    condition, copies, or undoes an earlier cast, reshape or transpose; a call or a loop does if its body
    does, whose inputs stand for those of every round. A sum with zero counts as equal although it turns
    -0.0 into 0.0. The facts must cover the bodies too.

    A value is mapped to the earliest that it equals: an input, a constant, or the output of an op that
    changes its inputs. So no value of the dict is also among its keys.
    """
    found: Aliases = {}
    for op in region.ops:
        for output, value in zip(op.outputs, _passed(op, found, facts), strict=True):
            if value is not None and value.shape == output.shape and value.dtype == output.dtype:
                found[id(output)] = value
    return found


def unchanged_outputs(region: Region, facts: Facts) -> dict[int, int]:
    """Return, by the number of an output of a region, the number of the input that it equals."""
    found = aliases(region, facts)
    number = {id(value): place for place, value in enumerate(region.inputs)}
    roots = [found.get(id(output), output) for output in region.outputs]
    return {place: number[id(root)] for place, root in enumerate(roots) if id(root) in number}


def inlined(region: Region) -> Region:
    """Return a region with the bodies of its checkpoints inlined.

    An op named "inline", which returns its inputs, stands where values enter a body, and where they leave it.
    """
    ops: list[Op] = []
    for op in region.ops:
        if op.name not in CHECKPOINTS:
            ops.append(op)
            continue
        body = op.regions["body"]
        ops.append(Op("inline", {}, op.inputs, body.inputs, op.bind, op.source))
        ops += inlined(body).ops
        ops.append(Op("inline", {}, body.outputs, op.outputs, op.bind, op.source))
    return Region(region.inputs, region.outputs, ops)


def _passed(op: Op, found: Aliases, facts: Facts) -> list[Value | None]:
    """Return for each output of an op the value that it equals, or None."""
    inputs = [found.get(id(value), value) for value in op.inputs]
    if op.name in _COPIES:
        return list(inputs)
    if op.regions:
        again = _passed_by_maximum(op, found, facts)
        return _passed_by_body(op, inputs, facts) if again is None else [again]
    if len(op.outputs) == 1:
        return [_passed_by_one(op, inputs, found, facts)]
    return [None] * len(op.outputs)


def _passed_by_one(op: Op, inputs: Sequence[Value], found: Aliases, facts: Facts) -> Value | None:
    """Return the value that the output of an op without bodies equals, or None."""
    fills = [facts.of(value).fill for value in op.inputs]
    name = op.name
    if name in ("add", "add_any", "sub") and is_zero(fills[1]):
        return inputs[0]
    if name in ("add", "add_any") and is_zero(fills[0]):
        return inputs[1]
    if name in ("mul", "div") and _is_one(fills[1]):
        return inputs[0]
    if name == "mul" and _is_one(fills[0]):
        return inputs[1]
    if name == "integer_pow" and op.params["y"] == 1:
        return inputs[0]
    if name == "select_n":
        known = fills[0]
        cases = inputs[1:] if known is None else [inputs[1 + int(known)]]
        return cases[0] if all(case is cases[0] for case in cases) else None
    if name == "max":
        return _passed_by_maximum(op, found, facts)
    if name == "convert_element_type" and op.outputs[0].dtype == inputs[0].dtype:
        return inputs[0]
    return _undone(op, inputs[0], found) if inputs else None


def _undone(op: Op, given: Value, found: Aliases) -> Value | None:
    """Return the value that a cast, a reshape or a transpose restores, or None."""
    (output,), maker = op.outputs, given.op
    if op.name == "transpose" and _in_order(op.params["permutation"]):
        return given
    if _is_reshape(op) and output.shape == given.shape:
        return given
    if maker is None or len(maker.outputs) != 1:
        return None
    before = found.get(id(maker.inputs[0]), maker.inputs[0]) if maker.inputs else given
    if _is_reshape(op) and _is_reshape(maker):
        return before
    if op.name == maker.name == "transpose":
        inner, outer = maker.params["permutation"], op.params["permutation"]
        return before if _in_order([inner[axis] for axis in outer]) else None
    if op.name == maker.name == "convert_element_type" and _represents(given.dtype, before.dtype):
        return before
    return None


def _is_reshape(op: Op) -> bool:
    """Whether an op keeps all entries, in row-major order."""
    if op.name not in _RESHAPES:
        return False
    if op.name != "broadcast_in_dim":
        return op.params.get("dimensions") is None or op.name != "reshape"
    if len(op.inputs) != 1:
        return False
    sizes = [size for size in op.inputs[0].shape if size != 1]
    return sizes == [size for size in op.outputs[0].shape if size != 1]


def _represents(larger: Any, smaller: Any) -> bool:
    """Whether a cast to the larger dtype and back changes no value of the smaller."""
    if not (jnp.issubdtype(larger, jnp.floating) and jnp.issubdtype(smaller, jnp.floating)):
        return False
    a, b = jnp.finfo(larger), jnp.finfo(smaller)
    return a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp


def _in_order(permutation: Sequence[int]) -> bool:
    return list(permutation) == list(range(len(permutation)))


def _is_one(fill: Any) -> bool:
    return fill is not None and not isinstance(fill, str) and bool(fill == 1)


def _maximum(op: Op | None, facts: Facts) -> tuple[Value, Any] | None:
    """Return the value and the number that an op takes the maximum of, as `jax.nn.relu` does; else None."""
    if op is None or len(op.outputs) != 1:
        return None
    if op.name == "custom_jvp_call" and len(op.inputs) == 1:
        body = op.regions["body"]
        inner = _maximum(body.outputs[0].op, facts)
        return (op.inputs[0], inner[1]) if inner is not None and inner[0] is body.inputs[0] else None
    if op.name != "max":
        return None
    for value, other in (op.inputs, op.inputs[::-1]):
        if (number := facts.of(other).fill) is not None:
            return value, number
    return None


def _passed_by_maximum(op: Op, found: Aliases, facts: Facts) -> Value | None:
    """Return the input of a second maximum with the same number, such as a second `jax.nn.relu`."""
    outer = _maximum(op, facts)
    if outer is None:
        return None
    given = found.get(id(outer[0]), outer[0])
    inner = _maximum(given.op, facts)
    return given if inner is not None and bool(inner[1] == outer[1]) else None


def _passed_by_body(op: Op, inputs: Sequence[Value], facts: Facts) -> list[Value | None]:
    """Return the values that the outputs of a call, of branches or of a loop equal."""
    if op.name in CHECKPOINTS:
        kept = unchanged_outputs(op.regions["body"], facts)
        return [inputs[kept[n]] if n in kept else None for n in range(len(op.outputs))]
    if op.name in ("custom_jvp_call", "custom_vjp_call"):
        return _passed_by_custom(op, inputs, facts)
    if op.name == "cond":
        each = [unchanged_outputs(branch, facts) for branch in op.regions.values()]
        numbers = [{kept.get(n) for kept in each} for n in range(len(op.outputs))]
        return [inputs[1 + n] if len(ns) == 1 and (n := ns.pop()) is not None else None for ns in numbers]
    if op.name not in ("scan", "while"):
        return [None] * len(op.outputs)
    body = bodies_of(op)[-1]  # after the condition of a `while`
    first, carried, given = body.consts, body.carried, inputs[len(inputs) - len(body.given) :]
    kept = unchanged_outputs(body.region, facts)

    def passed(place: int) -> Value | None:
        source = kept.get(place)
        if source is None:
            return None
        # A carry has to be returned at its own place, or rounds would exchange values; a stacked output has
        # to be slices of a stacked input.
        same = source == first + place if place < carried else source >= first + carried
        return given[source] if same else None

    return [passed(place) for place in range(len(op.outputs))]


def _passed_by_custom(op: Op, inputs: Sequence[Value], facts: Facts) -> list[Value | None]:
    """Return the values that a function with a custom derivative passes on, if the derivative does too."""
    body = op.regions["body"]
    kept = unchanged_outputs(body, facts)
    if not kept:
        return [None] * len(op.outputs)
    moving = [n for n, value in enumerate(op.inputs) if is_differentiable(value)]
    out_moving = [n for n, value in enumerate(op.outputs) if is_differentiable(value)]
    name = "jvp" if op.name == "custom_jvp_call" else "vjp"
    derivative = unchanged_outputs(op.regions[name], facts)

    def follows(out: int, given: int) -> bool:
        """Whether the output's tangent is the input's, or the input's cotangent is the output's."""
        inner, outer = moving.index(given), out_moving.index(out)
        if name == "jvp":
            return derivative.get(len(op.outputs) + outer) == len(op.inputs) + inner
        return derivative.get(inner) == len(op.inputs) + outer

    return [
        inputs[kept[n]] if n in kept and (n not in out_moving or follows(n, kept[n])) else None
        for n in range(len(op.outputs))
    ]
