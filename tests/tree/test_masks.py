import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp
from jaxprune.tree.masks import packed_like
from tests.support.profile import examples

PARAMS = {"kernel": jnp.array([[1.0, jnp.nan], [-jnp.inf, -2.0]]), "bias": jnp.array([0.5, -0.0])}
MASKS = {"kernel": jnp.array([[True, False], [False, True]]), "bias": jnp.array([True, False])}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_apply_masks_gives_positive_zero_whatever_was_there(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    with jax.numpy_dtype_promotion("strict"):
        pruned = jp.apply_masks(params, MASKS)
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype(dtype)}
    assert pruned["kernel"].real.tolist() == [[1.0, 0.0], [0.0, -2.0]]
    assert not np.signbit(np.asarray(pruned["bias"].real, np.float32)[1])


def test_apply_masks_lets_no_gradient_through_what_is_pruned():
    grads = jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(jp.apply_masks(p, MASKS))))(PARAMS)
    assert grads["kernel"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_ones_masks_mirror_any_leaf():
    params = PARAMS | {"steps": jnp.arange(3), "empty": jnp.zeros((0, 2)), "scalar": jnp.ones(())}
    for make in (jp.ones_masks, jax.jit(jp.ones_masks)):
        masks = make(params)
        jp.check_masks(masks, params)
        assert all(bool(leaf.all()) for leaf in jax.tree.leaves(masks))


bools = hnp.arrays(bool, (3, 4))


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32)), bools)
@examples(30)
def test_kept_entries_keep_their_bits_and_pruned_ones_are_zero(kernel, mask):
    params = {"w": jnp.asarray(kernel), "half": jnp.asarray(kernel[0]).astype(jnp.bfloat16)}
    masks = {"w": jnp.asarray(mask), "half": jnp.asarray(mask[0])}
    pruned = jp.apply_masks(params, masks)
    for path, leaf in params.items():
        got, bits = (np.asarray(x).view(f"u{leaf.dtype.itemsize}") for x in (pruned[path], leaf))
        np.testing.assert_array_equal(got, np.where(masks[path], bits, 0))
    jp.check_pruned(pruned, masks)


@given(bools, bools, bools)
@examples(15)
def test_intersect_is_the_logical_and(a, b, c):
    both = jp.intersect({"w": jnp.array(a)}, {"w": jnp.array(b)}, {"w": jnp.array(c)})["w"]
    np.testing.assert_array_equal(both, a & b & c)
    np.testing.assert_array_equal(jp.intersect({"w": jnp.array(a)})["w"], a)


def test_checks_name_the_leaf():
    with pytest.raises(ValueError, match=r"Missing: bias\. Not in params: scale"):
        jp.check_masks({"kernel": MASKS["kernel"], "scale": MASKS["bias"]}, PARAMS)
    with pytest.raises(ValueError, match=r"masks\['bias'\] has shape \(3,\).*shape \(2,\)"):
        jp.check_masks(MASKS | {"bias": jnp.ones(3, bool)}, PARAMS)
    with pytest.raises(TypeError, match=r"masks\['bias'\] is float32\[2\], but masks are bool"):
        jp.apply_masks(PARAMS, MASKS | {"bias": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"masks\['w'\] is float32\[3\].*but masks are bool"):
        jp.pack_masks({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="at least one"):
        jp.intersect()
    with pytest.raises(ValueError, match="Missing: kernel"):
        jp.intersect(MASKS, {"bias": MASKS["bias"]})
    with pytest.raises(ValueError, match="empty tree"):
        jp.ones_masks({})
    with pytest.raises(TypeError, match=r"params\['act'\] is a .*, not an array"):
        jp.ones_masks({"act": jnp.tanh})


def test_check_pruned_names_the_leaf_and_counts():
    jp.check_pruned(jp.apply_masks(PARAMS, MASKS), MASKS)
    with pytest.raises(ValueError, match=r"params\['kernel'\] has 2 pruned entries that are not 0"):
        jp.check_pruned(PARAMS, MASKS)


@given(st.integers(0, 20))
@settings(deadline=None, max_examples=21)
def test_metrics_count(k):
    kernel = jnp.where(jnp.arange(20) < k, 0.0, 1.0).reshape(4, 5)
    params = {"kernel": kernel, "bias": jnp.array([0.0, 1.0, 1.0])}
    sparsity = jp.metrics.sparsity(params)
    assert sparsity.prunable == pytest.approx(k / 20)
    assert sparsity.model == pytest.approx((k + 1) / 23)
    density = jp.metrics.density(params)
    assert density.prunable == pytest.approx(1 - k / 20)
    assert density.model == pytest.approx(1 - (k + 1) / 23)
    assert jp.metrics.nonzeros(params) == 23 - k - 1
    masks = jax.tree.map(lambda x: x != 0, params)
    assert jp.metrics.sparsity(masks) == sparsity
    assert jp.metrics.nonzeros(masks) == 22 - k


def test_metrics_of_nan_and_of_leaves_without_entries():
    assert jp.metrics.nonzeros({"w": jnp.array([jnp.nan, 0.0, -0.0, jnp.inf])}) == 2
    assert jp.metrics.nonzeros({"w": jnp.zeros((0, 3)), "s": jnp.ones(())}) == 1
    with pytest.raises(ValueError, match="matches no leaf"):
        jp.metrics.sparsity({"bias": jnp.ones(3)})


def test_table_fits_a_terminal():
    masks = {"encoder": {"attention": {"query": {"kernel": jnp.ones((256, 8, 64), bool)}}}}
    lines = jp.metrics.table(masks, asked=0.5).splitlines()
    assert max(map(len, lines)) <= 80
    assert "256x8x64" in lines[1]
    assert "131072" in lines[1]


def test_masks_may_come_in_other_containers_and_leave_in_the_params_own():
    params = {"layers": (jnp.arange(4.0).reshape(2, 2), jnp.ones((2, 2)))}
    masks = {"layers": [jnp.array([[False, True], [True, True]]), jnp.ones((2, 2), bool)]}
    more = jp.prune_once(params, jp.scores.magnitude, 0.5, masks=masks)
    assert jax.tree.structure(more) == jax.tree.structure(params)
    assert jp.apply_masks(params, masks)["layers"][0].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert jax.tree.structure(jp.intersect(more, masks)) == jax.tree.structure(params)


def test_two_leaves_at_one_path_are_refused():
    params = {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="several leaves at the path 'a/b'"):
        jp.prune_once(params, jp.scores.magnitude, 0.5)


# Few shapes, so that compiled programs are reused: of whole bytes and not, as many rows as entries in one,
# one entry, none.
PACKED_SHAPES = [(), (0, 3), (2, 0), (7,), (5, 5), (3, 16), (2, 3, 11)]


@given(st.tuples(*(hnp.arrays(bool, shape) for shape in PACKED_SHAPES)))
@examples(15)
def test_packing_is_numpys_and_undone(masks):
    packed = jp.pack_masks(list(map(jnp.asarray, masks)))
    for mask, got, again in zip(masks, packed, jp.unpack_masks(packed), strict=True):
        expected = np.packbits(np.atleast_1d(mask), axis=-1, bitorder="little")
        assert got.shape == mask.shape and got.bits.dtype == jnp.uint8
        np.testing.assert_array_equal(got.bits, expected)
        assert again.dtype == jnp.bool_
        np.testing.assert_array_equal(again, mask, strict=True)


def test_packed_masks_are_trees_of_arrays_that_nobody_changes():
    masks = {"w": jnp.array([[True, False, True]]), "b": jnp.array(False)}
    assert jp.unpack_masks(masks)["w"] is masks["w"]  # what is not packed stays
    packed = jax.jit(jp.pack_masks)(masks)
    assert [leaf.shape for leaf in jax.tree.leaves(packed)] == [(1,), (1, 1)]
    again = jax.jit(jp.unpack_masks)(packed)
    assert jax.tree.map(lambda leaf: leaf.tolist(), again) == {"b": False, "w": [[True, False, True]]}
    with pytest.raises(AttributeError):
        packed["w"].shape = (3,)


def test_masks_are_packed_where_others_are():
    masks = {"w": jnp.array([True, False]), "b": jnp.array(True)}
    assert packed_like(masks, masks) is masks
    packed = jp.pack_masks(masks)
    again = packed_like(masks, {"w": packed["w"], "b": masks["b"]})
    assert again["w"].bits.tolist() == [1] and again["b"] is masks["b"]


@pytest.mark.parametrize(
    ("shape", "spec", "each"),
    [((6, 16), ("x", None), 0), ((3, 32), (None, "x"), 0), ((3, 24), (None, "x"), 12), ((20,), ("x",), 10)],
)
def test_packing_leaves_no_byte_to_two_devices(shape, spec, each):
    mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    masks = {"w": jax.ShapeDtypeStruct(shape, bool, sharding=sharding)}
    with jax.sharding.use_abstract_mesh(mesh):
        if each:
            with pytest.raises(
                ValueError, match=rf"pack_masks on params\['w'\].*{each} entries on each of 2"
            ):
                jax.eval_shape(jp.pack_masks, masks)
        else:
            packed = jax.eval_shape(jp.pack_masks, masks)["w"]
            assert packed.bits.sharding.spec == sharding.spec and packed.shape == shape
