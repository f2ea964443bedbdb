"""Params that a network divides by: masks leave them alive, and `compact` drops them all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.graph.engine import singular
from jaxprune.graph.equivalence import gap
from jaxprune.tree.stacks import split_layers

X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layers(**more):
    """Return params of two layers with 6 hidden units, and more params."""
    return {"a": normal(1, 8, 6), "b": normal(2, 6, 3), **more}


S = np.linspace(0.5, 1.0, 6, dtype=np.float32)
ONES = np.ones(6, np.float32)


def hidden(scaled):
    """Return a network of two layers, the first of which is `scaled(x @ a, params)`."""
    return lambda p, x: jax.nn.relu(scaled(x @ p["a"], p)) @ p["b"]


def weight(made):
    """Return a network of two layers, the first of which has the kernel `made(params)`."""
    return lambda p, x: jax.nn.relu(x @ made(p)) @ p["b"]


@jax.custom_vjp
def round_through(x):
    return jnp.round(x)


round_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def attention(normalise, scores=lambda s, p: s):
    def apply_fn(p, x):
        x = x.reshape(2, 2, 8)
        q, k, v = ((x @ p[n] + p.get("bias_" + n, 0)).reshape(2, 2, 4, 3) for n in "qkv")
        s = jax.nn.softmax(scores(jnp.einsum("bqhd,bkhd->bhqk", normalise(q), normalise(k)), p))
        return jnp.einsum("bhqk,bkhd->bqhd", s, v).reshape(2, 2, 12) @ p["o"]

    return apply_fn


def fused_attention(p, x):
    q, k, v = (part.reshape(2, 2, 4, 3) for part in jnp.split(x.reshape(2, 2, 8) @ p["qkv"], 3, axis=-1))
    q, k = unit(q), unit(k)
    s = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", s, v).reshape(2, 2, 12) @ p["o"]


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


HEADS = {n: normal(i, 8, 12) for i, n in enumerate("qkv")} | {"o": normal(9, 12, 3)}
BIASES = {f"bias_{n}": np.zeros(12, np.float32) for n in "qkv"}


def snake(h, p):
    return h + jnp.sin(p["s"] * h) ** 2 / p["s"]


def lsq(p):
    return round_through(jnp.clip(p["a"] / p["s"], -8, 7)) * p["s"]


def lsq_detached(p):
    w = p["a"] / p["s"]
    return (w + lax.stop_gradient(jnp.round(w) - w)) * p["s"]


def batch_norm(h, p):
    return (h - h.mean(0)) * lax.rsqrt(h.var(0)) * p["scale"] + p["shift"]


def frozen_batch_norm(h, p):
    return (h - p["mean"]) * lax.rsqrt(p["var"]) * p["scale"] + p["shift"]


def two_normed(p, x):
    w, u = (p["g" + n] * p["v" + n] / jnp.linalg.norm(p["v" + n], axis=0) for n in "12")
    return jax.nn.relu(jax.nn.relu(x @ w + p["c"]) @ u) @ p["o"]


TWO_NORMED = {"v1": normal(1, 8, 6), "g1": ONES, "v2": normal(2, 6, 5), "g2": ONES[:5]}
TWO_NORMED |= {"c": ONES, "o": normal(3, 5, 3)}


def scanned(p, x):
    def layer(h, w):
        return h + jax.nn.relu(h @ w["a"] / w["s"]) @ w["b"], None

    return lax.scan(layer, x, {n: p[n] for n in "asb"})[0] @ p["o"]


def branches(h, p):
    return lax.cond(h[0, 0] > 0, lambda h: h / p["s"], lambda h: h, h)


def two_readers(p, x):
    return jax.nn.relu(x @ p["a"] / p["s"]) @ p["b"] + jax.nn.relu(x @ p["c"] / p["s"]) @ p["d"]


def half_divides(p, x):
    return jax.nn.relu(x @ p["a"] / p["s"][:6]) @ p["b"] + jax.nn.relu(x @ p["c"] * p["s"][6:]) @ p["d"]


def normed(p):
    return p["a"] / jnp.linalg.norm(p["a"], axis=0)


CASES = {
    "a scale": (hidden(lambda h, p: h / p["s"]), layers(s=S), {"s"}),
    "a reciprocal": (hidden(lambda h, p: h * (1 / p["s"])), layers(s=S), {"s"}),
    "a standard deviation": (hidden(lambda h, p: (h - p["m"]) / (p["s"] + 0)), layers(s=S, m=S), {"s"}),
    "a negative power": (hidden(lambda h, p: h * p["s"] ** -2), layers(s=S), {"s"}),
    "a negative root": (hidden(lambda h, p: h * p["s"] ** -0.5), layers(s=S), {"s"}),
    "a learned power": (hidden(lambda h, p: h * p["s"] ** -p["e"]), layers(s=S, e=np.float32(1)), {"s"}),
    "a logarithm": (hidden(lambda h, p: h * jnp.log(p["s"])), layers(s=S), {"s"}),
    "a remainder": (hidden(lambda h, p: h % p["s"]), layers(s=S), {"s"}),
    "a product of scales": (hidden(lambda h, p: h / (p["s"] * p["r"])), layers(s=S, r=S), {"s", "r"}),
    "a gate": (lambda p, x: jnp.tanh(x @ p["a"] / (x @ p["d"])) @ p["b"], layers(d=normal(3, 8, 6)), {"d"}),
    "weight normalisation": (weight(lambda p: p["g"] * normed(p)), layers(g=ONES), {"a"}),
    "no gain": (weight(normed), layers(), {"a"}),
    "rsqrt": (weight(lambda p: p["a"] * lax.rsqrt((p["a"] ** 2).sum(0))), layers(), {"a"}),
    "a median": (weight(lambda p: p["a"] / jnp.median(jnp.abs(p["a"]), axis=0)), layers(), {"a"}),
    "written over": (
        hidden(lambda h, p: h / lax.dynamic_update_slice(jnp.ones(6), p["s"], (0,))),
        layers(s=S),
        {"s"},
    ),
    "rows that are read": (
        lambda p, x: jax.nn.relu(x @ p["a"]) @ (p["b"] / jnp.linalg.norm(p["b"], axis=1, keepdims=True)),
        layers(),
        {"b"},
    ),
    "two in a row": (two_normed, TWO_NORMED, {"v1", "v2"}),
    "snake": (hidden(snake), layers(s=S), {"s"}),
    "steps": (weight(lsq), layers(s=S), {"s"}),
    "detached steps": (weight(lsq_detached), layers(s=S), {"s"}),
    "temperature": (
        attention(lambda x: x, lambda s, p: s / p["t"][:, None, None]),
        HEADS | {"t": ONES[:4]},
        {"t"},
    ),
    "queries and keys": (attention(unit), HEADS, {"q", "k"}),
    "with biases": (attention(unit), HEADS | BIASES, {"q", "k", "bias_q", "bias_k"}),
    "fused": (fused_attention, {"qkv": normal(1, 8, 36), "o": normal(2, 12, 3)}, {"qkv"}),
    "batch norm": (hidden(batch_norm), layers(scale=ONES, shift=S), {"a"}),
    "its state": (hidden(frozen_batch_norm), layers(scale=ONES, shift=S, mean=S, var=ONES), {"var"}),
    "jit": (hidden(lambda h, p: jax.jit(jnp.divide)(h, p["s"])), layers(s=S), {"s"}),
    "remat": (hidden(lambda h, p: jax.checkpoint(jnp.divide)(h, p["s"])), layers(s=S), {"s"}),
    "cond": (hidden(branches), layers(s=S), {"s"}),
    "vmap": (hidden(lambda h, p: jax.vmap(lambda h: h / p["s"])(h)), layers(s=S), {"s"}),
    "scan": (
        scanned,
        {"a": normal(1, 2, 8, 6) / 9, "s": np.stack([S, S]), "b": normal(2, 2, 6, 8), "o": normal(3, 8, 3)},
        {"s"},
    ),
    # A param that two layers divide by is in no unit, so masks leave it alone.
    "two readers": (two_readers, layers(s=S, c=normal(3, 8, 6), d=normal(4, 6, 3)), set()),
    "a where": (hidden(lambda h, p: jnp.where(p["s"] > 0, h / p["s"], 0)), layers(s=S), {"s"}),
    # A norm is finite at zero, but its derivative is not.
    "a norm and epsilon": (
        weight(lambda p: p["a"] / (jnp.linalg.norm(p["a"], axis=0) + 1e-6)),
        layers(),
        {"a"},
    ),
    "a deviation and epsilon": (hidden(lambda h, p: h / (h.std(0) + 1e-3)), layers(), {"a"}),
}
WITHOUT = {
    "epsilon": (hidden(lambda h, p: h / (p["s"] + 1e-6)), layers(s=S)),
    "epsilon inside the root": (weight(lambda p: p["a"] * lax.rsqrt((p["a"] ** 2).sum(0) + 1e-6)), layers()),
    "softplus": (hidden(lambda h, p: h / jax.nn.softplus(p["s"])), layers(s=S)),
    "a positive power": (hidden(lambda h, p: h * p["s"] ** p["e"]), layers(s=S, e=np.float32(2))),
    "a scalar": (hidden(lambda h, p: h / p["t"]), layers(t=np.float32(2))),
    "a scaled norm": (
        hidden(lambda h, p: h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6) * p["s"]),
        layers(s=S),
    ),
    "softmax": (attention(lambda x: x), HEADS),
    # Minus infinity is intended here: its exponential is zero.
    "log of sums": (
        lambda p, x: jax.nn.logsumexp(jnp.log(jnp.abs(x @ p["a"]))[..., None] + p["b"], axis=1),
        layers(),
    ),
}


def everywhere(path, leaf):
    return True


def halved(apply_fn, params, **options):
    """Return masks without half of the units of each group, and the groups."""
    groups = jp.channel_groups(apply_fn, params, X)
    structure = jp.structures.channels(groups, **options)
    masks = jp.prune_once(
        params, jp.scores.magnitude, 0.5, scope="layerwise", structure=structure, where=everywhere
    )
    return masks, groups


def divisors(groups):
    # A layer of a stack, such as "s[0]", counts under the path of the stack.
    return {member.path.partition("[")[0] for group in groups for member in group.members if member.divisor}


def close_to(a, b, tolerance=1e-4):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return True


def all_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CASES)
def test_divisors_stay_alive_and_go_with_their_unit(name):
    apply_fn, params, expected = CASES[name]
    masks, groups = halved(apply_fn, params)
    assert divisors(groups) == expected
    small = jp.compact(apply_fn, params, masks, X, verify=False)
    left = split_layers(dict(small.params), groups.stacks)
    masks_of = split_layers({path: np.asarray(mask) for path, mask in masks.items()}, groups.stacks)
    for group in groups.removable():
        assert group.units == max(len(np.unique(m.indices)) // m.indices.shape[1] for m in group.members)
        for path, axis, indices, shape, divisor in group.members:
            mask = np.moveaxis(masks_of[path], axis, 0).reshape(shape[axis], -1)
            pruned = np.all(~mask[indices.ravel()].reshape(group.units, -1), axis=1)
            assert int(np.sum(pruned)) == (0 if divisor else group.units // 2)
            assert left[path].shape[axis] == shape[axis] - group.units // 2 * indices.shape[1]

    @jax.jit
    def with_gradient(params):
        loss = lambda p: (out := apply_fn(p, X), (out**2).sum())[::-1]  # noqa: E731
        return jax.grad(loss, has_aux=True)(params)

    gradient, expected = with_gradient(jp.apply_masks(params, masks))
    dense_gradient, dense = with_gradient(small.expand(small.params))
    assert all_finite((gradient, dense_gradient, expected))
    got = jax.jit(small.apply)(small.params, X)
    assert close_to(got, expected) and close_to(dense, expected)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_not_zero_is_no_divisor(name):
    apply_fn, params = WITHOUT[name]
    masks, groups = halved(apply_fn, params)
    assert len(groups.removable()) == 1 and not divisors(groups)
    small = jp.compact(apply_fn, params, masks, X)
    (group,) = groups
    assert small.plan.divisors == {}
    for path, axis, indices, shape, _ in group.members:
        assert small.params[path].shape[axis] == shape[axis] - group.units // 2 * indices.shape[1]


def test_slices_of_one_param_may_be_divisors_of_one_group_and_not_of_another():
    params = layers(c=normal(3, 8, 6), d=normal(4, 6, 3), s=np.concatenate([S, S]))
    masks, groups = halved(half_divides, params)
    assert [[m.divisor for m in group.members if m.path == "s"] for group in groups] == [[True], [False]]
    assert np.asarray(masks["s"]).reshape(2, 6).sum(1).tolist() == [6, 3]
    small = jp.compact(half_divides, params, masks, X)
    assert small.params["s"].shape == (6,)


def sigmoid_and_rows(p, x):
    return jax.nn.sigmoid(x @ p["a"]) @ (p["b"] / jnp.linalg.norm(p["b"], axis=1, keepdims=True))


READ_ELSEWHERE = [
    (lambda p, x: jnp.sum(x[:, :1] / p["s"], -1), {"s": S}, "s[0]"),
    (lambda p, x: (jax.nn.relu(x @ p["a"] / p["s"]) @ p["b"], jnp.log(p["s"]).sum()), layers(s=S), "s[0]"),
    (lambda p, x: (x @ p["a"] / p["s"] + p["a"].sum(0)) @ p["b"] + p["s"].mean(), layers(s=S), "s[0]"),
    (sigmoid_and_rows, layers(), "b[0]"),
]


@pytest.mark.parametrize(("apply_fn", "params", "divisor"), READ_ELSEWHERE)
def test_a_divisor_that_something_else_reads_keeps_the_group_whole(apply_fn, params, divisor):
    (group,) = jp.channel_groups(apply_fn, params, X)
    assert group.why_not is not None
    assert "div at test_divisors.py:" in group.why_not and divisor in group.why_not
    assert not any(member.divisor for member in group.members)


def test_the_table_shows_divisors():
    apply_fn, params, _ = CASES["weight normalisation"]
    assert "a[1](divisor) b[0] g[0]" in str(jp.channel_groups(apply_fn, params, X))


def test_a_part_of_the_params_that_is_only_divided_by_is_whole():
    apply_fn, params, _ = CASES["a scale"]
    params = {"params": {k: params[k] for k in "ab"}, "stats": {"s": S}}
    groups = jp.channel_groups(lambda p, x: apply_fn({**p["params"], **p["stats"]}, x), params, X)
    assert groups.under("params").removable()
    (group,) = groups.under("stats")
    assert group.why_not is not None and "divides by all" in group.why_not


@pytest.mark.parametrize(
    "name", ["weight normalisation", "temperature", "with biases", "batch norm", "steps"]
)
def test_gradual_pruning_stays_finite_and_reaches_the_target(name):
    apply_fn, params, _ = CASES[name]
    groups = jp.channel_groups(apply_fn, params, X)
    target = normal(5, *jax.eval_shape(apply_fn, params, X).shape)
    pruner = jp.pruner(
        jp.scores.magnitude,
        jp.schedules.linear(0.5, begin_step=1, end_step=9),
        structure=jp.structures.channels(groups, axis=-1),
        every=2,
    )
    tx = jp.wrap_optax(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), pruner)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: ((apply_fn(p, X) - target) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(12):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    masks = optax.tree.get(state, "masks")
    jp.check_pruned(params, masks)
    small = jp.compact(apply_fn, params, masks, X)
    (group,) = groups
    first = group.members[0]
    assert small.params[first.path].shape[first.axis] == first.shape[first.axis] // 2


def test_pruned_units_count_as_pruned_where_only_a_divisor_gives_scores():
    apply_fn, params, _ = CASES["weight normalisation"]
    structure = jp.structures.channels(jp.channel_groups(apply_fn, params, X))
    options = {"structure": structure, "where": lambda path, leaf: path == "a"}
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5, **options)
    again = jp.prune_once(params, jp.scores.magnitude, count=1, masks=masks, **options)
    norms = np.linalg.norm(params["a"], axis=0)
    assert np.asarray(masks["g"]).tolist() == (norms > np.sort(norms)[2]).tolist()
    assert np.asarray(again["g"]).tolist() == (norms > np.sort(norms)[3]).tolist()
    assert np.asarray(again["a"]).all()


def test_widths_are_rounded_up_with_units_that_are_finite():
    apply_fn, params, _ = CASES["weight normalisation"]
    masks, _ = halved(apply_fn, params)
    small = jp.compact(apply_fn, params, masks, X, multiple_of=4)
    assert small.params["a"].shape == (8, 4)
    assert close_to(small.apply(small.params, X), apply_fn(jp.apply_masks(params, masks), X))


def test_double_precision_is_exact():
    apply_fn, params, _ = CASES["two in a row"]
    masks, _ = halved(apply_fn, params)
    with jax.enable_x64(True):
        wide = {path: jnp.asarray(leaf, jnp.float64) for path, leaf in params.items()}
        small = jp.compact(apply_fn, wide, masks, X.astype(np.float64), verify=False)
        expected = jax.jit(apply_fn)(jp.apply_masks(wide, masks), X.astype(np.float64))
        assert close_to(jax.jit(small.apply)(small.params, X.astype(np.float64)), expected, 1e-12)


def test_a_plan_remembers_its_divisors():
    apply_fn, params, _ = CASES["two in a row"]
    masks, _ = halved(apply_fn, params)
    small = jp.compact(apply_fn, params, masks, X, verify=False)
    assert small.plan.divisors == {"v1": (1,), "v2": (1,)}
    plan = small.plan
    dense = plan.expand(small.params)
    kept, rows = plan.keep["v2"][1], plan.keep["v2"][0]
    dropped = np.setdiff1d(np.arange(5), kept)
    # Copies of the kept columns, in turn, and zeros where the row was dropped as well.
    expected = np.zeros((6, 5), np.float32)
    expected[np.ix_(rows, kept)] = small.params["v2"]
    expected[:, dropped] = expected[:, kept[np.arange(len(dropped)) % len(kept)]]
    assert np.asarray(dense["v2"]).tolist() == expected.tolist()
    assert np.asarray(plan.expand(small.masks)["v1"]).all()
    lost = np.setdiff1d(np.arange(6), plan.keep["v1"][1])
    assert not np.asarray(plan.expand({"mu": small.params})["mu"]["v1"])[:, lost].any()
    assert np.asarray(plan.expand({"params": small.params})["params"]["v1"])[:, lost].all()
    again = jp.compact(apply_fn, dense, plan, X)
    assert close_to(again.apply(again.params, X), apply_fn(jp.apply_masks(params, masks), X))


def test_plans_with_divisors_are_files(tmp_path):
    plan = jp.Plan({"p/s": (3,)}, {"p/s": {0: np.array([0, 2])}}, {"p/s": (0,)})
    plan.save(tmp_path / "plan.npz")
    assert jp.Plan.load(tmp_path / "plan.npz").divisors == {"p/s": (0,)}
    assert plan.under("p").divisors == {"s": (0,)}
    jp.Plan(plan.shapes, {}, {"p/s": (0,)}).save(tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match="divisors of p/s"):
        jp.Plan.load(tmp_path / "wrong.npz")


@pytest.mark.parametrize(("name", "path"), [("a scale", "s"), ("weight normalisation", "a"), ("snake", "s")])
def test_masks_by_hand_that_zero_a_divisor_are_told_from_a_bug(name, path):
    apply_fn, params, _ = CASES[name]
    masks = jp.ones_masks(params)
    for leaf, axis in (("a", 1), ("b", 0), (path, params[path].ndim - 1)):
        masks[leaf] = jnp.moveaxis(jnp.moveaxis(masks[leaf], axis, 0).at[1].set(False), 0, axis)
    with pytest.raises(
        ValueError, match=rf"not finite.* at test_divisors.py:\d+ .*params\['{path}'\]"
    ) as error:
        jp.compact(apply_fn, params, masks, X)
    assert "bug" not in str(error.value)
    small = jp.compact(apply_fn, params, masks, X, verify=False)
    assert all_finite(small.apply(small.params, X))


def deep_params(scale=1):
    return {"a": normal(1, 8, 64), "w": normal(2, 64, 64) * scale, "b": normal(3, 64, 9)}


def deep(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["w"]) @ p["b"]


@pytest.mark.parametrize(("dtype", "scale"), [(jnp.float32, 1e37), (jnp.float16, 1e4), (jnp.bfloat16, 1e37)])
def test_an_overflow_is_told_from_a_bug(dtype, scale):
    params = {path: jnp.asarray(leaf, dtype) for path, leaf in deep_params(scale).items()}
    groups = jp.channel_groups(deep, params, X.astype(dtype))
    masks = jp.prune_once(params, jp.scores.magnitude, 0.3, structure=jp.structures.channels(groups))
    expected = r"not finite.* at test_divisors.py:\d+ .*overflow.*verify=False"
    with pytest.raises(ValueError, match=expected) as error:
        jp.compact(deep, params, masks, jnp.asarray(X, dtype))
    assert "bug" not in str(error.value)
    assert jp.compact(deep, params, masks, jnp.asarray(X, dtype), verify=False).plan.keep


def test_params_that_are_not_finite_are_named():
    params = deep_params()
    params["w"][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"params\['w'\] has NaN or infinite entries itself"):
        jp.compact(deep, params, jp.ones_masks(params), X)


def test_infinities_that_are_meant_agree():
    def apply_fn(p, x):
        h = jax.nn.relu(x @ p["a"]) @ p["b"] / 9
        scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), h @ h.T, -jnp.inf)
        return jnp.log(jax.nn.softmax(scores)), h

    masks, _ = halved(apply_fn, layers())
    small = jp.compact(apply_fn, layers(), masks, X)
    assert small.params["b"].shape == (3, 3)
    assert np.isneginf(np.asarray(small.apply(small.params, X)[0])).sum() == 6


def test_infinities_of_different_signs_do_not_agree():
    a, b = jnp.array([1.0, jnp.inf]), jnp.array([1.0, -jnp.inf])
    assert gap(a, b) == np.inf and gap(a, a) == 0.0 and gap(a, a.at[0].set(jnp.nan)) == np.inf


def test_layers_of_linen_and_nnx():
    from flax import linen, nnx

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.WeightNorm(linen.Dense(6), epsilon=0.0)(x))
            return linen.Dense(3)(x)

    variables = Normed().init(jax.random.key(0), X)
    masks, groups = halved(Normed().apply, variables)
    assert divisors(groups) == {"params/Dense_0/kernel"}
    small = jp.compact(Normed().apply, variables, masks, X)
    assert small.params["params"]["Dense_0"]["kernel"].shape == (8, 3)

    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
            self.scale = nnx.Param(jnp.asarray(S))

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x) / self.scale[...]))

    model = Scaled(nnx.Rngs(0))
    graph, state = nnx.split(model)
    masks, groups = halved(lambda state, x: nnx.merge(graph, state)(x), state)
    assert divisors(groups) == {"scale"}
    found = jp.compact_module(model, masks, X)
    assert found.why is None and found.module.first.out_features == 3 and found.module.scale.shape == (3,)


def test_ops_that_are_not_tried_are_finite_at_zero():
    tried = 0
    others = {"clamp", "complex", "conj", "imag", "real", "nextafter", "convert_element_type"}
    others |= {"reduce_precision", "select_n", "copy"}
    for name in sorted(singular._DEFINED_AT_ZERO - others):
        function = getattr(lax, f"{name}_p", None) and getattr(lax, name, None)
        if function is None:
            continue
        count = 2 if name in ("add", "max", "min", "mul", "sub") else 1
        for zero in (0.0, -0.0):
            value, tangent = jax.jvp(function, (zero,) * count, (1.0,) * count)
            assert np.isfinite(value) and np.isfinite(tangent), name
        tried += 1
    assert tried >= 25


def test_expand_gives_a_unit_of_several_slices_different_ones():
    # The network divides by the deviation over a head's slices, which would be 0 if they were equal.
    def normed(x):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    def attend(p, x):
        q, k, v = ((x @ p[n]).reshape(4, 4, 3) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", normed(q), normed(k)))
        return jnp.einsum("hqk,khd->qhd", weights, v).reshape(4, 12) @ p["o"]

    params = {n: jax.random.normal(jax.random.key(i), (8, 12)) for i, n in enumerate("qkv")}
    params["o"] = jax.random.normal(jax.random.key(9), (12, 3))
    x = jax.random.normal(jax.random.key(5), (4, 8))
    structure = jp.structures.channels(jp.channel_groups(attend, params, x))
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5, structure=structure)
    small = jp.compact(attend, params, masks, x)
    expected = attend(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(attend(small.expand(small.params), x), expected, rtol=1e-5, atol=1e-6)
