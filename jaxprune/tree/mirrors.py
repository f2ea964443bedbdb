"""Trees that mirror the params: checked leaf by leaf, or found inside a larger tree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.tree.leaves import Leaves, array_leaves, check_arrays, flatten, is_array
from jaxprune.tree.paths import keyed_leaves, path_of
from jaxprune.typing import Params, Where


def check_mirrors(tree: Any, params: Params, what: str) -> None:
    """Check that a tree has the structure and the leaf shapes of `params`; raise as `mirrored`."""
    mirrored(tree, flatten(params), what)


def mirrored(tree: Any, params: Leaves, what: str) -> dict[str, Any]:
    """Return the leaves of a tree by path, in the order of the params that it mirrors.

    Containers may differ where paths do not: a list for a tuple, a dict for a FrozenDict.
    """
    expected = params.by_path
    leaves, treedef = jax.tree.flatten(tree)
    if treedef == params.treedef:
        got = dict(zip(expected, leaves, strict=True))
        check_arrays(got, what)
    else:
        got = array_leaves(tree, what)
    if expected.keys() != got.keys():
        missing = ", ".join(sorted(expected.keys() - got.keys())) or "none"
        extra = ", ".join(sorted(got.keys() - expected.keys())) or "none"
        raise ValueError(
            f"{what} must have the tree structure of params. Missing: {missing}. Not in params: {extra}."
        )
    for path, leaf in expected.items():
        if got[path].shape != leaf.shape:
            raise ValueError(
                f"{what}[{path!r}] has shape {tuple(got[path].shape)}, but params[{path!r}] has "
                f"shape {tuple(leaf.shape)}; they must be equal."
            )
    return {path: got[path] for path in expected}


def match_leaves_to_params(tree: Any, params: Params, where: Where | None = None) -> list[int | None]:
    """Find the param that each leaf of a tree, an optimizer's state say, mirrors.

    A leaf mirrors a param if its path *ends* with the param's path, and it has a floating-point or
    complex dtype and the param's shape, perhaps after further axes: Adam's moments, a gradient
    accumulator, the second iterate of schedule-free, L-BFGS's memory of the last updates. So does
    a bool leaf of that shape, a mask. The longest ending wins. Leaves that `where(path, leaf)` leaves out
    mirror no param. Nor does the state of GaLore: its projections have their params' shapes where their rank
    is full, but lie in another basis.

    Returns:
      For each leaf of `tree`, the index of its param among `jax.tree.leaves(params)`, or None.
    """
    by_names = {_names(keys): index for index, (keys, _) in enumerate(keyed_leaves(params))}
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]

    def match(keys: tuple[Any, ...], leaf: Any) -> int | None:
        if not is_array(leaf) or not (jnp.issubdtype(leaf.dtype, jnp.inexact) or leaf.dtype == jnp.bool_):
            return None
        if where is not None and not where(path_of(keys), leaf):
            return None
        names = _names(keys)
        for start in range(len(names) + 1):
            index = by_names.get(names[start:])
            if index is not None and leaf.shape[leaf.ndim - len(shapes[index]) :] == shapes[index]:
                return index
        return None

    # A number in place of an array matches nothing.
    tree = jax.tree.map(
        lambda node: jax.tree.map(lambda _: 0, node) if _is_rotated(node) else node, tree, is_leaf=_is_rotated
    )
    return [match(keys, leaf) for keys, leaf in keyed_leaves(tree)]


def _is_rotated(node: Any) -> bool:
    return isinstance(node, getattr(optax.contrib, "GaLoreState", ()))  # older optax has none


def _names(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names in a path one by one: a name may itself hold a "/"."""
    return tuple(path_of((key,)) for key in keys)
