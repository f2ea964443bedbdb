"""Smaller equinox modules, for `compact_module`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.compaction import compact
from jaxprune.graph.modules.forms import (
    CompactedModule,
    Form,
    UnfitError,
    difference,
    kept_along,
    new_widths,
    no_values,
    result,
    unsmaller,
)
from jaxprune.graph.plan import Plan
from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.leaves import array_leaves, is_concrete
from jaxprune.tree.masks import like_params, unpack_masks
from jaxprune.typing import Masks

Kept = Callable[[str, int], tuple[int, np.ndarray]]
"""From the name of an array of a module and an axis, counted from the end, to its dense size and the
indices that stay."""


def compact_equinox(
    eqx: Any,
    model: Any,
    masks: Masks | Plan,
    inputs: Sequence[Any],
    fix: Callable[[Any], None] | None,
    options: dict[str, Any],
) -> CompactedModule:
    """Return the result of `compact_module` for an `equinox.Module`; `options` are those of `compact`."""
    params, static = eqx.partition(model, eqx.is_array)
    params = jax.tree.map(jnp.asarray, params)
    if not is_concrete(params, split_static(inputs)[0]) or any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)
    ):
        raise no_values("eqx.filter_eval_shape")

    def function(arrays: Any, static: Any) -> Callable[..., Any]:
        structure = jax.tree.structure(arrays)  # which holds widths as well
        return lambda params, *inputs: eqx.combine(
            jax.tree.unflatten(structure, jax.tree.leaves(params)), static
        )(*inputs)

    if not isinstance(masks, Plan):
        given = array_leaves(unpack_masks(masks, params), "masks")
        ones = {path: np.ones(leaf.shape, bool) for path, leaf in array_leaves(params).items()}
        masks = like_params(ones | given, params)
    small = compact(function(params, static), params, masks, *inputs, **options)
    # Every module in it is new, so that its fields can be set.
    module = eqx.combine(small.params, static)
    if not small.plan.keep:
        return unsmaller(model, small, module)
    changed: list[str] = []
    try:
        changed = _fix_fields(eqx, module, small.plan)
        if fix is not None:
            fix(module)
        own, rest = eqx.partition(module, eqx.is_array)
        dense, native = Form(function(params, static), params), Form(function(own, rest), own)
        alike = difference(dense, native, small, inputs, None, lambda path: True)
        wrong = alike if isinstance(alike, str) else None
        if alike is False:
            wrong = "it draws random numbers, so that it cannot be compared: try eqx.nn.inference_mode(model)"
    except UnfitError as error:
        wrong = str(error)
    return result(model, small, module, wrong, changed)


def _fix_fields(eqx: Any, module: Any, plan: Plan) -> list[str]:
    """Set the widths of equinox's own layers to those of their new arrays.

    Returns:
      A sentence for each layer that computes with a width that was changed.
    """
    depends = []
    for path, part in _modules(eqx, module, ""):

        def kept(name: str, axis: int, path: str = path) -> tuple[int, np.ndarray]:
            return kept_along(plan, f"{path}{name}".replace(".", "/"), axis)

        where = path.rstrip("/")
        for name, field, old, new in new_widths("equinox", eqx.nn, _FIELDS, part, where, kept):
            object.__setattr__(part, field, new)
            if does := _COMPUTED_WITH.get((name, field)):
                depends.append(f"{where or name}: {does.format(old=old, new=new)}")
    return depends


def _modules(eqx: Any, node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the modules in a tree, inner ones first, with the paths that their arrays' paths begin with."""
    if isinstance(node, eqx.Module):
        inside: Any = [(f.name, getattr(node, f.name, None)) for f in fields(node) if not _is_static(f)]
    elif isinstance(node, dict):
        inside = node.items()
    elif isinstance(node, (list, tuple)):
        names = getattr(node, "_fields", range(len(node)))
        inside = zip(names, node, strict=True)
    else:
        return
    for name, value in inside:
        yield from _modules(eqx, value, f"{path}{name}/")
    if isinstance(node, eqx.Module):
        yield path, node


def _is_static(field: Any) -> bool:
    return field.metadata.get("static", False)


# Fields that a layer computes with: once changed, it is another function.
_COMPUTED_WITH = {
    ("LayerNorm", "shape"): "its mean is over {new} features, not {old}",
    ("RMSNorm", "shape"): "its mean is over {new} features, not {old}",
    ("MultiheadAttention", "qk_size"): "its scores are divided by the root of {new}, not of {old}",
}


def _linear(m: Any, kept: Kept) -> dict[str, Any]:
    sizes = {"in_features": m.weight.shape[-1], "out_features": m.weight.shape[-2]}
    return {name: size for name, size in sizes.items() if getattr(m, name) != "scalar"}


def _conv(m: Any, kept: Kept) -> dict[str, Any]:
    out, into = -m.num_spatial_dims - 2, -m.num_spatial_dims - 1
    dense, rows = kept("weight", out)
    groups = len(np.unique(rows // (dense // m.groups)))
    return {
        "in_channels": m.weight.shape[into] * groups,
        "out_channels": m.weight.shape[out],
        "groups": groups,
    }


def _norm(m: Any, kept: Kept) -> dict[str, Any]:
    array = m.weight if m.weight is not None else m.bias
    return {} if array is None else {"shape": tuple(array.shape[array.ndim - len(m.shape) :])}


def _group_norm(m: Any, kept: Kept) -> dict[str, Any]:
    if m.weight is None:
        return {}
    dense, rows = kept("weight", -1)
    return {"groups": len(np.unique(rows // (dense // m.groups))), "channels": len(rows)}


def _attention(m: Any, kept: Kept) -> dict[str, Any]:
    dense, rows = kept("query_proj.weight", -2)
    heads = len(np.unique(rows // (dense // m.num_heads)))
    return {
        "num_heads": heads,
        "qk_size": m.query_proj.weight.shape[-2] // heads,
        "vo_size": m.value_proj.weight.shape[-2] // heads,
        "query_size": m.query_proj.weight.shape[-1],
        "key_size": m.key_proj.weight.shape[-1],
        "value_size": m.value_proj.weight.shape[-1],
        "output_size": m.output_proj.weight.shape[-2],
    }


def _cell(gates: int) -> Callable[[Any, Kept], dict[str, Any]]:
    def widths(m: Any, kept: Kept) -> dict[str, Any]:
        return {"input_size": m.weight_ih.shape[-1], "hidden_size": m.weight_hh.shape[-2] // gates}

    return widths


def _mlp(m: Any, kept: Kept) -> dict[str, Any]:
    """Return the sizes of an MLP; its one width stays where its layers have several now."""
    first, last = m.layers[0].weight, m.layers[-1].weight
    hidden = {layer.weight.shape[-2] for layer in m.layers[:-1]}
    sizes = {"in_size": first.shape[-1], "out_size": last.shape[-2]}
    sizes |= {"width_size": hidden.pop()} if len(hidden) == 1 else {}
    return {name: size for name, size in sizes.items() if getattr(m, name) != "scalar"}


_FIELDS: dict[str, Callable[[Any, Kept], dict[str, Any]]] = {
    "Linear": _linear,
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    "Embedding": lambda m, kept: {
        "num_embeddings": m.weight.shape[-2],
        "embedding_size": m.weight.shape[-1],
    },
    **dict.fromkeys(("LayerNorm", "RMSNorm"), _norm),
    "GroupNorm": _group_norm,
    "BatchNorm": lambda m, kept: {} if m.weight is None else {"input_size": m.weight.shape[-1]},
    "MultiheadAttention": _attention,
    "GRUCell": _cell(3),
    "LSTMCell": _cell(4),
    "MLP": _mlp,
}
