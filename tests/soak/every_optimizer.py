"""Every optimizer of optax inside every kind of pruner: 200 steps of random gradients.

Gradients come with bursts of zeros, of NaN and infinity under `optax.apply_if_finite`, and of huge
numbers. Of each pair it is checked that what is pruned is 0 after every step, that counts are those
of the schedule, that masks are nested (or their counts constant), that the survivors go the way of
the plain optimizer on the masked problem, and that the state goes through msgpack and orbax at
random steps and continues to the bit.

    python -m tests.soak.every_optimizer --only adamw --kind taylor
"""

import argparse
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.quick import compile_quickly

if __name__ == "__main__":
    compile_quickly()

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxprune as jp
from tests.contracts.optimizers import (
    OPTIMIZERS,
    Case,
    assert_as_new_where_pruned,
    assert_state_zero_where_pruned,
    make_params,
    make_step,
    mask_of,
    networks,
)
from tests.contracts.pruner_kinds import Kind, kinds

# More errors in a row than any burst, or two that meet, has.
PATIENCE = 10

# What `optax.apply_if_finite` cannot hold, in either place: here gradients stay finite.
UNGUARDED = {
    "lookahead": "its updates are a pair, which apply_if_finite expects to be like the gradients",
    "lookahead reset": "as lookahead",
    "contrib.dpsgd": "its gradients have an axis of examples that its updates have not",
}
# What zero gradients break: here they are tiny instead.
NO_ZEROS = {"contrib.sam": "optax.contrib.normalize divides by their norm", "contrib.sam opaque": "as sam"}
# Where two programs, which round differently, part for good, and for how many steps they do not.
_SEARCH = "a line search compares losses, and the curvature it remembers magnifies what they differ by"
UNSTABLE = {"lbfgs": (10, _SEARCH), "lbfgs backtracking": (10, _SEARCH)}
# Kinds whose scores read gradients need one gradient, not one per example.
PER_EXAMPLE = ("contrib.dpsgd",)

FORMS = ("inside", "around")


class Draws(NamedTuple):
    """The random gradients of a run, by step, for the objective `sum(g p) + pull / 2 sum(p^2)`."""

    pull: np.ndarray
    grads: Any  # the linear part g, like the params, with axes of steps and examples in front

    @property
    def bad(self) -> np.ndarray:
        """Steps at which some gradient is not finite."""
        return ~np.all([np.isfinite(leaf).all(_after_first(leaf)) for leaf in jax.tree.leaves(self.grads)], 0)


def _after_first(leaf: np.ndarray) -> tuple[int, ...]:
    return tuple(range(1, leaf.ndim))


def objective(params: Any, batch: tuple[Any, Any]) -> jax.Array:
    """What a step minimises; its gradient is g + pull p."""
    pull, grads = batch
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
    return sum(
        jnp.sum(jnp.real(g.mean(0) * p)) + pull.mean() / 2 * jnp.sum(jnp.real(p * jnp.conj(p)))
        for p, g in leaves
    )  # type: ignore[return-value]


def draw(name: str, steps: int, rng: np.random.Generator, wild: bool) -> Draws:
    """Draw normal gradients with bursts of each sort; if `wild`, some are so huge that survivors overflow."""
    case = OPTIMIZERS[name]
    examples = 2 if case.per_example else 1
    params = make_params(case.dtypes[0])

    def normal(leaf):
        shape = (steps, examples, *leaf.shape)
        values = rng.normal(size=shape) + (1j * rng.normal(size=shape) if np.iscomplexobj(leaf) else 0)
        return (0.3 * values).astype(leaf.dtype)

    grads = jax.tree.map(normal, params)
    leaves, pull = jax.tree.leaves(grads), np.full((steps, examples), 0.1, np.float32)

    def scale(part, factor):
        for leaf in leaves:
            leaf[part] *= factor

    def zeros(part):
        scale(part, 0)
        pull[part] = 0

    def everywhere(value, part):
        for leaf in leaves:
            leaf[part] = value

    def somewhere(value, part):
        """At one entry; a bias, which stays, if the optimizer reads the loss, which is NaN with it."""
        leaf = leaves[0] if case.needs else leaves[rng.integers(len(leaves))]
        leaf.reshape(steps, -1)[part, rng.integers(leaf[0].size)] = value

    bursts: list[Any] = [
        partial(scale, factor=1e-6) if name in NO_ZEROS else zeros,
        partial(scale, factor=1e3),
    ]
    if name not in UNGUARDED:
        bursts += [partial(everywhere, np.nan), partial(somewhere, np.nan), partial(somewhere, -np.inf)]
    if wild:
        bursts += [partial(scale, factor=1e30), partial(scale, factor=1e37)]
    for half in (0, steps // 2):  # while masks change, and after
        length = steps // 2 // len(bursts)
        for place, number in enumerate(rng.permutation(len(bursts))):
            first = half + place * length + rng.integers(max(1, length - 4))
            bursts[number](slice(first, first + rng.integers(1, 5)))
    return Draws(pull, grads)


class Pair(NamedTuple):
    """An optimizer in a kind of pruner."""

    name: str
    case: Case
    kind: Kind
    around: bool  # `apply_if_finite` is around both, not between them
    guarded: bool  # it is there at all
    run: Callable[..., Any]  # `run((params, state), start, stop, draws) -> (params, state), history`
    params: Any
    init: Callable[[], Any]
    traces: list[int]  # grows with each trace of `run`

    def inner(self, state: Any) -> Any:
        """The state of the optimizer, with that of its guard, out of the state of both."""
        if self.around:
            return state._replace(inner_state=state.inner_state.inner)
        return state.inner


def program(step: Callable[..., Any], watch: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """Return a loop of steps from `start` to `stop`, one program for any of both, and a list of its traces.

    Its history has what `watch(params, state)` returns of every step, 0 for those that were not run.
    """
    traces: list[int] = []

    def run(carry, start, stop, draws, extra=None):
        traces.append(len(traces))
        like = jax.eval_shape(watch, *carry)
        history = jax.tree.map(lambda leaf: jnp.zeros((len(draws.pull), *leaf.shape), leaf.dtype), like)

        def body(t, loop):
            (params, state), history = loop
            batch = jax.tree.map(itemgetter(t), tuple(draws))
            params, state = step(params, state, batch, extra)
            history = jax.tree.map(lambda all, now: all.at[t].set(now), history, watch(params, state))
            return (params, state), history

        return jax.lax.fori_loop(start, stop, body, (carry, history))

    return jax.jit(run), traces


def guard(optimizer: Any) -> Any:
    return optax.apply_if_finite(optimizer, PATIENCE)


def make_pair(name: str, kind: Kind, around: bool) -> Pair:
    """The pair, with what it starts from."""
    case, guarded = OPTIMIZERS[name], name not in UNGUARDED
    params = make_params(case.dtypes[0])
    made = kind.make(params)
    if kind.removed is None:  # it has masks to start with
        masks = made if kind.by == "keep_masked" else made.init(params).masks
        params = jp.apply_masks(params, masks)

    def wrap(optimizer):
        if kind.by == "keep_masked":
            return jp.keep_masked(optimizer, made)
        return jp.wrap_optax(optimizer, made, packed=kind.packed)

    optimizer = case.make()
    if guarded:
        tx = guard(wrap(optimizer)) if around else wrap(guard(optimizer))
    else:
        tx = wrap(optimizer)
    stepped = make_step(tx, case, objective)
    run, traces = program(
        lambda params, state, batch, _: stepped(params, state, batch)[:2],
        lambda params, state: (networks(params), jp.unpack_masks(optax.tree.get(state, "masks"))),
    )
    params = optax.LookaheadParams.init_synced(params) if case.pair else params

    def init():  # with the types as they are after a step, where some states begin with weak ones
        return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.asarray(leaf), tx.init(params))

    return Pair(name, case, kind, around and guarded, guarded, run, params, init, traces)


@cache
def plain(name: str) -> Callable[..., Any]:
    """The optimizer alone on the masked problem: `run(carry, start, stop, draws, (masks, around))`.

    Params are 0 where pruned, and so are its gradients on their way in and its updates on their way
    out; its state is left alone. Of a guard that lies around both, gradients that are not finite
    stay so, because it skips such a step for the sake of pruned entries too.
    """
    case = OPTIMIZERS[name]
    optimizer = case.make() if name in UNGUARDED else guard(case.make())
    inner = optax.with_extra_args_support(optimizer)

    def step(params, state, batch, extra):
        masks, around = extra

        def masked_grad(mask, leaf):
            return jnp.where(mask | (around & ~jnp.isfinite(leaf)), leaf, 0)

        def update(grads, state, params, **extra):
            updates, state = inner.update(jax.tree.map(masked_grad, masks, grads), state, params, **extra)
            like = optax.LookaheadParams(masks, masks) if case.pair else masks
            return jax.tree.map(lambda mask, leaf: jnp.where(mask, leaf, 0), like, updates), state

        tx = optax.GradientTransformationExtraArgs(inner.init, update)
        return make_step(tx, case, objective)(params, state, batch)[:2]

    return program(step, lambda params, _: networks(params))[0]


# Checks


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return dict(zip(jp.leaf_paths(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def check_zeros(history: Any) -> int:
    """Check that pruned entries are +0 after every step, and count those that were not finite before.

    Nothing that is added to NaN or infinity makes 0, so these stay what they are.
    """
    nets, masks = history
    lost = 0
    for net in nets:
        for (path, values), mask in zip(by_path(net).items(), by_path(masks).values(), strict=True):
            stuck = np.zeros_like(mask)
            for t in range(1, len(mask)):
                stuck[t] = (stuck[t - 1] | (mask[t - 1] & ~np.isfinite(values[t - 1]))) & ~mask[t]
            lost += int(stuck[-1].sum())
            pruned = values[~mask & ~stuck]
            assert (pruned == 0).all(), f"{path} has pruned entries that are not 0"
            assert not np.signbit(pruned.real).any(), f"{path} has pruned entries that are -0"
    return lost


def calls(pair: Pair, draws: Draws, masks: dict[str, np.ndarray]) -> Iterator[tuple[int, bool]]:
    """For each step, how often the pruner was called by then, and whether its scores are finite."""
    number, bad = 0, draws.bad
    finite = {path: np.isfinite(leaf).all(1) for path, leaf in by_path(draws.grads).items()}
    for t in range(len(bad)):
        number += not (pair.around and bad[t])
        alive = {path: mask[t - 1] if t else np.ones_like(mask[0]) for path, mask in masks.items()}
        if pair.kind.regrows:  # what may grow counts too
            alive = {path: np.ones_like(mask) for path, mask in alive.items()}
        kernels = [path for path in masks if path.endswith("kernel")]
        sound = not pair.kind.reads_grads or all(finite[p][t][alive[p]].all() for p in kernels)
        yield number, sound


def check_counts(pair: Pair, draws: Draws, history: Any) -> None:
    """Checks at every step what is kept, and which way masks move."""
    kind, masks = pair.kind, by_path(history[1])
    pools = kind.units(masks)
    if not kind.coupled:
        assert all(mask.all() for path, mask in masks.items() if path.endswith("bias")), "a bias is pruned"
    moves = changes(masks)
    if kind.removed is not None:
        assert all((mask[:-1] >= mask[1:]).all() for mask in masks.values()), "masks are not nested"
        acted = 0
        for t, (number, sound) in enumerate(calls(pair, draws, masks)):
            acted = number if sound else acted
            for pool in pools:
                got, due = int((~pool[t]).sum()), kind.removed(acted, pool.shape[1])
                assert got == due, f"at step {t} {got} of {pool.shape[1]} units are gone instead of {due}"
        return
    for mask in masks.values():
        sums = mask.reshape(len(mask), -1).sum(1)
        assert (sums == sums[0]).all(), "the number of kept entries changes"
    if not kind.regrows:
        assert not moves.any(), "masks that are kept move"
    if not kind.regrows or not pools:  # a kind made from the table of members, whose cadence is not known
        return
    steps = len(moves)
    every, end = max(1, steps // 28), steps // 2
    seen = list(calls(pair, draws, masks))
    before = [0, *(number for number, _ in seen)]
    due = [
        sound and number % every == 0 and number < end and number > before[t]
        for t, (number, sound) in enumerate(seen)
    ]
    assert not (moves & ~np.array(due)).any(), "masks move at a step that is none for it"


def check_growth(history: Any) -> None:
    """Checks that masks that move take no step of training besides, and that what grows starts at 0."""
    nets, masks = history
    flags = by_path(masks)
    moves = np.flatnonzero(changes(flags))
    # Not in every update that is due: what is dropped may have the largest gradients, and come back.
    assert len(moves), "masks never move"
    for net in nets:
        for (path, values), mask in zip(by_path(net).items(), flags.values(), strict=True):
            for t in moves[moves > 0]:
                assert (values[t][mask[t] & ~mask[t - 1]] == 0).all(), f"{path}: what grows is not 0"
                both = mask[t] & mask[t - 1]
                assert (values[t][both] == values[t - 1][both]).all(), f"{path} moves with its mask"


def changes(masks: dict[str, np.ndarray]) -> np.ndarray:
    """At which steps masks are not those of the step before; the first step counts as none."""
    moved = [(mask[1:] != mask[:-1]).any(_after_first(mask)) for mask in masks.values()]
    return np.concatenate([[False], np.any(moved, 0)])


def check_finite(name: str, carry: Any, history: Any) -> None:
    for net in history[0]:
        for path, values in by_path(net).items():
            assert np.isfinite(values).all(), f"{path} is not finite"
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry[1]):
        where = jax.tree_util.keystr(path)
        # A line search has no value before its first step, and after masks moved.
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not (
            name.startswith("lbfgs") and where.endswith("value")
        ):
            assert np.isfinite(np.asarray(leaf)).all(), f"the state's {where} is not finite"


def check_survivors_move(pair: Pair, history: Any) -> None:
    nets, masks = history
    first = by_path(networks(pair.params)[0])
    for (path, values), mask in zip(by_path(nets[0]).items(), by_path(masks).values(), strict=True):
        kept = mask[-1]
        assert not kept.any() or (values[-1] != first[path])[kept].any(), f"{path} does not train"


def masked(tree: Any, masks: Any) -> Any:
    """Mask the leaves that carry a param's path at the end of their own, such as moments."""

    def of_leaf(path, leaf):
        mask = mask_of(path, leaf, masks)
        return leaf if mask is None else np.where(mask, leaf, np.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


# Of the largest entry: two programs may round a fused product and sum differently.
TOLERANCE = 1e-5


def check_plain(pair: Pair, carry: Any, start: int, draws: Draws, history: Any) -> float:
    """Compare the survivors with the plain optimizer's from a step on, after which masks stay.

    `carry` holds params and state before that step. What the masks prune then is not 0 in it yet.
    """
    params, state = carry
    masks = jax.tree.map(lambda leaf: leaf[-1], history[1])
    params, state = masked(params, masks), masked(pair.inner(state), masks)
    steps = len(draws.pull)
    extra = (masks, np.asarray(pair.around))
    _, alone = plain(pair.name)((params, state), start, steps, draws, extra)
    stop = start + UNSTABLE[pair.name][0] if pair.name in UNSTABLE else steps
    worst = 0.0
    for net, other in zip(history[0], alone, strict=True):
        for (path, values), wanted in zip(by_path(net).items(), by_path(other).values(), strict=True):
            values, wanted = values[start:stop], wanted[start:stop]
            apart = float(np.abs(values - wanted).max()) / max(float(np.abs(wanted).max()), 1e-30)
            assert apart <= TOLERANCE, f"{path} is {apart:.1e} of its size from the plain optimizer's"
            worst = max(worst, apart)
    return worst


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(tree: Any) -> Any:
    """The tree with typed keys as their numbers: optax keeps some, which flax does not write."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def same_bits(tree: Any, other: Any) -> bool:
    pairs = zip(*(map(np.asarray, jax.tree.leaves(key_data(each))) for each in (tree, other)), strict=True)
    return all(one.dtype == two.dtype and one.tobytes() == two.tobytes() for one, two in pairs)


def through_files(carries: Any, template: Any, orbax: bool) -> Any:
    """States written and read, by flax.serialization as msgpack or by orbax, with only a template at hand."""
    carries, like = key_data(carries), key_data(template)
    if not orbax:
        back = flax.serialization.from_bytes(like, flax.serialization.to_bytes(carries))
    else:
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "state", carries)
            checkpointer.wait_until_finished()
            back = checkpointer.restore(Path(folder) / "state", jax.eval_shape(lambda: like))
        back = jax.tree.map(np.asarray, back)  # else on a device of its choice, which compiles once more
    return jax.tree.map(
        lambda leaf, old: jax.random.wrap_key_data(leaf) if is_key(old) else leaf, back, template
    )


class Outcome(NamedTuple):
    apart: float  # how far survivors were from the plain optimizer's, as a part of the largest param
    lost: int  # how many entries were not finite when they were pruned, among huge gradients


def run_pair(
    name: str, kind_name: str, form: str, steps: int = 200, seed: int = 0, orbax: bool = True
) -> Outcome:
    """Run 40 steps or more of a pair, with the guard in one of `FORMS`, and check all that must hold of it.

    States go through orbax too if `orbax`, which takes a tenth of a second.
    """
    pair = make_pair(name, kinds(steps)[kind_name], form == "around")
    rng = np.random.default_rng([seed, zlib.crc32(f"{name} {kind_name} {form}".encode())])
    calm, wild = (draw(name, steps, rng, wild) for wild in (False, True))
    new = (pair.params, pair.init())

    whole, history = pair.run(new, 0, steps, calm)
    check_zeros(history)
    check_counts(pair, calm, history)
    check_finite(name, whole, history)
    check_survivors_move(pair, history)
    masks = by_path(history[1])
    if pair.kind.regrows:
        check_growth(history)

    # The state at random steps, after a move of the masks, and once they are at rest.
    moves = np.flatnonzero(changes(masks))
    rest = int(moves[-1]) + 1 if len(moves) else 0
    # Masks that shrink do so in a step of training, for which the loss was taken at params not masked
    # yet. Where masks move there is no step. Some of GaLore's state may look like a param and is none.
    early = rest and not (pair.kind.regrows or pair.case.needs or name == "contrib.galore")
    alone = rest - 1 if early else rest
    random = [int(t) for t in rng.integers(1, steps, 3)]
    stops = sorted({*random, alone, *(int(t) + 1 for t in moves[:1])})
    carry, at, states = new, 0, {}
    for stop in stops:
        carry, _ = pair.run(carry, at, stop, calm)
        at, states[stop] = stop, carry
        if stop and name != "contrib.galore":  # its state is in a rotated basis
            now = jax.tree.map(lambda leaf, t=stop - 1: leaf[t], history[1])
            assert_state_zero_where_pruned(pair.inner(carry[1]), now)
            if pair.kind.regrows and stop - 1 in moves:
                old = jax.tree.map(lambda leaf, t=stop - 2: leaf[t], history[1])
                not_grown = jax.tree.map(lambda before, after: ~(after & ~before), old, now)
                zeros = pair.case.make().init(jax.tree.map(jnp.zeros_like, pair.params))
                inner = pair.inner(carry[1])
                inner = inner.inner_state if pair.guarded else inner
                assert_as_new_where_pruned(inner, zeros, not_grown)

    apart = check_plain(pair, states[alone], alone, calm, history)

    template = (jax.tree.map(np.zeros_like, pair.params), pair.init())
    saved = {str(stop): states[stop] for stop in random}
    templates = dict.fromkeys(saved, template)
    restored = list(through_files(saved, templates, False).items())
    restored += through_files(saved, templates, True).items() if orbax else []
    for stop, state in ((int(stop), state) for stop, state in restored):
        assert jax.tree.structure(state) == jax.tree.structure(new), (
            f"the state of step {stop} has another form"
        )
        assert same_bits(state, states[stop]), f"the state of step {stop} comes back changed"
        final, _ = pair.run(state, stop, steps, calm)
        assert same_bits(final, whole), f"from the state of step {stop} it goes on otherwise"

    # Survivors may be lost to huge gradients; what is pruned may not.
    _, history = pair.run(new, 0, steps, wild)
    lost = check_zeros(history)
    if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(history[0])):
        check_counts(pair, wild, history)
    assert len(pair.traces) == 1, f"{len(pair.traces)} traces"
    return Outcome(apart, lost)


def left_out(name: str, kind: Kind) -> bool:
    return kind.reads_grads and name in PER_EXAMPLE


def dealt(number: int = 0, steps: int = 200) -> dict[str, tuple[str, str]]:
    """Deal a kind, in one form, to every optimizer: of three in a row two get one that shrinks.

    The deals, by `number`, come round after as many as there are kinds that shrink.
    """
    table, hands = kinds(steps), {}
    shrinking = [kind for kind, made in table.items() if made.removed is not None]
    others = [kind for kind, made in table.items() if made.removed is None]  # that move, or stay
    turns = [count(number), count(number)]
    for place, name in enumerate(OPTIMIZERS):
        moves = (place + number) % 3 == 2
        fit = [kind for kind in (shrinking, others)[moves] if not left_out(name, table[kind])]
        kind = fit[next(turns[moves]) % len(fit)]
        form = FORMS[0 if name in UNGUARDED else (place + place // 5 + number) % 2]
        hands[name] = (kind, form)
    return hands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", help="one optimizer, by the name in optimizers.OPTIMIZERS")
    parser.add_argument("--kind", help="one kind of pruner, by the name in pruner_kinds.kinds")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", choices=FORMS, help="one place of the guard against NaN")
    parser.add_argument(
        "--deal", type=int, help="only the pairs that the tests have, in the deal of this number"
    )
    args = parser.parse_args()
    table = kinds(args.steps)
    for chosen, known in ((args.only, OPTIMIZERS), (args.kind, table)):
        if chosen is not None and chosen not in known:
            parser.error(f"there is no {chosen!r}, but {', '.join(known)}.")
    hands = {
        name: [(kind, form) for kind in table for form in FORMS[: 1 if name in UNGUARDED else 2]]
        for name in OPTIMIZERS
    }
    if args.deal is not None:
        hands = {name: [pair] for name, pair in dealt(args.deal, args.steps).items()}
    pairs, wrong, lost, start = 0, 0, 0, time.monotonic()
    for name in [args.only] if args.only else OPTIMIZERS:
        outcomes, failed, began = [], [], time.monotonic()
        for kind, form in hands[name]:
            if left_out(name, table[kind]) or kind != (args.kind or kind) or form != (args.form or form):
                continue
            try:
                outcomes.append(run_pair(name, kind, form, args.steps, args.seed))
            except Exception as error:
                failed.append(f"    {kind}, {form}: {type(error).__name__}: {str(error)[:300]}")
        plain.cache_clear()
        jax.clear_caches()  # or the compiled programs fill the memory
        apart, took = max((each.apart for each in outcomes), default=0.0), time.monotonic() - began
        tried = len(outcomes) + len(failed)
        print(
            f"{name:32s}{tried:3d} pairs {len(failed):3d} wrong, within {apart:7.1e}, {took:6.1f} s",
            flush=True,
        )
        print(*failed, sep="\n", end="\n" if failed else "", flush=True)
        pairs, wrong, lost = pairs + tried, wrong + len(failed), lost + sum(each.lost for each in outcomes)
    took = time.monotonic() - start
    print(
        f"{pairs} pairs of {args.steps} steps: {wrong} wrong, {lost} entries lost before pruned, {took:.0f} s"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
