"""Hostile values: every argument of the entry points, given what it should never be."""

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp

HERE = jp.__path__[0]
PARAMS = {
    "a": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.ones((4, 4))},
}
MASKS = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), PARAMS)
PRUNER = jp.pruner(jp.scores.magnitude, 0.5)
STATE = PRUNER.init(PARAMS)
TX = jp.wrap_optax(optax.sgd(0.1), PRUNER)
KEPT = jp.keep_masked(optax.sgd(0.1), MASKS)


class Anything:
    """An object that is nothing in particular."""

    def __repr__(self):
        return "<anything>"


BAD = {
    **{
        repr(value): value
        for value in (None, True, False, "", "x", "global", b"x", 0, 1, -1, 2, 10**30, 0.5, -0.5, 1.5)
    },
    **{
        repr(value): value
        for value in (float("nan"), float("inf"), 1j, (), [], {}, [0.5], (1, 2), {"a": 1}, {1: 0.5}, ...)
    },
    "an object": Anything(),
    "a class": Anything,
    "len": len,
    "a lambda": lambda: None,
    "any function": lambda *args, **kwargs: None,
    "a function of nan": lambda *args, **kwargs: float("nan"),
    "np nan": np.float32("nan"),
    "a 1-d array": np.ones(3),
    "ints": np.arange(3),
    "a bool array": np.ones(2, bool),
    "a jax array": jnp.ones((3, 4)),
    "a jax scalar": jnp.float32(0.5),
    "objects": np.array([None, "a"], object),
    "strings": np.array(["a", "b"]),
    "an empty array": np.zeros((0, 3)),
    "a shape": jax.ShapeDtypeStruct((3,), "f4"),
    "a key": jax.random.key(0),
    "an optimizer": optax.sgd(0.1),
    "a pruner": PRUNER,
    "a state": STATE,
    "masks": MASKS,
    "params": PARAMS,
    "one leaf": {"a": {"kernel": jnp.ones((3, 4))}},
    "a None leaf": {"a": None, "b": None},
    "other shapes": jax.tree.map(lambda leaf: leaf[:-1], PARAMS),
    "ints like params": jax.tree.map(jnp.int32, MASKS),
    "strings like params": jax.tree.map(lambda _: "x", MASKS),
    "numbers like params": jax.tree.map(lambda _: 1.0, MASKS),
    "nan like params": jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS),
    "by path": {"a/kernel": 0.5},
    "by no path": {"c": 0.5},
    "nan by path": {"a/kernel": float("nan")},
    "text by path": {"a/kernel": "x"},
    "a schedule": jp.schedules.cubic(0.5, begin_step=0, end_step=9),
    "a structure": jp.structures.nm(2, 4),
    "a module": jp.scores,
}


# Right, and for ever.
ENDLESS = {("rounds", repr(10**30)), ("levels", repr(10**30))}


class Entry(NamedTuple):
    """A function with arguments that are right."""

    call: Callable[..., Any]
    good: dict[str, Any]


ARGUMENTS = {
    "prune_once": Entry(
        jp.prune_once,
        {
            "params": PARAMS,
            "scores": jp.scores.magnitude,
            "sparsity": 0.5,
            "of": "total",
            "scope": "global",
            "structure": None,
            "where": jp.kernels,
            "masks": MASKS,
            "floor": 1,
            "grads": None,
            "key": None,
        },
    ),
    "prune_once of a count": Entry(
        jp.prune_once, {"params": PARAMS, "scores": jp.scores.magnitude, "count": 3, "scope": "layerwise"}
    ),
    "prune_once of a threshold": Entry(
        jp.prune_once,
        {"params": PARAMS, "scores": PARAMS, "threshold": 3.0, "structure": jp.structures.nm(2, 4)},
    ),
    "pruner": Entry(
        jp.pruner,
        {
            "scores": jp.scores.magnitude,
            "sparsity": 0.5,
            "structure": None,
            "scope": "global",
            "every": 1,
            "where": jp.kernels,
            "of": "total",
            "floor": 1,
            "memory": 0.0,
            "stop": None,
            "seed": 0,
        },
    ),
    "a pruner's init": Entry(PRUNER.init, {"params": PARAMS}),
    "a pruner's update": Entry(PRUNER.update, {"state": STATE, "params": PARAMS, "grads": None, "key": None}),
    "prune_rounds": Entry(jp.prune_rounds, {"params": PARAMS, "pruner": PRUNER, "rounds": 2}),
    "wrap_optax": Entry(jp.wrap_optax, {"optimizer": optax.sgd(0.1), "pruner": PRUNER, "packed": False}),
    "keep_masked": Entry(jp.keep_masked, {"optimizer": optax.sgd(0.1), "masks": MASKS}),
    "wrap_optax's init": Entry(TX.init, {"params": PARAMS}),
    "wrap_optax's update": Entry(TX.update, {"updates": PARAMS, "state": TX.init(PARAMS), "params": PARAMS}),
    "keep_masked's update": Entry(
        KEPT.update, {"updates": PARAMS, "state": KEPT.init(PARAMS), "params": PARAMS}
    ),
    "apply_masks": Entry(jp.apply_masks, {"params": PARAMS, "masks": MASKS}),
    "check_masks": Entry(jp.check_masks, {"masks": MASKS, "params": PARAMS}),
    "check_pruned": Entry(jp.check_pruned, {"params": PARAMS, "masks": MASKS}),
    "ones_masks": Entry(jp.ones_masks, {"params": PARAMS}),
    "lottery_ticket": Entry(
        lambda **given: list(jp.lottery_ticket(**given)),
        {
            "train": lambda params, masks: params,
            "params": PARAMS,
            "pruner": PRUNER,
            "levels": 1,
            "rewind": "weights",
        },
    ),
    "schedules.cubic": Entry(
        jp.schedules.cubic, {"sparsity": 0.5, "begin_step": 0, "end_step": 9, "initial_sparsity": 0.0}
    ),
    "schedules.geometric": Entry(jp.schedules.geometric, {"rate": 0.5, "stop": None}),
    "schedules.one_shot": Entry(jp.schedules.one_shot, {"sparsity": 0.5, "step": 3}),
    "structures.nm": Entry(jp.structures.nm, {"n": 2, "m": 4}),
    "structures.blocks": Entry(jp.structures.blocks, {"shape": (2, 2)}),
    "structures.slices": Entry(jp.structures.slices, {"axis": -1, "norm": 1}),
    "distributions.erk": Entry(
        jp.distributions.erk, {"params": PARAMS, "sparsity": 0.5, "where": jp.kernels}
    ),
    "distributions.uniform": Entry(
        jp.distributions.uniform, {"params": PARAMS, "sparsity": 0.5, "where": jp.kernels}
    ),
    "matching": Entry(lambda pattern: jp.matching(pattern), {"pattern": "*"}),
}


def case(number, watched):
    """One or two arguments of an entry point replaced by what they should not be."""
    rng = np.random.default_rng(number)
    names = list(ARGUMENTS)
    name = names[rng.integers(len(names))]
    places = list(ARGUMENTS[name].good)
    some = [
        places[i] for i in rng.choice(len(places), min(len(places), 1 + rng.integers(4) // 3), replace=False)
    ]
    return attempt(name, {place: list(BAD)[rng.integers(len(BAD))] for place in some}, watched)


def attempt(name, bad, watched):
    """Calls an entry point with some values from `BAD`: it takes them, or says in its own words that not."""
    if ENDLESS & set(bad.items()):
        return "endless"
    entry = ARGUMENTS[name]
    given = entry.good | {place: BAD[value] for place, value in bad.items()}
    said = f"{name} with {bad}"
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # so that the last frame is where it was raised
    raised = None
    try:
        with watched():
            entry.call(**given)
    except Exception as error:
        raised = error
    finally:
        jax.config.update("jax_traceback_filtering", before)
    if raised is None:
        return "accepted"
    frame = traceback.extract_tb(raised.__traceback__)[-1]
    # A function of another form is called where it is needed: then Python itself says what it takes.
    called = any(callable(BAD[value]) for value in bad.values())
    ours = frame.filename.startswith(HERE) and (called or (frame.line or "").startswith("raise "))
    if not isinstance(raised, (TypeError, ValueError)) or not ours:
        where = f"{frame.filename}:{frame.lineno}"
        raise AssertionError(f"{said}: {type(raised).__name__} in {where}: {str(raised)[:300]}") from raised
    return "refused"
