"""Scores made from a loss function: from its curvature, its gradients per example, its change itself.

Each factory takes `loss_fn(params, batch)`, the mean loss over the examples of the batch in evaluation mode:
without dropout, and with the running statistics of norms. It returns a score, which gets the data as
`batch=...`:

```python
masks = jp.prune_once(params, jp.scores.fisher(loss_fn), sparsity=0.5, batch=batch)
```

Params and data in 16-bit and 8-bit floats are promoted to float32 if `loss_fn` accepts that: in float16
gradients vanish, and losses that are compared round to the same number.

The loss is differentiated in the leaves that `where` of the factory selects. All other leaves are held fixed
and score NaN, so `where` of `prune_once` must not select more.
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

    Removing w changes `g^T g`, to first order, by `-2 w (H g)`. The paper calls `-w (H g)` the importance and
    removes the weights for which it is *largest*, because the gradient grows most without them. This score
    is its negative, so that larger means keep and the same weights go.

    The product with the Hessian H is computed by forward-over-reverse differentiation, for about the cost of
    two gradients. The paper takes about 10 examples of each class, at initialisation, and divides the
    logits by 200 before the softmax: do that in `loss_fn`.

    Args:
      where: the leaves that g and H are taken of; in the paper the kernels alone, without biases.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out.

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
        problem = objective("scores.grasp", loss_fn, params, batch, where)
        gradient, hessian_times = jax.linearize(jax.grad(problem.loss), problem.leaves)
        return problem.scores([w * hg for w, hg in zip(problem.leaves, hessian_times(gradient), strict=True)])

    return score


def fisher(loss_fn: LossFn, *, where: Where = kernels, chunk: int = 32) -> ScoreFn:
    """The change of the loss by the empirical Fisher's diagonal: `w^2 * mean_i(g_i^2) / 2`.

    `g_i` is the gradient of example i alone; the square of the mean gradient is another quantity, near 0 on
    a trained network. For a log-likelihood the mean of `g_i^2` approximates the diagonal of the Hessian, so
    this score is `obd` without second derivatives, and never negative.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`. It is called on batches of one example: each
        leaf of the batch keeps its leading axis, of size 1.
      where: the leaves that are scored.
      chunk: how many examples are computed at once; their gradients are held in memory.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out. The leaves of the
      batch have a leading axis of examples.

    Raises:
      ValueError: `chunk` is below 1; on use, the leaves of `batch` have no common leading axis.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, x: jnp.mean(x @ params["kernel"])  # g_i = x_i
      >>> score = jp.scores.fisher(loss_fn)
      >>> params, x = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.array([[1.0, 1.0], [-1.0, 1.0]])
      >>> score(params, batch=x)["kernel"].tolist()
      [[0.5], [2.0]]

    References:
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning",
      arXiv:1801.05787 (for whole feature maps; applied to single weights it gives this formula).
    """
    check_function(loss_fn, "scores.fisher", "loss_fn(params, batch)")
    chunk = as_integer(chunk, "chunk", at_least=1, what="examples at once")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        problem = objective("scores.fisher", loss_fn, params, batch, where)
        number, batch = leading_size(batch, "batch", "examples"), problem.batch
        size = min(chunk, number)
        in_chunks = number // size * size

        def squares(example):
            one = jax.tree.map(lambda leaf: leaf[None], example)
            return [g * g for g in jax.grad(problem.loss)(problem.leaves, one)]

        def add(total, examples):
            new = [jnp.sum(square, axis=0) for square in jax.vmap(squares)(examples)]
            return [t + n for t, n in zip(total, new, strict=True)]

        chunks = jax.tree.map(lambda leaf: leaf[:in_chunks].reshape(-1, size, *leaf.shape[1:]), batch)
        zeros = [jnp.zeros_like(leaf) for leaf in problem.leaves]
        total, _ = lax.scan(lambda total, examples: (add(total, examples), None), zeros, chunks)
        if in_chunks < number:
            total = add(total, jax.tree.map(lambda leaf: leaf[in_chunks:], batch))
        return problem.scores([w * w * (t / number) / 2 for w, t in zip(problem.leaves, total, strict=True)])

    return score


def obd(loss_fn: LossFn, *, samples: int | None = None, where: Where = kernels, chunk: int = 32) -> ScoreFn:
    """Optimal Brain Damage: `h_kk w_k^2 / 2`, with the diagonal of the loss's Hessian.

    The second-order increase of the loss at a minimum when one weight alone is removed. The diagonal is
    exact, from one Hessian-vector product for each weight, which suits small networks. With `samples` it is
    Hutchinson's estimate, the mean of `z * (H z)` over vectors z of random signs: unbiased, with one product
    for each sample and a variance of `sum_{j != k} h_kj^2 / samples`.

    Where the curvature is negative, so is the score, and the weight goes first. It is not clipped: at a
    minimum no curvature is negative, and elsewhere the formula does not hold.

    Args:
      samples: None for the exact diagonal, or how many random vectors estimate it.
      where: the leaves that are scored.
      chunk: how many products of the exact diagonal are computed at once.

    Returns:
      A score `score(params, *, batch, key=None, **extra)`, NaN for the leaves left out. With
      `samples` it needs a key.

    Raises:
      ValueError: `samples` or `chunk` is below 1; on use, `samples` is given and `key` is missing.

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
      LeCun et al., "Optimal Brain Damage", NIPS 1989 (with the Gauss-Newton diagonal, which is never
      negative, by a backpropagation of second derivatives); Hutchinson, "A stochastic estimator of the
      trace of the influence matrix for Laplacian smoothing splines", 1989.
    """
    check_function(loss_fn, "scores.obd", "loss_fn(params, batch)")
    chunk = as_integer(chunk, "chunk", at_least=1, what="products at once")
    if samples is not None:
        samples = as_integer(
            samples, "samples", at_least=1, what="random vectors; None for the exact diagonal"
        )

    def score(params: Params, *, batch: Any = None, key: Any = None, **extra: Any) -> Scores:
        del extra
        problem = objective("scores.obd", loss_fn, params, batch, where)
        if samples is None:
            diagonal = _hessian_diagonal(problem, chunk)
        elif key is None:
            raise ValueError("scores.obd with samples needs a PRNG key: pass key=jax.random.key(0).")
        else:
            diagonal = _estimated_diagonal(problem, samples, key)
        return problem.scores([h * w * w / 2 for h, w in zip(diagonal, problem.leaves, strict=True)])

    return score


def obs(loss_fn: LossFn, *, damping: float = 0.0, where: Where = kernels) -> ScoreFn:
    """Optimal Brain Surgeon's saliency: `w_q^2 / (2 [H^-1]_qq)`, with the whole Hessian.

    The second-order increase of the loss at a minimum when one weight is removed and all others are adjusted
    to compensate as well as they can. `jaxprune.optimal_brain_surgeon` adjusts them; otherwise the loss
    rises by more. Weights that are 0 already count among those that can be adjusted: to prune further, pass
    the masks to that function instead.

    Args:
      damping: what is added to the diagonal of H, 0 or more.
      where: the leaves that H is taken of, with at most 5,000 entries in all.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out; under `jit` NaN throughout
      if the Hessian is not positive definite.

    Raises:
      ValueError: `damping` is negative; on use, there are too many weights, or (not under `jit`) the Hessian
        is not positive definite.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, x: jnp.sum((x @ params["w"]) ** 2) / 2  # H = x^T x
      >>> x = jnp.array([[1.0, 1.0], [0.0, 1.0]])  # H^-1 = [[2, -1], [-1, 1]]
      >>> jp.scores.obs(loss_fn)({"w": jnp.array([[2.0], [2.0]])}, batch=x)["w"].tolist()
      [[1.0], [2.0]]

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
      NIPS 5, 1993. They build H^-1 from outer products of gradients (Gauss-Newton); here H is exact.
    """
    check_function(loss_fn, "scores.obs", "loss_fn(params, batch)")
    check_damping(damping, "scores.obs")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        problem = objective("scores.obs", loss_fn, params, batch, where)
        weights = end_to_end(problem.leaves)
        inverse = inverse_hessian(
            "scores.obs", lambda v: problem.loss(cut(v, problem.leaves)), weights, damping
        )
        return problem.scores(cut(weights**2 / (2 * jnp.diagonal(inverse)), problem.leaves))

    return score


def brute_force(loss_fn: LossFn, *, where: Where = kernels, chunk: int = 32) -> ScoreFn:
    """The change of the loss when each entry alone is set to 0: `L(w without w_q) - L(w)`.

    The other criteria approximate this. It costs one evaluation of the loss for each entry: use it on small
    networks, and to judge criteria. Negative where the loss falls. As a difference of two losses it has the
    rounding error of a loss, about 1e-7 of it in float32.

    Args:
      where: the leaves that are scored.
      chunk: how many losses are computed at once.

    Returns:
      A score `score(params, *, batch, **extra)`, NaN for the leaves left out.

    Raises:
      ValueError: `chunk` is below 1.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss_fn = lambda params, y: jnp.mean((params["w"].sum() - y) ** 2)
      >>> score = jp.scores.brute_force(loss_fn)
      >>> score({"w": jnp.array([[1.0, 2.0]])}, batch=jnp.array([2.0]))["w"].tolist()
      [[-1.0, 0.0]]

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      ICLR 2017 (its oracle, for whole feature maps, with and without the sign).
    """
    check_function(loss_fn, "scores.brute_force", "loss_fn(params, batch)")
    chunk = as_integer(chunk, "chunk", at_least=1, what="losses at once")

    def score(params: Params, *, batch: Any = None, **extra: Any) -> Scores:
        del extra
        problem = objective("scores.brute_force", loss_fn, params, batch, where)
        weights = end_to_end(problem.leaves)

        def loss_without(index):
            return problem.loss(cut(weights.at[index].set(0), problem.leaves))

        losses = lax.map(loss_without, jnp.arange(weights.size), batch_size=chunk)
        return problem.scores(cut(losses - problem.loss(problem.leaves), problem.leaves))

    return score


def over_batches(score: ScoreFn, loss_fn: LossFn) -> ScoreFn:
    """The mean of a score over several batches, each with the gradients and the data of that batch.

    The mean over the batches of `score(params, grads=jax.grad(loss_fn)(params, batch), batch=batch, key=...,
    **extra)`. It averages the scores, not the gradients: on a trained network the gradient over all data is
    near 0, while its magnitude on each batch is not.

    Args:
      score: any score. Under `jit`, gradients are not computed for a score that does not use them.

    Returns:
      A score `score(params, *, batches, key=None, **extra)`. The leaves of `batches` have a leading
      axis of batches. It ignores `grads` and `batch`, and folds `key` with the index of each batch. The
      scores are float32, or float64.

    Raises:
      TypeError: `score` or `loss_fn` is not a function.
      ValueError: on use, `batches` is missing, or its leaves have no common leading axis.

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

    mean_score.__wrapped__ = score  # so that the extra arguments that `score` names are accepted
    return mean_score


def _hessian_diagonal(problem: Objective, chunk: int) -> list[jax.Array]:
    weights = end_to_end(problem.leaves)
    _, hessian_times = jax.linearize(jax.grad(lambda v: problem.loss(cut(v, problem.leaves))), weights)

    def entry(index):
        return hessian_times(jnp.zeros_like(weights).at[index].set(1))[index]

    return cut(lax.map(entry, jnp.arange(weights.size), batch_size=chunk), problem.leaves)


def _estimated_diagonal(problem: Objective, samples: int, key: jax.Array) -> list[jax.Array]:
    _, hessian_times = jax.linearize(jax.grad(problem.loss), problem.leaves)

    def add(sample, total):
        keys = jax.random.split(jax.random.fold_in(key, sample), len(problem.leaves))
        signs = [
            jax.random.rademacher(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, problem.leaves, strict=True)
        ]
        products = hessian_times(signs)
        return [t + z * hz for t, z, hz in zip(total, signs, products, strict=True)]

    total = lax.fori_loop(0, samples, add, [jnp.zeros_like(leaf) for leaf in problem.leaves])
    return [t / samples for t in total]
