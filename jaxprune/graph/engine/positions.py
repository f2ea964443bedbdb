"""The positions at which the rounds of a loop over layers take slices, and which of them differ."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.rules.slices import take_slices


class LayersDifferError(Exception):
    """The layers of a stack differ in more than which slices they keep."""


class NotMadeError(LayersDifferError):
    """A value is read that no op has made: the loop as traced reads what nothing needs any more."""


class Positions:
    """The positions at which one round of a loop takes slices.

    First they are noted; once it is known which of them differ between rounds, these are read from rows of
    tables instead, in the same order.
    """

    def __init__(self) -> None:
        self.noted: list[np.ndarray] = []  # in order; an index vector for each time slices are taken
        self.fixed: list[np.ndarray] = []  # those that must be the same in all rounds
        self._is_fixed = False
        self._rows: list[Any] | None = None
        self._differs: list[bool] = []
        self._next = self._next_row = 0

    def start(self, differs: Sequence[bool] | None, rows: Sequence[Any]) -> "Positions":
        """Start the round again: to note positions, or to read those that differ from `rows` of tables.

        `differs` says of each of `noted` whether it differs between rounds; None to note positions.
        """
        if differs is None:
            self.noted, self.fixed, self._rows = [], [], None
        else:
            self._rows, self._differs = list(rows), list(differs)
        self._next = self._next_row = 0
        return self

    @property
    def is_noting(self) -> bool:
        """Whether positions are being noted."""
        return self._rows is None

    @contextmanager
    def same_in_all(self) -> Iterator[None]:
        """Return a context in which positions have to be the same in all rounds."""
        before, self._is_fixed = self._is_fixed, True
        try:
            yield
        finally:
            self._is_fixed = before

    def hoisted(self, array: np.ndarray) -> Any:
        """Return the next index vector as the round is to use it: itself, or a row of a table."""
        if self._is_fixed:
            if self.is_noting:
                self.fixed.append(array)
            return array
        if self._rows is None:
            self.noted.append(array)
            return array
        if self._next >= len(self._differs):
            raise LayersDifferError
        differs = self._differs[self._next]
        self._next += 1
        self._next_row += differs
        return self._rows[self._next_row - 1] if differs else array

    def take_in_round(self, array: Any, axis: int, positions: np.ndarray) -> Any:
        """Return slices of an array at positions that may differ between rounds."""
        found = self.hoisted(np.asarray(positions))
        if isinstance(found, np.ndarray):
            return take_slices(array, axis, found)
        return jnp.take(array, found, axis=axis, mode="clip")


def tables(rounds: Sequence[Positions]) -> tuple[list[bool], list[np.ndarray]]:
    """Return which of the noted positions differ between rounds, and for each of these a table.

    A table has a row for each round. LayersDifferError says that the rounds take different numbers of slices,
    or differ where they must not.
    """
    first = rounds[0]
    for other in rounds[1:]:
        if len(other.noted) != len(first.noted) or len(other.fixed) != len(first.fixed):
            raise LayersDifferError
        if not all(map(np.array_equal, other.fixed, first.fixed)):
            raise LayersDifferError
    differs, found = [], []
    for places in zip(*(one.noted for one in rounds), strict=True):
        if len({array.shape for array in places}) > 1:
            raise LayersDifferError
        differs.append(any(not np.array_equal(array, places[0]) for array in places))
        if differs[-1]:
            found.append(np.stack(places).astype(np.int32))
    return differs, found
