"""SynFlow, against sums over paths in numpy, and by the conservation of the flow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def bias_free(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"kernel": jnp.asarray(rng.normal(size=(i, o)), jnp.float32)} for i, o in itertools.pairwise(widths)
    ]


def bias_free_net(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"])
    return x @ params[-1]["kernel"]


@pytest.mark.parametrize("rescale", [False, True])
def test_synflow_conserves_the_flow_through_every_neuron(rescale):
    params = bias_free([5, 7, 6, 3])
    scores = jp.scores.synflow(bias_free_net, jnp.zeros((9, 5)), rescale=rescale)(params)
    scores = [np.asarray(layer["kernel"]) for layer in scores]
    for incoming, outgoing in itertools.pairwise(scores):
        np.testing.assert_allclose(incoming.sum(0), outgoing.sum(1), rtol=1e-5)
    np.testing.assert_allclose([s.sum() for s in scores], scores[0].sum(), rtol=1e-5)


def test_synflow_is_the_sum_over_paths():
    params = bias_free([3, 4, 2])
    first, second = (np.abs(np.asarray(layer["kernel"], np.float64)) for layer in params)
    scores = jp.scores.synflow(bias_free_net, jax.ShapeDtypeStruct((1, 3), jnp.float32), rescale=False)(
        params
    )
    expected = [np.zeros_like(first), np.zeros_like(second)]
    for i, j, k in np.ndindex(3, 4, 2):
        expected[0][i, j] += first[i, j] * second[j, k]
        expected[1][j, k] += first[i, j] * second[j, k]
    for layer, sums in zip(scores, expected, strict=True):
        np.testing.assert_allclose(layer["kernel"], sums, rtol=1e-5)


def test_rescaling_multiplies_all_scores_of_a_sequential_network_by_one_constant():
    def conv_net(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x * params["norm"]["scale"] + params["conv"]["bias"])
        return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]

    rng = np.random.default_rng(0)
    params = {
        "conv": {"bias": rng.normal(size=4), "kernel": rng.normal(size=(3, 3, 2, 4))},
        "head": {"bias": rng.normal(size=3), "kernel": rng.normal(size=(4, 3))},
        "norm": {"scale": rng.normal(size=4)},
    }
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    x = jnp.ones((2, 6, 6, 2))
    plain = jp.scores.synflow(conv_net, x, rescale=False)(params)
    scaled = jp.scores.synflow(conv_net, x)(params)
    ratios = [np.ravel(scaled[p]["kernel"] / plain[p]["kernel"]) for p in ("conv", "head")]
    np.testing.assert_allclose(np.concatenate(ratios), ratios[0][0], rtol=1e-4)
    assert not np.isclose(ratios[0][0], 1, rtol=0.1)
    # Biases are set to 0, scales multiply the flow by their magnitude; neither is scored.
    without = {
        **params,
        "conv": params["conv"] | {"bias": jnp.zeros(4)},
        "norm": {"scale": -params["norm"]["scale"]},
    }
    jax.tree.map(np.testing.assert_array_equal, jp.scores.synflow(conv_net, x)(without), scaled)
    louder = {**params, "norm": {"scale": params["norm"]["scale"].at[0].mul(9.0)}}
    assert not np.allclose(jp.scores.synflow(conv_net, x)(louder)["conv"]["kernel"], scaled["conv"]["kernel"])
    assert all(
        np.isnan(scaled[p][n]).all() for p, n in (("conv", "bias"), ("head", "bias"), ("norm", "scale"))
    )
    # With biases= they can be kept at their magnitude instead.
    flowing = jp.scores.synflow(conv_net, x, biases=lambda path, leaf: False, rescale=False)(params)
    assert not np.allclose(flowing["head"]["kernel"], plain["head"]["kernel"])


def test_synflow_of_a_deep_network_needs_rescaling():
    params = bias_free([30] * 60)
    x = jnp.ones((1, 30))
    with pytest.raises(ValueError, match=r"sum of the outputs is inf.*rescale=True"):
        jp.scores.synflow(bias_free_net, x, rescale=False)(params)
    under_jit = jax.jit(jp.scores.synflow(bias_free_net, x, rescale=False))(params)
    assert np.isnan(under_jit[0]["kernel"]).all()
    scores = jp.scores.synflow(bias_free_net, x)(params)
    totals = [float(layer["kernel"].sum()) for layer in scores]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-3)
    assert 1e-3 < totals[0] < 1e6
    # The same in double precision, as in the paper's code.
    exact = [np.abs(np.asarray(layer["kernel"], np.float64)) for layer in params]
    into, out_of = [np.ones(30)], [np.ones(30)]
    for kernel, back in zip(exact, exact[::-1], strict=True):
        into.append(into[-1] @ kernel)
        out_of.append(back @ out_of[-1])
    for index in (0, 30, 58):
        expected = into[index][:, None] * exact[index] * out_of[58 - index]
        np.testing.assert_allclose(scores[index]["kernel"] / totals[0], expected / expected.sum(), rtol=1e-3)


def test_synflow_says_that_no_path_is_left():
    params = bias_free([3, 4, 2])
    params[1]["kernel"] *= 0
    with pytest.raises(ValueError, match=r"sum of the outputs is 0.*no path leads"):
        jp.scores.synflow(bias_free_net, jnp.ones((1, 3)))(params)


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_synflow_over_rounds_keeps_a_path_where_one_shot_cuts_it():
    params = bias_free([40] * 6 + [4], seed=3)
    score = jp.scores.synflow(bias_free_net, jnp.ones((1, 40)))
    rounds, left = 60, 0.01
    pruner = jp.pruner(score, jp.schedules.geometric(1 - left ** (1 / rounds)), floor=0)
    state = pruner.init(params)
    update = jax.jit(lambda state, params: pruner.update(state, jp.apply_masks(params, state.masks)))
    for _ in range(rounds):
        state = update(state, params)
    kept = jp.apply_masks(params, state.masks)
    assert np.isfinite(score(kept)[0]["kernel"]).all()  # it says so if no path is left
    kept_entries = sum(int((layer["kernel"] != 0).sum()) for layer in kept)
    total = sum(layer["kernel"].size for layer in params)
    assert kept_entries == pytest.approx(left * total, abs=rounds / 2)
    once = jp.prune_once(params, score, count=total - kept_entries, floor=0)
    with pytest.raises(ValueError, match="no path leads"):
        score(jp.apply_masks(params, once))


def test_synflow_refuses_tokens_and_complex_leaves():
    with pytest.raises(TypeError, match=r"scores.synflow needs a function apply_fn"):
        jp.scores.synflow(None, jnp.ones((1, 3)))
    with pytest.raises(TypeError, match=r"real floating-point with a leading batch axis, got int32\[1, 5\]"):
        jp.scores.synflow(bias_free_net, jnp.ones((1, 5), jnp.int32))
    with pytest.raises(
        TypeError, match=r"params\['kernel'\] is complex64\[1, 1\]; scores.synflow needs real"
    ):
        jp.scores.synflow(lambda p, x: x @ p["kernel"], jnp.ones((1, 1)))(
            {"kernel": jnp.ones((1, 1), complex)}
        )


def test_synflow_of_half_precision_params():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), bias_free([5, 7, 6, 3]))
    score = jp.scores.synflow(bias_free_net, jax.ShapeDtypeStruct((1, 5), jnp.bfloat16))
    full = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    expected = jp.scores.synflow(bias_free_net, jnp.ones((1, 5)))(full)
    for layer, exact in zip(score(params), expected, strict=True):
        assert layer["kernel"].dtype == jnp.float32
        np.testing.assert_allclose(layer["kernel"], exact["kernel"], rtol=0.05)
