"""Counts: int32 arrays, or pairs of them where 32 bits may not do.

JAX has 64-bit integers only where x64 is enabled, and a model has more than 2**31 entries sooner
than that. A `BigCount` count is `high * 2**16 + low` with `0 <= low < 2**16`, which is exact up to
2**47 and leaves room to add 2**15 of them before a carry is taken. The functions here take either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BITS = 16
_LOW = 2**_BITS - 1


@partial(jax.tree_util.register_dataclass, data_fields=["high", "low"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class BigCount:
    """Integers of either sign as two int32 arrays of one shape.

    Attributes:
      high: the integers divided by 2**16, rounded down.
      low: what is left, in [0, 2**16).
    """

    high: Any
    low: Any

    def __add__(self, other: "BigCount") -> "BigCount":
        return _carried(self.high + other.high, self.low + other.low)

    def __sub__(self, other: "BigCount") -> "BigCount":
        return _carried(self.high - other.high, self.low - other.low)

    def __lt__(self, other: "BigCount") -> jax.Array:
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))


Count = Any
"""An int32 array, or a `BigCount`."""

T = TypeVar("T")


def wide(value: Any) -> BigCount:
    """Integers as `BigCount`: of Python, of a numpy or jax array of any integer type, or a `BigCount`."""
    if isinstance(value, BigCount):
        return value
    if not isinstance(value, jax.Array):
        value = np.asarray(value, np.int64)
    return BigCount((value >> _BITS).astype(np.int32), (value & _LOW).astype(np.int32))


def narrow(value: Any) -> jax.Array:
    """Integers, which may be `BigCount`, as int32."""
    if isinstance(value, BigCount):
        return (value.high << _BITS) + value.low
    return jnp.asarray(value, jnp.int32)


def none(like: T) -> T:
    """Zeros like some counts."""
    return jax.tree.map(jnp.zeros_like, like)


def to_numpy(value: Any) -> np.ndarray:
    """The integers as an int64 array, where they have a value now."""
    if not isinstance(value, BigCount):
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
    return _carried(sums.high, sums.low) if isinstance(sums, BigCount) else sums


def across(counts: Count, names: tuple[str, ...]) -> Count:
    """The sum over devices along some mesh axes, in a `shard_map`; of up to 2**15 devices."""
    sums = jax.tree.map(lambda part: lax.psum(part, names), counts)
    return _carried(sums.high, sums.low) if isinstance(sums, BigCount) else sums


def running(counts: Count) -> Count:
    """Sums along the last axis of up to 2**15 counts: 0, the first, the first two, ... all."""

    def before(part: jax.Array) -> jax.Array:
        sums = jnp.cumsum(part, axis=-1, dtype=jnp.int32)
        return jnp.pad(sums, [(0, 0)] * (part.ndim - 1) + [(1, 0)])

    sums = jax.tree.map(before, counts)
    return _carried(sums.high, sums.low) if isinstance(sums, BigCount) else sums


def sum_all(counts: jax.Array) -> BigCount:
    """The sum of all int32 counts of an array, however many they are."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        sums = _carried(a[0] + b[0], a[1] + b[1])
        return [sums.high, sums.low]

    parts = wide(counts)
    zeros = [jnp.zeros((), jnp.int32)] * 2
    return BigCount(*lax.reduce([parts.high, parts.low], zeros, add, tuple(range(counts.ndim))))


_LIMBS, _DOUBLE = 8, 53
"""Limbs of 16 bits of a product of a double's 53 bits and a count's 47; bits of a double."""


class Fraction(NamedTuple):
    """Doubles in [0, 1] as integers: `sum(limbs[..., i] * 2**(16 i)) / 2**shift`.

    Attributes:
      limbs: int32, (..., 4): the 53 bits of each in parts of 16, the lowest first.
      shift: int32, (...).
    """

    limbs: Any
    shift: Any


def fraction(values: Any) -> Fraction:
    """Doubles in [0, 1], of a numpy array, as integers."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    whole = (mantissa * 2.0**_DOUBLE).astype(np.int64)  # exact: a double has no more bits
    limbs = np.stack([whole >> (_BITS * i) & _LOW for i in range(4)], axis=-1)
    # Below 2**-60 nothing that a count can be makes half a unit.
    shift = np.minimum(_DOUBLE - exponent, 127)
    return Fraction(limbs.astype(np.int32), shift.astype(np.int32))


def rounded_product(part: Fraction, count: BigCount) -> BigCount:
    """`round_half_even(float64(fraction * count))` for counts that are traced, to the unit.

    It gives what `selection.removed_count` gives on the host, where JAX has no float64. Two roundings are
    made: the product of 53 and 47 bits is rounded to 53 bits, as double precision does, and that to an
    integer. Both are done on the bits of the exact product.

    Args:
      part: the fractions.
      count: non-negative counts, of the shape of the fractions.
    """
    limbs = jnp.asarray(part.limbs).astype(jnp.uint32)
    factors = [x.astype(jnp.uint32) for x in (count.low, count.high & _LOW, count.high >> _BITS)]
    columns = [jnp.zeros(count.low.shape, jnp.uint32) for _ in range(_LIMBS)]
    for i in range(4):
        for j, factor in enumerate(factors):
            product = limbs[..., i] * factor
            columns[i + j] += product & _LOW
            columns[i + j + 1] += product >> _BITS
    for i in range(_LIMBS - 1):
        columns[i + 1] += columns[i] >> _BITS
    place = np.arange(_BITS, dtype=np.uint32)
    bits = jnp.concatenate([(column[..., None] >> place) & 1 for column in columns], axis=-1).astype(
        jnp.int32
    )
    places = np.arange(_LIMBS * _BITS)
    length = jnp.max(jnp.where(bits == 1, places + 1, 0), axis=-1)
    shift = jnp.asarray(part.shift)
    bits = _rounded_at(_rounded_at(bits, jnp.maximum(length - _DOUBLE, 0)), shift)
    power = places - shift[..., None]

    def value(first: int, end: int) -> jax.Array:
        inside = (power >= first) & (power < end)
        powers = jnp.clip(power - first, 0, 30)
        return jnp.sum(jnp.where(inside, bits << powers, 0), axis=-1, dtype=jnp.int32)

    return BigCount(value(_BITS, 47), value(0, _BITS))


def _rounded_at(bits: jax.Array, at: jax.Array) -> jax.Array:
    """Numbers given by their bits, the lowest first, rounded half to even to a multiple of `2**at`."""
    places = np.arange(bits.shape[-1])
    at = at[..., None]
    half = jnp.sum(jnp.where(places == at - 1, bits, 0), axis=-1, keepdims=True)
    rest = jnp.any((bits == 1) & (places < at - 1), axis=-1, keepdims=True)
    odd = jnp.sum(jnp.where(places == at, bits, 0), axis=-1, keepdims=True)
    up = (half == 1) & (rest | (odd == 1))
    kept = jnp.where(places < at, 0, bits)
    # Adding 1 at a place turns the ones from there on to 0, and the first 0 after them to 1.
    ones = jnp.cumprod(jnp.where(places < at, 1, kept), axis=-1) == 1
    first = (places >= at) & ~ones & (jnp.cumsum(~ones, axis=-1) == 1)
    added = jnp.where(ones & (places >= at), 0, jnp.where(first, 1, kept))
    return jnp.where(up, added, kept)


def _carried(high: jax.Array, low: jax.Array) -> BigCount:
    return BigCount(high + (low >> _BITS), low & _LOW)
