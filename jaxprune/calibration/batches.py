"""Calibration batches: what each means, and how much each of its rows counts."""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tree.checks import shown
from jaxprune.tree.leaves import describe, is_array
from jaxprune.tree.paths import leaf_paths


class Batch(NamedTuple):
    """One batch.

    Attributes:
      inputs: the arguments of the function behind the params.
      weights: how much each row counts; None if all count once.
      key: the same for batches of the same shapes.
    """

    inputs: tuple[Any, ...]
    weights: Any
    key: Any


_MISSING = object()


def batches_of(
    batches: Iterable[Any], weights: Iterable[Any] | Callable[..., Any] | None, caller: str
) -> Iterator[Batch]:
    """Yield batches, checked.

    Args:
      batches: what a user passes: arrays, tuples of arguments, dicts.
      weights: for each batch an array, or a function of its arguments that returns one.
      caller: for messages.

    Raises:
      ValueError: no batch, batches of different structure, weights that fit no input or are negative, or are
        as many as other batches.
      TypeError: `batches` is one array, or one dict.
    """
    if is_array(batches) or isinstance(batches, dict) or not isinstance(batches, Iterable):
        raise TypeError(f"{caller} needs a list of batches, got {_got(batches)}. For one batch pass [batch].")
    if not callable(weights) and (
        is_array(weights)
        or not isinstance(weights, (Iterable, type(None)))
        or isinstance(weights, (str, dict))
    ):
        raise TypeError(
            f"weights= needs an array for each batch, in a list, or a function; got {_got(weights)}."
        )
    each_weight: Iterable[Any] = () if weights is None or callable(weights) else weights
    listed = weights is not None and not callable(weights)
    structure, empty = None, True
    for number, (batch, weight) in enumerate(zip_longest(batches, each_weight, fillvalue=_MISSING)):
        if batch is _MISSING or (listed and weight is _MISSING):
            raise ValueError(
                f"{caller} got weights= for another number of batches than there are: one for each."
            )
        inputs = batch if isinstance(batch, tuple) and not hasattr(batch, "_fields") else (batch,)
        now = jax.tree.structure(inputs)
        if structure is not None and now != structure:
            raise ValueError(
                f"{caller}: batch {number} has the structure {now}, and batch 0 had {structure}. All batches "
                "must have the same structure; their sizes may differ."
            )
        structure, empty = now, False
        _check_inputs(inputs, number, caller)
        if callable(weights):
            weight = weights(*inputs)
        known = None if weight is _MISSING else _checked_weights(weight, inputs, number, caller)
        leaves = [
            (tuple(np.shape(x)), jnp.result_type(x)) if is_array(x) else x for x in jax.tree.leaves(inputs)
        ]
        yield Batch(inputs, known, (tuple(leaves), None if known is None else known.shape))
    if empty:
        raise ValueError(
            f"{caller} got no batch: pass a list of one or more, such as [x]. A generator can be used once."
        )


def _got(value: Any) -> str:
    return describe(value) if is_array(value) else shown(value)


def _check_inputs(inputs: tuple[Any, ...], number: int, caller: str) -> None:
    arrays = [leaf for leaf in jax.tree.leaves(inputs) if is_array(leaf)]
    if not arrays:
        raise TypeError(f"{caller}: batch {number} holds no array, got {shown(inputs)}.")
    if any(0 in np.shape(leaf) for leaf in arrays):
        raise ValueError(f"{caller}: batch {number} is empty: {', '.join(map(describe, arrays))}.")


def _checked_weights(weight: Any, inputs: tuple[Any, ...], number: int, caller: str) -> jax.Array:
    if not is_array(weight):
        raise TypeError(f"{caller}: the weights of batch {number} must be an array, got {shown(weight)}.")
    weight = jnp.asarray(weight).astype(jnp.float32)
    names = leaf_paths(inputs)
    shapes = {
        n: tuple(np.shape(x)) for n, x in zip(names, jax.tree.leaves(inputs), strict=True) if is_array(x)
    }
    if not weight.ndim or not any(shape[: weight.ndim] == weight.shape for shape in shapes.values()):
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{caller}: the weights of batch {number} have the shape {weight.shape}, which are not the first "
            f"axes of any input: {listing}. Pass (batch,), or (batch, length) for tokens."
        )
    if not bool(jnp.all(jnp.isfinite(weight) & (weight >= 0))):
        raise ValueError(f"{caller}: the weights of batch {number} must be finite, and 0 or more.")
    return weight


def padded(batches: list[Batch], caller: str) -> list[Batch]:
    """Return batches of one shape: smaller ones are filled up by copies of their last row, with weight 0.

    The axis that is filled up is the first of the arrays that have as many rows as the first of them.

    Raises:
      ValueError: batches that differ by more than that.
    """
    largest = max(batches, key=lambda batch: _rows(batch.inputs))
    if all(batch.key == largest.key for batch in batches):
        return batches
    most = _rows(largest.inputs)
    made = []
    for number, batch in enumerate(batches):
        rows = _rows(batch.inputs)
        weights = jnp.ones(rows, jnp.float32) if batch.weights is None else batch.weights

        def filled(array: Any, rows: int = rows) -> Any:
            if not is_array(array) or np.shape(array)[:1] != (rows,):
                return array
            return jnp.concatenate([array, jnp.repeat(jnp.asarray(array)[-1:], most - rows, axis=0)])

        inputs = jax.tree.map(filled, batch.inputs)
        wanted = [np.shape(leaf) for leaf in jax.tree.leaves(largest.inputs)]
        if [np.shape(leaf) for leaf in jax.tree.leaves(inputs)] != wanted:
            got = [np.shape(leaf) for leaf in jax.tree.leaves(batch.inputs)]
            raise ValueError(
                f"{caller}: batch {number} has arrays of shapes {got}, and the largest batch {wanted}. They "
                "may differ in the first axis alone: pad the others, and pass weights= with 0 for the "
                "padding."
            )
        extra = jnp.zeros((most - rows, *weights.shape[1:]), jnp.float32)
        made.append(Batch(inputs, jnp.concatenate([weights, extra]), None))
    return made


def _rows(inputs: tuple[Any, ...]) -> int:
    """Return the size of the first axis of the first array that has one."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(inputs) if is_array(leaf)]
    return next((shape[0] for shape in shapes if shape), 1)
