"""What a study writes down: lines of figures, each with the settings and versions behind it."""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from experiments.report.design import Design
from experiments.report.read import UNFINISHED
from experiments.run import saved_recipes, stopping
from jaxprune.files.atomic import replacing

_WHOLE = "whole.jsonl"
_LINES = "results.jsonl"
_KEPT = "kept"
_COMMON = ("study", "config", "versions", "command", "design")


class Results:
    """A folder of results: `results.jsonl`, one line per figure, `recipe.yaml` to repeat them, and plots.

    Every line holds the study, the whole config, the command, the versions and the roles of its fields, so
    that a line moved elsewhere still says what it is. `experiments.report` makes a page of them. A line may
    also hold `layers`, see `layers`, and `masks`, see `keep_masks`.

    A run writes to the folder `unfinished` until it has ended well; then its files replace an earlier run's
    all at once. So a run that fails or is killed leaves the earlier results untouched, and what it had
    finished in `unfinished`, from which a study that can resume does. Lines are added in units, such as all
    seeds of a method, of which a killed run leaves all or nothing.

    Only one run at a time may have the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        study: str,
        config: Any,
        recipe: Mapping[str, Any] | None = None,
        *,
        design: Design | None = None,
        resume: bool | None = None,
        adds: bool = False,
        may_differ: Sequence[str] = ("out", "fresh"),
    ):
        """State what the run is; nothing is touched before the block is entered.

        Args:
          folder: of the results.
          study, config, recipe: what every line, and `recipe.yaml`, say of the run.
          design: what the fields of the lines mean, for `experiments.report`.
          resume: whether to keep the lines of an unfinished run, if there is one, or drop them; None if the
            study cannot resume.
          adds: whether to add to the lines of a finished run, if nothing is unfinished.
          may_differ: settings that may differ from those of the run that is resumed.
        """
        self.folder = Path(folder)
        self.unfinished = self.folder / UNFINISHED
        self.lines: list[dict[str, Any]] = []  # the figures of all finished units, in order
        self._study, self._config, self._recipe = study, config, recipe
        self._design = design
        self._resume, self._adds, self._may_differ = resume, adds, may_differ
        self._rows: list[bytes] = []  # of an earlier run, to be written before this one's
        self._common: dict[str, Any] = {}
        self._file: int | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Results":
        """Take the folder, and what an earlier run left in it.

        Raises:
          SystemExit: another run has the folder; it holds lines of other settings, or damaged ones.
          OSError: it cannot be written to.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(stopping.locked(self.folder))
            for file in self.folder.glob(".*.????????????????.tmp"):  # of plots, of `replacing`
                file.unlink()
            if (self.unfinished / _WHOLE).exists():  # a run was killed in its very last moment
                self._settle()
            if self._resume:
                self._take_up()
            elif self.unfinished.exists():
                shutil.rmtree(self.unfinished)
            values = (self._study, dataclasses.asdict(self._config), versions(), command())
            self._common = dict(zip(_COMMON, values, strict=False))
            if self._design:
                self._common["design"] = self._design.as_json()
            self._stack = stack.pop_all()
        return self

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the lines of a unit and flushes them, so that a killed run leaves them whole."""
        lines = [dict(line) for line in lines]
        rows = "".join(json.dumps(line | self._common) + "\n" for line in lines)
        with stopping.shielded():
            self._append(rows.encode() + _END)
            self.lines += lines

    def write(self, **figures: Any) -> None:
        """Append a line that is a unit by itself."""
        self.add([figures])

    def done(self, **fields: Any) -> bool:
        """Return whether there are lines that have these fields: the unit need not be run again."""
        return any(all(line.get(k) == v for k, v in fields.items()) for line in self.lines)

    def drop_lines(self) -> None:
        """Drop the lines of an earlier run, which the study has from elsewhere. Files stay."""
        self.lines, self._rows = [], []
        (self.unfinished / _LINES).unlink(missing_ok=True)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what is trained once and many units start from; a resumed run reads it from the file `name`.

        `make` gives a pytree of arrays. They come from the file in either case, as numpy.
        """
        file = self.unfinished / _KEPT / f"{name}.jp"
        if file.exists():
            try:
                return jp.io.load(file).params
            except jp.io.FileError as error:
                print(f"{error} It is made again.", file=sys.stderr)
        made = make()
        self._begin()
        file.parent.mkdir(exist_ok=True)
        with stopping.shielded():
            jp.io.save(file, made)
        return jp.io.load(file).params

    def file(self, name: str) -> Path:
        """Return where to write a file that belongs to the lines; the end of the run moves it."""
        self._begin()
        return self.unfinished / name

    def keep_masks(self, name: str, masks: Any) -> str:
        """Write the masks of one network, a pytree of bool arrays, beside the lines, for pictures of them.

        Returns:
          The file, relative to the folder: what the line's field `masks` says. `jp.io.load` reads it.
        """
        file = Path("masks") / f"{name}.jp"
        path = self.file(str(file))
        path.parent.mkdir(exist_ok=True)
        with stopping.shielded():
            jp.io.save(path, masks)
        return file.as_posix()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._stack:
            try:
                if error is None:
                    self._end()
            except BaseException as failure:
                stopping.keep(failure, self._left())
                raise
            finally:
                if self._file is not None:
                    os.close(self._file)
            if error is not None:
                stopping.keep(error, self._left())

    def _left(self) -> str:
        """Return a sentence on what a run that has not ended leaves, and how to resume it."""
        if self._resume is None:
            return (
                f"Its results so far are in {self.unfinished}. This study starts over when it is run again."
            )
        flags = "The same command" if self._resume else "The same command without --fresh"
        count = (
            f"{len(self.lines):,} lines of results are" if len(self.lines) != 1 else "1 line of results is"
        )
        return f"{count} kept in {self.unfinished}. {flags} resumes from there."

    def _take_up(self) -> None:
        """Take up the lines of an earlier run, if there are any."""
        place = self.unfinished
        if self._adds and not (place / _LINES).exists():
            place = self.folder
        rows, lines, problem = _whole_rows(place / _LINES), [], ""
        try:
            lines = [json.loads(row) for row in rows]
            lines = [{k: v for k, v in line.items() if k not in _COMMON} for line in lines]
            if differ := self._differing((place / "recipe.yaml").read_text(encoding="utf-8")):
                names = ", ".join(differ)
                problem = f"is of a run with other settings ({names}). Give the same flags to resume it"
        except (ValueError, AttributeError, OSError) as error:
            problem = f"cannot be resumed from ({error}). Mend it"
        if problem and rows:
            raise SystemExit(f"{place / _LINES} {problem}, another --out, or --fresh to start over.")
        if problem and self.unfinished.exists():  # it had not finished anything
            shutil.rmtree(self.unfinished)
        self.lines, self._rows = lines, rows

    def _differing(self, recipe: str) -> list[str]:
        """Return the settings that are not those of a `recipe.yaml`."""
        earlier = saved_recipes.plain_settings(recipe)
        own = saved_recipes.plain_settings(saved_recipes.study_text(self._study, self._config, self._recipe))
        keys = [key for key in dict.fromkeys([*earlier, *own]) if key not in self._may_differ]
        return [key for key in keys if earlier.get(key, _ABSENT) != own.get(key, _ABSENT)]

    def _begin(self) -> None:
        """Make the folder of this run's files."""
        if self._file is not None:
            return
        self.unfinished.mkdir(exist_ok=True)
        with replacing(self.unfinished / "recipe.yaml") as new:
            new.write_text(
                saved_recipes.study_text(self._study, self._config, self._recipe), encoding="utf-8"
            )
        # Written anew, so that what a killed run left of a unit is gone.
        with replacing(self.unfinished / _LINES) as new:
            new.write_bytes(b"".join(row + b"\n" for row in self._rows) + _END)
        self._file = os.open(self.unfinished / _LINES, os.O_WRONLY | os.O_APPEND)

    def _append(self, data: bytes) -> None:
        self._begin()
        assert self._file is not None
        size = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:  # such as a full disk's
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise OSError(error.errno, error.strerror, str(self.unfinished / _LINES)) from None

    def _end(self) -> None:
        """Let the run's files replace an earlier run's."""
        with stopping.shielded():
            self._begin()
            with replacing(self.unfinished / _WHOLE) as new:
                new.write_bytes(b"".join(row + b"\n" for row in _whole_rows(self.unfinished / _LINES)))
            self._settle()

    def _settle(self) -> None:
        """Move the files once all lines are written; interrupted anywhere, it can be done again."""
        (self.unfinished / _LINES).unlink(missing_ok=True)
        for file in sorted(self.unfinished.rglob("*")):
            name = file.relative_to(self.unfinished)
            if file.is_file() and name.parts[0] not in (_WHOLE, _KEPT) and not name.name.startswith("."):
                (self.folder / name).parent.mkdir(exist_ok=True)
                file.replace(self.folder / name)
        (self.unfinished / _WHOLE).replace(self.folder / _LINES)
        shutil.rmtree(self.unfinished)


_ABSENT = object()
_END = b"\n"
"""An empty line, which comes after each unit in the lines of a run that has not ended."""


def _whole_rows(file: Path) -> list[bytes]:
    """Return the lines of a file, without those of a unit that an unfinished run cut short."""
    if not file.exists():
        return []
    rows = file.read_bytes().split(b"\n")
    if file.parent.name == UNFINISHED:
        ends = [place for place, row in enumerate(rows[:-1]) if not row.strip()]
        rows = rows[: ends[-1]] if ends else []
    return [row for row in rows if row.strip()]


def layers(masks: Any) -> dict[str, list[int]]:
    """Return what is left of each layer: `{path: [entries kept, entries]}` of leaves of two and more axes.

    Example:
      >>> layers({"fc/kernel": np.array([[True, False, True]]), "fc/bias": np.array([True])})
      {'fc/kernel': [2, 3]}
    """
    leaves = zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True)
    return {path: [int(np.sum(leaf)), leaf.size] for path, leaf in leaves if leaf.ndim >= 2}


def versions() -> dict[str, str]:
    """Return the versions and the device that a figure depends on."""
    packages = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {package: version(package) for package in packages}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


def command() -> str:
    """Return the command that is running, as one would type it."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    run = f"python -m {module}" if module else f"python {Path(sys.argv[0]).name}"
    return shlex.join([*run.split(), *sys.argv[1:]])
