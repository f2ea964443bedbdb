"""`recover`: survivors tuned for the dense network's outputs, whole and block by block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxprune as jp
from jaxprune.calibration import recovery
from jaxprune.calibration.blocks import Network, find_blocks
from jaxprune.calibration.programs import Programs
from jaxprune.tracing.jaxprs import split_static

WIDTH, DEPTH = 6, 3


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def linear(params: Any, x: Any) -> Any:
    return x @ params["kernel"]


def correlated(seed: int, batches: int, rows: int, width: int = WIDTH) -> list[jax.Array]:
    """Batches of inputs that tell much of each other."""
    mix = normal(99, width, width) + 2
    return [normal(seed + n, rows, width) @ mix for n in range(batches)]


def test_a_linear_layer_becomes_the_least_squares_solution_on_the_support():
    dense = {"kernel": normal(0, WIDTH, 4)}
    masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.5)
    batches = correlated(1, 5, 16)
    tx = optax.adam(optax.cosine_decay_schedule(3e-2, 3000))
    done = jp.recover(linear, dense, masks, batches, tx, teacher=dense, steps=3000, held_out=batches)
    x, w = np.concatenate(batches).astype(np.float64), np.asarray(dense["kernel"], np.float64)
    best = np.zeros_like(w)
    for column, keep in enumerate(np.asarray(masks["kernel"]).T):
        best[keep, column] = np.linalg.lstsq(x[:, keep], x @ w[:, column], rcond=None)[0]
    error = np.mean((x @ best - x @ w) ** 2)
    assert done.report.after < 1.01 * error < 0.5 * done.report.before
    jp.check_pruned(done.params, masks)


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def mlp_params(seed: int = 0) -> Any:
    return {
        "a": {"kernel": normal(seed, WIDTH, 8), "bias": normal(seed + 1, 8)},
        "b": {"kernel": normal(seed + 2, 8, 3)},
    }


def half(params: Any) -> Any:
    return jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)


def by_hand(
    loss_of: Any, tx: Any, start: Any, masks: Any, batches: Any, held_out: Any, steps: int, every: int
):
    """Tune step by step, in the order that `seed=0` gives; return the best params by the held-out loss."""
    tx = jp.keep_masked(tx, masks)
    params = best = jp.apply_masks(start, masks)
    state, rng, order, now = tx.init(params), np.random.default_rng(0), [], []

    loss_of = jax.jit(loss_of)
    update, gradient = jax.jit(tx.update), jax.jit(jax.grad(loss_of))

    def value(params: Any) -> float:
        return float(np.mean([loss_of(params, batch) for batch in held_out]))

    lowest = value(params)
    for step in range(steps):
        if not now:  # between two evaluations, batches of one shape come after each other
            while len(order) < every:
                order += rng.permutation(len(batches)).tolist()
            now, order = order[:every], order[every:]
            shapes = [batches[n].shape for n in now]
            now = sorted(now, key=lambda n, shapes=shapes: shapes.index(batches[n].shape))
        updates, state = update(gradient(params, batches[now.pop(0)]), state, params)
        params = optax.apply_updates(params, updates)
        if (step + 1) % every == 0 and value(params) < lowest:
            best, lowest = params, value(params)
    return best, lowest


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_the_network_is_tuned_as_by_hand_with_batches_of_two_shapes():
    dense = mlp_params()
    masks, batches = half(dense), [*correlated(1, 3, 8), *correlated(7, 1, 5), *correlated(8, 2, 8)]

    def loss_of(params: Any, x: Any) -> Any:
        return jnp.mean((mlp(params, x) - mlp(dense, x)) ** 2)

    tx = optax.adamw(1e-2)
    done = jp.recover(
        mlp, dense, masks, batches, tx, teacher=dense, steps=14, every=7, held_out=2 / 6, patience=9
    )
    best, lowest = by_hand(loss_of, tx, dense, masks, batches[:4], batches[4:], 14, 7)
    close(done.params, best)
    np.testing.assert_allclose(done.report.after, lowest, rtol=1e-5)
    assert [one.step for one in done.report.evaluations] == [0, 7, 14] and done.report.steps == 14


def test_each_block_is_tuned_as_by_hand_on_what_the_network_so_far_computes():
    dense = mlp_params()
    masks, batches = half(dense), correlated(1, 5, 8)
    tx = optax.sgd(1e-2)

    def hidden(layer: Any, x: Any) -> Any:
        return jnp.tanh(x @ layer["kernel"] + layer["bias"])

    def first(layer: Any, x: Any) -> Any:
        return jnp.mean((hidden(layer, x) - hidden(dense["a"], x)) ** 2)

    done = jp.recover(
        mlp, dense, masks, batches, tx, teacher=dense, steps=8, every=4, held_out=0.2, by_block=True
    )
    a, _ = by_hand(first, tx, dense["a"], masks["a"], batches[:4], batches[4:], 8, 4)

    def second(layer: Any, x: Any) -> Any:
        return jnp.mean((hidden(a, x) @ layer["kernel"] - mlp(dense, x)) ** 2)

    b, lowest = by_hand(second, tx, dense["b"], masks["b"], batches[:4], batches[4:], 8, 4)
    close(done.params, {"a": a, "b": b})
    np.testing.assert_allclose(done.report.after, lowest, rtol=1e-5)
    assert [one.block for one in done.report.evaluations] == [
        "network",
        *["block 0"] * 3,
        *["block 1"] * 3,
        "network",
    ]


def norm(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def layer(params: Any, x: Any, bias: Any) -> Any:
    h = norm(x)
    q, k, v = jnp.split(h @ params["qkv"], 3, -1)
    scores = jnp.einsum("bqd,bkd->bqk", q, k) + bias[:, None]
    x = x + jax.nn.softmax(scores, -1) @ v @ params["out"]
    return x + jax.checkpoint(lambda h: jax.nn.gelu(h @ params["up"]) @ params["down"])(norm(x))


def layer_params() -> Any:
    return {
        "qkv": normal(1, DEPTH, WIDTH, 3 * WIDTH),
        "out": normal(2, DEPTH, WIDTH, WIDTH) / 3,
        "up": normal(3, DEPTH, WIDTH, 2 * WIDTH),
        "down": normal(4, DEPTH, 2 * WIDTH, WIDTH) / 3,
    }


def stacked_params() -> Any:
    return {"table": normal(0, 9, WIDTH), "layers": layer_params(), "head": normal(5, WIDTH, 9)}


def unrolled_params(stacked: Any) -> Any:
    layers = [jax.tree.map(lambda leaf, n=n: leaf[n], stacked["layers"]) for n in range(DEPTH)]
    return stacked | {"layers": layers}


def stacked_model(params: Any, tokens: Any, mask: Any) -> Any:
    bias = jnp.where(mask, 0.0, -1e9)
    x = params["table"][tokens]
    x, _ = lax.scan(lambda x, p: (layer(p, x, bias), None), x, params["layers"])
    return norm(x) @ params["head"]


def unrolled_model(params: Any, tokens: Any, mask: Any) -> Any:
    bias = jnp.where(mask, 0.0, -1e9)
    x = params["table"][tokens]
    for p in params["layers"]:
        x = jax.jit(layer)(p, x, bias)
    return norm(x) @ params["head"]


def reversed_model(params: Any, tokens: Any, mask: Any) -> Any:
    """Layers from the last to the first, cast, with a number and an auxiliary sum in the carry."""
    bias = jnp.where(mask, 0.0, -1e9)

    def step(carry: Any, p: Any) -> Any:
        x, total, number = carry
        x = layer(p, x, bias)
        return (x, total + jnp.mean(x), number + 1), None

    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["layers"])
    start = (params["table"][tokens], 0.0, 0)
    (x, _, _), _ = lax.scan(step, start, layers, reverse=True)
    return norm(x) @ params["head"]


def convolutions(params: Any, x: Any) -> Any:
    for kernel in params["kernels"]:
        x = jax.nn.relu(
            lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
    return x.mean((1, 2)) @ params["head"]


def text_batches(count: int = 5) -> list[Any]:
    rng = np.random.default_rng(0)
    mask = np.arange(7) < np.array([7, 4, 6, 2])[:, None]
    return [(jnp.asarray(rng.integers(0, 9, (4, 7))), jnp.asarray(mask)) for _ in range(count)]


@pytest.mark.parametrize(
    ("model", "params", "inputs", "count"),
    [
        (mlp, mlp_params(), (normal(5, 4, WIDTH),), 2),
        # The embedding belongs to the first block, or is one where a loop follows.
        (unrolled_model, unrolled_params(stacked_params()), text_batches(1)[0], 2 * DEPTH + 1),
        (stacked_model, stacked_params(), text_batches(1)[0], DEPTH + 2),
        (reversed_model, stacked_params(), text_batches(1)[0], DEPTH + 2),
        (
            convolutions,
            {"kernels": [normal(0, 3, 3, 2, 4), normal(1, 3, 3, 4, 4)], "head": normal(2, 4, 3)},
            (normal(3, 2, 5, 5, 2),),
            3,
        ),
    ],
)
def test_the_blocks_run_one_after_the_other_are_the_network(model, params, inputs, count):
    network = Network(model, params, inputs)
    paths = dict(zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True))
    blocks = find_blocks(network, list(paths), [])
    state: Any = []
    arrays = split_static(inputs)[0]
    for block in blocks:
        values = [paths[path] if n is None else paths[path][n] for path, n in block.reads]
        state = block.run(values, paths, state, arrays)
    np.testing.assert_allclose(state[0], model(params, *inputs), rtol=1e-5, atol=1e-5)
    assert len([block for block in blocks if block.reads]) == count
    reads = [key for block in blocks for key in block.reads]
    assert len(reads) == len(set(reads))
    assert {path for path, _ in reads} == set(paths)


def mixing(kernel: Any, x: Any, mask: Any) -> Any:
    """A small layer that reads other tokens: those that the mask keeps."""
    kept = mask[..., None].astype(x.dtype)
    return x + jnp.tanh((x + jnp.sum(x * kept, 1, keepdims=True) / kept.sum(1, keepdims=True)) @ kernel)


def small_params() -> Any:
    return {
        "table": normal(0, 9, WIDTH),
        "layers": normal(1, DEPTH, WIDTH, WIDTH),
        "head": normal(5, WIDTH, 9),
    }


def in_one_scan(params: Any, tokens: Any, mask: Any) -> Any:
    x, _ = lax.scan(lambda x, p: (mixing(p, x, mask), None), params["table"][tokens], params["layers"])
    return x @ params["head"]


def in_scans_of_one(params: Any, tokens: Any, mask: Any) -> Any:
    """Each layer is one equation, and so one block."""
    x = params["table"][tokens]
    for p in params["layers"]:
        x, _ = lax.scan(lambda x, p: (mixing(p, x, mask), None), x, p[None])
    return x @ params["head"]


def test_layers_in_a_scan_are_tuned_as_layers_written_out():
    dense = small_params()
    masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.4, scope="layerwise")
    options: Any = {"steps": 6, "every": 3, "by_block": True, "where": jp.matching("layers*")}
    tx, batches = optax.sgd(0.1), text_batches()
    done = jp.recover(in_one_scan, dense, masks, batches, tx, teacher=dense, **options)
    flat, flat_masks = unrolled_params(dense), unrolled_params(masks)
    other = jp.recover(in_scans_of_one, flat, flat_masks, batches, tx, teacher=flat, **options)
    assert done.report.after < 0.9 * done.report.before
    close(unrolled_params(done.params), other.params, 1e-4)
    np.testing.assert_array_equal(done.params["head"], jp.apply_masks(dense, masks)["head"])


@pytest.mark.parametrize("where", [None, jp.matching("layers*")])
@pytest.mark.parametrize("model", [in_one_scan, in_scans_of_one])
def test_mapped_leaves_are_tuned_to_the_same_bits_and_stay_on_the_host(tmp_path, model, where):
    dense = small_params() if model is in_one_scan else unrolled_params(small_params())
    masks = half(dense)

    def mapped(path: str, leaf: Any) -> Any:
        file = tmp_path / f"{path.replace('/', '_')}.npy"
        np.save(file, leaf)
        return np.load(file, mmap_mode="r")

    leaves, treedef = jax.tree.flatten(dense)
    files = treedef.unflatten(map(mapped, jp.leaf_paths(dense), leaves))
    done, other = (
        jp.recover(
            model,
            params,
            masks,
            text_batches(3),
            optax.sgd(0.1),
            teacher=params,
            steps=2,
            by_block=True,
            where=where,
        )
        for params in (dense, files)
    )
    assert done.report.after < done.report.before
    losses = [[one.held_out for one in each.report.evaluations] for each in (done, other)]
    assert losses[0] == losses[1]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(other.params))
    jax.tree.map(np.testing.assert_array_equal, done.params, other.params)


def test_a_network_without_blocks_is_refused_with_its_lines():
    def recurrent(params: Any, x: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            h, c = state
            c = c + jnp.tanh(x @ params["a"] + h)
            return (jnp.tanh(c), c), None

        start = jnp.zeros((x.shape[1], WIDTH)), jnp.zeros((x.shape[1], WIDTH))
        (h, c), _ = lax.scan(step, start, x)
        return h @ params["b"] + c

    params = {name: normal(n, WIDTH, WIDTH) for n, name in enumerate("ab")}
    batches = [normal(n, 5, 4, WIDTH) for n in range(3)]
    says = r"no place between .* fewest are 2, made by scan of test_recover.py:\d+\. Leave by_block out"
    with pytest.raises(ValueError, match=says):
        jp.recover(recurrent, params, half(params), batches, teacher=params, by_block=True, steps=1)
    one = {"kernel": params["a"]}
    with pytest.raises(ValueError, match="a single product"):
        jp.recover(linear, one, half(one), correlated(0, 3, 4), teacher=one, by_block=True, steps=1)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_network_that_gets_worse_is_returned_as_it_was(by_block):
    dense = mlp_params()
    masks = half(dense)
    done = jp.recover(
        mlp,
        dense,
        masks,
        correlated(0, 4, 8),
        optax.sgd(1e4),
        teacher=dense,
        steps=50,
        every=5,
        patience=2,
        by_block=by_block,
    )
    jax.tree.map(np.testing.assert_array_equal, done.params, jp.apply_masks(dense, masks))
    assert done.report.after == done.report.before
    assert done.report.steps == (20 if by_block else 10)  # of 50: two evaluations in a row were no better


@pytest.mark.parametrize("by_block", [False, True])
def test_narrow_leaves_and_those_that_are_not_tuned(by_block):
    tree = mlp_params() | {"unread": normal(7, 3), "steps": jnp.array([3, 4]), "shift": normal(8, 3)}
    dense = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree)
    masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.5)

    def apply_fn(params: Any, x: Any) -> Any:
        return mlp(params, x.astype(jnp.bfloat16)) + params["shift"]

    done = jp.recover(
        apply_fn,
        dense,
        masks,
        correlated(0, 4, 8),
        optax.adamw(1e-3, weight_decay=0.1),
        teacher=dense,
        steps=60,
        where=jp.not_(jp.matching("shift")),
        by_block=by_block,
    )
    assert jax.tree.map(lambda x: x.dtype, done.params) == jax.tree.map(lambda x: x.dtype, dense)
    for name in ("unread", "steps", "shift"):
        np.testing.assert_array_equal(done.params[name], dense[name])
    assert done.report.after < 0.8 * done.report.before
    for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(done.params), strict=True):
        removed = np.asarray(leaf)[~np.asarray(mask)]
        assert not removed.any() and not np.signbit(removed.astype(np.float32)).any()


def test_divergence_of_logits_as_the_loss_and_what_is_reported(capsys):
    dense = mlp_params()
    masks, batches = half(dense), correlated(0, 6, 16)
    done = jp.recover(
        mlp,
        dense,
        masks,
        batches,
        teacher=dense,
        steps=40,
        loss=jp.distillation.soft_targets,
        progress=print,
    )
    soft = jp.distillation.soft_targets
    expected = soft(mlp(done.params, batches[-1]), mlp(dense, batches[-1])).mean()
    np.testing.assert_allclose(done.report.after, expected, rtol=1e-5)
    assert done.report.after < done.report.before
    said = capsys.readouterr().out.splitlines()
    assert said == [str(one) for one in done.report.evaluations] and len(said) == 21
    assert "network" in str(done.report) and max(map(len, str(done.report).splitlines())) <= 80
    assert done.report.to_dict()["evaluations"][1]["step"] == 2


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(WIDTH, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


def of_linen() -> tuple[Any, Any]:
    model = Dense()
    return model.apply, model.init(jax.random.key(0), jnp.ones((1, WIDTH)))


def of_nnx() -> tuple[Any, Any]:
    graph, params = nnx.split(Nnx(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), params


def of_equinox() -> tuple[Any, Any]:
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.MLP(WIDTH, 3, 8, 1, key=jax.random.key(0)), eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("library", [of_linen, of_nnx, of_equinox])
def test_modules_of_libraries(library, by_block):
    apply_fn, dense = library()
    masks = half(dense)
    done = jp.recover(
        apply_fn,
        dense,
        masks,
        correlated(0, 4, 8),
        optax.adam(1e-2),
        teacher=dense,
        steps=40,
        by_block=by_block,
    )
    jp.check_pruned(done.params, masks)
    assert jax.tree.structure(done.params) == jax.tree.structure(dense)
    assert done.report.after < 0.7 * done.report.before


@pytest.mark.parametrize("by_block", [False, True])
def test_padding_does_not_count(by_block):
    """What stands where the weights are 0 changes nothing."""
    dense = small_params()
    masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.4)
    rng = np.random.default_rng(5)

    def other_padding(tokens: Any, mask: Any) -> Any:
        return jnp.where(mask, tokens, jnp.asarray(rng.integers(0, 9, tokens.shape))), mask

    def run(batches: Any, weights: Any) -> Any:
        return jp.recover(
            in_one_scan,
            dense,
            masks,
            batches,
            optax.sgd(0.05),
            teacher=dense,
            steps=4,
            every=2,
            by_block=by_block,
            weights=weights,
        )

    first = text_batches()
    second = [other_padding(*batch) for batch in first]
    done = run(first, lambda tokens, mask: mask)
    close(done.params, run(second, [mask for _, mask in second]).params)

    tokens, mask = first[-1]
    gap = in_one_scan(jp.apply_masks(dense, masks), tokens, mask) - in_one_scan(dense, tokens, mask)
    np.testing.assert_allclose(done.report.before, np.mean(np.asarray(gap)[np.asarray(mask)] ** 2), rtol=1e-4)
    with pytest.raises(ValueError, match=r"(?s)weights.*\(7,\)"):
        run(first, lambda tokens, mask: mask[0])


def test_equal_layers_share_their_programs(monkeypatch):
    made: list[Programs] = []
    monkeypatch.setattr(recovery, "Programs", lambda: made.append(Programs()) or made[-1])

    def written_out(params: Any, tokens: Any, mask: Any) -> Any:
        x = params["table"][tokens]
        for p in params["layers"]:
            x = mixing(p, x, mask)
        return x @ params["head"]

    dense, batches = unrolled_params(small_params()), text_batches(3)
    for depth in (2, 3):
        params = dense | {"layers": dense["layers"][:depth]}
        jp.recover(written_out, params, half(params), batches, teacher=params, steps=1, by_block=True)
    assert len(made[0]) == len(made[1]) > 0


def test_a_dict_is_one_input_and_packed_masks_are_masks():
    dense = mlp_params()
    batches = [{"x": x} for x in correlated(0, 4, 8)]
    done = jp.recover(
        lambda params, batch: {"logits": mlp(params, batch["x"])},
        dense,
        jp.pack_masks(half(dense)),
        batches,
        teacher=dense,
        steps=20,
    )
    assert done.report.after < done.report.before


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"batches": []}, ValueError, "got no batch"),
        ({"batches": jnp.ones((4, WIDTH))}, TypeError, "needs a list of batches"),
        ({"batches": correlated(0, 1, 4)}, ValueError, "one batch"),
        (
            {"batches": [jnp.ones((2, WIDTH)), {"x": jnp.ones((2, WIDTH))}]},
            ValueError,
            "batch 1 has the structure",
        ),
        ({"batches": [(jnp.ones((2, WIDTH)), True)] * 2}, TypeError, "functools.partial"),
        ({"held_out": 1.5}, ValueError, "a fraction between 0 and 1"),
        ({"held_out": [{"x": jnp.ones((2, WIDTH))}]}, ValueError, "held_out has batches of the structure"),
        ({"teacher": {"a": jnp.ones(3)}}, ValueError, "teacher must have the tree structure"),
        ({"teacher": mlp}, TypeError, "teacher must be the dense params"),
        ({"masks": {"a": jnp.ones(3, bool)}}, ValueError, "masks must have"),
        ({"where": lambda path, leaf: False}, ValueError, "no leaf to tune.*a/bias"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"patience": 1.5}, TypeError, "patience must be"),
        ({"loss": 3}, TypeError, "loss="),
        ({"loss": lambda a, b: None}, TypeError, "must return a number"),
        ({"apply_fn": lambda p, x: jnp.argmax(mlp(p, x), -1)}, TypeError, "nothing floating-point"),
        ({"apply_fn": lambda p: p}, TypeError, "cannot be called"),
        ({"batches": [x * jnp.nan for x in correlated(0, 3, 4)]}, ValueError, "not finite"),
        (
            {"batches": [*correlated(0, 3, 4), *correlated(0, 1, 5)], "by_block": True},
            ValueError,
            "of one shape",
        ),
        ({"tx": 3}, TypeError, "optax optimizer"),
    ],
)
def test_wrong_arguments_are_named(change, error, says):
    dense = mlp_params()
    given: Any = {"apply_fn": mlp, "params": dense, "masks": half(dense), "batches": correlated(0, 3, 4)}
    given |= {"teacher": dense, "steps": 1} | change
    with pytest.raises(error, match=says):
        jp.recover(**given)


def test_traced_params_are_refused():
    dense = mlp_params()
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda p: jp.recover(mlp, p, half(dense), correlated(0, 3, 4), teacher=dense).params)(dense)
