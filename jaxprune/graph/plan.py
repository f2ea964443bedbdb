"""A plan: which slices of which params stay. It moves any tree between the dense and the small."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.graph.rules.slices import take
from jaxprune.io.atomic import replacing
from jaxprune.paths import array_leaves, describe, is_array, leaf_paths

_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Which slices of which params stay.

    Attributes:
      shapes: the dense shape of every param, by path.
      keep: by path, for each axis that loses slices, the dense indices of those that stay, in order.
      divisors: by path, the axes whose lost slices must not be zero, because the function divides by
        them: `expand` puts copies of the first slice that stays in their places.

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

    def small_shape(self, path: str) -> tuple[int, ...]:
        """The shape of a param without the slices that go."""
        kept = self.keep.get(path, {})
        return tuple(len(kept[a]) if a in kept else n for a, n in enumerate(self.shapes[path]))

    def dropped(self) -> dict[str, list[np.ndarray | None]]:
        """The slices that go, as a bool vector for each axis of each param; None for none."""

        def gone(path: str, axis: int, size: int) -> np.ndarray | None:
            if axis not in self.keep.get(path, {}):
                return None
            vector = np.ones(size, bool)
            vector[self.keep[path][axis]] = False
            return vector

        return {p: [gone(p, axis, n) for axis, n in enumerate(s)] for p, s in self.shapes.items()}

    def zeros(self) -> dict[str, list[np.ndarray | None]]:
        """The slices that go and count as zero: all but the divisors, as `dropped` has them."""
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
        return Plan(part(self.shapes), part(self.keep), part(self.divisors))

    def shrink(self, tree: Any) -> Any:
        """A tree with the slices that go cut out of every part that mirrors a param.

        Args:
          tree: params, masks, gradients, or any optimizer's state. A leaf mirrors a param if its
            path ends with the param's and it has its shape, perhaps after axes of its own. What
            mirrors none (a step count) stays as it is.

        Returns:
          The same tree with smaller leaves.

        Raises:
          ValueError: an array that belongs to a param that gets smaller, by its path, but has
            another shape (Adafactor's factored moments); or nothing in the tree mirrors a param.
        """

        def cut(leaf: Any, path: str, _: str) -> Any:
            lead = leaf.ndim - len(self.shapes[path])
            for axis, kept in self.keep.get(path, {}).items():
                leaf = _take(leaf, lead + axis, kept)
            return leaf

        return self._map(tree, lambda path: self.shapes[path], cut, "shrink")

    def expand(self, tree: Any) -> Any:
        """The tree that `shrink` would make this one of, with zeros (False) where slices went.

        Where the function divides by what went (`divisors`), zeros would make it NaN, while any other
        values do not matter. Params (leaves at the path of a param, alone or below "params") have
        copies of the first slice that stays there, and masks True; optimizer state has zeros.

        Args:
          tree: as for `shrink`, with small shapes.

        Returns:
          The same tree with dense leaves.

        Raises:
          ValueError: as `shrink`.
        """

        def spread(leaf: Any, path: str, where: str) -> Any:
            lead = leaf.ndim - len(self.shapes[path])
            mask = leaf.dtype == bool
            own = mask or where.removesuffix(path).rstrip("/").rpartition("/")[2] in ("", "params")
            divisors = self.divisors.get(path, ()) if own else ()
            # Divisors first: where a slice along another axis went as well, zero is what was proved.
            for axis, kept in sorted(
                self.keep.get(path, {}).items(), key=lambda item: item[0] not in divisors
            ):
                size, places = self.shapes[path][axis], (slice(None),) * (lead + axis) + (kept,)
                shape = (*leaf.shape[: lead + axis], size, *leaf.shape[lead + axis + 1 :])
                filling = jnp.zeros(shape, leaf.dtype)
                if axis in divisors:
                    first = lax.slice_in_dim(jnp.asarray(leaf), 0, 1, axis=lead + axis)
                    filling = jnp.ones_like(filling) if mask else jnp.broadcast_to(first, shape)
                leaf = filling.at[places].set(leaf)
            return leaf

        return self._map(tree, self.small_shape, spread, "expand")

    def _map(self, tree: Any, shape_of: Callable[[str], tuple[int, ...]], change: Any, name: str) -> Any:
        """Applies `change(leaf, path, where)` to the leaves that mirror a param of such shapes."""
        names, leaves = leaf_paths(tree), jax.tree.leaves(tree)
        owners = [self._owner(where, leaf, shape_of) for where, leaf in zip(names, leaves, strict=True)]
        for leaf, owner, where in zip(leaves, owners, names, strict=True):
            path = self._longest_ending(where)
            if owner is None and path is not None and path in self.keep and getattr(leaf, "size", 1) > 1:
                raise ValueError(
                    f"{name}: {where} is {describe(leaf)}, which belongs to params[{path!r}] by its path but "
                    f"is not shaped like it, {shape_of(path)}. Make it anew: tx.init(params)."
                )
        arrays = [where for where, leaf in zip(names, leaves, strict=True) if getattr(leaf, "ndim", 0)]
        if arrays and all(owner is None for owner in owners):
            shapes = ", ".join(f"{path} {shape_of(path)}" for path in self.shapes)
            raise ValueError(
                f"{name}: none of {', '.join(arrays)} ends in the path of a param and has its shape. The "
                f"params are {shapes}. For a part of the params, as an optimizer sees them: "
                "plan.under('params')."
            )
        out = [
            leaf if owner is None else change(leaf, owner, where)
            for leaf, owner, where in zip(leaves, owners, names, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), out)

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
        with np.load(file, allow_pickle=False) as arrays:
            if "format" not in arrays or int(arrays["format"]) != _FORMAT:
                raise ValueError(f"{file} is not a plan of format {_FORMAT}.")
            for name in arrays.files:
                kind, _, path = name.partition(":")
                if kind == "shape":
                    shapes[path] = tuple(arrays[name].tolist())
                elif kind.startswith("keep "):
                    keep.setdefault(path, {})[int(kind.removeprefix("keep "))] = arrays[name]
                elif kind == "divisors":
                    divisors[path] = tuple(arrays[name].ravel().tolist())
        plan = cls(shapes, keep, divisors)
        for path, axes in divisors.items():
            if not set(axes) <= set(keep.get(path, {})):
                raise ValueError(f"{file}: the divisors of {path} are on axes {axes}, which lose no slices.")
        for path, axes in keep.items():
            for axis, kept in axes.items():
                size = shapes[path][axis] if path in shapes and axis < len(shapes[path]) else 0
                sorted_once = kept.ndim == 1 and kept.size > 0 and bool((np.diff(kept) > 0).all())
                if not (sorted_once and kept[0] >= 0 and kept[-1] < size):
                    raise ValueError(f"{file}: the indices of {path}, axis {axis}, do not fit size {size}.")
        return plan

    def check(self, params: Any, what: str = "params") -> None:
        """Checks that params have the plan's small shapes.

        Raises:
          ValueError: naming the leaf.
        """
        leaves = array_leaves(params, what)
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


def _take(leaf: Any, axis: int, kept: np.ndarray) -> Any:
    """Slices of an array that may be sharded along the axis.

    Where shardings are part of types (explicit mesh axes), the axis is gathered first, and sharded
    again if its new size allows.
    """
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    spec = () if sharding is None else tuple(sharding.spec)
    if sharding is None or axis >= len(spec) or spec[axis] is None:
        return take(leaf, axis, kept)

    def sharded(array: Any, along: Any) -> Any:
        spec_there = PartitionSpec(*spec[:axis], along, *spec[axis + 1 :])
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec_there))

    cut = take(sharded(leaf, None), axis, kept)
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    return sharded(cut, spec[axis]) if len(kept) % parts == 0 else cut
