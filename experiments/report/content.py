"""What a report says: the blocks of each section."""

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.report import blocks, curves, groups, layers, names
from experiments.report.blocks import Block, Cell, Code, Heading, Image, Images, Table, Text
from experiments.report.groups import Group, Part
from experiments.report.read import Line, Section, differing, distinct

_MOST_ROWS = 400


def content(sections: Sequence[Section], notes: Sequence[str]) -> list[Block]:
    """Return all blocks of a report but its title."""
    found: list[Block] = [Text(note) for note in notes]
    titles = [_title(section) for section in sections]
    anchors = [f"section-{number}" for number in range(1, len(sections) + 1)]
    links = [
        blocks.Link(title, anchor, _size(section.lines))
        for section, title, anchor in zip(sections, titles, anchors, strict=True)
    ]
    found.append(blocks.Contents(links))
    for section, title, anchor in zip(sections, titles, anchors, strict=True):
        found.append(Heading(2, title, anchor))
        found += _section(section, anchor)
    return found


def _title(section: Section) -> str:
    task = ", ".join(groups.show(value) for value in section.task.values())
    return f"{section.study}: {task}" if task else section.study


def _section(section: Section, anchor: str) -> Iterator[Block]:
    parts = groups.parts(section)
    yield Text(_lead(section.lines, parts))
    shared = _shared(parts) if len(parts) > 1 else {}
    yield from _remarked(shared)
    if rest := {name: value for name, value in shared.items() if not _is_remark(name, value)}:
        yield _same(rest)
    for number, part in enumerate(parts, start=1):
        own = f"{anchor}-{number}" if len(parts) > 1 else anchor
        if len(parts) > 1:
            yield Heading(3, _part_title(part), own)
        yield from _part(part._replace(same={k: v for k, v in part.same.items() if k not in shared}), own)
    yield from layers.sparsity(parts, anchor)
    yield from layers.pictures(parts, anchor)
    yield from _runs(section, anchor)


def _lead(lines: Sequence[Line], parts: Sequence[Part]) -> str:
    text = f"{_size(lines)}."
    devices = list(dict.fromkeys(str(line.versions["device"]) for line in lines if "device" in line.versions))
    if devices:
        text = f"{text[:-1]}; on {', '.join(devices)}."
    if repeats := sum(part.repeats for part in parts):
        text += f" {repeats} of the lines repeat a seed of their row, and are averaged like other seeds."
    # The same runs in two files, as after copying a folder.
    identities = {_identity(line) for line in lines}
    if len({(line.file, *_identity(line)) for line in lines if "seed" in line.fields}) > len(identities):
        twice = len(lines) - len(identities)
        text += f" {twice} of the lines say what lines of other files say: given twice, they count twice."
    return text


def _size(lines: Sequence[Line]) -> str:
    """Return how many lines and seeds there are."""
    seeds = list(
        dict.fromkeys(groups.show(x.fields["seed"]) for x in lines if x.fields.get("seed") is not None)
    )
    text = f"{len(lines):,} line{'s' * (len(lines) != 1)}"
    if not seeds:
        return f"{text}, no seeds"
    listed = ", ".join(seeds) if len(seeds) <= 12 else f"{', '.join(seeds[:11])}, ..."
    return f"{text}, {len(seeds)} seed{'s' * (len(seeds) != 1)} ({listed})"


def _identity(line: Line) -> tuple:
    return repr(sorted(line.fields.items(), key=lambda item: item[0])), repr(line.layers)


def _shared(parts: Sequence[Part]) -> dict[str, Any]:
    first = parts[0].same
    return {
        k: v for k, v in first.items() if all(repr(p.same.get(k)) == repr(v) and k in p.same for p in parts)
    }


def _is_remark(name: str, value: Any) -> bool:
    return isinstance(value, str) and name == "note"


def _remarked(same: dict[str, Any]) -> Iterator[Block]:
    """Return a study's own words about all of its lines."""
    yield from (Text(f"{k.capitalize()}: {v}") for k, v in same.items() if _is_remark(k, v))


def _part_title(part: Part) -> str:
    for name, value in part.same.items():
        if isinstance(value, str) and len(value) < 40 and not _is_remark(name, value):
            return f"{name}: {value}"
    return f"by {', '.join(part.factors)}" if part.factors else "other lines"


def _same(same: dict[str, Any]) -> Table:
    rows = [[Cell(name), Cell(groups.show(value))] for name, value in same.items()]
    return Table("The same in all lines", ["field", "value"], rows, 2)


def _part(part: Part, anchor: str) -> Iterator[Block]:
    figure = next(iter(name for name in part.figures if name not in part.lists), None)
    yield from _remarked(part.same)
    if figure is not None:
        if text := _baseline(part, figure):
            yield Text(text)
        if table := _by_method(part, figure):
            yield table
        images = []
        for index, axis in enumerate(curves.axes(part), start=1):
            name = f"{anchor}-curve-{index}"
            if drawn := curves.draw(part, figure, axis, name):
                images.append(Image(f"{name}.svg", drawn[0].encode(), drawn[1], 540))
        if images:
            yield Images(images)
    if part.figures:
        yield _every_figure(part)
    if rest := {name: value for name, value in part.same.items() if not _is_remark(name, value)}:
        yield _same(rest)
    if part.remarks:
        yield _remarks(part)


def _figures(part: Part, name: str, own: Sequence[Group]) -> list[str]:
    found = [group.figure(name) for group in own]
    if name in part.lists:
        medians = [
            np.median(_finite(group, name)) if f.found else np.nan
            for f, group in zip(found, own, strict=True)
        ]
        return blocks.ranges([float(m) for m in medians], found)
    values = [line.fields.get(name) for group in own for line in group.lines]
    if all(isinstance(x, bool) for x in values if x is not None):
        return [f"{f.mean * f.found:.0f} of {f.found}" if f.found else "-" for f in found]
    whole = all(isinstance(x, int) for x in values if x is not None)
    return blocks.column(found, name in part.percent, whole)


def _finite(group: Group, name: str) -> list[float]:
    return [x for x in groups.numbers([line.fields.get(name) for line in group.lines]) if np.isfinite(x)]


def _head(part: Part, name: str) -> str:
    title = f"{name}, %" if name in part.percent else name
    return f"{title}, median (least to most)" if name in part.lists else title


def _baseline(part: Part, figure: str) -> str | None:
    found = names.baselines(part, figure)
    if not found or len(found) > 12:
        return None
    texts = blocks.column(list(found.values()), figure in part.percent)
    unit = " %" if figure in part.percent else ""
    named = (f"{text}{unit}{f' ({name})' if name else ''}" for name, text in zip(found, texts, strict=True))
    return f"Nothing pruned: {figure} {'; '.join(named)}."


def _by_method(part: Part, figure: str) -> Table | None:
    """Return a row for each level, a column for each combination of factors: what a study prints."""
    if not part.factors or not part.levels or figure in part.lists:
        return None
    own = [group for group in part.groups if not names.own_method(group)]
    methods = list(dict.fromkeys(group.factors for group in own))
    rows = sorted(
        {g.levels: None for g in own}, key=lambda values: tuple(-np.inf if x is None else x for x in values)
    )
    if not 2 <= len(methods) <= 24 or len(rows) > _MOST_ROWS:
        return None
    texts = dict(zip(((g.factors, g.levels) for g in own), _figures(part, figure, own), strict=True))
    table = [
        [*(Cell(names.level(part, name, x)) for name, x in zip(part.levels, values, strict=True)),
         *(Cell(texts.get((method, values), "-")) for method in methods)]
        for values in rows
    ]  # fmt: skip
    if len(texts) < len(rows) * len(methods) / 3:  # most of it would be empty
        return None
    heads = [_head(part, name) for name in part.levels] + list(map(names.namer(part), methods))
    return Table(f"{_head(part, figure)}{_meaning(table)}", heads, table, len(part.levels))


def _every_figure(part: Part) -> Table:
    shown = part.groups[:_MOST_ROWS]
    lines = {len(group.lines) for group in part.groups}
    columns = {_head(part, name): _figures(part, name, shown) for name in part.figures}
    heads = [*part.factors, *(_head(part, name) for name in part.levels)]
    rows = []
    for index, group in enumerate(shown):
        levels = (names.level(part, name, x) for name, x in zip(part.levels, group.levels, strict=True))
        own = [*map(groups.show, group.factors), *levels]
        own += [str(len(group.lines))] * (len(lines) > 1) + [texts[index] for texts in columns.values()]
        rows.append([Cell(text) for text in own])
    heads += ["lines"] * (len(lines) > 1) + list(columns)
    each = f", of {max(lines)} lines each" if len(lines) == 1 and max(lines) > 1 else ""
    caption = f"Every figure{each}{_meaning(rows)}"
    if len(part.groups) > len(shown):
        caption += f"; the first {len(shown)} of {len(part.groups):,} rows, the others are in the files"
    labels = len(part.factors) + len(part.levels)
    return Table(caption, heads, rows, labels) if labels else _upright(caption, heads, rows)


def _upright(caption: str, heads: list[str], rows: list[list[Cell]]) -> Table:
    """Return a table with a row for each figure, where there is nothing to tell rows apart."""
    turned = [[Cell(head), *(row[i] for row in rows)] for i, head in enumerate(heads)]
    return Table(caption, ["figure", *([""] * (len(rows) - 1)), "value"], turned, 1)


def _meaning(rows: list[list[Cell]]) -> str:
    texts = [cell.text for row in rows for cell in row]
    text = ": mean ± standard deviation over seeds" if any(" ± " in t for t in texts) else ""
    if any(re.search(r"\[\d+/\d+\]$", t) for t in texts):
        text += "; [1/3]: one of three lines has a finite value"
    return text


def _remarks(part: Part) -> Table:
    rows = []
    for name in part.remarks:
        own = [line.fields[name] for group in part.groups for line in group.lines if name in line.fields]
        values = list(dict.fromkeys(map(groups.show, own)))
        more = f" and {len(values) - 4} more" if len(values) > 5 else ""
        rows.append([Cell(name), Cell("; ".join(v[:80] for v in values[: 4 if more else 5]) + more)])
    return Table("Other fields, and what they hold", ["field", "values"], rows, 2)


def _runs(section: Section, anchor: str) -> Iterator[Block]:
    """Yield configs, commands, versions and files."""
    lines = section.lines
    yield Heading(3, "How it was made", f"{anchor}-runs")
    commands = list(dict.fromkeys(line.command for line in lines if line.command))
    if commands:
        more = f"\n# and {len(commands) - 40} more" if len(commands) > 40 else ""
        yield Code("\n".join(commands[:40]) + more)
    files = list(dict.fromkeys(line.file for line in lines))
    counts = {file: sum(line.file == file for line in lines) for file in files} if len(files) < 100 else {}
    listed = [f"{file} ({counts[file]:,} line{'s' * (counts[file] != 1)})" for file in counts]
    yield Text(f"From {', '.join(listed) if listed else f'{len(files)} files'}.")
    yield from _settings("Config", distinct([line.config for line in lines]), lines, lambda line: line.config)
    versions = distinct([line.versions for line in lines])
    if len(versions) == 1:
        listed = ", ".join(f"{name} {groups.show(version)}" for name, version in versions[0].items())
        yield Text(f"Versions: {listed or 'not said'}.")
    else:
        yield from _settings("Versions", versions, lines, lambda line: line.versions)


def _settings(title: str, found: list[dict[str, Any]], lines: Sequence[Line], of: Any) -> Iterator[Block]:
    """Return what all runs have in common, and a row of what differs for each."""
    differs = differing(found)
    same = {key: value for key, value in found[0].items() if key not in differs}
    if same:
        rows = [[Cell(key), Cell(groups.show(value))] for key, value in same.items()]
        caption = f"{title}, the same in all runs" if differs else title
        yield Table(caption, ["setting", "value"], rows, 2)
    if differs:
        rows = []
        for one in found[:100]:
            own = sum(of(line) == one for line in lines)
            cells = [Cell(groups.show(one[key]) if key in one else "-", marked=True) for key in differs]
            rows.append([Cell(f"{own:,}"), *cells])
        more = f"; the first 100 of {len(found):,}" if len(found) > 100 else ""
        yield Table(f"{title}, what differs between runs{more}", ["lines", *differs], rows, len(differs) + 1)


def title_of(results: Sequence[str]) -> str:
    """Return the title of a report."""
    return (
        f"Results of {shlex.join(results)}"
        if len(results) == 1
        else f"Results of {len(results)} files and folders"
    )
