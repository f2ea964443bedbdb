"""One-shot pruning: score the leaves, pool the scores into units, remove the lowest.

`prune_once` is those steps in order, each a function of its own; `pruners.pruner` runs the same
steps again and again, with a count that a schedule gives.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.pruning.extras import check_extra
from jaxprune.pruning.scoring import is_tree_of_scores, of_layers, score_and_recompute
from jaxprune.pruning.targets import (
    SCOPES,
    Competing,
    Counts,
    by_layer,
    checked_counts,
    competing_pools,
    competing_sizes,
    pool_sizes,
    sparsity_counts,
    taken_apart,
    threshold_counts,
)
from jaxprune.pruning.targets import floors as floors_of
from jaxprune.selection.big_counts import to_numpy
from jaxprune.selection.exact import Removal, select, select_arrays
from jaxprune.selection.lazy_scores import LazyScores
from jaxprune.structures import Structure, Units, elements
from jaxprune.tracing.recompute import Recomputation
from jaxprune.tree.checks import as_integer, check_params, shown
from jaxprune.tree.dtypes import is_narrow
from jaxprune.tree.masks import like_params, ones_masks
from jaxprune.tree.paths import array_leaves, describe, explain_paths, is_concrete, kernels, selected, some_of
from jaxprune.tree.sharding import sharded_like
from jaxprune.tree.stacks import (
    Family,
    Stacked,
    about_layers,
    check_stacks,
    families_of,
    join_layers,
    layer_indices,
    layer_name,
    layer_shape,
    leaf_of_layer,
    split_layers,
    stacks_of,
    take_layer,
)
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
    grads: Any = None,
    key: jax.Array | None = None,
    **extra: Any,
) -> Masks:
    """Masks that remove what scores lowest, in one go.

    Exactly one of `sparsity`, `count`, `threshold` says how much goes. A sparsity removes
    `round_half_even(sparsity * n)` of the n units that take part; of equal scores the earlier
    leaf, then the lower row-major index, goes first. What is pruned only ever grows: what
    `masks` has pruned stays so. It is a pure function and runs under `jit` and `vmap`; there the checks
    that need values (NaN scores, what the floor kept) are left out, and NaN ranks highest.

    Args:
      params: a pytree of arrays.
      scores: a function `score(params, *, grads, key, **extra)`, or a tree like `params` of real
        numbers. Larger means keep; signs count (`torch.nn.utils.prune` takes `|scores|`).
      sparsity: the fraction removed, in [0, 1); or one per path (see `distributions`), where
        leaves not named stay as they are.
      count: how many units to remove from what remains (entries; or slices, blocks, groups of
        the structure); or one per path. It may be traced.
      threshold: remove every unit whose score is below it; or one per path. It may be traced.
      of: `"total"`: the sparsity includes what was pruned before. `"remaining"`: it is a
        fraction of what `masks` keep.
      scope: `"global"` ranks all leaves together; `"layerwise"` takes the sparsity or the count
        from each leaf; `"isomorphic"`, of coupled channels, from all groups of one kind. A
        threshold is the same in all.
      structure: which entries go together (see `structures`); by default each is a unit.
      where: which leaves take part, a function of (path, leaf); by default `kernels`, which sees one layer of
        a stacked leaf, and for coupled channels what the network uses as weights (see `structures.channels`).
      masks: masks to start from; by default nothing is pruned.
      floor: how many units of each leaf stay at least. 0 lets a leaf be emptied, which cuts
        the network there.
      stacked: which leaves hold the same param of many layers: a function of (path, leaf) that returns how
        many leading axes of the leaf count layers, or a tuple of the axes that do. Each layer is then
        pruned as a leaf of its own, called `path[i]`, and axes of structures count those of one layer.
        Coupled channels know their stacks by themselves. A target of a stacked leaf by its path is one
        number for all layers, or an array of the stack's shape.
      grads: gradients like `params`, for scores that need them.
      key: a PRNG key, for scores that need it.
      **extra: passed on to the score, which must name them; a bare `**_` in its signature names nothing.

    Returns:
      A tree like `params` of bool masks, all True for leaves that take no part.

    Raises:
      ValueError: not exactly one target, a target out of range, a `where` that matches nothing,
        trees or shapes that differ, NaN or inf scores, an unknown path.
      TypeError: a leaf that cannot be pruned, a sparsity that is traced, scores that cannot rank, an
        argument that neither this function nor the score names.

    Warns:
      UserWarning: the target was not reached, `floor` kept units that would have gone, without
        a floor a leaf was emptied (layer collapse), or a stack of coupled channels keeps another number than
        was asked for, because it keeps equally many in each layer unless `scope="layerwise"`.

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
    where = default_where(where, structure, stacked)
    if sum(target is not None for target in (sparsity, count, threshold)) != 1:
        raise ValueError(
            "prune_once needs exactly one of sparsity, count and threshold, got "
            f"sparsity={sparsity}, count={count}, threshold={threshold}."
        )
    chosen = selected(params, where)
    structure = with_stacks(structure, stacked, array_leaves(params), chosen)
    whole = masks is None
    masks = ones_masks(params) if whole else like_params(masks, params)
    scores = of_layers(scores, params, structure.stacks, stacked)
    tree, recipes = score_and_recompute(scores, params, grads=grads, key=key, **extra)
    units = pool(tree, masks, chosen, structure, recipes, whole)
    # A threshold is the same for all, so every pool has its own count.
    competing = competing_pools(units.scores, structure, scope if threshold is None else "layerwise")
    what, target = next(
        (name, target)
        for name, target in (("sparsity", sparsity), ("count", count), ("threshold", threshold))
        if target is not None
    )
    target = by_layer(taken_apart(target, what), units.families, what)
    if what == "sparsity":
        counts = sparsity_counts(target, units, structure, competing, scope, of)
    elif what == "count":
        counts = checked_counts(target, units, competing, scope)
    else:
        counts = threshold_counts(target, units)
    includes_pruned = sparsity is not None and of == "total"
    least, equal = floors_of(units.scores, structure, floor), equal_families(units.families, scope)
    return remove(masks, units, counts, competing, least, includes_pruned, equal, tell=True)


def checked_structure(structure: Structure | None) -> Structure:
    """The structure, by default of single entries.

    Raises:
      TypeError: it is none; a function that makes one, say.
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
    """Which leaves take part: as asked; by default as the structure knows, and else by name."""
    if where is not kernels:
        return where
    stacks = structure.stacks
    named = about_layers(kernels, stacked if not stacks else lambda path, leaf: stacks.get(path, ()))
    if not structure.weights:
        return named

    # A leaf is asked about as a whole; it takes part if one of its layers is used as weights.
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


def with_stacks(
    structure: Structure, stacked: Stacked | None, leaves: Mapping[str, Any], chosen: Iterable[str]
) -> Structure:
    """The structure with the stacks of these leaves: its own, or as `stacked` says.

    Args:
      structure: a structure.
      stacked: as for `prune_once`.
      leaves: all leaves by path, params or masks.
      chosen: the paths of those that take part.

    Raises:
      ValueError: a structure that knows its stacks, and a function that says something else.
      TypeError: as `stacks_of`.
    """
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


def equal_families(families: Mapping[str, Family], scope: str) -> dict[str, Family]:
    """The stacks of coupled channels that keep equally many units in each layer under a scope."""
    return {name: family for name, family in families.items() if family.equal and scope != "layerwise"}


def check_choices(scope: str, of: str, floor: Any) -> int:
    """Checks the arguments that `prune_once` and `pruner` share, and returns the floor.

    Raises:
      ValueError: a value that is not among those allowed.
      TypeError: a floor that is not an integer.
    """
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    if not isinstance(of, str) or of not in ("total", "remaining"):
        raise ValueError(f"of must be 'total' or 'remaining', got {of!r}.")
    return as_integer(floor, "floor", at_least=0, what="units that stay per leaf")


def pool(
    scores: Scores,
    masks: Masks,
    chosen: list[str],
    structure: Structure,
    recipes: Mapping[str, Recomputation] = MappingProxyType({}),
    whole: bool = False,
) -> Units:
    """The scores of the chosen leaves, pooled into the structure's units.

    Args:
      scores: a tree of scores.
      masks: the masks now in force.
      chosen: the leaves that take part.
      structure: what pools.
      recipes: by path, how to compute scores again.
      whole: whether the masks are known to prune nothing.

    Raises:
      ValueError: NaN or inf scores (where values can be looked at), or a leaf that the structure
        does not fit.
      TypeError: scores that are not real, or mix floating-point and integer leaves.
    """
    leaves, before = array_leaves(scores, "scores"), array_leaves(masks, "masks")
    raw = {path: jnp.asarray(leaves[path]) for path in chosen}
    # JAX promotes floats of 8 bits to nothing by itself, and not all have infinity.
    raw |= {p: leaf.astype(jnp.bfloat16) for p, leaf in raw.items() if is_narrow(leaf.dtype, below=16)}
    floating = {path: jnp.issubdtype(leaf.dtype, jnp.floating) for path, leaf in raw.items()}
    for path, leaf in raw.items():
        if not floating[path] and not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise TypeError(f"scores[{path!r}] is {describe(leaf)}; scores are floating-point or integer.")
        if is_concrete(leaf):
            with jax.ensure_compile_time_eval():  # a traced function may have closed over it
                kept = before[path] if is_concrete(before[path]) else True
                bad = int(jnp.sum(~jnp.isfinite(leaf) & kept))
            if bad:
                raise ValueError(
                    f"scores[{path!r}] has {bad} entries that are NaN or inf, which cannot be ranked. "
                    "Check the params and gradients they come from; to spare a leaf use where=..."
                )
    dtypes = [leaf.dtype for leaf in raw.values()]
    if any(floating.values()):
        if not all(floating.values()):
            integers = ", ".join(path for path, is_float in floating.items() if not is_float)
            raise TypeError(f"scores are integers for {integers} and floating-point elsewhere; choose one.")
        # Half precision is exact in float32, where the sums of a structure do not round to ties.
        dtypes.append(jnp.dtype(jnp.float32))
    with jax.numpy_dtype_promotion("standard"):  # on purpose, so also where promotion is made strict
        dtype = jnp.result_type(*dtypes)
    # What is pruned already may have any score, such as the gradient of a square root at 0.
    picked = {
        path: (leaf if whole else jnp.where(before[path], leaf, jnp.zeros((), leaf.dtype))).astype(dtype)
        for path, leaf in raw.items()
    }
    # Units that span leaves may have to be told alive by leaves that give no scores.
    seen = before if structure.spans_leaves else {path: before[path] for path in chosen}
    stacks = {path: axes for path, axes in (structure.stacks or {}).items() if path in seen}
    check_stacks(stacks, seen)
    parts = split_layers(picked, stacks)
    units = structure.pool(parts, split_layers(seen, stacks))
    same = {name for name, part in parts.items() if units.scores.get(name) is part}
    # Where all units are entries of one dtype, they are ranked in it: half as many bits take half the time.
    narrow = len(same) == len(units.scores) and len(set(dtypes[: len(raw)])) == 1
    rank_dtype = dtypes[0] if narrow else dtype
    shapes = {path: seen[path].shape for path in stacks}
    layers = {
        layer_name(path, index): (path, axes, index)
        for path, axes in stacks.items()
        for index in layer_indices(shapes[path], axes)
    }

    def source(name: str) -> LazyScores:
        path, axes, index = layers.get(name, (name, (), ()))
        compute, inputs, compute_slice = recipes.get(path, Recomputation(lambda leaf: leaf, raw[path]))
        # Where masks have values, one program serves those that prune nothing as well.
        alive = None if whole and not is_concrete(raw[path]) else before[path]

        def read(given: Any) -> tuple[jax.Array, jax.Array | None]:
            take = partial(take_layer, axes=axes, index=index)
            # Of a layer its own slice alone is computed: a leaf computed for all its layers would be stored.
            if not index or compute_slice is None:
                scores = take(compute(given[0]))
            else:
                scores = compute_slice(given[0], take)
            return scores.astype(rank_dtype), None if given[1] is None else take(given[1])

        return LazyScores(read, (inputs, alive))

    sources = {name: source(name) for name in same}
    if not stacks:
        return units._replace(sources=sources)
    return units._replace(
        sources=sources,
        expand=lambda keep: _joined(units.expand(keep), stacks, {path: seen[path] for path in stacks}),
        families=families_in(structure, shapes, units.scores),
    )


def families_in(
    structure: Structure, shapes: Mapping[str, tuple[int, ...]], pools: Collection[str]
) -> dict[str, Family]:
    """By name, the pools that are the layers of a stack: of a leaf, or of coupled channels.

    Args:
      structure: what pools.
      shapes: the shapes of stacked leaves by path.
      pools: the names of all pools.
    """
    families = families_of(structure.stacks or {}, shapes, pools)
    for name, family in structure.families.items():
        if pooled := tuple(pool for pool in family.names if pool in pools):
            shape = family.shape if len(pooled) == len(family.names) else (len(pooled),)
            families[name] = family._replace(names=pooled, shape=shape)
    return families


def _joined(
    entries: Mapping[str, jax.Array],
    stacks: Mapping[str, tuple[int, ...]],
    leaves: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Masks by path from those of layers; a layer in which no unit lies is kept whole."""
    complete, shapes = dict(entries), {path: leaf.shape for path, leaf in leaves.items()}
    for path, axes in stacks.items():
        names = [layer_name(path, index) for index in layer_indices(shapes[path], axes)]
        if any(name in entries for name in names):
            whole = jnp.ones(layer_shape(shapes[path], axes), bool)
            complete |= {name: entries.get(name, whole) for name in names}
    joined = join_layers(complete, stacks, shapes)
    return {path: sharded_like(x, leaves[path]) if path in leaves else x for path, x in joined.items()}


def remove(
    masks: Masks,
    units: Units,
    counts: Counts,
    competing: Competing,
    floors: Mapping[str, int],
    includes_pruned: bool = False,
    equal: Mapping[str, Family] = MappingProxyType({}),
    tell: bool = False,
) -> Masks:
    """Masks without the lowest units.

    Args:
      masks: the masks now in force, those that `units` were pooled under.
      units: the pooled scores.
      counts: how many units go, by rank; beyond what the floors allow none go.
      together: the pools of each rank.
      floors: how many units of each pool stay at least.
      of_all: whether the counts include what is pruned already.
      equal: stacks of which each layer keeps equally many units, the number nearest to what its layers
        would keep together.
      tell: whether to warn where that is another number.

    Returns:
      Masks like `masks`, keeping a subset.

    Raises:
      ValueError: the units lie in leaves that the masks do not have.
    """
    gone = _lowest_units(units, counts, competing, floors, includes_pruned)
    if is_concrete(units.alive, counts, gone):
        _say_what_was_not_done(units, counts, competing, floors, includes_pruned, gone)
    if equal:
        pooled, gone = gone, _equally_many(units, gone, equal, floors)
        if tell and is_concrete(units.alive, pooled, gone):
            _say_what_equal_numbers_changed(units, equal, pooled, gone)
    before = array_leaves(masks, "masks")
    changed = kept_entries(units, {name: ~gone[name] for name in gone}, before)
    if not any(floors.values()) and is_concrete(before, changed):
        _say_what_collapsed({path: (before[path], mask) for path, mask in changed.items()})
    return jax.tree.unflatten(jax.tree.structure(masks), list((before | changed).values()))


def kept_entries(
    units: Units, keep: Mapping[str, jax.Array], before: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The masks of the leaves that units lie in, given the units that stay and the masks before.

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
    return {path: before[path] & mask for path, mask in entries.items()}


def _lowest_units(
    units: Units, counts: Counts, competing: Competing, floors: Mapping[str, int], includes_pruned: bool
) -> dict[str, jax.Array]:
    """For each pool, the units that go."""
    names = [name for members in competing.values() for name in members]
    request = Removal(
        competing=tuple(number for number, members in enumerate(competing.values()) for _ in members),
        counts=tuple(counts[rank] for rank in competing),
        floors=tuple(floors[name] for name in names),
        includes_pruned=includes_pruned,
    )
    stored = {
        name: LazyScores(lambda given: given, (units.scores[name], units.alive[name])) for name in names
    }
    sources = [units.sources.get(name, stored[name]) for name in names]
    if is_concrete(request.counts, [source.inputs for source in sources]):
        read = [source.read(source.inputs) for source in sources]
        gone = select_arrays([scores for scores, _ in read], [alive for _, alive in read], request)
    else:
        gone = select(sources, request)
    return dict(zip(names, gone, strict=True))


def _equally_many(
    units: Units, gone: Mapping[str, jax.Array], equal: Mapping[str, Family], floors: Mapping[str, int]
) -> dict[str, jax.Array]:
    """For each pool, the units that go, where each layer of a stack keeps as many as the others."""
    counts: dict[str, Any] = {}
    for family in equal.values():
        alive = [jnp.sum(units.alive[name], dtype=jnp.int32) for name in family.names]
        kept = [jnp.sum(units.alive[name] & ~gone[name], dtype=jnp.int32) for name in family.names]
        least = max(floors[name] for name in family.names)
        number = kept_in_each(jnp.stack(kept), jnp.stack(alive), least, family.multiple_of)
        counts |= {n: jnp.maximum(a - number, 0) for n, a in zip(family.names, alive, strict=True)}
    lowest = _lowest_units(units, counts, {name: (name,) for name in counts}, dict.fromkeys(counts, 0), False)
    return {**gone, **lowest}


def kept_in_each(kept: Any, alive: Any, floor: int, multiple_of: int) -> Any:
    """How many units each layer of a stack keeps, so that all keep equally many.

    That is the mean of what they would keep, rounded half to even, then up to a multiple. What is pruned
    never comes back, so it is at most what the layer with the fewest has left.

    Args:
      kept: how many units each layer would keep, an array of NumPy or of JAX.
      alive: how many units each has left.
      floor: how many each keeps at least; one that has fewer left keeps those.
      multiple_of: the multiple.

    Example:
      >>> import numpy as np
      >>> from jaxprune.prune import kept_in_each
      >>> [int(kept_in_each(np.array(kept), np.array([9, 9]), 2, 1)) for kept in ([5, 2], [0, 1], [7, 6])]
      [4, 2, 6]
    """
    xp: Any = np if isinstance(kept, np.ndarray) else jnp
    whole, rest = xp.divmod(xp.sum(kept, dtype=kept.dtype), len(kept))
    number = whole + ((2 * rest > len(kept)) | ((2 * rest == len(kept)) & (whole % 2 == 1)))
    fewest, most = xp.min(alive), xp.max(alive)
    up = -(-xp.maximum(number, floor) // multiple_of) * multiple_of
    # Beyond what a layer has left: all of it, if all have as many left, and else a multiple that all have.
    down = fewest - fewest % multiple_of
    within = xp.where((fewest == most) | (down < floor), fewest, down)
    return xp.maximum(xp.where(up <= fewest, up, within), xp.minimum(floor, most))


def _say_what_equal_numbers_changed(
    units: Units,
    equal: Mapping[str, Family],
    pooled: Mapping[str, jax.Array],
    gone: Mapping[str, jax.Array],
) -> None:
    """Warns of stacks that keep more or fewer units than was asked for."""
    for name, family in equal.items():
        asked, got = (
            [int(jnp.sum(units.alive[pool] & ~each[pool])) for pool in family.names]
            for each in (pooled, gone)
        )
        if sum(asked) != sum(got):
            each = str(got[0]) if len(set(got)) == 1 else ", ".join(map(str, got))
            warnings.warn(
                f"{name}: {sum(got)} units are kept where the target asks for {sum(asked)}, because a stack "
                f"keeps equally many in each of its {len(got)} layers: {each}. With scope='layerwise' each "
                "layer, or stack, has a target of its own.",
                stacklevel=4,
            )


def _say_what_collapsed(masks: dict[str, tuple[Any, Any]]) -> None:
    """Warns where a leaf lost its last entry: no signal passes it any more."""
    emptied = [path for path, (old, new) in masks.items() if bool(jnp.any(old)) and not bool(jnp.any(new))]
    if emptied:
        warnings.warn(
            f"layer collapse: {', '.join(emptied)} kept nothing, so no signal passes there. floor=1 keeps "
            "the best unit of each leaf.",
            stacklevel=4,
        )


def _say_what_was_not_done(
    units: Units,
    counts: Counts,
    competing: Competing,
    floors: Mapping[str, int],
    includes_pruned: bool,
    gone: dict[str, jax.Array],
) -> None:
    """Warns where a target was missed, and where only the floor kept a leaf from being emptied."""
    done = {name: int(jnp.sum(mask)) for name, mask in gone.items()}
    alive = {name: int(jnp.sum(mask)) for name, mask in units.alive.items()}
    got, left = competing_sizes(done, competing), competing_sizes(alive, competing)
    floor = max(floors.values())
    before = competing_sizes(pool_sizes(units), competing) if includes_pruned else left
    for name, count in counts.items():
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
    full = [name for name in shared if floors[name] and alive[name] - done[name] <= floors[name]]
    if not full:
        return
    loose = _lowest_units(units, counts, competing, dict.fromkeys(floors, 0), includes_pruned)
    if spared := [name for name in full if int(jnp.sum(loose[name])) > done[name]]:
        warnings.warn(
            f"floor={floor} kept the last units of {', '.join(spared)}, which rank among the lowest; "
            "other leaves gave more instead. floor=0 lets a leaf be emptied.",
            stacklevel=4,
        )
