"""Sizes, summaries, activations, overlaps and times."""

import csv
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp
from experiments.networks.small import LeNet

metrics = jp.metrics


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.sampled_from([(3, 4), (0, 2)]), elements=st.sampled_from([0, -0.0, 1])))
def test_sizes_of_one_array(array):
    kept = int((array != 0).sum())
    assert metrics.nonzeros(array) == kept
    found = metrics.sparsity(array)
    assert found.prunable == found.model == (1 - kept / array.size if array.size else 0)
    expected = array.size / kept if kept else math.inf if array.size else 1
    assert metrics.compression(array) == (expected, expected)


def test_a_vector_alone_counts_as_prunable():
    assert metrics.sparsity(np.array([0.0, 1.0])) == (0.5, 0.5)
    assert metrics.density(np.array([0.0, 1.0, 2.0, 3.0])).prunable == 0.75


def test_compression_counts_what_cannot_be_pruned():
    """ShrinkBench: all parameters over those that are left, biases included."""
    params = {"kernel": jnp.ones((10, 10)), "bias": jnp.ones(20)}
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.9)
    assert metrics.compression(masks) == (10, 120 / 30)


def lenet():
    network, image = LeNet(im2col=False), jnp.zeros((1, 28, 28, 1))
    params = network.init(jax.random.key(0), image)["params"]
    return lambda params, x: network.apply({"params": params}, x), params, image


def test_the_summary_of_lenet():
    """Half of the outputs of conv1, conv2 and fc1 leave 5,675 params and 156,250 multiply-adds."""
    apply_fn, params, image = lenet()
    groups = jp.channel_groups(apply_fn, params, image)
    prune = jp.pruner(jp.scores.magnitude, 0.5, structure=jp.structures.channels(groups), scope="layerwise")
    masks = jax.jit(lambda params: prune.update(prune.init(params), params).masks)(params)
    found = metrics.summary(apply_fn, params, image, masks=masks)
    whole = found.rows[-1]
    assert (whole.path, whole.size, whole.macs) == ("whole model", 21_840, 480_500)
    assert whole.kept == sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    assert (whole.masked, whole.small) == (156_250, 156_250)
    assert found.speed_up == found.small_speed_up == 480_500 / 156_250
    assert found.small_compression == 21_840 / 5_675
    by_path = {row.path: row for row in found.rows}
    assert by_path["conv1/kernel"][1:] == ((5, 5, 1, 10), 250, 125, 144_000, 72_000, 72_000)
    assert by_path["conv1/kernel"].sparsity == 0.5
    assert by_path["4 other params"].size == 90
    assert by_path["prunable"].size == 21_750

    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("480,500 for these inputs", "conv2/kernel", "480.5K", "3.85 x fewer entries"):
        assert part in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["rows"][-1]["macs"] == plain["macs"] == 480_500
    table = list(csv.reader(io.StringIO(found.to_csv())))
    assert len(table) == 1 + len(found.rows)
    assert table[-1] == [
        "whole model",
        "",
        "21840",
        str(whole.kept),
        f"{whole.sparsity:.6f}",
        "480500",
        "156250",
        "156250",
    ]
    lines = found.to_markdown().splitlines()
    assert {line.count("|") for line in lines} == {9}
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == table[-1]


def test_a_summary_without_masks():
    apply_fn, params, image = lenet()
    params["fc1"]["kernel"] = params["fc1"]["kernel"].at[:160].set(0)
    found = metrics.summary(apply_fn, params, image)
    rows = {row.path: row for row in found.rows}
    assert rows["fc1/kernel"].kept == 8_000
    assert rows["4 other params"].kept == 90
    assert found.masked is found.small is rows["whole model"].masked is None
    assert "masked" not in str(found).split("\n", 1)[1]
    assert metrics.summary(apply_fn, jax.eval_shape(lambda: params), image).rows[-1].kept == 21_840


def test_a_summary_says_why_there_is_no_smaller_network():
    def apply_fn(params, x):
        return jnp.sort(x @ params["hidden"]) @ params["out"]

    params = {"hidden": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
    masks = jp.ones_masks(params) | {"hidden": jnp.ones((3, 4), bool).at[:, 0].set(False)}
    found = metrics.summary(apply_fn, params, jnp.ones((1, 3)), masks=masks)
    assert found.rows[-1].small == found.rows[-1].macs  # sort needs all of them: nothing goes
    off = metrics.summary(apply_fn, params, jnp.ones((1, 3)), masks=masks, compacted=False)
    assert off.small is None
    with pytest.raises(ValueError, match="masks"):
        metrics.summary(apply_fn, params, jnp.ones((1, 3)), masks={"hidden": masks["hidden"]})


def test_xla_counts_twice_the_multiply_adds():
    apply_fn, params, image = lenet()
    product = metrics.cost(lambda w, x: x @ w, jnp.ones((30, 20)), jnp.ones((10, 30)))
    assert product.flops == 2 * 6000
    found = metrics.summary(apply_fn, params, image, xla=True).xla[0]
    assert 2 * 480_500 < found.flops < 1.2 * 2 * 480_500  # elementwise work besides
    assert found.peak_memory >= found.arguments >= 4 * 21_840
    assert found.arguments == 4 * (21_840 + 28 * 28)


def test_activations_are_counted_where_they_are_made():
    w = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)

    @jax.jit
    def apply_fn(params, x):
        h = jax.nn.relu(x @ params["w"]).reshape(2, 10)
        return jnp.where(h > 1, h, 0.0) + jax.nn.relu(params["w"]).sum()

    relu, cut = metrics.activation_sparsity(apply_fn, {"w": w}, x)
    hidden = np.maximum(x @ w, 0)
    assert (relu.name, relu.shape, relu.zeros, relu.size) == ("relu", (4, 5), int((hidden == 0).sum()), 20)
    assert relu.source.startswith("test_metrics.py:")
    assert (cut.shape, cut.zeros) == ((2, 10), int((hidden <= 1).sum()))
    everything = metrics.activation_sparsity(apply_fn, {"w": w}, x, everything=True)
    assert [one.name for one in everything][:2] == ["dot_general", "relu"]
    text = str(everything)
    assert f"{relu.sparsity:.4f}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_activations_inside_scans_and_checkpoints():
    w = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)

    def apply_fn(w, x):
        layer = jax.checkpoint(lambda x, w: (jax.nn.relu(x @ w), None))
        return jax.lax.scan(layer, x, w)[0]

    (relu,) = metrics.activation_sparsity(apply_fn, w, x)
    zeros, h = 0, x
    for step in w:
        h = np.maximum(h @ step, 0)
        zeros += int((h == 0).sum())
    assert (relu.name, relu.shape, relu.zeros) == ("relu", (3, 2, 4), zeros)
    with pytest.raises(ValueError, match="params and inputs"):
        metrics.activation_sparsity(apply_fn, w)


masks_of = hnp.arrays(bool, (3, 4))


@settings(deadline=None)
@given(masks_of, masks_of, hnp.arrays(bool, (2, 5)), hnp.arrays(bool, (2, 5)))
def test_overlap_is_what_sets_say(a, b, c, d):
    found = metrics.overlap(
        {"x": {"kernel": a}, "y": {"kernel": c}}, {"x": {"kernel": b}, "y": {"kernel": d}}
    )
    one, other = (set(np.flatnonzero(np.concatenate([p.ravel(), q.ravel()]))) for p, q in ((a, c), (b, d)))
    both = found["prunable"]
    assert (both.both, both.either, both.size) == (len(one & other), len(one | other), 22)
    assert both.jaccard == (len(one & other) / len(one | other) if one | other else 1)
    assert both.hamming == len(one ^ other) / 22
    assert found["x/kernel"].both == np.count_nonzero(a & b)
    assert both.chance == pytest.approx(a.sum() * b.sum() / 12 + c.sum() * d.sum() / 10)


def test_chance_is_what_shuffled_masks_share():
    rng = np.random.default_rng(0)
    a, b = np.arange(200) < 60, np.arange(200) < 90
    found = metrics.overlap({"kernel": a.reshape(10, 20)}, {"kernel": b.reshape(10, 20)})["prunable"]
    shared = [np.count_nonzero(rng.permutation(a) & b) for _ in range(4000)]
    assert found.chance == 27
    assert abs(np.mean(shared) - found.chance) < 4 * found.deviation / math.sqrt(4000)
    assert abs(np.std(shared) / found.deviation - 1) < 0.05


def test_overlap_asks_for_masks():
    masks = {"kernel": jnp.ones((2, 2), bool)}
    with pytest.raises(TypeError, match="bool"):
        metrics.overlap(masks, {"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="masks"):
        metrics.overlap(masks, {"other": jnp.ones((2, 2), bool)})


def test_latency_measures_each_call():
    w, x = jnp.ones((300, 300)), jnp.ones((50, 300))
    many = lambda x, w: jax.lax.fori_loop(0, 200, lambda _, h: h @ w / 300, x)  # noqa: E731
    found = metrics.latency({"many": (many, x, w), "one": (jnp.dot, x, w)}, rounds=3, donate=(0,))
    assert found["many"].median > 5 * found["one"].median
    assert {time.rounds for time in found.values()} == {3}
    assert not x.is_deleted()
    assert metrics.latency({"flag": (lambda x, on: x + 1 if on else x, x, True)}, rounds=1)["flag"].low > 0
    with pytest.raises(ValueError, match="rounds"):
        metrics.latency({"one": (jnp.dot, x, w)}, rounds=0)
    with pytest.raises(ValueError, match="donate"):
        metrics.latency({"one": (jnp.dot, x, w)}, donate=(2,))
