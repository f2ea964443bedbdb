"""Blocks taken out of the lists and dicts of a tree, and put back.

A block is an entry of a list, tuple or dict beside others of the same layout. A tree that mirrors the params,
such as an optimizer's state, holds copies of these containers at paths that end like theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from jaxprune.tree.paths import keyed_leaves, leaf_paths, path_of

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by path."""


def below(prefix: str, by_path: Mapping[str, T]) -> dict[str, T]:
    """Return the entries whose paths lie below a prefix, by their paths without it."""
    start = prefix.rstrip("/") + "/"
    return {path.removeprefix(start): value for path, value in by_path.items() if path.startswith(start)}


def blocks_of(tree: Any) -> list[str]:
    """Return the paths of all entries that could be taken out, whatever the network does with them."""
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        children = _children(node)
        layouts = [_layout(child) for child in children.values()] if _can_shrink(node) else []
        for (name, child), layout in zip(children.items(), layouts or [None] * len(children), strict=True):
            if layout and layouts.count(layout) > 1:
                found.append(_below(path, name))
            walk(child, _below(path, name))

    walk(tree, "")
    return found


def take_out(tree: Any, blocks: Sequence[str], shapes: Shapes) -> Any:
    """Return a tree without some blocks, wherever it mirrors the params; shapes are those of the params."""
    removed_from = _by_parent(blocks)

    def change(node: Any, parent: str) -> Any:
        removed = removed_from[parent]
        if not _mirrors(node, parent, shapes, ()):
            return None
        if isinstance(node, (list, tuple)):
            return type(node)(child for n, child in enumerate(node) if str(n) not in removed)
        return type(node)({name: child for name, child in node.items() if str(name) not in removed})

    return _walk(tree, "", removed_from, change)


def put_back(tree: Any, blocks: Sequence[str], shapes: Shapes, make: Callable[[str, Any], Any]) -> Any:
    """Return a tree with blocks where `take_out` took them.

    `make(path, like)` returns the leaf at a path in a block, given its counterpart in another block.
    """
    removed_from = _by_parent(blocks)

    def change(node: Any, parent: str) -> Any:
        removed = removed_from[parent]
        if not _mirrors(node, parent, shapes, removed):
            return None
        names = list(node) if isinstance(node, Mapping) else range(len(node) + len(removed))
        left = [name for name in map(str, names) if name not in removed]
        entries = dict(zip(left, node.values() if isinstance(node, Mapping) else node, strict=True))

        def ranks(name: str) -> dict[str, int]:
            """Return the ranks of a block's leaves, by path below it."""
            path = _below(parent, name)
            inside = (at for at in shapes if at == path or at.startswith(f"{path}/"))
            return {at.removeprefix(path): len(shapes[at]) for at in inside}

        def block(name: str) -> Any:
            # A dict may hold other things beside the blocks, so an entry of the same layout is the model.
            model = next(entries[other] for other in left if ranks(other) == ranks(name))
            path = _below(parent, name)
            leaves = [make(f"{path}/{rest}" if rest else path, leaf) for rest, leaf in _leaves(model).items()]
            return jax.tree.unflatten(jax.tree.structure(model), leaves)

        kind: Any = type(node)
        if isinstance(node, Mapping):
            return kind({**node, **{name: block(name) for name in removed}})
        return kind(block(name) if name in removed else entries[name] for name in map(str, names))

    return _walk(tree, "", removed_from, change)


def _walk(
    node: Any, path: str, removed_from: Mapping[str, Sequence[str]], change: Callable[[Any, str], Any]
) -> Any:
    """Return a tree with `change(container, parent)` for each container at a path that ends like a parent's.

    Containers are changed from the innermost on; where `change` returns None they stay. Of several parents
    with such an ending the longest comes first.
    """
    children = _children(node)
    if not children:
        return node
    new = {name: _walk(child, _below(path, name), removed_from, change) for name, child in children.items()}
    if any(new[name] is not child for name, child in children.items()):
        one_level = jax.tree.structure(node, is_leaf=lambda x: x is not node)
        node = jax.tree.unflatten(one_level, list(new.values()))
    if not _can_shrink(node):
        return node
    for parent in sorted(removed_from, key=len, reverse=True):
        if path == parent or not parent or path.endswith("/" + parent):
            changed = change(node, parent)
            if changed is not None:
                return changed
    return node


def _mirrors(node: Any, parent: str, shapes: Shapes, removed: Sequence[str]) -> bool:
    """Whether a container has the leaves of the params' container at `parent`, without some entries of it."""
    start = f"{parent}/" if parent else ""
    inside = {path.removeprefix(start): shape for path, shape in shapes.items() if path.startswith(start)}
    listed = all(path.partition("/")[0].isdigit() for path in inside)
    if listed is isinstance(node, Mapping) and removed:
        return False
    own = {path: shape for path, shape in inside.items() if path.partition("/")[0] not in removed}
    if removed and listed:
        # The entries that are left of a list have moved up.
        left = sorted({int(path.partition("/")[0]) for path in own})
        place = {str(n): str(at) for at, n in enumerate(left)}
        parts = [(path.partition("/"), shape) for path, shape in own.items()]
        own = {place[first] + slash + rest: shape for (first, slash, rest), shape in parts}
    leaves = _leaves(node)
    return leaves.keys() == own.keys() and all(ends_in(leaf, own[path]) for path, leaf in leaves.items())


def ends_in(leaf: Any, shape: tuple[int, ...]) -> bool:
    """Whether a leaf has a shape, perhaps after axes of its own."""
    own = tuple(getattr(leaf, "shape", ()))
    return len(own) >= len(shape) and own[len(own) - len(shape) :] == shape


def _below(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _by_parent(blocks: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of blocks by the path of their container."""
    parents: dict[str, list[str]] = {}
    for block in blocks:
        parent, _, name = block.rpartition("/")
        parents.setdefault(parent, []).append(name)
    return parents


def _can_shrink(node: Any) -> bool:
    """Whether a node is a list, a tuple without names, or a dict, which can lose an entry."""
    return type(node) in (list, tuple, dict) or type(node).__name__ == "FrozenDict"


def _children(node: Any) -> dict[str, Any]:
    """Return the children of a node by name, in order; none for a leaf."""
    children = keyed_leaves(node, is_leaf=lambda x: x is not node)
    return {path_of(keys): child for keys, child in children if child is not node}


def _leaves(node: Any) -> dict[str, Any]:
    return dict(zip(leaf_paths(node), jax.tree.leaves(node), strict=True))


def _layout(node: Any) -> tuple[Any, ...] | None:
    """Return the paths and shapes of a node's leaves; None for a leaf."""
    if not _children(node):
        return None
    return tuple((path, tuple(getattr(leaf, "shape", ()))) for path, leaf in _leaves(node).items())
