"""wrap_optax and keep_masked, inside every optimizer, wrapper, container and transformation."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from tests.contracts.optimizers import (
    OPTIMIZERS,
    Case,
    assert_state_zero_where_pruned,
    host,
    loss_fn,
    make_batch,
    make_params,
    make_step,
    networks,
)

# The 80 weights under `gradual()`: 0.8 (1 - (1 - (t - 2) / 5)^3) of them are gone at t = 2, 4, 6, 7.
KEPT = (80, 80, 80, 30, 30, 17, 16, 16, 16, 16)
# The same if only the 48 weights of the hidden layer take part, and the other 32 stay.
KEPT_OF_HIDDEN = (80, 80, 80, 50, 50, 42, 42, 42, 42, 42)


def gradual(score: Any = jp.scores.magnitude, **options: Any) -> jp.Pruner:
    return jp.pruner(score, jp.schedules.cubic(0.8, begin_step=2, end_step=7), every=2, **options)


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function, and a list that grows with each call: under `jit`, with each trace."""
    calls = []

    def wrapper(*args):
        calls.append(len(calls))
        return function(*args)

    return wrapper, calls


def assert_zero_where_pruned(params: Any, masks: Any) -> None:
    for network in networks(params):
        for leaf, mask in zip(host(network), host(masks), strict=True):
            assert mask.dtype == bool and mask.shape == leaf.shape
            assert (leaf[~mask] == 0).all()


def assert_nested(after: Any, before: Any) -> None:
    for new, old in zip(host(after), host(before), strict=True):
        assert not (new & ~old).any()


def assert_survivors_move(after: Any, before: Any, masks: Any) -> None:
    for new, old, mask in zip(host(after), host(before), host(masks), strict=True):
        assert (new != old)[mask].any()


def assert_finite(*trees: Any) -> None:
    for leaf in host(trees):
        assert np.isfinite(leaf.astype(np.complex64)).all()


def kept(masks: Any) -> int:
    """How many weights stay. Biases take no part, so all of theirs must."""
    leaves = dict(zip(jp.leaf_paths(masks), host(masks), strict=True))
    assert all(mask.all() for path, mask in leaves.items() if path.endswith("bias"))
    return sum(int(mask.sum()) for path, mask in leaves.items() if not path.endswith("bias"))


def masks_of(opt_state: Any) -> Any:
    return optax.tree.get(opt_state, "masks")


def start(case: Case, dtype: Any) -> tuple[Any, Any]:
    params = make_params(dtype)
    batch = make_batch(jnp.float32 if dtype == jnp.complex64 else dtype)
    return (optax.LookaheadParams.init_synced(params) if case.pair else params), batch


def init(tx: Any, params: Any, case: Case) -> Any:
    opt_state = tx.init(params)
    return jax.tree.map(np.asarray, opt_state) if case.weak else opt_state


def train(
    tx: Any, steps: int, params: Any = None, case: Case = OPTIMIZERS["adam"], step: Any = None
) -> tuple[Any, Any, list[int]]:
    """Trains, checking after each step that what is pruned is 0; also returns what is kept by step."""
    batch = make_batch()
    params = make_params() if params is None else params
    step = jax.jit(make_step(tx, case)) if step is None else step
    opt_state, history = init(tx, params, case), []
    for _ in range(steps):
        params, opt_state, _ = step(params, opt_state, batch)
        masks = masks_of(opt_state)
        assert_zero_where_pruned(params, masks)
        history.append(kept(masks))
    return params, opt_state, history


# Every optimizer in half precision; `test_every_optimizer` has them in single precision


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        *((name, False) for name, case in OPTIMIZERS.items() if jnp.bfloat16 in case.dtypes),
        *((name, True) for name in ("adam", "lamb", "lookahead", "contrib.schedule_free_sgd")),
    ],
)
def test_every_optimizer_in_half_precision(name, keep):
    case = OPTIMIZERS[name]
    initial, batch = params, batch = start(case, jnp.bfloat16)
    if keep:  # the params are not masked yet: they become so with the first update
        masks = jp.prune_once(networks(params)[0], jp.scores.magnitude, sparsity=0.8)
        tx, kept_by_step = jp.keep_masked(case.make(), masks), (16,) * 3
    else:
        pruner = gradual(where=jp.matching("hidden/kernel"), floor=0)
        tx, kept_by_step = jp.wrap_optax(case.make(), pruner), KEPT_OF_HIDDEN
    opt_state = init(tx, params, case)
    step, traces = counted(make_step(tx, case))
    step = jax.jit(step)
    masks = masks_of(opt_state)
    for expected in kept_by_step:
        before = masks
        params, opt_state, loss = step(params, opt_state, batch)
        masks = masks_of(opt_state)
        assert_zero_where_pruned(params, masks)
        assert_nested(masks, before)
        assert kept(masks) == expected
        assert_finite(params, loss)
    assert len(traces) == 1
    assert_survivors_move(networks(params)[0], networks(initial)[0], masks)
    if name != "contrib.galore":  # its state is in a rotated basis
        assert_state_zero_where_pruned(opt_state.inner, masks)


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")])
def test_params_and_gradients_of_different_types(types):
    params = make_params(types[0])
    tx = jp.wrap_optax(optax.sgd(0.1), gradual())  # its updates have the type of the gradients
    opt_state = tx.init(params)
    for _ in range(8):
        # Not jitted, so this is the test of a loop without jit, too.
        grads = jax.tree.map(lambda leaf: jnp.sin(leaf).astype(types[1]), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        assert_zero_where_pruned(params, opt_state.pruner.masks)
    assert kept(opt_state.pruner.masks) == 16


def test_params_that_are_not_masked_yet_are_masked_for_the_optimizer():
    # The trust ratio of LAMB is of norms of params and updates.
    params, grads, masks = make_params(), make_params(seed=1), half_masks()
    tx = jp.keep_masked(optax.lamb(0.1, weight_decay=0.1), masks)
    after = []
    for initial in (params, jp.apply_masks(params, masks)):
        updates, _ = tx.update(grads, tx.init(initial), initial)
        after.append(optax.apply_updates(initial, updates))
        assert_zero_where_pruned(after[-1], masks)
    jax.tree.map(np.testing.assert_array_equal, *after)
    # DoG starts from the norm of the params.
    tx = jp.keep_masked(optax.contrib.dog(), masks)
    assert_identical(tx.init(params), tx.init(jp.apply_masks(params, masks)))


def test_float64_params():
    with jax.enable_x64(True):
        tx = jp.wrap_optax(optax.adam(0.02), gradual())
        params, _, history = train(tx, 8, make_params(jnp.float64))
        assert history == list(KEPT[:8])
        assert {leaf.dtype for leaf in host(params)} == {np.dtype("float64")}


def test_leaves_that_are_not_floating_point_are_left_alone():
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "count": jnp.array(3)}
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
    tx = jp.keep_masked(optax.identity(), masks)
    grads = {"kernel": jnp.ones((2, 4)), "count": jnp.array(1)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["count"].dtype == jnp.int32 and int(updates["count"]) == 1
    assert_zero_where_pruned(optax.apply_updates(params, updates), masks)


def test_zeros_are_exact_in_half_precision_if_steps_are_compiled_together():
    # Several steps in one program leave the compiler free to keep what lies between them in
    # float32 in one place and to round it in another.
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.8, begin_step=1, end_step=3), floor=0)
    tx = jp.wrap_optax(optax.adamw(0.02), pruner)
    step, batch = make_step(tx), make_batch(jnp.bfloat16)

    @jax.jit
    def steps(params, opt_state):
        wrong = []
        for _ in range(4):
            params, opt_state, _ = step(params, opt_state, batch)
            wrong.append(jax.tree.map(lambda p, m: jnp.sum(~m & (p != 0)), params, opt_state.pruner.masks))
        return params, opt_state, wrong

    params = make_params(jnp.bfloat16)
    params, opt_state, wrong = steps(params, tx.init(params))
    assert not any(host(wrong))
    assert_zero_where_pruned(params, opt_state.pruner.masks)
    assert kept(opt_state.pruner.masks) == 16


# Wrappers of optax, inside and around


def kernels_only(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def by_kind(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "kernel" if leaf.ndim == 2 else "bias", params)


INSIDE: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.02)),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.5)), ("adam", optax.adam(0.02))),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        optax.cosine_decay_schedule(0.02, 20), weight_decay=0.1
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.02), 2),
    "partition": lambda: optax.partition({"kernel": optax.adam(0.02), "bias": optax.sgd(0.1)}, by_kind),
    "partition frozen": lambda: optax.partition(
        {"kernel": optax.set_to_zero(), "bias": optax.sgd(0.1)}, by_kind
    ),
    "masked": lambda: optax.chain(optax.adam(0.02), optax.masked(optax.scale(0.5), kernels_only)),
    "masked weight decay": lambda: optax.adamw(0.02, weight_decay=0.5, mask=kernels_only),
    "freeze": lambda: optax.chain(optax.adam(0.02), optax.freeze({"hidden": True, "out": False})),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.02), 3),
    "flatten": lambda: optax.flatten(optax.adam(0.02)),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.adam(0.02), lambda step: step % 2 == 0),
    "conditionally_transform": lambda: optax.chain(
        optax.conditionally_transform(optax.scale_by_adam(), lambda step: step > 3), optax.scale(-0.02)
    ),
    "ema of updates": lambda: optax.chain(optax.adam(0.02), optax.ema(0.9), optax.apply_every(2)),
}


def wrapped() -> Any:
    return jp.wrap_optax(optax.adam(0.02), gradual())


def half_masks() -> Any:
    return jp.prune_once(make_params(), jp.scores.magnitude, sparsity=0.5)


def fixed() -> Any:
    return jp.keep_masked(optax.adam(0.02), half_masks())


# What is kept by step, where the pruner is not asked at every step.
EVERY_OTHER = (80, *np.repeat(KEPT, 2))

WRAPPERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    **{
        f"{name} inside": (lambda make=make: jp.wrap_optax(make(), gradual()), KEPT)
        for name, make in INSIDE.items()
    },
    "chain around": (lambda: optax.chain(optax.clip_by_global_norm(0.5), wrapped()), KEPT),
    "chain with nothing after around": (lambda: optax.chain(wrapped(), optax.identity()), KEPT),
    "inject_hyperparams around": (
        lambda: optax.inject_hyperparams(lambda rate: jp.wrap_optax(optax.adam(rate), gradual()))(rate=0.02),
        KEPT,
    ),
    "MultiSteps around": (lambda: optax.MultiSteps(wrapped(), 2), EVERY_OTHER),
    "apply_if_finite around": (lambda: optax.apply_if_finite(wrapped(), 3), KEPT),
    "conditionally_mask around": (
        lambda: optax.conditionally_mask(wrapped(), lambda step: step % 2 == 1),
        EVERY_OTHER,
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name):
    make, expected = WRAPPERS[name]
    tx = make()
    step, traces = counted(make_step(tx))
    params, opt_state, history = train(tx, len(expected), step=jax.jit(step))
    assert history == list(expected)
    assert len(traces) == 1
    assert_finite(params)
    state = optax.tree.get(opt_state, "WrapOptaxState", opt_state)
    if name != "flatten inside":  # one vector, which mirrors no param
        assert_state_zero_where_pruned(state.inner, state.pruner.masks)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.partition({"kernel": wrapped(), "bias": optax.sgd(0.1)}, by_kind),
        lambda: optax.multi_transform({"kernel": wrapped(), "bias": optax.set_to_zero()}, by_kind),
        lambda: optax.masked(wrapped(), kernels_only),
    ],
    ids=["partition", "multi_transform", "masked"],
)
def test_wrappers_that_show_only_some_of_the_params(make):
    tx, params, batch = make(), make_params(), make_batch()
    step, opt_state = jax.jit(make_step(tx)), tx.init(params)
    for expected in KEPT:
        params, opt_state, _ = step(params, opt_state, batch)
        masks = masks_of(opt_state)
        # The pruner sees an empty node in place of each bias, and so do its masks.
        assert masks["hidden"]["bias"] == masks["out"]["bias"] == optax.MaskedNode()
        assert kept(masks) == expected
        assert_zero_where_pruned({name: {"kernel": params[name]["kernel"]} for name in params}, masks)


def test_keep_masked_on_some_of_the_params():
    # Masks of those alone: containers may differ, if the paths are those of the params it is shown.
    masks = {name: {"kernel": layer["kernel"]} for name, layer in half_masks().items()}
    keep = jp.keep_masked(optax.adam(0.02), masks)
    tx = optax.partition({"kernel": keep, "bias": optax.sgd(0.1)}, by_kind)
    params, batch = make_params(), make_batch()
    params, _, _ = jax.jit(make_step(tx))(params, tx.init(params), batch)
    assert_zero_where_pruned({name: {"kernel": params[name]["kernel"]} for name in params}, masks)


def test_one_pruner_for_each_part_of_the_params():
    def one_shot(sparsity):
        return jp.wrap_optax(
            optax.adam(0.02), jp.pruner(jp.scores.magnitude, jp.schedules.one_shot(sparsity, 1))
        )

    tx = optax.partition({"a": one_shot(0.5), "b": one_shot(0.75)}, {"hidden": "a", "out": "b"})
    params, batch = make_params(), make_batch()
    params, opt_state, _ = jax.jit(make_step(tx))(params, tx.init(params), batch)
    found = [masks for _, masks in optax.tree.get_all_with_path(opt_state, "masks")]
    assert [kept(masks) for masks in found] == [24, 8]
    assert_zero_where_pruned(params["hidden"], found[0]["hidden"])
    assert_zero_where_pruned(params["out"], found[1]["out"])


@pytest.mark.parametrize("make", [wrapped, fixed])
def test_a_transform_chained_after_breaks_the_zeros_and_check_pruned_finds_it(make):
    tx, params = optax.chain(make(), optax.scale(0.5)), make_params()
    params, opt_state = run_on(jax.jit(make_step(tx)), params, tx.init(params), 4)
    with pytest.raises(ValueError, match=r"'hidden/kernel'\] has \d+ pruned entries that are not 0"):
        jp.check_pruned(params, masks_of(opt_state))


def test_map_params_finds_the_moments_and_the_masks():
    params = make_params()
    remembering = jp.wrap_optax(optax.adam(0.02), gradual(memory=0.5))
    for tx in (wrapped(), remembering, fixed()):
        opt_state = tx.init(params)
        marked = optax.tree.map_params(
            tx, lambda leaf: leaf.shape, opt_state, transform_non_params=lambda leaf: None
        )
        shapes = jax.tree.map(lambda leaf: leaf.shape, params)
        assert masks_of(marked) == marked.inner[0].mu == marked.inner[0].nu == shapes
        same = optax.tree.map_params(tx, lambda leaf: leaf, opt_state)
        jax.tree.map(np.testing.assert_array_equal, same, opt_state)


# Bursts of bad gradients


def train_through_bursts(
    tx: Any, bursts: dict[int, float], steps: int, loss: Any = loss_fn
) -> tuple[Any, Any, list[int]]:
    """Multiplies the gradients of the given steps; returns params, state and what is kept by step."""
    batch = make_batch()

    @jax.jit
    def step(params, opt_state, burst):
        grads = jax.tree.map(lambda g: g * burst, jax.grad(loss)(params, batch))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, history = make_params(), []
    opt_state = tx.init(params)
    for index in range(1, steps + 1):
        params, opt_state = step(params, opt_state, bursts.get(index, 1.0))
        assert_zero_where_pruned(params, masks_of(opt_state))
        history.append(kept(masks_of(opt_state)))
    return params, opt_state, history


def careful() -> Any:
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.02)), 5)


@pytest.mark.parametrize(
    ("bursts", "expected"),
    [
        # What was due at 4 is done at 5, and what was due at 6 and 7, at once, at 8.
        *((dict.fromkeys((1, 4, 6, 7), bad), [*[80] * 4, *[30] * 3, *[16] * 3]) for bad in (np.nan, np.inf)),
        ({4: 1e30, 6: 1e30}, [*KEPT]),  # huge, and finite
    ],
)
def test_masks_wait_for_finite_scores(bursts, expected):
    tx = jp.wrap_optax(careful(), gradual(jp.scores.taylor))
    params, _, history = train_through_bursts(tx, bursts, len(KEPT))
    assert history == expected
    assert_finite(params)


def test_what_is_pruned_stays_zero_when_the_rest_is_lost():
    params, opt_state, history = train_through_bursts(wrapped(), {5: np.nan}, 9)
    assert history == [80, 80, 80, 30, 30, 30, 30, 30, 30]  # scores are NaN from then on
    assert np.isnan(params["hidden"]["kernel"]).sum() == opt_state.pruner.masks["hidden"]["kernel"].sum()


def test_a_gradient_that_is_nan_at_zero_does_not_hold_up_pruning():
    # The square root's slope at 0 is infinite, so every pruned weight has a NaN gradient for ever.
    def loss(params, batch):
        return loss_fn(params, batch) + 1e-3 * sum(
            jnp.sum(jnp.sqrt(layer["kernel"] ** 2)) for layer in params.values()
        )

    tx = jp.wrap_optax(optax.adam(0.02), gradual(jp.scores.taylor))
    params, _, history = train_through_bursts(tx, {}, 10, loss)
    assert_finite(params)
    assert history == list(KEPT)


# The survivors of the masked network train as if the rest had never been there


SAME_WITHOUT = {
    "sgd momentum": Case(lambda: optax.sgd(0.1, momentum=0.9)),
    "clip + adam": Case(lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.02))),
    **{name: OPTIMIZERS[name] for name in ("adam", "adamw", "lion", "lamb", "lars", "lbfgs", "polyak_sgd")},
    **{
        name: OPTIMIZERS["contrib." + name]
        for name in ("dog", "mechanize", "prodigy", "schedule_free", "sam")
    },
}


@pytest.mark.parametrize("name", SAME_WITHOUT)
def test_keep_masked_trains_as_if_pruned_weights_did_not_exist(name):
    case, batch, masks = SAME_WITHOUT[name], make_batch(), jax.tree.map(np.asarray, half_masks())

    def shrink(tree):
        return jax.tree.map(lambda leaf, mask: leaf[mask], tree, masks)

    def loss(params, batch):
        return loss_fn(jax.tree.map(lambda p, m: jnp.zeros(m.shape).at[m].set(p), params, masks), batch)

    params = jp.apply_masks(make_params(), masks)
    without = shrink(params)
    tx, plain = jp.keep_masked(case.make(), masks), case.make()
    opt_state, plain_state = init(tx, params, case), init(plain, without, case)
    step, plain_step = jax.jit(make_step(tx, case)), jax.jit(make_step(plain, case, loss))
    for _ in range(12):
        params, opt_state, value = step(params, opt_state, batch)
        without, plain_state, plain_value = plain_step(without, plain_state, batch)
        np.testing.assert_allclose(value, plain_value, rtol=1e-3)
    for leaf, other in zip(host(shrink(params)), host(without), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)


# What optimizers keep in their states


def test_accumulated_gradients_are_zero_where_pruned():
    tx = jp.wrap_optax(optax.MultiSteps(optax.adam(0.02), 4), gradual())
    _, opt_state, _ = train(tx, 6)  # between two emitted updates
    assert_zero_where_pruned(opt_state.inner.acc_grads, opt_state.pruner.masks)
    assert all((leaf != 0).any() for leaf in host(opt_state.inner.acc_grads))


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("schedule_free", False),
        ("schedule_free_adamw", False),
        ("schedule_free_sgd", False),
        ("schedule_free_sgd", True),
    ],
)
def test_schedule_free_evaluates_to_exact_zeros(name, keep):
    make = OPTIMIZERS["contrib." + name].make
    tx = jp.keep_masked(make(), half_masks()) if keep else jp.wrap_optax(make(), gradual())
    params, opt_state, _ = train(tx, 8)
    evaluated = optax.contrib.schedule_free_eval_params(opt_state.inner, params)
    assert_zero_where_pruned(evaluated, masks_of(opt_state))
    assert_zero_where_pruned(opt_state.inner.z, masks_of(opt_state))


@pytest.mark.parametrize("search", ["zoom", "backtracking"])
def test_a_line_search_forgets_where_it_ended_when_masks_move_the_params(search):
    linesearch = {
        "zoom": optax.scale_by_zoom_linesearch(15),
        "backtracking": optax.scale_by_backtracking_linesearch(15, store_grad=True),
    }[search]
    tx, batch = jp.wrap_optax(optax.lbfgs(linesearch=linesearch), gradual()), make_batch()

    def objective(params):
        return loss_fn(params, batch)

    @jax.jit
    def step(params, opt_state):
        true_value, true_grads = jax.value_and_grad(objective)(params)
        stored = optax.tree.get(opt_state, "value")
        value, grads = optax.value_and_grad_from_state(objective)(params, state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, value=value, grad=grads, value_fn=objective)
        params = optax.apply_updates(params, updates)
        return params, opt_state, stored, (value, true_value), (grads, true_grads)

    params = make_params()
    opt_state = jax.tree.map(np.asarray, tx.init(params))
    recycled = []
    for _ in range(10):
        masks = masks_of(opt_state)
        params, opt_state, stored, values, grads = step(params, opt_state)
        recycled.append(bool(np.isfinite(stored)))
        np.testing.assert_allclose(*values, rtol=1e-5)
        seen = [host(jp.apply_masks(grad, masks)) for grad in grads]
        for grad, true_grad in zip(*seen, strict=True):
            np.testing.assert_allclose(grad, true_grad, rtol=1e-4, atol=1e-6)
    # Step 1 has nothing to recycle; masks changed in steps 4, 6 and 7.
    assert recycled == [False, True, True, True, False, True, False, False, True, True]


def test_galore_keeps_its_basis():
    # With a rank of the kernel's smaller side or more, the basis has the kernel's shape. It is not
    # the kernel's, and masked it would span nothing.
    masks = half_masks()
    tx = jp.keep_masked(optax.contrib.galore(0.02, rank=128), masks)
    _, opt_state, _ = train(tx, 3)
    basis = opt_state.inner[0].projector["out"]["kernel"]
    assert basis.shape == (8, 4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)


def test_extra_arguments_reach_the_optimizer_and_the_score():
    def by_importance(params, *, importance, **extra):
        assert set(extra) == {"grads", "key"}  # `value` is for the optimizer, and not named here
        return importance

    params = {"kernel": jnp.ones((2, 4))}
    importance = {"kernel": jnp.arange(8.0).reshape(2, 4)}
    pruner = jp.pruner(by_importance, jp.schedules.one_shot(0.5, step=1))
    tx = jp.wrap_optax(optax.polyak_sgd(), pruner)
    updates, opt_state = tx.update(params, tx.init(params), params, value=0.5, importance=importance)
    assert opt_state.pruner.masks["kernel"].tolist() == [[False] * 4, [True] * 4]
    assert_zero_where_pruned(optax.apply_updates(params, updates), opt_state.pruner.masks)


# Other params than a dict


class Mlp(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(8, 4, rngs=nnx.Rngs(1))
        for name, layer in make_params().items():
            getattr(self, name).kernel[...] = layer["kernel"]
            getattr(self, name).bias[...] = layer["bias"]

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def test_a_bare_array():
    params = make_params()["hidden"]["kernel"]
    x, _ = make_batch()
    tx = jp.wrap_optax(optax.adam(0.02), gradual())
    opt_state = tx.init(params)
    step = jax.jit(make_step(tx, loss_fn=lambda params, batch: jnp.mean((batch @ params - 1.0) ** 2)))
    for _ in range(8):
        params, opt_state, _ = step(params, opt_state, x)
    assert int(opt_state.pruner.masks.sum()) == 48 - round(0.8 * 48)
    assert_zero_where_pruned((params, *opt_state.inner[0][1:]), (opt_state.pruner.masks,) * 3)


def nnx_trained(model: nnx.Module, tx: Any, steps: int) -> tuple[nnx.Optimizer, int]:
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x, y = make_batch()

    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)

    step, traces = counted(step)
    jitted = nnx.jit(step)
    for _ in range(steps):
        jitted(model, optimizer)
    return optimizer, len(traces)


def test_nnx_optimizer():
    model = Mlp()
    optimizer, traces = nnx_trained(model, wrapped(), 8)
    masks = optax.tree.get(optimizer.opt_state, "masks")
    assert traces == 1
    assert jp.leaf_paths(masks) == jp.leaf_paths(nnx.state(model, nnx.Param))
    assert kept(masks) == 16
    assert_zero_where_pruned(nnx.state(model, nnx.Param), masks)
    jp.check_pruned(nnx.state(model, nnx.Param), masks)
    jp.apply_masks(nnx.state(model, nnx.Param), masks)

    # Fine-tuning takes the masks as the optimizer gives them, in its own kind of variables.
    optimizer, _ = nnx_trained(model, jp.keep_masked(optax.sgd(0.1, momentum=0.9), masks), 3)
    assert_zero_where_pruned(nnx.state(model, nnx.Param), masks)
    assert_zero_where_pruned(optax.tree.get(optimizer.opt_state, "trace"), masks)


# Wrong use


@pytest.mark.parametrize("make", [wrapped, fixed])
def test_update_without_params_raises(make):
    tx, params = make(), make_params()
    with pytest.raises(ValueError, match=r"call tx\.update\(grads, opt_state, params\)"):
        tx.update(params, tx.init(params))


def test_arguments_in_the_wrong_order_raise():
    call: Any
    for call, arguments, message in (
        (jp.wrap_optax, (gradual(), optax.adam(0.02)), "a jaxprune Pruner, in this order, got Pruner and"),
        (jp.keep_masked, (half_masks(), optax.adam(0.02)), "takes an optax optimizer first, got a dict"),
        (jp.keep_masked, (gradual(), half_masks()), "takes an optax optimizer first, got Pruner"),
        (
            jp.wrap_optax,
            (optax.adam(0.02), jp.schedules.constant(0.5)),
            "got GradientTransformationExtraArgs and Schedule",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: {"hidden": m["hidden"]},
            ValueError,
            r"Missing: out/bias, out/kernel\. Not in params: none",
        ),
        (
            lambda m: m | {"head": {"kernel": jnp.ones(2, bool)}},
            ValueError,
            r"Missing: none\. Not in params: head/kernel",
        ),
        (
            lambda m: m | {"out": m["out"] | {"kernel": m["out"]["kernel"].T}},
            ValueError,
            r"masks\['out/kernel'\] has shape \(4, 8\), but .*\(8, 4\)",
        ),
        (
            lambda m: jax.tree.map(lambda mask: mask.astype(jnp.int32), m),
            TypeError,
            r"masks\['hidden/bias'\] is int32\[8\], but masks are bool",
        ),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_masks_that_do_not_mirror_the_params_raise(change, error, message):
    with pytest.raises(error, match=message):
        jp.keep_masked(optax.adam(0.02), change(half_masks())).init(make_params())


def test_a_state_of_other_params_raises():
    tx = jp.keep_masked(optax.sgd(0.1), half_masks())
    opt_state = tx.init(make_params())
    other = {"hidden": make_params()["hidden"]}
    with pytest.raises(ValueError, match="Not in params: out/bias, out/kernel"):
        tx.update(other, opt_state, other)


def test_an_empty_tree_raises_on_update():
    tx = wrapped()
    with pytest.raises(ValueError, match="empty tree"):
        tx.update({}, tx.init({}), {})


# Checkpoints, donation, scan, vmap, sharding, strict promotion


def run_on(step: Any, params: Any, opt_state: Any, steps: int) -> tuple[Any, Any]:
    batch = make_batch()
    for _ in range(steps):
        params, opt_state, _ = step(params, opt_state, batch)
    return params, opt_state


def assert_identical(tree: Any, other: Any) -> None:
    for leaf, wanted in zip(host(tree), host(other), strict=True):
        assert leaf.dtype == wanted.dtype and leaf.tobytes() == wanted.tobytes()


def test_a_restored_keep_masked_state_continues_bit_by_bit():
    params = make_params()
    tx = jp.keep_masked(optax.adam(0.02), half_masks())
    step = jax.jit(make_step(tx))
    halfway = run_on(step, params, tx.init(params), 3)
    stored = flax.serialization.to_bytes(halfway)
    # The masks are in the state: those that the restored optimizer was made with do not matter.
    other = jp.keep_masked(optax.adam(0.02), jp.ones_masks(params))
    restored = flax.serialization.from_bytes((params, other.init(params)), stored)
    got = run_on(jax.jit(make_step(other)), *restored, 3)
    assert_identical(got, run_on(step, *halfway, 3))


@pytest.mark.parametrize("make", [wrapped, fixed])
def test_params_and_state_may_be_donated(make):
    tx, params = make(), make_params()
    step = make_step(tx)
    wanted = run_on(jax.jit(step), params, tx.init(params), 5)
    got = run_on(jax.jit(step, donate_argnums=(0, 1)), make_params(), tx.init(params), 5)
    assert_identical(got, wanted)


def test_the_masks_of_the_caller_are_not_donated():
    masks, params = half_masks(), make_params()
    tx = jp.keep_masked(optax.adam(0.02), masks)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    params, _ = run_on(step, params, tx.init(params), 2)
    jp.check_pruned(params, masks)
    tx.init(params)


def moving() -> Any:
    return jp.wrap_optax(optax.adam(0.02), jp.rigl(half_masks(), every=3, end_step=30))


@pytest.mark.parametrize(("make", "kept_by_step"), [(wrapped, KEPT), (moving, (40,) * 10)])
def test_scan_and_vmap_equal_the_loop(make, kept_by_step):
    tx, batch = make(), make_batch()
    step = make_step(tx)

    def run(params):
        def body(carry, _):
            params, opt_state, loss = step(*carry, batch)
            return (params, opt_state), (loss, opt_state.pruner.masks)

        return jax.lax.scan(body, (params, tx.init(params)), length=len(KEPT))

    seeds = [make_params(seed=seed) for seed in range(3)]
    scan, jitted = jax.jit(run), jax.jit(step)
    stacked = jax.jit(jax.vmap(run))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
    for index, params in enumerate(seeds):
        looped, opt_state = params, tx.init(params)
        first = opt_state.pruner.masks
        (scan_params, _), (losses, masks) = scan(params)
        (vmap_params, _), (vmap_losses, vmap_masks) = jax.tree.map(itemgetter(index), stacked)
        for t, expected in enumerate(kept_by_step):
            looped, opt_state, loss = jitted(looped, opt_state, batch)
            assert kept(opt_state.pruner.masks) == expected
            assert_identical(jax.tree.map(itemgetter(t), masks), opt_state.pruner.masks)
            assert_identical(jax.tree.map(itemgetter(t), vmap_masks), opt_state.pruner.masks)
            np.testing.assert_allclose([losses[t], vmap_losses[t]], [loss, loss], rtol=1e-4)
        assert any(
            (new != old).any() for new, old in zip(host(opt_state.pruner.masks), host(first), strict=True)
        )
        for trained in (scan_params, vmap_params):
            assert_zero_where_pruned(trained, opt_state.pruner.masks)
            for leaf, wanted in zip(host(trained), host(looped), strict=True):
                np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-5)


def test_strict_dtype_promotion():
    # Not with Adam: optax's own bias correction mixes types.
    make = OPTIMIZERS["sgd nesterov"].make
    with jax.numpy_dtype_promotion("strict"):
        _, _, history = train(jp.wrap_optax(make(), gradual()), 8)
        assert history == list(KEPT[:8])
        _, opt_state, _ = train(jp.keep_masked(make(), half_masks()), 2)
        assert kept(opt_state.masks) == 40


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_a_traced_step_traces_the_score_and_the_optimizer_once(memory):
    traced = []

    def score(params, *, grads, key, **_):
        traced.append("score")
        return jax.tree.map(jnp.abs, grads)

    def update(grads, state, params=None):
        traced.append("optimizer")
        return jax.tree.map(jnp.negative, grads), state

    params = {"kernel": jnp.ones((3, 4))}
    optimizer = optax.GradientTransformation(lambda params: (), update)
    tx = jp.wrap_optax(optimizer, jp.pruner(score, sparsity=0.5, memory=memory))
    jax.jit(tx.update).lower(params, tx.init(params), params)
    assert sorted(traced) == ["optimizer", "score"]
