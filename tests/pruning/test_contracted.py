"""`stats=` and `scope="output"`: which leaves take part, along which axes, and how much each output loses."""

import functools
import itertools
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.oracles.brute_force import half_even
from tests.support.statistics import Layer, StandIn, layer

LAYOUTS = {
    "in x out": ((8, 6), (0,), {}),
    "out x in": ((6, 8), (1,), {}),
    "convolution": ((3, 2, 4, 6), (0, 1, 2), {"group": 2}),
    "heads read": ((2, 4, 6), (0, 1), {}),
    "heads written": ((8, 2, 4), (0,), {}),
    "experts": ((2, 4, 6), (1,), {"batch": (0,)}),
    "stacked": ((3, 8, 4), (1,), {"stack": (0,)}),
    "stacked in the middle": ((8, 3, 4), (0,), {"stack": (1,)}),
}
STRUCTURES = {
    "elements": jp.structures.elements(),
    "nm": jp.structures.nm(2, 4),
    "blocks": jp.structures.blocks((2, 2), norm=jnp.sum),
}


def problem(name, ties=False):
    """Return params with one kernel among other leaves, its layer and the statistics."""
    shape, contracted, known = LAYOUTS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    mine = layer(rng, shape, contracted, **known)
    drawn = rng.integers(-3, 4, shape) if ties else rng.normal(size=shape)
    params = {"kernel": jnp.asarray(drawn, jnp.float32), "norm": jnp.ones(shape[-1])}
    return params, mine, StandIn({"kernel": mine})


def outputs_of(mine, leaf):
    """Return a leaf as (layers, outputs, inputs), the inputs in row-major order."""
    free = [a for a in range(leaf.ndim) if a not in (*mine.contracted, *mine.stack)]
    layers = int(np.prod([leaf.shape[a] for a in mine.stack]))
    inputs = int(np.prod([leaf.shape[a] for a in mine.contracted]))
    return np.transpose(np.asarray(leaf), (*mine.stack, *free, *mine.contracted)).reshape(layers, -1, inputs)


def lowest(row, count):
    """Mark the lowest numbers of a row, of equal ones the first."""
    removed = np.zeros(len(row), bool)
    removed[np.argsort(row, kind="stable")[:count]] = True
    return removed


def entries_by_hand(mine, scores, fraction):
    return ~np.array(
        [[lowest(row, half_even(fraction, len(row))) for row in rows] for rows in outputs_of(mine, scores)]
    )


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_output_loses_the_same_number_of_inputs(layout):
    params, mine, stats = problem(layout)
    prune = functools.partial(jp.prune_once, scores=jp.scores.wanda, sparsity=0.3, scope="output")
    masks = prune(params, stats=stats)
    scores = np.asarray(jp.scores.wanda(params, stats=stats)["kernel"])
    np.testing.assert_array_equal(outputs_of(mine, masks["kernel"]), entries_by_hand(mine, scores, 0.3))
    assert masks["norm"].all()
    same(masks, jax.jit(lambda p, s: prune(p, stats=s))(params, stats))


def test_ties_go_by_index():
    params, mine, stats = problem("out x in", ties=True)
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5, scope="output", stats=stats)
    expected = entries_by_hand(mine, np.abs(params["kernel"]), 0.5)
    np.testing.assert_array_equal(outputs_of(mine, masks["kernel"]), expected)


def test_without_statistics_the_last_axis_is_that_of_outputs():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 5))}
    masks = jp.prune_once(params, jp.scores.magnitude, 0.25, scope="output")
    assert masks["kernel"].sum((0, 1)).tolist() == [9] * 5
    stacked = jp.prune_once(params, jp.scores.magnitude, 0.25, scope="output", stacked=lambda path, leaf: 1)
    assert stacked["kernel"].sum(1).tolist() == [[3] * 5] * 3
    each = [jp.prune_once({"kernel": w}, jp.scores.magnitude, 0.25, scope="output") for w in params["kernel"]]
    np.testing.assert_array_equal(stacked["kernel"], [m["kernel"] for m in each])
    with pytest.raises(ValueError, match=r"scope='output' on params\['norm'\], float32\[4\]: without stats="):
        jp.prune_once(
            {"norm": jnp.ones(4)}, jp.scores.magnitude, 0.5, scope="output", where=lambda p, x: True
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_n_of_m_lie_along_the_contracted_axis(layout):
    params, mine, stats = problem(layout)
    scores = np.asarray(jp.scores.wanda(params, stats=stats)["kernel"])
    masks = jp.prune_once(params, jp.scores.wanda, 0.5, structure=STRUCTURES["nm"], stats=stats)
    axis = stats.group_axis("kernel")
    groups = np.moveaxis(scores, axis, -1).reshape(-1, 4)
    kept = ~np.array([lowest(group, 2) for group in groups])
    np.testing.assert_array_equal(np.moveaxis(np.asarray(masks["kernel"]), axis, -1).reshape(-1, 4), kept)
    half = jp.prune_once(
        params, jp.scores.wanda, 0.25, structure=STRUCTURES["nm"], scope="output", stats=stats
    )
    # Half of the groups of each output, those that cost least.
    size = scores.shape[axis]
    cost = np.sort(np.moveaxis(scores, axis, -1).reshape(*np.delete(scores.shape, axis), size // 4, 4))
    cost = np.moveaxis(cost[..., :2].sum(-1), -1, axis)
    dense = np.moveaxis(np.asarray(half["kernel"]), axis, -1).reshape(*np.delete(scores.shape, axis), -1, 4)
    dense = np.moveaxis(dense.all(-1), -1, axis)
    expected = entries_by_hand(mine, cost, 0.5)
    np.testing.assert_array_equal(outputs_of(mine, dense), expected)


def test_blocks_of_an_output():
    params, _, stats = problem("in x out")
    scores = np.asarray(jp.scores.wanda(params, stats=stats)["kernel"])
    tiles = scores.reshape(4, 2, 3, 2).sum((1, 3))  # 4 tiles of inputs, for each of 3 tiles of outputs
    kept = ~np.array([lowest(column, 1) for column in tiles.T]).T
    masks = jp.prune_once(
        params, jp.scores.wanda, 0.25, structure=STRUCTURES["blocks"], scope="output", stats=stats
    )
    np.testing.assert_array_equal(masks["kernel"], np.repeat(np.repeat(kept, 2, 0), 2, 1))
    # Blocks of inputs alone.
    columns = jp.structures.blocks((4,), axes=(0,), norm=jnp.sum)
    masks = jp.prune_once(params, jp.scores.wanda, 0.5, structure=columns, scope="output", stats=stats)
    first = scores[:4].sum(0) <= scores[4:].sum(0)
    np.testing.assert_array_equal(masks["kernel"], np.repeat(np.stack([~first, first]), 4, 0))


def test_other_structures_have_no_outputs():
    params, _, stats = problem("in x out")
    blocks = jp.structures.layers(["kernel"])
    for structure in (jp.structures.slices(axis=0), blocks, jp.Structure(lambda s, m: None, name="mine")):
        for given in ({"sparsity": 0.5}, {"threshold": 0.5}):
            with pytest.raises(
                ValueError, match="scope='output' takes the same number of entries, N:M groups"
            ):
                jp.prune_once(
                    params, jp.scores.magnitude, structure=structure, scope="output", stats=stats, **given
                )
    with pytest.raises(ValueError, match="of='remaining' cannot go with scope='output'"):
        jp.prune_once(params, jp.scores.magnitude, 0.5, scope="output", of="remaining")
    with pytest.raises(ValueError, match="stop= is met to the unit"):
        jp.pruner(jp.scores.magnitude, 0.5, scope="output", stop=0.3)
    with pytest.raises(ValueError, match="count=9 is out of range: kernel has 8 units"):
        jp.prune_once(params, jp.scores.magnitude, count=9, scope="output", stats=stats)


def test_counts_thresholds_and_targets_by_path():
    params, mine, stats = problem("stacked")
    options = {"scores": jp.scores.wanda, "stats": stats, "scope": "output"}
    masks = jp.prune_once(params, count=3, **options)
    assert (outputs_of(mine, masks["kernel"]).sum(2) == 5).all()
    assert jax.jit(lambda n: jp.prune_once(params, count=n, **options))(jnp.int32(3))["kernel"].sum() == 60
    masks = jp.prune_once(params, sparsity={"kernel": 0.25, "kernel[1]": 0.75}, **options)
    assert outputs_of(mine, masks["kernel"]).sum(2).tolist() == [[6] * 4, [2] * 4, [6] * 4]
    layerwise = options | {"scope": "layerwise"}
    same(jp.prune_once(params, threshold=3.0, **options), jp.prune_once(params, threshold=3.0, **layerwise))


def test_floors_are_those_of_an_output():
    params, mine, stats = problem("out x in")
    options = {"scores": jp.scores.wanda, "stats": stats, "scope": "output"}
    with pytest.warns(UserWarning, match="kernel: 6 of 6 outputs lost fewer.*floor=2 units of each output"):
        masks = jp.prune_once(params, sparsity=0.9, floor=2, **options)
    assert (outputs_of(mine, masks["kernel"]).sum(2) == 2).all()
    with pytest.warns(UserWarning, match="layer collapse"):
        assert not jp.prune_once(params, sparsity=0.99, floor=0, **options)["kernel"].any()


def test_masks_to_start_from():
    params, mine, stats = problem("in x out")
    options = {"scores": jp.scores.wanda, "stats": stats, "scope": "output"}
    start = jp.prune_once(params, jp.scores.magnitude, 0.4, stats=stats)  # some outputs lose more than others
    left = outputs_of(mine, start["kernel"]).sum(2)
    assert len(set(left.ravel())) > 1
    masks = jp.prune_once(params, sparsity=0.75, masks=start, **options)
    assert not (masks["kernel"] & ~start["kernel"]).any()
    np.testing.assert_array_equal(outputs_of(mine, masks["kernel"]).sum(2), np.minimum(left, 2))
    same(masks, jax.jit(lambda m: jp.prune_once(params, sparsity=0.75, masks=m, **options))(start))
    ahead = int((left < 6).sum())
    with pytest.warns(UserWarning, match=f"in {ahead} of 6 outputs more units are pruned already"):
        masks = jp.prune_once(params, sparsity=0.25, masks=start, **options)
    np.testing.assert_array_equal(outputs_of(mine, masks["kernel"]).sum(2), np.minimum(left, 6))


# --- over time


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layout", ["out x in", "stacked in the middle"])
def test_a_schedule_for_each_output(layout, structure):
    params, mine, stats = problem(layout)
    structure = STRUCTURES[structure]
    schedule = jp.schedules.linear(structure.max_sparsity * 0.7, begin_step=1, end_step=3)
    pruner = jp.pruner(jp.scores.wanda, schedule, scope="output", structure=structure)
    eager, update = pruner.init(params), jax.jit(lambda s, p, given: pruner.update(s, p, stats=given))
    compiled = eager
    for step in range(1, 4):
        eager = pruner.update(eager, params, stats=stats)
        compiled = update(compiled, params, stats)
        same(eager.masks, compiled.masks)
        target = schedule.on_host(step)
        once = jp.prune_once(
            params, jp.scores.wanda, target, scope="output", structure=structure, stats=stats
        )
        same(eager.masks, once)
    assert len({*outputs_of(mine, eager.masks["kernel"]).sum(2).ravel().tolist()}) == 1


def test_a_pruner_that_takes_over_masks():
    params, mine, stats = problem("in x out")
    start = jp.prune_once(params, jp.scores.magnitude, 0.4, stats=stats)
    left = outputs_of(mine, start["kernel"]).sum(2)
    pruner = jp.pruner(jp.scores.wanda, jp.schedules.linear(0.75, end_step=2), scope="output", masks=start)
    state = pruner.init(params)
    for _ in range(2):  # and no warning of outputs that are ahead before the end
        state = pruner.update(state, params, stats=stats)
    np.testing.assert_array_equal(outputs_of(mine, state.masks["kernel"]).sum(2), np.minimum(left, 2))
    assert pruner.progress(state.masks).asked is None


def test_in_an_optimizer():
    params, _, stats = problem("in x out")
    pruner = jp.pruner(jp.scores.wanda, jp.schedules.one_shot(0.5, step=1), scope="output")
    tx = jp.wrap_optax(optax.sgd(0.0), pruner)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    same(
        optax.tree.get(state, "masks"),
        jp.prune_once(params, jp.scores.wanda, 0.5, scope="output", stats=stats),
    )
    with pytest.raises(ValueError, match=r"scores\.wanda needs statistics"):
        tx.update(grads, tx.init(params), params)


def test_in_a_recipe():
    params, _, stats = problem("in x out")
    text = "prune:\n  score: {ria: {power: 0.25}}\n  sparsity: 0.5\n  scope: output\n"
    pruner = jp.recipes.parse(text).pruner(params)
    state = pruner.update(pruner.init(params), params, stats=stats)
    score = functools.partial(jp.scores.ria, power=0.25)
    same(state.masks, jp.prune_once(params, score, 0.5, scope="output", stats=stats))
    with pytest.raises(jp.recipes.RecipeError, match="scope='output' takes the same number of entries"):
        jp.recipes.parse(text + "  structure: {slices: -1}\n")


def test_thousands_of_outputs():
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 4096))}
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.5, end_step=4), scope="output")
    update = jax.jit(pruner.update)
    assert len(update.lower(pruner.init(params), params).as_text().splitlines()) < 3000
    state = pruner.init(params)
    start = time.perf_counter()
    for _ in range(4):
        state = update(state, params)
    assert (state.masks["kernel"].sum(0) == 32).all() and time.perf_counter() - start < 60


# --- which leaves


def two_layers():
    rng = np.random.default_rng(3)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)} for name in "ab"}
    return params, StandIn({"a/kernel": layer(rng, (4, 4), (0,))})


def test_the_calibrated_leaves_take_part_by_default():
    params, stats = two_layers()
    for score in (jp.scores.wanda, jp.scores.magnitude, jp.scores.magnitude(params)):
        masks = jp.prune_once(params, score, 0.5, stats=stats)
        assert masks["a"]["kernel"].sum() == 8 and masks["b"]["kernel"].all()


def test_a_leaf_without_statistics():
    params, stats = two_layers()
    every = {"sparsity": 0.5, "where": jp.matching("*"), "stats": stats}
    # Nothing reads the statistics.
    assert jp.prune_once(params, jp.scores.magnitude, **every)["b"]["kernel"].sum() < 16
    needs = r"where= takes in params\['b/kernel'\], float32\[4, 4\], which has no statistics.*a/kernel"
    nm = jp.structures.nm(2, 4)
    for score, options in itertools.product([jp.scores.wanda], [{}, {"scope": "output"}]):
        with pytest.raises(ValueError, match=needs):
            jp.prune_once(params, score, **every, **options)
    for options in ({"scope": "output"}, {"structure": nm}):
        with pytest.raises(ValueError, match=needs):
            jp.prune_once(params, jp.scores.magnitude, **every, **options)
        pruner = jp.pruner(jp.scores.magnitude, 0.5, where=jp.matching("*"), **options)
        with pytest.raises(ValueError, match=needs):
            pruner.update(pruner.init(params), params, stats=stats)


def test_an_axis_that_is_not_the_contracted_one():
    params, _, stats = problem("out x in")
    right, wrong = (jp.structures.nm(2, 4, axis=axis) for axis in (-1, -2))
    same(
        jp.prune_once(params, jp.scores.wanda, 0.5, structure=right, stats=stats),
        jp.prune_once(params, jp.scores.wanda, 0.5, structure=jp.structures.nm(2, 4), stats=stats),
    )
    says = r"nm\(2, 4, axis=-2\) on params\['kernel'\] of shape \(6, 8\): its product sums over axis 1"
    with pytest.raises(ValueError, match=says):
        jp.prune_once(params, jp.scores.wanda, 0.5, structure=wrong, stats=stats)
    params, _, stats = problem("stacked")
    with pytest.raises(ValueError, match=r"stacked= says that axis 1 of params\['kernel'\]"):
        jp.prune_once(
            params, jp.scores.wanda, 0.5, scope="output", stats=stats, stacked=lambda path, leaf: (1,)
        )


def test_without_statistics_n_of_m_is_as_before():
    assert jp.structures.nm(2, 4).name == jp.structures.nm(2, 4, axis=-2).name == "nm(2, 4, axis=-2)"


def test_params_that_changed():
    params, _, stats = problem("in x out")

    def check(given):
        if (given["kernel"] != params["kernel"]).any():
            raise ValueError("params changed since calibrate")

    stats.check_params = check
    other = params | {"kernel": params["kernel"] + 1}
    jp.prune_once(params, jp.scores.magnitude, 0.5, stats=stats)
    with pytest.raises(ValueError, match="params changed since calibrate"):
        jp.prune_once(other, jp.scores.magnitude, 0.5, stats=stats)
    pruner = jp.pruner(jp.scores.wanda, 0.5)
    pruner.update(pruner.init(params), other, stats=stats)
    jax.jit(lambda p: jp.prune_once(p, jp.scores.wanda, 0.5, stats=stats))(other)


def test_what_is_no_statistics():
    params, _, stats = problem("in x out")
    for wrong in (3, "norms", params, StandIn):
        with pytest.raises(TypeError, match=r"stats must be what jaxprune\.calibrate returns"):
            jp.prune_once(params, jp.scores.wanda, 0.5, stats=wrong)
        pruner = jp.pruner(jp.scores.wanda, 0.5)
        with pytest.raises(TypeError, match=r"stats must be what jaxprune\.calibrate returns"):
            pruner.update(pruner.init(params), params, stats=wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.prune_once(params, functools.partial(jp.scores.wanda, stats=stats), 0.5)


# --- the statistics of `calibrate`


def test_calibrated_networks():
    """Fused queries and keys, experts and a stack, of which the scores are those of their matrices."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "fused": draw(6, 8),
        "experts": draw(2, 4, 6),
        "stack": draw(3, 6, 6),
        "torch": draw(5, 6),
        "out": draw(5, 2),
    }

    def apply_fn(params, x):
        q, k = jnp.split(x @ params["fused"], 2, axis=1)
        h = jnp.einsum("erd,edf->erf", jnp.stack([q, k]), params["experts"]).sum(0)
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])[0]
        return (h @ params["torch"].T) @ params["out"]

    x = draw(30, 6)
    stats = jp.calibrate(apply_fn, params, [x[:20], x[20:]])
    q, k = np.split(np.asarray(x) @ np.asarray(params["fused"]), 2, axis=1)
    h, inputs = jnp.einsum("erd,edf->erf", jnp.stack([q, k]), params["experts"]).sum(0), []
    for w in params["stack"]:
        inputs.append(np.asarray(h))
        h = jnp.tanh(h @ w)
    layers = {
        "fused": Layer((6, 8), (0,), np.asarray(x)),
        "experts": Layer((2, 4, 6), (1,), np.stack([q, k]), batch=(0,)),
        "stack": Layer((3, 6, 6), (1,), np.stack(inputs), stack=(0,)),
        "torch": Layer((5, 6), (1,), np.asarray(h)),
    }
    expected = StandIn(layers)
    assert set(stats.paths) == layers.keys() and stats.stacks == expected.stacks
    for score in (jp.scores.wanda, jp.scores.ria, jp.scores.flap):
        ours, theirs = (score(params, stats=each) for each in (stats, expected))
        for path in layers:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-4)
    for scope in ("layerwise", "output"):
        ours, theirs = (
            jp.prune_once(params, jp.scores.ria, 0.5, scope=scope, stats=each) for each in (stats, expected)
        )
        same(ours, theirs)
        traced = jax.jit(lambda p, s, scope=scope: jp.prune_once(p, jp.scores.ria, 0.5, scope=scope, stats=s))
        same(traced(params, stats), theirs)
    two_of_four = {"structure": jp.structures.nm(1, 2), "stats": stats}
    masks = jp.prune_once(params, jp.scores.wanda, 0.5, **two_of_four)
    groups = np.asarray(masks["torch"]).reshape(5, 3, 2), np.asarray(masks["experts"]).reshape(2, 2, 2, 6)
    assert (groups[0].sum(2) == 1).all() and (groups[1].sum(2) == 1).all()
    with pytest.raises(ValueError, match="params changed since calibrate: torch"):
        jp.prune_once(params | {"torch": params["torch"] + 1}, jp.scores.wanda, 0.5, stats=stats)
