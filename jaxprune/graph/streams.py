"""Which axes of params lie on a residual stream.

A stream is what residual connections add to: the width of a transformer, or of a stage of a ResNet. A product
with weights (or the look-up of an embedding) *writes* the axis of its output that comes from the weights. The
axis of a sum is a stream if different products have written it in the two addends, and

- one product is computed from what the other has written: `x + f(x)`; or
- the input of one goes through another product and a non-linear function to the other: `p(x) + f(x)`, a
  projected shortcut.

Products that are added side by side make no stream: the gates of a recurrent network `W x + U h`, an adapter
`W x + B A x`. There neither product follows the other, and no non-linear function lies between.

Values are followed once, forwards. Each axis of a value has the set of products that have written it, and a
product passes on what was written along the axes of its data that it does not sum over.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.divisors import ParamAxis
from jaxprune.graph.engine.identity import inlined
from jaxprune.graph.engine.ir import Op, Region, Value, bodies_of, other_axes
from jaxprune.graph.engine.program import TracedNetwork

_NONLINEAR = frozenset(
    (
        *("max", "min", "tanh", "logistic", "exp", "exp2", "expm1", "erf", "erfc", "log", "log1p"),
        *("sin", "cos", "abs", "sign", "square", "integer_pow", "pow", "rsqrt", "sqrt", "clamp"),
        *("select_n", "custom_jvp_call", "custom_vjp_call", "scan", "while", "reduce_max", "argmax"),
        *("sort", "top_k", "reduce_window_max"),
    )
)


class _Past(NamedTuple):
    """How a value that depends on the inputs was computed; sets are the bits of integers."""

    written: tuple[int, ...]  # for each axis, the products that have written it
    after: int  # the products that it was computed from
    inputs: int  # the values that these products have read
    bent: int  # those of `inputs` for which a non-linear function follows the product


def stream_axes(network: TracedNetwork, graph: AxisGraph) -> frozenset[ParamAxis]:
    """Return the axes of params that lie on a residual stream, or share units with an axis that does.

    All but one factor of each product must be pinned in the graph.
    """
    walk = _Walk(network.graph)
    for value in network.region.inputs[len(network.leaves) :]:
        walk.past[id(value)] = _Past((0,) * len(value.shape), 0, 0, 0)
    walk.run(inlined(network.region))
    roots = {graph.find(node) for node in walk.streams}
    labels = graph.units()
    units = {label for root in roots if root in labels for label in labels[root].tolist()} - {-1}
    for root, of_root in labels.items():
        if root not in roots and units and not units.isdisjoint(of_root.tolist()):
            roots.add(root)
    return frozenset(
        (path, axis)
        for path, value in network.values.items()
        for axis, node in enumerate(value.axes)
        if graph.find(node) in roots
    )


class _Walk:
    """One pass over a program."""

    def __init__(self, graph: AxisGraph):
        self.graph = graph
        self.past: dict[int, _Past] = {}  # by the id of a value that depends on the inputs
        self.streams: set[int] = set()  # the nodes of axes that residual connections add along
        self._before: list[_Past] = []  # by product, the past of its data
        self._read: list[int] = []  # by product, the bit of its data
        self._numbers: dict[int, int] = {}  # by the id of a value that a product reads, the number of its bit

    def run(self, region: Region) -> None:
        """Follow all ops of a region."""
        for op in region.ops:
            data = [value for value in op.inputs if id(value) in self.past]
            if not data:
                continue
            if op.name == "inline":
                self._pass_on(op.inputs, op.outputs)
            elif op.regions and op.name not in ("scan", "while"):
                self._branches(op)
            elif op.regions:
                self._loop(op)
            else:
                if op.name in ("add", "sub", "add_any") and len(data) == 2:
                    self._sum(op)
                self._apply(op, data)

    def _pass_on(self, values: Sequence[Value], others: Sequence[Value]) -> None:
        for value, other in zip(values, others, strict=True):
            if id(value) in self.past:
                self.past[id(other)] = self.past[id(value)]

    def _new_product(self, data: _Past, bit: int) -> int:
        """Enter a product, given the past of its data and the bit of the value that it reads."""
        self._before.append(data)
        self._read.append(bit)
        return 1 << (len(self._before) - 1)

    def _apply(self, op: Op, data: Sequence[Value]) -> None:
        before = _joined([self.past[id(value)] for value in data])
        bent = before.bent | (before.inputs if op.name in _NONLINEAR else 0)
        traced = [
            [self._written(op, data, output, axis) for axis in range(len(output.shape))]
            for output in op.outputs
        ]
        product = 0
        if any(mask is None for axes in traced for mask in axes):
            bit = 1 << self._numbers.setdefault(id(data[0]), len(self._numbers))
            product = self._new_product(before, bit)
        inputs = before.inputs | (self._read[-1] if product else 0)
        for output, axes in zip(op.outputs, traced, strict=True):
            written = tuple(product if mask is None else mask for mask in axes)
            self.past[id(output)] = _Past(written, before.after | product, inputs, bent)

    def _written(self, op: Op, data: Sequence[Value], output: Value, axis: int) -> int | None:
        """Return the products that have written an axis of an output; None if the op itself writes it."""
        sources = _sources(op, axis)
        if sources is None:
            root = self.graph.find(output.axes[axis])
            find = self.graph.find
            sources = [(v, a) for v in op.inputs for a, node in enumerate(v.axes) if find(node) == root]
        passed = [(value, a) for value, a in sources if id(value) in self.past]
        if passed:
            return _any_of(self.past[id(value)].written[a] for value, a in passed)
        if sources:  # of params alone: weights, or rows of an embedding
            return None
        return _any_of(mask for value in data for mask in self.past[id(value)].written)

    def _sum(self, op: Op) -> None:
        """Enter the axes of a sum that are streams."""
        first, second = (self.past[id(value)] for value in op.inputs)
        if len(op.inputs[0].shape) != len(op.inputs[1].shape):
            return
        pairs = zip(first.written, second.written, strict=True)
        for axis, (one, other) in enumerate(pairs):
            if one and other and not one & other and (self._follows(one, other) or self._follows(other, one)):
                self.streams.add(op.outputs[0].axes[axis])

    def _follows(self, one: int, other: int) -> bool:
        """Whether one of some products is computed from the output of others, or bent from their input."""
        read = _any_of(self._read[number] for number in _bits(other))
        return any(
            self._before[number].after & other or self._before[number].bent & read for number in _bits(one)
        )

    def _branches(self, op: Op) -> None:
        """Follow functions with a derivative of their own, and branches, as if their bodies stood here."""
        found: dict[int, list[_Past]] = {}
        for body in bodies_of(op):
            if body.name in ("jvp", "vjp"):
                continue
            self._pass_on(body.given, body.region.inputs)
            self.run(inlined(body.region))
            for place, inner in enumerate(body.region.outputs):
                if id(inner) in self.past:
                    found.setdefault(place, []).append(self.past[id(inner)])
        for place, output in enumerate(op.outputs):
            if place in found:
                past = _joined(found[place])
                bent = past.bent | (past.inputs if op.name in _NONLINEAR else 0)
                self.past[id(output)] = past._replace(bent=bent)

    def _loop(self, op: Op) -> None:
        """Follow the body of a loop once; a product of its own stands for what earlier rounds wrote."""
        _, body, given, consts, carried = bodies_of(op)[-1]  # after the condition of a `while`
        for place, (outer, inner) in enumerate(zip(given, body.inputs, strict=True)):
            past = self.past.get(id(outer))
            if consts <= place < consts + carried:
                product = self._new_product(_Past((), 0, 0, 0), 0)
                self.past[id(inner)] = _Past((product,) * len(inner.shape), product, 0, 0)
            elif past is not None:
                self.past[id(inner)] = past if place < consts else past._replace(written=past.written[1:])
        self.run(inlined(body))
        before = _joined([self.past[id(value)] for value in op.inputs if id(value) in self.past])
        for place, (inner, output) in enumerate(zip(body.outputs, op.outputs, strict=True)):
            past = self.past.get(id(inner))
            if past is None:
                continue
            initial = self.past.get(id(given[consts + place])) if place < carried else None
            if place >= carried:
                past = past._replace(written=(0, *past.written))
            elif initial is not None:
                past = _joined([past, initial])
            # Whatever goes into a loop may come out of it, bent.
            self.past[id(output)] = _Past(
                past.written,
                past.after | before.after,
                past.inputs | before.inputs,
                past.bent | past.inputs | before.inputs,
            )


def _sources(op: Op, axis: int) -> list[tuple[Value, int]] | None:
    """Return the axes of its inputs that an axis of a product's output comes from; None for other ops."""
    if op.name == "dot_general":
        (left_sum, right_sum), (left_batch, right_batch) = op.params["dimension_numbers"]
        left, right = op.inputs
        if axis < len(left_batch):
            return [(left, left_batch[axis]), (right, right_batch[axis])]
        free = [(left, a) for a in other_axes(left, left_sum, left_batch)]
        free += [(right, a) for a in other_axes(right, right_sum, right_batch)]
        return [free[axis - len(left_batch)]]
    if op.name == "conv_general_dilated":
        numbers, (left, right) = op.params["dimension_numbers"], op.inputs
        place = numbers.out_spec.index(axis)
        if place != 1:
            return [(left, numbers.lhs_spec[place])]
        grouped = op.params["feature_group_count"] == left.shape[numbers.lhs_spec[1]]  # depthwise
        return [(left, numbers.lhs_spec[1])] if grouped else [(right, numbers.rhs_spec[0])]
    return None


def _joined(pasts: Sequence[_Past]) -> _Past:
    """Return the past of a value that is computed from several."""
    first, *rest = pasts
    for other in rest:
        both = zip(first.written, other.written, strict=False)
        first = _Past(
            tuple(a | b for a, b in both) or first.written,
            first.after | other.after,
            first.inputs | other.inputs,
            first.bent | other.bent,
        )
    return first


def _any_of(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def _bits(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
