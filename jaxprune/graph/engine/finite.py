"""Explains where a network stops being finite: the op, its line, and what to do about it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.divisors import find_divisors
from jaxprune.graph.engine.ir import Value, is_differentiable
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.solving import zero_slices
from jaxprune.tree.leaves import array_leaves
from jaxprune.typing import Params

_NEAR = 16.0
"""A sum in another order may overflow where its result is within this factor of the largest float."""


def has_nan(array: Any) -> bool:
    """Whether an array has floats, and any of them is NaN."""
    return is_differentiable(array) and bool(jnp.isnan(array).any())


def explain_not_finite(network: TracedNetwork, params: Params, arrays: Sequence[Any]) -> str | None:
    """Explain where a function overflows or divides by zero, and what to do about it.

    Returns a clause for a message; None if everything computed is finite and far from overflowing.
    """
    leaves = array_leaves(params)
    for path, leaf in leaves.items():
        if is_differentiable(leaf) and not bool(jnp.isfinite(leaf).all()):
            return f"params[{path!r}] has NaN or infinite entries itself"
    zeros = zero_slices({path: np.asarray(leaf != 0) for path, leaf in leaves.items()})
    divisors = find_divisors(network, zeros, derivatives=False)
    if divisors.axes:
        names = ", ".join(f"params[{path!r}] along axis {axis}" for path, axis in sorted(divisors.axes))
        return (
            f"{divisors.reason} gives NaN or inf, because slices of {names} are zero. Do not mask what the "
            "network divides by: masks of structures.channels(channel_groups(...)) leave it alive, and "
            "compact drops it with its unit all the same"
        )
    return _first_not_finite(network, [*leaves.values(), *arrays])


def _first_not_finite(network: TracedNetwork, leaves: Sequence[Any]) -> str | None:
    """Describe the first op that maps finite numbers to one that is not, or else the first near overflow."""
    region = network.region
    values: dict[int, Value] = {id(v): v for op in region.ops for v in (*op.inputs, *op.outputs)}
    floats = [value for value in values.values() if is_differentiable(value)]

    @jax.jit
    def look(leaves: Sequence[Any]) -> tuple[Any, Any]:
        finite, near = [], []
        for array in network.values_of(floats, network.facts({}), leaves):
            size = jnp.abs(jnp.asarray(array))
            finite.append(jnp.isfinite(size).all())
            near.append((size > float(jnp.finfo(size.dtype).max) / _NEAR).any())
        return finite, near

    finite, near = jax.device_get(look(list(leaves)))
    is_finite = {id(value): bool(flag) for value, flag in zip(floats, finite, strict=True)}
    is_near = {id(value): bool(flag) for value, flag in zip(floats, near, strict=True)}
    advice = "Scale the params or the inputs down, compute in a wider dtype, or pass other example inputs"
    for op in region.ops:
        if all(is_finite.get(id(v), True) for v in op.inputs) and not all(
            is_finite.get(id(v), True) for v in op.outputs
        ):
            return (
                f"{op} is the first op that gives NaN or inf, by an overflow or a division by zero. {advice}"
            )
    for op in region.ops:
        grew = not any(is_near.get(id(v), False) for v in op.inputs)  # a mask of -3e38 is on purpose
        if grew and any(is_near.get(id(v), False) for v in op.outputs):
            return f"{op} comes near an overflow, where the order of a sum decides. {advice}"
    return None
