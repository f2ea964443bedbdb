"""A small network whose weights are whole numbers, and its pruning to counts."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp

SHAPES = {"a": {"kernel": (4, 6), "bias": (6,)}, "head": {"kernel": (6, 3), "bias": (3,)}}
X = np.random.default_rng(7).integers(-3, 4, size=(5, 4)).astype(np.float32)
STRUCTURES = {
    "elements": jp.structures.elements(),
    "filters": jp.structures.slices(axis=-1, norm=1),
    "blocks": jp.structures.blocks((2, 2), norm=1),
}


def network(params, x=X):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def drawn(seed, few=False):
    """Draw params; of few different weights, so that many tie."""
    rng = np.random.default_rng(seed)
    low, high = (-1, 2) if few else (-9, 10)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.integers(low, high, size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: type(x) is tuple,
    )


@lru_cache
def pruning(structure, floor, scope="layerwise"):
    """Return `masks(params, masks, count)` as `prune_once` makes them, compiled."""

    @jax.jit
    def prune(params, masks, count):
        kwargs = {"structure": STRUCTURES[structure], "floor": floor, "masks": masks, "scope": scope}
        return jp.prune_once(params, jp.scores.magnitude, count=count, **kwargs)

    return prune
