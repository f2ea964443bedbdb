"""`reconstruct` against least squares in numpy and float64, output by output."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from tests.calibration.networks import NETWORKS, along, draw, inputs
from tests.calibration.test_calibrate import calibrated, close, watched


def everything(path, leaf):
    return True


def solved(weight, keep, reads, x, contracted, bias=None):
    """Return the leaf, and bias, of least squared error on a mask; and the columns of each output.

    Each position along the axes that are not contracted is an output: a problem of its own.
    """
    free = [axis for axis in range(weight.ndim) if axis not in contracted]
    new, moved = np.array(weight, np.float64), None if bias is None else np.array(bias, np.float64)
    for place in np.ndindex(*[weight.shape[axis] for axis in free]):
        at = [slice(None)] * weight.ndim
        for axis, number in zip(free, place, strict=True):
            at[axis] = number
        at = tuple(at)
        w, kept, columns = np.asarray(weight[at], np.float64), keep[at], reads[at]
        rows = x[np.any(x[:, columns.ravel()] != 0, axis=1)] if bias is not None else x
        inner = rows[:, columns]
        target = inner.reshape(len(inner), -1) @ w.ravel()
        chosen = inner[:, kept]
        if bias is not None:
            chosen = np.concatenate([chosen, np.ones((len(chosen), 1))], 1)
        found = np.linalg.lstsq(chosen, target, rcond=None)[0]
        out = np.zeros(w.shape)
        out[kept] = found[: kept.sum()]
        new[at] = out
        if moved is not None:
            moved[place] += found[-1]
    return new, moved


def random_mask(seed, shape):
    return np.random.default_rng(seed).random(shape) < 0.5


# Kernels in all layouts, without biases: the networks of the statistics, whose hooks tell the rows.
@pytest.mark.parametrize(
    "name", ["heads", "fused_by_slices", "convolution_grouped_first", "scan_axis_2", "nested_scans", "ragged"]
)
def test_in_every_layout(name):
    net = NETWORKS[name]()
    hooks = watched(net)
    stats = calibrated(net.apply, net, statistics="gram")
    keep = {p: random_mask(n, np.shape(w)) for n, (p, w) in enumerate(net.params.items())}
    new = jp.reconstruct(net.params, jax.tree.map(jnp.asarray, keep), stats, steps=100)
    for path, leaf in net.leaves.items():
        x = hooks.block_rows(path)
        weight, got = np.asarray(net.params[path], np.float64), np.asarray(new[path], np.float64)
        best, _ = solved(weight, keep[path], leaf.reads, x, leaf.contracted)
        assert np.all(got[~keep[path]] == 0)
        # Where rows are few the weights are not unique, and what they compute is.
        free = [axis for axis in range(weight.ndim) if axis not in leaf.contracted]

        def outputs(w, free=free, leaf=leaf, x=x):
            w, columns = (np.moveaxis(a, free, range(len(free))) for a in (w, leaf.reads))
            shape = w.shape[: len(free)]
            return np.stack([x[:, columns[p].ravel()] @ w[p].ravel() for p in np.ndindex(*shape)])

        scale = np.abs(outputs(weight)).max()
        np.testing.assert_allclose(outputs(got) / scale, outputs(best) / scale, rtol=0, atol=1e-3)


def dense_layer(p, x):
    return x @ p["w"] + p["b"]


def convolution_layer(p, x):
    return (
        lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + p["b"]
    )


def heads_layer(p, x):
    return jnp.einsum("btd,dhk->bthk", x, p["w"]) + p["b"]


def output_projection(p, x):
    return jnp.einsum("bhk,hkd->bd", x, p["w"]) + p["b"]


def residual_before_the_bias(p, x):
    return x + jnp.tanh(x) + x @ p["w"] + p["b"]


def experts_layer(p, x):
    return jnp.einsum("btd,edf->betf", x, p["w"]) + p["b"][:, None]


def experts_apart_layer(p, x):
    return jnp.einsum("etd,edf->etf", x, p["w"]) + p["b"][:, None]


def stacked_layer(p, x):
    return lax.scan(lambda h, w: (h, h @ w["w"] + w["b"]), x, p)[1]


def as_rows(x):
    return x.reshape(-1, x.shape[-1])


def windows(x):
    cut = np.lib.stride_tricks.sliding_window_view(x, (2, 2), (1, 2))  # batch, places, channels, window
    return np.moveaxis(cut, 3, -1).reshape(-1, 4 * x.shape[-1])


def apart(x):
    made = np.zeros((x.shape[0], x.shape[1], x.shape[0], x.shape[2]))
    for e in range(len(x)):
        made[e, :, e] = x[e]
    return made.reshape(-1, x.shape[0] * x.shape[2])


# The layer, the shapes of its kernel, bias and data, the contracted axes, its rows, and what entries read.
LAYERS = [
    (dense_layer, (8, 5), (5,), (40, 8), (0,), as_rows, lambda s: along(s, 0)),
    (convolution_layer, (2, 2, 3, 4), (4,), (4, 5, 5, 3), (0, 1, 2), windows, lambda s: along(s, 0, 1, 2)),
    (heads_layer, (6, 2, 3), (2, 3), (8, 5, 6), (0,), as_rows, lambda s: along(s, 0)),
    (
        output_projection,
        (2, 3, 6),
        (6,),
        (40, 2, 3),
        (0, 1),
        lambda x: x.reshape(-1, 6),
        lambda s: along(s, 0, 1),
    ),
    (residual_before_the_bias, (6, 6), (6,), (40, 6), (0,), as_rows, lambda s: along(s, 0)),
    (experts_layer, (3, 6, 4), (3, 4), (8, 5, 6), (1,), as_rows, lambda s: along(s, 1)),
    (experts_apart_layer, (3, 6, 4), (3, 4), (3, 30, 6), (1,), apart, lambda s: along(s, 0, 1)),
    (stacked_layer, (3, 6, 4), (3, 4), (30, 6), (1,), as_rows, lambda s: along(s, 1)),
]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case[0].__name__)
def test_biases_are_solved_for(case):
    layer, kernel, bias, data, contracted, rows, reads = case
    params, x = draw(3, w=kernel), inputs(*data, number=1)[0]
    params["b"] = jnp.asarray(np.random.default_rng(1).normal(size=bias), jnp.float32)
    stats = jp.calibrate(layer, params, [x], statistics="gram", where=everything)
    keep = random_mask(4, kernel)
    masks = {"w": jnp.asarray(keep), "b": jnp.ones(bias, bool)}
    new = jp.reconstruct(params, masks, stats, steps=100)
    seen = rows(np.asarray(x, np.float64))
    best, moved = solved(
        np.asarray(params["w"]), keep, reads(kernel), seen, contracted, np.asarray(params["b"])
    )
    close(new["w"], best, 1e-4)
    close(new["b"], moved, 1e-4)
    assert np.all(np.asarray(new["w"])[~keep] == 0)
    # A pruned bias stays pruned.
    masks["b"] = jnp.zeros(bias, bool).at[..., 0].set(True)
    again = jp.reconstruct(params, masks, stats, steps=100)
    assert not np.asarray(again["b"])[..., 1:].any() and np.asarray(again["b"])[..., 0].all()


@pytest.mark.parametrize(
    "structure",
    [jp.structures.nm(2, 4), jp.structures.blocks((2, 4)), jp.structures.slices(axis=0)],
    ids=["nm", "blocks", "channels"],
)
def test_masks_of_any_structure(structure):
    params, x = draw(5, w=(8, 8)), inputs(50, 8, number=1)[0]
    stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x], statistics="gram", where=everything)
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=structure)
    keep = np.asarray(masks["w"])
    new = jp.reconstruct(params, masks, stats, steps=50)
    best, _ = solved(np.asarray(params["w"]), keep, along((8, 8), 0), np.asarray(x, np.float64), (0,))
    close(new["w"], best, 1e-4)
    assert np.all(np.asarray(new["w"])[~keep] == 0)


def test_of_bfloat16_leaves_the_error_is_near_that_of_float32():
    params, x = draw(6, w=(8, 6)), inputs(60, 8, number=1)[0]
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)

    def apply(p, x):
        return x @ p["w"].astype(jnp.float32)

    stats = jp.calibrate(apply, low, [x], statistics="gram", where=everything)
    keep = random_mask(7, (8, 6))
    new = jp.reconstruct(low, {"w": jnp.asarray(keep)}, stats, steps=50)
    assert new["w"].dtype == jnp.bfloat16
    best, _ = solved(
        np.asarray(low["w"].astype(jnp.float32)), keep, along((8, 6), 0), np.asarray(x, np.float64), (0,)
    )
    rounded = np.asarray(jnp.asarray(best, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32))
    close(new["w"].astype(jnp.float32), rounded, 2**-8)


def test_singular_gram_matrices():
    """Fewer rows than inputs, an input that is always 0, and two that are equal."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(5, 8))
    x[:, 2], x[:, 5] = 0, x[:, 4]
    params = draw(8, w=(8, 6))
    stats = jp.calibrate(
        lambda p, x: x @ p["w"], params, [jnp.asarray(x, jnp.float32)], statistics="gram", where=everything
    )
    keep = random_mask(9, (8, 6))
    new = np.asarray(jp.reconstruct(params, {"w": jnp.asarray(keep)}, stats, steps=50)["w"], np.float64)
    weight = np.asarray(params["w"], np.float64)
    best, _ = solved(weight, keep, along((8, 6), 0), x.astype(np.float32).astype(np.float64), (0,))
    assert np.isfinite(new).all() and np.all(new[~keep] == 0)
    close(x @ new, x @ best, 1e-3)
    np.testing.assert_array_equal(new[2][keep[2]], np.asarray(params["w"])[2][keep[2]])  # never read, so kept


def test_what_is_not_pruned_stays_to_the_bit():
    net = NETWORKS["scan"]()
    stats = jp.calibrate(net.apply, net.params, net.batches, statistics="gram")
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), net.params)
    masks["up"] = masks["up"].at[1, :2].set(False)  # of the second layer alone
    new = jp.reconstruct(net.params, masks, stats)
    for path in ("down", "out"):
        np.testing.assert_array_equal(new[path], net.params[path])
    for layer in (0, 2):
        np.testing.assert_array_equal(new["up"][layer], net.params["up"][layer])
    assert np.any(np.asarray(new["up"][1, 2:]) != np.asarray(net.params["up"][1, 2:]))


def test_bad_input():
    params, x = draw(1, w=(4, 3)), inputs(6, 4, number=1)[0]

    def apply(p, x):
        return x @ p["w"]

    masks = {"w": jnp.asarray(random_mask(1, (4, 3)))}
    reconstruct: Any = jp.reconstruct
    norms = jp.calibrate(apply, params, [x])
    stats = jp.calibrate(apply, params, [x], statistics="gram")
    with pytest.raises(ValueError, match=r"needs Gram matrices, and these statistics are norms: .*\"gram\""):
        jp.reconstruct(params, masks, norms)
    with pytest.raises(TypeError, match=r"needs what jaxprune\.calibrate returns as stats, got "):
        reconstruct(params, masks, {"w": 1})
    with pytest.raises(TypeError, match="steps"):
        reconstruct(params, masks, stats, steps=1.5)
    changed = {"w": params["w"] + 1}
    with pytest.raises(ValueError, match=r"params changed since calibrate: w.*stats.for_params\(params\)"):
        jp.reconstruct(changed, masks, stats)
    jp.reconstruct(changed, masks, stats.for_params(changed))
    with pytest.raises(ValueError, match="mask"):
        jp.reconstruct(params, {"v": masks["w"]}, stats)
