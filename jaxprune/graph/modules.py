"""Smaller flax networks of the user's own classes, where they compute what the function form does."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxprs_in_params

from jaxprune.graph.compaction import Compacted, bind, compact
from jaxprune.graph.plan import Plan
from jaxprune.graph.program import split_static
from jaxprune.masks import apply_masks, check_masks, like_params
from jaxprune.paths import array_leaves, is_concrete, leaf_paths
from jaxprune.typing import Masks, Params


class CompactedModule(NamedTuple):
    """What `compact_module` returns.

    Attributes:
      module: a smaller module of the model's class, a copy; None where there is none that computes
        the same.
      small: the function form, `small.apply(small.params, *inputs)`, which there always is.
      why: why there is no module, or why it is no smaller; None where all is well.
    """

    module: Any
    small: Compacted
    why: str | None


def compact_module(
    model: Any,
    masks: Masks | Plan,
    *inputs: Any,
    fix: Callable[[Any], None] | None = None,
    training: bool = True,
    multiple_of: int = 1,
) -> CompactedModule:
    """A smaller flax nnx module, of the same classes, that computes what the masked one does.

    `compact` finds the small variables. A copy of the model gets them, and flax's own layers in it
    the widths to match (`in_features`, `num_heads`, `feature_group_count` and so on). Python code
    may do anything with a width, so nothing is taken on trust: the copy has to compute with the
    same numbers as the masked model (a LayerNorm that now divides by 4 where it divided by 8 does
    not), and has to agree with the function form on the inputs and on random ones, with the small
    params and with others. Where it does not, `module` is None and `why` says what was found.

    Args:
      model: an `nnx.Module` with its arrays, best in evaluation mode (`model.eval()`); it stays as
        it is.
      masks: bool masks like `nnx.state(model, nnx.Param)`, or like all of `nnx.state(model)`; or a
        `Plan`, as loaded from a file, for all variables but those of random numbers.
      *inputs: example inputs of `model(*inputs)`. Bools and strings among them are static.
      fix: `fix(module)` puts right, on the small copy, what only you know of: attributes of your
        own classes that hold a width.
      training: also compares after `model.train()`, with dropout left off: outputs, and updated
        statistics.
      multiple_of: as for `compact`.

    Returns:
      A `CompactedModule`. The params of `small` are all of the model's variables but the keys and
      counts of random numbers; these pass into `module` as they are, and in `small.apply` they are
      those of `model` at every call.

    Raises:
      ImportError: flax is missing.
      TypeError: `model` is not an `nnx.Module`, or has no arrays yet; masks are traced or not bool.
      ValueError: masks that mirror neither; a plan that does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
      >>> masks = jp.ones_masks(nnx.state(model, nnx.Param))
      >>> cut = masks["layers"][0]
      >>> cut["kernel"][...] = cut["kernel"][...].at[:, 1].set(False)
      >>> cut["bias"][...] = cut["bias"][...].at[1].set(False)
      >>> small = compact_module(model, masks, jnp.ones((1, 3)))
      >>> [layer.out_features for layer in (small.module.layers[0], small.module.layers[2])]
      [3, 2]
      >>> small.module(jnp.ones((5, 3))).shape, small.why
      ((5, 2), None)
    """
    nnx = _nnx()
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"compact_module takes a flax.nnx.Module, got {type(model).__name__}. For anything else, "
            "compact(apply_fn, params, masks, *inputs) takes its function."
        )
    params = _split(nnx, model)[2]
    if not is_concrete(params, split_static(inputs)[0]):
        raise TypeError(
            "compact_module compares networks on numbers, so that the model and the inputs must have arrays "
            "with values. Build the model outside jit and nnx.eval_shape."
        )
    found, masked, full = _compact(nnx, model, params, masks, inputs, multiple_of)
    evaluate = _functions(nnx, model)[0]
    small = Compacted(evaluate, masked, full, found.plan, None, found.stayed)

    graph, random, _ = _split(nnx, model)
    module = nnx.merge(graph, _fresh(random), _fresh(small.params))
    if not small.plan.keep:
        stayed = f" ({small.stayed[0]})" if small.stayed else ""
        return CompactedModule(module, small, f"Nothing was removed: no slice could go{stayed}.")
    widths: dict[str, tuple[Any, dict[str, tuple[Any, Any]]]] = {}
    try:
        widths = _put_right(nnx, module, small.plan)
        if fix is not None:
            fix(module)
        wrong = _disagreement(nnx, model, module, small.plan, inputs)
        if wrong is None and training:
            wrong = _disagreement_training(nnx, model, module, small.plan, inputs)
    except _Unfit as error:
        wrong = str(error)
    if wrong is None:
        return CompactedModule(module, small, None)
    why = f"There is no smaller {type(model).__name__}: {wrong}.{_culprits(widths)} small.apply is right."
    return CompactedModule(None, small, why)


class _Unfit(Exception):
    """A module that no widths of its class fit."""


def _nnx() -> Any:
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError(
            "compact_module works on flax.nnx modules, but flax cannot be imported. Install flax, or use "
            "compact, which takes any function."
        ) from error
    return nnx


# --- a module as functions of its variables


def _split(nnx: Any, model: Any) -> tuple[Any, Any, Params]:
    """The graph of a module, its random state, and all its other arrays."""
    graph, random, params = nnx.split(model, nnx.RngState, ...)
    return graph, random, jax.tree.map(jnp.asarray, params)


def _fresh(tree: Any) -> Any:
    """The same arrays in other variables: merging shares the variables that it is given."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _functions(nnx: Any, model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The module's output, and its output with the new values of what is not a Param by path."""
    graph, random, params = _split(nnx, model)
    known = set(leaf_paths(params))

    def evaluate(params: Params, *inputs: Any) -> Any:
        return nnx.merge(graph, _fresh(random), params)(*inputs)

    def step(params: Params, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        merged = nnx.merge(graph, _fresh(random), _fresh(params))
        output = merged(*inputs)
        state = nnx.split(merged, nnx.RngState, nnx.Param, ...)[3]
        new = dict(zip(leaf_paths(state), jax.tree.leaves(state), strict=True))
        return output, {path: leaf for path, leaf in new.items() if path in known}

    return evaluate, step


def _second(output: Any) -> Any:
    return output[1]


def _compact(
    nnx: Any, model: Any, params: Params, masks: Masks | Plan, inputs: Sequence[Any], multiple_of: int
) -> tuple[Compacted, Params, Masks]:
    """The function form with its updated state, the masked params, and masks of all params."""
    step = _functions(nnx, model)[1]
    arrays, rebuild = split_static(inputs)
    traced = jax.make_jaxpr(lambda params, arrays: step(params, *rebuild(arrays)))(params, arrays).jaxpr
    read = {v for eqn in traced.eqns for v in eqn.invars if not isinstance(v, Literal)}
    paths = leaf_paths(params)
    unread = {path for path, v in zip(paths, traced.invars, strict=False) if v not in read}

    def function(params: Params, *inputs: Any) -> Any:
        # What no op reads (a head that only training uses) would lose all it can; as outputs it stays.
        output, state = step(params, *inputs)
        whole = [leaf for path, leaf in array_leaves(params).items() if path in unread]
        return (output, whole), {path: leaf for path, leaf in state.items() if path not in unread}

    if isinstance(masks, Plan):
        full = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        masked = masks.expand(masks.shrink(params)) if masks.keep else params
    else:
        full = _full_masks(nnx, model, params, masks)
        masked = apply_masks(params, full)
    given = masks if isinstance(masks, Plan) else full
    found = compact(function, masked, given, *inputs, state=_second, multiple_of=multiple_of)
    return found, masked, full


def _full_masks(nnx: Any, model: Any, params: Params, masks: Masks) -> Masks:
    """Masks of all params, from masks of the Params, or of all variables."""
    given = array_leaves(masks, "masks")
    trainable = nnx.state(model, nnx.Param)
    if given.keys() <= set(leaf_paths(trainable)):
        check_masks(masks, trainable)
        ones = {path: jnp.ones(leaf.shape, bool) for path, leaf in array_leaves(params).items()}
        return like_params({**ones, **given}, params)
    for path in leaf_paths(nnx.state(model, nnx.RngState)):
        mask = given.pop(path, None)
        if mask is not None and not np.asarray(mask).all():
            raise ValueError(f"masks[{path!r}] prunes the state of random numbers; it must be all True.")
    return like_params(given, params)


# --- widths of flax's own modules, read off their new arrays

Cut = Callable[[Any, int], tuple[int, np.ndarray]]
"""For a variable and an axis, counted from the end: the dense size, and the indices that stay."""


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
    return tuple(variable.shape[variable.ndim - len(shape) :])


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
    return {"num_features": held[0].shape[-1]} if held and isinstance(m.num_features, int) else {}


def _group_norm(m: Any, cut: Cut) -> dict[str, Any]:
    variable = m.scale if m.scale is not None else m.bias
    if variable is None:
        return {}
    _, kept = cut(variable, -1)
    sizes = np.bincount(kept // m.group_size)
    sizes = sizes[sizes > 0]
    if len(set(sizes.tolist())) > 1:
        raise _Unfit(
            f"its GroupNorm of {m.num_groups} groups of {m.group_size} keeps groups of {sizes.tolist()} "
            "features, and flax's has groups of one size"
        )
    widths = {"num_groups": len(sizes), "group_size": int(sizes[0])}
    return {**widths, "num_features": len(kept)} if hasattr(m, "num_features") else widths


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
# Where a width takes part in the sum: attributes that, once changed, make another function.
_NORMALISES = {
    "LayerNorm": ("num_features", "its mean is over"),
    "RMSNorm": ("num_features", "its mean is over"),
    "GroupNorm": ("group_size", "its mean is over"),
    "MultiHeadAttention": ("head_dim", "its scores are divided by the root of"),
}

Widths = dict[str, tuple[Any, dict[str, tuple[Any, Any]]]]


def _put_right(nnx: Any, module: Any, plan: Plan) -> Widths:
    """Sets the widths of flax's own modules to what their arrays say; returns old and new ones."""
    paths = {
        id(node): "/".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }

    def cut(variable: Any, axis: int) -> tuple[int, np.ndarray]:
        path = paths[id(variable)]
        dense = plan.shapes[path]
        kept = plan.keep.get(path, {}).get(len(dense) + axis)
        return dense[axis], np.arange(dense[axis]) if kept is None else kept

    changes: Widths = {}
    for path, part in nnx.iter_modules(module):
        changed: dict[str, tuple[Any, Any]] = {}
        for name, widths in _WIDTHS.items():
            if not isinstance(part, getattr(nnx, name, ())):
                continue
            for attribute, new in widths(part, cut).items():
                old = getattr(part, attribute, None)
                if old is not None and old != new:
                    setattr(part, attribute, new)
                    changed[attribute] = (old, new)
        if changed:
            changes["/".join(map(str, path))] = (part, changed)
    return changes


def _culprits(widths: Widths) -> str:
    """A sentence on the modules whose widths are part of what they compute."""
    found = []
    for path, (part, changed) in widths.items():
        for kind in (cls.__name__ for cls in type(part).__mro__):
            attribute, does = _NORMALISES.get(kind, (None, ""))
            if attribute in changed:
                old, new = changed[attribute]
                found.append(f"{path} ({type(part).__name__}: {does} {new}, not {old})")
    return f" Its widths are part of what it computes: {', '.join(found)}." if found else ""


# --- the comparison


def _disagreement_training(
    nnx: Any, model: Any, module: Any, plan: Plan, inputs: Sequence[Any]
) -> str | None:
    """As `_disagreement`, after `train()`, where the model is another one then and runs."""
    copies = [nnx.clone(model), nnx.clone(module)]
    for copy in copies:
        copy.train()
        copy.set_attributes(deterministic=True, raise_if_not_found=False)
    if nnx.split(copies[0])[0] == nnx.split(model)[0]:
        return None
    try:
        jax.eval_shape(lambda params, arrays: _functions(nnx, copies[0])[1](params, *arrays), *_args(nnx, copies[0], inputs))
    except Exception:
        return None  # it does not train on such inputs
    wrong = _disagreement(nnx, *copies, plan, inputs)
    return wrong and f"in training mode, {wrong}"


def _args(nnx: Any, model: Any, inputs: Sequence[Any]) -> tuple[Any, Any]:
    return _split(nnx, model)[2], inputs


def _disagreement(nnx: Any, model: Any, module: Any, plan: Plan, inputs: Sequence[Any]) -> str | None:
    """What shows that a small module computes something else than the model under a plan."""
    raise NotImplementedError
