import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

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
    # For a linear loss the first order is all there is: removing w changes the loss by w * g.
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


@pytest.mark.parametrize("score", [jp.scores.gradient_magnitude, jp.scores.taylor])
def test_missing_or_mismatched_gradients(score):
    with pytest.raises(ValueError, match=f"scores.{score.__name__} needs gradients"):
        score(PARAMS)
    with pytest.raises(ValueError, match=r"grads must have the tree structure of params. Missing: b"):
        score(PARAMS, grads={"a": GRADS["a"]})
    with pytest.raises(
        ValueError, match=r"grads\['b'\] has shape \(3,\), but params\['b'\] has shape \(2,\)"
    ):
        score(PARAMS, grads=GRADS | {"b": jnp.ones(3)})


def test_missing_key():
    with pytest.raises(ValueError, match="needs a PRNG key"):
        jp.scores.random(PARAMS)
