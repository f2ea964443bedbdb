"""Whether two networks of the same params compute the same, as far as running them can tell."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tracing.jaxprs import nested_jaxprs
from jaxprune.tree.paths import leaf_paths
from jaxprune.typing import Params

Function = Callable[[Params, dict[str, Any]], Any]
"""A function of params and of arrays by name."""


class Ops(NamedTuple):
    """What the ops of a function say.

    Attributes:
      numbers: how often an op reads a number that is written in the program, as (op, number); of
        the program's constant arrays, each number once.
      eps: the spacing of floats at 1 in the coarsest dtype computed in.
      draws: whether random numbers are drawn.
    """

    numbers: Counter[tuple[str, str]]
    eps: float
    draws: bool


def ops_of(function: Function, params: Params, arrays: dict[str, Any]) -> Ops:
    """Traces a function and reads its ops, those of inner functions too."""
    numbers: Counter[tuple[str, str]] = Counter()
    eps, draws = [0.0], [False]
    for closed in nested_jaxprs(jax.make_jaxpr(function)(params, arrays)):
        for constant in closed.consts:
            if not jnp.issubdtype(constant.dtype, jax.dtypes.extended):
                # Once each: a smaller table repeats its numbers less often.
                numbers.update(("constant", str(n)) for n in np.unique(np.asarray(constant)).tolist())
        for eqn in closed.jaxpr.eqns:
            name = eqn.primitive.name
            draws.append(name in ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"))
            numbers.update((name, str(np.asarray(v.val))) for v in eqn.invars if hasattr(v, "val"))
            dtypes = [v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype")]
            eps.extend(float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating))
    return Ops(numbers, max(eps), any(draws))


def new_numbers(small: Ops, dense: Ops) -> list[str]:
    """Numbers that a small network computes with and the dense one does not, in words.

    A width that the code computes with (the 8 that a mean over 8 divides by) is one of them: it
    tells even where the outputs differ by less than rounding.
    """
    known = {number for op, number in dense.numbers if op == "constant"}
    extra = small.numbers - dense.numbers
    listed = [(op, number) for op, number in extra if op != "constant" or number not in known]
    return [f"{number} in {op!r}" if op != "constant" else f"{number} in a constant" for op, number in listed]


def compare(
    expected: Function,
    got: Function,
    params: Params,
    arrays: dict[str, Any],
    signed: Callable[[str], bool],
    eps: float,
) -> str | None:
    """Runs two functions on some params and inputs, on random inputs, and on other params.

    Args:
      expected: the function that is right.
      got: the other one.
      params: params of both.
      arrays: inputs by name.
      signed: whether the param at a path may change its sign from zero (a variance may not).
      eps: as in `Ops`; outputs within its root agree.

    Returns:
      How they differ, in words; None where they do not.
    """
    other_params, other_arrays = _other_params(params, signed), _other_arrays(arrays)
    rounds = {
        "on the example inputs": (params, arrays),
        "on random inputs": (params, other_arrays),
        "with other params": (other_params, other_arrays),
    }
    compared = False
    # Where a GPU multiplies float32 in TF32 by default, rounding would hide much.
    with jax.default_matmul_precision("highest"):
        first, second = jax.jit(expected), jax.jit(got)
        for where, args in rounds.items():
            apart = gap(first(*args), second(*args))
            if apart is not None and not apart <= eps**0.5:
                return f"differs by {apart:.2g} of the largest entry {where}"
            compared |= apart is not None
    return None if compared else "has no finite output to compare"


def _other_params(params: Params, signed: Callable[[str], bool]) -> Params:
    """Other values of the same signs, and what is zero is not."""
    rng = np.random.default_rng(0)

    def other(path: str, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        noise = rng.standard_normal(leaf.shape)
        small = 0.1 * (noise if signed(path) else np.abs(noise))
        values = np.asarray(leaf)
        return jnp.asarray(np.where(values == 0, small, values * np.exp(0.3 * noise)), leaf.dtype)

    leaves = zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(jax.tree.structure(params), [other(path, leaf) for path, leaf in leaves])


def _other_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    """Random inputs like some others: floats are drawn anew, integers and bools from those there are."""
    rng = np.random.default_rng(1)

    def other(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or not leaf.size:
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.asarray(rng.choice(np.asarray(leaf).reshape(-1), leaf.shape), leaf.dtype)

    return {name: other(leaf) for name, leaf in arrays.items()}


def gap(expected: Any, got: Any) -> float | None:
    """The largest difference of two outputs, relative to the largest entry of the leaf it is in.

    Infinite where they are not laid out alike, or NaN or infinite in different places; None where
    nothing is finite.
    """
    both = jax.tree.leaves(expected), jax.tree.leaves(got)
    first, second = ([(leaf.shape, leaf.dtype) for leaf in leaves] for leaves in both)
    if first != second:
        return np.inf
    gaps = []
    for a, b in zip(*both, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.extended) or not a.size:
            continue
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            gaps.append(float((np.asarray(a) != np.asarray(b)).mean()))
            continue
        wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
        dense, small = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        finite = np.isfinite(dense)
        if (
            not np.array_equal(dense[~finite], small[~finite], equal_nan=True)
            or not np.isfinite(small[finite]).all()
        ):
            return np.inf
        if finite.any():
            largest = max(np.abs(dense[finite]).max(), np.finfo(np.float32).tiny)
            gaps.append(float(np.abs(dense[finite] - small[finite]).max() / largest))
    return max(gaps, default=None)
