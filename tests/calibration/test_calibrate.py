"""`calibrate` against hooks written by hand, in numpy and float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.calibration.networks import NETWORKS, Leaf


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
        """Return, through all layers, how many rows there are for each column, their sums, and Gram matrix."""
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


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("scan_axis_1", "fused_by_split")])
def test_weighted_rows_count_as_they_weigh(name):
    net, rng = NETWORKS[name](), np.random.default_rng(0)
    shapes = [x.shape[: 2 if x.ndim == 3 and "convolution" not in name else 1] for x in net.batches]
    weights = [jnp.asarray(rng.choice([0, 0.5, 1], size=shape), jnp.float32) for shape in shapes]
    hooks = watched(net, weights)
    stats = calibrated(net.apply, net, statistics="gram", weights=weights)
    for path, leaf in net.leaves.items():
        check(stats, path, leaf, hooks)
