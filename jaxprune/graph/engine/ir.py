"""The intermediate representation that the engine works on; `tracing` makes it from a function.

A `Region` is a list of `Op`s from inputs to outputs; every value is made once and knows the op that made
it. Calls (`jit`) are inlined. A primitive with bodies, such as a scan, is one op with a region for each
body. Each axis of each value has a node in the program's `AxisGraph`.

A *stack* is a value one axis of which counts layers, such as the stacked params of a scan. Its layers are
values with nodes of their own, so that each can lose different slices. A scan over layers stands in a region
round by round, and its ops name the `LayerLoop` that they were.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.tracing.jaxprs import scan_split

_MAX_CONCRETE = 2**20


class Part(NamedTuple):
    """Where a slice lies in the stack that it is a slice of.

    Attributes:
      stack: the stack.
      axis: the axis of the stack that the slice is taken along.
      index: the index on that axis.
    """

    stack: "Value"
    axis: int
    index: int


@dataclass(eq=False)
class Value:
    """One array of a program.

    Attributes:
      shape: the dense shape.
      dtype: the dtype.
      axes: the node of each axis.
      op: the op that makes it; None for an input or a constant.
      constant: its array, for a constant.
      layers: for a stack, its slices along `along`; the nodes in `axes` of the stack itself are not used.
        Layers are stacks themselves where several axes count layers.
      along: the axis that counts layers.
      source: for a stack that was taken apart into layers, the value without layers that it was.
      part: for a slice of a stack, where it lies in the stack.
      sharding: how it is sharded over explicit axes of a mesh; None where it is not.
    """

    shape: tuple[Any, ...]
    dtype: Any
    axes: tuple[int, ...]
    op: "Op | None" = None
    constant: Any = None
    layers: tuple["Value", ...] = ()
    along: int = 0
    source: "Value | None" = None
    part: Part | None = None
    sharding: Any = None


@dataclass(eq=False)
class Region:
    """A list of ops without branches.

    Attributes:
      inputs: the values passed in.
      outputs: the values passed out; inputs and constants may be among them.
      ops: the ops, in the order in which they are applied.
    """

    inputs: list[Value]
    outputs: list[Value]
    ops: list["Op"]


@dataclass(eq=False)
class Op:
    """One application of a primitive.

    Attributes:
      name: the primitive's name.
      params: its parameters.
      inputs, outputs: its values.
      bind: applies the primitive as traced to new inputs and returns a list of outputs.
      source: the line of the user's code it comes from, as "file:line"; see `jaxprs.place`.
      has_effects: whether it has effects besides its outputs, so that it stays even if nobody reads these.
      regions: its bodies by name, as the rules of calls expect them.
      memo: what a rule computed once and needs again.
      rounds: the loops over layers that it stands in, outermost first, each with the number of the round.
      lazy: whether it is applied only when its output is read: true of what an op on a stack does in one
        layer, since the op itself may be applied to all layers at once.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    bind: Callable[..., list[Any]]
    source: str
    has_effects: bool = False
    regions: dict[str, Region] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    rounds: tuple[tuple["LayerLoop", int], ...] = ()
    lazy: bool = False

    def __str__(self) -> str:
        if self.source.startswith("<"):  # shapes, where no line is known
            return f"{self.name} of {self.source[1:-1]}"
        return f"{self.name} at {self.source}"


@dataclass(eq=False)
class Round:
    """One round of a loop over layers.

    Attributes:
      carry_in: the values carried into the round.
      carry_out: the values carried out of it.
      slices_out: the round's slices of the outputs that are stacked.
    """

    carry_in: list[Value]
    carry_out: list[Value]
    slices_out: list[Value]


@dataclass(eq=False)
class LayerLoop:
    """A loop over layers (a scan) whose rounds stand in the program one after the other.

    So each layer has constraints of its own. Where all layers keep the same number of slices, replaying
    makes one loop of the rounds again.

    Attributes:
      rounds: the rounds, by the number of the layer.
      reverse: whether the last layer comes first.
      unroll: how many rounds XLA is to do at once.
      stacks: the stacks made of the `slices_out` of all rounds.
      bind: applies the loop as traced to new inputs.
      inputs: the inputs of the loop as traced.
      outputs: all outputs of the loop as traced.
    """

    rounds: list[Round]
    reverse: bool
    unroll: Any
    stacks: list[Value]
    bind: Callable[..., list[Any]]
    inputs: list[Value]
    outputs: list[Value]


class Body(NamedTuple):
    """A body of an op, and which inputs of the op it takes.

    Attributes:
      name: its name among the op's regions.
      region: the body.
      given: the inputs of the op, in the order of those of the body; a derivative takes tangents after them.
      consts: how many of these all rounds of a loop take alike; all of them, where the body runs once.
      carried: how many follow that each round passes on to the next; of the rest each round takes a slice.
    """

    name: str
    region: Region
    given: list[Value]
    consts: int
    carried: int


def bodies_of(op: Op) -> list[Body]:
    """Return the bodies of an op, its derivatives included."""
    found = []
    for name, region in op.regions.items():
        given, consts, carried = op.inputs, len(op.inputs), 0
        if op.name == "cond":
            given, consts = op.inputs[1:], len(op.inputs) - 1
        elif op.name == "scan":
            consts, carried = scan_split(op.params)
        elif op.name == "while":
            first, second, carried = op.params["cond_nconsts"], op.params["body_nconsts"], len(op.outputs)
            if name == "condition":
                given, consts = [*op.inputs[:first], *op.inputs[first + second :]], first
            else:
                given, consts = op.inputs[first:], second
        found.append(Body(name, region, given, consts, carried))
    return found


class Program(NamedTuple):
    """A traced function.

    Attributes:
      graph: the axes of all values.
      region: the function; its inputs are the leaves of the arguments, in order.
      out_tree: the structure of its output.
      stacks: by the number of an input, the axes that count layers.
      stacked: all values that have layers.
    """

    graph: AxisGraph
    region: Region
    out_tree: Any
    stacks: dict[int, tuple[int, ...]]
    stacked: list[Value]


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; symbolic ones may be compared only with themselves."""
    return a is b or bool(a == b)


def other_axes(value: Value, *some: Collection[int]) -> list[int]:
    """Return the axes of a value that are not among some, in order."""
    return [axis for axis in range(len(value.shape)) if not any(axis in axes for axes in some)]


def is_differentiable(value: Any) -> bool:
    """Whether a value or an abstract value has a tangent."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def read_by(region: Region) -> set[int]:
    """Return the ids of the values that a region's ops and outputs read, and of their layers."""
    read: set[int] = set()
    for value in (*region.outputs, *(value for op in region.ops for value in op.inputs)):
        read.update(map(id, with_layers(value)))
    return read


def with_layers(value: Value) -> Iterator[Value]:
    """Yield a value, its layers, and the layers of these."""
    yield value
    for layer in value.layers:
        yield from with_layers(layer)


def is_removed(value: Value, removed: Collection[int]) -> bool:
    """Whether a layer of a stack is among those removed, given by their ids, or is made of one."""
    if id(value) in removed:
        return True
    op = value.op
    return op is not None and op.lazy and any(is_removed(given, removed) for given in op.inputs)


def flat_layers(value: Value) -> Iterator[Value]:
    """Yield the values without layers that a value consists of, in row-major order."""
    if not value.layers:
        yield value
    for layer in value.layers:
        yield from flat_layers(layer)


def any_constant(region: Region, holds: Callable[[Any], bool]) -> bool:
    """Whether a predicate holds for any constant that a region or one of its bodies reads."""
    read = [*region.outputs, *(value for op in region.ops for value in op.inputs)]
    if any(value.constant is not None and holds(value.constant) for value in read):
        return True
    return any(any_constant(inner, holds) for op in region.ops for inner in op.regions.values())


def concrete(value: Value) -> np.ndarray | None:
    """Return the array that a value is in every call, if it is computed from constants alone.

    None if it is not, if it is large, or if it holds keys of random numbers.
    """
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return None
    if value.constant is not None:
        if isinstance(value.constant, Tracer) or np.size(value.constant) > _MAX_CONCRETE:
            return None
        return np.asarray(value.constant)
    op = value.op
    if op is None or op.regions or any(not isinstance(n, int) for n in value.shape):
        return None
    if np.prod(value.shape, dtype=np.int64) > _MAX_CONCRETE:
        return None
    inputs = [concrete(given) for given in op.inputs]
    if any(given is None for given in inputs):
        return None
    with jax.ensure_compile_time_eval():
        outputs = op.bind(*inputs)
    return np.asarray(outputs[next(n for n, out in enumerate(op.outputs) if out is value)])
