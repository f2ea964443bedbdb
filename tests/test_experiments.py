"""A small version of every study, and what they are built of."""

import json
import operator
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

import jaxprune as jp
from experiments import _config, _data, _models, _train, gradual, lenet

# The founding article's table, by fraction pruned per round: parameters left, size ratio, MACs ratio
# in its count; for channels also which are alive, and what is left when they are taken out.
WEIGHTS = {
    0.1: (15947, 1.3695, 1.3706),
    0.2: (11226, 1.9455, 1.9531),
    0.3: (7550, 2.8927, 2.9137),
    0.4: (4788, 4.5614, 4.6296),
    0.5: (2809, 7.7750, 8.0134),
    0.6: (1482, 14.7368, 15.625),
    0.7: (678, 32.2124, 36.75),
}
CHANNELS = {
    0.1: ([7, 14, 37], 1.3561, 1.4268, 11351, 266258),
    0.2: ([5, 10, 26], 1.8934, 1.9976, 5846, 156420),
    0.3: ([3, 7, 17], 2.78, 2.94, 2711, 78874),
    0.4: ([2, 4, 11], 4.23, 4.98, 1091, 42414),
    0.5: ([1, 3, 7], 6.06, 7.15, 527, 19606),
    0.6: ([1, 1, 3], 11.97, 16.34, 143, 16078),
    0.7: ([0, 1, 1], 18.83, 25.33, None, None),
}


def read(folder):
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_lenet_study_has_the_articles_arithmetic(tmp_path, capsys):
    # The counts do not depend on the training, so none is done after pruning.
    out = tmp_path / "lenet"
    flags = "--train-size 128 --test-size 50 --epochs 1 --tune-epochs 0 --seeds 0,1 --timing-runs 1"
    lenet.main([*flags.split(), "--out", str(out)])
    lines = read(out)
    assert len(lines) == 2 * (1 + 3 * 7)
    assert is_png(out / "accuracy.png")
    dense = lines[0]
    assert dense["method"] == "dense"
    assert (dense["nonzero"], dense["macs"], dense["article_macs"]) == (21840, 480500, 932500)
    for line in lines:
        assert line["study"] == "lenet"
        assert line["config"]["tune_epochs"] == 0
        assert {"jax", "flax", "optax", "jaxprune", "python", "device"} <= line["versions"].keys()
        assert 0 <= line["accuracy"] <= 1
        assert line["masked_speed_up"] > 0
        article_macs = 932500 / line["article_macs"] if line["article_macs"] else np.inf
        if line["method"] in ("random", "l1"):
            nonzero, size, macs = WEIGHTS[line["amount"]]
            assert line["nonzero"] == nonzero
            assert 21840 / nonzero == pytest.approx(size, abs=5e-5)
            assert article_macs == pytest.approx(macs, rel=2e-4)
            assert line["file_ratio"] > 1.1
        if line["method"] == "structured":
            alive, size, macs, params, compact_macs = CHANNELS[line["amount"]]
            assert line["alive"] == alive
            assert 21840 / line["nonzero"] == pytest.approx(size, abs=5e-3)
            assert article_macs == pytest.approx(macs, abs=5e-3)
            if params:
                assert (line["compact_params"], line["compact_macs"]) == (params, compact_macs)
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines() if str(tmp_path) not in line) <= 80
    assert "480,500" in table
    assert "932,500" in table
    assert "collapsed" in table


def test_lenet_study_trains(tmp_path):
    config = lenet.Config(
        seeds=(0,), amounts=(0.3,), rounds=2, tune_epochs=2, epochs=10, timing_runs=0, out=str(tmp_path)
    )
    lines = lenet.run(config)
    accuracy = {line["method"]: line["accuracy"] for line in lines}
    assert accuracy["dense"] > 0.9
    assert accuracy["l1"] > 0.9
    assert [line["masked_speed_up"] for line in lines] == [None] * 4


def test_gradual_study(tmp_path, capsys):
    out = tmp_path / "gradual"
    flags = "--epochs 4 --tune-epochs 1 --end-epoch 3 --sparsities 0.9 --seeds 0,1"
    gradual.main([*flags.split(), "--out", str(out)])
    lines = read(out)
    assert [line["method"] for line in lines[::2]] == ["dense", "global", "layerwise", "one-shot", "random"]
    weights = 64 * 300 + 300 * 100 + 100 * 10
    for line in lines[2:]:
        assert line["kept"] == 300 + 100 + 10 + weights - round(0.9 * weights)
        assert line["achieved"] == pytest.approx(0.9, abs=1e-9)
    assert is_png(out / "accuracy.png")
    again = gradual.run(_config.parse(gradual.Config, [*flags.split(), "--out", str(tmp_path / "again")]))
    assert [line["accuracy"] for line in again] == [line["accuracy"] for line in lines]
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines() if str(tmp_path) not in line) <= 80


def test_studies_read_mnist_from_the_prepared_folder(tmp_path):
    if not (Path(os.environ.get("TFDS_DATA_DIR", "")) / "mnist").is_dir():
        pytest.skip("TFDS_DATA_DIR holds no prepared MNIST")
    small = {"dataset": "mnist", "train_size": 600, "test_size": 100, "seeds": (0,), "out": str(tmp_path)}
    config = lenet.Config(
        **small, preset="sane", amounts=(0.5,), rounds=1, tune_epochs=1, epochs=12, timing_runs=0
    )
    lines = lenet.run(config)
    assert lines[0]["accuracy"] > 0.3
    assert "article" in lenet.summarise(lines, "mnist")
    lines = gradual.run(gradual.Config(**small, epochs=2, tune_epochs=1, end_epoch=1, sparsities=(0.5,)))
    assert lines[0]["accuracy"] > 0.6


def test_missing_data_is_said_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network behind it
    with pytest.raises(_data.DataUnavailable, match="--dataset digits"):
        lenet.run(lenet.Config(dataset="mnist", out=str(tmp_path / "out")))
    with pytest.raises(SystemExit, match="--dataset digits"):
        gradual.main(["--dataset", "mnist", "--out", str(tmp_path / "out")])


def test_bad_flags_are_refused_before_any_training(tmp_path):
    with pytest.raises(ValueError, match=r"amounts must be in \[0, 1\).*got 1.5"):
        lenet.run(lenet.Config(amounts=(0.5, 1.5), out=str(tmp_path)))
    with pytest.raises(ValueError, match="at least one seed"):
        lenet.run(lenet.Config(seeds=(), out=str(tmp_path)))


def test_im2col_lenet_equals_the_convolution():
    x = jax.random.normal(jax.random.key(0), (5, 28, 28, 1))
    model, other = _models.LeNet(im2col=True), _models.LeNet(im2col=False)
    params = model.init(jax.random.key(1), x)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 21840
    np.testing.assert_allclose(
        model.apply({"params": params}, x), other.apply({"params": params}, x), atol=1e-5
    )

    def loss(model):
        return jax.grad(lambda p: (model.apply({"params": p}, x) ** 2).sum())(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), loss(model), loss(other)
    )


def test_an_epoch_is_plain_sgd_over_batches_with_a_smaller_last_one():
    model = _models.MLP((3,))
    rng = np.random.default_rng(0)
    split = _train.Split(
        jnp.asarray(rng.integers(0, 256, (25, 2, 2, 1)), jnp.uint8),
        jnp.asarray(rng.integers(0, 3, 25)),
        0.4,
        0.3,
    )
    params = model.init(jax.random.key(0), split.batch(jnp.arange(1))[0])["params"]
    tx, key = optax.sgd(0.1), jax.random.key(7)
    ours, _ = _train.epoch(model, tx, 10, params, tx.init(params), key, split)
    order = jax.random.permutation(jax.random.split(key)[0], 25)
    for start in (0, 10, 20):
        x, y = split.batch(order[start : start + 10])
        grads = jax.grad(lambda p: _train.nll(model, p, x, y, key).mean())(params)  # noqa: B023
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, params)


def test_fitting_under_masks_keeps_them_and_seeds_do_not_mix():
    data = _data.load("digits", train=100, test=50)
    train, test = _train.splits(data)
    model = _models.MLP((10, 10))
    keys = _train.seed_keys((0, 1), purpose=0)
    params = _train.init(model, train, keys)
    masks = jax.vmap(lambda p: jp.prune_once(p, jp.scores.magnitude, 0.5))(params)
    with tqdm(disable=True) as bar:
        fit = _train.masked_fitter(model, optax.adam(1e-2), 20, train)
        fitted = fit(params, masks, keys, 2, bar)
        alone = fit(*(jax.tree.map(lambda x: x[1:], tree) for tree in (params, masks)), keys[1:], 2, bar)
    jp.check_pruned(fitted, masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, rtol=1e-4, atol=1e-5), fitted, alone)
    accuracy = _train.evaluator(model, test, chunk=20)(fitted)
    for index in range(2):
        own = jax.tree.map(operator.itemgetter(index), fitted)
        guess = model.apply({"params": own}, test.batch(jnp.arange(50))[0]).argmax(-1)
        assert accuracy[index] == pytest.approx(float((guess == test.y).mean()))


def test_flags_are_the_fields_of_the_config():
    config = _config.parse(gradual.Config, ["--sparsities", "0.5,0.75", "--seeds", "4", "--train-size", "10"])
    assert config == gradual.Config(sparsities=(0.5, 0.75), seeds=(4,), train_size=10)
    assert _config.parse(lenet.Config, []) == lenet.Config()
    with pytest.raises(SystemExit):
        _config.parse(lenet.Config, ["--dataset", "imagenet"])
