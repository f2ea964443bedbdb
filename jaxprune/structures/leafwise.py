"""Structures whose units each lie in one leaf: entries, slices, blocks, N:M groups."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.selection.sort_keys import ordered_bits
from jaxprune.structures.base import Norm, Structure, Units, reducer
from jaxprune.tree.checks import as_integer, shown
from jaxprune.tree.sharding import check_whole, join, split


class _LeafUnits(NamedTuple):
    """`Units` of one leaf."""

    scores: jax.Array
    alive: jax.Array
    expand: Callable[[jax.Array], jax.Array]


def _leafwise(
    pool_leaf: Callable[[str, jax.Array, jax.Array], _LeafUnits],
    name: str,
    max_sparsity: float = 1.0,
    keeps_axes: bool = False,
) -> Structure:
    """Return a structure whose units each lie in one leaf: `pool_leaf(path, scores, mask)`."""

    def pool(scores, masks):
        leaves = {path: pool_leaf(path, scores[path], masks[path]) for path in scores}
        return Units(
            scores={path: leaf.scores for path, leaf in leaves.items()},
            alive={path: leaf.alive for path, leaf in leaves.items()},
            expand=lambda keep: {path: leaf.expand(keep[path]) for path, leaf in leaves.items()},
        )

    return Structure(pool, max_sparsity, name, keeps_axes=keeps_axes)


def elements() -> Structure:
    """Prune single entries: unstructured pruning, the default.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
      >>> masks["kernel"].tolist()
      [[True, False], [False, True]]
    """
    return Structure(
        lambda scores, masks: Units(scores, masks, dict), name="elements()", elementwise=True, keeps_axes=True
    )


def slices(axis: int | Sequence[int] = -1, norm: Norm = 1) -> Structure:
    """Prune whole slices along an axis: neurons, filters, rows, columns, conv kernels.

    The unit at index i is everything at index i of the axis. Its score is the norm of its
    scores, `(sum |s|^n)^(1/n)`; already pruned entries count as 0. With flax's layouts (dense:
    in x out; conv: height x width x in x out) `axis=-1` is the output neuron or filter, `axis=-2`
    the input, `axis=(-2, -1)` the single 2-d kernels of a convolution.

    Args:
      axis: the axis, or axes, that index the units.
      norm: the order n of the norm (any number, also 0, `inf` and `-inf`), or a reduction
        `norm(scores, axis=axes)` such as `jnp.sum` or `jnp.mean`, which keeps signs.

    Returns:
      A `Structure`. A count or a sparsity of it is one of slices.

    Raises:
      ValueError: on use, for a leaf that has no such axis.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[1.0, 5.0, 2.0], [1.0, 5.0, -2.0]])}
      >>> columns = jp.structures.slices(axis=-1, norm=2)
      >>> jp.prune_once(params, jp.scores.magnitude, count=2, structure=columns)["kernel"].tolist()
      [[False, True, False], [False, True, False]]

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (norm=1).
    """
    several = isinstance(axis, (tuple, list))
    axes = tuple(as_integer(each, "axis", what="or several") for each in (axis if several else (axis,)))
    reduce = reducer(norm)
    name = f"slices(axis={axes if several else axes[0]})"

    def pool_leaf(path, scores, mask):
        kept = _axes(path, scores, axes, name)
        reduced = tuple(a for a in range(scores.ndim) if a not in kept)
        return _LeafUnits(
            reduce(jnp.where(mask, scores, 0), reduced),
            jnp.any(mask, axis=reduced),
            lambda keep: jnp.broadcast_to(jnp.expand_dims(keep, reduced), scores.shape),
        )

    return _leafwise(pool_leaf, name)


def blocks(shape: Sequence[int], axes: Sequence[int] | None = None, norm: Norm = 1) -> Structure:
    """Prune rectangular blocks of entries, which tile the given axes from index 0.

    Where a block's side does not divide its axis, the blocks at the far edge are smaller. Other
    axes are not tiled: each index of them has separate blocks.

    Args:
      shape: the sides of a block.
      axes: the axes they lie along; by default the last `len(shape)`.
      norm: as in `slices`; what lies beyond the edge counts as 0. A norm of order 1 to infinity
        (without infinity) makes smaller blocks smaller; `jnp.max` does not.

    Returns:
      A `Structure`. A count or a sparsity of it is one of blocks.

    Raises:
      ValueError: a side below 1, or sides and axes of different number; on use, a leaf with no
        such axis, or one that is known to be sharded through blocks.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]])}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, count=1, structure=jp.structures.blocks((2, 2)))
      >>> masks["kernel"].tolist()
      [[False, False, True], [False, False, True]]
    """
    if not isinstance(shape, (tuple, list)) or not shape:
        raise TypeError(f"blocks needs shape=, a tuple of the sides of a block, got {shown(shape)}.")
    sides = tuple(as_integer(side, "shape", at_least=1, what="each side of a block") for side in shape)
    along = tuple(range(-len(sides), 0)) if axes is None else tuple(as_integer(a, "axes") for a in axes)
    if len(along) != len(sides):
        raise ValueError(f"blocks needs one axis per side, got shape={sides} and axes={along}.")
    reduce = reducer(norm)
    name = f"blocks({sides})"

    def pool_leaf(path, scores, mask):
        side = dict(zip(_axes(path, scores, along, name), sides, strict=True))
        check_whole(path, scores, side, name)
        beyond = [-size % side.get(axis, 1) for axis, size in enumerate(scores.shape)]
        # Each tiled axis becomes two: which block, and where within it (reduced away).
        within = tuple(axis + 1 + number for number, axis in enumerate(sorted(side)))

        def tile(array):
            return split(jnp.pad(array, [(0, pad) for pad in beyond]), side)

        def expand(keep):
            tiles = jnp.broadcast_to(jnp.expand_dims(keep, within), inside.shape)
            return join(tiles, within)[tuple(slice(size) for size in scores.shape)]

        inside = tile(mask)
        pooled = reduce(jnp.where(inside, tile(scores), 0), within)
        return _LeafUnits(pooled, jnp.any(inside, axis=within), expand)

    return _leafwise(pool_leaf, name, keeps_axes=True)._replace(tiles=dict(zip(along, sides, strict=True)))


def nm(n: int, m: int, axis: int | None = None) -> Structure:
    """Prune to N:M sparsity: in every group of m neighbours along an axis, the n highest stay.

    The unit is a group, and pruning it leaves its n highest entries. Its score is the sum of the
    m - n lowest, which is what pruning it costs. A sparsity is one of entries, so `1 - n/m` prunes every
    group, and a schedule that rises to it turns one group after another from dense to n:m.
    With `of="remaining"` it is a fraction of what the groups that are still dense can give. A count is
    one of groups. If scores in a group are equal, the entry at the lower index goes.

    Args:
      n: how many entries of a group stay, 1 or more.
      m: the size of a group, above n.
      axis: the axis of the groups: the *input* (reduction) axis, as sparse tensor cores need. By
        default the axis that the leaf's product sums over, whatever the layout, where `stats=` is passed (the
        last such axis; the input channels of a convolution). Without `stats=` the default is -2, where flax's
        dense and conv kernels have it; pass -1 for equinox and torch layouts.

    Raises:
      ValueError: not integers 0 < n < m; on use, a leaf whose axis m does not divide, one that
        is known to be sharded through groups, or with `stats=` an `axis` that the product does not sum over.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[1.0], [-4.0], [3.0], [2.0]])}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=jp.structures.nm(2, 4))
      >>> masks["kernel"].ravel().tolist()
      [False, True, True, False]

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378 (2:4).
    """
    n, m = (
        as_integer(each, name, at_least=1, what="of every m entries n stay")
        for name, each in (("n", n), ("m", m))
    )
    axis = None if axis is None else as_integer(axis, "axis")
    if not n < m:
        raise ValueError(f"nm needs integers 0 < n < m (n of every m entries stay), got n={n}, m={m}.")

    def along(axes: Mapping[str, int]) -> Structure:
        return _nm_along(n, m, axis, tuple(axes.items()))

    return _nm_along(n, m, -2 if axis is None else axis)._replace(along=along, n_of_m=(n, m, axis))


@lru_cache(maxsize=64)  # a program compiled for a structure is found again by its function
def _nm_along(n: int, m: int, axis: int | None, axes: tuple[tuple[str, int], ...] | None = None) -> Structure:
    """Return N:M groups along one axis of every leaf, or, by leaf, along the axes that products sum over."""
    by_path = None if axes is None else dict(axes)
    name = f"nm({n}, {m})" if axis is None else f"nm({n}, {m}, axis={axis})"

    def axis_of(path: str, leaf: jax.Array) -> int:
        if by_path is None:
            assert axis is not None
            return _axes(path, leaf, (axis,), name)[0]
        if axis is not None and _axes(path, leaf, (axis,), name)[0] != by_path[path]:
            raise ValueError(
                f"{name} on params[{path!r}] of shape {tuple(leaf.shape)}: its product sums over axis "
                f"{by_path[path]}, and N:M groups lie along that axis. Leave out axis=, or pass no stats=."
            )
        return by_path[path]

    def pool_leaf(path, scores, mask):
        along = axis_of(path, scores)
        size = scores.shape[along]
        if size % m:
            raise ValueError(
                f"{name} on params[{path!r}] of shape {tuple(scores.shape)}: its axis "
                f"{along if axis is None else axis} has size "
                f"{size}, which {m} does not divide. Leave the leaf out with where=..., or choose "
                "another axis or group."
            )
        check_whole(path, scores, {along: m}, name)
        stays, cost, dense = _groups(scores, mask, n, m, along)

        def expand(keep):
            return join(stays | jnp.expand_dims(keep, along + 1), (along + 1,))

        return _LeafUnits(cost, dense, expand)

    return _leafwise(pool_leaf, name, max_sparsity=1 - n / m, keeps_axes=True)


@partial(jax.jit, static_argnames=("n", "m", "axis"))
def _groups(
    scores: jax.Array, mask: jax.Array, n: int, m: int, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find what pruning each group of m entries along an axis would remove.

    Returns:
      The entries that would stay, with the axis split in two: which group, and where within it; for each
      group the sum of the entries that would go; and whether there are any.
    """
    grouped, inside = split(scores, {axis: m}), split(mask, {axis: m})
    # `before` counts the entries of the group that go before an entry: the pruned, the lower, and the equal
    # at a lower index. That orders the group strictly, so exactly the m - n first entries go, of which the
    # pruned are the first of all. The m * m comparisons fuse into one pass, where a sort would not; they are
    # of bits, so that NaN ranks highest here too.
    within = axis + 1
    keys = ordered_bits(grouped)
    mine, other = jnp.expand_dims(keys, within + 1), jnp.expand_dims(keys, within)
    index = lax.broadcasted_iota(jnp.int32, mine.shape, within)
    other_index = lax.broadcasted_iota(jnp.int32, other.shape, within + 1)
    lower = (other < mine) | ((other == mine) & (other_index < index))
    before = jnp.sum(lower | ~jnp.expand_dims(inside, within), axis=within + 1, dtype=jnp.int32)
    stays = inside & (before >= m - n)
    cost = jnp.sum(jnp.where(inside & ~stays, grouped, 0), axis=within)
    return stays, cost, jnp.sum(inside, axis=within, dtype=jnp.int32) > n


def _axes(path: str, leaf: jax.Array, axes: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return the axes counted from 0, checked against a leaf."""
    if any(not -leaf.ndim <= a < leaf.ndim for a in axes):
        raise ValueError(
            f"{name} on params[{path!r}] of shape {tuple(leaf.shape)}: it has no axis among {axes}. "
            "Leave the leaf out with where=..., or choose another axis."
        )
    counted = tuple(a % leaf.ndim for a in axes)
    if len(set(counted)) < len(counted):
        raise ValueError(f"{name} on params[{path!r}]: axes {axes} name one axis twice.")
    return counted
