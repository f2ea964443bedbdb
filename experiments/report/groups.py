"""Which fields of lines say what was run, and which what came out; and the figures over seeds.

Every field is one of these, found out in this order:

- the replicate: `seed`;
- factors: fields of text but notes and the like, and settings that differ, if every seed has the same values;
- levels: numeric fields that are needed to tell the lines of one run and seed apart. Again every seed must
  have the same values of them; names such as `sparsity` come first, names such as `accuracy` never;
- figures: all other numbers. They are averaged over the lines that have the same factors and levels;
- remarks: all else.

Lines that have different factors are in different parts, each with tables of its own, unless those of one
have some of the factors of the other and measure the same.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.report.read import Line

_LEVELS = (
    "sparsity|amount|target|compression|level|density|fraction|temperature|alpha|epoch|step|round|lr|learning_rate|"
    "batch_size|size|width|depth|train_size|count"
)
_RESULTS = (
    "accuracy|acc|loss|error|score|seconds|time|speed|ratio|bits|nats|macs|flops|params|nonzero|kept|achieved|bytes|"
    "difference|perplexity"
)
_WORDS = "note|remark|comment|reason|message|stopped"  # said of a line, and no factor
BASELINES = ("dense", "baseline", "unpruned")
# The value of a level at which nothing is pruned.
_NEUTRAL = {"sparsity": 0, "amount": 0, "level": 0, "density": 1, "compression": 1, "target": 1}


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
        """The field over the lines; lists of numbers count with all of theirs."""
        return over(numbers([line.fields.get(name) for line in self.lines]), len(self.lines))


class Part(NamedTuple):
    """Lines with the same factors.

    Attributes:
      factors, levels, figures: names of fields.
      lists: names of figures that are lists of numbers.
      percent: names of figures and levels that are shown in percent: called fractions, and between 0 and 1.
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
    remarks: list[str]
    same: dict[str, Any]
    groups: list[Group]
    repeats: int


def parts(lines: Sequence[Line]) -> list[Part]:
    """The lines of a section in parts, in order of appearance."""
    every = [line.fields for line in lines]
    names = list(dict.fromkeys(name for fields in every for name in fields))
    texts = [n for n in names if _is_text(n, every) and not re.search(_WORDS, n.lower())]
    texts = [n for n in texts if not _constant(n, every) and _crossed(n, every)]
    shapes = [tuple(name for name in texts if isinstance(line.fields.get(name), str)) for line in lines]
    measured: dict[tuple, set[str]] = {}
    for shape, fields in zip(shapes, every, strict=True):
        own = {name for name, value in fields.items() if _is_number(value) and _is_result(name)}
        measured.setdefault(shape, set()).update(own)
    joined = {shape: _wider(shape, measured) for shape in measured}
    found: dict[tuple, list[Line]] = {}
    for shape, line in zip(shapes, lines, strict=True):
        found.setdefault(joined[shape], []).append(line)
    return [_part(list(factors), own) for factors, own in found.items()]


def _wider(shape: tuple, measured: Mapping[tuple, set[str]]) -> tuple:
    """The most factors beside which lines with these stand: others' too, if they measure the same.

    So a dense network that has no criterion is the baseline of those that have one.
    """
    beside = [other for other in measured if set(shape) < set(other) and measured[shape] & measured[other]]
    return max(beside, key=len, default=shape)


def numbers(values: Sequence[Any]) -> list[float]:
    """All numbers among values and in lists of them; truth counts as 1."""
    flat = (x for value in values for x in (value if isinstance(value, list) else (value,)))
    return [float(x) for x in flat if _is_number(x)]


def over(values: Sequence[float], lines: int) -> Figure:
    """Mean, standard deviation and range of the finite values.

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
    """A value as text: short numbers, lists with commas, "-" for nothing."""
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


def _part(factors: list[str], lines: list[Line]) -> Part:
    every = [line.fields for line in lines]
    factors = [n for n in factors if len(lines) == 1 or not _constant(n, every)]
    names = [
        n for n in dict.fromkeys(n for fields in every for n in fields) if n not in factors and n != "seed"
    ]
    numeric = [n for n in names if any(_is_number(f.get(n)) for f in every)]
    numeric = [n for n in numeric if all(f.get(n) is None or _is_number(f[n]) for f in every)]
    levels, repeats = _levels(factors, numeric, lines)
    lists = [n for n in names if _is_series(n, every)]
    same = {n: every[0].get(n) for n in names if _constant(n, every) and not (n in numeric and _is_result(n))}
    figures = [n for n in names if (n in numeric or n in lists) and n not in levels and n not in same]
    remarks = [n for n in names if n not in (*figures, *levels, *same) and any(f.get(n) for f in every)]
    found: dict[tuple, list[Line]] = {}
    for line in lines:
        found.setdefault(_key(line, factors, levels), []).append(line)
    order = {key[: len(factors)]: i for i, key in reversed(list(enumerate(found)))}

    def rank(key: tuple) -> tuple:
        own = key[len(factors) :]
        return order[key[: len(factors)]], tuple(-math.inf if x is None else float(x) for x in own)

    pure = _baselines(list(found), len(factors), levels)
    split = len(factors)
    groups = [Group(k[:split], k[split:], found[k], k in pure) for k in sorted(found, key=rank)]
    percent = {name for name in (*figures, *levels) if _is_fraction(name, every)}
    return Part(factors, levels, figures, lists, percent, remarks, same, groups, repeats)


def _levels(factors: list[str], numeric: list[str], lines: list[Line]) -> tuple[list[str], int]:
    """The levels, and how many lines they do not tell apart."""
    every = [line.fields for line in lines]
    seeded = any(_is_number(fields.get("seed")) for fields in every)

    def repeats(levels: list[str]) -> int:
        return len(lines) - len({(line.file, *_key(line, [*factors, "seed"], levels)) for line in lines})

    def rank(name: str) -> tuple:
        values = {fields.get(name) for fields in every}
        known = re.search(f"(^|[._])({_LEVELS})$", name.lower()) is None
        return known, len(values) > len(lines) / 2, names.index(name)

    names = [n for n in numeric if not _is_result(n)]
    names = [n for n in names if not _constant(n, every) and _crossed(n, every)]
    names = [n for n in names if all(f.get(n) is None or math.isfinite(f[n]) for f in every)]
    if not seeded:
        # Without seeds a number that never comes back tells nothing apart, unless it counts.
        names = [n for n in names if not rank(n)[1] or not rank(n)[0] or _counts(n, factors, every)]
    levels: list[str] = []
    left = repeats(levels)
    for name in sorted(names, key=rank):
        # What is left without a seed may be replicates that do not say so.
        if not left:
            break
        now = repeats([*levels, name])
        if now < left:
            levels, left = [*levels, name], now
    # One that is called like a level is one, also where there is just one line of each method.
    known = [name for name in sorted(names, key=rank) if not rank(name)[0]]
    return levels or known[:1], left if seeded else 0


def _counts(name: str, factors: list[str], every: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a number only rises, or only falls, along the lines of each combination of factors."""
    found: dict[tuple, list[float]] = {}
    for fields in every:
        if fields.get(name) is not None:
            found.setdefault(tuple(fields.get(f) for f in factors), []).append(float(fields[name]))
    steps = [step for values in found.values() for step in itertools.pairwise(values)]
    return bool(steps) and (all(a < b for a, b in steps) or all(a > b for a, b in steps))


def _key(line: Line, factors: Sequence[str], levels: Sequence[str]) -> tuple:
    found = (line.fields.get(name) for name in (*factors, *levels))
    return tuple(repr(value) if isinstance(value, list | dict) else value for value in found)


def _crossed(name: str, every: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each seed has the same values of a field, or some of them, as those of a design do."""
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
    """Lists of numbers of which some are not whole: measurements, not shapes."""
    values = [fields[name] for fields in every if fields.get(name) is not None]
    lists = [value for value in values if isinstance(value, list)]
    return (
        bool(values)
        and len(lists) == len(values)
        and all(_is_number(x) for value in lists for x in value)
        and any(isinstance(x, float) for value in lists for x in value)
    )


def _is_result(name: str) -> bool:
    return re.search(f"(^|[._])({_RESULTS})s?($|[._])", name.lower()) is not None


def _is_fraction(name: str, every: Sequence[Mapping[str, Any]]) -> bool:
    if not re.search("accuracy|sparsity|density|achieved|amount", name.rpartition(".")[2].lower()):
        return False
    return all(-1e-9 <= x <= 1 + 1e-9 for x in numbers([f.get(name) for f in every]) if math.isfinite(x))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _baselines(keys: Sequence[tuple], factors: int, levels: Sequence[str]) -> set[tuple]:
    """The groups where nothing is pruned: those that are called so, or else those whose levels say so."""

    def named(key: tuple) -> bool:
        return any(isinstance(name, str) and name.lower() in BASELINES for name in key[:factors])

    def neutral(key: tuple) -> bool:
        known = [
            (value, _NEUTRAL[n]) for n, value in zip(levels, key[factors:], strict=True) if n in _NEUTRAL
        ]
        return bool(known) and all(value == other for value, other in known)

    return set(filter(named, keys)) or set(filter(neutral, keys))
