"""Wrapped functions: composites, functions with a custom batching rule, `shard_map`.

Their bodies are regions. Where no slice was dropped the primitive is applied as traced, with its wrapping;
otherwise the body is replayed without it: a composite loses its name, a function its batching rule.
"""

from typing import Any

import jax

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.rules.base import Frame, Rule, learn_moved, learn_region, register_rule, tie_or_pin
from jaxprune.graph.engine.rules.calls import CHECKPOINTS, flow_body, link_body

WRAPPERS = ("composite", "custom_vmap_call")
RUN_ONCE = frozenset((*CHECKPOINTS, *WRAPPERS, "custom_jvp_call", "custom_vjp_call"))
"""Ops that run their body once, on all of their inputs."""


register_rule(
    *WRAPPERS,
    rule=Rule(link_body, flow_body, lambda op, args, frame: frame.run(op.regions["body"], args)),
)


# shard_map: an axis that is sharded is pinned, because each device sees a part of it; all others are free.


def _sides(op: Op) -> list[tuple[Value, Value, Any]]:
    """Return each value outside with its counterpart in the body and how it is sharded."""
    body, params = op.regions["body"], op.params
    inputs = zip(op.inputs, body.inputs, params["in_specs"], strict=True)
    return [*inputs, *zip(op.outputs, body.outputs, params["out_specs"], strict=True)]


def _is_sharded(spec: Any, axis: int) -> bool:
    return axis < len(spec) and spec[axis] is not None


def _link_shard_map(op: Op, graph: AxisGraph) -> None:
    for value, inner, spec in _sides(op):
        for axis, nodes in enumerate(zip(value.axes, inner.axes, strict=True)):
            tie_or_pin(graph, nodes, not _is_sharded(spec, axis), f"{op} shards it")


def _flow_shard_map(op: Op, facts: Facts) -> None:
    sides, count = _sides(op), len(op.inputs)
    for value, inner, spec in sides[:count]:
        axes = [None if _is_sharded(spec, axis) else axis for axis in range(len(value.shape))]
        learn_moved(facts, value, inner, axes, keeps_fill=True)
    learn_region(op.regions["body"], facts)
    for value, inner, spec in sides[count:]:
        # Devices may have different numbers, so of a fill only zero holds on all of them.
        axes = [None if _is_sharded(spec, axis) else axis for axis in range(len(value.shape))]
        learn_moved(facts, inner, value, axes)


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
        _link_shard_map, _flow_shard_map, _emit_shard_map, conservative="an axis that it shards is kept whole"
    ),
)
