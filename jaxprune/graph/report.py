"""What compaction gained, as a table."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxprune.counting.multiply_adds import macs as count_macs
from jaxprune.counting.timing import latency
from jaxprune.graph.blocktrees import Shapes
from jaxprune.graph.reasons import NotRemoved
from jaxprune.tree.tables import shorten, text_lines, wrapped

if TYPE_CHECKING:
    from jaxprune.graph.compaction import Compacted


class Report(NamedTuple):
    """Before and after compaction; printing it gives a table.

    Attributes:
      params: entries of all params, dense and small.
      macs: multiply-adds of one call, dense and small; see `metrics.macs`.
      seconds: the median time of a call, dense and small; see `metrics.latency`. None if not measured.
      axes: by path, the dense and the small shape of each param that got smaller.
      not_removed: what the masks remove that had to stay, and why.
    """

    params: tuple[int, int]
    macs: tuple[int, int] | None
    seconds: tuple[float, float] | None
    axes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    not_removed: tuple[NotRemoved, ...]

    def __str__(self) -> str:
        rows = [("", "dense", "small", "ratio"), _row("params", *self.params)]
        if self.macs is not None:
            rows.append(_row("multiply-adds", *self.macs))
        if self.seconds is not None:
            dense, small = self.seconds
            rows.append(("time", "1", f"{small / dense:.2f}", f"{dense / small:.2f} x"))
        axes = [(shorten(path, 35), *map(_shape, shapes)) for path, shapes in self.axes.items()]
        lines = text_lines("{:<28}{:>14}{:>14}{:>9}", *rows) + text_lines("{:<36}{:>20}{:>20}", *axes)
        for each in self.not_removed:
            lines += wrapped(str(each))
        return "\n".join(lines)

    if not TYPE_CHECKING:  # a type checker would take any attribute

        def __getattr__(self, name: str) -> Any:
            new = "; it is called not_removed now." if name == "stayed" else "."
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{new}")


def report(small: "Compacted", *inputs: Any, rounds: int = 0) -> Report:
    """Return what a `Compacted` gained; see `Compacted.report`.

    Raises:
      ValueError: times are asked for, but no inputs given.
    """
    plan = small.plan
    small_shapes = plan.small_shapes()
    count = _size(plan.shapes), _size(small_shapes)
    macs = seconds = None
    if rounds and not inputs:
        raise ValueError("report needs inputs to time the networks on: report(x, rounds=10).")
    if inputs:
        dense = jax.eval_shape(small.expand, small.params)
        macs = (
            count_macs(small.function, dense, *inputs).total,
            count_macs(small.apply, small.params, *inputs).total,
        )
    if rounds:
        calls = {
            "dense": (small.function, small.expand(small.params), *inputs),
            "small": (small.apply, small.params, *inputs),
        }
        times = latency(calls, rounds)
        seconds = times["dense"].median, times["small"].median
    axes = {path: (tuple(plan.shapes[path]), s) for path, s in small_shapes.items() if path in plan.keep}
    return Report(count, macs, seconds, axes, small.not_removed)


def _size(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def _row(name: str, dense: int, small: int) -> tuple[str, str, str, str]:
    return name, f"{dense:,}", f"{small:,}", f"{dense / max(small, 1):.2f} x"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
