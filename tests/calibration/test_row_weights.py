"""Padding tokens do not count: weighted Gram matrices of a padded batch are those of its examples unpadded.

The oracle knows nothing of weights. It runs the same network on each example alone, at the example's own
length, and sums the Gram matrices of what its products read.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.calibration.row_weights import (
    RowWeights,
    agree,
    of_input,
    of_rows,
    scan_with_weights,
    through,
)
from jaxprune.tracing.jaxprs import CALLS, binder, called_jaxpr, interpret, scan_split, trace

LENGTHS, LONGEST, WIDTH, HEADS = (5, 2, 4), 5, 6, 2


def grams(function: Any, params: Any, *inputs: Any, weights: Any = None) -> list[Any]:
    """Return the Gram matrix of each product of params with data, and how many rows it has.

    None stands for a product whose rows' weights are not known. Without weights all rows count.
    """

    def gram(eqn: Any, side: int, data: Any, known: Any, out: Any) -> Any:
        if eqn.primitive.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            rows = [axis for axis in range(out[0].ndim) if axis != numbers.out_spec[1]]
            patches = lax.conv_general_dilated_patches(
                data,
                [eqn.invars[1].aval.shape[a] for a in numbers.rhs_spec[2:]],
                eqn.params["window_strides"],
                eqn.params["padding"],
                dimension_numbers=numbers,
            )
            known, shape = through(eqn, [known, ()], [None, None])[0], out[0].shape
            x = jnp.moveaxis(patches, numbers.out_spec[1], -1)
        else:
            contracted, batch = (sides[side] for sides in eqn.params["dimension_numbers"])
            rows = [axis for axis in range(data.ndim) if axis not in contracted]
            assert not batch
            x, shape = jnp.transpose(data, [*rows, *contracted]), data.shape
        w = jnp.ones([shape[axis] for axis in rows]) if weights is None else of_rows(known, shape, rows)
        if w is None:
            return None
        assert w.shape == tuple(shape[axis] for axis in rows)
        x = x.reshape(w.size, -1)
        return jnp.einsum("n,ni,nj->ij", w.reshape(-1), x, x), w.sum()

    def run(closed: Any, values: list[Any]) -> tuple[list[Any], list[Any]]:
        found: list[Any] = []

        def handle(eqn: Any, given: list[Any]) -> list[Any]:
            arrays, known, data = ([each[part] for each in given] for part in range(3))
            name, moving = eqn.primitive.name, any(data)
            if name in CALLS:
                outputs, more = run(called_jaxpr(eqn), given)
                found.extend(more)
                return outputs
            if name == "scan":
                first = len(data) - scan_split(eqn.params)[1]
                flags = [*data]
                flags[scan_split(eqn.params)[0] : sum(scan_split(eqn.params))] = [True] * (len(data) - first)

                def body(arrays: list[Any], known: list[Any]) -> tuple[Any, Any, Any]:
                    outputs, more = run(eqn.params["jaxpr"], list(zip(arrays, known, flags, strict=True)))
                    return [out[0] for out in outputs], [out[1] for out in outputs], more

                made, of_made, more = scan_with_weights(eqn, arrays, known, body)
                found.extend(jax.tree.map(lambda stacked: stacked.sum(0), each) for each in more)
                return [(value, k, True) for value, k in zip(made, of_made, strict=True)]
            made = list(binder(eqn)(*arrays))
            if name in ("dot_general", "conv_general_dilated") and data[:2].count(True) == 1:
                side = data.index(True)
                found.append(gram(eqn, side, arrays[side], known[side], made))
            of_made = through(eqn, known, arrays)
            return [(value, k, moving) for value, k in zip(made, of_made, strict=True)]

        outputs = interpret(closed, values, handle, lambda array: (array, (), False))
        return outputs, found

    closed, order = trace(function, (params, *inputs))

    @jax.jit
    def found(arrays: dict[str, Any], weights: Any) -> list[Any]:
        values = []
        for name, array in arrays.items():
            data = not name.startswith("0")
            known = of_input(array.shape, weights) if data and weights is not None else ()
            values.append((array, known, data))
        return run(closed, values)[1]

    return found(order, weights)


def unpadded(function: Any, params: Any, x: np.ndarray) -> list[Any]:
    """Return the sums over examples of the Gram matrices and rows, each example alone and at its length."""
    each = [
        grams(function, params, x[n : n + 1, :size], jnp.ones((1, size))) for n, size in enumerate(LENGTHS)
    ]
    return [jax.tree.map(lambda *parts: sum(parts), *same) for same in zip(*each, strict=True)]


def attention(params: Any, x: Any, mask: Any, causal: bool = False) -> Any:
    q, k, v = (jnp.einsum("bld,dhk->blhk", x, params[name]) for name in "qkv")
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k)
    scores = jnp.where(mask[:, None, None, :] > 0, scores, -1e9)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2)) > 0, scores, -1e9)
    out = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores, -1), v)
    return jnp.einsum("bqhk,hkd->bqd", out, params["o"])


def norm(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def mlp(params: Any, x: Any) -> Any:
    return jax.nn.gelu(x @ params["up"] + params["bias"]) @ params["down"]


def positionwise(params: Any, x: Any, mask: Any) -> Any:
    return x + mlp(params, norm(x))


def transformer(params: Any, x: Any, mask: Any) -> Any:
    for _ in range(2):
        x = x + attention(params, norm(x), mask)
        x = x + jax.checkpoint(mlp)(params, norm(x))
    return x @ params["up"]


def time_major(params: Any, x: Any, mask: Any) -> Any:
    x = jnp.einsum("bld->lbd", x)
    h = jnp.einsum("lbd,df->flb", x, params["up"])
    return jnp.einsum("flb,fd->bld", jnp.tanh(h), params["down"])


def flattened(params: Any, x: Any, mask: Any) -> Any:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat + mlp(params, flat)
    return attention(params, flat.reshape(x.shape), mask, causal=True)


def heads_merged(params: Any, x: Any, mask: Any) -> Any:
    batch, length, width = x.shape
    h = (x @ params["square"]).reshape(batch, length, HEADS, width // HEADS).transpose(0, 2, 1, 3)
    h = h.reshape(batch * HEADS, length, width // HEADS)
    return (h @ params["small"]).reshape(batch, HEADS, length, -1).sum(1) @ params["small"].T


def pooled(params: Any, x: Any, mask: Any) -> Any:
    x = mlp(params, x) * mask[..., None]
    return (x.sum(1) / mask.sum(1, keepdims=True)) @ params["up"]


def class_token(params: Any, x: Any, mask: Any) -> Any:
    token = jnp.broadcast_to(params["token"], (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([token, x], 1)
    mask = jnp.concatenate([jnp.ones((x.shape[0], 1)), mask], 1)
    x = x + attention(params, x, mask)
    return x[:, 0] @ params["up"]


def convolution(params: Any, x: Any, mask: Any) -> Any:
    x = x * mask[..., None]
    x = lax.conv_general_dilated(x, params["window"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return x @ params["up"]


def shifted(params: Any, x: Any, mask: Any) -> Any:
    """RWKV's token shift: each token is mixed with the one before."""
    before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return (0.3 * before + 0.7 * x) @ params["up"]


def recurrent(params: Any, x: Any, mask: Any) -> Any:
    def step(h: Any, at: Any) -> Any:
        x, m = at
        new = jnp.tanh(x @ params["square"] + h)
        return jnp.where(m[:, None] > 0, new, h), new @ params["square"]

    swapped = jnp.swapaxes(x, 0, 1), mask.T
    last, outputs = lax.scan(step, jnp.zeros(x[:, 0].shape), swapped)
    return last @ params["up"], jnp.swapaxes(outputs, 0, 1) @ params["up"]


def stacked(params: Any, x: Any, mask: Any) -> Any:
    """Layers under scan, with a carry that is flattened and unflattened in each."""

    def layer(x: Any, kernel: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        return (flat + jnp.tanh(flat @ kernel)).reshape(x.shape), None

    return lax.scan(layer, x, params["stack"])[0] @ params["up"]


def embedded(params: Any, x: Any, mask: Any) -> Any:
    tokens = jnp.clip(x[..., 0] * 3 + 4, 0, 8).astype(jnp.int32)
    return positionwise(params, params["table"][tokens], mask)


def sorted_and_back(params: Any, x: Any, mask: Any) -> Any:
    """Tokens in the order of their experts, as in a mixture of experts."""
    flat = x.reshape(-1, x.shape[-1])
    order = jnp.argsort(flat[:, 0])
    inner = jnp.tanh(flat[order] @ params["square"])
    back = jnp.zeros_like(flat).at[order].set(inner)
    return back @ params["up"]


def split_and_gated(params: Any, x: Any, mask: Any) -> Any:
    a, b = jnp.split(x @ params["square"], 2, -1)
    x = jnp.concatenate([jnp.cumsum(a * jax.nn.sigmoid(b), 1), b], -1)
    return x[:, ::-1] @ params["up"]


NETWORKS = (
    *(positionwise, transformer, time_major, flattened, heads_merged, pooled, class_token, convolution),
    *(shifted, recurrent, stacked, embedded, sorted_and_back, split_and_gated),
)


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    half = WIDTH // HEADS
    shapes = {
        **dict.fromkeys("qkv", (WIDTH, HEADS, half)),
        "o": (HEADS, half, WIDTH),
        "up": (WIDTH, 8),
        "down": (8, WIDTH),
        "bias": (8,),
        "token": (WIDTH,),
        "square": (WIDTH, WIDTH),
        "small": (half, half),
        "window": (3, WIDTH, WIDTH),
        "stack": (3, WIDTH, WIDTH),
        "table": (9, WIDTH),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens with large garbage where they are padding, and the mask."""
    x = np.random.default_rng(1).normal(size=(len(LENGTHS), LONGEST, WIDTH)).astype(np.float32)
    mask = (np.arange(LONGEST) < np.array(LENGTHS)[:, None]).astype(np.float32)
    return np.where(mask[..., None] > 0, x, 50 * x), mask


@pytest.mark.parametrize("network", NETWORKS)
def test_weighted_grams_of_a_padded_batch_are_those_of_its_examples(network, params, batch):
    x, mask = batch
    got = grams(network, params, x, mask, weights=jnp.asarray(mask))
    expected = unpadded(network, params, x)
    assert got
    for one, (gram, rows) in zip(got, expected, strict=True):
        assert one is not None
        np.testing.assert_allclose(one[1], rows, rtol=0, atol=0)
        np.testing.assert_allclose(one[0], gram, rtol=2e-5, atol=2e-4)


def known_after(function: Any, arrays: list[Any], known: list[Any]) -> list[Any]:
    """Return what is known of the outputs of a function of arrays, and the shapes of these."""

    def handle(eqn: Any, given: list[Any]) -> list[Any]:
        values, of_values = [one[0] for one in given], [one[1] for one in given]
        if eqn.primitive.name in CALLS:
            return interpret(called_jaxpr(eqn), given, handle, lambda array: (array, ()))
        return list(zip(binder(eqn)(*values), through(eqn, of_values, values), strict=True))

    closed, axes = jax.make_jaxpr(function)(*arrays), []

    @jax.jit
    def run(arrays: Any, weights: Any) -> Any:
        given = [
            (array, tuple(map(RowWeights, each, [one.axes for one in own])))
            for array, each, own in zip(arrays, weights, known, strict=True)
        ]
        outputs = interpret(closed, given, handle, lambda array: (array, ()))
        axes[:] = [[one.axes for one in each] for _, each in outputs]
        return [(value, [one.array for one in each]) for value, each in outputs]

    made = run(arrays, [[one.array for one in each] for each in known])
    return [(value, tuple(map(RowWeights, each, of))) for (value, each), of in zip(made, axes, strict=True)]


def spread(weights: RowWeights, shape: tuple[int, ...]) -> np.ndarray:
    """Return weights with all axes of their value."""
    others = [axis for axis in range(len(shape)) if axis not in weights.axes]
    return np.broadcast_to(np.expand_dims(weights.array, others), shape)


PICKS = np.array([[2, 0, 1], [1, 1, 3]])
ALONG = np.random.default_rng(3).integers(0, 3, size=(4, 2, 6))
MOVES = {
    "slice": lambda x: x[1:, ::2],
    "last": lambda x: x[:, -1],
    "reverse": lambda x: x[::-1, :, ::-1],
    "transpose": lambda x: x.transpose(2, 0, 1),
    "merge": lambda x: x.reshape(12, 6),
    "merge all": lambda x: x.reshape(-1),
    "merge with what has no weights": lambda x: x.reshape(4, 18),
    "split": lambda x: x.reshape(2, 2, 3, 3, 2),
    "regroup": lambda x: x.reshape(6, 2, 6),
    "new axes": lambda x: x.reshape(4, 1, 3, 1, 6)[:, :, None],
    "broadcast": lambda x: jnp.broadcast_to(x[:, None, :, :1], (4, 2, 3, 5)),
    "rows by number": lambda x: x[PICKS],
    "tokens by number": lambda x: x[:, PICKS % 3],
    "features by number": lambda x: x[..., PICKS],
    "take along": lambda x: jnp.take_along_axis(x, ALONG, 1),
    "from a place": lambda x: lax.dynamic_slice(x, (jnp.array(1), jnp.array(0), 2), (2, 3, 3)),
    "one by one": lambda x: jnp.stack([x[:, n] for n in range(3)]),
    "taken apart": lambda x: jnp.stack(jnp.unstack(x, axis=1)[::-1], 2),
    "rolled": lambda x: jnp.roll(x, 1, 1),
    "parts": lambda x: jnp.concatenate(jnp.split(x, [1, 3], 0)[::-1]),
    "tiled": lambda x: jnp.tile(x, (1, 2, 1)),
    "repeated": lambda x: jnp.repeat(x, 2, 1),
    "written": lambda x: jnp.zeros((9, 3, 6)).at[np.array([1, 7, 3, 5])].set(x),
    "written in a part": lambda x: lax.dynamic_update_slice(jnp.zeros((6, 3, 7)), x, (1, 0, jnp.array(1))),
}


@pytest.mark.parametrize("axes", [(0,), (0, 1), (1, 2)])
@pytest.mark.parametrize("move", MOVES)
def test_weights_move_as_the_values_do(move, axes):
    """The oracle moves the weights themselves, spread over all entries of the value."""
    shape = (4, 3, 6)
    array = np.random.default_rng(2).uniform(1, 2, [shape[axis] for axis in axes]).astype(np.float32)
    start = RowWeights(array, axes)
    ((moved, known),) = known_after(MOVES[move], [spread(start, shape)], [(start,)])
    (end,) = known
    np.testing.assert_array_equal(spread(end, moved.shape), moved)


def lost(known: Any) -> set[int]:
    return {axis for one in known if one.array is None for axis in one.axes}


@pytest.mark.parametrize(
    ("function", "axes"),
    [
        (lambda x: jnp.sort(x, 1), {1}),
        (lambda x: lax.top_k(x.swapaxes(1, 2), 2)[0], {2}),
        (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "SAME"), {1}),
        (lambda x: jnp.fft.fft(x, axis=2).real, {0, 1, 2}),
        (lambda x: jnp.sort(x, 1).reshape(-1, 6), {0}),
        (lambda x: jnp.concatenate([x, jnp.sort(x, 1)], 1), {1}),
    ],
)
def test_an_axis_whose_positions_lose_their_meaning_is_refused(function, axes):
    x, weights = np.ones((4, 3, 6), np.float32), np.ones((4, 3), np.float32)
    ((value, known),) = known_after(function, [x], [of_input(x.shape, weights)])
    assert lost(known) == axes
    rows = list(range(value.ndim))
    assert of_rows(known, value.shape, rows) is None
    left = [axis for axis in rows if axis not in axes]
    known_elsewhere = any(one.array is not None for one in known)
    assert (of_rows(known, value.shape, left) is not None) == known_elsewhere


def test_a_strided_convolution_keeps_the_examples_alone():
    x, window = np.ones((4, 6, 2), np.float32), np.ones((2, 2, 3), np.float32)
    examples, tokens = np.array([1.0, 0, 1, 1], np.float32), np.ones((4, 6), np.float32)

    def convolve(x: Any, window: Any) -> Any:
        return lax.conv_general_dilated(x, window, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    ((out, known),) = known_after(convolve, [x, window], [of_input(x.shape, examples), ()])
    np.testing.assert_array_equal(of_rows(known, out.shape, (1, 0)), np.tile(examples, (3, 1)))
    ((out, known),) = known_after(convolve, [x, window], [of_input(x.shape, tokens), ()])
    assert lost(known) == {1} and of_rows(known, out.shape, (0, 1)) is None


def test_attention_scores_have_weights_by_query_and_by_key():
    q, k = np.ones((2, 3, 4), np.float32), np.ones((2, 5, 4), np.float32)
    queries = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    keys = np.array([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], np.float32)
    ((scores, known),) = known_after(
        lambda q, k: jnp.einsum("bqd,bkd->bqk", q, k),
        [q, k],
        [of_input(q.shape, queries), of_input(k.shape, keys)],
    )
    assert {one.axes for one in known} == {(0, 1), (0, 2)}
    pairs = queries[:, :, None] * keys[:, None]
    np.testing.assert_array_equal(of_rows(known, scores.shape, (0, 1, 2)), pairs)
    np.testing.assert_array_equal(of_rows(known, scores.shape, (0, 1)), queries)
    np.testing.assert_array_equal(of_rows(known, scores.shape, (2, 0)), keys.T)


def test_a_residual_connection_settles_what_was_lost():
    x, weights = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
    weights[1, 2] = 0
    ((_, known),) = known_after(lambda x: x + jnp.sort(x, 1), [x], [of_input(x.shape, weights)])
    np.testing.assert_array_equal(of_rows(known, x.shape, (0, 1)), weights)


def test_positions_filled_from_outside_do_not_count():
    """A dropped token of a mixture of experts is read from beyond the last one."""
    x, weights = np.ones((4, 6), np.float32), np.ones(4, np.float32)

    def dispatch(x: Any) -> Any:
        return jnp.take(x, np.array([0, 9, 2]), 0, mode="fill", fill_value=0)

    ((_, known),) = known_after(dispatch, [x], [of_input(x.shape, weights)])
    np.testing.assert_array_equal(of_rows(known, (3, 6), (0,)), [1, 0, 1])


def test_branches_agree_on_what_both_know():
    by_token, by_example = RowWeights(np.ones((2, 3)), (0, 1)), RowWeights(np.array([1.0, 0]), (0,))
    less = RowWeights(np.array([0.5, 1]), (0,))
    (both,) = agree([(by_example,), (less,), ()])
    np.testing.assert_array_equal(both.array, [0.5, 0])
    known = agree([(by_token, by_example), (by_example,)])
    assert [one.axes for one in known if one.array is not None] == [(0,)] and lost(known) == {1}
    assert agree([(), ()]) == ()


def test_inputs_without_weights_take_no_part():
    x, table = np.ones((4, 3, 6), np.float32), np.ones((3, 6), np.float32)
    weights = np.ones((4, 3), np.float32)
    assert of_input(table.shape, weights) == ()
    ((_, known),) = known_after(lambda x, t: x * t, [x, table], [of_input(x.shape, weights), ()])
    assert [one.axes for one in known] == [(0, 1)]
    assert of_rows((), x.shape, (0, 1)) is None
