"""Dtypes: which leaves hold numbers, which can be 0, and what precision numbers are computed in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_numeric(leaf: Any) -> bool:
    """Return whether an array holds numbers: not typed PRNG keys, nor the float0 gradients of integers.

    No arithmetic is defined for those, so every function here leaves them alone.
    """
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended) and leaf.dtype != jax.dtypes.float0


WITHOUT_ZERO = jnp.float8_e8m0fnu
"""A dtype of scales, which are powers of 2 alone."""


def can_be_zero(leaf: Any) -> bool:
    """Return whether entries of an array can be 0: not PRNG keys, nor scales that are powers of 2 alone."""
    return leaf.dtype != WITHOUT_ZERO and is_numeric(leaf)


def is_narrow(dtype: Any, below: int = 32) -> bool:
    """Return whether a dtype is of floats in fewer bits."""
    return jnp.issubdtype(dtype, jnp.floating) and 8 * jnp.dtype(dtype).itemsize < below


def rounds_to_zero(dtype: Any, number: float = 1e-8) -> bool:
    """Return whether a small number, an optimizer's epsilon, is 0 in a dtype: in float16, and in 8 bits."""
    return is_narrow(dtype) and not np.any(np.asarray(number, dtype))


def common_dtype(*dtypes: Any) -> Any:
    """Return the dtype that holds numbers of several dtypes, also where implicit promotion is forbidden.

    JAX promotes floats of 8 bits to nothing by itself. bfloat16 holds all their numbers exactly.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jnp.bfloat16 if is_narrow(dtype, below=16) else dtype for dtype in dtypes))


def promote_to_float32(leaf: jax.Array) -> jax.Array:
    """Convert an array to float32, where products and sums of narrow floats neither vanish nor round to ties.

    float64 and complex leaves stay as they are.
    """
    wide = (jnp.float64, jnp.complex64, jnp.complex128)
    return leaf if leaf.dtype in wide else leaf.astype(jnp.float32)
