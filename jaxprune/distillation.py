"""Distillation: loss terms by which a network, the student, learns from another network, the teacher.

The dense network is the teacher that is always at hand:

```python
teacher = functools.partial(apply_fn, dense_params)            # x -> logits
loss_fn = jp.distillation.objective(apply_fn, teacher, temperature=4.0, alpha=0.9)
tx = jp.keep_masked(optax.adam(1e-3), masks)                   # or jp.wrap_optax(...), to prune on the way
grads = jax.grad(loss_fn)(params, (x, labels))
```

For a compacted student pass its function, `objective(small.apply, teacher)`. Its hidden layers are narrower
than the teacher's. `attention` and `similarity` compare layers of different widths; for `hints` pick the
teacher's channels that the student still has, `teacher_features[..., small.keep["conv1/kernel"][3]]`, or pass
a regressor.

No term has a gradient with respect to the teacher.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.tree.checks import check_array, check_function, scalar
from jaxprune.tree.leaves import describe, is_concrete
from jaxprune.typing import Params

__all__ = ["attention", "hard_and_soft", "hints", "objective", "similarity", "soft_targets"]


def soft_targets(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """The divergence of the softened predictions from the teacher's, in nats.

        T^2 KL(softmax(z_t / T) || softmax(z_s / T))

    A temperature T above 1 shows the student which wrong classes the teacher finds likely. The gradient,
    `T (softmax(z_s / T) - softmax(z_t / T))`, is exactly 0 where the logits are equal. For large T it
    tends to `(z_s - z_t) / classes`, with the mean over classes subtracted from both: because of the factor
    T^2 it does not vanish, and needs no other learning rate.

    Args:
      logits: (..., classes), the student's z_s, or its log-probabilities.
      teacher_logits: of the same shape, z_t. It gets no gradient.
      temperature: a positive number, which may be traced (a schedule's value).

    Returns:
      (...,): a value per example, 0 or more; float32 (float64 if either is). Take the mean.

    Raises:
      ValueError: the shapes differ, there is a single class, or `temperature` is not positive.
      TypeError: logits are not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> teacher = jnp.array([[2.0, 0.0], [0.0, 0.0]])
      >>> losses = jp.distillation.soft_targets(jnp.zeros((2, 2)), teacher, temperature=4.0)
      >>> [f"{loss:.4f}" for loss in losses]
      ['0.4848', '0.0000']

    References:
      Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, 2015. They use
      the cross-entropy, which is larger by a constant, the teacher's entropy.
    """
    _check_temperature(temperature)
    for name, array in (("logits", logits), ("teacher_logits", teacher_logits)):
        _check_floating(name, array)
    _check_pair("logits", logits, teacher_logits, "both must know the same examples and classes")
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(f"logits must be (..., classes) with two classes or more, got {describe(logits)}.")
    dtype = _loss_dtype(logits, teacher_logits)
    t = jnp.asarray(temperature, dtype)
    teacher_logits = lax.stop_gradient(teacher_logits)
    return t * t * _divergence(teacher_logits.astype(dtype) / t, logits.astype(dtype) / t)


def hard_and_soft(
    logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.typing.ArrayLike,
    temperature: float | jax.Array = 4.0,
    alpha: float | jax.Array = 0.9,
) -> jax.Array:
    """Cross-entropy with the labels, mixed with `soft_targets`.

        (1 - alpha) CE(labels, softmax(z_s)) + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T))

    With `temperature=1, alpha=0.5` this is half the sum of hard and soft cross-entropy, up to half the
    teacher's entropy, which has no gradient.

    Args:
      logits: (..., classes), the student's.
      teacher_logits: of the same shape. It gets no gradient.
      labels: (...,) integers, or (..., classes) probabilities, as one-hot labels are.
      temperature: a positive number, which may be traced.
      alpha: the weight of the teacher, 0 to 1, which may be traced.

    Returns:
      (...,): a value per example, float32 (float64 if logits are). Take the mean. Under `jit` a label out of
      range gives NaN.

    Raises:
      ValueError: shapes do not fit, or a label, `temperature` or `alpha` is out of range.
      TypeError: logits are not floating-point, or labels are neither integers nor probabilities.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> logits, teacher = jnp.zeros((2, 2)), jnp.array([[2.0, 0.0], [0.0, 0.0]])
      >>> losses = jp.distillation.hard_and_soft(logits, teacher, jnp.array([0, 1]), alpha=0.5)
      >>> [f"{loss:.4f}" for loss in losses]
      ['0.5890', '0.3466']

    References:
      Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, 2015.
    """
    _check_alpha(alpha)
    soft = soft_targets(logits, teacher_logits, temperature)
    hard = _cross_entropy(logits, labels).astype(soft.dtype)
    share = jnp.asarray(alpha, soft.dtype)
    return (1 - share) * hard + share * soft


def objective(
    apply_fn: Callable[..., jax.Array],
    teacher: Callable[[Any], jax.Array],
    temperature: float | jax.Array = 4.0,
    alpha: float | jax.Array = 0.9,
) -> Callable[..., jax.Array]:
    """Make the loss function of a student: the mean of `hard_and_soft` over a batch.

    It is a `loss_fn(params, batch)` like any other, for `jax.grad` and for `scores`. If a part of it is
    traced, such as a schedule's temperature, make it inside the jitted step, which costs nothing. Do so also
    for a large teacher: params that a jitted function closes over become constants of the compiled program.

    Args:
      apply_fn: the student, `apply_fn(params, x, *args, **kwargs) -> logits`.
      teacher: `teacher(x) -> logits` of the same shape, in evaluation mode:
        `functools.partial(apply_fn, dense_params)`, or the mean of several networks' logits.
      temperature, alpha: see `hard_and_soft`.

    Returns:
      `loss_fn(params, (x, labels), *args, **kwargs) -> scalar`; arguments after the batch, such as a key for
      dropout, are passed to the student.

    Raises:
      ValueError: `temperature` or `alpha` is out of range.
      TypeError: `teacher` is not a function.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxprune as jp
      >>> apply_fn = lambda params, x: x @ params["kernel"]
      >>> dense = {"kernel": jnp.array([[2.0, 0.0], [0.1, -1.0]])}
      >>> masks = jp.prune_once(dense, jp.scores.magnitude, sparsity=0.5)
      >>> loss_fn = jp.distillation.objective(apply_fn, functools.partial(apply_fn, dense), alpha=1.0)
      >>> batch = jnp.eye(2), jnp.array([0, 1])
      >>> f"{loss_fn(dense, batch):.5f}", f"{loss_fn(jp.apply_masks(dense, masks), batch):.5f}"
      ('0.00000', '0.00061')
    """
    _check_temperature(temperature)
    _check_alpha(alpha)
    if not callable(teacher):
        raise TypeError(
            f"teacher must be a function of x, got {type(teacher).__name__}; for params: "
            "functools.partial(apply_fn, params)."
        )

    def loss_fn(params: Params, batch: tuple[Any, jax.Array], *args: Any, **kwargs: Any) -> jax.Array:
        x, labels = batch
        logits = apply_fn(params, x, *args, **kwargs)
        return jnp.mean(hard_and_soft(logits, teacher(x), labels, temperature, alpha))

    return loss_fn


def hints(
    features: jax.Array,
    teacher_features: jax.Array,
    regressor: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The squared distance of a hidden layer from the teacher's.

        1/2 || f_t - r(f_s) ||^2

    Args:
      features: (n, ...), f_s of the student.
      teacher_features: (n, ...), f_t of the teacher. It gets no gradient.
      regressor: r, from the student's features to the shape of the teacher's, for layers of different widths.
        Params that it closes over get a gradient: `lambda f: f @ params["regressor"]`.

    Returns:
      (n,): a value per example, the sum over the layer's entries; float32 (float64 if either is).

    Raises:
      ValueError: the shapes differ, after the regressor if there is one.
      TypeError: features are not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.distillation.hints(jnp.ones((2, 3)), jnp.zeros((2, 3))).tolist()
      [1.5, 1.5]
      >>> widen = lambda f: f @ jnp.ones((3, 4))
      >>> jp.distillation.hints(jnp.ones((2, 3)), jnp.zeros((2, 4)), widen).tolist()
      [18.0, 18.0]

    References:
      Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
    """
    if regressor is not None:
        check_function(regressor, "regressor=", "of the features")
    ours = features if regressor is None else regressor(features)
    _check_features("hints", ours, teacher_features, "(n, ...)", 1)
    do = "pass a regressor to that shape, or pick the teacher's channels that the student has"
    _check_pair("features" if regressor is None else "regressor(features)", ours, teacher_features, do)
    dtype = _loss_dtype(ours, teacher_features)
    gap = ours.astype(dtype) - lax.stop_gradient(teacher_features).astype(dtype)
    return jnp.sum(jnp.square(gap), axis=tuple(range(1, gap.ndim))) / 2


def attention(features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """How differently two layers distribute their activity over places, by their attention maps.

        || q_s / ||q_s|| - q_t / ||q_t|| ||^2,    q[place] = sum over channels of f[place, channel]^2

    The channels are summed over, so their numbers may differ: a compacted student needs no regressor.

    Args:
      features: (n, places..., channels), of the student.
      teacher_features: (n, places..., channels), with the same places. It gets no gradient.

    Returns:
      (n,): a value per example, 0 to 2; float32 (float64 if either is). An example without any activity has a
      map of zeros, and no gradient.

    Raises:
      ValueError: the numbers of examples or places differ, or there is a single place, whose map is constant.
      TypeError: features are not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> left, right = jnp.array([[[2.0, 1.0], [0.0, 0.0]]]), jnp.array([[[0.0], [3.0]]])
      >>> jp.distillation.attention(left, right).tolist(), jp.distillation.attention(left, 5 * left).tolist()
      ([2.0], [0.0])

    References:
      Zagoruyko & Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional
      Neural Networks via Attention Transfer", ICLR 2017. There the distance is not squared, so it has no
      derivative at 0; their code squares it, as we do, and takes the mean over places.
    """
    _check_features("attention", features, teacher_features, "(n, places..., channels)", 3)
    if features.shape[:-1] != teacher_features.shape[:-1]:
        raise ValueError(
            f"features are {describe(features)}, teacher_features {describe(teacher_features)}; all axes but "
            "the last, the channels, must agree. Resize one: jax.image.resize."
        )
    if math.prod(features.shape[1:-1]) == 1:
        raise ValueError(
            f"features are {describe(features)}: one place alone always has the same map. Compare an earlier "
            "layer, or use hints or similarity."
        )
    dtype = _loss_dtype(features, teacher_features)

    def maps(f: jax.Array) -> jax.Array:
        return _unit_rows(jnp.sum(jnp.square(f.astype(dtype)), axis=-1).reshape(len(f), -1))

    return jnp.sum(jnp.square(maps(features) - maps(lax.stop_gradient(teacher_features))), axis=-1)


def similarity(features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """How differently two layers tell the examples of a batch apart, by their similarity matrices.

        || G_s - G_t ||_F^2 / n^2,    G = F F^T, each row divided by its norm

    Each row of F holds the features of one example. Only the examples must be the same: the layers may have
    different widths and different numbers of axes.

    Args:
      features: (n, ...), of the student, n >= 2.
      teacher_features: (n, ...), of the teacher. It gets no gradient.

    Returns:
      A scalar for the batch, float32 (float64 if either is).

    Raises:
      ValueError: the numbers of examples differ, or are below two.
      TypeError: features are not floating-point.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> apart, alike = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.ones((2, 5))
      >>> loss = jp.distillation.similarity
      >>> f"{loss(apart, 3 * apart):.4f}", f"{loss(apart, alike):.4f}"
      ('0.0000', '0.2929')

    References:
      Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
    """
    _check_features("similarity", features, teacher_features, "(n, ...)", 2)
    if len(features) != len(teacher_features) or len(features) < 2:
        raise ValueError(
            f"similarity compares the examples of a batch, two or more and the same for both; features are "
            f"{describe(features)}, teacher_features {describe(teacher_features)}."
        )
    dtype = _loss_dtype(features, teacher_features)

    def products(f: jax.Array) -> jax.Array:
        rows = f.astype(dtype).reshape(len(f), -1)
        return _unit_rows(rows @ rows.T)

    gap = products(features) - products(lax.stop_gradient(teacher_features))
    return jnp.mean(jnp.square(gap))


# --- divergence, cross-entropy, norms


@jax.custom_jvp
def _divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) over the last axis."""
    p, q, log_ratio = _probabilities(teacher, student)
    # p log(p / q) + q - p, which sums to the divergence, is never negative. Where p and q are close, as at
    # high temperatures, it is computed from their ratio: q - p would lose most of its digits. With
    # r = log(p / q), q = p exp(-r), so it equals p (exp(-r) - 1 + r).
    near, far = p * (jnp.expm1(-log_ratio) + log_ratio), p * log_ratio + q - p
    return jnp.sum(jnp.where((p > 0) & (jnp.abs(log_ratio) < 1), near, far), axis=-1)


@_divergence.defjvp
def _divergence_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # By hand, so that it is exactly 0 where the two agree: Adam would make full steps of a gradient of mere
    # rounding errors. The teacher's tangent is needed for derivatives with respect to the temperature.
    d_teacher, d_student = tangents
    p, q, log_ratio = _probabilities(*primals)
    value = _divergence(*primals)
    by_teacher = p * (log_ratio - value[..., None])
    return value, jnp.sum((q - p) * d_student + by_teacher * d_teacher, axis=-1)


def _probabilities(teacher: jax.Array, student: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return p, q and log(p / q), with 0 for the logarithm where p is 0: both may rule a class out (-inf)."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return p, q, jnp.where(p > 0, log_p - log_q, 0)


def _cross_entropy(logits: jax.Array, labels: jax.typing.ArrayLike) -> jax.Array:
    # Checked as a numpy array, because jnp operations on a constant give tracers in a traced function.
    if isinstance(labels, (list, int, float)):
        labels = np.asarray(labels)
    check_array(labels, "labels")
    values = np.asarray(labels) if is_concrete(labels) else None
    labels = jnp.asarray(labels)
    log_q = jax.nn.log_softmax(logits.astype(_loss_dtype(logits)))
    if labels.shape == logits.shape:
        weights = labels.astype(log_q.dtype)
        return -jnp.sum(jnp.where(weights == 0, 0, weights * log_q), axis=-1)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels are {describe(labels)}; for logits {describe(logits)} they must be integers of shape "
            f"{logits.shape[:-1]}, or probabilities of shape {logits.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels of shape {labels.shape} must be integers, got {describe(labels)}.")
    last = logits.shape[-1] - 1
    if values is not None and values.size and (values.min() < 0 or values.max() > last):
        raise ValueError(f"labels must be 0 to {last}, got {values.min()} to {values.max()}.")
    labels = labels.astype(jnp.int32)  # int8 labels could not be compared with 200 classes
    known = (labels >= 0) & (labels <= last)
    picked = jnp.take_along_axis(log_q, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(known, -picked, jnp.nan)


def _unit_rows(x: jax.Array) -> jax.Array:
    """Divide the rows of an (n, m) matrix by their norms; rows of zeros stay."""
    # Scaled first, so that no square overflows or vanishes. The scale cancels, so it needs no gradient.
    scale = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    x = x / jnp.where(scale == 0, 1, scale)
    squares = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    # The root has no derivative at 0.
    return x / jnp.sqrt(jnp.where(squares == 0, 1, squares))


def _loss_dtype(*arrays: jax.Array) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # also if the user has made promotion strict
        return jnp.result_type(jnp.float32, *arrays)


# --- checks


def _check_temperature(value: Any) -> None:
    number = scalar(value, "temperature")
    if number is not None and not (math.isfinite(number) and number > 0):
        raise ValueError(f"temperature must be a positive number, got {number}.")


def _check_alpha(value: Any) -> None:
    number = scalar(value, "alpha")
    if number is not None and not 0 <= number <= 1:
        raise ValueError(f"alpha, the share of the teacher, must be 0 to 1, got {number}.")


def _check_floating(name: str, array: Any) -> None:
    check_array(array, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {describe(array)}.")


def _check_pair(name: str, ours: jax.Array, teachers: jax.Array, do: str) -> None:
    if ours.shape != teachers.shape:
        raise ValueError(f"{name} are {describe(ours)}, the teacher's {describe(teachers)}; {do}.")


def _check_features(name: str, ours: jax.Array, teachers: jax.Array, axes: str, ndim: int) -> None:
    for which, array in (("features", ours), ("teacher_features", teachers)):
        _check_floating(which, array)
        if array.ndim < ndim:
            raise ValueError(f"{name} takes {which} of shape {axes}, got {describe(array)}.")
