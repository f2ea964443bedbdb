"""Bits of entries, and random keys and numbers."""

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.ir import Op
from jaxprune.graph.engine.rules.base import Rule, emit_unchanged, learn_nothing, pin_inputs, register_rule

# An array reinterpreted as another type: with a smaller type it has one more axis, of the parts of an entry.


def _link_cast(op: Op, graph: AxisGraph) -> None:
    (value,), (output,) = op.inputs, op.outputs
    for a, b in zip(value.axes, output.axes, strict=False):
        graph.same(a, b)
    shorter, longer = sorted((value.axes, output.axes), key=len)
    for node in longer[len(shorter) :]:
        graph.pin(node, f"{op} takes entries apart along it")


register_rule(
    *("bitcast_convert_type", "random_wrap", "random_unwrap", "random_clone"),
    rule=Rule(_link_cast, learn_nothing, emit_unchanged, "the axis of the parts of an entry is kept whole"),
)


# Random numbers are drawn as in the dense program and cut afterwards, so that the kept ones are the same.

register_rule(
    *("random_bits", "random_gamma", "random_seed", "random_split", "random_fold_in"),
    "rng_bit_generator",
    rule=Rule(
        pin_inputs, learn_nothing, emit_unchanged, "drawn whole, then cut, so that the kept bits are the same"
    ),
)
