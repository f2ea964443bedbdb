"""Exact selection: order, ties, counts, against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxprune.selection import exact, lazy_scores, search, sort_keys
from tests.oracles import brute_force
from tests.support.profile import examples

SETTINGS = examples(40)

# Leaves of few and many entries, of one and of no entry; few shapes, so that jit's cache is hit.
SHAPES = [[(3, 4), (7,)], [(2, 3), (0, 2), (5,), (), (2,)], [(1,)]]
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


COMPILED = jax.jit(exact.lowest)


def chosen_by_jaxprune(scores, alive, count):
    """Choose by the compiled search, and check that sorting on the host chooses the same."""
    arrays = [jnp.asarray(s) for s in scores], [jnp.asarray(a) for a in alive]
    masks = [np.asarray(mask) for mask in COMPILED(*arrays, jnp.int32(count))]
    assert_same([np.asarray(mask) for mask in exact.lowest(*arrays, count)], masks)
    return masks


def assert_same(got, expected):
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == np.bool_
        np.testing.assert_array_equal(g, e)


def bit_patterns(dtype):
    """Return all values of an 8- or 16-bit type; of larger types corners, neighbours and random values."""
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
    """Check that keys sort as numpy sorts, and are equal exactly where the values are."""
    keys = np.asarray(sort_keys.ordered_bits(jnp.asarray(values)))
    compiled = np.asarray(jax.jit(sort_keys.ordered_bits)(jnp.asarray(values)))
    np.testing.assert_array_equal(keys, compiled)
    np.testing.assert_array_equal(keys, sort_keys.ordered_bits_on_host(values))
    assert keys.dtype == (np.int64 if values.dtype.itemsize == 8 else np.int32)
    wide = values if values.dtype.kind in "iu" or values.dtype.itemsize == 8 else values.astype(np.float32)
    order = np.argsort(wide, kind="stable")
    np.testing.assert_array_equal(np.argsort(keys, kind="stable"), order)
    before, after = wide[order][:-1], wide[order][1:]
    equal = (before == after) | ((before != before) & (after != after))
    np.testing.assert_array_equal(keys[order][:-1] == keys[order][1:], equal)
    least, most = sort_keys.limits(values.dtype)
    assert least.dtype == most.dtype == keys.dtype
    assert least <= keys.min() and keys.max() <= most


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
        sort_keys.ordered_bits(jnp.array([0.0, -0.0, 1e-45, -1e-45, jnp.inf, jnp.nan, -jnp.nan]))
    ).tolist()
    assert zero == minus_zero
    assert minus_tiny < zero < tiny  # subnormals are not flushed
    assert nan == minus_nan > inf


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float16", 16), ("bfloat16", 16), ("float32", 32), ("int8", 32), ("int16", 32), ("uint32", 32)],
)
def test_the_range_of_ordered_bits(dtype, bits):
    low, high = map(int, sort_keys.limits(jnp.dtype(dtype)))
    assert (low, high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    found = np.asarray(sort_keys.ordered_bits(jnp.asarray(bit_patterns(dtype))))
    assert low <= found.min() and found.max() <= high


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.complex64])
def test_ordered_bits_rejects(dtype):
    with pytest.raises(TypeError, match=f"floating-point or integer, got {jnp.dtype(dtype).name}"):
        sort_keys.ordered_bits(jnp.zeros(3, dtype))


@given(selections())
@SETTINGS
def test_lowest_is_the_oracle(problem):
    scores, alive, count = problem
    got = chosen_by_jaxprune(scores, alive, count)
    assert_same(got, brute_force.lowest(scores, alive, count))
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


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "int8", "int32", "uint8", "uint32", "float64", "int64"]
)
def test_lowest_of_every_dtype(dtype):
    """With ties; in wide types, numbers that lie closer together than narrower ones tell apart."""
    rng = np.random.default_rng(1)
    dtype = np.dtype(dtype)
    middle = {"int32": 2**30, "uint32": 2**30, "float64": 2**53 - 9, "int64": 2**53 - 9}.get(dtype.name)
    middle = (0 if dtype.kind == "u" else -9) if middle is None else middle
    wide = [middle + rng.integers(0, 18 if dtype.itemsize < 4 else 9, shape) for shape in [(5, 3), (8,)]]
    alive = [rng.random(leaf.shape) < 0.8 for leaf in wide]
    with jax.enable_x64(dtype.itemsize == 8):
        for count in range(sum(int(a.sum()) for a in alive) + 1):
            got = chosen_by_jaxprune([leaf.astype(dtype) for leaf in wide], alive, count)
            assert_same(got, brute_force.lowest(wide, alive, count))


def test_subnormals_and_signed_zeros_rank_exactly():
    scores = [np.array([3e-45, -0.0, 1e-45, 0.0, -1e-45, 1e-40], np.float32)]
    alive = [np.ones(6, bool)]
    for count in range(7):
        assert_same(chosen_by_jaxprune(scores, alive, count), brute_force.lowest(scores, alive, count))
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


def test_compiled_equals_operation_by_operation(batch):
    scores, alive, _ = batch
    args = [s[1] for s in scores], [a[1] for a in alive]
    for count in (0, 4):
        compiled = COMPILED(*args, jnp.int32(count))
        with jax.disable_jit():
            read = [lazy_scores.stored_scores(*pair) for pair in zip(*args, strict=True)]
            request = exact.Removal((0, 0), (count,), (0, 0))
            assert_same(exact.select(read, request), compiled)


def test_vmap_equals_a_loop(batch):
    scores, alive, counts = batch
    one = [exact.lowest([s[i] for s in scores], [a[i] for a in alive], counts[i]) for i in range(len(counts))]
    for i, mask in enumerate(jax.vmap(exact.lowest)(scores, alive, counts)):
        np.testing.assert_array_equal(mask, np.stack([masks[i] for masks in one]))
    over_counts = jax.vmap(exact.lowest, in_axes=(None, None, 0))(
        [s[0] for s in scores], [a[0] for a in alive], counts
    )
    for i, mask in enumerate(over_counts):
        loop = [exact.lowest([s[0] for s in scores], [a[0] for a in alive], c)[i] for c in counts]
        np.testing.assert_array_equal(mask, np.stack(loop))


def test_counts_are_exact_where_single_precision_is_not():
    size = 2**24 + 3  # not a float32
    masks = COMPILED([jnp.zeros(size)], [jnp.ones(size, bool)], jnp.int32(2**24 + 1))
    assert int(masks[0].sum()) == 2**24 + 1
    assert not masks[0][-2:].any()  # all tie, so the last two stay


@pytest.mark.parametrize("shapes", [[(2**30, 1), (2**30,)], [(2**16, 2**16), (3,)]])
def test_more_entries_than_an_int32_counts_trace(shapes):
    scores = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    masks = jax.eval_shape(lambda *s: exact.lowest(s, [None] * len(s), 2**31 + 5), *scores)
    assert [mask.shape for mask in masks] == shapes


def test_an_axis_that_cannot_be_indexed_raises():
    scores = [jax.ShapeDtypeStruct((size,), jnp.int8) for size in (2**31, 3, 2**31 + 1)]
    with pytest.raises(ValueError, match=r"shape \(2147483648,\): an axis has more than 2147483647"):
        jax.eval_shape(lambda *s: exact.lowest(s, [None] * 3, 3), *scores)
    longest = jax.ShapeDtypeStruct((2**31 - 1,), jnp.int8)
    assert jax.eval_shape(lambda s: exact.lowest([s], [None], 3), longest)[0].shape == longest.shape


ONE, SOME = [jnp.arange(4.0)], [jnp.ones(4, bool)]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((ONE[0], [None], 1), TypeError, "needs scores as a list of arrays, got Array"),
        ((ONE, SOME[0], 1), TypeError, "needs alive as a list of arrays, got Array"),
        ((ONE, None, 1), TypeError, "needs alive as a list of arrays, got None"),
        (([None], [None], 1), TypeError, "each of scores must be an array of numbers, got None"),
        ((ONE, ["x"], 1), TypeError, "each of alive must be an array of numbers, got 'x'"),
        ((ONE, [2.0], 1), TypeError, "each of alive must be an array of numbers, got 2.0"),
        (([], [], 1), ValueError, "got 0 arrays of scores and 0 of what is alive"),
        ((ONE, SOME * 2, 1), ValueError, "got 1 arrays of scores and 2 of what is alive"),
        ((ONE, SOME, -1), ValueError, "count must be an integer of 0 or more, got -1"),
        ((ONE, SOME, 2**63), ValueError, "count must be .* below .*, got 9223372036854775808"),
        ((ONE, SOME, 1.5), TypeError, "count must be an integer of 0 or more, got 1.5"),
        ((ONE, SOME, np.array([1])), TypeError, r"count must be an integer of 0 or more, got array"),
        ((ONE, SOME, np.float32(1)), TypeError, "count must be an integer of 0 or more, got .*1"),
    ],
    ids=range(13),
)
def test_lowest_raises(arguments, error, says):
    with pytest.raises(error, match=says):
        exact.lowest(*arguments)


@pytest.mark.parametrize("count", [0, 1, 2**63 - 1, np.int8(1), jnp.int32(1)])
def test_lowest_of_any_integer_but_those_it_raises_for(count):
    (gone,) = exact.lowest(ONE, SOME, count)
    assert int(gone.sum()) == min(int(count), 4)


@pytest.mark.parametrize(
    ("sparsity", "size", "error", "says"),
    [
        ("x", 3, TypeError, "sparsity must be a number that is finite, got 'x'"),
        (0.5, None, TypeError, "size must be a number that is finite, got None"),
        (np.nan, 3, ValueError, "sparsity must be finite, got nan"),
        (0.5, np.inf, ValueError, "size must be finite, got inf"),
    ],
)
def test_removed_count_raises(sparsity, size, error, says):
    with pytest.raises(error, match=says):
        exact.removed_count(sparsity, size)


def test_as_many_masks_specs_and_floors_as_leaves():
    two = [jnp.arange(3.0), jnp.arange(2.0)]
    for run in (exact.lowest, COMPILED):
        with pytest.raises(ValueError, match="lowest got 2 arrays of scores and 1 of what is alive"):
            run(two, [jnp.ones(3, bool)], 1)
    with pytest.raises(ValueError, match="shorter"):
        exact.lowest(two, [None, None], 1, [jax.sharding.PartitionSpec()])
    with pytest.raises(ValueError, match="shorter"):
        exact.select_arrays(two, [None, None], exact.Removal((0, 0), (1,), (0,)))


def test_specs_say_what_is_counted_over_which_devices():
    """Here only that all counts are summed; `test_sharding.py` checks the masks on eight devices."""
    auto, spec = (jax.sharding.AxisType.Auto,) * 2, jax.sharding.PartitionSpec
    mesh = jax.sharding.AbstractMesh((2, 4), ("x", "y"), axis_types=auto)
    specs = [spec("x", "y"), spec("y"), spec(("x", "y")), spec()]
    scores = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(4, 8), (4,), (8, 3), (2, 3)]]

    def choose(*scores):
        return exact.lowest(scores, [None] * 4, 5, specs)

    # Raises where a mask would not be the same on all devices that hold a part.
    masks = jax.eval_shape(jax.shard_map(choose, mesh=mesh, in_specs=tuple(specs), out_specs=specs), *scores)
    assert [mask.shape for mask in masks] == [leaf.shape for leaf in scores]


@pytest.fixture(scope="module")
def in_parts():
    """Compile `selection.lowest` as if an int32 counted no further than 4."""
    shapes = [(3, 4), (2, 2, 3), (4,)]  # no more rows either
    given = [jnp.zeros(s) for s in shapes], [jnp.ones(s, bool) for s in shapes], jnp.int32(3)
    with pytest.MonkeyPatch.context() as patch:
        for module in (search, lazy_scores, exact):
            patch.setattr(module, "MAX_COUNT", 4)
        # Compiled here, so that it is never traced again without the patch.
        return shapes, jax.jit(lambda *given: exact.select_arrays(*request_of(*given))).lower(
            *given
        ).compile()


def request_of(scores, alive, count):
    return scores, alive, exact.Removal((0, 0, 0), (count,), (0, 0, 0))


@given(data=st.data())
@SETTINGS
def test_leaves_counted_in_parts(in_parts, data):
    """As for leaves of more than 2**31 - 1 entries."""
    shapes, compiled = in_parts
    scores = [data.draw(hnp.arrays(np.float32, s, elements=VALUES["grid"])) for s in shapes]
    alive = [data.draw(hnp.arrays(bool, s)) for s in shapes]
    count = data.draw(st.integers(0, sum(int(a.sum()) for a in alive)))
    got = compiled(list(map(jnp.asarray, scores)), list(map(jnp.asarray, alive)), jnp.int32(count))
    assert_same([np.asarray(mask) for mask in got], brute_force.lowest(scores, alive, count))


@jax.jit
def in_groups(scores, alive, counts, floors, includes_pruned):
    return exact.select_arrays(scores, alive, exact.Removal((0, 1, 1, 1), counts, floors, includes_pruned))


@pytest.mark.parametrize("includes_pruned", [False, True])
@given(data=st.data())
@examples(40, share=2)
def test_groups_floors_and_counts_of_all(includes_pruned, data):
    """Each competing set gives its lowest entries, except the highest of each leaf, which its floor keeps."""
    shapes, members, floors = [(2, 3), (5,), (), (4,)], [[0], [1, 2, 3]], (3, 0, 1, 1)
    scores = [data.draw(hnp.arrays(np.float32, s, elements=VALUES["grid"])) for s in shapes]
    alive = [data.draw(hnp.arrays(bool, s)) for s in shapes]
    counts = [data.draw(st.integers(0, sum(scores[i].size for i in leaves))) for leaves in members]
    arrays = [jnp.asarray(s) for s in scores], [jnp.asarray(a) for a in alive]
    request = exact.Removal((0, 1, 1, 1), tuple(counts), floors, includes_pruned)
    on_host = exact.select_arrays(*arrays, request)
    got = in_groups(*arrays, tuple(map(jnp.int32, counts)), jnp.array(floors), includes_pruned)
    assert_same([np.asarray(mask) for mask in on_host], [np.asarray(mask) for mask in got])

    may = without_floors(scores, alive, floors)
    expected = []
    for leaves, count in zip(members, counts, strict=True):
        gone = sum(int((~alive[i]).sum()) for i in leaves) if includes_pruned else 0
        expected += brute_force.lowest(
            [scores[i] for i in leaves], [may[i] for i in leaves], max(count - gone, 0)
        )
    assert_same([np.asarray(mask) for mask in got], expected)


def without_floors(scores, alive, floors):
    """Mark the entries that each leaf can lose, all but its highest, as many as its floor."""
    counts = [max(int(a.sum()) - floor, 0) for a, floor in zip(alive, floors, strict=True)]
    return [brute_force.lowest([s], [a], n)[0] for s, a, n in zip(scores, alive, counts, strict=True)]


def test_scores_are_read_and_not_stored():
    """Scores that are computed in every pass take no memory; sorting them would."""
    shapes = [(256, 512), (128, 512), (1000,)]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def masks(*params):
        read = [lazy_scores.LazyScores(lambda p: (jnp.abs(p), None), p, jax.typeof(p)) for p in params]
        return exact.select(read, exact.Removal((0, 0, 0), (150_000,), (1, 1, 1)))

    compiled = jax.jit(masks, compiler_options={"xla_backend_optimization_level": 2}).lower(*params).compile()
    size = sum(4 * p.size for p in params)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * size
    assert " sort(" not in compiled.as_text()


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**31 - 1))
@SETTINGS
def test_removed_count_rounds_half_to_even_in_double_precision(sparsity, size):
    got = exact.removed_count(sparsity, size)
    assert isinstance(got, int)
    assert got == brute_force.half_even(sparsity, size)


@pytest.mark.parametrize(
    ("sparsity", "size", "count"),
    [(0.5, 1, 0), (0.5, 3, 2), (0.5, 5, 2), (0.3, 5, 2), (0.1, 25, 2), (0.7, 10, 7), (0.9, 266_200, 239_580)],
)
def test_removed_count(sparsity, size, count):
    assert exact.removed_count(sparsity, size) == count
