"""Penalties: terms of the loss that drive weights, or whole groups of them, towards zero.

```python
def loss_fn(params, batch):
    return task_loss(params, batch) + 1e-4 * jp.penalties.group_lasso(params, axis=-2)
```

Gradient steps on a penalty make weights small, but not exactly zero. So prune afterwards, by the groups that
were penalised:

```python
inputs = jp.structures.slices(axis=-2, norm=2)
masks = jp.prune_once(params, jp.scores.magnitude, threshold=1e-2, structure=inputs)
```
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.structures import slices
from jaxprune.tree.dtypes import common_dtype
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Params, Where

__all__ = ["group_lasso", "l1"]


def l1(params: Params, where: Where = kernels) -> jax.Array:
    """The sum of magnitudes, `sum |w|`: the lasso, which drives single weights towards zero.

    On the scales of norms this is the penalty of network slimming, which then prunes the channels with small
    scales: `l1(params, where=jp.matching("*/scale"))`.

    Args:
      params: a pytree of arrays.
      where: which leaves take part, a function of (path, leaf).

    Returns:
      A scalar, float32 (float64 if a leaf is); half precision is summed in float32. The gradient
      is `sign(w)`, 0 at 0.

    Raises:
      ValueError: `where` matches nothing.
      TypeError: a leaf that `where` matches is not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> float(jp.penalties.l1({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.ones(2)}))
      3.0

    References:
      Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B, 1996.
      Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    return _total([jnp.sum(size) for size in _magnitudes(params, where).values()])


def group_lasso(params: Params, axis: int | Sequence[int] = -1, where: Where = kernels) -> jax.Array:
    """The sum of group norms, which drives whole slices towards zero at once.

        sum over the slices g along the axis of sqrt(size of g) * ||w_g||_2

    The groups are the slices of `structures.slices(axis)`: with flax's layouts `axis=-1` is the output
    neuron or filter, `axis=-2` the input. The factor sqrt(size of g) makes a weight cost the same in groups
    of any size.

    Args:
      params: a pytree of arrays.
      axis: the axis, or axes, that index the groups.
      where: which leaves take part, a function of (path, leaf).

    Returns:
      A scalar, float32 (float64 if a leaf is); half precision is summed in float32. The gradient
      is `sqrt(size of g) * w / ||w_g||_2`, 0 (a subgradient) where a whole group is 0.

    Raises:
      ValueError: `where` matches nothing, or a leaf does not have the axis.
      TypeError: a leaf that `where` matches is not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 1.0]])}
      >>> float(jp.penalties.group_lasso(params, axis=-1))
      12.0

    References:
      Yuan & Lin, "Model Selection and Estimation in Regression with Grouped Variables", JRSS B, 2006.
      Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NIPS 2016: there without
      the root of the size.
    """
    sizes = _magnitudes(params, where)
    everything = {path: jnp.ones(size.shape, bool) for path, size in sizes.items()}
    norms = slices(axis, norm=_weighted_norm).pool(sizes, everything).scores
    return _total([jnp.sum(norm) for norm in norms.values()])


def _weighted_norm(sizes: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    squares = jnp.sum(jnp.square(sizes), axis=axis)
    # The root has no derivative at 0. The inner `where` keeps it off 0: the gradient of the outer one alone
    # would be 0 * inf.
    empty = squares == 0
    norm = jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, squares)))
    count = math.prod(sizes.shape[a] for a in axis)
    return norm * math.sqrt(count)


def _magnitudes(params: Params, where: Where) -> dict[str, jax.Array]:
    """Compute the magnitudes of the leaves that take part, in float32 or float64."""
    by_path = array_leaves(params)
    leaves = {path: by_path[path].astype(_sum_dtype(by_path[path])) for path in selected(params, where)}
    # Not `abs`, whose derivative at 0 is 1 in JAX: it would push weights at 0 away from there.
    return {path: (leaf * lax.stop_gradient(jnp.sign(leaf)).conj()).real for path, leaf in leaves.items()}


def _sum_dtype(*arrays: jax.Array) -> jnp.dtype:
    return common_dtype(jnp.float32, *(array.dtype for array in arrays))


def _total(sums: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack([part.astype(_sum_dtype(*sums)) for part in sums]))
