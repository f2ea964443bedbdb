"""Which groups of inputs to remove from the layers that read them: the surgeon's greedy choice."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from jaxprune.calibration.solvers.factors import damped_gram, scaled_to_ones
from jaxprune.calibration.solvers.pattern import matmul
from jaxprune.calibration.solvers.rows import support_inverse


class Consumer(NamedTuple):
    """A layer that reads the channels.

    Attributes:
      weight: (out, in).
      gram: (in, in), of its inputs.
      groups: for each input the number of the channel it belongs to, or -1 if it is never removed; static.
    """

    weight: jax.Array
    gram: jax.Array
    groups: Sequence[int] | np.ndarray


def choose_columns(
    consumers: Sequence[Consumer], num_groups: int, count: int | jax.Array, damping: float = 1e-4
) -> jax.Array:
    """Remove the group of inputs that costs least, again and again, each time making up for it.

    With `P = H^-1` over the inputs that are left, removing the group G from a layer raises its squared error
    by `tr(w_G (P_GG)^-1 w_G^T)`, w_G being the columns of all outputs, once the others have made up for it by
    `w <- w - w_G (P_GG)^-1 P_G`. The errors of several layers that read the same channels are added.

    Args:
      consumers: the layers.
      num_groups: how many groups there are; a group need not occur in each layer.
      count: how many to remove; it may be traced.
      damping: added to the diagonal of H in units of itself, and raised while H has no inverse.

    Returns:
      bool (num_groups,), True where kept; of groups that cost the same the first goes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.calibration.solvers.columns import Consumer, choose_columns
      >>> weight = jnp.array([[1.0, 1.0, 0.5, 3.0]])
      >>> choose_columns([Consumer(weight, jnp.eye(4), [0, 0, 1, 2])], 3, 1).tolist()
      [True, False, True]

    References:
      Kurtic et al., "ZipLM", NeurIPS 2023, arXiv:2302.04089. Meng et al., "OSSCAR", ICML 2024,
      arXiv:2403.12983.
    """
    layers = [_layer(each, num_groups, damping) for each in consumers]
    members = [_members(np.asarray(each.groups), num_groups) for each in consumers]

    def step(_: jax.Array, state: tuple[jax.Array, list[_Layer]]) -> tuple[jax.Array, list[_Layer]]:
        kept, layers = state
        costs = jnp.sum(
            jnp.stack([_costs(*pair) for pair in zip(layers, members, strict=True)]),
            axis=0,
        )
        at = jnp.argmin(jnp.where(kept, costs, jnp.inf))
        layers = [_without(layer, of[at]) for layer, of in zip(layers, members, strict=True)]
        return kept.at[at].set(False), layers

    return lax.fori_loop(0, count, step, (jnp.ones(num_groups, bool), layers))[0]


class _Layer(NamedTuple):
    """Weights with the inverse Gram matrix; a column beyond the last, of zeros, pads small groups."""

    weight: jax.Array
    inverse: jax.Array


def _layer(consumer: Consumer, num_groups: int, damping: float) -> _Layer:
    weight, gram, groups = consumer
    if len(groups) != weight.shape[1] or np.max(groups, initial=-1) >= num_groups:
        raise ValueError(
            f"groups must give each of {weight.shape[1]} inputs a number below {num_groups}, got "
            f"{len(groups)} of at most {np.max(groups, initial=-1)}."
        )
    unit_gram, sizes = scaled_to_ones(gram[None])
    inverse = support_inverse(damped_gram(unit_gram, damping)[0], jnp.ones(gram.shape[0], bool))
    return _Layer(jnp.pad(weight * sizes, ((0, 0), (0, 1))), jnp.pad(inverse, ((0, 1), (0, 1))))


def _members(groups: np.ndarray, num_groups: int) -> jax.Array:
    """Return the inputs of each group, (num_groups, largest size), padded with the number of inputs."""
    inside = [np.flatnonzero(groups == number) for number in range(num_groups)]
    largest = max(1, max(map(len, inside), default=1))
    padded = [np.pad(each, (0, largest - len(each)), constant_values=len(groups)) for each in inside]
    return jnp.asarray(np.array(padded, np.int32).reshape(num_groups, largest))


def _block(layer: _Layer, members: jax.Array) -> jax.Array:
    """Return P_GG, with ones on the diagonal for what is padding or removed."""
    block = layer.inverse[members[:, None], members[None, :]]
    diagonal = jnp.diagonal(block)
    return block + jnp.diag(jnp.where(diagonal == 0, 1, 0).astype(block.dtype))


def _costs(layer: _Layer, members: jax.Array) -> jax.Array:
    def cost(of_group: jax.Array) -> jax.Array:
        columns = layer.weight[:, of_group].T
        if members.shape[1] == 1:
            return jnp.sum(columns**2) / _block(layer, of_group)[0, 0]
        return jnp.sum(columns * cho_solve(cho_factor(_block(layer, of_group), lower=True), columns))

    if members.shape[1] == 1:
        return jax.vmap(cost)(members)
    return lax.map(cost, members, batch_size=max(1, 2**20 // (members.shape[1] * layer.weight.shape[0])))


def _without(layer: _Layer, members: jax.Array) -> _Layer:
    """Remove a group, and make up for it."""
    rows = layer.inverse[members]
    made_up = cho_solve(cho_factor(_block(layer, members), lower=True), rows)
    weight = layer.weight - matmul(layer.weight[:, members], made_up)
    inverse = layer.inverse - matmul(rows.T, made_up)
    # What is left of the group's rows and columns are rounding errors.
    return _Layer(weight.at[:, members].set(0), inverse.at[members, :].set(0).at[:, members].set(0))
