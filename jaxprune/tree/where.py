"""Predicates `where(path, leaf)`, which say which leaves take part."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune.tree.dtypes import WITHOUT_ZERO
from jaxprune.tree.kernel_names import names_kernel
from jaxprune.tree.leaves import array_leaves, describe
from jaxprune.typing import Params, Where


def check_where(where: Any) -> None:
    """Check the argument that says which leaves take part."""
    if not callable(where):
        raise TypeError(
            f"where must be a function of (path, leaf), got {where!r}. For a pattern, pass "
            "jaxprune.matching('*/kernel')."
        )


def selected(params: Params, where: Where) -> list[str]:
    """Return the paths of the params that take part, in leaf order; raise as `selected_among`."""
    return selected_among(array_leaves(params), where)


def selected_among(leaves: Mapping[str, Any], where: Where) -> list[str]:
    """Return the paths of the leaves that take part, of params given by path."""
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
        if leaves[path].dtype == WITHOUT_ZERO:
            raise TypeError(
                f"params[{path!r}] is {describe(leaves[path])}, a dtype without a zero, so no entry can be "
                "pruned. Leave it out with where=..., or cast it: leaf.astype(jnp.bfloat16)."
            )
    return chosen


def kernels(path: str, leaf: Any) -> bool:
    """Take in the weights of dense, convolutional and attention layers: the default `where`.

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
    """Take in the leaves whose path matches one of the shell patterns.

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
    """Take in the leaves that `predicate` leaves out.

    Example:
      >>> import jaxprune as jp
      >>> jp.not_(jp.matching("head/*"))("head/kernel", None)
      False
    """
    return _combined("not_", lambda outcomes: not any(outcomes), [predicate])


def any_of(*predicates: Where) -> Where:
    """Take in the leaves that at least one of the predicates takes in.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> where = jp.any_of(jp.kernels, jp.matching("*embedding"))
      >>> where("embed/embedding", jnp.ones((10, 4)))
      True
    """
    return _combined("any_of", any, predicates)


def all_of(*predicates: Where) -> Where:
    """Take in the leaves that all of the predicates take in.

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
