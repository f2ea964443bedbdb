"""`compact`: the smaller network that computes what the masked one does.

The walk, a file for each job: `engine.program` traces the function, `planning` solves for what can be
dropped and says so as a `plan`, `reasons` says why the rest stays, `binding` makes the function of the small
params, and `equivalence` compares it with the masked one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune.graph.binding import bind
from jaxprune.graph.blocktrees import blocks_of
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.equivalence import check_compacted
from jaxprune.graph.folding import fold_into_readers
from jaxprune.graph.plan import Plan
from jaxprune.graph.planning import plan_for_masks, solve_for_plan
from jaxprune.graph.reasons import NotRemoved
from jaxprune.graph.report import Report, report
from jaxprune.tracing.jaxprs import abstract, explicit_sharding, split_static
from jaxprune.tree.calls import check_call, check_masks_third
from jaxprune.tree.checks import as_integer
from jaxprune.tree.host import like_computed
from jaxprune.tree.leaves import array_leaves, is_array, is_concrete
from jaxprune.tree.masks import apply_masks, like_params
from jaxprune.tree.stacks import Stacked, split_layers, stacks_of
from jaxprune.typing import Masks, Params, Where

_CALL = "compact(apply_fn, params, masks, *inputs)"


@dataclass(frozen=True, eq=False, repr=False)
class Compacted:
    """A network that is really smaller, as `compact` returns it.

    Attributes:
      params: the small params: a tree like the dense ones, with smaller leaves.
      masks: the masks of the small params, for what stays masked within them.
      plan: which slices stay.
      apply: `apply(params, *inputs)`, the function on small params; any batch size, under jit,
        grad, vmap, scan and `jax.export`.
      not_removed: what the masks remove that had to stay, each with the reason.
      function: the function of dense params.
      shardings: by path, how the dense params were sharded over explicit axes of a mesh.
      inputs: the example inputs, arrays as `jax.ShapeDtypeStruct`; None if a file could not hold them.
    """

    params: Params
    masks: Masks
    plan: Plan
    apply: Callable[..., Any]
    not_removed: tuple[NotRemoved, ...]
    function: Callable[..., Any]
    shardings: Mapping[str, Any]
    inputs: tuple[Any, ...] | None

    @property
    def keep(self) -> dict[str, dict[int, np.ndarray]]:
        """By path, for each axis that lost slices, the dense indices of those that stayed."""
        return {path: dict(axes) for path, axes in self.plan.keep.items()}

    def shrink(self, tree: Any, where: Where | None = None) -> Any:
        """Cut what was dropped out of any tree with param-shaped parts; see `Plan.shrink`."""
        return self.plan.shrink(tree, where)

    def expand(self, tree: Any, where: Where | None = None) -> Any:
        """Put zeros where slices were dropped, in any tree with param-shaped parts; see `Plan.expand`.

        Params that the function divides by are not zero there: `Plan.expand` says what they are.
        """
        return self.plan.expand(tree, where)

    def bind(
        self, function: Callable[..., Any], state: Callable[[Any], Any] | None = None
    ) -> Callable[..., Any]:
        """Return another function of the same dense params as a function of the small ones.

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
        """Return what compaction gained: parameters, multiply-adds, time, and what stayed and why.

        Args:
          *inputs: what to count multiply-adds, and to measure, with.
          rounds: how often to time each of the two networks, in turn; 0 for not at all.
        """
        return report(self, *inputs, rounds=rounds)

    if not TYPE_CHECKING:  # a type checker would take any attribute

        def __getattr__(self, name: str) -> Any:
            new = {
                "stayed": "; it is called not_removed now.",
                "save": "; jaxprune.io.save_compacted writes all of it to a file, plan.save the plan.",
            }.get(name, ".")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{new}")


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
    """Return the smaller network that computes what the masked one does.

    The function is traced, and a slice of a param is dropped if it is zero under the masks or is
    multiplied by zeros only, as far as the function provably stays the same: for all inputs,
    and for all values of the small params, so that it can be trained on:
    `small.apply(s, x) == apply_fn(small.expand(s), x)`. What cannot be proved stays, and
    `not_removed` says why. Numbers are taken to be finite: where the dense network multiplies a zero by
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
        of a stack keeps slices of its own, and as many as the layer that keeps most: `not_removed` names
        those that are kept for it.
      multiple_of: widths are rounded up to a multiple of this, with units that are zero.
      fold_constants: first folds channels that are constant, not zero, into what reads them: masks
        of filters alone leave relu(bias) alive. It changes params that stay, so it is a step for
        deployment; `apply_fn(small.expand(s), x)` holds for the folded params.
      verify: compares the two networks on the inputs, if params and inputs have values.
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
    network = TracedNetwork(apply_fn, params, inputs, state, stacks)

    reference = None
    if isinstance(masks, Plan):
        plan, not_removed = masks, ()
        solve_for_plan(network, plan)  # raises if the function needs what the plan drops
        # What the plan drops is masked, so that a plan from a file goes with params that are dense.
        ones = jax.tree.map(lambda leaf: like_computed(np.ones(leaf.shape, bool)), params)
        masks = plan.expand(plan.shrink(ones))
    else:
        masks = like_params(masks, params)
        if not is_concrete(masks):
            raise TypeError("compact looks at the masks to find shapes, so they cannot be traced.")
        network.pin_unread()
        if fold_constants:
            reference = apply_masks(params, masks)
            params, masks = fold_into_readers(network, reference, masks, inputs)
        by_path = {path: np.asarray(mask) for path, mask in array_leaves(masks, "masks").items()}
        by_layer = split_layers(by_path, network.stacks)
        plan, not_removed = plan_for_masks(network, by_layer, blocks_of(params), multiple_of)

    shapes_only = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    masked = params if shapes_only else apply_masks(params, masks)
    leaves = array_leaves(masked).items()
    shardings = {path: found for path, leaf in leaves if (found := explicit_sharding(leaf)) is not None}
    small = Compacted(
        params=jax.eval_shape(plan.shrink, masked) if shapes_only else plan.shrink(masked),
        masks=plan.shrink(masks),
        plan=plan,
        apply=bind(apply_fn, plan, state, shardings),
        not_removed=not_removed,
        function=apply_fn,
        shardings=shardings,
        inputs=jax.tree.map(lambda leaf: abstract(leaf) if is_array(leaf) else leaf, inputs),
    )
    if verify and is_concrete(params, split_static(inputs)[0]) and not network.closes_over_tracers():
        # Folding changes params, and must not change the network.
        check_compacted(network, masked if reference is None else reference, small, inputs, state)
    return small
