"""Which ops of a program are read at all, and which values are the same one in all rounds of a loop."""

from collections.abc import Collection, Sequence
from typing import Any

from jaxprune.graph.engine.ir import Op, Region, Value, with_layers


def prune_dead(region: Region, without: Collection[tuple[int, int]] = ()) -> Region:
    """Return a region without the ops whose outputs nobody reads, which would only ask for slices.

    What is read in one round of a loop over layers stays in all of its rounds, so that they remain alike.
    Rounds in `without`, given by the id of their loop and their number, are excepted: they are to go.
    """
    read: set[int] = set()
    for output in region.outputs:
        read.update(map(id, with_layers(output)))
    place, count, needed = _places_in_loops(region.ops), -1, set[Any]()
    ops: list[Op] = []
    while count != len(needed):
        count, ops = len(needed), []
        for op in reversed(region.ops):
            wanted = op.has_effects or any(id(v) in read for out in op.outputs for v in with_layers(out))
            leaves = bool(op.rounds) and (id(op.rounds[0][0]), op.rounds[0][1]) in without
            keys = () if leaves else place.get(id(op), ())
            if wanted or any(key in needed for key in keys):
                needed.update(keys)
                for value in op.inputs:
                    read.update(map(id, with_layers(value)))
                ops.append(op)
    return Region(region.inputs, region.outputs, ops[::-1])


def aligned(region: Region) -> list[Sequence[Value]]:
    """Return families of values: each holds the values that are the same one in the rounds of a loop."""
    places = _places_in_loops(region.ops)
    columns: dict[Any, list[Op]] = {}
    for op in region.ops:
        for key in places.get(id(op), ()):
            columns.setdefault(key, []).append(op)
    return [
        column
        for ops in columns.values()
        if len({op.name for op in ops}) == 1
        for column in zip(*map(_values_of, ops), strict=False)
        if len({value.shape for value in column}) == 1
    ]


def _places_in_loops(ops: Sequence[Op]) -> dict[int, tuple[Any, ...]]:
    """Return, by the id of an op, keys that it shares with the same op of the other rounds of its loops."""
    counts: dict[Any, int] = {}
    places: dict[int, tuple[Any, ...]] = {}
    for op in ops:
        keys = []
        for loop, number in op.rounds:
            counts[id(loop), number] = counts.get((id(loop), number), -1) + 1
            keys.append((id(loop), counts[id(loop), number]))
        if keys:
            places[id(op)] = tuple(keys)
    return places


def _values_of(op: Op) -> list[Value]:
    """Return the values of an op and of its bodies, without those that have layers."""
    values = [*op.inputs, *op.outputs]
    for region in op.regions.values():
        values += [value for inner in region.ops for value in _values_of(inner)]
    return [value for value in values if not value.layers]
