"""`stats=` and `scope="output"`: which leaves take part, and which of their axes products sum over."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxprune.pruning.extras import named_by
from jaxprune.pruning.scoring import is_tree_of_scores
from jaxprune.pruning.targets import competing_pools
from jaxprune.structures.base import Structure
from jaxprune.tree.checks import shown
from jaxprune.tree.leaves import describe
from jaxprune.tree.stacks import Stacked, layer_names
from jaxprune.tree.statistics import (
    CALIBRATE,
    InputStatistics,
    check_calibrated,
    check_statistics,
    check_unchanged,
)
from jaxprune.tree.where import kernels
from jaxprune.typing import Params, ScoreFn, Scores, Where


def reads_statistics(scores: ScoreFn | Scores, params: Params) -> bool:
    """Return whether a score names `stats`, or has a signature that cannot be read."""
    if is_tree_of_scores(scores, params):
        return False
    names = named_by(scores)
    return names is None or "stats" in names


def calibrated_defaults(
    stats: InputStatistics, where: Where, stacked: Stacked | None, structure: Structure
) -> tuple[Where, Stacked | None]:
    """Return `where` and `stacked`; in place of their defaults, what the statistics know.

    Raises:
      TypeError: `stats` is not what `jaxprune.calibrate` returns.
    """
    check_statistics(stats)
    if where is kernels:
        where = stats.where
    if stacked is None and structure.stacks is None and stats.stacks:
        stacks = stats.stacks

        def stacked_as_calibrated(path: str, leaf: Any) -> tuple[int, ...]:
            return stacks.get(path, ())

        stacked = stacked_as_calibrated
    return where, stacked


def with_statistics(
    stats: InputStatistics,
    scores: ScoreFn | Scores,
    params: Params,
    where: Where,
    stacked: Stacked | None,
    structure: Structure,
    extra: Mapping[str, Any],
) -> tuple[Where, Stacked | None, bool, dict[str, Any]]:
    """Return `where`, `stacked`, whether the score reads the statistics, and the score's extra arguments.

    Raises:
      TypeError: `stats` is not what `jaxprune.calibrate` returns.
      ValueError: the params changed since.
    """
    where, stacked = calibrated_defaults(stats, where, stacked, structure)
    check_unchanged(stats, params)
    reads = reads_statistics(scores, params)
    return where, stacked, reads, {**extra, "stats": stats} if reads else {**extra}


def with_contracted_axes(
    structure: Structure,
    scope: str,
    stats: InputStatistics | None,
    leaves: Mapping[str, Any],
    chosen: Collection[str],
    reads: bool,
) -> Structure:
    """Return the structure with the axes that products sum over: those of N:M groups, and of outputs' inputs.

    Args:
      structure: a structure that has its stacks.
      scope: with "output" the structure gets the axes that the inputs of each output lie along.
      stats: what knows the axes; without it all axes but the last of each layer are summed over.
      leaves: by path, the params.
      chosen: the leaves that take part.
      reads: whether the score reads the statistics.

    Raises:
      ValueError: a leaf without statistics that the score, the scope or the structure needs; an explicit axis
        of N:M, or an axis that counts layers, which differs from what the product sums over; with
        scope="output" a structure whose units lie in no one output, or a leaf that has no axis of inputs.
    """
    if scope == "output":
        competing_pools((), structure, scope)  # which raises for structures that have no outputs
    elif stats is None or not (reads or structure.along):
        return structure
    if stats is not None:
        check_calibrated(stats, leaves, chosen)
    inputs: dict[str, tuple[int, ...]] = {}
    along: dict[str, int] = {}
    for path in chosen:
        stack, leaf = (structure.stacks or {}).get(path, ()), leaves[path]
        counted = [axis for axis in range(leaf.ndim) if axis not in stack]  # the axes of one layer
        if stats is None and len(counted) < 2:
            raise ValueError(
                f"scope='output' on params[{path!r}], {describe(leaf)}: without stats= the last axis is that "
                "of the outputs and all others are those of their inputs, so a leaf, or a layer of it, needs "
                f"two axes or more. Leave it out with where=..., or pass {CALIBRATE}."
            )
        contracted = counted[:-1] if stats is None else stats.contracted_axes(path)
        if outside := [axis for axis in contracted if axis not in counted]:
            raise ValueError(
                f"stacked= says that axis {outside[0]} of params[{path!r}], {describe(leaf)}, counts layers, "
                "but its product sums over it. Leave out stacked=: the statistics know the axes of layers, "
                f"{shown(tuple(stats.stacks.get(path, ())) if stats is not None else ())}."
            )
        names = layer_names(path, leaf.shape, stack) if stack else [path]
        inputs |= dict.fromkeys(names, tuple(counted.index(axis) for axis in sorted(contracted)))
        if stats is not None and structure.along is not None:
            along |= dict.fromkeys(names, counted.index(stats.group_axis(path)))
    if along and structure.along is not None:
        structure = structure.along(along)._replace(stacks=structure.stacks)
    return structure._replace(inputs=inputs) if scope == "output" else structure
