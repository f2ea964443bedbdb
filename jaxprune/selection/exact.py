"""Exact selection: the lowest of many scores, without sorting, copying or concatenating them.

Everything here ranks by the pair (score, position): equal scores are ordered by leaf, then by
row-major index within the leaf, and the earlier goes first. So the number removed is always the
number asked for, and removing k, then more, removes a superset.

A score is mapped to an integer with the same order, its key. What is looked for is a threshold:
the largest key with no more than k keys below it. Each pass over the scores counts the keys below
15 bounds, which cut the range that is left into 16 parts, so 4 bits are found in a pass: a float32
takes at most 8 passes, half precision 4. Passes are comparisons and sums, and nothing else: they
read each leaf where it lies, fuse with what the scores are computed from, vectorise, and shard,
where only the counts move between devices. On a CPU a pass takes little more than reading the
scores (`python -m experiments.benchmarks.selection`), far less than one scatter into a histogram.
"""

import math
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
    count_whole,
    dtype_of,
    entries_at,
    positions,
    read_anew,
    read_keys,
    whole_shape,
    zero_of,
)
from jaxprune.selection.search import MAX_COUNT, Keys, Range, narrow, whole
from jaxprune.selection.sort_keys import limits
from jaxprune.tracing.control import update_if
from jaxprune.tree.checks import check_array, check_number, shown
from jaxprune.tree.leaves import describe, is_concrete

_BITS, _TIE_BITS = 4, 2
"""How many bits a pass finds of a threshold, and of a place among ties. Code grows with them."""

_HOST_ENTRIES = 2**20
"""Up to so many entries, sorting them on the host takes less time than compiling a search."""


class Removal(NamedTuple):
    """What to select.

    Attributes:
      groups: by leaf, the number of its group, in rising order. A group is ranked together.
      counts: by group, how many go; integers or `BigCount`, as the floors.
      floors: by leaf, how many of the entries alive stay at least.
      of_all: whether the counts include what is not alive, which has gone already; a bool.
    """

    groups: tuple[int, ...]
    counts: tuple[Any, ...]
    floors: Any
    includes_pruned: Any = False


def removed_count(sparsity: float, size: int) -> int:
    """How many of `size` units a sparsity removes: `round_half_even(sparsity * size)`.

    The product is taken in double precision, as `torch.nn.utils.prune` and Python's `round` do.

    Raises:
      ValueError: a sparsity or a size that is not finite.
      TypeError: one that is no number.

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
    """The `count` lowest scores among those alive, over all arrays together.

    Args:
      scores: arrays of any shapes, of one common dtype.
      alive: bool arrays of the same shapes: which entries may be chosen; None for all.
      count: how many, an integer (it may be traced). Where fewer are alive, all are chosen.
      specs: inside `jax.shard_map`, how each whole array is sharded, as in its `in_specs`; the lowest
        are then those of the whole arrays, in their order. Without it each device ranks its own part.

    Returns:
      bool arrays of the same shapes with exactly `count` entries True. Of equal scores the
      earlier array, then the lower row-major index, is chosen first.

    Raises:
      ValueError: no scores, more or fewer arrays of `alive` than of them, or a negative count.
      TypeError: what is no list of arrays, or a count that is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.selection import lowest
      >>> [mask.tolist() for mask in lowest([jnp.array([3, 1]), jnp.array([2, 1])], [None, None], 2)]
      [[False, True], [False, True]]
    """
    _check_lists(scores, alive)
    _check_count(count)
    same = (0,) * len(scores)
    request = Removal(same, (count,), same)
    if specs is None:
        return select_arrays(scores, alive, request)
    arrays = zip(scores, alive, specs, strict=True)
    return select(
        [LazyScores(lambda pair: pair, (s, a), _names(spec, s.ndim)) for s, a, spec in arrays], request
    )


def _check_count(count: Any) -> None:
    if isinstance(count, int):
        if not 0 <= count < 2**63:
            raise ValueError(f"count must be 0 or more, got {shown(count)}.")
        return
    check_array(count, "count")
    if count.shape or not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"count must be one integer, got {describe(count)}.")


def _check_lists(scores: Any, alive: Any) -> None:
    for name, arrays in (("scores", scores), ("alive", alive)):
        if not isinstance(arrays, Sequence):
            raise TypeError(f"lowest needs {name} as a list of arrays, got {shown(arrays)}.")
        for array in arrays:
            if array is not None or name == "scores":
                check_array(array, f"each of {name}")
    if not scores or len(scores) != len(alive):
        raise ValueError(f"lowest got {len(scores)} arrays of scores and {len(alive)} of what is alive.")


def _names(spec: PartitionSpec, axes: int) -> tuple[tuple[str, ...], ...]:
    """By axis, the mesh axes that a spec shards it over."""
    each = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    return (*each, *[()] * (axes - len(each)))


def select_arrays(
    scores: Sequence[jax.Array], alive: Sequence[jax.Array | None], request: Removal
) -> list[jax.Array]:
    """`select` from arrays, as one compiled program; of few that have values, on the host."""
    if _is_for_host([*scores, *(mask for mask in alive if mask is not None)], request):
        return _select_on_host(scores, alive, request)
    arrays = list(zip(scores, alive, strict=True))
    big = _is_big(array.shape for array in scores)
    counts, floors = tuple(_as_count(count, big) for count in request.counts), _as_count(request.floors, big)
    return _selected(arrays, counts, floors, request.includes_pruned, request.groups)


@partial(jax.jit, static_argnums=4)
def _selected(
    arrays: Any, counts: Any, floors: Count, includes_pruned: Any, groups: tuple[int, ...]
) -> list[jax.Array]:
    sources = [LazyScores(lambda pair: pair, pair) for pair in arrays]
    return select(sources, Removal(groups, counts, floors, includes_pruned))


def _is_for_host(arrays: Sequence[Any], request: Removal) -> bool:
    if not is_concrete(arrays, request.counts, request.floors, request.includes_pruned):
        return False
    places = [[device.platform for device in a.devices()] for a in arrays if isinstance(a, jax.Array)]
    return all(place == ["cpu"] for place in places) and sum(a.size for a in arrays) <= _HOST_ENTRIES


def _select_on_host(scores: Sequence[Any], alive: Sequence[Any], request: Removal) -> list[jax.Array]:
    """`select`, by sorting."""
    values = [np.asarray(array).ravel() for array in scores]
    living = [
        np.ones(v.size, bool) if a is None else np.asarray(a).ravel()
        for v, a in zip(values, alive, strict=True)
    ]
    may = [
        max(int(a.sum()) - int(floor), 0) for a, floor in zip(living, to_numpy(request.floors), strict=True)
    ]
    gone = [np.zeros(v.size, bool) for v in values]
    for group, count in enumerate(request.counts):
        members = [i for i, number in enumerate(request.groups) if number == group]
        # Numbers of up to 16 bits are sorted as wider ones, and a NaN of either sign comes last.
        joined = np.concatenate(
            [values[i] if values[i].dtype.itemsize >= 4 else values[i].astype(np.float32) for i in members]
        )
        leaf = np.repeat(members, [values[i].size for i in members])
        left = np.concatenate([living[i] for i in members])
        order = np.flatnonzero(left)[np.argsort(joined[left], kind="stable")]
        for i in members:  # the highest of each leaf stay
            order = np.delete(order, np.flatnonzero(leaf[order] == i)[may[i] :])
        number = int(to_numpy(count)) - (int((~left).sum()) if request.includes_pruned else 0)
        chosen = np.zeros(joined.size, bool)
        chosen[order[: max(number, 0)]] = True
        for i in members:
            gone[i] = chosen[leaf == i]
    return [jnp.asarray(mask.reshape(array.shape)) for mask, array in zip(gone, scores, strict=True)]


def _is_big(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether leaves have more entries together than an int32 counts."""
    return sum(map(math.prod, shapes)) > MAX_COUNT


def _as_count(value: Any, big: bool) -> Count:
    if big:
        return big_counts.wide(value)
    value = value if isinstance(value, (jax.Array, BigCount)) else np.minimum(value, MAX_COUNT)
    return big_counts.narrow(value)


def select(sources: Sequence[LazyScores], request: Removal) -> list[jax.Array]:
    """The lowest of each group of leaves.

    Args:
      sources: the scores by leaf, all of one dtype.
      request: what to select.

    Returns:
      For each leaf a bool array, True where an entry is alive and goes. Of each group exactly its
      count go, or as many as its floors let go.

    Raises:
      ValueError: a leaf with an axis of more than 2**31 - 1 entries.
    """
    number, shapes = len(sources), list(map(whole_shape, sources))
    if long := [shape for shape in shapes if any(size > MAX_COUNT for size in shape)]:
        raise ValueError(f"cannot rank a leaf of shape {long[0]}: an axis has more than {MAX_COUNT} entries.")
    big = _is_big(shapes)
    groups = _Groups(request.groups)
    targets = groups.spread([_as_count(count, big) for count in request.counts])
    sizes = _as_count(np.array([math.prod(shape) for shape in shapes]), big)
    floors = _as_count(request.floors, big)
    least, most = limits(dtype_of(sources[0]))
    start = whole(least, most, jnp.broadcast_to(zero_of(sources), (number,)), big)
    nothing = big_counts.none(start.below)

    def count(bounds: jax.Array) -> tuple[Count, Count]:
        now = read_anew(bounds, sources)
        return _stacked([count_whole(s, read_keys(s), bounds[:, i], big) for i, s in enumerate(now)])

    def may_go(alive: Count) -> Count:
        return big_counts.maximum(alive - floors, nothing)

    def goal(alive: Count) -> Count:
        gone = big_counts.where(request.includes_pruned, groups.total(sizes - alive), nothing)
        return big_counts.maximum(targets - gone, nothing)

    def shares(found: Range) -> Count:
        # By leaf, how many go: what is below the threshold; then at it, the first leaf first.
        cap = may_go(found.alive)
        below, upto = big_counts.minimum(found.below, cap), big_counts.minimum(found.upto, cap)
        left = goal(found.alive) - groups.total(below) - groups.before(upto - below)
        return below + big_counts.maximum(big_counts.minimum(left, upto - below), nothing)

    def search(round_: Any, now: tuple[Range, Count]) -> tuple[Range, Count]:
        # First for a threshold by group. Then a leaf that its floor keeps from giving all that is
        # below gets one of its own.
        before, share = now
        alone = round_ == 1

        def go(counts: Count, alive: Count) -> Count:
            return big_counts.where(alone, counts, groups.total(big_counts.minimum(counts, may_go(alive))))

        found = big_counts.where(alone, before.lowered(share, least), start)
        found = narrow(
            found, count, go, lambda alive: big_counts.where(alone, share, goal(alive)), most, _BITS
        )
        return found, big_counts.where(alone, share, shares(found))

    found, share = lax.fori_loop(0, 2, search, (start, nothing))
    ends = _ends(sources, found.low, share - found.below, found.upto - found.below)
    return [_below(*each) for each in zip(sources, found.low, *ends, strict=True)]


def _stacked(by_leaf: Sequence[Count]) -> tuple[Count, Count]:
    """Counts below bounds, of shape (bounds, leaves), and of what is alive, from those by leaf."""
    counts = big_counts.stack(by_leaf)
    return big_counts.take(counts, slice(-1)), big_counts.take(counts, -1)


class _Groups:
    """Sums over the leaves of each group, given back for each of its leaves. Leaves are the last axis."""

    def __init__(self, groups: tuple[int, ...]):
        self._groups, numbers = groups, np.array(groups)
        self._start = np.searchsorted(numbers, numbers, "left")
        self._end = np.searchsorted(numbers, numbers, "right")

    def spread(self, values: Sequence[Any]) -> Any:
        """By leaf, the value of its group."""
        return big_counts.stack([values[group] for group in self._groups])

    def total(self, counts: Count) -> Count:
        """By leaf, the sum over its group."""
        if len(set(self._groups)) == len(self._groups):
            return counts
        if len(set(self._groups)) == 1:
            zeros = jax.tree.map(jnp.zeros_like, counts)
            return big_counts.total(counts) + zeros
        sums = big_counts.running(counts)
        return big_counts.take(sums, (..., self._end)) - big_counts.take(sums, (..., self._start))

    def before(self, counts: Count) -> Count:
        """By leaf, the sum over the leaves of its group that come before it."""
        sums = big_counts.running(counts)
        return big_counts.take(sums, slice(-1)) - big_counts.take(sums, self._start)


def _below(source: LazyScores, key: jax.Array, row: jax.Array, place: jax.Array) -> jax.Array:
    """What is alive below a key, and of the entries at it those before a place in row-major order."""
    keys, alive = read_keys(source)
    rows, places = positions(source)
    first = (rows < row) | ((rows == row) & (places < place))
    gone = (keys < key) | ((keys == key) & first)
    return gone if alive is None else gone & alive


def _ends(sources: Sequence[LazyScores], keys: jax.Array, take: Count, tied: Count) -> tuple[Any, Any]:
    """By leaf, the place before which so many entries have the leaf's key: its row, and that in the row.

    Args:
      sources: the scores by leaf.
      keys: by leaf, a key.
      take: by leaf, how many entries.
      tied: by leaf, how many have the key.
    """
    # Mostly one entry is at a threshold, by itself, and goes or stays.
    none = big_counts.none(take)
    all_, some = ~(take < tied), none < take
    open_, zeros = some & ~all_, jnp.zeros_like(keys, jnp.int32)
    shapes, big = list(map(whole_shape, sources)), isinstance(take, BigCount)

    def search(wanted: jax.Array, take: Count, places: Callable[[int, jax.Array], Keys]) -> Range:
        def count(bounds: jax.Array) -> tuple[Count, Count]:
            now = read_anew(bounds, sources)

            def counted(i: int) -> Count:
                def below(_: Any) -> Count:
                    return count_whole(now[i], places(i, entries_at(now[i], keys[i])), bounds[:, i], big)

                nothing = jax.eval_shape(below, None)
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zeros[0], nothing)
                return update_if(wanted[i], below, nothing) if math.prod(shapes[i]) > 1 else nothing

            return _stacked([counted(i) for i in range(len(sources))])

        most = jnp.int32(min(MAX_COUNT, max(map(math.prod, shapes))))
        start = whole(jnp.int32(0), most, zeros, big)._replace(open=wanted)
        return narrow(start, count, lambda counts, alive: counts, lambda alive: take, most, _TIE_BITS)

    def of_rows(i: int, at: jax.Array) -> Keys:
        return Keys(jnp.where(at, positions(sources[i])[0], MAX_COUNT), at)

    def in_row(i: int, at: jax.Array) -> Keys:
        row, place = positions(sources[i])
        at &= row == rows[i]
        return Keys(jnp.where(at, place, MAX_COUNT), at)

    rows = jnp.where(some & all_, MAX_COUNT, zeros)
    long = np.array([math.prod(shape) > MAX_COUNT for shape in shapes])
    if long.any():
        found = search(open_ & long, take, of_rows)
        rows = jnp.where(open_ & long, found.low, rows)
        take = big_counts.where(open_ & long, take - found.below, take)
    return rows, jnp.where(open_, search(open_, take, in_row).low, 0)
