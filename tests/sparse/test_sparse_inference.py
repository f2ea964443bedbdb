"""Sparse inference: the same function as the masked network, whatever the axes, and its report."""

import math
import warnings

import flax.linen as linen
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from jax import lax

import jaxprune as jp
from experiments.benchmarks import sparse_inference
from jaxprune.sparse.choice import Chosen, fastest_set
from jaxprune.sparse.forms import FORMS, stored_entries

SCATTERED = ("csr", "padded", "windows")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def masks_of(params, density, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.random(p.shape) < density), params)


def perceptron(params, x):
    x = jax.nn.relu(x @ params["hidden"] + params["bias"])
    return x @ params["out"]


@pytest.fixture(scope="module")
def mlp():
    params = {"hidden": normal(0, 24, 40), "bias": normal(1, 40), "out": normal(2, 40, 6)}
    masks = jp.ones_masks(params) | masks_of({name: params[name] for name in ("hidden", "out")}, 0.2)
    return params, masks


def oracle(params, masks, x):
    p = {name: np.where(masks[name], np.asarray(params[name]), 0) for name in params}
    return np.maximum(x @ p["hidden"] + p["bias"], 0) @ p["out"]


@st.composite
def matrices(draw):
    """A matrix with entries, rows, columns, blocks or nothing that is not zero."""
    outputs, inputs = draw(st.sampled_from([(1, 1), (3, 5), (32, 48), (64, 16), (7, 70)]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["entries", "rows", "blocks", "one", "none", "full", "uneven"]))
    alive = {
        "entries": lambda: rng.random((outputs, inputs)) < 0.15,
        "rows": lambda: np.outer(rng.random(outputs) < 0.5, rng.random(inputs) < 0.5),
        "blocks": lambda: np.kron(rng.random((-(-outputs // 16), -(-inputs // 16))) < 0.3, np.ones((16, 16)))[
            :outputs, :inputs
        ],
        "one": lambda: np.arange(outputs * inputs).reshape(outputs, inputs) == outputs * inputs // 2,
        "none": lambda: np.zeros((outputs, inputs)),
        "full": lambda: np.ones((outputs, inputs)),
        "uneven": lambda: rng.random((outputs, inputs)) < rng.random((outputs, 1)) ** 4,
    }[kind]()
    return (rng.standard_normal((outputs, inputs)) * (alive != 0)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(matrices(), st.sampled_from([0, 1, 3, 9]), st.sampled_from(sorted(FORMS)))
def test_each_form_is_the_product(matrix, rows, name):
    arrays = FORMS[name].pack(matrix)
    if isinstance(arrays, str):
        assert name != "csr", "csr suits every kernel"
        return
    assert np.count_nonzero(matrix) <= stored_entries(arrays)
    x = normal(3, rows, matrix.shape[1])
    y = FORMS[name].product(arrays, jnp.asarray(x), len(matrix), jnp.float32, None)
    assert y.shape == (rows, len(matrix))
    np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-4, atol=1e-5)


@st.composite
def wide_matrices(draw):
    """A matrix with more inputs than a window holds, whose rows and columns differ in how full they are."""
    outputs, inputs = draw(st.sampled_from([(1, 257), (30, 700), (8, 3000), (90, 1100)]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    density = draw(st.sampled_from([0.003, 0.05, 0.5]))
    alive = rng.random((outputs, inputs)) < density
    alive &= rng.random((outputs, 1)) < draw(st.sampled_from([1.0, 0.3]))
    place = np.arange(inputs)
    alive &= {
        "even": place >= 0,
        "ends": (place < 40) | (place >= inputs - 40),
        "far apart": place % 300 == 0,
        "together": (place > inputs // 3) & (place < inputs // 3 + 100),
    }[draw(st.sampled_from(["even", "ends", "far apart", "together"]))]
    return (rng.standard_normal((outputs, inputs)) * alive).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(wide_matrices())
def test_windows_hold_each_entry_once(matrix):
    arrays = FORMS["windows"].pack(matrix)
    if isinstance(arrays, str):
        assert "entries too" in arrays
        return
    inputs = arrays["starts"][:, None] + arrays["indices"].astype(np.int64)
    assert np.all(np.diff(arrays["starts"]) >= 0)
    by_lane = np.zeros((inputs.shape[1], max(matrix.shape[1], 256)), np.float32)
    np.add.at(by_lane, (np.arange(inputs.shape[1]), inputs), arrays["values"])
    entries = np.zeros(matrix.shape, int)
    total = np.zeros_like(matrix)
    for lanes in arrays["lanes"]:
        total += by_lane[lanes, : matrix.shape[1]]
        entries += by_lane[lanes, : matrix.shape[1]] != 0
    np.testing.assert_array_equal(total, matrix)
    np.testing.assert_array_equal(entries, matrix != 0)
    x = normal(3, 2, matrix.shape[1])
    y = FORMS["windows"].product(arrays, jnp.asarray(x), len(matrix), jnp.float32, None)
    np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-4, atol=1e-5)


def test_windows_take_little_more_than_five_bytes_an_entry():
    matrix = normal(0, 600, 800) * (np.random.default_rng(1).random((600, 800)) < 0.1)
    arrays = FORMS["windows"].pack(matrix)
    assert arrays["indices"].dtype == np.uint8
    stored = sum(array.nbytes for array in arrays.values())
    assert stored <= 1.25 * 5 * np.count_nonzero(matrix)


@st.composite
def dots(draw):
    """Shapes and dimension numbers of a product: (kernel's shape, other's, numbers, kernel's side)."""
    sums, kernel_free, other_free = (draw(st.lists(st.integers(1, 3), max_size=2)) for _ in range(3))
    batch = draw(st.sampled_from([[], [], [], [2]]))
    shapes, numbers = [], []
    for free in (kernel_free, other_free):
        order = draw(st.permutations(range(len(sums) + len(free) + len(batch))))
        sizes = [*sums, *batch, *free]
        shapes.append([sizes[place] for place in order])
        where = [order.index(n) for n in range(len(sums) + len(batch))]
        numbers.append((where[: len(sums)], where[len(sums) :]))
    side = draw(st.integers(0, 1))
    (a, b), (c, d) = numbers
    return *shapes, ((a, c), (b, d)) if side == 0 else ((c, a), (d, b)), side


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dots(), st.sampled_from(SCATTERED))
def test_any_dimension_numbers(case, form):
    shape, other, numbers, side = case
    params, x = {"w": normal(0, *shape)}, normal(1, *other)
    masks = {"w": jnp.arange(math.prod(shape)).reshape(shape) % 3 == 1}

    def apply_fn(params, x):
        return lax.dot_general(*((params["w"], x) if side == 0 else (x, params["w"])), numbers)

    want = apply_fn({"w": np.where(masks["w"], params["w"], 0)}, x)
    if numbers[1][0]:
        with pytest.warns(UserWarning, match="w: its product is batched"):
            fast = jp.sparsify(apply_fn, params, masks, x, choose="rule")
    else:
        fast = jp.sparsify(apply_fn, params, masks, x, choose={"w": form})
        assert fast.forms == {"w": form} and not fast.params.leaves
    np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", SCATTERED)
def test_batches_jit_and_vmap(mlp, form):
    params, masks = mlp
    fast = jp.sparsify(perceptron, params, masks, normal(3, 2, 24), choose={"hidden": form, "out": form})
    assert set(fast.params.leaves) == {"bias"}
    x = normal(4, 5, 9, 24)
    want = oracle(params, masks, x)
    np.testing.assert_allclose(fast.apply(fast.params, x[0]), want[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(fast.apply)(fast.params, x), want, rtol=1e-4, atol=1e-5)
    mapped = jax.jit(jax.vmap(fast.apply, in_axes=(None, 1), out_axes=1))
    np.testing.assert_allclose(mapped(fast.params, x), want, rtol=1e-4, atol=1e-5)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), fast.params)
    with pytest.raises(ValueError, match="in_axes=None"):
        jax.vmap(fast.apply, in_axes=(0, None))(twice, x[0])
    with pytest.raises(TypeError, match="has no derivative"):
        jax.grad(lambda x: fast.apply(fast.params, x).sum())(x[0])
    shifted = fast.params._replace(leaves={"bias": fast.params.leaves["bias"] + 1})
    want = oracle(params | {"bias": params["bias"] + 1}, masks | {"bias": np.ones(40, bool)}, x[0])
    np.testing.assert_allclose(fast.apply(shifted, x[0]), want, rtol=1e-4, atol=1e-5)


def test_pruned_entries_are_skipped():
    params, masks = {"w": jnp.array([[jnp.nan, 2.0]])}, {"w": jnp.array([[False, True]])}
    x = jnp.array([[jnp.inf, 3.0]])
    fast = jp.sparsify(lambda p, x: x @ p["w"].T, params, masks, x, choose={"w": "csr"})
    assert fast.apply(fast.params, x).tolist() == [[6.0]]


@pytest.mark.parametrize("form", SCATTERED)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3), ("float64", 1e-12)])
def test_dtypes(mlp, form, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), mlp[0])
        x = jnp.asarray(normal(3, 2, 24), dtype)
        fast = jp.sparsify(perceptron, params, mlp[1], x, choose={"hidden": form, "out": form})
        narrow = {jnp.dtype("uint8"), jnp.dtype("uint16")} if form == "windows" else set()
        stored = {leaf.dtype for leaf in jax.tree.leaves(fast.params)}
        assert stored == {jnp.dtype(dtype), jnp.dtype("int32")} | narrow
        y = fast.apply(fast.params, x)
        assert y.dtype == dtype
        wide = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
        want = oracle(wide, mlp[1], np.asarray(x, np.float64))
        np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=tolerance, atol=10 * tolerance)


def test_blocks_and_compact_suit_what_they_are_for():
    rng = np.random.default_rng(0)
    params = {"a": normal(0, 64, 64), "b": normal(1, 64, 64), "n": normal(2, 64, 64)}
    blocks = np.kron(np.eye(4), np.ones((16, 16))).astype(bool)
    nm = np.zeros((64, 64), bool).reshape(16, 4, 64)
    nm[:, 1:3] = True  # 2 of 4 along the axis that is summed
    masks = {"a": blocks, "b": np.outer(rng.random(64) < 0.5, np.ones(64, bool)), "n": nm.reshape(64, 64)}

    def apply_fn(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["n"]

    x = normal(3, 10, 64)
    forms = {"a": "blocks", "b": "compact", "n": "padded"}
    fast = jp.sparsify(apply_fn, params, masks, x, choose=forms)
    masked = jp.apply_masks(params, masks)
    for rows in (10, 2):  # few rows of inputs take another way
        np.testing.assert_allclose(
            fast.apply(fast.params, x[:rows]), apply_fn(masked, x[:rows]), rtol=1e-4, atol=1e-5
        )
    stored = {path: stored_entries(arrays) for path, arrays in fast.params.kernels.items()}
    assert stored == {path: int(np.sum(masks[path])) for path in masks}  # nothing is filled up
    assert fast.forms == forms


def attention(params, x):
    q, k, v = (jnp.einsum("btd,dhe->bhte", x, params[name]) for name in ("query", "key", "value"))
    mixed = jnp.einsum("bhts,bhse->bthe", jax.nn.softmax(q @ k.swapaxes(2, 3)), v)
    x = x + jnp.einsum("bthe,hed->btd", mixed, params["out"])
    return x + jax.checkpoint(lambda x: jax.nn.gelu(x @ params["up"].T) @ params["down"])(x)


def test_transformer_block():
    shapes = dict.fromkeys(("query", "key", "value"), (12, 2, 6))
    shapes |= {"out": (2, 6, 12), "up": (20, 12), "down": (20, 12)}
    params = {name: normal(n, *shape) / 3 for n, (name, shape) in enumerate(shapes.items())}
    masks, x = masks_of(params, 0.3), normal(9, 2, 5, 12)
    fast = jp.sparsify(attention, params, masks, x, choose=dict.fromkeys(params, "csr"))
    assert set(fast.forms.values()) == {"csr"} and set(fast.params.kernels) == set(shapes)
    np.testing.assert_allclose(
        fast.apply(fast.params, x[:1]), attention(jp.apply_masks(params, masks), x[:1]), rtol=1e-4, atol=1e-5
    )


class Convolutional(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.Conv(8, (3, 3), name="wide")(x))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        x = linen.relu(linen.Conv(6, (1, 1), strides=2, padding="VALID", name="point")(x))
        return linen.Dense(4, name="head")(x.reshape(len(x), -1))


def test_linen_convolutions():
    model, x = Convolutional(), normal(0, 2, 6, 6, 3)
    params = model.init(jax.random.key(0), x)["params"]
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.7, scope="layerwise")

    def apply_fn(params, x, train):
        return model.apply({"params": params}, x, train)

    names = {"wide/kernel": "padded", "point/kernel": "csr", "head/kernel": "padded"}
    fast = jp.sparsify(apply_fn, params, masks, x, False, choose=names)
    assert fast.forms == names
    want = np.asarray(apply_fn(jp.apply_masks(params, masks), x[:1], False))
    np.testing.assert_allclose(fast.apply(fast.params, x[:1], False), want, rtol=1e-4, atol=1e-5)


def test_nnx_state_as_params():
    model = nnx.Sequential(
        nnx.Linear(10, 12, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(12, 4, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model)

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    masks, x = jp.prune_once(params, jp.scores.magnitude, sparsity=0.8), normal(0, 3, 10)
    kernels = [path for path in jp.leaf_paths(params) if path.endswith("kernel")]
    fast = jp.sparsify(apply_fn, params, masks, x, choose=dict.fromkeys(kernels, "csr"))
    assert sorted(fast.params.kernels) == sorted(kernels)
    want = apply_fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-4, atol=1e-5)


def test_what_stays_dense_says_why():
    params = {
        "loop": normal(0, 6, 6),
        "table": normal(1, 6, 6),
        "tied": normal(2, 6, 6),
        "own": normal(3, 6, 6),
    }
    masks = masks_of(params, 0.4)

    def apply_fn(params, x):
        x = x + params["table"][0] + params["tied"][1]
        x = lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: jnp.tanh(x @ params["loop"]), x)
        where = jnp.where(masks["own"], params["own"].T.T, 0)  # masked once more
        return x @ params["tied"].T @ where + x @ params["tied"]

    x = normal(5, 2, 6)
    fast = jp.sparsify(apply_fn, params, masks, x, choose={"tied": "csr", "own": "csr"})
    whys = {row.path: row.why for row in fast.report.rows}
    again = jp.sparsify(apply_fn, params, masks, x, choose=fast.forms | {"tied#2": "dense"})
    assert [row.form for row in again.report.rows] == ["csr", "csr", "dense", "dense", "dense"]
    assert list(whys) == ["tied", "own", "tied#2", "loop", "table"]
    assert "inside 'while'" in whys["loop"]
    assert whys["table"] == "no product multiplies by it"
    assert set(fast.params.leaves) == {"loop", "table", "tied"}  # tied is looked up as well
    want = apply_fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-4, atol=1e-5)
    assert all(len(line) <= 80 for line in str(fast.report).splitlines())
    assert fast.report.to_dict()["rows"][0]["path"] == "tied"


def test_another_way_to_read_a_kernel_is_an_error():
    params, masks = {"w": normal(0, 4, 4)}, {"w": jnp.eye(4, dtype=bool)}

    def apply_fn(params, x):
        return x @ params["w"] + (0 if len(x) == 1 else params["w"].sum())

    fast = jp.sparsify(apply_fn, params, masks, normal(1, 1, 4), choose={"w": "csr"})
    with pytest.raises(ValueError, match=r"reads params\['w'\] in another way"):
        fast.apply(fast.params, normal(1, 2, 4))


def test_wrong_arguments(mlp):
    params, masks = mlp
    x = normal(3, 2, 24)

    def attempt(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            jp.sparsify(perceptron, *arguments, **options)

    attempt(ValueError, "hidden", params, masks | {"hidden": jnp.ones((2, 2), bool)}, x)
    attempt(TypeError, "masks are bool", params, masks | {"hidden": jnp.ones((24, 40))}, x)
    attempt(ValueError, "choose names 'w'", params, masks, x, choose={"w": "csr"})
    attempt(ValueError, "the forms are csr", params, masks, x, choose={"out": "coo"})
    attempt(ValueError, "'measure', 'rule' or a dict", params, masks, x, choose="best")
    attempt(
        ValueError, "'blocks' for 'out', which it does not suit", params, masks, x, choose={"out": "blocks"}
    )
    attempt(ValueError, "'bias', which has to stay dense", params, masks, x, choose={"bias": "csr"})
    attempt(ValueError, "rounds", params, masks, x, rounds=0)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    attempt(TypeError, "inputs with values", params, masks, shape)
    assert jp.sparsify(perceptron, params, masks, shape, choose="rule").forms["out"] == "dense"
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda p: jp.sparsify(perceptron, p, masks, x).params)(params)
    fast = jp.sparsify(perceptron, params, masks, x, choose={"out": "csr"})
    with pytest.raises(TypeError, match=r"takes the \.params"):
        fast.apply(params, x)


def test_nothing_to_do_is_said(mlp):
    params, _ = mlp
    with pytest.warns(UserWarning, match="the masks prune nothing"):
        fast = jp.sparsify(perceptron, params, jp.ones_masks(params), normal(3, 2, 24), choose="rule")
    assert not fast.report.rows


def test_the_whole_call_decides():
    def chosen(form, gain=None):
        return Chosen(form, None if form == "dense" else {}, gain, "")

    alone = {"a": chosen("csr", 4.0), "b": chosen("padded", 1.2), "c": chosen("dense", 0.7)}
    ruled = {"a": chosen("csr"), "b": chosen("dense"), "c": chosen("padded")}

    def decided(**gains):
        seen = {}

        def time(sets):
            seen.update({name: {key: one.form for key, one in some.items()} for name, some in sets.items()})
            return {name: gains[name] for name in sets}

        result, gain = fastest_set(alone, ruled, time)
        assert seen == {
            "all": {"a": "csr", "b": "padded"},
            "clear": {"a": "csr"},
            "rule": {"a": "csr", "c": "padded"},
        }
        return "".join(one.form[0] for one in result.values()), gain

    assert decided(all=1.5, clear=1.4, rule=1.3) == ("cpd", 1.5)
    assert decided(all=0.9, clear=1.4, rule=1.3) == ("cdd", 1.4)
    assert decided(all=0.9, clear=1.4, rule=1.6) == ("cdp", 1.6)
    assert decided(all=0.9, clear=1.01, rule=1.0) == ("ddd", 1.0)
    nothing = {"a": chosen("dense", 0.5)}
    assert (
        fastest_set(nothing, {"a": chosen("dense")}, lambda sets: pytest.fail("nothing to time"))[1] is None
    )


def test_measuring_and_the_rule_give_the_masked_network():
    params = {"w": normal(0, 256, 256)}
    masks, x = {"w": jnp.asarray(np.random.default_rng(1).random((256, 256)) < 0.02)}, normal(2, 40, 256)

    def apply_fn(params, x):
        return x @ params["w"]

    measured = jp.sparsify(apply_fn, params, masks, x, rounds=1)
    ruled = jp.sparsify(apply_fn, params, masks, x, choose="rule")
    assert ruled.forms == {"w": "csr"} and "it pays up to" in str(ruled.report)
    assert measured.report.gain == 1.0 or measured.forms["w"] != "dense"
    empty = jp.sparsify(apply_fn, params, {"w": jnp.zeros((256, 256), bool)}, x, choose="rule")
    assert empty.forms == {"w": "compact"} and not np.any(empty.apply(empty.params, x))
    for fast in (measured, ruled):
        want = apply_fn(jp.apply_masks(params, masks), x)
        np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-4, atol=1e-5)


def test_few_rows_are_multiplied_through_windows():
    params = {"w": normal(0, 512, 512)}
    masks = {"w": jnp.asarray(np.random.default_rng(1).random((512, 512)) < 0.05)}

    def apply_fn(params, x):
        return x @ params["w"]

    for rows, form in ((1, "windows"), (4, "windows"), (40, "csr")):
        x = normal(2, rows, 512)
        ruled = jp.sparsify(apply_fn, params, masks, x, choose="rule")
        assert ruled.forms == {"w": form if jax.default_backend() == "cpu" else "dense"}
        want = apply_fn(jp.apply_masks(params, masks), x)
        np.testing.assert_allclose(ruled.apply(ruled.params, x), want, rtol=1e-4, atol=1e-4)
    measured = jp.sparsify(apply_fn, params, masks, normal(2, 1, 512), rounds=1)
    if jax.default_backend() == "cpu":
        assert "windows" in measured.report.rows[0].why


def test_no_warnings_on_this_platform(mlp):
    """Narrow floats are cast before jax.experimental.sparse would warn of them; it warns once a process."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), mlp[0])
    x = jnp.ones((3, 24), jnp.bfloat16)
    fast = jp.sparsify(perceptron, params, mlp[1], x, choose={"hidden": "csr", "out": "csr"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = jax.jit(fast.apply).lower(fast.params, x).as_text()
    if jax.default_backend() == "cpu":
        assert text.count("cpu_csr_sparse_dense_ffi") == 2


def test_the_benchmark(capsys):
    flags = "--width 32 --layers 1 --batches 1,4 --sparsities 0.9 --rounds 1 --ways measure,rule,bcsr,scipy"
    in_a_scan = "--width 32 --layers 2 --scan --batches 2 --sparsities 0.9 --rounds 1 --ways rule,csr"
    for line in (flags, in_a_scan):
        sparse_inference.main(line.split())
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80
        assert ("in a scan" in printed) == ("--scan" in line)
    config = sparse_inference.Config(
        width=128,
        layers=1,
        batches=(3,),
        sparsities=(0.75,),
        rounds=1,
        ways=("blocks", "torch"),
        structure="blocks",
    )
    lines = sparse_inference.run(config)
    ways = {line["way"] for line in lines}
    assert ways >= {"dense", "blocks"} and all(line["speed_up"] > 0 for line in lines)
    assert next(line for line in lines if line["way"] == "dense")["speed_up"] == 1
