"""Which results of a computation are 0 wherever what they were made of is 0, read off its jaxpr.

An optimizer whose gradients, params and moments are 0 where a param is pruned mostly gives moments
that are 0 there again: then nothing need be cleared after it. Some add a constant to their moments
(AdaBelief), or mix entries (Muon); those are found here, because what is not known to keep zeros
is taken not to.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune.tracing.jaxprs import CALLS, called_jaxpr, close
from jaxprune.tree.leaves import is_concrete

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn

# By what an operation does with zeros, entry by entry.
_OF_ONE = frozenset(
    (
        *("abs", "neg", "sign", "square", "sqrt", "cbrt", "tanh", "sin", "tan", "asinh", "expm1", "log1p"),
        *(
            "real",
            "imag",
            "conj",
            "floor",
            "ceil",
            "round",
            "convert_element_type",
            "copy",
            "reduce_precision",
        ),
        *("stop_gradient", "optimization_barrier"),
    )
)
_IF_BOTH = frozenset(("add", "sub", "add_any", "max", "min"))

Zeros = frozenset[int] | None
"""Of which params a value is 0 where they are pruned, by number; None for a value that is 0 everywhere."""


Notice = Callable[["JaxprEqn", list[Zeros]], None]
"""Called with each equation, and where its inputs are 0."""


def zero_where(
    closed: "ClosedJaxpr", inputs: Sequence[Zeros], notice: Notice = lambda eqn, inputs: None
) -> list[Zeros]:
    """For each output of a jaxpr, where it is 0.

    Args:
      closed: a jaxpr. Values that are told apart by params are combined entry by entry only with
        values of their own shape, or scalars.
      inputs: for each of its inputs, where that is 0.
      notice: called with each equation on the way, those of calls and branches included.

    Returns:
      For each output the params that it is known to be 0 with; finite factors are taken for granted.
    """
    jaxpr = closed.jaxpr
    known: dict[Any, Zeros] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        known[var] = _of_value(value)

    def read(var: Any) -> Zeros:
        return of_literal(var) if hasattr(var, "val") else known.get(var, frozenset())

    for eqn in jaxpr.eqns:
        zeros = [read(var) for var in eqn.invars]
        notice(eqn, zeros)
        found = of_equation(eqn, zeros, notice)
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(var) for var in jaxpr.outvars]


def of_literal(var: Any) -> Zeros:
    """Of a number in a jaxpr, in its dtype: an epsilon of 1e-8 is 0 in float16."""
    value = np.asarray(var.val)  # which may be of a class of JAX's own
    return _of_value(value.astype(var.aval.dtype) if value.dtype.kind in "fiuc" else value)


def infinite_where(eqn: "JaxprEqn", inputs: Sequence[Zeros]) -> frozenset[int]:
    """With which params an equation gives infinity or NaN where they are pruned: it divides by 0 there."""
    name, divisor = eqn.primitive.name, None
    if name == "div":
        divisor = inputs[1]
    elif (
        name in ("rsqrt", "log")
        or (name == "integer_pow" and eqn.params["y"] < 0)
        or (name == "pow" and np.all(np.asarray(getattr(eqn.invars[1], "val", 1)) < 0))
    ):
        divisor = inputs[0]
    return frozenset[int]() if divisor is None else divisor


def _of_value(value: Any) -> Zeros:
    """Of a constant; what is large, or has no value, is not looked at."""
    if not is_concrete(value) or np.size(value) != 1:
        return frozenset()
    zero = np.issubdtype(np.result_type(value), np.number) and not np.any(value)
    return None if zero else frozenset()


def _both(first: Zeros, second: Zeros) -> Zeros:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _either(first: Zeros, second: Zeros) -> Zeros:
    return None if first is None or second is None else first | second


def of_equation(
    eqn: "JaxprEqn", inputs: list[Zeros], notice: Notice = lambda eqn, inputs: None
) -> list[Zeros]:
    """For each output of an equation, where it is 0."""
    name = eqn.primitive.name
    unknown: list[Zeros] = [frozenset()] * len(eqn.outvars)
    if name in CALLS:
        return zero_where(called_jaxpr(eqn), inputs, notice)
    if name == "cond":
        each = [zero_where(close(branch), inputs[1:], notice) for branch in eqn.params["branches"]]
        return [_all_of(found) for found in zip(*each, strict=True)]
    if name in _OF_ONE:
        return list(inputs)
    if name in _IF_BOTH:
        return [_both(*inputs)]
    if name == "select_n":
        return [_all_of(inputs[1:])]
    if name == "mul":
        return [_either(*inputs)]
    if name == "div":
        top, bottom = inputs
        return [frozenset[int]() if bottom is None else top if top is None else top - bottom]
    if name == "integer_pow":
        return inputs if eqn.params["y"] > 0 else unknown
    if name == "broadcast_in_dim":
        return [None if inputs[0] is None else frozenset[int]()]
    return unknown


def _all_of(found: Sequence[Zeros]) -> Zeros:
    result: Zeros = None
    for each in found:
        result = _both(result, each)
    return result
