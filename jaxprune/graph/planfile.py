"""The file of a plan: a `.npz` archive of small integer arrays, none of it code."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from jaxprune.files.atomic import replacing

_FORMAT = 2


def write(file: str | PathLike[str], plan: Any) -> None:
    """Write a `Plan` to a file, whole or not at all."""
    arrays: dict[str, Any] = _named("shape", plan.shapes)
    for path, axes in plan.keep.items():
        arrays.update((f"keep {axis}:{path}", np.asarray(kept, np.int64)) for axis, kept in axes.items())
    arrays |= _named("divisors", plan.divisors)
    if plan.removed:
        arrays["removed"] = np.array(plan.removed, dtype=np.str_)
    arrays |= _named("stack", plan.stacks)
    with replacing(file) as new, new.open("wb") as stream:
        np.savez_compressed(stream, format=np.int64(_FORMAT), **arrays)


def _named(kind: str, by_path: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {f"{kind}:{path}": np.asarray(value, np.int64) for path, value in by_path.items()}


def read(file: str | PathLike[str]) -> dict[str, Any]:
    """Return the fields of the `Plan` in a file, by name.

    Raises:
      ValueError: the file is not a plan, or its indices do not fit its shapes.
    """
    tuples: dict[str, dict[str, tuple[int, ...]]] = {"shape": {}, "divisors": {}, "stack": {}}
    shapes, divisors, stacks = tuples.values()
    keep: dict[str, dict[int, np.ndarray]] = {}
    removed: tuple[str, ...] = ()
    with np.load(file, allow_pickle=False) as arrays:
        if "format" not in arrays or not 1 <= int(arrays["format"]) <= _FORMAT:
            raise ValueError(f"{file} is not a plan of format {_FORMAT} or lower.")
        for name in arrays.files:
            kind, _, path = name.partition(":")
            if name == "removed":
                removed = tuple(arrays[name].tolist())
            elif kind.startswith("keep "):
                keep.setdefault(path, {})[int(kind.removeprefix("keep "))] = arrays[name]
            elif kind in tuples:
                tuples[kind][path] = tuple(arrays[name].ravel().tolist())
    fields = {"shapes": shapes, "keep": keep, "divisors": divisors, "stacks": stacks, "removed": removed}
    try:
        check(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return fields


def check(fields: Mapping[str, Any]) -> None:
    """Check the fields of a `Plan` against each other.

    Raises:
      ValueError: its indices do not fit its shapes.
    """
    shapes, keep, divisors, stacks, removed = (
        fields[name] for name in ("shapes", "keep", "divisors", "stacks", "removed")
    )
    for path, axes in divisors.items():
        in_removed = any(path.startswith(f"{block}/") for block in removed)
        if not (set(axes) <= set(keep.get(path, {})) or in_removed):
            raise ValueError(f"the divisors of {path} are on axes {axes}, which lose no slices.")
    for path, axes in keep.items():
        shape, stack = shapes.get(path, ()), stacks.get(path, ())
        for axis, kept in axes.items():
            size = shape[axis] if axis < len(shape) else 0
            # A row for each layer that stays; the axes that count layers have one row themselves.
            layers = [] if axis in stack or not size else [len(axes.get(a, range(shape[a]))) for a in stack]
            ascending = kept.shape[:-1] == (*layers,) and kept.size > 0 and bool((np.diff(kept) > 0).all())
            if not (ascending and kept.min() >= 0 and kept.max() < size):
                raise ValueError(f"the indices of {path}, axis {axis}, do not fit size {size}.")
