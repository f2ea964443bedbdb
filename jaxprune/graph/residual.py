"""`residual_blocks`: the blocks of a network that are the identity when their params are zero."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.divisors import find_divisors
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.identity import Aliases, aliases, inlined
from jaxprune.graph.engine.ir import Op, Value
from jaxprune.graph.engine.passage import Pass, Passage, Roots, made_from, mark_of, roots_of
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
        start = prefix.rstrip("/") + "/"

        def inside(paths: Sequence[str]) -> tuple[str, ...]:
            return tuple(path.removeprefix(start) for path in paths if path.startswith(start))

        blocks = tuple(
            block._replace(paths=inside(block.paths), divisors=inside(block.divisors))
            for block in self.blocks
        )
        if empty := [block.name for block in blocks if not block.paths]:
            raise ValueError(
                f"under({prefix!r}): no leaf of {some_of(empty)} lies there; the leaves are "
                f"{some_of(path for block in self.blocks for path in block.paths)}."
            )
        blocks = tuple(block._replace(name=block.name.removeprefix(start)) for block in blocks)
        kept = [path for path in self.shapes if path.startswith(start)]
        return ResidualBlocks(
            blocks,
            {path.removeprefix(start): self.stacks[path] for path in kept if path in self.stacks},
            {path.removeprefix(start): self.shapes[path] for path in kept},
            {path.removeprefix(start): self.weights[path] for path in kept if path in self.weights},
            frozenset(inside(sorted(self.fixed))),
        )

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
    linked = TracedNetwork(apply_fn, params, inputs, state, stacks={})
    blocks, stacks = find_blocks(linked.leaves, prefixes, stacked)
    if axes := {path: along for path, along in stacks.items() if len(along) > 1}:
        path, along = next(iter(axes.items()))
        raise ValueError(
            f"residual_blocks checks layers along one axis, but stacked= names axes {along} of {path!r}. "
            "Name the axis of the loop over layers alone."
        )
    own = {path for block in blocks for path in block.paths}
    fixed = frozenset(path for path in own if not jnp.issubdtype(linked.leaves[path].dtype, jnp.inexact))
    proof = _Proof(linked, stacks, fixed, state)
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
    found = weights(linked)
    return ResidualBlocks(
        tuple(checked),
        stacks,
        {path: tuple(linked.leaves[path].shape) for path in linked.leaves if path in own},
        {path: path in found for path in linked.leaves if path in own},
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
    """

    def __init__(self, linked: TracedNetwork, stacks: Stacks, fixed: frozenset[str], state: Any):
        self.linked, self.stacks, self.fixed = linked, stacks, fixed
        region, count = inlined(linked.region), len(linked.leaves)
        self.region = region
        self.roots: Roots = roots_of(region, region.inputs[:count], region.inputs[count:])
        self.reasons: list[str | None] = []
        self.passes: list[tuple[list[Pass], Aliases]] = []
        self.new_values = _new_values(linked, state)
        self.of_stack: tuple[frozenset[str], Op | None] | None = None
        self.links = aliases(region, Facts())
        self.base = linked.facts({})
        self.place = {id(op): n for n, op in enumerate(region.ops)}

    def check(self, block: Block) -> Block:
        """Checks a block, and finds the leaves that have to keep their values."""
        linked = self.linked
        facts, ops = self._facts(block, frozenset())
        kept, unresolved = self._divisors(block, facts, ops)
        if kept:
            facts, _ = self._facts(block, kept)
        others = self._others(block) if block.index else None
        passage = Passage(facts, others)
        marked = {
            id(linked.values[path]): mark_of(bool(block.index), path not in kept | self.fixed)
            for path in block.paths
        }
        marks = passage.follow(self.region, marked, self.roots)
        ignored = {n for path, n in self.new_values.items() if path in block.paths}
        reached = [
            marks[id(value)]
            for n, value in enumerate(linked.region.outputs)
            if id(value) in marks and n not in ignored
        ]
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
        """The leaves that must not be zero, and an op that is not finite whatever keeps its value."""
        if block.index:
            # What a loop does with one layer is seen where all are zero: it is the same for each.
            if self.of_stack is None:
                self.of_stack = self._find_divisors(block._replace(index=()))
            return self.of_stack
        if not singularities(self.linked.region_of(ops), facts):
            return frozenset(), None
        return self._find_divisors(block, facts)

    def _find_divisors(self, block: Block, facts: Facts | None = None) -> tuple[frozenset[str], Op | None]:
        zeros: dict[str, list[Any]] = {p: [None] * len(v.axes) for p, v in self.linked.values.items()}
        for path in block.paths:
            # One axis of the layer, since zeros along two would each do without the other.
            axes = [axis for axis in range(len(zeros[path])) if axis not in self.stacks.get(path, ())]
            if axes and path not in self.fixed:
                zeros[path][axes[0]] = np.ones(self.linked.values[path].shape[axes[0]], bool)
        divisors = find_divisors(self.linked, zeros, True, facts)
        if divisors.unresolved is not None:  # an infinite derivative alone is no reason to refuse
            divisors = find_divisors(self.linked, zeros, False, facts)
        return frozenset(path for path, _ in divisors.axes), divisors.unresolved

    def between(self, blocks: Sequence[Block]) -> dict[str, str]:
        """What stands between a block and the next one and changes what passes, without params of its own."""
        reasons: dict[str, str] = {}
        at_top = [
            (block, [each for each in passes if id(each.op) in self.place], found)
            for block, (passes, found) in zip(blocks, self.passes, strict=True)
        ]
        at_top = sorted(
            ((b, passes, found) for b, passes, found in at_top if passes),
            key=lambda each: self.place[id(each[1][0].op)],
        )
        for (block, passes, found), (_, following, _) in pairwise(at_top):
            last, taken = passes[-1], following[0].source
            op = self._between(last, taken, found)
            if op is not None:
                reasons[block.name] = f"{op} stands after its sum and changes what passes"
        return reasons

    def _between(self, last: Pass, taken: Value, found: Aliases) -> Op | None:
        """The op that makes what the next block is given of what this one passes on, if it is this one's."""
        if taken is last.output or found.get(id(taken), taken) is last.source:
            return None
        if (
            taken.shape != last.output.shape
            or taken.op is None
            or not made_from(taken, last.output, self.links)
        ):
            return None
        # Layers with params of their own between two blocks are neither's.
        after = {id(last.output)}
        path: list[Op] = []
        for op in self.region.ops[self.place[id(last.op)] + 1 : self.place[id(taken.op)] + 1]:
            if any(id(value) in after for value in op.inputs):
                after.update(map(id, op.outputs))
                if any(made_from(taken, output, self.links) for output in op.outputs):
                    path.append(op)
        beside = [value for op in path for value in op.inputs if id(value) not in after]
        if any(id(value) in self.roots.param and not self._of_before(value, last) for value in beside):
            return None
        return taken.op

    def _of_before(self, value: Value, last: Pass) -> bool:
        """Whether a value beside a path is what the block was given, or of it."""
        return made_from(last.output, value, self.links) or made_from(value, last.source, self.links)

    def _facts(self, block: Block, kept: frozenset[str]) -> tuple[Facts, list[Op]]:
        """What is known where the leaves of a block are zero, and the ops that this matters to."""
        facts = self.base.copy()
        changed = [path for path in block.paths if path not in kept and path not in self.fixed]
        for path in changed:
            if block.index:
                facts.learn(self.linked.values[path], self._layer(block, path))
            else:
                facts.learn(self.linked.values[path], fill=0)
        values = [self.linked.values[path] for path in changed]
        return facts, learn_changes(self.linked.region, facts, self.base, values)

    def _others(self, block: Block) -> Facts:
        """What is known where all layers but this one are zero."""
        facts = self.base.copy()
        for path in block.paths:
            marks = self._layer(block, path)
            facts.learn(self.linked.values[path], [None if mark is None else ~mark for mark in marks])
        changed = [self.linked.values[path] for path in block.paths]
        learn_changes(self.linked.region, facts, self.base, changed)
        return facts

    def _layer(self, block: Block, path: str) -> list[np.ndarray | None]:
        """For each axis of a stacked leaf, which slices are the block's: some along the stack."""
        shape, (along,), (index,) = self.linked.values[path].shape, self.stacks[path], block.index
        return [np.arange(size) == index if axis == along else None for axis, size in enumerate(shape)]


def _new_values(linked: TracedNetwork, state: Callable[[Any], Any] | None) -> dict[str, int]:
    """By path, the number of the output that is a leaf's new value."""
    if state is None:
        return {}
    new = state(jax.tree.unflatten(linked.out_tree, range(len(linked.region.outputs))))
    return dict(zip(leaf_paths(new), jax.tree.leaves(new), strict=True))
