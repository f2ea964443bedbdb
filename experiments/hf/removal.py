"""Hidden units, heads and layers of a decoder taken out, so that its checkpoint and its products are smaller.

Every layer loses as many hidden units and heads as the others, since a checkpoint's `config.json` has one
number for all of them. Grouped queries go with the key head that they read. What stays in a layer makes up
for what goes: see `jaxprune.structures.channels` in `jaxprune.prune_layers`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.hf.methods import REFINE
from experiments.hf.opened import Model
from experiments.run.limits import FlagError


class Removal(NamedTuple):
    """What is to be taken out of a decoder.

    Attributes:
      groups: the coupled channels that lose units, of all layers.
      shares: by the name of a group, the share of its units that goes.
      layers: how many layers go.
    """

    groups: tuple[Any, ...]
    shares: dict[str, float]
    layers: int


def plan(model: Model, hidden_units: float, heads: float, layers: int) -> Removal:
    """Return what a share of the hidden units, a share of the heads and some layers are, before any work.

    Raises:
      FlagError: nothing or everything would go, or `config.json` has no way to say what is left.
      ValueError: a decoder whose hidden units or heads cannot be removed by themselves.
    """
    depth = model.config.depth
    if layers >= depth:
        raise FlagError(f"--layers: must be below {depth}, of which one stays; got {layers}")
    shapes = abstract(model.params)
    groups: list[Any] = []
    shares: dict[str, float] = {}
    if hidden_units or heads:
        inner = jp.channel_groups(model.apply_fn, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32)).inner()
        of_layers = [group for group in inner.removable() if group.name.startswith("layers/")]
        asked = {"hidden-units": hidden_units, "heads": heads}
        for flag, share in asked.items():
            if share:
                found = [group for group in of_layers if _is_of_heads(group) == (flag == "heads")]
                if sorted(map(_layer, found)) != list(range(depth)):
                    raise ValueError(f"--{flag}: not every layer has such units that can go alone:\n{inner}")
                _check_share(flag, share, found[0].units)
                groups += found
                shares |= {group.name: share for group in found}
    removal = Removal(tuple(groups), shares, layers)
    try:
        model.architecture.with_sizes(model.json, _shapes_left(shapes, removal))
    except ValueError as error:
        raise FlagError(f"{model.folder}: {error}") from None
    return removal


def _is_of_heads(group: Any) -> bool:
    """Return whether the units are key heads, with what goes with them, and not hidden units.

    A hidden unit is one slice of each param, a head as many as it is wide.
    """
    return max(member.indices.shape[1] for member in group.members) > 1


def _layer(group: Any) -> int:
    return int(group.name.split("/")[1])


def _num_removed(share: float, units: int) -> int:
    """Return how many units go, rounded as `prune_layers` rounds."""
    return round(share * units)


def _check_share(flag: str, share: float, units: int) -> None:
    if not 0 < (gone := _num_removed(share, units)) < units:
        raise FlagError(
            f"--{flag}: {share:g} of the {units} of a layer is {'all' if gone else 'none'} of them: a layer "
            "has to lose one at least, and to keep one"
        )


def _shapes_left(shapes: Any, removal: Removal) -> Any:
    """Return the shapes of params once units and layers are gone."""
    paths, leaves = jp.leaf_paths(shapes), jax.tree.leaves(shapes)
    sizes = {path: list(leaf.shape) for path, leaf in zip(paths, leaves, strict=True)}
    for group in removal.groups:
        for member in group.members:
            gone = _num_removed(removal.shares[group.name], group.units)
            sizes[member.path][member.axis] -= gone * member.indices.shape[1]
    left = jax.tree.unflatten(
        jax.tree.structure(shapes),
        [jax.ShapeDtypeStruct(sizes[path], leaf.dtype) for path, leaf in zip(paths, leaves, strict=True)],
    )
    return {**left, "layers": left["layers"][removal.layers :]}


def without_layers(
    model: Model, batches: Sequence[np.ndarray], count: int
) -> tuple[Any, list[float], list[int]]:
    """Mask the layers that change the direction of what passes through them least.

    Args:
      model: the decoder.
      batches: tokens to calibrate on.
      count: how many layers go.

    Returns:
      Masks, the influence of each layer (`jaxprune.scores.block_influence`), and the layers that go.
    """
    names = [f"layers/{number}" for number in range(model.config.depth)]
    blocks = jp.residual_blocks(model.apply_fn, abstract(model.params), batches[0], prefixes=names)
    score = jp.scores.block_influence(model.apply_fn, blocks)

    @jax.jit
    def influences(params: Any, tokens: jax.Array) -> jax.Array:
        # All entries of a layer have its score.
        layers = score(params, grads=None, key=None, batch=tokens)["layers"]
        return jnp.stack([jax.tree.leaves(layer)[0].ravel()[0] for layer in layers])

    rows = [np.asarray(influences(model.params, tokens), np.float64) for tokens in batches]
    influence = np.average(rows, axis=0, weights=[len(tokens) for tokens in batches])
    gone = sorted(np.argsort(influence, kind="stable")[:count].tolist())
    masks = jp.ones_masks(model.params)
    for number in gone:
        masks["layers"][number] = jax.tree.map(jnp.zeros_like, masks["layers"][number])
    return masks, influence.tolist(), gone


def without_units(
    model: Model,
    params: Any,
    batches: Sequence[np.ndarray],
    removal: Removal,
    gone: Sequence[int],
    checkpoint: str | None,
    progress: Callable[[Any], Any],
) -> Any:
    """Mask hidden units and heads, and solve what reads the others, as `jaxprune.prune_layers` does.

    Args:
      model: the decoder.
      params: its params, perhaps with masked layers.
      batches: tokens to calibrate on.
      removal: what goes.
      gone: the layers that are masked.
      checkpoint: the folder that solved layers are saved in.
      progress: called with the row of each layer.

    Returns:
      What `prune_layers` returns.
    """
    groups = [group for group in removal.groups if _layer(group) not in gone]
    return jp.prune_layers(
        model.apply_fn,
        params,
        batches,
        None,
        {group.name: removal.shares[group.name] for group in groups},
        structure=jp.structures.channels(groups),
        refine=REFINE,
        checkpoint=checkpoint,
        progress=progress,
    )


def abstract(params: Any) -> Any:
    """Return the shapes and dtypes of params."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
