"""A slice that stands for all slices that are alike along an axis, where these were dropped.

It is computed as the value was, from representatives of what that was computed from, back to zeros, to
arrays with one fill, and to arrays that were spread along the axis. The facts say `alike` only along ops that
are handled here.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

from jaxprune.graph.engine import placing
from jaxprune.graph.engine.ir import Value, other_axes
from jaxprune.graph.engine.rules import elementwise, per_reader, rule_for

if TYPE_CHECKING:
    from jaxprune.graph.engine.replay import Replay


def representative(replay: "Replay", value: Value, axis: int) -> Any:
    """Return one of the slices of a value that are alike along an axis, which then has size 1."""
    known = replay.facts.of(value)
    alike = known.alike[axis]
    if known.fill is not None or (alike is not None and alike.all()):
        array = placing.gather(jnp.asarray(replay.read(value)), (axis,))
        return lax.slice_in_dim(array, 0, 1, axis=axis)
    op = value.op
    if alike is None or op is None:
        shape = list(replay.shape(value))
        shape[axis] = 1
        return jnp.zeros(shape, value.dtype)
    if op.name == per_reader.NAME:
        inner = representative(replay, op.inputs[0], axis)
        return per_reader.part_read(op, inner, replay, except_axis=axis)
    if op.name == "transpose":
        inner = representative(replay, op.inputs[0], op.params["permutation"][axis])
        return lax.transpose(inner, op.params["permutation"])
    if op.name == "broadcast_in_dim":
        places = op.params["broadcast_dimensions"]
        shape = list(replay.shape(value))
        shape[axis] = 1
        inner = representative(replay, op.inputs[0], places.index(axis))
        return lax.broadcast_in_dim(inner, shape, places)
    if op.name == "squeeze":
        inner = representative(replay, op.inputs[0], other_axes(op.inputs[0], op.params["dimensions"])[axis])
        return lax.squeeze(inner, op.params["dimensions"])
    if rule_for(op.name) is not elementwise:
        raise NotImplementedError(f"{op} says that slices are alike, but not how one is made.")
    rank = len(value.shape)
    inputs = [
        representative(replay, v, axis) if len(v.shape) == rank and v.shape[axis] != 1 else replay.read(v)
        for v in op.inputs
    ]
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in inputs))
    inputs = [i if not jnp.ndim(i) else jnp.broadcast_to(i, shape) for i in inputs]
    (output,) = op.bind(*inputs)
    return output
