"""Coupled channels as units: slices of several leaves that go together."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.groups import ChannelGroups, Group, Member
from jaxprune.structures.base import Norm, Structure, Units, reducer
from jaxprune.tree.checks import as_integer, check_function, shown
from jaxprune.tree.host import MAX_ENTRIES, like_computed, on_host
from jaxprune.tree.paths import explain_paths, some_of
from jaxprune.tree.programs import map_compiled
from jaxprune.tree.sharding import everywhere
from jaxprune.tree.stacks import Family, leaf_of_layer
from jaxprune.tree.widths import Multiple, Widths, as_multiple, round_up
from jaxprune.typing import Where


def channels(
    groups: ChannelGroups | Iterable[Group],
    norm: Norm = 2,
    reduce: Callable[..., jax.Array] = jnp.mean,
    normalize: Callable[[jax.Array], jax.Array] | None = None,
    *,
    axis: int | None = None,
    ignore: Where | None = None,
    min_width: int | Mapping[str, int] = 1,
    multiple_of: int | Sequence[int] | Widths = 1,
) -> Structure:
    """Prune coupled channels: a unit is all slices, of any leaves, that can only go together.

    Each member of a group (an axis of a leaf) gives each unit one number, the norm of the scores
    in the unit's slices of that leaf. `reduce` makes these numbers the unit's score, which is compared with
    those of other groups after `normalize`. Pools are groups: a sparsity, a count or a floor is one of
    units, and a dict of targets goes by `Group.name`.

    Only the leaves that the pruner's `where` takes in give scores. By default these are the weights of
    the network's products, whatever their names: the matrices and filters that it multiplies data
    by, and not what it looks up (embeddings, even if they are also multiplied), adds (biases,
    positions) or multiplies entry by entry (scales), nor adapters. Pruning a unit masks all its
    slices, biases and norms included. A group takes no part if `where` takes in none of its members.
    Members that the network divides by (`Member.divisor`) give scores like any other, but masks
    leave them alive, because zero would make the network NaN. The other members tell whether a unit
    is pruned, and `compact` drops the divisors with it.
    With `scope="isomorphic"` groups that have the same members, except for their sizes, compete,
    and each kind gives its share.

    Where leaves are stacked (`groups.stacks`), each layer has separate groups, `"layers/up[2][1]"`, which
    are pools like any other. All layers of a scan need one width, so each keeps equally many units: with
    `scope="layerwise"` if their targets are equal; with other scopes always, the number nearest to what
    the layers would keep together, and each layer drops its lowest. A target may name the stack,
    `"layers/up[*][1]"`.

    Args:
      groups: from `channel_groups`.
      norm: the order of the norm within a slice, or a reduction such as `jnp.sum`.
      reduce: `reduce(array, axis=0)` of members x units, such as `jnp.mean`, `jnp.sum`, `jnp.max`.
      normalize: from a group's scores, an array that they are divided by, such as `jnp.mean` or
        `jnp.max`; nothing by default. It makes groups comparable under `scope="global"`.
      axis: only members on this axis of their leaf give scores: -1 for flax's outputs, so that a
        filter is ranked by its own weights and not by those that read it.
      ignore: `ignore(path, member)`; groups with a member that matches are not pruned. The same as
        `groups.without(ignore)`, for recipes, which cannot write groups.
      min_width: how many units stay at least, in every group or by its name: a floor that is part of the
        structure, where the `floor` of a pruner is one number for all pools.
      multiple_of: the number of units kept in a group is rounded up to a multiple of this, by keeping the
        highest scores; less is then pruned than asked for. Widths in place of a number, rising and continued
        by their last step, are rounded up to; `metrics.good_widths` measures which ones pay on a machine.

    Raises:
      ValueError: no group is removable, an `ignore` that matches nothing, an unknown name, a
        number below 1, widths that do not rise; on use, `where` takes in no member of any group.
      TypeError: `groups` does not hold groups, `reduce` or `ignore` is not a function, `axis` is not an
        integer.

    Warns:
      UserWarning: groups of which nothing is pruned, because no member that gives scores lies on the
        axis, or because they are no wider than `multiple_of`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[3.0, 1.0, 2.0], [1.0, 0.0, 1.0]]), "b": jnp.ones((3, 1))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["a"]) @ params["b"]
      >>> groups = jp.channel_groups(apply_fn, params, jnp.ones((5, 2)))
      >>> structure = jp.structures.channels(groups)
      >>> masks = jp.prune_once(params, jp.scores.magnitude, count=1, structure=structure)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([[True, False, True], [True, False, True]], [[True], [False], [True]])

    References:
      Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (reduce over members);
      Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024 (scope="isomorphic").
    """
    chosen = _chosen(groups, ignore)
    widths = _min_widths(min_width, chosen)
    multiple = as_multiple(multiple_of, "multiple_of")
    if axis is not None:
        axis = as_integer(axis, "axis", what="or None for all")
    check_function(reduce, "reduce=", "of stacked scores and an axis, such as jnp.mean")
    if normalize is not None:
        check_function(normalize, "normalize=", "of a group's scores, such as jnp.max")
    reducer(norm)  # raises if it is none
    untouched = {
        group.name for group in chosen if not any(_is_on(m, len(m.shape), axis) for m in group.members)
    }
    if len(untouched) < len(chosen):
        _warn_about_axis(sorted(untouched), axis)
    narrowest = multiple if isinstance(multiple, int) else multiple[0]
    filled = {group.name for group in chosen if 1 < group.units <= narrowest}

    layers = {m.path for group in chosen for m in group.members if leaf_of_layer(m.path) is not None}

    def pool(scores: dict[str, jax.Array], masks: dict[str, jax.Array]) -> Units:
        if unknown := [name for name in layers - masks.keys() if leaf_of_layer(name) in masks]:
            raise ValueError(
                f"the groups have members in {some_of(unknown)}, layers of leaves that are not known to be "
                "stacked. Pass channels(...) the ChannelGroups themselves, which know their stacks, or say "
                "by stacked= which axes count layers."
            )
        scoring: dict[str, list[Member]] = {}
        telling: dict[str, list[Member]] = {}
        for group in chosen:
            members = [m for m in group.members if m.path in scores and _is_on(m, scores[m.path].ndim, axis)]
            if not members:
                continue
            scoring[group.name] = members
            # Masks leave divisors alive in pruned units too, so only other members tell which are pruned.
            others = [m for m in members if not m.divisor] or [
                m for m in group.members if not m.divisor and m.path in masks
            ]
            telling[group.name] = others or members  # a part of the params may hold divisors alone
        if not scoring:
            raise ValueError(_no_member(chosen, scores, axis))
        alive = _alive(telling, masks)
        pooled = _pooled(scoring, scores, masks, alive, (norm, reduce, normalize))
        # Only here is it known what `where` takes in. A warning names each group once, not at every update.
        more = {g.name for g in chosen if g.name not in pooled and any(m.path in scores for m in g.members)}
        _warn_about_axis(sorted(more - untouched), axis)
        untouched.update(more)
        _warn_about_multiple([g for g in chosen if g.name in filled & pooled.keys()], narrowest)
        filled.difference_update(pooled)

        def expand(keep: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            kept = {n: _rounded(keep[n], pooled[n], alive[n], multiple) for n in pooled}
            return _entries([group for group in chosen if group.name in pooled], kept)

        return Units(pooled, alive, expand)

    kinds = {group.name: group.kind for group in chosen}
    return Structure(
        pool,
        name="channels(groups)",
        kinds=kinds,
        floors=widths,
        spans_leaves=True,
        sizes_of=lambda shapes: {group.name: _units_in(group, shapes) for group in chosen},
        weights=_weights(chosen),
        stacks=dict(groups.stacks) if isinstance(groups, ChannelGroups) else None,
        families=_families(chosen, multiple),
    )


def _families(groups: Iterable[Group], multiple_of: Multiple) -> dict[str, Family]:
    """Return, by name, the groups that are the same axis in each layer of a stack."""
    by_stack: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for group in groups:
        if group.stack is not None:
            named = [m.path for m in group.members if leaf_of_layer(m.path) is not None]
            index = tuple(map(int, named[0].rpartition("[")[2].removesuffix("]").split(","))) if named else ()
            # A number tells several groups on one axis of a layer apart, "layers/up[2][1]#1".
            _, number, which = group.name.rpartition("]")[2].rpartition("#")
            by_stack.setdefault(group.stack + number + which, []).append((index, group.name))
    families = {}
    for stack, layers in by_stack.items():
        layers.sort()
        shape = tuple(max(numbers) + 1 for numbers in zip(*(index for index, _ in layers), strict=True))
        if math.prod(shape) != len(layers) or not shape:  # some layers have no such group
            shape = (len(layers),)
        families[stack] = Family(shape, tuple(name for _, name in layers), True, multiple_of)
    return families


def _no_member(groups: Iterable[Group], taken: Iterable[str], axis: int | None) -> str:
    """Return the message that says why no member of a group gives scores."""
    paths = sorted({member.path for group in groups for member in group.members})
    taken = sorted(taken)
    if any(path in paths for path in taken):
        return f"axis={axis} is in no group: no member of a group that where= takes in lies on that axis."
    message = f"where= takes in no member of a group. The members are in {', '.join(paths)}"
    advice = explain_paths(paths, taken, some=True)
    return f"{message}. {advice}" if advice else f"{message}; where= takes in {some_of(taken)}."


def _weights(groups: tuple[Group, ...]) -> dict[str, bool]:
    """Return, by path, whether a function uses a member as weights; nothing if a group does not know."""
    if any(group.weights is None for group in groups):
        return {}
    weights = {path for group in groups for path in group.weights or ()}
    return {member.path: member.path in weights for group in groups for member in group.members}


def _chosen(groups: ChannelGroups | Iterable[Group], ignore: Where | None) -> tuple[Group, ...]:
    """Return the removable groups that are not ignored."""
    every = tuple(groups) if np.iterable(groups) else (groups,)
    if wrong := [each for each in every if not isinstance(each, Group)]:
        raise TypeError(
            f"channels needs groups as jaxprune.channel_groups(apply_fn, params, *inputs) finds them, got "
            f"{shown(wrong[0])}."
        )
    chosen = tuple(group for group in every if group.removable)
    if ignore is not None:
        check_function(ignore, "ignore=", "of (path, member)")
        spared = [group for group in chosen if any(ignore(m.path, m) for m in group.members)]
        if not spared:
            names = ", ".join(sorted({m.path for group in chosen for m in group.members}))
            raise ValueError(
                f"ignore={getattr(ignore, '__name__', ignore)} matches no member of a group, so it ignores "
                f"nothing. The members are in {names}."
            )
        chosen = tuple(group for group in chosen if group not in spared)
    if not chosen:
        reasons = "; ".join(f"{group.name}: {group.why_not or 'ignored'}" for group in every)
        raise ValueError(f"no channels can be removed: {reasons or 'the function has no groups'}.")
    return chosen


def _units_in(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return how many units a group has where its leaves have other shapes; None if it is not known.

    It is known from a member whose whole axis belongs to the group: all its slices lie in units.
    """
    for member in group.members:
        units, slices = member.indices.shape
        size = shapes[member.path][member.axis] if member.path in shapes else 0
        if size and units * slices == member.shape[member.axis] and size % slices == 0:
            return size // slices
    return None


def _min_widths(min_width: int | Mapping[str, int], groups: tuple[Group, ...]) -> dict[str, int]:
    """Return, by group, the widths above 1, which is what a pruner keeps by itself."""
    names = [group.name for group in groups]
    widths = min_width if isinstance(min_width, Mapping) else dict.fromkeys(names, min_width)
    if unknown := [name for name in widths if name not in names]:
        raise ValueError(f"min_width names {', '.join(unknown)}; the groups are {', '.join(names)}.")
    numbers = {
        name: as_integer(width, "min_width", at_least=1, below=2**31, what=f"for {name}")
        for name, width in widths.items()
    }
    return {name: width for name, width in numbers.items() if width > 1}


def _is_on(member: Member, ndim: int, axis: int | None) -> bool:
    if axis is None:
        return True
    return -ndim <= axis < ndim and member.axis == axis % ndim


def _warn_about_axis(groups: Sequence[str], axis: int | None) -> None:
    """Warn about groups that get no scores, so that nothing of them is pruned."""
    if groups:
        warnings.warn(
            f"axis={axis}: {', '.join(groups)} has no member on that axis that gives scores, so nothing of "
            "it is pruned. Leave axis= out, or prune the other groups with a structure of another axis.",
            stacklevel=3,
        )


def _warn_about_multiple(groups: Iterable[Group], multiple_of: int) -> None:
    """Warn about groups that rounding up fills again, whatever was to be removed."""
    if narrow := [f"{group.name} ({group.units} units)" for group in groups]:
        warnings.warn(
            f"multiple_of={multiple_of} is not below the width of {', '.join(narrow)}: what stays is rounded "
            "up to all of it, so nothing of it is pruned. Choose a smaller multiple, or leave these groups "
            "out with ignore=.",
            stacklevel=3,
        )


def _pooled(
    members: Mapping[str, Sequence[Member]],
    scores: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    alive: Mapping[str, jax.Array],
    how: tuple[Any, ...],
) -> dict[str, jax.Array]:
    """Return, by group, the scores of its units; `how` is the norm, and `reduce` and `normalize`."""
    norm, *of_group = how
    every = [member for of_name in members.values() for member in of_name]
    in_slices = iter(
        map_compiled(
            _norms_of_slices,
            [(m.axis, m.indices.shape[1], norm) for m in every],
            [(scores[m.path], masks[m.path], _places(m, scores[m.path])) for m in every],
        )
    )
    each = {name: [next(in_slices) for _ in of_name] for name, of_name in members.items()}
    pooled = map_compiled(
        _scores_of_units, [tuple(of_group)] * len(each), [(each[name], alive[name]) for name in each]
    )
    return dict(zip(each, pooled, strict=True))


def _norms_of_slices(axis: int, slices: int, norm: Norm, scores: jax.Array, mask: jax.Array, places: Any):
    return _by_unit(jnp.where(mask, scores, 0), axis, slices, places, reducer(norm))


def _scores_of_units(
    reduce: Callable[..., jax.Array],
    normalize: Callable[[jax.Array], jax.Array] | None,
    each: Sequence[jax.Array],
    alive: jax.Array,
) -> jax.Array:
    total = reduce(jnp.stack(each), axis=0)
    if normalize is None:
        return total
    scale = normalize(jnp.where(alive, total, 0))
    return total / jnp.where(scale == 0, 1, scale)


def _alive(members: Mapping[str, Sequence[Member]], masks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return, by group, which units have entries left in any of its members."""
    every = list(members.values())
    leaves = [[masks[member.path] for member in of_name] for of_name in every]
    if on_host(leaves):
        alive = [
            like_computed(_alive_on_host(*of_name), *of_name[1])
            for of_name in zip(every, leaves, strict=True)
        ]
    else:
        alive = map_compiled(
            _any_in_slices,
            [(tuple((m.axis, m.indices.shape[1]) for m in of_name),) for of_name in every],
            [(of_name, list(map(_places, every[n], of_name))) for n, of_name in enumerate(leaves)],
        )
    return dict(zip(members, alive, strict=True))


def _alive_on_host(members: Sequence[Member], leaves: Sequence[Any]) -> np.ndarray:
    alive = np.zeros(len(members[0].indices), bool)
    for member, leaf in zip(members, map(np.asarray, leaves), strict=True):
        others = tuple(a for a in range(leaf.ndim) if a != member.axis)
        alive |= np.asarray(np.any(leaf, axis=others))[member.indices].any(axis=1)
    return alive


def _any_in_slices(
    axes: Sequence[tuple[int, int]], leaves: Sequence[jax.Array], places: Sequence[Any]
) -> jax.Array:
    each = [
        _by_unit(leaf, axis, slices, at, lambda x, others: jnp.any(x, axis=others))
        for (axis, slices), leaf, at in zip(axes, leaves, places, strict=True)
    ]
    return jnp.any(jnp.stack(each), axis=0)


def _places(member: Member, leaf: jax.Array) -> np.ndarray | None:
    """Return where the slices of all units lie, one unit after another; None if that is their order."""
    flat = member.indices.ravel()
    if np.array_equal(flat, np.arange(leaf.shape[member.axis])):
        return None
    return flat.astype(np.int32)  # JAX caches how it first converted an int64 array, with or without x64


def _by_unit(
    leaf: jax.Array, axis: int, slices: int, places: Any, reduce: Callable[..., jax.Array]
) -> jax.Array:
    """Reduce the entries of a leaf in each unit's slices to one number."""
    picked = leaf if places is None else jnp.take(leaf, places, axis=axis)
    units = picked.shape[axis] // slices
    picked = picked.reshape((*leaf.shape[:axis], units, slices, *leaf.shape[axis + 1 :]))
    others = tuple(a for a in range(picked.ndim) if a != axis)
    return everywhere(reduce(picked, others))


def _rounded(keep: Any, scores: Any, alive: Any, multiple_of: Multiple) -> Any:
    """Return the units to keep, filled up to a multiple with the highest of the others that are alive."""
    if multiple_of == 1:
        return keep
    xp: Any = jnp
    if on_host(keep, scores, alive):
        xp, (keep, scores, alive) = np, map(np.asarray, (keep, scores, alive))
    stays = keep & alive
    wanted = round_up(xp.sum(stays, dtype=np.int32), multiple_of)
    # Units that stay come first, then units alive by falling score, and last pruned ones, which never return.
    order = xp.lexsort((-scores, ~stays, ~alive))
    rank = xp.argsort(order)
    return (keep | (rank < wanted)) & (alive | keep)


def _entries(groups: Iterable[Group], keep: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the masks of all leaves that the units lie in."""
    members: dict[str, list[tuple[Member, Any]]] = {}
    for group in groups:
        for member in group.members:
            members.setdefault(member.path, []).append((member, keep[group.name]))
    masks: dict[str, Any] = dict.fromkeys(members)
    static, arrays = {}, {}
    for path, pairs in members.items():
        shape = pairs[0][0].shape
        pairs = [(member, kept) for member, kept in pairs if not member.divisor]
        axes, units = tuple(m.axis for m, _ in pairs), [_units_of(m) for m, _ in pairs]
        kept = [each for _, each in pairs]
        if on_host(kept) and math.prod(shape) <= MAX_ENTRIES:
            masks[path] = like_computed(np.array(_leaf_mask(np, shape, axes, kept, units)), *kept)
        else:
            static[path], arrays[path] = (jnp, shape, axes), (kept, units)
    masks |= zip(static, map_compiled(_leaf_mask, list(static.values()), list(arrays.values())), strict=True)
    return masks


def _units_of(member: Member) -> np.ndarray:
    """Return the unit of each slice of a member; the number of units for slices that are in none."""
    units = np.full(member.shape[member.axis], len(member.indices), np.int32)
    units[member.indices] = np.arange(len(member.indices))[:, None]
    return units


def _leaf_mask(
    xp: Any, shape: tuple[int, ...], axes: Sequence[int], kept: Sequence[Any], units: Sequence[Any]
) -> Any:
    """Return the mask of a leaf, which keeps the slices of the units that are kept and those in no unit."""
    mask = xp.ones((1,) * len(shape), bool)
    for axis, keep, unit in zip(axes, kept, units, strict=True):
        along = xp.append(xp.asarray(keep), True)[unit]
        mask = mask & xp.expand_dims(along, [a for a in range(len(shape)) if a != axis])
    return xp.broadcast_to(mask, shape)
