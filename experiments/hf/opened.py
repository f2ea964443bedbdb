"""Folders of a Hugging Face checkpoint: opened as params and a function, and written back."""

import contextlib
import difflib
import itertools
import json as json_text
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxprune as jp
from experiments.hf.architecture import Architecture, Axis, Tensor, depth
from experiments.hf.gpt2 import GPT2
from experiments.hf.llama import LLAMA, MISTRAL, QWEN2

ARCHITECTURES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "gpt2": GPT2}
"""By the "model_type" of config.json."""

_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf"}
"""Files of these kinds hold the weights of the network as it was, and are not copied."""


class Model(NamedTuple):
    """A checkpoint as a function of JAX.

    Attributes:
      folder: where it lies.
      architecture: its map and its function.
      json: config.json.
      config: its sizes.
      params: as `Architecture` says; memory-mapped arrays, unless layers are stacked.
      apply_fn: `apply_fn(params, tokens)`, tokens (batch, length) int32 -> logits (batch, length, vocab).
      names: the names in the file, by path.
      layout: the files that the tensors lie in, for `write_model`.
      extra: the tensors that the function does not read, by name; written back as they are.
    """

    folder: Path
    architecture: Architecture
    json: dict[str, Any]
    config: Any
    params: Any
    apply_fn: Callable[[Any, Any], jax.Array]
    names: dict[str, str]
    layout: Any
    extra: dict[str, Any]


def open_model(folder: str | os.PathLike[str], stacked: bool = False) -> Model:
    """Open a folder with config.json and safetensors. Nothing is read but headers, unless layers are stacked.

    Args:
      folder: as the hub and `save_pretrained` lay it out, with one file or with shards.
      stacked: stack the layers on a first axis, to run under `lax.scan`. Reads all of them into memory.

    Raises:
      FileNotFoundError: no such folder, or no config.json or safetensors in it.
      jp.io.FileError: an architecture that is not known or settings that are not implemented; a tensor that
        is absent, of another shape than config.json says, or no float; a damaged file.
    """
    folder = Path(folder)
    json = _read_json(folder)
    kind = json.get("model_type")
    if kind not in ARCHITECTURES:
        raise jp.io.FileError(
            f"{folder}: config.json's 'model_type' is {kind!r}; known: {', '.join(ARCHITECTURES)}. Another "
            "one needs an Architecture (experiments/hf/architecture.py): configure, which reads the sizes in "
            "config.json; tensors, the names and shapes in the file; apply, the function; and with_sizes."
        )
    if json.get("quantization_config"):
        raise jp.io.FileError(
            f"{folder}: config.json has a 'quantization_config': the weights are packed. Take the checkpoint "
            "in float32, float16 or bfloat16."
        )
    architecture = ARCHITECTURES[kind]
    try:
        config = architecture.configure(json)
    except ValueError as error:
        raise jp.io.FileError(f"{folder}: {error}") from None
    saved = jp.io.load_safetensors(folder)
    arrays = zip(jp.leaf_paths(saved.params), jax.tree.leaves(saved.params), strict=True)
    present = {saved.layout.names[path]: array for path, array in arrays}
    names = _names(architecture, config, present)
    params = tree_of(_checked(folder, architecture, config, names, present), config.depth)
    if stacked:
        params["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *params["layers"])
    used = set(names.values())
    return Model(
        folder=folder,
        architecture=architecture,
        json=json,
        config=config,
        params=params,
        apply_fn=partial(architecture.apply, config),
        names=names,
        layout=saved.layout,
        extra={name: array for name, array in present.items() if name not in used},
    )


def write_model(
    out: str | os.PathLike[str],
    model: Model,
    params: Any,
    masks: Any = None,
    *,
    layers: Sequence[int] | None = None,
    json: Mapping[str, Any] | None = None,
) -> int:
    """Write a folder that other programs read as they read the model's: complete, or not at all.

    Tensors keep their names, dtypes and shards. config.json says the sizes of `params`. The other files of
    the folder (the tokenizer's, say) are copied, but for weights in other formats and folders in it.

    Args:
      out: the folder; a checkpoint that lies there is replaced, but not the model itself.
      model: what `open_model` returned.
      params: a tree like the model's, which may have fewer layers, heads and hidden units.
      masks: bool masks like `params`; what they prune is written as 0.
      layers: which layers of the model `params["layers"]` still holds, in order. Needed if not all.
      json: the settings to write in place of the model's own, with more keys, say.

    Returns:
      The bytes of the safetensors files.

    Raises:
      ValueError: sizes that config.json cannot say; a leaf that is missing, unknown or of another shape than
        the rest of the network needs; `layers` that do not fit.
      FileExistsError: `out` is the model's folder, or has something else in it than a checkpoint.
      OSError: it cannot be written; what lay there stays.
    """
    settings = model.architecture.with_sizes(model.json if json is None else json, params)
    kept = _kept_layers(model, params, layers)
    tensors = model.architecture.tensors(model.architecture.configure(settings))
    _refuse_unknown(params, tensors)
    renamed = {model.names[_moved(tensor.path, kept)]: model.names[tensor.path] for tensor in tensors}
    values = {model.names[tensor.path]: _fitting(params, tensor) for tensor in tensors}
    for name, array in model.extra.items():
        if (new := _extra_name(name, model, kept)) is not None:
            renamed[name], values[new] = new, array
    keep = None
    if masks is not None:
        by_name = {model.names[tensor.path]: _leaf(masks, tensor.path) for tensor in tensors}
        # The function does not read the extra tensors, and nothing prunes them.
        keep = {name: by_name.get(name, np.broadcast_to(True, value.shape)) for name, value in values.items()}
    return _write_folder(Path(out), model, settings, values, keep, model.layout.renamed(renamed))


def _check_replaceable(out: Path, model: Model) -> None:
    """Refuse a place where something would be lost beside an earlier result."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.samefile(model.folder):
        raise FileExistsError(f"{out} is the folder of the model itself. Give another one.")
    if not (out / "config.json").is_file() or any(file.is_dir() for file in out.iterdir()):
        raise FileExistsError(f"{out} holds more than a checkpoint. Give a new folder, or remove it.")


@contextlib.contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`, which takes its place if the block ends without an error."""
    target = Path(os.path.realpath(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    new.mkdir()
    try:
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_folder(
    out: Path,
    model: Model,
    settings: Mapping[str, Any],
    values: Mapping[str, Any],
    keep: Mapping[str, Any] | None,
    layout: Any,
) -> int:
    """Write tensors, config.json and copies of the other files."""
    _check_replaceable(out, model)
    with _replacing_folder(out) as new:
        leaves = {path: values[name] for path, name in layout.names.items()}
        masks = None if keep is None else {path: keep[name] for path, name in layout.names.items()}
        size = jp.io.save_safetensors(new, leaves, masks, layout=layout)
        for file in sorted(model.folder.iterdir()):
            if file.is_file() and not _is_weights(file.name):
                shutil.copyfile(file, new / file.name)
        if settings != model.json:
            text = json_text.dumps(settings, indent=2, ensure_ascii=False)
            (new / "config.json").write_text(text + "\n", encoding="utf-8")
    return size


def _is_weights(name: str) -> bool:
    return Path(name).suffix in _OTHER_WEIGHTS or name.endswith(".index.json")


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, which says the architecture and its sizes. Give the folder that "
            "save_pretrained wrote, or a download of all files of a repository of the hub."
        )
    try:
        found = json_text.loads(file.read_bytes())
    except ValueError as error:
        raise jp.io.FileError(f"{file}: no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise jp.io.FileError(f"{file}: must hold an object, got {type(found).__name__}.")
    return found


def _names(architecture: Architecture, config: Any, present: Mapping[str, Any]) -> dict[str, str]:
    """Return the names in the file by path; files that were saved without the head leave out a prefix."""
    names = architecture.names(config)
    if any(name.startswith(architecture.prefix) for name in present):
        return names
    return {path: name.removeprefix(architecture.prefix) for path, name in names.items()}


def _checked(
    folder: Path,
    architecture: Architecture,
    config: Any,
    names: Mapping[str, str],
    present: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arrays by path, all present and of the shapes that config.json says."""
    found = {}
    for tensor in architecture.tensors(config):
        name = names[tensor.path]
        if name not in present:
            near = ", ".join(difflib.get_close_matches(name, present, 3, 0)) or "no tensors at all"
            raise jp.io.FileError(
                f"{folder} has no tensor {name!r}, which {tensor.path!r} is read from. The nearest names "
                f"are: {near}."
            )
        array = present[name]
        if array.shape != tensor.shape:
            wrong = _disagreement(tensor.axes, array.shape)
            raise jp.io.FileError(
                f"{folder}: {name!r} is of shape {array.shape}; config.json says {tensor.shape}: {wrong}."
            )
        if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise jp.io.FileError(f"{folder}: {name!r} is {array.dtype}; weights must be floats.")
        found[tensor.path] = array
    return found


def _disagreement(axes: Sequence[Axis], shape: tuple[int, ...]) -> str:
    """Say which settings do not go with a shape."""
    if len(axes) != len(shape):
        return f"it has {len(shape)} axes, not {len(axes)}"
    wrong = [(number, axis) for number, axis in enumerate(axes) if axis.size != shape[number]]
    return " and ".join(f"{axis.key} is {axis.size}, axis {number} {shape[number]}" for number, axis in wrong)


def tree_of(by_path: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the tree of params of arrays by path."""
    tree: dict[str, Any] = {"layers": [{} for _ in range(layers)]}
    for path, value in by_path.items():
        *above, last = path.split("/")
        node: Any = tree
        for key in above:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = value
    return tree


def _leaf(tree: Any, path: str) -> Any:
    """Return the leaf at a path of the unstacked tree, of either tree; None if there is none."""
    node, keys = tree, path.split("/")
    number = None
    if keys[0] == "layers" and not isinstance(tree["layers"], (list, tuple)):
        number = int(keys.pop(1))
    try:
        for key in keys:
            node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
        return node if number is None else node[number]
    except (KeyError, IndexError):
        return None


def _fitting(params: Any, tensor: Tensor) -> Any:
    """Return a leaf, which must be of the shape that the rest of the network needs."""
    value = _leaf(params, tensor.path)
    if value is None:
        raise ValueError(f"params have no {tensor.path!r}, which the file needs as {tensor.name!r}.")
    if value.shape != tensor.shape:
        wrong = _disagreement(tensor.axes, value.shape)
        raise ValueError(
            f"params[{tensor.path!r}] is of shape {value.shape}; beside the other leaves it must be "
            f"{tensor.shape}: {wrong}."
        )
    return value


def _refuse_unknown(params: Any, tensors: Sequence[Tensor]) -> None:
    """Refuse leaves that would not be written, an adapter's say."""
    known = {tensor.path for tensor in tensors}
    if not isinstance(params["layers"], (list, tuple)):
        known = {re.sub(r"^layers/\d+/", "layers/", path) for path in known}
    if unknown := [path for path in jp.leaf_paths(params) if path not in known]:
        raise ValueError(
            f"params have {', '.join(unknown[:3])}{', ...' if unknown[3:] else ''}, which the files of this "
            "architecture have no name for. Merge adapters into the weights first."
        )


def _kept_layers(model: Model, params: Any, layers: Sequence[int] | None) -> Sequence[int]:
    """Return the numbers in the model of the layers that params hold."""
    held, of = depth(params), model.config.depth
    if layers is None:
        if held != of:
            raise ValueError(f"params hold {held} of {of} layers; say which by layers=(...).")
        return range(of)
    if len(layers) != held or sorted(set(layers)) != list(layers) or not set(layers) <= set(range(of)):
        raise ValueError(
            f"layers must be {held} increasing numbers from 0 to {of - 1}, one for each layer of params, got "
            f"{tuple(layers)}."
        )
    return layers


def _moved(path: str, kept: Sequence[int]) -> str:
    """Return the path in the model of what is at `path` now that only some layers are kept."""
    first, *rest = path.split("/")
    return "/".join([first, str(kept[int(rest[0])]), *rest[1:]]) if first == "layers" else path


def _extra_name(name: str, model: Model, kept: Sequence[int]) -> str | None:
    """Return the new name of a tensor that the function does not read; None if its layer is removed."""
    for number in range(model.config.depth):
        if name.startswith(before := _layer_prefix(model.names, number)):
            if number not in kept:
                return None
            return _layer_prefix(model.names, kept.index(number)) + name.removeprefix(before)
    return name


def _layer_prefix(names: Mapping[str, str], number: int) -> str:
    """Return what the names of a layer begin with, "model.layers.3." say."""
    of_layer = [name.split(".") for path, name in names.items() if path.startswith(f"layers/{number}/")]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*of_layer, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)
