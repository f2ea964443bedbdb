import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp

PARAMS = {"kernel": jnp.array([[1.0, jnp.nan], [-jnp.inf, -2.0]]), "bias": jnp.array([0.5, -0.0])}
MASKS = {"kernel": jnp.array([[True, False], [False, True]]), "bias": jnp.array([True, False])}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_apply_masks_gives_positive_zero_whatever_was_there(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    pruned = jp.apply_masks(params, MASKS)
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype(dtype)}
    assert pruned["kernel"].real.tolist() == [[1.0, 0.0], [0.0, -2.0]]
    assert not np.signbit(np.asarray(pruned["bias"].real, np.float32)[1])


def test_apply_masks_lets_no_gradient_through_what_is_pruned():
    grads = jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(jp.apply_masks(p, MASKS))))(PARAMS)
    assert grads["kernel"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_apply_masks_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        jp.apply_masks(jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS), MASKS)


def test_ones_masks_mirror_any_leaf():
    params = PARAMS | {"steps": jnp.arange(3), "empty": jnp.zeros((0, 2)), "scalar": jnp.ones(())}
    for make in (jp.ones_masks, jax.jit(jp.ones_masks)):
        masks = make(params)
        jp.check_masks(masks, params)
        assert all(bool(leaf.all()) for leaf in jax.tree.leaves(masks))


bools = hnp.arrays(bool, (3, 4))


@given(bools, bools, bools)
@settings(deadline=None, max_examples=30)
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


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=11)))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_packing_is_numpys_and_undone(mask):
    packed = jp.pack_masks({"w": jnp.asarray(mask)})["w"]
    expected = np.packbits(np.atleast_1d(mask), axis=-1, bitorder="little")
    assert packed.shape == mask.shape and packed.bits.dtype == jnp.uint8
    np.testing.assert_array_equal(packed.bits, expected)
    again = jp.unpack_masks({"w": packed})["w"]
    assert again.dtype == jnp.bool_
    np.testing.assert_array_equal(again, mask)


def test_packing_takes_bools():
    with pytest.raises(TypeError, match=r"masks\['w'\] is float32\[3\].*but masks are bool"):
        jp.pack_masks({"w": jnp.ones(3)})


def test_what_is_not_packed_stays():
    masks = {"w": jnp.array([True, False])}
    assert jp.unpack_masks(masks)["w"] is masks["w"]
