"""LoRA on a pruned network: low-rank adapters that are merged without touching its zeros.

An adapter of a matrix W, of shape (m, n), is two thin matrices A (m, rank) and B (rank, n), trained while W
stays fixed. Added to W, their product would fill the entries that were pruned. So it is added under the mask,
in training as well as at the end:

    where(mask, W + scale * A B, 0)

The network that was trained is then the network that is merged: pruned entries are exactly 0 in both, and no
entry that the loss has not seen is dropped. B starts at 0, so training starts from the pruned network.

```python
adapters = jp.lora.init(params, 8, key=jax.random.key(0))

def loss_fn(adapters, batch):
    return task_loss(jp.lora.merge(params, adapters, masks, scale=2.0), batch)

# ... train the adapters alone, with any optimizer, then merge them once and for all:
params = jp.lora.merge(params, adapters, masks, scale=2.0)
```

The optimizer's state is that of the adapters. To train biases or norms beside them, differentiate with
respect to those leaves too: only the leaves that have an adapter get no gradient.

References:
  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
  Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv:2312.15230, 2023:
  adapters of pruned networks that are masked in training, and so can be merged.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.tree.checks import as_integer, check_key, check_params, scalar, shown
from jaxprune.tree.dtypes import common_dtype
from jaxprune.tree.leaves import describe, flatten, is_array
from jaxprune.tree.masks import masked, masks_by_path
from jaxprune.tree.paths import some_of
from jaxprune.tree.where import kernels, selected_among
from jaxprune.typing import Masks, Params, Where

__all__ = ["Adapter", "init", "merge"]


class Adapter(NamedTuple):
    """The two factors of what is added to a leaf.

    Attributes:
      a: (..., m, rank), for a leaf of shape (..., m, n).
      b: (..., rank, n).
    """

    a: jax.Array
    b: jax.Array


def init(params: Params, rank: int, *, where: Where = kernels, key: jax.Array) -> dict[str, Adapter]:
    """Draw adapters whose product is 0: `a ~ Normal(0, 1/m)`, and `b = 0`.

    The last two axes of a leaf are its matrix, in either order of inputs and outputs. Axes before them, of
    layers that are stacked or of the places of a convolution, have a matrix each. So it is for a leaf of
    attention of shape (inputs, heads, dim) as well: adapt it in a function of the params that reshapes it.

    Args:
      params: a pytree of arrays.
      rank: the rank of each product.
      where: which leaves get an adapter, a function of (path, leaf).
      key: a PRNG key. Each leaf draws with the key folded with its index.

    Returns:
      A dict from leaf path to `Adapter`, in float32, or float64 or complex as the leaf.

    Raises:
      ValueError: `where` matches nothing or a leaf with less than two axes, or an adapter would have more
        entries than its leaf.
      TypeError: a leaf that `where` matches is not floating-point, or `key` is not a PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"layers": {"kernel": jnp.ones((2, 16, 32))}, "bias": jnp.ones(32)}  # two layers, stacked
      >>> a, b = jp.lora.init(params, 4, key=jax.random.key(0))["layers/kernel"]
      >>> a.shape, b.shape, float(abs(a @ b).max())
      ((2, 16, 4), (2, 4, 32), 0.0)
    """
    check_params(params, "lora.init(params, rank, key=...)")
    rank = as_integer(rank, "rank", at_least=1)
    check_key(key, "lora.init")
    leaves = flatten(params).by_path
    chosen = set(selected_among(leaves, where))

    def draw(index: int, path: str) -> Adapter:
        leaf = leaves[path]
        if len(leaf.shape) < 2:
            raise ValueError(
                f"params[{path!r}] is {describe(leaf)}, and an adapter needs a matrix. Leave it out with "
                "where=..., and train it beside the adapters."
            )
        *lead, m, n = leaf.shape
        if rank * (m + n) > m * n:
            raise ValueError(
                f"An adapter of rank {rank} has more entries, {rank} x ({m} + {n}) for each matrix, than "
                f"params[{path!r}], {describe(leaf)}, has. Lower the rank, or leave it out with where=..."
            )
        dtype = common_dtype(leaf.dtype, jnp.float32)
        a = jax.random.normal(jax.random.fold_in(key, index), (*lead, m, rank), dtype) / math.sqrt(m)
        return Adapter(a, jnp.zeros((*lead, rank, n), dtype))

    return {path: draw(index, path) for index, path in enumerate(leaves) if path in chosen}


def merge(
    params: Params,
    adapters: Mapping[str, Adapter],
    masks: Masks | None = None,
    *,
    scale: float | jax.Array,
) -> Params:
    """Add the products of the adapters to the entries that the masks keep.

        where(mask, p + scale * (a @ b), 0)

    It is computed in the wider of the two dtypes, and rounded once, to that of the leaf. A leaf that has an
    adapter gets no gradient; the adapter gets none from pruned entries.

    Call it in the loss, and after the training with the same masks and scale: outputs and losses are then
    those of the training.

    Args:
      params: a pytree of arrays.
      adapters: from `init`, trained or not.
      masks: bool masks like `params`, packed or not; None for a network that is not pruned.
      scale: a number, or a traced scalar; the paper's `alpha / rank`.

    Returns:
      A tree like `params`, of the same dtypes; pruned entries are exactly 0, those of leaves without an
      adapter too. What else these leaves hold is unchanged.

    Raises:
      ValueError: an adapter fits no leaf, the trees or shapes differ, or `scale` is not finite.
      TypeError: `adapters` is not a dict of `Adapter`, a leaf with one is not floating-point, or a mask is
        not bool.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> masks = {"kernel": params["kernel"] != 0}
      >>> adapters = {"kernel": jp.lora.Adapter(jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0]]))}
      >>> jp.lora.merge(params, adapters, masks, scale=0.5)["kernel"].tolist()
      [[1.5, 0.0], [0.0, 2.0]]
    """
    leaves = flatten(params)
    value = scalar(scale, "scale")
    if value is not None and not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}.")
    _check_adapters(adapters, leaves.by_path)
    merged = dict(leaves.by_path)
    for path, adapter in adapters.items():
        merged[path] = _sum(lax.stop_gradient(merged[path]), adapter, scale if value is None else value)
    if masks is not None:
        kept = masks_by_path(masks, params, leaves)
        merged = {path: masked(leaf, kept[path]) for path, leaf in merged.items()}
    return leaves.tree(merged)


def _sum(leaf: Any, adapter: Adapter, scale: Any) -> jax.Array:
    """Return `leaf + scale * a @ b`, rounded once."""
    dtype = common_dtype(leaf.dtype, adapter.a.dtype, adapter.b.dtype)
    a, b = (jnp.asarray(factor).astype(dtype) for factor in adapter)
    # Without `precision` a TPU multiplies in bfloat16: merged elsewhere, it would be another network.
    product = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return (jnp.asarray(leaf).astype(dtype) + jnp.asarray(scale).astype(dtype) * product).astype(leaf.dtype)


def _check_adapters(adapters: Any, leaves: Mapping[str, Any]) -> None:
    """Check that adapters are a dict of pairs of arrays that fit the leaves."""
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must be a dict from leaf path to Adapter, got {shown(adapters)}.")
    if not adapters:
        raise ValueError("adapters is an empty dict, so nothing would be merged.")
    for path, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapters[{path!r}] must be a jaxprune.lora.Adapter, got {shown(adapter)}.")
        if path not in leaves:
            raise ValueError(f"adapters[{path!r}] fits no leaf of params. The leaves are: {some_of(leaves)}.")
        for name, factor in adapter._asdict().items():
            if not is_array(factor) or not jnp.issubdtype(factor.dtype, jnp.inexact):
                got = describe(factor) if is_array(factor) else shown(factor)
                raise TypeError(f"adapters[{path!r}].{name} must be a floating-point array, got {got}.")
        leaf, (a, b) = leaves[path], adapter
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"params[{path!r}] is {describe(leaf)}; only floating-point (or complex) leaves can have an "
                "adapter."
            )
        shape = tuple(leaf.shape)
        rank = a.shape[-1] if a.shape else 0
        fits = a.shape == (*shape[:-1], rank) and b.shape == (*shape[:-2], rank, *shape[-1:])
        if len(shape) < 2 or not fits:
            raise ValueError(
                f"adapters[{path!r}] of shapes {tuple(a.shape)} and {tuple(b.shape)} does not fit "
                f"params[{path!r}] of shape {shape}: of a leaf (..., m, n) they are (..., m, rank) and "
                "(..., rank, n)."
            )
