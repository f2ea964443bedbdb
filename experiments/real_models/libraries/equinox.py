"""Libraries of equinox models: equimo, pdequinox, flowjax, transformer-flows; and equinox' own networks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, from_equinox, module, normal

_KEY = jax.random.key


def _image(rng: np.random.Generator, size: int, model: Any) -> Case:
    def call(model: Any, x: jax.Array) -> Any:
        return model(x, key=jax.random.PRNGKey(0), inference=True)

    return from_equinox(rng, model, normal(rng, 2, 3, size, size), call=call)


# --- equimo


# By name, what each takes beside the number of classes and a key.
_VIT: dict[str, Any] = {
    "img_size": 32,
    "in_channels": 3,
    "dim": 32,
    "patch_size": 8,
    "num_heads": [4],
    "depths": [2],
    "reg_tokens": 2,
}
_STAGED: dict[str, Any] = {
    "img_size": 64,
    "in_channels": 3,
    "dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
}
_EQUIMO: dict[str, tuple[str, dict[str, Any]]] = {
    "ConvNeXt": ("ConvNeXt", {"in_channels": 3, "depths": [1, 1, 2, 1], "dims": [16, 24, 32, 48]}),
    "Mlla": ("Mlla", _STAGED),
    "ReduceFormer": (
        "ReduceFormer",
        {
            "in_channels": 3,
            "widths": [16, 24, 32, 48],
            "depths": [1, 1, 1, 1],
            "block_types": ["conv", "conv", "attention", "attention"],
            "head_dim": 8,
        },
    ),
    "VSSD(mamba2)": ("Vssd", _STAGED | {"d_state": 8}),
    "ViT dinov3-like rope swiglu": (
        "VisionTransformer",
        _VIT
        | {
            "num_heads": 4,
            "use_global_pos_embed": False,
            "use_local_pos_embed": True,
            "ffn_layer": "swiglu",
        },
    ),
    "VisionTransformer": ("VisionTransformer", _VIT),
    "LowFormer": (
        "LowFormer",
        {
            "in_channels": 3,
            "widths": [8, 16, 24, 32, 48],
            "depths": [1, 1, 1, 1, 1],
            "att_strides": [1, 1, 1, 1, 1],
            "block_types": ["conv", "conv", "conv", "attention", "attention"],
            "attention_type": "softmax",
        },
    ),
    "iformer_t": ("iformer_t", {"in_channels": 3}),
    "mobilenetv3_small": ("mobilenetv3_small", {"in_channels": 3}),
}


def _equimo(rng: np.random.Generator, name: str) -> Case:
    kind, fields = _EQUIMO[name]
    make = getattr(module("equimo.models"), kind)
    size = 32 if kind == "VisionTransformer" else 64
    return _image(rng, size, make(**fields, num_classes=5, key=jax.random.PRNGKey(0)))


# --- networks for partial differential equations


_PDE: dict[str, dict[str, Any]] = {
    "ClassicFNO": {"hidden_channels": 12, "num_modes": 4, "num_blocks": 2},
    "ClassicResNet": {"hidden_channels": 16, "num_blocks": 2},
    "ClassicUNet": {"hidden_channels": 8, "num_levels": 2},
    "ConvNet": {"hidden_channels": 16, "depth": 3},
    "DilatedResNet": {"hidden_channels": 12, "num_blocks": 1},
    "MLP": {"num_points": 16, "width_size": 24, "depth": 2},
    "ModernResNet": {"hidden_channels": 16, "num_blocks": 2},
    "ModernUNet": {"hidden_channels": 8, "num_levels": 2, "num_blocks": 1},
}


def _pdequinox(rng: np.random.Generator, name: str) -> Case:
    dimensions = 1 if name in ("ClassicFNO", "MLP", "DilatedResNet") else 2
    model = getattr(module("pdequinox.arch"), name)(dimensions, 2, 2, **_PDE[name], key=_KEY(0))
    return from_equinox(rng, model, normal(rng, 2, 2, *[16] * dimensions))


# --- flows


_FLOWS: dict[str, dict[str, Any]] = {
    "block_neural_autoregressive_flow": {"nn_block_dim": 4},
    "coupling_flow": {"flow_layers": 2, "nn_width": 24},
    "masked_autoregressive_flow": {"flow_layers": 2, "nn_width": 24},
    "planar_flow": {"flow_layers": 2, "cond_dim": 3, "width_size": 24, "depth": 2},
    "triangular_spline_flow": {"flow_layers": 2, "knots": 4},
}


def _flow(rng: np.random.Generator, name: str) -> Case:
    flows, distributions = module("flowjax.flows"), module("flowjax.distributions")
    unwrap = module("paramax").unwrap
    flow = getattr(flows, name)(_KEY(0), base_dist=distributions.Normal(jnp.zeros(4)), **_FLOWS[name])

    def call(flow: Any, *xs: jax.Array) -> Any:
        return unwrap(flow).log_prob(*xs)

    inputs = (normal(rng, 3, 4), *([normal(rng, 3, 3)] if name == "planar_flow" else []))
    return from_equinox(rng, flow, *inputs, call=call, batched=False)


def _transformer_flow(rng: np.random.Generator) -> Case:
    model = module("transformer_flows").TransformerFlow(
        n_channels=1,
        img_size=8,
        patch_size=2,
        channels=32,
        n_blocks=2,
        layers_per_block=2,
        head_dim=8,
        expansion=2,
        key=_KEY(0),
    )
    return from_equinox(rng, model, normal(rng, 2, 1, 8, 8), call=lambda model, x: model.forward(x, None))


# --- equinox' own


def _mlp(rng: np.random.Generator) -> Case:
    eqx = module("equinox")
    return from_equinox(rng, eqx.nn.MLP(6, 4, 24, 3, key=_KEY(0)), normal(rng, 3, 6))


def _recurrent(rng: np.random.Generator) -> Case:
    """Return a GRU under `lax.scan`, as equinox' documentation has it."""
    eqx = module("equinox")
    keys = jax.random.split(_KEY(0), 3)
    model = (
        eqx.nn.GRUCell(6, 20, key=keys[0]),
        eqx.nn.LSTMCell(20, 16, key=keys[1]),
        eqx.nn.Linear(16, 3, key=keys[2]),
    )

    def call(model: Any, x: jax.Array) -> jax.Array:
        gru, lstm, head = model

        def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
            hidden, state = carry
            hidden = gru(x, hidden)
            return (hidden, lstm(hidden, state)), None

        carry = jnp.zeros(20), (jnp.zeros(16), jnp.zeros(16))
        (_, (last, _)), _ = jax.lax.scan(step, carry, x)
        return head(last)

    return from_equinox(rng, model, normal(rng, 2, 7, 6), call=call)


def _attention(rng: np.random.Generator) -> Case:
    eqx = module("equinox")
    keys = jax.random.split(_KEY(0), 4)
    model = (
        eqx.nn.Linear(6, 16, key=keys[0]),
        eqx.nn.MultiheadAttention(4, 16, key=keys[1]),
        eqx.nn.LayerNorm(16),
        eqx.nn.MLP(16, 3, 32, 1, key=keys[2]),
    )

    def call(model: Any, x: jax.Array) -> jax.Array:
        first, attention, norm, last = model
        x = jax.vmap(first)(x)
        x = jax.vmap(norm)(x + attention(x, x, x))
        return jax.vmap(last)(x)

    return from_equinox(rng, model, normal(rng, 2, 7, 6), call=call)


_OWN: dict[str, Callable[[np.random.Generator], Case]] = {
    "MLP": _mlp,
    "GRU and LSTM under scan": _recurrent,
    "attention block": _attention,
}
MODELS = (
    *(
        Model(f"equinox/{name}", ("equinox",), build, "layers", ours=name != "MLP")
        for name, build in _OWN.items()
    ),
    *(Model(f"flowjax/{name}", ("flowjax",), partial(_flow, name=name), "flow") for name in _FLOWS),
    Model(
        "transformer-flows/TarFlow",
        ("transformer-flows",),
        _transformer_flow,
        "flow",
        note="among its leaves are caches for sampling, which it does not read here, so that less is left",
    ),
    *(Model(f"pdequinox/{name}", ("pdequinox",), partial(_pdequinox, name=name), "physics") for name in _PDE),
    *(Model(f"equimo/{name}", ("equimo",), partial(_equimo, name=name), "image") for name in _EQUIMO),
)
