"""Straight-through masks: the forward pass of `apply_masks`, the gradient of dense params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp

PARAMS = {"kernel": jnp.array([[1.0, jnp.nan], [-jnp.inf, -2.0]]), "bias": jnp.array([0.5, -0.0])}
MASKS = {"kernel": jnp.array([[True, False], [False, True]]), "bias": jnp.array([True, False])}

numbers = hnp.arrays(np.float32, (4, 3), elements=st.floats(-4, 4, width=32))
bools = hnp.arrays(bool, (4, 3))


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_forward_is_apply_masks_bit_by_bit(dtype, decay):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    wanted = jp.apply_masks(params, MASKS)
    for function in (jp.straight_through, jax.jit(jp.straight_through)):
        got = function(params, MASKS, decay)
        assert jax.tree.structure(got) == jax.tree.structure(params)
        for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert leaf.dtype == expected.dtype
            assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


@given(numbers, bools, numbers, numbers, st.sampled_from([0.0, 2e-4, 0.75]))
@settings(deadline=None, max_examples=20)
def test_gradient_by_hand(weights, mask, slope, curvature, decay):
    """The loss sum(a y + b y^2 / 2) has the gradient a + b y at y, the masked params."""

    def loss(params, decay):
        y = jp.straight_through(params, {"w": jnp.array(mask)}, decay)["w"]
        return jnp.sum(slope * y + curvature * y**2 / 2)

    w, a, b = (np.asarray(array, np.float64) for array in (weights, slope, curvature))
    expected = a + b * np.where(mask, w, 0) + decay * np.where(mask, 0, w)
    params = {"w": jnp.array(weights)}
    static = jax.grad(loss)(params, decay)["w"]
    traced = jax.jit(jax.grad(loss))(params, decay)["w"]
    np.testing.assert_allclose(static, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-5)


def test_the_decay_is_the_gradient_of_the_squared_pruned_weights_also_for_complex_ones():
    params = {"w": jnp.array([1 + 2j, 3 - 4j, -2j])}
    masks = {"w": jnp.array([True, False, False])}
    target = jnp.array([1j, 2.0, 3.0])

    def through(params):
        return jnp.sum(jnp.abs(jp.straight_through(params, masks, 0.25)["w"] - target) ** 2)

    def fit_of_masked(masked):
        return jnp.sum(jnp.abs(masked["w"] - target) ** 2)

    def penalty(params):
        return 0.25 / 2 * jnp.sum(jnp.where(masks["w"], 0, jnp.abs(params["w"]) ** 2))

    expected = jax.grad(fit_of_masked)(jp.apply_masks(params, masks))["w"] + jax.grad(penalty)(params)["w"]
    np.testing.assert_allclose(jax.grad(through)(params)["w"], expected, rtol=1e-6)


def test_nan_in_a_pruned_weight_harms_neither_loss_nor_gradient():
    def loss(params):
        return sum(jnp.sum(leaf**2 + leaf) for leaf in jax.tree.leaves(jp.straight_through(params, MASKS)))

    value, grads = jax.value_and_grad(loss)(PARAMS)
    assert float(value) == 1 + 1 + 4 - 2 + 0.25 + 0.5
    assert grads["kernel"].tolist() == [[3.0, 1.0], [1.0, -3.0]]
    assert grads["bias"].tolist() == [2.0, 1.0]


def test_decay_and_masks_get_no_gradient_and_integers_pass():
    params = {"w": jnp.array([1.0, 2.0]), "steps": jnp.array([3, 4])}
    masks = {"w": jnp.array([True, False]), "steps": jnp.array([False, True])}
    assert jp.straight_through(params, masks, 0.1)["steps"].tolist() == [0, 4]

    def loss(params, masks, decay):
        return jnp.sum(jp.straight_through(params, masks, decay)["w"])

    grads, of_masks, of_decay = jax.grad(loss, argnums=(0, 1, 2), allow_int=True)(params, masks, 0.5)
    assert grads["w"].tolist() == [1.0, 2.0]
    assert float(of_decay) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(of_masks)} == {jax.dtypes.float0}
    assert grads["steps"].dtype == jax.dtypes.float0


def test_half_precision_gradients_under_strict_promotion():
    params = {"w": jnp.array([1.0, 3.0], jnp.bfloat16)}
    masks = {"w": jnp.array([True, False])}
    with jax.numpy_dtype_promotion("strict"):
        for decay in (0.0, 0.5, jnp.array(0.5, jnp.bfloat16), np.float64(0.5)):
            grads = jax.grad(lambda p, d=decay: jp.straight_through(p, masks, d)["w"].sum())(params)["w"]
            assert grads.dtype == jnp.bfloat16
            assert grads.tolist() == [1.0, 1.0 + float(decay) * 3]


def test_a_traced_decay_is_traced_once():
    traces = []

    @jax.jit
    def gradient(params, decay):
        traces.append(1)
        return jax.grad(lambda p: jp.straight_through(p, {"w": MASKS["bias"]}, decay)["w"].sum())(params)["w"]

    params = {"w": jnp.array([1.0, 2.0])}
    assert [gradient(params, decay).tolist() for decay in (0.0, 0.5, 1.0)] == [[1, 1], [1, 2], [1, 3]]
    assert len(traces) == 1


def test_vmap_over_params_and_masks_is_the_loop():
    weights = jax.random.normal(jax.random.key(0), (5, 4, 3))
    masks = jax.random.bernoulli(jax.random.key(1), 0.5, weights.shape)

    def gradient(w, mask, decay):
        return jax.grad(lambda p: jnp.sum(jp.straight_through(p, [mask], decay)[0] ** 2))([w])[0]

    for decay in (0.0, 0.25):
        looped = jnp.stack([gradient(w, m, decay) for w, m in zip(weights, masks, strict=True)])
        batched = jax.vmap(gradient, in_axes=(0, 0, None))(weights, masks, decay)
        np.testing.assert_allclose(batched, looped, rtol=1e-6)
    decays = jnp.arange(5.0)
    looped = jnp.stack([gradient(*each) for each in zip(weights, masks, decays, strict=True)])
    np.testing.assert_allclose(jax.vmap(gradient)(weights, masks, decays), looped, rtol=1e-6)


def test_vmap_over_examples_adds_the_decay_once():
    params, masks = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])}
    x = jnp.ones((10, 2))

    def loss(params):
        return jnp.mean(jax.vmap(lambda x: jp.straight_through(params, masks, 0.5)["w"] @ x)(x))

    np.testing.assert_allclose(jax.grad(loss)(params)["w"], [1.0, 1.0 + 0.5 * 2.0], rtol=1e-6)


def test_gradient_of_a_scan_whose_masks_change():
    rng = np.random.default_rng(0)
    w, xs, masks = rng.normal(size=6), rng.normal(size=(7, 6)), rng.random((7, 6)) < 0.5
    decay = 0.1

    @jax.jit
    def loss(w):
        def body(total, step):
            x, mask = step
            return total + jnp.dot(jp.straight_through([w], [mask], decay)[0], x) ** 2 / 2, None

        return jax.lax.scan(body, 0.0, (jnp.array(xs, jnp.float32), jnp.array(masks)))[0]

    # Each call adds its own decay.
    expected = sum(
        np.dot(np.where(m, w, 0), x) * x + decay * np.where(m, 0, w) for x, m in zip(xs, masks, strict=True)
    )
    np.testing.assert_allclose(jax.grad(loss)(jnp.array(w, jnp.float32)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_masks_from_the_same_traced_function(decay):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 3)), "bias": jnp.ones(3)}
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def masks_of(params):
        params = jax.lax.stop_gradient(params)
        return jp.prune_once(params, jp.scores.magnitude, 0.5, structure=jp.structures.nm(2, 4))

    def loss(masked):
        return jnp.mean((x @ masked["kernel"] + masked["bias"]) ** 2)

    got = jax.jit(jax.grad(lambda p: loss(jp.straight_through(p, masks_of(p), decay))))(params)
    masks = masks_of(params)
    dense = jax.grad(loss)(jp.apply_masks(params, masks))
    assert bool((dense["kernel"] != 0).all())
    expected = jax.tree.map(lambda g, m, p: g + decay * np.where(m, 0, p), dense, masks, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


# Errors


def test_masks_are_checked():
    with pytest.raises(ValueError, match=r"Missing: bias\. Not in params: none"):
        jp.straight_through(PARAMS, {"kernel": MASKS["kernel"]})
    with pytest.raises(TypeError, match=r"masks\['bias'\] is float32\[2\], but masks are bool"):
        jp.straight_through(PARAMS, MASKS | {"bias": jnp.ones(2)})
    with pytest.raises(ValueError, match="empty tree"):
        jp.straight_through({}, {})


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf"), jnp.float32(-1)])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay must be 0 or a positive number, got"):
        jp.straight_through(PARAMS, MASKS, decay)
    with pytest.raises(ValueError, match="decay must be 0 or a positive number, got"):
        jax.jit(lambda params: jp.straight_through(params, MASKS, decay))(PARAMS)  # closed over


def test_a_decay_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"decay must be a scalar, got shape \(2,\)"):
        jp.straight_through(PARAMS, MASKS, jnp.ones(2))


# Training


TRUTH = np.array([1.0, -1.0, 0.0, 0.0, 0.8, 0.0, 1.2, 0.0])
START = np.where(TRUTH == 0, 0.5, 0.0)  # the masks of the start keep exactly the wrong weights


def train(masked, steps=150):
    """Gradient descent on a noiseless regression, from the wrong weights; params and their masks."""
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = x @ jnp.array(TRUTH, jnp.float32)[:, None]
    tx = optax.sgd(0.1)

    def masks_of(params):
        params = jax.lax.stop_gradient(params)
        return jp.prune_once(params, jp.scores.magnitude, 0.5, structure=jp.structures.nm(2, 4))

    def loss(params, masks):
        return jnp.mean((x @ masked(params, masks)["kernel"] - y) ** 2)

    def step(carry, _):
        params, opt_state = carry
        grads = jax.grad(lambda p: loss(p, masks_of(p)))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), masks_of(params)["kernel"]

    @jax.jit
    def run(params):
        (params, _), history = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return params, masks_of(params), history

    params, masks, history = run({"kernel": jnp.array(START, jnp.float32)[:, None]})
    pruned = jp.apply_masks(params, masks)
    return params, masks["kernel"][:, 0], history[:, :, 0], float(jnp.mean((x @ pruned["kernel"] - y) ** 2))


@pytest.mark.parametrize("decay", [0.0, 2e-4])
def test_n_of_m_training_brings_back_what_was_pruned_at_the_start(decay):
    _, masks, history, loss = train(lambda p, m: jp.straight_through(p, m, decay))
    assert history[0].tolist() == (TRUTH == 0).tolist()
    assert masks.tolist() == (TRUTH != 0).tolist()
    assert loss < 1e-6


def test_without_these_gradients_weights_at_0_stay_pruned():
    _, masks, _, loss = train(jp.apply_masks)
    assert masks.tolist() == (TRUTH == 0).tolist()
    assert loss > 1


def test_decay_shrinks_the_pruned_weights_and_only_them():
    plain, _, _, _ = train(jp.straight_through)
    refined, masks, _, _ = train(lambda p, m: jp.straight_through(p, m, 0.05))
    before, after = (np.abs(np.asarray(p["kernel"][:, 0])) for p in (plain, refined))
    np.testing.assert_allclose(after[masks], np.abs(TRUTH[TRUTH != 0]), atol=1e-3)
    assert (after[~masks] < 0.7 * before[~masks]).all()
