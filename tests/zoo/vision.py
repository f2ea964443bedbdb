"""Models of images, (batch, height, width, channels) unless the name says nchw."""

import importlib.util
import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from .common import (
    Case,
    attend,
    case,
    draw,
    from_equinox,
    from_nnx,
    layer_norm,
    linen_case,
    linen_variables,
    nnx_case,
    normal,
)

IMAGE = (2, 8, 8, 3)


def image(rng):
    return normal(rng, *IMAGE)


def flat(x):
    return x.reshape(x.shape[0], -1)


def conv(features, size=3, stride=1, groups=1, bias=True, **options):
    """A linen convolution in few words."""
    return nn.Conv(features, (size, size), stride, feature_group_count=groups, use_bias=bias, **options)


def max_pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


# --- plain convolutional nets


@linen_case("lenet_linen", (2, 8, 8, 1))
class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(conv(6, padding="VALID")(x)), (2, 2), (2, 2))
        x = max_pool(nn.relu(conv(8, 2, padding="VALID")(x)))
        return nn.Dense(5)(nn.relu(nn.Dense(12)(flat(x))))


@nnx_case("lenet_nnx", (2, 8, 8, 1))
class LeNetNNX(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 6, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(6, 8, (3, 3), padding="VALID", rngs=rngs)
        self.hidden = nnx.Linear(8, 12, rngs=rngs)
        self.out = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.out(nnx.relu(self.hidden(flat(x))))


@linen_case("vgg_bn", IMAGE)
class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (6, 6, "pool", 8, 10, "pool"):
            if features == "pool":
                x = max_pool(x)
            else:
                x = nn.relu(nn.BatchNorm(use_running_average=True)(conv(features)(x)))
        return nn.Dense(5)(nn.relu(nn.Dense(12)(flat(x))))


@linen_case("conv_bf16", IMAGE)
class ConvBF16(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(6, dtype=jnp.bfloat16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)(x))
        x = nn.relu(conv(8, stride=2, dtype=jnp.bfloat16)(x))
        return nn.Dense(5, dtype=jnp.bfloat16)(x.mean((1, 2)))


@case
def conv_nchw(rng):
    params = draw(
        rng,
        {
            "conv1": {"w": (6, 3, 3, 3), "b": (6,)},
            "conv2": {"w": (8, 6, 3, 3), "b": (8,)},
            "out": {"w": (8 * 4 * 4, 5), "b": (5,)},
        },
    )

    def layer(p, x, stride):
        x = jax.lax.conv_general_dilated(
            x, p["w"], (stride, stride), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return jax.nn.relu(x + p["b"][:, None, None])

    def apply(params, x):
        x = x.astype(params["conv1"]["w"].dtype)
        x = layer(params["conv2"], layer(params["conv1"], x, 1), 2)
        return flat(x) @ params["out"]["w"] + params["out"]["b"]

    return Case(apply, params, (normal(rng, 2, 3, 8, 8),))


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 6, 3, stride=2, key=keys[0])
        self.norm = eqx.nn.GroupNorm(3, 6)
        self.mlp = eqx.nn.MLP(6 * 3 * 3, 5, 12, 2, key=keys[1])

    def __call__(self, x):
        x = x.astype(self.conv.weight.dtype)
        return self.mlp(jax.nn.gelu(self.norm(self.conv(x))).reshape(-1))


@case
def equinox_conv(rng):
    return from_equinox(rng, EquinoxNet, normal(rng, 2, 3, 8, 8))


def haiku_conv(rng):
    import haiku as hk

    def net(x):
        x = jax.nn.relu(hk.Conv2D(6, 3)(x))
        x = hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID")(x)
        x = jax.nn.relu(hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Conv2D(8, 3)(x)))
        return hk.nets.MLP([12, 5])(hk.Flatten()(x))

    model = hk.without_apply_rng(hk.transform(net))
    x = image(rng)
    params = draw(rng, jax.eval_shape(model.init, jax.random.key(0), x))
    return Case(lambda p, x: model.apply(p, x.astype(jax.tree.leaves(p)[0].dtype)), params, (x,))


if importlib.util.find_spec("haiku"):
    case(haiku_conv)


# --- residual nets


class BasicBlock(nn.Module):
    features: int
    stride: int
    shortcut: str
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(conv(self.features, stride=self.stride, bias=False)(x)))
        y = self.norm()(conv(self.features, bias=False)(y))
        if x.shape != y.shape and self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            more = self.features - x.shape[-1]
            x = jnp.pad(x, [(0, 0)] * 3 + [(more // 2, more - more // 2)])
        elif x.shape != y.shape:
            x = conv(self.features, 1, self.stride, bias=False)(x)
            if self.shortcut == "projection":
                x = self.norm()(x)
        return nn.relu(x + y)


@linen_case("resnet18", IMAGE)
class ResNet(nn.Module):
    stages: tuple = (6, 10)
    blocks: int = 2
    shortcut: str = "projection"
    train: bool = False

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.relu(norm()(conv(self.stages[0], bias=False)(x)))
        if self.shortcut == "projection":
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, features in enumerate(self.stages):
            for j in range(self.blocks):
                stride = 2 if i and not j else 1
                x = BasicBlock(features, stride, self.shortcut, norm)(x)
        return nn.Dense(5)(x.mean((1, 2)))


@case
def resnet18_train(rng):
    model, x = ResNet(train=True), image(rng)
    apply = partial(model.apply, mutable=["batch_stats"])
    return Case(apply, linen_variables(rng, model, x), (x,), state=lambda out: out[1])


linen_case("resnet20_conv_shortcut", IMAGE, stages=(4, 6, 8), blocks=1, shortcut="conv")(ResNet)
linen_case("resnet_pad_shortcut", IMAGE, stages=(4, 6, 9), blocks=1, shortcut="pad")(ResNet)


class Inverted(nn.Module):
    features: int
    stride: int
    expand: int

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        width = x.shape[-1] * self.expand
        y = x
        if self.expand > 1:
            y = nn.relu6(norm()(conv(width, 1, bias=False)(y)))
        y = nn.relu6(norm()(conv(width, 3, self.stride, groups=width, bias=False)(y)))
        y = norm()(conv(self.features, 1, bias=False)(y))
        return x + y if x.shape == y.shape else y


@linen_case("mobilenet_v2", IMAGE)
class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.BatchNorm(use_running_average=True)(conv(6, stride=2, bias=False)(x)))
        for features, stride, expand in [(4, 1, 1), (6, 2, 2), (6, 1, 2)]:
            x = Inverted(features, stride, expand)(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True)(conv(12, 1, bias=False)(x)))
        return nn.Dense(5)(x.mean((1, 2)))


@nnx_case("separable_nnx", IMAGE)
class Separable(nnx.Module):
    def __init__(self, rngs, train=False):
        norm = partial(nnx.BatchNorm, use_running_average=not train, rngs=rngs)
        self.stem, self.norm0 = nnx.Conv(3, 6, (3, 3), rngs=rngs), norm(6)
        self.depth, self.norm1 = nnx.Conv(6, 12, (3, 3), 2, feature_group_count=6, rngs=rngs), norm(12)
        self.point, self.norm2 = nnx.Conv(12, 8, (1, 1), rngs=rngs), norm(8)
        self.out = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.stem(x)))
        x = nnx.relu(self.norm1(self.depth(x)))  # two outputs of each input channel
        x = nnx.relu(self.norm2(self.point(x)))
        return self.out(x.mean((1, 2)))


@case
def separable_nnx_train(rng):
    x = image(rng)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Separable(nnx.Rngs(0), train=True)))

    def apply(params, x):
        model = nnx.merge(graph, params)
        return model(x), nnx.state(model, nnx.BatchStat)

    return Case(apply, draw(rng, shapes), (x,), state=lambda out: out[1])


@linen_case("densenet", IMAGE)
class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        x = conv(6, bias=False)(x)
        for i in range(2):
            for _ in range(2):
                y = conv(8, 1, bias=False)(nn.relu(norm()(x)))
                y = conv(4, bias=False)(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], -1)
            if not i:
                x = conv(6, 1, bias=False)(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(nn.relu(norm()(x)).mean((1, 2)))


@linen_case("resnext_se", IMAGE)
class ResNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(conv(8, bias=False)(x)))
        for _ in range(2):
            y = nn.relu(norm()(conv(8, 1, bias=False)(x)))
            y = nn.relu(norm()(conv(8, groups=4, bias=False)(y)))
            y = norm()(conv(8, 1, bias=False)(y))
            gate = nn.relu(nn.Dense(6)(y.mean((1, 2))))
            y = y * nn.sigmoid(nn.Dense(8)(gate))[:, None, None]
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


@linen_case("shufflenet", IMAGE)
class ShuffleNet(nn.Module):
    groups: int = 2

    def shuffle(self, x):
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, self.groups, c // self.groups)
        return x.transpose(0, 1, 2, 4, 3).reshape(b, h, w, c)

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(conv(8, bias=False)(x)))
        for stride in (1, 2):
            y = nn.relu(norm()(conv(8, 1, groups=self.groups, bias=False)(x)))
            y = norm()(conv(8, 3, stride, groups=8, bias=False)(self.shuffle(y)))
            y = norm()(conv(8, 1, groups=self.groups, bias=False)(y))
            if stride == 1:
                x = nn.relu(x + y)
            else:
                x = nn.relu(jnp.concatenate([nn.avg_pool(x, (3, 3), (2, 2), "SAME"), y], -1))
        return nn.Dense(5)(x.mean((1, 2)))


@linen_case("shufflenet_v2", IMAGE)
class ShuffleNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(8)(x))
        for _ in range(2):
            left, right = jnp.split(x, 2, -1)
            right = nn.relu(conv(4, 1)(conv(4, groups=4)(nn.relu(conv(4, 1)(right)))))
            x = jnp.stack([left, right], -1).reshape(x.shape)  # concatenate and shuffle
        return nn.Dense(5)(x.mean((1, 2)))


@linen_case("inception", IMAGE)
class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(6)(x))
        for _ in range(2):
            one = nn.relu(conv(4, 1)(x))
            three = nn.relu(conv(6)(nn.relu(conv(4, 1)(x))))
            five = nn.relu(conv(4, 5)(nn.relu(conv(4, 1)(x))))
            pool = nn.relu(conv(4, 1)(nn.max_pool(x, (3, 3), padding="SAME")))
            x = jnp.concatenate([one, three, five, pool], -1)
        return nn.Dense(5)(x.mean((1, 2)))


@linen_case("convnext", IMAGE)
class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(conv(6, 2, 2)(x))
        for i in range(2):
            y = nn.LayerNorm()(conv(6, (7, 3)[i], groups=6)(x))
            y = nn.Dense(6)(nn.gelu(nn.Dense(12)(y)))
            x = x + self.param(f"gamma{i}", nn.initializers.ones, (6,)) * y
        return nn.Dense(5)(nn.LayerNorm()(x.mean((1, 2))))


@linen_case("group_norm", IMAGE)
class GroupNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=4)(conv(8)(x)))
        x = x + nn.relu(nn.GroupNorm(num_groups=2)(conv(8)(x)))
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=1)(conv(6, stride=2)(x)))  # instance norm
        return nn.Dense(5)(x.mean((1, 2)))


@linen_case("spatial_gate", IMAGE)
class SpatialGate(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(8)(x))
        pooled = jnp.concatenate([x.mean(-1, keepdims=True), x.max(-1, keepdims=True)], -1)
        x = x * nn.sigmoid(conv(1)(pooled))
        return nn.Dense(5)(nn.relu(conv(6)(x)).mean((1, 2)))


# --- images out


@linen_case("unet_transposed", IMAGE, up="transposed")
@linen_case("unet_bilinear", IMAGE, up="bilinear")
@linen_case("unet_resize", IMAGE, up="nearest")
class UNet(nn.Module):
    up: str

    def upsample(self, x, features):
        if self.up == "transposed":
            return nn.ConvTranspose(features, (2, 2), (2, 2))(x)
        b, h, w, c = x.shape
        return conv(features)(jax.image.resize(x, (b, 2 * h, 2 * w, c), self.up))

    @nn.compact
    def __call__(self, x):
        skips = []
        for features in (4, 6):
            x = nn.relu(conv(features)(x))
            skips.append(x)
            x = max_pool(x)
        x = nn.relu(conv(8)(x))
        for features in (6, 4):
            x = jnp.concatenate([self.upsample(x, features), skips.pop()], -1)
            x = nn.relu(conv(features)(x))
        return conv(2, 1)(x)


@linen_case("deconv_decoder", (2, 6))
class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        x = nn.relu(nn.Dense(2 * 2 * 8)(z)).reshape(-1, 2, 2, 8)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.ConvTranspose(6, (4, 4), (2, 2))(x)))
        return nn.sigmoid(nn.ConvTranspose(3, (3, 3), (2, 2), padding="VALID")(x))


@linen_case("pixel_shuffle", (2, 4, 4, 3))
class PixelShuffle(nn.Module):
    @nn.compact
    def __call__(self, x):
        for r in (2, 1):
            x = nn.relu(conv(6)(x))
            b, h, w, _ = x.shape
            x = conv(r * r * 4)(x).reshape(b, h, w, r, r, 4)
            x = nn.relu(x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, 4))
        return conv(1)(x)


# --- patches


@linen_case("vit_linen", IMAGE)
class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(8, 4, 4)(x)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], 1)
        x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], 8))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x)[:, 0])


class BlockNNX(nnx.Module):
    def __init__(self, rngs, **attention):
        self.norm1, self.norm2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs, **attention)
        self.hidden, self.out = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.out(nnx.gelu(self.hidden(self.norm2(x))))


class ViTNNX(nnx.Module):
    def __init__(self, rngs, **attention):
        self.embed = nnx.Conv(3, 8, (4, 4), 4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 8)))
        self.positions = nnx.Param(jnp.zeros((1, 5, 8)))
        self.blocks = nnx.List([BlockNNX(rngs, **attention) for _ in range(2)])
        self.norm, self.out = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], 1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)[:, 0])


@case
def vit_nnx(rng):
    def attention(q, k, v, **_):
        return attend(q, k, v)

    return from_nnx(rng, partial(ViTNNX, attention_fn=attention), image(rng))


@case
def vit_nnx_f32_softmax(rng):
    """With flax's own attention, jax.nn.dot_product_attention: its softmax is float32 always."""
    return from_nnx(rng, ViTNNX, image(rng))


@case
def vit_fused_qkv(rng):
    d, heads = 8, 2
    norm = {"scale": (d,), "bias": (d,)}
    block = {"norm1": norm, "qkv": (d, 3 * d), "qkv_bias": (3 * d,), "proj": (d, d), "proj_bias": (d,)}
    block |= {"norm2": norm, "up": (d, 12), "up_bias": (12,), "down": (12, d), "down_bias": (d,)}
    params = draw(
        rng,
        {"embed": (4 * 4 * 3, d), "positions": (4, d), "blocks": [block, block], "norm": norm, "out": (d, 5)},
    )

    def apply(params, x):
        b = x.shape[0]
        x = x.reshape(b, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 4, 48)
        x = x @ params["embed"] + params["positions"]
        for p in params["blocks"]:
            qkv = layer_norm(x, **p["norm1"]) @ p["qkv"] + p["qkv_bias"]
            q, k, v = qkv.reshape(b, 4, 3, heads, -1).transpose(2, 0, 1, 3, 4)
            x = x + attend(q, k, v).reshape(b, 4, -1) @ p["proj"] + p["proj_bias"]
            y = jax.nn.gelu(layer_norm(x, **p["norm2"]) @ p["up"] + p["up_bias"])
            x = x + y @ p["down"] + p["down_bias"]
        return layer_norm(x, **params["norm"]).mean(1) @ params["out"]

    return Case(apply, params, (image(rng),))


@linen_case("mlp_mixer", IMAGE)
class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(8, 4, 4)(x)
        x = x.reshape(x.shape[0], -1, 8)
        for _ in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            x = x + nn.Dense(x.shape[1])(nn.gelu(nn.Dense(6)(y))).swapaxes(1, 2)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


def windows(x, size):
    """(b, h, w, c) as (b * windows, size * size, c)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def from_windows(x, shape, size):
    b, h, w, _ = shape
    x = x.reshape(b, h // size, w // size, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


def relative_index(size):
    """For each pair of places in a window, the row of the table of biases."""
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    apart = places[:, None] - places[None] + size - 1
    return apart[..., 0] * (2 * size - 1) + apart[..., 1]


class WindowAttention(nn.Module):
    shift: int
    size: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        shape, c, n = x.shape, x.shape[-1], self.size**2
        x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
        x = windows(x, self.size)
        qkv = nn.Dense(3 * c)(x).reshape(-1, n, 3, self.heads, c // self.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        table = self.param("table", nn.initializers.zeros, ((2 * self.size - 1) ** 2, self.heads))
        bias = table[relative_index(self.size).reshape(-1)].reshape(n, n, self.heads).transpose(2, 0, 1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(c // self.heads) + bias
        if self.shift:  # places that the roll brought together do not see each other
            region = np.arange(shape[1]) >= shape[1] - self.shift
            region = windows((2 * region[:, None] + region)[None, ..., None], self.size)
            mask = np.tile(region == region.swapaxes(1, 2), (shape[0], 1, 1))
            scores = jnp.where(mask[:, None], scores, -100)
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        y = from_windows(nn.Dense(c)(y.reshape(-1, n, c)), shape, self.size)
        return jnp.roll(y, (self.shift, self.shift), (1, 2))


@linen_case("swin", IMAGE)
class Swin(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(6, 2, 2)(x)
        for shift in (0, 1):
            x = x + WindowAttention(shift)(nn.LayerNorm()(x))
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        x = jnp.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        x = nn.Dense(8, use_bias=False)(nn.LayerNorm()(x))
        return nn.Dense(5)(x.mean((1, 2)))
