"""The small program that the rest of the package works on; `tracing` makes it from a function.

A `Region` is a list of `Op`s from inputs to outputs; every value is made once and knows what made
it. Calls (`jit`) are inlined. What has bodies of its own, a scan say, is one op with a region for
each body. Each axis of each value has a node in the program's `AxisGraph`.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.graph.engine.axes import AxisGraph

_MAX_CONCRETE = 2**20


@dataclass(eq=False)
class Value:
    """One array of a program.

    Attributes:
      shape: the dense shape.
      dtype: the dtype.
      axes: the node of each axis.
      op: what makes it; None for an input or a constant.
      constant: its array, for a constant.
      layers: for a stack, its slices along `along`, each with nodes of its own; those of the stack itself
        say nothing. They are nested where several axes count layers.
      along: the axis that counts layers.
      source: for a stack, the value without layers that it is.
      part: for a slice of a stack, the stack, the axis and the index.
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
    part: "tuple[Value, int, int] | None" = None
    sharding: Any = None


@dataclass(eq=False)
class Region:
    """A straight list of ops.

    Attributes:
      inputs: the values passed in.
      outputs: the values passed out; inputs and constants may be among them.
      ops: what is done, in order.
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
      bind: applies the primitive as it was to new inputs, giving a list of outputs.
      source: the line of the user's code it comes from, as "file:line"; see `jaxprs.place`.
      regions: its bodies by name, as the rules of calls expect them.
      memo: what a rule found out and will want again.
      rolls: the loops that it is one round of, from the outermost, each with the number of the round.
      lazy: whether it is applied only if its output is read: what an op on a stack is in one layer.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    bind: Callable[..., list[Any]]
    source: str
    regions: dict[str, Region] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    rolls: tuple[tuple["Roll", int], ...] = ()
    lazy: bool = False

    def __str__(self) -> str:
        if self.source.startswith("<"):  # shapes, where no line is known
            return f"{self.name} of {self.source[1:-1]}"
        return f"{self.name} at {self.source}"


@dataclass(eq=False)
class Round:
    """One round of a loop over layers.

    Attributes:
      taken: what is carried in.
      given: what is carried out.
      made: the slices of the outputs that are stacked.
    """

    taken: list[Value]
    given: list[Value]
    made: list[Value]


@dataclass(eq=False)
class Roll:
    """A loop over layers (a scan), each round of which stands in the program by itself.

    So each layer has constraints of its own. Where the layers keep equal numbers of slices, replaying
    makes one loop of them again.

    Attributes:
      rounds: by the number of the layer.
      reverse: whether the last layer comes first.
      unroll: how many rounds XLA is to do at once.
      outputs: the stacks made of `made`.
      bind: applies the loop as it was to new inputs.
      inputs: its inputs, as they were.
      results: all its outputs, as they were.
    """

    rounds: list[Round]
    reverse: bool
    unroll: Any
    outputs: list[Value]
    bind: Callable[..., list[Any]]
    inputs: list[Value]
    results: list[Value]


class Program(NamedTuple):
    """A traced function.

    Attributes:
      graph: the axes of all values.
      region: the function; its inputs are the leaves of the arguments, in order.
      out_tree: the structure of its output.
      stacks: by the number of an input, the axes that count layers.
      made: the values that have layers.
    """

    graph: AxisGraph
    region: Region
    out_tree: Any
    stacks: dict[int, tuple[int, ...]]
    made: list[Value]


def is_differentiable(value: Any) -> bool:
    """Whether a value or an abstract value has a tangent."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def read_by(region: Region) -> set[int]:
    """The ids of the values that a region's ops and outputs read, and of the layers of stacks among them."""
    read: set[int] = set()
    for value in (*region.outputs, *(value for op in region.ops for value in op.inputs)):
        read.update(map(id, with_layers(value)))
    return read


def with_layers(value: Value) -> Iterator[Value]:
    """A value, its layers, and theirs."""
    yield value
    for layer in value.layers:
        yield from with_layers(layer)


def is_gone(value: Value, gone: Collection[int]) -> bool:
    """Whether a layer of a stack went, by the ids of those that did, or was made of one."""
    if id(value) in gone:
        return True
    op = value.op
    return op is not None and op.lazy and any(is_gone(given, gone) for given in op.inputs)


def flat_layers(value: Value) -> Iterator[Value]:
    """The values without layers that a value consists of, in row-major order; itself if it has none."""
    if not value.layers:
        yield value
    for layer in value.layers:
        yield from flat_layers(layer)


def any_constant(region: Region, holds: Callable[[Any], bool]) -> bool:
    """Whether something holds of a constant that a region reads."""
    read = [*region.outputs, *(value for op in region.ops for value in op.inputs)]
    if any(value.constant is not None and holds(value.constant) for value in read):
        return True
    return any(any_constant(inner, holds) for op in region.ops for inner in op.regions.values())


def concrete(value: Value) -> np.ndarray | None:
    """The array a value is in every call, if that follows from constants alone; no keys of random numbers."""
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
