"""The section `calibrate` of a recipe: a trained network pruned by `jaxprune.prune_layers`."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxprune.calibration import solvers
from jaxprune.calibration.layerwise import PrunedLayers, prune_layers
from jaxprune.calibration.solvers.pattern import Solver
from jaxprune.calibration.statistics import calibrate
from jaxprune.graph.grouping import channel_groups
from jaxprune.recipes.document import Node
from jaxprune.recipes.options import Call, attempt, check_patterns, named, read
from jaxprune.recipes.sections import STRUCTURES, Targets, read_targets
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.where import kernels
from jaxprune.typing import Params, Where

# What the network and its data are, and what a run of it is told, is not for a recipe to say.
_GIVEN = ("apply_fn", "params", "batches", "weights", "checkpoint", "progress")
_OPTIONS = {
    name: parameter.annotation
    for name, parameter in inspect.signature(prune_layers).parameters.items()
    if name not in (*_GIVEN, "solver", "sparsity", "structure")
}
SOLVERS = {
    name: function
    for name in solvers.__all__
    if inspect.isfunction(function := getattr(solvers, name))
    and (signature := inspect.signature(function)).return_annotation == Solver
    and "solver" not in signature.parameters
}


class Calibration(NamedTuple):
    """How a recipe prunes a trained network.

    Attributes:
      solver: the solver.
      targets: how much to prune; None where the structure says it.
      structure: the structure; None for single entries.
      options: the other arguments of `jaxprune.prune_layers` that are written.
      node: where it is written.
    """

    solver: Call
    targets: Targets | None
    structure: Call | None
    options: dict[str, Any]
    node: Node

    @property
    def where(self) -> Where:
        """Which leaves take part."""
        return self.options.get("where", kernels)

    def run(
        self, apply_fn: Callable[..., Any], params: Params, batches: Sequence[Any], given: dict[str, Any]
    ) -> PrunedLayers:
        """Prune a network; `given` are the arguments of `jaxprune.prune_layers` that no recipe holds."""
        fields = self.node.value
        options = self.options | given
        if "where" in fields:
            check_patterns(fields["where"], leaf_paths(params))
        if self.structure is not None:
            groups: dict[str, Any] = {}
            if "groups" in self.structure.needs:
                first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
                groups["groups"] = attempt(
                    self.structure.node, lambda: channel_groups(apply_fn, params, *first)
                )
            options["structure"] = self.structure.make(groups)
        if self.targets is not None:
            targets = self.targets
            where = self.where
            if targets.by_path and "where" not in fields:  # what prune_layers would take by itself
                where = attempt(self.node, lambda: calibrate(apply_fn, params, batches[:1])).where
            options["sparsity"] = attempt(targets.node, lambda: targets.of(params, where))
        solver = self.solver.make({})
        return attempt(self.node, lambda: prune_layers(apply_fn, params, batches, solver, **options))


def read_calibration(node: Node) -> Calibration:
    """Read the section, and check it as far as that is possible without params."""
    fields = node.fields(("solver", "sparsity", "structure", *_OPTIONS), ("solver",))
    solver = named(fields["solver"], SOLVERS, "solvers")
    solver.make({})
    structure = None
    if "structure" in fields:
        structure = named(fields["structure"], STRUCTURES, "structures")
        if not structure.needs:
            structure.make({})
    targets = None
    if "sparsity" in fields:
        targets = read_targets(fields["sparsity"])
        if targets.schedules:
            targets.node.fail("a trained network is pruned once: give a number, no schedule.")
    elif "structure" not in fields:
        node.fail(f"sparsity must be given; got {node.described()}.")
    options = {name: read(fields[name], hint) for name, hint in _OPTIONS.items() if name in fields}
    return Calibration(solver, targets, structure, options, node)
