"""Curves of a report, as SVG: the first figure of a part against declared axes, or the first level."""

import io
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl

from experiments.report import groups, names
from experiments.report.blocks import clean
from experiments.report.design import Axis
from experiments.report.groups import Group, Part
from jaxprune import plots

# Stands for the colour of the text in an SVG, until the page or the file says which that is.
INK = "#123456"
_MOST_CURVES = 16
_MOST = 1e30  # numbers beyond are not drawn


class Abscissa(NamedTuple):
    """What curves are drawn against.

    Attributes:
      title: under the axis.
      of: the value for a group, None if there is none.
      log: whether the axis is logarithmic.
      measured: whether it is measured, so that a line between points means nothing.
    """

    title: str
    of: Callable[[Group], float | None]
    log: bool
    measured: bool = False


def axes(part: Part) -> list[Abscissa]:
    """Return what a part's figures can be drawn against."""
    has = (*part.levels, *part.figures)
    found = [_declared(part, axis) for axis in part.axes if axis.field in has]
    if part.levels and not found:
        found = [_level(part)]
    return [axis for axis in found if len({axis.of(group) for group in part.groups} - {None}) > 1]


def draw(part: Part, figure: str, axis: Abscissa, salt: str) -> tuple[str, str] | None:
    """Draw means with bands, a curve for each combination of factors.

    `salt` makes the names inside the drawing its own.

    Returns:
      The SVG and what it shows, in words; None if there is nothing to draw.
    """
    curves = _curves(part, figure, axis)
    if not curves:
        return None
    shown = dict(list(curves.items())[:_MOST_CURVES])
    dense = dict(list(names.baselines(part, figure).items())[:3])
    percent = figure in part.percent
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10}
    with mpl.rc_context(style | dict.fromkeys(colours, INK)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the letters
        canvas = plots.curves(
            {name: tuple(zip(*points, strict=True)) for name, points in shown.items()},
            x=_short(axis.title, 60),
            y=_short(f"{figure}, %" if percent else figure),
            baseline={
                _short(f"nothing pruned, {name}" if name else "nothing pruned"): found.mean
                for name, found in dense.items()
                if abs(found.mean) <= _MOST
            },
            percent=percent,
            log=axis.log,
            connect=not axis.measured,
        )
        file = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(file, format="svg", transparent=True, metadata=metadata)
    banded = any(sd > 0 for points in shown.values() for _, _, sd in points)
    spread = ", the mean over seeds with one standard deviation" if banded else ""
    more = f"; {len(shown)} of {len(curves)} curves are shown" if len(curves) > len(shown) else ""
    return file.getvalue(), f"{figure} against {axis.title}{spread}{more}."


def _curves(part: Part, figure: str, axis: Abscissa) -> dict[str, list[tuple[float, float, float]]]:
    curves: dict[tuple, list[tuple[float, float, float]]] = {}
    called: dict[tuple, str] = {}
    name = names.namer(part)
    for group in part.groups:
        x, y = axis.of(group), group.figure(figure)
        if group.baseline or x is None or not y.found or max(abs(x), abs(y.mean), y.sd) > _MOST:
            continue
        key = (group.factors, group.levels[1:])
        called[key] = _short(", ".join(filter(None, [name(group.factors), names.levels(part, group, 1)])))
        curves.setdefault(key, []).append((x, y.mean, y.sd))
    # Names that look alike are told apart by a number.
    alike = Counter(called.values())
    return {
        called[key] if alike[called[key]] == 1 else f"{called[key]} ({number})": sorted(points)
        for number, (key, points) in enumerate(curves.items(), start=1)
    }


def _mean(group: Group, name: str) -> float | None:
    """Return the mean of a field, be it a level or a figure."""
    found = group.figure(name)
    return found.mean if found.found else None


def _declared(part: Part, axis: Axis) -> Abscissa:
    """Return an axis that a study declares."""
    field, how = axis.field, axis.how
    percent = how == "x" and field in part.percent
    dense = {found.mean for found in names.baselines(part, field).values()} if how == "dense / x" else set()

    def of(group: Group) -> float | None:
        value = _mean(group, field)
        if value is None or not math.isfinite(value):
            return None
        if how == "x":
            return 100 * value if percent else value
        if how == "dense / x":
            return _quotient(dense.copy().pop(), value) if len(dense) == 1 else None
        return (
            _quotient(value, 1)
            if how in ("ratio", "measured")
            else _quotient(1, value if how == "1 / x" else 1 - value)
        )

    title = f"{axis.title}, %" if percent else axis.title
    return Abscissa(title, of, log=how != "x", measured=how == "measured")


def _quotient(one: float, other: float) -> float | None:
    """Return a quotient that can be drawn on a logarithmic axis, or None."""
    return one / other if one > 0 and other > 0 and math.isfinite(one / other) else None


def _level(part: Part) -> Abscissa:
    name = part.levels[0]
    lines = [line for group in part.groups for line in group.lines]
    values = [x for x in groups.numbers([line.fields.get(name) for line in lines]) if math.isfinite(x)]
    log = bool(values) and min(values) > 0 and max(values) / min(values) >= 30
    return Abscissa(name, lambda group: _mean(group, name), log)


def _short(text: str, most: int = 40) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
