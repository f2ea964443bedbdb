"""Gram matrices, damped until they can be factorised."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MAX_DAMPING = 1.0
"""Where raising the damping ends, in mean diagonals."""


def check_damping(damping: object, name: str) -> float:
    """Check a damping, a fraction of the mean diagonal."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise ValueError(f"{name} needs damping to be a number of 0 or more, got {damping!r}.")
    return float(damping)


def with_ones_for_dead(gram: jax.Array) -> jax.Array:
    """Return Gram matrices with a diagonal of 1 for the inputs that were always 0, whose rows are 0."""
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    return _with_diagonal(gram, jnp.where(diagonal == 0, 1, diagonal))


def damped_factor(gram: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Factorise Gram matrices, each with as much damping as that takes.

    With dead inputs' diagonals set to 1, the factorised matrix is `H + d mean(diag H) I = R R^T` where R is
    upper triangular. So `H^-1 = U^T U` with `U = R^-1`, the factor that SparseGPT and GPTQ are written with;
    they need R itself and the inverses of its diagonal blocks alone, which saves inverting twice.

    d starts as `damping`. While a matrix has no factor in float32, because a pivot is not positive or is
    smaller than the rounding error of its diagonal entry, its d is multiplied by 10 (and is at least 1e-6),
    up to 1.

    Args:
      gram: (B, in, in), float32.
      damping: the first d, a fraction of the mean diagonal.

    Returns:
      R (B, in, in), and the d of each matrix (B,). NaN stands for both where there is no factor even with
      d = 1, as for a matrix that is not finite.
    """
    attempt, first = _attempts(gram, damping)

    def raised(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        relative = _raised(*state[::2])
        # The loop runs while not all are sound, so this is never skipped. But from under a condition XLA does
        # not take what is the same in all rounds, matrices among it, to hold it even where none is needed.
        return relative, *lax.cond(jnp.all(state[2]), lambda: state[1:], lambda: attempt(relative))

    relative, root, sound = lax.while_loop(
        lambda state: jnp.any(~state[2] & (state[0] < MAX_DAMPING)), raised, (first, *attempt(first))
    )
    return root, jnp.where(sound, relative, jnp.nan)


def damping_used(gram: jax.Array, damping: float) -> jax.Array:
    """Return the d of `damped_factor` alone; no factor is held beside the next attempt's."""
    attempt, first = _attempts(gram, damping)

    def raised(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        relative = _raised(*state)  # and a condition as above
        return relative, lax.cond(jnp.all(state[1]), lambda: state[1], lambda: attempt(relative)[1])

    relative, sound = lax.while_loop(
        lambda state: jnp.any(~state[1] & (state[0] < MAX_DAMPING)), raised, (first, attempt(first)[1])
    )
    return jnp.where(sound, relative, jnp.nan)


def _attempts(gram: jax.Array, damping: float) -> tuple[Any, jax.Array]:
    """Return the function of d that returns the factor and whether it is sound, and the first d."""
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    mean = jnp.mean(diagonal, axis=-1, keepdims=True)
    alive = jnp.where(diagonal == 0, 1, diagonal)

    def attempt(relative: jax.Array) -> tuple[jax.Array, jax.Array]:
        damped = alive + relative[:, None] * mean
        # Cholesky's factor is lower triangular; that of the matrix read backwards, read backwards, is upper.
        backwards = _with_diagonal(gram, damped)[:, ::-1, ::-1]
        lower = lax.linalg.cholesky(backwards, symmetrize_input=False)
        pivots = jnp.diagonal(lower, axis1=-2, axis2=-1)[:, ::-1] ** 2
        # A comparison with NaN is false.
        sound = jnp.all((pivots > jnp.finfo(jnp.float32).eps * damped) & (pivots < jnp.inf), axis=-1)
        # Read backwards and made NaN at once: each step of its own would hold another matrix.
        return jnp.where(sound[:, None, None], lower[:, ::-1, ::-1], jnp.nan), sound

    return attempt, jnp.full(gram.shape[:1], damping, jnp.float32)


def _raised(relative: jax.Array, sound: jax.Array) -> jax.Array:
    """Return the next d of the matrices that have no sound factor yet."""
    more = jnp.minimum(jnp.maximum(10 * relative, 1e-6), MAX_DAMPING)
    return jnp.where(sound, relative, more)


def _with_diagonal(matrices: jax.Array, diagonal: jax.Array) -> jax.Array:
    identity = jnp.eye(matrices.shape[-1], dtype=bool)
    return jnp.where(identity, diagonal[:, :, None], matrices)


def scaled_to_ones(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale inputs so that their squares sum to 1; dead inputs are taken to do so.

    Returns:
      `H_ij / (s_i s_j)`, with ones on the diagonal, and s (B, in). Weights times s belong to it.
    """
    gram = with_ones_for_dead(gram)
    sizes = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    return gram / sizes[:, :, None] / sizes[:, None, :], sizes


def damped_gram(gram: jax.Array, damping: float) -> jax.Array:
    """Return Gram matrices with as much damping as factorising them takes."""
    _, relative = damped_factor(gram, damping)
    gram = with_ones_for_dead(gram)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    mean = jnp.mean(diagonal, axis=-1, keepdims=True)
    return _with_diagonal(gram, diagonal + relative[:, None] * mean)
