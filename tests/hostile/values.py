"""Hostile values: each argument of the public functions is replaced by values that it must not have."""

import contextlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from tests.contracts import entry_points
from tests.contracts.entry_points import ARGUMENTS, MASKS, PARAMS, PRUNER, STATE

HERE = jp.__path__[0]


class Anything:
    """An object of no useful type."""

    def __repr__(self):
        return "<anything>"


PLAIN = [
    *(None, True, False, "", "x", "global", b"x", 0, 1, -1, 2, 10**30, 0.5, -0.5, 1.5, ...),
    *(float("nan"), float("inf"), 1j, (), [], {}, [0.5], (1, 2), {"a": 1}, {1: 0.5}),
]
BAD = {
    **{repr(value): value for value in PLAIN},
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


USERS = ("network", "residual", "loss", "total")
ABSTRACT = {"a shape", "a key"}
WRITE = ("io.save", "io.save_compacted", "io.save_safetensors", "prune_layers")
JUNK = {"any function", "a function of nan"}

# Right, and for ever.
ENDLESS = {("rounds", repr(10**30)), ("levels", repr(10**30)), ("points", repr(10**30))}


def case(number, watched):
    """Call a function with one or two of its arguments replaced by wrong values."""
    rng = np.random.default_rng(number)
    names = list(ARGUMENTS)
    name = names[rng.integers(len(names))]
    places = list(ARGUMENTS[name].good)
    some = [
        places[i] for i in rng.choice(len(places), min(len(places), 1 + rng.integers(4) // 3), replace=False)
    ]
    return attempt(name, {place: list(BAD)[rng.integers(len(BAD))] for place in some}, watched)


def attempt(name, bad, watched):
    """Call a function with some values from `BAD`, which it accepts or refuses with its own message."""
    if ENDLESS & set(bad.items()):
        return "endless"
    entry = ARGUMENTS[name]
    given = entry.good | {place: BAD[value] for place, value in bad.items()}
    said = f"{name} with {bad}"
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # so that the last frame is where it was raised
    raised = None
    try:
        with contextlib.nullcontext() if name in WRITE else watched():
            entry.call(**given)
    except Exception as error:
        raised = error
    finally:
        jax.config.update("jax_traceback_filtering", before)
    if raised is None:
        return "accepted"
    trace = traceback.extract_tb(raised.__traceback__)
    # A function of another form is called where it is needed: then Python itself says what it takes, and
    # JAX what it makes of what that returns. And params may be such that the user's own function fails.
    called = any(callable(BAD[value]) for value in bad.values())
    if any(frame.filename == entry_points.__file__ and frame.name in USERS for frame in trace) or (
        called and JUNK & set(bad.values())
    ):
        return "refused"
    if name.startswith("scores.") and ABSTRACT & set(bad.values()) and isinstance(raised, TypeError):
        return "refused"  # by JAX: other trees may have such leaves beside those that are scored
    frame = trace[-1]
    ours = frame.filename.startswith(HERE) and (called or (frame.line or "").startswith("raise "))
    if not isinstance(raised, (TypeError, ValueError)) or not ours:
        where = f"{frame.filename}:{frame.lineno}"
        raise AssertionError(f"{said}: {type(raised).__name__} in {where}: {str(raised)[:300]}") from raised
    return "refused"
