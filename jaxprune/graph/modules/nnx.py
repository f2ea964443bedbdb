"""Smaller flax nnx modules, for `compact_module`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.compaction import Compacted, compact
from jaxprune.graph.equivalence import of_arrays
from jaxprune.graph.modules.forms import (
    CompactedModule,
    Form,
    UnfitError,
    difference,
    no_values,
    result,
    unsmaller,
)
from jaxprune.graph.modules.widths import Changes, fix_widths, width_dependent_layers
from jaxprune.graph.plan import Plan
from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.leaves import array_leaves, is_concrete
from jaxprune.tree.masks import check_masks, like_params, unpack_masks
from jaxprune.tree.paths import leaf_paths
from jaxprune.typing import Masks, Params


def compact_nnx(
    nnx: Any,
    model: Any,
    masks: Masks | Plan,
    inputs: Sequence[Any],
    fix: Callable[[Any], None] | None,
    other_modes: bool,
    options: dict[str, Any],
) -> CompactedModule:
    """Return the result of `compact_module` for an `nnx.Module`; `options` are those of `compact`."""
    if not is_concrete(nnx.state(model), split_static(inputs)[0]):
        raise no_values("nnx.eval_shape")
    small = _compact(nnx, model, masks, inputs, options)

    graph, random, _ = _split(nnx, model)
    module = nnx.merge(graph, _fresh(random), _fresh(small.params))
    if not small.plan.keep:
        return unsmaller(model, small, module)
    changes: Changes = {}
    try:
        changes = fix_widths(nnx, module, small.plan)
        if fix is not None:
            fix(module)
        wrong = _disagreement(nnx, model, module, small, inputs, other_modes)
    except UnfitError as error:
        wrong = str(error)
    return result(model, small, module, wrong, width_dependent_layers(changes))


# --- a module as functions of its variables


def _split(nnx: Any, model: Any) -> tuple[Any, Any, Params]:
    """Return the graph of a module, its random state, and all its other arrays."""
    graph, random, params = nnx.split(model, nnx.RngState, ...)
    return graph, random, jax.tree.map(jnp.asarray, params)


def _fresh(tree: Any) -> Any:
    """Return the same arrays in new variables, because merging shares the variables that it is given."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _functions(nnx: Any, model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the module's call as a function of its arrays, without and with its new state.

    The second function returns the output, and by path the new values of what is not a Param.
    """
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


def _compact(
    nnx: Any, model: Any, masks: Masks | Plan, inputs: Sequence[Any], options: dict[str, Any]
) -> Compacted:
    """Return the function form of a module, a function of all variables but the random state."""
    evaluate, step = _functions(nnx, model)
    params = _split(nnx, model)[2]
    traced = jax.make_jaxpr(of_arrays(step, inputs))(params, split_static(inputs)[0]).jaxpr
    read = {v for eqn in traced.eqns for v in eqn.invars if not hasattr(v, "val")}
    unread = {path for path, v in zip(leaf_paths(params), traced.invars, strict=False) if v not in read}

    def function(params: Params, *inputs: Any) -> Any:
        # What no op reads (a head that only training uses) would lose all it can; as an output it stays.
        output, state = step(params, *inputs)
        whole = [leaf for path, leaf in array_leaves(params).items() if path in unread]
        return (output, whole), {path: leaf for path, leaf in state.items() if path not in unread}

    if isinstance(masks, Plan):
        params, given = masks.expand(masks.shrink(params)) if masks.keep else params, masks
    else:
        given = _full_masks(nnx, model, params, masks)
    small = compact(function, params, given, *inputs, state=itemgetter(1), **options)
    # The plan was made for the state that training updates as well; the function is the module's call.
    return replace(small, function=evaluate, apply=small.bind(evaluate))


def _full_masks(nnx: Any, model: Any, params: Params, masks: Masks) -> Masks:
    """Return masks of all arrays, from masks of the Params or of all variables."""
    masks = unpack_masks(masks, params)
    given = array_leaves(masks, "masks")
    trainable = nnx.state(model, nnx.Param)
    if given.keys() <= set(leaf_paths(trainable)):
        check_masks(masks, trainable)
        ones = {path: np.ones(leaf.shape, bool) for path, leaf in array_leaves(params).items()}
        return like_params({**ones, **given}, params)
    for path in leaf_paths(nnx.state(model, nnx.RngState)):
        mask = given.pop(path, None)
        if mask is not None and not np.asarray(mask).all():
            raise ValueError(f"masks[{path!r}] prunes the state of random numbers; it must be all True.")
    return like_params(given, params)


def _modes(nnx: Any, model: Any, module: Any) -> dict[str, tuple[Any, Any]]:
    """Return the two networks as they are, and in each mode that makes the model another network."""
    modes = {"": (model, module)}
    for mode in ("training", "evaluation"):
        copies = nnx.clone(model), nnx.clone(module)
        for copy in copies:
            if mode == "training":
                copy.train()
                copy.set_attributes(deterministic=True, raise_if_not_found=False)  # noise cannot be compared
            else:
                copy.eval()
        if all(nnx.split(copies[0])[0] != nnx.split(known)[0] for known, _ in modes.values()):
            modes[f"in {mode} mode, "] = copies
    return modes


def _disagreement(
    nnx: Any, model: Any, module: Any, small: Compacted, inputs: Sequence[Any], other_modes: bool
) -> str | None:
    """Return how a small module turns out to differ from the function form; None if it agrees."""
    modes = _modes(nnx, model, module) if other_modes else {"": (model, module)}
    compared = False
    for name, (dense, native) in modes.items():
        if name and not _runs(nnx, dense, inputs):
            continue
        of_dense, of_native = (
            Form(_functions(nnx, each)[1], _split(nnx, each)[2]) for each in (dense, native)
        )
        signed = set(leaf_paths(nnx.state(native, nnx.Param)))
        alike = difference(of_dense, of_native, small, inputs, itemgetter(1), signed.__contains__)
        if isinstance(alike, str):
            return name + alike
        compared |= alike
    return None if compared else "it draws random numbers, so that it cannot be compared: try model.eval()"


def _runs(nnx: Any, model: Any, inputs: Sequence[Any]) -> bool:
    """Whether a model takes the inputs in its mode: in training mode it may need more, or keys."""
    evaluate = of_arrays(_functions(nnx, model)[0], inputs)
    try:
        jax.eval_shape(evaluate, _split(nnx, model)[2], split_static(inputs)[0])
    except Exception:
        return False
    return True
