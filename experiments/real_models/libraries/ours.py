"""Networks of kinds that no installed library has, written here: stacked, of experts, and others."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.real_models.case import Case, Model, draw, from_linen, from_nnx, normal, tokens

_VOCABULARY, _TIME, _WIDTH, _HEADS, _HIDDEN, _LAYERS = 64, 8, 24, 4, 40, 3


# --- stacked decoders


class _Block(nn.Module):
    """A decoder's block as `nn.scan` takes it: a carry in, a carry and nothing out."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(_HEADS, qkv_features=32)(y, mask=mask)
        y = nn.LayerNorm()(x)
        gate, up = nn.Dense(_HIDDEN, name="gate")(y), nn.Dense(_HIDDEN, name="up")(y)
        return x + nn.Dense(_WIDTH, name="down")(nn.silu(gate) * up), None


class _Decoder(nn.Module):
    """A decoder whose blocks are stacked along an axis of every leaf, or are a list."""

    axis: int | None
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(_VOCABULARY, _WIDTH)(ids)
        block: Any = nn.remat(_Block) if self.remat else _Block
        if self.axis is None:
            for _ in range(_LAYERS):
                x, _none = block()(x)
        else:
            stacked = nn.scan(
                block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=_LAYERS
            )
            x, _none = stacked(name="layers")(x, None)
        return nn.Dense(_VOCABULARY)(nn.LayerNorm()(x))


def _linen_decoder(rng: np.random.Generator, axis: int | None, remat: bool = False) -> Case:
    return from_linen(rng, _Decoder(axis, remat), tokens(rng, _VOCABULARY, 2, _TIME))


class _NnxBlock(nnx.Module):
    """A residual block with a hidden layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(_WIDTH, rngs=rngs)
        self.up = nnx.Linear(_WIDTH, _HIDDEN, rngs=rngs)
        self.down = nnx.Linear(_HIDDEN, _WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class _NnxStack(nnx.Module):
    """Blocks made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=_LAYERS)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> _NnxBlock:
            return _NnxBlock(rngs)

        self.first = nnx.Linear(6, _WIDTH, rngs=rngs)
        self.layers = make(rngs)
        self.last = nnx.Linear(_WIDTH, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan
        def run(x: jax.Array, layer: _NnxBlock) -> tuple[jax.Array, None]:
            return layer(x), None

        x, _ = run(self.first(x), self.layers)
        return self.last(x)


def _nnx_stack(rng: np.random.Generator) -> Case:
    return from_nnx(rng, _NnxStack(nnx.Rngs(0)), normal(rng, 3, 6))


def _llama(rng: np.random.Generator, stacked: str) -> Case:
    """Return a decoder of plain arrays with grouped queries, whose blocks are scanned, indexed or listed."""
    d, size, shared = _WIDTH, 8, 2
    block = {
        "norm1": (d,),
        "norm2": (d,),
        "q": (d, _HEADS, size),
        "k": (d, shared, size),
        "v": (d, shared, size),
        "o": (_HEADS, size, d),
        "gate": (d, _HIDDEN),
        "up": (d, _HIDDEN),
        "down": (_HIDDEN, d),
    }
    params = draw(rng, {"embed": (_VOCABULARY, d), "blocks": [block] * _LAYERS, "head": (d, _VOCABULARY)})
    if stacked:
        params["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale

    def rotate(x: jax.Array) -> jax.Array:
        half = x.shape[-1] // 2
        angles = jnp.arange(x.shape[1])[:, None] * 100.0 ** (-jnp.arange(half) / half)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def run(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        y = norm(x, p["norm1"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (jnp.repeat(a, _HEADS // shared, 2) for a in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("bthk,hkd->btd", y, p["o"])
        y = norm(x, p["norm2"])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        x, blocks = params["embed"][ids], params["blocks"]
        if stacked == "scan":
            x, _ = jax.lax.scan(run, x, blocks)
        elif stacked == "index":
            for layer in range(_LAYERS):
                x, _ = run(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks))
        else:
            for p in blocks:
                x, _ = run(x, p)
        return x @ params["head"]

    return Case(apply, params, (tokens(rng, _VOCABULARY, 2, _TIME),))


# --- experts


def _experts(rng: np.random.Generator, how: str) -> Case:
    """Build two of four experts for each token, by weighting all or by sorting the tokens."""
    d, count, chosen = _WIDTH, 4, 2
    shapes = {
        "embed": (_VOCABULARY, d),
        "router": (d, count),
        "gate": (count, d, _HIDDEN),
        "up": (count, d, _HIDDEN),
        "down": (count, _HIDDEN, d),
        "head": (d, _VOCABULARY),
    }

    def weights(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        top, places = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), chosen)
        return top / top.sum(-1, keepdims=True), places

    def dense(params: Any, x: jax.Array) -> jax.Array:
        top, places = weights(params, x)
        share = jnp.einsum("tk,tke->te", top, jax.nn.one_hot(places, count))
        hidden = jax.nn.silu(jnp.einsum("td,edh->teh", x, params["gate"]))
        hidden = hidden * jnp.einsum("td,edh->teh", x, params["up"])
        return jnp.einsum("teh,ehd,te->td", hidden, params["down"], share)

    def ragged(params: Any, x: jax.Array) -> jax.Array:
        top, places = weights(params, x)
        order = jnp.argsort(places.ravel())
        sizes = jnp.bincount(places.ravel(), length=count)
        rows = x[order // chosen]
        hidden = jax.nn.silu(jax.lax.ragged_dot(rows, params["gate"], sizes))
        hidden = hidden * jax.lax.ragged_dot(rows, params["up"], sizes)
        out = jax.lax.ragged_dot(hidden, params["down"], sizes) * top.ravel()[order][:, None]
        return jnp.zeros_like(x).at[order // chosen].add(out)

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        x = params["embed"][ids.ravel()]
        x = x + (dense if how == "einsum" else ragged)(params, x)
        return x @ params["head"]

    return Case(apply, draw(rng, shapes), (tokens(rng, _VOCABULARY, 2, _TIME),))


# --- state spaces and long convolutions


def _linear_recurrence(rng: np.random.Generator, how: str) -> Case:
    """Return a diagonal linear recurrence between two layers: by an associative scan, a scan, or an FFT."""
    d, state = 12, 20
    shapes = {
        "first": (6, d),
        "decay": (state,),
        "b": (d, state),
        "c": (state, d),
        "skip": (d,),
        "gate": (d, d),
        "last": (d, 3),
    }

    def mix(params: Any, x: jax.Array) -> jax.Array:
        decay, driven = jax.nn.sigmoid(params["decay"]), x @ params["b"]
        if how == "associative":
            factors = jnp.broadcast_to(decay, driven.shape)
            _, states = jax.lax.associative_scan(
                lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (factors, driven), axis=1
            )
        elif how == "scan":

            def step(h: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
                h = decay * h + u
                return h, h

            _, states = jax.lax.scan(step, jnp.zeros_like(driven[:, 0]), driven.swapaxes(0, 1))
            states = states.swapaxes(0, 1)
        else:
            time = x.shape[1]
            kernel = decay ** jnp.arange(time)[:, None]
            spectra = (jnp.fft.rfft(a, 2 * time, axis=-2) for a in (driven, kernel))
            first, second = spectra
            states = jnp.fft.irfft(first * second, 2 * time, axis=-2)[:, :time]
        return states @ params["c"] + params["skip"] * x

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(x @ params["first"])
        x = x + mix(params, x) * jax.nn.sigmoid(x @ params["gate"])
        return x.mean(1) @ params["last"]

    return Case(apply, draw(rng, shapes), (normal(rng, 2, _TIME, 6),))


# --- others, in linen


class _DiTBlock(nn.Module):
    """A block of a diffusion transformer: norms whose shifts, scales and gates come from the time."""

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        parts = jnp.split(nn.Dense(6 * _WIDTH)(nn.silu(c))[:, None], 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        y = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale1) + shift1
        x = x + gate1 * nn.MultiHeadDotProductAttention(_HEADS, qkv_features=32)(y)
        y = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale2) + shift2
        return x + gate2 * nn.Dense(_WIDTH)(nn.gelu(nn.Dense(_HIDDEN)(y)))


class _DiT(nn.Module):
    """A diffusion transformer of patches."""

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        angles = t[:, None] * jnp.exp(-jnp.arange(8.0))
        c = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        c = nn.Dense(_WIDTH)(nn.silu(nn.Dense(32)(c)))
        y = nn.Conv(_WIDTH, (2, 2), 2)(x)
        batch, height, width, _ = y.shape
        y = y.reshape(batch, -1, _WIDTH)
        y = y + self.param("places", nn.initializers.normal(0.1), (1, y.shape[1], _WIDTH))
        for _ in range(2):
            y = _DiTBlock()(y, c)
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(y))
        y = y.reshape(batch, height, width, 2, 2, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(x.shape)


class _Conformer(nn.Module):
    """A speech encoder: half feed-forward steps around attention and a gated depthwise convolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(_WIDTH, (3,), 2)(x)
        for _ in range(2):
            x = x + 0.5 * nn.Dense(_WIDTH)(nn.silu(nn.Dense(_HIDDEN)(nn.LayerNorm()(x))))
            x = x + nn.MultiHeadDotProductAttention(_HEADS, qkv_features=32)(nn.LayerNorm()(x))
            y = nn.glu(nn.Dense(2 * _WIDTH)(nn.LayerNorm()(x)))
            y = nn.Conv(_WIDTH, (5,), feature_group_count=_WIDTH)(y)
            y = nn.silu(nn.BatchNorm(use_running_average=True)(y))
            x = x + nn.Dense(_WIDTH)(y)
            x = x + 0.5 * nn.Dense(_WIDTH)(nn.silu(nn.Dense(_HIDDEN)(nn.LayerNorm()(x))))
            x = nn.LayerNorm()(x)
        return nn.Dense(10)(x)


class _Perceiver(nn.Module):
    """Learned queries that read a long input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(_WIDTH)(x)
        latent = self.param("latent", nn.initializers.normal(1.0), (5, 16))
        latent = jnp.broadcast_to(latent, (x.shape[0], 5, 16))
        for _ in range(2):
            latent = latent + nn.MultiHeadDotProductAttention(2, qkv_features=16)(latent, x)
            latent = latent + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(latent))))
        return nn.Dense(3)(latent.mean(1))


class _Coupling(nn.Module):
    """Real NVP: halves that scale and shift each other, and the logarithm of the volume."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        volume = jnp.zeros(x.shape[0])
        for _ in range(3):
            a, b = jnp.split(x, 2, -1)
            hidden = nn.relu(nn.Dense(24)(nn.relu(nn.Dense(24)(a))))
            scale, shift = jnp.tanh(nn.Dense(b.shape[-1])(hidden)), nn.Dense(b.shape[-1])(hidden)
            x, volume = jnp.concatenate([b * jnp.exp(scale) + shift, a], -1), volume + scale.sum(-1)
        return x, volume


class _EquivariantGraph(nn.Module):
    """Messages between all pairs of points, which see distances alone, and move the points."""

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = nn.Dense(_WIDTH)(h)
        for _ in range(2):
            apart = x[:, :, None] - x[:, None]
            squared = jnp.sum(jnp.square(apart), -1, keepdims=True)
            count = h.shape[1]
            pair = jnp.concatenate(
                [jnp.repeat(h[:, :, None], count, 2), jnp.repeat(h[:, None], count, 1), squared], -1
            )
            message = nn.silu(nn.Dense(20)(nn.silu(nn.Dense(32)(pair))))
            x = x + jnp.mean(apart * nn.Dense(1)(message), 2)
            h = h + nn.Dense(_WIDTH)(nn.silu(nn.Dense(32)(jnp.concatenate([h, message.sum(2)], -1))))
        return nn.Dense(3)(h), x


def _linen(rng: np.random.Generator, model: Callable[[], Any], shapes: tuple[tuple[int, ...], ...]) -> Case:
    return from_linen(rng, model(), *(normal(rng, *shape) for shape in shapes))


_STACKED, _EXPERTS, _STATE = "stacked language", "mixture of experts", "state space"
_BUILDERS: dict[str, tuple[Callable[[np.random.Generator], Case], str]] = {
    "linen decoder, list": (partial(_linen_decoder, axis=None), "language"),
    "nn.scan decoder": (partial(_linen_decoder, axis=0), _STACKED),
    "nn.scan decoder, axis 1": (partial(_linen_decoder, axis=1), _STACKED),
    "nn.scan decoder, remat": (partial(_linen_decoder, axis=0, remat=True), _STACKED),
    "nnx.scan blocks": (_nnx_stack, "stacked layers"),
    "llama, list": (partial(_llama, stacked=""), "language"),
    "llama, scan": (partial(_llama, stacked="scan"), _STACKED),
    "llama, indexed": (partial(_llama, stacked="index"), _STACKED),
    "experts, einsum": (partial(_experts, how="einsum"), _EXPERTS),
    "experts, ragged_dot": (partial(_experts, how="ragged"), _EXPERTS),
    "linear recurrence, associative scan": (partial(_linear_recurrence, how="associative"), _STATE),
    "linear recurrence, scan": (partial(_linear_recurrence, how="scan"), _STATE),
    "linear recurrence, FFT": (partial(_linear_recurrence, how="fft"), _STATE),
    "DiT": (partial(_linen, model=_DiT, shapes=((2, 8, 8, 3), (2,))), "diffusion"),
    "Conformer": (partial(_linen, model=_Conformer, shapes=((2, 12, 10),)), "speech"),
    "Perceiver": (partial(_linen, model=_Perceiver, shapes=((2, 9, 6),)), "set"),
    "Real NVP": (partial(_linen, model=_Coupling, shapes=((3, 6),)), "flow"),
    "EGNN": (partial(_linen, model=_EquivariantGraph, shapes=((2, 5, 4), (2, 5, 3))), "graph"),
}
MODELS = tuple(
    Model(f"ours/{name}", ("flax",), build, kind, ours=True) for name, (build, kind) in _BUILDERS.items()
)
