"""Swaps of a kept entry for a removed one, while that lowers the error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.calibration.solvers.factors import damped_gram, scaled_to_ones
from jaxprune.calibration.solvers.pattern import Pattern, Solver, check_problem, matmul
from jaxprune.calibration.solvers.rows import check_work, map_rows, solve_on_support, support_inverse
from jaxprune.tree.checks import as_integer, check_function, check_number

_DAMPING = 1e-6
_LEAST_GAIN = 1e-4
"""The least gain of a swap, in units of what the entry that goes costs: rounding errors are smaller."""


def with_swaps(solver: Solver, max_swaps: int = 100, limit: float = 2e11) -> Solver:
    """Make a solver that improves the mask of another by swaps inside each output, for small layers.

    After the solver, each output's kept weights are those of least squared error. Then, while one lowers
    that, the swap of a kept for a removed entry that lowers it most is made, and all kept weights are
    adjusted. Where this ends by itself, no single swap helps. Counts stay, those of each output too; with
    "nm" a swap stays in its group.

    Args:
      solver: a solver, such as `alps()`.
      max_swaps: the most swaps of an output.
      limit: the most multiply-adds, out in^3, that a batch may take.

    Returns:
      A solver, for "elements" and "nm".

    Raises:
      TypeError: `solver` is not a function, or `max_swaps` is not an integer.
      ValueError: `max_swaps` below 0; when the solver is called, blocks, more work than `limit`, or a problem
        of
        other shapes.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> weight = jnp.array([[[1.0, 1.0, 1.2]]])
      >>> gram = jnp.array([[[1.0, 0.9, 0], [0.9, 1.0, 0], [0, 0, 1.0]]])
      >>> by_magnitude, pattern = jp.solvers.mask_only(jp.scores.magnitude), jp.solvers.Pattern()
      >>> solver = jp.solvers.with_swaps(by_magnitude)
      >>> [s(weight, gram, jnp.array([2]), pattern)[1].tolist() for s in (by_magnitude, solver)]
      [[[[False, False, True]]], [[[True, False, False]]]]
    """
    check_function(solver, "with_swaps", "solver(weight, gram, counts, pattern)")
    max_swaps = as_integer(max_swaps, "max_swaps", at_least=0)
    check_number(limit, "limit", "of multiply-adds")

    def solve(
        weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Pattern
    ) -> tuple[jax.Array, jax.Array]:
        pattern = check_problem("with_swaps", weight, gram, counts, pattern)
        if pattern.kind == "blocks":
            raise ValueError("with_swaps swaps single entries, also inside n:m groups, but no blocks.")
        check_work("with_swaps", weight.shape, limit, "Leave the swaps out")
        _, mask = solver(weight, gram, counts, pattern)
        solved, swapped = swap(weight, mask, gram, matmul(weight, gram), pattern, max_swaps)
        intact = jnp.all(mask, axis=-1, keepdims=True)
        return jnp.where(intact, weight, solved), swapped

    return solve


def swap(
    weight: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    target: jax.Array,
    pattern: Pattern,
    max_swaps: int,
) -> tuple[jax.Array, jax.Array]:
    """Swap kept for removed entries, each time the pair that lowers the error most.

    Let S be what an output keeps, `P = (H_SS)^-1`, w the weights of least error on S, and `r = t - H w` what
    is left of the gradient. To remove i costs `w_i^2 / P_ii`. It changes r_j by `a w_i / P_ii` with `a = H_jS
    P e_i`, and leaves j with the curvature `s + a^2 / P_ii` that the others cannot make up for, where
    `s = H_jj - H_jS P H_Sj`. To take j in then gains the square of the one over the other. So a swap changes
    the error by exactly

        w_i^2 / P_ii - (r_j + a w_i / P_ii)^2 / (s + a^2 / P_ii).

    Args:
      weight: (B, out, in), read for dead inputs alone: where such weights are kept, they stay.
      mask: (B, out, in), True where kept.
      gram: (B, in, in).
      target: (B, out, in), as for `refine`.
      pattern: "elements" or "nm".
      max_swaps: the most swaps of an output.

    Returns:
      The weights of least error on the new masks, and these.
    """
    unit_gram, sizes = scaled_to_ones(gram)
    unit_gram = damped_gram(unit_gram, _DAMPING)
    dead = jnp.diagonal(gram, axis1=1, axis2=2)[:, None, :] == 0
    scaled_target = jnp.where(dead, weight, target) / sizes[:, None, :]
    mask = map_rows(lambda h, m, t: _swap_row(h, m, t, pattern, max_swaps), unit_gram, mask, scaled_target)
    solved = map_rows(solve_on_support, unit_gram, mask, scaled_target) / sizes[:, None, :]
    return jnp.where(mask & dead, weight, solved), mask


def swap_changes(state: "Row", gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return how much each swap changes a row's error, and what removing its first entry alone costs.

    The changes are (in, in): at [i, j] entry i goes and entry j comes. The costs are (in,).
    """
    pivots = jnp.where(state.kept, jnp.diagonal(state.inverse), 1)
    costs = state.weight**2 / pivots
    curvature = jnp.diagonal(gram) - jnp.sum(state.image * gram, axis=1)
    left = state.residual[None, :] + state.image.T * (state.weight / pivots)[:, None]
    # Rounding may leave an entry that the others make up for entirely with a curvature of 0 or below.
    least = jnp.finfo(gram.dtype).eps * jnp.diagonal(gram)
    alone = jnp.maximum(curvature, least)[None, :] + state.image.T**2 / pivots[:, None]
    return costs[:, None] - left**2 / alone, costs


class Row(NamedTuple):
    """A row under way.

    Attributes:
      kept: bool, the set S.
      weight: the weights w of least error on S.
      residual: t - H w.
      inverse: P, with 0 in the rows and columns of what is not kept.
      image: H P.
    """

    kept: jax.Array
    weight: jax.Array
    residual: jax.Array
    inverse: jax.Array
    image: jax.Array


def row_on(gram: jax.Array, kept: jax.Array, target: jax.Array) -> Row:
    """Return a row with the weights of least error on what it keeps."""
    inverse = support_inverse(gram, kept)
    weight = matmul(inverse, target)
    return Row(kept, weight, target - matmul(gram, weight), inverse, matmul(gram, inverse))


def _swap_row(
    gram: jax.Array, kept: jax.Array, target: jax.Array, pattern: Pattern, max_swaps: int
) -> jax.Array:
    inputs = kept.shape[0]
    group = jnp.arange(inputs) // (pattern.m if pattern.kind == "nm" else inputs)
    together = group[:, None] == group[None, :]

    def best(row: Row) -> tuple[jax.Array, jax.Array]:
        changes, costs = swap_changes(row, gram)
        # What counts is a gain that exceeds the rounding errors of its two terms.
        changes = changes + _LEAST_GAIN * costs[:, None]
        allowed = row.kept[:, None] & ~row.kept[None, :] & together
        changes = jnp.where(allowed, changes, jnp.inf)
        at = jnp.argmin(changes)
        return at, changes.reshape(-1)[at] < 0

    def go_on(state: tuple[jax.Array, Row, jax.Array, jax.Array]) -> jax.Array:
        return state[3] & (state[0] < max_swaps)

    def swap_once(
        state: tuple[jax.Array, Row, jax.Array, jax.Array],
    ) -> tuple[jax.Array, Row, jax.Array, jax.Array]:
        number, row, at, _ = state
        row = _take_in(_let_go(row, at // inputs), gram, at % inputs)
        return number + 1, row, *best(row)

    row = row_on(gram, kept, target)
    return lax.while_loop(go_on, swap_once, (jnp.int32(0), row, *best(row)))[1].kept


def _let_go(row: Row, i: jax.Array) -> Row:
    column, image = row.inverse[i], row.image[:, i]
    step = row.weight[i] / column[i]
    weight = (row.weight - step * column).at[i].set(0)
    inverse = row.inverse - column[:, None] * (column / column[i])[None, :]
    inverse = inverse.at[i, :].set(0).at[:, i].set(0)
    changed = (row.image - image[:, None] * (column / column[i])[None, :]).at[:, i].set(0)
    return Row(row.kept.at[i].set(False), weight, row.residual + step * image, inverse, changed)


def _take_in(row: Row, gram: jax.Array, j: jax.Array) -> Row:
    # The inverse grows by u u^T / s, where u is 1 at j and what the others change by to make up for it.
    u = (-matmul(row.inverse, gram[j])).at[j].set(1)
    image = matmul(gram, u)
    curvature = jnp.maximum(image[j], jnp.finfo(gram.dtype).eps * gram[j, j])
    step = row.residual[j] / curvature
    return Row(
        row.kept.at[j].set(True),
        row.weight + step * u,
        row.residual - step * image,
        row.inverse + u[:, None] * (u / curvature)[None, :],
        row.image + image[:, None] * (u / curvature)[None, :],
    )
