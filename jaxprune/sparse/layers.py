"""A product of a kernel and data as a product of matrices, whichever axes it sums over."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.sparse.forms import FORMS, Form
from jaxprune.sparse.patches import Convolution, conv_forms
from jaxprune.tracing.dataflow import Product
from jaxprune.tracing.jaxprs import binder


class Layer(NamedTuple):
    """A product whose kernel can be stored in another form.

    Attributes:
      key: the same for products of the same kernel over the same axes, in whatever trace.
      outputs, inputs: the shape of the kernel as a matrix.
      rows: how many rows of inputs it multiplies.
      source: the line of the user's code.
      other: shape and dtype of the other operand, the data.
      dtype: of the sums: float32 for bfloat16 and float16, as in dense products.
      matrix: from the kernel's array to (outputs, inputs).
      gather: from the data to (rows, inputs); that of a convolution to (images, *places, channels).
      scatter: from (rows, outputs), or (images, *places, outputs), to the output of the equation.
      dense: the equation itself, a function of the kernel and the data.
      precision: the precision of the equation.
      forms: by name, the forms that the kernel may be stored in.
      conv: the convolution, or None.
    """

    key: str
    outputs: int
    inputs: int
    rows: int
    source: str
    other: jax.ShapeDtypeStruct
    dtype: Any
    matrix: Callable[[np.ndarray], np.ndarray]
    gather: Callable[[Any], Any]
    scatter: Callable[[Any], Any]
    dense: Callable[[Any, Any], Any]
    precision: Any
    forms: Mapping[str, Form]
    conv: Convolution | None


def layer(product: Product) -> Layer | str:
    """Return a product as a layer, or the reason why it has to stay dense."""
    eqn = product.eqn
    kernel, other = (eqn.invars[n].aval for n in (product.side, 1 - product.side))
    if eqn.primitive.name == "ragged_dot_general":
        return "which rows of a ragged product meet it is known only when it runs"
    if not all(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in (kernel, other, eqn.outvars[0].aval)):
        return "its product is not one of floating-point numbers"
    if eqn.params.get("out_sharding") is not None:
        return "its product says how its output is sharded"
    found = _dot(product) if eqn.primitive.name == "dot_general" else _convolution(product)
    if isinstance(found, str):
        return found
    (free, summed), gather, scatter, conv = found
    outputs, inputs = (math.prod(kernel.shape[axis] for axis in axes) for axes in (free, summed))
    out = eqn.outvars[0].aval
    run = binder(eqn)
    dtype = jnp.promote_types(jnp.result_type(kernel.dtype, other.dtype), jnp.float32)
    # The padding of a convolution may change with the size of its data; what a form stores does not.
    stored = "" if conv is None else f" {conv._replace(padding=())}"
    return Layer(
        key=f"{product.kernel.key} {summed}{stored}",
        outputs=outputs,
        inputs=inputs,
        rows=math.prod(out.shape) // max(outputs, 1),
        source=product.source,
        other=jax.ShapeDtypeStruct(other.shape, other.dtype),
        dtype=jnp.promote_types(dtype, out.dtype),
        matrix=lambda array: np.transpose(array, (*free, *summed)).reshape(outputs, inputs),
        gather=gather,
        scatter=lambda y: scatter(y).astype(out.dtype),
        dense=lambda kernel, other: run(*((kernel, other) if product.side == 0 else (other, kernel)))[0],
        precision=eqn.params["precision"],
        forms=FORMS if conv is None else conv_forms(conv),
        conv=conv,
    )


def _dot(product: Product) -> Any:
    """Return the kernel's free and summed axes of a `dot_general`, and functions to rows and back."""
    eqn, side = product.eqn, product.side
    sums, batches = eqn.params["dimension_numbers"]
    if batches[0]:
        return "its product is batched: each place of the batch has a kernel of its own"
    shape = eqn.invars[1 - side].aval.shape
    free = _rest(eqn.invars[side].aval.shape, sums[side])
    own = _rest(shape, sums[1 - side])
    kernel_sizes = [eqn.invars[side].aval.shape[axis] for axis in free]
    row_sizes = [shape[axis] for axis in own]
    summed = math.prod(shape[axis] for axis in sums[1 - side])

    def to_rows(x: Any) -> Any:
        return jnp.transpose(x, (*own, *sums[1 - side])).reshape(math.prod(row_sizes), summed)

    def to_out(y: Any) -> Any:
        if side:
            return y.reshape(*row_sizes, *kernel_sizes)
        return y.T.reshape(*kernel_sizes, *row_sizes)

    return (free, tuple(sums[side])), to_rows, to_out, None


def _convolution(product: Product) -> Any:
    """Return the same for a convolution, with functions to channels last and back, and the convolution."""
    eqn, params = product.eqn, product.eqn.params
    if product.side == 0:
        return "it is the input of a convolution"
    if params["batch_group_count"] != 1:
        return "a convolution whose images are in groups stays dense"
    if not math.prod(eqn.outvars[0].aval.shape[1:]) or not math.prod(eqn.invars[0].aval.shape[1:]):
        return "a convolution without places or channels stays dense"
    images, kernel, out = params["dimension_numbers"]
    shape = eqn.invars[1].aval.shape
    conv = Convolution(
        window=tuple(shape[axis] for axis in kernel[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple((low, high) for low, high in params["padding"]),
        spread=tuple(params["lhs_dilation"]),
        dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
        inputs=shape[kernel[1]],
        outputs=shape[kernel[0]],
    )
    last = (out[0], *out[2:], out[1])
    back = [last.index(axis) for axis in range(len(out))]
    axes = (kernel[:1], (*kernel[2:], kernel[1]))
    order = (images[0], *images[2:], images[1])
    return axes, lambda x: jnp.transpose(x, order), lambda y: jnp.transpose(y, back), conv


def _rest(shape: tuple[int, ...], axes: Any) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(shape)) if axis not in axes)


def sparse(layer: Layer, form: str, arrays: Any, other: Any) -> Any:
    """Return the output of a layer's equation, computed from the stored kernel."""
    return layer.scatter(_multiply(layer, layer.forms[form], arrays)(layer.gather(other)))


def _multiply(layer: Layer, form: Form, arrays: Any) -> Callable[[Any], Any]:
    """Return the product as a function of rows or images. `vmap` gives it more of them."""

    def product(arrays: Any, x: Any) -> Any:
        return form.product(arrays, x, layer.outputs, layer.dtype, layer.precision)

    multiply: Any = jax.custom_batching.custom_vmap(product)

    def batched_rule(size: int, batched: Any, arrays: Any, x: Any) -> Any:
        if any(jax.tree.leaves(batched[0])):
            raise ValueError(
                "sparse kernels cannot be batched by vmap: give params in_axes=None, and map over inputs."
            )
        y = multiply(arrays, x.reshape(size * x.shape[1], *x.shape[2:]))
        return y.reshape(size, x.shape[1], *y.shape[1:]), True

    multiply.def_vmap(batched_rule)
    inference: Any = jax.custom_jvp(multiply)

    @inference.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            "what sparsify returns is for inference and has no derivative: take gradients of apply_fn on "
            "jaxprune.apply_masks(params, masks)."
        )

    return lambda x: inference(arrays, x)
