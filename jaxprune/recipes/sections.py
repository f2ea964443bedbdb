"""A section of a recipe: what to prune, where and how much, and the `Pruner` for it."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import distributions, schedules, structures
from jaxprune.graph.grouping import channel_groups
from jaxprune.pruning import dynamic
from jaxprune.pruning.extras import unread
from jaxprune.pruning.gradual import pruner
from jaxprune.pruning.once import prune_once
from jaxprune.pruning.table import with_rows
from jaxprune.pruning.targets import competing_pools, per_pool, target_counts
from jaxprune.recipes.document import Node, unknown
from jaxprune.recipes.options import (
    Call,
    attempt,
    check_pattern,
    check_patterns,
    defined_in,
    inputs_of,
    named,
    public_scores,
    read,
    read_score,
)
from jaxprune.schedules import Schedule
from jaxprune.scores import magnitude
from jaxprune.structures import elements
from jaxprune.structures.base import Structure
from jaxprune.tree.masks import intersect
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.stacks import Stacked
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Params, Progress, Pruner, PrunerState, ScoreFn, Where

# `score` stands for `scores`; `stop` belongs to the recipe as a whole.
_PRUNER = {
    name: parameter.annotation
    for name, parameter in inspect.signature(pruner).parameters.items()
    if name not in ("scores", "sparsity", "structure", "stop", "masks")
}
_KEYS = ("score", "sparsity", "structure", *_PRUNER, "rewire")
_REWIRED = ("score", "sparsity", "structure", "scope", "where", "floor", "seed", "stacked", "rewire")

STRUCTURES = {
    name: getattr(structures, name)
    for name in structures.__all__
    if inspect.isfunction(getattr(structures, name))
}
_SCHEDULES = defined_in(schedules, lambda signature: signature.return_annotation is Schedule)
_DISTRIBUTIONS = defined_in(
    distributions,
    lambda s: next(iter(s.parameters), "") == "params" and s.return_annotation == dict[str, float],
)
_DYNAMIC = {
    name.rstrip("_"): function
    for name, function in defined_in(dynamic, lambda s: s.return_annotation is Pruner).items()
}


class Targets(NamedTuple):
    """How much to prune: the value of `sparsity`.

    Attributes:
      of: `of(params, where, stacked=None)` returns the `sparsity` of `jaxprune.pruner`.
      each: the schedules and numbers in it that are known without params.
      by_path: whether it is a dict by path.
      node: where it is written.
    """

    of: Callable[..., Any]
    each: tuple[float | Schedule, ...]
    by_path: bool
    node: Node

    @property
    def schedules(self) -> list[Schedule]:
        """The schedules in it."""
        return [each for each in self.each if isinstance(each, Schedule)]

    @property
    def ends(self) -> list[float]:
        """The numbers, and the last sparsity of each schedule that has an end."""
        last = []
        for each in self.each:
            if not isinstance(each, Schedule):
                last.append(each)
            elif each.end_step is not None:
                last.append(each.on_host(each.end_step))
        return last


class Section(NamedTuple):
    """One pruner's part of a recipe.

    Attributes:
      score: the score.
      targets: how much to prune.
      structure: the structure; None for single entries.
      options: the other arguments of `jaxprune.pruner` that are written.
      rewire: the pruner that moves masks which the rest of the section makes once; None if there is none.
      node: where it is written.
    """

    score: Call
    targets: Targets
    structure: Call | None
    options: dict[str, Any]
    rewire: Call | None
    node: Node

    @property
    def where(self) -> Where:
        """Which leaves take part."""
        return self.options.get("where", kernels)

    @property
    def end_step(self) -> int | None:
        """The step at which it ends; None if it counts levels."""
        if self.rewire is not None:
            return self.rewire.options.get("end_step")
        return next((schedule.end_step for schedule in self.targets.schedules), None)

    @property
    def once(self) -> bool:
        """Whether one update prunes everything: a plain number, or one by path, of the total."""
        total = self.options.get("of", "total") == "total"
        return self.rewire is None and not self.targets.schedules and total

    def pruner(self, params: Params, given: Mapping[str, Any], stop: float | None, key: Any) -> Pruner:
        """Return the pruner of the section."""
        stacked = self.options.get("stacked")
        given = {**given, "where": self.where} | ({} if stacked is None else {"stacked": stacked})
        attempt(self._at("where"), lambda: selected(params, self.where))
        if "where" in self.node.value:
            check_patterns(self._at("where"), leaf_paths(params))
        if stacked is not None:
            for pattern, node in self._at("stacked").mapping().items():
                check_pattern(node, pattern, leaf_paths(params))
        structure = self._structure(params, given)
        targets = attempt(self.targets.node, lambda: self.targets.of(params, self.where, stacked))
        score = self.score.make(given)
        self._try_out(params, targets, structure)
        if self.rewire is None:
            return pruner(score, targets, structure=structure, stop=stop, **self.options)
        return self._rewired(params, score, targets, structure, {**given, "key": key})

    def _at(self, name: str) -> Node:
        return self.node.value.get(name, self.node)

    def _structure(self, params: Params, given: Mapping[str, Any]) -> Structure:
        if self.structure is None:
            return elements()
        apply_fn, x = given.get("apply_fn"), given.get("x")
        if "groups" in self.structure.needs and given.get("groups") is None and apply_fn is not None:
            if x is None:
                self.structure.node.fail("apply_fn is given and x is not: pass x=..., an example input.")
            stacked = given.get("stacked")
            groups = attempt(
                self.structure.node, lambda: channel_groups(apply_fn, params, x, stacked=stacked)
            )
            given = {**given, "groups": groups}
        return self.structure.make(given)

    def _try_out(self, params: Params, targets: Any, structure: Structure) -> None:
        """Trace an update by magnitude, so that what does not fit the params is found before any training."""
        options = {**self.options, "memory": 0.0}
        stand_in = pruner(magnitude, targets, structure=structure, **options)

        def update(params: Params) -> Any:
            return stand_in.update(stand_in.init(params), params)

        with warnings.catch_warnings():  # the pruner itself warns again
            warnings.simplefilter("ignore")
            attempt(self.node, lambda: jax.eval_shape(update, params))

    def _rewired(
        self, params: Params, score: ScoreFn, targets: Any, structure: Structure, given: Mapping[str, Any]
    ) -> Pruner:
        assert self.rewire is not None
        options = {name: value for name, value in self.options.items() if name != "seed"}
        key = given["key"]
        own = jax.random.key(self.options.get("seed", 0)) if key is None else key
        masks = attempt(
            self.node, lambda: prune_once(params, score, targets, structure=structure, key=own, **options)
        )
        return self.rewire.make({**given, "masks": masks, "structure": structure})


def read_section(node: Node, scores: Mapping[str, ScoreFn] | None) -> Section:
    """Read a section, and check it as far as that is possible without params."""
    rewired = isinstance(node.value, dict) and "rewire" in node.value
    fields = node.fields(_REWIRED if rewired else _KEYS, ("score", "sparsity"))
    options = {name: read(fields[name], hint) for name, hint in _PRUNER.items() if name in fields}
    for name, value in options.items():
        attempt(fields[name], lambda name=name, value=value: pruner(magnitude, 0.5, **{name: value}))
    structure = None
    if "structure" in fields:
        structure = named(fields["structure"], STRUCTURES, "structures")
    rewire = None
    if rewired:
        rewire = named(
            fields["rewire"], _DYNAMIC, "ways to rewire", hidden=("masks", "structure", "where", "stacked")
        )
        rewire = rewire._replace(inputs=("masks", "structure"))
        if rewire.needs == {"masks", "structure"}:  # then the smallest masks will do to check its options
            rewire.make({"masks": {"kernel": np.array([[True, False]])}, "structure": elements()})
    targets = read_targets(fields["sparsity"])
    section = Section(read_score(fields["score"], scores), targets, structure, options, rewire, node)
    _check(section, fields)
    return section


def _check(section: Section, fields: Mapping[str, Node]) -> None:
    """Check the parts of a section together, as far as that is possible without params."""
    known = section.structure is None or not section.structure.needs
    structure = section._structure({}, {}) if known else None
    scope = section.options.get("scope", "global")
    if structure is not None:
        attempt(fields.get("scope", section.node), lambda: competing_pools((), structure, scope))
    targets = section.targets
    if targets.by_path:
        attempt(targets.node, lambda: per_pool({"": 0}, {"": 0}, "sparsity", None, scope))
    if section.rewire is not None and targets.schedules:
        targets.node.fail("the masks that are rewired are made once: give a number, no schedule.")
    for sparsity in targets.ends:
        attempt(
            targets.node, lambda s=sparsity: target_counts(s, {"": 100}, structure or elements(), "layerwise")
        )


def read_targets(node: Node) -> Targets:
    """Read a number, a schedule, a distribution over leaves, or `per_path`, numbers and schedules by path."""
    if not isinstance(node.value, dict):
        value = float(node.number())
        attempt(node, lambda: schedules.check_sparsity(value))
        return Targets(lambda params, where, stacked=None: value, (value,), False, node)
    name = next(iter(node.value), "")
    if len(node.value) == 1 and name == "per_path":
        return _per_path(node.value[name])
    if len(node.value) == 1 and name in _DISTRIBUTIONS:
        # The section gives `params`, `where` and `stacked`.
        call = named(node, _DISTRIBUTIONS, "distributions", hidden=("params", "where", "stacked"))
        call = call._replace(inputs=("params",))
        value = call.options.get("sparsity")
        if value is not None:
            attempt(call.node, lambda: schedules.check_sparsity(value))
        each = () if value is None else (value,)

        def shared_out(params: Params, where: Where, stacked: Stacked | None = None) -> dict[str, float]:
            return call.make({"params": params, "where": where, "stacked": stacked})

        return Targets(shared_out, each, True, node)
    if len(node.value) != 1 or name not in _SCHEDULES:
        known = ["per_path", *_SCHEDULES, *_DISTRIBUTIONS]
        if len(node.value) == 1:
            node.value[name].fail(unknown(name, known, "keys"))
        node.fail(f"expected a number, or one of {', '.join(known)}; got {node.described()}.")
    return _schedule(node, name)


def _schedule(node: Node, name: str) -> Targets:
    inner = node.value[name]
    target = inner.value.get("sparsity") if isinstance(inner.value, dict) else None
    if target is None or not isinstance(target.value, dict):
        schedule = named(node, _SCHEDULES, "schedules").make({})
        return Targets(lambda params, where, stacked=None: schedule, (schedule,), False, node)
    # Each leaf has the same schedule, with another target.
    targets = read_targets(target)
    if not targets.by_path or targets.schedules:
        target.fail("expected a number, a distribution or per_path with numbers.")
    plain = inner._replace(value={**inner.value, "sparsity": target._replace(value=0.0)})
    first = named(node._replace(value={name: plain}), _SCHEDULES, "schedules")

    def to(sparsity: float) -> Schedule:
        return first._replace(options={**first.options, "sparsity": sparsity}).make({})

    def of(params: Params, where: Where, stacked: Stacked | None = None) -> dict[str, Schedule]:
        return {path: to(s) for path, s in targets.of(params, where, stacked).items()}

    each = tuple(to(value) for value in targets.each if isinstance(value, float))
    return Targets(of, each, True, node)


def _per_path(node: Node) -> Targets:
    leaves = {path: read_targets(inner) for path, inner in node.mapping().items()}
    if not leaves:
        node.fail("it is empty, so nothing would be pruned.")
    for path, targets in leaves.items():
        if targets.by_path:
            node.value[path].fail("expected a number or a schedule.")
    each = tuple(value for targets in leaves.values() for value in targets.each)
    by_path = {path: targets.each[0] for path, targets in leaves.items()}
    attempt(node, lambda: pruner(magnitude, by_path))
    return Targets(lambda params, where, stacked=None: by_path, each, True, node)


def inputs() -> list[str]:
    """Return the names of all inputs that some recipe may need from Python."""
    return sorted({"apply_fn", "x"} | inputs_of([*public_scores().values(), *STRUCTURES.values()]))


def combined(sections: list[tuple[Pruner, Where]]) -> Pruner:
    """Return several pruners of disjoint leaves as one.

    They share their masks, so that entries that one prunes in the leaves of another (coupled channels) count
    there too. The state is a `PrunerState` whose `row` has an entry for each pruner, and whose scores are,
    leaf by leaf, those of the pruner that the leaf takes part in.
    """
    if len(sections) == 1:
        return sections[0][0]
    pruners = [each for each, _ in sections]
    remembers = any(each.remembers for each in pruners)
    each_takes = [each.takes for each in pruners if each.takes is not None]
    takes = frozenset().union(*each_takes) if len(each_takes) == len(pruners) else None

    def merged(params: Params, old: Any, new: Any, where: Where) -> Any:
        leaves = zip(leaf_paths(params), *map(jax.tree.leaves, (params, old, new)), strict=True)
        chosen = [after if where(path, leaf) else before for path, leaf, before, after in leaves]
        return jax.tree.unflatten(jax.tree.structure(params), chosen)

    def init_fn(params: Params) -> PrunerState:
        states = [each.init(params) for each in pruners]
        masks = intersect(*[state.masks for state in states])
        kept = [state.scores for each, state in zip(pruners, states, strict=True) if each.remembers]
        rows = jnp.stack([state.row for state in states])
        numbers = jnp.stack([jnp.asarray(state.schedule, jnp.int32) for state in states])
        return PrunerState(masks, states[0].step, rows, kept[0] if kept else (), numbers)

    def update_fn(state: PrunerState, params: Params, grads: Any = None, key: Any = None, **extra: Any):
        if takes is not None and (unknown := [name for name in extra if name not in takes]):
            raise unread(unknown[0], "the recipe's pruner", "nor does a score of its sections", takes)
        state = with_rows(state, (len(pruners),))
        masks, scores, rows, numbers = state.masks, state.scores, [], []
        step = state.step
        for number, (each, where) in enumerate(sections):
            own = state._replace(
                masks=masks,
                row=state.row[number],
                scores=state.scores if each.remembers else (),
                schedule=state.schedule[number],
            )
            read = {name: x for name, x in extra.items() if each.takes is None or name in each.takes}
            own = each.update(own, params, grads=grads, key=key, **read)
            masks, step = own.masks, own.step
            rows.append(own.row)
            numbers.append(own.schedule)
            if each.remembers:
                scores = merged(params, scores, own.scores, where)
        return PrunerState(masks, step, jnp.stack(rows), scores, jnp.stack(numbers), state.dense)

    def progress(masks: Any) -> Progress:
        parts = [each.progress(masks) for each in pruners if each.progress is not None]
        asked = [part.asked for part in parts if part.asked is not None]
        units = list(dict.fromkeys(part.unit for part in parts))
        return Progress(
            units[0] if len(units) == 1 else "units of several kinds",
            sum(part.kept for part in parts),
            sum(part.size for part in parts),
            sum(asked) if len(asked) == len(parts) else None,
            {path: axes for part in parts for path, axes in part.stacks.items()},
        )

    return Pruner(
        init_fn,
        update_fn,
        any(each.regrows for each in pruners),
        remembers,
        description="; ".join(each.description for each in pruners),
        takes=takes,
        compounds=any(each.compounds for each in pruners),
        where=lambda path, leaf: any(where(path, leaf) for _, where in sections),
        progress=progress if all(each.progress is not None for each in pruners) else None,
    )
