"""What a case of the zoo is, and what its builders share."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Case(NamedTuple):
    """A small model.

    Attributes:
        apply: `apply(params, *inputs)`, pure; evaluation mode unless the name says train.
        params: A pytree of float arrays, all random: nothing is zero by accident.
        inputs: Arrays, float32 but for tokens, positions and keys.
        state: From apply's output to the subtree of it that has the same paths as a part of params.
    """

    apply: Callable
    params: Any
    inputs: tuple
    state: Callable | None = None


ZOO: dict[str, Callable[[], Case]] = {}


def case(build, name=None):
    """Enter `build(rng)` in the zoo, under its own name by default; every call draws the same numbers."""
    name = name or build.__name__
    ZOO[name] = lambda: build(np.random.default_rng(zlib.crc32(name.encode())))
    return ZOO[name]


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def tokens(rng, size, *shape):
    return jnp.asarray(rng.integers(size, size=shape), jnp.int32)


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def draw(rng, tree):
    """Random float32 leaves for a tree of shapes, as tuples or on arrays."""

    def leaf(path, node):
        shape = node if isinstance(node, tuple) else node.shape
        values = rng.standard_normal(shape)
        if "var" in jax.tree_util.keystr(path, simple=True, separator="/").split("/"):
            values = 0.5 + np.abs(values)
        if len(shape) > 1:  # by the fan-in: else deep nets overflow and every softmax is one-hot
            values *= 1.5 / math.sqrt(math.prod(shape[:-1]))
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_shape)


def linen_variables(rng, model, *inputs):
    """Random variables of a flax.linen model, without initialising it."""
    return draw(rng, jax.eval_shape(model.init, jax.random.key(0), *inputs))


def linen_case(name, *inputs, **options):
    """Enter the decorated flax.linen class, built with options, with its params or all its variables.

    Each input is the shape of a float array, or a function of the generator.
    """

    def enter(module):
        def build(rng):
            model, xs = module(**options), drawn(rng, inputs)
            variables = linen_variables(rng, model, *xs)
            if set(variables) == {"params"}:
                return Case(lambda params, *xs: model.apply({"params": params}, *xs), variables["params"], xs)
            return Case(model.apply, variables, xs)

        case(build, name)
        return module

    return enter


def nnx_case(name, *inputs):
    """Enter the decorated flax.nnx class; inputs as for `linen_case`."""

    def enter(module):
        case(lambda rng: from_nnx(rng, module, *drawn(rng, inputs)), name)
        return module

    return enter


def drawn(rng, inputs):
    return tuple(given(rng) if callable(given) else normal(rng, *given) for given in inputs)


def from_nnx(rng, build, *inputs):
    """A flax.nnx model, `build(rngs)`."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return Case(lambda params, *xs: nnx.merge(graph, params)(*xs), draw(rng, shapes), inputs)


def from_equinox(rng, build, *inputs):
    """An equinox model of one example, `build(key)`, over a batch."""
    model = eqx.filter_eval_shape(build, jax.random.key(0))
    shapes, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Case(lambda params, *xs: jax.vmap(eqx.combine(params, static))(*xs), draw(rng, shapes), inputs)


def layer_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def attend(q, k, v, mask=None):
    """Attention of (batch, time, heads, features), under a mask of (query times, key times)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def causal(t):
    return jnp.tril(jnp.ones((t, t), bool))
