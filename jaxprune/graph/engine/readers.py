"""A node for each reader: what several layers read must not tie the layers.

A table made once of constants (slopes of heads, rotations of positions), or a mask of data that was
spread along a new axis, tells nothing of which slices a reader needs: it can be made whole and cut
for each. So each reader gets nodes of its own along such axes. A param that several layers read, such
as a relative bias, can be cut for each too, as long as it keeps what any of them does: its axis
*covers* theirs.

`separate` goes through a program before its rules do. Where a value has several readers and came
along some axis from constants or from params alone, each reader is given a copy: a constant, or an op
that spreads what it reads, is simply made again; for other values an op `per_reader` stands between.
Params that cannot lose slices for each reader apart are tied again by `tie_readers`.
"""

from collections import defaultdict
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, Region, Value
from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.graph.engine.rules.base import Frame, Rule, pin_inputs, register_rule
from jaxprune.graph.engine.rules.elementwise import matching_axes
from jaxprune.graph.engine.rules.shapes import segments
from jaxprune.graph.engine.rules.slices import take_dense
from jaxprune.tracing.jaxprs import scan_split

if TYPE_CHECKING:
    from jaxprune.graph.engine.program import TracedNetwork

NAME = "per_reader"


class Origin(IntEnum):
    """What an axis of a value was made along; of several origins the last counts."""

    CONSTANT = 0  # nothing but constants, or nothing at all: it was spread along it
    PARAM = 1  # params, entry by entry
    OTHER = 2  # inputs of the function, what layers give


# Ops of values of one rank, whose axes do not mix.
_ALONG = frozenset(
    (
        *("slice", "dynamic_slice", "dynamic_update_slice", "rev", "pad", "concatenate", "split", "tile"),
        *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "optimization_barrier"),
        *("sharding_constraint", "device_put", "reshard", "pvary"),
    )
)
_REDUCTIONS = frozenset(
    (
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
        *("reduce_xor", "argmax", "argmin"),
    )
)
_LAYERS = frozenset(("take_layer", "join_layers"))
_MADE_AGAIN = frozenset(("broadcast_in_dim", "iota"))
_ONCE = frozenset(
    ("remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "composite", "custom_vmap_call")
)


def separate(region: Region, graph: AxisGraph, params: Sequence[Value]) -> None:
    """Gives each reader of a value nodes of its own along axes that came from constants or params.

    Args:
      region: a program, which is changed in place; its rules have not been linked yet.
      graph: its axes.
      params: those of its inputs that are params.
    """
    origins = _Origins(params)
    origins.run(region)
    _give_copies(region, graph, origins, True)


class _Origins:
    """What the axes of all values of a program were made along."""

    def __init__(self, params: Sequence[Value]):
        self._of: dict[int, tuple[Origin, ...]] = {}
        self._constant: set[int] = set()
        self._free_of_params: set[int] = set()
        for value in params:
            self._of[id(value)] = (Origin.PARAM,) * len(value.shape)
        self._params = set(map(id, params))
        self.summed: set[int] = set()

    def sums(self, value: Value, reader: Op | None) -> bool:
        """Whether a reader, or what reads its output in turn, multiplies a param with others in sums.

        Then the param is the weights of a layer, or an embedding: its slices go with that layer's. A
        bias or a scale only meets what layers give entry by entry.
        """
        if reader is None or rule_for(reader.name) is elementwise:
            return reader is not None and id(reader.outputs[0]) in self.summed
        if reader.regions:
            given = [
                inner
                for name, region in reader.regions.items()
                for outer, inner, _ in _given(reader, name, region)
                if outer is value
            ]
            return not given or any(id(inner) in self.summed for inner in given)
        outputs = [output for output in reader.outputs if Origin.PARAM in self.of(output)]
        return not outputs or any(id(output) in self.summed for output in outputs)

    def of(self, value: Value) -> tuple[Origin, ...]:
        if value.constant is not None:
            return (Origin.CONSTANT,) * len(value.shape)
        return self._of.get(id(value), (Origin.OTHER,) * len(value.shape))

    def _is_constant(self, value: Value) -> bool:
        return value.constant is not None or id(value) in self._constant

    def run(self, region: Region) -> None:
        # The inputs of the function but for its params, and what bodies are given that is no param.
        for value in region.inputs:
            if id(value) not in self._params:
                self._free_of_params.add(id(value))
        self._run(region)

    def _run(self, region: Region) -> None:
        # What a loop over layers carries is the same in all rounds, though the first is given a constant.
        rolls = {id(roll): roll for op in region.ops for roll, _ in op.rolls}.values()
        carried = {id(value) for roll in rolls for one in roll.rounds for value in one.taken}
        for op in region.ops:
            if any(id(output) in carried for output in op.outputs):
                continue
            pure = not getattr(op.bind, "has_effects", False)
            if op.regions:
                self._call(op)
            if pure and all(map(self._is_constant, op.inputs)):
                self._constant.update(map(id, op.outputs))
                for output in op.outputs:
                    self._of[id(output)] = (Origin.CONSTANT,) * len(output.shape)
            elif not op.regions:
                for output in op.outputs:
                    self._of[id(output)] = tuple(self._axes(op, output))
            if all(v.constant is not None or id(v) in self._free_of_params for v in op.inputs):
                self._free_of_params.update(map(id, op.outputs))

    def _axes(self, op: Op, output: Value) -> Sequence[Origin]:
        """The origins of an op's output."""
        rank, of = len(output.shape), self.of
        if rule_for(op.name) is elementwise:
            axes = [Origin.CONSTANT] * rank
            for value in op.inputs:
                for axis in matching_axes(value, output):
                    axes[axis] = max(axes[axis], of(value)[axis])
            return axes
        if op.name == "broadcast_in_dim":
            axes = [Origin.CONSTANT] * rank
            for axis, place in enumerate(op.params["broadcast_dimensions"]):
                if op.inputs[0].shape[axis] is output.shape[place] or (
                    op.inputs[0].shape[axis] == output.shape[place]
                ):
                    axes[place] = of(op.inputs[0])[axis]
            return axes
        if op.name == "transpose":
            return [of(op.inputs[0])[axis] for axis in op.params["permutation"]]
        if op.name == "squeeze" or op.name in _REDUCTIONS:
            gone = op.params["dimensions" if op.name == "squeeze" else "axes"]
            return [origin for axis, origin in enumerate(of(op.inputs[0])) if axis not in gone]
        if op.name in _ALONG:
            same = [value for value in op.inputs if len(value.shape) == rank]
            return [max(of(value)[axis] for value in same) for axis in range(rank)]
        if op.name == "reshape":
            axes = [Origin.CONSTANT] * rank
            for segment in segments(op.inputs[0].shape, output.shape):
                for place, _ in segment.after:
                    axes[place] = max(
                        [of(op.inputs[0])[axis] for axis, _ in segment.before], default=axes[place]
                    )
            return axes
        if op.name == "dot_general":
            return self._product(op)
        if op.name == "gather":
            return self._gather(op, output)
        # Of what has no rule the inputs are whole, and what it gives may be cut for each reader.
        free = all(v.constant is not None or id(v) in self._free_of_params for v in op.inputs)
        return [Origin.CONSTANT if free and rule_for(op.name).link is pin_inputs else Origin.OTHER] * rank

    def _product(self, op: Op) -> list[Origin]:
        (left, right), (sums, batch) = op.inputs, op.params["dimension_numbers"]
        axes = [
            max(self.of(left)[a], self.of(right)[b], key=int) for a, b in zip(batch[0], batch[1], strict=True)
        ]
        for value, summed, batched in ((left, sums[0], batch[0]), (right, sums[1], batch[1])):
            free = [a for a in range(len(value.shape)) if a not in (*summed, *batched)]
            # What a layer gives is no longer the params' own.
            axes += [Origin.CONSTANT if self.of(value)[a] is Origin.CONSTANT else Origin.OTHER for a in free]
        return axes

    def _gather(self, op: Op, output: Value) -> list[Origin]:
        """Windows of the operand: of a param only where constants say which."""
        numbers, (operand, indices) = op.params["dimension_numbers"], op.inputs
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        windows = [axis for axis in range(len(operand.shape)) if axis not in gone]
        places = [axis for axis in range(len(output.shape)) if axis not in numbers.offset_dims]
        axes = [Origin.OTHER] * len(output.shape)
        for axis, place in zip(windows, numbers.offset_dims, strict=True):
            origin = self.of(operand)[axis]
            if origin is Origin.CONSTANT or self._is_constant(indices):
                axes[place] = origin
        if not numbers.operand_batching_dims:
            for axis, place in enumerate(places):
                axes[place] = self.of(indices)[axis]
        return axes

    def _call(self, op: Op) -> None:
        """An op with bodies: what they are given, and what those that run once give back."""
        for name, region in op.regions.items():
            for outer, inner, skip in _given(op, name, region):
                self._of[id(inner)] = self.of(outer)[skip:]
                if self._is_constant(outer):
                    self._constant.add(id(inner))
                if outer.constant is not None or id(outer) in self._free_of_params:
                    self._free_of_params.add(id(inner))
            self._run(region)
        bodies = [op.regions["body"]] if op.name in _ONCE else []
        bodies = list(op.regions.values()) if op.name == "cond" else bodies
        for place, output in enumerate(op.outputs):
            if bodies:
                columns = zip(*(self.of(body.outputs[place]) for body in bodies), strict=True)
                self._of[id(output)] = tuple(max(column) for column in columns)


def _given(op: Op, name: str, region: Region) -> list[tuple[Value, Value, int]]:
    """The inputs of a body that are inputs of its op, and how many first axes they lack."""
    outer, inner, skip = list(op.inputs), list(region.inputs), [0] * len(op.inputs)
    if op.name == "cond":
        outer, skip = outer[1:], skip[1:]
    elif op.name == "scan":
        consts, carried = scan_split(op.params)
        outer, inner = (
            [*values[:consts], *values[consts + carried :]] for values in (op.inputs, region.inputs)
        )
        skip = [0] * consts + [1] * (len(outer) - consts)
    elif op.name == "while":
        first, second = op.params["cond_nconsts"], op.params["body_nconsts"]
        outer = outer[:first] if name == "condition" else outer[first : first + second]
    elif op.name not in _ONCE:
        return []
    return list(zip(outer, inner, skip, strict=False))


def _give_copies(region: Region, graph: AxisGraph, origins: _Origins, outermost: bool) -> None:
    """Puts copies in the places where a value is read, from the last value to the first.

    In the outermost region constants are made whole. In a body they are as large as what its op is
    given, which other bodies of the op read too.
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
            _give_copies(inner, graph, origins, False)
        note(op)
    for place, value in enumerate(region.outputs):
        reads[id(value)].append((region.outputs, place, None))

    before: dict[int, list[Op]] = defaultdict(list)

    def give(value: Value) -> None:
        """Makes the copies of a value, to stand before their readers."""
        places, of = reads[id(value)], origins.of(value)
        if (
            value.layers
            or value.part is not None
            or any(r is not None and r.name in _LAYERS for *_, r in places)
        ):
            return
        if Origin.PARAM in of and any(origins.sums(value, reader) for _, _, reader in places):
            origins.summed.add(id(value))
            of = tuple(Origin.OTHER if origin is Origin.PARAM else origin for origin in of)
        # Readers of different slices do not share any: each takes those of its own units with it.
        of = tuple(
            Origin.OTHER if origin is Origin.PARAM and _are_disjoint(places, axis) else origin
            for axis, origin in enumerate(of)
        )
        apart = [of[a] for a, n in enumerate(value.shape) if isinstance(n, int) and n > 1]
        if len(places) < 2 or all(origin is Origin.OTHER for origin in apart):
            return
        again = value.op is not None and value.op.name in _MADE_AGAIN and Origin.PARAM not in apart
        for number, (holder, place, reader) in enumerate(places):
            in_loop = reader is not None and bool(reader.rolls)
            if reader is not None and reader.memo.get("carried"):
                continue  # what a loop carries has the same slices in all rounds
            if number == 0 and (again or value.constant is not None) and not in_loop:
                continue  # one reader takes the value itself; the rounds of a loop are to be alike
            axes = tuple(map(graph.node, value.shape))
            copy = Value(value.shape, value.dtype, axes, sharding=value.sharding)
            holder[place] = copy
            if value.constant is not None:
                copy.constant = value.constant
                continue
            if again:
                op = value.op
                assert op is not None
                copy.op = Op(op.name, op.params, list(op.inputs), [copy], op.bind, op.source)
            else:
                source = (reader or value.op or _NOWHERE).source
                params = {"origins": of, "whole": outermost}
                copy.op = Op(NAME, params, [value], [copy], _itself, source)
            origins._of[id(copy)] = of
            if reader is not None:
                # In the same round of a loop as its reader, where it can be cut for that round.
                copy.op.rolls, copy.op.lazy = reader.rolls, reader.lazy
            before[id(reader)].append(copy.op)
            if again:
                note(copy.op)

    for op in reversed(region.ops):
        for output in op.outputs:
            give(output)
    for value in (*region.inputs, *constants.values()):
        give(value)
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
    """Whether all readers of a value take a part of it, and none the same slice along an axis as another."""
    ends = []
    for *_, reader in places:
        if reader is None or reader.name != "slice":
            return False
        ends.append((reader.params["start_indices"][axis], reader.params["limit_indices"][axis]))
    ends.sort()
    return all(limit <= start for (_, limit), (start, _) in pairwise(ends))


def _itself(*args: Any) -> list[Any]:
    return list(args)


_itself.has_effects = False  # type: ignore[attr-defined]
_NOWHERE = Op(NAME, {}, [], [], _itself, "an output")


# The rule of the op that stands between a value and one of its readers.


def _link(op: Op, graph: AxisGraph) -> None:
    (value,), (copy,) = op.inputs, op.outputs
    for origin, a, b in zip(op.params["origins"], value.axes, copy.axes, strict=True):
        if origin is Origin.OTHER:
            graph.same(a, b)
        elif origin is Origin.PARAM:
            graph.cover(a, b, may_tie=True)
        elif op.params["whole"]:
            graph.pin(a, "it is made of constants, once for all that read it")
        else:
            graph.cover(a, b)


def _flow(op: Op, facts: Facts) -> None:
    known = facts.of(op.inputs[0])
    facts.learn(op.outputs[0], known.zero, known.fill, known.alike)


def _emit(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    return [part_of(op, args[0], frame)]


def part_of(op: Op, array: Any, frame: Frame, besides: int | None = None) -> Any:
    """What a reader takes of an array, along all axes but one."""
    (value,), (copy,) = op.inputs, op.outputs
    for axis in range(len(value.shape)):
        kept = frame.indices(copy, axis)
        if kept is not None and axis != besides:
            array = take_dense(frame, array, axis, kept, frame.indices(value, axis))
    return array


register_rule(NAME, rule=Rule(_link, _flow, _emit))


# Params again: which of them their readers can lose slices of one by one.


def tie_readers(linked: "TracedNetwork", graph: AxisGraph) -> None:
    """Ties the readers of a param that could not lose slices apart from each other, or from it.

    That is so where constraints join the readers anyway (a tied embedding, by the residual stream), and
    where a reader's axis has slices of no other param (a layer that is applied twice).
    """
    while covers := graph.covers():
        number, always = graph.components(covers=False), graph.always_kept()
        have_params = {number(node) for value in linked.values.values() for node in value.axes}
        by_whole: dict[int, list[int]] = defaultdict(list)
        for cover in covers:
            by_whole[graph.find(cover.whole)].append(cover.part)
        tied = False
        for whole, parts in by_whole.items():
            free = [part for part in parts if not always.full(part)]
            one = len({number(part) for part in parts}) == 1
            if one or not free or any(number(part) not in have_params for part in free):
                tied = True
                for part in parts:
                    graph.same(whole, part)
        if not tied:
            return


def tie_where(graph: AxisGraph, nodes: Sequence[int]) -> bool:
    """Ties the readers of params that some nodes are joined to; whether there were any."""
    number = graph.components(covers=False)
    wanted = {number(node) for node in nodes}
    wholes = {graph.find(c.whole) for c in graph.covers() if number(c.part) in wanted}
    for cover in graph.covers():
        if graph.find(cover.whole) in wholes:
            graph.same(cover.whole, cover.part)
    return bool(wholes)


def pin_shared(graph: AxisGraph) -> None:
    """Keeps what covers several readers out of their units."""
    for cover in graph.covers():
        graph.pin(cover.whole, "several layers read it, each its own slices: it keeps what any of them does")
