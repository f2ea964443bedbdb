"""Which moments of an optimizer are 0 wherever what it is given is 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.tracing.zeros import zero_where
from jaxprune.tree.mirrors import match_leaves_to_params

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}


def of(function, tags, *args):
    closed = jax.make_jaxpr(function)(*args)
    return zero_where(closed, tags)


def test_rules():
    x, s = jnp.ones(3), jnp.float32(2)
    zero, other, none = frozenset({0}), frozenset({1}), frozenset()

    def function(x, y, s):
        return (
            *(x * s, x + y, x * y, jnp.where(s > 1, x, 0.0), jnp.where(s > 1, x, 1.0), x / (jnp.sqrt(y) + s)),
            *(s / x, x / x, x + s, jnp.sqrt(x**2), x**0.5 - x, jnp.exp(x), jnp.maximum(x, 0), jnp.cumsum(x)),
            *(jnp.zeros(3), jax.jit(jnp.tanh)(-x), jax.lax.cond(s > 1, lambda: x, lambda: 2 * x)),
        )

    expected = [zero, none, zero | other, zero, none, zero, none, none, none, zero, none, none, zero, none]
    assert of(function, [zero, other, none], x, x, s) == [*expected, None, zero, zero]


@pytest.mark.parametrize(
    ("optimizer", "zeros"),
    [
        (optax.adam(0.1), True),
        (optax.adamw(0.1, nesterov=True), True),
        (optax.sgd(0.1, momentum=0.9), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.1, momentum=0.9)), True),
        (optax.apply_if_finite(optax.lion(0.1), 3), True),
        (optax.adabelief(0.1), False),
        (optax.contrib.muon(0.1), True),
    ],
    ids=["adam", "adamw", "momentum", "clipped", "if_finite", "adabelief", "muon"],
)
def test_of_optimizers(optimizer, zeros):
    """What is said to be 0 is; and of those in daily use, it is said."""
    given = (PARAMS, optimizer.init(PARAMS), PARAMS)
    indices = match_leaves_to_params(given, PARAMS)
    keep = [np.array([[1, 0, 1], [0, 1, 1]]), np.array([[0, 1, 1], [1, 0, 1]])]
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(given)
    leaves = [
        leaf if i is None else jnp.asarray(keep[i] * rng.uniform(0.5, 1.5, (2, 3)), leaf.dtype)
        for leaf, i in zip(leaves, indices, strict=True)
    ]
    given = treedef.unflatten(leaves)

    def update(grads, state, params):
        return optimizer.update(grads, state, params)[1]

    found = of(update, [frozenset() if i is None else frozenset({i}) for i in indices], *given)
    after = update(*given)
    said = []
    for leaf, where, i in zip(
        jax.tree.leaves(after), found, match_leaves_to_params(after, PARAMS), strict=True
    ):
        if i is not None:
            said.append(where is None or i in where)
            assert not said[-1] or not np.asarray(leaf)[keep[i] == 0].any()
    assert said and all(said) == zeros


def test_an_optimizer_that_holds_its_learning_rate_as_an_array():
    # A JAX array that is a constant of the jaxpr has a value, but operations on it are traced.
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.5, step=3))
    for rate in (0.1, jnp.asarray(0.1)):
        tx = jp.wrap_optax(optax.sgd(rate), pruner)
        updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(updates["a"], -0.1)
