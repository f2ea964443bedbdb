"""Libraries of flax.nnx models: tunix, mamba2-jax, mamba3-jax, jraphx, attnax, jaxKAN, jax-image-models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, from_nnx, module, normal, tokens

_VOCABULARY, _TIME = 64, 8


def _rngs() -> Any:
    return module("flax.nnx").Rngs(0)


# --- tunix

_TUNIX: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}
_ROPE: dict[str, Any] = {"vocab_size": _VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-5}


def _tunix(rng: np.random.Generator, name: str) -> Case:
    kind = name.partition("-")[0]
    models = module(f"tunix.models.{kind}.model")
    gemma = {"num_embed": _VOCABULARY, "sliding_window_size": 4}
    fields: dict[str, Any] = gemma if kind.startswith("gemma") else dict(_ROPE)
    if name == "qwen3-moe":
        fields |= {"num_experts": 4, "num_experts_per_tok": 2}
    elif kind == "gemma3":
        fields |= {"param_dtype": jnp.float32}
    elif kind == "gemma4":
        fields |= {"global_key_size": 8}
    elif kind == "gemma":
        types = models.AttentionType
        fields |= {
            "final_logit_softcap": 30.0,
            "use_post_attn_norm": True,
            "use_post_ffw_norm": True,
            "attention_types": (types.GLOBAL, types.LOCAL_SLIDING),
            "attn_logits_soft_cap": 50.0,
        }
    config = models.ModelConfig(**_TUNIX, **fields)
    made = getattr(models, kind.capitalize())(config, rngs=_rngs())
    places = jnp.tile(jnp.arange(_TIME), (2, 1))
    mask = jnp.tile(jnp.tril(jnp.ones((_TIME, _TIME), bool)), (2, 1, 1))

    def call(model: Any, ids: jax.Array) -> Any:
        return model(ids, places, None, mask)[0]

    return from_nnx(rng, made, tokens(rng, _VOCABULARY, 2, _TIME), call=call)


# --- state-space models


def _mamba(rng: np.random.Generator, generation: int, kind: str) -> Case:
    library = module(f"mamba{generation}_jax")
    if kind == "forecaster":
        made = getattr(library, f"Mamba{generation}Forecaster")(
            input_dim=3,
            d_model=32,
            n_layers=2,
            forecast_horizon=4,
            d_state=8,
            headdim=8,
            chunk_size=8,
            rngs=_rngs(),
        )
        return from_nnx(rng, made, normal(rng, 2, 16, 3))
    fields: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 32,
        "state_size": 8,
        "head_dim": 8,
        "chunk_size": 4,
        "num_hidden_layers": 2,
    }
    if kind == "mimo":
        fields |= {"is_mimo": True, "mimo_rank": 2}
    made = getattr(library, f"Mamba{generation}ForCausalLM")(
        getattr(library, f"Mamba{generation}Config")(**fields), rngs=_rngs()
    )

    def call(model: Any, ids: jax.Array) -> Any:
        out = model(ids)
        return out["logits"] if isinstance(out, dict) else out.logits

    return from_nnx(rng, made, tokens(rng, _VOCABULARY, 2, _TIME), call=call)


# --- graphs


def _jraphx(rng: np.random.Generator, kind: str) -> Case:
    library = module("jraphx.nn.models")
    nodes, edges = 7, 16
    x = normal(rng, nodes, 6)
    index = jnp.asarray(rng.integers(0, nodes, (2, edges)), jnp.int32)
    fields: dict[str, Any] = {"in_features": 6, "hidden_features": 16, "num_layers": 3, "out_features": 4}
    if kind.startswith("GAT"):
        made = library.GAT(**fields, heads=4, v2=kind == "GATv2", rngs=_rngs())
    elif kind == "TransformerConv":
        made = module("jraphx.nn.conv").TransformerConv(6, 8, heads=3, rngs=_rngs())
    elif kind == "JumpingKnowledge":
        made = library.GraphSAGE(**fields, jk="cat", norm="layer_norm", rngs=_rngs())
    else:
        made = getattr(library, kind)(**fields, rngs=_rngs())
    return from_nnx(rng, made, x, index)


# --- attention of many kinds


def _attnax(rng: np.random.Generator, kind: str) -> Case:
    library, rngs = module("attnax"), _rngs()
    fields: dict[str, Any] = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64}
    if kind == "MixtureOfExperts":
        x = normal(rng, 2, _TIME, 16)
        made = library.MixtureOfExperts(rngs, d_model=16, d_ff=24, num_experts=4, top_k=2)
    elif kind == "VisionTransformer":
        x = normal(rng, 2, 32, 32, 3)
        config = library.VisionTransformerConfig(image_size=32, patch_size=8, num_classes=5, **fields)
        made = module("attnax.vision").VisionTransformer(rngs, config)
    else:
        x = tokens(rng, _VOCABULARY, 2, _TIME)
        fields |= {"vocab_size": _VOCABULARY, "max_len": _TIME, "dropout_rate": 0.0}
        if kind.startswith("decoder"):
            fields |= {
                "pos_emb_type": "rope",
                "ff_activation": "swiglu",
                "norm_type": "rms",
                "num_kv_heads": 2,
            }
        elif "linear" in kind:
            fields |= {"attention_type": library.AttentionType.LINEAR, "linear_attention_chunk_size": 4}
        side = "Decoder" if kind.startswith("decoder") else "Encoder"
        make = getattr(module("attnax.transformer"), f"Transformer{side}")
        made = make(rngs, library.TransformerConfig(**fields))
    return from_nnx(rng, made, x, call=lambda model, x: model(x, deterministic=True))


# --- splines


def _jaxkan(rng: np.random.Generator, kind: str) -> Case:
    x = jnp.tanh(normal(rng, 5, 3))
    if kind == "KKAN":
        made = module("jaxkan.models.KKAN").KKAN(n_in=3, n_out=2, m=12, D_e=4, H=10, L=2)
    elif kind == "ActNet":
        made = module("jaxkan.models.ActNet").ActNet([3, 12, 10, 2], N=4)
    else:
        layer = kind.partition(" ")[2]
        fields = {"k": 3, "G": 5} if layer in ("base", "spline") else {"D": 4}
        made = module("jaxkan.models.KAN").KAN([3, 12, 8, 2], layer, fields)
    return from_nnx(rng, made, x)


# --- jax-image-models


def _jimm(rng: np.random.Generator, kind: str) -> Case:
    axes = jax.sharding.AxisType
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "model"), axis_types=(getattr(axes, kind.capitalize()),) * 3
    )
    with jax.set_mesh(mesh):
        made = module("jimm").VisionTransformer(
            num_classes=5,
            img_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=4,
            mlp_dim=64,
            hidden_size=32,
            rngs=_rngs(),
        )
        made.eval()
        case = from_nnx(rng, made, normal(rng, 2, 32, 32, 3))

    def apply(params: Any, x: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return case.apply(params, x)

    return case._replace(apply=apply)


_JIMM = ("jax-image-models", "tokamax")
_LANGUAGE = "language"
MODELS = (
    *(
        Model(f"jraphx/{kind}", ("jraphx",), partial(_jraphx, kind=kind), "graph")
        for kind in ("GCN", "GAT", "GATv2", "GIN", "GraphSAGE", "JumpingKnowledge", "TransformerConv")
    ),
    *(
        Model(f"jaxkan/{kind}", ("jaxkan",), partial(_jaxkan, kind=kind), "splines")
        for kind in ("KAN base", "KAN spline", "KAN chebyshev", "KAN sine", "KKAN", "ActNet")
    ),
    *(
        Model(f"attnax/{kind}", ("attnax",), partial(_attnax, kind=kind), what)
        for kind, what in {
            "encoder": _LANGUAGE,
            "encoder, linear attention": _LANGUAGE,
            "decoder, rope, swiglu, grouped queries": _LANGUAGE,
            "VisionTransformer": "image",
            "MixtureOfExperts": "mixture of experts",
        }.items()
    ),
    *(
        Model(f"tunix/{name}", ("google-tunix",), partial(_tunix, name=name), what)
        for name, what in {
            "gemma": _LANGUAGE,
            "gemma3": _LANGUAGE,
            "gemma4": _LANGUAGE,
            "llama3": _LANGUAGE,
            "qwen2": _LANGUAGE,
            "qwen3": _LANGUAGE,
            "qwen3-moe": "mixture of experts",
        }.items()
    ),
    Model("nnx/jimm VisionTransformer auto", _JIMM, partial(_jimm, kind="auto"), "image"),
    *(
        Model(
            f"nnx/mamba{generation}-jax{name}",
            (f"mamba{generation}-jax",),
            partial(_mamba, generation=generation, kind=kind),
            "state space",
        )
        for generation, name, kind in (
            (2, "", "language"),
            (2, " forecaster", "forecaster"),
            (3, "", "language"),
            (3, " mimo", "mimo"),
            (3, " forecaster", "forecaster"),
        )
    ),
)
