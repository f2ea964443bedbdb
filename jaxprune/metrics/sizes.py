"""How many entries are left, and what that is of the whole."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arguments import check_number
from jaxprune.dtypes import is_numeric
from jaxprune.masks import unpack_masks
from jaxprune.paths import array_leaves, check_where, is_array, is_concrete, kernels, selected
from jaxprune.typing import Masks, Params, Where


class Sparsity(NamedTuple):
    """A fraction or a ratio, of what may be pruned and of everything; floats (arrays under `jit`).

    Attributes:
      prunable: of the entries of the leaves that take part.
      model: of all entries, biases and norms included.
    """

    prunable: Any
    model: Any


def sparsity(tree: Params | Masks, where: Where = kernels) -> Sparsity:
    """The fraction of entries that are pruned (False) or exactly zero.

    `sparsity = 1 - nonzeros / size`, counted in integers on the host; under `jit` in float32.

    Args:
      tree: masks, or params, or one array, all of which counts as prunable then.
      where: which leaves count as prunable.

    Returns:
      A `Sparsity` of two Python floats; of float32 arrays under `jit`.

    Raises:
      ValueError: an empty tree, or a `where` that matches nothing.
      TypeError: a leaf that is not an array, or has no values; a `where` that is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.sparsity({"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.ones(2)})
      Sparsity(prunable=0.5, model=0.25)
    """
    leaves = counted(tree)
    prunable = _prunable(tree, leaves, where)

    def fraction(paths):
        size = sum(leaves[path].size for path in paths)
        if is_concrete(tree):
            return 1 - sum(_nonzeros(leaves[path]) for path in paths) / size if size else 0.0
        # The removed are counted, so that nothing removed is exactly 0.
        return sum(_traced_zeros(leaves[path]) for path in paths) / float(max(size, 1))

    return Sparsity(fraction(prunable), fraction(leaves))


def density(tree: Params | Masks, where: Where = kernels) -> Sparsity:
    """The fraction of entries kept, `1 - sparsity`, of the prunable leaves and of the whole model.

    Raises:
      ValueError, TypeError: as `sparsity`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.density({"kernel": jnp.array([[True, False]])}).prunable
      0.5
    """
    removed = sparsity(tree, where)
    return Sparsity(1 - removed.prunable, 1 - removed.model)


def compression(tree: Params | Masks, where: Where = kernels) -> Sparsity:
    """How many times fewer entries are left, `size / nonzeros`, as ShrinkBench defines the ratio.

    `model` divides all entries by those kept and those that cannot be pruned (biases, norms), which is
    what papers should quote; `prunable` leaves these out on both sides. 90 % sparsity is 10 x of
    the prunable entries, and less of the model.

    Args:
      tree: masks, or params, or one array.
      where: which leaves count as prunable.

    Returns:
      Two floats of 1 or more; infinity where nothing is left.

    Raises:
      ValueError: an empty tree, or a `where` that matches nothing.
      TypeError: a leaf that is not an array, or has no values; a `where` that is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.compression({"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.ones(2)}).prunable
      2.0

    References:
      Blalock et al. 2020, "What is the state of neural network pruning?", section 6.
    """
    leaves = counted(tree)

    def of(paths):
        return ratio(sum(leaves[path].size for path in paths), sum(_nonzeros(leaves[path]) for path in paths))

    return Sparsity(of(_prunable(tree, leaves, where)), of(leaves))


def ratio(whole: int, left: int) -> float:
    """How many times fewer are left: infinity if nothing is; 1 if there was nothing."""
    return whole / left if left else math.inf if whole else 1.0


def nonzeros(tree: Any) -> int:
    """How many entries are not zero (or not pruned, for masks): the l0 "norm".

    Raises:
      TypeError: a leaf that is not an array, or has no values.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.nonzeros({"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.ones(2)})
      3
    """
    leaves = counted(tree) if jax.tree.leaves(tree) else {}
    return sum(map(_nonzeros, leaves.values()))


def table(masks: Masks, where: Where = kernels, asked: float | None = None) -> str:
    """Kept entries and sparsity of each leaf, of the prunable leaves and of the model, as text.

    Args:
      masks: masks, or params.
      where: which leaves count as prunable.
      asked: the sparsity that was asked for, to print beside the one achieved.

    Returns:
      Lines of at most 80 characters, unless a path is longer than 32.

    Raises:
      ValueError: an empty tree.
      TypeError: a `where` that is not a function, an `asked` that is no number.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.arange(8.0).reshape(2, 4), "bias": jnp.ones(4)}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
      >>> print(jp.metrics.table(masks, asked=0.5))
      leaf         shape              kept        size  sparsity
      bias         4                     4           4    0.0000
      kernel       2x4                   4           8    0.5000
      prunable                           4           8    0.5000
        (asked)                                           0.5000
      whole model                        8          12    0.3333
    """
    leaves = counted(masks)
    check_where(where)
    if asked is not None:
        check_number(asked, "asked", "the sparsity asked for")
    width = max([11, *map(len, leaves)])

    def row(name: str, shape: str, paths: Sequence[str]) -> str:
        kept = sum(_nonzeros(leaves[path]) for path in paths)
        size = sum(leaves[path].size for path in paths)
        return f"{name:<{width}}  {shape:<12}{kept:>11}{size:>12}{1 - kept / max(size, 1):>10.4f}"

    rows = [f"{'leaf':<{width}}  {'shape':<12}{'kept':>11}{'size':>12}{'sparsity':>10}"]
    rows += [row(path, "x".join(map(str, leaf.shape)), [path]) for path, leaf in leaves.items()]
    rows.append(row("prunable", "", [path for path, leaf in leaves.items() if where(path, leaf)]))
    if asked is not None:
        rows.append(f"{'  (asked)':<{width}}{asked:>47.4f}")
    return "\n".join([*rows, row("whole model", "", list(leaves))])


def collapsed(tree: Params | Masks, where: Where = kernels) -> tuple[str, ...]:
    """The prunable leaves with nothing left: layer collapse, through which no signal passes.

    Args:
      tree: masks, or params.
      where: which leaves count as prunable.

    Returns:
      Their paths.

    Raises:
      ValueError: an empty tree.
      TypeError: a leaf that is not an array, or has no values; a `where` that is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.collapsed({"a": {"kernel": jnp.zeros((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}})
      ('a/kernel',)
    """
    leaves = counted(tree)
    check_where(where)
    return tuple(path for path, leaf in leaves.items() if where(path, leaf) and not _nonzeros(leaf))


def counted(tree: Any) -> dict[str, Any]:
    """The leaves of params or masks by path, packed masks as bool ones."""
    is_params = any(is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(tree))
    # Params may hold a mapping that looks like a packed mask without its shape; masks may not.
    return array_leaves(tree if is_params else unpack_masks(tree))


def _prunable(tree: Any, leaves: dict[str, Any], where: Where) -> list[str]:
    """The paths of the leaves that take part: of a bare array, that one."""
    check_where(where)
    if list(leaves) == [""]:
        return [""]
    # A mask is bool, but takes part if its param does: `where` sees shapes, not dtypes.
    return [path for path, leaf in leaves.items() if where(path, leaf)] or selected(tree, where)


def _traced_zeros(leaf: Any) -> jax.Array:
    if not is_numeric(leaf):
        return jnp.zeros((), jnp.float32)
    return jnp.sum(leaf == 0, axis=tuple(range(1, leaf.ndim))).astype(jnp.float32).sum()


def _nonzeros(leaf: Any) -> int:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"what is counted needs values, got {leaf}.")
    if not is_numeric(leaf):  # PRNG keys, among the variables of a module
        return leaf.size
    # Counted by row and added up on the host, so that no count passes 2**31.
    with jax.ensure_compile_time_eval():  # a traced function may have closed over the leaf
        rows = jnp.count_nonzero(leaf, axis=tuple(range(1, leaf.ndim)))
    return int(np.asarray(rows).sum(dtype=np.int64))
