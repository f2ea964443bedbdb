"""Widths to round up to: the multiples of a number, or widths that were found to pay."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tree.checks import as_integer, is_number, shown

Multiple = int | tuple[int, ...]
"""What widths are rounded up to: multiples of a number, or rising widths, continued by the last step."""


@dataclass(frozen=True)
class Widths:
    """Widths that pay on one machine, as `metrics.good_widths` returns them; pass it as `multiple_of=`.

    It is a value: two are equal if all their fields are, and masks made with it depend on `widths` alone.

    Attributes:
      widths: rising; beyond the largest they go on by the last step.
      times: seconds of the call at each width that was measured, as pairs (width, seconds).
      what: what was measured: the shape and dtype, or the name of the function.
      device: where it was measured.
      tolerance: how much more time is taken for as fast: .05 is 5 %.

    Example:
      >>> import jaxprune as jp
      >>> widths = jp.metrics.Widths((8, 16, 32))
      >>> [widths.round_up(units) for units in (1, 8, 9, 17, 33)]
      [8, 8, 16, 32, 48]
      >>> jp.metrics.Widths.from_json(widths.to_json()) == widths
      True
    """

    widths: tuple[int, ...]
    times: tuple[tuple[int, float], ...] = ()
    what: str = ""
    device: str = ""
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", as_multiple(self.widths, "widths"))

    def round_up(self, units: int) -> int:
        """Return the smallest of the widths that holds so many units."""
        return int(round_up(np.asarray(as_integer(units, "units", at_least=0)), self.widths))

    def to_json(self) -> str:
        """Return the value as text, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Widths":
        """Return the value that `to_json` wrote.

        Raises:
          ValueError: the text is not of such a value.
        """
        wrong = f"expected the text that Widths.to_json() returns, got {shown(text)}."
        try:
            fields = json.loads(text)
            times = tuple((as_integer(w, "times", at_least=1), t) for w, t in fields.pop("times"))
            found = cls(tuple(fields.pop("widths")), times, **fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{wrong} {error}") from None
        numbers = (found.tolerance, *(seconds for _, seconds in times))
        if not all(map(is_number, numbers)) or not all(
            isinstance(t, str) for t in (found.what, found.device)
        ):
            raise ValueError(wrong)
        return found

    def __str__(self) -> str:
        widths = ", ".join(map(str, self.widths))
        return f"widths {widths}" + (f" ({self.what}; {self.device})" if self.times else "")


def as_multiple(value: Any, name: str) -> Multiple:
    """Return an argument `multiple_of` checked: a number of 1 or more, rising widths, or a `Widths`.

    Example:
      >>> as_multiple(8, "multiple_of"), as_multiple([4, 8], "multiple_of")
      (8, (4, 8))
    """
    if isinstance(value, Widths):
        return value.widths
    if not isinstance(value, Sequence) or isinstance(value, str):
        return as_integer(value, name, at_least=1, below=2**31)
    widths = tuple(as_integer(width, name, at_least=1, below=2**31, what="each width") for width in value)
    if not widths or any(low >= high for low, high in pairwise(widths)):
        raise ValueError(f"{name} must be rising widths, such as [8, 16, 32], got {shown(value)}.")
    return widths


def _last_step(widths: tuple[int, ...]) -> int:
    return widths[-1] - (0, *widths)[-2]


def round_up(counts: Any, multiple_of: Multiple) -> Any:
    """Return counts, an array of NumPy or of JAX, rounded up to a multiple or a width; 0 stays 0.

    Example:
      >>> import numpy as np
      >>> round_up(np.array([0, 3, 8, 9]), 4).tolist(), round_up(np.array([0, 3, 8, 9, 13]), (3, 8)).tolist()
      ([0, 4, 8, 12], [0, 3, 8, 13, 13])
    """
    if isinstance(multiple_of, int):
        return -(-counts // multiple_of) * multiple_of
    xp, last, step = _numpy_of(counts), multiple_of[-1], _last_step(multiple_of)
    widths = xp.asarray((0, *multiple_of), counts.dtype)
    inside = widths[xp.searchsorted(widths, xp.minimum(counts, last))]
    return xp.where(counts > last, last - (last - counts) // step * step, inside)


def round_down(counts: Any, multiple_of: Multiple) -> Any:
    """Return the largest multiple or width that counts hold, 0 where they hold none.

    Example:
      >>> import numpy as np
      >>> round_down(np.array([0, 3, 8, 9]), 4).tolist(), round_down(np.array([2, 3, 9, 13]), (3, 8)).tolist()
      ([0, 0, 8, 8], [0, 3, 8, 13])
    """
    if isinstance(multiple_of, int):
        return counts - counts % multiple_of
    xp, last, step = _numpy_of(counts), multiple_of[-1], _last_step(multiple_of)
    widths = xp.asarray((0, *multiple_of), counts.dtype)
    inside = widths[xp.searchsorted(widths, counts, side="right") - 1]
    return xp.where(counts > last, last + (counts - last) // step * step, inside)


def _numpy_of(array: Any) -> Any:
    return jnp if isinstance(array, jax.Array) else np
