"""Which params are the weights of a network's products, by what the network does and not by names."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.roles import weights

X = jnp.ones((2, 4))
IDS = jnp.zeros((2, 3), jnp.int32)


def roles(function, params, *inputs):
    return set(weights(TracedNetwork(function, params, inputs)))


def scan_layers(p, x):
    return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["a"] * layer["b"]), None), x, p["stack"])[0]


def loop(p, x):
    def step(i, h):
        return jnp.tanh(h @ p["a"][i] + p["b"])

    return jax.lax.fori_loop(0, 3, step, x)


def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(h @ p["a"] + x @ p["c"]), None

    return jax.lax.scan(step, jnp.broadcast_to(p["b"], (2, 4)), x[None])[0]


def modulated(p, x):
    style = jnp.tanh(x @ p["a"])[:, None, :]
    w = p["weight"] * style
    w = w * jax.lax.rsqrt(jnp.sum(w**2, axis=-1, keepdims=True) + 1e-6)
    return jnp.einsum("boi,bi->bo", w, x)


def experts(p, x, ids):
    return jnp.einsum("bi,bio->bo", x, p["w"][ids[:, 0]])


def taps(p, x):
    return sum(x[:, i : i + 2] * p["w"][i] for i in range(3))


def branches(p, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: x @ p["c"] + p["b"])


# name: a function, the shapes of its params, its inputs; of the params those that are weights.
FUNCTIONS = {
    "named as an embedding": (lambda p, x: x @ p["embedding"], {"embedding": (4, 5)}, (X,), "embedding"),
    "looked up, named as a kernel": (lambda p, i: p["kernel"][i], {"kernel": (9, 4)}, (IDS,), ""),
    "taken": (lambda p, i: jnp.take(p["w"], i, axis=0), {"w": (9, 4)}, (IDS,), ""),
    "one-hot": (lambda p, i: jax.nn.one_hot(i, 9) @ p["w"], {"w": (9, 4)}, (IDS,), ""),
    "tied": (lambda p, i: p["w"][i] @ p["w"].T, {"w": (9, 4)}, (IDS,), ""),
    "sliced at an input": (
        lambda p, i: jax.lax.dynamic_slice_in_dim(p["w"], i[0, 0], 2),
        {"w": (9, 4)},
        (IDS,),
        "",
    ),
    "added": (lambda p, x: (x + p["w"]) @ p["a"], {"w": (2, 4), "a": (4, 3)}, (X,), "a"),
    "scaled": (lambda p, x: x * p["w"] @ p["a"], {"w": (1, 4), "a": (4, 3)}, (X,), "a"),
    "prepended": (lambda p, x: jnp.concatenate([p["w"], x]) @ p["a"], {"w": (1, 4), "a": (4, 3)}, (X,), "a"),
    "positions of a range": (
        lambda p, x: (x + p["w"][jnp.arange(2)]) @ p["a"],
        {"w": (9, 4), "a": (4, 3)},
        (X,),
        "a",
    ),
    "fused, split and turned": (
        lambda p, x: [x @ part.T for part in jnp.split(p["norm"], 3)],
        {"norm": (9, 4)},
        (X,),
        "norm",
    ),
    "joined": (
        lambda p, x: x @ jnp.concatenate([p["cls"], p["bias"]], 1),
        {"cls": (4, 3), "bias": (4, 2)},
        (X,),
        "cls bias",
    ),
    "standardised": (
        lambda p, x: x @ ((p["scale"] - p["scale"].mean(0)) / p["scale"].std(0)),
        {"scale": (4, 3)},
        (X,),
        "scale",
    ),
    "weight normalisation": (
        lambda p, x: x @ (p["scale"] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)),
        {"scale": (1, 3), "v": (4, 3)},
        (X,),
        "v",
    ),
    "low rank beside a kernel": (
        lambda p, x: x @ (p["w"] + p["lora_a"] @ p["lora_b"]),
        {"w": (4, 3), "lora_a": (4, 2), "lora_b": (2, 3)},
        (X,),
        "w",
    ),
    "low rank applied in turn": (
        lambda p, x: x @ p["w"] + x @ p["lora_a"] @ p["lora_b"],
        {"w": (4, 3), "lora_a": (4, 2), "lora_b": (2, 3)},
        (X,),
        "w",
    ),
    "a factored kernel": (lambda p, x: x @ (p["u"] @ p["v"]), {"u": (4, 2), "v": (2, 3)}, (X,), "u v"),
    "learned queries": (
        lambda p, x: jax.nn.softmax(p["latents"] @ p["query"] @ x.T) @ x @ p["value"],
        {"latents": (3, 5), "query": (5, 4), "value": (4, 4)},
        (X,),
        "query value",
    ),
    "stacked layers": (
        scan_layers,
        {"stack": {"a": (3, 4, 4), "b": (3, 4)}},
        (X,),
        "stack/a[0] stack/a[1] stack/a[2]",
    ),
    "a loop": (loop, {"a": (3, 4, 4), "b": (2, 4)}, (X,), "a[0] a[1] a[2]"),
    "a recurrent net": (recurrent, {"a": (4, 4), "b": (1, 4), "c": (4, 4)}, (X,), "a c"),
    "branches": (branches, {"a": (4, 3), "b": (2, 3), "c": (4, 3)}, (X,), "a c"),
    "checkpointed": (jax.checkpoint(lambda p, x: jnp.sin(x @ p["b"])), {"b": (4, 3)}, (X,), "b"),
    "depthwise": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[None, :, None], p["norm"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        {"norm": (3, 1, 1)},
        (X[0],),
        "norm",
    ),
    # Where the program does not tell, the name does.
    "modulated": (modulated, {"a": (4, 4), "weight": (3, 4)}, (X,), "a weight"),
    "experts": (experts, {"w": (9, 4, 3)}, (X, IDS), "w"),
    "taps": (taps, {"w": (3, 2)}, (X,), "w"),
    "a product as a sum": (
        lambda p, x: (x[:, :, None] * p["w"]).sum(1) + (x * p["scale"]).sum(),
        {"w": (4, 3), "scale": (2, 4)},
        (X,),
        "w",
    ),
    "no inputs": (lambda p: jnp.ones((2, 4)) @ p["w"] + p["bias"], {"w": (4, 3), "bias": (2, 3)}, (), "w"),
    "one axis": (lambda p, x: x @ p["w"], {"w": (4,)}, (X,), ""),
    "unread": (lambda p, x: x, {"w": (4, 3), "embed": (4, 3)}, (X,), "w"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_are_what_data_is_multiplied_by(name):
    function, shapes, inputs, expected = FUNCTIONS[name]
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, float), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert roles(function, params, *inputs) == set(expected.split())


def test_layers_of_libraries():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(9, 8, name="dense")(ids) + self.param("w", nn.initializers.normal(), (1, 3, 8))
            x = nn.MultiHeadDotProductAttention(2, name="norm")(nn.LayerNorm(name="kernel")(x))
            return nn.Dense(5, name="embed")(x)

    model = Linen()
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    assert roles(lambda p, ids: model.apply({"params": p}, ids), params, IDS) == {
        *(f"norm/{name}/kernel" for name in ("query", "key", "value", "out")),
        "embed/kernel",
    }
    graph, state = nnx.split(nnx.LoRALinear(4, 5, lora_rank=2, rngs=nnx.Rngs(0)))
    assert roles(lambda p, x: nnx.merge(graph, p)(x), state, X) == {"kernel"}
    key = jax.random.key(0)
    gru, static = eqx.partition(eqx.nn.GRUCell(4, 4, key=key), eqx.is_inexact_array)
    assert roles(lambda p, x: jax.vmap(eqx.combine(p, static))(x, x), gru, X) == {"weight_ih", "weight_hh"}


def mlp(p, x):
    return jnp.tanh(x @ p["embed"] + p["w"]) @ p["norm"]


def net():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (4, 6), "w": (1, 6), "norm": (6, 3)}
    return {name: jax.random.normal(key, s) for key, (name, s) in zip(keys, shapes.items(), strict=True)}


def test_channels_are_scored_by_weights_whatever_their_names():
    params = net()
    groups = jp.channel_groups(mlp, params, X)
    (group,) = groups
    assert group.weights == ("embed", "norm")
    score = np.linalg.norm(params["embed"], axis=0) + np.linalg.norm(params["norm"], axis=1)
    expected = score >= np.sort(score)[2]
    structure = jp.structures.channels(groups)
    masks = jp.prune_once(params, jp.scores.magnitude, count=2, structure=structure)
    assert masks["embed"][0].tolist() == expected.tolist()
    pruner = jp.pruner(jp.scores.magnitude, 2 / 6, structure=structure)
    state = jax.jit(pruner.update)(pruner.init(params), params)
    assert state.masks["embed"][0].tolist() == expected.tolist()
    curve = jp.sensitivity(
        lambda p: jnp.abs(p["w"]).sum(), params, levels=[2 / 6], structure=structure, jit=False
    )
    (point,) = curve.of(group.name)
    assert point.metric == pytest.approx(float(jnp.abs(params["w"][0])[expected].sum()))
    # A `where` of one's own still decides.
    score = np.abs(params["w"][0])
    own = jp.prune_once(params, jp.scores.magnitude, count=2, structure=structure, where=jp.matching("w"))
    assert own["embed"][0].tolist() == (score >= np.sort(score)[2]).tolist()


def test_groups_under_a_prefix_keep_what_is_known_of_weights():
    variables = {"params": net(), "batch_stats": {"mean": jnp.zeros(6)}}

    def apply(v, x):
        return jnp.tanh(x @ v["params"]["embed"] + v["batch_stats"]["mean"]) @ v["params"]["norm"]

    (group,) = jp.channel_groups(apply, variables, X).under("params")
    assert group.weights == ("embed", "norm")
    assert group.members[0].path == "embed"


def test_groups_made_by_hand_go_by_names():
    params = {"a": jnp.ones((4, 6)), "embed": jnp.arange(18.0).reshape(6, 3)}
    (group,) = jp.channel_groups(lambda p, x: jnp.tanh(x @ p["a"]) @ p["embed"], params, X)
    structure = jp.structures.channels([group._replace(weights=None)])
    assert jp.prune_once(params, jp.scores.magnitude, count=1, structure=structure)["a"][0].tolist() == (
        [False, *[True] * 5]
    )
    with_program = jp.structures.channels([group])
    masks = jp.prune_once(
        {**params, "embed": params["embed"][::-1]}, jp.scores.magnitude, count=1, structure=with_program
    )
    assert masks["a"][0].tolist() == [*[True] * 5, False]
