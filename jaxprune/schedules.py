"""Schedules: how the sparsity grows, over training steps or over levels.

A schedule is a function of a count that also knows where it begins and ends, because a pruner
acts only every so many steps and must still reach the target at the end step. The pruner evaluates it
on the host in double precision, so that counts come out exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.tree.checks import as_integer, is_number, shown

__all__ = ["constant", "cubic", "geometric", "linear", "one_shot"]


@dataclass(frozen=True)
class Schedule:
    """A sparsity that depends on a count: calling it gives the sparsity at that count.

    With an `end_step` the schedule counts optimizer steps: after t updates the sparsity is
    `schedule(t)`. It is 0 before `begin_step` and stays at its last value after `end_step`.
    Without an `end_step` it counts *levels*, the mask updates done so far, and has no end.

    To write a schedule of your own: `Schedule(lambda step: ..., begin_step=0, end_step=1000)`. The function
    may use `jax.numpy`, so an optax schedule will do: `Schedule(optax.linear_schedule(0.0, 0.9, 1000),
    end_step=1000)`. A pruner evaluates it on the host in double precision, even under `jit`. A function that
    itself rounds to float32 gives float32 values: 0.9 is then 0.89999998, and a count may be off by one.

    Attributes:
      value: the sparsity, in [0, 1), as a function of a count between begin and end.
      begin_step: the first count at which it prunes.
      end_step: the count at which it reaches its target, or None.
      name: its name in messages, such as "cubic(0.9)".

    Raises:
      ValueError: not 0 <= begin_step <= end_step.
      TypeError: a step that is not an integer.

    Example:
      >>> import jaxprune as jp
      >>> ramp = jp.schedules.linear(0.8, begin_step=10, end_step=20)
      >>> [round(float(ramp(t)), 3) for t in (9, 10, 15, 20, 99)]
      [0.0, 0.0, 0.4, 0.8, 0.8]
    """

    value: Callable[[Any], Any]
    begin_step: int = 0
    end_step: int | None = None
    name: str = ""

    def __post_init__(self):
        begin, end = as_integer(self.begin_step, "begin_step", at_least=0), self.end_step
        object.__setattr__(self, "begin_step", begin)
        if end is not None:
            object.__setattr__(self, "end_step", as_integer(end, "end_step", at_least=begin))

    def __str__(self) -> str:
        span = "" if self.end_step is None else f"{self.begin_step}-{self.end_step}"
        name = self.name or f"{getattr(self.value, '__name__', 'Schedule').strip('<>')}()"
        return name if not span else f"{name[:-1]}{'' if name.endswith('()') else ', '}{span})"

    def on_host(self, count: int) -> float:
        """Return the sparsity at a count as a Python number, also while a function is traced.

        The schedule's function is given a float64. If it computes by `jax.numpy` (an optax schedule, say),
        that is in double precision too, except where it makes arrays of float32 itself.
        """
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            return check_sparsity(self(np.float64(count)), f"the sparsity that {self} gives at {count}")

    def __call__(self, step: Any) -> Any:
        """Return the sparsity at a count.

        Args:
          step: an integer, or an array of integers: numpy's for double precision, JAX's for JAX's own.
        """
        xp = jnp if isinstance(step, jax.Array) else np
        last = step if self.end_step is None else xp.minimum(step, self.end_step)
        value = self.value(xp.maximum(last, self.begin_step))
        xp = jnp if isinstance(value, jax.Array) else xp
        return xp.where(step < self.begin_step, 0.0, value)


def constant(sparsity: float) -> Schedule:
    """Return a schedule of the same sparsity from the first update on.

    With `of="remaining"` each update removes this fraction of what the last one left.

    Raises:
      ValueError: sparsity outside [0, 1).

    Example:
      >>> import jaxprune as jp
      >>> float(jp.schedules.constant(0.5)(3))
      0.5
    """
    target = check_sparsity(sparsity)
    return Schedule(lambda level: target + 0.0 * level, name=f"constant({target:g})")


def one_shot(sparsity: float, step: int) -> Schedule:
    """Return a schedule that reaches its sparsity at once, at one step.

    Raises:
      ValueError: sparsity outside [0, 1), or a negative step.

    Example:
      >>> import jaxprune as jp
      >>> at_100 = jp.schedules.one_shot(0.9, step=100)
      >>> float(at_100(99)), float(at_100(100))
      (0.0, 0.9)
    """
    target = check_sparsity(sparsity)
    return _between(lambda t: target + 0.0 * t, step, step, f"one_shot({target:g})")


def linear(sparsity: float, *, begin_step: int = 0, end_step: int, initial_sparsity: float = 0.0) -> Schedule:
    """Return a schedule that rises linearly from `initial_sparsity` at `begin_step` to `sparsity` at the end.

    `s(t) = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))`

    Raises:
      ValueError: a sparsity outside [0, 1), a target below the initial sparsity, or steps not
        0 <= begin_step <= end_step.

    Example:
      >>> import jaxprune as jp
      >>> float(jp.schedules.linear(0.5, end_step=10, initial_sparsity=0.1)(5))
      0.3
    """
    return _polynomial(sparsity, initial_sparsity, begin_step, end_step, power=1)


def cubic(sparsity: float, *, begin_step: int = 0, end_step: int, initial_sparsity: float = 0.0) -> Schedule:
    """Return the usual gradual schedule: fast at first, when much is redundant, and slow at the end.

    `s(t) = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3`

    Raises:
      ValueError: a sparsity outside [0, 1), a target below the initial sparsity, or steps not
        0 <= begin_step <= end_step.

    Example:
      >>> import jaxprune as jp
      >>> schedule = jp.schedules.cubic(0.8, begin_step=100, end_step=200)
      >>> round(float(schedule(150)), 6), float(schedule(200))
      (0.7, 0.8)

    References:
      Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878.
    """
    return _polynomial(sparsity, initial_sparsity, begin_step, end_step, power=3)


def geometric(rate: float, stop: float | None = None) -> Schedule:
    """Return a schedule that removes a fixed fraction of what remains per level: `1 - (1 - rate)^level`.

    Args:
      rate: the fraction removed per level, in (0, 1).
      stop: a sparsity not to exceed, or None to go on for ever.

    Raises:
      ValueError: rate or stop outside their ranges.

    Example:
      >>> import jaxprune as jp
      >>> [round(float(jp.schedules.geometric(0.2)(level)), 4) for level in range(4)]
      [0.0, 0.2, 0.36, 0.488]

    References:
      Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019 (rate 0.2).
    """
    if not is_number(rate) or not 0 < rate < 1:
        raise ValueError(f"geometric needs a rate in (0, 1), the fraction removed per level, got {rate}.")
    # At some level 1 - (1 - rate)^level rounds to 1, but a sparsity is below 1.
    limit = float(np.nextafter(1, 0)) if stop is None else check_sparsity(stop, "stop")

    def value(level):
        removed = 1 - (1 - rate) ** level
        return removed + (limit - removed) * (removed > limit)

    return Schedule(value, name=f"geometric({rate:g})" if stop is None else f"geometric({rate:g}, {limit:g})")


def check_sparsity(sparsity: Any, what: str = "sparsity") -> float:
    """Return a sparsity as a float.

    Raises:
      TypeError: it is not a number, or traced: the host counts how many units a target removes.
      ValueError: it is outside [0, 1).
    """
    if isinstance(sparsity, Tracer):
        raise TypeError(
            f"{what} must be a Python number, not a traced value: counts are worked out exactly, on "
            "the host. To trace over sparsities (vmap, scan), pass count=, which may be traced; "
            "jaxprune.selection.removed_count(sparsity, size) gives it."
        )
    try:
        # `float` would accept strings, which have no such method; arrays of one entry have it.
        value = sparsity.__float__()
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} must be a number in [0, 1), got {shown(sparsity)}.") from None
    if not 0 <= value < 1:
        raise ValueError(
            f"{what} must be in [0, 1), the fraction removed, got {value}. "
            "(90 % is 0.9; the fraction kept is 1 - sparsity.)"
        )
    return value


def _polynomial(target: float, initial: float, begin: int, end: int, power: int) -> Schedule:
    final, first = check_sparsity(target), check_sparsity(initial, "initial_sparsity")
    if first > final:
        raise ValueError(
            f"sparsity must not fall: initial_sparsity={first} is above the target sparsity={final}."
        )

    def value(step):
        # At the end the second term is exactly 0, so the target is met to the bit.
        to_go = 1 - (step - begin) / max(end - begin, 1)
        return final + (first - final) * (to_go * (end > begin)) ** power

    return _between(value, begin, end, f"{'linear' if power == 1 else 'cubic'}({final:g})")


def _between(value: Callable[[Any], Any], begin: int, end: int, name: str) -> Schedule:
    if not (is_number(begin) and is_number(end)) or not 0 <= begin <= end:
        raise ValueError(
            f"steps must satisfy 0 <= begin_step <= end_step, got begin_step={begin}, end_step={end}."
        )
    return Schedule(value, begin, end, name)
