"""Ops on stacks, applied to each layer separately, so that a stack does not tie its layers.

A scan over stacked params is unrolled: its rounds are appended one after the other, and `LayerLoop` records
that they were a loop. An op on a stack outside of a scan (a cast, a product under `vmap`) becomes one op for
each layer, if `peeling` knows what it does there. Those ops are lazy: replaying applies the op to all layers
at once where they keep the same number of slices, and layer by layer only where they do not.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from jaxprune.graph.engine.building import Site, has_layers, one_layer
from jaxprune.graph.engine.ir import LayerLoop, Round, Value, concrete
from jaxprune.graph.engine.peeling import Peeled, peel
from jaxprune.graph.engine.rules.calls import CHECKPOINTS
from jaxprune.graph.engine.rules.reductions import REDUCTIONS
from jaxprune.graph.engine.rules.wrappers import WRAPPERS
from jaxprune.tracing.jaxprs import binder, scan_split, struct_of

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import Jaxpr, JaxprEqn

    from jaxprune.graph.engine.tracing import Tracer


def apply_to_layers(tracer: "Tracer", eqn: "JaxprEqn", args: list[Value], site: Site) -> list[Value] | None:
    """Return the outputs of an op that reads stacks, if it can be done layer by layer; append its ops."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        consts, carried = scan_split(params)
        if any(has_layers(x, 0) for x in args[consts + carried :]) or any(
            value.layers and _is_indexed(params["jaxpr"].jaxpr, n) for n, value in enumerate(args[:consts])
        ):
            return _unroll(tracer, eqn, args, site)
        return None
    build = tracer.build
    if name in ("custom_jvp_call", "custom_vjp_call", *WRAPPERS, *CHECKPOINTS):
        regions = tracer.regions(eqn, args, site)
        outputs = [build.like(output) for output in regions["body"].outputs]
        site.ops.append(build.op_of(eqn, args, outputs, site, regions=regions))
        return outputs
    if name in ("slice", "dynamic_slice") and (taken := _some_layers(tracer, eqn, args)) is not None:
        return [taken]
    along = [value.along if value.layers else None for value in args]
    peeled = peel(name, params, [value.shape for value in args], along)
    if peeled is not None:
        inner = [one_layer(var.aval, peeled.out_axis) for var in eqn.outvars]
        return _apply_peeled(tracer, eqn, peeled, inner, args, site)
    stack = args[0]
    if name in REDUCTIONS and params.get("out_sharding") is None:
        within = tuple(axis for axis in params["axes"] if axis not in _stack_axes(stack))
        if within:
            return _reduce_within_first(tracer, eqn, stack, within, site)
    if name == "squeeze" and stack.shape[stack.along] == 1 and stack.along in params["dimensions"]:
        return _only_layer(tracer, eqn, stack, site)
    return None


def _apply_peeled(
    tracer: "Tracer",
    eqn: "JaxprEqn",
    peeled: Peeled,
    shapes: Sequence[jax.ShapeDtypeStruct],
    args: list[Value],
    site: Site,
) -> list[Value]:
    """Append an op for each layer, with outputs of given shapes, and return the stacks of what they make."""
    build, by_axis = tracer.build, list(zip(args, peeled.in_axes, strict=True))
    (length,) = {value.shape[axis] for value, axis in by_axis if axis is not None}
    rows = [
        [build.dense(value, site)] * length if axis is None else build.layers(value, axis, site)
        for value, axis in by_axis
    ]
    made = [
        _apply_in_one_layer(tracer, eqn, peeled, shapes, list(inputs), site)
        for inputs in zip(*rows, strict=True)
    ]
    stacks = [build.stack_with_parts(layers, peeled.out_axis) for layers in zip(*made, strict=True)]
    # This op is not appended, because those of the layers are; replaying applies it to all layers at once.
    operands = [
        value if axis is None or (value.layers and value.along == axis) else _stack_of(layers[0])
        for (value, axis), layers in zip(by_axis, rows, strict=True)
    ]
    build.op_of(eqn, operands, stacks, site)
    return stacks


def _apply_in_one_layer(
    tracer: "Tracer",
    eqn: "JaxprEqn",
    peeled: Peeled,
    shapes: Sequence[jax.ShapeDtypeStruct],
    inputs: list[Value],
    site: Site,
) -> list[Value]:
    """Append what a peeled op does in one layer, whose values may have layers themselves."""
    build = tracer.build
    eqn = eqn.replace(params=peeled.params)
    if any(value.layers for value in inputs):
        along = [value.along if value.layers else None for value in inputs]
        again = peel(eqn.primitive.name, eqn.params, [value.shape for value in inputs], along)
        if again is not None:
            inner = [one_layer(shape, again.out_axis) for shape in shapes]
            return _apply_peeled(tracer, eqn, again, inner, inputs, site)
        inputs = [build.dense(value, site) for value in inputs]
    outputs = [build.value(shape) for shape in shapes]
    site.ops.append(build.op_of(eqn, inputs, outputs, site, lazy=True))
    return outputs


def _some_layers(tracer: "Tracer", eqn: "JaxprEqn", args: list[Value]) -> Value | None:
    """Return the stack of those layers that a slice takes at known indices; None if it does anything else."""
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
    return tracer.build.stack([stack.layers[index] for index in indices], along)


def _only_layer(tracer: "Tracer", eqn: "JaxprEqn", stack: Value, site: Site) -> list[Value]:
    """Return the only layer of a stack, squeezed along the other axes of a squeeze."""
    (layer,) = stack.layers
    squeezed = tuple(a - (a > stack.along) for a in eqn.params["dimensions"] if a != stack.along)
    if not squeezed:
        return [layer]
    struct = jax.ShapeDtypeStruct(layer.shape, layer.dtype)
    closed = jax.make_jaxpr(lambda x: jax.lax.squeeze(x, squeezed))(struct)
    return tracer.inline(closed.jaxpr, closed.consts, [layer], site)


def _reduce_within_first(
    tracer: "Tracer", eqn: "JaxprEqn", stack: Value, within: tuple[int, ...], site: Site
) -> list[Value]:
    """Append a reduction over layers and axes within them as two: the first, within, ties no layers."""
    over_layers = tuple(
        axis - sum(each < axis for each in within) for axis in eqn.params["axes"] if axis not in within
    )

    def in_turn(array):
        reduced = eqn.primitive.bind(array, **{**eqn.params, "axes": within})
        return eqn.primitive.bind(reduced, **{**eqn.params, "axes": over_layers})

    closed = jax.make_jaxpr(in_turn)(struct_of(stack))
    return tracer.inline(closed.jaxpr, closed.consts, [stack], site._replace(cached=True))


def _unroll(tracer: "Tracer", eqn: "JaxprEqn", args: list[Value], site: Site) -> list[Value]:
    """Append the rounds of a scan over layers one after the other, and return its outputs."""
    build, params, body = tracer.build, eqn.params, eqn.params["jaxpr"]
    consts, carried = scan_split(params)
    shared = args[:consts]
    carry = [build.dense(value, site) for value in args[consts : consts + carried]]
    rows = [build.layers(value, 0, site) for value in args[consts + carried :]]
    loop = LayerLoop([], params["reverse"], params["unroll"], [], binder(eqn), args, [])
    rounds: dict[int, Round] = {}
    order = range(params["length"])
    for number in reversed(order) if loop.reverse else order:
        start = len(site.ops)
        carry_in = [build.copy(value, site, carried=True) for value in carry]
        inputs = [*shared, *carry_in, *(row[number] for row in rows)]
        outputs = tracer.inline(body.jaxpr, body.consts, inputs, site)
        outputs = [build.dense(output, site) for output in outputs]
        carry = outputs[:carried]
        slices_out = [build.copy(value, site) for value in outputs[carried:]]
        rounds[number] = Round(carry_in, carry, slices_out)
        for op in site.ops[start:]:
            op.rounds = ((loop, number), *op.rounds)
    loop.rounds = [rounds[number] for number in order]
    for layers in zip(*(one.slices_out for one in loop.rounds), strict=True):
        loop.stacks.append(build.stack_with_parts(layers, 0))
    # One loop can run all rounds only if they carry the same slices.
    for one in loop.rounds:
        for values in (one.carry_in, one.carry_out):
            for first, value in zip(loop.rounds[0].carry_in, values, strict=True):
                for a, b in zip(first.axes, value.axes, strict=True):
                    build.graph.same(a, b)
    loop.outputs = [*carry, *loop.stacks]
    return list(loop.outputs)


def _is_indexed(body: "Jaxpr", number: int) -> bool:
    """Whether a loop's body takes slices of an input at an index that changes."""
    var = body.invars[number]
    return any(
        eqn.primitive.name == "dynamic_slice" and eqn.invars[0] is var and 1 in eqn.params["slice_sizes"]
        for eqn in body.eqns
    )


def _stack_axes(value: Value) -> list[int]:
    """Return the axes of a value that count layers."""
    if not value.layers:
        return []
    return [value.along, *(axis + (axis >= value.along) for axis in _stack_axes(value.layers[0]))]


def _stack_of(layer: Value) -> Value:
    assert layer.part is not None
    return layer.part.stack
