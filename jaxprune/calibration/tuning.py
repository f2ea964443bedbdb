"""Tuning arrays on batches, in compiled chunks of steps, until held-out batches stop getting better."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxprune.tree.leaves import is_array

Objective = Callable[[Any, Any, Any], jax.Array]
"""`objective(tuned, fixed, batch)`: the loss of a batch, a scalar; all three are trees of arrays."""


class Evaluation(NamedTuple):
    """The loss at one point of the tuning.

    Attributes:
      block: what is tuned: "network", or the name of a block.
      step: how many steps have been taken.
      loss: the mean over the steps since the evaluation before; NaN where there are none.
      held_out: the mean over the held-out batches, with the params of this step.
    """

    block: str
    step: int
    loss: float
    held_out: float

    def __str__(self) -> str:
        return (
            f"{self.block:<24} step {self.step:>6}   loss {self.loss:>11.5g}   held out {self.held_out:.5g}"
        )


class Plan(NamedTuple):
    """How long to tune.

    Attributes:
      steps: the most steps; one takes one batch.
      every: how many steps lie between two evaluations.
      patience: how many evaluations in a row may not be better than the best before.
      seed: of the order of the batches.
    """

    steps: int
    every: int
    patience: int
    seed: int


class Programs(NamedTuple):
    """The compiled parts of a tuning, to be used again for arrays of the same shapes.

    Attributes:
      chunk: `chunk(tuned, opt_state, fixed, stacked, count)` takes `count` steps, on that many of the stacked
        batches, and returns the new arrays, the new state and the sum of the losses.
      evaluate: `evaluate(tuned, fixed, batch)`.
    """

    chunk: Callable[..., Any]
    evaluate: Callable[..., Any]


def programs(objective: Objective, tx: optax.GradientTransformation) -> Programs:
    """Return the compiled parts for an objective and an optimizer."""
    optimizer = optax.with_extra_args_support(tx)

    def chunk(tuned: Any, opt_state: Any, fixed: Any, stacked: Any, count: Any) -> Any:
        def step(number: Any, state: Any) -> Any:
            tuned, opt_state, total = state
            batch = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, 0, keepdims=False), stacked)
            loss, grads = jax.value_and_grad(objective)(tuned, fixed, batch)

            def value_fn(tuned: Any) -> Any:  # of line searches
                return objective(tuned, fixed, batch)

            extra = {"value": loss, "grad": grads, "value_fn": value_fn}
            updates, opt_state = optimizer.update(grads, opt_state, tuned, **extra)
            return optax.apply_updates(tuned, updates), opt_state, total + loss.astype(jnp.float32)

        return lax.fori_loop(0, count, step, (tuned, opt_state, jnp.zeros((), jnp.float32)))

    return Programs(jax.jit(chunk), jax.jit(objective))


def tune(
    name: str,
    made: Programs,
    tuned: Any,
    opt_state: Any,
    fixed: Any,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    plan: Plan,
    note: Callable[[Evaluation], None],
) -> Any:
    """Return the arrays that had the lowest loss on the held-out batches; those given are among them.

    Each pass over the batches takes them in a new order. Each evaluation is noted.

    Raises:
      ValueError: the loss is not finite before the first step.
    """

    def evaluate(tuned: Any) -> float:
        return float(np.mean([float(made.evaluate(tuned, fixed, batch)) for batch in held_out]))

    best, lowest = tuned, evaluate(tuned)
    if not np.isfinite(lowest):
        raise ValueError(
            f"recover: the loss of {name} on the held-out batches is {lowest} before any step: the outputs "
            "of the pruned or of the dense network are not finite there."
        )
    note(Evaluation(name, 0, float("nan"), lowest))
    order, rng, taken, waited = [], np.random.default_rng(plan.seed), 0, 0
    while taken < plan.steps and waited < plan.patience:
        count = min(plan.every, plan.steps - taken)
        while len(order) < count:
            order += rng.permutation(len(batches)).tolist()
        now, order = order[:count], order[count:]
        total = jnp.zeros((), jnp.float32)
        for stacked, number in _stacks([batches[n] for n in now], plan.every):
            tuned, opt_state, losses = made.chunk(tuned, opt_state, fixed, stacked, number)
            total += losses
        taken += count
        value = evaluate(tuned)
        note(Evaluation(name, taken, float(total) / count, value))
        waited += 1
        if value < lowest:  # never true of NaN
            best, lowest, waited = tuned, value, 0
    return best


def _stacks(batches: Sequence[Any], size: int) -> list[tuple[Any, int]]:
    """Stack the batches of each shape, filled up to `size`, and say how many there are.

    The stacks of all chunks have the same shapes, so that there is one program for each shape of a batch.
    """
    shapes = [tuple((x.shape, jnp.result_type(x)) for x in jax.tree.leaves(batch)) for batch in batches]
    made = []
    for shape in Counter(shapes):
        some = [batch for batch, own in zip(batches, shapes, strict=True) if own == shape]
        filled = [*some, *some[:1] * (size - len(some))]
        made.append((jax.tree.map(_stack, *filled), len(some)))
    return made


def _stack(*arrays: Any) -> Any:
    return np.stack(arrays) if all(isinstance(x, np.ndarray) for x in arrays) else jnp.stack(arrays)


def check_batches(batches: Any, name: str) -> list[Any]:
    """Return a list of batches, checked: of arrays, and all of one structure.

    Raises:
      ValueError: there are none, or their structures differ.
      TypeError: they are not a sequence of batches of arrays.
    """
    if is_array(batches) or isinstance(batches, (str, bytes, dict)) or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"{name} must be a list of batches, got {type(batches).__name__}. A single batch is [batch]; an "
            "array of examples is split by jnp.split."
        )
    listed = list(batches)
    if not listed:
        raise ValueError(f"{name} is empty: pass at least one batch.")
    first = jax.tree.structure(listed[0])
    for number, batch in enumerate(listed):
        if (structure := jax.tree.structure(batch)) != first:
            raise ValueError(
                f"{name}[{number}] has the structure {structure}, but {name}[0] has {first}: all batches "
                "must be alike."
            )
        if not all(map(is_array, jax.tree.leaves(batch))):
            wrong = next(leaf for leaf in jax.tree.leaves(batch) if not is_array(leaf))
            raise TypeError(
                f"{name}[{number}] holds {wrong!r}, which is no array. Settings go in by "
                "functools.partial(apply_fn, train=False)."
            )
    return listed


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """Return the arguments after the params: a batch that is a tuple is unpacked, anything else is one.

    A named tuple is one argument, as a dict is.
    """
    return tuple(batch) if type(batch) is tuple else (batch,)
