"""Whole blocks that `compact` takes out: of loops over stacks, and of lists, tuples and dicts.

The oracles are the masked network, and the network that never had the blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (4, 6))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 2


def block(w, x):
    y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["norm"]
    return x + jax.nn.silu(y @ w["up"] + w["bias"]) @ w["down"]


STACK = {
    "layers": {
        "norm": 1 + normal(1, 4, 6),
        "up": normal(2, 4, 6, 10),
        "bias": normal(3, 4, 10),
        "down": normal(4, 4, 10, 6),
    },
    "head": normal(5, 6, 3),
}
LAYERS = [jax.tree.map(lambda w, n=n: w[n], STACK["layers"]) for n in range(4)]


def scanned(p, x, **how):
    x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, p["layers"], **how)
    return x @ p["head"]


def checkpointed(p, x):
    body = jax.checkpoint(lambda x, w: (block(w, x), None))
    return jax.lax.scan(body, x, p["layers"])[0] @ p["head"]


def counted(p, x):
    x = jax.lax.fori_loop(0, 4, lambda n, x: block(jax.tree.map(lambda w: w[n], p["layers"]), x), x)
    return x @ p["head"]


def cast(p, x):
    return scanned({**p, "layers": jax.tree.map(lambda w: w.astype(jnp.float32) * 1.5, p["layers"])}, x)


def twice(p, x):
    return scanned(p, scanned(p, x) @ p["head"].T)


def numbered(p, x):
    def body(x, given):
        w, n = given
        return x + jnp.tanh(x @ w["up"] + w["bias"] * n) @ w["down"] * n, None

    return jax.lax.scan(body, x, (p["layers"], jnp.arange(4.0)))[0] @ p["head"]


def dead(params, layers):
    masks = jp.ones_masks(params)
    return {**masks, "layers": jax.tree.map(lambda m: m.at[jnp.array(layers)].set(False), masks["layers"])}


def in_layers(path, leaf):
    return int(path.startswith("layers/"))


def compare(function, params, masks, **options):
    """Compacts, and compares with the masked network, and at other params; returns the small one."""
    small = jp.compact(function, params, masks, X, **options)
    np.testing.assert_allclose(
        small.apply(small.params, X), function(jp.apply_masks(params, masks), X), rtol=1e-4, atol=1e-5
    )
    other = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), small.params)
    dense = small.expand(other)
    np.testing.assert_allclose(small.apply(other, X), function(dense, X), rtol=1e-4, atol=1e-4)
    grads = jax.grad(lambda p: (small.apply(p, X) ** 2).sum())(other)
    wanted = small.shrink(jax.grad(lambda p: (function(p, X) ** 2).sum())(dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), grads, wanted)
    return small


FUNCTIONS = {
    "scan": scanned,
    "reversed": lambda p, x: scanned(p, x, reverse=True),
    "unrolled by two": lambda p, x: scanned(p, x, unroll=2),
    "checkpointed": checkpointed,
    "counted": counted,
    "cast": cast,
    "read twice": twice,
    "numbered": numbered,
}


@pytest.mark.parametrize(
    ("name", "layers"),
    [(name, [1, 2] if n % 2 else [1]) for n, name in enumerate(FUNCTIONS)] + [("scan", [0, 1, 3])],
    ids=str,
)
def test_layers_leave_a_loop(name, layers):
    small = compare(FUNCTIONS[name], STACK, dead(STACK, layers))
    left = [n for n in range(4) if n not in layers]
    assert small.params["layers"]["up"].shape == (len(left), 6, 10)
    assert small.keep["layers/up"][0].tolist() == left
    assert not small.not_removed
    if name == "scan":
        program = str(jax.make_jaxpr(small.apply)(small.params, X))
        assert program.count("scan[") == 1 and f"length={len(left)}" in program


def test_layers_go_together_with_channels_of_those_that_stay():
    masks = dead(STACK, [2])
    for n, gone in ((0, [1, 4]), (1, [0, 9]), (3, [5, 6])):
        layers = masks["layers"]
        layers["up"] = layers["up"].at[n, :, jnp.array(gone)].set(False)
        layers["bias"] = layers["bias"].at[n, jnp.array(gone)].set(False)
        layers["down"] = layers["down"].at[n, jnp.array(gone)].set(False)
    small = compare(scanned, STACK, masks)
    assert small.params["layers"]["up"].shape == (3, 6, 8)
    kept = small.keep["layers/up"][2]
    assert kept.shape == (3, 8)
    assert [sorted(set(range(10)) - set(row)) for row in kept.tolist()] == [[1, 4], [0, 9], [5, 6]]


def test_layers_along_another_axis_and_read_by_index():
    moved = {**STACK, "layers": jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), STACK["layers"])}
    masks = dead(STACK, [2])
    masks = {**masks, "layers": jax.tree.map(lambda m: jnp.moveaxis(m, 0, 1), masks["layers"])}

    def function(p, x):
        return scanned({**p, "layers": jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p["layers"])}, x)

    assert compare(function, moved, masks).params["layers"]["up"].shape == (6, 3, 10)

    def indexed(p, x):
        for n in range(4):
            x = block(jax.tree.map(lambda w, n=n: w[n], p["layers"]), x)
        return x @ p["head"]

    small = compare(indexed, STACK, dead(STACK, [2]), stacked=in_layers)
    assert small.params["layers"]["up"].shape == (3, 6, 10)


def of_list(p, x):
    for w in p["blocks"]:
        x = block(w, x)
    return x @ p["head"]


def of_dict(p, x):
    for n in range(4):
        x = block(p[f"block_{n}"], x)
    return x @ p["head"]


def of_net(p, x):
    return of_dict({**p["net"], "head": p["head"]}, x)


HEAD = {"head": STACK["head"]}
BY_NAME = {f"block_{n}": w for n, w in enumerate(LAYERS)}
TREES = {
    "list": (of_list, {"blocks": LAYERS} | HEAD, "blocks/1", lambda p: p["blocks"]),
    "tuple": (of_list, {"blocks": tuple(LAYERS)} | HEAD, "blocks/1", lambda p: p["blocks"]),
    "dict": (of_dict, BY_NAME | HEAD, "block_1", lambda p: p.keys() - {"head"}),
    "dict in a dict": (of_net, {"net": BY_NAME} | HEAD, "net/block_1", lambda p: p["net"]),
}


@pytest.mark.parametrize("name", TREES)
def test_blocks_leave_a_tree(name, tmp_path):
    function, params, gone, blocks = TREES[name]
    masks = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, not _path(path).startswith(gone + "/")), params
    )
    small = compare(function, params, masks)
    assert small.plan.removed == (gone,)
    assert len(blocks(small.params)) == 3
    entries = sum(leaf.size for leaf in jax.tree.leaves(small.params))
    assert small.report().params[1] == entries
    # An optimizer's state loses the block and gets zeros back.
    state = optax.adam(1e-3).init(params)
    shrunk = small.shrink(state)
    assert jax.tree.structure(shrunk[0].mu) == jax.tree.structure(small.params)
    assert jax.tree.structure(small.expand(shrunk)) == jax.tree.structure(state)
    # The plan goes through a file.
    small.plan.save(tmp_path / "plan.npz")
    again = jp.compact(function, params, jp.Plan.load(tmp_path / "plan.npz"), X)
    np.testing.assert_array_equal(again.apply(again.params, X), small.apply(small.params, X))


def _path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def test_a_shorter_list_is_what_the_function_takes():
    params = {"blocks": LAYERS} | HEAD
    masks = jp.ones_masks(params)
    masks["blocks"][0] = jax.tree.map(jnp.zeros_like, masks["blocks"][0])
    small = compare(of_list, params, masks)
    np.testing.assert_allclose(of_list(small.params, X), small.apply(small.params, X), rtol=1e-5)


def post_norm(p, x):
    def body(x, w):
        y = x + jnp.tanh(x @ w["up"] + w["bias"]) @ w["down"]
        return y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5), None

    return jax.lax.scan(body, x, p["layers"])[0] @ p["head"]


def with_outputs(p, x):
    x, means = jax.lax.scan(lambda x, w: ((y := block(w, x)), y.mean()), x, p["layers"])
    return x @ p["head"] + means.sum()


def regularised(p, x):
    return scanned(p, x) + (p["layers"]["norm"] - 1).sum()


@pytest.mark.parametrize("function", [post_norm, with_outputs, regularised])
def test_what_is_needed_stays(function):
    small = compare(function, STACK, dead(STACK, [1]))
    assert small.params["layers"]["up"].shape[0] == 4


def test_one_layer_always_stays():
    small = compare(scanned, STACK, dead(STACK, [0, 1, 2, 3]))
    assert small.params["layers"]["up"].shape == (1, 6, 1)


def test_blocks_that_are_pruned_as_units_go():
    def normed(p, x):
        def body(x, w):
            direction = w["up"] / jnp.sqrt((w["up"] ** 2).sum(0))
            return x + jnp.tanh(x @ direction * w["bias"]) @ w["down"], None

        return jax.lax.scan(body, x, p["layers"])[0] @ p["head"]

    for function in (scanned, normed):
        blocks = jp.residual_blocks(function, STACK, X, stacked=in_layers)
        units = jp.structures.layers(blocks)
        masks = jp.prune_once(STACK, jp.scores.magnitude, count=2, structure=units)
        small = compare(function, STACK, masks)
        # What the function divides by has not been masked, and goes with the rest.
        assert small.params["layers"]["up"].shape[0] == 2


def test_a_plan_that_takes_out_what_another_function_needs_is_refused():
    small = compare(scanned, STACK, dead(STACK, [1]))
    with pytest.raises(ValueError, match=r"takes out .*layers/up\[1\].*not the identity"):
        small.bind(post_norm)(small.params, X)
