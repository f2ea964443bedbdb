"""Which scores are computed again where they are read, and that they come out the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.tracing import recompute

X = jnp.array([[1.0, -2.0, 0.5], [-0.25, 3.0, -0.0]])
G = jnp.array([[0.5, 2.0, -1.0], [1.0, 0.0, 4.0]])


def both(function):
    """What a function gives under `jit`, and what its recipes give; by path."""

    def run(x, g):
        tree, recipes = recompute.with_recipes(lambda: function(x, g))
        return tree, {path: recipe.compute(recipe.inputs) for path, recipe in recipes.items()}

    return jax.jit(run)(X, G)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: {"a": jnp.abs(x)},
        lambda x, g: {"a": jnp.square(x * g), "b": -x},
        lambda x, g: {"a": jnp.where(x > 0, x, 2 * g).astype(jnp.bfloat16)},
        lambda x, g: {"a": jnp.minimum(x, 1.0) / (1 + jnp.abs(g))},
        lambda x, g: {"a": x},
    ],
    ids=["abs", "products", "where", "quotient", "itself"],
)
def test_entry_by_entry_is_computed_again(function):
    tree, again = both(function)
    assert again.keys() == tree.keys()
    for path in tree:
        assert again[path].dtype == tree[path].dtype
        np.testing.assert_array_equal(again[path], tree[path])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: {"a": jnp.abs(x)},
        lambda x, g: {"a": jnp.where(x > 0, x, 2 * g).astype(jnp.bfloat16)},
        lambda x, g: {"a": jnp.minimum(x, jnp.float32(3) * 2) / (1 + jax.jit(jnp.square)(g))},
    ],
    ids=["abs", "where", "calls"],
)
def test_a_slice_is_computed_of_slices(function):
    def run(x, g):
        tree, recipes = recompute.with_recipes(lambda: function(x, g))
        sliced = recipes["a"].compute_slice
        assert sliced is not None
        return tree["a"], sliced(recipes["a"].inputs, lambda array: array[:, 1])

    whole, part = jax.jit(run)(X, G)
    np.testing.assert_array_equal(part, whole[:, 1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: {"a": x - jnp.mean(x, axis=0)},
        lambda x, g: {"a": x @ g.T},
        lambda x, g: {"a": jnp.exp(x)},
        lambda x, g: {"a": sum((x**i for i in range(9)), g)},
        lambda x, g: {"a": jnp.broadcast_to(x[0], x.shape)},
        lambda x, g: {"a": jax.random.uniform(jax.random.key(0), x.shape)},
    ],
    ids=["mean", "product", "exp", "long", "spread", "random"],
)
def test_anything_else_is_stored(function):
    tree, again = both(function)
    assert not again
    np.testing.assert_array_equal(tree["a"], jax.jit(function)(X, G)["a"])


def test_one_of_two_leaves():
    tree, again = both(lambda x, g: {"a": jnp.abs(x), "b": jnp.cumsum(g, axis=0)})
    assert tree.keys() == {"a", "b"} and again.keys() == {"a"}


def test_leaves_with_the_same_equations_share_one_function():
    def function(x, g):
        return {
            "same": x * 2.0,
            "as_same": g * 2.0,
            "other_number": x * 3.0,
            "other_zero": jnp.maximum(x, 0.0) * -0.0,
            "zero": jnp.maximum(g, 0.0) * 0.0,
            "other_dtype": x.astype(jnp.bfloat16) * 2.0,
            "twice": x * x,
            "crossed": x * g,
        }

    tree, again = both(function)
    for path in tree:
        np.testing.assert_array_equal(np.signbit(again[path]), np.signbit(tree[path]))
        np.testing.assert_array_equal(again[path], tree[path])
    _, recipes = recompute.with_recipes(lambda: function(X, G))
    shared = {path: recipe.compute for path, recipe in recipes.items()}
    assert shared["same"] is shared["as_same"]
    assert len(set(shared.values())) == len(shared) - 1
