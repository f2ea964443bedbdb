"""Where the scores of a leaf come from, and what a pass of a selection reads of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.selection import big_counts
from jaxprune.selection.big_counts import Count
from jaxprune.selection.search import MAX_COUNT, Keys, count_below
from jaxprune.selection.sort_keys import limits, ordered_bits


class LazyScores(NamedTuple):
    """Where the scores of one leaf come from.

    Attributes:
      read: from the inputs, the scores and which entries are alive, None for all. It is run anew
        in every pass, so that scores which are cheap to compute are never stored.
      inputs: a pytree of arrays.
      names: in a `shard_map`, by axis of the leaf the mesh axes that it is sharded over; the leaf is
        then the part on this device. Empty elsewhere.
    """

    read: Callable[[Any], tuple[jax.Array, jax.Array | None]]
    inputs: Any
    names: tuple[tuple[str, ...], ...] = ()


def dtype_of(source: LazyScores) -> Any:
    """The dtype of the scores."""
    return jax.eval_shape(source.read, source.inputs)[0].dtype


def read_keys(source: LazyScores) -> Keys:
    """The keys of the leaf, or in a `shard_map` of the part on this device."""
    scores, alive = source.read(source.inputs)
    keys = ordered_bits(scores)
    if alive is not None:
        keys = jnp.where(alive, keys, limits(scores.dtype)[1])
    return Keys(keys, alive)


def entries_at(source: LazyScores, key: jax.Array) -> jax.Array:
    """The entries alive whose key this is."""
    keys, alive = read_keys(source)
    return keys == key if alive is None else alive & (keys == key)


def zero_of(sources: Sequence[LazyScores]) -> jax.Array:
    """A zero of a type that varies over devices, in a shard_map, as the counts do: a loop keeps it."""
    zero = jnp.int32(0)
    for source in sources:
        zero += _over_devices(source, jnp.sum(read_keys(source).keys & 0, dtype=jnp.int32))
    return zero


def whole_shape(source: LazyScores) -> tuple[int, ...]:
    """The shape of the whole leaf."""
    shape = read_keys(source).keys.shape
    return tuple(
        n * math.prod(map(lax.axis_size, names))
        for n, names in zip(shape, source.names or [()] * len(shape), strict=True)
    )


def _over_devices(source: LazyScores, counts: Count) -> Count:
    """The sum of counts over the devices that a leaf is sharded over."""
    names = tuple(name for each in source.names for name in each)
    return big_counts.across(counts, names) if names else counts


def count_whole(source: LazyScores, leaf: Keys, bounds: jax.Array, big: bool) -> Count:
    """`count_below` of the whole leaf, `BigCount` if counts are big."""
    counts = count_below(leaf, bounds)
    return _over_devices(source, big_counts.wide(counts) if big else counts)


def read_anew(after: Any, sources: Sequence[LazyScores]) -> list[LazyScores]:
    """The sources, to be read in a loop after something that it computes.

    Else the compiler takes what is read out of the loop, and stores it.
    """
    # Each by itself, as in a shard_map what comes out together varies over the same devices.
    return [source._replace(inputs=lax.optimization_barrier((after, source.inputs))[1]) for source in sources]


def positions(source: LazyScores) -> tuple[jax.Array, jax.Array]:
    """For each entry, in row-major order of the whole leaf, the number of its row and its place there.

    A row is as many of the last axes together as have no more than 2**31 - 1 entries.
    """
    shape, own = whole_shape(source), read_keys(source).keys.shape
    first = next(a for a in range(len(shape) + 1) if math.prod(shape[a:]) <= MAX_COUNT)

    def flat(axes: range) -> jax.Array:
        place = jnp.zeros(own, jnp.int32)
        for axis in axes:
            index = lax.broadcasted_iota(jnp.int32, own, axis)
            if source.names and source.names[axis]:
                index += lax.axis_index(source.names[axis]) * own[axis]
            place = place * shape[axis] + index
        return place

    return flat(range(first)), flat(range(first, len(shape)))
