"""The scores of a leaf, computed anew whenever a pass of a selection reads them."""

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
    """How to compute the scores of one leaf.

    Attributes:
      read: from the inputs, the scores, and which entries are alive or None for all. It runs in every pass,
        so that scores which are cheap to compute are never stored.
      inputs: a pytree of arrays.
      names: inside a `shard_map`, by axis of the leaf, the mesh axes that shard it; `read` then gives the
        part on this device. Empty elsewhere.
    """

    read: Callable[[Any], tuple[jax.Array, jax.Array | None]]
    inputs: Any
    names: tuple[tuple[str, ...], ...] = ()

    @property
    def dtype(self) -> Any:
        """The dtype of the scores."""
        return self._on_this_device.dtype

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of what `read` gives: inside a `shard_map`, of the part on this device."""
        return self._on_this_device.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf, on all devices together."""
        part = self.part_shape
        return tuple(
            size * math.prod(map(lax.axis_size, names))
            for size, names in zip(part, self.names or [()] * len(part), strict=True)
        )

    @property
    def _on_this_device(self) -> Any:
        return jax.eval_shape(self.read, self.inputs)[0]


def stored_scores(
    scores: jax.Array, alive: jax.Array | None, names: tuple[tuple[str, ...], ...] = ()
) -> LazyScores:
    """Return scores that are an array already as `LazyScores`."""
    return LazyScores(lambda stored: stored, (scores, alive), names)


def read_keys(source: LazyScores) -> Keys:
    """Compute the keys of a leaf, or in a `shard_map` of the part on this device."""
    scores, alive = source.read(source.inputs)
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
    for source in sources:
        zero += _over_devices(source, jnp.sum(read_keys(source).keys & 0, dtype=jnp.int32))
    return zero


def _over_devices(source: LazyScores, counts: Count) -> Count:
    """Sum counts over the devices that a leaf is sharded over."""
    names = tuple(name for of_axis in source.names for name in of_axis)
    return big_counts.sum_over_devices(counts, names) if names else counts


def count_on_all_devices(source: LazyScores, keys: Keys, bounds: jax.Array, is_big: bool) -> Count:
    """Apply `count_below` to the leaf on all devices together, as `BigCount` if `is_big`."""
    counts = count_below(keys, bounds)
    return _over_devices(source, big_counts.big(counts) if is_big else counts)


def read_anew(after: Any, sources: Sequence[LazyScores]) -> list[LazyScores]:
    """Return the sources, to be read in a loop after something that the loop computes.

    Without it the compiler moves the computation of the scores out of the loop, and stores them.
    """
    # A barrier for each leaf: in a shard_map the outputs of one barrier vary over the same devices.
    return [source._replace(inputs=lax.optimization_barrier((after, source.inputs))[1]) for source in sources]


def positions(source: LazyScores) -> tuple[jax.Array, jax.Array]:
    """Return for each entry its position in row-major order of the leaf: its row, and its place in the row.

    A row is as many of the last axes together as have no more than 2**31 - 1 entries, so that an int32 holds
    the place. A leaf of fewer entries is one row.
    """
    shape, part_shape = source.shape, source.part_shape
    first = next(a for a in range(len(shape) + 1) if math.prod(shape[a:]) <= MAX_COUNT)

    def flat(axes: range) -> jax.Array:
        place = jnp.zeros(part_shape, jnp.int32)
        for axis in axes:
            index = lax.broadcasted_iota(jnp.int32, part_shape, axis)
            if source.names and source.names[axis]:
                index += lax.axis_index(source.names[axis]) * part_shape[axis]
            place = place * shape[axis] + index
        return place

    return flat(range(first)), flat(range(first, len(shape)))
