"""Checks of calls that take a function and its arguments: `channel_groups(apply_fn, params, *inputs)`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.tree.checks import closest, shown
from jaxprune.tree.leaves import describe, is_array


def check_call(
    call: str,
    function: Any,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    options: Sequence[str] = (),
) -> None:
    """Check the function, its arguments and the keywords of a call before anything is traced."""
    name, _, rest = call.partition("(")
    first = rest.partition(",")[0]
    for keyword in keywords:
        if close := closest(keyword, options):
            raise TypeError(f"{name} has no argument {keyword!r}; did you mean {close!r}?")
        known = f" Its own are {', '.join(options)}." if options else ""
        value = keywords[keyword]
        written = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "..."
        raise TypeError(
            f"{name} passes no keywords on, got {keyword}={shown(value)}: write "
            f"functools.partial({first}, {keyword}={written}) in place of {first}.{known}"
        )
    if arguments and _is_function(arguments[0]) and (not callable(function) or not _is_function(function)):
        raise TypeError(
            f"{name} takes the function first and the params second: {call}. They are swapped: got a "
            f"{type(function).__name__} first and a function second."
        )
    if not callable(function):
        raise TypeError(f"{name} takes a function first: {call}. Got {shown(function)}.")
    try:
        inspect.signature(function).bind(*arguments)
    except ValueError:
        return  # no signature to look at
    except TypeError as error:
        raise TypeError(
            f"{name}: the function cannot be called with {_counted(len(arguments) - 1)} ({error}). Pass "
            f"example inputs, arrays or jax.ShapeDtypeStruct, as in {call}; keywords go in by "
            "functools.partial."
        ) from None


def check_masks_third(call: str, params: Any, masks: Any, inputs: Sequence[Any]) -> None:
    """Check that masks come after the params and before the inputs."""
    name = call.partition("(")[0]
    if _are_masks(masks):
        return
    if _are_masks(params) and _same_tree(masks, params):
        raise TypeError(f"{name} takes the params before the masks: {call}. They are swapped.")
    if any(_are_masks(given) and _same_tree(given, params) for given in inputs):
        raise TypeError(f"{name} takes the masks third, before the inputs: {call}.")
    if is_array(masks) and not is_array(params):
        raise TypeError(f"{name} takes the masks third: {call}. Got one array there, {describe(masks)}.")


def _counted(inputs: int) -> str:
    return "no inputs" if inputs < 1 else f"{inputs} input{'s' if inputs > 1 else ''}"


def _is_function(value: Any) -> bool:
    """Return whether a value can be called and, unlike a module, holds no arrays."""
    return callable(value) and not any(map(is_array, jax.tree.leaves(value)))


def _are_masks(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(is_array(leaf) and leaf.dtype == jnp.bool_ for leaf in leaves)


def _same_tree(tree: Any, other: Any) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other)
