"""Put every member of the table through the same checks, on one device and on eight."""

import functools
import gc
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.pruning.targets import SCOPES
from tests.contracts import checks, entry_points, public
from tests.contracts.checks import CHECKS, Case, same
from tests.contracts.entry_points import LEFT_OUT, OTHERS, UNCHECKED, USES
from tests.contracts.members import REFUSALS, TABLE, Member, once
from tests.contracts.problem import ENTRIES, Problem, problem
from tests.support.devices import on_eight_devices

NOT_MEMBERS: dict[str, str] = {
    "scores.block_influence": "a score of residual blocks, which these networks lack: test_scores_blocks.py",
}


def public_members() -> set[str]:
    """Return every public score, structure, scope, schedule and distribution, and what gives a Pruner."""
    rooms = ("scores.", "structures.", "schedules.", "distributions.")
    found = {name for name in public.functions() if name.startswith(rooms)} | set(public.makers())
    return (
        found | {f"scope {name}" for name in SCOPES} | {"Schedule", "Structure", "prune_once", "prune_rounds"}
    )


def test_the_table_has_every_public_member():
    members = public_members()
    covered = {name for member in TABLE.values() for name in member.covers}
    missing = sorted(members - covered - NOT_MEMBERS.keys())
    assert not missing, (
        f"{', '.join(missing)} is public and in no contract. Add a Member to TABLE in "
        "tests/contracts/members.py that covers it: how it is made, and how many units are gone after each "
        "call. If it is no score, structure, scope, schedule, distribution or Pruner, name it in NOT_MEMBERS "
        "above and say what it is."
    )
    unknown = sorted((covered | NOT_MEMBERS.keys()) - members)
    assert not unknown, f"{', '.join(unknown)} is in tests/contracts/members.py, but not public any more."


def test_every_argument_of_a_public_function_has_a_value_that_is_right():
    functions = public.functions()
    unknown = [
        f"{name}({argument}=)"
        for name in functions.keys() - LEFT_OUT.keys()
        for argument in entry_points.unknown(name, functions[name])
    ]
    assert not unknown, (
        f"no right value is known for {', '.join(sorted(unknown))}. Give one by the name of the argument in "
        "GOOD of tests/contracts/entry_points.py, or in OTHERS there for that function alone."
    )
    listed = {*LEFT_OUT, *OTHERS, *USES, *UNCHECKED}
    assert listed <= functions.keys(), f"{sorted(listed - functions.keys())} is not public any more."


@pytest.mark.parametrize("name", TABLE)
def test_member(name, subtests):
    case = Case(TABLE[name])
    for check in CHECKS:
        with subtests.test(check.__name__):
            check(case)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_refused(name):
    _why, attempt, error, says = REFUSALS[name]
    with pytest.raises(error, match=says):
        attempt()


# --- on eight devices


PROGRAMS = [name for name, member in TABLE.items() if not member.table_of]


def check_sharded_members():
    """Run the table on params that are sharded over rows and columns, and print what was wrong."""
    warnings.simplefilter("error")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def put(leaf):
        # Whole groups of four rows, as N:M asks for.
        names = ["tensor" if leaf.shape[0] % 8 == 0 else None, "data" if leaf.shape[-1] % 4 == 0 else None]
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*names[-leaf.ndim :])))

    def check(case):
        problems = [
            now._replace(**{part: jax.tree.map(put, getattr(now, part)) for part in ("params", "grads")})
            for now in case.problems()
        ]
        step, params = jax.jit(case.step), problems[0].params
        states = [jax.jit(case.pruner(problems[0]).init)(params)]
        for now in problems:
            states.append(step(now.params, states[-1], now)[1])
        checks.check_counts(case, problems, states)
        if case.member.random:  # a device draws what it would have drawn alone
            same([state.masks for state in states], [state.masks for state in case.eager])
        for state in states[:1] if case.member.unsharded else states:
            for tree in (state.masks, *([state.scores] if jax.tree.leaves(state.scores) else [])):
                check_shardings(tree, params)

    def check_shardings(tree, params):
        for leaf, param in zip(*map(jax.tree.leaves, (tree, params)), strict=True):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), leaf.sharding

    def check_fixed_masks():
        now = problem(0)
        params = jax.tree.map(put, now.params)
        state = jax.jit(jp.keep_masked(optax.sgd(0.1), now.masks).init)(params)
        same(state.masks, now.masks)
        check_shardings(state.masks, params)

    assert jax.device_count() == 8
    with jax.set_mesh(mesh):
        runs = {name: functools.partial(check, Case(TABLE[name])) for name in PROGRAMS}
        for name, run in (runs | {"keep_masked": check_fixed_masks}).items():
            try:
                run()
            except Exception:
                traceback.print_exc()
                print(f"{name} FAILED", flush=True)
            else:
                print(f"{name} ok", flush=True)


def test_every_member_on_eight_devices():
    printed = on_eight_devices(
        "from tests.contracts import test_contracts; test_contracts.check_sharded_members()"
    )
    assert printed.splitlines() == [f"{name} ok" for name in [*PROGRAMS, "keep_masked"]]


# --- each check fails where its contract is broken


def below(params, masks):
    """Count by hand what the masks before have removed, and what is small."""
    return {(path,): int((~masks[path] | (np.abs(params[path]) <= 0.25)).sum()) for path in ENTRIES}


def small_ones_go(params, masks, **_):
    return jax.tree.map(lambda m, w: m & (jnp.abs(w) > 0.25) if m.ndim == 2 else m, masks, params)


SOUND = Member((), lambda p, s: once(small_ones_go), below, None)


def broken(prune=small_ones_go, start=lambda state, p: state, after=lambda state: state, **known):
    def make(p: Problem, _):
        pruner = once(prune)
        return jp.Pruner(
            lambda params: start(pruner.init(params), p),
            lambda state, params, **given: after(pruner.update(state, params, **given)),
        )

    return SOUND._replace(make=make, **known)


def more_under_jit(params, masks, **_):
    traced = isinstance(params["a"]["kernel"], jax.core.Tracer)
    return jax.tree.map(lambda m, w: m & (jnp.abs(w) > (0.5 if traced else 0.25)), masks, params)


def bounds_by_name(params, masks, **_):
    """Prune by bounds that are in the order of leaves, but read in the alphabetical order of paths."""
    bounds = iter([0.25 if leaf.ndim == 2 else 0.0 for leaf in jax.tree.leaves(params)])
    bounds = dict(zip(sorted(jp.leaf_paths(params)), bounds, strict=True))
    leaves = zip(jp.leaf_paths(params), *map(jax.tree.leaves, (params, masks)), strict=True)
    kept = [mask & (jnp.abs(leaf) > bounds[path]) for path, leaf, mask in leaves]
    return jax.tree.unflatten(jax.tree.structure(masks), kept)


def drawn(params, masks, *, key, **_):
    return jax.tree.map(lambda m, s: m & (s > 0.1), masks, jp.scores.random(params, key=key))


def anew(params, masks, *, grads, **_):
    return jax.tree.map(lambda m, g: jnp.abs(g) > 0.5, masks, grads)


def mixed(params, masks, **_):
    scale = {name: leaves["kernel"] * jnp.ones((), jnp.float32) for name, leaves in params.items()}
    return small_ones_go(params | {name: params[name] | {"kernel": w} for name, w in scale.items()}, masks)


def told(params, masks, **_):
    jax.debug.callback(lambda w: None, params["a"]["kernel"])
    return small_ones_go(params, masks)


LEAKED = []


def leaking(params, masks, **_):
    LEAKED.append(params["a"]["kernel"] + 1)
    return small_ones_go(params, masks)


@jax.custom_batching.custom_vmap
def nothing_batched(kernel):
    return kernel


@nothing_batched.def_vmap
def _(axis_size, in_batched, kernel):
    return kernel * 0, True


def other_under_vmap(params, masks, **_):
    first = params["a"] | {"kernel": nothing_batched(params["a"]["kernel"])}
    return small_ones_go(params | {"a": first}, masks)


BROKEN = {
    "eager differs": ("compiled_is_eager", broken(more_under_jit)),
    "vmap differs": ("vmap_in_double_precision_is_the_loop_in_single", broken(other_under_vmap)),
    "an int64 state": (
        "vmap_in_double_precision_is_the_loop_in_single",
        broken(after=lambda state: state._replace(row=state.row + jnp.arange(2)[0])),
    ),
    "one more goes": (
        "counts_are_those_asked",
        SOUND._replace(gone=lambda *given: {pool: n - 1 for pool, n in below(*given).items()}),
    ),
    "masks regrow": ("masks_are_nested", broken(anew)),
    "random": ("a_key_decides", broken(drawn)),
    "ordered": ("order_matters_not", broken(drawn)),
    "blind after all": ("order_matters_not", SOUND._replace(blind="for no reason")),
    "a weak type": ("it_is_traced_once", broken(start=lambda state, p: state._replace(row=jnp.asarray(0)))),
    "a callback": ("no_tracer_leaks", broken(told)),
    "a leak": ("no_tracer_leaks", broken(leaking)),
    "the caller's masks": (
        "what_is_given_may_be_donated",
        broken(start=lambda state, p: state._replace(masks=p.masks)),
    ),
    "names in order": ("every_sort_of_tree_is_pruned_alike", broken(bounds_by_name)),
    "a promotion": ("half_precision_is_promoted_nowhere", broken(mixed)),
}


# What is said, where it is not the check that says it.
SAID = {
    "a leak": (Exception, "Leaked trace"),
    "the caller's masks": (RuntimeError, "Array has been deleted"),
    "a promotion": (Exception, "no available implicit dtype promotion path"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_fails_its_check(name):
    check, member = BROKEN[name]
    error, says = SAID.get(name, (AssertionError, None))
    gc.freeze()  # where a tracer leaks, JAX searches all objects for what holds it: only the new ones here
    try:
        with pytest.raises(error, match=says):
            getattr(checks, check)(Case(member))
    finally:
        gc.unfreeze()


def test_a_sound_pruner_passes_all_checks():
    case = Case(SOUND)
    for check in CHECKS:
        check(case)


def test_the_guard_sees_a_transfer():
    case = Case(SOUND)
    now, state = case.problems()[0], case.compiled[0][0]
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        case.program(jax.tree.map(np.asarray, now.params), state, now)
