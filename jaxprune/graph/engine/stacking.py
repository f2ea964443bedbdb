"""Finds the axes of a function's inputs that count layers, from its jaxpr.

A scan over layers takes a slice of every stacked param in each round. The axis that it runs along is
followed back to the input, through casts, transposes and other ops that do not mix it with other axes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxprune.tracing.jaxprs import CALLS, called_jaxpr, scan_split

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import Jaxpr, JaxprEqn

_MAX_LAYERS = 256
"""Scans of more rounds are over time, not over layers."""

_SAME_SHAPE = frozenset(
    (
        *("convert_element_type", "copy", "copy_p", "neg", "mul", "div", "add", "sub", "select_n", "abs"),
        *("optimization_barrier", "reduce_precision", "stop_gradient", "sharding_constraint", "reshard"),
        *("exp", "sign", "name", "pvary"),
    )
)
"""Ops that may stand between a param and a scan, without moving its axes."""

Stacks = dict[int, tuple[int, ...]]
"""By the number of an input, the axes that count layers."""

_Axes = tuple[int | None, ...]
"""For each axis of a value, which axis of the input it is; None if it is not one of them."""
_Origins = dict[int, _Axes]
"""By the number of each input that a value is made of, which axes of that input its axes are."""


def find_stacks(jaxpr: "Jaxpr", count: int) -> Stacks:
    """Return, by the number of an input among the first `count`, the axes that count layers.

    The outermost scan's axis comes first. An input counts only if its layers have two axes or more, or if
    the same scan also takes slices of such an input: a scan over vectors alone runs over time.
    """
    found: Stacks = {}
    inputs: list[_Origins] = [
        {n: tuple(range(len(_shape(var))))} if n < count else {} for n, var in enumerate(jaxpr.invars)
    ]
    _walk(jaxpr, inputs, {}, found)
    return found


def _walk(jaxpr: "Jaxpr", inputs: Sequence[_Origins], above: Stacks, found: Stacks) -> list[_Origins]:
    """Follow inputs through a jaxpr, and return where its outputs come from.

    `above` are the axes, by input, that the scans around the jaxpr run along; more are added to `found`.
    """
    env: dict[Any, _Origins] = {}

    def read(atom: Any) -> _Origins:
        return {} if hasattr(atom, "val") else env.get(atom, {})

    env.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        if not any(given):
            continue
        if eqn.primitive.name == "scan":
            _scan(eqn, given, above, found)
        elif eqn.primitive.name == "cond":
            for branch in eqn.params["branches"]:
                _walk(branch.jaxpr, given[1:], above, found)
        else:
            is_call = eqn.primitive.name in CALLS
            inner = _walk(called_jaxpr(eqn).jaxpr, given, above, found) if is_call else [_moved(eqn, given)]
            env.update(zip(eqn.outvars, inner, strict=False))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(eqn: "JaxprEqn", given: Sequence[_Origins], above: Stacks, found: Stacks) -> None:
    """Enter the axes that a scan runs along, and follow inputs through its body; its outputs have none."""
    consts, carried = scan_split(eqn.params)
    body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
    stacked: Stacks = {}
    deep = False
    inner: list[_Origins] = [dict(origins) for origins in given[:consts]] + [{}] * carried
    for origins, atom in zip(given[consts + carried :], eqn.invars[consts + carried :], strict=True):
        for number, axes in origins.items():
            if axes and axes[0] is not None:
                stacked[number] = (*above.get(number, ()), axes[0])
                deep |= len(_shape(atom)) >= 3
        inner.append({number: axes[1:] for number, axes in origins.items()})
    for origins, var in zip(given[:consts], body.invars[:consts], strict=True):
        along = _indexed_axis(body, var, length)
        for number, axes in origins.items():
            axis = None if along is None else axes[along]
            if axis is not None:
                stacked[number] = (*above.get(number, ()), axis)
                deep |= len(_shape(var)) >= 3
    is_stack = deep and 1 < length <= _MAX_LAYERS
    if is_stack:
        for number, axes in stacked.items():
            if len(axes) >= len(found.get(number, ())):
                found[number] = axes
    _walk(body, inner, {**above, **stacked} if is_stack else above, found)


def _indexed_axis(body: "Jaxpr", var: Any, length: int) -> int | None:
    """Return the axis along which a loop's body takes one slice of an input in each round, or None."""
    for eqn in body.eqns:
        if eqn.primitive.name == "dynamic_slice" and eqn.invars[0] is var:
            sizes = eqn.params["slice_sizes"]
            for axis, (size, count) in enumerate(zip(sizes, _shape(var), strict=True)):
                if size == 1 and count == length and not hasattr(eqn.invars[1 + axis], "val"):
                    return axis
    return None


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _moved(eqn: "JaxprEqn", given: Sequence[_Origins]) -> _Origins:
    """Return where the output of an op comes from, if it is made of inputs of the function alone."""
    name, params, shape = eqn.primitive.name, eqn.params, _shape(eqn.outvars[0])
    value = given[0]
    if name in _SAME_SHAPE:
        alone = all(
            origins or not _shape(atom) or hasattr(atom, "val")
            for origins, atom in zip(given, eqn.invars, strict=True)
        )
        same = [o for o, atom in zip(given, eqn.invars, strict=True) if _shape(atom) == shape]
        return {n: axes for origins in same for n, axes in origins.items()} if alone else {}
    if len([origins for origins in given if origins]) != 1 or not value:
        return {}

    def placed(places: Sequence[int | None]) -> _Origins:
        return {n: tuple(None if p is None else axes[p] for p in places) for n, axes in value.items()}

    old = _shape(eqn.invars[0])
    if name == "transpose":
        return placed(params["permutation"])
    if name == "squeeze":
        return placed([axis for axis in range(len(old)) if axis not in params["dimensions"]])
    if name == "broadcast_in_dim":
        back = {new: axis for axis, new in enumerate(params["broadcast_dimensions"])}
        return placed([back.get(axis) for axis in range(len(shape))])
    if name == "reshape" and params.get("dimensions") is None:
        front = 0
        while front < min(len(old), len(shape)) and old[front] == shape[front]:
            front += 1
        return placed([axis if axis < front else None for axis in range(len(shape))])
    return {}
