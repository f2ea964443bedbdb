"""Values that several layers read do not tie the layers: constants, masks of data, shared params.

A network that makes a table once for all of its layers is compared with one that makes it again in each
layer, where nothing can tie them: the groups are the same, and so are the small networks under any masks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import channel_groups, compact
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.rules.per_reader import NAME
from tests.oracles.equivalence import Dense, check_facts, random_masks, removed, zero_units

LAYERS, HEADS, WIDTH, LENGTH = 3, 3, 2, 4
FEATURES = HEADS * WIDTH


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def params_of(rng):
    def one(*shape):
        return jnp.asarray(rng.normal(size=shape))

    layers = [{n: one(FEATURES, FEATURES) for n in "qkvo"} for _ in range(LAYERS)]
    return {f"l{n}": layer for n, layer in enumerate(layers)} | {"head": one(FEATURES, 2)}


def attend(meet, tables, p, x):
    """Attention layers, each of which combines its scores with a table: `meet(scores, tables(layer))`."""
    for n in range(LAYERS):
        w, table = p[f"l{n}"], tables(n)
        q, k, v = ((x @ w[name]).reshape(*x.shape[:-1], HEADS, WIDTH) for name in "qkv")
        scores = jax.nn.softmax(meet(jnp.einsum("bqhd,bkhd->bhqk", q, k), table))
        x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape) @ w["o"]
    return x @ p["head"]


def made_once(make, meet, p, x, *inputs):
    table = make(p, *inputs)
    return attend(meet, lambda _: table, p, x)


def made_again(make, meet, p, x, *inputs):
    return attend(meet, lambda _: make(p, *inputs), p, x)


DISTANCE = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
SLOPES = 2.0 ** -np.arange(1, 1 + HEADS)


def alibi(p):
    return jnp.asarray(SLOPES)[:, None, None] * DISTANCE


def random_table(p):
    """A chain of ops with one that has no rule, and a broadcast at the end."""
    table = jax.random.normal(jax.random.key(1), (HEADS, 1, LENGTH))
    return jnp.broadcast_to(jax.jit(jnp.tanh)(table), (HEADS, LENGTH, LENGTH))


def large_table(p):
    """A table cut out of a constant that is too large to be evaluated: 2**21 entries a head."""
    large = jnp.asarray(np.sin(np.arange(HEADS * 2**21, dtype=np.float32))).reshape(HEADS, -1)
    return large[:, : LENGTH**2].reshape(HEADS, LENGTH, LENGTH).astype(float)


def of_heads(p):
    return jnp.arange(HEADS)[:, None, None] % 2 + jnp.eye(LENGTH)


def mask_of_data(p, given):
    return jnp.broadcast_to(
        jnp.where(given[:, None, None, :] > 0, 0.0, -2.0), (2, HEADS, LENGTH, LENGTH)
    ) + alibi(p)


def positions_of_data(p, given):
    """Tables of a rotation, whose frequencies are constants and whose positions are data."""
    turned = jnp.einsum("bs,h->bhs", given, SLOPES)
    return jnp.concatenate([jnp.sin(turned)[..., None], jnp.cos(turned)[..., None]], -1)


def add(scores, table):
    return scores + table


def twice(scores, table):
    return scores * table + jnp.einsum("hqk,hqk->hq", table, table)[:, :, None]


@jax.custom_jvp
def bent(scores, table):
    return scores * table + jnp.sin(table)


@bent.defjvp
def _bent_jvp(primals, tangents):
    (scores, table), (moved, _) = primals, tangents
    return bent(scores, table), moved * jnp.cos(table) * table


def in_a_scan(scores, table):
    def step(carry, row):
        return carry * table + jnp.cos(table), row * table[:, 0, 0]

    carry, rows = lax.scan(step, scores, jnp.moveaxis(scores[..., 0, 0], 0, 0)[:, None] * jnp.ones((1, 2, 1)))
    return carry + rows.sum((0, 1))[:, None, None]


def in_a_branch(scores, table):
    return lax.cond(table.sum() > 0, lambda s: s + table * table, lambda s: s * jnp.sin(table), scores)


@jax.checkpoint
def in_a_checkpoint(scores, table):
    return scores * table + jnp.exp(table)


def closed_over(scores, table):
    @jax.checkpoint
    def body(scores):
        return scores * table + table

    return body(scores)


def rotate(scores, table):
    return scores * table[..., :1] + jnp.cumsum(scores, -1) * table[..., 1:]


MADE = {
    "alibi": (alibi, add),
    "random": (random_table, add),
    "large": (large_table, add),
    "heads": (of_heads, add),
    "twice": (alibi, twice),
    "custom_jvp": (alibi, bent),
    "scan": (alibi, in_a_scan),
    "cond": (random_table, in_a_branch),
    "checkpoint": (alibi, in_a_checkpoint),
    "closed_over": (random_table, closed_over),
}
OF_DATA = {"mask": (mask_of_data, add), "rotation": (positions_of_data, rotate)}
CASES = {
    **{name: (*case, ()) for name, case in MADE.items()},
    "mask": (mask_of_data, add, ((2, LENGTH),)),
    "rotation": (positions_of_data, rotate, ((2, LENGTH),)),
}


def summary(groups):
    return [
        (group.name, group.units, group.removable, [(m.path, m.axis) for m in group.members])
        for group in groups
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_table_made_once_ties_no_layers(name):
    make, meet, shapes = CASES[name]
    rng = np.random.default_rng(0)
    p = params_of(rng)
    x, *inputs = (jnp.asarray(rng.normal(size=s)) for s in ((2, LENGTH, FEATURES), *shapes))
    once, again = (partial(f, make, meet) for f in (made_once, made_again))
    groups = channel_groups(once, p, x, *inputs)
    assert summary(groups) == summary(channel_groups(again, p, x, *inputs))
    assert [g.units for g in groups.removable()] == [HEADS] * LAYERS


@pytest.mark.parametrize("name", CASES)
def test_each_layer_reads_its_part_of_a_table(name):
    make, meet, shapes = CASES[name]
    rng = np.random.default_rng(1)
    p = params_of(rng)
    inputs = [jnp.asarray(rng.normal(size=s)) for s in ((2, LENGTH, FEATURES), *shapes)]
    flat = {f"{layer}{n}": w for layer, ws in p.items() if layer != "head" for n, w in ws.items()}
    flat["head"] = p["head"]

    def function(flat, *inputs):
        tree = {f"l{n}": {name: flat[f"l{n}{name}"] for name in "qkvo"} for n in range(LAYERS)}
        return made_once(make, meet, tree | {"head": flat["head"]}, *inputs)

    masks = zero_units(rng, random_masks(rng, flat, "none"), channel_groups(function, flat, *inputs))
    masked = jax.tree.map(jnp.where, masks, flat, jax.tree.map(jnp.zeros_like, flat))
    assert check_facts(function, masked, masks, inputs, rng)
    weights = [rng.normal(size=(2, LENGTH, 2))]
    (small,) = Dense([function], flat, inputs, [weights]).check([masks], rng)
    assert removed(small)


def shared_bias(p, *_):
    """A bias for each head and distance, looked up once for all layers."""
    return p["bias"][np.abs(DISTANCE)].transpose(2, 0, 1)


def gate(p, *_):
    return jax.nn.sigmoid(p["gate"])[:, None, None] * jnp.ones((1, LENGTH, LENGTH))


SHARED = {
    "bias": (shared_bias, add, {"bias": (LENGTH, HEADS)}),
    "gate": (gate, lambda scores, table: scores * table, {"gate": (HEADS,)}),
    "twice": (shared_bias, twice, {"bias": (LENGTH, HEADS)}),
    "masked": (
        lambda p: shared_bias(p) + jnp.where(DISTANCE > 0, -1.0, 0.0),
        add,
        {"bias": (LENGTH, HEADS)},
    ),
}


def without_heads(p, **removed):
    """Masks without some heads of some layers."""
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), p)
    for layer, heads in removed.items():
        for head in heads:
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            for name in "qkv":
                masks[layer][name][:, part] = False
            masks[layer]["o"][part] = False
    return masks


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_param_keeps_what_any_of_its_readers_keeps(name):
    make, meet, more = SHARED[name]
    rng = np.random.default_rng(2)
    p = params_of(rng) | {n: jnp.asarray(rng.normal(size=s)) for n, s in more.items()}
    x = jnp.asarray(rng.normal(size=(2, LENGTH, FEATURES)))
    function = partial(made_once, make, meet)
    groups = channel_groups(function, p, x)
    (shared,) = more
    assert [g.units for g in groups.removable()] == [HEADS] * LAYERS
    assert all(m.path != shared for g in groups for m in g.members)
    assert any((shared, len(more[shared]) - 1) in whole.members for whole in groups.whole)
    apart = without_heads(p, l0=[1], l1=[0, 2], l2=[1])
    for masks, left in ((apart, 3), (without_heads(p, l0=[1], l1=[1, 2], l2=[0, 1]), 2)):
        small = compact(function, p, masks, x)
        assert small.plan.small_shape(shared)[-1] == left
        assert [small.plan.small_shape(f"l{n}/q")[1] // WIDTH for n in range(LAYERS)] == [
            HEADS - (~masks[f"l{n}"]["o"].any(1)).sum() // WIDTH for n in range(LAYERS)
        ]
        # The small network equals the masked one, and the dense one for any small params.
        masked = jax.tree.map(jnp.where, masks, p, jax.tree.map(jnp.zeros_like, p))
        np.testing.assert_allclose(small.apply(small.params, x), function(masked, x), rtol=1e-11, atol=1e-11)
        moved = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape), small.params)
        np.testing.assert_allclose(
            small.apply(moved, x), function(small.expand(moved), x), rtol=1e-10, atol=1e-10
        )
        again = compact(function, p, small.plan, x)
        assert jax.tree.map(jnp.shape, again.params) == jax.tree.map(jnp.shape, small.params)


def test_readers_that_other_constraints_tie_stay_tied():
    rng = np.random.default_rng(3)
    x = jnp.arange(4)
    p = {n: jnp.asarray(rng.normal(size=s)) for n, s in (("e", (9, 6)), ("a", (6, 5)), ("b", (5, 6)))}

    def embedded(p, x):
        h = p["e"][x] * 2.0
        return (h + jnp.tanh(h @ p["a"]) @ p["b"]) @ p["e"].T

    def recurrent(p, x):  # without a residual stream
        return jnp.tanh(p["e"][x] @ p["a"]) @ p["b"] @ p["e"].T

    def applied_twice(p, x):
        for _ in range(2):
            x = x + jnp.tanh(x @ p["a"]) @ p["b"]
        return x

    for function in (embedded, recurrent):
        found = {
            g.name: (g.units, sorted(f"{m.path}{m.axis}" for m in g.members))
            for g in channel_groups(function, p, x)
        }
        assert found == {"a[1]": (5, ["a1", "b0"]), "b[1]": (6, ["a0", "b1", "e1"])}
    (group,) = channel_groups(applied_twice, p, jnp.ones((2, 6)))
    assert (group.units, [m.path for m in group.members]) == (5, ["a", "b"])


def test_a_scale_of_two_streams_is_in_no_unit_of_either():
    """Neither stream needs the scale's slice where its own weights after it are zero."""
    rng = np.random.default_rng(4)
    shapes = {"a": (3, 6), "c": (6, 2), "d": (3, 6), "e": (6, 2), "scale": (6,)}
    p = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}

    def function(p, x):
        return (x @ p["a"] * p["scale"]) @ p["c"] + jnp.tanh(x @ p["d"] * p["scale"]) @ p["e"]

    x = jnp.ones((2, 3))
    groups = channel_groups(function, p, x)
    assert [sorted(m.path for m in g.members) for g in groups.removable()] == [["a", "c"], ["d", "e"]]


def test_a_scale_whose_slice_has_to_be_zero_ties_its_readers():
    """relu(bias) does not vanish by itself: where the weights after it are shared, the bias must go too."""
    rng = np.random.default_rng(5)
    p = {n: jnp.asarray(rng.normal(size=s)) for n, s in (("a", (3, 6)), ("d", (3, 6)), ("bias", (6,)))}

    def function(p, x):
        return [jax.nn.relu(x @ p[n] + p["bias"]).sum(1) for n in "ad"]

    (group,) = channel_groups(function, p, jnp.ones((2, 3))).removable()
    assert sorted(m.path for m in group.members) == ["a", "bias", "d"]


def test_constants_that_are_outputs_are_kept_whole():
    table = jnp.arange(6.0)

    def function(p, x):
        return jnp.sin(table), (x @ p["a"] + jnp.sin(table)) @ p["b"], (x @ p["c"] + table) @ p["d"]

    shapes = {"a": (3, 6), "b": (6, 2), "c": (3, 6), "d": (6, 2)}
    p = {n: jnp.ones(s) for n, s in shapes.items()}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), p)
    masks["a"][:, 1], masks["b"][1] = False, False
    masks["d"][2:] = False
    small = compact(function, p, masks, jnp.ones((1, 3)))
    assert small.params["b"].shape == (5, 2) and small.params["d"].shape == (2, 2)
    np.testing.assert_array_equal(small.apply(small.params, jnp.ones((1, 3)))[0], np.sin(np.arange(6.0)))


def test_equal_slices_are_found_through_a_reader():
    """In a mean over channels of a table that two layers read, dropped channels are counted, not summed."""

    def function(p, x):
        spread = jnp.sin(jnp.broadcast_to(x[:, :1], (4, 6)))
        h = [x @ p[n] + 0 * spread for n in "ab"]
        return [jnp.var(h[n] * spread, axis=1) @ jnp.ones((4, n + 1)) for n in range(2)]

    rng = np.random.default_rng(6)
    p = {n: jnp.asarray(rng.normal(size=(3, 6))) for n in "ab"}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), p)
    masks["a"][:, [0, 2]], masks["b"][:, 3:] = False, False
    x = jnp.asarray(rng.normal(size=(4, 3)))
    (small,) = Dense([function], p, [x], [None]).check([masks], rng)
    assert small.params["a"].shape == (3, 4) and small.params["b"].shape == (3, 3)


def test_a_value_with_one_reader_is_not_copied():
    def function(p, x):
        return (x @ p["a"] + jnp.arange(6.0)) @ p["b"]

    p = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))}
    network = TracedNetwork(function, p, (jnp.ones((1, 3)),))
    assert all(op.name != NAME for op in network.region.ops)


@pytest.mark.parametrize("shared", ["constant", "param"])
def test_layers_under_a_scan_read_different_parts_of_one_table(shared):
    """The layers of a stack keep different heads, and one loop still runs all of them."""
    rng = np.random.default_rng(7)
    p = {n: jnp.asarray(rng.normal(size=(LAYERS, FEATURES, FEATURES))) / 3 for n in "qkvo"}
    p["bias"] = jnp.asarray(rng.normal(size=(LENGTH, HEADS)))
    x = jnp.asarray(rng.normal(size=(2, LENGTH, FEATURES)))

    def function(p, x):
        table = alibi(p) if shared == "constant" else shared_bias(p)

        def layer(x, w):
            q, k, v = ((x @ w[n]).reshape(2, LENGTH, HEADS, WIDTH) for n in "qkv")
            scores = jax.nn.softmax(twice(jnp.einsum("bqhd,bkhd->bhqk", q, k), table))
            return x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape) @ w["o"], None

        return lax.scan(layer, x, {n: p[n] for n in "qkvo"})[0]

    assert [g.units for g in channel_groups(function, p, x).removable()] == [HEADS] * LAYERS
    masks = {name: np.ones(leaf.shape, bool) for name, leaf in p.items()}
    for number, head in enumerate((1, 2, 0)):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        for name in "qkv":
            masks[name][number][:, part] = False
        masks["o"][number][part] = False
    (small,) = Dense([function], p, [x], [[rng.normal(size=x.shape)]]).check([masks], rng)
    assert small.params["o"].shape == (LAYERS, FEATURES - WIDTH, FEATURES)
    eqns = jax.make_jaxpr(small.apply)(small.params, x).eqns
    assert [eqn.primitive.name for eqn in eqns].count("scan") == 1
