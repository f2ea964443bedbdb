"""Budget search: how much to prune for so many MACs or params, or for no less than an accuracy."""

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
from jaxprune.sizing.ranking import Counts, Ranked, rank
from jaxprune.structures import Structure
from jaxprune.tree.checks import check_function, check_number
from jaxprune.tree.stacks import Family, Stacked
from jaxprune.tree.where import kernels
from jaxprune.typing import Masks, Params, PerPath, ScoreFn, Scores, Where

Measure = Callable[[Masks], Any]
"""`measure(masks) -> number`: what is budgeted."""


class Budget(NamedTuple):
    """How much to prune for a budget.

    Attributes:
      masks: the masks.
      sparsity: what `prune_once` makes them from, given the scope and the rest.
      value: their measure.
      removed: by path or group, how many units went.
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
    grads: Any = None,
    key: jax.Array | None = None,
    **extra: Any,
) -> Budget:
    """The sparsity that meets a budget, found by bisection on exact counts.

    `at_most` is for a cost, MACs or params: as little is pruned as brings it down to that.
    `at_least` is for a quality, accuracy or a negative loss: as much is pruned as leaves it there.
    The sparsities tried are the multiples of 1 / (units in all), so that with `scope="global"`
    every number of units is within reach; with other scopes a step of it may be one unit more in
    several leaves or groups, or in none.

    A cost only falls as more is pruned, so no sparsity below the one returned meets the budget. An
    accuracy goes up and down: the sparsity returned was measured and meets the budget, and a step
    more was measured and does not, but beyond it there may be others that do.

    Args:
      measure: `measure(masks) -> number`, called outside `jit` some log2(units) times.
        `jaxprune.metrics.nonzeros` counts the params that are left. For an accuracy:
        `lambda masks: accuracy(jaxprune.apply_masks(params, masks))`.
      params: a pytree of arrays.
      at_most: the most that the measure may be. Either this or `at_least`.
      at_least: the least that it may be.
      scores: as for `prune_once`.
      scope: as for `prune_once`. With `"layerwise"` all leaves, or groups, have one sparsity.
      distribution: from a sparsity to targets by path or group, in place of one for all:
        `functools.partial(jaxprune.distributions.erk, params)`. No target may fall as the sparsity
        rises. It needs `scope="layerwise"`.
      structure: as for `prune_once`.
      where: which leaves take part.
      masks: masks to start from.
      floor: how many units of each leaf or group stay at least.
      stacked: as for `prune_once`: which axes of which leaves count layers.
      grads: gradients like `params`, for scores that need them.
      key: a PRNG key, for scores that need it.
      **extra: passed on to the score, which must name them.

    Returns:
      A `Budget`.

    Raises:
      ValueError: not exactly one bound; a budget that cannot be met, and what comes closest; and as
        `prune_once`.
      TypeError: a measure that is no real number; and as `prune_once`.

    Warns:
      UserWarning: nothing was removed: the budget is met as it is, or a step more would break it.

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
    if distribution is not None and scope != "layerwise":
        raise ValueError(f"a distribution has a target for each path: pass scope='layerwise', got {scope!r}.")
    ranked = rank(params, scores, structure, where, masks, floor, stacked, grads, key, extra, budget)
    line = _Line(ranked, scope, distribution)
    found: dict[Counts, tuple[Masks, Any]] = {}
    tried: list[tuple[float, float]] = []

    def value(step: int) -> Any:
        counts = line.counts(step)
        if counts not in found:
            pruned = ranked.masks_of(counts)
            found[counts] = pruned, _number(measure(pruned))
            tried.append((line.sparsity(step), found[counts][1]))
        return found[counts][1]

    if at_least is None:
        last = _least_step(line, value, bound)
    else:
        last = _most_steps(line, value, bound)
    counts = line.counts(last)
    removed = dict(zip(ranked.sizes, counts, strict=True))
    return Budget(found[counts][0], line.sparsity(last), found[counts][1], removed, tuple(tried))


def _least_step(line: "_Line", value: Callable[[int], Any], bound: float) -> int:
    """The least step at which a cost is within the bound."""
    if value(0) <= bound:
        _warn(f"at_most={bound:g} is met as it is, with {value(0):,}, so nothing was removed.")
        return 0
    if not value(line.last) <= bound:
        raise ValueError(
            f"at_most={bound:g} cannot be met: with everything pruned but floor={line.floor} units of each "
            f"leaf or group the measure is {value(line.last):,}, and {value(0):,} with nothing pruned."
        )
    return _bisect(0, line.last, lambda step: value(step) <= bound)[1]


def _most_steps(line: "_Line", value: Callable[[int], Any], bound: float) -> int:
    """A step at which a quality is within the bound, and the next is not."""
    if not value(0) >= bound:
        raise ValueError(
            f"at_least={bound:g} cannot be met: with nothing pruned the measure is {value(0):,}, and with "
            f"everything but floor={line.floor} units of each leaf or group {value(line.last):,}."
        )
    if value(line.last) >= bound:
        return line.last
    last, broken = _bisect(0, line.last, lambda step: not value(step) >= bound)
    if not any(line.counts(last)):
        more = sum(line.counts(broken))
        _warn(
            f"at_least={bound:g}: nothing was removed, because with {more} units less the measure is "
            f"{value(broken):,}."
        )
    return last


def _bisect(low: int, high: int, true: Callable[[int], bool]) -> tuple[int, int]:
    """Neighbours, the first false and the second true, between one that is false and one that is true."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if true(middle) else (middle, high)
    return low, high


class _Line:
    """How many units go from each pool as the sparsity rises in steps.

    Attributes:
      last: the last step.
      floor: how many units of each pool stay at least.
    """

    def __init__(self, ranked: Ranked, scope: str, distribution: Callable[[float], PerPath] | None):
        self._ranked, self._scope, self._distribution = ranked, scope, distribution
        self._competing = competing_pools(ranked.sizes, ranked.structure, scope)
        self._sizes = competing_sizes(ranked.sizes, self._competing)
        self._units = sum(ranked.sizes.values())
        self._orders: dict[str, np.ndarray] = {}
        self._equal = equal_families(ranked.families, scope)
        self.floor = max(ranked.least.values())
        # A sparsity is below 1, but all groups of n:m are pruned at one of 1 - n/m.
        self.last = self._units - (ranked.structure.max_sparsity == 1)

    def sparsity(self, step: int) -> float:
        """The sparsity asked for."""
        return self._ranked.structure.max_sparsity * step / max(self._units, 1)

    def counts(self, step: int) -> Counts:
        """How many units go from each pool."""
        sparsity: Any = self.sparsity(step)
        if self._distribution is not None:
            sparsity = taken_apart(self._distribution(sparsity), "sparsity")
            sparsity = by_layer(sparsity, self._ranked.families, "sparsity")
        targets = target_counts(sparsity, self._sizes, self._ranked.structure, self._scope)
        by_pool: dict[str, int] = {}
        for name, pools in self._competing.items():
            by_pool |= self._shared(name, pools, targets[name])
        for family in self._equal.values():
            by_pool |= self._equally_many(family, by_pool)
        return self._ranked.to_go(by_pool)

    def _equally_many(self, family: Family, by_pool: Mapping[str, int]) -> dict[str, int]:
        """How many units of a stack's layers should be gone, so that each keeps as many as the others."""
        ranked, names = self._ranked, family.names
        going = dict(zip(ranked.sizes, ranked.to_go(by_pool), strict=True))
        alive = np.array([ranked.alive[name] for name in names])
        kept = np.array([ranked.alive[name] - going[name] for name in names])
        least = max(ranked.least[name] for name in names)
        number = int(kept_in_each(kept, alive, least, family.multiple_of))
        return {name: ranked.sizes[name] - min(number, ranked.alive[name]) for name in names}

    def _shared(self, name: str, pools: tuple[str, ...], target: int) -> dict[str, int]:
        """How many units of each pool should be gone, of a target for all of them."""
        ranked = self._ranked
        gone = {pool: ranked.sizes[pool] - ranked.alive[pool] for pool in pools}
        if len(pools) == 1:
            return {pools[0]: target}
        if name not in self._orders:
            self._orders[name] = _order(ranked, pools)
        lowest = self._orders[name][: max(0, target - sum(gone.values()))]
        more = np.bincount(lowest, minlength=len(pools)).tolist()
        return {pool: gone[pool] + more[index] for index, pool in enumerate(pools)}


def _order(ranked: Ranked, pools: tuple[str, ...]) -> np.ndarray:
    """Of units of several pools, from the lowest that can go, the indices of their pools.

    The units that the floor keeps are those that rank highest in their pools; they are not in it.
    """
    parts = []
    for pool in pools:
        in_order = np.empty_like(ranked.units[pool].ravel())
        in_order[np.ravel(ranked.ranks[pool])] = ranked.units[pool].ravel()
        parts.append(in_order[: ranked.most(pool)])
    owner = np.repeat(np.arange(len(pools), dtype=np.int32), [len(part) for part in parts])
    # Of equal scores the earlier pool goes first, and within it the earlier unit.
    return owner[np.argsort(np.concatenate(parts), kind="stable")]


def _number(value: Any) -> Any:
    """A measure as a Python number."""
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"measure must return a real number, got {value!r}.")
    return value


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
