"""Matrix products and convolutions: a slice of the summed axis can be dropped where either side is zero."""

from typing import Any

import numpy as np
from jax import lax

from jaxprune.graph.engine.axes import AxisGraph, Vector
from jaxprune.graph.engine.facts import Facts, either
from jaxprune.graph.engine.ir import Op, other_axes
from jaxprune.graph.engine.rules.base import Frame, Rule, emit_unchanged, register_rule, tie_or_pin


def _link_dot(op: Op, graph: AxisGraph) -> None:
    (left, right), (output,) = op.inputs, op.outputs
    (left_sum, right_sum), (left_batch, right_batch) = op.params["dimension_numbers"]
    for a, b in zip(left_sum, right_sum, strict=True):
        graph.same(left.axes[a], right.axes[b])
    for place, (a, b) in enumerate(zip(left_batch, right_batch, strict=True)):
        graph.same(left.axes[a], output.axes[place])
        graph.same(right.axes[b], output.axes[place])
    free = [left.axes[axis] for axis in other_axes(left, left_sum, left_batch)]
    free += [right.axes[axis] for axis in other_axes(right, right_sum, right_batch)]
    for a, b in zip(free, output.axes[len(left_batch) :], strict=True):
        graph.same(a, b)


def _flow_dot(op: Op, facts: Facts) -> None:
    (left, right), (output,) = op.inputs, op.outputs
    (left_sum, right_sum), (left_batch, right_batch) = op.params["dimension_numbers"]
    nothing = facts.all_zero(left) or facts.all_zero(right)
    for a, b in zip(left_sum, right_sum, strict=True):
        zero = either(facts.zero(left, a), facts.zero(right, b))
        facts.need(op, left, a, zero)
        nothing |= zero is not None and bool(zero.all())
    zeros = [
        either(facts.zero(left, a), facts.zero(right, b))
        for a, b in zip(left_batch, right_batch, strict=True)
    ]
    zeros += [facts.zero(left, a) for a in other_axes(left, left_sum, left_batch)]
    zeros += [facts.zero(right, a) for a in other_axes(right, right_sum, right_batch)]
    facts.learn(output, zeros, fill=0 if nothing else None)


register_rule("dot_general", rule=Rule(_link_dot, _flow_dot, emit_unchanged))


# For a convolution in `groups` groups, the input channels are groups x depth and the output channels are
# groups x filters; the kernel has axes depth and groups x filters.


def _is_pointwise(op: Op, spatial: int) -> bool:
    """Whether a convolution maps each position on a spatial axis to the same position of the output."""
    params = op.params
    kernel = op.inputs[1].shape[params["dimension_numbers"].rhs_spec[2 + spatial]]
    return (
        kernel == 1
        and params["window_strides"][spatial] == 1
        and tuple(params["padding"][spatial]) == (0, 0)
        and params["lhs_dilation"][spatial] == 1
    )


def _link_conv(op: Op, graph: AxisGraph) -> None:
    (image, kernel), (output,) = op.inputs, op.outputs
    image_axes, kernel_axes, out_axes = op.params["dimension_numbers"]
    groups, batch_groups = op.params["feature_group_count"], op.params["batch_group_count"]
    for spatial, (i, k, o) in enumerate(zip(image_axes[2:], kernel_axes[2:], out_axes[2:], strict=True)):
        is_free = _is_pointwise(op, spatial)
        nodes = [image.axes[i], output.axes[o], *([] if is_free else [kernel.axes[k]])]
        tie_or_pin(graph, nodes, is_free, f"{op} slides a window along it")
    batch, channels = image.axes[image_axes[0]], image.axes[image_axes[1]]
    out_batch, out_channels = output.axes[out_axes[0]], output.axes[out_axes[1]]
    filters, depth = kernel.axes[kernel_axes[0]], kernel.axes[kernel_axes[1]]
    if batch_groups > 1:
        for node in (batch, channels, out_batch, out_channels, filters, depth):
            graph.pin(node, f"{op} has batch groups")
        return
    graph.same(batch, out_batch)
    graph.same(filters, out_channels)
    if groups == 1:
        graph.same(channels, depth)
        return
    group, per_group = _group_nodes(op, graph)
    _product(graph, channels, [group, depth])
    _product(graph, filters, [group, per_group])


def _product(graph: AxisGraph, flat: int, factors: list[int]) -> None:
    """Add a product without its factors of size 1, which are pinned."""
    larger = [factor for factor in factors if graph.sizes[factor] != 1]
    if larger:
        graph.product(flat, larger)


def _group_nodes(op: Op, graph: AxisGraph) -> tuple[int, int]:
    """Make the node of a convolution's groups, which `_emit_conv` needs, and that of the filters in each."""
    groups = op.params["feature_group_count"]
    filters = op.inputs[1].shape[op.params["dimension_numbers"].rhs_spec[0]]
    op.memo["groups"] = graph.node(groups)
    return op.memo["groups"], graph.node(filters // groups)


def _flow_conv(op: Op, facts: Facts) -> None:
    (image, kernel), (output,) = op.inputs, op.outputs
    image_axes, kernel_axes, out_axes = op.params["dimension_numbers"]
    groups = op.params["feature_group_count"]
    if op.params["batch_group_count"] > 1:
        return facts.learn(output)
    of_image, of_kernel = facts.zero(image, image_axes[1]), facts.zero(kernel, kernel_axes[1])
    zeros: list[Vector | None] = [None] * len(output.shape)
    zeros[out_axes[0]] = facts.zero(image, image_axes[0])
    zeros[out_axes[1]] = facts.zero(kernel, kernel_axes[0])
    for spatial, (i, o) in enumerate(zip(image_axes[2:], out_axes[2:], strict=True)):
        if _is_pointwise(op, spatial):
            zeros[o] = facts.zero(image, i)
    nothing = facts.all_zero(image) or facts.all_zero(kernel)
    if groups == 1:
        zero = either(of_image, of_kernel)
        facts.need(op, image, image_axes[1], zero)
        nothing |= zero is not None and bool(zero.all())
    else:
        depth = kernel.shape[kernel_axes[1]]
        dead = np.zeros((groups, depth), bool)
        if of_image is not None:
            dead |= of_image.reshape(groups, depth)
        # A slice of the depth is dropped from all groups or from none. A group is dropped together with its
        # outputs, so no sum needs the groups themselves.
        everywhere = either(np.asarray(dead.all(axis=0)), of_kernel)
        if depth > 1:
            facts.need(op, kernel, kernel_axes[1], everywhere)
        if of_kernel is not None:
            dead |= of_kernel
        silent = np.repeat(np.asarray(dead.all(axis=1)), output.shape[out_axes[1]] // groups)
        zeros[out_axes[1]] = either(zeros[out_axes[1]], silent)
    facts.learn(output, zeros, fill=0 if nothing else None)
    return None


def _emit_conv(op: Op, args: list[Any], frame: Frame) -> list[Any]:
    params, names = op.params, ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    names += ("dimension_numbers", "batch_group_count", "precision", "preferred_element_type")
    groups = params["feature_group_count"]
    if groups > 1:
        groups = frame.node_size(op.memo["groups"], groups)
    kept = {name: params[name] for name in names}
    return [lax.conv_general_dilated(*args, feature_group_count=groups, **kept)]


register_rule(
    "conv_general_dilated",
    rule=Rule(
        _link_conv,
        _flow_conv,
        _emit_conv,
        conservative="axes that the window slides along are kept whole, and in batch groups channels and "
        "images too",
    ),
)
