"""Tables of text: for a terminal of 80 columns, in Markdown, and as CSV.

A table is rows of texts, the header first. Its first columns say what a row is and stand to the left, figures
to the right.
"""

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

WIDTH = 80
Rows = Sequence[Sequence[str]]


def text(rows: Rows, labels: int = 1, gap: int = 2) -> str:
    """Return a table for the terminal; columns that do not fit stand below, with the labels again.

    Args:
      rows: of the table, the header first.
      labels: how many columns, from the left, say what a row is.
      gap: spaces between columns.

    Example:
      >>> print(text([("", "time"), ("dense", "1.00"), ("masked", "1.02")]))
              time
      dense   1.00
      masked  1.02
    """
    tables = []
    for columns in pieces(widths(rows), labels, gap):
        lines = [(" " * gap).join(_aligned(row, columns, widths(rows), labels)).rstrip() for row in rows]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def markdown(rows: Rows, labels: int = 1) -> str:
    """Return a table in Markdown.

    Example:
      >>> print(markdown([("way", "time"), ("dense", "1.00")]))
      | way | time |
      |---|---:|
      | dense | 1.00 |
    """
    header, *rest = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    rule = "|".join(["---"] * labels + ["---:"] * (len(header) - labels))
    return "\n".join([_line(header), f"|{rule}|", *map(_line, rest)])


def to_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def widths(rows: Rows) -> list[int]:
    """Return the width of each column.

    Raises:
      ValueError: rows of different lengths.
    """
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def pieces(widths: Sequence[int], labels: int, gap: int, edge: int = 0) -> Iterator[list[int]]:
    """Share the columns out to tables of at most 80 columns of text, each with the labels.

    Args:
      widths: of the columns.
      labels: how many columns are labels.
      gap: between two columns.
      edge: what a table has beside its columns and gaps.

    Yields:
      The columns of a table, by number; at least one that is no label, if there is any.
    """
    start = edge + sum(widths[:labels]) + gap * max(0, labels - 1)
    piece, used = list(range(labels)), start
    for column in range(labels, len(widths)):
        if len(piece) > labels and used + gap + widths[column] > WIDTH:
            yield piece
            piece, used = list(range(labels)), start
        piece.append(column)
        used += gap + widths[column]
    yield piece


def percent(accuracies: Sequence[float]) -> str:
    """Return mean and standard deviation over seeds in percent, as in "97.86 +- 0.08"."""
    values = 100 * np.array(accuracies)
    return f"{values.mean():.2f} +- {values.std():.2f}"


def cell(lines: Sequence[Mapping[str, Any]], figure: str = "accuracy", **keys: Any) -> str:
    """Return mean and standard deviation in percent of the lines that have these keys; "-" for none."""
    own = [line[figure] for line in lines if all(line[key] == value for key, value in keys.items())]
    return percent(own) if own else "-"


def by_method(
    lines: Sequence[Mapping[str, Any]],
    rows: Mapping[Any, str],
    key: str,
    methods: Mapping[str, str] | Sequence[str],
    *,
    heading: str,
    figure: str = "accuracy",
) -> str:
    """Return means over seeds, a row for each value of `key` and a column for each method.

    Args:
      lines: figures, each with `method`, `key` and `figure`, which is a fraction.
      rows: the values of `key` shown, with the text that stands for each.
      key: what differs between rows.
      methods: the columns, perhaps with their titles.
      heading: above the rows' text.
      figure: what is shown.
    """
    titles = methods if isinstance(methods, Mapping) else {name: name for name in methods}
    table = [[heading, *titles.values()]]
    table += [
        [label, *(cell(lines, figure, method=method, **{key: value}) for method in titles)]
        for value, label in rows.items()
    ]
    return text(table)


def remarks(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a benchmark says beside its figures: the lines that are a remark."""
    return [str(line["remark"]) for line in lines if "remark" in line]


def titled(title: str, rows: Rows, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a title, the table and the remarks below it, for the terminal."""
    said = [textwrap.fill(line, WIDTH) for remark in remarks(lines) for line in remark.splitlines()]
    return "\n".join([textwrap.fill(title, WIDTH), "", text(rows), *said])


def _aligned(row: Sequence[str], columns: Sequence[int], widths: Sequence[int], labels: int) -> Iterator[str]:
    for column in columns:
        yield row[column].ljust(widths[column]) if column < labels else row[column].rjust(widths[column])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
