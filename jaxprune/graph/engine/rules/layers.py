"""Stacks taken apart into layers, and put together again: the axis that counts layers is pinned."""

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op
from jaxprune.graph.engine.rules.base import Rule, emit_unchanged, register_rule
from jaxprune.graph.engine.rules.slices import stack


def _link_take(op: Op, graph: AxisGraph) -> None:
    (value,), (layer,) = op.inputs, op.outputs
    rest = [node for axis, node in enumerate(value.axes) if axis != op.params["axis"]]
    graph.pin(value.axes[op.params["axis"]], f"{op.source} runs along it")
    for a, b in zip(rest, layer.axes, strict=True):
        graph.same(a, b)


def _flow_take(op: Op, facts: Facts) -> None:
    known, along = facts.of(op.inputs[0]), op.params["axis"]
    zero = known.zero[along]
    fill = 0 if zero is not None and zero[op.params["index"]] else known.fill
    facts.learn(op.outputs[0], [z for axis, z in enumerate(known.zero) if axis != along], fill)


register_rule("take_layer", rule=Rule(_link_take, _flow_take, emit_unchanged))
register_rule("join_layers", rule=stack)
