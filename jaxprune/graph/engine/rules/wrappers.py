"""Functions in a wrapping: composites, functions with a batching rule of their own, `shard_map`.

Their bodies are regions. Where nothing was cut the primitive is applied as it was, with its wrapping;
where something was, the body is run on what is left, which has lost its name or its batching rule.
"""

from typing import Any

import jax

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.rules.base import Frame, Rule, register_rule
from jaxprune.graph.engine.rules.calls import flow_body, link_body, run_region


def _emit_body(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    return frame.run(op.regions["body"], args)


register_rule("composite", "custom_vmap_call", rule=Rule(link_body, flow_body, _emit_body))


# shard_map: a device sees its part of an axis that is sharded, which stays whole, and all of the others.


def _whole_axes(value: Value, inner: Value) -> list[int]:
    """The axes of which each device sees all."""
    pairs = enumerate(zip(value.shape, inner.shape, strict=True))
    return [axis for axis, (size, part) in pairs if size is part or size == part]


def _sides(op: Op) -> list[tuple[Value, Value, Any]]:
    """Each value outside, its like in the body, and how it is sharded."""
    body, params = op.regions["body"], op.params
    inputs = zip(op.inputs, body.inputs, params["in_specs"], strict=True)
    return [*inputs, *zip(op.outputs, body.outputs, params["out_specs"], strict=True)]


def _is_sharded(spec: Any, axis: int) -> bool:
    return axis < len(spec) and spec[axis] is not None


def _link_shard_map(op: Op, graph: AxisGraph) -> None:
    for value, inner, spec in _sides(op):
        for axis, (a, b) in enumerate(zip(value.axes, inner.axes, strict=True)):
            if _is_sharded(spec, axis):
                graph.pin(a, f"{op} shards it")
                graph.pin(b, f"{op} shards it")
            else:
                graph.same(a, b)


def _flow_shard_map(op: Op, facts: Facts) -> None:
    body = op.regions["body"]
    for value, inner, spec in _sides(op)[: len(op.inputs)]:
        known = facts.of(value)
        zeros = [None if _is_sharded(spec, axis) else zero for axis, zero in enumerate(known.zero)]
        facts.learn(inner, zeros, known.fill)
    run_region(body, facts)
    for value, inner, spec in _sides(op)[len(op.inputs) :]:
        known = facts.of(inner)
        zeros = [None if _is_sharded(spec, axis) else zero for axis, zero in enumerate(known.zero)]
        # Each device may have a number of its own, unless it is zero on all.
        facts.learn(value, zeros, 0 if facts.all_zero(inner) else None)


def _emit_shard_map(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    params = op.params

    def body(*args: Any) -> tuple[Any, ...]:
        with frame.same_in_all_layers():
            return tuple(frame.run(op.regions["body"], list(args)))

    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*args))


register_rule(
    "shard_map",
    rule=Rule(
        _link_shard_map, _flow_shard_map, _emit_shard_map, conservative="an axis that it shards stays whole"
    ),
)
