"""The time of a train step that prunes, as a multiple of the dense step.

Adam trains perceptrons: LeNet-300-100 on batches of 60, alone and eight seeds side by side by
jax.vmap, and one of 30 million parameters on batches of 64. Ways, each beside the dense step of its
own framework:

- copy: the dense step once more, to see by how much a step differs from itself;
- masked: jaxprune's wrap_optax, with bool masks in its state;
- packed: the same with masks of one bit per entry;
- fixed: jaxprune's keep_masked, whose masks never change;
- idle: the same, and beside it a pruner of two entries of each leaf: what masked takes more than
  fixed because its program has the update's branch, whether or not this runs;
- argsort: what jaxpruner does, restated in plain JAX: params are multiplied by uint8 masks, which
  an argsort of all magnitudes makes anew under lax.cond;
- torch: torch.nn.utils.prune, whose hooks multiply by masks in each forward pass. It is left out
  where PyTorch is not installed.

A plain step updates no masks. The update is the step in which masks are updated, to a global
sparsity, as a multiple of the same program's plain step; large argsorts are left out, as they
take seconds, unless asked for by --slow.

    python -m experiments.benchmarks.train_step
    python -m experiments.benchmarks.train_step --networks lenet --ways copy,masked,fixed,idle --runs 10

The contenders take turns, round after round. Figures are medians of the ratios within a round, with
their quartiles. --runs repeats all of it in new processes; figures are then medians of the runs'
medians, with the quartiles of these. What needs no clock is counted in the compiled programs and said
below the table: among others how much more a plain step reads and writes than the dense step.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np

from experiments.benchmarks.parts.machine import NO_TORCH, TORCH, machine
from experiments.benchmarks.parts.turns import Worker
from experiments.run.limits import OneOf
from experiments.run.settings import BatchSize, Count, Positive, Settings, parse
from experiments.show.tables import titled

WAYS = ("copy", "masked", "packed", "fixed", "idle", "argsort", "torch")


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    # of these, in this order
    networks: tuple[Annotated[str, OneOf(("lenet", "seeds", "large"))], ...] = ("lenet", "seeds", "large")
    ways: tuple[Annotated[str, OneOf(WAYS)], ...] = WAYS  # beside dense
    width: BatchSize = 3600  # units of each of the large network's three hidden layers
    rounds: Count = 15  # rounds in which each way has one turn; the large network has 5 at most
    runs: Count = 1  # of all of this, each in new processes
    turn: Positive = 0.06  # seconds of a turn of plain steps, about; one step at least
    slow: bool = False  # also time the argsort of the large network


SMALL = Config(networks=("lenet",), rounds=2, turn=0.001)


class Network(NamedTuple):
    """A network of the benchmark.

    Attributes:
      title: what the table calls it.
      widths: from inputs to outputs.
      batch: rows in a step.
      seeds: how many side by side by vmap; 0 for one alone.
      rounds: turns of each way.
      argsort: whether the argsort route's update is timed.
    """

    title: str
    widths: tuple[int, ...]
    batch: int
    seeds: int
    rounds: int
    argsort: bool


def networks(config: Config) -> list[Network]:
    """Return the networks asked for."""
    lenet, wide = (784, 300, 100, 10), (784, *[config.width] * 3, 10)
    size = sum(m * n + n for m, n in itertools.pairwise(wide))
    known = {
        "lenet": Network("LeNet-300-100", lenet, 60, 0, config.rounds, True),
        "seeds": Network("8 seeds of it", lenet, 60, 8, config.rounds, True),
        "large": Network(f"{size / 1e6:.0f} M params", wide, 64, 0, min(config.rounds, 5), config.slow),
    }
    return [known[name] for name in config.networks]


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each network and way, and what the compiled programs say."""
    lines: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    for network in networks(config):
        runs = [_run(network, config) for _ in range(config.runs)]
        facts += runs[0][1]
        if config.runs == 1:
            lines += runs[0][0]
            continue
        for same in zip(*(measured for measured, _ in runs), strict=True):
            medians = {
                name: None if same[0][name] is None else [float(np.median(line[name])) for line in same]
                for name in ("step", "update", "dense")
            }
            lines.append(same[0] | medians)
    lines.append({"remark": _said(facts), "facts": facts})
    if not TORCH and "torch" in config.ways:
        lines.append({"remark": NO_TORCH})
    return lines


def _run(network: Network, config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of a network, and the facts of each of its programs, from new processes."""
    shape = {"widths": network.widths, "batch": network.batch}
    # `fixed` has masks of one network, not of several seeds.
    left = {"torch", "fixed", "idle"} if network.seeds else {"torch"}
    ways = ("dense", *(way for way in config.ways if way not in left))
    with contextlib.ExitStack() as stack:
        target = "experiments.benchmarks.parts.jax_steps:JaxSteps"
        settings = {"seeds": network.seeds, "ways": ways, "updates": network.rounds + 1}
        ours = stack.enter_context(Worker(target, **shape, **settings))
        workers: dict[str, Worker] = dict.fromkeys(ways, ours)
        if TORCH and "torch" in config.ways and not network.seeds:
            target = "experiments.benchmarks.peers.torch_steps:TorchSteps"
            theirs = stack.enter_context(Worker(target, **shape, sparsity=0.9))
            workers |= dict.fromkeys(("torch dense", "torch"), theirs)
        lines = _measured(network, workers, config.turn)
        own = [way for way in ways if way not in ("copy", "idle", "argsort")]
        return lines, [{"network": network.title, "way": way, **ours("facts", way)} for way in own]


def _measured(network: Network, workers: Mapping[str, Worker], turn: float) -> list[dict[str, Any]]:
    """Return plain steps and updates of all ways, in turn."""
    updating = [
        way
        for way in workers
        if way in ("masked", "packed", "torch") or (way == "argsort" and network.argsort)
    ]
    counts = {}
    for way, worker in workers.items():
        if way in updating:
            worker("update", way)
        worker("plain", way, 2)
        counts[way] = int(np.clip(turn / worker("plain", way, 2), 1, 90))
    plain: dict[str, list[float]] = {way: [] for way in workers}
    update: dict[str, list[float]] = {way: [] for way in updating}
    turns: list[Callable[[], None]] = []
    for way, worker in workers.items():
        turns.append(partial(_timed, plain[way], worker, "plain", way, counts[way]))
        if way in updating:
            turns.append(partial(_timed, update[way], worker, "update", way))
    for number in range(network.rounds):
        for one in turns if number % 2 == 0 else turns[::-1]:
            one()
    dense = {way: "torch dense" if way == "torch" else "dense" for way in workers}
    return [
        {
            "network": network.title,
            "way": way,
            "step": np.divide(plain[way], plain[dense[way]]).tolist(),
            "update": np.divide(update[way], plain[way]).tolist() if way in update else None,
            "dense": np.divide(plain[way], plain["dense"]).tolist(),
        }
        for way in workers
        if way != "dense"
    ]


def _timed(times: list[float], worker: Worker, method: str, *arguments: Any) -> None:
    times.append(worker(method, *arguments))


def _said(facts: Sequence[Mapping[str, Any]]) -> str:
    """Return what the compiled programs of jaxprune hold, in words: the worst of all, then each."""
    ours = [fact for fact in facts if fact["way"] != "dense"]
    most = {name: max((fact[name] for fact in ours), default=0) for name in ("sorts", "host", "traces")}
    kept = sum(fact["leaves"] - fact["aliased"] for fact in ours)
    said = [
        f"jaxprune's programs: {most['sorts']} sorts, {most['host']} calls of the host, "
        f"{kept} arrays not\nupdated in place, {most['traces']} further compilations, and no transfer "
        "(jax.transfer_guard)."
    ]
    dense = {fact["network"]: fact for fact in facts if fact["way"] == "dense"}
    for fact in ours:
        beside = dense[fact["network"]]
        more = fact["bytes"] - beside["bytes"]
        said.append(
            f"{fact['network']}, {fact['way']}: {more / beside['bytes']:.1%} more bytes than dense, "
            f"{more / max(fact['masks'], 1):.1f} times the masks';\n"
            f"{fact['operations']} operations ({beside['operations']}), and {fact['skipped']} instructions "
            f"({beside['skipped']}) that a plain step skips."
        )
    return "\n".join(said)


def rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table: a plain step over the dense one, and over JAX's; an update over a plain step."""
    table: list[tuple[str, ...]] = [
        ("network", "way", "step / dense", "(quartiles)", "/ jax dense", "update / step")
    ]
    for line in lines:
        if "remark" in line or line["way"] == "torch dense":
            continue
        low, middle, high = np.percentile(line["step"], [25, 50, 75])
        update = "-" if line["update"] is None else f"{np.median(line['update']):.2f}"
        beside = f"{np.median(line['dense']):.2f}"
        row = (line["network"], line["way"], f"{middle:.3f}", f"({low:.2f}-{high:.2f})", beside, update)
        table.append(row)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(machine())
    print(titled("a train step that prunes, as a multiple of the dense one", rows(lines), lines))


if __name__ == "__main__":
    main()
