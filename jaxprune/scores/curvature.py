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
"""The most weights that a Hessian may have: it takes 100 MB in float32, and its inverse as much."""

_AT_ONCE = 32


def check_damping(damping: Any, name: str) -> None:
    """Check what is to be added to the diagonal of a Hessian."""
    if not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise ValueError(f"{name} needs damping to be a number of 0 or more, got {damping!r}.")


def inverse_hessian(
    name: str,
    loss: Callable[[jax.Array], jax.Array],
    weights: jax.Array,
    damping: float,
    alive: jax.Array | None = None,
) -> jax.Array:
    """Invert `H + damping * I`, where H is the Hessian of `loss` at a vector of n weights.

    For entries that are not `alive` the rows and columns of H, and so of the inverse, are those of the
    identity. Returns n x n, symmetric; a matrix that is not positive definite raises ValueError, and gives
    NaN under `jit`.
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
    # By rounding a singular matrix may get through Cholesky, with a pivot of the size of a rounding error.
    smallest = jnp.finfo(weights.dtype).eps * math.sqrt(n) * jnp.max(jnp.diagonal(damped))
    definite = jnp.all(jnp.diagonal(factor) ** 2 > smallest)
    if is_concrete(definite, damped) and not definite:
        least = float(jnp.linalg.eigvalsh(damped)[0])
        raise ValueError(
            f"{name}: the Hessian plus damping={damping:g} is not positive definite (its least eigenvalue is "
            f"{least:.3g}), as happens away from a minimum, or where weights do not affect the loss. "
            "Raise damping=..., or leave such leaves out with where=..."
        )
    return jnp.where(definite, cho_solve((factor, True), identity), jnp.nan)
