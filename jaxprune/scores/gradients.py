"""Scores of the weights and their gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.scores.common import map_leaves
from jaxprune.tree.dtypes import promote_to_float32
from jaxprune.tree.host import compute
from jaxprune.tree.leaves import array_leaves, describe, flatten
from jaxprune.tree.mirrors import check_mirrors
from jaxprune.typing import Params, Scores


def gradient_magnitude(params: Params, *, grads: Any = None, **extra: Any) -> Scores:
    """The magnitude of each gradient, `|g|`.

    Args:
      grads: the gradients of the loss, like `params`.

    Raises:
      ValueError: `grads` is None, or does not mirror `params`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, grads = {"w": jnp.array([[3.0, 1.0]])}, {"w": jnp.array([[0.5, -2.0]])}
      >>> jp.scores.gradient_magnitude(params, grads=grads)["w"].tolist()
      [[0.5, 2.0]]

    References:
      Blalock et al., "What is the State of Neural Network Pruning?", MLSys 2020 (as a baseline).
    """
    del extra
    return map_leaves(lambda _, g: compute(abs, [g])[0], params, _needed(grads, params, "gradient_magnitude"))


def taylor(params: Params, *, grads: Any = None, **extra: Any) -> Scores:
    """The size of the loss's change to first order if a weight is removed, `|w * g|`.

    Args:
      grads: the gradients of the loss at `params`, like `params`.

    Returns:
      Scores like `params`; float32 also for half-precision params, in which products would vanish.

    Raises:
      ValueError: `grads` is None, or does not mirror `params`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, grads = {"w": jnp.array([[3.0, 1.0]])}, {"w": jnp.array([[0.5, -2.0]])}
      >>> jp.scores.taylor(params, grads=grads)["w"].tolist()
      [[1.5, 2.0]]

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      ICLR 2017; Lee et al., "SNIP", ICLR 2019 (the same score, at initialisation).
    """
    del extra

    def size(w, g):
        return jnp.abs(promote_to_float32(w) * promote_to_float32(g))

    return map_leaves(size, params, _needed(grads, params, "taylor"))


def signed_taylor(params: Params, *, grads: Any = None, **extra: Any) -> Scores:
    """The first-order change of the loss with its sign, `w * g`, to be summed over a structure.

    Entries that go together change the loss by the sum of their terms, which may cancel. The score of a
    filter is the magnitude of that sum, which the structure takes, as in the example. To rank single
    entries use `taylor`: their sign says nothing about how much they matter.

    Args:
      grads: the gradients of the loss at `params`, like `params`.

    Returns:
      Scores like `params`; float32 also for half-precision params.

    Raises:
      ValueError: `grads` is None, or does not mirror `params`.
      TypeError: a leaf is complex.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [3.0, 1.0]])}
      >>> grads = {"kernel": jnp.array([[5.0, 2.0], [-5.0, 2.0]])}
      >>> filters = jp.structures.slices(norm=lambda s, axis: jnp.abs(jnp.sum(s, axis=axis)))
      >>> score = jp.scores.signed_taylor
      >>> masks = jp.prune_once(params, score, count=1, structure=filters, grads=grads)
      >>> masks["kernel"].tolist()
      [[False, True], [False, True]]

    References:
      Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019. They square
      the sum, which ranks alike; over several batches they average the squares.
    """
    del extra
    return _products(params, grads, "signed_taylor")


def snip(params: Params, *, grads: Any = None, **extra: Any) -> Scores:
    """Connection sensitivity, `|w * g|` divided by its sum over all leaves.

    It ranks as `taylor` does. Since the scores sum to 1, those of different batches or steps have equal
    weight when they are added.

    Args:
      grads: the gradients of the loss at `params`, like `params`; at initialisation, of one batch.

    Returns:
      Scores like `params`, which sum to 1 over all leaves (0 if every gradient is 0); float32
      also for half-precision params.

    Raises:
      ValueError: `grads` is None, or does not mirror `params`.
      TypeError: a leaf is complex.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, grads = {"w": jnp.array([[3.0, 1.0]])}, {"w": jnp.array([[0.5, -0.5]])}
      >>> jp.scores.snip(params, grads=grads)["w"].tolist()
      [[0.75, 0.25]]

    References:
      Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019.
      Its sum is over the weights that can be pruned; ours is over all leaves, biases included.
    """
    del extra
    sizes = jax.tree.map(jnp.abs, _products(params, grads, "snip"))
    total = jnp.sum(jnp.stack([jnp.sum(size) for size in jax.tree.leaves(sizes)]))
    total = jnp.where(total == 0, jnp.ones_like(total), total)
    return jax.tree.map(lambda size: size / total, sizes)


def movement(params: Params, *, grads: Any = None, **extra: Any) -> Scores:
    """How fast gradient descent moves each weight away from 0: `-w * g`, signed.

    Positive where a step of descent makes the weight larger, negative where it shrinks it. This is the score
    of one step. Movement pruning sums it over all steps: `jp.pruner(jp.scores.movement, ..., memory=1.0)`.

    Args:
      grads: the gradients of the loss at `params`, like `params`.

    Returns:
      Scores like `params`; float32 also for half-precision params.

    Raises:
      ValueError: `grads` is None, or does not mirror `params`.
      TypeError: a leaf is complex.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, grads = {"w": jnp.array([[3.0, -1.0]])}, {"w": jnp.array([[0.5, 2.0]])}
      >>> jp.scores.movement(params, grads=grads)["w"].tolist()
      [[-1.5, 2.0]]

    References:
      Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020. There masks are
      chosen anew at each step, so that a weight may come back; here pruned weights stay pruned.
    """
    del extra
    return jax.tree.map(jnp.negative, _products(params, grads, "movement"))


def _products(params: Params, grads: Any, name: str) -> Scores:
    """Compute `w * g` in float32 or float64, so that half precision does not round scores to ties."""
    grads = _needed(grads, params, name)
    for what, tree in (("params", params), ("grads", grads)):
        for path, leaf in array_leaves(tree, what).items():
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise TypeError(
                    f"{what}[{path!r}] is {describe(leaf)}; scores.{name} needs real leaves. For complex "
                    "leaves use scores.magnitude."
                )
    return map_leaves(lambda w, g: promote_to_float32(w) * promote_to_float32(g), params, grads)


def _needed(grads: Any, params: Params, name: str) -> Any:
    if grads is None:
        raise ValueError(
            f"scores.{name} needs gradients: pass grads=jax.grad(loss_fn)(params, batch), a tree like params."
        )
    by_path, leaves = array_leaves(grads, "grads"), flatten(params)
    for path, leaf in leaves.by_path.items():
        if path not in by_path and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            # A key or a count has no gradient; equinox leaves it out.
            by_path[path] = jnp.zeros(leaf.shape, jnp.float32)
    if by_path.keys() != leaves.by_path.keys():
        check_mirrors(grads, params, "grads")
    grads = leaves.tree(by_path)
    check_mirrors(grads, params, "grads")
    return grads
