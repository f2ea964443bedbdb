"""Sensitivity analysis: prune one tensor at a time at several levels, and evaluate the network."""

import contextlib
import fnmatch
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.pruning.targets import target_counts
from jaxprune.schedules import check_sparsity
from jaxprune.scores import magnitude
from jaxprune.sizing.ranking import Counts, RankedUnits, pooling, pruned_params, rank_units
from jaxprune.sizing.result import Point, Sensitivity
from jaxprune.structures.base import Structure
from jaxprune.tree.checks import as_integer, check_function, shown
from jaxprune.tree.leaves import describe, is_array
from jaxprune.tree.stacks import Family, Stacked
from jaxprune.tree.where import kernels
from jaxprune.typing import Masks, Params, ScoreFn, Scores, Where

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity(
    evaluate: Callable[..., Any],
    params: Params,
    data: Any = None,
    *,
    levels: Sequence[float] = LEVELS,
    scores: ScoreFn | Scores = magnitude,
    structure: Structure | None = None,
    where: Where = kernels,
    together: Mapping[str, str | Sequence[str]] | None = None,
    masks: Masks | None = None,
    floor: int = 1,
    metric: str | None = None,
    maximize: bool = True,
    at_once: int = 1,
    jit: bool = True,
    stacked: Stacked | None = None,
    grads: Any = None,
    key: jax.Array | None = None,
    **extra: Any,
) -> Sensitivity:
    """Measure how much the network suffers when one tensor at a time is pruned, at several levels.

    Each tensor is pruned once to each level, as `prune_once` would with `scope="layerwise"`, while the
    others stay as they are, and the network is evaluated without any training. The units of a tensor are
    ranked once for all levels. Whatever the number of tensors and levels, a handful of programs
    is compiled, and all work but the evaluations takes next to no time. Points that have
    equal masks are evaluated once. As with `jax.jit`, a function that was analysed before is not
    compiled again for other params of the same shapes.

    With `structure=jaxprune.structures.channels(groups)` one group of coupled channels at a time is pruned,
    in all leaves that it spans.

    Args:
      evaluate: `evaluate(params) -> scalar`, the test accuracy, say; or a dict of scalars, in which
        `metric` names the scalar that counts. `evaluate(params, data)` if data are given.
      params: a pytree of arrays.
      data: what `evaluate` evaluates on, a pytree of arrays. An `evaluate` that closes over large
        arrays works too, but XLA then compiles them into the program, which takes long.
      levels: sparsities in (0, 1), rising.
      scores: as for `prune_once`.
      structure: as for `prune_once`; `slices(axis=-1, norm=1)` prunes filters by their L1 norm.
      where: which leaves take part.
      together: sets of tensors or groups to prune together, at equal levels (the stages of a network): by
        the set's name, their paths or names, or shell patterns. The name of a stacked leaf, or of a stack of
        groups, stands for all its layers.
      masks: masks to start from. Levels are of the total, including what these prune.
      floor: how many units of each tensor stay at least.
      metric: the name of the metric. Needed if `evaluate` returns a dict.
      maximize: whether a higher metric is better. False for a loss.
      at_once: how many points are evaluated side by side, by `vmap`; each takes as much memory as an
        evaluation does. One by one, in a loop of one program, is the fastest on a CPU, where XLA is
        slow at batches of convolutions with different kernels. Small networks on an accelerator
        gain from a higher number.
      jit: whether `evaluate` is compiled. False for one that JAX cannot trace: a loop over files.
      stacked: as for `prune_once`: which axes of which leaves count layers. Each layer is then pruned as a
        tensor of its own.
      grads: gradients like `params`, for scores that need them.
      key: a PRNG key, for scores that need it.
      **extra: passed on to the score, which must name them.

    Returns:
      A `Sensitivity`.

    Raises:
      ValueError: no levels, or levels out of range or not rising; sets that overlap or match
        nothing; and as `prune_once`.
      TypeError: an `evaluate` that does not return scalars or cannot be traced; and as `prune_once`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[3.0, 1.0], [2.0, 4.0]]), "out": jnp.array([[1.0], [-5.0]])}
      >>> def evaluate(params, x):
      ...     return jnp.sum(x @ params["a"] @ params["out"])
      >>> found = jp.sensitivity(evaluate, params, jnp.ones((1, 2)), levels=(0.25, 0.5), maximize=False)
      >>> print(found)
      metric with one pruned alone; with nothing pruned -20.000
      pruned      25%      50%
      a       -15.000  -17.000
      out     -20.000  -25.000
      out at 25%: nothing was removed
      >>> jp.distributions.from_sensitivity(found, tolerance=2.0)
      {'a': 0.0, 'out': 0.5}

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.2;
      Han et al., "Learning both Weights and Connections", NIPS 2015, figure 6.
    """
    levels = _checked_levels(levels)
    at_once = _checked_at_once(at_once, jit)
    check_function(evaluate, "sensitivity", "evaluate(params)")
    if metric is not None and not isinstance(metric, str):
        raise TypeError(f"metric must be the name of one of evaluate's figures, got {shown(metric)}.")
    ranked = rank_units(
        params, scores, structure, where, masks, floor, stacked, grads, key, extra, sensitivity
    )
    sets = _sets(together, tuple(ranked.ranks), ranked.families)
    counts_of = {
        (name, level): ranked.counts(_targets(ranked, pools, level))
        for name, pools in sets.items()
        for level in levels
    }
    nothing = (0,) * len(ranked.ranks)
    different = tuple(dict.fromkeys((nothing, *counts_of.values())))
    inputs = () if data is None else (data,)
    if jit:
        found = _evaluate_compiled(evaluate, inputs, ranked, different, len(levels), at_once, metric)
    else:
        found = _evaluate_each(evaluate, inputs, ranked, different, metric)
    evaluated = dict(zip(different, found, strict=True))
    chosen = metric or next(iter(evaluated[nothing].figures))
    dense = evaluated[nothing].figures[chosen]

    def points(name: str) -> Iterable[Point]:
        pools = sets[name]
        level_of = {evaluated[nothing].num_left(pools): 0.0}
        for level in levels:
            point = evaluated[counts_of[name, level]]
            left, size = point.num_left(pools), sum(ranked.sizes[pool] for pool in pools)
            achieved = (size - sum(left)) / max(size, 1) * ranked.structure.max_sparsity
            figure = point.figures[chosen]
            drop = dense - figure if maximize else figure - dense
            notes = _notes(ranked, pools, level, point.kept, level_of.get(left))
            level_of.setdefault(left, level)
            yield Point(
                *(name, level, achieved, sum(left), size, figure, drop, notes),
                {other: value for other, value in point.figures.items() if other != chosen},
            )

    return Sensitivity(
        points=tuple(point for name in sets for point in points(name)),
        dense=dense,
        metric=chosen,
        maximize=maximize,
        pools=sets,
        others={name: value for name, value in evaluated[nothing].figures.items() if name != chosen},
    )


class _Evaluation(NamedTuple):
    """The network evaluated without some units.

    Attributes:
      figures: what `evaluate` returned, by name.
      kept: by pool, how many units are left.
    """

    figures: dict[str, float]
    kept: dict[str, int]

    def num_left(self, pools: Sequence[str]) -> tuple[int, ...]:
        """Return how many units of each of some pools are left."""
        return tuple(self.kept[pool] for pool in pools)


def _notes(
    ranked: RankedUnits, pools: Sequence[str], level: float, kept: Mapping[str, int], same_as: float | None
) -> tuple[str, ...]:
    """Return what a reader of a point should know.

    Args:
      ranked: the units.
      pools: those that were pruned.
      level: the sparsity asked for.
      kept: by pool, how many units are left.
      same_as: the lower level at which as much was removed, if there is one.
    """
    notes = []
    if same_as is not None:
        notes.append(f"the same as at {100 * same_as:g}%" if same_as else "nothing was removed")
    targets, min_kept = _targets(ranked, pools, level), ranked.min_kept
    if any(
        targets[pool] > ranked.sizes[pool] - min(min_kept[pool], ranked.num_alive[pool]) for pool in pools
    ):
        notes.append(f"floor={max(min_kept[pool] for pool in pools)} kept units that were to go")
    if any(ranked.num_alive[pool] and not kept[pool] for pool in pools):
        notes.append("nothing is left (layer collapse)")
    return tuple(notes)


def _checked_levels(levels: Iterable[float]) -> tuple[float, ...]:
    if isinstance(levels, str) or not np.iterable(levels):
        raise TypeError(f"levels must be one or more sparsities, got {shown(levels)}.")
    asked = tuple(check_sparsity(level, "levels") for level in levels)
    if not asked or asked[0] == 0 or any(a >= b for a, b in itertools.pairwise(asked)):
        raise ValueError(f"levels must be one or more sparsities in (0, 1), rising, got {asked}.")
    return asked


def _checked_at_once(at_once: Any, jit: bool) -> int:
    at_once = as_integer(at_once, "at_once", at_least=1, what="points per call")
    if at_once > 1 and not jit:
        raise ValueError(f"at_once={at_once} needs an evaluate that JAX can trace: leave out jit=False.")
    return at_once


def _checked_sets(together: Any) -> dict[str, tuple[str, ...]]:
    """Return, by the name of a set, the patterns of what is pruned together."""
    if not isinstance(together, Mapping) and together is not None:
        raise TypeError(f"together must be a dict of patterns by name, got {shown(together)}.")
    sets = {}
    for name, patterns in (together or {}).items():
        several = (patterns,) if isinstance(patterns, str) else patterns
        if not isinstance(several, Sequence) or not all(isinstance(each, str) for each in several):
            raise TypeError(f"together[{name!r}] must be one pattern or several, got {shown(patterns)}.")
        sets[name] = tuple(several)
    return sets


def _sets(
    together: Mapping[str, str | Sequence[str]] | None, pools: tuple[str, ...], families: Mapping[str, Family]
) -> dict:
    """Return, by name, the pools that are pruned together: the sets first, then each other pool alone."""
    sets: dict[str, tuple[str, ...]] = {}
    taken: dict[str, str] = {}
    for name, patterns in _checked_sets(together).items():
        found: list[str] = []
        for pattern in patterns:
            # Names of groups hold brackets, which patterns take for something else.
            matches = [pattern] if pattern in pools else fnmatch.filter(pools, pattern)
            if pattern in families:
                matches = list(families[pattern].names)
            if not matches:
                raise ValueError(
                    f"together[{name!r}] names {pattern!r}, which is none of {', '.join(pools)}."
                )
            found += [pool for pool in matches if pool not in found]
        for pool in found:
            if pool in taken:
                raise ValueError(f"together names {pool!r} twice, in {taken[pool]!r} and in {name!r}.")
            taken[pool] = name
        sets[name] = tuple(found)
    alone = [pool for pool in pools if pool not in taken]
    if clash := [pool for pool in alone if pool in sets]:
        raise ValueError(
            f"together has a set named as {clash[0]!r}, which is not in it. Choose another name."
        )
    return sets | {pool: (pool,) for pool in alone}


def _targets(ranked: RankedUnits, pools: Sequence[str], level: float) -> dict[str, int]:
    """Return how many units of each pool should be removed, those pruned before included."""
    return target_counts(level, {pool: ranked.sizes[pool] for pool in pools}, ranked.structure, "layerwise")


def _evaluate_each(
    evaluate: Callable[..., Any],
    inputs: tuple[Any, ...],
    ranked: RankedUnits,
    all_counts: Sequence[Counts],
    metric: str | None,
) -> Iterator[_Evaluation]:
    """Evaluate the network without so many units, for several such counts one after the other."""
    for counts in all_counts:
        params, left = ranked.pruned(counts)
        yield _Evaluation(_floats(_by_name(evaluate(params, *inputs), metric)), left)


def _evaluate_compiled(
    evaluate: Callable[..., Any],
    inputs: tuple[Any, ...],
    ranked: RankedUnits,
    all_counts: Sequence[Counts],
    per_call: int,
    at_once: int,
    metric: str | None,
) -> Iterator[_Evaluation]:
    """Evaluate the network without so many units, for several such counts in a loop of one program."""
    sweep, structure = _sweep_of(evaluate), ranked.structure
    at_once = min(at_once, len(all_counts))
    rounds = -(-per_call // at_once)
    static = (pooling(structure), ranked.chosen, structure.spans_leaves, at_once, metric)
    for start in range(0, len(all_counts), rounds * at_once):
        some = all_counts[start : start + rounds * at_once]
        counts = np.zeros((rounds * at_once, len(all_counts[0])), np.int32)
        counts[: len(some)] = some
        due = np.int32(-(-len(some) // at_once))
        with _explained_if_not_traceable():
            outputs = sweep(
                ranked.params,
                ranked.inputs(),
                counts.reshape(rounds, at_once, -1),
                due,
                inputs,
                *static,
            )
        # From (rounds, at_once) to one axis.
        figures, left = jax.tree.map(np.concatenate, jax.device_get(outputs))
        for index, row in enumerate(some):
            of_row = {name: values[index] for name, values in figures.items()}
            yield _Evaluation(_floats(of_row), ranked.num_left(row, None if left is None else left[index]))


_SWEEPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The compiled sweep of each `evaluate`, as long as that exists: another seed needs no compiling."""


def _sweep_of(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Return `sweep(params, ranked, counts, due, inputs, *static)`, which gives figures and units left.

    Counts have the shape (rounds, at_once, pools), and the first `due` rounds are evaluated; the results have
    the first two of these axes.
    """
    try:
        found, alive = _SWEEPS.get(evaluate), weakref.ref(evaluate)
    except TypeError:  # no hash, or no weak references
        found, alive = None, lambda: evaluate
    if found is not None:
        return found

    def sweep(params, ranked, counts, due, inputs, pool_units, chosen, count_left, at_once, metric):
        function: Any = alive()
        scores, masks, ranks = ranked

        def one(row):
            pruned, left = pruned_params(params, scores, masks, ranks, row, pool_units, chosen, count_left)
            return _by_name(function(pruned, *inputs), metric), left

        def several(rows):
            # A batch of one is not vectorised: XLA runs a batch of one convolution slower than one.
            if at_once > 1:
                return jax.vmap(one)(rows)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], one(rows[0]))

        def body(number, found):
            return jax.tree.map(lambda all_, new: all_.at[number].set(new), found, several(counts[number]))

        shapes = jax.eval_shape(several, counts[0])
        nothing = jax.tree.map(lambda leaf: jnp.zeros((len(counts), *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, due, body, nothing)

    compiled = jax.jit(sweep, static_argnums=(5, 6, 7, 8, 9))
    with contextlib.suppress(TypeError):
        _SWEEPS[evaluate] = compiled
    return compiled


@contextlib.contextmanager
def _explained_if_not_traceable() -> Iterator[None]:
    try:
        yield
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            "evaluate cannot be traced: it looks at values, as float(...), numpy and `if` do. Leave that to "
            f"after the analysis, or pass jit=False to call it as it is. ({str(error).splitlines()[0]})"
        ) from error


def _by_name(figures: Any, metric: str | None) -> dict[str, Any]:
    """Return what `evaluate` returned, by name, checked.

    Raises:
      ValueError: a dict without `metric`.
      TypeError: something other than real scalars.
    """
    if not isinstance(figures, Mapping):
        figures = {metric or "metric": figures}
    elif metric not in figures:
        raise ValueError(
            f"evaluate returns {', '.join(map(str, figures))}; metric= must say which of them counts, "
            f"got {metric!r}."
        )
    for name, value in figures.items():
        array = value if is_array(value) else np.asarray(value)
        real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
        if array.shape != () or not real:
            got = describe(array) if is_array(value) else type(value).__name__
            raise TypeError(
                f"evaluate must return one real number, or a dict of them; {name!r} is {got}. For figures of "
                "single examples, return their mean."
            )
    return dict(figures)


def _floats(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}
