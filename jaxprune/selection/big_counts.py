"""Exact counts: int32 arrays, or pairs of them where a count may exceed 2**31 - 1.

JAX has 64-bit integers only where x64 is enabled, and large models have more than 2**31 entries. So a
`BigCount` holds `high * 2**16 + low` in two int32 arrays, with `0 <= low < 2**16`: `high` has 31 bits and
a sign, and counts are exact up to 2**47. The functions here take counts of either kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
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
    """Integers, positive or negative, as two int32 arrays of one shape.

    Attributes:
      high: the integers divided by 2**16, rounded down.
      low: the remainders, in [0, 2**16).
    """

    high: Any
    low: Any

    def __add__(self, other: "BigCount") -> "BigCount":
        return _carry(self.high + other.high, self.low + other.low)

    def __sub__(self, other: "BigCount") -> "BigCount":
        return _carry(self.high - other.high, self.low - other.low)

    def __lt__(self, other: "BigCount") -> jax.Array:
        return (self.high < other.high) | ((self.high == other.high) & (self.low < other.low))


Count = Any
"""An int32 array, or a `BigCount`."""

T = TypeVar("T", bound=Any)


def big(value: Any) -> BigCount:
    """Return integers (of Python, or an array of any integer dtype) as a `BigCount`."""
    if isinstance(value, BigCount):
        return value
    if not isinstance(value, jax.Array):
        value = np.asarray(value, np.int64)
    return BigCount((value >> _BITS).astype(np.int32), (value & _LOW).astype(np.int32))


def as_int32(value: Any) -> jax.Array:
    """Return integers, or a `BigCount`, as an int32 array. Counts above 2**31 - 1 wrap."""
    if isinstance(value, BigCount):
        return (value.high << _BITS) + value.low
    return jnp.asarray(value, jnp.int32)


def zeros_like(counts: T) -> T:
    """Return counts of 0, of the kind and shape of some counts."""
    return jax.tree.map(jnp.zeros_like, counts)


def to_numpy(value: Any) -> np.ndarray:
    """Return counts that are not traced as an int64 array."""
    if not isinstance(value, BigCount):
        return np.asarray(value, np.int64)
    return (np.asarray(value.high, np.int64) << _BITS) + np.asarray(value.low, np.int64)


def where(condition: Any, a: T, b: T) -> T:
    """Select counts elementwise: `a` where the condition is True, else `b`."""
    return jax.tree.map(partial(jnp.where, condition), a, b)


def minimum(a: T, b: T) -> T:
    """Return the smaller of two counts, elementwise."""
    return where(a < b, a, b)


def maximum(a: T, b: T) -> T:
    """Return the larger of two counts, elementwise."""
    return where(a < b, b, a)


def stack(counts: Sequence[T]) -> T:
    """Stack counts along a new last axis."""
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=-1), *counts)


def pick(counts: T, index: Any) -> T:
    """Index into counts, as `counts[index]` does into an array."""
    return jax.tree.map(itemgetter(index), counts)


def total(counts: Count) -> Count:
    """Sum up to 2**15 counts along the last axis, which stays, with size 1."""
    sums = jax.tree.map(lambda part: jnp.sum(part, axis=-1, keepdims=True, dtype=jnp.int32), counts)
    return _carry(sums.high, sums.low) if isinstance(sums, BigCount) else sums


def sum_over_devices(counts: Count, names: tuple[str, ...]) -> Count:
    """Sum counts over the devices along some mesh axes, up to 2**15 of them, inside a `shard_map`."""
    sums = jax.tree.map(lambda part: lax.psum(part, names), counts)
    return _carry(sums.high, sums.low) if isinstance(sums, BigCount) else sums


def prefix_sums(counts: Count) -> Count:
    """Sum the first 0, 1, 2, ... n of up to 2**15 counts along the last axis, which grows to n + 1."""

    def of_half(part: jax.Array) -> jax.Array:
        sums = jnp.cumsum(part, axis=-1, dtype=jnp.int32)
        return jnp.pad(sums, [(0, 0)] * (part.ndim - 1) + [(1, 0)])

    sums = jax.tree.map(of_half, counts)
    return _carry(sums.high, sums.low) if isinstance(sums, BigCount) else sums


def sum_all(counts: jax.Array) -> BigCount:
    """Sum all int32 counts of an array, any number of them: a carry is taken in each addition."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        sums = _carry(a[0] + b[0], a[1] + b[1])
        return [sums.high, sums.low]

    parts = big(counts)
    zeros = [jnp.zeros((), jnp.int32)] * 2
    return BigCount(*lax.reduce([parts.high, parts.low], zeros, add, tuple(range(counts.ndim))))


_LIMBS, _DOUBLE = 8, 53
"""Limbs of 16 bits that hold the product of 53 bits and 47 bits; bits of a double's mantissa."""


class Fraction(NamedTuple):
    """Doubles in [0, 1] as integers: `sum(limbs[..., i] * 2**(16 i)) / 2**shift`.

    Attributes:
      limbs: int32, (..., 4): the 53 bits of each mantissa in parts of 16 bits, the lowest first.
      shift: int32, (...).
    """

    limbs: Any
    shift: Any


def fraction(values: Any) -> Fraction:
    """Return the doubles of a numpy array, in [0, 1], as integers."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    bits = (mantissa * 2.0**_DOUBLE).astype(np.int64)  # exact: a double has no more bits
    limbs = np.stack([bits >> (_BITS * i) & _LOW for i in range(4)], axis=-1)
    # Capped to the bits that a product has. The cap matters below 2**-74, where fraction times count is
    # below 2**-74 * 2**47 < 1/2 and rounds to 0, as bits * count / 2**127 < 2**(53 + 47 - 127) does.
    shift = np.minimum(_DOUBLE - exponent, _LIMBS * _BITS - 1)
    return Fraction(limbs.astype(np.int32), shift.astype(np.int32))


def rounded_product(part: Fraction, count: BigCount) -> BigCount:
    """Compute `round_half_even(float64(fraction * count))` of traced counts, exactly.

    This is what `selection.removed_count` computes on the host, here without float64, which JAX may not have.

    Args:
      part: the fractions.
      count: non-negative counts, of the shape of the fractions.
    """
    # The host rounds twice: the product to the 53 bits of a float64, then `round` to an integer. One rounding
    # would not do: a product just above k + 1/2 may first round to k + 1/2, then to k if k is even.
    #
    # With M the mantissa's 53 bits and N the count, fraction * count = M * N / 2**shift. The exact integer
    # P = M * N has at most 100 bits. Dividing by 2**shift only moves the point, so both roundings can be
    # made on the bits of P: to a multiple of 2**(length - 53), with `length` the number of bits of P, and
    # then to a multiple of 2**shift, which is an integer once the point is moved.

    # P by long multiplication of 4 and 3 limbs of 16 bits. A product of two limbs has 32 bits, which uint32
    # holds; its halves are added to two columns. No column gets more than 6 halves and a carry, below 2**19.
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

    # The bits of P, the lowest first, along a new last axis. Both roundings are made there.
    place = np.arange(_BITS, dtype=np.uint32)
    bits = jnp.concatenate([(column[..., None] >> place) & 1 for column in columns], axis=-1).astype(
        jnp.int32
    )
    places = np.arange(_LIMBS * _BITS)
    length = jnp.max(jnp.where(bits == 1, places + 1, 0), axis=-1)
    shift = jnp.asarray(part.shift)
    bits = _round_bits(_round_bits(bits, jnp.maximum(length - _DOUBLE, 0)), shift)
    power = places - shift[..., None]  # the bit at each place now counts 2**power

    def value(first: int, end: int) -> jax.Array:
        inside = (power >= first) & (power < end)
        powers = jnp.clip(power - first, 0, 30)
        return jnp.sum(jnp.where(inside, bits << powers, 0), axis=-1, dtype=jnp.int32)

    return BigCount(value(_BITS, 47), value(0, _BITS))


def _round_bits(bits: jax.Array, at: jax.Array) -> jax.Array:
    """Round numbers given by their bits, the lowest first, half to even to a multiple of `2**at`."""
    places = np.arange(bits.shape[-1])
    at = at[..., None]
    half = jnp.sum(jnp.where(places == at - 1, bits, 0), axis=-1, keepdims=True)
    rest = jnp.any((bits == 1) & (places < at - 1), axis=-1, keepdims=True)
    odd = jnp.sum(jnp.where(places == at, bits, 0), axis=-1, keepdims=True)
    # The part cut off is `half` and `rest` behind it: above one half if both are set, exactly one half if
    # `half` alone is, and then up only if that makes the multiple even.
    up = (half == 1) & (rest | (odd == 1))
    kept = jnp.where(places < at, 0, bits)
    # Adding 1 at a place turns the ones from there on to 0, and the first 0 after them to 1.
    ones = jnp.cumprod(jnp.where(places < at, 1, kept), axis=-1) == 1
    first = (places >= at) & ~ones & (jnp.cumsum(~ones, axis=-1) == 1)
    added = jnp.where(ones & (places >= at), 0, jnp.where(first, 1, kept))
    return jnp.where(up, added, kept)


def _carry(high: jax.Array, low: jax.Array) -> BigCount:
    """Return the count `high * 2**16 + low`, with what `low` has outside of [0, 2**16) moved to `high`."""
    # low == (low >> 16) * 2**16 + (low & 0xFFFF), also below 0, because the shift rounds down. So one step
    # settles a difference, whose low is above -2**16 and borrows 1, and a sum of up to 2**15 counts, whose
    # low is at most 2**15 * (2**16 - 1) < 2**31: such a sum is taken half by half, and carries once.
    return BigCount(high + (low >> _BITS), low & _LOW)
