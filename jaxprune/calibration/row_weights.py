"""How much each row of the data counts: padding must not enter the statistics of a layer.

A user gives weights for the inputs: an attention mask (batch, length) beside tokens of that shape, 0 where a
token is padding. A layer deep in the network reads data of another shape, (length, batch, features) or
(batch * length, features) say. The rules here carry the weights along, equation by equation.

What is known of a value is a tuple of `RowWeights`. Each gives weights along some of the value's axes; there
may be several, because attention scores (batch, heads, queries, keys) have weights by (batch, query) and by
(batch, key). All of them hold: a position counts as much as the least of them says. Three cases differ:

- An axis that is summed over, or contracted, is gone. What remains counts as much as the largest of the
  weights along it: an example counts if any of its tokens does. So do the places of experts that tokens are
  sent to by a product with a one-hot array, the empty ones included.
- An axis whose positions have lost their meaning (sorted, or convolved with a stride) is still there, but
  nothing is known along it. It is noted as `RowWeights(None, (axis,))`, so that rows along it are
  refused rather than counted. A residual connection that knows the axis settles it again.
- An empty tuple says that nothing bears on the value: a param, a constant, an input without weights. It has
  no part in what is known of a sum with data.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph.engine.rules.elementwise import ELEMENTWISE
from jaxprune.tracing.jaxprs import scan_split


class RowWeights(NamedTuple):
    """Weights of a value along some of its axes.

    Attributes:
      array: it has one axis for each of `axes`; the weight of the value at an index is `array[index[axes]]`.
        None if the weights along `axes` are not known.
      axes: axes of the value, in ascending order.
    """

    array: Any
    axes: tuple[int, ...]


Known = tuple[RowWeights, ...]
"""What is known of one value."""


def of_input(shape: Sequence[int], weights: Any) -> Known:
    """Return what is known of an input: its weights, if their shape is that of its first axes.

    Example:
      >>> import numpy as np
      >>> [known.axes for known in of_input((2, 5, 8), np.ones((2, 5)))], of_input((5, 2), np.ones((2, 5)))
      ([(0, 1)], ())
    """
    axes = tuple(range(weights.ndim))
    return (RowWeights(weights, axes),) if tuple(shape[: weights.ndim]) == tuple(weights.shape) else ()


def of_rows(known: Known, shape: Sequence[int], row_axes: Sequence[int]) -> Any:
    """Return the weights of the rows of a product, or None if they are not known.

    The rows of a product run along the batch and free axes of its data. Those of a convolution are positions
    of its output: pass what `through` returns for that, its shape, and all its axes but the channels.

    Args:
      known: what is known of the data.
      shape: the shape of the data.
      row_axes: the axes of the data that make rows, in any order.

    Returns:
      An array whose axes are `row_axes`, in their order.
    """
    rows = tuple(sorted(row_axes))
    array = _along(known, shape, rows)
    return None if array is None else jnp.transpose(array, [rows.index(axis) for axis in row_axes])


def agree(known: Sequence[Known]) -> Known:
    """Return what holds whichever of several values is taken: of the branches of a `cond`, say.

    Axes that only some of them know are not known. Where all know an axis, the least weight counts. A value
    of which nothing bears on the rows, a constant, agrees with the others.
    """
    known = [each for each in known if each]
    axes = {one.axes: None for each in known for one in _arrays(each)}
    common = [a for a in axes if all(any(one.axes == a for one in _arrays(each)) for each in known)]
    kept = [one for each in known for one in each if one.axes in common or one.array is None]
    lost = {axis for a in axes for axis in a} - {axis for a in common for axis in a}
    return _settled([*kept, *(RowWeights(None, (axis,)) for axis in sorted(lost))])


def through(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> list[Known]:
    """Return what is known of the outputs of an equation, given what is known of its inputs.

    Calls, loops and branches are not equations in this sense: enter them, with `scan_with_weights` and
    `agree`. Along all axes of the outputs of an unknown primitive nothing is known.

    Args:
      eqn: the equation.
      known: for each of its inputs what is known of it.
      args: its inputs, of which only integers are read, the indices of a `gather` say. None stands for one
        that has no value here; weights along an axis that it indexes are then lost.
    """
    outputs = [atom.aval for atom in eqn.outvars]
    if not any(known):
        return [()] * len(outputs)
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        made: Any = [_elementwise(known, outputs[0].shape, [np.shape(atom.aval) for atom in eqn.invars])]
    elif name in _EACH:
        made = known
    elif name in _RULES:
        made = _RULES[name](eqn, known, args)
    else:
        made = None
    if made is None:
        return [_unknown(output.ndim) if hasattr(output, "ndim") else () for output in outputs]
    return [_settled(each) for each in made]


def scan_with_weights(
    eqn: Any,
    inputs: Sequence[Any],
    known: Sequence[Known],
    body: Callable[[list[Any], list[Known]], tuple[Sequence[Any], Sequence[Known], Any]],
    zeros: Any = None,
) -> tuple[list[Any], list[Known], Any]:
    """Run a scan as `tracing.jaxprs.scan_with` does, with the weights of its values beside them.

    A step sees the weights of its slices. The carry counts in a step as much as what the step makes of it,
    and as the value it began with: a recurrent network's state at a padding token does not count, and the
    residual stream of stacked layers keeps its weights. After the scan the carry counts if it did in any
    step.

    Args:
      eqn: the scan.
      inputs: its inputs.
      known: for each of them what is known of it.
      body: it goes from the inputs of one step (constants, carry, slices) and what is known of them to the
        outputs of the scan's own body, what is known of these, and any tree of arrays besides. It is called
        until what it returns for the carry agrees with what it was given, two times as a rule and once if
        it returns the same arrays of weights. The last call counts.
      zeros: if given, the tree that `body` returns is a pair, and the second of the pair has arrays like
        these, which are summed over the steps without storing them for each.

    Returns:
      The outputs of the scan; what is known of each; and the trees of all steps, stacked along a new first
      axis, or the pair of these and the sums.
    """
    consts, carried = scan_split(eqn.params)
    ends = consts + carried
    begins = known[consts:ends]
    sliced = [
        _sliced(each, atom.aval.ndim) for each, atom in zip(known[ends:], eqn.invars[ends:], strict=True)
    ]
    structures: list[list[tuple[tuple[int, ...], bool]]] = []

    def step(carry: Any, slices: Any) -> Any:
        (carry, total), (values, arrays) = carry, slices
        fixed, seen = known[:consts], [put(some) for (_, put), some in zip(sliced, arrays, strict=True)]
        inside, first = list(begins), True
        while True:
            outputs, found, extra = body([*inputs[:consts], *carry, *values], [*fixed, *inside, *seen])
            agreed = [agree(pair) for pair in zip(begins, found[:carried], strict=True)]
            settled = _structures(agreed) == _structures(inside)
            if settled and (not first or all(map(_same_arrays, agreed, inside))):
                break
            inside, first = agreed, False
        structures[:] = _structures(found)
        weights = [[one.array for one in _arrays(each)] for each in found]
        if zeros is not None:
            extra, more = extra
            total = jax.tree.map(jnp.add, total, more)
        return (list(outputs[:carried]), total), (list(outputs[carried:]), weights, extra)

    (values, total), (stacked, weights, extras) = lax.scan(
        step,
        (list(inputs[consts:ends]), zeros),
        (list(inputs[ends:]), [arrays for arrays, _ in sliced]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    of_outputs = []
    for number, (arrays, structure) in enumerate(zip(weights, structures, strict=True)):
        left, each = iter(arrays), []
        for axes, is_array in structure:
            moved = axes if number < carried else tuple(axis + 1 for axis in axes)
            if not is_array:
                each.append(RowWeights(None, moved))
            elif number < carried:
                each.append(RowWeights(jnp.max(next(left), 0), moved))
            else:
                each.append(RowWeights(next(left), (0, *moved)))
        of_outputs.append(tuple(each))
    return [*values, *stacked], of_outputs, extras if zeros is None else (extras, total)


# What is known, put together


def _unknown(ndim: int) -> Known:
    return tuple(RowWeights(None, (axis,)) for axis in range(ndim))


def _arrays(known: Iterable[RowWeights]) -> list[RowWeights]:
    return [one for one in known if one.array is not None]


def _lost(known: Iterable[RowWeights]) -> list[int]:
    return sorted({axis for one in known if one.array is None for axis in one.axes})


def _structures(known: Iterable[Known]) -> list[list[tuple[tuple[int, ...], bool]]]:
    return [[(one.axes, one.array is not None) for one in each] for each in known]


def _same_arrays(a: Known, b: Known) -> bool:
    return all(one.array is other.array for one, other in zip(a, b, strict=True))


def _least(a: Any, b: Any) -> Any:
    return a if a is b else jnp.minimum(a, b)


def _settled(known: Iterable[RowWeights]) -> Known:
    """Return one `RowWeights` for each set of axes, and the axes that are not known by any."""
    known, by_axes = list(known), {}
    for one in _arrays(known):
        order = tuple(sorted(one.axes))
        array = one.array
        if order != tuple(one.axes):
            array = jnp.transpose(array, [one.axes.index(axis) for axis in order])
        by_axes[order] = _least(by_axes[order], array) if order in by_axes else array
    covered = {axis for axes in by_axes for axis in axes}
    lost = [axis for axis in _lost(known) if axis not in covered]
    return (
        *(RowWeights(array, axes) for axes, array in by_axes.items()),
        *(RowWeights(None, (axis,)) for axis in lost),
    )


def _without(one: RowWeights, gone: Iterable[int]) -> RowWeights:
    """Return weights without some axes, along which the largest counts."""
    gone = set(gone)
    axes = tuple(axis for axis in one.axes if axis not in gone)
    if one.array is None or axes == tuple(one.axes):
        return one._replace(axes=axes)
    return RowWeights(jnp.max(one.array, [n for n, axis in enumerate(one.axes) if axis in gone]), axes)


def _along(known: Known, shape: Sequence[int], axes: tuple[int, ...]) -> Any:
    """Return the weights along axes in ascending order, an array of their sizes, or None."""
    if not _arrays(known) or set(_lost(known)) & set(axes):
        return None
    sizes, others = [shape[axis] for axis in axes], set(range(len(shape))) - set(axes)
    found = [_without(one, others) for one in _arrays(known)]
    spread = [
        jnp.expand_dims(one.array, [n for n, axis in enumerate(axes) if axis not in one.axes])
        for one in found
    ]
    return jnp.broadcast_to(reduce(_least, spread), sizes)


def _mapped(known: Known, to: Callable[[int], int | None]) -> list[RowWeights]:
    """Return weights along axes with other numbers; `to` returns None for an axis that is gone."""
    made = []
    for one in known:
        one = _without(one, [axis for axis in one.axes if to(axis) is None])
        if one.array is not None or one.axes:
            made.append(one._replace(axes=tuple(to(axis) for axis in one.axes)))
    return made


def _losing(known: Known, axes: Iterable[int]) -> list[RowWeights]:
    """Return what is known if positions along some axes lose their meaning, where weights depend on them."""
    axes = set(axes)
    lost = sorted({axis for one in known for axis in one.axes if axis in axes})
    return [
        *_mapped(known, lambda axis: None if axis in axes else axis),
        *(RowWeights(None, (a,)) for a in lost),
    ]


def _touched(known: Known, axes: Iterable[int]) -> bool:
    return any(axis in axes for one in known for axis in one.axes)


# Rules


def _elementwise(known: Sequence[Known], shape: Sequence[int], shapes: Sequence[Sequence[int]]) -> Any:
    """All operands have the axes of the output, or are scalars."""
    return [
        one for each, own in zip(known, shapes, strict=True) if len(own) in (0, len(shape)) for one in each
    ]


def _broadcast_in_dim(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    where, shape = eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape
    grows = [axis for axis, size in enumerate(shape) if size == 1 != eqn.params["shape"][where[axis]]]
    # All positions along an axis that grows are copies of one, so its weight is that of all.
    return [_mapped(known[0], lambda axis: None if axis in grows else where[axis])]


def _transpose(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    return [_mapped(known[0], list(eqn.params["permutation"]).index)]


def _squeeze(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    stays = [a for a in range(eqn.invars[0].aval.ndim) if a not in eqn.params["dimensions"]]
    return [_mapped(known[0], lambda axis: stays.index(axis) if axis in stays else None)]


def _expand_dims(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    stays = [a for a in range(eqn.outvars[0].aval.ndim) if a not in eqn.params["dimensions"]]
    return [_mapped(known[0], stays.__getitem__)]


def _reduce(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    gone = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    ndim = eqn.invars[0].aval.ndim
    stays = [axis for axis in range(ndim) if axis not in gone]
    both = [
        one for each, atom in zip(known, eqn.invars, strict=True) if atom.aval.ndim == ndim for one in each
    ]
    made = _mapped(tuple(both), lambda axis: stays.index(axis) if axis in stays else None)
    return [made] * len(eqn.outvars)


def _reshape_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Return the smallest runs of axes that a reshape turns into each other; axes of size 1 are left out."""
    left = [axis for axis, size in enumerate(before) if size != 1]
    right = [axis for axis, size in enumerate(after) if size != 1]
    if 0 in before:
        return None
    groups = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        a, b = before[ins[0]], after[outs[0]]
        while a != b:
            if a < b:
                ins.append(left.pop(0))
                a *= before[ins[-1]]
            else:
                outs.append(right.pop(0))
                b *= after[outs[-1]]
        groups.append((ins, outs))
    return groups


def _reshape(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    groups = _reshape_groups(before, after)
    if groups is None or eqn.params.get("dimensions") is not None:
        return None
    ones = [axis for axis, size in enumerate(before) if size == 1]
    if set(_lost(known[0])) & set(ones):
        return None
    made, lost = [], []
    for one in known[0]:
        one = _without(one, ones)  # of one position, so nothing is lost
        here = [(ins, outs) for ins, outs in groups if set(ins) & set(one.axes)]
        axes = tuple(axis for _, outs in here for axis in outs)
        if one.array is None:
            lost += axes
            continue
        array = one.array
        # Weights along only some of the axes that are merged are spread over the others.
        spread = tuple(axis for ins, _ in here for axis in ins)
        if spread != one.axes:
            array = jnp.expand_dims(array, [n for n, axis in enumerate(spread) if axis not in one.axes])
            array = jnp.broadcast_to(array, [before[axis] for axis in spread])
        sizes = tuple(after[axis] for axis in axes)
        made.append(RowWeights(array if array.shape == sizes else jnp.reshape(array, sizes), axes))
    return [[*_losing(tuple(made), lost), *(RowWeights(None, (axis,)) for axis in lost)]]


def _slice(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    shape, starts, limits = eqn.invars[0].aval.shape, eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    cuts = [slice(*cut) for cut in zip(starts, limits, strides, strict=True)]
    return [_cut(known[0], shape, cuts)]


def _cut(known: Known, shape: Sequence[int], cuts: Sequence[slice]) -> list[RowWeights]:
    made = []
    for one in known:
        here = tuple(cuts[axis] for axis in one.axes)
        whole = all(cut == slice(0, shape[axis], 1) for axis, cut in zip(one.axes, here, strict=True))
        made.append(one if one.array is None or whole else one._replace(array=one.array[here]))
    return made


def _split(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    axis, shape = eqn.params["axis"], eqn.invars[0].aval.shape
    ends = np.cumsum(eqn.params["sizes"]).tolist()
    cuts = [slice(0, size, 1) for size in shape]
    return [
        _cut(known[0], shape, [*cuts[:axis], slice(start, end, 1), *cuts[axis + 1 :]])
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _rev(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    made = []
    for one in known[0]:
        places = [n for n, axis in enumerate(one.axes) if axis in eqn.params["dimensions"]]
        if one.array is not None and places:
            one = one._replace(array=jnp.flip(one.array, places))
        made.append(one)
    return [made]


def _concatenate(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    shapes = [atom.aval.shape for atom in eqn.invars]
    return [_joined(known, shapes, eqn.params["dimension"])]


def _stack(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    along, shape = eqn.params["axis"], eqn.invars[0].aval.shape
    shape = (*shape[:along], 1, *shape[along:])
    pieces = [_settled(_mapped(each, lambda axis: axis + (axis >= along))) for each in known]
    return [_joined(pieces, [shape] * len(pieces), along)]


def _unstack(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    along, shape = eqn.params["axis"], eqn.invars[0].aval.shape
    cuts, made = [slice(0, size, 1) for size in shape], []
    for number in range(shape[along]):
        cuts[along] = slice(number, number + 1, 1)
        piece = tuple(_cut(known[0], shape, cuts))
        made.append(_mapped(piece, lambda axis: None if axis == along else axis - (axis > along)))
    return made


def _tile(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    reps = eqn.params["reps"]
    return [
        [
            one
            if one.array is None
            else one._replace(array=jnp.tile(one.array, [reps[axis] for axis in one.axes]))
            for one in known[0]
        ]
    ]


def _joined(known: Sequence[Known], shapes: Sequence[Sequence[int]], axis: int) -> list[RowWeights]:
    """Return what is known of values that lie end to end along an axis."""
    made = [one for each in known for one in each if one.array is None]
    bases = {tuple(a for a in one.axes if a != axis): None for each in known for one in _arrays(each)}
    for base in bases:
        same = [one for each in known for one in _arrays(each) if one.axes == base]
        if len(same) == sum(map(bool, known)) and all(one.array is same[0].array for one in same):
            made.append(same[0])
            continue
        axes = tuple(sorted({*base, axis}))
        pieces = [
            _along(each, shape, axes) if each else None for each, shape in zip(known, shapes, strict=True)
        ]
        if any(each and piece is None for each, piece in zip(known, pieces, strict=True)):
            return [RowWeights(None, (axis,)), *_losing(tuple(one for each in known for one in each), [axis])]
        place = axes.index(axis)
        largest = reduce(jnp.maximum, [jnp.max(p, place, keepdims=True) for p in pieces if p is not None])
        # A piece that is no data, a class token say, counts wherever its example does.
        pieces = [
            jnp.repeat(largest, shape[axis], place) if piece is None else piece
            for piece, shape in zip(pieces, shapes, strict=True)
        ]
        made.append(RowWeights(jnp.concatenate(pieces, place), axes))
    return made


def _pad(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    """What is padded along an axis with weights counts as a constant piece of a `concatenate` does."""
    del args
    made = []
    for one in known[0]:
        config = [eqn.params["padding_config"][axis] for axis in one.axes]
        if one.array is not None:
            for place, (low, high, interior) in enumerate(config):
                if (low, high, interior) != (0, 0, 0):
                    largest = jnp.max(one.array, place, keepdims=True)
                    low, high, interior = (int(n) for n in (low, high, interior))
                    pads = [(0, 0, 0)] * len(config)
                    pads[place] = (low, high, interior)
                    own = lax.pad(jnp.ones_like(one.array), jnp.zeros((), one.array.dtype), pads)
                    one = one._replace(
                        array=jnp.where(own > 0, lax.pad(one.array, jnp.zeros((), own.dtype), pads), largest)
                    )
        made.append(one)
    return [made]


def _cumulative(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    """A running sum, like causal attention, keeps the meaning of positions."""
    del eqn, args
    return [known[0]]


def _sort(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    names = ("dimension", "axis", "reduction_dimension")
    axis = next(eqn.params[name] for name in names if name in eqn.params) % eqn.invars[0].aval.ndim
    together = [one for each in known for one in _losing(each, [axis])]
    return [together] * len(eqn.outvars)


def _windows(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    params, ndim = eqn.params, eqn.invars[0].aval.ndim
    slides = [
        axis
        for axis in range(ndim)
        if (params["window_dimensions"][axis], params["window_strides"][axis]) != (1, 1)
        or tuple(params["padding"][axis]) != (0, 0)
    ]
    both = tuple(
        one for each, atom in zip(known, eqn.invars, strict=True) if atom.aval.ndim == ndim for one in each
    )
    return [_losing(both, slides)] * len(eqn.outvars)


def _dot_general(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    del args
    return [_contracted(eqn, known, eqn.params["dimension_numbers"], ())]


def _ragged_dot_general(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    """Rows that go to experts by group sizes: an ordinary product as far as the rows are concerned."""
    del args
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting = numbers.dot_dimension_numbers[0][0]
    if set(numbers.lhs_ragged_dimensions) & set(contracting):
        return None  # one result for each group of rows, on a new first axis
    return [_contracted(eqn, known[:2], numbers.dot_dimension_numbers, numbers.rhs_group_dimensions)]


def _contracted(
    eqn: Any, known: Sequence[Known], dimension_numbers: Any, groups: Sequence[int]
) -> list[RowWeights]:
    contracting, batch = dimension_numbers
    made, first = [], len(batch[0])
    for side in range(2):
        ndim, gone = eqn.invars[side].aval.ndim, {*contracting[side], *batch[side]}
        gone |= set(groups) if side == 1 else set()
        free = [axis for axis in range(ndim) if axis not in gone]
        places = {axis: n for n, axis in enumerate(batch[side])}
        places |= {axis: first + n for n, axis in enumerate(free)}
        first += len(free)
        made += _mapped(known[side], places.get)
    return made


def _convolution(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    """An image stays an image; positions keep their meaning if there are as many after as before.

    That is a convolution without strides that pads: the result at a position is made of its neighbourhood,
    before and after, or, in a causal convolution, before alone.
    """
    del args
    if known[1] or eqn.params["batch_group_count"] != 1:
        return None
    numbers = eqn.params["dimension_numbers"]
    lhs, out = numbers.lhs_spec, numbers.out_spec
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    strides, dilation = eqn.params["window_strides"], eqn.params["lhs_dilation"]
    places: dict[int, int | None] = {lhs[0]: out[0], lhs[1]: None}
    lost = set()
    for number, (here, there) in enumerate(zip(lhs[2:], out[2:], strict=True)):
        places[here] = there
        if strides[number] != 1 or dilation[number] != 1 or before[here] != after[there]:
            lost.add(here)
    if eqn.params["feature_group_count"] != 1:
        lost.add(lhs[1])
        places[lhs[1]] = out[1]
    return [_mapped(tuple(_losing(known[0], lost)), places.get)]


def _dynamic_slice(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    made = []
    for one in known[0]:
        cut = [axis for axis in one.axes if sizes[axis] != shape[axis]]
        if one.array is None or not cut:
            made.append(one)
        elif any(args[1 + axis] is None for axis in cut):
            made += _losing((one,), cut)
        else:
            starts = [
                args[1 + axis] if axis in cut else jnp.zeros_like(args[1 + cut[0]]) for axis in one.axes
            ]
            array = lax.dynamic_slice(one.array, starts, [sizes[axis] for axis in one.axes])
            made.append(one._replace(array=array))
    return [made]


def _gather(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    """The weights are gathered as the values are; those of the indices belong to the positions they fill."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offsets = dict(zip([a for a in range(operand.ndim) if a not in gone], numbers.offset_dims, strict=True))
    whole = [axis for axis in offsets if sizes[axis] == operand.shape[axis]]
    batch = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    made = _mapped(known[1], lambda axis: batch[axis] if axis < indices.ndim - 1 else None)
    for one in known[0]:
        if set(one.axes) <= set(whole):
            made.append(one._replace(axes=tuple(offsets[axis] for axis in one.axes)))
        elif one.array is None or args[1] is None:
            made += _unknown(out.ndim)
        else:
            # Axes that are sliced whole and have no weights of their own are gathered as if of size 1.
            flat = [axis for axis in whole if axis not in one.axes]
            array = _spread_but(one, operand.shape, flat)
            one_sizes = [1 if axis in flat else size for axis, size in enumerate(sizes)]
            fill = 0 if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP else None
            got = lax.gather(array, args[1], numbers, one_sizes, mode=eqn.params["mode"], fill_value=fill)
            squeezed = [offsets[axis] for axis in flat]
            axes = tuple(axis for axis in range(out.ndim) if axis not in squeezed)
            made.append(RowWeights(jnp.squeeze(got, squeezed), axes))
    return [made]


def _spread_but(one: RowWeights, shape: Sequence[int], flat: Iterable[int]) -> Any:
    """Return weights with all axes of a value, of size 1 along the axes `flat`."""
    sizes = [1 if axis in flat else size for axis, size in enumerate(shape)]
    own = jnp.expand_dims(one.array, [axis for axis in range(len(shape)) if axis not in one.axes])
    return jnp.broadcast_to(own, sizes)


def _scatter(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    """Written into data, values take part in it; written into a constant, they bring their weights.

    A position of a constant that no value is written to has the weight 0: an empty place in an expert's
    batch.
    """
    into, _, values = known
    if into:
        return [into]
    if not _arrays(values) or args[1] is None:
        return None
    operand, updates = eqn.invars[0].aval, eqn.invars[2].aval
    spread = _along(tuple(_arrays(values)), updates.shape, tuple(range(updates.ndim)))
    if _lost(values):
        return None
    numbers = eqn.params["dimension_numbers"]
    written = lax.scatter_max(
        jnp.zeros(operand.shape, spread.dtype), args[1], spread, numbers, mode=eqn.params["mode"]
    )
    # Windows that span an axis are alike along it, unless their weights depend on it.
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = dict(
        zip([a for a in range(operand.ndim) if a not in gone], numbers.update_window_dims, strict=True)
    )
    alike = [
        axis
        for axis, place in windows.items()
        if updates.shape[place] == operand.shape[axis] and not _touched(values, [place])
    ]
    axes = tuple(axis for axis in range(operand.ndim) if axis not in alike)
    return [[RowWeights(jnp.max(written, alike), axes)]]


def _dynamic_update_slice(eqn: Any, known: Sequence[Known], args: Sequence[Any]) -> Any:
    into, values = known[0], known[1]
    operand, update = eqn.invars[0].aval, eqn.invars[1].aval
    if into:
        return [into]
    part = [axis for axis in range(operand.ndim) if operand.shape[axis] != update.shape[axis]]
    if not part:
        return [values]
    if not _arrays(values) or _lost(values) or any(args[2 + axis] is None for axis in range(operand.ndim)):
        return None
    axes = tuple(sorted({*part, *(axis for one in values for axis in one.axes)}))
    written = lax.dynamic_update_slice(
        jnp.zeros([operand.shape[axis] for axis in axes], jnp.result_type(values[0].array)),
        _along(values, update.shape, axes).astype(jnp.result_type(values[0].array)),
        [args[2 + axis] for axis in axes],
    )
    return [[RowWeights(written, axes)]]


def _sliced(known: Known, ndim: int) -> tuple[list[Any], Callable[[Sequence[Any]], Known]]:
    """Return the arrays that a scan slices beside a value, and what is known of a slice, given theirs."""
    sliced = [one.array for one in _arrays(known) if 0 in one.axes]

    def of_slice(arrays: Sequence[Any]) -> Known:
        if 0 in _lost(known):
            return _unknown(ndim - 1)
        left = iter(arrays)
        return _settled(
            RowWeights(
                next(left) if one.array is not None and 0 in one.axes else one.array,
                tuple(axis - 1 for axis in one.axes if axis),
            )
            for one in known
        )

    return sliced, of_slice


# fmt: off
_EACH = frozenset(("optimization_barrier", "sharding_constraint", "device_put", "reshard"))
_RULES: dict[str, Callable[[Any, Sequence[Known], Sequence[Any]], Any]] = {
    "broadcast_in_dim": _broadcast_in_dim, "transpose": _transpose, "squeeze": _squeeze,
    "expand_dims": _expand_dims, "reshape": _reshape, "slice": _slice, "split": _split, "rev": _rev,
    "concatenate": _concatenate, "stack": _stack,
    "unstack": _unstack, "tile": _tile, "pad": _pad, "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general, "conv_general_dilated": _convolution,
    "dynamic_slice": _dynamic_slice, "gather": _gather, "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys((
        "scatter", "scatter-add", "scatter_add", "scatter-max", "scatter_max", "scatter-min", "scatter_min",
        "scatter-mul", "scatter_mul", "scatter-sub", "scatter_sub",
    ), _scatter),
    **dict.fromkeys(("sort", "top_k", "approx_top_k"), _sort),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _cumulative),
    **dict.fromkeys(("argmax", "argmin", "reduce"), _reduce),
    **dict.fromkeys((
        "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
    ), _reduce),
    **dict.fromkeys((
        "reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min",
    ), _windows),
}
# fmt: on
