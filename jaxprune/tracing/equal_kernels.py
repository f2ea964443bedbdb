"""Equal programs for leaves of one shape, so that XLA compiles them once.

XLA compiles a program as many small kernels, about one for each array that a step of the program makes, and
most of its time goes there. It compiles kernels that are equal only once. Leaves of one shape and dtype are
worked on by equal kernels, unless something in them tells the leaves apart. Mostly that is the number of the
leaf, which finds its value in an array that has one for each leaf: the 3 of `keys[3]` is part of the kernel.

`pick` reads such a value by an index that is an input of the kernel.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax


def pick(values: Any, number: int | jax.Array) -> Any:
    """Return `values[..., number]`, for each array of a pytree, so that equal programs around it stay equal.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.tracing.equal_kernels import pick
      >>> pick(jnp.array([[1, 2, 3], [4, 5, 6]]), 1).tolist()
      [2, 5]
    """
    # XLA makes a constant part of the kernels that read it if it is a scalar, or if it can compute in advance
    # what they use of it. It does neither with an array of two behind a barrier.
    index: Any = number
    if isinstance(number, int):
        index = lax.optimization_barrier(np.array([number, 0], np.int32))[0]

    options: Any = {"axis": -1, "keepdims": False, "allow_negative_indices": False}
    return jax.tree.map(partial(lax.dynamic_index_in_dim, index=index, **options), values)
