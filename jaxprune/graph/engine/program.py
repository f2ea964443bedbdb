"""A traced function of params with the constraints of all its axes; the engine's entrance."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxprune.graph.engine import ir, tracing
from jaxprune.graph.engine.axes import Solution, State, Vector
from jaxprune.graph.engine.facts import Facts, equal_marks
from jaxprune.graph.engine.liveness import aligned
from jaxprune.graph.engine.readers import separate
from jaxprune.graph.engine.replay import Replay
from jaxprune.graph.engine.rules import learn_region, link_region
from jaxprune.graph.engine.rules.calls import tie
from jaxprune.graph.engine.rules.choices import pin_choices
from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.checks import check_function
from jaxprune.tree.leaves import array_leaves, describe
from jaxprune.tree.paths import leaf_paths
from jaxprune.tree.stacks import Stacks, layer_indices, layer_name
from jaxprune.typing import Params

ZeroSlices = Mapping[str, Sequence[Vector | None]]
"""For some leaves (or layers of stacked ones) by name, and each of their axes, which slices are zero."""


class TracedNetwork:
    """A traced function of params and inputs, with the constraints of all its axes.

    The inputs of the function are pinned, and so are its outputs, except those that `state` names.

    Attributes:
      leaves: the params by path, as `jax.ShapeDtypeStruct`.
      stacks: by path, the axes of params that count layers.
      graph: the axes of all values.
      region: the function.
      out_tree: the structure of its output.
      values: the param values by path; those of a stack by the names of its layers, such as "up[0]".
      paths: for each of `values`, the param's path and the index of the layer.
      stacked: all values that have layers.
      layers_of_stacks: the layers of each of these, as traced.
      families: lists of values that are the same one in different layers.
      removed: the names of params (or layers of stacks) that were removed with their block, see `shortening`.
      removed_ids: the ids of their values.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        params: Params,
        inputs: Sequence[Any],
        state: Callable[[Any], Any] | None = None,
        stacks: Stacks | None = None,
    ):
        """Traces the function and links the rules of its ops.

        `stacks` names, by path, the axes of params that count layers; None reads them off the function's
        scans.
        """
        self.leaves = array_leaves(params)
        check_function(function, "the graph of a network", "apply_fn(params, *inputs)")
        if state is not None:
            check_function(state, "state=", "from outputs to new values of params")
        arrays, rebuild = split_static(inputs)
        try:
            program = tracing.trace(
                lambda params, arrays: function(params, *rebuild(arrays)),
                params,
                arrays,
                stacks=None
                if stacks is None
                else {n: stacks.get(path, ()) for n, path in enumerate(self.leaves)},
                count=len(self.leaves),
            )
        except TypeError as error:
            if inputs:
                raise
            raise TypeError(
                f"the function fails without inputs ({error}). Pass example inputs, arrays or "
                "jax.ShapeDtypeStruct, after the params (or the masks)."
            ) from error
        self.graph, self.region, self.out_tree, found, self.stacked = program
        count = len(self.leaves)
        self.stacks: Stacks = {path: found[n] for n, path in enumerate(self.leaves) if found.get(n)}
        self.values: dict[str, ir.Value] = {}
        self.paths: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path, value in zip(self.leaves, self.region.inputs[:count], strict=True):
            self._name(path, value)
        separate(self.region, self.graph, list(self.values.values()))
        link_region(self.region, self.graph)
        pin_choices(self.region, self.graph)
        self.layers_of_stacks = [list(ir.flat_layers(value)) for value in self.stacked]
        self.families: list[Sequence[ir.Value]] = [*self.layers_of_stacks, *aligned(self.region)]
        # The last facts of all ops, and from which zeros they follow: a solver asks for them several times.
        self._learnt: tuple[ir.Region, ZeroSlices, Facts] | None = None
        self.removed: frozenset[str] = frozenset()
        self.removed_ids: set[int] = set()
        self._tie_outputs(state)
        for value, name in zip(self.region.inputs[count:], leaf_paths(arrays), strict=True):
            for node in value.axes:
                self.graph.pin(node, f"it meets an axis of the input [{name}]")

    def _name(self, path: str, value: ir.Value) -> None:
        """Enter a param's value, or its layers, under its names."""
        indices = list(layer_indices(value.shape, self.stacks.get(path, ())))
        for index, layer in zip(indices, ir.flat_layers(value), strict=True):
            name = layer_name(path, index) if value.layers else path
            self.values[name], self.paths[name] = layer, (path, index)

    def _tie_outputs(self, state: Callable[[Any], Any] | None) -> None:
        """Tie the outputs that are new values of params to these, and pin the others."""
        outputs = self.region.outputs
        tree = jax.tree.unflatten(self.out_tree, range(len(outputs)))
        new = [] if state is None else state(tree)
        tied = dict(zip(leaf_paths(new), jax.tree.leaves(new), strict=True))
        values = dict(zip(self.leaves, self.region.inputs, strict=False))
        for path, number in tied.items():
            if path not in values:
                raise ValueError(
                    f"state= gives an output at {path!r}, but params has no such leaf. It must return those "
                    f"outputs that are new values of params, at the same paths: {', '.join(values)}."
                )
            value = values[path]
            if outputs[number].shape != value.shape:
                raise ValueError(
                    f"state= gives {describe(outputs[number])} at {path!r}, but that param is "
                    f"{describe(value)}."
                )
            tie(self.graph, [outputs[number]], [value])
        names = leaf_paths(tree)
        for number, (value, name) in enumerate(zip(outputs, names, strict=True)):
            if number not in tied.values():
                for node in (node for layer in ir.flat_layers(value) for node in layer.axes):
                    self.graph.pin(node, f"it meets an axis of the output{f' [{name}]' if name else ''}")

    def pin_unread(self) -> None:
        """Pin the params that the function never reads: another function may need them."""
        read = ir.read_by(self.region)
        for value in self.values.values():
            if id(value) not in read:
                for node in value.axes:
                    self.graph.pin(node, "the function never reads it")

    def facts(self, zeros: ZeroSlices, ops: Sequence[ir.Op] | None = None) -> Facts:
        """Return what follows from slices of params being zero, for the values of some ops or of all."""
        if ops is None and self._learnt is not None:
            region, before, known = self._learnt
            if region is self.region and same_zeros(before, zeros):
                return known.copy()
        facts = Facts()
        for path, marks in zeros.items():
            facts.learn(self.values[path], marks)
        region = self.region if ops is None else self.region_of(ops)
        learn_region(region, facts)
        if ops is None:
            self._learnt = region, {path: list(marks) for path, marks in zeros.items()}, facts.copy()
        return facts

    def region_of(self, ops: Sequence[ir.Op]) -> ir.Region:
        """Return a part of the function: some of its ops, in their order."""
        return ir.Region(self.region.inputs, [], list(ops))

    def solve(
        self, facts: Facts, seeds: Sequence[tuple[int, State]] = (), never_empty: bool = True
    ) -> Solution:
        """Return the least set of slices that the function needs, given facts and seeds."""
        needed: list[tuple[int, State]] = [(node, state) for _, node, state in facts.readers()]
        return self.graph.solve([*needed, *seeds], never_empty)

    def dropped(self, kept: Solution) -> dict[str, list[Vector | None]]:
        """Return the slices of each param that a solution drops."""

        def dropped(node: int) -> Vector | None:
            state = kept.state(node)
            return None if state is True else ~state

        return {path: [dropped(node) for node in value.axes] for path, value in self.values.items()}

    def seeds(self, dropped: ZeroSlices) -> list[tuple[int, State]]:
        """Return seeds that keep all slices of params except the dropped ones."""
        return [
            (node, True if mark is None else ~mark)
            for path, marks in dropped.items()
            for node, mark in zip(self.values[path].axes, marks, strict=True)
        ]

    def closes_over_tracers(self) -> bool:
        """Whether the function closes over traced arrays, so that the program is valid for one call only."""
        return ir.any_constant(self.region, lambda constant: isinstance(constant, Tracer))

    def values_of(self, wanted: Sequence[ir.Value], facts: Facts, leaves: Sequence[Any]) -> list[Any]:
        """Return some values of the dense function, computed from its params and inputs."""
        everything = Solution(self.graph.find, defaultdict(lambda: True))
        region = ir.Region(self.region.inputs, list(wanted), self.region.ops)
        return Replay(everything, facts, as_loops=False).run(region, leaves)

    def replay(self, kept: Solution, facts: Facts, leaves: Sequence[Any]) -> Any:
        """Return the function's output, computed from small params and inputs."""
        outputs = Replay(kept, facts, removed=self.removed_ids).run(self.region, leaves)
        return jax.tree.unflatten(self.out_tree, [jnp.asarray(o) for o in outputs])


def same_zeros(a: ZeroSlices, b: ZeroSlices) -> bool:
    """Return whether the same slices of the same params are zero."""
    return a.keys() == b.keys() and all(equal_marks(a[path], b[path]) for path in a)
