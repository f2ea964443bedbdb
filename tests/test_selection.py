"""Exact selection: order, ties, counts, against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxprune import selection

SETTINGS = settings(
    deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

# Two or three leaves, one of them empty in the second tree; few shapes, so that jit's cache is hit.
SHAPES = [[(3, 4), (7,)], [(2, 3), (0, 2), (5,), ()], [(1,)]]
VALUES = {
    "grid": st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]),
    "all": st.floats(width=32),
}


@st.composite
def selections(draw):
    shapes = draw(st.sampled_from(SHAPES))
    values = VALUES[draw(st.sampled_from(sorted(VALUES)))]
    scores = [draw(hnp.arrays(np.float32, shape, elements=values)) for shape in shapes]
    alive = [
        draw(hnp.arrays(bool, shape)) if draw(st.booleans()) else np.ones(shape, bool) for shape in shapes
    ]
    return scores, alive, draw(st.integers(0, sum(int(a.sum()) for a in alive)))


def chosen_by_jaxprune(scores, alive, count):
    arrays = [jnp.asarray(s) for s in scores], [jnp.asarray(a) for a in alive]
    return [np.asarray(mask) for mask in selection.lowest(*arrays, count)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == np.bool_
        np.testing.assert_array_equal(g, e)


def bit_patterns(dtype):
    """Every value of an 8- or 16-bit type; of wider ones the corners, their neighbours and random ones."""
    dtype = np.dtype(dtype)
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    if dtype.itemsize <= 2:
        return np.arange(2 ** (8 * dtype.itemsize), dtype=unsigned).view(dtype)
    top = np.array(1, unsigned) << np.array(8 * dtype.itemsize - 1, unsigned)
    corners = [0, 1, 2, 0x7F800000, 0x00800000, 0x7FC00000]
    if dtype.itemsize == 8:
        corners += [0x7FF0000000000000, 0x0010000000000000, 0x7FF8000000000000]
    bits = np.array(corners, unsigned)
    bits = np.concatenate([bits, bits - np.array(1, unsigned), bits + np.array(1, unsigned)])
    wild = np.random.default_rng(0).integers(0, np.iinfo(unsigned).max, 5000, dtype=unsigned)
    return np.concatenate([bits, bits ^ top, wild, wild[:100]]).view(dtype)


def assert_ordered(values):
    """Keys sort as numpy sorts, and are equal just where the values are."""
    keys = np.asarray(selection.ordered_bits(jnp.asarray(values)))
    compiled = np.asarray(jax.jit(selection.ordered_bits)(jnp.asarray(values)))
    np.testing.assert_array_equal(keys, compiled)
    assert keys.dtype == (np.uint64 if values.dtype.itemsize == 8 else np.uint32)
    wide = values if values.dtype.kind in "iu" or values.dtype.itemsize == 8 else values.astype(np.float32)
    order = np.argsort(wide, kind="stable")
    np.testing.assert_array_equal(np.argsort(keys, kind="stable"), order)
    before, after = wide[order][:-1], wide[order][1:]
    equal = (before == after) | ((before != before) & (after != after))
    np.testing.assert_array_equal(keys[order][:-1] == keys[order][1:], equal)


@pytest.mark.parametrize(
    "dtype",
    [
        *("float16", "float32", "int8", "int16", "int32", "uint8", "uint16", "uint32"),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_ordered_bits_order_as_numpy(dtype):
    assert_ordered(bit_patterns(dtype))


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "float32", "int32"])
def test_ordered_bits_order_as_numpy_in_double_precision(dtype):
    with jax.enable_x64(True):
        assert_ordered(bit_patterns(dtype))


def test_ordered_bits_corners():
    zero, minus_zero, tiny, minus_tiny, inf, nan, minus_nan = np.asarray(
        selection.ordered_bits(jnp.array([0.0, -0.0, 1e-45, -1e-45, jnp.inf, jnp.nan, -jnp.nan]))
    ).tolist()
    assert zero == minus_zero
    assert minus_tiny < zero < tiny  # subnormals are not flushed
    assert nan == minus_nan > inf


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.complex64])
def test_ordered_bits_rejects(dtype):
    with pytest.raises(TypeError, match=f"floating-point or integer, got {jnp.dtype(dtype).name}"):
        selection.ordered_bits(jnp.zeros(3, dtype))


@given(selections())
@SETTINGS
def test_lowest_is_the_oracle(problem):
    scores, alive, count = problem
    got = chosen_by_jaxprune(scores, alive, count)
    assert_same(got, oracle.lowest(scores, alive, count))
    assert sum(mask.sum() for mask in got) == count


@given(selections())
@SETTINGS
def test_lowest_at_both_ends(problem):
    scores, alive, _ = problem
    assert_same(chosen_by_jaxprune(scores, alive, 0), [np.zeros(a.shape, bool) for a in alive])
    assert_same(chosen_by_jaxprune(scores, alive, sum(int(a.sum()) for a in alive)), alive)


@given(selections(), st.data())
@SETTINGS
def test_lowest_is_nested(problem, data):
    scores, alive, count = problem
    more = chosen_by_jaxprune(scores, alive, count)
    fewer = chosen_by_jaxprune(scores, alive, data.draw(st.integers(0, count)))
    for small, large in zip(fewer, more, strict=True):
        assert not (small & ~large).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int32", "uint8"])
def test_lowest_of_every_dtype(dtype):
    rng = np.random.default_rng(1)
    low = 0 if dtype == "uint8" else -9
    scores = [jnp.asarray(rng.integers(low, 9, shape), dtype) for shape in [(5, 3), (8,)]]
    alive = [np.asarray(rng.random(s.shape) < 0.8) for s in scores]
    wide = [np.asarray(s.astype(jnp.int32)) for s in scores]
    for count in range(sum(int(a.sum()) for a in alive) + 1):
        assert_same(chosen_by_jaxprune(scores, alive, count), oracle.lowest(wide, alive, count))


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_lowest_in_double_precision(dtype):
    rng = np.random.default_rng(2)
    # Apart by less than single precision sees, with ties.
    scores = [np.asarray(2**53 - rng.integers(0, 9, shape), dtype) for shape in [(5, 3), (8,)]]
    alive = [rng.random(s.shape) < 0.8 for s in scores]
    with jax.enable_x64(True):
        for count in range(0, sum(int(a.sum()) for a in alive) + 1, 3):
            assert_same(chosen_by_jaxprune(scores, alive, count), oracle.lowest(scores, alive, count))


def test_subnormals_and_signed_zeros_rank_exactly():
    scores = [np.array([3e-45, -0.0, 1e-45, 0.0, -1e-45, 1e-40], np.float32)]
    alive = [np.ones(6, bool)]
    for count in range(7):
        assert_same(chosen_by_jaxprune(scores, alive, count), oracle.lowest(scores, alive, count))
    assert np.flatnonzero(chosen_by_jaxprune(scores, alive, 3)[0]).tolist() == [1, 3, 4]


def test_nan_goes_last():
    scores = [np.array([np.nan, np.inf, -np.nan, -np.inf, 0], np.float32)]
    for count, expected in [(2, [3, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])]:
        assert np.flatnonzero(chosen_by_jaxprune(scores, [np.ones(5, bool)], count)[0]).tolist() == expected


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    scores = [jnp.asarray(rng.integers(-2, 3, (6, *shape)), jnp.float32) for shape in [(3, 4), (7,)]]
    alive = [jnp.asarray(rng.random(s.shape) < 0.7) for s in scores]
    return scores, alive, jnp.array([0, 1, 3, 5, 8, 9], jnp.int32)


def test_the_count_may_be_traced(batch):
    scores, alive, _ = batch
    traced = jax.jit(lambda count: selection.lowest([scores[0][0]], [alive[0][0]], count))
    for count in range(int(alive[0][0].sum()) + 1):
        assert_same(traced(count), selection.lowest([scores[0][0]], [alive[0][0]], count))


def test_compiled_equals_operation_by_operation(batch):
    scores, alive, _ = batch
    args = [s[1] for s in scores], [a[1] for a in alive]
    for count in (0, 1, 4, 9):
        compiled = selection.lowest(*args, count)
        with jax.disable_jit():
            assert_same(selection.lowest(*args, count), compiled)


def test_vmap_equals_a_loop(batch):
    scores, alive, counts = batch
    one = [
        selection.lowest([s[i] for s in scores], [a[i] for a in alive], counts[i]) for i in range(len(counts))
    ]
    for i, mask in enumerate(jax.vmap(selection.lowest)(scores, alive, counts)):
        np.testing.assert_array_equal(mask, np.stack([masks[i] for masks in one]))
    over_counts = jax.vmap(selection.lowest, in_axes=(None, None, 0))(
        [s[0] for s in scores], [a[0] for a in alive], counts
    )
    for i, mask in enumerate(over_counts):
        loop = [selection.lowest([s[0] for s in scores], [a[0] for a in alive], c)[i] for c in counts]
        np.testing.assert_array_equal(mask, np.stack(loop))


def test_counts_are_exact_where_single_precision_is_not():
    size = 2**24 + 3  # not a float32
    masks = selection.lowest([jnp.zeros(size)], [jnp.ones(size, bool)], 2**24 + 1)
    assert int(masks[0].sum()) == 2**24 + 1
    assert not masks[0][-2:].any()  # all tie, so the last two stay


@pytest.mark.parametrize("shapes", [[(2**31,)], [(2**30, 1), (2**30,)], [(2**16, 2**16)]])
def test_too_many_entries_raise(shapes):
    scores = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    alive = [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in shapes]
    with pytest.raises(ValueError, match=r"more than 2147483647 entries together; use scope='layerwise'"):
        jax.eval_shape(selection.lowest, scores, alive, 3)


def test_the_most_entries_do_not_raise():
    shape = (2**31 - 1,)
    scores, alive = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    (mask,) = jax.eval_shape(selection.lowest, [scores], [alive], 3)
    assert mask.shape == shape and mask.dtype == jnp.bool_


@given(selections(), st.sampled_from([0, 1, 3]))
@SETTINGS
def test_removable_spares_the_highest(problem, floor):
    scores, alive, _ = problem
    got = selection.removable(jnp.asarray(scores[0]), jnp.asarray(alive[0]), floor)
    count = max(int(alive[0].sum()) - floor, 0)
    assert_same([np.asarray(got)], oracle.lowest(scores[:1], alive[:1], count))


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**31 - 1))
@SETTINGS
def test_removed_count_rounds_half_to_even_in_double_precision(sparsity, size):
    got = selection.removed_count(sparsity, size)
    assert isinstance(got, int)
    assert got == oracle.half_even(sparsity, size)


@pytest.mark.parametrize(
    ("sparsity", "size", "count"),
    [(0.5, 1, 0), (0.5, 3, 2), (0.5, 5, 2), (0.3, 5, 2), (0.1, 25, 2), (0.7, 10, 7), (0.9, 266_200, 239_580)],
)
def test_removed_count(sparsity, size, count):
    assert selection.removed_count(sparsity, size) == count
