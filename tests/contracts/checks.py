"""The checks that every member of the table in `members` goes through, with one compiled program."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.contracts import members
from tests.contracts.members import TABLE, Member
from tests.contracts.problem import CALLS, problem
from tests.oracles import brute_force
from tests.support.trees import SORTS, by_role

SEEDS = 3


def same(*trees):
    jax.tree.map(lambda *leaves: [np.testing.assert_array_equal(leaves[0], leaf) for leaf in leaves], *trees)


def by_path(tree):
    """Return the leaves of a tree of any sort by their paths in the plain dict."""
    return {role: np.asarray(leaf) for role, leaf in by_role(tree).items()}


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def avals(tree):
    """Return shapes, dtypes and weak types; where these differ, jit traces again."""
    return [
        (leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(jax.eval_shape(lambda: tree))
    ]


class Case:
    """A member, its programs, and what they gave."""

    def __init__(self, member: Member):
        self.member = member
        self.traces = 0
        self.program = jax.jit(self.counted, donate_argnums=(0, 1))

    def pruner(self, problem, sparsity=None):
        return self.member.make(problem, self.member.sparsity if sparsity is None else sparsity)

    def step(self, params, state, problem):
        """Call the pruner once, and return the params that training would continue with, and the state."""
        params = jp.apply_masks(params, state.masks)
        pruner = self.pruner(problem)
        state = pruner.update(state, params, **self.given(pruner, problem))
        return jp.apply_masks(params, state.masks), state

    def given(self, pruner, problem):
        """Return the parts of a problem that the pruner's update reads."""
        read = self.member.given if pruner.takes is None else {"grads", "key", *pruner.takes}
        return {name: getattr(problem, name) for name in self.member.given if name in read}

    def jaxpr(self, now):
        """Return the jaxpr of a step, with inputs in the order of leaves, not of the activations' paths."""
        paths, activations = now.activations.keys(), list(now.activations.values())

        def step(params, state, now, activations):
            now = now._replace(activations=dict(zip(paths, activations, strict=True)))
            return self.step(params, state, now)

        now = now._replace(activations=())
        return jax.make_jaxpr(step)(now.params, self.pruner(now).init(now.params), now, activations)

    def text(self):
        """Return the text of the jaxpr, without the numbers in it."""
        return re.sub(r"0x[0-9a-f]+|\d+", "", str(self.jaxpr(self.problems()[0])))

    def counted(self, *given):
        self.traces += 1
        return self.step(*given)

    def problems(self, seed=0, dtype=jnp.float32):
        """Return what each call is given: other params and gradients every time."""
        return [problem(10 * seed + call, self.member.widths, dtype) for call in range(CALLS)]

    def states(self, step, problems, init=lambda pruner: pruner.init):
        """Return the state before the first call and after each."""
        state = init(self.pruner(problems[0]))(problems[0].params)
        states = [copy(state)]
        for now in problems:
            params, state = step(copy(now.params), state, now)
            same(jp.apply_masks(params, state.masks), params)
            states.append(copy(state))
        return states

    @functools.cached_property
    def compiled(self):
        return [self.states(self.program, self.problems(seed)) for seed in range(SEEDS)]

    @functools.cached_property
    def eager(self):
        with self.warned():
            return self.states(self.step, self.problems())

    def warned(self):
        if self.member.warns is None:
            return warnings.catch_warnings()
        return pytest.warns(UserWarning, match=self.member.warns)

    def gone(self, masks):
        """Return by pool which units are removed, and check that none is removed in part."""
        units, masks = self.member.units, by_path(masks)
        if callable(units):
            return units(masks)
        gone = {}
        for path in (path for path in masks if path.endswith("kernel")):
            left = np.array(
                [sum(masks[path][i] for i in unit) for unit in brute_force.units(masks[path].shape, units)]
            )
            sizes = np.array([len(unit) for unit in brute_force.units(masks[path].shape, units)])
            fewest = units.n if units.kind == "nm" else 0
            assert ((left == sizes) | (left == fewest)).all(), path
            gone[path] = left < sizes
        return gone


# --- the checks


def masks_mirror_the_params(case):
    for now, state in zip(case.problems()[:1] * (CALLS + 1), case.compiled[0], strict=True):
        assert jax.tree.structure(state.masks) == jax.tree.structure(now.params)
        for mask, param in zip(*map(jax.tree.leaves, (state.masks, now.params)), strict=True):
            assert mask.dtype == jnp.bool_ and mask.shape == param.shape


def compiled_is_eager(case):
    for ours, theirs in zip(case.compiled[0], case.eager, strict=True):
        same((ours.masks, ours.step, ours.row), (theirs.masks, theirs.step, theirs.row))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours.scores, theirs.scores)
        assert avals(ours) == avals(theirs)


def vmap_in_double_precision_is_the_loop_in_single(case):
    """Check both in one program, because compiling it takes half of the time of all checks."""
    if case.member.table_of:
        assert case.text() == Case(TABLE[case.member.table_of]).text()
        return
    with jax.enable_x64(not case.member.double):
        dtype = jnp.float32 if case.member.double else jnp.float64
        seeds = [case.problems(seed, dtype) for seed in range(SEEDS)]
        calls = [jax.tree.map(lambda *x: jnp.stack(x), *now) for now in zip(*seeds, strict=True)]
        state = jax.vmap(lambda p: case.pruner(p).init(p.params))(calls[0])
        program = jax.jit(jax.vmap(case.step))
        for call, now in enumerate(calls, start=1):
            params, state = program(now.params, state, now)
            alone = jax.tree.map(lambda *x: jnp.stack(x), *(states[call] for states in case.compiled))
            same((state.masks, state.step, state.row), (alone.masks, alone.step, alone.row))
            assert avals((alone.step, alone.row)) == avals((state.step, state.row))
            for ours, theirs in zip(*map(jax.tree.leaves, (state.scores, alone.scores)), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5)
                assert ours.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    with jax.enable_x64(True):  # a state of a session without it goes on
        check_types(case, case.problems()[0], case.compiled[0][0])


def counts_are_those_asked(case):
    check_counts(case, case.problems(), case.compiled[0])


def check_counts(case, problems, states):
    for call, (now, before, after) in enumerate(zip(problems, states[:-1], states[1:], strict=True)):
        gone, asked = case.gone(after.masks), case.member.gone
        asked = asked(by_path(now.params), by_path(before.masks)) if callable(asked) else asked[call]
        assert {pools: sum(int(gone[pool].sum()) for pool in pools) for pools in asked} == asked, call
        named = set(itertools.chain(*asked))
        assert not any(gone[pool].any() for pool in gone.keys() - named)
        assert not any(gone[pool].all() for pool in named) or case.member.units == members.ROW_GROUPS


def masks_are_nested(case):
    moved = False
    for before, after in itertools.pairwise(case.compiled[0]):
        old, new = by_path(before.masks), by_path(after.masks)
        moved |= any((old[path] != new[path]).any() for path in old)
        if case.pruner(case.problems()[0]).regrows:
            assert all(old[path].sum() == new[path].sum() for path in old)
        else:
            assert not any((new[path] & ~old[path]).any() for path in old)
    assert moved
    if case.member.sparsity is None:
        return
    # Much more at once removes whatever the first call did, and more.
    few, many = by_path(case.compiled[0][1].masks), by_path(at_once(case, case.problems()[0], 0.8))
    assert not any((many[path] & ~few[path]).any() for path in few)
    assert any((few[path] & ~many[path]).any() for path in few)


def at_once(case, now, share):
    """Return masks made in one go, at a share of what the structure can remove."""
    units = case.member.units
    most = units.max_sparsity if isinstance(units, brute_force.Spec) else 1.0
    pruner = case.pruner(now, jp.schedules.constant(share * most))
    given = case.given(pruner, now)
    state = pruner.init(now.params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "floor=. kept the last units")
        for _ in range(2):  # some act at every other call
            state = pruner.update(state, now.params, **given)
    return state.masks


def a_key_decides(case):
    again = case.states(case.program, case.problems())
    same(again, case.compiled[0])
    other = case.states(case.program, [now._replace(key=jax.random.key(99)) for now in case.problems()])
    masks, others = by_path(again[-1].masks), by_path(other[-1].masks)
    assert any((masks[path] != others[path]).any() for path in masks) == case.member.random


def order_matters_not(case):
    """Check that masks follow the entries into another order, unless the table says why they may not."""
    orders = "entries", "columns", "channels"
    blind = case.member.blind if case.member.blind in orders else "entries"
    shuffled = [in_another_order(now, blind) for now in case.problems()]
    got = case.states(case.program, [now for now, _ in shuffled])[1:]
    reorder = shuffled[0][1]
    follows = [
        all(
            (a == b).all()
            for a, b in zip(*map(jax.tree.leaves, (reorder(old.masks), new.masks)), strict=True)
        )
        for old, new in zip(case.compiled[0][1:], got, strict=True)
    ]
    assert all(follows) if case.member.blind in orders else not all(follows), follows


def in_another_order(now, what):
    """Return a problem in another order, and the function that orders trees so."""
    rng = np.random.default_rng(5)
    channels = rng.permutation(8)
    entries = {path: rng.permutation(leaf.size) for path, leaf in by_path(now.params).items()}
    columns = {path: rng.permutation(leaf.shape[-1]) for path, leaf in by_path(now.params).items()}

    def ordered(path, leaf):
        if what == "channels":
            if path.startswith("a"):
                return leaf[..., channels]
            return leaf[channels] if path == "b/kernel" else leaf
        if not path.endswith("kernel"):
            return leaf
        return (
            leaf[:, columns[path]] if what == "columns" else leaf.ravel()[entries[path]].reshape(leaf.shape)
        )

    def reorder(tree):
        leaves = map(ordered, by_role(tree), jax.tree.leaves(tree))
        return jax.tree.unflatten(jax.tree.structure(tree), list(leaves))

    params, grads, masks = map(reorder, (now.params, now.grads, now.masks))
    activations = dict(now.activations)
    if what == "channels":
        activations["a/kernel"] = activations["a/kernel"][..., channels]
    return now._replace(params=params, grads=grads, masks=masks, activations=activations), reorder


def it_is_traced_once(case):
    assert case.traces == 1  # of as many calls and seeds as there were by now
    now, state = case.problems()[0], case.compiled[0][0]
    traced = jax.eval_shape(lambda now: case.pruner(now).init(now.params), now)
    assert avals(traced) == avals(state)  # nor would a state that was made under jit


def a_step_moves_nothing_from_or_to_the_host(case):
    problems, states = case.problems(), case.compiled[0]
    given = [copy((now.params, state)) for now, state in zip(problems, states[:-1], strict=True)]
    with jax.transfer_guard("disallow"):
        for (params, state), now in zip(given, problems, strict=True):
            case.program(params, state, now)


def no_tracer_leaks(case):
    now, state = case.problems()[0], case.compiled[0][0]
    with jax.checking_leaks():
        traced = jax.make_jaxpr(Case(case.member).step)(now.params, state, now)
    # Nor does the program call back to the host, which a transfer guard lets pass on a CPU.
    assert "callback" not in str(traced)


def what_is_given_may_be_donated(case):
    now = case.problems()[0]
    pruner = case.pruner(now)
    kept = copy(now)
    params, state = copy(now.params), pruner.init(now.params)
    case.program(params, state, now)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
    # The state shares no buffer with what it was made from, nor with another.
    same(now._replace(key=None), kept._replace(key=None))
    same(pruner.init(now.params), case.compiled[0][0])


def half_precision_is_promoted_nowhere(case):
    problems = case.problems(dtype=jnp.bfloat16)
    if not case.member.half:
        with case.warned():
            states = case.states(case.step, problems)
        same([state.masks for state in states], [state.masks for state in case.compiled[0]])
    with jax.numpy_dtype_promotion("strict"):
        state = case.pruner(problems[0]).init(problems[0].params)
        check_types(case, problems[0], state)


def check_types(case, now, state):
    """Check that a traced step returns params and state in the types in which it takes them."""
    params, after = jax.eval_shape(Case(case.member).step, now.params, state, now)
    assert avals(params) == avals(now.params) and avals(after) == avals(state)


TRACED = ("a list of eleven layers or more", "a nested mixture")


def every_sort_of_tree_is_pruned_alike(case):
    """Check that a tree with a plain dict's leaves, in its order, gets the same masks and the same program.

    Tracing takes longer than a step outside `jit`, so only some sorts are traced, of which one has most
    containers in it. Either is enough to see counts that go by the order of names.
    """
    program, consts = printed(case.jaxpr(case.problems()[0]))
    states = case.compiled[0] if case.member.compiles_eagerly else case.eager
    call = first_move(states)
    assert {*TRACED} <= SORTS.keys()
    for sort in SORTS:
        now = problem(call, case.member.widths, sort=sort)
        if not case.member.compiles_eagerly:
            state, asked = (like(now.params, state) for state in states[call : call + 2])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "floor=. kept the last units")
                _, got = case.step(now.params, state, now)
            assert jax.tree.structure(got.masks) == jax.tree.structure(now.params), sort
            same(got.masks, asked.masks)
        if case.member.compiles_eagerly or sort in TRACED:
            ours = printed(case.jaxpr(now))
            assert ours[0] == program, sort
            same(ours[1], consts)


def first_move(states):
    """Return the number of the first call that changes masks."""
    leaves = [[np.asarray(mask) for mask in jax.tree.leaves(state.masks)] for state in states]
    pairs = enumerate(itertools.pairwise(leaves))
    return next(n for n, (old, new) in pairs if any((a != b).any() for a, b in zip(old, new, strict=True)))


def like(params, state):
    """Return the state of a pruner of plain dicts as a tree of the params' sort with the same leaves."""
    trees = {
        name: jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))
        for name in ("masks", "scores")
        if jax.tree.leaves(tree := getattr(state, name))
    }
    return state._replace(**trees)


def printed(program):
    """Return a program as text, and the constants that it closes over."""
    return re.sub(r"0x[0-9a-f]+", "", str(program)), program.consts


CHECKS = (
    masks_mirror_the_params,
    compiled_is_eager,
    vmap_in_double_precision_is_the_loop_in_single,
    counts_are_those_asked,
    masks_are_nested,
    a_key_decides,
    order_matters_not,
    it_is_traced_once,
    a_step_moves_nothing_from_or_to_the_host,
    no_tracer_leaks,
    what_is_given_may_be_donated,
    half_precision_is_promoted_nowhere,
    every_sort_of_tree_is_pruned_alike,
)
