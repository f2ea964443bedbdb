"""Scores of params: a score function is checked and called, a tree of scores is only checked."""

import contextlib
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import scores as score_functions
from jaxprune.pruning.extras import named_by
from jaxprune.tracing.recompute import Recomputation, with_recipes
from jaxprune.tree.checks import closest, shown
from jaxprune.tree.dtypes import is_narrow, is_numeric
from jaxprune.tree.leaves import Leaves, array_leaves, flatten, is_array, is_concrete
from jaxprune.tree.mirrors import mirrored
from jaxprune.tree.stacks import Stacked, Stacks, stacks_of
from jaxprune.typing import Masks, Params, Pruner, ScoreFn, Scores


def evaluate(
    scores: ScoreFn | Scores, params: Params, leaves: Leaves | None = None, /, **inputs: Any
) -> Scores:
    """Return the scores as a tree like `params`: a score function's, or the tree as given."""
    check_score_is_no_name(scores)
    if callable(scores) and not is_tree_of_scores(scores, params):
        _check_takes(scores, params, inputs)
        scores = _call_score(scores, params, inputs)
    elif unused := [name for name, value in inputs.items() if value is not None]:
        raise TypeError(f"scores is a tree, not a score function, so {', '.join(unused)} would not be used.")
    mirrored(scores, leaves or flatten(params), "scores")
    return scores


def is_tree_of_scores(scores: ScoreFn | Scores, params: Params) -> bool:
    """Return whether scores are values rather than a function: a module of arrays can be called, too."""
    if not callable(scores):
        return True
    if jax.tree.structure(scores) != jax.tree.structure(params):
        return False
    return all(map(is_array, jax.tree.leaves(scores)))


def of_layers(
    scores: ScoreFn | Scores, params: Params, stacks: Stacks | None, stacked: Stacked | None
) -> ScoreFn | Scores:
    """Return the scores; bind `stacked` to a score function that takes it.

    `stacks` are those of the leaves that take part, or all that the structure knows. `stacked`, the user's
    function, is asked for other leaves; it need not fit those that take no part.
    """
    if not stacks or is_tree_of_scores(scores, params) or "stacked" not in (named_by(scores) or ()):
        return scores
    if isinstance(scores, functools.partial) and "stacked" in scores.keywords:
        return scores

    def stack_axes(path: str, leaf: Any) -> tuple[int, ...]:
        if path in stacks or stacked is None:
            return stacks.get(path, ())
        with contextlib.suppress(ValueError):
            return stacks_of(stacked, {path: leaf}).get(path, ())
        return ()

    return functools.partial(scores, stacked=stack_axes)  # pyright: ignore[reportCallIssue]


def _call_score(score: ScoreFn, params: Params, inputs: dict[str, Any]) -> Scores:
    """Call a score function; if it fails, call it again with zeros in place of typed PRNG keys.

    A score that maps over all leaves, `jax.tree.map(jnp.abs, params)`, fails at a key, whose score is never
    used. A score that needs the keys, to run the network, does not fail the first time.
    """
    try:
        return score(params, **inputs)
    except (TypeError, ValueError):
        leaves, treedef = jax.tree.flatten(params)
        if all(map(is_numeric, leaves)):
            raise
        numbers = [x if is_numeric(x) else jnp.zeros(x.shape, jnp.float32) for x in leaves]
        with contextlib.suppress(TypeError, ValueError):
            return score(treedef.unflatten(numbers), **inputs)
        raise


def check_score_is_no_name(scores: Any) -> None:
    """Check that a score is not given by its name."""
    if isinstance(scores, Pruner):
        raise TypeError(
            "a pruner is no score: call pruner.update(pruner.init(params), params) for its masks."
        )
    if isinstance(scores, str):
        name = closest(scores, score_functions.__all__) or "magnitude"
        raise TypeError(
            f"scores must be a function or a tree of arrays, got the string {shown(scores)}: pass "
            f"jaxprune.scores.{name} itself."
        )


def score_and_recompute(
    scores: ScoreFn | Scores, params: Params, leaves: Leaves | None = None, /, **inputs: Any
) -> tuple[Scores, dict[str, Recomputation]]:
    """Return the scores as `evaluate` does, and under `jit` by path the recipes of those cheap to compute."""
    if is_concrete(params, inputs):
        return evaluate(scores, params, leaves, **inputs), {}
    return with_recipes(lambda: evaluate(scores, params, leaves, **inputs))


def _check_takes(score: ScoreFn, params: Params, inputs: dict[str, Any]) -> None:
    """Check that a function can be called as scores are; a factory of scores mostly cannot."""
    try:
        inspect.signature(score, follow_wrapped=False).bind(params, **inputs)
    except TypeError as error:
        name = getattr(score, "__name__", repr(score))
        raise TypeError(
            f"{name} cannot be called as a score, score(params, *, grads, key, **extra): {error}. If it "
            f"makes scores, as jaxprune.scores.fisher does, call it first: {name}(...)."
        ) from None
    except ValueError:
        return  # no signature to look at


def all_finite(scores: Scores, masks: Masks, chosen: list[str]) -> jax.Array:
    """Return whether the scores of all entries that are left, in the chosen leaves, are finite."""
    leaves, kept = array_leaves(scores, "scores"), array_leaves(masks, "masks")

    def finite(leaf: jax.Array, kept: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.array(True)
        leaf = leaf.astype(jnp.bfloat16) if is_narrow(leaf.dtype, below=16) else leaf
        # The largest magnitude is NaN if any is, and finding it makes no copy of the leaf.
        return jnp.max(jnp.where(kept, jnp.abs(leaf), 0), initial=0) < jnp.inf

    return jnp.all(jnp.stack([finite(leaves[path], kept[path]) for path in chosen]))
