"""A small module beside the function form of it: what `compact_module` returns, and whether the two agree."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.graph.compaction import Compacted
from jaxprune.graph.equivalence import compare, new_numbers, of_arrays, ops_of
from jaxprune.graph.plan import Plan
from jaxprune.tracing.jaxprs import split_static
from jaxprune.typing import Params


class CompactedModule(NamedTuple):
    """What `compact_module` returns.

    Attributes:
      module: a smaller copy of the model; None if no module of its classes computes the same.
      small: the function form, `small.apply(small.params, *inputs)`, which always exists.
      why: why there is no module, or why it is no smaller; None if there is a smaller module.
    """

    module: Any
    small: Compacted
    why: str | None


class UnfitError(Exception):
    """No widths of a module's class fit its new arrays."""


def kept_along(plan: Plan, path: str, axis: int) -> tuple[int, np.ndarray]:
    """Return the dense size of an array along an axis, counted from the end, and the indices that stay."""
    dense = plan.shapes[path]
    kept = plan.keep.get(path, {}).get(len(dense) + axis)
    if kept is None:
        return dense[axis], np.arange(dense[axis])
    # Each layer of a stack keeps slices of its own, equally many, and only their number matters here.
    return dense[axis], kept if kept.ndim == 1 else kept.reshape(-1, kept.shape[-1])[0]


def new_widths(
    library: str,
    layers: Any,
    table: Mapping[str, Callable[[Any, Any], dict[str, Any]]],
    part: Any,
    path: str,
    kept: Any,
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield the widths that a module has to change, for the caller to set at once.

    Args:
      library: its name, for messages.
      layers: the module of its classes.
      table: by the name of a class, its widths, given a module and `kept`.
      part: the module, with its small arrays.
      path: where it is.
      kept: what stays along an axis of one of its arrays.

    Yields:
      The name of the class, the attribute, and its old and new values.

    Raises:
      UnfitError: the module is not laid out as its class is.
    """
    for name, widths in table.items():
        if not isinstance(part, getattr(layers, name, ())):
            continue
        try:
            found = widths(part, kept)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            kind = f"{path} ({type(part).__name__})"
            raise UnfitError(f"{kind} is not laid out like {library}'s {name}: {error}") from error
        for attribute, new in found.items():
            old = getattr(part, attribute, None)
            if old is not None and old != new:
                yield name, attribute, old, new


def no_values(how: str) -> TypeError:
    """Return the error for a model, or inputs, without values; `how` says how a model comes to be so."""
    return TypeError(
        "compact_module compares networks on numbers, so that the model and the inputs must have arrays "
        f"with values. Build the model outside jit and {how}."
    )


class Form(NamedTuple):
    """A module as a function of its arrays.

    Attributes:
      step: `step(params, *inputs)`, its output and by path the new values of its arrays, if it has any.
      params: its arrays.
    """

    step: Callable[..., Any]
    params: Params


def difference(
    dense: Form,
    native: Form,
    small: Compacted,
    inputs: Sequence[Any],
    state: Callable[[Any], Any] | None,
    signed: Callable[[str], bool],
) -> str | bool:
    """Return how a small module differs from the function form, in words; or whether they could be compared.

    Args:
      dense: the module that was compacted.
      native: the small module.
      small: the function form.
      inputs: example inputs.
      state: from what `step` returns to the new values of arrays; None if it returns none.
      signed: which arrays, by path, may have values of either sign.
    """
    arrays, _ = split_static(inputs)
    ops = ops_of(of_arrays(dense.step, inputs), dense.params, arrays)
    function = of_arrays(native.step, inputs)
    copy = "a copy with the small arrays"
    try:
        small.plan.check(native.params, "its variables")
        small_ops = ops_of(function, small.params, arrays)
    except Exception as error:
        return f"{copy} raises {type(error).__name__}: {short(error)}"
    if numbers := new_numbers(small_ops, ops):
        return f"{copy} computes with numbers that the dense one does not: {', '.join(numbers[:3])}"
    if ops.draws:
        return False  # noise of another shape is other noise
    bound = of_arrays(small.bind(dense.step, state=state), inputs)
    try:
        jax.eval_shape(bound, small.params, arrays)
    except ValueError as error:
        return f"the plan does not fit: {short(error)}"
    wrong = compare(bound, function, small.params, arrays, signed, ops.eps)
    return True if wrong is None else f"{copy} {wrong}"


def unsmaller(model: Any, small: Compacted, module: Any) -> CompactedModule:
    """Return the result for a model that nothing was removed from."""
    example = f" ({small.not_removed[0]})" if small.not_removed else ""
    return CompactedModule(module, small, f"Nothing was removed: no slice could go{example}.")


def result(
    model: Any, small: Compacted, module: Any, wrong: str | None, width_dependent: Sequence[str]
) -> CompactedModule:
    """Return the module, or why there is none: what is wrong, and which layers compute with a width."""
    if wrong is None:
        return CompactedModule(module, small, None)
    why = f"There is no smaller {type(model).__name__}: {wrong}."
    if width_dependent:
        more = f"; and {len(width_dependent) - 3} more" if len(width_dependent) > 3 else ""
        why += f" Widths take part in what it computes: {'; '.join(width_dependent[:3])}{more}."
    return CompactedModule(None, small, f"{why} Use small.apply.")


def short(error: Exception) -> str:
    """Return the message of an error in one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 200 else f"{text[:200]}..."
