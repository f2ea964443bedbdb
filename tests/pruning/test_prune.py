"""prune_once: against the oracle, under jit and vmap, the published counts, and bad input."""

import itertools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp
from experiments.benchmarks import python_calls
from tests.oracles import brute_force
from tests.oracles.brute_force import Spec
from tests.support.profile import examples

# Few shapes, so that compiled functions are reused. "skip" is what `where` leaves out.
TREES = {
    "one": {"w": (7,)},
    "mixed": {"a": (3, 5), "b": (4,), "c": (1, 1), "skip": (2, 3)},
    "conv": {"conv": (3, 2, 2, 5), "dense": (6, 4), "skip": (4,)},
    "many": {"a": (3, 5), "b": (4,), "c": (2, 3, 7), "d": (1, 1)},
    "even": {"a": (4, 2), "skip": (4,), "z": (2, 4, 6)},
    "threes": {"dense": (6, 4)},
    "eights": {"a": (8, 3)},
}
CASES = {
    "elements-one": ("one", Spec()),
    "elements-mixed": ("mixed", Spec()),
    "elements-conv": ("conv", Spec()),
    "elements-many": ("many", Spec()),
    "slices-out": ("conv", Spec("slices", (-1,), norm=1)),
    "slices-in": ("conv", Spec("slices", (-2,), norm=math.inf)),
    "slices-kernels": ("conv", Spec("slices", (-2, -1), norm=1)),
    "slices-first": ("mixed", Spec("slices", (0,), norm=0)),
    "slices-min": ("many", Spec("slices", (0,), norm=-math.inf)),
    "slices-sum": ("conv", Spec("slices", (1, 0), norm="sum")),
    "blocks-2x2": ("conv", Spec("blocks", (-2, -1), (2, 2), norm=1)),
    "blocks-3x2": ("conv", Spec("blocks", (1, 0), (3, 2), norm=math.inf)),
    "blocks-3": ("many", Spec("blocks", (0,), (3,), norm="sum")),
    "blocks-edge": ("mixed", Spec("blocks", (-1,), (3,), norm=-math.inf)),
    "nm-1:2": ("even", Spec("nm", (-2,), n=1, m=2)),
    "nm-1:2-out": ("even", Spec("nm", (-1,), n=1, m=2)),
    "nm-2:3": ("threes", Spec("nm", (0,), n=2, m=3)),
    "nm-1:4": ("eights", Spec("nm", (-2,), n=1, m=4)),
    "nm-2:4": ("eights", Spec("nm", (-2,), n=2, m=4)),
    "nm-4:8": ("eights", Spec("nm", (-2,), n=4, m=8)),
}


def structure_of(spec):
    reductions = {"sum": jnp.sum}
    norm = reductions.get(spec.norm, spec.norm)
    if spec.kind == "slices":
        return jp.structures.slices(spec.axes, norm=norm)
    if spec.kind == "blocks":
        return jp.structures.blocks(spec.sides, axes=spec.axes, norm=norm)
    if spec.kind == "nm":
        return jp.structures.nm(spec.n, spec.m, axis=spec.axes[0])
    return jp.structures.elements()


def takes_part(path, leaf):
    return path != "skip"


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def prune(scores, **kwargs):
    """Masks as numpy arrays and the warnings, of a tree of scores."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = jp.prune_once(on_device(scores), on_device(scores), where=takes_part, **kwargs)
    return jax.tree.map(np.asarray, masks), [str(w.message) for w in caught]


GRID = st.sampled_from([-3.0, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
WILD = st.floats(width=32, allow_nan=False, allow_infinity=False)
FRACTIONS = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 0.999]) | st.floats(0, 1, exclude_max=True)


@st.composite
def scored(draw, shapes, spec, kind):
    # Sums of any floats round, and a comparison with a threshold may flush subnormals; a rank does not.
    exact = spec.kind == "elements" or spec.norm in (0, math.inf, -math.inf)
    wild = [WILD] if spec.kind == "elements" and kind != "threshold" else []
    values = draw(st.sampled_from([GRID, FLOATS, *wild] if exact and spec.kind != "nm" else [GRID]))
    return {path: draw(hnp.arrays(np.float32, shape, elements=values)) for path, shape in shapes.items()}


@st.composite
def masked(draw, shapes):
    some = draw(st.booleans())
    return {path: draw(hnp.arrays(bool, s)) if some else np.ones(s, bool) for path, s in shapes.items()}


@st.composite
def targets(draw, shapes, spec, kind, scope):
    """One value, or a dict of them for some of the leaves."""
    chosen = [path for path in shapes if path != "skip"]
    sizes = {path: len(brute_force.units(shapes[path], spec)) for path in chosen}

    def value(most):
        if kind == "count":
            return draw(st.integers(0, most))
        if kind == "threshold":
            return draw(st.sampled_from([-1.0, 0.0, 1.0, 2.5]) | FLOATS)
        if spec.kind == "nm" and draw(st.booleans()):
            return spec.max_sparsity
        return draw(FRACTIONS) * spec.max_sparsity

    if (scope == "layerwise" or kind == "threshold") and draw(st.booleans()):
        named = draw(st.lists(st.sampled_from(chosen), min_size=1, unique=True))
        return {path: value(sizes[path]) for path in named}
    return value(sum(sizes.values()) if scope == "global" else min(sizes.values()))


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
@examples(50, share=len(CASES))
def test_prune_once_is_the_oracle(case, data):
    tree, spec = CASES[case]
    shapes = TREES[tree]
    kind = data.draw(st.sampled_from(["sparsity", "count", "threshold"]))
    scope = data.draw(st.sampled_from(["global", "layerwise"]))
    of = data.draw(st.sampled_from(["total", "remaining"]))
    floor = data.draw(st.sampled_from([0, 1, 3]))
    value = data.draw(targets(shapes, spec, kind, scope))
    scores = data.draw(scored(shapes, spec, kind))
    before = data.draw(masked(shapes))

    # Without masks, nothing is pruned.
    kwargs = {kind: value, "of": of, "scope": scope, "floor": floor, "structure": structure_of(spec)}
    if any(not mask.all() for mask in before.values()):
        kwargs["masks"] = on_device(before)
    after, messages = prune(scores, **kwargs)

    chosen = {path: scores[path] for path in shapes if path != "skip"}
    expected, warned = brute_force.prune_once(
        chosen, before, spec, kind, value, of=of, scope=scope, floor=floor
    )
    for path in shapes:
        assert after[path].dtype == np.bool_
        np.testing.assert_array_equal(after[path], expected[path], err_msg=path)
        assert not (after[path] & ~before[path]).any()  # what is pruned only ever grows
    emptied = {path for path in chosen if before[path].any() and not after[path].any()}
    collapse = [message for message in messages if "layer collapse" in message]
    assert len(collapse) == bool(emptied and not floor)
    assert not collapse or {path for path in chosen if re.search(rf"\b{path}\b", collapse[0])} >= emptied
    assert bool(len(messages) - len(collapse)) == warned, messages


@pytest.mark.parametrize("seed", range(4))
def test_prune_once_is_the_oracle_on_random_shapes(seed):
    rng = np.random.default_rng(seed)
    shapes = {path: tuple(rng.integers(1, 8, rng.integers(2, 5)).tolist()) for path in "abc"[: seed % 3 + 1]}
    scores = {path: rng.integers(-3, 4, shape).astype(np.float32) for path, shape in shapes.items()}
    before = {path: rng.random(shape) < 0.8 for path, shape in shapes.items()}
    spec = [
        Spec(),
        Spec("slices", (-1,), norm=1),
        Spec("blocks", (-2, -1), (2, 3), norm=1),
        Spec("blocks", (0,), (4,), norm=math.inf),
    ][seed]
    for scope in ("global", "layerwise"):
        for of in ("total", "remaining"):
            expected, _ = brute_force.prune_once(scores, before, spec, "sparsity", 0.6, of=of, scope=scope)
            after, _ = prune(
                scores,
                sparsity=0.6,
                scope=scope,
                of=of,
                masks=on_device(before),
                structure=structure_of(spec),
            )
            for path in shapes:
                np.testing.assert_array_equal(after[path], expected[path], err_msg=path)


@pytest.mark.parametrize("norm", [2, 3, 1.5])
@pytest.mark.parametrize(
    "spec", [Spec("slices", (-1,)), Spec("blocks", (-2, -1), (2, 2))], ids=["slices", "blocks"]
)
def test_other_norms_are_the_oracle_without_ties(spec, norm):
    spec = Spec(spec.kind, spec.axes, spec.sides, norm=norm)
    rng = np.random.default_rng(4)
    scores = {path: rng.normal(size=shape).astype(np.float32) for path, shape in TREES["conv"].items()}
    before = {path: rng.random(shape) < 0.8 for path, shape in TREES["conv"].items()}
    chosen = {path: scores[path] for path in scores if path != "skip"}
    for scope in ("global", "layerwise"):
        for sparsity in (0.3, 0.7):
            kwargs = {"scope": scope, "floor": 0}
            expected, _ = brute_force.prune_once(chosen, before, spec, "sparsity", sparsity, **kwargs)
            after, _ = prune(
                scores, sparsity=sparsity, masks=on_device(before), structure=structure_of(spec), **kwargs
            )
            for path in scores:
                np.testing.assert_array_equal(after[path], expected[path], err_msg=path)


@pytest.mark.parametrize("norm", [2, 3, 0.5])
def test_a_norm_neither_overflows_nor_vanishes(norm):
    scores = {"a": np.array([[1e30, 1e-30, 3e30, 0], [1e30, 2e-30, 3e30, 1e-30]], np.float32)}
    columns = jp.structures.slices(-1, norm=norm)
    order = []
    for count in range(1, 4):
        after, _ = prune(scores, count=count, structure=columns)
        order.append(np.flatnonzero(~after["a"][0]).tolist())
    assert order == [[3], [1, 3], [0, 1, 3]]


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("case", ["elements-conv", "slices-out", "blocks-2x2", "nm-2:4"])
@given(data=st.data())
@examples(25, share=8)
def test_masks_are_nested_over_levels(case, scope, data):
    tree, spec = CASES[case]
    scores = data.draw(scored(TREES[tree], spec, "sparsity"))
    levels = sorted(data.draw(st.lists(FRACTIONS, min_size=2, max_size=4)))
    kwargs = {"scope": scope, "structure": structure_of(spec)}
    masks = [prune(scores, sparsity=level * spec.max_sparsity, **kwargs)[0] for level in levels]
    for looser, tighter in itertools.pairwise(masks):
        for path in scores:
            assert not (tighter[path] & ~looser[path]).any()


@given(scores=scored(TREES["many"], Spec(), "sparsity"), sparsity=FRACTIONS)
@examples(50)
def test_counts_are_exact(scores, sparsity):
    size = sum(s.size for s in scores.values())
    after, _ = prune(scores, sparsity=sparsity, floor=0)
    assert sum((~mask).sum() for mask in after.values()) == brute_force.half_even(sparsity, size)
    after, _ = prune(scores, sparsity=sparsity, floor=0, scope="layerwise")
    for path, mask in after.items():
        assert (~mask).sum() == brute_force.half_even(sparsity, scores[path].size)


def test_of_equal_scores_the_first_leaf_and_the_first_entry_go():
    after, _ = prune({"b": np.ones((2, 2), np.float32), "a": np.ones((2, 3), np.float32)}, count=7, floor=0)
    assert not after["a"].any()
    assert after["b"].tolist() == [[False, True], [True, True]]


# Floor


def test_the_default_floor_never_empties_a_leaf_and_says_so_global():
    scores = {"big": np.full((4, 4), 9, np.float32), "small": np.array([[0, 1], [2, 3]], np.float32)}
    after, messages = prune(scores, count=6)
    assert after["small"].tolist() == [[False, False], [False, True]]
    assert (~after["big"]).sum() == 3
    (message,) = messages
    assert "floor=1 kept the last units of small" in message and "big" not in message


def test_the_default_floor_never_empties_a_leaf_and_says_so_layerwise():
    scores = {"big": np.full((4, 4), 9, np.float32), "small": np.ones((1, 2), np.float32)}
    after, messages = prune(scores, sparsity=0.9, scope="layerwise")
    assert after["small"].tolist() == [[False, True]]
    (message,) = messages
    assert message.startswith("small: 1 of the 2 units asked for were removed, because floor=1")


def test_the_floor_speaks_for_a_leaf_it_kept_whole():
    scores = {"big": np.full((4, 4), 9, np.float32), "single": np.zeros((1, 1), np.float32)}
    after, messages = prune(scores, count=2)
    assert after["single"].all() and (~after["big"]).sum() == 2
    (message,) = messages
    assert "floor=1 kept the last units of single" in message


def test_the_floor_says_nothing_where_it_does_not_bite():
    scores = {"big": np.ones((4, 4), np.float32), "small": np.array([[0, 9]], np.float32)}
    for scope in ("global", "layerwise"):
        assert prune(scores, sparsity=0.5, scope=scope)[1] == []


def test_floor_0_empties_a_leaf_and_says_so_once():
    scores = {"big": np.full((4, 4), 9, np.float32), "small": np.ones((2, 2), np.float32)}
    after, (message,) = prune(scores, count=4, floor=0)
    assert not after["small"].any() and after["big"].all()
    assert message.startswith("layer collapse: small kept nothing")
    assert prune(scores, count=2, masks=on_device(after), floor=0)[1] == []  # it was empty before
    after, (message,) = prune(scores, sparsity=0.9, floor=0, scope="layerwise")
    assert not after["small"].any() and message.startswith("layer collapse: small kept nothing")
    assert prune(scores, count=3, floor=0)[1] == []


def test_a_floor_of_three():
    scores = {"big": np.full((4, 4), 9, np.float32), "small": np.ones((2, 2), np.float32)}
    after, messages = prune(scores, count=5, floor=3)
    assert after["small"].sum() == 3 and after["big"].sum() == 12
    assert "floor=3 kept the last units of small" in messages[0]


def test_a_count_beyond_what_is_left_says_so():
    scores = {"a": np.arange(4, dtype=np.float32)}
    before = {"a": jnp.array([True, False, False, True])}
    after, (message, collapse) = prune(scores, count=3, masks=before, floor=0)
    assert not after["a"].any()
    assert collapse.startswith("layer collapse: a kept nothing")
    assert (
        message == "all leaves together: 2 of the 3 units asked for were removed, because no more are left."
    )


def test_a_target_already_passed_says_so():
    scores = {"a": np.arange(4, dtype=np.float32)}
    before = {"a": jnp.array([True, False, False, True])}
    after, (message,) = prune(scores, sparsity=0.25, masks=before)
    assert after["a"].tolist() == [True, False, False, True]
    assert "1 more units are pruned already than the target asks for" in message


# jit, vmap and what may be traced


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(5)
    scores = {"a": rng.integers(0, 5, (4, 8)), "b": rng.integers(0, 5, (8, 2)), "bias": np.zeros(3)}
    scores = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in scores.items()}
    before = {path: jnp.asarray(rng.random(leaf.shape) < 0.8) for path, leaf in scores.items()}
    return scores, before


def two_axes(path, leaf):
    return leaf.ndim == 2


STRUCTURES = {
    "elements": jp.structures.elements(),
    "slices": jp.structures.slices(-1, norm=2),
    "blocks": jp.structures.blocks((3, 3)),
    "nm": jp.structures.nm(1, 4),
}


def assert_trees_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize(
    "target",
    [
        {"sparsity": 0.4},
        {"sparsity": 0.4, "scope": "layerwise"},
        {"sparsity": {"a": 0.3, "b": 0.7}, "scope": "layerwise"},
        {"count": 7},
        {"count": {"b": 7}, "scope": "layerwise"},
        {"threshold": 2.5},
        {"threshold": {"a": 1.5}},
    ],
    ids=str,
)
def test_jit_equals_eager_for_every_target(small, target):
    scores, before = small

    def run(scores, masks):
        return jp.prune_once(scores, scores, where=two_axes, masks=masks, **target)

    assert_trees_equal(jax.jit(run)(scores, before), run(scores, before))


@pytest.mark.parametrize("name", STRUCTURES)
def test_jit_equals_eager_for_every_structure(small, name):
    scores, before = small

    def run(scores, masks):
        return jp.prune_once(
            scores, jp.scores.magnitude, 0.5, structure=STRUCTURES[name], where=two_axes, masks=masks
        )

    assert_trees_equal(jax.jit(run)(scores, before), run(scores, before))


@pytest.mark.filterwarnings("ignore:layer collapse")  # at the amounts that take all
@pytest.mark.parametrize("kind", ["count", "threshold"])
def test_a_count_or_a_threshold_may_be_traced(small, kind):
    scores, before = small

    def run(value, scale=1):
        return jp.prune_once(scores, scores, **{kind: value}, where=two_axes, masks=before, floor=0)

    def run_by_path(value):
        by_path = {kind: {"a": value, "b": value + 1}}
        return jp.prune_once(scores, scores, **by_path, where=two_axes, scope="layerwise", floor=0)

    for function in (run, run_by_path):
        traced = jax.jit(function)
        for value in (0, 1, 4):
            assert_trees_equal(traced(value), function(value))


@pytest.mark.parametrize("name", ["elements", "nm"])
def test_vmap_over_counts_is_a_loop(small, name):
    scores, before = small

    def run(count):
        return jp.prune_once(
            scores, scores, count=count, structure=STRUCTURES[name], where=two_axes, masks=before, floor=0
        )

    counts = jnp.arange(8)
    with warnings.catch_warnings():  # the loop says where fewer units are left; vmap cannot
        warnings.simplefilter("ignore")
        loop = [run(count) for count in range(8)]
    assert_trees_equal(jax.vmap(run)(counts), jax.tree.map(lambda *masks: jnp.stack(masks), *loop))


def test_vmap_over_scores_is_a_loop(small):
    scores, _ = small
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 - leaf]), scores)

    def run(scores):
        return jp.prune_once(scores, scores, sparsity=0.5, where=two_axes)

    loop = [run(jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(3)]
    assert_trees_equal(jax.vmap(run)(batch), jax.tree.map(lambda *masks: jnp.stack(masks), *loop))


def test_values_that_a_traced_function_closes_over(small):
    """Concrete scores, masks and counts inside a trace: checked, not staged."""
    scores, before = small
    expected = jp.prune_once(scores, scores, count=5, where=two_axes)
    assert_trees_equal(jax.jit(lambda n: jp.prune_once(scores, scores, count=n, where=two_axes))(5), expected)
    five = jnp.int32(5)
    assert_trees_equal(jax.jit(lambda s: jp.prune_once(s, s, count=five, where=two_axes))(scores), expected)

    def remaining(scores):
        return jp.prune_once(scores, scores, 0.5, of="remaining", masks=before, where=two_axes)

    assert_trees_equal(jax.jit(remaining)(scores), remaining(scores))
    bad = {**scores, "a": scores["a"].at[0].set(jnp.nan)}
    with pytest.raises(ValueError, match="NaN"):
        jax.jit(lambda n: jp.prune_once(scores, bad, count=n, where=two_axes))(5)


def test_traced_nan_ranks_highest(small):
    scores, _ = small
    bad = {**scores, "a": scores["a"].at[0, 0].set(jnp.nan)}
    masks = jax.jit(lambda s: jp.prune_once(s, s, sparsity=0.9, where=two_axes, floor=0))(bad)
    assert masks["a"][0, 0]
    masks = jax.jit(lambda s: jp.prune_once(s, s, 0.75, structure=STRUCTURES["nm"], where=two_axes))(bad)
    assert masks["a"].sum(0).tolist() == [1] * 8 and masks["a"][0, 0]


def test_remaining_under_jit_raises(small):
    scores, before = small

    def run(masks):
        return jp.prune_once(scores, scores, sparsity=0.5, of="remaining", masks=masks, where=two_axes)

    with pytest.raises(TypeError, match=r"Under jit use jaxprune\.pruner\(.*or pass count="):
        jax.jit(run)(before)


@pytest.mark.parametrize("sparsity", [lambda s: s, lambda s: {"a": s}], ids=["number", "dict"])
def test_a_traced_sparsity_raises(small, sparsity):
    scores, _ = small

    def run(s):
        return jp.prune_once(scores, scores, sparsity=sparsity(s), scope="layerwise", where=two_axes)

    with pytest.raises(TypeError, match=r"not a traced value.*pass count="):
        jax.jit(run)(0.5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_dtype_is_promoted_by_accident(small, name):
    scores, before = small
    mixed = {**scores, "a": scores["a"].astype(jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        for target in ({"sparsity": 0.5}, {"count": 3}, {"threshold": 1.0}):

            def run(scores, masks, target=target):
                return jp.prune_once(
                    scores, scores, structure=STRUCTURES[name], where=two_axes, masks=masks, **target
                )

            shapes = jax.eval_shape(run, mixed, before)  # raises on implicit promotion
            assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
                lambda leaf: (leaf.shape, leaf.dtype), before
            )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, jnp.int8) for name in STRUCTURES],
        *[("elements", dtype) for dtype in (jnp.uint8, jnp.int32, jnp.float16, jnp.bfloat16)],
    ],
)
def test_scores_of_other_dtypes(small, name, dtype):
    scores, _ = small
    run = {"structure": STRUCTURES[name], "where": two_axes, "sparsity": 0.5}
    cast = {path: leaf.astype(dtype) for path, leaf in scores.items()}
    assert_trees_equal(jp.prune_once(scores, cast, **run), jp.prune_once(scores, scores, **run))


# How it is computed


def test_prune_once_runs_few_python_functions():
    params = {f"w{i}": jnp.arange(16.0).reshape(4, 4) + i for i in range(8)}

    def prune(params):
        return jp.prune_once(params, jp.scores.magnitude, 0.5)

    assert python_calls.warm(lambda: prune(params)).calls <= 150
    traced = python_calls.traced(prune, params)
    assert traced.calls <= 500, traced
    # Of each further leaf a selection traces its search for ties, and looks at how its scores are computed.
    two = python_calls.traced(prune, {name: params[name] for name in ("w0", "w1")})
    assert traced.calls - two.calls <= 6 * 80


# Inputs of other kinds


def test_a_score_function_gets_grads_key_and_extras():
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    seen = {}

    def score(params, *, grads, key, bonus, **extra):
        seen.update(extra, grads=grads, key=key, bonus=bonus)
        return params

    grads, key = {"kernel": jnp.ones((2, 3))}, jax.random.key(0)
    jp.prune_once(params, score, sparsity=0.5, grads=grads, key=key, bonus=3)
    assert seen == {"grads": grads, "key": key, "bonus": 3}


def test_signs_of_a_tree_of_scores_count():
    params = {"kernel": jnp.array([[-5.0, 1.0, 0.0, 2.0]])}
    assert jp.prune_once(params, params, count=1)["kernel"].tolist() == [[False, True, True, True]]
    masks = jp.prune_once(params, jp.scores.magnitude, count=1)
    assert masks["kernel"].tolist() == [[True, True, False, True]]


def test_other_trees_and_numpy_arrays():
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    for params in ([{"kernel": kernel}, (kernel, np.arange(3, dtype=np.float32))], kernel):
        masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, where=lambda path, leaf: True)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True):
            assert mask.shape == leaf.shape and mask.dtype == jnp.bool_


def test_a_leaf_without_entries():
    params = {"a": jnp.ones((0, 3)), "b": jnp.arange(6.0).reshape(2, 3)}
    for scope in ("global", "layerwise"):
        masks = jp.prune_once(params, jp.scores.magnitude, 0.5, where=two_axes, scope=scope)
        assert masks["a"].shape == (0, 3) and masks["b"].sum() == 3


# torch.nn.utils.prune, as oracle.py states it


def magnitudes(shapes, seed):
    """Distinct magnitudes, of both signs."""
    rng = np.random.default_rng(seed)
    size = sum(math.prod(shape) for shape in shapes)
    flat = rng.permutation(np.arange(1, size + 1)) * rng.choice([-1, 1], size) / 8
    parts = np.split(flat.astype(np.float32), np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def amount_to_target(amount):
    return {"count": amount} if isinstance(amount, int) else {"sparsity": amount, "of": "remaining"}


def everything(path, leaf):
    return True


@pytest.mark.filterwarnings("ignore:layer collapse")  # at the amounts that take all
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.25, 0.3, 0.5, 0.77, 0.99, 3, 12])
def test_torch_l1_unstructured(amount):
    (w,) = magnitudes([(5, 9)], seed=0)
    masks, expected = {"w": jnp.ones(w.shape, bool)}, None
    for _ in range(3):
        expected = brute_force.torch_l1_unstructured(w, amount, expected)
        masks = jp.prune_once(
            {"w": w}, jp.scores.magnitude, **amount_to_target(amount), masks=masks, where=everything, floor=0
        )
        np.testing.assert_array_equal(masks["w"], expected)


@pytest.mark.filterwarnings("ignore:layer collapse")  # at the amounts that take all
@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 2, 2)])
@pytest.mark.parametrize("n", [1, 2, math.inf, -math.inf])
@pytest.mark.parametrize("amount", [0.3, 0.5, 1])
def test_torch_ln_structured(shape, n, amount):
    (w,) = magnitudes([shape], seed=1)
    for dim in range(-len(shape), len(shape)):
        rows = jp.structures.slices(dim, norm=n)
        masks, expected = {"w": jnp.ones(w.shape, bool)}, None
        for _ in range(2):
            expected = brute_force.torch_ln_structured(w, amount, n, dim, expected)
            masks = jp.prune_once(
                {"w": w},
                jp.scores.magnitude,
                **amount_to_target(amount),
                structure=rows,
                masks=masks,
                where=everything,
                floor=0,
            )
            np.testing.assert_array_equal(masks["w"], expected)


@pytest.mark.filterwarnings("ignore:layer collapse")  # at the amounts that take all
@pytest.mark.parametrize("amount", [0.2, 0.5, 0.8, 11])
def test_torch_global_unstructured(amount):
    weights = magnitudes([(4, 5), (3, 3, 2, 2), (7,)], seed=2)
    params = dict(zip("abc", weights, strict=True))
    masks, expected = None, None
    for _ in range(3):
        expected = brute_force.torch_global_unstructured(weights, amount, expected)
        masks = jp.prune_once(
            params, jp.scores.magnitude, **amount_to_target(amount), masks=masks, where=everything, floor=0
        )
        for path, mask in zip("abc", expected, strict=True):
            np.testing.assert_array_equal(masks[path], mask)


def test_torch_importance_scores():
    w, importance = magnitudes([(4, 6), (4, 6)], seed=3)
    expected = brute_force.torch_l1_unstructured(w, 0.4, importance_scores=importance)
    masks = jp.prune_once({"w": w}, {"w": np.abs(importance)}, sparsity=0.4, where=everything)
    np.testing.assert_array_equal(masks["w"], expected)
    expected = brute_force.torch_ln_structured(w, 0.5, 1, 1, importance_scores=importance)
    masks = jp.prune_once(
        {"w": w}, {"w": importance}, 0.5, structure=jp.structures.slices(1, norm=1), where=everything
    )
    np.testing.assert_array_equal(masks["w"], expected)


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.5, 0.7, 5])
@pytest.mark.parametrize("structure", [None, jp.structures.slices(0)], ids=["entries", "rows"])
def test_torch_random_amounts(amount, structure):
    params, masks = {"w": jnp.ones((10, 3))}, {"w": jnp.ones((10, 3), bool)}
    left = 10 if structure else 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five at a time are soon more than there are
        for i in range(3):
            masks = jp.prune_once(
                params,
                jp.scores.random,
                **amount_to_target(amount),
                key=jax.random.key(i),
                structure=structure,
                masks=masks,
                floor=0,
                where=everything,
            )
            left = max(left - (amount if isinstance(amount, int) else brute_force.half_even(amount, left)), 0)
            kept = np.asarray(masks["w"])
            assert (kept.any(axis=1) if structure else kept).sum() == left


def test_torch_amounts_are_of_what_is_left():
    (w,) = magnitudes([(3, 4)], seed=4)
    masks = jp.prune_once({"w": w}, jp.scores.magnitude, 0.5, of="remaining")
    assert masks["w"].sum() == 6
    masks = jp.prune_once({"w": w}, jp.scores.magnitude, 0.5, of="remaining", masks=masks)
    assert masks["w"].sum() == 3


# The articles' arithmetic

LENET = {
    "conv1": {"kernel": (5, 5, 1, 10), "bias": (10,)},
    "conv2": {"kernel": (5, 5, 10, 20), "bias": (20,)},
    "fc1": {"kernel": (320, 50), "bias": (50,)},
    "fc2": {"kernel": (50, 10), "bias": (10,)},
}
LENET_SIZE, LENET_MACS = 21_840, 932_500
# Their count of multiplications: every convolution's output is as large as its input.
POSITIONS = {"conv1": 28 * 28, "conv2": 12 * 12, "fc1": 1, "fc2": 1}
# p: nonzero parameters, size ratio, MAC ratio; filters alive, size ratio, MAC ratio.
LENET_TABLE = {
    0.1: (15947, 1.3695, 1.3706, (7, 14, 37), 1.3561, 1.4268),
    0.2: (11226, 1.9455, 1.9531, (5, 10, 26), 1.8934, 1.9976),
    0.3: (7550, 2.8927, 2.9137, (3, 7, 17), 2.78, 2.94),
    0.4: (4788, 4.5614, 4.6296, (2, 4, 11), 4.23, 4.98),
    0.5: (2809, 7.7750, 8.0134, (1, 3, 7), 6.06, 7.15),
    0.6: (1482, 14.7368, 15.625, (1, 1, 3), 11.97, 16.34),
    0.7: (678, 32.2124, 36.75, (0, 1, 1), 18.83, 25.33),
}


def random_params(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def nonzeros(masks):
    return sum(int(mask.sum()) for mask in jax.tree.leaves(masks))


def multiplications(masks):
    return sum(POSITIONS[layer] * int(masks[layer]["kernel"].sum()) for layer in POSITIONS)


def three_rounds(params, scores, p, **kwargs):
    """By a pruner and by prune_once, which must agree."""
    pruner = jp.pruner(scores, p, of="remaining", scope="layerwise", floor=0, **kwargs)
    state, masks = pruner.init(params), None
    for i in range(3):
        key = jax.random.key(i)
        state = pruner.update(state, params, key=key)
        masks = jp.prune_once(
            params, scores, p, of="remaining", scope="layerwise", floor=0, masks=masks, key=key, **kwargs
        )
    assert_trees_equal(state.masks, masks)
    for layer in masks:
        assert masks[layer]["bias"].all()
    return masks


def ratio(dense, sparse, published):
    """Equal to as many digits as were published."""
    digits = len(str(published).split(".")[1])
    return abs(dense / sparse - published) <= 0.5001 * 10**-digits


@pytest.mark.parametrize("p", LENET_TABLE)
@pytest.mark.parametrize("scores", [jp.scores.random, jp.scores.magnitude], ids=["random", "magnitude"])
def test_lenet_unstructured(p, scores):
    masks = three_rounds(random_params(LENET), scores, p)
    nnz, size, macs = LENET_TABLE[p][:3]
    assert nonzeros(masks) == nnz
    assert ratio(LENET_SIZE, nnz, size)
    assert ratio(LENET_MACS, multiplications(masks), macs)


@pytest.mark.filterwarnings("ignore:layer collapse")  # of conv1 at 0.7, as in the article
@pytest.mark.parametrize("p", LENET_TABLE)
def test_lenet_structured(p):
    masks = three_rounds(
        random_params(LENET),
        jp.scores.magnitude,
        p,
        structure=jp.structures.slices(axis=-1, norm=1),
        where=jp.matching("conv*/kernel", "fc1/kernel"),
    )
    alive, size, macs = LENET_TABLE[p][3:]
    for layer, count in zip(("conv1", "conv2", "fc1"), alive, strict=True):
        columns = np.asarray(masks[layer]["kernel"]).reshape(-1, LENET[layer]["bias"][0])
        assert columns.any(0).sum() == columns.all(0).sum() == count
    assert masks["fc2"]["kernel"].all()
    assert ratio(LENET_SIZE, nonzeros(masks), size)
    assert ratio(LENET_MACS, multiplications(masks), macs)


def test_lenet_300_100_in_rounds():
    shapes = {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}
    params = random_params({name: {"kernel": shape} for name, shape in shapes.items()})
    rates = {"fc1/kernel": 0.2, "fc2/kernel": 0.2, "fc3/kernel": 0.1}
    pruner = jp.pruner(jp.scores.magnitude, rates, of="remaining", scope="layerwise")
    update = jax.jit(pruner.update)
    state, masks, kept = pruner.init(params), None, {}
    for i in range(1, 20):
        state = update(state, params)
        masks = jp.prune_once(
            params, jp.scores.magnitude, rates, of="remaining", scope="layerwise", masks=masks
        )
        kept[i] = nonzeros(masks)
        assert_trees_equal(state.masks, masks)
    published = {1: 213060, 3: 136511, 6: 70051, 7: 56094, 9: 35981, 12: 18506, 15: 9537, 19: 3958}
    assert {i: kept[i] for i in published} == published


# Bad input: each says what was got and where

KERNEL = {"fc": {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3)}}
TWO = {"a": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones((1, 4))}


def raises(error, match, /, params=KERNEL, scores=jp.scores.magnitude, **kwargs):
    if not kwargs.keys() & {"sparsity", "count", "threshold"}:
        kwargs["sparsity"] = 0.5
    with pytest.raises(error, match=match):
        jp.prune_once(params, scores, **kwargs)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, True])
def test_sparsity_out_of_range(sparsity):
    got = rf"got {float(sparsity)}\. \(90 % is 0\.9"
    raises(ValueError, rf"sparsity must be in \[0, 1\).*{got}", sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["0.9", "high", [0.5], 1j])
def test_sparsity_that_is_no_number(sparsity):
    raises(TypeError, r"sparsity must be a number in \[0, 1\), got ", sparsity=sparsity)


def test_sparsity_out_of_range_for_a_path():
    by_path = {"fc/kernel": 1.5}
    raises(ValueError, r"sparsity\['fc/kernel'\].*got 1\.5", sparsity=by_path, scope="layerwise")


def test_two_targets():
    raises(ValueError, r"exactly one of.*sparsity=0\.5, count=3, threshold=None", sparsity=0.5, count=3)


def test_no_target():
    with pytest.raises(ValueError, match=r"exactly one of sparsity, count and threshold"):
        jp.prune_once(KERNEL, jp.scores.magnitude)


@pytest.mark.parametrize("count", [13, -1, np.int64(13), jnp.int32(-2)])
def test_count_out_of_range(count):
    raises(ValueError, rf"count={count} is out of range: all leaves together has 12 units", count=count)


def test_count_out_of_range_for_a_leaf():
    raises(
        ValueError,
        "count=5 is out of range: b has 4",
        params=TWO,
        count=5,
        scope="layerwise",
        where=everything,
    )


@pytest.mark.parametrize("count", [3.0, True, np.float32(2), jnp.ones(())])
def test_count_that_is_no_integer(count):
    raises(TypeError, "count must be an integer, got .*for a fraction pass sparsity=", count=count)


def test_count_that_is_no_integer_for_a_path():
    by_path = {"fc/kernel": 0.5}
    raises(TypeError, r"count\['fc/kernel'\] must be an integer, got 0\.5", count=by_path, scope="layerwise")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_threshold_is_not_rounded_to_half_precision(compiled):
    params = {"w": jnp.array([[1.0, 1.0078125]], jnp.bfloat16)}  # neighbours in bfloat16

    def prune(params):
        return jp.prune_once(params, jp.scores.magnitude, threshold=1.002, where=lambda path, leaf: True)

    assert (jax.jit(prune) if compiled else prune)(params)["w"].tolist() == [[False, True]]


def test_warnings_name_the_line_of_the_caller():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.full((4, 4), 2.0)}}
    with pytest.warns(UserWarning, match="kept the last units") as spared:
        jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
    with pytest.warns(UserWarning, match="layer collapse") as collapsed:
        jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, floor=0)
    with pytest.warns(UserWarning, match="units asked for were removed") as missed:
        jp.prune_once(params, jp.scores.magnitude, count=4, scope="layerwise")
    assert {warning.filename for warning in (*spared, *collapsed, *missed)} == {__file__}


def test_threshold_nan():
    raises(ValueError, "threshold is nan for fc/kernel", threshold=math.nan)


@pytest.mark.parametrize("what", ["scores", "masks", "grads"])
def test_trees_that_differ(what):
    other = {"fc": {"kernel": jnp.ones((4, 3), bool if what == "masks" else float)}, "extra": jnp.ones(1)}
    match = rf"{what} must have the tree structure of params. Missing: fc/bias. Not in params: extra"
    kwargs = {what: other}
    if what == "grads":
        kwargs["scores"] = jp.scores.taylor
    raises(ValueError, match, **kwargs)


@pytest.mark.parametrize("what", ["scores", "masks", "grads"])
def test_shapes_that_differ(what):
    dtype = bool if what == "masks" else jnp.float32
    other = {"fc": {"kernel": jnp.ones((3, 4), dtype), "bias": jnp.ones(3, dtype)}}
    match = rf"{what}\['fc/kernel'\] has shape \(3, 4\), but params\['fc/kernel'\] has shape \(4, 3\)"
    kwargs = {what: other}
    if what == "grads":
        kwargs["scores"] = jp.scores.gradient_magnitude
    raises(ValueError, match, **kwargs)


def test_a_score_function_that_returns_another_tree():
    raises(ValueError, "scores must have the tree", scores=lambda params, **_: params["fc"])


def test_masks_that_are_not_bool():
    ones = jax.tree.map(jnp.ones_like, KERNEL)
    raises(TypeError, r"masks\['fc/bias'\] is float32\[3\], but masks are bool", masks=ones)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_scores_that_are_not_finite(bad):
    kernel = KERNEL["fc"]["kernel"].at[1, 1].set(bad).at[2, 0].set(bad)
    scores = {"fc": {"kernel": kernel, "bias": jnp.ones(3)}}
    raises(ValueError, r"scores\['fc/kernel'\] has 2 entries that are NaN or inf", scores=scores)


def test_scores_that_are_not_finite_in_a_leaf_left_out():
    scores = {"fc": {"kernel": KERNEL["fc"]["kernel"], "bias": jnp.full(3, jnp.nan)}}
    assert jp.prune_once(KERNEL, scores, sparsity=0.5)["fc"]["bias"].all()


def test_params_that_are_integers():
    params = {"kernel": jnp.ones((2, 2), jnp.int32)}
    raises(TypeError, r"params\['kernel'\] is int32\[2, 2\]; only floating-point", params=params)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.complex64])
def test_scores_that_do_not_rank(dtype):
    scores = jax.tree.map(lambda leaf: leaf.astype(dtype), KERNEL)
    name = jnp.dtype(dtype).name
    raises(TypeError, rf"scores\['fc/kernel'\] is {name}\[4, 3\]; scores are floating", scores=scores)


def test_scores_that_mix_integers_and_floats():
    scores = {"a": jnp.ones((4, 2), jnp.int32), "b": jnp.ones((1, 4))}
    raises(TypeError, "integers for a and floating-point", params=TWO, scores=scores, where=everything)


def test_an_empty_tree():
    raises(ValueError, "params is an empty tree", params={"fc": {}})


def test_a_leaf_that_is_a_function():
    raises(TypeError, r"params\['fc/act'\] is a function, not an array", params={"fc": {"act": lambda x: x}})


def test_scores_that_are_neither_a_function_nor_a_tree():
    raises(TypeError, "got the string 'magnitude': pass jaxprune.scores.magnitude itself", scores="magnitude")
    raises(TypeError, "scores.* is a int, not an array", scores=3)


def test_a_where_that_matches_nothing():
    match = r"where=matching\('\*/kernle'\) matches no leaf.*fc/bias float32\[3\], fc/kernel float32\[4, 3\]"
    raises(ValueError, match, where=jp.matching("*/kernle"))


def test_a_where_that_is_not_a_function():
    raises(TypeError, r"where must be a function of \(path, leaf\), got '\*/kernel'", where="*/kernel")


@pytest.mark.parametrize("kind", ["sparsity", "count", "threshold"])
def test_a_path_that_is_not_there(kind):
    kwargs = {kind: {"fc/kernel": 0, "fc/kernle": 0}, "scope": "layerwise"}
    raises(ValueError, rf"{kind} names 'fc/kernle'.*The paths that take part: fc/kernel\.", **kwargs)


@pytest.mark.parametrize("kind", ["sparsity", "count", "threshold"])
def test_a_dict_that_is_empty(kind):
    raises(ValueError, f"{kind} is an empty dict", **{kind: {}}, scope="layerwise")


@pytest.mark.parametrize("kind", ["sparsity", "count"])
def test_a_target_by_path_needs_layerwise(kind):
    raises(ValueError, f"a {kind} per path needs scope='layerwise'", **{kind: {"fc/kernel": 0}})


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"scope": "local"}, "scope must be one of 'global', 'layerwise', 'isomorphic', got 'local'"),
        ({"of": "rest"}, "of must be 'total' or 'remaining', got 'rest'"),
        ({"floor": -1}, "floor must be an integer of 0 or more.*got -1"),
        ({"floor": 0.5}, "floor must be an integer of 0 or more.*got 0.5"),
    ],
)
def test_choices(kwargs, match):
    raises((TypeError, ValueError), match, **kwargs)


@pytest.mark.parametrize(
    ("name", "value"), [("grads", KERNEL), ("key", jax.random.key(0)), ("hessian", KERNEL)]
)
def test_inputs_that_a_tree_of_scores_does_not_use(name, value):
    raises(TypeError, f"scores is a tree.*so {name} would not be used", scores=KERNEL, **{name: value})


@pytest.mark.parametrize("score", [jp.scores.taylor, jp.scores.gradient_magnitude])
def test_grads_that_are_missing(score):
    raises(ValueError, rf"scores\.{score.__name__} needs gradients: pass grads=", scores=score)


def test_a_key_that_is_missing():
    raises(ValueError, r"scores\.random needs a PRNG key: pass key=", scores=jp.scores.random)


def test_scores_of_what_is_pruned_already_do_not_matter():
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    masks = {"kernel": jnp.ones((2, 4), bool).at[0, 3].set(False)}
    scores = {"kernel": params["kernel"].at[0, 3].set(jnp.nan)}
    after = jp.prune_once(params, scores, count=2, masks=masks)
    assert after["kernel"].tolist() == [[False, False, True, False], [True] * 4]
    columns = jp.structures.slices(axis=-1)
    after = jp.prune_once(params, scores, count=1, masks=masks, structure=columns)
    assert after["kernel"].any(0).tolist() == [False, True, True, True]
