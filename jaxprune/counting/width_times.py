"""Which widths of a layer pay: those that take less time than the next ones."""

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.counting.timing import latency
from jaxprune.tree.checks import as_integer, check_function, check_number, name_of, shown
from jaxprune.tree.widths import Widths


def good_widths(
    most: int,
    *,
    rows: int | None = None,
    inputs: int | None = None,
    dtype: Any = jnp.float32,
    call: Callable[[int], tuple[Any, ...]] | None = None,
    every: int = 1,
    tolerance: float = 0.05,
    rounds: int = 9,
) -> Widths:
    """Measure which widths pay on this machine, to pass as `structures.channels(multiple_of=...)`.

    Hardware works on vectors and tiles, so the time of a layer rises in steps as it gets wider, and a width
    just above a step costs as much as the next one below a step. All widths up to `most` are measured, and
    a width is good if rounding it up to the next good one would cost more than `tolerance`: from the largest
    down, w is good if time(next good width) > (1 + tolerance) time(w).

    Measure once, keep the value (`to_json`), and pass it on: masks then depend on the value and not on a
    timing, and are the same wherever they are chosen. It takes some tenths of a second for each width, mostly
    to compile, and holds the arguments of all widths at once, because they take turns.

    Args:
      most: the largest width.
      rows, inputs: the layer that is timed: a product of (rows, inputs) by (inputs, width), and one of its
        output by (width, inputs), so that the units are both made and read.
      dtype: its dtype.
      call: in place of `rows` and `inputs`, what is timed: from a width to a tuple of a function and its
        arguments, as `latency` takes them. `lambda width: (apply_fn, init(width), x)` times a network.
      every: measure only the multiples of this, to take less time.
      tolerance: how much more time is taken for as fast: .05 is 5 %. Choose more than the noise.
      rounds: how often each width is measured; the lower quartile counts, since what disturbs a
        measurement makes it longer.

    Returns:
      A `Widths`: frozen and hashable, with the times and the device.

    Raises:
      ValueError: a number below 1, `every` above `most`, a negative tolerance.
      TypeError: not one of `call` and `rows` with `inputs`; `call` returns no tuple.

    Example:
      >>> import jaxprune as jp
      >>> widths = jp.metrics.good_widths(8, rows=4, inputs=16, every=4, rounds=1)
      >>> widths.widths[-1], [width for width, _ in widths.times]
      (8, [4, 8])
    """
    most = as_integer(most, "most", at_least=1, what="the largest width")
    every = as_integer(every, "every", at_least=1, below=most + 1, what="at most `most`")
    check_number(tolerance, "tolerance", "of 0 or more")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number of 0 or more, got {tolerance}.")
    if (call is None) == (rows is None or inputs is None) or (call is not None and (rows or inputs)):
        raise TypeError(
            "good_widths times a layer, rows=... and inputs=..., or a function, call=...: pass one."
        )
    if call is None:
        rows, inputs = (as_integer(n, name, at_least=1) for name, n in (("rows", rows), ("inputs", inputs)))
        try:
            dtype = jnp.dtype(dtype)
        except TypeError:
            raise TypeError(f"dtype must be of floats, such as jnp.bfloat16, got {shown(dtype)}.") from None
        what = f"{rows} rows of {inputs} inputs, {dtype.name}"
        timed = _layer(rows, inputs, dtype)
    else:
        check_function(call, "call=", "from a width to a tuple (function, *arguments)")
        what, timed = name_of(call), call
    widths = range(every, most + 1, every)
    found = latency({str(width): timed(width) for width in widths}, rounds)
    times = {width: found[str(width)].low for width in widths}
    good = worth_rounding_up_to(times, tolerance)
    return Widths(good, tuple(times.items()), what, _device(), float(tolerance))


def _device() -> str:
    kind = jax.devices()[0].device_kind
    return kind if kind != "cpu" else f"cpu, {platform.machine()}, {os.cpu_count()} cores"


def _layer(rows: int, inputs: int, dtype: Any) -> Callable[[int], tuple[Any, ...]]:
    def run(x: Any, made: Any, read: Any) -> Any:
        return jnp.tanh(x @ made) @ read

    def timed(width: int) -> tuple[Any, ...]:
        shapes = (rows, inputs), (inputs, width), (width, inputs)
        return (run, *(jnp.full(shape, 0.1, dtype) for shape in shapes))

    return timed


def worth_rounding_up_to(times: Mapping[int, float], tolerance: float) -> tuple[int, ...]:
    """Return the widths worth rounding up to, given the time of each width.

    These are the fewest widths, the largest among them, such that rounding any width up to the next of them
    costs at most `tolerance`, chosen from the largest down.

    Example:
      >>> worth_rounding_up_to({1: 1.0, 2: 1.0, 3: 2.0, 4: 2.02, 5: 3.0}, 0.05)
      (2, 4, 5)
    """
    good: list[int] = []
    for width in sorted(times, reverse=True):
        if not good or times[good[-1]] > (1 + tolerance) * times[width]:
            good.append(width)
    return tuple(reversed(good))
