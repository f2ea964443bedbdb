"""Coupled channels as a structure: what is scored, what goes, and how much."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune.structures import channels
from jaxprune.tree.leaves import array_leaves
from tests.zoo import ZOO
from tests.zoo.plain import mlp, mlp_params

X = jnp.ones((2, 5))
PARAMS = mlp_params()
GROUPS = jp.channel_groups(mlp, PARAMS, X)


def widths(masks):
    """How many units of each layer's output are left, and that all their members agree."""
    result = []
    for out, following in (("a", "b"), ("b", "c")):
        kernel = np.asarray(masks[out]["kernel"]).any(axis=0)
        np.testing.assert_array_equal(kernel, masks[out]["bias"])
        np.testing.assert_array_equal(kernel, np.asarray(masks[following]["kernel"]).any(axis=1))
        result.append(int(kernel.sum()))
    return result


def prune(structure=None, score=jp.scores.magnitude, params=PARAMS, **kwargs):
    return jp.prune_once(params, score, structure=structure or channels(GROUPS), **kwargs)


@pytest.mark.parametrize("reduce", [jnp.mean, jnp.sum, jnp.max])
@pytest.mark.parametrize("norm", [1, 2, jnp.sum])
def test_scores_are_norms_of_slices_reduced_over_members(norm, reduce):
    masks = prune(channels(GROUPS, norm, reduce), count={"a/kernel[1]": 3}, scope="layerwise")
    w, v = np.abs(np.asarray(PARAMS["a"]["kernel"])), np.abs(np.asarray(PARAMS["b"]["kernel"]))
    if norm == 2:
        each = [np.sqrt((w**2).sum(axis=0)), np.sqrt((v**2).sum(axis=1))]
    else:
        each = [w.sum(axis=0), v.sum(axis=1)]
    score = {jnp.mean: np.mean, jnp.sum: np.sum, jnp.max: np.max}[reduce](np.stack(each), axis=0)
    gone = np.flatnonzero(~np.asarray(masks["a"]["bias"]))
    np.testing.assert_array_equal(gone, np.sort(np.argsort(score)[:3]))


def test_an_axis_chooses_the_members_that_score():
    masks = prune(channels(GROUPS, 1, axis=-1), count={"a/kernel[1]": 3}, scope="layerwise")
    score = np.abs(np.asarray(PARAMS["a"]["kernel"])).sum(axis=0)
    gone = np.flatnonzero(~np.asarray(masks["a"]["bias"]))
    np.testing.assert_array_equal(gone, np.sort(np.argsort(score)[:3]))


def test_layerwise_takes_from_each_group_and_global_from_all():
    assert widths(prune(sparsity=0.5, scope="layerwise")) == [4, 3]
    assert sum(widths(prune(sparsity=0.5))) == 7


def test_normalize_makes_groups_comparable():
    scaled = jax.tree.map(lambda p: p, PARAMS)
    scaled["c"] = {"kernel": 1000 * PARAMS["c"]["kernel"]}
    assert widths(prune(params=scaled, sparsity=0.5)) == [1, 6]
    masks = prune(channels(GROUPS, normalize=jnp.max), params=scaled, sparsity=0.5)
    assert widths(masks)[1] < 6


def test_targets_by_group():
    masks = prune(sparsity={"a/kernel[1]": 0.75}, scope="layerwise")
    assert widths(masks) == [2, 6]
    with pytest.raises(
        ValueError, match=r"sparsity names 'a/kernel', which where= does not take in.*a/kernel"
    ):
        prune(sparsity={"a/kernel": 0.75}, scope="layerwise")


@pytest.mark.filterwarnings("ignore:floor=")
def test_a_floor_and_a_minimum_width_keep_the_best():
    with pytest.warns(UserWarning, match="12 of the 13 units asked for"):
        assert widths(prune(sparsity=0.95)) == [1, 1]
    with pytest.warns(UserWarning, match="units asked for"):
        assert widths(prune(channels(GROUPS, min_width=3), sparsity=0.9)) == [3, 3]
    with pytest.warns(UserWarning, match="units asked for"):
        assert widths(prune(channels(GROUPS, min_width={"a/kernel[1]": 5}), sparsity=0.9)) == [5, 1]
    with pytest.warns(UserWarning, match="layer collapse"):
        masks = prune(sparsity=0.99, floor=0)
    assert widths(masks) == [0, 0]


@pytest.mark.parametrize(
    ("multiple", "expected"),
    [
        (2, [4, 4]),
        (4, [4, 4]),
        (8, [8, 6]),
        (1, [3, 3]),
        ([1, 5, 6], [5, 5]),
        (jp.metrics.Widths((2, 4)), [4, 4]),
        ((8, 16), [8, 6]),
    ],
)
def test_widths_are_multiples_of_the_best(multiple, expected):
    count = {"a/kernel[1]": 5, "b/kernel[1]": 3}
    wide = multiple in (8, (8, 16))
    structure = channels(GROUPS, multiple_of=multiple)
    with pytest.warns(UserWarning, match="multiple_of=8") if wide else nullcontext():
        masks = prune(structure, count=count, scope="layerwise")
    assert widths(masks) == expected
    plain = prune(count=count, scope="layerwise")
    assert all(jax.tree.leaves(jax.tree.map(lambda p, m: bool(jnp.all(m | ~p)), plain, masks)))
    if multiple == 4:
        score = np.linalg.norm(PARAMS["a"]["kernel"], axis=0) + np.linalg.norm(PARAMS["b"]["kernel"], axis=1)
        kept = np.flatnonzero(np.asarray(masks["a"]["bias"]))
        np.testing.assert_array_equal(kept, np.sort(np.argsort(score)[-4:]))


def test_groups_that_are_ignored_stay_whole():
    assert widths(prune(channels(GROUPS, ignore=jp.matching("a/*")), sparsity=0.5)) == [8, 3]
    with pytest.raises(ValueError, match=r"ignore=matching\('z'\) matches no member of a group"):
        channels(GROUPS, ignore=jp.matching("z"))


def test_where_says_whose_scores_count():
    masks = prune(where=jp.matching("c/kernel"), sparsity=0.5)
    assert widths(masks) == [8, 3]
    score = np.linalg.norm(PARAMS["c"]["kernel"], axis=1)
    gone = np.flatnonzero(~np.asarray(masks["b"]["bias"]))
    np.testing.assert_array_equal(gone, np.sort(np.argsort(score)[:3]))


def test_a_sparsity_of_what_remains():
    first = prune(sparsity=0.25, scope="layerwise")
    remaining = prune(sparsity=0.5, of="remaining", scope="layerwise", masks=first)
    assert widths(remaining) == [3, 2]


def test_like_groups_rank_together():
    case = ZOO["resnet20_conv_shortcut"]()
    groups = jp.channel_groups(case.apply, case.params, *case.inputs)
    structure = channels(groups, normalize=jnp.mean)
    masks = jp.prune_once(
        case.params, jp.scores.magnitude, sparsity=0.5, structure=structure, scope="isomorphic"
    )
    plan = jp.compact(case.apply, case.params, masks, *case.inputs, verify=False).plan
    removed: dict[str, list[int]] = {}
    for group in groups:
        member = group.members[0]
        left = plan.small_shape(member.path)[member.axis]
        count = removed.setdefault(group.kind, [0, 0])
        count[0] += group.units - left
        count[1] += group.units
    assert len(removed) < len(groups)
    for gone, units in removed.values():
        assert gone == round(0.5 * units)
    with pytest.raises(ValueError, match="scope='isomorphic' ranks coupled channels of one kind"):
        jp.prune_once(PARAMS, jp.scores.magnitude, sparsity=0.5, scope="isomorphic")


def test_gradually_in_an_optimizer():  # tests/contracts has the scopes
    schedule = jp.schedules.cubic(0.5, begin_step=1, end_step=9)
    structure = channels(GROUPS, normalize=jnp.mean)
    pruner = jp.pruner(jp.scores.magnitude, schedule, structure=structure, every=4)
    tx = jp.wrap_optax(optax.adam(1e-2), pruner)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.sum(mlp(p, X) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=12)[0]

    params, state = run(PARAMS)
    masks = optax.tree.get(state, "masks")
    assert sum(widths(masks)) == 7
    jp.check_pruned(params, masks)
    small = jp.compact(mlp, params, masks, X)
    assert small.params["b"]["kernel"].shape == tuple(widths(masks))


def test_any_score():
    grads = jax.grad(lambda p: jnp.sum(mlp(p, X) ** 2))(PARAMS)
    for score, inputs, options in [
        (jp.scores.random, {"key": jax.random.key(0)}, {}),
        (jp.scores.taylor, {"grads": grads}, {}),
        (jp.scores.signed_taylor, {"grads": grads}, {"norm": jnp.sum}),
        (jp.scores.fpgm, {}, {"norm": jnp.inf, "axis": -1}),
    ]:
        masks = prune(channels(GROUPS, **options), score, sparsity=0.5, scope="layerwise", **inputs)
        assert widths(masks) == [4, 3]


def test_batch_norm_scales_as_scores():
    case = ZOO["vgg_bn"]()
    groups = jp.channel_groups(case.apply, case.params, *case.inputs)
    part = groups.under("params")
    masks = jp.prune_once(
        case.params["params"],
        jp.scores.magnitude,
        sparsity=0.5,
        structure=channels(part),
        where=jp.matching("*/scale"),
    )
    scale = case.params["params"]["BatchNorm_0"]["scale"]
    kept = np.asarray(masks["BatchNorm_0"]["scale"])
    assert np.abs(scale)[kept].min() >= np.abs(scale)[~kept].max(initial=0)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="where= takes in no member of a group"):
        prune(where=jp.matching("c/kernel"), sparsity=0.5, structure=channels(GROUPS.groups[:1]))
    case = ZOO["resnet18"]()
    groups = jp.channel_groups(case.apply, case.params, *case.inputs)
    with pytest.raises(ValueError, match="where= takes in no member of a group"):
        jp.prune_once(case.params["params"], jp.scores.magnitude, sparsity=0.5, structure=channels(groups))
    with pytest.raises(ValueError, match="no channels can be removed: the function has no groups"):
        channels([])
    refused = ZOO["hidden_cumsum"]()
    with pytest.raises(ValueError, match="no channels can be removed"):
        channels(jp.channel_groups(refused.apply, refused.params, *refused.inputs))
    with pytest.raises(ValueError, match="multiple_of must be an integer of 1 or more, got 0"):
        channels(GROUPS, multiple_of=0)
    with pytest.raises(ValueError, match="multiple_of must be rising widths"):
        channels(GROUPS, multiple_of=[8, 4])
    with pytest.raises(ValueError, match=r"min_width must be an integer of 1 or more .*, got 0"):
        channels(GROUPS, min_width=0)
    with pytest.raises(ValueError, match="min_width names a; the groups are"):
        channels(GROUPS, min_width={"a": 3})
    masks = prune(sparsity=0.5)
    with pytest.raises(ValueError, match="has units that span several leaves"):
        jp.rigl(masks, structure=channels(GROUPS), end_step=10, every=2)


def test_groups_no_wider_than_a_multiple_are_named():
    structure = channels(GROUPS, multiple_of=7)
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.3), structure=structure)
    state = pruner.init(PARAMS)
    with pytest.warns(UserWarning, match=r"not below the width of b/kernel\[1\] \(6 units\)") as caught:
        state = pruner.update(state, PARAMS)
    assert len(caught) == 1 and "a/kernel" not in str(caught[0].message)
    pruner.update(state, PARAMS)  # says it no more
    prune(channels(GROUPS, multiple_of=5), sparsity=0.5)
    # Nor of groups that take no part.
    prune(channels(GROUPS, multiple_of=7), sparsity=0.5, where=jp.matching("a/kernel"))


def attention():
    graph, params = nnx.split(
        nnx.MultiHeadAttention(num_heads=4, in_features=32, decode=False, rngs=nnx.Rngs(0))
    )
    return params, jp.channel_groups(lambda s, x: nnx.merge(graph, s)(x), params, jnp.ones((1, 5, 32)))


def test_groups_without_a_member_on_the_axis_are_named():
    params, groups = attention()
    with pytest.warns(UserWarning, match=r"axis=-1: key/bias\[0\] has no member on that axis") as caught:
        structure = channels(groups, axis=-1)
    assert len(caught) == 1
    for _ in range(2):  # warned once
        masks = jp.prune_once(params, jp.scores.magnitude, 0.5, scope="layerwise", structure=structure)
    assert np.asarray(masks["query"]["kernel"]).any(axis=(0, 2)).all()  # no head went


def test_groups_whose_members_on_the_axis_give_no_scores_are_named_once():
    # Of the group of a, the output axis is last for its bias alone, which gives no scores by default.
    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"].T + p["bias"]) @ p["b"].T) @ p["c"].T

    params = {"a": jnp.ones((4, 3)), "bias": jnp.ones(4), "b": jnp.ones((5, 4)), "c": jnp.ones((2, 5))}
    structure = channels(jp.channel_groups(apply, params, jnp.ones((1, 3))), axis=0)
    pruner = jp.pruner(
        jp.scores.magnitude,
        jp.schedules.geometric(0.4),
        structure=structure,
        scope="layerwise",
        where=jp.matching("b", "c"),
    )
    state, update = pruner.init(params), jax.jit(pruner.update)
    with pytest.warns(UserWarning, match=r"axis=0: b\[1\] has no member") as caught:
        state = update(state, params)
    assert len(caught) == 1
    state = pruner.update(update(state, params), params)  # says it no more
    assert np.asarray(state.masks["a"]).all() and not np.asarray(state.masks["b"]).all()


def test_an_axis_in_no_group_raises():
    params, groups = attention()
    with pytest.raises(ValueError, match="axis=7 is in no group"):
        jp.prune_once(params, jp.scores.magnitude, 0.5, structure=channels(groups, axis=7))


def variables():
    def apply(v, x):
        h = x @ v["params"]["a"]
        return jnp.tanh(h - v["stats"]["mean"]) @ v["params"]["b"]

    tree = {"params": {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, "stats": {"mean": jnp.zeros(4)}}
    return tree, jp.channel_groups(apply, tree, jnp.ones((1, 3)))


def test_the_prefix_is_named_where_it_helps():
    tree, groups = variables()
    params = tree["params"]
    for where in (jp.kernels, jp.matching("a")):
        with pytest.raises(ValueError, match=r"under 'params': pass groups\.under\('params'\)"):
            jp.prune_once(params, jp.scores.magnitude, 0.5, structure=channels(groups), where=where)
    deeper = [
        g._replace(members=tuple(m._replace(path=f"net/{m.path}") for m in g.members), weights=None)
        for g in groups
    ]
    with pytest.raises(ValueError, match=r"groups\.under\('net/params'\)"):
        jp.prune_once(params, jp.scores.magnitude, 0.5, structure=channels(deeper))
    part = channels(groups.under("params"))
    with pytest.raises(ValueError, match="of the part of these params under 'params'") as error:
        jp.prune_once(tree, jp.scores.magnitude, 0.5, structure=part)
    assert "groups.under" not in str(error.value)
    assert jp.prune_once(params, jp.scores.magnitude, 0.5, structure=part)["a"].sum() == 6


def test_no_prefix_is_named_where_none_helps():
    _, groups = variables()
    with pytest.raises(ValueError, match="where= takes in x/kernel") as error:
        jp.prune_once(
            {"x": {"kernel": jnp.ones((3, 4))}}, jp.scores.magnitude, 0.5, structure=channels(groups)
        )
    assert "under(" not in str(error.value)
    # Params that have some leaves of a group and lack others.
    part = channels(groups.under("params"))
    with pytest.raises(
        ValueError, match=r"entries in b, which the params do not have\. The groups have a, b"
    ) as error:
        jp.prune_once({"a": jnp.ones((3, 4))}, jp.scores.magnitude, 0.5, structure=part)
    assert "under(" not in str(error.value)


@pytest.mark.parametrize("multiple_of", [1, 3])
@pytest.mark.parametrize("network", [attention, lambda: (PARAMS, GROUPS)], ids=["attention", "mlp"])
def test_units_outside_jit_are_those_under_it(network, multiple_of):
    # Multiples of 1/64, so that sums are exact in any order; and few, so that units tie.
    params, groups = network()
    draw = np.random.default_rng(0)
    structure = channels(groups, norm=1, normalize=jnp.max, multiple_of=multiple_of)
    leaves = array_leaves(params)
    scores = {
        path: jnp.asarray(draw.integers(-3, 4, leaf.shape) / 64, jnp.float32) for path, leaf in leaves.items()
    }
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in leaves.items()}
    for group in groups.removable():  # some units are pruned already
        for member in group.members:
            np.moveaxis(masks[member.path], member.axis, 0)[member.indices[1]] = False
    masks = {path: jnp.asarray(mask) for path, mask in masks.items()}

    def units(scores, masks):
        found = structure.pool(scores, masks)
        keep = {
            name: alive & (jnp.arange(alive.size) % 3 != 0) for name, alive in sorted(found.alive.items())
        }
        return found.scores, found.alive, found.expand(keep)

    outside, traced = units(scores, masks), jax.jit(units)(scores, masks)
    assert jax.tree.structure(outside) == jax.tree.structure(traced)
    for ours, theirs in zip(jax.tree.leaves(outside), jax.tree.leaves(traced), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert not any(bool(alive[1]) for alive in outside[1].values())


def test_params_on_an_explicit_mesh_of_one_device():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    placed = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec("x")))
    expected, masks = prune(sparsity=0.5), prune(params=placed, sparsity=0.5)
    assert widths(masks) == widths(expected)
    for leaf, mask in zip(jax.tree.leaves(placed), jax.tree.leaves(masks), strict=True):
        assert mask.sharding.device_set == leaf.sharding.device_set
        assert mask.sharding.mesh == mesh
    plan = jp.compact(mlp, PARAMS, expected, X).plan
    for ours, wanted in zip(*map(jax.tree.leaves, (plan.shrink(placed), plan.shrink(PARAMS))), strict=True):
        assert ours.sharding.mesh == mesh
        np.testing.assert_array_equal(ours, wanted)
