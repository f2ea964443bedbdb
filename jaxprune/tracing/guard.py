"""An optimizer's update run so that what it divides by 0 where params are pruned reaches no other entry.

Moments are 0 where params are pruned, and Adam's step there is 0 / (sqrt(0) + epsilon). Where epsilon is 0,
as 1e-8 is in float16, that is NaN. By itself it would do no harm, because steps of pruned entries are
replaced. But a transform chained after it that reads all entries, such as clipping by the global norm,
carries the NaN to the entries that are kept. So each such quotient is set to 0 where it is made: a pruned
entry takes no part in the norm, as in the masked network. Where no quotient is 0 / 0, which the jaxpr shows,
the optimizer is called as it is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.tracing.jaxprs import CALLS, binder, called_jaxpr, close
from jaxprune.tracing.zeros import Zeros, infinite_where, of_equation, of_literal, zero_where

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn


def divides_by_zero(closed: "ClosedJaxpr", inputs: Sequence[Zeros]) -> tuple[bool, list[Zeros]]:
    """Whether a jaxpr divides by 0 where params are pruned, and where its outputs are 0.

    Args:
      closed: a jaxpr.
      inputs: for each of its inputs, with which params it is 0 where they are pruned.
    """
    found: list[bool] = []

    def notice(eqn: "JaxprEqn", zeros: list[Zeros]) -> None:
        if infinite_where(eqn, zeros):
            found.append(True)

    outputs = zero_where(closed, inputs, notice)
    return bool(found), outputs


def guarded(
    closed: "ClosedJaxpr", inputs: Sequence[Zeros], args: Sequence[Any], masks: Sequence[jax.Array]
) -> tuple[list[Any], list[Zeros]]:
    """The outputs of a jaxpr, in which quotients by 0 are 0 where params are pruned.

    Args:
      closed: a jaxpr.
      inputs: for each of its inputs, with which params it is 0 where they are pruned.
      args: its inputs.
      masks: by param, its mask.

    Returns:
      The outputs, and where they are 0.
    """
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | dict(
        zip(jaxpr.invars, args, strict=True)
    )
    zeros: dict[Any, Zeros] = dict(zip(jaxpr.invars, inputs, strict=True))

    def value(var: Any) -> Any:
        return var.val if hasattr(var, "val") else values[var]

    def zero(var: Any) -> Zeros:
        return of_literal(var) if hasattr(var, "val") else zeros.get(var, frozenset())

    for eqn in jaxpr.eqns:
        arrays, where = list(map(value, eqn.invars)), list(map(zero, eqn.invars))
        out, found = _apply(eqn, arrays, where, masks)
        values.update(zip(eqn.outvars, out, strict=True))
        zeros.update(zip(eqn.outvars, found, strict=True))
    return list(map(value, jaxpr.outvars)), list(map(zero, jaxpr.outvars))


def _apply(
    eqn: "JaxprEqn", arrays: list[Any], where: list[Zeros], masks: Sequence[jax.Array]
) -> tuple[list[Any], list[Zeros]]:
    name, found = eqn.primitive.name, of_equation(eqn, where)
    if name in CALLS and divides_by_zero(called_jaxpr(eqn), where)[0]:
        return guarded(called_jaxpr(eqn), where, arrays, masks)
    if name == "cond":
        branches = [close(branch) for branch in eqn.params["branches"]]
        if any(divides_by_zero(branch, where[1:])[0] for branch in branches):
            # Where the outputs are 0 is known as of the branches as they were, which is less.
            run = [lambda *given, b=branch: guarded(b, where[1:], given, masks)[0] for branch in branches]
            return lax.switch(arrays[0], run, *arrays[1:]), found
    out = binder(eqn)(*arrays)
    if pruned := infinite_where(eqn, where):
        for number in pruned:
            mask = masks[number]
            if out[0].shape[out[0].ndim - mask.ndim :] == mask.shape:
                out = [jnp.where(mask, out[0], jnp.zeros((), out[0].dtype))]
                found = [None if found[0] is None else found[0] | {number}]
    return out, found
