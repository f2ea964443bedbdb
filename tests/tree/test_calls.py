"""Messages of first use: calls that take a function of params and inputs, written wrongly."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

X = jnp.ones((2, 3))
PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
MASKS = jp.prune_once(PARAMS, jp.scores.magnitude, 0.5)


def network(params, x, train=False):
    return jnp.tanh(x @ params["a"]) @ params["b"] * (2 if train else 1)


# By name: a call with a function, params and inputs.
CALLS = {
    "channel_groups": jp.channel_groups,
    "compact": lambda f, p, *xs, **k: jp.compact(f, p, MASKS, *xs, **k),
    "sparsify": lambda f, p, *xs, **k: jp.sparsify(f, p, MASKS, *xs, **{"choose": "rule", **k}),
    "macs": jp.metrics.macs,
    "summary": jp.metrics.summary,
    "activation_sparsity": jp.metrics.activation_sparsity,
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_keywords_of_the_function_go_in_by_partial(name):
    message = rf"{name} passes no keywords on, got train=True: write functools.partial\(\w+, train=True\)"
    with pytest.raises(TypeError, match=message):
        CALLS[name](network, PARAMS, X, train=True)
    CALLS[name](partial(network, train=True), PARAMS, X)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("channel_groups", "splitt", "split"),
        ("compact", "multiples_of", "multiple_of"),
        ("compact", "verfy", "verify"),
        ("sparsify", "chose", "choose"),
        ("macs", "mask", "masks"),
        ("summary", "mask", "masks"),
        ("activation_sparsity", "everythin", "everything"),
    ],
)
def test_misspelled_keywords(name, wrong, right):
    with pytest.raises(TypeError, match=f"{name} has no argument '{wrong}'; did you mean '{right}'"):
        CALLS[name](network, PARAMS, X, **{wrong: 1})


@calls
@pytest.mark.parametrize("params", [PARAMS, jnp.ones((3, 3)), eqx.nn.Linear(3, 3, key=jax.random.key(0))])
def test_params_before_the_function(name, params):
    with pytest.raises(TypeError, match=rf"{name} takes the function first and the params second: .*swapped"):
        CALLS[name](params, network, X)


@calls
def test_no_function(name):
    with pytest.raises(TypeError, match=rf"{name} takes a function first: {name}\(\w+, params"):
        CALLS[name]("network", PARAMS, X)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"activation_sparsity"}))
def test_no_inputs(name):
    with pytest.raises(
        TypeError, match=rf"{name}: the function cannot be called with no inputs .*'x'.*example inputs"
    ):
        CALLS[name](network, PARAMS)


@calls
def test_too_many_inputs(name):
    with pytest.raises(TypeError, match=rf"{name}: the function cannot be called with 3 inputs"):
        CALLS[name](network, PARAMS, X, True, X)


def test_no_inputs_for_a_function_of_anything():
    model = nn.Dense(4)
    params = model.init(jax.random.key(0), X)
    for call in (jp.channel_groups, partial(jp.compact, masks=jp.ones_masks(params))):
        with pytest.raises(TypeError, match=r"the function fails without inputs .*Pass example inputs"):
            call(model.apply, params)
    jp.channel_groups(lambda p: network(p, X), PARAMS)  # needs none


@pytest.mark.parametrize("call", [jp.compact, jp.sparsify])
def test_masks_in_another_place(call):
    with pytest.raises(TypeError, match=r"takes the params before the masks: .*They are swapped"):
        call(network, MASKS, PARAMS, X)
    with pytest.raises(TypeError, match=r"takes the masks third, before the inputs"):
        call(network, PARAMS, X, MASKS)
    with pytest.raises(TypeError, match=r"takes the masks third: .*float32\[2, 3\]"):
        call(lambda p: p, PARAMS, X)
    with pytest.raises(TypeError, match="takes the function first"):
        call(PARAMS, network, MASKS, X)


def test_modules_are_functions_and_params_alike():
    model = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    groups = jp.channel_groups(lambda m, x: jax.vmap(m)(x), model, X)
    assert len(groups) == 0


def test_check_pruned_looks_at_values():
    jp.check_pruned(jp.apply_masks(PARAMS, MASKS), MASKS)
    message = "check_pruned looks at values, which are traced inside jit.*Call it outside"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda p: jp.check_pruned(p, MASKS))(PARAMS)
    with pytest.raises(TypeError, match=message):
        jax.vmap(lambda m: jp.check_pruned(PARAMS, m))(jax.tree.map(lambda m: m[None], MASKS))


@pytest.mark.parametrize(
    ("given", "meant"), [("magnitude", "magnitude"), ("taylr", "taylor"), ("l2-norm-of-it", "magnitude")]
)
def test_a_string_as_score(given, meant):
    message = (
        rf"scores must be a function or a tree of arrays, got the string '{given}': pass .*\.{meant} itself"
    )
    with pytest.raises(TypeError, match=message):
        jp.prune_once(PARAMS, given, 0.5)
    with pytest.raises(TypeError, match=message):
        jp.pruner(given, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message):
        jp.sensitivity(lambda p: 0.0, PARAMS, scores=given)


# What reasons say of ops.


@pytest.mark.parametrize(("op", "does"), [("max", "compares"), ("min", "compares"), ("sum", "sums")])
def test_reasons_say_what_an_op_does(op, does):
    # Channels that are zero are told apart by what is added, so none can go.
    def apply(p, x):
        return getattr(x @ p["a"] + jnp.arange(4.0), op)(-1)

    text = " ".join(str(jp.channel_groups(apply, {"a": PARAMS["a"]}, X)).split())
    assert f"not removable: reduce_{op} at test_calls.py" in text
    assert f"{does} it with slices that are not zero" in text


def line_of(function):
    return f"test_calls.py:{function.__code__.co_firstlineno + 1}"


def test_library_calls_are_placed_where_they_are_made():
    jnp.var(X, axis=0)  # cached with this line

    def apply(p, x):
        return jnp.cumsum(x @ p["a"], 1) @ p["b"]

    assert f"cumsum at {line_of(apply)} reads all of it" in str(jp.channel_groups(apply, PARAMS, X))


def test_rules_of_derivatives_are_placed_where_the_function_is_called():
    @jax.custom_jvp
    def soft(h):
        return h

    soft.defjvp(lambda primals, tangents: (primals[0], jnp.sort(tangents[0], -1)))

    def apply(p, x):
        return soft(x @ p["a"]) @ p["b"]

    reasons = str(jp.channel_groups(apply, PARAMS, X))
    assert "sort at test_calls.py" in reasons
    assert "unknown" not in reasons


def test_ops_without_a_line_say_their_shapes():
    exported = jax.export.export(jax.jit(lambda h: jnp.sort(h, -1)))(jnp.ones((2, 4)))
    closed = jax.make_jaxpr(lambda h: jnp.sort(h, -1))(jnp.ones((2, 4)))
    bare = [eqn.replace(source_info=eqn.source_info.replace(traceback=None)) for eqn in closed.jaxpr.eqns]
    jaxpr = closed.jaxpr.replace(eqns=bare)

    def apply(p, x):
        (h,) = jax.core.eval_jaxpr(  # type: ignore[attr-defined]
            jaxpr, closed.consts, x @ p["a"]
        )
        return h @ p["b"]

    assert "unknown" not in str(jp.channel_groups(apply, PARAMS, X))
    assert "unknown" not in str(jp.channel_groups(lambda p, x: exported.call(x @ p["a"]) @ p["b"], PARAMS, X))


def residual(names):
    def apply(p, x):
        layers = [p[name] for name in names] if isinstance(p, dict) else p
        x = x @ layers[0]
        for layer in layers[1:-1]:
            x = x + jnp.tanh(x) @ layer
        return x @ layers[-1]

    return apply


def test_layers_of_a_list_are_not_folded_to_nothing():
    layers = [jnp.ones((3, 4)), *[jnp.ones((4, 4))] * 12, jnp.ones((4, 2))]
    text = str(jp.channel_groups(residual(()), layers, X))
    assert "*" not in text
    assert {f"{i}[{axis}]" for i in range(1, 13) for axis in (0, 1)} <= set(text.split())
    names = [f"layer_{i}" for i in range(14)]
    named = dict(zip(names, layers, strict=True))
    assert "layer_*[1] (13)" in str(jp.channel_groups(residual(names), named, X))
    numbers = {str(i): layer for i, layer in enumerate(layers)}
    assert "*" not in str(jp.channel_groups(residual([str(i) for i in range(14)]), numbers, X))
    np.testing.assert_equal(len(jp.channel_groups(residual(()), layers, X)), 1)
