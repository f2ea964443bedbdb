"""Scores made from a loss function, against loops and dense Hessians. OBD, OBS: test_scores_curvature.py."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.oracles.losses import (
    flatten,
    hessian_gradient_weights,
    kernel_entries,
    loss_fn,
    mlp,
    problem,
    run,
    vector,
)

SETTINGS = settings(deadline=None, max_examples=20, derandomize=True)


# GraSP


def test_grasp_is_the_weight_times_the_explicit_hessian_times_the_gradient():
    params, batch = problem()
    h, g, w = hessian_gradient_weights()
    scores = vector(run(jp.scores.grasp(loss_fn), params, batch=batch))
    np.testing.assert_allclose(scores, w * (h @ g), rtol=1e-3, atol=1e-5)


def test_grasp_keeps_what_the_paper_keeps():
    # By the definition: the weights whose removal leaves the gradient largest, to first order, are removed.
    params, batch = problem()
    w, unflatten = flatten(params)
    squared_norm = lambda v: jnp.sum(jax.grad(lambda u: loss_fn(unflatten(u), batch))(v) ** 2)  # noqa: E731
    removal = -np.asarray(w * jax.jit(jax.grad(squared_norm))(w))  # the first-order change of g^T g
    masks = jp.prune_once(params, jp.scores.grasp(loss_fn), count=7, floor=0, batch=batch)
    gone = ~kernel_entries(masks)
    assert set(np.flatnonzero(gone)) == set(np.argsort(removal)[-7:])


def test_grasp_differentiates_only_what_where_takes_in():
    params, batch = problem()
    flat, unflatten = jax.flatten_util.ravel_pytree(params)  # in leaf order: bias, kernel, kernel
    everything_loss = lambda v: loss_fn(unflatten(v), batch)  # noqa: E731
    product = jax.jit(lambda v: jax.hessian(everything_loss)(v) @ jax.grad(everything_loss)(v))
    expected = flat * product(flat)
    scores = run(jp.scores.grasp(loss_fn, where=lambda path, leaf: True), params, batch=batch)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(scores)[0], expected, rtol=1e-3, atol=1e-5)
    assert not np.allclose(
        expected[4:], vector(run(jp.scores.grasp(loss_fn), params, batch=batch)), rtol=1e-2
    )


# Fisher


@pytest.mark.parametrize(("examples", "chunk"), [(6, 32), (7, 3), (8, 4), (1, 32)])
def test_fisher_is_a_loop_over_examples(examples, chunk):
    params, (x, y) = problem(examples=examples)
    w, unflatten = flatten(params)
    squares = [
        np.asarray(jax.grad(lambda v, i: loss_fn(unflatten(v), (x[i : i + 1], y[i : i + 1])))(w, i)) ** 2
        for i in range(examples)
    ]
    scores = vector(run(jp.scores.fisher(loss_fn, chunk=chunk), params, batch=(x, y)))
    np.testing.assert_allclose(
        scores, np.asarray(w) ** 2 * np.mean(squares, axis=0) / 2, rtol=1e-4, atol=1e-9
    )


def test_fisher_is_not_zero_where_the_gradients_cancel():
    params, x = {"kernel": jnp.ones((1, 1))}, jnp.array([[1.0], [-1.0]])
    linear = lambda params, x: jnp.mean(x @ params["kernel"])  # noqa: E731
    assert jax.grad(linear)(params, x)["kernel"].item() == 0
    assert jp.scores.fisher(linear)(params, batch=x)["kernel"].item() == 0.5


# Brute force


def test_brute_force_is_a_loop_over_entries():
    params, batch = problem()
    w, unflatten = flatten(params)
    flat_loss = jax.jit(lambda v: loss_fn(unflatten(v), batch))
    without = [float(flat_loss(w.at[q].set(0))) for q in range(len(w))]
    expected = np.array(without) - float(loss_fn(params, batch))
    assert (expected < 0).any()
    for chunk in (7, 32):
        scores = vector(run(jp.scores.brute_force(loss_fn, chunk=chunk), params, batch=batch))
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=2e-6)


def test_criteria_agree_with_brute_force_to_their_order():
    # For tiny weights the change is the first-order term, signed_taylor's; at a minimum it is obd's.
    params, batch = problem()
    params["out"]["kernel"] *= 1e-2
    exact = vector(run(jp.scores.brute_force(loss_fn), params, batch=batch))[12:]
    first = kernel_entries(jp.scores.signed_taylor(params, grads=jax.grad(loss_fn)(params, batch)))[12:]
    second = vector(run(jp.scores.obd(loss_fn), params, batch=batch))[12:]
    np.testing.assert_allclose(exact, second - first, rtol=1e-2, atol=2e-6)  # quadratic in the output layer


# Over batches


def batches_of(number, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(number, 6, width)), jnp.float32) for width in (3, 2))


@pytest.mark.parametrize("score", [jp.scores.taylor, jp.scores.snip, jp.scores.movement])
def test_over_batches_is_a_loop_over_batches(score):
    params, _ = problem()
    x, y = batches_of(5)
    gradient = jax.jit(jax.grad(loss_fn))
    each = [score(params, grads=gradient(params, (x[i], y[i]))) for i in range(5)]
    expected = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *each)
    got = run(jp.scores.over_batches(score, loss_fn), params, batches=(x, y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, expected)
    # Gradients that are passed in, as a pruner does, change nothing.
    ignored = run(jp.scores.over_batches(score, loss_fn), params, batches=(x, y), grads=params)
    jax.tree.map(np.testing.assert_array_equal, got, ignored)


def test_over_batches_of_a_score_made_from_the_loss():
    # Batches of one size weigh all examples alike, so the mean of Fisher scores is that of all data.
    params, _ = problem()
    x, y = batches_of(4)
    together = run(jp.scores.fisher(loss_fn), params, batch=(x.reshape(-1, 3), y.reshape(-1, 2)))
    fisher = run(jp.scores.over_batches(jp.scores.fisher(loss_fn, chunk=4), loss_fn), params, batches=(x, y))
    np.testing.assert_allclose(vector(fisher), vector(together), rtol=1e-4)


def test_over_batches_passes_on_a_key_for_each_batch_and_everything_else():
    seen = []

    def score(params, *, grads, key, batch, temperature):
        seen.append(temperature)
        return jax.tree.map(lambda w: jnp.full(w.shape, jax.random.uniform(key)), params)

    params, _ = problem()
    key = jax.random.key(3)
    mean = jp.scores.over_batches(score, loss_fn)(params, batches=batches_of(2), key=key, temperature=2.0)
    draws = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(2)]
    np.testing.assert_allclose(mean["out"]["kernel"], np.mean(draws), rtol=1e-6)
    assert set(seen) == {2.0}


def test_over_batches_in_prune_once():
    params, _ = problem()
    score = jp.scores.over_batches(jp.scores.taylor, loss_fn)
    masks = jp.prune_once(params, score, count=5, batches=batches_of(3))
    scores = kernel_entries(score(params, batches=batches_of(3)))
    gone = ~kernel_entries(masks)
    assert set(np.flatnonzero(gone)) == set(np.argsort(scores)[:5])


# Rescaling hidden units does not change the function, nor scores that depend on the function alone


def relu_net(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"]


def relu_loss(params, batch):
    return jnp.mean((relu_net(params, batch[0]) - batch[1]) ** 2)


@SETTINGS
@given(st.integers(0, 10_000))
def test_scores_of_the_function_do_not_see_a_rescaling_of_hidden_units(seed):
    rng = np.random.default_rng(seed)
    widths = [3, 5, 4, 2]
    params, rescaled, before = [], [], np.ones(3)
    for fan_in, fan_out in itertools.pairwise(widths):
        kernel, bias = rng.normal(size=(fan_in, fan_out)), rng.normal(size=fan_out)
        after = rng.uniform(0.2, 5.0, fan_out) if fan_out != 2 else np.ones(2)
        params.append({"bias": bias, "kernel": kernel})
        rescaled.append({"bias": bias * after, "kernel": kernel / before[:, None] * after})
        before = after
    params, rescaled = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), (params, rescaled))
    batch = tuple(jnp.asarray(rng.normal(size=(7, width)), jnp.float32) for width in (3, 2))
    np.testing.assert_allclose(relu_net(params, batch[0]), relu_net(rescaled, batch[0]), rtol=1e-5, atol=1e-5)
    for score in INVARIANT:
        one, two = (kernels_of(score(p, batch)) for p in (params, rescaled))
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-6 * np.abs(one).max())
        assert np.abs(one).max() > 0
    one, two = (kernels_of(jp.scores.magnitude(p)) for p in (params, rescaled))
    assert not np.allclose(one, two, rtol=1e-3)  # but the magnitude's do


def kernels_of(scores):
    return np.concatenate([np.ravel(layer["kernel"]) for layer in scores])


def _of_gradients(score):
    return jax.jit(lambda params, batch: score(params, grads=jax.grad(relu_loss)(params, batch)))


def _of_loss(score):
    return jax.jit(lambda params, batch: score(params, batch=batch))


INVARIANT = [
    _of_gradients(jp.scores.taylor),
    _of_gradients(jp.scores.snip),
    _of_loss(jp.scores.fisher(relu_loss)),
    _of_loss(jp.scores.obd(relu_loss)),
    _of_loss(jp.scores.brute_force(relu_loss)),
]


# All of them

FACTORIES = {
    "grasp": jp.scores.grasp,
    "fisher": jp.scores.fisher,
    "obd": jp.scores.obd,
    "obs": lambda f, **kw: jp.scores.obs(f, damping=20.0, **kw),
    "brute_force": jp.scores.brute_force,
    "over_batches": lambda f: _as_one_batch(jp.scores.over_batches(jp.scores.signed_taylor, f)),
}


def _as_one_batch(score):
    return lambda params, *, batch, **extra: score(
        params, batches=jax.tree.map(lambda a: a[None], batch), **extra
    )


def strict_loss(params, batch):
    """`loss_fn` where params may be in half precision and nothing is promoted."""
    x, y = batch
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    return jnp.mean((mlp(params, x) - y) ** 2)


@pytest.mark.parametrize("name", FACTORIES)
def test_half_precision_params(name):
    # With the loss computed in float32, bfloat16 params are numbers like others; only gradients round.
    params, batch = problem()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    full = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    score = FACTORIES[name](strict_loss)
    scores, expected = (run(score, p, batch=batch, key=jax.random.key(0)) for p in (half, full))
    assert scores["out"]["kernel"].dtype == jnp.float32
    got, want = kernel_entries(scores), kernel_entries(expected)
    np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02 * np.abs(want).max())


WITH_BATCH = {name: make for name, make in FACTORIES.items() if name != "over_batches"}


@pytest.mark.parametrize("name", WITH_BATCH)
def test_errors_on_use(name):
    params, batch = problem()
    key = jax.random.key(0)
    public = f"scores.{name}"
    score = WITH_BATCH[name](loss_fn)
    with pytest.raises(ValueError, match=f"{public} needs data: pass batch="):
        score(params, key=key)
    with pytest.raises(
        TypeError, match=rf"params\['kernel'\] is complex64\[1, 1\]; {public} differentiates real"
    ):
        score({"kernel": jnp.ones((1, 1), complex)}, batch=batch, key=key)
    with pytest.raises(ValueError, match="matches no leaf"):
        WITH_BATCH[name](loss_fn, where=jp.matching("nothing"))(params, batch=batch, key=key)
    per_example = WITH_BATCH[name](lambda params, batch: mlp(params, batch[0])[:, 0])
    with pytest.raises(
        TypeError, match=rf"{public}: loss_fn returned float32\[\d\], but it must return one real"
    ):
        per_example(params, batch=batch, key=key)
    with pytest.raises(TypeError, match=rf"{public} needs a function loss_fn\(params, batch\), got 3"):
        WITH_BATCH[name](3)


def test_leaves_left_out_are_refused_by_prune_once():
    params, batch = problem()
    with pytest.raises(ValueError, match=r"scores\['in/bias'\] has 4 entries that are NaN"):
        jp.prune_once(params, jp.scores.fisher(loss_fn), 0.5, where=lambda path, leaf: True, batch=batch)
    masks = jp.prune_once(params, jp.scores.fisher(loss_fn), 0.5, batch=batch)
    assert sum(int((~m).sum()) for m in jax.tree.leaves(masks)) == 10


def test_a_leaf_that_is_no_number_may_be_among_the_params():
    params, batch = problem()
    with_count = params | {"count": jnp.int32(3)}
    for score in (jp.scores.grasp(loss_fn), jp.scores.fisher(loss_fn), jp.scores.brute_force(loss_fn)):
        scores = score(with_count, batch=batch)
        np.testing.assert_array_equal(scores["out"]["kernel"], score(params, batch=batch)["out"]["kernel"])
        assert math.isnan(scores["count"])


@pytest.mark.parametrize(
    "batch",
    [(jnp.ones((6, 3)), jnp.ones((5, 2))), (jnp.ones((6, 3)), jnp.float32(1)), (jnp.ones((0, 3)),), (), 3.0],
)
def test_fisher_and_over_batches_need_a_common_leading_axis(batch):
    params, _ = problem()
    with pytest.raises(
        ValueError, match="all leaves of batch must be arrays with a leading axis of examples"
    ):
        jp.scores.fisher(loss_fn)(params, batch=batch)
    with pytest.raises(
        ValueError, match="all leaves of batches must be arrays with a leading axis of batches"
    ):
        jp.scores.over_batches(jp.scores.taylor, loss_fn)(params, batches=batch)


def test_static_arguments_are_checked_when_the_score_is_made():
    for make in (jp.scores.fisher, jp.scores.obd, jp.scores.brute_force):
        for chunk in (0, True, 2.0):
            with pytest.raises((TypeError, ValueError), match="chunk must be an integer of 1 or more"):
                make(loss_fn, chunk=chunk)
    with pytest.raises(ValueError, match=r"samples must be .* got 0"):
        jp.scores.obd(loss_fn, samples=0)
    for damping in (-1.0, math.nan, math.inf, "much"):
        with pytest.raises(ValueError, match="damping to be a number of 0 or more"):
            jp.scores.obs(loss_fn, damping=damping)
    with pytest.raises(TypeError, match=r"scores.over_batches needs a function score"):
        jp.scores.over_batches({}, loss_fn)
    with pytest.raises(TypeError, match=r"scores.over_batches needs a function loss_fn"):
        jp.scores.over_batches(jp.scores.taylor, None)
    params, batch = problem()
    with pytest.raises(ValueError, match=r"scores.obd with samples needs a PRNG key"):
        jp.scores.obd(loss_fn, samples=2)(params, batch=batch)
    with pytest.raises(ValueError, match=r"scores.over_batches needs data: pass batches="):
        jp.scores.over_batches(jp.scores.taylor, loss_fn)(params)
