"""Values that pass through a program unchanged where params are zero: claims are checked by running it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import compact, residual_blocks
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.identity import aliases, unchanged_outputs
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.rules import learn_region
from tests.zoo import ZOO

X = jax.random.normal(jax.random.key(0), (2, 3, 4))
PARAMS = {"w": jnp.ones((4, 8)), "v": jnp.ones((8, 4)), "b": jnp.ones(4)}
STACK = {path: jnp.stack([leaf] * 3) for path, leaf in PARAMS.items()}
ALL = ("w", "v", "b")


def branch(p, x):
    return jax.nn.gelu(x @ p["w"]) @ p["v"] + p["b"]


def block(p, x):
    return x + branch(p, x)


def custom(rule):
    @jax.custom_vjp
    def function(p, x):
        return block(p, x)

    function.defvjp(lambda p, x: (block(p, x), (p, x)), lambda kept, ct: jax.vjp(block, *kept)[1](rule(ct)))
    return function


def custom_jvp(rule):
    @jax.custom_jvp
    def function(p, x):
        return block(p, x)

    function.defjvp(lambda given, moved: jax.jvp(block, given, (moved[0], rule(moved[1]))))
    return function


def reversed_axes(x):
    return x.transpose(2, 0, 1)


def back(x):
    return x.transpose(1, 2, 0)


def counted(p, x):
    def step(carry, layer):
        x, count = carry
        return (block(layer, x), count + 1), x

    return lax.scan(step, (x, 0), p)


PASSES = {
    "a sum": (block, PARAMS, ALL, {0: 0}),
    "a sum the other way round": (lambda p, x: branch(p, x) + x, PARAMS, ALL, {0: 0}),
    "a difference": (lambda p, x: x - branch(p, x), PARAMS, ALL, {0: 0}),
    "the params after the activation alone": (block, PARAMS, ("v", "b"), {0: 0}),
    "a gate of one": (lambda p, x: x * (1 + p["b"]) + p["b"], PARAMS, ALL, {0: 0}),
    "a scale of one": (lambda p, x: x / jnp.exp(p["b"]), PARAMS, ALL, {0: 0}),
    "a branch under remat": (lambda p, x: x + jax.checkpoint(branch)(p, x), PARAMS, ALL, {0: 0}),
    "a block under remat": (jax.checkpoint(block), PARAMS, ALL, {0: 0}),
    "a block under jit": (jax.jit(block), PARAMS, ALL, {0: 0}),
    "a cast and back": (lambda p, x: block(p, x.astype(jnp.float32)).astype(x.dtype), PARAMS, ALL, {0: 0}),
    "another shape": (lambda p, x: block(p, x.reshape(6, 4)).reshape(2, 3, 4), PARAMS, ALL, {0: 0}),
    "another order": (
        lambda p, x: back(reversed_axes(x) + reversed_axes(branch(p, x))),
        PARAMS,
        ALL,
        {0: 0},
    ),
    "a second relu": (
        lambda p, x: (jax.nn.relu(x), jax.nn.relu(block(p, jax.nn.relu(x)))),
        PARAMS,
        ALL,
        {},
    ),
    "a derivative backwards": (custom(lambda ct: ct), PARAMS, ALL, {0: 0}),
    "a derivative forwards": (custom_jvp(lambda moved: moved), PARAMS, ALL, {0: 0}),
    "branches": (lambda p, x: lax.cond(x[0, 0, 0] > 0, block, lambda p, x: x, p, x), PARAMS, ALL, {0: 0}),
    "a loop over layers": (
        lambda p, x: lax.scan(lambda x, p: (block(p, x), None), x, p)[0],
        STACK,
        ALL,
        {0: 0},
    ),
    "a loop that counts": (counted, STACK, ALL, {0: 0}),
    "a loop that repeats": (
        lambda p, x: lax.fori_loop(0, 3, lambda _, x: block(p, x), x),
        PARAMS,
        ALL,
        {0: 0},
    ),
}

CHANGES = {
    "nothing is zero": (block, PARAMS, ()),
    "a bias stays": (block, PARAMS, ("w", "v")),
    "no sum": (branch, PARAMS, ALL),
    "a norm after the sum": (lambda p, x: jax.nn.standardize(block(p, x)), PARAMS, ALL),
    "an activation after the sum": (lambda p, x: jax.nn.relu(block(p, x)), PARAMS, ALL),
    "a scale after the sum": (lambda p, x: block(p, x) / 2**0.5, PARAMS, ALL),
    "a gate of a half": (lambda p, x: x * jax.nn.sigmoid(p["b"]) + branch(p, x), PARAMS, ALL),
    "a cast that rounds": (lambda p, x: block(p, x.astype(jnp.bfloat16)).astype(x.dtype), PARAMS, ALL),
    "no gradient": (lambda p, x: lax.stop_gradient(x) + branch(p, x), PARAMS, ALL),
    "another order": (lambda p, x: block(p, x)[:, ::-1], PARAMS, ALL),
    "a transpose of the other axes": (
        lambda p, x: (x.transpose(1, 2, 0) + 0 * p["w"][0, 0]).transpose(1, 2, 0),
        PARAMS,
        ALL,
    ),
    "a derivative backwards of its own": (custom(lambda ct: 2 * ct), PARAMS, ALL),
    "a derivative forwards of its own": (custom_jvp(lambda moved: 2 * moved), PARAMS, ALL),
    "one branch": (lambda p, x: lax.cond(x[0, 0, 0] > 0, block, lambda p, x: 2 * x, p, x), PARAMS, ALL),
    "a loop that scales": (
        lambda p, x: lax.scan(lambda x, p: (0.5 * block(p, x), None), x, p)[0],
        STACK,
        ALL,
    ),
    "a loop that swaps": (
        lambda p, x: lax.fori_loop(0, 3, lambda _, xy: (block(p, xy[1]), xy[0]), (x, x)),
        PARAMS,
        ALL,
    ),
}


def proved(function, params, zero, x=X):
    """By the number of an output, that of the input of the function that it equals."""
    network = TracedNetwork(function, params, (x,), stacks={})
    facts = Facts()
    for path in zero:
        facts.learn(network.values[path], fill=0)
    learn_region(network.region, facts)
    return {
        out: given - len(network.values) for out, given in unchanged_outputs(network.region, facts).items()
    }


@pytest.mark.parametrize("case", PASSES)
def test_what_passes_is_found(case):
    function, params, zero, expected = PASSES[case]
    assert proved(function, params, zero) == expected
    dead = {path: jnp.zeros_like(leaf) if path in zero else leaf for path, leaf in params.items()}
    for out, given in expected.items():
        assert given == 0
        np.testing.assert_array_equal(jax.tree.leaves(function(dead, X))[out], X)
        _, pullback = jax.vjp(lambda x, out=out: jax.tree.leaves(function(dead, x))[out], X)
        np.testing.assert_array_equal(pullback(X)[0], X)


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_is_not(case):
    function, params, zero = CHANGES[case]
    assert proved(function, params, zero) == {}


@pytest.mark.parametrize("relu", [jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.maximum(0.0, x)])
def test_a_second_maximum_is_the_first(relu):
    def function(params, x):
        first = relu(x)
        return jnp.sum(first - relu(block(params, first)))

    network = TracedNetwork(function, PARAMS, (X,))
    facts = Facts()
    for path in ALL:
        facts.learn(network.values[path], fill=0)
    learn_region(network.region, facts)
    (difference,) = [op for op in network.region.ops if op.name == "sub"]
    found = aliases(network.region, facts)
    first, second = (found.get(id(value), value) for value in difference.inputs)
    assert first is second


def test_half_precision_in_a_wider_stream():
    half = X.astype(jnp.bfloat16)

    def function(params, x):
        return block(params, x.astype(jnp.float32)).astype(jnp.bfloat16)

    assert proved(function, PARAMS, ALL, half) == {0: 0}


@pytest.mark.parametrize(
    "name", ["llama_gqa_repeat", "vit_nnx", "resnet18", "resnext_se", "scan_remat", "wavenet"]
)
def test_claims_about_a_network_hold_of_its_values(name):
    case = ZOO[name]()
    network = TracedNetwork(case.apply, case.params, case.inputs, case.state, stacks={})
    rng = np.random.default_rng(0)
    claims = 0
    for share in (0.2, 0.5, 0.9):
        zero = [path for path in network.values if rng.random() < share]
        facts = Facts()
        for path in zero:
            facts.learn(network.values[path], fill=0)
        learn_region(network.region, facts)
        found = aliases(network.region, facts)
        pairs = [(v, found[id(v)]) for op in network.region.ops for v in op.outputs if id(v) in found]
        leaves = [
            jnp.zeros_like(leaf) if path in zero else leaf
            for path, leaf in zip(network.values, jax.tree.leaves(case.params), strict=True)
        ]
        wanted = [value for pair in pairs for value in pair]
        values = network.values_of(wanted, facts, [*leaves, *jax.tree.leaves(case.inputs)])
        for claimed, source in zip(values[::2], values[1::2], strict=True):
            np.testing.assert_array_equal(claimed, source)
        claims += len(pairs)
    assert claims > 0


def test_the_two_proofs_answer_different_questions():
    """A dead layer whose output the next bias replaces is needless, but it does not pass its input on."""
    layer = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    params = {"layers": [layer] * 3}

    def function(params, x):
        for p in params["layers"]:
            x = jnp.tanh(x) @ p["w"] + jnp.broadcast_to(p["b"], x.shape)
        return x

    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    masks["layers"][0] = jax.tree.map(jnp.zeros_like, masks["layers"][0])
    assert len(compact(function, params, masks, X).params["layers"]) == 2
    with pytest.raises(ValueError, match="gives zeros, or another constant, and not the block's input"):
        residual_blocks(function, params, X, prefixes=["layers/0"])
