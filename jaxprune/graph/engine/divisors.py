"""Divisors: slices of params that must not be zero, because the function divides by them.

Masks set the slices of a pruned unit to zero. Where the function divides by one of them (a learned scale, the
norm of a weight, a variance), that gives 0 / 0.

Why masks leave such slices alive, and `compact` drops them all the same
-------------------------------------------------------------------------
Take a unit u of y = sum over u of ((x @ w[:, u]) / s[u]) * v[u]. The masks remove w[:, u] and v[u]. If they
removed s[u] as well, the masked network would compute 0 / 0 * 0 = NaN, in a sum with all other units. With
s[u] alive it computes 0 / s[u] * 0 = 0, whatever s[u] != 0 is. So the unit contributes nothing, and s[u] is
never needed: `compact` drops w[:, u], v[u] and s[u] together. Its proof counts the zeros of w and v, but not
those of s (`solving` calls `without`), so it holds for any s[u] != 0, and `Plan.expand` puts copies of kept
slices there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxprune.graph.engine.axes import Vector
from jaxprune.graph.engine.facts import Facts, is_zero
from jaxprune.graph.engine.ir import Op
from jaxprune.graph.engine.program import TracedNetwork, ZeroSlices
from jaxprune.graph.engine.singular import Singularity, singularities

ParamAxis = tuple[str, int]
"""The path of a param and one of its axes."""


class Divisors(NamedTuple):
    """The slices that must not be zero."""

    axes: frozenset[ParamAxis]  # whose slices must keep their values for the function to be finite
    reason: Op | None = None  # an op that is not finite where these slices are zero
    unresolved: Op | None = None  # an op that is not finite whatever slices keep their values


def without(zeros: ZeroSlices, axes: frozenset[ParamAxis]) -> dict[str, list[Vector | None]]:
    """Return the zero slices of params, without those along some axes."""
    return {
        path: [None if (path, axis) in axes else zero for axis, zero in enumerate(marks)]
        for path, marks in zeros.items()
    }


def find_divisors(
    network: TracedNetwork, zeros: ZeroSlices, derivatives: bool, facts: Facts | None = None
) -> Divisors:
    """Return the axes of params whose slices must not be zero, among those that are to be zero.

    An operand may be zero because of one param (the norm of a weight), because of several at once
    (the norm of `x @ w + b`, which is zero if both are), or because of any of several (a product of
    two scales). In the first two cases each param without whose zeros the operand would not be zero is a
    divisor: all of them, not just one that would suffice, since a bias may happen to be zero. In the third
    case there is no such param, and each that makes the operand zero by itself is a divisor.

    Sparing one divisor may reveal another op that divides by zero, so this is repeated until none is left.
    With `derivatives`, the derivative has to be finite as well; `facts` are those of `zeros`, if known.
    """
    axes: frozenset[ParamAxis] = frozenset()
    reason = None
    before: set[int] | None = None
    while True:
        facts = network.facts(without(zeros, axes)) if facts is None else facts
        found = [s for s in singularities(network.region, facts) if derivatives or s.in_value]
        if found and before is None:  # an op may be singular without these zeros: the log of a constant
            before = {id(s.op) for s in singularities(network.region, network.facts({}))}
        found = [s for s in found if before is None or id(s.op) not in before]
        if not found:
            return Divisors(axes, reason)
        more: set[ParamAxis] = set()
        for cause in _Causes.by_component(network, facts, without(zeros, axes), found):
            more |= cause.find()
        reason = found[0].op if reason is None else reason
        if not more:
            return Divisors(axes, reason, found[0].op)
        axes, facts = axes | more, None


class _Causes:
    """Finds the zeros of params that make some ops singular, by trying these again with fewer zeros.

    A trial evaluates only the ops that the zeros pass through, which makes it cheap. They are found from the
    singular ops back, through values with zero slices on axes that constraints join to the singular ones.
    """

    def __init__(self, network: TracedNetwork, zeros: ZeroSlices, found: Sequence[Singularity]):
        self.network, self.zeros, self.found = network, zeros, list(found)
        self.ops: list[Op] = []
        self.candidates: list[ParamAxis] = []

    @classmethod
    def by_component(
        cls, network: TracedNetwork, facts: Facts, zeros: ZeroSlices, found: Sequence[Singularity]
    ) -> list["_Causes"]:
        """Return one instance for each set of singular ops whose axes constraints join."""
        number = network.graph.components()
        parts: list[tuple[set[int], list[Singularity]]] = []
        for singularity in found:
            components, ops = {number(node) for node in singularity.nodes}, [singularity]
            joined = [part for part in parts if part[0] & components]
            for part in joined:
                parts.remove(part)
                components, ops = components | part[0], part[1] + ops
            parts.append((components, ops))
        causes = []
        for components, ops in parts:
            cause = cls(network, zeros, ops)
            cause._trace_back(facts, components, number)
            causes.append(cause)
        return causes

    def _trace_back(self, facts: Facts, components: set[int], number: Callable[[int], int]) -> None:
        """Find the ops that the zeros pass through, and the axes of params that they start at."""
        read = {id(s.caller) for s in self.found}
        values: set[int] = set()
        for op in reversed(self.network.region.ops):
            if id(op) not in read and not any(id(output) in values for output in op.outputs):
                continue
            self.ops.append(op)
            for output in op.outputs:
                if is_zero(facts.of(output).fill):  # a sum whose addends are all zero: follow the addends
                    components |= {
                        number(node)
                        for value in op.inputs
                        for axis, node in enumerate(value.axes)
                        if facts.zero(value, axis) is not None
                    }
            for value in op.inputs:
                known = facts.of(value)
                joined = any(
                    zero is not None and number(node) in components
                    for zero, node in zip(known.zero, value.axes, strict=True)
                )
                if joined or known.fill is not None:
                    values.add(id(value))
        self.ops.reverse()
        self.candidates = [
            (path, axis)
            for path, marks in self.zeros.items()
            for axis, zero in enumerate(marks)
            if zero is not None
            and id(self.network.values[path]) in values
            and number(self.network.values[path].axes[axis]) in components
        ]

    def _extents(self, spared: frozenset[ParamAxis]) -> dict[int, float]:
        """Return how much of each op is singular if some axes of params are spared: have no zero slices."""
        facts = self.network.facts(without(self.zeros, spared), self.ops)
        found = singularities(self.network.region_of(self.ops), facts)
        return {id(singularity.op): singularity.extent for singularity in found}

    def find(self) -> set[ParamAxis]:
        """Return the axes of params that must not be zero."""
        candidates, result = frozenset(self.candidates), set[ParamAxis]()
        if len(candidates) == 1:
            return set(candidates)
        spared = {one: self._extents(frozenset({one})) for one in self.candidates}
        alone: dict[ParamAxis, dict[int, float]] | None = None
        for singularity in self.found:
            op = id(singularity.op)
            causes = {one for one in self.candidates if spared[one].get(op, 0) < singularity.extent}
            if not causes:
                alone = alone or {one: self._extents(candidates - {one}) for one in self.candidates}
                causes = {one for one in self.candidates if op in alone[one]}
            result |= causes
        return result
