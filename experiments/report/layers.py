"""What a report says of layers: how sparse each is, and pictures of masks."""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.report import groups, masks, names
from experiments.report.blocks import Block, Cell, Heading, Image, Images, Table, Text
from experiments.report.groups import Group, Part
from experiments.report.read import Line, natural

_MOST_COLUMNS = 24
_MOST_PICTURES = 12  # networks whose masks are shown, in a section
_MOST_KERNELS = 24  # of each of them
_UNITS = {"layers": "weights", "kept": "weights", "widths": "channels"}


def sparsity(parts: Sequence[Part], anchor: str) -> Iterator[Block]:
    """Return a table with bars for each field of layers, where each combination of factors is sparsest."""
    fields = list(dict.fromkeys(name for part in parts for x in _lines(part.groups) for name in x.layers))
    # Counts alone say less than [kept, size] of the same paths.
    if "layers" in fields and "kept" in fields:
        fields.remove("kept")
    tables = [table for name in fields for part in parts if (table := _table(name, part))]
    if tables:
        yield Heading(3, "Sparsity of each layer", f"{anchor}-layers")
        yield from tables


def pictures(parts: Sequence[Part], anchor: str) -> Iterator[Block]:
    """Return the masks that lines name."""
    shown = [
        (names.label(part, group), line)
        for part in parts
        for group in part.groups
        for line in group.lines
        if line.masks is not None and not group.baseline
    ]
    if not shown:
        return
    yield Heading(3, "Masks", f"{anchor}-masks")
    yield Text(
        "Bright is kept, dark is removed. Inputs run down, outputs across, unless it says otherwise; where "
        "points are averages, the brightest is the most that any of them keeps."
    )
    for number, (title, line) in enumerate(shown[:_MOST_PICTURES], start=1):
        try:
            found = masks.pictures(masks.load(line))
        except ValueError as error:
            yield Text(f"{title}: {error}.")
            continue
        seed = line.fields.get("seed")
        own = title if seed is None else f"{title}, seed {groups.show(seed)}"
        yield Heading(4, own, f"{anchor}-masks-{number}")
        name = f"{anchor}-mask-{number}"
        images = [Image(f"{name}-{i}.png", p.png, p.caption, p.width) for i, p in enumerate(found, start=1)]
        yield Images(images[:_MOST_KERNELS])
        if len(images) > _MOST_KERNELS:
            yield Text(f"The first {_MOST_KERNELS} of {len(images)} pictures.")
    if len(shown) > _MOST_PICTURES:
        yield Text(f"{len(shown) - _MOST_PICTURES} more masks are not shown.")


def _lines(found: Sequence[Group]) -> list[Line]:
    return [line for group in found for line in group.lines]


def _table(name: str, part: Part) -> Table | None:
    own = [g for g in part.groups if not g.baseline and any(name in line.layers for line in g.lines)]
    sparsest = [_sparsest(name, own, factors) for factors in dict.fromkeys(g.factors for g in own)]
    if not sparsest or len(sparsest) > _MOST_COLUMNS:
        return None
    # Said once where it is the same for all.
    levels = {names.levels(part, group) for group in sparsest}
    at = f", {levels.pop()}" if len(levels) == 1 and part.levels else ""
    heads = [names.namer(part)(group.factors) if at else names.label(part, group) for group in sparsest]
    sizes = _sizes(name, part)
    columns = [_removed(name, group, sizes) for group in sparsest]
    rows = []
    for path in sorted(dict.fromkeys(path for found in columns for path in found), key=natural):
        cells = [
            Cell(f"{100 * found[path]:.2f}", bar=found[path]) if path in found else Cell("-")
            for found in columns
        ]
        rows.append([Cell(path), Cell(f"{sizes[path]:,}"), *cells])
    unit = _UNITS.get(name, name)
    many = any(len(group.lines) > 1 for group in sparsest)
    caption = f"{unit.capitalize()} removed, %{at}, where each is sparsest{'; mean over seeds' * many}"
    return Table(caption, ["layer", unit, *heads], rows, 1)


def _sparsest(name: str, own: Sequence[Group], factors: tuple) -> Group:
    """Return the group of these factors with the fewest entries left."""

    def left(group: Group) -> float:
        counts = [sum(map(_kept, line.layers[name].values())) for line in group.lines if name in line.layers]
        return float(np.mean(counts))

    return min((group for group in own if group.factors == factors), key=left)


def _kept(value: int | list[int]) -> int:
    return value[0] if isinstance(value, list) else value


def _sizes(name: str, part: Part) -> dict[str, int]:
    """Return the entries of each layer: where lines only count what is kept, the most of any line."""
    sizes: dict[str, int] = {}
    for line in _lines(part.groups):
        for path, value in line.layers.get(name, {}).items():
            sizes[path] = max(sizes.get(path, 0), value[1] if isinstance(value, list) else value)
    return sizes


def _removed(name: str, group: Group, sizes: dict[str, int]) -> dict[str, float]:
    """Return the mean fraction removed, by path."""
    found: dict[str, list[float]] = {}
    for line in group.lines:
        for path, value in line.layers.get(name, {}).items():
            size = value[1] if isinstance(value, list) else sizes[path]
            found.setdefault(path, []).append(1 - _kept(value) / size if size else 0.0)
    return {path: float(np.mean(values)) for path, values in found.items()}
