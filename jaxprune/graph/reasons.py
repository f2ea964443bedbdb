"""Why slices stay: the op that needs them, or what else keeps them."""

from dataclasses import dataclass

import numpy as np

from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.program import TracedNetwork, ZeroSlices
from jaxprune.graph.plan import Plan

_EMPTY_OR_ROUNDED = "an axis cannot be empty, or its width is rounded up"

# What ops do with the slices that they need; all others sum them.
_VERBS = {
    **dict.fromkeys(("reduce_max", "reduce_min", "argmax", "argmin", "top_k"), "compares"),
    **dict.fromkeys(("reduce_and", "reduce_or"), "combines"),
}


@dataclass(frozen=True, repr=False)
class NotRemoved:
    """Slices of a param that the masks remove but `compact` keeps; printing it gives a sentence.

    Attributes:
      path: the param, or one layer of a stacked param, such as "layers/up[0]".
      axis: the axis.
      count: how many masked slices stay.
      why: the reason.
    """

    path: str
    axis: int
    count: int
    why: str

    def __repr__(self) -> str:
        return f"{self.count} masked slices of {self.path} along axis {self.axis} stay: {self.why}"


def why_needed(network: TracedNetwork, facts: Facts, node: int, index: int) -> str:
    """Return why a slice of an axis has to stay: what pins the axis, or the op that reads the slice."""
    pinned = network.graph.why_pinned(node)
    if pinned is not None:
        return str(pinned)
    # The solution closes the seeds of all ops under the constraints. The op to blame is the first whose own
    # seed, closed alone, reaches the slice.
    for op, needed, state in facts.readers():
        alone = network.graph.solve([(needed, state)], never_empty=False).state(node)
        if alone is True or alone[index]:
            return f"{op} {_VERBS.get(op.name, 'sums')} it with slices that are not zero"
    return _EMPTY_OR_ROUNDED


def not_removed(
    network: TracedNetwork, masked: ZeroSlices, plan: Plan, needless: ZeroSlices
) -> tuple[NotRemoved, ...]:
    """Return the masked slices that a plan keeps, with the reasons.

    `needless` are the slices that the function can do without, before widths were rounded up and the layers
    of stacks made even.
    """
    dropped, facts, found = plan.dropped(), None, []
    for name, by_axis in masked.items():
        if name in network.removed:
            continue
        for axis, marks in enumerate(by_axis):
            if marks is None:
                continue
            kept, free = marks & ~_vector(dropped[name][axis], marks), _vector(needless[name][axis], marks)
            if (needed := kept & ~free).any():
                facts = facts or network.facts(plan.zeros())
                node, first = network.values[name].axes[axis], int(np.flatnonzero(needed)[0])
                why = why_needed(network, facts, node, first)
                found.append(NotRemoved(name, axis, int(needed.sum()), why))
            if (spare := kept & free).any():
                why = _why_spare(network, needless, name, axis)
                found.append(NotRemoved(name, axis, int(spare.sum()), why))
    return tuple(found)


def _vector(marks: np.ndarray | None, like: np.ndarray) -> np.ndarray:
    return np.zeros_like(like) if marks is None else marks


def _why_spare(network: TracedNetwork, needless: ZeroSlices, name: str, axis: int) -> str:
    """Return why slices stay that the function can do without."""
    path, layer = network.paths[name]
    if not layer:
        return _EMPTY_OR_ROUNDED

    def width(other: str) -> int:
        """Return how many slices a layer needs."""
        free = needless[other][axis]
        return network.values[other].shape[axis] - (0 if free is None else int(free.sum()))

    layers = [other for other, (owner, _) in network.paths.items() if owner == path]
    widest = max((other for other in layers if other not in network.removed), key=width)
    if width(widest) <= width(name):
        return _EMPTY_OR_ROUNDED
    return f"the layers of a stack keep equally many slices, and {widest} needs {width(widest)}"
