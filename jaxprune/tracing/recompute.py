"""Scores that are computed again wherever they are read, rather than stored.

A selection reads the scores of a leaf several times. Where they are a few operations on each entry
of the params or the gradients, as |w| or |w g| are, computing them again costs less than storing them:
as many bytes are read either way, and no temporary of the size of the params is needed. The jaxpr of the
score tells which leaves these are.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.tracing.jaxprs import CALLS, Handle, binder, called_jaxpr, interpret, run_equations
from jaxprune.tree.leaves import array_leaves

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import Jaxpr, JaxprEqn

__all__ = ["Recomputation", "with_recipes"]

_CHEAP = frozenset(
    (
        *("abs", "neg", "sign", "square", "integer_pow", "add", "sub", "mul", "div", "max", "min", "copy"),
        *("convert_element_type", "stop_gradient", "select_n", "broadcast_in_dim", "is_finite"),
        *("and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
    )
)
_MOST_EQUATIONS = 12


class Recomputation(NamedTuple):
    """How to compute an array again.

    Attributes:
      compute: from `inputs` to the array.
      inputs: the arrays it is computed from.
      compute_slice: `compute_slice(inputs, take)` returns `take(array)`, where `take` slices any array of
        the same shape, from slices of the inputs; None if that cannot be done.
    """

    compute: Callable[[Any], jax.Array]
    inputs: Any
    compute_slice: Callable[[Any, Callable[[Any], Any]], jax.Array] | None = None


def with_recipes(function: Callable[[], Any]) -> tuple[Any, dict[str, Recomputation]]:
    """Return the tree of arrays that a function returns, and by path the recipes of those cheap to recompute.

    The function is traced once, and closes over the arrays that it computes from.
    """
    from jax.extend.core import Literal, jaxpr_as_fun

    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    tree = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)())
    consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    made_by = {var: eqn for eqn in closed.jaxpr.eqns for var in eqn.outvars}
    recipes: dict[str, Recomputation] = {}
    programs: dict[Any, tuple[Any, Any]] = {}  # leaves scored by the same equations share one function
    for path, out in zip(array_leaves(tree, "scores"), closed.jaxpr.outvars, strict=True):
        if isinstance(out, Literal) or not (out in made_by or out in consts):
            continue
        found = _leading_to(out, made_by)
        if found is not None:
            eqns, used = found
            key = _key_of(eqns, used, out)
            if key not in programs:
                sliced = _slice_runner(eqns, used, out) if all(map(_is_free_of_shardings, eqns)) else None
                programs[key] = _runner(eqns, used, out, _bind), sliced
            compute, compute_slice = programs[key]
            recipes[path] = Recomputation(compute, list(map(consts.__getitem__, used)), compute_slice)
    return tree, recipes


def _key_of(eqns: list["JaxprEqn"], inputs: list[Any], out: Any) -> Any:
    """Return what tells programs apart: equations with equal keys compute the same of equal inputs."""
    numbers = dict(zip(inputs, range(len(inputs)), strict=True))
    parts: list[Any] = [out.aval]
    atom: Any
    for var in inputs:
        parts.append(var.aval)
    for eqn in eqns:
        # The text tells apart what is equal and differs, such as 0.0 and -0.0.
        parts += [eqn.primitive, tuple(eqn.params.items()), repr(eqn.params), eqn.ctx]
        for atom in eqn.invars:
            parts.append((atom.aval, repr(atom.val)) if hasattr(atom, "val") else numbers[atom])
        for var in eqn.outvars:
            numbers[var] = len(numbers)
    key = (*parts, numbers[out])
    try:
        hash(key)
    except TypeError:  # some parameter has no hash
        return object()
    return key


def _leading_to(out: Any, made_by: dict[Any, "JaxprEqn"]) -> tuple[list["JaxprEqn"], list[Any]] | None:
    """Return the equations that an array comes from, in order, and the variables that they start from.

    None if the equations are too many, or not cheap.
    """
    eqns: dict[int, JaxprEqn] = {}
    inputs: dict[Any, None] = {}

    def visit(eqn: "JaxprEqn") -> bool:
        if id(eqn) in eqns:
            return True
        if not _is_cheap(eqn) or len(eqns) >= _MOST_EQUATIONS:
            return False
        for var in eqn.invars:
            made = None if hasattr(var, "val") else made_by.get(var)
            if made is not None and not visit(made):
                return False
            if made is None and not hasattr(var, "val"):
                inputs[var] = None
        eqns[id(eqn)] = eqn
        return True

    if out not in made_by:
        return [], [out]
    return (list(eqns.values()), list(inputs)) if visit(made_by[out]) else None


def _is_cheap(eqn: "JaxprEqn") -> bool:
    """Return whether an equation works on each entry by itself, and quickly."""
    if eqn.primitive.name in CALLS:
        inner: Jaxpr = called_jaxpr(eqn).jaxpr
        return len(inner.eqns) <= _MOST_EQUATIONS and all(map(_is_cheap, inner.eqns))
    if eqn.primitive.name == "broadcast_in_dim" and any(getattr(var.aval, "shape", ()) for var in eqn.invars):
        return False
    return eqn.primitive.name in _CHEAP and not eqn.effects


def _bind(eqn: "JaxprEqn", args: list[Any]) -> list[Any]:
    return binder(eqn)(*args)


def _runner(
    eqns: list["JaxprEqn"], inputs: list[Any], out: Any, handle: Handle
) -> Callable[[Any], jax.Array]:
    """Return a function from the arrays that some equations read to the one array that they make."""

    def run(arrays: Any) -> jax.Array:
        return run_equations(eqns, dict(zip(inputs, arrays, strict=True)), [out], handle)[0]

    return run


def _slice_runner(
    eqns: list["JaxprEqn"], inputs: list[Any], out: Any
) -> Callable[[Any, Callable[[Any], Any]], jax.Array]:
    """Return a function that computes a slice of the array that some equations make.

    The equations work entry by entry, on scalars and on arrays of one shape. So a slice of their result is
    their result for slices, once `broadcast_in_dim` spreads scalars to the shape of a slice.
    """

    def run(arrays: Any, take: Callable[[Any], Any]) -> jax.Array:
        shape = jax.eval_shape(take, jax.ShapeDtypeStruct(out.aval.shape, out.aval.dtype)).shape

        def handle(eqn: "JaxprEqn", args: list[Any]) -> list[Any]:
            if eqn.primitive.name in CALLS:
                return interpret(called_jaxpr(eqn), args, handle)
            if eqn.primitive.name == "broadcast_in_dim":
                return [jnp.broadcast_to(args[0], shape if eqn.params["shape"] else ())]
            return _bind(eqn, args)

        slices = [take(array) if array.shape == out.aval.shape else array for array in arrays]
        return _runner(eqns, inputs, out, handle)(slices)

    return run


def _is_free_of_shardings(eqn: "JaxprEqn") -> bool:
    """Return whether an equation names no sharding, as equations on explicit mesh axes do."""
    if eqn.primitive.name in CALLS:
        return all(map(_is_free_of_shardings, called_jaxpr(eqn).jaxpr.eqns))
    return eqn.params.get("sharding") is None
