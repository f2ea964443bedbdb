"""What finding coupled channels costs beside tracing a gradient, for a 12-layer decoder.

    python -m experiments.benchmarks.grouping

Both are done in turn in one process, on abstract params, and their CPU times are compared: tracing
the gradient (`jax.make_jaxpr(jax.grad(loss))`) is what a training step costs before it is compiled. The
layers are a list, and then stacked and scanned, where tracing sees one layer and the groups are of each.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments.benchmarks.graph import decoder, decoder_params, size, stacked
from experiments.run.limits import Range
from experiments.run.settings import Count, Settings, parse
from experiments.show import tables


@dataclass(frozen=True)
class Config(Settings):
    """What is measured."""

    layers: Count = 12  # layers of the decoder
    rounds: Annotated[int, Range(at_least=2)] = 9  # how often each is done; the first round is left out


def cpu_time(function: Callable[[], Any]) -> float:
    """Return the CPU seconds that a function takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


SIZES = ((512, 1408, 8), (4096, 11008, 32))
"""Width, hidden width and heads of the decoders."""


def measure(config: Config, width: int, hidden: int, heads: int, scanned: bool) -> tuple[float, float, str]:
    """Return the median CPU seconds of finding groups and of tracing the gradient, and what of."""
    params = decoder_params(config.layers, width, hidden, vocabulary=4096)
    params = stacked(params) if scanned else params
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    times: tuple[list[float], list[float]] = ([], [])
    found = 0
    for _ in range(config.rounds):
        # New functions each time, because jax keeps what it traced by function.
        def apply(params: Any, tokens: jax.Array) -> jax.Array:
            return decoder(params, tokens, heads)

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            return jnp.mean(decoder(params, tokens, heads).astype(jnp.float32) ** 2)

        groups: list[Any] = []
        times[0].append(
            cpu_time(
                lambda apply=apply, groups=groups: groups.extend(jp.channel_groups(apply, params, tokens))
            )
        )
        times[1].append(cpu_time(lambda loss=loss: jax.make_jaxpr(jax.grad(loss))(params, tokens)))
        found = len(groups)
    kind = "scanned layers" if scanned else "layers"
    name = f"{config.layers} {kind} of width {width}, {size(params) / 1e6:,.0f} M params, {found} groups"
    finding, tracing = (statistics.median(each[1:]) for each in times)
    return finding, tracing, name


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times and their ratio."""
    config = parse(Config, argv, __doc__)
    rows = [[f"CPU time, median of {config.rounds - 1}", "groups", "gradient", "ratio"]]
    for sizes in SIZES:
        for scanned in (False, True):
            finding, tracing, name = measure(config, *sizes, scanned)
            rows.append([name, f"{finding:.2f} s", f"{tracing:.2f} s", f"{finding / tracing:.1f}"])
    print(tables.text(rows))


if __name__ == "__main__":
    main()
