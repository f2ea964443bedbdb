"""Narrow floats: scores rank as in float32, 8-bit leaves are pruned, and float16 optimizers stay finite."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp
from jaxprune.pruning.once import pool
from jaxprune.pruning.scoring import score_and_recompute
from jaxprune.structures import elements
from jaxprune.tracing.guard import divides_by_zero
from jaxprune.tree.dtypes import common_dtype, is_narrow, rounds_to_zero
from tests.support.profile import examples

EIGHT_BITS = [
    jnp.float8_e3m4,
    jnp.float8_e4m3,
    jnp.float8_e4m3b11fnuz,
    jnp.float8_e4m3fn,
    jnp.float8_e4m3fnuz,
    jnp.float8_e5m2,
    jnp.float8_e5m2fnuz,
    jnp.float4_e2m1fn,
]
NARROW = [jnp.float16, jnp.float8_e4m3fn]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, expected)


# Scores


def test_taylor_in_float16_does_not_vanish():
    params = {"kernel": jnp.array([[4e-3, 3e-3, 2e-3, 1e-3]], jnp.float16)}
    grads = {"kernel": jnp.full((1, 4), 2e-6, jnp.float16)}
    for prune in (jp.prune_once, jax.jit(jp.prune_once, static_argnames=("scores", "sparsity"))):
        masks = prune(params, jp.scores.taylor, grads=grads, sparsity=0.5)
        assert masks["kernel"].tolist() == [[True, True, False, False]]


halves = hnp.arrays(np.float16, (3, 4), elements=st.floats(-1, 1, width=16))


@given(halves, halves)
@examples(60)
def test_taylor_of_float16_ranks_exact_products(weights, grads):
    # Products of two float16 numbers are exact in float64, and far above where float32 rounds to 0.
    size = np.abs(weights.astype(np.float64) * grads.astype(np.float64)).astype(np.float32).ravel()
    expected = np.ones(12, bool)
    expected[np.argsort(size, kind="stable")[:6]] = False
    got = jp.prune_once(
        {"w": jnp.asarray(weights)}, jp.scores.taylor, grads={"w": jnp.asarray(grads)}, sparsity=0.5
    )
    assert np.asarray(got["w"]).ravel().tolist() == expected.tolist()


PARAMS = {
    "a": {"kernel": normal(1, 4, 6) * 1e-2, "bias": normal(2, 6) * 1e-3},
    "b": {"kernel": normal(3, 6, 2)},
}
SMALL = jax.tree.map(lambda leaf: leaf * 1e-3, {"a": PARAMS["a"], "b": {"kernel": normal(4, 6, 2)}})
X = normal(5, 8, 4) * 1e-2


def network(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def loss(params, x):
    return jnp.mean(network(params, x) ** 2)


GIVEN = {"x": X, "grads": SMALL, "activations": {"a/kernel": normal(6, 9, 6)}}


def of_grads(score):
    return lambda params, given: score(params, grads=given["grads"])


def of_loss(factory, **options):
    return lambda params, given: factory(loss, **options)(params, batch=given["x"], key=jax.random.key(0))


OF_WEIGHTS = {
    "magnitude": lambda params, _: jp.scores.magnitude(params),
    "normalized_magnitude": lambda params, _: jp.scores.normalized_magnitude(params),
    "lamp": lambda params, _: jp.scores.lamp(params),
    "fpgm": lambda params, _: jp.scores.fpgm(params),
    "bn_scale": lambda params, _: jp.scores.bn_scale({"a/kernel": "a/bias"})(params),
    "mean_activation": lambda params, given: jp.scores.mean_activation(
        params, activations=given["activations"]
    ),
}
OF_GRADS = {
    score.__name__: of_grads(score)
    for score in (
        *(jp.scores.gradient_magnitude, jp.scores.taylor, jp.scores.signed_taylor),
        *(jp.scores.snip, jp.scores.movement),
    )
}
OF_A_FUNCTION = {
    "grasp": of_loss(jp.scores.grasp),
    "fisher": of_loss(jp.scores.fisher),
    "obd": of_loss(jp.scores.obd),
    "obs": of_loss(jp.scores.obs, damping=1.0),
    "brute_force": of_loss(jp.scores.brute_force),
    "over_batches": lambda params, given: jp.scores.over_batches(jp.scores.taylor, loss)(
        params, batches=given["x"][None]
    ),
    "synflow": lambda params, given: jp.scores.synflow(network, given["x"])(params),
}
SCORES = OF_WEIGHTS | OF_GRADS | OF_A_FUNCTION


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in SCORES for dtype in NARROW),
        # A function of bfloat16 params is computed, and differentiated, in bfloat16.
        *((name, jnp.bfloat16) for name in OF_WEIGHTS | OF_GRADS),
    ],
)
def test_scores_of_narrow_floats_are_those_of_the_same_numbers_in_float32(name, dtype):
    params, given = cast(PARAMS, dtype), cast(GIVEN, dtype)
    wide = cast(given, jnp.float32)
    expected = SCORES[name](cast(params, jnp.float32), wide)
    # Gradients may be wider than the params.
    for got in [SCORES[name](params, given), *([SCORES[name](params, wide)] if name in OF_GRADS else [])]:
        exact = name in ("magnitude", "gradient_magnitude")  # in the dtype that they are given in
        same(cast(got, jnp.float32) if exact else got, expected)


def test_scores_of_wide_floats_are_what_they_were_to_the_bit():
    with jax.enable_x64(True):
        for dtype in (np.float32, np.float64):
            w, g = (np.asarray(normal(seed, 5, 7), dtype) for seed in (1, 2))
            got = jp.scores.taylor({"w": jnp.asarray(w)}, grads={"w": jnp.asarray(g)})["w"]
            np.testing.assert_array_equal(got, np.abs(w * g), strict=True)
        w = jnp.array([3 + 4j, 1j])
        np.testing.assert_allclose(jp.scores.taylor({"w": w}, grads={"w": w})["w"], [25.0, 1.0])


def test_a_loss_that_takes_no_other_dtype_is_called_with_its_own():
    constant = jnp.ones((2, 1, 3, 3), jnp.float16)

    def conv(params, x):  # lax convolves equal dtypes alone
        return jnp.mean(jax.lax.conv_general_dilated(constant, params["kernel"], (1, 1), "SAME") ** 2)

    params = {"kernel": normal(0, 1, 1, 3, 3).astype(jnp.float16)}
    masks = jp.prune_once(params, jp.scores.fisher(conv), sparsity=0.5, batch=jnp.ones((2, 1)))
    assert int(masks["kernel"].sum()) == 5  # the nine entries less half, rounded to even


def test_an_error_of_the_loss_is_its_own():
    def wrong(params, x):
        raise KeyError("nothing of that name")

    with pytest.raises(KeyError, match="nothing of that name"):
        jp.scores.fisher(wrong)(cast(PARAMS, jnp.float16), batch=X, grads=None, key=None)


@pytest.mark.parametrize(
    ("dtype", "ranked"),
    [
        (jnp.float32, jnp.float32),
        (jnp.float16, jnp.float16),
        (jnp.bfloat16,) * 2,
        (jnp.float8_e5m2, jnp.bfloat16),
    ],
)
def test_magnitudes_are_ranked_in_as_few_bits_as_hold_them(dtype, ranked):
    def ranks(params):
        tree, recipes = score_and_recompute(jp.scores.magnitude, params)
        units = pool(tree, jp.ones_masks(params), ["kernel"], elements(), recipes, True)
        # A selection reads what is traced by a source, and else the scores themselves.
        read = units.sources["kernel"].part if units.sources else units.scores["kernel"]
        return jnp.zeros((), read.dtype)

    params = {"kernel": jnp.ones((2, 2), dtype)}
    assert ranks(params).dtype == jax.eval_shape(ranks, params).dtype == ranked


# 8 bits


STRUCTURES = {
    "elements": lambda: None,
    "slices": lambda: jp.structures.slices(axis=-1, norm=2),
    "blocks": lambda: jp.structures.blocks((2, 2)),
    "nm": lambda: jp.structures.nm(2, 4),
}


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_leaves_of_8_bits_are_pruned_as_their_numbers(dtype):
    params = {"a": {"kernel": normal(0, 8, 8)}, "b": {"kernel": normal(1, 8, 4)}}
    params = cast(params, dtype)
    wide = cast(params, jnp.float32)
    for scope in ("global", "layerwise"):
        for make in STRUCTURES.values() if dtype == jnp.float8_e4m3fn else [STRUCTURES["elements"]]:
            options = {"sparsity": 0.5, "scope": scope, "structure": make()}
            masks = jp.prune_once(params, jp.scores.magnitude, **options)
            same(masks, jp.prune_once(wide, jp.scores.magnitude, **options))
    traced = jax.jit(lambda p: jp.prune_once(p, jp.scores.magnitude, sparsity=0.5))(params)
    same(traced, jp.prune_once(wide, jp.scores.magnitude, sparsity=0.5))
    pruned = jp.apply_masks(params, traced)
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype(dtype)}
    jp.check_pruned(pruned, traced)
    assert jp.metrics.nonzeros(traced) == 48


def test_8_bits_throughout():
    params = {"a": normal(0, 8, 8), "b": normal(1, 8, 4)}
    narrow = cast(params, jnp.float8_e4m3fn)
    wide = cast(narrow, jnp.float32)
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.5))
    same(jp.prune_rounds(narrow, pruner, 2), jp.prune_rounds(wide, pruner, 2))
    same(jax.jit(lambda p: jp.prune_rounds(p, pruner, 2))(narrow), jp.prune_rounds(wide, pruner, 2))
    kept = jp.pruner(jp.scores.magnitude, 0.5, memory=0.5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(kept.init(narrow).scores))
    same(kept.update(kept.init(narrow), narrow).masks, kept.update(kept.init(wide), wide).masks)
    same(
        jp.budget(jp.metrics.nonzeros, narrow, at_most=40).masks,
        jp.budget(jp.metrics.nonzeros, wide, at_most=40).masks,
    )
    masks = jp.prune_once(narrow, jp.scores.magnitude, sparsity=0.5)
    moving = jp.rigl(masks, every=1, end_step=9)
    grads = {"a": normal(2, 8, 8), "b": normal(3, 8, 4)}
    move = lambda p: moving.update(moving.init(p), p, cast(grads, p["a"].dtype)).masks  # noqa: E731
    assert jp.metrics.nonzeros(move(narrow)) == jp.metrics.nonzeros(masks)
    total = lambda p, decay: jnp.sum(jp.straight_through(p, masks, decay)["a"].astype(jnp.float32))  # noqa: E731
    slope = jax.grad(total)(narrow, 0.5)["a"]
    assert slope.dtype == jnp.float8_e4m3fn
    expected = jax.grad(total)(wide, 0.5)["a"].astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(slope.astype(jnp.float32), expected.astype(jnp.float32))
    measure = lambda p: jnp.sum(p["a"].astype(jnp.float32) ** 2)  # noqa: E731
    assert jp.error_barrier(measure, narrow, narrow) == pytest.approx(0.0, abs=1e-4)
    tx = jp.keep_masked(optax.sgd(0.5), masks)
    updates, _ = tx.update(cast(grads, jnp.float8_e4m3fn), tx.init(narrow), narrow)
    jp.check_pruned(optax.apply_updates(narrow, updates), masks)


def test_a_mixed_tree_of_8_bits_and_more():
    params = {
        "a": normal(0, 4, 4).astype(jnp.float8_e5m2),
        "b": normal(1, 4, 4),
        "c": normal(2, 4, 4).astype(jnp.bfloat16),
    }
    wide = cast(params, jnp.float32)
    for run in (lambda f: f, jax.jit):
        got = run(lambda p: jp.prune_once(p, jp.scores.magnitude, sparsity=0.5))(params)
        same(got, jp.prune_once(wide, jp.scores.magnitude, sparsity=0.5))


def test_scores_that_are_not_finite_in_8_bits_are_refused():
    leaf = jnp.array([[1.0, jnp.nan], [2.0, 3.0]]).astype(jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scores\['kernel'\] has 1 entries that are NaN or inf"):
        jp.prune_once({"kernel": leaf}, jp.scores.magnitude, sparsity=0.5)
    # Under jit an update with such scores leaves the masks alone; one with finite scores does not.
    pruner = jp.pruner(jp.scores.magnitude, 0.5)
    update = jax.jit(pruner.update)
    for params, kept in (({"kernel": leaf}, 4), ({"kernel": leaf.at[0, 1].set(5)}, 2)):
        assert int(update(pruner.init(params), params).masks["kernel"].sum()) == kept


def test_a_dtype_without_a_zero_is_refused_by_path():
    params = {"kernel": jnp.ones((2, 2)), "scales": {"kernel": jnp.ones((2, 2), jnp.float8_e8m0fnu)}}
    with pytest.raises(
        TypeError, match=r"params\['scales/kernel'\] is float8_e8m0fnu\[2, 2\], a dtype without a zero"
    ):
        jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, where=jp.matching("kernel"))
    same(jp.apply_masks(params, masks)["scales"]["kernel"], params["scales"]["kernel"])
    masks["scales"]["kernel"] = jnp.zeros((2, 2), bool)
    with pytest.raises(ValueError, match=r"masks\['scales/kernel'\] prunes entries of .*cannot be 0"):
        jp.apply_masks(params, masks)


def test_dtypes():
    assert common_dtype(jnp.float8_e5m2, jnp.float32) == jnp.float32
    with jax.numpy_dtype_promotion("strict"):
        assert common_dtype(jnp.float8_e5m2, jnp.float8_e4m3fn) == jnp.bfloat16
        assert common_dtype(jnp.float16, jnp.bfloat16) == jnp.float32
    assert [is_narrow(d) for d in (jnp.float16, jnp.float32, jnp.int8)] == [True, False, False]
    assert [rounds_to_zero(d) for d in (jnp.float16, jnp.bfloat16, jnp.float32)] == [True, False, False]


# Optimizers in float16


CHAINS = {
    "adam, global norm": lambda: optax.chain(
        optax.scale_by_adam(), optax.clip_by_global_norm(0.5), optax.scale(-0.1)
    ),
    "adam, clip": lambda: optax.chain(optax.scale_by_adam(), optax.clip(0.3), optax.scale(-0.1)),
    "rms, global norm": lambda: optax.chain(
        optax.scale_by_rms(), optax.clip_by_global_norm(0.5), optax.scale(-0.1)
    ),
    "rss, normalized": lambda: optax.chain(
        optax.scale_by_rss(eps=0.0), optax.normalize_by_update_norm(), optax.scale(-0.1)
    ),
    "every other step": lambda: optax.MultiSteps(
        optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(0.5), optax.scale(-0.1)), 2
    ).gradient_transformation(),
    "if finite": lambda: optax.apply_if_finite(
        optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(0.5), optax.scale(-0.1)), 3
    ),
}
WEIGHTS = {"kernel": normal(1, 6, 5), "bias": normal(2, 5)}
MASKS = jp.prune_once(WEIGHTS, jp.scores.magnitude, sparsity=0.6)


def gradients(step):
    drawn = {"kernel": normal(10 + step, 6, 5), "bias": normal(20 + step, 5)}
    # Neither they nor their means are so small that their squares are 0 in float16, which the dense
    # optimizer divides by itself.
    return jax.tree.map(lambda g, w: jnp.sign(w) * jnp.maximum(jnp.abs(g), 0.1), drawn, WEIGHTS)


def survivors(tree):
    """The entries that the masks keep, as a tree of its own: the masked network without its zeros."""
    return jax.tree.map(lambda leaf, mask: leaf[np.asarray(mask)], tree, MASKS)


def trained(tx, params, of, jit, steps=4):
    state: Any = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for step in range(steps):
        updates, state = update(of(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_survivors_train_in_float16_as_the_optimizer_trains_them_alone(name, jit):
    params = jp.apply_masks(cast(WEIGHTS, jnp.float16), MASKS)
    half = lambda step: cast(gradients(step), jnp.float16)  # noqa: E731
    got, state = trained(jp.keep_masked(CHAINS[name](), MASKS), params, half, jit)
    alone, _ = trained(CHAINS[name](), survivors(params), lambda step: survivors(half(step)), True)
    jp.check_pruned(got, MASKS)
    for leaf, expected in zip(*map(jax.tree.leaves, (survivors(got), alone)), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(leaf, expected, rtol=0.02, atol=2e-3)
    for leaf in jax.tree.leaves(state.inner):
        assert not jnp.issubdtype(leaf.dtype, jnp.inexact) or np.isfinite(leaf).all()


def test_survivors_stay_finite_while_a_schedule_prunes_and_rigl_moves():
    params = cast(WEIGHTS, jnp.float16)
    half = lambda step: cast(gradients(step), jnp.float16)  # noqa: E731
    pruners = (
        jp.pruner(jp.scores.taylor, jp.schedules.linear(0.8, begin_step=1, end_step=4)),
        jp.rigl(MASKS, every=2, end_step=9),
    )
    for pruner in pruners:
        tx = jp.wrap_optax(CHAINS["adam, global norm"](), pruner)
        got, state = trained(tx, params, half, True, 6)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
        jp.check_pruned(got, state.pruner.masks)


def test_an_epsilon_of_0_in_float32_under_jit():
    chain = lambda: optax.chain(optax.scale_by_adam(eps=0.0), optax.clip_by_global_norm(0.5))  # noqa: E731
    params = jp.apply_masks(WEIGHTS, MASKS)
    got, _ = trained(jp.keep_masked(chain(), MASKS), params, gradients, True)
    alone, _ = trained(chain(), survivors(params), lambda step: survivors(gradients(step)), True)
    for leaf, expected in zip(*map(jax.tree.leaves, (survivors(got), alone)), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "divides"), [(jnp.float16, True), (jnp.bfloat16, False), (jnp.float32, False)]
)
def test_an_optimizer_is_run_anew_only_where_it_divides_0_by_0(dtype, divides):
    tx = CHAINS["adam, global norm"]()
    params = {"w": jnp.ones(3, dtype)}
    state = tx.init(params)
    closed = jax.make_jaxpr(tx.update)(params, state, params)
    leaves = jax.tree.leaves((params, state, params))
    zeros = [frozenset((0,)) if leaf.shape else frozenset[int]() for leaf in leaves]
    found, outputs = divides_by_zero(closed, zeros)
    assert found == divides
    assert len(outputs) == len(closed.jaxpr.outvars)


def test_an_optimizer_that_looks_at_values_runs_outside_jit_in_float16():
    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g if float(jnp.max(g)) < math.inf else 0 * g, updates), state

    tx = jp.keep_masked(optax.GradientTransformation(lambda params: optax.EmptyState(), update), MASKS)
    params = jp.apply_masks(cast(WEIGHTS, jnp.float16), MASKS)
    got, _ = trained(tx, params, lambda step: cast(gradients(step), jnp.float16), False, 1)
    jp.check_pruned(got, MASKS)
