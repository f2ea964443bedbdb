"""Masks: making, applying, combining and checking them."""

import jax
import jax.numpy as jnp

from jaxprune.paths import array_leaves, check_mirrors, describe, leaf_paths
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
    array_leaves(params)

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
    for path, mask in array_leaves(masks, "masks").items():
        if mask.dtype != jnp.bool_:
            raise TypeError(f"masks[{path!r}] is {describe(mask)}, but masks are bool. Pass mask != 0.")


def check_pruned(params: Params, masks: Masks) -> None:
    """Checks that every pruned entry is exactly 0; call it outside `jit`.

    Useful after training: an optax transform chained *after* `wrap_optax` or `keep_masked` can
    undo the zeros, and this finds it.

    Raises:
      ValueError: naming the first leaf with entries that are pruned and yet not 0.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.check_pruned({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])})
    """
    check_masks(masks, params)
    kept = array_leaves(masks, "masks")
    for path, leaf in array_leaves(params).items():
        wrong = int(jnp.sum(~kept[path] & (leaf != 0)))
        if wrong:
            raise ValueError(
                f"params[{path!r}] has {wrong} pruned entries that are not 0. Apply jaxprune.apply_masks, "
                "and make wrap_optax or keep_masked the outermost optax transform."
            )
