"""The experiments' data: digits, the writing of TFDS folders without TensorFlow, and their reading.

No test needs a network: the archives are small ones in the official formats, made here, and the
only host that is asked is this machine.
"""

import functools
import gzip
import importlib
import importlib.util
import io
import socket
import struct
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.data import datasets, prepare
from tests.studies.outcomes import prepared


def _needs(*modules: str) -> pytest.MarkDecorator:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"not installed: {missing}; pip install 'jaxprune[experiments]'"
    )


needs_sklearn = _needs("sklearn")
needs_tfds = _needs("tensorflow_datasets", "importlib_resources", "array_record", "PIL")

CLASS_NAMES = [*("airplane", "automobile", "bird", "cat", "deer"), *("dog", "frog", "horse", "ship", "truck")]


# --- digits --------------------------------------------------------------------------------------


@needs_sklearn
@pytest.mark.parametrize(("size", "side"), [(None, 8), (28, 28), (11, 11)])
def test_digits_shapes_types_and_figures(size, side):
    data = datasets.load("digits", size=size)
    assert data.x_train.shape == (1437, side, side, 1)
    assert data.x_test.shape == (360, side, side, 1)
    assert data.y_train.shape == (1437,) and data.y_test.shape == (360,)
    assert data.x_train.dtype == data.x_test.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == np.int32
    assert data.x_train.min() == 0 and data.x_train.max() == 255
    normalised = (data.x_train / 255 - data.mean) / data.std
    np.testing.assert_allclose([normalised.mean(), normalised.std()], [0, 1], atol=1e-9)
    enlarged = "" if side == 8 else f", enlarged to {side}x{side}"
    assert data.note == "scikit-learn's 8x8 digits" + enlarged


@needs_sklearn
def test_digits_are_all_of_scikit_learns_and_split_by_class():
    from sklearn.datasets import load_digits

    data = datasets.load("digits")
    # Each image beside its label: the same collection, in another order.
    ours = np.concatenate([data.x_train, data.x_test]).reshape(-1, 64)
    ours = np.c_[ours, np.concatenate([data.y_train, data.y_test])]
    images, labels = load_digits(return_X_y=True)
    theirs = np.c_[np.rint(images * 255 / 16), labels]
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    share = 360 / 1797
    counts = np.bincount(np.asarray(labels, int))
    assert (np.abs(np.bincount(data.y_test) - counts * share) < 1).all()


@needs_sklearn
def test_digits_are_the_same_every_time_and_slices_are_the_first():
    whole, again = datasets.load("digits"), datasets.load("digits")
    part = datasets.load("digits", train=100, test=30)
    for field in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(again, field))
        first = getattr(part, field)
        assert len(first) == (100 if "train" in field else 30)
        np.testing.assert_array_equal(first, getattr(whole, field)[: len(first)])
    assert (part.mean, part.std) == (whole.mean, whole.std)  # of the whole training split


def test_enlarging_is_jax_bilinear():
    images = np.random.default_rng(0).uniform(0, 255, (3, 8, 8)).astype(np.float32)
    expected = jax.image.resize(images, (3, 28, 28), "bilinear")
    np.testing.assert_allclose(datasets._enlarge(images, 28), expected, rtol=1e-5)
    np.testing.assert_array_equal(datasets._enlarge(images, 8), images)


@needs_sklearn
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "got name='imagenet'; it must be one of .*digits.*mnist.*cifar10"),
        ({"name": "mnist", "size": 32}, "got size=32 for mnist, whose images are 28x28"),
        ({"name": "digits", "size": 4}, "got size=4; digits are 8x8"),
        ({"name": "digits", "train": 1438}, "got train=1438; .* 1 to 1437"),
        ({"name": "digits", "test": 0}, "got test=0; .* 1 to 360"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(**arguments)


# --- archives in the official formats ------------------------------------------------------------


def _random_split(seed: int, n: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, rng.integers(0, 10, n, dtype=np.uint8)


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def _write_mnist(folder: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for split, prefix in (("train", "train"), ("test", "t10k")):
        _write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", splits[split][0])
        _write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", splits[split][1])


def _write_cifar(folder: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    files = {"batches.meta.txt": ("\n".join(CLASS_NAMES) + "\n\n").encode(), "readme.html": b"hi"}
    batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    for split, (images, labels) in splits.items():
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        parts = np.array_split(np.c_[labels, planes], len(batches[split]))
        files |= {name: part.tobytes() for name, part in zip(batches[split], parts, strict=True)}
    _write_tar(folder / "cifar-10-binary.tar.gz", files)


def _write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _local_download(folder: Path) -> prepare.Download:
    return lambda urls: {key: folder / url.rsplit("/", 1)[1] for key, url in urls.items()}


def _paired(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    """Every image with its label, in an order of their own: TFDS shuffles."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


WRITERS = {"mnist": (_write_mnist, (28, 28)), "cifar10": (_write_cifar, (32, 32, 3))}


@needs_tfds
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_what_is_downloaded_and_prepared_comes_back_bit_for_bit(name, server, tmp_path, monkeypatch):
    host, served = server
    write, shape = WRITERS[name]
    splits = {"train": _random_split(0, 43, shape), "test": _random_split(1, 12, shape)}
    write(served, splits)
    urls = {key: host + url.rsplit("/", 1)[1] for key, url in prepare.URLS[name].items()}
    monkeypatch.setitem(prepare.URLS, name, urls)
    data_dir = tmp_path / "data"
    data = datasets.load(name, data_dir=data_dir)
    full_shape = (*shape, 1) if name == "mnist" else shape
    assert data.x_train.shape == (43, *full_shape) and data.x_test.shape == (12, *full_shape)
    assert data.x_train.dtype == np.uint8 and data.y_train.dtype == np.int32
    assert _paired(data.x_train, data.y_train) == _paired(*splits["train"])
    assert _paired(data.x_test, data.y_test) == _paired(*splits["test"])
    assert "JPEG" not in data.note  # the ids are TFDS' own
    part = datasets.load(name, data_dir=data_dir, train=7, test=3)
    np.testing.assert_array_equal(part.x_train, data.x_train[:7])
    np.testing.assert_array_equal(part.y_test, data.y_test[:3])
    with pytest.raises(ValueError, match=r"got train=44; .* 1 to 43"):
        datasets.load(name, data_dir=data_dir, train=44)
    # A second call keeps what is there: it does not even ask for the archives.
    assert Path(prepare.prepare(name, data_dir, _no_download)).is_relative_to(data_dir / name)


def _no_download(urls: Mapping[str, str]) -> dict[str, str]:
    raise AssertionError(f"asked for {urls}")


@needs_tfds
def test_cifar_ids_and_class_names_are_those_of_tfds(tmp_path):
    splits = {"train": _random_split(0, 10, (32, 32, 3)), "test": _random_split(1, 2, (32, 32, 3))}
    _write_cifar(tmp_path, splits)
    prepare.prepare("cifar10", tmp_path, _local_download(tmp_path))
    builder = prepare.make_builder(prepare.import_tfds(), "cifar10", tmp_path)
    assert builder.info.features["label"].names == CLASS_NAMES
    source = builder.as_data_source("train")
    examples = {example["id"].decode(): example for example in source.__getitems__(range(10))}
    assert sorted(examples) == [f"train_{i:05d}" for i in range(10)]
    for i, image in enumerate(splits["train"][0]):  # the id is the place in the archive
        np.testing.assert_array_equal(examples[f"train_{i:05d}"]["image"], image)


@needs_tfds
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_urls_are_those_whose_checksums_tfds_knows(name, tmp_path):
    builder = prepare.make_builder(prepare.import_tfds(), name, tmp_path)
    assert set(prepare.URLS[name].values()) == set(builder.url_infos)


@pytest.mark.parametrize(
    ("ids", "jpeg"),
    [([], False), (["train_00000", "train_49999"], False), (["train_cat_2970", "train_frog_12"], True)],
)
def test_the_note_says_when_the_pixels_are_from_jpeg(ids, jpeg):
    assert ("JPEG" in datasets._note("CIFAR-10", ids)) == jpeg


# --- damaged archives ----------------------------------------------------------------------------


_HEADER = bytes([0, 0, 8, 1]) + struct.pack(">I", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "is not a whole gzip file"),
        (gzip.compress(_HEADER + b"abc")[:-9], "is not a whole gzip file"),
        (gzip.compress(b""), "has 0 in all"),
        (gzip.compress(b"\0\0\x0d\x01" + _HEADER[4:] + b"abc"), "starts with the bytes 00000d01"),
        (gzip.compress(_HEADER + b"ab"), r"holds 10 bytes, but .* shape \(3,\) holds 11"),
        (gzip.compress(_HEADER + b"abcd"), "holds 12 bytes"),
        (gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12), "holds 16 bytes"),  # more than 64 bits count
    ],
    ids=range(7),  # a gzip holds the time
)
def test_damaged_idx_files(content, message, tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare.read_idx(path, 3 if "16" in message else 1)


def _cifar_files() -> dict[str, bytes]:
    batches = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    names = {"batches.meta.txt": "\n".join(CLASS_NAMES).encode()}
    return {**names, **{batch: bytes(3073) for batch in batches}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_3.bin": None}, r"lacks \['data_batch_3.bin'\]"),
        ({"test_batch.bin": bytes(3072)}, "test_batch.bin .* holds 3072 bytes"),
        ({"test_batch.bin": b""}, "test_batch.bin .* holds 0 bytes"),
        ({"test_batch.bin": b"\x0a" + bytes(3072)}, "holds the label 10; labels are 0 to 9"),
        ({"batches.meta.txt": b"cat cat"}, "10 different names"),
    ],
)
def test_damaged_cifar_archives(change, message, tmp_path):
    files = {name: content for name, content in (_cifar_files() | change).items() if content is not None}
    path = tmp_path / "cifar.tar.gz"
    _write_tar(path, files)
    with pytest.raises(ValueError, match=message):
        prepare.read_cifar_tar(path)


def test_a_cut_cifar_archive_and_one_that_is_none(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    files = _cifar_files()
    files["data_batch_1.bin"] = _random_split(0, 1, (3073,))[0].tobytes()
    _write_tar(path, files)
    for content in (path.read_bytes()[:2000], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a whole tar\.gz file"):
            prepare.read_cifar_tar(path)


def test_links_in_a_cifar_archive_are_not_followed(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"lacks .*test_batch\.bin"):
        prepare.read_cifar_tar(path)


@needs_tfds
def test_a_failed_preparation_leaves_no_data_set_behind(tmp_path):
    images, labels = _random_split(0, 5, (28, 28))
    _write_mnist(tmp_path, {"train": (images, labels), "test": (images, labels[:4])})
    with pytest.raises(ValueError, match=r"images of shape \(5, 28, 28\) and .* 4 labels"):
        prepare.prepare("mnist", tmp_path, _local_download(tmp_path))
    assert not prepare.make_builder(prepare.import_tfds(), "mnist", tmp_path).is_prepared()
    assert not list((tmp_path / "mnist").iterdir())


@needs_tfds
def test_a_folder_in_the_way_is_not_taken_for_a_data_set(tmp_path):
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"mnist/3\.0\.1 exists but holds no prepared"):
        prepare.prepare("mnist", tmp_path, _no_download)
    with pytest.raises(datasets.DataUnavailable, match="exists but holds no prepared"):
        datasets.load("mnist", data_dir=tmp_path)


def test_an_unknown_name_cannot_be_prepared():
    with pytest.raises(ValueError, match=r"got name='digits'; it must be one of .*cifar10.*mnist"):
        prepare.prepare("digits")


# --- what is missing -----------------------------------------------------------------------------


@pytest.fixture
def dead_url(monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL on this machine where nobody listens, past any proxy."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/archive.gz"


@needs_tfds
@pytest.mark.parametrize(("name", "folder"), [("mnist", "mnist/3.0.1"), ("cifar10", "cifar10/3.0.2")])
def test_no_data_and_no_network_is_said_at_once(name, folder, tmp_path, dead_url, monkeypatch):
    monkeypatch.setitem(prepare.URLS, name, {"archive": dead_url})
    start = time.monotonic()
    with pytest.raises(datasets.DataUnavailable) as caught:
        datasets.load(name, data_dir=tmp_path)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    for part in (str(tmp_path / folder), dead_url, "TFDS_DATA_DIR", "network", "--dataset digits"):
        assert part in message
    assert not list(tmp_path.iterdir())  # nothing is left behind
    with pytest.raises(SystemExit, match="TFDS_DATA_DIR"):
        prepare.main([name, "--data-dir", str(tmp_path)])


@needs_tfds
def test_the_environment_variable_counts_after_tfds_is_imported(tmp_path, dead_url, monkeypatch):
    prepare.import_tfds()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(prepare.URLS, "mnist", {"archive": dead_url})
    with pytest.raises(datasets.DataUnavailable, match=f"mnist in {tmp_path}"):
        datasets.load("mnist")


@needs_tfds
def test_a_folder_in_another_format_is_named(tmp_path):
    images = _random_split(0, 5, (28, 28))
    _write_mnist(tmp_path, {"train": images, "test": images})
    folder = Path(prepare.prepare("mnist", tmp_path, _local_download(tmp_path)))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(datasets.DataUnavailable, match=r"is prepared as .*tfrecord.* TensorFlow"):
        datasets.load("mnist", data_dir=tmp_path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """(URL, folder) of a web server on this machine, past any proxy."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", folder
        httpd.shutdown()
        thread.join()


@needs_tfds
def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def denied(*args: object) -> str:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(datasets, "prepare", denied)
    with pytest.raises(datasets.DataUnavailable, match=r"could not be \(PermissionError: .*somewhere"):
        datasets.load("mnist", data_dir=tmp_path)


@_needs("requests")
def test_the_probe_tells_a_host_that_answers(server, dead_url):
    host, folder = server
    (folder / "there").touch()
    assert prepare._unreachable(host + "there", 5) is None
    assert prepare._unreachable(host + "gone", 5) == "HTTP status 404"
    assert prepare._unreachable(dead_url, 5) == "ConnectionError"


@_needs("requests")
def test_the_probe_does_not_wait_for_a_host_that_is_silent(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        reason = prepare._unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.3)
    assert reason is not None
    assert time.monotonic() - start < 3


@needs_tfds
@pytest.mark.parametrize("module", ["importlib_resources", "array_record"])
def test_a_missing_package_is_named_with_its_remedy(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module} .*'jaxprune\[experiments\]'"):
        datasets.load("mnist", data_dir=tmp_path)


@needs_tfds
def test_a_missing_image_decoder_is_named_with_its_remedy(monkeypatch, tmp_path):
    # TFDS looks for the decoders once, when it is imported: not while they are hidden.
    importlib.import_module("tensorflow_datasets.core.features.image_feature")
    for module in ("cv2", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"opencv.*pillow.*'jaxprune\[experiments\]'"):
        datasets.load("mnist", data_dir=tmp_path)


# --- the real data sets, where they are ----------------------------------------------------------


@needs_tfds
@pytest.mark.parametrize(
    ("name", "shape", "total"), [("mnist", (28, 28, 1), 60_000), ("cifar10", (32, 32, 3), 50_000)]
)
def test_slices_of_the_real_data(name, shape, total):
    if not prepared(name):
        pytest.skip(f"TFDS_DATA_DIR holds no prepared {name}")
    data = datasets.load(name, train=2000, test=500)
    assert data.x_train.shape == (2000, *shape) and data.x_test.shape == (500, *shape)
    assert data.x_train.dtype == np.uint8 and data.y_train.dtype == np.int32
    assert set(data.y_train) == set(data.y_test) == set(range(10))
    # 2000 images of 50,000: the figures of the whole split are near.
    np.testing.assert_allclose((data.x_train / 255).mean(), data.mean, atol=0.01)
    np.testing.assert_allclose((data.x_train / 255).std(), data.std, atol=0.01)
    with pytest.raises(ValueError, match=f"1 to {total}"):
        datasets.load(name, train=total + 1)
