"""The matrices of a leaf: how they are read from it, and how changed ones are put back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.survey import Site


class Part(NamedTuple):
    """A matrix, or a batch of them, that products read from a leaf.

    A leaf has several parts if products read different entries of it, as queries, keys and values of one
    array. A stacked leaf has the same parts in each of its layers.

    Attributes:
      site: the first product that reads it.
      uses: all products that read it.
    """

    site: Site
    uses: tuple[Site, ...]

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes of the leaf that count layers, from that of the outermost scan to the innermost."""
        return tuple(axis for _, axis in self.site.view.stack)

    def layers(self) -> list[tuple[int, ...]]:
        """Return the number of each layer along `stack_axes`; one empty number for a leaf of one layer."""
        return list(np.ndindex(*self.site.stack_shape))

    def layer(self, leaf: Any, index: Sequence[int]) -> Any:
        """Return one layer of the leaf."""
        for axis, number in sorted(zip(self.stack_axes, index, strict=True), reverse=True):
            leaf = jax.lax.index_in_dim(jnp.asarray(leaf), number, axis, keepdims=False)
        return jnp.asarray(leaf)

    def matrix(self, layer: Any) -> jax.Array:
        """Return the matrices of a layer, float32 of (batch, outputs, inputs)."""
        return self.site.form.kernel(self.site.view.apply(layer.astype(jnp.float32)))

    def put(self, layer: Any, matrix: Any) -> jax.Array:
        """Return a layer with other matrices; its entries that do not change stay the same to the bit."""
        back, before, seen = self._transpose(layer.shape)
        old = self.matrix(layer)
        # The view may scale entries: v = s w. Its transpose gives sum(s v) = sum(s^2) w.
        value = back(matrix) / jnp.where(seen > 0, seen, 1)
        changed = back(jnp.where(matrix != old, before, 0)) != 0
        value = jnp.where(back(jnp.where(matrix != 0, before, 0)) != 0, value, 0)
        return jnp.where(changed, value.astype(layer.dtype), layer)

    def mask(self, shape: Sequence[int], keep: Any) -> jax.Array:
        """Return the mask of a layer from those of its matrices; entries that no matrix has are kept."""
        back, before, _ = self._transpose(shape)
        return back(jnp.where(keep, 0, before)) == 0

    def kept(self, mask: Any) -> jax.Array:
        """Return the masks of the matrices from that of a layer."""
        return self.matrix(~mask) == 0

    def spread(self, shape: Sequence[int], values: Any) -> tuple[jax.Array, jax.Array]:
        """Return values of the entries of the matrices as entries of a layer, and where there are any."""
        back, before, seen = self._transpose(shape)
        values = jnp.broadcast_to(values, before.shape).astype(jnp.float32)
        return back(before * values) / jnp.where(seen > 0, seen, 1), seen > 0

    def _transpose(self, shape: Sequence[int]) -> tuple[Any, jax.Array, jax.Array]:
        """Return the transpose of `matrix`; `matrix` of ones, the scales; and the sum of their squares."""
        struct = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        transpose = jax.linear_transpose(self.matrix, struct)
        scales = self.matrix(jnp.ones(shape, jnp.float32))

        def back(matrix: Any) -> jax.Array:
            return transpose(jnp.asarray(matrix, jnp.float32))[0]

        return back, scales, back(scales)


def parts_of(sites: Sequence[Site], shape: Sequence[int]) -> list[Part] | str:
    """Return the parts of a leaf from all products that read it, or why it cannot be solved for.

    Args:
      sites: the products, in the order in which they run.
      shape: of the leaf.
    """
    stacks = {site.view.stack and tuple(axis for _, axis in site.view.stack) for site in sites}
    if len(stacks) > 1:
        return f"it is stacked in one product and not in another ({_lines(sites)})"
    by_key: dict[str, list[Site]] = {}
    for site in sites:
        by_key.setdefault(site.key, []).append(site)
    parts = [Part(uses[0], tuple(uses)) for uses in by_key.values()]
    if len(parts) == 1:
        return parts
    layer = [size for axis, size in enumerate(shape) if axis not in parts[0].stack_axes]
    # Random numbers tell which matrices are the same: those of a leaf and of its copy in bfloat16, say.
    probe = jnp.asarray(np.random.default_rng(0).uniform(1, 2, layer), jnp.float32)
    distinct: list[tuple[Part, np.ndarray]] = []
    for part in parts:
        matrix = np.asarray(part.matrix(probe))
        same = next((n for n, (_, m) in enumerate(distinct) if np.array_equal(m, matrix)), None)
        if same is None:
            distinct.append((part, matrix))
        else:
            other, _ = distinct[same]
            distinct[same] = (other._replace(uses=(*other.uses, *part.uses)), matrix)
    times = sum(np.asarray(part.spread(layer, 1.0)[1], np.int32) for part, _ in distinct)
    if np.max(times, initial=0) > 1:
        return f"products read its entries as different matrices ({_lines(sites)})"
    return [part for part, _ in distinct]


def _lines(sites: Sequence[Site]) -> str:
    return ", ".join(dict.fromkeys(site.source for site in sites))
