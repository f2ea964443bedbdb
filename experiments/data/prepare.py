"""Writes MNIST, CIFAR-10 and Tiny Shakespeare as TFDS `array_record` folders, without TensorFlow.

`download_and_prepare()` of TFDS 4.9.10 needs TensorFlow for these data sets even though reading
them back does not: it downloads with plain Python, but opens the archives with `tf.io.gfile` and
encodes the images with a TensorFlow graph. So the genuine builder is taken (its name, version,
features, checksums, shuffling and file layout stay TFDS' own) and only its `_split_generators` is
replaced, on the instance, by one that parses the archives with the standard library and yields
PIL images, or text.

As a command:  python -m experiments.data.prepare mnist [--data-dir FOLDER]
"""

import argparse
import gzip
import importlib
import os
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]
Download = Callable[[Mapping[str, str]], Mapping[str, PathLike]]
"""{key: url} -> {key: path of the downloaded file}."""

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# The very strings TFDS registers checksums under: its download manager looks them up by URL.
URLS: dict[str, dict[str, str]] = {
    "mnist": {
        "train_images": _MNIST + "train-images-idx3-ubyte.gz",
        "train_labels": _MNIST + "train-labels-idx1-ubyte.gz",
        "test_images": _MNIST + "t10k-images-idx3-ubyte.gz",
        "test_labels": _MNIST + "t10k-labels-idx1-ubyte.gz",
    },
    "cifar10": {"archive": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"},
    "tiny_shakespeare": {
        "text": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    },
}
_SPLITS = ("train", "test")
_CIFAR_FOLDER = "cifar-10-batches-bin/"
_CIFAR_BATCHES = {
    "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["test_batch.bin"],
}
_CIFAR_NAMES = "batches.meta.txt"
_CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes
_NUM_CLASSES = 10
_PROBE_SECONDS = 6.0


class DataUnavailable(RuntimeError):  # noqa: N818 - it says what is so, as StopIteration does
    """A data set is neither prepared here nor to be had from the network now."""


def import_tfds(*also: str) -> Any:
    """Return the `tensorflow_datasets` module, with everything it needs and does not declare, and `also`.

    Raises:
        ModuleNotFoundError: naming what is missing and the extra that installs it.
    """
    # importlib_resources: TFDS imports it on every Python but declares it for 3.8 only.
    # array_record: the file format; TFDS declares it on Linux only.
    for module in ("importlib_resources", "array_record", *also, "tensorflow_datasets"):
        _import(module)
    if not any(_importable(module) for module in ("cv2", "PIL")):
        raise ModuleNotFoundError(_missing("cv2 (opencv-python-headless) or PIL (pillow)"))
    return importlib.import_module("tensorflow_datasets")


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing(error.name or module), name=error.name) from error


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _missing(what: str) -> str:
    return (
        f"the module {what} is not installed, and the experiments' data sets need it. "
        "Install it with: pip install 'jaxprune[experiments]'"
    )


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a data set this module can prepare."""
    if name not in URLS:
        raise ValueError(f"got name={name!r}; it must be one of {sorted(URLS)}")


def make_builder(tfds: Any, name: str, data_dir: PathLike | None) -> Any:
    """Return TFDS' own builder of `name` in `data_dir`, else in $TFDS_DATA_DIR, else in TFDS' default."""
    # TFDS reads the variable when it is first imported; read here, it counts whenever it is set.
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    return tfds.builder(name, data_dir=None if folder is None else os.path.expanduser(folder))


def prepare(name: str, data_dir: PathLike | None = None, download: Download | None = None) -> str:
    """Write data set `name` as a TFDS array_record folder, or keeps the one already there.

    Args:
        name: "mnist", "cifar10" or "tiny_shakespeare".
        data_dir: the folder that holds the data sets; default `$TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`.
        download: maps {key: url} to {key: local path} of the official archives, of any number of
            examples. Default: TFDS' download manager, which keeps what it downloads in
            `<data_dir>/downloads` and compares its SHA-256 with the recorded one. Archives from
            a `download` of one's own are checked for their format only.

    Returns:
        The data set's folder, `<data_dir>/<name>/<version>`.

    Raises:
        ModuleNotFoundError: a package of the `experiments` extra is missing.
        DataUnavailable: the default download is wanted, and its host does not answer.
        ValueError: an archive is not what it should be; nothing is written then.
        FileExistsError: something that is not a prepared data set is in the way.
    """
    check_name(name)
    tfds = import_tfds("PIL.Image")
    builder = make_builder(tfds, name, data_dir)
    if builder.is_prepared():
        return str(builder.data_dir)
    if os.path.exists(builder.data_dir):
        # TFDS would take any folder of this name for a finished one and do nothing.
        raise FileExistsError(
            f"the folder {builder.data_dir} exists but holds no prepared data set (it has no "
            "dataset_info.json). Delete it, or give another data_dir"
        )
    if download is None:
        _require_network(name, builder)
    builder._split_generators = _split_generators(name, builder, download)
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    return str(builder.data_dir)


def _split_generators(name: str, builder: Any, download: Download | None) -> Callable[[Any], Any]:
    """Return what takes the place of the builder's own method: dl_manager -> {split: examples}."""

    def split_generators(dl_manager: Any) -> dict[str, Iterator[tuple[int | str, dict[str, Any]]]]:
        paths = (download or dl_manager.download)(URLS[name])
        if name == "tiny_shakespeare":
            texts = read_shakespeare(paths["text"])
            return {split: iter([(split, {"text": text})]) for split, text in texts.items()}
        if name == "mnist":
            return {split: _mnist_examples(*_mnist_arrays(paths, split)) for split in _SPLITS}
        class_names, arrays = read_cifar_tar(paths["archive"])
        builder.info.features["label"].names = class_names
        return {split: _cifar_examples(split, *arrays[split]) for split in _SPLITS}

    return split_generators


# --- MNIST ---------------------------------------------------------------------------------------


def read_idx(path: PathLike, ndim: int) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes with `ndim` axes.

    The format: two zero bytes, 8 (unsigned byte), the number of axes, every axis' size as a
    big-endian 32-bit integer, then the entries in C order.

    Raises:
        ValueError: the file is no such file, or is longer or shorter than it says.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}. Download it again") from error
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(
            f"{path} starts with the bytes {content[:4].hex()} and has {len(content)} in all; an "
            f"IDX file of unsigned bytes with {ndim} axes starts with "
            f"{bytes([0, 0, 8, ndim]).hex()} and has at least {start}. Download it again"
        )
    shape: tuple[int, ...] = struct.unpack(f">{ndim}I", content[4:start])
    # Python integers: a damaged header's sizes may multiply to more than 64 bits hold.
    expected = start + int(np.prod(np.array(shape, dtype=object)))
    if len(content) != expected:
        raise ValueError(
            f"{path} holds {len(content)} bytes, but an IDX file of shape {shape} holds "
            f"{expected}. Download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _mnist_arrays(paths: Mapping[str, PathLike], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (images (n, 28, 28), labels (n,)), both uint8."""
    images_path, labels_path = paths[f"{split}_images"], paths[f"{split}_labels"]
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape != (len(labels), 28, 28):
        raise ValueError(
            f"{images_path} holds images of shape {images.shape} and {labels_path} {len(labels)} "
            f"labels; images of shape ({len(labels)}, 28, 28) are expected. Download both again"
        )
    _check_labels(labels, labels_path)
    return images, labels


def _mnist_examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield TFDS' examples. The key is the index: TFDS shuffles by it, so its order comes out too."""
    from PIL import Image

    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": Image.fromarray(image), "label": int(label)}


# --- CIFAR-10 ------------------------------------------------------------------------------------


def read_cifar_tar(
    path: PathLike,
) -> tuple[list[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Read `cifar-10-binary.tar.gz`, without unpacking anything onto the disk.

    Returns:
        The names of the 10 classes, and for "train" and "test" (images, labels): uint8 of shape
        (n, 32, 32, 3) in red, green, blue, and uint8 of shape (n,); in the archive's order.

    Raises:
        ValueError: the archive lacks a file, or a file is not as it should be.
    """
    files = _read_members(path, [_CIFAR_NAMES, *_CIFAR_BATCHES["train"], *_CIFAR_BATCHES["test"]])
    names = files[_CIFAR_NAMES].decode("ascii", errors="replace").split()
    if len(set(names)) != _NUM_CLASSES:
        raise ValueError(
            f"{_CIFAR_NAMES} in {path} names the classes {names}; {_NUM_CLASSES} different names "
            "are expected. Download the archive again"
        )
    splits = {}
    for split, batches in _CIFAR_BATCHES.items():
        parts = [_parse_cifar_batch(files[batch], f"{batch} in {path}") for batch in batches]
        images, labels = zip(*parts, strict=True)
        splits[split] = np.concatenate(images), np.concatenate(labels)
    return names, splits


def _read_members(path: PathLike, wanted: list[str]) -> dict[str, bytes]:
    """Return the contents of the wanted regular files of the archive, {name without folder: bytes}."""
    files: dict[str, bytes] = {}
    try:
        # As a stream: going back in a gzip file means unpacking it from its start again.
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                # Links and devices are passed over, and no name of the archive becomes a path.
                if folder + slash == _CIFAR_FOLDER and name in wanted and member.isreg():
                    extracted = tar.extractfile(member)
                    assert extracted is not None  # it is a regular file
                    files[name] = extracted.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole tar.gz file: {error}. Download it again") from error
    if missing := sorted(set(wanted) - set(files)):
        raise ValueError(
            f"{path} lacks {missing} in its folder {_CIFAR_FOLDER}. It must be CIFAR-10's binary "
            "version, cifar-10-binary.tar.gz; download that"
        )
    return files


def _parse_cifar_batch(content: bytes, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 32, 32, 3) and labels (n,) of a file of records `label, red, green, blue`."""
    if not content or len(content) % _CIFAR_RECORD:
        raise ValueError(
            f"{what} holds {len(content)} bytes; a positive multiple of {_CIFAR_RECORD} (a label "
            "and 3 planes of 32x32) is expected. Download the archive again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0]
    _check_labels(labels, what)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _cifar_examples(
    split: str, images: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield TFDS' examples, with the ids and keys that TFDS itself gives them."""
    from PIL import Image

    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        image_id = f"{split}_{index:05d}"
        yield index, {"id": image_id, "image": Image.fromarray(image), "label": int(label)}


def _check_labels(labels: np.ndarray, what: PathLike) -> None:
    if len(labels) and labels.max() >= _NUM_CLASSES:
        raise ValueError(
            f"{what} holds the label {labels.max()}; labels are 0 to {_NUM_CLASSES - 1}. Download it again"
        )


# --- Tiny Shakespeare ----------------------------------------------------------------------------


def read_shakespeare(path: PathLike) -> dict[str, str]:
    """Return the text cut as TFDS does: "train" the first .9, then half and half "validation" and "test".

    Raises:
        ValueError: the file is no such text.
    """
    try:
        # Its newlines stay as they are: the cuts count characters.
        with open(path, encoding="ascii", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not plain text: {error}. Download it again") from error
    cut = int(len(text) * 0.9)
    middle = cut + int((len(text) - cut) * 0.5)
    if not cut or middle == cut:
        raise ValueError(f"{path} holds {len(text)} characters, too few to cut. Download it again")
    return {"train": text[:cut], "validation": text[cut:middle], "test": text[middle:]}


# --- the network ---------------------------------------------------------------------------------


def _require_network(name: str, builder: Any) -> None:
    """Raise DataUnavailable unless the host of the archives answers within a few seconds.

    TFDS retries a dead network for more than three minutes, so it must not be the one to find out.
    """
    url = next(iter(URLS[name].values()))
    if reason := _unreachable(url, _PROBE_SECONDS):
        problem = f"is not prepared, and {url} cannot be reached ({reason})"
        raise unavailable(name, builder.data_dir, problem)


def _unreachable(url: str, seconds: float) -> str | None:
    """Return why `url` does not answer, or None if it does."""
    # requests, as TFDS: the same proxies and certificates then count.
    import requests

    reason: list[str | None] = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            # Streamed and closed at once: only the head of the answer is read.
            with requests.get(url, stream=True, timeout=seconds) as response:
                reason[0] = None if response.ok else f"HTTP status {response.status_code}"
        except requests.exceptions.RequestException as error:
            reason[0] = type(error).__name__

    # In a thread, because requests' timeout leaves out the look-up of the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return reason[0]


def unavailable(name: str, folder: PathLike, problem: str) -> DataUnavailable:
    """Return the error for a data set that cannot be had: what is missing, where, and what to do."""
    path = Path(folder)
    return DataUnavailable(
        f"{name} in {path} {problem}. Either set TFDS_DATA_DIR to a folder that holds the prepared "
        f"{path.parent.name}/{path.name} (array_record format), or run on a machine with a network "
        f"(python -m experiments.data.prepare {name}), or use --dataset digits, which needs no download"
    )


def main(argv: list[str] | None = None) -> None:
    """Return the command line: prepares one data set and prints its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data.prepare",
        description="Download a data set and write it as a TFDS array_record folder.",
    )
    parser.add_argument("name", choices=sorted(URLS))
    parser.add_argument(
        "--data-dir", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets", default=None
    )
    args = parser.parse_args(argv)
    try:
        folder = prepare(args.name, args.data_dir)
    except DataUnavailable as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.name} is prepared in {folder}")


if __name__ == "__main__":
    main()
