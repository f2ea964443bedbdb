"""Sensitivity analysis: what comes of it, against pruning and evaluating one thing at a time."""

import csv
import io
import json
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
import oracle

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
SHAPES = {"a": {"kernel": (4, 6), "bias": (6,)}, "head": {"kernel": (6, 3), "bias": (3,)}}
X = np.random.default_rng(7).integers(-3, 4, size=(5, 4)).astype(np.float32)


def network(params, x=X):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


# Of whole numbers all sums are exact, whatever their order; and the figure shows every weight.
@jax.jit
def evaluate(params):
    return jnp.sum(network(params) * jnp.array([1.0, 2.0, 5.0]))


def drawn(seed, low=-9, high=10):
    rng = np.random.default_rng(seed)
    whole = partial(rng.integers, low, high)
    return jax.tree.map(
        lambda shape: jnp.asarray(whole(size=shape), jnp.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )


STRUCTURES = {
    "elements": jp.structures.elements(),
    "filters": jp.structures.slices(axis=-1, norm=1),
    "blocks": jp.structures.blocks((2, 2), norm=1),
}
SPECS = {
    "elements": oracle.Spec(),
    "filters": oracle.Spec("slices", axes=(-1,), norm=1),
    "blocks": oracle.Spec("blocks", axes=(-2, -1), sides=(2, 2), norm=1),
}


NAMES = ("a/kernel", "head/kernel")


@lru_cache
def pruning(structure, floor):
    """`masks(params, masks, counts)` as `prune_once` makes them, compiled."""

    @jax.jit
    def prune(params, masks, counts):
        kwargs = {"structure": STRUCTURES[structure], "floor": floor, "masks": masks}
        return jp.prune_once(params, jp.scores.magnitude, count=counts, scope="layerwise", **kwargs)

    return prune


def units_left(mask, spec):
    """By unit, whether anything of it is left."""
    return np.array([any(mask[index] for index in unit) for unit in oracle.units(mask.shape, spec)])


@pytest.mark.parametrize("structure", STRUCTURES)
@given(seed=st.integers(0, 10**6), few=st.booleans(), floor=st.integers(0, 1), masked=st.booleans())
@settings(deadline=None, max_examples=10, derandomize=True)
def test_it_is_pruning_each_alone(structure, seed, few, floor, masked):
    # Of few different weights many tie.
    params, spec = drawn(seed, *((-1, 2) if few else (-9, 10))), SPECS[structure]
    rng = np.random.default_rng(seed)
    before = jax.tree.map(lambda leaf: rng.random(leaf.shape) < (0.7 if masked else 2), params)
    found = jp.sensitivity(
        evaluate,
        params,
        levels=LEVELS,
        structure=STRUCTURES[structure],
        floor=floor,
        masks=before if masked else None,
    )
    assert found.dense == float(evaluate(jp.apply_masks(params, before)))
    assert [(p.name, p.sparsity) for p in found.points] == [(n, level) for n in NAMES for level in LEVELS]
    for point in found.points:
        layer, leaf = point.name.split("/")
        units = units_left(before[layer][leaf], spec)
        gone = oracle.half_even(point.sparsity, units.size) - int((~units).sum())
        counts = dict.fromkeys(NAMES, 0) | {point.name: max(gone, 0)}
        masks = pruning(structure, floor)(params, before, counts)
        figure = float(evaluate(jp.apply_masks(params, masks)))
        assert (point.metric, point.drop) == (figure, found.dense - figure)
        left = units_left(np.asarray(masks[layer][leaf]), spec)
        assert (point.kept, point.size) == (left.sum(), left.size)
        assert point.achieved == pytest.approx(1 - left.mean())
        assert ("nothing was removed" in point.notes) == (left.sum() == units.sum())
        assert any("floor=1 kept" in note for note in point.notes) == (units.sum() - gone < floor)
        assert any("nothing is left" in note for note in point.notes) == (units.any() and not left.any())
