"""Training of the larger networks, dense, masked or compacted: one compiled call per step.

What is trained is any function `apply(variables, x, train) -> logits, batch_stats`: a flax model
(`flax_apply`) or what is left of one after compaction. `variables` holds "params", which the
optimizer changes, and "batch_stats", the running statistics of BatchNorm, empty without it.

`_train` compiles whole epochs. Not here: inside a loop XLA's CPU compiler does not bring the
gradients of convolutions into the form that its fast kernels take (github.com/jax-ml/jax/issues/12868),
and a step of ResNet-20 would take 36 times as long.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.data.datasets import Dataset
from experiments.training import loops

Apply = Callable[[Any, jax.Array, bool], tuple[jax.Array, Any]]
"""`apply(variables, x, train) -> logits, batch_stats`; logits and labels alike but for the last axis."""


class Examples(Protocol):
    """A pytree of arrays on the device that gives batches: images or text."""

    @property
    def y(self) -> jax.Array:
        """All labels, (n, ...)."""
        ...

    def batch(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return inputs and labels at some indices."""
        ...


class State(NamedTuple):
    """What training carries from step to step.

    Attributes:
      variables: {"params": ..., "batch_stats": ...}.
      opt_state: the optimizer's.
    """

    variables: Any
    opt_state: Any


class Score(NamedTuple):
    """The means over all labels of a split.

    Attributes:
      loss: cross-entropy, in nats.
      accuracy: in [0, 1].
    """

    loss: float
    accuracy: float


def colour_splits(data: Dataset) -> tuple[loops.Split, loops.Split]:
    """Return the training and test splits of a data set, on the device, each colour normalised by itself."""
    values = np.arange(256) / 255
    colours = data.x_train.reshape(-1, data.x_train.shape[-1]).T
    counts = np.stack([np.bincount(colour, minlength=256) for colour in colours]) / colours.shape[1]
    mean = counts @ values
    std = jnp.asarray(np.sqrt(counts @ values**2 - mean**2), jnp.float32)
    mean = jnp.asarray(mean, jnp.float32)
    return (
        loops.Split(jnp.asarray(data.x_train), jnp.asarray(data.y_train), mean, std),
        loops.Split(jnp.asarray(data.x_test), jnp.asarray(data.y_test), mean, std),
    )


class Windows(NamedTuple):
    """Pieces of a text, on the device.

    Attributes:
      x: uint8 (n, context), the characters' ids.
      y: the same, one character on: what follows each.
    """

    x: jax.Array
    y: jax.Array

    def batch(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return inputs and what follows, int32, at some indices."""
        return self.x[index].astype(jnp.int32), self.y[index].astype(jnp.int32)


def windows(ids: np.ndarray, context: int, stride: int | None = None) -> Windows:
    """Cut a text into pieces, one at every `stride` characters; by default they do not overlap.

    What does not fill the last is left out.
    """
    places = np.arange(0, len(ids) - context, stride or context)[:, None] + np.arange(context)
    return Windows(jnp.asarray(ids[places]), jnp.asarray(ids[places + 1]))


def crop_and_flip(key: jax.Array, images: jax.Array, pad: int = 4) -> jax.Array:
    """Move each image by up to `pad` pixels, zeros coming in, and mirrors every other one, at random.

    He et al.'s augmentation of normalised images: (batch, height, width, channels) -> the same.
    """
    shift_key, flip_key = jax.random.split(key)
    count, *shape = images.shape
    corners = jax.random.randint(shift_key, (count, 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), shape))
    cropped = crop(padded, corners)
    mirrored = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


def sgd(
    rate: optax.ScalarOrSchedule, momentum: float = 0.9, weight_decay: float = 5e-4
) -> optax.GradientTransformation:
    """Return SGD with Nesterov's momentum, and weight decay of the kernels alone."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=kernels), optax.sgd(rate, momentum, nesterov=True)
    )


def kernels(params: Any) -> Any:
    """Return which leaves are decayed: for optax's `mask=`."""
    leaves, treedef = jax.tree.flatten(params)
    paths = jp.leaf_paths(params)
    return treedef.unflatten([jp.kernels(*pair) for pair in zip(paths, leaves, strict=True)])


def one_cycle(peak: float, steps: int) -> optax.Schedule:
    """Return a cycle: up from peak / 25 to the peak in .3 of the steps, then down to nearly 0, by cosines."""
    return optax.cosine_onecycle_schedule(steps, peak)


def steps_per_epoch(examples: Examples, batch_size: int) -> int:
    """Return the number of full batches in a split."""
    return len(examples.y) // batch_size


def flax_apply(model: Any) -> Apply:
    """Return a flax model as an `Apply`."""

    def apply(variables: Any, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        logits, changed = model.apply(variables, x, train=train, mutable=["batch_stats"])
        return logits, changed.get("batch_stats", {})

    return apply


def init(model: Any, examples: Examples) -> Callable[[jax.Array], Any]:
    """Return `init(key)`, the initial variables of a flax model, compiled once."""
    x, _ = examples.batch(jnp.arange(1))

    @jax.jit
    def variables(key: jax.Array) -> Any:
        return {"batch_stats": {}} | model.init(key, x)

    return variables


def fitter(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    examples: Examples,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[..., State]:
    """Return `fit(variables, key, epochs, opt_state=None, after=None) -> State`, compiled once.

    An epoch is a pass over the split in random order. The images that do not fill a batch are left
    out, others each time: BatchNorm would take a small batch for the whole.
    `opt_state` is an earlier state of the optimizer to continue from; `after(epoch, state, loss)` is
    called after each epoch, numbered from 1, with the mean loss of its batches.
    """
    steps = steps_per_epoch(examples, batch_size)
    if steps == 0:
        raise ValueError(
            f"got batch_size={batch_size} for {len(examples.y)} examples; it must be at most that"
        )

    @loops.jit
    def step(state: State, key: jax.Array, order: jax.Array, number: int, examples: Examples):
        variables, opt_state = state
        x, y = examples.batch(jax.lax.dynamic_slice_in_dim(order, number * batch_size, batch_size))
        if augment is not None:
            x = augment(jax.random.fold_in(key, number), x)

        def mean_loss(params):
            logits, batch_stats = apply(variables | {"params": params}, x, True)
            return jnp.mean(_losses(logits, y)), batch_stats

        params = variables["params"]
        (loss, batch_stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        variables = {"params": optax.apply_updates(params, updates), "batch_stats": batch_stats}
        return State(variables, opt_state), loss

    def fit(variables, key, epochs, opt_state=None, after=None):
        state = State(variables, optimizer.init(variables["params"]) if opt_state is None else opt_state)
        for epoch in range(1, epochs + 1):
            order_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
            order = jax.random.permutation(order_key, len(examples.y))
            losses = []
            for number in range(steps):
                state, loss = step(state, augment_key, order, number, examples)
                losses.append(loss)
            state = jax.block_until_ready(state)
            if after is not None:
                after(epoch, state, float(np.mean(losses)))
        return state

    return fit


def scorer(apply: Apply, examples: Examples, chunk: int = 500) -> Callable[[Any], Score]:
    """Return `score(variables)` on a split, in evaluation mode."""

    def figures(logits: jax.Array, y: jax.Array) -> jax.Array:
        both = jnp.stack([_losses(logits, y), logits.argmax(-1) == y], axis=-1)
        return both.reshape(len(y), -1, 2).mean(axis=1)

    @jax.jit
    def totals(variables, examples):
        return loops.total(figures, lambda x: apply(variables, x, False)[0], examples, chunk)

    return lambda variables: Score(
        *(np.asarray(totals(variables, examples), float) / len(examples.y)).tolist()
    )


def _losses(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)
