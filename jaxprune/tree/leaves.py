"""The leaves of a tree by path: each an array, or an error that names it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.tree.paths import keyed_leaves, path_of
from jaxprune.typing import Params

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


class Leaves(NamedTuple):
    """A tree of arrays, flattened once.

    Attributes:
      by_path: its leaves by path, in `jax.tree.leaves` order.
      treedef: its structure.
    """

    by_path: dict[str, Any]
    treedef: Any

    def tree(self, by_path: Mapping[str, Any]) -> Any:
        """Return a tree of the same structure with other leaves, given by path in any order."""
        return self.treedef.unflatten([by_path[path] for path in self.by_path])


def flatten(tree: Params, what: str = "params") -> Leaves:
    """Flatten a tree of arrays.

    Raises:
      ValueError: the tree has no leaves, or two leaves have the same path.
      TypeError: a leaf is not an array (an activation function inside an equinox module, say, or
        a `keras.Variable`), and what to pass instead.
    """
    keyed = keyed_leaves(tree)
    if not keyed:
        raise ValueError(f"{what} is an empty tree: there is nothing to prune.")
    by_path = {path_of(keys): leaf for keys, leaf in keyed}
    if len(by_path) < len(keyed):
        times = Counter(path_of(keys) for keys, _ in keyed)
        twice = min(path for path in times if times[path] > 1)
        raise ValueError(f"{what} has several leaves at the path {twice!r}: rename a key that holds a '/'.")
    check_arrays(by_path, what)
    return Leaves(by_path, jax.tree.structure(tree))


def array_leaves(tree: Params, what: str = "params") -> dict[str, Any]:
    """Return the leaves of a tree by path, all of them arrays; raise as `flatten`."""
    return flatten(tree, what).by_path


def check_arrays(leaves: Mapping[str, Any], what: str) -> None:
    """Check that the leaves of a tree, given by path, are arrays of numbers.

    Raises:
      TypeError: one is not.
    """
    for path, leaf in leaves.items():
        if not (isinstance(leaf, _ARRAYS) or is_array(leaf)):
            raise TypeError(not_an_array(what, path, leaf))
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":
            raise TypeError(f"{what}[{path!r}] is an array of {leaf.dtype}, not of numbers.")


def is_array(leaf: Any) -> bool:
    """Return whether a leaf has a shape and a dtype (arrays, tracers, `jax.ShapeDtypeStruct`).

    Variables of other libraries have both as well, but are not arrays: `keras.Variable` holds an array, its
    `value`, and torch's dtypes are not JAX's.
    """
    if isinstance(leaf, _ARRAYS):
        return True
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or hasattr(leaf, "value"):
        return False
    try:
        jnp.dtype(leaf.dtype)
    except TypeError:
        return False
    return True


def is_concrete(*trees: Any) -> bool:
    """Return whether all leaves hold values that Python can read now: none is traced or abstract."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, Tracer):
            return False
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
            return False
    return True


def describe(leaf: Any) -> str:
    """Return an array's dtype and shape for a message, as in `float32[784, 300]`."""
    typed_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)  # which NumPy has no dtype for
    name = str(leaf.dtype) if typed_key else jnp.dtype(leaf.dtype).name
    return f"{name}[{', '.join(map(str, leaf.shape))}]"


def not_an_array(what: str, path: str, leaf: Any) -> str:
    """Return the message for a leaf that is not an array: what it is, and what to pass in its place."""
    kind = type(leaf).__name__
    if not path and (callable(leaf) or isinstance(leaf, str)):
        name = leaf if isinstance(leaf, str) else getattr(leaf, "__name__", kind)
        return (
            f"{what} is a {kind}, not an array or a pytree of arrays: {name!r}. Check the order of arguments."
        )
    head = f"{what}[{path!r}] is a {kind}, not an array. "
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        if hasattr(leaf, "value"):
            return f"{head}Pass the array that it holds, its `.value` (as for every keras.Variable)."
        return f"{head}Convert it to a JAX array first: jnp.asarray(leaf), or jnp.asarray(leaf.numpy())."
    if isinstance(leaf, (bool, str)):
        return f"{head}Keep settings and names out of the tree: pass the arrays alone."
    if isinstance(leaf, (int, float, complex)):
        return f"{head}Pass a number as jnp.asarray(number), or keep it out of the tree."
    return head + (
        "Pass the arrays alone: for an equinox module, `equinox.filter(module, equinox.is_inexact_array)`; "
        "for a flax nnx module, `nnx.state(module, nnx.Param)`."
    )
