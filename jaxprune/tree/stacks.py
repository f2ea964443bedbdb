"""Stacked leaves: one array that holds the same param of many layers.

`nn.scan`, `nnx.scan`, `vmap` and plain `lax.scan` over layers keep one array for all layers, with an
axis (or several) that counts them: the *stack*. The rest of the library has one leaf for each layer, so a
stacked leaf is split into layers here, and joined again. The layer at index i of the leaf
"layers/kernel" is called "layers/kernel[i]"; with two stack axes "layers/kernel[i,j]".
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.tree.checks import as_integer, check_function, shown
from jaxprune.tree.host import like_computed, on_host
from jaxprune.tree.kernel_names import names_kernel
from jaxprune.tree.leaves import describe
from jaxprune.tree.sharding import sharded_like, whole_along
from jaxprune.tree.where import kernels
from jaxprune.typing import Where

Stacked = Callable[[str, Any], int | Sequence[int]]
"""`stacked(path, leaf)`: how many leading axes of the leaf count layers, or which axes do."""

_INDEX = re.compile(r"\d+(,\d+)*\]")

Stacks = Mapping[str, tuple[int, ...]]
"""By path, the axes that count layers, numbered from 0; only stacked leaves are in it."""


class Family(NamedTuple):
    """The pools that are the same part of each layer of a stack.

    Attributes:
      shape: the sizes of the stack's axes.
      names: the pools, in row-major order of the stack.
      equal: whether the network needs equally many units in each, as coupled channels of a scan do.
      multiple_of: what is kept of each pool is rounded up to a multiple of so many units, or to these widths.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    equal: bool = False
    multiple_of: int | tuple[int, ...] = 1


def layer_name(path: str, index: Sequence[Any]) -> str:
    """Return the name of one layer of a stacked leaf."""
    return f"{path}[{','.join(map(str, index))}]"


def layer_indices(shape: Sequence[int], axes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Return the index of each layer of a leaf, in row-major order."""
    return np.ndindex(*(shape[axis] for axis in axes))


def layer_names(path: str, shape: Sequence[int], axes: Sequence[int]) -> list[str]:
    """Return the name of each layer of a leaf, in row-major order."""
    return [layer_name(path, index) for index in layer_indices(shape, axes)]


def layer_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one layer."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def check_stacked(stacked: Any) -> None:
    """Check that `stacked=`, which says which leaves are stacked, is a function."""
    check_function(
        stacked, "stacked=", "of (path, leaf) that returns a number of leading axes or a tuple of axes"
    )


def stacks_of(stacked: Stacked, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the stack axes of leaves that a user's function returns for them."""
    check_stacked(stacked)
    stacks = {}
    for path, leaf in leaves.items():
        said: Any = stacked(path, leaf)
        several = isinstance(said, (tuple, list))
        try:
            wanted = (
                [as_integer(axis, "axis") for axis in said] if several else range(as_integer(said, "axes"))
            )
        except TypeError:
            raise TypeError(
                f"stacked({path!r}, leaf) returned {shown(said)}. It must return how many leading axes "
                "of the leaf count layers (0 for none), or a tuple of the axes that do."
            ) from None
        axes = tuple(axis + leaf.ndim if axis < 0 else axis for axis in wanted)
        inside = all(0 <= axis < leaf.ndim for axis in axes) and len(set(axes)) == len(axes)
        if not inside or (not several and said < 0):
            raise ValueError(
                f"stacked({path!r}, leaf) returned {shown(said)}, but the leaf is {describe(leaf)}."
            )
        if axes:
            stacks[path] = axes
    return stacks


def about_layers(where: Where, stacked: Stacked | None) -> Where:
    """Return the predicate; `kernels`, the default, asked about one layer of each stacked leaf.

    A whole stack of biases has two axes, as the kernel of one layer has.
    """
    if where is not kernels or stacked is None:
        return where
    check_stacked(stacked)

    def kernels_of_layers(path: str, leaf: Any) -> bool:
        axes: tuple[int, ...] = ()
        with contextlib.suppress(ValueError):  # it need not fit leaves that take no part
            axes = stacks_of(stacked, {path: leaf}).get(path, ())
        if not axes:
            return kernels(path, leaf)
        return names_kernel(path, layer_shape(leaf.shape, axes))

    kernels_of_layers.__name__ = kernels.__name__
    return kernels_of_layers


def check_stacks(stacks: Stacks, leaves: Mapping[str, Any]) -> None:
    """Check that leaves have the stack axes that coupled channels were found with."""
    for path in stacks.keys() & leaves.keys():
        if any(not 0 <= axis < leaves[path].ndim for axis in stacks[path]):
            raise ValueError(
                f"params[{path!r}] has the shape {tuple(leaves[path].shape)}, but the groups have layers "
                f"along its axes {stacks[path]}. Call channel_groups with the params that are pruned."
            )


def leaf_of_layer(name: str) -> str | None:
    """Return the path of the stacked leaf from the name of a layer; None for another name."""
    path, bracket, index = name.rpartition("[")
    return path if bracket and _INDEX.fullmatch(index) else None


def families_of(
    stacks: Stacks, shapes: Mapping[str, Sequence[int]], pools: Collection[str]
) -> dict[str, Family]:
    """Return, by path, the layers of the stacked leaves, where these are pools."""
    families = {}
    for path in stacks.keys() & shapes.keys():
        axes, shape = stacks[path], shapes[path]
        names = layer_names(path, shape, axes)
        if names and all(name in pools for name in names):
            families[path] = Family(tuple(shape[axis] for axis in axes), tuple(names))
    return families


def take_layer(array: Any, axes: Sequence[int], index: Sequence[int]) -> Any:
    """Return one layer of a stacked array."""
    if isinstance(array, jax.Array):
        if on_host(array):
            return like_computed(take_layer(np.asarray(array), axes, index), array)
        array = whole_along(array, axes)
    for axis, number in sorted(zip(axes, index, strict=True), reverse=True):
        if isinstance(array, np.ndarray):
            array = np.take(array, number, axis)
        else:
            array = lax.index_in_dim(array, number, axis, keepdims=False)
    return array


def split_shapes(shapes: Mapping[str, tuple[int, ...]], stacks: Stacks) -> dict[str, tuple[int, ...]]:
    """Replace the shape of each stacked leaf by those of its layers, by name."""
    split: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        axes = stacks.get(path, ())
        if axes and max(axes) < len(shape):
            split |= dict.fromkeys(layer_names(path, shape, axes), layer_shape(shape, axes))
        else:
            split[path] = shape
    return split


def split_layers(by_path: Mapping[str, Any], stacks: Stacks) -> dict[str, Any]:
    """Split each stacked array, of arrays by path, into its layers by name."""
    split: dict[str, Any] = {}
    for path, array in by_path.items():
        if path not in stacks:
            split[path] = array
            continue
        axes = stacks[path]
        for index in layer_indices(array.shape, axes):
            split[layer_name(path, index)] = take_layer(array, axes, index)
    return split


def join_layers(
    by_name: Mapping[str, Any], stacks: Stacks, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Join the layers of stacked arrays again; layers may have any shape.

    `shapes` are the dense shapes of the stacked leaves, which tell how many layers each has. The arrays
    returned are in the order of the first layer of each; a stacked leaf of which no layer is given is left
    out.
    """
    joined: dict[str, Any] = {}
    names = {path: layer_names(path, shapes[path], axes) for path, axes in stacks.items()}
    of_layer = {name: path for path, layers in names.items() for name in layers}
    for name, array in by_name.items():
        path = of_layer.get(name)
        if path is None:
            joined[name] = array
        elif path not in joined:
            axes = stacks[path]
            counts = tuple(shapes[path][axis] for axis in axes)
            layers = [by_name[layer] for layer in names[path]]
            module: Any = np if all(isinstance(layer, np.ndarray) for layer in layers) else jnp
            stack = module.stack(layers)
            stack = stack.reshape(counts + stack.shape[1:])
            joined[path] = module.moveaxis(stack, range(len(axes)), axes)
    return joined


def join_masks(
    by_name: Mapping[str, jax.Array], stacks: Stacks, leaves: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Join the masks of layers as `join_layers` does; a layer that has no mask is kept whole.

    The masks get the shapes and shardings of the stacked `leaves`.
    """
    complete, shapes = dict(by_name), {path: leaf.shape for path, leaf in leaves.items()}
    for path, axes in stacks.items():
        names = layer_names(path, shapes[path], axes)
        if any(name in by_name for name in names):
            ones = np.ones(layer_shape(shapes[path], axes), bool)
            complete |= {name: by_name.get(name, ones) for name in names}
    if on_host(complete):
        joined = join_layers({name: np.asarray(mask) for name, mask in complete.items()}, stacks, shapes)
        joined = {path: like_computed(mask) for path, mask in joined.items()}
    else:
        joined = join_layers(complete, stacks, shapes)
    return {path: sharded_like(x, leaves[path]) if path in leaves else x for path, x in joined.items()}
