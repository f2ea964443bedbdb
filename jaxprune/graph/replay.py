"""Runs a program on arrays that have lost the slices that a solution drops."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph import placing, readers
from jaxprune.graph.axes import Kept
from jaxprune.graph.facts import Facts
from jaxprune.graph.ir import Op, Region, Value
from jaxprune.graph.rules import elementwise, rule_for
from jaxprune.graph.rules.slices import take


class Replay:
    """A program under a solution.

    An op none of whose values lost a slice is applied as it was traced; any other by its rule.
    """

    def __init__(self, kept: Kept, facts: Facts):
        self._kept, self.facts = kept, facts
        self._changed: dict[int, bool] = {}

    def indices(self, value: Value, axis: int) -> np.ndarray | None:
        """Which slices of an axis stay; None for all of them."""
        return self._kept.indices(value.axes[axis])

    def shape(self, value: Value) -> tuple[Any, ...]:
        """The shape of a value without the slices that go."""
        kept = [self.indices(value, axis) for axis in range(len(value.shape))]
        return tuple(n if k is None else len(k) for n, k in zip(value.shape, kept, strict=True))

    def node_size(self, node: int, dense: Any) -> Any:
        """How many of a node's slices stay, of so many in the dense program."""
        kept = self._kept.indices(node)
        return dense if kept is None else len(kept)

    def cut(self, value: Value, array: Any) -> Any:
        """An array without the slices that go, where it still has them."""
        if not any(self.indices(value, axis) is not None for axis in range(len(value.shape))):
            return array
        for axis, size in enumerate(self.shape(value)):
            kept = self.indices(value, axis)
            if kept is not None and array.shape[axis] != size:
                array = take(placing.gather(array, (axis,)), axis, kept)
        return array

    def lost(self, value: Value) -> list[int]:
        """The axes of a value that have lost slices."""
        return [axis for axis in range(len(value.shape)) if self.indices(value, axis) is not None]

    def place(self, value: Value, array: Any) -> Any:
        """An array with the sharding of a value that may have lost slices."""
        if value.sharding is None:
            return array
        return placing.place(array, placing.small_sharding(value.sharding, value.shape, self.shape(value)))

    def changed(self, op: Op) -> bool:
        """Whether a value of an op, or of its regions, has lost a slice."""
        if id(op) not in self._changed:
            values = [*op.inputs, *op.outputs]
            inner = [op for region in op.regions.values() for op in region.ops]
            values += [v for region in op.regions.values() for v in (*region.inputs, *region.outputs)]
            cut = any(not self._kept.full(node) for value in values for node in value.axes)
            self._changed[id(op)] = cut or any(map(self.changed, inner))
        return self._changed[id(op)]

    def run(self, region: Region, args: Sequence[Any]) -> list[Any]:
        """Runs a region on small inputs; its outputs are small too."""
        return _Run(self, region, args).outputs


class _Run:
    """One run of a region: the arrays of its values. It is the `Frame` that rules emit in."""

    def __init__(self, replay: Replay, region: Region, args: Sequence[Any]):
        self._replay, self.facts = replay, replay.facts
        self.shape, self.indices, self.run = replay.shape, replay.indices, replay.run
        self.node_size = replay.node_size
        pairs = list(zip(region.inputs, args, strict=True))
        self._env = {id(value): replay.place(value, array) for value, array in pairs}
        for op in region.ops:
            self._apply(op)
        self.outputs = [self._read(value) for value in region.outputs]

    def _read(self, value: Value) -> Any:
        if id(value) not in self._env:
            self._env[id(value)] = self._replay.cut(value, value.constant)
        return self._env[id(value)]

    def _apply(self, op: Op) -> None:
        args = [self._read(value) for value in op.inputs]
        if self._replay.changed(op):
            emitted = op
            if placing.is_explicit((*op.inputs, *op.outputs)):
                args = placing.gathered(op, args, [self._replay.lost(value) for value in op.inputs])
                emitted = placing.with_sharding(op, self._small_sharding(op.outputs[0]))
            outputs = rule_for(op.name).emit(emitted, args, self)
            outputs = [self._replay.cut(v, a) for v, a in zip(op.outputs, outputs, strict=True)]
            outputs = [self._replay.place(v, a) for v, a in zip(op.outputs, outputs, strict=True)]
        else:
            outputs = op.bind(*args)
        self._env.update((id(value), array) for value, array in zip(op.outputs, outputs, strict=True))

    def _small_sharding(self, value: Value) -> Any:
        if value.sharding is None:
            return None
        return placing.small_sharding(value.sharding, value.shape, self.shape(value))

    def representative(self, value: Value, axis: int) -> Any:
        """One of the slices that are alike along an axis, which then has size 1.

        It is made as the value was, from representatives of what it was made of, down to zeros
        and to arrays that were spread along the axis.
        """
        known = self.facts.of(value)
        alike = known.alike[axis]
        if known.fill is not None or (alike is not None and alike.all()):
            return lax.slice_in_dim(placing.gather(jnp.asarray(self._read(value)), (axis,)), 0, 1, axis=axis)
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
            self.representative(v, axis) if len(v.shape) == along and v.shape[axis] != 1 else self._read(v)
            for v in op.inputs
        ]
        shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in inputs))
        inputs = [i if not jnp.ndim(i) else jnp.broadcast_to(i, shape) for i in inputs]
        (output,) = op.bind(*inputs)
        return output
