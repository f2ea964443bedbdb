"""Masks: making, applying, combining and checking them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import sharding
from jaxprune.paths import array_leaves, check_mirrors, describe, is_concrete, leaf_paths
from jaxprune.typing import Masks, Params


def ones_masks(params: Params) -> Masks:
    """Masks that prune nothing.

    Args:
      params: a pytree of arrays.

    Returns:
      A tree like `params` of bool arrays, all True, each with the sharding of its param (also
      under `jit`).

    Raises:
      ValueError: an empty tree.
      TypeError: a leaf that is not an array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.ones_masks({"bias": jnp.zeros(2)})["bias"].tolist()
      [True, True]
    """
    for path, leaf in array_leaves(params).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"params[{path!r}] is a ShapeDtypeStruct, which has no values; for the masks' shapes call "
                "jax.eval_shape(jaxprune.ones_masks, params)."
            )

    def ones(leaf):
        # Under jit a plain `ones` does not depend on the param, and so would not be sharded like it.
        leaf = jnp.asarray(leaf)
        return (leaf == leaf) | (leaf != leaf)

    return jax.tree.map(ones, params)


def apply_masks(params: Params, masks: Masks) -> Params:
    """The params with pruned entries exactly 0: `where(mask, p, 0)`.

    Unlike a product, this also removes NaN and inf, and never makes -0.0. Entries that are
    pruned get no gradient.

    Args:
      params: a pytree of arrays.
      masks: bool masks like `params`.

    Returns:
      A tree like `params`, of the same dtypes.

    Raises:
      ValueError: the trees or shapes differ.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.apply_masks({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})["w"].tolist()
      [1.0, 0.0]
    """
    return jax.tree.map(
        lambda p, m: jnp.where(m, p, jnp.zeros((), p.dtype)), params, like_params(masks, params)
    )


def intersect(*masks: Masks) -> Masks:
    """Masks that keep what all the given masks keep.

    Raises:
      ValueError: no masks, or masks of different structures or shapes.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> a, b = {"w": jnp.array([True, True, False])}, {"w": jnp.array([True, False, True])}
      >>> jp.intersect(a, b)["w"].tolist()
      [True, False, False]
    """
    if not masks:
        raise ValueError("intersect needs at least one tree of masks.")
    alike = [like_params(other, masks[0]) for other in masks]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).all(0), *alike)


def like_params(masks: Masks, params: Params) -> Masks:
    """The masks, checked, in the params' own containers.

    Containers may differ where paths do not: a list for a tuple, a dict for a FrozenDict, or nnx
    variables of another kind.

    Raises:
      ValueError: the paths or a shape differ.
      TypeError: a mask is not bool.
    """
    check_masks(masks, params)
    by_path = array_leaves(masks, "masks")
    return jax.tree.unflatten(jax.tree.structure(params), [by_path[path] for path in leaf_paths(params)])


def own_masks(masks: Masks, params: Params) -> Masks:
    """A copy of the masks for a state, checked, in the params' own containers.

    A train step may donate its state, and leaves the caller's masks alone. Made from the params, so
    that under `jit` each mask is sharded like its param.

    Raises:
      ValueError: the paths or a shape differ.
      TypeError: a mask is not bool.
    """
    return jax.tree.map(jnp.logical_and, like_params(masks, params), ones_masks(params))


class PackedMask(NamedTuple):
    """A mask of one bit per entry.

    Attributes:
      bits: uint8 array, eight entries of the last axis in each byte, the first in the lowest bit.
      shape: of the mask.
    """

    bits: jax.Array
    shape: tuple[int, ...]


# A named tuple, because flax serializes these without being told; but its shape is no leaf.
jax.tree_util.register_pytree_with_keys(
    PackedMask,
    lambda mask: (((jax.tree_util.GetAttrKey("bits"), mask.bits),), mask.shape),
    lambda shape, leaves: PackedMask(next(iter(leaves)), shape),
    lambda mask: ((mask.bits,), mask.shape),
)


def pack_masks(masks: Masks) -> Any:
    """The masks with one bit per entry, along each leaf's last axis: an eighth of the memory.

    Args:
      masks: bool masks.

    Returns:
      A tree with a `PackedMask` in place of each leaf, sharded as the leaf is. `wrap_optax` keeps
      such with `packed=True`.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the last axis is sharded (over explicit mesh axes, or in an array that has a value)
        in parts that 8 does not divide.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> packed = jp.pack_masks({"w": jnp.array([True, False, True, True])})
      >>> packed["w"].bits.tolist(), jp.unpack_masks(packed)["w"].tolist()
      ([13], [True, False, True, True])
    """
    for path, mask in _bool_leaves(masks).items():
        if mask.ndim:
            sharding.check_whole(path, mask, {mask.ndim - 1: 8}, "pack_masks")

    def pack(mask: jax.Array) -> PackedMask:
        rows = jnp.atleast_1d(mask)
        last = rows.ndim - 1
        if rest := -rows.shape[last] % 8:
            rows = jnp.pad(rows, [(0, 0)] * last + [(0, rest)])
        eights = sharding.split(rows, {last: 8}).astype(jnp.uint8)
        place = lax.broadcasted_iota(jnp.uint8, (8,), 0)
        return PackedMask(jnp.sum(eights << place, axis=-1, dtype=jnp.uint8), mask.shape)

    return jax.tree.map(pack, masks)


def unpack_masks(packed: Any) -> Masks:
    """The bool masks of packed ones; what is not packed stays as it is.

    Under `jit` this fuses into what the masks are used for, which then reads one bit per entry.
    """

    def unpack(mask: Any) -> Any:
        if not isinstance(mask, PackedMask):
            return mask
        eights = mask.bits[..., None] >> lax.broadcasted_iota(jnp.uint8, (8,), 0)
        rows = sharding.join((eights & 1).astype(bool), (eights.ndim - 1,))
        size = mask.shape[-1] if mask.shape else 1
        rows = rows if rows.shape[-1] == size else lax.slice_in_dim(rows, 0, size, axis=-1)
        return rows if mask.shape else rows[0]

    return jax.tree.map(unpack, packed, is_leaf=_is_packed)


def packed_like(masks: Masks, like: Any) -> Any:
    """The bool masks, packed if others are."""
    is_packed = any(map(_is_packed, jax.tree.leaves(like, is_leaf=_is_packed)))
    return pack_masks(masks) if is_packed else masks


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedMask)


def check_masks(masks: Masks, params: Params) -> None:
    """Checks that masks mirror params: structure, shapes and bool dtype.

    Raises:
      ValueError: the structure or a shape differs.
      TypeError: a leaf is not bool.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.check_masks({"w": jnp.ones(3, bool)}, {"w": jnp.ones(3)})
    """
    check_mirrors(masks, params, "masks")
    _bool_leaves(masks)


def _bool_leaves(masks: Masks) -> dict[str, Any]:
    """The masks by path. Raises TypeError for one that is not bool."""
    leaves = array_leaves(masks, "masks")
    for path, mask in leaves.items():
        if mask.dtype != jnp.bool_:
            raise TypeError(f"masks[{path!r}] is {describe(mask)}, but masks are bool. Pass mask != 0.")
    return leaves


def check_pruned(params: Params, masks: Masks) -> None:
    """Checks that every pruned entry is exactly 0; call it outside `jit`.

    Useful after training: an optax transform chained *after* `wrap_optax` or `keep_masked` can
    undo the zeros, and this finds it.

    Raises:
      ValueError: naming the first leaf with entries that are pruned and yet not 0.
      TypeError: params or masks without values: traced, or abstract.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.check_pruned({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])})
    """
    check_masks(masks, params)
    if not is_concrete(params, masks):
        raise TypeError(
            "check_pruned looks at values, which are traced inside jit, grad or vmap. Call it outside, on "
            "the params and masks that the train step returns."
        )
    kept = array_leaves(masks, "masks")
    for path, leaf in array_leaves(params).items():
        wrong = int(jnp.sum(~kept[path] & (leaf != 0)))
        if wrong:
            raise ValueError(
                f"params[{path!r}] has {wrong} pruned entries that are not 0. Apply jaxprune.apply_masks, "
                "and make wrap_optax or keep_masked the outermost optax transform."
            )
