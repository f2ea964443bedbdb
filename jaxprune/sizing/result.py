"""The result of a sensitivity analysis: points, as a table, as CSV, as a plot."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.tree.tables import csv_table, shorten, text_lines, wrapped

_WIDTH, _CELL = 80, 9


class Point(NamedTuple):
    """A tensor, a group of coupled channels or a set of these, pruned at a level.

    Attributes:
      name: the path, the group's name, or the set's.
      sparsity: the fraction of its units that was to be removed.
      achieved: the fraction that is removed.
      kept: how many units are left.
      size: how many units there are.
      metric: what `evaluate` returned.
      drop: by how much the metric is worse than the dense network's; negative where it is better.
      notes: what to know about the point: that no more was removed than by the masks to start from or at a
        lower level, that the floor kept units that were to go, that nothing is left.
      others: what else `evaluate` returned.
    """

    name: str
    sparsity: float
    achieved: float
    kept: int
    size: int
    metric: float
    drop: float
    notes: tuple[str, ...]
    others: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """Points by name, then level. It prints as a table of at most 80 columns.

    Attributes:
      points: every tensor at every level.
      dense: the metric of the network before anything was pruned, or under the masks to start from.
      metric: the name of the metric.
      maximize: whether a higher metric is better.
      pools: by name, the paths or groups that were pruned together.
      others: what else `evaluate` returned for the network that `dense` is of.
    """

    points: tuple[Point, ...]
    dense: float
    metric: str
    maximize: bool
    pools: Mapping[str, tuple[str, ...]]
    others: Mapping[str, float]

    def of(self, name: str) -> tuple[Point, ...]:
        """Return the points of a name, from the lowest level up.

        Raises:
          KeyError: no point has this name.
        """
        if name not in self.pools:
            raise KeyError(f"there is no {name!r}; the names are {', '.join(self.pools)}.")
        return tuple(point for point in self.points if point.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and numbers, as for JSON."""
        return {
            "metric": self.metric,
            "maximize": self.maximize,
            "dense": {self.metric: self.dense, **self.others},
            "pools": {name: list(pools) for name, pools in self.pools.items()},
            "points": [
                point._asdict() | {"notes": list(point.notes), "others": dict(point.others)}
                for point in self.points
            ],
        }

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return a line of headings and a line per point as text; also write it to a file, given its path."""
        fields = ("name", "sparsity", "achieved", "kept", "size", self.metric, "drop", "notes")
        rows: list[list[Any]] = [[*fields, *self.others]]
        for point in self.points:
            *figures, notes, others = point
            rows.append([*figures, "; ".join(notes), *(others[name] for name in self.others)])
        text = csv_table(*rows)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Write the picture that `jaxprune.plots.sensitivity` draws into a PNG, PDF or SVG file.

        Raises:
          ImportError: matplotlib is missing.
        """
        from jaxprune import plots

        plots.sensitivity(self).savefig(path, dpi=150)

    def __str__(self) -> str:
        return _table(self)


def _table(result: Sensitivity) -> str:
    levels = sorted({point.sparsity for point in result.points})
    values = [value for point in result.points if math.isfinite(value := point.metric)]
    form = _form([result.dense, *values])
    names = {name: shorten(name, _WIDTH - 3 * _CELL, mark="..") for name in result.pools}
    width = max(6, *map(len, names.values()))
    side_by_side = (_WIDTH - width) // _CELL
    lines = [f"{result.metric} with one pruned alone; with nothing pruned {form(result.dense)}"]
    for start in range(0, len(levels), side_by_side):
        some = levels[start : start + side_by_side]
        rows = [("pruned", *(f"{100 * level:g}%" for level in some))]
        for name, shown in names.items():
            by_level = {point.sparsity: point.metric for point in result.of(name)}
            rows.append((shown, *(form(by_level[level]) for level in some)))
        lines += text_lines(f"{{:<{width}}}" + f"{{:>{_CELL}}}" * len(some), *rows)
    return "\n".join([*lines, *_notes(result)])


def _notes(result: Sensitivity) -> Iterator[str]:
    """Yield lines that say which note holds for which name at which levels."""
    for name in result.pools:
        points = result.of(name)
        for note in dict.fromkeys(note for point in points for note in point.notes):
            levels = ", ".join(f"{100 * point.sparsity:g}%" for point in points if note in point.notes)
            yield from wrapped(f"{name} at {levels}: {note}", _WIDTH, break_on_hyphens=False)


def _form(values: list[float]) -> Callable[[float], str]:
    """Return a function that formats all values with the same number of decimals, as many as fit."""
    largest = max(map(abs, values), default=0.0)
    if largest and not 1e-3 <= largest < 1e5:
        return lambda value: f"{value:.1e}"
    decimals = 4 - max(0, math.floor(math.log10(largest))) if largest else 4
    return lambda value: f"{value:.{decimals}f}"
