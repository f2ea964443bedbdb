"""The channel-pruning study's tables and plot.

Everywhere `lines` are the study's results and `chosen` its settings, the network's defaults filled in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.show import figures


def summarise(lines: Sequence[dict[str, Any]], chosen: Any) -> str:
    """The lines as tables of at most 80 columns, means and standard deviations over seeds."""
    dense = [line for line in lines if line["method"] == "dense"]
    sizes = [str(size) for size in chosen.batch_sizes][:3] if chosen.timing_runs else []
    text = [f"dense: {_mean(dense)} {_unit(dense)}"]
    if "bits" in dense[0]:
        text[0] += f" ({np.mean([line['loss'] for line in dense]):.3f} nats)"
    text.append(f"{dense[0]['params']:,} parameters, {dense[0]['macs']:,} multiply-adds (MACs)")
    heads = "".join(f"{f'x@{size}':>7}" for size in sizes) + f"{'nats':>8}" * ("bits" in dense[0])
    for target in chosen.targets:
        text += ["", f"{target:g} times fewer multiply-adds, {chosen.tune_epochs} epochs of tuning"]
        text.append(f"{_unit(dense):>54}")
        text.append(f"{'method':<11}{'MACs x':>8}{'params':>10}{'before':>9}{'after':>16}{heads}")
        for method in chosen.methods:
            own = [line for line in lines if (line["method"], line["target"]) == (method, target)]
            ratio, params = (np.mean([line[key] for line in own]) for key in ("macs_ratio", "params"))
            before = _mean([line["before"] for line in own if line["before"]]).split(" ")[0]
            times = "".join(f"{np.mean([line['speed_up'][size] for line in own]):>7.2f}" for size in sizes)
            times += f"{np.mean([line['loss'] for line in own]):>8.3f}" * ("bits" in dense[0])
            text.append(f"{method:<11}{ratio:>8.2f}{params:>10,.0f}{before:>9}{_mean(own):>16}{times}")
    errors = [line["compaction_error"] for line in lines if line["method"] != "dense"]
    text += ["", f"largest difference of masked and compacted logits: {max(errors, default=0):.1e}"]
    if sizes:
        text.append(f"x@{sizes[-1]}: times as fast in batches of {sizes[-1]}, both compiled, timed in turn")
    return "\n".join(text)


def widths(lines: Sequence[dict[str, Any]], target: float) -> str:
    """What the rankings leave of each group, with the first seed, as a table."""
    own = {
        line["method"]: line["widths"]
        for line in lines
        if line["target"] == target and line["seed"] == lines[0]["seed"] and line["method"] != "dense"
    }
    # Random and gradual have local's widths, scratch those of --ranking.
    columns = [m for m in ("global", "local", "isomorphic", "iterative") if m in own] or list(own)
    text = [f"{'channels that stay, ' + f'{target:g}x':<32}{'of':>6}" + "".join(f"{m:>11}" for m in columns)]
    for group, (_, units) in own[columns[0]].items() if columns else ():
        name = group.removeprefix("params/").rsplit("/", 1)[0]
        text.append(f"{name[-32:]:<32}{units:>6}" + "".join(f"{own[m][group][0]:>11}" for m in columns))
    return "\n".join(text)


def plot(lines: Sequence[dict[str, Any]], chosen: Any) -> None:
    """Accuracy, or bits per character, against multiply-adds and parameters, as `accuracy.png`."""
    dense = [line for line in lines if line["method"] == "dense"]
    key, factor = ("bits", 1) if "bits" in dense[0] else ("accuracy", 100)

    def values(own: Sequence[dict[str, Any]]) -> list[float]:
        return [factor * line[key] for line in own]

    panels = []
    for label, size in (("multiply-adds", "macs"), ("parameters", "params")):
        curves = {"dense": figures.Curve([1.0], np.array([values(dense)]))}
        for method in chosen.methods:
            at = [
                [line for line in lines if (line["method"], line["target"]) == (method, target)]
                for target in sorted(chosen.targets)
            ]
            ratios = [dense[0][size] / np.mean([line[size] for line in own]) for own in at]
            curves[method] = figures.Curve([float(x) for x in ratios], np.array([values(own) for own in at]))
        panels.append((f"times fewer {label}", curves))
    figures.panels(
        Path(chosen.out) / "accuracy.png",
        f"{chosen.network}, {dense[0]['note']};\n{chosen.tune_epochs} epochs of tuning, "
        f"{len(chosen.seeds)} seed{'s' * (len(chosen.seeds) > 1)}",
        panels,
        figure="bits per character" if key == "bits" else "test accuracy (%)",
        factor=1,
    )


def _unit(lines: Sequence[dict[str, Any]]) -> str:
    return "bits per character" if "bits" in lines[0] else "accuracy, %"


def _mean(scores: Sequence[dict[str, Any]]) -> str:
    """Accuracies in percent, or bits per character: mean and standard deviation."""
    if not scores:
        return "-"
    bits = "bits" in scores[0]
    values = np.array([score["bits"] if bits else 100 * score["accuracy"] for score in scores])
    digits = 3 if bits else 2
    return f"{values.mean():.{digits}f} +- {values.std():.{digits}f}"
