"""Compaction: equal to the masked network, in every way a function of params is used."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.graph.engine.program import TracedNetwork
from tests.soak.zoo_check import compare, difference, random_masks, tolerance
from tests.support.devices import on_eight_devices
from tests.zoo import ZOO
from tests.zoo.plain import mlp, mlp_params

# Nothing can be removed from these: what they do along the hidden axis needs all of it.
REFUSED = {"hidden_cumsum", "hidden_sort"}


# Every other model, and the refused ones. `python -m tests.soak.zoo_check` checks all of them, at 30 % and
# 70 %, in both precisions.
@pytest.mark.parametrize("name", [name for n, name in enumerate(ZOO) if n % 2 == 0 or name in REFUSED])
def test_a_model_of_the_zoo_is_equal_when_compacted(name):
    errors = compare(ZOO[name](), 0.5, jnp.float32, split="minor" if name == "shufflenet" else "major")
    assert max(errors.output, errors.gradient) <= tolerance(name, jnp.float32)
    assert (errors.removed > 0.1) == (name not in REFUSED)


def test_float64_is_equal_to_rounding():
    with jax.enable_x64(True):
        for name in ("resnet20_conv_shortcut", "layer_norm_two_pass", "llama_gqa_repeat"):
            errors = compare(ZOO[name](), 0.7, jnp.float64)
            assert max(errors.output, errors.gradient) <= 1e-12


X = jnp.asarray(np.random.default_rng(1).standard_normal((4, 5)), jnp.float32)


@cache
def compacted(name="lenet_linen", fraction=0.5, **kwargs):
    case = ZOO[name]()
    groups = jp.channel_groups(case.apply, case.params, *case.inputs, state=case.state)
    masks = random_masks(case.params, groups, fraction, np.random.default_rng(0))
    small = jp.compact(case.apply, case.params, masks, *case.inputs, state=case.state, **kwargs)
    return case, masks, small


# Which slices are dropped, and which stay


def test_widths_are_those_of_the_live_units():
    _case, masks, small = compacted()
    for path, axes in small.keep.items():
        mask = dict(zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True))[path]
        for axis, kept in axes.items():
            alive = np.asarray(mask).any(axis=tuple(a for a in range(mask.ndim) if a != axis))
            np.testing.assert_array_equal(kept, np.flatnonzero(alive))
    assert small.not_removed == ()


def mlp_masks(*removed):
    """Return masks of the MLP without some places: (layer, leaf, index)."""
    masks = jax.tree.map(lambda p: np.ones(p.shape, bool), mlp_params())
    for layer, leaf, index in removed:
        masks[layer][leaf][index] = False
    return masks


ALL = slice(None)
FIRST_UNIT = [("a", "kernel", (ALL, 0)), ("a", "bias", 0)]
# Masked places, and the units of the two hidden layers that are left.
DEAD_UNITS = {
    "nothing reads them": ([("b", "kernel", 2), ("c", "kernel", 1)], (7, 5)),
    "nothing feeds one": ([("b", "kernel", (ALL, 4)), ("b", "bias", 4)], (8, 5)),
    "one feeds only a dead one": ([("b", "kernel", (0, slice(1, None))), ("c", "kernel", 0)], (7, 5)),
    "a bias lives": ([("a", "kernel", (ALL, 3))], (8, 6)),
    "no axis is emptied": ([(name, leaf, ...) for name in "abc" for leaf in ("kernel", "bias")], (1, 1)),
}


@pytest.mark.parametrize("name", DEAD_UNITS)
def test_units_that_masks_leave_dead_go(name):
    removed, (first, second) = DEAD_UNITS[name]
    masks = mlp_masks(*removed)
    small = jp.compact(mlp, mlp_params(), masks, X)
    shapes = {path: leaf["kernel"].shape for path, leaf in small.params.items()}
    assert shapes == {"a": (5, first), "b": (first, second), "c": (second, 3)}
    if name == "one feeds only a dead one":
        np.testing.assert_array_equal(small.keep["a/kernel"][1], np.arange(1, 8))
    if name == "a bias lives":
        (kept,) = small.not_removed
        assert (kept.path, kept.axis, kept.count) == ("a/kernel", 1, 1)
        assert "dot_general at plain.py" in kept.why


def test_a_compacted_network_cannot_be_changed():
    small = compacted()[2]
    with pytest.raises(AttributeError):
        small.params = {}
    for value in (small, small.report()):
        with pytest.raises(AttributeError, match="'stayed'; it is called not_removed now"):
            value.stayed  # noqa: B018


def test_values_that_happen_to_be_zero_justify_nothing():
    params = mlp_params()
    params["b"]["kernel"] = params["b"]["kernel"].at[2].set(0.0)
    small = jp.compact(mlp, params, jp.ones_masks(params), X)
    assert small.keep == {}


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_widths_are_rounded_up(multiple):
    case, masks, small = compacted(fraction=0.7, multiple_of=multiple)
    plain = compacted(fraction=0.7)[2]
    for path, axes in plain.keep.items():
        for axis, kept in axes.items():
            dense = small.plan.shapes[path][axis]
            wanted = min(-(-len(kept) // multiple) * multiple, dense)
            assert small.plan.small_shape(path)[axis] == wanted
            assert set(kept) <= set(small.keep.get(path, {}).get(axis, np.arange(dense)))
    expected = case.apply(jp.apply_masks(case.params, masks), *case.inputs)
    np.testing.assert_allclose(small.apply(small.params, *case.inputs), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_masks_of_an_mlp_give_an_equal_network(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    params = mlp_params((5, 4, 3, 3), seed=3)
    masks = jax.tree.map(lambda p: rng.random(p.shape) < rng.choice([0.0, 0.3, 0.7, 1.0]), params)
    for leaf in jax.tree.leaves(masks):
        for axis in range(leaf.ndim):
            gone = rng.random(leaf.shape[axis]) < 0.3
            np.moveaxis(leaf, axis, 0)[gone] = False
    small = jp.compact(mlp, params, masks, X, verify=False)
    expected = mlp(jp.apply_masks(params, masks), X)
    np.testing.assert_allclose(small.apply(small.params, X), expected, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda p: p + 0.5, small.params)
    np.testing.assert_allclose(small.apply(moved, X), mlp(small.expand(moved), X), rtol=1e-4, atol=1e-4)


# How it is used


def test_any_batch_size_under_jit_and_grad():
    case, _masks, small = compacted()
    x = jnp.concatenate([case.inputs[0]] * 3)
    apply = jax.jit(small.apply)
    np.testing.assert_allclose(apply(small.params, x), case.apply(small.expand(small.params), x), atol=1e-5)
    assert apply._cache_size() == 1
    apply(small.params, x)
    assert apply._cache_size() == 1


@pytest.mark.parametrize("name", ["autoencoder", "hidden_softmax", "custom_jvp"])
def test_second_derivatives(name):
    case, _masks, small = compacted(name)

    def product(apply):
        # The Hessian times the params.
        gradient = jax.grad(lambda s: jnp.sum(apply(s, *case.inputs) ** 2))
        return jax.jit(lambda s: jax.jvp(gradient, (s,), (s,))[1])(small.params)

    got, expected = product(small.apply), product(lambda s, *x: case.apply(small.expand(s), *x))
    assert difference(expected, got) < 1e-5


def test_vmap_over_params_and_over_inputs_and_in_scan():
    case, _masks, small = compacted()
    (x,) = case.inputs
    several = jax.tree.map(lambda p: jnp.stack([p, 1.1 * p]), small.params)
    dense = jax.vmap(small.expand)(several)
    np.testing.assert_allclose(
        jax.vmap(small.apply, (0, None))(several, x), jax.vmap(case.apply, (0, None))(dense, x), atol=1e-4
    )
    xs = jnp.stack([x, 2 * x, 3 * x])
    expected = jax.vmap(case.apply, (None, 0))(small.expand(small.params), xs)
    np.testing.assert_allclose(jax.vmap(small.apply, (None, 0))(small.params, xs), expected, atol=1e-4)
    scanned = jax.lax.scan(lambda c, x: (c, small.apply(small.params, x)), 0, xs)[1]
    np.testing.assert_allclose(scanned, expected, atol=1e-4)


def test_lower_precision_than_it_was_made_in():
    case, _masks, small = compacted()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), small.params)
    x = case.inputs[0].astype(jnp.bfloat16)
    got = small.apply(half, x)
    assert got.dtype == case.apply(small.expand(half), x).dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32), case.apply(small.expand(half), x).astype(jnp.float32), atol=0.1
    )


def test_dropout_draws_the_same_bits():
    case, _masks, small = compacted("dropout_train")
    x, key = case.inputs
    for seed in range(3):
        key = jax.random.key(seed)
        expected = case.apply(small.expand(small.params), x, key)
        np.testing.assert_allclose(small.apply(small.params, x, key), expected, atol=1e-5)


def test_export_with_a_symbolic_batch():
    case, masks, small = compacted("vit_linen")
    (x,) = case.inputs
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(small.apply))(small.params, shape)
    several = jnp.concatenate([x, x, x])
    expected = case.apply(jp.apply_masks(case.params, masks), several)
    np.testing.assert_allclose(exported.call(small.params, several), expected, atol=1e-5)


def test_abstract_params_give_a_plan():
    params, masks = mlp_params(), mlp_masks(*FIRST_UNIT)
    small = jp.compact(mlp, jax.eval_shape(lambda: params), masks, X)
    assert small.params["a"]["kernel"].shape == (5, 7)
    assert small.report(X).params == jp.compact(mlp, params, masks, X).report(X).params


def test_params_and_functions_that_are_traced():
    case, masks, small = compacted()

    @jax.jit
    def inside(params, factor):
        again = jp.compact(lambda p, x: factor * case.apply(p, x), params, masks, *case.inputs)
        return again.apply(again.params, *case.inputs)

    expected = 2.0 * small.apply(small.params, *case.inputs)
    np.testing.assert_allclose(inside(case.params, 2.0), expected, atol=1e-5)


@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
def test_sharded_params(explicit):
    code = f"from tests.graph import sharded_compaction as s; s.check({explicit})"
    assert int(on_eight_devices(code)) > 0


def test_strict_dtype_promotion():
    case = ZOO["layer_norm_two_pass"]()
    with jax.numpy_dtype_promotion("strict"):
        small = compacted("layer_norm_two_pass")[2]
        small.apply(small.params, *case.inputs)


def test_static_inputs():
    params, masks = mlp_params(), mlp_masks(*FIRST_UNIT)

    def apply(params, x, double, kind="plain"):
        assert kind == "plain"
        return 2 * mlp(params, x) if double else mlp(params, x)

    small = jp.compact(apply, params, masks, X, False)
    once, twice = small.apply(small.params, X, False), small.apply(small.params, X, True, "plain")
    np.testing.assert_array_equal(2 * once, twice)


# Training continues


class Net(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        for width in (6, 8):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


def train_apply(variables, x):
    return Net(True).apply(variables, x, mutable=["batch_stats"])


def test_training_goes_on_with_the_shrunk_adam_state_as_the_masked_network_would():
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.standard_normal((25, 8, 6, 6, 2)), jnp.float32)
    ys = jnp.asarray(rng.integers(3, size=(25, 8)))
    variables = Net(False).init(jax.random.key(0), xs[0])
    groups = jp.channel_groups(Net(False).apply, variables, xs[0])
    structure = jp.structures.channels(groups)
    whole = jp.prune_once(
        variables, jp.scores.magnitude, sparsity=0.5, structure=structure, scope="layerwise"
    )
    masks = whole["params"]
    tx = jp.keep_masked(optax.adam(1e-2), masks)
    params = jp.apply_masks(variables["params"], masks)
    stats = variables["batch_stats"]
    state = tx.init(params)

    def steps(apply, tx, params, stats, state, xs, ys):
        def step(carry, batch):
            params, stats, state = carry

            def loss(params):
                logits, new = apply({"params": params, "batch_stats": stats}, batch[0])
                values = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
                return values.mean(), new["batch_stats"]

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), stats, state), value

        return jax.lax.scan(step, (params, stats, state), (xs, ys))

    run = jax.jit(steps, static_argnums=(0, 1))
    (params, stats, state), _ = run(train_apply, tx, params, stats, state, xs[:5], ys[:5])

    variables = {"params": params, "batch_stats": stats}
    small = jp.compact(Net(False).apply, variables, whole, xs[0])
    assert small.report().params[1] < 0.4 * small.report().params[0]
    small_state = small.plan.under("params").shrink(state)
    bound = small.bind(train_apply, state=lambda out: out[1])
    small_tx = jp.keep_masked(optax.adam(1e-2), small.masks["params"])
    _, dense_losses = run(train_apply, tx, params, stats, state, xs[5:], ys[5:])
    (_, small_stats, _), losses = run(
        bound, small_tx, small.params["params"], small.params["batch_stats"], small_state, xs[5:], ys[5:]
    )
    np.testing.assert_allclose(losses, dense_losses, rtol=1e-5)
    assert small_stats["BatchNorm_0"]["mean"].shape == (3,)


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "momentum": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-3), 3),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "lbfgs": optax.lbfgs(memory_size=4),
    "wrapped": jp.wrap_optax(optax.adam(1e-3), jp.pruner(jp.scores.magnitude, 0.5, memory=1.0)),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_states_of_optimizers_shrink_and_expand(tx):
    case, _masks, small = compacted()
    state, tiny = tx.init(case.params), tx.init(small.params)
    shrunk = small.shrink(state)
    if isinstance(tiny, jp.WrapOptaxState):  # it keeps the dense shapes
        assert dict(shrunk.pruner.dense.by_path)["Conv_0/kernel"] == case.params["Conv_0"]["kernel"].shape
        tiny = tiny._replace(pruner=tiny.pruner._replace(dense=shrunk.pruner.dense))
    assert jax.tree.structure(shrunk) == jax.tree.structure(tiny)
    assert [jnp.shape(x) for x in jax.tree.leaves(shrunk)] == [jnp.shape(x) for x in jax.tree.leaves(tiny)]
    again = small.expand(shrunk)
    assert [jnp.shape(x) for x in jax.tree.leaves(again)] == [jnp.shape(x) for x in jax.tree.leaves(state)]
    assert difference(small.shrink(again), shrunk) == 0


def test_a_state_that_cannot_shrink_is_refused():
    params = {"a": {"kernel": jnp.ones((200, 300))}, "b": {"kernel": jnp.ones((300, 200))}}
    masks = jp.ones_masks(params)
    masks["a"]["kernel"] = masks["a"]["kernel"].at[:, :100].set(False)

    def apply(params, x):
        return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    small = jp.compact(apply, params, masks, jnp.ones((2, 200)))
    factored = optax.adafactor(1e-3).init(params)
    with pytest.raises(ValueError, match=r"v_row.*belongs to params\['a/kernel'\]"):
        small.shrink(factored)
    with pytest.raises(ValueError, match="none of kernel ends in the path of a param"):
        small.shrink({"kernel": jnp.ones((200, 300))})
    assert small.shrink(optax.sgd(0.1).init(params)) == optax.sgd(0.1).init(small.params)


def test_a_function_that_needs_dropped_slices_is_refused():
    params, masks = mlp_params(), mlp_masks(*FIRST_UNIT)
    small = jp.compact(mlp, params, masks, X)

    def other(params, x):
        return jnp.cumsum(x @ params["a"]["kernel"], axis=1).sum() + mlp(params, x)

    with pytest.raises(ValueError, match=r"slice 0 of params\['a/bias'\] along axis 0.*cumsum at test_"):
        small.bind(other)(small.params, X)
    with pytest.raises(
        ValueError, match=r"params\['a/bias'\] has shape \(8,\); after compaction it has \(7,\)"
    ):
        small.apply(params, X)


# Plans on disk


def test_a_plan_is_saved_loaded_and_used_in_place_of_masks(tmp_path):
    case, masks, small = compacted()
    small.plan.save(tmp_path / "plan.npz")
    plan = jp.Plan.load(tmp_path / "plan.npz")
    again = jp.compact(case.apply, jp.apply_masks(case.params, masks), plan, *case.inputs)
    assert difference(small.params, again.params) == 0
    np.testing.assert_array_equal(
        small.apply(small.params, *case.inputs), again.apply(again.params, *case.inputs)
    )
    with np.load(tmp_path / "plan.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype == np.int64 for name in arrays.files)


def test_plans_that_do_not_fit_are_refused(tmp_path):
    _, _, small = compacted()
    file = tmp_path / "plan.npz"
    with pytest.raises(ValueError, match="the plan does not fit the params"):
        jp.compact(mlp, mlp_params(), small.plan, X)
    np.savez(file, numbers=np.arange(3))
    with pytest.raises(ValueError, match="is not a plan"):
        jp.Plan.load(file)
    for bad in ([0, 9], [1, 0], [], [-1, 2]):
        np.savez(file, **{"format": 1, "shape:a": [4], "keep 0:a": np.array(bad, np.int64)})
        with pytest.raises(ValueError, match="do not fit size 4"):
            jp.Plan.load(file)


# Folding


def with_filters_pruned(name, axis=-1):
    case, filters = ZOO[name](), jp.structures.slices(axis)
    return case, jp.prune_once(case.params, jp.scores.magnitude, 0.5, structure=filters, scope="layerwise")


def test_filters_whose_biases_live_fold_into_what_reads_them():
    case, masks = with_filters_pruned("lenet_linen")
    plain = jp.compact(case.apply, case.params, masks, *case.inputs)
    folded = jp.compact(case.apply, case.params, masks, *case.inputs, fold_constants=True)
    assert plain.keep == {}
    # As small as with the biases gone: half of each layer but the last.
    assert folded.params["Conv_0"]["kernel"].shape[-1] == 3
    assert folded.params["Conv_1"]["kernel"].shape[-1] == 4
    assert folded.params["Dense_1"]["kernel"].shape[-1] == 6
    x = 3 * case.inputs[0] + 1
    expected = case.apply(jp.apply_masks(case.params, masks), x)
    np.testing.assert_allclose(folded.apply(folded.params, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(case.apply(folded.expand(folded.params), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg_bn", "resnet18", "equinox_conv"])
def test_folding_next_to_padding_and_norms(name):
    case, masks = with_filters_pruned(name, axis=0 if name == "equinox_conv" else -1)
    folded = jp.compact(case.apply, case.params, masks, *case.inputs, fold_constants=True)
    assert folded.report().params[1] < 0.7 * folded.report().params[0]
    x = case.inputs[0] + 1
    expected = case.apply(jp.apply_masks(case.params, masks), x)
    np.testing.assert_allclose(folded.apply(folded.params, x), expected, rtol=1e-4, atol=1e-4)


def test_folding_needs_arrays():
    params = mlp_params()
    masks = jp.ones_masks(params)
    with pytest.raises(TypeError, match="needs real arrays"):
        jax.eval_shape(lambda p: jp.compact(mlp, p, masks, X, fold_constants=True).params, params)


# Errors


def test_bad_arguments():
    params = mlp_params()
    masks = jp.ones_masks(params)
    with pytest.raises(ValueError, match="multiple_of must be an integer of 1 or more, got 0"):
        jp.compact(mlp, params, masks, X, multiple_of=0)
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        jp.compact(mlp, params, masks["a"], X)
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.eval_shape(lambda m: jp.compact(mlp, params, m, X).params, masks)
    with pytest.raises(ValueError, match="gives an output at '0', but params has no such leaf"):
        jp.compact(mlp, params, masks, X, state=lambda out: [out])


def test_the_check_finds_a_rule_that_is_wrong():
    from jaxprune.graph.engine.rules import base

    primitive = jax.extend.core.Primitive("jaxprune_test_shift")
    primitive.def_impl(lambda x: x + 1)
    primitive.def_abstract_eval(lambda x: x)
    jax.interpreters.mlir.register_lowering(
        primitive, jax.interpreters.mlir.lower_fun(lambda x: x + 1, False)
    )

    def apply(params, x):
        return primitive.bind(jnp.tanh(x @ params["a"])) @ params["b"]

    params = {"a": jnp.ones((5, 4)), "b": jnp.ones((4, 2))}
    masks = jp.ones_masks(params)
    masks["a"] = masks["a"].at[:, 1].set(False)
    small = jp.compact(apply, params, masks, X)
    assert small.params["a"].shape == (5, 4)  # without a rule it stays whole
    assert "jaxprune_test_shift at test_compaction.py" in small.not_removed[0].why

    def says_zero(op, facts):
        facts.learn(op.outputs[0], facts.of(op.inputs[0]).zero)

    try:
        jp.graph.register_rule("jaxprune_test_shift", rule=jp.graph.elementwise)
        small = jp.compact(apply, params, masks, X)
        assert small.params["a"].shape == (5, 4)  # 1 is not 0, and what reads it is not masked
        jp.graph.register_rule("jaxprune_test_shift", rule=jp.graph.elementwise._replace(flow=says_zero))
        with pytest.raises(RuntimeError, match="differs from the masked one"):
            jp.compact(apply, params, masks, X)
    finally:
        base._RULES.pop("jaxprune_test_shift", None)


def test_a_report_says_what_was_gained():
    case, _masks, small = compacted()
    report = small.report(*case.inputs, rounds=2)
    dense, tiny = report.params
    assert dense == sum(p.size for p in jax.tree.leaves(case.params))
    assert tiny == sum(p.size for p in jax.tree.leaves(small.params))
    assert report.macs[0] > report.macs[1] > 0
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    expected = (f"{dense:,}", f"{tiny:,}", f"{dense / tiny:.2f} x", "params", "multiply-adds", "time")
    assert all(part in text for part in expected)
    with pytest.raises(ValueError, match="needs inputs"):
        small.report(rounds=3)


def test_a_plan_masks_params_that_are_not_masked_yet():
    params, masks = mlp_params(), mlp_masks(*FIRST_UNIT)
    plan = jp.compact(mlp, params, masks, X).plan
    small = jp.compact(mlp, params, plan, X)  # verified against the masked network
    np.testing.assert_allclose(small.apply(small.params, X), mlp(jp.apply_masks(params, masks), X), rtol=1e-5)


def test_trees_are_cut_outside_jit_as_under_it():
    # Outside numpy moves the entries, under it XLA.
    rows = np.array([[0, 2], [1, 2], [3, 4]])
    plan = jp.Plan(
        shapes={"kernel": (4, 5), "norm": (5,), "up": (3, 2, 5), "layers": (3, 4), "other": (2,)},
        keep={
            "kernel": {0: np.array([1, 2]), 1: np.array([0, 3, 4])},
            "norm": {0: np.array([0, 3, 4])},
            "up": {2: rows, 1: np.array([[0], [1], [0]])},
            "layers": {0: np.array([0, 2]), 1: np.array([[0, 1], [2, 3]])},
        },
        divisors={"norm": (0,)},
        stacks={"up": (0,), "layers": (0,)},
    )
    draw = np.random.default_rng(0)

    def tree(dtype, lead=()):
        return {
            path: jnp.asarray(draw.integers(0, 3, (*lead, *shape))).astype(dtype)
            for path, shape in plan.shapes.items()
        }

    for dense in (tree(jnp.float32), tree(jnp.bfloat16), tree(bool), {"mu": tree(jnp.float32, (2,))}):
        small, again = plan.shrink(dense), jax.jit(plan.shrink)(dense)
        dense, too = plan.expand(small), jax.jit(plan.expand)(again)
        for ours, theirs in ((small, again), (dense, too)):
            assert jax.tree.structure(ours) == jax.tree.structure(theirs)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                assert isinstance(a, jax.Array) and a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
        for a, b in zip(jax.tree.leaves(plan.shrink(dense)), jax.tree.leaves(small), strict=True):
            np.testing.assert_array_equal(a, b)


def test_facts_that_are_asked_for_again_are_the_same_and_independent():
    params = mlp_params()
    network = TracedNetwork(mlp, params, (X,))

    def zeros(unit):
        marks = {path: [None] * len(value.axes) for path, value in network.values.items()}
        marks["a/kernel"][1] = marks["a/bias"][0] = np.arange(params["a"]["bias"].size) == unit
        return marks

    def known(facts):
        hidden = [value for op in network.region.ops for value in op.outputs]
        return [[None if v is None else v.tolist() for v in facts.of(value).zero] for value in hidden]

    first = network.facts(zeros(1))
    expected, other = known(first), known(network.facts(zeros(2)))
    assert expected != other
    assert known(network.facts(zeros(1))) == expected
    network.facts(zeros(1)).learn(network.region.ops[0].outputs[0], fill=0)
    assert known(network.facts(zeros(1))) == expected == known(first)
