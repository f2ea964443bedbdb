"""What the time of one training step is spent on, on one core."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from experiments.benchmarks.parts.jax_lottery import on_device
from experiments.networks.small import MLP
from experiments.training import loops

FULL = "full step"


class Parts:
    """Programs of one part of a step each, in a worker process that keeps to one core."""

    def __init__(
        self, data: Mapping[str, Any], params: Mapping[str, Any], batch_size: int, steps: int, lr: float
    ):
        """Take the fields of a `loops.Split` and the params of one seed, in numpy."""
        # Before JAX counts the cores, so that it makes no threads for others.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self.batch_size, self.steps, self.lr = batch_size, steps, lr
        self.split = on_device(data)
        self.key = jax.random.key(0)
        self.params: Any = jax.tree.map(jnp.asarray, dict(params))
        self.masks = jp.ones_masks(self.params)

    def measure(self, repeats: int) -> dict[str, list[float]]:
        """Return fractions of the full step, one per round."""
        adam = optax.adam(self.lr)
        masked = jp.keep_masked(adam, self.masks)
        programs = {
            FULL: self.epoch(masked),
            "plain": self.epoch(adam),
            "gradients": self.epoch(_NO_OPTIMIZER),
            "adam": self.updates(adam),
            "gather": self.gather(),
            "matmuls": self.matmuls(),
            "axpy": self.axpy(),
            "square": self.square(),
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for run in programs.values():
            run()
        for _ in range(repeats):
            for name, run in programs.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        shares = {
            name: [one / full for one, full in zip(times, seconds[FULL], strict=True)]
            for name, times in seconds.items()
        }
        moved, worked = adam_bytes(self.params), flops(self.params, self.batch_size)
        # y += a x reads both and writes one.
        moves, products = moved / (3 * 4 * vector(self.params)), worked / (2 * _SIDE**3)
        return {
            "gradients: gather, forward and backward": shares["gradients"],
            "Adam on given gradients": shares["adam"],
            "masks: keep_masked(adam) less adam": [1 - plain for plain in shares["plain"]],
            "gather and normalise": shares["gather"],
            "matmuls: the eight products alone": shares["matmuls"],
            f"FLOPs: {worked / 1e6:.1f} M, at the rate of a {_SIDE}-cubed product": [
                products * share for share in shares["square"]
            ],
            f"bytes: {moved / 1e6:.2f} MB of Adam, at the rate of y += a x": [
                moves * share for share in shares["axpy"]
            ],
        }

    def epoch(self, tx: optax.GradientTransformation) -> Callable[[], Any]:
        """Return the step of the studies, with some optimizer."""

        @jax.jit
        def run(params, opt_state, split):
            return loops.epoch(MLP(), tx, self.batch_size, params, opt_state, self.key, split)

        opt_state = tx.init(self.params)
        return lambda: jax.block_until_ready(run(self.params, opt_state, self.split))

    def updates(self, tx: optax.GradientTransformation) -> Callable[[], Any]:
        """Return the optimizer alone."""

        def step(carry, _):
            params, opt_state, grads = carry
            # Or what depends on the gradients alone would be computed once, before the loop.
            params, grads = jax.lax.optimization_barrier((params, grads))
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, grads), None

        return self.scanned(step, (self.params, tx.init(self.params), jax.tree.map(jnp.sin, self.params)))

    def gather(self) -> Callable[[], Any]:
        """Return batches picked in a random order."""
        shape = (self.steps, self.batch_size)
        order = jax.random.permutation(self.key, len(self.split.y)).reshape(shape)

        @jax.jit
        def run(split, order):
            first = split.batch(order[0])
            return jax.lax.scan(lambda _, index: (split.batch(index), None), first, order)[0]

        return lambda: jax.block_until_ready(run(self.split, order))

    def matmuls(self) -> Callable[[], Any]:
        """Return the products of forward and backward pass, of what they have in a step."""
        kernels = [self.params[name]["kernel"] for name in sorted(self.params)]
        rows = self.batch_size
        ins = [jax.random.normal(self.key, (rows, kernel.shape[0])) for kernel in kernels]
        outs = [jax.random.normal(self.key, (rows, kernel.shape[1])) for kernel in kernels]

        def step(carry, _):
            kernels, ins, outs, _ = jax.lax.optimization_barrier(carry)
            forward = [x @ w for x, w in zip(ins, kernels, strict=True)]
            weights = [x.T @ g for x, g in zip(ins, outs, strict=True)]
            inputs = [g @ w.T for g, w in zip(outs[1:], kernels[1:], strict=True)]
            return (kernels, ins, outs, (forward, weights, inputs)), None

        made = ([jnp.zeros_like(g) for g in outs], [jnp.zeros_like(w) for w in kernels])
        return self.scanned(step, (kernels, ins, outs, (*made, [jnp.zeros_like(x) for x in ins[1:]])))

    def axpy(self) -> Callable[[], Any]:
        """Return the loop y += a x."""
        x = jnp.ones(vector(self.params))

        def step(carry, _):
            x, y = jax.lax.optimization_barrier(carry)
            return (x, y + 1e-3 * x), None

        return self.scanned(step, (x, jnp.zeros_like(x)))

    def square(self) -> Callable[[], Any]:
        """Return a product of large square matrices."""
        x = jnp.eye(_SIDE)
        return self.scanned(lambda y, _: (y @ x, None), jax.random.normal(self.key, x.shape))

    def scanned(self, step: Callable, carry: Any) -> Callable[[], Any]:
        """Compile as many steps as a level has."""
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=self.steps)[0])
        return lambda: jax.block_until_ready(run(carry))


def size(params: Any) -> int:
    """Return the number of params."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def adam_bytes(params: Any) -> int:
    """Return what a masked Adam step must read (p, g, m, v: 4 bytes each, mask: 1) and write (p, m, v)."""
    return size(params) * (4 * 4 + 1 + 3 * 4)


def vector(params: Any) -> int:
    """Return the length of two float32 vectors that take as much memory as p, g, m, v and masks."""
    return size(params) * (4 * 4 + 1) // 8


def flops(params: Any, batch_size: int) -> int:
    """Return the floating-point operations of a perceptron's step: 2 mnk for each product."""
    kernels = [params[name]["kernel"].size for name in sorted(params)]
    return 2 * batch_size * (2 * sum(kernels) + sum(kernels[1:]))


_SIDE = 512
# Writes the gradients, as the backward pass must, and leaves the params.
_NO_OPTIMIZER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)
