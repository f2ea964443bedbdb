"""An optimizer's update, run so that a quotient by 0 where params are pruned reaches no other entry.

Moments are 0 where params are pruned, and Adam's step there is 0 / (sqrt(0) + epsilon). Where epsilon is 0,
as 1e-8 is in float16, that is NaN. By itself it would do no harm, because the steps of pruned entries are
replaced. But a transform chained after it that reads all entries, such as clipping by the global norm,
carries the NaN to the entries that are kept. So each such quotient is set to 0 where it is made: a pruned
entry adds nothing to the norm, as in the masked network. If the jaxpr divides by no 0, the optimizer is
called unchanged.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxprune.tracing.jaxprs import CALLS, binder, called_jaxpr, close, interpret, switch_with
from jaxprune.tracing.zeros import ZeroSet, infinite_where, of_equation, of_literal, zero_where

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn


def divides_by_zero(closed: "ClosedJaxpr", inputs: Sequence[ZeroSet]) -> tuple[bool, list[ZeroSet]]:
    """Return whether a jaxpr divides by 0 where params are pruned, and where its outputs are 0."""
    found: list[bool] = []

    def notice(eqn: "JaxprEqn", zeros: list[ZeroSet]) -> None:
        if infinite_where(eqn, zeros):
            found.append(True)

    outputs = zero_where(closed, inputs, notice)
    return bool(found), outputs


def guarded(
    closed: "ClosedJaxpr", inputs: Sequence[ZeroSet], args: Sequence[Any], masks: Sequence[jax.Array]
) -> tuple[list[Any], list[ZeroSet]]:
    """Run a jaxpr in which quotients by 0 where params are pruned become 0.

    `inputs` says where each of its `args` is 0; what is returned for the outputs says the same of them.
    """

    def handle(eqn: "JaxprEqn", pairs: list[Any]) -> Any:
        arrays, zeros = [array for array, _ in pairs], [where for _, where in pairs]
        return zip(*_apply(eqn, arrays, zeros, masks), strict=True)

    pairs = interpret(
        closed,
        zip(args, inputs, strict=True),
        handle,
        constant=lambda array: (array, frozenset()),
        literal=lambda it: (it.val, of_literal(it)),
    )
    return [array for array, _ in pairs], [where for _, where in pairs]


def _apply(
    eqn: "JaxprEqn", arrays: list[Any], zeros: list[ZeroSet], masks: Sequence[jax.Array]
) -> tuple[list[Any], list[ZeroSet]]:
    name, found = eqn.primitive.name, of_equation(eqn, zeros)
    if name in CALLS and divides_by_zero(called_jaxpr(eqn), zeros)[0]:
        return guarded(called_jaxpr(eqn), zeros, arrays, masks)
    if name == "cond":
        branches = [close(branch) for branch in eqn.params["branches"]]
        if any(divides_by_zero(branch, zeros[1:])[0] for branch in branches):
            # `found` is that of the branches without a guard: a subset of what holds with it.
            return switch_with(eqn, arrays, lambda b, given: guarded(b, zeros[1:], given, masks)[0]), found
    out = binder(eqn)(*arrays)
    for number in infinite_where(eqn, zeros):
        mask = masks[number]
        if out[0].shape[out[0].ndim - mask.ndim :] == mask.shape:
            out = [jnp.where(mask, out[0], jnp.zeros((), out[0].dtype))]
            found = [None if found[0] is None else found[0] | {number}]
    return out, found
