"""Training and evaluation: a whole epoch is one compiled call, for all seeds at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments._data import Dataset


class Split(NamedTuple):
    """Images on the device, as bytes, with what normalises them.

    Attributes:
      x: uint8 (n, height, width, channels).
      y: int32 (n,).
      mean, std: of the training pixels, scaled to 0..1.
    """

    x: jax.Array
    y: jax.Array
    mean: float
    std: float

    def batch(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalised images and labels at some indices."""
        return (self.x[index] / 255.0 - self.mean) / self.std, self.y[index]


def splits(data: Dataset) -> tuple[Split, Split]:
    """The training and test splits of a data set, on the device."""

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split(jnp.asarray(x), jnp.asarray(y), data.mean, data.std)

    return split(data.x_train, data.y_train), split(data.x_test, data.y_test)


def over_seeds(function: Callable) -> Callable:
    """Maps a function over the leading seed axis of its arguments.

    Vectorised on accelerators. One after the other on a CPU, where the networks of these studies
    are small enough to fit the cache alone but not together.
    """
    if jax.default_backend() == "cpu":
        return lambda *args: jax.lax.map(lambda each: function(*each), args)
    return jax.vmap(function)


def seed_keys(seeds: tuple[int, ...], purpose: int) -> jax.Array:
    """One key per seed, different for each purpose."""
    if not seeds:
        raise ValueError("a study needs at least one seed: --seeds 0,1,2")
    return jnp.stack([jax.random.fold_in(jax.random.key(seed), purpose) for seed in seeds])


def init(model: Any, split: Split, keys: jax.Array) -> Any:
    """Initial params of a flax model for each key; leaves have a leading seed axis."""
    image, _ = split.batch(jnp.arange(1))
    return jax.vmap(lambda key: model.init(key, image)["params"])(keys)


def nll(model: Any, params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    """Negative log-likelihood of each example, in training mode."""
    log_probs: Any = model.apply({"params": params}, x, train=True, rngs={"dropout": key})
    return -jnp.take_along_axis(log_probs, y[:, None], axis=-1)[:, 0]


def epoch(
    model: Any,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    params: Any,
    opt_state: Any,
    key: jax.Array,
    split: Split,
) -> tuple[Any, Any]:
    """One pass over a split in random order; the last batch may be smaller.

    On a CPU gradients are summed over a few images at a time, which keeps the intermediate values
    of small networks in the cache and is otherwise the same.
    """
    size = len(split.y)
    micro = min(batch_size, 64) if jax.default_backend() == "cpu" else batch_size
    steps, parts = -(-size // batch_size), -(-batch_size // micro)
    order_key, drop_key = jax.random.split(key)
    # Beyond the last image the index is -1: it counts for nothing.
    order = jnp.pad(
        jax.random.permutation(order_key, size), (0, steps * batch_size - size), constant_values=-1
    ).reshape(steps, batch_size)
    order = jnp.pad(order, ((0, 0), (0, parts * micro - batch_size)), constant_values=-1)

    def step(carry, inputs):
        params, opt_state = carry
        number, batch = inputs
        count = jnp.sum(batch >= 0)

        def loss(params, index, key):
            x, y = split.batch(index)
            return jnp.sum(jnp.where(index >= 0, nll(model, params, x, y, key), 0)) / count

        def add(total, inputs):
            part, index = inputs
            part_key = jax.random.fold_in(jax.random.fold_in(drop_key, number), part)
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, index, part_key)), None

        pieces = (jnp.arange(parts), batch.reshape(parts, micro))
        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), pieces)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), (jnp.arange(steps), order))
    return params, opt_state


def fitter(
    model: Any, optimizer: optax.GradientTransformation, batch_size: int, split: Split
) -> Callable[..., tuple[Any, Any]]:
    """`fit(params, keys, epochs, bar) -> params, opt_state` for all seeds at once."""
    start = jax.jit(over_seeds(optimizer.init))
    run = _compiled_epoch(model, lambda opt_state: optimizer, batch_size)

    def fit(params: Any, keys: jax.Array, epochs: int, bar: tqdm) -> tuple[Any, Any]:
        return _epochs(run, params, start(params), keys, split, epochs, bar)

    return fit


def masked_fitter(
    model: Any, optimizer: optax.GradientTransformation, batch_size: int, split: Split
) -> Callable[..., Any]:
    """`fit(params, masks, keys, epochs, bar) -> params` under fixed masks, for all seeds at once.

    The optimizer starts afresh at each call. However often it is called, two programs are compiled.
    """

    @jax.jit
    @over_seeds
    def start(params, masks):
        params = jp.apply_masks(params, masks)
        return params, jp.keep_masked(optimizer, masks).init(params)

    run = _compiled_epoch(model, lambda opt_state: jp.keep_masked(optimizer, opt_state.masks), batch_size)

    def fit(params: Any, masks: Any, keys: jax.Array, epochs: int, bar: tqdm) -> Any:
        params, opt_state = start(params, masks)
        return _epochs(run, params, opt_state, keys, split, epochs, bar)[0]

    return fit


def _compiled_epoch(
    model: Any, optimizer_of: Callable[[Any], optax.GradientTransformation], batch_size: int
) -> Callable[..., Any]:
    @jax.jit
    def run(params, opt_state, keys, split):
        def one(params, opt_state, key):
            return epoch(model, optimizer_of(opt_state), batch_size, params, opt_state, key, split)

        return over_seeds(one)(params, opt_state, keys)

    return run


def _epochs(
    run: Callable[..., Any], params: Any, opt_state: Any, keys: Any, split: Split, epochs: int, bar: tqdm
) -> tuple[Any, Any]:
    for number in range(epochs):
        epoch_keys = jax.vmap(partial(jax.random.fold_in, data=number))(keys)
        params, opt_state = jax.block_until_ready(run(params, opt_state, epoch_keys, split))
        bar.update()
    return params, opt_state


def evaluator(model: Any, split: Split, chunk: int = 500) -> Callable[[Any], np.ndarray]:
    """`accuracy(params)` on a split, in [0, 1], for each seed."""
    size = len(split.y)
    parts = -(-size // chunk)
    index = jnp.pad(jnp.arange(size), (0, parts * chunk - size), constant_values=-1).reshape(parts, chunk)

    @jax.jit
    def correct(params, split):
        def count(params):
            def part(index):
                x, y = split.batch(index)
                guess = jnp.argmax(model.apply({"params": params}, x), axis=-1)
                return jnp.sum((guess == y) & (index >= 0))

            return jnp.sum(jax.lax.map(part, index))

        return over_seeds(count)(params)

    return lambda params: np.asarray(correct(params, split)) / size


def percent(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation over seeds in percent, as in "97.86 +- 0.08"."""
    values = 100 * np.array(accuracies)
    return f"{values.mean():.2f} +- {values.std():.2f}"
