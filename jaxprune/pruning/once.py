"""One-shot pruning, in five steps.

Score the leaves, pool the scores into units, count how many units to remove, select the lowest, apply that to
the masks. `gradual.pruner` runs the same steps again and again, with counts from a schedule.
"""

import operator
import warnings
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.pruning.contracted import with_contracted_axes, with_statistics
from jaxprune.pruning.extras import check_extra
from jaxprune.pruning.scoring import is_tree_of_scores, of_layers, score_and_recompute
from jaxprune.pruning.targets import SCOPES, Target, competing_sizes, kept_in_each, pool_sizes, target_of
from jaxprune.selection.along_axes import lowest_along
from jaxprune.selection.big_counts import to_numpy
from jaxprune.selection.exact import Removal, select, select_arrays
from jaxprune.selection.lazy_scores import LazyScores, stored_scores
from jaxprune.structures import elements
from jaxprune.structures.base import Structure, Units, families_in, with_stacks
from jaxprune.tracing.recompute import Recomputation
from jaxprune.tree.checks import as_integer, check_params, shown
from jaxprune.tree.dtypes import common_dtype
from jaxprune.tree.host import compute, num_true, num_true_along, on_host
from jaxprune.tree.leaves import describe, flatten, is_concrete
from jaxprune.tree.masks import masked, masks_by_path, unpruned_masks
from jaxprune.tree.mirrors import mirrored
from jaxprune.tree.paths import explain_paths, some_of
from jaxprune.tree.stacks import (
    Stacked,
    Stacks,
    about_layers,
    check_stacks,
    join_masks,
    layer_indices,
    layer_name,
    layer_shape,
    leaf_of_layer,
    split_layers,
    take_layer,
)
from jaxprune.tree.statistics import InputStatistics
from jaxprune.tree.where import kernels, selected_among
from jaxprune.typing import Masks, Params, PerPath, ScoreFn, Scores, Where


def prune_once(
    params: Params,
    scores: ScoreFn | Scores,
    sparsity: float | PerPath | None = None,
    *,
    count: int | jax.Array | PerPath | None = None,
    threshold: float | jax.Array | PerPath | None = None,
    of: str = "total",
    scope: str = "global",
    structure: Structure | None = None,
    where: Where = kernels,
    masks: Masks | None = None,
    floor: int = 1,
    stacked: Stacked | None = None,
    stats: InputStatistics | None = None,
    grads: Any = None,
    key: jax.Array | None = None,
    **extra: Any,
) -> Masks:
    """Return masks that remove the lowest scores, in one go.

    Exactly one of `sparsity`, `count`, `threshold` says how much is removed. A sparsity removes
    `round_half_even(sparsity * n)` of the n units that take part; of equal scores the earlier
    leaf, then the lower row-major index, goes first. What `masks` prune stays pruned. This is a pure
    function and runs under `jit` and `vmap`; there it cannot check values (NaN scores, what the floor
    kept), and NaN ranks highest.

    Args:
      params: a pytree of arrays.
      scores: a function `score(params, *, grads, key, **extra)`, or a tree like `params` of real
        numbers. Larger means keep; signs count (`torch.nn.utils.prune` takes `|scores|`).
      sparsity: the fraction removed, in [0, 1); or one per path (see `distributions`), where
        nothing is removed from leaves that are not named.
      count: how many units to remove from what remains (entries; or slices, blocks, groups of
        the structure); or one per path. It may be traced.
      threshold: remove every unit whose score is below it; or one per path. It may be traced.
      of: `"total"`: the sparsity includes what was pruned before. `"remaining"`: it is a
        fraction of what `masks` keep.
      scope: `"global"` ranks all leaves together; `"layerwise"` takes the sparsity or the count
        from each leaf; `"isomorphic"`, for coupled channels, from all groups of one kind; `"output"`, for
        entries, N:M groups and blocks, from the inputs of each output of a leaf, so that all of its outputs
        lose equally many (of blocks: all columns of blocks along the axes of inputs). The axes of inputs are
        those that the leaf's product sums over if `stats` are passed, else all but the last. A threshold
        means the same in all scopes.
      structure: which entries go together (see `structures`); by default each is a unit.
      where: which leaves take part, a function of (path, leaf); by default `kernels`, which sees one layer of
        a stacked leaf, and for coupled channels what the network uses as weights (see `structures.channels`).
        With `stats` the default is the calibrated leaves, `stats.where`.
      masks: masks to start from; by default nothing is pruned.
      floor: how many units of each leaf stay at least, with `scope="output"` of each output. 0 lets a leaf
        be emptied, which cuts the network there.
      stacked: which leaves hold the same param of many layers: a function of (path, leaf) that returns how
        many leading axes of the leaf count layers, or a tuple of the axes that do. Each layer is then
        pruned as a leaf of its own, called `path[i]`, and the axes of structures are those of one layer.
        Coupled channels know their stacks. A target by the path of a stacked leaf is one number for all
        layers, or an array of the stack's shape. By default the axes that `stats` know.
      stats: what `jaxprune.calibrate` returns, for scores that read it (`scores.wanda`), and for the axes
        that products sum over: those of N:M groups, and of `scope="output"`. Other scores do not mind it.
      grads: gradients like `params`, for scores that need them.
      key: a PRNG key, for scores that need it.
      **extra: passed on to the score, which must name them; a bare `**_` in its signature names nothing.

    Returns:
      A tree like `params` of bool masks, all True for leaves that take no part.

    Raises:
      ValueError: not exactly one target, a target out of range, a `where` that matches nothing,
        trees or shapes that differ, NaN or inf scores, an unknown path; a leaf without statistics where the
        score, the scope or the structure needs them; outside `jit`, params that changed since they were
        calibrated.
      TypeError: a leaf that cannot be pruned, a sparsity that is traced, scores that cannot rank, an
        argument that neither this function nor the score names.

    Warns:
      UserWarning: the target was not reached; `floor` kept units that scored low enough to go; a leaf was
        emptied because there is no floor (layer collapse); or a stack of coupled channels keeps another
        number than was asked for, because it keeps equally many in each layer unless `scope="layerwise"`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.arange(-3.0, 5.0).reshape(2, 4), "bias": jnp.ones(4)}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
      >>> jp.apply_masks(params, masks)["kernel"].tolist()
      [[-3.0, 0.0, 0.0, 0.0], [0.0, 2.0, 3.0, 4.0]]

    References:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015.
    """
    check_params(params, "prune_once(params, scores, ...)")
    check_extra(None if is_tree_of_scores(scores, params) else scores, extra, prune_once)
    structure = checked_structure(structure)
    floor = check_choices(scope, of, floor)
    reads = False
    if stats is not None:
        where, stacked, reads, extra = with_statistics(
            stats, scores, params, where, stacked, structure, extra
        )
    where = default_where(where, structure, stacked)
    given = {"sparsity": sparsity, "count": count, "threshold": threshold}
    asked = [name for name in given if given[name] is not None]
    if len(asked) != 1:
        raise ValueError(
            "prune_once needs exactly one of sparsity, count and threshold, got "
            f"sparsity={sparsity}, count={count}, threshold={threshold}."
        )
    leaves = flatten(params)
    chosen = selected_among(leaves.by_path, where)
    structure = with_stacks(structure, stacked, leaves.by_path, chosen)
    if stats is not None or scope == "output":
        structure = with_contracted_axes(structure, scope, stats, leaves.by_path, chosen, reads)
        if asked[0] == "threshold":  # which is the same for all, so that outputs have no counts
            structure = structure._replace(inputs={})
    unpruned = masks is None
    before = unpruned_masks(leaves) if masks is None else masks_by_path(masks, params, leaves)
    scores = of_layers(scores, params, structure.stacks, stacked)
    tree, recipes = score_and_recompute(scores, params, leaves, grads=grads, key=key, **extra)
    units = pool(mirrored(tree, leaves, "scores"), before, chosen, structure, recipes, unpruned)
    target = target_of(asked[0], given[asked[0]], units, structure, scope, of, floor)
    return leaves.tree(remove(before, units, target, warn_if_unequal=True))


def checked_structure(structure: Structure | None) -> Structure:
    """Return the structure, by default of single entries.

    Raises:
      TypeError: it is something else; a function that makes structures, say.
    """
    if structure is None:
        return elements()
    if not isinstance(structure, Structure):
        raise TypeError(
            "structure must be one of jaxprune.structures, called, as in jaxprune.structures.nm(2, 4); got "
            f"{shown(structure)}."
        )
    return structure


def default_where(where: Where, structure: Structure, stacked: Stacked | None) -> Where:
    """Return the predicate; in place of the default, `kernels`, what the structure knows of the network."""
    if where is not kernels:
        return where
    stacks = structure.stacks
    if stacks:
        named = about_layers(kernels, lambda path, leaf: stacks.get(path, ()))
    else:
        named = kernels if stacked is None else about_layers(kernels, stacked)
    if not structure.weights:
        return named

    # A stacked leaf takes part if any of its layers is used as weights.
    of_leaf: dict[str, bool] = {}
    for name, used in structure.weights.items():
        leaf_path = leaf_of_layer(name)
        if leaf_path is not None:
            of_leaf[leaf_path] = of_leaf.get(leaf_path, False) or used
    known = of_leaf | dict(structure.weights)

    def weights(path: str, leaf: Any) -> bool:
        return known[path] if path in known else named(path, leaf)

    weights.__name__ = kernels.__name__
    return weights


def check_choices(scope: str, of: str, floor: Any) -> int:
    """Check the arguments that `prune_once` and `pruner` share, and return the floor.

    Raises:
      ValueError: a value that is not allowed.
      TypeError: a floor that is not an integer.
    """
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    if not isinstance(of, str) or of not in ("total", "remaining"):
        raise ValueError(f"of must be 'total' or 'remaining', got {of!r}.")
    if scope == "output" and of == "remaining":
        raise ValueError(
            "of='remaining' cannot go with scope='output', where all outputs of a leaf have one count: masks "
            "may leave more of one output than of another. Pass of='total'; schedules.geometric removes a "
            "fraction of what is left in each round."
        )
    return as_integer(floor, "floor", at_least=0, what="units that stay per leaf")


# Pooling: from the scores of leaves to those of units.


def pool(
    scores: Mapping[str, Any],
    masks: Mapping[str, Any],
    chosen: list[str],
    structure: Structure,
    recipes: Mapping[str, Recomputation] = MappingProxyType({}),
    unpruned: bool = False,
) -> Units:
    """Pool the scores of the chosen leaves into the structure's units.

    Args:
      scores: the scores by path.
      masks: the masks now in force, by path.
      chosen: the paths of the leaves that take part.
      structure: what pools.
      recipes: by path, how to compute scores again.
      unpruned: whether the masks are known to prune nothing.

    Raises:
      ValueError: NaN or inf scores (where values can be read), or a leaf that the structure does not fit.
      TypeError: scores that are not real, or mix floating-point and integer leaves.
    """
    raw = checked_scores(scores, masks, chosen)
    dtype = _dtype_of_units({leaf.dtype for leaf in raw.values()}, structure)
    # What is pruned already may have any score, such as the gradient of a square root at 0.
    picked = {
        path: (leaf if unpruned else masked(leaf, masks[path])).astype(dtype) for path, leaf in raw.items()
    }
    # Leaves that give no scores may still tell whether a unit that spans leaves is alive.
    seen = dict(masks) if structure.spans_leaves else {path: masks[path] for path in chosen}
    stacks: Stacks = {}
    if structure.stacks:
        stacks = {path: axes for path, axes in structure.stacks.items() if path in seen}
        check_stacks(stacks, seen)
        picked, in_layers = split_layers(picked, stacks), split_layers(seen, stacks)
    else:
        in_layers = seen
    units = structure.pool(picked, in_layers)
    if structure.elementwise and not is_concrete(picked):
        units = units._replace(sources=_sources(raw, masks, recipes, stacks, dtype, unpruned))
    if not stacks:
        return units
    return units._replace(
        expand=lambda keep: join_masks(units.expand(keep), stacks, {path: seen[path] for path in stacks}),
        families=families_in(structure, {path: seen[path].shape for path in stacks}, units.scores),
    )


def checked_scores(
    scores: Mapping[str, Any], masks: Mapping[str, Any], chosen: list[str]
) -> dict[str, jax.Array]:
    """Return the scores of the chosen leaves; those in 8 bits as bfloat16.

    JAX promotes floats of 8 bits to no other dtype, and some of these have no infinity. bfloat16 holds all
    their numbers exactly.

    Raises:
      ValueError: NaN or inf scores of entries that are not pruned, where values can be read.
      TypeError: scores that are not real, or mix floating-point and integer leaves.
    """
    checked: dict[str, jax.Array] = {}
    integers: list[str] = []
    is_readable = on_host([(scores[path], masks[path]) for path in chosen])
    for path in chosen:
        leaf = jnp.asarray(scores[path])
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            integers.append(path)
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"scores[{path!r}] is {describe(leaf)}; scores are floating-point or integer.")
        elif leaf.dtype.itemsize == 1:
            leaf = leaf.astype(jnp.bfloat16)
        if not isinstance(leaf, Tracer):
            kept = True if isinstance(masks[path], Tracer) else masks[path]
            if is_readable:
                bad = np.count_nonzero(~np.isfinite(leaf) & np.asarray(kept))
            else:
                with jax.ensure_compile_time_eval():  # a traced function may have closed over it
                    bad = int(jnp.sum(~jnp.isfinite(leaf) & kept))
            if bad:
                raise ValueError(
                    f"scores[{path!r}] has {bad} entries that are NaN or inf, which cannot be ranked. "
                    "Check the params and gradients they come from; to spare a leaf use where=..."
                )
        checked[path] = leaf
    if 0 < len(integers) < len(chosen):
        raise TypeError(
            f"scores are integers for {', '.join(integers)} and floating-point elsewhere; choose one."
        )
    return checked


def _dtype_of_units(dtypes: set[Any], structure: Structure) -> Any:
    """Return the dtype in which the scores of units are computed and ranked.

    All units are ranked in one dtype. Half precision becomes float32, which holds its numbers exactly and in
    which the sums of a structure do not round to ties. Entries are not summed, and a conversion that is exact
    changes neither their order nor their ties, so entries of one dtype are ranked in it: with half as many
    bits a search makes half as many passes.
    """
    if structure.elementwise and len(dtypes) == 1:
        return next(iter(dtypes))
    floating = any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    return common_dtype(*dtypes, *([jnp.float32] if floating else []))


def _itself(leaf: jax.Array) -> jax.Array:
    return leaf


def _sources(
    raw: Mapping[str, jax.Array],
    masks: Mapping[str, Any],
    recipes: Mapping[str, Recomputation],
    stacks: Stacks,
    dtype: Any,
    unpruned: bool,
) -> dict[str, LazyScores]:
    """Return, by pool, how a selection reads the scores of single entries: computed anew in each pass."""
    readers: dict[Any, Any] = {}  # leaves scored by the same equations share one, which is traced once

    def source(path: str, axes: tuple[int, ...] = (), index: tuple[int, ...] = ()) -> LazyScores:
        recipe = recipes.get(path) or Recomputation(_itself, raw[path])

        def read_leaf(given: Any) -> tuple[jax.Array, jax.Array | None]:
            inputs, alive = given
            return recipe.compute(inputs).astype(dtype), alive

        def read_layer(given: Any) -> tuple[jax.Array, jax.Array | None]:
            inputs, alive = given
            take = partial(take_layer, axes=axes, index=index)
            # Only this layer is computed where that is possible: all layers together would be stored.
            if recipe.compute_slice is None:
                scores = take(recipe.compute(inputs))
            else:
                scores = recipe.compute_slice(inputs, take)
            return scores.astype(dtype), None if alive is None else take(alive)

        # Where masks have values, one program serves those that prune nothing as well.
        alive = None if unpruned and isinstance(raw[path], Tracer) else masks[path]
        part = jax.ShapeDtypeStruct(layer_shape(raw[path].shape, axes) if axes else raw[path].shape, dtype)
        # `inline`: the passes of a selection read the scores again and again, but Python runs this once.
        if axes:
            read = jax.jit(read_layer, inline=True)
        elif (read := readers.get(recipe.compute)) is None:
            read = readers[recipe.compute] = jax.jit(read_leaf, inline=True)
        return LazyScores(read, (recipe.inputs, alive), part)

    sources = {}
    for path in raw:
        axes = stacks.get(path, ())
        if not axes:
            sources[path] = source(path)
            continue
        for index in layer_indices(raw[path].shape, axes):
            sources[layer_name(path, index)] = source(path, axes, index)
    return sources


# Selecting the lowest units, and applying that to the masks.


def remove(
    masks: Mapping[str, jax.Array], units: Units, target: Target, *, warn_if_unequal: bool = False
) -> dict[str, jax.Array]:
    """Return the masks without the lowest units.

    Args:
      masks: by path, the masks now in force, those that `units` were pooled under.
      units: the pooled scores.
      target: how many units to remove.
      warn_if_unequal: whether to warn where a stack, which keeps equally many units in each layer, keeps
        another number than the target asks for.

    Raises:
      ValueError: the units lie in leaves that the masks do not have.
    """
    removed = lowest_units(units, target)
    if is_concrete(units.alive, target.counts, removed):
        _warn_about_missed_target(units, target, removed)
    if target.equal:
        pooled, removed = removed, _equally_many(units, target, removed)
        if warn_if_unequal and is_concrete(units.alive, pooled, removed):
            _warn_about_equal_numbers(units, target, pooled, removed)
    keep = dict(zip(removed, compute(operator.invert, removed.values()), strict=True))
    changed = kept_entries(units, keep, masks)
    if not any(target.floors.values()) and is_concrete(masks, changed):
        _warn_about_collapse(masks, changed)
    return {**masks, **changed}


def lowest_units(units: Units, target: Target) -> dict[str, jax.Array]:
    """Return, by pool, the units that a target removes."""
    if target.inputs:
        return _lowest_of_outputs(units, target)
    names = [name for pools in target.competing.values() for name in pools]
    removal = Removal(
        competing=tuple([number for number, pools in enumerate(target.competing.values()) for _ in pools]),
        counts=tuple(map(target.counts.__getitem__, target.competing)),
        floors=tuple(map(target.floors.__getitem__, names)),
        includes_pruned=target.includes_pruned,
    )
    pairs = [(units.scores[name], units.alive[name]) for name in names]
    if units.sources or not is_concrete(removal.counts, pairs):
        sources = [
            units.sources[name] if name in units.sources else stored_scores(*pair)
            for name, pair in zip(names, pairs, strict=True)
        ]
        if not is_concrete(removal.counts, [source.inputs for source in sources]):
            return dict(zip(names, select(sources, removal), strict=True))
        pairs = [source.read(source.inputs) for source in sources]
    scores, alive = zip(*pairs, strict=True)
    return dict(zip(names, select_arrays(scores, alive, removal), strict=True))


def _lowest_of_outputs(units: Units, target: Target) -> dict[str, jax.Array]:
    """Return, by pool, the units that a target removes, of each output the same number."""
    removed = {}
    for name, count in target.counts.items():
        pair, axes, floor = (units.scores[name], units.alive[name]), target.inputs[name], target.floors[name]
        removed[name] = lowest_along(*pair, axes, count, floor, target.includes_pruned)
    return removed


def kept_entries(
    units: Units, keep: Mapping[str, jax.Array], before: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return the masks of the leaves that units lie in, from the units that stay and the masks before.

    Raises:
      ValueError: the units lie in leaves that the masks do not have.
    """
    entries = units.expand(keep)
    if unknown := [path for path in entries if path not in before]:
        raise ValueError(
            f"the units have entries in {', '.join(unknown)}, which the params do not have. "
            + (
                explain_paths(entries, before)
                or f"The groups have {some_of(entries)}; the params have {some_of(before)}. Call "
                "channel_groups with the params that are pruned."
            )
        )
    kept = compute(operator.and_, map(before.__getitem__, entries), entries.values())
    return dict(zip(entries, kept, strict=True))


def _equally_many(units: Units, target: Target, removed: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return, by pool, the units to remove so that all layers of a stack keep equally many."""
    counts: dict[str, Any] = {}
    for family in target.equal.values():
        alive = [jnp.sum(units.alive[name], dtype=jnp.int32) for name in family.names]
        kept = [jnp.sum(units.alive[name] & ~removed[name], dtype=jnp.int32) for name in family.names]
        floor = max(target.floors[name] for name in family.names)
        number = kept_in_each(jnp.stack(kept), jnp.stack(alive), floor, family.multiple_of)
        counts |= {n: jnp.maximum(a - number, 0) for n, a in zip(family.names, alive, strict=True)}
    each = Target({name: (name,) for name in counts}, counts, floors=dict.fromkeys(counts, 0))
    return {**removed, **lowest_units(units, each)}


def _warn_about_missed_target(units: Units, target: Target, removed: Mapping[str, jax.Array]) -> None:
    """Warn where a target was missed, and where only the floor kept a leaf from being emptied."""
    if target.inputs:
        _warn_about_outputs(units, target, removed)
        return
    competing, floors = target.competing, target.floors
    num_removed = dict(zip(removed, num_true(removed.values()), strict=True))
    num_alive = dict(zip(units.alive, num_true(units.alive.values()), strict=True))
    got, left = competing_sizes(num_removed, competing), competing_sizes(num_alive, competing)
    floor = max(floors.values())
    before = competing_sizes(pool_sizes(units.alive, {}), competing) if target.includes_pruned else left
    for name, count in target.counts.items():
        number = int(to_numpy(count)) - (before[name] - left[name])
        if number < 0:
            warnings.warn(
                f"{name}: {-number} more units are pruned already than the target asks for. What is "
                "pruned only ever grows, so nothing was removed.",
                stacklevel=4,
            )
        elif got[name] < number:
            reason = "no more are left"
            if left[name] > got[name]:
                reason = f"floor={floor} units of each leaf stay. floor=0 lets a leaf be emptied"
            warnings.warn(
                f"{name}: {got[name]} of the {number} units asked for were removed, because {reason}.",
                stacklevel=4,
            )
    shared = [name for names in competing.values() if len(names) > 1 for name in names]
    full = [name for name in shared if floors[name] and num_alive[name] - num_removed[name] <= floors[name]]
    if not full:
        return
    without_floors = lowest_units(units, target._replace(floors=dict.fromkeys(floors, 0)))
    numbers = num_true(map(without_floors.__getitem__, full))
    if spared := [name for name, number in zip(full, numbers, strict=True) if number > num_removed[name]]:
        warnings.warn(
            f"floor={floor} kept the last units of {', '.join(spared)}, which rank among the lowest; "
            "other leaves gave more instead. floor=0 lets a leaf be emptied.",
            stacklevel=4,
        )


def _warn_about_outputs(units: Units, target: Target, removed: Mapping[str, jax.Array]) -> None:
    """Warn of outputs that lost more or fewer inputs than the target asks for."""
    for name, axes in target.inputs.items():
        alive, gone = (num_true_along(masks[name], axes) for masks in (units.alive, removed))
        pruned = pool_sizes(units.alive, target.inputs)[name] - alive if target.includes_pruned else 0
        asked = to_numpy(target.counts[name]) - pruned
        if ahead := np.count_nonzero(asked < 0):
            warnings.warn(
                f"{name}: in {ahead} of {alive.size} outputs more units are pruned already than the target "
                "asks for. What is pruned only ever grows, so nothing was removed there.",
                stacklevel=5,
            )
        if short := np.count_nonzero((asked > 0) & (gone < asked)):
            reason = "no more are left"
            if (alive > gone).any():
                reason = f"floor={target.floors[name]} units of each output stay. floor=0 lets one be emptied"
            warnings.warn(
                f"{name}: {short} of {alive.size} outputs lost fewer units than were asked for, because "
                f"{reason}.",
                stacklevel=5,
            )


def _warn_about_equal_numbers(
    units: Units, target: Target, pooled: Mapping[str, jax.Array], removed: Mapping[str, jax.Array]
) -> None:
    """Warn of stacks that keep more or fewer units than was asked for."""
    for name, family in target.equal.items():
        alive, asked_to_go, gone = (
            num_true(map(masks.__getitem__, family.names)) for masks in (units.alive, pooled, removed)
        )
        asked, got = (list(map(operator.sub, alive, lost)) for lost in (asked_to_go, gone))
        if sum(asked) != sum(got):
            kept = str(got[0]) if len(set(got)) == 1 else ", ".join(map(str, got))
            warnings.warn(
                f"{name}: {sum(got)} units are kept where the target asks for {sum(asked)}, because a stack "
                f"keeps equally many in each of its {len(got)} layers: {kept}. With scope='layerwise' each "
                "layer, or stack, has a target of its own.",
                stacklevel=4,
            )


def _warn_about_collapse(before: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Warn where a leaf lost its last entry: no signal passes it any more."""
    left, right = num_true(map(before.__getitem__, changed)), num_true(changed.values())
    emptied = [path for path, old, new in zip(changed, left, right, strict=True) if old and not new]
    if emptied:
        warnings.warn(
            f"layer collapse: {', '.join(emptied)} kept nothing, so no signal passes there. floor=1 keeps "
            "the best unit of each leaf.",
            stacklevel=4,
        )
