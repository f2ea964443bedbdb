"""The real-model command, on what the tests have installed: figures, table, resuming, refusals, baseline."""

import itertools
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments.real_models import command, measure, page, table
from experiments.real_models.case import Case, Model, combine, moved, split_floating
from experiments.real_models.catalog import MODELS
from experiments.run.limits import FlagError
from tests.studies.outcomes import is_png, read

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {model.name: model for model in MODELS}
TINY = (
    "equinox/MLP",
    "equinox/GRU and LSTM under scan",
    "haiku/VQ-VAE",
    "ours/experts, einsum",
    "ours/linear recurrence, scan",
    "ours/nnx.scan blocks",
    "ours/Real NVP",
)


@pytest.mark.parametrize("name", TINY)
def test_a_model_is_grouped_pruned_compacted_and_right(name):
    line = measure.measure(BY_NAME[name])
    assert line["status"] == "ok", line
    assert line["removable"] == line["groups"] > 0
    assert max(line["error"], line["error_moved"]) <= 1e-5
    assert line["ratio"] == pytest.approx(line["expected"], abs=1e-12)
    assert 0.9 < line["share"] <= 1
    assert line["ratio"] < 0.75
    assert line["packages"] and line["finite"]
    json.dumps(line)


# --- figures that can be worked out by hand


def plain(widths=(4, 10, 7, 3)):
    """A perceptron of plain arrays."""
    rng = np.random.default_rng(0)
    pairs = list(itertools.pairwise(widths))
    params = [{"w": jnp.asarray(rng.standard_normal(p), jnp.float32), "b": jnp.ones(p[1])} for p in pairs]

    def apply(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return Case(apply, params, (jnp.ones((2, widths[0])),))


def model(case, name="here/plain"):
    return Model(name, ("numpy",), lambda rng: case, "layers", ours=True)


def test_the_figures_are_those_of_a_perceptron_worked_out_by_hand():
    line = measure.measure(model(plain()))
    size = 4 * 10 + 10 + 10 * 7 + 7 + 7 * 3 + 3
    small = 4 * 7 + 7 + 7 * 5 + 5 + 5 * 3 + 3  # 3 of 10 units gone, 2 of 7
    assert line["params"] == size
    assert line["share"] == pytest.approx(1 - 3 / size)  # the output's bias is in no group
    assert line["expected"] == line["ratio"] == small / size
    assert line["macs_ratio"] == (4 * 7 + 7 * 5 + 5 * 3) / (4 * 10 + 10 * 7 + 7 * 3)
    assert line["seconds"].keys() >= {"groups", "prune", "compact", "check"}
    assert measure.measure(model(plain((4, 10, 3))), 0.5)["ratio"] == (4 * 5 + 5 + 5 * 3 + 3) / 83


def test_a_network_that_is_wrong_is_found(monkeypatch):
    real = jp.compact

    def off(*args, **keywords):
        small = real(*args, **keywords)
        return replace(small, apply=lambda params, *xs: small.apply(params, *xs) * 1.001)

    monkeypatch.setattr(jp, "compact", off)
    line = measure.measure(model(plain()))
    assert line["status"] == "wrong"
    assert line["error"] == pytest.approx(1e-3, rel=0.01)
    assert "WRONG: off by 1.0e-03" in table.row(line)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_a_reshape_that_transposes_first(order):
    """Concatenating the slices of an array is one, which nanodl's Mistral does."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.standard_normal((5, 8))), "b": jnp.asarray(rng.standard_normal((8, 3)))}

    def apply(params, x):
        hidden = jnp.tanh(x @ params["a"]).reshape(4, 2, 4)
        return jax.lax.reshape(hidden, (4, 8), order) @ params["b"]

    line = measure.measure(model(Case(apply, params, (jnp.asarray(rng.standard_normal((4, 5))),))))
    assert line["status"] == "ok", line


def test_refusals_have_their_reasons():
    case = Case(lambda params, x: x * params["a"], {"a": jnp.ones(3)}, (jnp.ones((2, 3)),))
    line = measure.measure(model(case))
    assert (line["status"], line["removable"], line["share"]) == ("refused", 0, 0)
    assert "input" in line["reason"] or "output" in line["reason"]
    assert "REFUSED" in table.row(line)


def test_what_fails_says_where_and_whose_code(monkeypatch):
    def fails(params, x):
        raise TypeError("no such thing")

    line = measure.measure(model(Case(fails, {"a": jnp.ones(3)}, (jnp.ones(3),))))
    assert (line["status"], line["stage"]) == ("broken", "call")
    assert line["reason"].startswith("TypeError: no such thing [")
    assert "its own code fails in call" in table.row(line)

    def bug(*args, **keywords):
        raise RuntimeError("a bug")

    monkeypatch.setattr(jp, "channel_groups", bug)
    line = measure.measure(model(plain()))
    assert (line["status"], line["stage"]) == ("failed", "groups")
    assert "RuntimeError: a bug" in line["reason"]


def test_differences():
    zero = jnp.zeros(2)
    assert measure.difference([jnp.array([1.0, 4.0])], [jnp.array([1.0, 3.0])]) == (0.25, True, False)
    assert measure.difference([zero], [zero])[0] == 0
    assert measure.difference([jnp.array([jnp.nan, 2])], [jnp.array([jnp.nan, 1])]) == (0.5, False, False)
    assert measure.difference([jnp.array([jnp.nan])], [jnp.array([1.0])])[0] == np.inf
    assert measure.difference([jnp.array([1.0])], [jnp.array([jnp.nan])])[0] == np.inf
    assert measure.difference([jnp.ones(2, jnp.bfloat16)], [jnp.ones(2, jnp.bfloat16)])[2]
    with pytest.raises(ValueError, match="shapes"):
        measure.difference([zero], [jnp.zeros(3)])


def test_moved_leaves_nothing_zero_and_signs_alone():
    tree = {"zero": jnp.zeros(50), "one": jnp.ones(50), "whole": jnp.arange(3)}
    new = moved(tree, np.random.default_rng(0))
    assert (new["zero"] != 0).all() and (new["one"] > 0).all() and len(set(new["one"].tolist())) > 40
    assert new["whole"] is tree["whole"]
    floating, others = split_floating(tree)
    assert floating["whole"] is None and others["one"] is None
    assert jax.tree.all(jax.tree.map(jnp.array_equal, combine(floating, others), tree))


# --- the command


@pytest.fixture
def fake(monkeypatch):
    """Models that are measured in this process; returns what was measured, and statuses to be had."""
    asked, statuses = [], {}

    def in_process(model, config):
        asked.append(model.name)
        line = _line(model.name, status=statuses.get(model.name, "ok"))
        return line | ({"reason": "slow"} if line["status"] == "timeout" else {})

    packages = {"a/one": "numpy", "a/two": "numpy", "b/three": "numpy", "c/absent": "no-such-package"}
    models = [Model(name, (needed,), lambda rng: plain(), "layers") for name, needed in packages.items()]
    monkeypatch.setattr(command, "MODELS", models)
    monkeypatch.setattr(command, "in_process", in_process)
    return asked, statuses


def _line(name, **fields):
    figures = {"groups": 4, "removable": 4, "share": 1.0, "expected": 0.5, "ratio": 0.5, "macs_ratio": 0.5}
    line = {"model": name, "kind": "layers", "ours": False, "note": "", "packages": {"numpy": "2"}}
    line |= {"fraction": 0.3, "seed": 0, "seconds": {"groups": 1.0}, "params": 1000, "status": "ok"}
    line |= {"error": 1e-7, "error_moved": 2e-7, "tolerance": 1e-4, "refusals": [], "whole": {}, "stayed": []}
    return line | figures | fields


def test_a_run_goes_on_and_a_finished_one_is_added_to(fake, tmp_path, capsys):
    asked, statuses = fake
    out = ["--out", str(tmp_path), "--baseline", "-"]
    statuses["b/three"] = "timeout"
    command.main(["--only", "a/*", *out])
    assert asked == ["a/one", "a/two"]
    command.main(out)
    assert asked == ["a/one", "a/two", "b/three"]
    assert "Not installed, so left out: c/absent" in capsys.readouterr().out
    assert [line["model"] for line in read(tmp_path)] == asked
    command.main(out)
    assert len(asked) == 3
    del statuses["b/three"]
    command.main(["--retry", *out])
    assert asked[3:] == ["b/three"]
    command.main(["--again", "--only", "a/two", *out])
    assert asked[4:] == ["a/two"]
    printed = capsys.readouterr().out
    assert "3 models, 3 of them other people's code: 3 ok; the largest error is 2.0e-07." in printed
    with pytest.raises(SystemExit, match="other settings"):
        command.main(["--fraction", "0.5", *out])
    command.main(["--fresh", "--fraction", "0.5", "--only", "a/one", *out])
    assert len(read(tmp_path)) == 1


def test_a_run_that_is_stopped_keeps_what_it_has(fake, tmp_path, monkeypatch):
    asked, _ = fake
    measured = command.in_process

    def stopped(model, config):
        if model.name == "a/two":
            raise KeyboardInterrupt
        return measured(model, config)

    monkeypatch.setattr(command, "in_process", stopped)
    config = command.Config(out=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        command.run(config)
    monkeypatch.setattr(command, "in_process", measured)
    assert [line["model"] for line in command.run(config)] == ["a/one", "a/two", "b/three"]
    assert asked.count("a/one") == 1


def test_models_that_are_none_are_refused(fake, tmp_path):
    config = command.Config(out=str(tmp_path))
    with pytest.raises(FlagError, match=r"--only: no model is called 'x/\*'"):
        command.chosen(["x/*"])
    with pytest.raises(FlagError, match="no-such-package"):
        command.run(command.Config(only=("c/*",), out=str(tmp_path)))
    assert [model.name for model in command.chosen(["a/t*", "b/*"])] == ["a/two", "b/three"]
    assert config.only == ()


def test_the_list_says_whose_code_it_is(capsys):
    command.main(["--list", "--only", "haiku/MLP,ours/DiT"])
    ours, haiku = capsys.readouterr().out.splitlines()
    assert haiku.split()[0] == "haiku/MLP" and "dm-haiku" in haiku and " ours " not in haiku
    assert ours.split()[:2] == ["ours/DiT", "ours"]


def test_models_in_processes_of_their_own(tmp_path):
    config = command.Config(memory=8)
    line = command.in_process(BY_NAME["ours/linear recurrence, scan"], config)
    assert line["status"] == "ok", line
    line = command.in_process(BY_NAME["ours/DiT"], command.Config(timeout=1))
    assert line["status"] == "timeout" and "1 seconds" in line["reason"]
    assert "OUT OF TIME" in table.row(line)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux'")
def test_a_model_without_memory_ends_alone():
    line = command.in_process(BY_NAME["ours/DiT"], command.Config(memory=0.05))
    assert line["status"] in ("memory", "died"), line
    assert line["reason"] and line["model"] == "ours/DiT"


def test_models_are_named_once_and_their_libraries_are_in_the_extra():
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names)
    assert len(names) >= 150 and sum(not model.ours for model in MODELS) >= 150
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {package for model in MODELS for package in model.packages}
    listed = " ".join(extras["models"] + extras["test"] + extras["experiments"])
    assert {package for package in packages if package not in listed} == set()


# --- against what was reached before


def test_the_table_of_what_was_reached_before_is_whole():
    baseline = table.read_baseline(ROOT / command.BASELINE)
    assert not baseline.keys() - BY_NAME.keys() and len(baseline) > 100


def test_a_table_is_read_back(tmp_path):
    missing = {"ratio": None, "error": None, "error_moved": None}
    lines = [_line("a/one", versions={"jaxprune": "0.2"}), _line("a/two", **missing)]
    table.write_csv(lines, tmp_path / "t.csv")
    (one,) = table.read_baseline(tmp_path / "t.csv")["a/one"]
    assert one == (4, 4, 1.0, 0.5, 0.5, 2e-7, "version 0.2", True)
    (two,) = table.read_baseline(tmp_path / "t.csv")["a/two"]
    assert (two.ratio, two.error) == (None, None)
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace("0.5000", "half", 1))
    with pytest.raises(ValueError, match="at 'a/one'"):
        table.read_baseline(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("model,share\n")
    with pytest.raises(ValueError, match="the columns must be model, groups"):
        table.read_baseline(tmp_path / "t.csv")


BEFORE = table.Reached(4, 4, 1.0, 0.5, 0.5, 1e-7, "version 0.1", True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, None),
        ({"ratio": 0.501}, None),
        ({"error": 5e-6}, None),
        ({"removable": 5, "groups": 5, "ratio": 0.4}, None),
        ({"removable": 3}, "groups 3/4, before 4/4"),
        ({"share": 0.9}, "share 0.900, before 1.000"),
        ({"ratio": 0.6}, "params 0.600, before 0.500"),
        ({"error": 1e-4}, "error 1.0e-04, before 1.0e-07"),
    ],
)
def test_what_became_worse(fields, said):
    found = table.worse(_line("a/one", **fields), BEFORE)
    assert found == ([] if said is None else [said])


def test_what_became_worse_of_another_configuration():
    other = BEFORE._replace(same=False)
    assert table.worse(_line("a", ratio=0.6, groups=2, removable=2, share=0.999), other) == []
    assert table.worse(_line("a", removable=3), other) == ["1 of 4 groups cannot lose units, before 0 of 4"]
    assert table.worse(_line("a", share=0.7), other) == ["share 0.700, before 1.000"]
    assert len(table.worse(_line("a", error=1e-3), other)) == 1
    line = {k: v for k, v in _line("a", status="refused", reason="why", share=0).items() if k != "ratio"}
    assert "it is not compacted (REFUSED: why), before it was" in table.worse(line, other)


def test_a_model_that_fails_now_is_worse():
    line = {"model": "a", "status": "failed", "stage": "groups", "reason": "a bug", "seconds": {}}
    (said,) = table.worse(line, BEFORE)
    assert said == "it has no groups any more (FAILED in groups: a bug), it had 4/4"
    text = table.compared([line], {"a": [BEFORE], "b": [BEFORE]})
    assert "worse: a: it has no groups any more" in text and "not measured: b" in text
    assert "None is worse." in table.compared([_line("a")], {"a": [BEFORE]})


def test_less_than_the_masks_remove_is_said():
    assert "Larger than the masks say they should be: a." in table.summarise([_line("a", ratio=0.6)])


def test_the_page_and_its_picture(tmp_path):
    lines = [
        _line("a/one|two", refusals=[["w[0]", "a reason"], ["w[1]", "a reason"]], groups=6),
        _line("a/three", status="wrong", error=0.5, ours=True, note="a note"),
        _line("b/four", status="timeout", reason="too slow"),
    ]
    for figure in ("ratio", "error", "error_moved"):
        del lines[2][figure]
    page.write(lines, {"a/three": [BEFORE]}, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| one\\|two | layers | 1,000 | 4/6 | 1.000 | 0.500 | 0.500 | 0.500 | 2.0e-07 | 1 |" in text
    assert "| three (ours) |" in text and "**5.0e-01**" in text and "three: a note." in text
    assert "out of time" in text and "- b/four: `OUT OF TIME: too slow`" in text
    assert "- a/one|two, `w[0]` and 1 more: `a reason`" in text
    assert "worse: a/three: error" in text and "version 0.1" in text
    assert is_png(tmp_path / "page.png")
    assert "site-packages" not in page._code("at /x/lib/site-packages/keras/layer.py:3")
