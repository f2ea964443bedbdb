"""Stacked leaves: one array that holds the same param of many layers.

`nn.scan`, `nnx.scan`, `vmap` and plain `lax.scan` over layers keep one array for all layers, with an
axis (or several) that counts them: the *stack*. Everywhere else a layer is a leaf of its own, so here a
stacked leaf is taken apart into such leaves, and put together again. The layer at index i of the leaf
"layers/kernel" is called "layers/kernel[i]"; with two stack axes "layers/kernel[i,j]".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.arguments import check_function, shown
from jaxprune.paths import describe

Stacked = Callable[[str, Any], int | Sequence[int]]
"""`stacked(path, leaf)`: how many leading axes of the leaf count layers, or which axes do."""

Stacks = Mapping[str, tuple[int, ...]]
"""By path, the axes that count layers, from 0; leaves without a stack are not in it."""


def layer_name(path: str, index: Sequence[Any]) -> str:
    """The name of one layer of a stacked leaf."""
    return f"{path}[{','.join(map(str, index))}]"


def layer_indices(shape: Sequence[int], axes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The index of each layer of a leaf of a shape, in row-major order."""
    return np.ndindex(*(shape[axis] for axis in axes))


def layer_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The shape of one layer."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def stacks_of(stacked: Stacked, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The stack axes of leaves, as a user's function says them.

    Raises:
      TypeError: `stacked` is not a function, or returns neither an integer nor a tuple of integers.
      ValueError: a leaf has no such axes, or all its axes are said to count layers.
    """
    check_function(
        stacked, "stacked=", "of (path, leaf) that returns a number of leading axes or a tuple of axes"
    )
    stacks = {}
    for path, leaf in leaves.items():
        said: Any = stacked(path, leaf)
        if not _is_integer(said) and not (isinstance(said, (tuple, list)) and all(map(_is_integer, said))):
            raise TypeError(
                f"stacked({path!r}, leaf) returned {shown(said)}. It must return how many leading axes "
                "of the leaf count layers (0 for none), or a tuple of the axes that do."
            )
        wanted = tuple(range(said)) if _is_integer(said) else tuple(map(int, said))
        axes = tuple(axis + leaf.ndim if axis < 0 else axis for axis in wanted)
        inside = all(0 <= axis < leaf.ndim for axis in axes) and len(set(axes)) == len(axes)
        if not inside or (_is_integer(said) and said < 0):
            raise ValueError(
                f"stacked({path!r}, leaf) returned {shown(said)}, but the leaf is {describe(leaf)}."
            )
        if axes:
            stacks[path] = axes
    return stacks


def split_layers(by_path: Mapping[str, Any], stacks: Stacks) -> dict[str, Any]:
    """Arrays by path, with each stacked one taken apart into its layers by name."""
    split: dict[str, Any] = {}
    for path, array in by_path.items():
        if path not in stacks:
            split[path] = array
            continue
        axes = stacks[path]
        module: Any = np if isinstance(array, np.ndarray) else jnp
        front = module.moveaxis(array, axes, range(len(axes)))
        for index in layer_indices(array.shape, axes):
            split[layer_name(path, index)] = front[index]
    return split


def join_layers(
    by_name: Mapping[str, Any], stacks: Stacks, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Arrays by path, with the layers of stacked ones put together again; layers of any shape.

    Args:
      by_name: arrays as `split_layers` names them.
      stacks: the stack axes by path.
      shapes: the dense shapes of the stacked leaves by path, which say how many layers there are.

    Returns:
      Arrays by path, in the order in which the first layer of each comes. A stacked leaf of which no
      layer is given is left out.
    """
    joined: dict[str, Any] = {}
    of_layer = {
        layer_name(path, index): path
        for path, axes in stacks.items()
        for index in layer_indices(shapes[path], axes)
    }
    for name, array in by_name.items():
        path = of_layer.get(name)
        if path is None:
            joined[name] = array
        elif path not in joined:
            axes = stacks[path]
            counts = tuple(shapes[path][axis] for axis in axes)
            layers = [by_name[layer_name(path, index)] for index in layer_indices(shapes[path], axes)]
            module: Any = np if all(isinstance(layer, np.ndarray) for layer in layers) else jnp
            stack = module.stack(layers)
            stack = stack.reshape(counts + stack.shape[1:])
            joined[path] = module.moveaxis(stack, range(len(axes)), axes)
    return joined


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
