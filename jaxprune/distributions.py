"""Distributions of a sparsity over leaves, as targets by path for `scope="layerwise"`."""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.schedules import check_sparsity
from jaxprune.scores import wanda
from jaxprune.sizing.result import Point, Sensitivity
from jaxprune.tree.checks import check_function, check_number, shown
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.stacks import (
    Stacked,
    about_layers,
    layer_indices,
    layer_name,
    layer_shape,
    leaf_of_layer,
    stacks_of,
    take_layer,
)
from jaxprune.tree.statistics import InputStatistics, check_calibrated
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Params, Where

__all__ = ["erk", "from_errors", "from_sensitivity", "owl", "sigma", "uniform"]


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


def owl(
    params: Params,
    stats: InputStatistics,
    sparsity: float,
    *,
    multiple: float = 5.0,
    spread: float = 0.08,
    where: Where | None = None,
    block_of: Callable[[str], Hashable] | None = None,
) -> dict[str, Any]:
    """Return outlier weighed layer sparsities: layers with many outliers among Wanda's scores stay denser.

    The outlier ratio of layer l is the share of its scores `|W_ij| ||x_j||` that are above `multiple` times
    their mean. With D_l the ratios, scaled to [0, 1], and n_l the sizes, the density is

        1 - s_l = 1 - sparsity + 2 spread (D_l - sum_k n_k D_k / sum_k n_k)

    so no two sparsities differ by more than 2 spread, and together they remove the sparsity asked for.

    Args:
      params: a pytree of arrays.
      stats: from `jaxprune.calibrate`.
      sparsity: the fraction removed from all layers together, in [0, 1).
      multiple: how many times the mean score an outlier is above. The paper takes 3 to 10, mostly 5.
      spread: half of the largest difference of two sparsities. The paper takes 0.08 at a sparsity of 0.7.
      where: which leaves take part; by default the calibrated ones.
      block_of: from the path of a leaf, or the name `path[i]` of a layer of a stacked leaf, what identifies
        the layers that have one outlier ratio and one sparsity. By default each has its own; in the paper all
        of a transformer block has one: `lambda path: path.split("/")[1]` for "blocks/3/mlp/up".

    Returns:
      Sparsity by path, for `scope="layerwise"` or `"output"`; for a stacked leaf an array of the stack's
      shape.

    Raises:
      ValueError: a sparsity outside [0, 1), also of one layer; a `multiple` or `spread` that is not positive;
        a leaf without statistics.
      TypeError: `stats` is not what `jaxprune.calibrate` returns, `block_of` is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.ones((4, 4)).at[0, 0].set(99), "b": jnp.ones((4, 4)), "out": jnp.ones((4, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"] @ params["out"]
      >>> stats = jp.calibrate(apply_fn, params, [jnp.eye(4)])
      >>> {path: round(s, 2) for path, s in jp.distributions.owl(params, stats, 0.7).items()}
      {'a': 0.62, 'b': 0.78}

    References:
      Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv:2310.05175. There the sizes do
      not count, because all blocks have one size.
    """
    target = check_sparsity(sparsity)
    for name, value in (("multiple", multiple), ("spread", spread)):
        check_number(value, name, "above 0")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}.")
    if block_of is not None:
        check_function(block_of, "block_of=", "of a path that returns what identifies its block")
    scores = array_leaves(wanda(params, stats=stats), "scores")  # checks stats
    chosen = selected(params, stats.where if where is None else where)
    check_calibrated(stats, array_leaves(params), chosen)

    # The layers of each block, and where their sparsities belong.
    blocks: dict[Hashable, list[tuple[str, tuple[int, ...], jax.Array]]] = {}
    for path in chosen:
        axes = stats.stacks.get(path, ())
        for index in layer_indices(scores[path].shape, axes):
            name = layer_name(path, index) if axes else path
            layer = take_layer(scores[path], axes, index) if axes else scores[path]
            blocks.setdefault(name if block_of is None else block_of(name), []).append((path, index, layer))
    sizes = np.array([sum(layer.size for *_, layer in block) for block in blocks.values()], np.float64)
    ratios = np.array([_outlier_ratio([layer for *_, layer in block], multiple) for block in blocks.values()])
    scaled = (ratios - ratios.min()) / (np.ptp(ratios) or 1.0)
    density = 1 - target + 2 * spread * (scaled - np.average(scaled, weights=sizes))
    found: dict[str, Any] = {}
    for name, block, sparse in zip(blocks, blocks.values(), 1 - density, strict=True):
        if not 0 <= sparse < 1:
            raise ValueError(
                f"owl would remove {sparse:.4g} of {name!r} to remove {target:g} of all layers. Lower "
                f"spread={spread:g}."
            )
        for path, index, _ in block:
            axes = stats.stacks.get(path, ())
            if not axes:
                found[path] = float(sparse)
                continue
            shape = [scores[path].shape[axis] for axis in axes]
            found.setdefault(path, np.zeros(shape))[index] = sparse
    return found


def _outlier_ratio(layers: Sequence[jax.Array], multiple: float) -> float:
    """Return the share of the scores of some layers that are above `multiple` times the mean of all."""
    size = sum(layer.size for layer in layers)
    mean = sum(float(jnp.sum(layer)) for layer in layers) / size
    return sum(int(jnp.sum(layer > multiple * mean)) for layer in layers) / size


def from_errors(
    errors: Mapping[str, Mapping[float, float]], params: Params, sparsity: float
) -> dict[str, float]:
    """Return the sparsities of layers that have the least sum of errors, from errors measured at some levels.

    Between two levels of a layer the error is taken to be linear in the sparsity, and where that does better,
    between levels that are further apart: each layer has the lower convex hull of its points. From all layers
    at 0, the layer whose error rises least for each entry removed moves to the next corner of its hull, until
    the sparsity is met. On convex functions that gives the least sum that is possible. All layers but the
    last one to move end at levels that were measured.

    Args:
      errors: by path, or by the name `path[i]` of a layer of a stacked leaf, a dict from sparsity to error.
        The errors are in one unit, so that they can be added. A layer has the error 0 at 0, unless that is
        given. Layers without an entry are left out.
      params: a pytree of arrays, which tells the sizes of layers.
      sparsity: the fraction removed from all layers in `errors` together, in [0, 1).

    Returns:
      Sparsity by path or layer, for `scope="layerwise"` or `"output"`, or for `prune_layers`.

    Raises:
      ValueError: no errors; a level outside [0, 1), an error that is not finite; a path that params do not
        have, or not all layers of a stacked leaf; the highest levels do not reach the sparsity.
      TypeError: errors that are not dicts of numbers.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10))}
      >>> errors = {"a": {0.4: 1.0, 0.8: 4.0}, "b": {0.4: 2.0, 0.8: 8.0}}
      >>> {path: round(s, 6) for path, s in jp.distributions.from_errors(errors, params, 0.5).items()}
      {'a': 0.6, 'b': 0.4}

    References:
      Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", ICML 2022, solves the same
      problem for run times; Everett, "Generalized Lagrange Multiplier Method for Solving Problems of Optimum
      Allocation of Resources", Operations Research 1963, has the rule on hulls.
    """
    target = check_sparsity(sparsity)
    hulls = {name: _lower_hull(table) for name, table in _checked_errors(errors).items()}
    sizes = _layer_sizes(hulls, array_leaves(params))
    steps = [
        ((after[1] - before[1]) / (after[0] - before[0]) / sizes[name], number, name)
        for name, hull in hulls.items()
        for number, (before, after) in enumerate(itertools.pairwise(hull))
    ]
    left = target * sum(sizes.values())
    if left > sum(sizes[name] * hull[-1][0] for name, hull in hulls.items()) * (1 + 1e-12):
        highest = ", ".join(f"{name} {hull[-1][0]:g}" for name, hull in hulls.items())
        raise ValueError(
            f"the highest levels ({highest}) do not reach sparsity={target:g}: measure higher ones."
        )
    found = dict.fromkeys(hulls, 0.0)
    # Slopes rise along a hull, so the steps of a layer come in order; of equal slopes the first layer's comes
    # first.
    for _, number, name in sorted(steps, key=lambda step: step[0]):
        start, end = hulls[name][number][0], hulls[name][number + 1][0]
        most = sizes[name] * (end - start)
        found[name] = end if most <= left * (1 + 1e-12) else start + left / sizes[name]
        left -= min(most, left)
        if left <= 0:
            break
    return found


def _checked_errors(errors: Any) -> dict[str, dict[float, float]]:
    """Return the errors by layer and level, checked, with the error at 0."""
    if not isinstance(errors, Mapping) or not all(isinstance(table, Mapping) for table in errors.values()):
        raise TypeError(
            f"from_errors needs a dict by path of dicts from sparsity to error, got {shown(errors)}."
        )
    if not errors:
        raise ValueError("errors is an empty dict, so nothing would be pruned.")
    checked = {}
    for name, table in errors.items():
        if not table:
            raise ValueError(f"errors[{name!r}] is an empty dict: no level was measured.")
        for level, error in table.items():
            check_sparsity(level, f"a level of errors[{name!r}]")
            check_number(error, f"errors[{name!r}][{level}]", "that is finite")
            if not math.isfinite(error):
                raise ValueError(f"errors[{name!r}][{level}] must be finite, got {error}.")
        checked[name] = {0.0: 0.0} | {float(level): float(error) for level, error in table.items()}
    return checked


def _lower_hull(table: Mapping[float, float]) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull of points (sparsity, error), by rising sparsity."""
    hull: list[tuple[float, float]] = []
    for point in sorted(table.items()):
        # The last corner goes if it lies on or above the line from the one before it to this point.
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (point[0] - x0) < (point[1] - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(point)
    return hull


def _layer_sizes(names: Sequence[str] | Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, int]:
    """Return how many entries each layer has."""
    sizes: dict[str, int] = {}
    for name in names:
        if name in leaves:
            sizes[name] = leaves[name].size
            continue
        path = leaf_of_layer(name)
        if path is None or path not in leaves:
            raise ValueError(
                f"errors names {name!r}, which params do not have. The paths are: {', '.join(leaves)}."
            )
        layers = [other for other in names if leaf_of_layer(other) == path]
        indices = [layer[len(path) + 1 : -1].split(",") for layer in layers]
        stack = [max(map(int, along)) + 1 for along in zip(*indices, strict=False)]
        whole = len(layers) == math.prod(stack) and all(size in leaves[path].shape for size in stack)
        if not whole or leaves[path].size % len(layers):
            raise ValueError(
                f"errors names {len(layers)} layers of params[{path!r}], whose shape is "
                f"{tuple(leaves[path].shape)}. Give the errors of all of its layers."
            )
        sizes[name] = leaves[path].size // len(layers)
    return sizes


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
