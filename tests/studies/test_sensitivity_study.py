"""A small run of the study of sensitivity, and of its benchmark."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments import sensitivity
from experiments.benchmarks import sensitivity_cost as benchmark
from tests.studies.outcomes import check_width, is_png, read

FLAGS = "--network mlp --train-size 600 --test-size 60 --epochs 4 --tune-epochs 1 --seeds 0,1"


def test_the_study(tmp_path, capsys):
    flags = f"{FLAGS} --kinds weights,channels --levels 0.3,0.6,0.9 --tolerances 0,0.1 --out {tmp_path}"
    sensitivity.main(flags.split())
    lines = read(tmp_path)
    for picture in ("sensitivity.png", "untuned.png", "tuned.png"):
        assert is_png(tmp_path / picture)
    points = [line for line in lines if line["figure"] == "sensitivity"]
    layers = {"weights": 3, "channels": 2}
    for kind, count in layers.items():
        own = [line for line in points if line["kind"] == kind]
        assert len(own) == count * 3 * 2
        for line in own:
            assert line["kept"] == line["units"] - round(line["level"] * line["units"])

    weights = 64 * 300 + 300 * 100 + 100 * 10
    pruned = [line for line in lines if line["figure"] == "pruned"]
    assert {line["kind"] for line in pruned} == set(layers)
    for line in pruned:
        left = sum(kept for kept, _ in line["layers"].values())
        assert line["sparsity"] == pytest.approx(1 - left / weights)
        (by_layer,) = (
            sum(kept for kept, _ in other["layers"].values())
            for other in pruned
            if other["method"] == "by-layer"
            and all(other[key] == line[key] for key in ("kind", "seed", "tolerance"))
        )
        assert left <= by_layer
        # One weight at a time is ranked, and so many can go.
        assert (line["kind"], line["method"]) != ("weights", "global") or left == by_layer
        if line["method"] != "by-layer":
            continue
        drops = {
            (x["layer"], x["level"]): x["drop"]
            for x in points
            if (x["kind"], x["seed"]) == (line["kind"], line["seed"])
        }
        for layer, target in line["targets"].items():
            levels = [level for name, level in drops if name == layer and level <= target]
            assert all(drops[layer, level] <= line["tolerance"] for level in levels)
            assert target == max(levels, default=0)
    printed = capsys.readouterr().out
    check_width(printed, tmp_path)
    assert "channels: test accuracy in %, before | after tuning" in printed


def test_channels_of_both_networks_are_found():
    names = {"lenet": ["conv1/kernel[3]", "conv2/kernel[3]", "fc1/kernel[1]"]}
    names["mlp"] = ["fc1/kernel[1]", "fc2/kernel[1]"]
    for network, expected in names.items():
        image = jnp.ones((1, 28, 28, 1))
        params = jax.eval_shape(sensitivity.MODELS[network].init, jax.random.key(0), image)["params"]
        kind = sensitivity.kinds(network, params, image)["channels"]
        assert list(kind.structure.kinds) == expected


def test_the_benchmark_counts_what_it_times():
    small = benchmark.cases(8)[0]
    found = benchmark.measure(small, benchmark.Config(rounds=1))
    assert found["points"] == 100
    assert 1 <= len(found["programs"]) <= 5
    assert list(found["ratios"]) == [1]
    assert found["ratios"][1][0] > 0
    for case in benchmark.cases(8):
        kernels = [
            path
            for path, leaf in zip(jp.leaf_paths(case.params), jax.tree.leaves(case.params), strict=True)
            if jp.kernels(path, leaf)
        ]
        assert len(kernels) == 10
        assert np.isfinite(case.evaluate(case.params, case.x))
