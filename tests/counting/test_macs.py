"""Multiply-adds against a brute-force count, and against published figures of known networks."""

import itertools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from experiments.networks.small import LeNet

macs = jp.metrics.macs


def count_dot(left, right, sums, batches):
    """Multiplies entry by entry, and counts: (all, those with no zero factor)."""
    shapes = left.shape, right.shape
    everything = alive = 0
    for a, b in itertools.product(np.ndindex(*shapes[0]), np.ndindex(*shapes[1])):
        met = [(x, y) for pairs in (sums, batches) for x, y in zip(*pairs, strict=True)]
        if all(a[x] == b[y] for x, y in met):
            everything += 1
            alive += bool(left[a] and right[b])
    return everything, alive


@st.composite
def dots(draw):
    """The shapes of two operands, and the axes that are summed and that are batches."""
    size = st.integers(1, 3)
    summed, batch = draw(st.lists(size, max_size=2)), draw(st.lists(size, max_size=2))
    orders = []
    shapes = []
    for _ in range(2):
        free = draw(st.lists(size, max_size=2))
        sizes = [*summed, *batch, *free]
        order = draw(st.permutations(range(len(sizes))))
        shapes.append(tuple(sizes[n] for n in order))
        orders.append([order.index(n) for n in range(len(sizes))])
    sums = tuple(tuple(order[: len(summed)]) for order in orders)
    batches = tuple(tuple(order[len(summed) : len(summed) + len(batch)]) for order in orders)
    return shapes, sums, batches, draw(st.integers(0, 2**31))


@given(dots())
@settings(max_examples=60, deadline=None)
def test_dots_are_counted_as_brute_force_counts_them(case):
    shapes, sums, batches, seed = case
    rng = np.random.default_rng(seed)
    masks = [rng.random(shape) < 0.6 for shape in shapes]
    everything, alive = count_dot(*masks, sums, batches)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def function(params, *rest):
        return jax.lax.dot_general(*params, *rest, (sums, batches))

    assert macs(function, params).total == everything
    assert macs(function, params, masks=masks).total == alive
    assert (
        macs(lambda a, b: function([a, b]), *params, masks=masks[0]).total
        == count_dot(masks[0], np.ones(shapes[1]), sums, batches)[1]
    )


def count_convolution(x, mask, strides, padding, spread, dilation, groups, batch_groups):
    """Slides the window over the input, NC... and OI...: counts (all, those inside the input) of all entries
    of the kernel and of those in the mask."""
    del groups  # the kernel has the input channels of one group
    extent = [(n - 1) * d + 1 for n, d in zip(x[2:], spread, strict=True)]
    window = [(k - 1) * d + 1 for k, d in zip(mask.shape[2:], dilation, strict=True)]
    sizes = [(e + sum(p) - k) // s + 1 for e, p, k, s in zip(extent, padding, window, strides, strict=True)]
    everything, kept = [0, 0], [0, 0]
    for _, o, *at in np.ndindex(x[0] // batch_groups, mask.shape[0], *sizes):
        for i, *k in np.ndindex(*mask.shape[1:]):
            reads = [
                a * s + q * d - p[0] for a, s, q, d, p in zip(at, strides, k, dilation, padding, strict=True)
            ]
            inside = all(0 <= r < e and r % d == 0 for r, e, d in zip(reads, extent, spread, strict=True))
            for counts, counted in ((everything, True), (kept, bool(mask[(o, i, *k)]))):
                counts[0] += counted
                counts[1] += counted and inside
    return tuple(everything), tuple(kept)


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    batch_groups = draw(st.sampled_from([1, 2])) if groups == 1 else 1
    images = batch_groups * draw(st.integers(1, 2))
    per_group = draw(st.integers(1, 2))
    features = groups * batch_groups * draw(st.integers(1, 2))
    some = lambda low, high: draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))  # noqa: E731
    kernel, dilation, spread, strides = some(1, 3), some(1, 2), some(1, 2), some(1, 3)
    padding = list(zip(some(0, 2), some(0, 2), strict=True))
    window = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    inputs = [max(n, w - sum(p), 1) for n, w, p in zip(some(1, 5), window, padding, strict=True)]
    return {
        "x": (images, groups * per_group, *inputs),
        "w": (features, per_group, *kernel),
        "strides": strides,
        "padding": padding,
        "spread": spread,
        "dilation": dilation,
        "groups": groups,
        "batch_groups": batch_groups,
        "layout": draw(st.permutations(range(rank + 2))),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_convolutions_are_counted_as_brute_force_counts_them(case):
    layout, seed = case.pop("layout"), case.pop("seed")
    x, w = case.pop("x"), case.pop("w")
    mask = np.random.default_rng(seed).random(w) < 0.6
    everything, kept = count_convolution(x, mask, **case)
    place = [layout.index(n) for n in range(len(layout))]  # where the kernel's axis n went

    def function(w, x):
        return jax.lax.conv_general_dilated(
            x,
            w,
            case["strides"],
            case["padding"],
            case["spread"],
            case["dilation"],
            jax.lax.ConvDimensionNumbers(
                tuple(range(len(x.shape))), tuple(place), tuple(range(len(x.shape)))
            ),
            case["groups"],
            case["batch_groups"],
        )

    kernel, image = (
        jax.ShapeDtypeStruct([w[n] for n in layout], jnp.float32),
        jax.ShapeDtypeStruct(x, jnp.float32),
    )
    dense = macs(function, kernel, image)
    assert (dense.total, dense.unpadded) == everything
    masked = macs(function, kernel, image, masks=mask.transpose(layout))
    assert (masked.total, masked.unpadded) == kept


def product(w, x):
    return x @ w["kernel"]


W, X = {"kernel": np.ones((3, 3), np.float32)}, np.ones((2, 3), np.float32)
HALF = {"kernel": np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], bool)}  # 4 of 9


def custom_jvp(w, x):
    function = jax.custom_jvp(lambda x, w: x @ w)
    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0] @ primals[1]))
    return function(x, w["kernel"])


def custom_vjp(w, x):
    function = jax.custom_vjp(lambda x, w: x @ w)
    function.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    return function(x, w["kernel"])


def scanned(w, x):
    return jax.lax.scan(lambda x, _: (x @ w["kernel"], None), x, length=7)[0]


def carried(w, x):  # the params go round unchanged
    return jax.lax.scan(lambda c, _: ((c[0], c[1] @ c[0]), None), (w["kernel"], x), length=7)[0]


def repeated(w, x):
    return jax.lax.fori_loop(0, 7, lambda _, x: x @ w["kernel"], x)


def transformed(w, x):  # the masked entries are still zero after this
    return x @ (w["kernel"].astype(jnp.bfloat16).T * 2).T.reshape(3, 3)


@pytest.mark.parametrize(
    ("function", "times"),
    [
        pytest.param(product, 1, id="plain"),
        pytest.param(jax.jit(product), 1, id="jit"),
        pytest.param(jax.jit(jax.jit(product)), 1, id="nested-jit"),
        pytest.param(jax.remat(product), 1, id="remat"),
        pytest.param(custom_jvp, 1, id="custom_jvp"),
        pytest.param(custom_vjp, 1, id="custom_vjp"),
        pytest.param(scanned, 7, id="scan"),
        pytest.param(carried, 7, id="carried"),
        pytest.param(repeated, 7, id="fori_loop"),
        pytest.param(transformed, 1, id="transformed"),
        pytest.param(lambda w, x: jax.vmap(lambda x: x @ w["kernel"])(x), 1, id="vmap"),
        pytest.param(lambda w, x: jnp.einsum("bi,io->ob", x, w["kernel"]), 1, id="einsum"),
        pytest.param(lambda w, x: jax.grad(lambda x: product(w, x).sum())(x), 2, id="grad"),
    ],
)
def test_calls_and_loops_count_what_they_run(function, times):
    dense, masked = macs(function, W, X), macs(function, W, X, masks=HALF)
    assert dense.total == dense.unpadded == times * 18
    assert masked.total == times * 8
    assert dense.by_path() == {"kernel": times * 18}
    assert dense.notes == masked.notes == ()
    assert dense.operations[0].source.startswith("test_macs.py:")


def test_each_step_of_a_scan_counts_its_own_slices():
    params = {"layers": np.ones((4, 3, 3), np.float32)}
    masks = {"layers": np.arange(36).reshape(4, 3, 3) % 5 < 2}

    def function(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]

    assert macs(function, params, X).total == 4 * 18
    assert macs(function, params, X, masks=masks).total == 2 * np.count_nonzero(masks["layers"])
    assert [o.path for o in macs(function, params, X).operations] == ["layers"]


def test_bounds_are_said():
    def branches(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w["kernel"], lambda x: x, x)

    found = macs(branches, W, X, masks=HALF)
    assert found.total == 8
    assert "dearest" in found.notes[0]

    def rounds(w, x):
        return jax.lax.while_loop(lambda x: (x @ w["kernel"]).sum() < 9, lambda x: x @ w["kernel"] + 1, x)

    found = macs(rounds, W, X)
    assert found.total == 36
    assert "one round" in found.notes[0]
    assert macs(lambda w, x: jnp.linalg.cholesky(w["kernel"]), W, X).notes[0].startswith("cholesky")

    def ragged(w, x):
        return jax.lax.ragged_dot(x, w["kernel"], jnp.array([1, 1]))

    found = macs(ragged, {"kernel": np.ones((2, 3, 5), np.float32)}, X)
    assert found.total == 2 * 3 * 5
    assert "group sizes" in found.notes[0]


def test_shards_count_together():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(product, mesh=mesh, in_specs=(jax.P(), jax.P("rows")), out_specs=jax.P("rows"))
    assert macs(sharded, W, X).total == 18
    found = macs(sharded, W, X, masks=HALF)
    assert found.total == 18
    assert "kernel" in found.notes[0]


def test_products_are_put_down_to_the_params_they_are_of():
    params = {"up": np.ones((3, 4)), "scale": np.ones(4), "down": np.ones((4, 2)), "table": np.ones((5, 3))}

    def function(params, x):
        h = x @ (params["up"] * params["scale"])
        scores = jnp.einsum("bi,ki->bk", h, h)  # of two values that depend on data
        return scores @ h @ params["down"], params["table"] @ params["up"]

    assert macs(function, params, X).by_path() == {"up": 24, None: 16 + 16, "down": 16, "table": 60}


def test_a_constants_zeros_are_not_pruned():
    triangle = np.tril(np.ones((3, 3), np.float32))
    function = lambda w, x: x @ (w["kernel"] * triangle)  # noqa: E731
    assert macs(function, W, X, masks=jp.ones_masks(W)).total == 18
    alive = HALF["kernel"] | (triangle == 0)
    assert macs(function, W, X, masks=HALF).total == 2 * np.count_nonzero(alive)


def test_masks_belong_to_params_by_path_not_by_order():
    class Layers(NamedTuple):
        up: Any
        down: Any

    params, up = Layers(np.ones((3, 4)), np.ones((4, 2))), np.arange(12).reshape(3, 4) % 3 > 0
    masks = {"up": up, "down": np.ones((4, 2), bool)}  # a dict's leaves come in another order
    found = macs(lambda params, x: x @ params.up @ params.down, params, X, masks=masks)
    assert found.by_path() == {"up": 2 * 8, "down": 16}


def test_what_macs_asks_for():
    with pytest.raises(ValueError, match="needs the function's arguments"):
        macs(product)
    with pytest.raises(ValueError, match="masks"):
        macs(product, W, X, masks={"other": HALF["kernel"]})


# Networks with known counts. torchvision's documentation of its weights lists multiply-adds as "GFLOPS" and
# params as "num_params"; the papers are named below.


def conv(x, features, side, stride=1, groups=1, bias=False):
    return nn.Conv(
        features, (side, side), stride, padding=side // 2, feature_group_count=groups, use_bias=bias
    )(x)


def norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


class VGG16(nn.Module):
    @nn.compact
    def __call__(self, x):
        for item in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
            x = nn.max_pool(x, (2, 2), (2, 2)) if item == "M" else nn.relu(conv(x, item, 3, bias=True))
        x = x.reshape(len(x), -1)
        for width in (4096, 4096):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(1000)(x)


class ResNet(nn.Module):
    """He et al. 2015, for ImageNet: basic or bottleneck blocks (stride in the 3 x 3, as torchvision)."""

    blocks: tuple
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm(conv(x, 64, 7, 2)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            width = 64 * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                if self.bottleneck:
                    y = nn.relu(norm(conv(x, width, 1)))
                    y = norm(conv(nn.relu(norm(conv(y, width, 3, stride))), 4 * width, 1))
                else:
                    y = norm(conv(nn.relu(norm(conv(x, width, 3, stride))), width, 3))
                x = nn.relu(y + (x if x.shape == y.shape else norm(conv(x, y.shape[-1], 1, stride))))
        return nn.Dense(1000)(x.mean((1, 2)))


class CifarResNet(nn.Module):
    """He et al. 2015, section 4.2: shortcuts without params."""

    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm(conv(x, 16, 3)))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage and not block else 1
                y = norm(conv(nn.relu(norm(conv(x, 16 * 2**stage, 3, stride))), 16 * 2**stage, 3))
                x = x[:, ::stride, ::stride]
                x = nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1]))))
        return nn.Dense(10)(x.mean((1, 2)))


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, table 2."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(norm(conv(x, 32, 3, 2)))
        table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
        for expand, width, blocks, first in (*table, (6, 320, 1, 1)):
            for block in range(blocks):
                inner, stride = expand * x.shape[-1], 1 if block else first
                y = nn.relu6(norm(conv(x, inner, 1))) if expand > 1 else x
                y = norm(conv(nn.relu6(norm(conv(y, inner, 3, stride, groups=inner))), width, 1))
                x = x + y if x.shape == y.shape else y
        x = nn.relu6(norm(conv(x, 1280, 1)))
        return nn.Dense(1000)(x.mean((1, 2)))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021, ViT-B/16."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(768, (16, 16), (16, 16))(x).reshape(len(x), -1, 768)
        token = self.param("token", nn.initializers.zeros, (1, 1, 768))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 768)), x], axis=1)
        x = x + self.param("position", nn.initializers.zeros, (1, 197, 768))
        for _ in range(12):
            x = x + nn.MultiHeadDotProductAttention(12)(nn.LayerNorm()(x))
            x = x + nn.Dense(768)(nn.gelu(nn.Dense(3072)(nn.LayerNorm()(x))))
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


# name: network, side of the image, params, multiply-adds as published and half a unit of its last digit
KNOWN = {
    "vgg16": (VGG16(), 224, 138_357_544, 15.47e9, 0.005e9),  # torchvision
    "resnet18": (ResNet((2, 2, 2, 2), False), 224, 11_689_512, 1.814e9, 0.0005e9),  # torchvision
    "resnet50": (ResNet((3, 4, 6, 3), True), 224, 25_557_032, 4.089e9, 0.0005e9),  # torchvision
    "mobilenet_v2": (MobileNetV2(), 224, 3_504_872, 0.301e9, 0.0005e9),  # torchvision; 300 M in the paper
    "vit_b_16": (ViT(), 224, 86_567_656, 17.564e9, 0.0005e9),  # torchvision
    # He et al. 2015 give .27 M and .85 M params; the counts are of Li et al. 2017 (1.25e8, .85 M), and
    # to more digits of Y. Idelbayev's pytorch_resnet_cifar10 (40.55 M and 125.49 M multiply-adds by thop).
    "resnet20": (CifarResNet(20), 32, 269_722, 40.55e6, 0.005e6),
    "resnet56": (CifarResNet(56), 32, 853_018, 125.49e6, 0.005e6),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_networks_have_the_counts_published(name):
    network, side, size, published, half = KNOWN[name]
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == size
    found = macs(network.apply, variables, image)
    assert abs(found.total - published) <= half
    assert found.unpadded <= found.total
    assert found.notes == ()


def test_the_articles_lenet():
    network, image = LeNet(im2col=False), jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    found = macs(lambda params, x: network.apply({"params": params}, x), params, image)
    assert found.total == found.unpadded == 480_500
    layers = {"conv1/kernel": 144_000, "conv2/kernel": 320_000, "fc1/kernel": 16_000, "fc2/kernel": 500}
    assert found.by_path() == layers
