"""Least squares on the support of masks: `reconstruct`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxprune.calibration.lockstep import Moments
from jaxprune.calibration.programs import Programs
from jaxprune.calibration.solving import Problem, refined_layer, with_rows_everywhere
from jaxprune.calibration.statistics import Layer, Statistics
from jaxprune.tree.checks import as_integer, shown
from jaxprune.tree.leaves import array_leaves, flatten
from jaxprune.tree.masks import like_params, masked
from jaxprune.typing import Masks, Params


def reconstruct(params: Params, masks: Masks, stats: Statistics, *, steps: int = 20) -> Params:
    """Return the params whose layers come nearest to the dense ones, on the support of masks.

    For each layer `y = W x + b` with the mask M it minimises

        sum over rows of ||W x + b - V x - c||^2    over V that is 0 where M is False, and c

    where x are the rows that `calibrate` saw. Each output is a problem of its own, and all of them are solved
    together by conjugate gradients, preconditioned by the diagonal. The bias c is solved for where a leaf of
    its own is added to the layer's output.

    Args:
      params: the dense params, those that were calibrated.
      masks: any masks like `params`: of entries, N:M groups, channels.
      stats: from `calibrate(..., statistics="gram")`.
      steps: how many steps of conjugate gradients, 0 or more. 20 come within a few parts in ten thousand of
        the least error; as many as a layer has inputs reach it.

    Returns:
      The params, exactly 0 where pruned. Leaves without statistics are masked and otherwise as they were, and
      so are layers of which nothing is pruned, to the bit. Solved in float32, rounded once to the leaf's
      dtype.

    Raises:
      ValueError: statistics without Gram matrices, params that changed since `calibrate`, masks that do not
        mirror the params.
      TypeError: `stats` is not what `calibrate` returns, or `steps` is not an integer.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.array([[1.0], [1.0]])}
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> x = jnp.array([[1.0, 1.0], [1.0, 0.0]])
      >>> stats = jp.calibrate(apply_fn, params, [x], statistics="gram")
      >>> masks = {"w": jnp.array([[True], [False]])}
      >>> jp.reconstruct(params, masks, stats)["w"].round(4).tolist()
      [[1.5], [0.0]]

    References:
      He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017.
    """
    if not isinstance(stats, Statistics):
        raise TypeError(f"reconstruct needs what jaxprune.calibrate returns as stats, got {shown(stats)}.")
    if stats.statistics != "gram":
        raise ValueError(
            "reconstruct needs Gram matrices, and these statistics are norms: "
            'jaxprune.calibrate(apply_fn, params, batches, statistics="gram").'
        )
    steps = as_integer(steps, "steps", at_least=0, what="of conjugate gradients")
    stats.check_params(params)
    leaves, kept = flatten(params), array_leaves(like_params(masks, params), "masks")
    changed = {path: masked(jnp.asarray(leaf), kept[path]) for path, leaf in leaves.by_path.items()}
    programs = Programs()
    for path in stats.paths:
        for layer in stats.layers(path):
            _solve(layer, leaves.by_path, kept, changed, steps, programs)
    return leaves.tree(changed)


def _solve(
    layer: Layer,
    dense: Mapping[str, Any],
    masks: Mapping[str, Any],
    changed: dict[str, Any],
    steps: int,
    programs: Programs,
) -> None:
    """Replace one layer, and its bias, among the `changed` leaves."""
    part, index = layer.part, layer.index
    view, bias = part.matrix, part.bias
    old, mask = view.layer(dense[view.path], index), view.layer(masks[view.path], index)
    if bool(jnp.all(mask)):
        return
    # Other parts of the leaf, the queries beside the keys, may have been solved already.
    now = view.layer(changed[view.path], index)
    moments = Moments(layer.rows, layer.mean * layer.rows[:, None], layer.gram)
    added = (
        None if bias is None else (bias.layer(dense[bias.path], index), bias.layer(masks[bias.path], index))
    )

    def solve(old: Any, now: Any, mask: Any, moments: Moments, added: Any) -> Any:
        matrix, kept = view.array(old), view.kept(mask)
        vector = None if bias is None else bias.array(added[0])
        problem = with_rows_everywhere(Problem(matrix, vector, moments))
        solved, moved = refined_layer(problem, jnp.where(kept, matrix, 0), kept, steps)
        pruned = jnp.any(~kept, axis=(1, 2))
        new = masked(view.put(now, jnp.where(pruned[:, None, None], solved, matrix)), mask)
        moved = None if vector is None else jnp.where(pruned[:, None], moved, vector)
        return new, None if bias is None else masked(bias.put(added[0], moved), added[1])

    given = (old, now, mask, moments, added)
    new, vector = programs.compiled(solve, *given)(*given)
    changed[view.path] = view.with_layer(changed[view.path], index, new)
    if bias is not None:
        changed[bias.path] = bias.with_layer(changed[bias.path], index, vector)
