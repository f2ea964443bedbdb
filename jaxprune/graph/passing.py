"""What the residual blocks of a network are given, and what they pass on.

`residual_blocks` proves that a block is the identity when its params are zero: the ops that its params reach
then pass on the block's input. The value that the first of these ops passes on is the block's input, and what
the last one gives is its output, also where the params are not zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxprune.graph.engine.identity import inlined
from jaxprune.graph.engine.ir import Region, Value
from jaxprune.graph.engine.passage import Mark, Passage, roots_of
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.rules import learn_changes
from jaxprune.graph.residual import Block, ResidualBlocks
from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.stacks import layer_name
from jaxprune.typing import Params


def inputs_and_outputs(
    apply_fn: Callable[..., Any], params: Params, inputs: Sequence[Any], blocks: ResidualBlocks
) -> list[tuple[jax.Array, jax.Array]]:
    """Return what each block is given and what it passes on, in one call of the network.

    Args:
      apply_fn: the function that the blocks were found in.
      params: a pytree of arrays.
      inputs: the arguments of the function after the params.
      blocks: from `residual_blocks`.

    Raises:
      ValueError: a block that the function has no more.
    """
    # The rounds of loops over layers stand one by one, so a layer of a stack is a block like any other.
    network = TracedNetwork(apply_fn, params, inputs, stacks=blocks.stacks)
    if missing := [block.name for block in blocks if not set(block.paths) <= network.leaves.keys()]:
        raise ValueError(
            f"the params have no leaves of the blocks {', '.join(missing)}. Pass the function and the params "
            "that residual_blocks was given."
        )
    region, count = inlined(network.region), len(network.leaves)
    of_params = list(network.values.values())
    region = Region([*of_params, *region.inputs[count:]], region.outputs, region.ops)
    roots = roots_of(region, of_params, region.inputs[len(of_params) :])
    leaving = {
        id(inner): outer
        for op in region.ops
        if op.name == "inline"
        for inner, outer in zip(op.inputs, op.outputs, strict=True)
    }
    made = {id(value) for op in network.region.ops for value in op.outputs} | set(map(id, region.inputs))

    def outside(value: Value) -> Value:
        """Return a value of a checkpoint's body as the checkpoint gives it."""
        while id(value) not in made and id(value) in leaving:
            value = leaving[id(value)]
        return value

    base = network.facts({})
    wanted: list[Value] = []
    for block in blocks:
        own = {path: network.values[_value_name(block, path)] for path in block.paths}
        zero = [value for path, value in own.items() if path not in {*block.divisors, *blocks.fixed}]
        facts = base.copy()
        for value in zero:
            facts.learn(value, None, fill=0)
        learn_changes(network.region, facts, base, zero)
        passage = Passage(facts)
        passage.follow(region, {id(value): Mark(zero=value in zero) for value in own.values()}, roots)
        if not passage.passes:
            raise ValueError(
                f"the block {block.name!r} passes nothing on in this function. Pass the function and the "
                "params that residual_blocks was given."
            )
        wanted += [outside(passage.passes[0].source), outside(passage.passes[-1].output)]

    arrays, _ = split_static(inputs)
    leaves = [*jax.tree.leaves(params), *arrays.values()]
    values = jax.jit(lambda leaves: network.values_of(wanted, base, leaves))(leaves)
    return list(zip(values[::2], values[1::2], strict=True))


def _value_name(block: Block, path: str) -> str:
    return layer_name(path, block.index) if block.index else path
