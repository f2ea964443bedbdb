"""Scores from statistics of inputs, against the matrices that these are of, in numpy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.support.statistics import StandIn, layer

LAYOUTS = {
    "in x out": ((6, 4), (0,), {}),
    "out x in": ((4, 6), (1,), {}),
    "convolution": ((3, 2, 2, 5), (0, 1, 2), {"group": 2}),
    "heads read": ((2, 3, 5), (0, 1), {}),
    "heads written": ((6, 2, 3), (0,), {}),
    "heads first": ((2, 6, 3), (1,), {}),
    "experts": ((3, 4, 5), (1,), {"batch": (0,)}),
    "stacked": ((2, 4, 5), (1,), {"stack": (0,)}),
    "stacked in the middle": ((4, 2, 5), (0,), {"stack": (1,)}),
    "stacked experts": ((2, 3, 4, 5), (3,), {"stack": (0,), "batch": (1,)}),
}
SCORES = {
    "wanda": lambda w, x, h: abs(w) * np.sqrt((x**2).sum(0))[:, None],
    "ria": lambda w, x, h: (
        (abs(w) / abs(w).sum(0, keepdims=True) + abs(w) / abs(w).sum(1, keepdims=True))
        * np.sqrt(np.linalg.norm(x, axis=0))[:, None]
    ),
    "flap": lambda w, x, h: w**2 * x.var(0)[:, None],
    "obs_diagonal": lambda w, x, h: w**2 / np.diag(np.linalg.inv(h))[:, None],
}


def problem(name, statistics="gram", damping=0.01):
    """Return params with one kernel among other leaves, its layer and the statistics."""
    shape, contracted, known = LAYOUTS[name]
    rng = np.random.default_rng(len(name))
    mine = layer(rng, shape, contracted, **known)
    params = {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32), "scale": jnp.ones(shape[-1])}
    return params, mine, StandIn({"kernel": mine}, statistics, damping)


def by_matrix(mine, leaf, score, damping=0.01):
    """Apply `score(w, x, h)` to each matrix of inputs x outputs in a leaf, and put back what it gives."""
    rest = [a for a in range(leaf.ndim) if a not in (*mine.apart, *mine.contracted)]
    order = (*mine.apart, *mine.contracted, *rest)
    front = np.transpose(np.asarray(leaf, np.float64), order)
    apart = [leaf.shape[a] for a in mine.apart]
    inputs = int(np.prod([leaf.shape[a] for a in mine.contracted]))
    found = np.zeros(front.shape)
    for index in np.ndindex(*apart):
        w = front[index].reshape(inputs, -1)
        found[index] = score(w, mine.x[index], mine.gram(damping)[index]).reshape(front[index].shape)
    return np.transpose(found, np.argsort(order))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_the_papers(layout):
    params, mine, stats = problem(layout)
    for name, by_hand in SCORES.items():
        scores = getattr(jp.scores, name)(params, stats=stats)
        assert scores["kernel"].dtype == jnp.float32 and np.isnan(scores["scale"]).all()
        expected = by_matrix(mine, params["kernel"], by_hand)
        np.testing.assert_allclose(scores["kernel"], expected, rtol=2e-5)


def test_wanda_is_what_an_output_changes_by():
    params, mine, stats = problem("out x in")
    w, scores = np.asarray(params["kernel"], np.float64), jp.scores.wanda(params, stats=stats)["kernel"]
    for i, j in np.ndindex(*w.shape):
        without = w.copy()
        without[i, j] = 0
        np.testing.assert_allclose(scores[i, j], np.linalg.norm(mine.x @ (w - without).T), rtol=1e-5)


def test_obs_diagonal_is_what_is_left_after_the_others_adapt():
    params, mine, _ = problem("in x out")
    stats = StandIn({"kernel": mine}, damping=0.0)
    w, scores = (
        np.asarray(params["kernel"], np.float64),
        jp.scores.obs_diagonal(params, stats=stats)["kernel"],
    )
    for j, i in np.ndindex(*w.shape):
        others = np.delete(mine.x, j, axis=1)
        least = np.linalg.lstsq(others, mine.x @ w[:, i], rcond=None)[1]
        np.testing.assert_allclose(scores[j, i], least[0], rtol=1e-4)


def test_flap_sums_to_the_fluctuation_of_an_input():
    params, mine, stats = problem("in x out")
    rows = jp.structures.slices(axis=-2, norm=1)
    masks = jp.prune_once(params, jp.scores.flap, count=3, structure=rows, stats=stats)
    fluctuation = mine.x.var(0) * (np.asarray(params["kernel"], np.float64) ** 2).sum(1)
    assert np.flatnonzero(~np.asarray(masks["kernel"]).any(1)).tolist() == sorted(np.argsort(fluctuation)[:3])


def test_powers_of_the_norm():
    params, mine, stats = problem("in x out")
    plain, squared = (jp.scores.ria(params, stats=stats, power=power)["kernel"] for power in (0, 2))
    np.testing.assert_allclose(squared / plain, (mine.x**2).sum(0)[:, None] * np.ones((6, 4)), rtol=1e-5)


def test_an_input_or_output_of_zeros_scores_zero():
    params, _, stats = problem("in x out")
    params["kernel"] = params["kernel"].at[2].set(0).at[:, 1].set(0)
    for name in SCORES:
        scores = getattr(jp.scores, name)(params, stats=stats)["kernel"]
        assert np.isfinite(scores).all() and not scores[2].any() and not scores[:, 1].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_half_precision_is_scored_in_float32(dtype):
    params, _, stats = problem("convolution")
    half = {path: leaf.astype(dtype) for path, leaf in params.items()}
    exact = {path: leaf.astype(jnp.float32) for path, leaf in half.items()}
    for name in SCORES:
        score = getattr(jp.scores, name)
        ours = score(half, stats=stats)["kernel"]
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, score(exact, stats=stats)["kernel"])


def test_under_jit():
    params, _, stats = problem("experts")
    for name in SCORES:
        score = getattr(jp.scores, name)
        ours = jax.jit(lambda p, s, score=score: score(p, stats=s))(params, stats)
        np.testing.assert_allclose(ours["kernel"], score(params, stats=stats)["kernel"], rtol=1e-6)


def test_statistics_that_do_not_fit():
    params, _, stats = problem("in x out", "norms")
    with pytest.raises(ValueError, match=r"scores.obs_diagonal needs Gram matrices.*statistics='gram'"):
        jp.scores.obs_diagonal(params, stats=stats)
    for name in SCORES:
        score = getattr(jp.scores, name)
        with pytest.raises(ValueError, match=rf"scores.{name} needs statistics.*stats=jaxprune.calibrate\("):
            score(params)
        with pytest.raises(TypeError, match=r"stats must be what jaxprune\.calibrate returns, got 3"):
            score(params, stats=3)
    with pytest.raises(ValueError, match="the statistics are of kernel, which the params do not have"):
        jp.scores.wanda({"weight": params["kernel"]}, stats=stats)
    with pytest.raises(ValueError, match=r"statistics of 'kernel' have the shape \(6, 1\)"):
        jp.scores.wanda({"kernel": params["kernel"].T}, stats=stats)
    for power in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="power must be a finite number of 0 or more"):
            jp.scores.ria(params, stats=stats, power=power)
