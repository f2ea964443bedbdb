"""Makes the values, stacks and ops of a program, with their nodes in one axis graph."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.ir import Op, Part, Value
from jaxprune.tracing.jaxprs import binder, struct_of

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import JaxprEqn


class Site(NamedTuple):
    """Where ops are appended while a jaxpr is traced."""

    ops: list[Op]
    source: str = ""  # the line of the user's code that they come from, as "file:line"
    custom_depth: int = 0  # how many derivatives of custom rules the site lies in
    # Whether the jaxpr was cached at an earlier call, so that its equations name lines of that one; its ops
    # are placed at `source` instead.
    cached: bool = False


class Builder:
    """Makes the parts of one program, with new nodes in a graph."""

    def __init__(self, graph: AxisGraph):
        self.graph = graph
        self.stacked: list[Value] = []  # the values made so far that have layers

    def value(self, aval: Any, constant: Any = None) -> Value:
        """Make a value with new nodes."""
        shape = tuple(aval.shape)
        sharding = struct_of(aval).sharding if shape else None
        axes = tuple(map(self.graph.node, shape))
        return Value(shape, aval.dtype, axes, constant=constant, sharding=sharding)

    def op(
        self, name: str, params: dict[str, Any], inputs: list[Value], outputs: list[Value], **more: Any
    ) -> Op:
        """Make an op, and enter it as what makes its outputs."""
        op = Op(name, params, inputs, outputs, **more)
        for output in outputs:
            output.op = op
        return op

    def op_of(
        self, eqn: "JaxprEqn", inputs: list[Value], outputs: list[Value], site: Site, **more: Any
    ) -> Op:
        """Make the op of an equation."""
        more |= {"bind": binder(eqn), "source": site.source, "has_effects": bool(eqn.effects)}
        return self.op(eqn.primitive.name, eqn.params, inputs, outputs, **more)

    def copy(self, value: Value, site: Site, carried: bool = False) -> Value:
        """Append a copy of a value; `memo` marks a copy that a loop carries into a round."""
        copy = self.value(value)
        more = {"bind": lambda array: [array], "source": site.source}
        memo = {"carried": True} if carried else {}
        site.ops.append(self.op("copy", {}, [value], [copy], memo=memo, **more))
        return copy

    def stack(self, layers: Sequence[Value], along: int) -> Value:
        """Make the stack of some layers."""
        shape = (*layers[0].shape[:along], len(layers), *layers[0].shape[along:])
        unused = tuple(self.graph.node(1) for _ in shape)  # the nodes that count are those of the layers
        stack = Value(shape, layers[0].dtype, unused, layers=tuple(layers), along=along)
        self.stacked.append(stack)
        return stack

    def stack_with_parts(self, layers: Sequence[Value], along: int) -> Value:
        """Make the stack of some layers, which can be read as slices of it."""
        stack = self.stack(layers, along)
        for index, layer in enumerate(layers):
            layer.part = Part(stack, along, index)
        return stack

    def value_with_layers(self, aval: Any, axes: Sequence[int]) -> Value:
        """Make a value of which some axes count layers, with new nodes for each layer."""
        if not axes:
            return self.value(aval)
        along, rest = axes[0], tuple(axis - (axis > axes[0]) for axis in axes[1:])
        inner = one_layer(aval, along)
        layers = [self.value_with_layers(inner, rest) for _ in range(aval.shape[along])]
        return self.stack_with_parts(layers, along)

    def like(self, value: Value) -> Value:
        """Make a value with the shape and the layers of another."""
        if not value.layers:
            return self.value(value)
        return self.stack_with_parts([self.like(layer) for layer in value.layers], value.along)

    def layers(self, value: Value, axis: int, site: Site) -> list[Value]:
        """Return the slices of a value along an axis, taking it apart if it has no layers along it."""
        if value.layers and value.along == axis:
            return list(value.layers)
        inner = axis - (axis > value.along)
        if value.layers and all(has_layers(layer, inner) for layer in value.layers):
            rows = [self.layers(layer, inner, site) for layer in value.layers]
            along = value.along - (value.along > axis)
            parts = [self.stack(column, along) for column in zip(*rows, strict=True)]
            for index, part in enumerate(parts):
                part.part = Part(value, axis, index)
            return parts
        value = self.dense(value, site)
        parts = []
        for index in range(value.shape[axis]):
            part = self.value(one_layer(value, axis))
            bind = partial(_take_layer, axis=axis, index=index)
            params = {"axis": axis, "index": index}
            op = self.op("take_layer", params, [value], [part], bind=bind, source=site.source, lazy=True)
            site.ops.append(op)
            parts.append(part)
        self.stack_with_parts(parts, axis).source = value
        return parts

    def dense(self, value: Value, site: Site) -> Value:
        """Return a value without layers: it has one node for each axis, so that its layers are tied."""
        if not value.layers:
            return value
        if value.source is not None:
            return value.source
        layers = [self.dense(layer, site) for layer in value.layers]
        dense = self.value(value)
        more = {"bind": lambda *layers: [jnp.stack(layers, value.along)], "source": site.source}
        params = {"axis": value.along, "stack": value}
        site.ops.append(self.op("join_layers", params, layers, [dense], **more))
        return dense


def has_layers(value: Value, axis: int) -> bool:
    """Whether the slices of a value along an axis have nodes of their own."""
    if not value.layers:
        return False
    return value.along == axis or all(has_layers(v, axis - (axis > value.along)) for v in value.layers)


def one_layer(aval: Any, axis: int) -> jax.ShapeDtypeStruct:
    """Return the shape and sharding of a slice along an axis."""
    struct = struct_of(aval)
    shape = tuple(size for place, size in enumerate(struct.shape) if place != axis)
    if struct.sharding is None:
        return jax.ShapeDtypeStruct(shape, struct.dtype)
    spec = (name for place, name in enumerate(struct.sharding.spec) if place != axis)
    sharding = NamedSharding(struct.sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, struct.dtype, sharding=sharding)


def _take_layer(array: Any, axis: int, index: int) -> list[Any]:
    return [jax.lax.index_in_dim(array, index, axis, keepdims=False)]
