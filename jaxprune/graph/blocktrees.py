"""Blocks taken out of the lists and dicts of a tree, and put back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxprune.tree.paths import leaf_paths

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by path."""


def blocks_of(tree: Any) -> list[str]:
    """The paths of what could be blocks: in a list, tuple or dict, beside others of the same layout."""
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        children = _children(node)
        layouts = [_layout(child) for child in children.values()] if _can_shrink(node) else []
        for (name, child), layout in zip(children.items(), layouts or [None] * len(children), strict=True):
            below = f"{path}/{name}" if path else name
            if layout and layouts.count(layout) > 1:
                found.append(below)
            walk(child, below)

    walk(tree, "")
    return found


def take_out(tree: Any, blocks: Sequence[str], shapes: Shapes) -> Any:
    """A tree without some blocks, wherever it mirrors the params.

    Args:
      tree: params, masks, or an optimizer's state that holds trees like them.
      blocks: the paths of the blocks in the params.
      shapes: the shapes of all leaves of the params that mirror the tree's, by path.
    """
    wanted = _by_parent(blocks)

    def change(node: Any, parent: str) -> Any:
        gone = wanted[parent]
        if not _mirrors(node, parent, shapes, ()):
            return None
        if isinstance(node, (list, tuple)):
            return type(node)(child for n, child in enumerate(node) if str(n) not in gone)
        return type(node)({name: child for name, child in node.items() if str(name) not in gone})

    return _walk(tree, "", wanted, change)


def put_back(tree: Any, blocks: Sequence[str], shapes: Shapes, make: Callable[[str, Any], Any]) -> Any:
    """A tree with blocks where `take_out` took them.

    Args:
      tree: a tree without the blocks.
      blocks: the paths of the blocks in the params.
      shapes: the shapes of all leaves, with those of the blocks, by path.
      make: `make(path, like)`: a leaf of a block, like the one in its place in another block.
    """
    wanted = _by_parent(blocks)

    def change(node: Any, parent: str) -> Any:
        gone = wanted[parent]
        if not _mirrors(node, parent, shapes, gone):
            return None
        kind: Any = type(node)
        left = list(node) if isinstance(node, Mapping) else range(len(node) + len(gone))
        left = [name for name in map(str, left) if name not in gone]
        others = dict(zip(left, node.values() if isinstance(node, Mapping) else node, strict=True))

        def place(name: str) -> str:
            return f"{parent}/{name}" if parent else name

        def ranks(name: str) -> dict[str, int]:
            """The ranks of a block's leaves, by path below it."""
            path = place(name)
            inside = (at for at in shapes if at == path or at.startswith(f"{path}/"))
            return {at.removeprefix(path): len(shapes[at]) for at in inside}

        def block(name: str) -> Any:
            path = place(name)
            # A dict may hold other things beside the blocks.
            model = next(others[other] for other in left if ranks(other) == ranks(name))
            leaves = [make(f"{path}/{rest}" if rest else path, leaf) for rest, leaf in _leaves(model).items()]
            return jax.tree.unflatten(jax.tree.structure(model), leaves)

        if isinstance(node, Mapping):
            return kind({**node, **{name: block(name) for name in gone}})
        rest, full = iter(node), []
        for n in range(len(node) + len(gone)):
            full.append(block(str(n)) if str(n) in gone else next(rest))
        return kind(full)

    return _walk(tree, "", wanted, change)


def _walk(
    node: Any, path: str, wanted: Mapping[str, Sequence[str]], change: Callable[[Any, str], Any]
) -> Any:
    """A tree whose nodes at the paths of some params' lists are changed, from the innermost on."""
    children = _children(node)
    if not children:
        return node
    new = {
        name: _walk(child, f"{path}/{name}" if path else name, wanted, change)
        for name, child in children.items()
    }
    if any(new[name] is not child for name, child in children.items()):
        node = jax.tree.unflatten(_one_level(node), list(new.values()))
    if not _can_shrink(node):
        return node
    for parent in sorted(wanted, key=len, reverse=True):
        if path == parent or not parent or path.endswith("/" + parent):
            changed = change(node, parent)
            if changed is not None:
                return changed
    return node


def _mirrors(node: Any, parent: str, shapes: Shapes, gone: Sequence[str]) -> bool:
    """Whether a list or dict is that of the params, perhaps without some blocks, or one like it."""
    start = f"{parent}/" if parent else ""
    own = {path.removeprefix(start): shape for path, shape in shapes.items() if path.startswith(start)}
    listed = all(path.partition("/")[0].isdigit() for path in own)
    if listed is isinstance(node, Mapping) and gone:
        return False
    if gone and listed:
        names = sorted({int(path.partition("/")[0]) for path in own})
        left = [n for n in names if str(n) not in gone]
        number = {str(n): str(place) for place, n in enumerate(left)}
        own = {
            number[first] + slash + rest: shape
            for path, shape in own.items()
            for first, slash, rest in [path.partition("/")]
            if first in number
        }
    elif gone:
        own = {path: shape for path, shape in own.items() if path.partition("/")[0] not in gone}
    leaves = _leaves(node)
    if leaves.keys() != own.keys():
        return False
    return all(
        tuple(getattr(leaf, "shape", ()))[-len(own[path]) or 10**9 :] == own[path]
        for path, leaf in leaves.items()
    )


def _by_parent(blocks: Sequence[str]) -> dict[str, list[str]]:
    parents: dict[str, list[str]] = {}
    for block in blocks:
        parent, _, name = block.rpartition("/")
        parents.setdefault(parent, []).append(name)
    return parents


def _can_shrink(node: Any) -> bool:
    """Whether a node is a list, a tuple without names, or a dict, of which an entry can go."""
    return type(node) in (list, tuple, dict) or type(node).__name__ == "FrozenDict"


def _one_level(node: Any) -> Any:
    return jax.tree.structure(node, is_leaf=lambda x: x is not node)


def _children(node: Any) -> dict[str, Any]:
    """The children of a node by name, in order; none for a leaf."""
    leaves = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    if len(leaves) == 1 and leaves[0] is node:
        return {}
    wrapped = jax.tree.unflatten(_one_level(node), [_Child(leaf) for leaf in leaves])
    names = leaf_paths(wrapped)
    return dict(zip(names, leaves, strict=True))


class _Child:
    """Stands for a child of a node, as a leaf."""

    def __init__(self, child: Any):
        self.child = child


def _leaves(node: Any) -> dict[str, Any]:
    return dict(zip(leaf_paths(node), jax.tree.leaves(node), strict=True))


def _layout(node: Any) -> tuple[Any, ...] | None:
    """The paths and shapes of a node's leaves; None for a leaf."""
    if not _children(node):
        return None
    return tuple((path, tuple(getattr(leaf, "shape", ()))) for path, leaf in _leaves(node).items())
