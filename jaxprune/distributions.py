"""Distributions of a sparsity over leaves, as targets by path for `scope="layerwise"`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.schedules import check_sparsity
from jaxprune.sizing.result import Point, Sensitivity
from jaxprune.tree.checks import check_number, shown
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.stacks import Stacked, about_layers, layer_indices, layer_shape, stacks_of, take_layer
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Params, Where

__all__ = ["erk", "from_sensitivity", "sigma", "uniform"]


def uniform(
    params: Params, sparsity: float, where: Where = kernels, *, stacked: Stacked | None = None
) -> dict[str, float]:
    """Return the same sparsity for every leaf, as a dict to edit.

    Args:
      params: a pytree of arrays (or of `jax.ShapeDtypeStruct`).
      sparsity: the fraction removed from each leaf, in [0, 1).
      where: which leaves take part.
      stacked: which axes of which leaves count layers, as for `prune_once`.

    Returns:
      Sparsity by path. The sparsity of a stacked leaf holds for each of its layers, unless an entry names the
      layer: "layers/kernel[2]".

    Raises:
      ValueError: sparsity outside [0, 1), `where` matches nothing, or `stacked` does not fit a leaf.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": {"kernel": jnp.ones((4, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
      >>> jp.distributions.uniform(params, 0.9) | {"head/kernel": 0.5}
      {'a/kernel': 0.9, 'head/kernel': 0.5}
    """
    target = check_sparsity(sparsity)
    paths, _ = _stacks(params, where, stacked)
    return dict.fromkeys(paths, target)


def erk(
    params: Params, sparsity: float, where: Where = kernels, *, stacked: Stacked | None = None
) -> dict[str, float]:
    """Return Erdos-Renyi-Kernel sparsities, which keep small and narrow layers denser.

    The density of a leaf is `eps * sum(dims) / prod(dims)`, where eps makes the mean density, weighted by
    size, `1 - sparsity`. A leaf whose density would exceed 1 is dense, and eps is solved again for the rest.

    Args:
      params, where, stacked: as for `uniform`.
      sparsity: the fraction removed from all leaves that take part, taken together, in [0, 1).

    Returns:
      Sparsity by path; 0.0 for the leaves that stay dense. The layers of a stacked leaf have one shape and so
      one sparsity, the same as if each were a leaf.

    Raises:
      ValueError: as `uniform`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"fc1": jnp.ones((784, 300)), "fc2": jnp.ones((300, 100)), "fc3": jnp.ones((100, 10))}
      >>> {path: round(1 - s, 5) for path, s in jp.distributions.erk(params, 0.9).items()}
      {'fc1': 0.07957, 'fc2': 0.23019, 'fc3': 1.0}

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity", Nature Communications 2018; Evci et al., "Rigging the Lottery", ICML 2020.
    """
    target = check_sparsity(sparsity)
    leaves = array_leaves(params)
    chosen, stacks = _stacks(params, where, stacked)
    paths = [path for path in chosen if leaves[path].size]
    size = {path: float(leaves[path].size) for path in paths}
    shape = {path: layer_shape(leaves[path].shape, stacks.get(path, ())) for path in paths}
    # A stack counts with the size of all its layers, and with the density of one layer.
    raw = {path: sum(shape[path] or (1,)) / math.prod(shape[path]) for path in paths}

    # sum_dense size + eps * sum_rest (raw * size) = (1 - sparsity) * sum size, solved for eps.
    # Every leaf the solution overfills becomes dense; each round makes at least one so, or ends.
    dense: set[str] = set()
    eps = 0.0
    while len(dense) < len(paths):
        rest = [path for path in paths if path not in dense]
        wanted = (1 - target) * sum(size.values()) - sum(size[path] for path in dense)
        eps = wanted / sum(raw[path] * size[path] for path in rest)
        overfull = {path for path in rest if eps * raw[path] > 1}
        if not overfull:
            break
        dense |= overfull
    return {path: 0.0 if path in dense else float(np.clip(1 - eps * raw[path], 0, 1)) for path in paths}


def sigma(
    params: Params, quality: float, where: Where = kernels, *, stacked: Stacked | None = None
) -> dict[str, Any]:
    """Return thresholds proportional to each leaf's standard deviation, `quality * std(w)`.

    Args:
      params, where, stacked: as for `uniform`.
      quality: the factor, 0 or more. For normally distributed weights of mean 0 and the
        magnitude score, 1.0 removes 68 %, 0.5 removes 38 %.

    Returns:
      Threshold by path, for `prune_once(..., threshold=...)`. A stacked leaf has an array of its stack's
      shape, one threshold for each layer.

    Raises:
      ValueError: a negative quality, `where` matches nothing, or `stacked` does not fit a leaf.
      TypeError: a quality that is not a number.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[-2.0, 2.0, 0.5, -0.5]])}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, threshold=jp.distributions.sigma(params, 0.5))
      >>> masks["kernel"].tolist()
      [[True, True, False, False]]

    References:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015.
    """
    check_number(quality, "quality", "of 0 or more, of standard deviations")
    if not quality >= 0:
        raise ValueError(f"quality must be 0 or more, got {quality}.")
    leaves = array_leaves(params)
    chosen, stacks = _stacks(params, where, stacked)

    def deviation(path: str) -> jax.Array:
        axes, shape = stacks.get(path, ()), leaves[path].shape
        if not axes:
            return jnp.std(leaves[path])
        each = [jnp.std(take_layer(leaves[path], axes, index)) for index in layer_indices(shape, axes)]
        return jnp.stack(each).reshape([shape[axis] for axis in axes])

    return {path: float(quality) * deviation(path) for path in chosen}


def _stacks(
    params: Params, where: Where, stacked: Stacked | None
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Return the paths of the leaves that take part, and by path the stack axes of those that are stacked."""
    chosen = selected(params, about_layers(where, stacked))
    if stacked is None:
        return chosen, {}
    leaves = array_leaves(params)
    return chosen, stacks_of(stacked, {path: leaves[path] for path in chosen})


def from_sensitivity(
    result: Sensitivity, tolerance: float = 0.01, *, interpolate: bool = False
) -> dict[str, float]:
    """Return how much of each tensor, or group of coupled channels, can be pruned while the others are not.

    That is the highest level up to which the metric never drops by more than the tolerance. A tensor that
    cannot take the lowest level has the target 0. Pruned all together they cost more
    than the tolerance: losses add up, roughly.

    Args:
      result: from `jaxprune.sensitivity`.
      tolerance: by how much the metric may be worse than the dense network's, in the metric's unit:
        0.01 of an accuracy is one point.
      interpolate: whether to interpolate linearly where the metric crosses the tolerance between two levels.
        Nothing was evaluated there.

    Returns:
      Sparsity by path or group, for `scope="layerwise"` and the structure that was analysed. Tensors that
      were pruned together have the same sparsity.

    Raises:
      ValueError: a negative tolerance, or no tensor or group can take the lowest level.
      TypeError: `result` is not a `Sensitivity`, or the tolerance is not a number.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[3.0], [1.0]]), "c": jnp.array([[4.0], [1.5]])}
      >>> found = jp.sensitivity(lambda p: jnp.sum(p["a"] * p["c"]), params, levels=(0.5,))
      >>> jp.distributions.from_sensitivity(found, tolerance=1.5)
      {'a': 0.5, 'c': 0.5}
      >>> jp.distributions.from_sensitivity(found, tolerance=0.75, interpolate=True)
      {'a': 0.25, 'c': 0.25}

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.2.
    """
    if not isinstance(result, Sensitivity):
        raise TypeError(f"from_sensitivity needs what jaxprune.sensitivity gives, got {shown(result)}.")
    check_number(tolerance, "tolerance", "of 0 or more, of the metric")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}.")
    targets = {name: _spared(result.of(name), tolerance, interpolate) for name in result.pools}
    if not any(targets.values()):
        best = min(result.points, key=lambda point: np.nan_to_num(point.drop, nan=np.inf))
        raise ValueError(
            f"nothing stays within tolerance={tolerance:g} of {result.metric}={result.dense:.6g} at the "
            f"lowest level, {result.points[0].sparsity:g}. The least drop of all points is {best.drop:.6g}, "
            f"of {best.name} at {best.sparsity:g}. Analyse lower levels, or raise the tolerance."
        )
    return {pool: target for name, target in targets.items() for pool in result.pools[name]}


def _spared(points: Sequence[Point], tolerance: float, interpolate: bool) -> float:
    """Return the sparsity up to which no drop exceeds the tolerance."""
    spared, last_drop = 0.0, 0.0
    for point in points:
        if not point.drop <= tolerance:
            if not interpolate or not np.isfinite(point.drop):
                break
            part = (tolerance - last_drop) / (point.drop - last_drop)
            return float(spared + part * (point.sparsity - spared))
        spared, last_drop = point.sparsity, point.drop
    return spared
