"""What an architecture has to say, so that checkpoints of it can be opened, pruned and written back."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Axis(NamedTuple):
    """An axis of a tensor.

    Attributes:
      key: the setting of config.json, or the product of settings, that says how long it is.
      size: how long it is.
    """

    key: str
    size: int


class Tensor(NamedTuple):
    """A tensor that the function reads.

    Attributes:
      path: in the tree of params, "layers/0/query/weight" say.
      name: in the file, "model.layers.0.self_attn.q_proj.weight" say.
      axes: in the order of the file.
    """

    path: str
    name: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(axis.size for axis in self.axes)


class Architecture(NamedTuple):
    """A function of params and tokens, and how a checkpoint says its sizes and names its weights.

    The tree of params is {"embed": ..., "layers": [{...}, ...], "norm": ..., "head": ...}, without "head"
    where it is tied to the embedding. Weights keep the layout of the file.

    Attributes:
      configure: from the settings of config.json to a frozen dataclass of sizes. What it does not implement
        it refuses by its key, with a ValueError.
      tensors: from that dataclass to all that the function reads.
      apply: `apply(config, params, tokens)`, tokens (batch, length) int32 -> logits (batch, length, vocab),
        float32. `params["layers"]` is a list, or one layer's tree with the layers stacked on the first axis.
      with_sizes: `with_sizes(json, params)` returns the settings changed to the sizes of params, which may
        have fewer layers, heads and hidden units. ValueError where config.json has no way to say them.
      prefix: what all names but the head's begin with, in files that were saved with the head.
    """

    configure: Callable[[Mapping[str, Any]], Any]
    tensors: Callable[[Any], list[Tensor]]
    apply: Callable[[Any, Any, Any], Any]
    with_sizes: Callable[[Mapping[str, Any], Any], dict[str, Any]]
    prefix: str

    def names(self, config: Any) -> dict[str, str]:
        """Return the names in the file by the paths of params."""
        return {tensor.path: tensor.name for tensor in self.tensors(config)}

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes by the paths of params."""
        return {tensor.path: tensor.shape for tensor in self.tensors(config)}


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
"""By the names of transformers, those that are implemented."""


def setting(json: Mapping[str, Any], key: str, kind: type, default: Any = None, allowed: Any = None) -> Any:
    """Return a setting of config.json; numbers are positive.

    Args:
      json: the settings.
      key: of the setting.
      kind: int, float, bool or str.
      default: what it is where config.json leaves it out or says null; None if it may not.
      allowed: the values it may have, if not all of its kind.

    Raises:
      ValueError: it is missing, of another kind, not positive, or not among `allowed`.
    """
    value = json.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json has no {key!r}, which says a size of the network.")
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config.json: {key!r} must be of type {kind.__name__}, got {value!r}.")
    if kind in (int, float) and not 0 < value < float("inf"):
        raise ValueError(f"config.json: {key!r} must be above 0, got {value!r}.")
    if allowed is not None and value not in allowed:
        known = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"config.json: {key!r} is {value!r}, which is not implemented; known: {known}.")
    return value


def linear(x: jax.Array, layer: Mapping[str, Any]) -> jax.Array:
    """Return x W^T + b, in float32: x (..., in), weight (out, in), bias (out,) if there is one."""
    y = x @ as_float32(layer["weight"]).T
    return y + as_float32(layer["bias"]) if "bias" in layer else y


def as_float32(weight: Any) -> jax.Array:
    """Cast a weight where it is read, so that the leaf stays in the dtype of the file."""
    return jnp.asarray(weight).astype(jnp.float32)


def embedded(table: Any, tokens: Any) -> jax.Array:
    """Return the rows of a table (vocab, width), in float32; NaN for tokens beyond the last row."""
    return jnp.take(jnp.asarray(table), tokens, axis=0).astype(jnp.float32)


def through_layers(block: Callable[[jax.Array, Any], jax.Array], x: jax.Array, layers: Any) -> jax.Array:
    """Return `x` after all layers, unrolled if they are a list, under `lax.scan` if they are stacked."""
    if isinstance(layers, (list, tuple)):
        for layer in layers:
            x = block(x, layer)
        return x
    return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, layers)[0]


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """Return softmax(scale * Q K^T) V, where each position reads itself and those before it.

    Args:
      query: (batch, length, heads, size).
      key: (batch, length, key heads, size); each serves heads / key heads consecutive heads.
      value: as `key`.
      scale: of the products.

    Returns:
      (batch, length, heads * size).
    """
    batch, length, heads, _ = query.shape
    repeats = heads // key.shape[2]
    key, value = jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, -1)


def depth(params: Any) -> int:
    """Return the number of layers of params, a list or stacked."""
    layers = params["layers"]
    return len(layers) if isinstance(layers, (list, tuple)) else len(jax.tree.leaves(layers)[0])


def size_in_layers(params: Any, module: str, axis: int, key: str) -> int:
    """Return the size of an axis of a module's weight, which must be the same in all layers.

    Raises:
      ValueError: the layers differ, which one number of config.json cannot say.
    """
    layers = params["layers"]
    if not isinstance(layers, (list, tuple)):
        return layers[module]["weight"].shape[1:][axis]
    sizes = [layer[module]["weight"].shape[axis] for layer in layers]
    if len(set(sizes)) > 1:
        found = ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "")
        raise ValueError(
            f"The layers differ in the size of {module!r}: {found}. config.json has one {key!r} for all of "
            "them, so remove as many in each layer."
        )
    return sizes[0]
