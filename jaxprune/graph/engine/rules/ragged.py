"""Ragged products, as of experts: the rows of the left side in groups, each multiplied by its own matrix.

The group of a row follows from its position, so the axes of rows and of groups are pinned. All other axes are
those of a matrix product: hidden units of experts can be dropped, at the same index in all experts.
"""

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, either
from jaxprune.graph.engine.ir import Op
from jaxprune.graph.engine.rules.base import Rule, emit_unchanged, register_rule


def _numbers(op: Op) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int, list[int]]:
    """Return the pairs of summed and of batch axes, the ragged axis of the left, the groups of the right."""
    numbers = op.params["ragged_dot_dimension_numbers"]
    (left_sum, right_sum), (left_batch, right_batch) = numbers.dot_dimension_numbers
    sums = list(zip(left_sum, right_sum, strict=True))
    batch = list(zip(left_batch, right_batch, strict=True))
    return sums, batch, numbers.lhs_ragged_dimensions[0], list(numbers.rhs_group_dimensions)


def _output_axes(op: Op) -> tuple[list[tuple[int | None, int | None]], int]:
    """Return the axes of the output, as axes of the left and of the right, and how many precede them."""
    left, right = op.inputs[:2]
    sums, batch, ragged, groups = _numbers(op)
    summed, others = zip(*sums, strict=True) if sums else ((), ())
    of_left, of_right = zip(*batch, strict=True) if batch else ((), ())
    axes: list[tuple[int | None, int | None]] = list(batch)
    axes += [(a, None) for a in range(len(left.shape)) if a not in (*summed, *of_left)]
    axes += [(None, b) for b in range(len(right.shape)) if b not in (*others, *of_right, *groups)]
    return axes, int(ragged in summed)  # summed row by row, the groups are an axis of the output


def _sized(op: Op) -> list[int]:
    """Return the axes of the left along which group sizes may differ."""
    sums, batch, ragged, _ = _numbers(op)
    summed, of_batch = [a for a, _ in sums], [a for a, _ in batch]
    if ragged in of_batch:
        return of_batch
    if ragged in summed:
        return [*of_batch, *summed]
    return [axis for axis in range(len(op.inputs[0].shape)) if axis not in summed]


def _link(op: Op, graph: AxisGraph) -> None:
    (left, right, sizes), (output,) = op.inputs, op.outputs
    sums, _, ragged, groups = _numbers(op)
    axes, before = _output_axes(op)
    why = f"{op} tells groups apart by their places in it"
    # Group sizes may differ along other axes of the left, which are then pinned as well.
    pinned = _sized(op) if len(sizes.shape) > 1 else [ragged]
    for node in (*(left.axes[a] for a in pinned), *(right.axes[g] for g in groups), *sizes.axes):
        graph.pin(node, why)
    for node in output.axes[:before]:
        graph.pin(node, why)
    for a, b in sums:
        graph.same(left.axes[a], right.axes[b])
    for node, (a, b) in zip(output.axes[before:], axes, strict=True):
        for value, axis in ((left, a), (right, b)):
            if axis is not None:
                graph.same(value.axes[axis], node)


def _flow(op: Op, facts: Facts) -> None:
    (left, right), (output,) = op.inputs[:2], op.outputs
    sums, _, ragged, _ = _numbers(op)
    axes, before = _output_axes(op)
    nothing = facts.all_zero(left) or facts.all_zero(right)
    for a, b in sums:
        zero = either(facts.zero(left, a), facts.zero(right, b))
        if a != ragged:
            facts.need(op, left, a, zero)
        nothing |= zero is not None and bool(zero.all())
    zeros: list[Vector | None] = [None] * before
    for a, b in axes:
        of_left = None if a is None else facts.zero(left, a)
        zeros.append(either(of_left, None if b is None else facts.zero(right, b)))
    facts.learn(output, zeros, fill=0 if nothing else None)


register_rule(
    "ragged_dot",
    "ragged_dot_general",
    rule=Rule(
        _link, _flow, emit_unchanged, conservative="rows in groups, and the groups (experts), are kept whole"
    ),
)
