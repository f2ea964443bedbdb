"""Traces a function into a program: the values, ops and regions of `ir`.

Calls (`jit`) are inlined. Ops on stacks, a scan over layers among them, go to `layerwise`; so each layer gets
axes of its own wherever the function does not mix layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.building import Builder, Site
from jaxprune.graph.engine.derivatives import jvp_jaxpr, vjp_jaxpr
from jaxprune.graph.engine.ir import Program, Region, Value, is_differentiable
from jaxprune.graph.engine.layerwise import apply_to_layers
from jaxprune.graph.engine.liveness import prune_dead
from jaxprune.graph.engine.rules.calls import CHECKPOINTS
from jaxprune.graph.engine.rules.wrappers import WRAPPERS
from jaxprune.graph.engine.stacking import find_stacks
from jaxprune.tracing.jaxprs import abstract, close, is_library_call, place

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

INLINED = ("jit", "pjit", "closed_call", "core_call")
_CUSTOM_DEPTH = 2  # derivatives of a custom rule that are taken by the rule itself


def trace(
    function: Callable[..., Any],
    *arguments: Any,
    stacks: Mapping[int, tuple[int, ...]] | None = None,
    count: int = 0,
) -> Program:
    """Trace a function of pytrees of arrays (or of `jax.ShapeDtypeStruct`).

    `stacks` names, by the number of a leaf of the arguments, the axes that count layers; None reads them off
    the function's scans, for the first `count` leaves.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    out_trees = []

    def flat(*leaves: Any) -> list[Any]:
        out_leaves, out_tree = jax.tree.flatten(function(*jax.tree.unflatten(treedef, leaves)))
        out_trees.append(out_tree)
        return out_leaves

    closed = jax.make_jaxpr(flat)(*map(abstract, leaves))
    stacks = find_stacks(closed.jaxpr, count) if stacks is None else stacks
    tracer, site = Tracer(), Site([])
    inputs = [
        tracer.build.value_with_layers(var.aval, stacks.get(n, ()))
        for n, var in enumerate(closed.jaxpr.invars)
    ]
    outputs = tracer.inline(closed.jaxpr, closed.consts, inputs, site)
    region = prune_dead(Region(inputs, outputs, site.ops))
    return Program(tracer.build.graph, region, out_trees[-1], dict(stacks), tracer.build.stacked)


class Tracer:
    """Turns jaxprs into regions whose axes are nodes of one graph; `build` makes their values and ops."""

    def __init__(self):
        self.build = Builder(AxisGraph())
        self._derivatives: dict[int, tuple[Any, ClosedJaxpr]] = {}

    def inline(
        self, jaxpr: "Jaxpr", consts: Sequence[Any], inputs: Sequence[Value], site: Site
    ) -> list[Value]:
        """Append the ops of a jaxpr, and return its outputs."""
        build = self.build
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(
            (var, build.value(var.aval, const)) for var, const in zip(jaxpr.constvars, consts, strict=True)
        )

        def read(atom: Any) -> Value:  # a literal or a variable
            return build.value(atom.aval, atom.val) if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            args = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            at = site if site.cached else site._replace(source=place(eqn, site.source))
            if name in INLINED:
                inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
                at = at._replace(cached=site.cached or is_library_call(eqn))
                outputs = self.inline(inner.jaxpr, inner.consts, args, at)
            elif name in ("custom_jvp_call", "custom_vjp_call") and site.custom_depth >= _CUSTOM_DEPTH:
                inner = eqn.params["call_jaxpr"]
                outputs = self.inline(inner.jaxpr, inner.consts, args, at)
            else:
                outputs = None
                if any(arg.layers for arg in args):
                    outputs = apply_to_layers(self, eqn, args, at)
                if outputs is None:
                    args = [build.dense(arg, at) for arg in args]
                    outputs = [build.value(var.aval) for var in eqn.outvars]
                    regions = self.regions(eqn, None, at)
                    at.ops.append(build.op_of(eqn, args, outputs, at, regions=regions))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def regions(self, eqn: "JaxprEqn", like: Sequence[Value] | None, site: Site) -> dict[str, Region]:
        """Return the bodies of an op by name; with the layers of its inputs `like`, if these are given."""
        params, name = eqn.params, eqn.primitive.name
        if name == "scan":
            return {"body": self._region(params["jaxpr"], None, site)}
        if name == "while":
            return {
                "condition": self._region(params["cond_jaxpr"], None, site),
                "body": self._region(params["body_jaxpr"], None, site),
            }
        if name == "cond":
            branches = enumerate(params["branches"])
            return {f"branch {n}": self._region(branch, None, site) for n, branch in branches}
        if name in (*CHECKPOINTS, *WRAPPERS):
            body = params["call"] if name == "custom_vmap_call" else params["jaxpr"]
            return {"body": self._region(close(body), like, site)}
        if name == "shard_map":
            return {"body": self._region(close(params["jaxpr"]), None, site)}
        deeper = site._replace(custom_depth=site.custom_depth + 1)
        if name == "custom_jvp_call":
            moving = None if like is None else [*like, *filter(is_differentiable, like)]
            return {
                "body": self._region(params["call_jaxpr"], like, site),
                "jvp": self._region(self._derivative(eqn, jvp_jaxpr), moving, deeper),
            }
        if name == "custom_vjp_call":
            body = self._region(params["call_jaxpr"], like, site)
            moving = None if like is None else [*like, *filter(is_differentiable, body.outputs)]
            return {"body": body, "vjp": self._region(self._derivative(eqn, vjp_jaxpr), moving, deeper)}
        return {}

    def _region(self, closed: "ClosedJaxpr", like: Sequence[Value] | None, site: Site) -> Region:
        """Return the region of a jaxpr, whose inputs have the layers of other values, if they are given."""
        jaxpr, inside = closed.jaxpr, site._replace(ops=[])
        if like is None:
            inputs = [self.build.value(var.aval) for var in jaxpr.invars]
        else:
            inputs = [self.build.like(value) for value in like]
        outputs = self.inline(jaxpr, closed.consts, inputs, inside)
        if like is None:
            outputs = [self.build.dense(output, inside) for output in outputs]
        return Region(inputs, outputs, inside.ops)

    def _derivative(self, eqn: "JaxprEqn", derive: Callable[["JaxprEqn"], "ClosedJaxpr"]) -> "ClosedJaxpr":
        """Return the derivative of an equation; the rounds of a loop share one."""
        if id(eqn) not in self._derivatives:
            self._derivatives[id(eqn)] = eqn, derive(eqn)
        return self._derivatives[id(eqn)][1]
