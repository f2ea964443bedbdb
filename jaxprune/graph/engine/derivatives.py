"""The derivatives of functions that have custom ones, as jaxprs: regions of their own in a program."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jaxprune.graph.engine.ir import is_differentiable
from jaxprune.tracing.jaxprs import binder, struct_of

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn


def jvp_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """Return an equation together with its derivative, by its custom rule.

    The jaxpr maps all inputs and the tangents of the differentiable inputs to the outputs and the tangents
    of the differentiable outputs.
    """
    bind, avals = binder(eqn), [atom.aval for atom in eqn.invars]

    def jvp(*inputs):
        primals, tangents = inputs[: len(avals)], inputs[len(avals) :]
        of_moving, moving = _of_differentiable(bind, primals)
        out, out_tangents = jax.jvp(of_moving, tuple(moving), tuple(tangents))
        return [*out, *(t for o, t in zip(out, out_tangents, strict=True) if is_differentiable(o))]

    return jax.make_jaxpr(jvp)(*map(struct_of, avals), *(struct_of(a) for a in avals if is_differentiable(a)))


def vjp_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """Return the transposed derivative of an equation, by its custom rule.

    The jaxpr maps all inputs and the cotangents of the differentiable outputs to the cotangents of the
    differentiable inputs.
    """
    bind, avals = binder(eqn), [atom.aval for atom in eqn.invars]

    def vjp(*inputs):
        primals, cotangents = inputs[: len(avals)], inputs[len(avals) :]
        of_moving, moving = _of_differentiable(bind, primals)
        return jax.vjp(lambda *moving: list(filter(is_differentiable, of_moving(*moving))), *moving)[1](
            list(cotangents)
        )

    outputs = [var.aval for var in eqn.outvars]
    return jax.make_jaxpr(vjp)(
        *map(struct_of, avals), *(struct_of(a) for a in outputs if is_differentiable(a))
    )


def _of_differentiable(
    bind: Callable[..., list[Any]], primals: tuple[Any, ...]
) -> tuple[Callable[..., list[Any]], list[Any]]:
    """Return an operation as a function of its differentiable inputs alone, and these."""

    def of_moving(*moving):
        left = iter(moving)
        return bind(*(next(left) if is_differentiable(primal) else primal for primal in primals))

    return of_moving, [primal for primal in primals if is_differentiable(primal)]
