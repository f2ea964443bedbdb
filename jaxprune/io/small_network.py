"""`save_compacted` and `load_compacted`: a smaller network in one file, without the dense params."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.files.opened import FileError
from jaxprune.graph import planfile
from jaxprune.graph.binding import bind
from jaxprune.graph.compaction import Compacted
from jaxprune.graph.plan import Plan
from jaxprune.io.read import load
from jaxprune.io.write import save
from jaxprune.tree.checks import check_function, shown
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.masks import ones_masks
from jaxprune.typing import Where

_KEY = "compacted"
_FIELDS = {"shapes", "keep", "divisors", "stacks", "removed"}


def save_compacted(path: str | os.PathLike[str], small: Compacted, *, int8: bool | Where = False) -> int:
    """Write what `compact` returned to one file: the small params, their masks and the plan.

    The dense params are not needed to read it, nor are the masks that were compacted. The file is one of
    `save`, with the plan in its metadata: `load` reads it as well.

    Args:
      path: of the file, which is written completely or not at all.
      small: the network. Of a module take `compact_module(...).small`.
      int8: as for `save`.

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: `small` is no `Compacted`, or holds no values: it was planned with shapes alone.
      OSError: the file cannot be written.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxprune as jp
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> masks = jp.ones_masks(params) | {"a": jnp.arange(4) * jnp.ones((3, 1)) != 1}
      >>> small = jp.compact(apply_fn, params, masks, jnp.ones((1, 3)))
      >>> file = os.path.join(tempfile.mkdtemp(), "small")
      >>> size = jp.io.save_compacted(file, small)
      >>> loaded = jp.io.load_compacted(file, apply_fn)
      >>> loaded.params["a"].shape, loaded.apply(loaded.params, jnp.ones((5, 3))).shape
      ((3, 3), (5, 2))
    """
    if not isinstance(small, Compacted):
        raise TypeError(f"save_compacted takes what compact returned, got {shown(small)}.")
    plan = small.plan
    fields = {
        "shapes": {path: list(shape) for path, shape in plan.shapes.items()},
        "keep": {
            path: {str(axis): np.asarray(kept).tolist() for axis, kept in axes.items()}
            for path, axes in plan.keep.items()
        },
        "divisors": {path: list(axes) for path, axes in plan.divisors.items()},
        "stacks": {path: list(axes) for path, axes in plan.stacks.items()},
        "removed": list(plan.removed),
    }
    return save(path, small.params, small.masks, int8=int8, metadata={_KEY: fields})


def load_compacted(
    path: str | os.PathLike[str],
    apply_fn: Callable[..., Any],
    like: Any = None,
    *,
    state: Callable[[Any], Any] | None = None,
) -> Compacted:
    """Read a network that `save_compacted` wrote.

    Args:
      path: of the file.
      apply_fn: the function of dense params that was compacted, `apply_fn(params, *inputs)`.
      like: a tree with the structure that `apply_fn` takes its params in and with the dense shapes, of arrays
        or of `jax.ShapeDtypeStruct` (`jax.eval_shape`, `nnx.eval_shape` and `eqx.filter_eval_shape` make it
        without computing anything). Not needed for nested dicts and lists.
      state: as it was for `compact`.

    Returns:
      A `Compacted`: numpy arrays, and everything that the plan can do. `not_removed` is empty.

    Raises:
      FileError: the file is damaged, or holds no compacted network, or does not match `like`.
      TypeError: `apply_fn` is no function.
      ValueError: when `apply` is called, if the function is another one than was compacted, and needs what
        was dropped.

    Example:
      See `save_compacted`.
    """
    check_function(apply_fn, "load_compacted", "apply_fn(params, *inputs)")
    saved = load(path)
    plan = _plan_of(saved.metadata, os.fspath(path))
    if like is not None:
        dense = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        _check_dense(dense, plan, os.fspath(path))
        saved = load(path, like=jax.eval_shape(plan.shrink, dense))
    try:
        plan.check(saved.params)
    except ValueError as error:
        raise FileError(f"{os.fspath(path)}: its params are not those of its plan: {error}") from None
    masks = ones_masks(saved.params) if saved.masks is None else saved.masks
    return Compacted(
        params=saved.params,
        masks=masks,
        plan=plan,
        apply=bind(apply_fn, plan, state),
        not_removed=(),
        function=apply_fn,
        shardings={},
    )


def _check_dense(dense: Any, plan: Plan, path: str) -> None:
    """Check that a tree has the dense shapes of a plan."""
    shapes = {name: tuple(leaf.shape) for name, leaf in array_leaves(dense, "like").items()}
    for name in {**shapes, **plan.shapes}:
        if shapes.get(name) != plan.shapes.get(name):
            raise FileError(
                f"{path}: {name!r} has the dense shape {plan.shapes.get(name, 'of no param')}, but "
                f"{shapes.get(name, 'is missing')} in like."
            )


def _plan_of(metadata: Mapping[str, Any], path: str) -> Plan:
    """Return the plan in the metadata of a file."""
    given = metadata.get(_KEY)
    if not isinstance(given, dict) or given.keys() != _FIELDS:
        raise FileError(f"{path}: it holds no compacted network. Read it with jaxprune.io.load.")
    try:
        fields = {
            "shapes": {name: _integers(shape) for name, shape in given["shapes"].items()},
            "keep": {
                name: {int(axis): np.array(kept, np.int64) for axis, kept in axes.items()}
                for name, axes in given["keep"].items()
            },
            "divisors": {name: _integers(axes) for name, axes in given["divisors"].items()},
            "stacks": {name: _integers(axes) for name, axes in given["stacks"].items()},
            "removed": tuple(given["removed"]),
        }
        _check_removed(fields["removed"], fields["shapes"])
        planfile.check(fields, path)
    except (AttributeError, TypeError, ValueError, OverflowError, IndexError) as error:
        raise FileError(f"{path}: its plan is malformed: {error}") from None
    return Plan(**fields)


def _check_removed(blocks: tuple[Any, ...], shapes: Mapping[str, Any]) -> None:
    for block in blocks:
        if not isinstance(block, str) or not any(path.startswith(f"{block}/") for path in shapes):
            raise ValueError(f"{block!r:.100} is no block of its params")


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r:.100} are not sizes")
    return tuple(values)
