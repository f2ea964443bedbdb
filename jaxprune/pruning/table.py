"""The table of a pruner's targets: how many units are removed by each update of its masks.

Rows are the updates of the masks, from row 1 on; columns are the sets of pools that compete. The host works
a table out before the first update; a train step only looks up the row that its number of calls has reached.
Let n be the units of a set, m those that the floor lets go, s_r the sparsity at row r and N_r the entry:

    of="total":      N_r = min(max(round(s_r n), N_{r-1}), m)
    of="remaining":  N_r = min(N_{r-1} + round(s_r (n - N_{r-1})), m),    from N_0 = 0 on

A product is of doubles, rounded half to even (`selection.removed_count`), and all else is of integers, so no
error adds up over the rows. Entries are totals and not differences: an update that was put off, because its
scores were not finite, is made up for by the next.

The second recursion holds only for masks that this table made. Where a pruner takes over masks, only the
device knows how many units are left, and `ScheduleTable.counts` makes the product there, to the same unit.
"""

import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.pruning.targets import (
    Competing,
    competing_pools,
    competing_sizes,
    floors,
    per_pool,
    taken_apart,
    target_counts,
)
from jaxprune.schedules import Schedule, constant
from jaxprune.selection import big_counts
from jaxprune.selection.big_counts import BigCount, Count
from jaxprune.selection.search import count_true
from jaxprune.structures.base import Structure
from jaxprune.typing import PrunerState

_MAX_ENTRIES = 2**20

# Values of `PrunerState.schedule` that are no table's number.
NO_SCHEDULE = 0  # of a new state
FROM_MASKS = -1  # of a new state that starts from masks
REWIRED = 1  # its row counts the moves of `rewiring`
OTHER = 2  # its row counts something else


class Grid(NamedTuple):
    """The calls at which a pruner acts, numbered from row 1; row 0 is before the first.

    Attributes:
      begin: the schedule's first call.
      end: its last, or None where rows are levels without end.
      every: how many calls lie between two rows.
    """

    begin: int
    end: int | None
    every: int

    @property
    def last(self) -> int | None:
        """The last row, or None where rows are levels without end."""
        return None if self.end is None else -(-(self.end - self.begin) // self.every) + 1

    def count(self, row: int) -> int:
        """Return the schedule's count at a row: a step, or the level itself."""
        return row if self.end is None else min(self.begin + (row - 1) * self.every, self.end)

    def row(self, step: jax.Array) -> jax.Array:
        """Return the row last passed after `step` calls."""
        if self.end is None or self.last is None:
            return lax.div(step, jnp.full_like(step, self.every))
        # `lax.div` rounds towards 0, which is right from 0 on; rounding down takes several operations more.
        since = step - self.begin
        passed = jnp.where(since < 0, 0, lax.div(since, jnp.full_like(since, self.every)) + 1)
        return jnp.where(step >= self.end, self.last, passed)


class ScheduledTarget(NamedTuple):
    """What a pruner is asked for.

    Attributes:
      schedules: by path; under the path "" if there is one for all.
      grid: when it acts.
      structure: what pools entries into units.
      scope: which pools compete.
      of: of the "total", or of what is "remaining".
      floor: how many units of each pool stay at least.
      stop: a sparsity of all units at which pruning ends, or None.
    """

    schedules: Mapping[str, Schedule]
    grid: Grid
    structure: Structure
    scope: str
    of: str
    floor: int
    stop: float | None

    def sparsity(self, count: int) -> Any:
        """Return the sparsity at a count, as `target_counts` takes it: a number, or numbers by path."""
        values = {path: schedule.on_host(count) for path, schedule in self.schedules.items()}
        return values.get("", values)

    def is_constant(self) -> bool:
        """Return whether levels without end ask for the same from the first level on."""
        return self.sparsity(1) == self.sparsity(2) == self.sparsity(3)

    def counts(self, count: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return how many units the sparsity at a count removes from sets of the given sizes."""
        return target_counts(self.sparsity(count), sizes, self.structure, self.scope)

    def count_at_stop(self, size: int) -> int | None:
        """Return how many of all units are removed when pruning stops, or None if it never does."""
        if self.stop is None:
            return None
        return target_counts(self.stop, {"stop": size}, self.structure, "global")["stop"]


def schedules_by_path(sparsity: Any) -> dict[str, Schedule]:
    """Return the schedules by path: one for all under the path "", those of an array by `LayerOf`."""

    def schedule(value: Any) -> Schedule:
        if isinstance(value, Schedule):
            return value
        if callable(value):
            name = getattr(value, "__name__", "")
            raise TypeError(
                "a schedule must know where it begins and ends. Write "
                f"sparsity=jaxprune.Schedule({name if name.isidentifier() else 'schedule'}, begin_step=0, "
                "end_step=1000), with your own steps, or pass one of jaxprune.schedules."
            )
        return constant(value)

    if not isinstance(sparsity, Mapping):
        return {"": schedule(sparsity)}
    by_path = {path: schedule(value) for path, value in taken_apart(sparsity, "sparsity").items()}
    if not by_path:
        raise ValueError("sparsity is an empty dict, so nothing would be pruned.")
    spans = {path: (s.begin_step, s.end_step) for path, s in by_path.items()}
    if len(set(spans.values())) > 1:
        raise ValueError(f"the schedules of one pruner share their begin and end step, got {spans}.")
    return by_path


def names_by_place(pools: Iterable[str], paths: Sequence[str]) -> list[str]:
    """Return the names of pools with a leaf's place in place of its path: "0[1]" for "a/kernel[1]", say.

    The same layers in other containers have other paths, and the same places.
    """
    place = {path: str(number) for number, path in enumerate(paths)}

    def named(pool: str) -> str:
        path, rest = pool, ""
        while path not in place and "[" in path:  # of a layer and of an axis, "a/kernel[2][1]"
            path, bracket, last = path.rpartition("[")
            rest = bracket + last + rest
        return place[path] + rest if path in place else pool

    return [named(pool) for pool in pools]


def with_rows(state: PrunerState, shape: tuple[int, ...] = ()) -> PrunerState:
    """Return a state whose `row` has a shape: a pruner has one row, a recipe one for each of its sections."""
    schedule = state.schedule if jax.tree.leaves(state.schedule) else NO_SCHEDULE
    if jnp.shape(state.row) == shape:
        return state._replace(schedule=jnp.broadcast_to(jnp.asarray(schedule, jnp.int32), shape))
    # Rows of another shape count something else.
    return state._replace(row=jnp.zeros(shape, jnp.int32), schedule=jnp.full(shape, OTHER, jnp.int32))


class Position(NamedTuple):
    """Where a state is in a table.

    Attributes:
      reached: the row that the calls so far have reached.
      applied: the row that the masks are at.
      follows: whether the masks are the table's rows, from masks that pruned nothing on.
    """

    reached: jax.Array
    applied: jax.Array
    follows: jax.Array

    @property
    def due(self) -> jax.Array:
        """Whether the masks are to be updated."""
        return self.reached > self.applied


class ScheduleTable(NamedTuple):
    """How many units are removed, by row and by set of competing pools.

    Attributes:
      grid: the calls at which rows are reached.
      competing: the names of the sets, in the order of the columns.
      removed: int64 (rows, sets): how many units are removed, if the masks pruned nothing at first. Rows at
        the end in which nothing changes are left out.
      fractions: float64 (rows, sets): with `of="remaining"` the fraction of what is left that each row
        removes; else None.
      max_removed: with `stop`, how many units are removed in all at most; else None.
      schedule: a number that other schedules, units and sizes most likely do not have.
    """

    grid: Grid
    competing: tuple[str, ...]
    removed: np.ndarray
    fractions: np.ndarray | None
    max_removed: int | None
    schedule: int

    @classmethod
    def build(
        cls,
        target: ScheduledTarget,
        sizes: Mapping[str, int],
        cut_out: Mapping[str, int],
        places: Sequence[str],
    ) -> "ScheduleTable":
        """Return the table for pools of the given sizes.

        Rows go to the schedule's end; without an end, until nothing changes any more; and never past `stop`.

        Args:
          target: what the pruner is asked for.
          sizes: by pool, how many units it has.
          cut_out: by pool, how many units it had besides, which `compact` took away. Fractions are of all of
            them, and what was taken away counts as removed.
          places: by pool, in the same order, its name in every container: see `names_by_place`.

        Warns:
          UserWarning: the schedule's target cannot be reached without breaking `floor`.
        """
        grid, structure = target.grid, target.structure
        competing = competing_pools(sizes, structure, target.scope)
        min_kept = floors(sizes, structure, target.floor)
        dense = {name: size + cut_out.get(name, 0) for name, size in sizes.items()}
        num_units = competing_sizes(dense, competing)
        if "" not in target.schedules:  # names an unknown path before anything else
            per_pool(target.schedules, num_units, "sparsity", None, target.scope)
        kept = competing_sizes({name: min(min_kept[name], size) for name, size in dense.items()}, competing)
        max_removable = _as_array(num_units) - _as_array(kept)
        max_removed = target.count_at_stop(sum(num_units.values()))
        rows, missed = _removed_by_row(target, num_units, max_removable, max_removed)
        # Levels without an end are meant to stop at the floor; other schedules are not.
        ends = grid.last is not None or (target.of == "total" and target.is_constant())
        if ends and (missed > 0).any():
            _warn_missed(num_units, missed, max(min_kept.values()))
        fractions = _fractions(target, num_units, len(rows)) if target.of == "remaining" else None
        while len(rows) > 1 and (rows[-1] == rows[-2]).all():
            rows.pop()  # There is no reason to score and select where nothing changes.
        schedule = _schedule_number(target, places, sizes, dense, np.stack(rows))
        # The masks know nothing of what was cut out, so what they are asked for is without it.
        cut = _as_array(competing_sizes({name: dense[name] - sizes[name] for name in sizes}, competing))
        removed = np.maximum(np.stack(rows) - cut, 0)
        if max_removed is not None:
            max_removed = max(max_removed - int(cut.sum()), 0)
        return cls(grid, tuple(competing), removed, fractions, max_removed, schedule)

    @property
    def last(self) -> int:
        """The last row in which masks change."""
        return len(self.removed) - 1

    def position(self, state: PrunerState) -> Position:
        """Return where a state is, after the call that it counted last.

        `PrunerState.schedule` says in which table the state's row counts, and how its masks came about:

            the table's number, or 0 for a new state     here, and the masks are this row of the table
            minus the number, or -1 for a new state      here, but the pruner took over the masks
            any other number                             elsewhere: another pruner left the state

        A state of another pruner is at row 0. As entries are totals, the next call then reaches what is asked
        for now, and if the masks are ahead of that, it removes nothing. With `of="remaining"` there is no
        total to catch up with: there such a state is at the row of the call before, so that the fractions of
        this table are removed from the next row on.
        """
        passed = self.grid.row(state.step)
        reached = jnp.minimum(passed, self.last)
        state = with_rows(state)
        follows = (state.schedule == self.schedule) | (state.schedule == NO_SCHEDULE)
        counts_here = follows | (state.schedule == -self.schedule) | (state.schedule == FROM_MASKS)
        if self.fractions is None:
            return Position(reached, jnp.where(counts_here, state.row, 0), follows)
        # The table ends where its own masks have nothing left to remove, which says nothing of others.
        reached = jnp.where(follows, reached, passed)
        before = self.grid.row(state.step - 1)
        return Position(reached, jnp.where(counts_here, state.row, before), follows)

    def schedule_at(self, position: Position) -> jax.Array:
        """Return `PrunerState.schedule` of a state at a position in this table."""
        return jnp.where(position.follows, self.schedule, -self.schedule).astype(jnp.int32)

    def counts(
        self, position: Position, alive: Mapping[str, jax.Array], competing: Competing, finite: Any = True
    ) -> dict[str, Count]:
        """Return how many units should be removed, those removed before included, by set of pools.

        None are where the scores are not all `finite`.
        """
        row = jnp.minimum(position.reached, self.last)
        # In two halves, because a count may be more than an int32 holds.
        counts = jax.tree.map(lambda half: jnp.asarray(half)[row], big_counts.big(self.removed))
        if self.fractions is not None:
            taken_over = self._counts_of_remaining(position, alive, competing)
            counts = big_counts.where(position.follows, counts, taken_over)
        counts = big_counts.where(finite, counts, big_counts.zeros_like(counts))
        # By name: JAX sorts the keys of dicts, so pools may come in another order than the table has.
        return {name: big_counts.pick(counts, self.competing.index(name)) for name in competing}

    def _counts_of_remaining(
        self, position: Position, alive: Mapping[str, jax.Array], competing: Competing
    ) -> BigCount:
        """Return, by set, what is removed and the row's fraction of what is left, which only the masks say.

        The product has to be that of the host, `round_half_even(float64(fraction * left))`, or a run that was
        taken over would end some units off one that was not. But JAX has no float64 unless it is enabled, and
        float32 has 24 bits: from 2**24 units on it does not even hold `left`. So `rounded_product` multiplies
        the 53 bits of the fraction by the count as integers, and rounds twice, as the host does.
        """
        assert self.fractions is not None
        pools = [competing[name] for name in self.competing]
        left = _num_alive([[alive[pool] for pool in names] for names in pools])
        sizes = big_counts.big(np.array([sum(alive[pool].size for pool in names) for names in pools]))
        fractions = big_counts.fraction(self.fractions)
        row = jnp.minimum(position.reached, len(self.fractions) - 1)
        more = jax.jit(big_counts.rounded_product)(
            jax.tree.map(lambda x: jnp.asarray(x)[row], fractions), left
        )
        removed = sizes - left
        if self.max_removed is not None:
            total = _total(removed)
            allowed = big_counts.maximum(
                big_counts.big(self.max_removed) - total, big_counts.zeros_like(total)
            )
            more = _scaled_down(more, allowed)
        return removed + more


def _as_array(by_name: Mapping[str, int]) -> np.ndarray:
    return np.array(list(by_name.values()))


def _removed_by_row(
    target: ScheduledTarget, num_units: Mapping[str, int], max_removable: np.ndarray, max_removed: int | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return how many units of each set are removed by each row, and how many the last row asks for in vain.

    `max_removable` is m, what the floor lets go of each set; `max_removed` is the most that `stop` allows in
    all.
    """
    grid, columns = target.grid, len(max_removable)
    if grid.last is not None:
        _check_size(grid.last, columns, grid)
    rows, missed = [np.zeros_like(max_removable)], np.zeros_like(max_removable)
    while grid.last is None or len(rows) <= grid.last:
        count = grid.count(len(rows))
        if target.of == "total":
            asked = np.maximum(_as_array(target.counts(count, num_units)), rows[-1])
        else:
            left = (_as_array(num_units) - rows[-1]).tolist()
            asked = rows[-1] + _as_array(target.counts(count, dict(zip(num_units, left, strict=True))))
        missed = asked - max_removable
        rows.append(np.minimum(asked, max_removable))
        if max_removed is not None and rows[-1].sum() >= max_removed:
            rows[-1] = rows[-2] + _shared_out(max_removed - int(rows[-2].sum()), rows[-1] - rows[-2])
            return rows, np.zeros_like(max_removable)
        _check_size(len(rows), columns, grid)
        if grid.last is None and max_removed is None and len(rows) == 4096:
            # So many levels take a second. If the largest possible table is too small, say so now.
            beyond = _MAX_ENTRIES // columns + 1
            if target.sparsity(beyond - 1) != target.sparsity(beyond):
                _check_size(beyond, columns, grid)
        stays = grid.last is None and (rows[-1] == rows[-2]).all()
        if stays and target.sparsity(count) == target.sparsity(count + 1):
            break
    return rows, missed


def _fractions(target: ScheduledTarget, num_units: Mapping[str, int], rows: int) -> np.ndarray:
    """Return the fraction of what is left that each row removes from each set."""
    asked = [target.sparsity(target.grid.count(max(row, 1))) for row in range(rows)]
    values = [per_pool(each, num_units, "sparsity", 0.0, target.scope).values() for each in asked]
    return np.minimum(np.array([list(v) for v in values]) / target.structure.max_sparsity, 1.0)


def _schedule_number(
    target: ScheduledTarget,
    places: Sequence[str],
    sizes: Mapping[str, int],
    dense: Mapping[str, int],
    removed: np.ndarray,
) -> int:
    """Return 31 bits from all that decides what a row means, other than the numbers of new states.

    Checkpoints hold this number. The text of a `Grid` enters it, so its names must stay as they are.
    """
    what = (target.grid, target.of, target.scope, target.structure.name, *places)
    text = repr((what, list(sizes.values()), list(dense.values()))).encode()
    return max(zlib.crc32(removed.astype("<i8").tobytes(), zlib.crc32(text)) & 0x7FFFFFFF, 3)


@jax.jit
def _num_alive(alive: Any) -> BigCount:
    """Return how many units each set of competing pools has left."""
    return big_counts.stack([_sum([big_counts.big(count_true(each)) for each in pools]) for pools in alive])


def _sum(counts: list[BigCount]) -> BigCount:
    return _total(big_counts.stack(counts))


def _total(counts: BigCount) -> BigCount:
    return big_counts.pick(big_counts.total(counts), (..., 0))


@jax.jit
def _scaled_down(more: BigCount, allowed: BigCount) -> BigCount:
    """Return counts that add up to `allowed` if they would exceed it, in proportion but for rounding.

    Each count becomes `floor(count * allowed / total)`, and the units that rounding leaves over go to the
    first sets that have room. So the parts may not add up to more than `allowed`, whatever float32 makes of
    them. Turning a `BigCount` into a float rounds at most twice, there are three of them and three operations
    between them: 9 roundings of 2**-24, less than the 2**-20 by which the scale is lowered.
    """

    def as_float(count: BigCount) -> jax.Array:
        return count.high * 65536.0 + count.low

    total = _total(more)
    scale = as_float(allowed) / jnp.maximum(as_float(total), 1.0) * (1 - 2.0**-20)
    part = jnp.floor(as_float(more) * scale)
    high = jnp.floor(part / 65536.0)
    parts = big_counts.minimum(
        BigCount(high.astype(jnp.int32), (part - high * 65536.0).astype(jnp.int32)), more
    )
    room, rest = more - parts, allowed - _total(parts)
    before = big_counts.pick(big_counts.prefix_sums(room), slice(-1))
    extra = big_counts.maximum(big_counts.minimum(rest - before, room), big_counts.zeros_like(room))
    return big_counts.where(allowed < total, parts + extra, more)


def _shared_out(count: int, weights: np.ndarray) -> np.ndarray:
    """Return a count shared out in proportion to weights; the largest remainders round up."""
    share, remainder = np.divmod(weights.astype(np.int64) * count, max(1, int(weights.sum())))
    first = np.argsort(-remainder, kind="stable")[: count - int(share.sum())]
    share[first] += 1
    return share.astype(weights.dtype)


def _check_size(rows: int, columns: int, grid: Grid) -> None:
    if rows * columns > _MAX_ENTRIES:
        raise ValueError(
            f"the schedule makes {rows} or more updates of the masks, of {columns} targets each, above "
            f"the {_MAX_ENTRIES} that are tabulated. Raise every (now {grid.every}) or end it sooner."
        )


def _warn_missed(num_units: Mapping[str, int], missed: np.ndarray, floor: int) -> None:
    names = ", ".join(f"{name} by {n}" for name, n in zip(num_units, missed.tolist(), strict=True) if n > 0)
    warnings.warn(
        f"the schedule's target is missed ({names} units), because floor={floor} units of each leaf stay. "
        "floor=0 lets a leaf be emptied.",
        stacklevel=2,
    )
