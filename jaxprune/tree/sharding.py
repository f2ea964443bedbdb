"""Axes of sharded arrays, split into groups and joined again without moving data between devices.

That takes whole groups on every device. On explicit mesh axes shardings are part of types, and a reshape has
to say how its result is sharded; on automatic ones XLA finds out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.tree.leaves import is_concrete


def check_whole(path: str, leaf: Any, sides: Mapping[int, int], name: str) -> None:
    """Check that no group of neighbours lies on several devices, as far as that is known.

    It is known for arrays with values, and for traced ones on explicit mesh axes. On automatic ones a traced
    function knows no shardings, and XLA moves what it has to. `sides` says by axis how many neighbours along
    it are a group.
    """
    sharding = leaf.sharding if is_concrete(leaf) and isinstance(leaf, jax.Array) else _type(leaf)
    if not isinstance(sharding, NamedSharding):
        return
    for axis, side in sides.items():
        names = _names(sharding, axis)
        parts = math.prod(sharding.mesh.shape[axis_name] for axis_name in names)
        each = leaf.shape[axis] // parts
        if parts > 1 and (each * parts != leaf.shape[axis] or each % side):
            raise ValueError(
                f"{name} on params[{path!r}] of shape {tuple(leaf.shape)}: its axis {axis} is sharded over "
                f"{' and '.join(map(repr, names))} of the mesh, {each} entries on each of {parts} devices, "
                f"which {side} does not divide, so groups would lie on several devices. Shard another axis "
                "or in fewer parts, leave the leaf out with where=..., or choose another axis or group."
            )


def split(array: jax.Array, sides: Mapping[int, int]) -> jax.Array:
    """Split axes in two, which group and where within it: `(size // side, side)` for each axis in `sides`."""
    shape, spec = [], []
    for axis, (size, names) in enumerate(zip(array.shape, _spec(array), strict=True)):
        side = sides.get(axis)
        shape += [size] if side is None else [size // side, side]
        spec += [names] if side is None else [names, None]
    return _reshaped(array, shape, spec)


def join(array: jax.Array, within: tuple[int, ...]) -> jax.Array:
    """Join axes again, the inverse of `split`: each axis `within` a group with the axis before it."""
    shape, spec = [], []
    for axis, (size, names) in enumerate(zip(array.shape, _spec(array), strict=True)):
        if axis in within:
            shape[-1] *= size
        else:
            shape.append(size)
            spec.append(names)
    return _reshaped(array, shape, spec)


def everywhere(array: jax.Array) -> jax.Array:
    """Copy an array on explicit mesh axes to every device: a small one that all devices read."""
    if not any(_spec(array)):
        return array
    return jax.sharding.reshard(array, NamedSharding(_type(array).mesh, PartitionSpec()))


def whole_along(array: Any, axes: Sequence[int]) -> Any:
    """Undo the sharding of some axes, where mesh axes are explicit, so that they can be indexed."""
    spec = _spec(array)
    if not any(spec[axis] for axis in axes):
        return array
    left = [None if axis in axes else names for axis, names in enumerate(spec)]
    return jax.sharding.reshard(array, NamedSharding(_type(array).mesh, PartitionSpec(*left)))


def sharded_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Shard an array like another of its shape, where mesh axes are explicit."""
    spec = _spec(other)
    if not any(spec) or _spec(array) == spec:
        return array
    return jax.sharding.reshard(array, NamedSharding(_type(other).mesh, PartitionSpec(*spec)))


def _type(array: Any) -> Any:
    """Return the sharding that an array's type has: None except on explicit mesh axes."""
    return getattr(jax.typeof(array), "sharding", None)


def _names(sharding: NamedSharding, axis: int) -> tuple[Any, ...]:
    """Return the mesh axes that an axis is sharded over."""
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _spec(array: jax.Array) -> list[Any]:
    sharding = _type(array)
    if sharding is None:
        return [None] * array.ndim
    return [_names(sharding, axis) or None for axis in range(array.ndim)]


def _reshaped(array: jax.Array, shape: list[int], spec: list[Any]) -> jax.Array:
    if not any(spec):
        return array.reshape(shape)
    mesh: Any = _type(array).mesh
    return jnp.reshape(array, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))
