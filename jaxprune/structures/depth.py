"""Whole residual blocks as units: depth pruning."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.residual import Block, Prefixes, ResidualBlocks, check_blocks, find_blocks
from jaxprune.structures.base import Norm, Structure, Units, reducer
from jaxprune.tree.checks import check_function
from jaxprune.tree.host import like_computed, on_host
from jaxprune.tree.paths import prefix_to, some_of
from jaxprune.tree.programs import map_compiled
from jaxprune.tree.sharding import everywhere
from jaxprune.tree.stacks import Stacked, Stacks


def layers(
    blocks: ResidualBlocks | Prefixes | None = None,
    norm: Norm = jnp.mean,
    reduce: Callable[..., jax.Array] = jnp.mean,
    *,
    stacked: Stacked | None = None,
) -> Structure:
    """Prune whole residual blocks: a unit is all leaves of a block, or one layer of all stacked leaves.

    The score of a block is `reduce` over its leaves of `norm` over the entries of each,

        `score = mean over leaves l of (mean over i of s_l[i])`

    by default, so that a large leaf counts no more than a small one, and already pruned entries count as
    0; `norm=jnp.sum, reduce=jnp.sum` is the sum of all scores, of `scores.taylor` say. Only the leaves
    that the pruner's `where` takes in give scores. Pruning a block masks all of its leaves, biases and
    norms included, except for those that `residual_blocks` marks as divisors. A sparsity, a count and
    `floor` count blocks, at least one block stays by default, and a dict of targets goes by pool:
    `"layers"`, the keys of a dict of prefixes, or `"stacked"` beside a list called `"layers"`.

    Args:
      blocks: from `residual_blocks`, which proves that each is the identity when its leaves are zero; or,
        unchecked, a path prefix per block, `["blocks/0", "blocks/1"]`, as `residual_blocks` takes them.
        A block that is not the identity cuts the network.
      norm: the order of the norm within a leaf, or a reduction such as `jnp.mean` or `jnp.sum`.
      reduce: `reduce(array, axis=0)` of leaves x blocks.
      stacked: `stacked(path, leaf)`, for layers stacked in one leaf: how many leading axes count layers
        (0 for none), or which axes do. All stacked leaves have the same number of layers.

    Raises:
      ValueError: no blocks; on use, a prefix that no leaf has, or twice, or inside another, stacked leaves
        with different numbers of layers, a block of which `where` takes in no leaf.
      TypeError: `blocks` holds neither blocks nor prefixes, `reduce` or `stacked` is not a function,
        `stacked` is given beside checked blocks.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"blocks": [{"kernel": jnp.full((2, 2), w), "bias": jnp.ones(2)} for w in (3.0, 1.0, 2.0)]}
      >>> structure = jp.structures.layers(["blocks/0", "blocks/1", "blocks/2"])
      >>> masks = jp.prune_once(params, jp.scores.magnitude, count=1, structure=structure)
      >>> [bool(block["bias"].all()) for block in masks["blocks"]]
      [True, False, True]

    References:
      Elhoushi et al., "LayerSkip", ACL 2024, and Men et al., "ShortGPT", arXiv:2403.03853, drop whole
      layers; the second ranks them by how much a layer changes its input: `scores.block_influence`.
    """
    check_function(reduce, "reduce=", "of stacked scores and an axis, such as jnp.mean")
    reducer(norm)  # raises if it is none
    checked, prefixes = (blocks, None) if isinstance(blocks, ResidualBlocks) else (None, blocks)
    if checked is not None and stacked is not None:
        raise TypeError("layers takes stacked= beside prefixes; residual_blocks has read its own already.")
    if checked is None:
        check_blocks(prefixes, stacked)

    def found(leaves: Mapping[str, Any]) -> tuple[dict[str, list[Block]], Stacks]:
        """Find the blocks of each pool among some leaves, and the stacks."""
        if checked is None:
            given, stacks = find_blocks(leaves, prefixes, stacked)
        else:
            given, stacks = list(checked.blocks), checked.stacks
            _check_paths(checked, leaves)
        pools: dict[str, list[Block]] = {}
        for block in given:
            pools.setdefault(block.pool, []).append(block)
        return pools, stacks

    def pool(scores: dict[str, jax.Array], masks: dict[str, jax.Array]) -> Units:
        pools, stacks = found(masks)
        fixed = checked.fixed if checked is not None else frozenset[str]()
        rows = {
            name: [_Rows(members[0], stacks)] if members[0].index else [_Rows(b, stacks) for b in members]
            for name, members in pools.items()
        }
        pooled = _pooled(rows, scores, masks, norm, reduce)
        alive = {
            name: everywhere(_joined([row.alive(masks, fixed) for row in of_pool]))
            for name, of_pool in rows.items()
        }

        def expand(keep: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            entries: dict[str, jax.Array] = {}
            for name, members in pools.items():
                kept: Any = np.asarray(keep[name]) if on_host(keep[name]) else keep[name]
                if members[0].index:
                    entries |= _Rows(members[0], stacks).expand(kept, masks, fixed)
                    continue
                for place, block in enumerate(members):
                    entries |= _Rows(block, stacks).expand(kept[place : place + 1], masks, fixed)
            return entries

        return Units(pooled, alive, expand)

    def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
        leaves = {path: jax.ShapeDtypeStruct(shape, jnp.bool_) for path, shape in shapes.items()}
        pools, stacks = found(leaves)
        return {
            name: _Rows(members[0], stacks).count(leaves) if members[0].index else len(members)
            for name, members in pools.items()
        }

    weights = checked.weights if checked is not None else {}
    return Structure(pool, name="layers()", spans_leaves=True, sizes_of=sizes_of, weights=weights, stacks={})


class _Rows:
    """The leaves of one block, or of all layers of a stack, with one row of each leaf for each block."""

    def __init__(self, block: Block, stacks: Stacks):
        self.block = block
        self.axes = {path: stacks[path] if block.index else () for path in block.paths}

    def count(self, leaves: Mapping[str, Any]) -> int:
        """Return the number of blocks."""
        path = self.block.paths[0]
        size = 1
        for axis in self.axes[path]:
            size *= leaves[path].shape[axis]
        return size

    def scoring(self, scores: Mapping[str, jax.Array]) -> list[str]:
        """Return the paths of the leaves that give scores."""
        paths = [path for path in self.block.paths if path in scores]
        if not paths:
            raise ValueError(
                f"where= takes in no leaf of the block {self.block.name!r}, so it has no score. Its leaves "
                f"are {some_of(self.block.paths)}."
            )
        return paths

    def alive(self, masks: Mapping[str, jax.Array], fixed: frozenset[str]) -> jax.Array:
        """Return, for each block, whether anything is left that pruning it would remove."""
        paths = [path for path in self.block.paths if path not in fixed and path not in self.block.divisors]
        if not paths:
            return like_computed(np.ones(self.count(masks), bool))
        leaves = [masks[path] for path in paths]
        if on_host(leaves):
            each = [_by_block(self.axes[p], np.asarray(masks[p]), _any, np) for p in paths]
            return like_computed(np.any(each, axis=0), *leaves)
        each = [_by_block(self.axes[path], masks[path], _any) for path in paths]
        return jnp.any(jnp.stack(each), axis=0)

    def expand(
        self, keep: jax.Array, masks: Mapping[str, jax.Array], fixed: frozenset[str]
    ) -> dict[str, jax.Array]:
        """Return the masks of the leaves, from which blocks stay."""
        entries = {}
        for path in self.block.paths:
            if path in fixed or path in self.block.divisors:
                continue
            shape, axes = masks[path].shape, self.axes[path]
            xp: Any = np if isinstance(keep, np.ndarray) else jnp
            along = xp.reshape(keep, tuple(shape[axis] for axis in axes))
            along = xp.transpose(along, [axes.index(axis) for axis in sorted(axes)])
            others = [axis for axis in range(len(shape)) if axis not in axes]
            mask = xp.broadcast_to(xp.expand_dims(along, others), shape)
            entries[path] = like_computed(np.array(mask)) if xp is np else mask
        return entries


def _pooled(
    rows: Mapping[str, Sequence[_Rows]],
    scores: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    norm: Norm,
    reduce: Callable[..., jax.Array],
) -> dict[str, jax.Array]:
    """Return, by pool, the scores of its blocks."""
    every = [
        (row.axes[path], path) for of_pool in rows.values() for row in of_pool for path in row.scoring(scores)
    ]
    static = [(axes, norm) for axes, _ in every]
    norms = iter(map_compiled(_norms_by_block, static, [(scores[path], masks[path]) for _, path in every]))
    each = [[[next(norms) for _ in row.scoring(scores)] for row in of_pool] for of_pool in rows.values()]
    pooled = map_compiled(_scores_of_blocks, [(reduce,)] * len(each), [(of_pool,) for of_pool in each])
    return dict(zip(rows, pooled, strict=True))


def _norms_by_block(axes: tuple[int, ...], norm: Norm, scores: jax.Array, mask: jax.Array) -> jax.Array:
    return _by_block(axes, jnp.where(mask, scores, 0), reducer(norm))


def _scores_of_blocks(reduce: Callable[..., jax.Array], rows: Sequence[Sequence[jax.Array]]) -> jax.Array:
    return everywhere(jnp.concatenate([reduce(jnp.stack(each), axis=0) for each in rows]))


def _by_block(axes: tuple[int, ...], leaf: Any, reduce: Callable[..., Any], xp: Any = jnp) -> Any:
    """Reduce the entries of a leaf to one number for each block, along `axes`."""
    front = xp.moveaxis(leaf, axes, range(len(axes)))
    return xp.reshape(reduce(front, tuple(range(len(axes), leaf.ndim))), -1)


def _any(entries: Any, axes: tuple[int, ...]) -> Any:
    return entries.any(axis=axes)


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    """Lay vectors end to end."""
    if on_host(parts):
        return like_computed(np.concatenate(parts), *parts)
    return jnp.concatenate(parts)


def _check_paths(blocks: ResidualBlocks, leaves: Mapping[str, Any]) -> None:
    """Check that the params have the leaves of the blocks."""
    if missing := [path for path in blocks.shapes if path not in leaves]:
        prefix = prefix_to(blocks.shapes, leaves)
        advice = (
            "Call residual_blocks with the params that are pruned."
            if prefix is None
            else f"The blocks' tree holds these params under {prefix!r}: pass blocks.under({prefix!r})."
        )
        raise ValueError(
            f"the blocks have leaves at {some_of(missing)}, which the params do not have. {advice}"
        )
