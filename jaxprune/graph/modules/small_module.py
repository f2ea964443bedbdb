"""`compact_module`: a smaller module of the same classes, if it computes what `compact` does."""

import sys
from collections.abc import Callable
from typing import Any

from jaxprune.graph.modules.equinox import compact_equinox
from jaxprune.graph.modules.forms import CompactedModule
from jaxprune.graph.modules.nnx import compact_nnx
from jaxprune.graph.plan import Plan
from jaxprune.typing import Masks


def compact_module(
    model: Any,
    masks: Masks | Plan,
    *inputs: Any,
    fix: Callable[[Any], None] | None = None,
    other_modes: bool = True,
    multiple_of: int = 1,
    fold_constants: bool = False,
) -> CompactedModule:
    """Return a smaller flax nnx or equinox module of the same classes that computes what the masked one does.

    `compact` finds the small arrays. A copy of the model gets them, and the library's own layers in it get
    the widths to match (`in_features`, `num_heads`, `groups` and so on). Python code
    may do anything with a width, so nothing is taken on trust: the copy has to compute with the
    same numbers as the masked model (a LayerNorm that now divides by 4 where it divided by 8 does
    not), and has to agree with the function form on the inputs and on random ones, with the small
    params and with others. Where it does not, `module` is None and `why` says what was found.

    Args:
      model: an `nnx.Module` or an `equinox.Module` with its arrays, best in evaluation mode (`model.eval()`,
        `eqx.nn.inference_mode(model)`). It is not changed.
      masks: of an nnx module, bool masks like `nnx.state(model, nnx.Param)`, or like all of
        `nnx.state(model)`; of an equinox module, like `eqx.filter(model, eqx.is_inexact_array)` or
        `eqx.is_array`; or a `Plan`, as loaded from a file, for all arrays but those of random numbers.
      *inputs: example inputs of `model(*inputs)`: equinox modules take one example, without a batch. Bools
        and strings among them are static.
      fix: `fix(module)` sets, on the small copy, attributes of your own classes that hold a width. Those of
        an equinox module are frozen: set them by `object.__setattr__(part, name, width)`.
      other_modes: of an nnx module, also compares after `model.train()`, with dropout left off, and
        `model.eval()`: outputs, and updated statistics. An equinox module is compared in the mode it has.
      multiple_of: as for `compact`.
      fold_constants: as for `compact`.

    Returns:
      A `CompactedModule`. The params of `small` are all of the model's arrays but the keys and
      counts of random numbers; these pass into `module` as they are, and in `small.apply` they are
      those of `model` at every call.

    Raises:
      TypeError: `model` is no such module, or has no values yet; masks are traced or not bool.
      ValueError: masks that mirror neither; a plan that does not fit; the masked network is not finite,
        as for `compact`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
      >>> masks = jp.ones_masks(nnx.state(model, nnx.Param))
      >>> cut = masks["layers"][0]
      >>> cut["kernel"][...] = cut["kernel"][...].at[:, 1].set(False)
      >>> cut["bias"][...] = cut["bias"][...].at[1].set(False)
      >>> small = compact_module(model, masks, jnp.ones((1, 3)))
      >>> [layer.out_features for layer in (small.module.layers[0], small.module.layers[2])]
      [3, 2]
      >>> small.module(jnp.ones((5, 3))).shape, small.why
      ((5, 2), None)
    """
    options = {"multiple_of": multiple_of, "fold_constants": fold_constants}
    # A model can only be of a library that was imported.
    nnx, eqx = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None and isinstance(model, nnx.Module):
        return compact_nnx(nnx, model, masks, inputs, fix, other_modes, options)
    if eqx is not None and isinstance(model, eqx.Module):
        return compact_equinox(eqx, model, masks, inputs, fix, options)
    raise TypeError(
        f"compact_module takes a flax.nnx.Module or an equinox.Module, got {type(model).__name__}. For "
        "anything else, compact(apply_fn, params, masks, *inputs) takes its function."
    )
