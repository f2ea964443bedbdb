"""Models of sequences, (batch, time) tokens or (batch, time, features)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from .common import (
    Case,
    attend,
    case,
    causal,
    draw,
    layer_norm,
    linen_case,
    nnx_case,
    normal,
    rms_norm,
    tokens,
)

VOCAB, TIME = 11, 6


def token_ids(rng):
    return tokens(rng, VOCAB, 2, TIME)


# --- decoders


def rotate(x, positions):
    """Rotary embedding of (batch, time, heads, features), by halves."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 100.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def swiglu(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def llama(rng, heads, shared):
    """A decoder LM whose `shared` key and value heads serve more query heads each."""
    d, size = 12, 4
    block = {"norm1": (d,), "norm2": (d,), "q": (d, heads, size), "k": (d, shared, size)}
    block |= {"v": (d, shared, size), "o": (heads, size, d)}
    block |= {"gate": (d, 10), "up": (d, 10), "down": (10, d)}
    shapes = {"embed": (VOCAB, d), "blocks": [block, block], "norm": (d,), "head": (d, VOCAB)}

    def apply(params, ids, grouped=False):
        x = params["embed"][ids]
        positions = jnp.arange(ids.shape[1])
        for p in params["blocks"]:
            y = rms_norm(x, p["norm1"])
            q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in "qkv")
            q, k = rotate(q, positions), rotate(k, positions)
            if grouped:
                q = q.reshape(*q.shape[:2], shared, heads // shared, size)
                scores = jnp.einsum("bqsgd,bksd->bsgqk", q, k) / math.sqrt(size)
                scores = jnp.where(causal(q.shape[1]), scores, -jnp.inf)
                y = jnp.einsum("bsgqk,bksd->bqsgd", jax.nn.softmax(scores), v)
                y = y.reshape(*y.shape[:2], heads, size)
            else:
                k, v = (jnp.repeat(a, heads // shared, 2) for a in (k, v))
                y = attend(q, k, v, causal(q.shape[1]))
            x = x + jnp.einsum("bthk,hkd->btd", y, p["o"])
            x = x + swiglu(p, rms_norm(x, p["norm2"]))
        return rms_norm(x, params["norm"]) @ params["head"]

    return apply, draw(rng, shapes), (token_ids(rng),)


@case
def llama_gqa_repeat(rng):
    return Case(*llama(rng, 4, 2))


@case
def llama_gqa_grouped(rng):
    apply, params, inputs = llama(rng, 4, 2)
    return Case(lambda params, ids: apply(params, ids, grouped=True), params, inputs)


@case
def llama_bf16(rng):
    apply, params, inputs = llama(rng, 2, 2)

    def low(params, ids):
        return apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), ids)

    return Case(low, params, inputs)


def gpt_shapes(d, hidden=12):
    norm = {"scale": (d,), "bias": (d,)}
    block = {"norm1": norm, "qkv": (d, 3 * d), "qkv_bias": (3 * d,), "proj": (d, d), "proj_bias": (d,)}
    block |= {"norm2": norm, "up": (d, hidden), "up_bias": (hidden,), "down": (hidden, d), "down_bias": (d,)}
    return {"embed": (VOCAB, d), "positions": (TIME, d), "blocks": [block, block], "norm": norm}


def gpt_block(p, x, heads, split):
    """A pre-norm block, whose one product for q, k and v is cut up by `split`."""
    b, t, d = x.shape
    qkv = layer_norm(x, **p["norm1"]) @ p["qkv"] + p["qkv_bias"]
    if split == "last":
        q, k, v = (a.reshape(b, t, heads, d // heads) for a in jnp.split(qkv, 3, -1))
    elif split == "reshape":
        qkv = qkv.reshape(b, t, 3, heads, d // heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    else:  # each head's q, k and v lie side by side
        q, k, v = jnp.split(qkv.reshape(b, t, heads, 3 * d // heads), 3, -1)
    y = attend(q, k, v, causal(t)).reshape(b, t, d)
    x = x + y @ p["proj"] + p["proj_bias"]
    y = jax.nn.gelu(layer_norm(x, **p["norm2"]) @ p["up"] + p["up_bias"])
    return x + y @ p["down"] + p["down_bias"]


def gpt(rng, split, tied=False):
    shapes = gpt_shapes(8)
    if not tied:
        shapes["head"] = (8, VOCAB)

    def apply(params, ids):
        x = params["embed"][ids] + params["positions"]
        for p in params["blocks"]:
            x = gpt_block(p, x, 2, split)
        return layer_norm(x, **params["norm"]) @ (params["embed"].T if tied else params["head"])

    return Case(apply, draw(rng, shapes), (token_ids(rng),))


for _split in ("last", "reshape", "heads"):
    case(partial(gpt, split=_split), f"gpt_split_{_split}")
case(partial(gpt, split="last", tied=True), "gpt_tied")


@linen_case("tied_linen", token_ids)
class TiedLM(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCAB, 8)
        x = embed(ids)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.RMSNorm()(x))))
        return embed.attend(nn.RMSNorm()(x))


@case
def scan_remat(rng):
    shapes = gpt_shapes(8) | {"head": (8, VOCAB)}
    block = shapes["blocks"][0]
    shapes["blocks"] = jax.tree.map(lambda s: (3, *s), block, is_leaf=lambda s: isinstance(s, tuple))

    @jax.checkpoint
    def body(x, p):
        return gpt_block(p, x, 2, "last"), None

    def apply(params, ids):
        x = params["embed"][ids] + params["positions"]
        x, _ = jax.lax.scan(body, x, params["blocks"])
        return layer_norm(x, **params["norm"]) @ params["head"]

    return Case(apply, draw(rng, shapes), (token_ids(rng),))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        mask = causal(x.shape[1])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(8)(nn.silu(nn.Dense(12)(nn.LayerNorm()(x)))), None


@linen_case("scan_remat_linen", token_ids)
class ScannedLM(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, 8)(ids)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = blocks()(x, None)
        return nn.Dense(VOCAB)(nn.LayerNorm()(x))


@case
def kv_cache(rng):
    d, heads, size = 8, 2, 4
    shapes = {
        "params": {
            "embed": (VOCAB, d),
            "norm": (d,),
            **dict.fromkeys("qkv", (d, heads, size)),
            "o": (heads, size, d),
            "mlp": {"gate": (d, 10), "up": (d, 10), "down": (10, d)},
            "head": (d, VOCAB),
        },
        "cache": {"k": (2, TIME, heads, size), "v": (2, TIME, heads, size)},
    }

    def apply(variables, ids, position):
        p, cache = variables["params"], variables["cache"]
        x = p["embed"][ids][:, None]
        y = rms_norm(x, p["norm"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in "qkv")
        q, k = (rotate(a, position[None]) for a in (q, k))
        new = {"k": k, "v": v}
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(old, new[name], position, 1)
            for name, old in cache.items()
        }
        y = attend(q, cache["k"], cache["v"], jnp.arange(TIME) <= position)
        x = x + jnp.einsum("bthk,hkd->btd", y, p["o"])
        x = x + swiglu(p["mlp"], x)
        return x[:, 0] @ p["head"], {"cache": cache}

    inputs = tokens(rng, VOCAB, 2), jnp.asarray(3, jnp.int32)
    return Case(apply, draw(rng, shapes), inputs, state=lambda out: out[1])


# --- recurrent nets; the carry's dtype is the params', where flax's own would be float32


@linen_case("lstm_linen", (2, TIME, 3))
class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        zeros = jnp.zeros((x.shape[0], 8), x.dtype)
        x = nn.RNN(nn.OptimizedLSTMCell(8))(x, initial_carry=(zeros, zeros))
        return nn.Dense(4)(x)


@nnx_case("lstm_nnx", (2, TIME, 3))
class LSTMNNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(3, 6, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs), rngs=False)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        zeros = jnp.zeros((x.shape[0], 8), x.dtype)
        return self.out(self.rnn(x, initial_carry=(zeros, zeros))[:, -1])


@linen_case("gru_linen", (2, TIME, 3))
class GRU(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        for _ in range(2):
            x = nn.RNN(nn.GRUCell(8))(x, initial_carry=jnp.zeros((x.shape[0], 8), x.dtype))
        return nn.Dense(4)(x[:, -1])


@case
def elman_scan(rng):
    params = draw(rng, {"x": (3, 8), "h": (8, 8), "b": (8,), "out": (8, 4)})

    def apply(params, x):
        def step(h, x):
            h = jnp.tanh(x @ params["x"] + h @ params["h"] + params["b"])
            return h, h @ params["out"]

        start = jnp.zeros((x.shape[0], 8), params["h"].dtype)
        return jax.lax.scan(step, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Case(apply, params, (normal(rng, 2, TIME, 3),))


# --- the rest


@linen_case("wavenet", (2, 8, 3))
class WaveNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, total = nn.Conv(6, (1,))(x), 0
        for dilation in (1, 2):
            y = jnp.pad(x, ((0, 0), (dilation, 0), (0, 0)))
            a, b = (nn.Conv(8, (2,), padding="VALID", kernel_dilation=dilation)(y) for _ in range(2))
            y = jnp.tanh(a) * nn.sigmoid(b)
            total = total + nn.Conv(7, (1,))(y)
            x = x + nn.Conv(6, (1,))(y)  # the last of these goes nowhere, as in many a WaveNet
        return nn.Conv(4, (1,))(nn.relu(nn.Conv(6, (1,))(nn.relu(total))))


@linen_case("fnet_cosines", (2, TIME, 3), cosines=True)
@linen_case("fnet_fft", (2, TIME, 3), cosines=False)
class FNet(nn.Module):
    cosines: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        t = x.shape[1]
        for _ in range(2):
            if self.cosines:
                matrix = np.cos(2 * np.pi * np.outer(np.arange(t), np.arange(t)) / t)
                y = jnp.einsum("st,btd->bsd", jnp.asarray(matrix, x.dtype), x)
            else:
                y = jnp.fft.fft(x, axis=1).real
            x = nn.LayerNorm()(x + y)
            x = nn.LayerNorm()(x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x))))
        return nn.Dense(4)(x.mean(1))


@case
def attention_pooling(rng):
    params = draw(rng, {"in": (3, 8), "score": (8, 6), "query": (6,), "value": (8, 7), "out": (7, 4)})

    def apply(params, x):
        x = jax.nn.relu(x @ params["in"])
        weights = jax.nn.softmax(jnp.tanh(x @ params["score"]) @ params["query"], -1)
        pooled = jnp.squeeze(weights[:, None] @ (x @ params["value"]), 1)
        return pooled @ params["out"]

    return Case(apply, params, (normal(rng, 2, TIME, 3),))


@case
def moe_dense(rng):
    experts, d, hidden = 3, 6, 8
    params = draw(
        rng,
        {
            "embed": (VOCAB, d),
            "router": (d, experts),
            "up": (experts, d, hidden),
            "up_bias": (experts, hidden),
            "down": (experts, hidden, d),
            "down_bias": (experts, d),
            "out": (d, 4),
        },
    )

    def apply(params, ids):
        x = params["embed"][ids]
        gates = jax.nn.softmax(x @ params["router"])
        y = jnp.einsum("btd,edh->bteh", x, params["up"]) + params["up_bias"]
        y = jnp.einsum("bteh,ehd->bted", jax.nn.relu(y), params["down"]) + params["down_bias"]
        return (x + jnp.einsum("bte,bted->btd", gates, y)) @ params["out"]

    return Case(apply, params, (token_ids(rng),))


@linen_case("cross_attention", (2, 7, 3), (2, TIME, 3))
class CrossAttention(nn.Module):
    """An encoder and a decoder that reads it."""

    @nn.compact
    def __call__(self, source, target):
        memory = nn.Dense(6)(source)
        memory = memory + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(memory))
        x = nn.Dense(8)(target)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=8)(
            nn.LayerNorm()(x), nn.LayerNorm()(memory)
        )
        return nn.Dense(4)(nn.LayerNorm()(x))
