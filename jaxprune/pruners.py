"""Pruners: pruning over time, as a pair of pure functions."""

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.arguments import check_state, is_number, shown
from jaxprune.control import update_if
from jaxprune.masks import apply_masks, ones_masks, packed_like, unpack_masks
from jaxprune.paths import check_mirrors, is_concrete, kernels, selected
from jaxprune.prune import (
    all_finite,
    check_choices,
    check_score_is_no_name,
    checked_structure,
    default_where,
    pool,
    remove,
    scored,
)
from jaxprune.recompute import Recipe
from jaxprune.schedules import Schedule, check_sparsity, constant
from jaxprune.structures import Structure
from jaxprune.targets import floors, per_pool, rank_sizes, ranks, target_counts
from jaxprune.typing import Masks, Params, PerPath, Pruner, PrunerState, ScoreFn, Scores, Where
from jaxprune.wide import take, wide

_MAX_TABLE = 2**20


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
    seed: int = 0,
) -> Pruner:
    """A pruner that follows a schedule, acting every so many updates.

    `update` counts its calls. A schedule with an end is followed at the calls `begin_step`,
    `begin_step + every`, ... and, whatever `every` is, at `end_step`: after t updates the masks
    have the sparsity `schedule(t)` of the last of these that passed. A schedule of levels
    (`constant`, `geometric`) moves one level every `every` calls. What is pruned only ever
    grows. The number to remove is worked out on the host, in double precision, when `update` is traced.

    Under `jit` nothing can be raised, so an update whose scores are not all finite (a burst of NaN
    gradients) leaves the masks alone and is made up for at the next call.

    Args:
      scores: a function `score(params, *, grads, key, **extra)`.
      sparsity: a number, a `Schedule`, or a dict of these by path; the schedules in a dict share
        their begin and end.
      structure: which entries go together (see `structures`); by default each is a unit.
      scope: `"global"` ranks all leaves together; `"layerwise"` takes the target from each leaf;
        `"isomorphic"`, of coupled channels, from all groups of one kind.
      where: which leaves take part, a function of (path, leaf).
      of: `"total"`, or `"remaining"`: each update removes its fraction of what the last one left.
      every: how many calls lie between two updates of the masks.
      floor: how many units of each leaf stay at least.
      memory: in [0, 1]. Every call scores, and its scores are added to `memory` times those of
        the calls before: 0 takes the present ones alone, 1 their sum over all calls (movement
        pruning, taylor over many batches), 0.99 a moving average.
      stop: a sparsity of all that takes part together, at which pruning ends, whatever the
        schedule goes on to. The update that would pass it removes, everywhere in proportion, as
        many units fewer as make it meet it exactly.
      seed: for scores that need a key, where `update` is given none.

    Returns:
      A `Pruner`.

    Raises:
      ValueError: an argument out of range; on `init`, what `where` does not match; on `update`,
        what `prune_once` raises.
      TypeError: a schedule that is a plain function, without begin and end.

    Warns:
      UserWarning: the schedule's target cannot be reached without breaking `floor`.

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
        raise TypeError(f"pruner needs a score function such as jaxprune.scores.magnitude, got {scores!r}.")
    check_choices(scope, of, floor)
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer of 1 or more (calls between updates), got {every!r}.")
    if not is_number(memory) or not 0 <= memory <= 1:
        raise ValueError(f"memory must be in [0, 1], the weight of earlier calls' scores, got {memory!r}.")
    limit = None if stop is None else check_sparsity(stop, "stop")
    schedules = _schedules(sparsity)
    grid = _Grid(next(iter(schedules.values())), every)
    structure = checked_structure(structure)
    where = default_where(where, structure)

    @lru_cache(maxsize=8)
    def table(sizes: tuple[tuple[str, int], ...]) -> np.ndarray:
        return _table(schedules, grid, dict(sizes), structure, scope, of, floor, limit)

    def init_fn(params: Params) -> PrunerState:
        selected(params, where)
        masks = ones_masks(params)
        # Made from the masks, so that under jit they are sharded like the params.
        total = jax.tree.map(lambda p, m: (~m).astype(_sum_dtype(p)), params, masks) if memory else ()
        return PrunerState(masks, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), total)

    def update_fn(state: PrunerState, params: Params, grads: Any = None, key: Any = None, **extra: Any):
        if params is None:
            raise ValueError("pruner.update needs params: the scores are of them.")
        check_state(state)
        chosen = selected(params, where)
        check_mirrors(jax.eval_shape(unpack_masks, state.masks), params, "the masks of the pruner's state")

        def scores_now(step: jax.Array) -> tuple[Scores, dict[str, Recipe]]:
            rng = jax.random.fold_in(jax.random.key(seed), step) if key is None else key
            return scored(scores, params, grads=grads, key=rng, **extra)

        def tree_now(state: PrunerState) -> tuple[Scores, dict[str, Recipe]]:
            return (state.scores, {}) if memory else scores_now(state.step)

        state = state._replace(step=state.step + 1)
        sound: Any = True
        if memory:
            now, _ = scores_now(state.step)
            masks = unpack_masks(state.masks)
            sound = all_finite(now, masks, chosen)
            if is_concrete(sound):
                pool(now, masks, chosen, structure)  # says which scores are not finite

            def added(old, new):
                total = memory * old + new.astype(old.dtype)
                # Entries that take no part may be NaN now, and sums may overflow, which would be for ever.
                return jnp.where(sound & jnp.isfinite(total), total, old)

            state = state._replace(scores=jax.tree.map(added, state.scores, now))

        alive = jax.eval_shape(
            lambda state: pool(tree_now(state)[0], unpack_masks(state.masks), chosen, structure).alive, state
        )
        sizes = {name: units.size for name, units in alive.items()}
        targets = table(tuple(sizes.items()))
        row = jnp.minimum(grid.row(state.step), len(targets) - 1)

        def advance(state: PrunerState) -> PrunerState:
            tree, recipes = tree_now(state)
            before = unpack_masks(state.masks)
            units = pool(tree, before, chosen, structure, recipes)
            together, least = ranks(units.scores, structure, scope), floors(units.scores, structure, floor)
            # In two halves, because a count may be more than an int32 holds.
            now = jax.tree.map(lambda half: jnp.asarray(half)[row], wide(targets))
            counts = {rank: take(now, column) for column, rank in enumerate(together)}
            masks = remove(before, units, counts, together, least, of_all=True)
            finite = all_finite(tree, before, chosen)
            masks = jax.tree.map(lambda new, old: jnp.where(finite, new, old), masks, before)
            masks = packed_like(masks, state.masks)
            return state._replace(masks=masks, row=jnp.where(finite, row, state.row))

        due = (row > state.row) & sound
        return update_if(due, advance, state)

    return Pruner(init_fn, update_fn, remembers=memory > 0)


def prune_rounds(params: Params, pruner: Pruner, rounds: int | jax.Array, **inputs: Any) -> Masks:
    """Masks after several updates of a pruner without training in between.

    Each round scores the params under the masks so far. For scores of the masked network this is
    iterated pruning at initialisation (SynFlow); for scores of single weights it is one-shot
    pruning to the sparsity of that round. Under `jit` a round whose scores are not finite changes
    nothing, as of a network that SynFlow finds to be cut; outside `jit` it raises.

    Args:
      params: a pytree of arrays.
      pruner: a `Pruner`, as from `pruner(scores, geometric(rate))`.
      rounds: how many; it may be traced.
      **inputs: passed on to the pruner's update (`grads`, `key`, ... for the score).

    Returns:
      Masks like `params`.

    Raises:
      ValueError: `rounds` is negative or not an integer.

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
    number = (
        isinstance(rounds, jax.Array) and rounds.shape == () and jnp.issubdtype(rounds.dtype, jnp.integer)
    )
    if not (number or isinstance(rounds, (int, np.integer))) or (is_concrete(rounds) and rounds < 0):
        raise ValueError(f"rounds must be an integer of 0 or more, got {rounds!r}.")
    state = pruner.init(params)
    if not is_concrete(params, rounds, state):
        return jax.lax.fori_loop(0, rounds, update, state).masks
    for number in range(int(rounds)):
        state = update(number, state)
    return state.masks


class _Grid:
    """The calls at which a pruner acts, numbered from row 1; row 0 is before the first.

    Attributes:
      last: the last row, or None where rows are levels without end.
    """

    def __init__(self, schedule: Schedule, every: int):
        self.begin, self.end, self.every = schedule.begin_step, schedule.end_step, every
        self.last = None if self.end is None else -(-(self.end - self.begin) // every) + 1

    def count(self, row: int) -> int:
        """The schedule's count at a row: a step, or the level itself."""
        return row if self.end is None else min(self.begin + (row - 1) * self.every, self.end)

    def row(self, step: jax.Array) -> jax.Array:
        """The row last passed after `step` calls."""
        if self.end is None or self.last is None:
            return lax.div(step, jnp.full_like(step, self.every))
        # Rounded towards 0, as is enough here, because rounding down takes several operations more.
        since = step - self.begin
        passed = jnp.where(since < 0, 0, lax.div(since, jnp.full_like(since, self.every)) + 1)
        return jnp.where(step >= self.end, self.last, passed)


def _sum_dtype(param: Any) -> Any:
    """The dtype in which a param's scores are summed: real, and of single precision at least."""
    real = jnp.finfo(param.dtype).dtype if jnp.issubdtype(param.dtype, jnp.inexact) else jnp.float32
    return jnp.dtype(real) if jnp.dtype(real).itemsize == 8 else jnp.dtype(jnp.float32)


def _schedules(sparsity: Any) -> dict[str, Schedule]:
    """The schedules by path; under the path "" if there is one for all."""

    def schedule(value: Any) -> Schedule:
        if isinstance(value, Schedule):
            return value
        if callable(value):
            raise TypeError(
                "a schedule must know where it begins and ends: pass "
                "jaxprune.Schedule(function, begin_step=..., end_step=...), or one of jaxprune.schedules."
            )
        return constant(value)

    if not isinstance(sparsity, Mapping):
        return {"": schedule(sparsity)}
    by_path = {path: schedule(value) for path, value in sparsity.items()}
    if not by_path:
        raise ValueError("sparsity is an empty dict, so nothing would be pruned.")
    spans = {path: (s.begin_step, s.end_step) for path, s in by_path.items()}
    if len(set(spans.values())) > 1:
        raise ValueError(f"the schedules of one pruner share their begin and end step, got {spans}.")
    return by_path


def _table(
    schedules: dict[str, Schedule],
    grid: _Grid,
    sizes: dict[str, int],
    structure: Structure,
    scope: str,
    of: str,
    floor: int,
    limit: float | None,
) -> np.ndarray:
    """How many units are removed in total, by row and rank (one column for all if global).

    Rows go to the schedule's end; without an end, until nothing changes any more; and never
    beyond the limit, a sparsity of all units.
    """
    together, least = ranks(sizes, structure, scope), floors(sizes, structure, floor)
    units = rank_sizes(sizes, together)
    if "" not in schedules:
        per_pool(schedules, units, "sparsity", None, scope)

    def asked(count: int) -> Any:
        values = {path: float(schedule(np.float64(count))) for path, schedule in schedules.items()}
        return values.get("", values)

    def removed(remaining: dict[str, int], count: int) -> np.ndarray:
        return np.array(list(target_counts(asked(count), remaining, structure, scope).values()))

    all_units, end = np.array(list(units.values())), None
    if limit is not None:
        (end,) = target_counts(limit, {"stop": int(all_units.sum())}, structure, "global").values()
    spare = rank_sizes({name: min(least[name], size) for name, size in sizes.items()}, together)
    most = all_units - np.array(list(spare.values()))
    if grid.last is not None:
        _check_table_size(grid.last, len(most), grid)
    rows = [np.zeros_like(most)]
    missed = np.zeros_like(most)
    while grid.last is None or len(rows) <= grid.last:
        now = grid.count(len(rows))
        if of == "total":
            target = np.maximum(removed(units, now), rows[-1])
        else:
            target = rows[-1] + removed(dict(zip(units, (all_units - rows[-1]).tolist(), strict=True)), now)
        missed = target - most
        rows.append(np.minimum(target, most))
        if end is not None and rows[-1].sum() >= end:
            rows[-1] = rows[-2] + _shared_out(end - int(rows[-2].sum()), rows[-1] - rows[-2])
            missed = np.zeros_like(most)
            break
        _check_table_size(len(rows), len(most), grid)
        if grid.last is None and end is None and len(rows) == 4096:
            # So many levels take a second. That the last of all that there can be is too few is said now.
            beyond = _MAX_TABLE // len(most) + 1
            if asked(beyond - 1) != asked(beyond):
                _check_table_size(beyond, len(most), grid)
        if grid.last is None and (rows[-1] == rows[-2]).all() and asked(now) == asked(now + 1):
            break
    # Only levels that go on for ever are meant to end at the floor.
    constant_total = of == "total" and asked(1) == asked(len(rows))
    if (grid.last is not None or constant_total) and (missed > 0).any():
        _say_missed(units, missed, max(least.values()))
    while len(rows) > 1 and (rows[-1] == rows[-2]).all():
        rows.pop()  # No reason to score and select where nothing changes.
    return np.stack(rows)


def _shared_out(count: int, most: np.ndarray) -> np.ndarray:
    """A count shared out in proportion to `most`; the largest remainders, then the first, round up."""
    share, remainder = np.divmod(most.astype(np.int64) * count, max(1, int(most.sum())))
    first = np.argsort(-remainder, kind="stable")[: count - int(share.sum())]
    share[first] += 1
    return share.astype(most.dtype)


def _check_table_size(rows: int, columns: int, grid: _Grid) -> None:
    if rows * columns > _MAX_TABLE:
        raise ValueError(
            f"the schedule makes {rows} or more updates of the masks, of {columns} targets each, above "
            f"the {_MAX_TABLE} that are tabulated. Raise every (now {grid.every}) or end it sooner."
        )


def _say_missed(units: dict[str, int], missed: np.ndarray, floor: int) -> None:
    names = ", ".join(f"{name} by {n}" for name, n in zip(units, missed.tolist(), strict=True) if n > 0)
    warnings.warn(
        f"the schedule's target is missed ({names} units), because floor={floor} units of each leaf stay. "
        "floor=0 lets a leaf be emptied.",
        stacklevel=2,
    )
