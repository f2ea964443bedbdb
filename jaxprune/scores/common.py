"""Helpers of the scores: precision, leaves without a score, and the loss as a function of some leaves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.tree.dtypes import is_narrow, is_numeric, promote_to_float32
from jaxprune.tree.leaves import array_leaves, describe, flatten, is_array
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.stacks import Stacked, join_layers, split_layers, stacks_of
from jaxprune.tree.where import selected
from jaxprune.typing import Params, Scores, Where

LossFn = Callable[[Params, Any], jax.Array]
"""`loss_fn(params, batch)`: the mean loss over the examples of the batch, a scalar."""


def map_leaves(score: Callable[..., jax.Array], params: Params, *others: Any) -> Scores:
    """Apply `score(leaf, ...)` to each leaf; leaves without numbers (PRNG keys of a module) score 0."""

    def scored(leaf: Any, *same: Any) -> jax.Array:
        if all(map(is_numeric, (leaf, *same))):
            return score(leaf, *same)
        return jnp.zeros(leaf.shape, jnp.float32)

    return jax.tree.map(scored, params, *others)


def map_layers(score: Callable[[jax.Array], jax.Array], params: Params, stacked: Stacked | None) -> Scores:
    """Apply `map_leaves`, to each layer of a stacked leaf by itself."""
    if stacked is None:
        return map_leaves(score, params)
    leaves = flatten(params)
    by_path = leaves.by_path
    stacks = stacks_of(stacked, {path: leaf for path, leaf in by_path.items() if is_numeric(leaf)})
    scored = map_leaves(score, split_layers(by_path, stacks))
    return leaves.tree(join_layers(scored, stacks, {path: by_path[path].shape for path in stacks}))


def in_float32(function: Callable[..., Any], *trees: Any) -> tuple[Any, ...]:
    """Promote arguments in 16-bit and 8-bit floats to float32, if the function accepts that.

    Gradients, and differences of losses, that are well apart in float32 vanish or tie in float16. But a
    function may accept only the dtypes that it was given, such as a convolution with a constant in float16.
    """
    if not any(is_array(leaf) and is_narrow(leaf.dtype) for leaf in jax.tree.leaves(trees)):
        return trees
    promoted = jax.tree.map(
        lambda leaf: promote_to_float32(leaf) if is_array(leaf) and is_narrow(leaf.dtype) else leaf, trees
    )
    try:
        jax.eval_shape(lambda: function(*promoted))
    except Exception:  # an error that is not about dtypes is raised again when the function is called
        return trees
    return promoted


def gradients(loss_fn: LossFn, params: Params, batch: Any) -> Any:
    """Compute the gradients of a loss, like params; 0 for leaves that have none (PRNG keys, counts)."""
    leaves, treedef = jax.tree.flatten(params)
    real = [number for number, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def loss(some: Sequence[jax.Array]) -> jax.Array:
        values = list(leaves)
        for number, leaf in zip(real, some, strict=True):
            values[number] = leaf
        return loss_fn(treedef.unflatten(values), batch)

    grads = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
    for number, grad in zip(real, jax.grad(loss)([leaves[n] for n in real]), strict=True):
        grads[number] = grad
    return treedef.unflatten(grads)


def with_nan_elsewhere(by_path: dict[str, jax.Array], params: Params) -> Scores:
    """Return a tree like `params` of scores given by path, with NaN for the other leaves."""
    leaves = flatten(params)
    others = [path for path in leaves.by_path if path not in by_path]
    nan = {path: jnp.full(leaves.by_path[path].shape, jnp.nan, jnp.float32) for path in others}
    return leaves.tree(by_path | nan)


class Objective(NamedTuple):
    """A loss as a function of some of the leaves, the others held fixed.

    Attributes:
      leaves: these leaves, in leaf order and of one floating-point dtype.
      loss: `loss(leaves) -> scalar`, on the batch; `loss(leaves, batch)` on another batch.
      batch: the batch, in the dtypes that `loss` takes.
      params: `params(leaves)` returns the params with these leaves, in the dtypes they had.
      scores: `scores(values)` returns scores like the params, NaN for all other leaves.
    """

    leaves: list[jax.Array]
    loss: Callable[..., jax.Array]
    batch: Any
    params: Callable[[Sequence[jax.Array]], Params]
    scores: Callable[[Sequence[jax.Array]], Scores]


def objective(name: str, loss_fn: LossFn, params: Params, batch: Any, where: Where) -> Objective:
    """Return the loss as a function of the leaves that `where` selects."""
    if batch is None:
        raise ValueError(f"{name} needs data: pass batch=..., as loss_fn(params, batch) takes it.")
    by_path = array_leaves(params)
    chosen = selected(params, where)
    for path in chosen:
        if not jnp.issubdtype(by_path[path].dtype, jnp.floating):
            raise TypeError(
                f"params[{path!r}] is {describe(by_path[path])}; {name} differentiates real leaves alone. "
                "Leave it out with where=..."
            )
    # One dtype for all leaves, so that they can be laid end to end.
    dtype = jnp.float64 if any(by_path[path].dtype == jnp.float64 for path in chosen) else jnp.float32
    promoted, batch = in_float32(loss_fn, params, batch)
    treedef, by_path_promoted = jax.tree.structure(params), array_leaves(promoted)

    def put(values: Sequence[jax.Array], like: dict[str, Any] = by_path) -> Params:
        cast = {p: v.astype(like[p].dtype) for p, v in zip(chosen, values, strict=True)}
        return jax.tree.unflatten(treedef, list((like | cast).values()))

    def loss(values: Sequence[jax.Array], batch: Any = batch) -> jax.Array:
        value = jnp.asarray(loss_fn(put(values, by_path_promoted), batch))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"{name}: loss_fn returned {describe(value)}, but it must return one real number, "
                "the mean loss over the batch. Without auxiliary outputs."
            )
        return value.astype(dtype)

    return Objective(
        leaves=[jnp.asarray(by_path[path], dtype) for path in chosen],
        loss=loss,
        batch=batch,
        params=put,
        scores=lambda values: with_nan_elsewhere(dict(zip(chosen, values, strict=True)), params),
    )


def end_to_end(leaves: Sequence[jax.Array]) -> jax.Array:
    """Lay the entries of all leaves end to end in one vector, in leaf order."""
    return jnp.concatenate([leaf.ravel() for leaf in leaves])


def cut(vector: jax.Array, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Cut a vector into arrays of the leaves' shapes, the inverse of `end_to_end`."""
    ends = [leaf.size for leaf in leaves]
    starts = [sum(ends[:index]) for index in range(len(ends))]
    return [
        vector[start : start + leaf.size].reshape(leaf.shape)
        for start, leaf in zip(starts, leaves, strict=True)
    ]


def leading_size(tree: Any, what: str, of: str) -> int:
    """Return the size of the leading axis that all leaves of some data share."""
    leaves = dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))
    sizes = {leaf.shape[0] if is_array(leaf) and leaf.shape else 0 for leaf in leaves.values()}
    if len(sizes) == 1 and (size := sizes.pop()) > 0:
        return size
    listing = ", ".join(
        f"{what}[{path!r}] is {describe(leaf) if is_array(leaf) else type(leaf).__name__}"
        for path, leaf in leaves.items()
    )
    raise ValueError(
        f"all leaves of {what} must be arrays with a leading axis of {of}, of one size: "
        f"{listing or 'it has no leaves'}."
    )
