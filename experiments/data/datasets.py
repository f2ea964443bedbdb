"""The experiments' data sets, images and a text, whole in memory as uint8 numpy arrays.

A split is decoded once, with one call. An experiment then keeps it on the device and picks its
batches by index inside `jit`: orders of magnitude faster than a loader on images this small.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.data.prepare import (
    DataUnavailable,
    PathLike,
    import_tfds,
    make_builder,
    prepare,
    unavailable,
)
from experiments.run.limits import FlagError

NAMES = ("digits", "mnist", "cifar10")
__all__ = ["NAMES", "DataUnavailable", "Dataset", "Text", "explain_missing_data", "load", "load_shakespeare"]

_DIGITS_TEST = 360  # of 1797: a fifth
_DIGITS_SIDE = 8


class Dataset(NamedTuple):
    """Images and labels of one data set.

    To feed a network: `(x / 255 - mean) / std`.
    """

    name: str
    """"digits", "mnist" or "cifar10"."""
    x_train: np.ndarray
    """uint8 of shape (n, height, width, channels)."""
    y_train: np.ndarray
    """int32 of shape (n,), 0 to 9."""
    x_test: np.ndarray
    """As x_train."""
    y_test: np.ndarray
    """As y_train."""
    mean: float
    """Mean of all pixels of the whole training split, scaled to 0..1."""
    std: float
    """Standard deviation of the same."""
    note: str
    """A sentence to print beside every figure made with these data."""


class Text(NamedTuple):
    """A text as numbers, one per character."""

    train: np.ndarray
    """uint8 of shape (n,): places in the vocabulary."""
    validation: np.ndarray
    """As train; the text goes on in it."""
    vocabulary: str
    """The characters of the whole training text, in order."""
    note: str
    """A name to print beside every figure made with this text."""


class _Images(NamedTuple):
    """What is known beforehand of a data set that TFDS holds."""

    title: str
    size: int
    """Height and width, in pixels."""
    mean: float
    std: float


_TFDS = {
    "mnist": _Images("MNIST", 28, 0.1307, 0.3081),
    "cifar10": _Images("CIFAR-10", 32, 0.4733, 0.2504),
}


@contextlib.contextmanager
def explain_missing_data() -> Iterator[None]:
    """End a command with the message alone, and no traceback, where its data cannot be had.

    Also where its flags do not go together.
    """
    try:
        yield
    except (DataUnavailable, FlagError) as error:
        raise SystemExit(str(error)) from None


def load(
    name: str,
    *,
    size: int | None = None,
    train: int | None = None,
    test: int | None = None,
    data_dir: PathLike | None = None,
) -> Dataset:
    """Load a data set; prepares it first when it is not on the disk and there is a network.

    Args:
        name: "digits" (in scikit-learn's wheel: never a download), "mnist" or "cifar10".
        size: height and width in pixels. Digits are 8x8 and may be enlarged to any size; of the
            others only the size they have, which is the default, is allowed.
        train: how many of the first training examples to decode; default all.
        test: how many of the first test examples to decode; default all.
        data_dir: the folder that holds TFDS' prepared data sets; default `$TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`. Unused by digits.

    Returns:
        The Dataset.

    Raises:
        ValueError: an argument is out of its range.
        ModuleNotFoundError: a package of the `experiments` extra is missing.
        DataUnavailable: not prepared, and no network (or no right to write) to prepare it.
    """
    if name not in NAMES:
        raise ValueError(f"got name={name!r}; it must be one of {NAMES}")
    if name == "digits":
        return _load_digits(size, train, test)
    native = _TFDS[name].size
    if size not in (None, native):
        raise ValueError(
            f"got size={size} for {name}, whose images are {native}x{native}; leave size out, or "
            "use name='digits', which can be enlarged"
        )
    return _load_tfds(name, train, test, data_dir)


def _check_count(split: str, count: int | None, available: int) -> int:
    """Return how many examples of the split to give."""
    if count is None:
        return available
    if not 1 <= count <= available:
        raise FlagError(
            f"got {split}={count}; the {split} split holds {available} examples, so it must be "
            f"1 to {available}, or None for all (--{split}-size)"
        )
    return count


# --- digits --------------------------------------------------------------------------------------


def _load_digits(size: int | None, train: int | None, test: int | None) -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the module {error.name} is not installed, and the digits come with scikit-learn. "
            "Install it with: pip install 'jaxprune[experiments]'",
            name=error.name,
        ) from error

    side = _DIGITS_SIDE if size is None else size
    if side < _DIGITS_SIDE:
        raise ValueError(f"got size={size}; digits are 8x8 and can only be enlarged: size >= 8")
    bunch: Any = load_digits()
    images = np.rint(_enlarge(bunch.images * (255 / 16), side)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # In the file one writer's digits follow another's: without a shuffle, the test digits would
    # come from other hands. The seed is fixed, so that all experiments split alike.
    rows: Any = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_TEST, stratify=labels, random_state=0
    )
    in_train, in_test = rows
    pixels = images[in_train] / 255
    note = "scikit-learn's 8x8 digits"
    if side != _DIGITS_SIDE:
        note += f", enlarged to {side}x{side}"
    in_train = in_train[: _check_count("train", train, len(in_train))]
    in_test = in_test[: _check_count("test", test, len(in_test))]
    return Dataset(
        name="digits",
        x_train=images[in_train],
        y_train=labels[in_train],
        x_test=images[in_test],
        y_test=labels[in_test],
        mean=float(pixels.mean()),
        std=float(pixels.std()),
        note=note,
    )


def _enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarge (n, side, side) to (n, size, size) bilinearly, keeping the dtype.

    Separable, hence a matrix on either side: W X W^T.
    """
    weights = _bilinear_weights(images.shape[-1], size)
    return weights @ images @ weights.T


def _bilinear_weights(old: int, new: int) -> np.ndarray:
    """Return the (new, old) matrix that interpolates `old` samples linearly at `new` places.

    Sample i stands for the middle of the i-th of `old` equal cells, so place j lies at
    (j + 1/2) old / new - 1/2, counted in samples; beyond the outermost samples the edge goes on.
    With new == old it is the identity.
    """
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


# --- MNIST and CIFAR-10 --------------------------------------------------------------------------


def _load_tfds(name: str, train: int | None, test: int | None, data_dir: PathLike | None) -> Dataset:
    builder = _prepared_builder(name, data_dir)
    x_train, y_train, ids = _read_split(builder, "train", train)
    x_test, y_test, _ = _read_split(builder, "test", test)
    known = _TFDS[name]
    return Dataset(name, x_train, y_train, x_test, y_test, known.mean, known.std, _note(known.title, ids))


def _prepared_builder(name: str, data_dir: PathLike | None) -> Any:
    """Return TFDS' builder of a data set that is on the disk, in a format readable without TensorFlow."""
    tfds = import_tfds()
    builder = make_builder(tfds, name, data_dir)
    if not builder.is_prepared():
        try:
            prepare(name, data_dir)
        except OSError as error:  # no right to write, disk full, requests' errors half-way
            problem = f"is not prepared, and could not be ({type(error).__name__}: {error})"
            raise unavailable(name, builder.data_dir, problem) from error
        builder = make_builder(tfds, name, data_dir)
    formats = {str(f.value) for f in builder.info.available_file_formats()}
    if "array_record" not in formats:
        problem = f"is prepared as {sorted(formats)}, which takes TensorFlow to read"
        raise unavailable(name, builder.data_dir, problem)
    return builder


def _read_split(builder: Any, split: str, count: int | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the first `count` examples: images (n, h, w, c), labels (n,), and their ids, if any."""
    count = _check_count(split, count, builder.info.splits[split].num_examples)
    source = builder.as_data_source(f"{split}[:{count}]")
    examples = source.__getitems__(range(count))  # one call: several times faster than a loop
    images = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    ids = [example["id"].decode() for example in examples if "id" in example]
    return images, labels, ids


def _note(title: str, ids: list[str]) -> str:
    """Return the note; it warns when the ids are `<split>_<class>_<rank>`, not TFDS' `train_00000`."""
    # Such a folder was made from the class folders of a collection of JPEG files.
    if ids and all(re.fullmatch(r"(train|test)_[a-z]+_\d+", i) for i in ids):
        return f"{title} from JPEG files: not comparable with published accuracies"
    return title


# --- Tiny Shakespeare ----------------------------------------------------------------------------


def load_shakespeare(
    *, train: int | None = None, validation: int | None = None, data_dir: PathLike | None = None
) -> Text:
    """Load Tiny Shakespeare, 1,003,854 and 55,770 characters, or the first so many of each; see `load`."""
    builder = _prepared_builder("tiny_shakespeare", data_dir)
    whole = _characters(builder, "train")
    vocabulary = np.unique(whole)

    def ids(split: str, characters: np.ndarray, count: int | None) -> np.ndarray:
        characters = characters[: _check_count(split, count, len(characters))]
        places = np.searchsorted(vocabulary, characters).clip(max=len(vocabulary) - 1)
        if (vocabulary[places] != characters).any():
            unknown = set(characters.tolist()) - set(vocabulary.tolist())
            raise ValueError(
                f"the {split} text has characters {sorted(unknown)} that the training text lacks"
            )
        return places.astype(np.uint8)

    return Text(
        ids("train", whole, train),
        ids("validation", _characters(builder, "validation"), validation),
        vocabulary.tobytes().decode("ascii"),
        "Tiny Shakespeare",
    )


def _characters(builder: Any, split: str) -> np.ndarray:
    """Return the ASCII codes of a split, which is one example."""
    (example,) = builder.as_data_source(split).__getitems__([0])
    return np.frombuffer(example["text"], np.uint8)
