"""Every rule against the function itself: facts are checked on values, small networks are compared.

A case is a function of params and inputs that uses some primitives on axes of params that can be removed.
The primitives of all cases are read off the traced programs, so that a rule without a case is noticed.
"""

import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.scipy import special
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxprune import channel_groups
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.rules import base
from tests.oracles.equivalence import Dense, check_facts, op_names, random_masks, removed, zero_units


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


class Case(NamedTuple):
    """A function of params and inputs.

    Attributes:
      function: the function.
      shapes: the shapes of the params.
      inputs: shapes of float inputs, or arrays.
      grads: whether gradients are compared too.
      whole: the numbers of the outputs for which, taken alone, no axis of a param can lose a slice.
      nans: whether slices that are claimed to be zero may hold NaN, which the kept slices hold too.
    """

    function: Any
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[Any, ...]
    grads: bool = False
    whole: tuple[int, ...] = ()
    nans: bool = False


CASES: dict[str, Case] = {}


def case(*inputs, grads=False, whole=(), nans=False, **shapes):
    def enter(function):
        CASES[function.__name__] = Case(function, shapes, inputs, grads, whole, nans)
        return function

    return enter


# Elementwise: ops on two values whose six channels are free; p["b"] sums over the channels of the result.

SHAPES = {"a": (3, 6), "c": (6,), "d": (3, 6), "b": (6, 2)}


def integers(x):
    return jnp.round(4 * x).astype(jnp.int32)


def unit(x):
    return 0.9 * jnp.sin(x)


ELEMENTWISE = {
    "abs": lambda x, y: jnp.abs(x),
    "acos": lambda x, y: jnp.arccos(unit(x)),
    "acosh": lambda x, y: jnp.arccosh(1.5 + jnp.abs(x)),
    "add": lambda x, y: x + y,
    "add_scalar": lambda x, y: x + 1.0,
    "and": lambda x, y: integers(x) & integers(y),
    "asin": lambda x, y: jnp.arcsin(unit(x)),
    "asinh": lambda x, y: jnp.arcsinh(x),
    "atan": lambda x, y: lax.atan(x),
    "atan2": lambda x, y: jnp.arctan2(x, y),
    "atan2_minus": lambda x, y: jnp.arctan2(x, -y),
    "atanh": lambda x, y: jnp.arctanh(unit(x)),
    "bessel_i0e": lambda x, y: lax.bessel_i0e(x),
    "bessel_i1e": lambda x, y: lax.bessel_i1e(x),
    "betainc": lambda x, y: special.betainc(1 + jnp.abs(x), 2.0, 0.5 * (1 + unit(y))),
    "cbrt": lambda x, y: jnp.cbrt(x),
    "ceil": lambda x, y: jnp.ceil(x) + jnp.floor(y),
    "clamp": lambda x, y: jnp.clip(x, -0.5, 0.5),
    "clamp_above_zero": lambda x, y: jnp.clip(x, 0.1, 0.5),
    "clamp_between": lambda x, y: lax.clamp(-jnp.abs(y), x, jnp.abs(y)),
    "clz": lambda x, y: lax.clz(integers(x)),
    "complex": lambda x, y: jnp.abs(lax.complex(x, y)) + jnp.real(jnp.conj(lax.complex(y, x)) * 2j),
    "copy": lambda x, y: jnp.copy(x),
    "cos": lambda x, y: jnp.cos(x),
    "cosh": lambda x, y: jnp.cosh(x) - 1.0,
    "digamma": lambda x, y: special.digamma(1 + jnp.abs(x)),
    "div": lambda x, y: x / (1 + y * y),
    "div_into": lambda x, y: 1.0 / (2 + x * x),
    "eq": lambda x, y: x == y,
    "erf": lambda x, y: special.erf(x) * special.erfc(y),
    "erf_inv": lambda x, y: special.erfinv(unit(x)),
    "exp": lambda x, y: jnp.exp(x) + jnp.exp2(y),
    "expm1": lambda x, y: jnp.expm1(x),
    "ge": lambda x, y: (x >= y) & (x > -1),
    "gt": lambda x, y: x > y,
    "gt_zero": lambda x, y: x > 0,
    "hypot": lambda x, y: jnp.hypot(x, y),
    "igamma": lambda x, y: special.gammainc(1 + jnp.abs(x), jnp.abs(y)),
    "igammac": lambda x, y: special.gammaincc(1 + jnp.abs(x), jnp.abs(y)),
    "igamma_grad_a": lambda x, y: lax.igamma_grad_a(1 + jnp.abs(x), jnp.abs(y)),
    "imag": lambda x, y: jnp.imag(jnp.exp(1j * x)),
    "integer_pow": lambda x, y: x**3 + (2 + y**2) ** -1,
    "is_finite": lambda x, y: jnp.isfinite(x),
    "le": lambda x, y: (x <= y) | (x < -1),
    "lgamma": lambda x, y: special.gammaln(1 + jnp.abs(x)),
    "log": lambda x, y: jnp.log(1 + jnp.abs(x)) + jnp.log(2 + jnp.abs(y)),
    "log1p": lambda x, y: jnp.log1p(jnp.abs(x)),
    "logaddexp": lambda x, y: jnp.logaddexp(x, y),
    "logistic": lambda x, y: x * jax.nn.sigmoid(x),
    "lt": lambda x, y: x < y,
    "max": lambda x, y: jnp.maximum(x, y) + jnp.minimum(x, 0.3),
    "max_above_zero": lambda x, y: jnp.maximum(x, 0.3),
    "mul": lambda x, y: x * y,
    "mul_by_mask": lambda x, y: x * (y > 0),
    "mul_by_zero": lambda x, y: x * jnp.zeros(6) + y,
    "mulhi": lambda x, y: lax.mulhi(integers(x) * 2**20, integers(y) * 2**20),
    "ne": lambda x, y: x != y,
    "neg": lambda x, y: -x,
    "nextafter": lambda x, y: jnp.nextafter(x, 1.0),
    "not": lambda x, y: ~(x > 0),
    "not_int": lambda x, y: ~integers(x),
    "or": lambda x, y: integers(x) | integers(y),
    "polygamma": lambda x, y: lax.polygamma(jnp.ones_like(x), 1 + jnp.abs(x)),
    "population_count": lambda x, y: lax.population_count(integers(x)),
    "pow": lambda x, y: jnp.abs(x) ** y,
    "pow_of_two": lambda x, y: 2.0**x,
    "pow_to_integer": lambda x, y: jnp.power(x, integers(jnp.abs(y))),
    "pow_to_real": lambda x, y: jnp.abs(x) ** 1.5,
    "real": lambda x, y: jnp.real(jnp.exp(1j * x)),
    "reduce_precision": lambda x, y: lax.reduce_precision(x, 8, 7),
    "rem": lambda x, y: jnp.remainder(x, 0.7) + lax.rem(y, 0.3),
    "rem_of_two": lambda x, y: lax.rem(1.0, 2 + jnp.abs(x)),
    "round": lambda x, y: jnp.round(x),
    "rsqrt": lambda x, y: lax.rsqrt(1 + x * x),
    "shift": lambda x, y: jnp.left_shift(integers(x), 2) + jnp.right_shift(integers(y), 1),
    "shift_logical": lambda x, y: lax.shift_right_logical(integers(x), jnp.int32(1)),
    "shift_one": lambda x, y: jnp.left_shift(1, jnp.abs(integers(x)) % 8),
    "sign": lambda x, y: jnp.sign(x),
    "sin": lambda x, y: jnp.sin(x) + jnp.tan(unit(y)),
    "sinh": lambda x, y: jnp.sinh(x),
    "sqrt": lambda x, y: jnp.sqrt(jnp.abs(x)),
    "square": lambda x, y: jnp.square(x),
    "stop_gradient": lambda x, y: x * lax.stop_gradient(y),
    "sub": lambda x, y: x - y,
    "tanh": lambda x, y: jnp.tanh(x),
    "where": lambda x, y: jnp.where(x > 0, x, y),
    "where_else_one": lambda x, y: jnp.where(x > 0, x, 1.0),
    "where_of_three": lambda x, y: lax.select_n(jnp.abs(integers(x)) % 3, x, y, x * y),
    "where_scalar": lambda x, y: lax.select_n(x[0, 0] > 0, x, y),
    "xor": lambda x, y: integers(x) ^ integers(y),
    "zeta": lambda x, y: special.zeta(2 + jnp.abs(x), 1.5),
}
if not hasattr(lax, "mulhi"):  # jax 0.8 does not have it
    del ELEMENTWISE["mulhi"]


def _read(op, p, x):
    first, second = x @ p["a"] + p["c"], x @ p["d"]
    return jnp.asarray(op(first, second), float) @ p["b"]


for _name, _op in ELEMENTWISE.items():
    CASES[f"elementwise_{_name}"] = Case(partial(_read, _op), SHAPES, ((4, 3),))


@case((4, 3), **SHAPES)
def add_any(p, x):
    return jax.grad(lambda h: jnp.sum(h * h * jnp.tanh(h)))(x @ p["a"]) @ p["b"]


@case((4, 3), **SHAPES)
def broadcasting_of_single_slices(p, x):
    h = x @ p["a"]
    return (h * p["c"][None] + h.mean(1, keepdims=True)) @ p["b"], (p["d"][:, None] * h[None, :3]).sum((1, 2))


# Contractions.


@case((2, 4, 3), a=(2, 3, 6), b=(2, 6, 5), c=(5,))
def batched_products(p, x):
    h = jnp.einsum("bij,bjk->bik", x, p["a"])
    return jnp.einsum("bij,bjk,k->bi", h, p["b"], p["c"])


@case((4, 3), a=(3, 5, 6), b=(6, 5, 2), c=(5, 6))
def several_contracted_axes(p, x):
    h = jnp.tanh(jnp.tensordot(x, p["a"], 1))
    return jnp.einsum("bij,jik->bk", h, p["b"]), jnp.einsum("bij,ij->b", h, p["c"])


@case((4, 3), a=(3, 6), b=(3, 6), c=(5, 6), d=(5, 2))
def products_of_two_values(p, x):
    q, k = x @ p["a"], x @ p["b"]
    return jax.nn.softmax(q @ k.T) @ x, jnp.einsum("ij,kj->ik", k, p["c"]) @ p["d"]


@case((4, 3), a=(3, 6), w=(6, 6), b=(6, 2))
def a_square_matrix_of_one_axis(p, x):
    h = x @ p["a"]
    return (h @ p["w"] @ p["w"]) @ p["b"], jnp.sum(p["w"] @ p["w"])


@case((4, 3), a=(3, 6), b=(2, 6))
def an_outer_product(p, x):
    return jnp.einsum("bi,ci->bci", x @ p["a"], p["b"]).sum(2), jnp.dot(p["a"], p["b"].T)


def conv(x, w, **options):
    options = {
        "window_strides": (1,),
        "padding": "SAME",
        "dimension_numbers": ("NWC", "WIO", "NWC"),
    } | options
    return lax.conv_general_dilated(x, w, **options)


@case((2, 7, 3), a=(3, 3, 6), c=(6,), b=(3, 6, 4), d=(4, 2))
def convolutions(p, x):
    h = jax.nn.relu(conv(x, p["a"], window_strides=(2,)) + p["c"])
    return conv(h, p["b"], padding=[(2, 1)], rhs_dilation=(2,)).mean(1) @ p["d"]


@case((2, 4, 3), a=(3, 3, 6), b=(2, 6, 4), d=(1, 4, 2))
def transposed_convolutions(p, x):
    h = conv(x, p["a"], lhs_dilation=(2,), padding=[(1, 2)])
    h = lax.conv_transpose(h, p["b"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return conv(h, p["d"])


@case((2, 3, 6, 5), a=(8, 3, 3, 3), w=(12, 2, 3, 3), b=(2, 12, 1, 1))
def grouped_convolutions_channels_first(p, x):
    run = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    h = jnp.tanh(run(x, p["a"]))
    h = jnp.tanh(run(h, p["w"], feature_group_count=4))
    return run(h, p["b"])


@case((2, 5, 3), a=(1, 3, 6), w=(3, 1, 12), v=(3, 1, 12), b=(1, 12, 2))
def depthwise_convolutions_with_a_multiplier(p, x):
    h = conv(x, p["a"])
    h = jnp.tanh(conv(h, p["w"], feature_group_count=6))
    h = conv(h, p["v"], feature_group_count=12, padding="VALID")
    return conv(h, p["b"])


@case((2, 5, 6), w=(1, 3, 4), b=(4, 2))
def groups_of_the_input(p, x):
    return conv(x, p["w"], feature_group_count=2) @ p["b"]


@case((4, 5, 3), w=(3, 3, 6), a=(6, 2), whole=(0,))
def batch_groups(p, x):
    return conv(x, p["w"], batch_group_count=2) @ p["a"]


@case((2, 3), a=(3, 5, 6), k=(1, 6, 4), b=(5, 4, 2))
def a_pointwise_convolution_keeps_places_apart(p, x):
    h = conv(jnp.tensordot(x, p["a"], 1), p["k"], padding="VALID")
    return jnp.einsum("bij,ijk->bk", h, p["b"])


# Reductions.


def channels(p, x):
    """Four rows of 5 x 6 channels, each of which can be removed."""
    return jnp.tensordot(x, p["a"], 1) + p["c"]


PLANES = {"a": (3, 5, 6), "c": (5, 6), "b": (5, 2), "d": (6, 2)}


@case((4, 3), **PLANES)
def sums(p, x):
    h = channels(p, x)
    return h.sum(2) @ p["b"], h.sum((1, 2)), h.mean(1) @ p["d"], jnp.linalg.norm(h + 1e-3)


@case((4, 3), **PLANES)
def extrema(p, x):
    h = channels(p, x)
    return h.max(2) @ p["b"], h.min((1, 2)), jnp.max(h**2), jnp.abs(h).max(1) @ p["d"]


@case((4, 3), **PLANES)
def products(p, x):
    h = channels(p, x)
    return h.prod(2) @ p["b"], jnp.prod(jnp.cos(h), 1) @ p["d"]


@case((4, 3), **PLANES)
def truths(p, x):
    h = channels(p, x) > 0
    return h.any(2) * 1.0 @ p["b"], h.all((1, 2)), h.all(1) * 1.0 @ p["d"], (~h).any(1) * 1.0 @ p["d"]


@case((4, 3), **PLANES)
def bitwise_reductions(p, x):
    h = integers(channels(p, x))
    return (
        jnp.bitwise_or.reduce(h, axis=2) * 1.0 @ p["b"],
        jnp.bitwise_and.reduce(h, axis=2) * 1.0 @ p["b"],
        jnp.bitwise_xor.reduce(h, axis=1) * 1.0 @ p["d"],
        jnp.bitwise_or.reduce(h - jnp.bitwise_or.reduce(h, axis=1, keepdims=True), axis=1),
    )


@case((4, 3), **PLANES)
def extrema_of_integers(p, x):
    h = integers(channels(p, x))
    return h.max(2) * 1.0 @ p["b"], h.min((1, 2)), h.sum(1) * 1.0 @ p["d"]


@case((4, 3), **PLANES)
def places_of_extrema(p, x):
    h = channels(p, x)
    return h.argmax(2) * 1.0 @ p["b"], jnp.argmin(h, 1) * 1.0 @ p["d"]


@case((4, 3), grads=True, **PLANES)
def two_pass_variance(p, x):
    h = channels(p, x)
    last = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
    both = (h - h.mean((1, 2), keepdims=True)) * lax.rsqrt(h.var((1, 2), keepdims=True) + 0.1)
    return h.std((1, 2)), jnp.einsum("bij,ik,jk->bk", last * both, p["b"], p["d"]), h.var(1) @ p["d"]


@case((4, 3), grads=True, **PLANES)
def extrema_of_what_is_alike(p, x):
    h = channels(p, x)
    centred = h - h.mean(-1, keepdims=True)
    return (
        centred.max(-1) @ p["b"],
        centred.min((1, 2)),
        (h + 1.0).max(-1),
        jnp.sum(jnp.exp(h), -1),
        jax.nn.logsumexp(h, -1),
        (centred > 0.5).any(-1),
        (centred > -9.5).all(-1),
    )


@case((4, 3), grads=True, **PLANES)
def softmax_over_channels(p, x):
    return jax.nn.softmax(channels(p, x), -1) @ p["d"], jax.nn.log_softmax(channels(p, x), 1).sum()


@case((4, 3), **PLANES)
def sums_of_what_was_spread(p, x):
    h = channels(p, x)
    spread = jnp.broadcast_to(h.sum(1)[:, None, :, None], (4, 7, 6, 3))
    return spread.sum((1, 3)) @ p["d"], spread.transpose(1, 0, 3, 2).sum(0).sum(1) @ p["d"]


@case((4, 3), **PLANES)
def variance_through_transposes(p, x):
    h = channels(p, x).transpose(2, 0, 1)
    centred = h - h.mean(0)[None]
    return (centred**2).mean(0) @ p["b"], jnp.expand_dims(centred, 1).squeeze(1).max(0)


@case((4, 3), **PLANES)
def cumulative(p, x):
    h = channels(p, x)
    rows = jnp.cumsum(h, 0) + jnp.cumprod(h, 0) + lax.cummax(h, 0) * lax.cummin(h, 0, reverse=True)
    return jnp.einsum("bij,ik,jk->bk", rows, p["b"], p["d"]), lax.cumlogsumexp(h, 0).sum(2) @ p["b"]


@case((4, 3), **PLANES)
def cumulative_along_channels(p, x):
    return jnp.cumsum(channels(p, x), 1).sum((0, 1)) @ p["d"]


@case((4, 3), **PLANES)
def sorting(p, x):
    h = channels(p, x)
    keys, values = lax.sort((h, h * 2 + 1), dimension=0, num_keys=1)
    top, where = lax.top_k(h.transpose(2, 1, 0), 2)
    rows = jnp.sort(h, 0) + keys + values
    return (
        jnp.einsum("bij,ik,jk->bk", rows, p["b"], p["d"]),
        top.sum((1, 2)) @ p["d"],
        jnp.argsort(h, 0).sum(2) * 1.0 @ p["b"],
        where.sum((1, 2)) * 1.0 @ p["d"],
        jnp.sort(h, 1)[:, -2] @ p["d"],
        lax.top_k(h, 3)[0].sum(2) @ p["b"],
    )


@case((4, 3), **PLANES)
def fourier(p, x):
    h = channels(p, x)
    return (
        jnp.real(jnp.fft.fft(h.transpose(2, 1, 0))).sum(2).T @ p["d"],
        jnp.fft.irfft(jnp.fft.rfft(h.transpose(1, 0, 2).swapaxes(1, 2))).sum((1, 2)) @ p["b"],
        jnp.abs(jnp.fft.fft2(h.transpose(2, 0, 1))).sum((1, 2)) @ p["d"],
    )


IMAGE = {"a": (1, 1, 3, 6), "c": (6,), "b": (6, 2)}


def image(p, x):
    return (
        lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + p["c"]
    )


def window(h, operator, initial, **options):
    shape, strides, padding = (
        options.get("size", (2, 2)),
        options.get("by", (2, 2)),
        options.get("pad", "VALID"),
    )
    padding = padding if isinstance(padding, str) else [(0, 0), *padding, (0, 0)]
    return lax.reduce_window(h, initial, operator, (1, *shape, 1), (1, *strides, 1), padding)


@case((2, 6, 5, 3), **IMAGE)
def pooling(p, x):
    h = image(p, x)
    pooled = window(h, lax.max, -jnp.inf) + window(h, lax.min, jnp.inf)
    padded = window(h, lax.max, -jnp.inf, pad=[(1, 1), (0, 1)]) @ p["b"]
    means = window(h, lax.add, 0.0, pad="SAME") / 4
    return pooled @ p["b"], padded, means @ p["b"], (means - means.mean(-1, keepdims=True)).max((1, 2, 3))


@case((2, 6, 5, 3), whole=(1,), **IMAGE)
def pooling_of_nothing_but_padding(p, x):
    h = window(image(p, x), lax.max, -jnp.inf, pad=[(2, 2), (3, 0)])
    return jnp.exp(h).sum((1, 2)) @ p["b"], jnp.isfinite(h).sum(3)


@case((2, 6, 5, 3), grads=True, **IMAGE)
def derivatives_of_pooling(p, x):
    h = image(p, x)
    top, move = jax.vjp(lambda h: window(h, lax.max, -jnp.inf, pad="SAME"), h)
    _, tangent = jax.jvp(lambda h: window(h, lax.max, -jnp.inf), (h,), (jnp.sin(h),))
    _, mean = jax.vjp(lambda h: window(h, lax.add, 0.0, pad="SAME"), h)
    return move(top * top)[0] @ p["b"], tangent @ p["b"], mean(top)[0].sum((1, 2)) @ p["b"]


# Indexing.


@case(np.array([[0, 4], [-1, 2]]), a=(5, 6), c=(5, 6), b=(6, 2))
def lookups(p, i):
    return (
        p["a"][i] @ p["b"],
        jnp.take(p["a"], i, axis=0) @ p["b"],
        jnp.take(p["c"], i, axis=0, mode="clip").sum(1) @ p["b"],
        jnp.take(p["c"], i + 2, axis=0, mode="wrap") @ p["b"],
        p["c"].at[i + 3].get(mode="fill", fill_value=0.0).sum(0) @ p["b"],
    )


@case(np.array([[0, 9], [-7, 2]]), nans=True, a=(5, 6), b=(6, 2))
def lookups_out_of_bounds(p, i):
    return (
        p["a"].at[i].get(mode="fill", fill_value=7.0) @ p["b"],
        p["a"].at[i].get(mode="clip") @ p["b"],
        jnp.take(p["a"], i, axis=0) @ p["b"],
    )


@case(np.array([0, 9]), whole=(1, 2), a=(5, 6), b=(6, 2))
def lookups_of_integers_out_of_bounds(p, i):
    low = integers(p["a"]).at[i].get(mode="fill")
    true = (p["a"] > 0).at[i].get(mode="fill")
    return (low < -(2**30)).astype(float) @ p["b"], jnp.sum(low, 1), true.sum(1)


@case((4, 3), np.array([1, 0, 5, -1]), whole=(4, 5), a=(3, 6), c=(4, 6), b=(6, 2))
def takes_at_known_places(p, x, i):
    h = x @ p["a"]
    return (
        h[:, np.array([5, 0, 0, 3])].sum(),
        h[:, [1, -1]] @ p["b"][np.array([2, 4])],
        h.T[np.arange(0, 6, 2)].sum(0),
        jnp.take(p["c"], np.array([[0, 2], [3, 3]]), axis=0) @ p["b"],
        h.at[:, np.array([0, 8])].get(mode="fill", fill_value=7.0).sum(1),
        h[:, i].sum(1),
    )


@case((4, 3), whole=(2,), a=(3, 6), c=(4, 6), b=(6, 2), v=(4,))
def takes_along_an_axis(p, x):
    h = x @ p["a"]
    return (
        jnp.take_along_axis(h, jnp.argsort(p["c"], 0), 0) @ p["b"],
        jnp.take_along_axis(h, integers(h) % 4, 0).sum(0) @ p["b"],
        jnp.take_along_axis(h, integers(h) % 6, 1).sum(1),
        jnp.take_along_axis(h, jnp.argsort(p["v"])[:, None], 0) @ p["b"],
    )


@case(np.array([0, 2]), a=(5, 4, 6), b=(6, 2))
def lookups_of_parts(p, i):
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0,))
    known = lax.gather(p["a"], jnp.array([[3], [0], [3]]), numbers, (1, 2, 6))
    unknown = lax.gather(p["a"], i[:, None], numbers, (1, 3, 6))
    last = lax.GatherDimensionNumbers(offset_dims=(0, 1), collapsed_slice_dims=(0,), start_index_map=(0,))
    pairs = p["a"][i, i + 1]
    return (
        known @ p["b"],
        unknown @ p["b"],
        lax.gather(p["a"], i[:, None], last, (1, 4, 6)).sum((0, 1)),
        pairs @ p["b"],
    )


@case((4, 3), np.array([2, 0]), whole=(5,), a=(3, 6), c=(4, 6), e=(2, 6), b=(6, 2))
def scatters(p, x, i):
    h = x @ p["a"]
    return (
        h.at[i].set(p["e"]) @ p["b"],
        h.at[i].add(p["e"]) @ p["b"],
        h.at[i].multiply(p["e"]) @ p["b"],
        h.at[1].set(0.0).sum(0) @ p["b"],
        jnp.zeros((5, 6)).at[i].add(p["e"]).sum(0) @ p["b"],
        h.at[:, np.array([0, 2])].set(1.0).sum(),
        h.at[:, 1].add(p["c"][:, 0]).sum(),
        h.at[i + 9].set(p["e"], mode="drop") @ p["b"],
        h.at[i].subtract(p["e"]) @ p["b"],
    )


@case((4, 3), np.array([2, 0]), a=(3, 6), e=(2, 6), b=(6, 2))
def scatters_of_extrema(p, x, i):
    h = x @ p["a"]
    return h.at[i].max(p["e"]) @ p["b"], h.at[i].min(p["e"] - 1.0) @ p["b"]


@case((4, 3), np.int64(1), whole=(2,), a=(3, 6), c=(4, 6), b=(6, 2))
def dynamic_slices(p, x, i):
    h = x @ p["a"]
    return (
        lax.dynamic_slice(h, (i, 0), (2, 6)) @ p["b"],
        lax.dynamic_index_in_dim(p["c"], i, 0) @ p["b"],
        lax.dynamic_slice_in_dim(h, i, 3, axis=1).sum(1),
        lax.dynamic_slice_in_dim(p["c"], 9 * i, 2) @ p["b"],
    )


@case((4, 3), np.int64(1), a=(3, 6), c=(4, 6), e=(2, 6), b=(6, 2))
def dynamic_updates(p, x, i):
    h = x @ p["a"]
    return (
        lax.dynamic_update_slice(h, p["e"], (i, 0)) @ p["b"],
        lax.dynamic_update_slice_in_dim(jnp.zeros((4, 6)), p["e"], i, 0).sum(0) @ p["b"],
        lax.dynamic_update_slice(h, p["c"][:, :2], (0, i)).sum(1),
    )


# Shapes.


@case((4, 3), a=(3, 8), c=(8,), b=(4, 2), d=(5, 2))
def slices(p, x):
    h = x @ p["a"] + p["c"]
    return (
        h[:, 2:6] @ p["b"],
        lax.slice(h, (0, 1), (4, 8), (1, 2)) @ p["b"],
        lax.slice(h, (1, 0), (3, 8), (1, 1)).sum(),
        h[1:, 3:] @ p["d"],
    )


@case((4, 3), a=(3, 8), b=(3, 2), c=(5, 2))
def splits(p, x):
    first, second = jnp.split(x @ p["a"], [3], axis=1)
    gate, value = jnp.split(second[:, :4], 2, axis=1)
    return first @ p["b"], second @ p["c"], (jax.nn.sigmoid(gate) * value).sum(1)


@case((4, 3), a=(3, 5), c=(3, 3), e=(2, 5), b=(8, 2), d=(5, 2))
def concatenations(p, x):
    first, second = x @ p["a"], x @ p["c"]
    return (
        jnp.concatenate([first, second], 1) @ p["b"],
        jnp.concatenate([first, p["e"], jnp.zeros((1, 5))]) @ p["d"],
        jnp.concatenate([first, jnp.zeros((4, 3))], 1) @ p["b"],
        jnp.concatenate([jnp.zeros((4, 2)), jnp.zeros((4, 3))], 1) @ p["d"],
    )


@case((4, 3), np.float64(0.5), a=(3, 6), b=(6, 2), d=(9, 2), e=(4, 2), f=(16, 2))
def pads(p, x, filler):
    h = x @ p["a"]
    zero, one = jnp.zeros(()), jnp.ones(())
    return (
        lax.pad(h, zero, [(0, 0, 0), (1, 2, 0)]) @ p["d"],
        lax.pad(h, one, [(0, 0, 0), (1, 2, 0)]) @ p["d"],
        lax.pad(h, zero, [(0, 0, 0), (-1, -1, 0)]) @ p["e"],
        lax.pad(h, one, [(0, 0, 0), (-1, -1, 0)]) @ p["e"],
        lax.pad(h, zero, [(0, 0, 0), (3, 2, 1)]) @ p["f"],
        lax.pad(h, filler, [(0, 0, 0), (-3, 8, 1)]) @ p["f"],
        lax.pad(h, filler, [(1, 0, 0), (0, 0, 0)]) @ p["b"],
        lax.pad(h, zero, [(1, -2, 0), (0, 0, 0)]) @ p["b"],
        lax.pad(h, zero, [(1, 1, 0), (3, 0, 0)]) @ p["d"],
    )


@case((4, 3), a=(3, 6), c=(4, 6), b=(6, 2), d=(12, 2))
def reordered(p, x):
    h = x @ p["a"]
    return (
        h[:, ::-1] @ p["b"],
        (h + h[:, ::-1]).sum(1),
        jnp.tile(h, 2) @ p["d"],
        jnp.repeat(h, 2, axis=1) @ p["d"],
        jnp.roll(h, 2, axis=1) @ p["b"],
        jnp.flip(p["c"], (0, 1)) @ p["b"],
        jnp.tile(p["c"], (3, 1)) @ p["b"],
    )


@case((4, 3), a=(3, 6), c=(4, 6), b=(6, 2))
def stacks(p, x):
    h = x @ p["a"]
    stacked = jnp.stack([h, p["c"], jnp.zeros((4, 6))], 1)
    first, second, zero = jnp.unstack(stacked, axis=1)
    return (
        (stacked @ p["b"]).sum(1),
        first @ p["b"],
        (second * zero) @ p["b"],
        jnp.stack([h, h], 2).sum((1, 2)),
    )


@case((4, 3), a=(3, 6), c=(1, 6), b=(6, 2))
def renamed_axes(p, x):
    h = jnp.expand_dims(x @ p["a"], (0, 2))
    h = h.transpose(3, 2, 0, 1) * p["c"].squeeze(0)[:, None, None, None]
    h = jnp.squeeze(h, (1, 2)).T
    return h @ p["b"], jnp.broadcast_to(p["c"], (2, 6)) @ p["b"], lax.broadcast(h, (2,)).sum((0, 1)) @ p["b"]


@case((4, 3), whole=(3,), a=(3, 6), b=(6, 2))
def iotas(p, x):
    h = x @ p["a"]
    place = lax.broadcasted_iota(float, (4, 6), 1)
    row = lax.broadcasted_iota(float, (4, 6), 0)
    return (
        (h * place + h * row) @ p["b"],
        jnp.where(place < 3, h, 0.0).sum(1),
        (h * row + row).max(1),
        row.sum(1),
    )


@case((4, 3), whole=(0,), a=(3, 2, 6), c=(12,), b=(3, 4, 2), d=(12, 2), e=(4, 3, 2))
def reshapes(p, x):
    h = jnp.tensordot(x, p["a"], 1).reshape(4, 12) + p["c"]
    return (
        jnp.einsum("bij,ijk->bk", h.reshape(4, 3, 4), p["b"]),
        h.reshape(2, 2, 12) @ p["d"],
        jnp.einsum("bij,ijk->bk", h.reshape(4, 4, 3), p["e"]),
        h.reshape(4, 1, 12, 1).sum((1, 3)) @ p["d"],
    )


@case((4, 3), a=(3, 2, 6), b=(2, 3, 2, 2), c=(12, 2), d=(2, 2, 3, 2))
def reshapes_that_fit(p, x):
    h = jnp.tensordot(x, p["a"], 1)
    return (
        jnp.einsum("bijk,ijkl->bl", h.reshape(4, 2, 3, 2), p["b"]),
        h.reshape(4, 12) @ p["c"],
        jnp.einsum("bijk,ijkl->bl", h.reshape(4, 2, 2, 3), p["d"]),
    )


@case((4, 3), a=(3, 2, 3), b=(3, 2, 5))
def reshapes_without_common_factors(p, x):
    h = jnp.tensordot(x, p["a"], 1)
    return jnp.einsum("bij,ijk->bk", h.reshape(4, 3, 2), p["b"]).sum(1)


@case((4, 3), a=(3, 4, 6), b=(8, 3, 2))
def reshapes_of_many_to_many(p, x):
    h = jnp.tensordot(x, p["a"], 1)
    return jnp.einsum("bij,ijk->bk", h.reshape(4, 8, 3), p["b"])


@case((4, 3), a=(3, 4, 6), b=(4, 6, 2))
def reshapes_of_the_whole(p, x):
    h = jnp.tensordot(x, p["a"], 1)
    flat = h.ravel().reshape(4, 24)
    return flat.reshape(4, 4, 6).sum(1), jnp.einsum("bij,ijk->bk", flat.reshape(4, 4, 6), p["b"])


@case((4, 3), whole=(1, 2, 3), a=(3, 6), b=(6, 2))
def reshapes_of_nothing(p, x):
    nothing = jnp.zeros((0, 3)).reshape(0, 5)
    return x @ p["a"] @ p["b"], nothing, jnp.zeros((4, 0, 6)).reshape(0, 3), nothing.sum(1)


@case((4, 3), a=(3, 2, 12), b=(12, 5), c=(24, 2))
def shuffled_channels(p, x):
    h = jnp.tensordot(x, p["a"], 1)
    heads = h.reshape(4, 2, 3, 4).transpose(0, 2, 1, 3)
    merged = heads.reshape(4, 24)
    shuffled = merged.reshape(4, 6, 4).swapaxes(1, 2).reshape(4, 24)
    return shuffled @ p["c"], heads.sum((1, 2, 3)), (h @ p["b"]).sum((1, 2))


# Bodies.


@case((5, 3), grads=True, a=(3, 6), w=(6, 6), c=(6,), b=(6, 2))
def scans(p, x):
    def step(carry, row):
        carry = jnp.tanh(carry @ p["w"] + row @ p["a"]) + p["c"]
        return carry, (carry * 2, row.sum())

    last, (all_, sums) = lax.scan(step, jnp.zeros(6), x)
    back, _ = lax.scan(step, jnp.ones(6) * p["c"], x, reverse=True)
    return last @ p["b"], all_ @ p["b"], sums, back @ p["b"]


@case((4, 3), grads=True, a=(3, 6), w=(5, 6, 6), c=(5, 6), b=(6, 2))
def scanned_layers(p, x):
    def layer(h, weights):
        kernel, bias = weights
        normed = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)
        return h + jnp.tanh(normed @ kernel) * bias, h.max(-1)

    h, tops = lax.scan(layer, x @ p["a"], (p["w"], p["c"]), unroll=2)
    return h @ p["b"], tops


@case((4, 3), whole=(0, 1), a=(3, 6), c=(6,), w=(6, 6), b=(6, 2))
def scans_in_which_zeros_die_out(p, x):
    def step(carry, _):
        first, second, third = carry
        return (second, third + 1.0, first @ p["w"]), first.sum()

    zero = jnp.zeros((4, 6))
    (first, second, third), sums = lax.scan(step, (zero, x @ p["a"], zero * p["c"]), None, length=4)
    return (first + second * third) @ p["b"], sums


@case((4, 3), np.int32(3), a=(3, 6), w=(6, 6), c=(6,), b=(6, 2))
def whiles(p, x, count):
    def more(state):
        n, h = state
        return (n < count) & (jnp.sum(h * h) < 1e3)

    def body(state):
        n, h = state
        return n + 1, jnp.tanh(h @ p["w"]) * p["c"] + 0.0

    n, h = lax.while_loop(more, body, (0, x @ p["a"]))
    return n, h @ p["b"], lax.fori_loop(0, count, lambda i, h: h * p["c"] + i, x @ p["a"]) @ p["b"]


@case((4, 3), grads=True, a=(3, 6), w=(6, 6), c=(6,), b=(6, 2))
def counted_loops(p, x):
    h = lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ p["w"]) * (i + 1.0), x @ p["a"])
    return h @ p["b"]


@case((4, 3), np.int32(1), grads=True, a=(3, 6), w=(6, 6), c=(6,), b=(6, 2))
def branches(p, x, which):
    h = x @ p["a"]
    first = lax.cond(x[0, 0] > 0, lambda h: h * p["c"], lambda h: jnp.tanh(h), h)
    second = lax.switch(which, [lambda h: h @ p["w"], lambda h: h + p["c"], lambda h: jnp.zeros_like(h)], h)
    third = lax.cond(which > 0, lambda: h.sum(1), lambda: h.var(1))
    return first @ p["b"], second @ p["b"], third


@case((4, 3), grads=True, a=(3, 6), w=(6, 6), b=(6, 2))
def checkpoints(p, x):
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    @partial(jax.checkpoint, policy=policy)
    def block(h):
        h = checkpoint_name(jnp.tanh(h @ p["w"]), "kept")
        return h - h.mean(-1, keepdims=True)

    return jax.checkpoint(block)(block(x @ p["a"])) @ p["b"]


@jax.custom_jvp
def halved(x, n):
    return x * 0.5 * jnp.sign(n)


@halved.defjvp
def _halved_jvp(primals, tangents):
    (x, n), (t, _) = primals, tangents
    return halved(x, n), t * 0.25  # not the true derivative: the rule is kept


@jax.custom_jvp
def steep(x):
    return jnp.where(x > 0, jnp.sin(x), 0.0)


@steep.defjvp
def _steep_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return steep(x), steep(x) * t + jnp.cos(steep(x)) * t  # calls itself


@jax.custom_jvp
def normed(x, scale):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * scale


@normed.defjvp
def _normed_jvp(primals, tangents):
    (x, scale), (t, u) = primals, tangents
    size = jnp.sqrt((x * x).mean(-1, keepdims=True) + 0.1)
    inner = (x * t).mean(-1, keepdims=True)
    return normed(x, scale), (t / size - x * inner / size**3) * scale + x / size * u


@case((4, 3), np.int32(3), grads=True, a=(3, 6), c=(6,), w=(6, 6), b=(6, 2))
def derivatives_of_ones_own(p, x, n):
    h = halved(x @ p["a"], n)
    h = normed(steep(h @ p["w"]), p["c"])
    return jax.nn.relu(h) @ p["b"], jax.nn.silu(jax.nn.softplus(h)) @ p["b"], jax.nn.gelu(h).sum(1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def clipped(x, scale, limit):
    return x * scale


def _clipped_forward(x, scale, limit):
    return clipped(x, scale, limit), (x, scale)


def _clipped_backward(limit, residuals, g):
    x, scale = residuals
    g = jnp.clip(g, -limit, limit)
    return g * scale, (g * x).sum(0)


clipped.defvjp(_clipped_forward, _clipped_backward)


@jax.custom_vjp
def scaled_norm(x, scale, n):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * scale * n


def _scaled_norm_forward(x, scale, n):
    return scaled_norm(x, scale, n), (x, scale, n)


def _scaled_norm_backward(residuals, g):
    x, scale, n = residuals
    size = jnp.sqrt((x * x).mean(-1, keepdims=True) + 0.1)
    g = g * n
    inner = (g * scale * x).mean(-1, keepdims=True)
    return g * scale / size - x * inner / size**3, (g * x / size).sum(0), None


scaled_norm.defvjp(_scaled_norm_forward, _scaled_norm_backward)


@case((4, 3), np.int32(2), grads=True, a=(3, 6), c=(6,), d=(6,), b=(6, 2))
def derivatives_backwards_of_ones_own(p, x, n):
    h = clipped(x @ p["a"], p["c"], 0.5)
    return scaled_norm(h, p["d"], n) @ p["b"]


@case((4, 3), grads=True, a=(3, 6), w=(6, 6), b=(6, 2))
def nested_calls(p, x):
    @jax.jit
    def inner(h, w):
        return jax.jit(jnp.tanh)(h @ w)

    constant = jnp.arange(6.0)
    return jax.jit(lambda h: inner(h, p["w"]) * constant)(x @ p["a"]) @ p["b"]


@case((5, 3), grads=True, a=(3, 6), w=(6, 6), c=(6,), b=(6, 2))
def bodies_in_bodies(p, x):
    @jax.checkpoint
    def step(carry, row):
        new = lax.cond(row.sum() > 0, lambda c: steep(c @ p["w"]), lambda c: c * p["c"], carry)
        inner, _ = lax.scan(lambda h, _: (jax.nn.relu(h) + row @ p["a"], None), new, None, length=2)
        return inner, inner.var()

    h, variances = lax.scan(step, jnp.zeros(6), x)
    return h @ p["b"], variances


@case((4, 3), a=(3, 6), c=(4, 6), b=(6, 2))
def barriers(p, x):
    h, c = lax.optimization_barrier((x @ p["a"], p["c"]))
    return (h * c) @ p["b"], jax.device_put(h) @ p["b"]


@case((4, 3), a=(3, 6), b=(6, 2))
def constrained_shardings(p, x):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    return jax.lax.with_sharding_constraint(x @ p["a"], sharding) @ p["b"]


# Ragged products, of experts: rows in groups of known sizes.

SIZES = np.array([2, 0, 3, 1])


@case((6, 3), SIZES, grads=True, a=(4, 3, 6), w=(4, 6, 6), b=(4, 6, 2), c=(4, 6))
def ragged_products(p, x, sizes):
    h = jax.nn.silu(lax.ragged_dot(x, p["a"], sizes)) * jnp.repeat(
        p["c"], sizes, axis=0, total_repeat_length=6
    )
    return lax.ragged_dot(lax.ragged_dot(h, p["w"], sizes), p["b"], sizes)


@case((7, 3), SIZES, a=(4, 3, 6), b=(6, 2))
def ragged_products_with_rows_left_over(p, x, sizes):
    h = lax.ragged_dot(x, p["a"], sizes)
    return (jnp.tanh(h) + 1.0) @ p["b"], jnp.exp(h).sum(1)


@case((6, 3), SIZES, whole=(), a=(3, 5), d=(3, 6), b=(5, 2), c=(6, 2))
def ragged_sums(p, x, sizes):
    """A sum over rows for each group, as in the gradient of the kernels."""
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    each = lax.ragged_dot_general(jnp.tanh(x @ p["a"]), x @ p["d"], sizes, numbers)
    return jnp.einsum("gab,bc->gac", each, p["c"]).sum(2) @ p["b"]


@case((2, 6, 3), np.stack([SIZES, SIZES[::-1]]), a=(2, 4, 3, 6), b=(2, 4, 6, 2))
def ragged_products_of_batches(p, x, sizes):
    one = lambda x, a, b, n: lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, a, n)), b, n)  # noqa: E731
    return jax.vmap(one)(x, p["a"], p["b"], sizes)


@case((6, 4), np.array([2, 3, 1]), a=(4, 3), w=(6, 5, 3), b=(5, 2))
def ragged_sums_of_columns(p, x, sizes):
    """Batch axes, and an axis that is summed in groups."""
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((0,), (0,))), [1], [])
    rows = jnp.einsum("bi,ik->bk", x, p["a"])
    return jnp.einsum("gbn,nc->gbc", lax.ragged_dot_general(rows, p["w"], sizes, numbers), p["b"])


# Axes that vmap mapped, and axes of a mesh.


@case((4, 3), a=(3, 6), c=(6,), b=(6, 2), d=(3, 4))
def collectives_of_a_mapped_axis(p, x):
    def one(x):
        h = x @ p["a"]
        mean, most = lax.pmean(h, "rows"), lax.pmax(h * p["c"], "rows") - lax.pmin(h, "rows")
        return (h - mean + most) * lax.axis_index("rows"), lax.ppermute(
            h, "rows", [(0, 1), (1, 0), (2, 3), (3, 2)]
        )

    def of_params(d):
        return lax.psum(jnp.sin(d) * x[0, 0], "columns")

    first, second = jax.vmap(one, axis_name="rows")(x)
    total = jax.vmap(of_params, in_axes=1, out_axes=None, axis_name="columns")(p["d"])
    return first @ p["b"], second @ p["b"], total


def on_one_device(function, *, check=True):
    """A function in a shard_map over one device, whose inputs are not sharded."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check)


@case((4, 3), a=(3, 6), c=(6,), b=(6, 2))
def bodies_on_devices(p, x):
    @partial(on_one_device, check=False)
    def summed(x, a, c):
        h = lax.psum(jnp.tanh(x @ a), "x") * c + lax.axis_index("x")
        return lax.pmax(h, "x") - lax.pmin(h * c, "x") + lax.ppermute(h, "x", [(0, 0)])

    @on_one_device
    def varying(x, a, c):
        h = lax.pcast(x @ a, "x", to="varying") if hasattr(lax, "pcast") else lax.pvary(x @ a, "x")
        return lax.psum(h * c, "x")

    return summed(x, p["a"], p["c"]) @ p["b"], varying(x, p["a"], p["c"]) @ p["b"]


@case((4, 3), a=(3, 6), c=(6,), b=(6, 2))
def exchanges_between_devices(p, x):
    @partial(on_one_device, check=False)
    def gathered(h):
        rows = lax.all_gather(h, "x", axis=0, tiled=True)
        return rows + lax.all_gather(jnp.sin(h), "x").sum(0) + lax.psum_scatter(h, "x", tiled=True)

    @partial(on_one_device, check=False)
    def scattered(h):
        return lax.psum_scatter(h[None], "x") + lax.all_to_all(h, "x", 0, 0, tiled=True)

    h = x @ p["a"]
    return gathered(h) @ p["b"], scattered(h * p["c"]) @ p["b"]


@case((4, 3), whole=(1,), a=(3, 6), b=(6, 2))
def sharded_bodies(p, x):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def run(spec):
        both = partial(jax.shard_map, mesh=mesh, in_specs=(P(), spec), out_specs=spec)
        return both(lambda x, a: jnp.tanh(x @ a))(x, p["a"])

    return run(P()) @ p["b"], run(P(None, "x")) @ p["b"]


# Wrapped functions.


mapped = jax.custom_batching.custom_vmap(lambda x, c: jnp.sin(x) * c + x)
mapped.def_vmap(lambda size, batched, x, c: (jnp.sin(x) * c + x, batched[0]))


@case((4, 3), a=(3, 6), c=(6,), b=(6, 2))
def wrapped_functions(p, x):
    norm = lax.composite(lambda x, c: (x - x.mean(-1, keepdims=True)) * c + jax.nn.gelu(x), "my.norm")
    h = x @ p["a"]
    return mapped(h, p["c"]) @ p["b"], norm(h, p["c"]) @ p["b"], mapped(norm(h, p["c"]), p["c"]).sum(1)


# Batches of matrices.


@case((3, 4, 4), a=(3, 6), b=(6, 2))
def many_matrices(p, x):
    """A matrix for each channel, of which an eigenvalue, or an entry of a factor, is read."""
    square = jnp.einsum("nij,nc->cij", x, p["a"])
    spread = jnp.eye(4) * 5.0 + jnp.sin(square)
    symmetric = spread @ jnp.swapaxes(spread, -1, -2)
    sides = jnp.einsum("nij,nc->cij", x, jnp.sin(p["a"]))
    lower = lax.linalg.cholesky(symmetric)
    packed, pivots, order = lax.linalg.lu(spread)
    order += lax.linalg.lu_pivots_to_permutation(pivots, 4)
    diagonals = jnp.moveaxis(symmetric[..., 0], 0, 0)
    solved = lax.linalg.tridiagonal_solve(0 * diagonals, diagonals + 1, 0 * diagonals, sides)
    found = (
        lower,
        lax.linalg.eigh(symmetric, symmetrize_input=False)[1][:, None],
        jnp.abs(lax.linalg.svd(spread, compute_uv=False))[:, None],
        jnp.abs(lax.linalg.qr(spread, full_matrices=False)[1]),
        packed + pivots[:, None] + order[:, None],
        lax.linalg.triangular_solve(lower, sides, left_side=True, lower=True),
        solved,
        jnp.abs(jnp.linalg.eigvals(spread))[:, None].max(-1, keepdims=True),
        lax.linalg.schur(symmetric, compute_schur_vectors=False)[0] ** 2,
        lax.linalg.hessenberg(symmetric)[0] ** 2,
        lax.linalg.tridiagonal(symmetric)[1][:, None],
        jnp.abs(lax.linalg.householder_product(0.1 * square, jnp.sin(symmetric[..., 0]))),
    )
    return [jnp.einsum("cij,cd->d", each, p["b"]) for each in found]


@case((4, 3), a=(3, 6), w=(3, 5), b=(6, 2), d=(5, 2))
def right_hand_sides(p, x):
    lower = jnp.tril(jnp.cos(x @ x.T)) + 3 * jnp.eye(4)
    left = lax.linalg.triangular_solve(lower, x @ p["a"], left_side=True, lower=True)
    right = lax.linalg.triangular_solve(lower, (x @ p["w"]).T, lower=True)
    return left @ p["b"], right.T @ p["d"]


# Bits and keys, generic reductions and windows.


@case((4, 3), jax.random.key_data(jax.random.key(0)), a=(3, 6), b=(6, 2))
def bits(p, x, key):
    h = x @ p["a"]
    halves = lax.bitcast_convert_type(h, jnp.int32)
    back = lax.bitcast_convert_type(lax.bitcast_convert_type(jnp.sin(h), jnp.int64), float)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(key), 3), 2)
    noise = jax.random.gamma(keys[0], 2.0, (4, 6)) + jax.random.uniform(jax.random.clone(keys[1]), (4, 6))
    halves += jax.random.key_data(jax.random.split(keys[0], (4, 6)))
    drawn = lax.rng_bit_generator(jnp.concatenate([key, key]), (4, 6))[1] % 7
    return (halves % 5).sum(-1) @ p["b"], back @ p["b"], (h * noise + drawn) @ p["b"]


@case((4, 3), a=(3, 6), b=(6, 2), c=(6,))
def reductions_of_ones_own(p, x):
    h = x @ p["a"]

    def both(a, b):
        return a[0] + b[0], jnp.maximum(a[1], b[1])

    total, most = lax.reduce((h, jnp.sin(h)), (0.0, -jnp.inf), both, (0,))
    add = jax.make_jaxpr(lambda a, b: a + b)(0.0, 0.0)
    (plain,) = lax.reduce_p.bind(
        h * p["c"], np.float64(0), computation=lambda a, b: a + b, jaxpr=add, dimensions=(1,)
    )
    return (total * most) @ p["b"], lax.reduce(h, 1.0, lambda a, b: a * b + a, (0,)) @ p["b"], plain


@case((2, 5, 3), a=(3, 6), b=(6, 2))
def windows_of_ones_own(p, x):
    h = x @ p["a"]
    one = lax.reduce_window(h, 1.0, lambda a, b: a * b + 0.5 * a, (1, 2, 1), (1, 1, 1), "VALID")
    return one @ p["b"], lax.approx_max_k(h, 2, reduction_dimension=1)[0] @ p["b"]


def test_axes_of_experts_and_groups_stay_whole():
    """The group sizes have an entry for each expert, and the position of a row decides its group."""
    params = {"a": jnp.ones((4, 3, 6)), "b": jnp.ones((4, 6, 2))}

    def function(p, x, sizes):
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["a"], sizes)), p["b"], sizes)

    groups = channel_groups(function, params, jnp.ones((6, 3)), jnp.asarray(SIZES))
    assert [(g.units, g.removable) for g in groups] == [(6, True)]
    (why,) = [w.why for w in groups.whole if ("a", 0) in w.members]
    assert "ragged_dot_general at test_graph_rules.py" in why and "places" in why


@case((4, 3), grads=True, a=(3, 6), b=(6, 2), d=(3, 6), e=(6, 2), c=(6,), f=(2, 6))
def tables_of_several_readers(p, x):
    table = jnp.sin(jnp.arange(6.0)) + jax.random.normal(jax.random.key(2), (6,))
    scale = jnp.tanh(p["c"])[None] * jnp.take(p["f"], np.array([1, 0, 0, 1]), 0)
    spread = jnp.broadcast_to(jnp.cos(x[:, :1]), (4, 6))

    def layer(w, v):
        h = steep(x @ w + table) * scale + table * scale
        return lax.cond(table[0] > 0, lambda h: h * spread + table * table, lambda h: h + spread, h) @ v

    return layer(p["a"], p["b"]) + layer(p["d"], p["e"])


@case((4, 3), whole=(2,), a=(3, 6), w=(4, 5), c=(5,), b=(6, 2), d=(5, 2))
def primitives_without_a_rule(p, x):
    q, r = jnp.linalg.qr(p["w"] * p["c"])
    h = x @ p["a"]
    return q @ r @ p["d"], h @ p["b"], lax.bitcast_convert_type(h, jnp.int64).sum(1)


@case((4, 3), a=(3, 6), b=(6, 2))
def callbacks(p, x):
    h = x @ p["a"]
    shape = jax.ShapeDtypeStruct((4, 6), h.dtype)
    return jax.pure_callback(lambda h: np.asarray(h) * 2, shape, h, vmap_method="sequential") @ p["b"]


@case((4, 3), jax.random.key_data(jax.random.key(0)), grads=True, a=(3, 6), c=(6,), b=(6, 2))
def dropout(p, x, key):
    h = jnp.tanh(x @ p["a"] + p["c"])
    keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 0.5, h.shape)
    noise = jax.random.normal(jax.random.key(1), h.shape)
    return (jnp.where(keep, h / 0.5, 0.0) + h * noise) @ p["b"]


# What the tests do with a case.


def operand(rng, given):
    return jnp.asarray(rng.normal(size=given) if isinstance(given, tuple) else given)


def drawn(name):
    """Draw the params and inputs of a case, and return the generator with them.

    Cases with equal shapes draw the same, so that cutting their params is compiled once.
    """
    found = CASES[name]
    rng = np.random.default_rng(zlib.crc32(str(found.shapes).encode()))
    params = {path: jnp.asarray(rng.normal(size=shape)) for path, shape in found.shapes.items()}
    return rng, params, tuple(operand(rng, given) for given in found.inputs)


@pytest.mark.parametrize("name", CASES)
def test_facts_are_true_of_values(name):
    rng, params, inputs = drawn(name)
    claims = 0
    for pattern in ("slices", "leaf"):
        masks = random_masks(rng, params, pattern)
        masked = jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, masks)
        claims += check_facts(CASES[name].function, masked, masks, inputs, rng, CASES[name].nans)
    assert claims


def one_output(function, number):
    """Return a function of one output alone; ops that only the others read are dead code then."""
    return lambda params, *inputs: jax.tree.leaves(function(params, *inputs))[number]


def gradient_weights(rng, found, output):
    if not (found.grads and jnp.issubdtype(output.dtype, jnp.inexact)):
        return None
    return [jnp.asarray(rng.normal(size=output.shape))]


@pytest.mark.parametrize("name", CASES)
def test_the_small_network_is_the_masked_one(name):
    rng, params, inputs = drawn(name)
    found = CASES[name]
    outputs = jax.tree.leaves(jax.eval_shape(found.function, params, *inputs))
    functions = [one_output(found.function, number) for number in range(len(outputs))]
    weights = [gradient_weights(rng, found, output) for output in outputs]
    whole = random_masks(rng, params, "none")
    units = [zero_units(rng, whole, channel_groups(f, params, *inputs)) for f in functions]
    slices = [random_masks(rng, params, "slices") for _ in functions]
    dense = Dense(functions, params, inputs, weights)
    cuts = zip(dense.check(units, rng), dense.check(slices, rng), strict=True)
    left = [number for number, smalls in enumerate(cuts) if not any(map(removed, smalls))]
    assert left == list(found.whole), "nothing could be removed for these outputs"


# Every rule is tried by some case, or is listed here with why it is not.

NOT_PUBLIC = {
    "take_layer": "made of stacks in vmapped programs, see test_stacked_networks",
    "join_layers": "as take_layer",
    "copy_p": "no function of jax makes it",
    "eq_to": "made in the comparisons of a sort, when that is lowered",
    "ge_to": "as eq_to",
    "gt_to": "as eq_to",
    "le_to": "as eq_to",
    "lt_to": "as eq_to",
    "checkpoint": "one of three names that checkpoints have had",
    "remat": "as checkpoint",
    "remat2": "as checkpoint",
    "ragged_dot": "the name of ragged_dot_general in other versions of jax",
    "pbroadcast": "for GPUs only",
    "reshard": "for meshes with explicit axes only: see test_graph_sharding",
    "scatter_add": "the name of scatter-add in other versions of jax",
    "scatter_sub": "as scatter_add",
    "scatter_mul": "as scatter_add",
    "scatter_min": "as scatter_add",
    "scatter_max": "as scatter_add",
}


def test_every_rule_has_a_case():
    tried = set()
    for name, found in CASES.items():
        _, params, inputs = drawn(name)
        tried |= op_names(TracedNetwork(found.function, params, inputs).region)
    own = {name for name, rule in base._RULES.items() if rule.link.__module__.startswith("jaxprune.")}
    newer = {
        name for name in ("mulhi", "stack", "unstack", "tile", "one_minus_square") if not hasattr(lax, name)
    }
    assert own - tried <= NOT_PUBLIC.keys() | newer


# Mistakes that random cases found.


def masks_without(params, **removed):
    """Return masks without some slices of the last axis."""
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in params.items()}
    for path, indices in removed.items():
        masks[path][..., indices] = False
    return masks


def check_one(function, masks, *shapes, seed=0, weights=None):
    """Compare a function of one output with its compacted form under some masks."""
    rng = np.random.default_rng(seed)
    params = {path: rng.normal(size=np.shape(mask)) for path, mask in masks.items()}
    inputs = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    check_facts(function, jax.tree.map(np.multiply, params, masks), masks, inputs, rng)
    return Dense([function], params, inputs, [weights]).check([masks], rng)[0]


def ones(**shapes):
    return {path: np.ones(shape) for path, shape in shapes.items()}


def test_zeros_have_either_sign():
    masks = masks_without(ones(a=(3, 4), b=(3, 4), c=(4, 2)), a=[1], b=[1])

    def angle(p, x):  # of a product of zero and x, negated
        return jnp.arctan2(x @ p["a"], -(x @ p["b"])) @ p["c"]

    def angle_to_mean(p, x):
        h = x @ p["a"] * jnp.ones(4)
        return jnp.sum(jnp.arctan2(x[:, :1] * p["b"][:1] * 1.0, -1.0 + 0.0 * h.mean(1, keepdims=True)), 1)

    def inverse(p, x):
        return jnp.sum(jnp.tanh(1 / (x[:, :1] * p["b"][:1])), 1) + jnp.sum(jnp.exp(x @ p["a"]) @ p["c"])

    for function in (angle, angle_to_mean, inverse):
        check_one(function, masks, (4, 3))


def test_bits_of_integers_are_combined_as_bits():
    masks = masks_without(ones(a=(3, 4)), a=[1, 2])

    def function(p, x):
        h = integers(10 * (x @ p["a"]))
        return jnp.bitwise_or.reduce(h, axis=1), jnp.bitwise_and.reduce(~h, axis=1)

    for number in (0, 1):
        assert check_one(one_output(function, number), masks, (4, 3)).params["a"].shape == (3, 2)
