"""Values as 8-bit integers: pruning and quantization together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.tree.checks import check_array, shown
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Params, Where

__all__ = ["Quantized", "as_int8", "dequantize", "quantize"]

# Twice the smallest normal number: the bound on the error then also holds where numbers below the
# smallest normal one count as 0, as they do in XLA on most devices.
_SMALLEST = 2.0**-125


class Quantized(NamedTuple):
    """An array as 8-bit integers and their scales.

    Attributes:
      values: int8, of the array's shape, from -127 to 127.
      scale: float32; one for each index of the last axis, or a scalar for arrays of one axis or none.
    """

    values: jax.Array
    scale: jax.Array


def quantize(array: Any) -> Quantized:
    """Round an array to 8-bit integers, symmetrically, with a scale for each output channel.

    `scale = max|w| / 127` over all axes but the last, `values = round(w / scale)`, ties to even. So
    `|w - values * scale| <= scale / 2`, up to the rounding of float32 itself. Zero stays zero.

    Args:
      array: floating-point and finite. A value that is not finite spoils its whole channel: check first.

    Raises:
      TypeError: an array that is not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> q = jp.quantization.quantize(jnp.array([[127.0, 0.5], [-3.4, 0.0]]))
      >>> q.values.tolist(), q.scale.shape
      ([[127, 127], [-3, 0]], (2,))
    """
    check_array(array, "what quantize takes")
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"quantize takes floating-point arrays, got {array.dtype}.")
    array = array.astype(jnp.float32)
    axes = tuple(range(array.ndim - 1)) if array.ndim >= 2 else None
    scale = jnp.maximum(jnp.max(jnp.abs(array), axes, initial=0.0) / 127, _SMALLEST)
    return Quantized(jnp.clip(jnp.round(array / scale), -127, 127).astype(jnp.int8), scale)


def dequantize(quantized: Quantized, dtype: Any = jnp.float32) -> jax.Array:
    """Return the array that a `Quantized` stands for, `values * scale`.

    Args:
      quantized: what `quantize` returned.
      dtype: of the result; the rounding of bfloat16 and float16 comes on top of the bound of `quantize`.

    Raises:
      TypeError: not a `Quantized`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> q = jp.quantization.quantize(jnp.array([127.0, -3.4]))
      >>> jp.quantization.dequantize(q).tolist()
      [127.0, -3.0]
    """
    if not isinstance(quantized, Quantized):
        raise TypeError(f"dequantize takes what quantize gave, got {shown(quantized)}.")
    # The largest of all numbers, over 127 and times 127, may round to infinity.
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    product = quantized.values.astype(jnp.float32) * quantized.scale
    return jnp.clip(product, -largest, largest).astype(dtype)


def as_int8(params: Params, where: Where = kernels) -> Params:
    """Return the params as they would come back from a file of 8-bit integers, to evaluate before saving.

    Args:
      params: a pytree of arrays; of a masked network the masked params, since otherwise pruned entries
        take part in `max|w|`.
      where: which leaves are quantized.

    Returns:
      A tree like `params`, of the same dtypes.

    Raises:
      ValueError: a `where` that matches nothing.
      TypeError: a leaf that is not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[127.0, 1.0], [-3.4, 0.0]]), "bias": jnp.array([0.123, 4.0])}
      >>> as_int8 = jp.quantization.as_int8(params)
      >>> as_int8["kernel"].tolist(), bool(as_int8["bias"][0] == params["bias"][0])
      ([[127.0, 1.0], [-3.0, 0.0]], True)
    """
    chosen = set(selected(params, where))
    leaves = [
        dequantize(quantize(leaf), leaf.dtype) if path in chosen else leaf
        for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
