"""jaxprune: neural-network pruning in JAX, where pruned means exactly zero.

Masks are pytrees that mirror the params; pure functions make and apply them inside `jit`.
"""

from jaxprune import (
    distillation,
    distributions,
    export,
    graph,
    io,
    l0,
    lora,
    metrics,
    penalties,
    plots,
    quantization,
    recipes,
    schedules,
    scores,
    selection,
    structures,
)

# Trained networks, pruned without training by what their layers read
from jaxprune.calibration import solvers
from jaxprune.calibration.layerwise import PrunedLayers, prune_layers
from jaxprune.calibration.least_squares import reconstruct
from jaxprune.calibration.recovery import Recovered, RecoveryReport, recover
from jaxprune.calibration.running_statistics import reestimate_statistics
from jaxprune.calibration.statistics import Statistics, calibrate

# Structured pruning: coupled channels, and the network without them
from jaxprune.graph.compaction import Compacted, compact
from jaxprune.graph.grouping import channel_groups
from jaxprune.graph.modules.forms import CompactedModule
from jaxprune.graph.modules.small_module import compact_module
from jaxprune.graph.plan import Plan
from jaxprune.graph.residual import residual_blocks

# Dynamic sparse training: masks that move
from jaxprune.pruning.dynamic import rewiring, rigl, set_
from jaxprune.pruning.gradual import prune_rounds, pruner

# Pruning in one go, and over time
from jaxprune.pruning.once import prune_once
from jaxprune.pruning.surgeon import optimal_brain_surgeon

# Schedules of your own
from jaxprune.schedules import Schedule

# How much each tensor, or group of channels, can spare
from jaxprune.sizing.analysis import sensitivity

# How much to prune for a budget
from jaxprune.sizing.bisection import Budget, budget
from jaxprune.sizing.result import Sensitivity

# Sparse inference: the masked network with products that skip its zeros
from jaxprune.sparse import SparseParams, Sparsified, sparsify
from jaxprune.structures.base import Structure, Units

# Iterative pruning and lottery tickets
from jaxprune.training.lottery import (
    Ticket,
    error_barrier,
    lottery_scan,
    lottery_ticket,
    rewind,
    shuffled_masks,
)

# Pruning inside an optax optimizer
from jaxprune.training.optimizer import KeepMaskedState, WrapOptaxState, keep_masked, wrap_optax

# Straight-through masks, the brain surgeon, and what the pieces are made of
from jaxprune.training.ste import straight_through

# Masks: made, applied, checked
from jaxprune.tree.masks import (
    PackedMask,
    apply_masks,
    check_masks,
    check_pruned,
    intersect,
    ones_masks,
    pack_masks,
    unpack_masks,
)

# Which leaves take part
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.where import all_of, any_of, kernels, matching, not_
from jaxprune.typing import Pruner, PrunerState

__all__ = [
    "Budget",
    "Compacted",
    "CompactedModule",
    "KeepMaskedState",
    "PackedMask",
    "Plan",
    "PrunedLayers",
    "Pruner",
    "PrunerState",
    "Recovered",
    "RecoveryReport",
    "Schedule",
    "Sensitivity",
    "SparseParams",
    "Sparsified",
    "Statistics",
    "Structure",
    "Ticket",
    "Units",
    "WrapOptaxState",
    "all_of",
    "any_of",
    "apply_masks",
    "budget",
    "calibrate",
    "channel_groups",
    "check_masks",
    "check_pruned",
    "compact",
    "compact_module",
    "distillation",
    "distributions",
    "error_barrier",
    "export",
    "graph",
    "intersect",
    "io",
    "keep_masked",
    "kernels",
    "l0",
    "leaf_paths",
    "lora",
    "lottery_scan",
    "lottery_ticket",
    "matching",
    "metrics",
    "not_",
    "ones_masks",
    "optimal_brain_surgeon",
    "pack_masks",
    "penalties",
    "plots",
    "prune_layers",
    "prune_once",
    "prune_rounds",
    "pruner",
    "quantization",
    "recipes",
    "reconstruct",
    "recover",
    "reestimate_statistics",
    "residual_blocks",
    "rewind",
    "rewiring",
    "rigl",
    "schedules",
    "scores",
    "selection",
    "sensitivity",
    "set_",
    "shuffled_masks",
    "solvers",
    "sparsify",
    "straight_through",
    "structures",
    "unpack_masks",
    "wrap_optax",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__")), "__version__"})


def __getattr__(name: str) -> str:
    # Looked up only when asked for: reading the package's metadata slows the import.
    if name == "__version__":
        from importlib.metadata import version

        return version("jaxprune")
    raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")
