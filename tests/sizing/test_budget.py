"""Budget search, against trying every number of units."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.oracles import brute_force
from tests.sizing.problem import STRUCTURES, drawn, network, pruning
from tests.support.statistics import StandIn, layer

SIZES = {"elements": {"a/kernel": 24, "head/kernel": 18}, "filters": {"a/kernel": 6, "head/kernel": 3}}


def every_step(params, before, structure, scope, floor):
    """The masks of every sparsity k / units, by `prune_once` and counts worked out here."""
    sizes = SIZES[structure]
    units = sum(sizes.values())
    gone = {}
    for name, size in sizes.items():
        layer, leaf = name.split("/")
        mask = before[layer][leaf]
        gone[name] = int((~(mask if structure == "elements" else mask.any(axis=0))).sum())
        assert structure == "elements" or mask.any(axis=0).size == size
    for step in range(units):
        if scope == "global":
            count = max(step - sum(gone.values()), 0)
        else:
            count = {n: max(brute_force.half_even(step / units, s) - gone[n], 0) for n, s in sizes.items()}
        yield step / units, pruning(structure, floor, scope)(params, before, count)


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("structure", ["elements", "filters"])
@given(
    seed=st.integers(0, 10**6),
    few=st.booleans(),
    floor=st.integers(0, 1),
    masked=st.booleans(),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=12, derandomize=True)
@pytest.mark.filterwarnings("ignore:at_")
def test_it_finds_the_best_of_all_steps(structure, scope, seed, few, floor, masked, share):
    rng, params = np.random.default_rng(seed), drawn(seed, few)
    before = jax.tree.map(lambda leaf: rng.random(leaf.shape) < (0.8 if masked else 2), params)
    weights = jax.tree.map(lambda leaf: rng.integers(1, 9, leaf.shape), params)

    def cost(masks):
        return sum(
            int(np.sum(w[np.asarray(m)]))
            for w, m in zip(jax.tree.leaves(weights), jax.tree.leaves(masks), strict=True)
        )

    steps = [(s, masks, cost(masks)) for s, masks in every_step(params, before, structure, scope, floor)]
    find = partial(
        jp.budget, structure=STRUCTURES[structure], scope=scope, floor=floor, masks=before if masked else None
    )
    dearest, cheapest = steps[0][2], steps[-1][2]
    most = cheapest + share * (dearest - cheapest)

    # Of a cost, the least pruning within the budget.
    sparsity, masks, value = next(step for step in steps if step[2] <= most)
    found = find(cost, params, at_most=most)
    assert (found.value, same(found.masks, masks)) == (value, True)
    assert found.sparsity <= sparsity or same(found.masks, steps[0][1])
    assert cost(found.masks) == found.value
    assert len(found.tried) <= 2 + np.ceil(np.log2(len(steps)))

    # Of a quality that only falls, the most pruning above the floor.
    sparsity, masks, value = [step for step in steps if step[2] >= most][-1]
    found = find(cost, params, at_least=most)
    assert (found.value, same(found.masks, masks)) == (value, True)
    again = dict.fromkeys(SIZES[structure], 0) | dict(found.removed)
    assert same(pruning(structure, floor)(params, before, again), masks)

    # Of one that goes up and down, a step that is above the floor, and the next is not.
    def quality(masks):
        return (cost(masks) * 7919) % 101

    figures = [quality(masks) for _, masks, _ in steps]
    if figures[0] >= 40:
        found = find(quality, params, at_least=40)
        assert found.value == quality(found.masks) >= 40
        index = round(found.sparsity * len(steps))
        assert same(found.masks, steps[index][1])
        assert index == len(steps) - 1 or figures[index + 1] < 40


def test_the_sparsity_found_is_prune_onces():
    params = drawn(3)
    for case in ({"scope": "layerwise"}, {"structure": jp.structures.nm(1, 2)}):
        found = jp.budget(jp.metrics.nonzeros, params, at_most=40, **case)
        masks = jp.prune_once(params, jp.scores.magnitude, sparsity=found.sparsity, **case)
        assert same(masks, found.masks)
        assert found.value == jp.metrics.nonzeros(masks) <= 40
        assert sum(found.removed.values()) > 0
    # All that n:m can give, and no more.
    found = jp.budget(jp.metrics.nonzeros, params, at_most=30, structure=jp.structures.nm(1, 2))
    assert (found.sparsity, found.value) == (0.5, 30)
    with pytest.raises(ValueError, match=r"at_most=29 cannot be met: .* the measure is 30, and 51 with noth"):
        jp.budget(jp.metrics.nonzeros, params, at_most=29, structure=jp.structures.nm(1, 2))


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_multiply_adds_of_the_compacted_network(scope):
    params, x = drawn(5), jnp.ones((1, 4))
    structure = jp.structures.channels(jp.channel_groups(network, params, x))

    def macs(masks):
        small = jp.compact(network, params, masks, x, verify=False)
        return jp.metrics.macs(small.apply, small.params, x).total

    # A hidden unit has 4 inputs and 3 outputs: 42 multiply-adds, of which 28 are four units'.
    found = jp.budget(macs, params, at_most=30, structure=structure, scope=scope)
    assert found.value == 28
    assert found.removed == {"a/kernel[1]": 2}
    assert found.sparsity == pytest.approx(2 / 6)
    assert [value for _, value in found.tried] == [42, 7, 28, 35]


def test_a_distribution():
    params = drawn(6)
    erk = partial(jp.distributions.erk, params)
    found = jp.budget(jp.metrics.nonzeros, params, at_most=30, scope="layerwise", distribution=erk)
    targets = erk(found.sparsity)
    masks = jp.prune_once(params, jp.scores.magnitude, targets, scope="layerwise")
    assert same(masks, found.masks)
    assert (
        found.value
        <= 30
        < jp.metrics.nonzeros(
            jp.prune_once(params, jp.scores.magnitude, erk(found.sparsity - 1 / 42), scope="layerwise")
        )
    )
    with pytest.raises(ValueError, match="a distribution has a target for each path: pass scope='layerwise'"):
        jp.budget(jp.metrics.nonzeros, params, at_most=30, distribution=erk)


def test_budgets_that_cannot_be_met_or_are_met_already():
    params = drawn(4)
    count = jp.metrics.nonzeros
    with pytest.raises(
        ValueError, match=r"at_most=10 cannot be met: .*floor=1 .* measure is 11, and 51 with"
    ):
        jp.budget(count, params, at_most=10)
    with pytest.raises(ValueError, match=r"at_least=52 cannot be met: with nothing pruned the measure is 51"):
        jp.budget(count, params, at_least=52)
    with pytest.raises(ValueError, match="cannot be met"):
        jp.budget(lambda masks: float("nan"), params, at_most=10)
    with pytest.warns(UserWarning, match=r"at_most=51 is met as it is, with 51, so nothing was removed"):
        assert jp.budget(count, params, at_most=51).sparsity == 0
    with pytest.warns(UserWarning, match=r"nothing was removed, because with 1 units less the measure is 50"):
        assert jp.budget(count, params, at_least=51).value == 51
    assert jp.budget(count, params, at_least=0).removed == {"a/kernel": 23, "head/kernel": 17}


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({}, ValueError, "either at_most or at_least, got at_most=None, at_least=None"),
        ({"at_most": 1, "at_least": 1}, ValueError, "either at_most or at_least"),
        ({"at_most": float("nan")}, ValueError, "the bound of a budget is nan"),
        ({"at_most": 5, "scope": "all"}, ValueError, "scope must be one of"),
        ({"at_most": 5, "scores": jnp.ones(3)}, ValueError, "scores must have the tree structure"),
        ({"at_most": 5, "where": jp.matching("conv*")}, ValueError, "matches no leaf"),
        ({"at_most": 5, "measure": lambda masks: "five"}, TypeError, "a real number, got 'five'"),
    ],
    ids=["neither", "both", "nan", "scope", "scores", "where", "measure"],
)
def test_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        jp.budget(**{"measure": jp.metrics.nonzeros, "params": drawn(0)} | kwargs)


def test_it_is_refused_under_jit():
    with pytest.raises(TypeError, match="budget counts and ranks on the host, so it cannot run under jit"):
        jax.jit(lambda p: jp.budget(jp.metrics.nonzeros, p, at_most=30).masks)(drawn(0))


# Each output alike


@pytest.mark.parametrize("structure", [None, jp.structures.nm(2, 4), jp.structures.blocks((2, 2))])
def test_a_budget_for_outputs_is_what_prune_once_prunes(structure):
    rng = np.random.default_rng(0)
    shapes = {"a": ((8, 6), (0,)), "b": ((6, 12), (1,))}
    stats = StandIn({path: layer(rng, *shape) for path, shape in shapes.items()})
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, (shape, _) in shapes.items()}
    params["c"] = jnp.ones((3, 3))
    options = {"scores": jp.scores.wanda, "scope": "output", "structure": structure, "stats": stats}
    found = jp.budget(jp.metrics.nonzeros, params, at_most=100, **options)
    masks = jp.prune_once(params, sparsity=found.sparsity, **options)
    jax.tree.map(np.testing.assert_array_equal, found.masks, masks)
    assert found.value == jp.metrics.nonzeros(masks) <= 100 and found.sparsity > 0
    if structure is None:
        assert found.removed == {path: int((~mask).sum()) for path, mask in masks.items() if path != "c"}
    # From masks of which some outputs have lost more than others.
    start = jp.prune_once(params, jp.scores.magnitude, 0.2, stats=stats)
    again = jp.budget(jp.metrics.nonzeros, params, at_most=80, masks=start, **options)
    masks = jp.prune_once(params, sparsity=again.sparsity, masks=start, **options)
    jax.tree.map(np.testing.assert_array_equal, again.masks, masks)


def test_a_distribution_over_outputs():
    params = {"up": jnp.arange(1.0, 33.0).reshape(8, 4), "down": jnp.arange(1.0, 17.0).reshape(8, 2)}
    found = jp.budget(
        jp.metrics.nonzeros,
        params,
        at_most=24,
        scope="output",
        distribution=lambda s: {"up": s, "down": s / 2},
    )
    assert found.value <= 24 and found.masks["up"].sum(0).tolist() == [found.masks["up"][:, 0].sum()] * 4
