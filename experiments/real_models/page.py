"""The page of the real-model command: tables in Markdown and a picture."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.real_models import table
from experiments.real_models.catalog import TRIED
from experiments.show import figures, tables
from jaxprune.files.atomic import replacing

_TITLE = "# Real models"
_STATUS = {
    "wrong": "wrong",
    "refused": "refused",
    "failed": "failed",
    "broken": "own code fails",
    "timeout": "out of time",
    "memory": "out of memory",
    "died": "died",
}


def write(
    lines: Sequence[Mapping[str, Any]], baseline: Mapping[str, Sequence[table.Reached]] | None, path: Path
) -> None:
    """Write the page, and its picture beside it under the same name."""
    picture = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(lines, picture)
    with replacing(path) as new:
        new.write_text(text(lines, baseline, picture.name), encoding="utf-8")


def text(
    lines: Sequence[Mapping[str, Any]], baseline: Mapping[str, Sequence[table.Reached]] | None, picture: str
) -> str:
    """Return the page."""
    fraction = f"{lines[0]['fraction']:.0%}" if lines else "some"
    parts = [
        _TITLE,
        f"Models from libraries, in small random configurations. {fraction} of the units of every group that "
        "can lose some are pruned by L2 magnitude, and the network is compacted. It is compared with the "
        "masked network, and again with the dense one at random values of the small params that are put back "
        "among zeros; the error is the larger difference, relative to the largest output. The command writes "
        "this page:",
        "```bash\npython -m experiments.real_models --page docs/results/real-models.md\n```",
        _summary(lines),
        f"![ratio of params and error, model by model]({picture})",
        _explained(),
    ]
    for library in dict.fromkeys(line["model"].partition("/")[0] for line in lines):
        own = [line for line in lines if line["model"].partition("/")[0] == library]
        parts += [f"## {library}", _versions(own), _markdown(own)]
    parts += ["## What is not removed, and why", _refusals(lines)]
    tried = "\n".join(f"- {names}: {why}." for names, why in TRIED.items())
    parts += ["## Tried, and not here", tried]
    if baseline is not None:
        parts += ["## What was reached before", _before(lines, baseline)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(lines: Sequence[Mapping[str, Any]]) -> str:
    ok = [line for line in lines if line["status"] in ("ok", "wrong")]
    text = table.summarise(lines)
    whole = [line for line in ok if line["removable"] == line["groups"]]
    if ok:
        text += f" In {len(whole)} of the {len(ok)} that were compacted every group can lose units."
    libraries = {line["model"].partition("/")[0] for line in lines if not line["ours"]}
    return f"{text} The others' code comes from {len(libraries)} libraries."


def _explained() -> str:
    return (
        "Groups: those that can lose units, of those found. Share: of the params, that lie in them. "
        "Expected: params left over params, counted by leaf from the masks, as the product over its axes of "
        "the slices that no pruned unit has; params and MACs: what the compacted network has, over what the "
        "dense one has. A network is right if the error is at most 1e-4 in float32, .05 where it computes in "
        "16 bits. *Ours* are networks that are written in this repository, of the library's layers at most."
    )


def _versions(lines: Sequence[Mapping[str, Any]]) -> str:
    packages: dict[str, str] = {}
    for line in lines:
        packages |= line["packages"]
    return ", ".join(f"{package} {version}" for package, version in packages.items())


def _markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    heads = ["model", "kind", "params", "groups", "share", "expected", "params ratio", "MACs ratio", "error"]
    rows = [[*heads, "seconds"]]
    for line in lines:
        name = line["model"].partition("/")[2] + (" (ours)" if line["ours"] else "")
        error = table.worst(line)
        shown = "-" if error is None else f"{error:.1e}"
        rows.append(
            [
                name,
                line["kind"],
                f"{line['params']:,}" if "params" in line else "-",
                f"{line['removable']}/{line['groups']}" if "groups" in line else "-",
                *(_number(line.get(key)) for key in ("share", "expected")),
                _number(line.get("ratio")) if line["status"] in ("ok", "wrong") else _STATUS[line["status"]],
                _number(line.get("macs_ratio")),
                f"**{shown}**" if line["status"] == "wrong" else shown,
                f"{sum(line['seconds'].values()):.0f}",
            ]
        )
    notes = {line["model"].partition("/")[2]: line["note"] for line in lines if line["note"]}
    by_note: dict[str, list[str]] = {}
    for name, note in notes.items():
        by_note.setdefault(note, []).append(name)
    said = [f"{', '.join(some)}: {note}." for note, some in by_note.items()]
    return tables.markdown(rows, labels=2) + ("\n\n" + "\n".join(said) if said else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _refusals(lines: Sequence[Mapping[str, Any]]) -> str:
    text = []
    for line in lines:
        if line["status"] not in ("ok", "wrong"):
            text.append(f"- {line['model']}: {_code(table.said(line))}")
        counts = Counter(why for _, why in line.get("refusals", ()))
        names: dict[str, str] = {}
        for name, why in line.get("refusals", ()):
            names.setdefault(why, name)
        for why, count in counts.most_common():
            if line["status"] == "refused" and why == line["reason"]:
                continue
            more = f" and {count - 1} more" if count > 1 else ""
            text.append(f"- {line['model']}, `{names[why]}`{more}: {_code(why)}")
        if stayed := line.get("stayed"):
            more = f" ({len(stayed) - 1} more)" if len(stayed) > 1 else ""
            text.append(f"- {line['model']}: {_code(stayed[0])}{more}")
    return "\n".join(text) if text else "Nothing: every group of every model can lose units."


def _code(why: str) -> str:
    """Return a reason as code, without the folders of the machine it was found on."""
    words = [
        word if "/site-packages/" not in word else word[word.index("/site-packages/") + 15 :]
        for word in why.split()
    ]
    return f"`{' '.join(words).replace('`', chr(39))}`"


def _before(lines: Sequence[Mapping[str, Any]], baseline: Mapping[str, Sequence[table.Reached]]) -> str:
    sources = ", ".join(dict.fromkeys(one.measured_with for reached in baseline.values() for one in reached))
    head, *rest = table.compared(lines, baseline).splitlines()
    head = (
        f"Measured with {sources}. {head} Ratios are compared where the model was configured as it is here."
    )
    return "\n".join([head, "", *(f"- {line.strip()}" for line in rest)])


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the ratios and the errors, model by model, a colour for each library."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [line for line in lines if line["status"] in ("ok", "wrong")]
    shown.sort(key=lambda line: (line["model"].partition("/")[0].lower(), line["ratio"]))
    libraries = list(dict.fromkeys(line["model"].partition("/")[0] for line in shown))
    colours = mpl.colormaps["tab20"].resampled(max(len(libraries), 1))
    figure = Figure(figsize=(13, 7), layout="constrained")
    ratios, errors = figure.subplots(2, 1, sharex=True)
    for number, library in enumerate(libraries):
        own = [(x, line) for x, line in enumerate(shown) if line["model"].partition("/")[0] == library]
        places = [x for x, _ in own]
        style = {"color": colours(number), "marker": "osD^v"[number // 20 % 5], "linestyle": "none", "ms": 4}
        ratios.plot(places, [line["ratio"] for _, line in own], label=library, **style)
        ratios.plot(places, [line["expected"] for _, line in own], color="black", marker="_", ls="none", ms=5)
        errors.plot(places, [max(table.worst(line) or 0, 1e-9) for _, line in own], **style)
    ratios.set_ylabel("params, small over dense\n(line: what the masks leave)")
    ratios.set_ylim(0, 1)
    errors.set_ylabel("error, of the largest output")
    errors.set_yscale("log")
    errors.axhline(1e-4, color="grey", linestyle="--", linewidth=1)
    errors.set_xlabel("models, by library (an error of 0 is drawn at 1e-9)")
    errors.set_xticks([])
    for axis in (ratios, errors):
        axis.grid(alpha=0.3, axis="y")
    if libraries:
        ratios.legend(ncols=6, fontsize=7)
    figure.suptitle(f"{len(shown)} models, compacted", fontsize=11)
    figures.save(figure, path)
