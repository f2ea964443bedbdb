"""Whole layers that a function can do without: residual blocks that are the identity where they are zero.

Where all params of a block are zero, `x + f(x)` is `x`. So what reads the sum can read `x`, and nothing
reads the block any more. A layer of a stack then leaves the loop; a block of a list, or a dict, leaves it.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph.engine.identity import aliases
from jaxprune.graph.engine.ir import Op, Region, Roll, Value, is_gone, with_layers
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.tracing import aligned, prune_dead

_Round = tuple[int, int]
"""The id of a loop, and the number of one of its rounds."""


class Removed(NamedTuple):
    """Params (or layers of stacked ones) that go as whole blocks, by name.

    Attributes:
      names: all of them.
      alive: those that need not be zero: what the block divides by.
    """

    names: frozenset[str]
    alive: frozenset[str]


NOTHING = Removed(frozenset(), frozenset())


def removable(linked: TracedNetwork, masks: Mapping[str, np.ndarray], blocks: Collection[str]) -> Removed:
    """What can go as whole blocks.

    Args:
      linked: the function.
      masks: masks by name.
      blocks: the paths of the blocks in lists and dicts that could leave them.
    """
    dead = frozenset(name for name, mask in masks.items() if not mask.any())
    going: list[frozenset[str]] = []
    for family in [*_layers(linked), *_listed(linked, blocks)]:
        mostly_dead = [names for names in family if len(names & dead) * 2 >= len(names) > 0]
        # One of them stays: a loop of no rounds and an empty list tell nothing of what they held.
        going += mostly_dead[: len(family) - 1]
    while going:
        names = frozenset[str]().union(*going)
        removed = Removed(names, names - dead)
        left = _still_read(linked, removed, *_bypasses(linked, removed))
        if not left:
            return removed
        going = [each for each in going if not each & left]
    return NOTHING


def remove(linked: TracedNetwork, removed: Removed) -> None:
    """Takes what reads some params out of a function, in place, and the params out of its loops.

    Raises:
      ValueError: the function needs one of them.
    """
    if not removed.names:
        return
    found, rounds = _bypasses(linked, removed)
    if left := _still_read(linked, removed, found, rounds):
        raise ValueError(
            f"the plan takes out {', '.join(sorted(left))}, but this function is not the identity there when "
            "it is zero, so it needs it."
        )
    region, gone = linked.region, {id(linked.values[name]) for name in removed.names}
    for op in region.ops:
        op.inputs[:] = [_resolved(value, found) for value in op.inputs]
    region.outputs[:] = [_resolved(value, found) for value in region.outputs]
    for roll in _loops(region):
        for one in roll.rounds:
            one.given[:] = [_resolved(value, found) for value in one.given]
            one.made[:] = [_resolved(value, found) for value in one.made]
    for stack in linked.made:
        layers = tuple(_resolved(layer, found) for layer in stack.layers)
        if any(new is not old for new, old in zip(layers, stack.layers, strict=True)):
            # What made all layers at once would read what went.
            stack.layers, stack.op = layers, None
    linked.region = prune_dead(Region(region.inputs, region.outputs, region.ops), rounds)
    linked.removed = removed.names
    linked.gone.update(gone)
    families = [[v for v in values if not is_gone(v, gone)] for values in linked.stacked]
    linked.families = [*(values for values in families if values), *aligned(linked.region)]


def _layers(linked: TracedNetwork) -> Iterator[list[frozenset[str]]]:
    """The layers of stacks that loops run along: for each, the params of all stacks that belong together."""
    name_of = {id(value): name for name, value in linked.values.items()}
    together: list[set[str]] = []
    for roll in _loops(linked.region):
        paths = set[str]()
        for op in linked.region.ops:
            if any(other is roll for other, _ in op.rolls):
                names = (name for value in op.inputs for name in _made_of(value, name_of))
                paths |= {linked.paths[name][0] for name in names}
        paths = {path for path in paths if len(linked.stacks.get(path, ())) == 1}
        for other in [each for each in together if each & paths]:
            together.remove(other)
            paths |= other
        if paths:
            together.append(paths)
    # Layers that are read by index: those of stacks of one length may belong together.
    rest = {
        p: axes for p, axes in linked.stacks.items() if len(axes) == 1 and not any(p in t for t in together)
    }
    lengths = {path: linked.leaves[path].shape[axes[0]] for path, axes in rest.items()}
    together += [{p for p in rest if lengths[p] == length} for length in sorted(set(lengths.values()))]
    for paths in together:
        by_index: dict[tuple[int, ...], set[str]] = {}
        for name, (path, index) in linked.paths.items():
            if path in paths:
                by_index.setdefault(index, set()).add(name)
        yield list(map(frozenset, by_index.values()))


def _made_of(value: Value, name_of: Mapping[int, str]) -> Iterator[str]:
    """The names of the params that a value is, or was made of layer by layer."""
    if id(value) in name_of:
        yield name_of[id(value)]
    elif value.op is not None and value.op.lazy:
        for given in value.op.inputs:
            yield from _made_of(given, name_of)


def _listed(linked: TracedNetwork, blocks: Collection[str]) -> Iterator[list[frozenset[str]]]:
    """The blocks of each list or dict that are laid out alike."""
    families: dict[Any, list[frozenset[str]]] = {}
    for block in blocks:
        names = frozenset(name for name, (path, _) in linked.paths.items() if path.startswith(f"{block}/"))
        paths = sorted({linked.paths[name][0] for name in names})
        layout = tuple((path.removeprefix(block), tuple(linked.leaves[path].shape)) for path in paths)
        families.setdefault((block.rpartition("/")[0], layout), []).append(names)
    yield from families.values()


def _loops(region: Region) -> list[Roll]:
    """The outermost loops over layers of a region."""
    return list({id(op.rolls[0][0]): op.rolls[0][0] for op in region.ops if op.rolls}.values())


def _resolved(value: Value, found: Mapping[int, Value]) -> Value:
    while id(value) in found:
        value = found[id(value)]
    return value


def _bypasses(linked: TracedNetwork, removed: Removed) -> tuple[dict[int, Value], set[_Round]]:
    """What can be read in place of what depends on some params, if these are zero.

    Returns:
      By the id of a value, another that it equals; and the rounds of loops that read the params.
    """
    gone = {id(linked.values[name]) for name in removed.names}
    zero = removed.names - removed.alive
    ops = linked.region.ops
    rounds = {(id(roll), n) for op in ops if _reads(op, gone) for roll, n in op.rolls[:1]}
    zeros = {
        path: [
            np.ones(size, bool) if path in zero and isinstance(size, (int, np.integer)) else None
            for size in value.shape
        ]
        for path, value in linked.values.items()
    }
    facts = linked.facts(zeros)
    # What a loop carries into a round stands for itself: only within one round it may equal another value.
    equal = aliases(Region(linked.region.inputs, [], [op for op in ops if not op.memo.get("carried")]), facts)
    found: dict[int, Value] = {}
    tainted = set(gone)
    for op in ops:
        inputs = [_resolved(value, found) for value in op.inputs]
        depends = any(id(each) in tainted for value in inputs for each in with_layers(value))
        leaves = bool(op.rolls) and (id(op.rolls[0][0]), op.rolls[0][1]) in rounds
        for output in op.outputs:
            other = equal.get(id(output))
            if op.memo.get("carried") and leaves:
                found[id(output)] = inputs[0]
            elif depends and other is not None and id(root := _resolved(other, found)) not in tainted:
                found[id(output)] = root
            elif depends:
                tainted.update(map(id, with_layers(output)))
    return found, rounds


def _reads(op: Op, ids: Collection[int]) -> bool:
    """Whether an op reads some layers, or what was made of them outside of loops."""
    return any(is_gone(each, ids) for value in op.inputs for each in with_layers(value))


def _still_read(
    linked: TracedNetwork, removed: Removed, found: Mapping[int, Value], rounds: Collection[_Round]
) -> frozenset[str]:
    """The params among some that the function needs even if they are zero, given their `_bypasses`."""
    name_of = {id(linked.values[name]): name for name in removed.names}
    read: set[int] = set()

    def note(value: Value) -> None:
        read.update(id(each) for each in with_layers(_resolved(value, found)))

    for output in linked.region.outputs:
        note(output)
    left = set[str]()
    for op in reversed(linked.region.ops):
        if not (op.bind.has_effects or any(id(v) in read for out in op.outputs for v in with_layers(out))):  # type: ignore[attr-defined]
            continue
        for value in op.inputs:
            note(value)
        if op.rolls and (id(op.rolls[0][0]), op.rolls[0][1]) in rounds:
            # The round does something else that is needed: all of its params stay.
            roll, number = op.rolls[0]
            of_round = [o for o in linked.region.ops if o.rolls[:1] == ((roll, number),)]
            left |= {name for o in of_round for v in o.inputs for name in _made_of(v, name_of)}
    return frozenset(left | {name for key, name in name_of.items() if key in read})
