"""Arrays that numpy computes with in place of XLA: small ones with values, where it can read them.

Called outside `jit`, each operation of JAX on arrays of a new shape is a program to compile, which takes some
30 ms, mostly longer than running it. On bools and integers, and where entries are only moved, numpy gives the
same bits without compiling. Sums of floats are left to XLA, because their last bits depend on the order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

MAX_ENTRIES = 2**25
"""The most entries of an array for which numpy is taken: it needs about 1 ns for each, so about as long as
compiling a program. Larger arrays are left to XLA, which uses all cores."""

_WITH_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float)


def on_host(*trees: Any) -> bool:
    """Return whether numpy should compute with all arrays of some trees, because it can read them in place.

    They have values, lie on one device, a CPU, and have at most `MAX_ENTRIES` entries each. Arrays on a mesh,
    on accelerators, or of other processes stay where they are.
    """
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, Tracer) or not isinstance(leaf, _WITH_VALUES) or np.size(leaf) > MAX_ENTRIES:
            return False
        if not isinstance(leaf, jax.Array):
            continue
        # numpy has no PRNG keys and no weak types. On a mesh, even of one device, shardings may be part of
        # types, which have to be those that JAX gives.
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or leaf.weak_type:
            return False
        if not isinstance(leaf.sharding, SingleDeviceSharding) or leaf.platform() != "cpu":
            return False
    return True


def like_computed(array: np.ndarray, *sources: Any) -> jax.Array:
    """Return what numpy computed from some arrays as a JAX array, on the device that JAX would have taken.

    That is the device that one of them is committed to, or else the default one.
    """
    return all_like_computed([array], *zip(sources))[0]


def all_like_computed(arrays: Sequence[np.ndarray], *columns: Sequence[Any]) -> list[jax.Array]:
    """Apply `like_computed` to several arrays; each column has a source for each of them."""
    places: list[Any] = [None] * len(arrays)
    for column in columns:
        for number, leaf in enumerate(column):
            if places[number] is None and isinstance(leaf, jax.Array) and leaf.committed:
                places[number] = leaf.sharding
    if places.count(None) < len(places):
        return list(map(jax.device_put, arrays, places))
    if jax.sharding.get_abstract_mesh().empty:
        return jax.device_put(list(arrays))
    # `jnp.asarray` compiles a program for each shape; but within `jax.set_mesh` it takes the mesh's devices.
    return list(map(jnp.asarray, arrays))


def compute(function: Callable[..., Any], *columns: Iterable[Any]) -> list[jax.Array]:
    """Return `function(a, b, ...)` for each a, b, ... of some columns of arrays, by numpy where it should.

    Args:
      function: takes arrays of numpy and of JAX.
      *columns: equally many arrays each.

    Example:
      >>> import operator
      >>> import jax.numpy as jnp
      >>> from jaxprune.tree.host import compute
      >>> [found.tolist() for found in compute(operator.invert, [jnp.array([True, False])])]
      [[False, True]]
    """
    rows = list(zip(*columns, strict=True))
    if on_host(rows):
        return all_like_computed([function(*map(np.asarray, row)) for row in rows], *zip(*rows, strict=True))
    return [function(*row) for row in rows]


def num_true(masks: Iterable[Any]) -> list[int]:
    """Return for each of some masks that have values how many entries are True."""
    masks = list(masks)
    if on_host(masks):
        return list(map(np.count_nonzero, masks))
    return [int(jnp.sum(mask)) for mask in masks]


def num_true_along(mask: Any, axes: Sequence[int]) -> np.ndarray:
    """Return how many entries of a mask that has values are True along some axes, which stay, with size 1."""
    if on_host(mask):
        return np.asarray(mask).sum(axis=tuple(axes), dtype=np.int64, keepdims=True)
    return np.asarray(jnp.sum(mask, axis=tuple(axes), dtype=jnp.int32, keepdims=True), np.int64)
