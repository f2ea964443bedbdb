"""Leaf paths as strings, and predicates on them that say which leaves take part."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxprune.tree.dtypes import can_be_zero
from jaxprune.tree.kernel_names import names_kernel
from jaxprune.typing import Params, Where


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def keyed_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves of a tree with their paths as tuples of JAX's keys, in `jax.tree.leaves` order.

    A flax nnx Variable is a node of its own with one child called `value`. That last name is
    dropped, so that nnx and linen say `dense/kernel` alike; it is kept where a sibling shares
    the node (an attention block with arrays called `query`, `key` and `value`).
    """
    keyed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    siblings: dict[tuple, int] = {}
    for path, _ in keyed:
        siblings[path[:-1]] = siblings.get(path[:-1], 0) + 1

    def short(path):
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value") and siblings[path[:-1]] == 1:
            return path[:-1]
        return path

    return [(short(path), leaf) for path, leaf in keyed]


def _path_parts(tree: Any) -> list[tuple[str, ...]]:
    """The path of each leaf as a tuple of names, in `jax.tree.leaves` order."""
    return [tuple(_key_name(key) for key in path) for path, _ in keyed_leaves(tree)]


def leaf_paths(tree: Any) -> list[str]:
    """The path string of every leaf, in `jax.tree.leaves` order.

    Args:
      tree: any pytree.

    Returns:
      One string per leaf, names joined by "/"; the empty string for a bare array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.leaf_paths({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
      ['dense/bias', 'dense/kernel']
    """
    return ["/".join(parts) for parts in _path_parts(tree)]


def path_of(keys: Sequence[Any]) -> str:
    """The path string of a tuple of JAX's keys."""
    return "/".join(map(_key_name, keys))


_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype (arrays, tracers, `jax.ShapeDtypeStruct`).

    Variables of other libraries have both as well, but are no arrays: `keras.Variable` holds one, its
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


def array_leaves(tree: Params, what: str = "params") -> dict[str, Any]:
    """The leaves of a tree by path, all of them arrays.

    Raises:
      ValueError: the tree has no leaves, or two leaves have the same path.
      TypeError: a leaf is not an array (an activation function inside an equinox module, say, or
        a `keras.Variable`), and what to pass instead.
    """
    paths, leaves = leaf_paths(tree), jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{what} is an empty tree: there is nothing to prune.")
    if len(set(paths)) < len(paths):
        twice = sorted(path for path, times in Counter(paths).items() if times > 1)
        raise ValueError(
            f"{what} has several leaves at the path {twice[0]!r}: rename a key that holds a '/'."
        )
    for path, leaf in zip(paths, leaves, strict=True):
        if not is_array(leaf):
            raise TypeError(not_an_array(what, path, leaf))
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":
            raise TypeError(f"{what}[{path!r}] is an array of {leaf.dtype}, not of numbers.")
    return dict(zip(paths, leaves, strict=True))


def not_an_array(what: str, path: str, leaf: Any) -> str:
    """The message for a leaf that is not an array: what it is, and what to pass in its place."""
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


def describe(leaf: Any) -> str:
    """Shape and dtype of an array for an error message, as in `float32[784, 300]`."""
    typed_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)  # which is no dtype of numpy's
    name = str(leaf.dtype) if typed_key else jnp.dtype(leaf.dtype).name
    return f"{name}[{', '.join(map(str, leaf.shape))}]"


def check_mirrors(tree: Any, params: Params, what: str) -> None:
    """Checks that a tree has the structure and the leaf shapes of `params`.

    Raises:
      ValueError: naming the paths that are missing or extra, or the leaf whose shape differs.
    """
    expected = array_leaves(params)
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


def prefix_to(paths: Iterable[str], others: Iterable[str], some: bool = False) -> str | None:
    """The prefix without which paths are among others; None if there is none.

    Args:
      paths: paths, of which those under the prefix count.
      others: the paths that they may be among.
      some: whether it is enough that some are. Of several such prefixes none is better than another.

    Example:
      >>> prefix_to(["params/a/w", "params/b/w", "batch_stats/a/mean"], ["a/w", "b/w", "c/w"])
      'params'
      >>> prefix_to(["x/w", "y/w"], ["w"], some=True) is None
      True
    """
    paths, others = set(paths), set(others)
    pairs = [(path, other) for path in paths for other in others if path.endswith(f"/{other}")]
    hits = Counter(path.removesuffix(f"/{other}") for path, other in pairs)

    def leads(prefix: str) -> bool:
        inside = {path.removeprefix(f"{prefix}/") for path in paths if path.startswith(f"{prefix}/")}
        return some or inside <= others

    best = [prefix for prefix in hits if leads(prefix) and hits[prefix] == max(hits.values())]
    return best[0] if len(best) == 1 else None


def explain_paths(paths: Iterable[str], params: Iterable[str], some: bool = False) -> str | None:
    """Why groups have none of the params' paths and what to do, where one prefix is all the difference."""
    paths, params = set(paths), set(params)
    if (prefix := prefix_to(paths, params, some)) is not None:
        return f"The groups' tree holds these params under {prefix!r}: pass groups.under({prefix!r})."
    if (prefix := prefix_to(params, paths, some)) is not None:
        return (
            f"The groups are of the part of these params under {prefix!r}: pass that part, or call "
            "channel_groups with all of these params."
        )
    return None


def some_of(paths: Iterable[str]) -> str:
    """Up to eight paths for a message."""
    paths = sorted(paths)
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return ", ".join(paths[:8]) + more


def match_leaves_to_params(tree: Any, params: Params, where: Where | None = None) -> list[int | None]:
    """Return, for each leaf of a tree (an optimizer's state, say), which param it mirrors.

    A leaf mirrors a param if its path *ends* with the param's path, and it has a floating-point or
    complex dtype and the param's shape, perhaps after further axes: Adam's moments, a gradient
    accumulator, the second iterate of schedule-free, L-BFGS's memory of the last updates. So does
    a bool leaf of that shape, a mask. The longest ending wins. What `where(path, leaf)` leaves out
    mirrors no param. Nor does the state of GaLore: its projections have their params' shapes where their
    rank is full, but lie in another basis.

    Returns:
      For each leaf of `tree`, the index of its param among `jax.tree.leaves(params)`, or None.
    """
    by_path = {parts: index for index, parts in enumerate(_path_parts(params))}
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]

    def match(parts, leaf):
        if not is_array(leaf) or not (jnp.issubdtype(leaf.dtype, jnp.inexact) or leaf.dtype == jnp.bool_):
            return None
        if where is not None and not where("/".join(parts), leaf):
            return None
        for start in range(len(parts) + 1):
            index = by_path.get(parts[start:])
            if index is not None and leaf.shape[leaf.ndim - len(shapes[index]) :] == shapes[index]:
                return index
        return None

    def is_rotated(node):
        return isinstance(node, getattr(optax.contrib, "GaLoreState", ()))  # older optax has none

    # A number in place of an array matches nothing.
    tree = jax.tree.map(
        lambda node: jax.tree.map(lambda _: 0, node) if is_rotated(node) else node, tree, is_leaf=is_rotated
    )
    return [match(p, leaf) for p, leaf in zip(_path_parts(tree), jax.tree.leaves(tree), strict=True)]


def check_where(where: Any) -> None:
    """Checks what says which leaves take part.

    Raises:
      TypeError: it is not a function.
    """
    if not callable(where):
        raise TypeError(
            f"where must be a function of (path, leaf), got {where!r}. For a pattern, pass "
            "jaxprune.matching('*/kernel')."
        )


def selected(params: Params, where: Where) -> list[str]:
    """The paths of the leaves that take part, in leaf order.

    Raises:
      ValueError: `where` matches no leaf; the message lists the paths there are.
      TypeError: `where` is not callable, or matches a leaf that is not floating-point or has no zero.
    """
    leaves = array_leaves(params)
    check_where(where)
    chosen = [path for path, leaf in leaves.items() if where(path, leaf)]
    if not chosen:
        listing = ", ".join(f"{path} {describe(leaf)}" for path, leaf in leaves.items())
        raise ValueError(
            f"where={getattr(where, '__name__', where)} matches no leaf, so nothing would be pruned. "
            f"The leaves are: {listing}. Pass for example where=jaxprune.matching('*/kernel')."
        )
    for path in chosen:
        if not jnp.issubdtype(leaves[path].dtype, jnp.inexact):
            raise TypeError(
                f"params[{path!r}] is {describe(leaves[path])}; only floating-point (or complex) "
                "leaves can be pruned. Leave it out with where=..."
            )
        if not can_be_zero(leaves[path]):
            raise TypeError(
                f"params[{path!r}] is {describe(leaves[path])}, a dtype without a zero, so no entry can be "
                "pruned. Leave it out with where=..., or cast it: leaf.astype(jnp.bfloat16)."
            )
    return chosen


def kernels(path: str, leaf: Any) -> bool:
    """The default `where`: the weights of dense, convolutional and attention layers.

    A leaf takes part if it has two axes or more and its name does not say otherwise. Left alone
    are biases (also attention's, of shape heads x dim), the scales and offsets of norms,
    embeddings and positional embeddings, class, mask and register tokens, and adapters (LoRA), of which
    one factor starts at zero. To prune embeddings too: `any_of(kernels, matching("*embedding"))`.

    Names are read as whole words, from the leaf upwards, and the nearest name that says something
    decides: "embed/proj/weight" is the weight of a projection, "proj/embed/weight" an embedding. What is
    called `kernel` takes part wherever it is, but in an adapter.

    Where a structure knows the network (`structures.channels`), it decides instead by what the
    network does with a leaf, whatever its name.

    Args:
      path: the leaf's path, as from `leaf_paths`.
      leaf: anything with a `shape`.

    Returns:
      Whether the leaf takes part.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.kernels("encoder/dense/kernel", jnp.ones((4, 8)))
      True
      >>> jp.kernels("encoder/pos_embedding", jnp.ones((1, 4, 8)))
      False
      >>> jp.kernels("tok_emb/weight", jnp.ones((10, 8))), jp.kernels("normal_dense/weight", jnp.ones((4, 8)))
      (False, True)
    """
    return names_kernel(path, tuple(leaf.shape))


def matching(*patterns: str) -> Where:
    """Leaves whose path matches one of the shell patterns.

    Args:
      *patterns: as in `fnmatch`; `*` also spans "/". Case matters.

    Returns:
      A predicate `where(path, leaf)`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> where = jp.matching("encoder/*/kernel")
      >>> where("encoder/dense/kernel", None), where("head/kernel", None)
      (True, False)
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"matching takes one or more pattern strings, got {patterns!r}.")

    def where(path: str, leaf: Any) -> bool:
        del leaf
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    where.__name__ = f"matching({', '.join(map(repr, patterns))})"
    return where


def not_(predicate: Where) -> Where:
    """Leaves that `predicate` leaves out.

    Example:
      >>> import jaxprune as jp
      >>> jp.not_(jp.matching("head/*"))("head/kernel", None)
      False
    """
    return _combined("not_", lambda outcomes: not any(outcomes), [predicate])


def any_of(*predicates: Where) -> Where:
    """Leaves that at least one of the predicates takes in.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> where = jp.any_of(jp.kernels, jp.matching("*embedding"))
      >>> where("embed/embedding", jnp.ones((10, 4)))
      True
    """
    return _combined("any_of", any, predicates)


def all_of(*predicates: Where) -> Where:
    """Leaves that every one of the predicates takes in.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> where = jp.all_of(jp.kernels, jp.not_(jp.matching("head/*")))
      >>> where("head/kernel", jnp.ones((4, 2)))
      False
    """
    return _combined("all_of", all, predicates)


def _combined(name: str, combine: Callable, predicates: Sequence[Where]) -> Where:
    for predicate in predicates:
        if not callable(predicate):
            raise TypeError(f"{name} takes predicates where(path, leaf), got {predicate!r}.")

    def where(path: str, leaf: Any) -> bool:
        return combine([predicate(path, leaf) for predicate in predicates])

    inner = ", ".join(getattr(predicate, "__name__", repr(predicate)) for predicate in predicates)
    where.__name__ = f"{name}({inner})"
    return where


def is_concrete(*trees: Any) -> bool:
    """Whether the leaves hold values that Python can look at now: none is traced or abstract."""
    return all(
        isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float))
        and not isinstance(leaf, Tracer)
        for leaf in jax.tree.leaves(trees)
    )
