"""The fewest slices that a function needs, given which slices of its params are zero."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxprune.graph.engine.axes import Solution, State
from jaxprune.graph.engine.divisors import ParamAxis, find_divisors, without
from jaxprune.graph.engine.facts import either
from jaxprune.graph.engine.program import TracedNetwork, ZeroSlices, same_zeros


def solve_to_fixpoint(
    network: TracedNetwork,
    zeros_given: Callable[[ZeroSlices], ZeroSlices],
    seeds: Sequence[tuple[int, State]] = (),
) -> tuple[Solution, frozenset[ParamAxis]]:
    """Return the fewest slices to keep such that only the dropped slices have to be zero for it.

    Let needed(Z) be the slices that the function needs if the slices Z of its params are zero, and let M be
    the slices that masks make zero: `zeros_given(D)` is M + D. There are two fixpoints.

    Growing: D := D + complement of needed(M + D), starting from D empty. A dropped slice counts as zero even
    if its mask does not say so, because nothing of it is left. So a dead unit also takes with it the weights
    that only it fed, and those that only fed it.

    Shrinking: D := complement of needed(D). Now only dropped slices count as zero. A slice of M that is kept
    may be trained, and a bias may happen to be zero today: neither may justify a drop. D shrinks until the
    zeros of D alone justify dropping D. Then small(s) = dense(expand(s)) for *every* s, since the proof used
    nothing about kept slices.

    Both end, because D only grows, then only shrinks.

    Divisors: the dense function must be finite where the dropped slices have the values that `Plan.expand`
    gives them. Where it divides by a dropped slice, that value must not be zero, so the drop has to be
    justified without counting that slice among the zeros; see `divisors`. The axes of params that have such
    slices are returned beside the solution.
    """
    dropped: ZeroSlices = {path: [None] * len(value.axes) for path, value in network.values.items()}
    while True:
        kept = network.solve(network.facts(zeros_given(dropped)), seeds)
        new = network.dropped(kept)
        more = {path: list(map(either, dropped[path], new[path])) for path in dropped}
        if same_zeros(more, dropped):
            break
        dropped = more
    kept, dropped = _settle(network, dropped, seeds)
    divisors: frozenset[ParamAxis] = frozenset()
    for derivatives in (True, False):
        divisors = find_divisors(network, dropped, derivatives).axes
        if not divisors:
            return kept, divisors
        justified, fewer = _settle(network, dropped, seeds, divisors)
        # If only the derivative is infinite, that does not justify keeping more slices.
        if not derivatives or same_zeros(fewer, dropped):
            return justified, divisors
    raise AssertionError


def _settle(
    network: TracedNetwork,
    dropped: ZeroSlices,
    seeds: Sequence[tuple[int, State]],
    divisors: frozenset[ParamAxis] = frozenset(),
) -> tuple[Solution, ZeroSlices]:
    """Shrink the dropped slices until their zeros, without those of divisors, justify dropping them."""
    while True:
        facts = network.facts(without(dropped, divisors))
        kept = network.solve(facts, [*network.seeds(dropped), *seeds])
        fewer = network.dropped(kept)
        if same_zeros(fewer, dropped):
            return kept, dropped
        dropped = fewer


def zero_slices(masks: Mapping[str, np.ndarray], dropped: ZeroSlices | None = None) -> ZeroSlices:
    """Return the slices of each param that are zero: masked, or dropped, in every entry."""

    def zero(mask: np.ndarray, axis: int) -> np.ndarray | None:
        alive = np.asarray(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        return None if alive.all() else ~alive

    zeros = {}
    for path, mask in masks.items():
        for axis, marks in enumerate(() if dropped is None else dropped[path]):
            if marks is not None:
                mask = mask & ~np.expand_dims(marks, [a for a in range(mask.ndim) if a != axis])
        zeros[path] = [zero(mask, axis) for axis in range(mask.ndim)]
    return zeros
