"""What a rule is, the table of rules, and the rules of all ops of a region applied in turn.

A rule states three things about a primitive:

- `link(op, graph)`: which axes of its inputs and outputs have to keep slices together;
- `flow(op, facts)`: which slices of its outputs are zero, given those of its inputs, and which
  slices of its inputs it has to read;
- `emit(op, args, frame)`: how to apply it to inputs that have lost slices.

A primitive without a rule is safe: its inputs are pinned, and its outputs are cut afterwards.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts, surely_equal
from jaxprune.graph.engine.ir import Op, Region, Value


class Frame(Protocol):
    """What an `emit` can use while a region is replayed."""

    facts: Facts

    def shape(self, value: Value) -> tuple[Any, ...]:
        """Return the shape of a value without the dropped slices."""
        ...

    def indices(self, value: Value, axis: int) -> Any:
        """Return the kept slices of an axis as a vector of indices; None for all of them."""
        ...

    def node_size(self, node: int, dense: Any) -> Any:
        """Return how many slices of a node are kept; `dense` if all of them are."""
        ...

    def take(self, array: Any, axis: int, positions: Any) -> Any:
        """Return the slices of an array at known positions.

        Positions that depend on which slices are kept have to be taken this way: they may differ between
        the layers of a stack, and one loop runs all layers.
        """
        ...

    def representative(self, value: Value, axis: int) -> Any:
        """Return one of the slices that are alike along an axis, as an axis of size 1."""
        ...

    def run(self, region: Region, args: list[Any]) -> list[Any]:
        """Replay a region of the op on inputs that have lost slices."""
        ...

    def same_in_all_layers(self) -> Any:
        """Return a context, for custom derivatives, in which all layers take slices at the same positions."""
        ...

    def foresee(self, region: Region, args: list[Any]) -> None:
        """Announce that a region will be replayed on such inputs later, when a derivative is taken."""
        ...


class Rule(NamedTuple):
    """How a primitive treats axes.

    Attributes:
      link: adds the op's constraints to the graph.
      flow: learns the facts of the op's outputs, and states which slices of its inputs it needs.
      emit: applies the op to cut inputs. It returns a list of outputs; an axis that still has
        its dense size is cut by the caller.
      conservative: a sentence that says which axes the rule keeps whole although that is not always
        necessary, for the table of primitives; empty for a rule that keeps no more than it must.
    """

    link: Callable[[Op, AxisGraph], None]
    flow: Callable[[Op, Facts], None]
    emit: Callable[[Op, list[Any], Frame], list[Any]]
    conservative: str = ""


def learn_nothing(op: Op, facts: Facts) -> None:
    """A `flow` that learns nothing about the outputs."""
    for output in op.outputs:
        facts.learn(output)


def emit_unchanged(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    """An `emit` that applies the primitive with unchanged parameters, because they name no sizes."""
    del frame
    return op.bind(*args)


def pin_inputs(op: Op, graph: AxisGraph) -> None:
    """A `link` that pins the inputs. Outputs are free, since they can be cut afterwards."""
    for value in op.inputs:
        for node in value.axes:
            graph.pin(node, f"{op} has no rule")


def tie_or_pin(graph: AxisGraph, nodes: Sequence[int], tied: bool, why: str) -> None:
    """Tie some nodes to each other, or pin all of them."""
    for node in nodes:
        if tied:
            graph.same(nodes[0], node)
        else:
            graph.pin(node, why)


def link_moved(graph: AxisGraph, value: Value, output: Value, axes: Iterable[int | None]) -> None:
    """Tie each axis of an output to the axis of a value that `axes` says it is; None for a new axis."""
    for axis, node in zip(axes, output.axes, strict=True):
        if axis is not None:
            graph.same(value.axes[axis], node)


def learn_moved(
    facts: Facts, value: Value, output: Value, axes: Iterable[int | None], keeps_fill: bool = False
) -> None:
    """Learn which slices of an output are zero, from the axis of a value that each of its axes is, or None.

    With `keeps_fill`, entries only move, so any number that fills the value fills the output; else only 0.
    """
    zeros = [None if axis is None else facts.zero(value, axis) for axis in axes]
    fill = 0 if facts.all_zero(value) else None
    facts.learn(output, zeros, facts.of(value).fill if keeps_fill else fill)


_RULES: dict[str, Rule] = {}
_WITHOUT_RULE = Rule(pin_inputs, learn_nothing, emit_unchanged)


def register_rule(*names: str, rule: Rule) -> None:
    """Register a rule for primitives, in place of an earlier rule.

    Args:
      *names: names of primitives, as jaxprs print them.
      rule: the rule.

    Raises:
      ValueError: no name is given.
      TypeError: a name is not a string, or `rule` is not a `Rule`.

    Example:
      An elementwise primitive takes one line, `flow` included: whether it maps zero to zero is found by
      trying it on 0.

      >>> import jaxprune as jp
      >>> jp.graph.register_rule("my_activation", rule=jp.graph.elementwise)
    """
    if not names:
        raise ValueError("register_rule needs the name of a primitive or more.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"register_rule takes names of primitives as jaxprs print them, got {name!r}.")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a jaxprune.graph.Rule, got {rule!r}.")
    _RULES.update(dict.fromkeys(names, rule))


def rule_for(name: str) -> Rule:
    """Return the rule of a primitive; the safe one for a primitive that has none."""
    return _RULES.get(name, _WITHOUT_RULE)


def has_rule(name: str) -> bool:
    """Whether a rule is registered for a primitive."""
    return name in _RULES


def link_region(region: Region, graph: AxisGraph) -> None:
    """Add the constraints of all ops of a region, bodies first."""
    for op in region.ops:
        for inner in op.regions.values():
            link_region(inner, graph)
        rule_for(op.name).link(op, graph)


def learn_region(region: Region, facts: Facts) -> None:
    """Learn the facts of all values of a region, given those of its inputs."""
    for op in region.ops:
        rule_for(op.name).flow(op, facts)


def learn_changes(region: Region, facts: Facts, before: Facts, changed: Iterable[Value]) -> list[Op]:
    """Learn what follows from new facts about some values, looking only at ops that these reach.

    `facts` is a copy of `before`, the facts of all values, with new facts of the values in `changed`. Returns
    the ops whose inputs have other facts than before, in order.
    """
    reached, ops = set(map(id, changed)), list[Op]()
    for op in region.ops:
        if any(id(value) in reached for value in op.inputs):
            rule_for(op.name).flow(op, facts)
            ops.append(op)
            reached.update(id(v) for v in op.outputs if not surely_equal(facts.of(v), before.of(v)))
    return ops
