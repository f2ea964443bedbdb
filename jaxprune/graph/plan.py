"""A plan: which slices of which params stay. It moves any tree between the dense and the small."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph import cutting, planfile
from jaxprune.graph.blocktrees import Shapes, below, ends_in, put_back, take_out
from jaxprune.graph.engine.divisors import without
from jaxprune.graph.engine.shortening import Removed
from jaxprune.tree.checks import check_function
from jaxprune.tree.host import like_computed, on_host
from jaxprune.tree.leaves import array_leaves, describe, is_array
from jaxprune.tree.masks import packed_like, restore_packed, unpack_masks
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.stacks import Stacks, layer_indices, layer_name, layer_shape
from jaxprune.typing import DenseShapes, PrunerState, Where


@dataclass(frozen=True)
class Plan:
    """Which slices of which params stay.

    A plan stands by itself: saved to a file and loaded, it shrinks and expands any tree of the params. What
    `compact` returns holds one, and its `shrink` and `expand` are those of the plan.

    Attributes:
      shapes: the dense shape of every param, by path.
      keep: by path, for each axis that loses slices, the dense indices of those that stay, in order. Each
        layer of a stacked param keeps slices of its own, equally many: there the indices are an array with a
        row for each layer (layers x kept; with several stack axes, an axis for each).
      divisors: by path, the axes whose dropped slices must not be zero, because the function divides by
        them: `expand` puts copies of the slices that stay, in turn, in their places.
      stacks: by path, the axes of stacked params that count layers. Layers that are removed whole are missing
        from the indices of that axis, and have no row in those of the others.
      removed: the paths of whole blocks that are taken out of their lists or dicts.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> plan = jp.Plan(shapes={"kernel": (2, 3)}, keep={"kernel": {1: np.array([0, 2])}})
      >>> small = plan.shrink({"kernel": jnp.arange(6.0).reshape(2, 3)})
      >>> small["kernel"].tolist(), plan.expand(small)["kernel"].tolist()
      ([[0.0, 2.0], [3.0, 5.0]], [[0.0, 0.0, 2.0], [3.0, 0.0, 5.0]])
    """

    shapes: Shapes
    keep: Mapping[str, Mapping[int, np.ndarray]]
    divisors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stacks: Stacks = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    # What the plan says

    def small_shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of a param without the slices that are dropped."""
        kept = self.keep.get(path, {})
        return tuple(kept[a].shape[-1] if a in kept else n for a, n in enumerate(self.shapes[path]))

    def small_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the small shapes by path, without the params of blocks that are taken out."""
        return {path: self.small_shape(path) for path in self.shapes if not self._in_removed(path)}

    def by_layer(self) -> "Plan":
        """Return the plan with each layer of a stacked param as a param of its own, named like "up[0]"."""
        shapes, keep, divisors = {}, {}, {}
        for path, shape in self.shapes.items():
            axes, kept = self.stacks.get(path, ()), self.keep.get(path, {})
            rest = [axis for axis in range(len(shape)) if axis not in axes]
            rows = [kept[axis].tolist() if axis in kept else list(range(shape[axis])) for axis in axes]
            for index in layer_indices(shape, axes) if axes else [()]:
                name = layer_name(path, index) if axes else path
                shapes[name] = layer_shape(shape, axes)
                if self._in_removed(path) or any(n not in row for n, row in zip(index, rows, strict=True)):
                    keep[name] = dict.fromkeys(range(len(rest)), np.zeros(0, int))
                else:
                    at = tuple(row.index(n) for n, row in zip(index, rows, strict=True))
                    keep[name] = {new: kept[old][at] for new, old in enumerate(rest) if old in kept}
                divisors[name] = tuple(n for n, old in enumerate(rest) if old in self.divisors.get(path, ()))
        return Plan(
            shapes,
            {name: axes for name, axes in keep.items() if axes},
            {name: axes for name, axes in divisors.items() if axes},
        )

    def _in_removed(self, path: str) -> bool:
        """Whether a param lies in a block that is taken out."""
        return any(path.startswith(f"{block}/") for block in self.removed)

    def taken_out(self) -> Removed:
        """Return the names of the params, and of the layers of stacked ones, of which nothing stays."""
        plan = self.by_layer()
        names = frozenset(
            name
            for name, kept in plan.keep.items()
            if len(kept) == len(plan.shapes[name]) > 0 and not any(len(indices) for indices in kept.values())
        )
        return Removed(names, names.intersection(plan.divisors))

    def dropped(self) -> dict[str, list[np.ndarray | None]]:
        """Return the slices that are dropped, as a bool vector for each axis of each param; None for none.

        The layers of stacked params stand by themselves, named like "up[0]".
        """
        plan = self.by_layer()

        def dropped(name: str, axis: int, size: int) -> np.ndarray | None:
            kept = plan.keep.get(name, {}).get(axis)
            return None if kept is None else ~np.isin(np.arange(size), kept)

        return {name: [dropped(name, *each) for each in enumerate(s)] for name, s in plan.shapes.items()}

    def zeros(self) -> dict[str, list[np.ndarray | None]]:
        """Return the dropped slices that count as zero, which are all but the divisors; see `dropped`."""
        divisors = self.by_layer().divisors
        return without(self.dropped(), frozenset((name, a) for name, axes in divisors.items() for a in axes))

    def under(self, prefix: str) -> "Plan":
        """Return the plan for a part of the params: that of `params["params"]` is `plan.under("params")`.

        Raises:
          ValueError: no path has the prefix.
        """
        shapes, removed = below(prefix, self.shapes), tuple(below(prefix, dict.fromkeys(self.removed)))
        if not shapes:
            raise ValueError(f"no param lies under {prefix!r}; they are {', '.join(self.shapes)}.")
        keep, divisors = below(prefix, self.keep), below(prefix, self.divisors)
        return Plan(shapes, keep, divisors, below(prefix, self.stacks), removed)

    # Trees, from the dense to the small and back

    def shrink(self, tree: Any, where: Where | None = None) -> Any:
        """Cut what is dropped out of every part of a tree that mirrors a param.

        Args:
          tree: params, masks, gradients, or any optimizer's state. A leaf mirrors a param if its
            path ends with the param's and it has its shape, perhaps after axes of its own. Leaves that
            mirror none (a step count) stay as they are.
          where: which leaves may mirror a param, a function of (path, leaf); by default all. Leaves
            that it rejects stay as they are: a preconditioner shaped like a square param, say, as in
            `wrap_optax(state_where=)`. If its param gets smaller, make it anew with `tx.init`.

        Returns:
          The same tree with smaller leaves. The state of a pruner (`jaxprune.PrunerState`) keeps the dense
          shapes besides, so that what was cut out counts towards the pruner's target.

        Raises:
          ValueError: an array that belongs to a param that gets smaller, by its path, but has
            another shape (Adafactor's factored moments); or nothing in the tree mirrors a param.
        """

        def cut(leaf: Any, path: str, place: str) -> Any:
            lead = leaf.ndim - len(self.shapes[path])
            return cutting.cut(leaf, lead, self.stacks.get(path, ()), self.keep.get(path, {}))

        small = self._map(tree, self.shapes, cut, "shrink", where)
        if self.removed:
            small = take_out(small, self.removed, self._shapes_with_removed())
        return _with_dense_shapes(tree, small)

    def expand(self, tree: Any, where: Where | None = None) -> Any:
        """Return the tree that `shrink` would make this one of, with zeros (False) where slices were dropped.

        Where the function divides by dropped slices (`divisors`), zeros would make it NaN, while any other
        values do not matter. Params (leaves at the path of a param, alone or below "params") get
        copies of the slices that stay there, in turn, and masks True; optimizer state gets zeros.

        Args:
          tree: as for `shrink`, with small shapes.
          where: as for `shrink`.

        Returns:
          The same tree with dense leaves.

        Raises:
          ValueError: as `shrink`.
        """

        def spread(leaf: Any, path: str, place: str) -> Any:
            shape = self.shapes[path]
            is_param = place.removesuffix(path).rstrip("/").rpartition("/")[2] in ("", "params")
            divisors = self.divisors.get(path, ()) if is_param or leaf.dtype == bool else ()
            lead, stack = leaf.ndim - len(shape), self.stacks.get(path, ())
            return cutting.spread(leaf, lead, stack, self.keep.get(path, {}), shape, divisors)

        dense = self._map(self.filled(tree), self._shapes_with_removed(), spread, "expand", where)
        return jax.tree.map(
            lambda node: node._replace(dense=()) if _is_pruner_state(node) else node,
            dense,
            is_leaf=_is_pruner_state,
        )

    def filled(self, tree: Any) -> Any:
        """Return a small tree with the blocks that were taken out: zeros (False), and ones for divisors."""
        if not self.removed:
            return tree

        def make(path: str, like: Any) -> Any:
            lead = like.ndim - len(self.shapes[path])
            shape = (*like.shape[:lead], *self.small_shape(path))
            if isinstance(like, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(shape, like.dtype)
            value = bool(self.divisors.get(path))
            if on_host(like):
                return like_computed(np.full(shape, value, like.dtype), like)
            return jnp.full(shape, value, like.dtype)

        return put_back(tree, self.removed, self._shapes_with_removed(), make)

    def _shapes_with_removed(self) -> dict[str, tuple[int, ...]]:
        """Return the small shapes of all params, those of blocks that are taken out included."""
        return {path: self.small_shape(path) for path in self.shapes}

    def check(self, params: Any, what: str = "params") -> None:
        """Check that params have the plan's small shapes.

        Raises:
          ValueError: naming the leaf.
        """
        leaves = array_leaves(self.filled(params), what)
        if leaves.keys() != self.shapes.keys():
            raise ValueError(
                f"{what} has the leaves {', '.join(leaves)}; the plan is for {', '.join(self.shapes)}."
            )
        for path, leaf in leaves.items():
            if tuple(leaf.shape) != self.small_shape(path):
                raise ValueError(
                    f"{what}[{path!r}] has shape {tuple(leaf.shape)}; after compaction it has "
                    f"{self.small_shape(path)}. Pass small.params, or small.shrink(params)."
                )

    # Files

    def save(self, file: str | PathLike[str]) -> None:
        """Write the plan, whole or not at all, to a `.npz` file of small integer arrays, none of it code."""
        planfile.write(file, self)

    @classmethod
    def load(cls, file: str | PathLike[str]) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
          ValueError: the file is not a plan, or its indices do not fit its shapes.
        """
        return cls(**planfile.read(file))

    # Which leaves of a tree mirror a param

    def _map(
        self,
        tree: Any,
        shapes: Shapes,
        change: Callable[[Any, str, str], Any],
        name: str,
        where: Where | None,
    ) -> Any:
        """Apply `change(leaf, path, place)` to the leaves that mirror a param of such shapes."""
        # Masks of one bit per entry, which an optimizer's state may hold, are cut as bools and packed anew.
        given = restore_packed(
            tree, {path: jax.ShapeDtypeStruct(shape, bool) for path, shape in shapes.items()}
        )
        tree = unpack_masks(given)
        places, leaves = leaf_paths(tree), jax.tree.leaves(tree)
        if where is not None:
            check_function(where, f"{name}: where=", "of (path, leaf)")
        out, arrays, matched = [], [], False
        for place, leaf in zip(places, leaves, strict=True):
            path = self._longest_ending(place) if where is None or where(place, leaf) else None
            if path is not None and is_array(leaf) and ends_in(leaf, shapes[path]):
                leaf, matched = change(leaf, path, place), True
            elif path is not None and path in self.keep and getattr(leaf, "size", 1) > 1:
                raise ValueError(
                    f"{name}: {place} is {describe(leaf)}, which belongs to params[{path!r}] by its path but "
                    f"is not shaped like it, {shapes[path]}. Make it anew: tx.init(params)."
                )
            if getattr(leaf, "ndim", 0):
                arrays.append(place)
            out.append(leaf)
        if arrays and not matched:
            listed = ", ".join(f"{path} {shape}" for path, shape in shapes.items())
            raise ValueError(
                f"{name}: none of {', '.join(arrays)} ends in the path of a param and has its shape. The "
                f"params are {listed}.{self._advice(places, leaves, name)}"
            )
        return packed_like(jax.tree.unflatten(jax.tree.structure(tree), out), given)

    def _advice(self, places: list[str], leaves: list[Any], name: str) -> str:
        """Return what to call instead for a tree of a part of the params, as an optimizer sees them."""
        for prefix in dict.fromkeys(path.partition("/")[0] for path in self.shapes if "/" in path):
            part = self.under(prefix)
            shapes = part._shapes_with_removed() if name == "expand" else part.shapes
            owners = zip(map(part._longest_ending, places), leaves, strict=True)
            if any(p is not None and is_array(leaf) and ends_in(leaf, shapes[p]) for p, leaf in owners):
                return f" The tree is of the part under {prefix!r}: plan.under({prefix!r}).{name}(tree)."
        return ""

    def _longest_ending(self, place: str) -> str | None:
        """Return the longest path of a param that a leaf's path ends with.

        It decides alone, unlike in `match_leaves_to_params`, and the shape has to fit: a moment that is not
        shaped like its param is refused, and must not be cut like another param of a shorter path.
        """
        names = place.split("/")
        endings = ("/".join(names[start:]) for start in range(len(names) + 1))
        return next((ending for ending in endings if ending in self.shapes), None)


def _is_pruner_state(node: Any) -> bool:
    return isinstance(node, PrunerState)


def _mask_shapes(state: PrunerState) -> dict[str, tuple[int, ...]]:
    masks = jax.eval_shape(unpack_masks, state.masks)
    return {path: tuple(leaf.shape) for path, leaf in array_leaves(masks).items()}


def _with_dense_shapes(before: Any, after: Any) -> Any:
    """Return the smaller tree, in which the state of each pruner keeps the dense shapes of its masks."""

    def keep_shapes(old: Any, new: Any) -> Any:
        if not _is_pruner_state(old):
            return new
        shapes, smaller = _mask_shapes(old), _mask_shapes(new)
        # A second compaction counts from the first one's shapes.
        is_new = shapes != smaller and not isinstance(old.dense, DenseShapes)
        return new._replace(dense=DenseShapes(tuple(shapes.items()))) if is_new else new

    # Leaf by leaf, because packed masks are nodes whose shapes have changed.
    leaves, treedef = jax.tree.flatten(after, is_leaf=_is_pruner_state)
    olds = jax.tree.leaves(before, is_leaf=_is_pruner_state)
    return treedef.unflatten(map(keep_shapes, olds, leaves))
