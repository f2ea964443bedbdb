"""What scores, scopes and structures read of the statistics that `jaxprune.calibrate` returns."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxprune.tree.checks import shown
from jaxprune.tree.leaves import describe, is_concrete
from jaxprune.tree.paths import some_of


@runtime_checkable
class InputStatistics(Protocol):
    """Statistics of what each layer reads, by the leaf that multiplies it.

    Attributes:
      paths: the leaves that have statistics.
      stacks: by path, the axes of a leaf that count layers.
      statistics: "norms", or "gram" if there are Gram matrices as well.
    """

    paths: Collection[str]
    stacks: Mapping[str, tuple[int, ...]]
    statistics: str

    def where(self, path: str, leaf: Any) -> bool:
        """Return whether a leaf has statistics."""
        ...

    def contracted_axes(self, path: str) -> tuple[int, ...]:
        """Return the axes of a leaf that its product sums over."""
        ...

    def group_axis(self, path: str) -> int:
        """Return the contracted axis along which the groups of N:M lie."""
        ...

    def per_entry(self, path: str, what: str) -> Any:
        """Return a statistic of the input that each entry multiplies, broadcastable to the leaf."""
        ...


CALIBRATE = "stats=jaxprune.calibrate(apply_fn, params, batches)"
_NEEDED = ("paths", "stacks", "statistics", "where", "contracted_axes", "group_axis", "per_entry")


def check_statistics(stats: Any) -> None:
    """Check that `stats=` is what `jaxprune.calibrate` returns.

    Raises:
      TypeError: it is something else.
    """
    if isinstance(stats, type) or not all(hasattr(stats, name) for name in _NEEDED):
        raise TypeError(
            f"stats must be what jaxprune.calibrate returns, got {shown(stats)}. Pass {CALIBRATE}."
        )


def check_calibrated(stats: Any, leaves: Mapping[str, Any], chosen: Collection[str]) -> None:
    """Check that the leaves that take part have statistics.

    Raises:
      ValueError: one has none.
    """
    if missing := [path for path in chosen if path not in stats.paths]:
        path = missing[0]
        raise ValueError(
            f"where= takes in params[{path!r}], {describe(leaves[path])}, which has no statistics. Leave out "
            "where=, so that the calibrated leaves take part, or pass where=stats.where or less. The leaves "
            f"with statistics are {some_of(stats.paths)}."
        )


def check_unchanged(stats: Any, params: Any) -> None:
    """Check that params with values are those that were calibrated.

    Raises:
      ValueError: they changed since.
    """
    if is_concrete(params, stats) and hasattr(stats, "check_params"):
        stats.check_params(params)
