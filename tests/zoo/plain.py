"""Models of vectors, (batch, features): one awkward thing each."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from .common import Case, case, draw, linen_case, nnx_case, normal


def vector(rng, features=5):
    return normal(rng, 2, features)


def dense(p, x):
    return x @ p["w"] + p["b"]


def sizes(*widths):
    """The shapes of dense layers of these widths, by number."""
    return {f"layer{i}": {"w": (a, b), "b": (b,)} for i, (a, b) in enumerate(pairwise(widths))}


def mlp(params, x):
    x = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    x = jax.nn.relu(x @ params["b"]["kernel"] + params["b"]["bias"])
    return x @ params["c"]["kernel"] + params["c"]["bias"]


def mlp_params(widths=(5, 8, 6, 3), seed=0):
    rng = np.random.default_rng(seed)
    pairs = zip("abc", pairwise(widths), strict=True)
    return {name: {"kernel": normal(rng, i, o), "bias": normal(rng, o)} for name, (i, o) in pairs}


def through(rng, f, *widths):
    """Two or more dense layers, f between them."""

    def apply(params, x):
        *first, last = params.values()
        for p in first:
            x = f(dense(p, x))
        return dense(last, x)

    return Case(apply, draw(rng, sizes(*widths)), (vector(rng, widths[0]),))


def enter_activation(name, f, *widths):
    case(lambda rng: through(rng, f, *widths), name)


@nnx_case("layer_norm_mlp", (2, 5))
class LayerNormMLP(nnx.Module):
    def __init__(self, rngs):
        self.layer1, self.norm1 = nnx.Linear(5, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.layer2, self.norm2 = nnx.Linear(8, 6, rngs=rngs), nnx.RMSNorm(6, rngs=rngs)
        self.out = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.layer1(x)))
        return self.out(nnx.gelu(self.norm2(self.layer2(x))))


@case
def layer_norm_two_pass(rng):
    def f(x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
        return jax.nn.relu(x)

    return through(rng, f, 5, 8, 6, 4)


@case
def autoencoder(rng):
    names = ["tanh", "gelu", "silu", "softplus", "last"]
    widths = [8, 10, 7, 4, 9, 8]
    shapes = {n: {"w": (a, b), "b": (b,)} for n, (a, b) in zip(names, pairwise(widths), strict=True)}

    def apply(params, x):
        for name in names[:-1]:
            x = getattr(jax.nn, name)(dense(params[name], x))
        return dense(params["last"], x)

    return Case(apply, draw(rng, shapes), (vector(rng, 8),))


@case
def mlp_bf16(rng):
    wide = through(rng, jax.nn.gelu, 5, 8, 6, 4)

    def apply(params, x):
        low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
        return wide.apply(*low).astype(x.dtype)

    return wide._replace(apply=apply)


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 6):
            x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(features)(x)))
        return nn.Dense(4)(x)


@case
def dropout_train(rng):
    model, x = Dropout(), vector(rng)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = draw(rng, jax.eval_shape(model.init, keys, x)["params"])

    def apply(params, x, key):
        return model.apply({"params": params}, x, rngs={"dropout": key})

    return Case(apply, params, (x, jax.random.key(2)))


# --- activations and norms


@jax.custom_jvp
def smooth(x):
    return x * jax.nn.sigmoid(x)


@smooth.defjvp
def smooth_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    s = jax.nn.sigmoid(x)
    return x * s, t * (s + x * s * (1 - s))


@jax.custom_vjp
def straight(x):
    """Rounded, with the gradient of tanh."""
    return jnp.round(2 * x) / 2


straight.defvjp(lambda x: (straight(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


enter_activation("custom_jvp", smooth, 5, 8, 6, 4)
enter_activation("custom_vjp", straight, 5, 8, 6, 4)
enter_activation("relu_and_silu", lambda x: jax.nn.relu(x) + jax.nn.silu(-x), 5, 8, 6, 4)


@case
def maxout(rng):
    def f(x):
        return x.reshape(x.shape[0], -1, 2).max(-1)

    params = draw(rng, {"in": {"w": (5, 12), "b": (12,)}, "out": {"w": (6, 4), "b": (4,)}})
    return Case(lambda p, x: dense(p["out"], f(dense(p["in"], x))), params, (vector(rng),))


@case
def cosine_head(rng):
    params = draw(rng, {"trunk": sizes(5, 8, 6), "classes": (6, 4), "temperature": ()})

    def unit(x, axis):
        return x / jnp.linalg.norm(x, axis=axis, keepdims=True)

    def apply(params, x):
        x = jax.nn.relu(dense(params["trunk"]["layer0"], x))
        x = dense(params["trunk"]["layer1"], x)
        return jnp.exp(params["temperature"]) * unit(x, -1) @ unit(params["classes"], 0)

    return Case(apply, params, (vector(rng),))


# --- wiring


@linen_case("siamese", (2, 5), (2, 5))
class Siamese(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        hidden, embed = nn.Dense(8), nn.Dense(6)
        a, b = (embed(nn.relu(hidden(x))) for x in (a, b))
        return nn.Dense(1)(jnp.abs(a - b)), jnp.sum(a * b, -1)


@linen_case("highway", (2, 5))
class Highway(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        for _ in range(2):
            gate = nn.sigmoid(nn.Dense(8)(x))
            x = gate * nn.relu(nn.Dense(8)(x)) + (1 - gate) * x
        return nn.Dense(4)(x)


@case
def einsum_contracted(rng):
    params = draw(rng, {"in": (3, 5, 4, 6), "mix": (4, 6, 8), "other": (8, 6, 4), "out": (8, 6, 4, 5)})

    def apply(params, x):
        x = jnp.tanh(jnp.einsum("bij,ijkl->bkl", x, params["in"]))
        y = jax.nn.relu(jnp.einsum("bkl,klm->bm", x, params["mix"]))
        z = jnp.einsum("bm,mlk,bkl->bmlk", y, params["other"], x)
        return jnp.einsum("bmlk,mlko->bo", z, params["out"])

    return Case(apply, params, (normal(rng, 2, 3, 5),))


# --- control flow


@case
def cond(rng):
    params = draw(rng, {"in": sizes(5, 8), "left": sizes(8, 6), "right": sizes(8, 7, 6), "out": sizes(6, 4)})

    def apply(params, x):
        def left(h):
            return jnp.tanh(dense(params["left"]["layer0"], h))

        def right(h):
            h = jax.nn.relu(dense(params["right"]["layer0"], h))
            return dense(params["right"]["layer1"], h)

        h = jax.nn.relu(dense(params["in"]["layer0"], x))
        h = jax.lax.cond(x.mean() > 0, left, right, h)
        return dense(params["out"]["layer0"], h)

    return Case(apply, params, (vector(rng),))


@case
def while_loop(rng):
    params = draw(rng, {"in": sizes(5, 8), "loop": sizes(8, 6, 8), "out": sizes(8, 4)})

    def apply(params, x):
        def step(carry):
            i, h = carry
            y = jax.nn.relu(dense(params["loop"]["layer0"], h))
            return i + 1, jnp.tanh(h + dense(params["loop"]["layer1"], y))

        def more(carry):  # how often depends on the input
            return (carry[0] < 4) & (jnp.abs(x).max() * carry[0] < 5)

        _, h = jax.lax.while_loop(more, step, (0, dense(params["in"]["layer0"], x)))
        return dense(params["out"]["layer0"], h)

    return Case(apply, params, (vector(rng),))


@case
def fori_loop(rng):
    params = draw(rng, {"in": sizes(5, 8), "loop": sizes(8, 8), "out": sizes(8, 4)})

    def apply(params, x):
        def step(i, h):
            return jnp.tanh(dense(params["loop"]["layer0"], h) / (i + 1))

        h = jax.lax.fori_loop(0, 3, step, dense(params["in"]["layer0"], x))
        return dense(params["out"]["layer0"], h)

    return Case(apply, params, (vector(rng),))


# --- hidden axes that nothing can be taken from


enter_activation("hidden_softmax", jax.nn.softmax, 5, 8, 4)
enter_activation("hidden_cumsum", lambda x: jnp.cumsum(x, -1), 5, 8, 4)
enter_activation("hidden_sort", lambda x: jnp.sort(x, -1), 5, 8, 4)


@case
def hidden_top_k(rng):
    params = draw(rng, {"in": {"w": (5, 8), "b": (8,)}, "out": {"w": (3, 4), "b": (4,)}})

    def apply(params, x):
        return dense(params["out"], jax.lax.top_k(dense(params["in"], x), 3)[0])

    return Case(apply, params, (vector(rng),))


@case
def hidden_argmax(rng):
    params = draw(rng, {**sizes(5, 8, 4), "table": (8, 4)})

    def apply(params, x):
        x = jax.nn.relu(dense(params["layer0"], x))
        return dense(params["layer1"], x) + params["table"][jnp.argmax(x, -1)]

    return Case(apply, params, (vector(rng),))
