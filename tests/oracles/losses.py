"""A small smooth problem and its Hessian in numpy, for the tests of scores made from a loss."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np


def mlp(params, x):
    """A tanh network: smooth, so that second derivatives are what they should be."""
    return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((mlp(params, x) - y) ** 2)


def problem(seed=0, examples=6, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {"in": {"bias": normal(4), "kernel": normal(3, 4)}, "out": {"kernel": normal(4, 2)}}
    return params, (normal(examples, 3), normal(examples, 2))


def flatten(params):
    """Return the kernels as one vector, and the function that makes params of it, by plain indexing."""
    flat = jnp.concatenate([params["in"]["kernel"].ravel(), params["out"]["kernel"].ravel()])

    def unflatten(v):
        return {
            "in": {"bias": params["in"]["bias"], "kernel": v[:12].reshape(3, 4)},
            "out": {"kernel": v[12:].reshape(4, 2)},
        }

    return flat, unflatten


def kernel_entries(scores):
    return np.concatenate([np.ravel(scores["in"]["kernel"]), np.ravel(scores["out"]["kernel"])])


def vector(scores):
    """Return the scores of the kernels as one vector; those of the bias must be NaN."""
    assert jax.tree.structure(scores) == jax.tree.structure(problem()[0])
    assert np.isnan(scores["in"]["bias"]).all() and scores["in"]["bias"].shape == (4,)
    return kernel_entries(scores)


@cache
def hessian_gradient_weights():
    """Return Hessian, gradient and weights of the problem's kernels in double precision."""
    params, batch = problem()
    w, unflatten = flatten(params)
    flat_loss = lambda v: loss_fn(unflatten(v), batch)  # noqa: E731
    h, g = jax.jit(lambda v: (jax.hessian(flat_loss)(v), jax.grad(flat_loss)(v)))(w)
    return tuple(np.asarray(a, np.float64) for a in (h, g, w))


def run(score, params, **inputs):
    """Return the scores, compiled, which is quicker here than one operation after another."""
    return jax.jit(lambda params, inputs: score(params, **inputs))(params, inputs)
