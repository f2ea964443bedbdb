"""Least squares on the support of a mask, by conjugate gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from jaxprune.calibration.solvers.factors import scaled_to_ones
from jaxprune.calibration.solvers.pattern import matmul

_LARGEST = 64
"""The most eigenvalues that the preconditioner takes out of H."""

_LEAST = 1e-5
"""The least of what is left on a diagonal of ones; above the rounding errors of taking the rest out."""

_SOLVED = 1e-4
"""The relative residual at which a row that keeps all its weights is left as it is."""


def refine(weight: jax.Array, mask: jax.Array, gram: jax.Array, target: jax.Array, steps: int) -> jax.Array:
    """Move the kept weights towards those of least squared error, `steps` conjugate gradient steps.

    With H the Gram matrix and T the target it minimises `tr(W H W^T) / 2 - tr(W T^T)` over the kept entries.
    Its gradient is `W H - T`. Where `T = W0 H`, this is `tr((W - W0) H (W - W0)^T) / 2` up to a constant,
    half the squared error of the layer's output. Each output is a problem of its own.

    Args:
      weight: (B, out, in), the start.
      mask: bool, of that shape or one that broadcasts to it; True where kept.
      gram: (B, in, in); it may be singular. Weights of dead inputs, whose diagonal is 0, do not move.
      target: (B, out, in), `W0 H` for weights W0, or `W0 C` with a cross Gram matrix C.
      steps: how many.

    Returns:
      The weights, exactly 0 where pruned. An output whose error would not fall keeps the weights it started
      from, to the bit; so does one without pruned weights whose target is `W0 H` with the weights as W0.
    """
    mask = jnp.broadcast_to(mask, weight.shape)
    start = jnp.where(mask, weight, 0)
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)[:, None, :]
    free = mask & (diagonal > 0)
    precondition, eps = _preconditioner(gram, free), jnp.finfo(weight.dtype).eps

    def gradient(at: jax.Array) -> jax.Array:
        return jnp.where(free, matmul(at, gram) - target, 0)

    def step(_: jax.Array, state: _Descent) -> _Descent:
        image = jnp.where(free, matmul(state.direction, gram), 0)
        curvature = _dot(state.direction, image)
        # Where H is singular, the curvature of a direction may be 0, or a rounding error of the terms it is
        # summed from. To divide by it would send the row far away, so the row stops here.
        noise = eps * _dot(state.direction**2, diagonal)
        # A residual that is a rounding error of the first is solved. Steps beyond that would go on until
        # nothing but the last bits of the smallest numbers is left, and then anywhere.
        moving = state.moving & (curvature > noise) & (state.norm > eps**2 * norm)
        size = jnp.where(moving, state.norm / jnp.where(moving, curvature, 1), 0)
        residual = state.residual - size * image
        scaled = precondition(residual)
        after = _dot(residual, scaled)
        turn = jnp.where(state.norm > 0, after / jnp.where(state.norm > 0, state.norm, 1), 0)
        at = state.at + size * state.direction
        return _Descent(at, residual, scaled + turn * state.direction, after, moving)

    first = gradient(start)
    inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)
    # The target's own rounding errors are no reason to move a row that has lost nothing.
    intact = jnp.all(mask, axis=-1, keepdims=True)
    solved = intact & (_dot(first**2, inverse) <= _SOLVED**2 * _dot(target**2, inverse))
    scaled = precondition(-first)
    norm = _dot(-first, scaled)
    begin = _Descent(start, -first, scaled, norm, ~solved & (norm > 0))
    end = lax.fori_loop(0, steps, step, begin).at
    # f(end) - f(start) = (end - start) . (gradient(end) + gradient(start)) / 2, as f is quadratic. This is
    # exact where the difference of two sums of squares would be rounded away.
    fall = _dot(end - start, gradient(end) + first)
    return jnp.where(fall < 0, end, start)


class _Descent(NamedTuple):
    """Conjugate gradients under way; `norm` is the squared norm of the residual as preconditioned."""

    at: jax.Array
    residual: jax.Array
    direction: jax.Array
    norm: jax.Array
    moving: jax.Array


def _preconditioner(gram: jax.Array, mask: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Return a function that applies to each row an approximate inverse of its H_SS."""
    # Correlated inputs give H a few eigenvalues far above the others, and conjugate gradients spend about one
    # step on each, for every row anew. So they are taken out of H once: with inputs scaled to a diagonal of
    # ones, H is near to F F^T + D, F being its r largest eigenvectors times the roots of their eigenvalues,
    # and D the diagonal that is left. This restricts to the kept inputs S of a row as H does, and is inverted
    # there by Woodbury's formula,
    #
    #     (F_S F_S^T + D_S)^-1 = D_S^-1 - D_S^-1 F_S G^-1 F_S^T D_S^-1,   G = I + F_S^T D_S^-1 F_S.
    #
    # The r x r matrices G of all rows are one product of the mask with the outer products of the rows of F.
    unit_gram, sizes = scaled_to_ones(gram)
    inputs = gram.shape[-1]
    rank = max(1, min(_LARGEST, inputs // 4))
    basis = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (inputs, rank)), (len(gram), inputs, rank))
    for _ in range(2):  # subspace iteration: eigenvalues that stand out need no more
        basis = jnp.linalg.qr(matmul(unit_gram, basis))[0]
    values, turned = jnp.linalg.eigh(matmul(basis.swapaxes(1, 2), matmul(unit_gram, basis)))
    factor = matmul(basis, turned) * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    left = jnp.maximum(1 - jnp.sum(factor**2, axis=-1), _LEAST)
    outer = factor[..., :, None] * (factor / left[..., None])[..., None, :]
    within = matmul(mask.astype(gram.dtype), outer.reshape(len(gram), inputs, rank**2))
    within = within.reshape(*mask.shape[:2], rank, rank) + jnp.eye(rank, dtype=gram.dtype)
    inner = jnp.linalg.cholesky(within)
    left, sizes = left[:, None, :], sizes[:, None, :]

    def apply(residual: jax.Array) -> jax.Array:
        alone = residual / sizes / left
        together = cho_solve((inner, True), matmul(alone, factor)[..., None])[..., 0]
        return jnp.where(mask, alone - matmul(together, factor.swapaxes(1, 2)) / left, 0) / sizes

    return apply


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)
