"""Which form a kernel is stored in: measured where it runs, or by a rule of one machine."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.counting.timing import latency
from jaxprune.sparse.forms import of_step, stored_entries
from jaxprune.sparse.layers import Layer, sparse
from jaxprune.sparse.patches import PATCHES, WIDE

# The rule: for so many rows of inputs or fewer, the forms in the order in which they are tried, each with the
# density (entries stored, over those of the dense kernel) up to which it beats the dense product, and the
# number of entries that a kernel must have. All of it is of one machine: two cores of an AMD EPYC (Zen 5,
# AVX-512), in float32, by
#
#     python -m experiments.benchmarks.sparse_inference --layers 1 --width N --ways csr,padded,windows
#
# and the same with `--structure blocks --ways blocks` (or units, compact), for N of 512, 1024 and 2048.
#
# What of it holds elsewhere? "compact" and "blocks" are dense products of a part of the kernel, so their time
# falls with the entries stored, and their limits leave room for the gathers: these carry over. "windows"
# takes .2 ns for an entry and a row of inputs, on one core; the dense product reads an entry from the last
# cache in .05 ns, on two. With more rows it is arithmetic that counts: one multiply-add by index against 16
# in a vector of AVX-512, and 1/16 is about the limit of "csr". A CPU with shorter vectors has higher limits;
# one with more cores has lower ones, as dense products use them all; a GPU has far lower ones. So `sparsify`
# by default measures, and the rule is for where nothing can be run.
_BREAK_EVEN = (
    (1, (("blocks", 0.60, 2**18), ("windows", 0.18, 2**18), ("compact", 0.80, 2**16))),
    (2, (("blocks", 0.60, 2**18), ("windows", 0.14, 2**18), ("compact", 0.80, 2**16))),
    (4, (("blocks", 0.60, 2**18), ("windows", 0.08, 2**18), ("compact", 0.80, 2**16))),
    (32, (("blocks", 0.35, 2**18), ("csr", 0.06, 2**16), ("compact", 0.80, 2**16))),
    (
        math.inf,
        (("blocks", 0.25, 2**20), ("csr", 0.06, 2**16), ("padded", 0.14, 2**20), ("compact", 0.80, 2**16)),
    ),
)
_ELSEWHERE = (("compact", 0.80, 2**16),)  # on a GPU or TPU, where the limits were not measured

# The same for convolutions, by `python -m experiments.benchmarks.convolutions`. "shifted" beat XLA's
# depthwise convolution in all shapes, and its convolution of one channel to few. The wide forms pay where
# the outputs leave half of a vector empty. "padded" pays with many channels.
_CONV_BREAK_EVEN = (("compact", 0.80, 2**10), ("padded", 0.04, 2**17))
_WIDE_OUTPUTS = 16  # places at once, times outputs, up to which a wide form pays: numbers in a vector
_MOST_OUTPUTS = 64  # and up to which it is timed
_MOST_PATCHES = 2**28  # the bytes of the patches of a convolution, up to which forms that need them are timed

_MARGIN = 1.05  # how many times as fast as dense a form has to be, for measuring to choose it
_CLEAR = 1.5  # the same, for one of the sets of kernels that are tried together


class Kernel(NamedTuple):
    """A kernel that may be stored in another form.

    Attributes:
      label: its name: the path of its param, with a number if the param is several kernels.
      path: its param.
      layer: its product; if it has several, the one with the most rows.
      array: its values, zeros included; those of the first step, if it is a kernel of each step of a scan.
      matrix: its values as a matrix of (outputs, inputs), or those of all steps as (steps, outputs, inputs).
    """

    label: str
    path: str
    layer: Layer
    array: Any
    matrix: np.ndarray

    @property
    def size(self) -> int:
        """The number of its entries, in one step."""
        return math.prod(self.matrix.shape[-2:])


class Chosen(NamedTuple):
    """The choice for a kernel.

    Attributes:
      form: the name of the form, or "dense".
      arrays: the kernel in that form; None if dense.
      gain: how many times as fast as the dense product it was; None if it was not measured.
      why: the reason.
    """

    form: str
    arrays: Any
    gain: float | None
    why: str


def density(kernel: Kernel) -> float:
    """Return the fraction of the kernel's entries that are not zero."""
    return np.count_nonzero(kernel.matrix) / max(kernel.matrix.size, 1)


def given(kernel: Kernel, forms: Mapping[str, str]) -> Chosen:
    """Return the choice that the caller made for a kernel."""
    form = forms.get(kernel.label, forms.get(kernel.path))
    if form is None or form == "dense":
        return Chosen("dense", None, None, "as chosen" if form else "choose does not name it")
    arrays = _packed(kernel, form)
    if isinstance(arrays, str):
        raise ValueError(
            f"choose has {form!r} for {kernel.label!r}, which it does not suit: {arrays}. "
            "'csr' suits every kernel that is not a convolution in groups; 'dense' leaves it."
        )
    return Chosen(form, arrays, None, "as chosen")


def _packed(kernel: Kernel, form: str) -> Any:
    """Return a kernel in a form, or a text that says why the form does not suit."""
    if form not in kernel.layer.forms:
        return f"its product is {'no' if kernel.layer.conv is None else 'a'} convolution"
    return kernel.layer.forms[form].pack(kernel.matrix)


def by_rule(kernel: Kernel) -> Chosen:
    """Return the form that should be fastest, by the figures of the machine where the rule was measured."""
    size, rows, conv = kernel.size, kernel.layer.rows, kernel.layer.conv

    def stored(form: str) -> tuple[Any, float]:
        arrays = _packed(kernel, form)
        if isinstance(arrays, str):
            return arrays, math.inf
        return arrays, stored_entries(arrays) / max(kernel.matrix.size, 1)

    if not kernel.matrix.any() and (conv is None or conv.groups == 1):
        return Chosen("compact", stored("compact")[0], None, "it is all zeros")
    on_cpu = jax.default_backend() == "cpu"
    limits = (
        next(limits for most, limits in _BREAK_EVEN if rows <= most) if conv is None else _CONV_BREAK_EVEN
    )
    for form, below, entries in limits if on_cpu else _ELSEWHERE:
        arrays, part = stored(form) if size >= entries else (None, math.inf)
        if part <= below:
            return Chosen(form, arrays, None, f"{part:.1%} stored; it pays up to {below:.0%}")
    if conv is not None and on_cpu:
        if conv.inputs == 1 and (conv.groups > 1 or conv.outputs <= _WIDE_OUTPUTS):
            return Chosen("shifted", stored("shifted")[0], None, "its groups have one input channel")
        wide = [form for form, times in WIDE.items() if times * conv.outputs <= _WIDE_OUTPUTS]
        if wide and not isinstance(arrays := _packed(kernel, wide[-1]), str):
            return Chosen(wide[-1], arrays, None, f"{conv.outputs} outputs do not fill a vector")
        return Chosen("dense", None, None, f"{density(kernel):.1%} of {size:,} entries are left")
    why = f"{density(kernel):.1%} of {size:,} entries are left, too many or of too few to pay"
    return Chosen("dense", None, None, f"{why} for {rows} rows")


def by_measure(kernel: Kernel, rounds: int, known: dict[Any, dict[str, float]]) -> Chosen:
    """Return the form that is fastest here, when each form and the dense product are timed in turn.

    The kernel of a scan is timed in one step. `known` holds the gains measured so far, by shape, and gets
    those measured now: kernels alike are timed once.
    """
    packed, layer = _candidates(kernel), kernel.layer
    timed = packed if kernel.matrix.ndim == 2 else {name: of_step(packed[name], 0) for name in packed}
    if not packed:
        return Chosen("dense", None, None, f"{density(kernel):.1%} is left: too much for any form")
    summed = layer.key.partition(" ")[2]
    key = (layer.outputs, layer.inputs, layer.other, layer.dtype, kernel.array.shape, summed, layer.conv)
    key = (*key, *((name, round(stored_entries(arrays), -3)) for name, arrays in timed.items()))
    if key not in known:
        numbers = np.random.default_rng(0).standard_normal(layer.other.shape, np.float32)
        other = jnp.asarray(numbers).astype(layer.other.dtype)
        calls: dict[str, tuple[Any, ...]] = {"dense": (layer.dense, kernel.array, other)}
        for name, arrays in timed.items():
            calls[name] = (partial(sparse, layer, name), arrays, other)
        times = latency(calls, rounds)
        known[key] = {name: times["dense"].median / times[name].median for name in timed}
    gains = known[key]
    best = max(gains, key=lambda name: gains[name])
    figures = ", ".join(f"{name} {gain:.2f} x" for name, gain in gains.items())
    if gains[best] < _MARGIN:
        return Chosen("dense", None, gains[best], f"measured {figures}")
    return Chosen(best, packed[best], gains[best], f"measured {figures}")


def _candidates(kernel: Kernel) -> dict[str, Any]:
    """Return the forms that may be faster than a dense product, packed."""
    conv, on_cpu = kernel.layer.conv, jax.default_backend() == "cpu"
    names = ["blocks", "compact"]
    if density(kernel) <= 0.5 and not (kernel.matrix.size and not kernel.matrix.any()):
        rows = kernel.layer.rows if on_cpu else math.inf
        names += ["windows"] if rows <= 8 and conv is None else []
        names += ["csr"] if 2 < rows < math.inf else []  # for one row its sums are scalar
        names += ["padded"] if rows >= 8 or conv is not None else []
    if conv is not None:
        names += ["shifted", *(form for form, times in WIDE.items() if times * conv.outputs <= _MOST_OUTPUTS)]
        if math.prod(conv.window) == 1:
            names.append("product")
        elif kernel.layer.rows * kernel.layer.inputs * kernel.layer.other.dtype.itemsize > _MOST_PATCHES:
            names = [name for name in names if name not in PATCHES]
    packed = {name: _packed(kernel, name) for name in names}
    return {name: arrays for name, arrays in packed.items() if not isinstance(arrays, str)}


def fastest_set(
    alone: Mapping[str, Chosen],
    ruled: Mapping[str, Chosen],
    time: Callable[[Mapping[str, Mapping[str, Chosen]]], Mapping[str, float]],
) -> tuple[dict[str, Chosen], float | None]:
    """Return the set of choices that makes the whole call fastest, and how many times as fast as dense it is.

    A product that is faster alone may cost more than it gains, because it transposes what its neighbours
    read, or gain more, if they want it transposed as well. So the call is timed with all kernels that gained
    alone, with those that gained clearly, and with the choices of the rule.

    Args:
      alone: by key, the choice that measuring made for each kernel alone.
      ruled: by key, the choice of the rule.
      time: given sets by name (each from keys to choices), how many times as fast as dense the call is
        with each. If there is nothing to time, the gain returned is None.
    """
    gained = {key: one for key, one in alone.items() if one.form != "dense"}
    sets = {
        "all": gained,
        "clear": {key: one for key, one in gained.items() if (one.gain or 0) >= _CLEAR},
        "rule": {key: one for key, one in ruled.items() if one.form != "dense"},
    }
    tried: dict[str, dict[str, Chosen]] = {}
    seen: list[dict[str, str]] = []
    for name, some in sets.items():
        forms = {key: one.form for key, one in some.items()}
        if forms and forms not in seen:
            seen.append(forms)
            tried[name] = some
    if not tried:
        return dict(alone), None
    gains = time(tried)
    best = max(gains, key=lambda name: gains[name])
    winner = tried[best] if gains[best] >= _MARGIN else {}
    result = {}
    for key, one in alone.items():
        if key in winner and winner[key].form == one.form:
            result[key] = one
        elif key in winner:
            result[key] = winner[key]._replace(why=f"the whole call is faster so; alone {one.why}")
        elif one.form == "dense":
            result[key] = one
        else:
            why = f"the whole call is no faster with it; alone {one.why}"
            result[key] = Chosen("dense", None, one.gain, why)
    return result, gains[best] if winner else 1.0
