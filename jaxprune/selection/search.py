"""Searches for thresholds, many at once, by counting what lies below bounds.

A threshold is an integer key. Each pass counts the keys below some bounds, which cut the range
that is left into parts: 15 bounds find 4 bits. Counts are taken by leaf, one search for each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.selection import big_counts
from jaxprune.selection.big_counts import Count

MAX_COUNT = 2**31 - 1
"""As many entries as one int32 counts."""


class Keys(NamedTuple):
    """The keys of a leaf.

    Attributes:
      keys: integers of any shape, the highest there is for what is not alive.
      alive: bool array of the same shape, or None for all.
    """

    keys: jax.Array
    alive: jax.Array | None


class Range(NamedTuple):
    """By leaf, the range that its threshold lies in, both ends included.

    Attributes:
      low: the lowest key it may be.
      high: the highest.
      below: how many entries alive have a key below `low`.
      upto: how many have one up to `high`.
      alive: how many are alive.
      open: whether the range must be narrowed.
    """

    low: jax.Array
    high: jax.Array
    below: Count
    upto: Count
    alive: Count
    open: jax.Array

    def lowered(self, take: Count, least: jax.Array) -> "Range":
        """The range below the threshold, where less is taken than lies there."""
        over = take < self.below
        below = self._replace(
            low=least, high=self.low - 1, below=big_counts.none(self.below), upto=self.below
        )
        return big_counts.where(over, below, self)._replace(open=over)


def whole(least: jax.Array, most: jax.Array, zeros: jax.Array, big: bool) -> Range:
    """All keys there are, for as many leaves as there are zeros.

    Args:
      least: the lowest key there is.
      most: the highest.
      zeros: int32.
      big: whether counts are `BigCount`.
    """
    none = big_counts.BigCount(zeros, zeros) if big else zeros
    keys = zeros.astype(least.dtype)
    return Range(keys + least, keys + most, none, none, none, zeros == 0)


def narrow(
    start: Range,
    count: Callable[[jax.Array], tuple[Count, Count]],
    go: Callable[[Count, Count], Count],
    goal: Callable[[Count], Count],
    most: jax.Array,
    bits: int,
) -> Range:
    """Narrows ranges until each holds one key, or begins where exactly the goal is below.

    Args:
      start: the ranges.
      count: from bounds, of shape (2**bits - 1, leaves), how many keys alive are below each, and, by leaf,
        how many are alive.
      go: from counts whose last axis is the leaves, and from how many are alive, how many would go
        with as many below. It does not fall where they rise.
      goal: from how many are alive, how many should go.
      most: the highest key there is.
      bits: how many bits of the threshold a pass finds.
    """

    def body(now: Range) -> Range:
        bounds = _cut(now.low, now.high, bits)
        counts, alive = count(bounds)
        upto = big_counts.where(now.high == most, alive, now.upto)
        aim = goal(alive)
        # Which part the threshold is in: the last at whose start no more than the goal go.
        fits = ~(aim < go(counts, alive))
        part = jnp.sum(fits, axis=0, dtype=jnp.int32)
        starts, stops = (bounds, counts), (bounds - 1, counts)
        low, below = big_counts.where(part == 0, (now.low, now.below), _rows(part - 1, starts))
        high, upto = big_counts.where(part == len(bounds), (now.high, upto), _rows(part, stops))
        met = ~(go(below, alive) < aim)  # it is not above
        return Range(low, high, below, upto, alive, now.open & (low < high) & ~met)

    return lax.while_loop(lambda now: jnp.any(now.open), body, start)


def _rows(number: jax.Array, arrays: Any) -> Any:
    """Of arrays of shape (rows, leaves), for each leaf the value in one row; any where there is none."""
    leaves, treedef = jax.tree.flatten(arrays)
    chosen = lax.broadcasted_iota(jnp.int32, leaves[0].shape, 0) == number
    return jax.tree.unflatten(treedef, _sums([jnp.where(chosen, x, 0) for x in leaves], (0,)))


def _cut(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    """For each range bounds, rising, which cut it into 2**bits parts as equal as can be."""
    unsigned = jnp.uint32 if low.dtype.itemsize == 4 else jnp.uint64
    width = high.astype(unsigned) - low.astype(unsigned)  # wraps where the keys' difference does
    last = 2**bits - 1
    place = jnp.arange(1, 2**bits, dtype=unsigned)[:, None]
    step = (width >> bits) * place + (((width & last) * place + last) >> bits)
    return (low.astype(unsigned) + step).astype(low.dtype)


def count_below(leaf: Keys, bounds: jax.Array) -> Count:
    """How many keys are below each of some bounds, and last how many entries are alive."""
    living = jnp.ones(leaf.keys.shape, bool) if leaf.alive is None else leaf.alive
    # One reduction of all: XLA reads the keys once, and stores nothing of what it compares.
    tests = [*(leaf.keys < bounds[i] for i in range(len(bounds))), living]
    return big_counts.stack(_count([test.astype(jnp.int32) for test in tests]))


def _count(flags: list[jax.Array]) -> list[Count]:
    """How many of some int32 arrays of one shape are 1; `BigCount` beyond 2**31 - 1 entries."""
    axes = tuple(range(flags[0].ndim))
    if flags[0].size <= MAX_COUNT:
        return _sums(flags, axes)
    # No row has as many, so rows are counted, and their counts added with a carry.
    return [big_counts.sum_all(row) for row in _sums(flags, axes[-1:])]


def count_true(mask: jax.Array) -> Count:
    """How many entries of a mask are True."""
    flags = mask.astype(jnp.int32)
    # Two counts, of every other entry, because XLA would store the operand of a lone sum of integers.
    odd = lax.broadcasted_iota(jnp.int32, mask.shape, 0) & 1 == 1 if mask.ndim else jnp.array(True)
    a, b = _count([jnp.where(odd, flags, 0), jnp.where(odd, 0, flags)])
    return a + b


def _sums(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """The sums of several integer arrays of one shape, taken together."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [x + y for x, y in zip(a, b, strict=True)]

    return lax.reduce(arrays, [jnp.zeros((), x.dtype) for x in arrays], add, axes)
