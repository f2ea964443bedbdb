"""A product of a kernel with data as products of matrices.

These are `(batch, rows, inputs)` times `(batch, outputs, inputs)`.

The batch counts matrices that are multiplied independently of each other: the batch axes of a `dot_general`,
the groups of a convolution, the experts of a ragged product. The inputs are ordered so that the groups of N:M
sparsity are neighbours: along the last axis that the product sums over, for a convolution along its channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.calibration.row_weights import Known, of_rows
from jaxprune.tracing.dataflow import Product
from jaxprune.tracing.leaf_views import Factor, LeafView, size_of


class Rows(NamedTuple):
    """The data of a product as rows.

    Attributes:
      values: float32 or wider, (batch, rows, inputs); a batch of 1 where all matrices read the same rows.
      weights: (batch, rows), how much each row counts for each matrix; None if all count once.
    """

    values: Any
    weights: Any


class MatrixForm(NamedTuple):
    """How a product is one of matrices.

    Attributes:
      batch: how many matrices there are.
      outputs: how many outputs (rows) each has.
      inputs: how many inputs (columns) each has.
      run: how many neighbouring inputs lie along one axis of the kernel: no N:M group crosses that.
      kernel: from the kernel to (batch, outputs, inputs); linear, and each entry is read at most once.
      rows: from the data, what is known of the weights of its rows (None: all count; of a convolution what is
        known of its output), and the other inputs of the equation to `Rows`.
      batch_axes: the axes of the kernel that make the batch.
      summed: the axes of the kernel that the product sums over.
      group_axis: that of them along which N:M groups run.
      shared: the same for products that read the same rows of the same data.
      dtype: of the rows.
    """

    batch: int
    outputs: int
    inputs: int
    run: int
    kernel: Callable[[Any], Any]
    rows: Callable[[Any, Known | None, Sequence[Any]], Rows]
    batch_axes: tuple[int, ...]
    summed: tuple[int, ...]
    group_axis: int
    shared: Any
    dtype: Any


class UnknownRowsError(Exception):
    """The weights of the rows of a product are not known."""


def form_of(product: Product) -> MatrixForm | str:
    """Return the form of a product, or the reason why it has none."""
    view = product.kernel.view
    if not isinstance(view, LeafView):
        return view or "its kernel is a constant"
    eqn = product.eqn
    kernel, data = (eqn.invars[n].aval for n in (product.side, 1 - product.side))
    if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (kernel, data)):
        return "its operands are not both real floating-point numbers"
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(product, view)
    return _convolution(product) if name == "conv_general_dilated" else _ragged(product)


def _rest(ndim: int, *axes: Sequence[int]) -> tuple[int, ...]:
    taken = {axis for some in axes for axis in some}
    return tuple(axis for axis in range(ndim) if axis not in taken)


def _float32(array: Any) -> Any:
    return array.astype(_float32_or_wider(array.dtype))


def _float32_or_wider(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _matrix(shape: Sequence[int], batch: Sequence[int], free: Sequence[int], summed: Sequence[int]) -> Any:
    """Return the map of a kernel to (batch, outputs, inputs)."""
    sizes = [math.prod(shape[axis] for axis in axes) for axes in (batch, free, summed)]
    order = (*batch, *free, *summed)
    return sizes, lambda array: jnp.transpose(array, order).reshape(sizes)


def _dot(product: Product, view: LeafView) -> MatrixForm | str:
    eqn, side = product.eqn, product.side
    sums, batches = eqn.params["dimension_numbers"]
    # The kernel's axes say the order of pairs: that of the equation may run N:M groups across heads.
    pairs = sorted(zip(sums[side], sums[1 - side], strict=True))
    summed, data_summed = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    pairs = sorted(zip(batches[side], batches[1 - side], strict=True))
    batch, data_batch = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    kernel, data = (eqn.invars[n].aval.shape for n in (side, 1 - side))
    if not summed:
        return "it sums over nothing: an outer product"
    free = _rest(len(kernel), summed, batch)
    data_free = _rest(len(data), data_summed, data_batch)
    row_axes = (*data_batch, *data_free)
    (num_batch, outputs, inputs), matrix = _matrix(kernel, batch, free, summed)
    taken = _each_once(view, kernel, batch, free, summed)
    if isinstance(taken, str):
        return taken
    rows_of = math.prod(data[axis] for axis in data_free)

    def rows(array: Any, known: Known | None, others: Sequence[Any]) -> Rows:
        del others
        values = jnp.transpose(_float32(array), (*row_axes, *data_summed)).reshape(num_batch, rows_of, inputs)
        if known is None:
            return Rows(values, None)
        weights = _weights(known, data, row_axes)
        return Rows(values, weights.reshape(num_batch, rows_of))

    return MatrixForm(
        num_batch,
        outputs if taken is None else len(taken),
        inputs,
        run=kernel[summed[-1]],
        kernel=matrix if taken is None else lambda array: matrix(array)[:, taken],
        rows=rows,
        batch_axes=batch,
        summed=summed,
        group_axis=summed[-1],
        shared=(data_batch, data_summed),
        dtype=_float32_or_wider(eqn.invars[1 - side].aval.dtype),
    )


def _weights(known: Known, shape: Sequence[int], row_axes: Sequence[int]) -> Any:
    weights = of_rows(known, tuple(shape), tuple(row_axes))
    if weights is None:
        raise UnknownRowsError
    return weights


def _each_once(
    view: LeafView, shape: Sequence[int], batch: Sequence[int], free: Sequence[int], summed: Sequence[int]
) -> np.ndarray | str | None:
    """Return which outputs to take so that no entry of the leaf is read twice; None for all."""
    if view.axes is None:
        return None
    repeated = [any(f.axis < 0 and f.size > 1 for f in view.axes[axis]) for axis in range(len(shape))]
    if any(repeated[axis] for axis in (*batch, *summed)):
        return f"it reads entries of {view.path} several times, along an axis that it sums over or a batch"
    if not any(repeated[axis] for axis in free):
        return None
    factors = [factor for axis in free for factor in (view.axes[axis] or (Factor(-1, 1),))]
    numbers = np.arange(size_of(factors)).reshape([factor.size for factor in factors])
    return numbers[tuple(0 if factor.axis < 0 else slice(None) for factor in factors)].ravel()


def _convolution(product: Product) -> MatrixForm | str:
    eqn, params = product.eqn, product.eqn.params
    if product.side == 0:
        return "it is the input of a convolution"
    if params["batch_group_count"] != 1:
        return "it is a convolution whose images are in groups"
    images, kernel, out = params["dimension_numbers"]
    shape, output = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    groups, window = params["feature_group_count"], [shape[axis] for axis in kernel[2:]]
    outputs, channels = shape[kernel[0]], shape[kernel[1]]
    inputs = math.prod(window) * channels
    order = (kernel[0], *kernel[2:], kernel[1])

    def matrix(array: Any) -> Any:
        return jnp.transpose(array, order).reshape(groups, outputs // groups, inputs)

    def rows(array: Any, known: Known | None, others: Sequence[Any]) -> Rows:
        del others
        # Channels first; the patches come as (channels, window) in this order.
        array = jnp.transpose(_float32(array), images)
        patches = lax.conv_general_dilated_patches(
            array,
            filter_shape=window,
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            precision=lax.Precision.HIGHEST,
        )
        number, places = patches.shape[0], math.prod(patches.shape[2:])
        patches = patches.reshape(number, groups, channels, math.prod(window), places)
        values = jnp.transpose(patches, (1, 0, 4, 3, 2)).reshape(groups, number * places, inputs)
        if known is None:
            return Rows(values, None)
        weights = _weights(known, output, (out[0], *out[2:])).reshape(number * places)
        return Rows(values, jnp.broadcast_to(weights, (groups, number * places)))

    return MatrixForm(
        groups,
        outputs // groups,
        inputs,
        run=channels,
        kernel=matrix,
        rows=rows,
        batch_axes=(kernel[0],) if groups > 1 else (),
        summed=tuple(sorted(kernel[1:])),
        group_axis=kernel[1],
        shared=(images, *(str(params[name]) for name in _OF_PATCHES), tuple(window)),
        dtype=_float32_or_wider(eqn.invars[0].aval.dtype),
    )


_OF_PATCHES = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count")


def _ragged(product: Product) -> MatrixForm | str:
    numbers = product.eqn.params["ragged_dot_dimension_numbers"]
    (sums, kernel_sums), (batch, _) = numbers.dot_dimension_numbers
    group = tuple(numbers.rhs_group_dimensions)
    ragged = tuple(numbers.lhs_ragged_dimensions)
    data, kernel = (atom.aval.shape for atom in product.eqn.invars[:2])
    simple = len(data) == 2 and not batch and len(group) == len(sums) == 1 and ragged == _rest(2, sums)
    if product.side == 0 or not simple:
        return "it is a ragged product of another kind than rows of data with one kernel for each group"
    free = _rest(len(kernel), group, kernel_sums)
    (experts, outputs, inputs), matrix = _matrix(kernel, group, free, kernel_sums)

    def rows(array: Any, known: Known | None, others: Sequence[Any]) -> Rows:
        values = jnp.transpose(_float32(array), (*ragged, *sums))
        ends = jnp.cumsum(others[0])
        number = jnp.arange(values.shape[0], dtype=ends.dtype)
        # A row is in the group that its number falls into; rows behind the last group are in none.
        starts = ends - others[0]
        member = ((number >= starts[:, None]) & (number < ends[:, None])).astype(values.dtype)
        if known is not None:
            member = member * _weights(known, data, ragged)
        return Rows(values[None], member)

    return MatrixForm(
        experts,
        outputs,
        inputs,
        run=inputs,
        kernel=matrix,
        rows=rows,
        batch_axes=group,
        summed=tuple(kernel_sums),
        group_axis=kernel_sums[0],
        shared=None,
        dtype=_float32_or_wider(product.eqn.invars[0].aval.dtype),
    )


def sums_of_rows(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Return how many rows each matrix saw, (batch,), and the sum of its rows, (batch, inputs)."""
    values, weights = rows
    if weights is None:
        batch = values.shape[0]
        return jnp.full(batch, values.shape[1], jnp.float32), jnp.sum(values, axis=1)
    weights = weights.astype(values.dtype)
    total = jnp.einsum("br,bri->bi", weights, *_with_batch(values, weights), precision="highest")
    return jnp.sum(weights, axis=1, dtype=jnp.float32), total


def _with_batch(values: Any, weights: Any) -> tuple[Any]:
    return (jnp.broadcast_to(values, (weights.shape[0], *values.shape[1:])),)


def squares_of_rows(rows: Rows) -> jax.Array:
    """Return the sum of the squares of each input, (batch, inputs)."""
    values, weights = rows
    if weights is None:
        return jnp.sum(values * values, axis=1)
    return jnp.einsum(
        "br,bri->bi",
        weights.astype(values.dtype),
        *_with_batch(values * values, weights),
        precision="highest",
    )


def gram_of_rows(rows: Rows, others: Rows | None = None) -> jax.Array:
    """Return `X^T X`, (batch, inputs, inputs), rows weighted; or `Y^T X` with the same weights."""
    values, weights = rows
    left = values if others is None else others.values

    def product(pair: tuple[Any, Any], weights: Any) -> Any:
        y, x = pair
        if weights is not None:
            y = y * weights.astype(y.dtype)[:, None]
        return jnp.einsum("ri,rj->ij", y, x, precision="highest")

    if weights is None:
        return jax.vmap(lambda y, x: product((y, x), None))(left, values)
    if len(values) == len(weights):
        return jax.vmap(lambda y, x, w: product((y, x), w))(left, values, weights)
    # All matrices read the same rows, with weights of their own; one at a time, so that none is copied.
    return lax.map(lambda w: product((left[0], values[0]), w), weights)
