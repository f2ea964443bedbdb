"""Convolutions in other forms: numpy's sums over a window, whatever the geometry."""

import itertools
import math

import flax.linen as linen
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from jax import lax

import jaxprune as jp
from experiments.benchmarks import convolutions

FORMS = ("wide2", "wide4", "wide8", "shifted", "padded", "compact", "csr", "blocks")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolve(x, kernel, strides, padding, spread, dilation, groups):
    """Return a convolution, summed place by place: (images, channels, *places), (outputs, inputs, *window)."""
    axes = range(len(strides))
    wide = np.zeros((*x.shape[:2], *((n - 1) * gap + 1 for n, gap in zip(x.shape[2:], spread, strict=True))))
    wide[(..., *(slice(None, None, gap) for gap in spread))] = x
    for axis, ends in enumerate(padding, start=2):  # negative padding cuts
        wide = np.pad(wide, [(0, 0)] * axis + [tuple(max(n, 0) for n in ends)] + [(0, 0)] * (wide.ndim - 1 - axis))
        low, high = (max(-n, 0) for n in ends)
        wide = np.take(wide, np.arange(low, wide.shape[axis] - high), axis)
    spans = [(kernel.shape[n + 2] - 1) * dilation[n] + 1 for n in axes]
    sizes = [(wide.shape[n + 2] - spans[n]) // strides[n] + 1 for n in axes]
    out = np.zeros((len(x), len(kernel), *sizes))
    own_in, own_out = kernel.shape[1], len(kernel) // groups
    for o, place in itertools.product(range(len(kernel)), itertools.product(*map(range, sizes))):
        first = o // own_out * own_in
        window = tuple(slice(p * s, p * s + span, d) for p, s, span, d in zip(place, strides, spans, dilation, strict=True))
        out[(slice(None), o, *place)] = np.sum(
            wide[(slice(None), slice(first, first + own_in), *window)] * kernel[o],
            axis=tuple(range(1, kernel.ndim)),
        )
    return out


@st.composite
def geometries(draw):
    """A convolution: (x's shape, kernel's shape, strides, padding, spread, dilation, groups)."""
    ndim = draw(st.integers(1, 2))
    groups, inputs, own = draw(st.sampled_from([(1, 3, 2), (1, 1, 4), (4, 1, 1), (3, 1, 2), (2, 2, 3)]))

    def each(*choices):
        return tuple(draw(st.sampled_from(choices)) for _ in range(ndim))

    window, strides, spread, dilation = each(1, 2, 3), each(1, 2, 3), each(1, 1, 2), each(1, 1, 2)
    places = each(5, 6, 9)
    padding = tuple((draw(st.integers(-1, 2)), draw(st.integers(-1, 3))) for _ in range(ndim))
    x = (draw(st.integers(1, 3)), groups * inputs, *places)
    return x, (groups * own, inputs, *window), strides, padding, spread, dilation, groups


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(geometries(), st.sampled_from(FORMS), st.permutations(range(4)), st.sampled_from(["entries", "channels"]))
def test_each_form_is_the_convolution(geometry, form, order, pruned):
    shape, window, strides, padding, spread, dilation, groups = geometry
    rng = np.random.default_rng(0)
    mask = rng.random(window if pruned == "entries" else (*window[:2], *(1 for _ in window[2:]))) < 0.4
    x, kernel, mask = normal(1, *shape), normal(2, *window), np.broadcast_to(mask, window)
    if pruned == "channels":
        mask = mask & (np.arange(window[0]) % 2 == 0).reshape(-1, *(1 for _ in window[1:]))
    order = [axis for axis in order if axis < len(shape)]  # where the axes of the specs lie
    back = [order.index(axis) for axis in range(len(order))]
    numbers = lax.ConvDimensionNumbers(tuple(back), tuple(back), tuple(back))

    def apply_fn(params, x):
        return lax.conv_general_dilated(
            x, params["w"], strides, padding, spread, dilation, numbers, feature_group_count=groups
        )

    params, masks = {"w": jnp.transpose(kernel, order)}, {"w": jnp.transpose(mask, order)}
    given_x = jnp.transpose(x, order)
    assume(all(jax.eval_shape(apply_fn, params, given_x).shape))
    want = convolve(x, np.where(mask, kernel, 0), strides, padding, spread, dilation, groups)
    try:
        fast = jp.sparsify(apply_fn, params, masks, given_x, choose={"w": form})
    except ValueError as error:
        assert "does not suit" in str(error)
        suits = {"shifted": window[1] == 1, "padded": groups > 1 or pruned == "entries", "csr": groups == 1}
        assert not suits.get(form, form in ("wide2", "wide4", "wide8") and groups == 1) or "lengths" in str(error)
        return
    assert fast.forms == {"w": form} and not fast.params.leaves
    out = jnp.transpose(fast.apply(fast.params, given_x), back)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
