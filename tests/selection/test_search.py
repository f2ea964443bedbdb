"""Searches for thresholds against counts by numpy, and the number of passes they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.selection import big_counts, search
from jaxprune.selection.search import Keys, Range

LEAST, MOST = -(2**31), 2**31 - 1
LEAVES, ENTRIES = 3, 8
KEY = st.one_of(
    st.integers(-5, 5), st.sampled_from([LEAST, LEAST + 1, MOST - 1, MOST]), st.integers(LEAST, MOST)
)
FLAT = st.lists(
    st.tuples(KEY, st.booleans(), st.integers(0, ENTRIES)),
    min_size=LEAVES * ENTRIES,
    max_size=LEAVES * ENTRIES,
)
SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


@functools.cache
def bisected(bits, big):
    """`bisect` for leaves that are rows, with a target for each."""

    @jax.jit
    def run(keys, alive, targets):
        def count(bounds):
            assert bounds.shape == (2**bits - 1, LEAVES)
            leaves = [Keys(jnp.where(at, row, MOST), at) for row, at in zip(keys, alive, strict=True)]
            counts = [search.count_below(x, bounds[:, i], search.MAX_COUNT) for i, x in enumerate(leaves)]
            counts = big_counts.stack([big_counts.big(each) for each in counts] if big else counts)
            jax.debug.callback(lambda: passes.append(1))
            return big_counts.pick(counts, slice(-1)), big_counts.pick(counts, -1)

        start = search.full_range(jnp.int32(LEAST), jnp.int32(MOST), jnp.zeros(LEAVES, jnp.int32), big)
        targets = big_counts.big(targets) if big else targets
        return search.bisect(start, count, lambda below, _: below, lambda _: targets, jnp.int32(MOST), bits)

    return run


passes = []


@given(FLAT, st.sampled_from([1, 2, 4]), st.booleans())
@SETTINGS
def test_bisect_finds_the_threshold_of_each_leaf(flat, bits, big):
    keys, alive, targets = (np.array(part).reshape(LEAVES, ENTRIES) for part in zip(*flat, strict=True))
    known = [np.sort(row[at]) for row, at in zip(keys, alive, strict=True)]
    targets = np.minimum(targets[:, 0], alive.sum(1))
    passes.clear()
    found = bisected(bits, big)(jnp.array(keys, jnp.int32), alive, jnp.array(targets, jnp.int32))
    jax.effects_barrier()
    assert len(passes) <= 32 // bits
    low, high = np.asarray(found.low), np.asarray(found.high)
    below, upto, living = map(big_counts.to_numpy, (found.below, found.upto, found.alive))
    for i, (row, target) in enumerate(zip(known, targets, strict=True)):
        assert living[i] == len(row)
        assert below[i] == (row < low[i]).sum() <= target
        assert upto[i] == (row <= high[i]).sum()
        assert below[i] == target or low[i] == high[i] == row[min(target, len(row) - 1)]


@pytest.mark.parametrize("big", [False, True])
def test_a_search_begins_with_all_keys(big):
    start = search.full_range(jnp.int32(-(2**15)), jnp.int32(2**15 - 1), jnp.zeros(2, jnp.int32), big)
    assert (start.low.tolist(), start.high.tolist()) == ([-(2**15)] * 2, [2**15 - 1] * 2)
    assert start.open.all()
    for count in (start.below, start.upto, start.alive):
        assert isinstance(count, big_counts.BigCount) == big and not big_counts.to_numpy(count).any()


def test_bounds_cut_a_range_into_equal_parts():
    for low, high in [(0, 15), (-8, 7), (LEAST, MOST), (3, 3), (5, 9), (-1, 2**30)]:
        bounds = search._cut(jnp.array([low], jnp.int32), jnp.array([high], jnp.int32), 4)
        edges = [low, *np.asarray(bounds)[:, 0].tolist(), high + 1]
        parts = np.diff(edges)
        assert parts.sum() == high + 1 - low and (parts >= 0).all()
        assert parts.max() <= -(-(high + 1 - low) // 16) + 1


@pytest.mark.parametrize("big", [False, True])
def test_a_range_is_searched_again_where_a_leaf_gives_less_than_lies_below(big):
    as_count = big_counts.big if big else big_counts.as_int32
    low, high = jnp.array([7, 7, 7], jnp.int32), jnp.array([9, 9, 9], jnp.int32)
    counts = [as_count(np.array(values)) for values in ([5, 5, 5], [8, 8, 8], [20, 20, 20])]
    now = Range(low, high, *counts, jnp.zeros(3, bool)).reopened_below(
        as_count(np.array([4, 5, 6])), jnp.int32(-3)
    )
    got = [
        np.asarray(now.low),
        np.asarray(now.high),
        *map(big_counts.to_numpy, now[2:5]),
        np.asarray(now.open),
    ]
    # The first leaf gives 4 entries, but has 5 keys below 7: its threshold is one of those.
    expected = [[-3, 7, 7], [6, 9, 9], [0, 5, 5], [5, 8, 8], [20, 20, 20], [True, False, False]]
    np.testing.assert_array_equal(np.array(got, int), np.array(expected, int))


@pytest.mark.parametrize("most", [MOST, 8, 5])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (4, 3, 5)])
def test_true_entries_are_counted(shape, most, monkeypatch):
    monkeypatch.setattr(search, "MAX_COUNT", most)
    mask = np.random.default_rng(0).random(shape) < 0.6
    count = search.count_true(jnp.array(mask))
    assert isinstance(count, big_counts.BigCount) == (mask.size > most)
    assert big_counts.to_numpy(count) == mask.sum()
