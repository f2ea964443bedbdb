"""What a structure is: how entries are pooled into units.

A structure is one function of two dicts keyed by leaf path, the scores and the masks now in
force; it returns `Units`. A unit may lie in one leaf or span several: the keys of `Units.scores`
are the pools that a per-path target names, not necessarily leaves.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.selection.lazy_scores import LazyScores
from jaxprune.tree.checks import is_number, shown
from jaxprune.tree.stacks import Family, Stacks

Norm = float | Callable[..., jax.Array]
"""How the scores of a unit become one: the order of a norm, or a reduction such as `jnp.sum`."""


class Units(NamedTuple):
    """The scores of some leaves pooled into units.

    Attributes:
      scores: for each pool, an array with one score per unit.
      alive: for each pool, a bool array of the same shape: has the unit anything left to remove?
      expand: from a dict like `alive`, True for the units to keep, to a bool mask for each leaf.
      sources: for pools whose units are entries, where selection reads their scores; a structure
        leaves it empty.
      families: by the path of a stacked leaf, or the name of a stack of coupled channels, the pools that
        are its layers; a structure leaves it empty.
    """

    scores: dict[str, jax.Array]
    alive: dict[str, jax.Array]
    expand: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]
    sources: Mapping[str, LazyScores] = MappingProxyType({})
    families: Mapping[str, Family] = MappingProxyType({})


class Structure(NamedTuple):
    """How entries group into units.

    Attributes:
      pool: `pool(scores, masks) -> Units`, on dicts of arrays keyed by leaf path: the scores of the
        leaves that take part, and the masks of the same leaves, or of all if units span leaves.
      max_sparsity: the fraction of a leaf's entries that goes when every unit is pruned.
      name: for error messages.
      kinds: by pool, its kind, for structures that have kinds: with `scope="isomorphic"` pools of
        one kind are ranked together.
      floors: by pool, how many units stay at least, where that is more than the pruner's floor.
      spans_leaves: whether a unit has entries in several leaves.
      sizes_of: for a structure made for leaves of certain shapes, how many units each pool has where the
        leaves have others: from shapes by path to numbers by pool, None for what is not known.
      weights: by path, whether the network uses a leaf as the weights of a product, for structures that
        know the network: it decides where the pruner's `where` is the default, `kernels`. A layer of a
        stacked leaf goes by its name, "layers/up[2]".
      stacks: by path, the axes of stacked leaves that count layers, for structures that know the network;
        None for those that do not, where the pruner's `stacked` says so. `pool` then gets each layer by
        itself, by its name, and gives masks of layers.
      families: by name, pools that are the same in each layer of a stack.
    """

    pool: Callable[[dict[str, jax.Array], dict[str, jax.Array]], Units]
    max_sparsity: float = 1.0
    name: str = "structure"
    kinds: Mapping[str, str] = MappingProxyType({})
    floors: Mapping[str, int] = MappingProxyType({})
    spans_leaves: bool = False
    sizes_of: Callable[[Mapping[str, tuple[int, ...]]], dict[str, int | None]] | None = None
    weights: Mapping[str, bool] = MappingProxyType({})
    stacks: Stacks | None = None
    families: Mapping[str, Family] = MappingProxyType({})


def reducer(norm: Norm) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """A norm as a reduction `reduce(scores, axes)`."""
    if callable(norm):
        return lambda scores, axes: norm(scores, axis=axes)
    if not is_number(norm) or math.isnan(norm):
        raise ValueError(f"norm must be a number or a reduction such as jnp.sum, got {shown(norm)}.")
    huge = isinstance(norm, int) and abs(norm) >= 2**1000
    order = (math.inf if norm > 0 else -math.inf) if huge else float(norm)

    def reduce(scores, axes):
        size = jnp.abs(scores)
        if order == math.inf:
            return jnp.max(size, axis=axes, initial=0)
        if order == -math.inf:
            return jnp.min(size, axis=axes)
        if order == 0:
            return jnp.sum(size != 0, axis=axes).astype(size.dtype)
        if order == 1:
            return jnp.sum(size, axis=axes)
        # Scaled by the largest, so that a high power neither overflows nor vanishes.
        top = jnp.max(size, axis=axes, keepdims=True, initial=0)
        scale = jnp.where(top > 0, top, 1)
        total = jnp.sum((size / scale) ** order, axis=axes) ** (1 / order)
        return total * jnp.squeeze(scale, axis=axes)

    return reduce
