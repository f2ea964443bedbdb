"""Flax models of transformers 4, small configurations of each class."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, module, normal, old_names, tokens, variables_case

_VOCABULARY = 64
_SHIM = "jnp.clip(a_max=) is shimmed, which JAX has renamed"
_HIDDEN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = {"vocab_size": _VOCABULARY, **_HIDDEN, "max_position_embeddings": 64}
_SEQUENCES = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_PAIR = _SEQUENCES | {"max_position_embeddings": 64}
_T5 = {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_VISION = _HIDDEN | {"image_size": 32, "patch_size": 8}
_LLAMA = _TEXT | {"num_key_value_heads": 2}
_GEMMA = _LLAMA | {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
_GPT2 = {"vocab_size": _VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64}
_NEO = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "window_size": 8,
}
_DISTIL = {"vocab_size": _VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [2, 2, 2, 2], "num_labels": 5}
_BOTTLENECK = _RESNET | {"hidden_sizes": [32, 48, 64, 96], "layer_type": "bottleneck"}
_REGNET = _RESNET | {"groups_width": 8, "hidden_sizes": [16, 24, 32, 48]}
_CLIP = {
    "text_config": _TEXT | {"eos_token_id": 1, "bos_token_id": 0, "projection_dim": 24},
    "vision_config": _VISION | {"projection_dim": 24},
    "projection_dim": 24,
}
_WHISPER = _SEQUENCES | {
    "num_mel_bins": 20,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_WAV2VEC2 = _HIDDEN | {
    "vocab_size": 20,
    "conv_dim": [24, 24, 24],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "mask_time_length": 2,
}
_XGLM = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "num_layers": 2,
    "attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}
_OPT = _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32}
_BLOOM = {"vocab_size": _VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_BLOCK = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}


# What a model takes, by name: tokens, masks of ones, or numbers.
_INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "text": {"input_ids": (2, 12), "attention_mask": (2, 12)},
    "long text": {"input_ids": (2, 48), "attention_mask": (2, 48)},
    "pair": {"input_ids": (2, 12), "decoder_input_ids": (2, 8)},
    "choices": {"input_ids": (2, 3, 8), "attention_mask": (2, 3, 8)},
    "image": {"pixel_values": (2, 3, 32, 32)},
    "image and text": {"pixel_values": (2, 3, 32, 32), "input_ids": (2, 8), "attention_mask": (2, 8)},
    "image to text": {"pixel_values": (2, 3, 32, 32), "decoder_input_ids": (2, 8)},
    "features": {"input_features": (2, 20, 32), "decoder_input_ids": (2, 8)},
    "wave": {"input_values": (2, 800)},
    "wave to text": {"inputs": (2, 800), "decoder_input_ids": (2, 8)},
}


def _inputs(rng: np.random.Generator, what: str) -> dict[str, Any]:
    def one(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name.endswith("mask"):
            return jnp.ones(shape, jnp.int32)
        return tokens(rng, _VOCABULARY, *shape) if name.endswith("ids") else normal(rng, *shape)

    return {name: one(name, shape) for name, shape in _INPUTS[what].items()}


_CLASSES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    # name: class, configuration, its fields, inputs, kind
    "FlaxAlbertModel": (
        "FlaxAlbertModel",
        "AlbertConfig",
        _TEXT | {"embedding_size": 16},
        "text",
        "language",
    ),
    "FlaxBartForConditionalGeneration": ("", "BartConfig", _PAIR, "pair", "language"),
    "FlaxBeitForImageClassification": (
        "",
        "BeitConfig",
        _VISION | {"num_labels": 5, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        "image",
        "image",
    ),
    "FlaxBertForMaskedLM": ("", "BertConfig", _TEXT, "text", "language"),
    "FlaxBertForMultipleChoice": ("", "BertConfig", _TEXT, "choices", "language"),
    "FlaxBertForQuestionAnswering": ("", "BertConfig", _TEXT, "text", "language"),
    "FlaxBertModel": ("", "BertConfig", _TEXT, "text", "language"),
    "FlaxBigBirdModel": (
        "",
        "BigBirdConfig",
        _TEXT | {"attention_type": "original_full"},
        "text",
        "language",
    ),
    "FlaxBigBirdModel/block_sparse": (
        "FlaxBigBirdModel",
        "BigBirdConfig",
        _TEXT | _BLOCK,
        "long text",
        "language",
    ),
    "FlaxBlenderbotForConditionalGeneration": ("", "BlenderbotConfig", _PAIR, "pair", "language"),
    "FlaxBlenderbotSmallForConditionalGeneration": ("", "BlenderbotSmallConfig", _PAIR, "pair", "language"),
    "FlaxBloomForCausalLM": ("", "BloomConfig", _BLOOM, "text", "language"),
    "FlaxCLIPModel": ("", "CLIPConfig", _CLIP, "image and text", "image and text"),
    "FlaxDinov2Model": ("", "Dinov2Config", _VISION, "image", "image"),
    "FlaxDistilBertForSequenceClassification": ("", "DistilBertConfig", _DISTIL, "text", "language"),
    "FlaxElectraForPreTraining": ("", "ElectraConfig", _TEXT | {"embedding_size": 16}, "text", "language"),
    "FlaxGPT2LMHeadModel": ("", "GPT2Config", _GPT2, "text", "language"),
    "FlaxGPTJForCausalLM": ("", "GPTJConfig", _GPT2 | {"rotary_dim": 4}, "text", "language"),
    "FlaxGPTNeoForCausalLM": ("", "GPTNeoConfig", _NEO, "text", "language"),
    "FlaxGemmaForCausalLM": ("", "GemmaConfig", _GEMMA, "text", "language"),
    "FlaxLlamaForCausalLM": ("", "LlamaConfig", _LLAMA, "text", "language"),
    "FlaxLongT5/tglobal": (
        "FlaxLongT5ForConditionalGeneration",
        "LongT5Config",
        _T5 | {"encoder_attention_type": "transient-global", "local_radius": 3, "global_block_size": 4},
        "pair",
        "language",
    ),
    "FlaxLongT5ForConditionalGeneration": ("", "LongT5Config", _T5 | {"local_radius": 3}, "pair", "language"),
    "FlaxMBartForConditionalGeneration": ("", "MBartConfig", _PAIR, "pair", "language"),
    "FlaxMT5ForConditionalGeneration": ("", "MT5Config", _T5, "pair", "language"),
    "FlaxMarianMTModel": ("", "MarianConfig", _PAIR | {"pad_token_id": 0}, "pair", "language"),
    "FlaxMistralForCausalLM": ("", "MistralConfig", _LLAMA | {"sliding_window": 4}, "text", "language"),
    "FlaxOPTForCausalLM": ("", "OPTConfig", _OPT, "text", "language"),
    "FlaxPegasusForConditionalGeneration": ("", "PegasusConfig", _PAIR, "pair", "language"),
    "FlaxRegNetY": ("FlaxRegNetForImageClassification", "RegNetConfig", _REGNET, "image", "image"),
    "FlaxResNet": ("FlaxResNetForImageClassification", "ResNetConfig", _BOTTLENECK, "image", "image"),
    "FlaxRoFormerModel": ("", "RoFormerConfig", _TEXT, "text", "language"),
    "FlaxRobertaModel": ("", "RobertaConfig", _TEXT, "text", "language"),
    "FlaxRobertaPreLayerNormModel": ("", "RobertaPreLayerNormConfig", _TEXT, "text", "language"),
    "FlaxT5/v1.1 gated untied": (
        "FlaxT5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "pair",
        "language",
    ),
    "FlaxT5ForConditionalGeneration": ("", "T5Config", _T5, "pair", "language"),
    "FlaxViTForImageClassification": ("", "ViTConfig", _VISION | {"num_labels": 5}, "image", "image"),
    "FlaxWav2Vec2ForCTC": ("", "Wav2Vec2Config", _WAV2VEC2, "wave", "speech"),
    "FlaxWhisperForConditionalGeneration": ("", "WhisperConfig", _WHISPER, "features", "speech"),
    "FlaxXGLMForCausalLM": ("", "XGLMConfig", _XGLM, "text", "language"),
    "FlaxXLMRobertaForTokenClassification": ("", "XLMRobertaConfig", _TEXT, "text", "language"),
}


def _build(rng: np.random.Generator, name: str) -> Case:
    transformers = module("transformers")
    kind, configuration, fields, inputs, _ = _CLASSES[name]
    config = getattr(transformers, configuration)(**fields)
    return _case(
        rng, getattr(transformers, kind or name)(config, **_shape(kind or name)), _inputs(rng, inputs)
    )


def _shape(name: str) -> dict[str, Any]:
    """Return what some classes need to make their params, whose default is a full-size input."""
    if "Wav2Vec2" in name:
        return {"input_shape": (1, 800)}
    if "BigBird" in name:
        return {"input_shape": (1, 48)}
    if "Whisper" in name:
        return {"input_shape": (1, 20, 32)}
    return {}


def _case(rng: np.random.Generator, model: Any, inputs: dict[str, Any]) -> Case:
    names = list(inputs)
    variables = jax.tree.map(jnp.asarray, dict(model.params))
    if "batch_stats" not in variables:
        variables = {"params": variables}

    def call(variables: Any, *xs: Any) -> Any:
        params = variables if "batch_stats" in variables else variables["params"]
        output = model(**dict(zip(names, xs, strict=True)), params=params)
        # Caches and inner activations come with the logits. As outputs they would keep their channels.
        logits = {name: value for name, value in output.items() if "logits" in name}
        return logits or {name: value for name, value in output.items() if name != "past_key_values"}

    return variables_case(rng, variables, call, tuple(inputs.values()))


# --- models of two others


def _two(rng: np.random.Generator, kind: str) -> Case:
    transformers = module("transformers")
    if kind == "FlaxVisionTextDualEncoderModel":
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(**_VISION), transformers.BertConfig(**_TEXT), projection_dim=24
        )
        return _case(rng, getattr(transformers, kind)(config), _inputs(rng, "image and text"))
    # All are drawn, so that the numbers of one do not depend on which is built.
    drawn = {what: _inputs(rng, what) for what in ("pair", "image to text", "wave to text")}
    configuration, encoder, inputs, shape = {
        "FlaxEncoderDecoderModel": ("", transformers.BertConfig(**_TEXT), "pair", {}),
        "FlaxVisionEncoderDecoderModel": ("Vision", transformers.ViTConfig(**_VISION), "image to text", {}),
        "FlaxSpeechEncoderDecoderModel": (
            "Speech",
            transformers.Wav2Vec2Config(**_WAV2VEC2),
            "wave to text",
            {"input_shape": ((1, 800), (1, 8))},
        ),
    }[kind]
    decoding = transformers.GPT2Config(**_GPT2, is_decoder=True, add_cross_attention=True)
    make = getattr(transformers, f"{configuration}EncoderDecoderConfig").from_encoder_decoder_configs
    return _case(rng, getattr(transformers, kind)(make(encoder, decoding), **shape), drawn[inputs])


# --- a shim

_old_clip = partial(old_names, "clip", a_min="min", a_max="max")  # as transformers' T5 calls it


def _with_old_clip(rng: np.random.Generator, name: str) -> Case:
    with _old_clip():
        case = _build(rng, name)

    def apply(params: Any, *inputs: Any) -> Any:
        with _old_clip():
            return case.apply(params, *inputs)

    return case._replace(apply=apply)


def _model(name: str) -> Model:
    *_, kind = _CLASSES[name]
    shimmed = "T5" in name
    build = partial(_with_old_clip if shimmed else _build, name=name)
    return Model(f"hf/{name}", ("transformers",), build, kind, note=_SHIM if shimmed else "")


_PAIRS = {
    "FlaxEncoderDecoderModel": "language",
    "FlaxSpeechEncoderDecoderModel": "speech",
    "FlaxVisionEncoderDecoderModel": "image and text",
    "FlaxVisionTextDualEncoderModel": "image and text",
}
MODELS = (
    *map(_model, _CLASSES),
    *(
        Model(f"hf/{kind}", ("transformers",), partial(_two, kind=kind), what)
        for kind, what in _PAIRS.items()
    ),
)
