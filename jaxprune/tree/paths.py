"""Paths of leaves as strings, such as "dense/kernel", and what they say in messages."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

_VALUE = GetAttrKey("value")


def keyed_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[tuple[Any, ...], Any]]:
    """Return the leaves of a tree with their paths as tuples of JAX's keys, in `jax.tree.leaves` order.

    A flax nnx Variable is a node with one child, called `value`. That last name is dropped, so that paths
    of nnx and of linen are alike, `dense/kernel`; it is kept where a sibling shares the node (an attention
    block with arrays called `query`, `key` and `value`).
    """
    keyed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    boxed = [len(keys) > 1 and keys[-1] == _VALUE for keys, _ in keyed]
    if not any(boxed):
        return keyed
    siblings = Counter(keys[:-1] for keys, _ in keyed)
    return [
        (keys[:-1] if is_boxed and siblings[keys[:-1]] == 1 else keys, leaf)
        for (keys, leaf), is_boxed in zip(keyed, boxed, strict=True)
    ]


path_of = partial(keystr, simple=True, separator="/")
"""`path_of(keys)`: the path string of a tuple of JAX's keys."""


def leaf_paths(tree: Any) -> list[str]:
    """Return the path string of every leaf, in `jax.tree.leaves` order.

    Args:
      tree: any pytree.

    Returns:
      One string per leaf, names joined by "/"; the empty string for a bare array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.leaf_paths({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
      ['dense/bias', 'dense/kernel']
    """
    return [path_of(keys) for keys, _ in keyed_leaves(tree)]


def prefix_to(paths: Iterable[str], others: Iterable[str], some: bool = False) -> str | None:
    """Return the prefix that leads from other paths to these, or None where there is none.

    Args:
      paths: paths, of which only those under the prefix count.
      others: the paths that remain when the prefix is dropped.
      some: accept a prefix under which only some paths are among the others, if it is the only such prefix.

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
    """Return what to do where groups and params differ by a prefix of all paths; None where they do not."""
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
    """Return up to eight paths for a message."""
    paths = sorted(paths)
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return ", ".join(paths[:8]) + more
