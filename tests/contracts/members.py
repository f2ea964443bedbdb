"""One table of every public score, structure, scope, schedule, distribution and Pruner.

Each member is a `Pruner` made for one small problem, with what is known of it beforehand: how many
units it removes at each call, whether it draws numbers, what it is blind to. `test_contracts` puts
all of them through the same checks, and fails when a public name is in no member's `covers`.

A new member is entered here and nowhere else: `entry_points` and `pruner_kinds` take what they need
from its signature and from this table.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from tests.contracts.problem import (
    CALLS,
    CHANNELS,
    COLUMNS,
    DEEP,
    ENTRIES,
    FLAT,
    Gone,
    Problem,
    analysed,
    analysed_by_hand,
    apart,
    apply_fn,
    below_a_deviation,
    calibrated,
    channels,
    coupled_channels,
    erk_by_hand,
    hidden,
    hidden_units,
    layers,
    loss_fn,
    of_what_remains,
    problem,
    size_of,
    together,
    weighed,
    weighed_by_hand,
    whole_layers,
)
from tests.oracles.brute_force import Spec, half_even
from tests.support.trees import path_of


class Member(NamedTuple):
    """A pruner, and what is known of it.

    Attributes:
      covers: the public names it stands for, as `test_contracts.public_members` has them.
      make: `make(problem, sparsity) -> Pruner`.
      gone: by call, how many units are gone; or a function of the params and the masks before. Of
        pruners that rewire, how many always are.
      sparsity: what `make` is given; None where the member sets its own.
      units: the oracle's structure, or a function of the masks that says which units are gone.
      widths: of the network.
      given: which parts of the problem `update` gets.
      random: whether other keys give other masks.
      blind: what may be put in another order, and the masks follow: the "entries" of each kernel, its
        "columns" alone, or hidden "channels" throughout the network; else why nothing may.
      half: why masks of bfloat16 params may differ from those of float32; empty if they may not.
      double: the same of float64.
      unsharded: why masks may be sharded otherwise than their params; empty if they may not.
      table_of: the member whose program it shares, but for the numbers in its table of targets; what
        takes a program of its own is then checked of that one alone.
      warns: what it warns of outside `jit`.
      compiles_eagerly: whether its score has loops, which JAX compiles at every call outside `jit`; with
        other sorts of trees than dicts it is then only traced.
    """

    covers: tuple[str, ...]
    make: Callable[[Problem, Any], jp.Pruner]
    gone: Any
    sparsity: Any = jp.schedules.linear(0.6, begin_step=1, end_step=3, initial_sparsity=0.2)
    units: Spec | Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = Spec()
    widths: tuple[int, ...] = FLAT
    given: tuple[str, ...] = ("grads", "key", "batch", "batches", "activations")
    random: bool = False
    blind: str = "entries"
    half: str = ""
    double: str = ""
    unsharded: str = ""
    table_of: str = ""
    warns: str | None = None
    compiles_eagerly: bool = False


COUPLED = "the mask of one leaf follows from another's scores, and XLA may shard it as these are"
LAID_OUT = "weights are laid end to end, and XLA chooses how to shard what comes of them"
ROUNDED = "gradients are rounded to the params' dtype"
DRAWN = "numbers are drawn by position"


def _of_score(name: str, score: Any, **known: Any) -> Member:
    """A score of entries, ranked over all leaves together."""
    make = lambda p, s: jp.pruner(score, s)  # noqa: E731
    return Member((f"scores.{name}",), make, together(ENTRIES), **known)


def _of_channel_score(name: str, score: Any, sizes: Mapping[str, int] = COLUMNS) -> Member:
    """A score of whole channels, taken back by slices."""
    filters = jp.structures.slices(norm=math.inf)

    def make(p: Problem, s: Any) -> jp.Pruner:
        where = jp.matching(*(path_of(p.params, role) for role in sizes))
        return jp.pruner(score, s, structure=filters, where=where, scope="layerwise")

    return Member((f"scores.{name}",), make, apart(sizes), units=Spec("slices", axes=(-1,)), blind="channels")


def _of_calibrated_score(name: str) -> Member:
    """A score that reads statistics, which are those of the first problem for all."""
    score = getattr(jp.scores, name)

    def make(p: Problem, s: Any) -> jp.Pruner:
        stats = calibrated(jax.tree.structure(p.params))
        return jp.pruner(functools.partial(score, stats=stats), s, scope="layerwise")

    return Member((f"scores.{name}",), make, apart(ENTRIES), blind="columns")


def _of_structure(name: str, structure: jp.Structure, gone: list[Gone], units: Any, **known: Any) -> Member:
    make = lambda p, s: jp.pruner(jp.scores.magnitude, s, structure=structure)  # noqa: E731
    return Member((f"structures.{name}",), make, gone, **({"units": units, "blind": "channels"} | known))


def _of_channels(scope: str, gone: list[Gone], **options: Any) -> Member:
    return Member(
        ("structures.channels", f"scope {scope}"),
        lambda p, s: jp.pruner(
            jp.scores.magnitude, s, structure=channels(jax.tree.structure(p.params), **options), scope=scope
        ),
        gone,
        units=coupled_channels,
        widths=DEEP,
        blind="channels",
        unsharded=COUPLED,
    )


def _of_schedule(name: str, sparsity: Any, gone: list[Gone], table_of: str = "", **options: Any) -> Member:
    make = lambda p, s: jp.pruner(jp.scores.magnitude, s, **options)  # noqa: E731
    cover = "Schedule" if name == "Schedule" else f"schedules.{name}"
    return Member((cover,), make, gone, sparsity, table_of=table_of)


def _of_targets(
    name: str, targets: Callable[[Problem], Any], by_hand: Mapping[str, float], table_of: str = ""
) -> Member:
    return Member(
        (f"distributions.{name}",),
        lambda p, s: jp.pruner(jp.scores.magnitude, targets(p), scope="layerwise"),
        apart(ENTRIES, *[by_hand] * CALLS),
        None,
        table_of=table_of,
    )


def _joined(some: list[Gone], others: list[Gone]) -> list[Gone]:
    return [{**one, **other} for one, other in zip(some, others, strict=True)]


def _rewired(name: str, make: Callable[[Problem], jp.Pruner], **known: Any) -> Member:
    gone: list[Gone] = [{("a/kernel",): 16, ("b/kernel",): 12}] * CALLS
    return Member((name,), lambda p, s: make(p), gone, None, **known)


def once(prune: Callable[..., Any]) -> jp.Pruner:
    """A pruner that calls `prune(params, masks, **given)`, which gives the masks after."""

    def init(params: Any) -> jp.PrunerState:
        return jp.PrunerState(jp.ones_masks(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(state: jp.PrunerState, params: Any, **given: Any) -> jp.PrunerState:
        return state._replace(masks=prune(params, state.masks, **given), step=state.step + 1)

    return jp.Pruner(init, update, takes=frozenset())


def _rounds(params: Any, masks: Any, **given: Any) -> Any:
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.3))
    return jp.intersect(masks, jp.prune_rounds(params, pruner, 2, **given))


def _second_first(params: Any, **_: Any) -> Any:
    """The second kernel goes before any of the first."""
    second = path_of(params, "b/kernel")
    sizes = zip(jp.leaf_paths(params), jax.tree.leaves(jp.scores.magnitude(params)), strict=True)
    leaves = [w / 1024 if path == second else w for path, w in sizes]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _bn_scale(params: Any, **given: Any) -> Any:
    scales = {path_of(params, "a/kernel"): path_of(params, "a/scale")}
    return jp.scores.bn_scale(scales)(params, **given)


def _by_path(p: Problem, sparsity: Any) -> Any:
    """Targets by role, if that is what they are, as targets by the paths of the params."""
    if not isinstance(sparsity, Mapping):
        return sparsity
    return {path_of(p.params, role): value for role, value in sparsity.items()}


_ERRORS = {"a/kernel": {0.5: 1.0, 0.75: 3.0}, "b/kernel": {0.25: 0.1, 0.75: 3.0}}
_LINEAR = {"sparsity": 0.6, "begin_step": 1, "end_step": 3, "initial_sparsity": 0.2}
_RECIPE = {"prune": {"score": "lamp", "sparsity": {"linear": _LINEAR}, "scope": "layerwise"}}


def _two_sections(p: Problem) -> dict[str, Any]:
    first, second = (path_of(p.params, role) for role in ENTRIES)
    return {
        "prune": [
            {"score": "magnitude", "where": first, "sparsity": {"linear": _LINEAR}},
            {"score": "movement", "where": second, "sparsity": {"geometric": 0.4}, "memory": 1.0},
        ]
    }


_LOOPS = {"blind": "channels", "compiles_eagerly": True}
_EVERY = {"every": 1, "end_step": CALLS, "fraction": 0.6}
_NM = jp.structures.nm(2, 4)
ROW_GROUPS = Spec("nm", axes=(-2,), n=2, m=4)

TABLE: dict[str, Member] = {
    "magnitude": Member(
        ("scores.magnitude", "structures.elements", "scope global", "schedules.linear", "pruner"),
        lambda p, s: jp.pruner(jp.scores.magnitude, s, structure=jp.structures.elements(), scope="global"),
        together(ENTRIES),
    ),
    "normalized_magnitude": _of_score("normalized_magnitude", jp.scores.normalized_magnitude),
    "lamp": _of_score("lamp", jp.scores.lamp),
    "random": _of_score("random", jp.scores.random, random=True, blind=DRAWN),
    "gradient_magnitude": _of_score("gradient_magnitude", jp.scores.gradient_magnitude),
    "taylor": _of_score("taylor", jp.scores.taylor, half="the products are rounded"),
    "signed_taylor": _of_score("signed_taylor", jp.scores.signed_taylor),
    "snip": _of_score("snip", jp.scores.snip),
    "movement": _of_score("movement", jp.scores.movement),
    "grasp": _of_score("grasp", jp.scores.grasp(loss_fn), blind="channels", half=ROUNDED),
    "fisher": _of_score("fisher", jp.scores.fisher(loss_fn), half=ROUNDED, **_LOOPS),
    "obd": _of_score("obd", jp.scores.obd(loss_fn), half=ROUNDED, **_LOOPS),
    "obd estimated": _of_score(
        "obd",
        jp.scores.obd(loss_fn, samples=2),
        random=True,
        half=ROUNDED,
        double="random signs are drawn in the dtype of the weights",
        **_LOOPS | {"blind": DRAWN},
    ),
    "obs": _of_score("obs", jp.scores.obs(loss_fn, damping=20.0), half=ROUNDED, unsharded=LAID_OUT, **_LOOPS),
    "brute_force": _of_score("brute_force", jp.scores.brute_force(loss_fn), unsharded=LAID_OUT, **_LOOPS),
    "over_batches": _of_score(
        "over_batches", jp.scores.over_batches(jp.scores.taylor, loss_fn), half=ROUNDED, **_LOOPS
    ),
    "synflow": _of_score(
        "synflow", jp.scores.synflow(apply_fn, jnp.ones((2, 4))), blind="channels", half=ROUNDED
    ),
    "wanda": _of_calibrated_score("wanda"),
    "ria": _of_calibrated_score("ria"),
    "flap": _of_calibrated_score("flap"),
    "obs_diagonal": _of_calibrated_score("obs_diagonal"),
    "each output": Member(
        ("scope output",),
        lambda p, s: jp.pruner(jp.scores.magnitude, s, scope="output"),
        [
            {("a/kernel",): 8 * half_even(s, 4), ("b/kernel",): 3 * half_even(s, 8)}
            for s in (0.2, 0.4, 0.6, 0.6)
        ],
        blind="columns",
    ),
    "fpgm": _of_channel_score("fpgm", jp.scores.fpgm),
    "bn_scale": _of_channel_score("bn_scale", _bn_scale, {"a/kernel": 8}),
    "apoz": _of_channel_score("apoz", jp.scores.apoz),
    "mean_activation": _of_channel_score("mean_activation", jp.scores.mean_activation),
    "slices": _of_structure(
        "slices", jp.structures.slices(norm=2), together(COLUMNS), Spec("slices", axes=(-1,))
    ),
    "blocks": _of_structure(
        "blocks",
        jp.structures.blocks((2, 2)),
        together({"a/kernel": 8, "b/kernel": 8}),
        Spec("blocks", axes=(-2, -1), sides=(2, 2)),
        blind="a block is of neighbours",
    ),
    "nm": _of_structure(
        "nm",
        _NM,
        together({"a/kernel": 8, "b/kernel": 6}, (0.2, 0.6, 1.0, 1.0)),
        ROW_GROUPS,
        blind="columns",
        sparsity=jp.schedules.linear(0.5, begin_step=1, end_step=3, initial_sparsity=0.1),
    ),
    "a structure of one's own": Member(
        ("Structure",),
        lambda p, s: jp.pruner(jp.scores.magnitude, s, structure=hidden(jax.tree.structure(p.params))),
        together({"hidden": 8}),
        units=hidden_units,
        blind="channels",
    ),
    "channels": _of_channels("global", together(CHANNELS))._replace(
        warns=r"floor=1 kept the last units of c/kernel\[1\]"
    ),
    "channels by group": _of_channels("layerwise", apart(CHANNELS)),
    "channels of a kind": _of_channels(
        "isomorphic", _joined(together({"a/kernel[1]": 8, "b/kernel[1]": 8}), together({"c/kernel[1]": 4}))
    ),
    "channels in pairs": _of_channels(
        "layerwise",
        # What stays of 8, 8 and 4 is rounded up to an even number.
        [
            {("a/kernel[1]",): a, ("b/kernel[1]",): b, ("c/kernel[1]",): c}
            for a, b, c in ((2, 2, 0), (2, 2, 2), (4, 4, 2), (4, 4, 2))
        ],
        multiple_of=2,
    ),
    "layers": Member(
        ("structures.layers",),
        lambda p, s: jp.pruner(jp.scores.magnitude, s, structure=layers(jax.tree.structure(p.params))),
        together({"layers": 4}),
        units=whole_layers,
        widths=DEEP,
        blind="channels",
        unsharded=COUPLED,
    ),
    "constant": _of_schedule(
        "constant", jp.schedules.constant(0.3), of_what_remains(0.3, 56), of="remaining"
    ),
    "one_shot": _of_schedule(
        "one_shot", jp.schedules.one_shot(0.5, 2), together(ENTRIES, (0.0, 0.5, 0.5, 0.5)), "magnitude"
    ),
    "cubic": _of_schedule(
        "cubic", jp.schedules.cubic(0.8, end_step=4), together(ENTRIES, (0.0, 0.7, 0.7, 0.8)), every=2
    ),
    "geometric": _of_schedule(
        "geometric", jp.schedules.geometric(0.4, stop=0.75), together(ENTRIES, (0.4, 0.64, 0.75, 0.75))
    ),
    "a schedule of one's own": _of_schedule(
        "Schedule",
        jp.Schedule(lambda t: 0.2 * (t // 2), 0, 4),
        together(ENTRIES, (0.0, 0.2, 0.2, 0.4)),
        "magnitude",
    ),
    "schedules by path": Member(
        ("scope layerwise",),
        lambda p, s: jp.pruner(jp.scores.magnitude, _by_path(p, s), scope="layerwise"),
        apart(ENTRIES, *({"a/kernel": s, "b/kernel": s / 2} for s in (0.0, 0.8, 0.8, 0.8))),
        {path: jp.schedules.one_shot(s, 2) for path, s in (("b/kernel", 0.4), ("a/kernel", 0.8))},
    ),
    "uniform": _of_targets(
        "uniform", lambda p: jp.distributions.uniform(p.params, 0.6), dict.fromkeys(ENTRIES, 0.6)
    ),
    "erk": _of_targets("erk", lambda p: jp.distributions.erk(p.params, 0.6), erk_by_hand(0.6), "uniform"),
    "from_sensitivity": _of_targets(
        "from_sensitivity", lambda p: analysed(jax.tree.structure(p.params)), analysed_by_hand(), "uniform"
    ),
    "owl": _of_targets("owl", lambda p: weighed(jax.tree.structure(p.params)), weighed_by_hand(), "uniform"),
    "from_errors": _of_targets(
        "from_errors",
        lambda p: jp.distributions.from_errors(_by_path(p, _ERRORS), p.params, 0.6),
        {"a/kernel": 0.5, "b/kernel": 0.25 + (0.6 * 56 - 16 - 6) / 24},
        "uniform",
    ),
    "sigma": Member(
        ("distributions.sigma",),
        lambda p, s: once(
            lambda params, masks, **given: jp.prune_once(
                params, jp.scores.magnitude, threshold=jp.distributions.sigma(params, 0.5), masks=masks
            )
        ),
        below_a_deviation,
        None,
    ),
    "a count": Member(
        ("prune_once",),
        lambda p, s: once(
            lambda params, masks, **given: jp.prune_once(
                params, jp.scores.taylor, count=9, masks=masks, **given
            )
        ),
        [{tuple(ENTRIES): 9 * call} for call in range(1, CALLS + 1)],
        None,
        half="the products are rounded",
    ),
    "prune_rounds": Member(
        ("prune_rounds",), lambda p, s: once(_rounds), together(ENTRIES, (0.51,) * CALLS), None
    ),
    "memory": Member(
        ("pruner",), lambda p, s: jp.pruner(jp.scores.movement, s, memory=1.0), together(ENTRIES)
    ),
    "a stop": _of_schedule(
        "geometric",
        jp.schedules.geometric(0.4),
        together(ENTRIES, (0.4, 0.64, 0.7, 0.7)),
        "geometric",
        stop=0.7,
    ),
    "a floor": Member(
        ("pruner",),
        lambda p, s: jp.pruner(_second_first, s, floor=3),
        # All 24 of the second kernel would go before any of the first.
        [{("a/kernel",): a, ("b/kernel",): b} for a, b in ((0, 11), (1, 21), (13, 21), (13, 21))],
        warns="floor=3 kept the last units of b/kernel",
    ),
    "rigl": _rewired("rigl", lambda p: jp.rigl(p.masks, **_EVERY)),
    "rigl in groups": _rewired("rigl", lambda p: jp.rigl(p.masks, structure=_NM, **_EVERY), blind="columns"),
    "set_": _rewired(
        "set_", lambda p: jp.set_(p.masks, seed=p.key, **_EVERY), given=(), random=True, blind=DRAWN
    ),
    "rewiring": _rewired(
        "rewiring",
        lambda p: jp.rewiring(
            p.masks, grow=lambda params, *, grads, **_: grads, drop=jp.scores.lamp, **_EVERY
        ),
    ),
    "a recipe": Member(
        ("recipes.Recipe.pruner",),
        lambda p, s: jp.recipes.parse(_RECIPE).pruner(p.params),
        apart(ENTRIES),
        None,
    ),
    "a recipe of two sections": Member(
        ("recipes.Recipe.pruner",),
        lambda p, s: jp.recipes.parse(_two_sections(p)).pruner(p.params),
        _joined(together({"a/kernel": 32}), together({"b/kernel": 24}, (0.4, 0.64, 0.784, 1 - 0.6**4))),
        None,
    ),
}


# --- what cannot be done, and says so


class Refusal(NamedTuple):
    """Why something cannot have a property of the table, how one would try, and what is said then."""

    why: str
    attempt: Callable[[], Any]
    error: type[Exception]
    says: str


def _once(**options: Any) -> Callable[[Any], Any]:
    return lambda params: jp.prune_once(params, jp.scores.magnitude, **options)


_TRACED = (TypeError, "must be a Python number, not a traced value")

REFUSALS: dict[str, Refusal] = {
    "sensitivity, and so from_sensitivity, under jit": Refusal(
        "it ranks and counts on the host, so that one ranking serves all levels",
        lambda: jax.jit(lambda p: jp.sensitivity(size_of, p).dense)(problem(0).params),
        TypeError,
        "cannot run under jit or vmap",
    ),
    "a sparsity that is traced": Refusal(
        "counts are worked out exactly, in double precision, on the host",
        lambda: jax.jit(lambda s: _once(sparsity=s)(problem(0).params))(0.5),
        *_TRACED,
    ),
    "a schedule to a traced sparsity": Refusal(
        "its targets are tabulated on the host",
        lambda: jax.jit(lambda s: jp.schedules.cubic(s, end_step=3)(1))(0.5),
        *_TRACED,
    ),
    "a distribution of a traced sparsity": Refusal(
        "it is solved on the host",
        lambda: jax.jit(lambda s: jp.distributions.erk(problem(0).params, s))(0.5),
        *_TRACED,
    ),
    "a fraction of what traced masks leave": Refusal(
        "how many are left is not known when the count is made; a pruner keeps it in its table",
        lambda: jax.jit(
            lambda m: jp.prune_once(problem(0).params, jp.scores.magnitude, 0.5, of="remaining", masks=m)
        )(problem(0).masks),
        TypeError,
        "of='remaining' counts what is left on the host, but the masks are traced",
    ),
    "rewiring of coupled channels": Refusal(
        "dropping and growing are done leaf by leaf, and a channel spans several",
        lambda: jp.rigl(
            problem(0, DEEP).masks, structure=channels(jax.tree.structure(problem(0, DEEP).params)), **_EVERY
        ),
        ValueError,
        "units that span several leaves",
    ),
    "scope isomorphic without channels": Refusal(
        "only groups of coupled channels have kinds",
        lambda: _once(sparsity=0.5, scope="isomorphic")(problem(0).params),
        ValueError,
        "scope='isomorphic' ranks coupled channels",
    ),
}
