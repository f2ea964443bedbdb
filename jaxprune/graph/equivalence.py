"""Whether two networks of the same params compute the same, as far as running them can tell."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.finite import explain_not_finite, has_nan
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.tracing.jaxprs import nested_jaxprs, split_static
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.paths import leaf_paths
from jaxprune.typing import Params

if TYPE_CHECKING:
    from jaxprune.graph.compaction import Compacted

Function = Callable[[Params, dict[str, Any]], Any]
"""A function of params and of arrays by name."""


# --- a compacted network, against the masked one


def check_compacted(
    network: TracedNetwork,
    masked: Params,
    small: "Compacted",
    inputs: Sequence[Any],
    state: Callable[[Any], Any] | None,
) -> None:
    """Compare a compacted network with the masked one, of dense params, on example inputs.

    Raises:
      ValueError: the masked network gives NaN, or overflows, so that there is nothing to compare with.
      RuntimeError: they differ.
    """
    arrays, _ = split_static(inputs)
    dense = of_arrays(small.function, inputs)
    eps = ops_of(dense, masked, arrays).eps
    # Where products of float32 are less exact by default (TF32), rounding would count as a bug. The
    # precision is chosen when a function is traced, so this binds it anew.
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(dense)(masked, arrays)
        got = jax.jit(of_arrays(small.bind(small.function, state), inputs))(small.params, arrays)
    if state is not None:  # new values of params, which are smaller
        expected = with_state(expected, state, small.shrink(state(expected)))
    wanted = array_leaves(expected, "output")
    for path, value in array_leaves(got, "output").items():
        apart, spoilt = gap(wanted[path], value), has_nan(wanted[path])
        if not spoilt and (apart is None or apart <= eps**0.5):
            continue
        # Numbers that are not finite need not be so in the same places, which is no fault of compaction.
        why = explain_not_finite(network, masked, list(arrays.values()))
        if spoilt or why is not None:
            raise ValueError(
                f"the masked network is not finite on the example inputs (output [{path}]), so that the "
                f"compacted one cannot be compared with it: {why or 'it gives NaN'}. "
                "compact(..., verify=False) skips the check."
            )
        raise RuntimeError(
            f"the compacted network differs from the masked one by {apart:.2g} (relative to the "
            f"largest entry) at output [{path}]. This is a bug in jaxprune, or in a registered rule: "
            "please report it with the function. compact(..., verify=False) skips the check."
        )


def of_arrays(function: Callable[..., Any], inputs: Sequence[Any]) -> Function:
    """Return a function of params and inputs as one of params and of the arrays among the inputs by name."""
    _, rebuild = split_static(inputs)
    return lambda params, arrays: function(params, *rebuild(arrays))


def with_state(outputs: Any, state: Callable[[Any], Any], new: Any) -> Any:
    """Return a function's output with other arrays for those that `state` takes out of it."""
    leaves, tree = jax.tree.flatten(outputs)
    numbers = jax.tree.leaves(state(jax.tree.unflatten(tree, range(len(leaves)))))
    for number, leaf in zip(numbers, jax.tree.leaves(new), strict=True):
        leaves[number] = leaf
    return jax.tree.unflatten(tree, leaves)


# --- the numbers that a network computes with


class Ops(NamedTuple):
    """What can be read off the ops of a function.

    Attributes:
      numbers: how often an op reads a number that is written in the program, as (op, number); each number in
        a constant array counts once.
      eps: the spacing of floats at 1 in the coarsest dtype that it computes in.
      draws: whether it draws random numbers.
    """

    numbers: Counter[tuple[str, str]]
    eps: float
    draws: bool


def ops_of(function: Function, params: Params, arrays: dict[str, Any]) -> Ops:
    """Return the ops of a function, those of inner functions too, read off its trace."""
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
    """Return the numbers that a small network computes with and the dense one does not, in words.

    A width that the code computes with (the 8 that a mean over 8 divides by) is one of them. It shows that
    the networks differ even where their outputs agree to rounding.
    """
    known = {number for op, number in dense.numbers if op == "constant"}
    extra = small.numbers - dense.numbers
    listed = [(op, number) for op, number in extra if op != "constant" or number not in known]
    return [f"{number} in {op!r}" if op != "constant" else f"{number} in a constant" for op, number in listed]


# --- two functions, on several params and inputs


def compare(
    expected: Function,
    got: Function,
    params: Params,
    arrays: dict[str, Any],
    signed: Callable[[str], bool],
    eps: float,
) -> str | None:
    """Run two functions on example inputs, on random inputs and with other params; return how they differ.

    `signed(path)` says whether a param may change its sign from zero (a variance may not). Outputs agree if
    they differ by the square root of `eps` at most, see `Ops`.
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
    """Return params of other values with the same signs, and nonzero where these are zero."""
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
    """Return random inputs of the same kind: new floats; integers and bools drawn from those of the input."""
    rng = np.random.default_rng(1)

    def other(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or not leaf.size:
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.asarray(rng.choice(np.asarray(leaf).reshape(-1), leaf.shape), leaf.dtype)

    return {name: other(leaf) for name, leaf in arrays.items()}


def gap(expected: Any, got: Any) -> float | None:
    """Return the largest difference of two outputs, relative to the largest entry of the leaf that it is in.

    It is infinite if they are not laid out alike, or have NaN or infinity in different places; None if
    nothing in them is finite.
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
