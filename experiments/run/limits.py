"""What the values of flags may be: limits declared beside each flag, and what is said beyond them."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

LARGEST = 2**31 - 1
"""What whole numbers are at most, either way: they become counts and sizes on the device."""

_LONGEST_PATH = 1000

Bound = float | str | None


class FlagError(ValueError):
    """Flags that do not go together, or not with the data; the message names them."""


class Limits(NamedTuple):
    """What a flag may be; of a tuple, what each of its items may be.

    Attributes:
      at_least, above, at_most, below: bounds of a number; a text is the field whose value is the bound.
      among: the texts that are allowed; any, if it is empty.
      repeats: whether a tuple may have an item twice.
      empty: whether a tuple may have no items.
      path: whether a text is a folder, or a file, to write to.
    """

    at_least: Bound = None
    above: Bound = None
    at_most: Bound = None
    below: Bound = None
    among: tuple[str, ...] = ()
    repeats: bool = False
    empty: bool = False
    path: Literal["folder", "file"] | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, whatever the other flags are; None if nothing is.

        Example:
          >>> Limits(at_least=0, below=1).problem(1.5)
          'must be 0 or more and below 1, got 1.5'
          >>> Limits(at_least=0).problem((0, 1, 0))
          'has 0 twice'
          >>> Limits().problem(float("nan"))
          'must be a finite number, got nan'
          >>> Limits(above=0, at_most="hours").problem(10**40)
          'must be at most 2,147,483,647 and above 0, got 10000000000000000000000000000000000000000'
        """
        if isinstance(value, tuple):
            if not value and not self.empty:
                return "needs at least one value"
            wrong = next(filter(None, map(self.problem, value)), None)
            twice = [item for index, item in enumerate(value) if item in value[:index]]
            return wrong or (f"has {shown(twice[0])} twice" if twice and not self.repeats else None)
        if isinstance(value, str):
            return self._of_text(value)
        if value is None or isinstance(value, bool):
            return None
        if not math.isfinite(value):
            return f"must be {self._allowed({}, 'a finite number')}, got {value}"
        if isinstance(value, int) and abs(value) > LARGEST:
            return f"must be {self._allowed({}, f'at most {LARGEST:,}')}, got {shown(value)}"
        return None if self._holds(value, {}) else f"must be {self._allowed({})}, got {value}"

    def beside(self, value: Any, others: Mapping[str, Any]) -> str | None:
        """What is wrong with a value beside those of the other flags.

        Example:
          >>> Limits(below="epochs").beside(5, {"epochs": 3})
          'must be below 3 (--epochs), got 5'
        """
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (int, float)) and not self._holds(item, others):
                return f"must be {self._allowed(others)}, got {item}"
        return None

    def _bounds(self, others: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
        """The bounds that are known, each with its name."""
        named = {"at_least": self.at_least, "above": self.above, "at_most": self.at_most, "below": self.below}
        found = {}
        for kind, bound in named.items():
            if isinstance(bound, str):
                if others.get(bound) is not None:
                    found[kind] = others[bound], f"{others[bound]} ({flag_name(bound)})"
            elif bound is not None:
                found[kind] = bound, f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
        return found

    def _holds(self, value: float, others: Mapping[str, Any]) -> bool:
        holds = {
            "at_least": lambda bound: value >= bound,
            "above": lambda bound: value > bound,
            "at_most": lambda bound: value <= bound,
            "below": lambda bound: value < bound,
        }
        return all(holds[kind](bound) for kind, (bound, _) in self._bounds(others).items())

    def _allowed(self, others: Mapping[str, Any], *more: str) -> str:
        words = {"at_least": "{} or more", "above": "above {}", "at_most": "at most {}", "below": "below {}"}
        said = [words[kind].format(name) for kind, (_, name) in self._bounds(others).items()]
        return " and ".join([*more, *said])

    def _of_text(self, text: str) -> str | None:
        if self.among:
            allowed = f"must be{' one of' * (len(self.among) > 1)} {', '.join(self.among)}"
            return None if text in self.among else f"{allowed}; got {shown(text)}"
        if not text.strip():
            return "must not be empty"
        if not text.isprintable():  # control characters, and bytes that are no UTF-8
            return f"must be printable text, got {shown(text)}"
        return _unfit(text, self.path) if self.path else None


def flag_name(field: str) -> str:
    """A field as its flag.

    Example:
      >>> flag_name("batch_size")
      '--batch-size'
    """
    return f"--{field.replace('_', '-')}"


def shown(value: Any) -> str:
    """A value in a message: in ASCII, and cut where it is long."""
    if isinstance(value, int) and abs(value) > 10**60:
        return f"a number of {int(math.log10(abs(value))) + 1:,} digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unfit(text: str, kind: str) -> str | None:
    """Why nothing could be written to a path; None if it seems it could."""
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
