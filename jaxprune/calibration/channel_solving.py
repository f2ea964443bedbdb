"""Pruning coupled channels of a trained network: which to remove, and least squares of what reads the others.

A unit of coupled channels is slices of several leaves: outputs of the products that make the channel, inputs
of those that read it. The readers are the layers to solve: without a removed channel their output should stay
what it was. The masks of the units tell which layers these are. An input of a matrix belongs to a unit if
masking the unit masks the whole column of that input.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.layer_report import LayerRow
from jaxprune.calibration.lockstep import LockStep, Moments
from jaxprune.calibration.parts import Part
from jaxprune.calibration.saved_layers import SavedLayers
from jaxprune.calibration.solvers.columns import Consumer, choose_columns
from jaxprune.calibration.solving import Problem, refined_layer, relative_error, with_rows_everywhere
from jaxprune.calibration.statistics import not_finite
from jaxprune.pruning.once import kept_entries, pool
from jaxprune.pruning.targets import target_of
from jaxprune.structures.base import Structure, Units
from jaxprune.tree.leaves import Leaves
from jaxprune.tree.masks import masked, unpruned_masks
from jaxprune.tree.paths import some_of
from jaxprune.tree.where import selected_among
from jaxprune.typing import Where

STEPS = 20
"""Steps of conjugate gradients, where none are asked for: without them a removed channel is only cut off."""

_LayerKey = tuple[tuple[int, ...], tuple[int, ...]]
"""The stack of a part's first product, and the number of the layer."""


class Reader(NamedTuple):
    """A layer that reads channels.

    Attributes:
      part, index: the layer.
      labels: by pool, for each of its inputs the unit that it belongs to or -1, (batch, inputs).
    """

    part: Part
    index: tuple[int, ...]
    labels: Mapping[str, np.ndarray]


class ChannelPlan(NamedTuple):
    """What is to be removed.

    Attributes:
      units: the pools of coupled channels.
      masks: by path, masks that prune nothing.
      counts: by pool, how many units are removed.
      readers: the layers that read channels of these pools.
    """

    units: Units
    masks: dict[str, Any]
    counts: dict[str, int]
    readers: dict[_LayerKey, Reader]

    @property
    def parts(self) -> dict[str, list[Part]]:
        """By path, the parts that have a layer that reads channels."""
        found: dict[str, dict[int, Part]] = {}
        for reader in self.readers.values():
            found.setdefault(reader.part.site.path, {})[reader.part.number] = reader.part
        return {path: list(parts.values()) for path, parts in found.items()}

    @property
    def shared(self) -> list[str]:
        """The pools that several layers read."""
        return [name for name in self.counts if len(self.readers_of(name)) > 1]

    def entries(self, keep: Mapping[str, Any]) -> dict[str, Any]:
        """Return by path the masks that keep some units of some pools, and all units of the others."""
        every = {name: jnp.ones(alive.shape, bool) for name, alive in self.units.alive.items()}
        return kept_entries(self.units, every | dict(keep), self.masks)

    def readers_of(self, name: str) -> list[Reader]:
        """Return the layers that read the channels of a pool."""
        return [reader for reader in self.readers.values() if name in reader.labels]


def plan_channels(
    leaves: Leaves, parts: Mapping[str, Sequence[Part]], structure: Structure, sparsity: Any, where: Where
) -> ChannelPlan:
    """Return how many units of each pool are removed, and which layers read them.

    Raises:
      ValueError: a sparsity out of range, an unknown pool, or a pool whose channels no layer reads.
    """
    masks = unpruned_masks(leaves)
    zeros = {path: jnp.zeros(np.shape(leaf), jnp.float32) for path, leaf in leaves.by_path.items()}
    units = pool(zeros, masks, selected_among(leaves.by_path, where), structure, unpruned=True)
    target = target_of("sparsity", sparsity, units, structure, "layerwise", "total", 1)
    counts = {}
    for name, count in target.counts.items():
        counts[name] = min(int(count), units.alive[name].size - target.floors[name])
    plan = ChannelPlan(units, masks, {name: count for name, count in counts.items() if count > 0}, {})
    for name in plan.counts:
        _find_readers(plan, name, parts)
    if unread := [name for name in plan.counts if not plan.readers_of(name)]:
        raise ValueError(
            f"no product of a leaf reads the channels of {some_of(unread)} as whole columns, so there is no "
            "layer to solve: queries meet keys, say, which are data too. Leave these groups out: a sparsity "
            "per group, {name: fraction}, prunes the groups that it names, and groups.without(...) takes "
            "some away."
        )
    return plan


def _find_readers(plan: ChannelPlan, name: str, parts: Mapping[str, Sequence[Part]]) -> None:
    """Note the layers that read the channels of a pool.

    For each bit of the units' numbers, once the units that have the bit are removed and once the others. An
    input of a reader is masked in exactly one of the two cases, and that tells the bit of its unit. The
    matrix that makes the channels has no column that is masked, because some of its outputs stay.
    """
    shape, size = plan.units.alive[name].shape, plan.units.alive[name].size
    has_bit = [np.arange(size) >> bit & 1 == 1 for bit in range((size - 1).bit_length())]
    cases = [
        plan.entries({name: jnp.asarray(keep.reshape(shape))}) for bit in has_bit for keep in (~bit, bit)
    ]
    touched = [path for path in cases[0] if not all(bool(np.all(case[path])) for case in cases)]
    for path in touched:
        for part in parts.get(path, ()):
            for index in part.layers():
                gone = []
                for case in cases:
                    kept = part.matrix.kept(part.matrix.layer(case[path], index))
                    gone.append(~np.asarray(kept).any(axis=1))
                with_bit, without = gone[::2], gone[1::2]
                read = with_bit[0] | without[0]
                if not read.any():
                    continue
                labels = sum(column.astype(np.int64) << bit for bit, column in enumerate(with_bit))
                key = part.site.stack, index
                before = plan.readers[key].labels if key in plan.readers else {}
                plan.readers[key] = Reader(part, index, {**before, name: np.where(read, labels, -1)})


class ChannelSolver:
    """Chooses channels, and solves the layers that read them as the walk comes to them.

    Attributes:
      keep: by pool, which units stay, of the pools decided so far.
      rows: what was done, in order.
    """

    def __init__(
        self,
        lock: LockStep,
        plan: ChannelPlan,
        steps: int,
        saved: SavedLayers | None,
        progress: Callable[[LayerRow], Any] | None,
    ):
        self.lock, self.plan, self.steps = lock, plan, steps or STEPS
        self.saved, self.progress = saved, progress
        self.keep: dict[str, Any] = {}
        self.rows: list[LayerRow] = []

    @property
    def masks(self) -> dict[str, Any]:
        """By path, the masks of the units decided on."""
        return self.plan.masks | self.plan.entries(self.keep)

    def begin(self) -> None:
        """Decide on the pools that several layers read, with the statistics of the dense network.

        The costs of the layers add. The channels are masked before the walk, and their readers are solved for
        the output of the dense network, which has them. The pools that one layer reads are decided when the
        walk comes to it, while its inputs still have all channels.
        """
        shared = self.plan.shared
        parts = {id(r.part): r.part for name in shared for r in self.plan.readers_of(name)}
        if not shared:
            return
        found = self.lock.statistics(list(parts.values()))
        for name in shared:
            readers = self.plan.readers_of(name)
            self.decide(name, [(r, self.problem(r, found[r.part.site.stack, r.index])) for r in readers])

    def problem(self, reader: Reader, moments: Moments) -> Problem:
        """Return the problem of a layer, with its dense weights."""
        view, bias = reader.part.matrix, reader.part.bias
        dense = self.lock.dense_leaves
        layer = view.layer(dense[view.path], reader.index)
        vector = None if bias is None else bias.array(bias.layer(dense[bias.path], reader.index))
        return with_rows_everywhere(Problem(view.array(layer), vector, moments))

    def decide(self, name: str, problems: Sequence[tuple[Reader, Problem]]) -> None:
        """Choose the units of a pool that stay, and mask the others from here on."""
        grams, consumers = [], []
        for reader, problem in problems:
            gram = problem.moments.gram
            if problem.bias is not None:
                # The bias makes up for what a channel is on average.
                rows = jnp.maximum(problem.moments.rows, 1)[:, None, None]
                total = problem.moments.total
                gram = gram - total[:, :, None] * total[:, None, :] / rows
            for number, labels in enumerate(reader.labels[name]):
                consumers.append((problem.weight[number], labels))
                grams.append(gram[number])
        alive = self.plan.units.alive[name]

        def choose(weights: Any, grams: Any, count: Any) -> Any:
            layers = [Consumer(w, g, of[1]) for w, g, of in zip(weights, grams, consumers, strict=True)]
            return choose_columns(layers, alive.size, count)

        arguments = [each[0] for each in consumers], grams, np.int32(self.plan.counts[name])
        keep = self.lock.programs.compiled(choose, *arguments)(*arguments)
        self.keep[name] = keep.reshape(alive.shape)
        self.mask()

    def mask(self) -> None:
        """Mask the units decided on, in all leaves of the network as solved so far."""
        for path, mask in self.plan.entries(self.keep).items():
            if not bool(jnp.all(mask)):
                self.lock.change(path, masked(jnp.asarray(self.lock.leaves[path]), mask))

    def solve(self, part: Part, index: tuple[int, ...], moments: Callable[[], Moments]) -> None:
        """Solve a layer that reads channels, or load it, and replace its leaf and its bias."""
        reader = self.plan.readers.get((part.site.stack, index))
        if reader is None:
            return  # a layer of the stack whose channels all stay
        found = None if self.saved is None else self.saved.load(len(self.rows), part.name(index))
        if found is None:
            arrays, row = self.solved(reader, moments())
            if self.saved is not None:
                self.saved.save(len(self.rows), arrays, row)
        else:
            arrays, row = found
            self.keep |= {name: arrays[f"keep {name}"] for name in reader.labels}
        view, bias, lock = part.matrix, part.bias, self.lock
        lock.change_layer(view, index, arrays["layer"])
        if bias is not None:
            lock.change_layer(bias, index, arrays["bias"])
        self.mask()
        self.rows.append(row)
        if self.progress is not None:
            self.progress(row)

    def solved(self, reader: Reader, moments: Moments) -> tuple[dict[str, Any], LayerRow]:
        """Return a layer solved for its output from the channels that stay, and the row of the report."""
        began, (part, index, _) = time.perf_counter(), reader
        _check_finite(moments, part, index)
        problem = self.problem(reader, moments)
        for name in reader.labels:
            if name not in self.keep:
                self.decide(name, [(reader, problem)])
        view, bias, lock, form = part.matrix, part.bias, self.lock, part.site.form
        removed = np.zeros((form.batch, form.inputs), bool)
        for name, labels in reader.labels.items():
            keep = np.asarray(self.keep[name]).ravel()
            removed |= (labels >= 0) & ~keep[np.maximum(labels, 0)]
        mask = jnp.broadcast_to(jnp.asarray(~removed)[:, None, :], problem.weight.shape)
        old = view.layer(lock.dense_leaves[view.path], index)
        added = None if bias is None else bias.layer(lock.dense_leaves[bias.path], index)

        def solve(problem: Problem, mask: Any, old: Any, added: Any) -> Any:
            start = jnp.where(mask, problem.weight, 0)
            weight, moved = refined_layer(problem, start, mask, self.steps)
            layer = view.put(old, weight)
            vector = None if bias is None else bias.put(added, moved)
            rounded = view.array(layer), None if bias is None else bias.array(vector)
            errors = relative_error(problem, start, problem.bias), relative_error(problem, *rounded)
            return layer, vector, errors

        arguments = problem, mask, old, added
        layer, vector, (before, after) = lock.programs.compiled(solve, *arguments)(*arguments)
        arrays = {"layer": layer} | {f"keep {name}": self.keep[name] for name in reader.labels}
        row = LayerRow(
            part.name(index),
            part.number,
            form.batch,
            form.outputs,
            form.inputs,
            float(removed.mean()),
            float(before),
            float(after),
            float(jnp.sum(moments.rows)),
            0.0,
            time.perf_counter() - began,
            f"reads {', '.join(reader.labels)}",
        )
        return arrays if bias is None else arrays | {"bias": vector}, row


def _check_finite(moments: Moments, part: Part, index: tuple[int, ...]) -> None:
    if not all(bool(jnp.all(jnp.isfinite(array))) for array in jax.tree.leaves(moments)):
        raise not_finite(part.name(index), part.site.source)
