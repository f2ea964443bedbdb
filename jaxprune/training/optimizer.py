"""Pruning inside any optax optimizer."""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.tracing.guard import divides_by_zero, guarded
from jaxprune.tracing.zeros import ZeroSet
from jaxprune.tree.checks import check_function, shown
from jaxprune.tree.dtypes import common_dtype, rounds_to_zero
from jaxprune.tree.masks import (
    apply_masks,
    check_masks,
    intersect,
    own_masks,
    pack_masks,
    packed_where,
    restore_packed,
    unpack_masks,
)
from jaxprune.tree.paths import describe, is_array, is_concrete, leaf_paths, match_leaves_to_params
from jaxprune.typing import Masks, Params, Pruner, PrunerState, Where


class WrapOptaxState(NamedTuple):
    """State of `wrap_optax`.

    Attributes:
      inner: the wrapped optimizer's state.
      pruner: the pruner's state, with the masks now in force.
    """

    inner: Any
    pruner: PrunerState


class KeepMaskedState(NamedTuple):
    """State of `keep_masked`.

    Attributes:
      inner: the wrapped optimizer's state.
      masks: the masks, which never change.
    """

    inner: Any
    masks: Masks


def wrap_optax(
    optimizer: optax.GradientTransformation,
    pruner: Pruner,
    *,
    packed: bool = False,
    inner_state: Any = None,
    state_where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that also prunes: the one line that a training loop needs.

    Each update first asks the pruner for masks, from the params and the gradients as they come in.
    The wrapped optimizer sees gradients, params and moments that are 0 where these masks prune, so
    norms and clipping are those of the masked network. Its update is replaced by -p there, so
    `optax.apply_updates` gives exactly 0; and whatever in its state mirrors the params is 0 there.
    Entries that the new masks bring back (`rigl`) start from exactly 0, with the state of a new
    optimizer; in an update where a pruner that regrows changes masks, the wrapped optimizer takes
    no step, and its counters stand still.

    It must be the outermost transform: what is chained after it would change the -p, and what
    passes raw gradients on at times (`optax.conditionally_transform`) would lose it.
    `check_pruned` finds such a mistake, and params that were NaN or infinite before they were pruned:
    an update is added to them, so none makes them 0, as `apply_masks` does. Where the optimizer divides
    0 by 0 at pruned entries (Adam in float16, whose epsilon is 0 there), the quotient is taken to be 0, so
    that no NaN reaches the entries that are kept. The masks are in the
    state: `optax.tree.get(opt_state, "masks")`. Call `update` once per step; everything is traced once.

    Args:
      optimizer: any optax transform; extra arguments of `update` reach it, and those that the score names
        reach the score.
      pruner: a `Pruner`, as from `jaxprune.pruner`.
      packed: whether the state keeps its masks with one bit per entry, an eighth of the memory;
        `jaxprune.unpack_masks` gives the masks of such a state.
      inner_state: a state of `optimizer` to start from, such as the `inner` of a `KeepMaskedState`, in place
        of a new one. With `jaxprune.pruner(..., masks=masks)` training goes on from masks that exist.
      state_where: which leaves of the optimizer's state may mirror a param, a function of (path, leaf);
        by default every leaf whose path ends with a param's path and that has its shape. Leave out
        those that are shaped like a param but do not hold one number for each entry: for a square
        kernel, the preconditioners of Shampoo or SOAP (`not_(matching("*/preconditioners/*"))`), which would
        lose rows and columns. `leaf_paths(optimizer.init(params))` lists the paths.

    Returns:
      A `GradientTransformationExtraArgs` whose state is a `WrapOptaxState`. `update` raises
      ValueError if `params` is None.

    Raises:
      TypeError: the arguments are not an optimizer and a pruner, or `state_where` is not a function.
      ValueError: on `init`, an `inner_state` that the optimizer could not have made for these params.

    Warns:
      UserWarning: the pruner takes a further level, or a fraction of what is left, at every optimizer step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxprune as jp
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> pruner = jp.pruner(jp.scores.magnitude, sparsity=jp.schedules.one_shot(0.75, step=2))
      >>> tx = jp.wrap_optax(optax.sgd(0.1, momentum=0.9), pruner)
      >>> opt_state = tx.init(params)
      >>> for step in range(3):
      ...     updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> optax.tree.get(opt_state, "masks")["kernel"].tolist()
      [[False, False, False, False], [False, False, True, True]]
      >>> int((params["kernel"] != 0).sum())
      2
    """
    if not _is_optimizer(optimizer) or not isinstance(pruner, Pruner):
        swapped = isinstance(optimizer, Pruner) and _is_optimizer(pruner)
        raise TypeError(
            "wrap_optax takes an optax optimizer and a jaxprune Pruner, in this order, got "
            f"{type(optimizer).__name__} and {type(pruner).__name__}"
            + (": the two are swapped." if swapped else ".")
        )
    check_state_where(state_where)
    inner = optax.with_extra_args_support(optimizer)
    if pruner.compounds:
        warnings.warn(
            f"{pruner.description} prunes further at every optimizer step: its levels pass one a step. Pass "
            "every=, the number of steps between two of them.",
            stacklevel=2,
        )

    def init_fn(params: Params) -> WrapOptaxState:
        if _is_placeholder(params):
            step, row, number = (jnp.zeros((), jnp.int32) for _ in range(3))
            state = PrunerState(params, step, row, params if pruner.remembers else (), number)
            return WrapOptaxState(inner.init(params), state)
        state = pruner.init(_fast(params))
        state = state._replace(masks=pack_masks(state.masks)) if packed else state
        return WrapOptaxState(_started(inner, params, inner_state), state)

    def update_fn(updates: Any, state: Any, params: Params | None = None, **extra: Any):
        _check_update("wrap_optax", WrapOptaxState, updates, state, params)
        # What the score does not name is meant for the optimizer; a key is every pruner's.
        takes = None if pruner.takes is None else pruner.takes | {"key"}
        read = {name: x for name, x in extra.items() if takes is None or name in takes}
        # nnx.Optimizer takes states apart, and packed masks lose their shapes on the way.
        own = state.pruner._replace(masks=restore_packed(state.pruner.masks, _fast(params)))
        pruned = pruner.update(own, _fast(params), grads=updates, **read)
        before, after = unpack_masks(own.masks), unpack_masks(pruned.masks)
        step = _regrowing_update if pruner.regrows else _masked_update
        updates, inner_state = step(inner, updates, state.inner, params, before, after, extra, state_where)
        return updates, WrapOptaxState(inner_state, pruned)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_masked(
    optimizer: optax.GradientTransformation, masks: Masks, *, state_where: Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps pruned entries at exactly 0: fine-tuning under fixed masks.

    As in `wrap_optax`, the wrapped optimizer sees the masked network, and this must be the
    outermost transform. Params that are not masked yet become so with the first update.

    Args:
      optimizer: any optax transform.
      masks: bool masks like the params. Packed masks stay packed in the state.
      state_where: as for `wrap_optax`: which leaves of the optimizer's state may mirror a param.

    Returns:
      A `GradientTransformationExtraArgs` whose state is a `KeepMaskedState`. `init` raises if the
      masks do not mirror the params, `update` if `params` is None.

    Raises:
      TypeError: the first argument is not an optimizer, or `state_where` is not a function.

    Example:
      >>> import jax.numpy as jnp, optax, jaxprune as jp
      >>> params = {"kernel": jnp.array([[1.0, -2.0]])}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
      >>> tx = jp.keep_masked(optax.sgd(0.5), masks)
      >>> updates, opt_state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, -2.5]]
    """
    if not _is_optimizer(optimizer):
        raise TypeError(
            f"keep_masked takes an optax optimizer first, got {shown(optimizer)}: the order is "
            "keep_masked(optimizer, masks)."
        )
    if isinstance(masks, Pruner):
        raise TypeError("keep_masked takes masks, got a Pruner: pass that to wrap_optax(optimizer, pruner).")
    check_state_where(state_where)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: Params) -> KeepMaskedState:
        if _is_placeholder(params):
            return KeepMaskedState(inner.init(params), params)
        own = own_masks(masks, _fast(params))
        inner_state = inner.init(_like(params, apply_masks(_fast(params), own)))
        return KeepMaskedState(inner_state, packed_where(own, masks))

    def update_fn(updates: Any, state: Any, params: Params | None = None, **extra: Any):
        _check_update("keep_masked", KeepMaskedState, updates, state, params)
        kept = restore_packed(state.masks, _fast(params))
        now = unpack_masks(kept)
        check_masks(now, _fast(params))
        updates, inner_state = _masked_update(
            inner, updates, state.inner, params, now, now, extra, state_where
        )
        return updates, KeepMaskedState(inner_state, kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _started(inner: optax.GradientTransformation, params: Params, given: Any) -> Any:
    """The optimizer's state to begin with: a new one, or a copy of the one that is given."""
    if given is None:
        return inner.init(params)
    expected = jax.eval_shape(inner.init, params)
    got = jax.tree.structure(given)
    if got != jax.tree.structure(expected):
        raise ValueError(
            "inner_state must be a state of the wrapped optimizer, of the structure "
            f"{jax.tree.structure(expected)}, got {got}. From a state of wrap_optax or keep_masked pass its "
            "`.inner`."
        )
    pairs = zip(leaf_paths(expected), *map(jax.tree.leaves, (expected, given)), strict=True)
    for path, wanted, leaf in pairs:
        if jnp.shape(leaf) != wanted.shape:
            raise ValueError(
                f"inner_state[{path!r}] has shape {jnp.shape(leaf)}; for these params it has {wanted.shape}."
            )
    # A train step may donate its state, and leaves the caller's alone.
    return jax.tree.map(jnp.array, given)


def _is_optimizer(value: Any) -> bool:
    # Dicts have `update`, pruners have both; `optax.MultiSteps` is an optimizer by these names only.
    return hasattr(value, "init") and hasattr(value, "update") and not isinstance(value, Pruner)


def _check_update(name: str, kind: type, updates: Any, state: Any, params: Any) -> None:
    """Checks what `update` is given: a state of its own, params, and gradients like them.

    Raises:
      TypeError: another state; a gradient that is no array.
      ValueError: no params, or gradients of another structure or other shapes.
    """
    call = "call tx.update(grads, opt_state, params)"
    if params is None:
        raise ValueError(f"{name} needs the params to prune them: {call}.")
    if not isinstance(state, kind):
        raise TypeError(f"{name} needs the state of its own init, got a {type(state).__name__}: {call}.")
    # `None` stands for "no gradient".
    grads, treedef = jax.tree.flatten(updates, is_leaf=lambda leaf: leaf is None)
    try:
        twins = treedef.flatten_up_to(_fast(params))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} needs gradients with the tree structure of params: {error}.") from None
    for path, grad, param in zip(leaf_paths(treedef.unflatten(range(len(grads)))), grads, twins, strict=True):
        if grad is None:
            continue
        if not is_array(grad):
            raise TypeError(f"{name}: grads[{path!r}] is a {type(grad).__name__}, not an array: {call}.")
        # Gradients of single examples have further axes before those of the params.
        if not is_array(param) or tuple(grad.shape)[max(0, grad.ndim - param.ndim) :] != tuple(param.shape):
            own = describe(param) if is_array(param) else f"a {type(param).__name__}"
            raise ValueError(f"{name}: grads[{path!r}] is {describe(grad)}, but params has {own} there.")


def _is_placeholder(params: Any) -> bool:
    """Whether these are no params: `optax.tree.map_params` asks so where they go in the state.

    Its placeholder has no leaves. An empty tree has none either, and raises on `update`.
    """
    return not jax.tree.leaves(params)


def _fast(params: Params) -> Params:
    """The params that are trained: of `optax.lookahead`'s pair, the fast ones."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _like(params: Params, tree: Any) -> Any:
    """A tree like the fast params, in the shape of `params`: twice for a lookahead pair."""
    return optax.LookaheadParams(tree, tree) if isinstance(params, optax.LookaheadParams) else tree


def _clear(mask: jax.Array, leaf: Any) -> Any:
    """The leaf, 0 where the mask is False."""
    # `None` and float0 stand for "no gradient".
    if leaf is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _masked_update(
    inner: optax.GradientTransformationExtraArgs,
    grads: Any,
    inner_state: Any,
    params: Params,
    before: Masks,
    after: Masks,
    extra: dict[str, Any],
    state_where: Where | None = None,
    regrows: bool = False,
) -> tuple[Any, Any]:
    """One step of the wrapped optimizer on the masked network, and the projection on its masks."""

    def step_or_zero(mask, update, param):
        if update is None or not jnp.issubdtype(param.dtype, jnp.inexact):
            return update
        # Adding -p gives exactly 0 only if -p is not rounded to a narrower type than p's.
        dtype = update.dtype if update.dtype == param.dtype else common_dtype(update.dtype, param.dtype)
        return jnp.where(mask, update.astype(dtype), -param.astype(dtype))

    def is_none(leaf):
        return leaf is None

    # What the old masks prune and the new ones keep was 0 until now, and starts from there. Where
    # masks only shrink the old ones are not needed, and XLA can write the new ones over them.
    stays = intersect(before, after) if regrows else after
    kept, state, fast = jax.tree.leaves(stays), inner_state, _fast(params)

    def cleared(state: Any, which: list[int | None]) -> Any:
        leaves, treedef = jax.tree.flatten(state)
        return treedef.unflatten(
            [leaf if i is None else _clear(kept[i], leaf) for leaf, i in zip(leaves, which, strict=True)]
        )

    grads = jax.tree.map(lambda g, m: _clear(m, g), grads, stays, is_leaf=is_none)
    masked_params = apply_masks(params, _like(params, stays))
    # Moments are cleared on their way in, where that fuses with the optimizer's own reading of them
    # and they can be written in place; and on their way out only if they need not be 0 by then.
    state = cleared(state, twins(state, fast, state_where))
    updates, new_state, zero = _inner_update(inner, grads, state, masked_params, kept, extra, state_where)
    updates = jax.tree.map(
        lambda u, m, p: step_or_zero(m, u, p), updates, _like(params, stays), params, is_leaf=is_none
    )
    again = twins(new_state, fast, state_where)
    again = [None if z is None or i in z else i for i, z in zip(again, zero, strict=True)]
    return updates, cleared(_forget_searches(new_state, before, after), again)


def _inner_update(
    inner: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: Any,
    params: Params,
    masks: list[jax.Array],
    extra: dict[str, Any],
    state_where: Where | None,
) -> tuple[Any, Any, list[ZeroSet]]:
    """The wrapped optimizer's update, by which nothing that it divides by 0 where pruned reaches the rest.

    Args:
      inner: the optimizer.
      grads, state, params: 0 where pruned.
      masks: by param.
      extra: its further arguments.

    Returns:
      The updates, the new state, and for each leaf of that with which params it is 0 wherever they are
      pruned. It takes a jaxpr to know, which is made where one is made anyway; outside `jit`, where
      nothing is known, it is made only for floats in which a small epsilon is 0.
    """
    given = (grads, state, params)

    def unknown() -> tuple[Any, Any, list[ZeroSet]]:
        updates, new_state = update(*given)
        return updates, new_state, [frozenset()] * len(jax.tree.leaves(new_state))

    def update(grads: Any, state: Any, params: Any) -> Any:
        return inner.update(grads, state, params, **extra)

    if eager := is_concrete(given):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(given) if is_array(leaf)}
        if not any(map(rounds_to_zero, dtypes)):
            return unknown()
    try:
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(*given)
    except jax.errors.JAXTypeError:
        if not eager:
            raise
        return unknown()  # it looks at values
    fast = _fast(params)
    indices = [*twins(grads, fast), *twins(state, fast, state_where), *twins(params, fast)]
    inputs: list[ZeroSet] = [frozenset() if index is None else frozenset((index,)) for index in indices]
    divides, zero = divides_by_zero(closed, inputs)
    if divides:
        leaves, zero = guarded(closed, inputs, jax.tree.leaves(given), masks)
        updates, new_state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    else:
        updates, new_state = update(*given)
    return updates, new_state, zero[len(jax.tree.leaves(shapes[0])) :]


def _regrowing_update(
    inner: optax.GradientTransformationExtraArgs,
    grads: Any,
    inner_state: Any,
    params: Params,
    before: Masks,
    after: Masks,
    extra: dict[str, Any],
    state_where: Where | None = None,
) -> tuple[Any, Any]:
    """`_masked_update`, where masks changed without a step, and with a new state for what grew."""
    changed = _changed(before, after)

    def step_or_rest(updates: Any, state: Any, params: Params | None = None, **extra: Any):
        updates, stepped = inner.update(updates, state, params, **extra)
        still = jax.tree.map(partial(_clear, ~changed), updates)
        return still, jax.tree.map(
            lambda old, new: None if new is None else jnp.where(changed, old, new), state, stepped
        )

    resting = optax.GradientTransformationExtraArgs(inner.init, step_or_rest)
    updates, inner_state = _masked_update(
        resting, grads, inner_state, params, before, after, extra, state_where, regrows=True
    )

    # What grew starts as in a new optimizer, whose state is not 0 everywhere (Adagrad's, COCOB's).
    grown = [new & ~old for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True)]
    anew = inner.init(apply_masks(params, _like(params, before)))
    leaves, treedef = jax.tree.flatten(inner_state)
    fresh = jax.tree.leaves(anew)
    if len(fresh) > len(leaves):  # leaves without gradients (keys, counts) have lost their moments
        by_path = dict(zip(leaf_paths(anew), fresh, strict=True))
        fresh = [by_path[path] for path in leaf_paths(inner_state)]

    def renewed(leaf, new, index):
        if index is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(grown[index], new.astype(leaf.dtype), leaf)

    leaves = map(renewed, leaves, fresh, twins(inner_state, _fast(params), state_where))
    return updates, jax.tree.unflatten(treedef, list(leaves))


def _changed(before: Masks, after: Masks) -> jax.Array:
    """Whether any mask changed."""
    changed = jax.tree.map(lambda old, new: jnp.any(old != new), before, after)
    return jnp.any(jnp.stack(jax.tree.leaves(changed)))


def twins(state: Any, params: Params, where: Where | None = None) -> list[int | None]:
    """Which leaves of a training state mirror a param: `paths.mirrors`, and what it knows of optax.

    GaLore's projection has its param's shape where its rank is full, and yet is in another basis
    than the params: it mirrors none. Nor does any leaf that `where(path, leaf)` leaves out.

    Returns:
      For each leaf of `state`, the index of its param among `jax.tree.leaves(params)`, or None.
    """

    def is_rotated(node):
        return isinstance(node, getattr(optax.contrib, "GaLoreState", ()))  # older optax has none

    plain = jax.tree.map(
        lambda node: jax.tree.map(lambda _: 0, node) if is_rotated(node) else node, state, is_leaf=is_rotated
    )
    return match_leaves_to_params(plain, params, where)


def check_state_where(state_where: Where | None) -> None:
    """Checks the predicate of what mirrors a param.

    Raises:
      TypeError: it is not a function.
    """
    if state_where is not None:
        check_function(
            state_where,
            "state_where=",
            "of (path, leaf), such as jaxprune.not_(jaxprune.matching('*/left/*'))",
        )


def _forget_searches(state: Any, before: Masks, after: Masks) -> Any:
    """The state without what line searches store of the point they ended at, if masks changed.

    The new masks move the params away from that point, so `optax.value_and_grad_from_state` must
    not take the value and gradient stored there. It does not where the value is infinite.
    """

    def is_search(node):
        return isinstance(node, (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState))

    def forget(node):
        if not is_search(node):
            return node
        moved = _changed(before, after)
        return node._replace(value=jnp.where(moved, jnp.full_like(node.value, jnp.inf), node.value))

    return jax.tree.map(forget, state, is_leaf=is_search)
