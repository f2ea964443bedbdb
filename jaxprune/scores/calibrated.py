"""Scores from the weights and from statistics of what each layer reads.

`jaxprune.calibrate` runs the network on some batches and returns the statistics, which these scores take as
`stats=`:

```python
stats = jp.calibrate(apply_fn, params, batches)
masks = jp.prune_once(params, jp.scores.wanda, sparsity=0.5, scope="output", stats=stats)
```

Below, a kernel W multiplies inputs x: `y_i = sum_j W_ij x_j`. So j counts the entries along the contracted
axes of a leaf, those that its product sums over, and i all others, whatever the layout: (in, out) or
(out, in), convolutions, heads. Sums over samples are of all rows that the calibration saw: tokens, positions,
images.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.scores.common import with_nan_elsewhere
from jaxprune.tree.checks import check_number
from jaxprune.tree.dtypes import promote_to_float32
from jaxprune.tree.leaves import array_leaves, describe
from jaxprune.tree.paths import some_of
from jaxprune.tree.statistics import CALIBRATE, InputStatistics, check_statistics
from jaxprune.typing import Params, Scores


def wanda(params: Params, *, stats: InputStatistics | None = None, **extra: Any) -> Scores:
    """The magnitude of a weight times the norm of its input: `|W_ij| ||x_j||`.

    With `||x_j||^2 = sum_t x_tj^2` over all samples t. Setting `W_ij` to 0 changes the output i, over all
    samples, by exactly that, if all other weights of the output stay. The paper compares the weights of one
    output with each other: `scope="output"`.

    Args:
      stats: from `jaxprune.calibrate`; norms are enough. `prune_once` and `Pruner.update` pass it on.

    Returns:
      float32 scores like `params` (float64 for float64 leaves), NaN for leaves without statistics.

    Raises:
      ValueError: `stats` is None, or is of other params.
      TypeError: `stats` is not what `jaxprune.calibrate` returns, or a leaf is not an array.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> stats = jp.calibrate(apply_fn, params, [jnp.array([[3.0, 0.0], [4.0, 1.0]])])
      >>> jp.scores.wanda(params, stats=stats)["a"].tolist()  # the norms are 5 and 1
      [[5.0, 10.0], [0.5, 3.0]]
      >>> masks = jp.prune_once(params, jp.scores.wanda, sparsity=0.5, scope="output", stats=stats)
      >>> masks["a"].tolist()
      [[True, True], [False, False]]

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
      arXiv:2306.11695.
    """
    del extra

    def score(size: jax.Array, layer: _Layer) -> jax.Array:
        return size * jnp.sqrt(layer.read("squares"))

    return _calibrated("wanda", params, stats, score)


def ria(params: Params, *, stats: InputStatistics | None = None, power: float = 0.5, **extra: Any) -> Scores:
    """Relative importance and activations: `(|W_ij| / sum_k |W_ik| + |W_ij| / sum_k |W_kj|) ||x_j||^power`.

    The first sum is over the inputs of the output i, the second over the outputs that read the input j. A
    weight is thus compared with those beside it, and no input or output loses all of its weights because of
    its scale. A sum of 0 has weights of 0, which score 0.

    Args:
      stats: as for `wanda`.
      power: the exponent of the norm; 0 leaves the inputs out. The paper takes 0.5.

    Returns:
      float32 scores like `params` (float64 for float64 leaves), NaN for leaves without statistics.

    Raises:
      ValueError, TypeError: as `wanda`; a `power` that is not a number of 0 or more.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> stats = jp.calibrate(apply_fn, params, [jnp.array([[3.0, 0.0], [4.0, 1.0]])])
      >>> print(jp.scores.ria(params, stats=stats)["a"].round(1))
      [[2.2 2.4]
       [0.5 1.5]]

    References:
      Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
      ICLR 2024.
    """
    del extra
    check_number(power, "power", "of 0 or more, the exponent of the inputs' norms")
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be a finite number of 0 or more, got {power}.")

    def score(size: jax.Array, layer: _Layer) -> jax.Array:
        return layer.map_matrices(size, _relative_importance) * layer.read("squares") ** (power / 2)

    return _calibrated("ria", params, stats, score)


def flap(params: Params, *, stats: InputStatistics | None = None, **extra: Any) -> Scores:
    """How much a weight's input fluctuates: `Var(x_j) W_ij^2`, for whole inputs.

    An input that hardly changes can be replaced by its mean, which goes into the bias of the layer. What
    remains is its variance, `Var(x_j) = mean_t (x_tj - mean_t x_tj)^2`. Summed over outputs, by a structure
    with `norm=1`, the score of input j is that of the paper, `Var(x_j) ||W_:j||^2`: by
    `structures.slices(axis=-2)` of a kernel in x out, say. The mean has to be added to the bias afterwards.
    To rank the inputs of all layers together, the paper standardises the scores of each layer; here use
    `scope="layerwise"`.

    Args:
      stats: as for `wanda`.

    Returns:
      float32 scores like `params` (float64 for float64 leaves), NaN for leaves without statistics.

    Raises:
      ValueError, TypeError: as `wanda`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> stats = jp.calibrate(apply_fn, params, [jnp.array([[3.0, 0.0], [4.0, 1.0]])])
      >>> jp.scores.flap(params, stats=stats)["a"].tolist()  # both variances are 1/4
      [[0.25, 1.0], [0.0625, 2.25]]

    References:
      An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
      arXiv:2312.11983.
    """
    del extra

    def score(size: jax.Array, layer: _Layer) -> jax.Array:
        return size * size * layer.read("variance")

    return _calibrated("flap", params, stats, score)


def obs_diagonal(params: Params, *, stats: InputStatistics | None = None, **extra: Any) -> Scores:
    """The error of a layer after one weight is removed and all others adapt: `W_ij^2 / [H^-1]_jj`.

    `H = sum_t x_t x_t^T` is the Gram matrix of the inputs, damped as the statistics say. The least change of
    the layer's output, `||X (W - W')^T||^2`, with `W'_ij = 0` is exactly that. SparseGPT takes this score in
    each of its blocks, with H of the inputs that are still to come.

    Args:
      stats: from `jaxprune.calibrate(..., statistics="gram")`.

    Returns:
      float32 scores like `params` (float64 for float64 leaves), NaN for leaves without statistics.

    Raises:
      ValueError, TypeError: as `wanda`; statistics without Gram matrices.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> batch = jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> stats = jp.calibrate(apply_fn, params, [batch], statistics="gram")
      >>> print(jp.scores.obs_diagonal(params, stats=stats)["a"].round(1))
      [[11.  43.9]
       [ 0.1  4.4]]

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992;
      Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv:2301.00774.
    """
    del extra

    def score(size: jax.Array, layer: _Layer) -> jax.Array:
        return size * size / layer.read("inverse_diagonal")

    return _calibrated("obs_diagonal", params, stats, score, needs_gram=True)


class _Layer(NamedTuple):
    """A leaf that has statistics, and what its scores read of them.

    Attributes:
      path: the leaf.
      leaf: its values.
      stats: the statistics.
    """

    path: str
    leaf: Any
    stats: InputStatistics

    def read(self, what: str) -> jax.Array:
        """Return a statistic of the input that each entry multiplies, in the dtype of its score."""
        found = self.stats.per_entry(self.path, what)
        shape, known = self.leaf.shape, found.shape
        if len(known) != len(shape) or any(a not in (1, b) for a, b in zip(known, shape, strict=True)):
            raise ValueError(
                f"the statistics of {self.path!r} have the shape {known}, which does not fit "
                f"params[{self.path!r}], {describe(self.leaf)}. Calibrate the params that are pruned."
            )
        return found.astype(_size(self.leaf).dtype)

    def map_matrices(self, size: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Apply a function of (batch, outputs, inputs) to the matrices that products read."""
        self.read("rows")  # raises where shapes differ
        return self.stats.map_matrices(self.path, size, function).astype(size.dtype)


def _size(leaf: Any) -> jax.Array:
    return promote_to_float32(jnp.abs(leaf))


def _calibrated(
    name: str,
    params: Params,
    stats: InputStatistics | None,
    score: Callable[[jax.Array, _Layer], jax.Array],
    needs_gram: bool = False,
) -> Scores:
    """Return `score(|w|, layer)` of the leaves that have statistics, NaN for the others."""
    leaves = array_leaves(params)
    if stats is None:
        raise ValueError(f"scores.{name} needs statistics of what layers read: pass {CALIBRATE}.")
    check_statistics(stats)
    if needs_gram and stats.statistics != "gram":
        raise ValueError(
            f"scores.{name} needs Gram matrices, and the statistics are {stats.statistics!r}: pass "
            f"{CALIBRATE[:-1]}, statistics='gram')."
        )
    if missing := [path for path in stats.paths if path not in leaves]:
        raise ValueError(
            f"the statistics are of {some_of(missing)}, which the params do not have. The params have "
            f"{some_of(leaves)}. Calibrate the params that are pruned."
        )
    layers = [_Layer(path, leaves[path], stats) for path in stats.paths]
    return with_nan_elsewhere({layer.path: score(_size(layer.leaf), layer) for layer in layers}, params)


def _relative_importance(size: jax.Array) -> jax.Array:
    """Return each number's share in the sum of its row plus that of its column; 0 where a sum is 0."""

    def share(axis: int) -> jax.Array:
        total = jnp.sum(size, axis=axis, keepdims=True)
        return size / jnp.where(total == 0, jnp.ones_like(total), total)

    return share(-1) + share(-2)
