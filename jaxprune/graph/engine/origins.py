"""What each axis of each value was made along: constants, params, or anything else.

A forward pass over a program whose rules have not been linked yet. `readers` asks it which axes of a value
its readers can lose slices of independently.
"""

from collections.abc import Sequence

from jaxprune.graph.engine.ir import Body, Op, Region, Value, bodies_of, other_axes, same_size
from jaxprune.graph.engine.rules import elementwise, rule_for
from jaxprune.graph.engine.rules.base import pin_inputs
from jaxprune.graph.engine.rules.elementwise import matching_axes
from jaxprune.graph.engine.rules.per_reader import Origin
from jaxprune.graph.engine.rules.reductions import REDUCTIONS
from jaxprune.graph.engine.rules.shapes import segments
from jaxprune.graph.engine.rules.wrappers import RUN_ONCE

# Ops whose values have the same rank and whose axes do not mix.
_SAME_AXES = frozenset(
    (
        *("slice", "dynamic_slice", "dynamic_update_slice", "rev", "pad", "concatenate", "split", "tile"),
        *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "optimization_barrier"),
        *("sharding_constraint", "device_put", "reshard", "pvary"),
    )
)
_REDUCTIONS = frozenset((*REDUCTIONS, "reduce_xor", "argmax", "argmin"))


class Origins:
    """What the axes of all values of a program were made along."""

    def __init__(self, region: Region, params: Sequence[Value]):
        """Follows the origins through a program, some of whose inputs are params."""
        self._of: dict[int, tuple[Origin, ...]] = {}
        self._constant: set[int] = set()
        self._summed: set[int] = set()
        for value in params:
            self._of[id(value)] = (Origin.PARAM,) * len(value.shape)
        self._free_of_params = set(map(id, region.inputs)) - set(map(id, params))
        self._run(region)

    def of(self, value: Value) -> tuple[Origin, ...]:
        """Return the origin of each axis of a value."""
        if value.constant is not None:
            return (Origin.CONSTANT,) * len(value.shape)
        return self._of.get(id(value), (Origin.OTHER,) * len(value.shape))

    def enter(self, value: Value, origins: tuple[Origin, ...]) -> None:
        """Set the origins of a new value."""
        self._of[id(value)] = origins

    def are_weights(self, value: Value, readers: Sequence[Op | None]) -> bool:
        """Whether any reader of a param, directly or through elementwise ops, sums products with it.

        Then the param holds the weights of a layer, or an embedding, whose slices go with those of the
        layer. A bias or a scale only meets the outputs of layers entry by entry. To be called for the values
        of a program from the last to the first, since the answer for a value depends on its readers.
        """
        found = any(self._sums_products(value, reader) for reader in readers)
        if found:
            self._summed.add(id(value))
        return found

    def _sums_products(self, value: Value, reader: Op | None) -> bool:
        if reader is None or rule_for(reader.name) is elementwise:
            return reader is not None and id(reader.outputs[0]) in self._summed
        if reader.regions:
            inside = [
                inner
                for body in bodies_of(reader)
                for outer, inner, _ in _body_inputs(reader, body)
                if outer is value
            ]
            return not inside or any(id(inner) in self._summed for inner in inside)
        # The output of a product holds no entries of the param; an op that rearranges the param is followed.
        outputs = [output for output in reader.outputs if Origin.PARAM in self.of(output)]
        return not outputs or any(id(output) in self._summed for output in outputs)

    def _is_constant(self, value: Value) -> bool:
        return value.constant is not None or id(value) in self._constant

    def _is_free_of_params(self, value: Value) -> bool:
        return value.constant is not None or id(value) in self._free_of_params

    def _run(self, region: Region) -> None:
        # The carry of a loop over layers has one origin in all rounds, even if the first carry is a constant.
        loops = {id(loop): loop for op in region.ops for loop, _ in op.rounds}.values()
        carried = {id(value) for loop in loops for one in loop.rounds for value in one.carry_in}
        for op in region.ops:
            if any(id(output) in carried for output in op.outputs):
                continue
            if op.regions:
                self._call(op)
            if not op.has_effects and all(map(self._is_constant, op.inputs)):
                self._constant.update(map(id, op.outputs))
                for output in op.outputs:
                    self._of[id(output)] = (Origin.CONSTANT,) * len(output.shape)
            elif not op.regions:
                for output in op.outputs:
                    self._of[id(output)] = tuple(self._axes(op, output))
            if all(map(self._is_free_of_params, op.inputs)):
                self._free_of_params.update(map(id, op.outputs))

    def _axes(self, op: Op, output: Value) -> Sequence[Origin]:
        """Return the origins of the output of an op without bodies."""
        rank, of = len(output.shape), self.of
        if rule_for(op.name) is elementwise:
            axes = [Origin.CONSTANT] * rank
            for value in op.inputs:
                for axis in matching_axes(value, output):
                    axes[axis] = max(axes[axis], of(value)[axis])
            return axes
        if op.name == "broadcast_in_dim":
            axes = [Origin.CONSTANT] * rank
            for axis, place in enumerate(op.params["broadcast_dimensions"]):
                if same_size(op.inputs[0].shape[axis], output.shape[place]):
                    axes[place] = of(op.inputs[0])[axis]
            return axes
        if op.name == "transpose":
            return [of(op.inputs[0])[axis] for axis in op.params["permutation"]]
        if op.name == "squeeze" or op.name in _REDUCTIONS:
            removed = op.params["dimensions" if op.name == "squeeze" else "axes"]
            return [of(op.inputs[0])[axis] for axis in other_axes(op.inputs[0], removed)]
        if op.name in _SAME_AXES:
            same = [value for value in op.inputs if len(value.shape) == rank]
            return [max(of(value)[axis] for value in same) for axis in range(rank)]
        if op.name == "reshape":
            axes = [Origin.CONSTANT] * rank
            for segment in segments(op.inputs[0].shape, output.shape):
                for place, _ in segment.after:
                    axes[place] = max(
                        [of(op.inputs[0])[axis] for axis, _ in segment.before], default=axes[place]
                    )
            return axes
        if op.name == "dot_general":
            return self._product(op)
        if op.name == "gather":
            return self._gather(op, output)
        # The inputs of an op without a rule are pinned, so its output is made whole, and can be cut for each
        # reader if no params went into it.
        free = all(map(self._is_free_of_params, op.inputs))
        return [Origin.CONSTANT if free and rule_for(op.name).link is pin_inputs else Origin.OTHER] * rank

    def _product(self, op: Op) -> list[Origin]:
        (left, right), (sums, batch) = op.inputs, op.params["dimension_numbers"]
        axes = [
            max(self.of(left)[a], self.of(right)[b], key=int) for a, b in zip(batch[0], batch[1], strict=True)
        ]
        for value, summed, batched in ((left, sums[0], batch[0]), (right, sums[1], batch[1])):
            # The output of a layer no longer holds the entries of the params.
            free = [self.of(value)[axis] for axis in other_axes(value, summed, batched)]
            axes += [origin if origin is Origin.CONSTANT else Origin.OTHER for origin in free]
        return axes

    def _gather(self, op: Op, output: Value) -> list[Origin]:
        """Return the origins of windows of the operand; those of a param only at constant indices."""
        numbers, (operand, indices) = op.params["dimension_numbers"], op.inputs
        windows = other_axes(operand, numbers.collapsed_slice_dims, numbers.operand_batching_dims)
        axes = [Origin.OTHER] * len(output.shape)
        for axis, place in zip(windows, numbers.offset_dims, strict=True):
            origin = self.of(operand)[axis]
            if origin is Origin.CONSTANT or self._is_constant(indices):
                axes[place] = origin
        if not numbers.operand_batching_dims:
            for axis, place in enumerate(other_axes(output, numbers.offset_dims)):
                axes[place] = self.of(indices)[axis]
        return axes

    def _call(self, op: Op) -> None:
        """Enter the inputs of an op's bodies, and the op's outputs where the bodies run once."""
        for body in bodies_of(op):
            for outer, inner, skip in _body_inputs(op, body):
                self._of[id(inner)] = self.of(outer)[skip:]
                if self._is_constant(outer):
                    self._constant.add(id(inner))
                if self._is_free_of_params(outer):
                    self._free_of_params.add(id(inner))
            self._run(body.region)
        bodies = [op.regions["body"]] if op.name in RUN_ONCE else []
        bodies = list(op.regions.values()) if op.name == "cond" else bodies
        for place, output in enumerate(op.outputs):
            if bodies:
                columns = zip(*(self.of(body.outputs[place]) for body in bodies), strict=True)
                self._of[id(output)] = tuple(max(column) for column in columns)


def _body_inputs(op: Op, body: Body) -> list[tuple[Value, Value, int]]:
    """Return pairs of an op's input and its body's input, and how many first axes the latter lacks.

    What a loop carries is left out, and so are the parts that devices get in a `shard_map`.
    """
    if op.name == "shard_map":
        return []
    start, inputs = body.consts + body.carried, body.region.inputs
    fixed = zip(body.given[: body.consts], inputs, strict=False)
    slices = zip(body.given[start:], inputs[start:], strict=False)
    return [*((outer, inner, 0) for outer, inner in fixed), *((outer, inner, 1) for outer, inner in slices)]
