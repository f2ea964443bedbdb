"""Optimal Brain Surgeon, against least squares refitted in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.pruning.surgeon import optimal_brain_surgeon

SETTINGS = settings(deadline=None, max_examples=20, derandomize=True)
EXAMPLES, INPUTS = 25, 7


def regression(params, batch):
    x, y = batch
    return jnp.sum((x @ params["kernel"][:, 0] + params["bias"] - y) ** 2) / 2


def refit(x, y, kept):
    """The least squares over the inputs kept: the weights, 0 elsewhere, and half the squared error."""
    w = np.zeros(x.shape[1])
    w[kept] = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    return w, np.sum((x @ w - y) ** 2) / 2


def data(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(EXAMPLES, INPUTS)) @ (np.eye(INPUTS) + 0.3 * rng.normal(size=(INPUTS, INPUTS)))
    return x, x @ rng.normal(size=INPUTS) + rng.normal(size=EXAMPLES)


def greedy(x, y, count, kept=None):
    """Removes inputs one by one, each time the one whose removal and refit cost least."""
    kept = list(range(x.shape[1])) if kept is None else list(kept)
    for _ in range(count):
        costs = [refit(x, y, [k for k in kept if k != q])[1] for q in kept]
        kept.pop(int(np.argmin(costs)))
    return kept


def tree(w, bias=0.0):
    return {"bias": jnp.float32(bias), "kernel": jnp.asarray(w, jnp.float32)[:, None]}


def arrays(*values):
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


@SETTINGS
@given(st.integers(0, 10_000), st.integers(0, INPUTS - 1))
def test_it_is_greedy_removal_with_least_squares_refit(seed, count):
    x, y = data(seed)
    kept = greedy(x, y, count)
    expected, cost = refit(x, y, kept)
    params, masks = REMOVE(tree(refit(x, y, list(range(INPUTS)))[0]), count, arrays(x, y))
    assert np.flatnonzero(masks["kernel"][:, 0]).tolist() == kept
    np.testing.assert_allclose(params["kernel"][:, 0], expected, rtol=1e-3, atol=1e-3)
    assert float(regression(params, arrays(x, y))) == pytest.approx(cost, rel=1e-4)
    jp.check_pruned(params, masks)  # exactly 0
    assert bool(masks["bias"]) and float(params["bias"]) == 0  # where= leaves it out


REMOVE = jax.jit(lambda params, count, batch: optimal_brain_surgeon(regression, params, count, batch))


def test_the_loss_rises_by_exactly_the_saliencies():
    x, y = data(0)
    batch = arrays(x, y)
    params, masks = tree(refit(x, y, list(range(INPUTS)))[0]), None
    before = float(regression(params, batch))
    for _ in range(4):
        # The saliency of the next removal, by the explicit inverse over the inputs that are left.
        kept = np.arange(INPUTS) if masks is None else np.flatnonzero(masks["kernel"][:, 0])
        inverse = np.linalg.inv((x.T @ x)[np.ix_(kept, kept)])
        saliency = np.min(np.asarray(params["kernel"])[kept, 0] ** 2 / (2 * np.diag(inverse)))
        params, masks = optimal_brain_surgeon(regression, params, 1, batch, masks=masks)
        after = float(regression(params, batch))
        assert after - before == pytest.approx(saliency, rel=1e-2)
        before = after


def test_it_finds_cheaper_weights_than_magnitude():
    # Two inputs that are nearly one: each alone has a large weight, and either can go for free.
    x, _ = data(2)
    x[:, 1] = x[:, 0] + 0.05 * x[:, 1]
    y = x @ np.array([3.0, 3.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    best = tree(refit(x, y, list(range(INPUTS)))[0])
    params, masks = optimal_brain_surgeon(regression, best, 1, arrays(x, y))
    by_size = jp.apply_masks(best, jp.prune_once(best, jp.scores.magnitude, count=1))
    assert not masks["kernel"][:2].all()
    assert regression(params, arrays(x, y)) < regression(by_size, arrays(x, y)) / 5


def test_masks_are_where_it_starts():
    x, y = data(3)
    kept = [0, 2, 3, 5, 6]
    before = {"bias": jnp.array(True), "kernel": jnp.zeros((INPUTS, 1), bool).at[jnp.array(kept)].set(True)}
    w, _ = refit(x, y, kept)
    w[1] = 9.0  # pruned and yet not 0: it is made 0 first
    params, masks = optimal_brain_surgeon(regression, tree(w), 2, arrays(x, y), masks=before)
    after = greedy(x, y, 2, kept)
    assert np.flatnonzero(masks["kernel"][:, 0]).tolist() == after
    np.testing.assert_allclose(params["kernel"][:, 0], refit(x, y, after)[0], rtol=1e-3, atol=1e-3)
    jp.check_pruned(params, masks)
    unchanged, same = optimal_brain_surgeon(regression, tree(w), 0, arrays(x, y), masks=before)
    np.testing.assert_array_equal(unchanged["kernel"], jp.apply_masks(tree(w), before)["kernel"])
    np.testing.assert_array_equal(same["kernel"], before["kernel"])


def test_where_says_which_leaves_move():
    x, y = data(4)
    with_ones = np.column_stack([np.ones(EXAMPLES), x])
    best, _ = refit(with_ones, y, list(range(INPUTS + 1)))
    params, masks = optimal_brain_surgeon(
        regression, tree(best[1:], best[0]), 3, arrays(x, y), where=lambda path, leaf: True
    )
    kept = greedy(with_ones, y, 3)
    expected, _ = refit(with_ones, y, kept)
    got = np.concatenate([np.ravel(params["bias"]), np.ravel(params["kernel"])])
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    flat = np.concatenate([np.ravel(masks["bias"]), np.ravel(masks["kernel"])])
    assert np.flatnonzero(flat).tolist() == kept


def test_ties_go_to_the_earlier_leaf_and_index():
    loss = lambda params, target: sum(jnp.sum((w - target) ** 2) for w in params.values())  # noqa: E731
    params = {"a-b": jnp.ones((2, 2)), "a": jnp.ones((2, 2))}
    _, masks = optimal_brain_surgeon(loss, params, 5, jnp.float32(1))
    gone = np.concatenate([~np.ravel(mask) for mask in jax.tree.leaves(masks)])
    assert gone.tolist() == [True] * 5 + [False] * 3


def test_it_prunes_a_network_better_than_obd_and_magnitude():
    """A trained tanh network with fewer weights than the data: damped, and not quadratic."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(60, 4)), jnp.float32)
    y = jnp.tanh(x @ jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)).sum(1, keepdims=True)
    loss = lambda p, batch: jnp.mean((jnp.tanh(batch[0] @ p["in"]) @ p["out"] - batch[1]) ** 2)  # noqa: E731
    params = {"in": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), "out": jnp.ones((5, 1))}

    @jax.jit
    def train(params):
        step = lambda _, p: jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(loss)(p, (x, y)))  # noqa: E731
        return jax.lax.fori_loop(0, 5000, step, params)

    params = train(params)
    removed, masks = jax.jit(lambda params: optimal_brain_surgeon(loss, params, 3, (x, y), damping=1e-3))(
        params
    )
    assert sum(int((~mask).sum()) for mask in jax.tree.leaves(masks)) == 3
    jp.check_pruned(removed, masks)
    for score, data in ((jp.scores.obd(loss), {"batch": (x, y)}), (jp.scores.magnitude, {})):
        other = jp.apply_masks(params, jp.prune_once(params, score, count=3, **data))
        assert float(loss(removed, (x, y))) < float(loss(other, (x, y)))


def test_jit_vmap_strict_promotion_and_half_precision():
    pairs = [data(seed) for seed in range(3)]
    params = [tree(refit(x, y, list(range(INPUTS)))[0]) for x, y in pairs]
    batches = [arrays(x, y) for x, y in pairs]
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    with jax.numpy_dtype_promotion("strict"):
        of = lambda p, b: optimal_brain_surgeon(regression, p, 3, b)  # noqa: E731
        eager = of(params[0], batches[0])
        jitted = [jax.jit(of)(p, b) for p, b in zip(params, batches, strict=True)]
        together = jax.jit(jax.vmap(of))(jax.tree.map(stack, *params), jax.tree.map(stack, *batches))
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params[0])
        promoted = lambda p, b: regression(jax.tree.map(lambda w: w.astype(jnp.float32), p), b)  # noqa: E731
        rounded, masks = optimal_brain_surgeon(promoted, half, 3, batches[0])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, jitted[0], eager)
    jax.tree.map(lambda whole, *parts: close(whole, np.stack(parts)), together, *jitted)
    assert rounded["kernel"].dtype == jnp.bfloat16
    jp.check_pruned(rounded, masks)
    assert int(masks["kernel"].sum()) == INPUTS - 3


def test_errors():
    x, y = data(0)
    params, batch = tree(refit(x, y, list(range(INPUTS)))[0]), arrays(x, y)
    remove = lambda count, **kwargs: optimal_brain_surgeon(regression, params, count, batch, **kwargs)  # noqa: E731
    for count in (-1, INPUTS + 1):
        with pytest.raises(ValueError, match=rf"count={count} is out of range: there are 7 weights"):
            remove(count)
    for count in (1.0, True):
        with pytest.raises(TypeError, match="count must be an integer"):
            remove(count)
    with pytest.raises(ValueError, match="optimal_brain_surgeon needs damping"):
        remove(1, damping=-1)
    with pytest.raises(ValueError, match="matches no leaf"):
        remove(1, where=jp.matching("nothing"))
    with pytest.raises(ValueError, match="optimal_brain_surgeon needs data"):
        optimal_brain_surgeon(regression, params, 1, None)
    with pytest.raises(ValueError, match=r"masks must have the tree structure of params. Missing: kernel"):
        remove(1, masks={"bias": jnp.array(True)})
    few = (batch[0][:3], batch[1][:3])
    with pytest.raises(
        ValueError, match=r"optimal_brain_surgeon: the Hessian plus damping=0 is not positive"
    ):
        optimal_brain_surgeon(regression, params, 1, few)
    kept, _ = optimal_brain_surgeon(regression, params, 1, few, damping=0.1)
    assert np.isfinite(kept["kernel"]).all()
    under_jit, _ = jax.jit(lambda p: optimal_brain_surgeon(regression, p, 1, few))(params)
    assert np.isnan(under_jit["kernel"]).any()


def test_everything_can_go():
    x, y = data(0)
    params, masks = REMOVE(tree(refit(x, y, list(range(INPUTS)))[0]), INPUTS, arrays(x, y))
    assert not masks["kernel"].any() and not params["kernel"].any()
    # Under jit a count beyond that can raise nothing, and does nothing more.
    params, masks = REMOVE(tree(np.ones(INPUTS)), INPUTS + 3, arrays(x, y))
    assert not masks["kernel"].any() and not params["kernel"].any()
