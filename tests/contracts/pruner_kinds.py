"""Every kind of `Pruner`, on the network of `optimizers`, with the counts that each must reach.

A function that returns a Pruner and has no kind here gets one from its entry in `members.TABLE`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from tests.contracts import public
from tests.contracts.members import TABLE, Member
from tests.contracts.problem import problem

History = dict[str, np.ndarray]
"""Masks by path, each with an axis of steps in front."""


class Kind(NamedTuple):
    """A pruner, and what must come of it.

    Attributes:
      units: the units of each pool of a history, True where they are whole: arrays of steps x units.
        It raises AssertionError where masks are not made of units.
      removed: how many units of a pool of that size are gone after so many calls; None where the
        number never changes.
    """

    by: str  # the public function that makes it
    make: Callable[[Any], Any]  # of the params, it or the masks for `keep_masked`
    units: Callable[[History], list[np.ndarray]]
    removed: Callable[[int, int], int] | None = None
    reads_grads: bool = False  # its scores are of gradients, so that it waits for finite ones
    packed: bool = False  # the masks lie in the state with one bit per entry
    coupled: bool = False  # biases go with the kernels

    @property
    def regrows(self) -> bool:
        return self.removed is None and self.by != "keep_masked"


KERNELS = ("hidden/kernel", "out/kernel")


def _each(history: History) -> list[np.ndarray]:
    return [history[path].reshape(len(history[path]), -1) for path in KERNELS]


def _together(pools: Callable[[History], list[np.ndarray]], history: History) -> list[np.ndarray]:
    return [np.concatenate(pools(history), 1)]


def _pairs(history: History) -> list[np.ndarray]:
    """Return which pairs of 1:2 are still dense, and check that the others keep one entry."""
    pools = []
    for path in KERNELS:
        steps, rows, columns = history[path].shape
        pairs = history[path].reshape(steps, rows // 2, 2, columns).sum(2)
        assert (pairs >= 1).all(), "a pair lost both"
        pools.append((pairs == 2).reshape(steps, -1))
    return pools


def _of_whole(tiled: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    alive = tiled.all(axes)
    assert (alive == tiled.any(axes)).all(), "a unit went in part"
    return alive.reshape(len(alive), -1)


def _blocks(history: History) -> list[np.ndarray]:
    pools = []
    for path in KERNELS:
        steps, rows, columns = history[path].shape
        pools.append(_of_whole(history[path].reshape(steps, rows // 2, 2, columns // 2, 2), (2, 4)))
    return pools


def _columns(history: History) -> list[np.ndarray]:
    return [_of_whole(history[path], (1,)) for path in KERNELS]


def _channels(history: History) -> list[np.ndarray]:
    alive = _of_whole(history["hidden/kernel"], (1,))
    np.testing.assert_array_equal(history["hidden/bias"], alive)
    np.testing.assert_array_equal(_of_whole(history["out/kernel"], (2,)), alive)
    return [alive]


def _apply(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def kinds(steps: int = 200) -> dict[str, Kind]:
    """Return every kind; its masks come to rest after half of the steps.

    Args:
      steps: how many there will be, 40 or more.
    """
    begin, end, every = steps // 20, steps // 2, max(1, steps // 28)

    def passed(calls: int) -> int:
        """Return the last step of the schedule that was due, or -1."""
        return end if calls >= end else begin + (calls - begin) // every * every if calls >= begin else -1

    def ramp(curve: Callable[[float], float], target: float, calls: int, size: int) -> int:
        t = (passed(calls) - begin) / (end - begin)
        return round(size * target * curve(t)) if t >= 0 else 0

    gradual, linear = partial(ramp, lambda t: 1 - (1 - t) ** 3), partial(ramp, lambda t: t)

    def at_once(calls: int, size: int) -> int:
        return round(0.5 * size) if calls >= end else 0

    level = end // 5

    def by_level(calls: int, size: int) -> int:
        return round(size * min(0.6, 1 - 0.8 ** (calls // level)))

    def of_what_is_left(calls: int, size: int) -> int:
        gone = 0
        for _ in range(calls // level):
            gone = min(gone + round(0.25 * (size - gone)), round(0.6 * size))
        return gone

    cubic = partial(jp.schedules.cubic, begin_step=begin, end_step=end)

    def pruner(scores: Any = jp.scores.magnitude, sparsity: Any = None, **options: Any) -> Any:
        options = {"every": every, **options}
        return lambda params: jp.pruner(scores, cubic(0.8) if sparsity is None else sparsity, **options)

    def channels(**options: Any) -> Any:
        def make(params):
            real = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
            groups = jp.channel_groups(_apply, real, jax.ShapeDtypeStruct((2, 6), jnp.float32))
            return pruner(sparsity=cubic(0.75), structure=jp.structures.channels(groups), **options)(params)

        return make

    def recipe(params: Any) -> Any:
        goal = {"cubic": {"sparsity": 0.8, "begin_step": begin, "end_step": end}}
        common = {"sparsity": goal, "every": every}
        return jp.recipes.parse(
            {
                "prune": [
                    {"where": "hidden/kernel", "score": "magnitude", "memory": 0.9, **common},
                    {"where": "out/kernel", "score": "random", **common},
                ]
            }
        ).pruner(params)

    def sparse(params: Any, **options: Any) -> Any:
        options = {"sparsity": 0.6, "scope": "layerwise", **options}
        return jp.prune_once(params, jp.scores.random, key=jax.random.key(0), **options)

    def moving(move: Any, structure: Any = None, **first: Any) -> Any:
        def make(params):
            masks = sparse(params, structure=structure, **first)
            return move(masks, every=every, end_step=end, fraction=0.8, structure=structure)

        return make

    def by_size(params: Any, **_: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape), params)

    rewiring, nm = partial(jp.rewiring, grow=by_size), jp.structures.nm(1, 2)
    columns = jp.structures.slices(-1)
    all_entries, curve = partial(_together, _each), partial(gradual, 0.8)
    table = {
        "gradual": Kind("pruner", pruner(), all_entries, curve),
        "layerwise": Kind("pruner", pruner(scope="layerwise"), _each, curve),
        "some leaves": Kind(
            "pruner", pruner(where=jp.matching("hidden/kernel")), lambda masks: _each(masks)[:1], curve
        ),
        "one shot": Kind("pruner", pruner(sparsity=jp.schedules.one_shot(0.5, end)), all_entries, at_once),
        "levels": Kind(
            "pruner",
            pruner(sparsity=jp.schedules.geometric(0.2, stop=0.6), every=level),
            all_entries,
            by_level,
        ),
        "of remaining": Kind(
            "pruner",
            pruner(sparsity=0.25, of="remaining", stop=0.6, every=level),
            all_entries,
            of_what_is_left,
        ),
        "taylor": Kind("pruner", pruner(jp.scores.taylor), all_entries, curve, reads_grads=True),
        "movement": Kind(
            "pruner", pruner(jp.scores.movement, memory=1.0), all_entries, curve, reads_grads=True
        ),
        "random": Kind("pruner", pruner(jp.scores.random, seed=3), all_entries, curve),
        "nm": Kind(
            "pruner",
            pruner(sparsity=jp.schedules.linear(0.5, begin_step=begin, end_step=end), structure=nm),
            partial(_together, _pairs),
            partial(linear, 1.0),
        ),
        "blocks": Kind(
            "pruner", pruner(structure=jp.structures.blocks((2, 2))), partial(_together, _blocks), curve
        ),
        "slices": Kind(
            "pruner",
            pruner(sparsity=cubic(0.7), structure=columns),
            partial(_together, _columns),
            partial(gradual, 0.7),
        ),
        "channels": Kind("pruner", channels(), _channels, partial(gradual, 0.75), coupled=True),
        "isomorphic": Kind(
            "pruner", channels(scope="isomorphic"), _channels, partial(gradual, 0.75), coupled=True
        ),
        "packed": Kind("pruner", pruner(), all_entries, curve, packed=True),
        "recipe": Kind("recipes.Recipe.pruner", recipe, _each, curve),
        "rigl": Kind("rigl", moving(jp.rigl), _each, reads_grads=True),
        "set": Kind("set_", moving(jp.set_), _each),
        "rigl packed": Kind("rigl", moving(jp.rigl), _each, reads_grads=True, packed=True),
        "rewiring": Kind("rewiring", moving(rewiring), _each),
        "rewiring nm": Kind("rewiring", moving(rewiring, nm, sparsity=0.5), _pairs),
        "rewiring slices": Kind("rewiring", moving(rewiring, columns, sparsity=0.5), _columns),
        "keep_masked": Kind("keep_masked", sparse, _each),
    }
    made = {kind.by for kind in table.values()}
    others = {
        name: _of_member(member, by) for name, member in TABLE.items() if (by := _maker(member)) not in made
    }
    return table | others


def _maker(member: Member) -> str:
    """Return the public function, among those that a member covers, that returns its Pruner."""
    return next((name for name in member.covers if name in public.makers()), "pruner")


def _of_member(member: Member, by: str) -> Kind:
    """Return the kind of a member whose maker has none above; only nesting or constant counts are checked."""

    def make(params):
        def half(leaf):  # two of every four along the inputs, as in the masks of the problem
            rows = jnp.arange(leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.broadcast_to((rows % 4 < 2) | (leaf.ndim == 1), leaf.shape)

        given = problem(0)._replace(params=params, grads=params, masks=jax.tree.map(half, params))
        return member.make(given, member.sparsity)

    regrows = member.make(problem(0), member.sparsity).regrows
    return Kind(by, make, lambda history: [], None if regrows else lambda calls, size: 0)
