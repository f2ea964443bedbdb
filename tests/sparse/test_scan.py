"""Kernels inside `scan` in sparse forms: the same function as the masked network, whatever the loops."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

import jaxprune as jp
from jaxprune.sparse.forms import FORMS, of_step

WIDTH = 16


def normal(seed, *shape):
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def masks_of(params, density=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.random(p.shape) < (density if p.ndim > 1 else 2)), params)


def check(apply_fn, params, masks, *inputs, form="csr", shapes=None, tolerance=1e-5):
    """Store all pruned kernels in a form, and compare with the masked network; return the `Sparsified`."""
    pruned = [
        path
        for path, mask in zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True)
        if not np.all(mask)
    ]
    fast = jp.sparsify(apply_fn, params, masks, *inputs, choose=dict.fromkeys(pruned, form))
    assert set(fast.forms.values()) == {form}
    assert {row.path.partition("#")[0] for row in fast.report.rows} == set(pruned)
    assert not set(pruned) & set(fast.params.leaves)
    if shapes is not None:
        got = {path: arrays["values"].shape[:-1] for path, arrays in fast.params.kernels.items()}
        assert got == shapes
    want = apply_fn(jp.apply_masks(params, masks), *inputs)
    got = fast.apply(fast.params, *inputs)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return fast


@st.composite
def stacks(draw):
    """Matrices of one shape; in each, entries, rows and columns, blocks, all or none are not zero."""
    outputs, inputs = draw(st.sampled_from([(3, 5), (32, 48), (7, 300)]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    blocks = -(-outputs // 16), -(-inputs // 16)
    alive = {
        "entries": lambda: rng.random((outputs, inputs)) < 0.15,
        "rows": lambda: np.outer(rng.random(outputs) < 0.5, rng.random(inputs) < 0.5),
        "blocks": lambda: np.kron(rng.random(blocks) < 0.3, np.ones((16, 16)))[:outputs, :inputs],
        "none": lambda: np.zeros((outputs, inputs)),
        "full": lambda: np.ones((outputs, inputs)),
        "uneven": lambda: rng.random((outputs, inputs)) < rng.random((outputs, 1)) ** 4,
    }
    kinds = st.sampled_from([["entries"], ["rows"], ["blocks"], ["rows", "none"], sorted(alive)])
    steps = [alive[draw(st.sampled_from(kind))]() for kind in [draw(kinds)] for _ in range(3)]
    return (rng.standard_normal((3, outputs, inputs)) * np.stack(steps)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(stacks(), st.sampled_from(sorted(FORMS)))
def test_each_step_of_a_packed_stack_is_its_product(stack, name):
    arrays = FORMS[name].pack(stack)
    if isinstance(arrays, str):
        assert name != "csr", "csr suits every kernel"
        return
    x = normal(3, 2, stack.shape[2])
    for step, matrix in enumerate(stack):
        y = FORMS[name].product(of_step(arrays, step), jnp.asarray(x), len(matrix), jnp.float32, None)
        np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-4, atol=1e-5)


def mlp_stack(params, x, **options):
    def layer(h, p):
        return jnp.tanh(h @ p["kernel"] + p["bias"]), h.sum()

    return lax.scan(layer, x, params["layers"], **options)


def stacked(*steps):
    return {"layers": {"kernel": normal(0, *steps, WIDTH, WIDTH), "bias": normal(1, *steps, WIDTH)}}


def masks_by_step():
    """Masks that prune each step in another way; the second keeps all."""
    masks = jp.ones_masks(stacked(3))
    kernel = masks_of({"w": normal(0, 3, WIDTH, WIDTH)}, 0.3)["w"].at[1].set(True)
    masks["layers"]["kernel"] = kernel.at[2, :, 5:].set(False)
    return masks


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}])
def test_stacked_layers(options):
    params, masks, x = stacked(3), masks_by_step(), normal(2, 4, WIDTH)
    longest = int(np.sum(masks["layers"]["kernel"], axis=(1, 2)).max())
    apply_fn = partial(mlp_stack, **options)
    fast = check(apply_fn, params, masks, x, shapes={"layers/kernel": (3,)})
    assert fast.params.kernels["layers/kernel"]["values"].shape == (3, longest)
    (row,) = fast.report.rows
    assert row.shape == (3, WIDTH, WIDTH) and row.dense == params["layers"]["kernel"].nbytes
    assert row.sparsity == np.mean(~np.asarray(masks["layers"]["kernel"]))
    assert row.stored == 2 * 4 * 3 * longest + 3 * 4 * (WIDTH + 1)
    # Against numpy, step by step, on another batch.
    x, sums = normal(3, 7, WIDTH).astype(np.float64), []
    given = np.float32(x)
    for n in [2, 1, 0] if options.get("reverse") else [0, 1, 2]:
        sums.append(x.sum())
        kernel = np.where(masks["layers"]["kernel"][n], params["layers"]["kernel"][n], 0)
        x = np.tanh(x @ kernel.astype(np.float64) + params["layers"]["bias"][n])
    h, ys = fast.apply(fast.params, given)
    np.testing.assert_allclose(h, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ys, sums[::-1] if options.get("reverse") else sums, rtol=1e-4, atol=1e-4)


def test_a_step_that_is_all_pruned_or_not_at_all():
    params, x = stacked(3), normal(2, 4, WIDTH)
    for masks in (jp.ones_masks(params), masks_by_step()):
        masks["layers"]["kernel"] = masks["layers"]["kernel"].at[0].set(False)
        check(mlp_stack, params, masks, x)
    with pytest.raises(
        ValueError, match=r"'padded' for 'layers/kernel', which it does not suit: rows of very"
    ):
        jp.sparsify(mlp_stack, params, masks, x, choose={"layers/kernel": "padded"})


@pytest.mark.parametrize("form", ["padded", "windows", "blocks", "compact"])
def test_other_forms(form):
    params = {"layers": {"kernel": normal(0, 3, 64, 64), "bias": normal(1, 3, 64)}}
    rng, masks = np.random.default_rng(0), jp.ones_masks(params)
    alive = {
        "padded": lambda: (np.arange(64) + rng.integers(0, 64, (64, 1))) % 64 < 8,  # 8 of each output
        "windows": lambda: rng.random((64, 64)) < 0.2,
        "blocks": lambda: np.kron(rng.random((4, 4)) < 0.4, np.ones((16, 16))) > 0,
        "compact": lambda: np.outer(rng.random(64) < 0.5, rng.random(64) < 0.5),
    }[form]
    kernels = np.stack([alive().T if form == "padded" else alive() for _ in range(3)])
    masks["layers"]["kernel"] = jnp.asarray(kernels)
    for rows in (10, 3):  # few rows of inputs take another way
        fast = check(mlp_stack, params, masks, normal(2, rows, 64), form=form)
    stored = fast.params.kernels["layers/kernel"]
    if form == "padded":
        assert stored["groups"][0]["values"].size == 3 * 64 * 8  # nothing is filled up
    if form == "compact":  # as many as the step with the most
        counts = [kernels.any(axis).sum(1).max() for axis in (2, 1)]
        assert stored["values"].shape == (3, *counts)


def along_axis_1(params, x):
    layers = {"kernel": jnp.moveaxis(params["kernel"], 1, 0), "bias": params["bias"]}
    return mlp_stack({"layers": layers}, x)


def with_calls(params, x):
    """Remat and jit in the body, a kernel that is transposed there, and masked again."""

    @jax.checkpoint
    def layer(h, p):
        h = jax.jit(lambda h: h @ jnp.where(p["kept"], p["kernel"], 0).T)(h)
        return jax.nn.relu(h) + p["bias"], None

    return lax.scan(layer, x, params["layers"] | {"kept": jnp.asarray(KEPT)})[0]


KEPT = np.random.default_rng(8).random((3, WIDTH, WIDTH)) < 0.9


def nested(params, x):
    """Blocks of layers: the kernels of all 2 x 3 layers, and one for each block."""

    def block(h, p):
        h, _ = mlp_stack({"layers": p["layers"]}, h)
        inner = lax.scan(lambda h, bias: (jnp.tanh(h @ p["own"] + bias), None), h, p["layers"]["bias"])
        return inner[0], None

    return lax.scan(block, x, params)[0]


def over_time(params, x):
    """Recurrent layers: a scan over time, and inside of it one over the layers."""

    def step(states, x):
        def layer(below, pair):
            state, p = pair
            state = jnp.tanh(below @ p["kernel"] + state @ params["shared"] + p["bias"])
            return state, state

        out, states = lax.scan(layer, x @ params["enter"], (states, params["layers"]))
        return states, out

    states, out = lax.scan(step, jnp.zeros((3, *x.shape[1:])), x, reverse=True)
    return {"states": states, "out": out @ params["enter"]}


def crossed(params, x):
    """Kernels made of slices from two loops over the same param, and of one slice twice."""

    def outer(h, a):
        def both(h, b):
            kernel = ((a + b) * (b - 3 * a))[:, :8]
            return h + jnp.tile(jnp.tanh(h @ kernel), 2), None

        h, _ = lax.scan(both, h, params["w"][:2])
        return lax.scan(lambda h, b: (jnp.tanh(h @ (b + b)) @ a, None), h, params["w"][:2])[0], None

    return lax.scan(outer, x, params["w"])[0]


def test_stacks_along_another_axis():
    params = {"kernel": normal(0, WIDTH, 3, WIDTH), "bias": normal(1, 3, WIDTH)}
    masks = masks_of(params) | {"bias": jnp.ones((3, WIDTH), bool)}
    check(along_axis_1, params, masks, normal(2, 4, WIDTH), shapes={"kernel": (3,)})


def test_calls_in_the_body():
    check(with_calls, stacked(3), masks_by_step(), normal(2, 4, WIDTH), shapes={"layers/kernel": (3,)})


def test_nested_scans():
    params = stacked(2, 3) | {"own": normal(5, 2, WIDTH, WIDTH)}
    masks = masks_of(params)
    masks["layers"]["bias"] = jnp.ones((2, 3, WIDTH), bool)
    check(nested, params, masks, normal(2, 4, WIDTH), shapes={"layers/kernel": (6,), "own": (2,)})


def test_a_scan_over_layers_in_one_over_time_stores_a_kernel_for_each_layer():
    params = stacked(3) | {name: normal(n, WIDTH, WIDTH) for n, name in enumerate(["shared", "enter"])}
    masks = masks_of(params)
    masks["layers"]["bias"] = jnp.ones((3, WIDTH), bool)
    x = normal(2, 5, 4, WIDTH)
    # The kernel that two places read, one inside of the scan and one outside, is stored once.
    shapes = {"layers/kernel": (3,), "shared": (), "enter": ()}
    fast = check(over_time, params, masks, x, shapes=shapes)
    longer = normal(3, 7, 2, WIDTH)  # more steps, fewer rows
    want = over_time(jp.apply_masks(params, masks), longer)["out"]
    np.testing.assert_allclose(fast.apply(fast.params, longer)["out"], want, rtol=1e-4, atol=1e-5)


def test_kernels_of_two_loops():
    params = {"w": normal(0, 3, WIDTH, WIDTH)}
    masks, x = masks_of(params), normal(2, 4, WIDTH)
    check(crossed, params, masks, x, shapes={"w": (6,), "w#2": (2,), "w#3": (3,)})


def carried(params, x):
    """The kernel travels in the carry, and comes out unchanged."""

    def step(_, pair):
        w, h = pair
        return w, jnp.tanh(h @ w)

    w, h = lax.fori_loop(0, 4, step, (params["w"], x))
    return h @ w


def test_a_kernel_in_the_carry_that_stays_as_it_is():
    params = {"w": normal(0, WIDTH, WIDTH)}
    check(carried, params, masks_of(params), normal(2, 4, WIDTH), shapes={"w": ()})


def test_a_kernel_from_which_a_carry_starts_is_read_dense_as_well():
    params, x = {"w": normal(0, WIDTH, WIDTH)}, normal(2, 3, WIDTH)
    masks = masks_of(params)

    def apply_fn(params, x):
        return lax.scan(lambda h, x: (jnp.tanh(h @ params["w"] + x), None), params["w"], x)[0]

    fast = jp.sparsify(apply_fn, params, masks, x, choose={"w": "csr"})
    assert fast.forms == {"w": "csr"} and set(fast.params.leaves) == {"w"}
    want = apply_fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-4, atol=1e-5)


def test_convolutions_in_the_body():
    params = {"w": normal(0, 3, 4, 4, 3, 3)}
    places = np.random.default_rng(0).random((3, 4, 4, 3, 3)) + 9 * (np.arange(4) == 1).reshape(4, 1, 1)
    order = places.reshape(3, 4, 36).argsort(2).argsort(2).reshape(places.shape)
    masks = {"w": jnp.asarray(order < 4)}  # 4 entries of each output, none of channel 1

    def apply_fn(params, x):
        def layer(x, w):
            return jnp.tanh(lax.conv_general_dilated(x, w, (1, 1), "SAME")), None

        return lax.scan(layer, x, params["w"])[0]

    x = normal(1, 2, 4, 6, 6)
    for form in ("csr", "padded", "compact", "wide2"):
        check(apply_fn, params, masks, x, form=form)


@pytest.mark.parametrize("form", ["csr", "windows"])
def test_jit_vmap_and_derivatives(form):
    params, masks = stacked(3), masks_by_step()
    fast = check(mlp_stack, params, masks, normal(2, 4, WIDTH), form=form)
    x = normal(3, 5, 2, WIDTH)
    want = mlp_stack(jp.apply_masks(params, masks), x)[0]
    mapped = jax.jit(jax.vmap(lambda p, x: fast.apply(p, x)[0], in_axes=(None, 1), out_axes=1))
    np.testing.assert_allclose(mapped(fast.params, x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="has no derivative"):
        jax.grad(lambda x: fast.apply(fast.params, x)[0].sum())(x[0])
    with pytest.raises(TypeError, match="has no derivative"):
        jax.grad(lambda p: fast.apply(p, x[0])[0].sum(), allow_int=True)(fast.params)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 3e-2), ("float64", 1e-12)])
def test_dtypes(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), stacked(3))
        fast = check(
            mlp_stack, params, masks_by_step(), jnp.asarray(normal(2, 4, WIDTH), dtype), tolerance=tolerance
        )
        assert fast.params.kernels["layers/kernel"]["values"].dtype == dtype


def test_a_step_with_fewer_entries_is_not_filled_up_with_products():
    """Pruned entries meet infinity and NaN in the data, also behind the last entry of a step."""
    params, masks = {"w": jnp.ones((2, 2, 2))}, {"w": jnp.array([[[0, 1], [0, 1]], [[0, 1], [0, 0]]], bool)}

    def apply_fn(params, x):
        return lax.scan(lambda _, w: (None, x @ w.T), None, params["w"])[1]

    x = jnp.array([[jnp.nan, 3.0], [jnp.inf, 1.0]])
    fast = jp.sparsify(apply_fn, params, masks, x, choose={"w": "csr"})
    assert fast.apply(fast.params, x).tolist() == [[[3, 3], [1, 1]], [[3, 0], [1, 0]]]


def test_what_stays_dense_says_why():
    params = {
        "w": normal(0, 3, WIDTH, WIDTH),
        "cond": normal(1, WIDTH, WIDTH),
        "scaled": normal(2, WIDTH, WIDTH),
    }
    masks, x = masks_of(params), normal(3, 4, WIDTH)

    def apply_fn(params, x):
        def layer(h, pair):
            w, scale = pair
            h = jnp.tanh(h @ w + h @ (params["scaled"] * scale))
            return lax.cond(h[0, 0] > 0, lambda h: h @ params["cond"], lambda h: h, h), None

        h, _ = lax.scan(layer, x, (params["w"], jnp.arange(3.0)))
        return lax.while_loop(lambda h: h.sum() > 1e3, lambda h: h @ params["cond"], h)

    fast = jp.sparsify(apply_fn, params, masks, x, choose={"w": "csr"})
    why = {row.path: row.why for row in fast.report.rows}
    assert fast.forms == {"w": "csr", "cond": "dense", "scaled": "dense"}
    assert "inside 'cond', which runs as it is" in why["cond"]
    assert "the kernels of its 3 steps have more entries than the params they are made of" in why["scaled"]
    assert set(fast.params.leaves) == {"cond", "scaled"}
    want = apply_fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-4, atol=1e-5)


def test_a_stack_that_is_also_read_dense_stays_among_the_leaves():
    params, masks, x = stacked(3), masks_by_step(), normal(2, 4, WIDTH)

    def apply_fn(params, x):
        def layer(h, p):
            return jnp.tanh(h @ p["kernel"] + p["kernel"].sum(0)), None

        return lax.scan(layer, x, params["layers"])[0]

    fast = jp.sparsify(apply_fn, params, masks, x, choose={"layers/kernel": "csr"})
    assert "layers/kernel" in fast.params.leaves and "layers/kernel" in fast.params.kernels
    want = apply_fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-4, atol=1e-5)


def test_a_kernel_joined_of_several_params_goes_by_the_largest():
    """As that of an LSTM, whose gates are computed by one product in each step."""
    params = {"gate": normal(0, WIDTH, 4), "state": normal(1, WIDTH, WIDTH)}
    masks, x = masks_of(params), normal(2, 3, 4, WIDTH)

    def apply_fn(params, x):
        kernel = jnp.concatenate([params["gate"], params["state"]], 1)

        def step(h, x):
            gate, state = jnp.split(h @ kernel, [4], 1)
            return jnp.tanh(state + x) * jnp.tile(jax.nn.sigmoid(gate), 4), None

        return lax.scan(step, x[0], x)[0]

    fast = jp.sparsify(apply_fn, params, masks, x, choose={"state": "csr"})
    assert fast.forms == {"state": "csr", "gate": "dense"}
    assert fast.report.rows[1].why == "it is a part of the kernel of state"
    want = apply_fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-4, atol=1e-5)


def test_a_scan_without_steps_stays_dense():
    params = {"w": normal(0, 0, WIDTH, WIDTH), "v": normal(1, WIDTH, WIDTH)}
    masks, x = masks_of(params), normal(2, 4, WIDTH)

    def apply_fn(params, x):
        return lax.scan(lambda h, w: (h @ w @ params["v"], None), x, params["w"])[0]

    with pytest.warns(UserWarning, match="v: its product is inside 'scan', which runs as it is"):
        fast = jp.sparsify(apply_fn, params, masks, x, choose="rule")
    np.testing.assert_array_equal(fast.apply(fast.params, x), x)


def test_measuring_and_the_rule():
    params = {"layers": {"kernel": normal(0, 2, 256, 256), "bias": normal(1, 2, 256)}}
    masks, x = masks_of(params, 0.02), normal(2, 40, 256)
    masks["layers"]["bias"] = jnp.ones((2, 256), bool)
    want = mlp_stack(jp.apply_masks(params, masks), x)[0]
    measured = jp.sparsify(mlp_stack, params, masks, x, rounds=1)
    assert "measured" in measured.report.rows[0].why
    ruled = jp.sparsify(mlp_stack, params, masks, x, choose="rule")
    if jax.default_backend() == "cpu":
        assert ruled.forms == {"layers/kernel": "csr"}
        assert "it pays up to 6%" in ruled.report.rows[0].why
    for fast in (measured, ruled):
        np.testing.assert_allclose(fast.apply(fast.params, x)[0], want, rtol=1e-4, atol=1e-5)
