"""The layers that a run of `prune_layers` has solved, in a folder, so that a run that was stopped goes on."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.layer_report import LayerRow
from jaxprune.files.atomic import replacing
from jaxprune.tree.checks import shown


class SavedLayers:
    """A folder with a file for each layer that is solved, and one that says of which run they are."""

    def __init__(self, folder: str | os.PathLike[str], run: dict[str, Any]):
        """Open the folder, or make it.

        Args:
          folder: its path.
          run: what identifies the run, as JSON holds it.

        Raises:
          TypeError: `folder` is not a path.
          ValueError: the path is empty; the folder holds another run, or other files.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"checkpoint= must be the path of a folder, got {shown(folder)}.")
        if not os.fspath(folder):
            raise ValueError("checkpoint= is an empty path: pass the folder that solved layers are saved in.")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        head, run = self.folder / "run.json", json.loads(json.dumps(run))
        if head.exists():
            try:
                old = json.loads(head.read_text())
            except ValueError:
                old = {}
            different = [name for name in run if not isinstance(old, dict) or old.get(name) != run[name]]
            if different:
                raise ValueError(
                    f"checkpoint={os.fspath(folder)!r} is of another run: it differs in "
                    f"{', '.join(different)}. Pass another folder, or remove this one."
                )
        elif any(self.folder.iterdir()):
            raise ValueError(
                f"checkpoint={os.fspath(folder)!r} holds other files, and no run of prune_layers. Pass a "
                "folder of its own."
            )
        else:
            with replacing(head) as new:
                new.write_text(json.dumps(run, indent=1))

    def _file(self, number: int) -> Path:
        return self.folder / f"layer-{number:05}.npz"

    def load(self, number: int, name: str) -> tuple[dict[str, Any], LayerRow] | None:
        """Return the arrays and the row of the layer that was solved as the `number`-th; None if none was.

        Raises:
          ValueError: the file is damaged.
        """
        file = self._file(number)
        if not file.exists():
            return None
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as data:
                row = LayerRow(**json.loads(str(data["row"])))
                arrays = {
                    key[1:]: _unpacked(data[key], str(data[f"dtype {key[1:]}"]))
                    for key in data
                    if key[0] == "@"
                }
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{file} cannot be read ({error}): remove it, and the layer is solved again."
            ) from error
        if row.name != name:
            raise ValueError(
                f"{file} holds {row.name}, not {name}: it is of another run. Pass another folder."
            )
        return arrays, row

    def save(self, number: int, arrays: dict[str, Any], row: LayerRow) -> None:
        """Write a layer, as a whole or not at all."""
        content: dict[str, Any] = {"row": np.array(json.dumps(row._asdict()))}
        for key, array in arrays.items():
            content[f"@{key}"], content[f"dtype {key}"] = _packed(array)
        with replacing(self._file(number)) as new, new.open("wb") as file:
            np.savez(file, **content)


def _packed(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return an array in a dtype that numpy's files hold, and the name of its own: bfloat16 goes as bytes."""
    host = np.asarray(array)
    name = np.array(host.dtype.name)
    return (
        host
        if host.dtype.kind in "fbiu" and host.dtype.isbuiltin == 1
        else host.view(np.uint8 if host.dtype.itemsize == 1 else np.uint16)
    ), name


def _unpacked(array: np.ndarray, name: str) -> Any:
    dtype = jnp.dtype(name)
    return jnp.asarray(array if array.dtype == dtype else array.view(dtype))
