"""Plots of the studies: means over seeds with a band of one standard deviation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from jaxprune.files.atomic import replacing

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers tell apart, with a marker each.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#000000", "x"),
    ("#56B4E9", "P"),
    ("#8A6D00", "*"),
)


class Curve(NamedTuple):
    """One method's figures.

    Attributes:
      x: (points,) what is on the horizontal axis.
      y: (points, seeds), accuracies in [0, 1] unless `panels` is told otherwise.
    """

    x: Sequence[float]
    y: np.ndarray


def by_method(
    lines: Sequence[Mapping[str, Any]], methods: Sequence[str], values: Sequence[float], key: str = "sparsity"
) -> dict[str, Curve]:
    """Accuracies against compression for each method, from lines with a sparsity or a compression."""

    def accuracies(method: str, value: float) -> list[float]:
        return [line["accuracy"] for line in lines if (line["method"], line[key]) == (method, value)]

    x = [value if key == "compression" else 1 / (1 - value) for value in values]
    return {m: Curve(x, np.array([accuracies(m, value) for value in values])) for m in methods}


def panels(
    path: Path,
    title: str,
    curves: Sequence[tuple[str, Mapping[str, Curve]]],
    *,
    baseline: np.ndarray | None = None,
    figure: str = "test accuracy (%)",
    factor: float = 100,
    logarithmic: bool = True,
) -> None:
    """Draws accuracies in panels, one per (x label, curves by name), and saves a PNG.

    Args:
      path: the file.
      title: above all panels.
      curves: the panels; they share the vertical axis.
      baseline: (seeds,) the dense network's figure, drawn as a level line.
      figure: what the curves are of.
      factor: what they are multiplied by.
      logarithmic: whether the horizontal axes are, as compressions need.
    """
    canvas, axes = plt.subplots(
        1, len(curves), figsize=(5.2 * len(curves), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (x_label, lines) in zip(axes[0], curves, strict=True):
        for (name, curve), (colour, marker) in zip(lines.items(), STYLES[: len(lines)], strict=True):
            mean, spread = factor * curve.y.mean(axis=1), factor * curve.y.std(axis=1)
            axis.plot(curve.x, mean, color=colour, marker=marker, markersize=5, label=name)
            axis.fill_between(curve.x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        if baseline is not None:
            axis.axhline(factor * baseline.mean(), color="grey", linestyle="--", linewidth=1, label="dense")
        if logarithmic:
            _log_axis(axis, [x for curve in lines.values() for x in curve.x])
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
        if axis is axes[0][0] or lines.keys() != curves[0][1].keys():
            axis.legend()
    axes[0][0].set_ylabel(figure)
    canvas.suptitle(title, fontsize=11)
    with replacing(path) as new:  # a full disk leaves no half of one
        canvas.savefig(new, dpi=150, format="png")
    plt.close(canvas)


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    if not values:
        return
    low, high = min(values) / 1.15, max(values) * 1.15
    axis.set_xlim(low, high)
    axis.set_xscale("log")
    ticks = [t for t in (1, 1.5, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000) if low <= t <= high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
