"""A small run of every benchmark."""

import importlib.util
import json

import jax
import jax.numpy as jnp

from experiments.benchmarks import _bound, files, graph, latency, lottery

TORCH = importlib.util.find_spec("torch") is not None


def test_lottery_benchmark(tmp_path, capsys):
    flags = "--steps 4 --levels 2 --seeds 0,1 --repeats 1 --trial-steps 2"
    lottery.main([*flags.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
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


def test_what_a_step_works_and_moves():
    sizes = {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}
    params = {
        name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])} for name, shape in sizes.items()
    }
    forward = 60 * (784 * 300 + 300 * 100 + 100 * 10)
    backward = forward + 60 * (300 * 100 + 100 * 10)
    assert _bound.flops(params, batch_size=60) == 2 * (forward + backward)
    assert _bound.adam_bytes(params) == 266610 * 29


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
    assert max(map(len, table.splitlines())) <= 80
    size = 32 * 32 + 32 * 10
    assert f" {4 * size:,} " in table
    assert f" {4 * (size - round(0.75 * size)):,} " in table
    assert f" {4 * (32 * 16 + 16 * 10):,} " in table  # half of the hidden units


def test_files_benchmark_stays_above_the_bound():
    (line,) = files.run(files.Config(millions=0.3, sparsities=(0.9,), rounds=1))
    assert line["bound"] < line["ours"] < 1.05 * line["bound"]  # and biases, which stay
    assert line["int8"] < line["ours"] < line["numpy"]
    assert max(map(len, files.summarise([line]).splitlines())) <= 80
