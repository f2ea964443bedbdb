"""Scores of whole channels, against loops over filters in numpy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

SETTINGS = settings(deadline=None, max_examples=20, derandomize=True)
FILTERS = jp.structures.slices(axis=-1, norm=math.inf)


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def per_channel(leaf, axis=-1):
    """Return the score of each channel, and check that all entries of the channel have it."""
    rows = np.moveaxis(np.asarray(leaf), axis, 0).reshape(leaf.shape[axis], -1)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0]


def gone(mask):
    """Return the pruned channels along the last axis, and check that each is kept or pruned as a whole."""
    rows = np.asarray(mask).reshape(-1, mask.shape[-1])
    assert (rows.any(0) == rows.all(0)).all()
    return set(np.flatnonzero(~rows.all(0)).tolist())


# FPGM


def distances_by_loops(leaf, axis):
    filters = np.moveaxis(np.asarray(leaf, np.float64), axis, 0)
    return [math.fsum(math.sqrt(((one - other) ** 2).sum()) for other in filters) for one in filters]


@SETTINGS
@given(st.sampled_from([(4, 6), (3, 3, 2, 5), (1, 2)]), st.sampled_from([-1, 0, -2]), st.integers(0, 1000))
def test_fpgm_is_the_sum_of_distances_in_loops(shape, axis, seed):
    leaf = normal(shape, seed)
    scores = jp.scores.fpgm({"kernel": leaf, "bias": jnp.ones(3)}, axis=axis)
    np.testing.assert_allclose(per_channel(scores["kernel"], axis), distances_by_loops(leaf, axis), rtol=1e-5)
    assert np.isnan(scores["bias"]).all()


def test_fpgm_tells_near_filters_apart():
    # Far from the origin, where distances from squares and inner products would be lost to cancellation.
    leaf = 1000 + jnp.array([[0.0, 0.25, 0.5, 2.0]])
    scores = per_channel(jp.scores.fpgm({"kernel": leaf})["kernel"])
    assert scores.tolist() == [2.75, 2.25, 2.25, 5.25]


def test_fpgm_prunes_what_lies_amid_the_others_not_what_is_small():
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=2))).T * 3
    kernel = jnp.asarray(np.column_stack([corners + 4, [4.0, 4.0], [0.1, 0.1]]), jnp.float32)
    masks = jp.prune_once({"kernel": kernel}, jp.scores.fpgm, count=1, structure=FILTERS)
    assert gone(masks["kernel"]) == {4}
    by_norm = jp.prune_once({"kernel": kernel}, jp.scores.magnitude, count=1, structure=FILTERS)
    assert gone(by_norm["kernel"]) == {5}


# Scales of norms


PARAMS = {
    "conv": {"bias": jnp.zeros(4), "kernel": normal((3, 3, 2, 4))},
    "bn": {"bias": jnp.zeros(4), "scale": jnp.array([0.5, -2.0, 0.1, 1.0])},
    "dense": {"kernel": normal((4, 3), 1)},
}


def test_bn_scale_is_the_magnitude_of_gamma():
    scores = jp.scores.bn_scale({"conv/kernel": "bn/scale"})(PARAMS)
    assert jax.tree.structure(scores) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(per_channel(scores["conv"]["kernel"]), np.float32([0.5, 2.0, 0.1, 1.0]))
    others = [scores["conv"]["bias"], scores["bn"]["scale"], scores["dense"]["kernel"]]
    assert all(np.isnan(leaf).all() for leaf in others)
    first = jp.scores.bn_scale({"kernel": "scale"}, axis=0)(
        {"kernel": jnp.ones((2, 5)), "scale": jnp.array([-3.0, 1.0])}
    )
    assert per_channel(first["kernel"], axis=0).tolist() == [3.0, 1.0]


def test_leaves_without_scores_are_refused_unless_where_leaves_them_out():
    score = jp.scores.bn_scale({"conv/kernel": "bn/scale"})
    with pytest.raises(ValueError, match=r"scores\['dense/kernel'\] has 12 entries that are NaN"):
        jp.prune_once(PARAMS, score, count=2, structure=FILTERS)
    masks = jp.prune_once(PARAMS, score, count=2, structure=FILTERS, where=jp.matching("conv/kernel"))
    assert gone(masks["conv"]["kernel"]) == {0, 2}


# Activations


@SETTINGS
@given(st.integers(0, 1000), st.sampled_from([(6,), (2, 3, 3), (1,)]))
def test_scores_of_activations_are_loops(seed, leading):
    outputs = np.maximum(np.random.default_rng(seed).normal(size=(*leading, 4)), 0).astype(np.float32)
    given_activations = {"conv/kernel": jnp.asarray(outputs)}
    active, mean = np.zeros(4), np.zeros(4)
    for index in np.ndindex(*outputs.shape):
        active[index[-1]] += outputs[index] > 0
        mean[index[-1]] += float(outputs[index])
    places = math.prod(leading)
    for score, expected in ((jp.scores.apoz, active / places), (jp.scores.mean_activation, mean / places)):
        scores = score(PARAMS, activations=given_activations)
        np.testing.assert_allclose(per_channel(scores["conv"]["kernel"]), expected, rtol=1e-5)
        assert np.isnan(scores["dense"]["kernel"]).all() and np.isnan(scores["conv"]["bias"]).all()


def test_apoz_prunes_the_channel_that_is_mostly_off():
    outputs = jnp.array([[0.0, 9.0, 0.1, 0.0], [5.0, 0.0, 0.1, 7.0], [5.0, 0.0, 0.1, 7.0]])
    inputs = {
        "structure": FILTERS,
        "where": jp.matching("conv/kernel"),
        "activations": {"conv/kernel": outputs},
    }
    rare = jp.prune_once(PARAMS, jp.scores.apoz, count=1, **inputs)
    assert gone(rare["conv"]["kernel"]) == {1}
    faint = jp.prune_once(PARAMS, jp.scores.mean_activation, count=1, **inputs)
    assert gone(faint["conv"]["kernel"]) == {2}


def test_mean_activation_counts_magnitudes():
    scores = jp.scores.mean_activation(
        {"kernel": jnp.ones((2, 1))}, activations={"kernel": jnp.array([[-1.0], [1.0]])}
    )
    assert per_channel(scores["kernel"]).tolist() == [1.0]


# Errors


@pytest.mark.parametrize("score", [jp.scores.apoz, jp.scores.mean_activation])
def test_errors_of_scores_of_activations(score):
    name = f"scores.{score.__name__}"
    with pytest.raises(ValueError, match=f"{name} needs activations"):
        score(PARAMS)
    with pytest.raises(TypeError, match=f"{name} needs a dict by kernel path"):
        score(PARAMS, activations=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=f"{name} got an empty dict"):
        score(PARAMS, activations={})
    with pytest.raises(ValueError, match=rf"{name} names 'conv', which params do not have. .*conv/kernel"):
        score(PARAMS, activations={"conv": jnp.ones((2, 4))})
    for wrong in (jnp.ones((2, 3)), jnp.ones(4), jnp.ones((0, 4))):
        with pytest.raises(
            ValueError, match=rf"{name}: activations\['conv/kernel'\] is float32.* 4 channels"
        ):
            score(PARAMS, activations={"conv/kernel": wrong})
    with pytest.raises(ValueError, match=r"params\['conv/bias'\] is float32\[4\], which has no axis -2"):
        score(PARAMS, activations={"conv/bias": jnp.ones((2, 4))}, axis=-2)


def test_errors_of_bn_scale_and_fpgm():
    with pytest.raises(TypeError, match=r"scores.bn_scale needs a dict by kernel path, got 'bn/scale'"):
        jp.scores.bn_scale("bn/scale")
    with pytest.raises(ValueError, match=r"scores.bn_scale got an empty dict"):
        jp.scores.bn_scale({})
    with pytest.raises(ValueError, match=r"scores.bn_scale names 'conv', which params do not have"):
        jp.scores.bn_scale({"conv": "bn/scale"})(PARAMS)
    with pytest.raises(ValueError, match=r"scores.bn_scale names 'bn/gamma', which params do not have"):
        jp.scores.bn_scale({"conv/kernel": "bn/gamma"})(PARAMS)
    with pytest.raises(
        ValueError, match=r"params\['bn/scale'\] is float32\[4\], but params\['dense/kernel'\] has 3"
    ):
        jp.scores.bn_scale({"dense/kernel": "bn/scale"})(PARAMS)
    with pytest.raises(ValueError, match=r"params\['dense/kernel'\] is float32\[4, 3\], which has no axis 2"):
        jp.scores.fpgm(PARAMS, axis=2)
