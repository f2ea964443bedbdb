"""A small run of every benchmark."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import (
    files,
    graph,
    grouping,
    latency,
    lottery,
    main_study,
    memory,
    python_calls,
)
from experiments.benchmarks.parts import bound, jax_steps, study_shares
from experiments.benchmarks.parts.machine import machine
from experiments.show.tables import markdown, text
from tests.studies.outcomes import check_width, read

TORCH = importlib.util.find_spec("torch") is not None


def test_lottery_benchmark(tmp_path, capsys):
    flags = "--steps 4 --levels 2 --seeds 0,1 --repeats 1 --trial-steps 2"
    lottery.main([*flags.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    check_width(printed, tmp_path)
    lines = read(tmp_path)
    agreement = {line["way"]: line for line in lines if line["figure"] == "agreement"}
    speed = {(line["way"], line["over"]): line["ratios"] for line in lines if line["figure"] == "speed"}
    ways = ["spread", "vmap", "alone", *(["torch", "torch best"] if TORCH else [])]

    # The same work: devices, vmap and one by one give the same masks, and so does PyTorch.
    for way in ("vmap", "alone"):
        assert agreement[way]["masks"] == 1.0
        assert agreement[way]["params"] < 1e-5
    if TORCH:
        assert agreement["torch"]["masks"] > 0.999
    else:
        assert "PyTorch is not installed" in printed
    assert {way for way, _ in speed} == set(ways)
    for way in ways:
        assert f"\n{lottery.TITLES[way]} " in printed
        assert len(speed[way, "alone"]) == 1
        assert speed[way, "alone"][0] > 0
    assert speed["alone", "alone"] == [1.0]


def test_main_study_benchmark(capsys):
    ran = main_study.run(main_study.SMALL)
    ways = {line["way"]: line for line in ran}
    assert list(ways) == ["jaxprune", *(["torch"] if TORCH else [])]
    for line in ran:
        assert len(line["seconds"]) == len(line["cpu_seconds"]) == 1
        assert line["seconds"][0] > 0 and line["cpu_seconds"][0] > 0
        assert list(line["accuracies"]) == ["dense", "random", "l1", "structured"]
        assert all(0 <= accuracy <= 1 for accuracy in line["accuracies"].values())
    shares = [{"part": "training", "share": 0.75}, {"part": "compiling", "share": 0.25}]
    table = main_study.summarise([*ran, *shares])
    check_width(table)
    assert ("PyTorch is not installed" in table) is not TORCH
    assert re.search(r"\ntraining +75.0%\n", table)
    # A made-up run of both: ratios are within rounds.
    made = [
        {"way": "jaxprune", "seconds": [1.0, 2.0, 4.0], "cpu_seconds": [7.0]},
        {"way": "torch", "seconds": [3.0, 4.0, 20.0], "cpu_seconds": [7.0]},
    ]
    made = [line | {"settings": "", "accuracies": {"dense": 0.5}} for line in made]
    assert "3.00 (2.00-5.00)" in main_study.summarise(made)


def test_a_second_of_the_study_belongs_to_its_innermost_part(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(study_shares.time, "perf_counter", lambda: float(next(now)))
    shares = study_shares.Shares()  # at 0
    inner = shares._timed(lambda: shares._compiled(study_shares.COMPILING[0], 0.25), "inner")
    outer = shares._timed(inner, "outer")
    outer()  # outer from 1 to 4, inner from 2 to 3
    assert shares.spent == {"everything else": 1.0, "outer": 2.0, "inner": 0.75, "compiling": 0.25}


def test_what_a_step_works_and_moves():
    sizes = {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}
    params = {
        name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])} for name, shape in sizes.items()
    }
    forward = 60 * (784 * 300 + 300 * 100 + 100 * 10)
    backward = forward + 60 * (300 * 100 + 100 * 10)
    assert bound.flops(params, batch_size=60) == 2 * (forward + backward)
    assert bound.adam_bytes(params) == 266610 * 29


@pytest.mark.parametrize("scanned", [False, True])
def test_grouping_benchmark_finds_the_groups_of_all_layers(scanned):
    finding, tracing, name = grouping.measure(grouping.Config(layers=12, rounds=2), 64, 96, 4, scanned)
    assert "of width 64" in name and "25 groups" in name
    assert finding > 0 and tracing > 0


def test_graph_benchmark_counts_what_it_times():
    (line,) = graph.run_decoder(layers=2, width=64, hidden=96, heads=4)
    # Of each layer its heads and its hidden width, and the residual stream.
    assert "5 groups" in line
    variables = jax.eval_shape(graph.ResNet50().init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))
    assert graph.size(variables["params"]) == 25_557_032


def test_latency_benchmark_counts_what_it_times(capsys):
    argv = ["--width", "32", "--layers", "2", "--batch", "4", "--rounds", "2", "--sparsity", "0.75"]
    latency.main(argv)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[3:]] == ["dense", "masked", "sparse", "compacted"]
    check_width(table)
    size = 32 * 32 + 32 * 10
    assert f" {4 * size:,} " in table
    assert f" {4 * (size - round(0.75 * size)):,} " in table
    assert f" {4 * (32 * 16 + 16 * 10):,} " in table  # half of the hidden units


def test_calls_of_the_package_are_counted_and_no_others():
    found = python_calls.count(lambda: [jp.schedules.constant(0.5) for _ in range(3)])
    assert found.calls % 3 == 0 and found.named == found.calls
    assert found.functions == found.calls // 3
    assert 1 <= found.files <= found.functions
    assert python_calls.count(lambda: jnp.ones(3) + 1).calls == 0


def test_python_calls_benchmark(capsys):
    python_calls.main(["--leaves", "2", "--width", "4"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["calls", "named", "functions", "files"]
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    for line in lines:
        calls, named, functions, files = (int(number.replace(",", "")) for number in line.split()[-4:])
        assert calls > named > files and calls > functions > files > 1


def test_files_benchmark_stays_above_the_bound():
    (line,) = files.run(files.Config(millions=0.3, sparsities=(0.9,), rounds=1))
    assert line["bound"] < line["ours"] < 1.05 * line["bound"]  # and biases, which stay
    assert line["int8"] < line["ours"] < line["numpy"]
    check_width(files.summarise([line]))


def test_all_benchmarks_write_one_page(tmp_path, capsys):
    only = ["selection", "train_step", "sweep", "compaction", "sparse_inference", "memory"]
    page = tmp_path / "page.md"
    benchmarks.main(["--small", "--only", ",".join(only), "--out", str(page)])
    text = page.read_text()
    sections = dict(zip(only, text.split("\n## ")[1:], strict=True))
    for name, section in sections.items():
        assert f"`python -m experiments.benchmarks.{name}`" in section
        header, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
        assert rows
        assert {row.count("|") for row in rows} == {header.count("|")}
    assert text.startswith(f"# Benchmarks\n\n{machine()}")

    # What needs no clock holds of the small programs too.
    assert "programs: 0 sorts, 0 calls of the host, 0 arrays not updated in place, 0 further" in text
    steps = [row.split("|")[1:3] for row in sections["train_step"].splitlines() if row.startswith("| LeNet")]
    ways = ["masked", "packed", "fixed", "argsort", *(["torch"] if TORCH else [])]
    assert [way.strip() for _, way in steps] == ways
    assert ("PyTorch is not installed" in sections["sweep"]) is not TORCH
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= max(80, len(machine()), len(f"Wrote {page}"))


def test_a_benchmark_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["--only", "speed", "--out", str(tmp_path / "page.md")])
    assert "argument --only: must be one of selection, train_step" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_memory_benchmark_counts_masks():
    lines = {(line["program"], line["way"]): line for line in memory.run(memory.SMALL)}
    # float32 params: a bool is a quarter of 4 bytes, a bit a thirty-second of that, padded per leaf.
    for program in ("one-shot", "train step"):
        masked, packed = lines[program, "masked"], lines[program, "packed"]
        assert masked["masks"] * 4 == masked["params"]
        assert masked["params"] / 32 <= packed["masks"] < masked["masks"] / 4
    # And a pointer for each leaf.
    assert 0 <= lines["one-shot", "masked"]["new"] - lines["one-shot", "masked"]["masks"] < 100
    assert lines["train step", "dense"]["masks"] == 0
    assert lines["one-shot", "argsort"]["temporaries"] > lines["one-shot", "masked"]["temporaries"]


def test_the_argsort_route_keeps_the_largest():
    rng = np.random.default_rng(0)
    params = {
        f"layer{number}": {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.zeros(3)}
        for number, shape in enumerate(((5, 4), (4, 3)))
    }
    masks = jax_steps.argsort_masks(params, jnp.float32(0.75))
    sizes = np.sort(np.abs(np.concatenate([layer["kernel"].ravel() for layer in params.values()])))
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, np.abs(params[name]["kernel"]) >= sizes[-8])


def test_tables_have_as_many_columns_as_their_header():
    rows = [("way", "a|b"), ("dense", "1.00")]
    assert markdown(rows).splitlines() == [r"| way | a\|b |", "|---|---:|", "| dense | 1.00 |"]
    assert text(rows).splitlines() == ["way     a|b", "dense  1.00"]
    with pytest.raises(ValueError, match="zip"):
        text([*rows, ("short",)])


def _value(text: str) -> float:
    """What arithmetic of the page on scaling amounts to, units included."""
    units = {"M": 1e6, "MB": 1e6, "GB": 1e9, "GB/s": 1e9, "ms": 1e-3, "%": 1e-2}
    text = text.replace(",", "")
    text = re.sub(r"([\d.]+) (GB/s|MB|GB|M|ms|%)", lambda m: f"({m[1]} * {units[m[2]]})", text)
    assert re.fullmatch(r"[\d.e+*/() x-]+", text), text
    return eval(text.replace("x", "*"))


def test_the_sums_on_the_page_about_scaling_are_right():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    sums = re.findall(r"((?:\d|\()[\d., x+/()e]*?) = (\d[\d.,e]*\d|\d)( %)?", page)
    sums = [(left, right + percent) for left, right, percent in sums]
    assert len(sums) >= 10
    table = [re.findall(r"[^|]+", line) for line in page.splitlines() if line.startswith("| ")]
    cells = [(row[1].strip(), row[2].strip()) for row in table if len(row) == 3]
    cells = [(left, right) for left, right in cells if re.search(r" [x/] [\d(]", left)]
    assert len(cells) >= 8
    for left, right in sums + cells:
        digits = re.split(r"[^\d.,]", right)[0].rstrip(",.")
        unit = 10.0 ** -len(digits.partition(".")[2])
        last = _value(right) / float(digits.replace(",", "")) * unit  # one in the last digit given
        assert abs(_value(left) - _value(right)) <= 0.51 * last, (left, right)
