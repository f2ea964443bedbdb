"""The problem for which every member of the table is made, with its counts worked out by hand."""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from tests.oracles.brute_force import half_even
from tests.support.trees import by_role, of_sort, path_of, plain

CALLS = 4
"""How often each pruner is called: masks move at several calls, and rest at the last."""

FLAT, DEEP = (4, 8, 3), (4, 8, 8, 4, 3)
"""Widths of the two networks: one hidden layer, and three, of which the last has no scale."""


class Problem(NamedTuple):
    """What a pruner may be given, all of it arrays.

    Attributes:
      params: no two entries have the same magnitude; all are numbers of bfloat16 as well.
      grads: like params.
      masks: like params; kernels keep two entries of every four along their inputs.
      key: a PRNG key.
      batch, batches: inputs and outputs of the network, and three of these stacked.
      activations: by kernel, outputs of its layer after a ReLU. No two channels are 0 equally often.
    """

    params: Any
    grads: Any
    masks: Any
    key: jax.Array
    batch: Any
    batches: Any
    activations: Any


def problem(
    seed: int, widths: tuple[int, ...] = FLAT, dtype: Any = jnp.float32, sort: str | None = None
) -> Problem:
    """Return the same numbers in any dtype, in a tree of a sort of `support.trees` or in plain dicts."""
    rng = np.random.default_rng(seed)
    data = jnp.float64 if dtype == jnp.float64 else jnp.float32
    shapes = {}
    for name, (inputs, outputs) in zip("abcd", itertools.pairwise(widths), strict=False):
        shapes[name] = {"bias": (outputs,), "kernel": (inputs, outputs)}
        if name in "ab" and name != "abcd"[len(widths) - 2]:
            shapes[name]["scale"] = (outputs,)
    size = sum(math.prod(shape) for layer in shapes.values() for shape in layer.values())
    distinct = iter(rng.permutation(np.arange(1, size + 1)) / 64 * rng.choice([-1, 1], size))
    half = np.array([True, True, False, False])

    def each(draw: Callable[[tuple[int, ...]], Any]) -> Any:
        drawn = {name: {leaf: draw(s) for leaf, s in layer.items()} for name, layer in shapes.items()}
        return of_sort(sort, drawn)

    def kept(shape):
        if len(shape) == 1 or shape[0] % 4:
            return jnp.ones(shape, bool)
        groups = np.stack([rng.permutation(half) for _ in range(math.prod(shape) // 4)])
        return jnp.asarray(groups.reshape(shape[0] // 4, shape[1], 4).swapaxes(1, 2).reshape(shape))

    def rounded(shape):
        return rng.normal(size=shape).astype(jnp.bfloat16)

    def normal(*shape):
        return jnp.asarray(rounded(shape), data)

    def active(channels):
        zeros = np.arange(10)[:, None] < rng.permutation(channels) + 1
        return jnp.where(rng.permuted(zeros, axis=0), 0, jnp.abs(normal(10, channels)))

    params = each(
        lambda s: jnp.asarray(np.array([next(distinct) for _ in range(math.prod(s))]).reshape(s), dtype)
    )
    return Problem(
        params=params,
        grads=each(lambda s: jnp.asarray(rounded(s), dtype)),
        masks=each(kept),
        key=jax.random.key(seed),
        batch=(normal(5, widths[0]), normal(5, widths[-1])),
        batches=(normal(3, 5, widths[0]), normal(3, 5, widths[-1])),
        activations={path_of(params, f"{name}/kernel"): active(shapes[name]["bias"][0]) for name in shapes},
    )


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    """Return the network's outputs, computed in the precision of its inputs."""
    *hidden, last = [
        {name: leaf.astype(x.dtype) for name, leaf in layer.items()} for layer in plain(params).values()
    ]
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        x = x * layer["scale"] if "scale" in layer else x
    return x @ last["kernel"] + last["bias"]


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Return the mean squared error."""
    return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


# --- how many units go

Gone = Mapping[tuple[str, ...], int]
"""How many units are removed, by the pools that compete with each other."""

ENTRIES = {"a/kernel": 32, "b/kernel": 24}
COLUMNS = {"a/kernel": 8, "b/kernel": 3}
RAMP = (0.2, 0.4, 0.6, 0.6)


def together(sizes: Mapping[str, int], sparsities: tuple[float, ...] = RAMP) -> list[Gone]:
    """Return the counts by call when all pools compete."""
    return [{tuple(sizes): half_even(s, sum(sizes.values()))} for s in sparsities]


def apart(sizes: Mapping[str, int], *sparsities: Any) -> list[Gone]:
    """Return the counts by call when each pool is ranked alone, at one sparsity for all or one for each."""
    by_pool = [dict.fromkeys(sizes, s) if isinstance(s, float) else s for s in sparsities or RAMP]
    return [{(pool,): half_even(s[pool], sizes[pool]) for pool in sizes} for s in by_pool]


def of_what_remains(rate: float, size: int) -> list[Gone]:
    gone, rows = 0, []
    for _ in range(CALLS):
        gone += half_even(rate, size - gone)
        rows.append({tuple(ENTRIES): gone})
    return rows


def erk_by_hand(sparsity: float) -> dict[str, float]:
    """Return the ERK sparsities. No leaf is asked for more than it has, so one equation gives all."""
    eps = (1 - sparsity) * (32 + 24) / ((4 + 8) + (8 + 3))
    return {"a/kernel": 1 - eps * (4 + 8) / 32, "b/kernel": 1 - eps * (8 + 3) / 24}


def below_a_deviation(params: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> Gone:
    """Count what the masks before have removed, and what lies below half a standard deviation."""
    masked = {path: np.where(masks[path], params[path].astype(np.float64), 0) for path in ENTRIES}
    return {(path,): int((np.abs(w) < 0.5 * w.std()).sum()) for path, w in masked.items()}


@cache
def analysed(treedef: Any) -> dict[str, float]:
    """Return the targets of an analysis by which a leaf may lose a tenth of all magnitude."""
    params, levels = treedef.unflatten(jax.tree.leaves(problem(0).params)), (0.25, 0.5, 0.75)
    found = jp.sensitivity(size_of, params, levels=levels)
    return jp.distributions.from_sensitivity(found, tolerance=0.1 * float(size_of(params)))


@cache
def calibrated(treedef: Any) -> Any:
    """Return statistics of what the kernels of the flat network read, for a tree of some structure."""
    given = problem(0)
    params = treedef.unflatten(jax.tree.leaves(given.params))
    with jax.enable_x64(False):
        batch = jnp.asarray(given.batch[0], jnp.float32)
        where = jp.matching(*(path_of(params, role) for role in ENTRIES))
        return jp.calibrate(apply_fn, params, [batch], statistics="gram", where=where)


@cache
def weighed(treedef: Any) -> dict[str, float]:
    """Return targets from outliers."""
    params = treedef.unflatten(jax.tree.leaves(problem(0).params))
    return jp.distributions.owl(params, calibrated(treedef), 0.6, multiple=2.0, spread=0.1)


def weighed_by_hand() -> dict[str, float]:
    """Return the targets from the inputs of each layer, in numpy."""
    params, x = problem(0).params, np.asarray(problem(0).batch[0], np.float64)
    a = {name: np.asarray(leaf, np.float64) for name, leaf in params["a"].items()}
    hidden_inputs = np.tanh(x @ a["kernel"] + a["bias"]) * a.get("scale", 1.0)
    ratios = {}
    for role, inputs in (("a/kernel", x), ("b/kernel", hidden_inputs)):
        w = np.asarray(params[role[0]]["kernel"], np.float64)
        scores = np.abs(w) * np.linalg.norm(inputs, axis=0)[:, None]
        ratios[role] = (scores > 2 * scores.mean()).mean()
    first, second = ratios.values()
    scaled = {role: float(ratio == max(first, second)) for role, ratio in ratios.items()}
    mean = sum(scaled[role] * ENTRIES[role] for role in ENTRIES) / sum(ENTRIES.values())
    return {role: 0.6 - 0.2 * (scaled[role] - mean) for role in ENTRIES}


def size_of(params: Any) -> jax.Array:
    leaves = by_role(params)
    return jnp.sum(jnp.abs(leaves["a/kernel"])) + jnp.sum(jnp.abs(leaves["b/kernel"]))


def analysed_by_hand() -> dict[str, float]:
    """Return for each leaf the highest level at which its smallest entries add up to no more than that."""
    sizes = {f"{n}/kernel": np.sort(np.abs(problem(0).params[n]["kernel"]).ravel()) for n in "ab"}
    allowed = 0.1 * sum(leaf.sum() for leaf in sizes.values())

    def fits(leaf, level):
        return leaf[: half_even(level, leaf.size)].sum() <= allowed

    return {p: max(s for s in (0.0, 0.25, 0.5, 0.75) if fits(leaf, s)) for p, leaf in sizes.items()}


# --- which units are gone, for structures that the oracle does not know


def hidden_units(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return which hidden units of the flat network are removed: columns of a kernel, rows of the next."""
    rows, columns = masks["a/kernel"], masks["b/kernel"].T
    both = np.concatenate([rows, columns])
    assert (both.any(0) == both.all(0)).all()
    return {"hidden": ~both.any(0)}


def coupled_channels(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return which channels of the deep network are removed: an output, its bias, scale and reader."""
    gone = {}
    for layer, reader in zip("abc", "bcd", strict=True):
        own = [masks[path] for path in (f"{layer}/bias", f"{layer}/scale") if path in masks]
        one = np.stack([masks[f"{layer}/kernel"].any(0), masks[f"{reader}/kernel"].any(1), *own])
        assert (one.any(0) == one.all(0)).all()
        gone[f"{layer}/kernel[1]"] = ~one.any(0)
    return gone


CHANNELS = {"a/kernel[1]": 8, "b/kernel[1]": 8, "c/kernel[1]": 4}


@cache
def groups(treedef: Any) -> Any:
    """Return the coupled channels of the deep network, for a tree of some structure."""
    params = treedef.unflatten(jax.tree.leaves(problem(0, DEEP).params))
    return jp.channel_groups(apply_fn, params, jnp.ones((2, 4)))


@cache
def channels(treedef: Any, **options: Any) -> jp.Structure:
    return jp.structures.channels(groups(treedef), **options)


def whole_layers(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return which layers of the deep network are removed, each with all of its leaves or none."""
    gone = []
    for layer in "abcd":
        left = np.concatenate([mask.ravel() for path, mask in masks.items() if path.startswith(f"{layer}/")])
        assert left.any() == left.all()
        gone.append(not left.any())
    return {"layers": np.array(gone)}


@cache
def layers(treedef: Any) -> jp.Structure:
    """Return the layers of the deep network as blocks, for a tree of some structure."""
    params = treedef.unflatten(jax.tree.leaves(problem(0, DEEP).params))
    return jp.structures.layers([path_of(params, f"{name}/bias").rpartition("/")[0] for name in "abcd"])


@cache
def hidden(treedef: Any) -> jp.Structure:
    """Return a structure of the flat network's hidden units: columns of one kernel and rows of the next."""
    params = treedef.unflatten(jax.tree.leaves(problem(0).params))
    first, second = (path_of(params, role) for role in ENTRIES)

    def pool(scores: dict[str, jax.Array], masks: dict[str, jax.Array]) -> jp.Units:
        rows, columns = scores[first], scores[second]
        total = jnp.sum(jnp.where(masks[first], rows, 0), 0)
        total += jnp.sum(jnp.where(masks[second], columns, 0), 1)
        alive = jnp.any(masks[first], 0)
        return jp.Units(
            {"hidden": total},
            {"hidden": alive},
            lambda keep: {
                first: jnp.broadcast_to(keep["hidden"], rows.shape),
                second: jnp.broadcast_to(keep["hidden"][:, None], columns.shape),
            },
        )

    return jp.Structure(pool, name="hidden", spans_leaves=True)
