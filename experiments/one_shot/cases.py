"""The trained networks of the study, and what they are calibrated and judged on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.data import datasets
from experiments.networks.large import GPT
from experiments.networks.small import NormCNN
from experiments.one_shot.methods import Calibrated, Channels, Recovery
from experiments.run.checkpoint import Checkpoints
from experiments.training import steps
from experiments.training.steps import Apply, Examples

_STRIDE = 16  # characters between the beginnings of two windows that the text is learned from


class Network(NamedTuple):
    """A network of the study, how it is trained, and what it is pruned with, unless flags say otherwise.

    Attributes:
      title: its name in figures.
      model: the flax module, from the number of characters.
      optimizer: from a schedule of learning rates.
      epochs, lr, batch_size: of the dense network; the peak of a one-cycle schedule.
      examples: how many images, or windows of text, it is calibrated on.
      sizes: of the calibration sets that are compared.
      chunk: how many examples go through the network at a time.
      more: how many examples the second recovery has.
      recover_steps, recover_batch: of tuning the survivors, and how many examples a step takes.
      channels: by name.
      writes: whether it can write its own calibration set.
      normalised: whether it has BatchNorm.
    """

    title: str
    model: Callable[[int], Any]
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    epochs: int
    lr: float
    batch_size: int
    examples: int
    sizes: tuple[int, ...]
    chunk: int
    more: int
    recover_steps: int
    recover_batch: int
    channels: dict[str, Channels]
    writes: bool
    normalised: bool


def _adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=steps.kernels)


NETWORKS = {
    "digits": Network(
        title="CNN with BatchNorm",
        model=lambda _: NormCNN(),
        optimizer=steps.sgd,
        epochs=30,
        lr=0.05,
        batch_size=64,
        examples=512,
        sizes=(16, 64, 256, 1024),
        chunk=64,
        more=1024,
        recover_steps=600,
        recover_batch=32,
        channels={"half of conv1": Channels(("conv1/kernel[3]",), ("conv2/kernel",))},
        writes=False,
        normalised=True,
    ),
    "tiny_shakespeare": Network(
        title="char-GPT",
        model=GPT,
        optimizer=_adamw,
        epochs=2,
        lr=4e-3,
        batch_size=64,
        examples=128,
        sizes=(16, 64, 256, 1024),
        chunk=32,
        more=1024,
        recover_steps=600,
        recover_batch=16,
        channels={
            "half of the hidden units": Channels(("up/kernel[1]",), ("down/kernel",)),
            "half of the heads": Channels(("key/bias[0]",), ("out/kernel",)),
        },
        writes=True,
        normalised=False,
    ),
}


class Task(NamedTuple):
    """A network with its data.

    Attributes:
      network: what it is.
      apply: the function, in training and in evaluation.
      init: its first variables, from a key.
      train, test: the splits.
      note: where the data are from, to print beside every figure.
    """

    network: Network
    apply: Apply
    init: Callable[[jax.Array], Any]
    train: Examples
    test: Examples
    note: str

    def logits(self, variables: Any, x: jax.Array) -> jax.Array:
        """Return the network's outputs in evaluation mode: the function that is calibrated and pruned."""
        return self.apply(variables, x, False)[0]

    def train_mode(self, variables: Any, x: jax.Array) -> Any:
        """Return the running statistics of BatchNorm after a batch in training mode."""
        return self.apply(variables, x, True)[1]


def load(dataset: str, train: int | None, test: int | None) -> Task:
    """Read a data set, all or the first so many images or characters, and make its network."""
    network = NETWORKS[dataset]
    if dataset == "tiny_shakespeare":
        text = datasets.load_shakespeare(train=train, validation=test)
        model, note = network.model(len(text.vocabulary)), text.note
        first = steps.windows(text.train, model.context, _STRIDE)
        second = steps.windows(text.validation, model.context)
    else:
        data = datasets.load(dataset, train=train, test=test)
        first, second = steps.colour_splits(data)
        model, note = network.model(10), data.note
    return Task(network, steps.flax_apply(model), steps.init(model, first), first, second, note)


class Dense:
    """The dense networks of a task, each trained once and kept in a folder."""

    def __init__(self, task: Task, folder: str, settings: dict[str, Any]):
        """State the folder, and the settings on which the trained networks depend."""
        self.task, self.folder, self.settings = task, folder, settings
        self.epochs = settings["epochs"]
        count = steps.steps_per_epoch(task.train, settings["batch_size"])
        schedule = steps.one_cycle(settings["lr"], self.epochs * count)
        self.optimizer = task.network.optimizer(schedule)
        self.fit = steps.fitter(task.apply, self.optimizer, settings["batch_size"], task.train)

    def variables(self, seed: int, bar: tqdm) -> Any:
        """Return the trained variables of a seed; a stopped training resumes after its last epoch."""

        def start(key: jax.Array) -> steps.State:
            variables = self.task.init(key)
            return steps.State(variables, self.optimizer.init(variables["params"]))

        with Checkpoints(f"{self.folder}/seed-{seed}", self.settings | {"seed": seed}) as checkpoints:
            shapes = jax.eval_shape(start, _key(seed, "init"))
            template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            if (found := checkpoints.restore(template)) is not None:
                state, lines = jax.tree.map(jnp.asarray, found[0]), found[1]
            else:
                state, lines = jax.jit(start)(_key(seed, "init")), []

            def after(_: int, state: steps.State, loss: float) -> None:
                lines.append({"epoch": len(lines) + 1, "loss": loss})
                checkpoints.save(len(lines), state, lines)
                bar.set_postfix(loss=f"{loss:.3f}")

            while len(lines) < self.epochs:
                key = jax.random.fold_in(_key(seed, "train"), len(lines))
                state = self.fit(state.variables, key, 1, state.opt_state, after)
        return state.variables


def calibration_set(task: Task, count: int, seed: int) -> jax.Array:
    """Return the inputs of so many training examples, drawn without replacement by a seed.

    A larger set of the same seed begins with the smaller one.
    """
    total = len(task.train.y)
    order = jax.random.permutation(jax.random.key(seed), total)
    return task.train.batch(order[: min(count, total)])[0]


def sampled_windows(task: Task, variables: Any, count: int, seed: int) -> jax.Array:
    """Return windows of text that a language model writes itself: no data are needed.

    The first character of each is drawn uniformly, each following one from the model's own distribution.
    """
    context = task.train.y.shape[1]

    @jax.jit
    def write(variables: Any, key: jax.Array) -> jax.Array:
        first_key, key = jax.random.split(key)
        characters = jax.eval_shape(task.logits, variables, jnp.zeros((1, context), jnp.int32)).shape[-1]
        text = jnp.zeros((count, context), jnp.int32)
        text = text.at[:, 0].set(jax.random.randint(first_key, (count,), 0, characters))

        def add(place: jax.Array, text: jax.Array) -> jax.Array:
            # What stands behind `place` is not seen from there, since attention is causal.
            logits = task.logits(variables, text)[:, place - 1]
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits)
            return text.at[:, place].set(drawn)

        return jax.lax.fori_loop(1, context, add, text)

    return write(variables, jax.random.key(seed))


def calibrated(task: Task, dense: Any, x: jax.Array, seed: int) -> Calibrated:
    """Return a trained network with a calibration set, to prune; the seed is that of tuning its survivors."""
    network = task.network
    tuning = Recovery(_in_batches(x, network.recover_batch), network.recover_steps, _is_trained, seed=seed)
    return Calibrated(task.logits, dense, _in_batches(x, network.chunk), tuning)


def _in_batches(x: jax.Array, size: int) -> Sequence[tuple[jax.Array]]:
    """Return inputs in batches of at most `size`, all alike where the number allows it."""
    return [(x[start : start + size],) for start in range(0, len(x), size)]


def _is_trained(path: str, leaf: Any) -> bool:
    """Return whether a leaf is a param, and no running statistic of BatchNorm."""
    del leaf
    return path.startswith("params/")


def _key(seed: int, purpose: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), ("init", "train").index(purpose))
