"""Runs a program on arrays that have lost the slices that a solution drops."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.engine import placing
from jaxprune.graph.engine.axes import Solution
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import LayerLoop, Op, Region, Value, flat_layers, is_removed
from jaxprune.graph.engine.positions import LayersDifferError, NotMadeError, Positions
from jaxprune.graph.engine.representatives import representative
from jaxprune.graph.engine.rolling import run_rounds_as_loop
from jaxprune.graph.engine.rules import rule_for
from jaxprune.graph.engine.rules.reductions import REDUCTIONS
from jaxprune.graph.engine.rules.slices import take_slices

_READ_FACTS = frozenset((*REDUCTIONS, "argmax", "argmin"))
"""Ops whose rules make up for dropped slices, using the facts about them."""


class Replay:
    """A program under a solution, and the arrays of one run of one of its regions.

    It is the `Frame` that rules emit in. An op is applied as traced if none of its values lost a slice;
    any other by its rule. Layers are processed as the function did it where they keep equally many slices:
    an op on a stack is applied to all layers at once, and the rounds of a loop over layers are one loop
    (`rolling`). Where that is not possible, `LayersDifferError` says so, and they are processed one by one.

    Attributes:
      facts: the facts of all values.
      arrays: the arrays made so far, by the ids of their values.
      positions: in a round of a loop over layers, the positions at which it takes slices.
    """

    def __init__(
        self, kept: Solution, facts: Facts, as_loops: bool = True, removed: Collection[int] = ()
    ) -> None:
        """Starts to replay under a solution.

        Without `as_loops`, loops over layers run one round after the other. `removed` has the ids of layers
        that were removed from their stacks.
        """
        self._kept, self.facts, self._as_loops, self._removed = kept, facts, as_loops, removed
        self._changed: dict[int, bool] = {}
        self.arrays: dict[int, Any] = {}
        self.positions: Positions | None = None

    def with_arrays(self, arrays: dict[int, Any], positions: Positions | None = None) -> "Replay":
        """Return a replay of the same program that has other arrays, and perhaps other positions."""
        other = copy(self)
        other.arrays = arrays
        other.positions = self.positions if positions is None else positions
        return other

    def run(self, region: Region, args: Sequence[Any]) -> list[Any]:
        """Run a region on small inputs and return its outputs, which are small too."""
        pairs = zip(region.inputs, args, strict=True)
        inner = self.with_arrays({id(value): self.place(value, array) for value, array in pairs})
        inner.apply_all(region.ops, 0)
        return [inner.read(value) for value in region.outputs]

    # What is left of values.

    def indices(self, value: Value, axis: int) -> np.ndarray | None:
        """Return the kept slices of an axis, None for all; LayersDifferError if layers keep others."""
        if not value.layers:
            return self._kept.indices(value.axes[axis])
        if axis == value.along:
            return None
        first, *others = [self.indices(layer, axis - (axis > value.along)) for layer in self.layers(value)]
        if any(not np.array_equal(_or_empty(first), _or_empty(other)) for other in others):
            raise LayersDifferError
        return first

    def shape(self, value: Value) -> tuple[Any, ...]:
        """Return a value's shape without the dropped slices; LayersDifferError if layers have others."""
        if not value.layers:
            kept = [self.indices(value, axis) for axis in range(len(value.shape))]
            return tuple(n if k is None else len(k) for n, k in zip(value.shape, kept, strict=True))
        first, *others = [self.shape(layer) for layer in self.layers(value)]
        if any(other != first for other in others):
            raise LayersDifferError
        return (*first[: value.along], 1 + len(others), *first[value.along :])

    def node_size(self, node: int, dense: Any) -> Any:
        """Return how many slices of a node are kept; `dense` if all of them are."""
        kept = self._kept.indices(node)
        return dense if kept is None else len(kept)

    def layers(self, stack: Value) -> list[Value]:
        """Return the layers that are left of a stack."""
        if not self._removed or stack.source is not None:
            return list(stack.layers)
        return [layer for layer in stack.layers if not is_removed(layer, self._removed)]

    def row(self, stack: Value, index: int) -> int:
        """Return the index of a layer in what is left of a stack."""
        return index if not self._removed else self.layers(stack).index(stack.layers[index])

    def keep_alike(self, value: Value, other: Value) -> bool:
        """Whether two values keep the same slices."""
        axes = range(len(value.shape))
        return value.shape == other.shape and all(
            np.array_equal(_or_empty(self.indices(value, axis)), _or_empty(self.indices(other, axis)))
            for axis in axes
        )

    def is_cut(self, value: Value) -> bool:
        """Whether a value has lost a slice."""
        return any(not self._kept.full(node) for layer in flat_layers(value) for node in layer.axes)

    def is_changed(self, op: Op) -> bool:
        """Whether a value of an op, or of its regions, has lost a slice."""
        if id(op) not in self._changed:
            values = [*op.inputs, *op.outputs]
            inner = [op for region in op.regions.values() for op in region.ops]
            values += [v for region in op.regions.values() for v in (*region.inputs, *region.outputs)]
            self._changed[id(op)] = any(map(self.is_cut, values)) or any(map(self.is_changed, inner))
        return self._changed[id(op)]

    # Cutting and placing arrays.

    def take(self, array: Any, axis: int, positions: np.ndarray) -> Any:
        """Return slices of an array at known positions; in a loop over layers, at those of the layer."""
        if self.positions is None:
            return take_slices(array, axis, positions)
        return self.positions.take_in_round(array, axis, positions)

    def cut(self, value: Value, array: Any) -> Any:
        """Return an array without the dropped slices of its value, where it still has them."""
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

    def small_sharding(self, value: Value) -> Any:
        """Return the sharding of a value without the dropped slices; None where it has none."""
        if value.sharding is None:
            return None
        return placing.small_sharding(value.sharding, value.shape, self.shape(value))

    def place(self, value: Value, array: Any) -> Any:
        """Return an array with the sharding of a value that may have lost slices."""
        return array if value.sharding is None else placing.place(array, self.small_sharding(value))

    # What rules ask besides.

    def representative(self, value: Value, axis: int) -> Any:
        """Return one of the slices that are alike along an axis, as an axis of size 1."""
        return representative(self, value, axis)

    def same_in_all_layers(self) -> Any:
        """Return a context in which all layers of a loop have to take slices at the same positions."""
        return nullcontext() if self.positions is None else self.positions.same_in_all()

    def foresee(self, region: Region, args: Sequence[Any]) -> None:
        """Note where a region will take slices that runs later, when a derivative is taken."""
        if self.positions is not None and self.positions.is_noting:
            with self.positions.same_in_all():
                jax.eval_shape(lambda *args: self.run(region, list(args)), *args)

    # Applying ops.

    def apply_all(self, ops: Sequence[Op], level: int) -> None:
        """Apply ops in order; rounds of loops that lie inside of `level` other loops as one loop."""
        start = 0
        while start < len(ops):
            op, end = ops[start], start + 1
            if self._as_loops and len(op.rounds) > level:
                loop = op.rounds[level][0]
                while end < len(ops) and len(ops[end].rounds) > level and ops[end].rounds[level][0] is loop:
                    end += 1
                self._apply_loop(loop, ops[start:end], level)
            elif not op.lazy:
                self._apply(op)
            start = end

    def _apply_loop(self, loop: LayerLoop, ops: Sequence[Op], level: int) -> None:
        """Apply the ops of a loop over layers: as one loop, if all rounds are alike."""
        shorter = len({op.rounds[level][1] for op in ops}) < len(loop.rounds)
        values = (*loop.inputs, *loop.outputs)
        if not (shorter or any(map(self.is_changed, ops)) or any(map(self.is_cut, values))):
            try:
                outputs = loop.bind(*(self.read(value) for value in loop.inputs))
                self.arrays.update((id(v), array) for v, array in zip(loop.outputs, outputs, strict=True))
                return
            except NotMadeError:
                pass
        try:
            self.arrays.update(run_rounds_as_loop(self, loop, ops, level))
        except LayersDifferError:
            self.apply_all(ops, level + 1)

    def _apply(self, op: Op) -> None:
        if op.name == "join_layers":
            self.arrays[id(op.outputs[0])] = self.read(op.params["stack"])
            return
        args = [self.read(value) for value in op.inputs]
        if self.is_changed(op):
            emitted = op
            if any(value.sharding is not None for value in (*op.inputs, *op.outputs)):
                args = placing.gathered(op, args, [self._cut_axes(value) for value in op.inputs])
                emitted = placing.with_sharding(op, self.small_sharding(op.outputs[0]))
            outputs = rule_for(op.name).emit(emitted, args, self)
            outputs = [self.cut(v, a) for v, a in zip(op.outputs, outputs, strict=True)]
            outputs = [self.place(v, a) for v, a in zip(op.outputs, outputs, strict=True)]
        else:
            outputs = op.bind(*args)
        self.arrays.update((id(value), array) for value, array in zip(op.outputs, outputs, strict=True))

    def _cut_axes(self, value: Value) -> list[int]:
        return [axis for axis in range(len(value.shape)) if self.indices(value, axis) is not None]

    # Reading values.

    def read(self, value: Value) -> Any:
        """Return the small array of a value."""
        if id(value) not in self.arrays:
            self.arrays[id(value)] = self._make(value)
        return self.arrays[id(value)]

    def _make(self, value: Value) -> Any:
        """Return the array of a value that no op has made yet: a constant, a stack, or a layer of one."""
        if value.constant is not None:
            return self.cut(value, value.constant)
        if value.layers:
            return self._make_stack(value)
        if self._is_read_off_stack(value):
            return self._make_part(value)
        if value.op is not None and value.op.lazy:
            self._apply(value.op)
            return self.arrays[id(value)]
        raise NotMadeError("a value is read before it is made")

    def _is_read_off_stack(self, value: Value) -> bool:
        """Whether a layer is a slice of its stack's array, rather than made by an op of its own.

        A stack that is made by stacking its layers cannot give them: each would wait for the other.
        """
        if value.part is None:
            return False
        stack = value.part.stack
        if id(stack) in self.arrays or stack.source is not None or self._is_read_off_stack(stack):
            return True
        has_own_op = value.op is not None and value.op.lazy
        return self._is_made_at_once(stack) or not (value.layers or has_own_op)

    def _is_made_at_once(self, stack: Value) -> bool:
        """Whether an op makes all layers of a stack, and none of them has been made by itself."""
        return stack.op is not None and all(id(layer) not in self.arrays for layer in flat_layers(stack))

    def _make_part(self, value: Value) -> Any:
        assert value.part is not None
        stack, axis, index = value.part
        row = self.row(stack, index) if axis == stack.along else index
        return lax.index_in_dim(self.read(stack), row, axis, keepdims=False)

    def _make_stack(self, value: Value) -> Any:
        if value.source is not None:
            return self.read(value.source)
        if self._is_read_off_stack(value):
            return self._make_part(value)
        if value.op is not None and self._is_made_at_once(value):
            try:
                # All layers at once, as the function did it.
                args = [self.read(operand) for operand in value.op.inputs]
                if any(jnp.shape(a) != self.shape(v) for v, a in zip(value.op.inputs, args, strict=True)):
                    raise LayersDifferError
                if not self._layers_read_operands(value):
                    raise LayersDifferError  # the layers read copies, which may have lost other slices
                if value.op.name in _READ_FACTS and any(map(self.is_cut, value.op.inputs)):
                    raise LayersDifferError  # facts are known of each layer, and not of stacks
                outputs = rule_for(value.op.name).emit(value.op, args, self)
                pairs = zip(value.op.outputs, outputs, strict=True)
                made = {id(output): self.cut(output, array) for output, array in pairs}
                self.arrays.update(made)
                return made[id(value)]
            except LayersDifferError:
                for layer in self.layers(value):
                    self._apply_lazy_ops(layer)
        return jnp.stack([self.read(layer) for layer in self.layers(value)], value.along)

    def _layers_read_operands(self, stack: Value) -> bool:
        """Whether the ops of the layers of a stack read the layers of what the op on the stack reads."""
        assert stack.op is not None
        for index, layer in enumerate(stack.layers):
            if layer.op is None or (layer.layers and not self._layers_read_operands(layer)):
                return False
            if layer.layers:
                continue
            for operand, read in zip(stack.op.inputs, layer.op.inputs, strict=True):
                of_layer = operand.layers[index] if operand.layers else operand
                if of_layer is not read and not self.keep_alike(of_layer, read):
                    return False
        return True

    def _apply_lazy_ops(self, value: Value) -> None:
        """Make a layer of a stack by the ops of that layer."""
        for layer in flat_layers(value):
            assert layer.op is not None
            if layer.op.lazy and id(layer) not in self.arrays:
                self._apply(layer.op)


def _or_empty(indices: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, int) if indices is None else indices
