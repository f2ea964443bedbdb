"""A compacted network as one file: small params, their masks and the plan.

The file is one of `save`, whose params are `{"params": the small params, "keep": the plan's indices}`.
Indices are stored as bool vectors (True where a slice stays), so that `save` codes them in few bits and no
index can point elsewhere. The rest of the plan lies in the metadata.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.files.opened import FileError
from jaxprune.graph import planfile
from jaxprune.graph.binding import bind
from jaxprune.graph.compaction import Compacted
from jaxprune.graph.equivalence import of_arrays
from jaxprune.graph.plan import Plan
from jaxprune.graph.reasons import NotRemoved
from jaxprune.io import trees
from jaxprune.io.format import DTYPES
from jaxprune.io.read import load
from jaxprune.io.write import save
from jaxprune.tracing.jaxprs import split_static
from jaxprune.tree.checks import check_function, shown
from jaxprune.tree.leaves import array_leaves, describe, is_array
from jaxprune.typing import Params

_KIND = "jaxprune compacted network, version 1"


def save_compacted(path: str | os.PathLike[str], small: Compacted) -> int:
    """Write a compacted network to one file: its params, masks and plan, under checksums, none of it code.

    The file replaces an older one in one step, as that of `save` does. It also holds the shapes of the
    example inputs and of the outputs, by which `load_compacted` checks the function that it is given. Inputs
    in containers other than dicts, lists and tuples are not stored, and then no outputs are compared.

    Args:
      path: of the file.
      small: what `jaxprune.compact` returned, with arrays.

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: `small` is not a `Compacted`, or was made of `jax.ShapeDtypeStruct` and so has no values.
      OSError: the file cannot be written. Nothing of it remains then, and an older file is untouched.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxprune as jp
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((3, 4)).at[:, 1].set(0.0), "b": jnp.ones((4, 2))}
      >>> masks = jp.ones_masks(params) | {"a": params["a"] != 0}
      >>> small = jp.compact(apply_fn, params, masks, jnp.ones((1, 3)))
      >>> file = os.path.join(tempfile.mkdtemp(), "small")
      >>> size = jp.io.save_compacted(file, small)
      >>> loaded = jp.io.load_compacted(file, apply_fn)
      >>> loaded.params["a"].shape, bool((loaded.apply(loaded.params, jnp.ones((5, 3))) > 0).all())
      ((3, 3), True)
    """
    if not isinstance(small, Compacted):
        raise TypeError(
            f"save_compacted takes what jaxprune.compact returns, got {shown(small)}. Of a compacted module, "
            "that is its `small`; jaxprune.io.save takes params."
        )
    plan = small.plan
    keep = {
        name: {str(axis): _as_bools(kept, plan.shapes[name][axis]) for axis, kept in axes.items()}
        for name, axes in plan.keep.items()
    }
    outputs = _outputs(small, small.inputs)
    metadata = {
        "kind": _KIND,
        "shapes": _lists(plan.shapes),
        "divisors": _lists(plan.divisors),
        "stacks": _lists(plan.stacks),
        "removed": list(plan.removed),
        "not_removed": [[n.path, n.axis, n.count, n.why] for n in small.not_removed],
        "inputs": _encode_inputs(small.inputs),
        "outputs": [[name, leaf] for name, leaf in outputs.items()],
    }
    masks = {"params": small.masks, "keep": jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), keep)}
    return save(path, {"params": small.params, "keep": keep}, masks, metadata=metadata)


def load_compacted(
    path: str | os.PathLike[str],
    apply_fn: Callable[..., Any],
    *,
    like: Any = None,
    state: Callable[[Any], Any] | None = None,
    max_bytes: int = 1 << 33,
) -> Compacted:
    """Read a compacted network that `save_compacted` wrote, without the dense params.

    A file holds no code, so the function comes from the caller: the one of dense params that was compacted.
    It is traced with the dense shapes of the file, and has to fit the plan and give outputs of the same
    shapes. A function of the same shapes that computes something else (another activation) is not noticed.

    Args:
      path: of the file.
      apply_fn: the function of dense params, `apply_fn(params, *inputs)`.
      like: the dense params, of arrays or `jax.ShapeDtypeStruct`, for a function that needs other containers
        than dicts and lists: an equinox module, made by `equinox.filter_eval_shape`, say. Without it the
        params are nested dicts, with lists where positions counted, which flax (nnx too) and haiku take.
      state: as for `jaxprune.compact`, if it was given there.
      max_bytes: as for `load`.

    Returns:
      A `Compacted` like the one saved: `loaded.apply(loaded.params, *inputs)`.

    Raises:
      FileError: a ValueError: the file is damaged, holds no compacted network, is larger than `max_bytes`,
        its params are not those of `like`, or `apply_fn` is not the function that was compacted.
      TypeError: `apply_fn` is not a function.
      OSError: the file cannot be read.

    Example:
      See `save_compacted`.
    """
    check_function(apply_fn, "load_compacted(path, apply_fn)", "apply_fn(params, *inputs)")
    saved = load(path, max_bytes=max_bytes)
    name = os.fspath(path)
    if saved.metadata.get("kind") != _KIND:
        raise FileError(f"{name}: holds no compacted network, but params: jaxprune.io.load(path) reads it.")
    try:
        plan, not_removed, inputs, outputs = _read_metadata(saved.metadata, saved.params, max_bytes)
        params, masks = _rebuilt(plan, saved.params["params"], saved.masks, like)
        plan.check(params, "its params")
    except FileError as error:
        raise FileError(f"{name}: {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError) as error:
        why = str(error).rstrip(".") or type(error).__name__
        raise FileError(f"{name}: its plan and its params do not fit together: {why[:500]}.") from None
    small = Compacted(
        params=params,
        masks=masks,
        plan=plan,
        apply=bind(apply_fn, plan, state),
        not_removed=not_removed,
        function=apply_fn,
        shardings={},
        inputs=inputs,
    )
    try:
        found = _outputs(small, inputs)
    except Exception as error:
        raise FileError(
            f"{name}: apply_fn is not the function that was compacted, or takes params of other containers "
            f"(like=): with the file's params it raises {type(error).__name__}: {str(error)[:500]}"
        ) from error
    if found != outputs:
        raise FileError(
            f"{name}: apply_fn is not the function that was compacted: its outputs are {_show(found)}, "
            f"and were {_show(outputs)}."
        )
    return small


# --- what a file says of the plan


def _as_bools(kept: np.ndarray, size: int) -> np.ndarray:
    """Return which of `size` slices stay, given their indices; a row for each row."""
    out = np.zeros((*kept.shape[:-1], size), bool)
    np.put_along_axis(out, np.asarray(kept, np.int64), True, axis=-1)
    return out


def _as_indices(stay: np.ndarray) -> np.ndarray:
    """Return the indices of the True entries, a row for each row."""
    counts = np.unique(np.count_nonzero(stay, axis=-1))
    if stay.dtype != bool or len(counts) != 1:
        raise ValueError("the slices that stay are not equally many in all layers")
    return np.nonzero(stay)[-1].reshape(*stay.shape[:-1], int(counts[0]))


def _read_metadata(
    metadata: dict[str, Any], saved: Any, max_bytes: int
) -> tuple[Plan, tuple[NotRemoved, ...], Any, dict[str, str]]:
    """Return the plan, what was not removed, the inputs and the outputs, checked."""
    shapes = _tuples(metadata["shapes"])
    keep = {
        name: {int(axis): _as_indices(stay) for axis, stay in axes.items()}
        for name, axes in saved["keep"].items()
    }
    fields = {
        "shapes": shapes,
        "keep": keep,
        "divisors": _tuples(metadata["divisors"]),
        "stacks": _tuples(metadata["stacks"]),
        "removed": tuple(metadata["removed"]),
    }
    if not all(isinstance(block, str) for block in fields["removed"]):
        raise FileError("the blocks that are removed have no names.")
    # A block that is removed has no array here, so nothing but this bounds what its shapes ask for.
    if sum(map(sum, shapes.values())) > max_bytes or any(
        math.prod(shape[axis] for axis in axes) > max_bytes // 1024
        for name, axes in fields["stacks"].items()
        if (shape := shapes.get(name, ()))
    ):
        raise FileError(f"its plan takes more than max_bytes={max_bytes} bytes.")
    for name, axes in saved["keep"].items():
        for axis, stay in axes.items():
            if stay.shape[-1] != shapes[name][int(axis)]:
                raise FileError(
                    f"the slices of {name}, axis {axis}, are {stay.shape[-1]}, not {shapes[name]}."
                )
    planfile.check(fields)
    not_removed = tuple(
        NotRemoved(str(p), int(a), int(n), str(why)) for p, a, n, why in metadata["not_removed"]
    )
    outputs = {str(name): str(leaf) for name, leaf in metadata["outputs"]}
    return Plan(**fields), not_removed, _decode_inputs(metadata["inputs"]), outputs


def _lists(by_path: Mapping[str, Any]) -> dict[str, list[int]]:
    return {path: [int(n) for n in value] for path, value in by_path.items()}


def _tuples(by_path: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    for value in by_path.values():
        if not all(type(n) is int and n >= 0 for n in value):
            raise FileError(f"{shown(value)} are not sizes.")
    return {path: tuple(value) for path, value in by_path.items()}


# --- params in the containers of the caller


def _rebuilt(plan: Plan, params: Params, masks: Any, like: Any) -> tuple[Params, Any]:
    """Return the params and masks as arrays of jax, in the containers of `like` if there is one."""
    masks = masks["params"]
    if like is not None:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf, like
        )
        dense = array_leaves(shapes, "like")
        for path in {**plan.shapes, **dense}:
            wanted = plan.shapes.get(path)
            found = tuple(dense[path].shape) if path in dense else None
            if wanted != found:
                raise FileError(
                    f"its params are not those of like: {path!r} has the dense shape {wanted} in the file "
                    f"and {found} in like."
                )
        small = jax.eval_shape(plan.shrink, shapes)
        found = array_leaves(params)
        for path, leaf in array_leaves(small).items():
            if describe(leaf) != describe(found[path]):
                raise FileError(f"{path!r} is {describe(found[path])}, but {describe(leaf)} in like.")
        params, masks = (_in_containers(small, tree) for tree in (params, masks))
    return _on_device(params), _on_device(masks)


def _in_containers(like: Any, tree: Any) -> Any:
    pairs = trees.match(like, trees.flatten(tree, "the file").leaves, "like")
    return jax.tree.unflatten(jax.tree.structure(like), [leaf for _, _, leaf in pairs])


def _on_device(tree: Any) -> Any:
    for path, leaf in array_leaves(tree).items():
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise FileError(
                f"{path!r} is {leaf.dtype}, which needs jax.config.update('jax_enable_x64', True)."
            )
    return jax.tree.map(jnp.asarray, tree)


# --- inputs and outputs, by shape


def _outputs(small: Compacted, inputs: Any) -> dict[str, str]:
    """Return the outputs of a function by path, as text; none where its inputs could not be stored."""
    if _encode_inputs(inputs) is None:
        return {}
    arrays, _ = split_static(inputs)
    out = jax.eval_shape(of_arrays(small.apply, inputs), small.params, arrays)
    return {path: describe(leaf) for path, leaf in array_leaves(out, "output").items()}


def _show(outputs: dict[str, str]) -> str:
    return ", ".join(f"{name} {leaf}".strip() for name, leaf in outputs.items())[:500] or "none"


_KEYS = ("threefry2x32", "rbg", "unsafe_rbg")


def _encode_inputs(inputs: Any) -> Any:
    """Return inputs as JSON holds them; None if they have containers of other kinds, or functions."""
    if inputs is None:
        return None
    try:
        return [_encode(leaf) for leaf in inputs]
    except TypeError:
        return None


def _encode(node: Any) -> Any:
    if is_array(node):
        return {"array": [str(node.dtype), [int(n) for n in node.shape]]}
    if node is None or type(node) in (bool, str, int) or (type(node) is float and math.isfinite(node)):
        return {"value": node}
    if isinstance(node, (list, tuple)) and type(node) in (list, tuple):
        return {type(node).__name__: [_encode(child) for child in node]}
    if type(node) is dict and all(type(key) is str for key in node):
        return {"dict": {key: _encode(child) for key, child in node.items()}}
    raise TypeError


def _decode_inputs(nodes: Any) -> Any:
    return None if nodes is None else tuple(_decode(node) for node in nodes)


def _decode(node: Any) -> Any:
    kind: str
    value: Any
    ((kind, value),) = node.items()
    if kind == "array":
        name, shape = value
        keys = {str(jax.eval_shape(lambda i=i: jax.random.key(0, impl=i)).dtype): i for i in _KEYS}
        if name in keys:
            dtype = jax.eval_shape(lambda: jax.random.key(0, impl=keys[name])).dtype
        else:
            dtype = DTYPES[name]
        return jax.ShapeDtypeStruct(_tuples({"": shape})[""], dtype)
    if kind == "value" and not isinstance(value, (list, dict)):
        return value
    if kind == "list":
        return [_decode(child) for child in value]
    if kind == "tuple":
        return tuple(_decode(child) for child in value)
    if kind == "dict" and isinstance(value, dict):
        return {key: _decode(child) for key, child in value.items()}
    raise FileError(f"an input of kind {kind!r} is unknown.")
