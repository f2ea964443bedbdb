"""Ops that are not finite where an operand is zero: a division by zero, the logarithm of zero.

They are not listed by name. An elementwise op is evaluated on the numbers that its operands are known to be,
zero among them, and on 1 and -1 in place of unknown operands: if every result is NaN or infinite, the op is
singular there. Its derivative is evaluated as well: a square root of zero is finite, its derivative is not.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.axes import Vector
from jaxprune.graph.engine.facts import Facts, either, evaluate, evaluate_signed, is_zero
from jaxprune.graph.engine.ir import Op, Region, Value
from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.graph.engine.rules.elementwise import matching_axes

# fmt: off
_DEFINED_AT_ZERO = frozenset((
    "abs", "add", "add_any", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "ceil", "clamp",
    "complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "erf", "erfc", "exp", "exp2",
    "expm1", "floor", "imag", "log1p", "logistic", "max", "min", "mul", "name", "neg", "nextafter",
    "one_minus_square", "real", "reduce_precision", "round", "select_n", "sign", "sin", "sinh", "square",
    "stop_gradient", "sub", "tan", "tanh",
))
# fmt: on
"""Ops that are not evaluated, to save time, because they and their derivatives are finite at zero."""

_ZERO_MATTERS = {"div": 1, "rem": 1, "pow": 0}
"""The operand that has to be zero for an op to be singular; also to save time."""

_SAME = ("copy", "per_reader")
"""Ops that return their input."""


class Singularity(NamedTuple):
    """An op that is not finite where its operands are zero."""

    op: Op  # the op
    caller: Op  # the op of the outermost region in whose bodies it lies; itself if it lies in none
    nodes: tuple[int, ...]  # the nodes of the axes along which its operands have zero slices
    extent: float  # how many slices of its output are not finite; infinity if all entries are not
    in_value: bool  # whether these reach an output of the function; otherwise only a derivative is not finite


def singularities(region: Region, facts: Facts) -> list[Singularity]:
    """Return the ops of a region, and of the bodies of its ops, that are singular given some facts."""
    return list(_find(region, facts, None, True))


def _find(region: Region, facts: Facts, caller: Op | None, forward: bool) -> Iterator[Singularity]:
    for op in region.ops:
        outermost = op if caller is None else caller
        for name, inner in op.regions.items():
            yield from _find(inner, facts, outermost, forward and name not in ("jvp", "vjp"))
        if rule_for(op.name) is not elementwise or op.name in _DEFINED_AT_ZERO:
            continue
        if not jnp.issubdtype(op.outputs[0].dtype, jnp.inexact):
            continue
        where: list[Vector | None] = [None] * len(op.outputs[0].shape)
        value, extent = False, 0.0
        for axis, marks, numbers in _cases(op, facts):
            if in_value := _is_singular(op, numbers):
                value = True
                if axis is not None:
                    where[axis] = either(where[axis], marks)
            if in_value or (forward and _has_singular_derivative(op, numbers)):
                extent += np.inf if axis is None else int(marks.sum())
        if extent:
            reaches = value and forward and _reaches_an_output(op, where, region, facts)
            yield Singularity(op, outermost, _zero_nodes(op, facts), extent, reaches)


def _cases(op: Op, facts: Facts) -> Iterator[tuple[int | None, Vector, tuple[Any, ...]]]:
    """Yield what an op's operands are where at least one of them is zero.

    That is: an axis of the output (None for all entries), slices of it, and for each operand the number that
    it is there; None for an operand that is not known.
    """
    (output,) = op.outputs
    known = [facts.of(value) for value in op.inputs]
    fills = tuple(k.fill for k in known)
    matters = _ZERO_MATTERS.get(op.name)
    operands = range(len(fills)) if matters is None else (matters,)
    if any(is_zero(fills[n]) for n in operands):
        yield None, np.ones(1, bool), fills
    along = [matching_axes(value, output) for value in op.inputs]
    for axis in range(len(output.shape)):
        zero = [
            k.zero[axis] if k.fill is None and axis in axes else None
            for k, axes in zip(known, along, strict=True)
        ]
        if all(zero[n] is None for n in operands):
            continue
        size = int(output.shape[axis])
        table = np.stack([np.zeros(size, bool) if z is None else z for z in zero])
        for column in np.unique(table, axis=1).T:
            if any(column[n] for n in operands):
                marks = (table == column[:, None]).all(axis=0)
                yield axis, marks, tuple(0 if z else fill for z, fill in zip(column, fills, strict=True))


def _is_singular(op: Op, numbers: Sequence[Any]) -> bool:
    """Whether an op gives NaN or infinity whatever its unknown operands are."""
    unknown = [
        (number,) if number is not None else ((-1,) if _is_negated(value) else (1, -1))
        for number, value in zip(numbers, op.inputs, strict=True)
    ]
    results = (result for chosen in product(*unknown) for result in evaluate_signed(op, chosen))
    return all(not np.isfinite(result) for result in results)


def _is_negated(value: Value) -> bool:
    """Whether a value is the negative of another, as the exponent of a negative power is."""
    while value.op is not None and value.op.name in ("broadcast_in_dim", "convert_element_type", "reshape"):
        value = value.op.inputs[0]
    return value.op is not None and value.op.name == "neg"


def _has_singular_derivative(op: Op, numbers: Sequence[Any]) -> bool:
    """Whether an op's derivative with respect to its zero operands is NaN or infinite."""
    given = [1 if number is None else number for number in numbers]
    key = (
        op.name,
        str(op.params),
        tuple((str(g), str(v.dtype)) for g, v in zip(given, op.inputs, strict=True)),
    )
    if key not in _DERIVATIVES:
        _DERIVATIVES[key] = _derive(op, given)
    return _DERIVATIVES[key]


_DERIVATIVES: dict[Any, bool] = {}
"""Whether derivatives are singular: cached, because each evaluation takes a compilation."""


def _derive(op: Op, numbers: Sequence[Any]) -> bool:
    moving = [
        n for n, g in enumerate(numbers) if is_zero(g) and jnp.issubdtype(op.inputs[n].dtype, jnp.inexact)
    ]

    def of_moving(*zeros: Any) -> Any:
        values = list(zip(numbers, op.inputs, strict=True))
        arguments = [jnp.asarray(number, value.dtype) for number, value in values]
        for place, zero in zip(moving, zeros, strict=True):
            arguments[place] = zero
        return op.bind(*arguments)[0]

    try:
        with jax.ensure_compile_time_eval():
            zeros = tuple(jnp.zeros((), op.inputs[n].dtype) for n in moving)
            _, tangent = jax.jvp(of_moving, zeros, tuple(map(jnp.ones_like, zeros)))
            return not bool(jnp.isfinite(tangent))
    except NotImplementedError:  # a user's primitive without a derivative
        return False


def _zero_nodes(op: Op, facts: Facts) -> tuple[int, ...]:
    return tuple(
        node
        for value in op.inputs
        for axis, node in enumerate(value.axes)
        if facts.zero(value, axis) is not None
    )


def _reaches_an_output(op: Op, where: Sequence[Vector | None], region: Region, facts: Facts) -> bool:
    """Whether the output of a singular op makes an output of the region NaN or infinite.

    It does not if it is replaced by `jnp.where(norm > 0, x / norm, 0)` or `jnp.nan_to_num`, whose condition
    follows from the facts, nor if it is a log of zero whose exponential is taken, as in a softmax, where a
    maximum is subtracted first.
    """
    spoilt: dict[int, list[Vector | None]] = {id(op.outputs[0]): list(where)}
    if all(marks is None for marks in where):
        return True
    start = next(n for n, other in enumerate(region.ops) if other is op) + 1
    for reader in region.ops[start:]:
        if not any(id(value) in spoilt for value in reader.inputs):
            continue
        left = _spoilt_output(reader, spoilt, facts)
        if left is None:
            return True
        if any(marks is not None for marks in left):
            spoilt[id(reader.outputs[0])] = left
    return any(id(value) in spoilt for value in region.outputs)


def _spoilt_output(
    op: Op, spoilt: dict[int, list[Vector | None]], facts: Facts
) -> list[Vector | None] | None:
    """Return, by axis, the slices of an op's output that may not be finite; None if that is not known."""
    value, output = op.inputs[0], op.outputs[0]
    left: list[Vector | None] = [None] * len(output.shape)
    if rule_for(op.name) is elementwise:
        together = list(left)
        for operand in (v for v in op.inputs if id(v) in spoilt):
            for axis, marks in enumerate(spoilt[id(operand)]):
                if marks is not None and axis not in matching_axes(operand, output):
                    return None
                together[axis] = either(together[axis], marks) if marks is not None else together[axis]
        for axis, marks in enumerate(together):
            left[axis] = None if marks is None else _still_spoilt(op, spoilt, axis, marks, facts)
    elif op.name in _SAME:
        left = list(spoilt[id(value)])
    elif op.name == "broadcast_in_dim":
        for axis, place in enumerate(op.params["broadcast_dimensions"]):
            marks = spoilt[id(value)][axis]
            if marks is not None and value.shape[axis] != output.shape[place]:
                return None
            left[place] = marks
    elif op.name in ("reduce_max", "reduce_min"):
        harmless = -np.inf if op.name == "reduce_max" else np.inf
        kept = [axis for axis in range(len(value.shape)) if axis not in op.params["axes"]]
        for axis, marks in enumerate(spoilt[id(value)]):
            if marks is None:
                continue
            numbers = [_number(value, axis, int(index), facts) for index in np.flatnonzero(marks)]
            if axis in kept:
                left[kept.index(axis)] = marks
            elif marks.all() or any(number != harmless for number in numbers):
                return None
    else:
        return None
    return left


def _still_spoilt(
    op: Op, spoilt: dict[int, list[Vector | None]], axis: int, marks: Vector, facts: Facts
) -> Vector | None:
    """Return the slices of an elementwise op's output that may not be finite; a selection has fewer."""
    marks = marks.copy()
    for index in np.flatnonzero(marks):
        if op.name == "select_n" and (which := _number(op.inputs[0], axis, int(index), facts)) is not None:
            chosen = spoilt.get(id(op.inputs[1 + int(which)]), [None] * (axis + 1))[axis]
            marks[index] = chosen is not None and chosen[index]
        else:
            number = _number(op.outputs[0], axis, int(index), facts)
            marks[index] = number is None or not np.isfinite(number)
    return marks if marks.any() else None


def _number(value: Value, axis: int | None, index: int, facts: Facts) -> Any:
    """Return the number that all entries of a slice are, possibly NaN; None if that is not known."""
    known, op = facts.of(value), value.op
    if known.fill is not None:
        return known.fill
    zero = None if axis is None else known.zero[axis]
    number = None
    if op is not None and op.name == "broadcast_in_dim":
        places = list(op.params["broadcast_dimensions"])
        inner = places.index(axis) if axis in places else None
        if axis is not None and inner is not None and op.inputs[0].shape[inner] == value.shape[axis]:
            number = _number(op.inputs[0], inner, index, facts)
    elif op is not None and op.name in _SAME:
        number = _number(op.inputs[0], axis, index, facts)
    elif op is not None and rule_for(op.name) is elementwise:
        numbers = []
        for operand in op.inputs:
            along = axis is not None and axis in matching_axes(operand, value)
            numbers.append(_number(operand, axis if along else None, index, facts))
        number = _of_numbers(op, numbers)
    # Facts take the zeros of a quotient from its numerator, but 0 / 0 is NaN: a number found above counts.
    return 0 if number is None and zero is not None and zero[index] else number


def _of_numbers(op: Op, numbers: Sequence[Any]) -> Any:
    """Return what an op gives for numbers, if it is the same whatever the unknown ones are; None if not."""
    if all(number is not None for number in numbers):
        return evaluate(op, numbers)
    # Minus infinity less any finite number is minus infinity. Only such cases are decided by probes: two
    # probes with the same finite result would not show that all numbers give that result.
    if not any(number is not None and not np.isfinite(number) for number in numbers):
        return None
    first, second = (evaluate(op, [probe if n is None else n for n in numbers]) for probe in (1, -1))
    if first is None or second is None or np.isfinite(first):
        return None
    return first if np.array_equal(first, second, equal_nan=True) else None
