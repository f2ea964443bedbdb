"""The lottery-ticket run in jaxprune, in the three ways to treat seeds."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.networks.small import MLP
from experiments.training import loops


class JaxRuns:
    """The whole run as compiled programs: `lottery_scan` over levels, `loops.epoch` in each."""

    def __init__(
        self,
        way: str,
        data: Mapping[str, Any],
        params: Mapping[str, Any],
        seeds: tuple[int, ...],
        rates: dict[str, float],
        levels: int,
        batch_size: int,
        lr: float,
    ):
        """Place the data and the initial params.

        Args:
          way: "spread" (over the devices), "vmap", or "alone" (one by one).
          data: the fields of a `loops.Split`, in numpy.
          params: the initial ones, in numpy, with a leading seed axis.
          seeds, levels, batch_size, lr: as in the benchmark's settings; a level is one pass over all images.
          rates: fractions pruned of each kernel's remaining weights.
        """
        if way == "spread":
            loops.use_cores(seeds)
        self.split = on_device(data)
        self.params, self.keys = jax.tree.map(jnp.asarray, dict(params)), train_keys(seeds)
        self.way = way
        model, adam = MLP(), optax.adam(lr)
        pruner = jp.pruner(jp.scores.magnitude, rates, scope="layerwise", of="remaining")
        over = {"spread": loops.over_seeds, "vmap": jax.vmap, "alone": lambda function: function}[way]

        @loops.jit
        def run(params, keys, split):
            def one(params, key):
                def train(start, masks):
                    tx = jp.keep_masked(adam, masks)
                    return loops.epoch(model, tx, batch_size, start, tx.init(start), key, split)[0]

                def measure(ticket):
                    return {name: own["kernel"] for name, own in ticket.masks.items()}, ticket.trained

                return jp.lottery_scan(train, params, pruner, levels, measure=measure)

            return over(one)(params, keys)

        self.compiled = run

    def devices(self) -> int:
        """Return how many devices JAX sees."""
        return jax.device_count()

    def run(self) -> Any:
        """Return the runs of all seeds, to their end."""
        if self.way != "alone":
            return jax.block_until_ready(self.compiled(self.params, self.keys, self.split))
        each = []
        for seed in range(len(self.keys)):
            params, key = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (self.params, self.keys))
            each.append(jax.block_until_ready(self.compiled(params, key, self.split)))
        return each

    def outcome(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return masks by kernel, and trained params: (seeds, levels + 1, ...). Compiles the run."""
        got = self.run()
        if self.way == "alone":
            got = jax.tree.map(lambda *seeds: np.stack(seeds), *got)
        masks, params = got
        return {f"{name}/kernel": np.asarray(mask) for name, mask in masks.items()}, by_path(params)

    def measure(self) -> float:
        """Return the seconds that the runs of all seeds take."""
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began


def on_device(data: Mapping[str, Any]) -> loops.Split:
    """Return the images, where JAX has them."""
    return loops.Split(jnp.asarray(data["x"]), jnp.asarray(data["y"]), data["mean"], data["std"])


def train_keys(seeds: tuple[int, ...]) -> jax.Array:
    """Return keys of the training, one per seed."""
    return loops.seed_keys(seeds, purpose=1)


def initial(data: Mapping[str, Any], seeds: tuple[int, ...]) -> Any:
    """Return the initial params in numpy, with a leading seed axis."""
    keys = loops.seed_keys(seeds, purpose=0)
    made = jax.jit(lambda keys, split: loops.init(MLP(), split, keys))(keys, on_device(data))
    return jax.tree.map(np.asarray, made)


def batches(seeds: tuple[int, ...], steps: int, batch_size: int) -> np.ndarray:
    """Return the images of each step in the order that `loops.epoch` draws: (seeds, steps, batch)."""
    order = jax.jit(lambda key: jax.random.permutation(jax.random.split(key)[0], steps * batch_size))
    return np.stack([order(key) for key in train_keys(seeds)]).reshape(len(seeds), steps, batch_size)


def by_path(params: Any) -> dict[str, np.ndarray]:
    """Return the leaves as numpy arrays, by "fc1/kernel" and so on."""
    return {
        f"{layer}/{name}": np.asarray(leaf) for layer, own in params.items() for name, leaf in own.items()
    }
