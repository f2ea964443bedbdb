"""magika: what type a file is of, from 1,024 bytes of its beginning and 1,024 of its end.

The weights are those of the package magika 1.0.3 (Google, Apache-2.0), 784,214 numbers in an ONNX file. The
function is written anew: a byte gets 64 numbers, four bytes are a place, a convolution looks at five places,
and the largest answer of each of its 512 units says which of 214 types it is.

It is judged on files of the machine it runs on, whose extensions leave no doubt about their types. So the
corpus differs from machine to machine; `Files.fingerprint` tells two apart.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.data.datasets import DataUnavailable
from experiments.one_shot.methods import Channels
from experiments.pretrained.network import Calibration, Pretrained, file_of
from experiments.run.limits import FlagError

MODEL = "magika/models/standard_v3_3"  # in the package
PLACES = 512
PAD = 256
SIDE, BLOCK, LEAST = 1024, 4096, 8  # bytes: of each end that are seen, that are read, of a file at least

SEED = 0  # of the choice of the files
DRAWS = 5  # calibration sets at most
TEST, CALIBRATION, MORE = 30, 3, 6  # files of each type: for the test, in a calibration set, in a larger one

EXTENSIONS = {
    "bib": ("bib",),
    "c": ("c",),
    "cmake": ("cmake",),
    "cpp": ("cc", "cpp", "cxx"),
    "css": ("css",),
    "csv": ("csv",),
    "elf": ("so",),
    "fortran": ("f90", "f95"),
    "gif": ("gif",),
    "go": ("go",),
    "gzip": ("gz",),
    "html": ("html",),
    "jar": ("jar",),
    "java": ("java",),
    "javascript": ("js", "mjs", "cjs"),
    "jinja": ("jinja", "j2"),
    "jpeg": ("jpg", "jpeg"),
    "json": ("json",),
    "lua": ("lua",),
    "markdown": ("md",),
    "npy": ("npy",),
    "npz": ("npz",),
    "onnx": ("onnx",),
    "pdf": ("pdf",),
    "php": ("php",),
    "png": ("png",),
    "po": ("po",),
    "postscript": ("ps",),
    "powershell": ("ps1",),
    "proto": ("proto",),
    "python": ("py", "pyi"),
    "rst": ("rst",),
    "ruby": ("rb",),
    "rust": ("rs",),
    "scss": ("scss",),
    "shell": ("sh",),
    "sql": ("sql",),
    "svg": ("svg",),
    "tcl": ("tcl",),
    "toml": ("toml",),
    "tsv": ("tsv",),
    "ttf": ("ttf",),
    "wasm": ("wasm",),
    "wav": ("wav",),
    "webp": ("webp",),
    "woff": ("woff",),
    "woff2": ("woff2",),
    "xml": ("xml",),
    "xz": ("xz",),
    "yaml": ("yaml", "yml"),
    "zip": ("zip",),
}
"""By type, the extensions that mean it and nothing else: no `.h` (C, C++), `.pl` (Perl, Prolog), `.txt`."""


def load(
    test: int = TEST, examples: int = CALIBRATION, more: int = MORE, folders: Sequence[str] = ()
) -> Pretrained:
    """Read the network from the installed package, and files of this machine.

    Args:
      test: how many files of each type to judge it on.
      examples: how many files of each type to calibrate it on.
      more: how many the larger calibration set has.
      folders: where the files are from; none for Python's library, the installed packages and /usr/share.

    Raises:
      DataUnavailable: a package is missing, or no type has enough files.
    """
    params, labels = read_params(), read_labels()
    files = Files(folders or default_folders(), test + DRAWS * max(examples, more))
    truth = np.array([labels.index(name) for name in files.counts])
    tested = files.tokens[:test]
    dense = predicted(params, tested)

    def evaluate(params: Any) -> np.ndarray:
        found = predicted(params, tested)
        columns = found != truth, np.ones_like(found), found != dense
        return np.stack([column.reshape(-1) for column in columns], axis=1).astype(int)

    def of_draw(draw: int, count: int) -> Calibration:
        if draw >= DRAWS:
            raise FlagError(f"--draws: {DRAWS} calibration sets at most, got {draw + 1}")
        first = test + draw * count
        return Calibration([(tokens,) for tokens in files.tokens[first : first + count]])

    return Pretrained(
        name="magika",
        title="magika, types of files",
        note=f"magika's weights, {dense.size:,} files ({files.fingerprint})",
        figure="error rate",
        params=params,
        apply_fn=apply_fn,
        calibration=lambda draw: of_draw(draw, examples),
        evaluate=evaluate,
        # The units of the convolution are not among them: a normalisation over all of them stands before the
        # product that reads them, so that what a unit's removal does is not in that product alone.
        channels={"half of the embedding": Channels(("embed/kernel[1]",), ("conv/kernel",))},
        recover_rate=2e-4,
        more=lambda draw: of_draw(draw, more),
        data=f"{test} files of each of {len(files.counts)} types, of so many found: "
        + ", ".join(f"{name} {count:,}" for name, count in files.counts.items()),
    )


def read_params() -> Any:
    """Return the trained params, kernels as inputs x outputs, and width x inputs x outputs.

    Raises:
      DataUnavailable: the package magika is not installed, or onnx is not.
    """
    path = file_of("magika", f"{MODEL}/model.onnx")
    try:
        import onnx
    except ModuleNotFoundError:
        raise DataUnavailable(
            "The package onnx is not installed. Install it with: pip install 'jaxprune[pretrained]'"
        ) from None
    found = {array.name: onnx.numpy_helper.to_array(array) for array in onnx.load(path).graph.initializer}

    def array(name: str) -> np.ndarray:
        return found[f"jax2tf_get_logits_/{name}"]

    def flat(name: str) -> np.ndarray:
        return array(f"pjit_get_logits_/MagikaV2/{name}:0").reshape(-1)

    conv = array("pjit_get_logits_/MagikaV2/Conv_0/transpose_3:0")  # outputs x inputs x width x 1
    params = {
        "embed": {"kernel": array("Const:0"), "bias": flat("Dense_0/Reshape")},
        "norm": {"scale": flat("LayerNorm_0/Reshape_2"), "bias": flat("LayerNorm_0/Reshape_3")},
        "conv": {"kernel": conv[..., 0].transpose(2, 1, 0), "bias": found["const_fold_opt__209"].reshape(-1)},
        "last_norm": {"scale": flat("LayerNorm_1/Reshape_2"), "bias": flat("LayerNorm_1/Reshape_3")},
        "head": {"kernel": array("Const_24:0"), "bias": flat("Dense_1/Reshape")},
    }
    return jax.tree.map(jnp.asarray, params)


def read_labels() -> list[str]:
    """Return the names of the 214 types, in the order of the outputs."""
    return json.loads(file_of("magika", f"{MODEL}/config.min.json").read_text())["target_labels_space"]


def apply_fn(params: Any, tokens: jax.Array) -> jax.Array:
    """Return the logits of the types.

    Args:
      params: as `read_params` returns them.
      tokens: (files, 2048), as `tokens_of` returns them.

    Returns:
      (files, 214).
    """
    embed, norm, conv, last, head = (params[name] for name in ("embed", "norm", "conv", "last_norm", "head"))
    bytes_ = jax.nn.gelu(embed["kernel"][tokens] + embed["bias"])
    places = bytes_.reshape(len(tokens), PLACES, -1)
    # Each number is normalised over the places, and each place has its scale.
    places = _normalised(places, 1) * norm["scale"][:, None] + norm["bias"][:, None]
    found = lax.conv_general_dilated(
        places, conv["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    most = jax.nn.gelu(found + conv["bias"]).max(axis=1)
    return (_normalised(most, 1) * last["scale"] + last["bias"]) @ head["kernel"] + head["bias"]


def _normalised(x: jax.Array, axis: int) -> jax.Array:
    centred = x - x.mean(axis, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(axis, keepdims=True) + 1e-6)


def predicted(params: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the likeliest type of each file, however unlikely; tokens are (batches, files, 2048)."""
    return np.stack([np.asarray(_likeliest(params, batch)) for batch in tokens])


@jax.jit
def _likeliest(params: Any, tokens: jax.Array) -> jax.Array:
    return apply_fn(params, tokens).argmax(-1)


def tokens_of(path: str | Path) -> np.ndarray | None:
    """Return what the network sees of a file, (2048,): its bytes, and 256 for padding.

    White space at its beginning and at its end is left out.

    Returns:
      None for a file of fewer than 8 bytes, which the network is not asked about.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        read = min(size, BLOCK)
        file.seek(0)
        first = file.read(read).lstrip()[:SIDE]
        file.seek(size - read)
        last = file.read(read).rstrip()[-SIDE:]
    if len(first) < LEAST:
        return None
    tokens = np.full(2 * SIDE, PAD, np.int32)
    tokens[: len(first)] = np.frombuffer(first, np.uint8)
    tokens[len(tokens) - len(last) :] = np.frombuffer(last, np.uint8)
    return tokens


def default_folders() -> tuple[str, ...]:
    """Return the folders of Python's library and of the installed packages, and /usr/share."""
    return sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share"


class Files:
    """Files of a machine, the same number of each type that has enough of them.

    They are chosen by `SEED`: one of each folder in turn, so that no folder of a thousand icons is all there
    is of a type. Of files that the network cannot tell apart one is chosen.

    Attributes:
      counts: by type, how many files the folders have.
      tokens: (each, types, 2048), what the network sees of the files; the types are those of `counts`.
      fingerprint: of the tokens.
    """

    def __init__(self, folders: Sequence[str], each: int):
        """Find the files.

        Args:
          folders: where they are from.
          each: how many of each type.

        Raises:
          DataUnavailable: no type has that many.
        """
        self.counts: dict[str, int] = {}
        chosen = []
        for name, paths in sorted(_by_type(folders).items()):
            tokens = _choose(paths, each)
            if len(tokens) == each:
                self.counts[name] = len(paths)
                chosen.append(tokens)
        if not chosen:
            listed = ", ".join(map(str, folders))
            raise DataUnavailable(
                f"No type has {each} different files in {listed}. Give more folders, or ask for fewer files."
            )
        self.tokens = np.stack(chosen, axis=1)
        self.fingerprint = hashlib.sha256(self.tokens.tobytes()).hexdigest()[:8]


def _by_type(folders: Sequence[str]) -> Mapping[str, list[str]]:
    types = {extension: name for name, all_of in EXTENSIONS.items() for extension in all_of}
    found: dict[str, list[str]] = {}
    for path in sorted(set(_walk(folders))):
        if name := types.get(path.rpartition(".")[2]):
            found.setdefault(name, []).append(path)
    return found


def _walk(folders: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        for parent, _, names in os.walk(os.path.realpath(folder)):
            for path in (os.path.join(parent, name) for name in names):
                if os.path.isfile(path) and not os.path.islink(path) and os.access(path, os.R_OK):
                    yield path


def _choose(paths: list[str], each: int) -> list[np.ndarray]:
    """Return the tokens of at most so many different files, from as many folders as there are, shuffled."""
    rng = np.random.default_rng(SEED)
    turns: dict[str, int] = {}
    order = []
    for place in rng.permutation(len(paths)):
        folder = os.path.dirname(paths[place])
        turns[folder] = turns.get(folder, 0) + 1
        order.append((turns[folder], len(order), paths[place]))
    chosen: dict[bytes, np.ndarray] = {}
    for _, _, path in sorted(order):
        if len(chosen) == each:
            break
        if (tokens := tokens_of(path)) is not None:
            chosen.setdefault(tokens.tobytes(), tokens)
    found = list(chosen.values())
    return [found[place] for place in rng.permutation(len(found))]
