"""Optimizer states with leaves that are shaped like a square param and hold something else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

LR, DECAY, EPS, SIZE = 0.1, 0.9, 1e-2, 4
WHERE = jp.not_(jp.matching("*preconditioners/*"))


class ShampooState(NamedTuple):
    momentum: Any
    preconditioners: Any


def shampoo(root):
    """Shampoo on square kernels: `root(matrix)` is its inverse fourth root."""

    def init(params):
        square = jax.tree.map(lambda p: EPS * jnp.eye(SIZE), params)
        return ShampooState(jax.tree.map(jnp.zeros_like, params), {"left": square, "right": square})

    def update(updates, state, params=None):
        del params
        grads = updates
        momentum = jax.tree.map(lambda m, g: DECAY * m + g, state.momentum, grads)
        left = jax.tree.map(lambda s, g: s + g @ g.T, state.preconditioners["left"], grads)
        right = jax.tree.map(lambda s, g: s + g.T @ g, state.preconditioners["right"], grads)
        updates = jax.tree.map(lambda m, a, b: -LR * root(a) @ m @ root(b), momentum, left, right)
        return updates, ShampooState(momentum, {"left": left, "right": right})

    return optax.GradientTransformation(init, update)


def inverse_fourth_root(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * values**-0.25) @ vectors.T


def reference(kernel, mask, grads):
    """The same in numpy, on one kernel that is masked before every step."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * values**-0.25) @ vectors.T

    kernel = np.where(mask, kernel, 0)
    momentum, left, right = np.zeros_like(kernel), EPS * np.eye(SIZE), EPS * np.eye(SIZE)
    for grad in grads:
        grad = np.where(mask, grad, 0)
        momentum = np.where(mask, DECAY * momentum + grad, 0)
        left, right = left + grad @ grad.T, right + grad.T @ grad
        kernel = np.where(mask, kernel - LR * root(left) @ momentum @ root(right), 0)
    return kernel, left, right


def problem():
    rng = np.random.default_rng(0)
    kernel, mask = rng.normal(size=(SIZE, SIZE)), rng.random((SIZE, SIZE)) < 0.5
    return kernel.astype(np.float32), mask, rng.normal(size=(5, SIZE, SIZE)).astype(np.float32)


def trained(tx, kernel, grads, jit):
    params: Any = {"kernel": jnp.asarray(kernel)}
    state: Any = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"], state.inner


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", ["keep_masked", "wrap_optax", "wrap_optax of a chain"])
def test_preconditioners_are_left_alone(kind, jit):
    kernel, mask, grads = problem()
    expected, left, right = reference(kernel, mask, grads)
    inner = shampoo(inverse_fourth_root)
    if kind == "keep_masked":
        tx = jp.keep_masked(inner, {"kernel": jnp.asarray(mask)}, state_where=WHERE)
    else:
        inner = optax.chain(optax.identity(), inner) if "chain" in kind else inner
        fixed = jp.pruner(
            lambda params, **_: {"kernel": jnp.asarray(mask, jnp.float32)}, float(1 - mask.mean())
        )
        tx = jp.wrap_optax(inner, fixed, state_where=WHERE)
    got, state = trained(tx, kernel, grads, jit)
    state = state[1] if "chain" in kind else state
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert (np.asarray(got)[~mask] == 0).all()
    np.testing.assert_allclose(state.preconditioners["left"]["kernel"], left, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.preconditioners["right"]["kernel"], right, rtol=1e-5, atol=1e-5)
    assert (np.asarray(state.momentum["kernel"])[~mask] == 0).all()


def test_without_state_where_a_square_preconditioner_passes_for_a_moment():
    kernel, mask, grads = problem()
    tx = jp.keep_masked(shampoo(inverse_fourth_root), {"kernel": jnp.asarray(mask)})
    _, state = trained(tx, kernel, grads[:1], jit=False)
    assert (np.asarray(state.preconditioners["left"]["kernel"])[~mask] == 0).all()


def test_regrown_entries_leave_preconditioners_alone():
    kernel, _, grads = problem()
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:2] = True
    pruner = jp.rigl({"kernel": jnp.asarray(mask)}, every=2, end_step=4, fraction=0.9)
    tx = jp.wrap_optax(shampoo(inverse_fourth_root), pruner, state_where=WHERE)
    params = {"kernel": jnp.where(mask, kernel, 0)}
    state: Any = tx.init(params)
    lefts = []
    for grad in grads[:2]:
        updates, state = tx.update({"kernel": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        lefts.append(state.inner.preconditioners["left"]["kernel"])
    assert (np.asarray(state.pruner.masks["kernel"]) != mask).any()
    np.testing.assert_array_equal(lefts[1], lefts[0])  # no step is taken where masks move


def test_rewind_and_compaction_leave_out_leaves_that_mirror_no_param():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 2))}
    state = ShampooState(params, {"left": {"a": jnp.full((4, 4), 2.0)}})
    masks = jp.ones_masks(params)
    masks = {"a": masks["a"].at[:, 1].set(False), "b": masks["b"]}
    back = jp.rewind(state, masks, state_where=WHERE)
    assert back.preconditioners["left"]["a"].tolist() == np.full((4, 4), 2.0).tolist()
    assert back.momentum["a"][:, 1].tolist() == [0.0] * 4
    small = jp.compact(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, masks, jnp.ones((1, 4)))
    assert small.shrink(state).preconditioners["left"]["a"].shape == (4, 3)
    shrunk = small.shrink(state, where=WHERE)
    assert shrunk.preconditioners["left"]["a"].shape == (4, 4)
    assert shrunk.momentum["a"].shape == (4, 3)
    wide = small.expand(shrunk, where=WHERE)
    assert wide.momentum["a"].shape == (4, 4)
    assert wide.preconditioners["left"]["a"].tolist() == np.full((4, 4), 2.0).tolist()


def test_state_where_is_a_function():
    masks = {"kernel": jnp.ones((2, 2), bool)}
    with pytest.raises(TypeError, match=r"state_where= needs a function of \(path, leaf\)"):
        jp.keep_masked(optax.adam(1e-3), masks, state_where="mu/*")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state_where="):
        jp.wrap_optax(
            optax.adam(1e-3),
            jp.pruner(jp.scores.magnitude, 0.5),
            state_where="mu/*",  # type: ignore[arg-type]
        )
    with pytest.raises(TypeError, match="state_where="):
        jp.rewind(masks, masks, state_where=0)  # type: ignore[arg-type]
