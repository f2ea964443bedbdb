"""How long finding coupled channels takes, and compacting: a 7 B decoder and ResNet-50.

    python -m experiments.benchmarks.graph

The decoder has abstract params only: nothing of it is ever computed. ResNet-50 is pruned by half
of every group and compacted, with the check on the example input that runs both networks once.
Times are also given as multiples of tracing the function (`jax.make_jaxpr`), the least that any
analysis of it takes.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxprune as jp


class Bottleneck(nn.Module):
    """A block of ResNet-50: 1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        """x: (batch, height, width, channels)."""

        def conv(x, width, size, stride):
            x = nn.Conv(width, (size, size), (stride, stride), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        y = nn.relu(conv(x, self.width, 1, 1))
        y = nn.relu(conv(y, self.width, 3, self.stride))
        y = conv(y, 4 * self.width, 1, 1)
        if y.shape != x.shape:
            x = conv(x, 4 * self.width, 1, self.stride)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """He et al. 2015, 25,557,032 parameters, in evaluation mode."""

    @nn.compact
    def __call__(self, x):
        """x: (batch, 224, 224, 3) -> logits (batch, 1000)."""
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(x.mean(axis=(1, 2)))


def decoder_params(layers: int, width: int, hidden: int, vocabulary: int) -> Any:
    """Return abstract bfloat16 params of a decoder with gated feed-forward layers."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layer = {
        "norm1": array(width),
        "norm2": array(width),
        **{name: array(width, width) for name in ("query", "key", "value", "out")},
        "gate": array(width, hidden),
        "up": array(width, hidden),
        "down": array(hidden, width),
    }
    return {
        "embedding": array(vocabulary, width),
        "layers": [layer] * layers,
        "norm": array(width),
        "head": array(width, vocabulary),
    }


def stacked(params: Any) -> Any:
    """Return abstract params of a decoder with its layers in one array each."""
    layers = params["layers"]

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(layers), *leaf.shape), leaf.dtype)

    return {**params, "layers": jax.tree.map(stack, layers[0])}


def decoder(params: Any, tokens: jax.Array, heads: int) -> jax.Array:
    """Return a decoder with RMSNorm, rotary positions and SwiGLU: tokens (batch, time) -> logits.

    Its layers are a list of params, or params that are stacked, which it scans.
    """

    def norm(x, weight):
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
        return (wide * scale).astype(x.dtype) * weight

    def rotate(x):
        half = x.shape[-1] // 2
        angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
        cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    batch, length = tokens.shape
    causal = jnp.tril(jnp.ones((length, length), bool))

    def apply_layer(x, layer):
        y = norm(x, layer["norm1"])
        q, k, v = ((y @ layer[n]).reshape(batch, length, heads, -1) for n in ("query", "key", "value"))
        scores = jnp.einsum("bthd,bshd->bhts", rotate(q), rotate(k)) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ layer["out"]
        y = norm(x, layer["norm2"])
        return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"], None

    x, layers = params["embedding"][tokens], params["layers"]
    if isinstance(layers, dict):
        x, _ = jax.lax.scan(apply_layer, x, layers)
    else:
        for layer in layers:
            x, _ = apply_layer(x, layer)
    return norm(x, params["norm"]) @ params["head"]


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a function's result and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def size(tree: Any) -> int:
    """Return how many entries the arrays of a tree have."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def run_decoder(layers: int = 32, width: int = 4096, hidden: int = 11008, heads: int = 32) -> list[str]:
    """Return groups of a decoder from abstract params: lines of the table."""
    params = decoder_params(layers, width, hidden, vocabulary=32_000)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return decoder(params, tokens, heads)

    _, tracing = timed(lambda: jax.make_jaxpr(apply)(params, tokens) and None)
    groups, finding = timed(lambda: jp.channel_groups(apply, params, tokens))
    name = f"decoder, {size(params) / 1e9:.2f} B parameters: {len(groups.removable())} groups"
    return [_row(name, finding, tracing)]


def run_resnet(image: int = 224) -> list[str]:
    """Return groups and compaction of ResNet-50: lines of the table."""
    x = jax.random.normal(jax.random.key(1), (1, image, image, 3))
    model = ResNet50()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    _, tracing = timed(lambda: jax.make_jaxpr(model.apply)(variables, x) and None)
    groups, finding = timed(lambda: jp.channel_groups(model.apply, variables, x))
    structure = jp.structures.channels(groups)
    masks = jp.prune_once(
        variables, jp.scores.magnitude, sparsity=0.5, structure=structure, scope="layerwise"
    )
    _, alone = timed(lambda: jp.compact(model.apply, variables, masks, x, verify=False).params)
    small, checked = timed(lambda: jp.compact(model.apply, variables, masks, x))
    before, after = size(variables["params"]), size(small.params["params"])
    name = f"ResNet-50, {before:,} parameters: {len(groups.removable())} groups"
    return [
        _row(name, finding, tracing),
        _row(f"  compaction to {after:,}", alone, tracing),
        _row("  compaction, with the check", checked, tracing),
    ]


def _row(name: str, seconds: float, tracing: float) -> str:
    return f"{name:<58}{seconds:>8.1f} s{seconds / tracing:>8.1f} x"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    del argv
    print(f"{'':<58}{'time':>10}{'of tracing':>11}")
    for line in (*run_decoder(), *run_resnet()):
        print(line)


if __name__ == "__main__":
    main()
