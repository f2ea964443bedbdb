"""Select the lowest scores along some axes of an array, for each index of the other axes by itself.

For `scope="output"` each output of a layer loses the same number of its inputs. The inputs of an output are
the entries along the contracted axes of the leaf; here they are a *row*. The thresholds of all rows are found
by the search that finds those of leaves (`selection/search.py`), with rows in place of leaves, so no Python
runs for each row. The order is that of `selection/exact.py`: equal scores by row-major index, NaN highest.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.selection.big_counts import as_int32, to_numpy
from jaxprune.selection.search import MAX_COUNT, Range, bisect, full_range, sums
from jaxprune.selection.sort_keys import limits, ordered_bits, ordered_bits_on_host
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


@partial(jax.jit, static_argnums=(3, 5))  # traced once for all leaves of a shape
def _lowest_compiled(
    scores: jax.Array,
    alive: jax.Array | None,
    count: jax.Array,
    axes: Axes,
    floor: int,
    includes_pruned: bool,
) -> jax.Array:
    size = math.prod(scores.shape[axis] for axis in axes)
    if size > MAX_COUNT:
        raise ValueError(f"cannot rank {size} inputs of one output: more than {MAX_COUNT}.")
    # The keys are stored with the axes of rows last, because on a CPU XLA sums over leading axes several
    # times as slowly; without the barrier it would do that nevertheless, rather than transpose. Arrays by row
    # have size 1 along these axes, so that they broadcast against the keys, and no axes of a sharded array
    # are joined or split.
    last = tuple(range(scores.ndim - len(axes), scores.ndim))
    behind_bounds = tuple(axis + 1 for axis in last)

    def rows_last(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, axes, last)

    lowest_key, highest_key = limits(scores.dtype)
    keys = ordered_bits(scores)
    keys = keys if alive is None else jnp.where(alive, keys, highest_key)
    stored = keys if axes == last else lax.optimization_barrier(rows_last(keys))
    # Zeros made of the keys are sharded as the counts will be.
    zeros = jnp.expand_dims(jnp.sum(stored & 0, axis=last, dtype=jnp.int32), last)
    num_alive = zeros + size
    if alive is not None:
        num_alive = jnp.expand_dims(jnp.sum(rows_last(alive), axis=last, dtype=jnp.int32), last)
    num_removed = (rows_last(count) if count.ndim else count) - (size - num_alive if includes_pruned else 0)
    num_removed = jnp.maximum(jnp.minimum(num_removed, num_alive - floor), 0)

    def search(start: Range, flags: Callable[[jax.Array], list[jax.Array]], num: Any, highest: Any, of: Any):
        def count_below(bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
            below = sums([flag.astype(jnp.int32) for flag in flags(bounds)], last)
            return jnp.expand_dims(jnp.stack(below), behind_bounds), of

        return bisect(start, count_below, lambda counts, alive: counts, lambda alive: num, highest, _BITS)

    def below_bounds(bounds: jax.Array) -> list[jax.Array]:
        return [stored < bounds[i] for i in range(len(bounds))]

    start = full_range(lowest_key, highest_key, zeros, False)
    found = search(start, below_bounds, num_removed, highest_key, num_alive)

    # As in `exact.py`, the first ties go. Which those are is searched only in rows where some of the ties go
    # and some stay. The barrier leaves it in the loop, which mostly ends before its first pass.
    num_ties, num_from_ties = found.upto - found.below, num_removed - found.below
    undecided = (num_from_ties > 0) & (num_from_ties < num_ties)

    def ties_before_bounds(bounds: jax.Array) -> list[jax.Array]:
        keys, living = lax.optimization_barrier((bounds, (stored, alive)))[1]
        ties = keys == found.low if living is None else rows_last(living) & (keys == found.low)
        place = _places(keys.shape, last)
        return [ties & (place < bounds[i]) for i in range(len(bounds))]

    behind = jnp.int32(size)
    start = full_range(jnp.int32(0), behind, zeros, False)._replace(open=undecided)
    cutoff = search(start, ties_before_bounds, num_from_ties, behind, num_ties)
    first = jnp.where(undecided, cutoff.low, jnp.where(num_from_ties > 0, behind, 0))
    low, first = (jnp.moveaxis(by_row, last, axes) for by_row in (found.low, first))
    removed = (keys < low) | ((keys == low) & (_places(scores.shape, axes) < first))
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
    num_rows = math.prod(values.shape[axis] for axis in range(values.ndim) if axis not in axes)

    def rows(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, axes, last).reshape(num_rows, size)

    keys = ordered_bits_on_host(np.ascontiguousarray(rows(values)))
    living = np.ones(keys.shape, bool) if alive is None else rows(np.asarray(alive))
    by_row = [1 if axis in axes else length for axis, length in enumerate(values.shape)]
    asked = np.moveaxis(np.broadcast_to(to_numpy(count), by_row), axes, last).reshape(num_rows, 1)
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
