"""How many entries are kept, absolutely and as a fraction."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tree.checks import check_number, shown
from jaxprune.tree.dtypes import is_numeric
from jaxprune.tree.host import like_computed, on_host
from jaxprune.tree.leaves import array_leaves, is_array, is_concrete
from jaxprune.tree.masks import unpack_masks
from jaxprune.tree.stacks import Stacked, about_layers, check_stacks, split_layers, stacks_of
from jaxprune.tree.tables import text_lines
from jaxprune.tree.where import check_where, kernels, selected
from jaxprune.typing import Masks, Params, Progress, Pruner, Where


class Sparsity(NamedTuple):
    """A fraction or a ratio, for the prunable leaves and for all; floats (arrays under `jit`).

    Attributes:
      prunable: for the entries of the leaves that take part.
      model: for all entries, biases and norms included.
    """

    prunable: Any
    model: Any


def sparsity(tree: Params | Masks, where: Where = kernels) -> Sparsity:
    """Return the fraction of entries that are pruned (False) or exactly zero.

    `sparsity = 1 - nonzeros / size`, counted in integers on the host; under `jit` in float32.

    Args:
      tree: masks, or params, or one array, which then counts as prunable.
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
        # Zeros are counted rather than nonzeros, so that a tree without zeros gives exactly 0.
        return sum(_traced_zeros(leaves[path]) for path in paths) / float(max(size, 1))

    return Sparsity(fraction(prunable), fraction(leaves))


def density(tree: Params | Masks, where: Where = kernels) -> Sparsity:
    """Return the fraction of entries kept, `1 - sparsity`; arguments and errors are those of `sparsity`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.density({"kernel": jnp.array([[True, False]])}).prunable
      0.5
    """
    removed = sparsity(tree, where)
    return Sparsity(1 - removed.prunable, 1 - removed.model)


def compression(tree: Params | Masks, where: Where = kernels) -> Sparsity:
    """Return the compression ratio `size / nonzeros`, as ShrinkBench defines it.

    `model` counts all entries, those that cannot be pruned (biases, norms) included, and is the ratio that
    papers should quote; `prunable` leaves these out on both sides. At 90 % sparsity it is 10 for the prunable
    entries, and less for the model.

    Arguments and errors are those of `sparsity`. A ratio is infinity where nothing is left.

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
    """Return `whole / left`: infinity if nothing is left, 1 if there was nothing."""
    return whole / left if left else math.inf if whole else 1.0


def nonzeros(tree: Any) -> int:
    """Return how many entries are not zero (for masks: not pruned), the l0 "norm".

    Raises:
      TypeError: a leaf that is not an array, or has no values.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.nonzeros({"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.ones(2)})
      3
    """
    leaves = counted(tree) if jax.tree.leaves(tree) else {}
    return sum(map(_nonzeros, leaves.values()))


def table(
    masks: Masks,
    where: Where | None = None,
    asked: float | Pruner | None = None,
    structure: Any = None,
    stacked: Stacked | None = None,
) -> str:
    """Return kept entries and sparsity of each leaf, of the prunable leaves and of the model, as text.

    The sparsity asked for is printed below the one to compare it with. A pruner, or a structure, counts
    units, which get their own row, since 30 % of the channels are not 30 % of the entries.

    Args:
      masks: masks, or params.
      where: which leaves count as prunable; by default those of the pruner, or else `jaxprune.kernels`.
      asked: the sparsity that was asked for, or the pruner that made the masks: then its units, its leaves
        and its final target are shown.
      structure: the structure that the masks were made with, if `asked` is a number.
      stacked: as for `prune_once`, if neither a pruner nor a structure says which leaves are stacked. Each
        layer gets a row below that of its leaf.

    Returns:
      Lines of at most 80 characters, unless a path is longer than 32.

    Raises:
      ValueError: an empty tree; a `where` that matches nothing.
      TypeError: a `where` that is not a function, an `asked` that is neither a number nor a pruner, a
        `structure` or `stacked` together with a pruner.

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
      >>> pruner = jp.pruner(jp.scores.magnitude, 0.25, structure=jp.structures.slices(axis=-1))
      >>> state = pruner.update(pruner.init(params), params)
      >>> print(jp.metrics.table(state.masks, asked=pruner))
      leaf         shape              kept        size  sparsity
      bias         4                     4           4    0.0000
      kernel       2x4                   6           8    0.2500
      prunable                           6           8    0.2500
        units                            3           4    0.2500
        (asked)                                           0.2500
      whole model                       10          12    0.1667
    """
    leaves = counted(masks)
    where = where or (asked.where if isinstance(asked, Pruner) else None) or kernels
    check_where(where)
    where = about_layers(where, stacked)
    progress = _progress(masks, leaves, where, asked, structure, stacked)
    stacks = _stacks(leaves, where, progress, stacked)
    layers = {path: split_layers({path: leaf}, stacks) for path, leaf in leaves.items() if path in stacks}

    def row(name: str, kept: int, size: int, shape: Sequence[int] = ()) -> tuple[str, ...]:
        return name, "x".join(map(str, shape)), str(kept), str(size), f"{1 - kept / max(size, 1):.4f}"

    def total(name: str, paths: Sequence[str]) -> tuple[str, ...]:
        some = [leaves[path] for path in paths]
        return row(name, sum(map(_nonzeros, some)), sum(leaf.size for leaf in some))

    rows: list[tuple[str, ...]] = [("leaf", "shape", "kept", "size", "sparsity")]
    for path, leaf in leaves.items():
        rows.append(row(path, _nonzeros(leaf), leaf.size, leaf.shape))
        for name, layer in layers.get(path, {}).items():
            rows.append(row(f"  {name}", _nonzeros(layer), layer.size, layer.shape))
    rows.append(total("prunable", [path for path, leaf in leaves.items() if where(path, leaf)]))
    if progress is not None and progress.unit != "entries":
        rows.append(row("  units", progress.kept, progress.size))
    target = None if isinstance(asked, Pruner) else asked
    if isinstance(asked, Pruner) and progress is not None and progress.asked is not None:
        target = progress.asked / max(progress.size, 1)
    if target is not None:
        rows.append(("  (asked)", "", "", "", f"{target:.4f}"))
    rows.append(total("whole model", list(leaves)))
    width = max(len(name) for name, *_ in rows)
    return "\n".join(text_lines(f"{{:<{width}}}  {{:<12}}{{:>11}}{{:>12}}{{:>10}}", *rows))


def _progress(
    masks: Masks, leaves: Mapping[str, Any], where: Where, asked: Any, structure: Any, stacked: Any
) -> Progress | None:
    """Return how many units masks keep, if a pruner or a structure says what a unit is."""
    if isinstance(asked, Pruner):
        for name, given in (("structure", structure), ("stacked", stacked)):
            if given is not None:
                raise TypeError(f"{name}= is for a sparsity that was asked for; a pruner knows its own.")
        return None if asked.progress is None else asked.progress(masks)
    if asked is not None:
        check_number(asked, "asked", "(the sparsity asked for) or the pruner that made the masks")
    if structure is None:
        return None
    if not (hasattr(structure, "pool") and hasattr(structure, "spans_leaves")):
        raise TypeError(f"structure must be one of jaxprune.structures, called; got {shown(structure)}.")
    if structure.stacks is None and stacked is not None:
        structure = structure._replace(stacks=_stacks(leaves, where, None, stacked))
    alive = alive_units(structure, leaves, where)
    kept = sum(map(_nonzeros, alive.values()))
    size = sum(units.size for units in alive.values())
    return Progress(structure.name, kept, size, None, structure.stacks or {})


def _stacks(
    leaves: Mapping[str, Any], where: Where, progress: Progress | None, stacked: Any
) -> Mapping[str, tuple[int, ...]]:
    """Return, by path, the axes of stacked leaves that count layers."""
    known = {} if progress is None else progress.stacks
    if known or stacked is None:
        return known
    return stacks_of(stacked, {path: leaf for path, leaf in leaves.items() if where(path, leaf)})


def alive_units(structure: Any, masks: Mapping[str, Any], where: Where) -> dict[str, jax.Array]:
    """Return which units are kept in each pool, given masks, or params, whose zeros count as pruned."""
    kept = {path: _is_kept(leaf, bool) for path, leaf in masks.items()}
    chosen = {path: mask for path, mask in kept.items() if where(path, mask)}
    scores = {path: _is_kept(mask, jnp.float32) for path, mask in chosen.items()}
    # Whether a unit that spans leaves is alive may depend on leaves that have no scores.
    seen, stacks = kept if structure.spans_leaves else chosen, structure.stacks or {}
    check_stacks(stacks, seen)
    return structure.pool(split_layers(scores, stacks), split_layers(seen, stacks)).alive


def _is_kept(leaf: Any, dtype: Any) -> jax.Array:
    """Return 1 (True) in a dtype for the entries that are not zero."""
    if on_host(leaf):
        return like_computed((np.asarray(leaf) != 0).astype(dtype), leaf)
    return (jnp.asarray(leaf) != 0).astype(dtype)


def collapsed(tree: Params | Masks, where: Where = kernels) -> tuple[str, ...]:
    """Return the prunable leaves with no entry left: layer collapse, through which no signal passes.

    Arguments and errors are those of `sparsity`; no leaf has to be prunable.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.metrics.collapsed({"a": {"kernel": jnp.zeros((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}})
      ('a/kernel',)
    """
    leaves = counted(tree)
    check_where(where)
    return tuple(path for path, leaf in leaves.items() if where(path, leaf) and not _nonzeros(leaf))


def counted(tree: Any) -> dict[str, Any]:
    """Return the leaves of params or masks by path, packed masks as bool arrays."""
    is_params = any(is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(tree))
    # Params may hold a mapping that looks like a packed mask without its shape; masks may not.
    return array_leaves(tree if is_params else unpack_masks(tree))


def _prunable(tree: Any, leaves: dict[str, Any], where: Where) -> list[str]:
    """Return the paths of the leaves that take part; a bare array always does."""
    check_where(where)
    if list(leaves) == [""]:
        return [""]
    # A mask is bool, but takes part if its param does: `where` sees shapes. `selected` is here to raise.
    return [path for path, leaf in leaves.items() if where(path, leaf)] or selected(tree, where)


def _traced_zeros(leaf: Any) -> jax.Array:
    if not is_numeric(leaf):
        return jnp.zeros((), jnp.float32)
    return jnp.sum(leaf == 0, axis=tuple(range(1, leaf.ndim))).astype(jnp.float32).sum()


def _nonzeros(leaf: Any) -> int:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"counting needs arrays with values, got {leaf}.")
    if not is_numeric(leaf):  # PRNG keys, among the variables of a module
        return leaf.size
    if on_host(leaf):
        return int(np.count_nonzero(np.asarray(leaf) != 0))
    # Rows are counted apart and added up on the host, so that no count passes 2**31.
    with jax.ensure_compile_time_eval():  # a traced function may have closed over the leaf
        rows = jnp.count_nonzero(leaf, axis=tuple(range(1, leaf.ndim)))
    return int(np.asarray(rows).sum(dtype=np.int64))
