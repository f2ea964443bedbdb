"""Structures: what a unit is. (That the lowest units go is compared with the oracle in test_prune.)"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp
from jaxprune.structures import blocks, elements, nm, slices

SETTINGS = settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def everything(path, leaf):
    return True


def prune(scores, structure, where=everything, **kwargs):
    """Masks as numpy arrays, of one array of scores or of a tree."""
    scores = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), scores)
    masks = jp.prune_once(scores, scores, structure=structure, where=where, **kwargs)
    return jax.tree.map(np.asarray, masks)


# Slices


def test_slices_rank_across_leaves():
    scores = {"a": [[1, 9, 4], [1, 9, 4]], "b": [[3, 0], [3, 2], [3, 2], [3, 2]]}
    scores = {path: np.array(leaf) for path, leaf in scores.items()}
    masks = prune(scores, slices(-1, norm=1), count=3)  # norms 2, 18, 8 and 12, 6
    assert masks["a"].tolist() == [[False, True, False]] * 2
    assert masks["b"].tolist() == [[True, False]] * 4
    by_mean = prune(scores, slices(-1, norm=jnp.mean), count=2)  # 1, 9, 4 and 3, 1.5
    assert by_mean["a"].tolist() == [[False, True, True]] * 2
    assert by_mean["b"].tolist() == [[True, False]] * 4


def test_slices_layerwise_count_slices():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((4, 10)), "b": rng.random((3, 3, 2, 5))}
    masks = prune(scores, slices(-1), sparsity=0.5, scope="layerwise")
    for path, kept in (("a", 5), ("b", 3)):  # 2.5 rounds to 2 removed
        filters = masks[path].reshape(-1, masks[path].shape[-1])
        assert filters.any(0).sum() == filters.all(0).sum() == kept


@pytest.mark.parametrize("axis", [(-2, -1), (3, 2), [2, 3]])
def test_slices_of_a_convolution_are_whole_kernels(axis):
    scores = np.abs(np.random.default_rng(1).normal(size=(3, 3, 4, 5)))
    mask = prune(scores, slices(axis, norm=2), sparsity=0.3)
    kernels = mask.reshape(9, 20)
    assert (kernels.any(0) == kernels.all(0)).all() and kernels.all(0).sum() == 14
    norms = np.linalg.norm(scores.reshape(9, 20), axis=0)
    assert norms[~kernels.all(0)].max() < norms[kernels.all(0)].min()


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_slices_with_no_axis_are_whole_leaves():
    scores = {"a": np.full((2, 3), 2.0), "b": np.ones((3, 3)), "c": np.ones((1, 3))}
    masks = prune(scores, slices(axis=()), count=1, floor=0)
    assert [bool(masks[path].all()) for path in "abc"] == [True, True, False]  # norms 12, 9 and 3


def test_slices_keep_the_signs_of_a_reduction():
    scores = np.array([[1.0, -9.0, 2.0], [1.0, 8.0, 2.0]])  # sums 2, -1, 4; norms 2, 17, 4
    assert prune(scores, slices(-1, norm=jnp.sum), count=1)[0].tolist() == [True, False, True]
    assert prune(scores, slices(-1, norm=1), count=1)[0].tolist() == [False, True, True]


def test_slices_count_pruned_entries_as_zero():
    scores = np.array([[9.0, 2.0], [9.0, 2.0], [1.0, 2.0]])
    before = jnp.array([[False, True], [False, True], [True, True]])
    mask = prune(scores, slices(-1), count=1, masks=before)
    assert mask.tolist() == [[False, True], [False, True], [False, True]]


def test_an_emptied_slice_is_not_counted_again():
    before = jnp.array([[False, True, True, True]] * 2)
    scores = np.array([[9.0, 1.0, 2.0, 3.0]] * 2)
    columns = slices(-1)
    assert prune(scores, columns, sparsity=0.5, masks=before)[0].tolist() == [False, False, True, True]
    mask = prune(scores, columns, sparsity=0.7, of="remaining", masks=before)
    assert mask[0].tolist() == [False, False, False, True]


# Blocks


def test_blocks_at_ragged_edges():
    scores = np.arange(1.0, 16.0).reshape(3, 5)
    # Block sums: 1+2+6+7=16, 3+4+8+9=24, 5+10=15 / 11+12=23, 13+14=27, 15.
    order = []
    for count in range(1, 6):
        mask = prune(scores, blocks((2, 2)), count=count)
        order.append(mask[::2, ::2].astype(int).ravel().tolist())
        assert (np.repeat(np.repeat(mask[::2, ::2], 2, 0), 2, 1)[:3, :5] == mask).all()
    assert order == [
        [1, 1, 0, 1, 1, 1],  # of 15 and 15 the first
        [1, 1, 0, 1, 1, 0],
        [0, 1, 0, 1, 1, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 0],
    ]


def test_blocks_leave_other_axes_alone():
    scores = np.arange(24.0).reshape(2, 3, 4)
    mask = prune(scores, blocks((3,), axes=(1,)), count=3)
    assert (~mask).sum() == 9 and not mask[0, :, :3].any()


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_a_block_larger_than_the_leaf_is_the_leaf():
    scores = {"a": np.ones((2, 2)), "b": np.full((2, 2), 2.0)}
    masks = prune(scores, blocks((8, 8)), count=1, floor=0)
    assert not masks["a"].any() and masks["b"].all()


# N:M


def groups_of(mask, m, axis):
    return np.moveaxis(mask, axis, -1).reshape(-1, m)


NM = {
    (1, 2, -2): {"a": (4, 3), "z": (2, 2, 2, 3)},
    (2, 4, -1): {"a": (3, 4), "z": (2, 8)},
    (2, 4, -2): {"conv": (1, 2, 8, 2)},
    (1, 4, 0): {"a": (8, 2)},
    (4, 8, -2): {"a": (8, 2)},
}


@pytest.mark.parametrize("n_m_axis", NM, ids=str)
@given(data=st.data())
@SETTINGS
def test_nm_in_every_group(n_m_axis, data):
    n, m, axis = n_m_axis
    values = data.draw(
        st.sampled_from([st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0]), st.floats(-(2**60), 2**60, width=32)])
    )
    scores = {p: data.draw(hnp.arrays(np.float32, s, elements=values)) for p, s in NM[n_m_axis].items()}
    scope = data.draw(st.sampled_from(["global", "layerwise"]))
    # The default floor of 1 does not keep a group dense, and says nothing.
    masks = prune(scores, nm(n, m, axis), sparsity=1 - n / m, scope=scope)
    for path, mask in masks.items():
        kept, values = groups_of(mask, m, axis), groups_of(scores[path], m, axis)
        assert (kept.sum(1) == n).all()
        for group, keep in zip(values, kept, strict=True):
            expected = sorted(np.argsort(group, kind="stable")[m - n :].tolist())
            assert np.flatnonzero(keep).tolist() == expected


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 4)])
def test_nm_at_its_sparsity_is_exact(n, m):
    scores = np.random.default_rng(2).normal(size=(64, 32))
    mask = prune(scores, nm(n, m), sparsity=1 - n / m)
    assert mask.sum() == 64 * 32 * n // m
    assert (groups_of(mask, m, -2).sum(1) == n).all()


def test_nm_at_a_lower_sparsity_converts_some_groups():
    scores = np.abs(np.random.default_rng(3).normal(size=(32, 8)))
    mask = prune(scores, nm(2, 4), sparsity=0.25)
    kept, values = groups_of(mask, 4, -2), groups_of(scores, 4, -2)
    assert sorted(kept.sum(1).tolist()) == [2] * 32 + [4] * 32
    cost = np.sort(values, axis=1)[:, :2].sum(1)  # the groups that cost least go first
    assert cost[kept.sum(1) == 2].max() < cost[kept.sum(1) == 4].min()
    assert mask.sum() == 0.75 * mask.size


def test_nm_a_count_is_of_groups_and_equal_ones_go_in_row_major_order():
    mask = prune(np.arange(16.0).reshape(8, 2), nm(1, 4), count=2)
    assert (~mask).sum() == 6 and not mask[:3].any() and mask[3:].all()
    mask = prune(np.ones((4, 3)), nm(1, 2), count=3)
    assert mask.tolist() == [[False] * 3, [True] * 3, [True] * 3, [True] * 3]


def test_nm_starts_from_masks():
    scores = np.array([[1.0], [4.0], [3.0], [2.0], [1.0], [1.0], [5.0], [6.0]])
    before = jnp.array([[True], [False], [True], [True], [True], [False], [False], [True]])
    mask = prune(scores, nm(2, 4), sparsity=0.5, masks=before)
    # The first group loses its lowest, the second has no more than two already.
    assert mask.ravel().tolist() == [False, False, True, True, True, False, False, True]


def test_nm_ranks_subnormals_and_signed_zeros():
    scores = np.array([[3e-45], [1e-45], [2e-45], [-1e-45], [0.0], [-0.0], [0.0], [-0.0]], np.float32)
    mask = prune(scores, nm(2, 4), sparsity=0.5)
    assert mask.ravel().tolist() == [True, False, True, False, False, False, True, True]


# A structure of one's own


def test_a_unit_may_span_leaves():
    def pool(scores, masks):
        rows, columns = scores["in"], scores["out"]
        return jp.Units(
            scores={"hidden": rows.sum(0) + columns.sum(1)},
            alive={"hidden": masks["in"].any(0) | masks["out"].any(1)},
            expand=lambda keep: {
                "in": jnp.broadcast_to(keep["hidden"], rows.shape),
                "out": jnp.broadcast_to(keep["hidden"][:, None], columns.shape),
            },
        )

    scores = {"in": np.array([[1.0, 5.0, 2.0]] * 2), "out": np.array([[9.0] * 4, [0.0] * 4, [1.0] * 4])}
    for target in ({"count": 1}, {"sparsity": {"hidden": 0.3}, "scope": "layerwise"}, {"threshold": 9.0}):
        masks = prune(scores, jp.Structure(pool, name="hidden units"), **target)
        assert masks["in"].tolist() == [[True, True, False]] * 2
        assert masks["out"].tolist() == [[True] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_structure_of_single_entries_removes_the_same_however_scores_are_read(dtype, elementwise):
    own = jp.Structure(lambda scores, masks: jp.Units(scores, masks, dict), elementwise=elementwise)
    scores = {name: jnp.arange(12).reshape(3, 4) * 7 % 5 + start for start, name in enumerate("ab")}
    scores = {name: leaf.astype(dtype) for name, leaf in scores.items()}
    params = {name: jnp.ones((3, 4)) for name in scores}

    def masks(scores, structure):
        return jp.prune_once(params, scores, 0.4, structure=structure, where=everything)

    expected = masks(scores, elements())
    for found in (masks(scores, own), jax.jit(lambda scores: masks(scores, own))(scores)):
        assert jax.tree.map(np.array_equal, found, expected) == {"a": True, "b": True}


# Bad input


SIDES = "shape must be an integer of 1 or more"
NUMBERS = "nm needs integers 0 < n < m|[nm] must be an integer of 1 or more .of every m entries n stay., got"
BAD = [
    (lambda: slices(-1, norm=math.nan), "norm must be a number or a reduction"),
    (lambda: blocks(()), "shape=, a tuple of the sides of a block, got"),
    *((partial(blocks, sides), SIDES) for sides in [(0, 2), (2, -1), (2.0, 2)]),
    (lambda: blocks((2, 2), axes=(0,)), r"one axis per side, got shape=\(2, 2\) and axes=\(0,\)"),
    *((partial(nm, *n_m), NUMBERS) for n_m in [(0, 4), (4, 4), (5, 4), (-1, 4), (1.5, 4), (2, "4")]),
]


@pytest.mark.parametrize(("make", "match"), BAD)
def test_bad_arguments(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


NO_AXIS = r"on params\['fc'\] of shape \(4, 2\): it has no axis"
MISFITS = [
    *((slices(a), {"fc": (4, 2)}, rf"slices\(axis={a}\) {NO_AXIS}") for a in (2, -3)),
    (slices((0, 2)), {"fc": (4, 2)}, rf"slices\(axis=\(0, 2\)\) {NO_AXIS}"),
    (slices((0, -2)), {"fc": (4, 2)}, r"params\['fc'\]: axes \(0, -2\) name one axis twice"),
    (blocks((2, 2)), {"b": (4,)}, r"blocks\(\(2, 2\)\) on params\['b'\] of shape \(4,\)"),
    (nm(2, 4), {"b": (4,)}, r"nm\(2, 4, axis=-2\) on params\['b'\] of shape \(4,\): it has no axis"),
    (
        nm(2, 4),
        {"a": (4, 2), "b/kernel": (6, 4)},
        r"nm\(2, 4, axis=-2\) on params\['b/kernel'\] of shape \(6, 4\): its axis -2 has size 6, which 4",
    ),
]


@pytest.mark.parametrize(("structure", "shapes", "match"), MISFITS)
def test_leaves_that_a_structure_does_not_fit(structure, shapes, match):
    with pytest.raises(ValueError, match=match):
        prune({path: np.ones(shape) for path, shape in shapes.items()}, structure, sparsity=0.5)


@pytest.mark.parametrize("sparsity", [0.5000001, 0.9])
def test_nm_removes_at_most_its_sparsity(sparsity):
    match = r"nm\(2, 4, axis=-2\) removes at most 0\.5 of the entries, got sparsity="
    with pytest.raises(ValueError, match=match):
        prune(np.ones((4, 2)), nm(2, 4), sparsity=sparsity)
