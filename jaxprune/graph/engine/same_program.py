"""Whether the rounds of a loop, each traced to a jaxpr, are the same program."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, Jaxpr

# Parameters that hold functions which take derivatives. They may differ: those of all rounds come from the
# same line of the function and take slices at the same positions, see `Positions.fixed`.
_DERIVATIVES = frozenset(("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"))


def are_same_program(rounds: "Sequence[ClosedJaxpr]") -> bool:
    """Whether jaxprs are equal but for the names of their variables, constants included."""
    first = rounds[0]
    return all(
        _equal_consts(first.consts, other.consts) and _equal_jaxprs(first.jaxpr, other.jaxpr)
        for other in rounds[1:]
    )


def _equal_consts(first: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(first) == len(other) and all(map(_equal_arrays, first, other))


def _equal_arrays(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    if any(jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended) for x in (a, b)):
        return False  # keys of random numbers
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.inexact))


def _equal_jaxprs(a: "Jaxpr", b: "Jaxpr") -> bool:
    same: dict[Any, Any] = {}

    def matched(x: Any, y: Any) -> bool:
        if hasattr(x, "val") or hasattr(y, "val"):
            return hasattr(x, "val") and hasattr(y, "val") and _equal_arrays(x.val, y.val)
        return same.get(x) is y

    def bound(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
        if len(xs) != len(ys):
            return False
        same.update(zip(xs, ys, strict=True))
        return all(
            (x.aval.shape, x.aval.dtype) == (y.aval.shape, y.aval.dtype) for x, y in zip(xs, ys, strict=True)
        )

    if not bound([*a.invars, *a.constvars], [*b.invars, *b.constvars]) or len(a.eqns) != len(b.eqns):
        return False
    for x, y in zip(a.eqns, b.eqns, strict=True):
        if x.primitive is not y.primitive or len(x.invars) != len(y.invars):
            return False
        if not all(map(matched, x.invars, y.invars)) or not _equal_params(x.params, y.params):
            return False
        if not bound(x.outvars, y.outvars):
            return False
    return len(a.outvars) == len(b.outvars) and all(map(matched, a.outvars, b.outvars))


def _equal_params(a: Any, b: Any) -> bool:
    """Whether the parameters of two equations are equal, but for functions that take derivatives."""
    if isinstance(a, dict):
        keys = a.keys() - _DERIVATIVES
        return keys == b.keys() - _DERIVATIVES and all(_equal_params(a[key], b[key]) for key in keys)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal_params, a, b))
    if hasattr(a, "consts"):  # a closed jaxpr
        closed = hasattr(b, "consts") and _equal_consts(a.consts, b.consts)
        return closed and _equal_jaxprs(a.jaxpr, b.jaxpr)
    if hasattr(a, "eqns"):
        return hasattr(b, "eqns") and _equal_jaxprs(a, b)
    if isinstance(a, (np.ndarray, jax.Array)):
        return isinstance(b, (np.ndarray, jax.Array)) and _equal_arrays(a, b)
    return type(a) is type(b) and (callable(a) or bool(a == b))
