"""Hostile input: some of the cases of `python -m tests.soak.hostile`."""

import contextlib
import io
import math
import random
import subprocess
import sys
import typing
import warnings

import jax.numpy as jnp
import pytest

import jaxprune as jp
from experiments import gradual
from experiments.report import command
from experiments.run import limits, saved_recipes, settings
from tests.contracts.entry_points import ARGUMENTS
from tests.hostile import files, flags, pages, recipes, values
from tests.hostile.watch import watched
from tests.studies import runs
from tests.support.commands import command_module


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of recipes that cannot reach what they ask for
        yield


def test_random_recipes(tmp_path):
    found = [recipes.case(number, tmp_path, watched) for number in range(150)]
    assert set(found) == {"accepted", "refused", "does not fit"}


def test_recipes_made_to_do_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bombs, slow = recipes.bombs(), {"brackets", "braces", "a long key", "many comments", "a long fraction"}
    for name in bombs.keys() - slow:
        found = recipes.outcome(bombs[name], watched)
        assert (found == "accepted") == (name in ("nots", "huge blocks")), f"{name}: {found}"
    assert not list(tmp_path.iterdir())
    refused, not_there = recipes.files(tmp_path)
    for file in refused:
        with watched(recipes.PEAK), pytest.raises(jp.recipes.RecipeError):
            jp.recipes.load(file)
    for file in not_there:
        with pytest.raises(OSError):  # noqa: PT011
            jp.recipes.load(file)


def test_random_files(tmp_path):
    valid = files.Files(tmp_path)
    found = [valid.case(number, tmp_path, watched) for number in range(200)]
    assert found.count("accepted") > 15
    assert found.count("refused") > 65


def test_metadata_that_are_null(tmp_path):
    header, body = files.tensors_file()
    data = files.join_tensors(header | {"__metadata__": None}, body)
    assert files.tensors_outcome(tmp_path / "file", data, watched) == "accepted"


@pytest.mark.parametrize("load", [jp.io.load, jp.io.load_safetensors, jp.export.load])
def test_what_is_no_file(load, tmp_path):
    for path in ("/dev/zero", "/dev/null", "a\0b"):
        with pytest.raises(jp.io.FileError, match=r"not a file, but a pipe or a device|null"):
            load(path)
    # A checkpoint may be a folder, so an empty one is damaged; the other loaders cannot open it.
    with pytest.raises(jp.io.FileError if load is jp.io.load_safetensors else OSError):
        load(tmp_path)
    for path in (tmp_path / "none", "x" * 5000):
        with pytest.raises(OSError):  # noqa: PT011
            load(path)


def test_random_flags(tmp_path):
    found = [flags.case(number, tmp_path, watched) for number in range(80)]
    assert found.count("accepted") > 8
    assert found.count("refused") > 30


REFUSED = [
    (["--epochs", "0"], "argument --epochs: must be 1 or more, got 0"),
    (["--lr", "nan"], "argument --lr: must be a finite number and above 0, got nan"),
    (["--seeds", ""], "argument --seeds: needs at least one value"),
    (["--seeds", "1,2,1"], "argument --seeds: has 1 twice"),
    (["--seeds", "1,x"], "argument --seeds: must be a whole number, got 'x'"),
    (["--sparsities", "0.5,1.5"], "argument --sparsities: must be 0 or more and below 1, got 1.5"),
    (["--tune-epochs", "20"], "argument --tune-epochs: must be at most 13 (--epochs), got 20"),
    (["--batch-size", "9" * 30], "argument --batch-size: must be at most 2,147,483,647 and 1 or more and at"),
    (["--epochs=--"], "argument --epochs: must be a whole number, got '--'"),
    (["--out", "a\0b"], "argument --out: must be printable text, got 'a\\x00b'"),
    (["--out", __file__], "argument --out: is no folder"),
    (["--out", f"{__file__}/x"], "which is no folder"),
    (["--dataset", "cifar"], "argument --dataset: must be one of digits, mnist; got 'cifar'"),
]


@pytest.mark.parametrize(("argv", "said"), REFUSED, ids=range(len(REFUSED)))
def test_flags_are_refused_in_one_sentence(argv, said, capsys):
    with pytest.raises(SystemExit):
        settings.parse(gradual.Config, argv)
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("argv", "said"), [(["--epoch", "3"], "--epoch, 3"), (["--epochs"], "'--epochs'")])
def test_a_flag_that_is_unknown_or_lacks_its_value_is_named(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        settings.parse(gradual.Config, argv)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_recipe_of_a_study_is_held_to_the_same(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = saved_recipes.study_text("gradual", gradual.Config(epochs=11))
    file.write_text(text.replace("epochs: 11", "epochs: 0"))
    with pytest.raises(SystemExit, match=r"recipe\.yaml:\d+: config\.epochs: must be 1 or more, got 0\."):
        settings.parse(gradual.Config, ["--recipe", str(file)])
    file.write_text(saved_recipes.study_text("gradual", gradual.Config(out="/dev/null")))
    again = ["--recipe", str(file), "--out", str(tmp_path)]
    assert settings.parse(gradual.Config, again).out == str(tmp_path)


@pytest.mark.parametrize("study", [*runs.STUDIES, "deployment", "distributed"])
def test_a_config_made_in_python_is_held_to_the_same(study):
    module = command_module(study)
    run = module.train if study == "distributed" else module.run
    known = {"recipe": "not looked at yet"} if study == "recipe" else {}
    for name, hint in typing.get_type_hints(module.Config).items():
        if hint is bool or name == "recipe":
            continue
        wrong = "\n" if "str" in str(hint) or "Literal" in str(hint) else math.nan
        values = known | {name: (wrong,) if "tuple" in str(hint) else wrong}
        with pytest.raises(limits.FlagError, match=rf"^{limits.flag_name(name)}: must "):
            run(module.Config(**values))


def test_flags_that_the_data_do_not_allow(tmp_path):
    with pytest.raises(SystemExit, match=r"got train=5000; .* 1 to 1437, or None for all \(--train-size\)"):
        gradual.main(["--train-size", "5000", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_command_ends_without_a_traceback():
    command = [sys.executable, "-m", "experiments.gradual", "--sparsities", "0.5,nan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("must be a finite number and 0 or more and below 1, got nan")
    assert "Traceback" not in done.stderr


def test_random_results_make_pages_or_messages(tmp_path):
    pages.prepare(tmp_path)
    found = [pages.case(number, tmp_path, watched) for number in range(12)]
    assert set(found) == {"a page", "refused"}


@pytest.mark.parametrize("path", ["a\0b", ".", "/", "", "x" * 300, f"{__file__}/x"], ids=range(6))
def test_a_page_that_cannot_be_written(path, tmp_path):
    results = tmp_path / "a.jsonl"
    results.write_text('{"accuracy": 0.5}\n')
    for argv in (["--out", path], ["--out", str(tmp_path / "page.html"), "--markdown", path or "."]):
        with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
            command.main([str(results), *argv])
        assert f"argument {argv[-2]}: " in said.getvalue().splitlines()[-1]


@pytest.mark.parametrize("path", ["/dev/zero", "x" * 5000, "a\0b"], ids=range(3))
def test_results_that_are_no_file(path):
    with pytest.raises(command.ReportError, match=r"neither a file nor|too long|no such file"):
        command.report([path], "page.html")


def test_a_page_that_is_not_escaped_would_be_noticed():
    with pytest.raises(AssertionError, match="<x-hostile> in the page"):
        pages.check_page("<html><body><p><x-hostile></p></body></html>")
    with pytest.raises(AssertionError, match="onload in <p>"):
        pages.check_page("<html><p onload=alert(1)></p></html>")


def test_what_is_watched_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match=r"os\.system"), watched(), contextlib.suppress(RuntimeError):
        __import__("os").system("true")
    with pytest.raises(AssertionError, match="open"), watched(), contextlib.suppress(RuntimeError):
        (tmp_path / "x").write_text("x")
    with pytest.raises(AssertionError, match="it took"), watched(1 << 20):
        bytearray(1 << 21)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_values_that_are_right_and_values_that_are_not(name):
    rng = random.Random(name)
    ARGUMENTS[name].call(**ARGUMENTS[name].good)
    for place in ARGUMENTS[name].good:
        for value in rng.sample(list(values.BAD), 2):
            values.attempt(name, {place: value}, watched)


def test_gradients_and_states_that_are_none():
    params = {"kernel": jnp.ones((2, 3))}
    pruner = jp.pruner(jp.scores.magnitude, 0.5)
    tx = jp.wrap_optax(values.optax.sgd(0.1), pruner)
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"needs the state of its own init, got a dict: call tx\.update"):
        tx.update(params, params, state)
    with pytest.raises(
        ValueError, match=r"grads\['kernel'\] is float32\[3\], but params has float32\[2, 3\]"
    ):
        tx.update({"kernel": jnp.ones(3)}, state, params)
    with pytest.raises(ValueError, match="needs gradients with the tree structure of params"):
        tx.update({"weight": jnp.ones((2, 3))}, state, params)
    with pytest.raises(TypeError, match=r"needs the state of pruner\.init first, got a dict"):
        pruner.update(params, pruner.init(params))
    with pytest.raises(ValueError, match="the masks of the pruner's state must have the tree structure"):
        pruner.update(pruner.init(params), {"weight": jnp.ones((2, 3))})


def test_levels_that_would_never_end_are_refused_soon():
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(1e-9))
    params = {"kernel": jnp.ones((2, 3))}
    with watched(), pytest.raises(ValueError, match="1048577 or more updates of the masks"):
        pruner.update(pruner.init(params), params)
