"""Flax models of transformers 4, small configurations of each class."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, module, normal, tokens, variables_case

_VOCABULARY = 64
_SHIM = "jnp.clip(a_max=) is shimmed, which JAX has renamed"
_TEXT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_PAIR = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_T5 = {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
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
_WHISPER = {
    "vocab_size": _VOCABULARY,
    "num_mel_bins": 20,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_WAV2VEC2 = {
    "vocab_size": 20,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
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


def _text(rng: np.random.Generator, time: int = 12) -> dict[str, Any]:
    return {"input_ids": tokens(rng, _VOCABULARY, 2, time), "attention_mask": jnp.ones((2, time), jnp.int32)}


def _pair(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "input_ids": tokens(rng, _VOCABULARY, 2, 12),
        "decoder_input_ids": tokens(rng, _VOCABULARY, 2, 8),
    }


def _choices(rng: np.random.Generator) -> dict[str, Any]:
    return {"input_ids": tokens(rng, _VOCABULARY, 2, 3, 8), "attention_mask": jnp.ones((2, 3, 8), jnp.int32)}


def _image(rng: np.random.Generator) -> dict[str, Any]:
    return {"pixel_values": normal(rng, 2, 3, 32, 32)}


def _image_and_text(rng: np.random.Generator) -> dict[str, Any]:
    return _image(rng) | {
        "input_ids": tokens(rng, _VOCABULARY, 2, 8),
        "attention_mask": jnp.ones((2, 8), jnp.int32),
    }


def _image_to_text(rng: np.random.Generator) -> dict[str, Any]:
    return _image(rng) | {"decoder_input_ids": tokens(rng, _VOCABULARY, 2, 8)}


def _features(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "input_features": normal(rng, 2, 20, 32),
        "decoder_input_ids": tokens(rng, _VOCABULARY, 2, 8),
    }


def _wave(rng: np.random.Generator) -> dict[str, Any]:
    return {"input_values": normal(rng, 2, 800)}


def _wave_to_text(rng: np.random.Generator) -> dict[str, Any]:
    return {"inputs": normal(rng, 2, 800), "decoder_input_ids": tokens(rng, _VOCABULARY, 2, 8)}


_Inputs = Callable[..., dict[str, Any]]
_CLASSES: dict[str, tuple[str, str, dict[str, Any], _Inputs, str]] = {
    # name: class, configuration, its fields, inputs, kind
    "FlaxAlbertModel": ("FlaxAlbertModel", "AlbertConfig", _TEXT | {"embedding_size": 16}, _text, "language"),
    "FlaxBartForConditionalGeneration": ("", "BartConfig", _PAIR, _pair, "language"),
    "FlaxBeitForImageClassification": (
        "",
        "BeitConfig",
        _VISION | {"num_labels": 5, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        _image,
        "image",
    ),
    "FlaxBertForMaskedLM": ("", "BertConfig", _TEXT, _text, "language"),
    "FlaxBertForMultipleChoice": ("", "BertConfig", _TEXT, _choices, "language"),
    "FlaxBertForQuestionAnswering": ("", "BertConfig", _TEXT, _text, "language"),
    "FlaxBertModel": ("", "BertConfig", _TEXT, _text, "language"),
    "FlaxBigBirdModel": ("", "BigBirdConfig", _TEXT | {"attention_type": "original_full"}, _text, "language"),
    "FlaxBigBirdModel/block_sparse": (
        "FlaxBigBirdModel",
        "BigBirdConfig",
        _TEXT | _BLOCK,
        partial(_text, time=48),
        "language",
    ),
    "FlaxBlenderbotForConditionalGeneration": ("", "BlenderbotConfig", _PAIR, _pair, "language"),
    "FlaxBlenderbotSmallForConditionalGeneration": ("", "BlenderbotSmallConfig", _PAIR, _pair, "language"),
    "FlaxBloomForCausalLM": ("", "BloomConfig", _BLOOM, _text, "language"),
    "FlaxCLIPModel": ("", "CLIPConfig", _CLIP, _image_and_text, "image and text"),
    "FlaxDinov2Model": ("", "Dinov2Config", _VISION, _image, "image"),
    "FlaxDistilBertForSequenceClassification": ("", "DistilBertConfig", _DISTIL, _text, "language"),
    "FlaxElectraForPreTraining": ("", "ElectraConfig", _TEXT | {"embedding_size": 16}, _text, "language"),
    "FlaxGPT2LMHeadModel": ("", "GPT2Config", _GPT2, _text, "language"),
    "FlaxGPTJForCausalLM": ("", "GPTJConfig", _GPT2 | {"rotary_dim": 4}, _text, "language"),
    "FlaxGPTNeoForCausalLM": ("", "GPTNeoConfig", _NEO, _text, "language"),
    "FlaxGemmaForCausalLM": ("", "GemmaConfig", _GEMMA, _text, "language"),
    "FlaxLlamaForCausalLM": ("", "LlamaConfig", _LLAMA, _text, "language"),
    "FlaxLongT5/tglobal": (
        "FlaxLongT5ForConditionalGeneration",
        "LongT5Config",
        _T5 | {"encoder_attention_type": "transient-global", "local_radius": 3, "global_block_size": 4},
        _pair,
        "language",
    ),
    "FlaxLongT5ForConditionalGeneration": ("", "LongT5Config", _T5 | {"local_radius": 3}, _pair, "language"),
    "FlaxMBartForConditionalGeneration": ("", "MBartConfig", _PAIR, _pair, "language"),
    "FlaxMT5ForConditionalGeneration": ("", "MT5Config", _T5, _pair, "language"),
    "FlaxMarianMTModel": ("", "MarianConfig", _PAIR | {"pad_token_id": 0}, _pair, "language"),
    "FlaxMistralForCausalLM": ("", "MistralConfig", _LLAMA | {"sliding_window": 4}, _text, "language"),
    "FlaxOPTForCausalLM": ("", "OPTConfig", _OPT, _text, "language"),
    "FlaxPegasusForConditionalGeneration": ("", "PegasusConfig", _PAIR, _pair, "language"),
    "FlaxRegNetY": ("FlaxRegNetForImageClassification", "RegNetConfig", _REGNET, _image, "image"),
    "FlaxResNet": ("FlaxResNetForImageClassification", "ResNetConfig", _BOTTLENECK, _image, "image"),
    "FlaxRoFormerModel": ("", "RoFormerConfig", _TEXT, _text, "language"),
    "FlaxRobertaModel": ("", "RobertaConfig", _TEXT, _text, "language"),
    "FlaxRobertaPreLayerNormModel": ("", "RobertaPreLayerNormConfig", _TEXT, _text, "language"),
    "FlaxT5/v1.1 gated untied": (
        "FlaxT5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _pair,
        "language",
    ),
    "FlaxT5ForConditionalGeneration": ("", "T5Config", _T5, _pair, "language"),
    "FlaxViTForImageClassification": ("", "ViTConfig", _VISION | {"num_labels": 5}, _image, "image"),
    "FlaxWav2Vec2ForCTC": ("", "Wav2Vec2Config", _WAV2VEC2, _wave, "speech"),
    "FlaxWhisperForConditionalGeneration": ("", "WhisperConfig", _WHISPER, _features, "speech"),
    "FlaxXGLMForCausalLM": ("", "XGLMConfig", _XGLM, _text, "language"),
    "FlaxXLMRobertaForTokenClassification": ("", "XLMRobertaConfig", _TEXT, _text, "language"),
}


def _build(rng: np.random.Generator, name: str) -> Case:
    transformers = module("transformers")
    kind, configuration, fields, inputs, _ = _CLASSES[name]
    config = getattr(transformers, configuration)(**fields)
    return _case(rng, getattr(transformers, kind or name)(config, **_shape(kind or name)), inputs(rng))


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
        return _case(rng, getattr(transformers, kind)(config), _image_and_text(rng))
    decoder = {"is_decoder": True, "add_cross_attention": True}
    configuration, encoder, inputs, shape = {
        "FlaxEncoderDecoderModel": (
            "EncoderDecoderConfig",
            transformers.BertConfig(**_TEXT),
            _pair(rng),
            {},
        ),
        "FlaxVisionEncoderDecoderModel": (
            "VisionEncoderDecoderConfig",
            transformers.ViTConfig(**_VISION),
            _image_to_text(rng),
            {},
        ),
        "FlaxSpeechEncoderDecoderModel": (
            "SpeechEncoderDecoderConfig",
            transformers.Wav2Vec2Config(**_WAV2VEC2),
            _wave_to_text(rng),
            {"input_shape": ((1, 800), (1, 8))},
        ),
    }[kind]
    decoding = transformers.GPT2Config(**_GPT2, **decoder)
    make = getattr(transformers, configuration).from_encoder_decoder_configs
    return _case(rng, getattr(transformers, kind)(make(encoder, decoding), **shape), inputs)


# --- a shim


@contextmanager
def old_clip() -> Iterator[None]:
    """Let `jnp.clip` take `a_min` and `a_max`, which transformers' T5 uses and JAX has renamed."""
    clip = jnp.clip

    @wraps(clip)
    def shimmed(x: Any, *args: Any, **keywords: Any) -> Any:
        renamed = {{"a_min": "min", "a_max": "max"}.get(name, name): v for name, v in keywords.items()}
        return clip(x, *args, **renamed)

    jnp.clip = shimmed
    try:
        yield
    finally:
        jnp.clip = clip


def _with_old_clip(rng: np.random.Generator, name: str) -> Case:
    with old_clip():
        case = _build(rng, name)

    def apply(params: Any, *inputs: Any) -> Any:
        with old_clip():
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
