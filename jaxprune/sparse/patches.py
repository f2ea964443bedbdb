"""The forms of a convolution's kernel, each with its convolution.

A convolution is a product of the kernel, as a matrix of (outputs, inputs), with patches of its data: the
inputs of an output are the places of its window times the channels of its group. Written out, the patches
are as many times as large as the data as the window has places, and a CPU takes longer to write and read
them than for its dense convolution. So only the forms that need them get them: "csr", "blocks" and "product",
the dense product, which pays for windows of one place. The other forms read the data itself:

- `wide2`, `wide4`, `wide8`: a dense convolution that computes so many neighbouring places at once. XLA's
  convolution on a CPU has a vector of output channels as its innermost axis: 16 numbers with AVX-512. A
  kernel of 8 outputs fills half of it. T copies of the kernel, each shifted by a stride s, are a kernel of T
  times the outputs over a window that is (T - 1) s places longer, and its convolution takes T times the
  stride: the channels of one place of its output are the channels of T places. With a window of w places it
  does ((T - 1) s + w) / w times the multiply-adds, the additional ones by zero.
- `shifted`: where each group has one input channel (depthwise convolutions), the sum over the places of the
  window of the data, shifted, times a number for each channel. XLA makes one loop of it.
- `padded`: the same sum over the entries that are not zero, of one shifted channel for each. Shifting a
  channel is reading it from another place on, so nothing is copied.
- `compact`: a dense convolution without the output and input channels that are zero.

`python -m experiments.benchmarks.convolutions` times them all.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.sparse.forms import FORMS, Form, alive_first, each_row, places_of

WIDE = {"wide2": 2, "wide4": 4, "wide8": 8}
"""How many places a form computes at once."""

CONV_FORMS = (*WIDE, "shifted", "product")
"""The forms that convolutions have besides those of `FORMS`."""

PATCHES = ("csr", "blocks", "product")
"""The forms of convolutions that write the patches out."""


class Convolution(NamedTuple):
    """A convolution of data with its channels last: (images, *places, channels).

    Attributes:
      window: the places of the kernel, along each axis.
      strides: places from one output to the next.
      padding: zeros before and after the data, if spread then of the spread data; negative ones cut it.
      spread: places from one entry of the data to the next, with zeros between (`lhs_dilation`).
      dilation: places from one entry of the kernel to the next (`rhs_dilation`).
      groups: how many groups the channels are divided into.
      inputs: channels that one output reads.
      outputs: channels of the output.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    spread: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    inputs: int
    outputs: int

    def padded_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Return the sizes of the data once it is spread and padded."""
        spread = [(size - 1) * gap + 1 if size else 0 for size, gap in zip(sizes, self.spread, strict=True)]
        return [size + sum(ends) for size, ends in zip(spread, self.padding, strict=True)]

    def out_sizes(self, padded: Sequence[int]) -> list[int]:
        """Return how many outputs there are along each axis of padded data."""
        spans = [(size - 1) * gap + 1 for size, gap in zip(self.window, self.dilation, strict=True)]
        return [(n - span) // s + 1 for n, span, s in zip(padded, spans, self.strides, strict=True)]

    def places(self) -> Iterator[tuple[int, ...]]:
        """Yield where each place of the window is, counted from its first."""
        for place in itertools.product(*map(range, self.window)):
            yield tuple(n * gap for n, gap in zip(place, self.dilation, strict=True))


def conv_forms(conv: Convolution) -> dict[str, Form]:
    """Return the forms of a convolution by name. Their products are of (images, *places, channels)."""
    found = {
        name: Form(name, partial(_wide_pack, conv, times), partial(_dense_product, conv))
        for name, times in WIDE.items()
    }
    found["shifted"] = Form("shifted", partial(_shifted_pack, conv), partial(_shifted_product, conv))
    pack, product = partial(_padded_pack, conv), partial(_padded_product, conv)
    found["padded"] = Form("padded", pack, product, FORMS["padded"].looped)
    found["compact"] = Form("compact", partial(_compact_pack, conv), partial(_compact_product, conv))
    for name in PATCHES:
        pack, product = partial(_patches_pack, conv, name), partial(_patches_product, conv, name)
        found[name] = Form(name, pack, product)
    return found


def _kernels(conv: Convolution, stack: np.ndarray) -> np.ndarray:
    """Return matrices of (steps, outputs, inputs) as kernels of (steps, *window, inputs, outputs)."""
    return np.moveaxis(stack.reshape(len(stack), conv.outputs, *conv.window, conv.inputs), 1, -1)


def _padded(conv: Convolution, x: Any) -> Any:
    """Return data spread and padded."""
    ends = [(*pair, gap - 1) for pair, gap in zip(conv.padding, conv.spread, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *ends, (0, 0, 0)])


def _shifts(conv: Convolution, x: Any) -> list[Any]:
    """Return what the outputs read at each place of the window: arrays of (images, *outputs, channels)."""
    x = _padded(conv, x)
    sizes = conv.out_sizes(x.shape[1:-1])
    ends = [(n - 1) * s + 1 for n, s in zip(sizes, conv.strides, strict=True)]
    return [
        lax.slice(
            x,
            (0, *place, 0),
            (x.shape[0], *(first + end for first, end in zip(place, ends, strict=True)), x.shape[-1]),
            (1, *conv.strides, 1),
        )
        for place in conv.places()
    ]


def _alike(x: Any, values: Any, dtype: Any) -> tuple[Any, Any]:
    """Return two operands with one dtype: that of the sums, if theirs differ."""
    return (x, values) if x.dtype == values.dtype else (x.astype(dtype), values.astype(dtype))


def _wide_pack(conv: Convolution, times: int, stack: np.ndarray) -> Any:
    if conv.groups > 1:
        return "its convolution is in groups"
    if not conv.window:
        return "its convolution has no axis of places"
    kernels, stride = _kernels(conv, stack), conv.strides[-1]
    gap, size = conv.dilation[-1], conv.window[-1]
    span = (size - 1) * gap + 1
    shape = (*kernels.shape[:-3], (times - 1) * stride + span, conv.inputs, times, conv.outputs)
    wide = np.zeros(shape, stack.dtype)
    for copy in range(times):
        first = copy * stride
        wide[..., first : first + span : gap, :, copy, :] = kernels
    return {"values": wide.reshape(*shape[:-2], -1)}


def _dense_product(conv: Convolution, arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    """Return the convolution with a kernel for several places at once."""
    values = arrays["values"]
    times = values.shape[-1] // outputs
    *strides, stride = conv.strides
    *padding, (low, high) = conv.padding
    padded = conv.padded_sizes(x.shape[1:-1])
    sizes = conv.out_sizes(padded)
    steps = -(-sizes[-1] // times)
    # The last step may compute outputs beyond the last, and then reads zeros behind the padding. Where the
    # stride leaves more padding than it reads, that is less than a stride and makes no further step.
    missing = max(((steps - 1) * times * stride) + values.shape[-3] - padded[-1], 0)
    y = _convolve(
        x,
        values,
        conv._replace(
            strides=(*strides, times * stride),
            padding=(*padding, (low, high + missing)),
            dilation=(*conv.dilation[:-1], 1),
        ),
        dtype,
        precision,
    )
    return y.reshape(x.shape[0], *sizes[:-1], steps * times, outputs)[..., : sizes[-1], :]


def _convolve(x: Any, kernel: Any, conv: Convolution, dtype: Any, precision: Any) -> Any:
    """Return XLA's convolution, with a kernel of (*window, inputs, outputs)."""
    count = len(conv.strides) + 1
    images = (0, count, *range(1, count))
    return lax.conv_general_dilated(
        *_alike(x, kernel, dtype),
        conv.strides,
        conv.padding,
        conv.spread,
        conv.dilation,
        lax.ConvDimensionNumbers(images, (count, count - 1, *range(count - 1)), images),
        precision=precision,
        preferred_element_type=dtype,
    )


def _shifted_pack(conv: Convolution, stack: np.ndarray) -> Any:
    if conv.inputs != 1:
        return "each group of its convolution has several input channels"
    return {"values": np.ascontiguousarray(stack.swapaxes(1, 2))}


def _shifted_product(conv: Convolution, arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    del precision  # the products are of single numbers
    values = arrays["values"].astype(dtype).reshape(-1, conv.groups, outputs // conv.groups)
    pairs = zip(_shifts(conv, x), values, strict=True)
    total: Any = sum(shift.astype(dtype)[..., None] * value for shift, value in pairs)
    return total.reshape(*total.shape[:-2], outputs)


def _padded_pack(conv: Convolution, stack: np.ndarray) -> Any:
    arrays = FORMS["padded"].pack_stack(stack)
    if isinstance(arrays, str) or conv.groups == 1:
        return arrays
    # An index counts places of the window and channels of a group; the data has the channels of all groups.
    own = conv.outputs // conv.groups
    order = (
        np.arange(conv.outputs)[None] if arrays["places"] is None else np.argsort(arrays["places"], axis=1)
    )
    groups, first = [], 0
    for group in arrays["groups"]:
        indices = group["indices"]
        rows = order[:, first : first + indices.shape[3]]
        place, channel = np.divmod(indices, conv.inputs)
        channel = channel + (rows // own * conv.inputs).astype(np.int32)[:, None, None]
        groups.append(group | {"indices": place * (conv.inputs * conv.groups) + channel})
        first += indices.shape[3]
    return arrays | {"groups": groups}


def _padded_product(conv: Convolution, arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    """Return the sums of shifted channels.

    The data is laid out as one row of places for each channel, images one behind the other. An output reads
    there, for an entry of the kernel, so many places ahead, and neighbouring outputs read neighbours: the
    whole row of a channel is read from another place on. Near the ends of an axis that reads into the next
    line; such sums belong to no output, since all that an output reads lies inside the padded data, and they
    are thrown away. With strides, the places of each remainder are rows of their own.
    """
    images, channels = x.shape[0], x.shape[-1]
    x = _padded(conv, x.astype(dtype))
    sizes = conv.out_sizes(x.shape[1:-1])
    if not images:
        return jnp.zeros((0, *sizes, outputs), dtype)
    lines = [-(-size // stride) for size, stride in zip(x.shape[1:-1], conv.strides, strict=True)]
    ends = [n * s - size for n, s, size in zip(lines, conv.strides, x.shape[1:-1], strict=True)]
    x = jnp.pad(x, ((0, 0), *((0, end) for end in ends), (0, 0)))
    x = x.reshape(images, *itertools.chain(*zip(lines, conv.strides, strict=True)), channels)
    axes = range(len(lines))
    x = jnp.transpose(x, (*(2 * n + 2 for n in axes), x.ndim - 1, 0, *(2 * n + 1 for n in axes)))
    steps = [math.prod(lines[n + 1 :]) for n in axes]
    ahead = [[n // s for n, s in zip(place, conv.strides, strict=True)] for place in conv.places()]
    shift = np.array([sum(n * step for n, step in zip(some, steps, strict=True)) for some in ahead], np.int32)
    rest = [[n % s for n, s in zip(place, conv.strides, strict=True)] for place in conv.places()]
    phase = np.array([_flat(some, conv.strides) for some in rest], np.int32)

    length = images * math.prod(lines)
    rows = jnp.pad(x.reshape(-1, length), ((0, 0), (0, int(shift.max()))))

    def read(index: Any) -> Any:
        place, channel = index // channels, index % channels
        start = jnp.stack([jnp.asarray(phase)[place] * channels + channel, jnp.asarray(shift)[place]], 1)
        numbers = lax.GatherDimensionNumbers((1,), (0,), (0, 1))
        return lax.gather(rows, start, numbers, (1, length), mode="promise_in_bounds")

    def turn(total: Any, entries: Any) -> Any:
        for index, value in zip(*map(tuple, entries), strict=True):  # one loop, as in the form of products
            total = total + value.astype(dtype)[:, None] * read(index)
        return total, None

    found = []
    for group in arrays["groups"]:
        zeros = jnp.zeros((group["values"].shape[2], length), dtype)
        found.append(each_row(turn, zeros, (group["indices"], group["values"]))[0])
    total = found[0]
    if arrays["places"] is not None:
        total = jnp.concatenate(found).at[arrays["places"]].get(mode="promise_in_bounds")
    total = total.reshape(outputs, images, *lines)[(slice(None),) * 2 + tuple(slice(n) for n in sizes)]
    return jnp.moveaxis(total, 0, -1)


def _flat(index: Sequence[int], shape: Sequence[int]) -> int:
    return int(np.ravel_multi_index(tuple(index), tuple(shape))) if shape else 0


def _compact_pack(conv: Convolution, stack: np.ndarray) -> Any:
    if conv.groups > 1:
        return "its convolution is in groups"
    kernels = _kernels(conv, stack)
    alive = kernels.reshape(len(stack), -1, *kernels.shape[-2:]).any(1)
    channels, rows = (alive_first(np.any(alive, axis)) for axis in (2, 1))
    if rows.shape[1] * channels.shape[1] > 0.95 * conv.inputs * conv.outputs:
        return "no whole channels that are zero"
    part = np.moveaxis(kernels, (-2, -1), (1, 2))  # (steps, inputs, outputs, *window)
    part = part[np.arange(len(stack))[:, None, None], channels[..., None], rows[:, None]]
    return {
        "inputs": channels if channels.shape[1] < conv.inputs else None,
        "places": places_of(rows, conv.outputs) if rows.shape[1] < conv.outputs else None,
        "values": np.ascontiguousarray(np.moveaxis(part, (1, 2), (-2, -1))),
    }


def _compact_product(conv: Convolution, arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    if not arrays["values"].size:
        return jnp.zeros((x.shape[0], *conv.out_sizes(conv.padded_sizes(x.shape[1:-1])), outputs), dtype)
    if arrays["inputs"] is not None:
        x = x.at[..., arrays["inputs"]].get(mode="promise_in_bounds")
    y = _convolve(x, arrays["values"], conv, dtype, precision)
    if arrays["places"] is None:
        return y
    y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, 1)])
    return y.at[..., arrays["places"]].get(mode="promise_in_bounds")


def _patches_pack(conv: Convolution, name: str, stack: np.ndarray) -> Any:
    if conv.groups > 1:
        return "its convolution is in groups"
    if name == "product":
        return {"values": np.ascontiguousarray(stack.swapaxes(1, 2))}
    return FORMS[name].pack_stack(stack)


def _patches_product(
    conv: Convolution, name: str, arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any
) -> Any:
    patches = jnp.concatenate(_shifts(conv, x), -1)
    rows = patches.reshape(math.prod(patches.shape[:-1]), patches.shape[-1])
    if name == "product":
        y = lax.dot(*_alike(rows, arrays["values"], dtype), precision=precision, preferred_element_type=dtype)
    else:
        y = FORMS[name].product(arrays, rows, outputs, dtype, precision)
    return y.reshape(*patches.shape[:-1], outputs)
