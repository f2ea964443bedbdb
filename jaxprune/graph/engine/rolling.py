"""One loop again from the rounds of a loop over layers, where these differ only in which slices they take.

Let round r of the dense loop be f(carry, x_r), with x_r the slices of the stacks for layer r. Replayed, it is
f_r: f with every value cut to the slices that layer r keeps. If all layers keep equally many slices along
every axis, the f_r apply the same ops to arrays of the same shapes; they differ only in the constant index
vectors p_r1, p_r2, ... at which they take slices. So f_r(carry, x_r) = g(carry, x_r, p_r), with one g, and

    scan(f_r over r) = scan(g, over (x_r, p_r)),   p stacked to a table with a row for each layer.

To find g, each round is traced twice: first noting its index vectors in order; then with those vectors that
differ between rounds as inputs (the others stay constants). If the jaxprs of all rounds are equal then, that
jaxpr is g. If they are not, or if shapes or numbers of vectors differ, `LayersDifferError` is raised and the
rounds are replayed one after the other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.engine import placing
from jaxprune.graph.engine.ir import LayerLoop, Op, Value
from jaxprune.graph.engine.positions import LayersDifferError, Positions, tables
from jaxprune.graph.engine.rules.slices import take_slices
from jaxprune.graph.engine.same_program import are_same_program

if TYPE_CHECKING:
    from jaxprune.graph.engine.replay import Replay


def run_rounds_as_loop(replay: "Replay", loop: LayerLoop, ops: Sequence[Op], level: int) -> dict[int, Any]:
    """Return the outputs of a loop over layers, run as one loop, by the ids of their values.

    `ops` are those of the rounds that are left; `level` says how many other loops the loop lies in.

    Raises:
      LayersDifferError: the rounds differ in more than which slices they take.
    """
    numbers = sorted({op.rounds[level][1] for op in ops})
    count, place = len(numbers), {number: n for n, number in enumerate(numbers)}
    # The ops of each round, without the copies of this loop's carry: its values are the carry of the scan.
    ops_of: list[list[Op]] = [[] for _ in numbers]
    for op in ops:
        if not op.memo.get("carried") or len(op.rounds) > level + 1:
            ops_of[place[op.rounds[level][1]]].append(op)
    made_here = {id(output) for op in ops for output in op.outputs}
    # Values from outside: constants of the scan where all rounds read the same one, else slices of a stack.
    columns = _read_from_outside(ops_of, made_here)
    sliced = [values for values in columns if any(value is not values[0] for value in values)]
    for values in columns:
        if all(value is values[0] for value in values):
            replay.read(values[0])
    xs = [_read_as_stack(replay, values) for values in sliced]

    def is_made(value: Value) -> bool:
        """Whether a value is made at all: one that nobody reads has lost its op."""
        inside = value.op is not None and any(loop is other for other, _ in value.op.rounds)
        return id(value) in made_here or not inside

    rounds = [loop.rounds[number] for number in numbers]
    carried = [n for n, value in enumerate(rounds[0].carry_out) if is_made(value)]
    stacked = [n for n, value in enumerate(rounds[0].slices_out) if is_made(value)]
    first, last = (rounds[-1], rounds[0]) if loop.reverse else (rounds[0], rounds[-1])
    initial = [replay.read(_copied(first.carry_in[n])) for n in carried]

    def one_round(number: int, positions: Positions, differs: Sequence[bool] | None) -> Any:
        """Return a round as a function of its carry, its slices, and the positions that differ."""

        def step(carry: Sequence[Any], slices: Sequence[Any], rows: Sequence[Any]) -> Any:
            this, arrays = rounds[number], dict(replay.arrays)
            arrays.update((id(this.carry_in[n]), array) for n, array in zip(carried, carry, strict=True))
            arrays.update((id(v[number]), array) for v, array in zip(sliced, slices, strict=True))
            inner = replay.with_arrays(arrays, positions.start(differs, rows))
            inner.apply_all(ops_of[number], level + 1)
            given = [inner.read(this.carry_out[n]) for n in carried]
            return given, [inner.read(this.slices_out[n]) for n in stacked]

        return step

    # Trace each round to note where it takes slices, then again with those positions that differ as inputs.
    slices = [jax.eval_shape(lambda x: x[0], x) for x in xs]
    noted = [Positions() for _ in range(count)]
    for number, positions in enumerate(noted):
        jax.eval_shape(one_round(number, positions, None), initial, slices, [])
    differs, found = tables(noted)
    # In a round of an outer loop, these tables may in turn differ between the rounds of that loop.
    outer = replay.positions
    hoisted = found if outer is None else [outer.hoisted(table) for table in found]
    rows = [jax.ShapeDtypeStruct(table.shape[1:], table.dtype) for table in found]
    steps = [one_round(number, positions, differs) for number, positions in enumerate(noted)]
    if not are_same_program([jax.make_jaxpr(step)(initial, slices, rows) for step in steps]):
        raise LayersDifferError
    carry, stacks = lax.scan(
        lambda carry, x: steps[0](carry, *x),
        initial,
        (xs, [jnp.asarray(table) for table in hoisted]),
        length=count,
        reverse=loop.reverse,
        unroll=loop.unroll,
    )
    outputs = dict(zip((id(last.carry_out[n]) for n in carried), carry, strict=True))
    return outputs | dict(zip((id(loop.stacks[n]) for n in stacked), stacks, strict=True))


def _copied(value: Value) -> Value:
    """Return the value that a loop copies into a round."""
    assert value.op is not None
    return value.op.inputs[0]


def _read_from_outside(rounds: Sequence[Sequence[Op]], made_here: set[int]) -> list[tuple[Value, ...]]:
    """Return what the rounds of a loop read that none of them makes: for each, the values of all rounds."""
    if any([op.name for op in ops] != [op.name for op in rounds[0]] for ops in rounds):
        raise LayersDifferError
    columns: dict[tuple[int, ...], tuple[Value, ...]] = {}
    for ops in zip(*rounds, strict=True):
        for values in zip(*(op.inputs for op in ops), strict=True):
            inside = [id(value) in made_here or value.constant is not None for value in values]
            if any(inside) and not all(inside):
                raise LayersDifferError
            if not any(inside):
                values = _stacks_of(values)
                columns[tuple(map(id, values))] = values
    return list(columns.values())


def _stacks_of(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Return the stacks that the rounds read slices of, if each reads a stack of its own.

    An inner loop over the same layers needs all of such a stack.
    """
    while parts := [value.part for value in values if value.part is not None]:
        if len(parts) < len(values) or all(part.stack is parts[0].stack for part in parts):
            break
        if any((part.axis, part.index) != (parts[0].axis, parts[0].index) for part in parts):
            break
        values = tuple(part.stack for part in parts)
    return values


def _read_as_stack(replay: "Replay", values: Sequence[Value]) -> Any:
    """Return the arrays of values, one for each layer, along a new first axis."""
    parts = [value.part for value in values if value.part is not None]
    if len(parts) == len(values) and all(part.stack is parts[0].stack for part in parts):
        stack, axis, _ = parts[0]
        indices = [replay.row(stack, p.index) if axis == stack.along else p.index for p in parts]
        array = replay.read(stack)
        if indices != list(range(array.shape[axis])):
            array = take_slices(placing.gather(array, (axis,)), axis, np.array(indices))
        return array if axis == 0 else jnp.moveaxis(array, axis, 0)
    arrays = [replay.read(value) for value in values]
    if any(array.shape != arrays[0].shape for array in arrays):
        raise LayersDifferError
    return jnp.stack(arrays)
