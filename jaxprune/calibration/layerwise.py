"""Pruning a trained network layer by layer: `prune_layers`."""

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.batches import Batch, batches_of, padded
from jaxprune.calibration.channel_solving import ChannelSolver, plan_channels
from jaxprune.calibration.layer_report import LayerRow, LayersReport
from jaxprune.calibration.lockstep import LockStep, Moments
from jaxprune.calibration.matrices import UnknownRowsError
from jaxprune.calibration.parts import Part, View
from jaxprune.calibration.patterns_of import count_of, pattern_of
from jaxprune.calibration.saved_layers import SavedLayers
from jaxprune.calibration.solvers.factors import check_damping
from jaxprune.calibration.solvers.pattern import Pattern, Solver
from jaxprune.calibration.solving import (
    Facts,
    Problem,
    WrongSolutionError,
    reader,
    solve,
    with_rows_everywhere,
    writer,
)
from jaxprune.calibration.statistics import checksum, chosen_parts, not_finite, unknown_rows
from jaxprune.calibration.survey import survey
from jaxprune.pruning.once import checked_structure, default_where
from jaxprune.schedules import check_sparsity
from jaxprune.structures.base import Structure
from jaxprune.tracing.jaxprs import split_static, trace
from jaxprune.tree.checks import as_integer, check_function, name_of, shown
from jaxprune.tree.leaves import flatten, is_concrete
from jaxprune.tree.masks import masked
from jaxprune.tree.paths import some_of
from jaxprune.tree.where import kernels
from jaxprune.typing import Masks, Params, PerPath, Where


class PrunedLayers(NamedTuple):
    """What `prune_layers` returns.

    Attributes:
      params: like the params given; exactly 0 where pruned, and other weights moved to make up for it. Leaves
        that were given as numpy arrays are numpy arrays on the host.
      masks: bool masks like the params.
      report: the `LayersReport`: what was done to each layer, and its error; print it.
    """

    params: Params
    masks: Masks
    report: LayersReport


def prune_layers(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    solver: Solver | None,
    sparsity: float | PerPath | None = None,
    *,
    structure: Structure | None = None,
    scope: Literal["layerwise", "output"] = "layerwise",
    where: Where | None = None,
    weights: Iterable[Any] | Callable[..., Any] | None = None,
    target: Literal["own", "dense"] = "own",
    refine: int = 0,
    damping: float = 0.01,
    checkpoint: Any = None,
    progress: Callable[[LayerRow], Any] | None = None,
) -> PrunedLayers:
    """Prune a trained network layer by layer, without training it: one forward pass over a few batches.

    The network runs on all batches at once, and stops before each product of a leaf with data. The solver is
    given the leaf as a matrix W (outputs x inputs) and the Gram matrix H of the rows that the product reads
    in the network as pruned so far. It chooses the entries to remove and new values for the others, so that

        ||Y - X V^T||    is small, over matrices V with the sparsity asked for,

    where X are those rows, and Y what the layer computes of them (`target="own"`) or what the dense network
    computes at this place (`target="dense"`). Then the network runs on with V. Each step of a scan over
    stacked layers is a separate layer, and each expert and each group of a convolution a separate matrix. A
    leaf that is used several times (a recurrent or a tied one) is solved once, at its first use, on the rows
    of all uses, for its own output.

    Args:
      apply_fn: a pure function `apply_fn(params, *batch)`.
      params: a pytree of arrays, trained. Those of numpy, which may be memory-mapped, stay on the host: a
        layer goes to the device when its turn comes.
      batches: a list of batches, as for `calibrate`. All have one shape, but for the size of the first axis:
        smaller ones are padded, and their padding does not count. All are held in memory.
      solver: one of `jaxprune.solvers`, or a function of your own,
        `solver(weight, gram, counts, pattern) -> (weight, mask)`.
      sparsity: the fraction of each layer that is removed, in [0, 1); or one per path, "layers/up" or
        "layers/up[2]", where nothing is removed from layers that are not named. Of the n units of each matrix
        `round_half_even(sparsity * n)` go, but one stays. Not needed for N:M.
      structure: single entries, the default; `structures.nm`, whose groups run along the axis that a product
        sums over; `structures.blocks`; or `structures.channels(groups)`. The solver is not asked about
        channels, and may be None: one after the other, the channel goes whose removal costs the layers that
        read it least once their other weights make up for it. Then these layers are refined, with their
        biases, and `compact` makes the network smaller.
      scope: "layerwise" takes the sparsity from each matrix as a whole; "output" from each of its outputs.
      where: which leaves; by default every leaf that is a kernel of a product with data, except the last
        before the output.
      weights: how much each row counts, as for `calibrate`.
      target: whether a layer is solved for its own output, or for that of the dense network, which runs
        beside it, so that later layers make up for what earlier ones lost.
      refine: how many steps of conjugate gradients refine weights and biases once the mask is chosen, as
        `reconstruct` does; 0 leaves them as the solver returned them (for channels it stands for 20).
      damping: a fraction of the mean diagonal of H, for what is factorised here (a dense target).
      checkpoint: a folder that solved layers are saved in. A run that was stopped goes on from there.
      progress: called with the `LayerRow` of each layer that is done; `print` will do.

    Returns:
      A `PrunedLayers`. Leaves in bfloat16 or float16 are solved for in float32 and rounded once; the report's
      errors are those after rounding. Layers with sparsity 0 are as they were, to the bit.

    Raises:
      ValueError: no batch, batches of different structure or shape, `where` matches no product, an unknown
        path, a structure that does not fit a layer (named), data that is NaN or infinite (layer named), a
        Gram matrix that has no factor with any damping, a checkpoint of another run.
      TypeError: arguments of another kind; params that are traced.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"a": jax.random.normal(keys[0], (8, 16)), "b": jax.random.normal(keys[1], (16, 2))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> x = jax.random.normal(keys[2], (64, 8))
      >>> done = jp.prune_layers(apply_fn, params, [x], jp.solvers.sparsegpt(), sparsity=0.5)
      >>> done.masks["a"].sum().item(), [row.name for row in done.report.rows]
      (64, ['a'])

    References:
      Frantar and Alistarh, "SparseGPT", ICML 2023; Meng et al., "ALPS", NeurIPS 2024. Their codes hook the
      modules of a transformer block, and run each block twice.
    """
    check_function(apply_fn, "prune_layers", "apply_fn(params, *batch)")
    structure = checked_structure(structure)
    of_channels = structure.spans_leaves
    if not of_channels:
        solvers = "solver(weight, gram, counts, pattern), such as jaxprune.solvers.alps()"
        check_function(solver, "prune_layers", solvers)
    steps = as_integer(refine, "refine", at_least=0, what="steps of conjugate gradients")
    for name, value, allowed in (
        ("scope", scope, ("layerwise", "output")),
        ("target", target, ("own", "dense")),
    ):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}.")
    damping = check_damping(damping, "prune_layers")
    if progress is not None:
        check_function(progress, "progress=", "of the row of a layer")
    leaves = flatten(params)
    if not is_concrete(params):
        raise TypeError(
            "prune_layers looks at the values of params, so they cannot be traced: call it outside jit."
        )
    listed = padded(list(batches_of(batches, weights, "prune_layers")), "prune_layers")
    closed, inputs = trace(apply_fn, (params, *listed[0].inputs))
    found = survey(closed, inputs)
    told = {
        "structure": structure.name,
        "scope": scope,
        "target": target,
        "refine": steps,
        "damping": damping,
    }
    settings = _Settings(solver, target == "dense", steps, damping)
    arrays = [split_static((params, *batch.inputs))[0] for batch in listed]
    weighed = None if listed[0].weights is None else [batch.weights for batch in listed]

    def lock_of(parts: Mapping[str, Sequence[Part]], with_dense: bool) -> LockStep:
        return LockStep(closed, list(inputs), arrays, weighed, leaves.by_path, parts, with_dense=with_dense)

    def saved_layers(plan: Any) -> SavedLayers | None:
        if checkpoint is None:
            return None
        return SavedLayers(checkpoint, told | {"plan": plan} | _identity(leaves.by_path, listed, solver))

    if of_channels:
        parts, reasons = chosen_parts(found, leaves.by_path, lambda path, leaf: True)
        channels = plan_channels(
            leaves, parts, structure, sparsity, default_where(where or kernels, structure, None)
        )
        lock = lock_of(channels.parts, settings.dense or bool(channels.shared))
        layers = ChannelSolver(lock, channels, steps, saved_layers(channels.counts), progress)
    else:
        parts, reasons = chosen_parts(found, leaves.by_path, where)
        plan = _plan(parts, sparsity, structure, scope)
        lock = lock_of(parts, settings.dense)
        layers = _Layers(
            lock, settings, plan, saved_layers([[*k, *each] for k, each in plan.items()]), progress
        )
    try:
        layers.begin()
        lock.run(layers.solve)
    except UnknownRowsError as error:
        raise unknown_rows(*error.args) from None
    left = {
        part.site.path: f"no batch reaches its product ({part.site.source})"
        for part in lock.unsolved.values()
    }
    done = {
        path: _finished(leaves.by_path[path], lock.leaves.pop(path), layers.masks.get(path))
        for path in leaves.by_path
    }
    masks = leaves.tree({path: mask for path, (_, mask) in done.items()})
    report = LayersReport(tuple(layers.rows), ({} if of_channels else reasons) | left | lock.refused)
    return PrunedLayers(leaves.tree({path: leaf for path, (leaf, _) in done.items()}), masks, report)


def _finished(given: Any, leaf: Any, mask: Any) -> tuple[Any, Any]:
    """Return a leaf with 0 where its mask, None if nothing pruned it, is False, and the mask.

    Both are on the host if the leaf was given there. A leaf on the device is a copy: a train step may donate
    it, and the caller still has the dense one.
    """
    if not isinstance(given, np.ndarray):
        mask = _unpruned_mask(given) if mask is None else mask
        return masked(leaf, mask), mask
    if mask is None:
        return leaf, np.broadcast_to(np.True_, given.shape)
    mask = np.asarray(mask)
    return np.where(mask, np.asarray(leaf), np.zeros((), leaf.dtype)), mask


class _Settings(NamedTuple):
    solver: Any
    dense: bool
    steps: int
    damping: float


_Key = tuple[str, int, tuple[int, ...]]
"""A layer: the path of its leaf, the number of the part, and that of the layer along each stack axis."""


def _plan(
    parts: Mapping[str, Sequence[Part]], sparsity: Any, structure: Structure, scope: str
) -> dict[_Key, tuple[Pattern, int]]:
    """Return for each layer its pattern, and how many units of it are removed."""
    if sparsity is None and structure.n_of_m is None:
        raise ValueError("prune_layers needs sparsity=, the fraction of each layer that is removed.")
    every = {part.name(i): (part, i) for each in parts.values() for part in each for i in part.layers()}
    if isinstance(sparsity, Mapping):
        if unknown := [path for path in sparsity if path not in every and path not in parts]:
            raise ValueError(
                f"sparsity names {some_of(unknown)}, which where= does not take in. The layers are "
                f"{some_of(every)}."
            )
        if not sparsity:
            raise ValueError("sparsity is an empty dict, so nothing would be pruned.")
    plan = {}
    for path, each in parts.items():
        for part in each:
            for index in part.layers():
                name = part.name(index)
                value: Any = sparsity
                if isinstance(sparsity, Mapping):
                    value = sparsity.get(name, sparsity.get(path, 0.0))
                    if np.ndim(value):
                        value = _of_layer(value, part, index)
                elif sparsity is None:
                    assert structure.n_of_m is not None
                    value = 1 - structure.n_of_m[0] / structure.n_of_m[1]
                value = check_sparsity(
                    value, f"sparsity[{name!r}]" if isinstance(sparsity, Mapping) else "sparsity"
                )
                pattern = pattern_of(structure, scope == "output", part, name)
                plan[path, part.number, index] = pattern, count_of(value, pattern, part, structure, name)
    return plan


def _of_layer(values: Any, part: Part, index: tuple[int, ...]) -> float:
    """Return the value of one layer, of an array that has one for each layer of a stacked leaf."""
    shape, path = part.site.stack_shape, part.site.path
    if np.shape(values) != shape:
        raise ValueError(
            f"sparsity[{path!r}] has shape {np.shape(values)}, and the leaf holds layers of shape {shape}: "
            "pass one sparsity for each layer, or a number for all of them."
        )
    return float(np.asarray(values)[index])


def _unpruned_mask(leaf: Any) -> Any:
    """Return a mask that prunes nothing, on the host for a leaf there."""
    mask = np.ones(np.shape(leaf), bool)
    return mask if isinstance(leaf, np.ndarray) else jax.device_put(mask)


class _Layers:
    """Solves layers as the walk comes to them.

    Attributes:
      masks: by path, of the leaves that have a solved layer.
      rows: what was done, in order.
    """

    def __init__(
        self,
        lock: LockStep,
        settings: _Settings,
        plan: Mapping[_Key, tuple[Pattern, int]],
        saved: SavedLayers | None,
        progress: Callable[[LayerRow], Any] | None,
    ):
        self.lock, self.settings, self.plan, self.saved, self.progress = lock, settings, plan, saved, progress
        self.masks: dict[str, Any] = {}
        self.rows: list[LayerRow] = []
        self.solvers: dict[Any, Any] = {}

    def begin(self) -> None:
        """Do what comes before the walk: nothing."""

    def solve(self, part: Part, index: tuple[int, ...], moments: Callable[[], Moments]) -> None:
        """Solve a layer, or load it, and replace its leaf and its mask."""
        name = part.name(index)
        found = None if self.saved is None else self.saved.load(len(self.rows), name)
        if found is None:
            arrays, row = self.solved(part, index, moments())
            if self.saved is not None:
                self.saved.save(len(self.rows), arrays, row)
        else:
            arrays, row = found
        matrix, bias = part.matrix, part.bias
        lock = self.lock
        lock.change_layer(matrix, index, arrays["layer"])
        self.mask(matrix, index, arrays["mask"])
        if bias is not None and "bias" in arrays:
            lock.change_layer(bias, index, arrays["bias"])
        self.rows.append(row)
        if self.progress is not None:
            self.progress(row)

    def mask(self, view: View, index: tuple[int, ...], mask: Any) -> None:
        """Take a layer's mask into that of its leaf, which another part of the leaf may have pruned."""
        path = view.path
        before = self.masks.get(path)
        if before is None and not index:
            self.masks[path] = np.asarray(mask) if isinstance(self.lock.leaves[path], np.ndarray) else mask
            return
        if before is None:
            before = _unpruned_mask(self.lock.leaves[path])
        self.masks[path] = view.with_layer(before, index, view.layer(before, index) & mask, in_place=True)

    def solved(self, part: Part, index: tuple[int, ...], moments: Moments) -> tuple[dict[str, Any], LayerRow]:
        """Return a layer, its mask and its bias, and the row of the report."""
        began, name, lock = time.perf_counter(), part.name(index), self.lock
        pattern, count = self.plan[part.site.path, part.number, index]
        view, form = part.matrix, part.site.form
        bias = part.bias if self.settings.steps and count else None
        layer = view.layer(lock.leaves[view.path], index)
        added = None if bias is None else bias.layer(lock.leaves[bias.path], index)
        weight, vector = lock.programs.compiled(reader(view, bias), layer, added)(layer, added)
        problem = Problem(weight, vector, moments)
        if not np.all(jax.device_get(moments.rows) > 0):
            problem = lock.programs.compiled(with_rows_everywhere, problem)(problem)
        counts = np.full(form.batch, count, np.int32)
        try:
            solver = self.solver_of(pattern, problem, counts)
        except WrongSolutionError as error:
            raise ValueError(f"{self.solver_name} on {name} ({part.site.source}) {error}") from None
        arguments = layer, added, moments, counts, problem, solver(problem, counts)
        arrays, facts = lock.programs.compiled(writer(view, bias, pattern), *arguments)(*arguments)
        facts = jax.device_get(facts)
        self.check(facts, name, part.site.source)
        row = LayerRow(
            name,
            part.number,
            form.batch,
            form.outputs,
            form.inputs,
            int(facts.removed.sum(dtype=np.int64)) / (form.batch * form.outputs * form.inputs),
            float(facts.masked_error),
            float(facts.error),
            float(facts.rows.sum(dtype=np.float64)),
            float(facts.damping.max()),
            time.perf_counter() - began,
            self.note(facts, moments),
        )
        return arrays, row

    @property
    def solver_name(self) -> str:
        """The name of the solver, for messages."""
        return f"the solver {name_of(self.settings.solver)}"

    def check(self, facts: Facts, name: str, source: str) -> None:
        """Check what is known of a layer once it is solved."""
        if not facts.finite:
            raise not_finite(name, source)
        if not facts.solved:
            raise ValueError(
                f"{self.solver_name} returned weights that are not finite for {name} ({source}). Raise its "
                "damping=, or pass more batches."
            )
        if not facts.exact:
            raise ValueError(
                f"{self.solver_name} returned a mask for {name} ({source}) that does not remove what was "
                f"asked for: it removes {facts.removed.tolist()} entries. It must remove whole units of the "
                "pattern, exactly counts[b] of matrix b, or of each output if pattern.per_output."
            )

    def solver_of(self, pattern: Pattern, problem: Problem, counts: Any) -> Callable[[Problem, Any], Any]:
        """Return the compiled solver of a pattern for problems like this one."""
        shapes = jax.tree.structure(problem), tuple(leaf.shape for leaf in jax.tree.leaves(problem))
        # To trace a solver takes longer than to run a small one, so it is looked up by shapes within a run.
        if (pattern, shapes) not in self.solvers:
            solver, _, steps, damping = self.settings

            def run(problem: Problem, counts: Any) -> Any:
                return solve(problem, counts, solver, pattern, steps, damping)

            run.__name__ = "solve_layer"
            self.solvers[pattern, shapes] = self.lock.programs.compiled(run, problem, counts)
        return self.solvers[pattern, shapes]

    def note(self, facts: Facts, moments: Moments) -> str:
        """Return what was unusual about a layer."""
        notes = []
        if empty := np.flatnonzero(facts.rows == 0).tolist():
            some = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
            notes.append(f"matrix {some} saw no row (an expert without tokens), so it is pruned by magnitude")
        if (used := float(facts.damping.max())) > self.settings.damping * (1 + 1e-6):
            notes.append(
                f"its Gram matrix had no factor with damping {self.settings.damping:g}, so {used:g} was taken"
            )
        if self.settings.dense and moments.cross is None:
            notes.append("it is used several times, so it was solved for its own output")
        return "; ".join(notes)


def _identity(leaves: Mapping[str, Any], batches: Sequence[Batch], solver: Solver | None) -> dict[str, Any]:
    """Return checksums of what a run depends on."""
    example = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((1, 4, 8), jnp.float32), ((1, 8, 8), jnp.float32), ((1,), jnp.int32))
    ]
    text = "" if solver is None else str(jax.make_jaxpr(lambda w, h, c: solver(w, h, c, Pattern()))(*example))
    inputs = [
        leaf
        for batch in batches
        for leaf in jax.tree.leaves((batch.inputs, batch.weights))
        if hasattr(leaf, "dtype")
    ]
    return {
        "params": checksum(leaves.values()),
        "batches": checksum(inputs),
        "solver": zlib.crc32(text.encode()),
    }
