"""What the studies draw, with `jaxprune.plots`: accuracies against compression, saved whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import plots
from jaxprune.files.atomic import replacing
from jaxprune.plots import Line


def by_method(
    lines: Sequence[Mapping[str, Any]], methods: Mapping[str, str] | Sequence[str], key: str = "sparsity"
) -> dict[str, Line]:
    """Return the accuracies of each method against compression, for `jaxprune.plots.curves`.

    Lines of a method differ by the seed and by `key`, "sparsity" or "compression"; a mapping of methods gives
    their titles.
    """
    titles = methods if isinstance(methods, Mapping) else {name: name for name in methods}
    curves = {}
    for method, title in titles.items():
        own = [line for line in lines if line["method"] == method]
        values = sorted({line[key] for line in own})
        x = values if key == "compression" else [1 / (1 - value) for value in values]
        curves[title] = (x, [[line["accuracy"] for line in own if line[key] == value] for value in values])
    return curves


def accuracies(lines: Sequence[Mapping[str, Any]], **keys: Any) -> list[float]:
    """Return the accuracies of the lines that have these keys, such as `method="dense"`."""
    return [x["accuracy"] for x in lines if all(x.get(key) == value for key, value in keys.items())]


def against_compression(
    path: str | Path,
    title: str,
    panels: Mapping[str, Mapping[str, Line]],
    dense: Sequence[float] | None = None,
) -> None:
    """Draw test accuracies against compressions as a PNG, with those of the dense network as a level line.

    `panels` are as `jaxprune.plots.panels` takes them, by what is compressed.
    """
    baseline = None if dense is None else {"dense": dense}
    save(
        plots.panels(panels, y="test accuracy (%)", title=title, baseline=baseline, percent=True, log=True),
        path,
    )


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG; a full disk leaves no half of one."""
    with replacing(path) as new:
        figure.savefig(new, dpi=150, format="png")
