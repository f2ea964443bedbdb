"""The op that `readers.separate` puts between a value and one of its readers: a copy with its own nodes.

What the value has to keep for the copy depends on how each axis of the value was made, its `Origin`. Let K
be the kept slices of an axis of the value v, and K1, K2, ... those of the copies c1, c2, ... of its readers.

- Made of constants alone: v costs no params, so it is computed whole and each reader takes its slices of it,
  c_r = v[K_r]. The axis of v is pinned, and the K_r are free and independent.
- Made of params entry by entry: v[K_r] can be taken as long as K contains K_r, so v keeps the union of what
  its readers keep: K *covers* each K_r, which asks nothing of the others.
- Made in any other way: K = K_r, as if there were no copy.
"""

from enum import IntEnum
from typing import Any

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op
from jaxprune.graph.engine.rules.base import Frame, Rule, register_rule
from jaxprune.graph.engine.rules.slices import take_dense

NAME = "per_reader"


class Origin(IntEnum):
    """What an axis of a value was made along; where it was made along several, the highest counts."""

    CONSTANT = 0  # constants alone, or nothing: the value was spread along the axis
    PARAM = 1  # params, entry by entry
    OTHER = 2  # inputs of the function, outputs of layers


def _link(op: Op, graph: AxisGraph) -> None:
    (value,), (copy,) = op.inputs, op.outputs
    for origin, a, b in zip(op.params["origins"], value.axes, copy.axes, strict=True):
        if origin is Origin.OTHER:
            graph.same(a, b)
        elif origin is Origin.PARAM:
            graph.cover(a, b, may_tie=True)
        elif op.params["pin_constants"]:
            graph.pin(a, "it is made of constants, once for all that read it")
        else:
            graph.cover(a, b)


def _flow(op: Op, facts: Facts) -> None:
    known = facts.of(op.inputs[0])
    facts.learn(op.outputs[0], known.zero, known.fill, known.alike)


def _emit(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    return [part_read(op, args[0], frame)]


def part_read(op: Op, array: Any, frame: Frame, except_axis: int | None = None) -> Any:
    """Return the part of an array that the reader of a copy keeps, along all axes but one."""
    (value,), (copy,) = op.inputs, op.outputs
    for axis in range(len(value.shape)):
        kept = frame.indices(copy, axis)
        if kept is not None and axis != except_axis:
            array = take_dense(frame, array, axis, kept, frame.indices(value, axis))
    return array


register_rule(NAME, rule=Rule(_link, _flow, _emit))
