"""Channels of trained networks: which go, and least squares of the layers that read the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def mlp(params, x):
    x = jax.nn.relu(x @ params["a"] + params["b"])
    return x @ params["c"] + params["d"]


def mlp_problem(biases=True):
    params = {"a": normal(0, 6, 12), "b": normal(1, 12), "c": normal(2, 12, 5), "d": normal(3, 5)}
    batches = [normal(4, 24, 3) @ normal(5, 3, 6), normal(6, 16, 3) @ normal(5, 3, 6)]
    if biases:
        return mlp, params, batches
    params = {"a": params["a"], "c": params["c"]}
    return (lambda params, x: jax.nn.relu(x @ params["a"]) @ params["c"]), params, batches


def structure_of(function, params, x, **options):
    return jp.structures.channels(jp.channel_groups(function, params, x, **options))


def pruned(function, params, batches, sparsity=0.5, **options):
    structure = structure_of(function, params, batches[0])
    return jp.prune_layers(function, params, batches, None, sparsity, structure=structure, **options)


@pytest.mark.parametrize("biases", [True, False])
def test_a_reader_is_the_least_squares_solution_on_the_channels_that_stay(biases):
    function, params, batches = mlp_problem(biases)
    done = pruned(function, params, batches, refine=60)
    keep = np.asarray(done.masks["c"].all(axis=1))
    assert keep.sum() == 6
    x = np.concatenate(batches).astype(np.float64)
    hidden = np.maximum(x @ np.asarray(params["a"], np.float64) + np.asarray(params.get("b", 0.0)), 0)
    wanted = hidden @ np.asarray(params["c"], np.float64) + np.asarray(params.get("d", 0.0))
    columns = np.concatenate([hidden[:, keep], np.ones((len(x), int(biases)))], axis=1)
    best, *_ = np.linalg.lstsq(columns, wanted, rcond=None)
    got = np.asarray(function(done.params, jnp.asarray(x, jnp.float32)))
    least = np.linalg.norm(columns @ best - wanted)
    assert np.linalg.norm(got - wanted) <= least * 1.01 + 1e-3
    dense = np.linalg.norm(hidden @ np.asarray(params["c"], np.float64))
    assert done.report.rows[0].error == pytest.approx(
        np.linalg.norm(got - wanted) / dense, rel=0.02, abs=1e-3
    )
    jp.check_pruned(done.params, done.masks)
    small = jp.compact(function, done.params, done.masks, batches[0])
    assert small.params["a"].shape == (6, 6)
    np.testing.assert_allclose(
        small.apply(small.params, batches[1]), function(done.params, batches[1]), atol=1e-4
    )


def test_the_channel_that_is_a_copy_goes_first():
    """Removing it costs nothing, once the weights of the other copy make up for it."""
    params = {"a": normal(0, 6, 5), "c": normal(2, 5, 4)}
    params["a"] = params["a"].at[:, 3].set(params["a"][:, 1])
    params["c"] = params["c"].at[3].set(9.0)  # its weights are the largest
    function, batches = (lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"]), [normal(4, 50, 6)]
    done = pruned(function, params, batches, 0.2)
    assert int(done.masks["c"].all(axis=1).sum()) == 4
    assert not bool(done.masks["c"][3].any() & done.masks["c"][1].any())
    # The damping of what is inverted to choose is not part of the solution.
    np.testing.assert_allclose(function(done.params, batches[0]), function(params, batches[0]), atol=2e-3)


def test_convolutions_and_means_of_channels_in_the_bias():
    params = {
        "c1": normal(0, 3, 3, 1, 8) / 3,
        "b1": normal(1, 8),
        "c2": normal(2, 3, 3, 8, 6) / 8,
        "m2": normal(3, 6),
    }

    def function(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params["c1"], (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + params["b1"])
        x = jax.lax.conv_general_dilated(x, params["c2"], (2, 2), "VALID", dimension_numbers=numbers)
        return x - params["m2"]  # as the running mean of a norm

    batches = [normal(4, 6, 9, 9, 1)]
    done = pruned(function, params, batches)
    magnitude = jp.prune_once(
        params, jp.scores.magnitude, sparsity=0.5, structure=structure_of(function, params, batches[0])
    )

    def error(some):
        return float(jnp.linalg.norm(function(some, batches[0]) - function(params, batches[0])))

    assert error(done.params) < 0.5 * error(jp.apply_masks(params, magnitude))
    assert not bool(jnp.all(done.params["m2"] == params["m2"]))
    small = jp.compact(function, done.params, done.masks, batches[0])
    assert small.params["c2"].shape == (3, 3, 4, 6)
    np.testing.assert_allclose(
        small.apply(small.params, batches[0]), function(done.params, batches[0]), atol=1e-5, rtol=1e-5
    )


def decoder(params, x):
    def layer(x, p):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        a = jax.nn.softmax(jnp.einsum("blhk,bmhk->bhlm", q, k))
        x = x + jnp.einsum("blhk,hkd->bld", jnp.einsum("bhlm,bmhk->blhk", a, v), p["o"])
        return x + jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"], None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


def decoder_params():
    shapes = {"q": (8, 4, 2), "k": (8, 4, 2), "v": (8, 4, 2), "o": (4, 2, 8), "up": (8, 16), "down": (16, 8)}
    layers = {name: normal(n, 2, *shape) / 3 for n, (name, shape) in enumerate(shapes.items())}
    return {"layers": layers | {"bias": normal(9, 2, 16)}, "head": normal(8, 8, 5)}


def test_heads_and_hidden_units_of_stacked_layers():
    params, batches = decoder_params(), [normal(20, 4, 6, 8), normal(21, 4, 6, 8)]
    groups = jp.channel_groups(decoder, params, batches[0], stacked=lambda path, leaf: int("layers" in path))
    names = [
        g.name
        for g in groups
        if g.name.startswith(("layers/up[", "layers/k[")) and not g.name.endswith("[2]")
    ]
    done = jp.prune_layers(
        decoder, params, batches, None, dict.fromkeys(names, 0.5), structure=jp.structures.channels(groups)
    )
    assert [row.name for row in done.report.rows] == [
        *("layers/o[0]", "layers/down[0]", "layers/o[1]", "layers/down[1]")
    ]
    assert all(row.error < row.masked_error for row in done.report.rows)
    small = jp.compact(decoder, done.params, done.masks, batches[0])
    assert small.params["layers"]["q"].shape == (2, 8, 2, 2)
    assert small.params["layers"]["down"].shape == (2, 8, 8)
    np.testing.assert_allclose(
        small.apply(small.params, batches[0]), decoder(done.params, batches[0]), atol=2e-5
    )


def test_channels_that_several_layers_read_are_solved_for_the_dense_output():
    def function(params, x):
        x = jnp.tanh(x @ params["stem"])
        x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
        return x @ params["head"]

    params = {
        "stem": normal(0, 5, 10),
        "up": normal(1, 10, 12),
        "down": normal(2, 12, 10) / 4,
        "head": normal(3, 10, 4),
    }
    batches = [normal(4, 60, 2) @ normal(5, 2, 5)]
    groups = jp.channel_groups(function, params, batches[0])
    stream = next(group.name for group in groups if group.units == 10)
    structure = jp.structures.channels(groups)
    done = jp.prune_layers(function, params, batches, None, {stream: 0.3}, structure=structure)
    assert {row.name for row in done.report.rows} == {"up", "head"}
    masked = jp.apply_masks(params, done.masks)

    def error(some):
        return float(jnp.linalg.norm(function(some, batches[0]) - function(params, batches[0])))

    assert error(done.params) < 0.2 * error(masked)
    small = jp.compact(function, done.params, done.masks, batches[0])
    assert small.params["head"].shape == (7, 4)


def test_what_cannot_be_solved_is_refused():
    function, params, batches = mlp_problem()
    with pytest.raises(ValueError, match=r"params\['c'\] multiplies .* is NaN or infinite"):
        pruned(function, params | {"b": params["b"] * jnp.inf}, batches)
    stacked = decoder_params()
    with pytest.raises(ValueError, match=r"no product of a leaf reads the channels of .*queries meet keys"):
        pruned(decoder, stacked, [normal(20, 2, 6, 8)])
    with pytest.raises(ValueError, match="nowhere"):
        pruned(function, params, batches, {"nowhere": 0.5})


def test_a_run_of_channels_goes_on_where_it_stopped(tmp_path):
    function, params, batches = mlp_problem()
    whole = pruned(function, params, batches)

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruned(function, params, batches, checkpoint=tmp_path / "run", progress=stop)
    rest = pruned(function, params, batches, checkpoint=tmp_path / "run")
    for path in params:
        np.testing.assert_array_equal(rest.params[path], whole.params[path])
        np.testing.assert_array_equal(rest.masks[path], whole.masks[path])
