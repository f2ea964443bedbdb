"""Least squares on the support of a mask, by conjugate gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.calibration.solvers.pattern import matmul

_SOLVED = 1e-4
"""The relative residual at which a row that keeps all its weights is left as it is."""


def refine(weight: jax.Array, mask: jax.Array, gram: jax.Array, target: jax.Array, steps: int) -> jax.Array:
    """Move the kept weights towards those of least squared error, `steps` conjugate gradient steps.

    With H the Gram matrix and T the target it minimises `tr(W H W^T) / 2 - tr(W T^T)` over the kept entries.
    Its gradient is `W H - T`. Where `T = W0 H`, this is `tr((W - W0) H (W - W0)^T) / 2` up to a constant,
    half the squared error of the layer's output. Each output is a problem of its own, preconditioned by the
    diagonal.

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
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)[:, None, :]
    inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)
    start = jnp.where(mask, weight, 0)

    def gradient(at: jax.Array) -> jax.Array:
        return jnp.where(mask, matmul(at, gram) - target, 0)

    def step(_: jax.Array, state: _Descent) -> _Descent:
        image = jnp.where(mask, matmul(state.direction, gram), 0)
        curvature = _dot(state.direction, image)
        # Where H is singular, the curvature of a direction may be 0, or a rounding error of the terms it is
        # summed from. To divide by it would send the row far away, so the row stops here.
        noise = jnp.finfo(weight.dtype).eps * _dot(state.direction**2, diagonal)
        moving = state.moving & (curvature > noise)
        size = jnp.where(moving, state.norm / jnp.where(moving, curvature, 1), 0)
        residual = state.residual - size * image
        scaled = residual * inverse
        norm = _dot(residual, scaled)
        turn = jnp.where(state.norm > 0, norm / jnp.where(state.norm > 0, state.norm, 1), 0)
        at = state.at + size * state.direction
        return _Descent(at, residual, scaled + turn * state.direction, norm, moving)

    first = gradient(start)
    scaled = -first * inverse
    norm = _dot(-first, scaled)
    # The target's own rounding errors are no reason to move a row that has lost nothing.
    intact = jnp.all(mask, axis=-1, keepdims=True)
    solved = intact & (norm <= _SOLVED**2 * _dot(target, target * inverse))
    begin = _Descent(start, -first, scaled, norm, ~solved & (norm > 0))
    end = lax.fori_loop(0, steps, step, begin).at
    # f(end) - f(start) = (end - start) . (gradient(end) + gradient(start)) / 2, as f is quadratic. This
    # difference is exact where that of two sums of squares would be rounded away.
    fall = _dot(end - start, gradient(end) + first)
    return jnp.where(fall < 0, end, start)


class _Descent(NamedTuple):
    """Conjugate gradients under way; `norm` is the squared norm of the residual as preconditioned."""

    at: jax.Array
    residual: jax.Array
    direction: jax.Array
    norm: jax.Array
    moving: jax.Array


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)
