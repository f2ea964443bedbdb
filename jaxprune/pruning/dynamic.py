"""Dynamic sparse training: masks that move while the number of entries that they keep stays the same."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.pruning.extras import check_extra, named_by
from jaxprune.pruning.once import checked_structure, pool
from jaxprune.pruning.scoring import all_finite, evaluate, of_layers
from jaxprune.pruning.table import REWIRED, with_rows
from jaxprune.scores import gradient_magnitude, magnitude, random
from jaxprune.selection.exact import Removal, select_arrays
from jaxprune.selection.sort_keys import ordered_bits
from jaxprune.structures import elements
from jaxprune.structures.base import Structure, Units, with_stacks
from jaxprune.tracing.control import update_if
from jaxprune.tree.checks import as_integer, check_key, check_number, check_state, is_number, name_of
from jaxprune.tree.leaves import array_leaves, flatten, is_array, is_concrete
from jaxprune.tree.masks import bool_masks, own_masks, packed_like, unpack_masks, unpruned_masks
from jaxprune.tree.stacks import Stacked, about_layers, check_stacked, join_layers, split_layers
from jaxprune.tree.where import check_where, kernels, selected, selected_among
from jaxprune.typing import Masks, Params, Pruner, PrunerState, ScoreFn, Scores, Where


def rigl(
    masks: Masks,
    *,
    every: int,
    end_step: int,
    fraction: float = 0.3,
    structure: Structure | None = None,
    where: Where = kernels,
    stacked: Stacked | None = None,
) -> Pruner:
    """Make a RigL pruner, which drops the smallest weights and grows where the dense gradient is largest.

    Every so many steps, in each leaf, the fraction `f(t) = fraction / 2 (1 + cos(pi t / end_step))`
    of the kept weights with the smallest `|w|` is dropped, and as many of the others with the
    largest `|g|` grow. Weights that grow start from 0 with optimizer moments of 0, those that stay are not
    touched, and no optimizer step is taken in an update that moves masks (see `wrap_optax`).

    Args:
      masks: the masks to start from, as from `prune_once` with random scores and an `erk`
        distribution. A leaf of which they prune nothing stays dense.
      every: steps between two updates of the masks (100 in the paper).
      end_step: no updates from this step on (three quarters of the training in the paper).
      fraction: the fraction of the kept weights that an update at the start drops.
      structure: the units that are dropped and grown: entries (the default), `slices`, `blocks`; with
        `nm` weights move inside their groups. The masks must consist of whole units.
      where: which leaves take part; the masks of the others stay as they are.
      stacked: which axes of which leaves count layers, as for `prune_once`: each layer then keeps its own
        number of weights.

    Returns:
      A `Pruner` for `wrap_optax`, whose `update` needs `grads`: the gradient of the masked network's loss
      with respect to all entries, pruned ones included.

    Raises:
      ValueError: an argument out of range; masks that do not consist of the structure's units, or
        that prune nothing.
      TypeError: `masks` is not a tree of bool arrays, `fraction` is not a number, `structure` is not one of
        `structures`, or `where` is not a function.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[4.0, 3.0, 0.0, 0.0]])}
      >>> grads = {"kernel": jnp.array([[0.0, 0.0, 1.0, 2.0]])}
      >>> pruner = jp.rigl({"kernel": params["kernel"] != 0}, every=1, end_step=100, fraction=0.6)
      >>> state = pruner.update(pruner.init(params), params, grads)
      >>> state.masks["kernel"].tolist()
      [[True, False, False, True]]

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.
    """
    return rewiring(
        masks,
        grow=gradient_magnitude,
        every=every,
        end_step=end_step,
        fraction=fraction,
        structure=structure,
        where=where,
        stacked=stacked,
    )


def set_(
    masks: Masks,
    *,
    every: int,
    end_step: int,
    fraction: float = 0.3,
    structure: Structure | None = None,
    where: Where = kernels,
    stacked: Stacked | None = None,
    seed: int | jax.Array = 0,
) -> Pruner:
    """Make a pruner for SET, sparse evolutionary training: it drops the smallest weights, grows at random.

    As `rigl`, but it needs no gradients. The fraction dropped falls along RigL's cosine, where the
    paper keeps it constant and drops the smallest positive and the largest negative weights.

    Args:
      masks: the masks to start from.
      every: steps between two updates of the masks (an epoch in the paper).
      end_step: no updates from this step on.
      fraction: the fraction of the kept weights that an update at the start drops.
      structure, where, stacked: as for `rigl`.
      seed: an integer or a PRNG key, where `update` is given no key. Under `vmap` pass a different key for
        each element, or all draw the same numbers.

    Returns:
      A `Pruner` for `wrap_optax`.

    Raises:
      ValueError: as `rigl`.
      TypeError: as `rigl`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[4.0, 3.0, 0.0, 0.0]])}
      >>> pruner = jp.set_({"kernel": params["kernel"] != 0}, every=1, end_step=100, fraction=0.6)
      >>> state = pruner.update(pruner.init(params), params)
      >>> int(state.masks["kernel"].sum()), bool(state.masks["kernel"][0, 0])
      (2, True)

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", Nature Communications 2018.
    """
    return rewiring(
        masks,
        grow=random,
        every=every,
        end_step=end_step,
        fraction=fraction,
        structure=structure,
        where=where,
        stacked=stacked,
        seed=seed,
    )


def rewiring(
    masks: Masks,
    *,
    grow: ScoreFn,
    drop: ScoreFn = magnitude,
    every: int,
    end_step: int,
    fraction: float = 0.3,
    structure: Structure | None = None,
    where: Where = kernels,
    stacked: Stacked | None = None,
    seed: int | jax.Array = 0,
) -> Pruner:
    """Make a pruner for dynamic sparse training with your own scores, as `rigl` and `set_` do with theirs.

    In each leaf an update drops the kept units lowest in `drop`, and then grows as many of all units that are
    not kept, those highest in `grow`. Among equal scores the lower index is dropped or grown first; in an N:M
    group the higher grows first, as N:M keeps it. A unit that is dropped may grow again in the same update,
    and then just stays. So the number of kept units never changes.

    Under `jit` nothing can be raised: an update whose scores are not all finite is left out.

    Args:
      masks: the masks to start from. A leaf of which they prune nothing stays dense.
      grow: the score by which units grow, of params masked by the masks now in force.
      drop: the score by which units are dropped.
      every: steps between two updates of the masks.
      end_step: no updates from this step on.
      fraction: the fraction of the kept units that an update at the start drops; it falls to 0 by
        `fraction / 2 (1 + cos(pi t / end_step))`.
      structure, where, stacked: as for `rigl`.
      seed: an integer or a PRNG key (which may be traced) for scores that need one, where `update`
        is given none.

    Returns:
      A `Pruner`; the `row` of its state counts the updates of the masks.

    Raises:
      ValueError: an argument out of range; masks that do not consist of the structure's units, or
        that prune nothing.
      TypeError: `masks` is not a tree of bool arrays, `fraction` is not a number, `structure` is not one of
        `structures`, or `where` is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[4.0, 3.0, 0.0, 0.0]])}
      >>> def rightmost(params, **_):
      ...     return {"kernel": jnp.arange(4.0)[None]}
      >>> start = {"kernel": params["kernel"] != 0}
      >>> pruner = jp.rewiring(start, grow=rightmost, every=1, end_step=100, fraction=0.6)
      >>> pruner.update(pruner.init(params), params).masks["kernel"].tolist()
      [[True, False, False, True]]
    """
    every = as_integer(every, "every", at_least=1, what="steps between updates")
    end_step = as_integer(end_step, "end_step", at_least=1, what="the step from which on no mask moves")
    if end_step <= every:
        raise ValueError(f"end_step must be above every={every}, or no mask ever moves; got {end_step}.")
    check_number(fraction, "fraction", "in (0, 1]")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], the part of the kept units dropped, got {fraction}.")
    if is_array(seed) and not is_number(seed):
        check_key(seed, "seed=")
    else:
        seed = as_integer(seed, "seed", what="or a PRNG key")
    structure = checked_structure(structure)
    if structure.spans_leaves:
        raise ValueError(
            f"{structure.name} has units that span several leaves; rewiring moves units inside a leaf. Pass "
            "structures.slices, blocks, nm or elements."
        )
    masks = bool_masks(masks)
    check_where(where)
    if stacked is not None:
        check_stacked(stacked)
    where = about_layers(where, stacked)
    if is_concrete(masks):
        with jax.ensure_compile_time_eval():  # a traced function may have closed over them
            _check_units(masks, where, structure, stacked)

    def init_fn(params: Params) -> PrunerState:
        selected(params, where)  # which may raise
        step, row = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return PrunerState(own_masks(masks, params), step, row, schedule=jnp.asarray(REWIRED, jnp.int32))

    def update_fn(state: PrunerState, params: Params, grads: Any = None, key: Any = None, **extra: Any):
        if params is None:
            raise ValueError("rewiring needs params: a score of them says which units are dropped.")
        check_state(state)
        check_extra((drop, grow), extra, "pruner.update", ("grads", "key"))
        leaves = flatten(params)
        chosen = selected_among(leaves.by_path, where)
        units_of = with_stacks(structure, stacked, leaves.by_path, chosen)
        both = [of_layers(score, params, units_of.stacks, stacked) for score in (drop, grow)]
        # Its rows count moves; a state of another pruner starts to count here.
        state = with_rows(state)
        moves = jnp.where(state.schedule == REWIRED, state.row, 0)
        schedule = jnp.asarray(REWIRED, jnp.int32)
        state = state._replace(step=state.step + 1, row=moves, scores=(), schedule=schedule)
        seed_key = jax.random.key(seed) if isinstance(seed, int) else seed
        rng = jax.random.fold_in(seed_key, state.step) if key is None else key

        def move(state: PrunerState) -> PrunerState:
            drop_scores, grow_scores = (
                evaluate(score, params, leaves, grads=grads, key=jax.random.fold_in(rng, number), **extra)
                for number, score in enumerate(both)
            )
            part = fraction / 2 * (1 + jnp.cos(jnp.pi / end_step * state.step.astype(jnp.float32)))
            masks = _moved(unpack_masks(state.masks), drop_scores, grow_scores, part, chosen, units_of)
            return state._replace(masks=packed_like(masks, state.masks), row=state.row + 1)

        due = (state.step % every == 0) & (state.step < end_step)
        return update_if(due, move, state)

    return Pruner(
        init_fn,
        update_fn,
        regrows=True,
        description=f"rewiring(grow={name_of(grow)}, drop={name_of(drop)}, {every=}, {end_step=})",
        takes=named_by(drop, grow),
        where=where,
    )


def _moved(
    masks: Masks, drop_scores: Scores, grow_scores: Scores, part: Any, chosen: list[str], structure: Structure
) -> Masks:
    """Return the masks after one move; unchanged if a score that counts is not finite.

    A leaf of which nothing is pruned comes out unchanged: only what is dropped there can grow.
    """
    if stacks := {path: axes for path, axes in (structure.stacks or {}).items() if path in chosen}:
        return _moved_by_layer(masks, drop_scores, grow_scores, part, chosen, structure, stacks)
    leaves = flatten(masks, "masks")
    before, ones = leaves.by_path, unpruned_masks(leaves)
    low, high = array_leaves(drop_scores, "scores"), array_leaves(grow_scores, "scores")
    droppable = pool(low, before, chosen, structure)
    if structure.max_sparsity == 1:
        growable = pool(high, ones, chosen, structure)
        survivors = _without_lowest(droppable, part)
        counts = {path: _count(droppable.alive[path]) - _count(survivors[path]) for path in survivors}
        # The highest scores are the lowest once all bits of their sort keys are flipped.
        flipped = {path: ~ordered_bits(growable.scores[path]) for path in survivors}
        grown = _lowest_of_each(flipped, {path: ~survivors[path] for path in survivors}, counts)
        after = growable.expand({path: survivors[path] | grown[path] for path in survivors})
    else:
        # In N:M, entries move inside their group, of which the n highest stay. Survivors get a score above
        # all that may grow, so they stay, and as many entries grow in a group as were dropped there.
        entries = elements()
        survivors = _without_lowest(pool(low, before, chosen, entries), part)
        grow = pool(high, ones, chosen, entries).scores
        ranked = {path: jnp.where(survivors[path], _highest(grow[path].dtype), grow[path]) for path in chosen}
        after = structure.pool(ranked, {path: ones[path] for path in chosen}).expand(droppable.alive)
    finite = all_finite(low, before, chosen) & all_finite(high, ones, chosen)
    return leaves.tree(before | {path: jnp.where(finite, after[path], before[path]) for path in chosen})


def _moved_by_layer(
    masks: Masks,
    drop_scores: Scores,
    grow_scores: Scores,
    part: Any,
    chosen: list[str],
    structure: Structure,
    stacks: Mapping[str, tuple[int, ...]],
) -> Masks:
    """Return the masks after one move of each layer of the stacked leaves."""
    leaves = array_leaves(masks, "masks")
    before, low, high = (
        split_layers({path: array_leaves(tree)[path] for path in chosen}, stacks)
        for tree in (masks, drop_scores, grow_scores)
    )
    moved = _moved(before, low, high, part, list(before), structure._replace(stacks=None))
    after = leaves | join_layers(moved, stacks, {path: leaves[path].shape for path in stacks})
    return jax.tree.unflatten(jax.tree.structure(masks), list(after.values()))


def _without_lowest(units: Units, part: Any) -> dict[str, jax.Array]:
    """Return, for each pool, the units that are left without the lowest `part` of them."""
    counts = {
        path: jnp.round(part * _count(alive).astype(jnp.float32)).astype(jnp.int32)
        for path, alive in units.alive.items()
    }
    dropped = _lowest_of_each(units.scores, units.alive, counts)
    return {path: units.alive[path] & ~mask for path, mask in dropped.items()}


def _lowest_of_each(
    scores: dict[str, jax.Array], alive: dict[str, jax.Array], counts: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return, for each pool, the lowest of its units, found in one selection."""
    removal = Removal(tuple(range(len(scores))), tuple(counts[path] for path in scores), (0,) * len(scores))
    lowest = select_arrays(list(scores.values()), [alive[path] for path in scores], removal)
    return dict(zip(scores, lowest, strict=True))


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _highest(dtype: Any) -> jax.Array:
    """Return the highest score that a dtype can hold."""
    return jnp.array(jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max, dtype)


def _check_units(masks: Masks, where: Where, structure: Structure, stacked: Stacked | None) -> None:
    """Check that a move of nothing gives the masks back, and that something could move."""
    leaves = array_leaves(masks, "masks")
    chosen = [path for path, mask in leaves.items() if where(path, mask)]
    if all(bool(jnp.all(leaves[path])) for path in chosen):
        raise ValueError(
            "masks prune nothing of what where= takes in, so nothing could move. Start from "
            "sparse masks: jaxprune.prune_once(params, jaxprune.scores.random, key=key, sparsity=...)."
        )
    structure = with_stacks(structure, stacked, leaves, chosen)
    scores = jax.tree.map(lambda mask: mask.astype(jnp.float32), masks)
    same = array_leaves(_moved(masks, scores, scores, 0.0, chosen, structure), "masks")
    for path in chosen:
        if wrong := int(jnp.sum(same[path] != leaves[path])):
            raise ValueError(
                f"masks[{path!r}] is not made of whole units of {structure.name}: {wrong} entries differ. "
                "Make the masks by jaxprune.prune_once(..., structure=...) with the same structure."
            )
