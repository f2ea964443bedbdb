"""Statistics of inputs in numpy and float64, from explicit matrices, like those of `jaxprune.calibrate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Layer:
    """What one leaf multiplies.

    Attributes:
      shape: of the leaf.
      contracted: the axes that its product sums over.
      x: rows x inputs, the inputs in row-major order of the contracted axes; or an array of such matrices
        with leading axes of `apart`.
      stack: the axes that count layers.
      batch: the axes that count experts, or other products beside each other.
      group: the axis of N:M groups, by default the last one contracted.
    """

    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    x: np.ndarray
    stack: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    group: int | None = None

    @property
    def apart(self):
        return tuple(sorted((*self.stack, *self.batch)))

    def spread(self, by_input):
        """Return numbers by input as an array that broadcasts against the leaf."""
        order = (*self.apart, *self.contracted)
        sizes = [self.shape[axis] for axis in order]
        numbers = np.transpose(np.reshape(by_input, sizes), np.argsort(order))
        others = [axis for axis in range(len(self.shape)) if axis not in order]
        return np.expand_dims(numbers, others)

    def gram(self, damping):
        """Return the damped Gram matrices."""
        h = np.swapaxes(self.x, -1, -2) @ self.x
        mean = np.trace(h, axis1=-2, axis2=-1) / h.shape[-1]
        return h + damping * mean[..., None, None] * np.eye(h.shape[-1])


class _Static:
    """What does not change of statistics; compared by identity, because arrays do not compare."""

    def __init__(self, layers: dict[str, Layer], statistics: str):
        self.layers, self.statistics = layers, statistics


class StandIn:
    """The statistics of some layers, by path."""

    def __init__(self, layers: Mapping[str, Layer], statistics: str = "gram", damping: float = 0.01):
        self._static = _Static(dict(layers), statistics)
        self.statistics = statistics
        self.values = {path: self._of(layer, damping) for path, layer in layers.items()}

    @classmethod
    def _of_values(cls, static, values):
        stats = object.__new__(cls)
        stats._static, stats.statistics, stats.values = static, static.statistics, values
        return stats

    @property
    def layers(self) -> dict[str, Layer]:
        return self._static.layers

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.layers)

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        return {path: layer.stack for path, layer in self.layers.items() if layer.stack}

    def _of(self, layer, damping):
        mean = layer.x.mean(-2)
        found = {
            "squares": (layer.x**2).sum(-2),
            "mean": mean,
            "variance": (layer.x**2).mean(-2) - mean**2,
            "rows": np.full(mean.shape, layer.x.shape[-2]),
        }
        if self.statistics == "gram":
            inverse = np.linalg.inv(layer.gram(damping))
            found["inverse_diagonal"] = np.diagonal(inverse, axis1=-2, axis2=-1)
        return {what: jnp.asarray(layer.spread(x), jnp.float32) for what, x in found.items()}

    def where(self, path: str, leaf: Any) -> bool:
        return path in self.values

    def contracted_axes(self, path: str) -> tuple[int, ...]:
        return tuple(sorted(self.layers[path].contracted))

    def group_axis(self, path: str) -> int:
        layer = self.layers[path]
        return max(layer.contracted) if layer.group is None else layer.group

    def per_entry(self, path: str, what: str) -> Any:
        return self.values[path][what]

    def map_matrices(self, path: str, leaf: Any, function: Any) -> Any:
        layer = self.layers[path]
        outputs = [a for a in range(leaf.ndim) if a not in (*layer.apart, *layer.contracted)]
        order = (*layer.apart, *outputs, *layer.contracted)
        front = jnp.transpose(leaf, order)
        inputs = int(np.prod([leaf.shape[axis] for axis in layer.contracted]))
        apart = int(np.prod([leaf.shape[axis] for axis in layer.apart]))
        found = function(front.reshape(apart, -1, inputs)).reshape(front.shape)
        return jnp.transpose(found, np.argsort(order))


jax.tree_util.register_pytree_node(
    StandIn,
    lambda stats: ((stats.values,), stats._static),
    lambda static, values: StandIn._of_values(static, *values),
)


def layer(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    contracted: tuple[int, ...],
    rows: int = 50,
    **known: Any,
) -> Layer:
    """Return a layer with correlated random inputs, each with a scale and a mean of its own."""
    drawn = Layer(shape, contracted, np.zeros((1, 1)), **known)
    size = int(np.prod([shape[axis] for axis in contracted]))
    x = rng.normal(size=(*[shape[axis] for axis in drawn.apart], rows, size))
    x = (x @ rng.normal(size=(size, size)) + rng.normal(size=size)) * np.exp(rng.normal(size=size))
    return Layer(shape, contracted, x, **known)
