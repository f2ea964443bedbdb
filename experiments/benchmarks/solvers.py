"""How near each solver comes to a layer's output, and what it takes beside the exact greedy one.

    python -m experiments.benchmarks.solvers

Two layers with inputs of low rank and of unequal scale, as those of trained networks are. For each solver the
relative error of the output, ||X (W - V)^T|| / ||X W^T||, at half of the entries, at half of each output's,
and at 2:4. And how many times as long as the solver exact greedy pruning (OBC) takes for half of the
entries: all take turns, compiled before, and the figure is the median of the ratios within a round.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.run.limits import OneOf
from experiments.run.settings import Count, Settings, parse
from jaxprune.calibration.solvers.refining import refine

Pattern = jp.solvers.Pattern


def with_least_squares(solver: Any, steps: int = 20) -> Any:
    """Return a solver that refines what another returns."""

    def solve(weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Any) -> Any:
        solved, mask = solver(weight, gram, counts, pattern)
        return refine(solved, mask, gram, jnp.matmul(weight, gram, precision="highest"), steps), mask

    return solve


SOLVERS: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: jp.solvers.mask_only(jp.scores.magnitude),
    "Wanda": lambda: jp.solvers.mask_only(jp.scores.wanda),
    "SparseGPT, block 128": lambda: jp.solvers.sparsegpt(128),
    "SparseGPT": lambda: jp.solvers.sparsegpt(),
    "SparseGPT + 20 steps": lambda: with_least_squares(jp.solvers.sparsegpt()),
    "ALPS + 20 steps": lambda: with_least_squares(jp.solvers.alps()),
    "ALPS, swaps": lambda: jp.solvers.with_swaps(jp.solvers.alps()),
    "exact OBC": lambda: jp.solvers.obc(),
}


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    shapes: tuple[str, ...] = ("80x96", "48x320")  # outputs x inputs of each layer
    rounds: Count = 3  # in which all take their turn
    solvers: tuple[Annotated[str, OneOf(tuple(SOLVERS))], ...] = tuple(
        SOLVERS
    )  # which; exact OBC runs always


SMALL = Config(shapes=("4x16",), rounds=1, solvers=("magnitude", "ALPS + 20 steps"))


def make_layer(seed: int, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs (rows, in) of rank about in / 4 with noise, and weights (out, in)."""
    rng, rank, rows = np.random.default_rng(seed), max(1, inputs // 4), 6 * inputs
    x = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, inputs)) / np.sqrt(rank)
    x = (x + 0.05 * rng.normal(size=(rows, inputs))) * np.exp(0.8 * rng.normal(size=inputs))
    return x.astype(np.float32), (rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)


def run(config: Config) -> list[str]:
    """Run the benchmark, and return the lines of its tables."""
    lines: list[str] = []
    for seed, shape in enumerate(config.shapes):
        outputs, inputs = map(int, shape.split("x"))
        x, weight = make_layer(seed, outputs, inputs)
        lines.append(f"{shape:<24}{'50 %':>9}{'per output':>12}{'2:4':>9}{'OBC takes':>12}")
        lines += _rows(x, weight, config)
    return lines


def _rows(x: np.ndarray, weight: np.ndarray, config: Config) -> list[str]:
    """Return a line for each solver."""
    gram = jnp.asarray(x.T @ x)[None]
    asked = (
        (Pattern(), weight.size // 2),
        (Pattern(per_output=True), weight.shape[1] // 2),
        (Pattern("nm", n=2, m=4), weight.size // 4),
    )
    chosen = dict.fromkeys((*config.solvers, "exact OBC"))
    programs = {name: jax.jit(SOLVERS[name](), static_argnums=3) for name in chosen}

    def solved(name: str, pattern: Pattern, count: int) -> np.ndarray:
        arguments = jnp.asarray(weight)[None], gram, jnp.array([count])
        return np.asarray(programs[name](*arguments, pattern)[0][0])

    errors = {name: [_error(x, weight, solved(name, *each)) for each in asked] for name in programs}
    ratios: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(config.rounds):
        seconds = {}
        for name in programs:
            start = time.perf_counter()
            solved(name, *asked[0])
            seconds[name] = time.perf_counter() - start
        for name in programs:
            ratios[name].append(seconds["exact OBC"] / seconds[name])
    return [
        f"{name:<24}{of[0]:>9.4f}{of[1]:>12.4f}{of[2]:>9.4f}{statistics.median(ratios[name]):>11.1f}x"
        for name, of in errors.items()
    ]


def _error(x: np.ndarray, weight: np.ndarray, solved: np.ndarray) -> float:
    wide = x.astype(np.float64)
    return float(np.linalg.norm(wide @ (weight - solved).T) / np.linalg.norm(wide @ weight.T))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    for line in run(parse(Config, argv, __doc__)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
