"""Distillation against numpy in float64, its gradients by hand and by differences, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp

SOFT, MIXED = jp.distillation.soft_targets, jp.distillation.hard_and_soft
HINTS, ATTENTION = jp.distillation.hints, jp.distillation.attention
SIMILARITY, OBJECTIVE = jp.distillation.similarity, jp.distillation.objective


# Compiled: quicker here than one operation after another. Temperatures and shares are traced.
soft, mixed = jax.jit(SOFT), jax.jit(MIXED)


@jax.jit
def value_and_grad(z, t, temperature):
    """Losses of each example, and their gradients; no example's loss depends on another's logits."""
    grads = jax.grad(lambda z: SOFT(z, t, temperature).sum())(z)
    return SOFT(z, t, temperature), grads


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergence(z, t, temperature):
    """The textbook's formula, in float64."""
    log_p, log_q = log_softmax(np.float64(t) / temperature), log_softmax(np.float64(z) / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def centred(z):
    z = np.asarray(z, np.float64)
    return z - z.mean(-1, keepdims=True)


logits = hnp.arrays(np.float32, (4, 5), elements=st.floats(-30, 30, width=32))


@given(logits, logits, st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0]))
@settings(deadline=None, max_examples=50)
def test_soft_targets(z, t, temperature):
    losses, grads = value_and_grad(z, t, temperature)
    assert losses.shape == (4,)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, divergence(z, t, temperature), rtol=2e-5, atol=1e-5 * temperature)
    q, p = np.exp(log_softmax(z / np.float64(temperature))), np.exp(log_softmax(t / np.float64(temperature)))
    np.testing.assert_allclose(grads, temperature * (q - p), rtol=1e-4, atol=1e-5 * temperature)
    assert (np.asarray(losses) >= 0).all()


@given(logits, st.sampled_from([0.5, 1.0, 7.0]))
@settings(deadline=None, max_examples=20)
def test_where_student_and_teacher_agree_loss_and_gradient_are_exactly_0(z, temperature):
    losses, grads = value_and_grad(z, z, temperature)
    assert not np.asarray(losses).any()
    assert not np.asarray(grads).any()


def test_adam_does_not_move_a_student_that_agrees():
    # What rounding leaves of a gradient that should be 0, Adam makes as large as its rate.
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 10))}
    x, tx = jax.random.normal(jax.random.key(1), (32, 6)), optax.adam(0.1)
    loss_fn = OBJECTIVE(lambda p, x: x @ p["kernel"], lambda x: x @ params["kernel"], 4.0, alpha=1.0)
    grads = jax.jit(jax.grad(loss_fn))(params, (x, np.zeros(32, int)))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert not np.asarray(grads["kernel"]).any()
    assert not np.asarray(updates["kernel"]).any()


@pytest.fixture(scope="module")
def pair():
    keys = jax.random.split(jax.random.key(0))
    return tuple(3 * jax.random.normal(key, (8, 10)) for key in keys)


def test_for_high_temperatures_it_is_the_distance_of_centred_logits(pair):
    # T^2 KL = |d|^2 / (2 classes) and its gradient d / classes, with d the difference of centred logits, up
    # to terms that fall as 1/T; and in float32 too, where p - q has lost most of its digits.
    z, t = pair
    d = centred(z) - centred(t)
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        losses, grads = value_and_grad(z, t, temperature)
        assert np.abs(losses / ((d**2).sum(-1) / 20) - 1).max() < 10 / temperature + 1e-3
        errors.append(np.abs(grads - d / 10).max())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 5e-3


def test_logits_may_be_shifted_or_log_probabilities(pair):
    z, t = pair
    expected = divergence(z, t, 3.0)
    np.testing.assert_allclose(soft(z + 5, log_softmax(t).astype(np.float32), 3.0), expected, rtol=1e-4)
    # And any leading axes, or none.
    z, t = np.asarray(z), np.asarray(t)
    np.testing.assert_allclose(
        soft(z.reshape(2, 4, 10), t.reshape(2, 4, 10), 3.0).ravel(), expected, rtol=1e-4
    )
    np.testing.assert_allclose(soft(z[0], t[0], 3.0), expected[0], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_extreme_logits_are_finite(dtype):
    z = jnp.array([[6e4, 0.0, -6e4], [0.0, 0.0, 6e4], [-6e4, -6e4, -6e4]], dtype)
    losses, grads = value_and_grad(z, z[::-1], 2.0)
    assert losses.dtype == jnp.float32
    assert grads.dtype == dtype
    assert np.isfinite(np.asarray(losses)).all()
    assert np.isfinite(np.asarray(grads, np.float32)).all()
    np.testing.assert_allclose(
        losses, divergence(z.astype("float32"), z[::-1].astype("float32"), 2.0), rtol=1e-5
    )
    hard = mixed(z, z, np.array([2, 0, 1]), 2.0, 0.5)
    np.testing.assert_allclose(hard, [0.5 * 12e4, 0.5 * 6e4, 0.5 * np.log(3)], rtol=1e-2)


def test_half_precision_is_computed_in_float32(pair):
    z, t = (x.astype(jnp.bfloat16) for x in pair)
    wide = value_and_grad(z.astype(jnp.float32), t.astype(jnp.float32), 4.0)
    losses, grads = value_and_grad(z, t, 4.0)
    assert losses.dtype == jnp.float32
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_array_equal(losses, wide[0])
    np.testing.assert_allclose(grads.astype(jnp.float32), wide[1], rtol=1e-2)

    # Student and teacher need not have one dtype, even where promotion is strict.
    def both(f, g):
        labels = jnp.zeros(8, int)
        losses = SOFT(f, g, 4.0), MIXED(f, g, labels, jnp.float32(4.0), 0.5), HINTS(f, g), SIMILARITY(f, g)
        return [*losses, ATTENTION(f[..., None], g[..., None])]

    with jax.numpy_dtype_promotion("strict"):
        assert {loss.dtype for loss in jax.eval_shape(both, z, pair[1])} == {jnp.dtype("float32")}
        with jax.enable_x64():
            wide = jax.ShapeDtypeStruct((8, 10), jnp.float64)
            assert {loss.dtype for loss in jax.eval_shape(both, z, wide)} == {jnp.dtype("float64")}


def test_classes_that_are_ruled_out():
    inf = float("inf")
    z, t = jnp.array([[1.0, 2.0, -inf, 0.5]]), jnp.array([[0.0, 1.0, -inf, -inf]])
    losses, grads = value_and_grad(z, t, 2.0)
    log_q, p = log_softmax(z[:, [0, 1, 3]] / 2), np.exp(log_softmax(t[:, :2] / 2))
    np.testing.assert_allclose(losses, 4 * (p * (np.log(p) - log_q[:, :2])).sum(-1), rtol=1e-5)
    expected = 2 * (np.exp(log_q) - np.array([[*p[0], 0.0]]))
    np.testing.assert_allclose(grads[:, [0, 1, 3]], expected, rtol=1e-5)
    assert grads[0, 2] == 0
    assert soft(t, z, 2.0)[0] == inf  # the teacher holds possible what the student rules out
    assert np.isnan(soft(z.at[0, 0].set(jnp.nan), t, 2.0)[0])


def test_the_temperature_is_differentiated_and_the_teacher_is_not(pair):
    z, t = pair
    by_teacher, by_temperature = jax.jit(jax.grad(lambda *args: SOFT(*args).sum(), (1, 2)))(z, t, 3.0)
    assert not np.asarray(by_teacher).any()
    slope = (divergence(z, t, 3 + 1e-6).sum() - divergence(z, t, 3 - 1e-6).sum()) / 2e-6
    np.testing.assert_allclose(by_temperature, slope, rtol=1e-3)


def test_second_derivatives(pair):
    z, t = (x[0] for x in pair)
    q = np.exp(log_softmax(z / 3.0))
    hessian = jax.jit(jax.hessian(lambda z: SOFT(z, t, 3.0)))(z)
    np.testing.assert_allclose(hessian, np.diag(q) - np.outer(q, q), atol=1e-5)


# --- mixed with labels


def cross_entropy(z, labels):
    return -np.take_along_axis(log_softmax(z), np.asarray(labels)[:, None], 1)[:, 0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hard_and_soft(pair, alpha):
    z, t = pair
    labels = np.arange(8)
    expected = (1 - alpha) * cross_entropy(z, labels) + alpha * divergence(z, t, 4.0)
    np.testing.assert_allclose(mixed(z, t, labels, 4.0, alpha), expected, rtol=1e-5)
    for dtype in (int, float, bool):
        one_hot = np.eye(10, dtype=dtype)[labels]
        np.testing.assert_allclose(mixed(z, t, one_hot, 4.0, alpha), expected, rtol=1e-5)
    smooth = 0.9 * np.eye(10)[labels] + 0.01
    expected = (1 - alpha) * -(smooth * log_softmax(z)).sum(-1) + alpha * divergence(z, t, 4.0)
    np.testing.assert_allclose(mixed(z, t, smooth, 4.0, alpha), expected, rtol=1e-5)


def test_labels_of_a_small_type_among_many_classes():
    z = np.zeros((2, 300), np.float32)
    for dtype, labels in ((np.uint8, [0, 255]), (np.int8, [0, 127])):
        losses = mixed(z, z, np.array(labels, dtype), 1.0, 0.5)
        np.testing.assert_allclose(losses, 0.5 * np.log(300), rtol=1e-6)


def test_the_sum_of_two_cross_entropies_is_twice_a_mixture(pair):
    # An article's loss: its gradient is that of both terms.
    z, t = pair
    labels = jnp.arange(8)

    def article(z):
        hard = optax.softmax_cross_entropy_with_integer_labels(z, labels)
        return (hard + optax.softmax_cross_entropy(z, jax.nn.softmax(t))).sum()

    def ours(z):
        return 2 * MIXED(z, t, labels, temperature=1, alpha=0.5).sum()

    expected, got = jax.jit(lambda z: (jax.grad(article)(z), jax.grad(ours)(z)))(z)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_labels_that_are_no_class(pair):
    z, t = pair
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 10])
    for bad in (labels, -labels):
        with pytest.raises(ValueError, match=r"labels must be 0 to 9, got (0 to 10|-10 to 0)\."):
            MIXED(z, t, bad)
        with pytest.raises(ValueError, match="labels must be 0 to 9"):  # closed over by a traced function
            jax.jit(lambda z, bad=bad: MIXED(z, t, bad))(z)
        losses = mixed(z, t, bad)
        assert np.isnan(losses[-1])
    np.testing.assert_allclose(mixed(z, t, labels)[:-1], mixed(z, t, np.arange(8))[:-1], rtol=1e-5)


# --- the objective


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(1), 4)
    params = {
        "a": {"kernel": jax.random.normal(keys[0], (6, 16))},
        "b": {"kernel": jax.random.normal(keys[1], (16, 5))},
    }
    return params, (jax.random.normal(keys[2], (64, 6)), jax.random.randint(keys[3], (64,), 0, 5))


def test_objective_is_the_mean_and_reaches_the_student_alone(problem):
    params, (x, labels) = problem
    student = jax.tree.map(lambda w: w + 0.3, params)

    @jax.jit
    def loss(student, dense, temperature):
        teacher = functools.partial(apply_fn, dense)
        return OBJECTIVE(apply_fn, teacher, temperature, 0.7)(student, (x, labels))

    z, t = jax.jit(apply_fn)(student, x), jax.jit(apply_fn)(params, x)
    expected = np.mean(0.3 * cross_entropy(z, labels) + 0.7 * divergence(z, t, 2.0))
    np.testing.assert_allclose(loss(student, params, 2.0), expected, rtol=1e-5)
    grads, of_teacher = jax.jit(jax.grad(loss, (0, 1)))(student, params, 2.0)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_teacher))


def test_what_follows_the_batch_goes_to_the_student():
    def student(params, x, key, *, train):
        return jnp.stack([params * x, jnp.full(x.shape, 2.0 * key * train)], axis=-1)

    loss_fn = OBJECTIVE(student, lambda x: jnp.stack([x, x], axis=-1), temperature=2.0, alpha=1.0)
    x = jnp.arange(3.0)
    expected = divergence(np.stack([5 * x, [6.0] * 3], -1), np.stack([x, x], -1), 2.0).mean()
    np.testing.assert_allclose(loss_fn(5.0, (x, jnp.zeros(3, int)), 3.0, train=True), expected, rtol=1e-5)


def test_a_pruned_student_learns_from_the_dense_network_and_stays_pruned(problem):
    dense, (x, labels) = problem
    masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.5)
    loss_fn = OBJECTIVE(apply_fn, functools.partial(apply_fn, dense), temperature=2.0, alpha=1.0)
    tx = jp.keep_masked(optax.adam(0.02), masks)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, (x, labels))
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=100)
        return params, losses

    params, losses = train(jp.apply_masks(dense, masks))
    jp.check_pruned(params, masks)
    assert losses[-1] < losses[0] / 4


def test_a_compacted_student(problem):
    dense, (x, labels) = problem
    groups = jp.channel_groups(apply_fn, dense, x[:1])
    masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.5, structure=jp.structures.channels(groups))
    small = jp.compact(apply_fn, dense, masks, x[:1])
    teacher = functools.partial(apply_fn, dense)
    masked = jax.jit(OBJECTIVE(apply_fn, teacher))(jp.apply_masks(dense, masks), (x, labels))
    smaller = jax.jit(OBJECTIVE(small.apply, teacher))(small.params, (x, labels))
    np.testing.assert_allclose(smaller, masked, rtol=1e-5)
    # Its hidden layer has the channels that were kept, in their order.
    hidden, narrow = jnp.tanh(x @ dense["a"]["kernel"]), jnp.tanh(x @ small.params["a"]["kernel"])
    with pytest.raises(ValueError, match=r"features are float32\[64, 8\], the teacher's float32\[64, 16\]"):
        HINTS(narrow, hidden)
    assert not np.asarray(HINTS(narrow, hidden[..., small.keep["a/kernel"][1]])).any()
    assert SIMILARITY(narrow, hidden) > 0


# --- hidden layers

# Zeros on purpose: what is 0 everywhere has no direction. Nothing so small that its square vanishes.
entries = st.one_of(st.just(0.0), st.floats(2**-10, 4, width=32), st.floats(-4, -(2**-10), width=32))
features = hnp.arrays(np.float32, (3, 4, 4, 2), elements=entries)
narrow = hnp.arrays(np.float32, (3, 4, 4, 1), elements=entries)


def unit(rows):
    norms = np.sqrt((rows**2).sum(1, keepdims=True))
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


compiled = {
    name: jax.jit(f) for name, f in {"hints": HINTS, "attention": ATTENTION, "similarity": SIMILARITY}.items()
}


@given(features, features, narrow)
@settings(deadline=None, max_examples=30)
def test_hidden_layers(f, teacher, thin):
    a, b, c = (x.astype(np.float64) for x in (f, teacher, thin))
    np.testing.assert_allclose(compiled["hints"](f, teacher), ((a - b) ** 2).sum((1, 2, 3)) / 2, rtol=1e-5)
    maps = [unit((x**2).sum(-1).reshape(3, -1)) for x in (c, b)]
    losses = compiled["attention"](thin, teacher)
    assert losses.shape == (3,)
    np.testing.assert_allclose(losses, ((maps[0] - maps[1]) ** 2).sum(-1), rtol=1e-4, atol=1e-6)
    grams = [unit(x.reshape(3, -1) @ x.reshape(3, -1).T) for x in (c, b)]
    expected = ((grams[0] - grams[1]) ** 2).sum() / 9
    np.testing.assert_allclose(compiled["similarity"](thin, teacher), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["hints", "attention", "similarity"])
def test_only_the_student_gets_gradients_of_hidden_layers(name):
    f, teacher = (jax.random.normal(jax.random.key(seed), (3, 4, 4, 2)) for seed in (0, 1))
    total = jax.jit(jax.grad(lambda f, t: compiled[name](f, t).sum(), (0, 1)))
    grads, of_teacher = total(f, teacher)
    assert not np.asarray(of_teacher).any()
    direction = np.asarray(jax.random.normal(jax.random.key(2), f.shape))
    step = 1e-2
    ahead, behind = (compiled[name](f + s * direction, teacher).sum() for s in (step, -step))
    np.testing.assert_allclose((grads * direction).sum(), (ahead - behind) / (2 * step), rtol=2e-2)
    # Nothing at all, in student or teacher, has finite gradients; and the same features none.
    for pair in ((0 * f, teacher), (f, 0 * teacher), (0 * f, 0 * teacher)):
        assert np.isfinite(np.asarray(total(*pair)[0])).all()
    np.testing.assert_allclose(total(f, f)[0], 0, atol=1e-6)
    half = compiled[name](f.astype(jnp.bfloat16), teacher)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(
        half, compiled[name](f.astype(jnp.bfloat16).astype(jnp.float32), teacher), rtol=1e-6
    )


def test_maps_do_not_depend_on_the_scale_of_a_layer():
    f, teacher = np.random.default_rng(0).normal(size=(2, 3, 7, 5)).astype(np.float32)
    for loss in (compiled["attention"], compiled["similarity"]):
        expected = loss(f, teacher)
        for scale in (1e-8, 1e8):
            np.testing.assert_allclose(loss(scale * f, teacher), expected, rtol=1e-5)


def test_a_regressor_is_trained_with_the_student():
    f, teacher = jnp.ones((4, 3)), jnp.full((4, 5), 2.0)
    loss = lambda kernel, f: HINTS(f, teacher, lambda f: f @ kernel).mean()  # noqa: E731
    value, (by_kernel, by_features) = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.full((3, 5), 0.5), f)
    np.testing.assert_allclose(value, 5 * 0.5**2 / 2)
    np.testing.assert_allclose(by_kernel, np.full((3, 5), -0.5))
    np.testing.assert_allclose(by_features, np.full((4, 3), 5 * -0.5 * 0.5 / 4))


# --- what is refused

Z = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SOFT(Z, jnp.zeros((2, 4))), r"logits are float32\[2, 3\], the teacher's float32\[2, 4\]"),
        (lambda: SOFT(Z, jnp.zeros(3)), r"logits are float32\[2, 3\], the teacher's float32\[3\]"),
        (lambda: SOFT(Z[:, :1], Z[:, :1]), r"two classes or more, got float32\[2, 1\]"),
        (lambda: SOFT(Z[0, 0], Z[0, 0]), r"two classes or more, got float32\[\]"),
        (lambda: SOFT(Z, Z, 0), r"temperature must be a positive number, got 0\.0"),
        (lambda: SOFT(Z, Z, jnp.float32(-1)), r"temperature must be a positive number, got -1\.0"),
        (lambda: SOFT(Z, Z, float("nan")), "temperature must be a positive number, got nan"),
        (lambda: SOFT(Z, Z, float("inf")), "temperature must be a positive number, got inf"),
        (lambda: SOFT(Z, Z, jnp.ones(2)), r"temperature must be a scalar, got shape \(2,\)"),
        (lambda: MIXED(Z, Z, jnp.zeros(2, int), alpha=1.5), r"alpha, .*, must be 0 to 1, got 1\.5"),
        (lambda: MIXED(Z, Z, jnp.zeros(2, int), alpha=float("nan")), "must be 0 to 1, got nan"),
        (lambda: MIXED(Z, Z, jnp.zeros(3, int)), r"labels are int32\[3\]; .* integers of shape \(2,\), or"),
        (lambda: MIXED(Z, Z, jnp.zeros((2, 1), int)), r"labels are int32\[2, 1\]"),
        (lambda: OBJECTIVE(apply_fn, lambda x: x, temperature=-1), "temperature must be a positive"),
        (lambda: OBJECTIVE(apply_fn, lambda x: x, alpha=-0.1), "must be 0 to 1, got -0.1"),
        (lambda: HINTS(Z, Z[:, :2]), "pass a regressor to that shape, or pick the teacher's channels"),
        (
            lambda: HINTS(Z, Z, lambda f: f[:, :2]),
            r"regressor\(features\) are float32\[2, 2\], the teacher's",
        ),
        (lambda: HINTS(Z[0, 0], Z[0, 0]), r"hints takes features of shape \(n, ...\), got float32\[\]"),
        (lambda: ATTENTION(Z, Z), r"attention takes features of shape \(n, places..., channels\)"),
        (lambda: ATTENTION(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 8, 8, 3))), "all axes but the last"),
        (lambda: ATTENTION(jnp.ones((2, 1, 1, 3)), jnp.ones((2, 1, 1, 3))), "one place alone"),
        (lambda: SIMILARITY(Z, jnp.zeros((3, 3))), "compares the examples of a batch"),
        (lambda: SIMILARITY(Z[:1], Z[:1]), "two or more"),
        (lambda: SOFT(Z, Z.astype(int)), r"teacher_logits must be floating-point, got int32\[2, 3\]"),
        (lambda: MIXED(Z, Z, jnp.zeros(2)), r"labels of shape \(2,\) must be integers, got float32\[2\]"),
        (lambda: OBJECTIVE(apply_fn, {"kernel": Z}), r"teacher must be a function .* functools\.partial"),
        (lambda: HINTS(Z > 0, Z), r"features must be floating-point, got bool\[2, 3\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
