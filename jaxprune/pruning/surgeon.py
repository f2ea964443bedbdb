"""Optimal Brain Surgeon: remove weights one by one, and adjust all others to make up for each."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.scores.common import LossFn, cut, end_to_end, objective
from jaxprune.scores.curvature import check_damping, inverse_hessian
from jaxprune.tree.checks import as_integer, check_function, is_traced_integer
from jaxprune.tree.leaves import flatten, is_concrete
from jaxprune.tree.masks import apply_masks, like_params, ones_masks
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Masks, Params, Where


def optimal_brain_surgeon(
    loss_fn: LossFn,
    params: Params,
    count: int | jax.Array,
    batch: Any,
    *,
    where: Where = kernels,
    masks: Masks | None = None,
    damping: float = 0.0,
) -> tuple[Params, Masks]:
    """Remove weights one after another, each time adjusting all those that stay.

    With H the Hessian over the weights that are left, each step removes the weight q of the lowest
    saliency `w_q^2 / (2 [H^-1]_qq)` and adds `-(w_q / [H^-1]_qq) H^-1 e_q` to the others. Among all
    changes that set w_q to 0, this is the one by which a quadratic loss at its minimum rises least, and it
    rises by exactly the saliency. Among equal saliencies the earlier leaf, then the lower row-major
    index, is removed first.

    H is computed once, at the params given. After each step one outer product turns its inverse into the
    inverse of H without row and column q, which is exact where the loss is quadratic. Elsewhere
    remove few weights at a time, train, and call it again with the masks. There is no floor: a
    leaf may be emptied. It is a pure function and runs under `jit`.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss.
      params: a pytree of arrays, trained: the gradient is taken to be 0.
      count: how many of the weights that are left to remove; it may be traced.
      batch: the data that `loss_fn` takes.
      where: the leaves whose weights are removed and adjusted, of at most 5,000 entries in all; others
        stay as they are.
      masks: masks to start from; by default nothing is pruned.
      damping: what is added to the diagonal of H, 0 or more. Where the data do not determine all weights,
        H has no inverse without it.

    Returns:
      The params, exactly 0 where pruned, and the masks. Under `jit`, NaN in place of the weights
      where the Hessian is not positive definite.

    Raises:
      ValueError: a count out of range, trees or shapes that differ, a `where` that matches nothing,
        too many weights, or (not under `jit`) a Hessian that is not positive definite.
      TypeError: a count that is not an integer; a leaf, or a loss, that is not real.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> x = jnp.array([[1.0, 1.0], [0.0, 1.0]])
      >>> loss_fn = lambda params, y: jnp.sum((x @ params["w"] - y) ** 2) / 2
      >>> params, y = {"w": jnp.array([[2.0], [3.0]])}, jnp.array([[5.0], [3.0]])  # a loss of 0
      >>> params, masks = optimal_brain_surgeon(loss_fn, params, 1, y)
      >>> masks["w"].tolist(), params["w"].round(4).tolist(), round(float(loss_fn(params, y)), 4)
      ([[False], [True]], [[0.0], [4.0]], 1.0)

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
      NIPS 5, 1993. They compute H anew for each weight, by outer products (Gauss-Newton).
    """
    check_function(loss_fn, "optimal_brain_surgeon", "loss_fn(params, batch)")
    check_damping(damping, "optimal_brain_surgeon")
    masks = ones_masks(params) if masks is None else like_params(masks, params)
    goal = objective("optimal_brain_surgeon", loss_fn, apply_masks(params, masks), batch, where)
    before = flatten(masks, "masks")
    chosen = selected(params, where)
    alive = end_to_end([before.by_path[path] for path in chosen])
    weights = end_to_end(goal.leaves)
    count = _checked_count(count, alive)
    inverse = inverse_hessian(
        "optimal_brain_surgeon", lambda v: goal.loss(cut(v, goal.leaves)), weights, damping, alive
    )

    def remove_one(_, state):
        weights, inverse, alive = state
        # Row q of the downdated inverse is exactly 0 in theory, so rows of removed weights hold rounding
        # errors only, and must not be divided by.
        diagonal = jnp.where(alive, jnp.diagonal(inverse), 1)
        q = jnp.argmin(jnp.where(alive, weights**2 / (2 * diagonal), jnp.inf))
        column = inverse[:, q]
        alive = alive.at[q].set(False)
        moved = weights - weights[q] / diagonal[q] * column
        downdated = inverse - jnp.outer(column, column) / diagonal[q]
        return jnp.where(alive, moved, 0), downdated, alive

    weights, _, alive = lax.fori_loop(0, count, remove_one, (weights, inverse, alive))
    after = before.by_path | dict(zip(chosen, cut(alive, goal.leaves), strict=True))
    return goal.params(cut(weights, goal.leaves)), before.tree(after)


def _checked_count(count: Any, alive: jax.Array) -> Any:
    if not is_traced_integer(count):
        count = as_integer(count, "count", what="weights to remove")
    if is_concrete(count, alive) and not 0 <= int(count) <= int(jnp.sum(alive)):
        raise ValueError(f"count={count} is out of range: there are {int(jnp.sum(alive))} weights to remove.")
    return count
