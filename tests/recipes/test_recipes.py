"""Recipes: they read back, do what the same call in Python does, and say where they are wrong."""

import functools
import inspect
import re
import string
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.recipes import calibrating, document, options, sections
from tests.recipes.errors import GOOD, UNFIT, WRONG

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"a": {"kernel": array(4, 8), "bias": array(8)}, "b": {"kernel": array(8, 4), "scale": array(8)}}
GRADS = jax.tree.map(lambda leaf: array(*leaf.shape), PARAMS)
BATCH = (array(6, 4), jnp.asarray(RNG.integers(0, 4, 6)))


def apply_fn(params, x):
    h = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) * params["b"]["scale"]
    return h @ params["b"]["kernel"]


def loss_fn(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()


X = BATCH[0]
GIVEN = {"loss_fn": loss_fn, "apply_fn": apply_fn, "x": X}
ACTIVATIONS = {"a/kernel": jax.nn.relu(array(6, 8)), "b/kernel": jax.nn.relu(array(6, 4))}
INPUTS = {"grads": GRADS, "batch": BATCH, "activations": ACTIVATIONS, "key": jax.random.key(5)}
S = jp.scores


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def recipe_of(**prune):
    return jp.recipes.parse({"prune": {"score": "magnitude", "sparsity": 0.5, **prune}})


# --- the same as in Python, for every member of the library

# How a score is written, and what it stands for.
SCORES = {
    "apoz": ("apoz", S.apoz),
    "block_influence": ({"block_influence": {"axis": -1}}, None),
    "bn_scale": ({"bn_scale": {"scales": {"a/kernel": "b/scale"}}}, S.bn_scale({"a/kernel": "b/scale"})),
    "brute_force": ({"brute_force": {"chunk": 4}}, S.brute_force(loss_fn, chunk=4)),
    "fisher": ("fisher", S.fisher(loss_fn)),
    "flap": ("flap", S.flap),
    "fpgm": ({"fpgm": {"axis": -2}}, lambda params, **inputs: S.fpgm(params, axis=-2)),
    "gradient_magnitude": ("gradient_magnitude", S.gradient_magnitude),
    "grasp": ("grasp", S.grasp(loss_fn)),
    "lamp": ("lamp", S.lamp),
    "magnitude": ({"magnitude": {}}, S.magnitude),
    "mean_activation": ({"mean_activation": -1}, S.mean_activation),
    "movement": ("movement", S.movement),
    "normalized_magnitude": ("normalized_magnitude", S.normalized_magnitude),
    "obd": ({"obd": {"samples": None, "chunk": 8}}, S.obd(loss_fn, chunk=8)),
    "obs": ({"obs": 1e2}, S.obs(loss_fn, damping=1e2)),
    "obs_diagonal": ("obs_diagonal", S.obs_diagonal),
    "over_batches": ({"over_batches": {"score": "taylor"}}, S.over_batches(S.taylor, loss_fn)),
    "random": ("random", S.random),
    "ria": ({"ria": {"power": 0.25}}, None),
    "signed_taylor": ("signed_taylor", S.signed_taylor),
    "snip": ("snip", S.snip),
    "synflow": ({"synflow": {"rescale": False}}, S.synflow(apply_fn, X, rescale=False)),
    "taylor": ("taylor", S.taylor),
    "wanda": ("wanda", S.wanda),
}


@pytest.mark.parametrize("name", S.__all__)
def test_every_score(name):
    written, score = SCORES[name]
    recipe = recipe_of(score=written)
    assert jp.recipes.parse(recipe.to_yaml()) == recipe
    if name == "block_influence":
        assert recipe._sections[0].score.needs == {"apply_fn", "blocks"}
        return  # of a network with residual blocks: see tests/scores/test_scores_blocks.py
    made = recipe._sections[0].score.make(GIVEN)
    if name in ("flap", "obs_diagonal", "ria", "wanda"):
        assert made is score or made.__wrapped__ is S.ria
        return  # they read statistics: see tests/pruning/test_contracted.py
    if name in ("brute_force", "fisher", "grasp", "obd"):
        return  # the same closure over the same arguments: see below, and `obs`
    inputs = INPUTS | {"batches": jax.tree.map(lambda leaf: leaf[None], BATCH)}
    if name == "over_batches":
        del inputs["batch"]
    equal(made(PARAMS, **inputs), score(PARAMS, **inputs))


@pytest.mark.parametrize("name", ["brute_force", "fisher", "grasp", "obd"])
def test_what_makes_scores_gets_the_options_and_inputs(name, monkeypatch):
    factory, got = getattr(S, name), []

    @functools.wraps(factory)
    def watched(*args, **kwargs):
        got.append(inspect.signature(factory).bind(*args, **kwargs).arguments)
        return factory(*args, **kwargs)

    monkeypatch.setattr(S, name, watched)
    written = SCORES[name][0]
    wanted = next(iter(written.values())) if isinstance(written, dict) else {}
    recipe_of(score=written, where="a/kernel").pruner(PARAMS, **GIVEN)
    (arguments,) = got
    where = arguments.pop("where")
    assert [path for path in jp.leaf_paths(PARAMS) if where(path, None)] == ["a/kernel"]  # the section's
    assert arguments == wanted | {"loss_fn": loss_fn}


STRUCTURES = {
    "elements": ("elements", jp.structures.elements()),
    "slices": ({"slices": {"axis": [-1], "norm": ".inf"}}, jp.structures.slices(axis=(-1,), norm=np.inf)),
    "blocks": ({"blocks": {"shape": [2, 2], "norm": "sum"}}, jp.structures.blocks((2, 2), norm=jnp.sum)),
    "nm": ({"nm": {"n": 2, "m": 4}}, jp.structures.nm(2, 4)),
    "layers": (
        {"layers": {"blocks": ["a", "b"], "norm": "sum", "reduce": "max"}},
        jp.structures.layers(["a", "b"], norm=jnp.sum, reduce=jnp.max),
    ),
    "channels": (
        {"channels": {"normalize": "mean", "reduce": "max", "axis": -1, "multiple_of": [3, 5]}},
        None,
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure(name):
    written, structure = STRUCTURES[name]
    groups = jp.channel_groups(apply_fn, PARAMS, X)
    if structure is None:
        (group,) = groups.removable()
        options = {"normalize": jnp.mean, "reduce": jnp.max, "axis": -1, "multiple_of": (3, 5)}
        options["min_width"] = written["channels"]["min_width"] = {group.name: 5}
        structure = jp.structures.channels(groups, **options)
    (section,) = recipe_of(structure=written)._sections
    leaves = {"a/kernel": PARAMS["a"]["kernel"], "b/kernel": PARAMS["b"]["kernel"]}
    ones = {path: jnp.ones(leaf.shape, bool) for path, leaf in leaves.items()}
    expected = structure.pool(leaves, ones)
    for given_ in ({"groups": groups}, GIVEN):  # as they are, or found from the function
        own = section._structure(PARAMS, given_)
        functions = {"pool": structure.pool, "sizes_of": structure.sizes_of, "along": structure.along}
        assert own._replace(**functions) == structure
        units = own.pool(leaves, ones)
        equal(units[:2], expected[:2])
        keep = jax.tree.map(lambda scores: scores > 0.5, units.scores)
        equal(units.expand(keep), expected.expand(keep))


# --- trained networks

SOLVERS = {
    "sparsegpt": ({"sparsegpt": {"block": 2, "damping": 0.1}}, jp.solvers.sparsegpt(block=2, damping=0.1)),
    "alps": ({"alps": 5}, jp.solvers.alps(iterations=5)),
    "obc": ("obc", jp.solvers.obc()),
    "mask_only": ({"mask_only": "wanda"}, jp.solvers.mask_only(S.wanda)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver(name):
    written, solver = SOLVERS[name]
    recipe = jp.recipes.parse({"calibrate": {"solver": written, "sparsity": 0.5, "refine": 3}})
    assert jp.recipes.parse(recipe.to_yaml()) == recipe
    assert recipe.calibrates
    done = recipe.prune_layers(apply_fn, PARAMS, [X])
    wanted = jp.prune_layers(apply_fn, PARAMS, [X], solver, 0.5, refine=3)
    equal(done[:2], wanted[:2])
    assert int(done.masks["a"]["kernel"].sum()) == 16


def test_what_a_recipe_calibrates():
    text = """
    calibrate:
      solver: {mask_only: magnitude}
      structure: {nm: {n: 1, m: 2}}
      where: a/kernel
      target: dense
      refine: 2
    """
    recipe = jp.recipes.parse(text)
    wanted = jp.prune_layers(
        apply_fn,
        PARAMS,
        [X, X + 1],
        jp.solvers.mask_only(S.magnitude),
        structure=jp.structures.nm(1, 2),
        where=jp.matching("a/kernel"),
        target="dense",
        refine=2,
    )
    rows = []
    done = recipe.prune_layers(apply_fn, PARAMS, [X, X + 1], progress=rows.append)
    equal(done[:2], wanted[:2])
    assert [row.name for row in rows] == ["a/kernel"]
    recipe = jp.recipes.parse({"calibrate": {"solver": "alps", "sparsity": {"per_path": {"a/kernel": 0.25}}}})
    assert int(recipe.prune_layers(apply_fn, PARAMS, [X]).masks["a"]["kernel"].sum()) == 24
    recipe = jp.recipes.parse({"calibrate": {"solver": "alps", "sparsity": {"uniform": 0.25}}})
    assert int(recipe.prune_layers(apply_fn, PARAMS, [X]).masks["a"]["kernel"].sum()) == 24
    channels = {"solver": "alps", "sparsity": 0.5, "structure": "channels"}
    done = jp.recipes.parse({"calibrate": channels}).prune_layers(apply_fn, PARAMS, [X])
    assert int(done.masks["a"]["bias"].sum()) == 4


CALIBRATE = "calibrate:\n  solver: alps\n  sparsity: 0.5\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("calibrate: {sparsity: 0.5}", "recipe:1: calibrate: solver must be given"),
        ("calibrate: {solver: alps}", "recipe:1: calibrate: sparsity must be given"),
        ("calibrate: {solver: alpz, sparsity: 0.5}", "calibrate.solver: .*Did you mean alps?"),
        ("calibrate: {solver: {alps: 0}, sparsity: 0.5}", "calibrate.solver.alps: .*iterations"),
        ("calibrate: {solver: alps, sparsity: 1.5}", r"calibrate.sparsity: sparsity must be in \[0, 1\)"),
        ("calibrate: {solver: alps, sparsity: {linear: {sparsity: 0.5, end_step: 2}}}", "no schedule"),
        (CALIBRATE + "  target: density\n", "recipe:4: calibrate.target: .*Did you mean dense?"),
        (CALIBRATE + "  weights: 1\n", 'recipe:4: calibrate.weights: unknown "weights"'),
        (CALIBRATE + "stop: {accuracy: 0.9}\n", "recipe:4: stop: it cannot stand beside calibrate"),
        (CALIBRATE + "prune: {score: magnitude, sparsity: 0.5}\n", "recipe:4: prune: it cannot stand beside"),
    ],
)
def test_what_a_calibration_cannot_be(text, said):
    with pytest.raises(jp.recipes.RecipeError, match=said):
        jp.recipes.parse(text)


def test_what_does_not_fit_a_trained_network():
    recipe = jp.recipes.parse(CALIBRATE + "  where: c/*\n")
    with pytest.raises(jp.recipes.RecipeError, match=r"calibrate\.where: 'c/\*' matches no leaf"):
        recipe.prune_layers(apply_fn, PARAMS, [X])
    with pytest.raises(jp.recipes.RecipeError, match=r"recipe:1: calibrate: .*no batch"):
        jp.recipes.parse(CALIBRATE).prune_layers(apply_fn, PARAMS, [])
    with pytest.raises(jp.recipes.RecipeError, match=r"has no pruner: call recipe\.prune_layers"):
        jp.recipes.parse(CALIBRATE).pruner(PARAMS)
    with pytest.raises(jp.recipes.RecipeError, match="no section calibrate"):
        recipe_of().prune_layers(apply_fn, PARAMS, [X])


SCHEDULES = {
    "constant": ({"constant": 0.5}, jp.schedules.constant(0.5)),
    "one_shot": ({"one_shot": {"sparsity": 0.9, "step": 3}}, jp.schedules.one_shot(0.9, 3)),
    "linear": ({"linear": {"sparsity": "8e-1", "end_step": 1e1}}, jp.schedules.linear(0.8, end_step=10)),
    "cubic": (
        {"cubic": {"sparsity": 0.9, "begin_step": 2, "end_step": 9, "initial_sparsity": 0.1}},
        jp.schedules.cubic(0.9, begin_step=2, end_step=9, initial_sparsity=0.1),
    ),
    "geometric": ({"geometric": {"rate": 0.2, "stop": 0.7}}, jp.schedules.geometric(0.2, stop=0.7)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name):
    written, schedule = SCHEDULES[name]
    (section,) = recipe_of(sparsity=written)._sections
    got = section.targets.of(PARAMS, jp.kernels)
    steps = np.arange(12)
    np.testing.assert_array_equal(got(steps), schedule(steps))
    assert (got.begin_step, got.end_step) == (schedule.begin_step, schedule.end_step)
    assert section.end_step == schedule.end_step
    assert recipe_of(sparsity=written).once == (name == "never")


def test_the_tables_hold_all_that_a_recipe_can_name():
    assert set(SCORES) == set(options.public_scores())
    assert set(STRUCTURES) == set(sections.STRUCTURES)
    assert (
        set(SOLVERS)
        == set(calibrating.SOLVERS)
        == set(jp.solvers.__all__) - {"Pattern", "Solver", "with_swaps"}
    )
    assert set(SCHEDULES) == set(sections._SCHEDULES)
    assert set(sections._DISTRIBUTIONS) == {"erk", "uniform"}
    assert set(sections._DYNAMIC) == {"rigl", "set", "rewiring"}
    # All arguments of a pruner but those that are said in other words.
    written = {"scores", "stop"} ^ (set(sections._KEYS) | {"scores", "stop"}) - {"score", "rewire"}
    # Masks to start from are arrays, which no recipe holds.
    assert written == set(inspect.signature(jp.pruner).parameters) - {"scores", "stop", "masks"}
    assert sections.inputs() == ["apply_fn", "blocks", "groups", "loss_fn", "x"]


@pytest.mark.parametrize("name", ["erk", "uniform", "per_path", "scheduled"])
def test_targets_by_path(name):
    leaves = {"a/kernel": 0.75, "b/kernel": 0.25}
    written = {"erk": {"erk": 0.5}, "uniform": {"uniform": 0.5}}.get(name, {"per_path": leaves})
    expected = {"erk": jp.distributions.erk, "uniform": jp.distributions.uniform}.get(
        name, lambda params, sparsity: leaves
    )(PARAMS, 0.5)
    if name == "scheduled":
        written = {"cubic": {"sparsity": written, "end_step": 2}}
        expected = {path: jp.schedules.cubic(s, end_step=2) for path, s in expected.items()}
    pruner = jp.pruner(S.magnitude, expected, scope="layerwise", floor=2)
    recipe = recipe_of(sparsity=written, scope="layerwise", floor=2)
    for rounds in (1, 2):
        equal(jp.prune_rounds(PARAMS, recipe.pruner(PARAMS), rounds), jp.prune_rounds(PARAMS, pruner, rounds))
    assert recipe.once == (name != "scheduled")
    assert recipe.end_step == (2 if name == "scheduled" else None)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("kernels", {"a/kernel", "b/kernel"}),
        ("a/*", {"a/kernel", "a/bias"}),
        (["a/bias", "b/*"], {"a/bias", "b/kernel", "b/scale"}),
        ({"all_of": ["kernels", {"not": "a/*"}]}, {"b/kernel"}),
        ({"any_of": ["kernels", "*/scale"]}, {"a/kernel", "b/kernel", "b/scale"}),
    ],
    ids=["kernels", "pattern", "list", "all-of", "any-of"],
)
def test_where(written, expected):
    recipe = recipe_of(where=written)
    leaves = zip(jp.leaf_paths(PARAMS), jax.tree.leaves(PARAMS), strict=True)
    assert {path for path, leaf in leaves if recipe.where(path, leaf)} == expected


@pytest.mark.parametrize("name", ["rigl", "set", "rewiring"])
def test_rewired_masks(name):
    moves = {"every": 1, "end_step": 9, "fraction": 0.5}
    extra = {"rewiring": {"grow": {"fisher": {}}, "drop": "taylor"}}.get(name, {})
    prune = {"score": "random", "scope": "layerwise", "sparsity": {"erk": 0.5}, "seed": 3}
    recipe = recipe_of(**prune, rewire={name: moves | extra})
    assert recipe.end_step == 9
    densities = jp.distributions.erk(PARAMS, 0.5)
    masks = jp.prune_once(PARAMS, S.random, densities, scope="layerwise", key=jax.random.key(3))
    function = {"rigl": jp.rigl, "set": jp.set_, "rewiring": jp.rewiring}[name]
    if extra:
        extra = {"grow": S.fisher(loss_fn), "drop": S.taylor}
    pruners = recipe.pruner(PARAMS, **GIVEN), function(masks, **moves, **extra)
    states = [pruner.init(PARAMS) for pruner in pruners]
    equal(states[0].masks, masks)
    assert pruners[0].regrows
    states = [
        pruner.update(state, PARAMS, grads=GRADS, **({"batch": BATCH} if "batch" in pruner.takes else {}))
        for pruner, state in zip(pruners, states, strict=True)
    ]
    equal(states[0].masks, states[1].masks)
    other = recipe.pruner(PARAMS, key=jax.random.key(4), **GIVEN).init(PARAMS).masks
    assert any(bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, (masks, other)), strict=True))


def test_a_score_of_ones_own():
    def distance(p, *, init, **_):
        return jax.tree.map(lambda w, w0: abs(w - w0), p, init)

    source = {"prune": {"score": "distance", "sparsity": 0.5}}
    recipe = jp.recipes.parse(source, scores={"distance": distance})
    init = jax.tree.map(lambda leaf: leaf * 0.5 + 1, PARAMS)
    got = jp.prune_rounds(PARAMS, recipe.pruner(PARAMS), 1, init=init)
    equal(got, jp.prune_once(PARAMS, distance, 0.5, init=init))
    with pytest.raises(jp.recipes.RecipeError, match=r"prune\.score: unknown \"distance\""):
        jp.recipes.parse(source)


def test_a_section_follows_all_arguments_of_a_pruner():
    recipe = recipe_of(
        score="random", sparsity={"geometric": 0.2}, of="total", every=2, floor=3, memory=0.5, seed=7,
        scope="layerwise", where="*/kernel",
    )  # fmt: skip
    pruner = jp.pruner(
        S.random, jp.schedules.geometric(0.2), of="total", every=2, floor=3, memory=0.5, seed=7,
        scope="layerwise", where=jp.matching("*/kernel"),
    )  # fmt: skip
    equal(jp.prune_rounds(PARAMS, recipe.pruner(PARAMS), 4), jp.prune_rounds(PARAMS, pruner, 4))


# --- several sections


def test_sections_prune_their_own_leaves_as_alone():
    halves = [
        "{score: movement, where: a/kernel, sparsity: {linear: {sparsity: 0.5, end_step: 3}}, memory: 1}",
        "{score: taylor, where: b/*, sparsity: {geometric: 0.3}, memory: 0.5}",
        "{score: magnitude, where: a/bias, sparsity: 0.25}",
    ]
    recipe = jp.recipes.parse(f"prune: [{', '.join(halves)}]")
    assert recipe.end_step == 3
    assert not recipe.once
    pruner = recipe.pruner(PARAMS)
    state, update = pruner.init(PARAMS), jax.jit(pruner.update)
    alone = [jp.recipes.parse(f"prune: {half}").pruner(PARAMS) for half in halves]
    states = [each.init(PARAMS) for each in alone]
    for number in range(4):
        grads = jax.tree.map(lambda leaf, n=number: leaf * (n - 1.5), GRADS)
        state = update(state, PARAMS, grads=grads)
        states = [each.update(s, PARAMS, grads=grads) for each, s in zip(alone, states, strict=True)]
        equal(state.masks, jp.intersect(*[s.masks for s in states]))
        assert state.row.tolist() == [int(s.row) for s in states]


def test_sections_share_masks_so_that_sparsities_are_met():
    # Channels of `a` take rows of `b` with them; these count in what `b` is to lose.
    recipe = jp.recipes.parse("""
        prune:
        - {score: magnitude, where: a/kernel, structure: channels, sparsity: 0.5}
        - {score: magnitude, where: b/kernel, sparsity: 0.75}
    """)
    masks = jp.prune_rounds(PARAMS, recipe.pruner(PARAMS, **GIVEN), 1)
    assert int(masks["a"]["kernel"].any(0).sum()) == 4
    assert int(masks["b"]["kernel"].sum()) == 8


def test_optax_maps_the_params_in_the_state_of_several_sections():
    recipe = jp.recipes.parse("""
        prune:
        - {score: magnitude, where: a/kernel, sparsity: {cubic: {sparsity: 0.5, end_step: 2}}}
        - {score: movement, where: b/kernel, sparsity: 0.25, memory: 1}
    """)
    tx = jp.wrap_optax(optax.adam(1e-2), recipe.pruner(PARAMS))
    placed = optax.tree.map_params(tx, lambda leaf: leaf, jax.tree.map(lambda leaf: leaf, tx.init(PARAMS)))
    assert jax.tree.structure(placed) == jax.tree.structure(tx.init(PARAMS))


# --- when to stop


def test_a_sparsity_to_stop_at_is_the_pruners():
    source = {"prune": {"score": "magnitude", "sparsity": 0.3, "of": "remaining"}, "stop": {"sparsity": 0.5}}
    recipe = jp.recipes.parse(source)
    masks = jp.prune_rounds(PARAMS, recipe.pruner(PARAMS), 5)
    assert jp.metrics.sparsity(masks).prunable == 0.5
    assert recipe.stop.reached() is None


def test_reasons_to_stop():
    stop = jp.recipes.parse(
        {"prune": {"score": "magnitude", "sparsity": 0.5}, "stop": {"macs": 1e5, "accuracy": 0.9}}
    ).stop
    assert stop == jp.recipes.Stop(macs=100_000, accuracy=0.9)
    assert stop.reached(macs=100_001, accuracy=0.9) is None
    assert stop.reached(macs=100_000, accuracy=0.9) == "100,000 MACs are at most 100,000"
    assert stop.reached(macs=1, accuracy=0.89) == "accuracy 0.89 is below 0.9"
    assert "below" in stop.reached(macs=1, accuracy=float("nan"))
    with pytest.raises(ValueError, match="looks at accuracy: pass accuracy"):
        stop.reached(macs=1)
    assert jp.recipes.Stop().reached() is None


def test_distillation_is_options_of_the_objective():
    source = {"prune": {"score": "magnitude", "sparsity": 0.5}}
    assert jp.recipes.parse(source).distillation is None
    recipe = jp.recipes.parse(source | {"distillation": {"temperature": 2}})
    assert recipe.distillation == {"temperature": 2.0}

    def teacher(x):
        return jnp.ones((len(x), 4)) * jnp.arange(4)

    ours = jp.distillation.objective(apply_fn, teacher, **recipe.distillation)(PARAMS, BATCH)
    assert ours == jp.distillation.objective(apply_fn, teacher, temperature=2)(PARAMS, BATCH)


# --- what is wrong, and where


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_errors_say_the_line_and_the_key(number):
    text, line, key, said = WRONG[number]
    with pytest.raises(jp.recipes.RecipeError) as caught:
        jp.recipes.parse(text)
    message = str(caught.value)
    if line is not None:
        assert message.startswith(f"recipe:{line}: "), message
    assert said in message
    if key:
        assert message.split(": ", 1)[1].startswith(f"{key}: "), message
    assert len(message) < 500


@pytest.mark.parametrize("number", range(len(UNFIT)))
def test_what_does_not_fit_the_params_is_said_before_any_training(number):
    text, line, key, said = UNFIT[number]
    shapes = jax.eval_shape(lambda: PARAMS)
    loss = {"loss_fn": loss_fn} if "chunk" in text else {}
    with pytest.raises(jp.recipes.RecipeError, match=re.escape(said)) as caught:
        jp.recipes.parse(text).pruner(shapes, **loss)
    assert str(caught.value).startswith(f"recipe:{line}: {key}: ")


def test_errors_of_dicts_say_the_key():
    with pytest.raises(
        jp.recipes.RecipeError, match=r"^recipe: prune\[0\]\.sparsity\.linear: linear needs end_step"
    ):
        jp.recipes.parse({"prune": [{"score": "magnitude", "sparsity": {"linear": 0.5}}]})
    with pytest.raises(
        jp.recipes.RecipeError, match=r"^recipe: prune\.where: expected plain data .* got function"
    ):
        recipe_of(where=jp.kernels)
    with pytest.raises(jp.recipes.RecipeError, match=r"^recipe: prune: keys must be texts, got 1"):
        jp.recipes.parse({"prune": {1: 2}})
    with pytest.raises(jp.recipes.RecipeError, match=r"a YAML text or a dict, got list"):
        jp.recipes.parse([1])
    with pytest.raises(TypeError, match="takes apply_fn, blocks, groups, loss_fn, x and key; got loss"):
        recipe_of().pruner(PARAMS, loss=loss_fn)
    assert recipe_of(sparsity=np.float32(0.5), every=np.int64(2)) == recipe_of(every=2)


def test_files(tmp_path):
    path = tmp_path / "my recipe.yaml"
    path.write_text(GOOD + "  where: [Ä/kernel, '*/kernel']\n", encoding="utf-8")
    recipe = jp.recipes.load(path)
    assert recipe.data["prune"]["where"][0] == "Ä/kernel"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert jp.recipes.load(path) == recipe
    path.write_text(GOOD + "  score: taylor\n")
    with pytest.raises(
        jp.recipes.RecipeError, match=r"my recipe\.yaml:5: prune\.score: the key is there already"
    ):
        jp.recipes.load(path)
    path.write_bytes(b"prune: \xff\xfe")
    with pytest.raises(jp.recipes.RecipeError, match="this is not text"):
        jp.recipes.load(path)
    with pytest.raises(FileNotFoundError):
        jp.recipes.load(tmp_path / "none.yaml")


def test_yaml_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    recipe = recipe_of()
    for ask in (lambda: jp.recipes.parse(GOOD), recipe.to_yaml):
        with pytest.raises(ImportError, match=r"pip install 'jaxprune\[recipes\]'"):
            ask()


def test_dicts_that_hold_themselves_are_refused():
    prune: dict = {"score": "magnitude", "sparsity": 0.5}
    prune["where"] = {"not": prune}
    with pytest.raises(jp.recipes.RecipeError, match="more than 30 levels deep"):
        jp.recipes.parse({"prune": prune})


# --- random texts

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), max_size=8)
ODD = ["1e-3", "on", "~", "null", "0x1", "1_000", ".5", "-", "010", "true", " ", "2024", "a: b", "#", "=", ""]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | st.sampled_from(ODD)
)
KEYS = st.text(string.printable[:95], max_size=5)
PLAIN = st.recursive(
    SCALARS, lambda data: st.lists(data, max_size=3) | st.dictionaries(KEYS, data, max_size=3), max_leaves=8
)


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_plain_data_comes_back_from_yaml(data):
    text = document.to_yaml({"data": data})
    assert document.from_yaml(text, "x").plain() == {"data": data}
