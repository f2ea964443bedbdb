"""The matrices of a leaf: how they are read from it, and how changed ones are put back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.calibration.survey import Site
from jaxprune.tracing.leaf_views import LeafView
from jaxprune.tree.stacks import layer_name


class View(NamedTuple):
    """Arrays that are read from each layer of a leaf, by a linear map that reads each entry at most once.

    Attributes:
      path: the leaf.
      stack_axes: the axes of the leaf that count layers, from that of the outermost scan to the innermost.
      read: from a layer in float32 to the array.
    """

    path: str
    stack_axes: tuple[int, ...]
    read: Callable[[Any], Any]

    def layer(self, leaf: Any, index: Sequence[int]) -> Any:
        """Return one layer of the leaf, given its number along each of `stack_axes`.

        Of a leaf on the host only this layer goes to the device, as a copy: the leaf may be written later.
        """
        if isinstance(leaf, np.ndarray):
            return jnp.array(leaf[self._place(leaf.ndim, index)])
        leaf = jnp.asarray(leaf)
        for axis, number in sorted(zip(self.stack_axes, index, strict=True), reverse=True):
            leaf = lax.dynamic_index_in_dim(leaf, number, axis, keepdims=False)
        return leaf

    def with_layer(self, leaf: Any, index: Sequence[int], layer: Any, *, in_place: bool = False) -> Any:
        """Return the leaf with one layer replaced; a leaf on the host stays there.

        With `in_place` a leaf on the host is written to, in place of a copy of it.
        """
        if isinstance(leaf, np.ndarray):
            layer = np.asarray(layer)
            if not index:
                return layer
            leaf = leaf if in_place and leaf.flags.writeable else np.array(leaf)
            leaf[self._place(leaf.ndim, index)] = layer
            return leaf
        if not index:
            return layer
        return jnp.asarray(leaf).at[self._place(leaf.ndim, index)].set(layer)

    def _place(self, ndim: int, index: Sequence[int]) -> tuple[Any, ...]:
        place: list[Any] = [slice(None)] * ndim
        for axis, number in zip(self.stack_axes, index, strict=True):
            place[axis] = number
        return tuple(place)

    def array(self, layer: Any) -> jax.Array:
        """Return what is read from a layer, in float32."""
        return self.read(layer.astype(jnp.float32))

    def put(self, layer: Any, array: Any) -> jax.Array:
        """Return a layer from which another array is read; entries that need not change stay, to the bit."""
        back, scales, seen = self._transpose(layer.shape)
        # Each number read is v = s w. The transpose of reading gives sum(s v) = sum(s^2) w.
        value = back(array) / jnp.where(seen > 0, seen, 1)
        changed = back(jnp.where(array != self.array(layer), scales, 0)) != 0
        value = jnp.where(back(jnp.where(array != 0, scales, 0)) != 0, value, 0)
        return jnp.where(changed, value.astype(layer.dtype), layer)

    def mask(self, shape: Sequence[int], keep: Any) -> jax.Array:
        """Return the mask of a layer, given that of the array; entries that are not read are kept."""
        back, scales, _ = self._transpose(shape)
        return back(jnp.where(keep, 0, scales)) == 0

    def kept(self, mask: Any) -> jax.Array:
        """Return the mask of the array, given that of a layer."""
        return self.array(~mask) == 0

    def spread(self, shape: Sequence[int], values: Any) -> tuple[jax.Array, jax.Array]:
        """Return a layer with a value for each entry that is read, and which entries these are."""
        back, scales, seen = self._transpose(shape)
        return back(jnp.broadcast_to(values, scales.shape) * scales) / jnp.where(seen > 0, seen, 1), seen > 0

    def _transpose(self, shape: Sequence[int]) -> tuple[Callable[[Any], jax.Array], jax.Array, jax.Array]:
        """Return the transpose of reading; what is read of ones, the scales; and the sum of their squares.

        A scale may be negative, and for each entry that is read there is one, so that only the sum of squares
        tells which entries are read.
        """
        shape = tuple(shape)
        transpose = jax.linear_transpose(self.array, jax.ShapeDtypeStruct(shape, jnp.float32))
        scales = self.array(jnp.ones(shape, jnp.float32))

        def back(array: Any) -> jax.Array:
            return transpose(jnp.asarray(array, jnp.float32))[0]

        return back, scales, back(scales)


class Part(NamedTuple):
    """A matrix, or a batch of them, that products read from a leaf.

    A leaf has several parts if products read different entries of it, as queries, keys and values of one
    array. A stacked leaf has the same parts in each of its layers.

    Attributes:
      site: the first product that reads it.
      uses: all products that read it.
      number: which of the parts of its leaf it is.
    """

    site: Site
    uses: tuple[Site, ...]
    number: int = 0

    @property
    def matrix(self) -> View:
        """The matrices, (batch, outputs, inputs)."""
        site = self.site
        return View(site.path, _stack_axes(site.view), lambda layer: site.form.kernel(site.view.apply(layer)))

    @property
    def bias(self) -> View | None:
        """What is added to their outputs, (batch, outputs); None if no leaf of its own is."""
        bias = self.site.bias
        if bias is None or len(self.uses) > 1:
            return None
        return View(bias.view.path, _stack_axes(bias.view), lambda layer: bias.matrix(bias.view.apply(layer)))

    def layers(self) -> list[tuple[int, ...]]:
        """Return the number of each layer along the axes that count them; `()` for a leaf of one layer."""
        return list(np.ndindex(*self.site.stack_shape))

    def name(self, index: Sequence[int]) -> str:
        """Return the name of a layer."""
        return layer_name(self.site.path, index) if index else self.site.path


def _stack_axes(view: LeafView) -> tuple[int, ...]:
    return tuple(axis for _, axis in view.stack)


def parts_of(sites: Sequence[Site], shape: Sequence[int]) -> list[Part] | str:
    """Return the parts of a leaf from all products that read it, or why it cannot be solved for.

    Args:
      sites: the products, in the order in which they run.
      shape: of the leaf.
    """
    stacks = {_stack_axes(site.view) for site in sites}
    if len(stacks) > 1:
        return f"it is stacked in one product and not in another ({_lines(sites)})"
    by_key: dict[str, list[Site]] = {}
    for site in sites:
        by_key.setdefault(site.key, []).append(site)
    parts = [Part(uses[0], tuple(uses)) for uses in by_key.values()]
    if len(parts) == 1:
        return parts
    layer = [size for axis, size in enumerate(shape) if axis not in parts[0].matrix.stack_axes]
    # Random numbers tell which matrices are the same: those of a leaf and of its copy in bfloat16, say.
    probe = jnp.asarray(np.random.default_rng(0).uniform(1, 2, layer), jnp.float32)
    distinct: list[tuple[Part, np.ndarray]] = []
    for part in parts:
        matrix = np.asarray(part.matrix.array(probe))
        same = next((n for n, (_, m) in enumerate(distinct) if np.array_equal(m, matrix)), None)
        if same is None:
            distinct.append((part, matrix))
        else:
            other, _ = distinct[same]
            distinct[same] = (other._replace(uses=(*other.uses, *part.uses)), matrix)
    times = sum(np.asarray(part.matrix.spread(layer, 1.0)[1], np.int32) for part, _ in distinct)
    if np.max(times, initial=0) > 1:
        return f"products read its entries as different matrices ({_lines(sites)})"
    return [part._replace(number=number) for number, (part, _) in enumerate(distinct)]


def _lines(sites: Sequence[Site]) -> str:
    return ", ".join(dict.fromkeys(site.source for site in sites))
