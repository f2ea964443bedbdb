"""Libraries of flax.linen models: diffusers, flaxmodels, nanodl, brax, netket and others."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import (
    Case,
    Model,
    from_linen,
    module,
    normal,
    old_names,
    tokens,
    variables_case,
)

_VOCABULARY = 64


# --- diffusers


_DOWN: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}


def _unet(rng: np.random.Generator, control: bool = False) -> Case:
    diffusers = module("diffusers")
    inputs = normal(rng, 1, 4, 16, 16), jnp.array([3.0]), normal(rng, 1, 6, 24)
    if control:
        model = diffusers.FlaxControlNetModel(**_DOWN, conditioning_embedding_out_channels=(8, 16))
        inputs = *inputs, normal(rng, 1, 3, 32, 32)
    else:
        up = ("UpBlock2D", "CrossAttnUpBlock2D")
        model = diffusers.FlaxUNet2DConditionModel(**_DOWN, up_block_types=up)
    return from_linen(rng, model, *inputs, call=lambda v, *xs: model.apply(v, *xs, return_dict=False))


def _autoencoder(rng: np.random.Generator) -> Case:
    model = module("diffusers").FlaxAutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
    )
    x = normal(rng, 1, 3, 16, 16)
    return from_linen(rng, model, x, call=lambda v, x: model.apply(v, x).sample)


# --- flaxmodels


_old_reshape = partial(old_names, "reshape", newshape="shape")  # as flaxmodels calls it


def _stylegan(rng: np.random.Generator, part: str) -> Case:
    stylegan = module("flaxmodels.stylegan2")
    sizes: dict[str, Any] = {"resolution": 16, "fmap_base": 256, "fmap_max": 32}
    if part == "D":
        model, x = stylegan.Discriminator(**sizes, mbstd_group_size=2), normal(rng, 2, 16, 16, 3)
        call = model.apply
    elif part == "mapping":
        model = stylegan.MappingNetwork(z_dim=24, w_dim=32, layer_features=32, num_ws=6, num_layers=3)
        x = normal(rng, 2, 24)
        call = partial(model.apply, train=False, skip_w_avg_update=True)
    else:
        model, x = stylegan.SynthesisNetwork(**sizes, w_dim=32), normal(rng, 2, 6, 32)
        call = partial(model.apply, noise_mode="const")

    def shimmed(variables: Any, x: jax.Array) -> Any:
        with _old_reshape():
            return call(variables, x)

    with _old_reshape():
        variables = model.init(jax.random.key(0), x)
    return variables_case(rng, variables, shimmed, (x,))


def _flaxmodels(rng: np.random.Generator, name: str) -> Case:
    make = getattr(module("flaxmodels"), name)
    model = make(output="logits", pretrained=None, num_classes=10)
    return from_linen(rng, model, normal(rng, 1, 64, 64, 3), train=False)


# --- nanodl

_DECODER: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "feedforward_dim": 64,
    "dropout": 0.0,
    "vocab_size": _VOCABULARY,
    "embed_dim": 32,
    "max_length": 12,
    "start_token": 0,
    "end_token": 1,
}
_GROUPED = _DECODER | {"num_groups": 2}
_EVEN = {"feedforward_dim": 32}  # in some, which add the hidden layer to its input, both are equally wide
_WINDOW = _GROUPED | {"window_size": 4, "shift_size": 2}
_IMAGE: dict[str, Any] = {
    "patch_size": (8, 8),
    "num_layers": 2,
    "hidden_dim": 32,
    "num_heads": 4,
    "feedforward_dim": 64,
    "dropout": 0.0,
    "n_outputs": 5,
}
_NANODL: dict[str, tuple[dict[str, Any], str, str]] = {
    "CLIP": (
        {
            "dropout": 0.0,
            "num_heads": 4,
            "feedforward_dim": 32,
            "num_layers_text": 2,
            "hidden_dim_text": 32,
            "image_patch_size": (8, 8),
            "hidden_dim_image": 32,
            "num_layers_images": 2,
            "max_len": 12,
            "vocab_size": _VOCABULARY,
            "embed_dim": 32,
        },
        "text and image",
        "image and text",
    ),
    "GPT3": (_DECODER, "text", "language"),
    "GPT4": (_DECODER | {"num_experts": 4, "top_k": 2}, "text", "mixture of experts"),
    "Gemma": (_GROUPED | _EVEN, "text", "language"),
    "LaMDA": (_DECODER, "text", "language"),
    "Llama3": (_GROUPED, "text", "language"),
    "Mistral": (_WINDOW, "text", "language"),
    "Mixer": (_IMAGE, "image", "image"),
    "Mixtral": (_WINDOW, "text", "mixture of experts"),
    "T5": (_DECODER, "pair", "language"),
    "Transformer": (_DECODER, "pair", "language"),
    "ViT": (_IMAGE | _EVEN, "image", "image"),
    "Whisper": (_DECODER, "speech", "speech"),
}


def _nanodl(rng: np.random.Generator, name: str) -> Case:
    fields, what, _ = _NANODL[name]
    model = getattr(module("nanodl"), name)(**fields)
    text, image = tokens(rng, _VOCABULARY, 2, 12), normal(rng, 2, 32, 32, 3)
    inputs = {
        "text": (text,),
        "image": (image,),
        "text and image": (text, image),
        "pair": (text, tokens(rng, _VOCABULARY, 2, 12)),
        "speech": (normal(rng, 2, 12, 32), text),
    }[what]
    return from_linen(rng, model, *inputs, training=False)


# --- others


def _tnt(rng: np.random.Generator) -> Case:
    tnt = module("transformer_in_transformer_flax.tnt")
    config = tnt.TNTConfig(
        num_classes=5,
        depth=2,
        image_size=32,
        patch_size=16,
        transformed_patch_size=4,
        inner_dim=16,
        inner_heads=2,
        inner_dim_head=8,
        outer_dim=32,
        outer_heads=4,
        outer_dim_head=8,
    )
    return from_linen(rng, tnt.TransformerInTransformer(config=config), normal(rng, 2, 32, 32, 3))


def _nano_moe(rng: np.random.Generator) -> Case:
    moe = module("nano_moe")
    config = moe.NanoMoEConfig(
        vocab_size=_VOCABULARY, n_layers=2, n_heads=4, d_model=32, d_ff=64, n_experts=4, block_size=12
    )
    return from_linen(rng, moe.NanoMoE(config), tokens(rng, _VOCABULARY, 2, 12))


def _ablang(rng: np.random.Generator) -> Case:
    ids = jnp.asarray(rng.integers(1, 21, (1, 10)), jnp.int32)
    model = module("ablang_jax").Ablanx()
    return from_linen(rng, model, ids, jnp.zeros((1, 10), bool))


def _brax(rng: np.random.Generator, kind: str) -> Case:
    networks = module("brax.training.networks")
    if kind == "VisionMLP":
        model = networks.VisionMLP((32, 24, 4), layer_norm=True)
        return from_linen(rng, model, {"pixels/view": normal(rng, 2, 64, 64, 3)})
    if kind == "DistributionalCritic":
        swish = module("flax.linen").swish
        start = jax.nn.initializers.lecun_uniform()
        model = networks.DistributionalCritic((32, 24), swish, start)
        return from_linen(rng, model, normal(rng, 3, 10))
    if kind == "q network":
        made = networks.make_q_network(10, 3, hidden_layer_sizes=(32, 24))
        params = made.init(jax.random.key(0))
        inputs = normal(rng, 3, 10), normal(rng, 3, 3)
        return variables_case(rng, params, lambda v, *xs: made.apply(None, v, *xs), inputs)
    return from_linen(rng, networks.MLP((32, 24, 4), layer_norm=True), normal(rng, 3, 10))


def _netket(rng: np.random.Generator, kind: str) -> Case:
    netket = module("netket")
    models, spins = netket.models, jnp.asarray(rng.choice([-1.0, 1.0], (4, 8)), jnp.float32)
    if kind in ("RBM", "NDM"):
        if kind == "NDM":
            spins = jnp.concatenate([spins, spins[:, ::-1]], axis=-1)
        return from_linen(rng, getattr(models, kind)(param_dtype=jnp.float32), spins)
    if kind == "MLP":
        return from_linen(rng, models.MLP(hidden_dims=(24, 16), param_dtype=jnp.float32), spins)
    if kind == "DeepSetMLP":
        model = models.DeepSetMLP(features_phi=(24, 16), features_rho=(20,), param_dtype=jnp.float32)
        return from_linen(rng, model, spins[..., None])
    space = netket.hilbert.Spin(0.5, 8)
    if kind == "GCNN":
        chain = netket.graph.Chain(8)
        model = models.GCNN(chain, layers=2, features=(8, 6), param_dtype=jnp.float32)
        return from_linen(rng, model, spins)
    fields = {"kernel_size": 3} if "Conv" in kind else {}
    model = getattr(models, kind)(
        hilbert=space, layers=3, features=8, param_dtype=jnp.float32, activation=jax.nn.gelu, **fields
    )
    return from_linen(rng, model, spins)


def _e3nn(rng: np.random.Generator) -> Case:
    """Build equivariant layers between scalars, vectors and the harmonics of a direction."""
    e3nn, nn = module("e3nn_jax"), module("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, direction: jax.Array) -> jax.Array:
            hidden = e3nn.flax.Linear("16x0e")(e3nn.IrrepsArray("4x0e", x))
            around = e3nn.spherical_harmonics("0e + 1o", e3nn.IrrepsArray("1o", direction), True)
            hidden = e3nn.tensor_product(hidden, around, filter_ir_out=["0e", "1o"])
            hidden = e3nn.flax.Linear("24x0e + 8x1o")(hidden)
            hidden = e3nn.scalar_activation(hidden, [jax.nn.silu, None])
            return e3nn.flax.Linear("2x0e + 1x1o")(hidden).array

    return from_linen(rng, Net(), normal(rng, 5, 4), normal(rng, 5, 3))


def _e3nn_mlp(rng: np.random.Generator) -> Case:
    made = module("e3nn_jax").flax.MultiLayerPerceptron((24, 16, 3), act=jax.nn.silu)
    return from_linen(rng, made, normal(rng, 5, 4))


_OTHERS: dict[str, tuple[tuple[str, ...], Callable[[np.random.Generator], Case], str]] = {
    "diffusers/FlaxAutoencoderKL": (("diffusers",), _autoencoder, "diffusion"),
    "diffusers/FlaxControlNet": (("diffusers",), partial(_unet, control=True), "diffusion"),
    "diffusers/FlaxUNet2DCondition": (("diffusers",), _unet, "diffusion"),
    "e3nn-jax/MultiLayerPerceptron": (("e3nn-jax",), _e3nn_mlp, "layers"),
    "transformer-in-transformer-flax/TNT": (("transformer-in-transformer-flax",), _tnt, "image"),
    "nano-moe-jax/NanoMoE": (("nano-moe-jax",), _nano_moe, "mixture of experts"),
    "ablanx/AbLang2": (("ablanx",), _ablang, "protein"),
}
_SHIM = "jnp.reshape(newshape=) is shimmed, which JAX has renamed"
_FLAXMODELS = ("ResNet18", "ResNet50", "VGG16")
_BRAX = ("MLP", "VisionMLP", "DistributionalCritic", "q network")
_NETKET = ("RBM", "NDM", "MLP", "DeepSetMLP", "GCNN", "ARNNDense", "ARNNConv1D", "FastARNNConv1D")
MODELS = (
    Model("e3nn-jax/equivariant layers", ("e3nn-jax",), _e3nn, "physics", ours=True),
    *(Model(f"brax/{kind}", ("brax",), partial(_brax, kind=kind), "reinforcement") for kind in _BRAX),
    *(Model(f"netket/{kind}", ("netket",), partial(_netket, kind=kind), "physics") for kind in _NETKET),
    *(
        Model(f"nanodl/{name}", ("nanodl",), partial(_nanodl, name=name), _NANODL[name][2])
        for name in _NANODL
    ),
    *(Model(name, packages, build, kind) for name, (packages, build, kind) in _OTHERS.items()),
    *(
        Model(
            f"flaxmodels/StyleGAN2 {part}",
            ("flaxmodels",),
            partial(_stylegan, part=part),
            "generative",
            note=_SHIM,
        )
        for part in ("D", "mapping", "synthesis")
    ),
    *(
        Model(f"flaxmodels/{name}", ("flaxmodels",), partial(_flaxmodels, name=name), "image")
        for name in _FLAXMODELS
    ),
)
