"""Decoders of the Llama architecture: RMSNorm, rotary positions, grouped-query attention, a gated FFN.

Mistral and Qwen2 are the same function with other defaults in config.json.

Touvron et al. 2023 (arXiv:2302.13971); grouped queries: Ainslie et al. 2023 (arXiv:2305.13245); rotary
positions: Su et al. 2021 (arXiv:2104.09864), in the convention of transformers, which pairs the first half of
a head's entries with the second.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.hf.architecture import (
    ACTIVATIONS,
    Architecture,
    Axis,
    Tensor,
    as_float32,
    causal_attention,
    depth,
    embedded,
    linear,
    setting,
    size_in_layers,
    through_layers,
)

_ROPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""By the name of a scaling of rotary positions, the numbers that it takes."""


Configure = Callable[[Mapping[str, Any]], "LlamaConfig"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a decoder.

    Attributes:
      vocab: tokens.
      width: of the residual stream.
      hidden: units of the FFN.
      depth: layers.
      heads: of queries.
      key_heads: of keys and values.
      head: the size of a head.
      context: the longest text that it was trained on.
      eps: of the norms.
      theta: the base of the rotary frequencies.
      rope: how these are scaled: "default", "linear" or "llama3".
      rope_numbers: what that scaling takes, in the order of the paper's code.
      act: the activation of the FFN, by transformers' name.
      tied: whether the head is the embedding.
      qkv_bias, out_bias, ffn_bias: whether these products have biases.
    """

    vocab: int
    width: int
    hidden: int
    depth: int
    heads: int
    key_heads: int
    head: int
    context: int
    eps: float
    theta: float
    rope: str
    rope_numbers: tuple[float, ...]
    act: str
    tied: bool
    qkv_bias: bool
    out_bias: bool
    ffn_bias: bool


def _configure(json: Mapping[str, Any]) -> LlamaConfig:
    heads = setting(json, "num_attention_heads", int)
    width = setting(json, "hidden_size", int)
    key_heads = setting(json, "num_key_value_heads", int, heads)
    if heads % key_heads:
        raise ValueError(
            f"config.json: 'num_attention_heads' ({heads}) must be a multiple of 'num_key_value_heads' "
            f"({key_heads})."
        )
    head = setting(json, "head_dim", int, width // heads)
    if head % 2:
        raise ValueError(f"config.json: 'head_dim' must be even, for rotary positions, got {head}.")
    theta, rope, numbers = _rope(json)
    bias = setting(json, "attention_bias", bool, False)
    return LlamaConfig(
        vocab=setting(json, "vocab_size", int),
        width=width,
        hidden=setting(json, "intermediate_size", int),
        depth=setting(json, "num_hidden_layers", int),
        heads=heads,
        key_heads=key_heads,
        head=head,
        context=setting(json, "max_position_embeddings", int, 2048),
        eps=setting(json, "rms_norm_eps", float, 1e-6),
        theta=theta,
        rope=rope,
        rope_numbers=numbers,
        act=setting(json, "hidden_act", str, "silu", ACTIVATIONS),
        tied=setting(json, "tie_word_embeddings", bool, False),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=setting(json, "mlp_bias", bool, False),
    )


def _rope(json: Mapping[str, Any]) -> tuple[float, str, tuple[float, ...]]:
    """Return the base, the scaling and its numbers; in files of transformers 5 they lie together."""
    where = "rope_parameters" if json.get("rope_parameters") else "rope_scaling"
    given = json.get(where) or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json: {where!r} must be an object, got {given!r}.")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPES:
        raise ValueError(
            f"config.json: the scaling of rotary positions {kind!r} in {where!r} is not implemented; "
            f"known: {', '.join(_ROPES)}."
        )
    if given.get("partial_rotary_factor", json.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("config.json: 'partial_rotary_factor' other than 1 is not implemented.")
    # transformers falls back on the context where the original one is left out.
    given = {"original_max_position_embeddings": json.get("max_position_embeddings", 2048), **given}
    numbers = tuple(float(setting(given, key, float)) for key in _ROPES[kind])
    theta = setting(given, "rope_theta", float, setting(json, "rope_theta", float, 10_000.0))
    return float(theta), kind, numbers


def _tensors(config: LlamaConfig) -> list[Tensor]:
    vocab, width = Axis("vocab_size", config.vocab), Axis("hidden_size", config.width)
    hidden = Axis("intermediate_size", config.hidden)
    queries = Axis("num_attention_heads * head_dim", config.heads * config.head)
    keys = Axis("num_key_value_heads * head_dim", config.key_heads * config.head)
    products = {
        "query": ("self_attn.q_proj", queries, width, config.qkv_bias),
        "key": ("self_attn.k_proj", keys, width, config.qkv_bias),
        "value": ("self_attn.v_proj", keys, width, config.qkv_bias),
        "out": ("self_attn.o_proj", width, queries, config.out_bias),
        "gate": ("mlp.gate_proj", hidden, width, config.ffn_bias),
        "up": ("mlp.up_proj", hidden, width, config.ffn_bias),
        "down": ("mlp.down_proj", width, hidden, config.ffn_bias),
    }
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    found = [Tensor("embed/weight", "model.embed_tokens.weight", (vocab, width))]
    for number in range(config.depth):
        path, name = f"layers/{number}", f"model.layers.{number}"
        for ours, theirs in norms.items():
            found.append(Tensor(f"{path}/{ours}/weight", f"{name}.{theirs}.weight", (width,)))
        for ours, (theirs, out, into, bias) in products.items():
            found.append(Tensor(f"{path}/{ours}/weight", f"{name}.{theirs}.weight", (out, into)))
            if bias:
                found.append(Tensor(f"{path}/{ours}/bias", f"{name}.{theirs}.bias", (out,)))
    found.append(Tensor("norm/weight", "model.norm.weight", (width,)))
    if not config.tied:
        found.append(Tensor("head/weight", "lm_head.weight", (vocab, width)))
    return found


def _apply(config: LlamaConfig, params: Any, tokens: Any) -> jax.Array:
    cos, sin = _rotations(config, tokens.shape[1])

    def block(x: jax.Array, layer: Any) -> jax.Array:
        # The numbers of heads and units are read off the weights, so that layers may be of different sizes.
        y = _rms_norm(x, layer["attention_norm"], config.eps)
        query, key, value = (
            linear(y, layer[name]).reshape(*y.shape[:2], -1, config.head)
            for name in ("query", "key", "value")
        )
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        x = x + linear(causal_attention(query, key, value, config.head**-0.5), layer["out"])
        y = _rms_norm(x, layer["ffn_norm"], config.eps)
        gate = ACTIVATIONS[config.act](linear(y, layer["gate"]))
        return x + linear(gate * linear(y, layer["up"]), layer["down"])

    x = through_layers(block, embedded(params["embed"]["weight"], tokens), params["layers"])
    x = _rms_norm(x, params["norm"], config.eps)
    return linear(x, params["embed" if config.tied else "head"])


def _rms_norm(x: jax.Array, layer: Any, eps: float) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps), scaled by the layer's weight."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * as_float32(layer["weight"])


def _rotations(config: LlamaConfig, length: int) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and sines of the angles, (length, 1, head); the second half repeats the first."""
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * _frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, None]
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(config: LlamaConfig) -> np.ndarray:
    """Return the angle per position of each pair of a head's entries, (head / 2,), float32."""
    places = np.arange(0, config.head, 2, dtype=np.float32)
    plain = (1 / config.theta ** (places / np.float32(config.head))).astype(np.float32)
    if config.rope == "linear":
        (factor,) = config.rope_numbers
        return plain / np.float32(factor)
    if config.rope == "llama3":
        # Llama 3.1: waves longer than the original context / low are stretched by the factor, those shorter
        # than the context / high stay, and in between the two are mixed.
        factor, low, high, context = config.rope_numbers
        turns = context / (2 * math.pi / plain)
        mix = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - mix) * plain / factor + mix * plain).astype(np.float32)
    return plain


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + head / 2) of x (batch, length, heads, head) by the angles of its positions."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _with_sizes(configure: Configure, json: Mapping[str, Any], params: Any) -> dict[str, Any]:
    config = configure(json)
    heads = size_in_layers(params, "query", 0, "num_attention_heads") // config.head
    key_heads = size_in_layers(params, "key", 0, "num_key_value_heads") // config.head
    hidden = size_in_layers(params, "gate", 0, "intermediate_size")
    if config.width % heads and json.get("model_type", "llama") == "llama":  # not Mistral's or Qwen2's
        each = config.heads // config.key_heads
        counts = [each * number for number in range(1, config.key_heads + 1)]
        allowed = " or ".join(str(count) for count in counts if config.width % count == 0)
        raise ValueError(
            f"{heads} heads do not divide the width {config.width}: transformers refuses a Llama whose "
            f"'hidden_size' is no multiple of 'num_attention_heads'. Keep {allowed} heads."
        )
    changed = dict(json)
    if (heads, key_heads) != (config.heads, config.key_heads):
        # Without 'head_dim' it would be taken for hidden_size / num_attention_heads.
        changed |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": config.head}
    changed |= {"num_hidden_layers": depth(params), "intermediate_size": hidden}
    if json.get("layer_types"):  # all alike, since windows are refused
        changed["layer_types"] = json["layer_types"][: depth(params)]
    return changed


def _configure_mistral(json: Mapping[str, Any]) -> LlamaConfig:
    """Mistral 7B (Jiang et al. 2023, arXiv:2310.06825) from version 0.2 on: Llama without any biases."""
    if json.get("sliding_window", 4096) is not None:  # what it is if left out
        raise ValueError("config.json: 'sliding_window' must be null; windows are not implemented.")
    config = _configure({"num_key_value_heads": 8, "max_position_embeddings": 131_072, **json})
    return dataclasses.replace(config, qkv_bias=False, out_bias=False, ffn_bias=False)


def _configure_qwen2(json: Mapping[str, Any]) -> LlamaConfig:
    """Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases on queries, keys, values."""
    setting(json, "use_sliding_window", bool, False, allowed=(False,))
    config = _configure({"num_key_value_heads": 32, "max_position_embeddings": 32_768, **json})
    return dataclasses.replace(config, qkv_bias=True, out_bias=False, ffn_bias=False)


def _architecture(configure: Configure) -> Architecture:
    return Architecture(configure, _tensors, _apply, partial(_with_sizes, configure), prefix="model.")


LLAMA = _architecture(_configure)
MISTRAL = _architecture(_configure_mistral)
QWEN2 = _architecture(_configure_qwen2)
