"""Scores of the weights and their gradients. (Those made from a loss: test_scores_loss.py.)"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp

SETTINGS = settings(deadline=None, max_examples=25, derandomize=True)

PARAMS = {"a": {"kernel": jnp.array([[1.0, -2.0], [0.0, 3.0]])}, "b": jnp.array([-1.0, 4.0])}
GRADS = {"a": {"kernel": jnp.array([[-5.0, 0.5], [7.0, 1.0]])}, "b": jnp.array([2.0, -0.25])}


def check(scores, expected):
    assert jax.tree.structure(scores) == jax.tree.structure(PARAMS)
    jax.tree.map(lambda s, w, g: np.testing.assert_array_equal(s, expected(w, g)), scores, PARAMS, GRADS)


def test_magnitude():
    check(jp.scores.magnitude(PARAMS), lambda w, g: np.abs(w))


def test_gradient_magnitude():
    check(jp.scores.gradient_magnitude(PARAMS, grads=GRADS), lambda w, g: np.abs(g))


def test_taylor_is_the_first_order_change_of_the_loss():
    check(jp.scores.taylor(PARAMS, grads=GRADS), lambda w, g: np.abs(w * g))
    # A linear loss has no higher order: removing w changes it by exactly w * g.
    loss = lambda w: jnp.sum(w * GRADS["b"])  # noqa: E731
    w = PARAMS["b"]
    scores = jp.scores.taylor(w, grads=jax.grad(loss)(w))
    np.testing.assert_allclose(scores, [abs(loss(w) - loss(w.at[i].set(0.0))) for i in range(2)])


def test_random_depends_on_the_key_and_the_leaf_alone():
    key = jax.random.key(0)
    scores = jp.scores.random(PARAMS, key=key)
    again = jax.jit(lambda k: jp.scores.random(PARAMS, key=k))(key)
    jax.tree.map(np.testing.assert_array_equal, scores, again)
    other = jp.scores.random(PARAMS, key=jax.random.key(1))
    assert not np.array_equal(scores["b"], other["b"])
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, scores, jp.scores.random(half, key=key))
    many = jp.scores.random({"w": jnp.zeros(100_000)}, key=key)["w"]
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.01


def test_complex_params_are_scored_by_modulus():
    params = {"kernel": jnp.array([[3 + 4j, 1j], [2.0, 0.5]])}
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5)
    assert masks["kernel"].tolist() == [[True, False], [True, False]]


REAL = [jp.scores.signed_taylor, jp.scores.snip, jp.scores.movement]


@pytest.mark.parametrize("score", [jp.scores.gradient_magnitude, jp.scores.taylor, *REAL])
def test_missing_or_mismatched_gradients(score):
    with pytest.raises(ValueError, match=f"scores.{score.__name__} needs gradients: pass grads="):
        score(PARAMS)
    with pytest.raises(ValueError, match=r"grads must have the tree structure of params. Missing: b"):
        score(PARAMS, grads={"a": GRADS["a"]})
    with pytest.raises(
        ValueError, match=r"grads\['b'\] has shape \(3,\), but params\['b'\] has shape \(2,\)"
    ):
        score(PARAMS, grads=GRADS | {"b": jnp.ones(3)})


@pytest.mark.parametrize("score", REAL)
def test_products_need_real_leaves(score):
    with pytest.raises(
        TypeError, match=rf"params\['w'\] is complex64\[2\]; scores.{score.__name__} needs real"
    ):
        score({"w": jnp.ones(2, jnp.complex64)}, grads={"w": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"grads\['w'\] is complex64\[2\]"):
        score({"w": jnp.ones(2)}, grads={"w": jnp.ones(2, jnp.complex64)})


def test_missing_key():
    with pytest.raises(ValueError, match=r"scores\.random needs a PRNG key: pass key="):
        jp.scores.random(PARAMS)


# Scores of the weights alone, against loops


def everything(path, leaf):
    return True


def lamp_by_loops(leaf):
    """Divide each square by the sum of all squares that are not below it in (magnitude, index)."""
    flat = np.abs(np.asarray(leaf, np.float64)).ravel()
    place = [(size, index) for index, size in enumerate(flat)]
    scores = [
        size**2 / total
        if (total := math.fsum(other[0] ** 2 for other in place if other >= (size, index)))
        else 0.0
        for size, index in place
    ]
    return np.reshape(scores, np.shape(leaf))


SHAPES = st.sampled_from([(), (1,), (7,), (3, 4), (2, 3, 2)])  # few: each is compiled anew
FLOATS = hnp.arrays(np.float32, SHAPES, elements=st.floats(-4, 4, width=16))  # with ties and zeros


@SETTINGS
@given(st.lists(FLOATS, min_size=1, max_size=3))
def test_lamp_is_the_oracles(leaves):
    scores = jp.scores.lamp(leaves)
    for score, leaf in zip(scores, leaves, strict=True):
        assert score.dtype == jnp.float32
        np.testing.assert_allclose(score, lamp_by_loops(leaf), rtol=1e-5)
        assert leaf.any() == (float(score.max()) == 1.0)  # exactly
        assert not np.asarray(score)[leaf == 0].any()


@pytest.mark.filterwarnings("ignore:layer collapse")
@SETTINGS
@given(FLOATS, st.integers(0, 10))
def test_lamp_of_one_leaf_prunes_as_magnitude_does(leaf, count):
    count = min(count, leaf.size)
    by_lamp = jp.prune_once({"w": leaf}, jp.scores.lamp, count=count, where=everything, floor=0)
    by_size = jp.prune_once({"w": leaf}, jp.scores.magnitude, count=count, where=everything, floor=0)
    np.testing.assert_array_equal(by_lamp["w"], by_size["w"])


def test_lamp_keeps_order_and_range_where_sums_round():
    rng = np.random.default_rng(0)
    leaf = rng.normal(size=50_000).astype(np.float32) * 10.0 ** rng.integers(-6, 1, 50_000)
    leaf = leaf.astype(np.float32)
    scores = np.asarray(jp.scores.lamp(leaf))
    assert (np.diff(scores[np.argsort(np.abs(leaf), kind="stable")]) >= 0).all()
    assert scores.max() == 1.0 and scores.min() >= 0
    np.testing.assert_array_equal(jp.scores.lamp(leaf * np.float32(2) ** 100), scores)  # no overflow
    np.testing.assert_array_equal(jp.scores.lamp(leaf * np.float32(2) ** -90), scores)  # nor underflow


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_no_leaf_is_emptied_by_lamp_before_the_last_entries():
    params = {
        "small": {"kernel": 1e-3 * jnp.ones((4, 4))},
        "large": {"kernel": jnp.arange(1.0, 65.0).reshape(8, 8)},
    }
    masks = jp.prune_once(params, jp.scores.lamp, count=78, floor=0)
    assert [int(leaf["kernel"].sum()) for leaf in masks.values()] == [1, 1]
    by_size = jp.prune_once(params, jp.scores.magnitude, count=16, floor=0)
    assert not by_size["small"]["kernel"].any()


@SETTINGS
@given(FLOATS)
def test_normalized_magnitude_is_the_oracles(leaf):
    scores = np.asarray(jp.scores.normalized_magnitude({"w": leaf})["w"])
    norm = math.sqrt(math.fsum(float(w) ** 2 for w in leaf.ravel()))
    np.testing.assert_allclose(scores, np.abs(leaf) / (norm or 1.0), rtol=1e-5)
    if leaf.any():
        assert np.linalg.norm(scores) == pytest.approx(1, abs=1e-5)


def test_normalized_magnitude_is_of_each_leaf_at_any_scale():
    w = jnp.array([3.0, -4.0])
    scores = jp.scores.normalized_magnitude({"a": w, "b": 1e30 * w, "c": 1e-30 * w, "d": 0 * w})
    for name in "abc":
        np.testing.assert_allclose(scores[name], [0.6, 0.8], rtol=1e-6)
    assert scores["d"].tolist() == [0, 0]


# Scores of weights and gradients


@SETTINGS
@given(st.data())
def test_products_of_weights_and_gradients_are_the_oracles(data):
    params = data.draw(st.lists(FLOATS, min_size=1, max_size=3))
    grads = [data.draw(hnp.arrays(np.float32, w.shape, elements=st.floats(-4, 4, width=16))) for w in params]
    products = [w.astype(np.float64) * g.astype(np.float64) for w, g in zip(params, grads, strict=True)]
    total = math.fsum(abs(p) for product in products for p in product.ravel())
    signed, moved = (score(params, grads=grads) for score in (jp.scores.signed_taylor, jp.scores.movement))
    snip = jp.scores.snip(params, grads=grads)
    for index, product in enumerate(products):
        np.testing.assert_allclose(signed[index], product, rtol=1e-6)
        np.testing.assert_allclose(moved[index], -product, rtol=1e-6)
        np.testing.assert_allclose(snip[index], np.abs(product) / (total or 1.0), rtol=1e-5)
    if total:
        assert sum(float(leaf.sum()) for leaf in snip) == pytest.approx(1, abs=1e-5)


def test_snip_takes_its_sum_over_all_leaves():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[5.0]])}
    grads = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([[1.0]])}
    scores = jp.scores.snip(params, grads=grads)
    assert scores["a"].tolist() == [0.125, 0.25] and scores["b"].tolist() == [[0.625]]


def test_movement_is_where_a_step_of_descent_goes():
    rng = np.random.default_rng(0)
    w, g = jnp.asarray(rng.normal(size=(2, 50)), jnp.float32)
    grows = jnp.abs(w - 1e-3 * g) > jnp.abs(w)
    np.testing.assert_array_equal(jp.scores.movement(w, grads=g) > 0, grows)


def test_a_filter_by_its_signed_taylor_is_the_change_of_a_linear_loss():
    rng = np.random.default_rng(1)
    params, grads = (
        {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 20)), jnp.float32)} for _ in range(2)
    )  # the loss is the sum of w * g
    change = np.abs(np.asarray(params["kernel"] * grads["kernel"]).reshape(-1, 20).sum(0))
    filters = jp.structures.slices(norm=lambda s, axis: jnp.abs(jnp.sum(s, axis=axis)))
    masks = jp.prune_once(params, jp.scores.signed_taylor, count=10, structure=filters, grads=grads)
    kept = np.asarray(masks["kernel"]).reshape(-1, 20)
    assert set(np.flatnonzero(~kept.any(0))) == set(np.argsort(change)[:10])
    unsigned = jp.prune_once(
        params, jp.scores.taylor, count=10, structure=jp.structures.slices(norm=1), grads=grads
    )
    assert not np.array_equal(masks["kernel"], unsigned["kernel"])  # or the test would show nothing


def test_magnitudes_of_complex_params_are_moduli():
    leaf = jnp.array([3 + 4j, 0j, 1j])
    for score in (jp.scores.lamp, jp.scores.normalized_magnitude):
        np.testing.assert_allclose(score(leaf), score(jnp.array([5.0, 0.0, 1.0])))
