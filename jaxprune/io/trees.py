"""Trees as lists of paths, and back: how a file holds the structure of params.

A path is a tuple of steps: a string is the key of a dict or the name of an attribute, an integer a position
in a sequence, a tuple of one integer the integer key of a dict. So `{"a/b": x}` and `{"a": {"b": x}}` differ,
and so do `{0: x}`, `{"0": x}` and `[x]`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxprune.tree.paths import keyed_leaves

Path = tuple[Any, ...]

HOLLOW = {"none": lambda: None, "dict": dict, "list": list, "tuple": tuple}
"""Nodes without children: they hold no leaf, and yet are part of the structure."""

DEEPEST = 100
"""The most steps that a path may have: a deeper tree would overflow the stack of whoever reads it."""


class Flat(NamedTuple):
    """A tree, flattened.

    Attributes:
      leaves: by path, in leaf order.
      hollow: for each node without children, its kind (a key of `HOLLOW`), by path.
    """

    leaves: dict[Path, Any]
    hollow: dict[Path, str]


def show(path: Path) -> str:
    """Return a path as text."""
    return "/".join(str(step[0] if isinstance(step, tuple) else step) for step in path)


def plain(path: Path) -> Path:
    """Return a path in which a position in a sequence and an integer key are the same."""
    return tuple(step[0] if isinstance(step, tuple) else step for step in path)


def flatten(tree: Any, what: str) -> Flat:
    """Return the leaves of a tree and its hollow nodes, by path."""
    leaves: dict[Path, Any] = {}
    hollow: dict[Path, str] = {}
    for keys, leaf in keyed_leaves(tree, is_leaf=_is_hollow):
        path = tuple(_step(key, what, keys) for key in keys)
        if len(path) > DEEPEST:
            raise ValueError(
                f"{what} is nested {len(path)} deep; files take {DEEPEST}. Its path begins {show(path[:5])}."
            )
        if path in leaves or path in hollow:
            raise ValueError(f"{what} has two leaves at the path {show(path)!r}; give them different keys.")
        if _is_hollow(leaf):
            hollow[path] = _kind(leaf)
        else:
            leaves[path] = leaf
    return Flat(leaves, hollow)


def _step(key: Any, what: str, keys: Any) -> Any:
    if isinstance(key, SequenceKey):
        return key.idx
    if isinstance(key, FlattenedIndexKey):
        return key.key
    if isinstance(key, GetAttrKey):
        return key.name
    value = key.key if isinstance(key, DictKey) else key
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return (int(value),)
    raise TypeError(
        f"{what}{jax.tree_util.keystr(keys)} has the key {value!r}, a {type(value).__name__}; "
        "files hold keys that are strings or integers."
    )


def _is_hollow(node: Any) -> bool:
    structure = jax.tree.structure(node)
    return structure.num_leaves == 0 and structure.num_nodes == 1


def _kind(node: Any) -> str:
    if node is None:
        return "none"
    return "dict" if isinstance(node, Mapping) else "list" if isinstance(node, list) else "tuple"


def build(leaves: Mapping[Path, Any], hollow: Mapping[Path, str]) -> Any:
    """Return nested dicts, with lists where all steps are positions; paths that clash raise ValueError."""
    ends = {path: _End(leaf) for path, leaf in leaves.items()}
    ends |= {path: _End(HOLLOW[kind]()) for path, kind in hollow.items() if path not in ends}
    if len(ends) < len(leaves) + len(hollow):
        raise ValueError("a path occurs twice")
    top: dict[Any, Any] = {}
    for path, end in ends.items():
        *steps, last = ("top", *path)
        node: Any = top
        for step in steps:
            node = node.setdefault(step, {})
            if isinstance(node, _End):
                raise ValueError(f"{show(path)!r} lies within a leaf")
        if last in node:
            raise ValueError(f"the path {show(path)!r} occurs twice, or other paths lie within it")
        node[last] = end
    return _nested(top)["top"]


class _End(NamedTuple):
    value: Any


def _nested(node: Any) -> Any:
    if isinstance(node, _End):
        return node.value
    if all(type(step) is int for step in node) and set(node) == set(range(len(node))):
        return [_nested(node[index]) for index in range(len(node))]
    children = {step[0] if isinstance(step, tuple) else step: child for step, child in node.items()}
    if len(children) < len(node):
        raise ValueError("a place in a sequence and an integer key are the same")
    return {key: _nested(child) for key, child in children.items()}


def match(tree: Any, leaves: Mapping[Path, Any], what: str) -> list[tuple[Path, Any, Any]]:
    """Return the path, the leaf and the value of the same path for each leaf of a tree, in leaf order.

    Containers of the tree called `what` may be of another kind, such as a tuple in place of a list. Paths in
    one of the two alone raise ValueError.
    """
    own = {plain(path): (path, leaf) for path, leaf in flatten(tree, what).leaves.items()}
    others = {plain(path): leaf for path, leaf in leaves.items()}
    if own.keys() != others.keys():
        only = ", ".join(sorted(map(show, own.keys() - others.keys()))) or "none"
        missing = ", ".join(sorted(map(show, others.keys() - own.keys()))) or "none"
        raise ValueError(f"missing from {what}: {missing}; only in {what}: {only}")
    return [(path, leaf, others[key]) for key, (path, leaf) in own.items()]
