"""How long a compiled call takes, measured side by side."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.checks import as_integer, check_function, shown


class Latency(NamedTuple):
    """The times of a compiled call, in seconds.

    Attributes:
      median: the median time, which is the one to compare.
      low, high: the first and the third quartile.
      rounds: how many times were measured.
    """

    median: float
    low: float
    high: float
    rounds: int


def latency(
    calls: Mapping[str, tuple[Any, ...]], rounds: int = 20, donate: Sequence[int] = (), compiled: bool = True
) -> dict[str, Latency]:
    """Measure compiled calls in turn, so that a slow moment of the machine slows all of them.

    Each function is compiled by `jax.jit`, and called twice before it is measured. A measurement lasts from
    the call until the output is ready (`jax.block_until_ready`), over as many calls in a row as take about a
    millisecond. The order changes from round to round.

    Args:
      calls: by name, a function and its arguments: `{"dense": (apply_fn, params, x)}`. Bools and
        strings among the arguments are static. A function that is jitted already will do.
      rounds: how often each call is measured.
      donate: the arguments whose buffers the call may write to, counted from 0. They are copied
        before each call; copying is not measured.
      compiled: False to call the functions as they are, op by op if they are not jitted.

    Returns:
      A `Latency` for each name. Times depend on the machine: quote their ratios.

    Raises:
      ValueError: no calls, no rounds, or an argument to donate that does not exist.
      TypeError: `calls` is not a dict of tuples that begin with a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> w, x = jnp.ones((64, 64)), jnp.ones((8, 64))
      >>> times = jp.metrics.latency({"dense": (jnp.dot, x, w), "small": (jnp.dot, x, w[:, :8])}, rounds=3)
      >>> times["dense"].rounds, times["dense"].low <= times["dense"].median <= times["dense"].high
      (3, True)
    """
    if not isinstance(calls, Mapping) or not all(isinstance(call, tuple) and call for call in calls.values()):
        raise TypeError(f"latency needs tuples (function, *arguments) by name, got {shown(calls)}.")
    if not calls:
        raise ValueError("latency needs calls, got none.")
    rounds = as_integer(rounds, "rounds", at_least=1, what="times each call is timed")
    timers = {name: _timer(name, call, tuple(donate), compiled) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(timers[name]())
    return {name: _latency(times) for name, times in taken.items()}


def _latency(times: Sequence[float]) -> Latency:
    if len(times) == 1:
        return Latency(times[0], times[0], times[0], 1)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(median, low, high, len(times))


def _timer(name: str, call: tuple[Any, ...], donate: tuple[int, ...], compiled: bool) -> Callable[[], float]:
    """Return a function that measures one call, once it is warm."""
    function, *arguments = call
    check_function(function, f"calls[{name!r}]", "first, then its arguments")
    if not all(0 <= n < len(arguments) for n in donate):
        raise ValueError(f"calls[{name!r}] has {len(arguments)} arguments, donate={donate} names others.")
    pieces = [split_static([argument]) for argument in arguments]
    given = [jax.tree.map(jnp.asarray, arrays) for arrays, _ in pieces]

    def plain(*arrays: Any) -> Any:
        return function(*(rebuild(own)[0] for own, (_, rebuild) in zip(arrays, pieces, strict=True)))

    run = jax.jit(plain, donate_argnums=donate) if compiled else plain

    def batch(repeats: int) -> float:
        copies = [
            [jax.tree.map(jnp.copy, own) if n in donate else own for n, own in enumerate(given)]
            for _ in range(repeats if donate else 1)
        ]
        jax.block_until_ready(copies)
        start = time.perf_counter()
        for number in range(repeats):
            jax.block_until_ready(run(*copies[number if donate else 0]))
        return (time.perf_counter() - start) / repeats

    batch(1)
    repeats = max(1, min(1000, math.ceil(1e-3 / max(batch(1), 1e-9))))
    return lambda: batch(repeats)
