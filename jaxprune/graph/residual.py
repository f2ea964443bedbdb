"""`residual_blocks`: the blocks of a network that are the identity when their params are zero."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.blocktrees import below
from jaxprune.graph.engine.divisors import find_divisors
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.identity import Aliases, aliases, inlined
from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.passage import Mark, Pass, Passage, Roots, made_from, roots_of
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.rules import learn_changes
from jaxprune.graph.engine.singular import singularities
from jaxprune.graph.roles import weights
from jaxprune.tree.calls import check_call
from jaxprune.tree.checks import check_function, shown
from jaxprune.tree.paths import leaf_paths, some_of
from jaxprune.tree.stacks import Stacked, Stacks, layer_name, stacks_of
from jaxprune.typing import Params

_CALL = "residual_blocks(apply_fn, params, *inputs)"
Prefixes = Sequence[str | Sequence[str]] | Mapping[str, Sequence[str | Sequence[str]]]
"""For each block the path prefix of its leaves, or several prefixes; or a dict of such lists by pool."""


class Block(NamedTuple):
    """The leaves of one block, or its layer of stacked leaves.

    Attributes:
      name: its first prefix, or the index of its layer, `"[2]"`.
      pool: the name of the pool that it is counted in.
      paths: its leaves.
      index: its layer, if its leaves stack those of several blocks; else empty.
      divisors: those of the leaves that the network divides by, or would otherwise be NaN where they
        are zero: masks of a dropped block leave them alive.
    """

    name: str
    pool: str
    paths: tuple[str, ...]
    index: tuple[int, ...] = ()
    divisors: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResidualBlocks:
    """The blocks of a network, each the identity when its leaves are zero; printing it gives a table.

    Attributes:
      blocks: the blocks, in the order given, those of stacked leaves last.
      stacks: by path, the axes of the stacked leaves that count blocks.
      shapes: by path, the dense shapes of the leaves of all blocks.
      weights: by path, whether the network uses a leaf as the weights of a product; empty if that is not
        known.
      fixed: the leaves of blocks that have no zero, such as the state of a random generator: no mask
        removes them.
    """

    blocks: tuple[Block, ...]
    stacks: Stacks
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, bool]
    fixed: frozenset[str] = frozenset()

    def under(self, prefix: str) -> "ResidualBlocks":
        """Return the blocks for a part of the params: paths without a prefix, leaves elsewhere left out.

        For functions of `{"params": ..., "batch_stats": ...}` whose optimizer sees the params alone.

        Raises:
          ValueError: a block has no leaf with the prefix.
        """

        def inside(paths: Iterable[str]) -> tuple[str, ...]:
            return tuple(below(prefix, dict.fromkeys(paths)))

        blocks = tuple(
            block._replace(paths=inside(block.paths), divisors=inside(block.divisors))
            for block in self.blocks
        )
        if empty := [block.name for block in blocks if not block.paths]:
            raise ValueError(
                f"under({prefix!r}): no leaf of {some_of(empty)} lies there; the leaves are "
                f"{some_of(path for block in self.blocks for path in block.paths)}."
            )
        start = prefix.rstrip("/") + "/"
        blocks = tuple(block._replace(name=block.name.removeprefix(start)) for block in blocks)
        stacks, shapes = below(prefix, self.stacks), below(prefix, self.shapes)
        fixed = frozenset(inside(self.fixed))
        return ResidualBlocks(blocks, stacks, shapes, below(prefix, self.weights), fixed)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        lines = [f"{'block':<28}{'pool':<16}leaves"]
        for block in self.blocks:
            count = f"{len(block.paths)}"
            if block.divisors:
                count += f", of which divided by: {', '.join(block.divisors)}"
            lines.append(f"{block.name:<28}{block.pool:<16}{count}")
        return "\n".join(lines)


def residual_blocks(
    apply_fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    prefixes: Prefixes | None = None,
    stacked: Stacked | None = None,
    state: Callable[[Any], Any] | None = None,
    **keywords: Any,
) -> ResidualBlocks:
    """Find the residual blocks of a function, each proved to be the identity when its leaves are zero.

    The function's jaxpr is followed with the leaves of one block at zero. The block is the identity if
    everything that its leaves touch ends at sums (or products with one) that then return what the block read:
    `x + f(x)` is `x`. That is a proof for all inputs; nothing is computed, so abstract params will do.

    A block is refused, with the op that is to blame and its line, if it has no residual path, if a norm or
    an activation follows its sum (except a `relu` after a `relu`, which changes nothing), if it changes the
    number of channels, or if it scales or gates what should pass.

    Args:
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`; bools and strings are static.
      prefixes: for each block the prefix of its leaves' paths, `["blocks/0", "blocks/1"]`; several for a
        block with leaves in several places: `("params/block_0", "batch_stats/block_0")`. A dict of such
        lists makes a pool of each, `{"encoder": [...], "decoder": [...]}`.
      stacked: `stacked(path, leaf)`, for layers stacked in one leaf: how many leading axes of the leaf count
        layers, or which axes do. Each layer is a block, of all stacked leaves.
      state: as for `compact`: the outputs that are new values of params. New values of a block's own leaves
        may depend on it.
      **keywords: none; those of the function go in by `functools.partial(apply_fn, train=False)`.

    Returns:
      `ResidualBlocks`, for `structures.layers`.

    Raises:
      ValueError: a block that is not the identity; no blocks; a prefix that no leaf has, or twice, or inside
        another; stacked leaves with different numbers of layers.
      TypeError: an `apply_fn` that is not a function or cannot be called with the inputs, a keyword.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"blocks": [{"w": jnp.ones((3, 8)), "v": jnp.ones((8, 3))} for _ in range(4)]}
      >>> def apply_fn(params, x):
      ...     for block in params["blocks"]:
      ...         x = x + jnp.tanh(x @ block["w"]) @ block["v"]
      ...     return x
      >>> blocks = jp.residual_blocks(
      ...     apply_fn, params, jnp.ones((1, 3)), prefixes=[f"blocks/{i}" for i in range(4)]
      ... )
      >>> [block.name for block in blocks]
      ['blocks/0', 'blocks/1', 'blocks/2', 'blocks/3']
    """
    check_call(_CALL, apply_fn, (params, *inputs), keywords, ("prefixes", "stacked", "state"))
    # Without stacks, a loop's body stands for all its rounds.
    network = TracedNetwork(apply_fn, params, inputs, state, stacks={})
    blocks, stacks = find_blocks(network.leaves, prefixes, stacked)
    if axes := {path: along for path, along in stacks.items() if len(along) > 1}:
        path, along = next(iter(axes.items()))
        raise ValueError(
            f"residual_blocks checks layers along one axis, but stacked= names axes {along} of {path!r}. "
            "Name the axis of the loop over layers alone."
        )
    own = {path for block in blocks for path in block.paths}
    fixed = frozenset(path for path in own if not jnp.issubdtype(network.leaves[path].dtype, jnp.inexact))
    proof = _Proof(network, stacks, fixed, state)
    checked = [proof.check(block) for block in blocks]
    reasons = {block.name: why for block, why in zip(blocks, proof.reasons, strict=True) if why is not None}
    reasons = reasons or proof.between(blocks)
    if reasons:
        alike: dict[str, list[str]] = {}
        for name, why in reasons.items():
            alike.setdefault(why, []).append(name)
        listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in alike.items())
        raise ValueError(
            f"not the identity when all of its params are zero: {listed}. Only blocks whose input passes on "
            "unchanged can be dropped: leave the others out."
        )
    found = weights(network)
    return ResidualBlocks(
        tuple(checked),
        stacks,
        {path: tuple(leaf.shape) for path, leaf in network.leaves.items() if path in own},
        {path: path in found for path in network.leaves if path in own},
        fixed,
    )


def check_blocks(prefixes: Prefixes | None, stacked: Stacked | None) -> None:
    """Check `prefixes` and `stacked`, as far as that is possible without leaves.

    Raises:
      ValueError: neither names a block.
      TypeError: `prefixes` holds something else than path prefixes, or `stacked` is not a function.
    """
    if not _pools(prefixes) and stacked is None:
        raise ValueError("no blocks: pass prefixes, [f'blocks/{i}' for i in range(12)] say, or stacked=.")
    if stacked is not None:
        check_function(stacked, "stacked=", "of (path, leaf) that returns how many leading axes count layers")


def find_blocks(
    leaves: Mapping[str, Any], prefixes: Prefixes | None, stacked: Stacked | None
) -> tuple[list[Block], Stacks]:
    """Return the blocks that `prefixes` and `stacked` name among leaves, and the stack axes.

    Raises:
      ValueError: no blocks; a prefix that no leaf has, or twice, or inside another; a stacked leaf with
        a prefix; stacked leaves with different numbers of layers.
      TypeError: as `check_blocks`.
    """
    check_blocks(prefixes, stacked)
    pools = _pools(prefixes)
    blocks: list[Block] = []
    taken: dict[str, str] = {}
    for pool, each in pools.items():
        for starts in each:
            paths: list[str] = []
            for start in starts:
                mine = [path for path in leaves if path == start or path.startswith(f"{start}/")]
                if not mine:
                    raise ValueError(
                        f"no leaf lies under {start!r}, which is to be a block. The leaves are "
                        f"{some_of(leaves)}."
                    )
                for path in mine:
                    if path in taken:
                        raise ValueError(
                            f"the prefix {start!r} is given twice."
                            if taken[path] == start
                            else f"{path!r} lies under {taken[path]!r} and {start!r}: blocks do not overlap."
                        )
                    taken[path] = start
                paths += mine
            blocks.append(Block(starts[0], pool, tuple(path for path in leaves if path in paths)))
    stacks = {} if stacked is None else stacks_of(stacked, leaves)
    if stacked is not None and not stacks:
        raise ValueError(
            f"stacked= names no axis of any leaf, so there are no layers. The leaves are {some_of(leaves)}."
        )
    if both := [path for path in stacks if path in taken]:
        raise ValueError(
            f"{both[0]!r} is stacked and lies under {taken[both[0]]!r}: its layers and all of it cannot be "
            "blocks at once."
        )
    if stacks:
        counts = {path: tuple(leaves[path].shape[axis] for axis in axes) for path, axes in stacks.items()}
        sizes = set(counts.values())
        if len(sizes) > 1:
            listed = ", ".join(f"{path} {counts[path]}" for path in counts)
            raise ValueError(
                f"the stacked leaves have different numbers of layers: {listed}. Let stacked= name the "
                "leaves of one stack, and return 0 for the others."
            )
        pool = "stacked" if "layers" in pools else "layers"
        start = _common_prefix(list(stacks))
        blocks += [Block(layer_name(start, i), pool, tuple(stacks), i) for i in np.ndindex(*sizes.pop())]
    return blocks, stacks


def _common_prefix(paths: Sequence[str]) -> str:
    """Return the path under which all paths lie; empty if there is none."""
    parts = [path.split("/")[:-1] for path in paths]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return "/".join(names[0] for names in same)


def _pools(prefixes: Prefixes | None) -> dict[str, list[tuple[str, ...]]]:
    """Return the prefixes of each block by pool, checked."""
    if prefixes is None:
        return {}
    if isinstance(prefixes, str) or not isinstance(prefixes, (Mapping, Sequence)):
        raise TypeError(f"blocks are given by a list of path prefixes, got {shown(prefixes)}.")
    lists = prefixes if isinstance(prefixes, Mapping) else {"layers": prefixes}
    pools: dict[str, list[tuple[str, ...]]] = {}
    for pool, each in lists.items():
        if isinstance(each, Sequence) and not each:
            raise ValueError(f"the list of blocks is empty for the pool {pool!r}.")
        if not isinstance(pool, str) or isinstance(each, str) or not isinstance(each, Sequence):
            raise TypeError(f"blocks are given by a list of path prefixes, got {shown(each)} for {pool!r}.")
        pools[pool] = []
        for prefix in each:
            several: Any = tuple(prefix) if isinstance(prefix, (tuple, list)) else (prefix,)
            if not several or not all(isinstance(one, str) and one.strip("/") for one in several):
                raise TypeError(f"a block is given by a path prefix, or several, got {shown(prefix)}.")
            pools[pool].append(tuple(one.strip("/") for one in several))
    return pools


class _Proof:
    """The proofs for the blocks of one program.

    Attributes:
      reasons: for each block that was checked, why it is not the identity, or None.
      passes: for each, the ops that pass on what it was given, and the aliases where its leaves are zero.
    """

    def __init__(self, network: TracedNetwork, stacks: Stacks, fixed: frozenset[str], state: Any):
        self.network, self.stacks, self.fixed = network, stacks, fixed
        self.region, count = inlined(network.region), len(network.leaves)
        inputs = self.region.inputs
        self.roots: Roots = roots_of(self.region, inputs[:count], inputs[count:])
        self.reasons: list[str | None] = []
        self.passes: list[tuple[list[Pass], Aliases]] = []
        self.new_values = _new_values(network, state)
        self.of_stack: tuple[frozenset[str], Op | None] | None = None
        self.links = aliases(self.region, Facts())
        self.base = network.facts({})
        self.place = {id(op): n for n, op in enumerate(self.region.ops)}

    def check(self, block: Block) -> Block:
        """Check a block, note why it is not the identity, and return it with its divisors."""
        network = self.network
        zeros = {path: self._slices(block, path) for path in block.paths if path not in self.fixed}
        facts, ops = self._facts(zeros)
        kept, unresolved = self._divisors(block, facts, ops)
        if kept:
            facts, _ = self._facts({path: marks for path, marks in zeros.items() if path not in kept})
        others = None
        if block.index:
            slices = {path: self._slices(block, path) or () for path in block.paths}
            others, _ = self._facts(
                {path: [m if m is None else ~m for m in marks] for path, marks in slices.items()}
            )
        passage = Passage(facts, others)
        marked = {
            id(network.values[path]): Mark(part=bool(block.index), zero=path not in kept | self.fixed)
            for path in block.paths
        }
        marks = passage.follow(self.region, marked, self.roots)
        ignored = {n for path, n in self.new_values.items() if path in block.paths}
        outputs = enumerate(network.region.outputs)
        reached = [marks[id(value)] for n, value in outputs if id(value) in marks and n not in ignored]
        found = aliases(self.region, facts)
        why = None
        if unresolved is not None:
            why = f"{unresolved} divides by zero without it"
        elif reached:
            why = passage.reason(reached, found)
        elif not passage.passes:
            why = "the function never reads it"
        self.reasons.append(why)
        self.passes.append((passage.passes, found))
        return block._replace(divisors=tuple(path for path in block.paths if path in kept))

    def _divisors(self, block: Block, facts: Facts, ops: list[Op]) -> tuple[frozenset[str], Op | None]:
        """Return the leaves that must not be zero, and an op that is not finite whatever keeps its value."""
        if block.index:
            # What a loop does with one layer is seen where all are zero: it is the same for each.
            if self.of_stack is None:
                self.of_stack = self._find_divisors(block)
            return self.of_stack
        if not singularities(self.network.region_of(ops), facts):
            return frozenset(), None
        return self._find_divisors(block, facts)

    def _find_divisors(self, block: Block, facts: Facts | None = None) -> tuple[frozenset[str], Op | None]:
        network = self.network
        zeros: dict[str, list[Any]] = {p: [None] * len(v.axes) for p, v in network.values.items()}
        for path in block.paths:
            # One axis of the layer, since zeros along two would each do without the other.
            axes = [axis for axis in range(len(zeros[path])) if axis not in self.stacks.get(path, ())]
            if axes and path not in self.fixed:
                zeros[path][axes[0]] = np.ones(network.values[path].shape[axes[0]], bool)
        divisors = find_divisors(network, zeros, True, facts)
        if divisors.unresolved is not None:  # an infinite derivative alone is no reason to refuse
            divisors = find_divisors(network, zeros, False, facts)
        return frozenset(path for path, _ in divisors.axes), divisors.unresolved

    def between(self, blocks: Sequence[Block]) -> dict[str, str]:
        """Return, by block, what stands between it and the next and changes what passes, without params."""
        at_top: list[tuple[Block, Pass, Pass, Aliases]] = []  # the first and the last pass of each block
        for block, (passes, found) in zip(blocks, self.passes, strict=True):
            if outside := [each for each in passes if id(each.op) in self.place]:
                at_top.append((block, outside[0], outside[-1], found))
        at_top.sort(key=lambda each: self.place[id(each[1].op)])
        reasons: dict[str, str] = {}
        for (block, _, last, found), (_, following, _, _) in pairwise(at_top):
            op = self._between(last, following.source, found)
            if op is not None:
                reasons[block.name] = f"{op} stands after its sum and changes what passes"
        return reasons

    def _between(self, last: Pass, taken: Value, found: Aliases) -> Op | None:
        """Return the op that makes what the next block takes of what this one passes on, if no layer does."""
        if taken is last.output or found.get(id(taken), taken) is last.source:
            return None
        made = taken.op is not None and made_from(taken, last.output, self.links)
        if taken.op is None or not made or taken.shape != last.output.shape:
            return None
        # Layers with params of their own between two blocks are neither's.
        after = {id(last.output)}
        path: list[Op] = []
        for op in self.region.ops[self.place[id(last.op)] + 1 : self.place[id(taken.op)] + 1]:
            if any(id(value) in after for value in op.inputs):
                after.update(map(id, op.outputs))
                if any(made_from(taken, output, self.links) for output in op.outputs):
                    path.append(op)
        for value in (value for op in path for value in op.inputs if id(value) not in after):
            # Params are a layer's, unless they went into what the block was given.
            given = made_from(last.output, value, self.links) or made_from(value, last.source, self.links)
            if id(value) in self.roots.param and not given:
                return None
        return taken.op

    def _facts(self, zeros: Mapping[str, Sequence[np.ndarray | None] | None]) -> tuple[Facts, list[Op]]:
        """Return what follows from zero slices of leaves (None for all of a leaf), and for which ops."""
        facts, values = self.base.copy(), [self.network.values[path] for path in zeros]
        for value, marks in zip(values, zeros.values(), strict=True):
            facts.learn(value, marks, fill=0 if marks is None else None)
        return facts, learn_changes(self.network.region, facts, self.base, values)

    def _slices(self, block: Block, path: str) -> list[np.ndarray | None] | None:
        """Return, for each axis of a stacked leaf, which slices are the block's; None if all of it is."""
        if not block.index:
            return None
        shape, (along,), (index,) = self.network.values[path].shape, self.stacks[path], block.index
        return [np.arange(size) == index if axis == along else None for axis, size in enumerate(shape)]


def _new_values(network: TracedNetwork, state: Callable[[Any], Any] | None) -> dict[str, int]:
    """Return, by path, the number of the output that is a leaf's new value."""
    if state is None:
        return {}
    new = state(jax.tree.unflatten(network.out_tree, range(len(network.region.outputs))))
    return dict(zip(leaf_paths(new), jax.tree.leaves(new), strict=True))
