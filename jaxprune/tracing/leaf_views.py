"""A kernel as a view of one leaf: each of its entries is one entry of the leaf, times a constant.

A network seldom multiplies by a leaf itself. It transposes the leaf, cuts it in three, splits an axis into
heads, casts it, scales it. `LeafView` follows such a value back to the leaf. It is a linear map from (one
layer of) the leaf to the value, so that its transpose, `jax.linear_transpose`, carries a changed kernel back
to the leaf, and no operation needs an inverse of its own.

Beside the map it knows of each axis of the value which axes of the leaf it runs along. A reshape may split an
axis of the leaf into several factors, or join factors of several axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tracing.jaxprs import binder


class Factor(NamedTuple):
    """A part of an axis of a value.

    Attributes:
      axis: the axis of the leaf that it runs along, numbered with the axes that count layers; -1 if entries
        are repeated along it.
      size: how far.
    """

    axis: int
    size: int


Axes = tuple[tuple[Factor, ...], ...]
"""For each axis of a value its factors, from the slowest to the fastest."""


class _Operation(NamedTuple):
    """One step from the leaf to the value.

    Attributes:
      apply: from an array in float32 to the next.
      without: for steps that work on each layer of a stack in the same way: from the number of the axis that
        is taken away before the step to the step on a layer, and the number of that axis after it.
    """

    apply: Callable[[Any], Any]
    without: Callable[[int], tuple["_Operation", int]] | None = None


class LeafView(NamedTuple):
    """A value each of whose entries is one entry of a leaf, times a constant.

    Attributes:
      path: the leaf.
      shape: of the value.
      axes: the factors of each axis of the value; None if its axes are no longer those of the leaf.
      stack: for each scan that takes a slice of the leaf in each step, how deep it lies among nested scans,
        and the axis of the leaf that counts its steps.
      operations: the steps from one layer of the leaf to the value.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes | None
    stack: tuple[tuple[int, int], ...] = ()
    operations: tuple[_Operation, ...] = ()

    @property
    def levels(self) -> tuple[int, ...]:
        """How deep the scans lie that take slices of the leaf."""
        return tuple(level for level, _ in self.stack)

    def apply(self, layer: Any) -> Any:
        """Return the value in float32, computed from one layer of the leaf in float32."""
        for operation in self.operations:
            layer = operation.apply(layer)
        return layer


def of_leaf(path: str, shape: Sequence[int]) -> LeafView:
    """Return the leaf as a view of itself."""
    return LeafView(path, tuple(shape), tuple((Factor(axis, size),) for axis, size in enumerate(shape)))


_ITSELF = (
    "copy",
    "copy_p",
    "stop_gradient",
    "optimization_barrier",
    "reduce_precision",
    "sharding_constraint",
)
"""Operations that leave values as they are; solvers work in float32, so a cast counts as one."""


def view_after(
    eqn: Any, number: int, args: Sequence[Any], views: Sequence["LeafView | str | None"]
) -> "LeafView | str | None":
    """Return an output of an equation as a view of a leaf, or the reason why it is none.

    Args:
      eqn: an equation whose inputs are made of params and constants alone.
      number: which of its outputs.
      args: functions that return its inputs.
      views: what its inputs are views of; None for constants.
    """
    made_of_params = [position for position, view in enumerate(views) if view is not None]
    if not made_of_params:
        return None
    if reasons := [view for view in views if isinstance(view, str)]:
        return reasons[0]
    name = eqn.primitive.name
    known = [view for view in views if isinstance(view, LeafView)]
    if len(made_of_params) > 1:
        paths = list(dict.fromkeys(view.path for view in known))
        return (
            f"its kernel is made of {' and '.join(paths)} by {name!r}"
            if len(paths) > 1
            else (f"its kernel joins parts of {paths[0]} by {name!r}")
        )
    position, view = made_of_params[0], known[0]
    step = _step(eqn, number, position, args, view)
    if step is None:
        return f"its kernel is made of {view.path} by {name!r}, which is not a move or a scaling of entries"
    operation, axes = step
    shape = tuple(eqn.outvars[number].aval.shape)
    return view._replace(shape=shape, axes=axes, operations=(*view.operations, *operation))


def slice_of_scan(view: LeafView, level: int) -> "LeafView | str":
    """Return the slice of a view that one step of a scan takes along its first axis.

    `level` says how deep the scan lies among nested ones.
    """
    factors = view.axes[0] if view.axes is not None else ()
    if len(factors) != 1 or factors[0].axis < 0 or view.axes is None:
        return f"a scan takes slices of {view.path} that are not along one of its axes"
    # Work backwards: the axis of the value that the scan takes slices along is, before each step, this axis.
    axis, operations = factors[0].axis, []
    place = sorted({axis, *_remaining(view)}).index(axis)  # among the axes of the layer
    for operation in view.operations:
        if operation.without is None:
            return f"a scan takes slices of a reshaped or cut {view.path}"
        step, place = operation.without(place)
        operations.append(step)
    if place != 0:
        return f"a scan takes slices of {view.path} that are not along one of its axes"
    return LeafView(view.path, view.shape[1:], view.axes[1:], (*view.stack, (level, axis)), tuple(operations))


def _remaining(view: LeafView) -> set[int]:
    """Return the axes of the leaf that one layer has."""
    assert view.axes is not None
    return {factor.axis for factors in view.axes for factor in factors if factor.axis >= 0}


def _itself(array: Any) -> Any:
    return array


def _each_entry(apply: Callable[[Any], Any]) -> _Operation:
    """Return an operation on each entry, which is the same on a layer."""
    return _Operation(apply, lambda axis: (_each_entry(apply), axis))


def _transposition(permutation: Sequence[int]) -> _Operation:
    def without(axis: int) -> tuple[_Operation, int]:
        place = permutation.index(axis)
        rest = [old - (old > axis) for old in permutation if old != axis]
        return _transposition(rest), place

    permutation = tuple(permutation)
    return _Operation(lambda array: jnp.transpose(array, permutation), without)


def _step(
    eqn: Any, number: int, position: int, args: Sequence[Any], view: LeafView
) -> tuple[tuple[_Operation, ...], Axes | None] | None:
    """Return the operations of an equation on a view, and the axes after it; None if it is not linear."""
    name, params, axes = eqn.primitive.name, eqn.params, view.axes
    if name in _ITSELF:
        return (), axes
    if name == "convert_element_type":
        return ((), axes) if jnp.issubdtype(params["new_dtype"], jnp.floating) else None
    if name == "neg":
        return (_each_entry(jnp.negative),), axes
    if name in ("mul", "div"):
        return _scaling(eqn, position, args, view)
    if name == "select_n":
        return _selection(eqn, position, args, view)
    if position != 0:
        return None
    if name == "transpose":
        permutation = params["permutation"]
        moved = None if axes is None else tuple(axes[axis] for axis in permutation)
        return (_transposition(permutation),), moved
    run, shape = binder(eqn), tuple(eqn.outvars[number].aval.shape)
    if name == "reshape" and params.get("dimensions") is None:
        after = None if axes is None else reshaped(axes, shape)
        return (_Operation(lambda array: jnp.reshape(array, shape)),), after
    if name == "squeeze":
        gone = {axis % len(view.shape) for axis in params["dimensions"]}
        after = None if axes is None else tuple(f for axis, f in enumerate(axes) if axis not in gone)
        return (_Operation(lambda array: jnp.reshape(array, shape)),), after
    if name == "broadcast_in_dim":
        return (_Operation(lambda array: run(array)[0]),), _broadcast(axes, view.shape, shape, params)
    if name in ("slice", "split", "rev"):
        after = None if axes is None or name == "rev" else _cut(axes, view.shape, shape)
        return (_Operation(lambda array: run(array)[number]),), after
    if name in ("dynamic_slice", "gather"):
        mode = str(params.get("mode", ""))
        if "FILL" in mode.upper():  # beyond the edge it fills in NaN, which is not linear
            mode_of = {**params, "mode": jax.lax.GatherScatterMode.CLIP, "fill_value": None}
            run_clipped = binder(eqn.replace(params=mode_of))
            return (_Operation(lambda array: run_clipped(array, *_values(args[1:]))[0]),), None
        return (_Operation(lambda array: run(array, *_values(args[1:]))[0]),), None
    if name == "pad":
        if np.any(np.asarray(args[1]()) != 0):
            return None
        return (_Operation(lambda array: run(array, np.zeros((), array.dtype))[0]),), None
    return None


def _values(args: Sequence[Any]) -> list[Any]:
    return [arg() for arg in args]


def _scaling(eqn: Any, position: int, args: Sequence[Any], view: LeafView) -> Any:
    """Return the step of a product or quotient with a constant."""
    if eqn.primitive.name == "div" and position != 0:
        return None
    other = args[1 - position]
    combine = jnp.multiply if eqn.primitive.name == "mul" else jnp.divide

    def apply(array: Any) -> Any:
        return combine(array, jnp.asarray(other(), jnp.float32))

    is_scalar = not eqn.invars[1 - position].aval.shape
    return ((_each_entry(apply) if is_scalar else _Operation(apply)),), view.axes


def _selection(eqn: Any, position: int, args: Sequence[Any], view: LeafView) -> Any:
    """Return the step of a choice between a view and zeros, which is a product with a mask."""
    if position == 0 or len(args) != 3 or np.any(np.asarray(args[3 - position]()) != 0):
        return None

    def apply(array: Any) -> Any:
        chosen = jnp.asarray(args[0]()).astype(jnp.int32) == position - 1
        return jnp.where(chosen, array, jnp.zeros((), array.dtype))

    return (_Operation(apply),), view.axes


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Return the factors of each axis after a reshape; None if a new axis ends inside a factor.

    Example:
      >>> from jaxprune.tracing.leaf_views import Factor, reshaped
      >>> reshaped(((Factor(0, 6),), (Factor(1, 4),)), (3, 8))
      ((Factor(axis=0, size=3),), (Factor(axis=0, size=2), Factor(axis=1, size=4)))
      >>> reshaped(((Factor(0, 6),), (Factor(1, 4),)), (4, 6)) is None
      True
    """
    left = [factor for factors in axes for factor in factors if factor.size != 1]
    made: list[tuple[Factor, ...]] = []
    for size in shape:
        taken: list[Factor] = []
        while size > 1:
            if not left:
                return None
            factor = left.pop(0)
            if size % factor.size == 0:
                taken.append(factor)
                size //= factor.size
            elif factor.size % size == 0:
                # The slower part of the factor ends this axis, the faster one begins the next.
                taken.append(factor._replace(size=size))
                left.insert(0, factor._replace(size=factor.size // size))
                size = 1
            else:
                return None
        made.append(tuple(taken))
    return tuple(made)


def _broadcast(axes: Axes | None, old: Sequence[int], new: Sequence[int], params: Any) -> Axes | None:
    if axes is None:
        return None
    made: list[tuple[Factor, ...]] = [(Factor(-1, size),) if size > 1 else () for size in new]
    for axis, place in enumerate(params["broadcast_dimensions"]):
        if old[axis] == new[place]:
            made[place] = axes[axis]
    return tuple(made)


def _cut(axes: Axes, old: Sequence[int], new: Sequence[int]) -> Axes | None:
    """Return the factors after a cut along axes of one factor each; None if another axis is cut."""
    made = []
    for factors, before, after in zip(axes, old, new, strict=True):
        if before == after:
            made.append(factors)
        elif len(factors) == 1:
            made.append((factors[0]._replace(size=after),))
        else:
            return None
    return tuple(made)


def size_of(factors: Sequence[Factor]) -> int:
    """Return how many entries lie along some factors."""
    return math.prod(factor.size for factor in factors)
