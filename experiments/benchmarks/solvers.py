"""The solvers of one layer: errors and times, on two layers with correlated inputs.

    python -m experiments.benchmarks.solvers

Prints relative output errors ||X (W - V)^T|| / ||X W^T|| at 50 % and 2:4, and the times of SparseGPT on
larger layers; `python experiments/benchmarks/peers/torch_sparsegpt.py` has the times of the same in PyTorch.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.calibration.solvers.refining import refine

Pattern = jp.solvers.Pattern
SHAPES = ((512, 512), (2048, 512), (2048, 2048))


def layer(seed: int, rows: int, inputs: int, outputs: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Make inputs (rows, in) of low rank with noise and features of unequal scale; weights (out, in)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, inputs)) / np.sqrt(rank)
    x = x + 0.05 * rng.normal(size=(rows, inputs))
    x = x * np.exp(0.8 * rng.normal(size=inputs))
    return x.astype(np.float32), (rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)


def with_least_squares(solver: Any, steps: int = 20) -> Any:
    """Return a solver that refines what another gives."""

    def solve(weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Any) -> Any:
        solved, mask = solver(weight, gram, counts, pattern)
        return refine(solved, mask, gram, weight @ gram, steps), mask

    return solve


def solvers(narrow: bool) -> Iterator[tuple[str, Any]]:
    """Yield what is compared."""
    yield "magnitude", jp.solvers.mask_only(jp.scores.magnitude)
    yield "magnitude, 20 steps", with_least_squares(jp.solvers.mask_only(jp.scores.magnitude))
    for block in (128, 32, None):
        yield f"SparseGPT, block {block}", jp.solvers.sparsegpt(block)
    yield "SparseGPT, 20 steps", with_least_squares(jp.solvers.sparsegpt())
    yield "ALPS", jp.solvers.alps()
    yield "ALPS, 20 steps", with_least_squares(jp.solvers.alps())
    if narrow:
        yield "exact OBC", jp.solvers.obc()
        yield "ALPS, swaps", jp.solvers.with_swaps(jp.solvers.alps())


def timed(solver: Any, *arguments: Any, repeat: int = 3) -> tuple[np.ndarray, float]:
    """Return the weights, and the least time of some calls after the first."""
    compiled = jax.jit(solver, static_argnums=3)
    weight, _ = jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return np.asarray(weight[0]), min(times)


def main() -> None:
    """Print both tables."""
    for sizes in ((0, 600, 96, 80, 24), (1, 900, 320, 48, 64)):
        x, dense = layer(*sizes)
        gram, narrow = jnp.asarray(x.T @ x)[None], dense.shape[1] < 200
        print(f"\n{dense.shape[0]} x {dense.shape[1]}: error, seconds")
        asked = {
            "50 %": (Pattern(), dense.size // 2),
            "50 % per output": (Pattern(per_output=True), dense.shape[1] // 2),
            "2:4": (Pattern("nm", n=2, m=4), 1),
        }
        print(f"{'':24}" + "".join(f"{name:>20}" for name in asked))
        for name, solver in solvers(narrow):
            cells = []
            for pattern, count in asked.values():
                weight, taken = timed(solver, jnp.asarray(dense)[None], gram, jnp.array([count]), pattern)
                wide = x.astype(np.float64)
                error = np.linalg.norm(wide @ (dense - weight).T) / np.linalg.norm(wide @ dense.T)
                cells.append(f"{error:.4f}, {taken:.3f}")
            print(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    print("\nSparseGPT, 50 %, block 128")
    for outputs, inputs in SHAPES:
        x, dense = layer(0, 2 * inputs, inputs, outputs, inputs // 4)
        gram, count = jnp.asarray(x.T @ x)[None], jnp.array([dense.size // 2])
        _, taken = timed(jp.solvers.sparsegpt(128), jnp.asarray(dense)[None], gram, count, Pattern())
        print(f"{outputs} x {inputs}: {taken:.3f} s", flush=True)


if __name__ == "__main__":
    main()
