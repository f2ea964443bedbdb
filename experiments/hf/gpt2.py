"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, one product for queries, keys and values.

Its files hold weights as (in, out), the layout of transformers' Conv1D.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.hf.architecture import (
    ACTIVATIONS,
    Architecture,
    Axis,
    Tensor,
    as_float32,
    causal_attention,
    depth,
    embedded,
    setting,
    size_in_layers,
    through_layers,
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2.

    Attributes:
      vocab: tokens.
      width: of the residual stream.
      hidden: units of the FFN.
      depth: layers.
      heads: of attention.
      head: the size of a head.
      context: positions.
      eps: of the norms.
      act: the activation of the FFN, by transformers' name.
      scale: what the products of queries and keys are multiplied by.
      tied: whether the head is the embedding.
    """

    vocab: int
    width: int
    hidden: int
    depth: int
    heads: int
    head: int
    context: int
    eps: float
    act: str
    scale: float
    tied: bool


def _configure(json: Mapping[str, Any]) -> GPT2Config:
    width, heads = setting(json, "n_embd", int), setting(json, "n_head", int)
    if width % heads:
        raise ValueError(f"config.json: 'n_embd' ({width}) must be a multiple of 'n_head' ({heads}).")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        setting(json, key, bool, False, allowed=(False,))
    scaled = setting(json, "scale_attn_weights", bool, True)
    return GPT2Config(
        vocab=setting(json, "vocab_size", int),
        width=width,
        hidden=setting(json, "n_inner", int, 4 * width),
        depth=setting(json, "n_layer", int),
        heads=heads,
        head=width // heads,
        context=setting(json, "n_positions", int, 1024),
        eps=setting(json, "layer_norm_epsilon", float, 1e-5),
        act=setting(json, "activation_function", str, "gelu_new", ACTIVATIONS),
        scale=(width // heads) ** -0.5 if scaled else 1.0,
        tied=setting(json, "tie_word_embeddings", bool, True),
    )


def _tensors(config: GPT2Config) -> list[Tensor]:
    vocab, width = Axis("vocab_size", config.vocab), Axis("n_embd", config.width)
    hidden, fused = Axis("n_inner", config.hidden), Axis("3 * n_embd", 3 * config.width)
    products = {
        "qkv": ("attn.c_attn", width, fused),
        "out": ("attn.c_proj", width, width),
        "up": ("mlp.c_fc", width, hidden),
        "down": ("mlp.c_proj", hidden, width),
    }
    found = [
        Tensor("embed/weight", "transformer.wte.weight", (vocab, width)),
        Tensor("positions/weight", "transformer.wpe.weight", (Axis("n_positions", config.context), width)),
    ]
    for number in range(config.depth):
        path, name = f"layers/{number}", f"transformer.h.{number}"
        for ours, theirs in {"attention_norm": "ln_1", "ffn_norm": "ln_2"}.items():
            for part in ("weight", "bias"):
                found.append(Tensor(f"{path}/{ours}/{part}", f"{name}.{theirs}.{part}", (width,)))
        for ours, (theirs, into, out) in products.items():
            found.append(Tensor(f"{path}/{ours}/weight", f"{name}.{theirs}.weight", (into, out)))
            found.append(Tensor(f"{path}/{ours}/bias", f"{name}.{theirs}.bias", (out,)))
    found += [Tensor(f"norm/{part}", f"transformer.ln_f.{part}", (width,)) for part in ("weight", "bias")]
    if not config.tied:
        found.append(Tensor("head/weight", "lm_head.weight", (vocab, width)))
    return found


def _apply(config: GPT2Config, params: Any, tokens: Any) -> jax.Array:
    length = tokens.shape[1]
    if length > config.context:
        raise ValueError(f"{length} tokens are more than the {config.context} positions of the network.")

    def block(x: jax.Array, layer: Any) -> jax.Array:
        y = _product(_layer_norm(x, layer["attention_norm"], config.eps), layer["qkv"])
        query, key, value = (
            part.reshape(*part.shape[:2], -1, config.head) for part in jnp.split(y, 3, axis=-1)
        )
        x = x + _product(causal_attention(query, key, value, config.scale), layer["out"])
        y = ACTIVATIONS[config.act](_product(_layer_norm(x, layer["ffn_norm"], config.eps), layer["up"]))
        return x + _product(y, layer["down"])

    # Positions that seem to depend on the tokens. From constant ones `compact` would see that a short example
    # reads only the first rows of the table, and drop the others.
    places = jnp.where(tokens < 0, 0, jnp.arange(length))
    positions = embedded(params["positions"]["weight"], places)
    x = through_layers(block, embedded(params["embed"]["weight"], tokens) + positions, params["layers"])
    x = _layer_norm(x, params["norm"], config.eps)
    return x @ as_float32(params["embed" if config.tied else "head"]["weight"]).T


def _product(x: jax.Array, layer: Any) -> jax.Array:
    """Return x W + b: the weight is (in, out)."""
    return x @ as_float32(layer["weight"]) + as_float32(layer["bias"])


def _layer_norm(x: jax.Array, layer: Any, eps: float) -> jax.Array:
    """Return (x - mean) / sqrt(variance + eps), scaled by the layer's weight and shifted by its bias."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps) * as_float32(layer["weight"]) + as_float32(layer["bias"])


def _with_sizes(json: Mapping[str, Any], params: Any) -> dict[str, Any]:
    config = _configure(json)
    fused = size_in_layers(params, "qkv", 1, "n_head")
    if fused != 3 * config.width:
        raise ValueError(
            f"{fused // (3 * config.head)} heads of {config.head} cannot be said by GPT-2's config.json: the "
            f"size of its heads is 'n_embd' / 'n_head', and queries, keys and values are 3 * n_embd = "
            f"{3 * config.width} wide together. Keep all heads, or prune entries of their weights."
        )
    hidden = size_in_layers(params, "up", 1, "n_inner")
    changed = {"n_layer": depth(params)}
    return {**json, **changed, **({"n_inner": hidden} if hidden != config.hidden else {})}


GPT2 = Architecture(_configure, _tensors, _apply, _with_sizes, prefix="transformer.")
