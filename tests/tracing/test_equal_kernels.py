"""Leaves of one shape share the kernels that XLA compiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.tracing.equal_kernels import pick


def test_pick_is_indexing_by_numbers_and_arrays():
    values = {"a": jnp.arange(12).reshape(3, 4), "b": jnp.array([True, False, False, True])}
    for number in range(4):
        for index in (number, jnp.int32(number)):
            found = jax.jit(pick, static_argnums=1 if isinstance(index, int) else ())(values, index)
            np.testing.assert_array_equal(found["a"], np.arange(12).reshape(3, 4)[:, number])
            assert found["b"] == (number in (0, 3))


def test_pick_under_vmap():
    values = jnp.arange(24).reshape(2, 3, 4)
    found = jax.vmap(lambda values: pick(values, 2))(values)
    np.testing.assert_array_equal(found, np.arange(24).reshape(2, 3, 4)[..., 2])


def _kernels(function, *args) -> int:
    """Return how many different bodies the fused kernels of a compiled function have."""
    bodies = set()
    for computation in re.split(r"\n(?=\S)", jax.jit(function).lower(*args).compile().as_text()):
        head, _, body = computation.partition("\n")
        if head.startswith("%fused"):
            bodies.add(re.sub(r"%[\w.\-]+|, metadata=\{[^}]*\}", "", body))
    return len(bodies)


def _params(leaves: int) -> dict[str, jax.Array]:
    return {f"kernel{number}": jnp.ones((6, 10)) for number in range(leaves)}


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_leaves_of_one_shape_add_no_kernel_to_a_pruning(scope):
    def prune(params):
        return jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, scope=scope)

    few, many = _kernels(prune, _params(3)), _kernels(prune, _params(6))
    assert many <= few + 1


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_leaves_of_one_shape_add_no_kernel_to_a_train_step(scope):
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.cubic(0.9, begin_step=1, end_step=9), scope=scope)
    tx = jp.wrap_optax(optax.adam(1e-3), pruner)

    def update(params, state):
        return tx.update(params, state, params)

    few, many = (_kernels(update, _params(leaves), tx.init(_params(leaves))) for leaves in (3, 6))
    assert many <= few + 1
