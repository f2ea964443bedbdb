"""What the distillation study is built of: students, splits with a teacher's answers, training on them."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.networks.small import ValidConv, dense
from experiments.run.results import layers
from experiments.training import loops


class Student(nn.Module):
    """The article's student for 28 x 28 images: conv (1->3, 4 x 4) -> flatten -> linear, 18,811 parameters.

    Of convolutions from one channel to k with s x s windows without padding, and one linear layer to 10
    classes, all with biases, only this one has that number:
    `k (s^2 + 1) + 10 k (29 - s)^2 + 10 = 18811` for k = 3, s = 4. As the article tells of no
    activation, the network is a linear function of the pixels.
    """

    relu: bool = False
    im2col: bool = True

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (batch, 28, 28, 1), normalised -> log-probabilities (batch, 10)."""
        del train
        x = ValidConv(3, 4, self.im2col, name="conv")(x)
        x = nn.relu(x) if self.relu else x
        return nn.log_softmax(dense(x.reshape(x.shape[0], -1), 10, "fc"))


class Mix(NamedTuple):
    """What a network learns from.

    Attributes:
      temperature, alpha: of `jaxprune.distillation.hard_and_soft`; with alpha 0 from labels alone.
      scale: what the loss is multiplied by.
    """

    temperature: float = 1.0
    alpha: float = 0.0
    scale: float = 1.0


LABELS = Mix()


class Taught(NamedTuple):
    """A split with a teacher's answers.

    Attributes:
      images: the split.
      answers: (n, classes), the teacher's log-probabilities.
      mix: how they are learned from; its numbers may be traced.
    """

    images: loops.Split
    answers: jax.Array
    mix: Mix

    @property
    def y(self) -> jax.Array:
        """The labels."""
        return self.images.y

    def batch(self, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Mix]]:
        """Return normalised images, and what is learned of them: labels, answers, how they are mixed."""
        x, y = self.images.batch(index)
        return x, (y, self.answers[index], self.mix)


def losses(model: Any, params: Any, x: jax.Array, lesson: Any, key: jax.Array) -> jax.Array:
    """Return the mixed loss of each image, in training mode."""
    y, answers, mix = lesson
    log_probs: Any = model.apply({"params": params}, x, train=True, rngs={"dropout": key})
    return mix.scale * jp.distillation.hard_and_soft(log_probs, answers, y, mix.temperature, mix.alpha)


def fitter(
    model: Any, optimizer: optax.GradientTransformation, batch_size: int, split: loops.Split
) -> Callable[..., Any]:
    """Return `fit(params, masks, keys, epochs, bar, answers, mix) -> params`, under fixed masks.

    `answers` are (seeds, n, classes), `mix` is a `Mix`; without them labels alone are learned. Whatever
    they are, one epoch is one compiled program.
    """
    nothing = jnp.zeros((1, len(split.y), 10))

    start = loops.masked_start(optimizer)

    @loops.jit
    def run(params, opt_state, keys, answers, split, mix):
        def one(params, opt_state, key, answers):
            tx = jp.keep_masked(optimizer, opt_state.masks)
            taught = Taught(split, answers, mix)
            return loops.epoch(model, tx, batch_size, params, opt_state, key, taught, losses)

        return loops.over_seeds(one)(params, opt_state, keys, answers)

    def fit(params, masks, keys, epochs: int, bar: tqdm, answers=None, mix: Mix = LABELS):
        if answers is None:
            answers = jnp.broadcast_to(nothing, (len(keys), *nothing.shape[1:]))
        mix = Mix(*map(jnp.float32, mix))
        params, opt_state = start(params, masks)
        return loops.run_epochs(run, params, opt_state, keys, epochs, bar, answers, split, mix)[0]

    return fit


def prune(params: Any, masks: Any, sparsity: float) -> Any:
    """Return masks that remove more of the smallest weights of all layers, up to a sparsity."""
    left = [leaf[0] for leaf in jax.tree.leaves(masks) if leaf.ndim > 2]  # kernels, of the first seed
    size, kept = sum(leaf.size for leaf in left), jp.metrics.nonzeros(left)
    return _prune(params, masks, jp.selection.removed_count(sparsity, size) - (size - kept))


# The count is traced, so this is compiled once for all levels.
@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def _prune(params: Any, masks: Any, count: Any) -> Any:
    return jp.prune_once(params, jp.scores.magnitude, count=count, masks=masks)


def figures(params: Any, masks: Any, before: np.ndarray) -> Callable[[int], dict[str, Any]]:
    """Return what a pruned network's line says beside its accuracy, by the number of the seed.

    All have a leading seed axis; `before` are the accuracies before tuning.
    """

    def of(index: int) -> dict[str, Any]:
        own, kept = jax.tree.map(operator.itemgetter(index), (params, masks))
        jp.check_pruned(own, kept)
        achieved = jp.metrics.sparsity(kept)
        return {
            "achieved": achieved.prunable,
            "achieved_model": achieved.model,
            "kept": jp.metrics.nonzeros(kept),
            "layers": layers(kept),
            "accuracy_before_tuning": float(before[index]),
        }

    return of
