"""The widths that flax's nnx layers keep beside their arrays: `in_features`, `num_heads` and so on."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from jaxprune.graph.modules.forms import kept_along, new_widths
from jaxprune.graph.plan import Plan

Cut = Callable[[Any, int], tuple[int, np.ndarray]]
"""From a variable and an axis, counted from the end, to its dense size and the indices that stay."""
Changes = dict[str, tuple[Any, dict[str, tuple[Any, Any]]]]
"""By path, a module and the attributes that were set, with their old and new values."""


def fix_widths(nnx: Any, module: Any, plan: Plan) -> Changes:
    """Set the widths of flax's own layers to those of their new arrays, and return what was changed.

    The module has its small arrays already, made by the plan, which is for all variables of the module.

    Raises:
      UnfitError: a module has no widths that fit.
    """
    paths = {
        id(node): "/".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }

    def cut(variable: Any, axis: int) -> tuple[int, np.ndarray]:
        return kept_along(plan, paths[id(variable)], axis)

    changes: Changes = {}
    for place, part in nnx.iter_modules(module):
        path = "/".join(map(str, place))
        changed = {}
        for _, attribute, old, new in new_widths("flax", nnx, _WIDTHS, part, path, cut):
            setattr(part, attribute, new)
            changed[attribute] = (old, new)
        if changed:
            changes[path] = (part, changed)
    return changes


# Attributes that the layer computes with: once changed, it is another function.
_NORMALISES = {
    "LayerNorm": ("num_features", "its mean is over {new} features, not {old}"),
    "RMSNorm": ("num_features", "its mean is over {new} features, not {old}"),
    "GroupNorm": ("group_size", "its means are over {new} features, not {old}"),
    "MultiHeadAttention": ("head_dim", "its scores are divided by the root of {new}, not of {old}"),
}


def width_dependent_layers(changes: Changes) -> list[str]:
    """Return a sentence for each module that computes with a width that was changed."""
    found = []
    for path, (part, changed) in changes.items():
        for name in (kind.__name__ for kind in type(part).__mro__):
            attribute, does = _NORMALISES.get(name, (None, ""))
            if attribute in changed:
                old, new = changed[attribute]
                found.append(f"{path or type(part).__name__}: {does.format(old=old, new=new)}")
    return found


def _sizes(**axes: tuple[str, int]) -> Callable[[Any, Cut], dict[str, Any]]:
    """Return widths that are sizes of arrays: by attribute, the array and its axis."""

    def widths(m: Any, cut: Cut) -> dict[str, Any]:
        return {name: attrgetter(array)(m).shape[axis] for name, (array, axis) in axes.items()}

    return widths


def _cell(hidden: str, into: str) -> Callable[[Any, Cut], dict[str, Any]]:
    return _sizes(hidden_features=(f"{hidden}.kernel", -2), in_features=(f"{into}.kernel", -2))


def _linear_general(m: Any, cut: Cut) -> dict[str, Any]:
    shape, out, into = tuple(m.kernel.shape), len(m.out_features), len(m.in_features)
    start = len(shape) - out - into
    batch = dict(zip(m.batch_axis, shape[start - len(m.batch_axis) : start], strict=True))
    return {
        "in_features": shape[start : start + into],
        "out_features": shape[start + into :],
        "batch_axis": type(m.batch_axis)(batch),
    }


def _einsum(m: Any, cut: Cut) -> dict[str, Any]:
    widths: dict[str, Any] = {"kernel_shape": _like(m.kernel, m.kernel_shape)}
    return widths if m.bias is None else {**widths, "bias_shape": _like(m.bias, m.bias_shape)}


def _like(variable: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """Return a variable's shape without the axes that `vmap` put in front."""
    return tuple(variable.shape[len(variable.shape) - len(shape) :])


def _conv(m: Any, cut: Cut) -> dict[str, Any]:
    dense, kept = cut(m.kernel, -1)
    groups = len(np.unique(kept // (dense // m.feature_group_count)))
    return {
        "in_features": m.kernel.shape[-2] * groups,
        "out_features": m.kernel.shape[-1],
        "feature_group_count": groups,
        "kernel_shape": _like(m.kernel, m.kernel_shape),
    }


def _conv_transpose(m: Any, cut: Cut) -> dict[str, Any]:
    into, out = (-1, -2) if m.transpose_kernel else (-2, -1)
    return {
        "in_features": m.kernel.shape[into],
        "out_features": m.kernel.shape[out],
        "kernel_shape": _like(m.kernel, m.kernel_shape),
    }


def _norm(m: Any, cut: Cut) -> dict[str, Any]:
    held = [v for v in (getattr(m, name, None) for name in ("scale", "bias", "mean")) if v is not None]
    return {"num_features": held[0].shape[-1]} if held else {}


def _group_norm(m: Any, cut: Cut) -> dict[str, Any]:
    variable = m.scale if m.scale is not None else m.bias
    if variable is None:
        return {}
    _, kept = cut(variable, -1)
    groups = len(np.unique(kept // m.group_size))
    return {"num_groups": groups, "group_size": len(kept) // groups}


_HEADS = _sizes(
    in_features=("query.kernel", -3),
    num_heads=("query.kernel", -2),
    head_dim=("query.kernel", -1),
    out_features=("out.kernel", -1),
    num_kv_heads=("key.kernel", -2),
    in_kv_features=("key.kernel", -3),
)


def _attention(m: Any, cut: Cut) -> dict[str, Any]:
    widths = _HEADS(m, cut)
    return {**widths, "qkv_features": widths["num_heads"] * widths["head_dim"]}


_WIDTHS: dict[str, Callable[[Any, Cut], dict[str, Any]]] = {
    "Linear": _sizes(in_features=("kernel", -2), out_features=("kernel", -1)),
    "LinearGeneral": _linear_general,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Embed": _sizes(num_embeddings=("embedding", -2), features=("embedding", -1)),
    **dict.fromkeys(("BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm"), _norm),
    "GroupNorm": _group_norm,
    "MultiHeadAttention": _attention,
    "LSTMCell": _cell("hi", "ii"),
    **dict.fromkeys(("OptimizedLSTMCell", "SimpleCell", "GRUCell"), _cell("dense_h", "dense_i")),
    "LoRA": _sizes(in_features=("lora_a", -2), out_features=("lora_b", -1)),
}
