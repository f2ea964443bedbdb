"""How a checkpoint lies on the disk: which tensors in which file, by which names."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxprune.files.opened import FileError
from jaxprune.io.tensor_header import unique_keys
from jaxprune.tree.paths import some_of

INDEX = "model.safetensors.index.json"


class Shard(NamedTuple):
    """One file of a checkpoint.

    Attributes:
      dtypes: by the name of each tensor, in the file's order, numpy's name of its dtype.
      metadata: texts by text; None if the file has none.
    """

    dtypes: dict[str, str]
    metadata: dict[str, str] | None


class Layout(NamedTuple):
    """The files of a checkpoint, without the values.

    Attributes:
      shards: by file name.
      index: what the index holds beside the place of each tensor; None if there is no index.
    """

    shards: dict[str, Shard]
    index: dict[str, Any] | None

    @property
    def names(self) -> dict[str, str]:
        """The name of each tensor, by the path of its leaf."""
        return {path_of(name): name for shard in self.shards.values() for name in shard.dtypes}

    def renamed(self, names: Mapping[str, str]) -> "Layout":
        """Return the layout of some tensors under new names, each in the file it was in.

        For a network that lost layers: the tensors of those are left out, later ones take their names.

        Args:
          names: the new name of each tensor that stays, by its old name.

        Raises:
          ValueError: an old name that is not in the layout; two tensors of the same new name.

        Example:
          >>> import os, tempfile, numpy as np, jaxprune as jp
          >>> file = os.path.join(tempfile.mkdtemp(), "model.safetensors")
          >>> size = jp.io.save_safetensors(file, {"layers": {"0": np.ones(2), "1": np.zeros(2)}})
          >>> layout = jp.io.load_safetensors(file).layout
          >>> layout.renamed({"layers/1": "layers/0"}).names
          {'layers/0': 'layers/0'}
        """
        if unknown := names.keys() - set(self.names.values()):
            raise ValueError(f"renamed() is given {some_of(unknown)}, which the layout does not hold.")
        if len({path_of(new) for new in names.values()}) != len(names):
            raise ValueError("renamed() gives two tensors the same name.")
        shards = {
            file: Shard({names[n]: dtype for n, dtype in shard.dtypes.items() if n in names}, shard.metadata)
            for file, shard in self.shards.items()
        }
        return Layout({file: shard for file, shard in shards.items() if shard.dtypes}, self.index)


def path_of(name: str) -> str:
    """Return the path of the leaf that a tensor becomes: its name, split at "." and at "/"."""
    return name.replace(".", "/")


def read_index(text: bytes) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Read an index: the names of the tensors in each file, and what else it holds.

    Raises:
      FileError: what is wrong; it does not name the index.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FileError(f"it cannot be read: {error}") from None
    places = content.pop("weight_map", None) if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise FileError("it has no weight_map with the file of each tensor")
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise FileError(f"{name[:200]!r} lies in {file[:200]!r}, which is not the name of a file")
        files.setdefault(file, []).append(name)
    return files, content


def write_index(layout: Layout, total: int, entries: int) -> str:
    """Return the text of an index of tensors that take `total` bytes and hold so many `entries`.

    What it says of sizes stays while the total is the same: programs count tied tensors in their own way.
    """
    assert layout.index is not None
    content = dict(layout.index)
    metadata = content.get("metadata")
    if isinstance(metadata, dict) and metadata.get("total_size") != total:
        sizes = {"total_size": total, "total_parameters": entries}
        content["metadata"] = metadata | {key: size for key, size in sizes.items() if key in metadata}
    places = {name: file for file, shard in layout.shards.items() for name in shard.dtypes}
    return (
        json.dumps(content | {"weight_map": dict(sorted(places.items()))}, indent=2, ensure_ascii=False)
        + "\n"
    )
