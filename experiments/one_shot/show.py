"""The tables and plots of the study of pruning without training.

Everywhere `lines` are the study's results and `chosen` its settings, the network's defaults filled in.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.one_shot import methods
from experiments.one_shot.cases import NETWORKS
from experiments.show import figures, tables
from jaxprune import plots

Lines = Sequence[dict[str, Any]]

REFERENCE = "sparsegpt-128"
"""The method whose gap to the dense network others are measured by."""

DRAWN = ("magnitude", "wanda", "sparsegpt-128", "sparsegpt-32", "wanda+ls", "alps-dense", "recover-more")
"""The methods in the plot: more would not be told apart."""


class Figure:
    """The figure of merit of a data set: accuracy in percent, or nats per character."""

    def __init__(self, dataset: str):
        self.text = dataset == "tiny_shakespeare"
        self.title = "validation loss, nats per character" if self.text else "test accuracy, %"

    def of(self, line: dict[str, Any]) -> float:
        """Return the figure of a line."""
        return line["loss"] if self.text else 100 * line["accuracy"]

    def cell(self, lines: Lines) -> str:
        """Return mean and standard deviation; "-" for no lines."""
        if not lines:
            return "-"
        values, digits = np.array([self.of(line) for line in lines]), 3 if self.text else 2
        return f"{values.mean():.{digits}f} +- {values.std():.{digits}f}"


def summarise(lines: Lines, chosen: Any) -> str:
    """Return the lines as tables of at most 80 columns, means and standard deviations over seeds."""
    figure = Figure(chosen.dataset)
    dense = [line for line in lines if line["part"] == "dense"]
    text = [
        f"{figure.title}: mean and s.d. over {len(dense)} dense networks",
        f"{chosen.examples} calibration examples; recover-more: {chosen.more}",
        f"dense: {figure.cell(dense)}",
    ]
    makers: dict[str, Callable[..., list[str]]] = {
        "entries": _entries,
        "nm": _nm,
        "channels": _channels,
        "budgets": _budgets,
        "statistics": _statistics,
        "calibration": _calibration,
        "bits": _bits,
    }
    for part in chosen.parts:
        if own := [line for line in lines if line["part"] == part]:
            text += ["", *makers[part](own, figure)]
    if gaps := _gaps(lines):
        text += ["", *gaps]
    return "\n".join(text)


def _values(lines: Lines, key: str) -> list[Any]:
    """Return the values of a field in order of appearance."""
    return list(dict.fromkeys(line[key] for line in lines))


def _with(lines: Lines, **fields: Any) -> list[dict[str, Any]]:
    return [line for line in lines if all(line[key] == value for key, value in fields.items())]


def _table(
    lines: Lines, figure: Figure, heading: str, row: str, column: str, show: Callable[[Any], str]
) -> str:
    columns = _values(lines, column)
    if column == "sparsity":
        columns = sorted(columns)
    rows = [[heading, *map(show, columns)]]
    for value in _values(lines, row):
        cells = [figure.cell(_with(lines, **{row: value, column: each})) for each in columns]
        rows.append([str(value), *cells])
    return tables.text(rows)


def _entries(lines: Lines, figure: Figure) -> list[str]:
    return ["entries", _table(lines, figure, "method", "method", "sparsity", lambda x: f"{x:.0%}")]


def _nm(lines: Lines, figure: Figure) -> list[str]:
    return [_table(lines, figure, "method", "method", "pattern", str)]


def _channels(lines: Lines, figure: Figure) -> list[str]:
    text = []
    for pattern in _values(lines, "pattern"):
        rows = [[pattern, "", "params", "MACs", "compacted differs by"]]
        for method in _values(lines, "method"):
            own = _with(lines, pattern=pattern, method=method)
            row = [method, figure.cell(own), f"{own[0]['params']:,}", f"{own[0]['macs']:,}"]
            rows.append([*row, f"{max(line['compaction_error'] for line in own):.1e}"])
        text += [tables.text(rows), ""]
    return text[:-1]


def _budgets(lines: Lines, figure: Figure) -> list[str]:
    title = f"{lines[0]['sparsity']:.0%} of all entries together"
    rows = [["method", *methods.BUDGETS]]
    for method in methods.BUDGETED:
        own = [figure.cell(_with(lines, method=f"{method}, {way}")) for way in methods.BUDGETS]
        rows.append([method, *own])
    return [title, tables.text(rows)]


def _statistics(lines: Lines, figure: Figure) -> list[str]:
    title = "BatchNorm's statistics as they were, and estimated again on the calibration set"
    return [title, _table(lines, figure, "method", "method", "sparsity", lambda x: f"{x:.0%}")]


def _calibration(lines: Lines, figure: Figure) -> list[str]:
    text = ["50 % of the entries; mean and s.d. over dense networks and calibration sets"]
    for source in _values(lines, "source"):
        heading = f"examples: {source}"
        text.append(_table(_with(lines, source=source), figure, heading, "examples", "method", str))
        text.append("")
    return text[:-1]


def _bits(lines: Lines, figure: Figure) -> list[str]:
    rows = [["", *methods.ROUNDED]]
    for bits, sparsity in dict.fromkeys((line["bits"], line["sparsity"]) for line in lines):
        own = _with(lines, bits=bits, sparsity=sparsity)
        label = f"{bits} bits" + (f", {sparsity:.0%} of the entries removed" if sparsity else "")
        rows.append([label, *(figure.cell(_with(own, method=method)) for method in methods.ROUNDED)])
    return ["weights of few bits", tables.text(rows)]


def _gaps(lines: Lines) -> list[str]:
    """Return each method's gap to the dense loss as a share of the reference's: means over seeds."""
    own = [line for line in lines if line["part"] in ("entries", "nm")]
    if REFERENCE not in _values(own, "method"):
        return []
    places = sorted({(line["part"], line["pattern"], line["sparsity"]) for line in own})
    rows = [["method", *(pattern if pattern != "entries" else f"{s:.0%}" for _, pattern, s in places)]]

    def gap(method: str, pattern: str, sparsity: float) -> float:
        found = _with(own, method=method, pattern=pattern, sparsity=sparsity)
        return float(np.mean([line["gap"] for line in found])) if found else float("nan")

    for method in _values(own, "method"):
        shares = [gap(method, *place[1:]) / gap(REFERENCE, *place[1:]) for place in places]
        rows.append([method, *("-" if np.isnan(share) else f"{share:.2f}" for share in shares)])
    return [f"gap to the dense loss, as a share of that of {REFERENCE}", tables.text(rows)]


def plot(lines: Lines, chosen: Any) -> list[str]:
    """Draw the figure of merit against the sparsity of entries, and against the size of the calibration set.

    Returns:
      The names of the files, in the folder of results.
    """
    figure = Figure(chosen.dataset)
    title = f"{NETWORKS[chosen.dataset].title}, {lines[0]['note']}; {len(chosen.seeds)} seeds"
    dense = [figure.of(line) for line in lines if line["part"] == "dense"]
    names = []
    entries = [line for line in lines if line["part"] == "entries" and line["method"] in DRAWN]
    if entries:
        names.append("sparsities.png")
        _draw(entries, figure, "sparsity", "method", "sparsity of entries", dense, title, chosen, names[-1])
    sets = [line for line in lines if line["part"] == "calibration"]
    for line in sets:
        own = line["source"] == "own samples"
        line["curve"] = line["method"] + ", own samples" * own
    if sets:
        names.append("calibration.png")
        _draw(
            sets, figure, "examples", "curve", "calibration examples", dense, title, chosen, names[-1], True
        )
    return names


def _draw(
    lines: Lines,
    figure: Figure,
    x: str,
    curve: str,
    label: str,
    dense: list[float],
    title: str,
    chosen: Any,
    name: str,
    log: bool = False,
) -> None:
    curves: dict[str, plots.Line] = {}
    for method in _values(lines, curve):
        own = _with(lines, **{curve: method})
        levels = sorted(set(_values(own, x)))
        curves[method] = levels, [[figure.of(line) for line in _with(own, **{x: level})] for level in levels]
    drawn = plots.curves(curves, x=label, y=figure.title, title=title, baseline={"dense": dense}, log=log)
    figures.save(drawn, Path(chosen.out) / name)
