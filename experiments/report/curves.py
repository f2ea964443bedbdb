"""Curves of a report: a figure against compression, multiply-adds, speed, or any other level, as SVG."""

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from experiments.report import groups, names
from experiments.report.blocks import clean
from experiments.report.groups import Group, Part
from experiments.show.figures import STYLES

# Stands for the colour of the text in an SVG, until the page or the file says which that is.
INK = "#123456"
_MOST_CURVES = 16
_MOST = 1e30  # numbers beyond are not drawn
_HEADLINES = (
    r"(^|\.)accuracy$",
    "accuracy$",
    "(^|[._])(acc|top1|f1|auc)$",
    r"(^|\.)score$",
    "perplexity",
    "(^|[._])loss$",
    "error",
)
_ONE_LAYER = {"layer", "path", "tensor"}
_SIZES = "params|nonzero|kept|macs|flops|density|sparsity|achieved|bytes|ratio"


class Axis(NamedTuple):
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


def headline(part: Part) -> str | None:
    """The figure that people look at first, if there is one."""
    if "bits" in part.figures:  # per character, of a language model
        return "bits"
    for pattern in _HEADLINES:
        for name in part.figures:
            if re.search(pattern, name.lower()) and name not in part.lists:
                return name
    others = [name for name in part.figures if not re.search(_SIZES, name.lower())]
    return next(iter([*others, *part.figures]), None)


def axes(part: Part) -> list[Axis]:
    """What a part's figures can be drawn against: at most four."""
    found = [
        axis for axis in (_compression(part), _multiply_adds(part), _speed(part), _sparsity(part)) if axis
    ]
    if part.levels and not found:
        found = [_level(part)]
    return [axis for axis in found if len({axis.of(group) for group in part.groups} - {None}) > 1]


def draw(part: Part, figure: str, axis: Axis, salt: str) -> tuple[str, str] | None:
    """Means with bands, a curve for each combination of factors.

    Args:
      part: what is drawn.
      figure: the vertical axis.
      axis: the horizontal one.
      salt: makes the names inside the drawing its own.

    Returns:
      The SVG and what it shows, in words; None if there is nothing to draw.
    """
    factor = 100 if figure in part.percent else 1
    curves = _curves(part, figure, axis)
    if not curves:
        return None
    shown = dict(list(curves.items())[:_MOST_CURVES])
    dense = dict(list(names.baselines(part, figure).items())[:3])
    labels = [f" {_short(name)}" for name in shown] + [
        f" {_short(f'nothing pruned, {name}' if name else 'nothing pruned')}" for name in dense
    ]
    columns = min(3, max(1, 84 // (max(map(len, labels)) + 7)))
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "font.size": 10,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the letters
        canvas = Canvas(figsize=(5.4, 3.5 + 0.24 * math.ceil(len(labels) / columns)), layout="constrained")
        plot: Any = canvas.subplots()
        banded = False
        for index, points in enumerate(shown.values()):
            colour, marker = STYLES[index % len(STYLES)]
            colour = INK if colour == "#000000" else colour
            x, mean, sd = (np.array(column) for column in zip(*points, strict=True))
            mean, sd = factor * mean, factor * sd
            line = "none" if axis.measured else ("-", "--")[index // len(STYLES) % 2]
            plot.plot(x, mean, color=colour, marker=marker, markersize=5, linestyle=line, label=labels[index])
            banded = banded or bool((sd > 0).any())
            if axis.measured:
                plot.errorbar(x, mean, sd, fmt="none", ecolor=colour, alpha=0.5)
            elif (sd > 0).any():
                plot.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
        for index, found in enumerate(dense.values()):
            if abs(found.mean) <= _MOST:
                line = ("--", ":", "-.")[index]
                label = labels[len(shown) + index]
                plot.axhline(factor * found.mean, color="#808080", linestyle=line, linewidth=1, label=label)
        if axis.log:
            _ratio_axis(plot, [point[0] for points in shown.values() for point in points])
        plot.set_xlabel(_short(axis.title, 60))
        plot.set_ylabel(_short(f"{figure}, %" if factor == 100 else figure, 40))
        plot.grid(alpha=0.3)
        plot.spines[["top", "right"]].set_visible(False)
        canvas.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        file = io.StringIO()
        keys = ("Date", "Creator", "Format", "Type")
        canvas.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(keys))
    spread = ", the mean over seeds with one standard deviation" if banded else ""
    more = f"; {len(shown)} of {len(curves)} curves are shown" if len(curves) > len(shown) else ""
    return file.getvalue(), f"{figure} against {axis.title}{spread}{more}."


def _values(group: Group, figure: str) -> list[float]:
    return groups.numbers([line.fields.get(figure) for line in group.lines])


def _curves(part: Part, figure: str, axis: Axis) -> dict[str, list[tuple[float, float, float]]]:
    curves: dict[tuple, list[tuple[float, float, float]]] = {}
    called: dict[tuple, str] = {}
    name = names.namer(part)
    for group in part.groups:
        x, y = axis.of(group), group.figure(figure)
        if group.baseline or x is None or not y.found or max(abs(x), abs(y.mean), y.sd) > _MOST:
            continue
        key = (group.factors, group.levels[1:])
        called[key] = ", ".join(filter(None, [name(group.factors), names.levels(part, group, skip=1)]))
        curves.setdefault(key, []).append((x, y.mean, y.sd))
    # Names that look alike are told apart by a number.
    alike = Counter(called.values())
    return {
        called[key] if alike[called[key]] == 1 else f"{called[key]} ({number})": sorted(points)
        for number, (key, points) in enumerate(curves.items(), start=1)
    }


def _mean(group: Group, name: str) -> float | None:
    """The mean of a field, be it a level or a figure."""
    found = group.figure(name)
    return found.mean if found.found else None


def _has(part: Part, name: str) -> bool:
    return name in (*part.levels, *part.figures)


def _over_baseline(part: Part, name: str) -> Callable[[Group], float | None] | None:
    values = {found.mean for found in names.baselines(part, name).values()}
    value = values.pop() if len(values) == 1 else 0.0
    if value <= 0:
        return None
    return lambda group: _quotient(value, _mean(group, name))


def _quotient(one: float, other: float | None) -> float | None:
    return one / other if other is not None and other > 0 and math.isfinite(one / other) else None


def _compression(part: Part) -> Axis | None:
    for name in ("params", "nonzero"):
        ratio = _over_baseline(part, name) if _has(part, name) else None
        if ratio:
            return Axis("compression (parameters)", ratio, log=True)
    if set(part.factors) & _ONE_LAYER:  # whose density is not that of the network
        return None
    for name, one in (("compression", None), ("density", 0), ("achieved", 1), ("sparsity", 1)):
        if not _has(part, name):
            continue

        def of(group: Group, name: str = name, one: int | None = one) -> float | None:
            value = _mean(group, name)
            if one is None or value is None:
                return value if value is None or value > 0 else None
            return _quotient(1, one - value if one else value)

        return Axis("compression (weights)", of, log=True)
    return None


def _multiply_adds(part: Part) -> Axis | None:
    title = "times fewer multiply-adds"
    if _has(part, "macs_ratio"):
        return Axis(title, lambda group: _positive(_mean(group, "macs_ratio")), log=True)
    ratio = _over_baseline(part, "macs") if _has(part, "macs") else None
    return Axis(title, ratio, log=True) if ratio else None


def _speed(part: Part) -> Axis | None:
    # Masks make nothing faster, so the time of a masked network is of no interest here.
    names = [n for n in part.figures if re.search("speed_?up", n.lower()) and "masked" not in n.lower()]
    if not names:
        return None
    name = names[-1]
    title = f"times as fast, measured ({name})"
    return Axis(title, lambda group: _positive(_mean(group, name)), log=True, measured=True)


def _sparsity(part: Part) -> Axis | None:
    for name in ("sparsity", "achieved"):
        if _has(part, name):
            title = f"{name}, %" if name in part.percent else name
            factor = 100 if name in part.percent else 1

            def of(group: Group, name: str = name, factor: int = factor) -> float | None:
                value = _mean(group, name)
                return None if value is None else factor * value

            return Axis(title, of, log=False)
    return None


def _level(part: Part) -> Axis:
    name = part.levels[0]
    values = [x for group in part.groups for x in _values(group, name) if math.isfinite(x)]
    log = bool(values) and min(values) > 0 and max(values) / min(values) >= 30
    return Axis(name, lambda group: _mean(group, name), log)


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 and math.isfinite(value) else None


def _ratio_axis(plot: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with round ticks."""
    plot.set_xscale("log")
    low, high = min(values) / 1.1, max(values) * 1.1
    plot.set_xlim(low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [
            step * 10.0**k for k in range(first, last + 1) for step in steps if low <= step * 10.0**k <= high
        ]
        if len(ticks) >= 4:
            break
    if len(ticks) < 3:
        ticks = [x for x in MaxNLocator(5).tick_values(low, high) if low <= x <= high]
    plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    plot.minorticks_off()


def _short(text: str, most: int = 40) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
