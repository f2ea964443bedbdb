"""What a rule is, and the table of rules.

A rule tells three things about a primitive:

- `link(op, graph)`: which axes of its inputs and outputs hang together;
- `flow(op, facts)`: which slices of its outputs are zero, given those of its inputs, and which
  slices of its inputs it cannot do without;
- `emit(op, args, frame)`: how to apply it to inputs that have lost slices.

A primitive without a rule is safe: its inputs stay whole, and its outputs are cut afterwards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, Region, Value


class Frame(Protocol):
    """What `emit` can ask while a region is replayed."""

    facts: Facts

    def shape(self, value: Value) -> tuple[Any, ...]:
        """The shape of a value without the slices that go."""
        ...

    def indices(self, value: Value, axis: int) -> Any:
        """Which slices of an axis stay, as an index vector; None for all of them."""
        ...

    def node_size(self, node: int, dense: Any) -> Any:
        """How many slices of a node stay, of so many in the dense program."""
        ...

    def take(self, array: Any, axis: int, positions: Any) -> Any:
        """Slices of an array at known positions.

        Positions that depend on which slices stay have to be taken this way: those of the layers of a
        stack may differ, and one program does them all.
        """
        ...

    def representative(self, value: Value, axis: int) -> Any:
        """One of the slices that are alike along an axis, which then has size 1."""
        ...

    def run(self, region: Region, args: list[Any]) -> list[Any]:
        """Replays a region of the op on inputs that have lost slices."""
        ...

    def same_in_all_layers(self) -> Any:
        """A context for functions that must not close over arrays: one with a derivative of its own."""
        ...

    def foresee(self, region: Region, args: list[Any]) -> None:
        """Says that a region will be replayed on such inputs later, when a derivative is taken."""
        ...


class Rule(NamedTuple):
    """How a primitive treats axes.

    Attributes:
      link: adds the op's constraints to the graph.
      flow: learns the facts of the op's outputs, and states its needs.
      emit: applies the op to cut inputs. It returns a list of outputs; an axis that still has
        its dense size is cut by the caller.
      conservative: what stays whole though it need not always, for the table of primitives; empty for
        a rule that keeps no more than what is needed.
    """

    link: Callable[[Op, AxisGraph], None]
    flow: Callable[[Op, Facts], None]
    emit: Callable[[Op, list[Any], Frame], list[Any]]
    conservative: str = ""


def unknown(op: Op, facts: Facts) -> None:
    """A `flow`: nothing is known of the outputs."""
    for output in op.outputs:
        facts.learn(output)


def as_it_was(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    """An `emit`: the primitive with its own parameters, which name no sizes."""
    del frame
    return op.bind(*args)


def pin_inputs(op: Op, graph: AxisGraph) -> None:
    """A `link`: the inputs stay whole; outputs are free, since they can be cut afterwards."""
    for value in op.inputs:
        for node in value.axes:
            graph.pin(node, f"{op} has no rule")


_RULES: dict[str, Rule] = {}
_WITHOUT_RULE = Rule(pin_inputs, unknown, as_it_was)


def register_rule(*names: str, rule: Rule) -> None:
    """Registers a rule for primitives, in place of any there was.

    Args:
      *names: names of primitives, as jaxprs print them.
      rule: the rule.

    Raises:
      ValueError: no name.
      TypeError: a name that is no string, or a rule that is no `Rule`.

    Example:
      An elementwise primitive of one's own needs one line, `flow` included: whether zeros stay
      zero is found by trying it on 0.

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
    """The rule of a primitive, or the safe one for what has none."""
    return _RULES.get(name, _WITHOUT_RULE)


def has_rule(name: str) -> bool:
    """Whether a primitive has a rule of its own."""
    return name in _RULES
