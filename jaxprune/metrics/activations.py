"""Zeros among the intermediate values of a function."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tracing.jaxprs import (
    CALLS,
    binder,
    called_jaxpr,
    interpret,
    of_first,
    place,
    scan_split,
    scan_with,
    trace,
)
from jaxprune.tree.calls import check_call
from jaxprune.tree.tables import shape_text, text_lines

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn

# They move entries and compute none, so their outputs are as sparse as their inputs.
_MOVES = (
    *("reshape", "transpose", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "squeeze", "rev"),
    *("slice", "dynamic_slice", "gather", "concatenate", "pad", "stop_gradient", "optimization_barrier"),
    *("expand_dims", "split", "reduce_precision"),
)


class Activation(NamedTuple):
    """One value that a function computes from data.

    Attributes:
      name: the function or primitive that makes it, "relu" say.
      source: the line of the user's code, as "file:line".
      shape: with the batch; with the steps first, if it is inside a scan.
      zeros: entries that are exactly 0.
      size: all entries.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    zeros: int
    size: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return self.zeros / self.size if self.size else 0.0


class Activations(tuple[Activation, ...]):
    """The values of a function, in the order they are computed; printing gives a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = text_lines(
            "{:<18.17}{:<24}{:<20.19}{:>10}",
            ("value", "line", "shape", "sparsity"),
            *((one.name, one.source[-23:], shape_text(one.shape), f"{one.sparsity:.4f}") for one in self),
        )
        return "\n".join(lines)


def activation_sparsity(
    function: Callable[..., Any], *arguments: Any, everything: bool = False, **keywords: Any
) -> Activations:
    """Count exact zeros in the intermediate values of one call, of a batch say.

    The jaxpr of the function is run under one `jit`, with a count beside each value. Nested calls and scans
    are entered; a `cond` or a `while` runs as one equation. A value is counted if it depends on the inputs,
    is floating-point and has an axis; once, where it is computed, and not again where it is only reshaped,
    padded or sliced.

    Args:
      function: a function of pytrees of arrays, such as `apply_fn(params, x)`.
      *arguments: arrays; the first is the params. Bools and strings are static.
      everything: also return the values without zeros.
      **keywords: none; those of the function go in by `functools.partial(function, train=False)`.

    Returns:
      An `Activations`: a tuple of `Activation`.

    Raises:
      ValueError: fewer than two arguments, so that no value depends on data.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> w, x = jnp.array([[1.0, -1.0, 1.0]]), jnp.array([[1.0], [2.0]])
      >>> relu, = jp.metrics.activation_sparsity(lambda w, x: jax.nn.relu(x @ w), w, x)
      >>> relu.name, relu.shape, round(relu.sparsity, 3)
      ('relu', (2, 3), 0.333)
    """
    if len(arguments) < 2:
        raise ValueError(
            "activation_sparsity needs params and inputs: activation_sparsity(function, params, x)."
        )
    check_call(
        "activation_sparsity(function, params, *inputs)", function, arguments, keywords, ("everything",)
    )
    closed, inputs = trace(function, arguments)
    depends = [of_first(name) is None for name in inputs]
    watcher = _Watcher()
    counts = jax.jit(lambda values: watcher.run(closed, list(zip(values, depends, strict=True)))[1])(
        list(inputs.values())
    )
    found = [
        Activation(*seen, int(np.asarray(count).sum(dtype=np.int64)), int(np.prod(seen[2], dtype=np.int64)))
        for seen, count in zip(watcher.seen, counts, strict=True)
    ]
    return Activations(one for one in found if one.zeros or everything)


class _Watcher:
    """Runs a jaxpr and counts zeros.

    Attributes:
      seen: name, line and shape of each value counted, in order.
    """

    def __init__(self):
        self.seen: list[tuple[str, str, tuple[int, ...]]] = []

    def run(
        self,
        closed: "ClosedJaxpr",
        inputs: Sequence[tuple[Any, bool]],
        called: str | None = None,
        called_at: str = "",
        steps: tuple[int, ...] = (),
    ) -> tuple[list[tuple[Any, bool]], list[Any]]:
        """Run a jaxpr on pairs of an array and whether it depends on data; return such pairs, and the counts.

        `called` and `called_at` are the name and the place of the call whose jaxpr this is, `steps` the
        lengths of the scans that it is in.
        """
        counts: list[Any] = []

        def handle(eqn: "JaxprEqn", pairs: list[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
            name, source, moving = eqn.primitive.name, place(eqn, called_at), any(yes for _, yes in pairs)
            if name in CALLS:
                label = eqn.params.get("name") or called
                outputs, more = self.run(called_jaxpr(eqn), pairs, label, source, steps)
            elif name == "scan" and moving:
                outputs, more = self.scan(eqn, pairs, called, source, steps)
            else:
                outputs, more = [(value, moving) for value in binder(eqn)(*(x for x, _ in pairs))], []
                if moving and name not in _MOVES:
                    # The last values of a call, relu say, go by its name.
                    last = any(eqn.outvars[0] is out for out in closed.jaxpr.outvars)
                    more = self.count(called if called and last else name, source, steps, outputs)
            counts.extend(more)
            return outputs

        return interpret(closed, inputs, handle, constant=lambda array: (array, False)), counts

    def count(
        self, name: str, source: str, steps: tuple[int, ...], values: Sequence[tuple[Any, bool]]
    ) -> list[Any]:
        """Note values, and return their zeros by row, so that no count passes 2**31."""
        counts = []
        for value, _ in values:
            if value.ndim and jnp.issubdtype(value.dtype, jnp.inexact):
                self.seen.append((name, source, (*steps, *value.shape)))
                counts.append(jnp.sum(value == 0, axis=tuple(range(1, value.ndim)), dtype=jnp.int32))
        return counts

    def scan(
        self,
        eqn: "JaxprEqn",
        pairs: Sequence[tuple[Any, bool]],
        called: str | None,
        source: str,
        steps: tuple[int, ...],
    ) -> tuple[list[tuple[Any, bool]], list[Any]]:
        """Run a scan whose body also returns its counts, so that there is one row of them for each step."""
        consts, carried = scan_split(eqn.params)
        # The carry may come to depend on data in a later step.
        moving = [yes or consts <= n < consts + carried for n, (_, yes) in enumerate(pairs)]
        before = len(self.seen)

        def body(values: list[Any]) -> tuple[list[Any], list[Any]]:
            del self.seen[before:]  # scan may trace its body twice
            inner = (*steps, eqn.params["length"])
            inputs = list(zip(values, moving, strict=True))
            outputs, counts = self.run(eqn.params["jaxpr"], inputs, called, source, inner)
            return [value for value, _ in outputs], counts

        outputs, counts = scan_with(eqn, [value for value, _ in pairs], body)
        return [(value, True) for value in outputs], counts
