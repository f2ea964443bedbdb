"""Walks a jaxpr, telling values that are made of params and constants alone from those that hold data."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.counting.products import PRODUCTS
from jaxprune.tracing.jaxprs import CALLS, binder, called_jaxpr, place

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn


class ConstValue(NamedTuple):
    """A value made of params and constants alone; it is computed when it is asked for.

    Attributes:
      key: the same for values that are made the same way, in whatever trace.
      paths: the params it is made of.
      value: computes it.
    """

    key: str
    paths: tuple[str, ...]
    value: Callable[[], Any]


def param(path: str, value: Callable[[], Any]) -> ConstValue:
    """A param as a known value."""
    return ConstValue(_digest("param", path), (path,), value)


def constant(value: Any) -> ConstValue | Any:
    """A constant of a jaxpr as a known value; a traced one, which may hold data, as it is."""
    if isinstance(value, Tracer) or not hasattr(value, "dtype"):
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):  # a random key, which numpy cannot hold
        return value
    array = np.asarray(value)
    return ConstValue(
        _digest("constant", array.shape, array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest()),
        (),
        lambda: value,
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def materialised(value: ConstValue | Any) -> Any:
    """The array of a value, known or not."""
    return value.value() if isinstance(value, ConstValue) else value


class Product(NamedTuple):
    """An equation that multiplies a known value, the kernel, by one that holds data.

    Attributes:
      eqn: the equation, a JaxprEqn.
      side: which of its two operands is the kernel.
      kernel: the known value.
      source: the line of the user's code that it comes from.
    """

    eqn: Any
    side: int
    kernel: ConstValue
    source: str


class Visitor(NamedTuple):
    """What happens to the equations that hold data, in the order they come.

    Attributes:
      product: of a `Product` and its other operand, the outputs; None to go on with `other`.
      other: of an equation and its inputs, the outputs.
    """

    product: Callable[[Product, Any], list[Any] | None]
    other: Callable[["JaxprEqn", list[Any]], list[Any]]


def walk(closed: "ClosedJaxpr", inputs: Sequence[Any], visitor: Visitor, called_at: str = "") -> list[Any]:
    """The outputs of a jaxpr, whose inputs are `ConstValue` or not.

    Calls are gone into. An equation of known inputs is not run: its outputs are known too.
    """
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update((var, constant(value)) for var, value in zip(jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Any) -> Any:
        return _literal(atom) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        args = [read(atom) for atom in eqn.invars]
        source = place(eqn, called_at)
        outputs = None
        if eqn.primitive.name in CALLS:
            outputs = walk(called_jaxpr(eqn), args, visitor, source)
        elif all(isinstance(arg, ConstValue) for arg in args) and not eqn.effects:
            outputs = _known(eqn, args)
        elif eqn.primitive.name in PRODUCTS:
            known = [isinstance(arg, ConstValue) for arg in args[:2]]
            if known.count(True) == 1:
                side = known.index(True)
                outputs = visitor.product(Product(eqn, side, args[side], source), args[1 - side])
        if outputs is None:
            outputs = visitor.other(eqn, args)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _literal(atom: Any) -> ConstValue:
    value = np.asarray(atom.val)
    weak = getattr(atom.aval, "weak_type", False)
    return ConstValue(_digest("literal", value.dtype.name, value.tolist(), weak), (), lambda: atom.val)


def _known(eqn: "JaxprEqn", args: list[ConstValue]) -> list[ConstValue]:
    """The outputs of an equation of known inputs, computed once if at all."""

    @cache
    def values() -> list[Any]:
        return binder(eqn)(*(arg.value() for arg in args))

    key = _digest(eqn.primitive.name, sorted(eqn.params.items(), key=str), [arg.key for arg in args])
    paths = tuple(dict.fromkeys(path for arg in args for path in arg.paths))
    return [
        ConstValue(_digest(key, number), paths, lambda number=number: values()[number])
        for number in range(len(eqn.outvars))
    ]
