"""Backbones of keras_hub on JAX, small configurations of each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, module, normal, tokens
from experiments.real_models.libraries.keras import keras_case

_VOCABULARY, _TIME, _SIZE = 64, 12, 32
_TEXT = {
    "vocabulary_size": _VOCABULARY,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 64,
}
_LONG = _TEXT | {"max_sequence_length": _TIME}
_DECODER = {
    **{name: size for name, size in _TEXT.items() if name != "num_heads"},
    "num_query_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS = _DECODER | {"num_experts": 4, "top_k": 2}
_IMAGE = (_SIZE, _SIZE, 3)
_VIT = {
    "image_shape": _IMAGE,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
}
_T5_GEMMA = {
    "vocabulary_size": _VOCABULARY,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "hidden_dim": 32,
            "intermediate_dim": 64,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 2,
        }.items()
    },
    "attention_dropout": 0.0,
    "dropout_rate": 0.0,
}
_PLAIN: dict[str, dict[str, Any]] = {
    "AlbertBackbone": _LONG | {"embedding_dim": 16},
    "BartBackbone": _LONG,
    "BertBackbone": _LONG,
    "BloomBackbone": _TEXT,
    "DebertaV3Backbone": _LONG | {"bucket_size": 8},
    "DistilBertBackbone": _LONG,
    "ElectraBackbone": {name.replace("vocabulary_size", "vocab_size"): value for name, value in _LONG.items()}
    | {"embedding_dim": 16},
    "ESM2Backbone": _TEXT,
    "FNetBackbone": {k: v for k, v in _LONG.items() if k != "num_heads"},
    "FalconBackbone": {k.replace("num_heads", "num_attention_heads"): v for k, v in _TEXT.items()},
    "GPT2Backbone": _LONG,
    "GPTNeoXBackbone": _LONG | {"rotary_percentage": 0.5},
    "GemmaBackbone": _DECODER | {"head_dim": 8},
    "Gemma3Backbone": _DECODER
    | {
        "head_dim": 8,
        "image_size": _SIZE,
        "use_query_key_norm": True,
        "use_sliding_window_attention": True,
        "sliding_window_size": 4,
    },
    "GptOssBackbone": _EXPERTS | {"head_dim": 8, "sliding_window": 4},
    "LlamaBackbone": _DECODER,
    "Llama3Backbone": _DECODER,
    "MistralBackbone": _DECODER | {"sliding_window": 4},
    "MixtralBackbone": _EXPERTS | {"sliding_window": 4},
    "OPTBackbone": _LONG,
    "Phi3Backbone": _DECODER,
    "QwenBackbone": _DECODER,
    "QwenMoeBackbone": _EXPERTS | {"moe_intermediate_dim": 24, "shared_expert_intermediate_dim": 40},
    "Qwen3Backbone": _DECODER | {"head_dim": 8},
    "Qwen3MoeBackbone": _EXPERTS | {"moe_intermediate_dim": 24, "head_dim": 8, "mlp_only_layers": []},
    "RWKV7Backbone": {
        "vocabulary_size": _VOCABULARY,
        "hidden_size": 32,
        "head_size": 8,
        "num_layers": 2,
        "intermediate_dim": 64,
        "gate_lora": 8,
        "mv_lora": 8,
        "aaa_lora": 8,
        "decay_lora": 8,
    },
    "RobertaBackbone": _LONG,
    "RoformerV2Backbone": _TEXT | {"head_size": 8},
    "SmolLM3Backbone": {
        "vocabulary_size": _VOCABULARY,
        "hidden_dim": 32,
        "intermediate_dim": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_layer_enabled_list": [True, False],
        "layer_types": ["attention"] * 2,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "T5Backbone": _TEXT,
    "T5GemmaBackbone": _T5_GEMMA,
    "WhisperBackbone": _TEXT
    | {"num_mels": 20, "max_encoder_sequence_length": 32, "max_decoder_sequence_length": _TIME},
    "XLMRobertaBackbone": _LONG,
    "XLNetBackbone": _TEXT,
    "MoonshineBackbone": {
        "vocabulary_size": _VOCABULARY,
        "filter_dim": 32,
        "encoder_num_layers": 2,
        "decoder_num_layers": 2,
        "hidden_dim": 32,
        "intermediate_dim": 64,
        "encoder_num_heads": 4,
        "decoder_num_heads": 4,
    },
    "DeiTBackbone": _VIT | {"intermediate_dim": 64},
    "DINOV2Backbone": _VIT | {"intermediate_dim": 64, "position_embedding_shape": _IMAGE},
    "DINOV3Backbone": _VIT | {"intermediate_dim": 64},
    "ViTBackbone": _VIT | {"mlp_dim": 64},
    "ViTDetBackbone": {
        "image_shape": (64, 64, 3),
        "patch_size": 8,
        "hidden_size": 32,
        "num_layers": 2,
        "intermediate_dim": 64,
        "num_heads": 4,
        "global_attention_layer_indices": [1],
        "num_output_channels": 16,
        "window_size": 4,
    },
    "MiTBackbone": {
        "layerwise_depths": [1, 1],
        "num_layers": 2,
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [4, 2],
        "max_drop_path_rate": 0.0,
        "layerwise_patch_sizes": [7, 3],
        "layerwise_strides": [4, 2],
        "image_shape": _IMAGE,
        "hidden_dims": [16, 32],
    },
    "SwinTransformerBackbone": {
        "image_shape": (64, 64, 3),
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "patch_size": 4,
        "drop_path": 0.0,
    },
    "CSPNetBackbone": {
        "stem_filters": 16,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_depth": [1, 2],
        "stackwise_strides": [1, 2],
        "stackwise_num_filters": [16, 32],
        "block_type": "dark_block",
        "stage_type": "dark",
        "image_shape": _IMAGE,
    },
    "DenseNetBackbone": {"stackwise_num_repeats": [2, 2, 2], "growth_rate": 8, "image_shape": _IMAGE},
    "EfficientNetBackbone": {
        "stackwise_width_coefficients": [1.0] * 3,
        "stackwise_depth_coefficients": [1.0] * 3,
        "stackwise_kernel_sizes": [3, 3, 5],
        "stackwise_num_repeats": [1, 2, 2],
        "stackwise_input_filters": [16, 16, 24],
        "stackwise_output_filters": [16, 24, 32],
        "stackwise_expansion_ratios": [1, 4, 4],
        "stackwise_squeeze_and_excite_ratios": [0.25, 0.0, 0.25],
        "stackwise_strides": [1, 2, 2],
        "stackwise_block_types": ["v1", "fused", "v1"],
        "stackwise_force_input_filters": [0, 0, 0],
        "stackwise_nores_option": [False] * 3,
        "dropout": 0.0,
        "input_shape": _IMAGE,
    },
    "HGNetV2Backbone": {
        "depths": [1, 2],
        "embedding_size": 16,
        "hidden_sizes": [32, 64],
        "stem_channels": [3, 8, 16],
        "hidden_act": "relu",
        "use_learnable_affine_block": True,
        "stackwise_stage_filters": [(16, 8, 32, 1, 2, 3), (32, 16, 64, 2, 2, 3)],
        "apply_downsample": [False, True],
        "use_lightweight_conv_block": [False, True],
        "image_shape": _IMAGE,
    },
    "MobileNetBackbone": {
        "stackwise_expansion": [[16, 24], [32, 48]],
        "stackwise_num_blocks": [2, 2],
        "stackwise_num_filters": [[16, 16], [24, 24]],
        "stackwise_kernel_size": [[3, 3], [5, 5]],
        "stackwise_num_strides": [[2, 1], [2, 1]],
        "stackwise_se_ratio": [[None, None], [0.25, 0.25]],
        "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]],
        "stackwise_padding": [[1, 1], [2, 2]],
        "output_num_filters": 64,
        "depthwise_filters": 8,
        "depthwise_stride": 2,
        "depthwise_residual": False,
        "last_layer_filter": 64,
        "squeeze_and_excite": 0.5,
        "input_num_filters": 16,
        "image_shape": _IMAGE,
    },
    "MobileNetV5Backbone": {
        "stackwise_block_types": [["er"], ["uir", "uir"]],
        "stackwise_num_blocks": [1, 2],
        "stackwise_num_filters": [[24], [32, 32]],
        "stackwise_strides": [[2], [2, 1]],
        "stackwise_act_layers": [["relu"], ["relu", "relu"]],
        "stackwise_exp_ratios": [[4.0], [4.0, 4.0]],
        "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
        "stackwise_dw_kernel_sizes": [[0], [5, 5]],
        "stackwise_dw_start_kernel_sizes": [[0], [0, 0]],
        "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
        "stackwise_exp_kernel_sizes": [[3], [0, 0]],
        "stackwise_pw_kernel_sizes": [[1], [0, 0]],
        "stackwise_num_heads": [[0], [0, 0]],
        "stackwise_key_dims": [[0], [0, 0]],
        "stackwise_value_dims": [[0], [0, 0]],
        "stackwise_kv_strides": [[0], [0, 0]],
        "stackwise_use_cpe": [[False], [False, False]],
        "use_msfa": False,
        "image_shape": _IMAGE,
    },
    "ResNetBackbone": {
        "input_conv_filters": [16],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 32],
        "stackwise_num_blocks": [2, 2],
        "stackwise_num_strides": [1, 2],
        "block_type": "bottleneck_block",
        "use_pre_activation": True,
        "image_shape": _IMAGE,
    },
    "VGGBackbone": {
        "stackwise_num_repeats": [1, 2],
        "stackwise_num_filters": [16, 32],
        "image_shape": _IMAGE,
    },
    "XceptionBackbone": {
        "stackwise_conv_filters": [[16, 32], [32, 64], [64, 64]],
        "stackwise_pooling": [True, True, False],
        "image_shape": (64, 64, 3),
    },
    "VideoPrismBackbone": {
        "num_frames": 4,
        "patch_size": 8,
        "hidden_dim": 32,
        "intermediate_dim": 64,
        "num_heads": 4,
        "num_spatial_layers": 2,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 0,
        "image_shape": _IMAGE,
    },
    "VAEBackbone": {
        "encoder_num_filters": [32, 32],
        "encoder_num_blocks": [1, 1],
        "decoder_num_filters": [32, 32],
        "decoder_num_blocks": [1, 1],
        "sampler_method": "mode",
        "sample_channels": 8,
    },
}
_KINDS = {  # those of the others are "image" where they take an image alone, else "language"
    "ESM2Backbone": "protein",
    "GptOssBackbone": "mixture of experts",
    "MixtralBackbone": "mixture of experts",
    "MoonshineBackbone": "speech",
    "QwenMoeBackbone": "mixture of experts",
    "Qwen3MoeBackbone": "mixture of experts",
    "RWKV7Backbone": "recurrent language",
    "VAEBackbone": "diffusion",
    "VideoPrismBackbone": "video",
    "WhisperBackbone": "speech",
}


def _inputs(rng: np.random.Generator, model: Any) -> Any:
    """Return inputs for a functional model, by the names and shapes of what it takes."""

    def one(name: str, spec: Any) -> jax.Array:
        name = f"{name} {spec.name}"
        sizes = _sizes(name, spec)
        if "mask" in name or "label" in name:
            return jnp.ones(sizes, spec.dtype)
        if "segment" in name or "position" in name:
            return jnp.zeros(sizes, spec.dtype)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return tokens(rng, _VOCABULARY, *sizes).astype(spec.dtype)
        return normal(rng, *sizes).astype(spec.dtype)

    taken = model.input
    if isinstance(taken, dict):
        return {name: one(name, spec) for name, spec in taken.items()}
    if isinstance(taken, list):
        return [one("", spec) for spec in taken]
    return one("", taken)


def _sizes(name: str, spec: Any) -> list[int]:
    if len(spec.shape) >= 4:
        free = [2, _SIZE, _SIZE, 3]
    elif "features" in name:
        free = [2, 32, 20]
    elif "encoder_input_values" in name or ("encoder_padding_mask" in name and "moonshine" in name):
        free = [2, 2000, 1]
    else:
        free = [2, _TIME, _TIME]
    return [size or free[at] for at, size in enumerate(spec.shape)]


def _backbone(rng: np.random.Generator, name: str) -> Case:
    models = module("keras_hub").models
    if name == "VAEBackbone":  # it is not public
        models = module("keras_hub.src.models.vae.vae_backbone")
    model = getattr(models, name)(**_PLAIN[name])
    inputs = _inputs(rng, model)
    if name == "MoonshineBackbone":
        inputs["encoder_padding_mask"] = jnp.ones(
            inputs["encoder_input_values"].shape[:2], inputs["encoder_padding_mask"].dtype
        )
    return keras_case(rng, model, inputs)


# --- those made of others


def _made(rng: np.random.Generator, build: Callable[[Any], Any]) -> Case:
    """Return the case of a backbone that is built from `keras_hub.models`."""
    model = build(module("keras_hub").models)
    inputs = _inputs(rng, model)
    if build is _pali_gemma:
        inputs["response_mask"] = jnp.zeros_like(inputs["response_mask"])
    return keras_case(rng, model, inputs)


def _clip(models: Any) -> Any:
    return _two_towers(models, "CLIP", projection_dim=24)


def _siglip(models: Any) -> Any:
    return _two_towers(models, "SigLIP")


def _two_towers(models: Any, name: str, **fields: Any) -> Any:
    vision = getattr(models, f"{name}VisionEncoder")(**_VIT | {"intermediate_dim": 64})
    text = getattr(models, f"{name}TextEncoder")(**_LONG | {"embedding_dim": 32})
    return getattr(models, f"{name}Backbone")(vision_encoder=vision, text_encoder=text, **fields)


def _pali_gemma(models: Any) -> Any:
    return models.PaliGemmaBackbone(
        **_DECODER,
        head_dim=8,
        image_size=_SIZE,
        vit_patch_size=8,
        vit_num_heads=4,
        vit_hidden_dim=32,
        vit_num_layers=2,
        vit_intermediate_dim=64,
    )


def _segformer(models: Any) -> Any:
    fields = _PLAIN["MiTBackbone"] | {
        "layerwise_depths": [1, 1, 1, 1],
        "num_layers": 4,
        "layerwise_num_heads": [1, 2, 2, 4],
        "layerwise_sr_ratios": [4, 2, 1, 1],
        "layerwise_patch_sizes": [7, 3, 3, 3],
        "layerwise_strides": [4, 2, 2, 2],
        "hidden_dims": [16, 24, 32, 48],
        "image_shape": (64, 64, 3),
    }
    return models.SegFormerBackbone(image_encoder=models.MiTBackbone(**fields), projection_filters=24)


def _resnet(models: Any) -> Any:
    fields = {
        "stackwise_num_filters": [64, 32, 48, 64],
        "stackwise_num_blocks": [1, 1, 1, 1],
        "stackwise_num_strides": [1, 2, 2, 2],
        "image_shape": (64, 64, 3),
    }
    return models.ResNetBackbone(**_PLAIN["ResNetBackbone"] | fields)


def _deeplab(models: Any) -> Any:
    return models.DeepLabV3Backbone(
        image_encoder=_resnet(models),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        dilation_rates=[2, 4],
        upsampling_size=4,
        projection_filters=16,
        image_shape=(64, 64, 3),
    )


def _retinanet(models: Any) -> Any:
    return models.RetinaNetBackbone(
        image_encoder=_resnet(models), min_level=3, max_level=5, use_p5=False, image_shape=(64, 64, 3)
    )


def _depth_anything(models: Any) -> Any:
    sizes = {"num_layers": 4, "image_shape": (64, 64, 3), "position_embedding_shape": (64, 64, 3)}
    return models.DepthAnythingBackbone(
        image_encoder=models.DINOV2Backbone(**_PLAIN["DINOV2Backbone"] | sizes, apply_layernorm=True),
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[16, 16, 24, 24],
        fusion_hidden_dim=16,
        head_hidden_dim=8,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    )


def _parseq(models: Any) -> Any:
    fields = _VIT | {"mlp_dim": 64, "use_class_token": False, "patch_size": (8, 8)}
    return models.PARSeqBackbone(
        image_encoder=models.ViTBackbone(**fields),
        vocabulary_size=_VOCABULARY,
        max_label_length=_TIME,
        decoder_hidden_dim=32,
        num_decoder_layers=1,
        num_decoder_heads=4,
        decoder_mlp_dim=64,
    )


def _sam(rng: np.random.Generator) -> Case:
    hub = module("keras_hub")
    encoder = hub.models.ViTDetBackbone(**_PLAIN["ViTDetBackbone"])
    prompt = hub.layers.SAMPromptEncoder(
        hidden_size=16, image_embedding_size=(8, 8), input_image_size=(64, 64), mask_in_channels=16
    )
    decoder = hub.layers.SAMMaskDecoder(
        num_layers=2,
        hidden_size=16,
        intermediate_dim=32,
        num_heads=4,
        embedding_dim=16,
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=16,
    )
    model = hub.models.SAMBackbone(image_encoder=encoder, prompt_encoder=prompt, mask_decoder=decoder)
    inputs = {
        "images": normal(rng, 1, 64, 64, 3),
        "points": normal(rng, 1, 1, 2),
        "labels": jnp.ones((1, 1)),
        "boxes": normal(rng, 1, 1, 2, 2),
        "masks": jnp.zeros((1, 0, 64, 64, 1)),
    }
    return keras_case(rng, model, inputs)


def _mmdit(rng: np.random.Generator) -> Case:
    mmdit = module("keras_hub.src.models.stable_diffusion_3.mmdit").MMDiT(
        patch_size=2,
        hidden_dim=32,
        num_layers=2,
        num_heads=4,
        position_size=16,
        qk_norm="rms_norm",
        latent_shape=(16, 16, 4),
        context_shape=(None, 24),
        pooled_projection_shape=(20,),
        output_dim=4,
    )
    inputs = {
        "latent": normal(rng, 2, 16, 16, 4),
        "context": normal(rng, 2, 6, 24),
        "pooled_projection": normal(rng, 2, 20),
        "timestep": jnp.abs(normal(rng, 2, 1)),
    }
    return keras_case(rng, mmdit, inputs)


_OTHERS: dict[str, tuple[Callable[[np.random.Generator], Case], str]] = {
    "CLIPBackbone": (partial(_made, build=_clip), "image and text"),
    "DeepLabV3Backbone": (partial(_made, build=_deeplab), "segmentation"),
    "DepthAnythingBackbone": (partial(_made, build=_depth_anything), "image"),
    "MMDiT": (_mmdit, "diffusion"),
    "PARSeqBackbone": (partial(_made, build=_parseq), "image and text"),
    "PaliGemmaBackbone": (partial(_made, build=_pali_gemma), "image and text"),
    "RetinaNetBackbone": (partial(_made, build=_retinanet), "detection"),
    "SAMBackbone": (_sam, "segmentation"),
    "SegFormerBackbone": (partial(_made, build=_segformer), "segmentation"),
    "SigLIPBackbone": (partial(_made, build=_siglip), "image and text"),
}
_PACKAGES = ("keras-hub", "keras")


def _kind(name: str) -> str:
    images = {"image_shape", "input_shape"} & _PLAIN[name].keys()
    return _KINDS.get(name, "image" if images else "language")


MODELS = (
    *(Model(f"keras_hub/{name}", _PACKAGES, partial(_backbone, name=name), _kind(name)) for name in _PLAIN),
    *(Model(f"keras_hub/{name}", _PACKAGES, build, kind) for name, (build, kind) in _OTHERS.items()),
)
