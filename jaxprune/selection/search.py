"""Find thresholds by counting, for many leaves at once.

A threshold is an integer key. Each pass counts the keys below some bounds, which cut the remaining range of
keys into parts, and goes on with the part that the threshold is in: 15 bounds find 4 bits of it. All leaves
are searched in the same passes, each in a range of its own.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.selection import big_counts
from jaxprune.selection.big_counts import Count

MAX_COUNT = 2**31 - 1
"""The most entries that an int32 counts."""


class Keys(NamedTuple):
    """The keys of a leaf.

    Attributes:
      keys: integers of any shape; entries that are not alive have the highest key of the search.
      alive: bool array of the same shape, or None if all entries are alive.
    """

    keys: jax.Array
    alive: jax.Array | None


class Range(NamedTuple):
    """For each leaf, the range of keys that its threshold lies in, both ends included.

    Attributes:
      low: the lowest key that the threshold may be.
      high: the highest.
      below: how many entries alive have a key below `low`.
      upto: how many have a key of at most `high`.
      alive: how many entries are alive.
      open: whether the search has to go on.
    """

    low: jax.Array
    high: jax.Array
    below: Count
    upto: Count
    alive: Count
    open: jax.Array

    def reopened_below(self, num_from_leaf: Count, lowest_key: jax.Array) -> "Range":
        """Return the range of all keys below `low` for leaves that give fewer entries than lie there."""
        too_many = num_from_leaf < self.below
        lower = self._replace(
            low=lowest_key, high=self.low - 1, below=big_counts.zeros_like(self.below), upto=self.below
        )
        return big_counts.where(too_many, lower, self)._replace(open=too_many)


def full_range(lowest_key: jax.Array, highest_key: jax.Array, zeros: jax.Array, is_big: bool) -> Range:
    """Return the range to start from: all keys, for as many leaves as there are zeros.

    Args:
      lowest_key: the lowest key of all.
      highest_key: the highest.
      zeros: an int32 zero for each leaf.
      is_big: whether counts are `BigCount`.
    """
    none = big_counts.BigCount(zeros, zeros) if is_big else zeros
    keys = zeros.astype(lowest_key.dtype)
    return Range(keys + lowest_key, keys + highest_key, none, none, none, zeros == 0)


def bisect(
    start: Range,
    count: Callable[[jax.Array], tuple[Count, Count]],
    num_removed: Callable[[Count, Count], Count],
    target: Callable[[Count], Count],
    highest_key: jax.Array,
    bits: int,
) -> Range:
    """Narrow ranges until `low` is the threshold: the largest key with at most `target` removed below it.

    A search ends when its range holds one key, or as soon as exactly the target is removed below `low`: the
    threshold may then be a higher key, but nothing more is removed below that.

    Args:
      start: the ranges.
      count: from bounds, of shape (2**bits - 1, leaves), how many keys alive are below each, and, by leaf,
        how many are alive.
      num_removed: from how many keys are below some bounds, the leaves along the last axis, and how many are
        alive: how many entries would be removed below these bounds. It never falls as the counts rise.
      target: from how many are alive, how many entries should be removed.
      highest_key: the highest key of all.
      bits: how many bits of the threshold a pass finds.
    """
    # Why this is exact: num_removed(below) <= target holds at the start, where nothing is below `low`, and in
    # each pass. There num_removed does not fall along the rising bounds, so the bounds where it is at most
    # the target come first. The last of them is the new `low`; the threshold is below the next bound, so
    # the key before that is the new `high`. Counts are integers, and nothing rounds.
    #
    # How many passes: a range of w + 1 keys is cut at its keys number ceil(j w / 2**bits), j = 1, 2, ..., so
    # no part has more than floor(w / 2**bits) + 1 keys. If w + 1 <= 2**(bits k), that is at most
    # 2**(bits (k - 1)). So k passes leave one key: 8 of 4 bits for any range of 32-bit keys.

    def body(now: Range) -> Range:
        bounds = _cut(now.low, now.high, bits)
        counts, alive = count(bounds)
        # Bounds are below keys only, so nothing has counted the keys up to the highest: those are all alive.
        upto = big_counts.where(now.high == highest_key, alive, now.upto)
        aim = target(alive)
        fits = ~(aim < num_removed(counts, alive))
        part = jnp.sum(fits, axis=0, dtype=jnp.int32)
        starts, stops = (bounds, counts), (bounds - 1, counts)
        low, below = big_counts.where(part == 0, (now.low, now.below), _rows(part - 1, starts))
        high, upto = big_counts.where(part == len(bounds), (now.high, upto), _rows(part, stops))
        met = ~(num_removed(below, alive) < aim)
        return Range(low, high, below, upto, alive, now.open & (low < high) & ~met)

    return lax.while_loop(lambda now: jnp.any(now.open), body, start)


def _rows(number: jax.Array, arrays: Any) -> Any:
    """Pick for each leaf one row of arrays of shape (rows, leaves); 0 where there is no such row."""
    leaves, treedef = jax.tree.flatten(arrays)
    chosen = lax.broadcasted_iota(jnp.int32, leaves[0].shape, 0) == number
    return jax.tree.unflatten(treedef, sums([jnp.where(chosen, x, 0) for x in leaves], (0,)))


def _cut(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    """Return for each range the bounds, rising, that cut it into 2**bits parts of nearly equal size."""
    # The j-th bound is low + ceil(j w / 2**bits) with w = high - low. j w may not fit the type, so w is split
    # into q * 2**bits + r: the bound is low + q j + ceil(j r / 2**bits).
    unsigned = jnp.uint32 if low.dtype.itemsize == 4 else jnp.uint64
    width = high.astype(unsigned) - low.astype(unsigned)  # right modulo 2**32, where a signed one overflows
    last = 2**bits - 1
    place = jnp.expand_dims(jnp.arange(1, 2**bits, dtype=unsigned), tuple(range(1, low.ndim + 1)))
    step = (width >> bits) * place + (((width & last) * place + last) >> bits)
    return (low.astype(unsigned) + step).astype(low.dtype)


@partial(jax.jit, inline=True, static_argnums=2)  # traced once for all leaves of a shape
def count_below(leaf: Keys, bounds: jax.Array, max_count: int) -> Count:
    """Count the keys below each of some bounds, and as the last count the entries alive.

    Counts are `BigCount` for a leaf of more than `max_count` entries.
    """
    living = jnp.ones(leaf.keys.shape, bool) if leaf.alive is None else leaf.alive
    # One reduction of all: XLA reads the keys once, and stores nothing of what it compares.
    tests = [leaf.keys < bounds[i] for i in range(len(bounds))]
    return big_counts.stack(_count([test.astype(jnp.int32) for test in [*tests, living]], max_count))


def _count(flags: list[jax.Array], max_count: int) -> list[Count]:
    """Count the ones of each of some int32 arrays of one shape; as `BigCount` beyond `max_count` entries."""
    axes = tuple(range(flags[0].ndim))
    if flags[0].size <= max_count:
        return sums(flags, axes)
    # An int32 counts what one row has. The counts of the rows are added with a carry.
    return [big_counts.sum_all(row) for row in sums(flags, axes[-1:])]


def count_true(mask: jax.Array) -> Count:
    """Count the entries of a mask that are True."""
    flags = mask.astype(jnp.int32)
    # Two counts, of every other entry, because XLA would store the operand of a lone sum of integers.
    odd = lax.broadcasted_iota(jnp.int32, mask.shape, 0) & 1 == 1 if mask.ndim else jnp.array(True)
    a, b = _count([jnp.where(odd, flags, 0), jnp.where(odd, 0, flags)], MAX_COUNT)
    return a + b


def sums(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sum several integer arrays of one shape along the same axes, in one reduction."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return list(map(operator.add, a, b))

    return lax.reduce(arrays, [jnp.zeros((), x.dtype) for x in arrays], add, axes)
