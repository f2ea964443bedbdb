"""`compact_module`: a smaller flax nnx module of the same classes, if it computes what `compact` does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.compaction import Compacted, compact
from jaxprune.graph.equivalence import compare, new_numbers, of_arrays, ops_of
from jaxprune.graph.modules.widths import Changes, UnfitError, fix_widths, width_dependent_layers
from jaxprune.graph.plan import Plan
from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.leaves import array_leaves, is_concrete
from jaxprune.tree.masks import check_masks, like_params, unpack_masks
from jaxprune.tree.paths import leaf_paths
from jaxprune.typing import Masks, Params


class CompactedModule(NamedTuple):
    """What `compact_module` returns.

    Attributes:
      module: a smaller copy of the model; None if no module of its classes computes the same.
      small: the function form, `small.apply(small.params, *inputs)`, which always exists.
      why: why there is no module, or why it is no smaller; None if there is a smaller module.
    """

    module: Any
    small: Compacted
    why: str | None


def compact_module(
    model: Any,
    masks: Masks | Plan,
    *inputs: Any,
    fix: Callable[[Any], None] | None = None,
    other_modes: bool = True,
    multiple_of: int = 1,
    fold_constants: bool = False,
) -> CompactedModule:
    """Return a smaller flax nnx module, of the same classes, that computes what the masked one does.

    `compact` finds the small variables. A copy of the model gets them, and flax's own layers in it get
    the widths to match (`in_features`, `num_heads`, `feature_group_count` and so on). Python code
    may do anything with a width, so nothing is taken on trust: the copy has to compute with the
    same numbers as the masked model (a LayerNorm that now divides by 4 where it divided by 8 does
    not), and has to agree with the function form on the inputs and on random ones, with the small
    params and with others. Where it does not, `module` is None and `why` says what was found.

    Args:
      model: an `nnx.Module` with its arrays, best in evaluation mode (`model.eval()`). It is not changed.
      masks: bool masks like `nnx.state(model, nnx.Param)`, or like all of `nnx.state(model)`; or a
        `Plan`, as loaded from a file, for all variables but those of random numbers.
      *inputs: example inputs of `model(*inputs)`. Bools and strings among them are static.
      fix: `fix(module)` sets, on the small copy, attributes of your own classes that hold a width.
      other_modes: also compares after `model.train()`, with dropout left off, and `model.eval()`:
        outputs, and updated statistics.
      multiple_of: as for `compact`.
      fold_constants: as for `compact`.

    Returns:
      A `CompactedModule`. The params of `small` are all of the model's variables but the keys and
      counts of random numbers; these pass into `module` as they are, and in `small.apply` they are
      those of `model` at every call.

    Raises:
      ImportError: flax is missing.
      TypeError: `model` is not an `nnx.Module`, or has no values yet; masks are traced or not bool.
      ValueError: masks that mirror neither; a plan that does not fit; the masked network is not finite,
        as for `compact`.

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
    if not is_concrete(nnx.state(model), split_static(inputs)[0]):
        raise TypeError(
            "compact_module compares networks on numbers, so that the model and the inputs must have arrays "
            "with values. Build the model outside jit and nnx.eval_shape."
        )
    small = _compact(nnx, model, masks, inputs, multiple_of, fold_constants)

    graph, random, _ = _split(nnx, model)
    module = nnx.merge(graph, _fresh(random), _fresh(small.params))
    if not small.plan.keep:
        example = f" ({small.not_removed[0]})" if small.not_removed else ""
        return CompactedModule(module, small, f"Nothing was removed: no slice could go{example}.")
    changes: Changes = {}
    try:
        changes = fix_widths(nnx, module, small.plan)
        if fix is not None:
            fix(module)
        wrong = _disagreement(nnx, model, module, small, inputs, other_modes)
    except UnfitError as error:
        wrong = str(error)
    if wrong is None:
        return CompactedModule(module, small, None)
    why = f"There is no smaller {type(model).__name__}: {wrong}.{_blame(width_dependent_layers(changes))} "
    why += "Use small.apply."
    return CompactedModule(None, small, why)


def _blame(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f" Widths take part in what it computes: {'; '.join(reasons[:3])}{more}."


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
    nnx: Any, model: Any, masks: Masks | Plan, inputs: Sequence[Any], multiple_of: int, fold_constants: bool
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
    options = {"multiple_of": multiple_of, "fold_constants": fold_constants}
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
        alike = _compare(nnx, dense, native, small, inputs)
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


def _compare(nnx: Any, model: Any, module: Any, small: Compacted, inputs: Sequence[Any]) -> str | bool:
    """Return how a small module differs, in words; or whether its outputs could be compared."""
    arrays, _ = split_static(inputs)
    step = _functions(nnx, model)[1]
    native = of_arrays(_functions(nnx, module)[1], inputs)
    dense = ops_of(of_arrays(step, inputs), _split(nnx, model)[2], arrays)
    copy = "a copy with the small arrays"
    try:
        small.plan.check(_split(nnx, module)[2], "its variables")
        ops = ops_of(native, small.params, arrays)
    except Exception as error:
        return f"{copy} raises {type(error).__name__}: {_short(error)}"
    if numbers := new_numbers(ops, dense):
        return f"{copy} computes with numbers that the dense one does not: {', '.join(numbers[:3])}"
    if dense.draws:
        return False  # noise of another shape is other noise
    bound = of_arrays(small.bind(step, state=itemgetter(1)), inputs)
    try:
        jax.eval_shape(bound, small.params, arrays)
    except ValueError as error:
        return f"the plan does not fit: {_short(error)}"
    signed = set(leaf_paths(nnx.state(module, nnx.Param)))
    wrong = compare(bound, native, small.params, arrays, signed.__contains__, dense.eps)
    return True if wrong is None else f"{copy} {wrong}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 200 else f"{text[:200]}..."
