"""Penalties against numpy in float64, their gradients by hand, and what they find."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp

L1, LASSO = jp.penalties.l1, jp.penalties.group_lasso

# Zeros on purpose: whole slices of them have no derivative.
entries = st.one_of(st.just(0.0), st.floats(2**-10, 4, width=32), st.floats(-4, -(2**-10), width=32))
kernels = hnp.arrays(np.float32, (3, 2, 4), elements=entries)


@given(kernels, kernels)
@settings(deadline=None, max_examples=20)
def test_l1(a, b):
    params = {"a": {"kernel": jnp.array(a)}, "b": {"kernel": jnp.array(b), "bias": jnp.full(4, 9.0)}}
    value, grads = jax.value_and_grad(jax.jit(L1))(params)
    assert value.dtype == jnp.float32
    assert value.shape == ()
    np.testing.assert_allclose(value, np.abs(a, dtype=np.float64).sum() + np.abs(b).sum(), rtol=1e-5)
    np.testing.assert_array_equal(grads["a"]["kernel"], np.sign(a))
    np.testing.assert_array_equal(grads["b"]["kernel"], np.sign(b))
    assert not grads["b"]["bias"].any()


@given(kernels, st.sampled_from([-1, 0, 1, -2, (0, 2), (-1, -2), (0, 1, 2)]))
@settings(deadline=None, max_examples=20)
def test_group_lasso(kernel, axis):
    w = kernel.astype(np.float64)
    kept = {a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))}
    reduced = tuple(a for a in range(3) if a not in kept)
    norms = np.sqrt((w**2).sum(reduced, keepdims=True))
    root = np.sqrt(np.prod([w.shape[a] for a in reduced]))
    value, grads = jax.value_and_grad(jax.jit(lambda p: LASSO(p, axis)))({"kernel": jnp.array(kernel)})
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, (root * norms).sum(), rtol=1e-5)
    expected = np.divide(root * w, norms, out=np.zeros_like(w), where=np.broadcast_to(norms > 0, w.shape))
    np.testing.assert_allclose(grads["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_leaves_add_up_and_where_chooses():
    params = {
        "dense": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([10.0])},
        "conv": {"kernel": jnp.full((1, 1, 2, 2), 3.0)},
        "norm": {"scale": jnp.array([0.5, -0.25])},
    }
    assert float(L1(params)) == 3 + 12
    assert float(L1(params, where=jp.matching("*/scale"))) == 0.75
    np.testing.assert_allclose(LASSO(params, axis=-2), np.sqrt(2) * np.sqrt(5) + 2 * np.sqrt(2) * np.sqrt(18))
    assert float(LASSO(params, where=jp.matching("norm/*"))) == 0.75


@pytest.mark.parametrize("penalty", [L1, LASSO])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_what_is_pruned_feels_no_penalty(penalty, dtype):
    # JAX's own derivative of abs at 0 is 1.
    params = {"kernel": jnp.array([[0.0, -0.0, 2.0], [0.0, 0.0, 1.0]], dtype)}
    grads = np.asarray(jax.grad(penalty)(params)["kernel"].astype(jnp.complex64))
    assert not grads[:, :2].any()
    assert grads[:, 2].all()


def test_nan_is_not_hidden():
    params = {"kernel": jnp.array([[jnp.nan, 1.0]])}
    assert np.isnan(L1(params))
    assert np.isnan(LASSO(params))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    # In bfloat16, 256 + 1 is 256; in float16, 300 squared is infinite.
    params = {"kernel": jnp.ones((100, 30), dtype)}
    assert L1(params).dtype == LASSO(params).dtype == jnp.float32
    assert float(L1(params)) == 3000
    np.testing.assert_allclose(LASSO(params), 30 * 10 * 10, rtol=1e-6)
    large = {"kernel": jnp.full((4, 4), 300.0, dtype)}
    np.testing.assert_allclose(LASSO(large), 4 * 2 * np.sqrt(4 * 300.0**2), rtol=1e-6)
    grads = jax.grad(LASSO)(large)["kernel"]
    assert grads.dtype == dtype
    np.testing.assert_allclose(grads.astype(np.float32), np.ones((4, 4)), rtol=1e-2)


def test_strict_promotion_with_mixed_leaves():
    params = {"a": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}, "b": {"kernel": jnp.ones((2, 2))}}
    with jax.numpy_dtype_promotion("strict"):
        assert float(L1(params)) == 8
        np.testing.assert_allclose(LASSO(params), 8, rtol=1e-6)
    with jax.enable_x64():
        wide = params | {"c": {"kernel": jnp.ones((2, 2), jnp.float64)}}
        with jax.numpy_dtype_promotion("strict"):
            assert L1(wide).dtype == LASSO(wide).dtype == jnp.float64


def test_complex_weights_count_by_modulus():
    params = {"kernel": jnp.array([[3 + 4j], [0j]])}
    value, grads = jax.value_and_grad(L1)(params)
    assert float(value) == 5
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(grads["kernel"], [[0.6 - 0.8j], [0]], rtol=1e-6)
    np.testing.assert_allclose(LASSO(params), np.sqrt(2) * 5, rtol=1e-6)


@pytest.mark.parametrize("penalty", [L1, LASSO])
def test_errors(penalty):
    with pytest.raises(ValueError, match=r"where=kernels matches no leaf.*bias float32\[2\]"):
        penalty({"bias": jnp.ones(2)})
    with pytest.raises(ValueError, match="empty tree"):
        penalty({})
    with pytest.raises(TypeError, match=r"params\['kernel'\] is int32\[2, 2\]; only floating-point"):
        penalty({"kernel": jnp.ones((2, 2), int)})
    with pytest.raises(ValueError, match=r"slices\(axis=2\) on params\['kernel'\] of shape \(2, 3\): it has"):
        LASSO({"kernel": jnp.ones((2, 3))}, axis=2)


# What they are for

RELEVANT = np.array([True, False, True, True, False, False, True, False])
INPUTS = jp.structures.slices(axis=-2, norm=2)


@jax.jit
def trained(strength):
    """A regression on 8 inputs, 4 of which say nothing of the target, which is noisy."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (64, 8))
    truth = jax.random.normal(keys[1], (8, 5)) * RELEVANT[:, None]
    y = x @ truth + 0.5 * jax.random.normal(keys[2], (64, 5))
    tx = optax.sgd(optax.linear_schedule(0.05, 0.0, 400))

    def loss(params):
        return jnp.mean((x @ params["kernel"] - y) ** 2) + strength * LASSO(params, axis=-2)

    def step(carry, _):
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = {"kernel": jax.random.normal(keys[3], (8, 5))}
    return jax.lax.scan(step, (params, tx.init(params)), length=400)[0][0]


def test_group_lasso_and_a_threshold_find_the_irrelevant_inputs():
    params = trained(0.1)
    assert jp.metrics.nonzeros(params) == 40  # a penalty alone makes nothing exactly zero

    def kept_by_threshold(params):
        masks = jp.prune_once(params, jp.scores.magnitude, threshold=0.02, structure=INPUTS)["kernel"]
        np.testing.assert_array_equal(masks.all(1), masks.any(1))
        return masks.all(1).tolist()

    assert kept_by_threshold(params) == RELEVANT.tolist()
    # Without the penalty the noise gives every input weights above the threshold.
    assert kept_by_threshold(trained(0.0)) == [True] * 8
