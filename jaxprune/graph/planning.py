"""From masks to a plan, and from a plan back to a solution of the axis graph."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.graph.engine.axes import Solution, State
from jaxprune.graph.engine.divisors import ParamAxis
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.shortening import Removed, removable, remove
from jaxprune.graph.engine.solving import solve_to_fixpoint, zero_slices
from jaxprune.graph.plan import Plan
from jaxprune.graph.reasons import NotRemoved, not_removed, why_needed
from jaxprune.tree.stacks import layer_indices, layer_name


def plan_for_masks(
    network: TracedNetwork, masks: Mapping[str, np.ndarray], blocks: Sequence[str], multiple_of: int
) -> tuple[Plan, tuple[NotRemoved, ...]]:
    """Return the plan that drops all that masks allow, and what the masks remove but the plan keeps.

    Masks of stacked params go by layer. Whole blocks that they empty are taken out of the function, in place;
    `blocks` are the paths of what could be taken out of lists and dicts.
    """
    removed = removable(network, masks, blocks)
    remove(network, removed)
    kept, divisors = solve_to_fixpoint(network, lambda dropped: zero_slices(masks, dropped))
    needless = network.dropped(kept)
    kept, divisors = _rounded(network, kept, divisors, multiple_of)
    plan = _plan_of(network, kept, divisors, removed, blocks)
    return plan, not_removed(network, zero_slices(masks), plan, needless)


def solve_for_plan(network: TracedNetwork, plan: Plan) -> tuple[Solution, Facts]:
    """Return the solution and the facts under which a function runs without what a plan drops.

    What the plan removes whole is taken out of the function, in place.

    Raises:
      ValueError: the plan is for other params, or drops what this function needs.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in network.leaves.items()}
    if shapes != dict(plan.shapes):
        path = next(path for path in {**shapes, **plan.shapes} if shapes.get(path) != plan.shapes.get(path))
        raise ValueError(
            f"the plan does not fit the params: at {path!r} the plan has {plan.shapes.get(path)}, "
            f"the params have {shapes.get(path)}."
        )
    remove(network, plan.taken_out())
    facts = network.facts(plan.zeros())
    kept = network.solve(facts, network.seeds(plan.dropped()))
    by_layer = plan.by_layer()
    for path, value in network.values.items():
        if path in network.removed:
            continue
        for axis, node in enumerate(value.axes):
            indices, planned = kept.indices(node), by_layer.keep.get(path, {}).get(axis)
            needed = np.arange(by_layer.shapes[path][axis]) if indices is None else indices
            if planned is not None and len(needed) != len(planned):
                first = int(np.setdiff1d(needed, planned)[0])
                raise ValueError(
                    f"the plan drops slice {first} of params[{path!r}] along axis {axis}, which this "
                    f"function needs: {why_needed(network, facts, node, first)}."
                )
    return kept, facts


# --- widths


def _rounded(
    network: TracedNetwork, kept: Solution, divisors: frozenset[ParamAxis], multiple_of: int
) -> tuple[Solution, frozenset[ParamAxis]]:
    """Return a solution whose widths are multiples of a number, and equal in the layers of a stack.

    More seeds never make a solution wrong, only larger, so each round adds some and solves again. It ends,
    because each round keeps more slices than the last.
    """
    while True:
        seeds: list[tuple[int, State]] = []
        for value in network.values.values():
            for node, size in zip(value.axes, value.shape, strict=True):
                indices = kept.indices(node)
                if indices is not None and (missing := -len(indices) % multiple_of):
                    seeds.append((node, _with_more(indices, size, missing)))
        seeds = seeds or _evened(network, kept)
        if not seeds:
            return kept, divisors
        dropped = network.dropped(kept)
        kept, divisors = solve_to_fixpoint(
            network, lambda _, dropped=dropped: dropped, [*network.seeds(dropped), *seeds]
        )


def _evened(network: TracedNetwork, kept: Solution) -> list[tuple[int, State]]:
    """Return seeds that give each layer of a stack as many slices of an axis as the layer that has most.

    The axis is the one on which the fewest are missing: where whole heads were dropped, that of the heads.
    The other axes of the same units follow by the constraints, and are even afterwards.
    """
    best: tuple[int, list[tuple[int, State]]] | None = None
    for values in network.families:
        for axis, size in enumerate(values[0].shape):
            rows = {network.graph.find(value.axes[axis]): kept.indices(value.axes[axis]) for value in values}
            counts = {node: size if indices is None else len(indices) for node, indices in rows.items()}
            widest = max(counts.values())
            missing = sum(widest - count for count in counts.values())
            if missing and (best is None or missing < best[0]):
                short = {n: row for n, row in rows.items() if row is not None and len(row) < widest}
                best = missing, [(n, _with_more(row, size, widest - len(row))) for n, row in short.items()]
    return [] if best is None else best[1]


def _with_more(indices: np.ndarray, size: int, count: int) -> State:
    """Return the slices to keep: those at `indices`, and the first `count` of the others."""
    state = np.ones(size, bool)
    state[np.setdiff1d(np.arange(size), indices)[count:]] = False
    return True if state.all() else state


# --- the plan of a solution


def _plan_of(
    network: TracedNetwork,
    kept: Solution,
    divisors: frozenset[ParamAxis],
    removed: Removed,
    blocks: Sequence[str],
) -> Plan:
    """Return the plan that keeps what a solution keeps."""
    shapes = {path: tuple(leaf.shape) for path, leaf in network.leaves.items()}
    keep: dict[str, dict[int, np.ndarray]] = {}
    nonzero: dict[str, set[int]] = {}
    for path, shape in shapes.items():
        stack = network.stacks.get(path, ())
        names = {layer_name(path, i) if stack else path: i for i in layer_indices(shape, stack)}
        counts = tuple(shape[axis] for axis in stack)
        if len(stack) == 1 and (gone := names.keys() & removed.names):
            names = {name: index for name, index in names.items() if name not in gone}
            counts = (len(names),)
            keep[path] = {stack[0]: np.array(sorted(index[0] for index in names.values()))}
            if gone & removed.alive:
                nonzero[path] = {stack[0]}
        elif names.keys() <= removed.alive:
            nonzero[path] = set(range(len(shape)))
        rest = (axis for axis in range(len(shape)) if axis not in stack)
        for layer_axis, axis in enumerate(rest):
            indices = [kept.indices(network.values[name].axes[layer_axis]) for name in names]
            if any(row is not None for row in indices):
                rows = [np.arange(shape[axis]) if row is None else row for row in indices]
                keep.setdefault(path, {})[axis] = np.stack(rows).reshape(*counts, -1)
                if any((name, layer_axis) in divisors for name in names):
                    nonzero.setdefault(path, set()).add(axis)
    divided = {path: tuple(sorted(axes)) for path, axes in nonzero.items()}
    return Plan(shapes, keep, divided, network.stacks, _removed_blocks(network, removed, blocks))


def _removed_blocks(network: TracedNetwork, removed: Removed, blocks: Sequence[str]) -> tuple[str, ...]:
    """Return the outermost of the blocks all params of which are removed."""
    found: list[str] = []
    for block in blocks:
        names = {name for name, (path, _) in network.paths.items() if path.startswith(f"{block}/")}
        if names and names <= removed.names:
            found.append(block)
    return tuple(block for block in found if not any(block.startswith(f"{other}/") for other in found))
