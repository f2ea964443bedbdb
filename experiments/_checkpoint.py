"""Checkpoints of a study, one after each finished level, so that a killed run goes on from there."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """A folder with the last finished level of a study: its arrays, and its lines of results.

    A level is written under another name and renamed when it is whole, so a run killed at any
    moment finds the level before, and nothing of the one it was in.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any]):
        """Opens the folder.

        Args:
          folder: where to write.
          config: everything the results depend on. A folder of another config is refused.

        Raises:
          SystemExit: the folder holds a run with other settings.
        """
        self.folder = Path(folder).absolute()
        self._config = json.loads(json.dumps(config))
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        step = self._manager.latest_step()
        if step is not None:
            earlier = self._text(step)["config"]
            if earlier != self._config:
                keys = sorted(earlier.keys() | self._config.keys())
                differ = [key for key in keys if earlier.get(key) != self._config.get(key)]
                raise SystemExit(
                    f"{self.folder} holds a run with other settings ({', '.join(differ)}). "
                    "Give the same flags to go on with it, another --out, or --fresh to start over."
                )

    def restore(self, template: Any) -> tuple[Any, list[dict[str, Any]]] | None:
        """The state and lines of the last finished level, or None.

        Args:
          template: a tree of the state's structure, shapes and dtypes.

        Returns:
          The state, as numpy arrays, and the lines.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves, treedef = jax.tree.flatten(template)
        like = [np.zeros_like(leaf) for leaf in leaves]
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        return jax.tree.unflatten(treedef, restored["state"]), self._text(step)["lines"]

    def save(self, level: int, state: Any, lines: list[dict[str, Any]]) -> None:
        """Writes a finished level: its state, and all lines up to it."""
        # Host arrays: those of JAX are bound to the devices there were.
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        self._manager.save(
            level,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                lines=ocp.args.JsonSave({"config": self._config, "lines": lines}),
            ),
        )

    def _text(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(lines=ocp.args.JsonRestore()))["lines"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()


def forget(folder: str | Path) -> None:
    """Removes checkpoints, if there are any."""
    shutil.rmtree(folder, ignore_errors=True)
