"""Params in every sort of tree: no count, mask or array goes to another leaf than the one it is for.

The sorts are those of `support.trees`. `test_contracts` puts every pruner through them; here is what takes
masks and pruners, what takes several trees at once, and names at random.
"""

import functools
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.graph.binding import bind
from tests.contracts.checks import printed, same
from tests.contracts.problem import (
    DEEP,
    ENTRIES,
    FLAT,
    apply_fn,
    channels,
    erk_by_hand,
    loss_fn,
    problem,
    size_of,
)
from tests.oracles import brute_force
from tests.oracles.brute_force import Spec, half_even
from tests.support.trees import SORTS, by_role, path_of

HALF = 0.5
RAGGED = {"a/kernel": 0.75, "b/kernel": 0.25}


def layerwise(now, targets=RAGGED, **options):
    """A pruner to targets by path, given in the reverse of the order of leaves."""
    by_path = {path_of(now.params, role): targets[role] for role in reversed(targets)}
    return jp.pruner(jp.scores.magnitude, by_path, scope="layerwise", **options)


def gone(masks):
    return {role: int((~mask).sum()) for role, mask in by_role(masks).items() if role.endswith("kernel")}


# --- what is done with masks, tree by tree


def trained(now, tx, steps=3) -> tuple[Any, Any]:
    params, state = now.params, tx.init(now.params)
    for _ in range(steps):
        updates, state = tx.update(now.grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def train(params, masks):
    return jp.apply_masks(jax.tree.map(lambda w: w * 1.5, params), masks)


def once(now, **options):
    return jp.prune_once(now.params, jp.scores.taylor, grads=now.grads, scope="layerwise", **options)


def saved(now):
    masks = once(now, sparsity=HALF)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        jp.io.save(file, now.params, masks)
        back, bare = jp.io.load(file, now.params), jp.io.load(file)
    # Without the tree the containers are plain ones, and masks still go to the leaves they are for.
    plain = jax.tree.map(jnp.asarray, bare.masks)
    state = jp.keep_masked(optax.sgd(0.1), plain).init(now.params)
    return back.params, back.masks, state.masks, jp.intersect(masks, plain)


def compacted(now, width=HALF):
    deep = now._replace(params=jax.tree.map(lambda w: w / 8, now.params))
    structure = channels(jax.tree.structure(now.params))
    masks = jp.prune_once(
        deep.params, jp.scores.magnitude, width, structure=structure, scope="isomorphic", floor=2
    )
    small = jp.compact(apply_fn, deep.params, masks, now.batch[0], verify=False)
    masked = apply_fn(jp.apply_masks(deep.params, masks), now.batch[0])
    np.testing.assert_allclose(small.apply(small.params, now.batch[0]), masked, rtol=1e-5, atol=1e-5)
    moments = small.shrink(optax.adam(0.1).init(deep.params))
    return masks, small.params, small.masks, small.expand(small.params), moments


def in_budget(now):
    found = jp.budget(
        jp.metrics.nonzeros,
        now.params,
        at_most=40,
        scope="layerwise",
        distribution=functools.partial(jp.distributions.erk, now.params),
    )
    assert list(found.removed) == [path_of(now.params, role) for role in ENTRIES]
    return found.masks, list(found.removed.values()), found.sparsity


def analysed(now):
    found = jp.sensitivity(size_of, now.params, levels=(0.3, 0.6), jit=False)
    names = {path_of(now.params, role): role for role in ENTRIES}
    return [(names[p.name] == "a/kernel", p.kept, p.size, p.metric) for p in found.points]


USES = {
    "prune_once, by layer": lambda now: once(now, sparsity=HALF),
    "prune_once, to a threshold by path": lambda now: once(
        now, threshold={path_of(now.params, role): t for role, t in (("b/kernel", 0.2), ("a/kernel", 0.1))}
    ),
    "wrap_optax": lambda now: trained(now, jp.wrap_optax(optax.adam(0.1), layerwise(now))),
    "wrap_optax, packed": lambda now: trained(
        now, jp.wrap_optax(optax.adam(0.1), layerwise(now), packed=True)
    ),
    "wrap_optax, rigl": lambda now: trained(
        now, jp.wrap_optax(optax.adam(0.1), jp.rigl(now.masks, every=1, end_step=9, fraction=0.6)), 2
    ),
    "keep_masked": lambda now: trained(now, jp.keep_masked(optax.adam(0.1), now.masks)),
    "lottery_ticket": lambda now: [
        (ticket.masks, ticket.params)
        for ticket in jp.lottery_ticket(train, now.params, layerwise(now), levels=1)
    ],
    "budget": in_budget,
    "sensitivity": analysed,
    "files": saved,
    "compact": compacted,
    "rewind": lambda now: jp.rewind((now.params, optax.adam(0.1).init(now.params)), now.masks),
    "shuffled_masks": lambda now: jp.shuffled_masks(now.key, now.masks, within=-1),
    "packed masks": lambda now: jp.unpack_masks(jp.pack_masks(now.masks)),
    "straight_through": lambda now: jax.grad(
        lambda params: size_of(jp.straight_through(params, now.masks, 0.1))
    )(now.params),
    "penalties": lambda now: (jp.penalties.l1(now.params), jp.penalties.group_lasso(now.params)),
    "figures": lambda now: (
        jp.metrics.sparsity(now.masks),
        jp.metrics.macs(apply_fn, now.params, now.batch[0], masks=now.masks).total,
        list(jp.metrics.overlap(now.masks, once(now, sparsity=HALF)).values()),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_what_is_done_with_masks_is_the_same_in_every_sort_of_tree(name):
    widths = DEEP if name == "compact" else FLAT
    expected = jax.tree.leaves(USES[name](problem(1, widths)))
    for sort in SORTS:
        same(jax.tree.leaves(USES[name](problem(1, widths, sort=sort))), expected)


PROGRAMS = {
    "lottery_scan": lambda now: jp.lottery_scan(train, now.params, layerwise(now), levels=2),
    "prune_rounds": lambda now: jp.prune_rounds(now.params, layerwise(now), jnp.arange(3)[2]),
    "a train step": lambda now: trained(now, jp.wrap_optax(optax.adam(0.1), layerwise(now)), 1),
    "optimal_brain_surgeon": lambda now: jp.optimal_brain_surgeon(
        loss_fn, now.params, 3, now.batch, damping=20.0
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_is_the_same_in_every_sort_of_tree(name):
    def program(now):
        traced = now._replace(activations=())
        return printed(jax.make_jaxpr(PROGRAMS[name])(traced))

    expected = program(problem(1))
    for sort in SORTS:
        text, consts = program(problem(1, sort=sort))
        assert text == expected[0], sort
        same(consts, expected[1])


# --- against the oracle, with ties


@pytest.mark.filterwarnings("ignore:floor=1 kept the last units")
@pytest.mark.parametrize("sort", SORTS)
def test_masks_of_every_sort_of_tree_are_the_oracles(sort):
    now = problem(3, DEEP, sort=sort)
    params = jax.tree.map(lambda w: jnp.round(w / 64 * 8), now.params)  # in which many are equal
    weights = {role: np.abs(np.asarray(w)) for role, w in by_role(params).items() if role.endswith("kernel")}
    ones = {role: np.ones(w.shape, bool) for role, w in weights.items()}
    paths = {role: path_of(params, role) for role in weights}
    ragged = dict(zip(weights, (0.7, 0.2, 0.45, 0.6), strict=True))
    erk = jp.distributions.erk(params, 0.6)
    assert list(erk) == [paths[role] for role in weights]
    for scope, targets in (
        ("global", 0.37),
        ("layerwise", 0.37),
        ("layerwise", ragged),
        ("layerwise", {role: erk[paths[role]] for role in weights}),
    ):
        expected, _ = brute_force.prune_once(weights, ones, Spec(), "sparsity", targets, scope=scope)
        given = (
            {paths[role]: targets[role] for role in sorted(targets, reverse=True)}
            if isinstance(targets, dict)
            else targets
        )
        pruner = jp.pruner(jp.scores.magnitude, given, scope=scope)
        masks = by_role(jp.prune_once(params, jp.scores.magnitude, given, scope=scope))
        stepped = by_role(pruner.update(pruner.init(params), params).masks)
        same({role: masks[role] for role in weights}, {role: stepped[role] for role in weights}, expected)


def test_erk_of_every_sort_of_tree_is_worked_out_by_hand():
    by_hand = erk_by_hand(0.6)
    for sort in SORTS:
        params = problem(0, sort=sort).params
        found = jp.distributions.erk(params, 0.6)
        assert found == pytest.approx({path_of(params, role): s for role, s in by_hand.items()}), sort


names = st.text(st.sampled_from("aBz019_-.~éß一/"), min_size=1, max_size=4)
containers = st.sampled_from(["dict", "OrderedDict", "list", "tuple", "integers"])


@st.composite
def trees(draw):
    """A tree of kernels of different sizes, each container of its own kind and names."""

    def container(children):
        kind = draw(containers)
        if kind in ("list", "tuple"):
            # Places of one digit and of two.
            spread = [child for each in children for child in (*[None] * draw(st.integers(0, 4)), each)]
            return spread if kind == "list" else tuple(spread)
        if kind == "integers":
            keys = draw(st.lists(st.integers(0, 120), min_size=len(children), max_size=8, unique=True))
        else:
            keys = draw(st.lists(names, min_size=len(children), max_size=8, unique=True))
        pairs = list(zip(keys, children, strict=False))
        return OrderedDict(pairs) if kind == "OrderedDict" else dict(pairs)

    sizes = iter(draw(st.permutations(range(2, 11))))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    groups = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    leaf = lambda: {"kernel": rng.permutation(2 * next(sizes)).reshape(2, -1) + np.float32(1)}  # noqa: E731
    return container([container([leaf() for _ in range(number)]) for number in groups])


@given(trees(), st.floats(0.1, 0.8), st.data())
@settings(deadline=None, max_examples=12)
def test_each_layer_gets_its_count_whatever_the_names(tree, sparsity, data):
    paths, leaves = jp.leaf_paths(tree), jax.tree.leaves(tree)
    if len(set(paths)) < len(paths):  # "a/b" and "b" in "a"
        with pytest.raises(ValueError, match="several leaves at the path"):
            jp.pruner(jp.scores.magnitude, sparsity, scope="layerwise").init(tree)
        return
    shares = [
        sparsity * part for part in data.draw(st.permutations(np.linspace(0.2, 1, len(paths)).tolist()))
    ]
    targets = dict(data.draw(st.permutations(list(zip(paths, shares, strict=True)))))
    expected = [half_even(share, leaf.size) for share, leaf in zip(shares, leaves, strict=True)]
    alive = [leaf > count for leaf, count in zip(leaves, expected, strict=True)]  # leaves are 1, 2, 3, ...
    pruner = jp.pruner(jp.scores.magnitude, targets, scope="layerwise")
    same(jax.tree.leaves(jp.prune_once(tree, jp.scores.magnitude, targets, scope="layerwise")), alive)
    same(jax.tree.leaves(pruner.update(pruner.init(tree), tree).masks), alive)
    # Traced: what it counts is in the program's own order of leaves.
    traced = jax.eval_shape(lambda tree: pruner.update(pruner.init(tree), tree).masks, tree)
    assert jax.tree.structure(traced) == jax.tree.structure(tree)


# --- pools that a structure has in an order of its own


def reversed_pool(scores, masks):
    """Entries, with the last leaf as the first pool, and `alive` in the order of leaves."""
    return jp.Units({path: scores[path] for path in reversed(scores)}, dict(masks), dict)


REVERSED = jp.Structure(reversed_pool, name="reversed")
TWO = {"u": jnp.arange(1.0, 17).reshape(2, 8), "w": jnp.arange(1.0, 7).reshape(2, 3)}


def test_a_budget_follows_the_pools_of_a_structure():
    found = jp.budget(jp.metrics.nonzeros, TWO, at_most=11, structure=REVERSED, scope="layerwise")
    assert dict(found.removed) == {"u": 8, "w": 3}
    assert {path: int((~mask).sum()) for path, mask in found.masks.items()} == {"u": 8, "w": 3}


@pytest.mark.parametrize("jit", [False, True])
def test_an_analysis_follows_the_pools_of_a_structure(jit):
    def evaluate(params):
        return {path: jnp.sum(leaf != 0) for path, leaf in params.items()}

    found = jp.sensitivity(evaluate, TWO, structure=REVERSED, levels=(0.5,), metric="u", jit=jit)
    points = {point.name: (point.kept, point.metric, point.others["w"]) for point in found.points}
    assert points == {"u": (8, 8, 6), "w": (3, 16, 3)}


def test_of_equal_scores_the_first_pool_of_a_structure_goes_first():
    ones = jax.tree.map(jnp.ones_like, TWO)
    once = jp.prune_once(ones, jp.scores.magnitude, count=5, structure=REVERSED)
    found = jp.budget(jp.metrics.nonzeros, ones, at_most=17, structure=REVERSED)
    assert int((~found.masks["w"]).sum()) == 5
    same(found.masks, once)


def test_at_a_stop_the_first_leaf_rounds_up():
    counts = []
    for names in ("wv", "vw"):  # the same two leaves, once under names that are out of order
        params = OrderedDict(zip(names, (jnp.arange(1.0, 16).reshape(3, 5),) * 2, strict=True))
        pruner = jp.pruner(jp.scores.magnitude, 0.8, scope="layerwise", stop=0.5)
        masks = pruner.update(pruner.init(params), params).masks
        counts.append([int((~mask).sum()) for mask in jax.tree.leaves(masks)])
    assert counts == [[8, 7], [8, 7]]


# --- several trees at once, in containers of different orders


def shuffled_dict(tree):
    """A plain dict of an OrderedDict's leaves."""
    return {path: tree[path] for path in sorted(tree)}


def dense(params, x):
    return jnp.tanh(x @ params["z"] + params["b"]) @ params["a"]


def square():
    """Params of which two have the same shape, so that nothing but values shows a mistake."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"z": (3, 3), "b": (3,), "a": (3, 3)}
    shaped = zip(shapes.items(), keys, strict=True)
    return OrderedDict((name, jax.random.normal(key, shape)) for (name, shape), key in shaped)


@pytest.mark.parametrize("fold_constants", [False, True])
def test_masks_in_other_containers_compact_alike(fold_constants):
    params, x = square(), jnp.ones((4, 3))
    masks = jp.ones_masks(params)
    masks["z"] = masks["z"].at[:, 2].set(False)
    masks["a"] = masks["a"].at[0, 0].set(False)
    options = {"fold_constants": fold_constants}
    small = jp.compact(dense, params, masks, x, **options)
    other = jp.compact(dense, params, shuffled_dict(masks), x, **options)
    same(small.params, other.params)
    same(small.masks, other.masks)


def test_a_plan_fits_params_in_other_containers():
    params, x = square(), jnp.ones((4, 3))
    masks = jp.ones_masks(params)
    masks["z"] = masks["z"].at[:, 2].set(False)
    masks["b"] = masks["b"].at[2].set(False)
    small = jp.compact(dense, params, masks, x)
    expected = small.apply(small.params, x)
    assert small.params["z"].shape == (3, 2)
    same(small.apply(shuffled_dict(small.params), x), expected)
    # A plan made by hand, or read from elsewhere, has shapes in any order.
    plan = jp.Plan(shuffled_dict(dict(small.plan.shapes)), small.plan.keep)
    bound = bind(dense, plan)
    same(bound(small.params, x), expected)


def test_twelve_inputs_reach_the_compacted_network_in_their_order():
    params = {"a": jax.random.normal(jax.random.key(0), (3, 8)), "b": jnp.ones((8, 2))}

    def weighted(params, *inputs):
        return jnp.tanh(sum((n + 1.0) * x for n, x in enumerate(inputs)) / 50) @ params["a"] @ params["b"]

    inputs = [jnp.full((2, 3), float(n)) for n in range(12)]
    masks = jp.ones_masks(params)
    masks["a"] = masks["a"].at[:, :3].set(False)
    small = jp.compact(weighted, params, masks, *inputs)
    assert small.params["a"].shape == (3, 5)
    nested = jp.compact(lambda p, xs: weighted(p, *xs), params, masks, inputs)
    expected = weighted(jp.apply_masks(params, masks), *inputs)
    np.testing.assert_allclose(small.apply(small.params, *inputs), expected, rtol=1e-5)
    np.testing.assert_allclose(nested.apply(nested.params, inputs), expected, rtol=1e-5)


def test_two_networks_in_other_containers_have_no_barrier_between_equals():
    params = square()
    barrier = jp.error_barrier(lambda p: jnp.sum((p["z"] - params["z"]) ** 2), params, shuffled_dict(params))
    assert float(barrier) == pytest.approx(0, abs=1e-9)


def test_gates_in_any_order_add_up_to_the_same_bits():
    params = {name: jnp.ones((n + 1, 3)) for n, name in enumerate("wvu")}
    gates = jp.l0.init_gates(params, jax.random.key(0))
    totals = {
        float(jp.l0.expected_l0(params, gates)),
        float(jp.l0.expected_l0(params, dict(reversed(gates.items())))),
    }
    assert len(totals) == 1
