"""A plan: which slices of which params stay. It moves any tree between the dense and the small."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.files.atomic import replacing
from jaxprune.graph.blocktrees import put_back, take_out
from jaxprune.graph.engine import placing
from jaxprune.graph.engine.rules.slices import take_slices
from jaxprune.graph.engine.shortening import Removed
from jaxprune.tracing.jaxprs import explicit_sharding
from jaxprune.tree.checks import check_function
from jaxprune.tree.leaves import array_leaves, describe, is_array
from jaxprune.tree.masks import packed_like, restore_packed, unpack_masks
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.stacks import Stacks, layer_indices, layer_name, layer_shape
from jaxprune.typing import DenseShapes, PrunerState, Where

_FORMAT = 2


@dataclass(frozen=True)
class Plan:
    """Which slices of which params stay.

    Attributes:
      shapes: the dense shape of every param, by path.
      keep: by path, for each axis that loses slices, the dense indices of those that stay, in order. The
        layers of a stacked param keep slices of their own, equally many: there the indices are an array
        with a row for each layer (layers x kept; with several stack axes, an axis for each).
      divisors: by path, the axes whose lost slices must not be zero, because the function divides by
        them: `expand` puts copies of the slices that stay, in turn, in their places.
      stacks: by path, the axes of stacked params that count layers. Layers that went whole are missing from
        the indices of that axis, and have no row in those of the others.
      removed: the paths of whole blocks that are taken out of their lists or dicts.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxprune as jp
      >>> plan = jp.Plan(shapes={"kernel": (2, 3)}, keep={"kernel": {1: np.array([0, 2])}})
      >>> small = plan.shrink({"kernel": jnp.arange(6.0).reshape(2, 3)})
      >>> small["kernel"].tolist(), plan.expand(small)["kernel"].tolist()
      ([[0.0, 2.0], [3.0, 5.0]], [[0.0, 0.0, 2.0], [3.0, 0.0, 5.0]])
    """

    shapes: Mapping[str, tuple[int, ...]]
    keep: Mapping[str, Mapping[int, np.ndarray]]
    divisors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stacks: Stacks = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def small_shape(self, path: str) -> tuple[int, ...]:
        """The shape of a param without the slices that go."""
        kept = self.keep.get(path, {})
        return tuple(kept[a].shape[-1] if a in kept else n for a, n in enumerate(self.shapes[path]))

    def by_layer(self) -> "Plan":
        """The same plan for the layers of stacked params as params of their own, named like "up[0]"."""
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
        """The params, and the layers of stacked ones, that go whole, by name."""
        if not self.removed and not any(
            axis in self.keep.get(p, {}) for p, a in self.stacks.items() for axis in a
        ):
            return Removed(frozenset(), frozenset())
        by_layer = self.by_layer()
        names = {
            name
            for name, kept in by_layer.keep.items()
            if len(kept) == len(by_layer.shapes[name]) > 0
            and not any(len(indices) for indices in kept.values())
        }
        return Removed(frozenset(names), frozenset(name for name in names if by_layer.divisors.get(name)))

    def dropped(self) -> dict[str, list[np.ndarray | None]]:
        """The slices that go, as a bool vector for each axis of each param; None for none.

        The layers of stacked params stand by themselves, named like "up[0]".
        """
        if self.stacks or self.removed:
            return self.by_layer().dropped()

        def gone(path: str, axis: int, size: int) -> np.ndarray | None:
            if axis not in self.keep.get(path, {}):
                return None
            vector = np.ones(size, bool)
            vector[self.keep[path][axis]] = False
            return vector

        return {p: [gone(p, axis, n) for axis, n in enumerate(s)] for p, s in self.shapes.items()}

    def zeros(self) -> dict[str, list[np.ndarray | None]]:
        """The slices that go and count as zero: all but the divisors, as `dropped` has them."""
        if self.stacks or self.removed:
            return self.by_layer().zeros()
        return {
            path: [None if axis in self.divisors.get(path, ()) else gone for axis, gone in enumerate(marks)]
            for path, marks in self.dropped().items()
        }

    def under(self, prefix: str) -> "Plan":
        """The plan for a part of the params: that of `params["params"]` is `plan.under("params")`.

        Raises:
          ValueError: no path has the prefix.
        """
        start = prefix.rstrip("/") + "/"

        def part(by_path: Mapping[str, Any]) -> dict[str, Any]:
            return {path.removeprefix(start): x for path, x in by_path.items() if path.startswith(start)}

        if not part(self.shapes):
            raise ValueError(f"no param lies under {prefix!r}; they are {', '.join(self.shapes)}.")
        removed = tuple(block.removeprefix(start) for block in self.removed if block.startswith(start))
        return Plan(part(self.shapes), part(self.keep), part(self.divisors), part(self.stacks), removed)

    def shrink(self, tree: Any, where: Where | None = None) -> Any:
        """A tree with the slices that go cut out of every part that mirrors a param.

        Args:
          tree: params, masks, gradients, or any optimizer's state. A leaf mirrors a param if its
            path ends with the param's and it has its shape, perhaps after axes of its own. What
            mirrors none (a step count) stays as it is.
          where: which leaves may mirror a param, a function of (path, leaf); by default all. What it
            leaves out stays as it is: a preconditioner shaped like a square param, say, as in
            `wrap_optax(state_where=)`. If its param gets smaller, make it anew with `tx.init`.

        Returns:
          The same tree with smaller leaves. The state of a pruner (`jaxprune.PrunerState`) keeps the dense
          shapes besides, so that what was cut out counts towards the pruner's target.

        Raises:
          ValueError: an array that belongs to a param that gets smaller, by its path, but has
            another shape (Adafactor's factored moments); or nothing in the tree mirrors a param.
        """

        def cut(leaf: Any, path: str, _: str) -> Any:
            lead = leaf.ndim - len(self.shapes[path])
            # Layers that go first, because the indices along other axes are of those that stay.
            for axis, kept in sorted(self.keep.get(path, {}).items(), key=lambda item: item[1].ndim):
                if kept.ndim == 1:
                    leaf = _take(leaf, lead + axis, kept)
                else:
                    leaf = _take_by_layer(leaf, lead, self.stacks[path], axis, kept)
            return leaf

        small = self._map(tree, lambda path: self.shapes[path], cut, "shrink", where)
        if self.removed:
            small = take_out(small, self.removed, self._small_shapes())
        return _with_dense_shapes(tree, small)

    def small_shapes(self) -> dict[str, tuple[int, ...]]:
        """By path, the shapes of the params that are left; without those of blocks that are taken out."""
        return {path: shape for path, shape in self._small_shapes().items() if not self._in_removed(path)}

    def _small_shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: self.small_shape(path) for path in self.shapes}

    def filled(self, tree: Any) -> Any:
        """A small tree with zeros (False) for the blocks that were taken out; ones for what is divided by."""
        if not self.removed:
            return tree

        def make(path: str, like: Any) -> Any:
            lead = like.ndim - len(self.shapes[path])
            shape = (*like.shape[:lead], *self.small_shape(path))
            if isinstance(like, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(shape, like.dtype)
            return jnp.full(shape, bool(self.divisors.get(path)), like.dtype)

        return put_back(tree, self.removed, self._small_shapes(), make)

    def expand(self, tree: Any, where: Where | None = None) -> Any:
        """The tree that `shrink` would make this one of, with zeros (False) where slices went.

        Where the function divides by what went (`divisors`), zeros would make it NaN, while any other
        values do not matter. Params (leaves at the path of a param, alone or below "params") have
        copies of the slices that stay there, in turn, and masks True; optimizer state has zeros.

        Args:
          tree: as for `shrink`, with small shapes.
          where: as for `shrink`.

        Returns:
          The same tree with dense leaves.

        Raises:
          ValueError: as `shrink`.
        """

        def spread(leaf: Any, path: str, place: str) -> Any:
            lead = leaf.ndim - len(self.shapes[path])
            mask = leaf.dtype == bool
            own = mask or place.removesuffix(path).rstrip("/").rpartition("/")[2] in ("", "params")
            divisors = self.divisors.get(path, ()) if own else ()
            # Divisors first: where a slice along another axis went as well, zero is what was proved.
            for axis, kept in sorted(
                self.keep.get(path, {}).items(), key=lambda item: (-item[1].ndim, item[0] not in divisors)
            ):
                if kept.ndim > 1:
                    size, stack = self.shapes[path][axis], self.stacks[path]
                    leaf = _spread_by_layer(leaf, lead, stack, axis, kept, size, axis in divisors)
                    continue
                size, places = self.shapes[path][axis], (slice(None),) * (lead + axis) + (kept,)
                if explicit_sharding(leaf) is not None:
                    number = None if axis in divisors and not mask else int(axis in divisors)
                    leaf = placing.spread(leaf, lead + axis, kept, size, number)
                    continue
                shape = (*leaf.shape[: lead + axis], size, *leaf.shape[lead + axis + 1 :])
                filling = jnp.zeros(shape, leaf.dtype)
                if axis in divisors:
                    # Each in its turn: what divides by the spread of a unit's slices needs different ones.
                    gone = np.setdiff1d(np.arange(size), kept)
                    turns = np.zeros(size, np.int32)
                    turns[gone] = np.arange(len(gone)) % len(kept)
                    copies = jnp.take(jnp.asarray(leaf), turns, axis=lead + axis)
                    filling = jnp.ones_like(filling) if mask else copies
                leaf = filling.at[places].set(leaf)
            return leaf

        dense = self._map(self.filled(tree), self.small_shape, spread, "expand", where)
        return jax.tree.map(
            lambda node: node._replace(dense=()) if _is_pruner_state(node) else node,
            dense,
            is_leaf=_is_pruner_state,
        )

    def _map(
        self,
        tree: Any,
        shape_of: Callable[[str], tuple[int, ...]],
        change: Any,
        name: str,
        where: Where | None,
    ) -> Any:
        """Applies `change(leaf, path, place)` to the leaves that mirror a param of such shapes."""
        # Masks of one bit per entry, which an optimizer's state may hold, are cut as bools and packed anew.
        given = restore_packed(
            tree, {path: jax.ShapeDtypeStruct(shape_of(path), bool) for path in self.shapes}
        )
        tree = unpack_masks(given)
        names, leaves = leaf_paths(tree), jax.tree.leaves(tree)
        if where is not None:
            check_function(where, f"{name}: where=", "of (path, leaf)")
        taken = [where is None or where(place, leaf) for place, leaf in zip(names, leaves, strict=True)]
        owners = [
            self._owner(place, leaf, shape_of) if may else None
            for place, leaf, may in zip(names, leaves, taken, strict=True)
        ]
        for leaf, owner, place, may in zip(leaves, owners, names, taken, strict=True):
            path = self._longest_ending(place) if may else None
            if owner is None and path is not None and path in self.keep and getattr(leaf, "size", 1) > 1:
                raise ValueError(
                    f"{name}: {place} is {describe(leaf)}, which belongs to params[{path!r}] by its path but "
                    f"is not shaped like it, {shape_of(path)}. Make it anew: tx.init(params)."
                )
        arrays = [place for place, leaf in zip(names, leaves, strict=True) if getattr(leaf, "ndim", 0)]
        if arrays and all(owner is None for owner in owners):
            shapes = ", ".join(f"{path} {shape_of(path)}" for path in self.shapes)
            raise ValueError(
                f"{name}: none of {', '.join(arrays)} ends in the path of a param and has its shape. The "
                f"params are {shapes}.{self._advice(names, leaves, name)}"
            )
        out = [
            leaf if owner is None else change(leaf, owner, place)
            for leaf, owner, place in zip(leaves, owners, names, strict=True)
        ]
        return packed_like(jax.tree.unflatten(jax.tree.structure(tree), out), given)

    def _advice(self, names: list[str], leaves: list[Any], name: str) -> str:
        """What to call instead for a tree of a part of the params, as an optimizer sees them."""
        for prefix in dict.fromkeys(path.partition("/")[0] for path in self.shapes if "/" in path):
            part = self.under(prefix)
            shape_of = part.small_shape if name == "expand" else part.shapes.__getitem__
            if any(part._owner(place, leaf, shape_of) for place, leaf in zip(names, leaves, strict=True)):
                return f" The tree is of the part under {prefix!r}: plan.under({prefix!r}).{name}(tree)."
        return ""

    def _longest_ending(self, where: str) -> str | None:
        """The param's path that a leaf's path ends with."""
        parts = where.split("/")
        endings = ("/".join(parts[start:]) for start in range(len(parts) + 1))
        return next((ending for ending in endings if ending in self.shapes), None)

    def _owner(self, where: str, leaf: Any, shape_of: Callable[[str], tuple[int, ...]]) -> str | None:
        """The param that a leaf mirrors."""
        path = self._longest_ending(where)
        if path is None or not is_array(leaf):
            return None
        shape = shape_of(path)
        return path if tuple(leaf.shape[leaf.ndim - len(shape) :]) == shape else None

    def save(self, file: str | PathLike[str]) -> None:
        """Writes the plan, whole or not at all, to a `.npz` file of small integer arrays, none of it code."""
        arrays: dict[str, Any] = {
            f"shape:{path}": np.asarray(shape, np.int64) for path, shape in self.shapes.items()
        }
        for path, axes in self.keep.items():
            arrays.update((f"keep {axis}:{path}", np.asarray(kept, np.int64)) for axis, kept in axes.items())
        arrays.update(
            (f"divisors:{path}", np.asarray(axes, np.int64)) for path, axes in self.divisors.items()
        )
        if self.removed:
            arrays["removed"] = np.array(self.removed, dtype=np.str_)
        arrays.update((f"stack:{path}", np.asarray(axes, np.int64)) for path, axes in self.stacks.items())
        with replacing(file) as new, new.open("wb") as stream:
            np.savez_compressed(stream, format=np.int64(_FORMAT), **arrays)

    @classmethod
    def load(cls, file: str | PathLike[str]) -> "Plan":
        """Reads a plan that `save` wrote.

        Raises:
          ValueError: the file is not a plan, or its indices do not fit its shapes.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        keep: dict[str, dict[int, np.ndarray]] = {}
        divisors: dict[str, tuple[int, ...]] = {}
        stacks: dict[str, tuple[int, ...]] = {}
        removed: tuple[str, ...] = ()
        with np.load(file, allow_pickle=False) as arrays:
            if "format" not in arrays or not 1 <= int(arrays["format"]) <= _FORMAT:
                raise ValueError(f"{file} is not a plan of format {_FORMAT} or lower.")
            for name in arrays.files:
                kind, _, path = name.partition(":")
                if kind == "shape":
                    shapes[path] = tuple(arrays[name].tolist())
                elif kind.startswith("keep "):
                    keep.setdefault(path, {})[int(kind.removeprefix("keep "))] = arrays[name]
                elif kind == "divisors":
                    divisors[path] = tuple(arrays[name].ravel().tolist())
                elif name == "removed":
                    removed = tuple(arrays[name].tolist())
                elif kind == "stack":
                    stacks[path] = tuple(arrays[name].ravel().tolist())
        plan = cls(shapes, keep, divisors, stacks, removed)
        for path, axes in divisors.items():
            if not (set(axes) <= set(keep.get(path, {})) or plan._in_removed(path)):
                raise ValueError(f"{file}: the divisors of {path} are on axes {axes}, which lose no slices.")
        for path, axes in keep.items():
            for axis, kept in axes.items():
                size = shapes[path][axis] if path in shapes and axis < len(shapes[path]) else 0
                stack = () if axis in stacks.get(path, ()) else stacks.get(path, ())
                # Rows are of the layers that stay.
                rows = tuple(len(axes[a]) if a in axes else shapes[path][a] for a in stack) if size else ()
                sorted_once = kept.shape[:-1] == rows and kept.size > 0 and bool((np.diff(kept) > 0).all())
                if not (sorted_once and kept.min() >= 0 and kept.max() < size):
                    raise ValueError(f"{file}: the indices of {path}, axis {axis}, do not fit size {size}.")
        return plan

    def check(self, params: Any, what: str = "params") -> None:
        """Checks that params have the plan's small shapes.

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


def _is_pruner_state(node: Any) -> bool:
    return isinstance(node, PrunerState)


def _mask_shapes(state: PrunerState) -> dict[str, tuple[int, ...]]:
    masks = jax.eval_shape(unpack_masks, state.masks)
    return {path: tuple(leaf.shape) for path, leaf in array_leaves(masks).items()}


def _with_dense_shapes(before: Any, after: Any) -> Any:
    """The smaller tree, with the shapes of before in each pruner's state whose masks became smaller."""

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


def _places_by_layer(rank: int, lead: int, stack: Sequence[int], axis: int, rows: np.ndarray) -> jax.Array:
    """Indices along an axis, a row for each layer, laid out for an array of a rank.

    `lead` axes come before those of the param; `stack` and `axis` are counted among the latter.
    """
    shape = [1] * rank
    order = sorted(range(len(stack)), key=lambda n: stack[n])
    for each in order:
        shape[lead + stack[each]] = rows.shape[each]
    rows = np.moveaxis(rows, list(order), range(len(order)))
    # The axis itself stands where it is among those that count layers.
    before = sum(each < axis for each in stack)
    rows = np.moveaxis(rows, -1, before)
    shape[lead + axis] = rows.shape[before]
    return jnp.asarray(rows.reshape(shape).astype(np.int32))


def _take_by_layer(leaf: Any, lead: int, stack: Sequence[int], axis: int, kept: np.ndarray) -> Any:
    """The slices that each layer keeps."""
    flat = kept.reshape(-1, kept.shape[-1])
    if (flat == flat[0]).all():
        return _take(leaf, lead + axis, flat[0])
    places = _places_by_layer(leaf.ndim, lead, stack, axis, kept)
    return placing.apply_replicated(
        leaf, lambda leaf: jnp.take_along_axis(leaf, places, axis=lead + axis, mode="clip")
    )


def _spread_by_layer(
    leaf: Any, lead: int, stack: Sequence[int], axis: int, kept: np.ndarray, size: int, is_divisor: bool
) -> Any:
    """The dense array of the slices that each layer keeps, with zeros between; with copies, of a divisor."""
    count, is_mask = kept.shape[-1], leaf.dtype == bool
    rows = np.full((*kept.shape[:-1], size), count)
    for index in np.ndindex(*kept.shape[:-1]):
        rows[index][kept[index]] = np.arange(count)
        if is_divisor and not is_mask:
            gone = np.setdiff1d(np.arange(size), kept[index])
            rows[index][gone] = np.arange(len(gone)) % count
    places = _places_by_layer(leaf.ndim, lead, stack, axis, rows)

    def spread(leaf: Any) -> Any:
        # One slice more than there are is what goes in the place of those that went.
        filler = jnp.full_like(lax.slice_in_dim(leaf, 0, 1, axis=lead + axis), is_divisor and is_mask)
        longer = jnp.concatenate([leaf, filler], lead + axis)
        return jnp.take_along_axis(longer, places, axis=lead + axis, mode="clip")

    return placing.apply_replicated(leaf, spread)


def _take(leaf: Any, axis: int, kept: np.ndarray) -> Any:
    """Slices of an array that may be sharded along the axis.

    Where shardings are part of types (explicit mesh axes), the axis is gathered first, and sharded
    again if its new size allows.
    """
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    spec = () if sharding is None else tuple(sharding.spec)
    if sharding is None or axis >= len(spec) or spec[axis] is None:
        return take_slices(leaf, axis, kept)

    def sharded(array: Any, along: Any) -> Any:
        spec_there = PartitionSpec(*spec[:axis], along, *spec[axis + 1 :])
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec_there))

    cut = take_slices(sharded(leaf, None), axis, kept)
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    return sharded(cut, spec[axis]) if len(kept) % parts == 0 else cut
