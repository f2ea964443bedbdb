"""A mask from a score: the weights that stay are left as they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.calibration.solvers.pattern import Pattern, Solver, check_problem, pattern_mask
from jaxprune.pruning.extras import named_by
from jaxprune.pruning.scoring import check_score_is_no_name, evaluate
from jaxprune.tree.checks import check_function
from jaxprune.typing import ScoreFn

_PATH = "weight"


def mask_only(score: ScoreFn) -> Solver:
    """Make a solver that removes the entries of lowest score and leaves the others as they are.

    The score is called for each matrix as `score({"weight": w}, grads=None, key=None)`, with w of outputs x
    inputs. A score that names `stats`, as `scores.wanda` does, is passed the statistics of the matrix.

    Args:
      score: a function as for `prune_once`, such as `scores.magnitude` or one of your own.

    Returns:
      A solver, for all patterns. The score of a block is the sum over its entries.

    Raises:
      TypeError: `score` is not a function, or names an argument other than `stats`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> solver = jp.solvers.mask_only(jp.scores.magnitude)
      >>> weight, gram = jnp.array([[[3.0, 1.0, 2.0, 4.0]]]), jnp.eye(4)[None]
      >>> solver(weight, gram, jnp.array([2]), jp.solvers.Pattern())[0].tolist()
      [[[3.0, 0.0, 0.0, 4.0]]]
    """
    check_score_is_no_name(score)
    check_function(score, "mask_only", "score(params, *, grads, key, **extra)")
    named = named_by(score) or frozenset()

    def solve(
        weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Pattern
    ) -> tuple[jax.Array, jax.Array]:
        pattern = check_problem("mask_only", weight, gram, counts, pattern)

        def scores_of(weight: jax.Array, gram: jax.Array) -> jax.Array:
            extra = {"stats": _MatrixStatistics(gram)} if "stats" in named else {}
            return evaluate(score, {_PATH: weight}, grads=None, key=None, **extra)[_PATH]

        mask = pattern_mask(jax.vmap(scores_of)(weight, gram), counts, pattern)
        return jnp.where(mask, weight, 0), mask

    return solve


class _MatrixStatistics:
    """What a score reads of `Statistics`, for one matrix of outputs x inputs with its Gram matrix."""

    statistics = "gram"
    paths = (_PATH,)

    def __init__(self, gram: jax.Array):
        """Keep the Gram matrix of the inputs."""
        self._gram = gram
        self.stacks: dict[str, tuple[int, ...]] = {}

    def where(self, path: str, leaf: Any) -> bool:
        """Return whether a leaf has statistics."""
        del leaf
        return path == _PATH

    def contracted_axes(self, path: str) -> tuple[int, ...]:
        """Return the axes that the product sums over."""
        del path
        return (1,)

    def group_axis(self, path: str) -> int:
        """Return the axis along which N:M groups run."""
        del path
        return 1

    def per_entry(self, path: str, what: str) -> jax.Array:
        """Return a statistic of the input that each entry multiplies, (1, in)."""
        del path
        if what == "squares":
            return jnp.diagonal(self._gram)[None]
        raise ValueError(
            f"mask_only has the Gram matrix of a layer alone, from which {what!r} cannot be read. Pass such "
            "a score to prune_once(..., stats=stats) instead."
        )

    def map_matrices(
        self, path: str, leaf: jax.Array, function: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Apply a function of (batch, outputs, inputs) to the matrix."""
        del path
        return function(leaf[None])[0]
