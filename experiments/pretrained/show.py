"""The tables and the plot of the study of networks that others have trained: `lines` are its results."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.show import figures, tables
from jaxprune import plots

Lines = Sequence[dict[str, Any]]

DRAWN = ("magnitude", "wanda", "sparsegpt-32", "wanda+ls", "alps", "recover-more")
"""The methods in the plot: more would not be told apart."""


def summarise(lines: Lines) -> str:
    """Return the lines as tables of at most 80 columns."""
    dense = next(line for line in lines if line["part"] == "dense")
    draws = len(_values(lines, "draw"))
    text = [
        f"{dense['note']}; {100 * dense['error']:.2f} % errors of the dense network",
        f"more errors than that, in points: mean and s.d. over {draws} calibration sets;",
        "95 % bootstrap intervals over the test examples, ends averaged over the sets",
    ]
    if any("changed" in line for line in lines):
        text.append("changed: answers that are not the dense network's")
    if data := dense.get("data"):
        text += textwrap.wrap(data, 80)
    entries = _with(lines, part="entries")
    levels = sorted(_values(entries, "sparsity"))
    if len(levels) > 1:
        rows = [["entries", *(f"{level:.0%}" for level in levels)]]
        for method in _values(entries, "method"):
            own = [_with(entries, method=method, sparsity=level) for level in levels]
            rows.append([method, *(_mean(some) for some in own)])
        text += ["", tables.text(rows)]
    for pattern, sparsity in _places(lines):
        own = _with(lines, pattern=pattern, sparsity=sparsity)
        text += ["", _table(own, f"{sparsity:.0%} of entries" if pattern == "entries" else pattern)]
    for pattern in _values(_with(lines, part="channels"), "pattern"):
        text += ["", _table(_with(lines, pattern=pattern), pattern)]
    return "\n".join(text)


def plot(lines: Lines, folder: str) -> list[str]:
    """Draw errors against the sparsity of entries, with a band of one s.d. over the calibration sets.

    Returns:
      The names of the files, in the folder of results.
    """
    entries = [line for line in lines if line["part"] == "entries" and line["method"] in DRAWN]
    if not entries:
        return []
    dense = next(line for line in lines if line["part"] == "dense")
    curves: dict[str, plots.Line] = {}
    for method in _values(entries, "method"):
        own = _with(entries, method=method)
        levels = sorted(_values(own, "sparsity"))
        errors = [[100 * line["error"] for line in _with(own, sparsity=level)] for level in levels]
        curves[method] = (
            [100 * level for level in levels],
            [np.mean(some) for some in errors],
            [np.std(some) for some in errors],
        )
    drawn = plots.curves(
        curves,
        x="sparsity of entries, %",
        y="errors, %",
        title=dense["note"],
        baseline={"dense": [100 * dense["error"]]},
    )
    figures.save(drawn, Path(folder) / "sparsities.png")
    return ["sparsities.png"]


def _values(lines: Lines, key: str) -> list[Any]:
    """Return the values of a field in order of appearance."""
    return list(dict.fromkeys(line[key] for line in lines))


def _with(lines: Lines, **fields: Any) -> list[dict[str, Any]]:
    return [line for line in lines if all(line[key] == value for key, value in fields.items())]


def _places(lines: Lines) -> list[tuple[str, float]]:
    """Return the patterns and sparsities that have a table of their own: 50 % of entries, or all, and 2:4."""
    own = [line for line in lines if line["part"] in ("entries", "nm")]
    places = list(dict.fromkeys((line["pattern"], line["sparsity"]) for line in own))
    half = [place for place in places if place[1] == 0.5]
    return half or places


def _mean(lines: Lines) -> str:
    return f"{100 * np.mean([line['gap'] for line in lines]):.2f}" if lines else "-"


def _table(lines: Lines, title: str) -> str:
    """Return a table with a row for each method, of one pattern at one sparsity."""
    units = lines[0]["part"] == "channels"
    more = ["params", "MACs", "compacted differs by"] if units else ["of these layers", "of all params"]
    answers = all("changed" in line for line in lines)
    rows = [[title, "more errors", "interval", *(["changed"] if answers else []), *more]]
    for method in _values(lines, "method"):
        own = _with(lines, method=method)
        gap, low, high = (100 * np.array([line[name] for line in own]) for name in ("gap", "low", "high"))
        row = [method, f"{gap.mean():.2f} +- {gap.std():.2f}", f"{low.mean():.2f} to {high.mean():.2f}"]
        if answers:
            row.append(f"{100 * np.mean([line['changed'] for line in own]):.1f} %")
        if units:
            worst = max(line["compaction_error"] for line in own)
            row += [f"{own[0]['params']:,}", f"{own[0]['macs']:,}", f"{worst:.1e}"]
        else:
            row += [f"{100 * own[0][name]:.1f} %" for name in ("of_layers", "of_params")]
        rows.append(row)
    return tables.text(rows)
