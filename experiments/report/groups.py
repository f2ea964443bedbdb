"""The lines of a section in parts and groups, and the figures over the seeds of a group.

A study declares the roles of its fields, see `experiments.report.design`. Lines of unknown origin get a
plain default: text that differs is a factor; a number is a level where it is needed to tell lines of one seed
apart, if every seed has the same values of it (or, where there is one seed, if it is whole); all other
numbers are figures.

Lines that have different factors are in different parts, each with tables of its own, unless those of one
have some of the factors of the other and measure the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report.design import Axis, Design
from experiments.report.read import Line, Section

BASELINE = "dense"
"""What a factor is called where nothing is pruned, if no baseline is declared."""


class Figure(NamedTuple):
    """A figure of a group.

    Attributes:
      mean, sd: over the finite values, the standard deviation that of a population; NaN if there are none.
      least, most: of the finite values.
      found: how many values are finite.
      lines: how many lines the group has.
    """

    mean: float
    sd: float
    least: float
    most: float
    found: int
    lines: int


class Group(NamedTuple):
    """Lines that differ by their seeds alone.

    Attributes:
      factors, levels: their values, as in the part's fields of that name.
      lines: at least one.
      baseline: whether nothing is pruned.
    """

    factors: tuple
    levels: tuple
    lines: list[Line]
    baseline: bool

    def figure(self, name: str) -> Figure:
        """Return the field over the lines; lists of numbers count with all of theirs."""
        return over(numbers([line.fields.get(name) for line in self.lines]), len(self.lines))


class Part(NamedTuple):
    """Lines with the same factors.

    Attributes:
      factors, levels, figures: names of fields; the first figure is the one to draw.
      lists: names of figures that are lists of numbers.
      percent: names of figures and levels that are shown in percent.
      axes: what the first figure is drawn against.
      remarks: fields that are neither, and are not the same in all lines.
      same: fields that are, with their values.
      groups: the lines, sorted by level within each combination of factors.
      repeats: lines beyond the first of a run, seed, and group.
    """

    factors: list[str]
    levels: list[str]
    figures: list[str]
    lists: list[str]
    percent: set[str]
    axes: tuple[Axis, ...]
    remarks: list[str]
    same: dict[str, Any]
    groups: list[Group]
    repeats: int


def parts(section: Section) -> list[Part]:
    """Return the lines of a section in parts, in order of appearance."""
    lines = section.lines
    every = [line.fields for line in lines]
    design = next((line.design for line in lines if line.design), None)
    names = list(dict.fromkeys(name for fields in every for name in fields))
    texts = [name for name in names if _is_text(name, every) and not _constant(name, every)]
    if design:
        texts = [name for name in texts if name in design.factors or name in section.settings]
    else:
        texts = [name for name in texts if _crossed(name, every)]
    shapes = [tuple(name for name in texts if isinstance(line.fields.get(name), str)) for line in lines]
    levels = (design or Design()).levels
    measured: dict[tuple, set[str]] = {}
    for shape, fields in zip(shapes, every, strict=True):
        own = {name for name, value in fields.items() if _is_number(value)} - {"seed", *levels}
        measured.setdefault(shape, set()).update(own - set(section.settings))
    joined = {shape: _wider(shape, measured) for shape in measured}
    found: dict[tuple, list[Line]] = {}
    for shape, line in zip(shapes, lines, strict=True):
        found.setdefault(joined[shape], []).append(line)
    return [_part(list(factors), own, design, section.settings) for factors, own in found.items()]


def _wider(shape: tuple, measured: Mapping[tuple, set[str]]) -> tuple:
    """Return the largest set of factors that includes these, among lines that measure the same.

    So a dense network that has no criterion is the baseline of those that have one.
    """
    beside = [other for other in measured if set(shape) < set(other) and measured[shape] & measured[other]]
    return max(beside, key=len, default=shape)


def numbers(values: Sequence[Any]) -> list[float]:
    """Return all numbers among values and in lists of them; truth counts as 1."""
    flat = (x for value in values for x in (value if isinstance(value, list) else (value,)))
    return [float(x) for x in flat if _is_number(x)]


def over(values: Sequence[float], lines: int) -> Figure:
    """Return mean, standard deviation and range of the finite values.

    Example:
      >>> over([1.0, 3.0, math.nan], 3)
      Figure(mean=2.0, sd=1.0, least=1.0, most=3.0, found=2, lines=3)
    """
    finite = np.array([x for x in values if math.isfinite(x)])
    if not len(finite):
        return Figure(math.nan, math.nan, math.nan, math.nan, 0, lines)
    least, most = float(finite.min()), float(finite.max())
    with np.errstate(over="ignore", invalid="ignore"):
        # Equal values have no deviation, whatever rounding says.
        mean, sd = (least, 0.0) if least == most else (float(finite.mean()), float(finite.std()))
    return Figure(mean, sd, least, most, len(finite), lines)


def show(value: Any) -> str:
    """Return a value as text: short numbers, lists with commas, "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**15 else f"{value:.6g}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(show, value)) or "none"
    return str(value)


def _part(factors: list[str], lines: list[Line], design: Design | None, settings: tuple[str, ...]) -> Part:
    every = [line.fields for line in lines]
    factors = [n for n in factors if len(lines) == 1 or not _constant(n, every)]
    names = [
        n for n in dict.fromkeys(n for fields in every for n in fields) if n not in factors and n != "seed"
    ]
    numeric = [n for n in names if any(_is_number(f.get(n)) for f in every)]
    numeric = [n for n in numeric if all(f.get(n) is None or _is_number(f[n]) for f in every)]
    if design:
        levels = [n for n in (*settings, *design.levels) if n in numeric and not _constant(n, every)]
    else:
        levels = _levels(factors, numeric, lines)
    declared = design or Design()
    lists = [n for n in names if _is_series(n, every)]
    same = {n: every[0].get(n) for n in names if _constant(n, every) and n not in declared.figures}
    figures = [n for n in names if (n in numeric or n in lists) and n not in levels and n not in same]
    figures.sort(key=lambda n: declared.figures.index(n) if n in declared.figures else len(declared.figures))
    remarks = [n for n in names if n not in (*figures, *levels, *same) and any(f.get(n) for f in every)]
    found: dict[tuple, list[Line]] = {}
    for line in lines:
        found.setdefault(_key(line, factors, levels), []).append(line)
    order = {key[: len(factors)]: i for i, key in reversed(list(enumerate(found)))}

    def rank(key: tuple) -> tuple:
        own = key[len(factors) :]
        return order[key[: len(factors)]], tuple(-math.inf if x is None else float(x) for x in own)

    split = len(factors)
    groups = [
        Group(k[:split], k[split:], found[k], _is_baseline(found[k][0], factors, declared))
        for k in sorted(found, key=rank)
    ]
    percent = {name for name in (*figures, *levels) if name in declared.percent}
    seeded = any(_is_number(fields.get("seed")) for fields in every)
    repeats = _repeats(factors, levels, lines) if seeded else 0
    return Part(factors, levels, figures, lists, percent, declared.axes, remarks, same, groups, repeats)


def _levels(factors: list[str], numeric: list[str], lines: list[Line]) -> list[str]:
    """Return the numbers, in order of appearance, without which lines of one seed are not told apart."""
    every = [line.fields for line in lines]
    several = len({fields["seed"] for fields in every if _is_number(fields.get("seed"))}) > 1
    names = [n for n in numeric if not _constant(n, every)]
    if several:
        names = [n for n in names if _crossed(n, every)]
    else:
        names = [n for n in names if all(f.get(n) is None or isinstance(f[n], int) for f in every)]
    names = [n for n in names if all(f.get(n) is None or math.isfinite(f[n]) for f in every)]
    levels: list[str] = []
    left = _repeats(factors, levels, lines)
    for name in names:
        if left and (now := _repeats(factors, [*levels, name], lines)) < left:
            levels, left = [*levels, name], now
    return levels


def _repeats(factors: list[str], levels: list[str], lines: list[Line]) -> int:
    """Return how many lines are not told apart by these."""
    return len(lines) - len({(line.file, *_key(line, [*factors, "seed"], levels)) for line in lines})


def _is_baseline(line: Line, factors: Sequence[str], design: Design) -> bool:
    """Return whether nothing is pruned in the network of a line."""
    if design.baseline:
        return all(line.fields.get(name) == value for name, value in design.baseline.items())
    return any(line.fields.get(name) == BASELINE for name in factors)


def _key(line: Line, factors: Sequence[str], levels: Sequence[str]) -> tuple:
    found = (line.fields.get(name) for name in (*factors, *levels))
    return tuple(repr(value) if isinstance(value, list | dict) else value for value in found)


def _crossed(name: str, every: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether each seed has the same values of a field, or some of them, as those of a design do."""
    values: dict[Any, set] = {}
    for fields in every:
        seed, value = fields.get("seed"), fields.get(name)
        values.setdefault(seed if _is_number(seed) else None, set()).add(
            repr(value) if isinstance(value, list | dict) else value
        )
    most = max(values.values(), key=len)
    return all(own <= most for own in values.values())


def _constant(name: str, every: Sequence[Mapping[str, Any]]) -> bool:
    first = repr(every[0].get(name))
    return len(every) > 1 and all(name in fields and repr(fields[name]) == first for fields in every)


def _is_text(name: str, every: Sequence[Mapping[str, Any]]) -> bool:
    values = [fields[name] for fields in every if fields.get(name) is not None]
    return name != "seed" and bool(values) and all(isinstance(value, str) for value in values)


def _is_series(name: str, every: Sequence[Mapping[str, Any]]) -> bool:
    """Return lists of numbers of which some are not whole: measurements, not shapes."""
    values = [fields[name] for fields in every if fields.get(name) is not None]
    lists = [value for value in values if isinstance(value, list)]
    return (
        bool(values)
        and len(lists) == len(values)
        and all(_is_number(x) for value in lists for x in value)
        and any(isinstance(x, float) for value in lists for x in value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
