"""What a setting may be: limits stated in its type, and the sentence that refuses anything else."""

import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

LARGEST = 2**31 - 1
"""The largest whole number allowed, either way: these become counts and sizes on the device."""

_LONGEST_PATH = 1000


class FlagError(ValueError):
    """A setting that is not allowed, or does not go with the others or the data; it names the flag."""


@dataclass(frozen=True)
class Range:
    """The bounds of a number, as in `Annotated[float, Range(at_least=0, below=1)]`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """Return what is wrong with a number, or None.

        Example:
          >>> Range(at_least=0, below=1).problem(1.5)
          'must be 0 or more and below 1, got 1.5'
          >>> Range(above=0).problem(float("nan"))
          'must be a finite number and above 0, got nan'
        """
        if not math.isfinite(value):
            return f"must be {self._allowed('a finite number')}, got {value}"
        if isinstance(value, int) and abs(value) > LARGEST:
            return f"must be {self._allowed(f'at most {LARGEST:,}')}, got {shown(value)}"
        inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if inside else f"must be {self._allowed()}, got {value}"

    def _allowed(self, *more: str) -> str:
        words = {"at_least": "{} or more", "above": "above {}", "at_most": "at most {}", "below": "below {}"}
        bounds = {kind: bound for kind in words if (bound := getattr(self, kind)) is not None}
        texts = {kind: f"{x:,}" if isinstance(x, int) else f"{x:g}" for kind, x in bounds.items()}
        return " and ".join([*more, *(words[kind].format(text) for kind, text in texts.items())])


@dataclass(frozen=True)
class OneOf:
    """The texts that are allowed, where they are not written out as a `Literal`."""

    choices: Sequence[str]


@dataclass(frozen=True)
class Items:
    """Whether a tuple may be empty, and whether it may have an item twice; neither unless stated."""

    empty: bool = False
    repeats: bool = False


@dataclass(frozen=True)
class Writable:
    """A path that a run is going to write to. The command line checks it, when the run is about to start."""

    kind: Literal["folder", "file"]


def find(hint: Any, kind: type) -> Any:
    """Return the limit of a kind that a type carries at any depth, or None.

    Example:
      >>> find(tuple[Annotated[str, OneOf(("a", "b"))], ...] | None, OneOf)
      OneOf(choices=('a', 'b'))
    """
    for part in typing.get_args(hint):
        if isinstance(part, kind):
            return part
        if (found := find(part, kind)) is not None:
            return found
    return None


def problem(hint: Any, value: Any, limit: Any = None) -> str | None:
    """Return what is wrong with a value of a type, or None.

    Numbers must be finite, whole ones at most 2^31 - 1, and texts printable and not empty, whatever else the
    type states.

    Args:
      hint: int, float, str, bool, a `Literal`, a tuple of these, any of them `| None`, or `Annotated` with
        `Range`, `OneOf`, `Items` or `Writable`.
      value: anything.
      limit: what an `Annotated` around the type states; for the recursion.

    Example:
      >>> problem(tuple[int, ...], (0, 1, 0))
      'has 0 twice'
      >>> problem(tuple[Annotated[int, Range(at_least=1)], ...] | None, (3, 0))
      'must be 1 or more, got 0'
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return problem(parts[0], value, parts[1])
    if origin in (types.UnionType, typing.Union):
        return None if value is None else problem(parts[0], value, limit)
    if origin is tuple:
        items = limit or Items()
        if not isinstance(value, tuple):
            return f"must be a tuple, got {shown(value)}"
        if not value and not items.empty:
            return "needs at least one value"
        if wrong := next(filter(None, (problem(parts[0], item) for item in value)), None):
            return wrong
        twice = [item for index, item in enumerate(value) if item in value[:index]]
        return f"has {shown(twice[0])} twice" if twice and not items.repeats else None
    if hint is bool:
        return None if isinstance(value, bool) else f"must be true or false, got {shown(value)}"
    if hint in (int, float):
        if not isinstance(value, int if hint is int else (int, float)) or isinstance(value, bool):
            return f"must be {'a whole number' if hint is int else 'a number'}, got {shown(value)}"
        return (limit or Range()).problem(value)
    if choices := parts or (limit.choices if isinstance(limit, OneOf) else ()):
        allowed = f"must be{' one of' * (len(choices) > 1)} {', '.join(choices)}"
        return None if value in choices else f"{allowed}; got {shown(value)}"
    if not isinstance(value, str):
        return f"must be text, got {shown(value)}"
    if not value.strip():
        return "must not be empty"
    # Neither control characters nor bytes that are not UTF-8.
    return None if value.isprintable() else f"must be printable text, got {shown(value)}"


def flag_name(field: str) -> str:
    """Return the flag of a field.

    Example:
      >>> flag_name("batch_size")
      '--batch-size'
    """
    return f"--{field.replace('_', '-')}"


def shown(value: Any) -> str:
    """Return a value as it stands in a message: in ASCII, and cut where it is long."""
    if isinstance(value, int) and abs(value) > 10**60:
        return f"a number of {int(math.log10(abs(value))) + 1:,} digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unwritable(text: str, kind: Literal["folder", "file"]) -> str | None:
    """Return why nothing could be written to a path, or None if it seems possible."""
    if len(text) > _LONGEST_PATH:
        return f"is too long for a path, {len(text):,} characters"
    try:
        path = next(path for path in (Path(text), *Path(text).parents) if os.path.lexists(path))
        if path != Path(text) and not path.is_dir():
            return f"is below {shown(str(path))}, which is no folder"
        if path == Path(text) and path.is_dir() != (kind == "folder"):
            wanted = "give a folder" if kind == "folder" else "give the name of a file in it"
            return f"is {'a folder' if path.is_dir() else 'no folder'}, {shown(text)}: {wanted}"
        Path(text).exists()  # a name too long raises
        if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
            return f"cannot be written to, {shown(text)}"
    except StopIteration:
        return f"lies in a folder that is gone, {shown(text)}"
    except OSError as error:
        return f"is no path that can be made, {shown(text)}: {error.strerror}"
    return None
