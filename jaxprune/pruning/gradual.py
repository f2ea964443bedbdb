"""Pruners: pruning over time, as a pair of pure functions."""

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.counting.sizes import alive_units
from jaxprune.pruning.contracted import calibrated_defaults, reads_statistics, with_contracted_axes
from jaxprune.pruning.extras import check_extra, named_by
from jaxprune.pruning.once import (
    check_choices,
    checked_scores,
    checked_structure,
    default_where,
    pool,
    remove,
)
from jaxprune.pruning.scoring import all_finite, check_score_is_no_name, of_layers, score_and_recompute
from jaxprune.pruning.table import (
    FROM_MASKS,
    NO_SCHEDULE,
    Grid,
    ScheduledTarget,
    ScheduleTable,
    names_by_place,
    schedules_by_path,
)
from jaxprune.pruning.targets import (
    Competing,
    Target,
    alive_counts,
    by_layer,
    competing_pools,
    competing_sizes,
    equal_families,
    floors,
    pool_sizes,
)
from jaxprune.schedules import Schedule, check_sparsity
from jaxprune.selection.big_counts import Count, to_numpy
from jaxprune.structures.base import Structure, Units, families_in, with_stacks
from jaxprune.tracing.control import update_if
from jaxprune.tracing.recompute import Recomputation
from jaxprune.tree.checks import as_integer, check_state, is_number, name_of, shown
from jaxprune.tree.host import num_true, num_true_along
from jaxprune.tree.leaves import array_leaves, flatten, is_concrete
from jaxprune.tree.masks import apply_masks, bool_masks, ones_masks, own_masks, packed_like, unpack_masks
from jaxprune.tree.mirrors import mirrored
from jaxprune.tree.stacks import Stacked, check_stacked, split_shapes
from jaxprune.tree.statistics import InputStatistics
from jaxprune.tree.where import kernels, selected_among
from jaxprune.typing import (
    DenseShapes,
    Masks,
    Params,
    PerPath,
    Progress,
    Pruner,
    PrunerState,
    ScoreFn,
    Scores,
    Where,
)


def pruner(
    scores: ScoreFn,
    sparsity: float | Schedule | PerPath,
    *,
    structure: Structure | None = None,
    scope: str = "global",
    where: Where = kernels,
    of: str = "total",
    every: int = 1,
    floor: int = 1,
    memory: float = 0.0,
    stop: float | None = None,
    masks: Masks | None = None,
    seed: int = 0,
    stacked: Stacked | None = None,
) -> Pruner:
    """Make a pruner that follows a schedule and updates its masks every so many calls.

    `update` counts its calls. A schedule with an end is followed at the calls `begin_step`,
    `begin_step + every`, ... and, whatever `every` is, at `end_step`: after t calls the masks
    have the sparsity `schedule(t)` of the last of these that passed. A schedule of levels
    (`constant`, `geometric`) moves one level every `every` calls. Pruned entries stay pruned.
    The host works out how many units to remove, in double precision, when `update` is traced.

    This pruner can carry on from a state that another pruner left, whatever that one's schedule, cadence or
    target was: the next call reaches what this schedule asks for at the state's number of calls. With
    `of="remaining"` each update, from the next of this cadence on, removes its fraction of what the state has
    left. If `compact` made the params smaller and `shrink` the state with them, the units that it cut out
    count as removed, so coupled channels end with the widths that they would have had without.

    Under `jit` nothing can be raised, so an update whose scores are not all finite (a burst of NaN
    gradients) leaves the masks alone and is made up for at the next call.

    Args:
      scores: a function `score(params, *, grads, key, **extra)`.
      sparsity: a number, a `Schedule`, or a dict of these by path; the schedules in a dict share
        their begin and end.
      structure: which entries form a unit (see `structures`); by default each entry is one.
      scope: which units compete. `"global"`: those of all leaves. `"layerwise"`: those of one leaf, so each
        leaf meets the target. `"isomorphic"`, for coupled channels: those of all groups of one kind.
        `"output"`, for entries, N:M groups and blocks: the inputs of one output, so each output meets the
        target (see `prune_once`).
      where: which leaves take part, a function of (path, leaf). If `update` gets `stats=`, the default is the
        calibrated leaves; pass `where=stats.where` for tables of the masks to show these as well.
      of: `"total"`, or `"remaining"`: each update removes its fraction of what the last one left.
      every: how many calls lie between two updates of the masks.
      floor: how many units of each leaf stay at least, with `scope="output"` of each output.
      memory: in [0, 1]. Every call computes scores and adds them to `memory` times the sum so far: 0 uses the
        present scores alone, 1 their sum over all calls (movement pruning, taylor over many batches), 0.99 a
        moving average.
      stop: a sparsity of all leaves that take part, taken together, at which pruning ends even if the
        schedule asks for more. An update that would overshoot is scaled down proportionally in every pool, so
        that the total is met exactly.
      masks: masks to start from, as from `prune_once`; by default nothing is pruned. What they prune counts
        towards a target `of="total"`.
      seed: the seed of the key for scores that need one, where `update` is given none.
      stacked: as for `prune_once`: which axes of which leaves count layers, each of which is then pruned as a
        leaf of its own. In a dict of targets a stacked leaf may have an array of numbers.

    Raises:
      ValueError: an argument out of range, `stop` or `of="remaining"` with `scope="output"`; on `init`, what
        `where` does not match; on `update`, what `prune_once` raises, but not that params changed since they
        were calibrated.
      TypeError: a schedule that is a plain function, without begin and end; on `update`, an extra argument
        that the score does not name.

    Warns:
      UserWarning: the schedule's target cannot be reached without breaking `floor`; `every` is longer than
        the whole schedule; how many units a structure of your own had before `compact` is not known.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> pruner = jp.pruner(jp.scores.magnitude, sparsity=jp.schedules.geometric(0.5))
      >>> state = pruner.init(params)
      >>> for level in range(3):
      ...     state = pruner.update(state, params)
      ...     print(int(state.masks["kernel"].sum()))
      5
      2
      1

    References:
      Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878 (gradual);
      Han et al., "Learning both Weights and Connections", NIPS 2015 (iterative).
    """
    check_score_is_no_name(scores)
    if not callable(scores):
        raise TypeError(
            f"pruner needs a score function such as jaxprune.scores.magnitude, got {shown(scores)}."
        )
    floor = check_choices(scope, of, floor)
    every = as_integer(every, "every", at_least=1, what="calls between updates")
    if not is_number(memory) or not 0 <= memory <= 1:
        raise ValueError(f"memory must be in [0, 1], the weight of earlier calls' scores, got {memory!r}.")
    seed = as_integer(seed, "seed")
    stop = None if stop is None else check_sparsity(stop, "stop")
    if stop is not None and scope == "output":
        raise ValueError(
            "stop= is met to the unit by all leaves together, and with scope='output' all outputs of a leaf "
            "lose equally many. Let the schedule end at the sparsity."
        )
    schedules = schedules_by_path(sparsity)
    first = next(iter(schedules.values()))
    grid = Grid(first.begin_step, first.end_step, every)
    structure = checked_structure(structure)
    given_where, where = where, default_where(where, structure, stacked)
    masks = None if masks is None else bool_masks(masks)
    if stacked is not None:
        check_stacked(stacked)
    scheduled = ScheduledTarget(schedules, grid, structure, scope, of, floor, stop)
    description = _described(scores, scheduled)
    if grid.end is not None and 0 < grid.end - grid.begin < every:
        warnings.warn(
            f"{description}: every={every} is longer than the schedule, which takes {grid.end - grid.begin} "
            f"calls, so masks change at its begin and at its end only. Lower every, or pass "
            "schedules.one_shot to prune once.",
            stacklevel=2,
        )

    @lru_cache(maxsize=8)
    def table_of(
        sizes: tuple[tuple[str, int], ...],
        cut_out: tuple[tuple[str, int], ...],
        places: tuple[str, ...],
        stacks: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...],
    ) -> ScheduleTable:
        known = structure._replace(stacks={path: axes for path, axes, _ in stacks}) if stacks else structure
        shapes = {path: shape for path, _, shape in stacks}
        target = _target_by_layer(scheduled, known, shapes, dict(sizes))
        return ScheduleTable.build(target, dict(sizes), dict(cut_out), places)

    def init_fn(params: Params) -> PrunerState:
        leaves = array_leaves(params)
        with_stacks(structure, stacked, leaves, selected_among(leaves, where))  # which may raise
        start = ones_masks(params) if masks is None else own_masks(masks, params)
        schedule = NO_SCHEDULE if masks is None else FROM_MASKS
        # An array for each number: a train step that donates its state can donate no array twice.
        step, row = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        total = _zero_scores(params) if memory else ()
        return PrunerState(start, step, row, total, jnp.asarray(schedule, jnp.int32))

    def update_fn(
        state: PrunerState,
        params: Params,
        grads: Any = None,
        key: Any = None,
        stats: InputStatistics | None = None,
        **extra: Any,
    ) -> PrunerState:
        if params is None:
            raise ValueError("pruner.update needs params: the scores are of them.")
        check_state(state)
        check_extra(scores, extra, "pruner.update", ("grads", "key", "stats"))
        leaves = flatten(params)
        takes_part, axes_of, reads = where, stacked, False
        if stats is not None:
            takes_part, axes_of = calibrated_defaults(stats, given_where, stacked, structure)
            takes_part = default_where(takes_part, structure, axes_of)
            reads = reads_statistics(scores, params)
            extra = {**extra, "stats": stats} if reads else extra
        chosen = selected_among(leaves.by_path, takes_part)
        units_of = with_stacks(structure, axes_of, leaves.by_path, chosen)
        if stats is not None or scope == "output":
            units_of = with_contracted_axes(units_of, scope, stats, leaves.by_path, chosen, reads)
        score = of_layers(scores, params, units_of.stacks, axes_of)
        mirrored(jax.eval_shape(unpack_masks, state.masks), leaves, "the masks of the pruner's state")

        # `update_if` passes a state on to its branch, and what the branch closes over is one operand more.
        def scores_now(step: jax.Array) -> tuple[Scores, dict[str, Recomputation]]:
            rng = jax.random.fold_in(jax.random.key(seed), step) if key is None else key
            return score_and_recompute(score, params, leaves, grads=grads, key=rng, **extra)

        def score_and_pool(state: PrunerState, masks: Mapping[str, jax.Array]) -> tuple[Scores, Units]:
            tree, recipes = (state.scores, {}) if memory else scores_now(state.step)
            return tree, pool(array_leaves(tree, "scores"), masks, chosen, units_of, recipes)

        def alive_now(state: PrunerState) -> OrderedDict[str, jax.Array]:
            masks = array_leaves(unpack_masks(state.masks), "masks")
            if eager:
                _, units = score_and_pool(state, masks)
            else:
                units = pool(
                    {path: jnp.zeros(mask.shape) for path, mask in masks.items()}, masks, chosen, units_of
                )
            # JAX sorts the keys of a dict, but not those of an OrderedDict: the first pool stays the first.
            return OrderedDict((name, units.alive[name]) for name in units.scores)

        # Under `jit` each call traces `prune`, which traces the score. Outside, calls that prune nothing ask
        # the score as well, which may raise.
        eager = is_concrete(params, state)
        state = state._replace(step=state.step + 1)
        # A state may come from a pruner with another memory.
        if bool(memory) != bool(jax.tree.leaves(state.scores)):
            state = state._replace(scores=_zero_scores(params) if memory else ())
        added: Any = True
        if memory:
            state, added = _remembered(state, scores_now(state.step)[0], memory, chosen)

        sizes = pool_sizes(jax.eval_shape(alive_now, state), units_of.inputs)
        cut_out = _cut_out(state.dense, sizes, units_of, chosen, description)
        places = tuple(names_by_place(sizes, list(leaves.by_path)))
        stacks = tuple(
            (path, axes, tuple(leaves.by_path[path].shape)) for path, axes in (units_of.stacks or {}).items()
        )
        table = table_of(tuple(sizes.items()), tuple(cut_out.items()), places, stacks)
        position = table.position(state)

        def prune(state: PrunerState) -> PrunerState:
            before = unpack_masks(state.masks)
            masks = flatten(before, "masks")
            tree, units = score_and_pool(state, masks.by_path)
            finite = all_finite(tree, before, chosen)
            competing = competing_pools(units.scores, structure, scope)
            # What is pruned already counts, so a count of 0 removes nothing. That compiles faster than a
            # choice between the masks before and after, leaf by leaf.
            counts = table.counts(position, units.alive, competing, finite)
            if is_concrete(units.alive, position.reached) and int(position.reached) < table.last:
                counts = _no_less_than_removed(counts, units, competing, units_of.inputs)
            min_kept, equal = floors(units.scores, structure, floor), equal_families(units.families, scope)
            target = Target(competing, counts, min_kept, True, equal, units_of.inputs)
            after = masks.tree(remove(masks.by_path, units, target))
            if equal:  # stacks are made equal whatever the counts are
                after = jax.tree.map(partial(jnp.where, finite), after, before)
            row = jnp.where(finite, position.reached, position.applied)
            return state._replace(masks=packed_like(after, state.masks), row=row)

        # The row counts in this schedule from now on, also where nothing is due.
        state = state._replace(row=position.applied, schedule=table.schedule_at(position))
        return update_if(position.due & added, prune, state)

    return Pruner(
        init_fn,
        update_fn,
        remembers=memory > 0,
        description=description,
        takes=None if (names := named_by(scores)) is None else names | {"stats"},
        compounds=_compounds(scheduled),
        where=where,
        progress=partial(_progress, target=scheduled, where=where, stacked=stacked),
    )


def prune_rounds(params: Params, pruner: Pruner, rounds: int | jax.Array, **inputs: Any) -> Masks:
    """Return the masks after several updates of a pruner without training in between.

    Each round scores the params under the masks so far. For scores of the masked network this is
    iterated pruning at initialisation (SynFlow); for scores of single weights it is one-shot
    pruning to the sparsity of that round. Under `jit` a round whose scores are not finite (SynFlow's, where
    a network is cut) changes nothing; outside `jit` it raises.

    Args:
      params: a pytree of arrays.
      pruner: a `Pruner`, as from `pruner(scores, geometric(rate))`.
      rounds: how many; it may be traced.
      **inputs: passed on to the pruner's update (`grads`, `key`, ... for the score).

    Returns:
      Masks like `params`.

    Raises:
      ValueError: `rounds` is negative.
      TypeError: `rounds` is not an integer, or `pruner` is not a `Pruner`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> pruner = jp.pruner(jp.scores.magnitude, sparsity=jp.schedules.geometric(0.5))
      >>> jp.prune_rounds(params, pruner, 2)["kernel"].sum().item()
      2

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
      flow", NeurIPS 2020.
    """

    def update(_: Any, state: PrunerState) -> PrunerState:
        return pruner.update(state, apply_masks(params, state.masks), **inputs)

    if not isinstance(pruner, Pruner):
        raise TypeError(f"prune_rounds takes a pruner such as jaxprune.pruner(...), got {shown(pruner)}.")
    if not (isinstance(rounds, Tracer) and rounds.shape == () and jnp.issubdtype(rounds.dtype, jnp.integer)):
        rounds = as_integer(rounds, "rounds", at_least=0)
    state = pruner.init(params)
    if not is_concrete(params, rounds, state):
        return jax.lax.fori_loop(0, rounds, update, state).masks
    for number in range(int(rounds)):
        state = update(number, state)
    return state.masks


def _remembered(
    state: PrunerState, scores: Scores, memory: float, chosen: list[str]
) -> tuple[PrunerState, jax.Array]:
    """Return the state with the scores of a call added, if they are finite, and whether they are."""
    masks = unpack_masks(state.masks)
    finite = all_finite(scores, masks, chosen)
    if is_concrete(finite):
        checked_scores(array_leaves(scores, "scores"), array_leaves(masks, "masks"), chosen)

    def total_of(old: jax.Array, new: jax.Array) -> jax.Array:
        total = memory * old + new.astype(old.dtype)
        # Entries that take no part may be NaN now, and sums may overflow, which would be for ever.
        return jnp.where(finite & jnp.isfinite(total), total, old)

    return state._replace(scores=jax.tree.map(total_of, state.scores, scores)), finite


def _no_less_than_removed(
    counts: Mapping[str, Count],
    units: Units,
    competing: Competing,
    inputs: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Return the counts, each no less than what is removed already, so that `remove` does not warn of it.

    Masks to start from may be ahead of the schedule, which is worth a warning at its end only. Where `inputs`
    says which axes of units the inputs of an output lie along, each output gets a count.
    """
    if inputs:
        sizes = pool_sizes(units.alive, inputs)
        left = {name: num_true_along(units.alive[name], axes) for name, axes in inputs.items()}
        return {name: np.maximum(to_numpy(count), sizes[name] - left[name]) for name, count in counts.items()}
    by_pool = {name: units.alive[name].size - left for name, left in alive_counts(units).items()}
    removed = competing_sizes(by_pool, competing)
    return {name: max(int(to_numpy(count)), removed[name]) for name, count in counts.items()}


def _zero_scores(params: Params) -> Scores:
    """Return zeros to add scores to."""
    # Made from masks, so that under jit they are sharded like the params.
    return jax.tree.map(lambda p, m: (~m).astype(_sum_dtype(p)), params, ones_masks(params))


def _sum_dtype(param: Any) -> Any:
    """Return the dtype in which a param's scores are summed: real, and of single precision at least."""
    real = jnp.finfo(param.dtype).dtype if jnp.issubdtype(param.dtype, jnp.inexact) else jnp.float32
    return jnp.dtype(real) if jnp.dtype(real).itemsize == 8 else jnp.dtype(jnp.float32)


def _compounds(target: ScheduledTarget) -> bool:
    """Return whether every call prunes further."""
    if target.grid.every > 1 or target.grid.last == 1:
        return False
    if target.of == "remaining":
        second = target.grid.count(2)
        return any(schedule.on_host(second) > 0 for schedule in target.schedules.values())
    return target.grid.end is None and not target.is_constant()


def _described(scores: ScoreFn, target: ScheduledTarget) -> str:
    """Return a pruner in one line."""
    each = [str(schedule) for schedule in target.schedules.values()]
    one = "" in target.schedules
    asked = each[0] if one else f"{len(each)} targets by path, {', '.join(dict.fromkeys(each))}"
    options = [f"every={target.grid.every}", f"scope={target.scope!r}"]
    options += [f"of={target.of!r}"] if target.of != "total" else []
    options += [] if target.structure.elementwise else [f"structure={target.structure.name}"]
    return f"pruner({name_of(scores)}, {asked}, {', '.join(options)})"


def _cut_out(
    dense: Any, sizes: Mapping[str, int], structure: Structure, chosen: list[str], description: str
) -> dict[str, int]:
    """Return, by pool, how many units `compact` cut out when it made the params smaller."""
    if not isinstance(dense, DenseShapes):
        return {}
    before: Mapping[str, int | None] = {}
    if structure.sizes_of is not None:
        before = structure.sizes_of(split_shapes(dict(dense.by_path), structure.stacks or {}))
    elif not structure.spans_leaves:
        chosen_shapes = {path: shape for path, shape in dense.by_path if path in chosen}
        before = _sizes(split_shapes(chosen_shapes, structure.stacks or {}), structure)
    if unknown := [name for name in sizes if before.get(name) is None]:
        left = ", ".join(f"{name} has {sizes[name]}" for name in unknown)
        warnings.warn(
            f"{description}: compact cut units out, and {structure.name} does not say how many there were "
            f"before. The targets are of the units that are left ({left}), so more goes than was asked for.",
            stacklevel=3,
        )
    return {name: max((before.get(name) or size) - size, 0) for name, size in sizes.items()}


def _sizes(shapes: Mapping[str, tuple[int, ...]], structure: Structure) -> dict[str, int]:
    """Return how many units each pool of leaves of some shapes has."""

    def alive(masks: dict[str, jax.Array]) -> OrderedDict[str, jax.Array]:
        scores = {path: mask.astype(jnp.float32) for path, mask in masks.items()}
        return OrderedDict(structure.pool(scores, masks).alive)

    masks = {path: jax.ShapeDtypeStruct(shape, jnp.bool_) for path, shape in shapes.items()}
    return pool_sizes(jax.eval_shape(alive, masks), structure.inputs)


def _target_by_layer(
    target: ScheduledTarget,
    structure: Structure,
    shapes: Mapping[str, tuple[int, ...]],
    pools: Collection[str],
) -> ScheduledTarget:
    """Return the target with a schedule for each layer in place of those for a whole stack."""
    families = families_in(structure, shapes, pools)
    return target._replace(structure=structure, schedules=by_layer(target.schedules, families, "sparsity"))


def _progress(masks: Masks, target: ScheduledTarget, where: Where, stacked: Stacked | None) -> Progress:
    """Return how many units of what takes part are left, and how many are to go by the schedule's end."""
    leaves = array_leaves(unpack_masks(masks), "masks")
    chosen = [path for path, mask in leaves.items() if where(path, mask)]
    if not chosen:
        raise ValueError(
            f"where={name_of(where)} of the pruner matches no leaf of the masks: {', '.join(leaves)}."
        )
    structure = with_stacks(target.structure, stacked, leaves, chosen)
    alive = alive_units(structure, leaves, where)
    sizes = {name: units.size for name, units in alive.items()}
    stacks = {path: axes for path, axes in (structure.stacks or {}).items() if path in leaves}
    target = _target_by_layer(target, structure, {path: leaves[path].shape for path in stacks}, sizes)
    asked = None
    ends = target.grid.end is not None or target.is_constant()
    if target.of == "total" and target.scope != "output" and ends:
        competing = competing_sizes(sizes, competing_pools(sizes, structure, target.scope))
        asked = sum(target.counts(target.grid.count(target.grid.last or 1), competing).values())
        at_stop = target.count_at_stop(sum(sizes.values()))
        asked = asked if at_stop is None else min(asked, at_stop)
    kept = sum(num_true(alive.values()))
    unit = "entries" if structure.elementwise else f"units of {structure.name}"
    return Progress(unit, kept, sum(sizes.values()), asked, stacks)
