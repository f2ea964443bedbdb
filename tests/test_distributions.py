"""Distributions: targets by path."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.support.statistics import StandIn, layer

SETTINGS = settings(deadline=None, max_examples=100, derandomize=True)

shapes = st.lists(
    st.lists(st.integers(1, 512), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
).map(lambda found: {f"layer{i}": {"kernel": shape, "bias": shape[-1:]} for i, shape in enumerate(found)})
sparsities = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]) | st.floats(0, 0.999)


def abstract(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda n: isinstance(n, tuple)
    )


LENET_300_100 = abstract({"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)})


@given(shapes, sparsities)
@SETTINGS
def test_erk_meets_the_sparsity_asked_for(tree, sparsity):
    targets = jp.distributions.erk(abstract(tree), sparsity)
    assert list(targets) == [f"{layer}/kernel" for layer in sorted(tree)]
    size = {path: np.prod(tree[path.split("/")[0]]["kernel"], dtype=float) for path in targets}
    raw = {path: sum(tree[path.split("/")[0]]["kernel"]) / size[path] for path in targets}
    density = {path: 1 - target for path, target in targets.items()}
    assert all(type(target) is float and 0 <= target < 1 for target in targets.values())
    kept = sum(density[path] * size[path] for path in targets)
    assert kept == pytest.approx((1 - sparsity) * sum(size.values()), rel=1e-9)
    # One eps for all that are not dense; a dense leaf would have more than it holds.
    eps = [density[path] / raw[path] for path in targets if targets[path] > 0]
    if eps:
        assert min(eps) == pytest.approx(max(eps), rel=1e-6)
        assert all(max(eps) * raw[path] >= 1 - 1e-6 for path in targets if targets[path] == 0)


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (0.1, {"fc1": 0.07957, "fc2": 0.23019, "fc3": 1.0}),
        (0.05, {"fc1": 0.03848, "fc2": 0.1113, "fc3": 0.9185}),
    ],
)
def test_erk_of_lenet_300_100(density, expected):
    targets = jp.distributions.erk(LENET_300_100, 1 - density)
    digits = {path: len(str(value)) - 2 for path, value in expected.items()}
    assert {path: round(1 - target, digits[path]) for path, target in targets.items()} == expected


def test_erk_at_the_ends():
    assert set(jp.distributions.erk(LENET_300_100, 0.0).values()) == {0.0}
    assert jp.distributions.erk(abstract({"kernel": (7, 5)}), 0.3)["kernel"] == pytest.approx(0.3)
    assert jp.distributions.erk(abstract({"a": (0, 5), "b": (7, 5)}), 0.3, where=lambda p, x: True) == {
        "b": pytest.approx(0.3)
    }


def test_where_chooses_the_leaves():
    tree = abstract({"fc1": {"kernel": (8, 8), "bias": (8,)}, "head": {"kernel": (8, 2), "bias": (2,)}})
    head_out = jp.all_of(jp.kernels, jp.not_(jp.matching("head/*")))
    assert jp.distributions.uniform(tree, 0.9) == {"fc1/kernel": 0.9, "head/kernel": 0.9}
    assert jp.distributions.uniform(tree, 0.9, where=head_out) == {"fc1/kernel": 0.9}
    assert jp.distributions.erk(tree, 0.5, where=head_out) == {"fc1/kernel": pytest.approx(0.5)}
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree)
    assert list(jp.distributions.sigma(params, 1.0, where=head_out)) == ["fc1/kernel"]


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0, 2.0])
def test_sigma_is_numpys(quality):
    rng = np.random.default_rng(2)
    weights = {"a": 3 * rng.normal(size=(20, 30)), "c": 0.1 + 0.2 * rng.normal(size=(30, 5))}
    weights = {path: leaf.astype(np.float32) for path, leaf in weights.items()}
    thresholds = jp.distributions.sigma(weights, quality)
    for path, leaf in weights.items():
        expected = quality * np.std(leaf.astype(np.float64))
        np.testing.assert_allclose(thresholds[path], expected, rtol=1e-5)
    masks = jp.prune_once(weights, jp.scores.magnitude, threshold=thresholds)
    for path, leaf in weights.items():
        np.testing.assert_array_equal(masks[path], np.abs(leaf) >= np.float32(thresholds[path]))


@pytest.mark.parametrize("distribution", [jp.distributions.uniform, jp.distributions.erk])
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_out_of_range(distribution, sparsity):
    with pytest.raises(ValueError, match=rf"sparsity must be in \[0, 1\).*got {sparsity}"):
        distribution(LENET_300_100, sparsity)
    if sparsity != 1:
        with pytest.raises(ValueError, match=f"quality must be 0 or more, got {sparsity}"):
            jp.distributions.sigma({"kernel": jnp.ones((2, 2))}, sparsity)


@pytest.mark.parametrize("name", ["uniform", "erk", "sigma"])
def test_a_where_that_matches_nothing(name):
    with pytest.raises(ValueError, match=r"matches no leaf.*The leaves are: fc1 float32\[784, 300\]"):
        getattr(jp.distributions, name)(LENET_300_100, 0.5, where=jp.matching("conv*"))


# Outlier weighed layer sparsities


def owl_by_hand(scores, sparsity, multiple, spread):
    """From Wanda's scores by layer, in numpy."""
    ratios = {name: (s > multiple * s.mean()).mean() for name, s in scores.items()}
    low, high = min(ratios.values()), max(ratios.values())
    scaled = {name: (ratio - low) / (high - low) for name, ratio in ratios.items()}
    total = sum(s.size for s in scores.values())
    mean = sum(scaled[name] * s.size for name, s in scores.items()) / total
    return {name: sparsity - 2 * spread * (d - mean) for name, d in scaled.items()}


def calibrated():
    rng = np.random.default_rng(0)
    layers = {
        "blocks/0/up": layer(rng, (8, 16), (0,)),
        "blocks/0/down": layer(rng, (4, 16), (1,)),
        "blocks/1/up": layer(rng, (12, 10), (0,)),
        "stack": layer(rng, (3, 6, 9), (1,), stack=(0,)),
    }
    heavy = rng.normal(size=(3, 6, 9)) * np.array([1, 9, 1])[:, None, None]
    params = {path: jnp.asarray(rng.standard_t(2, each.shape), jnp.float32) for path, each in layers.items()}
    params["stack"] = jnp.asarray(heavy, jnp.float32)
    return params | {"head": jnp.ones((9, 2))}, StandIn(layers, "norms")


def test_owl_is_the_formula():
    params, stats = calibrated()
    found = jp.distributions.owl(params, stats, 0.6, multiple=3.0, spread=0.1)
    scores = {
        path: np.asarray(jp.scores.wanda(params, stats=stats)[path], np.float64) for path in stats.paths
    }
    stack = scores.pop("stack")
    by_layer = scores | {f"stack[{i}]": stack[i] for i in range(3)}
    expected = owl_by_hand(by_layer, 0.6, 3.0, 0.1)
    assert found["stack"].shape == (3,)
    flat = {path: found[path] for path in scores} | {f"stack[{i}]": found["stack"][i] for i in range(3)}
    assert flat == pytest.approx(expected, abs=1e-9)
    assert sum(flat[name] * s.size for name, s in by_layer.items()) == pytest.approx(
        0.6 * sum(s.size for s in by_layer.values())
    )
    assert max(flat.values()) - min(flat.values()) == pytest.approx(0.2)
    masks = jp.prune_once(params, jp.scores.wanda, found, scope="layerwise", stats=stats)
    gone = (~masks["stack"]).sum((1, 2)).tolist()
    assert gone == [round(s * 54) for s in found["stack"]] and masks["head"].all()


def test_owl_of_blocks():
    params, stats = calibrated()
    where = jp.matching("blocks/*")
    found = jp.distributions.owl(
        params, stats, 0.5, multiple=2.0, where=where, block_of=lambda path: path.split("/")[1]
    )
    scores = jp.scores.wanda(params, stats=stats)
    first = np.concatenate(
        [np.asarray(scores[f"blocks/0/{name}"], np.float64).ravel() for name in ("up", "down")]
    )
    expected = owl_by_hand({0: first, 1: np.asarray(scores["blocks/1/up"], np.float64)}, 0.5, 2.0, 0.08)
    assert found["blocks/0/up"] == found["blocks/0/down"] == pytest.approx(expected[0])
    assert found["blocks/1/up"] == pytest.approx(expected[1])
    assert "stack" not in found


def test_owl_of_layers_without_a_difference_is_uniform():
    params, stats = calibrated()
    found = jp.distributions.owl(params, stats, 0.5, multiple=1e6, where=jp.matching("blocks/*"))
    assert found == dict.fromkeys(found, 0.5) and len(found) == 3


def test_owl_refuses():
    params, stats = calibrated()
    with pytest.raises(
        ValueError, match=r"owl would remove .* to remove 0.9 of all layers\. Lower spread=0.3"
    ):
        jp.distributions.owl(params, stats, 0.9, spread=0.3, multiple=2.0)
    with pytest.raises(ValueError, match=r"params\['head'\].*has no statistics"):
        jp.distributions.owl(params, stats, 0.5, where=jp.matching("head"))
    with pytest.raises(TypeError, match=r"stats must be what jaxprune\.calibrate returns"):
        jp.distributions.owl(params, 0.5, 0.5)
    for wrong in ({"multiple": 0.0}, {"spread": -1.0}, {"spread": float("inf")}):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            jp.distributions.owl(params, stats, 0.5, **wrong)
    with pytest.raises(TypeError, match="block_of= needs a function"):
        jp.distributions.owl(params, stats, 0.5, block_of="blocks")


# From measured errors


def test_from_errors_is_the_best_of_all_levels():
    rng = np.random.default_rng(1)
    for _ in range(20):
        sizes = {name: int(rng.integers(1, 5)) * 10 for name in "abc"}
        params = {name: np.zeros((size, 1)) for name, size in sizes.items()}
        levels = [0.0, 0.2, 0.5, 0.7, 0.9]
        errors = {
            name: dict(zip(levels, np.cumsum([0, *rng.exponential(size=4)]).tolist(), strict=True))
            for name in sizes
        }
        target = float(rng.uniform(0.05, 0.85))
        found = jp.distributions.from_errors(errors, params, target)
        total = target * sum(sizes.values())
        assert sum(found[name] * size for name, size in sizes.items()) == pytest.approx(total)
        assert sum(all(abs(found[name] - level) > 1e-9 for level in levels) for name in sizes) <= 1

        def error(name, sparsity, errors=errors):
            """The lowest of all straight lines between two points, at a sparsity."""
            points = sorted(errors[name].items())
            return min(
                y0 if x0 == x1 else y0 + (y1 - y0) * (sparsity - x0) / (x1 - x0)
                for (x0, y0), (x1, y1) in itertools.product(points, points)
                if x0 <= sparsity + 1e-9 and sparsity <= x1 + 1e-9
            )

        ours = sum(error(name, found[name]) for name in sizes)
        for chosen in itertools.product(levels, repeat=3):
            if sum(level * size for level, size in zip(chosen, sizes.values(), strict=True)) >= total - 1e-9:
                theirs = sum(errors[name][level] for name, level in zip(sizes, chosen, strict=True))
                assert ours <= theirs + 1e-9


def test_from_errors_of_stacked_layers():
    params = {"stack": np.zeros((3, 4, 5)), "out": np.zeros((5, 2))}
    errors = {f"stack[{i}]": {0.5: 1.0 + i, 0.9: 9.0} for i in range(3)} | {"out": {0.5: 0.1}}
    found = jp.distributions.from_errors(errors, params, 0.5)
    assert list(found) == [*(f"stack[{i}]" for i in range(3)), "out"]
    assert sum(found[f"stack[{i}]"] * 20 for i in range(3)) + found["out"] * 10 == pytest.approx(35)
    masks = jp.prune_once(
        jax.tree.map(lambda w: jnp.ones(w.shape), params),
        jp.scores.magnitude,
        found,
        scope="layerwise",
        stacked=lambda path, leaf: int(path == "stack"),
    )
    assert sum(int((~mask).sum()) for mask in masks.values()) == 35
    del errors["stack[1]"]
    with pytest.raises(ValueError, match=r"errors names 2 layers of params\['stack'\]"):
        jp.distributions.from_errors(errors, params, 0.5)


def test_from_errors_refuses():
    params = {"a": np.zeros((4, 4)), "b": np.zeros((4, 4))}
    refused = [
        (TypeError, "needs a dict by path of dicts", [0.5]),
        (TypeError, "needs a dict by path of dicts", {"a": 0.5}),
        (ValueError, "errors is an empty dict", {}),
        (ValueError, r"errors\['a'\] is an empty dict", {"a": {}}),
        (ValueError, r"a level of errors\['a'\] must be in \[0, 1\)", {"a": {1.0: 3.0}}),
        (ValueError, "must be finite, got nan", {"a": {0.5: float("nan")}}),
        (ValueError, "errors names 'c', which params do not have", {"c": {0.5: 1.0}}),
        (ValueError, r"the highest levels \(a 0.4\) do not reach sparsity=0.5", {"a": {0.4: 1.0}}),
    ]
    for error, match, errors in refused:
        with pytest.raises(error, match=match):
            jp.distributions.from_errors(errors, params, 0.5)
