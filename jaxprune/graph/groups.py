"""`channel_groups`: the channels of a function that can only go together."""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph.compaction import explain
from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.divisors import find_divisors, without
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.readers import pin_shared, tie_readers, tie_where
from jaxprune.graph.roles import weights
from jaxprune.graph.streams import stream_axes
from jaxprune.tree.calls import check_call
from jaxprune.tree.checks import as_integer
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.stacks import Stacked, Stacks, layer_name, stacks_of
from jaxprune.tree.tables import shorten
from jaxprune.typing import Params, Where

_CALL = "channel_groups(apply_fn, params, *inputs)"
Split = str | int
"""Which factor of a product of axes loses slices: "major", "minor", or its index."""


class Member(NamedTuple):
    """An axis of a param that a group's units have slices of.

    Attributes:
      path: the param's path; of a stacked param that of one layer, such as "layers/up[0]".
      axis: the axis, from 0, of that layer.
      indices: int array, units x slices: the slices of each unit.
      shape: the param's shape, or that of the layer.
      divisor: whether the function divides by these slices, or would otherwise be NaN where they
        are zero. The masks of a pruned unit leave them alive, since the rest of the unit makes them
        harmless, and `compact` drops them with it.
    """

    path: str
    axis: int
    indices: np.ndarray
    shape: tuple[int, ...]
    divisor: bool = False


class Group(NamedTuple):
    """Units of coupled channels that can replace each other: the channels of a layer, say.

    Attributes:
      name: the path and axis of its first kernel, or of its first member.
      units: how many units there are.
      members: the axes of params they lie in.
      kind: groups of equal kind have members of the same names and axes, whatever their sizes.
      why_not: why no unit can be removed; None where units can.
      weights: the paths of the members that the function uses as the weights of a product: what
        takes part by default; None where that is not known.
      stack: for groups in one layer of stacked params, the name of the groups that are the same in all
        layers, such as `"layers/up[*][1]"`. `compact` needs equal numbers of units in them; else None.
      residual: whether the units lie on a residual stream, which all blocks add to: see
        `ChannelGroups.inner`.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    kind: str
    why_not: str | None = None
    weights: tuple[str, ...] | None = None
    stack: str | None = None
    residual: bool = False

    @property
    def removable(self) -> bool:
        """Whether a unit whose slices are all zero can be taken out."""
        return self.why_not is None


class Whole(NamedTuple):
    """Axes of params that stay whole.

    Attributes:
      members: the paths and axes.
      why: the reason.
    """

    members: tuple[tuple[str, int], ...]
    why: str


@dataclass(frozen=True)
class ChannelGroups:
    """All groups of a function; printing it gives a table.

    Attributes:
      groups: those with units, in the order of the params.
      whole: the axes of params that are in none, and why.
      stacks: by path, the axes of stacked params that count layers.
    """

    groups: tuple[Group, ...]
    whole: tuple[Whole, ...]
    stacks: Stacks = field(default_factory=dict)

    def removable(self) -> tuple[Group, ...]:
        """The groups that units can be removed from."""
        return tuple(group for group in self.groups if group.removable)

    def under(self, prefix: str) -> "ChannelGroups":
        """The groups for a part of the params: paths without a prefix, members elsewhere left out.

        For functions of `{"params": ..., "batch_stats": ...}` whose optimizer sees the params alone:
        `groups.under("params")`.

        Raises:
          ValueError: no path has the prefix.
        """
        start = prefix.rstrip("/") + "/"
        groups = []
        for group in self.groups:
            members = tuple(
                m._replace(path=m.path.removeprefix(start)) for m in group.members if m.path.startswith(start)
            )
            if members:
                left = group.weights and tuple(
                    path.removeprefix(start) for path in group.weights if path.startswith(start)
                )
                name, stack = group.name.removeprefix(start), group.stack and group.stack.removeprefix(start)
                group = group._replace(name=name, members=members, weights=left, stack=stack)
                if group.removable and all(member.divisor for member in members):
                    group = group._replace(why_not=f"the function divides by all that lies under {prefix!r}")
                groups.append(group)
        if not groups:
            paths = sorted({member.path for group in self.groups for member in group.members})
            raise ValueError(
                f"no member of a group lies under {prefix!r}; their paths are {', '.join(paths)}."
            )
        stacks = {p.removeprefix(start): axes for p, axes in self.stacks.items() if p.startswith(start)}
        return ChannelGroups(tuple(groups), (), stacks)

    def without(self, where: Where) -> "ChannelGroups":
        """The groups but for those with a member that `where(path, member)` matches.

        Raises:
          ValueError: nothing matches.
        """
        kept = tuple(g for g in self.groups if not any(where(m.path, m) for m in g.members))
        if len(kept) == len(self.groups):
            raise ValueError(f"without({getattr(where, '__name__', where)}) matches no member of a group.")
        return replace(self, groups=kept)

    def inner(self) -> "ChannelGroups":
        """The groups inside blocks, which leave the residual stream whole: heads and hidden units alone.

        A stream is what residual connections add to: the width of a transformer, or of a stage of a
        ResNet. Taking a channel out of it changes every block; what is inside a block is its own. A network
        without residual connections has inner groups only.

        Raises:
          ValueError: all groups lie on a stream.

        Example:
          >>> import jax.numpy as jnp, jaxprune as jp
          >>> params = {"embed": jnp.ones((2, 3)), "up": jnp.ones((3, 4)), "down": jnp.ones((4, 3))}
          >>> def apply_fn(params, x):
          ...     x = x @ params["embed"]
          ...     return jnp.sum(x + jnp.tanh(x @ params["up"]) @ params["down"])
          >>> groups = jp.channel_groups(apply_fn, params, jnp.ones((1, 2)))
          >>> [group.name for group in groups], [group.name for group in groups.inner()]
          (['down[1]', 'up[1]'], ['up[1]'])
        """
        inner = tuple(group for group in self.groups if not group.residual)
        if self.groups and not inner:
            raise ValueError("inner() leaves nothing: every group lies on a residual stream.")
        return replace(self, groups=inner)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        return _table(self)


def channel_groups(
    apply_fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    split: Split = "major",
    state: Callable[[Any], Any] | None = None,
    stacked: Stacked | None = None,
    **keywords: Any,
) -> ChannelGroups:
    """The coupled channels of a function: which slices of which params can only go together.

    A unit is the slices that have to go so that any one of them can: a convolution's filter, its
    bias, its BatchNorm entries and the input channel of whatever reads it. Nothing is computed,
    so abstract params will do.

    Where the function divides by a member (a learned scale, the norm of a weight, a variance, a
    quantisation step), or takes another function of it that is not finite at zero or has no finite
    derivative there, that member is a *divisor*: it keeps its values in the masks of a pruned unit,
    if the rest of the unit makes them harmless. If that cannot be proved, the group is not removable,
    and `why_not` names the op and its line.

    Params that are stacked, one array for all layers that a scan runs along, have groups of their own in
    each layer, whose members are called by layer: "layers/up[0]".

    Args:
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`; bools and strings are static.
      split: where an axis is split in several that could each lose slices (heads x head width),
        which of them does: `"major"`, the first (whole heads, whole groups of grouped-query
        attention), `"minor"`, the last (the same places of every head), or the index of one (1 of
        keys x heads of a key x width: the same head of every key).
      state: as for `compact`: the outputs that are new values of params.
      stacked: which axes of params count layers, a function of (path, leaf) that returns a number of
        leading axes or a tuple of axes; by default those that the function's scans run along. Layers
        of params under `vmap` have to be told by it; `lambda path, leaf: 0` says that there are none.
      **keywords: none; those of the function go in by `functools.partial(apply_fn, train=False)`.

    Returns:
      `ChannelGroups`.

    Raises:
      ValueError: a `split` that is none of these.
      TypeError: an `apply_fn` or a `state` that is not a function, an `apply_fn` that cannot be called
        with the inputs, a keyword.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["a"]) @ params["b"]
      >>> groups = jp.channel_groups(apply_fn, params, jnp.ones((1, 3)))
      >>> [(group.name, group.units) for group in groups]
      [('a[1]', 4)]
      >>> print(groups)
      group                    units  members
      a[1]                         4  a[1] b[0]
      Whole: a[0]: it meets an axis of the input [0].
      Whole: b[1]: it meets an axis of the output.
    """
    check_call(_CALL, apply_fn, (params, *inputs), keywords, ("split", "state", "stacked"))
    if not (isinstance(split, str) and split in ("major", "minor")):
        split = as_integer(split, "split", what="the index of a factor; or 'major', 'minor'")
    stacks = None if stacked is None else stacks_of(stacked, array_leaves(params))
    linked = TracedNetwork(apply_fn, params, inputs, state, stacks)
    linked.pin_unread()
    graph, groups = _separate_groups(linked, split)
    found, streams = weights(linked), stream_axes(linked, graph)
    groups = [
        group._replace(
            weights=tuple(dict.fromkeys(m.path for m in group.members if m.path in found)),
            residual=any((m.path, m.axis) in streams for m in group.members),
        )
        for group in groups
    ]
    return ChannelGroups(tuple(groups), _whole(linked, graph), linked.stacks)


def _separate_groups(linked: TracedNetwork, split: Split) -> tuple[AxisGraph, list[Group]]:
    """The groups, with the readers of a param apart where they can lose slices so."""
    tied = linked.graph.copy()
    tie_readers(linked, tied)
    while True:
        graph = tied.copy()
        pin_shared(graph)
        _split(graph, split)
        groups = _try_to_remove(linked, _unnamed_groups(linked, graph))
        whole = [
            linked.values[member.path].axes[member.axis]
            for group in groups
            if not group.removable
            for member in group.members
        ]
        if not (whole and tie_where(tied, whole)):
            return graph, groups
        tie_readers(linked, tied)


def _split(graph: AxisGraph, split: Split) -> None:
    """Pins all but one factor of each product that could lose slices in several ways."""
    while products := graph.free_products():
        product = products[0]
        always = graph.always_kept()
        free = [factor for factor in product.factors if not always.full(factor)]
        chosen = _factor(product.factors, free, split)
        for factor in free:
            if graph.find(factor) != graph.find(chosen):
                graph.pin(factor, f"split={split!r} takes slices from another axis of the product")
        if all(graph.find(factor) == graph.find(chosen) for factor in free):
            graph.pin(chosen, "it is a factor of a product twice")


def _factor(factors: Sequence[int], free: Sequence[int], split: Split) -> int:
    """The factor that loses slices: of those that could, the first, the last or the one at an index."""
    if isinstance(split, str):
        return free[0] if split == "major" else free[-1]
    wanted = split if split >= 0 else len(factors) + split
    return min(free, key=lambda factor: abs(factors.index(factor) - wanted))


def _unnamed_groups(linked: TracedNetwork, graph: AxisGraph) -> list[Group]:
    """Units with the same axes, and as many slices of each, form a group."""
    labels = graph.units()
    axes: dict[int, list[tuple[str, int]]] = {}
    for path, value in linked.values.items():
        for axis, node in enumerate(value.axes):
            axes.setdefault(graph.find(node), []).append((path, axis))
    slices = {root: _by_label(labels[root]) for root in axes if root in labels}
    shapes = {path: tuple(value.shape) for path, value in linked.values.items()}
    groups = []
    for of_group in _alike(slices):
        members = []
        for root, found in slices.items():
            if (indices := found.of(of_group)) is not None:
                members += [Member(path, axis, indices, shapes[path]) for path, axis in axes[root]]
        position = {path: n for n, path in enumerate(linked.values)}
        members.sort(key=lambda m: (position[m.path], m.axis))
        groups.append(_named(members, linked))
    groups.sort(key=lambda g: [position[m.path] for m in g.members])
    names = [group.name for group in groups]
    twice = {name for name in names if names.count(name) > 1}
    count: dict[str, int] = {}
    result = []
    for group in groups:
        if group.name in twice:
            count[group.name] = count.get(group.name, 0) + 1
            group = group._replace(name=f"{group.name}#{count[group.name]}")
        result.append(group)
    return result


class _Slices(NamedTuple):
    """The slices of an axis by the unit that they belong to.

    Attributes:
      units: the labels of the units, ascending.
      starts: where the slices of each begin in `order`.
      counts: how many each has.
      order: all slices, by unit.
    """

    units: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    order: np.ndarray

    def of(self, units: np.ndarray) -> np.ndarray | None:
        """The slices of some units that have equally many, units x slices; None if they have none here."""
        places = np.minimum(np.searchsorted(self.units, units), len(self.units) - 1)
        if not len(self.units) or self.units[places[0]] != units[0]:
            return None
        count = int(self.counts[places[0]])
        return self.order[self.starts[places][:, None] + np.arange(count)]


def _by_label(labels: np.ndarray) -> _Slices:
    order = np.argsort(labels, kind="stable")
    units, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    free = units >= 0
    return _Slices(units[free], starts[free], counts[free], order)


def _alike(slices: Mapping[int, _Slices]) -> list[np.ndarray]:
    """Units that have as many slices as each other on every axis, by group; groups by their first unit."""
    kind = np.full(1 + max((int(s.units.max(initial=-1)) for s in slices.values()), default=-1), -1)
    kinds = 0
    for found in slices.values():
        # Units were alike so far if they had the same number; they stay so if they have as many slices here.
        pairs = kind[found.units] * (found.counts.max(initial=0) + 1) + found.counts
        _, inverse = np.unique(pairs, return_inverse=True)
        kind[found.units] = kinds + inverse
        kinds += len(found.units)
    units = np.flatnonzero(kind >= 0)
    order = np.argsort(kind[units], kind="stable")
    _, starts = np.unique(kind[units][order], return_index=True)
    groups = np.split(units[order], starts[1:]) if len(units) else []
    return sorted(groups, key=lambda group: int(group[0]))


def _named(members: list[Member], linked: TracedNetwork) -> Group:
    kernels = [m for m in members if len(m.shape) >= 2]
    outputs = [m for m in kernels if m.axis == len(m.shape) - 1]
    first = (outputs or kernels or members)[0]
    paths = {m.path: linked.paths[m.path] for m in members}
    kind = sorted(f"{_last_name(paths[m.path][0])}[{m.axis} of {len(m.shape)}]" for m in members)
    layers, stack = {index for _, index in paths.values()}, None
    if len(layers) == 1 and layers != {()}:
        path, index = paths[first.path]
        stack = f"{layer_name(path, ['*'] * len(index))}[{first.axis}]"
    return Group(
        f"{first.path}[{first.axis}]", len(first.indices), tuple(members), " ".join(kind), stack=stack
    )


def _try_to_remove(linked: TracedNetwork, groups: list[Group]) -> list[Group]:
    """Zeroes a unit of each group and sees whether it can be taken out."""
    tried = {group.name: group for group in _removed(linked, [g for g in groups if g.units > 1])}
    result = []
    for group in groups:
        found = tried.get(group.name)
        if found is None or not found.removable:
            (found,) = _removed(linked, [group])
        if found.removable and _is_all(group):
            found = group._replace(
                why_not="it is the only unit, and an axis cannot be empty; another split= may give more"
            )
        result.append(found)
    return result


def _is_all(group: Group) -> bool:
    """Whether a group's only unit is all of an axis."""
    return group.units == 1 and any(m.indices.shape[1] == m.shape[m.axis] for m in group.members)


def _removed(linked: TracedNetwork, groups: Sequence[Group], derivatives: bool = True) -> list[Group]:
    """Groups with their divisors, and with the reason why a unit whose slices are zero would not vanish.

    Args:
      linked: the function.
      groups: the groups to lose their first unit, all at once.
      derivatives: whether members are divisors that only make a derivative infinite.
    """
    zeros: dict[str, list[Any]] = {p: [None] * len(v.axes) for p, v in linked.values.items()}
    for group in groups:
        for member in group.members:
            marks = zeros[member.path][member.axis]
            marks = np.zeros(member.shape[member.axis], bool) if marks is None else marks
            marks[member.indices[0]] = True
            zeros[member.path][member.axis] = marks
    facts = linked.facts(zeros)
    divisors = find_divisors(linked, zeros, derivatives, facts)
    if divisors.axes:
        facts = linked.facts(without(zeros, divisors.axes))
    kept = linked.solve(facts, never_empty=False)
    holders = Counter((member.path, member.axis) for group in groups for member in group.members)
    result = []
    for group in groups:
        members = tuple(m._replace(divisor=(m.path, m.axis) in divisors.axes) for m in group.members)
        why = None if divisors.unresolved is None else f"{divisors.unresolved} divides by zero without it"
        names = [f"{m.path}[{m.axis}]" for m in members if m.divisor]
        zero = f"{divisors.reason} is not finite where {', '.join(names)} is zero"
        if names and any(holders[m.path, m.axis] > 1 for m in members if m.divisor):
            why = "a divisor of another group lies in the same param"  # it is tried by itself
        if len(names) == len(members):
            why = f"{zero}, and a unit has no other slices"
        for path, axis, indices, *_ in members if why is None else ():
            node = linked.values[path].axes[axis]
            state = kept.state(node)
            left = indices[0] if state is True else indices[0][state[indices[0]]]
            if len(left):
                why = explain(linked, facts, node, int(left[0]))
                if names:
                    why = f"{zero}; where it is not, {why}"
                break
        result.append(group._replace(members=members if why is None else group.members, why_not=why))
    tried = derivatives and (divisors.axes or divisors.unresolved is not None)
    if tried and len(groups) == 1 and not result[0].removable:
        # An infinite derivative alone is no reason to keep the group whole.
        return _removed(linked, groups, derivatives=False)
    return result


def _whole(linked: TracedNetwork, graph: AxisGraph) -> tuple[Whole, ...]:
    always, reasons = graph.always_kept(), {}
    for path, value in linked.values.items():
        for axis, node in enumerate(value.axes):
            if always.full(node):
                reasons.setdefault(str(graph.why_pinned(node)), []).append((path, axis))
    return tuple(Whole(tuple(members), why) for why, members in reasons.items())


def _last_name(path: str) -> str:
    """What a leaf is called; "*" where that is a number, the place of a layer in a list of arrays."""
    name = path.rsplit("/", 1)[-1]
    return "*" if name.isdigit() else name


def _table(groups: ChannelGroups) -> str:
    width, left = 79, 33
    lines = [f"{'group':<25}{'units':>5}  members"]
    for group in groups.groups:
        members = _listing(
            [f"{m.path}[{m.axis}]{_times(m)}{'(divisor)' if m.divisor else ''}" for m in group.members]
        )
        wrapped = textwrap.wrap(members, width - left + 1, break_on_hyphens=False)
        lines.append(f"{shorten(group.name, 24):<24}{group.units:>6}  {wrapped[0]}")
        lines += [" " * 32 + line for line in wrapped[1:]]
        if group.why_not is not None:
            lines += textwrap.wrap(
                f"not removable: {group.why_not}", width, initial_indent="  ", subsequent_indent="    "
            )
    for whole in groups.whole:
        names = _listing([f"{path}[{axis}]" for path, axis in whole.members])
        lines += textwrap.wrap(f"Whole: {names}: {whole.why}.", width, subsequent_indent="  ")
    return "\n".join(lines)


def _listing(names: Sequence[str]) -> str:
    """Names in order; those that differ by numbers in their path only stand as one, with a count.

    The layers of a bare list have nothing but numbers: each stands for itself.
    """
    patterns = [_folded(name) for name in names]
    count = Counter(patterns)
    shown = []
    for name, pattern in zip(names, patterns, strict=True):
        if count[pattern] < 3:
            shown.append(name)
        elif (line := f"{pattern} ({count[pattern]})") not in shown:
            shown.append(line)
    return " ".join(shown)


def _folded(name: str) -> str:
    """A path and its axis with "*" for the numbers in the path, if a name is left then."""
    path, bracket, axis = name.rpartition("[")
    folded = re.sub(r"\d+", "*", path)
    return f"{folded}{bracket}{axis}" if re.search(r"[^\W\d_]", folded) else name


def _times(member: Member) -> str:
    return f" x{member.indices.shape[1]}" if member.indices.shape[1] > 1 else ""
