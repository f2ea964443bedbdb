"""Sort keys: scores as integers of the same order, which can be compared and cut into ranges exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def ordered_bits(scores: jax.Array) -> jax.Array:
    """Map scores to signed integers of the same order.

    Args:
      scores: floating-point or integer array of any shape. -0.0 and 0.0 are equal; NaN, of either
        sign, ranks above +inf.

    Returns:
      int32 for scores of up to 32 bits, else int64, of the same shape.

    Raises:
      TypeError: bool or complex scores.
    """
    dtype = scores.dtype
    if jnp.issubdtype(dtype, jnp.unsignedinteger) and dtype.itemsize >= 4:
        # Flipping the top bit is subtracting 2**31 (or 2**63): unsigned order becomes signed order.
        signed = jnp.int32 if dtype.itemsize == 4 else jnp.int64
        return lax.bitcast_convert_type(scores, signed) ^ jnp.array(jnp.iinfo(signed).min, signed)
    if jnp.issubdtype(dtype, jnp.integer):
        return scores if dtype.itemsize == 8 else scores.astype(jnp.int32)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"scores must be floating-point or integer, got {jnp.dtype(dtype).name}.")
    if dtype.itemsize == 1:
        return ordered_bits(scores.astype(jnp.float32))
    bits = lax.bitcast_convert_type(scores, {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[dtype.itemsize])
    # A float is a sign bit, an exponent and a fraction, from the top down. Without the sign its bits order
    # as an integer as its magnitude does: a larger exponent outweighs any fraction, infinity has the largest
    # exponent, and NaN that exponent with a fraction. So a positive float maps to the integer of its bits,
    # a negative one to minus that (which makes -0.0 equal to 0.0), and NaN to the largest integer. All this
    # is done on the bits, because arithmetic may flush subnormals to zero.
    top = jnp.iinfo(bits.dtype).max
    infinity = jnp.array(jnp.inf, dtype).view(bits.dtype)
    if dtype.itemsize == 2:
        bits = bits.astype(jnp.int32)
    magnitude = bits & top
    signed = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity.astype(bits.dtype), jnp.array(top, bits.dtype), signed)


def ordered_bits_on_host(scores: np.ndarray) -> np.ndarray:
    """Return what `ordered_bits` does of scores that numpy can read, by numpy."""
    dtype = scores.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        if dtype.kind == "u" and dtype.itemsize >= 4:
            signed = np.dtype(f"i{dtype.itemsize}")
            return scores.view(signed) ^ np.iinfo(signed).min
        return scores if dtype.itemsize == 8 else scores.astype(np.int32)
    if dtype.itemsize == 1:
        return ordered_bits_on_host(scores.astype(np.float32))
    bits = scores.view(f"i{dtype.itemsize}")
    top = np.iinfo(bits.dtype).max
    magnitude = bits & top
    keys = np.where(bits < 0, -magnitude, magnitude)
    keys[magnitude > np.asarray(np.inf, dtype).view(bits.dtype)] = top
    return keys


def limits(dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return a lowest and a highest key that hold all `ordered_bits` of scores of a dtype between them."""
    bits = jax.eval_shape(ordered_bits, jax.ShapeDtypeStruct((), dtype)).dtype
    # Keys of half precision have 16 bits in an int32, and take half as many passes.
    half = jnp.dtype(dtype).itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)
    info = jnp.iinfo(jnp.int16 if half else bits)
    return jnp.array(info.min, bits), jnp.array(info.max, bits)
