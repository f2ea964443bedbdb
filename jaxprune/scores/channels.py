"""Scores of whole channels: filters, neurons, feature maps.

Each gives every entry of a kernel the score of its channel, and NaN to leaves without scores. Use it with
`jp.structures.slices(axis=-1, norm=math.inf)`, which reads the channel's score off its entries. `prune_once`
refuses to rank NaN, so its `where` must select only leaves with scores. The channels lie along the last axis,
as the outputs of flax's dense and conv kernels do; for equinox and torch layouts pass `axis=0`, here and to
`slices`.

Some criteria of channels are pooled from scores of entries. The L1 or L2 norm of a filter is `magnitude`
pooled by `slices`, and the first-order change of the loss without the filter is `signed_taylor`:

>>> import jax.numpy as jnp, jaxprune as jp
>>> params = {"kernel": jnp.array([[2.0, 0.0, 1.0], [2.0, 3.0, 1.0]])}
>>> l1, l2 = jp.structures.slices(norm=1), jp.structures.slices(norm=2)
>>> jp.prune_once(params, jp.scores.magnitude, count=2, structure=l1)["kernel"][0].tolist()
[True, False, False]
>>> jp.prune_once(params, jp.scores.magnitude, count=2, structure=l2)["kernel"][0].tolist()
[False, True, False]
>>> grads = {"kernel": jnp.array([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])}
>>> summed = jp.structures.slices(norm=lambda s, axis: jnp.abs(jnp.sum(s, axis=axis)))
>>> masks = jp.prune_once(params, jp.scores.signed_taylor, count=1, structure=summed, grads=grads)
>>> masks["kernel"][0].tolist()
[False, True, True]
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.scores.common import with_nan_elsewhere
from jaxprune.tree.checks import as_integer, check_array, shown
from jaxprune.tree.dtypes import promote_to_float32
from jaxprune.tree.leaves import array_leaves, describe
from jaxprune.tree.stacks import (
    Stacked,
    join_layers,
    layer_indices,
    layer_name,
    split_layers,
    stacks_of,
    take_layer,
)
from jaxprune.typing import Params, ScoreFn, Scores


def fpgm(params: Params, *, axis: int = -1, stacked: Stacked | None = None, **extra: Any) -> Scores:
    """Distance to the geometric median: `sum_j ||F_i - F_j||_2` over the filters of a leaf.

    A filter near the median of its layer can be replaced by the other filters, so it goes first, however
    large it is. Distances in different layers are not comparable: use `scope="layerwise"`. Filters that are
    pruned already are 0 and stay among the F_j.

    Args:
      axis: the axis that indexes the filters.
      stacked: as for `prune_once`, which passes it on: each layer is scored as a separate leaf, and `axis` is
        an axis of one layer.

    Returns:
      Scores like `params`. In real floating-point leaves of two axes or more each entry has the score of
      its filter, in float32 or float64; other leaves have NaN.

    Raises:
      ValueError: a leaf of two axes or more does not have the axis `axis`.
      TypeError: `axis` is not an integer.

    Example:
      >>> import math, jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[-9.0, 8.0, 9.0, 10.0]])}  # four filters of one weight
      >>> jp.scores.fpgm(params)["kernel"].tolist()
      [[54.0, 20.0, 20.0, 22.0]]
      >>> filters = jp.structures.slices(axis=-1, norm=math.inf)
      >>> jp.prune_once(params, jp.scores.fpgm, count=1, structure=filters)["kernel"].tolist()
      [[True, False, True, True]]

    References:
      He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
      Acceleration", CVPR 2019. Their code can also prune some filters by norm; this is FPGM-only.
    """
    del extra

    def distances(leaf, axis):
        filters = jnp.moveaxis(promote_to_float32(leaf), axis, 0).reshape(leaf.shape[axis], -1)
        # From the differences themselves: computed from norms and inner products, the distances of near
        # filters would be lost to cancellation.
        return lax.map(lambda one: jnp.sum(jnp.sqrt(jnp.sum((filters - one) ** 2, axis=1))), filters)

    by_layer, leaves = {}, array_leaves(params)
    stacks = _stacks(stacked, {p: x for p, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)})
    for name, layer in split_layers(leaves, stacks).items():
        if layer.ndim >= 2 and jnp.issubdtype(layer.dtype, jnp.floating):
            along = _channel_axis(name, layer, axis)
            by_layer[name] = _spread(distances(layer, along), layer, along)
    return _joined(by_layer, stacks, leaves, params)


def bn_scale(scales: Mapping[str, str], *, axis: int = -1) -> ScoreFn:
    """The magnitude of the scale of the norm after a layer, `|gamma|`, for the layer's channels.

    For networks trained with an L1 penalty on the scales, which shrinks those of channels that matter little.

    Args:
      scales: by the path of a kernel, the path of the scale after it, of shape (channels,).
      axis: the axis of the kernels that indexes their channels.

    Returns:
      A score `score(params, *, stacked=None, **extra)`. In the kernels named each entry has the score of its
      channel; other leaves have NaN. The scale of a stacked kernel must be stacked as well.

    Raises:
      TypeError: `scales` is not a dict of paths.
      ValueError: `scales` is empty; on use, a path is not in params, or a scale does not have one number
        for each channel.

    Example:
      >>> import math, jax.numpy as jnp, jaxprune as jp
      >>> params = {"conv": {"kernel": jnp.ones((2, 3))}, "bn": {"scale": jnp.array([0.5, -2.0, 0.1])}}
      >>> score = jp.scores.bn_scale({"conv/kernel": "bn/scale"})
      >>> filters = jp.structures.slices(axis=-1, norm=math.inf)
      >>> jp.prune_once(params, score, count=1, structure=filters)["conv"]["kernel"][0].tolist()
      [True, True, False]

    References:
      Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    example = "scales={'conv/kernel': 'bn/scale'}"
    _check_named(scales, "scores.bn_scale", example)
    if wrong := [path for path in scales.values() if not isinstance(path, str)]:
        raise TypeError(
            f"scores.bn_scale needs paths of scales, got {shown(wrong[0])}. For example {example}."
        )

    def score(params: Params, *, stacked: Stacked | None = None, **extra: Any) -> Scores:
        del extra
        leaves = array_leaves(params)
        _check_paths(scales.values(), leaves, "scores.bn_scale")
        stacks = _stacks(stacked, {path: leaves[path] for path in scales.values()})

        def channel_scores(path, channels, index, stack):
            gamma = leaves[scales[path]]
            axes = stacks.get(scales[path], ())
            if len(axes) == len(index) and all(n < gamma.shape[a] for n, a in zip(index, axes, strict=True)):
                gamma = take_layer(gamma, axes, index)
            if gamma.shape != (channels,):
                raise ValueError(
                    f"scores.bn_scale: params[{scales[path]!r}] is {describe(gamma)}, but params[{path!r}] "
                    f"has {channels} channels along axis {axis}: there must be one scale for each."
                )
            return promote_to_float32(jnp.abs(gamma))

        return _of_named(scales, channel_scores, "scores.bn_scale", params, axis, stacked)

    return score


def apoz(
    params: Params,
    *,
    activations: Mapping[str, jax.Array] | None = None,
    axis: int = -1,
    stacked: Stacked | None = None,
    **extra: Any,
) -> Scores:
    """How often a channel is active: 1 minus its average percentage of zeros (APoZ).

    The fraction of activations, over examples and places, that are not 0. This needs a nonlinearity with
    exact zeros, such as ReLU; after others all channels score 1.

    Args:
      activations: by the path of a kernel, the outputs of its layer *after* the nonlinearity, of shape
        (..., channels); for a stacked kernel (stack..., ..., channels), as a scan returns them.
      axis: the axis of the kernels that indexes their channels.
      stacked: as for `prune_once`, which passes it on: each layer is scored as a separate leaf, and `axis` is
        an axis of one layer.

    Returns:
      Scores like `params`, in [0, 1]. In the kernels named each entry has the score of its channel; other
      leaves have NaN.

    Raises:
      TypeError: `activations` is not a dict.
      ValueError: `activations` is missing, a path is not in params, or the last axis of activations is not
        the channels.

    Example:
      >>> import math, jax, jax.numpy as jnp, jaxprune as jp
      >>> params, x = {"kernel": jnp.array([[1.0, -1.0]])}, jnp.array([[-1.0], [2.0], [3.0]])
      >>> outputs = {"kernel": jax.nn.relu(x @ params["kernel"])}
      >>> filters = jp.structures.slices(axis=-1, norm=math.inf)
      >>> masks = jp.prune_once(params, jp.scores.apoz, count=1, structure=filters, activations=outputs)
      >>> masks["kernel"].tolist()
      [[True, False]]

    References:
      Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
      Architectures", arXiv:1607.03250.
    """
    del extra
    return _means(activations, lambda a: (a != 0).astype(jnp.float32), "scores.apoz", params, axis, stacked)


def mean_activation(
    params: Params,
    *,
    activations: Mapping[str, jax.Array] | None = None,
    axis: int = -1,
    stacked: Stacked | None = None,
    **extra: Any,
) -> Scores:
    """The mean magnitude of a channel's activations, `mean |a|` over examples and places.

    After ReLU this is the mean activation of the paper. The paper compares layers after dividing the scores
    of each by their L2 norm; here scores are not divided: use `scope="layerwise"`.

    Args:
      activations, axis, stacked: as for `apoz`.

    Returns:
      Scores like `params`, 0 or more. In the kernels named each entry has the score of its channel; other
      leaves have NaN.

    Raises:
      TypeError, ValueError: as `apoz`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, outputs = {"kernel": jnp.ones((3, 2))}, jnp.array([[0.0, 1.0], [4.0, 2.0]])
      >>> jp.scores.mean_activation(params, activations={"kernel": outputs})["kernel"][0].tolist()
      [2.0, 1.5]

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      ICLR 2017.
    """
    del extra
    return _means(
        activations, lambda a: promote_to_float32(jnp.abs(a)), "scores.mean_activation", params, axis, stacked
    )


ChannelScores = Callable[[str, int, tuple[int, ...], tuple[int, ...]], jax.Array]
"""`channel_scores(path, channels, index, stack)` returns one score for each channel of a kernel: of the layer
`index` in a stack of shape `stack`, both empty for a kernel that is not stacked."""


def _means(
    activations: Any,
    of: Callable[[jax.Array], jax.Array],
    name: str,
    params: Params,
    axis: int,
    stacked: Stacked | None,
) -> Scores:
    """Score the channels of kernels by the mean of a function of their activations."""
    if activations is None:
        raise ValueError(f"{name} needs activations: pass activations={{'conv/kernel': relu(outputs)}}.")
    _check_named(activations, name, "activations={'conv/kernel': relu(outputs)}")

    def channel_scores(path, channels, index, stack):
        check_array(activations[path], f"{name}: activations[{path!r}]")
        outputs = jnp.asarray(activations[path])
        if index and (outputs.ndim < len(index) + 2 or outputs.shape[: len(index)] != stack):
            wanted = ", ".join(map(str, stack))
            raise ValueError(
                f"{name}: activations[{path!r}] is {describe(outputs)}, but params[{path!r}] is a stack of "
                f"shape {stack}: pass the activations of each layer, an array of shape ({wanted}, ..., "
                f"{channels})."
            )
        outputs = outputs[index] if index else outputs
        if outputs.ndim < 2 or outputs.shape[-1] != channels or not outputs.size:
            raise ValueError(
                f"{name}: activations[{path!r}] is {describe(outputs)}, but params[{path!r}] has {channels} "
                f"channels along axis {axis}: pass an array of shape (..., {channels})."
            )
        return jnp.mean(of(outputs), axis=tuple(range(outputs.ndim - 1)))

    return _of_named(activations, channel_scores, name, params, axis, stacked)


def _of_named(
    named: Mapping[str, Any],
    channel_scores: ChannelScores,
    name: str,
    params: Params,
    axis: int,
    stacked: Stacked | None,
) -> Scores:
    """Spread the channel scores of the kernels named over their entries."""
    leaves = array_leaves(params)
    _check_paths(named, leaves, name)
    stacks = _stacks(stacked, {path: leaves[path] for path in named})
    by_layer = {}
    for path in named:
        axes = stacks.get(path, ())
        stack = tuple(leaves[path].shape[axis] for axis in axes)
        for index in layer_indices(leaves[path].shape, axes):
            layer = take_layer(leaves[path], axes, index)
            along = _channel_axis(path, layer, axis)
            scores = channel_scores(path, layer.shape[along], index, stack)
            by_layer[layer_name(path, index) if axes else path] = _spread(scores, layer, along)
    return _joined(by_layer, stacks, leaves, params)


def _stacks(stacked: Stacked | None, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {} if stacked is None else stacks_of(stacked, leaves)


def _joined(
    by_layer: dict[str, jax.Array],
    stacks: Mapping[str, tuple[int, ...]],
    leaves: Mapping[str, Any],
    params: Params,
) -> Scores:
    """Join the scores of layers to a tree like `params`, with NaN for leaves without scores."""
    return with_nan_elsewhere(join_layers(by_layer, stacks, {p: leaves[p].shape for p in stacks}), params)


def _spread(channel_scores: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
    """Broadcast one score per channel to the shape of the leaf."""
    others = tuple(a for a in range(leaf.ndim) if a != axis)
    return jnp.broadcast_to(jnp.expand_dims(channel_scores, others), leaf.shape)


def _channel_axis(path: str, leaf: jax.Array, axis: int) -> int:
    """Check the axis of channels and return it counted from 0."""
    axis = as_integer(axis, "axis", what="the axis of channels")
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"params[{path!r}] is {describe(leaf)}, which has no axis {axis} of channels. Pass another "
            "axis=..."
        )
    return axis % leaf.ndim


def _check_named(named: Any, name: str, example: str) -> None:
    if not isinstance(named, Mapping):
        raise TypeError(f"{name} needs a dict by kernel path, got {named!r}. For example {example}.")
    if not named:
        raise ValueError(f"{name} got an empty dict, so nothing would be scored. Pass for example {example}.")


def _check_paths(paths: Iterable[str], leaves: Mapping[str, Any], name: str) -> None:
    if unknown := [path for path in paths if path not in leaves]:
        raise ValueError(
            f"{name} names {', '.join(map(repr, unknown))}, which params do not have. The paths are: "
            f"{', '.join(leaves)}."
        )
