"""The larger networks of the studies, in flax linen: ResNet, ViT, a decoder and a small GPT.

Each is called as `apply(variables, x, train=False)` and gives logits. `train` tells BatchNorm, the
only layer that is not the same in training, to use the batch's statistics and to update its own.
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.small import dense

# He et al. 2015, of the outputs: keeps the variance of gradients, as torchvision's ResNets do.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(x, features: int, side: int, stride: int, name: str):
    """Return a convolution without bias; a side of 3 is padded by 1 on either side, as in PyTorch.

    With "SAME" a stride of 2 would pad on one side only.
    """
    return nn.Conv(
        features, (side, side), stride, padding=side // 2, use_bias=False, kernel_init=_he_normal, name=name
    )(x)


class Block(nn.Module):
    """A basic block: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    Where the shape changes, the shortcut is a 1 x 1 convolution with a norm ("projection"), or
    takes every other pixel and fills the new channels with zeros ("pad").
    """

    features: int
    stride: int
    shortcut: Literal["projection", "pad"]

    @nn.compact
    def __call__(self, x, train: bool):
        """x: (batch, height, width, in) -> (batch, height / stride, width / stride, features)."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm(name="norm1")(_conv(x, self.features, 3, self.stride, "conv1")))
        y = norm(name="norm2")(_conv(y, self.features, 3, 1, "conv2"))
        new = self.features - x.shape[-1]
        if self.stride == 1 and new == 0:
            return nn.relu(y + x)
        if self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            return nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, new))))
        x = _conv(x, self.features, 1, self.stride, "shortcut")
        return nn.relu(y + norm(name="shortcut_norm")(x))


class ResNet(nn.Module):
    """The ResNet for 32 x 32 images of He et al. (2015, section 4.2), of depth 6 n + 2.

    A 3 x 3 stem, three stages of n basic blocks, global average, dense. With projections ResNet-20
    has 272,474 parameters and ResNet-56 855,770 (the article pads: 269,722 and 853,018).
    """

    depth: int = 20
    shortcut: Literal["projection", "pad"] = "projection"
    widths: tuple[int, ...] = (16, 32, 64)
    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (batch, 32, 32, 3), normalised -> logits (batch, classes)."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"got depth={self.depth}; it must be 6 n + 2: 8, 14, 20, 32, 44, 56, 110")
        x = _conv(x, self.widths[0], 3, 1, "stem")
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x))
        for stage, features in enumerate(self.widths, start=1):
            for number in range(1, blocks + 1):
                stride = 2 if stage > 1 and number == 1 else 1
                x = Block(features, stride, self.shortcut, name=f"stage{stage}_block{number}")(x, train)
        return dense(x.mean(axis=(1, 2)), self.classes, "head")


class EncoderBlock(nn.Module):
    """A block of ViT and GPT: x + attention(norm(x)), then x + mlp(norm(x)); LayerNorm, GELU, biases."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, mask=None):
        """x: (batch, time, features) -> the same; each place sees what the mask lets it, by default all."""
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm(name="norm1")(x), mask=mask)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) that averages its patches: no class token."""

    patch: int = 4
    dim: int = 128
    depth: int = 6
    heads: int = 4
    mlp: int = 256
    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (batch, height, width, channels), normalised -> logits (batch, classes)."""
        del train
        side = (self.patch, self.patch)
        x = nn.Conv(self.dim, side, side, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        x = x + self.param("position", nn.initializers.normal(0.02), (x.shape[1], self.dim))
        for number in range(1, self.depth + 1):
            x = EncoderBlock(self.heads, self.mlp, name=f"block{number}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


class DecoderBlock(nn.Module):
    """A language model's block: causal attention and a gated MLP (SwiGLU); RMSNorm, no biases."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, mask):
        """x: (batch, time, features) -> the same; each place sees what the mask lets it."""
        attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, name="attention")
        x = x + attention(nn.RMSNorm(name="norm1")(x), mask=mask)
        y = nn.RMSNorm(name="norm2")(x)
        linear = partial(nn.Dense, use_bias=False)
        y = nn.silu(linear(self.hidden, name="gate")(y)) * linear(self.hidden, name="up")(y)
        return x + linear(x.shape[-1], name="down")(y)


class Decoder(nn.Module):
    """A small language model of characters, built as Llama is except for learned positions."""

    vocabulary: int
    context: int = 128
    dim: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int = 256

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: integers (batch, time), time at most the context -> logits (batch, time, vocabulary)."""
        del train
        mask = nn.make_causal_mask(x)
        positions = self.param("position", nn.initializers.normal(0.02), (self.context, self.dim))
        x = nn.Embed(self.vocabulary, self.dim, name="embed")(x) + positions[: x.shape[1]]
        for number in range(1, self.depth + 1):
            x = DecoderBlock(self.heads, self.hidden, name=f"block{number}")(x, mask)
        return nn.Dense(self.vocabulary, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


class GPT(nn.Module):
    """A small language model of characters, built as GPT-2 is, with a head of its own.

    With `scan` its blocks are one, stacked and run by `lax.scan`: `stack_blocks` makes their params from
    those of single blocks.
    """

    vocabulary: int
    context: int = 64
    dim: int = 96
    depth: int = 2
    heads: int = 4
    hidden: int = 384
    scan: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: integers (batch, time), time at most the context -> logits (batch, time, vocabulary)."""
        del train
        mask = nn.make_causal_mask(x)
        positions = self.param("position", nn.initializers.normal(0.02), (self.context, self.dim))
        x = nn.Embed(self.vocabulary, self.dim, name="embed")(x) + positions[: x.shape[1]]
        if self.scan:
            blocks = EncoderBlock(self.heads, self.hidden, name="blocks")
            each = nn.scan(
                lambda block, x, _: (block(x, mask), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = each(blocks, x, None)
        else:
            for number in range(1, self.depth + 1):
                x = EncoderBlock(self.heads, self.hidden, name=f"block{number}")(x, mask)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="norm")(x))


def stack_blocks(params: dict) -> dict:
    """Return params of a `GPT` as those of the same with `scan`: `block1`, `block2`, ... become `blocks`."""
    names = [f"block{number}" for number in range(1, len(params)) if f"block{number}" in params]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return {name: leaf for name, leaf in params.items() if name not in names} | {"blocks": stacked}
