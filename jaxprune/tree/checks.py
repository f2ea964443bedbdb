"""Checks of arguments other than trees of arrays: numbers, integers, functions, keys, states."""

import contextlib
import difflib
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.tree.leaves import describe, is_array, is_concrete
from jaxprune.tree.paths import leaf_paths
from jaxprune.typing import Pruner, PrunerState


def is_number(value: Any) -> bool:
    """Return whether a value is one real number that is not traced: Python's, or an array without axes.

    Example:
      >>> import numpy as np
      >>> is_number(3), is_number(np.float32(0.5)), is_number("3"), is_number(np.ones(3))
      (True, True, False, False)
    """
    if isinstance(value, (int, float)):
        return True
    real = is_array(value) and (
        jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    )
    return real and value.shape == () and is_concrete(value)


def shown(value: Any) -> str:
    """Show a value in a message, cut if it is long; for a tree of arrays show their shapes.

    Example:
      >>> len(shown("x" * 1000))
      200
      >>> import jax.numpy as jnp
      >>> shown({"kernel": jnp.ones((2, 3))})
      'a dict of arrays, kernel float32[2, 3]'
    """
    if not isinstance(value, (str, int, float)) and not is_array(value) and _holds_arrays(value):
        leaves = zip(leaf_paths(value), jax.tree.leaves(value), strict=True)
        listing = ", ".join(f"{path} {describe(leaf)}" for path, leaf in leaves if is_array(leaf))
        return f"a {type(value).__name__} of arrays, {listing}"[:200]
    return repr(value)[:200]


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is most like a misspelt one, for "did you mean"; None if none is like it.

    Example:
      >>> closest("sparcity", ["score", "sparsity"]), closest("xyz", ["score"])
      ('sparsity', None)
    """
    return next(iter(difflib.get_close_matches(name[:60], list(allowed), 1)), None)


def name_of(function: Any) -> str:
    """Return the name of a function for a message.

    Example:
      >>> from functools import partial
      >>> name_of(len), name_of(partial(sorted, reverse=True)), name_of("x")
      ('len', 'sorted', "'x'")
    """
    return getattr(function, "__name__", None) or getattr(
        getattr(function, "func", None), "__name__", shown(function)
    )


def _holds_arrays(value: Any) -> bool:
    return any(map(is_array, jax.tree.leaves(value)))


def check_params(params: Any, call: str) -> None:
    """Check that the first argument is not one of those that follow the params."""
    if isinstance(params, Pruner) or (callable(params) and jax.tree_util.all_leaves([params])):
        name = getattr(params, "__name__", type(params).__name__)
        raise TypeError(f"params must be a pytree of arrays, got {name!r}: the order is {call}.")


def check_number(value: Any, name: str, allowed: str) -> None:
    """Check that an argument is a number that is not traced."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number {allowed}, got {shown(value)}.")


def scalar(value: Any, name: str) -> float | None:
    """Return the value of a number, or None if it is traced."""
    if is_number(value):
        return float(value)
    if not is_array(value) or (is_concrete(value) and value.shape == ()):
        raise TypeError(f"{name} must be a number, got {shown(value)}.")
    if value.shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}.")
    return None


def as_integer(
    value: Any, name: str, *, at_least: int | None = None, below: int = 2**63, what: str = ""
) -> int:
    """Return an argument as an integer: Python's, NumPy's, or an array without axes that is not traced.

    A bool is refused, and so is a number that is not in `[at_least, below)`. `what` says what it counts.

    Example:
      >>> import numpy as np
      >>> as_integer(np.int64(3), "every", at_least=1)
      3
    """
    allowed = "an integer" if at_least is None else f"an integer of {at_least} or more"
    allowed += f" ({what})" if what else ""
    boolean = isinstance(value, bool) or (is_array(value) and value.dtype == np.bool_)
    number = None
    if not boolean:
        with contextlib.suppress(TypeError):  # tracers raise a kind of it too
            number = operator.index(value)
    if number is None:
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}.")
    if not (-(2**63) if at_least is None else at_least) <= number < below:
        allowed += f" below {below}" if number >= below else ""
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}.")
    return number


def is_traced_integer(value: Any) -> bool:
    """Return whether a value is a traced integer without axes, which `as_integer` cannot read."""
    return isinstance(value, Tracer) and value.shape == () and jnp.issubdtype(value.dtype, jnp.integer)


def check_function(function: Any, name: str, what: str) -> None:
    """Check that an argument is a function."""
    if not callable(function):
        order = " The function comes first, the params after it." if _holds_arrays(function) else ""
        raise TypeError(f"{name} needs a function {what}, got {shown(function)}.{order}")


def check_key(key: Any, name: str) -> None:
    """Check that an argument is a PRNG key, typed or of the old kind."""
    if is_array(key):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if (typed and key.shape == ()) or (key.dtype == jnp.uint32 and len(key.shape) == 1):
            return
    raise TypeError(f"{name} needs one PRNG key such as jax.random.key(0), got {shown(key)}.")


def check_state(state: Any) -> None:
    """Check that the first argument of a pruner's update is its state."""
    if not isinstance(state, PrunerState):
        raise TypeError(
            f"pruner.update needs the state of pruner.init first, got a {type(state).__name__}: call "
            "pruner.update(state, params)."
        )


def check_array(array: Any, name: str) -> None:
    """Check that an argument is one array of numbers."""
    text = isinstance(array, (np.ndarray, np.generic)) and array.dtype.kind in "OSUMm"
    keys = is_array(array) and jnp.issubdtype(array.dtype, jax.dtypes.extended)
    if not is_array(array) or isinstance(array, jax.ShapeDtypeStruct) or text or keys:
        raise TypeError(f"{name} must be an array of numbers, got {shown(array)}.")
