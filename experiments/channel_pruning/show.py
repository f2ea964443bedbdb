"""The channel-pruning study's tables and plot.

Everywhere `lines` are the study's results and `chosen` its settings, the network's defaults filled in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.show import figures, tables
from jaxprune import plots


def summarise(lines: Sequence[dict[str, Any]], chosen: Any) -> str:
    """Return the lines as tables of at most 80 columns, means and standard deviations over seeds."""
    dense = [line for line in lines if line["method"] == "dense"]
    bits = "bits" in dense[0]
    sizes = [str(size) for size in chosen.batch_sizes][:3] if chosen.timing_runs else []
    text = [f"dense: {_mean(dense)} {_unit(dense)}"]
    if bits:
        text[0] += f" ({np.mean([line['loss'] for line in dense]):.3f} nats)"
    text.append(f"{dense[0]['params']:,} parameters, {dense[0]['macs']:,} multiply-adds (MACs)")
    for target in chosen.targets:
        text += ["", f"{target:g} times fewer multiply-adds, {chosen.tune_epochs} epochs of tuning"]
        text.append(f"before and after: {_unit(dense)}")
        heads = ["method", "MACs x", "params", "before", "after", *(f"x@{size}" for size in sizes)]
        rows = [heads + ["nats"] * bits]
        for method in chosen.methods:
            own = [line for line in lines if (line["method"], line["target"]) == (method, target)]
            ratio, params = (np.mean([line[key] for line in own]) for key in ("macs_ratio", "params"))
            before = _mean([line["before"] for line in own if line["before"]]).split(" ")[0]
            row = [method, f"{ratio:.2f}", f"{params:,.0f}", before, _mean(own)]
            row += [f"{np.mean([line['speed_up'][size] for line in own]):.2f}" for size in sizes]
            rows.append(row + [f"{np.mean([line['loss'] for line in own]):.3f}"] * bits)
        text.append(tables.text(rows))
    errors = [line["compaction_error"] for line in lines if line["method"] != "dense"]
    text += ["", f"largest difference of masked and compacted logits: {max(errors, default=0):.1e}"]
    if sizes:
        text.append(f"x@{sizes[-1]}: times as fast in batches of {sizes[-1]}, both compiled, timed in turn")
    return "\n".join(text)


def widths(lines: Sequence[dict[str, Any]], target: float) -> str:
    """Return what the rankings leave of each group, with the first seed, as a table."""
    own = {
        line["method"]: line["widths"]
        for line in lines
        if line["target"] == target and line["seed"] == lines[0]["seed"] and line["method"] != "dense"
    }
    # Random and gradual have local's widths, scratch those of --ranking.
    columns = [m for m in ("global", "local", "isomorphic", "iterative") if m in own] or list(own)
    rows = [[f"channels that stay, {target:g}x", "of", *columns]]
    for group, (_, units) in own[columns[0]].items() if columns else ():
        name = group.removeprefix("params/").rsplit("/", 1)[0]
        rows.append([name[-32:], str(units), *(str(own[method][group][0]) for method in columns)])
    return tables.text(rows)


def plot(lines: Sequence[dict[str, Any]], chosen: Any) -> None:
    """Draw accuracy, or bits per character, against multiply-adds and parameters, as `accuracy.png`."""
    dense = [line for line in lines if line["method"] == "dense"]
    bits = "bits" in dense[0]
    key = "bits" if bits else "accuracy"
    panels: dict[str, dict[str, plots.Line]] = {}
    for label, size in (("multiply-adds", "macs"), ("parameters", "params")):
        curves: dict[str, plots.Line] = {"dense": ([1.0], [[line[key] for line in dense]])}
        for method in chosen.methods:
            at = [
                [line for line in lines if (line["method"], line["target"]) == (method, target)]
                for target in sorted(chosen.targets)
            ]
            ratios = [float(dense[0][size] / np.mean([line[size] for line in own])) for own in at]
            curves[method] = ratios, [[line[key] for line in own] for own in at]
        panels[f"times fewer {label}"] = curves
    figure = plots.panels(
        panels,
        y="bits per character" if bits else "test accuracy (%)",
        title=f"{chosen.network}, {dense[0]['note']};\n{chosen.tune_epochs} epochs of tuning, "
        f"{len(chosen.seeds)} seed{'s' * (len(chosen.seeds) > 1)}",
        percent=not bits,
        log=True,
    )
    figures.save(figure, Path(chosen.out) / "accuracy.png")


def _unit(lines: Sequence[dict[str, Any]]) -> str:
    return "bits per character" if "bits" in lines[0] else "accuracy, %"


def _mean(scores: Sequence[dict[str, Any]]) -> str:
    """Return the accuracies in percent, or bits per character: mean and standard deviation."""
    if not scores:
        return "-"
    bits = "bits" in scores[0]
    values = np.array([score["bits"] if bits else 100 * score["accuracy"] for score in scores])
    digits = 3 if bits else 2
    return f"{values.mean():.{digits}f} +- {values.std():.{digits}f}"
