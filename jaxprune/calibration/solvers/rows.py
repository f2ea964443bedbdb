"""Work on the rows of matrices one by one, where each row needs a matrix of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

_BYTES_AT_ONCE = 2**26


def check_work(name: str, shape: tuple[int, ...], limit: float, instead: str) -> None:
    """Check that a matrix for each row, and about as many steps as it has columns, are not too much."""
    batch, outputs, inputs = shape
    work = batch * outputs * inputs**3
    if work > limit:
        raise ValueError(
            f"{name} inverts a matrix for each output: {batch} x {outputs} outputs of {inputs} inputs take "
            f"{work:.1e} multiply-adds, about {work / 1e9 / 60:.0f} minutes at 1e9 a second, above "
            f"limit={limit:.1e}. {instead}, or raise limit=."
        )


def map_rows(function: Callable[..., Any], grams: jax.Array, *of_rows: jax.Array) -> Any:
    """Apply `function(gram, *row)` to each row of (B, out, ...), to as many at once as fill 64 MB."""
    batch, outputs = of_rows[0].shape[:2]
    inputs = grams.shape[-1]
    at_once = max(1, min(batch * outputs, _BYTES_AT_ONCE // (4 * inputs**2)))
    number = jnp.repeat(jnp.arange(batch), outputs)
    flat = tuple(array.reshape(-1, *array.shape[2:]) for array in of_rows)
    done = lax.map(lambda each: function(grams[each[0]], *each[1:]), (number, *flat), batch_size=at_once)
    return jax.tree.map(lambda array: array.reshape(batch, outputs, *array.shape[1:]), done)


def support_inverse(gram: jax.Array, kept: jax.Array) -> jax.Array:
    """Return the inverse of the kept rows and columns of a matrix, in their places, and 0 elsewhere."""
    both = kept[:, None] & kept[None, :]
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    factor = cho_factor(jnp.where(both, gram, identity), lower=True)
    return jnp.where(both, cho_solve(factor, identity), 0)


def solve_on_support(gram: jax.Array, kept: jax.Array, target: jax.Array) -> jax.Array:
    """Solve `H_SS w_S = t_S` for the kept entries S of a row; the others are 0."""
    both = kept[:, None] & kept[None, :]
    factor = cho_factor(jnp.where(both, gram, jnp.eye(gram.shape[0], dtype=gram.dtype)), lower=True)
    return jnp.where(kept, cho_solve(factor, jnp.where(kept, target, 0)), 0)
