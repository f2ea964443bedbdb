"""Scores of params: a score function is checked and called, or a tree of scores is taken as it is."""

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
from jaxprune.tree.paths import array_leaves, check_mirrors, is_array, is_concrete
from jaxprune.tree.stacks import Stacked, Stacks, stacks_of
from jaxprune.typing import Masks, Params, Pruner, ScoreFn, Scores


def evaluate(scores: ScoreFn | Scores, params: Params, **inputs: Any) -> Scores:
    """The scores as a tree like `params`: as given, or from a score function.

    Raises:
      ValueError: the tree or a shape differs from `params`.
      TypeError: a function that cannot be called as a score; inputs for one beside a tree of scores.
    """
    check_score_is_no_name(scores)
    if callable(scores) and not is_tree_of_scores(scores, params):
        _check_takes(scores, params, inputs)
        scores = _call_score(scores, params, inputs)
    elif unused := [name for name, value in inputs.items() if value is not None]:
        raise TypeError(f"scores is a tree, not a score function, so {', '.join(unused)} would not be used.")
    check_mirrors(scores, params, "scores")
    return scores


def is_tree_of_scores(scores: ScoreFn | Scores, params: Params) -> bool:
    """Whether scores are values rather than a function; a module of arrays can be called, too."""
    mirrored = jax.tree.structure(scores) == jax.tree.structure(params)
    return not callable(scores) or (mirrored and all(map(is_array, jax.tree.leaves(scores))))


def of_layers(
    scores: ScoreFn | Scores, params: Params, stacks: Stacks | None, stacked: Stacked | None
) -> ScoreFn | Scores:
    """The scores; a score function that takes `stacked` is given it.

    Args:
      scores: a function, or a tree of scores.
      params: the params.
      stacks: the stacks of the leaves that take part, or of all that the structure knows.
      stacked: what the user says of others; it need not fit leaves that take no part.
    """
    if not stacks or is_tree_of_scores(scores, params) or "stacked" not in (named_by(scores) or ()):
        return scores
    if isinstance(scores, functools.partial) and "stacked" in scores.keywords:
        return scores

    def says(path: str, leaf: Any) -> tuple[int, ...]:
        if path in stacks or stacked is None:
            return stacks.get(path, ())
        with contextlib.suppress(ValueError):
            return stacks_of(stacked, {path: leaf}).get(path, ())
        return ()

    return functools.partial(scores, stacked=says)  # pyright: ignore[reportCallIssue]


def _call_score(score: ScoreFn, params: Params, inputs: dict[str, Any]) -> Scores:
    """What a score function gives; of one that takes numbers alone, without the params that have none.

    A score of the user's that maps over all leaves, `jax.tree.map(jnp.abs, params)`, fails at a typed
    PRNG key, of which nothing is ranked. It is then called with zeros in the keys' places. A score that
    needs its keys, to run the network, does not fail at first.
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
    """Checks that a score is not given by its name.

    Raises:
      TypeError: it is a string; the message has the function of that name, if there is one.
    """
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
    scores: ScoreFn | Scores, params: Params, **inputs: Any
) -> tuple[Scores, dict[str, Recomputation]]:
    """What `evaluate` gives, and under `jit` by path the recipes of scores that are cheap to compute."""
    if is_concrete(params, inputs):
        return evaluate(scores, params, **inputs), {}
    return with_recipes(lambda: evaluate(scores, params, **inputs))


def _check_takes(score: ScoreFn, params: Params, inputs: dict[str, Any]) -> None:
    """Checks that a function can be called as a score is; a factory of scores mostly cannot."""
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
    """Whether all scores that count are finite: those of the chosen leaves that are not pruned."""
    leaves, kept = array_leaves(scores, "scores"), array_leaves(masks, "masks")

    def finite(leaf: jax.Array, kept: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.array(True)
        leaf = leaf.astype(jnp.bfloat16) if is_narrow(leaf.dtype, below=16) else leaf
        # The largest size is NaN if one is, and no copy is made to find it.
        return jnp.max(jnp.where(kept, jnp.abs(leaf), 0), initial=0) < jnp.inf

    return jnp.all(jnp.stack([finite(leaves[path], kept[path]) for path in chosen]))
