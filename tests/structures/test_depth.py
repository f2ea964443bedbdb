"""Whole blocks: which are the identity without their params, which go, and the network without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

import jaxprune as jp
from jaxprune.tree.leaves import array_leaves

WIDTH, DEPTH = 6, 4
X = jax.random.normal(jax.random.key(7), (3, 5))
PREFIXES = [f"blocks/{i}" for i in range(DEPTH)]


def new_block(key, width=WIDTH):
    w, v, c = jax.random.split(key, 3)
    return {
        "scale": jnp.ones(width),
        "shift": jnp.zeros(width) + 0.1,
        "up": {"kernel": jax.random.normal(w, (width, 2 * width))},
        "down": {"kernel": jax.random.normal(v, (2 * width, width)), "bias": jax.random.normal(c, (width,))},
    }


def new_params(depth=DEPTH, seed=0):
    keys = jax.random.split(jax.random.key(seed), depth + 2)
    return {
        "in": {"kernel": jax.random.normal(keys[0], (5, WIDTH))},
        "blocks": [new_block(key) for key in keys[2:]],
        "out": {"kernel": jax.random.normal(keys[1], (WIDTH, 2)), "bias": jnp.ones(2)},
    }


def with_stack(params):
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])}


def unstacked(blocks):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(DEPTH)]


PARAMS = new_params()
STACKED = with_stack(PARAMS)


def in_stack(path, leaf):
    return int(path.startswith("blocks/"))


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def scaled_norm(block, x):
    return norm(x) * block["scale"] + block["shift"]


def branch(block, x):
    h = jax.nn.gelu(x @ block["up"]["kernel"])
    return h @ block["down"]["kernel"] + block["down"]["bias"]


def pre_norm(block, x):
    return x + branch(block, scaled_norm(block, x))


def of_list(block_fn, before=lambda x: x):
    def apply_fn(params, x):
        x = before(x @ params["in"]["kernel"])
        for block in params["blocks"]:
            x = block_fn(block, x)
        return x @ params["out"]["kernel"] + params["out"]["bias"]

    return apply_fn


def of_indices(block_fn):
    return lambda params, x: of_list(block_fn)({**params, "blocks": unstacked(params["blocks"])}, x)


def of_scan(block_fn):
    def scan(blocks, x):
        return lax.scan(lambda x, block: (block_fn(block, x), None), x, blocks)[0]

    return lambda params, x: of_list(scan)({**params, "blocks": [params["blocks"]]}, x)


def weight_norm(block, x):
    v = block["up"]["kernel"]
    kernel = block["scale"].mean() * v / jnp.linalg.norm(v, axis=0)
    return x + jnp.tanh(x @ kernel) @ block["down"]["kernel"]


def conditioned(block, x):
    """As in a diffusion transformer: the branch is scaled, shifted and gated by a condition."""
    scale = jnp.sin(x[:, :1]) @ block["scale"][None]
    return x + scale * branch(block, norm(x) * (1 + scale) + scale)


IDENTITIES = {
    "pre-norm": pre_norm,
    "remat": jax.checkpoint(pre_norm),
    "two sums": lambda block, x: pre_norm(block, x + branch(block, x)),
    "parallel": lambda block, x: x + branch(block, x) + branch(block, norm(x)),
    "a learned gate": lambda block, x: x + block["scale"] * branch(block, x),
    "weight norm": weight_norm,
    "conditioned": conditioned,
    "float32 inside": lambda block, x: pre_norm(block, x.astype(jnp.float32)).astype(x.dtype),
    "dead": lambda block, x: x + jnp.where(x.shape[0] > 0, branch(block, x), 0),
}
REFUSED = {
    "a norm of its own after the sum": (lambda b, x: scaled_norm(b, x + branch(b, x)), "gives zeros"),
    "a norm after the sum": (lambda b, x: norm(x + branch(b, x)), "stands after its sum"),
    "a norm after the sum, under remat": (
        jax.checkpoint(lambda b, x: norm(x + branch(b, x))),
        "stands after its sum",
    ),
    "no residual path": (branch, "gives zeros"),
    "a scale after the sum": (lambda b, x: pre_norm(b, x) / 2**0.5, "div at test_depth.py"),
    "an activation after the sum": (lambda b, x: jnp.tanh(pre_norm(b, x)), "tanh at test_depth.py"),
    "a gate": (
        lambda b, x: x * jax.nn.sigmoid(b["scale"]) + branch(b, x),
        "mul at test_depth.py:.* changes the block's input",
    ),
    "never read": (lambda b, x: x, "never reads it"),
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("make", [of_list, of_scan, of_indices])
def test_a_dropped_block_is_as_if_it_were_not_there(make, name):
    block_fn = IDENTITIES[name]
    apply_fn, params = make(block_fn), PARAMS if make is of_list else STACKED
    given = {"prefixes": PREFIXES} if make is of_list else {"stacked": in_stack}
    blocks = jp.residual_blocks(apply_fn, params, X, **given)
    assert len(blocks) == DEPTH
    masks = jp.prune_once(params, jp.scores.magnitude, count=2, structure=jp.structures.layers(blocks))
    assert all(mask.dtype == bool for mask in jax.tree.leaves(masks))
    layers = masks["blocks"] if make is of_list else unstacked(masks["blocks"])
    left = [block for block, mask in zip(PARAMS["blocks"], layers, strict=True) if mask["down"]["bias"].any()]
    assert len(left) == DEPTH - 2
    dead = jp.apply_masks(params, masks)
    expected = of_list(block_fn)({**PARAMS, "blocks": left}, X)
    np.testing.assert_allclose(apply_fn(dead, X), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", [of_list, of_scan, of_indices])
def test_what_is_not_the_identity_is_refused_by_name(make, name):
    block_fn, why = REFUSED[name]
    if make is of_list:
        with pytest.raises(ValueError, match=rf"blocks/0, .*{why}"):
            jp.residual_blocks(make(block_fn), PARAMS, X, prefixes=PREFIXES)
        return
    match = (
        rf"blocks\[0\], .*{why}" if make is of_indices else r"blocks\[0\], blocks\[1\].*(test_depth|never)"
    )
    with pytest.raises(ValueError, match=match):
        jp.residual_blocks(make(block_fn), STACKED, X, stacked=in_stack)


def test_a_relu_after_the_sum_is_none_where_the_stream_is_past_one():
    after = lambda block, x: jax.nn.relu(pre_norm(block, x))  # noqa: E731
    blocks = jp.residual_blocks(of_list(after, jax.nn.relu), PARAMS, X, prefixes=PREFIXES)
    assert len(blocks) == DEPTH
    with pytest.raises(ValueError, match=r"zero: blocks/0: custom_jvp_call .*stands after"):
        jp.residual_blocks(of_list(after), PARAMS, X, prefixes=PREFIXES)


def test_one_block_that_is_not_the_identity_is_named_alone():
    params = new_params()
    params["blocks"][2]["up"]["kernel"] = jnp.ones((WIDTH, 8))
    params["blocks"][2]["down"] = {"kernel": jnp.ones((8, 2 * WIDTH)), "bias": jnp.ones(2 * WIDTH)}
    params["blocks"][3] = new_block(jax.random.key(3), 2 * WIDTH)
    params["out"]["kernel"] = jnp.ones((2 * WIDTH, 2))

    def apply_fn(params, x):
        x = x @ params["in"]["kernel"]
        for i, block in enumerate(params["blocks"]):
            x = branch(block, x) if i == 2 else pre_norm(block, x)
        return x @ params["out"]["kernel"]

    with pytest.raises(ValueError, match=r"zero: blocks/2: add at test_depth.py:\d+ gives zeros"):
        jp.residual_blocks(apply_fn, params, X, prefixes=PREFIXES)
    blocks = jp.residual_blocks(apply_fn, params, X, prefixes=[p for p in PREFIXES if p != "blocks/2"])
    assert [block.name for block in blocks] == ["blocks/0", "blocks/1", "blocks/3"]


def test_zeros_that_a_later_layer_adds_a_bias_to_do_not_pass_for_a_residual_path():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones(4), "w": jnp.ones((4, 4))}

    def apply_fn(params, x):  # the same bias twice, so that it is in what the block reads
        x = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.tanh(x @ params["a"]) @ params["w"] + params["b"]

    with pytest.raises(ValueError, match="a: dot_general at"):
        jp.residual_blocks(apply_fn, params, jnp.ones(4), prefixes=["a"])


@pytest.mark.parametrize("residual", [True, False])
def test_zeros_that_another_stream_adds_do_not_pass_for_a_residual_path(residual):
    def apply_fn(params, x):
        y = context = x @ params["in"]["kernel"]
        for block in params["blocks"]:
            context = residual * context + branch(block, context)
        y = y + jax.nn.softmax(y @ context.T) @ context
        return y @ params["out"]["kernel"]

    if residual:
        assert len(jp.residual_blocks(apply_fn, PARAMS, X, prefixes=PREFIXES)) == DEPTH
    else:
        with pytest.raises(ValueError, match="zero: blocks/0, blocks/1, blocks/2: "):
            jp.residual_blocks(apply_fn, PARAMS, X, prefixes=PREFIXES)


def test_divisors_stay_alive():
    apply_fn = of_list(weight_norm)
    blocks = jp.residual_blocks(apply_fn, PARAMS, X, prefixes=PREFIXES)
    assert [block.divisors for block in blocks] == [(f"{p}/up/kernel",) for p in PREFIXES]
    assert "divided by: blocks/0/up/kernel" in str(blocks)
    masks = jp.prune_once(PARAMS, jp.scores.magnitude, count=3, structure=jp.structures.layers(blocks))
    assert all(block["up"]["kernel"].all() for block in masks["blocks"])
    assert sum(bool(block["scale"].any()) for block in masks["blocks"]) == 1
    dead = jp.apply_masks(PARAMS, masks)
    grads = jax.grad(lambda params: apply_fn(params, X).sum())(dead)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    # A second time nothing more goes: what is left of a dropped block does not count as alive.
    again = jp.prune_once(
        PARAMS, jp.scores.magnitude, sparsity=0.75, masks=masks, structure=jp.structures.layers(blocks)
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), masks, again))


# Scores and masks


def by_hand(params, reduce=np.mean, within=np.mean):
    """The score of each block of a list: kernels alone give scores."""
    return [
        reduce([within(np.abs(block["up"]["kernel"])), within(np.abs(block["down"]["kernel"]))])
        for block in params["blocks"]
    ]


@pytest.mark.parametrize(
    ("options", "within", "reduce"),
    [
        ({}, np.mean, np.mean),
        ({"norm": jnp.sum, "reduce": jnp.sum}, np.sum, np.sum),
        ({"norm": 2, "reduce": jnp.max}, lambda x: np.sqrt((x**2).sum()), np.max),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_scores_and_order(seed, options, within, reduce):
    params = new_params(seed=seed)
    order = np.argsort(by_hand(params, reduce, within))
    structures = [
        (params, jp.structures.layers(PREFIXES, **options)),
        (with_stack(params), jp.structures.layers(stacked=in_stack, **options)),
    ]
    for count in range(DEPTH):
        for tree, structure in structures:
            masks = jp.prune_once(tree, jp.scores.magnitude, count=count, structure=structure)
            blocks = masks["blocks"]
            if isinstance(blocks, dict):
                blocks = unstacked(blocks)
            for rank, i in enumerate(order):
                left = [np.asarray(leaf) for leaf in jax.tree.leaves(blocks[i])]
                assert all(leaf.all() if rank >= count else not leaf.any() for leaf in left)
            assert masks["in"]["kernel"].all() and masks["out"]["bias"].all()


def test_a_large_leaf_counts_no_more_than_a_small_one():
    params = {
        "blocks": [
            {"a": {"kernel": jnp.full((100, 100), 1.0)}, "b": {"kernel": jnp.full((2, 2), 1.0)}},
            {"a": {"kernel": jnp.full((2, 2), 2.0)}, "b": {"kernel": jnp.full((2, 2), 2.0)}},
        ]
    }
    structure = jp.structures.layers(["blocks/0", "blocks/1"])
    masks = jp.prune_once(params, jp.scores.magnitude, count=1, structure=structure)
    assert not masks["blocks"][0]["a"]["kernel"].any() and masks["blocks"][1]["a"]["kernel"].all()


def test_the_last_block_stays_unless_the_floor_says_otherwise():
    structure = jp.structures.layers(PREFIXES)
    for target, floor, warning, left in [
        ({"sparsity": 0.99}, 1, "floor", 1),
        ({"sparsity": 0.75}, 3, "floor", 3),
        ({"count": 4}, 0, "layer collapse", 0),
    ]:
        with pytest.warns(UserWarning, match=warning):
            masks = jp.prune_once(PARAMS, jp.scores.magnitude, **target, structure=structure, floor=floor)
        assert sum(bool(block["shift"].any()) for block in masks["blocks"]) == left


def test_pools_are_those_given():
    params = {"encoder": new_params(3)["blocks"], "decoder": new_params(2)["blocks"]}
    lists = {"encoder": [f"encoder/{i}" for i in range(3)], "decoder": ["decoder/0", "decoder/1"]}
    structure = jp.structures.layers(lists)
    masks = jp.prune_once(
        params,
        jp.scores.magnitude,
        count={"encoder": 2, "decoder": 0},
        scope="layerwise",
        structure=structure,
    )
    assert sum(bool(block["shift"].any()) for block in masks["encoder"]) == 1
    assert all(block["shift"].all() for block in masks["decoder"])


def test_a_list_and_a_stack_together():
    params = {"blocks": STACKED["blocks"], "tail": new_params(2)["blocks"]}
    structure = jp.structures.layers(["tail/0", "tail/1"], stacked=in_stack)
    masks = jp.prune_once(
        params, jp.scores.magnitude, count={"layers": 1, "stacked": 2}, scope="layerwise", structure=structure
    )
    assert masks["blocks"]["shift"].any(1).sum() == 2
    assert sum(bool(block["shift"].any()) for block in masks["tail"]) == 1


@pytest.mark.parametrize("axes", [(0,), (1,), (1, 0), (0, 2)])
def test_stacks_along_any_axes(axes):
    rng = np.random.default_rng(0)
    layers = [{"kernel": rng.normal(size=(2, 3)), "gain": np.ones(4)} for _ in range(6)]
    counts = (6,) if len(axes) == 1 else (2, 3)

    def stack(name):
        array = np.stack([layer[name] for layer in layers]).reshape(*counts, *layers[0][name].shape)
        return jnp.asarray(np.moveaxis(array, range(len(axes)), axes))

    params = {"kernel": stack("kernel"), "gain": stack("gain")}
    structure = jp.structures.layers(stacked=lambda path, leaf: axes)
    masks = jp.prune_once(params, jp.scores.magnitude, count=4, structure=structure)
    lowest = np.argsort([np.abs(layer["kernel"]).mean() for layer in layers])[:4]
    for name, mask in masks.items():
        front = np.moveaxis(np.asarray(mask), axes, range(len(axes))).reshape(6, -1)
        assert [i for i in range(6) if not front[i].any()] == sorted(lowest), name
        assert (front.any(1) == front.all(1)).all()


def test_gradual_under_jit():  # of a stack; tests/contracts has a list
    apply_fn = of_scan(pre_norm)
    structure = jp.structures.layers(jp.residual_blocks(apply_fn, STACKED, X, stacked=in_stack))
    schedule = jp.schedules.linear(0.75, begin_step=1, end_step=3)
    tx = jp.wrap_optax(optax.adam(1e-2), jp.pruner(jp.scores.magnitude, schedule, structure=structure))
    params, state = STACKED, tx.init(STACKED)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.mean(apply_fn(params, X) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    left = []
    for _ in range(4):
        params, state = step(params, state)
        left.append(int(optax.tree.get(state, "masks")["blocks"]["shift"].any(1).sum()))
    assert left == sorted(left, reverse=True) and left[-1] == 1
    jp.check_pruned(params, optax.tree.get(state, "masks"))


def test_gradients_score_blocks():
    apply_fn = of_list(pre_norm)
    grads = jax.grad(lambda params: jnp.mean(apply_fn(params, X) ** 2))(PARAMS)
    structure = jp.structures.layers(PREFIXES, norm=jnp.sum, reduce=jnp.sum)
    masks = jp.prune_once(PARAMS, jp.scores.taylor, grads=grads, count=1, structure=structure)
    scores = jp.scores.taylor(PARAMS, grads=grads)
    total = [float(b["up"]["kernel"].sum() + b["down"]["kernel"].sum()) for b in scores["blocks"]]
    assert not masks["blocks"][int(np.argmin(total))]["scale"].any()


# Libraries of modules


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        h = linen.BatchNorm(use_running_average=not train)(x)
        h = linen.Dense(2 * WIDTH)(h)
        return x + linen.Dense(WIDTH)(linen.gelu(h))


class LinenNet(linen.Module):
    depth: int = DEPTH

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(WIDTH)(x)
        for i in range(self.depth):
            x = LinenBlock(name=f"block_{i}")(x, train)
        return linen.Dense(2)(x)


def test_linen_with_batch_norm():
    variables = LinenNet().init(jax.random.key(0), X)
    prefixes = [(f"params/block_{i}", f"batch_stats/block_{i}") for i in range(DEPTH)]
    blocks = jp.residual_blocks(LinenNet().apply, variables, X, prefixes=prefixes)
    training = functools.partial(LinenNet().apply, train=True, mutable=["batch_stats"])
    again = jp.residual_blocks(training, variables, X, prefixes=prefixes, state=lambda result: result[1])
    assert blocks.blocks == again.blocks
    params = variables["params"]
    masks = jp.prune_once(
        params, jp.scores.magnitude, sparsity=0.5, structure=jp.structures.layers(blocks.under("params"))
    )
    kept = [i for i in range(DEPTH) if masks[f"block_{i}"]["Dense_0"]["bias"].any()]
    assert len(kept) == 2
    got = LinenNet().apply({**variables, "params": jp.apply_masks(params, masks)}, X)
    others = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    small = {
        "params": others | {f"block_{n}": params[f"block_{i}"] for n, i in enumerate(kept)},
        "batch_stats": {f"block_{n}": variables["batch_stats"][f"block_{i}"] for n, i in enumerate(kept)},
    }
    np.testing.assert_allclose(got, LinenNet(2).apply(small, X), rtol=1e-5, atol=1e-5)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 9, rngs=rngs), nnx.Linear(9, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.down(jax.nn.silu(self.up(self.norm(x)))))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.start = nnx.Linear(5, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_nnx():
    model = NnxNet(nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    blocks = jp.residual_blocks(
        lambda params, x: nnx.merge(graph, params, rest)(x), params, X, prefixes=PREFIXES
    )
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=jp.structures.layers(blocks))
    kept = [i for i in range(DEPTH) if jax.tree.leaves(masks["blocks"][i])[0].any()]
    assert len(kept) == 2
    got = nnx.merge(graph, jp.apply_masks(params, masks), rest)(X)
    model.blocks = nnx.List([model.blocks[i] for i in kept])
    np.testing.assert_allclose(got, model(X), rtol=1e-5, atol=1e-5)


def test_leaves_without_a_zero_keep_their_values():
    params = {
        "blocks": [{"kernel": jnp.ones((4, 4)), "seed": jnp.zeros((), jnp.int32) + 3} for _ in range(2)]
    }

    def apply_fn(params, x):
        for block in params["blocks"]:
            x = x + jnp.sin(block["seed"] * (x @ block["kernel"]))
        return x

    blocks = jp.residual_blocks(apply_fn, params, jnp.ones((1, 4)), prefixes=["blocks/0", "blocks/1"])
    assert blocks.fixed == {"blocks/0/seed", "blocks/1/seed"}
    masks = jp.prune_once(params, jp.scores.magnitude, count=1, structure=jp.structures.layers(blocks))
    assert masks["blocks"][0]["seed"] and masks["blocks"][1]["seed"]
    assert not masks["blocks"][0]["kernel"].any()


# Errors


@pytest.mark.parametrize(
    ("prefixes", "error", "match"),
    [
        (["blocks/0", "blocks/9"], ValueError, "no leaf lies under 'blocks/9'"),
        (["block"], ValueError, "no leaf lies under 'block'"),
        (["blocks/0", "blocks/0"], ValueError, "'blocks/0' is given twice"),
        (["blocks/0/up", "blocks/0"], ValueError, "'blocks/0/up' and 'blocks/0': blocks do not overlap"),
        (["blocks/0", ("blocks/1/up", "blocks/1")], ValueError, "do not overlap"),
        ([], ValueError, "is empty"),
        (None, ValueError, "no blocks"),
        ("blocks/0", TypeError, "a list of path prefixes"),
        ([3], TypeError, "a path prefix, or several"),
        ({"a": "blocks/0"}, TypeError, "a list of path prefixes"),
    ],
)
def test_wrong_prefixes(prefixes, error, match):
    with pytest.raises(error, match=match):
        jp.residual_blocks(of_list(pre_norm), PARAMS, X, prefixes=prefixes)
    with pytest.raises(error, match=match):
        prune_layers(PARAMS, prefixes)


def prune_layers(params, *blocks, **options):
    structure = jp.structures.layers(*blocks, **options)
    return jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=structure)


def test_wrong_stacks():
    with pytest.raises(ValueError, match="different numbers of layers"):
        prune_layers(STACKED, stacked=lambda path, leaf: 1)
    with pytest.raises(ValueError, match="names no axis"):
        prune_layers(STACKED, stacked=lambda path, leaf: 0)
    with pytest.raises(ValueError, match="is stacked and lies under 'blocks'"):
        prune_layers(STACKED, ["blocks"], stacked=in_stack)
    with pytest.raises(TypeError, match="stacked="):
        jp.structures.layers(stacked=1)  # type: ignore[arg-type]
    several = lambda path, leaf: 2 * (path == "blocks/up/kernel")  # noqa: E731
    with pytest.raises(ValueError, match="one axis"):
        jp.residual_blocks(of_scan(pre_norm), STACKED, X, stacked=several)


def test_wrong_use():
    apply_fn = of_list(pre_norm)
    blocks = jp.residual_blocks(apply_fn, PARAMS, X, prefixes=PREFIXES)
    with pytest.raises(TypeError, match="stacked= beside prefixes"):
        jp.structures.layers(blocks, stacked=in_stack)
    with pytest.raises(TypeError, match="reduce="):
        jp.structures.layers(blocks, reduce=3)  # type: ignore[arg-type]
    structure = jp.structures.layers(blocks)
    with pytest.raises(ValueError, match="takes in no leaf of the block 'blocks/0'"):
        jp.prune_once(PARAMS, jp.scores.magnitude, 0.5, structure=structure, where=jp.matching("out/kernel"))
    with pytest.raises(ValueError, match="Call residual_blocks with the params that are pruned"):
        prune_layers({"blocks": {"kernel": jnp.ones((2, 2))}}, blocks)
    inside, prefixes = {"params": PARAMS, "steps": jnp.ones(3)}, [f"params/{p}" for p in PREFIXES]
    wide = jp.residual_blocks(lambda tree, x: apply_fn(tree["params"], x), inside, X, prefixes=prefixes)
    with pytest.raises(ValueError, match=r"pass blocks.under\('params'\)"):
        prune_layers(PARAMS, wide)
    assert wide.under("params") == blocks
    with pytest.raises(ValueError, match="no leaf of"):
        wide.under("batch_stats")
    with pytest.raises(TypeError, match="did you mean 'prefixes'"):
        jp.residual_blocks(apply_fn, PARAMS, X, prefix=PREFIXES)


def test_abstract_params_do():
    shapes = jax.eval_shape(lambda: PARAMS)
    blocks = jp.residual_blocks(
        of_list(pre_norm), shapes, jax.ShapeDtypeStruct(X.shape, X.dtype), prefixes=PREFIXES
    )
    assert blocks == jp.residual_blocks(of_list(pre_norm), PARAMS, X, prefixes=PREFIXES)


def test_blocks_outside_jit_are_those_under_it():
    blocks = jp.residual_blocks(of_scan(pre_norm), STACKED, X, stacked=in_stack)
    structure = jp.structures.layers(blocks, norm=1)
    draw = np.random.default_rng(0)  # multiples of 1/64, whose sums are exact in any order
    scores = {
        path: jnp.asarray(draw.integers(-64, 64, leaf.shape) / 64, jnp.float32)
        for path, leaf in array_leaves(STACKED).items()
    }
    masks = {
        path: jnp.asarray(np.arange(leaf.size).reshape(leaf.shape) % 5 != 0)
        for path, leaf in array_leaves(STACKED).items()
    }

    def units(scores, masks):
        found = structure.pool(scores, masks)
        keep = {name: alive & (jnp.arange(alive.size) != 1) for name, alive in found.alive.items()}
        return found.scores, found.alive, found.expand(keep)

    outside, traced = units(scores, masks), jax.jit(units)(scores, masks)
    assert jax.tree.structure(outside) == jax.tree.structure(traced)
    for ours, theirs in zip(jax.tree.leaves(outside), jax.tree.leaves(traced), strict=True):
        np.testing.assert_array_equal(ours, theirs)
