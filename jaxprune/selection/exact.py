"""Select exactly the lowest of many scores, without sorting, copying or concatenating them.

Entries are ordered by (score, leaf, row-major index): equal scores by the earlier leaf, then by the lower
index in the leaf. No two entries are equal in this order, so the number removed is always the number asked
for, and removing k, then more, removes a superset.

How it works. A score is mapped to an integer of the same order, its key. The threshold is the largest key
with at most k keys below it. All entries below the threshold are removed, and as many of the ties at it, the
first ones, as make k. The threshold is found by counting. Each pass over the scores counts the keys below 15
bounds, which cut the remaining range of keys into 16 parts, and goes on with the part that the threshold is
in. A pass finds 4 bits, so a float32 takes at most 8 passes, half precision 4. Which ties are removed is
found in the same way, by counting ties before bounds on their position, in the few leaves where some of them
are removed and some stay.

Passes are comparisons and sums, and nothing else. They read each leaf where it lies, fuse with the
computation of the scores, vectorise, and shard: only the counts move between devices. On a CPU a pass takes
little more than reading the scores (`python -m experiments.benchmarks.selection`), far less than one scatter
into a histogram.

Each leaf has its own part of a pass. To keep compiling short, the parts of leaves of one shape and dtype are
equal (`tracing/equal_kernels.py`). Arrays that numpy can read are selected from by numpy, which compiles
nothing.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxprune.selection import big_counts
from jaxprune.selection.big_counts import BigCount, Count, to_numpy
from jaxprune.selection.lazy_scores import (
    LazyScores,
    count_on_all_devices,
    entries_at,
    positions,
    read_anew,
    read_keys,
    stored_scores,
    zero_of,
)
from jaxprune.selection.search import MAX_COUNT, Keys, Range, bisect, full_range
from jaxprune.selection.sort_keys import limits, ordered_bits_on_host
from jaxprune.tracing.control import update_if
from jaxprune.tracing.equal_kernels import pick
from jaxprune.tree.checks import as_integer, check_array, check_number, is_traced_integer, shown
from jaxprune.tree.host import MAX_ENTRIES, all_like_computed, on_host
from jaxprune.tree.leaves import is_concrete

_BITS, _TIE_BITS = 4, 2
"""How many bits a pass finds of a threshold, and of a position among ties.

With b bits there are 32 / b passes over float32 scores, each with 2**b - 1 comparisons per score. At 4 bits a
pass still takes little more than reading the scores; each further bit would double the comparisons, and save
two passes at most. Ties are searched in few leaves, so that fewer bits will do: a program has a sum for each
bound of each leaf.
"""


class Removal(NamedTuple):
    """What to remove.

    Attributes:
      competing: by leaf, the number of the competing set that it is in: 0, 1, ..., never falling.
      counts: by competing set, how many entries to remove; integers or `BigCount`, as the floors.
      floors: by leaf, how many of the entries alive stay at least.
      includes_pruned: a bool, whether the counts include entries that are not alive, as removed already.
    """

    competing: tuple[int, ...]
    counts: tuple[Any, ...]
    floors: Any
    includes_pruned: Any = False


def removed_count(sparsity: float, size: int) -> int:
    """Return how many of `size` units a sparsity removes: `round_half_even(sparsity * size)`.

    The product is taken in double precision, as `torch.nn.utils.prune` and Python's `round` do.

    Raises:
      ValueError: `sparsity` or `size` is not finite.
      TypeError: `sparsity` or `size` is not a number.

    Example:
      >>> from jaxprune.selection import removed_count
      >>> removed_count(0.5, 5), removed_count(0.1, 45), removed_count(0.9, 266_200)
      (2, 4, 239580)
    """
    for name, value in (("sparsity", sparsity), ("size", size)):
        check_number(value, name, "that is finite")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}.")
    return round(float(sparsity) * size)


def lowest(
    scores: Sequence[jax.Array],
    alive: Sequence[jax.Array | None],
    count: Any,
    specs: Sequence[PartitionSpec] | None = None,
) -> list[jax.Array]:
    """Choose the `count` lowest scores among those alive, over all arrays together.

    Args:
      scores: arrays of any shapes, of one common dtype.
      alive: for each array a bool array of its shape that says which entries may be chosen, or None for all.
      count: how many to choose, an integer (it may be traced). If fewer are alive, all are chosen.
      specs: inside `jax.shard_map`, how each array is sharded, as in its `in_specs`. The lowest are then
        those of the arrays on all devices together, in their order. Without it each device ranks its part.

    Returns:
      bool arrays of the same shapes with exactly `count` entries True. Of equal scores the
      earlier array, then the lower row-major index, is chosen first.

    Raises:
      ValueError: `scores` is empty, `alive` has another length than `scores`, or `count` is negative.
      TypeError: `scores` or `alive` is not a list of arrays, or `count` is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.selection import lowest
      >>> [mask.tolist() for mask in lowest([jnp.array([3, 1]), jnp.array([2, 1])], [None, None], 2)]
      [[False, True], [False, True]]
    """
    _check_lists(scores, alive)
    if not is_traced_integer(count):
        as_integer(count, "count", at_least=0)
    one_set = (0,) * len(scores)
    removal = Removal(one_set, (count,), floors=one_set)
    if specs is None:
        return select_arrays(scores, alive, removal)
    arrays = zip(scores, alive, specs, strict=True)
    return select([stored_scores(s, a, _mesh_axes(spec, s.ndim)) for s, a, spec in arrays], removal)


def _check_lists(scores: Any, alive: Any) -> None:
    for name, arrays in (("scores", scores), ("alive", alive)):
        if not isinstance(arrays, Sequence):
            raise TypeError(f"lowest needs {name} as a list of arrays, got {shown(arrays)}.")
        for array in arrays:
            if array is not None or name == "scores":
                check_array(array, f"each of {name}")
    if not scores or len(scores) != len(alive):
        raise ValueError(f"lowest got {len(scores)} arrays of scores and {len(alive)} of what is alive.")


def _mesh_axes(spec: PartitionSpec, ndim: int) -> tuple[tuple[str, ...], ...]:
    """Return for each axis of an array the mesh axes that a spec shards it over."""
    named = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    return (*named, *[()] * (ndim - len(named)))


def select_arrays(
    scores: Sequence[jax.Array], alive: Sequence[jax.Array | None], removal: Removal
) -> list[jax.Array]:
    """Apply `select` to arrays: as one compiled program, or on the host if they are small and not traced."""
    numbers = removal.counts, removal.floors, removal.includes_pruned
    if is_concrete(numbers) and on_host(scores, alive) and sum(map(np.size, scores)) <= MAX_ENTRIES:
        return _select_on_host(scores, alive, removal)
    arrays = list(zip(scores, alive, strict=True))
    is_big = _is_big(array.shape for array in scores)
    counts = tuple(_as_count(count, is_big) for count in removal.counts)
    floors = _as_count(removal.floors, is_big)
    return _select_compiled(arrays, counts, floors, removal.includes_pruned, removal.competing)


@partial(jax.jit, static_argnums=4)
def _select_compiled(
    arrays: Any, counts: Any, floors: Count, includes_pruned: Any, competing: tuple[int, ...]
) -> list[jax.Array]:
    sources = [stored_scores(*pair) for pair in arrays]
    return select(sources, Removal(competing, counts, floors, includes_pruned))


def _select_on_host(scores: Sequence[Any], alive: Sequence[Any], removal: Removal) -> list[jax.Array]:
    """Apply `select` by numpy, with the same result."""
    values = [np.asarray(array).ravel() for array in scores]
    living = [
        np.ones(leaf.size, bool) if mask is None else np.asarray(mask).ravel()
        for leaf, mask in zip(values, alive, strict=True)
    ]
    floors, num_alive = to_numpy(removal.floors), list(map(np.count_nonzero, living))
    max_removable = [max(number - int(floor), 0) for number, floor in zip(num_alive, floors, strict=True)]
    removed: list[np.ndarray] = []
    for number, count in enumerate(removal.counts):
        members = [i for i, competing in enumerate(removal.competing) if competing == number]
        ends = np.cumsum([values[i].size for i in members])[:-1]
        # Laid end to end, entries are in the order in which those with equal keys are removed.
        keys = ordered_bits_on_host(np.concatenate([values[i] for i in members]))
        candidates = np.concatenate([living[i] for i in members])
        num_removed = int(to_numpy(count))
        if removal.includes_pruned:
            num_removed -= keys.size - np.count_nonzero(candidates)
        chosen = np.split(_lowest(keys, candidates, num_removed), ends)
        most = [max_removable[i] for i in members]
        if any(map(operator.gt, map(np.count_nonzero, chosen), most)):
            # The highest of each leaf stay, as many as its floor, and other leaves give more in their place.
            removable = map(_lowest, np.split(keys, ends), np.split(candidates, ends), most)
            chosen = np.split(_lowest(keys, np.concatenate(list(removable)), num_removed), ends)
        removed += chosen
    shaped = [mask.reshape(array.shape) for mask, array in zip(removed, scores, strict=True)]
    return all_like_computed(shaped, scores)


def _lowest(keys: np.ndarray, candidates: np.ndarray, count: Any) -> np.ndarray:
    """Mark the `count` lowest of some candidates, or all if they are fewer; of equal keys the first."""
    if count <= 0:
        return np.zeros(keys.size, bool)
    picked = keys[candidates]
    if count >= picked.size:
        return candidates
    threshold = np.partition(picked, count - 1)[count - 1]
    below = candidates & (keys < threshold)
    ties = np.flatnonzero(candidates & (keys == threshold))
    below[ties[: count - np.count_nonzero(below)]] = True
    return below


def _is_big(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Return whether leaves have more entries together than an int32 counts."""
    return sum(map(math.prod, shapes)) > MAX_COUNT


def _as_count(value: Any, is_big: bool) -> Count:
    if is_big:
        return big_counts.big(value)
    value = value if isinstance(value, (jax.Array, BigCount)) else np.minimum(value, MAX_COUNT)
    return big_counts.as_int32(value)


def select(sources: Sequence[LazyScores], removal: Removal) -> list[jax.Array]:
    """Select the lowest entries of each competing set of leaves.

    Args:
      sources: the scores by leaf, all of one dtype.
      removal: how many entries to remove, and how many stay at least.

    Returns:
      For each leaf a bool array, True for the entries alive that are removed. In each competing set exactly
      its count is removed, or as many as its floors allow.

    Raises:
      ValueError: a leaf with an axis of more than 2**31 - 1 entries.
    """
    shapes = [source.shape for source in sources]
    if long := [shape for shape in shapes if max(shape, default=0) > MAX_COUNT]:
        raise ValueError(f"cannot rank a leaf of shape {long[0]}: an axis has more than {MAX_COUNT} entries.")
    found, num_from_leaf = _thresholds(sources, removal, shapes)
    num_ties = found.upto - found.below
    cutoffs = _tie_cutoffs(sources, shapes, found.low, num_from_leaf - found.below, num_ties)
    of_leaves = (found.low, *cutoffs)
    return [_removed(source, *pick(of_leaves, i)) for i, source in enumerate(sources)]


def _thresholds(
    sources: Sequence[LazyScores], removal: Removal, shapes: Sequence[tuple[int, ...]]
) -> tuple[Range, Count]:
    """Find for each leaf the key below which its entries are removed, and how many entries it gives.

    Returns:
      Ranges whose `low` are the thresholds, with the counts below and up to them; and how many entries
      are removed from each leaf: those below its threshold, and for the rest ties at it.
    """
    # With A entries alive and the floor f, a leaf can lose m = max(A - f, 0) entries: its m lowest, because
    # its f highest stay. A competing set loses the lowest of all that its leaves can lose. Let n_i(t) be the
    # number of keys below t in leaf i. With t as the threshold, the set loses below it
    #
    #     G(t) = sum over its leaves of min(n_i(t), m_i)
    #
    # entries, which never falls as t rises. Round 1 finds, for each set, the largest t with G(t) <= target.
    # Leaf i then gives min(n_i(t), m_i) entries. The target - G(t) entries still missing are ties at t.
    #
    # If n_i(t) <= m_i, leaf i loses all its keys below t, and t is its threshold. If n_i(t) > m_i, its floor
    # keeps some of them: it loses exactly its m_i lowest, so that its threshold is the largest key with at
    # most m_i of its keys below it, which is lower than t. Round 2 finds that, for each such leaf by itself,
    # among the keys below t. Round 1 has settled how many entries each leaf gives, so nothing changes for the
    # other leaves.
    sets, is_big = _CompetingSets(removal.competing), _is_big(shapes)
    asked = sets.by_leaf([_as_count(count, is_big) for count in removal.counts])
    sizes = _as_count(np.array(list(map(math.prod, shapes))), is_big)
    floors = _as_count(removal.floors, is_big)
    lowest_key, highest_key = limits(sources[0].part.dtype)
    start = full_range(lowest_key, highest_key, jnp.broadcast_to(zero_of(sources), (len(sources),)), is_big)
    nothing = big_counts.zeros_like(start.below)

    def count(bounds: jax.Array) -> tuple[Count, Count]:
        now = read_anew(bounds, sources)
        return _stacked(
            [count_on_all_devices(s, read_keys(s), pick(bounds, i), is_big) for i, s in enumerate(now)]
        )

    def removable(alive: Count) -> Count:
        return big_counts.maximum(alive - floors, nothing)

    def target(alive: Count) -> Count:
        pruned = big_counts.where(removal.includes_pruned, sets.total(sizes - alive), nothing)
        return big_counts.maximum(asked - pruned, nothing)

    def num_from_each_leaf(found: Range) -> Count:
        max_removable = removable(found.alive)
        below, upto = (big_counts.minimum(n, max_removable) for n in (found.below, found.upto))
        # What is missing after the entries below the threshold comes from the ties, the first leaf's first.
        missing = target(found.alive) - sets.total(below) - sets.before(upto - below)
        return below + big_counts.maximum(big_counts.minimum(missing, upto - below), nothing)

    def search(round_: Any, now: tuple[Range, Count]) -> tuple[Range, Count]:
        previous, num_from_leaf = now
        by_itself = round_ == 1

        def num_removed(counts: Count, alive: Count) -> Count:
            in_set = sets.total(big_counts.minimum(counts, removable(alive)))
            return big_counts.where(by_itself, counts, in_set)

        found = bisect(
            big_counts.where(by_itself, previous.reopened_below(num_from_leaf, lowest_key), start),
            count,
            num_removed,
            lambda alive: big_counts.where(by_itself, num_from_leaf, target(alive)),
            highest_key,
            _BITS,
        )
        return found, big_counts.where(by_itself, num_from_leaf, num_from_each_leaf(found))

    # A loop, so that the program has the search once. Round 2 takes no pass where no floor acts.
    return lax.fori_loop(0, 2, search, (start, nothing))


def _stacked(by_leaf: Sequence[Count]) -> tuple[Count, Count]:
    """Stack the counts of the leaves: those below bounds, of shape (bounds, leaves), and of what is alive."""
    counts = big_counts.stack(by_leaf)
    return big_counts.pick(counts, slice(-1)), big_counts.pick(counts, -1)


class _CompetingSets:
    """Sums over the leaves of each competing set, for counts that have the leaves along the last axis."""

    def __init__(self, competing: tuple[int, ...]):
        self._competing, numbers = competing, np.array(competing)
        # The leaves of a set lie side by side: from the first index to before the second.
        self._start = np.searchsorted(numbers, numbers, "left")
        self._end = np.searchsorted(numbers, numbers, "right")

    def by_leaf(self, values: Sequence[Any]) -> Any:
        """Return for each leaf the value of its set."""
        return big_counts.stack([values[number] for number in self._competing])

    def total(self, counts: Count) -> Count:
        """Return for each leaf the sum over its set."""
        if len(set(self._competing)) == len(self._competing):
            return counts
        if len(set(self._competing)) == 1:
            zeros = jax.tree.map(jnp.zeros_like, counts)
            return big_counts.total(counts) + zeros
        sums = big_counts.prefix_sums(counts)
        return big_counts.pick(sums, (..., self._end)) - big_counts.pick(sums, (..., self._start))

    def before(self, counts: Count) -> Count:
        """Return for each leaf the sum over the leaves of its set that come before it."""
        sums = big_counts.prefix_sums(counts)
        return big_counts.pick(sums, slice(-1)) - big_counts.pick(sums, self._start)


def _removed(source: LazyScores, key: jax.Array, row: jax.Array, place: jax.Array) -> jax.Array:
    """Mark the entries alive below a key, and the ties at it before a position in row-major order."""
    keys, alive = read_keys(source)
    rows, places = positions(source)
    first = places < place if rows is None else (rows < row) | ((rows == row) & (places < place))
    removed = (keys < key) | ((keys == key) & first)
    return removed if alive is None else removed & alive


def _tie_cutoffs(
    sources: Sequence[LazyScores],
    shapes: Sequence[tuple[int, ...]],
    keys: jax.Array,
    num_removed: Count,
    num_ties: Count,
) -> tuple[Any, Any]:
    """Find for each leaf the position before which its ties are removed: a row, and a place in the row.

    Args:
      sources: the scores by leaf.
      shapes: by leaf, its shape on all devices together.
      keys: by leaf, the key that the ties have: its threshold.
      num_removed: by leaf, how many ties are removed.
      num_ties: by leaf, how many ties there are.
    """
    # The cutoff is the largest position with at most num_removed ties before it: a threshold, found as those
    # of scores are, with positions as keys. A position holds at most one tie, so exactly num_removed ties are
    # before it.
    #
    # Mostly a threshold has one entry, which is removed or stays, and nothing is searched: the cutoff is the
    # first position if no tie is removed, and behind the last if all are. Only leaves where some ties are
    # removed and some stay are read again: at most one in each competing set, and those whose floor keeps
    # ties.
    none = big_counts.zeros_like(num_removed)
    removes_all, removes_some = ~(num_removed < num_ties), none < num_removed
    undecided, zeros = removes_some & ~removes_all, jnp.zeros_like(keys, jnp.int32)
    behind = jnp.where(removes_some & removes_all, MAX_COUNT, zeros)
    is_big = isinstance(num_removed, BigCount)
    groups = _groups_of_alike(sources)
    in_order = np.argsort(np.concatenate(groups))

    def search(
        wanted: jax.Array, target: Count, as_keys: Callable[[LazyScores, Any, jax.Array], Keys]
    ) -> Range:
        def count(bounds: jax.Array) -> tuple[Count, Count]:
            # Plus a zero that varies over the same devices of a `shard_map`, as both branches must.
            none_below = jnp.zeros(len(bounds) + 1, jnp.int32) + zeros[0]
            nothing = BigCount(none_below, none_below) if is_big else none_below

            def counted(group: list[int], of: Any, i: Any) -> Count:
                """Count in leaf `i`, which is number `of` in its group."""

                def find_ties(source: LazyScores, key: jax.Array, bounds: jax.Array) -> jax.Array:
                    return entries_at(read_anew((key, bounds), [source])[0], key)

                def below(_: Any) -> Count:
                    key, own_bounds = pick(keys, i), pick(bounds, i)
                    ties = lax.switch(of, [partial(find_ties, sources[j]) for j in group], key, own_bounds)
                    alike = sources[group[0]]
                    return count_on_all_devices(alike, as_keys(alike, i, ties), own_bounds, is_big)

                return update_if(pick(wanted, i), below, nothing)

            def counted_in_each(group: list[int]) -> Count:
                if math.prod(shapes[group[0]]) <= 1:
                    return big_counts.stack([nothing] * len(group))
                if len(group) == 1:
                    return big_counts.stack([counted(group, 0, group[0])])
                leaves = jnp.arange(len(group)), jnp.array(group)
                return jax.tree.map(jnp.transpose, lax.map(lambda leaf: counted(group, *leaf), leaves))

            parts = list(map(counted_in_each, groups))
            counts = jax.tree.map(lambda *part: jnp.concatenate(part, axis=-1)[:, in_order], *parts)
            return big_counts.pick(counts, slice(-1)), big_counts.pick(counts, -1)

        last = jnp.int32(min(MAX_COUNT, max(map(math.prod, shapes))))
        start = full_range(jnp.int32(0), last, zeros, is_big)._replace(open=wanted)
        return bisect(start, count, lambda counts, alive: counts, lambda alive: target, last, _TIE_BITS)

    def by_row(source: LazyScores, i: Any, ties: jax.Array) -> Keys:
        row, _ = positions(source)
        return Keys(jnp.where(ties, 0 if row is None else row, MAX_COUNT), ties)

    def by_place(source: LazyScores, i: Any, ties: jax.Array) -> Keys:
        row, place = positions(source)
        if row is not None:
            ties &= row == pick(rows, i)
        return Keys(jnp.where(ties, place, MAX_COUNT), ties)

    rows = behind
    # In a leaf of several rows the row comes first, then the place among the ties of that row.
    several_rows = np.array([math.prod(shape) > MAX_COUNT for shape in shapes])
    if several_rows.any():
        found = search(undecided & several_rows, num_removed, by_row)
        rows = jnp.where(undecided & several_rows, found.low, rows)
        num_removed = big_counts.where(undecided & several_rows, num_removed - found.below, num_removed)
    return rows, jnp.where(undecided, search(undecided, num_removed, by_place).low, behind)


def _groups_of_alike(sources: Sequence[LazyScores]) -> list[list[int]]:
    """Return the numbers of the leaves, in groups that share the program which counts ties.

    The leaves of a group have equal types. The program copies what is tied in a leaf, a byte for each entry,
    and with several devices it might move that: then each leaf is a group of its own.
    """
    groups: dict[Any, list[int]] = {}
    for i, source in enumerate(sources):
        types = tuple(jax.typeof(leaf) for leaf in jax.tree.leaves(source.inputs))
        alike = (source.part.shape, types) if jax.device_count() == 1 else i
        groups.setdefault(alike, []).append(i)
    return list(groups.values())
