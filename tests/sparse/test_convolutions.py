"""Convolutions in other forms: numpy's sums over a window, whatever the geometry."""

import itertools

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
from jaxprune.sparse.forms import FORMS
from jaxprune.sparse.patches import CONV_FORMS

EVERY = (*CONV_FORMS, *FORMS)
WIDE = ("wide2", "wide4", "wide8")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolve(x, kernel, strides, padding, spread, dilation, groups):
    """Return the convolution of (images, channels, *places) with (outputs, inputs, *window), in float64."""
    sizes = [(n - 1) * gap + 1 for n, gap in zip(x.shape[2:], spread, strict=True)]
    spreaded = np.zeros((*x.shape[:2], *sizes))
    spreaded[(..., *(slice(None, None, gap) for gap in spread))] = x
    for axis, (low, high) in enumerate(padding, start=2):  # negative padding cuts
        added = [(0, 0)] * spreaded.ndim
        added[axis] = (max(low, 0), max(high, 0))
        spreaded = np.pad(spreaded, added)
        kept = np.arange(max(-low, 0), spreaded.shape[axis] - max(-high, 0))
        spreaded = np.take(spreaded, kept, axis)
    spans = [(n - 1) * gap + 1 for n, gap in zip(kernel.shape[2:], dilation, strict=True)]
    sizes = [(n - span) // s + 1 for n, span, s in zip(spreaded.shape[2:], spans, strides, strict=True)]
    out = np.zeros((len(x), len(kernel), *sizes))
    inputs, own = kernel.shape[1], len(kernel) // groups
    for o, place in itertools.product(range(len(kernel)), itertools.product(*map(range, sizes))):
        window = [
            slice(p * s, p * s + n, d) for p, s, n, d in zip(place, strides, spans, dilation, strict=True)
        ]
        channels = slice(o // own * inputs, o // own * inputs + inputs)
        read = spreaded[(slice(None), channels, *window)]
        out[(slice(None), o, *place)] = (read * kernel[o]).reshape(len(x), -1).sum(1)
    return out


@st.composite
def geometries(draw):
    """A convolution: x's shape, the kernel's, strides, padding, spread, dilation, groups."""
    ndim = draw(st.integers(1, 2))
    groups, inputs, own = draw(
        st.sampled_from([(1, 3, 2), (1, 1, 4), (1, 4, 3), (4, 1, 1), (3, 1, 2), (2, 2, 3)])
    )

    def each(*choices):
        return tuple(draw(st.sampled_from(choices)) for _ in range(ndim))

    window, strides, spread, dilation = each(1, 2, 3), each(1, 2, 3), each(1, 1, 2), each(1, 1, 2)
    padding = tuple((draw(st.integers(-1, 2)), draw(st.integers(-1, 3))) for _ in range(ndim))
    x = (draw(st.integers(1, 3)), groups * inputs, *each(5, 6, 9))
    return x, (groups * own, inputs, *window), strides, padding, spread, dilation, groups


def suits(form, matrix, window, groups):
    """Return whether a form suits a kernel; `matrix` holds its values."""
    if form == "shifted":
        return window[1] == 1
    if form == "padded":
        return not isinstance(FORMS["padded"].pack(matrix), str)
    if groups > 1 or form in ("blocks", "windows"):  # no kernel here has 16 outputs; windows are for products
        return False
    kernel = matrix.reshape(len(matrix), -1, window[1])
    return form != "compact" or not (kernel.any((1, 2)).all() and kernel.any((0, 1)).all())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    geometries(),
    st.sampled_from(EVERY),
    st.permutations(range(4)),
    st.sampled_from(["entries", "channels", "none"]),
)
def test_each_form_is_the_convolution(geometry, form, order, pruned):
    shape, window, strides, padding, spread, dilation, groups = geometry
    random = np.random.default_rng(0).random(window)
    channels = np.arange(window[0]).reshape(-1, *(1 for _ in window[1:])) % 2 == 0
    mask = {"entries": random < 0.4, "channels": channels & np.ones(window, bool), "none": random < 2}[pruned]
    x, kernel = normal(1, *shape), normal(2, *window)
    order = [axis for axis in order if axis < len(shape)]  # where the axes of images, kernel and output lie
    back = tuple(order.index(axis) for axis in range(len(order)))

    def apply_fn(params, x):
        numbers = lax.ConvDimensionNumbers(back, back, back)
        return lax.conv_general_dilated(
            x, params["w"], strides, padding, spread, dilation, numbers, feature_group_count=groups
        )

    params, masks = {"w": np.transpose(kernel, order)}, {"w": jnp.transpose(mask, order)}
    data = np.transpose(x, order)
    assume(all(jax.eval_shape(apply_fn, params, data).shape))
    matrix = np.moveaxis(np.where(mask, kernel, 0), 1, -1).reshape(window[0], -1)
    if not suits(form, matrix, window, groups):
        with pytest.raises(ValueError, match="which it does not suit"):
            jp.sparsify(apply_fn, params, masks, data, choose={"w": form})
        return
    fast = jp.sparsify(apply_fn, params, masks, data, choose={"w": form})
    assert fast.forms == {"w": form} and not fast.params.leaves
    want = convolve(x, np.where(mask, kernel, 0), strides, padding, spread, dilation, groups)
    out = np.transpose(fast.apply(fast.params, data), back)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


class Convolutional(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(4, (3, 3), name="first")(x))
        x = linen.relu(linen.Conv(4, (3, 3), 2, feature_group_count=4, name="depthwise")(x))
        x = linen.relu(linen.Conv(6, (1, 1), name="point")(x))
        return linen.ConvTranspose(2, (2, 2), (2, 2), name="up")(x)


CHOSEN = {"first": "wide4", "depthwise": "shifted", "point": "product", "up": "wide2"}


@pytest.fixture(scope="module")
def network():
    model, x = Convolutional(), normal(0, 2, 9, 7, 3)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    choose = {f"{name}/kernel": form for name, form in CHOSEN.items()}
    return lambda params, x: model.apply({"params": params}, x), params, x, choose


def test_unpruned_networks_other_images_jit_and_vmap(network):
    apply_fn, params, x, choose = network
    fast = jp.sparsify(apply_fn, params, None, x, choose=choose)
    ones = jp.sparsify(apply_fn, params, jp.ones_masks(params), x, choose=choose)
    assert fast.forms == ones.forms == choose and all(row.sparsity == 0 for row in fast.report.rows)
    assert set(fast.params.leaves) == {f"{name}/bias" for name in CHOSEN}
    for images in (x, normal(1, 3, 12, 8, 3), normal(1, 0, 9, 7, 3)):  # other paddings, no images
        want = apply_fn(params, images)
        np.testing.assert_allclose(fast.apply(fast.params, images), want, rtol=1e-5, atol=1e-6)
    stacked = normal(2, 3, 2, 9, 7, 3)
    want = np.stack([apply_fn(params, images) for images in stacked])
    mapped = jax.jit(jax.vmap(fast.apply, in_axes=(None, 0)))
    np.testing.assert_allclose(mapped(fast.params, stacked), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="has no derivative"):
        jax.grad(lambda x: fast.apply(fast.params, x).sum())(x)


@pytest.mark.parametrize("form", ["wide2", "padded", "product"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float64", 1e-12)])
def test_dtypes(form, dtype, tolerance):
    kernel, x = normal(0, 4, 3, 3), normal(1, 2, 3, 8)
    with jax.enable_x64(dtype == "float64"):
        params = {"w": jnp.asarray(kernel, dtype)}
        data = jnp.asarray(x, dtype)

        def apply_fn(params, x):
            return lax.conv_general_dilated(x, params["w"], (1,), "SAME")

        fast = jp.sparsify(apply_fn, params, None, data, choose={"w": form})
        out = fast.apply(fast.params, data)
        assert out.dtype == dtype
        exact = [np.asarray(a, np.float64) for a in (data, params["w"])]
        want = convolve(exact[0], exact[1], (1,), [(1, 1)], (1,), (1,), 1)
        np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=tolerance, atol=10 * tolerance)


def test_what_is_not_finite_reaches_few_places_more():
    kernel, x = normal(0, 2, 1, 3), normal(1, 1, 1, 20)
    x[0, 0, 9] = np.inf

    def apply_fn(params, x):
        return lax.conv_general_dilated(x, params["w"], (1,), "SAME")

    want = np.asarray(apply_fn({"w": kernel}, x))
    assert np.flatnonzero(~np.isfinite(want[0, 0])).tolist() == [8, 9, 10]
    for form, reached in {"wide4": 7, "shifted": 3, "padded": 3}.items():  # 4 places at once: up to 3 more
        fast = jp.sparsify(apply_fn, {"w": kernel}, None, x, choose={"w": form})
        out = np.asarray(fast.apply(fast.params, x))
        finite = np.isfinite(out)
        assert (~finite[0, 0]).sum() <= reached
        np.testing.assert_allclose(out[finite], want[finite], rtol=1e-5, atol=1e-6)


def test_measuring_and_the_rule(network):
    apply_fn, params, x, _ = network
    want = apply_fn(params, x)
    ruled = jp.sparsify(apply_fn, params, None, x, choose="rule")
    if jax.default_backend() == "cpu":
        assert ruled.forms["first/kernel"] == "wide4" and ruled.forms["depthwise/kernel"] == "shifted"
    measured = jp.sparsify(apply_fn, params, None, x, rounds=1)
    rows = {row.path: row for row in measured.report.rows}
    assert set(rows) == {f"{name}/kernel" for name in CHOSEN}
    assert "wide2" in rows["first/kernel"].why and "shifted" in rows["depthwise/kernel"].why
    assert measured.report.gain == 1.0 or set(measured.forms.values()) != {"dense"}
    for fast in (ruled, measured):
        np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-5, atol=1e-6)


def test_convolutions_that_stay_dense_say_why():
    params = {"w": normal(0, 4, 2, 3, 3), "b": normal(1, 4, 2, 3, 3)}

    def apply_fn(params, x):
        images = lax.conv_general_dilated(params["b"], x, (1, 1), "SAME")
        return images.sum() + lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", batch_group_count=2)

    x = normal(2, 2, 2, 5, 5)
    with pytest.warns(UserWarning, match="sparsify leaves the network dense"):
        fast = jp.sparsify(apply_fn, params, None, x, choose={"w": "dense"})
    whys = {row.path: (row.form, row.why) for row in fast.report.rows}
    assert {form for form, _ in whys.values()} == {"dense"}
    assert "images are in groups" in whys["w"][1] and "test_convolutions.py" in whys["w"][1]
    assert "the input of a convolution" in whys["b"][1]
    with pytest.raises(ValueError, match="'wide2' for 'w', which it does not suit: its product is no conv"):
        jp.sparsify(
            lambda p, x: x @ p["w"],
            {"w": jnp.ones((2, 2))},
            {"w": jnp.eye(2) > 0},
            x[0, 0, :, :2],
            choose={"w": "wide2"},
        )


def test_the_benchmark():
    lines = convolutions.run(convolutions.SMALL)
    assert [row[0] for row in convolutions.rows(lines)][1:] == ["2x8x8 3x3 4-4", "2x8x8 3x3 4-4 depthwise"]
    assert all(line[form] > 0 for line in lines[:1] for form in (*WIDE, "product"))
    assert lines[1]["shifted"] > 0 and "wide2" not in lines[1]
