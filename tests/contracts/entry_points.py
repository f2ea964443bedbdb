"""Every public function, called with arguments that are right; the tests replace these by wrong ones.

An argument gets the value that `GOOD` has for its name, else its default. So a new function needs nothing
here as long as its arguments have names that other functions use. A test names the arguments without a value.
"""

import inspect
import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from tests.contracts import public

PARAMS = {
    "a": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.ones((4, 4))},
}
MASKS = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), PARAMS)
PRUNER = jp.pruner(jp.scores.magnitude, 0.5)
STATE = PRUNER.init(PARAMS)
TX = jp.wrap_optax(optax.sgd(0.1), PRUNER)
KEPT = jp.keep_masked(optax.sgd(0.1), MASKS)
X = jnp.ones((2, 3))
HALF = jp.prune_once(PARAMS, jp.scores.magnitude, sparsity=0.5)
RIGL = jp.rigl(HALF, every=2, end_step=8)
FILE, TENSORS, OTHER = (os.path.join(tempfile.mkdtemp(), name) for name in ("file", "tensors", "other"))
jp.io.save(FILE, PARAMS)
jp.io.save_safetensors(TENSORS, PARAMS)
SMALL_FILE = os.path.join(os.path.dirname(FILE), "small")


def network(params, x):
    """Return the outputs of two layers."""
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


SMALL = jp.compact(network, PARAMS, MASKS, X)
jp.io.save_compacted(SMALL_FILE, SMALL)
LAYERS = {"layers": [{"kernel": jnp.ones((4, 4))}, {"kernel": 2 * jnp.ones((4, 4))}]}


def residual(params, x):
    """Return the outputs of two residual blocks."""
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["kernel"])
    return x


BLOCKS = jp.residual_blocks(residual, LAYERS, jnp.ones((2, 4)), prefixes=["layers/0", "layers/1"])


def loss(params, batch):
    """Return the loss of the network's outputs."""
    return jnp.mean(network(params, batch) ** 2)


def layers(path, leaf):
    """Return how many axes of a leaf count layers."""
    return int(path == "a/kernel")


def total(params):
    """Return a number that depends on the params."""
    return jnp.sum(params["a"]["kernel"])


GOOD: dict[str, Any] = {
    "activations": {"a/kernel": jnp.ones((5, 4))},
    "apply_fn": network,
    "arguments": (PARAMS, X),
    "array": X,
    "batch": X,
    "batches": [X, X],
    "end_step": 8,
    "every": 2,
    "features": X,
    "function": network,
    "gates": jp.l0.init_gates(PARAMS, jax.random.key(0)),
    "grads": PARAMS,
    "inputs": (X,),
    "key": jax.random.key(0),
    "labels": jnp.array([0, 1]),
    "levels": 1,
    "like": PARAMS,
    "logits": X,
    "loss_fn": loss,
    "masks": HALF,
    "max_bytes": 10**6,
    "optimizer": optax.sgd(0.1),
    "others": HALF,
    "params": PARAMS,
    "path": OTHER,
    "predicate": jp.matching("*bias"),
    "predicates": (jp.kernels, jp.matching("a/*")),
    "pruner": PRUNER,
    "rounds": 2,
    "scores": jp.scores.magnitude,
    "small": SMALL,
    "sparsity": 0.5,
    "stacked": layers,
    "stats": jp.calibrate(network, PARAMS, [X], statistics="gram"),
    "teacher": lambda x: x,
    "teacher_features": X,
    "teacher_logits": X,
    "train": lambda params, masks: params,
    "tree": HALF,
    "where": jp.kernels,
    "x": X,
}
"""By the name of an argument, a value that is right in any function that has it."""

OTHERS: dict[str, dict[str, Any]] = {
    "budget": {"measure": jp.metrics.nonzeros, "at_most": 26, "masks": None},
    "check_pruned": {"masks": MASKS},
    "compact": {"masks": MASKS},
    "distillation.attention": dict.fromkeys(("features", "teacher_features"), X[..., None]),
    "distributions.from_errors": {"errors": {"a/kernel": {0.6: 1.0}}},
    "distributions.owl": {"where": jp.matching("a/kernel")},
    "distributions.from_sensitivity": {"result": jp.sensitivity(total, PARAMS, levels=(0.5,))},
    "distributions.sigma": {"quality": 0.5},
    "export.stablehlo": {"batch": "b"},
    "error_barrier": {"error": total, "one": PARAMS, "other": PARAMS, "points": 3},
    "intersect": {"masks": (MASKS, HALF)},
    "io.load": {"path": FILE},
    "io.load_compacted": {"path": SMALL_FILE, "like": None},
    "io.load_safetensors": {"path": TENSORS},
    "l0.apply_gates": {"z": GOOD["gates"]},
    "lora.init": {"rank": 1},
    "lora.merge": {"adapters": jp.lora.init(PARAMS, 1, key=jax.random.key(0)), "scale": 2.0},
    "matching": {"patterns": ("*",)},
    "metrics.good_widths": {"most": 2, "rows": 3, "inputs": 4, "rounds": 1},
    "metrics.latency": {"calls": {"network": (network, PARAMS, X)}},
    "metrics.table": {"asked": 0.5},
    "optimal_brain_surgeon": {"count": 2, "masks": None, "damping": 1000.0},
    "prune_layers": {"solver": jp.solvers.sparsegpt()},
    "quantization.dequantize": {"quantized": jp.quantization.quantize(X)},
    "recipes.parse": {"source": {"prune": {"score": "magnitude", "sparsity": 0.5}}, "scores": None},
    "recover": {"tx": optax.sgd(0.1), "teacher": PARAMS, "steps": 2, "loss": None, "progress": None},
    "reestimate_statistics": {
        "update_fn": lambda state, x: {"mean": state["mean"] / 2 + x.mean(0) / 2},
        "state": {"mean": jnp.ones(3)},
    },
    "residual_blocks": {
        "apply_fn": residual,
        "params": LAYERS,
        "inputs": (jnp.ones((2, 4)),),
        "prefixes": ["layers/0", "layers/1"],
        "stacked": None,
    },
    "rewind": {"saved": PARAMS},
    "rewiring": {"grow": jp.scores.magnitude},
    "schedules.geometric": {"rate": 0.5},
    "schedules.one_shot": {"step": 3},
    "scores.apoz": {"stacked": None},
    "scores.block_influence": {"apply_fn": residual, "blocks": BLOCKS},
    "scores.bn_scale": {"scales": {"a/kernel": "a/bias"}},
    "scores.mean_activation": {"stacked": None},
    "scores.obs": {"damping": 1000.0},
    "scores.over_batches": {"score": jp.scores.taylor},
    "selection.lowest": {"scores": [X, X], "alive": [None, None], "count": 3},
    "selection.removed_count": {"size": 10},
    "sensitivity": {"evaluate": total, "levels": (0.5,), "masks": None},
    "solvers.mask_only": {"score": jp.scores.magnitude},
    "solvers.with_swaps": {"solver": jp.solvers.alps(2)},
    "sparsify": {"choose": "rule", "rounds": 1},
    "structures.blocks": {"shape": (2, 2)},
    "structures.channels": {"groups": jp.channel_groups(network, PARAMS, X)},
    "structures.layers": {"blocks": ["layers/0", "layers/1"], "norm": 2, "stacked": None},
    "structures.nm": {"n": 2, "m": 4},
    "unpack_masks": {"packed": jp.pack_masks(HALF)},
}
"""By function, what is right for it alone."""

LEFT_OUT = {
    "compact_module": "of a flax module; `compact` does the work",
    "export.load": "of files, see hostile/files.py",
    "export.onnx": "like export.stablehlo, and it takes long",
    "graph.register_rule": "changes the rules of the process",
    "kernels": "a predicate, called with each leaf",
    "leaf_paths": "takes anything",
    **dict.fromkeys(
        ("plots.curves", "plots.layers", "plots.mask_colours", "plots.panels", "plots.sensitivity"),
        "draws; matplotlib says what it cannot draw",
    ),
    "recipes.load": "of files, see hostile/recipes.py",
}
"""By function, why it has no entry."""

DATA = {"arguments", "data", "inputs", "path"}
"""Arguments that stay right: the user's data, and where files are."""

UNCHECKED = {
    "budget": ("grads", "key"),
    "lottery_scan": ("measure",),
    "lottery_ticket": ("after",),
    "metrics.latency": ("donate",),
    "quantization.dequantize": ("dtype",),
    "reestimate_statistics": ("state",),
    "selection.lowest": ("specs",),
    "sensitivity": ("grads", "key"),
    "structures.blocks": ("axes",),
}
"""By function, arguments that stay right because the error for a wrong one is Python's, numpy's or JAX's."""


class Entry(NamedTuple):
    """A function, with the arguments that are right and may be replaced by wrong ones."""

    call: Callable[..., Any]
    good: dict[str, Any]


USES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("all_of", "any_of", "not_"),
        lambda where: jp.prune_once(PARAMS, jp.scores.magnitude, 0.5, where=where),
    ),
    "lottery_ticket": list,
    "scores.block_influence": lambda score: score(LAYERS, batch=jnp.ones((2, 4))),
    "structures.channels": lambda structure: jp.prune_once(
        PARAMS, jp.scores.magnitude, 0.5, structure=structure
    ),
    "structures.layers": lambda structure: jp.prune_once(
        LAYERS, jp.scores.magnitude, 0.5, structure=structure
    ),
}
"""By function, what is done with its result, where arguments are read only then."""


def use(name: str, result: Any) -> Any:
    """Return what comes of a result; scores that a function of `jp.scores` makes are computed."""
    if name in USES:
        return USES[name](result)
    if name.startswith("scores.") and callable(result):
        given = {"batches": X[None]} if name == "scores.over_batches" else {"batch": X}
        return result(PARAMS, **given)
    return result


def unknown(name: str, function: Callable[..., Any]) -> list[str]:
    """Return the arguments that a function needs and no value is known for."""
    known = GOOD | OTHERS.get(name, {})
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if parameter.name not in known
    ]


def entry(name: str, function: Callable[..., Any]) -> Entry:
    """Return the entry of a public function, made from its signature."""
    signature, known, values, places = inspect.signature(function), GOOD | OTHERS.get(name, {}), {}, {}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD or isinstance(parameter.default, bool):
            continue
        values[parameter.name] = value = known.get(parameter.name, parameter.default)
        if parameter.name not in DATA and parameter.name not in UNCHECKED.get(name, ()):
            # Of several, the last is replaced.
            places[parameter.name] = value[-1] if parameter.kind is parameter.VAR_POSITIONAL else value

    def call(**given: Any) -> Any:
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL and parameter.name in given:
                given[parameter.name] = (*values[parameter.name][:-1], given[parameter.name])
        bound = inspect.BoundArguments(signature, {**values, **given})
        return use(name, function(*bound.args, **bound.kwargs))

    return Entry(call, places)


ARGUMENTS: dict[str, Entry] = {
    name: entry(name, function)
    for name, function in public.functions().items()
    if name not in LEFT_OUT and not unknown(name, function)
} | {
    "prune_once of a count": Entry(
        jp.prune_once, {"params": PARAMS, "scores": jp.scores.magnitude, "count": 3, "scope": "layerwise"}
    ),
    "prune_once of a threshold": Entry(
        jp.prune_once,
        {"params": PARAMS, "scores": PARAMS, "threshold": 3.0, "structure": jp.structures.nm(2, 4, axis=-1)},
    ),
    "a pruner's init": Entry(PRUNER.init, {"params": PARAMS}),
    "a pruner's update": Entry(PRUNER.update, {"state": STATE, "params": PARAMS, "grads": None, "key": None}),
    "wrap_optax's init": Entry(TX.init, {"params": PARAMS}),
    "wrap_optax's update": Entry(TX.update, {"updates": PARAMS, "state": TX.init(PARAMS), "params": PARAMS}),
    "keep_masked's update": Entry(
        KEPT.update, {"updates": PARAMS, "state": KEPT.init(PARAMS), "params": PARAMS}
    ),
    "rigl's init": Entry(RIGL.init, {"params": PARAMS}),
    "rigl's update": Entry(RIGL.update, {"state": RIGL.init(PARAMS), "params": PARAMS, "grads": PARAMS}),
    "Schedule": Entry(jp.Schedule, {"value": lambda step: 0.5, "begin_step": 0, "end_step": 9}),
}
"""By name the public functions, and what some of them return."""
