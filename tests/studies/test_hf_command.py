"""`python -m experiments.one_shot hf`: checkpoints pruned, made smaller and written; what is refused."""

import contextlib
import io
import json
import sys
from functools import partial

import jax
import numpy as np
import pytest

import jaxprune as jp
from experiments.data import datasets
from experiments.hf import methods, removal, small, tokens
from experiments.hf.gpt2 import GPT2
from experiments.hf.llama import LLAMA
from experiments.hf.opened import Model, open_model, tree_of
from experiments.one_shot import __main__ as one_shot
from tests.studies.outcomes import check_width

LETTERS = "abcdefghij\n"
ABOUT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 8,
    "tie_word_embeddings": False,
    "vocab_size": len(LETTERS),
}
FLAGS = ["--samples", "12", "--batch", "4"]
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with random weights, large enough for every layer to matter, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("made")
    params = small.first_params(LLAMA.configure(ABOUT), jax.random.key(0))
    small.write(folder, jax.tree.map(lambda leaf: 4 * leaf, params), ABOUT, LETTERS)
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("".join(rng.choice(list(LETTERS), 400)))
    return folder


def run(checkpoint, out, *flags, text=None):
    text = str(checkpoint / "text.txt") if text is None else str(text)
    given = {"--checkpoint": str(checkpoint), "--text": text, "--out": str(out)}
    one_shot.main(["hf", *(word for pair in given.items() for word in pair), *FLAGS, *flags])


def refusal(capsys, *arguments, **keywords):
    """Return the one sentence with which the command ends."""
    with pytest.raises(SystemExit) as error:
        run(*arguments, **keywords)
    said = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
    assert "\n" not in said.strip() and "Traceback" not in said
    return said


def held_out(checkpoint):
    """The last tenth of the text in windows of 8, by hand: the ids of letters are their places."""
    ids = [LETTERS.index(letter) for letter in (checkpoint / "text.txt").read_text()]
    return np.array(ids[360:]).reshape(5, 8)


def perplexity(folder, windows):
    """That of what was written, in numpy from its logits."""
    model = open_model(str(folder))
    logits = np.asarray(model.apply_fn(model.params, windows), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(-np.take_along_axis(log_p, windows[:, 1:, None], -1).mean())


def reported(text):
    """The perplexities by stage of what the command has printed."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: float(row[1]) for row in rows if row and row[0] in ("dense", "pruned", "recovered")}


def by_path(folder):
    params = open_model(str(folder)).params
    return dict(zip(jp.leaf_paths(params), map(np.asarray, jax.tree.leaves(params)), strict=True))


def check_others_are_as_they_were(checkpoint, out):
    """All that is no matrix of a layer is the same to the byte, and so are the other files."""
    before, after = by_path(checkpoint), by_path(out)
    assert before.keys() == after.keys()
    others = [path for path in before if path.split("/")[-2] not in MATRICES]
    assert len(others) == 2 * 2 + 3
    for path in others:
        assert before[path].tobytes() == after[path].tobytes()
    for name in ("tokenizer.json", "text.txt"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()


def matrices(folder):
    return {path: leaf for path, leaf in by_path(folder).items() if path.split("/")[-2] in MATRICES}


ENTRIES = ["--method", "wanda", "--sparsity", "0.25"]


@pytest.fixture(scope="module")
def entries(checkpoint, tmp_path_factory):
    """The folder with a quarter of the entries zero, and what the command has printed."""
    out, said = tmp_path_factory.mktemp("entries") / "out", io.StringIO()
    with contextlib.redirect_stdout(said):
        run(checkpoint, out, *ENTRIES)
    return out, said.getvalue()


def test_entries(checkpoint, entries):
    out, said = entries
    for leaf in matrices(out).values():
        zeros = (leaf == 0).sum(axis=1)  # Wanda compares the inputs of each output
        np.testing.assert_array_equal(zeros, leaf.shape[1] // 4)
    check_others_are_as_they_were(checkpoint, out)
    windows, found = held_out(checkpoint), reported(said)
    np.testing.assert_allclose(found["dense"], perplexity(checkpoint, windows), rtol=1e-4)
    np.testing.assert_allclose(found["pruned"], perplexity(out, windows), rtol=1e-4)
    check_width(said, out.parents[1])


def test_two_of_four_and_recover(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, out, "--structure=2:4", "--samples=200", "--recover=150", "--recover-lr=3e-4")
    said = capsys.readouterr().out
    for leaf in matrices(out).values():
        np.testing.assert_array_equal((leaf.reshape(-1, 4) == 0).sum(axis=1), 2)
    windows, found = held_out(checkpoint), reported(said)
    np.testing.assert_allclose(found["recovered"], perplexity(out, windows), rtol=1e-4)
    (line,) = [line for line in said.splitlines() if line.startswith("held-out loss of the network")]
    before, after = (float(word) for word in line.split(": ")[1].split(" -> "))
    assert after < before
    check_width(said, tmp_path.parent)


def test_hidden_units_and_heads_are_taken_out(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, out, "--hidden-units=0.5", "--heads=0.5")
    said = capsys.readouterr().out
    about = json.loads((out / "config.json").read_text())
    changed = {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    assert about == ABOUT | changed
    shapes = {path: leaf.shape for path, leaf in by_path(out).items()}
    for number in range(2):
        assert shapes[f"layers/{number}/key/weight"] == (6, 16)
        assert shapes[f"layers/{number}/out/weight"] == (16, 12)
        assert shapes[f"layers/{number}/down/weight"] == (16, 12)
    # What makes a unit stays as it was: rows of the dense matrices, whole key heads with their two queries.
    before, after = by_path(checkpoint), by_path(out)
    keys = before["layers/0/key/weight"].reshape(2, 6, 16)
    head = next(i for i in range(2) if (keys[i] == after["layers/0/key/weight"]).all())
    queries = before["layers/0/query/weight"].reshape(2, 12, 16)[head]
    np.testing.assert_array_equal(after["layers/0/query/weight"], queries)
    # The perplexity reported is that of the masked network; the folder holds the small one.
    np.testing.assert_allclose(reported(said)["pruned"], perplexity(out, held_out(checkpoint)), rtol=1e-4)
    assert float(said.split("at most ")[1]) < 1e-4
    check_width(said, tmp_path.parent)


def test_layers_are_taken_out(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, out, "--layers", "1")
    said = capsys.readouterr().out
    about = json.loads((out / "config.json").read_text())
    assert about == ABOUT | {"num_hidden_layers": 1}
    rows = [line.split() for line in said.splitlines() if line.strip()[:1].isdigit()]
    influence = [float(row[1]) for row in rows if len(row) in (2, 4) and row[0].isdigit()]
    (kept,) = [int(row[0]) for row in rows if len(row) == 2 and row[0].isdigit()]
    assert len(influence) == 2 and kept == int(np.argmax(influence))
    before, after = by_path(checkpoint), by_path(out)
    for path, leaf in after.items():
        assert leaf.tobytes() == before[path.replace("layers/0", f"layers/{kept}")].tobytes()
    np.testing.assert_allclose(reported(said)["pruned"], perplexity(out, held_out(checkpoint)), rtol=1e-4)


def test_a_stopped_run_resumes_to_the_same_bytes(checkpoint, entries, tmp_path, monkeypatch, capsys):
    flags = [*ENTRIES, "--checkpoint-dir", str(tmp_path / "layers")]
    solved = jp.prune_layers

    def stopping(*arguments, progress, **keywords):
        def stop(row):
            progress(row)
            if row.name.startswith("layers/1/query"):
                raise KeyboardInterrupt

        return solved(*arguments, progress=stop, **keywords)

    monkeypatch.setattr(methods.jp, "prune_layers", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "out", *flags)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    layers = sorted((tmp_path / "layers").glob("*.npz"))
    times = [file.stat().st_mtime_ns for file in layers]
    assert len(layers) == 7 + 1
    run(checkpoint, tmp_path / "out", *flags)
    assert [file.stat().st_mtime_ns for file in layers] == times
    files = [(folder / "model.safetensors").read_bytes() for folder in (entries[0], tmp_path / "out")]
    assert files[0] == files[1]
    said = refusal(capsys, checkpoint, tmp_path / "other", *flags, "--sparsity", "0.3")
    assert "is of another run: it differs in plan" in said


def test_ids_need_no_tokenizer(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'jaxprune[hf]'. Or pass token ids" in refusal(capsys, checkpoint, tmp_path / "out")
    ids = np.array([LETTERS.index(letter) for letter in (checkpoint / "text.txt").read_text()])
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    read = tokens.read("--text", str(tmp_path / "ids.npy"), str(checkpoint), len(LETTERS))
    np.testing.assert_array_equal(read, ids)
    (tmp_path / "ids.txt").write_text(" \n".join(map(str, ids)))
    read = tokens.read("--text", str(tmp_path / "ids.txt"), str(tmp_path), len(LETTERS))
    np.testing.assert_array_equal(read, ids)


def test_the_tokenizer_reads_text_as_it_stands(checkpoint):
    text = (checkpoint / "text.txt").read_text()
    read = tokens.read("--text", str(checkpoint / "text.txt"), str(checkpoint), len(LETTERS))
    assert "".join(LETTERS[number] for number in read) == text


def test_held_out_windows_are_not_calibrated_on():
    text = np.arange(1000)
    found = tokens.windows(text, None, samples=50, length=8, seed=3, at_most=5)
    assert found.calibration.shape == (50, 8) and found.calibration.max() < 900
    np.testing.assert_array_equal(np.diff(found.calibration), 1)
    assert len(np.unique(found.calibration[:, 0])) == 50
    np.testing.assert_array_equal(found.held_out, 900 + np.arange(40).reshape(5, 8))
    again, other = (tokens.windows(text, None, 50, 8, seed, 5).calibration for seed in (3, 4))
    np.testing.assert_array_equal(found.calibration, again)
    assert not np.array_equal(again, other)
    beside = tokens.windows(text, text[:16] + 5000, 50, 8, 3, 5)
    np.testing.assert_array_equal(beside.held_out, 5000 + np.arange(16).reshape(2, 8))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sparsity 1", "--sparsity: must be above 0 and below 1, got 1"),
        ("--sparsity 0.5 --structure 2:4", "--sparsity: is 0.5 with --structure 2:4; leave it out"),
        ("--structure 4:2", "--structure: of each 2 entries 1 to 1 stay, got 4"),
        ("--structure half", "--structure: must be entries or n:m, such as 2:4; got half"),
        ("--structure 2:5", "sums over an axis of size 24, which 5 does not divide"),
        ("--heads 0.5 --method alps", "--method: is of entries, and does not go with --hidden-units"),
        ("--heads 0.5 --structure 2:4", "--structure: does not go with --hidden-units"),
        ("--heads 0.1", "--heads: 0.1 of the 2 of a layer is none of them"),
        ("--hidden-units 0.99", "--hidden-units: 0.99 of the 24 of a layer is all of them"),
        ("--layers 2", "--layers: must be below 2, of which one stays; got 2"),
        ("--layers 1 --checkpoint-dir x", "--checkpoint-dir: no layer is solved"),
        ("--recover-by-block", "--recover-by-block: takes --recover"),
        ("--recover 5 --samples 7", "--recover: takes at least two batches of 4 windows; got --samples 7"),
        ("--length 9", "--length: must be at most 8, the network's context; got 9"),
        ("--samples 1000", "--samples: must be at most 353, the places that the text has"),
        ("--eval-text none.txt", "--eval-text: there is no file 'none.txt'"),
        ("--checkpoint none", "none"),
    ],
)
def test_flags_that_are_refused(checkpoint, tmp_path, capsys, flags, said):
    assert said in refusal(capsys, checkpoint, tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_texts_that_are_refused(checkpoint, tmp_path, capsys):
    def said(name, content, checkpoint=checkpoint):
        file = tmp_path / name
        file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content)
        return refusal(capsys, checkpoint, tmp_path / "out", text=file)

    assert "it has 9 tokens, and two windows of 8 are the least" in said("short.txt", b"abcabcabc")
    assert "holds no token" in said("empty.txt", b"")
    assert "is not text in UTF-8" in said("bytes.txt", b"\xff\xfe")
    assert "is no array of numpy" in said("broken.npy", b"abc")
    assert "one row of whole numbers, got float64 of shape (3,)" in said("floats.npy", np.ones(3))
    assert "1 token ids, such as 11, that the network does not know: its ids are 0 to 10" in said(
        "beyond.npy", np.append(np.zeros(30, int), 11)
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    assert "has no tokenizer.json, and" in said("words.txt", b"some words", bare)
    (bare / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in said("words.txt", b"some words", bare)


def test_folders_that_are_refused(checkpoint, tmp_path, capsys):
    assert "is the checkpoint itself" in refusal(capsys, checkpoint, checkpoint)
    assert "exists already" in refusal(capsys, checkpoint, tmp_path)


def test_what_config_json_cannot_say_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch, capsys):
    about = {
        "model_type": "gpt2",
        "vocab_size": 11,
        "n_embd": 16,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 8,
    }
    config = GPT2.configure(about)
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in GPT2.shapes(config).items()}
    gpt2 = Model(
        checkpoint,
        GPT2,
        about,
        config,
        tree_of(shapes, config.depth),
        partial(GPT2.apply, config),
        GPT2.names(config),
        None,
        {},
    )
    asked = removal.plan(gpt2, 0.5, 0.0, 1)
    assert {group.units for group in asked.groups} == {4 * 16} and asked.layers == 1
    monkeypatch.setattr("experiments.hf.command.open_model", lambda folder: gpt2)
    said = refusal(capsys, checkpoint, tmp_path / "out", "--heads=0.5", text=tmp_path / "none.txt")
    assert "2 heads of 4 cannot be said by GPT-2's config.json" in said


def test_the_small_decoder_learns(tmp_path, monkeypatch, capsys):
    text = np.tile(np.arange(5, dtype=np.uint8), 200)
    found = datasets.Text(text, text[:100], "abcde", "counting")
    monkeypatch.setattr(datasets, "load_shakespeare", lambda train: found)
    monkeypatch.setattr(small, "ABOUT", ABOUT | {"num_hidden_layers": 1})
    small.main(["--out", str(tmp_path / "out"), "--steps=40", "--batch=8", "--lr=0.02"])
    assert "counting" in capsys.readouterr().out
    assert (tmp_path / "out" / "validation.txt").read_text() == "abcde" * 20
    assert perplexity(tmp_path / "out", np.array([[0, 1, 2, 3, 4, 0, 1, 2]])) < 1.5
