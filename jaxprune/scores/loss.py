"""Scores made from a loss function: its curvature, its gradient per example, its very change.

Each factory takes `loss_fn(params, batch)`, the mean loss over the examples of the batch, as it
is evaluated: without dropout, and with the running statistics of norms. It returns a score, to
which the data is passed as `batch=...`:

```python
masks = jp.prune_once(params, jp.scores.fisher(loss_fn), sparsity=0.5, batch=batch)
```

Params and data in narrower floats than float32 are promoted to it, if `loss_fn` takes them so: in float16
gradients vanish, and losses that are compared round to the same number.

The loss is taken as a function of the leaves that the factory's own `where` takes in. All others
are held fixed and score NaN, so give `prune_once` a `where` that takes in no more.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.scores.common import (
    LossFn,
    Objective,
    cut,
    end_to_end,
    gradients,
    in_float32,
    leading_size,
    map_leaves,
    objective,
)
from jaxprune.scores.curvature import check_damping, inverse_hessian
from jaxprune.tree.checks import as_integer, check_function
from jaxprune.tree.dtypes import promote_to_float32
from jaxprune.tree.where import kernels
from jaxprune.typing import Params, ScoreFn, Scores, Where


def grasp(loss_fn: LossFn, *, where: Where = kernels) -> ScoreFn:
    """How much each weight preserves the flow of gradients: `w * (H g)`, signed.

    Removing w changes `g^T g`, to first order, by `-2 w (H g)`. The paper calls `-w (H g)` the
    importance and removes the weights for which it is *largest*, whose removal lets the gradient
    grow most. We return its negative, so that larger means keep and the same weights go.

    The product with the Hessian H is forward over reverse differentiation: it costs about two
    gradients. The paper uses some 10 examples of each class, at initialisation, and divides the
    logits by 200 before the softmax: do so in `loss_fn`.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss.
      where: the leaves that g and H are of. The paper's are the kernels alone, without biases.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out.

    Raises:
      TypeError: `loss_fn` is not a function; on use, a leaf or a loss that is not real.
      ValueError: on use, no batch, or a `where` that matches nothing.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, x: jnp.sum(x * params["w"] ** 2) / 2  # g = x w, H = diag(x)
      >>> score = jp.scores.grasp(loss_fn)
      >>> score({"w": jnp.array([[3.0, -1.0]])}, batch=jnp.array([[1.0, 2.0]]))["w"].tolist()
      [[9.0, 4.0]]

    References:
      Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
      Their code also divides by the sum of all scores, which ranks alike.
    """
    check_function(loss_fn, "scores.grasp", "loss_fn(params, batch)")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        goal = objective("scores.grasp", loss_fn, params, batch, where)
        gradient, hessian_times = jax.linearize(jax.grad(goal.loss), goal.leaves)
        return goal.scores([w * hg for w, hg in zip(goal.leaves, hessian_times(gradient), strict=True)])

    return score


def fisher(loss_fn: LossFn, *, where: Where = kernels, chunk: int = 32) -> ScoreFn:
    """The change of the loss by the empirical Fisher's diagonal: `w^2 * mean_i(g_i^2) / 2`.

    `g_i` is the gradient of example i alone; the square of the mean gradient would be another
    thing, near 0 on a trained network. For a log-likelihood the mean of `g_i^2` approximates the
    diagonal of the Hessian, so this is `obd` without its second derivatives, and never negative.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`. It is called on batches of one example: each
        leaf of the batch keeps its leading axis, of size 1.
      where: the leaves that are scored.
      chunk: how many examples are worked on at once; memory holds their gradients.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out. The leaves of the
      batch have a leading axis of examples.

    Raises:
      TypeError: `loss_fn` is not a function; on use, a leaf or a loss that is not real.
      ValueError: `chunk` below 1; on use, no batch, leaves of it without a common leading axis, or
        a `where` that matches nothing.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, x: jnp.mean(x @ params["kernel"])  # g_i = x_i
      >>> score = jp.scores.fisher(loss_fn)
      >>> params, x = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> score(params, batch=x)["kernel"].tolist()
      [[0.5], [2.0]]

    References:
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning",
      arXiv:1801.05787 (of whole feature maps; for single weights it is this).
    """
    check_function(loss_fn, "scores.fisher", "loss_fn(params, batch)")
    chunk = as_integer(chunk, "chunk", at_least=1, what="examples at once")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        goal = objective("scores.fisher", loss_fn, params, batch, where)
        number, batch = leading_size(batch, "batch", "examples"), goal.batch
        size = min(chunk, number)
        whole = number // size * size

        def squares(example):
            one = jax.tree.map(lambda leaf: leaf[None], example)
            return [g * g for g in jax.grad(goal.loss)(goal.leaves, one)]

        def add(total, examples):
            new = [jnp.sum(square, axis=0) for square in jax.vmap(squares)(examples)]
            return [t + n for t, n in zip(total, new, strict=True)]

        chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, size, *leaf.shape[1:]), batch)
        zeros = [jnp.zeros_like(leaf) for leaf in goal.leaves]
        total, _ = lax.scan(lambda total, examples: (add(total, examples), None), zeros, chunks)
        if whole < number:
            total = add(total, jax.tree.map(lambda leaf: leaf[whole:], batch))
        return goal.scores([w * w * (t / number) / 2 for w, t in zip(goal.leaves, total, strict=True)])

    return score


def obd(loss_fn: LossFn, *, samples: int | None = None, where: Where = kernels, chunk: int = 32) -> ScoreFn:
    """Optimal Brain Damage: `h_kk w_k^2 / 2`, with the diagonal of the loss's Hessian.

    What removing one weight adds to the loss at a minimum, to second order and by itself. The
    diagonal is exact, from one Hessian-vector product for each weight: for small networks. With
    `samples` it is Hutchinson's estimate, the mean of `z * (H z)` over random signs z: unbiased,
    at one product for each sample, with a variance of `sum_{j != k} h_kj^2 / samples`.

    Where the curvature is negative, so is the score, and the weight goes first. It is not
    clipped: at a minimum there is no negative curvature, and elsewhere the formula does not hold.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss.
      samples: None for the exact diagonal, or how many random vectors estimate it.
      where: the leaves that are scored.
      chunk: how many products of the exact diagonal are computed at once.

    Returns:
      A score `score(params, *, batch, key=None, **extra)`, NaN for the leaves left out. With
      `samples` it needs a key.

    Raises:
      TypeError: `loss_fn` is not a function; on use, a leaf or a loss that is not real.
      ValueError: `samples` or `chunk` below 1; on use, no batch, no key where one is needed, or a
        `where` that matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, x: jnp.sum(x * params["w"] ** 2) / 2
      >>> params, x = {"w": jnp.array([[3.0, -1.0]])}, jnp.array([[1.0, -2.0]])
      >>> jp.scores.obd(loss_fn)(params, batch=x)["w"].tolist()
      [[4.5, -1.0]]
      >>> score = jp.scores.obd(loss_fn, samples=1)
      >>> score(params, batch=x, key=jax.random.key(0))["w"].tolist()
      [[4.5, -1.0]]

    References:
      LeCun et al., "Optimal Brain Damage", NIPS 1989 (with the Gauss-Newton diagonal, never
      negative, by its own backpropagation); Hutchinson, "A stochastic estimator of the trace of
      the influence matrix for Laplacian smoothing splines", 1989.
    """
    check_function(loss_fn, "scores.obd", "loss_fn(params, batch)")
    chunk = as_integer(chunk, "chunk", at_least=1, what="products at once")
    if samples is not None:
        samples = as_integer(
            samples, "samples", at_least=1, what="random vectors; None for the exact diagonal"
        )

    def score(params: Params, *, batch: Any = None, key: Any = None, **extra: Any) -> Scores:
        del extra
        goal = objective("scores.obd", loss_fn, params, batch, where)
        if samples is None:
            diagonal = _hessian_diagonal(goal, chunk)
        elif key is None:
            raise ValueError("scores.obd with samples needs a PRNG key: pass key=jax.random.key(0).")
        else:
            diagonal = _estimated_diagonal(goal, samples, key)
        return goal.scores([h * w * w / 2 for h, w in zip(diagonal, goal.leaves, strict=True)])

    return score


def obs(loss_fn: LossFn, *, damping: float = 0.0, where: Where = kernels) -> ScoreFn:
    """Optimal Brain Surgeon's saliency: `w_q^2 / (2 [H^-1]_qq)`, with the whole Hessian.

    What removing one weight adds to the loss at a minimum, to second order, if all other weights
    then move to make up for it as well as they can. `jaxprune.optimal_brain_surgeon` moves
    them; without that the loss rises by more. Weights that are 0 already count among those that
    can move: to prune further, pass that function the masks instead.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss.
      damping: what is added to the diagonal of H, 0 or more.
      where: the leaves that H is of, of at most 5,000 entries in all.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out; under `jit` also
      where the Hessian is not positive definite.

    Raises:
      TypeError: `loss_fn` is not a function; on use, a leaf or a loss that is not real.
      ValueError: `damping` is negative; on use, too many weights, no batch, a `where` that matches
        nothing, or (not under `jit`) a Hessian that is not positive definite.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["w"]) ** 2) / 2  # H = x^T x
      >>> x = jnp.array([[1.0, 1.0], [0.0, 1.0]])  # H^-1 = [[2, -1], [-1, 1]]
      >>> jp.scores.obs(loss_fn)({"w": jnp.array([[2.0], [2.0]])}, batch=x)["w"].tolist()
      [[1.0], [2.0]]

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
      NIPS 5, 1993. They build H^-1 from outer products of gradients (Gauss-Newton); H is exact here.
    """
    check_function(loss_fn, "scores.obs", "loss_fn(params, batch)")
    check_damping(damping, "scores.obs")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        goal = objective("scores.obs", loss_fn, params, batch, where)
        weights = end_to_end(goal.leaves)
        inverse = inverse_hessian("scores.obs", lambda v: goal.loss(cut(v, goal.leaves)), weights, damping)
        return goal.scores(cut(weights**2 / (2 * jnp.diagonal(inverse)), goal.leaves))

    return score


def brute_force(loss_fn: LossFn, *, where: Where = kernels, chunk: int = 32) -> ScoreFn:
    """The change of the loss when each entry alone is set to 0: `L(w without w_q) - L(w)`.

    What the other criteria approximate, at the price of one evaluation for each entry: for small
    networks, and to judge criteria by. Negative where the loss falls. It is a difference of two
    losses, so its error is that of a loss, about 1e-7 of it in float32.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss.
      where: the leaves that are scored.
      chunk: how many losses are computed at once.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out.

    Raises:
      TypeError: `loss_fn` is not a function; on use, a leaf or a loss that is not real.
      ValueError: `chunk` below 1; on use, no batch, or a `where` that matches nothing.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, y: jnp.mean((params["w"].sum() - y) ** 2)
      >>> score = jp.scores.brute_force(loss_fn)
      >>> score({"w": jnp.array([[1.0, 2.0]])}, batch=jnp.array([2.0]))["w"].tolist()
      [[-1.0, 0.0]]

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      ICLR 2017 (its oracle, there of whole feature maps and also as a magnitude).
    """
    check_function(loss_fn, "scores.brute_force", "loss_fn(params, batch)")
    chunk = as_integer(chunk, "chunk", at_least=1, what="losses at once")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        goal = objective("scores.brute_force", loss_fn, params, batch, where)
        weights = end_to_end(goal.leaves)

        def loss_without(index):
            return goal.loss(cut(weights.at[index].set(0), goal.leaves))

        losses = lax.map(loss_without, jnp.arange(weights.size), batch_size=chunk)
        return goal.scores(cut(losses - goal.loss(goal.leaves), goal.leaves))

    return score


def over_batches(score: ScoreFn, loss_fn: LossFn) -> ScoreFn:
    """The mean of a score over several batches, each with its own gradients and data.

    The mean over the batches of `score(params, grads=jax.grad(loss_fn)(params, batch),
    batch=batch, key=..., **extra)`. The scores are what is averaged, not the gradients: on a
    trained network the gradient of all data is near 0, while its magnitude on each batch is not.

    Args:
      score: any score. One that uses no gradients costs none where this is under `jit`.
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean loss.

    Returns:
      A score `score(params, *, batches, key=None, **extra)`. The leaves of `batches` have a leading
      axis of batches. Gradients, or a batch, passed to it are not used; a key is folded with the
      index of each batch. The scores are float32, or float64.

    Raises:
      TypeError: `score` or `loss_fn` is not a function.
      ValueError: on use, no batches, or leaves of them without a common leading axis.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, x: jnp.mean(x @ params["kernel"])
      >>> score = jp.scores.over_batches(jp.scores.taylor, loss_fn)
      >>> batches = jnp.array([[[1.0, 1.0]], [[-1.0, 3.0]]])  # two, of one example each
      >>> score({"kernel": jnp.array([[1.0], [2.0]])}, batches=batches)["kernel"].tolist()
      [[1.0], [4.0]]

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      ICLR 2017 (the mean of `taylor` over batches).
    """
    check_function(score, "scores.over_batches", "score(params, *, grads, key, **extra)")
    check_function(loss_fn, "scores.over_batches", "loss_fn(params, batch)")

    def mean_score(
        params: Params,
        *,
        batches: Any = None,
        batch: Any = None,
        grads: Any = None,
        key: Any = None,
        **extra: Any,
    ) -> Scores:
        del grads, batch
        if batches is None:
            raise ValueError(
                "scores.over_batches needs data: pass batches=..., whose leaves have a leading axis of "
                "batches."
            )
        number = leading_size(batches, "batches", "batches")
        params, first = in_float32(loss_fn, params, jax.tree.map(lambda leaf: leaf[0], batches))
        batches = jax.tree.map(
            lambda leaf, one: leaf if leaf.dtype == one.dtype else leaf.astype(one.dtype), batches, first
        )

        def of_one(index, batch):
            grads = gradients(loss_fn, params, batch)
            rng = None if key is None else jax.random.fold_in(key, index)
            return map_leaves(promote_to_float32, score(params, grads=grads, batch=batch, key=rng, **extra))

        def add(total, indexed):
            return jax.tree.map(jnp.add, total, of_one(*indexed)), None

        indexed = (jnp.arange(number), batches)
        shapes = jax.eval_shape(of_one, *jax.tree.map(lambda leaf: leaf[0], indexed))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = lax.scan(add, zeros, indexed)
        return jax.tree.map(lambda leaf: leaf / number, total)

    mean_score.__wrapped__ = score  # whose extra arguments it passes on
    return mean_score


def _hessian_diagonal(goal: Objective, chunk: int) -> list[jax.Array]:
    weights = end_to_end(goal.leaves)
    _, hessian_times = jax.linearize(jax.grad(lambda v: goal.loss(cut(v, goal.leaves))), weights)

    def entry(index):
        return hessian_times(jnp.zeros_like(weights).at[index].set(1))[index]

    return cut(lax.map(entry, jnp.arange(weights.size), batch_size=chunk), goal.leaves)


def _estimated_diagonal(goal: Objective, samples: int, key: jax.Array) -> list[jax.Array]:
    _, hessian_times = jax.linearize(jax.grad(goal.loss), goal.leaves)

    def add(sample, total):
        keys = jax.random.split(jax.random.fold_in(key, sample), len(goal.leaves))
        signs = [
            jax.random.rademacher(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, goal.leaves, strict=True)
        ]
        products = hessian_times(signs)
        return [t + z * hz for t, z, hz in zip(total, signs, products, strict=True)]

    total = lax.fori_loop(0, samples, add, [jnp.zeros_like(leaf) for leaf in goal.leaves])
    return [t / samples for t in total]
