import operator
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp


def params_of(seed=0, shapes=None):
    shapes = shapes or {"a": (8, 5), "b": (5, 12)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    tree = {
        name: {"kernel": jax.random.normal(k, shape)}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return tree | {"bias": jnp.ones(3)}


def kept(masks):
    return {path: int(m.sum()) for path, m in zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True)}


def run(pruner, params, calls, **kwargs):
    """The states after each call, by one compiled program."""
    traces = []

    @jax.jit
    def update(state, params):
        traces.append(1)
        return pruner.update(state, params, **kwargs)

    state, states = pruner.init(params), []
    for _ in range(calls):
        state = update(state, params)
        states.append(state)
    assert len(traces) == 1
    return states


@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 9),
    st.floats(0.05, 0.9),
    st.sampled_from(["a", "b"]),
)
@settings(deadline=None, max_examples=25)
def test_the_sparsity_after_t_calls_is_the_schedules_and_the_end_is_reached(begin, span, every, target, kind):
    end = begin + span
    make = jp.schedules.cubic if kind == "a" else jp.schedules.linear
    schedule = make(target, begin_step=begin, end_step=end)
    params = params_of()
    rare = 0 < span < every  # tests/contracts/test_silence.py looks at the warning
    with pytest.warns(UserWarning, match="longer than the sch") if rare else warnings.catch_warnings():
        pruner = jp.pruner(jp.scores.magnitude, sparsity=schedule, every=every)
    state = pruner.init(params)
    for t in range(1, end + 3):
        state = pruner.update(state, params)
        passed = [g for g in [*range(begin, end + 1, every), end] if g <= t]
        expected = round(float(schedule(passed[-1])) * 100) if passed else 0
        assert 100 - sum(kept(state.masks).values()) + 3 == expected
    assert 103 - sum(kept(state.masks).values()) == round(target * 100)


def test_of_remaining_prunes_down_to_the_floor_and_then_rests():
    pruner = jp.pruner(jp.scores.magnitude, 0.5, of="remaining", floor=1)
    states = run(pruner, {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4)}, 8)
    assert [sum(kept(s.masks).values()) for s in states] == [6, 3, 1, 1, 1, 1, 1, 1]
    assert int(states[-1].row) <= 4


def test_levels_every_so_many_calls():
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.5), every=3)
    states = run(pruner, {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}, 7)
    assert [sum(kept(s.masks).values()) for s in states] == [16, 16, 8, 8, 8, 4, 4]


def test_a_users_own_score_gets_what_update_is_given():
    def score(params, *, grads, key, target, **_):
        assert grads is None
        assert key is not None
        return jax.tree.map(lambda w: jnp.abs(w - target), params)

    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    pruner = jp.pruner(score, 0.25)
    state = pruner.update(pruner.init(params), params, target=3.0)
    assert state.masks["kernel"].tolist() == [[True, True], [False, True]]


def test_scores_that_are_not_finite_put_the_update_off_under_jit_and_raise_outside():
    params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
    good = {"kernel": jnp.ones((2, 5))}
    bad = {"kernel": jnp.ones((2, 5)).at[0, 0].set(jnp.nan)}
    pruner = jp.pruner(jp.scores.taylor, jp.schedules.one_shot(0.5, step=2))
    update = jax.jit(lambda s, g: pruner.update(s, params, grads=g))
    state = pruner.init(params)
    rows = []
    for grads in (good, bad, bad, good, good):
        state = update(state, grads)
        rows.append((int(state.row), sum(kept(state.masks).values())))
    assert rows == [(0, 10), (0, 10), (0, 10), (1, 5), (1, 5)]
    state = pruner.update(pruner.init(params), params, grads=bad)
    with pytest.raises(ValueError, match=r"scores\['kernel'\] has 1 entries that are NaN or inf"):
        pruner.update(state, params, grads=bad)


def test_no_selection_outside_the_branch_of_a_due_update():
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.cubic(0.9, end_step=100), every=10)
    params = params_of()
    jaxpr = jax.make_jaxpr(pruner.update)(pruner.init(params), params)
    top = {eqn.primitive.name for eqn in jaxpr.eqns}
    assert "cond" in top
    assert not top & {"while", "scan", "sort", "reduce_sum"}
    assert " sort[" not in str(jaxpr)


def test_a_target_that_the_floor_does_not_allow_is_warned_about():
    params = {"kernel": jnp.ones((2, 2))}
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.95, step=1))
    with pytest.warns(UserWarning, match=r"target is missed \(.* by 1 units\), because floor=1"):
        state = jax.jit(pruner.update)(pruner.init(params), params)
    assert sum(kept(state.masks).values()) == 1
    constant = jp.pruner(jp.scores.magnitude, 0.95)
    with pytest.warns(UserWarning, match="target is missed"):
        constant.update(constant.init(params), params)
    # A floor above a leaf's size keeps the leaf, not more.
    small = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((4, 5))}}
    pruner = jp.pruner(jp.scores.magnitude, 0.5, floor=5)
    assert kept(jax.jit(pruner.update)(pruner.init(small), small).masks) == {"a/kernel": 2, "b/kernel": 9}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.95, step=1), floor=0)
        state = jax.jit(free.update)(free.init(params), params)
    assert sum(kept(state.masks).values()) == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jp.pruner({"a": 1}, 0.5), TypeError, "score function"),
        (lambda: jp.pruner(jp.scores.magnitude, lambda t: 0.5), TypeError, "where it begins and ends"),
        (lambda: jp.pruner(jp.scores.magnitude, 1.0), ValueError, r"\[0, 1\)"),
        (lambda: jp.pruner(jp.scores.magnitude, {}), ValueError, "empty dict"),
        (lambda: jp.pruner(jp.scores.magnitude, 0.5, scope="local"), ValueError, "scope must be"),
        (lambda: jp.pruner(jp.scores.magnitude, 0.5, of="all"), ValueError, "of must be"),
        (lambda: jp.pruner(jp.scores.magnitude, 0.5, floor=-1), ValueError, "floor must be"),
        (lambda: jp.pruner(jp.scores.magnitude, 0.5, every=0), ValueError, "every must be .* got 0"),
        (
            lambda: jp.pruner(
                jp.scores.magnitude,
                {"a": jp.schedules.one_shot(0.5, 1), "b": jp.schedules.one_shot(0.5, 2)},
                scope="layerwise",
            ),
            ValueError,
            "share their begin and end",
        ),
    ],
)
def test_a_factory_checks_its_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (jp.pruner(jp.scores.magnitude, {"nope": 0.5}, scope="layerwise"), "sparsity names 'nope'.*a/kernel"),
        (jp.pruner(jp.scores.magnitude, {"a/kernel": 0.5}), "scope='layerwise'"),
        (jp.pruner(jp.scores.taylor, 0.5), "needs gradients"),
        (
            jp.pruner(jp.scores.magnitude, 0.6, structure=jp.structures.nm(2, 4)),
            "has size 5, which 4 does not",
        ),
        (
            jp.pruner(
                jp.scores.magnitude, 0.6, structure=jp.structures.nm(2, 4), where=jp.matching("a/kernel")
            ),
            "removes at most 0.5 of the entries, got sparsity=0.6",
        ),
    ],
)
def test_update_checks_what_depends_on_the_params(pruner, message):
    params = params_of()
    with pytest.raises(ValueError, match=message):
        jax.jit(pruner.update)(pruner.init(params), params)


def test_init_and_update_say_what_is_missing():
    params = {"bias": jnp.ones(3)}
    pruner = jp.pruner(jp.scores.magnitude, 0.5)
    with pytest.raises(ValueError, match=r"where=kernels matches no leaf.*bias float32"):
        pruner.init(params)
    with pytest.raises(ValueError, match="needs params"):
        pruner.update(jp.pruner(jp.scores.magnitude, 0.5).init(params_of()), None)


def test_too_many_mask_updates_are_refused():
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.cubic(0.9, end_step=10**7))
    params = params_of()
    with pytest.raises(ValueError, match="Raise every"):
        pruner.update(pruner.init(params), params)


def test_the_masks_of_the_last_row_equal_pruning_once():
    params = params_of()
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.73, step=1))
    state = pruner.update(pruner.init(params), params)
    chex.assert_trees_all_equal(state.masks, jp.prune_once(params, jp.scores.magnitude, 0.73))
    assert np.asarray(state.step) == 1


@pytest.mark.parametrize("memory", [1.0, 0.5])
@pytest.mark.parametrize("jitted", [False, True])
def test_memory_sums_the_scores_of_all_calls(memory, jitted):
    # Movement pruning: -w * g summed over steps; here g differs at every call.
    params = params_of()
    grads = [params_of(seed) for seed in range(10, 16)]
    pruner = jp.pruner(
        lambda params, *, grads, **_: jax.tree.map(lambda w, g: -w * g, params, grads),
        sparsity=jp.schedules.one_shot(0.4, step=5),
        memory=memory,
    )
    update = jax.jit(pruner.update) if jitted else pruner.update
    state, total = pruner.init(params), jax.tree.map(np.zeros_like, params)
    for call, g in enumerate(grads, start=1):
        state = update(state, params, g)
        total = jax.tree.map(lambda t, w, g: memory * t - w * g, total, params, g)
        expected = jp.prune_once(params, total, 0.4) if call == 5 else None
        if call < 5:
            assert all(m.all() for m in jax.tree.leaves(state.masks))
        elif call == 5:
            jax.tree.map(np.testing.assert_array_equal, state.masks, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.scores, total)


def test_without_memory_nothing_is_stored_and_bad_memories_are_refused():
    assert jp.pruner(jp.scores.magnitude, 0.5).init(params_of()).scores == ()
    for memory in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"memory must be in \[0, 1\]"):
            jp.pruner(jp.scores.magnitude, 0.5, memory=memory)


def test_a_burst_of_nan_is_not_remembered():
    params = params_of()
    pruner = jp.pruner(jp.scores.taylor, jp.schedules.one_shot(0.5, step=3), memory=1.0)
    update = jax.jit(pruner.update)
    good, bad = params_of(1), jax.tree.map(lambda g: g.at[0].set(jnp.nan), params_of(2))
    state = pruner.init(params)
    for g in (good, bad, good):
        state = update(state, params, g)
    twice = jax.tree.map(lambda s: 2 * s, jp.scores.taylor(params, grads=good))
    jax.tree.map(np.testing.assert_array_equal, state.scores, twice)
    jax.tree.map(np.testing.assert_array_equal, state.masks, jp.prune_once(params, twice, 0.5))


def test_sums_stay_finite_where_scores_overflow_or_are_nan_and_take_no_part():
    params = {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}
    huge = {"kernel": jnp.arange(8.0).reshape(2, 4).at[0, 1].set(3e38), "bias": jnp.full(4, jnp.nan)}
    pruner = jp.pruner(jp.scores.gradient_magnitude, jp.schedules.one_shot(0.5, step=3), memory=1.0)
    update, state = jax.jit(pruner.update), pruner.init(params)
    for _ in range(3):
        state = update(state, params, huge)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.scores))
    # An infinite sum would never be ranked again.
    assert state.masks["kernel"].tolist() == [[False, True, False, False], [False, True, True, True]]


def test_sums_are_of_single_precision_at_least_and_of_real_numbers():
    params = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "c": {"kernel": jnp.ones((2, 2), jnp.complex64)}}
    params |= {"step": jnp.zeros((), jnp.int32)}
    state = jp.pruner(jp.scores.magnitude, 0.5, memory=0.9, scope="layerwise").init(params)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(state.scores)] == ["float32"] * 3
    state = jp.pruner(jp.scores.magnitude, 0.5, memory=0.9, scope="layerwise").update(state, params)
    assert int(state.masks["kernel"].sum() + state.masks["c"]["kernel"].sum()) == 5


def test_seeds_of_a_vmap_are_pruned_apart_and_at_their_own_time():
    # Some calls have scores that are not finite for one seed only, which catches up later.
    pruner = jp.pruner(jp.scores.taylor, jp.schedules.linear(0.6, begin_step=1, end_step=5), every=2)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params_of(seed) for seed in range(3)))
    grads = jax.tree.map(jnp.sin, params)
    update = jax.jit(jax.vmap(pruner.update))
    together, alone = jax.vmap(pruner.init)(params), [pruner.init(params_of(seed)) for seed in range(3)]
    for call in range(1, 7):
        now = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads) if call in (3, 5) else grads
        together = update(together, params, now)
        for seed in range(3):
            own = jax.tree.map(operator.itemgetter(seed), (params, now))
            alone[seed] = jax.jit(pruner.update)(alone[seed], *own)
            mine = jax.tree.map(operator.itemgetter(seed), together)
            jax.tree.map(np.testing.assert_array_equal, mine, alone[seed])
    assert [int(row) for row in together.row] == [3, 3, 3]


def test_scores_that_are_not_finite_at_first_prune_nothing_and_are_made_up_for():
    params = params_of()
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    for options in ({"memory": 1.0}, {}, {"structure": jp.structures.nm(2, 4), "where": jp.matching("a/*")}):
        pruner = jp.pruner(jp.scores.taylor, 0.5, **options)
        update = jax.jit(pruner.update)
        state = update(pruner.init(params), params, bad)
        assert all(mask.all() for mask in jax.tree.leaves(state.masks))
        assert int(state.row) == 0
        state = update(state, params, params)
        expected = jp.prune_once(
            params, jp.scores.taylor, 0.5, grads=params, **{k: v for k, v in options.items() if k != "memory"}
        )
        jax.tree.map(np.testing.assert_array_equal, state.masks, expected)


def test_outside_jit_bad_scores_are_named_at_the_call_that_has_them():
    params = params_of()
    pruner = jp.pruner(jp.scores.taylor, jp.schedules.one_shot(0.5, step=9), memory=1.0)
    with pytest.raises(ValueError, match=r"scores\['a/kernel'\] has 5 entries that are NaN or inf"):
        pruner.update(pruner.init(params), params, jax.tree.map(lambda g: g.at[0].set(jnp.nan), params))


def test_one_nan_weight_in_an_nm_group_stops_the_update_under_jit():
    params = {"kernel": jnp.array([[4.0, 3.0, 1.0, jnp.nan]])}
    pruner = jp.pruner(jp.scores.magnitude, 0.5, structure=jp.structures.nm(2, 4, axis=-1))
    assert bool(jax.jit(pruner.update)(pruner.init(params), params).masks["kernel"].all())


def test_a_factory_in_place_of_a_score_is_named():
    params = params_of()
    with pytest.raises(TypeError, match=r"fisher cannot be called as a score.*call it first: fisher\(...\)"):
        jp.prune_once(params, jp.scores.fisher, 0.5, batch=jnp.ones(3))


@pytest.mark.parametrize("rounds", [-1, 2.7])
def test_rounds_are_counted(rounds):
    with pytest.raises((TypeError, ValueError), match="rounds must be an integer of 0 or more"):
        jp.prune_rounds(params_of(), jp.pruner(jp.scores.magnitude, 0.5), rounds)


@pytest.mark.parametrize("stop", [0.0, 0.55, 0.9])
@pytest.mark.parametrize(
    ("scope", "of"), [("global", "total"), ("layerwise", "total"), ("layerwise", "remaining")]
)
def test_stop_is_met_to_the_unit_and_changes_nothing_before(scope, of, stop):
    rng = np.random.default_rng(0)
    params = {
        n: {"kernel": jnp.asarray(rng.normal(size=s))} for n, s in {"a": (10, 10), "b": (3, 11)}.items()
    }
    schedule = 0.3 if of == "remaining" else jp.schedules.geometric(0.3)
    free, bounded = (
        jp.pruner(jp.scores.magnitude, schedule, scope=scope, of=of, stop=s) for s in (None, stop)
    )
    end, states = round(stop * 133), [free.init(params), bounded.init(params)]
    for _ in range(7):
        before = states[1].masks
        states = [pruner.update(state, params) for pruner, state in zip((free, bounded), states, strict=True)]
        without, got = (133 - jp.metrics.nonzeros(state.masks) for state in states)
        assert got == min(without, end)
        if without <= end:
            chex.assert_trees_all_equal(states[0].masks, states[1].masks)
        elif scope == "layerwise" and jp.metrics.nonzeros(before) > 133 - end:
            # The last update is shared out as the whole one would have been, but for rounding.
            asked, cut = (
                [
                    int((old & ~new).sum())
                    for old, new in zip(*map(jax.tree.leaves, (before, s.masks)), strict=True)
                ]
                for s in states
            )
            assert all(abs(c - a * sum(cut) / sum(asked)) < 1 for a, c in zip(asked, cut, strict=True))
    nm = jp.pruner(
        jp.scores.magnitude, 0.5, structure=jp.structures.nm(2, 4), stop=0.25, where=jp.matching("c")
    )
    state = nm.init({"c": jnp.ones((8, 4))})
    assert int(nm.update(state, {"c": jnp.ones((8, 4))}).masks["c"].sum()) == 24


def test_a_stop_that_is_not_a_sparsity_is_refused():
    with pytest.raises(ValueError, match=r"stop must be in \[0, 1\)"):
        jp.pruner(jp.scores.magnitude, 0.5, stop=1.0)
