"""Entries of a decoder's layers set to zero, single ones or all but n of each m, by name of the method."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import jaxprune as jp

REFINE = 20
"""Conjugate gradient steps of least squares."""


class Method(NamedTuple):
    """A way to prune the entries of a layer.

    Attributes:
      solver: makes the solver.
      options: of `jaxprune.prune_layers`.
    """

    solver: Callable[[], Any]
    options: dict[str, Any] = {}  # noqa: RUF012


METHODS = {
    "magnitude": Method(lambda: jp.solvers.mask_only(jp.scores.magnitude)),
    "wanda": Method(lambda: jp.solvers.mask_only(jp.scores.wanda), {"scope": "output"}),
    "sparsegpt": Method(jp.solvers.sparsegpt, {"scope": "output"}),
    "alps": Method(jp.solvers.alps, {"refine": REFINE}),
    "alps-dense": Method(jp.solvers.alps, {"refine": REFINE, "target": "dense"}),
}
"""`alps` solves each layer for its own output, `alps-dense` for what the dense network computes there."""


def prune(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Sequence[np.ndarray],
    method: str,
    sparsity: float | None,
    group: tuple[int, int] | None,
    checkpoint: str | None,
    progress: Callable[[Any], Any],
) -> Any:
    """Return what `jaxprune.prune_layers` returns, of every product with weights but the head.

    Args:
      apply_fn: from params and tokens to logits.
      params: dense.
      batches: tokens to calibrate on.
      method: a name of `METHODS`.
      sparsity: of each layer; None with a group.
      group: n and m, where n of each m entries stay; None for single entries.
      checkpoint: the folder that solved layers are saved in.
      progress: called with the row of each layer.
    """
    solver, options = METHODS[method]
    structure = None if group is None else jp.structures.nm(*group)
    return jp.prune_layers(
        apply_fn,
        params,
        batches,
        solver(),
        sparsity,
        structure=structure,
        checkpoint=checkpoint,
        progress=progress,
        **options,
    )
