"""What is known of values before anything is cut: which slices are zero, and which are all alike.

One forward pass over a region. For a value and one of its axes,

- `zero` marks slices that are zero whatever the inputs and the live params are;
- `alike` marks slices that all equal each other (the slices of `x - mean` where x is zero, say),
  so that one of them, times their number, stands for all in a sum.

What is not marked is simply not known. Rules derive the facts of an op's outputs from its inputs,
and say with `need` which slices a reduction cannot do without.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.graph.engine.axes import State, Vector
from jaxprune.graph.engine.ir import Op, Region, Value

_MAX_LOOKED_AT = 2**14


@dataclass(frozen=True, eq=False)
class ValueFacts:
    """What is known of one value.

    Attributes:
      zero: for each axis, which slices are zero; None if none is.
      fill: the number that all entries equal, if there is one.
      alike: for each axis, slices that equal each other by what made them; None for those of
        `zero`, which do so trivially.
    """

    zero: tuple[Vector | None, ...]
    fill: Any = None
    alike: tuple[Vector | None, ...] = ()


class Facts:
    """The facts of all values of a program, and what reductions need of them."""

    def __init__(self) -> None:
        self._known: dict[int, ValueFacts] = {}
        self._needs: dict[Any, tuple[Op, int, State]] = {}

    def copy(self) -> "Facts":
        """Facts of their own that start from these."""
        other = Facts()
        other._known, other._needs = dict(self._known), dict(self._needs)
        return other

    def of(self, value: Value) -> ValueFacts:
        """What is known of a value."""
        known = self._known.get(id(value))
        if known is None:
            known = _of_constant(value)
            self._known[id(value)] = known
        return known

    def zero(self, value: Value, axis: int) -> Vector | None:
        """Which slices along an axis are zero; None if none is known to be."""
        return self.of(value).zero[axis]

    def alike(self, value: Value, axis: int) -> Vector | None:
        """Slices along an axis that equal each other, those that are zero or others."""
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
        """Sets what is known of a value."""
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
                # Zeros have a representative that costs nothing; another has to mark more.
                if marked is not None and (not marked.any() or (z is not None and not _more(marked, z))):
                    alike[axis] = None
            known = ValueFacts(tuple(zero), None, tuple(alike))
        self._known[id(value)] = known

    def need(self, op: Op, value: Value, axis: int, dispensable: Vector | None, node: int | None = None):
        """Says that an op has to read the slices of a value that are not marked `dispensable`.

        Args:
          op: the op.
          value: one of its inputs.
          axis: the axis.
          dispensable: slices that do not matter; None for none.
          node: the node that these are slices of, if it is not that of the axis.
        """
        node = value.axes[axis] if node is None else node
        state: State = True if dispensable is None else ~dispensable
        self._needs[id(op), id(value), axis, node] = (op, node, state)

    def readers(self) -> list[tuple[Op, int, State]]:
        """The ops that have needs, each with a node and those of its slices that have to stay."""
        return list(self._needs.values())


def run(region: Region, facts: Facts, rule_for: Callable[[str], Any]) -> None:
    """Learns the facts of all values of a region, whose inputs are known."""
    for op in region.ops:
        rule_for(op.name).flow(op, facts)


def run_changed(
    region: Region, facts: Facts, before: Facts, changed: Iterable[Value], rule_for: Callable[[str], Any]
) -> list[Op]:
    """Learns what follows from new facts of some values, of the ops that these reach.

    Args:
      region: the ops.
      facts: a copy of `before`, in which more was learnt of some values.
      before: the facts of all values of the region without that.
      changed: these values.
      rule_for: the rule of an op by its name.

    Returns:
      The ops whose inputs have other facts than before, in order.
    """
    reached, ops = set(map(id, changed)), list[Op]()
    for op in region.ops:
        if any(id(value) in reached for value in op.inputs):
            rule_for(op.name).flow(op, facts)
            ops.append(op)
            reached.update(id(v) for v in op.outputs if not _alike_known(facts.of(v), before.of(v)))
    return ops


def _alike_known(a: ValueFacts, b: ValueFacts) -> bool:
    """Whether the same is known of a value; for numbers that all entries equal this says no."""
    if a is b:
        return True
    if a.fill is not None or b.fill is not None:
        return False
    pairs = zip((*a.zero, *a.alike), (*b.zero, *b.alike), strict=True)
    return all(x is y or (x is not None and y is not None and np.array_equal(x, y)) for x, y in pairs)


def is_zero(fill: Any) -> bool:
    """Whether a known number is zero (False, of bools)."""
    return fill is not None and not isinstance(fill, str) and bool(fill == 0)


def both(a: Vector | None, b: Vector | None) -> Vector | None:
    """What two marks share."""
    return None if a is None or b is None else a & b


def either(a: Vector | None, b: Vector | None) -> Vector | None:
    """What one of two marks has."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


def all_of(marks: Iterable[Vector | None]) -> Vector | None:
    """What all marks share; None for no marks."""
    result: Vector | None = None
    for first, mark in enumerate(marks):
        result = mark if not first else both(result, mark)
    return result


def evaluate(op: Op, scalars: Sequence[Any]) -> Any:
    """What an elementwise op makes of known numbers, or None if it cannot be said.

    The sign of a zero is not known (0 * x has that of x), so it must not matter.
    """
    first, *rest = evaluate_signed(op, scalars)
    return first if all(np.array_equal(first, other, equal_nan=_has_nan(first)) for other in rest) else None


def evaluate_signed(op: Op, scalars: Sequence[Any]) -> list[Any]:
    """What an elementwise op makes of known numbers, for every choice of the signs of zeros."""
    signs = [_signs(s, v.dtype) for s, v in zip(scalars, op.inputs, strict=True)]
    return [_evaluate_once(op, signed) for signed in product(*signs)]


def _signs(scalar: Any, dtype: Any) -> tuple[Any, ...]:
    if not (is_zero(scalar) and jnp.issubdtype(dtype, jnp.inexact)):
        return (scalar,)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return tuple(complex(*parts) for parts in product((0.0, -0.0), repeat=2))
    return 0.0, -0.0


def _has_nan(result: Any) -> bool:
    return jnp.issubdtype(np.asarray(result).dtype, jnp.inexact)


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
"""What ops made of numbers: the same few are asked for again and again, and each takes a compilation."""


def _evaluate(op: Op, scalars: Sequence[Any]) -> Any:
    with jax.ensure_compile_time_eval():
        inputs = [jnp.asarray(s, v.dtype) for s, v in zip(scalars, op.inputs, strict=True)]
        (output,) = op.bind(*inputs)
    return np.asarray(output)[()]


def _more(marked: Vector, zero: Vector) -> bool:
    return bool((marked | ~zero).all() and (marked & ~zero).any())


def _trues(size: Any) -> Vector | None:
    return np.broadcast_to(True, (int(size),)) if isinstance(size, (int, np.integer)) else None


def _of_constant(value: Value) -> ValueFacts:
    """What is known of a value that no op made: of a small constant, whether it is all one number."""
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
