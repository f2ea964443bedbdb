"""Smaller flax modules: where they agree with the function form, and where they are refused."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxprune as jp
from jaxprune import Plan, channel_groups
from jaxprune.graph.modules.small_module import compact_module
from jaxprune.tree.leaves import array_leaves
from tests.oracles.equivalence import without_units
from tests.zoo.common import attend, draw
from tests.zoo.plain import LayerNormMLP
from tests.zoo.sequence import LSTMNNX
from tests.zoo.vision import LeNetNNX, Separable, ViTNNX

ViT = partial(ViTNNX, attention_fn=lambda q, k, v, **_: attend(q, k, v))


def built(build):
    """A model in evaluation mode, all of its numbers drawn; nothing is run to make it."""
    graph, random, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.RngState, ...)

    def value(leaf):
        return jax.random.key(4) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.uint32(0)

    model = nnx.merge(graph, jax.tree.map(value, random), draw(np.random.default_rng(1), state))
    model.eval()
    return model


def call(model, *inputs):
    """A copy's output, compiled whole."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *inputs)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)


def state_of(model):
    return nnx.split(model, nnx.RngState, ...)[2]


def half(model, *inputs, where=lambda path, axis: True, split="major"):
    """Masks of all Params that remove half of the units of each removable group with such a member."""
    graph, random, params = nnx.split(model, nnx.RngState, ...)

    def apply(params, *inputs):
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, random), params)(*inputs)

    def choose(group):
        return slice(1, None, 2) if any(where(m.path, m.axis) for m in group.members) else []

    groups = channel_groups(apply, params, *inputs, split=split)
    masks = array_leaves(without_units(jp.ones_masks(params), groups, choose))
    trainable = nnx.state(model, nnx.Param)
    return like(trainable, {path: masks[path] for path in jp.leaf_paths(trainable)})


def like(tree, leaves):
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[p] for p in jp.leaf_paths(tree)])


def cut(model, **gone):
    """Masks like the Params that remove slices: by path ("__" for "/"), (axis, indices)."""
    trainable = nnx.state(model, nnx.Param)
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in array_leaves(trainable).items()}
    for path, (axis, indices) in gone.items():
        np.moveaxis(masks[path.replace("__", "/")], axis, 0)[np.asarray(indices)] = False
    return like(trainable, masks)


def masked(model, masks):
    """A copy with the masks applied."""
    copy = nnx.clone(model)
    nnx.update(copy, jax.jit(jp.apply_masks)(nnx.state(copy, nnx.Param), masks))
    return copy


def close(a, b, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.abs(y).max() + 1e-30))


def agrees(model, masks, *inputs, **options):
    """Compacts, and compares the native module with the masked one, here and with an independent draw."""
    before = jax.tree.map(np.asarray, state_of(model))
    result = compact_module(model, masks, *inputs, **options)
    assert result.why is None, result.why
    assert type(result.module) is type(model)
    close(call(result.module, *inputs), call(masked(model, masks), *inputs))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, state_of(model)))
    return result


def refused(model, masks, *inputs, **options):
    result = compact_module(model, masks, *inputs, **options)
    assert result.module is None
    close(jax.jit(result.small.apply)(result.small.params, *inputs), call(masked(model, masks), *inputs))
    return result.why


# --- networks that are the same natively


def test_lenet_trains_on_with_an_nnx_optimizer():
    model, x = built(LeNetNNX), normal(2, 8, 8, 1)
    small = agrees(model, half(model, x), x)
    module = small.module
    assert (module.conv1.out_features, module.conv2.in_features) == (3, 3)
    assert module.conv2.kernel_shape == (3, 3, 3, 4)
    assert (module.hidden.in_features, module.hidden.out_features, module.out.in_features) == (4, 6, 6)

    def loss(model):
        return jnp.square(model(x)).mean()

    grads = nnx.jit(nnx.grad(loss))(module)
    expected = jax.jit(jax.grad(lambda p: jnp.square(small.small.apply(p, x)).mean()))(small.small.params)
    close(grads, expected)
    optimizer = nnx.Optimizer(module, optax.sgd(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value

    assert step(module, optimizer) > step(module, optimizer)


def test_batch_norm_and_depthwise_convolution_in_both_modes():
    model, x = built(Separable), normal(4, 8, 8, 3)
    masks = half(model, x)
    result = agrees(model, masks, x)
    module = result.module
    depth = module.depth
    assert (depth.feature_group_count, depth.in_features, depth.out_features) == (3, 3, 6)
    assert (module.norm1.num_features, module.norm1.mean.shape) == (6, (6,))
    dense = masked(model, masks)
    dense.train(), module.train()
    run = nnx.jit(lambda model: model(x))
    close(run(module), run(dense))
    close(state_of(module), result.small.shrink(state_of(dense)))  # statistics moved alike
    # Found from the network in training mode, it is the same plan.
    model.train()
    other = compact_module(model, masks, x)
    assert other.why is None and other.small.keep.keys() == result.small.keep.keys()


def test_grouped_convolution_loses_groups_or_filters():
    class Grouped(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(2, 6, (1,), rngs=rngs)
            self.b = nnx.Conv(6, 12, (3,), feature_group_count=3, rngs=rngs)
            self.c = nnx.Conv(12, 2, (1,), rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))

    model, x = built(Grouped), normal(2, 5, 2)
    group = agrees(model, cut(model, b__kernel=(2, range(4, 8)), b__bias=(0, range(4, 8))), x).module.b
    assert (group.in_features, group.out_features, group.feature_group_count) == (4, 8, 2)
    filters = [1, 2, 5, 6, 9, 10]  # the same of each group
    group = agrees(model, cut(model, b__kernel=(2, filters), b__bias=(0, filters)), x).module.b
    assert (group.in_features, group.out_features, group.feature_group_count) == (6, 6, 3)


def test_vit_heads_and_mlp():
    model, x = built(ViT), normal(2, 8, 8, 3)

    def heads_or_hidden(path, axis):
        return ("attention/query/kernel" in path and axis == 1) or path.endswith("hidden/bias")

    result = agrees(model, half(model, x, where=heads_or_hidden), x)
    attention = result.module.blocks[0].attention
    assert (attention.num_heads, attention.head_dim, attention.qkv_features) == (1, 4, 4)
    assert (attention.out.in_features, attention.query.out_features) == ((1, 4), (1, 4))
    assert getattr(attention, "num_kv_heads", 1) == 1  # flax 0.12.1 does not have it
    assert result.module.blocks[1].hidden.out_features == 6


CELLS = (nnx.OptimizedLSTMCell, nnx.LSTMCell, nnx.GRUCell, nnx.SimpleCell)


class Memory(nnx.Module):
    """Recurrent networks that make their initial carries themselves, from a random stream."""

    def __init__(self, rngs):
        self.rnns = nnx.List([nnx.RNN(cell(3, 6, rngs=rngs), rngs=rngs) for cell in CELLS])
        self.out = nnx.List([nnx.Linear(6, 4, rngs=rngs) for _ in CELLS])

    def __call__(self, x):
        return [out(rnn(x)[:, -1]) for rnn, out in zip(self.rnns, self.out, strict=True)]


def test_recurrent_cells():
    model, x = built(Memory), normal(2, 3, 3)
    rnns = agrees(model, half(model, x), x).module.rnns
    for rnn, cell in zip(rnns, CELLS, strict=True):
        assert_like(rnn.cell, cell(3, 3, rngs=nnx.Rngs(0)))


def assert_like(module, fresh):
    """A module has the attributes of one that was constructed with its widths, and its shapes."""
    assert nnx.split(module)[0] == nnx.split(fresh)[0]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(state_of(m))] for m in (module, fresh)]
    assert shapes[0] == shapes[1]


def after_a_norm(norm):
    return (
        lambda n, r: nnx.Sequential(nnx.Linear(3, n, rngs=r), norm(n, r)),
        lambda n, r: nnx.Linear(n, 2, rngs=r),
    )


LAYERS = {
    "Linear": (lambda n, r: nnx.Linear(3, n, rngs=r), lambda n, r: nnx.Linear(n, 2, rngs=r)),
    "LinearGeneral": (
        lambda n, r: nnx.LinearGeneral(3, (2, n), rngs=r),
        lambda n, r: nnx.LinearGeneral((2, n), 2, axis=(-2, -1), rngs=r),
    ),
    "Einsum": (
        lambda n, r: nnx.Einsum("btd,dn->btn", (3, n), (n,), rngs=r),
        lambda n, r: nnx.Einsum("btn,nd->btd", (n, 2), rngs=r),
    ),
    "Conv": (lambda n, r: nnx.Conv(3, n, (2,), rngs=r), lambda n, r: nnx.Conv(n, 2, (2,), rngs=r)),
    "ConvTranspose": (
        lambda n, r: nnx.ConvTranspose(3, n, (2,), 2, rngs=r),
        lambda n, r: nnx.ConvTranspose(n, 2, (2,), transpose_kernel=True, rngs=r),
    ),
    "LoRALinear": (
        lambda n, r: nnx.LoRALinear(3, n, lora_rank=2, rngs=r),
        lambda n, r: nnx.LoRALinear(n, 2, lora_rank=2, rngs=r),
    ),
    "BatchNorm": after_a_norm(lambda n, r: nnx.BatchNorm(n, rngs=r)),
    "GroupNorm": after_a_norm(lambda n, r: nnx.GroupNorm(n, None, 2, rngs=r)),
    "InstanceNorm": after_a_norm(lambda n, r: nnx.InstanceNorm(n, rngs=r)),
}


AXES = {"LinearGeneral": 2, "Conv": 2, "ConvTranspose": 2}


class Layers(nnx.Module):
    def __init__(self, n, rngs):
        self.pairs = nnx.Dict({name: nnx.List([a(n, rngs), b(n, rngs)]) for name, (a, b) in LAYERS.items()})

    def __call__(self, x):
        return {name: b(nnx.relu(a(x))) for name, (a, b) in self.pairs.items()}


def test_widths_of_flax_layers_are_those_of_the_constructor():
    def outputs(path, axis):
        _, name, number, *_, last = path.split("/")
        return number == "0" and last == "kernel" and axis == AXES.get(name, 1)

    model, x = built(partial(Layers, 8)), normal(2, 3, 3)
    module = agrees(model, half(model, x, where=outputs), x).module
    fresh = Layers(4, nnx.Rngs(0))
    fresh.eval()
    for name in LAYERS:
        assert_like(module.pairs[name], fresh.pairs[name])


def test_embedding_tied_to_the_output():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.mix = nnx.Embed(7, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return self.embed.attend(x + nnx.gelu(self.mix(x)))

    model, ids = built(Tied), jnp.array([[1, 2, 0, 6]])
    module = agrees(model, half(model, ids), ids).module
    assert (module.embed.features, module.embed.num_embeddings, module.mix.in_features) == (3, 7, 3)


def test_modules_and_variables_used_twice_stay_shared():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
            self.again, self.tied = self.a, nnx.Linear(4, 3, rngs=rngs)
            self.tied.kernel = self.b.kernel

        def __call__(self, x):
            x = self.b(nnx.relu(self.a(x)))
            return self.tied(nnx.relu(self.again(x)))

    model, x = built(Twice), normal(2, 3)
    module = agrees(model, half(model, x), x).module
    assert module.again is module.a and module.tied.kernel is module.b.kernel
    assert module.tied.in_features == 2


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)


class Noisy(TwoLayers):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.b(self.dropout(nnx.relu(self.a(x))))


def test_random_state_passes_as_it_is():
    model, x = built(Noisy), normal(2, 3)
    model.dropout.rngs.count[...] = jnp.uint32(5)
    masks = half(model, x)
    result = agrees(model, masks, x)
    assert "dropout/rngs/key" not in result.small.plan.shapes
    random = nnx.state(result.module, nnx.RngState)
    assert random["dropout"]["rngs"]["count"][...] == 5
    result.module.train()
    result.module(x)
    assert nnx.state(model, nnx.RngState)["dropout"]["rngs"]["count"][...] == 5  # not the model's own stream
    # Masks of the whole state will do too, as long as they leave the stream alone.
    whole = {path: jnp.ones(leaf.shape, bool) for path, leaf in array_leaves(nnx.state(model)).items()}
    whole |= array_leaves(masks)
    assert compact_module(model, whole, x).small.keep.keys() == result.small.keep.keys()
    whole["dropout/rngs/count"] = jnp.zeros((), bool)
    with pytest.raises(ValueError, match="random numbers"):
        compact_module(model, whole, x)


def test_noise_is_not_compared():
    model, x = built(Noisy), normal(2, 3)
    masks = half(model, x)
    model.train()
    assert compact_module(model, masks, x).why is None  # it was compared without dropout
    result = compact_module(model, masks, x, other_modes=False)
    assert result.module is None and "try model.eval()" in result.why


# --- networks that are not


def test_layer_norm_is_refused_by_name():
    model, x = built(LayerNormMLP), normal(2, 5)
    why = refused(model, half(model, x), x)
    assert "4.0 in 'div'" in why and "norm1: its mean is over 4 features, not 8" in why


def test_a_width_is_found_where_the_outputs_agree_to_rounding():
    class Wide(nnx.Module):
        def __init__(self, rngs):
            self.a, self.norm = nnx.Linear(2, 20_000, rngs=rngs), nnx.LayerNorm(20_000, rngs=rngs)
            self.b = nnx.Linear(20_000, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(self.norm(self.a(x)))

    model, x = built(Wide), normal(2, 2)
    gone = (-1, [7])
    masks = cut(model, a__kernel=gone, a__bias=gone, norm__scale=gone, norm__bias=gone)
    assert "computes with numbers that the dense one does not: 19999.0" in refused(model, masks, x)


def test_a_width_that_is_summed_up_is_found_with_other_params():
    class Counted(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, use_bias=False, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.a(x))
            return self.b(x / jnp.ones_like(x).sum(-1, keepdims=True))

    model, x = built(Counted), normal(2, 3)
    assert "differs by" in refused(model, half(model, x), x)
    model.b.kernel[...] = jnp.zeros_like(model.b.kernel[...])  # all outputs are zero so far
    assert "with other params" in refused(model, cut(model, a__kernel=(1, [0]), a__bias=(0, [0])), x)


def test_head_width_is_refused():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 4, 8, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attention(x)

    model, x = built(Attention), normal(1, 3, 4)

    def without(gone, *names):
        return cut(model, **{f"attention__{n}__{m}": gone for n in names for m in ("kernel", "bias")})

    why = refused(model, without((-1, [1, 2]), "query", "key"), x)
    assert "attention: its scores are divided by the root of 2, not of 4" in why
    heads = without((-2, [0]), "query", "key", "value")
    assert agrees(model, heads, x).module.attention.num_heads == 1


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.a, self.norm = nnx.Conv(3, 8, (1,), rngs=rngs), nnx.GroupNorm(8, 4, rngs=rngs)
        self.b = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.norm(self.a(x))))


def test_group_norm_loses_groups_but_no_members_of_groups():
    model, x = built(Normed), normal(2, 4, 3)

    def without(gone):
        gone = (-1, gone)
        return cut(model, a__kernel=gone, a__bias=gone, norm__scale=gone, norm__bias=gone)

    norm = agrees(model, without([2, 3, 6, 7]), x).module.norm
    assert (norm.num_groups, norm.group_size) == (2, 2)
    assert "norm: its means are over 1 features, not 2" in refused(model, without([0, 2, 4, 6]), x)


class Heads(TwoLayers):
    """A class with a width of its own."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.width = 6

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)).reshape(-1, self.width))


def test_a_width_in_an_attribute_of_ones_own():
    model, x = built(Heads), normal(4, 3)
    masks = half(model, x)
    why = refused(model, masks, x)
    assert why.startswith("There is no smaller Heads: a copy with the small arrays raises TypeError")

    def fix(module):
        module.width = module.a.out_features

    assert agrees(model, masks, x, fix=fix).module.width == 3
    # This one makes a carry of 8 zeros.
    model, x = built(LSTMNNX), normal(2, 3, 3)
    assert "raises TypeError: dot_general requires" in refused(model, half(model, x), x)


class Auxiliary(TwoLayers):
    """It has a second head, which only training reads."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.extra, self.use_running_average = nnx.Linear(6, 5, rngs=rngs), False

    def __call__(self, x):
        x = nnx.relu(self.a(x))
        return self.b(x) if self.use_running_average else (self.b(x), self.extra(x))


def test_what_only_training_reads_stays_whole_and_is_looked_at():
    model, x = built(Auxiliary), normal(2, 3)
    masks = cut(model, a__kernel=(1, [0]), a__bias=(0, [0]))
    assert "in training mode, a copy with the small arrays raises" in refused(model, masks, x)
    module = agrees(model, masks, x, other_modes=False).module
    assert module.extra.kernel.shape == (6, 5)
    model.train()  # now the plan takes it into account
    result = compact_module(model, masks, x)
    assert result.why is None and result.module.extra.kernel.shape == (5, 5)


def test_constants_fold_on_request():
    model, x = built(Noisy), normal(2, 3)
    masks = cut(model, a__kernel=(1, [0, 4]))
    model.a.bias[...] = jnp.full(6, 0.5)
    assert compact_module(model, masks, x).why.startswith("Nothing was removed")
    result = agrees(model, masks, x, fold_constants=True)
    assert result.module.a.out_features in (4, 5)


# --- the rest of the contract


def test_nothing_removed():
    model, x = built(LeNetNNX), normal(2, 8, 8, 1)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), nnx.state(model, nnx.Param))
    masks["out"]["kernel"][...] = masks["out"]["kernel"][...].at[0, 0].set(False)
    result = compact_module(model, masks, x)
    assert result.why.startswith("Nothing was removed")
    close(call(result.module, x), call(masked(model, masks), x))
    masks["out"]["bias"][...] = jnp.zeros(5, bool)
    masks["out"]["kernel"][...] = masks["out"]["kernel"][...].at[:, 1].set(False)
    assert "output" in compact_module(model, masks, x).why


def test_a_plan_in_place_of_masks(tmp_path):
    model, x = built(Noisy), normal(2, 3)
    masks = half(model, x)
    result = agrees(model, masks, x)
    result.small.plan.save(tmp_path / "plan.npz")
    again = compact_module(model, Plan.load(tmp_path / "plan.npz"), x)
    assert again.why is None
    close(call(again.module, x), call(result.module, x))


def test_errors():
    model, x = built(Noisy), normal(2, 3)
    masks = half(model, x)
    with pytest.raises(TypeError, match=r"flax\.nnx\.Module or an equinox\.Module, got Dense"):
        compact_module(nn.Dense(3), masks, x)
    with pytest.raises(ValueError, match=r"tree structure of params.*Missing: b/bias"):
        compact_module(model, {path: m for path, m in array_leaves(masks).items() if path != "b/bias"}, x)
    with pytest.raises(ValueError, match="Not in params: c"):
        compact_module(model, {**array_leaves(masks), "c": jnp.ones(3, bool)}, x)
    with pytest.raises(TypeError, match="masks are bool"):
        compact_module(model, jax.tree.map(lambda m: m.astype(jnp.float32), masks), x)
    with pytest.raises(TypeError, match="arrays with values"):
        compact_module(nnx.eval_shape(lambda: Noisy(nnx.Rngs(0))), masks, x)


def test_libraries_of_modules_are_not_imported():
    code = "import sys, jaxprune; assert not {'flax', 'equinox'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_linen_widths_says_what_to_write_instead():
    with pytest.raises(AttributeError, match=r"widths of the small params.*compare with small\.apply"):
        jp.graph.linen_widths  # noqa: B018
