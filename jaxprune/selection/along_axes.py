"""Select the lowest scores along some axes of an array, for each index of the other axes by itself.

For `scope="output"` each output of a layer loses the same number of its inputs. The inputs of an output are
the entries along the contracted axes of the leaf; here they are a *row*. The thresholds of all rows are found
by the search that finds those of leaves (`selection/search.py`), with rows in place of leaves, so no Python
runs for each row. The order is that of `selection/exact.py`: equal scores by row-major index, NaN highest.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.selection.big_counts import as_int32, to_numpy
from jaxprune.selection.lazy_scores import LazyScores, read_anew, read_keys, stored_scores
from jaxprune.selection.search import MAX_COUNT, bisect, full_range, sums
from jaxprune.selection.sort_keys import limits, ordered_bits_on_host
from jaxprune.tree.host import like_computed, on_host
from jaxprune.tree.leaves import is_concrete

_BITS = 4
"""How many bits of a threshold a pass finds, as in `selection/exact.py`."""

Axes = tuple[int, ...]


def lowest_along(
    scores: jax.Array, alive: jax.Array | None, axes: Axes, count: Any, floor: int, includes_pruned: bool
) -> jax.Array:
    """Mark the lowest scores of each row among those alive.

    Args:
      scores: the scores.
      alive: a bool array of the same shape that says which may be chosen, or None for all.
      axes: the axes that a row lies along, counted from 0.
      count: how many to choose in each row: a number, or an array of the shape of the scores with size 1
        along `axes`. In a row with fewer alive, all are chosen that the floor allows.
      floor: how many alive of each row are left at least.
      includes_pruned: whether the count includes the entries that are not alive.

    Returns:
      A bool array of the same shape. Of equal scores in a row the lower row-major index is chosen first.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.selection.along_axes import lowest_along
      >>> lowest_along(jnp.array([[3, 1, 1], [5, 6, 4]]), None, (1,), 1, 0, False).tolist()
      [[False, True, False], [False, False, True]]
    """
    axes = tuple(sorted(axes))
    if is_concrete(count) and on_host(scores, alive):
        return _lowest_on_host(scores, alive, axes, count, floor, includes_pruned)
    return _lowest_compiled(scores, alive, as_int32(count), axes, floor, includes_pruned)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _lowest_compiled(
    scores: jax.Array,
    alive: jax.Array | None,
    count: jax.Array,
    axes: Axes,
    floor: int,
    includes_pruned: bool,
) -> jax.Array:
    return select_along(stored_scores(scores, alive), axes, count, floor, includes_pruned)


def select_along(source: LazyScores, axes: Axes, count: Any, floor: int, includes_pruned: bool) -> jax.Array:
    """Apply `lowest_along` to scores that are computed anew in each pass."""
    shape = source.part.shape
    size = math.prod(shape[axis] for axis in axes)
    if size > MAX_COUNT:
        raise ValueError(f"cannot rank {size} inputs of one output: more than {MAX_COUNT}.")
    lowest_key, highest_key = limits(source.part.dtype)
    asked = as_int32(count)
    # All arrays by row have size 1 along the axes, so that they broadcast against the scores, and nothing is
    # reshaped. Zeros made of the keys have the shardings that the counts will have.
    zeros = jnp.expand_dims(jnp.sum(read_keys(source).keys & 0, axis=axes, dtype=jnp.int32), axes)

    def count_rows(tests: list[jax.Array], living: jax.Array) -> tuple[jax.Array, jax.Array]:
        *below, alive = sums([test.astype(jnp.int32) for test in [*tests, living]], axes)
        return jnp.expand_dims(jnp.stack(below), tuple(axis + 1 for axis in axes)), jnp.expand_dims(
            alive, axes
        )

    def count_below(bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, alive = read_keys(read_anew(bounds, [source])[0])
        living = jnp.ones(shape, bool) if alive is None else alive
        return count_rows([keys < bound for bound in bounds], living)

    def target(alive: jax.Array) -> jax.Array:
        num_removed = asked - (size - alive) if includes_pruned else asked + zeros
        return jnp.maximum(jnp.minimum(num_removed, alive - floor), 0)

    start = full_range(lowest_key, highest_key, zeros, False)
    found = bisect(start, count_below, lambda counts, alive: counts, target, highest_key, _BITS)

    # As in `exact.py`: the first ties go, and which are the first is searched only in rows where some of the
    # ties go and some stay.
    num_ties, num_removed = found.upto - found.below, target(found.alive) - found.below
    undecided = (num_removed > 0) & (num_removed < num_ties)
    decided = jnp.where(num_removed > 0, size, zeros)
    place = _places(shape, axes)

    def ties_in(source: LazyScores) -> jax.Array:
        keys, alive = read_keys(source)
        return keys == found.low if alive is None else alive & (keys == found.low)

    def count_ties(bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
        ties = ties_in(read_anew(bounds, [source])[0])
        return count_rows([ties & (place < bound) for bound in bounds], ties)

    last = jnp.int32(size)
    start = full_range(jnp.int32(0), last, zeros, False)._replace(open=undecided)
    cutoff = bisect(start, count_ties, lambda counts, alive: counts, lambda alive: num_removed, last, _BITS)
    behind = jnp.where(undecided, cutoff.low, decided)
    keys, alive = read_keys(source)
    removed = (keys < found.low) | ((keys == found.low) & (place < behind))
    return removed if alive is None else removed & alive


def _places(shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """Return the row-major index of each entry in its row; size 1 along the other axes."""
    along = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
    place = jnp.zeros(along, jnp.int32)
    for axis in axes:
        place = place * shape[axis] + lax.broadcasted_iota(jnp.int32, along, axis)
    return place


def _lowest_on_host(
    scores: Any, alive: Any, axes: Axes, count: Any, floor: int, includes_pruned: bool
) -> jax.Array:
    """Apply `lowest_along` by numpy, with the same result."""
    values = np.asarray(scores)
    last = range(-len(axes), 0)
    moved = np.moveaxis(values, axes, last)
    size = math.prod(values.shape[axis] for axis in axes)

    def rows(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, axes, last).reshape(-1, size)

    keys = ordered_bits_on_host(np.ascontiguousarray(rows(values)))
    living = np.ones(keys.shape, bool) if alive is None else rows(np.asarray(alive))
    by_row = [1 if axis in axes else length for axis, length in enumerate(values.shape)]
    asked = np.moveaxis(np.broadcast_to(to_numpy(count), by_row), axes, last).reshape(-1, 1)
    num_alive = np.count_nonzero(living, axis=1)[:, None]
    num_removed = asked - (size - num_alive) if includes_pruned else asked
    num_removed = np.maximum(np.minimum(num_removed, num_alive - floor), 0)
    removed = np.zeros(keys.shape, bool)
    if keys.size and num_removed.any():
        # What is not alive has the highest key of all. No more are removed than are alive, so it never goes.
        candidates = np.where(living, keys, np.iinfo(keys.dtype).max)
        threshold = np.take_along_axis(np.sort(candidates, axis=1), np.maximum(num_removed - 1, 0), axis=1)
        below = living & (keys < threshold)
        ties = living & (keys == threshold)
        missing = num_removed - np.count_nonzero(below, axis=1)[:, None]
        some = np.flatnonzero(missing[:, 0] < np.count_nonzero(ties, axis=1))
        ties[some] &= np.cumsum(ties[some], axis=1) <= missing[some]
        removed = (below | ties) & (num_removed > 0)
    mask = np.moveaxis(removed.reshape(moved.shape), last, axes)
    return like_computed(np.ascontiguousarray(mask), scores)
