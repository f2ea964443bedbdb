"""What a function does with each param: which are the weights of its products.

One pass over the program follows the entries of every param until they meet data. A param is a
weight if it meets data in a matrix product or a convolution that sums over its entries. It is no weight if
it is looked up (an embedding), or only added to data or multiplied entry by entry (positions,
scales). Where the program leaves this open, the param's name decides.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum

import jax
import numpy as np

from jaxprune.graph.engine.ir import Body, Op, Region, Value, bodies_of, flat_layers
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.rules import elementwise, has_rule, rule_for
from jaxprune.tree.kernel_names import is_adapter
from jaxprune.tree.where import kernels


class _Flow(IntEnum):
    """How the entries of a param lie in a value; if they lie in several ways, the last of these."""

    MIXED = 1  # combined with data or other params by multiplication, reduced, or repeated
    PICKED = 2  # rows that data picked
    PART = 3  # a fixed part of them
    WHOLE = 4  # all of them, in any layout, perhaps each changed by a function


class _Use(IntEnum):
    """What the function does with a param; if it does several things, the last of these."""

    UNCLEAR = 1
    PRODUCT = 2
    LOOKUP = 3
    PICKED = 4  # looked up, and then multiplied with data: an embedding's rows, or an expert's weights


_Flows = dict[str, _Flow]

# Ops that only lay the entries of their first input out anew.
_LAYOUT = frozenset(
    (
        *("reshape", "transpose", "squeeze", "expand_dims", "rev", "pad", "broadcast_in_dim", "tile"),
        *("concatenate", "stack", "join_layers", "convert_element_type", "reduce_precision", "neg"),
        *("copy", "copy_p", "stop_gradient", "optimization_barrier", "sharding_constraint", "name"),
        *("pvary", "reshard", "per_reader"),
    )
)
_PARTS = frozenset(["slice", "split", "unstack", "take_layer"])
_PICKS = frozenset(["gather", "dynamic_slice"])
_PRODUCTS = frozenset(["dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"])


def weights(network: TracedNetwork) -> frozenset[str]:
    """Return the params, or layers of stacked ones, that a function uses as the weights of a product.

    Adapters (LoRA) are weights of products too, but one factor of each starts at zero, so they are left
    out by name, see `kernel_names`. Params of one axis are left out as well.
    """
    walk = _Walk()
    region, count = network.region, len(network.leaves)
    for path, value in network.values.items():
        walk.flows[id(value)] = {path: _Flow.WHOLE}
    walk.data.update(map(id, region.inputs[count:]))
    walk.run(region)
    read = {id(each) for op in region.ops for value in op.inputs for each in flat_layers(value)}

    def is_weight(path: str) -> bool:
        leaf, use, (owner, _) = network.values[path], walk.uses.get(path), network.paths[path]
        if len(leaf.shape) < 2 or is_adapter(owner):
            return False
        if use in (_Use.PRODUCT, _Use.LOOKUP):
            return use is _Use.PRODUCT
        struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return (use is not None or id(leaf) not in read) and kernels(owner, struct)

    return frozenset(path for path in network.values if is_weight(path))


class _Walk:
    """One pass over a program."""

    def __init__(self) -> None:
        self.flows: dict[int, _Flows] = {}  # by the id of a value, how the entries of params lie in it
        self.data: set[int] = set()  # the ids of the values that depend on the function's inputs
        self.uses: dict[str, _Use] = {}  # by path, what the function does with a param

    def run(self, region: Region) -> None:
        """Follow all ops of a region."""
        for op in region.ops:
            if op.regions:
                self._call(op)
            else:
                self._apply(op)

    def _of(self, value: Value) -> _Flows:
        return self.flows.get(id(value), {})

    def _is_data(self, value: Value) -> bool:
        return id(value) in self.data

    def _use(self, paths: Sequence[str] | _Flows, use: _Use) -> None:
        for path in paths:
            self.uses[path] = max(use, self.uses.get(path, use))

    def _learn(self, values: Sequence[Value], flows: _Flows, data: bool) -> None:
        for value in values:
            if flows:
                self.flows[id(value)] = _joined([self._of(value), flows])
            if data:
                self.data.add(id(value))

    def _apply(self, op: Op) -> None:
        data = [self._is_data(value) for value in op.inputs]
        flows = [self._of(value) for value in op.inputs]
        if not any(flows):
            return self._learn(op.outputs, {}, any(data))
        if op.name in _PRODUCTS:
            return self._product(op, data, flows)
        if op.name in _PICKS:
            picked = any(data[1:])
            if picked and not data[0]:
                self._use(flows[0], _Use.LOOKUP)
            most = _Flow.PICKED if picked else _Flow.PART
            return self._learn(op.outputs, {p: min(f, most) for p, f in flows[0].items()}, any(data))
        if op.name in _PARTS:
            least = {path: min(flow, _Flow.PART) for path, flow in flows[0].items()}
            return self._learn(op.outputs, least, any(data))
        if op.name in _LAYOUT:
            many = op.name in ("concatenate", "stack", "join_layers")
            joined = _joined(flows if many else flows[:1])
            if many and any(data) and not all(data):  # a token beside data
                joined = {}
            if op.name in ("broadcast_in_dim", "tile") and _size(op.outputs[0]) != _size(op.inputs[0]):
                joined = dict.fromkeys(joined, _Flow.MIXED)
            return self._learn(op.outputs, joined, any(data))
        return self._learn(op.outputs, self._combined(op, data, flows), any(data))

    def _combined(self, op: Op, data: list[bool], flows: list[_Flows]) -> _Flows:
        """Return the entries of params that an op passes on, if it is neither a product nor a layout."""
        if any(data):
            if op.name in ("mul", "div"):
                # A part of a param that scales data may be one tap of a convolution, written as a sum.
                for flow in flows[: 1 if op.name == "div" else 2]:
                    self._use([path for path, how in flow.items() if how is _Flow.PART], _Use.UNCLEAR)
                return dict.fromkeys(_joined(flows), _Flow.MIXED)
            # A product written as a multiplication and a sum, or an op without a rule.
            if op.name == "reduce_sum" or not has_rule(op.name):
                self._use(_joined(flows), _Use.UNCLEAR)
            return {}
        if rule_for(op.name) is not elementwise:
            if not has_rule(op.name) or op.name == "fft":
                self._use(_joined(flows), _Use.UNCLEAR)
            return dict.fromkeys(_joined(flows), _Flow.MIXED)
        # An entry that is computed from several params belongs to none of them alone: their names decide.
        whole = {path for flow in flows for path, how in flow.items() if how >= _Flow.PART}
        alone = len(whole) == 1
        return {p: f if alone and p in whole else _Flow.MIXED for p, f in _joined(flows).items()}

    def _product(self, op: Op, data: list[bool], flows: list[_Flows]) -> None:
        for place, (flow, mine, other) in enumerate(zip(flows[:2], data[:2], data[1::-1], strict=True)):
            if mine and not other:
                continue  # data that params were mixed into; the other side is what multiplies it
            if not _sums(op, place):
                self._use(flow, _Use.UNCLEAR)  # an outer product, or a scale written as an einsum
                continue
            for path, how in flow.items():
                if how is _Flow.PICKED:
                    use = _Use.PICKED
                elif not other or mine or how is _Flow.MIXED:
                    use = _Use.UNCLEAR
                else:
                    one_hot = _is_one_hot(op.inputs[1 - place])
                    use = _Use.LOOKUP if one_hot else _Use.PRODUCT
                self._use([path], use)
        mixed: _Flows = {}
        if not (_sums(op, 0) and _sums(op, 1)):
            mixed = dict.fromkeys(_joined(flows), _Flow.MIXED)
        self._learn(op.outputs, mixed, any(data))

    def _call(self, op: Op) -> None:
        """Follow the bodies of an op; that of a loop until nothing new is learnt about what it carries."""
        for body in bodies_of(op):
            if body.name in ("jvp", "vjp", "condition"):
                continue
            for outer, inner in _pairs(body.given, body.region.inputs):
                self._learn([inner], self._of(outer), self._is_data(outer))
            self.run(body.region)
            while self._carry(body):
                self.run(body.region)
            for inner, outer in _pairs(body.region.outputs, op.outputs):
                self._learn([outer], self._of(inner), self._is_data(inner))

    def _carry(self, body: Body) -> bool:
        """Pass what a loop's body returns on to its next round; return whether that was new."""
        outputs, inputs, new = body.region.outputs[: body.carried], body.region.inputs[body.consts :], False
        for given, taken in zip(outputs, inputs, strict=False):
            before = (self._of(taken), self._is_data(taken))
            self._learn([taken], self._of(given), self._is_data(given))
            new |= before != (self._of(taken), self._is_data(taken))
        return new


def _pairs(values: Sequence[Value], others: Sequence[Value]) -> Iterator[tuple[Value, Value]]:
    """Yield the values outside of a body with their counterparts inside, layer by layer."""
    for value, other in zip(values, others, strict=True):
        yield from zip(flat_layers(value), flat_layers(other), strict=False)


def _joined(flows: Sequence[_Flows]) -> _Flows:
    """Return the params of several values, each with the last of the ways in which its entries lie there."""
    joined: _Flows = {}
    for flow in flows:
        for path, how in flow.items():
            joined[path] = max(how, joined.get(path, how))
    return joined


def _size(value: Value) -> int | None:
    return int(np.prod(value.shape)) if all(isinstance(n, int) for n in value.shape) else None


def _sums(op: Op, place: int) -> bool:
    """Whether a product sums over an axis of an input, or else multiplies entry by entry."""
    if op.name != "dot_general":
        return True
    return bool(op.params["dimension_numbers"][0][place])


def _is_one_hot(value: Value) -> bool:
    """Whether a value was made by comparing numbers, as in `jax.nn.one_hot`: its product looks rows up."""
    while value.op is not None and value.op.name in _LAYOUT and len(value.op.inputs) == 1:
        value = value.op.inputs[0]
    return value.op is not None and value.op.name in ("eq", "eq_to")
