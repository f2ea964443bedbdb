"""OBD and OBS, against the explicit Hessian and against least squares refitted in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.oracles.losses import hessian_gradient_weights, loss_fn, problem, run, vector


def test_obd_is_the_explicit_diagonal():
    params, batch = problem()
    h, _, w = hessian_gradient_weights()
    expected = np.diag(h) * w**2 / 2
    assert (expected < 0).any() and (expected > 0).any()  # signed, not clipped
    for chunk in (7, 32):
        scores = vector(run(jp.scores.obd(loss_fn, chunk=chunk), params, batch=batch))
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5)


def test_obd_by_random_signs_is_unbiased_with_the_variance_it_claims():
    params, batch = problem()
    h, _, w = hessian_gradient_weights()
    samples = 400
    score = jax.jit(lambda key: jp.scores.obd(loss_fn, samples=samples)(params, batch=batch, key=key))
    error = vector(score(jax.random.key(0))) - np.diag(h) * w**2 / 2
    off_diagonal = (h**2).sum(1) - np.diag(h) ** 2
    deviations = error / (np.sqrt(off_diagonal / samples) * w**2 / 2)
    assert np.abs(deviations).max() < 4.5
    assert 0.5 < np.sqrt(np.mean(deviations**2)) < 1.6
    again, other = vector(score(jax.random.key(0))), vector(score(jax.random.key(1)))
    np.testing.assert_array_equal(again - np.diag(h) * w**2 / 2, error)
    assert not np.allclose(again, other)


def test_obs_is_what_is_left_after_the_best_move_of_the_other_weights():
    # Least squares in a matrix of weights, refitted without each weight in turn.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(30, 2))
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    half_squares = lambda params, batch: jnp.sum((batch[0] @ params["kernel"] - batch[1]) ** 2) / 2  # noqa: E731
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    scores = jp.scores.obs(half_squares)({"kernel": jnp.asarray(best, jnp.float32)}, batch=batch)["kernel"]
    least = np.sum((x @ best - y) ** 2) / 2
    for i, j in np.ndindex(5, 2):
        others = [k for k in range(5) if k != i]
        refit = np.linalg.lstsq(x[:, others], y[:, j], rcond=None)[0]
        column = np.sum((x[:, others] @ refit - y[:, j]) ** 2) / 2
        rest = np.sum((x @ best[:, 1 - j] - y[:, 1 - j]) ** 2) / 2
        assert scores[i, j] == pytest.approx(column + rest - least, rel=1e-3)


def test_obs_is_the_explicit_inverse_with_damping():
    params, batch = problem()
    h, _, w = hessian_gradient_weights()
    damping = 1.0 - np.linalg.eigvalsh(h)[0]
    expected = w**2 / (2 * np.diag(np.linalg.inv(h + damping * np.eye(len(w)))))
    scores = vector(run(jp.scores.obs(loss_fn, damping=damping), params, batch=batch))
    np.testing.assert_allclose(scores, expected, rtol=1e-3)
    more = vector(run(jp.scores.obs(loss_fn, damping=damping + 1), params, batch=batch))
    assert not np.allclose(more, expected)


def test_obs_refuses_a_hessian_that_has_no_inverse():
    params, batch = problem()
    h, _, _ = hessian_gradient_weights()
    least = np.linalg.eigvalsh(h)[0]
    assert least < 0
    score = jp.scores.obs(loss_fn)
    with pytest.raises(ValueError, match=r"scores.obs: .*not positive definite \(its least eigenvalue is -"):
        score(params, batch=batch)
    assert np.isnan(vector(jax.jit(lambda p: score(p, batch=batch))(params))).all()
    # A weight that does not affect the loss makes H singular, though not negative; also if rounding hides it.
    squares = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)  # noqa: E731
    kernel = {"kernel": jnp.ones((3, 1))}
    x = jax.random.normal(jax.random.key(0), (9, 2))
    for singular in (jnp.pad(x, ((0, 0), (0, 1))), jnp.column_stack([x, x @ jnp.array([0.3, 0.7])])):
        with pytest.raises(ValueError, match="Raise damping"):
            jp.scores.obs(squares)(kernel, batch=singular)
        assert np.isfinite(jp.scores.obs(squares, damping=0.1)(kernel, batch=singular)["kernel"]).all()


def test_obs_refuses_too_many_weights():
    params = {"kernel": jnp.ones((51, 100)), "small": jnp.ones((2, 2))}
    squares = lambda params, x: x * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))  # noqa: E731
    with pytest.raises(ValueError, match=r"at most 5000 weights, got 5104.*where=.*obd.*fisher"):
        jp.scores.obs(squares)(params, batch=jnp.float32(1))
    scores = jp.scores.obs(squares, where=jp.matching("small"))(params, batch=jnp.float32(1))
    np.testing.assert_allclose(scores["small"], 1, rtol=1e-5)  # H = 2 I
    assert np.isnan(scores["kernel"]).all()


def test_obs_knows_a_singular_hessian_that_rounding_hides():
    # Three inputs that span two dimensions: the factorisation may end in a tiny pivot of either sign.
    squares = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)  # noqa: E731
    obs = lambda x: jp.scores.obs(squares)({"kernel": jnp.ones((3, 1))}, batch=x)["kernel"]  # noqa: E731
    # The rounding depends on the compiler's options: take the user's, not those of conftest.py.
    score = jax.jit(obs, compiler_options={"xla_backend_optimization_level": 3})
    rng = np.random.default_rng(0)
    hidden = 0
    for _ in range(30):
        x = jnp.asarray(rng.normal(size=(9, 2)) @ rng.normal(size=(2, 3)), jnp.float32)
        hidden += bool(np.isfinite(jnp.linalg.cholesky(2 * x.T @ x)).all())
        assert np.isnan(score(x)).all()
    assert hidden >= 5  # or the test would show nothing
    full = jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)
    assert np.isfinite(score(full)).all()
