"""Shardings of what is left, on meshes with explicit axes, where they are part of an array's type.

A value keeps the sharding that it had, but for an axis that lost slices and whose size the devices do
not divide any more: that one is replicated. What cuts or joins along an axis finds it replicated, and
its output is sharded again.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.graph.engine.rules.slices import take
from jaxprune.tracing.jaxprs import explicit_sharding, struct_of

# Ops that read an axis index by index, or sum over it: it may be sharded.
_BY_INDEX = frozenset(
    (
        *("dot_general", "transpose", "squeeze", "broadcast_in_dim", "reduce_sum", "optimization_barrier"),
        *("reshard", "sharding_constraint", "copy", "pvary"),
    )
)
# Ops that take slices at places that they know.
_WHOLE = frozenset(("per_reader", "gather", "slice", "split", "pad", "rev", "tile", "concatenate"))
_SHARDINGS = ("out_sharding", "sharding", "dst_sharding")


def small_sharding(sharding: NamedSharding, dense: Sequence[Any], small: Sequence[Any]) -> NamedSharding:
    """The sharding of an array that has lost slices."""
    spec = list(sharding.spec) + [None] * (len(dense) - len(sharding.spec))
    for axis, (size, left) in enumerate(zip(dense, small, strict=True)):
        if size != left and left % parts(sharding, spec[axis]):
            spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def parts(sharding: NamedSharding, names: Any) -> int:
    """How many parts an axis is in that is sharded over some axes of a mesh."""
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def place(array: Any, sharding: NamedSharding) -> Any:
    """An array with a sharding, if it has another."""
    have = struct_of(jax.typeof(array)).sharding
    rank = jnp.ndim(array)
    if have is not None and _whole(have.spec, rank) == _whole(sharding.spec, rank):
        return array
    return jax.sharding.reshard(array, sharding)


def _whole(spec: Any, rank: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (rank - len(spec)))


def gather(array: Any, axes: Collection[int]) -> Any:
    """An array that is not sharded along some axes."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return array
    spec = [None if axis in axes else name for axis, name in enumerate(sharding.spec)]
    return place(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def on_whole(array: Any, change: Callable[[Any], Any]) -> Any:
    """What a function makes of an array, which it is given replicated, sharded as the array was."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return change(array)
    changed = change(gather(array, range(array.ndim)))
    return place(changed, small_sharding(sharding, array.shape, changed.shape))


def spread(array: Any, axis: int, kept: np.ndarray, size: int, filling: Any) -> Any:
    """An array whose slices along an axis go to places of a longer one, sharded as before.

    Args:
      array: the array, sharded over explicit axes of a mesh.
      axis: the axis.
      kept: the places that its slices go to.
      size: the new size of the axis.
      filling: a number for all other places; None for copies of the slices, in turn.
    """
    sharding, before = explicit_sharding(array), array.shape
    array = gather(array, (axis,))
    gone = np.setdiff1d(np.arange(size), kept)
    source = np.zeros(size, np.int32)
    source[kept] = np.arange(len(kept))
    source[gone] = len(kept) if filling is not None else np.arange(len(gone)) % len(kept)
    if filling is not None:
        other = jnp.full_like(lax.slice_in_dim(array, 0, 1, axis=axis), filling)
        array = lax.concatenate([array, other], axis)
    array = take(array, axis, source)
    return array if sharding is None else place(array, small_sharding(sharding, before, array.shape))


def gathered(op: Op, args: Sequence[Any], cut: Sequence[Sequence[int]]) -> list[Any]:
    """The inputs of an op, replicated along what was cut unless the op can do without.

    Args:
      op: the op.
      args: its inputs.
      cut: for each, the axes that have lost slices.
    """
    if rule_for(op.name) is elementwise or op.name in _BY_INDEX or op.regions:
        return list(args)
    told = any(op.params.get(name) is not None for name in _SHARDINGS)
    every = told or op.name in _WHOLE
    axes = [range(len(v.shape)) if every else lost for v, lost in zip(op.inputs, cut, strict=True)]
    return [gather(array, among) for array, among in zip(args, axes, strict=True)]


def with_sharding(op: Op, output: NamedSharding | None) -> Op:
    """An op that is told how to shard its output, for a smaller one."""
    told = [name for name in _SHARDINGS if op.params.get(name) is not None]
    if not told:
        return op
    bind, changed = op.bind, dict.fromkeys(told, output)

    def bound(*args: Any) -> list[Any]:
        return bind(*args, **changed)

    return replace(op, params={**op.params, **changed}, bind=bound)


def is_explicit(values: Sequence[Value]) -> bool:
    """Whether one of some values is sharded over explicit axes."""
    return any(value.sharding is not None for value in values)
