"""Proves that a network passes a residual block's input on when the block's params are zero.

A block is given by its params alone; which ops form the block follows from the program. Values that depend on
the params are followed from op to op until they end, in one of two ways:

- an op passes another value on (`identity.aliases`): `x + f(x)` is `x` where `f(x)` is zero. If that value
  is one that the block read, the block's input goes on and nothing else of the block does: a *pass*;
- nothing reads them.

A block all of whose values end is the identity. Those of others reach an output of the network: a layer
without a residual path gives zeros to the next layer, a norm that belongs to the block and follows its sum
gives zeros as well, and a gate scales what should pass.

There is a second proof, in `shortening`, for `compact`. It asks less: whether a program reads some params at
all once they are zero. It can remove several blocks at once, and single rounds of unrolled loops. This one
proves one block at a time, requires that the block's *input* passes on, names the op to blame, and checks a
layer of a loop in the body of the loop. The top of `shortening` says why neither can stand in for the other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.identity import Aliases, aliases, inlined, unchanged_outputs
from jaxprune.graph.engine.ir import Op, Region, Value
from jaxprune.graph.engine.rules import learn_region
from jaxprune.tracing.jaxprs import scan_split

# Ops that rearrange entries of one input and do not combine them.
_LAYOUT = frozenset(
    (
        *("slice", "dynamic_slice", "gather", "split", "unstack", "squeeze", "reshape", "expand_dims"),
        *("transpose", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "rev"),
        *("optimization_barrier", "sharding_constraint", "reshard", "device_put", "pvary"),
    )
)

Values = dict[int, Value]
"""A set of values, by id."""


@dataclass(eq=False)
class Mark:
    """A value that depends on the params of the block."""

    bare: bool = True  # made from params and constants alone, not from data of the network
    read: Values = field(default_factory=dict)  # the values independent of the block that it was made from
    # Those of `read` that params of the block were combined with directly: the inputs of the block.
    met: Values = field(default_factory=dict)
    part: bool = False  # it holds entries of the block beside those of other blocks, only rearranged
    zero: bool = True  # the entries of the block in it are zero


class Pass(NamedTuple):
    """An op whose output equals an input of the block, because the rest of the block is zero."""

    op: Op
    output: Value
    source: Value  # the value that the output equals


class Roots(NamedTuple):
    """What the values of a region depend on."""

    constant: set[int]  # the ids of the values that are made from constants alone
    data: set[int]  # the ids of those that depend on the inputs of the network
    param: set[int]  # the ids of those that depend on its params


def roots_of(region: Region, params: Iterable[Value], data: Iterable[Value]) -> Roots:
    """Return what the values of a region depend on, given which inputs are params and which are data."""
    of_params, of_data = set(map(id, params)), set(map(id, data))
    given, constant = set(map(id, region.inputs)), set[int]()

    def note(value: Value) -> None:
        if value.op is None and id(value) not in given:
            constant.add(id(value))

    for op in region.ops:
        for value in op.inputs:
            note(value)
        if all(id(value) in constant for value in op.inputs):
            constant.update(map(id, op.outputs))
        for made_of in (of_params, of_data):
            if any(id(value) in made_of for value in op.inputs):
                made_of.update(map(id, op.outputs))
    for value in region.outputs:
        note(value)
    return Roots(constant, of_data, of_params)


class Passage:
    """Follows the params of one block through a program in which they are zero."""

    def __init__(self, facts: Facts, others: Facts | None = None):
        """Starts with the facts of all values if the params of the block are zero.

        For params that hold several blocks, `others` are the facts if those of the others are zero instead.
        """
        self.facts, self.others = facts, others
        # In order: the ops that pass on an input of the block, and those that read its params.
        self.passes: list[Pass] = []
        self.readers: list[Op] = []
        # Those whose outputs depend on the block and are neither constant nor passed on, each with those of
        # its inputs that are data independent of the block.
        self.changed: list[tuple[Op, list[Value]]] = []
        self.in_loops: list[Op] = []  # the ops that change the carry of a loop over layers

    def follow(self, region: Region, marked: Mapping[int, Mark], roots: Roots) -> dict[int, Mark]:
        """Return by id all values of a region that depend on the block, given the marks of inputs that do.

        Checkpoints of the region are `inlined`; `roots` says what its values depend on.
        """
        level = _Level(self, region, dict(marked), roots)
        for op in region.ops:
            if any(id(value) in level.marks for value in op.inputs):
                level.step(op)
        return level.marks

    def reason(self, outputs: Sequence[Mark], found: Aliases) -> str:
        """Return why the block is not the identity, given the marks of outputs that depend on it."""
        if self.in_loops:
            return f"what {self.in_loops[0]} gives is not what the layer was given"
        inputs = {key: value for mark in outputs for key, value in mark.met.items()}
        for op, independent in self.changed:
            # An op that scales or gates an input of the block, not a later layer that is fed its zeros.
            if any(made_from(each, value, found) for each in inputs.values() for value in independent):
                return f"{op} changes the block's input, or mixes it with what the block gives"
        if not self.readers:
            return "its params reach an output by themselves"
        return f"{self.readers[-1]} gives zeros, or another constant, and not the block's input"


class _Level:
    """One region that a `Passage` follows a block through."""

    def __init__(self, passage: Passage, region: Region, marks: dict[int, Mark], roots: Roots):
        self.passage, self.region, self.marks, self.roots = passage, region, marks, roots
        self.facts = passage.facts
        self.found: Aliases = aliases(region, passage.facts)

    def step(self, op: Op) -> None:
        """Mark the outputs of an op that reads marked values."""
        given = [self.marks[id(value)] for value in op.inputs if id(value) in self.marks]
        if op.name == "inline":
            for value, output in zip(op.inputs, op.outputs, strict=True):
                if id(value) in self.marks:
                    self.marks[id(output)] = self.marks[id(value)]
            return None
        if op.name == "scan" and any(mark.part for mark in given):
            return self._scan_of_layers(op)
        if op.name in _LAYOUT and op.inputs and id(op.inputs[0]) in self.marks and given[0].part:
            return self._lay_out(op, given[0])
        merged = self._merged(op, given)
        if merged.bare or any(mark.bare for mark in given):
            self.passage.readers.append(op)
        inner: set[int] | None = None
        for place, output in enumerate(op.outputs):
            root = self.found.get(id(output))
            if self.facts.of(output).fill is not None:
                self.marks[id(output)] = merged
            elif root is not None:
                if id(root) in self.marks:
                    self.marks[id(output)] = self.marks[id(root)]
                elif self._passes(root, merged):
                    self.passage.passes.append(Pass(op, output, root))
                else:
                    self._change(op, output, merged)
            else:
                inner = self._marked_by_bodies(op) if inner is None else inner
                if place in inner:
                    self._change(op, output, merged)
        return None

    def _change(self, op: Op, output: Value, mark: Mark) -> None:
        self.marks[id(output)] = mark
        independent = [v for v in op.inputs if id(v) not in self.marks and id(v) in self.roots.data]
        self.passage.changed.append((op, independent))

    def _merged(self, op: Op, given: Sequence[Mark]) -> Mark:
        """Return the mark of what an op makes from marked values and others."""
        others = {
            id(value): value
            for value in op.inputs
            if id(value) not in self.marks and id(value) not in self.roots.constant
        }
        read = {key: value for mark in given for key, value in mark.read.items()} | others
        met = {key: value for mark in given for key, value in mark.met.items()}
        if any(mark.bare for mark in given):
            met |= read
        bare = all(mark.bare for mark in given) and not any(key in self.roots.data for key in others)
        return Mark(bare, read, met)

    def _passes(self, root: Value, mark: Mark) -> bool:
        """Whether a value that is passed on is an input of the block, so that no other input is lost.

        In a layer without a residual path the input is lost: the next layer adds a bias to the zeros of this
        one, and passes the bias on.
        """
        if not mark.met:
            return True
        lost = any(key in self.roots.data for key in mark.met)
        if lost and id(root) not in self.roots.data:
            return False
        return any(made_from(value, root, self.found) for value in mark.met.values())

    def _lay_out(self, op: Op, mark: Mark) -> None:
        """Mark the outputs of an op on params of several blocks; some may belong to this block alone."""
        others = self.passage.others
        assert others is not None
        for output in op.outputs:
            if self.facts.all_zero(output):
                self.marks[id(output)] = Mark()
            elif not others.all_zero(output):
                self.marks[id(output)] = mark

    def _scan_of_layers(self, op: Op) -> None:
        """Follow a loop over layers, one of which is the block: its body has to return its carry."""
        body = op.regions["body"]
        consts, carried = scan_split(op.params)
        mine = [n for n, value in enumerate(op.inputs) if id(value) in self.marks]
        if any(n < consts + carried or not self.marks[id(op.inputs[n])].part for n in mine):
            for output in op.outputs:
                self._change(op, output, Mark())
            return
        facts = Facts()
        for place, (value, inner) in enumerate(zip(op.inputs, body.inputs, strict=True)):
            if place in mine and self.marks[id(value)].zero:
                facts.learn(inner, fill=0)
            elif place < consts:
                facts.learn(inner, self.facts.of(value).zero, self.facts.of(value).fill)
        learn_region(body, facts)
        body = inlined(body)
        found, kept = aliases(body, facts), unchanged_outputs(body, facts)
        reached = {id(body.inputs[n]) for n in mine}
        for inner in body.ops:
            if any(id(value) in reached for value in inner.inputs):
                reached.update(map(id, inner.outputs))
        for place, (inner, output) in enumerate(zip(body.outputs, op.outputs, strict=True)):
            if id(inner) not in reached:
                continue
            root = found.get(id(inner), inner)
            same = kept.get(place) == consts + place if place < carried else id(root) not in reached
            if not same:
                makers = [each for each in body.ops if any(output is root for output in each.outputs)]
                self.passage.in_loops.append((makers or [op])[0])
                self.marks[id(output)] = Mark()
            elif place < carried:
                self.passage.passes.append(Pass(op, output, op.inputs[consts + place]))

    def _marked_by_bodies(self, op: Op) -> set[int]:
        """Return the numbers of the outputs that depend on the block: all, unless its bodies show less."""
        every = set(range(len(op.outputs)))
        if op.name == "cond" and id(op.inputs[0]) not in self.marks:
            branches = op.regions.values()
            return set().union(*(self._run_body(branch, op.inputs[1:]) for branch in branches))
        if op.name == "scan":
            return self._run_body(op.regions["body"], op.inputs, *scan_split(op.params))
        return every

    def _run_body(self, body: Region, inputs: Sequence[Value], first: int = 0, carried: int = 0) -> set[int]:
        """Return the numbers of the outputs of a body that depend on the block, as some of its inputs do.

        What is carried into a round depends on the block if it does so when carried out: repeated until no
        more of the carry depends on it.
        """
        pairs = list(zip(inputs, body.inputs, strict=True))
        body = inlined(body)
        marks = {id(inner): self.marks[id(outer)] for outer, inner in pairs if id(outer) in self.marks}
        roots = roots_of(
            body,
            [inner for outer, inner in pairs if id(outer) in self.roots.param],
            [inner for outer, inner in pairs if id(outer) in self.roots.data],
        )
        while True:
            before = len(self.passage.passes)
            after = self.passage.follow(body, marks, roots)
            new = {
                id(taken): after[id(given)]
                for taken, given in zip(body.inputs[first : first + carried], body.outputs, strict=False)
                if id(given) in after and id(taken) not in marks
            }
            if not new:
                return {place for place, value in enumerate(body.outputs) if id(value) in after}
            del self.passage.passes[before:]
            marks |= new


def made_from(value: Value, source: Value, found: Aliases) -> bool:
    """Whether a value is another one or is made from it, following aliases."""
    seen, left = set[int](), [value]
    while left:
        value = left.pop()
        value = found.get(id(value), value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value is source:
            return True
        if value.op is not None:
            left += value.op.inputs
    return False
