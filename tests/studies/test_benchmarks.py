"""A small run of every benchmark."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import (
    compile,
    eager,
    files,
    gpu,
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
from experiments.run.settings import parse
from experiments.show.tables import markdown, text
from jaxprune.tree.leaves import array_leaves
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


def test_calls_outside_jit_compile_few_programs(capsys):
    eager.main(["--network", "resnet8", "--image", "16", "--rounds", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 100
    compiled = {line[:16].strip(): int(line[16:].split()[0]) for line in printed[3:11]}
    # Only scores are computed by XLA: those of units by a few programs, one at least for any.
    assert {name for name, number in compiled.items() if number} <= {"channel_groups", "prune_once", "table"}
    assert 1 <= compiled["table"] <= 8
    assert compiled["table"] <= compiled["prune_once"] <= 8


def test_compile_benchmark_measures_each_way():
    ways = ("dense", "wrap_optax", "jit(prune_once)", "prune_once")
    rounds = [{way: compile.measure(way, 10) for way in ways}] * 2
    lines = compile.summarise(10, rounds)
    assert lines[0]["over_dense"] == 1 and lines[1]["over_dense"] > 1
    assert lines[1]["lines"] > lines[0]["lines"] > 0 and lines[3]["lines"] is None
    header, *table = text(compile.rows(lines)).splitlines()
    assert max(map(len, [header, *table])) <= 80 and len(table) == len(ways)


def test_compilations_are_counted():
    with eager.Compilations() as none:
        pass
    with eager.Compilations() as found:
        jax.jit(lambda x: x * 3 + 5)(jnp.ones(7)).block_until_ready()
    assert none.number == 0 and found.number >= 1


@pytest.mark.filterwarnings("ignore:floor=")
def test_numpy_chooses_the_same_channels():
    module = eager.NETWORKS["resnet8"]()
    x = jnp.ones((1, 16, 16, 3))
    params = jax.jit(module.init)(jax.random.key(3), x)
    groups = jp.channel_groups(module.apply, params, x)
    structure = jp.structures.channels(groups)
    for share in (0.25, 0.5):
        masks = jp.prune_once(params, jp.scores.magnitude, share, structure=structure)
        expected = eager.choose_in_numpy(groups, params, share)
        for path, mask in array_leaves(masks).items():
            np.testing.assert_array_equal(mask, expected[path])


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
    # A plain step reads and writes what the dense step does, and the masks, once for each of Adam's arrays.
    beside = re.findall(r", (\w+): [\d.]+% more bytes than dense, ([\d.]+) times the masks'", text)
    assert [way for way, _ in beside] == ["masked", "packed", "fixed"]
    assert all(2.9 <= float(times) <= 3.1 for _, times in beside)
    counts = re.search(r", fixed: .*?; (\d+) operations \((\d+)\), and (\d+) instructions \((\d+)\)", text)
    assert counts and counts[1] == counts[2] and counts[3] == counts[4]
    steps = [row.split("|")[1:3] for row in sections["train_step"].splitlines() if row.startswith("| LeNet")]
    ways = ["copy", "masked", "packed", "fixed", "idle", "argsort", *(["torch"] if TORCH else [])]
    assert [way.strip() for _, way in steps] == ways
    assert ("PyTorch is not installed" in sections["sweep"]) is not TORCH
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= max(80, len(machine()), len(f"Wrote {page}"))


def test_what_a_plain_step_runs_is_read_off_its_program():
    text = """HloModule jit_step, entry_computation_layout={}

%fused_computation (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} negate(%a)
}

%branch.1 (c: f32[8]) -> (f32[8]) {
  %c = f32[8]{0} parameter(0)
  %d = f32[8]{0} fusion(%c), kind=kLoop, calls=%fused_computation
  %e = f32[8]{0} copy(%d)
  ROOT %f = (f32[8]{0}) tuple(%e)
}

ENTRY %main (x: f32[2,8], m: pred[2,8], n: s32[]) -> (f32[2,8], f32[8]) {
  %x = f32[2,8]{1,0} parameter(0), metadata={op_name="x"}
  %m = pred[2,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %g = f32[2,8]{1,0} fusion(%x, %m), kind=kLoop, calls=%fused_computation
  %h = f32[8,8]{1,0} dot(%g, %g), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %i = (f32[8]{0}) conditional(%n, %x, %x), branch_computations={%branch.1, %branch.1}
  %j = f32[8]{0} get-tuple-element(%i), index=0
  ROOT %k = (f32[2,8]{1,0}, f32[8]{0}) tuple(%g, %j)
}
"""
    moved = (64 + 16 + 64) + (64 + 64 + 256)
    assert jax_steps.plain_program(text) == {"operations": 2, "bytes": moved, "skipped": 2}


def test_bytes_of_a_step_are_those_that_xla_counts():
    begin, step = optax.adam(1e-3).init, jax_steps.train_step(optax.adam(1e-3))
    params = jax_steps.init(jax.random.key(0), (20, 16, 8))
    given = params, begin(params), jnp.ones((6, 20)), jnp.zeros(6, jnp.int32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()
    counted: Any = compiled.cost_analysis()
    found = jax_steps.plain_program(compiled.as_text() or "")
    assert abs(found["bytes"] / counted["bytes accessed"] - 1) < 0.02


@pytest.mark.parametrize("name", gpu.PARTS)
def test_parts_of_the_gpu_page_are_benchmarks_with_these_flags(name):
    for flags in (gpu.PARTS[name].flags, gpu.PARTS[name].small):
        benchmark, *rest = flags.split()
        module = importlib.import_module(f"experiments.benchmarks.{benchmark}")
        parse(module.Config, rest)


def test_gpu_page_at_small_sizes(tmp_path):
    page = tmp_path / "gpu.md"
    script = Path(gpu.__file__).with_suffix(".sh")
    env = os.environ | {"SMALL": "1", "PYTHON": sys.executable}
    subprocess.run(
        ["bash", str(script), "--only", "sparse", "--out", str(page)],
        check=True,
        env=env,
        capture_output=True,
    )
    text = page.read_text()
    kind = jax.devices()[0].device_kind
    assert re.search(rf"^# .*\n\n\d+ x {kind} of .*jax {jax.__version__}", text)
    assert "the figures mean nothing" in text
    assert re.search(r"```text\n(.*\n)+batch  sparsity  measure .*\n4      95%   +[\d.]+ ", text)


def test_a_part_that_takes_too_long_or_fails_is_on_the_gpu_page(monkeypatch):
    began = time.monotonic()
    cut = gpu.section("sparse", small=True, seconds=0.2)
    assert time.monotonic() - began < 5
    assert "Cut off after 0 s" in cut and cut.count("```") == 2
    part = gpu.PARTS["sparse"]
    monkeypatch.setitem(gpu.PARTS, "step", part._replace(small="no_such_benchmark"))
    assert "status 1" in gpu.section("step", small=True, seconds=30)


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
