"""L0 gates: their distribution against its formula, the rest against numpy in float64, and training."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

PARAMS = {
    "dense": {"kernel": jnp.arange(1.0, 13.0).reshape(4, 3), "bias": jnp.ones(3)},
    "conv": {"kernel": jnp.ones((2, 2, 3, 5))},
}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def open_probability(log_alpha):
    return sigmoid(log_alpha - BETA * np.log(-GAMMA / ZETA))


def deterministic(log_alpha):
    return np.clip(sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


logits = hnp.arrays(np.float32, (4, 1), elements=st.floats(-8, 8, width=32))


# The gates to start from


@pytest.mark.parametrize(
    ("axis", "dense", "conv"),
    [
        (None, (4, 3), (2, 2, 3, 5)),
        (-2, (4, 1), (1, 1, 3, 1)),
        (-1, (1, 3), (1, 1, 1, 5)),
        (0, (4, 1), (2, 1, 1, 1)),
        ((-2, -1), (4, 3), (1, 1, 3, 5)),
    ],
)
def test_init_gates_has_one_gate_per_entry_or_slice(axis, dense, conv):
    gates = jp.l0.init_gates(PARAMS, jax.random.key(0), axis=axis)
    assert {path: leaf.shape for path, leaf in gates.items()} == {"dense/kernel": dense, "conv/kernel": conv}
    assert {leaf.dtype for leaf in gates.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("drop_rate", [0.5, 0.2, 0.9])
def test_init_gates_draws_about_the_logit_of_the_drop_rate(drop_rate):
    gates = jp.l0.init_gates({"kernel": jnp.ones((100, 100))}, jax.random.key(0), drop_rate=drop_rate)
    center = np.log((1 - drop_rate) / drop_rate)
    noise = np.asarray(gates["kernel"], np.float64) - center
    assert abs(noise.mean()) < 5 * 0.01 / 100
    assert noise.std() == pytest.approx(0.01, rel=0.05)


def test_init_gates_depends_on_the_key_and_the_leaf_alone():
    key = jax.random.key(0)
    both = jp.l0.init_gates(PARAMS, key)
    joined = jp.l0.init_gates(PARAMS, key, where=jp.matching("conv/*")) | jp.l0.init_gates(
        PARAMS, key, where=jp.matching("dense/kernel")
    )
    assert both.keys() == joined.keys()
    for path in both:
        np.testing.assert_array_equal(both[path], joined[path])
    other = jp.l0.init_gates(PARAMS, jax.random.key(1))
    assert not np.array_equal(both["dense/kernel"], other["dense/kernel"])
    alike = jp.l0.init_gates([jnp.ones((3, 3)), jnp.ones((3, 3))], key)
    assert not np.array_equal(alike["0"], alike["1"])


# The distribution


LOG_ALPHA = np.array([-4.0, -2.0, 0.0, 0.7, 3.0], np.float32)


@pytest.fixture(scope="module")
def samples():
    many = jnp.broadcast_to(jnp.array(LOG_ALPHA), (100_000, len(LOG_ALPHA)))
    return np.asarray(jp.l0.sample_gates({"w": many}, jax.random.key(0))["w"], np.float64)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 0.8, 0.999999])
def test_the_whole_distribution(samples, t):
    """P(z <= t) = sigmoid(beta * logit(s) - log_alpha) where z = t at s; t near 1 leaves the mass at 1."""
    s = (t - GAMMA) / (ZETA - GAMMA)
    p = sigmoid(BETA * np.log(s / (1 - s)) - LOG_ALPHA)
    bound = 5 * np.sqrt(p * (1 - p) / len(samples)) + 1e-6
    assert (np.abs((samples <= t).mean(0) - p) < bound).all()
    assert (samples.min(), samples.max()) == (0, 1)


def test_samples_are_the_same_under_jit_whatever_the_order_of_the_dict():
    gates = {"b": jnp.zeros((5, 5)), "a": jnp.zeros((5, 5))}
    key = jax.random.key(3)
    eager, jitted = jp.l0.sample_gates(gates, key), jax.jit(jp.l0.sample_gates)(gates, key)
    for path in gates:
        np.testing.assert_allclose(eager[path], jitted[path], atol=1e-6)
    assert not np.array_equal(eager["a"], eager["b"])
    assert not np.array_equal(eager["a"], jp.l0.sample_gates(gates, jax.random.key(4))["a"])


def test_the_gradient_of_a_sample_by_hand():
    """dz/dlog_alpha = (zeta - gamma) s (1 - s) / beta where 0 < z < 1, and 0 where it is clipped."""
    log_alpha = jnp.linspace(-3, 3, 400)
    key = jax.random.key(0)
    z = np.asarray(jp.l0.sample_gates({"w": log_alpha}, key)["w"], np.float64)
    grads = jax.grad(lambda a: jp.l0.sample_gates({"w": a}, key)["w"].sum())(log_alpha)
    inside = (z > 0) & (z < 1)
    assert 50 < inside.sum() < 350
    s = (z - GAMMA) / (ZETA - GAMMA)
    expected = np.where(inside, (ZETA - GAMMA) * s * (1 - s) / BETA, 0)
    np.testing.assert_allclose(grads, expected, rtol=1e-3, atol=1e-5)


# The deterministic gates, the penalty, the masks


@given(logits)
@settings(deadline=None, max_examples=20)
def test_expected_gates_and_their_masks(log_alpha):
    gates = {"dense/kernel": jnp.array(log_alpha)}
    z = jp.l0.expected_gates(gates)["dense/kernel"]
    expected = deterministic(log_alpha)
    np.testing.assert_allclose(z, expected, atol=1e-6)
    closed = pytest.warns(UserWarning, match=r"All gates of params\['dense/kernel'\] are closed")
    with contextlib.nullcontext() if (expected > 0).any() else closed:
        masks = jp.l0.gate_masks(PARAMS, gates)
    jp.check_masks(masks, PARAMS)
    np.testing.assert_array_equal(masks["dense"]["kernel"], np.broadcast_to(np.asarray(z) > 0, (4, 3)))
    assert bool(masks["dense"]["bias"].all()) and bool(masks["conv"]["kernel"].all())
    # What is folded in is zero where the masks say so, and nowhere else.
    folded = jp.l0.apply_gates(PARAMS, {"dense/kernel": z})
    np.testing.assert_array_equal(folded["dense"]["kernel"] != 0, masks["dense"]["kernel"])


def test_a_gate_closes_at_minus_log_11():
    edge = -np.log(11.0)
    z = jp.l0.expected_gates({"w": jnp.array([edge - 1e-3, edge + 1e-3])})["w"]
    assert (z > 0).tolist() == [False, True]


@given(logits, hnp.arrays(np.float32, (1, 1, 3, 5), elements=st.floats(-8, 8, width=32)))
@settings(deadline=None, max_examples=20)
def test_expected_l0(dense, conv):
    gates = {"dense/kernel": jnp.array(dense), "conv/kernel": jnp.array(conv)}
    value, grads = jax.value_and_grad(jax.jit(lambda g: jp.l0.expected_l0(PARAMS, g)))(gates)
    assert value.dtype == jnp.float32
    p, q = open_probability(dense), open_probability(conv)
    np.testing.assert_allclose(value, 3 * p.sum() + 4 * q.sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["dense/kernel"], 3 * p * (1 - p), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["conv/kernel"], 4 * q * (1 - q), rtol=1e-4, atol=1e-6)


# The gated params


@given(hnp.arrays(np.float32, (4, 1), elements=st.sampled_from([0.0, 0.25, 1.0])))
@settings(deadline=None, max_examples=20)
def test_apply_gates_is_the_product(z):
    gated = jp.l0.apply_gates(PARAMS, {"dense/kernel": jnp.array(z)})
    assert jax.tree.structure(gated) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(gated["dense"]["kernel"], np.asarray(PARAMS["dense"]["kernel"]) * z)
    np.testing.assert_array_equal(gated["dense"]["bias"], PARAMS["dense"]["bias"])
    np.testing.assert_array_equal(gated["conv"]["kernel"], PARAMS["conv"]["kernel"])


def test_a_closed_gate_gives_positive_zero_and_finite_gradients_whatever_was_there():
    params = {"kernel": jnp.array([[-2.0, jnp.nan, jnp.inf, -3.0]])}
    z = {"kernel": jnp.array([[0.0, 0.0, 0.0, 0.5]])}
    gated = np.asarray(jp.l0.apply_gates(params, z)["kernel"])
    assert gated.tolist() == [[0.0, 0.0, 0.0, -1.5]]
    assert not np.signbit(gated[0, :3]).any()
    of_params, of_z = jax.grad(lambda p, z: jp.l0.apply_gates(p, z)["kernel"].sum(), argnums=(0, 1))(
        params, z
    )
    assert of_params["kernel"].tolist() == [[0.0, 0.0, 0.0, 0.5]]
    assert of_z["kernel"].tolist() == [[0.0, 0.0, 0.0, -3.0]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_gated_params_keep_their_dtype_under_strict_promotion(dtype):
    params = {"kernel": jnp.full((3, 2), 2, dtype)}
    with jax.numpy_dtype_promotion("strict"):
        gates = jp.l0.init_gates(params, jax.random.key(0), axis=-2)
        gated = jp.l0.apply_gates(params, jp.l0.sample_gates(gates, jax.random.key(1)))
        assert gated["kernel"].dtype == dtype
        assert gated["kernel"].shape == (3, 2)
        assert jp.l0.expected_l0(params, gates).dtype == jnp.float32
        masks = jp.l0.gate_masks(params, gates)
    jp.check_masks(masks, params)


def test_containers_other_than_dicts():
    params = (jnp.ones((2, 3)), [jnp.ones((3, 2)), jnp.ones(2)])
    gates = jp.l0.init_gates(params, jax.random.key(0), axis=-2)
    assert list(gates) == ["0", "1/0"]
    gated = jp.l0.apply_gates(params, jp.l0.expected_gates(gates))
    assert jax.tree.structure(gated) == jax.tree.structure(params)
    jp.check_masks(jp.l0.gate_masks(params, gates), params)
    bare = jp.l0.init_gates(jnp.ones((2, 2)), jax.random.key(0))
    assert jp.l0.apply_gates(jnp.ones((2, 2)), bare).shape == (2, 2)


# Errors


@pytest.mark.parametrize("name", ["expected_l0", "gate_masks", "apply_gates"])
def test_gates_that_do_not_fit(name):
    call, what = getattr(jp.l0, name), "z" if name == "apply_gates" else "gates"
    with pytest.raises(ValueError, match=rf"{what}\['dense/weight'\] fits no leaf.*dense/kernel"):
        call(PARAMS, {"dense/weight": jnp.ones((4, 3))})
    for shape in ((3, 1), (4,), (4, 3, 1), ()):
        with pytest.raises(ValueError, match=rf"{what}\['dense/kernel'\] has shape .*\(4, 3\): each axis"):
            call(PARAMS, {"dense/kernel": jnp.ones(shape)})
    with pytest.raises(TypeError, match=rf"{what}\['dense/kernel'\] is bool\[4, 1\]; gates are floating"):
        call(PARAMS, {"dense/kernel": jnp.ones((4, 1), bool)})
    with pytest.raises(TypeError, match=rf"{what}\['dense/kernel'\] is a float; gates are floating"):
        call(PARAMS, {"dense/kernel": 0.5})
    with pytest.raises(TypeError, match=f"{what} must be a dict from leaf path to array.*got a list"):
        call(PARAMS, [jnp.ones((4, 3))])
    with pytest.raises(ValueError, match=f"{what} is an empty dict"):
        call(PARAMS, {})


def test_init_gates_checks_its_arguments():
    key = jax.random.key(0)
    for drop_rate in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(ValueError, match="drop_rate must lie strictly between 0 and 1, got"):
            jp.l0.init_gates(PARAMS, key, drop_rate=drop_rate)
    with pytest.raises(ValueError, match=r"where=matching\('x'\) matches no leaf"):
        jp.l0.init_gates(PARAMS, key, where=jp.matching("x"))
    with pytest.raises(ValueError, match=r"slices\(axis=3\) on params\['dense/kernel'\].*no axis among"):
        jp.l0.init_gates(PARAMS, key, axis=3, where=jp.matching("dense/kernel"))
    with pytest.raises(TypeError, match=r"params\['kernel'\] is int32\[2, 2\]"):
        jp.l0.init_gates({"kernel": jnp.ones((2, 2), int)}, key)


# Training

SHAPE = (8, 4)


def problem(per_weight):
    """A regression whose true weights are zero for some inputs, or at entries here and there."""
    keys = jax.random.split(jax.random.key(0), 4)
    by_input = np.isin(np.arange(SHAPE[0]), [0, 2, 3, 6])[:, None] & np.ones(SHAPE, bool)
    relevant = np.random.default_rng(0).random(SHAPE) < 0.4 if per_weight else by_input
    x = jax.random.normal(keys[0], (256, SHAPE[0]))
    sign = jnp.where(jax.random.bernoulli(keys[1], 0.5, SHAPE), 1.0, -1.0)
    truth = jnp.where(relevant, sign * jax.random.uniform(keys[2], SHAPE, minval=0.7, maxval=1.5), 0)
    y = x @ truth + 0.1 * jax.random.normal(keys[3], (256, SHAPE[1]))
    return x, y, relevant


@partial(jax.jit, static_argnames="axis")
def train(x, y, axis, strength):
    params = {"kernel": 0.3 * jax.random.normal(jax.random.key(1), SHAPE)}
    trained = params, jp.l0.init_gates(params, jax.random.key(2), axis=axis)
    tx = optax.adam(0.03)

    def loss(trained, key):
        params, gates = trained
        gated = jp.l0.apply_gates(params, jp.l0.sample_gates(gates, key))
        fit = jnp.mean(jnp.sum((x @ gated["kernel"] - y) ** 2, axis=-1))
        return fit + strength * jp.l0.expected_l0(params, gates)

    def step(carry, key):
        trained, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(trained, key), opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), None

    return jax.lax.scan(step, (trained, tx.init(trained)), jax.random.split(jax.random.key(3), 800))[0][0]


@pytest.mark.parametrize("axis", [-2, None], ids=["inputs", "weights"])
def test_gates_close_exactly_what_is_irrelevant_and_masks_follow(axis):
    x, y, relevant = problem(per_weight=axis is None)
    params, gates = train(x, y, axis, strength=0.02)
    masks = jp.l0.gate_masks(params, gates)
    np.testing.assert_array_equal(masks["kernel"], relevant)
    assert float(jp.l0.expected_l0(params, gates)) == pytest.approx(relevant.sum(), rel=0.3)

    # Folded in, the network is exactly sparse and fits; fine-tuning under the masks keeps it so.
    params = jp.l0.apply_gates(params, jp.l0.expected_gates(gates))
    jp.check_pruned(params, masks)
    assert jp.metrics.nonzeros(params) == relevant.sum()

    def error(params):
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    assert float(error(params)) < 0.1
    tx = jp.keep_masked(optax.adam(0.01), masks)
    opt_state = tx.init(params)

    @jax.jit
    def tune(params, opt_state):
        updates, opt_state = tx.update(jax.grad(error)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(100):
        params, opt_state = tune(params, opt_state)
    jp.check_pruned(params, masks)
    assert float(error(params)) < 0.015  # the noise has variance 0.01

    # Without the penalty no gate has a reason to close.
    params, gates = train(x, y, axis, strength=0.0)
    assert int(jp.l0.gate_masks(params, gates)["kernel"].sum()) > relevant.sum()
