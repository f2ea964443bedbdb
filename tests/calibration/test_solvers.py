"""The solvers of one layer, against float64 statements of the papers and brute force."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.calibration.solvers.columns import Consumer, choose_columns
from jaxprune.calibration.solvers.factors import damped_factor, damped_gram, scaled_to_ones
from jaxprune.calibration.solvers.grids import searched_scale
from jaxprune.calibration.solvers.pattern import pattern_mask, shares
from jaxprune.calibration.solvers.refining import refine
from jaxprune.calibration.solvers.swapping import row_on, swap_changes
from tests.oracles import layer_solvers as oracle

Pattern = jp.solvers.Pattern
ELEMENTS, PER_OUTPUT, TWO_OF_FOUR = Pattern(), Pattern(per_output=True), Pattern("nm", n=2, m=4)
SMALL = oracle.layer(0, 600, 96, 80, 24)
WIDE = oracle.layer(1, 900, 320, 48, 64)
LAYERS = {"80x96": SMALL, "48x320": WIDE}


def gram_of(x):
    return x.T @ x


def solved(solver, x, weight, pattern, count):
    """Solve one matrix under `jit`; return numpy arrays."""
    answer = jax.jit(solver, static_argnums=3)(
        jnp.asarray(weight)[None], jnp.asarray(gram_of(x))[None], jnp.array([count]), pattern
    )
    return tuple(np.asarray(array[0]) for array in answer)


def refined(start, mask, gram, target, steps):
    """Refine one matrix; return a numpy array."""
    given = jnp.asarray(start)[None], jnp.asarray(mask)[None]
    return np.asarray(refine(*given, gram, target, steps)[0])


def half(weight, pattern):
    return weight.shape[1] // 2 if pattern.per_output else weight.size // 2


def well_conditioned(seed, inputs, outputs):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * inputs, inputs)) @ (np.eye(inputs) + 0.4 * rng.normal(size=(inputs, inputs)))
    return x.astype(np.float32), rng.normal(size=(outputs, inputs)).astype(np.float32)


# --- what all solvers promise -------------------------------------------------------------------------------

SOLVERS = {
    "sparsegpt": jp.solvers.sparsegpt(),
    "alps": jp.solvers.alps(8),
    "obc": jp.solvers.obc(),
    "mask_only": jp.solvers.mask_only(jp.scores.magnitude),
    "with_swaps": jp.solvers.with_swaps(jp.solvers.sparsegpt(), max_swaps=2),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_counts_are_exact_in_a_batch_and_what_is_removed_is_zero(name):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 40, 12)).astype(np.float32)
    x[0, :, 5] = 0  # a dead input
    x[2] = 0  # a layer that has seen nothing
    weight = jnp.asarray(rng.normal(size=(3, 5, 12)), jnp.float32)
    gram = jnp.asarray(np.einsum("bri,brj->bij", x, x))
    patterns: dict[Pattern, tuple[list[int], Any]] = {
        ELEMENTS: ([0, 23, 60], lambda kept: (~kept).sum((1, 2))),
        PER_OUTPUT: ([0, 7, 12], lambda kept: (~kept).sum(2).T),
        TWO_OF_FOUR: ([0, 3, 3], lambda kept: (~kept).reshape(3, 5, 3, 4).sum(3).max((1, 2)) * 1.5),
    }
    if name in ("sparsegpt", "alps", "mask_only"):
        patterns[Pattern("blocks", block=(2, 5))] = ([0, 4, 9], None)
    for pattern, (counts, removed) in patterns.items():
        answer, mask = jax.jit(SOLVERS[name], static_argnums=3)(weight, gram, jnp.array(counts), pattern)
        kept, answer = np.asarray(mask), np.asarray(answer)
        assert np.isfinite(answer).all()
        assert (answer[~kept] == 0).all() and not np.signbit(answer[~kept]).any()
        assert (answer[0] == np.asarray(weight[0])).all(), "a count of 0 is the identity, to the bit"
        if removed is not None:
            assert (removed(kept) == np.array(counts)).all()
        else:
            tiles = np.pad(~kept, ((0, 0), (0, 1), (0, 3))).reshape(3, 3, 2, 3, 5)
            assert (tiles.any((2, 4)).sum((1, 2)) == counts).all()
            assert ((~kept).sum((1, 2))[2]) == 60
        if pattern == ELEMENTS and name in ("sparsegpt", "alps"):
            eager = SOLVERS[name](weight, gram, jnp.array(counts), pattern)[1]
            assert (np.asarray(eager) == kept).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_layer_that_saw_nothing_is_pruned_by_magnitude(name):
    weight = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    answer, mask = SOLVERS[name](jnp.asarray(weight), jnp.zeros((1, 8, 8)), jnp.array([4]), PER_OUTPUT)
    expected = [~oracle.lowest_first(abs(row), 4) for row in weight[0]]
    if name == "sparsegpt":  # two columns at once, one of which goes
        expected = [
            ~np.concatenate([oracle.lowest_first(abs(row[i : i + 2]), 1) for i in range(0, 8, 2)])
            for row in weight[0]
        ]
    assert (np.asarray(mask[0]) == expected).all()
    assert (np.asarray(answer[0]) == np.where(expected, weight[0], 0)).all()


@pytest.mark.parametrize("solver", [jp.solvers.sparsegpt(), jp.solvers.alps()])
def test_kept_weights_of_dead_inputs_stay_as_they_are(solver):
    x, weight = well_conditioned(0, 16, 6)
    x[:, [3, 9]] = 0
    weight[:, [3, 9]] *= 100  # so that some are kept
    answer, mask = solved(solver, x, weight, ELEMENTS, 48)
    kept = mask[:, [3, 9]]
    assert kept.any() and (answer[:, [3, 9]] == np.where(kept, weight[:, [3, 9]], 0)).all()


def test_ties_go_to_the_lower_index():
    counts = jnp.array([3])
    mask = pattern_mask(jnp.ones((1, 2, 4)), counts, ELEMENTS)
    assert mask[0].tolist() == [[False, False, False, True], [True] * 4]
    assert pattern_mask(jnp.ones((1, 1, 4)), counts, TWO_OF_FOUR)[0].tolist() == [[False, False, True, True]]


def test_shares_do_not_overflow():
    counts, whole = 2**31 - 5, 65_535
    for part in (0, 1, 40_000, 65_534, 65_535):
        assert int(shares(jnp.array([counts]), part, whole)[0]) == counts * part // whole


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"weight": jnp.ones((4, 8))}, ValueError, r"weight\[None\]"),
        ({"gram": jnp.ones((1, 8, 8), jnp.bfloat16)}, TypeError, "float32 matrices"),
        ({"counts": jnp.array([1.0])}, TypeError, "integer counts"),
        ({"pattern": Pattern("nm", n=2, m=3)}, ValueError, "divides the number of inputs"),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_problem_of_wrong_shape_is_refused(name, change, error, says):
    ones = jnp.ones((1, 4, 8))
    good = {"weight": ones, "gram": ones[:, [0] * 8], "counts": jnp.array([1]), "pattern": ELEMENTS}
    with pytest.raises(error, match=says):
        SOLVERS[name](*(good | change).values())


# --- SparseGPT and GPTQ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [ELEMENTS, PER_OUTPUT, TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_sparsegpt_is_the_papers(name, pattern):
    x, weight = LAYERS[name]
    bound = {("80x96", "elements"): 0.0715, ("80x96", "nm"): 0.1015}
    bound |= {("48x320", "elements"): 0.0635, ("48x320", "nm"): 0.0985}
    for block, width in ((128, 128), (None, weight.shape[1] // 4)):
        answer, mask = solved(jp.solvers.sparsegpt(block), x, weight, pattern, half(weight, pattern))
        expected, kept = oracle.sparsegpt(
            weight,
            gram_of(x),
            half(weight, pattern),
            width,
            group=(2, 4) if pattern.kind == "nm" else None,
            per_output=pattern.per_output,
        )
        assert (mask == kept).all()
        np.testing.assert_allclose(answer, expected, atol=1e-5)
        if block == 128:
            assert oracle.output_error(x, weight, answer) <= bound[name, pattern.kind]


def test_sparsegpt_rounds_in_the_same_sweep():
    x, weight = SMALL
    gram = jnp.asarray(gram_of(x))[None]
    root, _ = damped_factor(gram, 0.01)
    scale = searched_scale(jnp.asarray(weight)[None], jnp.diagonal(root[0])[None] ** 2, 4)
    errors = {}
    for count in (0, weight.size // 2):
        answer, mask = solved(jp.solvers.sparsegpt(24, bits=4), x, weight, ELEMENTS, count)
        codes = answer / np.asarray(scale[0])[:, None]
        assert np.abs(codes - np.round(codes)).max() < 1e-5 and np.abs(codes).max() < 7.001
        expected, kept = oracle.sparsegpt(
            weight, gram_of(x), count, 24, scale=np.asarray(scale[0], np.float64), bits=4
        )
        # Where a weight lies half-way between two values to float32's precision, they may part ways.
        assert (mask == kept).mean() > 0.99 and (np.abs(answer - expected) < 1e-5).mean() > 0.98
        errors[count] = oracle.output_error(x, weight, answer)
    plain = np.asarray(jp.quantization.dequantize(jp.quantization.uniform(weight, 4, axis=0)))
    assert errors[0] < 0.5 * oracle.output_error(x, weight, plain)
    later = oracle.sparsegpt(weight, gram_of(x), weight.size // 2, 24)[0]
    rounded = np.asarray(jp.quantization.dequantize(jp.quantization.uniform(np.float32(later), 4, axis=0)))
    assert errors[weight.size // 2] < 0.8 * oracle.output_error(x, weight, rounded)


def test_the_damping_is_raised_where_there_is_no_factor():
    x, _ = well_conditioned(0, 8, 1)
    good, nan = gram_of(x), np.full((8, 8), np.nan, np.float32)
    bad = good - np.float32(0.05 * np.mean(np.diag(good))) * np.eye(8, dtype=np.float32)
    bad -= np.float32(np.linalg.eigvalsh(good)[0]) * np.eye(
        8, dtype=np.float32
    )  # least eigenvalue about -.05
    root, used = damped_factor(jnp.asarray(np.stack([good, bad, nan])), 0.01)
    np.testing.assert_allclose(used, [0.01, 0.1, np.nan], rtol=1e-6)
    for number, matrix in ((0, good), (1, bad)):
        damped = matrix + float(used[number]) * np.mean(np.diag(matrix)) * np.eye(8)
        np.testing.assert_allclose(root[number] @ root[number].T, damped, rtol=1e-4, atol=1e-3)
    assert np.isnan(root[2]).all() and (np.tril(root[0], -1) == 0).all()
    singular = jnp.ones((1, 8, 8))
    assert 0 < float(damped_factor(singular, 0.0)[1][0]) < 1e-4
    answer, _ = jp.solvers.sparsegpt()(jnp.ones((1, 2, 8)), jnp.asarray(nan)[None], jnp.array([3]), ELEMENTS)
    assert np.isnan(answer).any(), "NaN is not solved as if nothing were known of the inputs"


# --- masks alone --------------------------------------------------------------------------------------------


def test_mask_only_takes_any_score():
    def wanda(params, *, stats, **_):
        def score(path, leaf):
            return jnp.abs(leaf) * jnp.sqrt(stats.per_entry(path[0].key, "squares"))

        return jax.tree_util.tree_map_with_path(score, params)

    x, weight = SMALL
    norms = np.linalg.norm(x.astype(np.float64), axis=0)
    for score, values in ((jp.scores.magnitude, abs(weight)), (wanda, abs(weight) * norms)):
        answer, mask = solved(jp.solvers.mask_only(score), x, weight, PER_OUTPUT, 48)
        assert (mask == [~oracle.lowest_first(row, 48) for row in values]).all()
        assert (answer == np.where(mask, weight, 0)).all()
    with pytest.raises(TypeError, match=r"pass jaxprune\.scores\.magnitude itself"):
        jp.solvers.mask_only("magnitude")  # pyright: ignore[reportArgumentType]


# --- least squares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_refine_reaches_least_squares(name):
    x, weight = LAYERS[name]
    gram = jnp.asarray(gram_of(x))[None]
    rng = np.random.default_rng(0)
    mask = rng.random(weight.shape) < 0.5
    mask[3], mask[4] = True, False
    start = np.where(mask, weight, 0)
    target = jnp.asarray(weight)[None] @ gram
    answers = [refined(start, mask, gram, target, n) for n in (0, 2, 20)]
    best = oracle.output_error(x, weight, oracle.least_squares(x, x @ weight.T, mask))
    errors = [oracle.output_error(x, weight, answer) / best for answer in answers]
    assert (answers[0] == start).all() and errors[0] > errors[1] > errors[2] and errors[2] < 1.0001
    for answer in answers:
        assert (answer[~mask] == 0).all() and (answer[3] == weight[3]).all()
    for row in range(len(weight)):
        ends = [oracle.output_error(x, weight[row : row + 1], answer[row : row + 1]) for answer in answers]
        assert max(ends) <= ends[0] * (1 + 1e-5)


def test_refine_towards_the_dense_networks_output():
    x, weight = well_conditioned(1, 24, 5)
    dense_x = x + np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    mask = np.random.default_rng(0).random(weight.shape) < 0.6
    target = jnp.asarray(weight @ (dense_x.T @ x))[None]
    answer = refined(np.where(mask, weight, 0), mask, jnp.asarray(gram_of(x))[None], target, 40)
    expected = oracle.least_squares(x, dense_x @ weight.T, mask)
    np.testing.assert_allclose(answer, expected, atol=1e-4)


def test_refine_keeps_its_head_where_the_gram_matrix_is_singular():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 20)).astype(np.float32)  # fewer rows than inputs
    x[:, 4] = 0
    weight = rng.normal(size=(3, 20)).astype(np.float32)
    mask = rng.random(weight.shape) < 0.7
    mask[:, 4] = True
    start, gram = np.where(mask, weight, 0), jnp.asarray(gram_of(x))[None]
    answer = refined(start, mask, gram, jnp.asarray(weight)[None] @ gram, 50)
    assert np.isfinite(answer).all() and (answer[:, 4] == weight[:, 4]).all()
    assert np.abs(answer).max() < 10
    assert oracle.output_error(x, weight, answer) < 1e-3


# --- ALPS, OBC, swaps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_alps_is_near_to_exact_obc_and_beats_it_in_groups(name):
    x, weight = LAYERS[name]
    bound = {("80x96", "elements"): 0.0080, ("80x96", "nm"): 0.0130}
    bound |= {("48x320", "elements"): 0.0068, ("48x320", "nm"): 0.0111}
    for pattern in (ELEMENTS, TWO_OF_FOUR):
        answer, mask = solved(jp.solvers.alps(), x, weight, pattern, half(weight, pattern))
        assert oracle.output_error(x, weight, answer) <= bound[name, pattern.kind]
        if name == "80x96":
            greedy, _ = solved(jp.solvers.obc(), x, weight, pattern, half(weight, pattern))
            swapped, moved = solved(
                jp.solvers.with_swaps(jp.solvers.alps()), x, weight, pattern, half(weight, pattern)
            )
            errors = [oracle.output_error(x, weight, each) for each in (greedy, answer, swapped)]
            assert errors[1] <= errors[0] * (1.25 if pattern == ELEMENTS else 1)
            assert errors[2] < min(errors[:2])
            assert (moved.sum(1) == mask.sum(1)).all()
            if pattern == TWO_OF_FOUR:
                assert (moved.reshape(80, 24, 4).sum(2) == 2).all()


@pytest.mark.parametrize("seed", range(2))
def test_obc_is_the_greedy_of_brute_force(seed):
    x, weight = well_conditioned(seed, 8, 3)
    for pattern, count, group in ((ELEMENTS, 13, None), (TWO_OF_FOUR, 12, (2, 4))):
        answer, mask = solved(jp.solvers.obc(), x, weight, pattern, count)
        assert (mask == oracle.obc(weight, gram_of(x), count, group=group)).all()
        expected = oracle.least_squares(x, x @ weight.T, mask)
        np.testing.assert_allclose(answer, expected, atol=1e-4)
    _, mask = solved(jp.solvers.obc(), x, weight, PER_OUTPUT, 5)
    assert (mask == np.concatenate([oracle.obc(row[None], gram_of(x), 5) for row in weight])).all()


def test_what_is_too_large_or_in_blocks_is_refused():
    big, gram = jnp.ones((1, 512, 4096)), jnp.ones((1, 4096, 4096))
    for solver in (jp.solvers.obc(), jp.solvers.with_swaps(jp.solvers.alps())):
        with pytest.raises(ValueError, match=r"512 outputs of 4096 inputs take 3\.5e\+13 .* above limit=2"):
            solver(big, gram, jnp.array([1]), ELEMENTS)
        with pytest.raises(ValueError, match="blocks"):
            solver(jnp.ones((1, 2, 2)), jnp.ones((1, 2, 2)), jnp.array([1]), Pattern("blocks", block=(1, 2)))


def test_the_change_of_a_swap_is_exact():
    x, weight = well_conditioned(0, 10, 1)
    unit_gram, sizes = scaled_to_ones(jnp.asarray(gram_of(x))[None])
    gram, dense = np.asarray(damped_gram(unit_gram, 0.0)[0], np.float64), weight[0] * np.asarray(sizes[0])
    kept = np.random.default_rng(1).random(10) < 0.6
    row = row_on(jnp.float32(gram), jnp.asarray(kept), jnp.float32(gram @ dense))
    changes, costs = swap_changes(row, jnp.float32(gram))
    now = oracle.error_on(gram, dense, kept)
    for i in np.flatnonzero(kept):
        without = kept.copy()
        without[i] = False
        np.testing.assert_allclose(costs[i], oracle.error_on(gram, dense, without) - now, rtol=1e-3)
        for j in np.flatnonzero(~kept):
            swapped = without.copy()
            swapped[j] = True
            expected = oracle.error_on(gram, dense, swapped) - now
            np.testing.assert_allclose(changes[i, j], expected, rtol=1e-3, atol=1e-4)


def test_no_swap_helps_where_swaps_end():
    x, weight = well_conditioned(4, 12, 4)
    gram = gram_of(x).astype(np.float64)
    _, mask = solved(
        jp.solvers.with_swaps(jp.solvers.mask_only(jp.scores.magnitude)), x, weight, PER_OUTPUT, 6
    )
    for row, kept in enumerate(mask):
        now = oracle.error_on(gram, weight[row].astype(np.float64), kept)
        for i in np.flatnonzero(kept):
            for j in np.flatnonzero(~kept):
                swapped = kept.copy()
                swapped[[i, j]] = False, True
                assert oracle.error_on(gram, weight[row].astype(np.float64), swapped) > now * (1 - 1e-3)


# --- channels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_columns_are_chosen_as_by_brute_force(size):
    rng = np.random.default_rng(size)
    first, second = well_conditioned(0, 6 * size, 4), well_conditioned(1, 6 * size + 2, 3)
    of_channels = np.repeat(np.arange(6), size)
    groups = [of_channels, rng.permutation(np.append(of_channels, [-1, 0]))]
    layers = [
        (w, gram_of(x).astype(np.float64), g) for (x, w), g in zip((first, second), groups, strict=True)
    ]
    consumers = [Consumer(jnp.asarray(w), jnp.float32(h), g) for w, h, g in layers]
    for count in (1, 4):
        kept = choose_columns(consumers, 6, count, damping=0.0)
        assert (np.asarray(kept) == oracle.channels(layers, 6, count)).all()
    with pytest.raises(ValueError, match="a number below 5"):
        choose_columns(consumers, 5, 1)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (jp.structures.elements(), Pattern()),
        (jp.structures.nm(2, 4), Pattern("nm", n=2, m=4)),
        (jp.structures.blocks((2, 4)), Pattern("blocks", block=(2, 4))),
    ],
)
def test_a_structure_stands_for_its_pattern(structure, pattern):
    weight, gram = jnp.arange(32.0).reshape(1, 4, 8) - 9, jnp.eye(8)[None]
    solver, counts = jp.solvers.mask_only(jp.scores.magnitude), jnp.array([2])
    np.testing.assert_array_equal(
        solver(weight, gram, counts, structure)[1], solver(weight, gram, counts, pattern)[1]
    )


def test_other_structures_are_refused():
    arguments = jnp.ones((1, 4, 8)), jnp.eye(8)[None], jnp.array([2])
    with pytest.raises(ValueError, match=r"slices\(axis=-1\) is no pattern"):
        jp.solvers.sparsegpt()(*arguments, jp.structures.slices())
    with pytest.raises(TypeError, match=r"takes a jaxprune\.solvers\.Pattern, or a structure, got 'nm'"):
        jp.solvers.sparsegpt()(*arguments, "nm")


def test_refine_stays_where_it_has_arrived():
    """Steps beyond the solution do not leave it, once residuals are the smallest numbers there are."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 96)) @ (np.eye(96) + 0.3 * rng.normal(size=(96, 96)))
    x = (x * np.exp(0.3 * rng.normal(size=96))).astype(np.float32)
    weight = jnp.asarray(rng.normal(size=(1, 16, 96)) / 10, jnp.float32)
    gram, mask = jnp.asarray(x.T @ x)[None], jnp.asarray(np.repeat([True, False, True, False], 24))
    start, target = jnp.where(mask, weight, 0), jnp.matmul(weight, gram, precision="highest")
    arrived, after = (np.asarray(refine(start, mask, gram, target, steps)[0]) for steps in (60, 600))
    np.testing.assert_allclose(after, arrived, rtol=1e-4, atol=1e-5)
