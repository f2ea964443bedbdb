"""What the fields of a study's lines mean: the study declares it, its lines carry it, the report reads it."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

How = Literal["dense / x", "1 / (1 - x)", "1 / x", "x", "ratio", "measured"]


class Axis(NamedTuple):
    """What figures are drawn against.

    Attributes:
      title: under the axis.
      field: a level or a figure, `x` in `how`.
      how: the value drawn; "dense" is the field where nothing is pruned. "x" has a linear axis, the others
        have a logarithmic one. A "ratio" is drawn as it is. What is "measured" is drawn as points, since a
        line between them means nothing.
    """

    title: str
    field: str
    how: How


COMPRESSION = Axis("compression (weights)", "sparsity", "1 / (1 - x)")
SPARSITY = Axis("sparsity", "sparsity", "x")


class Design(NamedTuple):
    """The roles of fields. Numbers that are not named are figures, text that is not named is a remark.

    Attributes:
      factors: text that says what was run, such as the method; lines that lack some are tables of their own.
      levels: numbers that say how far, such as the sparsity.
      figures: what came out, the one to draw first; lines of a part need not have all of them.
      percent: the levels and figures that are fractions, to be shown in percent.
      baseline: the fields of lines where nothing is pruned, with their values.
      axes: what the first figure is drawn against.
    """

    factors: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    percent: tuple[str, ...] = ()
    baseline: Mapping[str, Any] = {}
    axes: tuple[Axis, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return it as the field `design` of a line."""
        return self._asdict() | {"axes": [axis._asdict() for axis in self.axes]}


def from_json(value: Any) -> Design | None:
    """Read the field `design` of a line; None where there is none, or it is something else.

    Example:
      >>> from_json(Design(("method",), ("sparsity",), axes=(COMPRESSION,)).as_json()).axes[0].field
      'sparsity'
    """
    if not isinstance(value, dict):
        return None
    names = {
        key: tuple(x for x in value[key] if isinstance(x, str))
        for key in ("factors", "levels", "figures", "percent")
        if isinstance(value.get(key), list)
    }
    baseline = value.get("baseline")
    axes = tuple(
        Axis(**axis)
        for axis in (value["axes"] if isinstance(value.get("axes"), list) else ())
        if isinstance(axis, dict)
        and axis.keys() == set(Axis._fields)
        and all(isinstance(text, str) for text in axis.values())
    )
    return Design(**names, baseline=baseline if isinstance(baseline, dict) else {}, axes=axes)
