"""Lines of results, read from any JSON-lines files and put into sections."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.report.design import Design, from_json

# What says where a line is from; everything else in it is a field.
_ABOUT = ("study", "config", "versions", "command", "design")
# Settings in which replicates may differ: where they wrote, and what they timed.
_NOT_SETTINGS = ("out", "dense", "fresh", "timing_runs", "batch_sizes")
# Settings that make two runs of a study two sections: figures of different tasks are not compared.
_TASK = ("dataset", "network", "model")


UNFINISHED = "unfinished"
"""The folder of a run of a study that has not ended, beside what it will replace."""


class ReportError(Exception):
    """Results that no report can be made of; its text is for whoever asked for one."""


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      file, number: where it stands.
      study, config, versions, command: what it says of its run; the config with names such as "a.b".
      fields: everything else but layers, with names such as "a.b" for what was nested.
      layers: by field, {path: [kept, size]} or {path: kept}.
      masks: a file beside the line's file, or None.
      design: the roles of its fields, if its study declares them.
    """

    file: Path
    number: int
    study: str
    config: dict[str, Any]
    versions: dict[str, Any]
    command: str | None
    fields: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    masks: str | None
    design: Design | None = None


class Section(NamedTuple):
    """Lines of one study on one task.

    Attributes:
      study: its name.
      task: which data and network, as far as the configs say.
      lines: those whose figures are compared; settings that differ between them are fields.
      settings: the names of these fields.
    """

    study: str
    task: dict[str, Any]
    lines: list[Line]
    settings: tuple[str, ...] = ()


def read(results: Sequence[str | Path]) -> tuple[list[Line], list[str]]:
    """Return all lines of files, and of the `.jsonl` files of folders.

    Args:
      results: files and folders; a file that is met twice is read once.

    Returns:
      The lines, and remarks on what was left out: the torn last line of a run that was killed, and empty
      files in a folder.

    Raises:
      ReportError: there is no such file, it is empty, or a line of it is not a JSON object.
    """
    lines: list[Line] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for given in map(Path, results):
        try:
            found = given.exists()
        except OSError as error:
            raise ReportError(f"{str(given)[:80]}: {error.strerror}.") from None
        if not found:
            raise ReportError(f"{given}: there is no such file or folder.")
        files = _of_folder(given, notes) if given.is_dir() else [given]
        if not files:
            raise ReportError(f"{given}: there is no .jsonl file in this folder.")
        for file in files:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            own, torn = _read_file(file)
            if torn:
                notes.append(f"{file}: the last line is torn, as a killed run leaves it, and was left out.")
            if not own and file == given:
                raise ReportError(f"{file} has no line of results.")
            if not own:
                notes.append(f"{file} has no line of results.")
            lines += own
    if not lines:
        raise ReportError(f"nothing to show: {' '.join(notes)}")
    return lines, notes


def _of_folder(folder: Path, notes: list[str]) -> list[Path]:
    """Return the `.jsonl` files of a folder; of runs that have not ended only where there is nothing else."""
    files = sorted(folder.rglob("*.jsonl"))
    ended = [file for file in files if UNFINISHED not in file.relative_to(folder).parts]
    for file in files:
        if file not in ended:
            what = f"was left out; {file.parent} shows it" if ended else "is shown"
            notes.append(f"{file}, of a run that has not ended, {what}.")
    return ended or files


def sections(lines: Sequence[Line]) -> list[Section]:
    """Return the lines by study and task, in order of appearance.

    Where runs of a section differ in a setting, every line gets it as a field, so that they are told apart:
    but for where they wrote, and for lists such as `seeds` that the lines spell out as `seed`.
    """
    found: dict[tuple, list[Line]] = {}
    for line in lines:
        task = {key: line.config.get(key) for key in _TASK}
        found.setdefault((line.study, json.dumps(task, default=str)), []).append(line)
    made = []
    for (study, task), own in found.items():
        known = {key: value for key, value in json.loads(task).items() if value is not None}
        made.append(Section(study, known, *_with_settings(own)))
    return made


def differing(dicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that not all dicts have with the same value, in order of appearance."""
    keys = dict.fromkeys(key for one in dicts for key in one)
    return [key for key in keys if len({repr(one.get(key, _ABSENT)) for one in dicts}) > 1]


_ABSENT = object()


def distinct(dicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the dicts that differ, in order of appearance."""
    return list({repr(sorted(one.items(), key=lambda item: item[0])): one for one in dicts}.values())


def _with_settings(lines: list[Line]) -> tuple[list[Line], tuple[str, ...]]:
    keys = differing(distinct([line.config for line in lines]))
    fields = {field for line in lines for field in line.fields}

    def spelled_out(key: str) -> bool:
        return any(key in (f"{field}s", f"{field}es", f"{field[:-1]}ies") for field in fields)

    keys = [k for k in keys if k not in _NOT_SETTINGS and not spelled_out(k) and k not in fields]
    made = [
        line._replace(fields={key: _setting(line.config.get(key)) for key in keys} | line.fields)
        for line in lines
    ]
    return made, tuple(keys)


def _setting(value: Any) -> Any:
    """Return a setting as a field: "default" for none, text for a list."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else value


def _read_file(file: Path) -> tuple[list[Line], bool]:
    """Return the lines of a file, and whether the last one is torn."""
    if not file.is_file():
        raise ReportError(f"{file}: neither a file nor a folder.")
    try:
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ReportError(f"{file} cannot be read: {error.strerror}.") from None
    rows = text.split(b"\n")
    lines = []
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            lines.append(_line(file, number, row))
        except (ValueError, RecursionError) as error:
            # Results are written a line at a time, so only what lacks its end of line can be torn.
            if number == len(rows) and isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                return lines, True
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ReportError(f"{file}, line {number}: not a JSON object ({reason}).") from None
    return lines, False


def _line(file: Path, number: int, row: bytes) -> Line:
    # Whole numbers beyond the floats are infinite, here and for all that follows.
    data = json.loads(
        row.decode("utf-8"), parse_int=lambda digits: (int if len(digits) < 300 else float)(digits)
    )
    if not isinstance(data, dict):
        raise ValueError(f"got a {type(data).__name__}")
    layers, rest = {}, {}
    masks = data.get("masks")
    for key, value in data.items():
        if key in _ABOUT or (key == "masks" and isinstance(value, str)):
            continue
        if _is_layers(key, value):
            layers[key] = value
        else:
            rest[key] = value
    config, versions, command, design = (data.get(key) for key in _ABOUT[1:])
    study = data.get("study")
    return Line(
        file=file,
        number=number,
        study=study if isinstance(study, str) and study.strip() else _name(file),
        config=dict(_flat(config)) if isinstance(config, dict) else {},
        versions=dict(_flat(versions)) if isinstance(versions, dict) else {},
        command=command if isinstance(command, str) else None,
        fields=dict(_flat(rest)),
        layers=layers,
        masks=masks if isinstance(masks, str) else None,
        design=from_json(design),
    )


def _name(file: Path) -> str:
    """Return what lines without a study are called: the file, or the folder of a `results.jsonl`."""
    return file.resolve().parent.name if file.stem == "results" else file.stem


def _is_layers(key: str, value: Any) -> bool:
    """Return whether a field holds a count, or [kept, size], for each of several paths."""
    if not isinstance(value, dict) or not value:
        return False
    if key not in ("layers", "widths") and not all("/" in path for path in value):
        return False
    return all(_count(x) for x in value.values()) or all(
        isinstance(x, list) and len(x) == 2 and all(map(_count, x)) and x[0] <= x[1] and x[1]
        for x in value.values()
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def natural(text: str) -> tuple:
    """Return a key that sorts "conv10" after "conv2"."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text))
