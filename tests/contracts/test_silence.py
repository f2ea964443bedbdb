"""Nothing is silently ignored: misspelled arguments, cadences and levels that are most likely mistakes."""

from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {"a": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}, "b": {"kernel": jnp.ones((6, 2))}}
GRADS = jax.tree.map(jnp.sin, PARAMS)


def by_bonus(params, *, bonus, **_):
    return jax.tree.map(lambda w: jnp.abs(w) + bonus, params)


@wraps(by_bonus)
def wrapped(*args, **kwargs):
    return by_bonus(*args, **kwargs)


def blind(params, **_):
    return jax.tree.map(jnp.abs, params)


# --- Extra arguments


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"scop": "layerwise"}, "prune_once takes no argument 'scop'.*magnitude.*Did you mean 'scope'"),
        ({"structre": jp.structures.nm(2, 4)}, "Did you mean 'structure'"),
        ({"mask": None}, "Did you mean 'masks'"),
        ({"flor": 0}, "Did you mean 'floor'"),
        ({"gradients": GRADS}, "takes no argument 'gradients'"),
        ({"unheard_of": 1}, r"'unheard_of', nor does the score magnitude\.$"),
    ],
)
def test_a_misspelled_argument_is_refused_with_what_was_meant(extra, says):
    with pytest.raises(TypeError, match=says):
        jp.prune_once(PARAMS, jp.scores.magnitude, 0.5, **extra)


def _calls(**extra):
    pruner = jp.pruner(jp.scores.magnitude, 0.5)
    masks = jp.prune_once(PARAMS, jp.scores.magnitude, 0.5)
    moving = jp.rigl(masks, every=1, end_step=9)
    train = lambda params, masks: params  # noqa: E731
    return {
        "pruner.update": lambda: pruner.update(pruner.init(PARAMS), PARAMS, **extra),
        "under jit": lambda: jax.jit(lambda s, p: pruner.update(s, p, **extra))(pruner.init(PARAMS), PARAMS),
        "rigl": lambda: moving.update(moving.init(PARAMS), PARAMS, GRADS, **extra),
        "prune_rounds": lambda: jp.prune_rounds(PARAMS, pruner, 1, **extra),
        "lottery_ticket": lambda: list(jp.lottery_ticket(train, PARAMS, pruner, 1, **extra)),
        "budget": lambda: jp.budget(jp.metrics.nonzeros, PARAMS, at_most=20, **extra),
        "sensitivity": lambda: jp.sensitivity(lambda p: 0.0, PARAMS, levels=(0.5,), jit=False, **extra),
        "a tree of scores": lambda: jp.prune_once(PARAMS, GRADS, 0.5, **extra),
        "a wrapped score": lambda: jp.prune_once(PARAMS, wrapped, 0.5, bonus=1.0, **extra),
        "a score with **_": lambda: jp.prune_once(PARAMS, blind, 0.5, **extra),
    }


@pytest.mark.parametrize("name", _calls())
@pytest.mark.parametrize("wrong", ["scoep", "batchs"])
def test_every_function_that_passes_extras_on_refuses_what_no_score_names(name, wrong):
    with pytest.raises(TypeError, match=f"{wrong}"):
        _calls(**{wrong: 1})[name]()


@pytest.mark.parametrize(
    "score",
    [by_bonus, wrapped, partial(by_bonus), jax.jit(by_bonus), jp.scores.over_batches],
    ids=["plain", "wraps", "partial", "jit", "over_batches"],
)
def test_an_argument_that_the_score_or_the_one_it_wraps_names_is_passed_on(score):
    expected = jp.prune_once(PARAMS, by_bonus(PARAMS, bonus=2.0), 0.5)
    given = {"bonus": 2.0}
    if score is jp.scores.over_batches:
        score, given = score(by_bonus, lambda params, batch: 0.0), given | {"batches": jnp.ones((1, 3))}
    jax.tree.map(np.testing.assert_array_equal, jp.prune_once(PARAMS, score, 0.5, **given), expected)


def test_an_optimizers_extras_pass_and_only_named_ones_reach_the_score():
    tx = jp.wrap_optax(optax.polyak_sgd(), jp.pruner(blind, 0.5))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=0.5)
    assert jp.metrics.sparsity(state.pruner.masks).prunable == 0.5
    # A pruner of one's own, of which nothing is known, gets them all.
    seen = []
    own = jp.pruner(blind, 0.5)
    free = jp.Pruner(
        own.init, lambda state, params, **given: (seen.append(set(given)), own.update(state, params))[1]
    )
    tx = jp.wrap_optax(optax.polyak_sgd(), free)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value=0.5)
    assert seen == [{"grads", "value"}]


def test_a_key_reaches_the_score_in_an_optimizer():
    tx = jp.wrap_optax(optax.sgd(0.0), jp.pruner(jp.scores.random, 0.5))
    first, second = (
        tx.update(GRADS, tx.init(PARAMS), PARAMS, key=jax.random.key(k))[1].pruner.masks for k in (1, 2)
    )
    assert bool((first["a"]["kernel"] != second["a"]["kernel"]).any())


def test_several_sections_of_a_recipe_get_what_each_names():
    def second(params, *, weights, **_):
        return jax.tree.map(jnp.multiply, params, weights)

    source = {
        "prune": [
            {"score": "bonus", "sparsity": 0.5, "where": "a/*"},
            {"score": "second", "sparsity": 0.5, "where": "b/*"},
        ]
    }
    recipe = jp.recipes.parse(source, scores={"bonus": by_bonus, "second": second})
    pruner = recipe.pruner(PARAMS)
    assert pruner.takes == {"bonus", "stats", "weights"}
    assert rows(jp.metrics.table(jp.ones_masks(PARAMS), asked=pruner))["(asked)"] == ["0.5000"]
    masks = jp.prune_rounds(PARAMS, pruner, 1, bonus=1.0, weights=PARAMS)
    assert [int(mask.sum()) for mask in jax.tree.leaves(masks)] == [12, 6]
    with pytest.raises(TypeError, match=r"takes no argument 'weight'.*Did you mean 'weights'"):
        jp.prune_rounds(PARAMS, pruner, 1, bonus=1.0, weights=PARAMS, weight=1)


# --- Cadences and levels


def test_a_cadence_longer_than_its_schedule():
    ramp = jp.schedules.cubic(0.9, begin_step=100, end_step=800)
    with pytest.warns(
        UserWarning, match=r"pruner\(magnitude, cubic\(0.9, 100-800\), every=701.* takes 700 calls"
    ):
        jp.pruner(jp.scores.magnitude, ramp, every=701)
    jp.pruner(jp.scores.magnitude, ramp, every=700)  # a warning would be an error here
    jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(0.5, step=10), every=100)
    jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.5), every=100)


@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        (jp.schedules.geometric(0.2), {}),
        (0.2, {"of": "remaining"}),
        (jp.schedules.linear(0.2, end_step=9), {"of": "remaining"}),
        (jp.Schedule(lambda level: 1 - 0.9**level), {}),
        ({"a/kernel": 0.5, "b/kernel": jp.schedules.geometric(0.2)}, {"scope": "layerwise"}),
    ],
)
def test_levels_at_every_step_of_an_optimizer(sparsity, options):
    pruner = jp.pruner(jp.scores.magnitude, sparsity, **options)  # once per level, it is as it should be
    with pytest.warns(UserWarning, match=r"prunes further at every optimizer step.*every="):
        jp.wrap_optax(optax.sgd(0.1), pruner)
    jp.wrap_optax(optax.sgd(0.1), jp.pruner(jp.scores.magnitude, sparsity, every=2, **options))


@pytest.mark.parametrize(
    "sparsity", [0.5, jp.schedules.cubic(0.5, end_step=9), {"a/kernel": 0.5, "b/kernel": 0.2}]
)
def test_a_constant_of_the_total_and_a_ramp_are_no_mistake(sparsity):
    scope = "layerwise" if isinstance(sparsity, dict) else "global"
    jp.wrap_optax(optax.sgd(0.1), jp.pruner(jp.scores.magnitude, sparsity, scope=scope))


DESCRIBED = {
    "pruner(magnitude, cubic(0.9, 5-80), every=5, scope='global')": lambda: jp.pruner(
        jp.scores.magnitude, jp.schedules.cubic(0.9, begin_step=5, end_step=80), every=5
    ),
    "pruner(taylor, constant(0.5), every=1, scope='layerwise', structure=nm(2, 4, axis=-2))": lambda: (
        jp.pruner(jp.scores.taylor, 0.5, scope="layerwise", structure=jp.structures.nm(2, 4))
    ),
    "pruner(blind, 2 targets by path, constant(0.5), constant(0.2), every=3, scope='layerwise', "
    "of='remaining')": lambda: jp.pruner(
        blind, {"a": 0.5, "b": 0.2}, scope="layerwise", of="remaining", every=3
    ),
    "pruner(blind, schedule(0-9), every=1, scope='global')": lambda: jp.pruner(
        blind, jp.Schedule(optax.linear_schedule(0, 0.5, 9), end_step=9)
    ),
    "rewiring(grow=gradient_magnitude, drop=magnitude, every=2, end_step=9)": lambda: jp.rigl(
        {"kernel": np.array([[True, False]])}, every=2, end_step=9
    ),
}


@pytest.mark.parametrize("description", DESCRIBED)
def test_a_pruner_describes_itself(description):
    assert DESCRIBED[description]().description == description


# --- A recipe's patterns


PATTERNS = ('["a/*", "head/*"]', '{not: "head/*"}', '{all_of: [kernels, {not: "head/*"}]}')


@pytest.mark.parametrize("where", [*PATTERNS, '{any_of: ["b/*", "head/*"]}'])
def test_a_pattern_of_a_recipe_that_matches_nothing_beside_one_that_does(where):
    recipe = jp.recipes.parse(f"prune:\n  score: magnitude\n  sparsity: 0.5\n  where: {where}\n")
    with pytest.raises(
        jp.recipes.RecipeError, match=r"4: prune\.where.*'head/\*' matches no leaf.*a/kernel, b/kernel"
    ):
        recipe.pruner(PARAMS)
    assert recipe.pruner({**PARAMS, "head": {"kernel": jnp.ones((2, 2))}})


# --- What was asked beside what was achieved


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}


def test_a_table_of_units_compares_units():
    params = {"kernel": jnp.arange(24.0).reshape(4, 6), "wide": {"embedding": jnp.ones((9, 4))}}
    pruner = jp.pruner(jp.scores.magnitude, 0.5, structure=jp.structures.slices(axis=-1))
    state = pruner.update(pruner.init(params), params)
    by_pruner = rows(jp.metrics.table(state.masks, asked=pruner))
    assert by_pruner["units"] == ["3", "6", "0.5000"] and by_pruner["(asked)"] == ["0.5000"]
    assert by_pruner == rows(
        jp.metrics.table(state.masks, asked=0.5, structure=jp.structures.slices(axis=-1))
    )
    # N:M removes half of the entries when all its groups go.
    pruner = jp.pruner(jp.scores.magnitude, 0.5, structure=jp.structures.nm(2, 4, axis=0))
    table = rows(jp.metrics.table(pruner.update(pruner.init(params), params).masks, asked=pruner))
    assert table["prunable"] == ["12", "24", "0.5000"]
    assert table["units"] == ["0", "6", "1.0000"] and table["(asked)"] == ["1.0000"]


def test_a_table_takes_the_pruners_own_leaves_and_its_final_target():
    params = {"kernel": jnp.ones((2, 3)), "embedding": jnp.arange(8.0).reshape(4, 2)}
    where = jp.matching("embedding")
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.5, end_step=4), where=where)
    state = pruner.update(pruner.init(params), params)
    table = rows(jp.metrics.table(state.masks, asked=pruner))
    assert table["prunable"] == ["7", "8", "0.1250"] and table["(asked)"] == ["0.5000"]
    apart = jp.pruner(jp.scores.magnitude, {"kernel": 0.5}, scope="layerwise", where=lambda *_: True)
    table = rows(jp.metrics.table(jp.ones_masks(params), asked=apart))
    assert table["(asked)"] == [f"{3 / 14:.4f}"]
    stopped = jp.pruner(jp.scores.magnitude, 0.8, stop=0.5, where=lambda *_: True)
    assert rows(jp.metrics.table(jp.ones_masks(params), asked=stopped))["(asked)"] == ["0.5000"]
    levels = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.2))
    assert "(asked)" not in jp.metrics.table(jp.ones_masks(params), asked=levels)


def test_a_table_refuses_what_it_cannot_compare():
    masks = jp.ones_masks(PARAMS)
    with pytest.raises(TypeError, match="the pruner that made the masks"):
        jp.metrics.table(masks, asked="0.5")
    with pytest.raises(TypeError, match="a pruner knows its own"):
        jp.metrics.table(masks, asked=jp.pruner(blind, 0.5), structure=jp.structures.elements())
    with pytest.raises(TypeError, match="called"):
        jp.metrics.table(masks, structure=jp.structures.nm)


# --- Schedules of others


CURVES = {
    "optax linear": (optax.linear_schedule(0.0, 0.9, 80), lambda t: 0.9 * t / 80),
    "optax cosine": (
        lambda t: 0.9 - optax.cosine_decay_schedule(0.9, 80)(t),
        lambda t: 0.9 - 0.45 * (1 + np.cos(np.pi * t / 80)),
    ),
    "jnp": (lambda t: jnp.where(t < 40, 0.5, 0.9), lambda t: 0.5 if t < 40 else 0.9),
    "jitted": (jax.jit(lambda t: 0.9 * (t / 80) ** 2), lambda t: 0.9 * (t / 80) ** 2),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_schedule_of_jnp_functions_is_evaluated_in_double_precision_under_jit(name):
    curve, exact = CURVES[name]
    params = {"kernel": jnp.arange(1.0, 1001.0).reshape(10, 100)}
    schedule = jp.Schedule(curve, begin_step=0, end_step=80)
    pruner = jp.pruner(jp.scores.magnitude, schedule, every=20)
    state, update = pruner.init(params), jax.jit(pruner.update)
    for step in range(1, 85):
        state = update(state, params)
        assert 1000 - int(state.masks["kernel"].sum()) == round(exact(min(step // 20 * 20, 80)) * 1000)
    seen = []
    jax.jit(lambda x: (seen.append(schedule.on_host(33)), x)[1])(0.0)
    assert seen == [pytest.approx(exact(33), rel=1e-14)]
    assert float(jax.jit(schedule)(jnp.int32(33))) == pytest.approx(exact(33), rel=1e-6)


def test_a_schedule_that_rounds_to_float32_itself_is_taken_at_its_word():
    narrow = jp.Schedule(lambda t: jnp.float32(0.9) + 0 * jnp.asarray(t, jnp.float32), end_step=5)
    assert narrow.on_host(5) == float(np.float32(0.9)) != 0.9


def test_a_bare_schedule_is_refused_with_the_line_to_write():
    with pytest.raises(
        TypeError, match=r"sparsity=jaxprune\.Schedule\(schedule, begin_step=0, end_step=1000\)"
    ):
        jp.pruner(jp.scores.magnitude, optax.linear_schedule(0.0, 0.9, 80))
    too_much = jp.pruner(blind, jp.Schedule(optax.linear_schedule(0.0, 1.5, 9), end_step=9), every=9)
    with pytest.raises(
        ValueError, match=r"the sparsity that schedule\(0-9\) gives at 9 must be in \[0, 1\).*got 1.5"
    ):
        too_much.update(too_much.init(PARAMS), PARAMS)


# --- Integers


MAKERS = {
    "every": lambda n: jp.pruner(blind, 0.5, every=n),
    "floor": lambda n: jp.pruner(blind, 0.5, floor=n),
    "floor once": lambda n: jp.prune_once(PARAMS, blind, 0.5, floor=n),
    "rounds": lambda n: jp.prune_rounds(PARAMS, jp.pruner(blind, 0.5), n),
    "seed": lambda n: jp.pruner(jp.scores.random, 0.5, seed=n),
    "end_step": lambda n: jp.schedules.linear(0.5, end_step=n),
    "step": lambda n: jp.schedules.one_shot(0.5, step=n),
    "slices": lambda n: jp.structures.slices(axis=n),
    "blocks": lambda n: jp.structures.blocks((n, 1)),
    "nm": lambda n: jp.structures.nm(n, 4),
    "rigl": lambda n: jp.rigl({"kernel": np.array([[True, False]])}, every=n, end_step=9),
    "levels": lambda n: list(jp.lottery_ticket(lambda p, m: p, PARAMS, jp.pruner(blind, 0.1), n)),
    "set_ seed": lambda n: jp.set_({"kernel": np.array([[True, False]])}, every=1, end_step=9, seed=n),
    "at_once": lambda n: jp.sensitivity(
        lambda p: jnp.sum(p["b"]["kernel"]), PARAMS, levels=(0.5,), at_once=n
    ),
    "samples": lambda n: jp.scores.obd(lambda p, b: 0.0, samples=n),
    "chunk": lambda n: jp.scores.fisher(lambda p, b: 0.0, chunk=n),
    "within": lambda n: jp.shuffled_masks(jax.random.key(0), jp.ones_masks(PARAMS), within=n),
    "fpgm": lambda n: jp.scores.fpgm(PARAMS, axis=n),
}


@pytest.mark.parametrize("name", MAKERS)
def test_numpys_integers_are_integers_and_bools_and_floats_are_not(name):
    for good in (1, np.int64(1), np.uint8(1), np.array(1), jnp.int32(1)):
        MAKERS[name](good)
    for bad in (True, np.True_, 1.0, "1", None, np.array([1, 2])):
        if bad is None and name in ("samples", "within"):
            continue  # they mean something there
        with pytest.raises((TypeError, ValueError)):
            MAKERS[name](bad)
