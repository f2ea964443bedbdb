"""One pass of a network that also gathers statistics of what its products read."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxprune.calibration.matrices import (
    Rows,
    UnknownRowsError,
    gram_of_rows,
    squares_of_rows,
    sums_of_rows,
)
from jaxprune.calibration.row_weights import Known, RowWeights, agree, of_input, scan_with_weights, through
from jaxprune.calibration.survey import Site
from jaxprune.tracing.dataflow import ConstValue, Product, Visitor, inside_scan, param, visit_products
from jaxprune.tracing.jaxprs import binder, close, of_first

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn

Sums = dict[str, Any]
"""The statistics of one product: "rows" (layers..., batch), "sum" and "squares" (layers..., batch, inputs),
and in place of the squares "gram" (layers..., batch, inputs, inputs)."""

Found = dict[tuple[int, ...], Sums]
"""By `Site.stack`."""


class _Data(NamedTuple):
    """A value that depends on data, and what is known of the weights of its rows; None if all rows count."""

    array: Any
    known: Known | None


def gather(
    closed: "ClosedJaxpr",
    inputs: Mapping[str, Any],
    sites: Mapping[tuple[int, ...], Site],
    weights: Any = None,
    *,
    gram: bool,
) -> Found:
    """Run a jaxpr, and return the statistics of some of its products.

    Args:
      closed: the jaxpr of a function of (params, ...), and `inputs` its inputs by name, as
        `tracing.jaxprs.trace` returns them.
      sites: the products by `stack`.
      weights: how much each row counts, with the shape of the first axes of some input; None if all count.
      gram: whether to gather Gram matrices.

    Raises:
      UnknownRowsError: the weights of the rows of a product are not known.
    """
    values: list[Any] = []
    for name, array in inputs.items():
        path = of_first(name)
        if path is not None:
            values.append(param(path, lambda array=array: array, jnp.shape(array)))
        else:
            known = None if weights is None else of_input(jnp.shape(array), weights)
            values.append(_Data(array, known))
    gatherer = _Gatherer(sites, gram, weights is not None)
    found = gatherer.run(closed, values)[1]
    for error in gatherer.unknown.values():
        raise error
    return found


def rows_of(site: Site, eqn: "JaxprEqn", array: Any, known: Known | None, others: Sequence[Any]) -> Rows:
    """Return what a product reads as rows.

    Args:
      site: the product.
      eqn: its equation.
      array: the data that it multiplies.
      known: what is known of the weights of its rows; None if all count.
      others: its inputs behind the operands.

    Raises:
      UnknownRowsError: the weights are not known.
    """
    if known is not None and eqn.primitive.name == "conv_general_dilated":
        known = through(eqn, [known, ()], [array, None])[0]
    try:
        return site.form.rows(array, known, others)
    except UnknownRowsError:
        raise UnknownRowsError(site.path, site.source) from None


def on_automatic_axes(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Call a function of arrays that may be sharded over explicit axes of a mesh; what it returns is whole.

    On explicit axes each reshape and each contraction has to say how its result is sharded. Inside, XLA finds
    out, and adds up the statistics of all devices.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays)]
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return function(arrays)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=PartitionSpec())(arrays)


def run_with_weights(
    eqn: "JaxprEqn", arrays: Sequence[Any], known: Sequence[Known]
) -> tuple[list[Any], list[Known]]:
    """Run an equation, and return its outputs and what is known of the weights of their rows."""
    gatherer = _Gatherer({}, False, True)
    data = list(map(_Data, arrays, known))
    if eqn.primitive.name in ("scan", "cond"):
        run = gatherer.scan if eqn.primitive.name == "scan" else gatherer.cond
        outputs: Any = run(eqn, data, (), 0)[0]
    else:
        outputs = gatherer.plain(eqn, data)
    return [one.array for one in outputs], [one.known or () for one in outputs]


class _Gatherer:
    def __init__(self, sites: Mapping[tuple[int, ...], Site], gram: bool, weighted: bool):
        self.sites, self.gram, self.weighted = sites, gram, weighted
        self.unknown: dict[tuple[int, ...], UnknownRowsError] = {}  # by product, in its last run

    def data(self, value: Any) -> _Data:
        """Return any value as data."""
        if isinstance(value, _Data):
            return value
        array = value.value() if isinstance(value, ConstValue) else value
        return _Data(array, () if self.weighted else None)

    def run(
        self,
        closed: "ClosedJaxpr",
        values: Sequence[Any],
        stack: tuple[int, ...] = (),
        level: int = 0,
        called_at: str = "",
    ) -> tuple[list[Any], Found]:
        """Run a jaxpr that lies in `level` scans; return its outputs, and what was found in it."""
        found: Found = {}

        def product(product: Product, other: Any) -> list[Any] | None:
            site = self.sites.get(product.stack)
            if site is not None:
                found[product.stack] = self.statistics(site, product, self.data(other))
            return None

        def other(eqn: "JaxprEqn", args: list[Any]) -> list[Any]:
            inside = (*stack, id(eqn))
            # Weights are carried through loops and branches, whether or not something is gathered in them.
            entered = self.weighted or self.within(inside)
            if eqn.primitive.name == "scan" and entered:
                outputs, more = self.scan(eqn, args, inside, level)
            elif eqn.primitive.name == "cond" and entered:
                outputs, more = self.cond(eqn, args, inside, level)
            else:
                return self.plain(eqn, args)
            found.update(more)
            return outputs

        return visit_products(closed, values, Visitor(product, other), called_at, stack), found

    def within(self, stack: tuple[int, ...]) -> bool:
        """Return whether an equation has products inside that are gathered."""
        return any(site[: len(stack)] == stack for site in self.sites)

    def plain(self, eqn: "JaxprEqn", args: Sequence[Any]) -> list[Any]:
        """Run an equation as it is."""
        data = list(map(self.data, args))
        arrays = [one.array for one in data]
        outputs = binder(eqn)(*arrays)
        if not self.weighted:
            return [_Data(output, None) for output in outputs]
        known = through(eqn, [one.known or () for one in data], arrays)
        return [_Data(*pair) for pair in zip(outputs, known, strict=True)]

    def statistics(self, site: Site, product: Product, data: _Data) -> Sums:
        """Return the statistics of what a product reads."""
        others = [self.data(other).array for other in product.others]

        def sums(known: Known | None) -> Sums:
            axes = None if known is None else [(one.axes, one.array is None) for one in known]
            weights = None if known is None else [one.array for one in known if one.array is not None]

            def of_arrays(arrays: Any) -> Sums:
                array, weights, others = arrays
                each = iter(weights or ())
                known = (
                    None
                    if axes is None
                    else tuple(RowWeights(None if lost else next(each), on) for on, lost in axes)
                )
                return self.sums(site, rows_of(site, product.eqn, array, known, others))

            return on_automatic_axes(of_arrays, (data.array, weights, others))

        self.unknown.pop(product.stack, None)
        try:
            return sums(data.known)
        except UnknownRowsError as error:
            # What is known of a carry is found out by running the body several times, of which the last
            # counts.
            self.unknown[product.stack] = error
            return sums(None)

    def sums(self, site: Site, rows: Rows) -> Sums:
        """Return the statistics of rows."""
        number, total = sums_of_rows(rows)
        batch, inputs = site.form.batch, site.form.inputs
        sums = {
            "rows": jnp.broadcast_to(number, (batch,)),
            "sum": jnp.broadcast_to(total, (batch, inputs)),
        }
        if self.gram:
            return sums | {"gram": jnp.broadcast_to(gram_of_rows(rows), (batch, inputs, inputs))}
        return sums | {"squares": jnp.broadcast_to(squares_of_rows(rows), (batch, inputs))}

    def zeros(self, site: Site, level: int) -> Sums:
        """Return statistics of no row, of a product inside a scan, before the scans inside that are left."""
        form = site.form
        layers = [site.steps[inner] for inner in site.view.levels if inner > level]

        def zeros(*shape: int, dtype: Any = form.dtype) -> jax.Array:
            return jnp.zeros((*layers, form.batch, *shape), dtype)

        sums = {"rows": zeros(dtype=jnp.float32), "sum": zeros(form.inputs)}
        last = {"gram": zeros(form.inputs, form.inputs)} if self.gram else {"squares": zeros(form.inputs)}
        return sums | last

    def scan(
        self, eqn: "JaxprEqn", args: Sequence[Any], stack: tuple[int, ...], level: int
    ) -> tuple[list[Any], Found]:
        """Run a scan whose body also gathers.

        A product whose kernel is a slice of a leaf has statistics for each step. The statistics of a kernel
        that all steps share are summed over the steps.
        """
        data = list(map(self.data, args))

        def body(values: list[Any], known: list[Known]) -> Any:
            inputs = inside_scan(eqn, args, values, level=level)
            inputs = [
                value if isinstance(value, ConstValue) else _Data(value, each if self.weighted else None)
                for value, each in zip(inputs, known, strict=True)
            ]
            outputs, found = self.run(eqn.params["jaxpr"], inputs, stack, level + 1)
            outputs = list(map(self.data, outputs))
            of_steps = {key: sums for key, sums in found.items() if key not in zeros}
            shared = {key: found[key] for key in zeros}
            return [one.array for one in outputs], [one.known or () for one in outputs], (of_steps, shared)

        # Those of kernels that all steps share are added up in the carry: one Gram matrix, not one for each
        # step.
        zeros = {
            key: self.zeros(site, level)
            for key, site in self.sites.items()
            if key[: len(stack)] == stack and level not in site.view.levels
        }
        given = [one.known or () for one in data]
        arrays = [one.array for one in data]
        outputs, known, (of_steps, shared) = scan_with_weights(eqn, arrays, given, body, zeros)
        pairs = zip(outputs, known, strict=True)
        return [_Data(array, each if self.weighted else None) for array, each in pairs], of_steps | shared

    def cond(
        self, eqn: "JaxprEqn", args: Sequence[Any], stack: tuple[int, ...], level: int
    ) -> tuple[list[Any], Found]:
        """Run a branch; the products of the others saw no row."""
        data = list(map(self.data, args))
        const = [isinstance(arg, ConstValue) for arg in args]

        def run(number: int, closed: "ClosedJaxpr", arrays: Sequence[Any]) -> tuple[list[_Data], Found]:
            inputs = [
                arg if is_const else one._replace(array=array)
                for arg, is_const, one, array in zip(args[1:], const[1:], data[1:], arrays, strict=True)
            ]
            outputs, found = self.run(closed, inputs, (*stack, number), level)
            return list(map(self.data, outputs)), found

        branches = [close(branch) for branch in eqn.params["branches"]]
        arrays = [one.array for one in data[1:]]
        shapes: list[Any] = []
        known: list[list[Known]] = []
        for number, branch in enumerate(branches):

            def shaped(number: int = number, branch: Any = branch) -> Any:
                outputs, found = run(number, branch, arrays)
                known.append([one.known or () for one in outputs])
                return found

            shapes.append(jax.eval_shape(shaped))
        empty = {
            key: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
            for each in shapes
            for key, sums in each.items()
        }
        common = [agree(each) for each in zip(*known, strict=True)] if self.weighted else []
        axes = [[one.axes for one in each if one.array is not None] for each in common]

        def arm(number: int, branch: "ClosedJaxpr") -> Any:
            def taken(*arrays: Any) -> Any:
                outputs, found = run(number, branch, arrays)
                kept = [
                    [next(k.array for k in one.known or () if k.axes == a) for a in some]
                    for one, some in zip(outputs, axes, strict=False)
                ]
                return [one.array for one in outputs], kept, {**empty, **found}

            return taken

        arms = [arm(number, branch) for number, branch in enumerate(branches)]
        outputs, kept, found = lax.switch(data[0].array, arms, *arrays)
        made = []
        for number, output in enumerate(outputs):
            if not self.weighted:
                made.append(_Data(output, None))
                continue
            arrays_of = iter(kept[number])
            each = tuple(k if k.array is None else k._replace(array=next(arrays_of)) for k in common[number])
            made.append(_Data(output, each))
        return made, found
