"""Tables of the studies: a row per setting, a column per method, 80 columns wide at most."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.training.loops import percent

_CELL = 16


def cell(lines: Sequence[Mapping[str, Any]], figure: str = "accuracy", **keys: Any) -> str:
    """Mean and standard deviation in percent of the lines that have these keys; "-" for none."""
    own = [line[figure] for line in lines if all(line[key] == value for key, value in keys.items())]
    return percent(own) if own else "-"


def by_method(
    lines: Sequence[Mapping[str, Any]],
    rows: Mapping[Any, str],
    key: str,
    methods: Sequence[str],
    *,
    heading: str,
    figure: str = "accuracy",
) -> list[str]:
    """Means over seeds, by row and method.

    Args:
      lines: figures, each with `method`, `key` and `figure`.
      rows: the values of `key` shown, with the text that stands for each.
      key: what differs between rows.
      methods: the columns; as many stand side by side as fit, the others below.
      heading: above the rows' text.
      figure: what is shown, a fraction.

    Returns:
      Lines of text.
    """
    width = max(len(heading), *map(len, rows.values()))
    side_by_side = (80 - width) // _CELL
    text: list[str] = []
    for start in range(0, len(methods), side_by_side):
        some = methods[start : start + side_by_side]
        text.append(f"{heading:>{width}}" + "".join(f"{method:>{_CELL}}" for method in some))
        for value, label in rows.items():
            cells = [cell(lines, figure, method=method, **{key: value}) for method in some]
            text.append(f"{label:>{width}}" + "".join(f"{text:>{_CELL}}" for text in cells))
        text.append("")
    return text[:-1]
