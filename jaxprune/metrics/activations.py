"""Zeros among the values that a function computes on the way."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tracing.jaxprs import CALLS, binder, called_jaxpr, of_first, place, scan_split, trace
from jaxprune.tree.calls import check_call

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn

# They move entries and compute none: what they give is as sparse as what they take.
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
        lines = [f"{'value':<18}{'line':<24}{'shape':<20}{'sparsity':>10}"]
        for one in self:
            shape = "x".join(map(str, one.shape)) or "scalar"
            lines.append(f"{one.name[:17]:<18}{one.source[-23:]:<24}{shape[:19]:<20}{one.sparsity:>10.4f}")
        return "\n".join(lines)


def activation_sparsity(
    function: Callable[..., Any], *arguments: Any, everything: bool = False, **keywords: Any
) -> Activations:
    """Counts exact zeros in the intermediate values of one call, a batch say.

    The function's jaxpr is run as it is, under one `jit`, with a count beside each value. Nested calls
    and scans are gone into; a `cond` and a `while` are run as a whole. Of values that depend on the
    inputs, floating-point ones of one axis or more are looked at, each where it is computed: not
    again where it is only reshaped, padded or sliced.

    Args:
      function: a function of pytrees of arrays, `apply_fn(params, x)` say.
      *arguments: arrays; the first is the params. Bools and strings are static.
      everything: also the values without zeros.
      **keywords: none; those of the function go in by `functools.partial(function, train=False)`.

    Returns:
      An `Activations`: a tuple of `Activation`.

    Raises:
      ValueError: fewer than two arguments: nothing would depend on data.

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
    counts = jax.jit(lambda values: watcher.run(closed, values, depends)[1])(list(inputs.values()))
    found = [
        Activation(*seen, int(np.asarray(count).sum(dtype=np.int64)), int(np.prod(seen[2], dtype=np.int64)))
        for seen, count in zip(watcher.seen, counts, strict=True)
    ]
    return Activations(one for one in found if one.zeros or everything)


class _Watcher:
    """Runs jaxprs and counts zeros.

    Attributes:
      seen: name, line and shape of the values counted, in order.
    """

    def __init__(self):
        self.seen: list[tuple[str, str, tuple[int, ...]]] = []

    def run(
        self,
        closed: "ClosedJaxpr",
        inputs: Sequence[Any],
        depends: Sequence[bool],
        called: str | None = None,
        called_at: str = "",
        steps: tuple[int, ...] = (),
    ) -> tuple[list[Any], list[Any], list[bool]]:
        """The outputs of a jaxpr, its counts of zeros, and which outputs depend on data.

        `called` is the name of the call whose jaxpr this is; `steps` the scans it is in.
        """
        jaxpr = closed.jaxpr
        env = dict(zip(jaxpr.invars, zip(inputs, depends, strict=True), strict=True))
        env.update((var, (const, False)) for var, const in zip(jaxpr.constvars, closed.consts, strict=True))
        counts: list[Any] = []

        def read(atom: Any) -> tuple[Any, bool]:
            return (atom.val, False) if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            pairs = [read(atom) for atom in eqn.invars]
            args, moving = [value for value, _ in pairs], [yes for _, yes in pairs]
            name, source = eqn.primitive.name, place(eqn, called_at)
            if name in CALLS:
                label = eqn.params.get("name") or called
                outputs, own, moved = self.run(called_jaxpr(eqn), args, moving, label, source, steps)
                counts += own
            elif name == "scan" and any(moving):
                outputs, own, moved = self.scan(eqn, args, moving, called, source, steps)
                counts += own
            else:
                outputs = binder(eqn)(*args)
                moved = [any(moving)] * len(outputs)
                if name not in _MOVES:
                    # The last values of a call, relu say, go by its name.
                    label = called if called and any(eqn.outvars[0] is out for out in jaxpr.outvars) else name
                    counts += self.count(label, source, steps, zip(outputs, moved, strict=True))
            env.update(zip(eqn.outvars, zip(outputs, moved, strict=True), strict=True))
        results = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in results], counts, [yes for _, yes in results]

    def count(self, name: str, source: str, steps: tuple[int, ...], values: Any) -> list[Any]:
        """Notes values, and gives their zeros by row, so that no count passes 2**31."""
        counts = []
        for value, moved in values:
            if moved and value.ndim and jnp.issubdtype(value.dtype, jnp.inexact):
                self.seen.append((name, source, (*steps, *value.shape)))
                counts.append(jnp.sum(value == 0, axis=tuple(range(1, value.ndim)), dtype=jnp.int32))
        return counts

    def scan(
        self,
        eqn: "JaxprEqn",
        args: list[Any],
        moving: list[bool],
        called: str | None,
        source: str,
        steps: tuple[int, ...],
    ) -> tuple[list[Any], list[Any], list[bool]]:
        """A scan whose body hands out its counts, one row for each step."""
        params, body = eqn.params, eqn.params["jaxpr"]
        consts, carried = scan_split(params)
        inner = (*steps, params["length"])
        # What is carried round may come to depend on data in a later step.
        depends = [*moving[:consts], *[True] * carried, *moving[consts + carried :]]

        def step(carry: list[Any], rows: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
            outputs, counts, _ = self.run(
                body, [*args[:consts], *carry, *rows], depends, called, source, inner
            )
            return outputs[:carried], (outputs[carried:], counts)

        before = len(self.seen)

        def once(carry: list[Any], rows: list[Any]) -> Any:
            del self.seen[before:]  # scan may trace its body twice
            return step(carry, rows)

        carry, (rows, counts) = jax.lax.scan(
            once,
            args[consts : consts + carried],
            args[consts + carried :],
            length=params["length"],
            reverse=params["reverse"],
        )
        outputs = [*carry, *rows]
        return outputs, counts, [True] * len(outputs)
