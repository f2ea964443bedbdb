"""What pruning does to the time of a call: masked, sparse and compacted against dense.

A multi-layer perceptron is pruned by magnitude in two ways: entry by entry, and by whole hidden
units. Entry by entry, the masked network holds its zeros and multiplies by them (masked), or its
kernels are stored as compressed rows (sparse, `jax.experimental.sparse.BCSR`). Without its dead
units it is a smaller dense network (compacted). Multiply-adds say what each could gain at most.

    python -m experiments.benchmarks.latency
    python -m experiments.benchmarks.latency --sparsity 0.98 --batch 1

All calls are compiled, warm and taken in turn; ratios are of medians, with those of the quartiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments.benchmarks.parts.jax_steps import bcsr_network, init, network, to_bcsr
from experiments.run.limits import Range
from experiments.run.settings import BatchSize, Count, Settings, Sparsity, parse
from experiments.show import tables


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    width: BatchSize = 1024  # units of the input and of each hidden layer
    layers: Annotated[int, Range(at_least=1, at_most=1000)] = 3  # kernels, the last of 10 outputs
    batch: BatchSize = 64  # rows in a call
    sparsity: Sparsity = 0.95  # of the masks, entry by entry
    units: Sparsity = 0.5  # the fraction of hidden units removed
    rounds: Count = 20  # measurements of each


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each way: multiply-adds and median time, and how many times fewer than dense."""
    params = init(jax.random.key(0), (*[config.width] * config.layers, 10))
    x = jax.random.normal(jax.random.key(1), (config.batch, config.width))
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=config.sparsity)
    masked = jp.apply_masks(params, masks)
    rows = to_bcsr(masked)
    structure = jp.structures.channels(jp.channel_groups(network, params, x))
    pruner = jp.pruner(jp.scores.magnitude, config.units, structure=structure)
    cut = jax.jit(lambda params: pruner.update(pruner.init(params), params).masks)(params)
    small = jp.compact(network, params, cut, x)
    gap = jnp.max(jnp.abs(bcsr_network(rows, x) - network(masked, x)))
    if not gap < 1e-3:
        raise RuntimeError(f"the sparse network differs from the masked one by {gap}.")

    calls = {
        "dense": (network, params, x),
        "masked": (network, masked, x),
        "sparse": (bcsr_network, rows, x),
        "compacted": (small.apply, small.params, x),
    }
    times = jp.metrics.latency(calls, rounds=config.rounds)
    dense = jp.metrics.macs(network, params, x).total
    alive = jp.metrics.macs(network, params, x, masks=masks).total
    counts = {"dense": dense, "masked": alive, "sparse": alive}
    counts["compacted"] = jp.metrics.macs(small.apply, small.params, x).total
    return [
        {
            "way": way,
            "macs": counts[way],
            "macs_ratio": dense / counts[way],
            "speed_up": times["dense"].median / time.median,
            "speed_up_low": times["dense"].median / time.high,
            "speed_up_high": times["dense"].median / time.low,
        }
        for way, time in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    print(f"{config.layers} layers of {config.width}, batch {config.batch}, {jax.devices()[0].device_kind}")
    print(
        f"masked and sparse: {config.sparsity:.0%} of the weights; compacted: {config.units:.0%} of the units"
    )
    rows = [["", "MACs", "MACs x", "speed x", "quartiles"]]
    for line in run(config):
        quartiles = f"{line['speed_up_low']:.2f}-{line['speed_up_high']:.2f}"
        figures = f"{line['macs']:,}", f"{line['macs_ratio']:.2f}", f"{line['speed_up']:.2f}"
        rows.append([line["way"], *figures, quartiles])
    print(tables.text(rows))


if __name__ == "__main__":
    main()
