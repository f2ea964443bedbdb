"""`reestimate_statistics`: the mean of the batches' own statistics, whatever the momentum."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp

WIDTH = 5


def batches(count: int = 4, rows: int = 12, scale: float = 3.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(scale * rng.normal(size=(rows, WIDTH)) + n).astype(np.float32) for n in range(count)]


def by_hand(given: Any, layers: Any) -> list[tuple[Any, Any]]:
    """Return mean and variance before each BatchNorm of `x @ w -> BatchNorm -> relu -> ...`, in float64."""
    sums: list[tuple[Any, Any]] = [(0.0, 0.0)] * len(layers)
    for x in given:
        h = np.asarray(x, np.float64)
        for n, w in enumerate(layers):
            h = h @ np.asarray(w, np.float64)
            mean, var = h.mean(0), h.var(0)
            sums[n] = sums[n][0] + mean / len(given), sums[n][1] + var / len(given)
            h = np.maximum((h - mean) / np.sqrt(var + 1e-5), 0)
    return sums


LAYERS = [np.random.default_rng(n).normal(size=(WIDTH, WIDTH)).astype(np.float32) for n in (1, 2)]


def update(state: Any, x: Any, momenta: Any = (0.9, 0.999)) -> Any:
    """Two layers with a momentum of each, a count and what is no statistic."""
    new = {"layers": [], "count": state["count"] + 1, "scale": state["scale"], "key": state["key"]}
    for w, m, layer in zip(LAYERS, momenta, state["layers"], strict=True):
        x = x @ w
        mean, var = x.mean(0), x.var(0)
        new["layers"].append(
            {"mean": m * layer["mean"] + (1 - m) * mean, "var": m * layer["var"] + (1 - m) * var}
        )
        x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5)) * state["scale"]
    return new


def stale() -> Any:
    layers = [{"mean": jnp.full(WIDTH, 40.0), "var": jnp.full(WIDTH, 300.0)} for _ in LAYERS]
    return {"layers": layers, "count": jnp.array(7), "scale": jnp.ones(1), "key": jax.random.key(3)}


@pytest.mark.parametrize(
    "momenta", [(0.9, 0.999), (0.0, 0.5), (np.linspace(0.1, 0.9, WIDTH, dtype=np.float32), 0.99)]
)
def test_statistics_are_the_mean_over_batches_whatever_the_momentum(momenta):
    given = [*batches(), batches(1, rows=7)[0]]
    state = jp.reestimate_statistics(lambda s, x: update(s, x, momenta), stale(), given)
    for layer, (mean, var) in zip(state["layers"], by_hand(given, LAYERS), strict=True):
        np.testing.assert_allclose(layer["mean"], mean, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(layer["var"], var, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(state["scale"], stale()["scale"])
    assert state["key"] == stale()["key"]
    assert jax.tree.structure(state) == jax.tree.structure(stale())


def test_large_values_are_not_rounded_away():
    given = batches(scale=1e4)
    state = jp.reestimate_statistics(update, stale(), given)
    for layer, (mean, var) in zip(state["layers"], by_hand(given, LAYERS), strict=True):
        np.testing.assert_allclose(layer["mean"], mean, rtol=1e-3, atol=1e-3 * np.abs(mean).max())
        np.testing.assert_allclose(layer["var"], var, rtol=1e-3)


def test_a_statistic_that_the_first_batch_does_not_move():
    given = [np.zeros((3, WIDTH), np.float32), np.full((3, WIDTH), 4.0, np.float32)]
    state = {"mean": jnp.zeros(WIDTH), "kernel": jnp.full(WIDTH, 2.0)}
    new = jp.reestimate_statistics(
        lambda s, x: s | {"mean": 0.9 * s["mean"] + 0.1 * (x * s["kernel"]).mean(0)}, state, given
    )
    np.testing.assert_allclose(new["mean"], 4.0, rtol=1e-6)
    np.testing.assert_array_equal(new["kernel"], state["kernel"])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for _ in LAYERS:
            x = nn.Dense(WIDTH, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.97)(x))
        return x


def test_linen_also_after_pruning():
    model = Linen()
    variables = model.init(jax.random.key(0), jnp.ones((2, WIDTH)), train=True)
    params = variables["params"]
    params = jp.apply_masks(params, jp.prune_once(params, jp.scores.magnitude, sparsity=0.4))

    def update_fn(state: Any, x: Any) -> Any:
        return model.apply({"params": params, **state}, x, train=True, mutable=["batch_stats"])[1]

    state = jp.reestimate_statistics(update_fn, {"batch_stats": variables["batch_stats"]}, batches())
    kernels = [params[f"Dense_{n}"]["kernel"] for n in range(2)]
    for n, (mean, var) in enumerate(by_hand(batches(), kernels)):
        own = state["batch_stats"][f"BatchNorm_{n}"]
        np.testing.assert_allclose(own["mean"], mean, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(own["var"], var, rtol=2e-4, atol=2e-4)
    # With one batch, evaluation is what training computes of it.
    (x, *_), trained = batches(), {"params": params}
    state = jp.reestimate_statistics(update_fn, {"batch_stats": variables["batch_stats"]}, [x])
    expected, _ = model.apply(trained | state, x, train=True, mutable=["batch_stats"])
    evaluated: Any = model.apply(trained | state, x, train=False)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-4)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.List([nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in LAYERS])
        self.norm = nnx.List([nnx.BatchNorm(WIDTH, momentum=0.99, rngs=rngs) for _ in LAYERS])

    def __call__(self, x):
        for linear, norm in zip(self.linear, self.norm, strict=True):
            x = nnx.relu(norm(linear(x)))
        return x


def test_nnx():
    graph, params, stats = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def update_fn(stats: Any, x: Any) -> Any:
        model = nnx.merge(graph, params, stats)
        model.train()
        model(x)
        return nnx.state(model, nnx.BatchStat)

    new = nnx.merge(graph, params, jp.reestimate_statistics(update_fn, stats, batches()))
    for norm, (mean, var) in zip(
        new.norm, by_hand(batches(), [one.kernel[...] for one in new.linear]), strict=True
    ):
        np.testing.assert_allclose(norm.mean[...], mean, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(norm.var[...], var, rtol=2e-4, atol=2e-4)


def of_equinox(mode: str) -> Any:
    eqx = pytest.importorskip("equinox")
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(WIDTH, axis_name="b", mode=mode, momentum=0.999)

    def run(state: Any, x: Any, inference: bool) -> Any:
        call = jax.vmap(
            lambda x, s: norm(x, s, inference=inference), axis_name="b", in_axes=(0, None), out_axes=(0, None)
        )
        return call(x @ LAYERS[0], state)

    return run, state


def test_equinox_divides_by_a_power_of_its_count():
    run, state = of_equinox("batch")
    for x in batches():
        _, state = run(state, x, False)
    leaves, treedef = jax.tree.flatten(state)
    new = jp.reestimate_statistics(
        lambda leaves, x: jax.tree.leaves(run(treedef.unflatten(leaves), x, False)[1]), leaves, batches()[:1]
    )
    (x, *_) = batches()
    fresh = jax.tree.unflatten(treedef, new)
    expected, evaluated = run(fresh, x, False)[0], run(jax.tree.unflatten(treedef, new), x, True)[0]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-3, atol=1e-3)


def test_haiku():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(
        hk.transform_with_state(
            lambda x, train: hk.BatchNorm(True, True, 0.999, eps=1e-5)(x @ LAYERS[0], train)
        )
    )
    params, state = model.init(jax.random.key(0), batches()[0], True)
    for x in batches():
        _, state = model.apply(params, state, x + 5, True)
    new = jp.reestimate_statistics(lambda s, x: model.apply(params, s, x, True)[1], state, batches()[:1])
    (x, *_) = batches()
    expected = model.apply(params, new, x, True)[0]
    np.testing.assert_allclose(model.apply(params, new, x, False)[0], expected, rtol=1e-3, atol=1e-3)


def test_a_network_that_normalises_by_its_running_statistics_is_refused():
    def update_fn(state: Any, x: Any) -> Any:
        first = 0.9 * state["a"] + 0.1 * x.var(0)
        return {"a": first, "b": 0.9 * state["b"] + 0.1 * (x / (1 + first)).var(0)}

    state = {"a": jnp.ones(WIDTH), "b": jnp.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"state\['b'\] is not updated as"):
        jp.reestimate_statistics(update_fn, state, batches())


def test_wrong_arguments_are_named():
    def total(state: Any, x: Any) -> Any:
        return {"mean": state["mean"] + x.mean(0)}

    state = {"mean": jnp.ones(WIDTH)}
    with pytest.raises(ValueError, match="got no batch"):
        jp.reestimate_statistics(total, state, [])
    with pytest.raises(ValueError, match="a weight of 1"):
        jp.reestimate_statistics(total, state, batches())
    with pytest.raises(ValueError, match="in training mode"):
        jp.reestimate_statistics(lambda s, x: s, state, batches())
    with pytest.raises(ValueError, match="same structure"):
        jp.reestimate_statistics(lambda s, x: s["mean"], state, batches())
    with pytest.raises(ValueError, match="not finite"):
        jp.reestimate_statistics(
            lambda s, x: {"mean": 0.9 * s["mean"] + 0.1 * x.mean(0)}, state, [x * np.nan for x in batches()]
        )
    with pytest.raises(TypeError, match="cannot be called"):
        jp.reestimate_statistics(lambda s: s, state, batches())
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda s: jp.reestimate_statistics(total, s, batches()))(state)
