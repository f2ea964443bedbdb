"""prune_once: against the oracle, under jit and vmap, the published counts, and bad input."""

import dataclasses
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
@examples(25, share=len(CASES))
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


def assert_oracle(scores, before, spec, sparsity, **options):
    chosen = {path: leaf for path, leaf in scores.items() if path != "skip"}
    expected, _ = brute_force.prune_once(chosen, before, spec, "sparsity", sparsity, **options)
    options |= {"masks": on_device(before), "structure": structure_of(spec)}
    after, _ = prune(scores, sparsity=sparsity, **options)
    for path in scores:
        np.testing.assert_array_equal(after[path], expected[path], err_msg=path)


@pytest.mark.parametrize(
    ("seed", "spec"),
    [
        (0, Spec()),
        (1, Spec("slices", (-1,), norm=1)),
        (2, Spec("blocks", (-2, -1), (2, 3), norm=1)),
        (3, Spec("blocks", (0,), (4,), norm=math.inf)),
    ],
)
def test_prune_once_is_the_oracle_on_random_shapes(seed, spec):
    rng = np.random.default_rng(seed)
    shapes = {path: tuple(rng.integers(1, 8, rng.integers(2, 5)).tolist()) for path in "abc"[: seed % 3 + 1]}
    scores = {path: rng.integers(-3, 4, shape).astype(np.float32) for path, shape in shapes.items()}
    before = {path: rng.random(shape) < 0.8 for path, shape in shapes.items()}
    for scope, of in itertools.product(("global", "layerwise"), ("total", "remaining")):
        assert_oracle(scores, before, spec, 0.6, of=of, scope=scope)


@pytest.mark.parametrize("norm", [2, 3, 1.5])
@pytest.mark.parametrize(
    "spec", [Spec("slices", (-1,)), Spec("blocks", (-2, -1), (2, 2))], ids=["slices", "blocks"]
)
def test_other_norms_are_the_oracle_without_ties(spec, norm):
    rng = np.random.default_rng(4)
    scores = {path: rng.normal(size=shape).astype(np.float32) for path, shape in TREES["conv"].items()}
    before = {path: rng.random(shape) < 0.8 for path, shape in TREES["conv"].items()}
    for scope, sparsity in itertools.product(("global", "layerwise"), (0.3, 0.7)):
        assert_oracle(scores, before, dataclasses.replace(spec, norm=norm), sparsity, scope=scope, floor=0)


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
@examples(12, share=8)
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
@examples(25)
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

BIG = np.full((4, 4), 9, np.float32)
EMPTY = {"big": jnp.ones((4, 4), bool), "small": jnp.zeros((2, 2), bool)}


@pytest.mark.parametrize(
    ("small", "options", "kept", "says"),
    [
        (
            [[0, 1], [2, 3]],
            {"count": 6},
            (13, [[0, 0], [0, 1]]),
            "^(?!.*big).*floor=1 kept the last units of small,",
        ),
        (
            [[1, 1]],
            {"sparsity": 0.9, "scope": "layerwise"},
            (2, [[0, 1]]),
            "^small: 1 of the 2 units asked for were removed, because floor=1",
        ),
        ([[0]], {"count": 2}, (14, [[1]]), "floor=1 kept the last units of small"),
        ([[0, 9]], {"sparsity": 0.5, "scope": "layerwise"}, (8, [[0, 1]]), None),
        ([[0, 9]], {"sparsity": 0.5}, (8, [[0, 1]]), None),
        (np.ones((2, 2)), {"count": 4, "floor": 0}, (16, 0), "^layer collapse: small kept nothing"),
        (np.ones((2, 2)), {"count": 2, "floor": 0, "masks": EMPTY}, (14, 0), None),  # it was empty before
        (
            np.ones((2, 2)),
            {"sparsity": 0.9, "floor": 0, "scope": "layerwise"},
            (2, 0),
            "^layer collapse: small kept nothing",
        ),
        (np.ones((2, 2)), {"count": 3, "floor": 0}, (16, 1), None),
        (np.ones((2, 2)), {"count": 5, "floor": 3}, (12, 3), "floor=3 kept the last units of small"),
    ],
)
def test_a_floor_keeps_units_and_says_so(small, options, kept, says):
    scores = {"big": BIG, "small": np.asarray(small, np.float32)}
    after, messages = prune(scores, **options)
    big, rest = kept
    assert after["big"].sum() == big
    if isinstance(rest, list):
        assert after["small"].tolist() == np.array(rest, bool).tolist()
    else:
        assert after["small"].sum() == rest
    assert len(messages) == bool(says)
    assert not says or re.search(says, messages[0])


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
        *({"sparsity": 0.5, "structure": structure} for structure in STRUCTURES.values()),
    ],
    ids=lambda target: str({k: getattr(v, "name", v) for k, v in target.items()}),
)
def test_jit_equals_eager(small, target):
    scores, before = small

    def run(scores, masks):
        return jp.prune_once(scores, jp.scores.magnitude, where=two_axes, masks=masks, **target)

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


def test_lenet_300_100_in_rounds():
    """The counts of Frankle and Carbin. Those of the founding article: tests/studies/test_experiments.py."""
    shapes = {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}
    rng = np.random.default_rng(0)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for name, s in shapes.items()}
    rates = {"fc1/kernel": 0.2, "fc2/kernel": 0.2, "fc3/kernel": 0.1}
    options = {"of": "remaining", "scope": "layerwise"}
    pruner = jp.pruner(jp.scores.magnitude, rates, **options)
    update = jax.jit(pruner.update)
    state, masks, kept = pruner.init(params), None, {}
    for i in range(1, 20):
        state = update(state, params)
        masks = jp.prune_once(params, jp.scores.magnitude, rates, **options, masks=masks)
        kept[i] = jp.metrics.nonzeros(masks)
        assert_trees_equal(state.masks, masks)
    published = {1: 213060, 3: 136511, 6: 70051, 7: 56094, 9: 35981, 12: 18506, 15: 9537, 19: 3958}
    assert {i: kept[i] for i in published} == published
    geometric = {path: jp.schedules.geometric(rate) for path, rate in rates.items()}
    pruner = jp.pruner(jp.scores.magnitude, geometric, scope="layerwise")
    update, state = jax.jit(pruner.update), pruner.init(params)
    for i in range(1, 4):
        state = update(state, params)
        assert jp.metrics.nonzeros(state.masks) == kept[i]


# Bad input: each says what was got and where

KERNEL = {"fc": {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3)}}
TWO = {"a": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones((1, 4))}
LAYERWISE = {"scope": "layerwise"}


def everything(path, leaf):
    return True


def of_fc(kernel, bias=KERNEL["fc"]["bias"]):
    return {"fc": {"kernel": kernel, "bias": bias}}


def cast(dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), KERNEL)


def not_finite(bad):
    return of_fc(KERNEL["fc"]["kernel"].at[1, 1].set(bad).at[2, 0].set(bad))


REFUSED = [
    *(
        (ValueError, rf"sparsity must be in \[0, 1\).*got {float(s)}\. \(90 % is 0\.9", {"sparsity": s})
        for s in (-0.1, 1.0, 1.5, math.nan, True)
    ),
    *(
        (TypeError, r"sparsity must be a number in \[0, 1\), got ", {"sparsity": sparsity})
        for sparsity in ("0.9", "high", [0.5], 1j)
    ),
    (ValueError, r"sparsity\['fc/kernel'\].*got 1\.5", {"sparsity": {"fc/kernel": 1.5}, **LAYERWISE}),
    (ValueError, r"exactly one of.*sparsity=0\.5, count=3, threshold=None", {"sparsity": 0.5, "count": 3}),
    (ValueError, r"exactly one of sparsity, count and threshold", {"sparsity": None}),
    *(
        (ValueError, rf"count={count} is out of range: all leaves together has 12 units", {"count": count})
        for count in (13, -1, np.int64(13), jnp.int32(-2))
    ),
    (
        ValueError,
        "count=5 is out of range: b has 4",
        {"params": TWO, "count": 5, "where": everything, **LAYERWISE},
    ),
    *(
        (TypeError, "count must be an integer, got .*for a fraction pass sparsity=", {"count": count})
        for count in (3.0, True, np.float32(2), jnp.ones(()))
    ),
    (
        TypeError,
        r"count\['fc/kernel'\] must be an integer, got 0\.5",
        {"count": {"fc/kernel": 0.5}, **LAYERWISE},
    ),
    (ValueError, "threshold is nan for fc/kernel", {"threshold": math.nan}),
    (ValueError, "scores must have the tree", {"scores": lambda params, **_: params["fc"]}),
    (
        TypeError,
        r"masks\['fc/bias'\] is float32\[3\], but masks are bool",
        {"masks": jax.tree.map(jnp.ones_like, KERNEL)},
    ),
    *(
        (ValueError, r"scores\['fc/kernel'\] has 2 entries that are NaN or inf", {"scores": not_finite(bad)})
        for bad in (jnp.nan, jnp.inf, -jnp.inf)
    ),
    (
        TypeError,
        r"params\['kernel'\] is int32\[2, 2\]; only floating-point",
        {"params": {"kernel": jnp.ones((2, 2), jnp.int32)}},
    ),
    *(
        (TypeError, rf"scores\['fc/kernel'\] is {d}\[4, 3\]; scores are floating", {"scores": cast(d)})
        for d in ("bool", "complex64")
    ),
    (
        TypeError,
        "integers for a and floating-point",
        {"params": TWO, "scores": TWO | {"a": jnp.ones((4, 2), jnp.int32)}, "where": everything},
    ),
    (ValueError, "params is an empty tree", {"params": {"fc": {}}}),
    (
        TypeError,
        r"params\['fc/act'\] is a function, not an array",
        {"params": {"fc": {"act": lambda x: x}}},
    ),
    (
        TypeError,
        "got the string 'magnitude': pass jaxprune.scores.magnitude itself",
        {"scores": "magnitude"},
    ),
    (TypeError, "scores.* is a int, not an array", {"scores": 3}),
    (
        ValueError,
        r"where=matching\('\*/kernle'\) matches no leaf.*fc/bias float32\[3\], fc/kernel float32\[4, 3\]",
        {"where": jp.matching("*/kernle")},
    ),
    (
        TypeError,
        r"where must be a function of \(path, leaf\), got '\*/kernel'",
        {"where": "*/kernel"},
    ),
    *(
        (
            ValueError,
            rf"{kind} names 'fc/kernle'.*The paths that take part: fc/kernel\.",
            {kind: {"fc/kernel": 0, "fc/kernle": 0}, **LAYERWISE},
        )
        for kind in ("sparsity", "count", "threshold")
    ),
    *(
        (ValueError, f"{kind} is an empty dict", {kind: {}, **LAYERWISE})
        for kind in ("sparsity", "count", "threshold")
    ),
    *(
        (ValueError, f"a {kind} per path needs scope='layerwise'", {kind: {"fc/kernel": 0}})
        for kind in ("sparsity", "count")
    ),
    (
        ValueError,
        "scope must be one of 'global', 'layerwise', 'isomorphic', 'output', got",
        {"scope": "local"},
    ),
    (ValueError, "of must be 'total' or 'remaining', got 'rest'", {"of": "rest"}),
    (ValueError, "floor must be an integer of 0 or more.*got -1", {"floor": -1}),
    ((TypeError, ValueError), "floor must be an integer of 0 or more.*got 0.5", {"floor": 0.5}),
    *(
        (TypeError, f"scores is a tree.*so {name} would not be used", {"scores": KERNEL, name: value})
        for name, value in (("grads", KERNEL), ("key", jax.random.key(0)), ("hessian", KERNEL))
    ),
    *(
        (
            ValueError,
            rf"{what} must have the tree structure of params. Missing: fc/bias. Not in params: extra",
            {what: {"fc": {"kernel": jnp.ones((4, 3), dtype)}, "extra": jnp.ones(1)}, **options},
        )
        for what, dtype, options in (
            ("scores", float, {}),
            ("masks", bool, {}),
            ("grads", float, {"scores": jp.scores.taylor}),
        )
    ),
    *(
        (
            ValueError,
            rf"{what}\['fc/kernel'\] has shape \(3, 4\), but params\['fc/kernel'\] has shape \(4, 3\)",
            {what: of_fc(jnp.ones((3, 4), dtype), jnp.ones(3, dtype)), **options},
        )
        for what, dtype, options in (
            ("scores", float, {}),
            ("masks", bool, {}),
            ("grads", float, {"scores": jp.scores.gradient_magnitude}),
        )
    ),
]


@pytest.mark.parametrize(
    ("error", "match", "wrong"),
    REFUSED,
    ids=["-".join(wrong) for *_, wrong in REFUSED],
)
def test_wrong_arguments_are_refused(error, match, wrong):
    given = {"params": KERNEL, "scores": jp.scores.magnitude} | wrong
    if not given.keys() & {"sparsity", "count", "threshold"}:
        given["sparsity"] = 0.5
    with pytest.raises(error, match=match):
        jp.prune_once(**given)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_threshold_is_not_rounded_to_half_precision(compiled):
    params = {"w": jnp.array([[1.0, 1.0078125]], jnp.bfloat16)}  # neighbours in bfloat16

    def prune(params):
        return jp.prune_once(params, jp.scores.magnitude, threshold=1.002, where=everything)

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


def test_scores_of_what_takes_no_part_do_not_matter():
    scores = of_fc(KERNEL["fc"]["kernel"], jnp.full(3, jnp.nan))
    assert jp.prune_once(KERNEL, scores, sparsity=0.5)["fc"]["bias"].all()
    # Nor do scores of what is pruned already.
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    masks = {"kernel": jnp.ones((2, 4), bool).at[0, 3].set(False)}
    scores = {"kernel": params["kernel"].at[0, 3].set(jnp.nan)}
    after = jp.prune_once(params, scores, count=2, masks=masks)
    assert after["kernel"].tolist() == [[False, False, True, False], [True] * 4]
    columns = jp.structures.slices(axis=-1)
    after = jp.prune_once(params, scores, count=1, masks=masks, structure=columns)
    assert after["kernel"].any(0).tolist() == [False, True, True, True]
