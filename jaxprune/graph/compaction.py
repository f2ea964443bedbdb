"""`compact`: the smaller network that computes what the masked one does."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.blocktrees import blocks_of
from jaxprune.graph.engine import placing
from jaxprune.graph.engine.axes import Solution, State
from jaxprune.graph.engine.divisors import ParamAxis
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.finite import explain_not_finite, has_nan
from jaxprune.graph.engine.program import TracedNetwork, ZeroSlices
from jaxprune.graph.engine.shortening import NOTHING, Removed, removable, remove
from jaxprune.graph.engine.solving import solve_to_fixpoint, zero_slices
from jaxprune.graph.equivalence import gap, ops_of
from jaxprune.graph.folding import fold
from jaxprune.graph.plan import Plan
from jaxprune.graph.report import Report, report
from jaxprune.tracing.jaxprs import abstract, explicit_sharding, split_static
from jaxprune.tree.calls import check_call, check_masks_third
from jaxprune.tree.checks import as_integer
from jaxprune.tree.leaves import array_leaves, is_array, is_concrete
from jaxprune.tree.masks import apply_masks, like_params
from jaxprune.tree.stacks import Stacked, join_layers, layer_indices, layer_name, split_layers, stacks_of
from jaxprune.typing import Masks, Params, Where

_CALL = "compact(apply_fn, params, masks, *inputs)"


class Compacted:
    """A network that is really smaller, as `compact` returns it.

    Attributes:
      params: the small params: a tree like the dense ones, with smaller leaves.
      masks: the masks of the small params, for what stays masked within them.
      plan: which slices stay; it does the work of `shrink`, `expand` and `save`.
      apply: `apply(params, *inputs)`, the function on small params; any batch size, under jit,
        grad, vmap, scan and `jax.export`.
      stayed: what the masks remove that had to stay, each with the reason.
      shardings: by path, how the dense params were sharded over explicit axes of a mesh.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        params: Params,
        masks: Masks,
        plan: Plan,
        state: Callable[[Any], Any] | None,
        stayed: Sequence["NotRemoved"],
    ):
        self.plan, self.stayed = plan, tuple(stayed)
        self.params = jax.eval_shape(plan.shrink, params) if _abstract(params) else plan.shrink(params)
        self.masks = plan.shrink(masks)
        self.shardings = {
            path: sharding
            for path, leaf in array_leaves(params).items()
            if (sharding := explicit_sharding(leaf)) is not None
        }
        self.function = function
        self.apply = self.bind(function, state=state)

    @property
    def keep(self) -> dict[str, dict[int, np.ndarray]]:
        """By path, for each axis that lost slices, the dense indices of those that stayed."""
        return {path: dict(axes) for path, axes in self.plan.keep.items()}

    def shrink(self, tree: Any, where: Where | None = None) -> Any:
        """Cuts what goes out of any tree with param-shaped parts; see `Plan.shrink`."""
        return self.plan.shrink(tree, where)

    def expand(self, tree: Any, where: Where | None = None) -> Any:
        """Puts zeros where slices went, in any tree with param-shaped parts; see `Plan.expand`.

        Params that the function divides by are not zero there: `Plan.expand` says what they are.
        """
        return self.plan.expand(tree, where)

    def save(self, file: Any) -> None:
        """Writes the plan to a file; `Plan.load` reads it, and `compact` takes it in place of masks."""
        self.plan.save(file)

    def bind(
        self, function: Callable[..., Any], state: Callable[[Any], Any] | None = None
    ) -> Callable[..., Any]:
        """Another function of the same dense params, on the small ones.

        The training-mode function, say, under the plan found in evaluation mode.

        Args:
          function: `function(params, *inputs)` for dense params.
          state: as for `compact`, for this function's output.

        Returns:
          `bound(params, *inputs)` for small params. It raises ValueError if the function needs
          slices that the plan drops, naming what needs them.
        """
        return bind(function, self.plan, state, self.shardings)

    def report(self, *inputs: Any, rounds: int = 0) -> Report:
        """What compaction gained: parameters, multiply-adds, time, and what stayed and why.

        Args:
          *inputs: what to count multiply-adds, and to measure, with.
          rounds: how often to time each of the two networks, in turn; 0 for not at all.
        """
        return report(self, *inputs, rounds=rounds)


def compact(
    apply_fn: Callable[..., Any],
    params: Params,
    masks: Masks | Plan,
    *inputs: Any,
    state: Callable[[Any], Any] | None = None,
    stacked: Stacked | None = None,
    multiple_of: int = 1,
    fold_constants: bool = False,
    verify: bool = True,
    **keywords: Any,
) -> Compacted:
    """The smaller network that computes what the masked one does.

    The function is traced, and every slice of every param is dropped that is zero under the masks
    or is multiplied by zeros only, as far as the function provably stays the same: for all inputs,
    and for all values of the small params, so that it can be trained on:
    `small.apply(s, x) == apply_fn(small.expand(s), x)`. What cannot be proved stays, and
    `stayed` says why. Numbers are taken to be finite: where the dense network multiplies a zero by
    infinity it gives NaN, and the small one has dropped both. Slices that the function divides by
    are dropped as well, whatever their values; `expand` does not put zeros in their places.

    Args:
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      params: the dense params, a pytree of arrays, or of `jax.ShapeDtypeStruct` to plan alone.
      masks: bool masks like `params`; or a `Plan`, as loaded from a file.
      *inputs: example inputs. Shapes may differ in later calls. Bools and strings among them are
        static.
      state: from the function's output to that part of it that is new values of params (updated
        BatchNorm statistics, a cache), at the same paths as in `params`.
      stacked: which axes of params count layers, a function of (path, leaf) that returns a number of
        leading axes or a tuple of axes; by default those that the function's scans run along. Each layer
        of a stack keeps slices of its own, and as many as the layer that keeps most: `stayed` names those
        that are kept for it.
      multiple_of: widths are rounded up to a multiple of this, with units that are zero.
      fold_constants: first folds channels that are constant, not zero, into what reads them: masks
        of filters alone leave relu(bias) alive. It changes params that stay, so it is a step for
        deployment; `apply_fn(small.expand(s), x)` holds for the folded params.
      verify: compares the two networks on the inputs, if params and inputs are there to be read.
      **keywords: none; those of the function go in by `functools.partial(apply_fn, train=False)`.

    Returns:
      A `Compacted`.

    Raises:
      ValueError: masks that do not mirror `params`, a plan that does not fit; the check found that the
        masked network is not finite, by an overflow or a division by zero, and names the op.
      TypeError: masks that are traced; arguments in another order, an `apply_fn` that cannot be called with
        the inputs, a keyword.
      RuntimeError: the check failed, which is a bug in jaxprune or in a rule of yours.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> masks = jp.ones_masks(params)
      >>> masks["a"] = masks["a"].at[:, 1].set(False)
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["a"]) @ params["b"]
      >>> small = jp.compact(apply_fn, params, masks, jnp.ones((1, 3)))
      >>> small.params["a"].shape, small.params["b"].shape
      ((3, 3), (3, 2))
      >>> small.keep["b"]
      {0: array([0, 2, 3])}
    """
    options = ("state", "stacked", "multiple_of", "fold_constants", "verify")
    check_call(_CALL, apply_fn, (params, *inputs), keywords, options)
    if not isinstance(masks, Plan):
        check_masks_third(_CALL, params, masks, inputs)
    multiple_of = as_integer(multiple_of, "multiple_of", at_least=1)
    if isinstance(masks, Plan):
        stacks = masks.stacks
    else:
        stacks = None if stacked is None else stacks_of(stacked, array_leaves(params))
    linked = TracedNetwork(apply_fn, params, inputs, state, stacks)
    stayed: list[NotRemoved] = []
    given = None
    if isinstance(masks, Plan):
        plan = masks
        solve_for_plan(linked, plan)
        # What the plan drops is masked, so that a plan from a file goes with params that are dense.
        masks = plan.expand(plan.shrink(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)))
    else:
        masks = like_params(masks, params)
        if not is_concrete(masks):
            raise TypeError("compact looks at the masks to find shapes, so they cannot be traced.")
        linked.pin_unread()
        if fold_constants:
            given = apply_masks(params, masks)
            params, masks = _folded(linked, given, masks, inputs)
        arrays = {path: np.asarray(mask) for path, mask in array_leaves(masks, "masks").items()}
        arrays = split_layers(arrays, linked.stacks)
        blocks = blocks_of(params)
        taken_out = removable(linked, arrays, blocks)
        remove(linked, taken_out)
        kept, divisors = solve_to_fixpoint(linked, lambda dropped: zero_slices(arrays, dropped))
        needless = linked.dropped(kept)
        kept, divisors = _rounded(linked, kept, divisors, multiple_of)
        plan = plan_of(linked, kept, divisors, taken_out, blocks)
        stayed = _stayed(linked, zero_slices(arrays), plan, needless)
    masked = params if _abstract(params) else apply_masks(params, masks)
    small = Compacted(apply_fn, masked, masks, plan, state, stayed)
    if verify and is_concrete(params, split_static(inputs)[0]) and not linked.closes_over_tracers():
        _verify(apply_fn, linked, masked if given is None else given, small, inputs, state)
    return small


def _folded(
    linked: TracedNetwork, params: Params, masks: Masks, inputs: Sequence[Any]
) -> tuple[Params, Masks]:
    """Params and masks with the constants of dead filters folded into what reads them."""
    arrays, _ = split_static(inputs)
    if not is_concrete(params, arrays):
        raise TypeError("fold_constants=True reads constants off the network, so it needs real arrays.")
    dense = array_leaves(params)
    leaves = split_layers(dense, linked.stacks)
    found = {path: np.asarray(mask) for path, mask in array_leaves(masks, "masks").items()}
    found = split_layers(found, linked.stacks)
    fold(linked, leaves, found, [*dense.values(), *arrays.values()])
    tree = jax.tree.structure(params)
    shapes = {path: leaf.shape for path, leaf in dense.items()}
    folded, alive = (join_layers(by_name, linked.stacks, shapes) for by_name in (leaves, found))
    return (
        jax.tree.unflatten(tree, list(folded.values())),
        jax.tree.unflatten(tree, [jnp.asarray(mask) for mask in alive.values()]),
    )


def _abstract(tree: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def plan_of(
    linked: TracedNetwork,
    kept: Solution,
    divisors: frozenset[ParamAxis] = frozenset(),
    taken_out: Removed = NOTHING,
    blocks: Sequence[str] = (),
) -> Plan:
    """The slices of params that a solution keeps, and what of those it drops must not be zero.

    Args:
      linked: the function.
      kept: the solution.
      divisors: the axes of params whose dropped slices must not be zero.
      taken_out: the params, or layers of them, that go whole.
      blocks: the paths of what could be taken out of lists and dicts.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in linked.leaves.items()}
    keep: dict[str, dict[int, np.ndarray]] = {}
    nonzero: dict[str, set[int]] = {}
    removed = _outermost(block for block in blocks if _goes(block, linked, taken_out))
    for path, shape in shapes.items():
        stack = linked.stacks.get(path, ())
        rest = [axis for axis in range(len(shape)) if axis not in stack]
        names = {layer_name(path, i) if stack else path: i for i in layer_indices(shape, stack)}
        counts = tuple(shape[axis] for axis in stack)
        if len(stack) == 1 and (gone := names.keys() & taken_out.names):
            rows = sorted(index[0] for name, index in names.items() if name not in gone)
            names = {name: index for name, index in names.items() if name not in gone}
            counts = (len(rows),)
            keep[path] = {stack[0]: np.array(rows)}
            if gone & taken_out.alive:
                nonzero[path] = {stack[0]}
        elif names.keys() <= taken_out.alive:
            nonzero[path] = set(range(len(shape)))
        for layer_axis, axis in enumerate(rest):
            indices = [kept.indices(linked.values[name].axes[layer_axis]) for name in names]
            if any(row is not None for row in indices):
                full = [np.arange(shape[axis]) if row is None else row for row in indices]
                keep.setdefault(path, {})[axis] = np.stack(full).reshape(*counts, -1)
                if any((name, layer_axis) in divisors for name in names):
                    nonzero.setdefault(path, set()).add(axis)
    divided = {path: tuple(sorted(axes)) for path, axes in nonzero.items()}
    return Plan(shapes, keep, divided, linked.stacks, removed)


def _goes(block: str, linked: TracedNetwork, taken_out: Removed) -> bool:
    """Whether all of a block is taken out."""
    names = {name for name, (path, _) in linked.paths.items() if path.startswith(f"{block}/")}
    return bool(names) and names <= taken_out.names


def _outermost(blocks: Iterable[str]) -> tuple[str, ...]:
    found = list(blocks)
    return tuple(block for block in found if not any(block.startswith(f"{other}/") for other in found))


def _rounded(
    linked: TracedNetwork, kept: Solution, divisors: frozenset[ParamAxis], multiple_of: int
) -> tuple[Solution, frozenset[ParamAxis]]:
    """A solution whose widths are multiples, and equal in the layers of a stack."""
    while True:
        seeds: list[tuple[int, State]] = []
        for value in linked.values.values():
            for node, size in zip(value.axes, value.shape, strict=True):
                indices = kept.indices(node)
                if indices is not None and (missing := -len(indices) % multiple_of):
                    seeds.append((node, _with_more(indices, size, missing)))
        seeds = seeds or _evened(linked, kept)
        if not seeds:
            return kept, divisors
        dropped = linked.dropped(kept)
        kept, divisors = solve_to_fixpoint(
            linked, lambda _, dropped=dropped: dropped, [*linked.seeds(dropped), *seeds]
        )


def _evened(linked: TracedNetwork, kept: Solution) -> list[tuple[int, State]]:
    """Seeds that give the layers of a stack as many slices of some axis as the one that has most.

    It is the axis on which the fewest are missing: where whole heads went, that of the heads. What has to go
    with these comes by the constraints, so that other axes of the same units are even afterwards.
    """
    best: tuple[int, list[tuple[int, State]]] | None = None
    for values in linked.families:
        for axis, size in enumerate(values[0].shape):
            rows = {linked.graph.find(value.axes[axis]): kept.indices(value.axes[axis]) for value in values}
            counts = {node: size if indices is None else len(indices) for node, indices in rows.items()}
            most = max(counts.values())
            missing = sum(most - count for count in counts.values())
            if missing and (best is None or missing < best[0]):
                seeds = []
                for node, indices in rows.items():
                    if indices is not None and len(indices) < most:
                        seeds.append((node, _with_more(indices, size, most - len(indices))))
                best = missing, seeds
    return [] if best is None else best[1]


def _with_more(indices: np.ndarray, size: int, count: int) -> State:
    """Slices that are to stay: some, and so many of the others."""
    state = np.ones(size, bool)
    state[np.setdiff1d(np.arange(size), indices)[count:]] = False
    return True if state.all() else state


def solve_for_plan(linked: TracedNetwork, plan: Plan) -> tuple[Solution, Facts]:
    """The solution for a plan made elsewhere.

    Raises:
      ValueError: the plan is for other params, or drops what this function needs.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in linked.leaves.items()}
    if shapes != dict(plan.shapes):
        different = [path for path in {**shapes, **plan.shapes} if shapes.get(path) != plan.shapes.get(path)]
        path = different[0]
        raise ValueError(
            f"the plan does not fit the params: at {path!r} the plan has {plan.shapes.get(path)}, "
            f"the params have {shapes.get(path)}."
        )
    remove(linked, plan.taken_out())
    facts = linked.facts(plan.zeros())
    kept = linked.solve(facts, linked.seeds(plan.dropped()))
    by_layer = plan.by_layer()
    for path, value in linked.values.items():
        if path in linked.removed:
            continue
        for axis, node in enumerate(value.axes):
            wanted, planned = kept.indices(node), by_layer.keep.get(path, {}).get(axis)
            have = np.arange(by_layer.shapes[path][axis]) if wanted is None else wanted
            if planned is not None and len(have) != len(planned):
                first = int(np.setdiff1d(have, planned)[0])
                raise ValueError(
                    f"the plan drops slice {first} of params[{path!r}] along axis {axis}, which this "
                    f"function needs: {explain(linked, facts, node, first)}."
                )
    return kept, facts


def bind(
    function: Callable[..., Any],
    plan: Plan,
    state: Callable[[Any], Any] | None = None,
    shardings: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., Any]:
    """A function of dense params as one of small params; see `Compacted.bind`.

    Args:
      function, plan, state: as there.
      shardings: by path, how the dense params were sharded over explicit axes of a mesh, if they were.
    """
    programs: dict[Any, tuple[TracedNetwork, Solution, Facts]] = {}

    def bound(params: Params, *inputs: Any) -> Any:
        plan.check(params)
        params = plan.filled(params)
        arrays, _ = split_static(inputs)
        leaves, treedef = jax.tree.flatten((params, inputs))
        key = (treedef, tuple(_signature(leaf) for leaf in leaves))
        if key not in programs:
            small, tree = jax.tree.flatten(params)
            # By path, because the plan may have been made for other containers, with leaves in another order.
            dense = [
                _dense_struct(plan.shapes[path], leaf, shardings.get(path))
                for path, leaf in array_leaves(params).items()
            ]
            linked = TracedNetwork(function, jax.tree.unflatten(tree, dense), inputs, state, plan.stacks)
            solution = solve_for_plan(linked, plan)
            if linked.closes_over_tracers():
                return linked.replay(*solution, [*small, *arrays.values()])
            programs[key] = linked, *solution
        linked, kept, facts = programs[key]
        return linked.replay(kept, facts, [*jax.tree.leaves(params), *arrays.values()])

    return bound


def _dense_struct(shape: tuple[int, ...], leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """A dense param as the function took it: sharded as it was, or else as the small one is."""
    if sharding is None and (of_leaf := explicit_sharding(leaf)) is not None:
        sharding = placing.small_sharding(of_leaf, leaf.shape, shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _signature(leaf: Any) -> Any:
    if is_array(leaf) or (isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)):
        struct = abstract(leaf)
        return struct.shape, struct.dtype, struct.weak_type, struct.sharding
    return leaf


class NotRemoved:
    """Slices of a param that the masks remove but the function needs."""

    def __init__(self, path: str, axis: int, count: int, why: str):
        self.path, self.axis, self.count, self.why = path, axis, count, why

    def __repr__(self) -> str:
        return f"{self.count} masked slices of {self.path} along axis {self.axis} stay: {self.why}"


def _stayed(linked: TracedNetwork, zeros: ZeroSlices, plan: Plan, needless: ZeroSlices) -> list[NotRemoved]:
    """The masked slices that stay, with the reason.

    Args:
      linked: the function.
      zeros: the slices of params that the masks remove.
      plan: what goes.
      needless: the slices that the function can do without, before widths were rounded and layers made even.
    """
    dropped, result = plan.dropped(), []
    facts = None
    for name, marks in zeros.items():
        if name in linked.removed:
            continue
        for axis, (zero, gone) in enumerate(zip(marks, dropped[name], strict=True)):
            left = zero if zero is None or gone is None else zero & ~gone
            if left is None or not left.any():
                continue
            free = needless[name][axis]
            for slices, is_needed in (
                ((left, True),) if free is None else ((left & ~free, True), (left & free, False))
            ):
                if not slices.any():
                    continue
                if is_needed:
                    facts = facts or linked.facts(plan.zeros())
                    node = linked.values[name].axes[axis]
                    why = explain(linked, facts, node, int(np.flatnonzero(slices)[0]))
                else:
                    why = _why_even(linked, needless, name, axis)
                result.append(NotRemoved(name, axis, int(slices.sum()), why))
    return result


def _why_even(linked: TracedNetwork, needless: ZeroSlices, name: str, axis: int) -> str:
    """Why slices stay that the function could do without."""
    path, index = linked.paths[name]
    if not index:
        return _EMPTY_OR_ROUNDED

    def needed(other: str) -> int:
        free = needless[other][axis]
        return linked.values[other].shape[axis] - (0 if free is None else int(free.sum()))

    layers = [other for other, (of, _) in linked.paths.items() if of == path and other not in linked.removed]
    widest = max(layers, key=needed)
    if needed(widest) <= needed(name):
        return _EMPTY_OR_ROUNDED
    return f"the layers of a stack keep equally many slices, and {widest} needs {needed(widest)}"


_EMPTY_OR_ROUNDED = "an axis cannot be empty, or its width is rounded up"

# What ops do with the slices that they need; all others sum them.
_VERBS = {
    "reduce_max": "compares",
    "reduce_min": "compares",
    "argmax": "compares",
    "argmin": "compares",
    "top_k": "compares",
    "reduce_and": "combines",
    "reduce_or": "combines",
}


def explain(linked: TracedNetwork, facts: Facts, node: int, index: int) -> str:
    """Why a slice has to stay: what pins it, or the op that reads it."""
    why = linked.graph.why_pinned(node)
    if why is not None:
        return str(why)
    for op, needed, state in facts.readers():
        alone = linked.graph.solve([(needed, state)], never_empty=False).state(node)
        if alone is True or alone[index]:
            return f"{op} {_VERBS.get(op.name, 'sums')} it with slices that are not zero"
    return _EMPTY_OR_ROUNDED


def _verify(
    apply_fn: Callable[..., Any],
    linked: TracedNetwork,
    masked: Params,
    small: Compacted,
    inputs: Sequence[Any],
    state: Callable[[Any], Any] | None,
) -> None:
    """Compares the masked and the small network on the example inputs."""
    arrays, rebuild = split_static(inputs)

    def of_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, arrays: function(params, *rebuild(arrays))

    eps = ops_of(of_arrays(apply_fn), masked, arrays).eps
    # Where products of float32 are less exact by default (TF32), rounding would count as a bug. The
    # precision is chosen when a function is traced, so this binds it anew.
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(of_arrays(apply_fn))(masked, arrays)
        got = jax.jit(of_arrays(bind(apply_fn, small.plan, state, small.shardings)))(small.params, arrays)
    if state is not None:  # new values of params, which are smaller
        expected = with_state(expected, state, small.shrink(state(expected)))
    wanted = array_leaves(expected, "output")
    for path, value in array_leaves(got, "output").items():
        apart, spoilt = gap(wanted[path], value), has_nan(wanted[path])
        if not spoilt and (apart is None or apart <= eps**0.5):
            continue
        # Numbers that are not finite need not be so in the same places, which is no fault of compaction.
        why = explain_not_finite(linked, masked, list(arrays.values()))
        if spoilt or why is not None:
            raise ValueError(
                f"the masked network is not finite on the example inputs (output [{path}]), so that the "
                f"compacted one cannot be compared with it: {why or 'it gives NaN'}. "
                "compact(..., verify=False) skips the check."
            )
        raise RuntimeError(
            f"the compacted network differs from the masked one by {apart:.2g} (relative to the "
            f"largest entry) at output [{path}]. This is a bug in jaxprune, or in a registered rule: "
            "please report it with the function. compact(..., verify=False) skips the check."
        )


def with_state(outputs: Any, state: Callable[[Any], Any], new: Any) -> Any:
    """A function's output with other arrays for what `state` takes out of it."""
    leaves, tree = jax.tree.flatten(outputs)
    numbers = jax.tree.leaves(state(jax.tree.unflatten(tree, range(len(leaves)))))
    for number, leaf in zip(numbers, jax.tree.leaves(new), strict=True):
        leaves[number] = leaf
    return jax.tree.unflatten(tree, leaves)
