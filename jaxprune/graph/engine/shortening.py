"""Removes residual blocks whose params are all zero from a program.

Where all params of a block are zero, `x + f(x)` is `x`. So what reads the sum can read `x` instead, and
nothing reads the block any more. A layer of a stack then leaves its loop; a block of a list or a dict leaves
the list or dict.

Two proofs
----------
`residual_blocks` (graph/residual.py, by `passage`) also proves blocks to be the identity, and both proofs
rest on `identity.aliases`. They answer different questions, and neither can stand in for the other:

- Here the question is whether a program needs some params at all *if all of them are zero at once*. Several
  blocks are removed together, in a program whose loops over layers are unrolled, so that single rounds can
  leave. Whatever nothing reads any more may go, a dead branch as well as a residual block: the compacted
  program stays equal to the masked one in either case. The answer for one set of params is yes or no, with no
  reason but the params that are still read.
- `passage` asks, for one block at a time and with all other params alive, whether the *input of the block
  passes on*. It refuses a layer without a residual path even where nothing reads its params any more (the
  next layer's bias would replace its input), names the op and the line to blame, and needs no unrolling: one
  layer of a loop is checked in the body of the loop, so it also holds for loops too long to unroll.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph.engine.identity import aliases
from jaxprune.graph.engine.ir import LayerLoop, Op, Region, Value, is_removed, with_layers
from jaxprune.graph.engine.liveness import aligned, prune_dead
from jaxprune.graph.engine.program import TracedNetwork

_Round = tuple[int, int]
"""The id of a loop, and the number of one of its rounds."""


class Removed(NamedTuple):
    """Params (or layers of stacked ones) that are removed with their block, by name."""

    names: frozenset[str]  # all of them
    alive: frozenset[str]  # those that need not be zero, because the block divides by them


NOTHING = Removed(frozenset(), frozenset())


def removable(network: TracedNetwork, masks: Mapping[str, np.ndarray], blocks: Collection[str]) -> Removed:
    """Return the params of blocks that are masked and that the function does not need if they are zero.

    Blocks are tried all together: layers of stacks, and those entries of lists and dicts that `blocks` names.
    If the function still reads some of them, these are kept, and the others are tried again: what is read in
    place of a block may be the output of another.
    """
    dead = frozenset(name for name, mask in masks.items() if not mask.any())
    candidates: list[frozenset[str]] = []
    for family in [*_layers(network), *_listed(network, blocks)]:
        mostly_dead = [names for names in family if len(names & dead) * 2 >= len(names) > 0]
        # At least one stays: a loop without rounds, or an empty list, does not tell what it contained.
        candidates += mostly_dead[: len(family) - 1]
    while candidates:
        names = frozenset[str]().union(*candidates)
        removed = Removed(names, names - dead)
        left = _still_read(network, removed, *_bypasses(network, removed))
        if not left:
            return removed
        candidates = [each for each in candidates if not each & left]
    return NOTHING


def remove(network: TracedNetwork, removed: Removed) -> None:
    """Remove some params from a function and its loops, in place; ValueError if the function needs one."""
    if not removed.names:
        return
    found, rounds = _bypasses(network, removed)
    if left := _still_read(network, removed, found, rounds):
        raise ValueError(
            f"the plan takes out {', '.join(sorted(left))}, but this function is not the identity there when "
            "it is zero, so it needs it."
        )
    region, ids = network.region, {id(network.values[name]) for name in removed.names}
    for op in region.ops:
        op.inputs[:] = [_resolved(value, found) for value in op.inputs]
    region.outputs[:] = [_resolved(value, found) for value in region.outputs]
    for loop in _loops(region):
        for one in loop.rounds:
            one.carry_out[:] = [_resolved(value, found) for value in one.carry_out]
            one.slices_out[:] = [_resolved(value, found) for value in one.slices_out]
    for stack in network.stacked:
        layers = tuple(_resolved(layer, found) for layer in stack.layers)
        if any(new is not old for new, old in zip(layers, stack.layers, strict=True)):
            # The op that made all layers at once would read what was removed.
            stack.layers, stack.op = layers, None
    network.region = prune_dead(Region(region.inputs, region.outputs, region.ops), rounds)
    network.removed = removed.names
    network.removed_ids.update(ids)
    families = [[v for v in values if not is_removed(v, ids)] for values in network.layers_of_stacks]
    network.families = [*(values for values in families if values), *aligned(network.region)]


def _layers(network: TracedNetwork) -> Iterator[list[frozenset[str]]]:
    """Yield, for stacks that belong to the same layers, the names of the params of each layer."""
    name_of = {id(value): name for name, value in network.values.items()}
    sets: list[set[str]] = []
    for loop in _loops(network.region):
        paths = set[str]()
        for op in network.region.ops:
            if any(other is loop for other, _ in op.rounds):
                names = (name for value in op.inputs for name in _made_of(value, name_of))
                paths |= {network.paths[name][0] for name in names}
        paths = {path for path in paths if len(network.stacks.get(path, ())) == 1}
        for other in [each for each in sets if each & paths]:
            sets.remove(other)
            paths |= other
        if paths:
            sets.append(paths)
    # Stacks whose layers are read by index, not by a loop: those of the same length may belong together.
    rest = {p: axes for p, axes in network.stacks.items() if len(axes) == 1 and not any(p in s for s in sets)}
    lengths = {path: network.leaves[path].shape[axes[0]] for path, axes in rest.items()}
    sets += [{p for p in rest if lengths[p] == length} for length in sorted(set(lengths.values()))]
    for paths in sets:
        by_index: dict[tuple[int, ...], set[str]] = {}
        for name, (path, index) in network.paths.items():
            if path in paths:
                by_index.setdefault(index, set()).add(name)
        yield list(map(frozenset, by_index.values()))


def _made_of(value: Value, name_of: Mapping[int, str]) -> Iterator[str]:
    """Yield the names of the params that a value is, or is made of layer by layer."""
    if id(value) in name_of:
        yield name_of[id(value)]
    elif value.op is not None and value.op.lazy:
        for operand in value.op.inputs:
            yield from _made_of(operand, name_of)


def _listed(network: TracedNetwork, blocks: Collection[str]) -> Iterator[list[frozenset[str]]]:
    """Yield, for blocks of a list or dict that have the same layout, the params of each block."""
    families: dict[Any, list[frozenset[str]]] = {}
    for block in blocks:
        names = frozenset(name for name, (path, _) in network.paths.items() if path.startswith(f"{block}/"))
        paths = sorted({network.paths[name][0] for name in names})
        layout = tuple((path.removeprefix(block), tuple(network.leaves[path].shape)) for path in paths)
        families.setdefault((block.rpartition("/")[0], layout), []).append(names)
    yield from families.values()


def _loops(region: Region) -> list[LayerLoop]:
    """Return the outermost loops over layers of a region."""
    return list({id(op.rounds[0][0]): op.rounds[0][0] for op in region.ops if op.rounds}.values())


def _resolved(value: Value, found: Mapping[int, Value]) -> Value:
    while id(value) in found:
        value = found[id(value)]
    return value


def _bypasses(network: TracedNetwork, removed: Removed) -> tuple[dict[int, Value], set[_Round]]:
    """Return, by id, what can be read in place of values that depend on some params, if these are zero.

    A value depends on the params if it is made from them and does not equal, given that they are zero, a
    value that is not. The rounds of loops that read the params are returned too.
    """
    ids = {id(network.values[name]) for name in removed.names}
    zero = removed.names - removed.alive
    ops = network.region.ops
    rounds = {(id(loop), n) for op in ops if _reads(op, ids) for loop, n in op.rounds[:1]}
    zeros = {
        path: [
            np.ones(size, bool) if path in zero and isinstance(size, (int, np.integer)) else None
            for size in value.shape
        ]
        for path, value in network.values.items()
    }
    facts = network.facts(zeros)
    # The copy that carries a value into a round is no alias of it, so that values are replaced only within a
    # round: all rounds have to stay alike. A round that leaves its loop is the exception, see below.
    without_carries = [op for op in ops if not op.memo.get("carried")]
    equal = aliases(Region(network.region.inputs, [], without_carries), facts)
    found: dict[int, Value] = {}
    dependent = set(ids)
    for op in ops:
        inputs = [_resolved(value, found) for value in op.inputs]
        depends = any(id(each) in dependent for value in inputs for each in with_layers(value))
        leaves = bool(op.rounds) and (id(op.rounds[0][0]), op.rounds[0][1]) in rounds
        for output in op.outputs:
            other = equal.get(id(output))
            if op.memo.get("carried") and leaves:
                found[id(output)] = inputs[0]
            elif depends and other is not None and id(root := _resolved(other, found)) not in dependent:
                found[id(output)] = root
            elif depends:
                dependent.update(map(id, with_layers(output)))
    return found, rounds


def _reads(op: Op, ids: Collection[int]) -> bool:
    """Whether an op reads some layers, or values made of them outside of loops."""
    return any(is_removed(each, ids) for value in op.inputs for each in with_layers(value))


def _still_read(
    network: TracedNetwork, removed: Removed, found: Mapping[int, Value], rounds: Collection[_Round]
) -> frozenset[str]:
    """Return the params among some that the function needs even if they are zero, given their `_bypasses`."""
    name_of = {id(network.values[name]): name for name in removed.names}
    read: set[int] = set()

    def note(value: Value) -> None:
        read.update(id(each) for each in with_layers(_resolved(value, found)))

    for output in network.region.outputs:
        note(output)
    left = set[str]()
    for op in reversed(network.region.ops):
        if not (op.has_effects or any(id(v) in read for out in op.outputs for v in with_layers(out))):
            continue
        for value in op.inputs:
            note(value)
        if op.rounds and (id(op.rounds[0][0]), op.rounds[0][1]) in rounds:
            # The round also does something that is needed, so it cannot leave its loop: all its params stay.
            of_round = [o for o in network.region.ops if o.rounds[:1] == op.rounds[:1]]
            left |= {name for o in of_round for v in o.inputs for name in _made_of(v, name_of)}
    return frozenset(left | {name for key, name in name_of.items() if key in read})
