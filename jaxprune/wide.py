"""Counts: int32 arrays, or pairs of them where 32 bits may not do.

JAX has 64-bit integers only where x64 is enabled, and a model has more than 2**31 entries sooner
than that. A `Wide` count is `high * 2**16 + low` with `0 <= low < 2**16`, which is exact up to
2**47 and leaves room to add 2**15 of them before a carry is taken. The functions here take either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BITS = 16
_LOW = 2**_BITS - 1


@partial(jax.tree_util.register_dataclass, data_fields=["high", "low"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Wide:
    """Integers of either sign as two int32 arrays of one shape.

    Attributes:
      high: the integers divided by 2**16, rounded down.
      low: what is left, in [0, 2**16).
    """

    high: Any
    low: Any

    def __add__(self, other: "Wide") -> "Wide":
        return _carried(self.high + other.high, self.low + other.low)

    def __sub__(self, other: "Wide") -> "Wide":
        return _carried(self.high - other.high, self.low - other.low)

    def __lt__(self, other: "Wide") -> jax.Array:
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))


Count = Any
"""An int32 array, or a `Wide`."""

T = TypeVar("T")


def wide(value: Any) -> Wide:
    """Integers as `Wide`: of Python, of a numpy or jax array of any integer type, or a `Wide`."""
    if isinstance(value, Wide):
        return value
    if not isinstance(value, jax.Array):
        value = np.asarray(value, np.int64)
    return Wide((value >> _BITS).astype(np.int32), (value & _LOW).astype(np.int32))


def narrow(value: Any) -> jax.Array:
    """Integers, which may be `Wide`, as int32."""
    if isinstance(value, Wide):
        return (value.high << _BITS) + value.low
    return jnp.asarray(value, jnp.int32)


def none(like: T) -> T:
    """Zeros like some counts."""
    return jax.tree.map(jnp.zeros_like, like)


def to_numpy(value: Any) -> np.ndarray:
    """The integers as an int64 array, where they have a value now."""
    if not isinstance(value, Wide):
        return np.asarray(value, np.int64)
    return (np.asarray(value.high, np.int64) << _BITS) + np.asarray(value.low, np.int64)


def where(condition: Any, a: T, b: T) -> T:
    """The first where the condition is True, else the second."""
    return jax.tree.map(partial(jnp.where, condition), a, b)


def minimum(a: T, b: T) -> T:
    """The lower of two."""
    return where(_less(a, b), a, b)


def maximum(a: T, b: T) -> T:
    """The higher of two."""
    return where(_less(a, b), b, a)


def _less(a: Any, b: Any) -> Any:
    return a < b


def stack(counts: Sequence[T]) -> T:
    """Counts stacked along a new last axis."""
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=-1), *counts)


def take(counts: T, at: Any) -> T:
    """The counts at an index."""
    return jax.tree.map(lambda part: part[at], counts)


def total(counts: Count) -> Count:
    """The sum along the last axis, of up to 2**15 counts, which stays with size 1."""
    sums = jax.tree.map(lambda part: jnp.sum(part, axis=-1, keepdims=True, dtype=jnp.int32), counts)
    return _carried(sums.high, sums.low) if isinstance(sums, Wide) else sums


def across(counts: Count, names: tuple[str, ...]) -> Count:
    """The sum over devices along some mesh axes, in a `shard_map`; of up to 2**15 devices."""
    sums = jax.tree.map(lambda part: lax.psum(part, names), counts)
    return _carried(sums.high, sums.low) if isinstance(sums, Wide) else sums


def running(counts: Count) -> Count:
    """Sums along the last axis of up to 2**15 counts: 0, the first, the first two, ... all."""

    def before(part: jax.Array) -> jax.Array:
        sums = jnp.cumsum(part, axis=-1, dtype=jnp.int32)
        return jnp.pad(sums, [(0, 0)] * (part.ndim - 1) + [(1, 0)])

    sums = jax.tree.map(before, counts)
    return _carried(sums.high, sums.low) if isinstance(sums, Wide) else sums


def sum_all(counts: jax.Array) -> Wide:
    """The sum of all int32 counts of an array, however many they are."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        sums = _carried(a[0] + b[0], a[1] + b[1])
        return [sums.high, sums.low]

    parts = wide(counts)
    zeros = [jnp.zeros((), jnp.int32)] * 2
    return Wide(*lax.reduce([parts.high, parts.low], zeros, add, tuple(range(counts.ndim))))


def _carried(high: jax.Array, low: jax.Array) -> Wide:
    return Wide(high + (low >> _BITS), low & _LOW)
