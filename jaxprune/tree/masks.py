"""Masks: making, applying, combining and checking them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.tree import sharding
from jaxprune.tree.dtypes import can_be_zero, is_numeric
from jaxprune.tree.leaves import array_leaves, describe, is_array, is_concrete
from jaxprune.tree.mirrors import check_mirrors
from jaxprune.tree.paths import keyed_leaves, leaf_paths, path_of
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
    pruned get no gradient. A typed PRNG key among the leaves stays as it is.

    Args:
      params: a pytree of arrays.
      masks: bool masks like `params`, packed or not.

    Returns:
      A tree like `params`, of the same dtypes.

    Raises:
      ValueError: the trees or shapes differ, or a mask prunes a typed PRNG key.
      TypeError: a mask is not bool, or the arguments are swapped.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.apply_masks({"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.array([True, False])})["w"].tolist()
      [1.0, 0.0]
    """

    def applied(leaf, mask):
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype)) if is_numeric(leaf) else leaf

    return jax.tree.map(applied, params, like_params(masks, params))


def intersect(*masks: Masks) -> Masks:
    """Masks that keep what all the given masks keep; packed masks come out as bool ones.

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
    masks = tuple(map(bool_masks, masks))
    first = masks[0]
    alike = [like_params(other, first) for other in masks]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).all(0), *alike)


def like_params(masks: Masks, params: Params) -> Masks:
    """The masks as bool arrays, checked, in the params' own containers.

    Every function that takes masks passes them through here, so packed ones are welcome everywhere.
    Containers may differ where paths do not: a list for a tuple, a dict for a FrozenDict, or nnx
    variables of another kind.

    Raises:
      ValueError: the paths or a shape differ.
      TypeError: a mask is not bool, or these are the params and those the masks.
    """
    masks = unpack_masks(masks, params)
    check_not_swapped(masks, params)
    check_mirrors(masks, params, "masks")
    by_path, leaves = _bool_leaves(masks), array_leaves(params)
    for path, leaf in leaves.items():
        if not can_be_zero(leaf) and is_concrete(by_path[path]) and not np.asarray(by_path[path]).all():
            raise ValueError(
                f"masks[{path!r}] prunes entries of params[{path!r}], which is {describe(leaf)} and cannot "
                "be 0. Make that mask all True."
            )
    return jax.tree.unflatten(jax.tree.structure(params), [by_path[path] for path in leaves])


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

    Every function of jaxprune that takes masks takes packed ones as well.

    Args:
      masks: bool masks. A leaf that is packed already stays as it is.

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
    for path, mask in _bool_leaves(unpack_masks(masks)).items():
        if mask.ndim:
            sharding.check_whole(path, mask, {mask.ndim - 1: 8}, "pack_masks")
    return jax.tree.map(lambda mask: mask if _is_packed(mask) else _pack(mask), masks, is_leaf=_is_packed)


def _pack(mask: jax.Array) -> PackedMask:
    rows = jnp.atleast_1d(mask)
    last = rows.ndim - 1
    if rest := -rows.shape[last] % 8:
        rows = jnp.pad(rows, [(0, 0)] * last + [(0, rest)])
    eights = sharding.split(rows, {last: 8}).astype(jnp.uint8)
    place = lax.broadcasted_iota(jnp.uint8, (8,), 0)
    return PackedMask(jnp.sum(eights << place, axis=-1, dtype=jnp.uint8), mask.shape)


def unpack_masks(packed: Any, params: Params | None = None) -> Masks:
    """The bool masks of packed ones; what is not packed stays as it is.

    Under `jit` this fuses into what the masks are used for, which then reads one bit per entry.

    Args:
      packed: masks, packed, bool, or some of each; or any tree that holds such, an optimizer's state.
      params: the params. Only needed for packed masks that have lost their shapes: `nnx.Optimizer`
        takes the states of optimizers apart, and puts nodes that hold the bits alone in their place.

    Returns:
      The same tree with bool arrays in place of `PackedMask`s.

    Raises:
      ValueError: masks without their shapes, and no params.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> packed = jp.pack_masks({"w": jnp.array([True, False, True])})
      >>> jp.unpack_masks(packed)["w"].tolist()
      [True, False, True]
    """
    return jax.tree.map(
        lambda mask: _unpack(mask) if _is_packed(mask) else mask,
        restore_packed(packed, params),
        is_leaf=_is_packed,
    )


def _unpack(mask: PackedMask) -> Any:
    # The axes before the last are those of the bits, which may have more than the shape: under `vmap`.
    size = mask.shape[-1] if mask.shape else 1
    if isinstance(mask.bits, jax.ShapeDtypeStruct):
        lead = mask.bits.shape[:-1]
        return jax.ShapeDtypeStruct((*lead, size) if mask.shape else lead, bool)
    eights = mask.bits[..., None] >> lax.broadcasted_iota(jnp.uint8, (8,), 0)
    rows = sharding.join((eights & 1).astype(bool), (eights.ndim - 1,))
    rows = rows if rows.shape[-1] == size else lax.slice_in_dim(rows, 0, size, axis=-1)
    return rows if mask.shape else rows[..., 0]


def packed_like(masks: Any, like: Any) -> Any:
    """A tree with bool masks, packed where another tree of the same leaves has packed ones."""
    packed = [_is_packed(node) for node in jax.tree.leaves(like, is_leaf=_is_packed)]
    if not any(packed):
        return masks
    leaves, treedef = jax.tree.flatten(masks)
    return treedef.unflatten([_pack(x) if p else x for x, p in zip(leaves, packed, strict=True)])


def packed_where(masks: Masks, like: Masks) -> Masks:
    """The bool masks, packed at the paths where other masks are; containers may differ."""
    keyed = keyed_leaves(like, is_leaf=_is_packed_or_bare)
    packed = {path_of(keys) for keys, node in keyed if _is_packed_or_bare(node)}
    leaves = [_pack(x) if path in packed else x for path, x in array_leaves(masks, "masks").items()]
    return jax.tree.unflatten(jax.tree.structure(masks), leaves)


def restore_packed(tree: Any, params: Params | None) -> Any:
    """A tree whose packed masks have lost their shapes, with the shapes of the params again.

    flax's `nnx.state` puts a mapping with the key "bits" in place of a `PackedMask`. The shape is that
    of the param whose path is the longest ending of the mask's; other nodes stay as they are.

    Raises:
      ValueError: there are such masks, and no params.
    """
    if not any(map(_is_bare, jax.tree.leaves(tree, is_leaf=_is_packed_or_bare))):
        return tree
    keyed = keyed_leaves(tree, is_leaf=_is_packed_or_bare)
    if params is None:
        path = path_of(next(keys for keys, node in keyed if _is_bare(node)))
        raise ValueError(
            f"{path!r} is a packed mask that has lost its shape: nnx.Optimizer takes the states of "
            "optimizers apart. Pass jaxprune.unpack_masks(masks, params)."
        )
    shapes = {
        path: leaf.shape
        for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
        if is_array(leaf)
    }

    def restored(keys: tuple[Any, ...], node: Any) -> Any:
        if not _is_bare(node):
            return node
        path, bits = path_of(keys), node["bits"]
        parts = path.split("/")
        endings = ["/".join(parts[start:]) for start in range(len(parts) + 1)]
        shape = next((shapes[ending] for ending in endings if ending in shapes), None)
        if shape is None:
            return node
        expected = (*shape[:-1], -(-shape[-1] // 8)) if shape else (1,)
        return PackedMask(bits, tuple(shape)) if bits.shape[-len(expected) :] == expected else node

    treedef = jax.tree.structure(tree, is_leaf=_is_packed_or_bare)
    return treedef.unflatten([restored(keys, node) for keys, node in keyed])


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedMask)


def _is_bare(node: Any) -> bool:
    """Whether a node is what is left of a `PackedMask` in a state that was taken apart."""
    if not isinstance(node, Mapping) or list(node) != ["bits"]:
        return False
    return is_array(node["bits"]) and node["bits"].dtype == jnp.uint8


def _is_packed_or_bare(node: Any) -> bool:
    return _is_packed(node) or _is_bare(node)


def check_not_swapped(
    masks: Any, params: Any, call: str = "apply_masks(params, masks), or check_masks(masks, params)"
) -> None:
    """Checks that masks and params are not each in the place of the other.

    Args:
      masks: what should be masks.
      params: what should be params.
      call: how the function is called.

    Raises:
      TypeError: the params are masks, and the masks are not.
    """
    for name, tree in (("params", params), ("masks", masks)):
        if callable(tree) and jax.tree_util.all_leaves([tree]):
            raise TypeError(
                f"{name} must be a pytree of arrays, got {getattr(tree, '__name__', tree)!r}, a function. "
                "Check the order of the arguments."
            )

    def is_mask(leaf: Any) -> bool:
        return _is_packed(leaf) or (is_array(leaf) and leaf.dtype == jnp.bool_)

    def are_masks(tree: Any) -> bool:
        return all(map(is_mask, jax.tree.leaves(tree, is_leaf=_is_packed)))

    if not are_masks(masks) and jax.tree.leaves(params) and are_masks(params):
        raise TypeError(
            f"the params are bool and the masks are not: the two are swapped. The order is {call}."
        )


def check_masks(masks: Masks, params: Params) -> None:
    """Checks that masks mirror params: structure, shapes and bool dtype.

    Args:
      masks: bool masks, packed or not.
      params: the params.

    Raises:
      ValueError: the structure or a shape differs.
      TypeError: a leaf is not bool, or the arguments are swapped.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.check_masks({"w": jnp.ones(3, bool)}, {"w": jnp.ones(3)})
    """
    like_params(masks, params)


def bool_masks(masks: Masks) -> Masks:
    """The masks as bool arrays, where there are no params to compare them with.

    Raises:
      ValueError: an empty tree, or packed masks that have lost their shapes.
      TypeError: a mask is not bool.
    """
    masks = unpack_masks(masks)
    _bool_leaves(masks)
    return masks


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
    if not is_concrete(params, masks):
        raise TypeError(
            "check_pruned looks at values, which are traced inside jit, grad or vmap. Call it outside, on "
            "the params and masks that the train step returns."
        )
    kept = array_leaves(like_params(masks, params), "masks")
    for path, leaf in array_leaves(params).items():
        if not is_numeric(leaf):
            continue
        wrong = int(jnp.sum(~kept[path] & (leaf != 0)))
        if wrong:
            raise ValueError(
                f"params[{path!r}] has {wrong} pruned entries that are not 0. Apply jaxprune.apply_masks, "
                "and make wrap_optax or keep_masked the outermost optax transform."
            )
