"""Tuning arrays on batches, in compiled chunks of steps, until held-out batches stop getting better."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxprune.calibration.programs import Programs

_STACKED = 2**26
"""The most bytes of batches that are handed to the device at once, for the steps between two evaluations."""

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


def tune(
    name: str,
    objective: Objective,
    tx: optax.GradientTransformation,
    tuned: Any,
    fixed: Any,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    plan: Plan,
    note: Callable[[Evaluation], None],
    programs: Programs,
) -> Any:
    """Return the arrays that had the lowest loss on the held-out batches; those given are among them.

    Each pass over the batches takes them in a new order. Each evaluation is noted.

    Raises:
      ValueError: the loss is not finite before the first step.
    """
    optimizer = optax.with_extra_args_support(tx)
    compiled: dict[Any, Callable[..., Any]] = {}

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        key = function, _shapes(arguments)
        if key not in compiled:
            compiled[key] = programs.compiled(function, *arguments)
        return compiled[key](*arguments)

    def chunk(tuned: Any, opt_state: Any, total: Any, fixed: Any, stacked: Any, count: Any) -> Any:
        """Take `count` steps, on as many of the stacked batches; add their losses to a total."""

        def step(number: Any, state: Any) -> Any:
            tuned, opt_state, total = state
            batch = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, 0, keepdims=False), stacked)
            loss, grads = jax.value_and_grad(objective)(tuned, fixed, batch)

            def value_fn(tuned: Any) -> Any:  # of line searches
                return objective(tuned, fixed, batch)

            extra = {"value": loss, "grad": grads, "value_fn": value_fn}
            updates, opt_state = optimizer.update(grads, opt_state, tuned, **extra)
            return optax.apply_updates(tuned, updates), opt_state, total + loss.astype(jnp.float32)

        return lax.fori_loop(0, count, step, (tuned, opt_state, total))

    def evaluate(tuned: Any) -> float:
        return float(np.mean([float(run(objective, tuned, fixed, batch)) for batch in held_out]))

    opt_state, best, lowest = tx.init(tuned), tuned, evaluate(tuned)
    if not np.isfinite(lowest):
        raise ValueError(
            f"recover: the loss of {name} on the held-out batches is {lowest} before any step: the outputs "
            "of the pruned or of the dense network are not finite there."
        )
    note(Evaluation(name, 0, float("nan"), lowest))
    order, rng, taken, waited = [], np.random.default_rng(plan.seed), 0, 0
    largest = max(sum(x.nbytes for x in jax.tree.leaves(batch)) for batch in batches)
    size = max(1, min(plan.every, len(batches), _STACKED // max(1, largest)))
    while taken < plan.steps and waited < plan.patience:
        count = min(plan.every, plan.steps - taken)
        while len(order) < count:
            order += rng.permutation(len(batches)).tolist()
        now, order = order[:count], order[count:]
        total = jnp.zeros((), jnp.float32)
        for stacked, number in _stacks([batches[n] for n in now], size):
            tuned, opt_state, total = run(chunk, tuned, opt_state, total, fixed, stacked, jnp.asarray(number))
        taken += count
        value = evaluate(tuned)
        note(Evaluation(name, taken, float(total) / count, value))
        waited += 1
        if value < lowest:  # never true of NaN
            best, lowest, waited = tuned, value, 0
    return best


def _shapes(tree: Any) -> tuple[Any, ...]:
    return tuple((np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree))


def _stacks(batches: Sequence[Any], size: int) -> Iterator[tuple[Any, int]]:
    """Yield stacks of `size` batches of one shape, the last of a shape filled up, and how many count.

    All stacks have the same size, so that there is one program for each shape of a batch.
    """
    shapes = list(map(_shapes, batches))
    for shape in Counter(shapes):
        alike = [batch for batch, own in zip(batches, shapes, strict=True) if own == shape]
        for start in range(0, len(alike), size):
            some = alike[start : start + size]
            yield jax.tree.map(_stack, *some, *some[:1] * (size - len(some))), len(some)


def _stack(*arrays: Any) -> Any:
    return np.stack(arrays) if all(isinstance(x, np.ndarray) for x in arrays) else jnp.stack(arrays)
