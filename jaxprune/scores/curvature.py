"""The dense Hessian of small networks, and its inverse."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from jaxprune.tree.leaves import is_concrete

MAX_WEIGHTS = 5_000
"""The largest Hessian is of this many weights: 100 MB in float32, and as much for its inverse."""

_AT_ONCE = 32


def check_damping(damping: Any, name: str) -> None:
    """Checks what is added to the diagonal of a Hessian.

    Raises:
      ValueError: it is not a finite number of 0 or more.
    """
    if not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise ValueError(f"{name} needs damping to be a number of 0 or more, got {damping!r}.")


def inverse_hessian(
    name: str,
    loss: Callable[[jax.Array], jax.Array],
    weights: jax.Array,
    damping: float,
    alive: jax.Array | None = None,
) -> jax.Array:
    """The inverse of `H + damping * I`, where H is the Hessian of a loss.

    Args:
      name: for error messages.
      loss: a function of a vector.
      weights: the vector, of n entries.
      damping: what is added to the diagonal.
      alive: bool vector of n. Of the others rows and columns are left out of H, and are those of
        the identity in the inverse.

    Returns:
      n x n, symmetric; NaN where the matrix is not positive definite and that cannot be said.

    Raises:
      ValueError: more than `MAX_WEIGHTS` entries, or a matrix that is not positive definite (where
        values can be looked at).
    """
    n = weights.size
    if n > MAX_WEIGHTS:
        raise ValueError(
            f"{name} inverts a dense Hessian, of at most {MAX_WEIGHTS} weights, got {n}. Take fewer leaves "
            "with where=..., or use scores.obd(loss_fn, samples=...) or scores.fisher(loss_fn)."
        )
    identity = jnp.eye(n, dtype=weights.dtype)
    _, hessian_times = jax.linearize(jax.grad(loss), weights)
    hessian = lax.map(hessian_times, identity, batch_size=_AT_ONCE)
    damped = (hessian + hessian.T) / 2 + float(damping) * identity
    if alive is not None:
        damped = jnp.where(alive[:, None] & alive[None, :], damped, identity)
    factor = jnp.linalg.cholesky(damped)
    # A singular matrix may pass for a definite one by rounding: then a pivot is of rounding's size.
    smallest = jnp.finfo(weights.dtype).eps * math.sqrt(n) * jnp.max(jnp.diagonal(damped))
    definite = jnp.all(jnp.diagonal(factor) ** 2 > smallest)
    if is_concrete(definite, damped) and not definite:
        least = float(jnp.linalg.eigvalsh(damped)[0])
        raise ValueError(
            f"{name}: the Hessian plus damping={damping:g} is not positive definite (its least eigenvalue is "
            f"{least:.3g}), as at a point that is no minimum, or where weights do not act on the loss. "
            "Raise damping=..., or leave such leaves out with where=..."
        )
    return jnp.where(definite, cho_solve((factor, True), identity), jnp.nan)
