"""`channel_groups`: the channels of a function that can only be removed together.

`engine.program` traces the function; its axis graph says which slices can only go together (units); alike
units form a group; and for each group the removal of one unit is tried.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph.engine.axes import AxisGraph, Solution
from jaxprune.graph.engine.divisors import Divisors, ParamAxis, find_divisors, without
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.readers import pin_shared, tie_readers, tie_where
from jaxprune.graph.groups import ChannelGroups, Group, Member, Whole
from jaxprune.graph.reasons import why_needed
from jaxprune.graph.roles import weights
from jaxprune.graph.streams import stream_axes
from jaxprune.tree.calls import check_call
from jaxprune.tree.checks import as_integer
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.stacks import Stacked, layer_name, stacks_of
from jaxprune.typing import Params

_CALL = "channel_groups(apply_fn, params, *inputs)"
Split = str | int
"""Which factor of a product of axes loses slices: "major", "minor", or its index."""


def channel_groups(
    apply_fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    split: Split = "major",
    state: Callable[[Any], Any] | None = None,
    stacked: Stacked | None = None,
    **keywords: Any,
) -> ChannelGroups:
    """Find the coupled channels of a function: which slices of which params can only be removed together.

    A unit is all slices that have to be removed for one of them to be: a convolution's filter, its
    bias, its BatchNorm entries and the input channel of whatever reads it. Nothing is computed,
    so abstract params will do.

    Where the function divides by a member (a learned scale, the norm of a weight, a variance, a
    quantisation step), or takes another function of it that is not finite at zero or has no finite
    derivative there, that member is a *divisor*: it keeps its values in the masks of a pruned unit,
    if the rest of the unit makes them harmless. If that cannot be proved, the group is not removable,
    and `why_not` names the op and its line.

    Params that are stacked, one array for all layers that a scan runs along, have groups of their own in
    each layer, with members named by layer: "layers/up[0]".

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
        leading axes or a tuple of axes; by default those that the function's scans run along. For params
        under `vmap` it has to be given; `lambda path, leaf: 0` says that no leaf has layers.
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
    network = TracedNetwork(apply_fn, params, inputs, state, stacks)
    network.pin_unread()
    graph, groups = _separate_groups(network, split)
    products, streams = weights(network), stream_axes(network, graph)
    groups = [
        group._replace(
            weights=tuple(dict.fromkeys(m.path for m in group.members if m.path in products)),
            residual=any((m.path, m.axis) in streams for m in group.members),
        )
        for group in groups
    ]
    return ChannelGroups(tuple(groups), _whole(network, graph), network.stacks)


def _separate_groups(network: TracedNetwork, split: Split) -> tuple[AxisGraph, list[Group]]:
    """Return the groups, with the readers of a shared param apart, as far as that lets them lose slices.

    Each reader of a param may keep other slices of it, and the param keeps those that any of them keeps.
    Where a group turns out not to be removable because its readers are apart, they are tied, and all is
    tried again.
    """
    tied = network.graph.copy()
    tie_readers(network, tied)
    while True:
        graph = tied.copy()
        pin_shared(graph)
        _split(graph, split)
        groups = _try_to_remove(network, _groups(network, graph))
        stuck = [
            network.values[member.path].axes[member.axis]
            for group in groups
            if not group.removable
            for member in group.members
        ]
        if not (stuck and tie_where(tied, stuck)):
            return graph, groups
        tie_readers(network, tied)


def _split(graph: AxisGraph, split: Split) -> None:
    """Pin all but one factor of each product that could lose slices in several ways.

    Slice (i, j) of a product stays if slices i and j of its factors do, so a product alone does not say
    whether row i or column j loses a slice with it. With one free factor it does.
    """
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
    """Return the factor that loses slices: the first free one, the last, or the nearest to an index."""
    if isinstance(split, str):
        return free[0] if split == "major" else free[-1]
    wanted = split if split >= 0 else len(factors) + split
    return min(free, key=lambda factor: abs(factors.index(factor) - wanted))


# --- units, and groups of them


def _groups(network: TracedNetwork, graph: AxisGraph) -> list[Group]:
    """Return the groups: units with slices on the same axes, equally many on each."""
    labels = graph.units()
    axes: dict[int, list[tuple[str, int]]] = {}
    for path, value in network.values.items():
        for axis, node in enumerate(value.axes):
            axes.setdefault(graph.find(node), []).append((path, axis))
    slices = {root: _by_label(labels[root]) for root in axes if root in labels}
    position = {path: n for n, path in enumerate(network.values)}
    groups = []
    for units in _alike(slices):
        members = [
            Member(path, axis, indices, tuple(network.values[path].shape))
            for root, found in slices.items()
            if (indices := found.of(units)) is not None
            for path, axis in axes[root]
        ]
        members.sort(key=lambda m: (position[m.path], m.axis))
        groups.append(_named(members, network))
    groups.sort(key=lambda g: [position[m.path] for m in g.members])
    total = Counter(group.name for group in groups)
    seen: Counter[str] = Counter()
    for n, group in enumerate(groups):
        if total[group.name] > 1:
            seen[group.name] += 1
            groups[n] = group._replace(name=f"{group.name}#{seen[group.name]}")
    return groups


class _Slices(NamedTuple):
    """The slices of an axis by the unit that they belong to."""

    units: np.ndarray  # the labels of the units, ascending
    starts: np.ndarray  # where the slices of each unit begin in `order`
    counts: np.ndarray  # how many slices each unit has
    order: np.ndarray  # all slices, sorted by unit

    def of(self, units: np.ndarray) -> np.ndarray | None:
        """Return the slices of units that have equally many, units x slices; None if they have none here."""
        places = np.minimum(np.searchsorted(self.units, units), len(self.units) - 1)
        if not len(self.units) or self.units[places[0]] != units[0]:
            return None
        count = int(self.counts[places[0]])
        return self.order[self.starts[places][:, None] + np.arange(count)]


def _by_label(labels: np.ndarray) -> _Slices:
    """Return the slices of an axis by unit, from the label of each slice; -1 stands for no unit."""
    order = np.argsort(labels, kind="stable")
    units, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    free = units >= 0
    return _Slices(units[free], starts[free], counts[free], order)


def _alike(slices: Mapping[int, _Slices]) -> list[np.ndarray]:
    """Return the units of each group, by their first unit: those with equally many slices on every axis.

    The classes of units are refined axis by axis, as in the minimisation of an automaton: two units stay in
    one class if they were in one and have as many slices on this axis. No two units are ever compared.
    """
    kind = np.full(1 + max((int(s.units.max(initial=-1)) for s in slices.values()), default=-1), -1)
    kinds = 0
    for found in slices.values():
        # One integer for each pair (class so far, number of slices here), since a count is below the factor.
        pairs = kind[found.units] * (found.counts.max(initial=0) + 1) + found.counts
        _, inverse = np.unique(pairs, return_inverse=True)
        kind[found.units] = kinds + inverse
        kinds += len(found.units)
    units = np.flatnonzero(kind >= 0)
    order = np.argsort(kind[units], kind="stable")
    _, starts = np.unique(kind[units][order], return_index=True)
    groups = np.split(units[order], starts[1:]) if len(units) else []
    return sorted(groups, key=lambda group: int(group[0]))


def _named(members: list[Member], network: TracedNetwork) -> Group:
    """Return the group of some members, named by the output axis of its first kernel."""
    kernels = [m for m in members if len(m.shape) >= 2]
    outputs = [m for m in kernels if m.axis == len(m.shape) - 1]
    first = (outputs or kernels or members)[0]
    leaves = {m.path: network.paths[m.path] for m in members}  # the leaf that a path is of, and the layer
    kind = sorted(f"{_last_name(leaves[m.path][0])}[{m.axis} of {len(m.shape)}]" for m in members)
    layers, stack = {index for _, index in leaves.values()}, None
    if len(layers) == 1 and layers != {()}:
        path, index = leaves[first.path]
        stack = f"{layer_name(path, ['*'] * len(index))}[{first.axis}]"
    name = f"{first.path}[{first.axis}]"
    return Group(name, len(first.indices), tuple(members), " ".join(kind), stack=stack)


def _last_name(path: str) -> str:
    """Return the name of a leaf; "*" where that is a number, the place of a layer in a list of arrays."""
    name = path.rsplit("/", 1)[-1]
    return "*" if name.isdigit() else name


# --- whether a unit can be removed


def _try_to_remove(network: TracedNetwork, groups: list[Group]) -> list[Group]:
    """Return the groups with their divisors, and with the reason if a unit cannot be removed.

    One solution tries the first unit of every group at once, because most groups pass. Only a group that
    fails, or has a single unit, is tried by itself: the zeros of the others may be what it failed for.
    """
    tried = {group.name: group for group in _without_first(network, [g for g in groups if g.units > 1])}
    result = []
    for group in groups:
        found = tried.get(group.name)
        if found is None or not found.removable:
            (found,) = _without_first(network, [group])
        if found.removable and _is_all(group):
            found = group._replace(
                why_not="it is the only unit, and an axis cannot be empty; another split= may give more"
            )
        result.append(found)
    return result


def _is_all(group: Group) -> bool:
    """Whether a group's only unit is all of an axis."""
    return group.units == 1 and any(m.indices.shape[1] == m.shape[m.axis] for m in group.members)


def _without_first(network: TracedNetwork, groups: Sequence[Group], derivatives: bool = True) -> list[Group]:
    """Return groups with their divisors, and with the reason if their first units would not vanish at zero.

    With `derivatives`, members also count as divisors that only make a derivative infinite.
    """
    zeros: dict[str, list[Any]] = {p: [None] * len(v.axes) for p, v in network.values.items()}
    for group in groups:
        for member in group.members:
            marks = zeros[member.path][member.axis]
            marks = np.zeros(member.shape[member.axis], bool) if marks is None else marks
            marks[member.indices[0]] = True
            zeros[member.path][member.axis] = marks
    facts = network.facts(zeros)
    divisors = find_divisors(network, zeros, derivatives, facts)
    if divisors.axes:
        facts = network.facts(without(zeros, divisors.axes))
    kept = network.solve(facts, never_empty=False)
    holders = Counter((member.path, member.axis) for group in groups for member in group.members)
    shared = {axis for axis, count in holders.items() if count > 1}
    result = []
    for group in groups:
        members = tuple(m._replace(divisor=(m.path, m.axis) in divisors.axes) for m in group.members)
        why = _why_stuck(network, members, divisors, shared, facts, kept)
        result.append(group._replace(members=members if why is None else group.members, why_not=why))
    tried = derivatives and (divisors.axes or divisors.unresolved is not None)
    if tried and len(groups) == 1 and not result[0].removable:
        # An infinite derivative alone is no reason to keep the group whole.
        return _without_first(network, groups, derivatives=False)
    return result


def _why_stuck(
    network: TracedNetwork,
    members: Sequence[Member],
    divisors: Divisors,
    shared: Collection[ParamAxis],
    facts: Facts,
    kept: Solution,
) -> str | None:
    """Return why a unit stays where all of its slices but those of divisors are zero; None if it vanishes.

    `shared` are the axes of params on which several groups have slices.
    """
    names = [f"{m.path}[{m.axis}]" for m in members if m.divisor]
    not_finite = f"{divisors.reason} is not finite where {', '.join(names)} is zero"
    if len(names) == len(members):
        return f"{not_finite}, and a unit has no other slices"
    if any((m.path, m.axis) in shared for m in members if m.divisor):
        return "a divisor of another group lies in the same param"  # so this group is tried by itself
    if divisors.unresolved is not None:
        return f"{divisors.unresolved} divides by zero without it"
    for member in members:
        node, first = network.values[member.path].axes[member.axis], member.indices[0]
        state = kept.state(node)
        left = first if state is True else first[state[first]]
        if len(left):
            why = why_needed(network, facts, node, int(left[0]))
            return f"{not_finite}; where it is not, {why}" if names else why
    return None


def _whole(network: TracedNetwork, graph: AxisGraph) -> tuple[Whole, ...]:
    """Return the axes of params that stay whole, by reason."""
    always, reasons = graph.always_kept(), {}
    for path, value in network.values.items():
        for axis, node in enumerate(value.axes):
            if always.full(node):
                reasons.setdefault(str(graph.why_pinned(node)), []).append((path, axis))
    return tuple(Whole(tuple(members), why) for why, members in reasons.items())
