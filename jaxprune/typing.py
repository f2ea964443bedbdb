"""The types the library speaks in: trees, callables, and the `Pruner` pair."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
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


class DenseShapes(NamedTuple):
    """The shapes that params had before `compact` made them smaller; a pytree node without leaves.

    Attributes:
      by_path: pairs of a leaf's path and its dense shape.
    """

    by_path: tuple[tuple[str, tuple[int, ...]], ...]


# A named tuple, because flax serializes these without being told; but none of it is a leaf.
jax.tree_util.register_pytree_node(
    DenseShapes, lambda shapes: ((), shapes.by_path), lambda by_path, _: DenseShapes(by_path)
)


class PrunerState(NamedTuple):
    """What a pruner carries from one update to the next.

    Attributes:
      masks: the masks now in force.
      step: int32 scalar, how many times `update` was called.
      row: int32 scalar, which row of the pruner's table of targets was reached last (0: none); for
        a pruner without a table, how many updates of the masks there were.
      scores: the scores summed over earlier calls, for a pruner with a memory; else empty.
      schedule: int32 scalar, which schedule `row` belongs to: 0 for no schedule yet, -1 for none yet
        and masks to start from. A pruner with another schedule finds out by it that `row` says
        nothing about its own targets. It is negative where the pruner took over masks.
      dense: the `DenseShapes` of the params if `compact` made them smaller since; else empty.
    """

    masks: Masks
    step: jax.Array
    row: jax.Array
    scores: Scores = ()
    schedule: Any = ()
    dense: Any = ()


class Progress(NamedTuple):
    """How far masks are, in the units that a pruner counts.

    Attributes:
      unit: what is counted, such as "entries" or "units of nm(2, 4)".
      kept: how many units are left.
      size: how many there are.
      asked: how many are to be removed when the schedule has ended; None for a schedule without end.
      stacks: by path, the axes of stacked leaves that count layers.
    """

    unit: str
    kept: int
    size: int
    asked: int | None
    stacks: Mapping[str, tuple[int, ...]] = MappingProxyType({})


class Pruner(NamedTuple):
    """A pair of pure functions that prunes over time.

    Attributes:
      init: `init(params) -> state`, with all-True masks, or with the masks the pruner starts from.
      update: `update(state, params, grads=None, key=None, **extra) -> state`.
      regrows: whether masks may gain entries; by default they only ever lose them. Where they
        changed, `wrap_optax` then takes no step besides.
      remembers: whether its state holds scores of earlier calls.
      description: the pruner and its schedule in one line, for messages.
      takes: the names of the extra arguments of `update` that its scores read; None for a pruner
        whose `update` takes any.
      compounds: whether every call prunes further, a level or a fraction of what the last one left.
      where: which leaves take part.
      progress: `progress(masks) -> Progress`, or None for a pruner without a target.
    """

    init: Callable[[Params], PrunerState]
    update: Callable[..., PrunerState]
    regrows: bool = False
    remembers: bool = False
    description: str = "a pruner"
    takes: frozenset[str] | None = None
    compounds: bool = False
    where: Where | None = None
    progress: Callable[[Masks], Progress] | None = None
