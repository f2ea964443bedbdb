"""Tables as text, CSV and Markdown: what the reports of the library print.

The layout of a text table is a `str.format` template of one line, and every cell is a string: the caller
says how a number looks, and the template where it stands.
"""

import csv
import io
import textwrap
from collections.abc import Sequence
from typing import Any


def text_lines(layout: str, *rows: Sequence[str]) -> list[str]:
    r"""Return a line of text for each row, headings first; the layout has a field for each cell.

    Example:
      >>> print("\n".join(text_lines("{:<8}{:>6}", ("leaf", "kept"), ("bias", "4"))))
      leaf      kept
      bias         4
    """
    return [layout.format(*row) for row in rows]


def csv_table(*rows: Sequence[Any]) -> str:
    r"""Return rows as CSV; numbers are written in full.

    Example:
      >>> csv_table(("leaf", "kept"), ("a,b", 4))
      'leaf,kept\n"a,b",4\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def markdown_table(right: int, *rows: Sequence[str]) -> str:
    """Return rows as a Markdown table, headings first, with the last `right` columns aligned to the right.

    Example:
      >>> print(markdown_table(1, ("leaf", "kept"), ("bias", "4")), end="")
      | leaf | kept |
      | --- | ---: |
      | bias | 4 |
    """
    head, *cells = rows
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *escaped])


def shorten(text: str, width: int, mark: str = "...") -> str:
    """Return the end of a text that is too wide, behind a mark: the last names of a path say most.

    Example:
      >>> shorten("encoder/layers/0/kernel", 16)
      '...yers/0/kernel'
    """
    return text if len(text) <= width else mark + text[len(mark) - width :]


def wrapped(text: str, width: int = 78, break_on_hyphens: bool = True) -> list[str]:
    """Return a note below a table as lines, all but the first indented."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=break_on_hyphens)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as text.

    Example:
      >>> shape_text((3, 4)), shape_text(())
      ('3x4', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"
