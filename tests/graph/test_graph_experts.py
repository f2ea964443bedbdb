"""Experts: some can be removed where the routing allows it, and their hidden units always can."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import channel_groups, compact
from tests.oracles.equivalence import Dense, check_facts, random_masks, zero_units

TOKENS, EXPERTS, WIDTH, HIDDEN = 7, 5, 6, 4


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def draw(rng, **more):
    shapes = {
        "router": (WIDTH, EXPERTS),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
        "out": (WIDTH, 3),
    }
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in {**shapes, **more}.items()}
    return params, jnp.asarray(rng.normal(size=(TOKENS, WIDTH)))


def by_einsum(gates, p, x):
    """Every expert on every token, mixed."""
    hidden = jax.nn.relu(jnp.einsum("td,edh->eth", x, p["up"]))
    given = jnp.einsum("eth,ehd->ted", hidden, p["down"])
    return (x + jnp.einsum("te,ted->td", gates(x @ p["router"]), given)) @ p["out"]


def by_capacity(p, x):
    """Experts with room for the first three tokens each; other tokens pass them by."""
    probabilities = jax.nn.softmax(x @ p["router"])
    chosen = jax.nn.one_hot(jnp.argmax(probabilities, -1), EXPERTS)
    place = jnp.cumsum(chosen, 0) * chosen - 1
    room = jax.nn.one_hot(place.astype(int), 3) * chosen[..., None]
    inputs = jnp.einsum("tec,td->ecd", room, x)
    given = jnp.einsum("ecd,edh,ehf->ecf", inputs, p["up"], p["down"])
    return (x + jnp.einsum("tec,te,ecd->td", room, probabilities, given)) @ p["out"]


def best_two(logits):
    values, places = lax.top_k(jax.nn.softmax(logits), 2)
    values /= values.sum(-1, keepdims=True)
    return jnp.einsum("tke,tk->te", jax.nn.one_hot(places, EXPERTS), values)


def best_two_of_logits(logits):
    values, places = lax.top_k(logits, 2)
    return (jax.nn.one_hot(places, EXPERTS) * jax.nn.softmax(values)[..., None]).sum(1)


def switch(logits):
    return jax.nn.one_hot(jnp.argmax(logits, -1), EXPERTS) * jax.nn.softmax(logits)


def above_the_second(logits):
    least = lax.top_k(logits, 2)[0][:, -1:]
    return jnp.where(logits >= least, jax.nn.sigmoid(logits), 0.0)


def of_scattered(logits):
    values, places = lax.top_k(logits, 2)
    return jnp.zeros_like(logits).at[jnp.arange(TOKENS)[:, None], places].set(values)


TOGETHER = {"router", "up", "down"}
ROUTED = {
    "sigmoid": (partial(by_einsum, jax.nn.sigmoid), TOGETHER),
    "softmax": (partial(by_einsum, jax.nn.softmax), TOGETHER),
    "switch": (partial(by_einsum, switch), TOGETHER),
    "above": (partial(by_einsum, above_the_second), TOGETHER),
    "capacity": (by_capacity, TOGETHER),
    # The chosen indices are read as numbers, so the router keeps its columns.
    "best_two": (partial(by_einsum, best_two), {"up", "down"}),
    "best_two_of_logits": (partial(by_einsum, best_two_of_logits), {"up", "down"}),
}


@pytest.mark.parametrize("name", ROUTED)
def test_experts_are_removed(name):
    function, members = ROUTED[name]
    rng = np.random.default_rng(0)
    p, x = draw(rng)
    groups = channel_groups(function, p, x)
    found = {frozenset(m.path for m in g.members): g for g in groups if g.units == EXPERTS}
    assert list(found) == [members] and found[frozenset(members)].removable
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in p.items()}
    for path in TOGETHER:  # the router's columns too: their logits are 0 then, and may be chosen
        np.moveaxis(masks[path], 1 if path == "router" else 0, 0)[[1, 3]] = False
    masked = {path: np.where(masks[path], leaf, 0) for path, leaf in p.items()}
    assert check_facts(function, masked, masks, [x], rng)
    weights = [rng.normal(size=(TOKENS, 3))]
    taken = zero_units(rng, random_masks(rng, p, "none"), groups)
    dense = Dense([function], p, [x], [weights])
    (small,) = dense.check([masks], rng)
    assert small.params["up"].shape == (3, WIDTH, HIDDEN)
    assert small.params["router"].shape == (WIDTH, 3 if "router" in members else EXPERTS)
    (small,) = dense.check([taken], rng)
    assert small.params["up"].shape[0] < EXPERTS and small.params["up"].shape[2] < HIDDEN


def test_a_masked_column_may_still_be_chosen():
    """Its logit is 0, above negative ones: both networks pass such tokens by."""
    p, x = draw(np.random.default_rng(1))
    function = partial(by_einsum, switch)
    x, p["router"] = jnp.abs(x), -jnp.abs(p["router"])
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in p.items()}
    masks["router"][:, 2], masks["up"][2], masks["down"][2] = False, False, False
    small = compact(function, p, masks, x)
    assert small.params["router"].shape == (WIDTH, EXPERTS - 1)
    np.testing.assert_allclose(small.apply(small.params, x), x @ p["out"], atol=1e-12)


def test_a_choice_among_the_experts_left():
    """A bias of the router, which is not part of an expert's unit, keeps tokens from removed experts."""
    rng = np.random.default_rng(2)
    p, x = draw(rng, bias=(EXPERTS,))

    def function(p, x):
        return by_einsum(lambda logits: best_two(logits + p["bias"]), p, x)

    masks = {path: np.ones(leaf.shape, bool) for path, leaf in p.items()}
    masks["up"][[0, 4]], masks["down"][[0, 4]] = False, False
    p["bias"] = jnp.zeros(EXPERTS).at[jnp.array([0, 4])].set(-1e9)
    small = compact(function, p, masks, x)
    assert small.params["up"].shape[0] == 3 and small.params["router"].shape == (WIDTH, EXPERTS)
    among = {**p, "router": p["router"][:, 1:4], "up": p["up"][1:4], "down": p["down"][1:4]}

    def of_three(logits):
        values, places = lax.top_k(jax.nn.softmax(logits), 2)
        return jnp.einsum("tke,tk->te", jax.nn.one_hot(places, 3), values / values.sum(-1, keepdims=True))

    np.testing.assert_allclose(
        small.apply(small.params, x), by_einsum(of_three, among, x), rtol=1e-10, atol=1e-10
    )


def by_rows(p, x):
    """Tokens sorted by expert, and a ragged product."""
    chosen = jnp.argmax(x @ p["router"], -1)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=EXPERTS)
    h = jax.nn.silu(lax.ragged_dot(x[order], p["up"], sizes))
    y = lax.ragged_dot(h, p["down"], sizes)
    return (x + jnp.zeros_like(y).at[order].set(y)) @ p["out"]


def by_lookup(p, x):
    """Each token fetches the weights of its expert."""
    chosen = jnp.argmax(x @ p["router"], -1)
    hidden = jnp.tanh(jnp.einsum("td,tdh->th", x, p["up"][chosen]))
    return (x + jnp.einsum("th,thd->td", hidden, p["down"][chosen])) @ p["out"]


def with_balance(p, x):
    """An output that reads how often each expert was chosen."""
    logits = x @ p["router"]
    often = jax.nn.one_hot(jnp.argmax(logits, -1), EXPERTS).mean(0)
    return by_einsum(switch, p, x), often @ jax.nn.softmax(logits).mean(0)


REFUSED = {
    "rows": (by_rows, "ragged_dot_general at test_graph_experts.py:", True),
    "lookup": (by_lookup, "gather at test_graph_experts.py:", True),
    "scatter": (partial(by_einsum, of_scattered), "scatter at test_graph_experts.py:", True),
    "balance": (with_balance, "sums it with slices that are not zero", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_experts_cannot_be_removed_the_op_is_named(name):
    function, why, pinned = REFUSED[name]
    rng = np.random.default_rng(3)
    p, x = draw(rng)
    groups = channel_groups(function, p, x)
    if pinned:
        (reason,) = [whole.why for whole in groups.whole if ("up", 0) in whole.members]
    else:
        (reason,) = [g.why_not for g in groups if g.units == EXPERTS]
    assert why in reason
    # Hidden units can be removed all the same, at the same index in every expert.
    (hidden,) = [g for g in groups.removable() if g.units == HIDDEN]
    assert {m.path for m in hidden.members} == {"up", "down"}
    masks = zero_units(rng, random_masks(rng, p, "none"), groups)
    single = (lambda p, x: function(p, x)[0]) if name == "balance" else function
    (small,) = Dense([single], p, [x], [[rng.normal(size=(TOKENS, 3))]]).check([masks], rng)
    assert small.params["up"].shape[0] == EXPERTS and small.params["up"].shape[2] < HIDDEN


def test_the_classes_that_a_network_chooses_from_are_kept():
    p = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 5))}
    for choose in (partial(jnp.argmax, axis=-1), lambda h: lax.top_k(h, 2), lambda h: jnp.argmin(h, -1)):
        groups = channel_groups(
            lambda p, x, choose=choose: choose(jnp.tanh(x @ p["a"]) @ p["b"]), p, jnp.ones((2, 3))
        )
        assert [g.units for g in groups] == [6]
        (why,) = [whole.why for whole in groups.whole if ("b", 1) in whole.members]
        assert why.endswith("reads all of it")
