"""`calibrate` against hooks written by hand, in numpy and float64."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.calibration.batches import batches_of
from jaxprune.calibration.statistics import _Pass
from tests.calibration import sharding
from tests.calibration.networks import NETWORKS, Leaf, draw, inputs
from tests.support.devices import on_eight_devices


class Hooks:
    """What a network read: by leaf and layer the rows, and how much each counts."""

    def __init__(self):
        self.rows, self.weights = {}, {}
        self.now = None  # the weights of the batch

    def __call__(self, path, rows, *layer, when=()):
        if layer == (None,):
            return  # read beside others that read the same
        x = np.asarray(rows(), np.float64)
        lead = x.shape[:-1]
        weight = np.ones(lead) if self.now is None else np.asarray(self.now, np.float64)[when]
        weight = np.broadcast_to(weight.reshape(weight.shape + (1,) * (len(lead) - weight.ndim)), lead)
        self.rows.setdefault(path, {}).setdefault(layer, []).append(x.reshape(-1, x.shape[-1]))
        self.weights.setdefault(path, {}).setdefault(layer, []).append(weight.ravel())

    def expected(self, path):
        """Return how many rows there are for each column of all layers, their sums, and the Gram matrix."""
        counts, sums, blocks = [], [], []
        for layer in sorted(self.rows[path]):
            x, w = np.concatenate(self.rows[path][layer]), np.concatenate(self.weights[path][layer])
            counts.append(np.full(x.shape[1], w.sum()))
            sums.append(w @ x)
            blocks.append((x * w[:, None]).T @ x)
        gram = np.zeros((sum(map(len, blocks)),) * 2)
        place = 0
        for block in blocks:
            gram[place : place + len(block), place : place + len(block)] = block
            place += len(block)
        return np.concatenate(counts), np.concatenate(sums), gram

    def block_rows(self, path):
        """Return the rows of all layers as one matrix, 0 in the columns of other layers."""
        blocks = [np.concatenate(rows) for _, rows in sorted(self.rows[path].items())]
        made = np.zeros((sum(map(len, blocks)), sum(b.shape[1] for b in blocks)))
        row = column = 0
        for block in blocks:
            made[row : row + len(block), column : column + block.shape[1]] = block
            row, column = row + len(block), column + block.shape[1]
        return made


def watched(net, weights=None):
    """Return what the hooks of a network saw, which computes the same with hooks and without."""
    hooks = Hooks()
    for number, batch in enumerate(net.batches):
        hooks.now = None if weights is None else weights[number]
        batch = batch if isinstance(batch, tuple) else (batch,)
        got, wanted = net.hooked(net.params, *batch, see=hooks), net.apply(net.params, *batch)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    return hooks


def close(got, wanted, within=1e-6):
    scale = np.max(np.abs(wanted), initial=1e-30)
    np.testing.assert_allclose(np.asarray(got, np.float64) / scale, wanted / scale, rtol=0, atol=within)


def check(stats, path, leaf: Leaf, hooks):
    counts, sums, gram = hooks.expected(path)
    read = leaf.reads >= 0
    of_entry = {"squares": np.diagonal(gram), "rows": counts}
    if stats.statistics == "gram":
        of_entry = {"mean": sums / counts}
        of_entry["variance"] = np.diagonal(gram) / counts - of_entry["mean"] ** 2
    for what, by_column in of_entry.items():
        wanted = np.where(read, by_column[leaf.reads], 0)
        got = np.broadcast_to(stats.per_entry(path, what), leaf.reads.shape)
        close(got, wanted, 1e-5 if what == "variance" else 1e-6)
    assert stats.contracted_axes(path) == leaf.contracted
    assert stats.group_axis(path) == (leaf.contracted[-1] if leaf.group is None else leaf.group)
    assert stats.stacks.get(path, ()) == leaf.stack
    if stats.statistics == "norms":
        return
    # What matrix the library makes of the leaf is told by making it of the numbers of the columns.
    seen = np.zeros(leaf.reads.shape)
    for layer in stats.layers(path):
        view = layer.part.matrix
        of_layer = view.layer(jnp.asarray(leaf.reads + 1, jnp.float32), layer.index)
        scale = np.asarray(view.array(jnp.ones_like(of_layer)))
        numbers = np.asarray(view.array(of_layer)) / np.where(scale == 0, 1, scale) - 1
        columns = np.rint(np.where(scale == 0, -1, numbers)).astype(int).max(1)  # (batch, inputs)
        assert np.all((scale == 0) | (np.rint(numbers) == columns[:, None]))
        for found, mine in zip(np.asarray(layer.gram), columns, strict=True):
            close(found, gram[np.ix_(mine, mine)])
        close(layer.squares, np.diagonal(gram)[columns])
        read_here = view.spread(of_layer.shape, 1.0)[1]
        seen += np.asarray(view.with_layer(jnp.zeros(seen.shape), layer.index, read_here.astype(jnp.float32)))
    np.testing.assert_array_equal(seen, read)


def calibrated(apply, net, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype")
        with jax.numpy_dtype_promotion("strict"):
            return jp.calibrate(apply, net.params, net.batches, where=lambda path, leaf: True, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_hooks(name):
    net = NETWORKS[name]()
    hooks = watched(net)
    for statistics, apply in (("norms", net.apply), ("gram", jax.jit(net.apply))):
        stats = calibrated(apply, net, statistics=statistics)
        assert set(stats.paths) == {path for path, leaf in net.leaves.items() if not leaf.refused}
        for path, leaf in net.leaves.items():
            if leaf.refused:
                assert leaf.refused in stats.reasons[path]
            else:
                check(stats, path, leaf, hooks)


WEIGHTED = [
    "dense",
    "heads",
    "fused_outputs",
    "shared_leaves",
    "convolution_first",
    "convolution_grouped",
    "experts",
    "experts_apart",
    "ragged",
    "ensemble",
    "scan",
    "nested_scans",
    "stacked_recurrent",
    "rnn_reversed",
    "lstm",
    "branches",
]


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_rows_count_as_they_weigh(name):
    net, rng = NETWORKS[name](), np.random.default_rng(0)
    shapes = [x.shape[: 2 if x.ndim == 3 and "convolution" not in name else 1] for x in net.batches]
    weights = [jnp.asarray(rng.choice([0, 0.5, 1], size=shape), jnp.float32) for shape in shapes]
    hooks = watched(net, weights)
    kind = "gram" if name in ("ragged", "heads", "lstm") else "norms"
    stats = calibrated(net.apply, net, statistics=kind, weights=weights)
    for path, leaf in net.leaves.items():
        check(stats, path, leaf, hooks)


def test_on_eight_devices():
    printed = on_eight_devices("from tests.calibration import sharding; sharding.run()")
    assert printed.splitlines() == [
        f"{kind.name} {name} ok" for kind in sharding.KINDS for name in sharding.NAMES
    ]


def test_a_shared_kernel_has_one_gram_matrix_not_one_for_each_step():
    params = draw(0, w=(12, 12), out=(12, 2))
    (x,) = inputs(3, 12, number=1)

    def apply(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=50)[0] @ p["out"]

    (batch,) = batches_of([x], None, "calibrate")
    made = _Pass(apply, params, batch, None, gram=True)
    text = made.run.lower({"0/w": params["w"], "0/out": params["out"], "1": x}, None).as_text()
    assert "12x12x" in text and "50x1x12x12x" not in text and "50x12x12x" not in text


def everything(path, leaf):
    return True


def two_layers(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


PARAMS, (X,) = draw(1, a=(4, 6), b=(6, 2)), inputs(5, 4, number=1)


def test_by_default_the_last_product_is_left_out():
    stats = jp.calibrate(two_layers, PARAMS, [X])
    assert stats.paths == ("a",) and "last product before the output" in stats.reasons["b"]
    assert stats.where("a", PARAMS["a"]) and not stats.where("b", PARAMS["b"])
    assert jp.calibrate(lambda p, x: x @ p["a"], PARAMS, [X]).paths == ("a",)  # the only product there is
    assert jp.calibrate(two_layers, PARAMS, [X], where=jp.matching("b")).paths == ("b",)


@pytest.mark.parametrize("swap", [False, True])
def test_both_layers_of_a_sum_come_before_the_last(swap):
    params = draw(1, a=(4, 6), b=(4, 6), out=(6, 2))

    def apply(p, x):
        a, b = x @ p["a"], x @ p["b"]
        return ((b + a) if swap else (a + b)) @ p["out"]

    assert jp.calibrate(apply, params, [X]).paths == ("a", "b")


def test_a_batch_is_an_array_a_tuple_of_arguments_or_a_dict():
    def apply(p, x, scale):
        return two_layers(p, x * scale)

    wanted = jp.calibrate(two_layers, PARAMS, [X * 2, X * 2]).per_entry("a", "squares")
    for function, batches in (
        (apply, [(X, jnp.float32(2))] * 2),
        (lambda p, b: two_layers(p, b["x"] * b["scale"]), [{"x": X, "scale": jnp.float32(2)}] * 2),
        (two_layers, iter([X * 2, X * 2])),
        (two_layers, [X[:2] * 2, X[2:] * 2, X * 2]),  # of several shapes
        (two_layers, [np.asarray(X) * 2] * 2),
    ):
        close(jp.calibrate(function, PARAMS, batches).per_entry("a", "squares"), np.asarray(wanted))


def test_one_program_for_each_shape_of_batch():
    traced = []

    def apply(p, x):
        traced.append(x.shape)
        return two_layers(p, x)

    jp.calibrate(apply, PARAMS, [X, X, X[:2], X, X[:2]])
    assert traced == [(5, 4), (2, 4)]


def test_statistics_pass_through_jit():
    stats = jp.calibrate(two_layers, PARAMS, [X], statistics="gram", where=everything)
    direct = {what: stats.per_entry("a", what) for what in ("squares", "mean", "rows", "inverse_diagonal")}
    inside = jax.jit(lambda s: {what: s.per_entry("a", what) for what in direct})(stats)
    for what, wanted in direct.items():
        close(inside[what], np.asarray(wanted, np.float64), 1e-5)
    again = jax.jit(lambda s: s)(stats)
    assert again.paths == stats.paths and str(again) == str(stats)
    h = np.asarray(X, np.float64).T @ np.asarray(X, np.float64)
    damped = h + 0.01 * np.trace(h) / 4 * np.eye(4)
    wanted = np.broadcast_to(np.diagonal(np.linalg.inv(damped))[:, None], (4, 6))
    close(direct["inverse_diagonal"], wanted, 1e-4)
    other: Any = "x"
    with pytest.raises(
        ValueError, match="'squares', 'mean', 'variance', 'rows' or 'inverse_diagonal', got 'x'"
    ):
        stats.per_entry("a", other)


def test_the_table_fits_in_80_columns():
    net = NETWORKS["stacked_recurrent"]()
    stats = jp.calibrate(net.apply, net.params | {"never": jnp.ones((2, 2))}, net.batches, statistics="gram")
    lines = str(stats).splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line.split()[0]: line.split()[1:4] for line in lines[1:5]}
    assert shown == {name: ["4x4", "5", "30"] for name in ("x[0]", "x[1]", "h[0]", "h[1]")}
    assert "never: no product multiplies it by data" in lines
    assert lines[-1].startswith("Gram matrices: ")


def test_the_table_does_not_list_stacked_biases():
    def apply(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w["w"] + w["bias"]), None), x, p["layers"])[0] @ p["out"]

    layers = {"w": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}
    stats = jp.calibrate(apply, {"layers": layers, "out": jnp.ones((4, 2))}, [X])
    assert set(stats.reasons) == {"out"}


def test_params_that_changed_are_refused():
    stats = jp.calibrate(two_layers, PARAMS, [X])
    stats.check_params(PARAMS)
    changed = PARAMS | {"a": PARAMS["a"].at[0, 0].add(1)}
    with pytest.raises(ValueError, match=r"params changed since calibrate: a\..*stats.for_params\(params\)"):
        stats.check_params(changed)
    stats.for_params(changed).check_params(changed)
    with pytest.raises(ValueError, match=r"params\['a'\] is .* but it had the shape \(4, 6\) in calibrate"):
        stats.check_params(PARAMS | {"a": jnp.ones((4, 5))})
    with pytest.raises(ValueError, match=r"params\['b'\] has no statistics: it is the last product"):
        stats.per_entry("b", "squares")


def test_gram_matrices_above_the_limit_are_refused_before_they_are_made():
    with pytest.raises(
        ValueError,
        match=r"Gram matrices would take 208 B \(b 144 B, a 64 B\), more than max_bytes=200, 200 B",
    ):
        jp.calibrate(two_layers, PARAMS, [X], statistics="gram", max_bytes=200, where=everything)
    jp.calibrate(two_layers, PARAMS, [X], statistics="gram", max_bytes=208, where=everything)
    jp.calibrate(two_layers, PARAMS, [X], max_bytes=0)  # norms have none


def test_an_expert_without_tokens_is_named():
    def apply(p, x):
        return lax.ragged_dot(x, p["w"], jnp.asarray([3, 0, 2], jnp.int32))

    with pytest.warns(UserWarning, match=r"\[1\] of params\['w'\] saw no row .*: an expert without tokens"):
        stats = jp.calibrate(apply, {"w": jnp.ones((3, 4, 2))}, [X])
    assert np.asarray(stats.per_entry("w", "squares"))[1].tolist() == [[1, 1]] * 4


calibrate: Any = jp.calibrate  # of which types are checked no further

BAD = [
    (lambda: calibrate(two_layers, PARAMS, []), ValueError, r"calibrate got no batch: pass a list"),
    (lambda: calibrate(two_layers, PARAMS, iter([])), ValueError, r"A generator can be used once"),
    (
        lambda: calibrate(two_layers, PARAMS, X),
        TypeError,
        r"needs a list of batches, got .* For one batch pass \[batch\]",
    ),
    (lambda: calibrate(two_layers, PARAMS, {"x": X}), TypeError, r"needs a list of batches"),
    (
        lambda: calibrate(two_layers, PARAMS, [X, (X, X)]),
        ValueError,
        r"batch 1 has the structure .* and batch 0 had",
    ),
    (lambda: calibrate(two_layers, PARAMS, [X[:0]]), ValueError, r"batch 0 is empty"),
    (lambda: calibrate(two_layers, PARAMS, ["text"]), TypeError, r"batch 0 holds no array"),
    (
        lambda: calibrate(two_layers, PARAMS, [X], where=jp.matching("*/kernel")),
        ValueError,
        r"matches no product of a leaf with data that can be calibrated\. a: where= leaves it out",
    ),
    (lambda: calibrate(two_layers, PARAMS, [X], where="a"), TypeError, r"where must be a function"),
    (
        lambda: calibrate(two_layers, PARAMS, [X, X.at[0, 0].set(jnp.nan)]),
        ValueError,
        r"data that params\['a'\] multiplies \(.*\) is NaN or infinite",
    ),
    (
        lambda: calibrate(two_layers, PARAMS | {"a": PARAMS["a"] * jnp.nan}, [X], where=jp.matching("b")),
        ValueError,
        r"data that params\['b'\] multiplies",
    ),
    (lambda: calibrate(two_layers, PARAMS, [X], statistics="hessian"), ValueError, r"'norms' or 'gram'"),
    (lambda: calibrate(None, PARAMS, [X]), TypeError, r"apply_fn"),
    (lambda: calibrate(two_layers, PARAMS, [X], max_bytes=-1), ValueError, r"max_bytes"),
    (lambda: jax.jit(lambda p: calibrate(two_layers, p, [X]))(PARAMS), TypeError, r"call it outside jit"),
    (
        lambda: calibrate(two_layers, PARAMS, [X], weights=[np.ones(4)]),
        ValueError,
        r"weights of batch 0 have the shape \(4,\), which are not the first axes of any input",
    ),
    (lambda: calibrate(two_layers, PARAMS, [X], weights=[-np.ones(5)]), ValueError, r"0 or more"),
    (lambda: calibrate(two_layers, PARAMS, [X], weights=np.ones(5)), TypeError, r"array for each batch"),
    (lambda: calibrate(two_layers, PARAMS, [X, X], weights=[np.ones(5)]), ValueError, r"one for each"),
    (
        lambda: calibrate(lambda p, x: two_layers(p, jnp.sort(x, 0)), PARAMS, [X], weights=[np.ones(5)]),
        ValueError,
        r"weights of the rows that params\['a'\] multiplies \(.*\) cannot be told",
    ),
    (
        lambda: calibrate(two_layers, PARAMS, [X]).per_entry("a", "inverse_diagonal"),
        ValueError,
        r"are norms, and this needs Gram matrices: .*statistics=\"gram\"",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[2])
def test_bad_input_is_refused(case):
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


def test_weights_by_a_function_of_the_batch():
    weights = np.asarray([1, 0, 1, 1, 0], np.float32)
    given = jp.calibrate(two_layers, PARAMS, [X], weights=[weights], where=everything)
    by_function = jp.calibrate(two_layers, PARAMS, [X], weights=lambda x: weights, where=everything)
    alone = jp.calibrate(two_layers, PARAMS, [X[weights > 0]], where=everything)
    for path in PARAMS:
        for what in ("squares", "mean", "rows", "variance"):
            wanted = np.asarray(alone.per_entry(path, what))
            close(given.per_entry(path, what), wanted, 1e-5)
            close(by_function.per_entry(path, what), wanted, 1e-5)
