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
    """Where a slice lies in the stack that it is a slice of."""

    stack: "Value"
    axis: int  # of the stack, that the slice is taken along
    index: int  # on that axis


@dataclass(eq=False)
class Value:
    """One array of a program.

    A stack has `layers`, its slices along the axis `along`, and the nodes in its own `axes` are not used. The
    layers are stacks themselves where several axes count layers.
    """

    shape: tuple[Any, ...]  # dense
    dtype: Any
    axes: tuple[int, ...]  # the node of each axis
    op: "Op | None" = None  # the op that makes it; None for an input or a constant
    constant: Any = None  # its array, for a constant
    layers: tuple["Value", ...] = ()
    along: int = 0
    source: "Value | None" = None  # for a stack that was taken apart, the value without layers that it was
    part: Part | None = None  # for a slice of a stack, where it lies in the stack
    sharding: Any = None  # how it is sharded over explicit axes of a mesh; None where it is not


@dataclass(eq=False)
class Region:
    """A list of ops without branches."""

    inputs: list[Value]
    outputs: list[Value]  # inputs and constants may be among them
    ops: list["Op"]  # in the order in which they are applied


@dataclass(eq=False)
class Op:
    """One application of a primitive."""

    name: str  # of the primitive
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    bind: Callable[..., list[Any]]  # applies the primitive as traced to new inputs
    source: str  # the line of the user's code that it comes from, as "file:line"; see `jaxprs.place`
    has_effects: bool = False  # besides its outputs, so that it stays even if nobody reads these
    regions: dict[str, Region] = field(default_factory=dict)  # its bodies by name, as the rules expect them
    memo: dict[str, Any] = field(default_factory=dict)  # what a rule computed once and needs again
    # The loops over layers that it stands in, outermost first, each with the number of the round.
    rounds: tuple[tuple["LayerLoop", int], ...] = ()
    # Whether it is applied only when its output is read: true of what an op on a stack does in one layer,
    # since the op itself may be applied to all layers at once.
    lazy: bool = False

    def __str__(self) -> str:
        if self.source.startswith("<"):  # shapes, where no line is known
            return f"{self.name} of {self.source[1:-1]}"
        return f"{self.name} at {self.source}"


@dataclass(eq=False)
class Round:
    """One round of a loop over layers."""

    carry_in: list[Value]  # the values carried into the round
    carry_out: list[Value]  # the values carried out of it
    slices_out: list[Value]  # the round's slices of the outputs that are stacked


@dataclass(eq=False)
class LayerLoop:
    """A loop over layers (a scan) whose rounds stand in the program one after the other.

    So each layer has constraints of its own. Where all layers keep the same number of slices, replaying
    makes one loop of the rounds again.
    """

    rounds: list[Round]  # by the number of the layer
    reverse: bool  # whether the last layer comes first
    unroll: Any  # how many rounds XLA is to do at once
    stacks: list[Value]  # the stacks made of the `slices_out` of all rounds
    bind: Callable[..., list[Any]]  # applies the loop as traced to new inputs
    inputs: list[Value]  # the inputs of the loop as traced
    outputs: list[Value]  # all outputs of the loop as traced


class Body(NamedTuple):
    """A body of an op, and which inputs of the op it takes.

    The first `consts` of its inputs all rounds of a loop take alike (all, where the body runs once); the next
    `carried` each round passes on to the next; of the rest each round takes a slice.
    """

    name: str  # among the op's regions
    region: Region
    given: list[Value]  # the op's inputs in the order of the body's; a derivative takes tangents after them
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
    """A traced function."""

    graph: AxisGraph  # the axes of all values
    region: Region  # the function; its inputs are the leaves of the arguments, in order
    out_tree: Any  # the structure of its output
    stacks: dict[int, tuple[int, ...]]  # by the number of an input, the axes that count layers
    stacked: list[Value]  # all values that have layers


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
