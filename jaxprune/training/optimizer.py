"""Pruning inside any optax optimizer."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.tracing.guard import divides_by_zero, guarded
from jaxprune.tracing.zeros import ZeroSet
from jaxprune.tree.checks import check_function, shown
from jaxprune.tree.dtypes import common_dtype, rounds_to_zero
from jaxprune.tree.leaves import describe, is_array, is_concrete
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
from jaxprune.tree.mirrors import match_leaves_to_params
from jaxprune.tree.paths import leaf_paths
from jaxprune.typing import Masks, Params, Pruner, PrunerState, Where

_Update = Callable[[Any, Any, Params], tuple[Any, Any]]
"""`update(grads, state, params) -> (updates, state)`: the wrapped optimizer's, with its extra arguments."""


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
    """Wrap an optimizer so that it also prunes: the one line that a training loop needs.

    Each update first asks the pruner for masks, from the params and the gradients as they come in.
    The wrapped optimizer sees gradients, params and moments that are 0 where these masks prune, so
    norms and clipping are those of the masked network. Its update is replaced by -p there, so
    `optax.apply_updates` gives exactly 0; and whatever in its state mirrors the params is 0 there.
    Entries that the new masks bring back (`rigl`) start from exactly 0, with the state of a new
    optimizer; in an update where a pruner that regrows changes masks, the wrapped optimizer takes
    no step, and its counters stand still.

    It must be the outermost transform: one chained after it would change the -p, and one that passes raw
    gradients on at times (`optax.conditionally_transform`) would lose it. `check_pruned` finds such a
    mistake. It also finds params that were NaN or infinite before they were pruned: no update that is added
    to them makes them 0, but `apply_masks` does. Where the optimizer divides 0 by 0 at pruned entries (Adam
    in float16, whose epsilon is 0 there), the quotient is taken to be 0, so that no NaN reaches the entries
    that are kept. The masks are in the state: `optax.tree.get(opt_state, "masks")`.
    Call `update` once per step; everything is traced once.

    Args:
      optimizer: any optax transform; extra arguments of `update` reach it, and those that the score names
        reach the score.
      pruner: a `Pruner`, as from `jaxprune.pruner`.
      packed: whether the state keeps its masks with one bit per entry, an eighth of the memory;
        `jaxprune.unpack_masks` gives the masks of such a state.
      inner_state: a state of `optimizer` to start from, such as the `inner` of a `KeepMaskedState`, in place
        of a new one. With `jaxprune.pruner(..., masks=masks)`, training then continues under these masks.
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
        state = pruner.init(_fast_params(params))
        state = state._replace(masks=pack_masks(state.masks)) if packed else state
        return WrapOptaxState(_initial_state(inner, params, inner_state), state)

    def update_fn(updates: Any, state: Any, params: Params | None = None, **extra: Any):
        _check_update("wrap_optax", WrapOptaxState, updates, state, params)
        # Arguments that the score does not name are meant for the optimizer; every pruner takes a key.
        takes = None if pruner.takes is None else pruner.takes | {"key"}
        for_score = {name: x for name, x in extra.items() if takes is None or name in takes}
        # nnx.Optimizer takes states apart, and packed masks lose their shapes on the way.
        old = state.pruner._replace(masks=restore_packed(state.pruner.masks, _fast_params(params)))
        new = pruner.update(old, _fast_params(params), grads=updates, **for_score)
        before, after = unpack_masks(old.masks), unpack_masks(new.masks)
        step = partial(_regrowing_update, inner.init) if pruner.regrows else _masked_update
        inner_update = partial(inner.update, **extra)
        updates, inner_state = step(inner_update, updates, state.inner, params, before, after, state_where)
        return updates, WrapOptaxState(inner_state, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_masked(
    optimizer: optax.GradientTransformation, masks: Masks, *, state_where: Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it keeps pruned entries at exactly 0: fine-tuning under fixed masks.

    As in `wrap_optax`, the wrapped optimizer sees the masked network, and this must be the
    outermost transform. The first update masks params that are not masked yet.

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
        own = own_masks(masks, _fast_params(params))
        inner_state = inner.init(_paired_like(params, apply_masks(_fast_params(params), own)))
        return KeepMaskedState(inner_state, packed_where(own, masks))

    def update_fn(updates: Any, state: Any, params: Params | None = None, **extra: Any):
        _check_update("keep_masked", KeepMaskedState, updates, state, params)
        stored = restore_packed(state.masks, _fast_params(params))
        now = unpack_masks(stored)
        check_masks(now, _fast_params(params))
        inner_update = partial(inner.update, **extra)
        updates, inner_state = _masked_update(
            inner_update, updates, state.inner, params, now, now, state_where
        )
        return updates, KeepMaskedState(inner_state, stored)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_state_where(state_where: Where | None) -> None:
    """Check the predicate that says which leaves of a state may mirror a param."""
    if state_where is not None:
        check_function(
            state_where,
            "state_where=",
            "of (path, leaf), such as jaxprune.not_(jaxprune.matching('*/left/*'))",
        )


def _initial_state(inner: optax.GradientTransformation, params: Params, given: Any) -> Any:
    """Return the optimizer's state to begin with: a new one, or a copy of the one that is given."""
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
    """Check what `update` is given: a state of the same transform, params, and gradients like them."""
    call = "call tx.update(grads, opt_state, params)"
    if params is None:
        raise ValueError(f"{name} needs the params to prune them: {call}.")
    if not isinstance(state, kind):
        raise TypeError(f"{name} needs the state of its own init, got a {type(state).__name__}: {call}.")
    # `None` stands for "no gradient".
    grads, treedef = jax.tree.flatten(updates, is_leaf=_is_none)
    try:
        leaves = treedef.flatten_up_to(_fast_params(params))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} needs gradients with the tree structure of params: {error}.") from None
    paths = leaf_paths(treedef.unflatten(range(len(grads))))
    for path, grad, param in zip(paths, grads, leaves, strict=True):
        if grad is None:
            continue
        if not is_array(grad):
            raise TypeError(f"{name}: grads[{path!r}] is a {type(grad).__name__}, not an array: {call}.")
        # Gradients of single examples have further axes before those of the params.
        if not is_array(param) or tuple(grad.shape)[max(0, grad.ndim - param.ndim) :] != tuple(param.shape):
            got = describe(param) if is_array(param) else f"a {type(param).__name__}"
            raise ValueError(f"{name}: grads[{path!r}] is {describe(grad)}, but params has {got} there.")


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_placeholder(params: Any) -> bool:
    """Return whether `optax.tree.map_params` passed this, to find where params go in the state.

    Its placeholder has no leaves. An empty tree has none either, and raises on `update`.
    """
    return not jax.tree.leaves(params)


def _fast_params(params: Params) -> Params:
    """Return the params that are trained: the fast ones of the pair of `optax.lookahead`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _paired_like(params: Params, tree: Any) -> Any:
    """Return a tree like the fast params as a tree like `params`: twice for a pair of `optax.lookahead`."""
    return optax.LookaheadParams(tree, tree) if isinstance(params, optax.LookaheadParams) else tree


def _zero_where_pruned(mask: jax.Array, leaf: Any) -> Any:
    # `None` and float0 stand for "no gradient".
    if leaf is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _zero_moments(state: Any, owners: list[int | None], masks: list[jax.Array]) -> Any:
    """Return an optimizer's state, 0 where params are pruned.

    `owners` has for each leaf of the state the index of the param that it mirrors, None to leave it alone.
    """
    leaves, treedef = jax.tree.flatten(state)
    pairs = zip(leaves, owners, strict=True)
    return treedef.unflatten([x if i is None else _zero_where_pruned(masks[i], x) for x, i in pairs])


def _step_or_zero(mask: jax.Array, update: Any, param: jax.Array) -> Any:
    """Return the update where the mask keeps, and -p where it prunes."""
    if update is None or not jnp.issubdtype(param.dtype, jnp.inexact):
        return update
    # Adding -p gives exactly 0 only if -p is not rounded to a narrower type than p's.
    dtype = update.dtype if update.dtype == param.dtype else common_dtype(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))


def _masked_update(
    update: _Update,
    grads: Any,
    state: Any,
    params: Params,
    before: Masks,
    after: Masks,
    state_where: Where | None,
    regrows: bool = False,
) -> tuple[Any, Any]:
    """Run one step of the wrapped optimizer on the masked network, and project it on the masks."""
    # Entries that the old masks prune and the new ones keep were 0 until now, and start from 0. Masks that
    # only shrink do not need the old ones here, so XLA can write the new ones over them.
    stays = intersect(before, after) if regrows else after
    masks = jax.tree.leaves(stays)

    # The optimizer sees 0 where the masks prune. Clearing moments on their way in costs next to nothing: it
    # fuses with the optimizer's own reading of them, and they can be written in place.
    grads = jax.tree.map(lambda g, m: _zero_where_pruned(m, g), grads, stays, is_leaf=_is_none)
    masked_params = apply_masks(params, _paired_like(params, stays))
    owners = match_leaves_to_params(state, _fast_params(params), state_where)
    state = _zero_moments(state, owners, masks)
    updates, state, zeros = _guarded_update(update, grads, state, masked_params, masks, state_where)

    updates = jax.tree.map(
        lambda u, m, p: _step_or_zero(m, u, p), updates, _paired_like(params, stays), params, is_leaf=_is_none
    )
    # Clearing moments on their way out reads and writes them once more, so only those are cleared that need
    # not be 0 by now. Mostly there are none, and a train step takes 1.2 dense steps in place of 1.8 to 2.7.
    owners = match_leaves_to_params(state, _fast_params(params), state_where)
    owners = [None if zero is None or i in zero else i for i, zero in zip(owners, zeros, strict=True)]
    return updates, _zero_moments(_forget_line_searches(state, before, after), owners, masks)


def _guarded_update(
    update: _Update, grads: Any, state: Any, params: Params, masks: list[jax.Array], state_where: Where | None
) -> tuple[Any, Any, list[ZeroSet]]:
    """Run the wrapped optimizer's update so that no 0 / 0 where params are pruned reaches the rest.

    A jaxpr shows whether it divides so, and where its new state is 0. In a function that is traced the jaxpr
    is made once. Eagerly it would be made at every step, so it is made only for dtypes in which a small
    epsilon is 0; for others no zeros are known.

    Gradients, state and params are 0 where pruned. The last value returned has for each leaf of the new state
    the params with which it is known to be 0 where they are pruned.
    """
    from jax.extend.core import jaxpr_as_fun

    given = (grads, state, params)

    def nothing_known() -> tuple[Any, Any, list[ZeroSet]]:
        updates, new_state = update(*given)
        return updates, new_state, [frozenset()] * len(jax.tree.leaves(new_state))

    if eager := is_concrete(given):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(given) if is_array(leaf)}
        if not any(map(rounds_to_zero, dtypes)):
            return nothing_known()
    try:
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(*given)
    except jax.errors.JAXTypeError:
        if not eager:
            raise
        return nothing_known()  # it looks at values
    trained = _fast_params(params)
    owners = [
        *match_leaves_to_params(grads, trained),
        *match_leaves_to_params(state, trained, state_where),
        *match_leaves_to_params(params, trained),
    ]
    inputs: list[ZeroSet] = [frozenset() if index is None else frozenset((index,)) for index in owners]
    divides, zeros = divides_by_zero(closed, inputs)
    if divides:
        leaves, zeros = guarded(closed, inputs, jax.tree.leaves(given), masks)
    else:
        leaves = jaxpr_as_fun(closed)(*jax.tree.leaves(given))
    updates, new_state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return updates, new_state, zeros[len(jax.tree.leaves(shapes[0])) :]


def _regrowing_update(
    init: Callable[[Params], Any],
    update: _Update,
    grads: Any,
    state: Any,
    params: Params,
    before: Masks,
    after: Masks,
    state_where: Where | None,
) -> tuple[Any, Any]:
    """Run `_masked_update`, without a step where masks changed, and with a new state for what grew."""
    changed = _any_changed(before, after)

    def step_or_rest(grads: Any, state: Any, params: Params) -> tuple[Any, Any]:
        updates, stepped = update(grads, state, params)
        still = jax.tree.map(partial(_zero_where_pruned, ~changed), updates)
        return still, jax.tree.map(
            lambda old, new: None if new is None else jnp.where(changed, old, new), state, stepped
        )

    updates, state = _masked_update(
        step_or_rest, grads, state, params, before, after, state_where, regrows=True
    )

    # What grew starts as in a new optimizer, whose state is not 0 everywhere (Adagrad's, COCOB's).
    grown = [new & ~old for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True)]
    new_state = init(apply_masks(params, _paired_like(params, before)))
    leaves, treedef = jax.tree.flatten(state)
    new_leaves = jax.tree.leaves(new_state)
    if len(new_leaves) > len(leaves):  # leaves without gradients (keys, counts) have lost their moments
        by_path = dict(zip(leaf_paths(new_state), new_leaves, strict=True))
        new_leaves = [by_path[path] for path in leaf_paths(state)]

    def new_where_grown(leaf: Any, new: Any, owner: int | None) -> Any:
        if owner is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(grown[owner], new.astype(leaf.dtype), leaf)

    owners = match_leaves_to_params(state, _fast_params(params), state_where)
    return updates, treedef.unflatten(map(new_where_grown, leaves, new_leaves, owners))


def _any_changed(before: Masks, after: Masks) -> jax.Array:
    """Return whether any mask changed."""
    changed = jax.tree.map(lambda old, new: jnp.any(old != new), before, after)
    return jnp.any(jnp.stack(jax.tree.leaves(changed)))


def _forget_line_searches(state: Any, before: Masks, after: Masks) -> Any:
    """Return the state without what line searches store of the point they ended at, if masks changed.

    The new masks move the params away from that point, so `optax.value_and_grad_from_state` must
    not take the value and gradient stored there. It does not where the value is infinite.
    """

    def is_search(node: Any) -> bool:
        return isinstance(node, (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState))

    def forget(node: Any) -> Any:
        if not is_search(node):
            return node
        moved = _any_changed(before, after)
        return node._replace(value=jnp.where(moved, jnp.full_like(node.value, jnp.inf), node.value))

    return jax.tree.map(forget, state, is_leaf=is_search)
