"""How many units go: sparsities, counts and thresholds, for all that is ranked together.

Units come in pools: leaves, or groups of coupled channels. A scope says which pools are ranked
together, a rank; every count is one per rank.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.schedules import check_sparsity
from jaxprune.selection.exact import removed_count
from jaxprune.selection.search import count_true
from jaxprune.structures import Structure, Units
from jaxprune.tree.checks import scalar, shown
from jaxprune.tree.leaves import is_array, is_concrete
from jaxprune.tree.stacks import Family
from jaxprune.typing import PerPath

Counts = Mapping[str, Any]
"""By rank, how many units go: integers, or traced scalars."""

Competing = Mapping[str, tuple[str, ...]]
"""By name, the pools that are ranked together."""

SCOPES = ("global", "layerwise", "isomorphic")
_TOGETHER = "all leaves together"


class LayerOf(NamedTuple):
    """The place of a target in an array of one for each layer.

    Attributes:
      path: the stacked leaf, or stack of coupled channels, that the array is for.
      shape: the array's shape.
      index: the place in it.
    """

    path: str
    shape: tuple[int, ...]
    index: tuple[int, ...]


def competing_pools(pools: Iterable[str], structure: Structure, scope: str) -> dict[str, tuple[str, ...]]:
    """Which pools are ranked together.

    Raises:
      ValueError: `scope="isomorphic"` for a structure whose pools have no kinds.
    """
    names = tuple(pools)
    if scope == "global":
        return {_TOGETHER: names}
    if scope == "layerwise":
        return {name: (name,) for name in names}
    if not structure.kinds:
        raise ValueError(
            f"scope='isomorphic' ranks coupled channels of one kind together, and {structure.name} has no "
            "kinds. Pass structure=jaxprune.structures.channels(groups), or another scope."
        )
    by_kind: dict[str, tuple[str, ...]] = {}
    for name in names:
        kind = structure.kinds[name]
        by_kind[kind] = (*by_kind.get(kind, ()), name)
    return by_kind


def competing_sizes(sizes: Mapping[str, int], competing: Competing) -> dict[str, int]:
    """How many units each rank has, from how many each pool has."""
    return {rank: sum(sizes[name] for name in names) for rank, names in competing.items()}


def floors(pools: Iterable[str], structure: Structure, floor: int) -> dict[str, int]:
    """How many units of each pool stay at least.

    That is 0 for n:m structures: pruning all their units empties no leaf.
    """
    if structure.max_sparsity < 1:
        floor = 0
    return {name: max(floor, structure.floors.get(name, 0)) for name in pools}


def target_counts(
    sparsity: float | PerPath, sizes: Mapping[str, int], structure: Structure, scope: str
) -> dict[str, int]:
    """How many units a sparsity removes from ranks of the given sizes.

    Raises:
      ValueError: a sparsity outside [0, 1) or above what the structure can remove, an unknown
        path, or a sparsity per path with `scope="global"`.
    """

    def part(value: Any, size: int, what: str) -> int:
        value = check_sparsity(value, what)
        fraction = value / structure.max_sparsity
        if fraction > 1 + 1e-12:
            raise ValueError(
                f"{structure.name} removes at most {structure.max_sparsity:g} of the entries, "
                f"got {what}={value:g}."
            )
        return removed_count(min(fraction, 1.0), size)

    by_rank = per_pool(sparsity, sizes, "sparsity", 0.0, scope)
    named = isinstance(sparsity, Mapping)
    return {
        name: part(by_rank[name], size, f"sparsity[{name!r}]" if named else "sparsity")
        for name, size in sizes.items()
    }


def taken_apart(targets: Any, what: str) -> Any:
    """A dict of targets by path with each array of targets taken apart, by `LayerOf`; else what it is.

    Raises:
      TypeError: a list that holds something else than numbers.
    """
    if not isinstance(targets, Mapping):
        return targets
    apart: dict[Any, Any] = {}
    for path, value in targets.items():
        if isinstance(value, (list, tuple)):
            try:
                value = np.asarray(value)
            except ValueError:
                value = np.asarray(None)
            if value.dtype.kind not in "iuf":
                raise TypeError(
                    f"{what}[{path!r}] is {shown(targets[path])}; the targets of a stack's layers are an "
                    "array of numbers."
                )
        if not is_array(value) or not value.shape:
            apart[path] = value
            continue
        concrete = np.asarray(value) if is_concrete(value) else value
        for index in np.ndindex(*value.shape):
            each: Any = concrete[index]
            apart[LayerOf(path, value.shape, index)] = each.item() if is_concrete(each) else each
    return apart


def by_layer(targets: Any, families: Mapping[str, Family], what: str) -> Any:
    """Targets that `taken_apart` gives, with one for each layer in place of those for a whole stack.

    The target of a layer, by its name, comes before that of the stack.

    Raises:
      ValueError: an array of another shape than the stack has, or for what is no stack.
    """
    if not isinstance(targets, Mapping) or not (families or any(isinstance(k, LayerOf) for k in targets)):
        return targets
    layers: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in targets.items():
        path = key.path if isinstance(key, LayerOf) else key
        family = families.get(path)
        if isinstance(key, LayerOf):
            if family is None:
                raise ValueError(
                    f"{what}[{path!r}] has shape {key.shape}, but it is not stacked, so it has one target: "
                    "pass a number, or say by stacked= which axes of the leaf count layers."
                )
            if key.shape != family.shape:
                raise ValueError(
                    f"{what}[{path!r}] has shape {key.shape}, but its stack has the shape {family.shape}: "
                    "pass one target for each layer, or a number for all of them."
                )
            layers[family.names[int(np.ravel_multi_index(key.index, key.shape))]] = value
        elif family is not None:
            layers |= dict.fromkeys(family.names, value)
        else:
            others[path] = value
    return layers | others


def per_pool(
    value: Any, pools: Mapping[str, Any], what: str, default: Any, scope: str = "layerwise"
) -> dict[str, Any]:
    """A value for each pool or rank, from one value or from a dict by path.

    Raises:
      ValueError: a path that takes no part, an empty dict, or any dict with `scope="global"`.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(pools, value)
    if scope == "global":
        raise ValueError(f"a {what} per path needs scope='layerwise': each leaf has its own target.")
    if unknown := [path for path in value if path not in pools]:
        raise ValueError(
            f"{what} names {', '.join(map(repr, unknown))}, which where= does not take in. "
            f"The paths that take part: {', '.join(pools)}."
        )
    if not value:
        raise ValueError(f"{what} is an empty dict, so nothing would be pruned.")
    return {name: value.get(name, default) for name in pools}


def pool_sizes(units: Units) -> dict[str, int]:
    """How many units each pool has, those that are pruned included."""
    return {name: alive.size for name, alive in units.alive.items()}


def sparsity_counts(
    sparsity: Any, units: Units, structure: Structure, competing: Competing, scope: str, of: str
) -> Counts:
    """How many units a sparsity removes, of the total, those pruned before included, or of what remains.

    Raises:
      TypeError: `of="remaining"` under masks that are traced.
    """
    if of == "total":
        sizes = competing_sizes(pool_sizes(units), competing)
        return target_counts(sparsity, sizes, structure, scope)
    if not is_concrete(units.alive):
        raise TypeError(
            "of='remaining' counts what is left on the host, but the masks are traced. Under jit use "
            "jaxprune.pruner(..., of='remaining'), or pass count=, which may be traced."
        )
    left = alive_counts(units)
    return target_counts(sparsity, competing_sizes(left, competing), structure, scope)


def alive_counts(units: Units) -> dict[str, int]:
    """How many units of each pool are left."""
    with jax.ensure_compile_time_eval():  # a traced function may have closed over the masks
        return {name: int(jnp.sum(alive)) for name, alive in units.alive.items()}


def checked_counts(count: Any, units: Units, competing: Competing, scope: str) -> Counts:
    """Counts as they were passed in, checked.

    Raises:
      ValueError: a count out of range, an unknown path, a dict with `scope="global"`.
      TypeError: a count that is no integer.
    """
    sizes = competing_sizes(pool_sizes(units), competing)
    by_rank = per_pool(count, sizes, "count", 0, scope)
    for name, number in by_rank.items():
        numeric = isinstance(number, (int, float, np.number)) or (is_array(number) and number.shape == ())
        if (
            isinstance(number, bool)
            or not numeric
            or not jnp.issubdtype(jnp.result_type(number), jnp.integer)
        ):
            what = f"count[{name!r}]" if isinstance(count, Mapping) else "count"
            raise TypeError(f"{what} must be an integer, got {number!r}; for a fraction pass sparsity=...")
        if is_concrete(number) and not 0 <= int(number) <= sizes[name]:
            raise ValueError(f"count={number} is out of range: {name} has {sizes[name]} units to remove.")
    return by_rank


def threshold_counts(threshold: Any, units: Units) -> Counts:
    """How many units of each pool score below a threshold.

    Raises:
      ValueError: a threshold that is NaN, or an unknown path.
    """
    bounds = per_pool(threshold, units.scores, "threshold", -jnp.inf)
    for name, bound in bounds.items():
        value = scalar(bound, "threshold")
        if value is not None and math.isnan(value):
            raise ValueError(f"threshold is nan for {name}: no score is below it.")
        if isinstance(bound, int) and not -(2**63) <= bound < 2**63:
            raise ValueError(f"threshold={bound} for {name} is beyond all integers that scores can be.")
    with jax.numpy_dtype_promotion("standard"):  # on purpose: a threshold may have its param's dtype
        below = {name: scores < bounds[name] for name, scores in units.scores.items()}
    return {name: count_true(units.alive[name] & below[name]) for name in below}
