"""Training and evaluation: a whole epoch or run is one compiled call, for all seeds at once."""

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxprune as jp
from experiments.data.datasets import Dataset


class Split(NamedTuple):
    """Images on the device, as bytes, with what normalises them.

    Attributes:
      x: uint8 (n, height, width, channels).
      y: int32 (n,).
      mean, std: of the training pixels, scaled to 0..1; of all, or (channels,) of each colour.
    """

    x: jax.Array
    y: jax.Array
    mean: float | jax.Array
    std: float | jax.Array

    def batch(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return normalised images and labels at some indices."""
        return (self.x[index] / 255.0 - self.mean) / self.std, self.y[index]


def splits(data: Dataset) -> tuple[Split, Split]:
    """Return the training and test splits of a data set, on the device."""

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        return Split(jnp.asarray(x), jnp.asarray(y), data.mean, data.std)

    return split(data.x_train, data.y_train), split(data.x_test, data.y_test)


def use_cores(seeds: Sequence[int]) -> None:
    """Let JAX see a CPU as several devices, so that `over_seeds` trains seeds side by side.

    Small networks do not keep several cores busy one at a time. It must come before anything else
    of JAX; later, or with an accelerator, it changes nothing.
    """
    # Refused, by a RuntimeError, once JAX has looked for its devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(1, min(os.cpu_count() or 1, len(seeds))))


def hold_out(split: Split, share: float) -> tuple[Split, Split]:
    """Return a split without its last images, and these, which then tell when to stop."""
    size = round(len(split.y) * (1 - share))
    return (
        split._replace(x=split.x[:size], y=split.y[:size]),
        split._replace(x=split.x[size:], y=split.y[size:]),
    )


def jit(function: Callable) -> Callable:
    """Return `jax.jit` of a whole training loop, with what makes such loops faster on a CPU.

    Without region analysis XLA copies the largest of Adam's moments in each step of a loop; vectors
    are twice as wide where the processor has them. Results are the same to the bit.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(function)
    options = {
        "xla_cpu_copy_insertion_use_region_analysis": True,
        "xla_cpu_prefer_vector_width": 512,
        "xla_backend_optimization_level": 3,  # XLA's default, also where XLA_FLAGS ask for less
    }
    return jax.jit(function, compiler_options=options)


def over_seeds(function: Callable) -> Callable:
    """Map a function over the leading seed axis of its arguments, spread over the devices.

    On each device vectorised; one after the other on a CPU, where the networks of these studies
    are small enough to fit the cache alone but not together.
    """

    def one(real, args):
        if real is None:
            return function(*args)
        nothing = jax.eval_shape(function, *args)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)
        return jax.lax.cond(real, lambda args: function(*args), lambda _: zeros, args)

    def on_one_device(real, args):
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda each: one(*each), (real, args))
        return jax.vmap(function)(*args)

    def mapped(*args):
        seeds = jax.tree.leaves(args)[0].shape[0]
        devices = jax.devices()[:seeds]
        if len(devices) == 1:
            return on_one_device(None, args)
        # Each device gets as many places; what fills the last ones is not run and left out again.
        places = seeds + -seeds % len(devices)
        padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[: places - seeds]]), args)
        real = jnp.arange(places) < seeds if places > seeds else None
        mesh = jax.make_mesh((len(devices),), ("seeds",), (AxisType.Auto,), devices=devices)
        spread = jax.shard_map(
            on_one_device, mesh=mesh, in_specs=(P("seeds"), P("seeds")), out_specs=P("seeds"), check_vma=False
        )
        return jax.tree.map(lambda leaf: leaf[:seeds], spread(real, padded))

    return mapped


def fill_devices(*trees: Any) -> Any:
    """Return trees with a leading seed axis that is a multiple of the number of devices.

    The first seeds are repeated in the places that are left. That takes no longer than leaving these empty,
    because the other devices are busy meanwhile, and `over_seeds` then compiles in half the time.
    """

    def fill(leaf):
        seeds = len(leaf)
        spare = -seeds % min(len(jax.devices()), seeds)
        if not spare:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.concatenate([leaf, leaf[:spare]])
        leaf = np.asarray(leaf)  # by numpy nothing need be compiled
        return np.concatenate([leaf, leaf[:spare]])

    return jax.tree.map(fill, trees)


def seed_keys(seeds: tuple[int, ...], purpose: int) -> jax.Array:
    """Return one key per seed, different for each purpose."""
    return jnp.stack([jax.random.fold_in(jax.random.key(seed), purpose) for seed in seeds])


def init(model: Any, split: Split, keys: jax.Array) -> Any:
    """Return the initial params of a flax model for each key; leaves have a leading seed axis.

    One program, and one for all splits of such images.
    """
    program = _init if isinstance(keys, Tracer) else _init_alone
    return program(model, split._replace(x=split.x[:1], y=split.y[:1]), keys)


@partial(jax.jit, static_argnums=0)
def _init(model: Any, split: Split, keys: jax.Array) -> Any:
    image, _ = split.batch(jnp.arange(1))
    return jax.vmap(lambda key: model.init(key, image)["params"])(keys)


# It runs once, and without LLVM's costly passes, which change no value, it compiles 5 times as fast. Options
# are for programs that stand alone.
_init_alone = jax.jit(_init, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1})


def nll(model: Any, params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    """Return the negative log-likelihood of each example, in training mode."""
    log_probs: Any = model.apply({"params": params}, x, train=True, rngs={"dropout": key})
    return _losses(log_probs, y)


def _losses(log_probs: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_probs, y[:, None], axis=-1)[:, 0]


def epoch(
    model: Any,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    params: Any,
    opt_state: Any,
    key: jax.Array,
    split: Any,
    losses: Callable[..., jax.Array] = nll,
) -> tuple[Any, Any]:
    """Return one pass over a split in random order; the last batch may be smaller.

    `losses(model, params, x, y, key)` gets what `split.batch` gives, and returns a loss per image.

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

        def loss(params, part, index):
            x, y = split.batch(index)
            key = jax.random.fold_in(jax.random.fold_in(drop_key, number), part)
            return jnp.sum(jnp.where(index >= 0, losses(model, params, x, y, key), 0)) / count

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *inputs)), None

        batch = batch.reshape(parts, micro)
        grads = jax.grad(loss)(params, 0, batch[0])
        if parts > 1:
            grads, _ = jax.lax.scan(add, grads, (jnp.arange(1, parts), batch[1:]))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), (jnp.arange(steps), order))
    return params, opt_state


def fitter(
    model: Any, optimizer: optax.GradientTransformation, batch_size: int, split: Split
) -> Callable[..., tuple[Any, Any]]:
    """Return `fit(params, keys, epochs, bar) -> params, opt_state` for all seeds at once."""
    start = jax.jit(over_seeds(optimizer.init))
    run = _compiled_epoch(model, lambda opt_state: optimizer, batch_size)

    def fit(params: Any, keys: jax.Array, epochs: int, bar: tqdm) -> tuple[Any, Any]:
        return run_epochs(run, params, start(params), keys, epochs, bar, split)

    return fit


def masked_fitter(
    model: Any, optimizer: optax.GradientTransformation, batch_size: int, split: Split
) -> Callable[..., Any]:
    """Return `fit(params, masks, keys, epochs, bar) -> params` under fixed masks, for all seeds at once.

    The optimizer starts afresh at each call. However often it is called, two programs are compiled.
    """
    start = masked_start(optimizer)
    run = _compiled_epoch(model, lambda opt_state: jp.keep_masked(optimizer, opt_state.masks), batch_size)

    def fit(params: Any, masks: Any, keys: jax.Array, epochs: int, bar: tqdm) -> Any:
        seeds = len(keys)
        params, masks, keys = fill_devices(params, masks, keys)
        params, opt_state = start(params, masks)
        params, _ = run_epochs(run, params, opt_state, keys, epochs, bar, split)
        return jax.tree.map(lambda leaf: leaf if len(leaf) == seeds else np.asarray(leaf)[:seeds], params)

    return fit


def masked_start(optimizer: optax.GradientTransformation) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return `start(params, masks)`, for all seeds: the masked params and the state of `keep_masked`."""

    @jax.jit
    @over_seeds
    def start(params, masks):
        params = jp.apply_masks(params, masks)
        return params, jp.keep_masked(optimizer, masks).init(params)

    return start


def _compiled_epoch(
    model: Any, optimizer_of: Callable[[Any], optax.GradientTransformation], batch_size: int
) -> Callable[..., Any]:
    @jit
    def run(params, opt_state, keys, split):
        def one(params, opt_state, key):
            return epoch(model, optimizer_of(opt_state), batch_size, params, opt_state, key, split)

        return over_seeds(one)(params, opt_state, keys)

    return run


def run_epochs(
    run: Callable[..., Any], params: Any, opt_state: Any, keys: Any, epochs: int, bar: tqdm, *data: Any
) -> tuple[Any, Any]:
    """Return the params and the state after some calls of `run(params, opt_state, keys, *data)`."""
    for number in range(epochs):
        epoch_keys = jax.vmap(partial(jax.random.fold_in, data=number))(keys)
        params, opt_state = jax.block_until_ready(run(params, opt_state, epoch_keys, *data))
        bar.update()
    return params, opt_state


class Fit(NamedTuple):
    """What a whole run of training gives, with a leading seed axis.

    Attributes:
      params: at the end.
      best: at the epoch of least held-out loss, where early stopping would have stopped.
      losses: (epochs,) the held-out loss after each epoch that it trained.
      masks: at the end.
    """

    params: Any
    best: Any
    losses: jax.Array
    masks: Any


def whole_run(
    model: Any,
    optimizer_of: Callable[[Any, jax.Array], optax.GradientTransformation],
    batch_size: int,
    epochs: int,
    train: Split,
    held_out: Split,
    begin: int = 0,
) -> Callable[..., Fit]:
    """Return `fit(params, masks, keys) -> Fit` from masked params: one compiled program for all seeds.

    It trains from epoch `begin` to `epochs`, each in its own order. `optimizer_of(masks, key)` is a
    `keep_masked` or a `wrap_optax`, which has the masks in its state; see `fixed` for the former.
    """

    @jit
    def run(params, masks, keys, train, held_out):
        def one(params, masks, key):
            tx = optimizer_of(masks, key)

            def each(carry, number):
                params, opt_state, best, least = carry
                epoch_key = jax.random.fold_in(key, number)
                params, opt_state = epoch(model, tx, batch_size, params, opt_state, epoch_key, train)
                loss = mean_loss(model, params, held_out)
                best = jax.tree.map(lambda new, old: jnp.where(loss < least, new, old), params, best)
                return (params, opt_state, best, jnp.minimum(loss, least)), loss

            params = jp.apply_masks(params, masks)
            start = (params, tx.init(params), params, jnp.array(jnp.inf))
            (params, opt_state, best, _), losses = jax.lax.scan(each, start, jnp.arange(begin, epochs))
            return Fit(params, best, losses, optax.tree.get(opt_state, "masks"))

        return over_seeds(one)(params, masks, keys)

    return lambda params, masks, keys: run(params, masks, keys, train, held_out)


def fixed(optimizer: optax.GradientTransformation) -> Callable[..., optax.GradientTransformation]:
    """Return, for `whole_run`, the optimizer under masks that never change."""
    return lambda masks, key: jp.keep_masked(optimizer, masks)


def mean_loss(model: Any, params: Any, split: Split, chunk: int = 500) -> jax.Array:
    """Return the mean negative log-likelihood of a split, in evaluation mode."""
    return total(_losses, partial(model.apply, {"params": params}), split, chunk) / len(split.y)


def evaluator(model: Any, split: Split, chunk: int = 500) -> Callable[[Any], np.ndarray]:
    """Return `accuracy(params)` on a split, in [0, 1], for each seed."""
    answers = answerer(model, split, chunk)
    return lambda params: accuracy(answers(params), split)


def accuracy(answers: Any, split: Split) -> np.ndarray:
    """Return the accuracies of log-probabilities (..., n, classes) of a split's images, in [0, 1]."""
    return np.mean(np.argmax(answers, axis=-1) == np.asarray(split.y), axis=-1)


def answerer(model: Any, split: Split, chunk: int = 500) -> Callable[[Any], np.ndarray]:
    """Return `answers(params)`: log-probabilities (seeds, n, classes) of a split, in evaluation mode."""

    @jax.jit
    def answers(params, split):
        size = len(split.y)
        # The last chunk is filled up with the first image.
        index = jnp.pad(jnp.arange(size), (0, -size % chunk)).reshape(-1, chunk)

        def of_one(params):
            def part(index):
                return model.apply({"params": params}, split.batch(index)[0])

            return jax.lax.map(part, index).reshape(index.size, -1)[:size]

        return over_seeds(of_one)(params)

    def of_seeds(params: Any) -> np.ndarray:
        seeds = len(jax.tree.leaves(params)[0])
        return np.asarray(answers(*fill_devices(params), split))[:seeds]

    return of_seeds


def total(figures: Callable, predict: Callable[[jax.Array], Any], split: Any, chunk: int) -> jax.Array:
    """Return the sum of `figures(predict(x), y)`, of one row per example, over the examples of a split."""
    size = len(split.y)
    rows = -(-size // chunk)
    # Beyond the last example the index is -1: it counts for nothing.
    index = jnp.pad(jnp.arange(size), (0, rows * chunk - size), constant_values=-1).reshape(rows, chunk)

    def part(index):
        x, y = split.batch(index)
        each = figures(predict(x), y)
        real = (index >= 0).reshape(-1, *[1] * (each.ndim - 1))
        return jnp.sum(jnp.where(real, each, 0), axis=0)

    return jnp.sum(jax.lax.map(part, index), axis=0)
