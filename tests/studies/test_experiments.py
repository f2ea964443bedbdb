"""A small version of every study, and what they are built of."""

import operator
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

import jaxprune as jp
from experiments import dynamic_sparse, gradual, lenet, lottery_ticket, pruning_at_init
from experiments.data import datasets
from experiments.networks import small
from experiments.run import settings
from experiments.run.results import layers
from experiments.show import tables
from experiments.training import loops
from tests.studies.outcomes import check_width, is_png, prepared, read

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


def test_lenet_study_has_the_articles_arithmetic(tmp_path, capsys):
    # The counts do not depend on the training, so none is done after pruning.
    out = tmp_path / "lenet"
    flags = "--train-size 128 --test-size 50 --epochs 1 --tune-epochs 0 --seeds 0 --timing-runs 1"
    lenet.main([*flags.split(), "--out", str(out)])
    lines = read(out)
    assert len(lines) == 1 + 3 * 7
    assert is_png(out / "accuracy.png")
    assert {path.stem for path in (out / "recipes").iterdir()} >= {"random-0.1", "l1-0.5", "structured-0.7"}
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
                assert line["compact_accuracy"] == pytest.approx(line["accuracy"])
                assert line["compact_difference"] < 1e-4
    table = capsys.readouterr().out
    check_width(table, tmp_path)
    assert lenet.summarise(lines, "mnist").count("article") > 1  # a column beside the sentence about it
    assert "480,500" in table
    assert "932,500" in table
    assert "collapsed" in table


def test_lenet_study_trains_and_draws_the_compacted_networks(tmp_path, monkeypatch):
    config = lenet.Config(
        seeds=(0, 1), amounts=(0.3,), rounds=2, tune_epochs=2, epochs=10, timing_runs=0, out=str(tmp_path)
    )
    lines = lenet.run(config)
    assert [(line["method"], line["seed"]) for line in lines] == [
        (method, seed) for method in ("dense", "random", "l1", "structured") for seed in (0, 1)
    ]
    accuracy = {line["method"]: line["accuracy"] for line in lines}
    assert accuracy["dense"] > 0.9
    assert accuracy["l1"] > 0.9
    assert [line["masked_speed_up"] for line in lines] == [None] * 8
    assert [line["accuracy"] for line in lines[:2]] == [x["accuracy_before_last_tuning"] for x in lines[:2]]

    drawn = {}
    monkeypatch.setattr(lenet.figures, "against_compression", lambda *args: drawn.update(args[2]))
    lenet.plot(lines, config)
    compacted = lines[-2:]
    for line in compacted:
        assert line["compact_params"] < line["nonzero"] and line["compact_macs"] < line["macs"]
        assert line["compact_accuracy"] == line["accuracy"]
        assert line["compact_difference"] < 1e-4
    sizes = {"compact_params": 21840, "compact_macs": 480500}
    for panel, (key, whole) in zip(drawn.values(), sizes.items(), strict=True):
        accuracies = [line["accuracy"] for line in compacted]
        assert panel["L1 channels, compacted"] == ([whole / compacted[0][key]], [accuracies])
        assert panel["L1 channels, masked"][1] == [accuracies]


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
        assert line["kept"] == 410 + sum(kept for kept, _ in line["layers"].values())
        assert [size for _, size in line["layers"].values()] == [64 * 300, 300 * 100, 100 * 10]
        assert ("masks" in line) == (line["seed"] == 0)
        if "masks" in line:
            masks = jp.io.load(out / line["masks"]).params
            assert layers(masks) == line["layers"]
    assert is_png(out / "accuracy.png")
    repeat = ["--recipe", str(out / "recipe.yaml"), "--out", str(tmp_path / "again")]
    again = gradual.run(settings.parse(gradual.Config, repeat))
    assert [line["accuracy"] for line in again] == [line["accuracy"] for line in lines]
    table = capsys.readouterr().out
    check_width(table, tmp_path)


# Weights of LeNet-300-100 that are left after some levels of 20 %, the last layer of 10 %.
LEFT = {0: 266200, 1: 213060, 3: 136511, 6: 70051, 7: 56094, 9: 35981, 12: 18506, 15: 9537, 19: 3958}


def test_the_counts_of_lenet_300_100_are_the_papers():
    params = small.MLP().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    pruner = lottery_ticket.recipe(0.2, 0.1, "fc3/kernel").pruner(params)
    state = pruner.init(params)
    for level in range(20):
        if level in LEFT:
            assert jp.metrics.nonzeros(state.masks) == LEFT[level] + 410
        state = jax.jit(pruner.update)(state, params)


def test_lottery_study(tmp_path, capsys):
    out = tmp_path / "lottery"
    methods = ",".join(lottery_ticket.METHODS)
    flags = f"--seeds 0,1 --levels 3 --branch-levels 1,3 --epochs 4 --tune-epochs 2 --methods {methods}"
    lottery_ticket.main([*flags.split(), "--train-size", "400", "--out", str(out)])
    lines = read(out)
    assert len(lines) == 2 * (1 + 3 * 3 + 5 * 2)
    left = {0: 1, 1: 0.8, 3: 0.8**3}
    for line in lines:
        weights = {"fc1/kernel": 64 * 300, "fc2/kernel": 300 * 100, "fc3/kernel": 100 * 10}
        for _ in range(line["level"]):
            weights = {k: n - round((0.1 if k[2] == "3" else 0.2) * n) for k, n in weights.items()}
        assert line["kept_weights"] == sum(weights.values())
        assert line["density"] == pytest.approx(left.get(line["level"], line["density"]), abs=0.01)
        assert line["collapsed"] == []
        assert 1 <= line["early_stop_epoch"] <= len(line["held_out_losses"])
        assert line["early_stop_epoch"] == 1 + int(np.argmin(line["held_out_losses"]))
    accuracy = {(x["method"], x["level"], x["seed"]): x["accuracy"] for x in lines}
    assert accuracy["ticket", 0, 0] > 0.7
    # Same masks and other weights, same weights and other masks: they are other networks.
    others = [accuracy[method, 3, 0] for method in ("ticket", "reinit", "random", "shuffled", "one-shot")]
    assert len(set(others)) > 1
    assert is_png(out / "accuracy.png")
    table = capsys.readouterr().out
    check_width(table, tmp_path)
    assert all(method in table for method in lottery_ticket.METHODS)
    # The same settings again only report; --fresh trains anew, and gets the same.
    again = lottery_ticket.run(settings.parse(lottery_ticket.Config, ["--recipe", str(out / "recipe.yaml")]))
    assert again == [{k: line[k] for k in own} for own, line in zip(again, lines, strict=True)]


def test_the_articles_preset_prunes_a_tenth_of_every_layer(tmp_path):
    chosen = lottery_ticket.settings(lottery_ticket.Config(preset="article"))
    expected = {"levels": 40, "epochs": 10, "batch_size": 32, "rate": 0.1, "last_rate": 0.1}
    assert {name: getattr(chosen, name) for name in expected} == expected
    config = lottery_ticket.Config(
        preset="article", levels=2, epochs=1, tune_epochs=1, seeds=(0,), train_size=200, out=str(tmp_path)
    )
    lines = lottery_ticket.run(config)
    found = [f"{line['method']} {line['level']}" for line in lines]
    assert found == ["ticket 0", "ticket 1", "ticket 2", "tune 1", "tune 2"]
    expected = sum(round(0.9 * round(0.9 * n)) for n in (64 * 300, 300 * 100, 100 * 10))
    assert lines[-1]["kept_weights"] == expected


def test_late_rewinding_goes_back_to_an_epoch(tmp_path):
    small = {"levels": 1, "branch_levels": (), "methods": (), "seeds": (0,), "train_size": 200}
    late = lottery_ticket.Study(lottery_ticket.Config(**small, epochs=3, rewind_epoch=2))
    start = lottery_ticket.Study(lottery_ticket.Config(**small, epochs=2))
    ones = jp.ones_masks(start.init)
    after_two = start.fit(start.init, ones, start.train_keys)
    jax.tree.map(np.testing.assert_array_equal, late.init, after_two.params)
    lines = lottery_ticket.run(lottery_ticket.Config(**small, epochs=3, rewind_epoch=2, out=str(tmp_path)))
    assert [line["level"] for line in lines] == [0, 1]
    assert [len(line["held_out_losses"]) for line in lines] == [1, 1]  # the last of three epochs
    assert lines[0]["early_stop_epoch"] == 3
    with pytest.raises(ValueError, match=r"--rewind-epoch: must be below 3 \(--epochs\), got 3"):
        lottery_ticket.settings(lottery_ticket.Config(**small, epochs=3, rewind_epoch=3))


def test_lottery_flags_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match="--methods: must be one of ticket, reinit"):
        lottery_ticket.settings(lottery_ticket.Config(methods=("winning",)))
    with pytest.raises(ValueError, match=r"--branch-levels: must be at most 5 \(--levels\), got 7"):
        lottery_ticket.settings(lottery_ticket.Config(levels=5, branch_levels=(3, 7)))


def test_dynamic_study_keeps_every_layers_count(tmp_path, capsys):
    out = tmp_path / "dynamic"
    flags = "--seeds 0,1 --epochs 5 --sparsities 0.9"
    dynamic_sparse.main([*flags.split(), "--out", str(out)])
    lines = read(out)
    assert [line["method"] for line in lines[::2]] == ["dense", *dynamic_sparse.METHODS]
    params = small.MLP().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    sizes = {
        path: leaf.size for path, leaf in zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True)
    }
    densities = jp.distributions.erk(params, 0.9)
    erk = {path: sizes[path] - round(s * sizes[path]) for path, s in densities.items()}
    for line in lines[2:8]:
        assert line["kept"] == erk
        assert (line["moved"] > 0) == (line["method"] != "static")
    for line in lines[8:]:
        assert sum(line["kept"].values()) == 50200 - round(0.9 * 50200)
    assert is_png(out / "accuracy.png")
    check_width(capsys.readouterr().out, tmp_path)


def test_pruning_at_init_study(tmp_path, capsys):
    out = tmp_path / "init"
    flags = "--seeds 0,1,2 --compressions 50 --rounds 20"
    pruning_at_init.main([*flags.split(), "--out", str(out)])
    lines = read(out)
    assert [line["method"] for line in lines[::3]] == ["dense", *pruning_at_init.METHODS]
    for line in lines:
        assert line["density"] == pytest.approx(1 / line["compression"], abs=1e-4)
        assert not (line["connected"] and line["collapsed"])
    mean = {
        method: np.mean([line["accuracy"] for line in lines if line["method"] == method])
        for method in pruning_at_init.METHODS
    }
    assert mean["snip"] > mean["random"] + 0.02
    assert is_png(out / "accuracy.png")
    check_width(capsys.readouterr().out, tmp_path)


def test_only_iterated_synflow_keeps_a_deep_narrow_network_whole():
    widths, x = pruning_at_init.NETWORKS["deep"], jnp.zeros((4, 28, 28, 1))
    batch = (x, jnp.zeros(4, jnp.int32))
    keys = loops.seed_keys((0, 1), purpose=0)
    init = jax.vmap(lambda key: small.MLP(widths).init(key, x[:1])["params"])(keys)
    assert sum(leaf[0].size for leaf in jax.tree.leaves(init) if leaf.ndim == 3) == 129400

    def of(method, compression):
        masks_of = pruning_at_init.criteria(widths, batch, compression, rounds=100)[method]
        masks = loops.jit(jax.vmap(masks_of))(init, keys)
        each = [jax.tree.map(operator.itemgetter(i), masks) for i in range(2)]
        for own in each:
            kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(own) if leaf.ndim == 2)
            assert kept == 129400 - round((1 - 1 / compression) * 129400)
        whole = [not jp.metrics.collapsed(own) for own in each]
        assert whole == [bool(pruning_at_init.connected(widths, own, x)) for own in each]
        return whole

    for compression in (10, 100, 1000):
        assert of("synflow", compression) == [True, True]
    for method in ("magnitude", "synflow-1"):
        assert of(method, 10) == [False, False]


def test_connected_follows_paths():
    widths = (2, 2, 1)
    params = small.MLP(widths).init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
    masks = jp.ones_masks(params)
    # A path enters neuron 0 only, and leaves neuron 1 only: no layer is empty, and yet it is cut.
    masks["fc1"]["kernel"] = jnp.array([[True, False], [True, False]])
    masks["fc2"]["kernel"] = jnp.array([[False, False], [True, True]])
    assert not pruning_at_init.connected(widths, masks, jnp.zeros((1, 2)))
    assert jp.metrics.collapsed(masks) == ()
    masks["fc2"]["kernel"] = jnp.array([[False, True], [False, False]])
    assert pruning_at_init.connected(widths, masks, jnp.zeros((1, 2)))


def test_seeds_spread_over_cores_are_the_seeds_one_by_one():
    code = """
import jax, jax.numpy as jnp, numpy as np
from experiments.training import loops
loops.use_cores((0, 1, 2, 3, 4))
assert jax.device_count() == min(5, __import__("os").cpu_count()), jax.devices()
keys = loops.seed_keys((0, 1, 2, 3, 4), purpose=0)
shift = jnp.arange(3.0)
def one(tree, key):
    return {"x": jnp.sin(tree["x"]) + shift, "n": jax.random.normal(key, (2,))}
tree = {"x": jnp.arange(15.0).reshape(5, 3)}
together = jax.jit(lambda tree, keys: loops.over_seeds(one)(tree, keys))(tree, keys)
alone = jax.jit(lambda tree, keys: jax.lax.map(lambda each: one(*each), (tree, keys)))(tree, keys)
jax.tree.map(np.testing.assert_array_equal, together, alone)
loops.use_cores((0, 1))  # too late, and harmless

(filled,) = loops.fill_devices(tree)
assert len(filled["x"]) == 5 + -5 % jax.device_count()
np.testing.assert_array_equal(filled["x"], tree["x"][jnp.arange(len(filled["x"])) % 5])

import optax
from tqdm import tqdm
from experiments.networks.small import MLP
rng = np.random.default_rng(0)
split = loops.Split(jnp.asarray(rng.integers(0, 256, (25, 2, 2, 1)), jnp.uint8), jnp.arange(25) % 3, 0.4, 0.3)
model = MLP((3,))
params = jax.tree.map(np.asarray, loops.init(model, split, keys))
masks = jax.tree.map(lambda leaf: leaf > -0.2, params)
fit, bar = loops.masked_fitter(model, optax.sgd(0.1, 0.9), 10, split), tqdm(disable=True)
found = fit(params, masks, keys, 2, bar)
alone = fit(*(jax.tree.map(lambda leaf: leaf[3:4], tree) for tree in (params, masks)), keys[3:4], 2, bar)
for one, all in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
    assert len(all) == 5
    np.testing.assert_allclose(all[3:4], one, rtol=1e-5, atol=1e-6)
answers = loops.answerer(model, split, chunk=10)(found)
plain = [model.apply({"params": jax.tree.map(lambda leaf: leaf[i], found)}, split.batch(jnp.arange(25))[0])
         for i in range(5)]
np.testing.assert_allclose(answers, np.stack(plain), rtol=1e-5, atol=1e-6)
assert loops.accuracy(answers, split).tolist() == [
    np.mean([row.argmax() == y for row, y in zip(own, np.arange(25) % 3)]) for own in answers
]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_whole_run_is_its_epochs_and_stops_early_at_the_least_loss():
    data = datasets.load("digits", train=200, test=50)
    train, _ = loops.splits(data)
    train, held_out = loops.hold_out(train, 1 / 4)
    assert (len(train.y), len(held_out.y)) == (150, 50)
    model, keys = small.MLP((12, 10)), loops.seed_keys((0, 1), purpose=0)
    init = loops.init(model, train, keys)
    masks = jax.vmap(lambda p: jp.prune_once(p, jp.scores.magnitude, 0.5))(init)
    adam = optax.adam(5e-2)
    whole = loops.whole_run(model, loops.fixed(adam), 30, 8, train, held_out)(init, masks, keys)
    jp.check_pruned(whole.params, masks)
    for seed in range(2):
        params, own, key = jax.tree.map(operator.itemgetter(seed), (init, masks, keys))
        params, losses, best = jp.apply_masks(params, own), [], None
        tx = jp.keep_masked(adam, own)
        opt_state = tx.init(params)
        for number in range(8):
            key_now = jax.random.fold_in(key, number)
            params, opt_state = loops.epoch(model, tx, 30, params, opt_state, key_now, train)
            x, y = held_out.batch(jnp.arange(50))
            losses.append(float(-model.apply({"params": params}, x)[jnp.arange(50), y].mean()))
            best = params if losses[-1] == min(losses) else best
        np.testing.assert_allclose(whole.losses[seed], losses, rtol=1e-3, atol=1e-4)
        ours = jax.tree.map(operator.itemgetter(seed), (whole.params, whole.best))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), ours, (params, best)
        )


def test_tables_set_side_by_side_what_fits():
    lines = [
        {"method": m, "level": level, "accuracy": 0.5 + 0.001 * level}
        for m in "abcdef"
        for level in (0, 1, 1)
    ]
    table = tables.by_method(lines, {0: "dense", 1: "one"}, "level", list("abcdefg"), heading="level")
    text = table.splitlines()
    assert max(map(len, text)) <= 80
    assert text[0].split() == ["level", "a", "b", "c", "d", "e"]
    assert text[2].split() == ["one", *["50.10", "+-", "0.00"] * 5]
    assert text[4].split() == ["level", "f", "g"]
    assert text[-2].split()[-1] == "-"  # g has no lines


def test_studies_read_mnist_from_the_prepared_folder(tmp_path):
    if not prepared("mnist"):
        pytest.skip("TFDS_DATA_DIR holds no prepared MNIST")
    small = {"dataset": "mnist", "train_size": 600, "test_size": 100, "seeds": (0,), "out": str(tmp_path)}
    lines = gradual.run(gradual.Config(**small, epochs=2, tune_epochs=1, end_epoch=1, sparsities=(0.5,)))
    assert lines[0]["accuracy"] > 0.6
    lines = lottery_ticket.run(
        lottery_ticket.Config(**small, levels=1, branch_levels=(1,), epochs=3, tune_epochs=1)
    )
    assert lines[0]["accuracy"] > 0.6
    assert lines[1]["kept_weights"] == LEFT[1]


def test_missing_data_is_said_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network behind it
    with pytest.raises(datasets.DataUnavailable, match="--dataset digits"):
        lenet.run(lenet.Config(dataset="mnist", out=str(tmp_path / "out")))
    with pytest.raises(SystemExit, match="--dataset digits"):
        gradual.main(["--dataset", "mnist", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("side", "inputs", "outputs", "batch"), [(28, 1, 10, 3), (12, 10, 20, 2), (8, 3, 1, 1)]
)
def test_a_pooled_convolution_is_a_convolution_and_a_maximum(side, inputs, outputs, batch):
    keys = jax.random.split(jax.random.key(side), 3)
    x = jax.random.normal(keys[0], (inputs, side, side, batch))
    kernel = jax.random.normal(keys[1], (5, 5, inputs, outputs))

    def plain(x, kernel):
        dims, window = ("CHWN", "HWIO", "CHWN"), (1, 2, 2, 1)
        convolved = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dims)
        return jax.lax.reduce_window(convolved, -jnp.inf, jax.lax.max, window, window, "VALID")

    ours, ours_back = jax.vjp(small.pooled_conv, x, kernel)
    theirs, back = jax.vjp(plain, x, kernel)
    assert ours.dtype == jnp.float32 and ours.shape == (outputs, side // 2 - 2, side // 2 - 2, batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    grad = jax.random.normal(keys[2], ours.shape)
    for one, other in zip(ours_back(grad), back(grad), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_the_maximum_of_four_has_the_gradient_of_jaxs_maximum_with_and_without_ties():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 3, (4, 5, 7)), jnp.float32)
    grad = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    ours, ours_back = jax.vjp(small.max_of_four, x)
    theirs, back = jax.vjp(lambda x: x.max(0), x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours_back(grad)[0], back(grad)[0], rtol=1e-6)
    assert (np.asarray(x) == np.asarray(ours)).sum(0).max() == 4  # there are ties of all four


def test_lenet_drops_whole_channels_of_single_images():
    x, key = jax.random.normal(jax.random.key(0), (6, 28, 28, 1)), jax.random.key(2)
    for im2col, (channels, images) in {True: (0, 3), False: (3, 0)}.items():
        model = small.LeNet(im2col=im2col)
        params = model.init(jax.random.key(1), x)
        _, seen = model.apply(
            params,
            x,
            train=True,
            rngs={"dropout": key},
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        (dropped,) = seen["intermediates"]["Dropout_0"]["__call__"]
        zero = np.moveaxis(np.asarray(dropped) == 0, (channels, images), (0, 1)).reshape(20, 6, 16)
        assert (zero.all(-1) | ~zero.any(-1)).all()
        assert 0.3 < zero.mean() < 0.7
        assert len({tuple(row) for row in zero[:, :, 0].T}) == 6


def test_im2col_lenet_equals_the_convolution():
    x = jax.random.normal(jax.random.key(0), (5, 28, 28, 1))
    model, other = small.LeNet(im2col=True), small.LeNet(im2col=False)
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
    model = small.MLP((3,))
    rng = np.random.default_rng(0)
    split = loops.Split(
        jnp.asarray(rng.integers(0, 256, (25, 2, 2, 1)), jnp.uint8),
        jnp.asarray(rng.integers(0, 3, 25)),
        0.4,
        0.3,
    )
    params = model.init(jax.random.key(0), split.batch(jnp.arange(1))[0])["params"]
    tx, key = optax.sgd(0.1), jax.random.key(7)
    ours, _ = loops.epoch(model, tx, 10, params, tx.init(params), key, split)
    order = jax.random.permutation(jax.random.split(key)[0], 25)
    for start in (0, 10, 20):
        x, y = split.batch(order[start : start + 10])
        grads = jax.grad(lambda p, x=x, y=y: loops.nll(model, p, x, y, key).mean())(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, params)


def test_fitting_under_masks_keeps_them_and_seeds_do_not_mix():
    data = datasets.load("digits", train=100, test=50)
    train, test = loops.splits(data)
    model = small.MLP((10, 10))
    keys = loops.seed_keys((0, 1), purpose=0)
    params = loops.init(model, train, keys)
    masks = jax.vmap(lambda p: jp.prune_once(p, jp.scores.magnitude, 0.5))(params)
    with tqdm(disable=True) as bar:
        fit = loops.masked_fitter(model, optax.adam(1e-2), 20, train)
        fitted = fit(params, masks, keys, 2, bar)
        alone = fit(*(jax.tree.map(lambda x: x[1:], tree) for tree in (params, masks)), keys[1:], 2, bar)
    jp.check_pruned(fitted, masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, rtol=1e-4, atol=1e-5), fitted, alone)
    accuracy = loops.evaluator(model, test, chunk=20)(fitted)
    for index in range(2):
        own = jax.tree.map(operator.itemgetter(index), fitted)
        guess = model.apply({"params": own}, test.batch(jnp.arange(50))[0]).argmax(-1)
        assert accuracy[index] == pytest.approx(float((guess == test.y).mean()))
