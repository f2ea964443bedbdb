"""The small program that the rest of the package works on, traced from a function.

A `Region` is a list of `Op`s from inputs to outputs; every value is made once and knows what made
it. Calls (`jit`) are inlined. What has bodies of its own, a scan say, is one op with a region for
each body. Each axis of each value has a node in the program's `AxisGraph`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.graph.axes import AxisGraph
from jaxprune.jaxprs import abstract, binder, is_library_call, place, struct_of

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

_INLINED = ("jit", "pjit", "closed_call", "core_call")
_CUSTOM_DEPTH = 2  # derivatives of a custom rule that are taken by the rule itself
_MAX_CONCRETE = 2**20


@dataclass(eq=False)
class Value:
    """One array of a program.

    Attributes:
      shape: the dense shape.
      dtype: the dtype.
      axes: the node of each axis.
      op: what makes it; None for an input or a constant.
      constant: its array, for a constant.
      sharding: how it is sharded over explicit axes of a mesh; None where it is not.
    """

    shape: tuple[Any, ...]
    dtype: Any
    axes: tuple[int, ...]
    op: "Op | None" = None
    constant: Any = None
    sharding: Any = None


@dataclass(eq=False)
class Region:
    """A straight list of ops.

    Attributes:
      inputs: the values passed in.
      outputs: the values passed out; inputs and constants may be among them.
      ops: what is done, in order.
    """

    inputs: list[Value]
    outputs: list[Value]
    ops: list["Op"]


@dataclass(eq=False)
class Op:
    """One application of a primitive.

    Attributes:
      name: the primitive's name.
      params: its parameters.
      inputs, outputs: its values.
      bind: applies the primitive as it was to new inputs, giving a list of outputs.
      source: the line of the user's code it comes from, as "file:line"; see `jaxprs.place`.
      regions: its bodies by name, as the rules of calls expect them.
      memo: what a rule found out and will want again.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    bind: Callable[..., list[Any]]
    source: str
    regions: dict[str, Region] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.source.startswith("<"):  # shapes, where no line is known
            return f"{self.name} of {self.source[1:-1]}"
        return f"{self.name} at {self.source}"


class Program(NamedTuple):
    """A traced function.

    Attributes:
      graph: the axes of all values.
      region: the function; its inputs are the leaves of the arguments, in order.
      out_tree: the structure of its output.
    """

    graph: AxisGraph
    region: Region
    out_tree: Any


def trace(function: Callable[..., Any], *arguments: Any) -> Program:
    """Traces a function of pytrees of arrays (or of `jax.ShapeDtypeStruct`)."""
    leaves, treedef = jax.tree.flatten(arguments)
    out_trees = []

    def flat(*leaves: Any) -> list[Any]:
        out_leaves, out_tree = jax.tree.flatten(function(*jax.tree.unflatten(treedef, leaves)))
        out_trees.append(out_tree)
        return out_leaves

    closed = jax.make_jaxpr(flat)(*map(abstract, leaves))
    builder = _Builder(AxisGraph())
    region = builder.region(closed)
    return Program(builder.graph, prune_dead(region), out_trees[-1])


class _Builder:
    """Turns jaxprs into regions whose axes are nodes of one graph."""

    def __init__(self, graph: AxisGraph):
        self.graph = graph

    def value(self, aval: Any, constant: Any = None) -> Value:
        shape = tuple(aval.shape)
        sharding = struct_of(aval).sharding if shape else None
        axes = tuple(map(self.graph.node, shape))
        return Value(shape, aval.dtype, axes, constant=constant, sharding=sharding)

    def region(
        self, closed: "ClosedJaxpr", custom_depth: int = 0, called_at: str = "", cached: bool = False
    ) -> Region:
        return self.open_region(closed.jaxpr, closed.consts, custom_depth, called_at, cached)

    def open_region(
        self, jaxpr: "Jaxpr", consts: Sequence[Any], custom_depth: int, called_at: str, cached: bool
    ) -> Region:
        inputs = [self.value(var.aval) for var in jaxpr.invars]
        ops: list[Op] = []
        outputs = self.inline(jaxpr, consts, inputs, ops, custom_depth, called_at, cached)
        return Region(inputs, outputs, ops)

    def inline(
        self,
        jaxpr: "Jaxpr",
        consts: Sequence[Any],
        inputs: Sequence[Value],
        ops: list[Op],
        custom_depth: int,
        called_at: str = "",
        cached: bool = False,
    ) -> list[Value]:
        """Appends a jaxpr's ops and returns its outputs.

        A `cached` jaxpr has the lines of an earlier call: its ops are placed at this one.
        """
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(
            (var, self.value(var.aval, const)) for var, const in zip(jaxpr.constvars, consts, strict=True)
        )

        def read(atom: Any) -> Value:
            return (
                self.value(atom.aval, atom.val) if hasattr(atom, "val") else env[atom]
            )  # a literal or a variable

        for eqn in jaxpr.eqns:
            args = [read(atom) for atom in eqn.invars]
            name, source = eqn.primitive.name, called_at if cached else place(eqn, called_at)
            if name in _INLINED:
                inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
                again = cached or is_library_call(eqn)
                outputs = self.inline(inner.jaxpr, inner.consts, args, ops, custom_depth, source, again)
            elif name in ("custom_jvp_call", "custom_vjp_call") and custom_depth >= _CUSTOM_DEPTH:
                inner = eqn.params["call_jaxpr"]
                outputs = self.inline(inner.jaxpr, inner.consts, args, ops, custom_depth, source, cached)
            else:
                outputs = [self.value(var.aval) for var in eqn.outvars]
                regions = self.regions(eqn, custom_depth, source, cached)
                op = Op(name, eqn.params, args, outputs, binder(eqn), source, regions)
                for output in outputs:
                    output.op = op
                ops.append(op)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def regions(self, eqn: "JaxprEqn", custom_depth: int, source: str, cached: bool) -> dict[str, Region]:
        params, name, at = eqn.params, eqn.primitive.name, (source, cached)
        if name == "scan":
            return {"body": self.region(params["jaxpr"], custom_depth, *at)}
        if name == "while":
            return {
                "condition": self.region(params["cond_jaxpr"], custom_depth, *at),
                "body": self.region(params["body_jaxpr"], custom_depth, *at),
            }
        if name == "cond":
            return {
                f"branch {n}": self.region(branch, custom_depth, *at)
                for n, branch in enumerate(params["branches"])
            }
        if name in ("remat", "remat2", "checkpoint"):
            return {"body": self.open_region(params["jaxpr"], (), custom_depth, *at)}
        if name in ("composite", "custom_vmap_call"):
            body = params["jaxpr"] if name == "composite" else params["call"]
            return {"body": self.region(body, custom_depth, *at)}
        if name == "shard_map":
            return {"body": self.open_region(params["jaxpr"], (), custom_depth, *at)}
        if name == "custom_jvp_call":
            return {
                "body": self.region(params["call_jaxpr"], custom_depth, *at),
                "jvp": self.region(_jvp_jaxpr(eqn), custom_depth + 1, *at),
            }
        if name == "custom_vjp_call":
            return {
                "body": self.region(params["call_jaxpr"], custom_depth, *at),
                "vjp": self.region(_vjp_jaxpr(eqn), custom_depth + 1, *at),
            }
        return {}


def is_differentiable(value: Any) -> bool:
    """Whether a value or an abstract value has a tangent."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _split_call(eqn: "JaxprEqn") -> tuple[Callable[..., list[Any]], list[Any], list[bool]]:
    """An equation as a function of its differentiable inputs; their avals, and which they are."""
    avals = [atom.aval for atom in eqn.invars]
    return binder(eqn), avals, [is_differentiable(aval) for aval in avals]


def _jvp_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """An equation and its derivative, by its own rule.

    It maps all inputs and the tangents of the differentiable ones to the outputs and the tangents
    of the differentiable outputs.
    """
    bind, avals, differentiable = _split_call(eqn)

    def jvp(*inputs):
        primals, tangents = inputs[: len(avals)], inputs[len(avals) :]
        moving = [p for p, d in zip(primals, differentiable, strict=True) if d]

        def of_moving(*moving):
            left = iter(moving)
            return bind(*(next(left) if d else p for p, d in zip(primals, differentiable, strict=True)))

        out, out_tangents = jax.jvp(of_moving, tuple(moving), tuple(tangents))
        return [*out, *(t for o, t in zip(out, out_tangents, strict=True) if is_differentiable(o))]

    return jax.make_jaxpr(jvp)(*map(struct_of, avals), *(struct_of(a) for a in avals if is_differentiable(a)))


def _vjp_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """The derivative of an equation backwards, by its own rule.

    It maps all inputs and the cotangents of the differentiable outputs to the cotangents of the
    differentiable inputs.
    """
    bind, avals, differentiable = _split_call(eqn)

    def vjp(*inputs):
        primals, cotangents = inputs[: len(avals)], inputs[len(avals) :]
        moving = [p for p, d in zip(primals, differentiable, strict=True) if d]

        def of_moving(*moving):
            left = iter(moving)
            out = bind(*(next(left) if d else p for p, d in zip(primals, differentiable, strict=True)))
            return [o for o in out if is_differentiable(o)]

        return jax.vjp(of_moving, *moving)[1](list(cotangents))

    outputs = [var.aval for var in eqn.outvars]
    return jax.make_jaxpr(vjp)(
        *map(struct_of, avals), *(struct_of(a) for a in outputs if is_differentiable(a))
    )


def prune_dead(region: Region) -> Region:
    """A region without the ops whose outputs nobody reads: they would only ask for slices."""
    read = set(map(id, region.outputs))
    ops: list[Op] = []
    for op in reversed(region.ops):
        if op.bind.has_effects or any(id(output) in read for output in op.outputs):  # type: ignore[attr-defined]
            read.update(map(id, op.inputs))
            ops.append(op)
    return Region(region.inputs, region.outputs, ops[::-1])


def read_by(region: Region) -> set[int]:
    """The ids of the values that a region's ops and outputs read."""
    return set(map(id, region.outputs)) | {id(value) for op in region.ops for value in op.inputs}


def any_constant(region: Region, holds: Callable[[Any], bool]) -> bool:
    """Whether something holds of a constant that a region reads."""
    read = [*region.outputs, *(value for op in region.ops for value in op.inputs)]
    if any(value.constant is not None and holds(value.constant) for value in read):
        return True
    return any(any_constant(inner, holds) for op in region.ops for inner in op.regions.values())


def concrete(value: Value) -> np.ndarray | None:
    """The array a value is in every call, if that follows from constants alone."""
    if value.constant is not None:
        if isinstance(value.constant, Tracer) or np.size(value.constant) > _MAX_CONCRETE:
            return None
        return np.asarray(value.constant)
    op = value.op
    if op is None or op.regions or any(not isinstance(n, int) for n in value.shape):
        return None
    if np.prod(value.shape, dtype=np.int64) > _MAX_CONCRETE:
        return None
    inputs = [concrete(given) for given in op.inputs]
    if any(given is None for given in inputs):
        return None
    with jax.ensure_compile_time_eval():
        outputs = op.bind(*inputs)
    return np.asarray(outputs[next(n for n, out in enumerate(op.outputs) if out is value)])
