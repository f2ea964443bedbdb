"""The distillation study in small, and what it is built of."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tqdm import tqdm

import jaxprune as jp
from experiments import distillation
from experiments.data import datasets
from experiments.networks.small import MLP
from experiments.training import distill, loops
from experiments.training.distill import Mix
from tests.studies.outcomes import check_width, is_png, read


def select(lines, **keys):
    return [line for line in lines if all(line.get(key) == value for key, value in keys.items())]


def test_only_one_convolution_and_linear_layer_have_the_students_parameters():
    # One channel in, k out, windows s x s at all places of a 28 x 28 image; biases.
    found = [
        (k, s)
        for k in range(1, 200)
        for s in range(1, 29)
        if k * (s * s + 1) + 10 * k * (29 - s) ** 2 + 10 == 18811
    ]
    assert found == [(3, 4)]
    params = distill.Student().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert params["conv"]["kernel"].shape == (4, 4, 1, 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 18811


@pytest.mark.parametrize("relu", [False, True])
def test_the_articles_student_is_linear_in_the_pixels(relu):
    model = distill.Student(relu=relu)
    a, b = jax.random.normal(jax.random.key(1), (2, 1, 28, 28, 1))
    stack = jnp.concatenate([a, b, a + b, jnp.zeros_like(a)])
    variables = model.init(jax.random.key(0), stack)
    rows = np.asarray(jax.jit(model.apply)(variables, stack), np.float64)
    rows -= rows.mean(1, keepdims=True)  # of log-probabilities: logits, up to what all classes share
    bent = np.abs(rows[0] + rows[1] - rows[2] - rows[3]).max()
    assert (bent > 0.01) == relu


@pytest.fixture(scope="module")
def digits():
    return loops.splits(datasets.load("digits", train=130, test=50))


def test_labels_alone_are_learned_as_in_the_other_studies(digits):
    train, _ = digits
    model, index = MLP(widths=(16, 10)), jnp.arange(60)
    taught = distill.Taught(train, jax.random.normal(jax.random.key(2), (130, 10)), distill.LABELS)
    params = jax.jit(model.init)(jax.random.key(0), train.batch(index)[0])["params"]

    @jax.jit
    def both(params):
        (x, lesson), (_, y) = taught.batch(index), train.batch(index)
        key = jax.random.key(1)
        return distill.losses(model, params, x, lesson, key), loops.nll(model, params, x, y, key)

    ours, usual = both(params)
    np.testing.assert_allclose(ours, usual, rtol=1e-5)


def test_a_student_comes_near_its_teacher_or_stays_there(digits):
    train, _ = digits
    model, keys, bar = MLP(widths=(16, 10)), loops.seed_keys((0, 1), 0), tqdm(disable=True)
    rng = np.random.default_rng(0)

    def layer(inputs, outputs):  # for each of two seeds
        kernel = rng.normal(0, 0.2, (2, inputs, outputs)).astype(np.float32)
        return {"kernel": kernel, "bias": np.zeros((2, outputs), np.float32)}

    params = {"fc1": layer(64, 16), "fc2": layer(16, 10)}
    masks = distill.prune(params, jp.ones_masks(params), 0.5)
    fit = distill.fitter(model, optax.adam(1e-2), 60, train)
    answer = loops.answerer(model, train, chunk=50)
    teacher = fit(params, masks, keys, 10, bar)
    jp.check_pruned(teacher, masks)

    # The teacher's answers are its log-probabilities, image by image.
    answers = answer(teacher)
    assert answers.shape == (2, 130, 10)
    x, _ = train.batch(jnp.arange(130))
    of_second = jax.jit(model.apply)({"params": jax.tree.map(operator.itemgetter(1), teacher)}, x)
    np.testing.assert_allclose(answers[1], of_second, rtol=1e-4, atol=1e-5)

    mix = Mix(temperature=4.0, alpha=1.0)
    learned, same = (fit(start, masks, keys, 20, bar, answers, mix) for start in (params, teacher))
    at_first, gap, stayed = (np.abs(answer(each) - answers).mean() for each in (params, learned, same))
    assert gap < at_first / 2
    assert stayed < gap / 2


def run_small(folder, flags):
    distillation.main(["--train-size", "400", "--test-size", "100", *flags.split(), "--out", str(folder)])
    lines = read(folder)
    for line in lines:
        assert line["study"] == "distillation"
        assert line["config"]["alpha"] == 0.9
        assert 0 <= line["accuracy"] <= 1
    return lines


def test_the_students_true_ratios(tmp_path, capsys, monkeypatch):
    # The other student has the same numbers.
    monkeypatch.setattr(distillation, "STUDENTS", {"conv-linear": False})
    lines = run_small(tmp_path, "--parts student --seeds 0 --teacher-epochs 1 --student-epochs 2")
    text = capsys.readouterr().out
    check_width(text, tmp_path)
    methods = ["labels", "labels", "labels, 2x rate", "labels + T=1", "mix"]
    assert [line["method"] for line in lines] == methods
    assert [line["network"] for line in lines] == ["LeNet"] + 4 * ["conv-linear"]
    sizes = [(line["parameters"], line["macs"]) for line in lines]
    assert sizes == [(21840, 480500)] + 4 * [(18811, 25 * 25 * 16 * 3 + 1875 * 10)]
    for line in lines:
        assert 4 * line["parameters"] * 0.85 < line["file_bytes"] < 4 * line["parameters"] + 3000
    assert "(1/1.16)" in text
    assert "(1/9.86)" in text
    assert "pruned" not in text


def test_few_images_and_pruning(tmp_path, capsys):
    flags = (
        "--parts few,pruning --seeds 0,1 --epochs 30 --few 60 --few-epochs 100 --tune-epochs 2 "
        "--few-tune-epochs 2 --temperatures 1,4 --sparsities 0.9,0.5"
    )
    lines = run_small(tmp_path, flags)
    text = capsys.readouterr().out
    check_width(text, tmp_path)
    assert "student" not in text

    plain, taught = select(lines, part="dense", images="few"), select(lines, part="few", temperature=4.0)
    assert [line["train_images"] for line in (*plain, *taught)] == [60] * 4
    gain = np.mean([a["accuracy"] - b["accuracy"] for a, b in zip(taught, plain, strict=True)])
    assert gain > 0.01
    assert f"{100 * gain:.2f} +- " in text

    weights = 64 * 300 + 300 * 100 + 100 * 10
    pruned = select(lines, part="pruning")
    assert len(pruned) == 2 * 2 * (2 + 3)
    for line in pruned:
        assert line["kept"] == 410 + weights - round(line["sparsity"] * weights)
        assert line["achieved"] == pytest.approx(line["sparsity"], abs=1e-5)
        assert sum(kept for kept, _ in line["layers"].values()) == line["kept"] - 410
    # Every way begins with the same network, loses the same weights first, and has the same epochs.
    for images in ("all", "few"):
        first = select(pruned, images=images, sparsity=0.5, seed=1)
        assert len({line["accuracy_before_tuning"] for line in first}) == 1
        assert len({line["epochs"] for line in first}) == 1
        assert is_png(tmp_path / f"pruning-{images}.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("students",)}, "--parts: must be one of student, few, pruning; got 'students'"),
        ({"temperatures": (1.0, 0.0)}, "--temperatures: must be above 0, got 0.0"),
        ({"alpha": 1.1}, "--alpha: must be 0 or more and at most 1, got 1.1"),
        ({"parts": ("few",), "few": 51, "train_size": 50}, "few must be 1 to 50 images, got 51"),
    ],
    ids=range(4),
)
def test_settings_that_are_refused_before_anything_is_trained(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distillation.run(distillation.Config(**settings, out=str(tmp_path)))
    assert not (tmp_path / "results.jsonl").exists() or not read(tmp_path)
