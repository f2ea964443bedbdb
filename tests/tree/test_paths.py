from dataclasses import dataclass

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune.tree.mirrors import match_leaves_to_params


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


EMBEDDING_NETWORKS = [
    "gpt_neox/embed_out/weight",
    "bbox_embed/layers/0/weight",
    "model/diffusion_model/time_embed/0/weight",
    "unembed/W_U",
    "position_predictor/weight",
]
EMBEDDINGS = [
    "embeddings/0/weight",
    "decoder/object_queries",
    "rope/freqs",
    "layer/ia3_l/weight",
    "mlp/hada_w1_a",
    "wte/weight",
    "norm_out/weight",
]


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
        # Vectors with axes of size 1.
        ("linear/weight_g", (9, 1), False),  # the lengths of weight normalisation
        ("lstm/w_g", (9, 4), True),  # a gate
        ("attention/temperature", (6, 1, 1), False),
        ("something", (9, 1), True),
        ("conv/original0", (9, 1, 1), False),
        ("conv/original1", (9, 4, 3), True),
        # Heads, queries, and networks that embed.
        *((path, (64, 32), True) for path in EMBEDDING_NETWORKS),
        *((path, (64, 32), False) for path in EMBEDDINGS),
    ],
)
def test_kernels_by_name(path, shape, takes_part):
    assert jp.kernels(path, jax.ShapeDtypeStruct(shape, jnp.float32)) is takes_part


# By library, what its names stand for: paths of leaves that are kernels, and of leaves that are none.
LIBRARIES = {
    "equinox": (
        "layers/0/weight linear/weight embedding_net/linear_1/weight normal_dense/weight conv1/weight "
        "cell/weight_hh attention/query_proj/weight patch_embed/proj/weight patch_embed/weight "
        "timestep_embedder/mlp/0/weight x_embedder/proj/weight adaLN_modulation/1/weight "
        "abnormal/weight tokenizer/conv/weight classifier/weight token_mixer/mlp/weight "
        "informative/weight",
        "emb/weight tok_emb/weight embed/weight embedding/weight posEmbedding/weight pos_embed "
        "cls_token norm1/weight ln2/weight layers/3/layerNorm/weight "
        "y_embedder/embedding_table/weight weight_g_norm",
    ),
    "haiku": (
        "mlp/~/linear_0/w embedding_net/linear_1/w conv2_d/w lstm/linear/w transformer/h0_attn/query/w",
        "embed/embeddings token_embed/embeddings positional_embeddings layer_norm/scale "
        "batch_norm/~/mean_ema/average",
    ),
    "transformers": (
        "wte_net/kernel h/0/attn/c_attn/kernel encoder/layer/0/attention/self/query/kernel "
        "lm_head/kernel embeddings/patch_embeddings/projection/kernel patch_embed/proj/kernel "
        "text_projection/kernel",
        "wte/embedding wpe/embedding shared/embedding embeddings/word_embeddings/embedding "
        "embeddings/token_type_embeddings/embedding embeddings/position_embeddings/embedding "
        "layer/0/SelfAttention/relative_attention_bias/embedding embeddings/cls_token "
        "embeddings/position_embeddings model/embed_tokens/embedding final_layer_norm/scale",
    ),
    "transformers converted": (
        "h/0/mlp/c_fc/weight embeddings/patch_embeddings/projection/weight lm_head/weight "
        "pooler/dense/weight vision_model/embeddings/patch_embedding/weight "
        "layers/0/self_attn/q_proj/weight score/weight encoder/pos_conv_embed/conv/weight "
        "cls/predictions/decoder/weight backbone/layers/0/mixer/in_proj/weight "
        "encoder/embedding_hidden_mapping_in/dense/weight bert/shared_dense/weight",
        "wte/weight wpe/weight shared/weight model/embed_tokens/weight model/embed_positions/weight "
        "embeddings/word_embeddings/weight embeddings/token_type_embeddings/weight "
        "embeddings/LayerNorm/weight layers/0/input_layernorm/weight "
        "layers/0/post_attention_layernorm/weight final_layer_norm/weight "
        "layer/0/SelfAttention/relative_attention_bias/weight relative_position_bias_table rel_pos_h "
        "backbone/embeddings/weight mixer/A_log embed_in/weight class_embedding mask_token",
    ),
    "minGPT": (
        "transformer/h/0/attn/c_attn/weight transformer/h/0/mlp/c_proj/weight head/weight lm_head/weight",
        "tok_emb/weight pos_emb pos_emb/weight transformer/wte/weight transformer/wpe/weight "
        "ln_f/weight transformer/h/0/ln_1/weight",
    ),
    "keras": (
        "dense/kernel conv2d/kernel lstm/lstm_cell/recurrent_kernel depthwise_conv2d/depthwise_kernel "
        "multi_head_attention/query/kernel",
        "embedding/embeddings position_embedding/position_embeddings batch_normalization/gamma "
        "layer_normalization/beta dense/lora_kernel_a dense/lora_kernel_b token_embedding/embeddings",
    ),
    "penzai": (
        "body/sublayers/0/sublayers/1/weights/value/data_array",
        "embedder/table/embeddings/value/data_array norm/scale/weights/value/data_array",
    ),
    "nnx": (
        "linear/kernel attention/query/kernel lora_linear/kernel",
        "embed/embedding lora/lora_a h/lora/lora_b layers/0/lora_b norm/scale",
    ),
    "MaxText": (
        "decoder/layers/self_attention/query/kernel decoder/layers/mlp/wi_0/kernel moe_block/wi_0 "
        "moe_block/gate/kernel decoder/logits_dense/kernel",
        "token_embedder/embedding decoder/decoder_norm/scale "
        "decoder/layers/pre_self_attention_layer_norm/scale decoder/relpos_bias/rel_embedding "
        "position_embedder/embedding",
    ),
    "adapters": (
        "LoRADense_0/kernel input_adapter/linear/kernel adaptive/weight",
        "q_proj/lora_A/default/weight q_proj/lora_B/weight lora_A/kernel to_q_lora/down/weight "
        "LoRA_0/A kernel_lora_a loraB adapter/up/kernel adapters/0/down_proj/weight "
        "adapter_down/weight prompt",
    ),
    "plain": (
        "w1 W w_out bases conv out_proj embed_proj upscaler/w weight_g weight_ih layers/10/w "
        "positionwise/w normal/w",
        "ln_attn norm_mlp ffn_norm attn_norm rms_1 layernorm BatchNorm_0/w log_std wte pe codebook "
        "hash_table layer_scale b_2 in_bias biases",
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_kernels_by_the_names_of_a_library(library):
    yes, no = (set(paths.split()) for paths in LIBRARIES[library])
    leaf = jax.ShapeDtypeStruct((9, 4), jnp.float32)
    assert {path for path in yes | no if jp.kernels(path, leaf)} == yes
    # A prefix that says nothing changes nothing: params nested in variables, layers in a list.
    assert {path for path in yes | no if jp.kernels(f"params/model/3/{path}", leaf)} == yes
    vector = jax.ShapeDtypeStruct((9,), jnp.float32)
    assert not any(jp.kernels(path, vector) for path in yes)


@pytest.mark.parametrize(
    "parent", ["embed", "norm", "pos_embedding", "wte", "LayerNorm_0", "a/b", "shared", "cls"]
)
def test_what_is_called_kernel_takes_part_wherever_it_is(parent):
    assert jp.kernels(f"{parent}/kernel", jax.ShapeDtypeStruct((9, 4), jnp.float32))


def test_zero_initialised_adapters_keep_their_entries():
    model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    params = nnx.state(model, (nnx.Param, nnx.LoRAParam))
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
    kept = {
        path: int(mask.sum()) for path, mask in zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True)
    }
    assert kept == {"bias": 5, "kernel": 15, "lora/lora_a": 12, "lora/lora_b": 10}


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
    found = dict(zip(jp.leaf_paths(state), match_leaves_to_params(state, params), strict=True))
    assert found == {"c": None, "count": None, "mask/a": 0, "mu/a": 0, "mu/b/a": 1, "mu/c": 2}
