"""Adapters merged under masks: against numpy in float64, in training, and in the trees of other libraries."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxprune as jp

WIDTH, HIDDEN, DEPTH = 8, 16, 3


def stacked_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "layers": {
            "up": jax.random.normal(keys[0], (DEPTH, WIDTH, HIDDEN)) / WIDTH**0.5,
            "bias": jnp.zeros((DEPTH, HIDDEN)),
            "down": jax.random.normal(keys[1], (DEPTH, HIDDEN, WIDTH)) / HIDDEN**0.5,
        },
        "head": jax.random.normal(keys[2], (WIDTH, 4)),
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def apply_fn(params, x):
    def layer(x, block):
        return x + jax.nn.relu(x @ block["up"] + block["bias"]) @ block["down"], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"]


def pruned(params):
    masks = jp.prune_once(
        params,
        jp.scores.magnitude,
        sparsity=0.5,
        where=jp.matching("*up", "*down"),
        structure=jp.structures.nm(2, 4, axis=-2),
    )
    return jp.apply_masks(params, masks), masks


def trained(adapters, seed=9):
    """Return adapters whose product is not 0."""
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return treedef.unflatten(drawn)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# What is added


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_sum_is_that_of_numpy_and_pruned_entries_are_zero(jitted, packed):
    params, masks = pruned(stacked_params())
    adapters = trained(jp.lora.init(params, 3, key=jax.random.key(1), where=jp.matching("*up", "*down")))
    assert list(adapters) == ["layers/down", "layers/up"]

    def merge(params, adapters, masks):
        return jp.lora.merge(params, adapters, masks, scale=0.25)

    given = jp.pack_masks(masks) if packed else masks
    merged = (jax.jit(merge) if jitted else merge)(params, adapters, given)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in zip_paths(params)}
    kept = dict(zip_paths(masks))
    for path, leaf in zip_paths(merged):
        expected = leaves[path]
        if path in adapters:
            a, b = (np.asarray(factor, np.float64) for factor in adapters[path])
            expected = expected + 0.25 * np.einsum("...mr,...rn->...mn", a, b)
        np.testing.assert_allclose(leaf, np.where(kept[path], expected, 0), rtol=1e-5, atol=1e-6)
        assert leaf.dtype == jnp.float32
    jp.check_pruned(merged, masks)
    assert np.count_nonzero(merged["layers"]["up"]) == np.count_nonzero(masks["layers"]["up"])


def zip_paths(tree):
    return list(zip(jp.leaf_paths(tree), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_the_sum_is_rounded_once_to_the_dtype_of_the_leaf(dtype):
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    leaf = (rng.integers(-64, 64, (2, 8, 8)) / 16).astype(kind)
    a, b = rng.integers(-8, 8, (2, 8, 2)), rng.integers(-8, 8, (2, 2, 8))
    adapters = {"w": jp.lora.Adapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))}
    mask = rng.random(leaf.shape) < 0.5
    merged = jp.lora.merge({"w": jnp.asarray(leaf)}, adapters, {"w": jnp.asarray(mask)}, scale=1 / 1024)["w"]
    exact = leaf.astype(np.float64) + (a @ b) / 1024  # float32 holds it
    assert merged.dtype == kind
    np.testing.assert_array_equal(
        np.asarray(merged).astype(np.float64), np.where(mask, exact.astype(kind).astype(np.float64), 0)
    )
    assert not np.array_equal(exact.astype(kind).astype(np.float64), exact)


def test_leaves_without_an_adapter_keep_their_bytes():
    params = {
        "w": jnp.ones((4, 4)),
        "steps": jnp.arange(3),
        "key": jax.random.key(3),
        "odd": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45]),
        "mapped": np.arange(4.0, dtype=np.float32),
    }
    adapters = trained(jp.lora.init(params, 1, key=jax.random.key(0), where=jp.matching("w")))
    without = jp.lora.merge(params, adapters, scale=1.0)
    assert all(without[name] is params[name] for name in params if name != "w")
    masks = jp.ones_masks(params)
    masks["w"] = masks["w"].at[0].set(False)
    merged = jp.lora.merge(params, adapters, masks, scale=1.0)
    assert merged["key"] is params["key"]
    for name in ("steps", "odd", "mapped"):
        assert bits(merged[name]) == bits(params[name]) and merged[name].dtype == params[name].dtype
    assert not merged["w"][0].any() and bool(jnp.all(merged["w"][1:] != 1))


def test_masks_prune_leaves_without_an_adapter_too():
    dense = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    masks = jax.tree.map(lambda leaf: jnp.eye(4, dtype=bool), dense)
    adapters = jp.lora.init(dense, 1, key=jax.random.key(0), where=jp.matching("w"))
    jp.check_pruned(jp.lora.merge(dense, adapters, masks, scale=1.0), masks)


# Where adapters start


def test_new_adapters_change_nothing_and_are_drawn_for_each_leaf():
    params, masks = pruned(stacked_params(jnp.bfloat16))
    adapters = jp.lora.init(params, 2, key=jax.random.key(0))
    assert {path: (a.shape, b.shape) for path, (a, b) in adapters.items()} == {
        "head": ((WIDTH, 2), (2, 4)),
        "layers/down": ((DEPTH, HIDDEN, 2), (DEPTH, 2, WIDTH)),
        "layers/up": ((DEPTH, WIDTH, 2), (DEPTH, 2, HIDDEN)),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    assert bits(jp.lora.merge(params, adapters, masks, scale=2.0)) == bits(params)
    one, other = adapters["head"].a, adapters["layers/up"].a[0]
    assert not np.array_equal(one, other)


def test_a_is_normal_with_the_variance_of_one_over_its_rows():
    large = {"w": jax.ShapeDtypeStruct((400, 300), jnp.float32)}
    a, b = jp.lora.init(large, 50, key=jax.random.key(0))["w"]
    assert abs(float(jnp.mean(a))) < 3e-3 and abs(float(jnp.std(a)) * 20 - 1) < 0.03
    assert not b.any()


# Training


def test_adapters_are_trained_under_the_masks_and_merged_into_the_same_network():
    dense = stacked_params()
    params, masks = pruned(dense)
    x = jax.random.normal(jax.random.key(5), (128, WIDTH))
    target = apply_fn(dense, x)
    adapters = jp.lora.init(params, 2, key=jax.random.key(1))
    tx = optax.adam(1e-2)

    def forward(adapters):
        return apply_fn(jp.lora.merge(params, adapters, masks, scale=2.0), x)

    @jax.jit
    def step(adapters, opt_state):
        loss, grads = jax.value_and_grad(lambda it: jnp.mean((forward(it) - target) ** 2))(adapters)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(adapters, updates), opt_state, loss

    opt_state, losses = tx.init(adapters), []
    for _ in range(150):
        adapters, opt_state, loss = step(adapters, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]

    merged = jax.jit(lambda it: jp.lora.merge(params, it, masks, scale=2.0))(adapters)
    jp.check_pruned(merged, masks)
    kept = merged["layers"]["up"].reshape(DEPTH, WIDTH // 4, 4, HIDDEN)
    assert int(jnp.max(jnp.count_nonzero(kept, axis=2))) == 2
    np.testing.assert_allclose(apply_fn(merged, x), jax.jit(forward)(adapters), rtol=1e-5, atol=1e-5)
    # Merged without the masks it is another network, in which nothing is pruned any more.
    filled = jp.lora.merge(params, adapters, scale=2.0)
    assert jnp.count_nonzero(filled["layers"]["up"]) > 1.8 * jnp.count_nonzero(merged["layers"]["up"])


def test_gradients_reach_adapters_by_what_the_masks_keep_and_leaves_without_one():
    params, masks = pruned(stacked_params())
    adapters = trained(jp.lora.init(params, 2, key=jax.random.key(1), where=jp.matching("*up", "*down")))
    x = jax.random.normal(jax.random.key(5), (16, WIDTH))

    def loss(params, adapters):
        return jnp.mean(apply_fn(jp.lora.merge(params, adapters, masks, scale=0.5), x) ** 2)

    of_params, of_adapters = jax.jit(jax.grad(loss, (0, 1)))(params, adapters)
    assert not of_params["layers"]["up"].any() and not of_params["layers"]["down"].any()
    assert of_params["layers"]["bias"].any() and of_params["head"].any()
    merged = jp.lora.merge(params, adapters, masks, scale=0.5)
    of_merged = jax.jit(jax.grad(lambda it: jnp.mean(apply_fn(it, x) ** 2)))(merged)
    for name in ("up", "down"):
        (a, b), found = adapters[f"layers/{name}"], of_adapters[f"layers/{name}"]
        kept = np.where(masks["layers"][name], of_merged["layers"][name], 0).astype(np.float64)
        np.testing.assert_allclose(found.a, 0.5 * kept @ np.swapaxes(b, -1, -2), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.b, 0.5 * np.swapaxes(a, -1, -2) @ kept, rtol=1e-4, atol=1e-6)


def test_trees_of_nnx_and_equinox():
    eqx = pytest.importorskip("equinox")
    graph, state = nnx.split(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    mlp, _ = eqx.partition(eqx.nn.MLP(6, 5, 8, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    for params, name in ((state, "kernel"), (mlp, "layers/0/weight")):
        masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
        params = jp.apply_masks(params, masks)
        adapters = trained(jp.lora.init(params, 1, key=jax.random.key(1)))
        assert name in adapters
        merged = jp.lora.merge(params, adapters, masks, scale=1.0)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        jp.check_pruned(merged, masks)
    np.testing.assert_allclose(
        nnx.merge(
            graph, jp.lora.merge(state, trained(jp.lora.init(state, 1, key=jax.random.key(1))), scale=0)
        )(jnp.ones((2, 6))),
        nnx.merge(graph, state)(jnp.ones((2, 6))),
    )


# What is refused


ONE = {"w": jnp.ones((4, 6)), "bias": jnp.ones(6), "steps": jnp.arange(6).reshape(2, 3)}
GOOD = jp.lora.Adapter(jnp.ones((4, 1)), jnp.ones((1, 6)))


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"rank": 0}, ValueError, "rank must be an integer of 1 or more, got 0"),
        ({"rank": 1.5}, TypeError, "rank must be"),
        ({"rank": 3}, ValueError, r"rank 3 has more entries, 3 x \(4 \+ 6\) .*'w'"),
        ({"where": jp.matching("bias")}, ValueError, "'bias'.* needs a matrix"),
        ({"where": jp.matching("steps")}, TypeError, "'steps'.* only floating-point"),
        ({"where": jp.matching("nothing")}, ValueError, "matches no leaf"),
        ({"key": 3}, TypeError, "needs one PRNG key"),
        ({"params": jp.scores.magnitude}, TypeError, "params must be a pytree"),
    ],
)
def test_init_names_what_is_wrong(given, error, says):
    given = {"params": ONE, "rank": 1, "where": jp.matching("w"), "key": jax.random.key(0)} | given
    with pytest.raises(error, match=says):
        jp.lora.init(given.pop("params"), given.pop("rank"), **given)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"adapters": [GOOD]}, TypeError, "must be a dict from leaf path to Adapter, got a list"),
        ({"adapters": {}}, ValueError, "empty dict"),
        (
            {"adapters": {"w": (GOOD.a, GOOD.b)}},
            TypeError,
            r"adapters\['w'\] must be a jaxprune.lora.Adapter",
        ),
        ({"adapters": {"v": GOOD}}, ValueError, r"adapters\['v'\] fits no leaf of params.* bias, steps, w"),
        ({"adapters": {"w": GOOD._replace(b=1)}}, TypeError, r"adapters\['w'\]\.b must be .* got 1"),
        (
            {"adapters": {"w": GOOD._replace(a=jnp.ones((4, 2)))}},
            ValueError,
            r"\(4, 2\) and \(1, 6\) .* \(4, 6\)",
        ),
        ({"adapters": {"bias": GOOD}}, ValueError, r"does not fit params\['bias'\]"),
        ({"adapters": {"steps": GOOD}}, TypeError, r"'steps'.* only floating-point"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": "2"}, TypeError, "scale must be a number"),
        ({"masks": {"w": jnp.ones((4, 6))}}, ValueError, "masks must have the tree structure"),
    ],
)
def test_merge_names_what_is_wrong(given, error, says):
    given = {"params": ONE, "adapters": {"w": GOOD}, "masks": None, "scale": 1.0} | given
    with pytest.raises(error, match=says):
        jp.lora.merge(given["params"], given["adapters"], given["masks"], scale=given["scale"])
