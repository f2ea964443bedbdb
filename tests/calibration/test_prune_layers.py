"""`prune_layers` against networks pruned by hand, layer after layer."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.calibration.solvers.pattern import Pattern


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernel(seed: int, *shape: int) -> jax.Array:
    return normal(seed, *shape) / np.float32(np.sqrt(np.prod(shape[:-1])))


def same(a: Any, b: Any) -> None:
    """Check that two trees hold the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    different = [jax.tree_util.keystr(path) for (path, x), y in pairs if not np.array_equal(x, y)]
    assert not different


def jacobi(weight: Any, gram: Any, counts: Any, pattern: Pattern) -> tuple[Any, Any]:
    """A solver that compiles quickly: the least `w^2 H_jj` go, and one step of Jacobi makes up for them."""
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)[:, None]
    scores = weight**2 * diagonal
    flat = scores.reshape(*((-1, scores.shape[2]) if pattern.per_output else (len(scores), -1)))
    rank = jnp.argsort(jnp.argsort(flat, axis=1, stable=True), axis=1)
    each = jnp.repeat(counts, weight.shape[1]) if pattern.per_output else counts
    mask = (rank >= each[:, None]).reshape(weight.shape)
    gone = jnp.where(mask, 0, weight)
    made_up = jnp.matmul(gone, gram, precision="highest") / jnp.where(diagonal > 0, diagonal, 1)
    return jnp.where(mask, weight + jnp.float32(0.1) * made_up, 0), mask


magnitude = jp.solvers.mask_only(jp.scores.magnitude)


# Networks, written out; `tap(path, rows)` is called with what each layer is about to multiply


def nothing(path: str, rows: Any) -> None:
    del path, rows


def mlp(params: Any, x: Any, tap: Any = nothing) -> Any:
    for name in ("a", "b", "c"):
        tap(name, x)
        x = jnp.tanh(x @ params[name] + params[f"{name}_bias"])
    tap("head", x)
    return x @ params["head"]


def mlp_params() -> Any:
    sizes = {"a": (12, 16), "b": (16, 16), "c": (16, 12)}
    params = {name: kernel(n, *size) for n, (name, size) in enumerate(sizes.items())}
    biases = {f"{name}_bias": normal(9, size[1]) / 4 for name, size in sizes.items()}
    return params | biases | {"head": kernel(8, 12, 3)}


def conv(params: Any, x: Any, tap: Any = nothing) -> Any:
    for name, stride in (("first", 1), ("second", 2)):
        tap(name, _patches(x, stride))
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, params[name], (stride, stride), "VALID", dimension_numbers=numbers)
        x = jax.nn.relu(x)
    tap("dense", x.reshape(len(x), -1))
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["dense"])
    tap("head", x)
    return x @ params["head"]


def _patches(x: Any, stride: int) -> Any:
    """Windows of 3 x 3, as rows of (window, channels)."""
    size = (x.shape[1] - 3) // stride + 1
    cuts = [
        x[:, i : i + stride * size : stride, j : j + stride * size : stride][:, :size, :size]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.stack(cuts, 3).reshape(-1, 9 * x.shape[3])


def conv_params() -> Any:
    return {
        "first": kernel(0, 3, 3, 2, 6),
        "second": kernel(1, 3, 3, 6, 8),
        "dense": kernel(2, 32, 10),
        "head": kernel(3, 10, 2),
    }


def normed(x: Any, scale: Any) -> Any:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.float32(1e-5)) * scale


def block(params: Any, x: Any, tap: Any = nothing, style: str = "pre", heads: int = 2) -> Any:
    before, length, width = x.shape
    y = x if style == "post" else normed(x, params["norm1"])
    split = (before, length, heads, width // heads)
    for name in "qkv":
        tap(name, y)
    q, k, v = (jnp.reshape(y @ params[name], split) for name in "qkv")
    scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / np.float32(np.sqrt(width / heads))
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    y = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores), v).reshape(x.shape)
    tap("out", y)
    y = y @ params["out"] + params["out_bias"]
    x = x + (y * params["gamma1"] if style == "gamma" else y)
    x = normed(x, params["norm1"]) if style == "post" else x
    y = x if style == "post" else normed(x, params["norm2"])
    tap("up", y)
    y = jax.nn.gelu(y @ params["up"] + params["up_bias"])
    tap("down", y)
    y = y @ params["down"] + params["down_bias"]
    x = x + (y * params["gamma2"] if style == "gamma" else y)
    return normed(x, params["norm2"]) if style == "post" else x


def block_params(seed: int, width: int = 16) -> Any:
    shapes = dict.fromkeys(("q", "k", "v", "out"), (width, width))
    shapes |= {"up": (width, 2 * width), "down": (2 * width, width)}
    params = {name: kernel(seed + n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    vectors = {name: normal(seed + 50, width) / 9 for name in ("out_bias", "down_bias")}
    scales = {name: 1 + normal(seed + 60, width) / 4 for name in ("norm1", "norm2", "gamma1", "gamma2")}
    return params | vectors | scales | {"up_bias": normal(seed + 70, 2 * width) / 9}


def decoder(params: Any, tokens: Any, tap: Any = nothing, style: str = "pre") -> Any:
    x = params["embed"][tokens]
    for n, layer in enumerate(params["layers"]):
        x = block(layer, x, lambda name, rows, n=n: tap(f"layers/{n}/{name}", rows), style)
    tap("head", x)
    return x @ params["head"]


def decoder_params(depth: int = 2) -> Any:
    layers = [block_params(100 * n) for n in range(depth)]
    return {"embed": normal(7, 20, 16), "layers": layers, "head": kernel(8, 16, 20)}


def scanned(params: Any, tokens: Any, style: str = "pre", remat: bool = False) -> Any:
    def step(x: Any, layer: Any) -> Any:
        return block(layer, x, style=style), None

    x = params["embed"][tokens]
    return lax.scan(jax.checkpoint(step) if remat else step, x, params["layers"])[0] @ params["head"]


def stacked(params: Any) -> Any:
    return {**params, "layers": jax.tree.map(lambda *arrays: jnp.stack(arrays), *params["layers"])}


def tokens(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 20, shape), jnp.int32)


NETWORKS = {
    "mlp": (mlp, mlp_params, [normal(20 + n, 40, 12) @ normal(30, 12, 12) for n in range(2)]),
    "conv": (conv, conv_params, [normal(20 + n, 16, 7, 7, 2) for n in range(2)]),
    "decoder": (decoder, decoder_params, [tokens(n, 3, 16) for n in range(2)]),
}


# The oracle


def leaf(params: Any, path: str) -> Any:
    for key in path.split("/"):
        params = params[int(key) if isinstance(params, list) else key]
    return params


def replaced(params: Any, path: str, new: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda at, x: new if jax.tree_util.keystr(at, simple=True, separator="/") == path else x, params
    )


def rows_of(apply_fn: Any, params: Any, batches: Any) -> dict[str, np.ndarray]:
    """Return what each layer reads on all batches, by path in the order of the layers, as float64 rows."""
    found: dict[str, list[Any]] = {}
    for x in batches:
        apply_fn(params, x, lambda path, rows: found.setdefault(path, []).append(rows))
    return {
        path: np.concatenate([np.asarray(r, np.float64).reshape(-1, r.shape[-1]) for r in rows])
        for path, rows in found.items()
    }


def by_hand(apply_fn: Any, params: Any, batches: Any, solver: Any, dense_target: bool) -> Any:
    """Prune half of each layer but the last, in order, each on a run of the network as pruned so far."""
    masks, errors, now = {}, {}, params
    of_dense = rows_of(apply_fn, params, batches)
    for path in list(of_dense)[:-1]:
        own, dense = rows_of(apply_fn, now, batches)[path], of_dense[path]
        weight = np.asarray(leaf(params, path), np.float64).reshape(own.shape[1], -1).T
        gram, start = own.T @ own, weight
        if dense_target:
            damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
            start = weight + np.linalg.solve(damped, (weight @ (dense.T @ own - gram)).T).T
        matrices = (jnp.asarray(array[None], jnp.float32) for array in (start, gram))
        solved, mask = jax.jit(solver, static_argnums=3)(
            *matrices, jnp.array([weight.size // 2], jnp.int32), Pattern()
        )
        wanted = (dense if dense_target else own) @ weight.T
        changed = own @ np.asarray(solved[0], np.float64).T
        errors[path] = np.linalg.norm(wanted - changed) / np.linalg.norm(wanted)
        shape = leaf(params, path).shape
        masks[path] = np.asarray(mask[0]).T.reshape(shape)
        now = replaced(now, path, solved[0].T.reshape(shape))
    return now, masks, errors


@pytest.mark.parametrize("target", ["own", "dense"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_pruning_by_hand_gives(name, target):
    apply_fn, make, batches = NETWORKS[name]
    params, solver = make(), jp.solvers.sparsegpt() if name == "mlp" else jacobi
    done = jp.prune_layers(apply_fn, params, batches, solver, sparsity=0.5, target=target)
    expected, masks, errors = by_hand(apply_fn, params, batches, solver, target == "dense")
    assert [row.name for row in done.report.rows] == list(masks)
    for path, mask in masks.items():
        np.testing.assert_array_equal(leaf(done.masks, path), mask, err_msg=path)
    for got, want in zip(jax.tree.leaves(done.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for row in done.report.rows:
        np.testing.assert_allclose(row.error, errors[row.name], rtol=1e-3)
        assert row.error < row.masked_error or solver is jacobi
        assert row.sparsity == 0.5


# Scans


CASES = {
    "attention": ("pre", True, {}),
    "layer scale, for the dense output": ("gamma", False, {"target": "dense", "refine": 2}),
    "norms behind the sums": ("post", False, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_scan_is_pruned_like_its_layers_one_by_one_to_the_bit(case):
    style, remat, options = CASES[case]
    params, batches = decoder_params(3), [tokens(n, 3, 11) for n in range(2)]
    unrolled = jp.prune_layers(
        lambda p, x: decoder(p, x, style=style), params, batches, jacobi, sparsity=0.5, **options
    )
    done = jp.prune_layers(
        lambda p, x: scanned(p, x, style, remat), stacked(params), batches, jacobi, sparsity=0.5, **options
    )
    same(done.masks, stacked(unrolled.masks))
    same(done.params, stacked(unrolled.params))
    assert [row.name for row in done.report.rows][:2] == ["layers/q[0]", "layers/k[0]"]
    errors = [[row.error for row in each.report.rows] for each in (done, unrolled)]
    assert errors[0] == errors[1]


def compiled_by(function: Any) -> list[str]:
    """Return the names of the programs that XLA compiles for a call."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        if event.endswith("/backend_compile_duration"):
            names.append(str(about.get("fun_name")).removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return sorted(names)


def residual(params: Any, x: Any) -> Any:
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["up"] + layer["bias"]) @ layer["down"]
    return x @ params["head"]


def residual_scanned(params: Any, x: Any) -> Any:
    def step(x: Any, layer: Any) -> Any:
        return x + jnp.tanh(x @ layer["up"] + layer["bias"]) @ layer["down"], None

    return lax.scan(step, x, params["layers"])[0] @ params["head"]


def residual_params(depth: int) -> Any:
    layers = [
        {"up": kernel(n, 8, 14), "bias": normal(n + 50, 14), "down": kernel(n + 80, 14, 8)}
        for n in range(depth)
    ]
    return {"layers": layers, "head": kernel(9, 8, 4)}


@pytest.mark.parametrize("scan", [False, True])
def test_deeper_networks_compile_no_more_programs(scan):
    def programs(depth: int) -> list[str]:
        params = residual_params(depth)
        params = stacked(params) if scan else params
        apply_fn = residual_scanned if scan else residual
        batches = [normal(n, 16, 8) for n in range(2)]
        return compiled_by(
            lambda: jp.prune_layers(apply_fn, params, batches, jacobi, sparsity=0.5, target="dense", refine=1)
        )

    first, second = programs(2), programs(4)
    assert scan or {"segment", "added", "solve_layer"} <= set(first)
    # Eager operations on stacked leaves are compiled for each depth; segments and solvers never.
    assert not {"segment", "added", "solve_layer"} & set(second)
    assert second == programs(8)
    assert scan or not second


@pytest.mark.parametrize("scan", [False, True])
def test_leaves_of_numpy_stay_on_the_host_and_as_they_were(scan):
    params = stacked(residual_params(3)) if scan else residual_params(3)
    apply_fn = residual_scanned if scan else residual
    options = {"sparsity": 0.5, "target": "dense", "refine": 1}
    batches = [normal(n, 16, 8) for n in range(2)]
    host = jax.tree.map(np.array, params)
    before = jax.tree.map(np.copy, host)
    done = jp.prune_layers(apply_fn, host, batches, jacobi, **options)
    wanted = jp.prune_layers(apply_fn, params, batches, jacobi, **options)
    same(done.params, wanted.params)
    same(done.masks, wanted.masks)
    same(host, before)
    assert {type(leaf) for leaf in jax.tree.leaves((done.params, done.masks))} == {np.ndarray}
    assert done.params["head"] is host["head"]


def test_layers_with_other_sparsities_share_their_programs():
    params, batches = residual_params(3), [normal(0, 16, 8)]
    each = {f"layers/{n}/up": 0.2 * n for n in range(1, 3)}

    def programs(sparsity: Any) -> list[str]:
        return compiled_by(lambda: jp.prune_layers(residual, params, batches, jacobi, sparsity=sparsity))

    programs(0.5)
    assert programs(each) == programs(0.5) == []


# Batches


def test_batches_of_unequal_size_are_like_one_batch():
    params, x = mlp_params(), normal(0, 24, 12)
    apart = jp.prune_layers(mlp, params, [x[:11], x[11:15], x[15:]], jacobi, sparsity=0.5, target="dense")
    whole = jp.prune_layers(mlp, params, [x], jacobi, sparsity=0.5, target="dense")
    same(apart.masks, whole.masks)
    assert [row.rows for row in apart.report.rows] == [24.0] * 3
    for a, b in zip(jax.tree.leaves(apart.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rows_of_weight_0_do_not_count():
    params, (x, *_) = decoder_params(1), NETWORKS["decoder"][2]
    short = jp.prune_layers(decoder, params, [x[:, :10]], jacobi, sparsity=0.5)
    junk = x.at[:, 10:].set(3)
    weights = jnp.broadcast_to(jnp.arange(16) < 10, x.shape)
    done = jp.prune_layers(decoder, params, [junk], jacobi, sparsity=0.5, weights=[weights])
    same(done.masks, short.masks)
    assert {row.rows for row in done.report.rows} == {30.0}
    for a, b in zip(jax.tree.leaves(done.params), jax.tree.leaves(short.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Control flow, and leaves that are read in other ways


@jax.custom_vjp
def square(x: Any) -> Any:
    return x * x


square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))


def test_calls_are_entered():
    def wrapped(params: Any, x: Any) -> Any:
        x = jax.jit(lambda p, x: square(x @ p))(params["a"], x)
        return jax.checkpoint(lambda p, x: jnp.tanh(x @ p["b"]) @ p["c"])(params, x)

    def plain(params: Any, x: Any) -> Any:
        x = x @ params["a"]
        return jnp.tanh(x * x @ params["b"]) @ params["c"]

    params, batches = mlp_params(), [normal(0, 24, 12)]
    done = jp.prune_layers(wrapped, params, batches, jacobi, sparsity=0.5)
    other = jp.prune_layers(plain, params, batches, jacobi, sparsity=0.5)
    same(done.masks, other.masks)
    same(done.params, other.params)
    assert [row.name for row in done.report.rows] == ["a", "b"]


def test_the_branch_that_all_batches_take_is_pruned():
    def branching(params: Any, x: Any) -> Any:
        x = jnp.tanh(x @ params["a"])
        first, second = (lambda x: x @ params["b"]), (lambda x: x @ params["b"] * 2 @ params["other"])
        x = lax.cond(jnp.max(x) > 2, second, first, x)
        return jnp.tanh(x) @ params["c"] @ params["head"]

    params = mlp_params() | {"other": kernel(5, 16, 16)}
    done = jp.prune_layers(branching, params, [normal(n, 24, 12) for n in range(2)], jacobi, sparsity=0.5)
    assert [row.name for row in done.report.rows] == ["a", "b", "c"]
    assert "no batch reaches" in done.report.reasons["other"]


def test_a_branch_that_some_batches_take_is_left_dense():
    def branching(params: Any, x: Any) -> Any:
        first, second = (lambda x: x @ params["a"]), (lambda x: x @ params["a"] + 1)
        x = lax.cond(x[0, 0] > 0, first, second, x)
        return jnp.tanh(x) @ params["b"] @ params["head16"]

    params = mlp_params() | {"head16": kernel(5, 16, 2)}
    batches = [jnp.abs(normal(0, 24, 12)), -jnp.abs(normal(1, 24, 12))]
    done = jp.prune_layers(branching, params, batches, jacobi, sparsity=0.5)
    assert "different branches of a cond" in done.report.reasons["a"]
    same(done.params["a"], params["a"])
    assert [row.name for row in done.report.rows] == ["b"]


def test_kernels_in_a_while_are_refused():
    def looping(params: Any, x: Any) -> Any:
        x = lax.fori_loop(0, x.shape[0] - jnp.sum(x > 99), lambda n, x: jnp.tanh(x @ params["sq"]), x)
        return x @ params["a"] @ params["head16"]

    params = {"sq": kernel(0, 12, 12), "a": kernel(1, 12, 16), "head16": kernel(5, 16, 2)}
    done = jp.prune_layers(looping, params, [normal(0, 8, 12)], jacobi, sparsity=0.5)
    assert "while" in done.report.reasons["sq"]
    assert [row.name for row in done.report.rows] == ["a"]


def test_an_expert_without_tokens_is_pruned_by_magnitude():
    def experts(params: Any, x: Any) -> Any:
        sizes = jnp.array([10, 0, x.shape[0] - 10], jnp.int32)
        return jnp.tanh(lax.ragged_dot(x, params["experts"], sizes)) @ params["head"]

    params, x = {"experts": kernel(0, 3, 12, 8), "head": kernel(1, 8, 3)}, normal(0, 30, 12)
    done = jp.prune_layers(experts, params, [x], jacobi, sparsity=0.5)
    (row,) = done.report.rows
    assert "matrix 1 saw no row" in row.note
    assert row.batch == 3
    alone = {"m": params["experts"][1]}
    by_magnitude = jp.prune_once(alone, jp.scores.magnitude, sparsity=0.5)
    same(done.params["experts"][1], jnp.where(by_magnitude["m"], alone["m"], 0))
    for expert, rows in ((0, x[:10]), (2, x[10:])):
        weight = params["experts"][expert].T[None]
        solved, _ = jacobi(weight, (rows.T @ rows)[None], jnp.array([48]), Pattern())
        np.testing.assert_allclose(done.params["experts"][expert], solved[0].T, rtol=1e-4, atol=1e-5)


def recurrent(params: Any, x: Any) -> Any:
    """A gated recurrent network, (batch, length, width)."""

    def step(h: Any, x: Any) -> Any:
        gates = jax.nn.sigmoid(x @ params["x_gates"] + h @ params["h_gates"])
        r, z = jnp.split(gates, 2, axis=1)
        new = jnp.tanh(x @ params["x_new"] + (r * h) @ params["h_new"])
        h = z * h + (1 - z) * new
        return h, h

    start = jnp.zeros((x.shape[0], params["h_new"].shape[0]))
    return lax.scan(step, start, x.swapaxes(0, 1))[1] @ params["head"]


def test_a_recurrent_kernel_is_solved_once_on_all_its_steps():
    params = {
        "x_gates": kernel(0, 5, 16),
        "h_gates": kernel(1, 8, 16),
        "x_new": kernel(2, 5, 8),
        "h_new": kernel(3, 8, 8),
        "head": kernel(4, 8, 3),
    }
    x = normal(0, 6, 9, 5)
    done = jp.prune_layers(recurrent, params, [x], jacobi, sparsity=0.5)
    assert sorted(row.name for row in done.report.rows) == ["h_gates", "h_new", "x_gates", "x_new"]
    assert {row.rows for row in done.report.rows} == {54.0}
    rows = x.reshape(-1, 5)
    solved, mask = jacobi(params["x_gates"].T[None], (rows.T @ rows)[None], jnp.array([40]), Pattern())
    same(done.masks["x_gates"], mask[0].T)
    np.testing.assert_allclose(done.params["x_gates"], solved[0].T, rtol=1e-5, atol=1e-6)
    dense = jp.prune_layers(recurrent, params, [x], jacobi, sparsity=0.5, target="dense")
    assert all("its own output" in row.note for row in dense.report.rows)


def test_a_tied_leaf_is_solved_before_it_is_looked_up():
    def tied(params: Any, x: Any) -> Any:
        return jnp.tanh(params["embed"][x] @ params["a"]) @ params["embed"].T

    params, x = {"embed": normal(0, 20, 16), "a": kernel(1, 16, 16)}, tokens(0, 4, 12)
    assert [r.name for r in jp.prune_layers(tied, params, [x], jacobi, sparsity=0.5).report.rows] == ["a"]
    done = jp.prune_layers(tied, params, [x], jacobi, sparsity=0.5, where=lambda path, leaf: True)
    assert [row.name for row in done.report.rows] == ["embed", "a"]
    rows = jnp.tanh(params["embed"][x] @ params["a"]).reshape(-1, 16)
    embed, _ = jacobi(params["embed"][None], (rows.T @ rows)[None], jnp.array([160]), Pattern())
    np.testing.assert_allclose(done.params["embed"], embed[0], rtol=1e-5, atol=1e-6)
    rows = done.params["embed"][x].reshape(-1, 16)
    a, mask = jacobi(params["a"].T[None], (rows.T @ rows)[None], jnp.array([128]), Pattern())
    same(done.masks["a"], mask[0].T)
    np.testing.assert_allclose(done.params["a"], a[0].T, rtol=1e-5, atol=1e-6)


def test_matrices_that_lie_in_one_leaf_are_layers_of_their_own():
    def fused(params: Any, x: Any) -> Any:
        q, k, v = (jnp.tanh(x @ params["qkv"][:, 8 * n : 8 * n + 8]) for n in range(3))
        return (q * k + v) @ params["head"]

    params, x = {"qkv": kernel(0, 12, 24), "head": kernel(1, 8, 3)}, normal(0, 30, 12)
    done = jp.prune_layers(fused, params, [x], jacobi, sparsity=0.25)
    assert [(row.name, row.part, row.outputs) for row in done.report.rows] == [
        ("qkv", n, 8) for n in range(3)
    ]
    assert "qkv#3" in str(done.report)
    for n in range(3):
        part = params["qkv"][:, 8 * n : 8 * n + 8]
        solved, mask = jacobi(part.T[None], (x.T @ x)[None], jnp.array([24]), Pattern())
        same(done.masks["qkv"][:, 8 * n : 8 * n + 8], mask[0].T)
        np.testing.assert_allclose(
            done.params["qkv"][:, 8 * n : 8 * n + 8], solved[0].T, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_leaves_are_rounded_once_and_errors_are_those_after_rounding(dtype):
    def one(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["a"]) @ params["head"]

    params = {"a": kernel(0, 12, 16).astype(dtype), "head": kernel(1, 16, 3).astype(dtype)}
    x = normal(0, 40, 12).astype(dtype)
    done = jp.prune_layers(one, params, [x], jacobi, sparsity=0.5)
    rows, weight = x.astype(jnp.float32), params["a"].astype(jnp.float32)
    solved, mask = jacobi(weight.T[None], (rows.T @ rows)[None], jnp.array([96]), Pattern())
    assert done.params["a"].dtype == dtype
    same(done.masks["a"], mask[0].T)
    np.testing.assert_allclose(
        done.params["a"].astype(jnp.float32), solved[0].T.astype(dtype).astype(jnp.float32), rtol=8e-3
    )
    wide, before, after = (np.asarray(a, np.float64) for a in (rows, weight, done.params["a"]))
    error = np.linalg.norm(wide @ (before - after)) / np.linalg.norm(wide @ before)
    np.testing.assert_allclose(done.report.rows[0].error, error, rtol=1e-4)


# How much


def test_sparsity_0_is_the_identity():
    params, batches = mlp_params(), NETWORKS["mlp"][2]
    done = jp.prune_layers(mlp, params, batches, jp.solvers.sparsegpt(), sparsity=0, refine=3)
    same(done.params, params)
    assert all(bool(jnp.all(mask)) for mask in jax.tree.leaves(done.masks))
    assert [row.error for row in done.report.rows] == [0.0] * 3


def test_sparsities_per_path_and_per_layer():
    params = stacked(residual_params(3))
    each = {"layers/up": 0.25, "layers/up[1]": 0.75}
    done = jp.prune_layers(residual_scanned, params, [normal(0, 32, 8)], jacobi, sparsity=each)
    kept = np.sum(np.asarray(done.masks["layers"]["up"]), axis=(1, 2)).tolist()
    assert kept == [84, 28, 84]
    same(done.params["layers"]["down"], params["layers"]["down"])
    assert {row.name: row.sparsity for row in done.report.rows if "up" in row.name} == {
        "layers/up[0]": 0.25,
        "layers/up[1]": 0.75,
        "layers/up[2]": 0.25,
    }


def test_each_output_gives_the_same_number():
    params = mlp_params()
    for solver in (jp.solvers.sparsegpt(), jacobi):
        done = jp.prune_layers(mlp, params, [normal(0, 40, 12)], solver, sparsity=0.4, scope="output")
        for name, kept in (("a", 12 - 5), ("b", 16 - 6), ("c", 16 - 6)):
            assert set(np.sum(np.asarray(done.masks[name]), axis=0).tolist()) == {kept}


def test_equal_scores_go_by_index():
    params = {"a": jnp.ones((4, 4)), "head": kernel(1, 4, 2)}
    x = jnp.eye(4)
    done = jp.prune_layers(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["head"], params, [x], magnitude, sparsity=0.375
    )
    np.testing.assert_array_equal(done.masks["a"].T.ravel(), np.arange(16) >= 6)


@pytest.mark.parametrize("layout", ["in, out", "out, in"])
def test_n_of_m_runs_along_the_inputs_in_any_layout(layout):
    def one(params: Any, x: Any) -> Any:
        matrix = params["a"] if layout == "in, out" else params["a"].T
        return jnp.tanh(x @ matrix) @ params["head"]

    weight = kernel(0, 12, 16)
    params = {"a": weight if layout == "in, out" else weight.T, "head": kernel(1, 16, 2)}
    structure = jp.structures.nm(2, 4)
    done = jp.prune_layers(one, params, [normal(0, 40, 12)], magnitude, structure=structure)
    mask = np.asarray(done.masks["a"] if layout == "in, out" else done.masks["a"].T)
    groups = np.abs(np.asarray(weight)).reshape(3, 4, 16)
    expected = np.argsort(np.argsort(groups, axis=1), axis=1) >= 2
    np.testing.assert_array_equal(mask, expected.reshape(12, 16))


def test_blocks_go_as_a_whole():
    params = {"a": kernel(0, 12, 16), "head": kernel(1, 16, 2)}
    structure = jp.structures.blocks((3, 4))
    done = jp.prune_layers(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["head"],
        params,
        [normal(0, 40, 12)],
        jp.solvers.sparsegpt(),
        sparsity=0.5,
        structure=structure,
    )
    blocks = np.asarray(done.masks["a"]).reshape(4, 3, 4, 4)
    assert np.array_equal(blocks.all((1, 3)), blocks.any((1, 3)))
    assert blocks.all((1, 3)).sum() == 8


# Checkpoints


RUN = """
import os, signal, sys
from tests.calibration.test_prune_layers import jacobi, mlp, mlp_params, normal
import jaxprune as jp

def progress(row):
    if row.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)

jp.prune_layers(mlp, mlp_params(), [normal(0, 40, 12)], jacobi, sparsity=0.5, refine=2,
                checkpoint=sys.argv[1], progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill")
def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", RUN, str(folder)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(file.name for file in folder.iterdir()) == [
        "layer-00000.npz",
        "layer-00001.npz",
        "run.json",
    ]
    arguments, options = (mlp, mlp_params(), [normal(0, 40, 12)], jacobi), {"sparsity": 0.5, "refine": 2}
    calls: list[str] = []
    done = jp.prune_layers(
        *arguments, **options, checkpoint=folder, progress=lambda row: calls.append(row.name)
    )
    whole = jp.prune_layers(*arguments, **options)
    same(done.params, whole.params)
    same(done.masks, whole.masks)
    assert calls == ["a", "b", "c"]
    assert [row.error for row in done.report.rows] == [row.error for row in whole.report.rows]
    # A folder of another run, and one with a damaged file.
    with pytest.raises(ValueError, match=r"is of another run: it differs in params, batches\."):
        jp.prune_layers(mlp, conv_like(), [normal(1, 40, 12)], jacobi, **options, checkpoint=folder)
    with pytest.raises(ValueError, match=r"it differs in plan"):
        jp.prune_layers(*arguments, sparsity=0.25, refine=2, checkpoint=folder)
    with pytest.raises(ValueError, match=r"it differs in solver"):
        jp.prune_layers(*arguments[:3], magnitude, **options, checkpoint=folder)
    file = folder / "layer-00001.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"layer-00001.npz cannot be read .*: remove it"):
        jp.prune_layers(*arguments, **options, checkpoint=folder)
    file.unlink()
    same(jp.prune_layers(*arguments, **options, checkpoint=folder).params, whole.params)


def conv_like() -> Any:
    return mlp_params() | {"a": kernel(77, 12, 16)}


def test_a_checkpoint_holds_bfloat16(tmp_path):
    params = {"a": kernel(0, 12, 16).astype(jnp.bfloat16), "head": kernel(1, 16, 3).astype(jnp.bfloat16)}
    arguments = (
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["head"],
        params,
        [normal(0, 9, 12).astype(jnp.bfloat16)],
    )
    first = jp.prune_layers(*arguments, magnitude, sparsity=0.5, checkpoint=tmp_path / "run")
    again = jp.prune_layers(*arguments, magnitude, sparsity=0.5, checkpoint=tmp_path / "run")
    same(first.params, again.params)
    assert again.params["a"].dtype == jnp.bfloat16
    assert again.report == first.report


def test_a_checkpoint_is_not_written_among_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files, and no run of prune_layers"):
        jp.prune_layers(mlp, mlp_params(), [normal(0, 9, 12)], magnitude, sparsity=0.5, checkpoint=tmp_path)


# Reports


def test_the_report_is_narrow_and_complete():
    params = stacked(residual_params(2))
    done = jp.prune_layers(residual_scanned, params, [normal(0, 32, 8)], jacobi, sparsity=0.5)
    text = str(done.report)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "layers/up[1]" in text
    assert "head: " in text
    told = json.loads(json.dumps(done.report.to_dict()))
    assert [layer["name"] for layer in told["layers"]] == [row.name for row in done.report.rows]
    assert told["reasons"] == done.report.reasons
    table = list(csv.DictReader(io.StringIO(done.report.to_csv())))
    assert [float(row["error"]) for row in table] == [row.error for row in done.report.rows]
    assert all(row.seconds > 0 for row in done.report.rows)


def test_damping_that_was_raised_is_reported():
    params = mlp_params()
    x = jnp.repeat(normal(0, 40, 1), 12, axis=1)
    solver = jp.solvers.sparsegpt(damping=0.0)
    done = jp.prune_layers(mlp, params, [x], solver, sparsity=0.5, damping=0.0)
    row = done.report.rows[0]
    assert row.damping > 0
    assert f"had no factor with damping 0, so {row.damping:g} was taken" in row.note
    assert np.isfinite(np.asarray(done.params["a"])).all()


# Bad input


def prune(**options: Any) -> Any:
    given: dict[str, Any] = {
        "apply_fn": mlp,
        "params": mlp_params(),
        "batches": [normal(0, 9, 12)],
        "solver": magnitude,
        "sparsity": 0.5,
    }
    return jp.prune_layers(**(given | options))


def nan_at_b(params: Any, x: Any) -> Any:
    x = jnp.tanh(x @ params["a"]) / 0
    return jnp.tanh(x @ params["b"]) @ params["c"]


BAD = {
    "no batch": ({"batches": []}, ValueError, "prune_layers got no batch"),
    "other structure": ({"batches": [normal(0, 9, 12), (normal(0, 9, 12), 1)]}, ValueError, "same structure"),
    "other shape": ({"batches": [normal(0, 9, 12), normal(0, 9, 11)]}, ValueError, "the first axis alone"),
    "one array": ({"batches": normal(0, 9, 12)}, TypeError, r"For one batch pass \[batch\]"),
    "where": ({"where": lambda path, leaf: path == "a_bias"}, ValueError, "matches no product"),
    "nothing": ({"where": lambda path, leaf: False}, ValueError, "where"),
    "nan": ({"apply_fn": nan_at_b}, ValueError, r"data that params\['b'\] multiplies \(.*\) is NaN"),
    "no sparsity": ({"sparsity": None}, ValueError, "prune_layers needs sparsity="),
    "sparsity": ({"sparsity": 1.5}, ValueError, "sparsity"),
    "unknown path": ({"sparsity": {"x": 0.5}}, ValueError, "sparsity names x, .* The layers are a, b, c"),
    "empty dict": ({"sparsity": {}}, ValueError, "empty dict"),
    "scope": ({"scope": "global"}, ValueError, "scope must be 'layerwise' or 'output', got 'global'"),
    "target": ({"target": 3}, ValueError, "target must be 'own' or 'dense'"),
    "refine": ({"refine": -1}, ValueError, "refine must be an integer of 0 or more"),
    "solver": ({"solver": "sparsegpt"}, TypeError, "jaxprune.solvers"),
    "progress": ({"progress": 3}, TypeError, "progress="),
    "damping": ({"damping": "1"}, ValueError, "prune_layers needs damping"),
    "negative damping": ({"damping": -0.1}, ValueError, "prune_layers needs damping"),
    "n of m": (
        {"structure": jp.structures.nm(2, 5), "sparsity": None},
        ValueError,
        r"params\['a'\].*5 does not",
    ),
    "n of m axis": (
        {"structure": jp.structures.nm(2, 4, axis=1), "sparsity": None},
        ValueError,
        r"params\['a'\].*Leave out axis=",
    ),
    "n of m sparsity": (
        {"structure": jp.structures.nm(2, 4), "sparsity": 0.4},
        ValueError,
        "leave out sparsity=",
    ),
    "blocks": ({"structure": jp.structures.blocks((5, 4))}, ValueError, r"params\['a'\].*blocks"),
    "a tuple": (
        {"solver": lambda w, h, c, p: w},
        ValueError,
        r"<lambda> on a \(.*must return \(weight, mask\)",
    ),
    "a shape": ({"solver": lambda w, h, c, p: (w, w[0] > 0)}, ValueError, r"<lambda> on a .*bool \(16, 12\)"),
    "a dtype": ({"solver": lambda w, h, c, p: (w, w)}, ValueError, r"<lambda> on a .*got float32"),
    "a count": (
        {"solver": lambda w, h, c, p: (w, w > 0)},
        ValueError,
        r"<lambda> returned a mask for a \(.*\) that does not remove",
    ),
    "not finite": (
        {"solver": lambda w, h, c, p: (w / 0, magnitude(w, h, c, p)[1])},
        ValueError,
        "<lambda> returned weights that are not finite for a",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        prune(**options)


def test_traced_params_are_refused():
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(lambda p: prune(params=p).params)(mlp_params())


@pytest.mark.parametrize(("folder", "error"), [("", ValueError), (3, TypeError), (b"x", TypeError)])
def test_a_checkpoint_that_is_no_folder(folder, error):
    with pytest.raises(error, match=r"^checkpoint= "):
        jp.prune_layers(
            lambda p, x: x @ p["w"],
            {"w": jnp.ones((2, 2))},
            [jnp.ones((3, 2))],
            jp.solvers.sparsegpt(),
            0.5,
            checkpoint=folder,
        )
