"""Rows of text as tables: for the terminal and in Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Sequence[str]]


def plain(rows: Rows) -> str:
    """A table of fixed width, header first: the first column to the left, the others to the right.

    Example:
      >>> from experiments.benchmarks.parts.markdown import plain
      >>> print(plain([("", "time"), ("dense", "1.00"), ("masked", "1.02")]))
              time
      dense   1.00
      masked  1.02
    """
    first, *others = _widths(rows)
    lines = [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Rows) -> str:
    """The same as a Markdown table.

    Example:
      >>> from experiments.benchmarks.parts.markdown import markdown
      >>> print(markdown([("way", "time"), ("dense", "1.00")]))
      | way | time |
      |---|---:|
      | dense | 1.00 |
    """
    header, *rest = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    marks = "|".join(["---"] + ["---:"] * (len(header) - 1))
    return "\n".join([_line(header), f"|{marks}|", *map(_line, rest)])


def remarks(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a benchmark says beside its figures: the lines that are a remark."""
    return [str(line["remark"]) for line in lines if "remark" in line]


def show(title: str, rows: Rows, lines: Sequence[Mapping[str, Any]]) -> str:
    """A title, the table and the remarks below it, for the terminal."""
    said = [textwrap.fill(line, 80) for remark in remarks(lines) for line in remark.splitlines()]
    return "\n".join([textwrap.fill(title, 80), "", plain(rows), *said])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _widths(rows: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
