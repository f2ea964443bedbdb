"""Runs a program on arrays that have lost the slices that a solution drops."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.engine import placing, readers
from jaxprune.graph.engine.axes import Solution
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, Region, Roll, Value, flat_layers, is_gone
from jaxprune.graph.engine.rolling import LayersDifferError, NotMadeError, Positions, check_alike, tables
from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.graph.engine.rules.slices import take

_ASK_FACTS = frozenset(
    ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
)
"""Ops whose rules make up for slices that are gone, as far as facts say what these were."""


class Replay:
    """A program under a solution.

    An op none of whose values lost a slice is applied as it was traced; any other by its rule.
    """

    def __init__(self, kept: Solution, facts: Facts, loops: bool = True, gone: Collection[int] = ()):
        """Replays under a solution.

        Args:
          kept: the solution.
          facts: the facts of all values.
          loops: whether loops over layers are loops, not one round after the other.
          gone: the ids of layers that were taken out of their stacks.
        """
        self._kept, self.facts, self.loops, self._gone = kept, facts, loops, gone
        self._changed: dict[int, bool] = {}
        self.positions: Positions | None = None

    def indices(self, value: Value, axis: int) -> np.ndarray | None:
        """Which slices of an axis stay; None for all of them.

        Raises:
          LayersDifferError: the layers of a stack keep different ones.
        """
        if not value.layers:
            return self._kept.indices(value.axes[axis])
        if axis == value.along:
            return None
        first, *others = [self.indices(layer, axis - (axis > value.along)) for layer in self.layers(value)]
        if any(not np.array_equal(_or_empty(first), _or_empty(other)) for other in others):
            raise LayersDifferError
        return first

    def shape(self, value: Value) -> tuple[Any, ...]:
        """The shape of a value without the slices that go.

        Raises:
          LayersDifferError: the layers of a stack keep different numbers of slices.
        """
        if not value.layers:
            kept = [self.indices(value, axis) for axis in range(len(value.shape))]
            return tuple(n if k is None else len(k) for n, k in zip(value.shape, kept, strict=True))
        first, *others = [self.shape(layer) for layer in self.layers(value)]
        if any(other != first for other in others):
            raise LayersDifferError
        return (*first[: value.along], 1 + len(others), *first[value.along :])

    def layers(self, stack: Value) -> list[Value]:
        """The layers of a stack that are left of it."""
        if not self._gone or stack.source is not None:
            return list(stack.layers)
        return [layer for layer in stack.layers if not is_gone(layer, self._gone)]

    def row(self, stack: Value, index: int) -> int:
        """Where a layer lies in what is left of a stack."""
        return index if not self._gone else self.layers(stack).index(stack.layers[index])

    def keep_alike(self, value: Value, other: Value) -> bool:
        """Whether two values keep the same slices."""
        axes = range(len(value.shape))
        return value.shape == other.shape and all(
            np.array_equal(_or_empty(self.indices(value, axis)), _or_empty(self.indices(other, axis)))
            for axis in axes
        )

    def node_size(self, node: int, dense: Any) -> Any:
        """How many of a node's slices stay, of so many in the dense program."""
        kept = self._kept.indices(node)
        return dense if kept is None else len(kept)

    def take(self, array: Any, axis: int, positions: np.ndarray) -> Any:
        """Slices of an array at known places; in a loop over layers, at those of the layer."""
        return (take if self.positions is None else self.positions.take)(array, axis, positions)

    def hoisted(self, table: np.ndarray) -> Any:
        """A table of places; in a loop over layers, that of the layer."""
        return table if self.positions is None else self.positions.hoisted(table)

    def cut(self, value: Value, array: Any) -> Any:
        """An array without the slices that go, where it still has them."""
        if value.layers:
            if tuple(array.shape) != self.shape(value):
                raise LayersDifferError
            return array
        if not any(self.indices(value, axis) is not None for axis in range(len(value.shape))):
            return array
        for axis, size in enumerate(self.shape(value)):
            kept = self.indices(value, axis)
            if kept is not None and array.shape[axis] != size:
                array = self.take(placing.gather(array, (axis,)), axis, kept)
        return array

    def is_cut(self, value: Value) -> bool:
        """Whether a value has lost a slice."""
        return any(not self._kept.full(node) for layer in flat_layers(value) for node in layer.axes)

    def lost(self, value: Value) -> list[int]:
        """The axes of a value that have lost slices."""
        return [axis for axis in range(len(value.shape)) if self.indices(value, axis) is not None]

    def place(self, value: Value, array: Any) -> Any:
        """An array with the sharding of a value that may have lost slices."""
        if value.sharding is None:
            return array
        return placing.place(array, self.small_sharding(value))

    def small_sharding(self, value: Value) -> Any:
        """The sharding of a value without the slices that go; None where it has none."""
        if value.sharding is None:
            return None
        return placing.small_sharding(value.sharding, value.shape, self.shape(value))

    def changed(self, op: Op) -> bool:
        """Whether a value of an op, or of its regions, has lost a slice."""
        if id(op) not in self._changed:
            values = [*op.inputs, *op.outputs]
            inner = [op for region in op.regions.values() for op in region.ops]
            values += [v for region in op.regions.values() for v in (*region.inputs, *region.outputs)]
            self._changed[id(op)] = any(map(self.is_cut, values)) or any(map(self.changed, inner))
        return self._changed[id(op)]

    def run(self, region: Region, args: Sequence[Any]) -> list[Any]:
        """Runs a region on small inputs; its outputs are small too."""
        pairs = zip(region.inputs, args, strict=True)
        env = {id(value): self.place(value, array) for value, array in pairs}
        run = _Run(self, env)
        run.apply_all(region.ops, 0)
        return [run.read(value) for value in region.outputs]


def _or_empty(indices: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, int) if indices is None else indices


def _from_outside(rounds: Sequence[Sequence[Op]], made_here: set[int]) -> list[tuple[Value, ...]]:
    """What the rounds of a loop read that none of them makes: for each such value, that of every round.

    Raises:
      LayersDifferError: the rounds do not have the same ops.
    """
    if any([op.name for op in ops] != [op.name for op in rounds[0]] for ops in rounds):
        raise LayersDifferError
    columns: dict[tuple[int, ...], tuple[Value, ...]] = {}
    for ops in zip(*rounds, strict=True):
        for values in zip(*(op.inputs for op in ops), strict=True):
            inside = [id(value) in made_here or value.constant is not None for value in values]
            if any(inside) and not all(inside):
                raise LayersDifferError
            if not any(inside):
                values = _whole_stacks(values)
                columns[tuple(map(id, values))] = values
    return list(columns.values())


def _whole_stacks(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """The stacks that rounds read parts of, if each has its own: an inner loop needs all of it."""
    while all(value.part is not None for value in values):
        stacks, places = zip(
            *((value.part[0], value.part[1:]) for value in values if value.part), strict=True
        )
        if all(stack is stacks[0] for stack in stacks) or any(place != places[0] for place in places):
            break
        values = stacks
    return values


class _Run:
    """One run of a region: the arrays of its values. It is the `Frame` that rules emit in."""

    def __init__(self, replay: Replay, env: dict[int, Any]):
        self._replay, self.facts = replay, replay.facts
        self.shape, self.indices, self.run = replay.shape, replay.indices, replay.run
        self.node_size, self.take = replay.node_size, replay.take
        self._env = env

    def same_in_all_layers(self) -> Any:
        """A context in which all layers of a loop have to take slices at the same places."""
        positions = self._replay.positions
        return nullcontext() if positions is None else positions.same_in_all()

    def foresee(self, region: Region, args: Sequence[Any]) -> None:
        """Notes where a region will take slices that runs later, when a derivative is taken."""
        positions = self._replay.positions
        if positions is not None and positions.is_noting:
            with positions.same_in_all():
                jax.eval_shape(lambda *args: self.run(region, list(args)), *args)

    def apply_all(self, ops: Sequence[Op], level: int) -> None:
        """Applies ops in order; those of a loop over layers, below `level` such loops, as one loop."""
        start = 0
        while start < len(ops):
            op, end = ops[start], start + 1
            if self._replay.loops and len(op.rolls) > level:
                roll = op.rolls[level][0]
                while end < len(ops) and len(ops[end].rolls) > level and ops[end].rolls[level][0] is roll:
                    end += 1
                self._loop(roll, ops[start:end], level)
            elif not op.lazy:
                self._apply(op)
            start = end

    def read(self, value: Value) -> Any:
        """The small array of a value."""
        if id(value) not in self._env:
            self._env[id(value)] = self._made(value)
        return self._env[id(value)]

    def _made(self, value: Value) -> Any:
        """The array of a value that no op has made yet: a constant, a stack, or a layer of one."""
        if value.constant is not None:
            return self._replay.cut(value, value.constant)
        if value.layers:
            return self._stack(value)
        if value.part is not None:
            return self._part(value)
        if value.op is not None and value.op.lazy:
            self._apply(value.op)
            return self._env[id(value)]
        raise NotMadeError("a value is read before it is made")

    def _part(self, value: Value) -> Any:
        assert value.part is not None
        stack, axis, index = value.part
        row = self._replay.row(stack, index) if axis == stack.along else index
        return lax.index_in_dim(self.read(stack), row, axis, keepdims=False)

    def _stack(self, value: Value) -> Any:
        """The array of a stack."""
        if value.source is not None:
            return self.read(value.source)
        if value.part is not None:
            return self._part(value)
        if value.op is not None and all(id(layer) not in self._env for layer in value.layers):
            try:
                # All layers at once, as the function did it.
                args = [self.read(operand) for operand in value.op.inputs]
                if any(jnp.shape(a) != self.shape(v) for v, a in zip(value.op.inputs, args, strict=True)):
                    raise LayersDifferError
                if not self._reads_operands(value):
                    raise LayersDifferError  # the layers read copies, which may have lost other slices
                if value.op.name in _ASK_FACTS and any(map(self._replay.is_cut, value.op.inputs)):
                    raise LayersDifferError  # facts are known of each layer, and not of stacks
                outputs = rule_for(value.op.name).emit(value.op, args, self)
                pairs = zip(value.op.outputs, outputs, strict=True)
                arrays = {id(output): self._replay.cut(output, array) for output, array in pairs}
                self._env.update(arrays)
                return arrays[id(value)]
            except LayersDifferError:
                for layer in self._replay.layers(value):
                    self._apply_lazy(layer)
        return jnp.stack([self.read(layer) for layer in self._replay.layers(value)], value.along)

    def _reads_operands(self, stack: Value) -> bool:
        """Whether a stack's op reads in each layer what it reads of all layers at once."""
        assert stack.op is not None
        for index, layer in enumerate(stack.layers):
            if layer.op is None or (layer.layers and not self._reads_operands(layer)):
                return False
            if layer.layers:
                continue
            for operand, own in zip(stack.op.inputs, layer.op.inputs, strict=True):
                of_layer = operand.layers[index] if operand.layers else operand
                if of_layer is not own and not self._replay.keep_alike(of_layer, own):
                    return False
        return True

    def _apply_lazy(self, value: Value) -> None:
        """Makes a layer of a stack by what the stack's op is in that layer."""
        for layer in flat_layers(value):
            assert layer.op is not None
            if layer.op.lazy and id(layer) not in self._env:
                self._apply(layer.op)

    def _apply(self, op: Op) -> None:
        if op.name == "join_layers":
            self._env[id(op.outputs[0])] = self.read(op.params["stack"])
            return
        args = [self.read(value) for value in op.inputs]
        if self._replay.changed(op):
            emitted = op
            if placing.is_explicit((*op.inputs, *op.outputs)):
                args = placing.gathered(op, args, [self._replay.lost(value) for value in op.inputs])
                emitted = placing.with_sharding(op, self._replay.small_sharding(op.outputs[0]))
            outputs = rule_for(op.name).emit(emitted, args, self)
            outputs = [self._replay.cut(v, a) for v, a in zip(op.outputs, outputs, strict=True)]
            outputs = [self._replay.place(v, a) for v, a in zip(op.outputs, outputs, strict=True)]
        else:
            outputs = op.bind(*args)
        self._env.update((id(value), array) for value, array in zip(op.outputs, outputs, strict=True))

    def _loop(self, roll: Roll, ops: Sequence[Op], level: int) -> None:
        """Applies the ops of a loop over layers: as one loop, if all rounds are alike."""
        inner = self._replay
        shorter = len({op.rolls[level][1] for op in ops}) < len(roll.rounds)
        cut = shorter or any(map(inner.changed, ops))
        cut = cut or any(map(inner.is_cut, (*roll.inputs, *roll.results)))
        if not cut:
            try:
                outputs = roll.bind(*(self.read(value) for value in roll.inputs))
                self._env.update((id(v), array) for v, array in zip(roll.results, outputs, strict=True))
                return
            except NotMadeError:
                pass
        try:
            self._env.update(self._one_loop(roll, ops, level))
        except LayersDifferError:
            self.apply_all(ops, level + 1)

    def _one_loop(self, roll: Roll, ops: Sequence[Op], level: int) -> dict[int, Any]:
        """The outputs of a loop over layers, by the ids of their values.

        Raises:
          LayersDifferError: the rounds differ in more than which slices they take.
        """
        numbers = sorted({op.rolls[level][1] for op in ops})  # of those that are left
        count, place = len(numbers), {number: n for n, number in enumerate(numbers)}
        rounds: list[list[Op]] = [[] for _ in numbers]
        for op in ops:
            if not op.memo.get("carried") or len(op.rolls) > level + 1:
                rounds[place[op.rolls[level][1]]].append(op)
        made_here = {id(output) for op in ops for output in op.outputs}
        columns = _from_outside(rounds, made_here)
        sliced = [values for values in columns if any(value is not values[0] for value in values)]
        for values in columns:
            if all(value is values[0] for value in values):
                self.read(values[0])
        xs = [self._as_stack(values) for values in sliced]

        def is_read(value: Value) -> bool:
            """Whether a value is made at all: what nobody reads is not."""
            inside = value.op is not None and any(roll is other for other, _ in value.op.rolls)
            return id(value) in made_here or not inside

        of_round = [roll.rounds[number] for number in numbers]
        carried = [n for n, value in enumerate(of_round[0].given) if is_read(value)]
        stacked = [n for n, value in enumerate(of_round[0].made) if is_read(value)]
        first, last = (of_round[-1], of_round[0]) if roll.reverse else (of_round[0], of_round[-1])
        initial = [self.read(first.taken[n].op.inputs[0]) for n in carried]  # type: ignore[union-attr]

        def one_round(number: int, positions: Positions, differs: Sequence[bool] | None) -> Any:
            """A round as a function of what is carried, of its slices, and of the places it takes."""

            def step(carry: Sequence[Any], slices: Sequence[Any], rows: Sequence[Any]) -> Any:
                this, before = of_round[number], self._replay.positions
                env = dict(self._env)
                env.update((id(this.taken[n]), array) for n, array in zip(carried, carry, strict=True))
                env.update((id(v[number]), array) for v, array in zip(sliced, slices, strict=True))
                run = _Run(self._replay, env)
                self._replay.positions = positions.start(differs, rows)
                try:
                    run.apply_all(rounds[number], level + 1)
                    given = [run.read(this.given[n]) for n in carried]
                    return given, [run.read(this.made[n]) for n in stacked]
                finally:
                    self._replay.positions = before

            return step

        slices = [jax.eval_shape(lambda x: x[0], x) for x in xs]
        noted = [Positions() for _ in range(count)]
        for number, positions in enumerate(noted):
            jax.eval_shape(one_round(number, positions, None), initial, slices, [])
        differs, found = tables(noted)
        hoisted = [self._replay.hoisted(table) for table in found]
        rows = [jax.ShapeDtypeStruct(table.shape[1:], table.dtype) for table in found]
        steps = [one_round(number, positions, differs) for number, positions in enumerate(noted)]
        check_alike([jax.make_jaxpr(step)(initial, slices, rows) for step in steps])
        carry, stacks = lax.scan(
            lambda carry, x: steps[0](carry, *x),
            initial,
            (xs, [jnp.asarray(table) for table in hoisted]),
            length=count,
            reverse=roll.reverse,
            unroll=roll.unroll,
        )
        outputs = dict(zip((id(last.given[n]) for n in carried), carry, strict=True))
        return outputs | dict(zip((id(roll.outputs[n]) for n in stacked), stacks, strict=True))

    def _as_stack(self, values: Sequence[Value]) -> Any:
        """The arrays of values, one for each layer, along a new first axis."""
        parts = [value.part for value in values]
        if all(part is not None and part[0] is parts[0][0] for part in parts):  # type: ignore[index]
            stack, axis, _ = parts[0]  # type: ignore[misc]
            indices = [part[2] for part in parts]  # type: ignore[index]
            indices = [self._replay.row(stack, n) if axis == stack.along else n for n in indices]
            array = self.read(stack)
            if indices != list(range(array.shape[axis])):
                array = take(placing.gather(array, (axis,)), axis, np.array(indices))
            return array if axis == 0 else jnp.moveaxis(array, axis, 0)
        arrays = [self.read(value) for value in values]
        if any(array.shape != arrays[0].shape for array in arrays):
            raise LayersDifferError
        return jnp.stack(arrays)

    def representative(self, value: Value, axis: int) -> Any:
        """One of the slices that are alike along an axis, which then has size 1.

        It is made as the value was, from representatives of what it was made of, down to zeros
        and to arrays that were spread along the axis.
        """
        known = self.facts.of(value)
        alike = known.alike[axis]
        if known.fill is not None or (alike is not None and alike.all()):
            return lax.slice_in_dim(placing.gather(jnp.asarray(self.read(value)), (axis,)), 0, 1, axis=axis)
        op = value.op
        if alike is None or op is None:
            shape = list(self.shape(value))
            shape[axis] = 1
            return jnp.zeros(shape, value.dtype)
        if op.name == readers.NAME:
            return readers.part_of(op, self.representative(op.inputs[0], axis), self, besides=axis)
        if op.name == "transpose":
            inner = self.representative(op.inputs[0], op.params["permutation"][axis])
            return lax.transpose(inner, op.params["permutation"])
        if op.name == "broadcast_in_dim":
            places = op.params["broadcast_dimensions"]
            shape = list(self.shape(value))
            shape[axis] = 1
            inner = self.representative(op.inputs[0], places.index(axis))
            return lax.broadcast_in_dim(inner, shape, places)
        if op.name == "squeeze":
            left = [a for a in range(len(op.inputs[0].shape)) if a not in op.params["dimensions"]]
            inner = self.representative(op.inputs[0], left[axis])
            return lax.squeeze(inner, op.params["dimensions"])
        if rule_for(op.name) is not elementwise:
            raise NotImplementedError(f"{op} says that slices are alike, but not how one is made.")
        along = len(value.shape)
        inputs = [
            self.representative(v, axis) if len(v.shape) == along and v.shape[axis] != 1 else self.read(v)
            for v in op.inputs
        ]
        shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in inputs))
        inputs = [i if not jnp.ndim(i) else jnp.broadcast_to(i, shape) for i in inputs]
        (output,) = op.bind(*inputs)
        return output
