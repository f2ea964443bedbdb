"""What a report is made of, whatever it is written as; and how its numbers are written."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.report.groups import Figure

_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Heading(NamedTuple):
    """A heading; level 2 is a section."""

    level: int
    text: str
    anchor: str


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
      text: what it says.
      bar: a fraction to draw as a bar, if any.
      marked: whether it is to stand out.
    """

    text: str
    bar: float | None = None
    marked: bool = False


class Table(NamedTuple):
    """A table.

    Attributes:
      caption: above it.
      heads: of the columns.
      rows: of cells, as many as there are heads.
      labels: how many columns, from the left, say what the row is; the others are numbers.
    """

    caption: str
    heads: list[str]
    rows: list[list[Cell]]
    labels: int


class Image(NamedTuple):
    """A picture.

    Attributes:
      name: of its file, with the ending svg or png.
      data: the file.
      caption: below it, and what it is for who cannot see it.
      width: in pixels, at most.
    """

    name: str
    data: bytes
    caption: str
    width: int


class Images(NamedTuple):
    """Pictures side by side."""

    images: list[Image]


class Code(NamedTuple):
    """Commands, to be copied."""

    text: str


class Link(NamedTuple):
    """An entry of the contents: a heading with a few words about what is below it."""

    text: str
    anchor: str
    about: str


class Contents(NamedTuple):
    """The sections."""

    links: list[Link]


Block = Heading | Text | Table | Images | Code | Contents


def column(figures: Sequence[Figure], percent: bool = False, whole: bool = False) -> list[str]:
    """Return means and standard deviations as text, with the same digits down the column.

    Args:
      figures: the cells; those found in none of their lines are "-", or "not finite" if they have values.
      percent: whether they are fractions to be shown times 100.
      whole: whether all values are whole numbers.

    Returns:
      Texts such as "97.46 ± 0.05"; the deviation is left out where the column has none, and "[2/3]" says
      that two of three lines have a finite value.

    Example:
      >>> column([Figure(0.9746, 0.0005, 0.974, 0.975, 3, 3)], percent=True)
      ['97.46 ± 0.05']
    """
    factor = 100 if percent else 1
    found = [f for f in figures if f.found]
    spread = any(f.sd > 0 for f in found)
    # Means of counts need no more than two digits.
    digits = 2 if percent or (whole and all(f.mean < 100 for f in found)) else None
    write = _writer([factor * f.mean for f in found], digits, whole and not spread)

    def text(figure: Figure) -> str:
        if not figure.found:
            return "-"
        own = write(factor * figure.mean)
        if spread and figure.found > 1:
            own += f" ± {write(factor * figure.sd, True)}"
        return own if figure.found == figure.lines else f"{own} [{figure.found}/{figure.lines}]"

    return [text(figure) for figure in figures]


def ranges(medians: Sequence[float], figures: Sequence[Figure]) -> list[str]:
    """Return lists of measurements as "median (least to most)"."""
    write = _writer([m for m in medians if math.isfinite(m)], None, False)
    return [
        f"{write(m)} ({write(f.least)} to {write(f.most)})" if f.found else "-"
        for m, f in zip(medians, figures, strict=True)
    ]


def _writer(values: Sequence[float], digits: int | None, whole: bool) -> Callable[..., str]:
    """Return how to write the numbers of a column: whole, with fixed digits, or with an exponent."""
    sizes = [abs(x) for x in values if x and math.isfinite(x)]
    most = max(sizes, default=1.0)
    least = min((size for size in sizes if size > 1e-12 * most), default=1.0)  # the rest is rounding
    if whole and most < 1e15:
        return lambda x, deviation=False: f"{x:,.0f}"
    if digits is None:
        if most >= 1e9 or most < 1e-2 or most / least > 1e5:
            return lambda x, deviation=False: f"{x:.2g}" if deviation else f"{x:.3g}"
        digits = max(0, min(6, 3 - math.floor(math.log10(most))))
    return lambda x, deviation=False: f"{x:,.{digits}f}"


def clean(text: str) -> str:
    r"""Return text without what no page may hold: control characters and halves of surrogate pairs.

    Example:
      >>> clean("a\x00b\tc")
      'a\ufffdb\tc'
    """
    return _UNFIT.sub("\ufffd", text)
