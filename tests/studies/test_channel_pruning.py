"""The channel-pruning study in small, its larger networks, and how they are trained."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments.channel_pruning import cutting, show, study
from experiments.data import datasets, prepare
from experiments.networks.large import Decoder, ResNet, ViT
from experiments.run import settings
from experiments.run.checkpoint import Checkpoints
from experiments.training import steps
from tests.studies.outcomes import check_width, is_png, prepared, read


@pytest.fixture
def few_images(monkeypatch):
    """The first CIFAR-10 images where they are prepared; else images of noise, tinted by class."""
    if prepared("cifar10"):
        return

    def load(name, *, size=None, train=None, test=None):
        rng = np.random.default_rng(0)

        def split(count):
            y = rng.integers(0, 10, count).astype(np.int32)
            x = rng.integers(0, 128, (count, 32, 32, 3)) + 12 * y[:, None, None, None]
            return x.astype(np.uint8), y

        return datasets.Dataset(name, *split(train), *split(test), 0.5, 0.25, "noise")

    monkeypatch.setattr(datasets, "load", load)


def check_lines(lines, methods, targets):
    """What holds for every line of a study, whatever it learned."""
    assert [(line["method"], line["target"]) for line in lines] == [
        ("dense", 1.0),
        *((method, target) for target in targets for method in methods),
    ]
    dense = lines[0]
    for line in lines[1:]:
        assert line["study"] == "channel_pruning"
        assert line["config"]["targets"] == list(targets)
        assert line["macs"] <= dense["macs"] / line["target"]
        assert line["macs_ratio"] == dense["macs"] / line["macs"]
        assert line["params"] < dense["params"]
        assert 0 <= line["compaction_error"] < 1e-4
        assert line["stayed"] == []
        assert (line["before"] is None) == (line["method"] in ("gradual", "scratch"))
        assert all(1 <= kept <= units for kept, units in line["widths"].values())
        assert line["loss"] > 0


def lenet_macs(widths):
    conv1, conv2, fc1 = widths
    return 24 * 24 * 25 * conv1 + 8 * 8 * 25 * conv1 * conv2 + 16 * conv2 * fc1 + 10 * fc1


def kept(line):
    return np.array([width[0] for width in line["widths"].values()])


def test_the_study_ends_in_smaller_networks_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    out, saved, trained = tmp_path / "digits", [], []
    save, fitter = Checkpoints.save, study.Study.fitter

    def save_until_killed(checkpoints, level, *rest):
        save(checkpoints, level, *rest)
        saved.append(level)
        if saved == [1, 2, 3, 4]:
            raise KeyboardInterrupt

    def watched(study, apply, optimizer):
        trained.append("dense" if apply is study.task.apply else "small")
        return fitter(study, apply, optimizer)

    monkeypatch.setattr(Checkpoints, "save", save_until_killed)
    monkeypatch.setattr(study.Study, "fitter", watched)
    flags = (
        "--train-size 300 --test-size 100 --epochs 15 --tune-epochs 4 --targets 2 --rounds 2 --ranking local"
    )
    flags = [*flags.split(), "--timing-runs", "2", "--batch-sizes", "8", "--out", str(out), "--methods"]
    methods = ("local", "scratch", "iterative")
    with pytest.raises(KeyboardInterrupt):
        study.main([*flags, ",".join(methods)])
    assert not (out / "results.jsonl").exists()
    study.main([*flags, ",".join(methods)])
    assert saved == list(range(1, 16))  # epochs that were finished are not trained again
    lines = read(out)
    check_lines(lines, methods, (2.0,))
    assert (lines[0]["params"], lines[0]["macs"]) == (21840, 480500)
    by_method = {line["method"]: line for line in lines}
    for line in lines[1:]:
        assert lenet_macs(kept(line)) == line["macs"]
        assert lenet_macs(kept(line) + 1) > 480500 / 2  # one unit more of each group would be too many
        assert line["speed_up"]["8"] > 0
    assert by_method["scratch"]["widths"] == by_method["local"]["widths"]
    assert by_method["dense"]["accuracy"] > 0.8
    assert by_method["local"]["accuracy"] > 0.8
    assert is_png(out / "accuracy.png")
    text = capsys.readouterr().out
    check_width(text, tmp_path)
    assert all(method in text for method in methods)
    assert "conv2" in text

    # One method more: neither the dense network nor what was pruned before is trained again.
    del trained[:]
    study.main([*flags, "local,random"])
    assert trained == ["small"]
    again = read(out)
    check_lines(again, (*methods, "random"), (2.0,))
    assert [line["accuracy"] for line in again[:4]] == [line["accuracy"] for line in lines]
    assert again[4]["widths"] == by_method["local"]["widths"]
    study.main([*flags, ",".join(methods)])
    assert trained == ["small"]
    with pytest.raises(SystemExit, match="other settings"):
        study.main([*flags, "local", "--tune-epochs", "1"])
    elsewhere = ["--out", str(tmp_path / "x"), "--dense", str(out / "dense")]
    with pytest.raises(SystemExit, match=r"other settings \(epochs\)"):
        study.main([*flags, "local", "--epochs", "5", *elsewhere])


def test_resnets_shrink_with_their_statistics(tmp_path, monkeypatch, few_images, capsys):
    tiny = cutting.NETWORKS["resnet20"]._replace(model=lambda classes: ResNet(8, widths=(4, 8, 8)))
    monkeypatch.setitem(cutting.NETWORKS, "resnet20", tiny)
    methods = ("gradual",)
    flags = "--dataset cifar10 --train-size 256 --test-size 100 --epochs 1 --tune-epochs 2 --targets 2"
    flags = f"{flags} --batch-size 32 --timing-runs 0 --batch-sizes 8 --methods {','.join(methods)}"
    study.main([*flags.split(), "--out", str(tmp_path)])
    lines = read(tmp_path)
    check_lines(lines, methods, (2.0,))
    assert lines[0]["note"] in capsys.readouterr().out
    assert prepared("cifar10") == ("JPEG" in lines[0]["note"])


@pytest.mark.parametrize("name", ["vit", "decoder"])
def test_transformers_lose_heads_and_hidden_units(name, tmp_path, monkeypatch, few_images):
    shape = {"dim": 16, "depth": 1, "heads": 4}
    tiny = {
        "vit": lambda classes: ViT(patch=8, mlp=24, **shape),
        "decoder": lambda characters: Decoder(characters, 128, hidden=24, **shape),
    }
    monkeypatch.setitem(cutting.NETWORKS, name, cutting.NETWORKS[name]._replace(model=tiny[name]))
    if name == "decoder" and not prepared("tiny_shakespeare"):
        rng = np.random.default_rng(0)

        def load(*, train, validation):
            return datasets.Text(
                *(rng.integers(0, 9, n).astype(np.uint8) for n in (train, validation)), "abcdefghi", "x"
            )

        monkeypatch.setattr(datasets, "load_shakespeare", load)
    dataset, train, test = {"vit": ("cifar10", 128, 50), "decoder": ("tiny_shakespeare", 2049, 1281)}[name]
    flags = (
        f"--dataset {dataset} --network {name} --train-size {train} --test-size {test} --epochs 1 "
        "--tune-epochs 1 --batch-size 16 --timing-runs 0 --batch-sizes 4 --targets 1.5 --methods global"
    )
    config = settings.parse(study.Config, [*flags.split(), "--out", str(tmp_path)])
    lines = study.run(config)
    check_lines(read(tmp_path), ("global",), (1.5,))
    widths = lines[1]["widths"]
    assert sorted(units for _, units in widths.values()) == [4, 24]
    show.plot(lines, study.settings(config))
    text = show.summarise(lines, study.settings(config))
    check_width(text)
    if name == "decoder":
        assert "bits per character" in text
        assert lines[1]["bits"] == pytest.approx(lines[1]["loss"] / math.log(2))


def every_other(groups, variables):
    """Masks without every other unit of each group."""
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), variables)
    by_path = dict(zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True))
    for group in groups:
        for path, axis, indices, _, divisor in group.members:
            if not divisor:
                np.moveaxis(by_path[path], axis, 0)[indices[::2].ravel()] = False
    return masks


def filled(shapes):
    """Numbers of these shapes, vectors positive: they may be variances."""
    rng = np.random.default_rng(0)

    def numbers(leaf):
        own = rng.normal(size=leaf.shape).astype(np.float32)
        return np.abs(own) * np.float32(0.3) + np.float32(0.05) if leaf.ndim == 1 else own

    return jax.tree.map(numbers, shapes)


def test_a_compacted_network_trains_as_the_masked_one():
    model, x = ResNet(8, widths=(4, 8, 8)), jax.random.normal(jax.random.key(0), (6, 16, 16, 3))
    apply = steps.flax_apply(model)
    variables = filled(jax.eval_shape(model.init, jax.random.key(1), x))
    groups = jp.channel_groups(cutting.evaluation(apply), variables, x)
    small = cutting.compact(apply, variables, every_other(groups, variables), x)
    own, dense = small.compacted.params, small.compacted.expand(small.compacted.params)
    logits, statistics = jax.jit(small.apply, static_argnums=2)(own, x, True)
    expected, of_dense = jax.jit(apply, static_argnums=2)(dense, x, True)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    of_dense = small.compacted.shrink({"batch_stats": of_dense, "params": dense["params"]})["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), statistics, of_dense)
    params_plan = small.compacted.plan.under("params")
    state = jax.eval_shape(lambda: params_plan.shrink(steps.sgd(0.1).init(variables["params"])))
    of_small = jax.eval_shape(lambda: steps.sgd(0.1).init(own["params"]))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, of_small)


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_as_few_units_go_as_leave_the_multiply_adds_asked_for(ranking):
    def apply(variables, x, train):
        p = variables["params"]
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], {}

    shapes = {"a": (6, 9), "b": (9, 7), "c": (7, 5)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3), strict=True))
    variables = {"batch_stats": {}, "params": {n: jax.random.normal(keys[n], s) for n, s in shapes.items()}}
    x = jnp.ones((1, 6))
    cutter = cutting.Cutter(apply, variables, x)

    def macs(first, second):
        return 6 * first + first * second + second * 5

    assert cutter.macs == macs(9, 7)
    for ratio in (1.2, 2, 5):
        cut = cutter.cut(ranking, variables, cutter.macs / ratio)
        small = jp.compact(cutting.evaluation(apply), variables, cut.masks, x)
        widths = cutter.widths(small.plan)
        (first, _), (second, _) = widths.values()
        assert [units for _, units in widths.values()] == [9, 7]
        assert cut.macs == macs(first, second) <= cutter.macs / ratio
        if ranking == "global":
            assert first + second == 16 - round(16 * cut.sparsity)
            assert max(macs(first + 1, second), macs(first, second + 1)) > cutter.macs / ratio
        else:
            assert (first, second) == (9 - round(9 * cut.sparsity), 7 - round(7 * cut.sparsity))
            assert macs(first + 1, second + 1) > cutter.macs / ratio
    with pytest.raises(ValueError, match=r"at_most=11 cannot be met: .*the measure is 12, and 152 with"):
        cutter.cut(ranking, variables, 11)
    even = cutting.Cutter(apply, variables, x, multiple_of=2).cut(ranking, variables, macs(9, 7) / 2)
    small = jp.compact(cutting.evaluation(apply), variables, even.masks, x)
    assert [n % 2 for n, _ in cutter.widths(small.plan).values()] == [0, 0]
    assert even.macs <= macs(9, 7) / 2


def test_the_coupled_lasso_is_the_sum_of_units_norms():
    params = {
        "a": jax.random.normal(jax.random.key(0), (3, 4)),
        "b": jax.random.normal(jax.random.key(1), (4, 2)),
    }
    groups = jp.channel_groups(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
    units = np.concatenate([params["a"].T, params["b"]], axis=1)
    expected = np.sqrt(5) * np.linalg.norm(units, axis=1).sum()
    np.testing.assert_allclose(cutting.coupled_lasso(groups, params), expected, rtol=1e-6)
    params = {"a": params["a"].at[:, 1].set(0), "b": params["b"].at[1].set(0)}
    tx = cutting.penalised(groups, 0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, _ = tx.update(zeros, tx.init(params), params)
    units = units[:, None] / np.linalg.norm(units, axis=1)[:, None, None]
    units[1] = 0
    np.testing.assert_allclose(grads["b"], 0.1 * np.sqrt(5) * units[:, 0, 3:], rtol=1e-5)


def test_flags_that_cannot_be_met_are_refused():
    config = study.Config
    with pytest.raises(ValueError, match="resnet20 is for --dataset cifar10, got digits"):
        study.settings(config(network="resnet20"))
    assert study.settings(config(dataset="cifar10", lr=0.2)).epochs == 15
    assert study.settings(config(dataset="cifar10", lr=0.2)).lr == 0.2
    assert cutting.shares(5, 3) == [2, 2, 1]
    assert cutting.shares(2, 3) == [1, 1]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def resnet(depth, shortcut="projection"):
    model, x = ResNet(depth, shortcut), jnp.zeros((1, 32, 32, 3))
    return model, jax.eval_shape(model.init, jax.random.key(0), x), x


def test_resnets_have_the_articles_parameters():
    expected = {"projection": {20: 272_474, 56: 855_770}, "pad": {20: 269_722, 56: 853_018}}
    for shortcut, counts in expected.items():
        assert {depth: count(resnet(depth, shortcut)[1]["params"]) for depth in counts} == counts
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        resnet(21)


@pytest.mark.parametrize(("depth", "left"), [(20, 68_786), (56, 215_282)])
def test_half_of_every_group_leaves_what_torch_pruning_leaves(depth, left):
    model, variables, x = resnet(depth)
    logits = cutting.evaluation(steps.flax_apply(model))
    groups = jp.channel_groups(logits, variables, x)
    assert len(groups) == {20: 12, 56: 30}[depth]
    masks = every_other(groups, variables)
    small = jax.eval_shape(
        lambda variables: jp.compact(logits, variables, masks, x, verify=False).params, variables
    )
    assert count(small["params"]) == left


def test_crop_and_flip_is_numpys():
    x = jax.random.normal(jax.random.key(0), (48, 32, 32, 3))
    got = np.asarray(jax.jit(steps.crop_and_flip)(jax.random.key(1), x))
    padded = np.pad(np.asarray(x), ((0, 0), (4, 4), (4, 4), (0, 0)))
    seen = set()
    for image, source in zip(got, padded, strict=True):
        fits = [
            (row, column, flip)
            for row in range(9)
            for column in range(9)
            for flip in (False, True)
            if np.array_equal(image[:, ::-1] if flip else image, source[row : row + 32, column : column + 32])
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) > 30
    assert {flip for *_, flip in seen} == {False, True}


def test_the_decoder_sees_no_later_character():
    model = Decoder(65, 32, dim=16, depth=2, heads=2, hidden=24)
    text = jax.random.randint(jax.random.key(0), (2, 32), 0, 65)
    variables = jax.jit(model.init)(jax.random.key(1), text)
    logits = jax.jit(model.apply)
    changed = jnp.abs(logits(variables, text) - logits(variables, text.at[:, 20].add(1))).max((0, 2))
    np.testing.assert_array_equal(np.asarray(changed > 1e-6).nonzero()[0][0], 20)


def test_windows_are_pieces_and_what_follows_them():
    ids = np.arange(23, dtype=np.uint8)
    pieces = steps.windows(ids, 5)
    assert pieces.x.shape == (4, 5)
    np.testing.assert_array_equal(pieces.x.ravel(), ids[:20])
    np.testing.assert_array_equal(pieces.y.ravel(), ids[1:21])
    assert pieces.batch(jnp.array([3]))[1].tolist() == [[16, 17, 18, 19, 20]]


def test_shakespeare_is_read_as_numbers(tmp_path):
    if not prepared("tiny_shakespeare"):
        pytest.skip("TFDS_DATA_DIR holds no prepared Tiny Shakespeare")
    text = datasets.load_shakespeare()
    assert (len(text.train), len(text.validation), len(text.vocabulary)) == (1_003_854, 55_770, 65)
    start = "".join(text.vocabulary[i] for i in text.train[:14])
    assert start == "First Citizen:"
    # Prepared anew from the same text, it reads the same.
    builder = prepare.make_builder(prepare.import_tfds(), "tiny_shakespeare", None)
    splits = ("train", "validation", "test")
    raw = b"".join(builder.as_data_source(split).__getitems__([0])[0]["text"] for split in splits)
    (tmp_path / "input.txt").write_bytes(raw)
    prepare.prepare(
        "tiny_shakespeare", tmp_path / "data", lambda urls: dict.fromkeys(urls, tmp_path / "input.txt")
    )
    again = datasets.load_shakespeare(data_dir=tmp_path / "data", train=1000)
    np.testing.assert_array_equal(again.train, text.train[:1000])
    np.testing.assert_array_equal(again.validation, text.validation)
    assert again.vocabulary == text.vocabulary


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_the_resnet_is_pytorchs(shortcut):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    model, rng = ResNet(8, shortcut, (4, 8, 8)), np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    params, statistics = variables["params"], variables["batch_stats"]

    def conv(x, layer, stride=1):
        kernel = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x, layer, own):
        numbers = [torch.tensor(a) for a in (own["mean"], own["var"], layer["scale"], layer["bias"])]
        return functional.batch_norm(x, *numbers, False, 0.1, 1e-5)

    h = torch.tensor(x).permute(0, 3, 1, 2)
    h = functional.relu(norm(conv(h, params["stem"]), params["stem_norm"], statistics["stem_norm"]))
    for stage in (1, 2, 3):
        p, s = params[f"stage{stage}_block1"], statistics[f"stage{stage}_block1"]
        stride = 1 if stage == 1 else 2
        y = functional.relu(norm(conv(h, p["conv1"], stride), p["norm1"], s["norm1"]))
        y = norm(conv(y, p["conv2"]), p["norm2"], s["norm2"])
        if "shortcut" in p:
            h = norm(conv(h, p["shortcut"], stride), p["shortcut_norm"], s["shortcut_norm"])
        elif stride == 2:
            h = h[:, :, ::2, ::2]
            h = functional.pad(h, (0, 0, 0, 0, 0, y.shape[1] - h.shape[1]))
        h = functional.relu(y + h)
    head = params["head"]
    expected = (h.mean((2, 3)) @ torch.tensor(head["kernel"]) + torch.tensor(head["bias"])).numpy()
    got = np.asarray(jax.jit(model.apply)(variables, x))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
