"""Slices cut out of one array and put back: what a `Plan` does to each leaf that mirrors a param.

A leaf may have axes of its own in front of the param's, `lead` of them (the history of an optimizer). Axes
are counted within the param. `keep[axis]` has the dense indices of the slices that stay: one row for all, or
for a stacked param one row for each layer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.engine import placing
from jaxprune.graph.engine.rules.slices import take_slices
from jaxprune.tracing.jaxprs import explicit_sharding
from jaxprune.tree.host import MAX_ENTRIES, like_computed, on_host


def cut(leaf: Any, lead: int, stack: Sequence[int], keep: Mapping[int, np.ndarray]) -> Any:
    """Return a leaf without the slices that a plan drops.

    `lead` counts its axes before those of the param, and `stack` names the axes of the param that count
    layers.
    """
    array = _readable(leaf) if keep else leaf
    # Axes that count layers first: the rows of the other axes are those of the layers that stay.
    for axis, rows in sorted(keep.items(), key=lambda item: item[1].ndim):
        array = _pick(array, lead, stack, axis, rows)
    return _returned(array, leaf)


def spread(
    leaf: Any,
    lead: int,
    stack: Sequence[int],
    keep: Mapping[int, np.ndarray],
    shape: Sequence[int],
    divisors: Sequence[int],
) -> Any:
    """Return the dense array of a shape whose `cut` is a leaf, with zeros (False) in the other places.

    Along the axes in `divisors` these are copies of the slices that stay, in turn; in a mask they are True.
    """
    dense = (*leaf.shape[:lead], *shape)
    array = _readable(leaf) if keep and math.prod(dense) <= MAX_ENTRIES else leaf
    # In the reverse order of `cut`; and divisors first, because zero is what was proved where a slice along
    # another axis went as well.
    for axis, rows in sorted(keep.items(), key=lambda item: (-item[1].ndim, item[0] not in divisors)):
        is_divisor, is_mask = axis in divisors, leaf.dtype == bool
        sources = _sources(rows, shape[axis], copies=is_divisor and not is_mask)
        array = _pick(array, lead, stack, axis, sources, filling=is_divisor and is_mask)
    return _returned(array, leaf)


def _readable(leaf: Any) -> Any:
    """Return a leaf as numpy reads it, where it should be cut there: see `on_host`."""
    return np.asarray(leaf) if on_host(leaf) else leaf


def _returned(array: Any, leaf: Any) -> Any:
    """Return what a leaf became as a JAX array; a leaf that was left alone as it is."""
    return like_computed(array, leaf) if isinstance(array, np.ndarray) and array is not leaf else array


def _sources(rows: np.ndarray, size: int, copies: bool) -> np.ndarray:
    """Return, for each dense slice of each row, which small slice stands there.

    Where a slice was dropped that is the slice after the last one, the filling; or with `copies` each of the
    small slices in its turn, because a network that divides by their spread (a variance) needs different
    ones.
    """
    count = rows.shape[-1]
    sources = np.full((*rows.shape[:-1], size), count)
    for layer in np.ndindex(*rows.shape[:-1]):
        sources[layer][rows[layer]] = np.arange(count)
        if copies:
            dropped = np.setdiff1d(np.arange(size), rows[layer])
            sources[layer][dropped] = np.arange(len(dropped)) % count
    return sources


def _pick(
    leaf: Any, lead: int, stack: Sequence[int], axis: int, rows: np.ndarray, filling: bool | None = None
) -> Any:
    """Return slices of a leaf along an axis, by one row of indices or by a row for each layer.

    With a `filling`, a slice of it follows the slices of the leaf. Where shardings are part of types
    (explicit mesh axes), the leaf is gathered first, as far as the indices need it, and sharded again as far
    as its new size allows.
    """
    at, flat = lead + axis, rows.reshape(-1, rows.shape[-1])
    alike = bool((flat == flat[0]).all())
    if isinstance(leaf, np.ndarray):
        if filling is not None:
            of_filling = (*leaf.shape[:at], 1, *leaf.shape[at + 1 :])
            leaf = np.concatenate([leaf, np.full(of_filling, filling, leaf.dtype)], at)
        if alike:
            return np.take(leaf, flat[0], at)
        return np.take_along_axis(leaf, _aligned(rows, leaf.ndim, lead, stack, axis), at)
    array = placing.gather(leaf, (at,) if alike else range(leaf.ndim))
    if filling is not None:
        array = jnp.concatenate([array, jnp.full_like(lax.slice_in_dim(array, 0, 1, axis=at), filling)], at)
    if alike:
        array = take_slices(array, at, flat[0])
    else:
        places = jnp.asarray(_aligned(rows, leaf.ndim, lead, stack, axis))
        array = jnp.take_along_axis(array, places, axis=at, mode="clip")
    sharding = explicit_sharding(leaf)
    if sharding is None:
        return array
    return placing.place(array, placing.small_sharding(sharding, leaf.shape, array.shape))


def _aligned(rows: np.ndarray, rank: int, lead: int, stack: Sequence[int], axis: int) -> np.ndarray:
    """Return rows of indices laid out as `take_along_axis` wants them: to broadcast with an array of a rank.

    The first axes of `rows` are those of `stack`, in its order, which need not be ascending; the last is
    `axis`.
    """
    along = [*stack, axis]
    shape = [1] * rank
    for n, place in enumerate(along):
        shape[lead + place] = rows.shape[n]
    return rows.transpose(np.argsort(along)).reshape(shape).astype(np.int32)
