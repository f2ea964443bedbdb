"""The public types: trees, callables, and the `Pruner` pair."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax

Params = Any
"""A pytree of arrays: dict, FrozenDict, nnx State, equinox module, tuple, dataclass."""

Masks = Any
"""A pytree with the params' structure; each leaf is `bool`, with the shape of its param."""

Scores = Any
"""A pytree with the params' structure; each leaf holds how much each entry matters, larger meaning keep."""

Where = Callable[[str, Any], bool]
"""`where(path, leaf) -> bool`: whether a leaf takes part. `path` is a string such as `"conv1/kernel"`."""

PerPath = Mapping[str, Any]
"""Values by leaf path, for example `{"dense/kernel": 0.9}`."""


class ScoreFn(Protocol):
    """A score: a function `score(params, *, grads, key, **extra) -> scores`; see `jaxprune.scores`."""

    def __call__(self, params: Params, *, grads: Any, key: Any, **extra: Any) -> Scores:
        """Score every entry of the params.

        Args:
          params: a pytree of arrays.
          grads: gradients like `params`, or None.
          key: a PRNG key, or None.
          **extra: the arguments that the score names, from the caller of `prune_once` or `Pruner.update`.

        Returns:
          A tree like `params` of real numbers. Entries with larger scores are kept.
        """
        ...


class DenseShapes(NamedTuple):
    """The shapes that params had before `compact` made them smaller; a pytree node without leaves.

    Attributes:
      by_path: for each leaf the pair of its path and its dense shape.
    """

    by_path: tuple[tuple[str, tuple[int, ...]], ...]


# A named tuple, because flax serializes these by itself; registered as a node, so that it has no leaves.
jax.tree_util.register_pytree_node(
    DenseShapes, lambda shapes: ((), shapes.by_path), lambda by_path, _: DenseShapes(by_path)
)


class PrunerState(NamedTuple):
    """The state that a pruner carries from one update to the next.

    Attributes:
      masks: the masks now in force.
      step: int32 scalar, how many times `update` was called.
      row: int32 scalar, the row of the pruner's table of targets that was reached last, 0 before the first;
        for a pruner without a table, how many times the masks were updated.
      scores: the scores summed over earlier calls, for a pruner with a memory; else empty.
      schedule: int32 scalar that identifies the schedule whose table `row` is a row of, so that a pruner with
        another schedule does not read `row` as a row of its table. 0 before the first schedule, -1 before
        the first with masks to start from, and negative for a pruner that took over masks.
      dense: the `DenseShapes` of the params if `compact` has made them smaller; else empty.
    """

    masks: Masks
    step: jax.Array
    row: jax.Array
    scores: Scores = ()
    schedule: Any = ()
    dense: Any = ()


class Progress(NamedTuple):
    """How far a pruner has come, in the units that it counts.

    Attributes:
      unit: what is counted, such as "entries" or "units of nm(2, 4)".
      kept: how many units are left.
      size: how many units there are, pruned or not.
      asked: how many units are removed when the schedule ends; None for a schedule without an end, and
        with scope="output", where that depends on which axes of a leaf are those of its outputs.
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
      regrows: whether masks may gain entries; by default they only lose them. `wrap_optax` then takes no
        optimizer step in an update that changes masks.
      remembers: whether the state holds scores of earlier calls.
      description: the pruner and its schedule in one line, for messages.
      takes: the names of the extra arguments of `update` that it and its scores read; None for a pruner
        whose `update` takes any.
      compounds: whether every call prunes further: by one level, or by a fraction of what is left.
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
