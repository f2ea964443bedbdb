"""The table of a pruner's targets: how many units are removed at each of its updates.

A schedule is evaluated on the host, in double precision, once for each update of the masks. The rows
of the table are these updates; its columns are the sets of pools that compete. A train step then looks
up the row that its number of calls has reached, and compares it with the row that the masks are at.
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
from jaxprune.structures import Structure
from jaxprune.typing import PrunerState

_MAX_ENTRIES = 2**20

NO_SCHEDULE, FROM_MASKS, REWIRED, OTHER = 0, -1, 1, 2
"""`PrunerState.schedule` of a new state, of a new one that starts from masks, of one whose row counts the
moves of `rewiring`, of one whose rows count something else."""


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


class Request(NamedTuple):
    """What a pruner asks of the table.

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


class Table(NamedTuple):
    """How many units are removed, by row and by set of competing pools.

    Attributes:
      competing: the names of the sets, in the order of the columns.
      targets: int64 (rows, sets): how many units are gone, if the masks pruned nothing at first. Rows at
        the end in which nothing changes are left out.
      fractions: float64 (rows, sets): with `of="remaining"` the fraction of what is left that each row
        removes; else None.
      end: with `stop`, how many units are gone at most; else None.
      schedule: a number that other schedules, units and sizes most likely do not have.
    """

    competing: tuple[str, ...]
    targets: np.ndarray
    fractions: np.ndarray | None
    end: int | None
    schedule: int


def schedules_by_path(sparsity: Any) -> dict[str, Schedule]:
    """The schedules by path; under the path "" if there is one for all; by `LayerOf` those of an array.

    Raises:
      ValueError: an empty dict, or schedules that do not begin and end together.
      TypeError: a function that does not know where it begins and ends.
    """

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


def asked_at(schedules: Mapping[str, Schedule], count: int) -> Any:
    """The sparsity at a count, as `target_counts` takes it: a number, or numbers by path."""
    values = {path: schedule.on_host(count) for path, schedule in schedules.items()}
    return values.get("", values)


def is_constant(schedules: Mapping[str, Schedule]) -> bool:
    """Whether levels without end ask for the same from the first on."""
    return asked_at(schedules, 1) == asked_at(schedules, 2) == asked_at(schedules, 3)


def places_of(pools: Iterable[str], paths: Sequence[str]) -> list[str]:
    """The names of pools with the place of a leaf instead of its path: of "a/kernel[1]" "0[1]", say.

    The same layers in other containers have other paths, and the same places.
    """
    place = {path: str(number) for number, path in enumerate(paths)}

    def of(pool: str) -> str:
        path, rest = pool, ""
        while path not in place and "[" in path:  # of a layer and of an axis, "a/kernel[2][1]"
            path, bracket, last = path.rpartition("[")
            rest = bracket + last + rest
        return place[path] + rest if path in place else pool

    return [of(pool) for pool in pools]


def build(
    request: Request, sizes: Mapping[str, int], cut_out: Mapping[str, int], places: Sequence[str]
) -> Table:
    """The table for pools of the given sizes.

    Rows go to the schedule's end; without an end, until nothing changes any more; and never beyond `stop`,
    a sparsity of all units.

    Args:
      request: what the pruner asks.
      sizes: by pool, how many units it has.
      cut_out: by pool, how many units it had besides, which `compact` took away. Fractions are of all of
        them, and what was taken away counts as removed.
      places: by pool, in the same order, what it is called in every container: see `places_of`.

    Warns:
      UserWarning: the schedule's target cannot be reached without breaking `floor`.
    """
    grid, structure, of = request.grid, request.structure, request.of
    competing = competing_pools(sizes, structure, request.scope)
    least = floors(sizes, structure, request.floor)
    dense = {name: size + cut_out.get(name, 0) for name, size in sizes.items()}
    units = competing_sizes(dense, competing)
    if "" not in request.schedules:
        per_pool(request.schedules, units, "sparsity", None, request.scope)

    def removed(remaining: dict[str, int], count: int) -> np.ndarray:
        asked = asked_at(request.schedules, count)
        return np.array(list(target_counts(asked, remaining, structure, request.scope).values()))

    all_units, end = np.array(list(units.values())), None
    if request.stop is not None:
        (end,) = target_counts(request.stop, {"stop": int(all_units.sum())}, structure, "global").values()
    spare = competing_sizes({name: min(least[name], size) for name, size in dense.items()}, competing)
    most = all_units - np.array(list(spare.values()))
    if grid.last is not None:
        _check_size(grid.last, len(most), grid)
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
        _check_size(len(rows), len(most), grid)
        if grid.last is None and end is None and len(rows) == 4096:
            # So many levels take a second. If the largest possible table is too small, say so now.
            beyond = _MAX_ENTRIES // len(most) + 1
            if asked_at(request.schedules, beyond - 1) != asked_at(request.schedules, beyond):
                _check_size(beyond, len(most), grid)
        stays = grid.last is None and (rows[-1] == rows[-2]).all()
        if stays and asked_at(request.schedules, now) == asked_at(request.schedules, now + 1):
            break
    # Only levels that go on for ever are meant to end at the floor.
    constant_total = of == "total" and is_constant(request.schedules)
    if (grid.last is not None or constant_total) and (missed > 0).any():
        _warn_missed(units, missed, max(least.values()))
    fractions = None
    if of == "remaining":
        asked = [asked_at(request.schedules, grid.count(max(row, 1))) for row in range(len(rows))]
        values = [per_pool(each, units, "sparsity", 0.0, request.scope).values() for each in asked]
        fractions = np.minimum(np.array([list(v) for v in values]) / structure.max_sparsity, 1.0)
    while len(rows) > 1 and (rows[-1] == rows[-2]).all():
        rows.pop()  # There is no reason to score and select where nothing changes.
    number = _number(request, places, sizes, dense, np.stack(rows))
    # The masks know nothing of what was cut out, so what they are asked for is without it.
    gone = np.array(
        list(competing_sizes({name: dense[name] - sizes[name] for name in sizes}, competing).values())
    )
    targets = np.maximum(np.stack(rows) - gone, 0)
    end = None if end is None else max(end - int(gone.sum()), 0)
    return Table(tuple(competing), targets, fractions, end, number)


def _number(
    request: Request,
    places: Sequence[str],
    sizes: Mapping[str, int],
    dense: Mapping[str, int],
    targets: np.ndarray,
) -> int:
    """A number of 31 bits from all that decides what a row means, but not one that states are made with."""
    what = (request.grid, request.of, request.scope, request.structure.name, *places)
    text = repr((what, list(sizes.values()), list(dense.values()))).encode()
    return max(zlib.crc32(targets.astype("<i8").tobytes(), zlib.crc32(text)) & 0x7FFFFFFF, 3)


def with_rows(state: PrunerState, shape: tuple[int, ...] = ()) -> PrunerState:
    """A state with rows of a shape: a recipe of several sections has a row for each, a pruner one."""
    number = state.schedule if jax.tree.leaves(state.schedule) else NO_SCHEDULE
    if jnp.shape(state.row) == shape:
        number = jnp.broadcast_to(jnp.asarray(number, jnp.int32), shape)
        return state._replace(schedule=number)
    # They say nothing here.
    return state._replace(row=jnp.zeros(shape, jnp.int32), schedule=jnp.full(shape, OTHER, jnp.int32))


class Place(NamedTuple):
    """Where a state is in a table.

    Attributes:
      row: the row that the calls so far have reached.
      before: the row that the masks are at.
      follows: whether the masks are those of the table's own rows, from masks that pruned nothing on.
    """

    row: jax.Array
    before: jax.Array
    follows: jax.Array

    @property
    def due(self) -> jax.Array:
        """Whether the masks are to be updated."""
        return self.row > self.before


def place(table: Table, grid: Grid, state: PrunerState) -> Place:
    """Where a state is, after the call that it counted last.

    A state of another schedule is at row 0, so that the next call reaches what is asked for now. Fractions
    of what remains are no totals that could be caught up with: there it is at the row of the call before.
    """
    reached = grid.row(state.step)
    rows = jnp.minimum(reached, len(table.targets) - 1)
    state = with_rows(state)
    number = state.schedule
    follows = (number == table.schedule) | (number == NO_SCHEDULE)
    own = follows | (number == -table.schedule) | (number == FROM_MASKS)
    if table.fractions is None:
        return Place(rows, jnp.where(own, state.row, 0), follows)
    # Only the table's own rows end where nothing is left to remove.
    row = jnp.where(follows, rows, reached)
    return Place(row, jnp.where(own, state.row, grid.row(state.step - 1)), follows)


def number_after(table: Table, at: Place) -> jax.Array:
    """`PrunerState.schedule` of a state that was at a place of this table."""
    return jnp.where(at.follows, table.schedule, -table.schedule).astype(jnp.int32)


def counts_at(
    table: Table, at: Place, alive: Mapping[str, jax.Array], competing: Mapping[str, Iterable[str]]
) -> dict[str, Count]:
    """How many units should be gone, by set of competing pools, those gone before included.

    Args:
      table: the table.
      at: where the state is in it.
      alive: by pool, which units are left.
      competing: by name, the pools that compete.
    """
    row = jnp.minimum(at.row, len(table.targets) - 1)
    # In two halves, because a count may be more than an int32 holds.
    counts = jax.tree.map(lambda half: jnp.asarray(half)[row], big_counts.big(table.targets))
    if table.fractions is not None:
        taken_over = _of_what_remains(table, at, alive, {n: tuple(competing[n]) for n in table.competing})
        counts = big_counts.where(at.follows, counts, taken_over)
    # By name: JAX sorts the keys of dicts, so pools may come in another order than the table has.
    return {name: big_counts.pick(counts, table.competing.index(name)) for name in competing}


@jax.jit
def _left(alive: Any) -> BigCount:
    """How many units each set of competing pools has left."""
    return big_counts.stack([_sum([big_counts.big(count_true(each)) for each in pools]) for pools in alive])


def _sum(counts: list[BigCount]) -> BigCount:
    return big_counts.pick(big_counts.total(big_counts.stack(counts)), (..., 0))


def _of_what_remains(
    table: Table, at: Place, alive: Mapping[str, jax.Array], competing: Mapping[str, tuple[str, ...]]
) -> BigCount:
    """By set, what is gone and the row's fraction of what is left, which only the masks say."""
    assert table.fractions is not None
    left = _left([[alive[pool] for pool in pools] for pools in competing.values()])
    sizes = big_counts.big(np.array([sum(alive[p].size for p in pools) for pools in competing.values()]))
    part = big_counts.fraction(table.fractions)
    row = jnp.minimum(at.row, len(table.fractions) - 1)
    more = jax.jit(big_counts.rounded_product)(jax.tree.map(lambda x: jnp.asarray(x)[row], part), left)
    gone = sizes - left
    if table.end is not None:
        more = _scaled_down(
            more,
            big_counts.maximum(big_counts.big(table.end) - _total(gone), big_counts.zeros_like(_total(gone))),
        )
    return gone + more


def _total(counts: BigCount) -> BigCount:
    return big_counts.pick(big_counts.total(counts), (..., 0))


@jax.jit
def _scaled_down(more: BigCount, allowed: BigCount) -> BigCount:
    """Counts that add up to what is allowed if they would exceed it, in proportion but for rounding."""

    def as_float(count: BigCount) -> jax.Array:
        return count.high * 65536.0 + count.low

    total = _total(more)
    # Rounded down by more than float32 errs, so that what is left over is not negative.
    scale = as_float(allowed) / jnp.maximum(as_float(total), 1.0) * (1 - 2.0**-20)
    share = jnp.floor(as_float(more) * scale)
    high = jnp.floor(share / 65536.0)
    shares = big_counts.minimum(
        BigCount(high.astype(jnp.int32), (share - high * 65536.0).astype(jnp.int32)), more
    )
    room, rest = more - shares, allowed - _total(shares)
    before = big_counts.pick(big_counts.prefix_sums(room), slice(-1))
    extra = big_counts.maximum(big_counts.minimum(rest - before, room), big_counts.zeros_like(room))
    return big_counts.where(allowed < total, shares + extra, more)


def _shared_out(count: int, most: np.ndarray) -> np.ndarray:
    """A count shared out in proportion to `most`; the largest remainders, then the first, round up."""
    share, remainder = np.divmod(most.astype(np.int64) * count, max(1, int(most.sum())))
    first = np.argsort(-remainder, kind="stable")[: count - int(share.sum())]
    share[first] += 1
    return share.astype(most.dtype)


def _check_size(rows: int, columns: int, grid: Grid) -> None:
    if rows * columns > _MAX_ENTRIES:
        raise ValueError(
            f"the schedule makes {rows} or more updates of the masks, of {columns} targets each, above "
            f"the {_MAX_ENTRIES} that are tabulated. Raise every (now {grid.every}) or end it sooner."
        )


def _warn_missed(units: Mapping[str, int], missed: np.ndarray, floor: int) -> None:
    names = ", ".join(f"{name} by {n}" for name, n in zip(units, missed.tolist(), strict=True) if n > 0)
    warnings.warn(
        f"the schedule's target is missed ({names} units), because floor={floor} units of each leaf stay. "
        "floor=0 lets a leaf be emptied.",
        stacklevel=2,
    )
