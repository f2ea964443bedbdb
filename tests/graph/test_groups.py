"""Coupled channels: which there are, what they consist of, and why some cannot go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.soak.zoo_check import random_masks
from tests.zoo import ZOO


def groups_of(name, **kwargs):
    case = ZOO[name]()
    return case, jp.channel_groups(case.apply, case.params, *case.inputs, state=case.state, **kwargs)


def attention_params(heads=4, kv=2, width=3, dim=5):
    return {
        "q": jnp.ones((dim, heads * width)),
        "k": jnp.ones((dim, kv * width)),
        "v": jnp.ones((dim, kv * width)),
        "o": jnp.ones((heads * width, dim)),
    }


def attention(params, x, heads=4, kv=2, width=3):
    """Grouped-query attention: two heads share each key and value."""
    b, t, _ = x.shape
    q = (x @ params["q"]).reshape(b, t, kv, heads // kv, width)
    k = (x @ params["k"]).reshape(b, t, kv, width)
    v = (x @ params["v"]).reshape(b, t, kv, width)
    scores = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k) / width**0.5)
    return jnp.einsum("bkgts,bskd->btkgd", scores, v).reshape(b, t, heads * width) @ params["o"]


def by_member(groups, path, axis):
    (group,) = [g for g in groups if any((m.path, m.axis) == (path, axis) for m in g.members)]
    return group


@pytest.mark.parametrize(
    ("split", "units", "q_slices"),
    [
        ("major", 2, [0, 1, 2, 3, 4, 5]),  # a key with its value and both heads that read it
        ("minor", 3, [0, 3, 6, 9]),  # one place of every head's value
        (0, 2, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_splits_of_attention(split, units, q_slices):
    groups = jp.channel_groups(attention, attention_params(), jnp.ones((1, 4, 5)), split=split)
    group = by_member(groups, "o", 0)
    assert group.units == units
    (out,) = [m for m in group.members if m.path == "o"]
    np.testing.assert_array_equal(out.indices[0], q_slices)
    assert group.removable


def test_heads_of_a_group_are_the_factor_in_the_middle():
    groups = jp.channel_groups(attention, attention_params(), jnp.ones((1, 4, 5)), split=1)
    group = by_member(groups, "o", 0)
    # The same head of every key: its queries and what reads it; keys and values stay.
    assert sorted(m.path for m in group.members) == ["o", "q"]
    assert group.units == 2
    np.testing.assert_array_equal(group.members[0].indices[0], [0, 1, 2, 6, 7, 8])


@pytest.mark.parametrize("split", ["major", "minor", 1, -1])
def test_every_split_compacts_exactly(split):
    params = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(p.size).standard_normal(p.shape), jnp.float32),
        attention_params(),
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 5)), jnp.float32)
    groups = jp.channel_groups(attention, params, x, split=split)
    masks = random_masks(params, groups, 0.5, np.random.default_rng(0))
    small = jp.compact(attention, params, masks, x, verify=False)
    assert small.params["o"].size < params["o"].size
    expected = attention(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(small.apply(small.params, x), expected, atol=1e-5)


def test_abstract_params_are_enough():
    case, groups = groups_of("resnet18")
    abstract = jax.eval_shape(lambda: (case.params, case.inputs))
    again = jp.channel_groups(case.apply, abstract[0], *abstract[1])
    assert str(again) == str(groups)


def test_a_residual_stream_is_one_group_and_a_branch_another():
    _, groups = groups_of("resnet20_conv_shortcut")
    stream = by_member(groups, "params/Conv_0/kernel", 3)
    assert ("params/BasicBlock_0/Conv_1/kernel", 3) in {(m.path, m.axis) for m in stream.members}
    branch = by_member(groups, "params/BasicBlock_0/Conv_0/kernel", 3)
    assert {(m.path, m.axis) for m in branch.members} >= {
        ("params/BasicBlock_0/Conv_0/kernel", 3),
        ("params/BasicBlock_0/BatchNorm_0/scale", 0),
        ("batch_stats/BasicBlock_0/BatchNorm_0/var", 0),
        ("params/BasicBlock_0/Conv_1/kernel", 2),
    }


def test_blocks_that_differ_in_size_only_are_of_one_kind():
    _, groups = groups_of("resnet20_conv_shortcut")
    inner = [by_member(groups, f"params/BasicBlock_{n}/Conv_0/kernel", 3) for n in range(3)]
    assert len({g.kind for g in inner}) == 1
    assert len({g.units for g in inner}) == 3


def test_a_flattened_channel_is_a_block_of_rows():
    def apply(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(x).reshape(len(x), -1) @ params["dense"]

    params = {"conv": jnp.ones((3, 3, 1, 4)), "dense": jnp.ones((2 * 3 * 4, 5))}
    (group,) = jp.channel_groups(apply, params, jnp.ones((7, 2, 3, 1)))
    rows = {m.path: m.indices for m in group.members}["dense"]
    np.testing.assert_array_equal(rows[1], 4 * np.arange(6) + 1)


def test_why_not_names_the_op_and_the_line_of_the_user():
    _, groups = groups_of("mlp_mixer")
    (stuck,) = [g for g in groups if not g.removable]
    assert "reduce_sum at vision.py:" in stuck.why_not
    assert "not removable: reduce_sum" in str(groups)


def test_axes_that_stay_whole_have_a_reason():
    _, groups = groups_of("lenet_linen")
    reasons = {whole.why: whole.members for whole in groups.whole}
    assert ("Conv_0/kernel", 0) in next(m for why, m in reasons.items() if "slides a window" in why)
    assert reasons["it meets an axis of the output"] == (("Dense_0/bias", 0), ("Dense_0/kernel", 1))


def test_what_the_function_never_reads_stays_whole():
    def apply(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "head": jnp.ones((4, 7))}
    groups = jp.channel_groups(apply, params, jnp.ones((1, 3)))
    assert (("head", 0), ("head", 1)) in [whole.members for whole in groups.whole]
    masks = jp.ones_masks(params)
    small = jp.compact(apply, params, masks, jnp.ones((1, 3)))
    assert small.keep == {}


def test_the_table_fits_80_columns_and_collapses_layers():
    _, groups = groups_of("vit_linen")
    lines = str(groups).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["group", "units", "members"]


def test_parts_of_params():
    _, groups = groups_of("resnet18")
    part = groups.under("params")
    assert {m.path.split("/")[0] for g in part for m in g.members}.isdisjoint({"params", "batch_stats"})
    with pytest.raises(ValueError, match="no member of a group lies under 'weights'"):
        groups.under("weights")


def test_groups_can_be_left_out():
    _, groups = groups_of("lenet_linen")
    assert len(groups.without(jp.matching("Conv_0/kernel"))) == len(groups) - 1
    with pytest.raises(ValueError, match="matches no member"):
        groups.without(jp.matching("nothing"))


@pytest.mark.parametrize("split", ["heads", True, 1.5])
def test_bad_splits(split):
    with pytest.raises(TypeError, match=r"split must be an integer .*; or 'major', 'minor'"):
        jp.channel_groups(attention, attention_params(), jnp.ones((1, 4, 5)), split=split)


def test_channel_shuffle_keeps_places_of_groups():
    _, major = groups_of("shufflenet")
    assert [g.removable for g in major] == [False]
    assert "another split= may give more" in major.groups[0].why_not
    _, minor = groups_of("shufflenet", split="minor")
    assert all(g.removable and g.units > 1 for g in minor)


def test_layers_in_a_list_of_arrays_are_of_one_kind():
    layers = [jnp.ones((4, 6)), jnp.ones((6, 8)), jnp.ones((8, 5)), jnp.ones((5, 2))]

    def apply_fn(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer)
        return x @ params[-1]

    kinds = {group.kind for group in jp.channel_groups(apply_fn, layers, jnp.ones((3, 4)))}
    assert kinds == {"*[0 of 2] *[1 of 2]"}
    named = {f"w{i}": layer for i, layer in enumerate(layers)}
    groups = jp.channel_groups(lambda p, x: apply_fn(list(p.values()), x), named, jnp.ones((3, 4)))
    assert len({group.kind for group in groups}) == 3
