"""The public functions, each with arguments that are right.

Left out are arguments that a function of the user's is called with (its data, say), and switches: whatever
is true or false will do there.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp

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
GATES = jp.l0.init_gates(PARAMS, jax.random.key(0))
FILE, OTHER = (os.path.join(tempfile.mkdtemp(), name) for name in ("file", "other"))
jp.io.save(FILE, PARAMS)


def network(params, x):
    """Two layers."""
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


LAYERS = {"layers": [{"kernel": jnp.ones((4, 4))}, {"kernel": 2 * jnp.ones((4, 4))}]}


def residual(params, x):
    """Two blocks."""
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["kernel"])
    return x


def loss(params, batch):
    """Of the network's outputs."""
    return jnp.mean(network(params, batch) ** 2)


def layers(path, leaf):
    """Which axes count layers."""
    return int(path == "a/kernel")


def total(params):
    """What is measured of params."""
    return jnp.sum(params["a"]["kernel"])


GROUPS = jp.channel_groups(network, PARAMS, X)
CURVES = jp.sensitivity(total, PARAMS, levels=(0.5,))


class Entry(NamedTuple):
    """A function with arguments that are right."""

    call: Callable[..., Any]
    good: dict[str, Any]


ARGUMENTS = {
    "prune_once": Entry(
        jp.prune_once,
        {
            "params": PARAMS,
            "scores": jp.scores.magnitude,
            "sparsity": 0.5,
            "of": "total",
            "scope": "global",
            "structure": None,
            "where": jp.kernels,
            "masks": MASKS,
            "floor": 1,
            "grads": None,
            "key": None,
            "stacked": layers,
        },
    ),
    "prune_once of a count": Entry(
        jp.prune_once, {"params": PARAMS, "scores": jp.scores.magnitude, "count": 3, "scope": "layerwise"}
    ),
    "prune_once of a threshold": Entry(
        jp.prune_once,
        {"params": PARAMS, "scores": PARAMS, "threshold": 3.0, "structure": jp.structures.nm(2, 4, axis=-1)},
    ),
    "pruner": Entry(
        jp.pruner,
        {
            "scores": jp.scores.magnitude,
            "sparsity": 0.5,
            "structure": None,
            "scope": "global",
            "every": 1,
            "where": jp.kernels,
            "of": "total",
            "floor": 1,
            "memory": 0.0,
            "stop": None,
            "seed": 0,
            "stacked": layers,
        },
    ),
    "a pruner's init": Entry(PRUNER.init, {"params": PARAMS}),
    "a pruner's update": Entry(PRUNER.update, {"state": STATE, "params": PARAMS, "grads": None, "key": None}),
    "prune_rounds": Entry(jp.prune_rounds, {"params": PARAMS, "pruner": PRUNER, "rounds": 2}),
    "wrap_optax": Entry(jp.wrap_optax, {"optimizer": optax.sgd(0.1), "pruner": PRUNER, "packed": False}),
    "keep_masked": Entry(jp.keep_masked, {"optimizer": optax.sgd(0.1), "masks": MASKS}),
    "wrap_optax's init": Entry(TX.init, {"params": PARAMS}),
    "wrap_optax's update": Entry(TX.update, {"updates": PARAMS, "state": TX.init(PARAMS), "params": PARAMS}),
    "keep_masked's update": Entry(
        KEPT.update, {"updates": PARAMS, "state": KEPT.init(PARAMS), "params": PARAMS}
    ),
    "apply_masks": Entry(jp.apply_masks, {"params": PARAMS, "masks": MASKS}),
    "check_masks": Entry(jp.check_masks, {"masks": MASKS, "params": PARAMS}),
    "check_pruned": Entry(jp.check_pruned, {"params": PARAMS, "masks": MASKS}),
    "ones_masks": Entry(jp.ones_masks, {"params": PARAMS}),
    "lottery_ticket": Entry(
        lambda **given: list(jp.lottery_ticket(**given)),
        {
            "train": lambda params, masks: params,
            "params": PARAMS,
            "pruner": PRUNER,
            "levels": 1,
            "rewind": "weights",
        },
    ),
    "schedules.cubic": Entry(
        jp.schedules.cubic, {"sparsity": 0.5, "begin_step": 0, "end_step": 9, "initial_sparsity": 0.0}
    ),
    "schedules.geometric": Entry(jp.schedules.geometric, {"rate": 0.5, "stop": None}),
    "schedules.one_shot": Entry(jp.schedules.one_shot, {"sparsity": 0.5, "step": 3}),
    "structures.nm": Entry(jp.structures.nm, {"n": 2, "m": 4}),
    "structures.blocks": Entry(jp.structures.blocks, {"shape": (2, 2)}),
    "structures.slices": Entry(jp.structures.slices, {"axis": -1, "norm": 1}),
    "distributions.erk": Entry(
        jp.distributions.erk, {"params": PARAMS, "sparsity": 0.5, "where": jp.kernels, "stacked": layers}
    ),
    "distributions.uniform": Entry(
        jp.distributions.uniform, {"params": PARAMS, "sparsity": 0.5, "where": jp.kernels, "stacked": layers}
    ),
    "matching": Entry(lambda pattern: jp.matching(pattern), {"pattern": "*"}),
    "schedules.linear": Entry(
        jp.schedules.linear, {"sparsity": 0.5, "begin_step": 0, "end_step": 9, "initial_sparsity": 0.0}
    ),
    "Schedule": Entry(jp.Schedule, {"value": lambda step: 0.5, "begin_step": 0, "end_step": 9}),
    "distributions.sigma": Entry(
        jp.distributions.sigma, {"params": PARAMS, "quality": 0.5, "where": jp.kernels, "stacked": layers}
    ),
    "distributions.from_sensitivity": Entry(
        jp.distributions.from_sensitivity, {"result": CURVES, "tolerance": 0.01}
    ),
    "budget": Entry(
        jp.budget,
        {
            "measure": jp.metrics.nonzeros,
            "params": PARAMS,
            "at_most": 20,
            "scores": jp.scores.magnitude,
            "scope": "global",
            "structure": None,
            "where": jp.kernels,
            "masks": None,
            "floor": 1,
            "stacked": layers,
        },
    ),
    "sensitivity": Entry(
        jp.sensitivity,
        {
            "evaluate": total,
            "params": PARAMS,
            "levels": (0.5,),
            "scores": jp.scores.magnitude,
            "structure": None,
            "where": jp.kernels,
            "together": None,
            "masks": None,
            "floor": 1,
            "metric": None,
            "at_once": 1,
            "stacked": layers,
        },
    ),
    "rigl": Entry(
        jp.rigl,
        {
            "masks": HALF,
            "every": 2,
            "end_step": 8,
            "fraction": 0.3,
            "structure": None,
            "where": jp.kernels,
            "stacked": layers,
        },
    ),
    "set_": Entry(
        jp.set_,
        {
            "masks": HALF,
            "every": 2,
            "end_step": 8,
            "fraction": 0.3,
            "structure": None,
            "where": jp.kernels,
            "stacked": layers,
        },
    ),
    "rewiring": Entry(
        jp.rewiring,
        {
            "masks": HALF,
            "grow": jp.scores.magnitude,
            "drop": jp.scores.magnitude,
            "every": 2,
            "end_step": 8,
            "fraction": 0.3,
            "structure": None,
            "where": jp.kernels,
            "seed": 0,
            "stacked": layers,
        },
    ),
    "rigl's init": Entry(RIGL.init, {"params": PARAMS}),
    "rigl's update": Entry(RIGL.update, {"state": RIGL.init(PARAMS), "params": PARAMS, "grads": PARAMS}),
    "channel_groups": Entry(
        lambda apply_fn, params, split, state: jp.channel_groups(
            apply_fn, params, X, split=split, state=state
        ),
        {"apply_fn": network, "params": PARAMS, "split": "major", "state": None},
    ),
    "compact": Entry(
        lambda apply_fn, params, masks, state, multiple_of: jp.compact(
            apply_fn, params, masks, X, state=state, multiple_of=multiple_of
        ),
        {"apply_fn": network, "params": PARAMS, "masks": MASKS, "state": None, "multiple_of": 1},
    ),
    "structures.channels": Entry(
        lambda groups, **given: jp.prune_once(
            PARAMS, jp.scores.magnitude, 0.5, structure=jp.structures.channels(groups, **given)
        ),
        {
            "groups": GROUPS,
            "norm": 2,
            "reduce": jnp.mean,
            "normalize": None,
            "axis": None,
            "ignore": None,
            "min_width": 1,
            "multiple_of": 1,
        },
    ),
    "residual_blocks": Entry(
        lambda apply_fn, params, prefixes, stacked, state: jp.residual_blocks(
            apply_fn, params, jnp.ones((2, 4)), prefixes=prefixes, stacked=stacked, state=state
        ),
        {
            "apply_fn": residual,
            "params": LAYERS,
            "prefixes": ["layers/0", "layers/1"],
            "stacked": None,
            "state": None,
        },
    ),
    "structures.layers": Entry(
        lambda blocks, **given: jp.prune_once(
            LAYERS, jp.scores.magnitude, 0.5, structure=jp.structures.layers(blocks, **given)
        ),
        {"blocks": ["layers/0", "layers/1"], "norm": 2, "reduce": jnp.mean, "stacked": None},
    ),
    "distillation.soft_targets": Entry(
        jp.distillation.soft_targets, {"logits": X, "teacher_logits": X, "temperature": 4.0}
    ),
    "distillation.hard_and_soft": Entry(
        jp.distillation.hard_and_soft,
        {
            "logits": X,
            "teacher_logits": X,
            "labels": jnp.array([0, 1]),
            "temperature": 4.0,
            "alpha": 0.9,
        },
    ),
    "distillation.objective": Entry(
        jp.distillation.objective,
        {"apply_fn": network, "teacher": lambda x: x, "temperature": 4.0, "alpha": 0.9},
    ),
    "distillation.hints": Entry(
        jp.distillation.hints, {"features": X, "teacher_features": X, "regressor": None}
    ),
    "distillation.attention": Entry(
        jp.distillation.attention, {"features": X[..., None], "teacher_features": X[..., None]}
    ),
    "distillation.similarity": Entry(jp.distillation.similarity, {"features": X, "teacher_features": X}),
    "error_barrier": Entry(jp.error_barrier, {"error": total, "one": PARAMS, "other": PARAMS, "points": 3}),
    "lottery_scan": Entry(
        jp.lottery_scan,
        {
            "train": lambda params, masks: params,
            "params": PARAMS,
            "pruner": PRUNER,
            "levels": 1,
            "rewind": "weights",
            "tune": None,
            "where": jp.kernels,
        },
    ),
    "rewind": Entry(jp.rewind, {"saved": PARAMS, "masks": HALF}),
    "shuffled_masks": Entry(jp.shuffled_masks, {"key": jax.random.key(0), "masks": HALF, "within": None}),
    "straight_through": Entry(jp.straight_through, {"params": PARAMS, "masks": HALF, "decay": 0.0}),
    "sparsify": Entry(
        lambda apply_fn, params, masks, choose, rounds: jp.sparsify(
            apply_fn, params, masks, X, choose=choose, rounds=rounds
        ),
        {"apply_fn": network, "params": PARAMS, "masks": HALF, "choose": "rule", "rounds": 1},
    ),
    "intersect": Entry(lambda one, other: jp.intersect(one, other), {"one": MASKS, "other": HALF}),
    "pack_masks": Entry(jp.pack_masks, {"masks": HALF}),
    "unpack_masks": Entry(jp.unpack_masks, {"packed": jp.pack_masks(HALF)}),
    "io.save": Entry(
        lambda **given: jp.io.save(OTHER, **given), {"params": PARAMS, "masks": HALF, "metadata": None}
    ),
    "io.load": Entry(lambda **given: jp.io.load(FILE, **given), {"like": PARAMS, "max_bytes": 10**6}),
    "io.save_safetensors": Entry(
        lambda **given: jp.io.save_safetensors(OTHER, **given),
        {"params": PARAMS, "masks": HALF, "metadata": None},
    ),
    "l0.init_gates": Entry(
        jp.l0.init_gates,
        {"params": PARAMS, "key": jax.random.key(0), "where": jp.kernels, "axis": None, "drop_rate": 0.5},
    ),
    "l0.sample_gates": Entry(jp.l0.sample_gates, {"gates": GATES, "key": jax.random.key(0)}),
    "l0.expected_gates": Entry(jp.l0.expected_gates, {"gates": GATES}),
    "l0.expected_l0": Entry(jp.l0.expected_l0, {"params": PARAMS, "gates": GATES}),
    "l0.apply_gates": Entry(jp.l0.apply_gates, {"params": PARAMS, "z": GATES}),
    "l0.gate_masks": Entry(jp.l0.gate_masks, {"params": PARAMS, "gates": GATES}),
    "metrics.nonzeros": Entry(jp.metrics.nonzeros, {"tree": PARAMS}),
    "metrics.sparsity": Entry(jp.metrics.sparsity, {"tree": HALF, "where": jp.kernels}),
    "metrics.compression": Entry(jp.metrics.compression, {"tree": HALF, "where": jp.kernels}),
    "metrics.collapsed": Entry(jp.metrics.collapsed, {"tree": HALF, "where": jp.kernels}),
    "metrics.overlap": Entry(jp.metrics.overlap, {"masks": HALF, "others": HALF, "where": jp.kernels}),
    "metrics.table": Entry(
        jp.metrics.table, {"masks": HALF, "where": jp.kernels, "asked": 0.5, "stacked": layers}
    ),
    "metrics.macs": Entry(lambda function: jp.metrics.macs(function, PARAMS, X), {"function": network}),
    "metrics.summary": Entry(
        lambda apply_fn, params, **given: jp.metrics.summary(apply_fn, params, X, **given),
        {"apply_fn": network, "params": PARAMS, "masks": HALF, "where": jp.kernels, "compacted": True},
    ),
    "penalties.l1": Entry(jp.penalties.l1, {"params": PARAMS, "where": jp.kernels}),
    "penalties.group_lasso": Entry(
        jp.penalties.group_lasso, {"params": PARAMS, "axis": -1, "where": jp.kernels}
    ),
    "quantization.quantize": Entry(jp.quantization.quantize, {"array": X}),
    "quantization.dequantize": Entry(jp.quantization.dequantize, {"quantized": jp.quantization.quantize(X)}),
    "quantization.as_int8": Entry(jp.quantization.as_int8, {"params": PARAMS, "where": jp.kernels}),
    "recipes.parse": Entry(
        jp.recipes.parse, {"source": {"prune": {"score": "magnitude", "sparsity": 0.5}}, "scores": None}
    ),
    "export.stablehlo": Entry(
        lambda apply_fn, params, batch, platforms: jp.export.stablehlo(
            apply_fn, params, X, batch=batch, platforms=platforms
        ),
        {"apply_fn": network, "params": PARAMS, "batch": "b", "platforms": None},
    ),
    "selection.removed_count": Entry(jp.selection.removed_count, {"sparsity": 0.5, "size": 10}),
    "selection.lowest": Entry(jp.selection.lowest, {"scores": [X, X], "alive": [None, None], "count": 3}),
    "scores.apoz": Entry(
        jp.scores.apoz, {"params": PARAMS, "activations": {"a/kernel": jnp.ones((5, 4))}, "axis": -1}
    ),
    "scores.mean_activation": Entry(
        jp.scores.mean_activation,
        {"params": PARAMS, "activations": {"a/kernel": jnp.ones((5, 4))}, "axis": -1},
    ),
    "scores.fpgm": Entry(jp.scores.fpgm, {"params": PARAMS, "axis": -1}),
    "scores.bn_scale": Entry(
        lambda scales, axis: jp.scores.bn_scale(scales, axis=axis)(PARAMS),
        {"scales": {"a/kernel": "a/bias"}, "axis": -1},
    ),
    "scores.random": Entry(jp.scores.random, {"params": PARAMS, "key": jax.random.key(0)}),
    "scores.synflow": Entry(
        lambda apply_fn, x, where, biases: jp.scores.synflow(apply_fn, x, where=where, biases=biases)(PARAMS),
        {"apply_fn": network, "x": X, "where": jp.kernels, "biases": None},
    ),
    **{
        f"scores.{score.__name__}": Entry(score, {"params": PARAMS})
        for score in (jp.scores.magnitude, jp.scores.normalized_magnitude, jp.scores.lamp)
    },
    **{
        f"scores.{score.__name__}": Entry(score, {"params": PARAMS, "grads": PARAMS})
        for score in (
            jp.scores.gradient_magnitude,
            jp.scores.movement,
            jp.scores.snip,
            jp.scores.taylor,
            jp.scores.signed_taylor,
        )
    },
    **{
        f"scores.{score.__name__}": Entry(
            lambda loss_fn, where, chunk, score=score: score(loss_fn, where=where, chunk=chunk)(
                PARAMS, batch=X
            ),
            {"loss_fn": loss, "where": jp.kernels, "chunk": 32},
        )
        for score in (jp.scores.brute_force, jp.scores.fisher, jp.scores.obd)
    },
    "scores.obs": Entry(
        lambda loss_fn, where, damping: jp.scores.obs(loss_fn, where=where, damping=damping)(PARAMS, batch=X),
        {"loss_fn": loss, "where": jp.kernels, "damping": 1000.0},
    ),
    "scores.grasp": Entry(
        lambda loss_fn, where: jp.scores.grasp(loss_fn, where=where)(PARAMS, batch=X),
        {"loss_fn": loss, "where": jp.kernels},
    ),
    "optimal_brain_surgeon": Entry(
        lambda **given: jp.optimal_brain_surgeon(batch=X, **given),
        {
            "loss_fn": loss,
            "params": PARAMS,
            "count": 2,
            "where": jp.kernels,
            "masks": None,
            "damping": 1000.0,
        },
    ),
    "schedules.constant": Entry(jp.schedules.constant, {"sparsity": 0.5}),
    **{
        name: Entry(
            lambda one, other, combine=combine: jp.prune_once(
                PARAMS, jp.scores.magnitude, 0.5, where=combine(one, other)
            ),
            {"one": jp.kernels, "other": jp.matching("a/*")},
        )
        for name, combine in {"any_of": jp.any_of, "all_of": jp.all_of}.items()
    },
    "not_": Entry(
        lambda predicate: jp.prune_once(PARAMS, jp.scores.magnitude, 0.5, where=jp.not_(predicate)),
        {"predicate": jp.matching("*bias")},
    ),
    "metrics.density": Entry(jp.metrics.density, {"tree": HALF, "where": jp.kernels}),
    "metrics.cost": Entry(lambda function: jp.metrics.cost(function, PARAMS, X), {"function": network}),
    "metrics.latency": Entry(
        lambda function, rounds: jp.metrics.latency({"network": (function, PARAMS, X)}, rounds),
        {"function": network, "rounds": 2},
    ),
    "metrics.activation_sparsity": Entry(
        lambda function: jp.metrics.activation_sparsity(function, PARAMS, X), {"function": network}
    ),
}
