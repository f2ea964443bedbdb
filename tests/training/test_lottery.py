"""Lottery tickets, against a loop written out by hand, under jit and vmap; and what is refused."""

import itertools
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

SHAPES = {"a": {"kernel": (6, 5), "bias": (5,)}, "b": {"kernel": (5, 3)}}
X = jax.random.normal(jax.random.key(100), (32, 6))
Y = jnp.sin(X[:, :3]) + X[:, 3:]


@jax.jit
def init(key):
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    leaves = [
        jax.random.normal(k, s) for k, s in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]
    params = jax.tree.unflatten(treedef, leaves)
    # Large enough that no layer is emptied.
    return params | {"b": {"kernel": 2 * params["b"]["kernel"]}}


def loss_fn(params, index):
    h = jnp.tanh(X[index] @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.mean((h @ params["b"]["kernel"] - Y[index]) ** 2)


@partial(jax.jit, static_argnames="steps")
def train(key, params, masks, steps=20):
    """A training loop as a pure function: its batches come from the key."""
    tx = jp.keep_masked(optax.adam(3e-2), masks)

    def step(carry, number):
        params, opt_state = carry
        index = jax.random.randint(jax.random.fold_in(key, number), (8,), 0, 32)
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, index), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]


TRAIN = partial(train, jax.random.key(1))
PRUNER = jp.pruner(jp.scores.magnitude, sparsity=jp.schedules.geometric(0.2))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


def magnitude_masks(params, masks, removed):
    """The masks with `removed` entries gone of all kernels together: the oracle, by a sort."""
    entries = []
    for layer in ("a", "b"):
        kernel, kept = np.asarray(params[layer]["kernel"]), np.asarray(masks[layer]["kernel"])
        for i in np.ndindex(kernel.shape):
            entries.append((abs(kernel[i]) if kept[i] else -1.0, layer, i))
    out = jax.tree.map(np.ones_like, jax.tree.map(np.asarray, masks))
    for _, layer, i in sorted(entries)[:removed]:
        out[layer]["kernel"][i] = False
    return out


def loop(rewind, levels, tune=TRAIN):
    """The experiment of the paper, written out."""
    start, masks = init(jax.random.key(0)), jp.ones_masks(init(jax.random.key(0)))
    out = []
    for level in range(levels + 1):
        trained = (tune if level else TRAIN)(start, masks)
        out.append((start, masks, trained))
        masks = magnitude_masks(trained, masks, round((1 - 0.8 ** (level + 1)) * 45))
        start = jp.apply_masks(init(jax.random.key(0)) if rewind == "weights" else trained, masks)
    return out


@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "nothing"])
def test_a_run_is_the_loop_of_the_paper(rewind):
    tune = partial(train, jax.random.key(2), steps=5) if rewind == "nothing" else None
    tickets = list(jp.lottery_ticket(TRAIN, init(jax.random.key(0)), PRUNER, 4, rewind=rewind, tune=tune))
    expected = loop(rewind, 4, tune or TRAIN)
    assert [ticket.level for ticket in tickets] == [0, 1, 2, 3, 4]
    for ticket, (start, masks, trained) in zip(tickets, expected, strict=True):
        equal(ticket.masks, masks)
        equal(ticket.params, start)
        equal(ticket.trained, trained)
        removed = round((1 - 0.8**ticket.level) * 45)
        assert ticket.sparsity.prunable == pytest.approx(removed / 45, abs=1e-12)
        assert ticket.sparsity.model == pytest.approx(removed / 50, abs=1e-12)
        jp.check_pruned(ticket.trained, ticket.masks)


@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "nothing"])
def test_one_program_for_all_seeds_equals_runs_one_by_one(rewind):
    tune = (lambda key: partial(train, key, steps=5)) if rewind == "nothing" else lambda key: None
    keys = jax.random.split(jax.random.key(3), 3)

    def run(key):
        options = {"rewind": rewind, "tune": tune(key)}
        return jp.lottery_scan(partial(train, key), init(key), PRUNER, 4, **options)

    together = jax.jit(jax.vmap(run))(keys)
    assert together.level.shape == (3, 5)
    for index, key in enumerate(keys):
        one_by_one = jp.lottery_ticket(
            partial(train, key), init(key), PRUNER, 4, rewind=rewind, tune=tune(key)
        )
        for level, ticket in enumerate(one_by_one):
            own = jax.tree.map(operator.itemgetter((index, level)), together)
            equal(own.masks, ticket.masks)
            assert own.level == ticket.level
            close((own.params, own.trained), (ticket.params, ticket.trained))
            close(own.sparsity, ticket.sparsity)


def test_a_level_is_traced_once_and_what_is_measured_is_stacked():
    traced = []

    def counted(params, masks):
        traced.append(1)
        return TRAIN(params, masks)

    def run(key):
        return jp.lottery_scan(
            counted,
            init(key),
            PRUNER,
            8,
            measure=lambda t: (t.sparsity.prunable, t.masks["b"]["kernel"].sum()),
        )

    sparsity, kept = jax.jit(run)(jax.random.key(0))
    assert len(traced) == 1
    assert sparsity.shape == kept.shape == (9,)
    np.testing.assert_allclose(sparsity, [round((1 - 0.8**n) * 45) / 45 for n in range(9)], atol=1e-6)
    assert kept[0] == 15


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_run_resumes_after_any_ticket(stop):
    whole = list(jp.lottery_ticket(TRAIN, init(jax.random.key(0)), PRUNER, 4))
    # As a checkpoint gives it back: the level and the sparsity are arrays.
    saved = jax.tree.map(np.asarray, whole[stop])
    rest = list(jp.lottery_ticket(TRAIN, init(jax.random.key(0)), PRUNER, 4, after=saved))
    assert [ticket.level for ticket in rest] == list(range(stop + 1, 5))
    for ticket in rest:
        equal(ticket.trained, whole[ticket.level].trained)
        equal(ticket.pruner, whole[ticket.level].pruner)
    assert list(jp.lottery_ticket(TRAIN, init(jax.random.key(0)), PRUNER, 4, after=whole[4])) == []


def test_levels_are_trained_when_they_are_asked_for():
    calls = []

    def counted(params, masks):
        calls.append(1)
        return TRAIN(params, masks)

    tickets = jp.lottery_ticket(counted, init(jax.random.key(0)), PRUNER, 100)
    assert calls == []
    assert [ticket.level for ticket in itertools.islice(tickets, 3)] == [0, 1, 2]
    assert len(calls) == 3


def test_rewinding_to_a_later_step_takes_the_params_of_that_step():
    params = TRAIN(init(jax.random.key(0)), jp.ones_masks(init(jax.random.key(0))))
    _, ticket = jp.lottery_ticket(TRAIN, params, PRUNER, 1)
    equal(ticket.params, jp.apply_masks(params, ticket.masks))


def test_scores_of_gradients_get_their_inputs():
    def steepest(params, *, batch, **_):
        return jp.scores.taylor(params, grads=jax.grad(loss_fn)(params, batch))

    pruner = jp.pruner(steepest, sparsity=jp.schedules.geometric(0.5))
    dense, ticket = jp.lottery_ticket(TRAIN, init(jax.random.key(0)), pruner, 1, batch=jnp.arange(32))
    grads = jax.grad(loss_fn)(dense.trained, jnp.arange(32))
    expected = jp.prune_once(dense.trained, jp.scores.taylor, grads=grads, count=round(0.5 * 45))
    equal(ticket.masks, expected)


def test_rewind_restores_params_moments_and_schedule_counters():
    # Learning-rate rewinding must rewind the schedule's own counter.
    params = init(jax.random.key(0))
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0 / (1 + count)))
    saved = {}
    opt_state, now = tx.init(params), params
    for step in range(6):
        if step == 2:
            saved = {"params": now, "opt_state": opt_state}
        updates, opt_state = tx.update(jax.grad(loss_fn)(now, jnp.arange(32)), opt_state, now)
        now = optax.apply_updates(now, updates)
    masks = jp.prune_once(now, jp.scores.magnitude, 0.5)

    back = jp.rewind(saved, masks)
    assert jax.tree.structure(back) == jax.tree.structure(saved)
    equal(back["params"], jp.apply_masks(saved["params"], masks))
    for moment in ("mu", "nu"):
        then = optax.tree.get(saved["opt_state"], moment)
        equal(optax.tree.get(back["opt_state"], moment), jp.apply_masks(then, masks))
        assert float(jnp.abs(then["a"]["kernel"]).min()) > 0
    assert [int(c) for _, c in optax.tree.get_all_with_path(back["opt_state"], "count")] == [2, 2]

    kept, state = jp.rewind((now, saved["opt_state"]), masks)
    equal(kept, jp.apply_masks(now, masks))
    assert [int(c) for _, c in optax.tree.get_all_with_path(state, "count")] == [2, 2]


def test_rewind_puts_the_new_masks_into_a_saved_state():
    params = init(jax.random.key(0))
    tx = jp.keep_masked(optax.adam(1e-2), jp.ones_masks(params))
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5)
    state = jp.rewind(tx.init(params), masks)
    equal(state.masks, masks)
    updates, _ = tx.update(jax.grad(loss_fn)(params, jnp.arange(32)), state, params)
    jp.check_pruned(optax.apply_updates(params, updates), masks)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1, 7), (9, 1), (8, 5)]), st.floats(0, 1))
def test_shuffled_masks_keep_their_counts(seed, shape, density):
    rng, (rows, columns) = np.random.default_rng(seed), shape
    masks = {"kernel": jnp.asarray(rng.random((rows, columns)) < density), "bias": jnp.ones(columns, bool)}
    key = jax.random.key(seed)
    whole, within = jp.shuffled_masks(key, masks), jp.shuffled_masks(key, masks, within=-1)
    assert whole["kernel"].sum() == masks["kernel"].sum()
    np.testing.assert_array_equal(within["kernel"].sum(0), masks["kernel"].sum(0))
    rowwise = jp.shuffled_masks(key, masks, within=0)
    np.testing.assert_array_equal(rowwise["kernel"].sum(1), masks["kernel"].sum(1))
    assert bool(whole["bias"].all()) and bool(within["bias"].all())


def test_shuffled_masks_are_uniform_and_independent():
    masks = {"kernel": jnp.zeros((4, 2), bool).at[0].set(True)}
    keys = jax.random.split(jax.random.key(0), 4000)
    for within in (None, -1):
        drawn = jax.vmap(partial(jp.shuffled_masks, masks=masks, within=within))(keys)["kernel"]
        # Each entry is kept with probability 1/4; 5 standard deviations.
        assert float(jnp.abs(drawn.mean(0) - 0.25).max()) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    same_row = (drawn[..., 0] == drawn[..., 1]).all(-1).mean()
    assert abs(float(same_row) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_one_shot_masks_to_a_level_are_those_of_one_pruning():
    params = TRAIN(init(jax.random.key(0)), jp.ones_masks(init(jax.random.key(0))))
    for level in (0, 1, 5):
        masks = jp.prune_rounds(params, PRUNER, level)
        equal(masks, jp.prune_once(params, jp.scores.magnitude, count=round((1 - 0.8**level) * 45)))
        traced = jax.jit(lambda p, n: jp.prune_rounds(p, PRUNER, n))(params, level)
        equal(traced, masks)


def test_rounds_score_the_masked_params():
    # The score of an entry is how many of its column are left: each round takes from the emptiest.
    def column(params, **_):
        return {"kernel": jnp.broadcast_to((params["kernel"] != 0).sum(0), params["kernel"].shape) * 1.0}

    params = {"kernel": jnp.ones((4, 3))}
    pruner = jp.pruner(column, jp.schedules.Schedule(lambda level: level / 12, 0, 11), floor=0)
    masks = jp.prune_rounds(params, pruner, 6)
    assert masks["kernel"].sum(0).tolist() == [0, 2, 4]


def test_the_error_barrier_is_the_worst_point_of_the_line():
    one, other = init(jax.random.key(0)), init(jax.random.key(1))
    errors = []
    for a in np.linspace(0, 1, 21):
        between = jax.tree.map(lambda p, q, a=a: (1 - a) * p + a * q, one, other)
        errors.append(float(loss_fn(between, jnp.arange(32))))
    expected = max(errors) - (errors[0] + errors[-1]) / 2
    barrier = partial(jp.error_barrier, lambda p: loss_fn(p, jnp.arange(32)), points=21)
    assert float(jax.jit(barrier)(one, other)) == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    assert float(barrier(one, one)) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="points must be an integer of 2 or more, got 1"):
        jp.error_barrier(lambda p: 0.0, one, other, points=1)
    with pytest.raises(ValueError, match="other must have the tree structure"):
        jp.error_barrier(lambda p: 0.0, one, {"a": one["a"]})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": -1}, ValueError, r"levels must be an integer of 0 or more.*got -1"),
        (
            {"rewind": "init"},
            ValueError,
            "rewind must be 'weights', 'learning_rate' or 'nothing', got 'init'",
        ),
        ({"rewind": "nothing"}, ValueError, r"fine-tuning, and needs tune=.* it is missing"),
        ({"tune": TRAIN}, ValueError, "with rewind='weights' it would not be used"),
        ({"pruner": 0.2}, TypeError, "need a jaxprune Pruner, got float"),
        ({"train": {}, "params": TRAIN}, TypeError, "train must be a function"),
    ],
)
def test_what_is_refused(options, error, message):
    given = {"train": TRAIN, "params": init(jax.random.key(0)), "pruner": PRUNER, "levels": 1} | options
    for run in (jp.lottery_ticket, jp.lottery_scan):
        with pytest.raises(error, match=message):
            run(**given)


def test_rewind_names_a_mask_without_a_counterpart():
    with pytest.raises(
        ValueError, match=r"nothing in the saved state mirrors these masks.*kernel bool\[6, 5\]"
    ):
        jp.rewind({"count": jnp.zeros(())}, jp.ones_masks(init(jax.random.key(0))))
    masks = {"a": jnp.zeros((3, 4), bool), "b": jnp.ones(2, bool)}
    saved = {"a": jnp.ones((4, 3)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"what they prune would stay: a bool\[3, 4\]"):
        jp.rewind(saved, masks)
    # A mask that prunes nothing may be without one, as of frozen leaves.
    assert jp.rewind({"b": jnp.ones(2)}, {"a": jnp.ones((3, 4), bool), "b": masks["b"]})["b"].sum() == 2


def test_masks_that_a_traced_function_closes_over():
    masks = {"a": jnp.array([[True, False]]), "b": jnp.ones((2, 2), bool)}

    def run(params):
        assert jp.metrics.sparsity(masks, jp.matching("*")).model == pytest.approx(1 / 6)
        return jp.rewind({"a": params, "b": jnp.ones((2, 2))}, masks)

    assert jax.jit(run)(jnp.ones((1, 2)))["a"].tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match=r"would stay: a bool\[1, 2\]"):
        jax.jit(lambda b: jp.rewind({"b": b}, masks))(jnp.ones((2, 2)))


def test_shuffling_within_an_axis_that_no_mask_has_is_refused():
    with pytest.raises(ValueError, match="within=9: no mask has such an axis"):
        jp.shuffled_masks(jax.random.key(0), jp.ones_masks(init(jax.random.key(0))), within=9)
    empty = {"k": jnp.ones((3, 0), bool), "w": jnp.ones((2, 2), bool)}
    assert jp.shuffled_masks(jax.random.key(0), empty, within=-1)["k"].shape == (3, 0)


def test_a_barrier_of_half_precision_params_and_counters():
    one = {"w": jnp.ones(3, jnp.bfloat16), "step": jnp.int32(100)}
    other = {"w": -jnp.ones(3, jnp.bfloat16), "step": jnp.int32(300)}
    with jax.numpy_dtype_promotion("strict"):
        barrier = jp.error_barrier(lambda p: jnp.sum(1 - jnp.abs(p["w"])).astype(jnp.float32), one, other)
    assert float(barrier) == 3.0


def test_sparsity_under_jit_is_exactly_0_where_nothing_is_pruned():
    for shape in [(3, 7), (6, 7), (7, 7), (101, 7)]:
        masks = {"kernel": jnp.ones(shape, bool)}
        assert float(jax.jit(jp.metrics.sparsity)(masks).prunable) == 0.0
        masks["kernel"] = masks["kernel"].at[0, 0].set(False)
        removed = float(jax.jit(jp.metrics.sparsity)(masks).prunable)
        assert removed == pytest.approx(1 / (shape[0] * shape[1]), rel=1e-6)


def test_a_condition_stays_one_under_nested_vmap():
    from jaxprune.tracing.control import update_if

    def sorted_if(due, row):
        return update_if(due, jnp.sort, row)

    due, rows = jnp.array([[True, False], [False, False]]), jnp.arange(12.0).reshape(2, 2, 3)[..., ::-1]
    both = jax.vmap(jax.vmap(sorted_if))
    always, rarely = primitives(jax.make_jaxpr(both)(due, rows).jaxpr, behind_condition=False)
    assert "sort" in rarely and "sort" not in always
    expected = np.array(rows)
    expected[0, 0] = np.sort(expected[0, 0])
    np.testing.assert_array_equal(jax.jit(both)(due, rows), expected)


def test_training_that_undoes_the_zeros_is_found():
    params = init(jax.random.key(0))
    tickets = jp.lottery_ticket(lambda p, m: jax.tree.map(lambda w: w + 1, p), params, PRUNER, 3)
    next(tickets)
    with pytest.raises(ValueError, match="pruned entries that are not 0"):
        next(tickets)


def test_training_that_returns_another_tree_is_named():
    params = init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"train returned .*Missing: b/kernel"):
        next(jp.lottery_ticket(lambda p, m: {"a": p["a"]}, params, PRUNER, 3))


def test_a_level_that_removes_nothing_is_warned_about():
    params = init(jax.random.key(0))
    pruner = jp.pruner(jp.scores.magnitude, sparsity=jp.schedules.geometric(0.5, stop=0.6))
    tickets = jp.lottery_ticket(TRAIN, params, pruner, 4)
    for _ in range(3):
        next(tickets)
    with pytest.warns(UserWarning, match="level 3 removed nothing"):
        next(tickets)


def test_no_sort_in_a_training_step_under_vmap():
    """Gradual pruning of many seeds: the selection stays behind a condition, once for all seeds."""
    pruner = jp.pruner(
        jp.scores.magnitude, sparsity=jp.schedules.cubic(0.9, begin_step=2, end_step=18), every=4
    )
    tx = jp.wrap_optax(optax.adam(1e-2), pruner)

    def run(key):
        params = init(key)

        def step(carry, number):
            params, opt_state = carry
            grads = jax.grad(loss_fn)(params, jnp.arange(32))
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(20))[0]

    keys = jax.random.split(jax.random.key(0), 3)
    jaxpr = jax.make_jaxpr(jax.vmap(run))(keys)
    always, rarely = primitives(jaxpr.jaxpr, behind_condition=False)
    assert "sort" not in always | rarely
    # The bisection is the only loop besides the steps; it must not run at every one of them.
    assert "while" not in always
    assert "while" in rarely or "scan" in rarely


def primitives(jaxpr, behind_condition):
    """The names of the primitives that always run, and of those inside a cond."""
    always, rarely = set(), set()
    for eqn in jaxpr.eqns:
        (rarely if behind_condition else always).add(eqn.primitive.name)
        for sub in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                a, r = primitives(inner, behind_condition or eqn.primitive.name == "cond")
                always |= a
                rarely |= r
    return always, rarely
