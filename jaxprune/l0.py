"""L0 regularisation: gates that learn which weights, or whole slices, are exactly zero.

Each gate z multiplies a weight, or a slice of weights. In training z is random in [0, 1], and exactly 0 or
exactly 1 with some probability (the hard-concrete distribution). So the expected number of nonzero weights is
differentiable in the logits of the gates, and can be a term of the loss.

With u uniform in (0, 1), `beta = 2/3`, `gamma = -0.1` and `zeta = 1.1`:

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = min(1, max(0, s * (zeta - gamma) + gamma))
    P(z != 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))

Gates are a dict of logits `log_alpha` by leaf path, trained beside the params. Gates that do not fit the
params raise ValueError, and anything but a dict of floating-point arrays raises TypeError:

```python
gates = jp.l0.init_gates(params, jax.random.key(0), axis=-2)       # one per input neuron

def loss_fn(trained, batch, key):
    params, gates = trained
    gated = jp.l0.apply_gates(params, jp.l0.sample_gates(gates, key))
    return task_loss(gated, batch) + strength * jp.l0.expected_l0(params, gates)

# ... train (params, gates) with any optimizer, then fold the gates into the weights:
masks = jp.l0.gate_masks(params, gates)
params = jp.l0.apply_gates(params, jp.l0.expected_gates(gates))
tx = jp.keep_masked(optax.adam(1e-3), masks)
```

References:
  Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018.
  Their code also clips the logits after each step, and can add an L2 penalty weighted by P(z != 0).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.structures import slices
from jaxprune.tree.checks import check_key, check_number
from jaxprune.tree.leaves import array_leaves, describe, flatten, is_array, is_concrete
from jaxprune.tree.masks import ones_masks
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Masks, Params, Where

__all__ = ["apply_gates", "expected_gates", "expected_l0", "gate_masks", "init_gates", "sample_gates"]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""The temperature of a gate, and the ends of the interval that it is stretched to; the paper's values."""

Gates = dict[str, jax.Array]
"""Arrays by leaf path, each of the leaf's shape, with size 1 along the axes that share a gate."""


def init_gates(
    params: Params,
    key: jax.Array,
    *,
    where: Where = kernels,
    axis: int | Sequence[int] | None = None,
    drop_rate: float = 0.5,
) -> Gates:
    """Draw initial gate logits: `log_alpha ~ Normal(log(1 - drop_rate) - log(drop_rate), 0.01)`.

    For gates of different kinds, make each kind for its leaves and join the dicts:
    `init_gates(params, key, where=is_dense, axis=-2) | init_gates(params, key, where=is_conv, axis=-1)`.

    Args:
      params: a pytree of arrays.
      key: a PRNG key. Each leaf draws with the key folded with its index.
      where: which leaves get gates, a function of (path, leaf).
      axis: None for one gate per entry; or the axis, or axes, that index the slices with one gate each, as in
        `structures.slices`: with flax's layouts -2 is the input neuron, -1 the output.
      drop_rate: the probability, in (0, 1), that a gate starts nearer to closed than to open. With a small
        one the network starts nearly dense.

    Returns:
      A dict from leaf path to float32 logits: of the leaf's shape, or with size 1 for all axes but
      `axis`, as (784, 1) for `axis=-2` of a 784 x 300 kernel.

    Raises:
      ValueError: `where` matches nothing, a leaf does not have the axis, or `drop_rate` is out of range.
      TypeError: a leaf that `where` matches is not floating-point, or `key` is not a PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> gates = jp.l0.init_gates(params, jax.random.key(0), axis=-2)
      >>> {path: log_alpha.shape for path, log_alpha in gates.items()}
      {'kernel': (3, 1)}
    """
    check_number(drop_rate, "drop_rate", "between 0 and 1")
    check_key(key, "init_gates")
    if not 0 < drop_rate < 1:
        raise ValueError(f"drop_rate must lie strictly between 0 and 1, got {drop_rate}.")
    center = math.log(1 - drop_rate) - math.log(drop_rate)
    leaves, chosen = array_leaves(params), set(selected(params, where))

    def draw(index, path):
        leaf_key = jax.random.fold_in(key, index)
        return center + 0.01 * jax.random.normal(leaf_key, _gate_shape(path, leaves[path], axis), jnp.float32)

    return {path: draw(index, path) for index, path in enumerate(leaves) if path in chosen}


def sample_gates(gates: Gates, key: jax.Array) -> Gates:
    """Sample random gates z in [0, 1] for a training step, by the formula at the top of this module.

    Sample anew for each batch; or, to lower the variance, for each example, with `vmap` over keys.

    Args:
      gates: logits, from `init_gates`.
      key: a PRNG key. Each leaf draws with the key folded with its index.

    Returns:
      A dict like `gates`, differentiable in the logits where a gate is neither 0 nor 1.

    Raises:
      TypeError: `key` is not a PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> gates = {"kernel": jnp.array([[-20.0], [20.0]])}
      >>> jp.l0.sample_gates(gates, jax.random.key(0))["kernel"].tolist()
      [[0.0], [1.0]]
    """
    _check_gates(gates, "gates")
    check_key(key, "sample_gates")
    # In the order of `jax.tree.leaves`, which is the same under `jit`; the order of the dict is not.
    leaves, treedef = jax.tree.flatten(gates)

    def draw(index, log_alpha):
        noise = jax.random.logistic(jax.random.fold_in(key, index), log_alpha.shape, log_alpha.dtype)
        return _stretched(jax.nn.sigmoid((noise + log_alpha) / BETA))

    return jax.tree.unflatten(treedef, [draw(index, leaf) for index, leaf in enumerate(leaves)])


def expected_gates(gates: Gates) -> Gates:
    """Compute the gates at test time: `min(1, max(0, sigmoid(log_alpha) * (zeta - gamma) + gamma))`.

    This is the paper's estimate, not the mean of the random gates.

    Args:
      gates: logits from `init_gates`.

    Returns:
      A dict like `gates`, of z in [0, 1]; exactly 0 where `log_alpha <= -log(11)`, about -2.4.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.l0.expected_gates({"kernel": jnp.array([[-3.0], [0.0], [3.0]])})["kernel"].tolist()
      [[0.0], [0.5], [1.0]]
    """
    _check_gates(gates, "gates")
    return jax.tree.map(lambda log_alpha: _stretched(jax.nn.sigmoid(log_alpha)), gates)


def expected_l0(params: Params, gates: Gates) -> jax.Array:
    """Compute the penalty, the expected number of gated weights that are nonzero.

        sum over gates of (entries per gate) * sigmoid(log_alpha - beta * log(-gamma / zeta))

    Args:
      params: a pytree of arrays; only their shapes matter.
      gates: logits from `init_gates`.

    Returns:
      A float32 scalar, differentiable in the logits. Leaves without gates do not count.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.ones((2, 5)), "bias": jnp.ones(5)}
      >>> float(jp.l0.expected_l0(params, {"kernel": jnp.array([[50.0], [-50.0]])}))
      5.0
    """
    leaves = _gated(params, gates, "gates")
    shift = BETA * math.log(-GAMMA / ZETA)

    def nonzeros(path, log_alpha):
        entries = leaves[path].size // max(log_alpha.size, 1)
        return entries * jnp.sum(jax.nn.sigmoid(log_alpha.astype(jnp.float32) - shift))

    # In leaf order, so that the sum rounds alike in any order of the dict, which `jit` sorts.
    return jnp.sum(jnp.stack([nonzeros(path, gates[path]) for path in leaves if path in gates]))


def apply_gates(params: Params, z: Gates) -> Params:
    """Multiply params by gates, `p * z`: exactly 0 where a gate is 0, even for NaN and inf.

    Args:
      params: a pytree of arrays.
      z: gates in [0, 1], from `sample_gates` or `expected_gates`.

    Returns:
      A tree like `params`, of the same dtypes; leaves without gates are unchanged.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.array([[2.0, 4.0], [jnp.nan, 6.0]])}
      >>> jp.l0.apply_gates(params, {"kernel": jnp.array([[0.5], [0.0]])})["kernel"].tolist()
      [[1.0, 2.0], [0.0, 0.0]]
    """
    leaves = _gated(params, z, "z")

    def gated(leaf, gate):
        where_open = jnp.where(gate != 0, leaf, jnp.zeros((), leaf.dtype))
        return where_open * gate.astype(leaf.dtype)

    return flatten(params).tree(leaves | {path: gated(leaves[path], gate) for path, gate in z.items()})


def gate_masks(params: Params, gates: Gates) -> Masks:
    """Return masks that prune the entries whose gate is closed at test time, by `expected_gates`.

    Also multiply the weights by the gates, `apply_gates(params, expected_gates(gates))`: masks alone would
    open half-open gates fully. Then fine-tune with `keep_masked`.

    Args:
      params: a pytree of arrays.
      gates: logits from `init_gates`.

    Returns:
      A tree like `params` of bool masks, all True for leaves without gates.

    Warns:
      UserWarning: all gates of a leaf are closed, which cuts the network there.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> masks = jp.l0.gate_masks(params, {"kernel": jnp.array([[3.0], [-3.0]])})
      >>> masks["kernel"].tolist(), masks["bias"].tolist()
      ([[True, True], [False, False]], [True, True])
    """
    leaves = _gated(params, gates, "gates")
    opened = {path: gate > 0 for path, gate in expected_gates(gates).items()}
    for path, gate in opened.items():
        if is_concrete(gate) and gate.size and not bool(jnp.any(gate)):
            warnings.warn(
                f"All gates of params[{path!r}] are closed, which cuts the network there. Train with a "
                "weaker penalty, or leave the leaf out with where=... of init_gates.",
                stacklevel=2,
            )
    masks = flatten(ones_masks(params), "masks")
    kept = {path: jnp.broadcast_to(gate, leaves[path].shape) for path, gate in opened.items()}
    return masks.tree(masks.by_path | kept)


def _stretched(s: jax.Array) -> jax.Array:
    return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def _gate_shape(path: str, leaf: Any, axis: int | Sequence[int] | None) -> tuple[int, ...]:
    if axis is None:
        return leaf.shape
    # `slices` knows and checks the axes; kept dimensions make its units broadcast against the leaf.
    structure = slices(axis, norm=partial(jnp.sum, keepdims=True))
    scores, mask = (jax.ShapeDtypeStruct(leaf.shape, dtype) for dtype in (jnp.float32, jnp.bool_))
    units = jax.eval_shape(lambda s, m: structure.pool({path: s}, {path: m}).scores, scores, mask)
    return units[path].shape


def _check_gates(gates: Any, what: str) -> None:
    """Check that gates are a dict of floating-point arrays."""
    if not isinstance(gates, Mapping):
        raise TypeError(
            f"{what} must be a dict from leaf path to array, as init_gates makes it, got a "
            f"{type(gates).__name__}."
        )
    if not gates:
        raise ValueError(f"{what} is an empty dict, so nothing would be gated.")
    for path, gate in gates.items():
        if not is_array(gate) or not jnp.issubdtype(gate.dtype, jnp.floating):
            got = describe(gate) if is_array(gate) else f"a {type(gate).__name__}"
            raise TypeError(f"{what}[{path!r}] is {got}; gates are floating-point arrays.")


def _gated(params: Params, gates: Any, what: str) -> dict[str, Any]:
    """Check that gates fit the params, and return the params by path."""
    leaves = array_leaves(params)
    _check_gates(gates, what)
    for path, gate in gates.items():
        if path not in leaves:
            raise ValueError(f"{what}[{path!r}] fits no leaf of params. The leaves are: {', '.join(leaves)}.")
        shape = leaves[path].shape
        if gate.ndim != len(shape) or any(
            size not in (1, full) for size, full in zip(gate.shape, shape, strict=True)
        ):
            raise ValueError(
                f"{what}[{path!r}] has shape {tuple(gate.shape)}, which does not fit params[{path!r}] of "
                f"shape {tuple(shape)}: each axis must have the leaf's size, or 1 where gates are shared."
            )
    return leaves
