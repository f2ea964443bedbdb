"""A network run layer by layer, on all batches at once, with a stop before each product that is to be solved.

`LockStep` walks the jaxpr of a network in the order in which it runs. It does not run an equation when it
comes to it, but keeps it pending. When it comes to a product whose kernel is to be solved, it runs all
pending equations as one program, a segment, for one batch after the other. So the data that the product reads
is there for all batches, computed with the leaves as solved so far. Then the leaf is solved and replaced, and
the walk goes on with the product itself. In all this is one forward pass.

The bodies of scans over stacked layers are walked once for each step. A kernel that is used in several
places, as a recurrent one is, is solved at the first of them, on statistics that a pass of the whole network
gathers.
"""

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.calibration.gathering import gather, rows_of, run_with_weights
from jaxprune.calibration.matrices import gram_of_rows, sums_of_rows
from jaxprune.calibration.parts import Part, View
from jaxprune.calibration.programs import PROGRAMS
from jaxprune.calibration.row_weights import Known, RowWeights, of_input
from jaxprune.calibration.survey import Site
from jaxprune.tracing.dataflow import PRODUCTS, ConstValue, Product, Visitor, passed_on, visit_products
from jaxprune.tracing.jaxprs import binder, close, of_first, scan_split
from jaxprune.tracing.leaf_views import LeafView, of_leaf, slice_of_scan

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn

_numbers = count()
_taken = jax.jit(lambda array, number: lax.dynamic_index_in_dim(array, number, 0, keepdims=False))


def _take(array: Any, number: int) -> Any:
    """Return one entry along the first axis; of an array on the host only that goes to the device.

    It is copied, because a leaf on the host is written to while the walk goes on.
    """
    return jnp.array(array[number]) if isinstance(array, np.ndarray) else _taken(array, number)


class Moments(NamedTuple):
    """What a product reads on all batches, for each of its matrices.

    Attributes:
      rows: (batch,), how many rows.
      total: (batch, inputs), their sum.
      gram: (batch, inputs, inputs), the sum of x x^T.
      dense_total: the sum of what the dense network has in place of these rows; None if that is not asked
        for.
      dense_gram: the sum of y y^T, with y the dense network's rows.
      cross: the sum of y x^T.
    """

    rows: Any
    total: Any
    gram: Any
    dense_total: Any = None
    dense_gram: Any = None
    cross: Any = None


Solve = Callable[[Part, tuple[int, ...], Callable[[], Moments]], None]
"""`solve(part, index, moments)` solves one layer of a part, on what `moments()` returns, and replaces it by
`LockStep.change_layer`."""


class _Lane(NamedTuple):
    """A value on one batch: the array, and the arrays of the weights of its rows."""

    array: Any
    weights: tuple[Any, ...]


class _Node:
    """A value that depends on data, on all batches.

    Attributes:
      own: by batch, the value in the network as solved so far; None while it is pending.
      dense: the same in the dense network; None if it is not kept apart from `own`.
      axes: for each array of weights the axes of the value that it lies along; None for lost axes, which
        are in `lost`.
    """

    __slots__ = ("__weakref__", "aval", "axes", "dense", "lost", "number", "own")

    def __init__(self, aval: Any):
        self.aval, self.number = aval, next(_numbers)
        self.own: list[_Lane] | None = None
        self.dense: list[_Lane] | None = None
        self.axes: tuple[tuple[int, ...], ...] = ()
        self.lost: tuple[int, ...] = ()

    def set_known(self, known: Known) -> tuple[Any, ...]:
        """Note along which axes weights are known, and return their arrays."""
        arrays = [one for one in known if one.array is not None]
        self.axes = tuple(one.axes for one in arrays)
        self.lost = tuple(axis for one in known if one.array is None for axis in one.axes)
        return tuple(one.array for one in arrays)

    def known(self, weights: Sequence[Any]) -> Known:
        """Return what is known of the weights of a value."""
        pairs = (RowWeights(array, axes) for array, axes in zip(weights, self.axes, strict=True))
        return (*pairs, *(RowWeights(None, (axis,)) for axis in self.lost))


class _Pending(NamedTuple):
    eqn: Any
    inputs: tuple[Any, ...]  # nodes that have values, const values, numbers of pending nodes
    outputs: tuple[tuple[int, Any], ...]  # the number of each node, and a weak reference to it


class _AllSolvedError(Exception):
    """Ends the walk once all leaves are solved: the rest of the network need not run."""


class LockStep:
    """A walk of a network on all batches.

    Attributes:
      leaves: by path, the leaves as solved so far.
      programs: the programs that segments and solvers run as.
    """

    def __init__(
        self,
        closed: "ClosedJaxpr",
        names: Sequence[str],
        batches: Sequence[Mapping[str, Any]],
        weights: Sequence[Any] | None,
        leaves: Mapping[str, Any],
        parts: Mapping[str, Sequence[Part]],
        *,
        with_dense: bool,
    ):
        self.closed, self.names, self.batches, self.weights = closed, names, batches, weights
        self.weighted = weights is not None
        self.with_dense = with_dense
        self.dense_leaves, self.leaves = dict(leaves), dict(leaves)
        self.changes = dict.fromkeys(leaves, 0)
        self.sites = {use.stack: (part, use) for each in parts.values() for part in each for use in part.uses}
        self.unsolved = {
            (part.site.stack, index): part
            for each in parts.values()
            for part in each
            for index in part.layers()
        }
        self.programs, self.pending, self.last = PROGRAMS, list[_Pending](), None
        self.refused: dict[str, str] = {}
        self.passes: dict[Any, Any] = {}
        self.solve: Solve = lambda part, index, moments: None

    def run(self, solve: Solve) -> None:
        """Walk the network, and solve each of its leaves when the walk comes to it."""
        self.solve = solve
        values: list[Any] = []
        for name in self.names:
            path = of_first(name)
            values.append(self.input(name) if path is None else self.param(path))
        with contextlib.suppress(_AllSolvedError):
            self.walk(self.closed, values, ())

    def change(self, path: str, leaf: Any) -> None:
        """Replace a leaf."""
        self.leaves[path] = leaf
        self.changes[path] += 1

    def change_layer(self, view: View, index: tuple[int, ...], layer: Any) -> None:
        """Replace a layer of a leaf; of a stacked leaf on the host one copy is made, at the first time."""
        leaf = self.leaves[view.path]
        copied = leaf is not self.dense_leaves[view.path]
        self.change(view.path, view.with_layer(leaf, index, layer, in_place=copied))

    def input(self, name: str) -> _Node:
        """Return an input of the network."""
        arrays = [jnp.asarray(batch[name]) for batch in self.batches]
        node = _Node(jax.typeof(arrays[0]))
        if self.weights is None:
            node.own = [_Lane(array, ()) for array in arrays]
        else:
            known = [of_input(array.shape, each) for array, each in zip(arrays, self.weights, strict=True)]
            node.own = [_Lane(a, node.set_known(each)) for a, each in zip(arrays, known, strict=True)]
        return node

    def param(self, path: str) -> ConstValue:
        """Return a leaf in two versions, as solved so far and dense."""

        def versions() -> tuple[Any, ...]:
            own = self.leaves[path]
            return (own, self.dense_leaves[path]) if self.with_dense and self.changes[path] else (own,)

        shape = np.shape(self.leaves[path])
        return ConstValue((path,), versions, lambda: ("param", path), lambda: of_leaf(path, shape))

    def walk(
        self,
        closed: "ClosedJaxpr",
        values: Sequence[Any],
        index: tuple[int, ...],
        stack: tuple[int, ...] = (),
        called_at: str = "",
    ) -> list[Any]:
        """Walk a jaxpr inside scans that are at the steps `index`."""

        def product(found: Product, data: Any) -> list[Any] | None:
            entry = self.sites.get(found.stack)
            if entry is not None:
                self.at(*entry, found, self.node(data), index)
            return None

        def other(eqn: "JaxprEqn", args: list[Any]) -> list[Any]:
            inside = (*stack, id(eqn))
            if eqn.primitive.name == "scan" and self.within(inside):
                return self.scan(eqn, args, index, inside)
            if eqn.primitive.name == "cond" and self.within(inside):
                return self.cond(eqn, args, index, inside)
            return self.pend(eqn, args)

        def stamp(paths: Sequence[str]) -> Any:
            return tuple(self.changes[path] for path in paths)

        return visit_products(closed, values, Visitor(product, other, stamp), called_at, stack)

    def node(self, value: Any) -> _Node:
        """Return a value as data; an array that the trace closed over is the same on all batches."""
        if isinstance(value, _Node):
            return value
        node = _Node(jax.typeof(value))
        node.own = [_Lane(value, ())] * len(self.batches)
        return node

    def within(self, stack: tuple[int, ...]) -> bool:
        """Return whether an equation has products inside that are still to be solved."""
        return bool(self.unsolved_within(stack))

    def unsolved_within(self, stack: tuple[int, ...]) -> list[Part]:
        """Return the parts that products inside an equation read and that are still to be solved."""
        found: dict[int, Part] = {}
        for part in self.unsolved.values():
            if any(use.stack[: len(stack)] == stack for use in part.uses):
                found[id(part)] = part
        return list(found.values())

    # At a product

    def at(self, part: Part, site: Site, found: Product, data: _Node, index: tuple[int, ...]) -> None:
        """Solve the layer of a part that a product is about to multiply by."""
        layer = tuple(index[level] for level in site.view.levels)
        key = part.site.stack, layer
        if key not in self.unsolved:
            return
        if len(part.uses) > 1 or part.site.reused:
            self.solve_early([part])
            return
        others = [self.node(other) if not isinstance(other, ConstValue) else other for other in found.others]
        self.flush([data, *(other for other in others if isinstance(other, _Node))])
        self.solved(part, layer, lambda: self.moments(site, found.eqn, data, others))

    def solved(self, part: Part, layer: tuple[int, ...], moments: Callable[[], Moments]) -> None:
        """Solve a layer of a part."""
        self.solve(part, layer, moments)
        del self.unsolved[part.site.stack, layer]
        if not self.unsolved:
            raise _AllSolvedError

    def moments(self, site: Site, eqn: "JaxprEqn", data: _Node, others: Sequence[Any]) -> Moments:
        """Return the sums over all batches of what a product reads."""
        if self.last is not None and self.last[0] is data and self.last[1] == site.form.shared is not None:
            return self.last[2]  # products that read the same rows: queries, keys and values

        def values(version: int) -> list[list[_Lane]]:
            each = [self.lanes(other, version) for other in others]
            return [list(lanes) for lanes in zip(self.lanes(data, version), *each, strict=True)]

        def rows(lanes: Sequence[_Lane]) -> Any:
            known = data.known(lanes[0].weights) if self.weighted else None
            return rows_of(site, eqn, lanes[0].array, known, [lane.array for lane in lanes[1:]])

        batch, inputs = site.form.batch, site.form.inputs

        def sums(own: Sequence[_Lane], dense: Sequence[_Lane] | None) -> Moments:
            read = rows(own)
            number, total = sums_of_rows(read)
            made = Moments(number, total, gram_of_rows(read))
            if dense is not None:
                target = rows(dense)
                made = made._replace(
                    dense_total=sums_of_rows(target)[1],
                    dense_gram=gram_of_rows(target),
                    cross=gram_of_rows(read, target),
                )
            return Moments(
                *(
                    None
                    if array is None
                    else jnp.broadcast_to(array, (batch, *(inputs,) * axes)).astype(jnp.float32)
                    for array, axes in zip(made, (0, 1, 2, 1, 2, 2), strict=True)
                )
            )

        def added(total: Moments, own: Sequence[_Lane], dense: Sequence[_Lane] | None) -> Moments:
            return jax.tree.map(jnp.add, total, sums(own, dense))

        own = values(0)
        dense: list[Any] = values(1) if self.with_dense else [None] * len(own)
        total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums, own[0], dense[0]))
        program = self.programs.compiled(added, total, own[0], dense[0], donate=True)
        for pair in zip(own, dense, strict=True):
            total = program(total, *pair)
        self.last = data, site.form.shared, total
        return total

    def solve_early(self, parts: Sequence[Part]) -> None:
        """Solve parts on statistics from a pass of the whole network as it is now, for their own output."""
        found = self.statistics(parts)
        for part in parts:
            for layer in part.layers():
                self.solved(part, layer, partial(found.__getitem__, (part.site.stack, layer)))

    def statistics(self, parts: Sequence[Part]) -> dict[tuple[tuple[int, ...], tuple[int, ...]], Moments]:
        """Return, by layer of a part, statistics from a pass of the whole network as it is now."""
        sites = {use.stack: use for part in parts for use in part.uses}
        key = frozenset(sites)
        if key not in self.passes:

            def run(inputs: dict[str, Any], weights: Any) -> Any:
                return gather(self.closed, inputs, sites, weights, gram=True)

            self.passes[key] = jax.jit(run)
        total: Any = None
        weights: Sequence[Any] = [None] * len(self.batches) if self.weights is None else self.weights
        for batch, weight in zip(self.batches, weights, strict=True):
            inputs: dict[str, Any] = {
                name: batch[name] if (path := of_first(name)) is None else self.leaves[path]
                for name in self.names
            }
            found = self.passes[key](inputs, weight)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        made = {}
        for part in parts:
            sums = [total[use.stack] for use in part.uses]
            one = jax.tree.map(lambda *arrays: sum(arrays[1:], arrays[0]), *sums)
            for layer in part.layers():
                made[part.site.stack, layer] = Moments(
                    one["rows"][layer], one["sum"][layer], one["gram"][layer]
                )
        return made

    # Pending equations, and segments

    def pend(self, eqn: "JaxprEqn", args: Sequence[Any]) -> list[_Node]:
        """Keep an equation until something needs what it makes."""
        read = {path for arg in args if isinstance(arg, ConstValue) for path in arg.paths}
        early = {id(part): part for part in self.unsolved.values() if part.site.path in read}
        kernel = self.kernel_of(eqn, args)
        early = {key: part for key, part in early.items() if part.site.path != kernel}
        if early:
            # The leaf is read before its product: looked up, say. It must not change any more after that.
            self.solve_early(list(early.values()))
        nodes = [_Node(var.aval) for var in eqn.outvars]
        inputs = []
        for arg in args:
            value = arg if isinstance(arg, ConstValue) else self.node(arg)
            inputs.append(value.number if isinstance(value, _Node) and value.own is None else value)
        outputs = tuple((node.number, weakref.ref(node)) for node in nodes)
        self.pending.append(_Pending(eqn, tuple(inputs), outputs))
        return nodes

    def kernel_of(self, eqn: "JaxprEqn", args: Sequence[Any]) -> str | None:
        """Return the leaf that a product multiplies by; it was solved when the walk came to the product."""
        views = [arg.view for arg in args[:2] if isinstance(arg, ConstValue)]
        paths = [view.path for view in views if isinstance(view, LeafView)]
        return paths[0] if paths and eqn.primitive.name in PRODUCTS else None

    def lanes(self, value: Any, version: int) -> list[_Lane]:
        """Return a value on all batches, in the network as solved so far (0) or in the dense one (1)."""
        if isinstance(value, ConstValue):
            assert value.versions is not None
            versions = value.versions()
            array = versions[min(version, len(versions) - 1)]
            # A leaf on the host goes to the device once, not once for each batch.
            array = jnp.array(array) if isinstance(array, np.ndarray) else array
            return [_Lane(array, ())] * len(self.batches)
        assert value.own is not None
        return value.own if version == 0 or value.dense is None else value.dense

    def flush(self, needed: Sequence[_Node]) -> None:
        """Run the pending equations, if a value that is needed is among what they make."""
        if all(node.own is not None for node in needed):
            return
        self.last = None  # what reads the same rows as the last product has been solved by now
        pending, self.pending = self.pending, []
        given: dict[int, Any] = {}
        for each in pending:
            for value in each.inputs:
                if not isinstance(value, int):
                    given[id(value)] = value
        kept = [node for each in pending for _, ref in each.outputs if (node := ref()) is not None]
        places = {key: place for place, key in enumerate(given)}
        values = list(given.values())
        known_of: list[Known] = []

        def segment(arrays: Sequence[_Lane]) -> list[_Lane]:
            env: dict[int, tuple[Any, Known]] = {}

            def read(value: Any) -> tuple[Any, Known]:
                if isinstance(value, int):
                    return env[value]
                lane = arrays[places[id(value)]]
                return lane.array, value.known(lane.weights) if isinstance(value, _Node) else ()

            for each in pending:
                pairs = list(map(read, each.inputs))
                inputs, known = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
                if self.weighted:
                    outputs, after = run_with_weights(each.eqn, inputs, known)
                else:
                    outputs = binder(each.eqn)(*inputs)
                    after = [()] * len(outputs)
                for (number, _), output, one in zip(each.outputs, outputs, after, strict=True):
                    env[number] = output, one
            known_of[:] = [env[node.number][1] for node in kept]
            return [
                _Lane(env[node.number][0], tuple(k.array for k in env[node.number][1] if k.array is not None))
                for node in kept
            ]

        def lanes(version: int) -> list[list[_Lane]]:
            return [
                list(each) for each in zip(*(self.lanes(value, version) for value in values), strict=True)
            ]

        own = lanes(0)
        program = self.programs.compiled(segment, own[0])
        for node, known in zip(kept, known_of, strict=True):
            node.set_known(known)
        made = [list(program(each)) for each in own]
        apart = self.with_dense and any(
            value.dense is not None if isinstance(value, _Node) else len(value.versions()) > 1
            for value in values
        )
        of_dense = [list(program(each)) for each in lanes(1)] if apart else None
        for place, node in enumerate(kept):
            node.own = [each[place] for each in made]
            node.dense = None if of_dense is None else [each[place] for each in of_dense]

    # Loops and branches

    def scan(
        self, eqn: "JaxprEqn", args: Sequence[Any], index: tuple[int, ...], stack: tuple[int, ...]
    ) -> list[Any]:
        """Walk the body of a scan step by step, if a slice of a leaf is solved in it."""
        level = len(index)
        inside = self.unsolved_within(stack)
        if shared := [part for part in inside if level not in part.site.view.levels or len(part.uses) > 1]:
            self.solve_early(shared)
        if not self.within(stack):
            return self.pend(eqn, args)
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carried = scan_split(eqn.params)
        fixed = [True] * consts + passed_on(body, consts, carried)
        carry = [
            arg if same or isinstance(arg, _Node) else self.as_node(arg)
            for arg, same in zip(args[consts : consts + carried], fixed[consts:], strict=True)
        ]
        sliced = [arg if isinstance(arg, ConstValue) else self.node(arg) for arg in args[consts + carried :]]
        self.flush([arg for arg in sliced if isinstance(arg, _Node)])
        rows: list[list[Any]] = [[] for _ in range(len(eqn.outvars) - carried)]
        steps = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        for step in steps:
            slices = [self.slice(arg, step, level) for arg in sliced]
            outputs = self.walk(body, [*args[:consts], *carry, *slices], (*index, step), stack)
            carry = [
                old if same else (new if isinstance(new, _Node) else self.as_node(new))
                for old, new, same in zip(carry, outputs[:carried], fixed[consts:], strict=True)
            ]
            for row, output in zip(rows, outputs[carried:], strict=True):
                row.append(output if isinstance(output, _Node) else self.as_node(output))
        if eqn.params["reverse"]:
            rows = [row[::-1] for row in rows]
        return [*carry, *map(self.stacked, rows)]

    def as_node(self, value: Any) -> _Node:
        """Return a const value, or an array, as data."""
        if not isinstance(value, ConstValue):
            return self.node(value)
        own, dense = self.lanes(value, 0), self.lanes(value, 1)
        node = _Node(jax.typeof(own[0].array))
        node.own = own
        assert value.versions is not None
        node.dense = dense if self.with_dense and len(value.versions()) > 1 else None
        return node

    def slice(self, value: Any, step: int, level: int) -> Any:
        """Return the slice of one step of what a scan runs along."""
        if isinstance(value, ConstValue):
            versions, view = value.versions, value.view
            assert versions is not None
            viewed = slice_of_scan(view, level) if isinstance(view, LeafView) else view
            return ConstValue(
                value.paths,
                lambda: tuple(_take(array, step) for array in versions()),
                lambda: ("scan", True, value.key),
                lambda: viewed,
            )
        node = _Node(jax.eval_shape(_taken, value.aval, 0))
        along = [axes[0] == 0 if axes else False for axes in value.axes]
        node.axes = tuple(tuple(axis - 1 for axis in axes if axis) for axes in value.axes)
        node.lost = tuple(axis - 1 for axis in value.lost if axis)

        def cut(lane: _Lane) -> _Lane:
            weights = [_take(w, step) if yes else w for w, yes in zip(lane.weights, along, strict=True)]
            return _Lane(_take(lane.array, step), tuple(weights))

        node.own = list(map(cut, value.own))
        node.dense = None if value.dense is None else list(map(cut, value.dense))
        return node

    def stacked(self, row: Sequence[_Node]) -> _Node:
        """Return the values of all steps along a new first axis."""
        self.flush(row)
        first = row[0]

        def joined(lanes: Sequence[_Lane]) -> _Lane:
            weights = [jnp.stack(each) for each in zip(*(lane.weights for lane in lanes), strict=True)]
            return _Lane(jnp.stack([lane.array for lane in lanes]), tuple(weights))

        node = _Node(None)
        node.axes = tuple((0, *(axis + 1 for axis in axes)) for axes in first.axes)
        node.lost = tuple(axis + 1 for axis in first.lost)
        node.own = [joined(lanes) for lanes in zip(*(self.lanes(each, 0) for each in row), strict=True)]
        if any(each.dense is not None for each in row):
            node.dense = [joined(lanes) for lanes in zip(*(self.lanes(each, 1) for each in row), strict=True)]
        node.aval = jax.typeof(node.own[0].array)
        return node

    def cond(
        self, eqn: "JaxprEqn", args: Sequence[Any], index: tuple[int, ...], stack: tuple[int, ...]
    ) -> list[Any]:
        """Walk the branch that all batches take; if they take several, leave its leaves as they are."""
        chosen = args[0]
        if isinstance(chosen, _Node):
            self.flush([chosen])
        lanes = [lane for version in (0, 1) for lane in self.lanes(chosen, version)]
        taken = {int(lane.array) for lane in lanes}
        if len(taken) > 1:
            for part in self.unsolved_within(stack):
                self.refused[part.site.path] = (
                    f"the batches take different branches of a cond ({part.site.source})"
                )
                layer = tuple(index[level] for level in part.site.view.levels if level < len(index))
                self.unsolved = {
                    (site, each): other
                    for (site, each), other in self.unsolved.items()
                    if site != part.site.stack or each[: len(layer)] != layer
                }
            return self.pend(eqn, args)
        number = min(taken.pop(), len(eqn.params["branches"]) - 1)
        branch = close(eqn.params["branches"][number])
        return self.walk(branch, args[1:], index, (*stack, number))
