"""What a sensitivity analysis costs beside its forward evaluations alone.

    python -m experiments.benchmarks.sensitivity_cost

Networks of 10 kernels at 10 levels: 100 evaluations. Evaluations alone are 100 calls of the
compiled function, one after another, on the same params. Both are timed in turns, compiled
before; the ratio is the median over rounds, with the least and the most. Programs are those that
XLA compiles for the first analysis. A batch of networks in one call (`at_once=10`) is what pays
on an accelerator; with --vectorised it is timed here too.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.run.limits import Range
from experiments.run.settings import Count, Settings, parse

LEVELS = tuple(np.round(np.arange(1, 11) * 0.09, 2).tolist())


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    rounds: Count = 7  # in which all take their turn
    # that the perceptrons see; the convolutions see an eighth
    images: Annotated[int, Range(at_least=8, at_most=1_000_000)] = 1000
    vectorised: bool = False  # time at_once=10 as well


class Case(NamedTuple):
    """A network of 10 kernels.

    Attributes:
      name: of the row.
      evaluate: `evaluate(params, x)`.
      params: its params.
      x: what it sees.
    """

    name: str
    evaluate: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x: jax.Array


def cases(images: int) -> list[Case]:
    """Return two perceptrons and a convolutional network."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)

    def layer(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": normal(*shape), "bias": jnp.zeros(shape[-1])}

    def perceptron(params: Any, x: jax.Array) -> jax.Array:
        for dense in params:
            x = jax.nn.relu(x @ dense["kernel"] + dense["bias"])
        return jnp.mean(x)

    def convolutional(params: Any, x: jax.Array) -> jax.Array:
        for number, conv in enumerate(params[:8]):
            stride = 2 if number in (1, 3, 5) else 1
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, conv["kernel"], (stride, stride), "SAME", dimension_numbers=dims
            )
            x = jax.nn.relu(x + conv["bias"])
        return perceptron(params[8:], jnp.mean(x, axis=(1, 2)))

    few, many = (64, *[64] * 9, 10), (784, *[256] * 9, 10)
    channels = (1, 16, 16, 32, 32, 32, 64, 64, 64)
    convolutions = [layer(3, 3, *pair) for pair in itertools.pairwise(channels)]
    return [
        Case(
            f"perceptron, {widths[0]}-9x{widths[1]}-10",
            perceptron,
            [layer(*pair) for pair in itertools.pairwise(widths)],
            jnp.asarray(rng.normal(size=(images, widths[0])), jnp.float32),
        )
        for widths in (few, many)
    ] + [
        Case(
            "8 convolutions and 2 layers",
            convolutional,
            [*convolutions, layer(64, 64), layer(64, 10)],
            jnp.asarray(rng.normal(size=(max(1, images // 8), 28, 28, 1)), jnp.float32),
        )
    ]


@contextlib.contextmanager
def programs() -> Iterator[list[str]]:
    """Return the names of what is compiled meanwhile."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        if event.endswith("/backend_compile_duration"):
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure(case: Case, config: Config) -> dict[str, Any]:
    """Return the ratios of one network, by how many points are evaluated at once, and the programs."""
    alone = jax.jit(case.evaluate)

    def evaluations() -> None:
        for _ in range(100):
            jax.block_until_ready(alone(case.params, case.x))

    def analysis(at_once: int) -> jp.Sensitivity:
        return jp.sensitivity(case.evaluate, case.params, case.x, levels=LEVELS, at_once=at_once)

    with programs() as compiled:
        found = analysis(1)
    evaluations()
    ways: dict[int, list[float]] = {at_once: [] for at_once in (1, 10)[: 1 + config.vectorised]}
    for at_once in ways:
        analysis(at_once)
    for _ in range(config.rounds):
        least = _seconds(evaluations)
        for at_once, ratios in ways.items():
            ratios.append(_seconds(lambda at_once=at_once: analysis(at_once)) / least)
    return {"points": len(found.points), "programs": compiled, "ratios": ways}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run(config: Config) -> list[str]:
    """Return the table's lines."""
    columns = ("one at a time", "10 at once")[: 1 + config.vectorised]
    lines = [f"{'':<32}{'programs':>8}" + "".join(f"{column:>20}" for column in columns)]
    for case in cases(config.images):
        found = measure(case, config)
        cells = [
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            for ratios in found["ratios"].values()
        ]
        lines.append(f"{case.name:<32}{len(found['programs']):>8}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    config = parse(Config, argv, __doc__)
    print("time of an analysis of 100 points over that of 100 evaluations alone")
    for line in run(config):
        print(line, flush=True)


if __name__ == "__main__":
    main()
