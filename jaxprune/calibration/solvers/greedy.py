"""Optimal Brain Compression: the entry that costs least, one after another, exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.calibration.solvers.factors import check_damping, damped_gram, scaled_to_ones
from jaxprune.calibration.solvers.pattern import Pattern, Solver, check_problem, lowest_units, matmul
from jaxprune.calibration.solvers.rows import check_work, map_rows, solve_on_support, support_inverse
from jaxprune.tree.checks import check_number


def obc(damping: float = 1e-6, limit: float = 2e11) -> Solver:
    """Make Optimal Brain Compression: remove the entry that costs least, again and again, for small layers.

    Of a row w with its kept entries S and P = (H_SS)^-1, the removal of entry i raises the squared error by
    `w_i^2 / P_ii` once the others have made up for it by `w <- w - w_i / P_ii P e_i`. Each row is emptied in
    this way; the removals of all rows then compete by their exact costs, each after those before it in its
    row. At last the weights are solved for on the support. With "nm" a group that has lost m - n entries
    is closed.

    Args:
      damping: added to the diagonal of H in units of itself, so that it has an inverse; raised tenfold while
        it has none, as in `damped_factor`.
      limit: the most multiply-adds, out in^3, that a batch may take.

    Returns:
      A solver, for "elements" and "nm".

    Raises:
      ValueError: a `damping` out of range; when the solver is called, blocks, more work than `limit`, or a
        problem of other shapes.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> weight = jnp.array([[[1.0, 1.0, 3.0]]])
      >>> gram = jnp.array([[[2.0, 1.9, 0], [1.9, 2.2, 0], [0, 0, 1.0]]])
      >>> solved, mask = jp.solvers.obc()(weight, gram, jnp.array([1]), jp.solvers.Pattern())
      >>> mask.tolist(), round(float(solved[0, 0, 1]), 2)  # the second makes up for the first, its near copy
      ([[[False, True, True]]], 1.86)

    References:
      Frantar, Singh and Alistarh, "Optimal Brain Compression", NeurIPS 2022, arXiv:2208.11580.
    """
    damping = check_damping(damping, "obc")
    check_number(limit, "limit", "of multiply-adds")

    def solve(
        weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Pattern
    ) -> tuple[jax.Array, jax.Array]:
        pattern = check_problem("obc", weight, gram, counts, pattern)
        if pattern.kind == "blocks":
            raise ValueError("obc removes single entries or n:m; for blocks use sparsegpt() or alps().")
        check_work("obc", weight.shape, limit, "Use alps()")
        unit_gram, sizes = scaled_to_ones(gram)
        unit_gram = damped_gram(unit_gram, damping)
        inverse = jax.vmap(lambda h: support_inverse(h, jnp.ones(h.shape[0], bool)))(unit_gram)
        dense = weight * sizes[:, None, :]
        trace = map_rows(lambda p, w: _remove_all(p, w, pattern), inverse, dense)
        if pattern.kind == "nm":
            removed = jnp.where(counts == 0, 0, trace.costs.shape[-1])[:, None]
        elif pattern.per_output:
            removed = counts[:, None]
        else:
            # A removal waits for those before it in its row. So it competes with the highest cost up to its
            # own, and of equal ones the earlier goes first: the lowest of a row are its first.
            highest = lax.cummax(trace.costs, axis=2)
            removed = jnp.sum(lowest_units(highest, counts, False), axis=-1, dtype=jnp.int32)
        mask = trace.turns >= removed[:, :, None]
        solved = map_rows(solve_on_support, unit_gram, mask, matmul(dense, unit_gram)) / sizes[:, None, :]
        dead = jnp.diagonal(gram, axis1=1, axis2=2)[:, None, :] == 0
        as_before = jnp.all(mask, axis=-1, keepdims=True) | (mask & dead)
        return jnp.where(as_before, weight, solved), mask

    return solve


class _Trace(NamedTuple):
    """The removals of a row: their costs in order, and the turn of each entry, or `in` if it stays."""

    costs: jax.Array
    turns: jax.Array


def _remove_all(inverse: jax.Array, weight: jax.Array, pattern: Pattern) -> _Trace:
    """Remove the entries of a row until none, or n of each m, are left."""
    inputs = weight.shape[0]
    size, stay = (pattern.m, pattern.n) if pattern.kind == "nm" else (inputs, 0)
    steps = inputs // size * (size - stay)

    def step(
        turn: jax.Array, state: tuple[jax.Array, jax.Array, _Trace]
    ) -> tuple[jax.Array, jax.Array, _Trace]:
        weight, inverse, trace = state
        alive = trace.turns == inputs
        left = jnp.repeat(jnp.sum(alive.reshape(-1, size), axis=1, dtype=jnp.int32), size)
        # Of an entry removed already the diagonal is a rounding error.
        diagonal = jnp.where(alive, jnp.diagonal(inverse), 1)
        costs = jnp.where(alive & (left > stay), weight**2 / diagonal, jnp.inf)
        at = jnp.argmin(costs)
        column = inverse[at]
        turns = trace.turns.at[at].set(turn.astype(jnp.int32))
        moved = jnp.where(turns == inputs, weight - weight[at] / diagonal[at] * column, 0)
        downdated = inverse - column[:, None] * (column[None, :] / diagonal[at])
        return moved, downdated, _Trace(trace.costs.at[turn].set(costs[at]), turns)

    start = _Trace(jnp.zeros(steps, weight.dtype), jnp.full(inputs, inputs, jnp.int32))
    return lax.fori_loop(0, steps, step, (weight, inverse, start))[2]
