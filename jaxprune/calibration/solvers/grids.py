"""Steps of the grids that weights are rounded to while others make up for the rounding."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.quantization import nearest_codes, scale_for

_LEAST = 0.3
_TRIED = 36


def searched_scale(weight: jax.Array, importance: jax.Array, bits: int) -> jax.Array:
    """Return for each row the scale of the grid that suits it best.

    A grid that reaches to a row's largest weight spends its few values on the tail. Of 36 grids that reach to
    between .3 of it and all of it, this takes the one of least `sum_j importance_j |w_j - q_j|^3`; of
    equal ones the widest. The cube counts weights that a grid cuts off for more than those that lie
    between its values: the errors of these have all signs, and later columns make up for most of them.

    Args:
      weight: (B, out, in).
      importance: (B, in).
      bits: of each code.

    Returns:
      float32 (B, out).
    """
    largest = jnp.max(jnp.abs(weight), axis=-1)

    def attempt(number: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reach = 1 - (1 - _LEAST) / (_TRIED - 1) * number.astype(weight.dtype)
        scale = scale_for(reach * largest, bits)
        rounded = nearest_codes(weight, scale[..., None], bits) * scale[..., None]
        error = jnp.sum(importance[:, None, :] * jnp.abs(weight - rounded) ** 3, axis=-1)
        better = error < best[1]
        return jnp.where(better, scale, best[0]), jnp.where(better, error, best[1])

    start = scale_for(largest, bits), jnp.full(largest.shape, jnp.inf, weight.dtype)
    return lax.fori_loop(0, _TRIED, attempt, start)[0]
