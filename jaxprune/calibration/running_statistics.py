"""`reestimate_statistics`: the running statistics of a network after pruning, those of BatchNorm say."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.batches import batches_of
from jaxprune.tree.calls import check_call
from jaxprune.tree.leaves import flatten, is_concrete

_CALL = "reestimate_statistics(update_fn, state, batches)"
_MANY = 2**24
"""An update so late that corrections for the first ones have vanished."""
_FORGOTTEN = 1e-8
"""What may be left of the state before the first update, as a fraction."""


def reestimate_statistics(update_fn: Callable[..., Any], state: Any, batches: Iterable[Any]) -> Any:
    """Replace running statistics by the plain mean of the batches' own statistics.

    The mean and variance that a BatchNorm layer has accumulated are those of the dense network. After
    pruning, or after solving for new weights, the layer reads other values, and a network with stale
    statistics can be far worse than with its own. This runs the network in training mode on some batches,
    without changing its params.

    In training mode the network moves each statistic a bit towards that of the batch,

        new = m old + (1 - m) batch,

    so that after a few batches the old values still count: with m = 0.99, a third of them after 110. Here
    they do not count at all. Two calls with different old values show what m is, entry by entry, and so what
    `batch` is, which is averaged over the batches, each counting alike. So the momentum need not be known,
    and may differ from layer to layer.

    Leaves that a call does not change stay as they are, to the bit. So do integers and random keys, except
    signed integers that a call increases by 1. They count updates, and some layers divide their statistics by
    `1 - m^count`, which corrects for a start at zero (Haiku's, and `mode="batch"` of equinox). They are
    raised to a number for which that is 1.

    Args:
      update_fn: `update_fn(state, *batch) -> new_state`: the state after the network, in training mode, has
        seen a batch. With flax linen it is
        `lambda s, x: model.apply({"params": params, **s}, x, train=True, mutable=["batch_stats"])[1]`.
      state: a tree of arrays with the running statistics.
      batches: a list of batches. A batch is an array, or a tuple that is unpacked, or another tree of arrays,
        which is one input. Batches as large as those in training give statistics like those in training.

    Returns:
      A tree like `state`.

    Raises:
      ValueError: no batch; batches of different structures; a new state unlike the old; no statistic, because
        the network does not run in training mode; statistics that do not follow the formula above.
      TypeError: arguments of other kinds, or a traced state.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> update_fn = lambda state, x: {"mean": 0.9 * state["mean"] + 0.1 * x.mean(0)}
      >>> batches = [jnp.array([[1.0, 2.0], [3.0, 2.0]]), jnp.array([[6.0, 8.0]])]
      >>> state = jp.reestimate_statistics(update_fn, {"mean": jnp.array([50.0, 50.0])}, batches)
      >>> print(state["mean"].round(4))
      [4. 5.]

    References:
      Ioffe & Szegedy, "Batch Normalization", ICML 2015, Algorithm 2. Statistics computed anew over fixed
      weights: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, 2021 (precise BatchNorm).
    """
    listed = [batch.inputs for batch in batches_of(batches, None, "reestimate_statistics")]
    check_call(_CALL, update_fn, (state, *listed[0]), {})
    leaves = flatten(state, "state")
    if not is_concrete(leaves.by_path):
        raise TypeError("reestimate_statistics runs outside jit: the state is traced.")
    old = {path: jnp.asarray(leaf) for path, leaf in leaves.by_path.items()}

    @jax.jit
    def call(by_path: Mapping[str, Any], batch: Any) -> dict[str, Any]:
        new = update_fn(leaves.tree(by_path), *batch)
        if jax.tree.structure(new) != leaves.treedef:
            raise ValueError(
                "update_fn must return a state of the same structure as it is given, "
                f"{leaves.treedef}; it returned {jax.tree.structure(new)}."
            )
        return dict(zip(by_path, jax.tree.leaves(new), strict=True))

    first = call(old, listed[0])
    # A leaf that stays is no statistic, or one that has the batch's value already: a small push tells.
    still = [path for path in old if _is_floating(old[path]) and _equal(first[path], old[path])]
    pushed = old | {path: old[path] + old[path] / 64 + jnp.ones((), old[path].dtype) / 64 for path in still}
    second = call(pushed, listed[0]) if still else {}
    constant = {path for path in still if _equal(second[path], pushed[path])}
    statistics = [path for path in old if _is_floating(old[path]) and path not in constant]
    counters = [
        path
        for path, leaf in old.items()
        if jnp.issubdtype(leaf.dtype, jnp.signedinteger)
        and _equal(first[path], leaf + jnp.ones((), leaf.dtype))
    ]
    if not statistics:
        raise ValueError(
            "reestimate_statistics: update_fn changes no floating-point leaf of the state. Run the network "
            "in training mode, and return its new state."
        )

    def updated(values: Mapping[str, np.ndarray], batch: Any) -> dict[str, np.ndarray]:
        """Return the statistics after a batch, in float64, given some before it, after many updates."""
        given = dict(old)
        for path in counters:
            given[path] = jnp.full_like(old[path], min(_MANY, jnp.iinfo(old[path].dtype).max // 2))
        for path, value in values.items():
            given[path] = jnp.asarray(value, jnp.promote_types(old[path].dtype, jnp.float32))
        new = call(given, batch)
        return {path: np.asarray(new[path], np.float64) for path in values}

    zeros = {path: np.zeros(old[path].shape) for path in statistics}
    from_zero = updated(zeros, listed[0])
    momentum = _momenta(from_zero, lambda values: updated(values, listed[0]))
    total = {path: from_zero[path] / (1 - momentum[path]) for path in statistics}
    _check_fixed(total, updated(total, listed[0]))
    for batch in listed[1:]:
        after = updated(zeros, batch)
        total = {path: total[path] + after[path] / (1 - momentum[path]) for path in statistics}
    result = dict(old)
    for path in statistics:
        result[path] = jnp.asarray(total[path] / len(listed), old[path].dtype)
    slowest = max(float(m.max(initial=0.0)) for m in momentum.values())
    needed = int(np.ceil(np.log(_FORGOTTEN) / np.log(slowest))) if 0 < slowest < 1 else 1
    for path in counters:
        result[path] = jnp.maximum(old[path], jnp.asarray(needed, old[path].dtype))
    return leaves.tree(result)


def _momenta(
    from_zero: Mapping[str, np.ndarray], updated: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return m of each entry, by what of a large old value is left in the new one.

    The old value is a power of two above all new values from zero, so that the difference is rounded by no
    more than m itself is.
    """
    probes = {
        path: np.full(array.shape, 2.0 ** np.ceil(np.log2(max(1.0, float(np.abs(array).max(initial=0.0))))))
        for path, array in from_zero.items()
    }
    after = updated(probes)
    momenta = {}
    for path, probe in probes.items():
        m = (after[path] - from_zero[path]) / probe
        middle = np.median(m) if m.size else 0.0
        # One layer has one momentum, of which the middle of many entries is less rounded than each.
        momenta[path] = np.full(m.shape, middle) if np.allclose(m, middle, rtol=0, atol=1e-5) else m
        if not np.all((m > -1e-3) & (m < 1 - 1e-6)):
            raise ValueError(_unfit(path, f"an old value enters the new one with a weight of {m.max():.6g}"))
    return momenta


def _check_fixed(batch: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    """Check that an update by a batch leaves the statistics of that batch where they are."""
    for path, array in batch.items():
        gap, size = np.abs(after[path] - array).max(initial=0.0), np.abs(array).max(initial=0.0)
        if not gap <= 1e-3 * size:
            raise ValueError(
                _unfit(path, f"an update by a batch moves the statistics of that same batch by {gap:.3g}")
            )


def _unfit(path: str, why: str) -> str:
    return (
        f"reestimate_statistics: state[{path!r}] is not updated as m old + (1 - m) batch: {why}. Either the "
        "statistics of the batch are not finite, or the network in training mode normalises by the running "
        "statistics themselves (equinox with mode='ema'). Leave such leaves out of the state."
    )


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _equal(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and bool(jnp.array_equal(a, b))
