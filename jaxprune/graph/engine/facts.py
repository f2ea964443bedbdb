"""What is known of values before anything is removed: which slices are zero, and which are alike.

An abstract interpretation, forward over a region (`rules.learn_region`). For a value and one of its axes,

- `zero` marks slices that are zero whatever the inputs and the live params are;
- `alike` marks slices that all equal each other (the slices of `x - mean` where x is zero, say),
  so that one of them, times their number, stands for all in a sum.

A slice that is not marked may be anything. Rules derive the facts of an op's outputs from those of its
inputs, and state with `need` which slices a reduction has to read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.graph.engine.axes import State, Vector
from jaxprune.graph.engine.ir import Op, Value

_MAX_LOOKED_AT = 2**14


@dataclass(frozen=True, eq=False)
class ValueFacts:
    """What is known of one value."""

    zero: tuple[Vector | None, ...]  # for each axis, which slices are zero; None if none is known to be
    fill: Any = None  # the number that all entries equal; None if they are not known to
    # For each axis, slices that equal each other by how they are computed; None if no more than `zero`.
    alike: tuple[Vector | None, ...] = ()


class Facts:
    """The facts of all values of a program, and what reductions need of them."""

    def __init__(self) -> None:
        self._known: dict[int, ValueFacts] = {}
        self._needs: dict[Any, tuple[Op, int, State]] = {}

    def copy(self) -> "Facts":
        """Return independent facts that start from these."""
        other = Facts()
        other._known, other._needs = dict(self._known), dict(self._needs)
        return other

    def of(self, value: Value) -> ValueFacts:
        """Return what is known of a value."""
        if id(value) not in self._known:
            self._known[id(value)] = _of_constant(value)
        return self._known[id(value)]

    def zero(self, value: Value, axis: int) -> Vector | None:
        """Return which slices along an axis are zero; None if none is known to be."""
        return self.of(value).zero[axis]

    def alike(self, value: Value, axis: int) -> Vector | None:
        """Return slices along an axis that equal each other: zero ones, unless more are known to be."""
        known = self.of(value)
        return known.alike[axis] if known.alike[axis] is not None else known.zero[axis]

    def all_zero(self, value: Value) -> bool:
        """Whether a value is zero throughout."""
        return is_zero(self.of(value).fill)

    def learn(
        self,
        value: Value,
        zero: Sequence[Vector | None] | None = None,
        fill: Any = None,
        alike: Sequence[Vector | None] | None = None,
    ) -> None:
        """Set what is known of a value."""
        rank = len(value.shape)
        zero = [None] * rank if zero is None else [v if v is not None and v.any() else None for v in zero]
        if fill is None and any(v is not None and v.all() for v in zero):
            fill = 0
        if fill is not None:
            full = tuple(_trues(n) for n in value.shape)
            known = ValueFacts(full if is_zero(fill) else (None,) * rank, fill, full)
        else:
            alike = [None] * rank if alike is None else list(alike)
            for axis, (marked, z) in enumerate(zip(alike, zero, strict=True)):
                # Zero slices are alike anyway, and their representative costs nothing, so that another
                # class of alike slices is worth noting only if it contains them and more.
                if marked is not None and (not marked.any() or (z is not None and not _more(marked, z))):
                    alike[axis] = None
            known = ValueFacts(tuple(zero), None, tuple(alike))
        self._known[id(value)] = known

    def need(self, op: Op, value: Value, axis: int, dispensable: Vector | None) -> None:
        """Require the slices of an input along an axis whose removal would change the op's output.

        Those are the ones not marked `dispensable`, or all if that is None.
        """
        node = value.axes[axis]
        state: State = True if dispensable is None else ~dispensable
        self._needs[id(op), id(value), axis, node] = (op, node, state)

    def readers(self) -> list[tuple[Op, int, State]]:
        """Return the requirements: ops, each with a node and those of its slices that have to be kept."""
        return list(self._needs.values())


def surely_equal(a: ValueFacts, b: ValueFacts) -> bool:
    """Whether two facts are the same; False also where a number fills the value, which is not compared."""
    if a is b:
        return True
    if a.fill is not None or b.fill is not None:
        return False
    return equal_marks((*a.zero, *a.alike), (*b.zero, *b.alike))


def equal_marks(a: Sequence[Vector | None], b: Sequence[Vector | None]) -> bool:
    """Whether two values have the same marks on each axis."""
    pairs = zip(a, b, strict=True)
    return all(x is y or (x is not None and y is not None and np.array_equal(x, y)) for x, y in pairs)


def is_zero(fill: Any) -> bool:
    """Whether a fill is known and is zero (False, for bools)."""
    return fill is not None and not isinstance(fill, str) and bool(fill == 0)


def both(a: Vector | None, b: Vector | None) -> Vector | None:
    """Return the slices that both vectors mark; None stands for a vector without marks."""
    return None if a is None or b is None else a & b


def either(a: Vector | None, b: Vector | None) -> Vector | None:
    """Return the slices that either vector marks; None stands for a vector without marks."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


def all_of(marks: Iterable[Vector | None]) -> Vector | None:
    """Return the slices that all vectors mark; None for no vectors."""
    result: Vector | None = None
    for first, mark in enumerate(marks):
        result = mark if not first else both(result, mark)
    return result


def evaluate(op: Op, scalars: Sequence[Any]) -> Any:
    """Return what an elementwise op gives for known numbers, or None if that is not determined.

    The sign of a zero is not known (0 * x has that of x), so the result must not depend on it.
    """
    first, *rest = evaluate_signed(op, scalars)
    has_nan = jnp.issubdtype(np.asarray(first).dtype, jnp.inexact)
    return first if all(np.array_equal(first, other, equal_nan=has_nan) for other in rest) else None


def evaluate_signed(op: Op, scalars: Sequence[Any]) -> list[Any]:
    """Return what an elementwise op gives for known numbers, for every choice of the signs of zeros."""
    signs = [_signs(s, v.dtype) for s, v in zip(scalars, op.inputs, strict=True)]
    return [_evaluate_once(op, signed) for signed in product(*signs)]


def _signs(scalar: Any, dtype: Any) -> tuple[Any, ...]:
    if not (is_zero(scalar) and jnp.issubdtype(dtype, jnp.inexact)):
        return (scalar,)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return tuple(complex(*parts) for parts in product((0.0, -0.0), repeat=2))
    return 0.0, -0.0


def _evaluate_once(op: Op, scalars: Sequence[Any]) -> Any:
    try:
        # The sign of a zero and NaN are told apart by their text.
        numbers = tuple(
            (repr(np.asarray(s).item()), v.dtype) for s, v in zip(scalars, op.inputs, strict=True)
        )
        key = (op.name, numbers, tuple(sorted(op.params.items(), key=lambda item: item[0])))
        hash(key)
    except (TypeError, ValueError):  # a parameter that cannot be compared
        return _evaluate(op, scalars)
    if key not in _EVALUATED:
        _EVALUATED[key] = _evaluate(op, scalars)
    return _EVALUATED[key]


_EVALUATED: dict[Any, Any] = {}
"""Results of ops on numbers: the same few are needed again and again, and each takes a compilation."""


def _evaluate(op: Op, scalars: Sequence[Any]) -> Any:
    with jax.ensure_compile_time_eval():
        inputs = [jax.device_put(np.asarray(s, v.dtype)) for s, v in zip(scalars, op.inputs, strict=True)]
        (output,) = op.bind(*inputs)
    return np.asarray(output)[()]


def _more(marked: Vector, zero: Vector) -> bool:
    return bool((marked | ~zero).all() and (marked & ~zero).any())


def _trues(size: Any) -> Vector | None:
    return np.broadcast_to(True, (int(size),)) if isinstance(size, (int, np.integer)) else None


def _of_constant(value: Value) -> ValueFacts:
    """Return the facts of a value that no op makes: for a small constant, whether one number fills it."""
    rank = len(value.shape)
    blank = ValueFacts((None,) * rank, None, (None,) * rank)
    array = value.constant
    if array is None or isinstance(array, Tracer) or not 0 < np.size(array) <= _MAX_LOOKED_AT:
        return blank
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return blank
    array = np.asarray(array)
    first = array.reshape(-1)[0]
    if not (array == first).all():
        return blank
    full = tuple(_trues(n) for n in value.shape)
    return ValueFacts(full if is_zero(first) else (None,) * rank, first, full)
