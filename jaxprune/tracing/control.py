"""Control flow that stays cheap under `vmap`."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

__all__ = ["update_if"]

T = TypeVar("T")


def update_if(due: jax.Array, update: Callable[[T], T], state: T) -> T:
    """Return `update(state)` if due, else `state`; `update` runs only if some element of a `vmap` is due.

    Where `due` has a value now (outside `jit`), a Python `if` decides, and `update` may warn and raise.

    Under `vmap` a `lax.cond` whose predicate is batched becomes a select, which runs both branches
    at every step of a training loop. Here the predicate is one for the whole batch, "is any element due",
    and the elements that are not due keep their state.

    Args:
      due: bool scalar.
      update: from a state to one of the same structure, shapes and dtypes.
      state: a pytree of arrays.

    Returns:
      The new state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxprune.tracing.control import update_if
      >>> x = jnp.array([[3.0, 1.0], [4.0, 2.0]])
      >>> jax.vmap(lambda due, row: update_if(due, jnp.sort, row))(jnp.array([True, False]), x).tolist()
      [[1.0, 3.0], [4.0, 2.0]]
    """
    if not isinstance(due, Tracer):
        return update(state) if due else state

    def some(state: T) -> T:
        return jax.tree.map(partial(jnp.where, due), update(state), state)

    return lax.cond(_somewhere(due), some, lambda state: state, state)


@jax.custom_batching.custom_vmap
def _somewhere(flag: jax.Array) -> jax.Array:
    """Return the flag; under `vmap`, whether any flag of the batch is set, as one unbatched scalar."""
    return flag


@_somewhere.def_vmap
def _somewhere_batched(axis_size: int, in_batched: list[bool], flag: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size
    # Called again, so that a further vmap around this one is reduced in the same way.
    return (_somewhere(jnp.any(flag)) if in_batched[0] else flag), False
