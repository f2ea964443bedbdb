"""Shardings of small arrays, on meshes with explicit axes, where they are part of an array's type.

A value keeps its sharding, except along an axis that lost slices and whose size the devices no longer
divide: that axis is replicated. An op that cuts or joins along an axis is given it replicated, and its
output is sharded again.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.graph.engine.ir import Op
from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.tracing.jaxprs import explicit_sharding, struct_of

# Ops that read an axis index by index, or sum over it: it may be sharded.
_BY_INDEX = frozenset(
    (
        *("dot_general", "transpose", "squeeze", "broadcast_in_dim", "reduce_sum", "optimization_barrier"),
        *("reshard", "sharding_constraint", "copy", "pvary"),
    )
)
# Ops that take slices at known positions: their inputs are replicated along all axes.
_TAKE_SLICES = frozenset(("per_reader", "gather", "slice", "split", "pad", "rev", "tile", "concatenate"))
_SHARDINGS = ("out_sharding", "sharding", "dst_sharding")


def small_sharding(sharding: NamedSharding, dense: Sequence[Any], small: Sequence[Any]) -> NamedSharding:
    """Return the sharding of an array that has lost slices, from its dense sharding and both shapes."""
    spec = list(sharding.spec) + [None] * (len(dense) - len(sharding.spec))
    for axis, (size, left) in enumerate(zip(dense, small, strict=True)):
        if size != left and left % parts(sharding, spec[axis]):
            spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def parts(sharding: NamedSharding, names: Any) -> int:
    """Return the number of parts of an axis that is sharded over some axes of a mesh."""
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def place(array: Any, sharding: NamedSharding) -> Any:
    """Return an array with a sharding, resharded only if it has a different one."""
    have = struct_of(jax.typeof(array)).sharding
    rank = jnp.ndim(array)
    if have is not None and _of_all_axes(have.spec, rank) == _of_all_axes(sharding.spec, rank):
        return array
    return jax.sharding.reshard(array, sharding)


def _of_all_axes(spec: Any, rank: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (rank - len(spec)))


def gather(array: Any, axes: Collection[int]) -> Any:
    """Return an array replicated along some axes."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return array
    spec = [None if axis in axes else name for axis, name in enumerate(sharding.spec)]
    return place(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def gathered(op: Op, args: Sequence[Any], cut: Sequence[Sequence[int]]) -> list[Any]:
    """Return an op's inputs, replicated along the axes that were `cut` unless the op allows otherwise."""
    if rule_for(op.name) is elementwise or op.name in _BY_INDEX or op.regions:
        return list(args)
    names_sharding = any(op.params.get(name) is not None for name in _SHARDINGS)
    every = names_sharding or op.name in _TAKE_SLICES
    axes = [range(len(v.shape)) if every else lost for v, lost in zip(op.inputs, cut, strict=True)]
    return [gather(array, among) for array, among in zip(args, axes, strict=True)]


def with_sharding(op: Op, output: NamedSharding | None) -> Op:
    """Return an op whose parameters name the sharding of its output, with that of the smaller output."""
    names = [name for name in _SHARDINGS if op.params.get(name) is not None]
    if not names:
        return op
    bind, changed = op.bind, dict.fromkeys(names, output)

    def bound(*args: Any) -> list[Any]:
        return bind(*args, **changed)

    return replace(op, params={**op.params, **changed}, bind=bound)
