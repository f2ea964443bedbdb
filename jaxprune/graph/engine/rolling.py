"""One loop for all layers: which indices differ from layer to layer, and whether nothing else does.

The rounds of a loop over layers keep different slices, but equally many. Replayed one by one they apply
the same ops to arrays of the same shapes, and take slices at other places. So each round is traced twice:
first to note at which places it takes slices, in order; then with the places that differ as an input of
the round. If all rounds are the same program then, one loop does them all, with a table of the places.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.graph.engine.rules.slices import take

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, Jaxpr


_DERIVATIVES = frozenset(("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"))


class LayersDifferError(Exception):
    """The layers of a stack differ in more than which slices they keep."""


class NotMadeError(LayersDifferError):
    """A value is read that no op has made: the loop as it was reads what nothing needs any more."""


class Positions:
    """The places at which one round of a loop takes slices.

    Attributes:
      noted: the places of this round, in order.
      fixed: those that must be the same in all rounds.
    """

    def __init__(self) -> None:
        self.noted: list[np.ndarray] = []
        self.fixed: list[np.ndarray] = []
        self._is_fixed = False
        self._rows: list[Any] | None = None
        self._differs: list[bool] = []
        self._next = self._next_row = 0

    def start(self, differs: Sequence[bool] | None, rows: Sequence[Any]) -> "Positions":
        """Notes places anew; or, if it is known which differ, gives these from rows of a table."""
        if differs is None:
            self.noted, self.fixed, self._rows = [], [], None
        else:
            self._rows, self._differs = list(rows), list(differs)
        self._next = self._next_row = 0
        return self

    @property
    def is_noting(self) -> bool:
        """Whether places are noted."""
        return self._rows is None

    @contextmanager
    def same_in_all(self) -> Iterator[None]:
        """Inside, places have to be the same in all rounds."""
        before, self._is_fixed = self._is_fixed, True
        try:
            yield
        finally:
            self._is_fixed = before

    def hoisted(self, array: np.ndarray) -> Any:
        """An array of places, as the round is to use it."""
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

    def take(self, array: Any, axis: int, positions: np.ndarray) -> Any:
        """Slices of an array at known places."""
        found = self.hoisted(np.asarray(positions))
        if isinstance(found, np.ndarray):
            return take(array, axis, found)
        return jnp.take(array, found, axis=axis, mode="clip")


def tables(rounds: Sequence[Positions]) -> tuple[list[bool], list[np.ndarray]]:
    """Which of the places noted differ between rounds, and for these a table with a row for each round.

    Raises:
      LayersDifferError: the rounds take different numbers of slices, or differ where they may not.
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


def check_alike(rounds: "Sequence[ClosedJaxpr]") -> None:
    """Checks that the rounds of a loop are one program.

    Raises:
      LayersDifferError: they are not.
    """
    first = rounds[0]
    for other in rounds[1:]:
        if not _equal_consts(first.consts, other.consts) or not _equal_jaxprs(first.jaxpr, other.jaxpr):
            raise LayersDifferError


def _equal_consts(first: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(first) == len(other) and all(map(_equal_arrays, first, other))


def _equal_arrays(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    if any(jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended) for x in (a, b)):
        return False  # keys of random numbers
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.inexact))


def _equal_jaxprs(a: "Jaxpr", b: "Jaxpr") -> bool:
    same: dict[Any, Any] = {}

    def matched(x: Any, y: Any) -> bool:
        if hasattr(x, "val") or hasattr(y, "val"):
            return hasattr(x, "val") and hasattr(y, "val") and _equal_arrays(x.val, y.val)
        return same.get(x) is y

    def bound(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
        if len(xs) != len(ys):
            return False
        same.update(zip(xs, ys, strict=True))
        return all(
            (x.aval.shape, x.aval.dtype) == (y.aval.shape, y.aval.dtype) for x, y in zip(xs, ys, strict=True)
        )

    if not bound([*a.invars, *a.constvars], [*b.invars, *b.constvars]) or len(a.eqns) != len(b.eqns):
        return False
    for x, y in zip(a.eqns, b.eqns, strict=True):
        if x.primitive is not y.primitive or len(x.invars) != len(y.invars):
            return False
        if not all(map(matched, x.invars, y.invars)) or not _equal_params(x.params, y.params):
            return False
        if not bound(x.outvars, y.outvars):
            return False
    return len(a.outvars) == len(b.outvars) and all(map(matched, a.outvars, b.outvars))


def _equal_params(a: Any, b: Any) -> bool:
    """Whether the parameters of two ops are equal.

    Functions that take derivatives are: they come from one line of the function, and take slices at the
    same places, see `Positions.fixed`.
    """
    if isinstance(a, dict):
        keys = a.keys() - _DERIVATIVES
        return keys == b.keys() - _DERIVATIVES and all(_equal_params(a[key], b[key]) for key in keys)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal_params, a, b))
    if hasattr(a, "consts"):  # a closed jaxpr
        closed = hasattr(b, "consts") and _equal_consts(a.consts, b.consts)
        return closed and _equal_jaxprs(a.jaxpr, b.jaxpr)
    if hasattr(a, "eqns"):
        return hasattr(b, "eqns") and _equal_jaxprs(a, b)
    if isinstance(a, (np.ndarray, jax.Array)):
        return isinstance(b, (np.ndarray, jax.Array)) and _equal_arrays(a, b)
    return type(a) is type(b) and (callable(a) or bool(a == b))
