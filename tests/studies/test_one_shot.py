"""The study of pruning without training in small, its networks and its calibration sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import datasets
from experiments.networks.large import GPT, stack_blocks
from experiments.one_shot import cases, methods, study
from tests.studies.outcomes import check_width, is_png, read

SMALL = (
    "--train-size 200 --test-size 100 --epochs 3 --batch-size 50 --examples 64 --more 96 --recover-steps 4"
)
VOCABULARY = "abcdefgh"


@pytest.fixture
def few_characters(monkeypatch):
    """A text of eight characters, each of which is often followed by the next."""

    def load(*, train=None, validation=None):
        rng = np.random.default_rng(0)
        text = np.cumsum(rng.choice([1, 1, 1, 2, 5], 4000)) % len(VOCABULARY)
        return datasets.Text(
            text[: train or 3000].astype(np.uint8),
            text[3000 : 3000 + (validation or 1000)].astype(np.uint8),
            VOCABULARY,
            "counting",
        )

    monkeypatch.setattr(datasets, "load_shakespeare", load)


def kept(line):
    return {path: left for path, (left, _) in line["layers"].items()}


def test_stacked_blocks_compute_the_same():
    x = jax.random.randint(jax.random.key(0), (2, 8), 0, 8)
    unrolled = GPT(8, context=8, dim=12, depth=3, heads=2, hidden=20)
    params = unrolled.init(jax.random.key(1), x)["params"]
    stacked = stack_blocks(params)
    scanned = unrolled.copy(scan=True)
    assert jax.tree.map(jnp.shape, scanned.init(jax.random.key(1), x)["params"]) == jax.tree.map(
        jnp.shape, stacked
    )
    outputs = scanned.apply({"params": stacked}, x)
    np.testing.assert_allclose(outputs, unrolled.apply({"params": params}, x), rtol=1e-5, atol=1e-5)


def test_calibration_sets_are_drawn_by_their_seed():
    task = cases.load("digits", 100, 20)
    few, more, others = (cases.calibration_set(task, *given) for given in ((10, 3), (30, 3), (10, 4)))
    np.testing.assert_array_equal(few, more[:10])
    assert not np.array_equal(few, others)
    everything = cases.calibration_set(task, 500, 3)
    rows = {np.asarray(image).tobytes() for image in task.train.batch(jnp.arange(100))[0]}
    assert len(everything) == 100
    assert {np.asarray(image).tobytes() for image in everything} == rows


def test_a_network_writes_from_its_own_distribution(few_characters):
    """Characters that are all but certain given those before are the likeliest ones; others differ."""
    task = cases.load("tiny_shakespeare", None, None)
    variables = task.init(jax.random.key(0))
    sharp = jax.tree.map(lambda leaf: leaf, variables)
    sharp["params"]["head"]["kernel"] = 1e4 * variables["params"]["head"]["kernel"]
    text = np.asarray(cases.sampled_windows(task, sharp, 5, 0))
    likeliest = np.asarray(task.logits(sharp, jnp.asarray(text)).argmax(-1))
    np.testing.assert_array_equal(text[:, 1:], likeliest[:, :-1])
    loose = np.asarray(cases.sampled_windows(task, variables, 5, 0))
    assert len(np.unique(loose)) > len(VOCABULARY) // 2


def test_the_study_on_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "_LEVELS", (0.5, 0.9))
    monkeypatch.setattr(methods, "BUDGETED", ("wanda",))
    monkeypatch.setattr(methods, "CHANNEL_METHODS", ("magnitude", "obs"))
    monkeypatch.setattr(methods, "RE_ESTIMATED", ("magnitude",))
    monkeypatch.setattr(study, "_BITS", (3,))
    parts = ("entries", "nm", "channels", "budgets", "statistics", "bits")
    flags = f"{SMALL} --seeds 0 --sparsities 0.5 --out {tmp_path} --parts {','.join(parts)} --methods".split()
    flags.append("magnitude,recover-more")
    study.main(flags)
    lines = read(tmp_path)
    printed = capsys.readouterr().out
    check_width(printed, tmp_path)
    assert is_png(tmp_path / "sparsities.png")
    wanted = study.units(study.settings(study.parse(study.Config, flags)))
    assert len(lines) == len(wanted)
    assert {line["part"] for line in lines} == {"dense", *parts}

    sizes = {"conv1/kernel": 9 * 16, "conv2/kernel": 144 * 32, "conv3/kernel": 288 * 32}
    for line in lines:
        if line["part"] == "dense":
            assert line["gap"] == 0
        if line["part"] == "entries":
            removed = {path: size - kept(line)[path] for path, size in sizes.items()}
            for path, size in sizes.items():
                assert abs(removed[path] - line["sparsity"] * size) <= 32, line["method"]
            assert kept(line)["head/kernel"] == 1280
        if line["part"] == "nm":
            assert kept(line) == {
                "conv1/kernel": 144, "conv2/kernel": 2304, "conv3/kernel": 4608, "head/kernel": 1280
            }  # fmt: skip
        if line["part"] == "channels":
            assert kept(line)["conv1/kernel"] == 72
            assert kept(line)["conv2/kernel"] == 2304
            assert line["params"] == 15418 - 72 - 2304 - 2 * 8
            assert line["compaction_error"] <= 1e-5
        if line["part"] == "budgets":
            left = sum(kept(line)[path] for path in sizes)
            assert left == pytest.approx(0.3 * sum(sizes.values()), rel=0.01)

    # One method's lines are what they were when the same command asks for fewer.
    study.main([*flags[:-1], "magnitude"])
    assert read(tmp_path) == lines


def test_magnitude_is_what_numpy_makes_of_it(tmp_path):
    flags = f"{SMALL} --seeds 3 --parts entries --methods magnitude --sparsities 0.5 --out {tmp_path}"
    config = study.parse(study.Config, flags.split())
    study.run(config)
    chosen = study.settings(config)
    task = cases.load("digits", 200, 100)
    settings = {name: getattr(chosen, name) for name in study._DENSE_SETTINGS}
    dense = cases.Dense(task, chosen.dense, settings).variables(3, study.tqdm(disable=True))
    for name in ("conv1", "conv2", "conv3"):
        kernel = np.asarray(dense["params"][name]["kernel"])
        smallest = np.argsort(np.abs(kernel), axis=None, kind="stable")[: kernel.size // 2]
        kernel = kernel.copy()
        kernel.flat[smallest] = 0
        dense["params"][name]["kernel"] = jnp.asarray(kernel)
    x, y = task.test.batch(jnp.arange(100))
    accuracy = float((task.logits(dense, x).argmax(-1) == y).mean())
    (line,) = [line for line in read(tmp_path) if line["method"] == "magnitude"]
    assert line["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_the_study_on_text(tmp_path, capsys, few_characters, monkeypatch):
    monkeypatch.setattr(methods, "COMPARED", ("wanda",))
    monkeypatch.setattr(methods, "CHANNEL_METHODS", ("flap", "obs"))
    flags = (
        "--dataset tiny_shakespeare --seeds 0 --epochs 1 --batch-size 32 --examples 8 --sizes 8 --draws 1 "
    )
    flags += f"--parts nm,channels,calibration --methods wanda --out {tmp_path}"
    study.main(flags.split())
    lines = read(tmp_path)
    check_width(capsys.readouterr().out, tmp_path)
    assert is_png(tmp_path / "calibration.png")
    assert {line["source"] for line in lines} == {"data", "own samples"}
    for line in lines:
        if line["part"] == "channels":
            assert line["compaction_error"] <= 1e-4
            whole = {path: of for path, (_, of) in line["layers"].items()}
            halves = {path for path, left in kept(line).items() if 2 * left == whole[path]}
            wanted = ("up/", "down/") if "hidden" in line["pattern"] else ("key/", "query/", "value/", "out/")
            assert halves == {path for path in whole if any(part in path for part in wanted)}
