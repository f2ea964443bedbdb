"""Stacked layers are compacted like a list of the same layers, each of which has its own leaves."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxprune as jp
from tests.oracles.equivalence import assert_close, fast
from tests.oracles.equivalence import expand as numpy_expand
from tests.oracles.equivalence import shrink as numpy_shrink
from tests.oracles.stacked_networks import by_path, check, half, indices, put_together, size, taken_apart

DATA, HIDDEN = 4, 6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    scale = 1 / np.sqrt(shape[-2] if len(shape) > 1 else 1)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape)) * scale


def blocks(count=2, seed=0):
    """Stacked params of blocks, each with its own hidden units."""
    return {
        "norm": 1 + 0.3 * normal(seed + 1, count, DATA),
        "up": normal(seed + 2, count, DATA, HIDDEN),
        "bias": normal(seed + 3, count, HIDDEN),
        "down": normal(seed + 4, count, HIDDEN, DATA),
    }


def network(layers=None, count=2):
    return {"inner": normal(90, DATA, DATA), "layers": layers or blocks(count), "out": normal(91, DATA, 2)}


def x(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, DATA)))


def block(w, h):
    n = h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 0.1) * w["norm"]
    return h + jnp.tanh(n @ w["up"] + w["bias"]) @ w["down"]


def at(layers, *index):
    """Return one layer of a tree of lists of layers."""
    for number in index:
        layers = jax.tree.map(
            lambda leaf, n=number: leaf[n], layers, is_leaf=lambda leaf: isinstance(leaf, list)
        )
    return layers


def one_by_one(run=block, count=2):
    """Return a network whose params are lists of layers."""

    def net(p, x):
        h = x @ p["inner"]
        for number in range(count):
            h = run(at(p["layers"], number), h)
        return h @ p["out"]

    return net


def scanned(run=block, prepare=lambda layers: layers, **options):
    """Return a network that scans a stack of layers."""

    def net(p, x):
        body = lambda h, w: (run(w, h), None)  # noqa: E731
        return lax.scan(body, x @ p["inner"], prepare(p["layers"]), **options)[0] @ p["out"]

    return net


def in_layers(path, leaf):
    return int(path.startswith("layers"))


# How a function may run through its layers.


def indexed(layers, h):
    for number in range(2):
        h = block(jax.tree.map(lambda leaf, n=number: leaf[n], layers), h)
    return h


def looped(layers, h):
    return lax.fori_loop(0, 2, lambda n, h: block(jax.tree.map(lambda leaf: leaf[n], layers), h), h)


def rematerialised(layers, h):
    body = jax.checkpoint(
        lambda h, w: (block(w, h), None), policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    )
    return lax.scan(body, h, layers)[0]


def around(run):
    return lambda p, x: run(p["layers"], x @ p["inner"]) @ p["out"]


WAYS = {
    "scan": (scanned(), None),
    "remat": (around(rematerialised), None),
    "remat of all": (jax.checkpoint(jax.jit(scanned())), None),
    "fori_loop": (around(looped), None),
    "indices": (around(indexed), in_layers),
    "unrolled": (scanned(unroll=2), None),
    "cast": (scanned(prepare=lambda p: jax.tree.map(lambda w: w * 1.5, p)), None),
    "vmap over the batch": (lambda p, x: jax.vmap(partial(scanned(), p))(x), None),
    "jit in the body": (scanned(jax.jit(block)), None),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_run_through_layers(way):
    net, stacked = WAYS[way]
    scale = 1.5 if way == "cast" else 1
    plain = one_by_one(lambda w, h: block(jax.tree.map(lambda leaf: leaf * scale, w), h))
    seen = check(net, plain, network(), x(), stacked=stacked)
    # A product without a neighbour in the other layers: each keeps half of its own units.
    up = seen.small.keep["layers/up"][2]
    assert up.shape == (2, HIDDEN // 2) and up[0].tolist() != up[1].tolist()
    assert dict(seen.groups.stacks) == dict.fromkeys((f"layers/{name}" for name in blocks()), (0,))


@pytest.mark.parametrize("axis", [1, -1])
def test_layers_along_another_axis(axis):
    moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, min(axis, leaf.ndim - 1)), blocks(3))
    back = lambda p: jax.tree.map(lambda leaf: jnp.moveaxis(leaf, min(axis, leaf.ndim - 1), 0), p)  # noqa: E731
    seen = check(scanned(prepare=back), one_by_one(count=3), network(moved), x())
    kept = seen.small.keep["layers/up"]
    # With masks on one axis of each layer, the other axes stay as they were.
    assert seen.small.params["layers"]["up"].shape[axis] == 3
    assert next(kept[a] for a in sorted(kept, reverse=True)).shape == (3, HIDDEN // 2)
    assert seen.groups.stacks["layers/up"] == (axis % 3,)


def test_layers_within_layers():
    nested = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), blocks(4))
    outer = lambda w, h: lax.scan(lambda h, w: (block(w, h), None), h, w)[0]  # noqa: E731

    def plain(p, x):
        h = x @ p["inner"]
        for index in np.ndindex(2, 2):
            h = block(at(p["layers"], *index), h)
        return h @ p["out"]

    seen = check(scanned(outer), plain, network(nested), x())
    assert seen.small.keep["layers/up"][3].shape == (2, 2, 3)


def test_two_scans_of_one_stack_one_of_them_backwards():
    def net(p, x):
        body = lambda h, w: (block(w, h), None)  # noqa: E731
        h = lax.scan(body, x @ p["inner"], p["layers"])[0]
        return lax.scan(body, h, p["layers"], reverse=True)[0] @ p["out"]

    def plain(p, x):
        h = x @ p["inner"]
        for number in (0, 1, 1, 0):
            h = block(at(p["layers"], number), h)
        return h @ p["out"]

    check(net, plain, network(), x())


@pytest.mark.parametrize("kind", ["mean over models", "one axis of each"])
def test_ensembles_under_vmap(kind):
    p = network(count=3)

    def net(p, x):
        if kind == "mean over models":
            return jax.vmap(lambda w: block(w, x @ p["inner"]))(p["layers"]).mean(0) @ p["out"]
        return jax.vmap(lambda w, x: block(w, x @ p["inner"]) @ p["out"], (0, None), 1)(p["layers"], x)

    def plain(p, x):
        models = [block(at(p["layers"], n), x @ p["inner"]) for n in range(3)]
        outputs = jnp.stack([m @ p["out"] for m in models], 1)
        return outputs.mean(1) if kind == "mean over models" else outputs

    seen = check(net, plain, p, x(), stacked=in_layers)
    assert len(seen.groups.removable()) >= 3


def test_attention_heads_and_what_all_layers_read():
    """A scan over layers that read ALiBi's slopes, a shared bias, and a mask made of data."""
    heads, width = 2, 2
    layers = {"qkv": normal(1, 2, DATA, 3 * heads * width), "o": normal(2, 2, heads * width, DATA)}
    p = network(layers) | {"relative": normal(3, heads, 3, 3)}
    slopes = 2.0 ** -jnp.arange(1.0, heads + 1)[:, None, None] * jnp.arange(3)

    def attend(w, h, bias):
        q, k, v = (a.reshape(2, 3, heads, width) for a in jnp.split(h @ w["qkv"], 3, -1))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
        return h + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 3, -1) @ w["o"]

    def bias(p, x):
        return p["relative"] + slopes + jnp.where(x[:, None, None, :, 0] > 0, 0.0, -1.0)

    net, plain = (
        lambda p, x, make=make: make(partial(attend, bias=bias(p, x)))(p, x) for make in (scanned, one_by_one)
    )
    seen = check(net, plain, p, x())
    assert [g.units for g in seen.groups.removable() if "layers/qkv" in g.name].count(heads) == 2
    assert seen.small.params["layers"]["o"].shape[:2] == (2, heads * width // 2)


# What a body may hold.


@jax.custom_jvp
def bent(x):
    return jnp.where(x > 0, jnp.sin(x), 0.1 * x)


bent.defjvp(lambda primals, tangents: (bent(*primals), tangents[0] * (1 + bent(*primals)) * 0.5))


@jax.custom_vjp
def scaled(x, scale):
    return jnp.tanh(x) * scale


scaled.defvjp(
    lambda x, s: (scaled(x, s), (x, s)), lambda r, g: (0.5 * g * r[1], jnp.sum(g * jnp.tanh(r[0]), (0, 1)))
)


def in_time(w, h):
    """A recurrent layer: a scan over time in a scan over layers."""

    def step(carry, x):
        carry = jnp.tanh(x @ w["up"] + carry @ w["again"])
        return carry, carry

    _, ys = lax.scan(step, jnp.zeros((2, HIDDEN)), jnp.moveaxis(h, 1, 0))
    return h + jnp.moveaxis(ys, 0, 1) @ w["down"]


def mlp(act):
    return lambda w, h: h + act(h @ w["up"] + w["bias"], w) @ w["down"] * w["norm"]


def step_of_a_gradient(w, h):
    """A layer that is trained at test time: it takes a gradient."""
    return h - 0.1 * jax.grad(lambda h: jnp.sum(jnp.tanh(h @ w["up"] + w["bias"]) ** 2))(h) * w["norm"]


def experts(w, h):
    gates = jax.nn.softmax(h @ w["router"])
    hidden = jnp.tanh(jnp.einsum("bsd,edf->bsef", h, w["experts_up"]))
    return h + jnp.einsum("bsef,efd,bse->bsd", hidden, w["experts_down"], gates)


BODIES = {
    "custom_jvp": (mlp(lambda h, w: bent(h)), {}),
    "custom_vjp": (mlp(lambda h, w: scaled(h, w["scale"])), {"scale": (HIDDEN,)}),
    "cond": (
        mlp(lambda h, w: lax.cond(jnp.sum(h) > 0, lambda: h * w["scale"], lambda: jnp.sin(h))),
        {"scale": (HIDDEN,)},
    ),
    "divided": (
        mlp(lambda h, w: jnp.tanh(h / (1 + w["scale"] ** 2) / w["by"])),
        {"scale": (HIDDEN,), "by": (HIDDEN,)},
    ),
    "weight norm": (
        lambda w, h: block(w | {"up": w["up"] / jnp.linalg.norm(w["up"], axis=0) * w["scale"]}, h),
        {"scale": (HIDDEN,)},
    ),
    "lora": (
        lambda w, h: block(w | {"up": w["up"] + w["a"] @ w["b"]}, h),
        {"a": (DATA, 2), "b": (2, HIDDEN)},
    ),
    "in time": (in_time, {"again": (HIDDEN, HIDDEN)}),
    "gradient": (step_of_a_gradient, {}),
    "experts": (
        experts,
        {"router": (DATA, 3), "experts_up": (3, DATA, HIDDEN), "experts_down": (3, HIDDEN, DATA)},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_layers_hold(name):
    body, more = BODIES[name]
    layers = blocks() | {key: normal(50 + n, 2, *shape) for n, (key, shape) in enumerate(more.items())}
    seen = check(scanned(body), one_by_one(body), network(layers), x())
    ups = [path for path in seen.small.keep if path.endswith("up")]
    assert any(seen.small.params["layers"][path.rpartition("/")[2]].shape[-1] == HIDDEN // 2 for path in ups)
    if name in ("divided", "weight norm"):
        assert any(path.startswith("layers/") for path in seen.small.plan.divisors)
    # The rounds are alike, so that they are one loop still.
    assert size(jax.make_jaxpr(seen.small.apply)(seen.small.params, x()).jaxpr)[1] >= 1


def test_what_layers_take_besides_params():
    """Keys of dropout, a number for each layer, and the index of the layer, at which a cache is written."""

    def one(w, h, cache, key, gain, number):
        n = jnp.tanh(h @ w["up"] + w["bias"]) * gain
        n = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, number), 0.7, n.shape), n, 0)
        return h + (n + cache) @ w["down"] * w["norm"], n

    keys, gains = jax.random.split(jax.random.key(1), 2), jnp.array([0.5, 1.5])

    def net(p, x, cache):
        def body(carry, xs):
            h, cache, number = carry
            h, n = one(xs[0], h, lax.dynamic_index_in_dim(cache, number, 0, False), *xs[1:], number)
            return (h, lax.dynamic_update_index_in_dim(cache, n, number, 0), number + 1), jnp.sum(n, -1)

        (h, cache, _), sums = lax.scan(body, (x @ p["inner"], cache, 0), (p["layers"], keys, gains))
        return h @ p["out"], jnp.sum(cache, -1), sums

    def plain(p, x, cache):
        h, sums = x @ p["inner"], []
        for number in range(2):
            w = at(p["layers"], number)
            h, n = one(w, h, cache[number], keys[number], gains[number], number)
            cache = cache.at[number].set(n)
            sums.append(jnp.sum(n, -1))
        return h @ p["out"], jnp.sum(cache, -1), jnp.stack(sums)

    check(net, plain, network(), x(), normal(7, 2, 2, 3, HIDDEN))


@pytest.mark.parametrize("zeros", ["the same", "others", "none"])
def test_constants_of_layers(zeros):
    """A table with a row for each layer, some entries of which are zero, is cut for each layer."""
    table = np.ones((2, HIDDEN)) + np.arange(2 * HIDDEN).reshape(2, HIDDEN) / 9
    if zeros != "none":
        table[0, :2], table[1, -2:] = 0, 0
        table[1] = np.roll(table[1], 2 if zeros == "the same" else 0)

    def one(w, h, row):
        return h + (jnp.tanh(h @ w["up"] + w["bias"]) * row) @ w["down"] * w["norm"]

    def net(p, x):
        body = lambda h, w: (one(w[0], h, w[1]), None)  # noqa: E731
        return lax.scan(body, x @ p["inner"], (p["layers"], jnp.asarray(table)))[0] @ p["out"]

    def plain(p, x):
        h = x @ p["inner"]
        for number in range(2):
            h = one(at(p["layers"], number), h, table[number])
        return h @ p["out"]

    for seed in range(2):
        check(net, plain, network(), x(), alike=False, tied=True, seed=seed)


def test_what_layers_give_is_read_by_other_layers():
    """Skips from one stack to another, the last first."""
    p = network({"a": blocks(), "b": blocks(seed=30) | {"skip": normal(8, 2, HIDDEN, DATA)}})

    def one(w, h):
        n = jnp.tanh(h @ w["up"] + w["bias"])
        return h + n @ w["down"] * w["norm"], n

    def net(p, x):
        h, skips = lax.scan(lambda h, w: one(w, h), x @ p["inner"], p["layers"]["a"])
        body = lambda h, w: (block(w[0], h + w[1] @ w[0]["skip"]), None)  # noqa: E731
        return lax.scan(body, h, (p["layers"]["b"], skips), reverse=True)[0] @ p["out"]

    def plain(p, x):
        h, skips = x @ p["inner"], []
        for number in range(2):
            h, skip = one(at(p["layers"]["a"], number), h)
            skips.append(skip)
        for number in (1, 0):
            w = at(p["layers"]["b"], number)
            h = block(w, h + skips[number] @ w["skip"])
        return h @ p["out"]

    check(net, plain, p, x())


def test_params_that_are_stacked_and_read_otherwise():
    """A sum over all of a stack does not tie its layers; a product with the stack does."""
    penalty = lambda p, x: (scanned()(p, x), jnp.sum(p["layers"]["up"] ** 2))  # noqa: E731
    plain = lambda p, x: (one_by_one()(p, x), sum(jnp.sum(w**2) for w in p["layers"]["up"]))  # noqa: E731
    check(penalty, plain, network(), x())
    tied = lambda p, x: scanned()(p, x) @ p["layers"]["up"].mean(0)[:2]  # noqa: E731
    plain = lambda p, x: one_by_one()(p, x) @ (sum(p["layers"]["up"]) / 2)[:2]  # noqa: E731
    seen = check(tied, plain, network(), x())
    assert not any("layers/up" in m.path and m.axis == 1 for g in seen.groups.removable() for m in g.members)


def test_extrema_of_stacks_that_were_cut():
    """Each layer keeps different rows, and its extrema take its own dropped zeros into account."""

    def net(p, x):
        return scanned()(p, x) + jnp.max(p["layers"]["down"], 1).sum(0)[:2] + jnp.min(p["layers"]["bias"])

    def plain(p, x):
        tops = sum(jnp.max(w, 0) for w in p["layers"]["down"])
        least = [jnp.min(b) for b in p["layers"]["bias"]]
        return one_by_one()(p, x) + tops[:2] + jnp.min(jnp.stack(least))

    layers = blocks() | {"down": -jnp.abs(blocks()["down"]), "bias": jnp.abs(blocks()["bias"])}
    check(net, plain, network(layers), x())


# What compaction makes of them.


def masks_of(net, p, *inputs):
    """Return masks that remove half of each group."""
    structure = jp.structures.channels(jp.channel_groups(net, p, *inputs))
    return jp.prune_once(p, jp.scores.magnitude, 0.5, structure=structure, scope="layerwise")


def test_the_program_does_not_grow_with_the_layers():
    sizes = []
    for count in (3, 6):
        net, p = scanned(), network(count=count)
        small = jp.compact(net, p, masks_of(net, p, x()), x(), verify=False)
        sizes.append(size(jax.make_jaxpr(small.apply)(small.params, x()).jaxpr))
        gradient = jax.make_jaxpr(jax.grad(lambda p, small=small: jnp.sum(small.apply(p, x()))))(small.params)
        sizes.append(size(gradient.jaxpr))
    assert sizes[0] == sizes[2] and sizes[1] == sizes[3]
    assert sizes[0][1] == 1 and sizes[1][1] == 2


def check_other_params(net, small):
    other = jax.tree.map(lambda leaf: leaf + 0.1, small.params)
    assert_close(small.apply(other, x()), net(small.expand(other), x()), "other params")


def hidden_masks(p, gone):
    """Masks without some hidden units of each layer."""
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), p)
    for number, units in enumerate(gone):
        for name, axis in (("up", 1), ("bias", 0), ("down", 0)):
            np.moveaxis(masks["layers"][name][number], axis, 0)[list(units)] = False
    return jax.tree.map(jnp.asarray, masks)


def test_unequal_masks_are_compacted_to_the_largest():
    p, net = network(count=3), scanned()
    masks = hidden_masks(p, [(0, 1, 2, 3), (2,), (1, 5)])
    small = jp.compact(net, p, masks, x())
    check_other_params(net, small)
    keep = small.keep["layers/up"][2]
    assert keep.shape == (3, 5) and keep[1].tolist() == [0, 1, 3, 4, 5]
    # What lives stays, beside units that are masked.
    assert set(keep[0]) >= {4, 5} and set(keep[2]) >= {0, 2, 3, 4}
    assert np.array_equal(small.masks["layers"]["bias"].sum(1), [2, 5, 4])
    for axes in (small.keep["layers/bias"][1], small.keep["layers/down"][1]):
        assert np.array_equal(axes, keep)
    told = {(s.path, s.axis): s for s in small.not_removed}
    assert told["layers/up[0]", 1].count == 3 and told["layers/up[2]", 1].count == 1
    assert ("layers/up[1]", 1) not in told
    assert "equally many slices, and layers/down[1] needs 5" in repr(told["layers/down[2]", 0])


@pytest.mark.parametrize("gone", [[range(6), range(6)], [range(6), (1, 2)], [(), ()]])
def test_layers_that_are_emptied(gone):
    p, net = network(), scanned()
    masks = hidden_masks(p, gone)
    small = jp.compact(net, p, masks, x())
    # A layer that adds nothing goes as a whole, but for one of them.
    left = max(6 - len(units) for units in gone)
    layers = max(sum(len(units) < 6 for units in gone), 1)
    assert small.params["layers"]["up"].shape == (layers, DATA, max(left, 1))
    assert_close(small.apply(small.params, x()), net(jp.apply_masks(p, masks), x()), "the masked network")
    grads = jax.grad(lambda p: jnp.sum(small.apply(p, x()) ** 2))(small.params)
    dense = jax.grad(lambda p: jnp.sum(net(p, x()) ** 2))(small.expand(small.params))
    assert_close(grads, small.shrink(dense), "gradients")


def test_all_that_is_masked_goes():
    p, net = network(), scanned()
    masks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), p)
    small = jp.compact(net, p, masks, x())
    assert small.params["layers"]["up"].shape == (1, 1, 1)
    assert not small.apply(small.params, x()).any()


def test_a_block_beside_things_of_other_layouts():
    """A removed block is put back with the layout of a block that is kept, not of the first dict entry."""
    left, right = (at(blocks(), number) for number in range(2))
    p = {"an_array": normal(1, DATA, DATA), "left": left, "right": right, "z": [normal(3, DATA, 2)]}

    def net(p, x):
        h = x @ p["an_array"]
        for name in ("left", "right"):
            if name in p:
                h = block(p[name], h)
        return h @ p["z"][0]

    masks = jp.ones_masks(p)
    masks["left"] = jax.tree.map(jnp.zeros_like, masks["left"])
    small = jp.compact(net, p, masks, x())
    assert small.params.keys() == {"an_array", "right", "z"}
    dense = small.expand(small.params)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, p)
    assert_close(net(dense, x()), small.apply(small.params, x()), "the dense network")


@pytest.mark.parametrize("multiple", [2, 4])
def test_widths_are_rounded_up_in_all_layers(multiple):
    p, net = network(count=3), scanned()
    masks = hidden_masks(p, [(0, 1, 2, 3), (0, 1, 2), (3, 4, 5)])
    small = jp.compact(net, p, masks, x(), multiple_of=multiple)
    assert small.params["layers"]["up"].shape == (3, DATA, 4)
    assert small.params["layers"]["down"].shape == (3, 4, DATA)
    check_other_params(net, small)


def test_constants_are_folded_into_each_layer():
    """A unit without a kernel leaves tanh(bias), which is folded into the next bias of its layer."""
    layers = blocks() | {"after": normal(9, 2, DATA)}
    body = lambda w, h: h + (jnp.tanh(h @ w["up"] + w["bias"]) @ w["down"] + w["after"])  # noqa: E731
    p, net = network(layers), scanned(body)
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), p)
    for number, units in enumerate([(0, 3), (1, 2)]):
        masks["layers"]["up"][number][:, units] = False
    masks = jax.tree.map(jnp.asarray, masks)
    expected = net(jp.apply_masks(p, masks), x())
    assert jp.compact(net, p, masks, x()).params["layers"]["down"].shape == (2, HIDDEN, DATA)
    small = jp.compact(net, p, masks, x(), fold_constants=True)
    assert small.params["layers"]["down"].shape == (2, HIDDEN - 2, DATA)
    assert small.keep["layers/up"][2].tolist() == [[1, 2, 4, 5], [0, 3, 4, 5]]
    assert_close(small.apply(small.params, x()), expected, "the masked network")
    bias = np.tanh(np.asarray(layers["bias"][1]))[[1, 2]] @ np.asarray(layers["down"][1])[[1, 2]]
    assert_close(small.params["layers"]["after"][1], layers["after"][1] + bias, "the bias of layer 1")


def test_state_of_layers():
    """BatchNorm in each layer of a stack: its statistics are outputs that become smaller."""
    layers = blocks() | {"mean": normal(5, 2, HIDDEN), "var": 1 + normal(6, 2, HIDDEN) ** 2}

    def one(w, h, train):
        n = h @ w["up"]
        mean = n.mean((0, 1)) if train else w["mean"]
        var = ((n - mean) ** 2).mean((0, 1)) if train else w["var"]
        new = {"mean": 0.9 * w["mean"] + 0.1 * mean, "var": 0.9 * w["var"] + 0.1 * var}
        n = (n - mean) / jnp.sqrt(var + 1e-5) + w["bias"]
        return h + jax.nn.relu(n) @ w["down"] * w["norm"], new

    def net(train, p, x):
        h, new = lax.scan(lambda h, w: one(w, h, train), x @ p["inner"], p["layers"])
        return h @ p["out"], {"layers": new}

    p, options = network(layers), {"state": lambda output: output[1]}
    groups = jp.channel_groups(partial(net, False), p, x(), **options)
    list_params, plain = taken_apart(p, groups.stacks), partial(unrolled_state, one)
    list_groups = jp.channel_groups(plain, list_params, x(), **options)
    masks = put_together(half(np.random.default_rng(0), list_groups, list_params), p, groups.stacks)
    small = jp.compact(partial(net, False), p, masks, x(), **options)
    assert small.params["layers"]["mean"].shape == (2, HIDDEN // 2)
    trained = small.bind(partial(net, True), **options)
    for dense, cut in ((partial(net, False), small.apply), (partial(net, True), trained)):
        expected, new = dense(jp.apply_masks(p, masks), x())
        got, small_new = cut(small.params, x())
        assert_close(got, expected, "the masked network")
        assert_close(small_new, small.shrink(new), "the statistics")


def unrolled_state(one, p, x):
    h, news = x @ p["inner"], []
    for number in range(2):
        h, new = one(at(p["layers"], number), h, False)
        news.append(new)
    return h @ p["out"], {"layers": {key: [new[key] for new in news] for key in ("mean", "var")}}


def test_casts_outside_of_the_scan():
    p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), network())
    up = partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float64))
    net, plain = (lambda p, x, run=run: run(up(p), x) for run in (scanned(), one_by_one()))
    seen = check(net, plain, p, x(), gradients=False)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(seen.small.params)} == {"bfloat16"}


# What a plan does for stacks.


@pytest.fixture
def compacted():
    with jax.enable_x64(True):
        p, net = network(), scanned()
        masks = masks_of(net, p, x())
        return net, p, masks, jp.compact(net, p, masks, x(), verify=False)


def test_other_batches_and_transforms(compacted):
    net, p, masks, small = compacted
    masked = jp.apply_masks(p, masks)
    wide = jnp.asarray(np.random.default_rng(3).normal(size=(5, 7, DATA)))
    assert_close(jax.jit(small.apply)(small.params, wide), net(masked, wide), "another batch size")
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small.params)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), masked)
    got = jax.vmap(small.apply, (0, None))(several, x())
    assert_close(got, jax.vmap(net, (0, None))(twice, x()), "under vmap")


def test_plans_of_stacks_on_disk(compacted, tmp_path):
    net, p, masks, small = compacted
    small.plan.save(tmp_path / "plan.npz")
    with np.load(tmp_path / "plan.npz") as arrays:
        assert int(arrays["format"]) == 2
    plan = jp.Plan.load(tmp_path / "plan.npz")
    assert plan.stacks == {f"layers/{name}": (0,) for name in blocks()}
    assert indices(plan.keep) == indices(small.keep)
    again = jp.compact(net, p, plan, x())
    assert_close(again.params, small.params, "params")
    assert_close(again.apply(again.params, x()), net(jp.apply_masks(p, masks), x()), "the masked network")


def test_a_plan_of_format_1_still_works():
    plan = jp.Plan.load(Path(__file__).parents[1] / "data" / "plan_format_1.npz")
    assert dict(plan.stacks) == {} and plan.divisors == {"scale": (0,)}
    p = {"a": {"kernel": normal(1, 3, 6)}, "b": {"kernel": normal(2, 6, 2)}, "scale": 1 + normal(3, 6) ** 2}

    def net(p, x):
        return jnp.tanh(x @ p["a"]["kernel"] / p["scale"]) @ p["b"]["kernel"]

    x = normal(4, 5, 3)
    small = jp.compact(net, p, plan, x)
    kept = np.array([0, 2, 5])
    assert_close(small.params["a"]["kernel"], p["a"]["kernel"][:, kept], "the kernel")
    expected = np.tanh(x @ p["a"]["kernel"][:, kept] / p["scale"][kept]) @ p["b"]["kernel"][kept]
    assert_close(small.apply(small.params, x), jnp.asarray(expected), "three units")
    back = small.expand(small.params)
    assert_close(net(back, x), jnp.asarray(expected), "the dense network")


def test_plans_of_parts_of_params(compacted):
    _, p, _, small = compacted
    part = small.plan.under("layers")
    assert part.stacks == dict.fromkeys(blocks(), (0,))
    assert_close(part.shrink(p["layers"]), small.shrink(p)["layers"], "a part")
    assert_close(part.expand(small.params["layers"]), small.expand(small.params)["layers"], "a part")


def test_shrink_and_expand_are_numpys(compacted):
    _, p, _, small = compacted
    cut, back = small.shrink(p), small.expand(small.params)
    assert_close(by_path(cut), numpy_shrink(small, by_path(p)), "shrink")
    assert_close(by_path(back), numpy_expand(small, by_path(small.params)), "expand")


def test_an_optimizers_state_of_stacks(compacted):
    net, p, masks, small = compacted
    tx = optax.adam(0.1)

    def loss(apply, p):
        return jnp.sum(apply(p, x()) ** 2)

    @fast
    def step(p, state):
        updates, state = tx.update(jax.grad(partial(loss, net))(p), state, p)
        return optax.apply_updates(p, jp.apply_masks(updates, masks)), state

    @fast
    def small_step(p, state):
        updates, state = tx.update(jax.grad(partial(loss, small.apply))(p), state, p)
        return optax.apply_updates(p, updates), state

    dense, state = step(jp.apply_masks(p, masks), tx.init(p))
    got, small_state = small_step(small.params, small.shrink(tx.init(p)))
    assert_close(small.shrink(state), small_state, "the state")
    assert_close(small.shrink(dense), got, "params")


# Libraries of modules.


@pytest.mark.parametrize("axis", [0, 1])
def test_scans_of_linen(axis):
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            n = nn.RMSNorm(name="norm")(h)
            gate, up = (nn.Dense(HIDDEN, use_bias=False, name=name)(n) for name in ("gate", "up"))
            return h + nn.Dense(DATA, use_bias=False, name="down")(nn.silu(gate) * up), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Block, {"params": axis}, split_rngs={"params": True}, length=2)
            h, _ = scan(name="layers")(nn.Dense(DATA, use_bias=False, name="inner")(x), None)
            return nn.Dense(2, use_bias=False, name="out")(h)

    net = Stack()
    # RMSNorm is computed in float32 unless told otherwise.
    p = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), net.init(jax.random.key(0), x()))

    def plain(p, x):
        p = p["params"]
        h = x @ p["inner"]["kernel"]
        for number in range(2):
            w = at(p["layers"], number)
            n = h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * w["norm"]["scale"]
            h = h + (jax.nn.silu(n @ w["gate"]["kernel"]) * (n @ w["up"]["kernel"])) @ w["down"]["kernel"]
        return h @ p["out"]["kernel"]

    seen = check(net.apply, plain, p, x())
    up, keep = (tree["params/layers/up/kernel"] for tree in (by_path(seen.small.params), seen.small.keep))
    assert up.shape[axis] == 2 and keep[2].shape == (2, HIDDEN // 2)
    assert seen.groups.stacks["params/layers/up/kernel"] == (axis,)


def test_scans_of_nnx_as_modules():
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(DATA, HIDDEN, param_dtype=float, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, DATA, param_dtype=float, rngs=rngs)

        def __call__(self, h):
            return h + self.down(nnx.tanh(self.up(h)))

    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=2)(nnx.vmap(Block, in_axes=(0,), out_axes=0))
            self.layers = make(rngs)
            self.out = nnx.Linear(DATA, 2, param_dtype=float, rngs=rngs)

        def __call__(self, x):
            run = nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.out(run(x, self.layers))

    net = Net(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)

    def function(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    masks = masks_of(function, params, x())
    expected = function(jp.apply_masks(params, masks), x())
    small = jp.compact_module(net, masks, x())
    assert small.module is not None, small.why_not
    assert small.module.layers.up.kernel.shape == (2, DATA, HIDDEN // 2)
    assert_close(small.module(x()), expected, "the masked network")


def test_layers_are_made_even_by_whole_heads():
    # Fused queries, keys and values, and heads that went in unequal numbers: 1, 2 and 1 of 4.
    def attention(p, x):
        def body(x, w):
            q, k, v = (a.reshape(*x.shape[:2], 4, 3) for a in jnp.split(x @ w["qkv"], 3, -1))
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
            return x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], 12) @ w["out"], None

        return jax.lax.scan(body, x, p)[0]

    rng = np.random.default_rng(0)
    p = {"qkv": jnp.asarray(rng.normal(size=(3, 6, 36))), "out": jnp.asarray(rng.normal(size=(3, 12, 6)))}
    x = jnp.asarray(rng.normal(size=(2, 5, 6)))
    qkv, out = np.ones((3, 6, 3, 4, 3), bool), np.ones((3, 4, 3, 6), bool)
    for layer, gone in enumerate(([0], [1, 2], [3])):
        qkv[layer, :, :, gone] = out[layer, gone] = False
    masks = {"qkv": jnp.asarray(qkv.reshape(3, 6, 36)), "out": jnp.asarray(out.reshape(3, 12, 6))}
    small = jp.compact(attention, p, masks, x)
    assert small.params["qkv"].shape == (3, 6, 27) and small.params["out"].shape == (3, 9, 6)
    assert {stayed.path for stayed in small.not_removed} == {"qkv[1]", "out[1]"}
    assert all("out[0] needs 9" in s.why or "qkv[0] needs 27" in s.why for s in small.not_removed)
    np.testing.assert_allclose(
        small.apply(small.params, x), attention(jp.apply_masks(p, masks), x), rtol=1e-5, atol=1e-5
    )
