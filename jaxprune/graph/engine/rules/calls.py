"""Primitives with bodies: loops, branches, checkpoints, functions with custom derivatives.

The inputs and outputs of a body are tied to those of the op, and its facts are learned inside it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts, ValueFacts, both, equal_marks
from jaxprune.graph.engine.ir import Op, Region, Value, bodies_of, flat_layers, is_differentiable
from jaxprune.graph.engine.rules.base import Frame, Rule, learn_region, register_rule
from jaxprune.tracing.jaxprs import scan_split

CHECKPOINTS = ("remat", "remat2", "checkpoint")


def tie(graph: AxisGraph, values: Sequence[Value], others: Sequence[Value], skip: int = 0) -> None:
    """Tie values to others that lack their first `skip` axes, layer by layer where they have layers."""
    for value, other in zip(values, others, strict=True):
        if other.layers and not value.layers:
            value, other = other, value
        if value.layers and other.layers:
            tie(graph, value.layers, other.layers)
            continue
        for layer in value.layers:
            graph.pin(other.axes[value.along], "it counts layers")
            rest = [node for axis, node in enumerate(other.axes) if axis != value.along]
            tie(graph, [layer], [replace(other, axes=tuple(rest))])
        for a, b in () if value.layers else zip(value.axes[skip:], other.axes, strict=True):
            graph.same(a, b)


def _copy_facts(facts: Facts, values: Sequence[Value], others: Sequence[Value]) -> None:
    """Learn of `others` what is known of `values`.

    `alike` is left out: a representative is rebuilt from the ops that made a value, which lie in another
    region.
    """
    for value, other in zip(values, others, strict=True):
        if value.layers and other.layers:
            _copy_facts(facts, value.layers, other.layers)
        elif value.layers or other.layers:  # facts of a dense value are not passed on to its layers
            for each in flat_layers(other):
                facts.learn(each)
        else:
            known = facts.of(value)
            facts.learn(other, known.zero, known.fill)


# Checkpointed code.


def link_body(op: Op, graph: AxisGraph) -> None:
    """A `link` that ties the inputs and outputs of the op to those of its body."""
    body = op.regions["body"]
    tie(graph, op.inputs, body.inputs)
    tie(graph, op.outputs, body.outputs)


def flow_body(op: Op, facts: Facts) -> None:
    """A `flow` that learns of the outputs what is known of the body's."""
    body = op.regions["body"]
    _copy_facts(facts, op.inputs, body.inputs)
    learn_region(body, facts)
    _copy_facts(facts, body.outputs, op.outputs)


def _emit_checkpoint(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    def body(*args: Any) -> list[Any]:
        return frame.run(op.regions["body"], list(args))

    again = jax.checkpoint(body, prevent_cse=op.params["prevent_cse"], policy=op.params["policy"])
    return again(*args)


register_rule(*CHECKPOINTS, rule=Rule(link_body, flow_body, _emit_checkpoint))


# Functions with custom derivatives: the derivative is a second body, under the same constraints.


def _moving(values: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Return those of some values whose counterparts have a tangent."""
    return [value for value, each in zip(values, like, strict=True) if is_differentiable(each)]


def _with_zeros(moving: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Return derivatives of all values, given those of the values that have a tangent."""
    left = iter(moving)
    return [next(left) if is_differentiable(p) else np.zeros(np.shape(p), jax.dtypes.float0) for p in like]


def _run_alike(op: Op, name: str, args: Sequence[Any], frame: Frame) -> list[Any]:
    """Run a body where all layers have to take slices at the same positions."""
    with frame.same_in_all_layers():
        return frame.run(op.regions[name], list(args))


def _link_jvp(op: Op, graph: AxisGraph) -> None:
    link_body(op, graph)
    jvp = op.regions["jvp"]
    tie(graph, [*op.inputs, *filter(is_differentiable, op.inputs)], jvp.inputs)
    tie(graph, [*op.outputs, *filter(is_differentiable, op.outputs)], jvp.outputs)


def _flow_jvp(op: Op, facts: Facts) -> None:
    flow_body(op, facts)
    jvp = op.regions["jvp"]
    # A slice that is zero whatever the live params are does not move.
    moving = filter(is_differentiable, op.inputs)
    _copy_facts(facts, op.inputs, jvp.inputs[: len(op.inputs)])
    for primal, its_tangent in zip(moving, jvp.inputs[len(op.inputs) :], strict=True):
        for value, tangent in zip(flat_layers(primal), flat_layers(its_tangent), strict=True):
            known = facts.of(value)
            facts.learn(tangent, known.zero, 0 if known.fill is not None else None)
    learn_region(jvp, facts)


def _emit_jvp(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    @jax.custom_jvp
    def function(*args):
        return _run_alike(op, "body", args, frame)

    def rule(primals, tangents):
        out = _run_alike(op, "jvp", [*primals, *_moving(tangents, op.inputs)], frame)
        primals_out = out[: len(op.outputs)]
        return primals_out, _with_zeros(out[len(op.outputs) :], primals_out)

    function.defjvp(rule)
    frame.foresee(op.regions["jvp"], [*args, *_moving(args, op.inputs)])
    return function(*args)


register_rule("custom_jvp_call", rule=Rule(_link_jvp, _flow_jvp, _emit_jvp))


def _link_vjp(op: Op, graph: AxisGraph) -> None:
    link_body(op, graph)
    vjp = op.regions["vjp"]
    tie(graph, [*op.inputs, *filter(is_differentiable, op.outputs)], vjp.inputs)
    tie(graph, list(filter(is_differentiable, op.inputs)), vjp.outputs)


def _flow_vjp(op: Op, facts: Facts) -> None:
    flow_body(op, facts)
    vjp = op.regions["vjp"]
    _copy_facts(facts, op.inputs, vjp.inputs[: len(op.inputs)])
    for cotangent in vjp.inputs[len(op.inputs) :]:
        for each in flat_layers(cotangent):
            facts.learn(each)
    learn_region(vjp, facts)


def _emit_vjp(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    @jax.custom_vjp
    def function(*args):
        return _run_alike(op, "body", args, frame)

    def forward(*args):
        return function(*args), args

    def backward(args, cotangents):
        out = _run_alike(op, "vjp", [*args, *_moving(cotangents, op.outputs)], frame)
        return tuple(_with_zeros(out, args))

    function.defvjp(forward, backward)
    outputs = function(*args)
    frame.foresee(op.regions["vjp"], [*args, *_moving(outputs, op.outputs)])
    return outputs


register_rule("custom_vjp_call", rule=Rule(_link_vjp, _flow_vjp, _emit_vjp))


# Branches: a slice of an output is zero if it is zero in all branches.


def _link_cond(op: Op, graph: AxisGraph) -> None:
    for branch in op.regions.values():
        tie(graph, op.inputs[1:], branch.inputs)
        tie(graph, op.outputs, branch.outputs)


def _flow_cond(op: Op, facts: Facts) -> None:
    branches = list(op.regions.values())
    for branch in branches:
        _copy_facts(facts, op.inputs[1:], branch.inputs)
        learn_region(branch, facts)
    for place, output in enumerate(op.outputs):
        known = _shared([facts.of(branch.outputs[place]) for branch in branches])
        facts.learn(output, known.zero, known.fill)


def _shared(known: Sequence[ValueFacts]) -> ValueFacts:
    """Return the facts that hold in all of several cases."""
    first, *rest = known
    zero = list(first.zero)
    for other in rest:
        zero = [both(a, b) for a, b in zip(zero, other.zero, strict=True)]
    equal = first.fill is not None and all(k.fill is not None and k.fill == first.fill for k in rest)
    return ValueFacts(tuple(zero), first.fill if equal else None, (None,) * len(zero))


def _emit_cond(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    def replayed(branch: Region) -> Any:
        return lambda *args: frame.run(branch, list(args))

    return lax.switch(args[0], [replayed(branch) for branch in op.regions.values()], *args[1:])


register_rule("cond", rule=Rule(_link_cond, _flow_cond, _emit_cond))


# Loops: the carry has the same slices in every round.


def _link_scan(op: Op, graph: AxisGraph) -> None:
    body = op.regions["body"]
    consts, carried = scan_split(op.params)
    tie(graph, op.inputs[: consts + carried], body.inputs[: consts + carried])
    tie(graph, op.inputs[consts + carried :], body.inputs[consts + carried :], skip=1)
    tie(graph, op.outputs[:carried], body.outputs[:carried])
    tie(graph, body.inputs[consts : consts + carried], body.outputs[:carried])
    tie(graph, op.outputs[carried:], body.outputs[carried:], skip=1)
    for value in (*op.inputs[consts + carried :], *op.outputs[carried:]):
        graph.pin(value.axes[0], f"{op} runs along it")


def _flow_scan(op: Op, facts: Facts) -> None:
    body = op.regions["body"]
    consts, carried = scan_split(op.params)
    _copy_facts(facts, op.inputs[:consts], body.inputs[:consts])
    for value, inner in zip(op.inputs[consts + carried :], body.inputs[consts + carried :], strict=True):
        known = facts.of(value)
        facts.learn(inner, known.zero[1:], known.fill)
    _flow_round(op.inputs[consts : consts + carried], body, consts, carried, facts)
    _copy_facts(facts, body.inputs[consts : consts + carried], op.outputs[:carried])
    for inner, value in zip(body.outputs[carried:], op.outputs[carried:], strict=True):
        known = facts.of(inner)
        facts.learn(value, [None, *known.zero], known.fill)


def _flow_round(initial: Sequence[Value], body: Region, consts: int, carried: int, facts: Facts) -> None:
    """Learn the facts of a loop's body that hold in every round.

    The fixpoint starts at the facts of the initial carry, and drops what a round does not preserve. Facts
    are only ever dropped, so it ends; when it ends, what holds before a round also holds after it.
    """
    _copy_facts(facts, initial, body.inputs[consts : consts + carried])
    while True:
        learn_region(body, facts)
        changed = False
        for before, after in zip(body.inputs[consts : consts + carried], body.outputs[:carried], strict=True):
            old = facts.of(before)
            known = _shared([old, facts.of(after)])
            changed |= (known.fill is None) != (old.fill is None) or not equal_marks(known.zero, old.zero)
            facts.learn(before, known.zero, known.fill)
        if not changed:
            return


def _emit_scan(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    body = op.regions["body"]
    consts, carried = scan_split(op.params)

    def step(carry, xs):
        out = frame.run(body, [*args[:consts], *carry, *xs])
        return out[:carried], out[carried:]

    settings = {name: op.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, args[consts : consts + carried], args[consts + carried :], **settings)
    return [*carry, *ys]


register_rule(
    "scan",
    rule=Rule(
        _link_scan,
        _flow_scan,
        _emit_scan,
        conservative="the axis that it runs along is kept whole; layers of stacked params lose slices apart",
    ),
)


def _link_while(op: Op, graph: AxisGraph) -> None:
    for body in bodies_of(op):
        tie(graph, body.given, body.region.inputs)
    carry = op.inputs[len(op.inputs) - len(op.outputs) :]
    tie(graph, carry, op.outputs)
    tie(graph, carry, op.regions["body"].outputs)


def _flow_while(op: Op, facts: Facts) -> None:
    condition, body = bodies_of(op)
    inputs, first = body.region.inputs, condition.consts
    _copy_facts(facts, body.given[: body.consts], inputs[: body.consts])
    _flow_round(body.given[body.consts :], body.region, body.consts, body.carried, facts)
    _copy_facts(facts, condition.given[:first], condition.region.inputs[:first])
    _copy_facts(facts, inputs[body.consts :], condition.region.inputs[first:])
    learn_region(condition.region, facts)
    _copy_facts(facts, inputs[body.consts :], op.outputs)


def _emit_while(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    of_condition, of_body = op.params["cond_nconsts"], op.params["body_nconsts"]
    consts, body_consts = args[:of_condition], args[of_condition : of_condition + of_body]
    return lax.while_loop(
        lambda carry: frame.run(op.regions["condition"], [*consts, *carry])[0],
        lambda carry: frame.run(op.regions["body"], [*body_consts, *carry]),
        list(args[of_condition + of_body :]),
    )


register_rule("while", rule=Rule(_link_while, _flow_while, _emit_while))
