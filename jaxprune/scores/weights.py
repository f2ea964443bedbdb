"""Scores that need the weights alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.scores.common import map_layers, map_leaves
from jaxprune.tree.checks import check_key
from jaxprune.tree.dtypes import promote_to_float32
from jaxprune.tree.host import compute, on_host
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.stacks import Stacked
from jaxprune.typing import Params, Scores


def magnitude(params: Params, **extra: Any) -> Scores:
    """The magnitude of each weight, `|w|`.

    Raises:
      TypeError: a leaf is not an array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.magnitude({"w": jnp.array([[-3.0, 1.0]])})["w"].tolist()
      [[3.0, 1.0]]

    References:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015.
    """
    del extra
    array_leaves(params)
    leaves, treedef = jax.tree.flatten(params)
    if on_host(leaves):
        return treedef.unflatten(compute(abs, leaves))
    return map_leaves(jnp.abs, params)


def normalized_magnitude(params: Params, *, stacked: Stacked | None = None, **extra: Any) -> Scores:
    """The magnitude relative to the leaf, `|w| / ||W||_2` with W the leaf that holds w.

    Where all leaves compete, a layer of small weights does not go first because of its scale. A leaf that
    is all 0 scores 0.

    Args:
      stacked: as for `prune_once`, which passes it on: each layer is scored as a separate leaf.

    Returns:
      Scores like `params`, in [0, 1]; float32 also for half-precision params.

    Raises:
      TypeError: a leaf is not an array, or `stacked` is not a function.
      ValueError: `stacked` names axes that a leaf does not have.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> scores = jp.scores.normalized_magnitude({"w": jnp.array([[-3.0, 4.0]])})
      >>> print(scores["w"])
      [[0.6 0.8]]

    References:
      Lee et al., "JaxPruner", arXiv:2304.14082 (its global magnitude, which adds 1e-8 to the norm).
    """
    del extra
    array_leaves(params)

    def relative(w):
        size = _relative_to_largest(w)
        norm = jnp.sqrt(jnp.sum(size * size))
        return size / jnp.where(norm == 0, jnp.ones_like(norm), norm)

    return map_layers(relative, params, stacked)


def lamp(params: Params, *, stacked: Stacked | None = None, **extra: Any) -> Scores:
    """Layer-adaptive magnitude: `w_u^2 / sum_{v >= u} w_v^2`, with the leaf in ascending order of `|w|`.

    The score is the share of a weight in the squares that remain in its leaf once all smaller weights are
    removed. Within a leaf it orders weights as the magnitude does, equal ones by index. The largest weight of
    each leaf scores exactly 1, so where all leaves compete none is emptied before all are. Pruned entries,
    which are 0, score 0.

    Args:
      stacked: as for `prune_once`, which passes it on: each layer is scored as a separate leaf.

    Returns:
      Scores like `params`, in [0, 1]; float32 also for half-precision params.

    Raises:
      TypeError: a leaf is not an array, or `stacked` is not a function.
      ValueError: `stacked` names axes that a leaf does not have.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.lamp({"w": jnp.array([[1.0, 0.0, -1.0]])})["w"].tolist()
      [[0.5, 0.0, 1.0]]

    References:
      Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021.
    """
    del extra
    array_leaves(params)

    def adapted(w):
        size = _relative_to_largest(w).ravel()
        order = jnp.argsort(jnp.abs(w).ravel(), stable=True)
        squares = size[order] ** 2
        # Summed from the largest down: the total minus the sum from below would lose all digits
        # among the largest, exactly where it matters.
        left = lax.cumsum(squares, reverse=True)
        ratios = squares / jnp.where(left == 0, jnp.ones_like(left), left)
        # A parallel sum rounds its parts apart, so a larger magnitude might get a lower ratio.
        ranked = lax.cummax(ratios)
        return jnp.zeros_like(size).at[order].set(ranked).reshape(w.shape)

    return map_layers(adapted, params, stacked)


def random(params: Params, *, key: jax.Array | None = None, **extra: Any) -> Scores:
    """A uniform random number in [0, 1) for each weight: the control of every experiment.

    Args:
      key: a PRNG key. Each leaf draws with the key folded with its index.

    Returns:
      float32 scores like `params`.

    Raises:
      ValueError: `key` is None.
      TypeError: `key` is not a PRNG key, or a leaf is not an array.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> scores = jp.scores.random({"w": jnp.ones((2, 3))}, key=jax.random.key(0))
      >>> scores["w"].shape
      (2, 3)
    """
    del extra
    if key is None:
        raise ValueError("scores.random needs a PRNG key: pass key=jax.random.key(0).")
    check_key(key, "scores.random")
    array_leaves(params)
    leaves, treedef = jax.tree.flatten(params)
    draws = [
        jax.random.uniform(jax.random.fold_in(key, index), leaf.shape, jnp.float32)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)


def _relative_to_largest(w: jax.Array) -> jax.Array:
    """Return `|w|` divided by the largest of its leaf, so that no square overflows or vanishes."""
    size = promote_to_float32(jnp.abs(w))
    top = jnp.max(size, initial=0)
    return size / jnp.where(top == 0, jnp.ones_like(top), top)
