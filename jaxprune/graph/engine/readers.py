"""Gives each reader of a shared value nodes of its own, so that the value does not tie the readers.

A table made once of constants (slopes of heads, rotations of positions), or a mask of data that was spread
along a new axis, does not determine which slices a reader needs: it can be made whole and cut for each
reader. A param that several layers read, such as a relative bias, can be cut for each as well, as long as it
keeps what any of them keeps. The constraints that express this are in `rules.per_reader`.

`separate` goes through a program before its rules are linked. Where a value has several readers and an axis
that was made along constants or params alone, each reader is given a copy: a constant, or an op that only
spreads its input, is repeated; for other values an op `per_reader` is inserted. Params whose readers cannot
lose slices independently are tied again by `tie_readers`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.ir import Op, Region, Value
from jaxprune.graph.engine.origins import Origins
from jaxprune.graph.engine.rules import per_reader
from jaxprune.graph.engine.rules.per_reader import Origin

if TYPE_CHECKING:
    from jaxprune.graph.engine.program import TracedNetwork

_LAYERS = frozenset(("take_layer", "join_layers"))
_REPEATED = frozenset(("broadcast_in_dim", "iota"))


def separate(region: Region, graph: AxisGraph, params: Sequence[Value]) -> None:
    """Give each reader of a value nodes of its own along axes that were made along constants or params.

    The program is changed in place; its rules have not been linked yet.
    """
    _Separator(region, graph, Origins(region, params), outermost=True).run()


class _Reading(NamedTuple):
    """One place where a value is read."""

    holder: list[Value]  # the inputs of the reader, or the outputs of the region
    place: int  # the index of the value there
    reader: Op | None  # the op that reads it; None for an output of the region


class _Separator:
    """Puts copies of values in the places where a region reads them.

    In the outermost region values made of constants are made whole. In a body they are as large as the inputs
    of its op, which other bodies of the op read too.
    """

    def __init__(self, region: Region, graph: AxisGraph, origins: Origins, outermost: bool):
        self.region, self.graph, self.origins, self.outermost = region, graph, origins, outermost
        self.readings: dict[int, list[_Reading]] = defaultdict(list)
        self.constants: dict[int, Value] = {}
        self.before: dict[int, list[Op]] = defaultdict(list)  # by the id of a reader, the ops of its copies

    def run(self) -> None:
        """Put in the copies, from the last value to the first, and the ops that make them."""
        for op in self.region.ops:
            for inner in op.regions.values():
                _Separator(inner, self.graph, self.origins, outermost=False).run()
            self._enter(op)
        for place, value in enumerate(self.region.outputs):
            self.readings[id(value)].append(_Reading(self.region.outputs, place, None))
        for op in reversed(self.region.ops):
            for output in op.outputs:
                self._separate(output)
        for value in (*self.region.inputs, *self.constants.values()):
            self._separate(value)
        ops: list[Op] = []
        for op in self.region.ops:
            self._append(op, ops)
        for copied in self.before[id(None)]:
            self._append(copied, ops)
        self.region.ops[:] = ops

    def _enter(self, op: Op) -> None:
        """Enter the places where an op reads values."""
        for place, value in enumerate(op.inputs):
            self.readings[id(value)].append(_Reading(op.inputs, place, op))
            if value.constant is not None:
                self.constants[id(value)] = value

    def _append(self, op: Op, ops: list[Op]) -> None:
        """Append an op after those that make the copies that it reads."""
        for copied in self.before[id(op)]:
            self._append(copied, ops)
        ops.append(op)

    def _separate(self, value: Value) -> None:
        """Give the readers of a value copies of it, if it has axes along which they need not agree."""
        readings = self.readings[id(value)]
        readers = [reading.reader for reading in readings]
        if (
            value.layers
            or value.part is not None
            or any(r is not None and r.name in _LAYERS for r in readers)
        ):
            return
        of = self.origins.of(value)
        if Origin.PARAM in of and self.origins.are_weights(value, readers):
            of = tuple(Origin.OTHER if origin is Origin.PARAM else origin for origin in of)
        # Readers of disjoint slices share none: each slice already goes with the units of its reader.
        of = tuple(
            Origin.OTHER if origin is Origin.PARAM and _are_disjoint(readers, axis) else origin
            for axis, origin in enumerate(of)
        )
        apart = [of[axis] for axis, size in enumerate(value.shape) if isinstance(size, int) and size > 1]
        if len(readings) < 2 or all(origin is Origin.OTHER for origin in apart):
            return
        repeated = value.op if value.op is not None and value.op.name in _REPEATED else None
        if Origin.PARAM in apart:
            repeated = None
        for number, (holder, place, reader) in enumerate(readings):
            if reader is not None and reader.memo.get("carried"):
                continue  # the carry of a loop has the same slices in all rounds
            in_loop = reader is not None and bool(reader.rounds)
            if number == 0 and (repeated is not None or value.constant is not None) and not in_loop:
                continue  # the first reader takes the value itself, unless all rounds of a loop must be alike
            holder[place] = self._copy(value, of, reader, repeated)

    def _copy(self, value: Value, of: tuple[Origin, ...], reader: Op | None, repeated: Op | None) -> Value:
        """Return a copy of a value for a reader (None for an output), whose op goes before the reader.

        The origins of its axes, `of`, decide how the copy is linked to the value. `repeated` is the op that
        makes the value, to be repeated for the copy; None to insert a `per_reader`.
        """
        axes = tuple(map(self.graph.node, value.shape))
        copied = Value(value.shape, value.dtype, axes, constant=value.constant, sharding=value.sharding)
        if value.constant is not None:
            return copied
        if repeated is not None:
            op = replace(repeated, inputs=list(repeated.inputs), outputs=[copied], regions={}, memo={})
        else:
            source = (reader or value.op or _NOWHERE).source
            params = {"origins": of, "pin_constants": self.outermost}
            op = Op(per_reader.NAME, params, [value], [copied], _itself, source)
        # In the same round of a loop as its reader, where it can be cut for that round.
        op.rounds, op.lazy = (reader.rounds, reader.lazy) if reader is not None else ((), False)
        copied.op = op
        self.origins.enter(copied, of)
        self.before[id(reader)].append(op)
        if repeated is not None:
            self._enter(op)
        return copied


def _are_disjoint(readers: Sequence[Op | None], axis: int) -> bool:
    """Whether all readers of a value are slices of it that do not overlap along an axis."""
    ends = []
    for reader in readers:
        if reader is None or reader.name != "slice":
            return False
        ends.append((reader.params["start_indices"][axis], reader.params["limit_indices"][axis]))
    ends.sort()
    return all(limit <= start for (_, limit), (start, _) in pairwise(ends))


def _itself(*args: Any) -> list[Any]:
    return list(args)


_NOWHERE = Op(per_reader.NAME, {}, [], [], _itself, "an output")


def tie_readers(network: "TracedNetwork", graph: AxisGraph) -> None:
    """Tie a param to its readers where these could not lose slices independently, of each other or of it.

    That is so where constraints join the readers anyway (a tied embedding, by the residual stream), and
    where a reader's axis has slices of no other param (a layer that is applied twice), so that its units
    would hold no param at all.
    """
    while covers := graph.untied_covers():
        number, always = graph.components(covers=False), graph.always_kept()
        have_params = {number(node) for value in network.values.values() for node in value.axes}
        readers_of: dict[int, list[int]] = defaultdict(list)
        for cover in covers:
            readers_of[graph.find(cover.superset)].append(cover.subset)
        tied = False
        for param, readers in readers_of.items():
            free = [reader for reader in readers if not always.full(reader)]
            one = len({number(reader) for reader in readers}) == 1
            if one or not free or any(number(reader) not in have_params for reader in free):
                tied = True
                for reader in readers:
                    graph.same(param, reader)
        if not tied:
            return


def tie_where(graph: AxisGraph, nodes: Sequence[int]) -> bool:
    """Tie the params that readers joined to some nodes read; return whether there were any."""
    number = graph.components(covers=False)
    wanted = {number(node) for node in nodes}
    params = {graph.find(c.superset) for c in graph.untied_covers() if number(c.subset) in wanted}
    for cover in graph.untied_covers():
        if graph.find(cover.superset) in params:
            graph.same(cover.superset, cover.subset)
    return bool(params)


def pin_shared(graph: AxisGraph) -> None:
    """Keep params that several layers read out of the units of these layers."""
    for cover in graph.untied_covers():
        graph.pin(
            cover.superset, "several layers read it, each its own slices: it keeps what any of them does"
        )
