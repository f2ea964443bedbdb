"""One layer as a problem of least squares: its target, its solution by a solver, its error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.calibration.lockstep import Moments
from jaxprune.calibration.parts import View
from jaxprune.calibration.solvers.factors import damped_factor, damping_used
from jaxprune.calibration.solvers.pattern import Pattern, Solver, matmul, pattern_mask
from jaxprune.calibration.solvers.refining import refine
from jaxprune.tree.checks import shown


class Problem(NamedTuple):
    """A layer `x -> W x + b`, and what it should compute: `W y + b` of the dense network's rows y.

    Attributes:
      weight: (batch, outputs, inputs), W.
      bias: (batch, outputs), b; None if the layer has none that may change.
      moments: of what it reads; with `cross` None the dense network's rows are its own, y = x.
    """

    weight: Any
    bias: Any
    moments: Moments


class Solution(NamedTuple):
    """The solved layer.

    Attributes:
      weight, bias: what replaces those of the problem.
      mask: (batch, outputs, inputs), True for the entries kept.
      damping: (batch,), that with which the Gram matrices had a factor.
    """

    weight: Any
    bias: Any
    mask: Any
    damping: Any


class Facts(NamedTuple):
    """What was found out about a layer while it was solved.

    Attributes:
      finite: whether its moments are.
      solved: whether the weights that the solver returned are finite.
      exact: whether its mask removes what was asked for from each matrix.
      removed: how many entries were removed from each matrix, (batch,).
      rows: how many rows each matrix saw, (batch,).
      damping: that of each matrix, (batch,).
      masked_error, error: the relative errors of the dense weights under the mask, and of the new ones as
        rounded.
    """

    finite: Any
    solved: Any
    exact: Any
    removed: Any
    rows: Any
    damping: Any
    masked_error: Any
    error: Any


class WrongSolutionError(Exception):
    """A solver returned something other than weights and a mask."""


def with_rows_everywhere(problem: Problem) -> Problem:
    """Return the problem with the identity as the Gram matrix of matrices that saw no row.

    To keep `W x` for unknown inputs, all alike, is to keep the largest weights.
    """
    moments = problem.moments
    seen = (moments.rows > 0)[:, None, None]
    identity = jnp.eye(moments.gram.shape[-1], dtype=jnp.float32)
    gram = jnp.where(seen, moments.gram, identity)
    cross = None if moments.cross is None else jnp.where(seen, moments.cross, identity)
    dense = None if moments.dense_gram is None else jnp.where(seen, moments.dense_gram, identity)
    return problem._replace(moments=moments._replace(gram=gram, cross=cross, dense_gram=dense))


def solve(
    problem: Problem, counts: Any, solver: Solver, pattern: Pattern, steps: int, damping: float
) -> Solution:
    """Prune a layer by a solver, and refine the weights and the bias that stay by conjugate gradients.

    Where a count is 0 the solver is given the weights of the problem, and what it returns is not refined.
    """
    weight, moments = problem.weight, problem.moments
    pruned = (counts > 0)[:, None, None]
    start = weight
    if moments.cross is None:
        used = damping_used(moments.gram, damping)
    else:
        root, used = damped_factor(moments.gram, damping)
        # W* = W + W (C - H) (H + d I)^-1 is the least-squares solution without a mask, where C = sum y x^T.
        # For it `tr((V - W*) H (V - W*)^T)` is the error of V for the dense target, up to a constant.
        ahead = matmul(weight, moments.cross - moments.gram)
        start = jnp.where(pruned, weight + _times_inverse(ahead, root), weight)
    solved, mask = _checked(solver(start, moments.gram, counts, pattern), weight.shape)
    seen = (moments.rows > 0)[:, None, None]

    def with_largest() -> tuple[jax.Array, jax.Array]:
        """Keep the largest weights of matrices without rows: nothing is known of what they read."""
        largest = pattern_mask(jnp.abs(weight), counts, pattern)
        return jnp.where(seen, solved, jnp.where(largest, weight, 0)), jnp.where(seen, mask, largest)

    solved, mask = lax.cond(jnp.all(seen), lambda: (solved, mask), with_largest)
    bias = problem.bias
    if steps:
        refined, moved = refined_layer(problem, solved, mask, steps)
        solved = jnp.where(pruned, refined, solved)
        bias = None if bias is None else jnp.where(pruned[:, :, 0], moved, bias)
    return Solution(solved, bias, mask, used)


def _checked(returned: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return what a solver returned as weights that are 0 where the mask is False, and the mask."""
    wanted = f"(weight, mask), float32 and bool of shape {shape}"
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise WrongSolutionError(f"must return {wanted}, got {shown(returned)}.")
    try:
        weight, mask = map(jnp.asarray, returned)
    except (TypeError, ValueError):
        raise WrongSolutionError(f"must return {wanted}, got {shown(returned)}.") from None
    if not weight.shape == mask.shape == shape or (weight.dtype, mask.dtype) != (jnp.float32, jnp.bool_):
        got = f"{weight.dtype} {weight.shape} and {mask.dtype} {mask.shape}"
        raise WrongSolutionError(f"must return {wanted}, got {got}.")
    return jnp.where(mask, weight, 0), mask


def is_exact(mask: Any, counts: Any, pattern: Pattern) -> jax.Array:
    """Return whether a mask removes whole units, `counts` of them from each matrix or each output."""
    tall, wide = pattern.sides
    batch, outputs, inputs = mask.shape
    units = mask.reshape(batch, outputs // tall, tall, inputs // wide, wide)
    if pattern.kind == "nm":
        wanted = jnp.where(counts == 0, pattern.m, pattern.n)
        return jnp.all(jnp.sum(units, axis=(2, 4), dtype=jnp.int32) == wanted[:, None, None])
    kept = jnp.all(units, axis=(2, 4))
    whole = jnp.all(kept == jnp.any(units, axis=(2, 4)))
    axes = -1 if pattern.per_output else (-2, -1)
    removed = jnp.sum(~kept, axis=axes, dtype=jnp.int32)
    return whole & jnp.all(removed == (counts[:, None] if pattern.per_output else counts))


def reader(view: View, bias: View | None) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return the function of a layer and its bias that makes the weight and the bias of its problem.

    Args:
      view: the matrices of the layer.
      bias: what is added to their outputs; None if that must not change.
    """

    def read(layer: Any, added: Any) -> tuple[Any, Any]:
        return view.array(layer), None if bias is None else bias.array(added)

    return read


def writer(view: View, bias: View | None, pattern: Pattern) -> Callable[..., tuple[dict[str, Any], Facts]]:
    """Return the function that puts a solution back into a layer and its bias, and tells the facts."""

    def write(
        layer: Any, added: Any, moments: Moments, counts: Any, problem: Problem, solution: Solution
    ) -> tuple[dict[str, Any], Facts]:
        arrays = {"layer": view.put(layer, solution.weight), "mask": view.mask(layer.shape, solution.mask)}
        rounded, moved = view.array(arrays["layer"]), None
        if bias is not None:
            arrays["bias"] = bias.put(added, solution.bias)
            moved = bias.array(arrays["bias"])
        masked = jnp.where(solution.mask, problem.weight, 0)
        finite = [jnp.all(jnp.isfinite(array)) for array in jax.tree.leaves(moments)]
        return arrays, Facts(
            jnp.all(jnp.stack(finite)),
            jnp.all(jnp.isfinite(solution.weight)),
            is_exact(solution.mask, counts, pattern),
            jnp.sum(~solution.mask, axis=(1, 2), dtype=jnp.int32),
            moments.rows,
            solution.damping,
            relative_error(problem, masked, problem.bias),
            relative_error(problem, rounded, moved),
        )

    return write


def _times_inverse(rows: jax.Array, root: jax.Array) -> jax.Array:
    """Return `rows (R R^T)^-1`, for an upper triangular R."""
    options: Any = {"left_side": False, "lower": False}
    half = lax.linalg.triangular_solve(root, rows, transpose_a=True, **options)
    return lax.linalg.triangular_solve(root, half, **options)


def refined_layer(problem: Problem, start: Any, mask: Any, steps: int) -> tuple[Any, Any]:
    """Return the weights and bias of least squared error on the support of a mask.

    For any weights V the best bias is `b + W mean(y) - V mean(x)`. With that, the error of V is that of rows
    from which their mean is taken, so the weights are solved for with centred Gram matrices.
    """
    weight, bias, moments = problem
    cross = moments.gram if moments.cross is None else moments.cross
    dense_total = moments.total if moments.dense_total is None else moments.dense_total
    gram = moments.gram
    if bias is None:
        return refine(start, mask, gram, matmul(weight, cross), steps), None
    rows = jnp.where(moments.rows > 0, moments.rows, 1)[:, None, None]
    # Where no row was seen, the totals are 0 and the Gram matrix stays the identity.
    gram = gram - moments.total[:, :, None] * moments.total[:, None, :] / rows
    cross = cross - dense_total[:, :, None] * moments.total[:, None, :] / rows
    solved = refine(start, mask, gram, matmul(weight, cross), steps)
    means = dense_total / rows[:, 0], moments.total / rows[:, 0]
    return solved, bias + _times(weight, means[0]) - _times(solved, means[1])


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return matmul(matrix, vector[:, :, None])[:, :, 0]


def relative_error(problem: Problem, weight: Any, bias: Any) -> jax.Array:
    """Return `||W y + b - (V x + c)|| / ||W y||`, over all rows and matrices, for weights V and bias c."""
    dense, old, moments = problem
    shift = None if old is None else old - bias
    if moments.cross is None:
        change = dense - weight
        square = jnp.sum(matmul(change, moments.gram) * change)
        ahead = _times(change, moments.total)
        reference = jnp.sum(matmul(dense, moments.gram) * dense)
    else:
        reference = jnp.sum(matmul(dense, moments.dense_gram) * dense)
        both = jnp.sum(matmul(dense, moments.cross) * weight)
        square = reference - 2 * both + jnp.sum(matmul(weight, moments.gram) * weight)
        ahead = _times(dense, moments.dense_total) - _times(weight, moments.total)
    if shift is not None:
        square = square + jnp.sum(2 * shift * ahead + moments.rows[:, None] * shift**2)
    return jnp.sqrt(jnp.maximum(square, 0) / jnp.where(reference > 0, reference, 1))
