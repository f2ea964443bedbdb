"""How many units are removed: sparsities, counts and thresholds, for all pools that compete.

Units come in pools: leaves, or groups of coupled channels. A scope says which pools compete, that is, from
which of them a count takes the lowest units of all. There is one count for each set of competing pools.
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.schedules import check_sparsity
from jaxprune.selection.exact import removed_count
from jaxprune.selection.search import count_true
from jaxprune.structures.base import Structure, Units
from jaxprune.tree.checks import as_integer, is_traced_integer, scalar, shown
from jaxprune.tree.dtypes import is_narrow
from jaxprune.tree.host import num_true
from jaxprune.tree.leaves import is_array, is_concrete
from jaxprune.tree.stacks import Family
from jaxprune.tree.widths import Multiple, round_down, round_up
from jaxprune.typing import PerPath

Counts = Mapping[str, Any]
"""By set of competing pools, how many units are removed: integers, or traced scalars."""

Competing = Mapping[str, tuple[str, ...]]
"""By name, the sets of pools that compete."""

SCOPES = ("global", "layerwise", "isomorphic", "output")
_ALL = "all leaves together"


class Target(NamedTuple):
    """How many units to remove from which pools.

    Attributes:
      competing: the sets of pools that compete.
      counts: by set, how many units are removed: fewer where the floors do not allow so many.
      floors: by pool, how many units stay at least.
      includes_pruned: whether the counts include units that are pruned already.
      equal: by name, the stacks of which each layer keeps equally many units, the number nearest to what its
        layers would keep together.
      inputs: with scope="output", by pool the axes of its units that the inputs of an output lie along. The
        counts and the floors are then those of each output; a count may be an array of one for each, with
        size 1 along these axes.
    """

    competing: Competing
    counts: Counts
    floors: Mapping[str, int]
    includes_pruned: bool = False
    equal: Mapping[str, Family] = MappingProxyType({})
    inputs: Mapping[str, tuple[int, ...]] = MappingProxyType({})


class LayerOf(NamedTuple):
    """The place of a target in an array that has one for each layer.

    Attributes:
      path: the stacked leaf, or stack of coupled channels, that the array is for.
      shape: the array's shape.
      index: the place in it.
    """

    path: str
    shape: tuple[int, ...]
    index: tuple[int, ...]


def target_of(
    what: str, value: Any, units: Units, structure: Structure, scope: str, of: str, floor: int
) -> Target:
    """Count the units that a sparsity, a count or a threshold removes."""
    # A threshold is the same for all, so every pool has a count of its own.
    competing = competing_pools(units.scores, structure, "layerwise" if what == "threshold" else scope)
    value = by_layer(taken_apart(value, what), units.families, what)
    if what == "sparsity":
        counts = sparsity_counts(value, units, structure, competing, scope, of)
    elif what == "count":
        counts = checked_counts(value, units, structure, competing, scope)
    else:
        counts = threshold_counts(value, units)
    return Target(
        competing,
        counts,
        floors(units.scores, structure, floor),
        includes_pruned=what == "sparsity" and of == "total",
        equal=equal_families(units.families, scope),
        inputs=structure.inputs,
    )


def competing_pools(pools: Iterable[str], structure: Structure, scope: str) -> dict[str, tuple[str, ...]]:
    """Return the sets of pools that compete under a scope, by name.

    With scope="output" the inputs of one output compete. All outputs of a leaf have the same count, so there
    is one set for each pool.
    """
    names = tuple(pools)
    if scope == "global":
        return {_ALL: names}
    if scope == "output" and not structure.keeps_axes:
        raise ValueError(
            "scope='output' takes the same number of entries, N:M groups or blocks from the inputs of each "
            f"output; the units of {structure.name} are not the inputs of one output. Pass structure="
            "jaxprune.structures.elements(), nm or blocks, or scope='layerwise'."
        )
    if scope in ("layerwise", "output"):
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
    """Return how many units each set of competing pools has, from how many each pool has."""
    return {name: sum(map(sizes.__getitem__, pools)) for name, pools in competing.items()}


def floors(pools: Iterable[str], structure: Structure, floor: int) -> dict[str, int]:
    """Return how many units of each pool stay at least.

    That is 0 for n:m structures: pruning all their units empties no leaf.
    """
    if structure.max_sparsity < 1:
        floor = 0
    return {name: max(floor, structure.floors.get(name, 0)) for name in pools}


def equal_families(families: Mapping[str, Family], scope: str) -> dict[str, Family]:
    """Return the stacks of coupled channels that keep equally many units in each layer under a scope."""
    return {name: family for name, family in families.items() if family.equal and scope != "layerwise"}


def kept_in_each(kept: Any, alive: Any, floor: int, multiple_of: Multiple) -> Any:
    """Return how many units each layer of a stack keeps, so that all keep equally many.

    That is the mean of what they would keep, rounded half to even, then up to a multiple or width. What is
    pruned never comes back, so it is at most what the layer with the fewest has left.

    Args:
      kept: how many units each layer would keep, an array of NumPy or of JAX.
      alive: how many units each layer has left.
      floor: how many each keeps at least; a layer that has fewer left keeps those.
      multiple_of: the multiple, or the widths.

    Example:
      >>> import numpy as np
      >>> from jaxprune.pruning.targets import kept_in_each
      >>> [int(kept_in_each(np.array(kept), np.array([9, 9]), 2, 1)) for kept in ([5, 2], [0, 1], [7, 6])]
      [4, 2, 6]
    """
    xp: Any = np if isinstance(kept, np.ndarray) else jnp
    # The mean is q + r / n with 0 <= r < n, so it is rounded up if 2 r > n, and if 2 r = n where q is odd:
    # half to even in integers, as the counts of a sparsity are, and also where they are traced.
    mean, rest = xp.divmod(xp.sum(kept, dtype=kept.dtype), len(kept))
    mean = mean + ((2 * rest > len(kept)) | ((2 * rest == len(kept)) & (mean % 2 == 1)))
    fewest, most = xp.min(alive), xp.max(alive)
    up = round_up(xp.maximum(mean, floor), multiple_of)
    # Where `up` is more than some layer has left, all keep the largest multiple that every layer has, `down`.
    # There are two exceptions, in which they keep `fewest` instead: nothing was pruned unequally, so that all
    # of it is what the network has now, multiple or not; or `down` is below the floor.
    down = round_down(fewest, multiple_of)
    within = xp.where((fewest == most) | (down < floor), fewest, down)
    # If even `fewest` is below the floor, the layers that have more keep the floor, the others all they have:
    # the caller removes max(alive - number, 0) of each.
    return xp.maximum(xp.where(up <= fewest, up, within), xp.minimum(floor, most))


def target_counts(
    sparsity: float | PerPath, sizes: Mapping[str, int], structure: Structure, scope: str
) -> dict[str, int]:
    """Count the units that a sparsity removes from sets of competing pools of the given sizes."""

    def count(value: Any, size: int, what: str) -> int:
        value = check_sparsity(value, what)
        fraction = value / structure.max_sparsity
        if fraction > 1 + 1e-12:
            raise ValueError(
                f"{structure.name} removes at most {structure.max_sparsity:g} of the entries, "
                f"got {what}={value:g}."
            )
        return removed_count(min(fraction, 1.0), size)

    values = per_pool(sparsity, sizes, "sparsity", 0.0, scope)
    named = isinstance(sparsity, Mapping)
    return {
        name: count(values[name], size, f"sparsity[{name!r}]" if named else "sparsity")
        for name, size in sizes.items()
    }


def taken_apart(targets: Any, what: str) -> Any:
    """Take each array in a dict of targets by path apart, into targets by `LayerOf`.

    Targets that are not a dict are returned unchanged.
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
            target: Any = concrete[index]
            apart[LayerOf(path, value.shape, index)] = target.item() if is_concrete(target) else target
    return apart


def by_layer(targets: Any, families: Mapping[str, Family], what: str) -> Any:
    """Replace the targets of stacks, as `taken_apart` returns them, by a target for each layer.

    A target that names a layer comes before that of its stack.
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
    """Return a value for each pool, or set of competing pools, from one value or from a dict by path."""
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


def pool_sizes(alive: Mapping[str, Any], inputs: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return how many units each pool has, pruned ones included; with `inputs`, how many each output has."""
    if inputs:
        return {name: math.prod(alive[name].shape[axis] for axis in inputs[name]) for name in alive}
    return {name: units.size for name, units in alive.items()}


def sparsity_counts(
    sparsity: Any, units: Units, structure: Structure, competing: Competing, scope: str, of: str
) -> Counts:
    """Count the units that a sparsity removes: of the total, pruned ones included, or of what remains."""
    if of == "total":
        sizes = competing_sizes(pool_sizes(units.alive, structure.inputs), competing)
        return target_counts(sparsity, sizes, structure, scope)
    if not is_concrete(units.alive):
        raise TypeError(
            "of='remaining' counts what is left on the host, but the masks are traced. Under jit use "
            "jaxprune.pruner(..., of='remaining'), or pass count=, which may be traced."
        )
    left = alive_counts(units)
    return target_counts(sparsity, competing_sizes(left, competing), structure, scope)


def alive_counts(units: Units) -> dict[str, int]:
    """Count the units of each pool that are left."""
    with jax.ensure_compile_time_eval():  # a traced function may have closed over the masks
        return dict(zip(units.alive, num_true(units.alive.values()), strict=True))


def checked_counts(
    count: Any, units: Units, structure: Structure, competing: Competing, scope: str
) -> Counts:
    """Check counts, and return them by set of competing pools."""
    sizes = competing_sizes(pool_sizes(units.alive, structure.inputs), competing)
    counts = per_pool(count, sizes, "count", 0, scope)
    for name, number in counts.items():
        what = f"count[{name!r}]" if isinstance(count, Mapping) else "count"
        if is_traced_integer(number):
            continue
        try:
            known = as_integer(number, what)
        except TypeError:
            message = f"{what} must be an integer, got {number!r}; for a fraction pass sparsity=..."
            raise TypeError(message) from None
        if not 0 <= known <= sizes[name]:
            raise ValueError(f"count={number} is out of range: {name} has {sizes[name]} units to remove.")
    return counts


def threshold_counts(threshold: Any, units: Units) -> Counts:
    """Count the units of each pool that score below a threshold."""
    bounds = per_pool(threshold, units.scores, "threshold", -jnp.inf)
    for name, bound in bounds.items():
        value = scalar(bound, "threshold")
        if value is not None and math.isnan(value):
            raise ValueError(f"threshold is nan for {name}: no score is below it.")
        if isinstance(bound, int) and not -(2**63) <= bound < 2**63:
            raise ValueError(f"threshold={bound} for {name} is beyond all integers that scores can be.")
    counts = {}
    for name, scores in units.scores.items():
        # In float32, because a bound that was rounded to half precision would be another bound.
        scores = scores.astype(jnp.float32) if is_narrow(scores.dtype) else scores
        with jax.numpy_dtype_promotion("standard"):  # on purpose: a threshold may have its param's dtype
            below = scores < bounds[name]
        counts[name] = count_true(units.alive[name] & below)
    return counts
