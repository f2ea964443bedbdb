"""Haiku's networks, and graph networks of jraph with haiku's layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, from_haiku, module, normal, tokens


def _net(rng: np.random.Generator, name: str) -> Case:
    hk = module("haiku")
    nets = hk.nets
    if name == "MLP":
        return from_haiku(rng, lambda x: nets.MLP([32, 24, 4])(x), normal(rng, 3, 10))
    if name == "MobileNetV1":
        image = normal(rng, 1, 64, 64, 3)
        return from_haiku(rng, lambda x, mode: nets.MobileNetV1(num_classes=10)(x, mode), image, modes=True)
    if name == "VQ-VAE":

        def quantized(x: jax.Array) -> Any:
            hidden = jax.nn.relu(hk.Conv2D(24, 3, stride=2)(x))
            hidden = hk.Conv2D(8, 3)(jax.nn.relu(hk.Conv2D(16, 3)(hidden)))
            codes = nets.VectorQuantizer(8, 12, 0.25)(hidden, is_training=False)["quantize"]
            hidden = jax.nn.relu(hk.Conv2DTranspose(16, 3, stride=2)(codes))
            return hk.Conv2D(3, 3)(hidden)

        return from_haiku(rng, quantized, normal(rng, 2, 16, 16, 3))
    if name == "DeepRNN LSTM GRU":

        def recurrent(x: jax.Array) -> Any:
            core = hk.DeepRNN([hk.LSTM(24), jax.nn.relu, hk.GRU(20)])
            outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
            return hk.Linear(4)(jax.nn.relu(hk.Linear(16)(outputs)))

        return from_haiku(rng, recurrent, normal(rng, 6, 2, 8))
    if name == "Transformer":

        def transformer(ids: jax.Array) -> Any:
            start = hk.initializers.VarianceScaling(0.5)
            x = hk.Embed(64, 32)(ids)
            mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
            for _ in range(2):
                y = hk.LayerNorm(-1, True, True)(x)
                x = x + hk.MultiHeadAttention(4, 8, w_init=start, model_size=32)(y, y, y, mask=mask)
                y = hk.LayerNorm(-1, True, True)(x)
                x = x + hk.Linear(32)(jax.nn.gelu(hk.Linear(64)(y)))
            return hk.Linear(64)(hk.LayerNorm(-1, True, True)(x))

        return from_haiku(rng, transformer, tokens(rng, 64, 2, 8))
    make = getattr(nets, name)
    return from_haiku(rng, lambda x, mode: make(10)(x, mode), normal(rng, 1, 64, 64, 3), modes=True)


def _graph(rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, int]:
    nodes, edges = 7, 16
    return (
        normal(rng, nodes, 6),
        normal(rng, edges, 3),
        jnp.asarray(rng.integers(0, nodes, edges)),
        jnp.asarray(rng.integers(0, nodes, edges)),
        nodes,
    )


def _jraph(rng: np.random.Generator, name: str) -> Case:
    hk, jraph = module("haiku"), module("jraph")
    nodes, edges, senders, receivers, size = _graph(rng)

    def graph(x: jax.Array, e: jax.Array) -> Any:
        counts = jnp.array([size]), jnp.array([len(senders)])
        return jraph.GraphsTuple(x, e, receivers, senders, jnp.ones((1, 2)), *counts)

    def mlp(*widths: int) -> Callable[..., jax.Array]:
        return jraph.concatenated_args(lambda x: hk.nets.MLP(widths)(x))

    def gcn(x: jax.Array, e: jax.Array) -> Any:
        g = graph(x, e)
        for width in (24, 16):
            layer = jraph.GraphConvolution(
                lambda n, width=width: jax.nn.relu(hk.Linear(width)(n)), add_self_edges=True
            )
            g = layer(g)
        return hk.Linear(3)(g.nodes)

    def gat(x: jax.Array, e: jax.Array) -> Any:
        layer = jraph.GAT(
            attention_query_fn=lambda n: hk.Linear(48)(n),
            attention_logit_fn=lambda q, k, e: hk.Linear(1)(jax.nn.leaky_relu(jnp.concatenate([q, k], -1))),
            node_update_fn=lambda n: jax.nn.relu(n),
        )
        return hk.Linear(3)(layer(graph(x, e)._replace(edges=None)).nodes)

    def network(x: jax.Array, e: jax.Array) -> Any:
        g = graph(x, e)
        for _ in range(2):
            g = jraph.GraphNetwork(mlp(24, 16), mlp(24, 16), mlp(24, 8))(g)
        return hk.Linear(3)(g.nodes), hk.Linear(2)(g.globals)

    def interaction(x: jax.Array, e: jax.Array) -> Any:
        g = jraph.InteractionNetwork(mlp(24, 16), mlp(24, 16))(graph(x, e))
        return hk.Linear(3)(g.nodes)

    def deep_sets(x: jax.Array, e: jax.Array) -> Any:
        return hk.Linear(3)(jraph.DeepSets(mlp(24, 16), mlp(24, 16))(graph(x, e)).globals)

    functions = {
        "DeepSets": deep_sets,
        "GAT": gat,
        "GCN": gcn,
        "GraphNetwork": network,
        "InteractionNetwork": interaction,
    }
    return from_haiku(rng, functions[name], nodes, edges)


_NETS = {
    "MLP": "layers",
    "DeepRNN LSTM GRU": "recurrent",
    "Transformer": "language",
    "VQ-VAE": "generative",
    "MobileNetV1": "image",
    "ResNet18": "image",
    "ResNet50": "image",
}
_OURS = ("DeepRNN LSTM GRU", "Transformer", "VQ-VAE")
MODELS = (
    *(
        Model(f"haiku/{name}", ("dm-haiku",), partial(_net, name=name), kind, ours=name in _OURS)
        for name, kind in _NETS.items()
    ),
    *(
        Model(f"jraph/{name}", ("jraph", "dm-haiku"), partial(_jraph, name=name), "graph")
        for name in ("DeepSets", "GAT", "GCN", "GraphNetwork", "InteractionNetwork")
    ),
)
