"""What scores, scopes and structures read of the statistics that `jaxprune.calibrate` returns."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from jaxprune.tree.checks import shown
from jaxprune.tree.leaves import describe, is_concrete
from jaxprune.tree.paths import some_of
from jaxprune.typing import Where


class InputStatistics(Protocol):
    """Statistics of what each layer reads, by the leaf that multiplies it."""

    @property
    def paths(self) -> Collection[str]:
        """The leaves that have statistics."""
        ...

    @property
    def where(self) -> Where:
        """The predicate of these leaves."""
        ...

    @property
    def stacks(self) -> Mapping[str, tuple[int, ...]]:
        """By path, the axes of a leaf that count layers."""
        ...

    @property
    def statistics(self) -> str:
        """Return "norms", or "gram" if there are Gram matrices as well."""
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

    def map_matrices(self, path: str, leaf: Any, function: Callable[[Any], Any]) -> Any:
        """Apply a function of (batch, outputs, inputs) to the matrices that products read from a leaf."""
        ...


CALIBRATE = "stats=jaxprune.calibrate(apply_fn, params, batches)"
_NEEDED = (
    "paths",
    "stacks",
    "statistics",
    "where",
    "contracted_axes",
    "group_axis",
    "per_entry",
    "map_matrices",
)


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
