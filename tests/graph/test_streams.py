"""Which groups lie on a residual stream, and `groups.inner()`, which leaves it whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from tests.zoo import ZOO

# By model of the zoo the groups on a stream, by what the model is.
STREAMS = {
    "autoencoder": [],
    "lenet_linen": [],
    "vgg_bn": [],
    "densenet": [],
    "unet_resize": [],
    "inception": [],
    "lstm_linen": [],
    "gru_linen": [],
    "elman_scan": [],
    "siamese": [],
    "llama_gqa_repeat": ["blocks/0/down[1]"],
    "gpt_split_last": ["blocks/0/down[1]"],
    "gpt_tied": ["blocks/0/down[1]"],
    "kv_cache": ["params/embed[1]"],
    "moe_dense": ["down[2]"],
    "vit_linen": ["Conv_0/kernel[3]"],
    "vit_fused_qkv": ["blocks/0/down[1]"],
    "swin": ["Conv_0/kernel[3]"],
    "convnext": ["Conv_0/kernel[3]"],
    "resnet18": ["params/BasicBlock_0/Conv_1/kernel[3]", "params/BasicBlock_2/Conv_1/kernel[3]"],
    "resnet18_train": ["params/BasicBlock_0/Conv_1/kernel[3]", "params/BasicBlock_2/Conv_1/kernel[3]"],
    "mobilenet_v2": ["params/Inverted_1/Conv_2/kernel[3]"],
    "cross_attention": ["Dense_0/kernel[1]", "Dense_1/kernel[1]"],
    "while_loop": ["in/layer0/w[1]"],
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_the_zoo(name):
    case = ZOO[name]()
    groups = jp.channel_groups(case.apply, case.params, *case.inputs, state=case.state)
    assert [group.name for group in groups if group.residual] == STREAMS[name]
    inner = groups.inner()
    assert [g.name for g in inner] == [g.name for g in groups if g.name not in STREAMS[name]]
    assert len(inner) >= 1


KEYS = iter(jax.random.split(jax.random.key(0), 100))


def normal(*shape):
    return jax.random.normal(next(KEYS), shape) / np.sqrt(shape[0])


X = normal(3, 5)


def streams(apply_fn, params, x=X):
    groups = jp.channel_groups(apply_fn, params, x)
    return {f"{m.path}[{m.axis}]" for g in groups if g.residual for m in g.members}


def square_weights(p, x):
    x = x @ p["in"]
    for name in "ab":
        x = x + jnp.tanh(x @ p[name])
    return x @ p["out"]


def normed_after_the_sum(wrap):
    @wrap
    def block(p, x):
        return jax.nn.standardize(x + jax.nn.gelu(x @ p["up"]) @ p["down"])

    return lambda p, x: block(p, block(p, x @ p["in"])) @ p["out"]


def projected_shortcut(p, x):
    x = jax.nn.relu(x @ p["in"])
    return (x @ p["p"] + jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["out"]


def sum_of_skips(p, x):  # a U-Net that adds its skips
    skip = jnp.tanh(x @ p["a"])
    deep = jnp.tanh(skip @ p["b"])
    return jnp.tanh(skip + deep @ p["c"]) @ p["out"]


def adapter(p, x):
    return jax.nn.silu(x @ p["w"] + (x @ p["a"]) @ p["b"]) @ p["out"]


def lstm_cell(p, carry, x):
    h, c = carry
    forget, new, out = jnp.split(x @ p["w"] + h @ p["u"], 3, axis=-1)
    c = jax.nn.sigmoid(forget) * c + jnp.tanh(new)
    return jax.nn.sigmoid(out) * jnp.tanh(c), c


def unrolled_lstm(p, x):
    carry = (jnp.zeros((x.shape[0], 4)),) * 2
    for time in range(x.shape[1]):
        carry = lstm_cell(p, carry, x[:, time])
    return carry[0] @ p["out"]


def scanned_lstm(p, x):
    carry = (jnp.zeros((x.shape[0], 4)),) * 2
    carry, _ = lax.scan(lambda c, x: (lstm_cell(p, c, x), None), carry, jnp.moveaxis(x, 1, 0))
    return carry[0] @ p["out"]


def state_space(p, x):  # its inner width is no stream
    u = jax.nn.silu(x @ p["up"])

    def step(h, given):
        u, dt, b, c = given
        h = jnp.exp(-dt)[:, None] * h + (dt * u)[:, None] * b
        return h, h @ c

    def scanned(u):
        rest = jax.nn.softplus(u @ p["dt"]), u @ p["b"], u @ p["c"]
        return lax.scan(step, jnp.zeros((6, 3)), (u, *rest))[1]

    return (jax.vmap(scanned)(u) + 0.5 * u) @ p["down"]


NORMED = {"in": (5, 6), "up": (6, 9), "down": (9, 6), "out": (6, 2)}
LSTM = {"w": (5, 12), "u": (4, 12), "out": (4, 2)}
# By name: a function, the shapes of its params and of its input, and the members of its streams.
NETWORKS = {
    "square weights": (
        square_weights,
        {"in": (5, 6), "a": (6, 6), "b": (6, 6), "out": (6, 2)},
        (3, 5),
        "in[1] a[0] a[1] b[0] b[1] out[0]",
    ),
    "norm": (normed_after_the_sum(lambda f: f), NORMED, (3, 5), "in[1] up[0] down[1] out[0]"),
    "norm, remat": (normed_after_the_sum(jax.checkpoint), NORMED, (3, 5), "in[1] up[0] down[1] out[0]"),
    "norm, jit": (normed_after_the_sum(jax.jit), NORMED, (3, 5), "in[1] up[0] down[1] out[0]"),
    "projected shortcut": (
        projected_shortcut,
        {"in": (5, 6), "up": (6, 9), "down": (9, 7), "p": (6, 7), "out": (7, 2)},
        (3, 5),
        "p[1] down[1] out[0]",
    ),
    "sum of skips": (
        sum_of_skips,
        {"a": (5, 6), "b": (6, 9), "c": (9, 6), "out": (6, 2)},
        (3, 5),
        "a[1] b[0] c[1] out[0]",
    ),
    "adapter": (adapter, {"w": (5, 8), "a": (5, 2), "b": (2, 8), "out": (8, 2)}, (3, 5), ""),
    "unrolled LSTM": (unrolled_lstm, LSTM, (2, 3, 5), ""),
    "scanned LSTM": (scanned_lstm, LSTM, (2, 3, 5), ""),
    "state space": (
        state_space,
        {"up": (5, 6), "dt": (6, 6), "b": (6, 3), "c": (6, 3), "down": (6, 5)},
        (2, 4, 5),
        "",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_streams_of_small_networks(name):
    function, shapes, given, expected = NETWORKS[name]
    params = {path: normal(*shape) for path, shape in shapes.items()}
    assert streams(function, params, normal(*given)) == set(expected.split())


@pytest.mark.parametrize("depth", [1, 3])
def test_a_scanned_decoder(depth):
    params = {
        "in": normal(5, 6),
        "blocks": {"up": normal(depth, 6, 9), "down": normal(depth, 9, 6)},
        "out": normal(6, 2),
    }

    def apply_fn(params, x):
        def step(x, block):
            return x + jax.nn.gelu(x @ block["up"]) @ block["down"], None

        return lax.scan(step, x @ params["in"], params["blocks"])[0] @ params["out"]

    groups = jp.channel_groups(apply_fn, params, X)
    assert {g.members[0].path for g in groups.inner()} == (
        {f"blocks/down[{n}]" for n in range(depth)} if depth > 1 else {"blocks/down"}
    )
    assert all(g.members[0].axis < 2 or g.residual for g in groups)


def test_inner_groups_leave_the_stream_whole():
    case = ZOO["llama_gqa_grouped"]()
    groups = jp.channel_groups(case.apply, case.params, *case.inputs).inner()
    structure = jp.structures.channels(groups)
    masks = jp.prune_once(case.params, jp.scores.magnitude, 0.5, structure=structure, scope="layerwise")
    small = jp.compact(case.apply, case.params, masks, *case.inputs)
    width = case.params["blocks"][0]["down"].shape[1]
    assert small.params["blocks"][0]["down"].shape[1] == width
    assert small.params["blocks"][0]["down"].shape[0] < case.params["blocks"][0]["down"].shape[0]
    np.testing.assert_allclose(
        small.apply(small.params, *case.inputs),
        case.apply(jp.apply_masks(case.params, masks), *case.inputs),
        rtol=1e-4,
        atol=1e-4,
    )


def test_nothing_inside():
    params = {"in": normal(5, 6), "a": normal(6, 6), "out": normal(6, 2)}

    def apply_fn(params, x):
        x = x @ params["in"]
        return (x + jnp.tanh(x @ params["a"])) @ params["out"]

    with pytest.raises(ValueError, match="every group lies on a residual stream"):
        jp.channel_groups(apply_fn, params, X).inner()


def test_a_part_of_the_params_keeps_the_mark():
    params = {"params": {"in": normal(5, 6), "up": normal(6, 9), "down": normal(9, 6), "out": normal(6, 2)}}

    def apply_fn(variables, x):
        p = variables["params"]
        x = x @ p["in"]
        return (x + jnp.tanh(x @ p["up"]) @ p["down"]) @ p["out"]

    groups = jp.channel_groups(apply_fn, params, X)
    assert [g.name for g in groups.under("params").inner()] == ["up[1]"]
    assert [g.name for g in groups.inner().under("params")] == ["up[1]"]
