"""Values as small integers and a codebook: pruning and quantization together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.tree.checks import as_integer, check_array, shown
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Params, Where

__all__ = ["Codebook", "Quantized", "as_int8", "dequantize", "quantize", "uniform"]

# Twice the smallest normal number: the bound on the error then also holds where numbers below the
# smallest normal one count as 0, as they do in XLA on most devices.
_SMALLEST = 2.0**-125


class Codebook(NamedTuple):
    """What codes stand for: the value of code i is `points[i] * scale`, or `i * scale` without points.

    A uniform grid has no points: its codes, from `-(2^(bits - 1) - 1)` to `2^(bits - 1) - 1`, are themselves
    the values in units of the scale. Points are for codes that are not evenly spaced, such as the means of
    clusters; they count from 0, and point 0 is 0, so that in either case code 0 is the value 0 and means that
    alone.

    Attributes:
      scale: float32, which broadcasts to the codes: one for each index of an axis, or a scalar.
      points: float32 of one axis, or None.
    """

    scale: jax.Array
    points: jax.Array | None = None


class Quantized(NamedTuple):
    """An array as integer codes, and the codebook that says what they stand for.

    Attributes:
      codes: int8, of the array's shape.
      codebook: a `Codebook`.
    """

    codes: jax.Array
    codebook: Codebook

    @property
    def values(self) -> jax.Array:
        """The codes, which of a uniform grid are the values in units of the scale."""
        return self.codes

    @property
    def scale(self) -> jax.Array:
        """The scale of the codebook."""
        return self.codebook.scale


def quantize(array: Any) -> Quantized:
    """Round an array to 8-bit integers, symmetrically, with a scale for each output channel.

    `scale = max|w| / 127` over all axes but the last, `values = round(w / scale)`, ties to even. So
    `|w - values * scale| <= scale / 2`, up to the rounding of float32 itself. Zero stays zero.

    Args:
      array: floating-point and finite. A value that is not finite spoils its whole channel: check first.

    Returns:
      A `Quantized` on a uniform grid, whose scale has one entry for each index of the last axis, or is a
      scalar for arrays of one axis or none.

    Raises:
      TypeError: an array that is not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> q = jp.quantization.quantize(jnp.array([[127.0, 0.5], [-3.4, 0.0]]))
      >>> q.values.tolist(), q.scale.shape
      ([[127, 127], [-3, 0]], (2,))
    """
    array = _as_float32(array, "quantize")
    return _on_uniform_grid(array, 8, -1 if array.ndim >= 2 else None)


def uniform(array: Any, bits: int = 8, axis: int | None = -1) -> Quantized:
    """Round an array to a uniform grid of `2^bits - 1` values, symmetrically about 0.

    With `most = 2^(bits - 1) - 1`, `scale = max|w| / most` and the codes are `round(w / scale)`, ties to
    even.

    Args:
      array: floating-point and finite.
      bits: 2 to 8.
      axis: each index of it has a scale of its own; None for one scale in all.

    Returns:
      A `Quantized`.

    Raises:
      TypeError: an array that is not floating-point, bits or an axis that is not an integer.
      ValueError: bits out of range, or an axis that the array does not have.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> q = jp.quantization.uniform(jnp.array([[3.0, 0.4], [-1.4, -6.0]]), bits=3, axis=0)
      >>> q.codes.tolist(), q.scale.tolist(), jp.quantization.dequantize(q).tolist()
      ([[3, 0], [-1, -3]], [[1.0], [2.0]], [[3.0, 0.0], [-2.0, -6.0]])
    """
    array = _as_float32(array, "uniform")
    bits = check_bits(bits)
    if axis is not None:
        axis = as_integer(axis, "axis")
        if not -array.ndim <= axis < array.ndim:
            raise ValueError(f"uniform got axis={axis} for an array of shape {array.shape}.")
    return _on_uniform_grid(array, bits, axis)


def check_bits(bits: Any) -> int:
    """Check how many bits a code has."""
    return as_integer(bits, "bits", at_least=2, below=9, what="2 to 8, of each code")


def highest_code(bits: int) -> int:
    """Return the highest code of a symmetric grid, `2^(bits - 1) - 1`; the lowest is minus that."""
    return 2 ** (bits - 1) - 1


def nearest_codes(array: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """Return the codes, as floats, of the nearest points of a uniform grid; ties go to the even code."""
    most = highest_code(bits)
    return jnp.clip(jnp.round(array / scale), -most, most)


def scale_for(largest: jax.Array, bits: int) -> jax.Array:
    """Return the scale of a grid that reaches from minus to plus the largest magnitude."""
    return jnp.maximum(largest / highest_code(bits), _SMALLEST)


def _as_float32(array: Any, name: str) -> jax.Array:
    check_array(array, f"what {name} takes")
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} takes floating-point arrays, got {array.dtype}.")
    return array.astype(jnp.float32)


def _on_uniform_grid(array: jax.Array, bits: int, axis: int | None) -> Quantized:
    axes = None if axis is None else tuple(a for a in range(array.ndim) if a != axis % array.ndim)
    largest = jnp.max(jnp.abs(array), axes, initial=0.0)
    if axis is not None and axis % array.ndim != array.ndim - 1:
        largest = jnp.expand_dims(largest, tuple(range(1, array.ndim - axis % array.ndim)))
    scale = scale_for(largest, bits)
    return Quantized(nearest_codes(array, scale, bits).astype(jnp.int8), Codebook(scale))


def dequantize(quantized: Quantized, dtype: Any = jnp.float32) -> jax.Array:
    """Return the array that a `Quantized` stands for.

    Args:
      quantized: what `quantize` or `uniform` returned, or codes with a codebook of your own.
      dtype: of the result; the rounding of bfloat16 and float16 comes on top of the bound of `quantize`.

    Raises:
      TypeError: not a `Quantized`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> q = jp.quantization.quantize(jnp.array([127.0, -3.4]))
      >>> jp.quantization.dequantize(q).tolist()
      [127.0, -3.0]
      >>> codebook = jp.quantization.Codebook(jnp.float32(2), points=jnp.array([0.0, -1.0, 1.5]))
      >>> q = jp.quantization.Quantized(jnp.array([2, 0, 1], jnp.int8), codebook)
      >>> jp.quantization.dequantize(q).tolist()
      [3.0, 0.0, -2.0]
    """
    if not isinstance(quantized, Quantized):
        raise TypeError(f"dequantize takes what quantize gave, got {shown(quantized)}.")
    codes, (scale, points) = quantized
    # The largest of all numbers, over 127 and times 127, may round to infinity.
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    in_units = codes.astype(jnp.float32) if points is None else points[codes.astype(jnp.int32)]
    return jnp.clip(in_units * scale, -largest, largest).astype(dtype)


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
