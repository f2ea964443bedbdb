"""Equinox modules become smaller modules, whose fields say their new widths."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

KEYS = iter(jax.random.split(jax.random.key(0), 99))


class Images(eqx.Module):
    first: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    second: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self):
        self.first = eqx.nn.Conv2d(3, 8, 3, key=next(KEYS))
        self.norm = eqx.nn.GroupNorm(4, 8)
        self.second = eqx.nn.Conv2d(8, 6, 3, key=next(KEYS))
        self.out = eqx.nn.Linear(6, 4, key=next(KEYS))

    def __call__(self, x):
        h = jax.nn.relu(self.norm(self.first(x)))
        return self.out(jax.nn.relu(self.second(h)).mean((1, 2)))


class Attention(eqx.Module):
    tokens: eqx.nn.Embedding
    heads: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm

    def __init__(self):
        self.tokens = eqx.nn.Embedding(7, 16, key=next(KEYS))
        self.heads = eqx.nn.MultiheadAttention(4, 16, use_query_bias=True, key=next(KEYS))
        self.norm = eqx.nn.LayerNorm(16)

    def __call__(self, x):
        y = jax.vmap(self.norm)(jax.vmap(self.tokens)(x))
        return self.heads(y, y, y)


class Recurrent(eqx.Module):
    cell: eqx.Module
    out: eqx.nn.Linear

    def __init__(self, kind):
        self.cell = kind(4, 8, key=next(KEYS))
        self.out = eqx.nn.Linear(8, 2, key=next(KEYS))

    def __call__(self, x):
        zeros = jnp.zeros(self.cell.hidden_size)
        start = (zeros, zeros) if isinstance(self.cell, eqx.nn.LSTMCell) else zeros
        last = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, x)[0]
        return self.out(last[0] if isinstance(last, tuple) else last)


def halved(model, x, heads_only=True):
    """Return the params, masks that halve each group of channels, and what comes of them."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    groups = jp.channel_groups(lambda p, x: eqx.combine(p, static)(x), params, x)
    if isinstance(model, Attention) and heads_only:
        groups = [group for group in groups if group.name.startswith("heads")]
    structure = jp.structures.channels(groups)
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5, structure=structure, scope="layerwise")
    return eqx.combine(jp.apply_masks(params, masks), static), masks, jp.compact_module(model, masks, x)


NETWORKS = {
    "mlp": (
        lambda: eqx.nn.MLP(5, 3, 8, 2, key=next(KEYS)),
        jnp.linspace(-1, 1, 5),
        {
            "": {"in_size": 5, "width_size": 4, "out_size": 3},
            "layers/1": {"in_features": 4, "out_features": 4},
        },
    ),
    "images": (
        Images,
        jax.random.normal(next(KEYS), (3, 9, 9)),
        {
            "first": {"in_channels": 3, "out_channels": 4, "groups": 1},
            "norm": {"groups": 2, "channels": 4},
            "second": {"in_channels": 4, "out_channels": 3},
            "out": {"in_features": 3, "out_features": 4},
        },
    ),
    "attention": (
        Attention,
        jnp.arange(5),
        {
            "tokens": {"num_embeddings": 7, "embedding_size": 16},
            "heads": {"num_heads": 2, "qk_size": 4, "vo_size": 4, "query_size": 16, "output_size": 16},
            "heads/query_proj": {"in_features": 16, "out_features": 8},
            "norm": {"shape": (16,)},
        },
    ),
    "gru": (
        lambda: Recurrent(eqx.nn.GRUCell),
        jax.random.normal(next(KEYS), (6, 4)),
        {"cell": {"input_size": 4, "hidden_size": 4}, "out": {"in_features": 4}},
    ),
    "lstm": (
        lambda: Recurrent(eqx.nn.LSTMCell),
        jax.random.normal(next(KEYS), (6, 4)),
        {"cell": {"input_size": 4, "hidden_size": 4}, "out": {"in_features": 4}},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_module_is_smaller_and_computes_what_the_masked_one_does(name):
    make, x, widths = NETWORKS[name]
    model = make()
    masked, _, (module, small, why) = halved(model, x)
    assert why is None and type(module) is type(model)
    np.testing.assert_allclose(module(x), masked(x), atol=1e-6)
    np.testing.assert_allclose(small.apply(small.params, x), masked(x), atol=1e-6)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(m, eqx.is_array))) for m in (model, module)]
    assert sizes[1] < sizes[0]
    for path, fields in widths.items():
        part = module
        for step in filter(None, path.split("/")):
            part = part[int(step)] if step.isdigit() else getattr(part, step)
        assert {field: getattr(part, field) for field in fields} == fields
    # The model itself is what it was.
    assert jax.tree.structure(model) == jax.tree.structure(eqx.tree_at(lambda m: m, model, model))
    again = jp.compact_module(model, small.plan, x)
    assert jax.tree.structure(again.module) == jax.tree.structure(module)


class Named(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    hidden: int = eqx.field(static=True)

    def __init__(self):
        self.up = eqx.nn.Linear(5, 8, key=next(KEYS))
        self.down = eqx.nn.Linear(8, 2, key=next(KEYS))
        self.hidden = 8

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)).reshape(self.hidden))


def test_a_field_of_ones_own_is_named_and_can_be_set():
    model, x = Named(), jnp.linspace(-1, 1, 5)
    masked, masks, (module, small, why) = halved(model, x)
    assert module is None and why.startswith("There is no smaller Named: a copy with the small arrays raises")
    np.testing.assert_allclose(small.apply(small.params, x), masked(x), atol=1e-6)

    def fix(part):
        object.__setattr__(part, "hidden", part.up.out_features)

    module, _, why = jp.compact_module(model, masks, x, fix=fix)
    assert why is None and (module.hidden, model.hidden) == (4, 8)
    np.testing.assert_allclose(module(x), masked(x), atol=1e-6)


def test_what_is_refused():
    model, x = Named(), jnp.linspace(-1, 1, 5)
    params = eqx.filter(model, eqx.is_inexact_array)
    same = jp.compact_module(model, jp.ones_masks(params), x)
    assert same.why.startswith("Nothing was removed") and same.module.hidden == 8
    with pytest.raises(TypeError, match=r"Build the model outside jit and eqx\.filter_eval_shape"):
        jp.compact_module(eqx.filter_eval_shape(Named), jp.ones_masks(params), x)
    with pytest.raises(TypeError, match=r"takes a flax\.nnx\.Module or an equinox\.Module, got dict"):
        jp.compact_module({}, {}, x)


def test_a_norm_that_would_take_its_mean_of_fewer_features_is_named():
    _, _, (module, _, why) = halved(Attention(), jnp.arange(5), heads_only=False)
    assert module is None and "norm: its mean is over (8,) features, not (16,)" in why
