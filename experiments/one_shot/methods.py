"""How the study prunes a trained network: each method gives new variables and masks, and trains nothing.

The methods of `METHODS` remove single entries, or all but n of each m. Others here remove channels, share a
sparsity out to the layers, and round what is left.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune.typing import Where

_REFINE = 20  # conjugate gradient steps of least squares


class Pruned(NamedTuple):
    """A network after pruning.

    Attributes:
      variables: new ones, for the same function.
      masks: True where an entry is kept.
    """

    variables: Any
    masks: Any


class Recovery(NamedTuple):
    """How survivors are tuned for the dense network's predictions.

    Attributes:
      batches: one for each step, over and over.
      steps: the most.
      where: which leaves are tuned.
      rate: the learning rate of Adam at the first step, from which it falls to 0 on a cosine.
      seed: of the order of the batches.
    """

    batches: Sequence[tuple[Any, ...]]
    steps: int
    where: Where
    rate: float = 1e-3
    seed: int = 0


class Channels(NamedTuple):
    """Channels of which half are removed.

    Attributes:
      groups: what the names of their groups end in.
      readers: what the paths of the kernels end in that read them.
    """

    groups: tuple[str, ...]
    readers: tuple[str, ...]


class Calibrated:
    """A trained network with a calibration set: what every method starts from."""

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        dense: Any,
        batches: Sequence[tuple[Any, ...]],
        recovery: Recovery,
        weights: Sequence[Any] | None = None,
    ):
        """Keep the network, its variables, its calibration set and how its survivors are tuned.

        Args:
          apply_fn: `apply_fn(variables, *batch)`.
          dense: the trained variables.
          batches, weights: as `jaxprune.calibrate` takes them.
          recovery: what tunes it.
        """
        self.apply_fn, self.dense, self.batches, self.weights = apply_fn, dense, batches, weights
        self.recovery = recovery

    @cached_property
    def norms(self) -> Any:
        """The norms of the inputs of each product."""
        return jp.calibrate(self.apply_fn, self.dense, self.batches, weights=self.weights)

    @cached_property
    def gram(self) -> Any:
        """The Gram matrices of the inputs of each product."""
        return jp.calibrate(self.apply_fn, self.dense, self.batches, weights=self.weights, statistics="gram")

    @cached_property
    def errors(self) -> dict[str, dict[float, float]]:
        """The squared relative error of each layer's output at several sparsities, by path."""
        found: dict[str, dict[float, float]] = {}
        for level in _LEVELS:
            for row in self.solved(jp.solvers.sparsegpt(), level, refine=_REFINE).report.rows:
                found.setdefault(row.name, {})[level] = row.error**2
        return found

    def by_score(self, score: Any, sparsity: Any, scope: str, structure: Any = None) -> Pruned:
        """Remove what a score ranks lowest; what stays is left as it is."""
        stats = self.gram if score is jp.scores.obs_diagonal else self.norms
        masks = jp.prune_once(
            self.dense, score, sparsity=sparsity, scope=scope, stats=stats, **self.options(structure)
        )
        return Pruned(jp.apply_masks(self.dense, masks), masks)

    def least_squares(self, masks: Any, steps: int = _REFINE) -> Pruned:
        """Return the kept weights, and biases, that keep each layer's output nearest to the dense one's.

        With no steps only the biases change.
        """
        return Pruned(jp.reconstruct(self.dense, masks, self.gram, steps=steps), masks)

    def by_layers(self, solver: Any, sparsity: Any, structure: Any = None, **options: Any) -> Pruned:
        """Prune layer by layer, each on the network as pruned so far."""
        done = self.solved(solver, sparsity, structure, **options)
        return Pruned(done.params, done.masks)

    def solved(self, solver: Any, sparsity: Any, structure: Any = None, **options: Any) -> Any:
        """Return what `jaxprune.prune_layers` returns, with its report."""
        given: dict[str, Any] = {"weights": self.weights} | options | self.options(structure)
        return jp.prune_layers(self.apply_fn, self.dense, self.batches, solver, sparsity=sparsity, **given)

    def options(self, structure: Any) -> dict[str, Any]:
        """Return the structure, and which leaves it is for: with N:M those with whole groups of inputs.

        A first convolution of grey images has one input channel: there is nothing to choose from.
        """
        if structure is None:
            return {}
        if structure.name.startswith("channels"):
            return {"structure": structure}
        stats = self.norms

        def grouped(path: str, leaf: Any) -> bool:
            return stats.where(path, leaf) and leaf.shape[stats.group_axis(path)] % 4 == 0

        return {"structure": structure, "where": grouped}


class Method(NamedTuple):
    """A method for entries and N:M.

    Attributes:
      prune: from a calibrated network, a sparsity and a structure (None for entries).
      more: whether it has the network's larger calibration set.
    """

    prune: Callable[[Calibrated, Any, Any], Pruned]
    more: bool = False


def _scored(score: Any, scope: str = "output") -> Method:
    return Method(lambda network, sparsity, structure: network.by_score(score, sparsity, scope, structure))


def _solved(make: Callable[[], Any], **options: Any) -> Method:
    return Method(
        lambda network, sparsity, structure: network.by_layers(make(), sparsity, structure, **options)
    )


def _wanda_then_least_squares(network: Calibrated, sparsity: Any, structure: Any) -> Pruned:
    return network.least_squares(network.by_score(jp.scores.wanda, sparsity, "output", structure).masks)


def _alps_recovered(network: Calibrated, sparsity: Any, structure: Any) -> Pruned:
    return recover(network, _ALPS_DENSE.prune(network, sparsity, structure))


def recover(network: Calibrated, pruned: Pruned) -> Pruned:
    """Tune the survivors for the dense network's predictions, without labels."""
    given = network.recovery
    found = jp.recover(
        network.apply_fn,
        pruned.variables,
        pruned.masks,
        given.batches,
        optax.adam(optax.cosine_decay_schedule(given.rate, given.steps)),
        teacher=network.dense,
        steps=given.steps,
        loss=jp.distillation.soft_targets,
        where=given.where,
        seed=given.seed,
    )
    return Pruned(found.params, pruned.masks)


_ALPS_DENSE = _solved(jp.solvers.alps, target="dense", refine=_REFINE)
METHODS = {
    "magnitude": _scored(jp.scores.magnitude, "layerwise"),
    "wanda": _scored(jp.scores.wanda),
    "ria": _scored(jp.scores.ria, "layerwise"),
    "obs-diagonal": _scored(jp.scores.obs_diagonal),
    "wanda+ls": Method(_wanda_then_least_squares),
    "sparsegpt-128": _solved(lambda: jp.solvers.sparsegpt(block=128)),
    "sparsegpt-32": _solved(lambda: jp.solvers.sparsegpt(block=32), scope="output"),
    "alps": _solved(jp.solvers.alps, refine=_REFINE),
    "alps-dense": _ALPS_DENSE,
    "alps-swaps": _solved(lambda: jp.solvers.with_swaps(jp.solvers.alps()), target="dense", refine=_REFINE),
    "recover": Method(_alps_recovered),
    "recover-more": Method(_alps_recovered, more=True),
}
"""Single entries and N:M, by name."""


# --- channels

CHANNEL_METHODS = ("magnitude", "flap", "wanda+ls", "obs")


def halved(network: Calibrated, channels: Channels, method: str) -> tuple[Pruned, dict[str, Any]]:
    """Remove half of the units of some groups of channels, and compact the network.

    Args:
      network: what is pruned.
      channels: which.
      method: "magnitude", of all weights that go; "flap", with the means of what goes in the biases;
        "wanda+ls", by the layers that read the channels, then least squares of these; "obs", one channel
        after the other, by what its removal costs once the others make up for it.

    Returns:
      The masked network, and figures of the compacted one.
    """
    some = network.batches[0]
    example = [array[:1] for array in some]
    groups = jp.channel_groups(network.apply_fn, network.dense, *example, split="major")
    asked = [group for group in groups.removable() if group.name.endswith(channels.groups)]

    def pruned_by(score: Any, norm: Any, where: Any) -> Pruned:
        structure = jp.structures.channels(asked, norm=norm)
        options = {"scope": "layerwise", "structure": structure, "stats": network.norms}
        masks = jp.prune_once(network.dense, score, sparsity=0.5, **options, **where)
        return Pruned(jp.apply_masks(network.dense, masks), masks)

    readers = {"where": lambda path, leaf: path.endswith(channels.readers)}
    if method == "magnitude":
        pruned = pruned_by(jp.scores.magnitude, 2, {})
    elif method == "flap":
        pruned = network.least_squares(pruned_by(jp.scores.flap, 1, readers).masks, steps=0)
    elif method == "wanda+ls":
        pruned = network.least_squares(pruned_by(jp.scores.wanda, 2, readers).masks)
    else:
        pruned = network.by_layers(None, 0.5, jp.structures.channels(asked), refine=_REFINE)
    small = jp.compact(network.apply_fn, pruned.variables, pruned.masks, *example)
    difference = network.apply_fn(pruned.variables, *some) - small.apply(small.params, *some)
    leaves = zip(jp.leaf_paths(small.params), jax.tree.leaves(small.params), strict=True)
    figures = {
        "params": sum(leaf.size for path, leaf in leaves if network.recovery.where(path, leaf)),
        "macs": jp.metrics.macs(small.apply, small.params, *example).total,
        "compaction_error": float(jnp.abs(difference).max()),
    }
    return pruned, figures


# --- a sparsity shared out to the layers

BUDGETED = ("wanda", "sparsegpt-32", "alps-dense")
BUDGETS = ("uniform", "owl", "measured")
_LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # at which errors of layers are measured


def budgeted(network: Calibrated, method: str, way: str, sparsity: float) -> Pruned:
    """Prune by a method to one sparsity of all entries together, shared out in one of `BUDGETS`.

    "measured" gives the layers the sparsities of least sum of errors; an error is that of a layer's output
    after SparseGPT and least squares at one of several sparsities, relative to the output, squared.
    """
    targets: Any = sparsity
    if way == "owl":
        targets = jp.distributions.owl(network.dense, network.norms, sparsity)
    elif way == "measured":
        targets = jp.distributions.from_errors(network.errors, network.dense, sparsity)
    return METHODS[method].prune(network, targets, None)


# --- BatchNorm, the calibration set, bits

RE_ESTIMATED = ("magnitude", "wanda", "wanda+ls")
COMPARED = ("wanda", "sparsegpt-128", "alps-dense")
ROUNDED = ("rounded", "gptq")


def re_estimated(train_mode: Callable[[Any, Any], Any], network: Calibrated, pruned: Pruned) -> Pruned:
    """Return the network with BatchNorm's running statistics estimated again, on the calibration set.

    Args:
      train_mode: from variables and a batch to the running statistics after it, in training mode.
      network, pruned: what was pruned, and the result.
    """
    variables = pruned.variables

    def update(state: Any, x: jax.Array) -> Any:
        return {"batch_stats": train_mode(variables | state, x)}

    state = {"batch_stats": variables["batch_stats"]}
    return Pruned(variables | jp.reestimate_statistics(update, state, network.batches), pruned.masks)


def rounded(network: Calibrated, method: str, sparsity: float, bits: int) -> Pruned:
    """Prune by SparseGPT and round to few bits: afterwards ("rounded"), or in the same sweep ("gptq")."""
    if method == "gptq":
        return network.by_layers(jp.solvers.sparsegpt(bits=bits), sparsity)
    pruned = Pruned(network.dense, jp.ones_masks(network.dense))
    if sparsity:
        pruned = network.by_layers(jp.solvers.sparsegpt(), sparsity)
    return Pruned(to_nearest(pruned.variables, network.norms, bits), pruned.masks)


def to_nearest(variables: Any, stats: Any, bits: int) -> Any:
    """Round each calibrated leaf to the nearest values of a uniform grid for each output; 0 stays 0."""
    leaves, treedef = jax.tree.flatten(variables)

    def nearest(path: str, leaf: jax.Array) -> jax.Array:
        if not stats.where(path, leaf):
            return leaf
        summed = stats.contracted_axes(path)
        order = (*summed, *(axis for axis in range(leaf.ndim) if axis not in summed))
        moved = leaf.transpose(order)
        matrix = moved.reshape(math.prod(leaf.shape[axis] for axis in summed), -1)
        grid = jp.quantization.uniform(matrix, bits)
        return jp.quantization.dequantize(grid).reshape(moved.shape).transpose(np.argsort(order))

    paths = jp.leaf_paths(variables)
    return treedef.unflatten([nearest(*pair) for pair in zip(paths, leaves, strict=True)])
