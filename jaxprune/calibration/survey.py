"""Which products of a function multiply a leaf by data, found in its jaxpr without running it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from jaxprune.calibration.matrices import MatrixForm, form_of
from jaxprune.tracing.dataflow import (
    PRODUCTS,
    ConstValue,
    Product,
    Visitor,
    inside_scan,
    param,
    passed_on,
    visit_products,
)
from jaxprune.tracing.jaxprs import close, inner_jaxprs, nested_jaxprs, of_first, scan_split
from jaxprune.tracing.leaf_views import Axes, Factor, LeafView, reshaped

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn


class BiasForm(NamedTuple):
    """A leaf that is added to the outputs of a product, or taken from them, as a running mean is.

    Attributes:
      view: the sum's other operand as a view of the leaf.
      matrix: from that operand to (batch, outputs); linear.
    """

    view: LeafView
    matrix: Any


class Site(NamedTuple):
    """A product of a view of one leaf with data.

    Attributes:
      stack: what tells it from all other products of the trace, as in `Product`.
      path: the leaf.
      view: the kernel as a view of the leaf.
      form: the product as one of matrices.
      key: the same for products whose matrix is the same view of the same leaf.
      steps: the lengths of the scans around it, outermost first.
      source: the line of the user's code.
      is_last: whether no other leaf is multiplied by what comes of it.
      bias: the leaf that is added to its outputs, or None.
    """

    stack: tuple[int, ...]
    path: str
    view: LeafView
    form: MatrixForm
    key: str
    steps: tuple[int, ...]
    source: str
    is_last: bool
    bias: BiasForm | None

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """How many layers the leaf holds, for each of its axes that counts layers."""
        return tuple(self.steps[level] for level in self.view.levels)

    @property
    def reused(self) -> bool:
        """Whether one matrix is used in several steps of a scan, as a recurrent kernel is."""
        return len(self.view.levels) < len(self.steps)


class Survey(NamedTuple):
    """The products of a function.

    Attributes:
      sites: the products that statistics can be gathered of, in the order in which they run.
      refused: by path, why a leaf that is multiplied by data cannot be calibrated.
    """

    sites: tuple[Site, ...]
    refused: dict[str, str]


class _Flow:
    """A value that depends on data.

    Attributes:
      made_by: the numbers of the products that it is computed from, as the bits of an integer.
      site: the product whose outputs it still holds entry by entry, plus other values; None for others.
      axes: where the kernel's axes lie in it, if `site` is known.
      before: the values between the product and this one.
      readers: the equations that read it.
    """

    def __init__(
        self,
        made_by: int = 0,
        site: tuple[int, ...] | None = None,
        axes: Axes | None = None,
        before: tuple["_Flow", ...] = (),
    ):
        self.made_by, self.site, self.axes, self.before = made_by, site, axes, before
        self.readers: set[int] = set()

    def moved(self, axes: Axes | None) -> "_Flow":
        """Return the value after its entries were moved, or others added to them."""
        return _Flow(self.made_by, self.site, axes, (*self.before, self))


class _Bias(NamedTuple):
    view: LeafView
    axes: Axes
    shape: tuple[int, ...]
    between: tuple[_Flow, ...]
    subtracted: bool


def survey(closed: "ClosedJaxpr", inputs: Mapping[str, Any]) -> Survey:
    """Find the products of a jaxpr whose kernel is a view of one leaf.

    `closed` and `inputs` are as `tracing.jaxprs.trace` returns them for a function of (params, ...).
    """
    walker = _Surveyor()
    values: list[Any] = []
    for name, leaf in inputs.items():
        path = of_first(name)
        values.append(_Flow() if path is None else param(path, lambda: None, jnp.shape(leaf)))
    for value in walker.walk(closed, values):
        if isinstance(value, _Flow):
            value.readers.add(-1)
    return walker.result()


class _Surveyor:
    def __init__(self):
        self.found: dict[tuple[int, ...], Site] = {}
        self.numbers: dict[tuple[int, ...], int] = {}
        self.refused: dict[str, str] = {}
        self.multiplied = 0  # the products whose outputs reach a later product of a leaf, as bits
        self.biases: dict[tuple[int, ...], _Bias | None] = {}
        self.inside = ""  # the loop that the walk is in and that cannot be calibrated

    def walk(
        self,
        closed: "ClosedJaxpr",
        values: Sequence[Any],
        steps: tuple[int, ...] = (),
        stack: tuple[int, ...] = (),
        called_at: str = "",
    ) -> list[Any]:
        def product(found: Product, data: Any) -> list[Any] | None:
            return self.product(found, _as_flow(data), steps)

        def other(eqn: "JaxprEqn", args: list[Any]) -> list[Any]:
            return self.other(eqn, args, steps, (*stack, id(eqn)))

        return visit_products(closed, values, Visitor(product, other), called_at, stack)

    def product(self, found: Product, data: _Flow, steps: tuple[int, ...]) -> list[Any] | None:
        if not found.kernel.paths:
            return None  # a constant matrix
        data.readers.add(id(found.eqn))
        self.multiplied |= data.made_by
        number = self.numbers.setdefault(found.stack, len(self.numbers))
        form = f"its product is inside {self.inside!r}" if self.inside else form_of(found)
        made_by = data.made_by | 1 << number
        if isinstance(form, str):
            for path in found.kernel.paths:
                self.refused.setdefault(path, f"{form} ({found.source})")
            return [_Flow(made_by)]
        view = found.kernel.view
        assert isinstance(view, LeafView)
        key = f"{found.kernel.key} {form.batch_axes} {form.summed}"
        self.found[found.stack] = Site(
            found.stack, view.path, view, form, key, steps, found.source, False, None
        )
        return [_Flow(made_by, found.stack, _output_axes(found, form))]

    def other(
        self, eqn: "JaxprEqn", args: list[Any], steps: tuple[int, ...], stack: tuple[int, ...]
    ) -> list[Any]:
        args = [arg if isinstance(arg, ConstValue) else _as_flow(arg) for arg in args]
        flows = [arg for arg in args if isinstance(arg, _Flow)]
        name, params = eqn.primitive.name, eqn.params
        made_by = 0
        for flow in flows:
            made_by |= flow.made_by
        if name == "scan":
            return self.scan(eqn, args, steps, stack)
        if name == "while":
            return self.loop(eqn, args, steps, stack)
        if name == "cond":
            branches = [
                self.walk(close(branch), args[1:], steps, (*stack, number))
                for number, branch in enumerate(params["branches"])
            ]
            return [_joined(values) for values in zip(*branches, strict=True)]
        for flow in flows:
            flow.readers.add(id(eqn))
        if any(True for _ in inner_jaxprs(eqn)):
            self.hidden(eqn, args)
        elif (moved := self.moved(eqn, args, flows)) is not None:
            moved.made_by |= made_by  # of all that were added
            return [moved]
        return [_Flow(made_by) for _ in eqn.outvars]

    def hidden(self, eqn: "JaxprEqn", args: Sequence[Any]) -> None:
        """Refuse the leaves that an equation with a jaxpr of its own multiplies by data."""
        bodies = (closed for inner in inner_jaxprs(eqn) for closed in nested_jaxprs(inner))
        if any(each.primitive.name in PRODUCTS for body in bodies for each in body.jaxpr.eqns):
            for arg in args:
                for path in arg.paths if isinstance(arg, ConstValue) else ():
                    self.refused.setdefault(path, f"its product is inside {eqn.primitive.name!r}")

    def moved(self, eqn: Any, args: Sequence[Any], flows: Sequence[_Flow]) -> _Flow | None:
        """Follow the outputs of a product through moves and sums; note the leaf that is added to them."""
        known = [flow for flow in flows if flow.site is not None and flow.axes is not None]
        if not known:
            return None
        name, params, flow = eqn.primitive.name, eqn.params, known[-1]
        axes = flow.axes
        assert axes is not None and flow.site is not None
        shape = tuple(eqn.outvars[0].aval.shape)
        if name == "convert_element_type":
            return flow.moved(axes) if jnp.issubdtype(params["new_dtype"], jnp.floating) else None
        if name in ("add", "add_any", "sub"):
            other = next((arg for arg in args if arg is not flow), None)
            if name == "sub" and args[0] is not flow:
                return None
            if isinstance(other, ConstValue) and other.paths:
                if isinstance(other.view, LeafView) and flow.site not in self.biases:
                    between = (*flow.before, flow)
                    self.biases[flow.site] = _Bias(other.view, axes, shape, between, name == "sub")
                return None
            return flow.moved(axes)
        if name == "transpose":
            return flow.moved(tuple(axes[axis] for axis in params["permutation"]))
        if name == "reshape" and params.get("dimensions") is None:
            after = reshaped(axes, shape)
            return None if after is None else flow.moved(after)
        return None

    def scan(
        self, eqn: "JaxprEqn", args: Sequence[Any], steps: tuple[int, ...], stack: tuple[int, ...]
    ) -> list[Any]:
        body, level = eqn.params["jaxpr"], len(steps)
        consts, carried = scan_split(eqn.params)
        for arg in args:
            if isinstance(arg, _Flow):
                arg.readers.add(id(eqn))
        values = [_Flow(arg.made_by) if isinstance(arg, _Flow) else _Flow() for arg in args]
        outputs: list[Any] = []
        for _ in range(2):  # in the second round the carry comes of the products of the first
            inputs = inside_scan(eqn, args, values, level=level)
            outputs = self.walk(body, inputs, (*steps, eqn.params["length"]), stack)
            for number, output in enumerate(outputs[:carried]):
                if isinstance(output, _Flow):
                    before = values[consts + number]
                    values[consts + number] = _Flow(before.made_by | output.made_by)
        for output in outputs:
            if isinstance(output, _Flow):
                output.readers.add(-1)
        return [_Flow(output.made_by if isinstance(output, _Flow) else 0) for output in outputs]

    def loop(
        self, eqn: "JaxprEqn", args: Sequence[Any], steps: tuple[int, ...], stack: tuple[int, ...]
    ) -> list[Any]:
        """Walk the body of a `while`, whose products cannot be calibrated."""
        first, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        body, carry = eqn.params["body_jaxpr"], args[first + consts :]
        same = passed_on(body, consts, len(carry))
        made_by = 0
        for arg in args:
            made_by |= arg.made_by if isinstance(arg, _Flow) else 0
        inputs = [
            *args[first : first + consts],
            *(arg if yes else _Flow(made_by) for arg, yes in zip(carry, same, strict=True)),
        ]
        before, self.inside = self.inside, self.inside or "while"
        outputs = self.walk(body, inputs, steps, stack)
        self.inside = before
        for output in outputs:
            made_by |= output.made_by if isinstance(output, _Flow) else 0
        return [_Flow(made_by) for _ in outputs]

    def result(self) -> Survey:
        shared: dict[str, int] = {}
        for bias in self.biases.values():
            if bias is not None:
                shared[bias.view.path] = shared.get(bias.view.path, 0) + 1
        sites = []
        for stack, site in self.found.items():
            bias = self.biases.get(stack)
            last = not self.multiplied >> self.numbers[stack] & 1
            form = None
            alone = bias is not None and all(len(flow.readers) == 1 for flow in bias.between)
            if bias is not None and alone and shared[bias.view.path] == 1 and not site.reused:
                form = _bias_form(bias, site)
            sites.append(site._replace(is_last=last, bias=form))
        sites = [site for site in sites if site.path not in self.refused]
        return Survey(tuple(sites), self.refused)


def _as_flow(value: Any) -> _Flow:
    """Return a value that depends on data; what a jaxpr holds of an outer trace counts as such."""
    return value if isinstance(value, _Flow) else _Flow()


def _joined(values: Sequence[Any]) -> Any:
    """Return what is known of the output of a branch, from the outputs of all branches."""
    made_by = 0
    for value in values:
        if isinstance(value, _Flow):
            value.readers.add(-1)
            made_by |= value.made_by
    return _Flow(made_by)


def _output_axes(found: Product, form: MatrixForm) -> Axes | None:
    """Return where the kernel's axes lie in the output of a product; other axes count as repeats."""
    eqn, side = found.eqn, found.side
    out, kernel = eqn.outvars[0].aval.shape, eqn.invars[side].aval.shape
    rows = [(Factor(-1, size),) for size in out]
    if eqn.primitive.name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"][2]
        rows[spec[1]] = (Factor(eqn.params["dimension_numbers"][1][0], out[spec[1]]),)
        return tuple(rows)
    if eqn.primitive.name != "dot_general":
        return None
    (_, batches) = eqn.params["dimension_numbers"]
    free = [axis for axis in range(len(kernel)) if axis not in (*form.summed, *form.batch_axes)]
    places = list(batches[side]), list(range(len(out) - len(free), len(out)))
    if side == 0:  # the output has the batch, then what is free on the left, then on the right
        places = places[0], list(range(len(batches[0]), len(batches[0]) + len(free)))
    for place, axis in enumerate(places[0]):
        rows[place] = (Factor(axis, kernel[axis]),)
    for place, axis in zip(places[1], free, strict=True):
        rows[place] = (Factor(axis, kernel[axis]),)
    return tuple(rows)


def _bias_form(bias: _Bias, site: Site) -> BiasForm | None:
    """Return a leaf added to a product's outputs as (batch, outputs), if it has one number for each."""
    if bias.view.axes is None or bias.view.levels != site.view.levels:
        return None
    indices, kernel_factors = [], []
    for own, kernel in zip(bias.view.axes, bias.axes, strict=True):
        of_rows = all(factor.axis < 0 for factor in kernel)
        repeated = all(factor.axis < 0 for factor in own)
        size = math.prod(factor.size for factor in kernel)
        if size > 1 and of_rows != repeated:
            return None  # it differs from row to row, or is one number for several outputs
        indices.append(0 if of_rows else slice(None))
        kernel_factors += [] if of_rows else list(kernel)
    wanted = sorted(kernel_factors, key=lambda factor: _place(factor.axis, site.form))
    if len({factor.axis for factor in kernel_factors}) < len(kernel_factors):
        return None  # an axis of the kernel was split on the way
    order = [kernel_factors.index(factor) for factor in wanted]
    sizes = [factor.size for factor in kernel_factors]
    batch, outputs = site.form.batch, site.form.outputs
    if math.prod(sizes) != batch * outputs:
        return None

    def matrix(array: Any) -> Any:
        array = -array if bias.subtracted else array
        return jnp.transpose(array[tuple(indices)].reshape(sizes), order).reshape(batch, outputs)

    return BiasForm(bias.view, matrix)


def _place(axis: int, form: MatrixForm) -> tuple[bool, int]:
    """Return the order of a kernel's axis among those of the batch, then those of the outputs."""
    return axis not in form.batch_axes, axis
