"""The types the library speaks in: trees, callables, and the `Pruner` pair."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Params = Any
"""A pytree of arrays: dict, FrozenDict, nnx State, equinox module, tuple, dataclass."""

Masks = Any
"""A pytree with the params' structure; each leaf is `bool` with the shape of its param."""

Scores = Any
"""A pytree with the params' structure; each leaf says how much each entry matters."""

Where = Callable[[str, Any], bool]
"""`where(path, leaf)`: does this leaf take part? `path` is a string such as `"conv1/kernel"`."""

PerPath = Mapping[str, Any]
"""Values by leaf path, for example `{"dense/kernel": 0.9}`."""


class ScoreFn(Protocol):
    """`score(params, *, grads, key, **extra) -> scores`: larger means keep."""

    def __call__(self, params: Params, *, grads: Any, key: Any, **extra: Any) -> Scores:
        """Scores of `params`."""
        ...


class PrunerState(NamedTuple):
    """What a pruner carries from one update to the next.

    Attributes:
      masks: the masks now in force.
      step: int32 scalar, how many times `update` was called.
      row: int32 scalar, which row of the pruner's table of targets was reached last (0: none); for
        a pruner without one, how many updates of the masks there were.
      scores: the scores summed over earlier calls, for a pruner with a memory; else empty.
    """

    masks: Masks
    step: jax.Array
    row: jax.Array
    scores: Scores = ()


class Pruner(NamedTuple):
    """A pair of pure functions that prunes over time.

    Attributes:
      init: `init(params) -> state`, with all-True masks.
      update: `update(state, params, grads=None, key=None, **extra) -> state`.
      regrows: whether masks may gain entries; by default they only ever lose them. Where they
        changed, `wrap_optax` then takes no step besides.
      remembers: whether its state holds scores of earlier calls.
    """

    init: Callable[[Params], PrunerState]
    update: Callable[..., PrunerState]
    regrows: bool = False
    remembers: bool = False
