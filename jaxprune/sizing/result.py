"""What a sensitivity analysis found: points, as a table, as CSV, as a plot."""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_WIDTH, _CELL = 80, 9


class Point(NamedTuple):
    """A tensor, a group of coupled channels or a set of these, pruned at a level.

    Attributes:
      name: the path, the group's name, or the set's.
      sparsity: the fraction of its units that was asked to go.
      achieved: the fraction that is gone.
      kept: how many units are left.
      size: of how many.
      metric: what `evaluate` returned.
      drop: by how much that is worse than the dense network's; negative where it is better.
      notes: what is to be said of it: that nothing more was removed than before or than at a lower
        level, that only the floor kept some, that nothing is left.
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
    """Points by name, then level. Printing it gives a table of at most 80 columns.

    Attributes:
      points: every tensor at every level.
      dense: the metric of the network that nothing (more) was pruned of.
      metric: its name.
      maximize: whether more of it is better.
      pools: by name, the paths or groups that were pruned together.
      others: what else `evaluate` returned for that network.
    """

    points: tuple[Point, ...]
    dense: float
    metric: str
    maximize: bool
    pools: Mapping[str, tuple[str, ...]]
    others: Mapping[str, float]

    def of(self, name: str) -> tuple[Point, ...]:
        """The points of a name, from the lowest level up.

        Raises:
          KeyError: there is no such name.
        """
        if name not in self.pools:
            raise KeyError(f"there is no {name!r}; the names are {', '.join(self.pools)}.")
        return tuple(point for point in self.points if point.name == name)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, strings and numbers, as for JSON."""
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
        """One line per point under a line of headings, as text; written to a file too if one is named."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        fields = ("name", "sparsity", "achieved", "kept", "size", self.metric, "drop", "notes")
        writer.writerow([*fields, *self.others])
        for point in self.points:
            *figures, notes, others = point
            writer.writerow([*figures, "; ".join(notes), *(others[name] for name in self.others)])
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

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
    names = {name: _shortened(name, _WIDTH - 3 * _CELL) for name in result.pools}
    width = max(6, *map(len, names.values()))
    side_by_side = (_WIDTH - width) // _CELL
    lines = [f"{result.metric} with one pruned alone; with nothing pruned {form(result.dense)}"]
    for start in range(0, len(levels), side_by_side):
        some = levels[start : start + side_by_side]
        lines.append(f"{'pruned':<{width}}" + "".join(f"{f'{100 * level:g}%':>{_CELL}}" for level in some))
        for name, shown in names.items():
            by_level = {point.sparsity: point.metric for point in result.of(name)}
            lines.append(f"{shown:<{width}}" + "".join(f"{form(by_level[x]):>{_CELL}}" for x in some))
    return "\n".join([*lines, *_notes(result)])


def _notes(result: Sensitivity) -> Iterator[str]:
    """What is to be said, by name: at which levels."""
    for name in result.pools:
        points = result.of(name)
        for note in dict.fromkeys(note for point in points for note in point.notes):
            levels = ", ".join(f"{100 * point.sparsity:g}%" for point in points if note in point.notes)
            yield from textwrap.wrap(
                f"{name} at {levels}: {note}",
                _WIDTH,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )


def _form(values: list[float]) -> Callable[[float], str]:
    """Numbers with as many decimals as leave room, all alike."""
    largest = max(map(abs, values), default=0.0)
    if largest and not 1e-3 <= largest < 1e5:
        return lambda value: f"{value:.1e}"
    decimals = 4 - max(0, math.floor(math.log10(largest))) if largest else 4
    return lambda value: f"{value:.{decimals}f}"


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"..{name[2 - width :]}"
