"""jaxprune: neural-network pruning in JAX, where pruned means exactly zero.

Masks are pytrees that mirror the params; pure functions make and apply them inside `jit`.
"""

from jaxprune import distributions, metrics, schedules, scores, selection, structures

# Masks: made, applied, checked
from jaxprune.masks import apply_masks, check_masks, check_pruned, intersect, ones_masks

# Pruning inside an optax optimizer
from jaxprune.optimizer import KeepMaskedState, WrapOptaxState, keep_masked, wrap_optax

# Which leaves take part
from jaxprune.paths import all_of, any_of, kernels, leaf_paths, matching, not_

# Pruning in one go, and over time
from jaxprune.prune import prune_once
from jaxprune.pruners import pruner

# To write your own: what the pieces are made of
from jaxprune.schedules import Schedule
from jaxprune.structures import Structure, Units
from jaxprune.typing import Pruner, PrunerState

__all__ = [
    "KeepMaskedState",
    "Pruner",
    "PrunerState",
    "Schedule",
    "Structure",
    "Units",
    "WrapOptaxState",
    "all_of",
    "any_of",
    "apply_masks",
    "check_masks",
    "check_pruned",
    "distributions",
    "intersect",
    "keep_masked",
    "kernels",
    "leaf_paths",
    "matching",
    "metrics",
    "not_",
    "ones_masks",
    "prune_once",
    "pruner",
    "schedules",
    "scores",
    "selection",
    "structures",
    "wrap_optax",
]


def __getattr__(name: str) -> str:
    # Looked up only when asked for: reading the package's metadata slows the import.
    if name == "__version__":
        from importlib.metadata import version

        return version("jaxprune")
    raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")
