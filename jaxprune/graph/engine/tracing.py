"""Traces a function into the small program that the rest of the package works on.

Calls (`jit`) are inlined. A scan over stacked params is unrolled: each round stands in the program by
itself, so that each layer has axes of its own, and `Roll` remembers that they were a loop. What is done
to a stack outside of a scan (a cast, a product under `vmap`) is taken apart into what it is in each layer.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.ir import (
    Op,
    Program,
    Region,
    Roll,
    Round,
    Value,
    concrete,
    is_differentiable,
    with_layers,
)
from jaxprune.graph.engine.peeling import Peeled, peel
from jaxprune.graph.engine.stacking import find_stacks
from jaxprune.tracing.jaxprs import abstract, binder, close, is_library_call, place, scan_split, struct_of

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

_WRAPPERS = ("composite", "custom_vmap_call")
_CHECKPOINTS = ("remat", "remat2", "checkpoint")
_INLINED = ("jit", "pjit", "closed_call", "core_call")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
_CUSTOM_DEPTH = 2  # derivatives of a custom rule that are taken by the rule itself


def trace(
    function: Callable[..., Any],
    *arguments: Any,
    stacks: Mapping[int, tuple[int, ...]] | None = None,
    count: int = 0,
) -> Program:
    """Traces a function of pytrees of arrays (or of `jax.ShapeDtypeStruct`).

    Args:
      function: the function.
      *arguments: its arguments.
      stacks: by the number of a leaf of the arguments, the axes that count layers; None to read them off the
        function's scans, for the first `count` leaves.
      count: how many leaves may be stacks.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    out_trees = []

    def flat(*leaves: Any) -> list[Any]:
        out_leaves, out_tree = jax.tree.flatten(function(*jax.tree.unflatten(treedef, leaves)))
        out_trees.append(out_tree)
        return out_leaves

    closed = jax.make_jaxpr(flat)(*map(abstract, leaves))
    stacks = find_stacks(closed.jaxpr, count) if stacks is None else stacks
    builder = _Builder(AxisGraph())
    inputs = [builder.stack_of(var.aval, stacks.get(n, ())) for n, var in enumerate(closed.jaxpr.invars)]
    ops: list[Op] = []
    outputs = builder.inline(closed.jaxpr, closed.consts, inputs, ops, 0)
    region = prune_dead(Region(inputs, outputs, ops))
    return Program(builder.graph, region, out_trees[-1], dict(stacks), builder.stacks)


class _Builder:
    """Turns jaxprs into regions whose axes are nodes of one graph.

    Attributes:
      graph: the graph.
      stacks: the values that have layers.
    """

    def __init__(self, graph: AxisGraph):
        self.graph = graph
        self.stacks: list[Value] = []
        self._derivatives: dict[int, tuple[Any, ClosedJaxpr]] = {}

    def value(self, aval: Any, constant: Any = None) -> Value:
        shape = tuple(aval.shape)
        sharding = struct_of(aval).sharding if shape else None
        axes = tuple(map(self.graph.node, shape))
        return Value(shape, aval.dtype, axes, constant=constant, sharding=sharding)

    def stack(self, layers: Sequence[Value], along: int) -> Value:
        """A stack of values, whose slices they are."""
        shape = (*layers[0].shape[:along], len(layers), *layers[0].shape[along:])
        stack = Value(shape, layers[0].dtype, self._no_nodes(len(shape)), layers=tuple(layers), along=along)
        self.stacks.append(stack)
        return stack

    def _no_nodes(self, count: int) -> tuple[int, ...]:
        return tuple(self.graph.node(1) for _ in range(count))

    def stack_of(self, aval: Any, axes: Sequence[int]) -> Value:
        """A value some axes of which count layers, each layer with nodes of its own."""
        if not axes:
            return self.value(aval)
        along, rest = axes[0], tuple(axis - (axis > axes[0]) for axis in axes[1:])
        inner = _one_layer(aval, along)
        layers = [self.stack_of(inner, rest) for _ in range(aval.shape[along])]
        return self._with_parts(self.stack(layers, along))

    def like(self, value: Value) -> Value:
        """A new value of the same shape and layers."""
        if not value.layers:
            return self.value(value)
        layers = [self.like(layer) for layer in value.layers]
        return self._with_parts(self.stack(layers, value.along))

    def _with_parts(self, stack: Value) -> Value:
        """A stack whose layers are slices of it."""
        for index, layer in enumerate(stack.layers):
            layer.part = (stack, stack.along, index)
        return stack

    def op(
        self, name: str, params: dict[str, Any], inputs: list[Value], outputs: list[Value], **more: Any
    ) -> Op:
        """An op that makes its outputs."""
        op = Op(name, params, inputs, outputs, **more)
        for output in outputs:
            output.op = op
        return op

    def layers(self, value: Value, axis: int, ops: list[Op], source: str) -> list[Value]:
        """The slices of a value along an axis, each with nodes of its own as far as it has them."""
        if value.layers and value.along == axis:
            return list(value.layers)
        inner = axis - (axis > value.along)
        if value.layers and all(_has_layers(layer, inner) for layer in value.layers):
            rows = [self.layers(layer, inner, ops, source) for layer in value.layers]
            parts = [
                self.stack(column, value.along - (value.along > axis)) for column in zip(*rows, strict=True)
            ]
            for index, part in enumerate(parts):
                part.part = (value, axis, index)
            return parts
        value = self.dense(value, ops, source)
        parts = []
        for index in range(value.shape[axis]):
            part = self.value(_one_layer(value, axis))
            bind = _without_effects(partial(_layer, axis=axis, index=index))
            params = {"axis": axis, "index": index}
            ops.append(self.op("take_layer", params, [value], [part], bind=bind, source=source, lazy=True))
            parts.append(part)
        self._with_parts(self.stack(parts, axis)).source = value
        return parts

    def dense(self, value: Value, ops: list[Op], source: str) -> Value:
        """A value without layers: all its slices have one node for each axis, which ties the layers."""
        if not value.layers:
            return value
        if value.source is not None:
            return value.source
        layers = [self.dense(layer, ops, source) for layer in value.layers]
        dense = self.value(value)
        bind = _without_effects(lambda *layers: [jnp.stack(layers, value.along)])
        params = {"axis": value.along, "stack": value}
        ops.append(self.op("join_layers", params, layers, [dense], bind=bind, source=source))
        return dense

    def open_region(
        self,
        closed: "ClosedJaxpr",
        like: Sequence[Value] | None,
        custom_depth: int,
        called_at: str,
        cached: bool,
    ) -> Region:
        """The region of a jaxpr, whose inputs have the layers of other values, if they are given."""
        jaxpr = closed.jaxpr
        if like is None:
            inputs = [self.value(var.aval) for var in jaxpr.invars]
        else:
            inputs = [self.like(value) for value in like]
        ops: list[Op] = []
        outputs = self.inline(jaxpr, closed.consts, inputs, ops, custom_depth, called_at, cached)
        if like is None:
            outputs = [self.dense(output, ops, called_at) for output in outputs]
        return Region(inputs, outputs, ops)

    def inline(
        self,
        jaxpr: "Jaxpr",
        consts: Sequence[Any],
        inputs: Sequence[Value],
        ops: list[Op],
        custom_depth: int,
        called_at: str = "",
        cached: bool = False,
    ) -> list[Value]:
        """Appends a jaxpr's ops and returns its outputs.

        A `cached` jaxpr has the lines of an earlier call: its ops are placed at this one.
        """
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(
            (var, self.value(var.aval, const)) for var, const in zip(jaxpr.constvars, consts, strict=True)
        )

        def read(atom: Any) -> Value:
            return (
                self.value(atom.aval, atom.val) if hasattr(atom, "val") else env[atom]
            )  # a literal or a variable

        for eqn in jaxpr.eqns:
            args = [read(atom) for atom in eqn.invars]
            name, source = eqn.primitive.name, called_at if cached else place(eqn, called_at)
            if name in _INLINED:
                inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
                again = cached or is_library_call(eqn)
                outputs = self.inline(inner.jaxpr, inner.consts, args, ops, custom_depth, source, again)
            elif name in ("custom_jvp_call", "custom_vjp_call") and custom_depth >= _CUSTOM_DEPTH:
                inner = eqn.params["call_jaxpr"]
                outputs = self.inline(inner.jaxpr, inner.consts, args, ops, custom_depth, source, cached)
            else:
                outputs = None
                if any(arg.layers for arg in args):
                    outputs = self.on_layers(eqn, args, ops, custom_depth, source, cached)
                if outputs is None:
                    args = [self.dense(arg, ops, source) for arg in args]
                    outputs = [self.value(var.aval) for var in eqn.outvars]
                    regions = self.regions(eqn, None, custom_depth, source, cached)
                    more = {"bind": binder(eqn), "source": source, "regions": regions}
                    ops.append(self.op(name, eqn.params, args, outputs, **more))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def on_layers(
        self, eqn: "JaxprEqn", args: list[Value], ops: list[Op], custom_depth: int, source: str, cached: bool
    ) -> list[Value] | None:
        """The outputs of an op that reads stacks, if it can be done layer by layer; appends its ops."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            consts, carried = scan_split(params)
            if any(_has_layers(x, 0) for x in args[consts + carried :]) or any(
                value.layers and _is_indexed(params["jaxpr"].jaxpr, n)
                for n, value in enumerate(args[:consts])
            ):
                return self.unroll(eqn, args, ops, custom_depth, source, cached)
            return None
        if name in ("custom_jvp_call", "custom_vjp_call", *_WRAPPERS, *_CHECKPOINTS):
            regions = self.regions(eqn, args, custom_depth, source, cached)
            body = regions["body"]
            outputs = [self.like(output) for output in body.outputs]
            ops.append(self.op(name, params, args, outputs, bind=binder(eqn), source=source, regions=regions))
            return outputs
        if name in ("slice", "dynamic_slice") and (taken := self.taken(eqn, args)) is not None:
            return [taken]
        along = [value.along if value.layers else None for value in args]
        peeled = peel(name, params, [value.shape for value in args], along)
        if peeled is None:
            if name in _REDUCTIONS and params.get("out_sharding") is None:
                inner = tuple(axis for axis in params["axes"] if axis not in _stack_axes(args[0]))
                if inner:
                    return self.reduced(eqn, args[0], inner, ops, custom_depth, source)
            if (
                name == "squeeze"
                and args[0].shape[args[0].along] == 1
                and args[0].along in params["dimensions"]
            ):
                return self.squeezed(eqn, args[0], ops, custom_depth, source, cached)
            return None
        return self.peeled(eqn, peeled, [var.aval for var in eqn.outvars], args, ops, source)

    def peeled(
        self,
        eqn: "JaxprEqn",
        peeled: Peeled,
        shapes: Sequence[Any],
        args: list[Value],
        ops: list[Op],
        source: str,
    ) -> list[Value]:
        """The stacks, of such shapes, that an op makes layer by layer."""
        inner = [_one_layer(aval, peeled.out_axis) for aval in shapes]
        lengths = {
            value.shape[axis] for value, axis in zip(args, peeled.in_axes, strict=True) if axis is not None
        }
        (length,) = lengths
        rows = [
            [self.dense(value, ops, source)] * length
            if axis is None
            else self.layers(value, axis, ops, source)
            for value, axis in zip(args, peeled.in_axes, strict=True)
        ]
        made: list[list[Value]] = []
        for inputs in zip(*rows, strict=True):
            outputs = self.in_one_layer(eqn, peeled, inner, list(inputs), ops, source)
            made.append(outputs)
        stacks = [self._with_parts(self.stack(layers, peeled.out_axis)) for layers in zip(*made, strict=True)]
        # Not in the program, because the ops of the layers are; replaying applies it to all layers at once.
        operands = [
            value if axis is None or (value.layers and value.along == axis) else _stack_of(layers[0])
            for value, axis, layers in zip(args, peeled.in_axes, rows, strict=True)
        ]
        self.op(eqn.primitive.name, eqn.params, operands, stacks, bind=binder(eqn), source=source)
        return stacks

    def in_one_layer(
        self,
        eqn: "JaxprEqn",
        peeled: Peeled,
        shapes: Sequence[jax.ShapeDtypeStruct],
        inputs: list[Value],
        ops: list[Op],
        source: str,
    ) -> list[Value]:
        """What a peeled op makes in one layer, which may have layers itself."""
        eqn = eqn.replace(params=peeled.params)
        if any(value.layers for value in inputs):
            along = [value.along if value.layers else None for value in inputs]
            again = peel(eqn.primitive.name, eqn.params, [value.shape for value in inputs], along)
            if again is not None:
                return self.peeled(eqn, again, shapes, inputs, ops, source)
            inputs = [self.dense(value, ops, source) for value in inputs]
        outputs = [self.value(shape) for shape in shapes]
        more = {"bind": binder(eqn), "source": source, "lazy": True}
        ops.append(self.op(eqn.primitive.name, eqn.params, inputs, outputs, **more))
        return outputs

    def taken(self, eqn: "JaxprEqn", args: list[Value]) -> Value | None:
        """Some of the layers, that a slice takes at known indices; None if it does anything else."""
        stack, params = args[0], eqn.params
        along, size = stack.along, stack.shape
        if eqn.primitive.name == "slice":
            start, limit = params["start_indices"], params["limit_indices"]
            stride = 1 if params["strides"] is None else params["strides"][along]
            strides = params["strides"] or (1,) * len(size)
            rest = [a for a in range(len(size)) if a != along]
            if any((start[a], limit[a], strides[a]) != (0, size[a], 1) for a in rest):
                return None
            indices = range(start[along], limit[along], stride)
        else:
            sizes, first = params["slice_sizes"], concrete(args[1 + along])
            if first is None or any(sizes[a] != size[a] for a in range(len(size)) if a != along):
                return None
            at = min(max(int(first), 0), size[along] - sizes[along])
            indices = range(at, at + sizes[along])
        return self.stack([stack.layers[index] for index in indices], along)

    def squeezed(
        self, eqn: "JaxprEqn", value: Value, ops: list[Op], custom_depth: int, source: str, cached: bool
    ) -> list[Value]:
        """The only layer of a stack, without other axes of size 1 that are to go."""
        (layer,) = value.layers
        gone = tuple(a - (a > value.along) for a in eqn.params["dimensions"] if a != value.along)
        if not gone:
            return [layer]
        closed = jax.make_jaxpr(lambda x: jax.lax.squeeze(x, gone))(
            jax.ShapeDtypeStruct(layer.shape, layer.dtype)
        )
        return self.inline(closed.jaxpr, closed.consts, [layer], ops, custom_depth, source, cached)

    def reduced(
        self,
        eqn: "JaxprEqn",
        value: Value,
        inner: tuple[int, ...],
        ops: list[Op],
        custom_depth: int,
        source: str,
    ) -> list[Value]:
        """A reduction of layers and within them: first within, so that it does not tie the layers."""
        outer = tuple(
            axis - sum(each < axis for each in inner) for axis in eqn.params["axes"] if axis not in inner
        )

        def in_turn(array):
            within = eqn.primitive.bind(array, **{**eqn.params, "axes": inner})
            return eqn.primitive.bind(within, **{**eqn.params, "axes": outer})

        closed = jax.make_jaxpr(in_turn)(struct_of(value))
        return self.inline(closed.jaxpr, closed.consts, [value], ops, custom_depth, source, cached=True)

    def unroll(
        self, eqn: "JaxprEqn", args: list[Value], ops: list[Op], custom_depth: int, source: str, cached: bool
    ) -> list[Value]:
        """The outputs of a scan over layers, whose rounds are appended one after the other."""
        params, body = eqn.params, eqn.params["jaxpr"]
        consts, carried = scan_split(params)
        shared = args[:consts]
        carry = [self.dense(value, ops, source) for value in args[consts : consts + carried]]
        rows = [self.layers(value, 0, ops, source) for value in args[consts + carried :]]
        roll = Roll([], params["reverse"], params["unroll"], [], binder(eqn), args, [])
        rounds: dict[int, Round] = {}
        order = range(params["length"])
        for number in reversed(order) if roll.reverse else order:
            start = len(ops)
            taken = [self.copy(value, ops, source, carried=True) for value in carry]
            inputs = [*shared, *taken, *(row[number] for row in rows)]
            outputs = self.inline(body.jaxpr, body.consts, inputs, ops, custom_depth, source, cached)
            outputs = [self.dense(output, ops, source) for output in outputs]
            carry = outputs[:carried]
            made = [self.copy(value, ops, source) for value in outputs[carried:]]
            rounds[number] = Round(taken, carry, made)
            for op in ops[start:]:
                op.rolls = ((roll, number), *op.rolls)
        roll.rounds = [rounds[number] for number in order]
        for layers in zip(*(one.made for one in roll.rounds), strict=True):
            roll.outputs.append(self._with_parts(self.stack(layers, 0)))
        # All rounds carry the same slices, or they would be no loop.
        for one in roll.rounds:
            for first, value in zip(roll.rounds[0].taken, one.taken, strict=True):
                for a, b in zip(first.axes, value.axes, strict=True):
                    self.graph.same(a, b)
            for first, value in zip(roll.rounds[0].taken, one.given, strict=True):
                for a, b in zip(first.axes, value.axes, strict=True):
                    self.graph.same(a, b)
        roll.results = [*carry, *roll.outputs]
        return list(roll.results)

    def copy(self, value: Value, ops: list[Op], source: str, carried: bool = False) -> Value:
        """Another value that is the same; one that a loop carries into a round stands in `memo`."""
        copy = self.value(value)
        bind = _without_effects(lambda array: [array])
        memo = {"carried": True} if carried else {}
        ops.append(self.op("copy", {}, [value], [copy], bind=bind, source=source, memo=memo))
        return copy

    def regions(
        self,
        eqn: "JaxprEqn",
        like: Sequence[Value] | None,
        custom_depth: int,
        source: str,
        cached: bool,
    ) -> dict[str, Region]:
        """The bodies of an op, by name; with the layers of its inputs, if these are given."""
        params, name, at = eqn.params, eqn.primitive.name, (source, cached)
        if name == "scan":
            return {"body": self.open_region(params["jaxpr"], None, custom_depth, *at)}
        if name == "while":
            return {
                "condition": self.open_region(params["cond_jaxpr"], None, custom_depth, *at),
                "body": self.open_region(params["body_jaxpr"], None, custom_depth, *at),
            }
        if name == "cond":
            return {
                f"branch {n}": self.open_region(branch, None, custom_depth, *at)
                for n, branch in enumerate(params["branches"])
            }
        if name in (*_CHECKPOINTS, *_WRAPPERS):
            body = params["call"] if name == "custom_vmap_call" else params["jaxpr"]
            return {"body": self.open_region(close(body), like, custom_depth, *at)}
        if name == "shard_map":
            return {"body": self.open_region(close(params["jaxpr"]), None, custom_depth, *at)}
        if name == "custom_jvp_call":
            moving = None if like is None else [*like, *filter(is_differentiable, like)]
            return {
                "body": self.open_region(params["call_jaxpr"], like, custom_depth, *at),
                "jvp": self.open_region(self._derivative(eqn, _jvp_jaxpr), moving, custom_depth + 1, *at),
            }
        if name == "custom_vjp_call":
            body = self.open_region(params["call_jaxpr"], like, custom_depth, *at)
            moving = None if like is None else [*like, *filter(is_differentiable, body.outputs)]
            return {
                "body": body,
                "vjp": self.open_region(self._derivative(eqn, _vjp_jaxpr), moving, custom_depth + 1, *at),
            }
        return {}

    def _derivative(self, eqn: "JaxprEqn", derive: Callable[["JaxprEqn"], "ClosedJaxpr"]) -> "ClosedJaxpr":
        """The derivative of an equation; the rounds of a loop share one."""
        if id(eqn) not in self._derivatives:
            self._derivatives[id(eqn)] = eqn, derive(eqn)
        return self._derivatives[id(eqn)][1]


def _has_layers(value: Value, axis: int) -> bool:
    """Whether the slices of a value along an axis have nodes of their own."""
    if not value.layers:
        return False
    return value.along == axis or all(_has_layers(v, axis - (axis > value.along)) for v in value.layers)


def _stack_axes(value: Value) -> list[int]:
    """The axes of a value that count layers."""
    if not value.layers:
        return []
    return [value.along, *(axis + (axis >= value.along) for axis in _stack_axes(value.layers[0]))]


def _stack_of(layer: Value) -> Value:
    assert layer.part is not None
    return layer.part[0]


def _is_indexed(body: "Jaxpr", number: int) -> bool:
    """Whether a loop's body takes slices of an input at an index that changes."""
    var = body.invars[number]
    return any(
        eqn.primitive.name == "dynamic_slice" and eqn.invars[0] is var and 1 in eqn.params["slice_sizes"]
        for eqn in body.eqns
    )


def _layer(array: Any, axis: int, index: int) -> list[Any]:
    return [jax.lax.index_in_dim(array, index, axis, keepdims=False)]


def _one_layer(aval: Any, axis: int) -> jax.ShapeDtypeStruct:
    """The shape and sharding of a slice."""
    struct = struct_of(aval)
    shape = tuple(size for place, size in enumerate(struct.shape) if place != axis)
    if struct.sharding is None:
        return jax.ShapeDtypeStruct(shape, struct.dtype)
    spec = (name for place, name in enumerate(struct.sharding.spec) if place != axis)
    sharding = NamedSharding(struct.sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, struct.dtype, sharding=sharding)


def _without_effects(bind: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    bind.has_effects = False  # type: ignore[attr-defined]
    return bind


def _split_call(eqn: "JaxprEqn") -> tuple[Callable[..., list[Any]], list[Any], list[bool]]:
    """An equation as a function of its differentiable inputs; their avals, and which they are."""
    avals = [atom.aval for atom in eqn.invars]
    return binder(eqn), avals, [is_differentiable(aval) for aval in avals]


def _jvp_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """An equation and its derivative, by its own rule.

    It maps all inputs and the tangents of the differentiable ones to the outputs and the tangents
    of the differentiable outputs.
    """
    bind, avals, differentiable = _split_call(eqn)

    def jvp(*inputs):
        primals, tangents = inputs[: len(avals)], inputs[len(avals) :]
        moving = [p for p, d in zip(primals, differentiable, strict=True) if d]

        def of_moving(*moving):
            left = iter(moving)
            return bind(*(next(left) if d else p for p, d in zip(primals, differentiable, strict=True)))

        out, out_tangents = jax.jvp(of_moving, tuple(moving), tuple(tangents))
        return [*out, *(t for o, t in zip(out, out_tangents, strict=True) if is_differentiable(o))]

    return jax.make_jaxpr(jvp)(*map(struct_of, avals), *(struct_of(a) for a in avals if is_differentiable(a)))


def _vjp_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """The derivative of an equation backwards, by its own rule.

    It maps all inputs and the cotangents of the differentiable outputs to the cotangents of the
    differentiable inputs.
    """
    bind, avals, differentiable = _split_call(eqn)

    def vjp(*inputs):
        primals, cotangents = inputs[: len(avals)], inputs[len(avals) :]
        moving = [p for p, d in zip(primals, differentiable, strict=True) if d]

        def of_moving(*moving):
            left = iter(moving)
            out = bind(*(next(left) if d else p for p, d in zip(primals, differentiable, strict=True)))
            return [o for o in out if is_differentiable(o)]

        return jax.vjp(of_moving, *moving)[1](list(cotangents))

    outputs = [var.aval for var in eqn.outvars]
    return jax.make_jaxpr(vjp)(
        *map(struct_of, avals), *(struct_of(a) for a in outputs if is_differentiable(a))
    )


def prune_dead(region: Region, without: Collection[tuple[int, int]] = ()) -> Region:
    """A region without the ops whose outputs nobody reads: they would only ask for slices.

    What is read in one round of a loop over layers stays in all of them, so that they are alike, but for
    rounds that are to go: `without` has the id of their loop and their number.
    """
    read: set[int] = set()
    for output in region.outputs:
        read.update(map(id, with_layers(output)))
    place, count, needed = _places(region.ops), -1, set[Any]()
    ops: list[Op] = []
    while count != len(needed):
        count, ops = len(needed), []
        for op in reversed(region.ops):
            wanted = op.bind.has_effects or any(
                id(v) in read for output in op.outputs for v in with_layers(output)
            )  # type: ignore[attr-defined]
            going = bool(op.rolls) and (id(op.rolls[0][0]), op.rolls[0][1]) in without
            keys = () if going else place.get(id(op), ())
            if wanted or any(key in needed for key in keys):
                needed.update(keys)
                for value in op.inputs:
                    read.update(map(id, with_layers(value)))
                ops.append(op)
    return Region(region.inputs, region.outputs, ops[::-1])


def _places(ops: Sequence[Op]) -> dict[int, tuple[Any, ...]]:
    """Where an op stands in each loop over layers around it: the same place in all its rounds."""
    counts: dict[Any, int] = {}
    places: dict[int, tuple[Any, ...]] = {}
    for op in ops:
        keys = []
        for roll, number in op.rolls:
            counts[id(roll), number] = counts.get((id(roll), number), -1) + 1
            keys.append((id(roll), counts[id(roll), number]))
        if keys:
            places[id(op)] = tuple(keys)
    return places


def aligned(region: Region) -> list[Sequence[Value]]:
    """Values that are the same one in the rounds of a loop over layers."""
    places = _places(region.ops)
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


def _values_of(op: Op) -> list[Value]:
    """The values of an op and of its bodies, without their layers."""
    values = [*op.inputs, *op.outputs]
    for region in op.regions.values():
        values += [value for inner in region.ops for value in _values_of(inner)]
    return [value for value in values if not value.layers]
