"""States of real modules: keys, counts and flags are left alone; what is no array is refused by path."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp

KEY = jax.random.key
X = jax.random.normal(KEY(0), (4, 8))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.h, self.norm = nnx.Linear(8, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.drop, self.o = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.o(self.drop(nnx.relu(self.norm(self.h(x)))))


class EqxNet(eqx.Module):
    h: eqx.nn.Linear
    o: eqx.nn.Linear
    key: jax.Array
    old_key: jax.Array
    count: jax.Array
    training: jax.Array

    def __init__(self):
        self.h, self.o = eqx.nn.Linear(8, 6, key=KEY(1)), eqx.nn.Linear(6, 2, key=KEY(2))
        self.key, self.old_key = KEY(3), jax.random.PRNGKey(4)
        self.count, self.training = jnp.zeros((), jnp.int32), jnp.array(True)

    def __call__(self, x):
        return jax.vmap(lambda x: self.o(jax.nn.relu(self.h(x))))(x)


MODEL = NnxNet(nnx.Rngs(0))
MODEL.eval()
GRAPH, STATE = nnx.split(MODEL)
ARRAYS, STATIC = eqx.partition(EqxNet(), eqx.is_array)
TREES = {
    "nnx": (STATE, lambda p, x: nnx.merge(GRAPH, p)(x)),
    "equinox": (ARRAYS, lambda p, x: eqx.combine(p, STATIC)(x)),
}


def by_path(tree):
    return dict(zip(jp.leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def floats(tree):
    """The floating-point leaves alone, by path: what the functions here are about."""
    return {p: leaf for p, leaf in by_path(tree).items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def check_masks(masks, params, expected):
    """Masks of a state are those of its floats, and True elsewhere."""
    got = by_path(masks)
    for path, leaf in by_path(params).items():
        assert got[path].dtype == bool and got[path].shape == leaf.shape
        np.testing.assert_array_equal(got[path], expected.get(path, np.ones(leaf.shape, bool)))


def check_params(params, before, expected):
    got = by_path(params)
    for path, leaf in by_path(before).items():
        np.testing.assert_array_equal(raw(got[path]), expected[path] if path in expected else raw(leaf))


@pytest.fixture(params=TREES)
def case(request):
    params, apply_fn = TREES[request.param]
    values = floats(params)

    def of_floats(floats_of, x):
        whole = [floats_of.get(path, leaf) for path, leaf in by_path(params).items()]
        return apply_fn(jax.tree.unflatten(jax.tree.structure(params), whole), x)

    loss = lambda p, x: jnp.mean(apply_fn(p, x) ** 2)  # noqa: E731
    loss_of_floats = lambda p, x: jnp.mean(of_floats(p, x) ** 2)  # noqa: E731
    grads = jax.grad(loss_of_floats)(values, X)
    return params, values, apply_fn, of_floats, loss, loss_of_floats, grads


def like(params, values, elsewhere):
    """A tree like the params, of values by path."""
    leaves = [values[p] if p in values else elsewhere(leaf) for p, leaf in by_path(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def everywhere(params, **_):
    return jax.tree.map(jnp.abs, params)


def squares(params, **_):
    return jax.tree.map(lambda w: w * w, params)


PLAIN = [
    *(jp.scores.magnitude, jp.scores.normalized_magnitude, jp.scores.lamp, jp.scores.gradient_magnitude),
    *(jp.scores.taylor, jp.scores.snip, jp.scores.movement, jp.scores.signed_taylor, everywhere, squares),
]


@pytest.mark.parametrize("score", PLAIN, ids=lambda score: score.__name__)
def test_scores(case, score):
    params, values, *_, grads = case
    expected = jp.prune_once(values, score, sparsity=0.5, grads=grads)
    none = like(params, grads, lambda leaf: None)
    zeros = like(params, grads, lambda leaf: jnp.zeros(leaf.shape, jax.dtypes.float0))
    for given in (none, zeros):
        check_masks(jp.prune_once(params, score, sparsity=0.5, grads=given), params, expected)
    if score in (jp.scores.magnitude, jp.scores.taylor, everywhere):
        prune = jax.jit(lambda p, g: jp.prune_once(p, score, sparsity=0.5, grads=g))
        check_masks(prune(params, none), params, expected)


FACTORIES = {
    "fisher": jp.scores.fisher,
    "grasp": jp.scores.grasp,
    "brute_force": jp.scores.brute_force,
    "over_batches": lambda loss: jp.scores.over_batches(jp.scores.taylor, loss),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_scores_of_a_loss(case, name):
    params, values, _, _, loss, loss_of_floats, _ = case
    data: Any = {"batches": X[None]} if name == "over_batches" else {"batch": X}
    got = jp.prune_once(params, FACTORIES[name](loss), sparsity=0.5, **data)
    check_masks(got, params, jp.prune_once(values, FACTORIES[name](loss_of_floats), sparsity=0.5, **data))


def test_a_score_that_uses_its_keys_gets_them(case):
    params, values, *_ = case
    noise = lambda p: [raw(leaf) for leaf in jax.tree.leaves(p) if leaf.dtype != jnp.float32]  # noqa: E731

    def score(p, **_):
        assert all(map(np.array_equal, noise(p), noise(params)))
        return like(p, jax.tree.map(jnp.abs, floats(p)), lambda leaf: jnp.zeros(leaf.shape))

    expected = jp.prune_once(values, jp.scores.magnitude, 0.5)
    check_masks(jp.prune_once(params, score, sparsity=0.5), params, expected)


def test_an_error_of_a_score_is_its_own(case):
    def score(params, **_):
        raise TypeError("no such thing")

    with pytest.raises(TypeError, match="no such thing"):
        jp.prune_once(case[0], score, sparsity=0.5)


def test_masks_are_made_applied_and_checked(case):
    params, values, *_ = case
    expected = jp.prune_once(values, jp.scores.magnitude, sparsity=0.5)
    for run in (lambda f: f, jax.jit):
        check_masks(run(jp.ones_masks)(params), params, {})
        masks = run(lambda p: jp.prune_once(p, jp.scores.magnitude, sparsity=0.5))(params)
        check_masks(masks, params, expected)
        check_params(run(jp.apply_masks)(params, masks), params, jp.apply_masks(values, expected))
    pruned = jp.apply_masks(params, masks)
    jp.check_masks(masks, params)
    jp.check_pruned(pruned, masks)
    with pytest.raises(ValueError, match="pruned entries that are not 0"):
        jp.check_pruned(params, masks)
    check_masks(jp.unpack_masks(jp.pack_masks(masks)), params, expected)
    check_masks(jp.intersect(masks, jp.ones_masks(params)), params, expected)
    through = jp.straight_through(params, masks, 0.1)
    check_params(through, params, jp.apply_masks(values, expected))


def test_a_mask_that_prunes_a_key_is_refused(case):
    params = case[0]
    typed = [p for p, x in by_path(params).items() if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    masks = like(params, {typed[0]: jnp.zeros((), bool)}, lambda leaf: jnp.ones(leaf.shape, bool))
    with pytest.raises(
        ValueError, match=rf"masks\['{typed[0]}'\] prunes entries of .* key<fry>\[\] and cannot be 0"
    ):
        jp.apply_masks(params, masks)


def test_pruners(case):
    params, values, *_, grads = case
    whole = like(params, grads, lambda leaf: None)
    start = jp.prune_once(values, jp.scores.magnitude, sparsity=0.5)
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
    pairs = [
        (jp.pruner(jp.scores.magnitude, 0.5),) * 2,
        (jp.pruner(jp.scores.movement, 0.5, memory=0.9),) * 2,
        (jp.pruner(everywhere, 0.5),) * 2,
        (jp.rigl(masks, every=1, end_step=9), jp.rigl(start, every=1, end_step=9)),
    ]
    for pruner, of_floats in pairs:
        expected = of_floats.update(of_floats.init(values), values, grads).masks
        state = jax.jit(pruner.init)(params)
        check_masks(jax.jit(pruner.update)(state, params, whole).masks, params, expected)
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.4))
    check_masks(jp.prune_rounds(params, pruner, 2), params, jp.prune_rounds(values, pruner, 2))


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)], ids=["sgd", "momentum"])
def test_optimizers_of_whole_states(case, inner):
    # optax takes None for the gradient of a leaf that has none; its adam does not.
    params, values, *_, grads = case
    whole = like(params, grads, lambda leaf: None)
    masks, start = (jp.prune_once(tree, jp.scores.magnitude, sparsity=0.5) for tree in (params, values))
    pruner = jp.pruner(jp.scores.magnitude, 0.5)
    for make in (
        lambda masks: jp.wrap_optax(inner, pruner),
        lambda masks: jp.keep_masked(inner, masks),
        lambda masks: jp.wrap_optax(inner, jp.rigl(masks, every=1, end_step=9)),
    ):
        tx, of_floats = make(masks), make(start)
        expected: Any = of_floats.update(grads, of_floats.init(values), values)[0]
        updates, _ = tx.update(whole, tx.init(params), params)
        got = by_path(updates)
        assert got.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(got[path], leaf)


def test_search_and_lottery(case):
    params, values, _, _, loss, loss_of_floats, _ = case
    kept = lambda masks: sum(int(m.sum()) for p, m in by_path(masks).items() if p in values)  # noqa: E731
    found = jp.budget(kept, params, at_most=60)
    check_masks(found.masks, params, jp.budget(jp.metrics.nonzeros, values, at_most=60).masks)
    got = jp.sensitivity(loss, params, X, levels=(0.5,))
    expected = jp.sensitivity(loss_of_floats, values, X, levels=(0.5,))
    assert {p.name: p.size for p in got.points} == {p.name: p.size for p in expected.points}
    np.testing.assert_allclose(
        [p.drop for p in got.points], [p.drop for p in expected.points], rtol=1e-5, atol=1e-7
    )
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.5))
    tickets = zip(
        jp.lottery_ticket(jp.apply_masks, params, pruner, levels=1),
        jp.lottery_ticket(jp.apply_masks, values, pruner, levels=1),
        strict=True,
    )
    for ticket, alone in tickets:
        check_masks(ticket.masks, params, alone.masks)
        check_params(ticket.trained, params, alone.trained)
    check_params(jp.rewind(params, ticket.masks), params, jp.rewind(values, alone.masks))
    assert jp.error_barrier(lambda p: loss(p, X), params, params) == pytest.approx(0.0, abs=1e-6)


def test_metrics_and_figures_of_layers(case):
    params, values, apply_fn, of_floats, *_ = case
    masks, alone = (jp.prune_once(tree, jp.scores.magnitude, sparsity=0.5) for tree in (params, values))
    for tree, expected in ((masks, alone), (jp.apply_masks(params, masks), jp.apply_masks(values, alone))):
        assert jp.metrics.sparsity(tree).prunable == jp.metrics.sparsity(expected).prunable == 0.5
        np.testing.assert_allclose(jax.jit(jp.metrics.sparsity)(tree).prunable, 0.5)
        assert jp.metrics.collapsed(tree) == () and "0.5000" in jp.metrics.table(tree)
    assert jp.distributions.erk(params, 0.5) == jp.distributions.erk(values, 0.5)
    check_params(jp.quantization.as_int8(params), params, jp.quantization.as_int8(values))
    found, expected = (
        jp.metrics.macs(f, tree, X, masks=m).total
        for f, tree, m in ((apply_fn, params, masks), (of_floats, values, alone))
    )
    assert found == expected
    assert jp.metrics.summary(apply_fn, params, X, masks=masks).rows


def test_compaction(case):
    params, _, apply_fn, *_ = case
    groups = jp.channel_groups(apply_fn, params, X)
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5, structure=jp.structures.channels(groups))
    small = jp.compact(apply_fn, params, masks, X)
    expected = apply_fn(jp.apply_masks(params, masks), X)
    np.testing.assert_allclose(small.apply(small.params, X), expected, rtol=1e-5, atol=1e-6)
    assert min(by_path(small.params)[p].size for p in floats(params)) < 6
    back = small.expand(small.params)
    assert jp.leaf_paths(back) == jp.leaf_paths(params)
    for path, leaf in by_path(back).items():
        if path not in floats(params):
            np.testing.assert_array_equal(raw(leaf), raw(by_path(params)[path]))


def test_files_refuse_keys_by_path(case, tmp_path):
    params = case[0]
    for write in (jp.io.save, jp.io.save_safetensors):
        with pytest.raises(
            TypeError, match=r"key'?\] is key<fry>, a typed PRNG key. Save jax.random.key_data\(key\)"
        ):
            write(tmp_path / "file", params)
    data = jax.tree.map(raw, params)
    jp.io.save(tmp_path / "file", data)
    check_params(jp.io.load(tmp_path / "file", data).params, data, {})


def test_gates(case):
    params, values, *_ = case
    gates, alone = (jp.l0.init_gates(tree, KEY(0)) for tree in (params, values))
    assert gates.keys() == alone.keys()
    check_masks(jp.l0.gate_masks(params, gates), params, jp.l0.gate_masks(values, gates))


# What is no array


class Variable:
    """Stands for `keras.Variable`, which has a shape and a dtype and is no array."""

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, value.shape, str(value.dtype)


class Tensor:
    """Stands for a tensor of torch, whose dtypes are not JAX's."""

    shape, dtype, ndim = (2, 2), object(), 2


KERNEL = jnp.ones((2, 2))
FOREIGN = {
    "keras": (Variable(KERNEL), r"is a Variable, not an array\. Pass the array that it holds, its `\.value`"),
    "torch": (Tensor(), r"is a Tensor, not an array\. Convert it to a JAX array first"),
    "string": ("dense", r"is a str, not an array\. Keep settings and names out of the tree"),
    "number": (0.1, r"is a float, not an array\. Pass a number as jnp\.asarray\(number\)"),
    "flag": (True, r"is a bool, not an array\. Keep settings"),
    "function": (jnp.tanh, r"not an array\. Pass the arrays alone.*equinox\.filter.*nnx\.state"),
}
TAKERS = {
    "prune_once": lambda p: jp.prune_once(p, jp.scores.magnitude, sparsity=0.5),
    "pruner": lambda p: jp.pruner(jp.scores.magnitude, 0.5).init(p),
    "wrap_optax": lambda p: jp.wrap_optax(optax.sgd(0.1), jp.pruner(jp.scores.magnitude, 0.5)).init(p),
    "keep_masked": lambda p: jp.keep_masked(optax.sgd(0.1), {"k": KERNEL != 0}).init(p),
    "ones_masks": jp.ones_masks,
    "apply_masks": lambda p: jp.apply_masks(p, {"k": KERNEL != 0}),
    "straight_through": lambda p: jp.straight_through(p, {"k": KERNEL != 0}),
    "a score": jp.scores.magnitude,
    "metrics.sparsity": jp.metrics.sparsity,
    "channel_groups": lambda p: jp.channel_groups(lambda p, x: x, p, X),
    "compact": lambda p: jp.compact(lambda p, x: x, p, {"k": KERNEL != 0}, X),
    "budget": lambda p: jp.budget(jp.metrics.nonzeros, p, at_most=3),
    "sensitivity": lambda p: jp.sensitivity(lambda p: 0.0, p),
    "lottery_ticket": lambda p: list(
        jp.lottery_ticket(jp.apply_masks, p, jp.pruner(jp.scores.magnitude, 0.5), 1)
    ),
    "erk": lambda p: jp.distributions.erk(p, 0.5),
    "as_int8": jp.quantization.as_int8,
    "io.save": lambda p: jp.io.save("/nowhere/at/all", p),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_array_is_refused_by_path(taker, kind):
    leaf, message = FOREIGN[kind]
    with pytest.raises(TypeError, match=r"params\['layer/w'\] " + message if kind != "function" else message):
        TAKERS[taker]({"k": KERNEL, "layer": {"w": leaf}})


def test_the_value_of_a_variable_is_an_array():
    assert jp.metrics.nonzeros({"k": Variable(KERNEL).value}) == 4
    with pytest.raises(ValueError, match="nothing in the saved state mirrors"):
        jp.rewind({"k": Variable(KERNEL)}, {"k": KERNEL == 0})


# Arguments in another order

PARAMS: Any
MASKS: Any
PRUNER: Any
OPTIMIZER: Any
PARAMS, MASKS = {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)}, {"kernel": jnp.eye(2, dtype=bool)}
PRUNER, OPTIMIZER = jp.pruner(jp.scores.magnitude, 0.5), optax.sgd(0.1)


def total(params, x=None):
    return jnp.sum(params["kernel"])


SWAPPED = {
    "prune_once": (
        lambda: jp.prune_once(jp.scores.magnitude, PARAMS, 0.5),
        r"got 'magnitude': the order is prune_once\(params, scores",
    ),
    "apply_masks": (
        lambda: jp.apply_masks(MASKS, PARAMS),
        r"swapped\. The order is apply_masks\(params, masks\)",
    ),
    "apply_masks, packed": (lambda: jp.apply_masks(jp.pack_masks(MASKS), PARAMS), "swapped"),
    "check_pruned": (lambda: jp.check_pruned(MASKS, PARAMS), "swapped"),
    "check_masks": (lambda: jp.check_masks(PARAMS, MASKS), r"swapped.*check_masks\(masks, params\)"),
    "straight_through": (lambda: jp.straight_through(MASKS, PARAMS), "swapped"),
    "rewind": (lambda: jp.rewind(MASKS, PARAMS), r"swapped\. The order is rewind\(saved, masks\)"),
    "wrap_optax": (
        lambda: jp.wrap_optax(PRUNER, OPTIMIZER),
        "an optax optimizer and a jaxprune Pruner.* swapped",
    ),
    "keep_masked": (
        lambda: jp.keep_masked(MASKS, OPTIMIZER),
        r"got a dict of arrays, kernel bool\[2, 2\]: the order is keep_masked\(optimizer, masks\)",
    ),
    "keep_masked of a pruner": (
        lambda: jp.keep_masked(OPTIMIZER, PRUNER),
        r"pass that to wrap_optax\(optimizer",
    ),
    "pruner.update": (
        lambda: PRUNER.update(PARAMS, PRUNER.init(PARAMS)),
        r"call pruner.update\(state, params\)",
    ),
    "lottery_ticket": (
        lambda: jp.lottery_ticket(PARAMS, jp.apply_masks, PRUNER, 1),
        r"got a dict of arrays.* The order is lottery_ticket\(train, params, pruner, levels\)",
    ),
    "lottery_ticket, last": (
        lambda: jp.lottery_ticket(jp.apply_masks, PRUNER, PARAMS, 1),
        r"got 'Pruner': the order is lottery_ticket\(train, params, pruner, levels\)",
    ),
    "shuffled_masks": (lambda: jp.shuffled_masks(MASKS, KEY(0)), "needs one PRNG key"),
    "metrics.sparsity": (lambda: jp.metrics.sparsity(jp.kernels, PARAMS), "'kernels'. Check the order"),
    "metrics.collapsed": (lambda: jp.metrics.collapsed(jp.kernels, PARAMS), "'kernels'. Check the order"),
    "metrics.cost": (lambda: jp.metrics.cost(PARAMS, total, X), "The function comes first"),
    "budget": (lambda: jp.budget(PARAMS, total, at_most=1), "The function comes first"),
    "sensitivity": (lambda: jp.sensitivity(PARAMS, total), "The function comes first"),
    "optimal_brain_surgeon": (
        lambda: jp.optimal_brain_surgeon(PARAMS, total, 1, X),
        "The function comes first",
    ),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_arguments_are_named(name):
    call, message = SWAPPED[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_masks_of_bool_params_are_not_swapped():
    # Bool leaves among the params, and masks of nothing but bools, are what they seem.
    params = {"flag": jnp.array([True, False])}
    assert jp.apply_masks(params, {"flag": jnp.array([True, True])})["flag"].tolist() == [True, False]
    with pytest.raises(TypeError, match=r"masks\['w'\] is float32\[2\], but masks are bool"):
        jp.apply_masks(
            {"w": jnp.ones(2), "flag": jnp.array(True)}, {"w": jnp.ones(2), "flag": jnp.array(True)}
        )
