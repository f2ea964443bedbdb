"""safetensors: dense files that other programs read and write, alone or as the shards of a checkpoint."""

import mmap as memory_map
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.files.atomic import making_folder, replacing_all
from jaxprune.files.opened import FileError, check_path, open_file
from jaxprune.io.format import DTYPES
from jaxprune.io.layout import INDEX, Layout, Shard, path_of, read_index, write_index
from jaxprune.io.tensor_header import (
    CODES,
    Tensor,
    is_metadata,
    read_header,
    size_of,
    write_header,
    wrong_name,
)
from jaxprune.tree.leaves import array_leaves, describe, is_array, is_concrete
from jaxprune.tree.masks import masked, masks_by_path
from jaxprune.tree.paths import leaf_paths, some_of
from jaxprune.typing import Masks, Params

_SUFFIX = ".safetensors"
_WHOLE = f"model{_SUFFIX}"  # goes before an index, as in transformers
_CHUNK = 1 << 24  # bytes that are written at once


class Checkpoint(NamedTuple):
    """What `load_safetensors` returns.

    Attributes:
      params: the tensors, as nested dicts of numpy arrays.
      metadata: texts by text, of all files.
      layout: the `Layout`: which tensor lies in which file, and by which name.
    """

    params: Params
    metadata: dict[str, str]
    layout: Layout


def save_safetensors(
    path: str | os.PathLike[str],
    params: Params,
    masks: Masks | None = None,
    *,
    metadata: dict[str, str] | None = None,
    layout: Layout | None = None,
) -> int:
    """Write params to safetensors files, with zeros where masks prune.

    The format is dense and knows no masks, so the files are as large as those of the dense network. Leaves
    are written one after another, each as it is, to the bit, but for the entries that are pruned: the whole
    is never in memory. As with `save`, all is written completely or not at all. The files that `params` were
    loaded from may be written to.

    Args:
      path: of the file. With a layout of several files, or one from a folder, it may be that of a folder,
        which is made where it is missing; a path that ends in .safetensors is that of a file.
      params: a pytree of arrays. Without a layout the name of each tensor is the path of its leaf.
      masks: bool masks like `params`.
      metadata: texts by text; with a layout they replace that of each file.
      layout: of the checkpoint that `params` come from: tensors get their names, files and order back, and
        files their metadata. Shapes may have changed.

    Returns:
      The size of the files in bytes.

    Raises:
      ValueError: masks that do not mirror `params`; two leaves of the same path; leaves that are not those of
        the layout, or of another dtype; a layout of several files for one file; a folder with a file that
        would be read in place of those written; a name that the format does not have.
      TypeError: a dtype that the format does not have; metadata that is not strings.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxprune as jp
      >>> file = os.path.join(tempfile.mkdtemp(), "params.safetensors")
      >>> size = jp.io.save_safetensors(file, {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}})
      >>> jp.io.load_safetensors(file).params["dense"]["kernel"].dtype
      dtype(bfloat16)
    """
    leaves = array_leaves(params)
    for name, leaf in leaves.items():
        _check_leaf(name, leaf)
    if metadata is not None and not is_metadata(metadata):
        raise TypeError(f"metadata of safetensors is strings by strings, in Unicode, got {metadata!r:.200}")
    kept = {} if masks is None else masks_by_path(masks, params)
    if layout is None:
        shard = Shard({name: str(leaf.dtype) for name, leaf in leaves.items()}, metadata)
        layout, folder = Layout({os.path.basename(os.fspath(path)): shard}, None), Path(path).parent
        missing = nullcontext()
        paths = {name: name for name in leaves}
    else:
        layout, folder = _placed(layout, path, metadata)
        paths = {name: path for path, name in layout.names.items()}
        _check_layout(layout, leaves)
        missing = making_folder(folder)
    _check_names(paths)
    index = [] if layout.index is None else [folder / INDEX]
    with missing, replacing_all([*(folder / name for name in layout.shards), *index]) as new:
        for file, shard in layout.shards.items():
            with new[folder / file].open("wb") as opened:
                tensors = {name: leaves[paths[name]] for name in shard.dtypes}
                shapes = {name: (str(leaf.dtype), np.shape(leaf)) for name, leaf in tensors.items()}
                opened.write(write_header(shapes, shard.metadata))
                for name, leaf in tensors.items():
                    opened.writelines(_chunks(leaf, kept.get(paths[name])))
        if index:
            total = sum(size_of(str(leaf.dtype), np.shape(leaf)) for leaf in leaves.values())
            entries = sum(leaf.size for leaf in leaves.values())
            new[index[0]].write_text(write_index(layout, total, entries), encoding="utf-8")
        return sum(file.stat().st_size for file in new.values())


def load_safetensors(path: str | os.PathLike[str], like: Any = None) -> Checkpoint:
    """Read safetensors files: one, a folder of them, or those that an index names.

    The files are mapped into memory and not read: a tensor is a read-only view, whose bytes are read when it
    is used, and which the system may drop again.

    Args:
      path: of a file, of an index (it ends in .json), or of a folder that holds `model.safetensors`, else an
        index, else one other safetensors file.
      like: a tree of arrays or `jax.ShapeDtypeStruct` that gives the result its structure; the tensors must
        have its paths, shapes and dtypes. Without it, params are nested dicts: names are split at "." and
        "/", so that "model.norm.weight" is `params["model"]["norm"]["weight"]`, whose path is
        "model/norm/weight".

    Returns:
      A `Checkpoint` of numpy arrays.

    Raises:
      FileError: a file is damaged, or does not match `like`; a folder without such files; an index that
        names a file or a tensor that is missing; two tensors of one path.

    Example:
      >>> import os, tempfile, numpy as np, jaxprune as jp
      >>> file = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> size = jp.io.save_safetensors(file, {"layers": {"0": {"weight": np.ones((2, 2))}}})
      >>> checkpoint = jp.io.load_safetensors(file)
      >>> jp.leaf_paths(checkpoint.params), checkpoint.layout.names
      (['layers/0/weight'], {'layers/0/weight': 'layers/0/weight'})
    """
    tensors: dict[str, np.ndarray] = {}
    shards: dict[str, Shard] = {}
    metadata: dict[str, str] = {}
    files, index = _files(path)
    for file, named in files.items():
        found, shard = _read_file(file)
        if named is not None and (lost := [name for name in named if name not in found]):
            raise FileError(f"{file}: it has no {some_of(lost)}, which the index says it holds.")
        for name in found:  # also those that an index leaves out, which other programs read as well
            if path_of(name) in tensors:
                raise FileError(f"{file}: {name!r} is a second tensor of the path {path_of(name)!r}.")
            tensors[path_of(name)] = found[name]
        shards[file.name] = shard
        metadata |= shard.metadata or {}
    layout = Layout(shards, index)
    if like is None:
        return Checkpoint(_nested(tensors, os.fspath(path)), metadata, layout)
    return Checkpoint(_as_in(like, tensors, os.fspath(path)), metadata, layout)


def _files(path: str | os.PathLike[str]) -> tuple[dict[Path, list[str] | None], dict[str, Any] | None]:
    """Return the files of a checkpoint, with the tensors that an index says they hold; and the index."""
    check_path(path)
    index = Path(path)
    if not os.path.isdir(path):
        if index.suffix != ".json":
            return {index: None}, None
    else:
        folder, index = index, index / INDEX
        if (folder / _WHOLE).exists():
            return {folder / _WHOLE: None}, None
        if not index.exists():
            found = sorted(file for file in folder.iterdir() if file.name.endswith(_SUFFIX))
            if len(found) != 1:
                some = f"{len(found)} safetensors files" if found else "no safetensors file"
                raise FileError(f"{folder}: it holds {some} and no {INDEX}. Give the path of a file.")
            return {found[0]: None}, None
    with open_file(index) as file:
        text = file.read()
    try:
        files, content = read_index(text)
    except FileError as error:
        raise FileError(f"{index}: {error}.") from None
    if lost := [file for file in files if not (index.parent / file).exists()]:
        raise FileError(f"{index}: it names {some_of(lost)}, which the folder does not hold.")
    return {index.parent / file: names for file, names in files.items()}, content


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], Shard]:
    """Map a file; return its tensors by name, and what is known of it."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        # An empty file cannot be mapped.
        data = memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ) if size else b""
    try:
        header = read_header(memoryview(data))
        tensors = {name: _array(name, data, tensor) for name, tensor in header.tensors.items()}
    except FileError as error:
        raise FileError(f"{path}: {error}.") from None
    return tensors, Shard({name: tensor.dtype for name, tensor in header.tensors.items()}, header.metadata)


def _array(name: str, data: Any, tensor: Tensor) -> np.ndarray:
    dtype, size = DTYPES[tensor.dtype], tensor.end - tensor.begin
    if size == 0:
        return np.zeros(tensor.shape, dtype)
    flat = np.frombuffer(data, np.uint8, size, tensor.begin)
    if tensor.dtype == "bool" and flat.max() > 1:
        raise FileError(f"{name[:200]!r} is of bools, and has bytes that are neither 0 nor 1")
    array = flat.view(dtype)
    return (array if sys.byteorder == "little" else array.byteswap()).reshape(tensor.shape)


def _nested(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Return nested dicts of tensors that are given by path."""
    root: dict[str, Any] = {}
    for path, array in tensors.items():
        *parents, last = path.split("/")
        node = root
        for step in parents:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise FileError(
                f"{name}: {path!r} is a tensor, and so is a part of its path, or it of another's."
            )
        node[last] = array
    return root


def _as_in(like: Any, tensors: Mapping[str, np.ndarray], name: str) -> Any:
    """Return tensors in the structure of `like`."""
    wanted = dict(zip(leaf_paths(like), jax.tree.leaves(like), strict=True))
    # A key of one's own dict may hold a dot, which splits a name.
    paths = {key: key if key in tensors else path_of(key) for key in wanted}
    if set(paths.values()) != tensors.keys():
        only = ", ".join(sorted(key for key in wanted if paths[key] not in tensors)) or "none"
        missing = ", ".join(sorted(tensors.keys() - set(paths.values()))) or "none"
        raise FileError(
            f"{name}: its tensors are not like's. Missing from like: {missing}. Only in like: {only}."
        )
    for key, leaf in wanted.items():
        if not is_array(leaf) or describe(leaf) != describe(tensors[paths[key]]):
            is_ = describe(leaf) if is_array(leaf) else f"a {type(leaf).__name__}"
            raise FileError(f"{name}: {key!r} is {describe(tensors[paths[key]])}, but {is_} in like.")
    return jax.tree.unflatten(jax.tree.structure(like), [tensors[paths[key]] for key in wanted])


def _check_leaf(name: str, leaf: Any) -> None:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"params[{name!r}] is {leaf.dtype}, a typed PRNG key. Save jax.random.key_data(key) in its place."
        )
    if str(leaf.dtype) not in CODES:
        raise TypeError(f"params[{name!r}] is {describe(leaf)}; safetensors holds {', '.join(CODES)}.")
    if not is_concrete(leaf):
        raise TypeError(f"params[{name!r}] holds no values now. Save outside of jit.")


def _check_names(paths: Mapping[str, str]) -> None:
    """Check that tensors, given with the paths of their leaves, have names that can be written and read."""
    read: dict[str, str] = {}
    for name, path in paths.items():
        if wrong := wrong_name(name):
            raise ValueError(f"params[{path!r}]: the name of its tensor {wrong}.")
        if (other := read.setdefault(path_of(name), path)) != path:
            raise ValueError(
                f"params[{other!r}] and params[{path!r}] would be read as one leaf, since names are split at "
                '"." and "/". Rename one.'
            )


def _placed(
    layout: Layout, path: str | os.PathLike[str], metadata: dict[str, str] | None
) -> tuple[Layout, Path]:
    """Return a layout with the names of the files to write, and their folder."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout= must be that of a Checkpoint, got {type(layout).__name__}.")
    if metadata is not None:
        shards = {file: shard._replace(metadata=metadata) for file, shard in layout.shards.items()}
        layout = layout._replace(shards=shards)
    target = Path(path)
    if target.is_dir() or not target.name.endswith(_SUFFIX):
        written = {*layout.shards, *([] if layout.index is None else [INDEX])}
        first = [name for name in (_WHOLE, INDEX) if name in written or (target / name).exists()]
        if first and first[0] not in written:
            raise ValueError(
                f"{target} holds {first[0]}, which would be read in place of what is written. Remove it, or "
                "give the path of another folder."
            )
        return layout, target
    if len(layout.shards) > 1 or layout.index is not None:
        raise ValueError(
            f"the layout is of {len(layout.shards)} files and an index, and {os.fspath(path)} is one file. "
            "Give the path of a folder, or leave layout= out."
        )
    return layout._replace(shards={target.name: next(iter(layout.shards.values()))}), target.parent


def _check_layout(layout: Layout, leaves: Mapping[str, Any]) -> None:
    """Check that leaves are those of a layout, and of its dtypes."""
    dtypes = {path_of(n): dtype for shard in layout.shards.values() for n, dtype in shard.dtypes.items()}
    if dtypes.keys() != leaves.keys():
        lost, more = (
            some_of(sorted(each)) or "none" for each in (dtypes.keys() - leaves, leaves.keys() - dtypes)
        )
        raise ValueError(
            f"params are not those of the layout: missing from params: {lost}; only in params: {more}. "
            "layout.renamed() gives the layout of fewer tensors."
        )
    for path, dtype in dtypes.items():
        if str(leaves[path].dtype) != dtype:
            raise ValueError(
                f"params[{path!r}] is {describe(leaves[path])}, but {dtype} in the checkpoint. Cast it with "
                f"astype({dtype!r}), or leave layout= out."
            )


def _chunks(leaf: Any, mask: Any) -> Iterator[memoryview]:
    """Yield the bytes of a leaf, with zeros where its mask is False, and never a copy of the whole."""
    array = np.asarray(leaf, order="C").reshape(-1)
    kept = None if mask is None else np.asarray(mask).reshape(-1)
    step = max(1, _CHUNK // array.dtype.itemsize)
    for start in range(0, array.size, step):
        part = array[start : start + step]
        if kept is not None:
            part = np.asarray(masked(part, kept[start : start + step]))
        if sys.byteorder == "big":
            part = part.byteswap()
        yield part.view(np.uint8).data
