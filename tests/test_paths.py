from dataclasses import dataclass

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune.paths import mirrors


class Vit(nn.Module):
    """The names of a vision transformer, without its arithmetic."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2, name="embedding")(x)
        x = x.reshape(x.shape[0], -1, 8)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, x.shape[1], 8))
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        x = nn.Embed(10, 8, name="tokens")(jnp.zeros((1, 5), int)) + nn.GroupNorm(2)(x)
        return nn.Dense(3, name="head")(x[:, 0])


def selected(params, where=jp.kernels):
    leaves = zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True)
    return {path for path, leaf in leaves if where(path, leaf)}


def test_kernels_of_a_vit_leave_biases_norms_embeddings_and_tokens_alone():
    params = Vit().init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))["params"]
    assert selected(params) == {
        "embedding/kernel",  # the patch convolution: a kernel, whatever its layer is called
        "attention/query/kernel",
        "attention/key/kernel",
        "attention/value/kernel",
        "attention/out/kernel",
        "head/kernel",
    }


def test_nnx_linen_and_frozen_dicts_have_the_same_paths():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs)])
            self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)

    state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    assert {"dense/kernel", "norm/scale", "layers/0/bias", "attention/value/kernel"} <= set(
        jp.leaf_paths(state)
    )
    kernels = {path for path in jp.leaf_paths(state) if path.endswith("kernel")}
    assert selected(state) == kernels
    assert jp.leaf_paths(nnx.to_pure_dict(state)) == jp.leaf_paths(state)
    assert jp.leaf_paths(FrozenDict({"a": {"b": jnp.ones(1)}})) == ["a/b"]


def test_equinox_modules():
    mlp = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    params = eqx.filter(mlp, eqx.is_inexact_array)
    assert selected(params) == {f"layers/{i}/weight" for i in range(3)}
    gru = eqx.filter(eqx.nn.GRUCell(3, 4, key=jax.random.key(0)), eqx.is_inexact_array)
    assert selected(gru) == {"weight_ih", "weight_hh"}
    norm = eqx.filter(eqx.nn.LayerNorm((3, 4)), eqx.is_inexact_array)
    assert selected({"norm": norm}) == set()
    embedding = eqx.filter(eqx.nn.Embedding(3, 4, key=jax.random.key(0)), eqx.is_inexact_array)
    assert selected({"embed": embedding}) == set()
    with pytest.raises(TypeError, match=r"is a .*not an array.*equinox.filter"):
        jp.prune_once(mlp, jp.scores.magnitude, sparsity=0.5)


@pytest.mark.parametrize(
    ("path", "shape", "takes_part"),
    [
        ("", (3, 4), True),
        ("w1", (3, 4), True),
        ("W", (3, 4), True),
        ("linear/w", (3, 4), True),
        ("conv/w", (1, 1, 3, 4), True),
        ("conv", (1, 1, 3, 4), True),
        ("head/w", (1, 4), True),
        ("head/kernel", (1, 4), True),
        ("dense/kernel_0", (3, 4), True),
        ("self_attn/q_proj/weight", (3, 4), True),
        ("b1", (1, 4), False),
        ("b", (1, 4), False),
        ("something", (1, 4), False),
        ("something", (1, 7, 4), False),
        ("w", (4,), False),
        ("kernel", (4,), False),
        ("attention/query/bias", (2, 4), False),
        ("layer_norm/weight", (3, 4), False),
        ("ln_f/weight", (3, 4), False),
        ("bn1/scale", (3, 4), False),
        ("wte", (100, 4), False),
        ("wpe/weight", (100, 4), False),
        ("tok_embeddings/weight", (100, 4), False),
        ("pos_emb", (10, 4), False),
        ("cls_token", (2, 4), False),
        ("register_tokens", (4, 8), False),
        ("embed/embedding", (10, 4), False),
    ],
)
def test_kernels_by_name(path, shape, takes_part):
    assert jp.kernels(path, jax.ShapeDtypeStruct(shape, jnp.float32)) is takes_part


def test_value_is_kept_where_it_is_a_name_and_not_a_box():
    @jax.tree_util.register_dataclass
    @dataclass
    class Attention:
        query: jax.Array
        value: jax.Array

    tree = {"attention": Attention(jnp.ones((2, 2)), jnp.ones((2, 2)))}
    assert jp.leaf_paths(tree) == ["attention/query", "attention/value"]
    assert jp.leaf_paths({"value": jnp.ones(1)}) == ["value"]


def test_predicates_combine():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    assert selected(params, jp.matching("head/*")) == {"head/kernel", "head/bias"}
    assert selected(params, jp.matching("a/*", "*/bias")) == {"a/kernel", "head/bias"}
    assert selected(params, jp.all_of(jp.kernels, jp.not_(jp.matching("head/*")))) == {"a/kernel"}
    assert selected(params, jp.any_of(jp.matching("a/*"), jp.matching("*/bias"))) == {"a/kernel", "head/bias"}


def test_a_predicate_that_matches_nothing_says_its_name_and_the_paths():
    params = {"dense": {"bias": jnp.ones(2)}}
    where = jp.all_of(jp.kernels, jp.not_(jp.matching("head/*")))
    expected = (
        r"where=all_of\(kernels, not_\(matching\('head/\*'\)\)\) matches no leaf.*dense/bias float32\[2\]"
    )
    with pytest.raises(ValueError, match=expected):
        jp.prune_once(params, jp.scores.magnitude, 0.5, where=where)


def test_predicates_check_their_arguments():
    with pytest.raises(TypeError, match="pattern strings"):
        jp.matching()
    with pytest.raises(TypeError, match="pattern strings"):
        jp.matching(jp.kernels)  # type: ignore[arg-type]
    for combine in (jp.any_of, jp.all_of, jp.not_):
        with pytest.raises(TypeError, match=r"takes predicates where\(path, leaf\), got 'head'"):
            combine("head")


def test_mirrors_finds_the_longest_path_of_equal_shape():
    params = {"a": jnp.ones(2), "b": {"a": jnp.ones(2)}, "c": jnp.ones(3)}
    state = {"mu": params, "count": jnp.zeros((), int), "c": jnp.ones(4), "mask": {"a": jnp.ones(2, bool)}}
    found = dict(zip(jp.leaf_paths(state), mirrors(state, params), strict=True))
    assert found == {"c": None, "count": None, "mask/a": 0, "mu/a": 0, "mu/b/a": 1, "mu/c": 2}
