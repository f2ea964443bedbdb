"""Structures: how entries are pooled into units, which are pruned as a whole.

A structure is a function of two dicts by leaf path, the scores and the masks now in force, that returns
`Units`. A unit lies in one leaf or spans several. The keys of `Units.scores` are the pools that a target by
path names: leaves, or groups of coupled channels.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.selection.lazy_scores import LazyScores
from jaxprune.tree.checks import is_number, shown
from jaxprune.tree.stacks import Family, Stacked, Stacks, families_of, stacks_of

Norm = float | Callable[..., jax.Array]
"""How the scores of a unit's entries become one: the order of a norm, or a reduction such as `jnp.sum`."""


class Units(NamedTuple):
    """The scores of some leaves pooled into units.

    Attributes:
      scores: for each pool, an array with one score per unit.
      alive: for each pool, a bool array of the same shape: whether the unit has entries left to remove.
      expand: from a dict like `alive`, True for the units to keep, a bool mask for each leaf.
      sources: by pool, how a selection computes scores of single entries anew in each pass, while they are
        traced; a structure leaves it empty.
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
      max_sparsity: the fraction of a leaf's entries that is removed when every unit is pruned.
      name: for error messages.
      kinds: by pool, its kind, for structures that have kinds: with `scope="isomorphic"` pools of
        one kind compete.
      floors: by pool, how many units stay at least, where that is more than the pruner's floor.
      spans_leaves: whether a unit has entries in several leaves.
      sizes_of: for a structure made for leaves of certain shapes, how many units each pool has for leaves of
        other shapes: from shapes by path, numbers by pool, None where it is not known.
      weights: by path, whether the network uses a leaf as the weights of a product, for structures that
        know the network: takes the place of `kernels`, the default of the pruner's `where`. A layer of a
        stacked leaf goes by its name, "layers/up[2]".
      stacks: by path, the axes of stacked leaves that count layers, for structures that know the network;
        None for others, which take them from the pruner's `stacked`. `pool` then gets each layer
        separately, by its name, and returns masks of layers.
      families: by name, pools that are the same in each layer of a stack.
      elementwise: whether each unit is one entry, so that `pool` returns the scores and masks that it is
        given. A selection then computes the scores in each pass instead of storing them.
      keeps_axes: whether the units of a leaf lie in an array with the leaf's axes, some of them shorter, so
        that `scope="output"` can take the same number of units from each output.
      inputs: by pool, the axes of its units along which the inputs of an output lie, if the scope is
        "output"; empty in other scopes.
      along: for a structure of groups along one axis of a leaf, the structure with the groups along other
        axes: from the axes by pool. Statistics then say along which axis the groups lie.
      n_of_m: for groups of neighbours, how many entries stay of how many, and the axis that was asked for or
        None.
      tiles: for rectangular blocks, the side of a block by the axis that it lies along.
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
    elementwise: bool = False
    keeps_axes: bool = False
    inputs: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    along: Callable[[Mapping[str, int]], "Structure"] | None = None
    n_of_m: tuple[int, int, int | None] | None = None
    tiles: Mapping[int, int] = MappingProxyType({})


def with_stacks(
    structure: Structure, stacked: Stacked | None, leaves: Mapping[str, Any], chosen: Iterable[str]
) -> Structure:
    """Return the structure with the stacks of these leaves: those that it knows, or those of `stacked`."""
    if stacked is None:
        return structure
    asked = leaves if structure.spans_leaves else {path: leaves[path] for path in chosen}
    known = structure.stacks
    if known is not None:
        asked = {path: leaves[path] for path in dict.fromkeys((*chosen, *known)) if path in leaves}
    given = stacks_of(stacked, asked)
    if known is None:
        return structure._replace(stacks=given)
    for path in asked:
        if known.get(path, ()) != given.get(path, ()):
            raise ValueError(
                f"stacked= says that the axes {given.get(path, ())} of params[{path!r}] count layers, but "
                f"{structure.name} has {known.get(path, ())}. Leave out stacked=: the structure knows its "
                "layers by itself, coupled channels from channel_groups(..., stacked=...)."
            )
    return structure


def families_in(
    structure: Structure, shapes: Mapping[str, tuple[int, ...]], pools: Collection[str]
) -> dict[str, Family]:
    """Return, by name, the pools that are the layers of a stack: of a leaf, or of coupled channels."""
    families = families_of(structure.stacks or {}, shapes, pools)
    for name, family in structure.families.items():
        if pooled := tuple(pool for pool in family.names if pool in pools):
            shape = family.shape if len(pooled) == len(family.names) else (len(pooled),)
            families[name] = family._replace(names=pooled, shape=shape)
    return families


def reducer(norm: Norm) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Return a norm as a reduction `reduce(scores, axes)`."""
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
