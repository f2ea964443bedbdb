"""Scores: what matters. Each is one pure function; the entries with the lowest scores go.

A score is `score(params, *, grads, key, **extra) -> scores`, a tree like `params` whose leaves
are real numbers: larger means keep. A score takes what it needs and ignores the rest, so writing
a new one is writing a function:

```python
def distance_from_init(params, *, init_params, **_):
    return jax.tree.map(lambda w, w0: jnp.abs(w - w0), params, init_params)

masks = jp.prune_once(params, distance_from_init, sparsity=0.9, init_params=params_at_init)
```
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.paths import check_mirrors
from jaxprune.typing import Params, Scores


def magnitude(params: Params, **extra: Any) -> Scores:
    """The magnitude of each weight, `|w|`.

    Args:
      params: a pytree of arrays.
      **extra: ignored.

    Returns:
      Scores like `params`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.scores.magnitude({"w": jnp.array([[-3.0, 1.0]])})["w"].tolist()
      [[3.0, 1.0]]

    References:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015.
    """
    del extra
    return jax.tree.map(jnp.abs, params)


def gradient_magnitude(params: Params, *, grads: Any = None, **extra: Any) -> Scores:
    """The magnitude of each gradient, `|g|`.

    Args:
      params: a pytree of arrays.
      grads: the gradients of the loss, like `params`.
      **extra: ignored.

    Returns:
      Scores like `params`.

    Raises:
      ValueError: `grads` is None, or not like `params`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, grads = {"w": jnp.array([[3.0, 1.0]])}, {"w": jnp.array([[0.5, -2.0]])}
      >>> jp.scores.gradient_magnitude(params, grads=grads)["w"].tolist()
      [[0.5, 2.0]]

    References:
      Blalock et al., "What is the State of Neural Network Pruning?", MLSys 2020 (as a baseline).
    """
    del extra
    return jax.tree.map(lambda _, g: jnp.abs(g), params, _needed(grads, params, "gradient_magnitude"))


def taylor(params: Params, *, grads: Any = None, **extra: Any) -> Scores:
    """The change of the loss to first order if a weight is removed, `|w * g|`.

    Args:
      params: a pytree of arrays.
      grads: the gradients of the loss at `params`, like `params`.
      **extra: ignored.

    Returns:
      Scores like `params`.

    Raises:
      ValueError: `grads` is None, or not like `params`.

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
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, _needed(grads, params, "taylor"))


def random(params: Params, *, key: jax.Array | None = None, **extra: Any) -> Scores:
    """A uniform random number in [0, 1) for each weight: the control of every experiment.

    Args:
      params: a pytree of arrays.
      key: a PRNG key. Each leaf draws from its own key, folded in by leaf index.
      **extra: ignored.

    Returns:
      float32 scores like `params`.

    Raises:
      ValueError: `key` is None.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> scores = jp.scores.random({"w": jnp.ones((2, 3))}, key=jax.random.key(0))
      >>> scores["w"].shape
      (2, 3)
    """
    del extra
    if key is None:
        raise ValueError("scores.random needs a PRNG key: pass key=jax.random.key(0).")
    leaves, treedef = jax.tree.flatten(params)
    draws = [
        jax.random.uniform(jax.random.fold_in(key, index), leaf.shape, jnp.float32)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)


def _needed(grads: Any, params: Params, name: str) -> Any:
    if grads is None:
        raise ValueError(
            f"scores.{name} needs gradients: pass grads=jax.grad(loss_fn)(params, batch), a tree like params."
        )
    check_mirrors(grads, params, "grads")
    return grads
