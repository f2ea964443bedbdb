"""A report as one HTML file that asks for nothing outside itself and runs no script."""

import base64
import html
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator

from experiments.report.blocks import Block, Cell, Code, Contents, Heading, Image, Images, Table, Text, clean
from experiments.report.curves import INK

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", _XLINK)

# Whatever slips into the page: no script, no request, no form.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"

# ruff: noqa: E501
_STYLE = """
:root { color-scheme: light dark; --line: #d4d4d4; --quiet: #5a5a5a; --back: #ffffff; --text: #1b1b1b;
  --shade: #f4f4f2; --bar: #9cc3de; --mark: #fff1c2; --link: #00588f; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --quiet: #b0b0b0; --back: #161618; --text: #e8e8e6;
  --shade: #222226; --bar: #2c5f83; --mark: #4a3f14; --link: #7fc4f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 .5rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 50rem; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; margin: .5rem 0; }
figure { margin: 1rem 0; min-width: 0; }
figcaption { color: var(--quiet); font-size: .875rem; margin: .3rem 0; max-width: 50rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; background: var(--shade); vertical-align: bottom; }
.label { text-align: left; font-weight: normal; }
thead .label { font-weight: 600; }
.facts .label { white-space: normal; vertical-align: top; min-width: 7rem; }
.marked { background: var(--mark); }
.bar { display: block; width: 100%; min-width: 4.5rem; height: .4rem; }
.bar rect { fill: var(--bar); }
.bar .all { fill: var(--shade); }
.images { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.images figure { flex: 0 1 auto; margin: .5rem 0; max-width: 100%; }
.images img, .images svg { display: block; max-width: 100%; height: auto; }
.images svg * { stroke-linejoin: round; stroke-linecap: butt; }
pre { background: var(--shade); padding: .7rem .9rem; white-space: pre-wrap; font-size: .875rem; user-select: all; }
@media print { :root { color-scheme: light; --back: #fff; --text: #000; --line: #bbb; --quiet: #333; --shade: #eee;
    --bar: #9cc3de; --mark: #fff1c2; }
  body { max-width: none; font-size: 10pt; padding: 0; } .scroll { overflow: visible; }
  th, td { padding: .15rem .4rem; font-size: 7.5pt; } thead th { white-space: normal; min-width: 2.5rem; }
  thead .label { white-space: nowrap; } .images { gap: .5rem; } .images figure { max-width: 48%; }
  * { print-color-adjust: exact; } figure, tr { break-inside: avoid; } h2, h3, h4 { break-after: avoid; } }
"""


def page(title: str, blocks: Iterable[Block]) -> str:
    """Return the whole file; everything in the title and the blocks is text, nothing markup."""
    body = "\n".join(text for block in blocks for text in _block(block))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
{body}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    return html.escape(clean(text))


def _block(block: Block) -> Iterator[str]:
    match block:
        case Heading(level, text, anchor):
            yield f'<h{level} id="{_text(anchor)}">{_text(text)}</h{level}>'
        case Text(text):
            yield f"<p>{_text(text)}</p>"
        case Code(text):
            yield f'<pre tabindex="0"><code>{_text(text)}</code></pre>'
        case Contents(links):
            yield '<nav aria-label="Contents"><ul>'
            for x in links:
                yield f'<li><a href="#{_text(x.anchor)}">{_text(x.text)}</a>: {_text(x.about)}</li>'
            yield "</ul></nav>"
        case Images(images):
            yield '<div class="images">'
            yield from map(_image, images)
            yield "</div>"
        case Table():
            yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    name = _text(table.caption)
    facts = ' class="facts"' if table.labels == len(table.heads) else ""
    yield f"<figure><figcaption>{name}</figcaption>"
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table{facts}>'
    heads = (
        f'<th scope="col"{_label(i < table.labels)}>{_text(head)}</th>' for i, head in enumerate(table.heads)
    )
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    for row in table.rows:
        yield f"<tr>{''.join(_cell(cell, i, table) for i, cell in enumerate(row))}</tr>"
    yield "</tbody></table></div></figure>"


def _cell(cell: Cell, index: int, table: Table) -> str:
    bar = ""
    if cell.bar is not None:
        width = f"{100 * min(1.0, max(0.0, cell.bar)):.2f}"
        bar = (
            '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="all" width="100" height="8"/><rect width="{width}" height="8"/></svg>'
        )
    if index == 0 and table.labels:
        return f'<th scope="row" class="label{" marked" * cell.marked}">{_text(cell.text)}{bar}</th>'
    return f"<td{_label(index < table.labels, cell.marked)}>{_text(cell.text)}{bar}</td>"


def _label(label: bool, marked: bool = False) -> str:
    names = " ".join(["label"] * label + ["marked"] * marked)
    return f' class="{names}"' if names else ""


def _image(image: Image) -> str:
    caption = _text(image.caption)
    if image.name.endswith(".svg"):
        shown = inline(image)
    else:
        data = base64.b64encode(image.data).decode()
        shown = f'<img src="data:image/png;base64,{data}" width="{image.width}" alt="{caption}">'
    return (
        f'<figure style="width: {max(image.width, 200)}px">{shown}<figcaption>{caption}</figcaption></figure>'
    )


def inline(image: Image) -> str:
    """Return an SVG of matplotlib's as part of a page: in the page's colours, with names of its own."""
    root = ET.fromstring(image.data)
    stem = image.name.removesuffix(".svg")
    for parent in list(root.iter()):
        for child in list(parent):
            # The style would be the whole page's; the metadata are of no use.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{stem}-{value}")
            elif key == f"{{{_XLINK}}}href":
                element.set(key, f"#{stem}-{value.removeprefix('#')}")
            elif key in ("style", "clip-path"):
                element.set(key, value.replace(INK, "currentColor").replace("url(#", f"url(#{stem}-"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", clean(image.caption))
    return ET.tostring(root, encoding="unicode")
