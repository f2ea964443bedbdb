"""Checkpoints of a study, one after each finished level, from which a stopped run resumes."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.run.stopping import locked, shielded


class Checkpoints:
    """A folder with the last two finished levels of a study: their arrays, and the lines of results.

    A level is written under another name and renamed when it is complete, so a run killed at any moment
    finds the level before, and nothing of the one it was in. Each level has a checksum of all its content: a
    run never resumes from a damaged level, but from the level before it. Levels are ordered by their numbers,
    whatever the clock says.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any]):
        """Open the folder, which no other run may then write to; `config` holds all the results depend on.

        Raises:
          SystemExit: the folder holds a run with other settings, or another run writes to it.
        """
        self.folder = Path(folder).absolute()
        self._config = json.loads(json.dumps(config))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,  # what a killed run was writing
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            with _quiet(), shielded():
                self._manager = ocp.CheckpointManager(self.folder, options=options)
                stack.callback(self._manager.close)
                earlier = self._earlier_config()
            if earlier is not None and earlier != self._config:
                keys = sorted(earlier.keys() | self._config.keys())
                differ = [key for key in keys if earlier.get(key) != self._config.get(key)]
                raise SystemExit(
                    f"{self.folder} holds a run with other settings ({', '.join(differ)}). "
                    "Give the same flags to resume it, another --out, or --fresh to start over."
                )
            self._close = stack.pop_all().close

    def restore(self, template: Any) -> tuple[Any, list[dict[str, Any]]] | None:
        """Return the state, in numpy, and the lines of the last finished level that is intact, or None.

        A damaged level is named on stderr, and removed when another takes its place. `template` is a tree of
        the state's structure, shapes and dtypes.
        """
        leaves, treedef = jax.tree.flatten(template)
        like = [np.zeros_like(leaf) for leaf in leaves]
        steps = self._steps()
        for place, step in enumerate(steps):
            try:
                with _quiet(), shielded():
                    state, lines = self._read(step, like)
            except Exception as error:  # whatever orbax makes of bytes that it did not write
                if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
                    raise
                older = steps[place + 1 : place + 2]
                then = f"trying {self.folder / str(older[0])}" if older else "starting over"
                why = str(error).partition("\n")[0][:200] or type(error).__name__
                print(f"{self.folder / str(step)} is damaged ({why}); {then}.", file=sys.stderr)
            else:
                return jax.tree.unflatten(treedef, state), lines
        return None

    def save(self, level: int, state: Any, lines: list[dict[str, Any]]) -> None:
        """Write a finished level: its state, and all lines up to it.

        Raises:
          OSError: it cannot be written; the level before it is kept.
        """
        # Host arrays: those of JAX are bound to the devices of this run.
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        # One array: of several, the threads that write the others print tracebacks when the disk is full.
        joined = np.frombuffer(b"".join(leaf.tobytes() for leaf in leaves), np.uint8)
        text = {"config": self._config, "lines": lines, "state_sha256": _digest(leaves)}
        text = json.loads(json.dumps(text))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave([joined]),
            lines=ocp.args.JsonSave(text | {"sha256": _text_digest(text)}),
        )
        with _quiet(), shielded():
            try:
                for step in self._steps():
                    if step >= level:  # damaged: from an intact one the run would have resumed
                        self._manager.delete(step)
                if not self._manager.save(level, args=args):
                    raise RuntimeError(f"level {level} was not saved in {self.folder}")
            except Exception as error:
                for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(partial, ignore_errors=True)
                if number := _errno(error):
                    raise OSError(number, os.strerror(number), str(self.folder)) from error
                raise

    def _steps(self) -> list[int]:
        """Return the levels there are, the last one first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def _earlier_config(self) -> dict[str, Any] | None:
        """Return the config of the last level whose text is whole."""
        for step in self._steps():
            with contextlib.suppress(Exception):
                return dict(self._text(step)["config"])
        return None

    def _read(self, step: int, like: list[np.ndarray]) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
        text = self._text(step)
        sizes = [leaf.nbytes for leaf in like]
        args = ocp.args.Composite(state=ocp.args.StandardRestore([np.zeros(sum(sizes), np.uint8)]))
        (joined,) = self._manager.restore(step, args=args)["state"]
        parts = np.split(np.asarray(joined), np.cumsum(sizes)[:-1])
        leaves = [
            part.copy().view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, like, strict=True)
        ]
        if text["state_sha256"] != _digest(leaves):
            raise ValueError("the checksum of its arrays is another")
        return leaves, text["lines"]

    def _text(self, step: int) -> dict[str, Any]:
        text = self._manager.restore(step, args=ocp.args.Composite(lines=ocp.args.JsonRestore()))["lines"]
        if text.pop("sha256", None) != _text_digest(text):
            raise ValueError("the checksum of its lines is another")
        return text

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()


def forget(folder: str | Path) -> None:
    """Remove checkpoints, if there are any and no other run writes to them."""
    folder = Path(folder)
    if folder.is_dir():
        with locked(folder):
            for entry in folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)


def _text_digest(text: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


def _digest(leaves: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _errno(error: BaseException | None) -> int | None:
    """Return the operating system's number of what went wrong, as Python or as tensorstore tells it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax's own log of errors, and the tracebacks of its threads: they are raised as well."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
