"""The fewest slices that a function can do with, given which slices of its params are zero."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxprune.graph.engine.axes import Solution, State, Vector
from jaxprune.graph.engine.divisors import ParamAxis, find_divisors, without
from jaxprune.graph.engine.program import TracedNetwork, ZeroSlices


def solve_to_fixpoint(
    network: TracedNetwork,
    zeros_given: Callable[[ZeroSlices], ZeroSlices],
    seeds: Sequence[tuple[int, State]] = (),
) -> tuple[Solution, frozenset[ParamAxis]]:
    """The fewest slices to keep, such that only dropped slices have to be zero for it.

    First a dropped slice counts as zero, for there is nothing of it left, and what it made
    needless is dropped too, until nothing changes. Then only the slices of params that are
    dropped count as zero, and what was justified by other zeros is kept, until nothing changes:
    a kept slice may be trained, so that it happened to be zero must not matter.

    The function of the dense params has to be defined where the dropped slices have the values
    that `Plan.expand` gives them. Where it divides by a dropped slice, that value must not be
    zero, so the drop has to be justified without counting that slice as zero.

    Args:
      network: the function.
      zeros_given: the slices of params that are zero, given that some are dropped.
      seeds: what has to stay.

    Returns:
      The solution, and the axes of params whose dropped slices must not be zero.
    """
    dropped: ZeroSlices = {path: [None] * len(value.axes) for path, value in network.values.items()}
    while True:
        kept = network.solve(network.facts(zeros_given(dropped)), seeds)
        more = _joined(dropped, network.dropped(kept))
        if _equal(more, dropped):
            break
        dropped = more
    kept, dropped = _settle(network, dropped, seeds)
    divisors: frozenset[ParamAxis] = frozenset()
    for derivatives in (True, False):
        divisors = find_divisors(network, dropped, derivatives).axes
        if not divisors:
            return kept, divisors
        justified, fewer = _settle(network, dropped, seeds, divisors)
        # An infinite derivative alone is no reason to keep more.
        if not derivatives or _equal(fewer, dropped):
            return justified, divisors
    raise AssertionError


def _settle(
    network: TracedNetwork,
    dropped: ZeroSlices,
    seeds: Sequence[tuple[int, State]],
    divisors: frozenset[ParamAxis] = frozenset(),
) -> tuple[Solution, ZeroSlices]:
    """The slices to keep if of those dropped only the ones that stay dropped, but for divisors, are zero."""
    while True:
        facts = network.facts(without(dropped, divisors))
        kept = network.solve(facts, [*network.seeds(dropped), *seeds])
        fewer = network.dropped(kept)
        if _equal(fewer, dropped):
            return kept, dropped
        dropped = fewer


def _joined(a: ZeroSlices, b: ZeroSlices) -> dict[str, list[Vector | None]]:
    def joined(x: Vector | None, y: Vector | None) -> Vector | None:
        return (x if y is None else y) if x is None or y is None else x | y

    return {path: [joined(x, y) for x, y in zip(a[path], b[path], strict=True)] for path in a}


def _equal(a: ZeroSlices, b: ZeroSlices) -> bool:
    def equal(x: Vector | None, y: Vector | None) -> bool:
        return np.array_equal(_marks(x, y), _marks(y, x))

    return all(equal(x, y) for path in a for x, y in zip(a[path], b[path], strict=True))


def _marks(marks: Vector | None, like: Vector | None) -> Vector:
    if marks is None:
        return np.zeros(0 if like is None else len(like), bool)
    return marks


def zero_slices(masks: Mapping[str, np.ndarray], dropped: ZeroSlices | None = None) -> ZeroSlices:
    """The slices of each param of which the masks keep nothing but what is dropped."""

    def zero(mask: np.ndarray, axis: int) -> np.ndarray | None:
        alive = np.asarray(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        return None if alive.all() else ~alive

    zeros = {}
    for path, mask in masks.items():
        for axis, gone in enumerate(() if dropped is None else dropped[path]):
            if gone is not None:
                mask = mask & ~np.expand_dims(gone, [a for a in range(mask.ndim) if a != axis])
        zeros[path] = [zero(mask, axis) for axis in range(mask.ndim)]
    return zeros
