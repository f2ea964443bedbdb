"""Scores of whole residual blocks, for `structures.layers`."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.graph.passing import inputs_and_outputs
from jaxprune.graph.residual import ResidualBlocks
from jaxprune.scores.common import with_nan_elsewhere
from jaxprune.tree.checks import as_integer, check_function, shown
from jaxprune.tree.dtypes import promote_to_float32
from jaxprune.tree.leaves import array_leaves
from jaxprune.typing import Params, ScoreFn, Scores


def block_influence(apply_fn: Callable[..., Any], blocks: ResidualBlocks, *, axis: int = -1) -> ScoreFn:
    """How much a residual block changes the direction of its input: `1 - mean_t cos(x_t, y_t)`.

    x_t is what the block is given at a position t of the batch, such as a token, and y_t what it passes on:
    the sum of x_t and its branches. Both are vectors along `axis`, in one call of the network with all of its
    blocks. A block that scores 0 only scales its input, and is the first to go. All entries of a block have
    its score, and `structures.layers(blocks)` takes their mean.

    Args:
      apply_fn: the function that the blocks were found in, `apply_fn(params, *batch)`.
      blocks: from `jaxprune.residual_blocks`, which knows where blocks begin and end. Also those of stacked
        layers.
      axis: the axis of the features in what passes from block to block.

    Returns:
      A score `score(params, *, batch, **extra)`, in [0, 2] and float32; NaN for leaves that are in no block.
      The batch is an array, or a tuple of the arguments of `apply_fn` after the params. If the params have
      other kernels, leave them out: `where=jaxprune.matching("blocks/*")`.

    Raises:
      TypeError: `apply_fn` is not a function, `blocks` are not from `residual_blocks`.
      ValueError: on use, `batch` is missing, blocks of another function or other params.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = [{"w": scale * jnp.array([[0.0, 1.0], [-1.0, 0.0]])} for scale in (0.5, 2.0, 0.1)]
      >>> def apply_fn(params, x):
      ...     for block in params:
      ...         x = x + x @ block["w"]  # by the angle atan(scale)
      ...     return x
      >>> x = jnp.ones((4, 2))
      >>> blocks = jp.residual_blocks(apply_fn, params, x, prefixes=["0", "1", "2"])
      >>> score = jp.scores.block_influence(apply_fn, blocks)
      >>> [round(float(block["w"][0, 0]), 3) for block in score(params, batch=x)]
      [0.106, 0.553, 0.005]
      >>> masks = jp.prune_once(params, score, count=1, structure=jp.structures.layers(blocks), batch=x)
      >>> [bool(block["w"].any()) for block in masks]
      [True, True, False]

    References:
      Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
      arXiv:2403.03853.
    """
    check_function(apply_fn, "scores.block_influence", "apply_fn(params, *batch)")
    if not isinstance(blocks, ResidualBlocks):
        raise TypeError(
            "block_influence needs blocks=jaxprune.residual_blocks(apply_fn, params, *inputs, prefixes=...), "
            f"which knows where blocks begin and end; got {shown(blocks)}."
        )
    axis = as_integer(axis, "axis", what="of features")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        if batch is None:
            raise ValueError("scores.block_influence needs data: pass batch=..., the inputs of apply_fn.")
        leaves = array_leaves(params)
        inputs = batch if isinstance(batch, tuple) else (batch,)
        found: dict[str, jax.Array] = {}
        pairs = inputs_and_outputs(apply_fn, params, inputs, blocks)
        for block, (given, passed) in zip(blocks, pairs, strict=True):
            influence = _change_of_direction(given, passed, axis)
            for path in block.paths:
                if not block.index:
                    found[path] = jnp.full(leaves[path].shape, influence)
                    continue
                every = found.setdefault(path, jnp.full(leaves[path].shape, jnp.nan, jnp.float32))
                place: list[Any] = [slice(None)] * every.ndim
                for along, number in zip(blocks.stacks[path], block.index, strict=True):
                    place[along] = number
                found[path] = every.at[tuple(place)].set(influence)
        return with_nan_elsewhere(found, params)

    return score


def _change_of_direction(given: jax.Array, passed: jax.Array, axis: int) -> jax.Array:
    """Return 1 minus the mean cosine: 1 of two zeros, 0 of a zero and another vector."""
    given, passed = (promote_to_float32(x) for x in (given, passed))
    sizes = [jnp.linalg.norm(x, axis=axis) for x in (given, passed)]
    product = jnp.sum(given * passed, axis=axis)
    area = operator.mul(*sizes)
    cosine = product / jnp.where(area == 0, jnp.ones_like(area), area)
    both_zero = (sizes[0] == 0) & (sizes[1] == 0)
    return (1 - jnp.mean(jnp.where(both_zero, 1, cosine))).astype(jnp.float32)
