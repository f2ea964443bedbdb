"""Tables of the real-model command, and what was reached before."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.show.tables import to_csv
from jaxprune.files.atomic import replacing

_RATIOS = ("ratio", "macs_ratio", "error")
_FIELDS = ("model", "groups", "removable", "share", *_RATIOS, "measured_with", "configuration")
ROUNDING = 0.0015  # the figures of a table are rounded to three places
ERROR = 1e-5  # an error below it is rounding, however much more than before


class Reached(NamedTuple):
    """A line of the table of what was reached before.

    Attributes:
      groups, removable: how many groups were found, and could lose units.
      share: of the params, that lie in groups that can lose units.
      ratio, macs_ratio: small over dense params and multiply-adds; None where it was not compacted.
      error: the larger of both errors; None where it was not compared.
      measured_with: the version it was reached with.
      same: whether the model was configured as it is here, so that its figures compare.
    """

    groups: int
    removable: int
    share: float
    ratio: float | None
    macs_ratio: float | None
    error: float | None
    measured_with: str
    same: bool


def read_baseline(path: Path) -> dict[str, list[Reached]]:
    """Read a table of what was reached before, as `write_csv` writes it.

    A model may be there more than once.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a column or a number that is not what it should be, with the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        if tuple(rows.fieldnames or ()) != _FIELDS:
            raise ValueError(f"{path}: the columns must be {', '.join(_FIELDS)}, got {rows.fieldnames}.")
        found: dict[str, list[Reached]] = {}
        for row in rows:
            try:
                if row["configuration"] not in ("same", "other"):
                    raise ValueError(f"configuration must be same or other, got {row['configuration']!r}")
                figures = [float(row[name]) if row[name] else None for name in _RATIOS]
                reached = Reached(
                    int(row["groups"]),
                    int(row["removable"]),
                    float(row["share"]),
                    figures[0],
                    figures[1],
                    figures[2],
                    row["measured_with"],
                    row["configuration"] == "same",
                )
                found.setdefault(row["model"], []).append(reached)
            except ValueError as error:
                raise ValueError(f"{path}: at {row['model']!r}: {error}.") from None
    return found


def write_csv(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figures as a table that `read_baseline` reads."""
    rows: list[Sequence[Any]] = [_FIELDS]
    for line in lines:
        if "share" not in line:
            continue
        ratios = (
            f"{line[name]:.4f}" if line.get(name) is not None else "" for name in ("ratio", "macs_ratio")
        )
        error = f"{worst(line):.1e}" if worst(line) is not None else ""
        measured = f"version {line.get('versions', {}).get('jaxprune', '')}".strip()
        counts = line["model"], line["groups"], line["removable"], f"{line['share']:.4f}"
        rows.append([*counts, *ratios, error, measured, "same"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(to_csv(rows), encoding="utf-8", newline="")


def latest(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the last line of each model: it may have been measured again."""
    return {line["model"]: line for line in lines}


def worst(line: Mapping[str, Any]) -> float | None:
    """Return the larger error of a model; None where there is none."""
    errors = [line[name] for name in ("error", "error_moved") if line.get(name) is not None]
    return max(errors) if errors else None


# --- the table


def heading() -> str:
    """Return the columns of `row`."""
    return (
        f"{'model':<40}{'groups':>9}{'share':>7}{'expected':>9}{'params':>8}{'MACs':>7}{'error':>9}{'s':>6}"
    )


def row(line: Mapping[str, Any]) -> str:
    """Return a model's figures, or why there are none."""
    name = line["model"] if len(line["model"]) < 40 else f"{line['model'][:36]}..."
    groups = f"{line['removable']}/{line['groups']}" if "groups" in line else "-"
    seconds = sum(line["seconds"].values())
    error = worst(line)
    text = f"{name:<40}{groups:>9}{_share(line.get('share'), 7)}{_share(line.get('expected'), 9)}"
    text += f"{_share(line.get('ratio'), 8)}{_share(line.get('macs_ratio'), 7)}"
    text += f"{'-' if error is None else f'{error:.1e}':>9}{seconds:>6.0f}"
    return text if line["status"] == "ok" else f"{text}\n    {said(line)}"


def _share(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.3f}':>{width}}"


def said(line: Mapping[str, Any]) -> str:
    """Return what became of a model that is not ok, in a sentence."""
    if line["status"] == "wrong":
        return f"WRONG: off by {worst(line):.1e} of the largest output, {line['tolerance']:g} is allowed"
    what = {
        "refused": "REFUSED",
        "failed": f"FAILED in {line.get('stage')}",
        "broken": f"its own code fails in {line.get('stage')}",
        "timeout": "OUT OF TIME",
        "memory": "OUT OF MEMORY",
        "died": "DIED",
    }[line["status"]]
    return f"{what}: {line['reason']}"


def summarise(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return how many models there are, of how many libraries, and what became of them."""
    counts = Counter(line["status"] for line in lines)
    theirs = sum(not line["ours"] for line in lines)
    text = f"{len(lines)} models, {theirs} of them other people's code: "
    text += ", ".join(f"{number} {status}" for status, number in counts.most_common())
    errors = [
        error for line in lines if line["status"] in ("ok", "wrong") and (error := worst(line)) is not None
    ]
    if errors:
        text += f"; the largest error is {max(errors):.1e}"
    text += "."
    if short := [line["model"] for line in lines if _falls_short(line)]:
        text += f"\nLarger than the masks say they should be: {', '.join(short)}."
    return text


def _falls_short(line: Mapping[str, Any]) -> bool:
    """Return whether less was removed than the masks remove of the groups."""
    return line.get("ratio") is not None and line["ratio"] > line["expected"] + 1e-9


# --- against what was reached before


def worse(line: Mapping[str, Any], before: Reached) -> list[str]:
    """Return what has become worse of one model: groups, share, ratio, error.

    Of a model that was configured otherwise the figures that depend on its sizes are left out: only whether
    more groups cannot lose units, and whether params are in none where before none was.
    """
    found = []
    if "removable" not in line:
        return [f"it has no groups any more ({said(line)}), it had {before.removable}/{before.groups}"]
    stuck, were_stuck = line["groups"] - line["removable"], before.groups - before.removable
    if before.same and line["removable"] < before.removable:
        found.append(
            f"groups {line['removable']}/{line['groups']}, before {before.removable}/{before.groups}"
        )
    elif not before.same and stuck > were_stuck:
        found.append(
            f"{stuck} of {line['groups']} groups cannot lose units, before {were_stuck} of {before.groups}"
        )
    least = before.share - ROUNDING if before.same else (0.99 if before.share > 0.999 else 0)
    if line["share"] < least:
        found.append(f"share {line['share']:.3f}, before {before.share:.3f}")
    if before.ratio is not None and line.get("ratio") is None:
        found.append(f"it is not compacted ({said(line)}), before it was")
    elif before.ratio is not None and before.same and line["ratio"] > before.ratio + ROUNDING:
        found.append(f"params {line['ratio']:.3f}, before {before.ratio:.3f}")
    error = worst(line)
    if error is not None and error > ERROR and (before.error is None or error > 10 * before.error):
        found.append(f"error {error:.1e}, before {'none' if before.error is None else f'{before.error:.1e}'}")
    return found


def compared(lines: Sequence[Mapping[str, Any]], baseline: Mapping[str, Sequence[Reached]]) -> str:
    """Return what has become worse than a table says, and which of its models were not measured."""
    done = {line["model"]: line for line in lines}
    both = [name for name in baseline if name in done]
    text = [f"{len(both)} of the {len(baseline)} models of the table of what was reached before are here."]
    for name in both:
        for before in baseline[name]:
            whence = before.measured_with if before.same else f"{before.measured_with}, configured otherwise"
            text += [f"  worse: {name}: {what} ({whence})" for what in worse(done[name], before)]
    if len(text) == 1 and both:
        text.append("  None is worse.")
    if absent := [name for name in baseline if name not in done]:
        text.append(f"  not measured: {', '.join(absent)}")
    return "\n".join(text)
