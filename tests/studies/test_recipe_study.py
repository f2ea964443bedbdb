"""The runner of recipes, and the recipes that studies leave."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments import dynamic_sparse, gradual, lenet
from experiments import recipe as runner
from experiments.channel_pruning import cutting, study
from experiments.run import saved_recipes, settings
from tests.studies.outcomes import check_width, read
from tests.support.commands import command_module

EXAMPLES = sorted((Path(runner.__file__).parent / "recipes").glob("*.yaml"))
STUDIES = (
    *("channel_pruning", "distillation", "dynamic_sparse", "gradual", "lenet", "lottery_ticket"),
    *("one_shot", "pruning_at_init", "recipe", "sensitivity"),
)


def small(path, out, text=None, **changes):
    """Flags of a tiny run of an example, or of one that is written here."""
    if text is not None:
        path.write_text(text)
    settings = {"train_size": 132, "test_size": 50, "epochs": 2, "tune_epochs": 1, "batch_size": 11} | changes
    return runner.Config(recipe=str(path), out=str(out), **settings)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- the runner


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_small(path, tmp_path, capsys):
    recipe = jp.recipes.load(path)
    text, scale = path.read_text(), 20  # 22 steps in all, where the example is made for some hundred
    for step in ("begin_step: 20", "end_step: 220", "end_step: 240", "every: 10"):
        name, number = step.split(": ")
        text = text.replace(step, f"{name}: {int(number) // scale or 1}")
    text = text.replace("macs: 120000", "macs: 400000").replace("accuracy: 0.93", "accuracy: 0.01")
    flags = ["--train-size", "132", "--test-size", "50", "--epochs", "2", "--tune-epochs", "1"]
    flags += ["--batch-size", "11", "--levels", "2", "--out", str(tmp_path / "out")]
    flags += ["--model", "lenet"] if "lenet" in path.stem else []
    (tmp_path / path.name).write_text(text)
    runner.main([str(tmp_path / path.name), *flags])
    dense, pruned = read(tmp_path / "out")
    assert (dense["method"], pruned["method"]) == ("dense", "pruned")
    targets = {"gradual-magnitude": 0.95, "two-four": 0.4901, "rigl": 0.9, "distilled": None}
    targets["calibrated"] = 0.4901
    wanted = targets.get(path.stem)
    if wanted is not None:
        assert pruned["sparsity"] == pytest.approx(wanted, abs=0.02 if path.stem == "two-four" else 1e-4)
    if path.stem == "lenet-channels-macs":
        assert pruned["macs"] == pruned["compact_macs"] <= 400_000 < dense["macs"] == 480_500
        assert pruned["compact_difference"] < 1e-4
        assert "MACs are at most 400,000" in pruned["stopped"]
    if path.stem == "distilled":
        kernels = {"fc1/kernel": 0.33, "fc2/kernel": 0.33, "fc3/kernel": 0.1}
        sizes = {"fc1/kernel": 19200, "fc2/kernel": 30000, "fc3/kernel": 1000}
        first = {p: round((1 - (1 - rate) ** 2) * sizes[p]) for p, rate in kernels.items()}
        assert {p: n - k for p, (k, n) in pruned["layers"].items()}["fc3/kernel"] == first["fc3/kernel"]
        assert recipe.distillation == {"temperature": 4.0, "alpha": 0.9}
    saved = jp.io.load(tmp_path / "out" / "seed-0.jaxprune")
    assert saved.masks is not None
    assert jp.metrics.nonzeros(saved.masks) == pruned["kept"]
    jp.check_pruned(saved.params, saved.masks)
    printed = capsys.readouterr().out
    check_width(printed, tmp_path)
    # What it leaves is the recipe with the flags: a recipe of the library, and one to run again.
    left = tmp_path / "out" / "recipe.yaml"
    part = "calibrate" if path.stem == "calibrated" else "prune"
    assert jp.recipes.load(left).data[part] == jp.recipes.parse(text).data[part]
    config = settings.parse(runner.Config, [str(left), "--out", "elsewhere"])
    assert config == small(left, "elsewhere", levels=2, model="lenet" if "lenet" in path.stem else "mlp")
    if path.stem == "two-four":
        again = runner.run(dataclasses.replace(config, out=str(tmp_path / "again")))
        assert again == [
            {key: line[key] for key in new} for line, new in zip((dense, pruned), again, strict=True)
        ]


PLAIN = "prune: {score: taylor, sparsity: 0.5}\n"


def test_an_accuracy_floor_takes_back_what_went_below_it(tmp_path):
    # No network of this little training gets there: nothing is pruned, in levels as in steps.
    text = "prune: {score: magnitude, sparsity: 0.5}\nstop: {accuracy: 0.999}\n"
    line = runner.run(small(tmp_path / "r.yaml", tmp_path / "a", text))[1]
    assert (line["sparsity"], line["level"]) == (0.0, 0)
    assert "is below 0.999" in line["stopped"]
    text = text.replace("0.5", "{cubic: {sparsity: 0.9, begin_step: 12, end_step: 20}}")
    line = runner.run(small(tmp_path / "r.yaml", tmp_path / "b", text, epochs=3))[1]
    assert line["sparsity"] == 0.0
    assert "is below 0.999" in line["stopped"]


def test_macs_end_pruning_in_steps_and_a_sparsity_in_levels(tmp_path):
    schedule = "{linear: {sparsity: 0.9, begin_step: 1, end_step: 33}}"
    text = f"prune: {{score: magnitude, sparsity: {schedule}}}\nstop: {{macs: 40000}}\n"
    line = runner.run(small(tmp_path / "r.yaml", tmp_path / "a", text, epochs=3))[1]
    # After the first of three epochs, with .31 of the weights gone, the masks rest.
    assert line["sparsity"] == pytest.approx(0.9 * 10 / 32, abs=1e-4)
    assert "MACs are at most 40,000" in line["stopped"]
    text = "prune: {score: magnitude, sparsity: {geometric: 0.4}}\nstop: {sparsity: 0.6}\n"
    line = runner.run(small(tmp_path / "r.yaml", tmp_path / "b", text, rewind="weights", epochs=1))[1]
    assert (line["sparsity"], line["level"]) == (0.6, 2)
    assert line["stopped"] == "nothing more is removed"


def test_what_cannot_be_run_is_said_in_a_sentence(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    long = PLAIN.replace("0.5", "{one_shot: {sparsity: 0.5, step: 1000}}")
    with pytest.raises(ValueError, match=r"until step 1,000, and 2 epochs have 22 steps: ask for --epochs"):
        runner.run(small(path, tmp_path / "out", long))
    path.write_text("prune: {score: taylor, sparsity: 2}\n")
    with pytest.raises(SystemExit, match=r"r\.yaml:1: prune\.sparsity: sparsity must be in"):
        runner.main([str(path)])
    with pytest.raises(SystemExit, match="No such file"):
        runner.main([str(tmp_path / "none.yaml")])


# --- recipes of studies


@pytest.mark.parametrize("study", STUDIES)
def test_settings_come_back_and_flags_win(study, tmp_path):
    config = command_module(study).Config
    files = [field.name for field in dataclasses.fields(config) if saved_recipes.is_file(field)]
    path, given = tmp_path / "recipe.yaml", {name: str(tmp_path / "recipe.yaml") for name in files}
    before = config(**given, seeds=(3, 5), train_size=77, out="results/1e-3")
    assert saved_recipes.study_of(config) == study
    path.write_text(saved_recipes.study_text(study, before), encoding="utf-8")
    flags = [str(path)] if files else ["--recipe", str(path)]
    assert settings.parse(config, flags) == before
    assert settings.parse(config, [*flags, "--seeds", "1"]) == dataclasses.replace(before, seeds=(1,))


HEAD = "version: 1\nstudy: gradual\nconfig:\n"
WRONG = {
    HEAD + "  epoch: 3\n": 'r.yaml:4: config.epoch: unknown "epoch". Did you mean epochs? Allowed',
    HEAD + "  epochs: many\n": 'r.yaml:4: config.epochs: expected a number, got "many"',
    HEAD + "  epochs: 1.5\n": "r.yaml:4: config.epochs: expected a whole number, got 1.5",
    HEAD + "  dataset: imagenet\n": 'r.yaml:4: config.dataset: unknown "imagenet". Allowed values: digits',
    HEAD + "  seeds: 3\n": "r.yaml:4: config.seeds: expected a list, got 3",
    HEAD + "  seeds:\n    - 1\n    - x\n": 'r.yaml:6: config.seeds[1]: expected a number, got "x"',
    HEAD + "  out: 3\n": "r.yaml:4: config.out: expected a text, got 3. Put it in quotes",
    HEAD + "  train_size: no\n": 'r.yaml:4: config.train_size: expected a number, got "no"',
    HEAD.replace("gradual", "lenet")
    + "  epochs: 3\n": "r.yaml:2: study: this is of another study: run python -m experiments.lenet",
    "study: gradual\n": "r.yaml:1: config must be given as well",
    PLAIN: "r.yaml:1: it has no settings of a study; what it prunes by is run by",
    HEAD + "  epochs: 3\n" + PLAIN: "r.yaml:5: prune: the study gradual has its own pruning",
    HEAD + "  epochs: 3\nepochs: 3\n": 'r.yaml:5: epochs: unknown "epochs"',
    "version: 9\n": "r.yaml:1: version: this jaxprune reads recipes of version 1, got 9",
}


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_settings_are_checked_with_line_and_key(number, tmp_path):
    text, said = list(WRONG.items())[number]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        settings.parse(gradual.Config, ["--recipe", str(tmp_path / "r.yaml")])
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(said)


def test_a_switch_can_be_turned_off_again():
    assert settings.parse(study.Config, ["--fresh"]).fresh
    assert not settings.parse(study.Config, ["--fresh", "--no-fresh"]).fresh


@pytest.mark.parametrize("name", lenet.METHODS)
def test_the_founding_studys_recipes_prune_a_fraction_of_what_remains(name):
    score, structure, where, units = {
        "random": (jp.scores.random, jp.structures.elements(), jp.kernels, np.size),
        "l1": (jp.scores.magnitude, jp.structures.elements(), jp.kernels, np.size),
        "structured": (
            jp.scores.magnitude,
            jp.structures.slices(axis=-1, norm=1),
            jp.matching("conv1/kernel", "conv2/kernel", "fc1/kernel"),
            lambda kernel: kernel.shape[-1],
        ),
    }[name]
    key = jax.random.key(1)
    rng = np.random.default_rng(0)
    shapes = {"conv1": (2, 2, 5, 10), "conv2": (2, 2, 5, 10), "fc1": (20, 10), "fc2": (20, 10)}
    params = {layer: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for layer, s in shapes.items()}
    pruner, masks = lenet.recipe(name, 0.3).pruner(params), jp.ones_masks(params)
    paths = zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True)
    state, left = pruner.init(params), {path: units(leaf) for path, leaf in paths if where(path, leaf)}
    for _ in range(2):
        counts = {path: jp.selection.removed_count(0.3, n) for path, n in left.items()}
        left = {path: n - counts[path] for path, n in left.items()}
        masks = jp.prune_once(
            params, score, count=counts, scope="layerwise", where=where,
            structure=structure, masks=masks, floor=0, key=key,
        )  # fmt: skip
        state = pruner.update(state, params, key=key)
        equal(state.masks, masks)


def test_the_sparse_studys_recipes_start_from_its_masks():
    config = dynamic_sparse.Config(epochs=4, mask_updates=3)
    params = {name: {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(10)} for name in ("fc1", "fc2")}
    key = jax.random.key(3)
    masks = dynamic_sparse.erk_masks(params, key, 0.8)
    for method in ("set", "rigl"):
        pruner = dynamic_sparse.recipe(config, method, 0.8, 100).pruner(params, key=key)
        assert pruner.regrows
        equal(pruner.init(params).masks, masks)
    static = dynamic_sparse.recipe(config, "static", 0.8, 100)
    equal(jp.prune_rounds(params, static.pruner(params), 1, key=key), masks)
    assert dynamic_sparse.recipe(config, "rigl", 0.8, 100).end_step == 75


def test_the_channel_studys_recipes_are_its_cuts():
    def apply(variables, x, train):
        p = variables["params"]
        return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"], {}

    rng = np.random.default_rng(0)
    shapes = {"a": (6, 16), "b": (16, 4)}
    params = {n: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in shapes.items()}
    variables, x = {"params": params, "batch_stats": {}}, jnp.ones((1, 6))
    cutter = cutting.Cutter(apply, variables, x)
    cut = cutter.cut("local", variables, cutter.macs / 2)
    pruner = study.recipe("local", cut, 1).pruner(params, groups=cutter.groups.under("params"))
    equal(jp.prune_rounds(params, pruner, 1), cut.masks["params"])
    assert jp.metrics.nonzeros(cut.masks) == 80
