"""A function of dense params as a function of the small ones."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from jaxprune.graph.engine import placing
from jaxprune.graph.engine.axes import Solution
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.plan import Plan
from jaxprune.graph.planning import solve_for_plan
from jaxprune.tracing.jaxprs import abstract, explicit_sharding, split_static
from jaxprune.tree.leaves import array_leaves, is_array
from jaxprune.typing import Params


def bind(
    function: Callable[..., Any],
    plan: Plan,
    state: Callable[[Any], Any] | None = None,
    shardings: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., Any]:
    """Return a function of dense params as one of small params; see `Compacted.bind`.

    The function is traced and solved once for each set of shapes, dtypes and static inputs, and then replayed
    without the slices that the plan drops. A function that closes over tracers is traced at every call, since
    they hold for one call. `shardings` says how dense params were sharded over explicit axes of a mesh.
    """
    programs: dict[Any, tuple[TracedNetwork, Solution, Facts]] = {}

    def bound(params: Params, *inputs: Any) -> Any:
        plan.check(params)
        params = plan.filled(params)
        arrays, _ = split_static(inputs)
        leaves, treedef = jax.tree.flatten((params, inputs))
        small, tree = jax.tree.flatten(params)
        key = (treedef, tuple(map(_signature, leaves)))
        program = programs.get(key)
        if program is None:
            # By path, because the plan may have been made for other containers, with leaves in another order.
            dense = [
                _dense_struct(plan.shapes[path], leaf, shardings.get(path))
                for path, leaf in array_leaves(params).items()
            ]
            network = TracedNetwork(function, jax.tree.unflatten(tree, dense), inputs, state, plan.stacks)
            program = network, *solve_for_plan(network, plan)
            if not network.closes_over_tracers():
                programs[key] = program
        network, kept, facts = program
        return network.replay(kept, facts, [*small, *arrays.values()])

    return bound


def _dense_struct(shape: tuple[int, ...], leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Return a dense param with the sharding that the function was traced with, else with the small one's."""
    if sharding is None and (of_leaf := explicit_sharding(leaf)) is not None:
        sharding = placing.small_sharding(of_leaf, leaf.shape, shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _signature(leaf: Any) -> Any:
    """Return what a trace depends on: the abstract value of an array or number, and a static leaf itself."""
    if is_array(leaf) or (isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)):
        struct = abstract(leaf)
        return struct.shape, struct.dtype, struct.weak_type, struct.sharding
    return leaf
