"""Exact selection: the k lowest of many scores, without sorting or concatenating them.

Everything here ranks by the pair (score, position): equal scores are ordered by leaf, then by
row-major index within the leaf, and the earlier goes first. So the number removed is always the
number asked for, and removing k, then more, removes a superset.

A float is mapped to an unsigned integer with the same order. The k-th lowest is then found one
bit at a time, from the top: each bit costs one pass that counts the keys below a candidate. The
passes are elementwise and a sum, so they fuse, vectorise and shard, and counts are integers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.control import update_if

_MAX_TOTAL = 2**31 - 1


def removed_count(sparsity: float, size: int) -> int:
    """How many of `size` units a sparsity removes: `round_half_even(sparsity * size)`.

    The product is taken in double precision, as `torch.nn.utils.prune` and Python's `round` do.

    Example:
      >>> from jaxprune.selection import removed_count
      >>> removed_count(0.5, 5), removed_count(0.1, 45), removed_count(0.9, 266_200)
      (2, 4, 239580)
    """
    return round(float(sparsity) * size)


def ordered_bits(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the scores.

    Args:
      scores: floating-point or integer array of any shape. -0.0 and 0.0 are equal; NaN, of either
        sign, ranks above +inf.

    Returns:
      uint32 for scores of up to 32 bits, else uint64, of the same shape.

    Raises:
      TypeError: bool or complex scores.
    """
    dtype = scores.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"scores must be floating-point or integer, got {jnp.dtype(dtype).name}.")
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return scores if dtype.itemsize == 8 else scores.astype(jnp.uint32)
    wide = dtype.itemsize == 8
    unsigned = jnp.uint64 if wide else jnp.uint32
    sign = jnp.array(1 << (63 if wide else 31), unsigned)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        signed = scores if wide else scores.astype(jnp.int32)
        return lax.bitcast_convert_type(signed, unsigned) ^ sign
    bits = lax.bitcast_convert_type(scores if wide else scores.astype(jnp.float32), unsigned)
    # Negative floats order backwards, so all their bits flip; positive ones move above them.
    # -0.0 (the sign bit alone) is made 0.0 first. This is done on the bits, not by arithmetic,
    # which may flush subnormals to zero.
    bits = jnp.where(bits == sign, jnp.zeros_like(bits), bits)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(scores), jnp.array(~jnp.zeros((), unsigned)), ordered)


@jax.jit
def lowest(
    scores: Sequence[jax.Array], alive: Sequence[jax.Array], count: jax.Array | int
) -> list[jax.Array]:
    """The `count` lowest scores among those alive, over all arrays together.

    Args:
      scores: arrays of any shapes, of one common dtype.
      alive: bool arrays of the same shapes: which entries may be chosen.
      count: how many, an integer (it may be traced); at most the number alive.

    Returns:
      bool arrays of the same shapes with exactly `count` entries True. Of equal scores the
      earlier array, then the lower row-major index, is chosen first.

    Raises:
      ValueError: more than 2**31 - 1 entries in total.
    """
    if sum(array.size for array in scores) > _MAX_TOTAL:
        raise ValueError(f"cannot rank more than {_MAX_TOTAL} entries together; use scope='layerwise'.")
    count = jnp.asarray(count, jnp.int32)
    keys = [ordered_bits(array) for array in scores]

    def below(bound):
        return sum(count_true(a & (key < bound)) for key, a in zip(keys, alive, strict=True))

    threshold = _largest_with_fewer_below(below, count, keys[0].dtype)
    chosen = [a & (key < threshold) for key, a in zip(keys, alive, strict=True)]
    ties = [a & (key == threshold) for key, a in zip(keys, alive, strict=True)]

    # The ties fill what is left of `count`, the first leaf first.
    left = count - sum(map(count_true, chosen))
    result = []
    for strictly_below, tied in zip(chosen, ties, strict=True):
        available = count_true(tied)
        taken = jnp.clip(left, 0, available)
        left = left - taken
        # Mostly one entry ties, with itself, and all are taken or none.
        some = update_if((taken > 0) & (taken < available), partial(_first, count=taken), tied & (taken > 0))
        result.append(strictly_below | some)
    return result


@partial(jax.jit, static_argnames="floor")
def removable(scores: jax.Array, alive: jax.Array, floor: int) -> jax.Array:
    """The entries that may go if the `floor` highest must stay.

    Args:
      scores: array of any shape.
      alive: bool array of the same shape: which entries are still there.
      floor: how many of those alive must stay.

    Returns:
      bool array: `alive` without its `floor` highest entries.
    """
    if floor == 0:
        return alive
    return lowest([scores], [alive], jnp.maximum(count_true(alive) - floor, 0))[0]


def count_true(mask: jax.Array) -> jax.Array:
    """How many entries of a mask are True, an int32 scalar."""
    return jnp.sum(mask, dtype=jnp.int32)


def _first(mask: jax.Array, count: jax.Array) -> jax.Array:
    """The first `count` True entries of a mask in row-major order."""
    index = lax.iota(jnp.uint32, mask.size).reshape(mask.shape)
    bound = _largest_with_fewer_below(lambda bound: count_true(mask & (index < bound)), count, jnp.uint32)
    return mask & (index <= bound)


def _largest_with_fewer_below(
    below: Callable[[jax.Array], Any], count: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """The largest key with fewer than `count` keys below it: the `count`-th lowest, from 1.

    Args:
      below: how many keys are below a bound; it must not decrease with the bound.
      count: int32 scalar. For 0 the result is 0, which has no key below it.
      dtype: the keys' unsigned integer type.

    Returns:
      A scalar key.
    """
    bits = jnp.iinfo(dtype).bits

    def set_bit(i, key):
        candidate = key | (jnp.ones((), dtype) << jnp.asarray(bits - 1 - i, dtype))
        return jnp.where(below(candidate) < count, candidate, key)

    # No key is below 0; in a shard_map this 0 varies over the mesh axes that the counts vary over.
    zero = jnp.zeros((), dtype)
    return lax.fori_loop(0, bits, set_bit, jnp.asarray(below(zero) - 0 * count).astype(dtype))
