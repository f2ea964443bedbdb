"""A pruner takes over a state, or masks: it reaches what its own schedule asks for, to the unit."""

import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

SHAPES = {"b": (7, 5), "a": (3, 11)}
PARAMS = {
    name: {"kernel": jax.random.normal(jax.random.key(i), s)} for i, (name, s) in enumerate(SHAPES.items())
}
SIZES = {f"{name}/kernel": int(np.prod(shape)) for name, shape in SHAPES.items()}


def num_removed(masks):
    """By leaf, how many entries are removed."""
    return {
        path: int((~np.asarray(mask)).sum())
        for path, mask in zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True)
    }


@pytest.fixture(params=[lambda update: update, jax.jit], ids=["eager", "jit"])
def compiled(request):
    return request.param


class Oracle:
    """What should be removed after each call, by the schedules alone; each leaf is a pool."""

    def __init__(self, sizes, removed=None):
        self.sizes, self.step = dict(sizes), 0
        self.removed = dict(removed or dict.fromkeys(sizes, 0))
        self.new = removed is None

    def rows(self, schedule, every, step):
        """How many updates a schedule has made by a step."""
        if schedule.end_step is None:
            return step // every
        points = [*range(schedule.begin_step, schedule.end_step, every), schedule.end_step]
        return sum(point <= step for point in points)

    def value(self, schedule, every, row):
        if schedule.end_step is None:
            return float(schedule(np.float64(row)))
        return float(schedule(np.float64(min(schedule.begin_step + (row - 1) * every, schedule.end_step))))

    def call(self, schedule, every, of, first=False):
        before = self.rows(schedule, every, self.step)
        if self.new and first:
            before = 0
        self.step += 1
        row = self.rows(schedule, every, self.step)
        for name, size in self.sizes.items():
            most = size - 1
            if of == "total" and row:
                asked = round(self.value(schedule, every, row) * size)
                self.removed[name] = max(self.removed[name], min(asked, most))
            for now in range(before + 1, row + 1) if of == "remaining" else ():
                more = round(self.value(schedule, every, now) * (size - self.removed[name]))
                self.removed[name] = min(self.removed[name] + more, most)
        return dict(self.removed)


def schedules():
    target = st.integers(1, 19).map(lambda n: n / 20)
    begin, span = st.integers(0, 6), st.integers(0, 9)
    ramp = st.builds(
        lambda make, s, b, n: make(s, begin_step=b, end_step=b + n),
        st.sampled_from([jp.schedules.linear, jp.schedules.cubic]),
        *(target, begin, span),
    )
    once = st.builds(lambda s, b: jp.schedules.one_shot(s, step=b), target, st.integers(0, 12))
    levels = st.builds(jp.schedules.geometric, target) | st.builds(jp.schedules.constant, target)
    return ramp | once | levels


part = st.tuples(schedules(), st.integers(1, 4), st.sampled_from(["total", "remaining"]), st.integers(1, 7))


@given(st.lists(part, min_size=2, max_size=4))
@settings(deadline=None, max_examples=15)
def test_layers_under_one_schedule_after_another(parts):
    check_parts(parts, lambda update: update)


@given(st.lists(part, min_size=2, max_size=2))
@settings(deadline=None, max_examples=3)
def test_layers_under_one_schedule_after_another_jitted(parts):
    check_parts(parts, jax.jit)


def check_parts(parts, compiled):
    oracle = Oracle(SIZES)
    state = None
    for schedule, every, of, calls in parts:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r".*longer than the schedule|.*target is missed|.*more units are"
            )
            warnings.filterwarnings("ignore", r".*units asked for were removed")
            pruner = jp.pruner(jp.scores.magnitude, schedule, every=every, of=of, scope="layerwise")
            state = pruner.init(PARAMS) if state is None else state
            update = compiled(pruner.update)
            for call in range(calls):
                state = update(state, PARAMS)
                assert num_removed(state.masks) == oracle.call(schedule, every, of, first=call == 0)
        oracle.new = False


@pytest.mark.parametrize("of", ["total", "remaining"])
def test_masks_to_start_from(of, compiled):
    masks = jp.prune_once(PARAMS, jp.scores.random, 0.4, key=jax.random.key(5), scope="layerwise")
    schedule = jp.schedules.constant(0.5) if of == "remaining" else jp.schedules.linear(0.8, end_step=6)
    pruner = jp.pruner(jp.scores.magnitude, schedule, of=of, every=2, scope="layerwise", masks=masks)
    oracle = Oracle(SIZES, num_removed(masks))
    state = pruner.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.masks, masks)
    update = compiled(pruner.update)
    for _ in range(7):
        state = update(state, PARAMS)
        assert num_removed(state.masks) == oracle.call(schedule, 2, of)
        jax.tree.map(lambda new, old: np.testing.assert_array_less(new, old + 0.5), state.masks, masks)


def test_the_callers_masks_outlive_a_donated_state():
    masks = jp.prune_once(PARAMS, jp.scores.magnitude, 0.4)
    pruner = jp.pruner(jp.scores.magnitude, 0.5, masks=masks)
    jax.jit(pruner.update, donate_argnums=0)(pruner.init(PARAMS), PARAMS)
    assert sum(num_removed(masks).values()) == round(0.4 * sum(SIZES.values()))


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"masks\['a/kernel'\] is float32"):
        jp.pruner(jp.scores.magnitude, 0.5, masks=PARAMS)
    other = jp.ones_masks({"a": PARAMS["a"]})
    with pytest.raises(ValueError, match="Missing: b/kernel"):
        jp.pruner(jp.scores.magnitude, 0.5, masks=other).init(PARAMS)


def test_a_finer_scope_takes_over_from_a_coarser():
    first = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.5, step=1), scope="global")
    state = first.update(first.init(PARAMS), PARAMS)
    second = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.7, step=1), scope="layerwise")
    for update in (second.update, jax.jit(second.update)):
        assert num_removed(update(state, PARAMS).masks) == {path: round(0.7 * n) for path, n in SIZES.items()}


def test_other_units_take_over_from_entries():
    # Rows that lost every entry count as removed; the second pruner counts rows.
    first = jp.pruner(jp.scores.magnitude, 0.3)
    state = first.update(first.init(PARAMS), PARAMS)
    rows = jp.structures.slices(axis=0)
    second = jp.pruner(jp.scores.magnitude, 0.5, structure=rows, scope="layerwise")
    masks = jax.jit(second.update)(state, PARAMS).masks
    empty = {
        path: int((~np.asarray(m)).all(1).sum())
        for path, m in zip(SIZES, (masks["b"]["kernel"], masks["a"]["kernel"]), strict=True)
    }
    assert empty == {"b/kernel": 4, "a/kernel": 2}


def test_other_leaves_of_the_same_sizes_take_over(compiled):
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (6, 6))} for i, name in enumerate("ab")}

    def run(pruner, state, calls):
        update = compiled(pruner.update)
        for _ in range(calls):
            state = update(state, params)
        return state

    ramp = jp.schedules.linear(0.5, end_step=4)
    first, second = (jp.pruner(jp.scores.magnitude, ramp, where=jp.matching(f"{name}/*")) for name in "ab")
    state = run(first, first.init(params), 5)
    assert num_removed(run(second, state, 1).masks) == {"a/kernel": 18, "b/kernel": 18}
    first, second = (
        jp.pruner(jp.scores.magnitude, 0.5, of="remaining", every=2, where=jp.matching(f"{name}/*"))
        for name in "ab"
    )
    state = run(second, run(first, first.init(params), 4), 2)
    assert num_removed(state.masks) == {"a/kernel": 27, "b/kernel": 18}


def test_other_groups_of_the_same_sizes_take_over():
    params = {"in": DENSE["in"][:, :12], "mid": DENSE["mid"][:12], "out": DENSE["out"]}
    groups = jp.channel_groups(network, params, X)
    state = None
    for group in groups.groups:
        structure = jp.structures.channels([group])
        pruner = jp.pruner(jp.scores.magnitude, 0.5, structure=structure)
        state = pruner.update(pruner.init(params) if state is None else state, params)
    assert [int(mask.any(0).sum()) for mask in state.masks.values()] == [6, 6, 3]


def test_rigl_takes_over_and_hands_on():
    first = jp.pruner(jp.scores.magnitude, 0.5, scope="layerwise")
    state = first.update(first.init(PARAMS), PARAMS)
    count = num_removed(state.masks)
    moving = jp.rigl(state.masks, every=2, end_step=10, fraction=0.5)
    for _ in range(4):
        state = jax.jit(moving.update)(state, PARAMS, jax.tree.map(jnp.cos, PARAMS))
    assert num_removed(state.masks) == count and int(state.row) == 2
    last = jp.pruner(jp.scores.magnitude, 0.8, scope="layerwise")
    assert num_removed(jax.jit(last.update)(state, PARAMS).masks) == {
        p: round(0.8 * n) for p, n in SIZES.items()
    }


def test_a_recipe_of_several_sections_takes_over_and_hands_on(compiled):
    def run(pruner, state):
        return compiled(pruner.update)(state, PARAMS)

    sections = [{"score": "magnitude", "sparsity": s, "where": f"{n}/*"} for n, s in (("a", 0.6), ("b", 0.4))]
    first = jp.pruner(jp.scores.magnitude, 0.2, scope="layerwise")
    state = run(first, first.init(PARAMS))
    state = run(jp.recipes.parse({"prune": sections}).pruner(PARAMS), state)
    assert num_removed(state.masks) == {"a/kernel": round(0.6 * 33), "b/kernel": 14} and state.row.shape == (
        2,
    )
    last = jp.pruner(jp.scores.magnitude, 0.7, scope="layerwise")
    state = run(last, state)
    assert num_removed(state.masks) == {p: round(0.7 * n) for p, n in SIZES.items()} and state.row.shape == ()


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.5), (0.5, 0.0), (1.0, 0.9)])
def test_another_memory(first, second):
    before = jp.pruner(jp.scores.magnitude, 0.3, memory=first)
    state = before.update(before.init(PARAMS), PARAMS)
    after = jp.pruner(jp.scores.magnitude, 0.6, memory=second)
    for update in (after.update, jax.jit(after.update)):
        now = update(state, PARAMS)
        assert sum(num_removed(now.masks).values()) == round(0.6 * sum(SIZES.values()))
        assert bool(jax.tree.leaves(now.scores)) == (second > 0)


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_a_stop_is_met_exactly_by_a_state_that_was_taken_over(scope, compiled):
    first = jp.pruner(jp.scores.random, 0.25, seed=3)
    state = first.update(first.init(PARAMS), PARAMS)
    pruner = jp.pruner(jp.scores.magnitude, 0.3, of="remaining", scope=scope, stop=0.7)
    update = compiled(pruner.update)
    counts = []
    for _ in range(6):
        state = update(state, PARAMS)
        counts.append(sum(num_removed(state.masks).values()))
    size = sum(SIZES.values())
    assert counts[-1] == round(0.7 * size) and counts[0] == pytest.approx(17 + 0.3 * (size - 17), abs=1)


def test_a_warning_where_the_masks_are_ahead_of_the_target():
    masks = jp.prune_once(PARAMS, jp.scores.magnitude, 0.8)
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.5, end_step=3), masks=masks)
    state = pruner.update(pruner.init(PARAMS), PARAMS)  # early in the schedule that is as it should be
    state = pruner.update(state, PARAMS)
    with pytest.warns(UserWarning, match="more units are pruned already than the target asks for"):
        pruner.update(state, PARAMS)


# In an optimizer


def trained(tx, params, state, steps):
    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: 0.1 * jnp.sin(9 * p), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_the_inner_optimizers_state_continues_under_a_pruner():
    masks = jp.prune_once(PARAMS, jp.scores.magnitude, 0.5)
    fixed = jp.keep_masked(optax.adam(1e-2), masks)
    params, state = trained(fixed, PARAMS, fixed.init(PARAMS), 3)
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.75, step=4), masks=state.masks)
    tx = jp.wrap_optax(optax.adam(1e-2), pruner, inner_state=state.inner)
    start = tx.init(params)
    jax.tree.map(np.testing.assert_array_equal, start.inner, state.inner)
    # Until the pruner acts, the run is the same as under `keep_masked`.
    kept = trained(fixed, params, state, 3)
    continued = trained(tx, params, start, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), kept[0], continued[0])
    params, end = trained(tx, *continued, 1)
    assert sum(num_removed(end.pruner.masks).values()) == round(0.75 * sum(SIZES.values()))
    jp.check_pruned(params, end.pruner.masks)


def test_a_state_of_another_optimizer_is_refused():
    pruner = jp.pruner(jp.scores.magnitude, 0.5)
    adam, sgd = optax.adam(1e-2), optax.sgd(1e-2)
    with pytest.raises(ValueError, match="inner_state must be a state of the wrapped optimizer"):
        jp.wrap_optax(adam, pruner, inner_state=sgd.init(PARAMS)).init(PARAMS)
    whole = jp.wrap_optax(adam, pruner).init(PARAMS)
    with pytest.raises(ValueError, match=r"pass its `.inner`"):
        jp.wrap_optax(adam, pruner, inner_state=whole).init(PARAMS)
    other = {**PARAMS, "a": {"kernel": jnp.ones((3, 12))}}
    with pytest.raises(ValueError, match=r"inner_state\['0/mu/a/kernel'\] has shape \(3, 12\)"):
        jp.wrap_optax(adam, pruner, inner_state=adam.init(other)).init(PARAMS)


# After compaction


X = jax.random.normal(jax.random.key(7), (6, 8))
DENSE = {
    "in": jax.random.normal(jax.random.key(1), (8, 16)),
    "mid": jax.random.normal(jax.random.key(2), (16, 12)),
    "out": jax.random.normal(jax.random.key(3), (12, 3)),
}


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["in"]) @ p["mid"]) @ p["out"]


def of_channels(apply_fn, params, schedule, **options):
    structure = jp.structures.channels(jp.channel_groups(apply_fn, params, X))
    pruner = jp.pruner(jp.scores.magnitude, schedule, structure=structure, every=2, **options)
    return jp.wrap_optax(optax.adam(1e-2), pruner)


def widths(apply_fn, params, masks):
    small = jp.compact(apply_fn, params, masks, X)
    return [small.params[name].shape for name in DENSE]


@pytest.mark.parametrize(
    ("scope", "of"), [("global", "total"), ("layerwise", "remaining"), ("isomorphic", "total")]
)
def test_compaction_in_mid_schedule_ends_with_the_same_widths(scope, of):
    ramp = jp.schedules.linear(0.6, end_step=8)
    schedule = ramp if of == "total" else jp.schedules.constant(0.25)
    tx = of_channels(network, DENSE, schedule, scope=scope, of=of)
    params, state = trained(tx, DENSE, tx.init(DENSE), 4)
    whole = trained(tx, params, state, 6)
    small = jp.compact(network, params, state.pruner.masks, X)
    assert small.params["in"].size < DENSE["in"].size
    tx = of_channels(small.apply, small.params, schedule, scope=scope, of=of)
    part = trained(tx, small.params, small.shrink(state), 6)
    assert widths(small.apply, part[0], part[1].pruner.masks) == widths(
        network, whole[0], whole[1].pruner.masks
    )
    # And once more, from the first compaction's shapes.
    again = jp.compact(small.apply, part[0], part[1].pruner.masks, X)
    assert again.shrink(part[1]).pruner.dense == part[1].pruner.dense
    assert small.expand(part[1]).pruner.dense == ()


def test_entries_that_compaction_cut_out_count_too():
    tx = jp.wrap_optax(
        optax.sgd(0.0), jp.pruner(jp.scores.magnitude, 0.5, scope="layerwise", where=lambda *_: True)
    )
    masks = jp.ones_masks(DENSE)
    masks["in"], masks["mid"] = masks["in"].at[:, :5].set(False), masks["mid"].at[:5].set(False)
    start = jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.9, step=100), masks=masks)
    state = jp.wrap_optax(optax.sgd(0.0), start).init(DENSE)
    small = jp.compact(network, DENSE, masks, X)
    _, state = trained(tx, small.params, small.shrink(state), 1)
    left = {path: int(m.sum()) for path, m in state.pruner.masks.items()}
    assert left == {"in": 64, "mid": 96, "out": 18}


def test_a_structure_that_does_not_say_what_it_lost_is_warned_about():
    def pool(scores, masks):
        unit = jnp.linalg.norm(scores["in"], axis=0)
        expand = lambda keep: {"in": jnp.broadcast_to(keep["units"], scores["in"].shape)}  # noqa: E731
        return jp.Units({"units": unit}, {"units": masks["in"].any(0)}, expand)

    own = jp.Structure(pool, name="own units", spans_leaves=True)
    pruner = jp.pruner(jp.scores.magnitude, 0.5, structure=own, where=lambda path, _: path == "in")
    masks = jp.ones_masks(DENSE) | {"in": jnp.ones((8, 16), bool).at[:, :4].set(False)}
    state = pruner.init(DENSE)._replace(masks=masks)
    small = jp.compact(network, DENSE, masks, X)
    with pytest.warns(UserWarning, match=r"own units does not say how many there were.*units has 12"):
        state = pruner.update(small.shrink(state), small.params)
    assert int(state.masks["in"].any(0).sum()) == 6


def test_a_state_after_compaction_goes_through_a_checkpoint():
    tx = of_channels(network, DENSE, jp.schedules.linear(0.6, end_step=8))
    params, state = trained(tx, DENSE, tx.init(DENSE), 4)
    state = jp.compact(network, params, state.pruner.masks, X).shrink(state)
    read = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    assert read.pruner.dense == state.pruner.dense and dict(read.pruner.dense.by_path)["mid"] == (16, 12)
    jax.tree.map(np.testing.assert_array_equal, read, state)
