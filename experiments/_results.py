"""What a study writes down: lines of figures, each with the settings and versions behind it."""

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from experiments import _recipes


class Results:
    """A folder of results: `results.jsonl`, one line per figure, `recipe.yaml` to repeat them, and plots.

    Every line holds the study, the whole config, the command and the versions, so that a line moved elsewhere
    still says what it is. An earlier run's lines in the same folder are replaced. `experiments.report` makes
    a page of them; for it a line may also hold `layers`, see `layers`, and `masks`, see `keep_masks`.
    """

    def __init__(self, folder: str | Path, study: str, config: Any, recipe: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        _recipes.save_study(self.folder, study, config, recipe)
        self.path = self.folder / "results.jsonl"
        self._common = {
            "study": study,
            "config": dataclasses.asdict(config),
            "versions": versions(),
            "command": command(),
        }
        self._file = self.path.open("w", encoding="utf-8")

    def write(self, **figures: Any) -> None:
        """Appends a line and flushes it, so that a killed run leaves what it had."""
        self._file.write(json.dumps(figures | self._common) + "\n")
        self._file.flush()

    def keep_masks(self, name: str, masks: Any) -> str:
        """Writes the masks of one network beside the lines, for pictures of them; `jp.io.load` reads them.

        Args:
          name: of the file, without an ending; a file of that name is replaced.
          masks: a pytree of bool arrays.

        Returns:
          The file, relative to the folder: what the line's field `masks` says.
        """
        file = Path("masks") / f"{name}.jp"
        (self.folder / file).parent.mkdir(exist_ok=True)
        jp.io.save(self.folder / file, masks)
        return file.as_posix()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def layers(masks: Any) -> dict[str, list[int]]:
    """What is left of each layer: `{path: [entries kept, entries]}` of leaves of two and more axes.

    Example:
      >>> layers({"fc/kernel": np.array([[True, False, True]]), "fc/bias": np.array([True])})
      {'fc/kernel': [2, 3]}
    """
    leaves = zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True)
    return {path: [int(np.sum(leaf)), leaf.size] for path, leaf in leaves if leaf.ndim >= 2}


def versions() -> dict[str, str]:
    """The versions and the device that a figure depends on."""
    packages = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {package: version(package) for package in packages}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


def command() -> str:
    """The command that is running, as one would type it."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    run = f"python -m {module}" if module else f"python {Path(sys.argv[0]).name}"
    return shlex.join([*run.split(), *sys.argv[1:]])
