"""Arrays that numpy computes with in place of XLA: small ones with values, where it can read them.

Called outside `jit`, each operation of JAX on arrays of a new shape is a program to compile, which takes some
30 ms, mostly longer than running it. On bools and integers, and where entries are only moved, numpy gives the
same bits without compiling. Sums of floats are left to XLA, because their last bits depend on the order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxprune.tree.dtypes import is_numeric
from jaxprune.tree.leaves import is_concrete

MAX_ENTRIES = 2**25
"""The most entries of an array for which numpy is taken: it needs about 1 ns for each, so about as long as
compiling a program. Larger arrays are left to XLA, which uses all cores."""


def on_host(*trees: Any) -> bool:
    """Return whether numpy should compute with all arrays of some trees, because it can read them in place.

    They have values, lie on one device, a CPU, and have at most `MAX_ENTRIES` entries each. Arrays on a mesh,
    on accelerators, or of other processes stay where they are.
    """
    leaves = jax.tree.leaves(trees)
    return is_concrete(leaves) and all(map(_is_readable, leaves))


def _is_readable(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return np.size(leaf) <= MAX_ENTRIES
    if leaf.size > MAX_ENTRIES or not is_numeric(leaf) or leaf.weak_type:  # numpy has no keys, nor weak types
        return False
    # On a mesh, even of one device, shardings may be part of types, which have to be those that JAX gives.
    if not isinstance(leaf.sharding, SingleDeviceSharding):
        return False
    (device,) = leaf.devices()
    return device.platform == "cpu"


def like_computed(array: np.ndarray, *sources: Any) -> jax.Array:
    """Return what numpy computed from some arrays as a JAX array, on the device that JAX would have taken.

    That is the device that one of them is committed to, or else the default one.
    """
    for source in sources:
        if isinstance(source, jax.Array) and source.committed:
            return jax.device_put(array, source.sharding)
    # `jnp.asarray` compiles a program for each shape; but within `jax.set_mesh` it takes the mesh's devices.
    return jax.device_put(array) if jax.sharding.get_abstract_mesh().empty else jnp.asarray(array)


def compute(function: Callable[..., Any], *arrays: Any) -> jax.Array:
    """Return `function(*arrays)` as a JAX array, by numpy where it should; the function takes arrays of both.

    Example:
      >>> import operator
      >>> import jax.numpy as jnp
      >>> from jaxprune.tree.host import compute
      >>> compute(operator.invert, jnp.array([True, False])).tolist()
      [False, True]
    """
    if on_host(arrays):
        return like_computed(function(*map(np.asarray, arrays)), *arrays)
    return function(*arrays)


def num_true(mask: Any) -> int:
    """Return how many entries of a mask that has values are True."""
    return int(np.count_nonzero(mask)) if on_host(mask) else int(jnp.sum(mask))
