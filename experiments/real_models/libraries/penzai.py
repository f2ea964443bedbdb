"""Penzai's transformers, as lists of blocks and stacked, and a perceptron of its layers."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, module, moved, normal, tokens

_VOCABULARY, _TIME = 64, 8


def _case(rng: np.random.Generator, model: Any, call: Callable[..., Any], *inputs: jax.Array) -> Case:
    """Return a model as a function of its parameters, by their labels."""
    pz = module("penzai.pz")
    unbound, frozen = pz.unbind_params(model, freeze=True)
    tree = jax.tree.structure(frozen)
    labels = [str(variable.label) for variable in frozen]
    params = dict(zip(labels, jax.tree.leaves(frozen), strict=True))

    def apply(params: Any, *xs: jax.Array) -> Any:
        values = jax.tree.unflatten(tree, [params[label] for label in labels])
        return call(pz.bind_variables(unbound, values), *xs)

    return Case(apply, moved(params, rng), inputs)


def _language(rng: np.random.Generator, kind: str, stacked: bool) -> Case:
    pz = module("penzai.pz")
    variants = "penzai.models.transformer.variants"
    if kind == "gpt-neox":
        library = module(f"{variants}.gpt_neox")
        config = library.GPTNeoXTransformerConfig(
            num_attention_heads=4,
            embedding_dim=32,
            projection_dim=8,
            mlp_hidden_dim=48,
            num_decoder_blocks=3,
            vocab_size=_VOCABULARY,
            activation_fn="gelu_exact",
            rope_subset_size=4,
            rope_wavelength=10_000,
            layernorm_epsilon=1e-5,
            parameter_dtype=jnp.float32,
            activation_dtype=jnp.float32,
            use_layer_stack=stacked,
        )
        model = library.build_gpt_neox_transformer(config, init_base_rng=jax.random.key(0))
    else:
        library = module(f"{variants}.llamalike_common")
        gemma = kind == "gemma-like"
        config = library.LlamalikeTransformerConfig(
            num_kv_heads=1 if gemma else 2,
            query_head_multiplier=4 if gemma else 2,
            embedding_dim=32,
            projection_dim=8,
            mlp_hidden_dim=48,
            num_decoder_blocks=3,
            vocab_size=_VOCABULARY,
            mlp_variant="geglu_approx" if gemma else "swiglu",
            tie_embedder_and_logits=gemma,
            use_layer_stack=stacked,
        )
        model = library.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))

    def call(model: Any, ids: jax.Array) -> Any:
        named = pz.nx.wrap(ids).tag("batch", "seq")
        return model(named).unwrap("batch", "seq", "vocabulary")

    return _case(rng, model, call, tokens(rng, _VOCABULARY, 2, _TIME))


def _mlp(rng: np.random.Generator) -> Case:
    pz = module("penzai.pz")
    widths = (10, 32, 24, 4)
    layers = []
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        layers.append(
            pz.nn.Affine.from_config(
                name=f"mlp/affine_{number}",
                init_base_rng=jax.random.key(0),
                input_axes={"features": before},
                output_axes={"features_out": after},
            )
        )
        layers.append(pz.nn.RenameAxes("features_out", "features"))
        if after != widths[-1]:
            layers.append(pz.nn.Elementwise(jax.nn.relu))
    model = pz.nn.Sequential(layers)

    def call(model: Any, x: jax.Array) -> Any:
        return model(pz.nx.wrap(x).tag("batch", "features")).unwrap("batch", "features")

    return _case(rng, model, call, normal(rng, 3, 10))


MODELS = (
    Model("penzai/MLP", ("penzai",), _mlp, "layers", ours=True),
    *(
        Model(
            f"penzai/{kind}{' stacked' if stacked else ''}",
            ("penzai",),
            partial(_language, kind=kind, stacked=stacked),
            "stacked language" if stacked else "language",
        )
        for kind in ("llama-like", "gemma-like", "gpt-neox")
        for stacked in (False, True)
    ),
)
