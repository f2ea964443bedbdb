"""What the library gives, to the bit: masks, groups, compacted params and files against stored hashes.

The stored values, in `data/same_bits.json`, are what the library gave when they were written. A refactor that
is to change no behaviour leaves them as they are. After a change of behaviour that is meant,

    python -m tests.contracts.test_same_bits --write

writes them anew, and the diff of the file says which cases changed.

Each case uses the public API alone. Params and gradients are multiples of 1/64, so that sums of them are
exact and come out the same in any order: no value depends on the machine, the compiler or its flags. Nothing
that networks output is stored, only what is taken out of params by slices.
"""

import argparse
import hashlib
import itertools
import json
import re
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

STORED = Path(__file__).parents[1] / "data" / "same_bits.json"
CASES = {}
"""By name, a function without arguments that gives what JSON holds."""


def case(function):
    CASES[function.__name__] = function
    return function


def masks_case(function):
    """A case that returns masks, of which the hash and the counts are kept."""
    CASES[function.__name__] = lambda: of_masks(function())
    return function


# Digests


def by_path(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def sha256(content):
    return hashlib.sha256(content).hexdigest()[:16]


def digest(tree):
    """Of the paths, dtypes, shapes and bits of all leaves."""
    content = hashlib.sha256()
    for path, leaf in by_path(tree).items():
        array = np.asarray(leaf)
        content.update(f"{path} {array.dtype} {array.shape}\n".encode())
        content.update(array.tobytes())
    return content.hexdigest()[:16]


def of_masks(masks):
    kept = {path: int(np.asarray(leaf).sum()) for path, leaf in by_path(masks).items()}
    assert all(np.asarray(leaf).dtype == bool for leaf in jax.tree.leaves(masks))
    return {"sha256": digest(masks), "kept": kept}


def of_params(params):
    shapes = {path: list(np.shape(leaf)) for path, leaf in by_path(params).items()}
    return {"sha256": digest(params), "shapes": shapes}


def messages(call):
    """The text of every warning, or of the exception, that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except (ValueError, TypeError) as error:
            return [f"{type(error).__name__}: {error}"]
    return [f"{warned.category.__name__}: {warned.message}" for warned in caught]


def without_lines(text):
    """Without the numbers of the lines of this file, the folder that it is in, and addresses in memory."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return re.sub(r"[^\s()'\"]*test_same_bits\.py:\d+", "test_same_bits.py", text)


def of_table(text):
    """The rows of a table, and the sentences below it in one line each: numbers of lines have any width."""
    table, *sentences = text.split("\nWhole: ")
    rows = re.sub(r"\n {4}(?=\S)", " ", table).splitlines()
    return [without_lines(line) for line in [*rows, *(" ".join(each.split()) for each in sentences)]]


# Params


def grid(seed, *shape, dtype=np.float32):
    """Multiples of 1/64 in (-2, 2), none of them 0. RandomState's numbers are the same in every NumPy."""
    draw = np.random.RandomState(seed)
    size = draw.randint(1, 128, shape) * np.where(draw.randint(0, 2, shape), 1, -1)
    return jnp.asarray(size / 64, dtype)


def ones_or_more(seed, *shape):
    return jnp.abs(grid(seed, *shape)) + 1


def mlp(seed=0, sizes=(12, 16, 8, 4)):
    return {
        f"fc{n}": {"kernel": grid(seed + 10 * n, a, b), "bias": grid(seed + 10 * n + 1, b)}
        for n, (a, b) in enumerate(itertools.pairwise(sizes))
    }


def apply_mlp(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def stacked_mlp():
    return {
        "layers": {"kernel": grid(100, 3, 8, 8), "bias": grid(101, 3, 8)},
        "head": {"kernel": grid(102, 8, 4)},
    }


def by_layers(path, leaf):
    return 1 if path.startswith("layers/") else 0


GRADS = mlp(seed=5)
X = jnp.ones((2, 12))
magnitude = jp.scores.magnitude


# Masks in one go


@masks_case
def once_global():
    return jp.prune_once(mlp(), magnitude, sparsity=0.7)


@masks_case
def once_global_traced():
    return jax.jit(lambda params: jp.prune_once(params, magnitude, sparsity=0.7))(mlp())


@masks_case
def once_layerwise():
    return jp.prune_once(mlp(), magnitude, sparsity=0.7, scope="layerwise")


@masks_case
def once_count():
    return jp.prune_once(mlp(), magnitude, count=37)


@masks_case
def once_count_by_path():
    return jp.prune_once(mlp(), magnitude, count={"fc0/kernel": 11, "fc2/kernel": 5}, scope="layerwise")


@masks_case
def once_count_traced_and_vmapped():
    of_count = jax.vmap(lambda count: jp.prune_once(mlp(), magnitude, count=count))
    return of_count(jnp.arange(0, 60, 15))


@masks_case
def once_of_what_remains():
    masks = jp.prune_once(mlp(), magnitude, sparsity=0.5)
    return jp.prune_once(mlp(5), magnitude, sparsity=0.25, of="remaining", masks=masks)


@masks_case
def once_of_the_total_after_masks():
    masks = jp.prune_once(mlp(), magnitude, sparsity=0.5)
    return jp.prune_once(mlp(5), magnitude, sparsity=0.75, masks=masks)


@masks_case
def once_threshold():
    return jp.prune_once(mlp(), magnitude, threshold=0.75)


@masks_case
def once_nm():
    return jp.prune_once(mlp(), magnitude, sparsity=0.5, structure=jp.structures.nm(2, 4))


@masks_case
def once_nm_of_some_groups():
    structure = jp.structures.nm(1, 4, axis=-1)
    return jp.prune_once(mlp(), magnitude, sparsity=0.3, structure=structure)


@masks_case
def once_blocks():
    structure = jp.structures.blocks((3, 4), norm=1)
    return jp.prune_once(mlp(), magnitude, sparsity=0.4, structure=structure)


@masks_case
def once_slices():
    structure = jp.structures.slices(axis=-1, norm=1)
    return jp.prune_once(mlp(), magnitude, count=6, structure=structure)


@masks_case
def once_slices_of_two_axes():
    params = {"conv": {"kernel": grid(30, 3, 3, 4, 6)}}
    structure = jp.structures.slices(axis=(-2, -1), norm=float("inf"))
    return jp.prune_once(params, magnitude, sparsity=0.5, structure=structure)


@masks_case
def once_channels():
    structure = jp.structures.channels(jp.channel_groups(apply_mlp, mlp(), X), norm=1)
    return jp.prune_once(mlp(), magnitude, sparsity=0.5, structure=structure)


@masks_case
def once_channels_isomorphic():
    groups = jp.channel_groups(apply_mlp, mlp(), X)
    structure = jp.structures.channels(groups, norm=1, multiple_of=2)
    return jp.prune_once(mlp(), magnitude, sparsity=0.4, structure=structure, scope="isomorphic")


@masks_case
def once_erk():
    return jp.prune_once(mlp(), magnitude, jp.distributions.erk(mlp(), 0.6), scope="layerwise")


@masks_case
def once_uniform():
    return jp.prune_once(mlp(), magnitude, jp.distributions.uniform(mlp(), 0.6), scope="layerwise")


@masks_case
def once_random():
    return jp.prune_once(mlp(), jp.scores.random, sparsity=0.6, key=jax.random.key(3))


@masks_case
def once_taylor():
    return jp.prune_once(mlp(), jp.scores.taylor, sparsity=0.6, grads=GRADS)


@masks_case
def once_signed_taylor_where():
    where = jp.all_of(jp.kernels, jp.not_(jp.matching("fc1/*")))
    return jp.prune_once(mlp(), jp.scores.signed_taylor, sparsity=0.6, grads=GRADS, where=where)


@masks_case
def once_lamp():
    return jp.prune_once(mlp(), jp.scores.lamp, sparsity=0.6)


@masks_case
def once_scores_as_a_tree():
    return jp.prune_once(mlp(), GRADS, sparsity=0.6)


@masks_case
def once_stacked():
    return jp.prune_once(stacked_mlp(), magnitude, sparsity=0.6, stacked=by_layers)


@masks_case
def once_stacked_layerwise():
    return jp.prune_once(stacked_mlp(), magnitude, sparsity=0.6, stacked=by_layers, scope="layerwise")


@masks_case
def once_stacked_lamp():
    return jp.prune_once(stacked_mlp(), jp.scores.lamp, sparsity=0.6, stacked=by_layers)


@masks_case
def once_narrow_leaves():
    params = {
        "half": {"kernel": grid(40, 8, 8, dtype=jnp.float16)},
        "brain": {"kernel": grid(41, 8, 8, dtype=jnp.bfloat16)},
        "single": {"kernel": grid(42, 8, 8)},
    }
    return jp.prune_once(params, magnitude, sparsity=0.55)


@masks_case
def once_ties():
    params = jax.tree.map(lambda leaf: jnp.sign(leaf) * jnp.ceil(jnp.abs(leaf)), mlp())
    return jp.prune_once(params, magnitude, sparsity=0.45)


@masks_case
def once_zeros_of_both_signs():
    params = {
        "a": {"kernel": grid(50, 6, 6) * jnp.asarray([0.0, -0.0, 1.0] * 2)},
        "b": {"kernel": grid(51, 6, 6)},
    }
    return jp.prune_once(params, magnitude, sparsity=0.4)


@masks_case
def once_floor():
    return jp.prune_once(mlp(), magnitude, count=200, floor=3)


# Masks over time


def trained(optimizer, params, steps, grads_of):
    """The states and the params after each jitted step, of grads on the grid."""
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(params, state, grads_of(number))
        yield params, state


def of_run(optimizer, params, steps):
    every = [mlp(seed) for seed in range(200, 205)]
    runs = trained(optimizer, params, steps, lambda number: every[number % 5])
    kept, masks, last = [], [], None
    for params, state in runs:
        found = jp.unpack_masks(optax.tree.get(state, "masks"), params)
        kept.append(int(jp.metrics.nonzeros(found)))
        masks.append(digest(found))
        last = (params, state)
    params, state = last
    return {
        "kept": kept,
        "masks": [f"{value} x {len(list(run))}" for value, run in itertools.groupby(masks)],
        "params": digest(params),
        "state": {path: list(np.shape(leaf)) for path, leaf in by_path(state).items()},
    }


SGD = optax.sgd(2.0**-4, momentum=0.5)
CUBIC = jp.schedules.cubic(0.8, begin_step=2, end_step=24)


@case
def wrapped_cubic():
    return of_run(jp.wrap_optax(SGD, jp.pruner(magnitude, CUBIC, every=3)), mlp(), 30)


@case
def wrapped_packed():
    return of_run(jp.wrap_optax(SGD, jp.pruner(magnitude, CUBIC, every=3), packed=True), mlp(), 30)


@case
def wrapped_summed_taylor_with_a_stop():
    pruner = jp.pruner(jp.scores.taylor, CUBIC, every=5, memory=1.0, stop=0.6, scope="layerwise")
    return of_run(jp.wrap_optax(SGD, pruner), mlp(), 20)


@case
def wrapped_nm():
    pruner = jp.pruner(magnitude, jp.schedules.linear(0.5, end_step=12), structure=jp.structures.nm(2, 4))
    return of_run(jp.wrap_optax(SGD, pruner), mlp(), 14)


@case
def wrapped_channels():
    structure = jp.structures.channels(jp.channel_groups(apply_mlp, mlp(), X), norm=1)
    pruner = jp.pruner(magnitude, jp.schedules.linear(0.5, end_step=12), structure=structure, every=4)
    return of_run(jp.wrap_optax(SGD, pruner), mlp(), 14)


@case
def wrapped_random():
    return of_run(jp.wrap_optax(SGD, jp.pruner(jp.scores.random, CUBIC, every=6, seed=7)), mlp(), 25)


@case
def wrapped_rigl():
    masks = jp.prune_once(mlp(), jp.scores.random, sparsity=0.5, key=jax.random.key(1))
    return of_run(jp.wrap_optax(SGD, jp.rigl(masks, every=4, end_step=20, fraction=0.5)), mlp(), 22)


@case
def wrapped_set():
    masks = jp.prune_once(mlp(), jp.scores.random, sparsity=0.5, key=jax.random.key(1))
    return of_run(jp.wrap_optax(SGD, jp.set_(masks, every=4, end_step=20, fraction=0.5, seed=3)), mlp(), 22)


@case
def wrapped_rewiring_of_slices():
    structure = jp.structures.slices(norm=1)
    masks = jp.prune_once(mlp(), magnitude, sparsity=0.5, structure=structure, scope="layerwise")
    pruner = jp.rewiring(
        masks, grow=jp.scores.random, every=4, end_step=20, fraction=0.5, structure=structure, seed=2
    )
    return of_run(jp.wrap_optax(SGD, pruner), mlp(), 22)


@case
def kept_masked():
    masks = jp.prune_once(mlp(), magnitude, sparsity=0.5)
    return of_run(jp.keep_masked(SGD, masks), mlp(), 5)


@case
def applied_and_packed():
    masks = jp.prune_once(mlp(), magnitude, sparsity=0.5)
    packed = jp.pack_masks(masks)
    return {"masked": digest(jp.apply_masks(mlp(), masks)), "packed": digest(packed)}


@masks_case
def rounds_of_magnitude():
    return jp.prune_rounds(mlp(), jp.pruner(magnitude, jp.schedules.geometric(0.3)), 4)


@masks_case
def rounds_of_taylor_traced():
    pruner = jp.pruner(jp.scores.taylor, jp.schedules.constant(0.25), of="remaining", scope="layerwise")
    return jax.jit(lambda params, grads: jp.prune_rounds(params, pruner, 4, grads=grads))(mlp(), GRADS)


def toy_train(params, masks):
    """Stands for a training loop: a step on the grid."""
    moved = jax.tree.map(lambda leaf, step: leaf + step * 0.5, params, mlp(300))
    return jp.apply_masks(moved, masks)


@case
def tickets():
    pruner = jp.pruner(magnitude, jp.schedules.geometric(0.4))
    return [
        {
            "level": int(ticket.level),
            "masks": of_masks(ticket.masks),
            "params": digest(ticket.params),
            "trained": digest(ticket.trained),
            "sparsity": [round(float(value), 6) for value in ticket.sparsity],
        }
        for ticket in jp.lottery_ticket(toy_train, mlp(), pruner, levels=2)
    ]


@case
def tickets_scanned():
    pruner = jp.pruner(magnitude, jp.schedules.geometric(0.4))

    def measure(ticket):
        return ticket.masks, ticket.params, ticket.trained

    def run(params):
        return jp.lottery_scan(toy_train, params, pruner, 2, rewind="learning_rate", measure=measure)

    masks, params, after = jax.jit(run)(mlp())
    return {"masks": of_masks(masks), "params": digest(params), "trained": digest(after)}


@masks_case
def shuffled():
    masks = jp.prune_once(mlp(), magnitude, sparsity=0.6)
    return jp.shuffled_masks(jax.random.key(4), masks, within=-1)


# Networks: groups, and what is left of them


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convnet_params():
    def block(seed, inputs, outputs):
        return {
            "conv": {"kernel": grid(seed, 3, 3, inputs, outputs)},
            "bn": {
                "scale": grid(seed + 1, outputs),
                "bias": grid(seed + 2, outputs),
                "mean": grid(seed + 3, outputs),
                "var": ones_or_more(seed + 4, outputs),
            },
        }

    return {
        "stem": block(400, 3, 8),
        "inner": block(410, 8, 6),
        "outer": block(420, 6, 8),
        "head": {"kernel": grid(430, 8, 4), "bias": grid(431, 4)},
    }


def apply_convnet(params, x):
    def block(name, x):
        bn = params[name]["bn"]
        x = conv(x, params[name]["conv"]["kernel"])
        return (x - bn["mean"]) * jax.lax.rsqrt(bn["var"] + 1e-5) * bn["scale"] + bn["bias"]

    x = jax.nn.relu(block("stem", x))
    x = jax.nn.relu(x + block("outer", jax.nn.relu(block("inner", x))))
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def attention_params():
    return {
        "norm": ones_or_more(500, 8),
        "query": {"kernel": grid(501, 8, 12), "bias": grid(502, 12)},
        "key": {"kernel": grid(503, 8, 6)},
        "value": {"kernel": grid(504, 8, 6)},
        "out": {"kernel": grid(505, 12, 8)},
    }


def apply_attention(params, x):
    """Grouped-query attention: of four heads, two share each key and value."""
    batch, time, _ = x.shape
    y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * params["norm"]
    q = (y @ params["query"]["kernel"] + params["query"]["bias"]).reshape(batch, time, 2, 2, 3)
    k, v = ((y @ params[name]["kernel"]).reshape(batch, time, 2, 3) for name in ("key", "value"))
    weights = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k) / 3**0.5)
    return x + jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, time, 12) @ params["out"]["kernel"]


def decoder_params(layers=3):
    return {
        "embedding": grid(600, 10, 8),
        "layers": {
            "norm": ones_or_more(601, layers, 8),
            "gate": {"kernel": grid(602, layers, 8, 12)},
            "up": {"kernel": grid(603, layers, 8, 12)},
            "down": {"kernel": grid(604, layers, 12, 8)},
        },
        "head": {"kernel": grid(605, 8, 10)},
    }


def apply_decoder(params, tokens):
    def layer(x, p):
        y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * p["norm"]
        return x + (jax.nn.silu(y @ p["gate"]["kernel"]) * (y @ p["up"]["kernel"])) @ p["down"][
            "kernel"
        ], None

    x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
    return x @ params["head"]["kernel"]


def divided_params():
    return {
        "in": {"kernel": grid(700, 6, 8), "scale": ones_or_more(701, 8)},
        "out": {"kernel": grid(702, 8, 4)},
    }


def apply_divided(params, x):
    """The function divides by a scale, so no slice of it is zero."""
    return jnp.tanh(x @ params["in"]["kernel"] / params["in"]["scale"]) @ params["out"]["kernel"]


def apply_refused(params, x):
    """The scales that divide the hidden units are also read where these make nothing harmless."""
    return apply_divided(params, x) + jnp.sum(1 / params["in"]["scale"])


def apply_pinned(params, x):
    """Of two hidden layers one is added to itself reversed, and one is sorted."""
    h = jnp.tanh(x @ params["fc0"]["kernel"])
    h = h + jnp.flip(h, axis=-1)
    h = jnp.sort(h @ params["fc1"]["kernel"], axis=-1)
    return h @ params["fc2"]["kernel"]


NETWORKS = {
    "mlp": (apply_mlp, mlp, X),
    "convnet": (apply_convnet, convnet_params, jnp.ones((1, 6, 6, 3))),
    "attention": (apply_attention, attention_params, jnp.ones((1, 4, 8))),
    "decoder": (apply_decoder, decoder_params, jnp.zeros((1, 5), jnp.int32)),
    "divided": (apply_divided, divided_params, jnp.ones((2, 6))),
    "refused": (apply_refused, divided_params, jnp.ones((2, 6))),
    "pinned": (apply_pinned, mlp, X),
}


def of_groups(groups):
    return {
        "groups": [
            {
                "name": group.name,
                "units": group.units,
                "members": [
                    f"{m.path}[{m.axis}] {sha256(np.asarray(m.indices, np.int64).tobytes())}"
                    + (" divisor" if m.divisor else "")
                    for m in group.members
                ],
                "kind": sha256(without_lines(repr(group.kind)).encode()),
                "why_not": group.why_not and without_lines(str(group.why_not)),
                "weights": group.weights and list(group.weights),
                "stack": group.stack,
                "residual": group.residual,
            }
            for group in groups
        ],
        "stacks": {path: list(axes) for path, axes in groups.stacks.items()},
        "table": of_table(str(groups)),
        "inner": [group.name for group in groups.inner()],
    }


def add_groups_case(name, **options):
    apply_fn, make, x = NETWORKS[name]

    def groups():
        return of_groups(jp.channel_groups(apply_fn, make(), x, **options))

    CASES["_".join(["groups", name, *map(str, options.values())])] = groups


for network in NETWORKS:
    add_groups_case(network)
for split in ("minor", 1):
    add_groups_case("attention", split=split)


def of_compacted(small, params):
    plan = small.plan
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.npz"
        plan.save(file)
        # What zlib makes of the bytes is up to its version.
        with zipfile.ZipFile(file) as archive:
            members = {name: sha256(archive.read(name)) for name in archive.namelist()}
    momentum = optax.sgd(0.5, momentum=0.5).init(params)
    return {
        "params": of_params(small.params),
        "masks": of_masks(small.masks),
        "keep": {
            path: {str(axis): np.asarray(kept).tolist() for axis, kept in axes.items()}
            for path, axes in plan.keep.items()
        },
        "divisors": {path: list(axes) for path, axes in plan.divisors.items()},
        "stacks": {path: list(axes) for path, axes in plan.stacks.items()},
        "removed": list(plan.removed),
        "stayed": [without_lines(str(stayed)) for stayed in small.not_removed],
        "file": members,
        "expanded": of_params(small.expand(small.params)),
        "shrunk": of_params(small.shrink(momentum)),
    }


def add_compact_case(name, scope, **options):
    apply_fn, make, x = NETWORKS[name]

    def compacted():
        params = make()
        groups = jp.channel_groups(apply_fn, params, x)
        structure = jp.structures.channels(groups.inner() if name == "decoder" else groups, norm=1)
        masks = jp.prune_once(params, magnitude, sparsity=0.5, structure=structure, scope=scope)
        small = jp.compact(apply_fn, params, masks, x, **options)
        return {"masks": of_masks(masks), **{f"small {k}": v for k, v in of_compacted(small, params).items()}}

    CASES["_".join(["compact", name, scope, *options])] = compacted


add_compact_case("mlp", "global")
add_compact_case("mlp", "layerwise", multiple_of=4)
add_compact_case("convnet", "layerwise")
add_compact_case("convnet", "isomorphic")
add_compact_case("attention", "layerwise")
add_compact_case("divided", "layerwise")
add_compact_case("decoder", "layerwise")
add_compact_case("decoder", "global")


@case
def compact_by_entries():
    """Masks of input slices and of entries, some of which have to stay: what, and why."""
    params = mlp()
    inputs = jp.structures.slices(axis=-2, norm=1)
    masks = jp.prune_once(params, magnitude, sparsity=0.3, structure=inputs, scope="layerwise")
    masks = jp.prune_once(params, magnitude, sparsity=0.6, masks=masks)
    return of_compacted(jp.compact(apply_mlp, params, masks, X), params)


@case
def compact_by_layers():
    params = decoder_params()
    blocks = jp.residual_blocks(apply_decoder, params, NETWORKS["decoder"][2], stacked=by_layers)
    structure = jp.structures.layers(blocks, norm=1)
    masks = jp.prune_once(params, magnitude, count=1, structure=structure)
    small = jp.compact(apply_decoder, params, masks, NETWORKS["decoder"][2])
    return {"blocks": without_lines(str(blocks)).splitlines(), **of_compacted(small, params)}


# Files, texts


def of_file(*arguments, **options):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.jaxprune"
        size = jp.io.save(file, *arguments, **options)
        return {"size": size, "sha256": sha256(file.read_bytes()), "params": digest(jp.io.load(file).params)}


@case
def file_of_masked_params():
    return {str(s): of_file(mlp(), jp.prune_once(mlp(), magnitude, sparsity=s)) for s in (0.25, 0.5, 0.9)}


@case
def file_of_dense_params_with_metadata():
    return of_file(mlp(), metadata={"steps": 3, "name": "dense"})


@case
def file_of_narrow_leaves():
    params = {
        "half": {"kernel": grid(40, 8, 8, dtype=jnp.float16)},
        "brain": [grid(41, 8, 8, dtype=jnp.bfloat16), np.arange(9, dtype=np.int32)],
    }
    return of_file(params)


@case
def file_of_8_bit_values():
    return of_file(mlp(), jp.prune_once(mlp(), magnitude, sparsity=0.5), int8=True)


RECIPE = {
    "version": 1,
    "prune": [
        {
            "score": "magnitude",
            "structure": {"nm": {"n": 2, "m": 4}},
            "where": {"all_of": ["kernels", {"not": "fc2/*"}]},
            "sparsity": {"cubic": {"sparsity": 0.5, "begin_step": 2, "end_step": 8}},
            "every": 2,
        },
        {"score": "taylor", "scope": "layerwise", "where": "fc2/kernel", "sparsity": {"erk": 0.5}},
    ],
    "distillation": {"temperature": 4, "alpha": 0.9},
    "stop": {"accuracy": 0.9},
}


@case
def recipe():
    read = jp.recipes.parse(RECIPE)
    pruner = read.pruner(mlp())
    state, update = pruner.init(mlp()), jax.jit(pruner.update)
    for _ in range(9):
        state = update(state, mlp(), grads=GRADS)
    return {
        "yaml": read.to_yaml().splitlines(),
        "stop": repr(read.stop),
        "distillation": read.distillation,
        "end_step": read.end_step,
        "once": read.once,
        "masks": of_masks(state.masks),
    }


@case
def texts():
    masks = jp.prune_once(mlp(), magnitude, sparsity=0.5)
    dense = jp.prune_once(mlp(), magnitude, sparsity=0.0)
    overlap = jp.metrics.overlap(masks, jp.prune_once(mlp(5), magnitude, sparsity=0.5))
    return {
        "table": jp.metrics.table(masks, asked=0.5).splitlines(),
        "sparsity": repr(jp.metrics.sparsity(masks)),
        "compression": repr(jp.metrics.compression(masks)),
        "collapsed": list(jp.metrics.collapsed(masks)),
        "nonzeros": [jp.metrics.nonzeros(masks), jp.metrics.nonzeros(dense)],
        "macs": without_lines(repr(jp.metrics.macs(apply_mlp, mlp(), X, masks=masks))),
        "overlap": {path: repr(value) for path, value in overlap.items()},
        "erk": {path: round(value, 9) for path, value in jp.distributions.erk(mlp(), 0.6).items()},
        "cubic": [round(float(CUBIC(step)), 9) for step in range(0, 30, 4)],
        "schedules": [
            each.name for each in (CUBIC, jp.schedules.geometric(0.2), jp.schedules.one_shot(0.5, 3))
        ],
    }


@case
def warned():
    zero = {"kernel": jnp.zeros((4, 4)), "other": {"kernel": grid(60, 4, 4)}}
    return {
        "floor": messages(lambda: jp.prune_once(zero, magnitude, sparsity=0.5)),
        "collapse": messages(lambda: jp.prune_once(zero, magnitude, sparsity=0.5, floor=0)),
        "unreached": messages(lambda: jp.prune_once(zero, magnitude, count=40)),
    }


@case
def refused():
    params = mlp()
    ones = jp.ones_masks(params)

    def once(**options):
        return lambda: jp.prune_once(params, magnitude, **options)

    calls = {
        "no target": once(),
        "two targets": once(sparsity=0.5, count=3),
        "out of range": once(sparsity=1.0),
        "scope": once(sparsity=0.5, scope="locally"),
        "of": once(sparsity=0.5, of="all"),
        "where": once(sparsity=0.5, where=jp.matching("fc9/*")),
        "path": once(sparsity={"fc0/kernl": 0.5}),
        "structure": once(sparsity=0.5, structure=jp.structures.nm),
        "extra": once(sparsity=0.5, batch=3),
        "nm": once(sparsity=0.9, structure=jp.structures.nm(2, 4)),
        "nan": lambda: jp.prune_once(jax.tree.map(lambda w: w * jnp.nan, params), magnitude, sparsity=0.5),
        "grads": lambda: jp.prune_once(params, jp.scores.taylor, sparsity=0.5),
        "key": lambda: jp.prune_once(params, jp.scores.random, sparsity=0.5),
        "masks": lambda: jp.check_masks({**ones, "fc0": {"kernel": ones["fc0"]["kernel"]}}, params),
        "pruned": lambda: jp.check_pruned(params, jp.prune_once(params, magnitude, sparsity=0.5)),
        "plan": lambda: jp.Plan({"kernel": (2, 3)}, {"kernel": {1: np.array([0, 2])}}).shrink(params),
        "recipe": lambda: jp.recipes.parse({"prune": {"score": "magnitud", "sparsity": 0.5}}),
        "schedule": lambda: jp.schedules.cubic(0.5, begin_step=5, end_step=2),
    }
    found = {name: [without_lines(text) for text in messages(call)] for name, call in calls.items()}
    assert all(found.values()), found
    return found


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


@pytest.mark.parametrize("name", CASES)
def test_same_bits(name, stored):
    # JSON, as the stored values have been through it too.
    assert json.loads(json.dumps(CASES[name]())) == stored[name]


def test_all_that_is_stored_is_compared(stored):
    assert stored.keys() == CASES.keys()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {STORED.name} anew")
    args = parser.parse_args()
    found = {name: function() for name, function in CASES.items()}
    if args.write:
        STORED.write_text(json.dumps(found, indent=1) + "\n")
    before = json.loads(STORED.read_text())
    different = [name for name in CASES if before.get(name) != json.loads(json.dumps(found[name]))]
    print(f"{len(CASES)} cases, {', '.join(different) or 'none'} different from {STORED.name}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
