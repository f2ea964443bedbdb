"""The widths of flax modules: those nnx keeps beside its arrays, those linen is constructed with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.graph.compaction import Compacted
from jaxprune.graph.plan import Plan

Cut = Callable[[Any, int], tuple[int, np.ndarray]]
"""For a variable and an axis, counted from the end: its dense size, and the indices that stay."""
Changes = dict[str, tuple[Any, dict[str, tuple[Any, Any]]]]
"""By path, a module and the attributes that were set, with their old and new values."""


class UnfitError(Exception):
    """No widths of a module's class fit its new arrays."""


def fix_widths(nnx: Any, module: Any, plan: Plan) -> Changes:
    """Sets the widths of flax's own modules to what their new arrays say.

    Args:
      nnx: flax.nnx.
      module: a module that has its small arrays already; it is changed.
      plan: the plan they were made by, for all of its variables.

    Returns:
      What changed.

    Raises:
      UnfitError: a module has no widths that fit.
    """
    paths = {
        id(node): "/".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }

    def cut(variable: Any, axis: int) -> tuple[int, np.ndarray]:
        path = paths[id(variable)]
        dense = plan.shapes[path]
        kept = plan.keep.get(path, {}).get(len(dense) + axis)
        # The layers of a stack keep equally many slices, each its own; only their number is of interest.
        kept = kept if kept is None or kept.ndim == 1 else kept.reshape(-1, kept.shape[-1])[0]
        return dense[axis], np.arange(dense[axis]) if kept is None else kept

    changes: Changes = {}
    for place, part in nnx.iter_modules(module):
        path = "/".join(map(str, place))
        changed = {}
        for name, widths in _WIDTHS.items():
            if not isinstance(part, getattr(nnx, name, ())):
                continue
            try:
                new_widths = widths(part, cut)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                kind = f"{path} ({type(part).__name__})"
                raise UnfitError(f"{kind} is not laid out like flax's {name}: {error}") from error
            for attribute, new in new_widths.items():
                old = getattr(part, attribute, None)
                if old is not None and old != new:
                    setattr(part, attribute, new)
                    changed[attribute] = (old, new)
        if changed:
            changes[path] = (part, changed)
    return changes


# Attributes that take part in what is computed: once changed, they make another function of it.
_NORMALISES = {
    "LayerNorm": ("num_features", "its mean is over {new} features, not {old}"),
    "RMSNorm": ("num_features", "its mean is over {new} features, not {old}"),
    "GroupNorm": ("group_size", "its means are over {new} features, not {old}"),
    "MultiHeadAttention": ("head_dim", "its scores are divided by the root of {new}, not of {old}"),
}


def width_dependent_layers(changes: Changes) -> list[str]:
    """The modules whose changed widths are part of what they compute."""
    found = []
    for path, (part, changed) in changes.items():
        for name in (kind.__name__ for kind in type(part).__mro__):
            attribute, does = _NORMALISES.get(name, (None, ""))
            if attribute in changed:
                old, new = changed[attribute]
                found.append(f"{path or type(part).__name__}: {does.format(old=old, new=new)}")
    return found


def _linear(m: Any, cut: Cut) -> dict[str, Any]:
    return {"in_features": m.kernel.shape[-2], "out_features": m.kernel.shape[-1]}


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
    """A variable's shape without the axes that vmap put in front."""
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


def _embed(m: Any, cut: Cut) -> dict[str, Any]:
    return {"num_embeddings": m.embedding.shape[-2], "features": m.embedding.shape[-1]}


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


def _attention(m: Any, cut: Cut) -> dict[str, Any]:
    into, heads, width = m.query.kernel.shape[-3:]
    return {
        "in_features": into,
        "num_heads": heads,
        "head_dim": width,
        "qkv_features": heads * width,
        "out_features": m.out.kernel.shape[-1],
        "num_kv_heads": m.key.kernel.shape[-2],
        "in_kv_features": m.key.kernel.shape[-3],
    }


def _cell(hidden: str, into: str) -> Callable[[Any, Cut], dict[str, Any]]:
    def widths(m: Any, cut: Cut) -> dict[str, Any]:
        return {
            "hidden_features": getattr(m, hidden).kernel.shape[-2],
            "in_features": getattr(m, into).kernel.shape[-2],
        }

    return widths


def _lora(m: Any, cut: Cut) -> dict[str, Any]:
    return {"in_features": m.lora_a.shape[-2], "out_features": m.lora_b.shape[-1]}


_WIDTHS: dict[str, Callable[[Any, Cut], dict[str, Any]]] = {
    "Linear": _linear,
    "LinearGeneral": _linear_general,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Embed": _embed,
    "BatchNorm": _norm,
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "InstanceNorm": _norm,
    "GroupNorm": _group_norm,
    "MultiHeadAttention": _attention,
    "LSTMCell": _cell("hi", "ii"),
    "OptimizedLSTMCell": _cell("dense_h", "dense_i"),
    "SimpleCell": _cell("dense_h", "dense_i"),
    "GRUCell": _cell("dense_h", "dense_i"),
    "LoRA": _lora,
}


# --- linen

# The layers of a recurrent cell, named after its gates.
_CELLS = (
    {"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"},  # LSTMCell, OptimizedLSTMCell
    {"ir", "iz", "in", "hr", "hz", "hn"},  # GRUCell
    {"if", "in", "hf", "hn"},  # MGUCell
    {"i", "h"},  # SimpleCell
)
_ATTENTION = {"query", "key", "value", "out"}


def linen_widths(small: Compacted | Plan) -> dict[str, dict[str, Any]]:
    """The constructor arguments that give a flax linen network its small shapes.

    They are read off the names and shapes of the params: `features` of what has a `kernel` that
    lost outputs, of recurrent cells, and of what has an `embedding` (`num_embeddings` too);
    `num_heads`, `qkv_features` and `out_features` of what has `query`, `key`, `value` and `out`,
    also where only their defaults, which are read off the input, would change. Heads were lost
    where `num_heads` is among them; else they got narrower.

    A network built with these takes `small.params`, but *need not compute the same*. Whatever
    computes with a width computes otherwise once it is smaller: LayerNorm, RMSNorm, a GroupNorm
    whose groups got smaller, attention whose heads got narrower. Convolutions, dense layers and
    BatchNorm do not. So compare it with `small.apply`, which is always right, on several inputs.

    Names and shapes do not tell everything. `feature_group_count` and GroupNorm's `num_groups`
    are left to you; so are modules of your own. A `DenseGeneral` without a bias is taken to have
    one axis of outputs, and a `ConvTranspose` to have `transpose_kernel=False`.

    Args:
      small: what `compact` returned for a linen network's params, alone or as `{"params": ...}`
        among its variables; or its plan.

    Returns:
      By the path of a module ("encoder/Dense_1"; "" for the network itself), the arguments that
      change, and their new values. Modules that keep all their outputs are left out.

    Raises:
      TypeError: `small` is neither.
      ValueError: attention whose query and value heads now differ in width, which linen's cannot.

    Example:
      >>> import numpy as np, jaxprune as jp
      >>> plan = jp.Plan(
      ...     shapes={"Dense_0/kernel": (3, 8), "Dense_0/bias": (8,), "Dense_1/kernel": (8, 2)},
      ...     keep={"Dense_0/kernel": {1: np.arange(5)}, "Dense_1/kernel": {0: np.arange(5)}},
      ... )
      >>> linen_widths(plan)
      {'Dense_0': {'features': 5}}
    """
    plan = small.plan if isinstance(small, Compacted) else small
    if not isinstance(plan, Plan):
        raise TypeError(f"linen_widths takes what compact returned, or its plan, got {type(small).__name__}.")
    start = "params/" if any(path.startswith("params/") for path in plan.shapes) else ""
    weights: dict[str, str] = {}  # by module
    for path in plan.shapes:
        place, _, name = path.rpartition("/")
        if path.startswith(start) and name in ("kernel", "embedding"):
            weights[place] = path
    layers: dict[str, dict[str, str]] = {}  # by the module around them
    for place, path in weights.items():
        around, _, name = place.rpartition("/")
        layers.setdefault(around, {})[name] = path

    widths: dict[str, dict[str, Any]] = {}
    for around, within in layers.items():
        if within.keys() >= _ATTENTION and all(len(plan.shapes[within[n]]) >= 3 for n in _ATTENTION):
            widths[around] = _of_attention(around, plan, within)
            within = {name: path for name, path in within.items() if name not in _ATTENTION}
        elif set(within) in _CELLS:
            widths[around] = _of_cell(plan, within)
            continue
        for path in within.values():
            widths[path.rpartition("/")[0]] = _of_layer(plan, path)
    return {place.removeprefix(start.rstrip("/")).removeprefix("/"): w for place, w in widths.items() if w}


def _lost(plan: Plan, path: str, axis: int) -> bool:
    """Whether an axis, counted from the end, lost slices."""
    return len(plan.shapes[path]) + axis in plan.keep.get(path, {})


def _of_attention(place: str, plan: Plan, layers: Mapping[str, str]) -> dict[str, int]:
    query, value, out = layers["query"], layers["value"], layers["out"]
    heads, width = plan.small_shape(query)[-2:]
    if plan.small_shape(value)[-2:] != (heads, width):
        raise ValueError(
            f"{place}: its query keeps {heads} heads of {width} features, its value "
            f"{' of '.join(map(str, plan.small_shape(value)[-2:]))}. linen's attention has one width "
            "for both; use small.apply."
        )
    found = {"num_heads": heads} if _lost(plan, query, -2) else {}
    # Unless given, both are the input's width, which may have changed.
    narrower = _lost(plan, query, -3)
    if narrower or _lost(plan, query, -2) or _lost(plan, query, -1):
        found["qkv_features"] = heads * width
    if narrower or _lost(plan, out, -1):
        found["out_features"] = plan.small_shape(out)[-1]
    return found


def _of_cell(plan: Plan, layers: Mapping[str, str]) -> dict[str, int]:
    recurrent = next(path for name, path in layers.items() if name.startswith("h"))
    return {"features": plan.small_shape(recurrent)[-1]} if _lost(plan, recurrent, -1) else {}


def _of_layer(plan: Plan, path: str) -> dict[str, Any]:
    shape = plan.small_shape(path)
    if path.endswith("embedding"):
        names = {"num_embeddings": -2, "features": -1}
        return {name: shape[axis] for name, axis in names.items() if _lost(plan, path, axis)}
    bias = plan.shapes.get(path.removesuffix("kernel") + "bias", ())
    # A DenseGeneral's bias has all axes of its outputs; one that scan stacked, another first axis.
    axes = len(bias) if bias and bias == plan.shapes[path][-len(bias) :] else 1
    if not any(_lost(plan, path, -axis) for axis in range(1, axes + 1)):
        return {}
    return {"features": shape[-1] if axes == 1 else shape[-axes:]}
