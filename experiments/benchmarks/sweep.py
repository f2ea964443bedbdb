"""The time of evaluating a network at many sparsities, of many seeds, against a loop.

Two sweeps of LeNet-300-100 over 9 sparsities, without training in between:

- tensors: each kernel alone at each level (jp.sensitivity), from one ranking, in one loop of one
  program;
- seeds: eight networks at each global sparsity, in one program: vmap over seeds, a loop over levels.

Each is compared with jaxprune called for one point after another (prune_once and a compiled
evaluation; for seeds one compiled program of both), and with a plain loop in PyTorch with
torch.nn.utils.prune, which is left out where PyTorch is not installed.

    python -m experiments.benchmarks.sweep
    python -m experiments.benchmarks.sweep --batch 10000

All ways are warm, have processes of their own framework and take turns. Figures are how many times
as fast the sweep is: medians of the ratios within a round, and quartiles. Compiling is left out.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from experiments.benchmarks.parts.machine import NO_TORCH, TORCH, machine
from experiments.benchmarks.parts.turns import Worker
from experiments.run.limits import Items
from experiments.run.settings import BatchSize, Count, Settings, parse
from experiments.show.tables import titled


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    # of the network, from inputs to outputs
    widths: Annotated[tuple[BatchSize, ...], Items(repeats=True)] = (784, 300, 100, 10)
    batch: BatchSize = 1000  # rows that each point is evaluated on
    levels: Count = 9  # sparsities, evenly spaced between 0 and 1
    seeds: Count = 8  # networks side by side
    rounds: Count = 5  # rounds in which each way runs once


SMALL = Config(widths=(20, 12, 5), batch=16, levels=3, seeds=2, rounds=1)


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each sweep and what it is compared with."""
    spaced = np.linspace(0, 1, config.levels + 2)[1:-1]
    settings = {
        "widths": config.widths,
        "batch": config.batch,
        "seeds": config.seeds,
        "levels": tuple(round(float(level), 4) for level in spaced),
    }
    points = {
        "tensors": (len(config.widths) - 1) * config.levels,
        "seeds": config.seeds * config.levels,
    }
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Worker("experiments.benchmarks.parts.jax_sweep:JaxSweep", **settings))
        turns = [(ours, way) for sweep in points for way in (sweep, f"{sweep}_one_by_one")]
        if TORCH:
            theirs = stack.enter_context(
                Worker("experiments.benchmarks.peers.torch_sweep:TorchSweep", **settings)
            )
            turns += [(theirs, sweep) for sweep in points]
        seconds: list[list[float]] = [[] for _ in turns]
        for sweep in points:
            one, other = ours("figures", sweep), ours("figures", f"{sweep}_one_by_one")
            if not np.allclose(one, other, atol=2 / config.batch):
                raise RuntimeError(f"the two ways of the sweep of {sweep} give different accuracies.")
        for number in range(-1, config.rounds):
            for times, (worker, way) in zip(seconds, turns, strict=True):
                taken = worker("measure", way)
                if number >= 0:  # the first round is to warm up
                    times.append(taken)
    lines: list[dict[str, Any]] = []
    for sweep, count in points.items():
        quick = next(times for times, turn in zip(seconds, turns, strict=True) if turn == (ours, sweep))
        for times, (worker, way) in zip(seconds, turns, strict=True):
            if way.startswith(sweep) and (worker, way) != (ours, sweep):
                over = "one by one" if worker is ours else "torch"
                ratios = np.divide(times, quick).tolist()
                lines.append({"sweep": sweep, "points": count, "over": over, "speed_up": ratios})
    return lines if TORCH else [*lines, {"remark": NO_TORCH}]


def rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table: how many times as fast the sweep is."""
    table: list[tuple[str, ...]] = [("sweep", "points", "against", "times as fast", "(quartiles)")]
    for line in lines:
        if "remark" not in line:
            low, middle, high = np.percentile(line["speed_up"], [25, 50, 75])
            spread = f"({low:.1f}-{high:.1f})"
            table.append((line["sweep"], str(line["points"]), line["over"], f"{middle:.1f}", spread))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(machine())
    print(titled("a sweep in one program, as times as fast as a loop", rows(lines), lines))


if __name__ == "__main__":
    main()
