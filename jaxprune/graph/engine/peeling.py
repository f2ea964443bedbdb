"""What an op on stacked arrays does in each layer: the same, without the axis that counts layers.

Let X be a stack whose axis a counts layers, and X[l] its layer l. An op F can be peeled if there are an axis
b of its output and parameters p' with

    F(X; p)[l along b] = F(X[l]; p')   for all l:

it commutes with taking a layer. Then each layer can have nodes of its own on both sides. Layers must not be
mixed, so F must not reduce, split, cut or move entries along a. p' is p without axis a: axes are renumbered,
and entries that belong to a are left out. Operands without layers are read by all layers alike. For a product
a is a batch axis of both operands, or a free axis of one of them, where the other operand is shared.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.graph.engine.rules.reductions import REDUCTIONS


class Peeled(NamedTuple):
    """An op in one layer."""

    in_axes: tuple[int | None, ...]  # for each input, the axis that counts layers; None if all layers read it
    out_axis: int  # the axis of the output that counts layers
    params: dict[str, Any]  # the op's parameters in one layer


def peel(
    name: str, params: dict[str, Any], shapes: Sequence[tuple[Any, ...]], along: Sequence[int | None]
) -> Peeled | None:
    """Return an op in one layer, or None if the op mixes layers or is not known here.

    `shapes` are those of its inputs; `along` names the axis of each that counts layers, None for no layers.
    """
    (first, axis), *_ = [(n, axis) for n, axis in enumerate(along) if axis is not None]
    if rule_for(name) is elementwise or name in ("copy", "reduce_precision", "select_n"):
        length = shapes[first][axis]
        if any(shape and (len(shape) != len(shapes[first]) or shape[axis] != length) for shape in shapes):
            return None
        if params.get("sharding") is not None:
            return None
        return Peeled(tuple(axis if shape else None for shape in shapes), axis, params)
    if name == "dot_general":
        return _dot(params, [len(shape) for shape in shapes], along)
    if name == "concatenate" and params["dimension"] != axis:
        (other,) = _less((params["dimension"],), axis)
        return Peeled((axis,) * len(shapes), axis, {**params, "dimension": other})
    if name == "pad" and along[1] is None and not any(params["padding_config"][axis]):
        return Peeled((axis, None), axis, {"padding_config": _without(params["padding_config"], axis)})
    return _PEEL[name](params, axis, shapes[0]) if len(shapes) == 1 and name in _PEEL else None


def _without(values: Sequence[Any], axis: int) -> tuple[Any, ...]:
    return tuple(value for place, value in enumerate(values) if place != axis)


def _less(axes: Sequence[int], axis: int) -> tuple[int, ...]:
    """Return axes renumbered for an array that lacks one, which is not among them."""
    return tuple(each - (each > axis) for each in axes)


def _transpose(params: dict[str, Any], axis: int, shape: tuple[int, ...]) -> Peeled:
    del shape
    order = params["permutation"]
    out = order.index(axis)
    return Peeled((axis,), out, {"permutation": _less(_without(order, out), axis)})


def _broadcast(params: dict[str, Any], axis: int, shape: tuple[int, ...]) -> Peeled | None:
    del shape
    places = params["broadcast_dimensions"]
    out = places[axis]
    if params.get("sharding") is not None:
        return None
    new, left = _without(params["shape"], out), _less(_without(places, axis), out)
    return Peeled((axis,), out, {**params, "shape": new, "broadcast_dimensions": left})


def _removing(name: str) -> "_Peel":
    """Return how to peel an op that removes the axes in its parameter of a given name."""

    def peeled(params: dict[str, Any], axis: int, shape: tuple[int, ...]) -> Peeled | None:
        del shape
        removed = params[name]
        out = axis - sum(other < axis for other in removed)
        return None if axis in removed else Peeled((axis,), out, {**params, name: _less(removed, axis)})

    return peeled


def _reshape(params: dict[str, Any], axis: int, shape: tuple[int, ...]) -> Peeled | None:
    """Peel a reshape that keeps the axis: one with the same size and as many entries before it."""
    new = params["new_sizes"]
    if params.get("dimensions") is not None or params.get("sharding") is not None:
        return None
    for out, size in enumerate(new):
        if size == shape[axis] and math.prod(new[:out]) == math.prod(shape[:axis]):
            return Peeled((axis,), out, {**params, "new_sizes": _without(new, out)})
    return None


def _slice(params: dict[str, Any], axis: int, shape: tuple[int, ...]) -> Peeled | None:
    """Peel a slice within layers; `layerwise` handles slices that take some of the layers."""
    strides = params["strides"]
    if params["start_indices"][axis] != 0 or params["limit_indices"][axis] != shape[axis]:
        return None
    if strides is not None and strides[axis] != 1:
        return None
    left = {key: _without(params[key], axis) for key in ("start_indices", "limit_indices")}
    return Peeled((axis,), axis, {**left, "strides": None if strides is None else _without(strides, axis)})


def _along_another(name: str) -> "_Peel":
    """Return how to peel an op that runs along one other axis, the parameter of a given name."""

    def peeled(params: dict[str, Any], axis: int, shape: tuple[int, ...]) -> Peeled | None:
        del shape
        (other,) = _less((params[name],), axis)
        return None if params[name] == axis else Peeled((axis,), axis, {**params, name: other})

    return peeled


_Peel = Callable[[dict[str, Any], int, tuple[int, ...]], Peeled | None]
_PEEL: dict[str, _Peel] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _removing("dimensions"),
    **dict.fromkeys((*REDUCTIONS, "argmax", "argmin"), _removing("axes")),
    **dict.fromkeys(
        ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp", "split"), _along_another("axis")
    ),
}


def _dot(params: dict[str, Any], ranks: Sequence[int], along: Sequence[int | None]) -> Peeled | None:
    """Peel a product whose layers are along a batch axis, or along a free axis of one operand."""
    sums, batches = params["dimension_numbers"]
    if params.get("out_sharding") is not None:
        return None
    side = 0 if along[0] is not None else 1
    axis = along[side]
    assert axis is not None
    if axis in batches[side]:
        place = batches[side].index(axis)
        axes = (batches[0][place], batches[1][place])
        if any(a is not None and a != b for a, b in zip(along, axes, strict=True)):
            return None
        numbers = (
            tuple(_less(s, a) for s, a in zip(sums, axes, strict=True)),
            tuple(_less(_without(b, place), a) for b, a in zip(batches, axes, strict=True)),
        )
        return Peeled(axes, place, {**params, "dimension_numbers": numbers})
    if axis in sums[side] or along[1 - side] is not None:
        return None
    free = [[a for a in range(r) if a not in (*s, *b)] for r, s, b in zip(ranks, sums, batches, strict=True)]
    out = len(batches[0]) + (len(free[0]) if side else 0) + free[side].index(axis)
    numbers = tuple(
        tuple(_less(axes, axis) if n == side else axes for n, axes in enumerate(pair))
        for pair in (sums, batches)
    )
    in_axes = (axis, None) if side == 0 else (None, axis)
    return Peeled(in_axes, out, {**params, "dimension_numbers": numbers})
