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
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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

    Args:
      region: a program, which is changed in place; its rules have not been linked yet.
      graph: its axes.
      params: those of its inputs that are params.
    """
    _insert_copies(region, graph, Origins(region, params), True)


def _insert_copies(region: Region, graph: AxisGraph, origins: Origins, outermost: bool) -> None:
    """Put copies in the places where values are read, from the last value to the first.

    In the outermost region constants are made whole. In a body they are as large as the inputs of its op,
    which other bodies of the op read too.
    """
    reads: dict[int, list[tuple[list[Value], int, Op | None]]] = defaultdict(list)
    constants: dict[int, Value] = {}

    def note(op: Op) -> None:
        for place, value in enumerate(op.inputs):
            reads[id(value)].append((op.inputs, place, op))
            if value.constant is not None:
                constants[id(value)] = value

    for op in region.ops:
        for inner in op.regions.values():
            _insert_copies(inner, graph, origins, False)
        note(op)
    for place, value in enumerate(region.outputs):
        reads[id(value)].append((region.outputs, place, None))

    before: dict[int, list[Op]] = defaultdict(list)

    def copy_for_readers(value: Value) -> None:
        """Make the copies of a value, and note that they go before their readers."""
        places, of = reads[id(value)], origins.of(value)
        if (
            value.layers
            or value.part is not None
            or any(r is not None and r.name in _LAYERS for *_, r in places)
        ):
            return
        if Origin.PARAM in of and origins.are_weights(value, [reader for *_, reader in places]):
            of = tuple(Origin.OTHER if origin is Origin.PARAM else origin for origin in of)
        # Readers of disjoint slices share none: each slice already goes with the units of its reader.
        of = tuple(
            Origin.OTHER if origin is Origin.PARAM and _are_disjoint(places, axis) else origin
            for axis, origin in enumerate(of)
        )
        apart = [of[a] for a, n in enumerate(value.shape) if isinstance(n, int) and n > 1]
        if len(places) < 2 or all(origin is Origin.OTHER for origin in apart):
            return
        repeat = value.op is not None and value.op.name in _REPEATED and Origin.PARAM not in apart
        for number, (holder, place, reader) in enumerate(places):
            in_loop = reader is not None and bool(reader.rounds)
            if reader is not None and reader.memo.get("carried"):
                continue  # the carry of a loop has the same slices in all rounds
            if number == 0 and (repeat or value.constant is not None) and not in_loop:
                continue  # the first reader takes the value itself, unless all rounds of a loop must be alike
            axes = tuple(map(graph.node, value.shape))
            copy = Value(value.shape, value.dtype, axes, sharding=value.sharding)
            holder[place] = copy
            if value.constant is not None:
                copy.constant = value.constant
                continue
            if repeat:
                op = value.op
                assert op is not None
                copy.op = Op(op.name, op.params, list(op.inputs), [copy], op.bind, op.source)
            else:
                source = (reader or value.op or _NOWHERE).source
                params = {"origins": of, "pin_constants": outermost}
                copy.op = Op(per_reader.NAME, params, [value], [copy], _itself, source)
            origins.enter(copy, of)
            if reader is not None:
                # In the same round of a loop as its reader, where it can be cut for that round.
                copy.op.rounds, copy.op.lazy = reader.rounds, reader.lazy
            before[id(reader)].append(copy.op)
            if repeat:
                note(copy.op)

    for op in reversed(region.ops):
        for output in op.outputs:
            copy_for_readers(output)
    for value in (*region.inputs, *constants.values()):
        copy_for_readers(value)
    ops: list[Op] = []

    def put(op: Op) -> None:
        for copy in before[id(op)]:
            put(copy)
        ops.append(op)

    for op in region.ops:
        put(op)
    for copy in before[id(None)]:
        put(copy)
    region.ops[:] = ops


def _are_disjoint(places: Sequence[tuple[list[Value], int, Op | None]], axis: int) -> bool:
    """Whether all readers of a value are slices of it that do not overlap along an axis."""
    ends = []
    for *_, reader in places:
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
