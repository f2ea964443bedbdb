"""A report as Markdown, its pictures in files beside it; tables stay within 80 columns where they can."""

import re
import textwrap
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence

from experiments.report.blocks import Block, Code, Contents, Heading, Images, Table, Text, clean
from experiments.report.curves import INK
from experiments.show.tables import WIDTH, pieces


def document(title: str, blocks: Iterable[Block], folder: str) -> tuple[str, dict[str, bytes]]:
    """Return the text, in GitHub's Markdown, and its pictures by name.

    The pictures are to be written to `folder`, which is relative to the document.
    """
    blocks = list(blocks)
    files: dict[str, bytes] = {}
    slugs: dict[str, int] = {}
    named = {
        block.anchor: _slug(block.text, slugs)
        for block in [Heading(1, title, ""), *blocks]
        if isinstance(block, Heading)
    }
    text, address = [f"# {_escape(title)}", ""], urllib.parse.quote(clean(folder))
    for block in blocks:
        if isinstance(block, Images):
            for image in block.images:
                files[image.name] = _on_white(image.data) if image.name.endswith(".svg") else image.data
                alt = _escape(re.split("[:;,]", image.caption)[0])
                text += [f"![{alt}]({address}/{image.name})", "", *_paragraph(image.caption), ""]
        elif isinstance(block, Contents):
            text += [
                f"- [{_escape(link.text)}](#{named[link.anchor]}): {_escape(link.about)}"
                for link in block.links
            ]
            text.append("")
        else:
            text += [*_block(block), ""]
    return "\n".join(text), files


def _block(block: Block) -> Iterator[str]:
    match block:
        case Heading(level, text, _):
            yield f"{'#' * level} {_escape(text)}"
        case Text(text):
            yield from _paragraph(text)
        case Code(text):
            # A fence longer than any in the text.
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
            yield from (f"{fence}bash", clean(text), fence)
        case Table():
            yield from (*_paragraph(block.caption), "")
            yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    """Return the table, its columns in as many pieces as it takes; the labels are repeated."""
    columns = [
        [_escape(head), *(_escape(row[i].text) for row in table.rows)] for i, head in enumerate(table.heads)
    ]
    widths = [max(3, *map(len, column)) for column in columns]
    for number, piece in enumerate(pieces(widths, table.labels, gap=3, edge=4)):
        if number:
            yield ""
        yield from _piece([columns[i] for i in piece], [widths[i] for i in piece], table.labels)


def _piece(columns: Sequence[Sequence[str]], widths: Sequence[int], labels: int) -> Iterator[str]:
    for number, row in enumerate(zip(*columns, strict=True)):
        cells = (
            f"{text:<{width}}" if i < labels else f"{text:>{width}}"
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            rules = ("-" * width if i < labels else "-" * (width - 1) + ":" for i, width in enumerate(widths))
            yield f"| {' | '.join(rules)} |"


def _paragraph(text: str) -> list[str]:
    """Return lines of at most 80 columns, none of which begins a list, a heading or a quotation."""
    lines = textwrap.wrap(_escape(text), WIDTH, break_long_words=False, break_on_hyphens=False)
    return [re.sub(r"^(\d*)(?=[#>+=.)-])", r"\1\\", line) for line in lines]


def _escape(text: str) -> str:
    """Escape text for Markdown, except for what has a meaning at the start of a line."""
    text = " ".join(clean(text).split())
    text = re.sub(r"([\\`*$|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    # Underscores within words mean nothing, and brackets only before a parenthesis.
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text).replace("](", "]\\(").replace("![", "!\\[")


def _slug(text: str, seen: dict[str, int]) -> str:
    """Return the name GitHub gives a heading."""
    slug = re.sub(r"[^\w\- ]", "", " ".join(clean(text).split()).lower()).replace(" ", "-")
    seen[slug] = seen.get(slug, -1) + 1
    return f"{slug}-{seen[slug]}" if seen[slug] else slug


def _on_white(svg: bytes) -> bytes:
    """Return an SVG that can be read on any page: dark on white."""
    text = svg.decode().replace(INK, "#222222")
    return re.sub(
        r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', text, count=1
    ).encode()
