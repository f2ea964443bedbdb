"""ALPS: the mask by the alternating direction method of multipliers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.calibration.solvers.factors import scaled_to_ones
from jaxprune.calibration.solvers.pattern import Pattern, Solver, check_problem, matmul, pattern_mask
from jaxprune.calibration.solvers.refining import refine
from jaxprune.tree.checks import as_integer

# Penalties in units of the mean eigenvalue, which is 1. A smaller first one lets the mask wander further from
# that of the dense weights; the last one has to be large enough to settle it where eigenvalues fall off
# slowly.
_FIRST, _LAST = 3e-3, 1.0
_REFINING = 10


def alps(iterations: int = 60) -> Solver:
    """Make ALPS: choose the mask and the weights together, by ADMM with a growing penalty.

    With inputs scaled so that the diagonal of H is 1, it minimises `tr((W - W0) H (W - W0)^T) / 2` over
    matrices with the right number of zeros. W and its copy D with the zeros are held together by a penalty
    rho and a running sum U of their differences:

        W = (W0 H + rho (D - U)) (H + rho I)^-1,   D = the largest entries of W + U,   U <- U + W - D.

    rho grows geometrically from .003 to 1 over the iterations, and U is rescaled with it. One
    eigendecomposition of H serves all of them. The published method raises rho by what the mask did, and
    starts higher; starting low finds better masks where inputs are correlated. Ten steps of `refine` then
    settle the weights.

    An output that keeps all its weights, and the kept weights of dead inputs, are as they were, to the bit.

    Args:
      iterations: how many, 1 or more.

    Returns:
      A solver, for all patterns. It takes 4 in^2 multiply-adds for each output and iteration.

    Raises:
      TypeError: `iterations` is not an integer.
      ValueError: `iterations` below 1; when the solver is called, a problem of other shapes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jax.random.normal(jax.random.key(1), (8, 8))
      >>> weight, gram = jax.random.normal(jax.random.key(2), (1, 4, 8)), (x.T @ x)[None]
      >>> _, mask = jp.solvers.alps()(weight, gram, jnp.array([0]), jp.solvers.Pattern("nm", n=2, m=4))
      >>> bool(mask.all())
      True

    References:
      Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
      NeurIPS 2024, arXiv:2406.07831.
    """
    iterations = as_integer(iterations, "iterations", at_least=1)

    def solve(
        weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Pattern
    ) -> tuple[jax.Array, jax.Array]:
        pattern = check_problem("alps", weight, gram, counts, pattern)
        unit_gram, sizes = scaled_to_ones(gram)
        start = weight * sizes[:, None, :]
        values, vectors = jnp.linalg.eigh(unit_gram)
        values = jnp.maximum(values, 0)[:, None, :]
        dense = matmul(start, vectors) * values

        def step(number: jax.Array, state: _Multipliers) -> _Multipliers:
            progress = number.astype(weight.dtype) / max(iterations - 1, 1)
            penalty = _FIRST * (_LAST / _FIRST) ** progress
            summed = state.summed * (state.penalty / penalty)
            right = dense + penalty * matmul(state.sparse - summed, vectors)
            free = matmul(right / (values + penalty), vectors.swapaxes(1, 2)) + summed
            mask = pattern_mask(free**2, counts, pattern)
            sparse = jnp.where(mask, free, 0)
            return _Multipliers(sparse, mask, free - sparse, penalty)

        begin = _Multipliers(start, jnp.ones(weight.shape, bool), jnp.zeros_like(start), jnp.float32(_FIRST))
        found = lax.fori_loop(0, iterations, step, begin)
        intact = jnp.all(found.mask, axis=-1, keepdims=True)
        dead = jnp.diagonal(gram, axis1=1, axis2=2)[:, None, :] == 0
        near = jnp.where(intact | dead, weight, found.sparse / sizes[:, None, :])
        return refine(near, found.mask, gram, matmul(weight, gram), _REFINING), found.mask

    return solve


class _Multipliers(NamedTuple):
    """ADMM under way: D, its mask, and U in units of the penalty."""

    sparse: jax.Array
    mask: jax.Array
    summed: jax.Array
    penalty: jax.Array
