"""`recover`: the survivors of a pruned network, tuned for the outputs of the dense one."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.dtypes import canonicalize_dtype

from jaxprune.calibration.batches import Batch, batches_of
from jaxprune.calibration.blocks import Block, Key, Network, find_blocks
from jaxprune.calibration.programs import Programs
from jaxprune.calibration.tuning import Evaluation, Plan, tune
from jaxprune.tracing.jaxprs import split_static
from jaxprune.training.optimizer import keep_masked
from jaxprune.tree.calls import check_call
from jaxprune.tree.checks import as_integer, check_function, is_number, shown
from jaxprune.tree.leaves import Leaves, flatten, is_array, is_concrete
from jaxprune.tree.masks import masked, masks_by_path
from jaxprune.tree.mirrors import mirrored
from jaxprune.tree.paths import leaf_paths, some_of
from jaxprune.tree.tables import text_lines
from jaxprune.typing import Masks, Params, Where

_CALL = "recover(apply_fn, params, masks, batches, teacher=dense_params)"
Loss = Callable[[Any, Any], Any]


class RecoveryReport(NamedTuple):
    """What `recover` did; printing it gives a table.

    Attributes:
      before: the loss on the held-out batches of the network given, masked.
      after: the same of the network returned; never above `before`.
      steps: how many steps were taken, of all blocks together.
      evaluations: every `Evaluation`, in order: block, step, loss and held-out loss.
    """

    before: float
    after: float
    steps: int
    evaluations: tuple[Evaluation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists and numbers."""
        return self._asdict() | {"evaluations": [one._asdict() for one in self.evaluations]}

    def __str__(self) -> str:
        rows = []
        for block in dict.fromkeys(one.block for one in self.evaluations):
            own = [one for one in self.evaluations if one.block == block]
            best = min(own, key=lambda one: (np.isnan(one.held_out), one.held_out))
            figures = f"{own[0].held_out:.6g}", f"{best.held_out:.6g}"
            rows.append((block, str(own[-1].step), str(best.step), *figures))
        heading = ("block", "steps", "best at", "before", "after")
        lines = text_lines("{:<24.24}{:>8}{:>9}{:>13}{:>13}", heading, *rows)
        ending = f"held-out loss of the network: {self.before:.6g} -> {self.after:.6g}"
        return "\n".join([*lines, ending])


class Recovered(NamedTuple):
    """The result of `recover`.

    Attributes:
      params: a tree like the params given, of the same dtypes; pruned entries are exactly 0.
      report: a `RecoveryReport`.
    """

    params: Params
    report: RecoveryReport


def recover(
    apply_fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    batches: Iterable[Any],
    tx: optax.GradientTransformation | None = None,
    *,
    teacher: Params,
    steps: int = 600,
    held_out: float | Iterable[Any] = 0.125,
    loss: Loss | None = None,
    weights: Iterable[Any] | Callable[..., Any] | None = None,
    where: Where | None = None,
    by_block: bool = False,
    every: int | None = None,
    patience: int = 5,
    seed: int = 0,
    progress: Callable[[Evaluation], Any] | None = None,
) -> Recovered:
    """Tune what a pruned network has kept, under fixed masks, for the outputs of the dense network.

    No labels are needed: the batches may be those that the network was calibrated with. The optimizer runs
    inside `keep_masked`, and minimises

        mean over batches of loss(apply_fn(p, *batch), apply_fn(teacher, *batch))

    over the entries of p that the masks keep. One step takes one batch; each pass over the batches has a new
    order. The loss on held-out batches decides: the params with the lowest are returned, and the tuning stops
    when it has not fallen `patience` evaluations in a row. So the network returned is never worse there than
    the one given.

    With `by_block=True` the network is tuned block by block, in order, and only one block is differentiated
    at a time: gradients, optimizer state and intermediate arrays are those of one block. A block is the part
    between two places where a single array is alive, the residual stream say, that has a product of params
    with data; each step of a scan over stacked layers is one. It reads what the network tuned so far computes
    before it, and its target is what the dense network has after it. Between blocks the loss is the mean
    squared error; `loss` is that of the last, which ends with the outputs. A leaf that several blocks read is
    tuned in the first. The arrays between two blocks are kept on the host, for all batches. Leaves that are
    numpy arrays, mapped from files say, stay there too: each is on the device only with its block, and comes
    back as a numpy array. Equal blocks share their compiled programs.

    Args:
      apply_fn: a pure function `apply_fn(params, *batch)`, in evaluation mode.
      params: the pruned params, a pytree of arrays; entries that the masks prune are set to 0.
      masks: bool masks like the params, packed or not.
      batches: a list of batches. A batch is an array, or a tuple that is unpacked, or another tree of arrays,
        such as a dict, which is one input.
      tx: any optax optimizer; by default Adam, whose learning rate falls from 1e-3 to 0 over `steps` on a
        cosine. Each block starts with a new state.
      teacher: the dense params, a tree like `params`.
      steps: the most steps, of each block with `by_block`.
      held_out: the fraction of the batches, the last of the list, that is not tuned on; or a list of other
        batches.
      loss: `loss(outputs, teacher_outputs)`, a scalar or an array whose mean is taken. By default the mean
        squared error, over all floating-point outputs alike. For logits
        `jaxprune.distillation.soft_targets` is the divergence of the predictions.
      weights: as for `calibrate`, so that padding does not count: for each batch an array, or a function of
        the batch, `weights(*batch)`. Its shape is that of the first axes of the outputs, (batch, length) say;
        where only the first axis is, an example counts as much as the largest of its weights. The loss then
        returns an array with these axes. If `held_out` is a list, `weights` is a function.
      where: which leaves are tuned; by default all that are floating-point and that the outputs depend on.
        Leave out those that are no params, such as the running statistics of BatchNorm.
      by_block: tune block by block.
      every: how many steps lie between two evaluations; by default a twentieth of `steps`.
      patience: after how many evaluations without a lower loss to stop.
      seed: of the order of the batches.
      progress: called with each `Evaluation`; `print` prints a line.

    Returns:
      A `Recovered`: `params` and `report`. Leaves narrower than float32 are tuned in float32 and rounded in
      every step for the network to see, so what was evaluated is what is returned.

    Raises:
      ValueError: no batch, or a single one and no others held out; batches of different structures, with
        `by_block` of different shapes; masks or teacher unlike the params; no leaf to tune; a loss that is
        not finite at the start; with `by_block` a network in which nowhere a single array is alive.
      TypeError: arguments of other kinds, or traced params.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxprune as jp
      >>> apply_fn = lambda params, x: x @ params["kernel"]
      >>> dense = {"kernel": jnp.array([[1.0, 0.5], [1.0, -2.0]])}
      >>> masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.25)
      >>> x = jax.random.normal(jax.random.key(0), (8, 16, 1)) * jnp.array([1.0, 1.0])  # equal inputs
      >>> done = jp.recover(apply_fn, dense, masks, list(x), optax.adam(0.01), teacher=dense)
      >>> print(done.params["kernel"].round(2))  # the second takes over the work of the first
      [[ 1.   0. ]
       [ 1.  -1.5]]

    References:
      Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, 2015. Block by
      block: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
      ICLR 2021.
    """
    leaves, by_path, dense = _checked_trees(params, masks, teacher)
    listed, others = _split(batches, held_out, weights)
    inputs = listed[0].inputs
    check_call(_CALL, apply_fn, (params, *inputs), {})
    steps = as_integer(steps, "steps", at_least=1)
    every = max(1, steps // 20) if every is None else as_integer(every, "every", at_least=1)
    plan = Plan(
        steps,
        min(every, steps),
        as_integer(patience, "patience", at_least=1),
        as_integer(seed, "seed", at_least=0),
    )
    _check_callables(loss, progress)
    if tx is None:
        tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    network = Network(apply_fn, params, inputs)
    tuned = _tuned_paths(leaves, network, where)
    work = _Work(apply_fn, leaves, by_path, dense, tuned, tx, loss, plan, progress)
    work.check_outputs(listed[0])
    if by_block:
        _check_shapes([*listed, *others])
        return work.by_block(network, listed, others)
    return work.whole(listed, others)


class _Work:
    """One call of `recover`, its arguments checked.

    Attributes:
      leaves: the params given, not masked yet.
      masks, dense: masks and dense params by path.
      tuned: the paths of the leaves that are tuned.
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        leaves: Leaves,
        masks: Mapping[str, Any],
        dense: Mapping[str, Any],
        tuned: Sequence[str],
        tx: optax.GradientTransformation,
        loss: Loss | None,
        plan: Plan,
        progress: Callable[[Evaluation], Any] | None,
    ):
        self.apply_fn, self.leaves, self.masks, self.dense, self.tuned = apply_fn, leaves, masks, dense, tuned
        self.tx, self.loss, self.plan, self.progress = tx, loss, plan, progress
        self.evaluations: list[Evaluation] = []

    def note(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)
        if self.progress is not None:
            self.progress(evaluation)

    def check_outputs(self, batch: Batch) -> None:
        """Check that there is a loss of the outputs."""
        outputs = jax.eval_shape(self.apply_fn, self.leaves.tree(self.leaves.by_path), *batch.inputs)
        self.out_tree = jax.tree.structure(outputs)
        if self.loss is None and not any(map(_is_floating, jax.tree.leaves(outputs))):
            raise TypeError(
                f"recover: apply_fn returns {shown(outputs)}, nothing floating-point to compare with the "
                "dense network's. Let it return logits, not predictions, or pass a loss."
            )
        if self.loss is not None:
            value = jax.eval_shape(self.loss, outputs, outputs)
            if not hasattr(value, "dtype") or not _is_floating(value):
                raise TypeError(f"loss= must return a number or an array of them, got {shown(value)}.")
        jax.eval_shape(self.mean_loss, outputs, outputs, batch.weights)

    def mean_loss(self, outputs: Any, target: Any, weights: Any) -> jax.Array:
        if self.loss is None:
            return _squared_error(outputs, target, weights)
        return _weighted_mean(self.loss(outputs, lax.stop_gradient(target)), weights, "what loss= returns")

    def start(self, values: Mapping[Key, Any]) -> tuple[Any, Any]:
        """Return trees like the params of what is tuned, in float32 at least, and of its masks.

        The other leaves are None, so that an optimizer that goes by paths finds those that it knows.
        """
        arrays: dict[str, Any] = dict.fromkeys(self.leaves.by_path)
        masks: dict[str, Any] = dict.fromkeys(self.leaves.by_path)
        for (path, layer), value in values.items():
            arrays[path] = value.astype(jnp.promote_types(value.dtype, jnp.float32))
            masks[path] = jnp.asarray(_layer(self.masks[path], layer))
        return self.leaves.tree(arrays), self.leaves.tree(masks)

    def rounded(self, tree: Any) -> dict[str, Any]:
        """Return what is tuned by path, in the dtypes of the params."""
        dtypes = {path: canonicalize_dtype(self.leaves.by_path[path].dtype) for path in self.tuned}
        paths, arrays = leaf_paths(tree), jax.tree.leaves(tree)
        return {path: array.astype(dtypes[path]) for path, array in zip(paths, arrays, strict=True)}

    def whole(self, batches: Sequence[Batch], held_out: Sequence[Batch]) -> Recovered:
        def objective(tuned: Any, fixed: Any, batch: Any) -> jax.Array:
            (params, dense), (inputs, weights) = fixed, batch
            outputs = self.apply_fn(self.leaves.tree(params | self.rounded(tuned)), *inputs)
            return self.mean_loss(outputs, self.apply_fn(self.leaves.tree(dense), *inputs), weights)

        dense = {path: jnp.asarray(leaf) for path, leaf in self.dense.items()}
        own = _Survivors(self.leaves.by_path, self.masks)
        params = {path: own.read((path, None)) for path in self.leaves.by_path}
        tuned, masks = self.start({(path, None): params.pop(path) for path in self.tuned})
        data, others = ([(batch.inputs, batch.weights) for batch in some] for some in (batches, held_out))
        tx, fixed = keep_masked(self.tx, masks), (params, dense)
        best = tune("network", objective, tx, tuned, fixed, data, others, self.plan, self.note, Programs())
        for path, array in self.rounded(best).items():
            own.write((path, None), array)
        return self.result(params | {path: own.read((path, None)) for path in self.tuned}, self.evaluations)

    def result(self, by_path: Mapping[str, Any], of_network: Sequence[Evaluation]) -> Recovered:
        losses = [one.held_out for one in of_network]
        last = {one.block: one.step for one in self.evaluations}
        report = RecoveryReport(
            losses[0], float(np.nanmin(losses)), sum(last.values()), tuple(self.evaluations)
        )
        return Recovered(self.leaves.tree(by_path), report)

    def by_block(self, network: Network, batches: Sequence[Batch], held_out: Sequence[Batch]) -> Recovered:
        """Tune block by block.

        Held at once are, of one block: its params and those of the teacher, masks, gradients, optimizer state
        and intermediate arrays of one batch. Of all batches: the arrays before it and the teacher's after it.
        """
        own, programs = _Survivors(self.leaves.by_path, self.masks), Programs()

        def read_dense(key: Key) -> Any:
            return jnp.asarray(_layer(self.dense[key[0]], key[1]))

        others = [path for path in self.dense if path not in self.tuned]
        shared = [path for path in others if _equal(own.read((path, None)), read_dense((path, None)))]
        blocks = find_blocks(network, self.tuned, shared)
        every = [*batches, *held_out]
        inputs = [split_static(batch.inputs)[0] for batch in every]
        # Of each batch what the network tuned so far and the dense network compute before the block.
        ours: list[Any] = [[] for _ in held_out]
        theirs: list[Any] = [[] for _ in held_out]
        for block in blocks:
            _advance(block, own.read, ours, inputs[len(batches) :], programs)
            _advance(block, read_dense, theirs, inputs[len(batches) :], programs)
        before = Evaluation("network", 0, float("nan"), self.loss_of(ours, theirs, held_out))
        self.note(before)

        ours, theirs = [[] for _ in every], [[] for _ in every]
        tuned: set[Key] = set()
        for block in blocks:
            last = block is blocks[-1]
            _advance(block, read_dense, theirs, inputs, programs)
            if keys := [key for key in block.reads if not _already(key, tuned)]:
                data = zip(ours, theirs, inputs, [batch.weights for batch in every], strict=True)
                best = self.tune_block(block, keys, own, list(data), len(batches), programs, last)
                for key in keys:
                    own.write(key, best[key[0]])
                tuned.update(keys)
            if last:  # only the loss follows
                ours, theirs, inputs = (some[len(batches) :] for some in (ours, theirs, inputs))
            _advance(block, own.read, ours, inputs, programs)
        end = before._replace(held_out=self.loss_of(ours, theirs, held_out))
        self.note(end)
        if not end.held_out < before.held_out:
            own = _Survivors(self.leaves.by_path, self.masks)
        return self.result({path: own.take(path) for path in self.leaves.by_path}, [before, end])

    def tune_block(
        self,
        block: Block,
        keys: Sequence[Key],
        own: "_Survivors",
        data: Sequence[Any],
        count: int,
        programs: Programs,
        last: bool,
    ) -> dict[str, Any]:
        """Tune what a block reads on the first `count` of some batches; return it by path."""

        def objective(tuned: Any, fixed: Any, batch: Any) -> jax.Array:
            of_tuned, (others, leaves), (state, target, inputs, weights) = self.rounded(tuned), fixed, batch
            rest = iter(others)
            values = [of_tuned[key[0]] if key in keys else next(rest) for key in block.reads]
            outputs = block.run(values, leaves, state, inputs)
            if not last:
                return _squared_error(outputs, target, weights, block.name)
            return self.mean_loss(self.out_tree.unflatten(outputs), self.out_tree.unflatten(target), weights)

        tree, masks = self.start({key: own.read(key) for key in keys})
        others = [own.read(key) for key in block.reads if key not in keys]
        fixed = others, {path: own.read((path, None)) for path in block.fixed}
        tx, parts = keep_masked(self.tx, masks), (data[:count], data[count:])
        best = tune(block.name, objective, tx, tree, fixed, *parts, self.plan, self.note, programs)
        return self.rounded(best)

    def loss_of(self, ours: Sequence[Any], theirs: Sequence[Any], batches: Sequence[Batch]) -> float:
        """Return the mean loss of batches, given the outputs of the network and of the dense network."""

        @jax.jit
        def of_batch(ours: Any, theirs: Any, weights: Any) -> jax.Array:
            return self.mean_loss(self.out_tree.unflatten(ours), self.out_tree.unflatten(theirs), weights)

        rows = zip(ours, theirs, batches, strict=True)
        return float(np.mean([float(of_batch(a, b, batch.weights)) for a, b, batch in rows]))


class _Survivors:
    """The params of the pruned network, as tuned so far.

    A leaf, or a layer of it, is masked when it is read. So the leaves of other blocks, which may be mapped
    from files, take no memory. What was tuned is where the leaf given is: numpy arrays stay on the host.
    """

    def __init__(self, given: Mapping[str, Any], masks: Mapping[str, Any]):
        self._given, self._masks = given, masks
        self._tuned: dict[Key, Any] = {}

    def read(self, key: Key) -> jax.Array:
        """Return a leaf or a layer of it on the device, pruned entries 0."""
        path, layer = key
        if key in self._tuned:
            return jnp.asarray(self._tuned[key])
        if (path, None) in self._tuned:
            return jnp.asarray(self._tuned[path, None][layer])
        if layer is None and self._layers(path):
            return jnp.stack([self.read(key) for key in self._layers(path)])
        return jnp.asarray(masked(_layer(self._given[path], layer), _layer(self._masks[path], layer)))

    def write(self, key: Key, array: jax.Array) -> None:
        """Replace a leaf or a layer of it by what was tuned."""
        array = masked(array, _layer(self._masks[key[0]], key[1]))
        self._tuned[key] = self._placed(key[0], array)

    def take(self, path: str) -> Any:
        """Return a leaf where the leaf given is, and forget its layers."""
        leaf = self._placed(path, self.read((path, None)))
        for key in self._layers(path):
            self._tuned.pop(key, None)
        return leaf

    def _layers(self, path: str) -> list[Key]:
        """Return the keys of all layers of a leaf if one was tuned, else none."""
        if not any(of == path and layer is not None for of, layer in self._tuned):
            return []
        return [(path, layer) for layer in range(len(self._given[path]))]

    def _placed(self, path: str, array: Any) -> Any:
        given = self._given[path]
        if isinstance(given, np.ndarray):
            return np.asarray(array)
        if isinstance(given, jax.Array) and array.shape == given.shape and array.sharding != given.sharding:
            return jax.device_put(array, given.sharding)
        return array


def _advance(
    block: Block, read: Callable[[Key], Any], states: list[Any], inputs: Sequence[Any], programs: Programs
) -> None:
    """Replace the arrays before a block, of each batch, by those after it, in the memory of the host."""
    values = [read(key) for key in block.reads]
    fixed = {path: read((path, None)) for path in block.fixed}
    forward = programs.compiled(block.run, values, fixed, states[0], inputs[0])
    for number, given in enumerate(inputs):
        states[number] = _on_host(forward(values, fixed, states[number], given))


def _squared_error(outputs: Any, target: Any, weights: Any, of: str = "the outputs") -> jax.Array:
    """The mean of squared differences, of all floating-point arrays alike."""
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(target), strict=True)
    gaps = [
        a.astype(jnp.promote_types(a.dtype, jnp.float32)) - lax.stop_gradient(b).astype(jnp.float32)
        for a, b in pairs
        if _is_floating(a)
    ]
    means = [_weighted_mean(jnp.square(gap), weights if gap.ndim else None, of) for gap in gaps]
    return jnp.mean(jnp.stack(means))


def _weighted_mean(values: Any, weights: Any, what: str) -> jax.Array:
    """Return the mean of values, which the weights count along the first axes; padding may hold NaN."""
    if weights is None:
        return jnp.mean(values)
    if values.shape[: weights.ndim] != weights.shape:
        if values.shape[:1] != weights.shape[:1]:
            raise ValueError(
                f"recover: weights= has the shape {weights.shape}, and {what} {values.shape}: the first "
                "axes, or the first alone, must be those of the weights."
            )
        weights = jnp.max(weights, tuple(range(1, weights.ndim)))
    values = jnp.mean(values, tuple(range(weights.ndim, values.ndim)))
    weights = weights.astype(values.dtype)
    counted = jnp.sum(jnp.where(weights > 0, weights * values, jnp.zeros((), values.dtype)))
    return counted / jnp.maximum(jnp.sum(weights), jnp.finfo(values.dtype).tiny)


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _equal(a: jax.Array, b: jax.Array) -> bool:
    return a is b or (a.dtype == b.dtype and _is_numeric(a) and bool(jnp.array_equal(a, b)))


def _is_numeric(array: Any) -> bool:
    return not jnp.issubdtype(array.dtype, jax.dtypes.extended)


def _on_host(state: Sequence[Any]) -> list[Any]:
    """Return arrays in the memory of the host; random keys stay where they are."""
    return [np.asarray(array) if _is_numeric(array) else array for array in state]


def _layer(leaf: Any, layer: int | None) -> Any:
    return leaf if layer is None else leaf[layer]


def _already(key: Key, tuned: set[Key]) -> bool:
    """Return whether a leaf, or any layer of it that a block reads, has been tuned."""
    path, layer = key
    return any(p == path and (layer is None or other in (None, layer)) for p, other in tuned)


def _checked_trees(params: Any, masks: Any, teacher: Any) -> tuple[Leaves, dict[str, Any], dict[str, Any]]:
    """Return the params flattened, and masks and dense params by path."""
    leaves = flatten(params)
    by_path = masks_by_path(masks, params, leaves)
    if callable(teacher) and jax.tree_util.all_leaves([teacher]):
        raise TypeError(
            f"teacher must be the dense params, a tree like params, got {shown(teacher)}: {_CALL}."
        )
    dense = mirrored(teacher, leaves, "teacher")
    if not is_concrete(leaves.by_path, dense, by_path):
        raise TypeError("recover looks at losses to stop, so it runs outside jit: the params are traced.")
    return leaves, by_path, dense


def _split(batches: Any, held_out: Any, weights: Any) -> tuple[list[Batch], list[Batch]]:
    """Return the batches to tune on, and those that decide."""
    listed = _arrays_alone(list(batches_of(batches, weights, "recover")))
    if not is_number(held_out):
        if weights is not None and not callable(weights):
            raise TypeError(
                "recover: with a list of held_out batches, weights must be a function of a batch, so that "
                "these have some too."
            )
        others = list(batches_of(held_out, weights, "recover(held_out=)"))
        if jax.tree.structure(others[0].inputs) != jax.tree.structure(listed[0].inputs):
            raise ValueError(
                f"held_out has batches of the structure {jax.tree.structure(others[0].inputs)}, and batches "
                f"of {jax.tree.structure(listed[0].inputs)}: they must be alike."
            )
        return listed, _arrays_alone(others)
    if isinstance(held_out, bool) or not 0 < float(held_out) < 1:
        raise ValueError(
            f"held_out must be a fraction between 0 and 1, or a list of batches, got {held_out}."
        )
    if len(listed) < 2:
        raise ValueError(
            "recover was given one batch, and needs others to decide when to stop: split it, or pass "
            "held_out=[batch]."
        )
    count = min(max(1, round(float(held_out) * len(listed))), len(listed) - 1)
    return listed[:-count], listed[-count:]


def _arrays_alone(batches: list[Batch]) -> list[Batch]:
    for number, batch in enumerate(batches):
        for leaf in jax.tree.leaves(batch.inputs):
            if not is_array(leaf):
                raise TypeError(
                    f"recover: batch {number} holds {leaf!r}, which is no array. Settings go in by "
                    "functools.partial(apply_fn, train=False)."
                )
    return batches


def _check_callables(loss: Any, progress: Any) -> None:
    if progress is not None:
        check_function(progress, "progress=", "of an evaluation, such as print")
    if loss is None:
        return
    check_function(loss, "loss=", "of (outputs, teacher_outputs)")
    try:
        inspect.signature(loss).bind(None, None)
    except ValueError:
        return  # no signature to look at
    except TypeError as error:
        raise TypeError(f"loss= is called as loss(outputs, teacher_outputs): {error}.") from None


def _tuned_paths(leaves: Leaves, network: Network, where: Where | None) -> list[str]:
    if where is not None:
        check_function(where, "where=", "of (path, leaf), such as jaxprune.kernels")
    read = set(network.read_leaves())
    able = [path for path, leaf in leaves.by_path.items() if _is_floating(leaf) and path in read]
    tuned = [path for path in able if where is None or where(path, leaves.by_path[path])]
    if not tuned:
        raise ValueError(
            "recover has no leaf to tune: none is floating-point, read by the function, and taken in by "
            f"where. The first two are true of {some_of(able) if able else 'no leaf'}."
        )
    return tuned


def _check_shapes(batches: Sequence[Batch]) -> None:
    for number, batch in enumerate(batches):
        if batch.key != batches[0].key:
            shapes = [[x.shape for x in jax.tree.leaves(one.inputs)] for one in (batch, batches[0])]
            raise ValueError(
                f"recover(by_block=True) needs batches of one shape: batch {number} has {shapes[0]}, the "
                f"first has {shapes[1]}. Leave the last examples out, or repeat some with weights= of 0."
            )
