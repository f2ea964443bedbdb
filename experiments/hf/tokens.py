"""Texts as token ids, and the windows of them that a checkpoint is calibrated and judged on.

Tokens come from the checkpoint's own `tokenizer.json`, read by the package `tokenizers` (extra `hf`), or from
a file of ids that another tokenizer has made. Nothing is downloaded.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.run.limits import FlagError, shown

HELD_OUT = 0.1
"""The share of a text, its end, that perplexity is measured on where no other text is given."""


class Windows(NamedTuple):
    """What a checkpoint is calibrated and judged on.

    Attributes:
      calibration: (samples, length) int32.
      held_out: (windows, length) int32, which no window of the calibration overlaps.
    """

    calibration: np.ndarray
    held_out: np.ndarray


def read(flag: str, path: str, checkpoint: str, vocabulary: int) -> np.ndarray:
    """Return the token ids of a file, int32 of shape (n,).

    A file `*.npy` holds ids. Any other is text if the checkpoint's folder has a `tokenizer.json`, which then
    makes the tokens, without special ones; and else whole numbers with white space between them.

    Args:
      flag: the flag that names the file, for messages.
      path: the file.
      checkpoint: the checkpoint's folder.
      vocabulary: the number of tokens that the network knows.

    Raises:
      FlagError: a file that is missing, empty or neither text nor ids, no tokenizer, ids that the network
        does not know.
    """
    file, tokenizer = Path(path), Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        raise FlagError(f"{flag}: there is no file {shown(path)}")
    if file.suffix == ".npy":
        ids = _from_npy(flag, file)
    elif tokenizer.is_file():
        ids = _tokenized(flag, file, tokenizer)
    else:
        ids = _from_numbers(flag, file, checkpoint)
    if not ids.size:
        raise FlagError(f"{flag}: {path} holds no token")
    if ids.min() < 0 or ids.max() >= vocabulary:
        wrong = ids[(ids < 0) | (ids >= vocabulary)]
        raise FlagError(
            f"{flag}: {path} has {len(wrong):,} token ids, such as {wrong[0]}, that the network does not "
            f"know: its ids are 0 to {vocabulary - 1}. Take the tokenizer that it was trained with"
        )
    return ids.astype(np.int32)


def _from_npy(flag: str, file: Path) -> np.ndarray:
    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FlagError(f"{flag}: {file} is no array of numpy ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise FlagError(
            f"{flag}: {file} must hold one row of whole numbers, got {ids.dtype} of shape {ids.shape}"
        )
    return ids


def _tokenized(flag: str, file: Path, tokenizer: Path) -> np.ndarray:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise FlagError(
            f"{flag}: to read {tokenizer} takes the package tokenizers: pip install 'jaxprune[hf]'. Or pass "
            "token ids, as a file *.npy"
        ) from None
    try:
        made = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # what the package raises is no subclass
        raise FlagError(f"{flag}: {tokenizer} cannot be read: {error}") from None
    return np.array(made.encode(_text(flag, file), add_special_tokens=False).ids, np.int64)


def _from_numbers(flag: str, file: Path, checkpoint: str) -> np.ndarray:
    words = _text(flag, file).split()
    try:
        return np.array([int(word) for word in words], np.int64)
    except (ValueError, OverflowError):
        raise FlagError(
            f"{flag}: {checkpoint} has no tokenizer.json, and {file} does not hold token ids. Put the "
            "checkpoint's tokenizer.json into its folder, or pass whole numbers: a file *.npy, or text with "
            "white space between them"
        ) from None


def _text(flag: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FlagError(f"{flag}: {file} is not text in UTF-8 ({error.reason} at {error.start})") from None


def windows(
    tokens: np.ndarray, others: np.ndarray | None, samples: int, length: int, seed: int, at_most: int
) -> Windows:
    """Draw the windows to calibrate on at random places, and cut the held-out text into others.

    Args:
      tokens: of the text.
      others: of the text to be judged on; None for the last tenth of `tokens`, or one window if that is more.
      samples: how many windows to calibrate on.
      length: of a window.
      seed: of their places.
      at_most: how many held-out windows, from the beginning.

    Raises:
      FlagError: a text that is too short.

    Example:
      >>> found = windows(np.arange(40), None, samples=3, length=4, seed=0, at_most=9)
      >>> bool(found.calibration.max() < 36), found.held_out.tolist()
      (True, [[36, 37, 38, 39]])
    """
    if others is None:
        held = max(length, int(HELD_OUT * len(tokens)))
        tokens, others = tokens[: max(0, len(tokens) - held)], tokens[-held:]
        if len(tokens) < length:
            raise FlagError(
                f"--text: it has {len(tokens) + len(others):,} tokens, and two windows of {length} are the "
                "least, one to calibrate on and one to be judged on: give a longer text, or a smaller "
                "--length, or another text as --eval-text"
            )
    for flag, text in (("--text", tokens), ("--eval-text", others)):
        if len(text) < length:
            raise FlagError(
                f"{flag}: it has {len(text):,} tokens, fewer than one window of {length}: give a longer "
                "text, or a smaller --length"
            )
    places = len(tokens) - length + 1
    if samples > places:
        raise FlagError(
            f"--samples: must be at most {places:,}, the places that the text has for windows of {length}; "
            f"got {samples}"
        )
    starts = np.random.default_rng(seed).choice(places, samples, replace=False)
    count = min(len(others) // length, at_most)
    return Windows(
        tokens[starts[:, None] + np.arange(length)].astype(np.int32),
        others[: count * length].reshape(count, length).astype(np.int32),
    )
