"""Scores that are computed again wherever they are read, rather than stored.

A selection reads the scores of a leaf several times. Where they are a few operations on each entry
of the params or the gradients, as |w| or |w g| are, computing them again costs less than writing
them down: what is read has the same size, and nothing of the size of the params is added to the
memory. Which these are is read off the jaxpr of the score.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.tracing.jaxprs import CALLS, binder, called_jaxpr
from jaxprune.tree.leaves import array_leaves

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import Jaxpr, JaxprEqn

_CHEAP = frozenset(
    (
        *("abs", "neg", "sign", "square", "integer_pow", "add", "sub", "mul", "div", "max", "min", "copy"),
        *("convert_element_type", "stop_gradient", "select_n", "broadcast_in_dim", "is_finite"),
        *("and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
    )
)
_MOST_EQUATIONS = 12


class Recomputation(NamedTuple):
    """How an array is computed.

    Attributes:
      compute: from the inputs, the array.
      inputs: arrays, no more of its size than it is made of.
      compute_slice: from the inputs and a function that takes a slice of an array of its shape, that slice
        of the array, computed of slices of the inputs; None where it is not known how.
    """

    compute: Callable[[Any], jax.Array]
    inputs: Any
    compute_slice: Callable[[Any, Callable[[Any], Any]], jax.Array] | None = None


def with_recipes(function: Callable[[], Any]) -> tuple[Any, dict[str, Recomputation]]:
    """The tree of arrays that a function gives, and by path the recipes of those cheap to compute again.

    The function is traced once; what it is computed from, it closes over.
    """
    from jax.extend.core import Literal, jaxpr_as_fun

    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    tree = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)())
    consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    made_by = {var: eqn for eqn in closed.jaxpr.eqns for var in eqn.outvars}
    recipes = {}
    for path, out in zip(array_leaves(tree, "scores"), closed.jaxpr.outvars, strict=True):
        if isinstance(out, Literal) or out not in made_by | consts:
            continue
        eqns = _leading_to(out, made_by)
        if eqns is not None:
            needed = [v for eqn in eqns for v in eqn.invars if not isinstance(v, Literal)] or [out]
            used = list(dict.fromkeys(v for v in needed if v in consts))
            sliced = _slice_runner(eqns, used, out) if all(map(_is_free_of_shardings, eqns)) else None
            recipes[path] = Recomputation(_runner(eqns, used, out), [consts[v] for v in used], sliced)
    return tree, recipes


def _leading_to(out: Any, made_by: dict[Any, "JaxprEqn"]) -> list["JaxprEqn"] | None:
    """The equations that an array comes from, in order; None if they are too many, or not cheap."""
    eqns: dict[int, JaxprEqn] = {}

    def visit(var: Any) -> bool:
        eqn = None if hasattr(var, "val") else made_by.get(var)
        if eqn is None or id(eqn) in eqns:
            return True
        if not _is_cheap(eqn) or len(eqns) >= _MOST_EQUATIONS or not all(map(visit, eqn.invars)):
            return False
        eqns[id(eqn)] = eqn
        return True

    return list(eqns.values()) if visit(out) else None


def _is_cheap(eqn: "JaxprEqn") -> bool:
    """Whether an equation works on each entry by itself, and quickly."""
    if eqn.primitive.name in CALLS:
        inner: Jaxpr = called_jaxpr(eqn).jaxpr
        return len(inner.eqns) <= _MOST_EQUATIONS and all(map(_is_cheap, inner.eqns))
    of_array = any(getattr(var.aval, "shape", ()) for var in eqn.invars)
    spreads = eqn.primitive.name == "broadcast_in_dim" and of_array
    return eqn.primitive.name in _CHEAP and not eqn.effects and not spreads


def _runner(eqns: list["JaxprEqn"], inputs: list[Any], out: Any) -> Callable[[Any], jax.Array]:
    """The array that some equations make of arrays."""

    def run(arrays: Any) -> jax.Array:
        values = dict(zip(inputs, arrays, strict=True))

        def read(var: Any) -> Any:
            return var.val if hasattr(var, "val") else values[var]

        for eqn in eqns:
            values.update(zip(eqn.outvars, binder(eqn)(*map(read, eqn.invars)), strict=True))
        return values[out]

    return run


def _slice_runner(
    eqns: list["JaxprEqn"], inputs: list[Any], out: Any
) -> Callable[[Any, Callable[[Any], Any]], jax.Array]:
    """A slice of the array that some equations make of arrays, computed of slices of these.

    The equations work entry by entry, on scalars and on arrays of one shape.
    """

    def run(arrays: Any, take: Callable[[Any], Any]) -> jax.Array:
        whole = out.aval.shape
        slices = [take(array) if array.shape == whole else array for array in arrays]
        shape = jax.eval_shape(take, jax.ShapeDtypeStruct(whole, out.aval.dtype)).shape
        (made,) = _run_on_slices(eqns, dict(zip(inputs, slices, strict=True)), [out], shape)
        return made

    return run


def _run_on_slices(
    eqns: list["JaxprEqn"], values: dict[Any, Any], outs: list[Any], shape: tuple[int, ...]
) -> list[Any]:
    """The values of some variables, where arrays have another shape than when the equations were traced."""

    def read(var: Any) -> Any:
        return var.val if hasattr(var, "val") else values[var]

    for eqn in eqns:
        args = list(map(read, eqn.invars))
        if eqn.primitive.name in CALLS:
            inner = called_jaxpr(eqn)
            known = dict(zip(inner.jaxpr.constvars, inner.consts, strict=True))
            known |= dict(zip(inner.jaxpr.invars, args, strict=True))
            made = _run_on_slices(inner.jaxpr.eqns, known, inner.jaxpr.outvars, shape)
        elif eqn.primitive.name == "broadcast_in_dim":  # of a scalar
            made = [jnp.broadcast_to(args[0], shape if eqn.params["shape"] else ())]
        else:
            made = binder(eqn)(*args)
        values.update(zip(eqn.outvars, made, strict=True))
    return list(map(read, outs))


def _is_free_of_shardings(eqn: "JaxprEqn") -> bool:
    """Whether an equation says nothing of where its arrays lie, as it does on explicit mesh axes."""
    if eqn.primitive.name in CALLS:
        return all(map(_is_free_of_shardings, called_jaxpr(eqn).jaxpr.eqns))
    return eqn.params.get("sharding") is None
