"""Units ranked once and pruned at any counts, so that many sparsities can be tried out.

The k lowest units of a pool are among its k + 1 lowest. So one ranking gives the masks for every k: the units
of a rank below k are removed. The ranking is made on the host, where sorting is several times faster than in
XLA on a CPU and compiles nothing; one program on the device makes the masks, whatever the counts.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.pruning.contracted import with_contracted_axes, with_statistics
from jaxprune.pruning.extras import check_extra
from jaxprune.pruning.once import check_choices, checked_structure, default_where, kept_entries, pool
from jaxprune.pruning.scoring import evaluate, is_tree_of_scores, of_layers
from jaxprune.pruning.targets import floors, pool_sizes
from jaxprune.structures import elements
from jaxprune.structures.base import Structure, Units, families_in, with_stacks
from jaxprune.tree.leaves import array_leaves, flatten, is_array, is_concrete
from jaxprune.tree.masks import apply_masks, like_params, ones_masks
from jaxprune.tree.stacks import Family, Stacked
from jaxprune.tree.statistics import InputStatistics
from jaxprune.tree.where import selected_among
from jaxprune.typing import Masks, Params, ScoreFn, Scores, Where

# One for all calls, because a compiled program is found again by the structure's function.
_ELEMENTS = elements()

Counts = tuple[int, ...]
"""How many units are removed from each pool, in the order of the pools."""


class RankedUnits(NamedTuple):
    """The units of a model by pool, ranked. Dicts are in the order of the pools.

    Counts are tuples in that order. JAX sorts the keys of a dict that passes through `jit`, but keeps the
    order of an `OrderedDict`, so `ranks` is one: `_kept` reads the order of the pools from it.

    Attributes:
      params: the params, exactly 0 where the masks to start from prune.
      masks: the masks to start from.
      structure: what pools entries into units.
      chosen: the leaves that take part.
      scores: the scores of these leaves.
      unit_scores: by pool, the scores of its units.
      ranks: by pool, int32: how many units are removed before each unit; those pruned before come last.
      sizes: by pool, how many units it has, those pruned before included.
      num_alive: by pool, how many units are left.
      min_kept: by pool, how many units stay at least.
      families: by name, the pools that are the layers of a stack.
      lost: with scope="output", by pool how many units each output has lost before; else empty. Ranks, sizes
        and counts are then those within an output. The units pruned before come first, and counts include
        them: outputs may have lost more or fewer, but have one count.
    """

    params: Params
    masks: Masks
    structure: Structure
    chosen: tuple[str, ...]
    scores: dict[str, jax.Array]
    unit_scores: dict[str, np.ndarray]
    ranks: OrderedDict[str, jax.Array]
    sizes: dict[str, int]
    num_alive: dict[str, int]
    min_kept: dict[str, int]
    families: dict[str, Family]
    lost: dict[str, np.ndarray]

    def max_removable(self, name: str) -> int:
        """Return how many units of a pool can be removed."""
        return max(0, self.num_alive[name] - self.min_kept[name])

    def counts(self, targets: Mapping[str, int]) -> Counts:
        """Return how many more units to remove, given how many of each pool should be removed in all.

        No more are removed than can be.
        """

        def more(name: str) -> int:
            target = targets.get(name, 0) - (self.sizes[name] - self.num_alive[name])
            return min(max(target, 0), self.max_removable(name))

        return tuple(more(name) for name in self.sizes)

    def num_removed(self, counts: Counts) -> dict[str, int]:
        """Return how many units of each pool such counts remove."""
        found = dict(zip(self.sizes, counts, strict=True))
        return found | {p: int(np.maximum(found[p] - lost, 0).sum()) for p, lost in self.lost.items()}

    def masks_of(self, counts: Counts) -> Masks:
        """Return the masks without so many units of each pool."""
        kept = _kept(*self.inputs(), np.array(counts, np.int32), pooling(self.structure), self.chosen)
        return _with_leaves(self.masks, kept)

    def pruned(self, counts: Counts) -> tuple[Params, dict[str, int]]:
        """Return the params without so many units of each pool, and how many of each are left."""
        static = (pooling(self.structure), self.chosen, self.structure.spans_leaves)
        params, left = _pruned(self.params, *self.inputs(), np.array(counts, np.int32), *static)
        return params, self.num_left(counts, left)

    def num_left(self, counts: Counts, measured: Any) -> dict[str, int]:
        """Return how many units of each pool are left, as `pruned_params` measured them, if it did."""
        if measured is None:
            measured = np.array(list(self.num_alive.values())) - counts
        return dict(zip(self.sizes, np.asarray(measured).tolist(), strict=True))

    def inputs(self) -> tuple[Any, ...]:
        """Return what `pruned_params` takes between the params and the counts, all arrays."""
        return self.scores, self.masks, self.ranks


def rank_units(
    params: Params,
    scores: ScoreFn | Scores,
    structure: Structure | None,
    where: Where,
    masks: Masks | None,
    floor: int,
    stacked: Stacked | None,
    grads: Any,
    key: Any,
    extra: Mapping[str, Any],
    caller: Callable[..., Any],
    scope: str = "layerwise",
    stats: InputStatistics | None = None,
) -> RankedUnits:
    """Score the params, pool the scores into units and rank the units of each pool.

    Arguments up to `extra` are those of `prune_once`, and so are the errors; params may not be traced.
    `caller` is the public function, for messages. With scope="output" units are ranked within each output.
    """
    check_extra(None if is_tree_of_scores(scores, params) else scores, extra, caller)
    floor = check_choices(scope, "total", floor)
    structure = checked_structure(_ELEMENTS if structure is None else structure)
    reads = False
    if stats is not None:
        where, stacked, reads, extra = with_statistics(
            stats, scores, params, where, stacked, structure, extra
        )
    where = default_where(where, structure, stacked)
    by_path = array_leaves(params)
    chosen = tuple(selected_among(by_path, where))
    if not is_concrete(params, masks):
        raise TypeError(
            f"{caller.__name__} counts and ranks on the host, so it cannot run under jit or vmap: give it "
            "values."
        )
    structure = with_stacks(structure, stacked, by_path, chosen)
    if stats is not None or scope == "output":
        structure = with_contracted_axes(structure, scope, stats, by_path, chosen, reads)
    shapes = {path: tuple(by_path[path].shape) for path in structure.stacks or {} if path in by_path}
    scores = of_layers(scores, params, structure.stacks, stacked)
    tree = _scored(scores, params, {"grads": grads, "key": key, **extra})
    if masks is not None:
        masks = like_params(masks, params)
        params = jax.jit(apply_masks)(params, masks)
    leaves = array_leaves(tree, "scores")
    picked = {path: leaves[path] for path in chosen}
    masks, units, alive, bad = _pooled(params, picked, masks, pooling(structure), chosen)
    if found := [path for path, number in bad.items() if number]:
        path = found[0]
        raise ValueError(
            f"scores[{path!r}] has {int(bad[path])} entries that are NaN or inf, which cannot be ranked. "
            "Check the params and gradients they come from; to spare a leaf use where=..."
        )
    units, alive = jax.device_get((units, alive))
    num_alive = {name: int(mask.sum()) for name, mask in alive.items()}
    inputs, sizes = structure.inputs, pool_sizes(alive, structure.inputs)
    if inputs:
        ranks = {name: _ranks_along(units[name], alive[name], axes) for name, axes in inputs.items()}
        num_alive = sizes
    else:
        ranks = {name: _ranks(units[name], alive[name]) for name in units}
    return RankedUnits(
        params=params,
        masks=masks,
        structure=structure,
        chosen=chosen,
        scores=picked,
        unit_scores=units,
        ranks=OrderedDict((name, jax.device_put(ranks[name])) for name in units),
        sizes=sizes,
        num_alive=num_alive,
        min_kept=floors(num_alive, structure, floor),
        families=families_in(structure, shapes, num_alive),
        lost={name: np.count_nonzero(~alive[name], axis=axes) for name, axes in inputs.items()},
    )


def pooling(structure: Structure) -> tuple[Any, bool, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Return what decides how units are pooled, as a static argument of `jit`."""
    return structure.pool, structure.spans_leaves, tuple(sorted((structure.stacks or {}).items()))


def _scored(scores: ScoreFn | Scores, params: Params, inputs: dict[str, Any]) -> Scores:
    """Return the scores as `prune_once` computes them, by one program where the function can be traced."""
    if callable(scores) and not is_tree_of_scores(scores, params):
        # Inputs that are not arrays are static.
        static = [name for name, x in inputs.items() if not all(map(is_array, jax.tree.leaves(x)))]
        if all(isinstance(inputs[name], Hashable) for name in static):
            with contextlib.suppress(
                jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError
            ):
                return evaluate(jax.jit(scores, static_argnames=static), params, **inputs)
    return evaluate(scores, params, **inputs)


def _ranks(scores: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Return each unit's place in the order of removal; among equal scores the first unit comes first."""
    flat = scores.ravel()
    order = np.argsort(flat, kind="stable") if alive.all() else np.lexsort((flat, ~alive.ravel()))
    ranks = np.empty(flat.size, np.int32)
    ranks[order] = np.arange(flat.size, dtype=np.int32)
    return ranks.reshape(scores.shape)


def _ranks_along(scores: np.ndarray, alive: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return each unit's place in the order of removal from its output; those pruned before come first."""
    last = range(-len(axes), 0)
    moved = np.moveaxis(scores, axes, last)
    rows = (-1, math.prod(moved.shape[axis] for axis in last))
    keys = [np.moveaxis(array, axes, last).reshape(rows) for array in (scores, alive)]
    ranks = np.empty(keys[0].shape, np.int32)
    np.put_along_axis(ranks, np.lexsort(keys), np.arange(rows[1], dtype=np.int32)[None], axis=1)
    return np.moveaxis(ranks.reshape(moved.shape), last, axes)


@partial(jax.jit, static_argnums=(3, 4))
def _pooled(
    params: Params, scores: Any, masks: Masks | None, pool_units: Any, chosen: tuple[str, ...]
) -> Any:
    """Return the masks, by pool the units' scores and which are left, by leaf how many are not finite."""
    masks = ones_masks(params) if masks is None else masks
    units, before = _units(scores, masks, pool_units, chosen), array_leaves(masks, "masks")
    bad = {path: jnp.sum(~jnp.isfinite(scores[path]) & before[path]) for path in chosen}
    alive = OrderedDict((name, units.alive[name]) for name in units.scores)
    return masks, OrderedDict(units.scores), alive, bad


@partial(jax.jit, static_argnums=(4, 5))
def _kept(
    scores: Any, masks: Masks, ranks: Any, counts: jax.Array, pool_units: Any, chosen: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Return the masks of the leaves that units lie in, without so many units of each pool."""
    units, before = _units(scores, masks, pool_units, chosen), array_leaves(masks, "masks")
    keep = {name: ranks[name] >= counts[index] for index, name in enumerate(ranks)}
    return kept_entries(units, keep, before)


def pruned_params(
    params: Params,
    scores: Any,
    masks: Masks,
    ranks: Any,
    counts: jax.Array,
    pool_units: Any,
    chosen: tuple[str, ...],
    count_left: bool,
) -> tuple[Params, jax.Array | None]:
    """Return the params without so many units of each pool, and with `count_left` how many are left.

    The counts may be traced; see `RankedUnits` for the other arguments. Coupled channels need counting,
    because their structure may round a count; units that lie in one leaf do not.
    """
    kept = _kept(scores, masks, ranks, counts, pool_units, chosen)
    leaves = array_leaves(params)
    pruned = {path: jnp.where(mask, leaves[path], 0) for path, mask in kept.items()}
    left = None
    if count_left:
        alive = _units(scores, _with_leaves(masks, kept), pool_units, chosen).alive
        left = jnp.stack([jnp.sum(alive[name], dtype=jnp.int32) for name in ranks])
    return _with_leaves(params, pruned), left


_pruned = partial(jax.jit, static_argnums=(5, 6, 7))(pruned_params)


def _with_leaves(tree: Any, leaves: dict[str, Any]) -> Any:
    """Return a tree with some leaves, by path, replaced."""
    flat = flatten(tree)
    return flat.tree(flat.by_path | leaves)


def _units(scores: Any, masks: Any, pool_units: Any, chosen: tuple[str, ...]) -> Units:
    function, spans_leaves, stacks = pool_units
    structure = Structure(function, spans_leaves=spans_leaves, stacks=dict(stacks))
    return pool(scores, array_leaves(masks, "masks"), list(chosen), structure)
