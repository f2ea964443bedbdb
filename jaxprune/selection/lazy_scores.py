"""The scores of a leaf, computed anew whenever a pass of a selection reads them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.selection import big_counts
from jaxprune.selection.big_counts import Count
from jaxprune.selection.search import MAX_COUNT, Keys, count_below
from jaxprune.selection.sort_keys import limits, ordered_bits


class LazyScores(NamedTuple):
    """How to compute the scores of one leaf.

    Attributes:
      read: from the inputs, the scores, and which entries are alive or None for all. It runs in every pass,
        so that scores which are cheap to compute are never stored.
      inputs: a pytree of arrays.
      part: the shape and dtype of the scores that `read` gives.
      names: inside a `shard_map`, by axis of the leaf, the mesh axes that shard it; `read` then gives the
        part on this device. Empty elsewhere.
    """

    read: Callable[[Any], tuple[jax.Array, jax.Array | None]]
    inputs: Any
    part: jax.ShapeDtypeStruct
    names: tuple[tuple[str, ...], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf, on all devices together."""
        return _whole_shape(self.part.shape, self.names) if self.names else self.part.shape


def _whole_shape(part_shape: tuple[int, ...], names: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    return tuple(
        size * math.prod(map(lax.axis_size, of_axis)) for size, of_axis in zip(part_shape, names, strict=True)
    )


def stored_scores(
    scores: jax.Array, alive: jax.Array | None, names: tuple[tuple[str, ...], ...] = ()
) -> LazyScores:
    """Return scores that are an array already as `LazyScores`."""
    part = jax.ShapeDtypeStruct(scores.shape, scores.dtype)
    return LazyScores(lambda stored: stored, (scores, alive), part, names)


def read_keys(source: LazyScores) -> Keys:
    """Compute the keys of a leaf, or in a `shard_map` of the part on this device."""
    return _as_keys(*source.read(source.inputs))


@partial(jax.jit, inline=True)  # traced once for all leaves of a shape and dtype
def _as_keys(scores: jax.Array, alive: jax.Array | None) -> Keys:
    keys = ordered_bits(scores)
    if alive is not None:
        keys = jnp.where(alive, keys, limits(scores.dtype)[1])
    return Keys(keys, alive)


def entries_at(source: LazyScores, key: jax.Array) -> jax.Array:
    """Find the entries alive that have a key, as a bool array."""
    keys, alive = read_keys(source)
    return keys == key if alive is None else alive & (keys == key)


def zero_of(sources: Sequence[LazyScores]) -> jax.Array:
    """Return 0 in the type that counts of these leaves have in a `shard_map`: varying over the same devices.

    A loop that adds up such counts has to start from a value of their type.
    """
    zero = jnp.int32(0)
    in_shard_map = bool(jax.sharding.get_abstract_mesh().manual_axes)
    for source in sources if in_shard_map else []:
        none = jnp.sum(read_keys(source).keys & 0, dtype=jnp.int32)
        zero += _over_devices(source, none) if source.names else none
    return zero


def _over_devices(source: LazyScores, counts: Count) -> Count:
    """Sum counts over the devices that a leaf is sharded over."""
    names = tuple(name for of_axis in source.names for name in of_axis)
    return big_counts.sum_over_devices(counts, names) if names else counts


def count_on_all_devices(source: LazyScores, keys: Keys, bounds: jax.Array, is_big: bool) -> Count:
    """Apply `count_below` to the leaf on all devices together, as `BigCount` if `is_big`."""
    counts = count_below(keys, bounds, MAX_COUNT)
    counts = big_counts.big(counts) if is_big else counts
    return _over_devices(source, counts) if source.names else counts


def read_anew(after: Any, sources: Sequence[LazyScores]) -> list[LazyScores]:
    """Return the sources, to be read in a loop after something that the loop computes.

    Without it the compiler moves the computation of the scores out of the loop, and stores them.
    """
    # A barrier for each leaf: in a shard_map the outputs of one barrier vary over the same devices.
    return [source._replace(inputs=lax.optimization_barrier((after, source.inputs))[1]) for source in sources]


def positions(source: LazyScores) -> tuple[jax.Array | None, jax.Array]:
    """Return for each entry its position in row-major order of the leaf: its row, and its place in the row.

    A row is as many of the last axes together as have no more than 2**31 - 1 entries, so that an int32 holds
    the place. A leaf of fewer entries is one row, and None is returned for the row of its entries.
    """
    return _positions(source.part.shape, source.names, MAX_COUNT)


@partial(jax.jit, inline=True, static_argnums=(0, 1, 2))  # traced once for all leaves of a shape
def _positions(
    part_shape: tuple[int, ...], names: tuple[tuple[str, ...], ...], max_count: int
) -> tuple[jax.Array | None, jax.Array]:
    shape = _whole_shape(part_shape, names) if names else part_shape
    first = 0
    while math.prod(shape[first:]) > max_count:
        first += 1

    def flat(axes: range) -> jax.Array:
        place = jnp.zeros(part_shape, jnp.int32)
        for axis in axes:
            index = lax.broadcasted_iota(jnp.int32, part_shape, axis)
            if names and names[axis]:
                index += lax.axis_index(names[axis]) * part_shape[axis]
            place = index if axis == axes.start else place * shape[axis] + index
        return place

    return flat(range(first)) if first else None, flat(range(first, len(shape)))
