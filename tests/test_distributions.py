"""Distributions: targets by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

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
