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
from typing import Any

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

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
      arXiv:2306.11695.
    """
    del extra

    def score(path: str, size: jax.Array, stats: InputStatistics) -> jax.Array:
        return size * jnp.sqrt(stats.per_entry(path, "squares")).astype(size.dtype)

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
      float32 scores like `params` (float64 for float64 leaves), NaN for leaves without statistics. In a
      grouped convolution, where each output reads inputs of its own, the second sum has one term.

    Raises:
      ValueError, TypeError: as `wanda`; a `power` that is not a number of 0 or more.

    References:
      Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
      ICLR 2024.
    """
    del extra
    check_number(power, "power", "of 0 or more, the exponent of the inputs' norms")
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be a finite number of 0 or more, got {power}.")

    def score(path: str, size: jax.Array, stats: InputStatistics) -> jax.Array:
        squares = stats.per_entry(path, "squares")
        inputs = tuple(stats.contracted_axes(path))
        apart = {*inputs, *stats.stacks.get(path, ())}
        # An axis along which the inputs differ is one of batches, such as experts, and not of outputs.
        outputs = tuple(a for a in range(size.ndim) if a not in apart and squares.shape[a] == 1)
        relative = _share(size, inputs) + _share(size, outputs)
        return relative * (squares ** (power / 2)).astype(size.dtype)

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

    References:
      An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
      arXiv:2312.11983.
    """
    del extra

    def score(path: str, size: jax.Array, stats: InputStatistics) -> jax.Array:
        return size * size * stats.per_entry(path, "variance").astype(size.dtype)

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

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992;
      Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv:2301.00774.
    """
    del extra

    def score(path: str, size: jax.Array, stats: InputStatistics) -> jax.Array:
        return size * size / stats.per_entry(path, "inverse_diagonal").astype(size.dtype)

    return _calibrated("obs_diagonal", params, stats, score, needs_gram=True)


def _calibrated(
    name: str,
    params: Params,
    stats: InputStatistics | None,
    score: Callable[[str, jax.Array, InputStatistics], jax.Array],
    needs_gram: bool = False,
) -> Scores:
    """Return `score(path, |w|, stats)` of the leaves that have statistics, NaN for the others."""
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

    def scored(path: str) -> jax.Array:
        leaf = leaves[path]
        size = promote_to_float32(jnp.abs(leaf))
        known = jnp.shape(stats.per_entry(path, "rows"))
        if len(known) != leaf.ndim or any(a not in (1, b) for a, b in zip(known, leaf.shape, strict=True)):
            raise ValueError(
                f"the statistics of {path!r} have the shape {known}, which does not fit params[{path!r}], "
                f"{describe(leaf)}. Calibrate the params that are pruned."
            )
        return score(path, size, stats)

    return with_nan_elsewhere({path: scored(path) for path in stats.paths}, params)


def _share(size: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return each number's share in the sum along some axes; 0 where that is 0."""
    total = jnp.sum(size, axis=axes, keepdims=True)
    return size / jnp.where(total == 0, jnp.ones_like(total), total)
