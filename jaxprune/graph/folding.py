"""Folding of constant channels: what a filter without weights still gives, moved into what reads it.

Masks of filters leave biases and norms alive. A filter without weights then gives a channel that is constant,
though not zero: relu(bias). The matrix product or convolution that reads it can take the constant over,
because its output is linear in its kernel. With c_k the constant of channel k and x_k = c_k wherever the
channel is read,

    y_j = sum_k x_k W[k, j] = (the channels that vary) + sum_k c_k W[k, j],

and the last sum depends on no input: it goes into the bias b_j, and W[k] = 0. A convolution with padding
reads 0 beyond the border, so that this sum depends on the place. But all constant channels read 0 at the same
places, so x_k = (c_k / c_r) x_r holds at every tap, for any constant channel r with c_r != 0, and that
channel can stand for all of them: W[r] += sum_k (c_k / c_r) W[k], and W[k] = 0. The same serves where there
is no bias.

The function stays the same, and the channels are needless afterwards. It is a step for deployment: the
gradients of what is folded are gone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.engine.axes import Vector
from jaxprune.graph.engine.facts import Facts, both, either
from jaxprune.graph.engine.ir import Op, Region, Value, other_axes
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.graph.engine.rules.reductions import windows_hold_an_entry
from jaxprune.graph.engine.rules.shapes import segments
from jaxprune.graph.engine.rules.wrappers import RUN_ONCE
from jaxprune.graph.engine.solving import zero_slices
from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.host import like_computed
from jaxprune.tree.leaves import array_leaves, is_concrete
from jaxprune.tree.stacks import join_layers, split_layers
from jaxprune.typing import Masks, Params


def fold_into_readers(
    network: TracedNetwork, params: Params, masks: Masks, inputs: Sequence[Any]
) -> tuple[Params, Masks]:
    """Return params and masks with the constants of dead filters folded into what reads them.

    The constants are read off one run of the function on the inputs; TypeError if these or the masked params
    have no values.
    """
    arrays, _ = split_static(inputs)
    if not is_concrete(params, arrays):
        raise TypeError("fold_constants=True reads constants off the network, so it needs real arrays.")
    dense = array_leaves(params)
    leaves = split_layers(dense, network.stacks)
    by_path = {path: np.asarray(mask) for path, mask in array_leaves(masks, "masks").items()}
    alive = split_layers(by_path, network.stacks)
    facts = network.facts(zero_slices(alive))
    constants = Constants(facts)
    constants.run(network.region, list(network.values.values()))
    sites = [site for op in network.region.ops if (site := _site(op, network, constants)) is not None]
    if sites:
        wanted, given = [site.image_axis for site in sites], [*dense.values(), *arrays.values()]
        for site, numbers in zip(sites, _read(network, facts, wanted, given), strict=True):
            site.fold(leaves, alive, numbers)
    shapes = {path: leaf.shape for path, leaf in dense.items()}
    leaves, alive = (join_layers(by_name, network.stacks, shapes) for by_name in (leaves, alive))
    tree = jax.tree.structure(params)
    return (
        jax.tree.unflatten(tree, list(leaves.values())),
        jax.tree.unflatten(tree, list(map(like_computed, alive.values()))),
    )


class Constants:
    """Which slices of values hold one number that no input changes, found in one pass over a program."""

    def __init__(self, facts: Facts):
        self._facts = facts
        self._fixed: set[int] = set()
        self._constant: dict[int, list[Vector | None]] = {}

    def is_fixed(self, value: Value) -> bool:
        """Whether a value follows from params and constants alone."""
        return id(value) in self._fixed or value.constant is not None

    def along(self, value: Value, axis: int) -> Vector | None:
        """Return the slices along an axis that hold one number each; None if none is known to."""
        known = self._constant.get(id(value), [None] * len(value.shape))[axis]
        others = [n for a, n in enumerate(value.shape) if a != axis]
        if self._facts.of(value).fill is not None or (self.is_fixed(value) and all(n == 1 for n in others)):
            known = np.ones(value.shape[axis], bool)
        return either(known, self._facts.zero(value, axis))

    def is_number(self, value: Value) -> bool:
        """Whether a value is one number that no input changes."""
        return self.is_fixed(value) and all(n == 1 for n in value.shape)

    def run(self, region: Region, fixed: Sequence[Value]) -> None:
        """Follow a region, given which of its inputs are fixed."""
        self._fixed.update(map(id, fixed))
        for op in region.ops:
            if op.name in RUN_ONCE:
                self._through(op)
            elif not op.regions:
                self._learn(op)
            if all(map(self.is_fixed, op.inputs)):
                self._fixed.update(map(id, op.outputs))

    def _through(self, op: Op) -> None:
        body = op.regions["body"]
        self._pass(op.inputs, body.inputs)
        fixed = [b for a, b in zip(op.inputs, body.inputs, strict=True) if self.is_fixed(a)]
        self.run(body, fixed)
        self._pass(body.outputs, op.outputs)

    def _pass(self, values: Sequence[Value], others: Sequence[Value]) -> None:
        for value, other in zip(values, others, strict=True):
            self._constant[id(other)] = [self.along(value, axis) for axis in range(len(value.shape))]

    def _learn(self, op: Op) -> None:
        for number, output in enumerate(op.outputs):
            axes = range(len(output.shape))
            if all(isinstance(n, int) for n in (*output.shape, *(n for v in op.inputs for n in v.shape))):
                self._constant[id(output)] = [self._of(op, number, output, axis) for axis in axes]

    def _of(self, op: Op, number: int, output: Value, axis: int) -> Vector | None:
        """Return the constant slices of an op's output along an axis."""
        value, params = op.inputs[0] if op.inputs else output, op.params
        if rule_for(op.name) is elementwise:
            marks: Vector | None = np.ones(output.shape[axis], bool)
            for operand in op.inputs:
                if not self.is_number(operand):
                    # A single slice that is spread along the axis may vary along the others.
                    spread = not operand.shape or operand.shape[axis] != output.shape[axis]
                    marks = None if spread else both(marks, self.along(operand, axis))
            return marks
        if op.name == "broadcast_in_dim":
            places = list(params["broadcast_dimensions"])
            old = places.index(axis) if axis in places else None
            if old is not None and value.shape[old] == output.shape[axis]:
                return self.along(value, old)
            return np.ones(output.shape[axis], bool) if self.is_number(value) else None
        if op.name == "per_reader":
            return self.along(value, axis)
        if op.name == "transpose":
            return self.along(value, params["permutation"][axis])
        if op.name in ("squeeze", "reduce_sum", "reduce_max", "reduce_min"):
            removed = params["dimensions" if op.name == "squeeze" else "axes"]
            return self.along(value, other_axes(value, removed)[axis])
        if op.name in ("reduce_window_max", "reduce_window_sum"):
            return self.along(value, axis) if _keeps_constants(op, axis) else None
        if op.name == "slice":
            marks = self.along(value, axis)
            stride = 1 if params["strides"] is None else params["strides"][axis]
            start, limit = params["start_indices"][axis], params["limit_indices"][axis]
            return None if marks is None else marks[start:limit:stride]
        if op.name == "concatenate" and params["dimension"] == axis:
            marks_of = [self.along(v, axis) for v in op.inputs]
            pairs = zip(marks_of, op.inputs, strict=True)
            return np.concatenate([np.zeros(v.shape[axis], bool) if m is None else m for m, v in pairs])
        if op.name == "reshape" and params["dimensions"] is None:
            return self._reshaped(value, output, axis)
        return None

    def _reshaped(self, value: Value, output: Value, axis: int) -> Vector | None:
        """Return which slices of a reshaped value are constant: those that lie within one constant slice."""
        for segment in segments(value.shape, output.shape):
            after = dict(segment.after)
            if segment.sizes is None or axis not in after:
                continue
            for old, factors in segment.before:
                marks = self.along(value, old)
                if marks is not None and set(factors) <= set(after[axis]):
                    grid = marks.reshape([s if f in factors else 1 for f, s in enumerate(segment.sizes)])
                    sizes = [s if f in after[axis] else 1 for f, s in enumerate(segment.sizes)]
                    return np.broadcast_to(grid, sizes).ravel()
        return None


def _keeps_constants(op: Op, axis: int) -> bool:
    """Whether a sliding window turns a constant slice into a constant slice.

    Padding must not count: it is -inf for a maximum, if each window holds an entry, and 0 for a sum.
    """
    rank = range(len(op.outputs[0].shape))
    if op.params["window_dimensions"][axis] != 1 or op.inputs[0].shape[axis] != op.outputs[0].shape[axis]:
        return False
    if op.name == "reduce_window_max":
        return all(windows_hold_an_entry(op, a) for a in rank)
    return all(tuple(op.params["padding"][a]) == (0, 0) for a in rank)


class _Site(NamedTuple):
    """A matrix product or convolution that constants can be folded into."""

    image_axis: tuple[Value, int]  # its input, and the axis of it that it sums over
    kernel: tuple[str, int, int]  # the path of its kernel, the axis that it sums over, that of its outputs
    bias: str | None  # the path of the bias added to its output; None if there is none, or padding between
    marks: Vector  # the constant slices of the input

    def fold(self, leaves: dict[str, Any], masks: dict[str, np.ndarray], numbers: np.ndarray) -> None:
        """Fold the constant slices of the input into params and masks, given the number in each slice."""
        path, summed, given = self.kernel
        # With the summed axis first, a row for each slice of the input.
        rows = np.moveaxis(np.asarray(leaves[path], np.float64).copy(), summed, 0)
        alive = np.moveaxis(masks[path].copy(), summed, 0)
        fold = np.flatnonzero(self.marks & alive.any(axis=tuple(range(1, alive.ndim))))
        if self.bias is None:
            # The largest constant stands for the others, so that no ratio exceeds 1. If it is 0, all of them
            # are, and their rows multiply zeros only.
            fold = fold[np.argsort(-np.abs(numbers[fold]), kind="stable")]
            if len(fold) and numbers[fold[0]] != 0:
                fold, stands = fold[1:], fold[0]
                rows[stands] += np.tensordot(numbers[fold] / numbers[stands], rows[fold], 1)
                alive[stands] |= alive[fold].any(axis=0)
        else:
            moved = np.tensordot(numbers[fold], rows[fold], 1)
            axis = given - (summed < given)
            others = tuple(a for a in range(moved.ndim) if a != axis)
            bias = np.asarray(leaves[self.bias], np.float64) + moved.sum(axis=others)
            masks[self.bias] = masks[self.bias] | (bias != 0)
            leaves[self.bias] = jnp.asarray(bias, leaves[self.bias].dtype)
        rows[fold], alive[fold] = 0, False
        leaves[path] = jnp.asarray(np.moveaxis(rows, 0, summed), leaves[path].dtype)
        masks[path] = np.moveaxis(alive, 0, summed)


def _site(op: Op, network: TracedNetwork, constants: Constants) -> _Site | None:
    """Return an op as a place to fold into; None if nothing folds there, or it reads no constant slice."""
    if op.name not in ("dot_general", "conv_general_dilated"):
        return None
    image, weights = op.inputs
    if op.name == "dot_general":
        (left, right), batch = op.params["dimension_numbers"]
        if _own_param(weights, network) is None:  # the kernel stands on the left, as in W @ x
            image, weights, left, right = weights, image, right, left
        if batch != ((), ()) or len(left) != 1 or len(weights.shape) != 2:
            return None
        axis, summed, given, bordered = left[0], right[0], 1 - right[0], False
        out_axis = len(op.outputs[0].shape) - 1 if weights is op.inputs[1] else 0
    else:
        if op.params["feature_group_count"] > 1 or op.params["batch_group_count"] > 1:
            return None
        numbers = op.params["dimension_numbers"]
        axis, summed, given = numbers.lhs_spec[1], numbers.rhs_spec[1], numbers.rhs_spec[0]
        out_axis = numbers.out_spec[1]
        bordered = any(tuple(p) != (0, 0) for p in op.params["padding"])
        bordered |= any(d != 1 for d in op.params["lhs_dilation"])
    kernel = _own_param(weights, network)
    marks = constants.along(image, axis)
    if kernel is None or marks is None or not marks.any():
        return None
    bias = None if bordered else _own_bias(op.outputs[0], out_axis, network)
    return _Site((image, axis), (kernel, summed, given), bias, marks)


def _readers(value: Value, network: TracedNetwork) -> list[Op]:
    """Return the ops that read a value, each as often as it reads it."""
    return [op for op in network.region.ops for given in op.inputs if given is value]


def _own_param(value: Value, network: TracedNetwork) -> str | None:
    """Return the path of the param that a value is, up to its dtype, if nothing else reads it."""
    while value.op is not None and value.op.name in ("convert_element_type", "copy"):
        if len(_readers(value, network)) != 1:
            return None
        value = value.op.inputs[0]
    path = next((path for path, param in network.values.items() if param is value), None)
    read_once = len(_readers(value, network)) == 1 and not any(o is value for o in network.region.outputs)
    return path if read_once else None


def _own_bias(output: Value, axis: int, network: TracedNetwork) -> str | None:
    """Return the path of the bias that is added to a value along an axis, if nothing else reads either."""
    readers = _readers(output, network)
    if len(readers) != 1 or readers[0].name != "add" or any(o is output for o in network.region.outputs):
        return None
    (other,) = [v for v in readers[0].inputs if v is not output] or [None]
    shape = other.shape if other is not None else ()
    if other is None or len(shape) != len(output.shape) or shape[axis] != output.shape[axis]:
        return None
    while other.op is not None and other.op.name in ("broadcast_in_dim", "reshape"):
        if len(_readers(other, network)) != 1:
            return None
        other = other.op.inputs[0]
    path = _own_param(other, network)
    return path if path is not None and other.shape == (output.shape[axis],) else None


def _read(
    network: TracedNetwork, facts: Facts, wanted: Sequence[tuple[Value, int]], leaves: Sequence[Any]
) -> list[np.ndarray]:
    """Return the first entry of each slice of some values along an axis, from one run of the function."""

    @jax.jit
    def first(leaves):
        values = network.values_of([value for value, _ in wanted], facts, leaves)
        pairs = zip(values, wanted, strict=True)
        return [jnp.moveaxis(v, axis, 0).reshape(v.shape[axis], -1)[:, 0] for v, (_, axis) in pairs]

    return [np.asarray(numbers, np.float64) for numbers in first(list(leaves))]
