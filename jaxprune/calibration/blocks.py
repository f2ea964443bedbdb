"""The blocks of a network: the parts between places where a single array is alive.

A jaxpr is a list of equations. After each of them some arrays are alive: computed, and still to be read. What
depends on the inputs alone (an attention mask, positions) can be computed again anywhere, and so can what
depends on the params alone. Only what is made of both carries the network's work onward. Where one such
array is alive, the residual stream say, all that follows is a function of it.

Such places are many: a plain layer `relu(x @ w + b)` has three. A block begins only where a product of params
with data follows, and has at least one. A scan over stacked layers, whose carry is the array, has a block in
each step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxprune.graph.engine.rules.elementwise import ELEMENTWISE
from jaxprune.tracing.dataflow import PRODUCTS
from jaxprune.tracing.jaxprs import (
    binder,
    called_jaxpr,
    inner_jaxprs,
    interpret,
    nested_jaxprs,
    of_first,
    place,
    scan_split,
    trace,
)

_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
"""The calls that are dissolved. Those with derivatives of their own stay whole, and keep them."""

Key = tuple[str, int | None]
"""A leaf by path, and the layer of it that is read; None for all of it."""


class Literal(NamedTuple):
    """An operand that is a number of the jaxpr."""

    value: Any


class Op(NamedTuple):
    """An equation of a network whose calls are dissolved.

    Attributes:
      eqn: the equation.
      inputs: for each operand the number of a value, or a `Literal`.
      outputs: the numbers of the values that it makes.
      source: the line of the user's code.
    """

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    source: str


class Network:
    """A function of params and inputs as a list of equations.

    Attributes:
      ops: the equations in order.
      leaves: for each path of the params the number of its value.
      inputs: the same for the inputs, by their path in the tuple of inputs.
      consts: arrays that the jaxpr holds, by number.
      outputs: numbers of values, or `Literal`.
      avals: shapes and dtypes by number.
    """

    def __init__(self, function: Callable[..., Any], params: Any, inputs: Sequence[Any]):
        closed, order = trace(function, (params, *inputs))
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.consts: dict[int, Any] = {}
        numbers = [self._new(var.aval) for var in closed.jaxpr.invars]
        self.leaves: dict[str, int] = {}
        self.inputs: dict[str, int] = {}
        for name, number in zip(order, numbers, strict=True):
            path = of_first(name)
            if path is not None:
                self.leaves[path] = number
            else:
                first, _, rest = name.partition("/")
                self.inputs[f"{int(first) - 1}" + (f"/{rest}" if rest else "")] = number
        self.outputs = self._inline(closed, numbers, "")

    def _new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _constant(self, array: Any) -> int:
        number = self._new(array)
        self.consts[number] = array
        return number

    def _inline(self, closed: Any, inputs: list[Any], called_at: str) -> list[Any]:
        def handle(eqn: Any, given: list[Any]) -> list[Any]:
            source = place(eqn, called_at)
            if eqn.primitive.name in _INLINED:
                return self._inline(called_jaxpr(eqn), given, source)
            outputs = tuple(self._new(var.aval) for var in eqn.outvars)
            self.ops.append(Op(eqn, tuple(given), outputs, source))
            return list(outputs)

        return interpret(closed, inputs, handle, self._constant, lambda it: Literal(it.val))

    def made_of(self, start: Sequence[int]) -> set[int]:
        """Return the numbers of the values that depend on some values, with these."""
        found = set(start)
        for op in self.ops:
            if not found.isdisjoint(_numbers(op.inputs)):
                found.update(op.outputs)
        return found

    def needed(self, outputs: Sequence[Any], given: Sequence[int] = ()) -> tuple[list[Op], set[int]]:
        """Return the equations that compute some values from given ones, and all values that these read."""
        wanted = set(_numbers(outputs)) - set(given)
        ops = []
        for op in reversed(self.ops):
            if not wanted.isdisjoint(op.outputs):
                ops.append(op)
                wanted.update(n for n in _numbers(op.inputs) if n not in given)
        return ops[::-1], wanted | set(given)

    def read_leaves(self) -> list[str]:
        """Return the paths of the leaves that the outputs depend on."""
        _, read = self.needed(self.outputs)
        return [path for path, number in self.leaves.items() if number in read]

    def compute(self, ops: Sequence[Op], values: Mapping[int, Any], outputs: Sequence[Any]) -> list[Any]:
        """Run some equations on the values that they need, and return the values asked for."""
        env = {**self.consts, **values}

        def read(atom: Any) -> Any:
            return atom.value if isinstance(atom, Literal) else env[atom]

        for op in ops:
            made = binder(op.eqn)(*map(read, op.inputs))
            env.update(zip(op.outputs, made, strict=True))
        return list(map(read, outputs))


def _numbers(atoms: Sequence[Any]) -> list[int]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


class Block(NamedTuple):
    """A part of a network, as a function.

    Attributes:
      name: what it is called in reports.
      reads: the leaves, or layers of leaves, that it reads, without those that no block may tune.
      fixed: the paths of the other leaves that it reads.
      run: `run(values, fixed, state, inputs)` returns the arrays after it, given those before it (none before
        the first block): `values` for `reads`, in order; `fixed` by path; `inputs` are the arrays of a batch
        by path. Steps of a scan share one such function.
    """

    name: str
    reads: tuple[Key, ...]
    fixed: tuple[str, ...]
    run: Callable[..., list[Any]]


def find_blocks(network: Network, tunable: Sequence[str], shared: Sequence[str]) -> list[Block]:
    """Return the blocks of a network, in the order in which they run.

    Args:
      network: the network.
      tunable: the paths of the leaves that may be tuned.
      shared: those of leaves that are the same in the dense network, and stay so: what is made of them and of
        the inputs alone can be computed again anywhere, as if they were constants.

    Raises:
      ValueError: there is a single block, because nowhere inside the network a single array is alive.
    """
    return _Finder(network, tunable, shared).blocks()


class _Part(NamedTuple):
    """What lies between two neighbouring places where one array is alive.

    Attributes:
      ops: its equations that depend on params and inputs.
      before: the number of the array before it, in a tuple; empty at the start.
      after: the number of the array after it; at the end all outputs.
      loop: a scan over layers, if it consists of that; else None.
      multiplies: whether it has a product of params with data.
    """

    ops: list[Op]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    loop: "_Loop | None"
    multiplies: bool


class _Loop(NamedTuple):
    """A scan whose steps are blocks.

    Attributes:
      op: its equation.
      sliced: for each of the arrays that it slices the leaf and the equations that make it of the leaf, each
        an elementwise one; None for an array that is not made of a leaf that may be tuned.
    """

    op: Op
    sliced: list[tuple[str, list[Op]] | None]


class _Finder:
    def __init__(self, network: Network, tunable: Sequence[str], shared: Sequence[str]):
        self.network, self.tunable = network, [path for path in network.leaves if path in tunable]
        self.of_params = network.made_of([n for path, n in network.leaves.items() if path not in shared])
        self.of_data = network.made_of(list(network.inputs.values()))
        self.mixed = self.of_params & self.of_data
        self.kernels = network.made_of(list(network.leaves.values())) - self.of_data
        self.of_tunable = network.made_of([network.leaves[path] for path in tunable])
        self.ops = [op for op in network.ops if not self.mixed.isdisjoint(op.outputs)]
        self.alive = self._alive()

    def blocks(self) -> list[Block]:
        groups: list[list[_Part]] = []
        for part in self._parts():
            # A block ends before the next product: what lies between, a bias say, belongs to it.
            joins = groups and part.loop is None and groups[-1][-1].loop is None
            if joins and not (part.multiplies and any(one.multiplies for one in groups[-1])):
                groups[-1].append(part)
            else:
                groups.append([part])
        blocks: list[Block] = []
        for group in groups:
            if group[0].loop is not None:
                blocks += self._steps(group[0].loop, group[0].before, group[0].after)
            else:
                blocks.append(self._block(group[0].before, group[-1].after))
        if len(blocks) < 2:
            raise ValueError(self._refusal())
        names = (f"block {number}" for number in range(len(blocks)))
        return [block._replace(name=next(names)) if block.reads else block for block in blocks]

    def _alive(self) -> list[list[int]]:
        """Return the arrays that are alive after each equation of `ops`."""
        end = len(self.ops)
        last = dict.fromkeys(self.mixed.intersection(_numbers(self.network.outputs)), end)
        for position, op in reversed(list(enumerate(self.ops))):
            for number in self.mixed.intersection(_numbers(op.inputs)):
                last.setdefault(number, position)
        alive: list[list[int]] = []
        now: list[int] = []
        for position, op in enumerate(self.ops):
            now = [n for n in (*now, *op.outputs) if last.get(n, -1) > position]
            alive.append(now)
        return alive

    def _parts(self) -> list[_Part]:
        parts, start, before = [], 0, ()
        for position, now in enumerate(self.alive[:-1]):
            alone = len(now) == 1 and jnp.issubdtype(self.network.avals[now[0]].dtype, jnp.floating)
            if alone and (now[0],) != before:
                parts.append(self._part(self.ops[start : position + 1], before, (now[0],)))
                start, before = position + 1, (now[0],)
        parts.append(self._part(self.ops[start:], before, tuple(self.network.outputs)))
        return parts

    def _part(self, ops: list[Op], before: tuple[Any, ...], after: tuple[Any, ...]) -> _Part:
        return _Part(ops, before, after, self._loop(ops, before, after), any(map(self._multiplies, ops)))

    def _multiplies(self, op: Op) -> bool:
        numbers = set(_numbers(op.inputs))
        if numbers.isdisjoint(self.kernels) or numbers.isdisjoint(self.of_data):
            return False
        return op.eqn.primitive.name in PRODUCTS or any(
            eqn.primitive.name in PRODUCTS
            for body in inner_jaxprs(op.eqn)
            for jaxpr in nested_jaxprs(body)
            for eqn in jaxpr.jaxpr.eqns
        )

    def _loop(self, ops: list[Op], before: tuple[Any, ...], after: tuple[Any, ...]) -> _Loop | None:
        """Return the scan that a part consists of, if its steps are blocks."""
        if len(ops) != 1 or ops[0].eqn.primitive.name != "scan" or not self._multiplies(ops[0]):
            return None
        (op,) = ops
        consts, carried = scan_split(op.eqn.params)
        carry, sliced = op.inputs[consts : consts + carried], op.inputs[consts + carried :]
        outside = self.mixed.intersection(_numbers([*op.inputs[:consts], *sliced]))
        if outside or self.of_data.intersection(_numbers(sliced)):
            return None
        if set(_numbers(before)) - set(_numbers(carry)) or set(_numbers(after)) - set(op.outputs[:carried]):
            return None
        made = [None if isinstance(atom, Literal) else self._of_leaf(atom) for atom in sliced]
        whole = [atom for atom, of_leaf in zip(sliced, made, strict=True) if of_leaf is None]
        # A stack that is transposed or computed with first has no layers to tune one by one.
        if self.of_tunable.intersection(_numbers(whole)) or not any(made):
            return None
        return _Loop(op, made)

    def _of_leaf(self, number: int) -> tuple[str, list[Op]] | None:
        """Return the leaf that a value is made of, entry by entry, and the equations that do it."""
        ops: list[Op] = []
        makers = {output: op for op in self.network.ops for output in op.outputs}
        leaves = {self.network.leaves[path]: path for path in self.tunable}
        while number not in leaves:
            op = makers.get(number)
            if op is None or op.eqn.primitive.name not in ELEMENTWISE or len(_numbers(op.inputs)) != 1:
                return None
            ops.insert(0, op)
            (number,) = _numbers(op.inputs)
        return leaves[number], ops

    def _fixed(self, read: set[int], reads: Sequence[Key]) -> tuple[str, ...]:
        """Return the paths of the leaves among some values, without those that are read as `reads`."""
        others = self.network.leaves.keys() - {path for path, _ in reads}
        return tuple(
            path for path in self.network.leaves if path in others and self.network.leaves[path] in read
        )

    def _values(self, reads: Sequence[Key], values: Sequence[Any], fixed: Any, inputs: Any) -> dict[int, Any]:
        given = {self.network.leaves[path]: array for path, array in fixed.items()}
        given |= {self.network.inputs[path]: array for path, array in inputs.items()}
        pairs = zip(reads, values, strict=True)
        return given | {self.network.leaves[path]: array for (path, layer), array in pairs if layer is None}

    def _block(self, before: tuple[Any, ...], after: tuple[Any, ...]) -> Block:
        ops, read = self.network.needed(after, before)
        reads = tuple((path, None) for path in self.tunable if self.network.leaves[path] in read)

        def run(values: Sequence[Any], fixed: Any, state: Sequence[Any], inputs: Any) -> list[Any]:
            given = self._values(reads, values, fixed, inputs) | dict(zip(before, state, strict=True))
            return self.network.compute(ops, given, after)

        return Block("", reads, self._fixed(read, reads), run)

    def _steps(self, loop: _Loop, before: tuple[Any, ...], after: tuple[Any, ...]) -> list[Block]:
        """Return a block for each step; the arrays between them are the number of the step and its carry."""
        op, network = loop.op, self.network
        params = op.eqn.params
        consts, carried = scan_split(params)
        atoms, ends, length = op.inputs, consts + carried, params["length"]
        enter_ops, enter_read = network.needed(atoms[consts:ends], before)
        # What every step reads besides: constants of the loop, and stacks that are not tuned.
        others = [
            *atoms[:consts],
            *(a for a, of in zip(atoms[ends:], loop.sliced, strict=True) if of is None),
        ]
        ops, read = network.needed(others)
        of_all: list[Key] = [(path, None) for path in self.tunable if network.leaves[path] in read]
        stacks = [of_leaf for of_leaf in loop.sliced if of_leaf is not None]
        paths = list(dict.fromkeys(path for path, _ in stacks))

        def enter(values: Any, fixed: Any, state: Sequence[Any], inputs: Any) -> list[Any]:
            given = self._values((), (), fixed, inputs) | dict(zip(before, state, strict=True))
            first = jnp.asarray(length - 1 if params["reverse"] else 0, jnp.int32)
            return [first, *network.compute(enter_ops, given, atoms[consts:ends])]

        def run(values: Sequence[Any], fixed: Any, state: Sequence[Any], inputs: Any) -> list[Any]:
            number, *carry = state
            layers = dict(zip(paths, values, strict=False))
            given = self._values(of_all, values[len(paths) :], fixed, inputs)
            computed = iter(network.compute(ops, given, others))
            of_loop = [next(computed) for _ in range(consts)]
            slices = [
                lax.dynamic_index_in_dim(jnp.asarray(next(computed)), number, 0, keepdims=False)
                if of_leaf is None
                else self._layer(of_leaf, layers[of_leaf[0]])
                for of_leaf in loop.sliced
            ]
            outputs = interpret(
                params["jaxpr"], [*of_loop, *carry, *slices], lambda eqn, given: binder(eqn)(*given)
            )
            return [number - 1 if params["reverse"] else number + 1, *outputs[:carried]]

        def leave(values: Any, fixed: Any, state: Sequence[Any], inputs: Any) -> list[Any]:
            return [state[1 + op.outputs.index(number)] for number in after]

        order = range(length)[::-1] if params["reverse"] else range(length)
        fixed = self._fixed(read, of_all)
        steps = [Block("", (*((path, layer) for path in paths), *of_all), fixed, run) for layer in order]
        return [Block("", (), self._fixed(enter_read, ()), enter), *steps, Block("", (), (), leave)]

    def _layer(self, of_leaf: tuple[str, list[Op]], layer: Any) -> Any:
        """Return a layer of a stack, given that of the leaf."""
        for op in of_leaf[1]:
            layer = binder(op.eqn)(*(a.value if isinstance(a, Literal) else layer for a in op.inputs))[0]
        return layer

    def _refusal(self) -> str:
        products = [position for position, op in enumerate(self.ops) if self._multiplies(op)]
        inside = range(products[0], products[-1]) if products else range(0)
        if not inside:
            return (
                "recover finds no blocks to tune one by one: the network has a single product of params with "
                "data. Leave by_block out."
            )
        least = min(inside, key=lambda position: len(self.alive[position]))
        makers = {output: op for op in self.ops for output in op.outputs}
        made = [makers[n] for n in self.alive[least] if n in makers]
        listed = ", ".join(sorted({f"{op.eqn.primitive.name} of {op.source}" for op in made}))
        return (
            "recover finds no blocks to tune one by one: there is no place between two products where a "
            f"single array is alive. The fewest are {len(made)}, made by {listed}. Leave by_block out, and "
            "tune the network as a whole."
        )
