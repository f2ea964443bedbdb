"""Iterative pruning and lottery tickets: train, prune, rewind, level after level.

A level is one call of `train(params, masks) -> params`, whatever happens inside. `lottery_ticket`
yields the levels one by one; `lottery_scan` is the same run as one `lax.scan`, to be jitted and
vmapped over seeds. A control that a ticket is compared with is a choice of masks and a choice of start:

```python
masks = ticket.masks                                          # the ticket's
masks = jp.shuffled_masks(key, ticket.masks)                  # random, same sparsity in each layer
masks = jp.shuffled_masks(key, ticket.masks, within=-1)       # random, same in each neuron or filter
masks = jp.prune_rounds(dense.trained, pruner, ticket.level)  # one-shot, same sparsity

start = jp.rewind(params, masks)                              # the weights at the rewind point
start = jp.rewind(init(key), masks)                           # random re-initialisation
start = jp.rewind(dense.trained, masks)                       # fine-tuning

trained = train(start, masks)
```
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.counting import sizes
from jaxprune.training.optimizer import check_state_where
from jaxprune.tree.checks import as_integer, check_function, check_key, check_params, shown
from jaxprune.tree.dtypes import common_dtype
from jaxprune.tree.leaves import array_leaves, describe, is_concrete
from jaxprune.tree.masks import (
    apply_masks,
    bool_masks,
    check_not_swapped,
    check_pruned,
    packed_like,
    restore_packed,
    unpack_masks,
)
from jaxprune.tree.mirrors import check_mirrors, match_leaves_to_params
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.where import check_where, kernels
from jaxprune.typing import Masks, Params, Pruner, PrunerState, Where

TrainFn = Callable[[Params, Masks], Params]
"""`train(params, masks) -> params`: trains from params that are 0 where pruned, under the masks."""


class Ticket(NamedTuple):
    """A level of `lottery_ticket`.

    Attributes:
      level: how many times it was pruned; 0 is the dense network.
      params: the params that its training began from, exactly 0 where pruned.
      trained: the params at the end of its training.
      pruner: the pruner's state at this level, with the masks.
      sparsity: the fraction achieved, of the prunable leaves and of the model; Python floats, or
        float32 arrays under `jit`.
    """

    level: int | jax.Array
    params: Params
    trained: Params
    pruner: PrunerState
    sparsity: sizes.Sparsity

    @property
    def masks(self) -> Masks:
        """The masks of this level."""
        return self.pruner.masks


def lottery_ticket(
    train: TrainFn,
    params: Params,
    pruner: Pruner,
    levels: int,
    *,
    rewind: str = "weights",
    tune: TrainFn | None = None,
    after: Ticket | None = None,
    where: Where = kernels,
    **inputs: Any,
) -> Iterator[Ticket]:
    """Prune iteratively: yield the dense network as level 0, then `levels` tickets.

    Each level trains, and then the pruner scores the trained params and removes more. `rewind` says what
    the next level starts from:

    - `"weights"`: `params` again (lottery tickets). Params at initialisation give the original
      experiment, params of a later step k give late rewinding; then `train` begins at step k.
    - `"learning_rate"`: the weights as trained. `train` starts its schedule over.
    - `"nothing"`: the weights as trained, and from level 1 on `tune` trains them (fine-tuning).

    The generator is lazy: a level is trained when it is asked for, so leaving the loop ends the
    run. Everything in it is pure if `train` is; under `jit` use `lottery_scan`.

    Args:
      train: `train(params, masks) -> params`. It gets params that are 0 where pruned and keeps
        them so, as with `keep_masked(optimizer, masks)`.
      params: the params at the rewind point.
      pruner: a `Pruner`, updated once per level, as from `pruner(magnitude, geometric(0.2))`.
      levels: how many times to prune, 0 or more.
      rewind: see above.
      tune: the function that trains from level 1 on, for `rewind="nothing"`.
      after: a ticket of an earlier run with the same arguments to resume from (one restored from a
        checkpoint, say): the levels after it are yielded, exactly as that run would have yielded them.
      where: which leaves `Ticket.sparsity` counts as prunable.
      **inputs: passed on to the pruner's update (`key`, `batch`, ... for the score).

    Returns:
      An iterator of `Ticket`.

    Raises:
      ValueError: `levels` is negative, `rewind` is another word, `tune` is missing or not used, or
        trained params are not 0 where they are pruned.
      TypeError: `train` is not callable, or `pruner` is not a `Pruner`.

    Warns:
      UserWarning: a level removed nothing, so the next levels would repeat it.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> def train(params, masks):  # stands for a training loop under keep_masked(optimizer, masks)
      ...     return jp.apply_masks({"kernel": params["kernel"] + 1.0}, masks)
      >>> pruner = jp.pruner(jp.scores.magnitude, sparsity=jp.schedules.geometric(0.2))
      >>> for ticket in jp.lottery_ticket(train, params, pruner, levels=2):
      ...     print(ticket.level, round(ticket.sparsity.prunable, 2), ticket.params["kernel"][0].tolist())
      0 0.0 [1.0, 2.0, 3.0, 4.0, 5.0]
      1 0.2 [0.0, 0.0, 3.0, 4.0, 5.0]
      2 0.4 [0.0, 0.0, 0.0, 0.0, 5.0]

    References:
      Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Frankle et al., "Linear Mode
      Connectivity and the Lottery Ticket Hypothesis", ICML 2020 (late rewinding); Renda et al.,
      "Comparing Rewinding and Fine-tuning in Neural Network Pruning", ICLR 2020; Han et al.,
      NIPS 2015 (fine-tuning).
    """
    _check(train, params, pruner, levels, rewind, tune, where)

    def tickets() -> Iterator[Ticket]:
        if after is None:
            state = pruner.init(params)
            ticket = _ticket(train, 0, apply_masks(params, state.masks), state, where)
            yield ticket
        else:
            ticket = after
        for level in range(int(ticket.level) + 1, levels + 1):
            state = pruner.update(ticket.pruner, ticket.trained, **inputs)
            if is_concrete(state.masks) and sizes.nonzeros(state.masks) == sizes.nonzeros(ticket.masks):
                warnings.warn(f"level {level} removed nothing: its masks are those before.", stacklevel=2)
            start = _start(params, ticket.trained, state.masks, rewind)
            ticket = _ticket(tune or train, level, start, state, where)
            yield ticket

    return tickets()


def lottery_scan(
    train: TrainFn,
    params: Params,
    pruner: Pruner,
    levels: int,
    *,
    rewind: str = "weights",
    tune: TrainFn | None = None,
    where: Where = kernels,
    measure: Callable[[Ticket], Any] = lambda ticket: ticket,
    **inputs: Any,
) -> Any:
    """Run `lottery_ticket` as one `lax.scan`, which compiles a level once.

    It is a pure function, to be jitted as a whole and vmapped over seeds. The pruner is updated once
    more after the last level, in vain, because every turn of a scan is alike.

    ```python
    def run(key):
        return jp.lottery_scan(partial(train, key), init(key), pruner, levels=10)

    tickets = jax.jit(jax.vmap(run))(keys)  # leaves: (seeds, 11, ...)
    ```

    Args:
      train, params, pruner, levels, rewind, tune, where, **inputs: as for `lottery_ticket`.
      measure: a function of a ticket that returns what to keep of it, such as `lambda t: t.sparsity`; by
        default the whole ticket, with its params.

    Returns:
      `measure(ticket)` of levels 0 to `levels`, stacked along a leading axis.

    Raises:
      ValueError, TypeError: as `lottery_ticket`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> pruner = jp.pruner(jp.scores.magnitude, sparsity=jp.schedules.geometric(0.5))
      >>> def run(kernel):
      ...     return jp.lottery_scan(jp.apply_masks, {"kernel": kernel}, pruner, levels=2)
      >>> tickets = jax.jit(jax.vmap(run))(jnp.arange(16.0).reshape(2, 2, 4))
      >>> tickets.masks["kernel"].sum((2, 3)).tolist()
      [[8, 4, 2], [8, 4, 2]]
    """
    _check(train, params, pruner, levels, rewind, tune, where)

    def level(train: TrainFn) -> Callable:
        def run(carry, number):
            state, start = carry
            ticket = _ticket(train, number, start, state, where)
            state = pruner.update(state, ticket.trained, **inputs)
            return (state, _start(params, ticket.trained, state.masks, rewind)), measure(ticket)

        return run

    state = pruner.init(params)
    carry = (state, apply_masks(params, state.masks))
    numbers = jnp.arange(levels + 1)
    if tune is None:
        return lax.scan(level(train), carry, numbers)[1]
    carry, dense = level(train)(carry, numbers[0])
    _, tuned = lax.scan(level(tune), carry, numbers[1:])
    return jax.tree.map(lambda one, more: jnp.concatenate([jnp.asarray(one)[None], more]), dense, tuned)


def rewind(saved: Any, masks: Masks, *, state_where: Where | None = None) -> Any:
    """Return a saved training state under masks, to train on from.

    Everything in it that mirrors the params (the params themselves, an optimizer's moments) is 0
    where pruned, masks in it become these masks, and everything else (step counters, and so the
    learning rate and the bias corrections that follow them) stays as saved. What is rewound
    depends on what is passed:

    - weights: `rewind((params_k, opt_state_k), masks)`, both saved at step k;
    - learning rate alone: `rewind((params_now, opt_state_k), masks)`;
    - nothing, fine-tuning: `rewind((params_now, opt_state_now), masks)`.

    Args:
      saved: params, an optax state, or any tree that holds them.
      masks: bool masks like the params.
      state_where: which leaves of `saved` may mirror a param, as for `wrap_optax`.

    Returns:
      A tree like `saved`.

    Raises:
      ValueError: nothing in `saved` mirrors a mask that prunes something.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> params, masks = {"kernel": jnp.ones((1, 2))}, {"kernel": jnp.array([[True, False]])}
      >>> tx = optax.sgd(optax.linear_schedule(0.1, 0.0, 100), momentum=0.9)
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> params, opt_state = jp.rewind((params, opt_state), masks)
      >>> params["kernel"].tolist(), optax.tree.get(opt_state, "trace")["kernel"].tolist()
      ([[1.0, 0.0]], [[1.0, 0.0]])
      >>> int(optax.tree.get(opt_state, "count"))
      1
    """
    check_not_swapped(masks, saved, "rewind(saved, masks)")
    masks = bool_masks(masks)
    check_state_where(state_where)
    kept = jax.tree.leaves(masks)
    given = restore_packed(saved, masks)
    saved = unpack_masks(given)
    leaves, treedef = jax.tree.flatten(saved)
    indices = match_leaves_to_params(saved, masks, state_where)
    mirrored = {index for index in indices if index is not None}
    # Where something mirrors a mask, the masks that nothing mirrors may be those that prune nothing.
    missed = {
        path: mask
        for number, (path, mask) in enumerate(zip(leaf_paths(masks), kept, strict=True))
        if number not in mirrored and (not mirrored or (is_concrete(mask) and not np.asarray(mask).all()))
    }
    if missed:
        listing = ", ".join(f"{path} {describe(mask)}" for path, mask in missed.items())
        raise ValueError(
            "nothing in the saved state mirrors these masks, so what they prune would stay: "
            f"{listing}. The state must hold the params, or moments of theirs, in their shapes."
        )

    def masked(leaf, index):
        if index is None:
            return leaf
        if leaf.dtype == jnp.bool_:
            return jnp.broadcast_to(kept[index], leaf.shape)
        return jnp.where(kept[index], leaf, jnp.zeros((), leaf.dtype))

    return packed_like(jax.tree.unflatten(treedef, list(map(masked, leaves, indices))), given)


def shuffled_masks(key: jax.Array, masks: Masks, within: int | None = None) -> Masks:
    """Return random masks that keep as many entries of each leaf: a control for which entries are kept.

    Args:
      key: a PRNG key.
      masks: bool masks.
      within: an axis. The entries at each of its indices are shuffled among themselves, so that the counts
        there stay too: -1 keeps every neuron's or filter's number of inputs (in flax's layouts).
        Leaves without this axis are shuffled as a whole.

    Returns:
      Masks like `masks`.

    Raises:
      ValueError: no mask has the axis `within`.
      TypeError: a mask is not bool.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> masks = {"kernel": jnp.array([[True, False], [True, False], [True, True]])}
      >>> shuffled = jp.shuffled_masks(jax.random.key(0), masks, within=-1)["kernel"]
      >>> shuffled.sum(0).tolist()
      [3, 1]

    References:
      Frankle and Carbin, ICLR 2019 (random sparse networks); Frankle et al., "Pruning Neural
      Networks at Initialization: Why Are We Missing the Mark?", ICLR 2021 (layer-wise shuffling).
    """
    check_key(key, "shuffled_masks")
    masks = bool_masks(masks)
    if within is not None:
        within = as_integer(within, "within", what="an axis; or None")
    if within is not None and not any(-m.ndim <= within < m.ndim for m in jax.tree.leaves(masks)):
        raise ValueError(f"within={within}: no mask has such an axis.")

    def shuffled(index, mask):
        own = jax.random.fold_in(key, index)
        if not mask.size:
            return mask
        if within is None or not -mask.ndim <= within < mask.ndim:
            return jax.random.permutation(own, mask.ravel()).reshape(mask.shape)
        last = jnp.moveaxis(mask, within, -1)
        flat = last.reshape(-1, last.shape[-1])
        mixed = jax.random.permutation(own, flat, axis=0, independent=True)
        return jnp.moveaxis(mixed.reshape(last.shape), -1, within)

    leaves, treedef = jax.tree.flatten(masks)
    return jax.tree.unflatten(treedef, [shuffled(i, jnp.asarray(mask)) for i, mask in enumerate(leaves)])


def error_barrier(
    error: Callable[[Params], jax.Array], one: Params, other: Params, points: int = 11
) -> jax.Array:
    """Return how much the error rises on the straight line between two networks.

    `max over a in [0, 1] of error((1 - a) one + a other) - (error(one) + error(other)) / 2`

    Two trainings from the same params that differ in their data order and end without a barrier are
    linearly connected. Params from which they are, are called stable, and tickets rewound to stable params
    are found to train well.

    Args:
      error: the error (or loss) of some params: a function that can be traced, to a scalar.
      one, other: two trained params of the same structure.
      points: how many values of a, from 0 to 1 inclusive; 2 or more.

    Returns:
      A scalar, 0 or more up to rounding: the ends are among the points.

    Raises:
      ValueError: fewer than 2 points, or params that differ in structure or shape.
      TypeError: `error` is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> one, other = {"w": jnp.array([-1.0])}, {"w": jnp.array([1.0])}
      >>> float(jp.error_barrier(lambda p: (1 - jnp.abs(p["w"])).sum(), one, other))
      1.0

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020.
    """
    points = as_integer(points, "points", at_least=2)
    check_function(error, "error_barrier", "error(params)")
    check_mirrors(other, one, "other")
    by_path = array_leaves(other, "other")  # whose containers may have the leaves in another order
    others = [by_path[path] for path in leaf_paths(one)]

    def at(a: jax.Array) -> jax.Array:
        def between(p, q):
            if not jnp.issubdtype(p.dtype, jnp.inexact):
                return p  # no line passes through counters
            # Half precision is mixed in float32.
            dtype = common_dtype(p.dtype, a.dtype)
            mixed = (1 - a).astype(dtype) * p.astype(dtype) + a.astype(dtype) * q.astype(dtype)
            return mixed.astype(p.dtype)

        leaves, treedef = jax.tree.flatten(one)
        return error(jax.tree.unflatten(treedef, list(map(between, leaves, others))))

    errors = lax.map(at, jnp.linspace(0.0, 1.0, points))
    return jnp.max(errors) - (errors[0] + errors[-1]) / 2


_CALL = "lottery_ticket(train, params, pruner, levels)"
_ORDER = f"The order is {_CALL}."


def _check(train: Any, params: Any, pruner: Any, levels: Any, rewind: Any, tune: Any, where: Any) -> None:
    if not callable(train):
        raise TypeError(
            f"train must be a function train(params, masks) -> params, got {shown(train)}. {_ORDER}"
        )
    check_params(params, _CALL)
    check_where(where)
    if not isinstance(pruner, Pruner):
        raise TypeError(f"lottery tickets need a jaxprune Pruner, got {type(pruner).__name__}. {_ORDER}")
    as_integer(levels, "levels", at_least=0, what="how often to prune")
    if not isinstance(rewind, str) or rewind not in ("weights", "learning_rate", "nothing"):
        raise ValueError(f"rewind must be 'weights', 'learning_rate' or 'nothing', got {rewind!r}.")
    if (rewind == "nothing") != (tune is not None):
        raise ValueError(
            "rewind='nothing' is fine-tuning, and needs tune=, which trains from level 1 on; with "
            f"rewind={rewind!r} {'it is missing' if tune is None else 'it would not be used'}."
        )


def _ticket(train: TrainFn, level: Any, start: Params, state: PrunerState, where: Where) -> Ticket:
    trained = train(start, state.masks)
    check_mirrors(trained, state.masks, "what train returned")
    if is_concrete(trained, state.masks):
        check_pruned(trained, state.masks)
    return Ticket(level, start, trained, state, sizes.sparsity(state.masks, where))


def _start(params: Params, trained: Params, masks: Masks, rewind: str) -> Params:
    """Return the params that the next level trains from."""
    return apply_masks(params if rewind == "weights" else trained, masks)
