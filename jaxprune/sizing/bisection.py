"""Budget search: the sparsity that meets a number of MACs or params, or that an accuracy allows."""

import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.pruning.once import check_choices
from jaxprune.pruning.targets import (
    by_layer,
    competing_pools,
    competing_sizes,
    equal_families,
    kept_in_each,
    taken_apart,
    target_counts,
)
from jaxprune.scores import magnitude
from jaxprune.sizing.ranking import Counts, RankedUnits, rank_units
from jaxprune.structures.base import Structure
from jaxprune.tree.checks import check_function, check_number
from jaxprune.tree.stacks import Family, Stacked
from jaxprune.tree.statistics import InputStatistics
from jaxprune.tree.where import kernels
from jaxprune.typing import Masks, Params, PerPath, ScoreFn, Scores, Where

Measure = Callable[[Masks], Any]
"""`measure(masks) -> number`: what is budgeted."""


class Budget(NamedTuple):
    """How much to prune for a budget.

    Attributes:
      masks: the masks.
      sparsity: the sparsity for which `prune_once` makes these masks, given the scope and the rest.
      value: the measure of these masks.
      removed: by path or group, how many units were removed.
      tried: sparsities and measures, in the order in which they were tried.
    """

    masks: Masks
    sparsity: float
    value: float
    removed: Mapping[str, int]
    tried: tuple[tuple[float, float], ...]


def budget(
    measure: Measure,
    params: Params,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    scores: ScoreFn | Scores = magnitude,
    scope: str = "global",
    distribution: Callable[[float], PerPath] | None = None,
    structure: Structure | None = None,
    where: Where = kernels,
    masks: Masks | None = None,
    floor: int = 1,
    stacked: Stacked | None = None,
    stats: InputStatistics | None = None,
    grads: Any = None,
    key: jax.Array | None = None,
    **extra: Any,
) -> Budget:
    """Find the sparsity that meets a budget, by bisection on exact counts.

    `at_most` is for a cost, MACs or params: the least pruning that brings it down to the budget.
    `at_least` is for a quality, accuracy or a negative loss: the most pruning that keeps it there.
    The sparsities tried are the multiples of 1 / (number of units), so that with `scope="global"`
    every number of units can be reached; with other scopes a step may remove one unit more from
    several leaves or groups, or from none.

    A cost only falls as more is pruned, so no sparsity below the one returned meets the budget. An
    accuracy goes up and down: the sparsity returned was measured and meets the budget, and the next
    step was measured and does not, but higher sparsities may.

    Args:
      measure: `measure(masks) -> number`, called outside `jit` about log2(units) times.
        `jaxprune.metrics.nonzeros` counts the params that are left. For an accuracy:
        `lambda masks: accuracy(jaxprune.apply_masks(params, masks))`.
      params: a pytree of arrays.
      at_most: the highest measure allowed. Pass either this or `at_least`.
      at_least: the lowest measure allowed.
      scores, structure, where, stacked, stats, grads, key, **extra: as for `prune_once`.
      scope: as for `prune_once`. With `"layerwise"` all leaves, or groups, have the same sparsity, with
        `"output"` all outputs.
      distribution: a function from a sparsity to targets by path or group, for targets that differ:
        `functools.partial(jaxprune.distributions.erk, params)`. No target may fall as the sparsity
        rises. It needs `scope="layerwise"` or `"output"`.
      masks: masks to start from.
      floor: how many units of each leaf or group stay at least, with `scope="output"` of each output.

    Raises:
      ValueError: not exactly one bound; a budget that cannot be met, with what comes closest; and as
        `prune_once`.
      TypeError: a measure that is not a real number; and as `prune_once`.

    Warns:
      UserWarning: nothing was removed: the budget is met without, or the first step would break it.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.ones(4)}
      >>> found = jp.budget(jp.metrics.nonzeros, params, at_most=7)
      >>> found.sparsity, found.value, found.masks["kernel"].tolist()
      (0.625, 7, [[False, False, False, False], [False, True, True, True]])
      >>> def total(masks):
      ...     return jnp.sum(jp.apply_masks(params, masks)["kernel"])  # 36 if dense
      >>> jp.budget(total, params, at_least=25).removed
      {'kernel': 4}
    """
    if (at_most is None) == (at_least is None):
        raise ValueError(f"budget needs either at_most or at_least, got at_most={at_most}, {at_least=}.")
    check_function(measure, "budget", "measure(masks)")
    given: Any = at_most if at_most is not None else at_least
    check_number(given, "at_most" if at_least is None else "at_least", "like the measure's")
    bound = float(given)
    if bound != bound:
        raise ValueError("the bound of a budget is nan, which no measure meets.")
    check_choices(scope, "total", floor)
    if distribution is not None and scope not in ("layerwise", "output"):
        raise ValueError(f"a distribution has a target for each path: pass scope='layerwise', got {scope!r}.")
    shared = (params, scores, structure, where, masks, floor, stacked, grads, key, extra, budget)
    ranked = rank_units(*shared, "output" if scope == "output" else "layerwise", stats)
    ladder = _SparsityLadder(ranked, scope, distribution)
    measured: dict[Counts, tuple[Masks, Any]] = {}
    tried: list[tuple[float, float]] = []

    def value(step: int) -> Any:
        counts = ladder.counts(step)
        if counts not in measured:
            pruned = ranked.masks_of(counts)
            measured[counts] = pruned, _number(measure(pruned))
            tried.append((ladder.sparsity(step), measured[counts][1]))
        return measured[counts][1]

    find = _lowest_within_cost if at_least is None else _highest_with_quality
    step = find(ladder, value, bound)
    counts = ladder.counts(step)
    removed = ranked.num_removed(counts)
    return Budget(measured[counts][0], ladder.sparsity(step), measured[counts][1], removed, tuple(tried))


def _lowest_within_cost(ladder: "_SparsityLadder", value: Callable[[int], Any], bound: float) -> int:
    """Return the lowest step at which a cost is within the bound."""
    if value(0) <= bound:
        _warn(f"at_most={bound:g} is met as it is, with {value(0):,}, so nothing was removed.")
        return 0
    if not value(ladder.last) <= bound:
        raise ValueError(
            f"at_most={bound:g} cannot be met: with everything pruned but floor={ladder.floor} units of each "
            f"leaf or group the measure is {value(ladder.last):,}, and {value(0):,} with nothing pruned."
        )
    return _bisect(0, ladder.last, lambda step: value(step) <= bound)[1]


def _highest_with_quality(ladder: "_SparsityLadder", value: Callable[[int], Any], bound: float) -> int:
    """Return a step at which a quality is within the bound, and at whose next it is not."""
    if not value(0) >= bound:
        raise ValueError(
            f"at_least={bound:g} cannot be met: with nothing pruned the measure is {value(0):,}, and with "
            f"everything but floor={ladder.floor} units of each leaf or group {value(ladder.last):,}."
        )
    if value(ladder.last) >= bound:
        return ladder.last
    step, broken = _bisect(0, ladder.last, lambda step: not value(step) >= bound)
    if not any(ladder.num_removed(step).values()):
        more = sum(ladder.num_removed(broken).values())
        _warn(
            f"at_least={bound:g}: nothing was removed, because with {more} units less the measure is "
            f"{value(broken):,}."
        )
    return step


def _bisect(low: int, high: int, true: Callable[[int], bool]) -> tuple[int, int]:
    """Return neighbouring steps, the first false and the second true, between a false and a true one."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if true(middle) else (middle, high)
    return low, high


class _SparsityLadder:
    """How many units are removed from each pool as the sparsity rises in steps.

    Attributes:
      last: the last step.
      floor: how many units of each pool stay at least.
    """

    def __init__(
        self, ranked: RankedUnits, scope: str, distribution: Callable[[float], PerPath] | None
    ) -> None:
        self._ranked, self._scope, self._distribution = ranked, scope, distribution
        self._competing = competing_pools(ranked.sizes, ranked.structure, scope)
        self._sizes = competing_sizes(ranked.sizes, self._competing)
        self._num_units = sum(ranked.sizes.values())
        self._orders: dict[str, np.ndarray] = {}
        self._equal = equal_families(ranked.families, scope)
        self.floor = max(ranked.min_kept.values())
        # A sparsity is below 1, but all groups of n:m are pruned at a sparsity of 1 - n/m.
        self.last = self._num_units - (ranked.structure.max_sparsity == 1)

    def num_removed(self, step: int) -> dict[str, int]:
        """Return how many units a step removes from each pool."""
        return self._ranked.num_removed(self.counts(step))

    def sparsity(self, step: int) -> float:
        """Return the sparsity of a step."""
        return self._ranked.structure.max_sparsity * step / max(self._num_units, 1)

    def counts(self, step: int) -> Counts:
        """Return how many units a step removes from each pool; with scope="output" from each output."""
        sparsity: Any = self.sparsity(step)
        if self._distribution is not None:
            sparsity = taken_apart(self._distribution(sparsity), "sparsity")
            sparsity = by_layer(sparsity, self._ranked.families, "sparsity")
        targets = target_counts(sparsity, self._sizes, self._ranked.structure, self._scope)
        removed: dict[str, int] = {}
        for name, pools in self._competing.items():
            removed |= self._by_pool(name, pools, targets[name])
        for family in self._equal.values():
            removed |= self._equally_many(family, removed)
        return self._ranked.counts(removed)

    def _equally_many(self, family: Family, removed: Mapping[str, int]) -> dict[str, int]:
        """Return how many units of a stack's layers to remove, so that each keeps as many as the others."""
        ranked, names = self._ranked, family.names
        more = dict(zip(ranked.sizes, ranked.counts(removed), strict=True))
        alive = np.array([ranked.num_alive[name] for name in names])
        kept = np.array([ranked.num_alive[name] - more[name] for name in names])
        min_kept = max(ranked.min_kept[name] for name in names)
        number = int(kept_in_each(kept, alive, min_kept, family.multiple_of))
        return {name: ranked.sizes[name] - min(number, ranked.num_alive[name]) for name in names}

    def _by_pool(self, name: str, pools: tuple[str, ...], target: int) -> dict[str, int]:
        """Return how many units to remove from each of the pools that compete for a target."""
        ranked = self._ranked
        removed = {pool: ranked.sizes[pool] - ranked.num_alive[pool] for pool in pools}
        if len(pools) == 1:
            return {pools[0]: target}
        if name not in self._orders:
            self._orders[name] = _pools_in_order(ranked, pools)
        lowest = self._orders[name][: max(0, target - sum(removed.values()))]
        more = np.bincount(lowest, minlength=len(pools)).tolist()
        return {pool: removed[pool] + more[index] for index, pool in enumerate(pools)}


def _pools_in_order(ranked: RankedUnits, pools: tuple[str, ...]) -> np.ndarray:
    """Return the index of its pool for each unit that can be removed, from the lowest unit up.

    The units that the floor keeps are the highest of their pools, and are left out.
    """
    parts = []
    for pool in pools:
        in_order = np.empty_like(ranked.unit_scores[pool].ravel())
        in_order[np.ravel(ranked.ranks[pool])] = ranked.unit_scores[pool].ravel()
        parts.append(in_order[: ranked.max_removable(pool)])
    owner = np.repeat(np.arange(len(pools), dtype=np.int32), [len(part) for part in parts])
    # A stable sort: among equal scores the earlier pool comes first, and within it the earlier unit.
    return owner[np.argsort(np.concatenate(parts), kind="stable")]


def _number(value: Any) -> Any:
    """Return a measure as a Python number."""
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"measure must return a real number, got {value!r}.")
    return value


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
