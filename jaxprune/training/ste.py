"""Straight-through masks: a sparse forward pass whose gradient reaches the pruned weights too."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.tree.checks import scalar
from jaxprune.tree.dtypes import common_dtype
from jaxprune.tree.masks import apply_masks, like_params
from jaxprune.typing import Masks, Params


def straight_through(params: Params, masks: Masks, decay: float | jax.Array = 0.0) -> Params:
    """Return masked params whose gradient is that of dense params: pruned weights go on learning.

    Forward it is exactly `apply_masks(params, masks)`. Backward it passes the gradient g of the
    masked params on to *all* entries, as if there were no mask, and adds a decay that shrinks the
    pruned entries:

        g + decay * where(mask, 0, p)

    `decay=0` is the straight-through estimator (STE), `decay > 0` is SR-STE, which keeps masks
    from flipping back and forth. So a weight that was pruned by mistake can come back, which a
    gradient through `apply_masks` never allows.

    The params stay dense while they train, so use the optimizer as it is, without `wrap_optax` or
    `keep_masked`. Make the masks anew in each step, and make them real at the end:

    ```python
    two_of_four = jp.structures.nm(2, 4)

    def masks_of(params):
        params = jax.lax.stop_gradient(params)
        return jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=two_of_four)

    @jax.jit
    def train_step(params, opt_state, batch):
        def loss(params):
            return loss_fn(jp.straight_through(params, masks_of(params), decay=2e-4), batch)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    masks = masks_of(params)
    params = jp.apply_masks(params, masks)          # from here on: jp.keep_masked(tx, masks)
    ```

    Movement pruning needs these gradients too: it scores by how a weight moves, pruned or not.

    Each call adds the decay once, however the loss is scaled: call it once per gradient, outside of
    a loop over micro-batches. It has no forward-mode derivative (`jax.jvp`).

    Args:
      params: a pytree of arrays, dense.
      masks: bool masks like `params`. They may come from the same traced function, and get no
        gradient.
      decay: 0 or a positive scalar, in units of gradient per weight; it may be traced, and gets
        no gradient. The paper's is 2e-4.

    Returns:
      A tree like `params`, of the same dtypes.

    Raises:
      ValueError: the trees or shapes differ, or the decay is not a scalar, negative or not finite.
      TypeError: a mask is not bool.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params, masks = {"w": jnp.array([3.0, 2.0])}, {"w": jnp.array([True, False])}
      >>> jp.straight_through(params, masks)["w"].tolist()
      [3.0, 0.0]
      >>> loss = lambda params, decay: jp.straight_through(params, masks, decay)["w"].sum()
      >>> jax.grad(loss)(params, 0.0)["w"].tolist(), jax.grad(loss)(params, 0.25)["w"].tolist()
      ([1.0, 1.0], [1.0, 1.5])

    References:
      Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
      Computation", arXiv:1308.3432, 2013 (STE).
      Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR
      2021 (SR-STE). There the decay goes with SGD; with Adam, as any L2 term, it is rescaled.
      Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020.
    """
    kept = jax.tree.leaves(like_params(masks, params))
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, _through(leaves, kept, _checked(decay)))


def _checked(decay: Any) -> jax.Array | None:
    """Return the decay as a scalar, or None for a 0 that is known now."""
    value = scalar(decay, "decay")  # on the host: in a traced function even constants compare as tracers
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"decay must be 0 or a positive number, got {value}.")
    if value == 0:
        return None
    return jnp.asarray(decay, float)


@jax.custom_vjp
def _through(leaves: list[jax.Array], masks: list[jax.Array], decay: jax.Array | None) -> list[jax.Array]:
    del decay
    return apply_masks(leaves, masks)


def _forward(leaves: list[jax.Array], masks: list[jax.Array], decay: jax.Array | None) -> tuple[Any, Any]:
    # Without decay the gradient needs nothing from the forward pass, so nothing is kept for it.
    return apply_masks(leaves, masks), None if decay is None else (leaves, masks, decay)


def _backward(saved: Any, grads: list[jax.Array]) -> tuple[list[jax.Array], None, None]:
    if saved is None:
        return grads, None, None

    leaves, masks, decay = saved

    def decayed(grad, leaf, mask):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return grad  # float0: integers have no gradient
        # In float32 at least, where a small decay does not vanish; conj is JAX's convention for
        # the gradient of |p|^2 / 2.
        dtype = common_dtype(leaf.dtype, jnp.float32)
        pruned = jnp.where(mask, jnp.zeros((), dtype), leaf.astype(dtype).conj())
        return (grad.astype(dtype) + decay.astype(dtype) * pruned).astype(leaf.dtype)

    return [decayed(*each) for each in zip(grads, leaves, masks, strict=True)], None, None


_through.defvjp(_forward, _backward)
