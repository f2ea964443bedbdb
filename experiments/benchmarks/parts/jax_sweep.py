"""Sweeps of sparsities in jaxprune, in the ways that `sweep` compares."""

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments.benchmarks.parts.jax_steps import init, network


def correct(params: Any, data: Any) -> jax.Array:
    """Return the share of rows whose largest logit is the label's."""
    x, y = data
    return jnp.mean(network(params, x).argmax(-1) == y)


class JaxSweep:
    """A perceptron, its copies of several seeds and data, in a worker process."""

    def __init__(self, widths: tuple[int, ...], batch: int, seeds: int, levels: tuple[float, ...]):
        """Make them and compiles nothing yet."""
        self.levels = levels
        x = jax.random.normal(jax.random.key(1), (batch, widths[0]))
        self.data = x, jax.random.randint(jax.random.key(2), (batch,), 0, widths[-1])
        keys = jax.random.split(jax.random.key(0), seeds)
        self.params = jax.jit(jax.vmap(lambda key: init(key, widths)))(keys)
        self.each = [jax.tree.map(lambda leaf, i=i: leaf[i], self.params) for i in range(seeds)]
        self.kernels = [f"layer{number}/kernel" for number in range(len(widths) - 1)]
        size = sum(m * n for m, n in itertools.pairwise(widths))
        counts = [jp.selection.removed_count(level, size) for level in levels]
        self.counts = jnp.asarray(counts, jnp.int32)

        def point(params: Any, count: jax.Array, data: Any) -> jax.Array:
            masks = jp.prune_once(params, jp.scores.magnitude, count=count)
            return correct(jp.apply_masks(params, masks), data)

        def curve(params: Any, counts: jax.Array, data: Any) -> jax.Array:
            return jax.lax.map(lambda count: point(params, count, data), counts)

        self.point = jax.jit(point)
        self.curves = jax.jit(jax.vmap(curve, in_axes=(0, None, None)))
        self.evaluate = jax.jit(correct)

    def measure(self, way: str) -> float:
        """Return the seconds of a sweep."""
        began = time.perf_counter()
        self.figures(way)
        return time.perf_counter() - began

    def figures(self, way: str) -> list[list[float]]:
        """Return accuracies: of each tensor by level, or of each seed by level."""
        return getattr(self, way)()

    def tensors(self) -> list[list[float]]:
        """Return one tensor at a time, from one ranking: jp.sensitivity."""
        found = jp.sensitivity(correct, self.each[0], self.data, levels=self.levels)
        return [[point.metric for point in found.of(name)] for name in self.kernels]

    def tensors_one_by_one(self) -> list[list[float]]:
        """Return one tensor at a time, each level pruned and evaluated by itself."""

        def accuracy(name: str, level: float) -> float:
            params = self.each[0]
            masks = jp.prune_once(params, jp.scores.magnitude, sparsity={name: level}, scope="layerwise")
            return float(self.evaluate(jp.apply_masks(params, masks), self.data))

        return [[accuracy(name, level) for level in self.levels] for name in self.kernels]

    def seeds(self) -> list[list[float]]:
        """Sweep all seeds and levels of global sparsity in one program: a vmap and a loop over levels."""
        return self.curves(self.params, self.counts, self.data).tolist()

    def seeds_one_by_one(self) -> list[list[float]]:
        """Return each seed and level a call of one compiled program."""
        return [[float(self.point(one, count, self.data)) for count in self.counts] for one in self.each]
