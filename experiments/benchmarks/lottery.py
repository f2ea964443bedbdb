"""How fast seeds of a lottery-ticket run train, beside a plain PyTorch loop.

LeNet-300-100 (784-300-100-10) trains with Adam 1.2e-3 on batches of 60, loses
a fifth of what is left of each layer's weights (a tenth in the last), is
rewound and trains again, level after level, for each of five seeds:

- spread: jaxprune, all seeds in one compiled program, side by side on the
  cores of a CPU, vectorised on an accelerator (lottery_scan, over_seeds);
- vmap: jaxprune, all seeds in one compiled program, jax.vmap alone;
- one by one: jaxprune, one compiled program for one seed, called for each;
- torch: a plain loop with torch.nn.utils.prune, seed after seed, on a CPU. It
  is timed twice, at the thread count that suits it best: with Adam as it
  comes, and with the best of Adam's defaults, foreach and fused. Short trials
  choose. Without PyTorch (pip install torch) this part is left out.

All take the same initial weights, the same images in the same order, and give
the masks and trained weights of each level; the first lines say how far these
agree. Rounding differs between programs, so they drift apart in long runs.

Times are of whole runs, with compilation and a first run left out, as are
starting PyTorch's threads, normalising its images and drawing its batches. The
contenders take turns, round after round, so that what else the machine does
meets all of them. Each has a process of its own and imports its own framework
alone: one's threads never wait beside another's, and the number of devices or
threads that suits one does not bind the others. Between turns a process waits
in a read and takes no core. Figures are ratios within a round, as the median
of all rounds and (least-most).

With --bound, the parts of one step for one seed, on one core, as fractions of
the full step in the same kind of program, a scan:

- gradients: gather, forward and backward pass, no optimizer;
- Adam: optax.adam and apply_updates on given gradients;
- masks: the step under keep_masked less the step with plain Adam;
- gather: picking a batch and normalising it;
- matmuls: the step's eight matrix products alone, in their own shapes;
- FLOPs: 2 mnk for each of them, at the rate of a 512 x 512 x 512 product;
- bytes: what Adam must move (read p, g, m, v and mask, write p, m, v), at the
  rate of y += a x on vectors that take as much memory in all, which is of a
  cache and not of main memory.

FLOPs and bytes together are about the least that a step can take.

    python -m experiments.benchmarks.lottery            # images from a seed
    python -m experiments.benchmarks.lottery --dataset mnist
    python -m experiments.benchmarks.lottery --bound
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.benchmarks.parts import jax_lottery
from experiments.benchmarks.parts.machine import TORCH
from experiments.benchmarks.parts.turns import Worker
from experiments.data import datasets
from experiments.report.design import Design
from experiments.run.results import Results
from experiments.run.settings import BatchSize, Count, Folder, Positive, Seeds, Settings, parse
from experiments.show import tables

OURS = ("spread", "vmap", "alone")
TITLES = {
    "spread": "jaxprune, spread",
    "vmap": "jaxprune, vmap",
    "alone": "jaxprune, one by one",
    "torch": "torch",
    "torch best": "torch best",
}
RATES = {"fc1/kernel": 0.2, "fc2/kernel": 0.2, "fc3/kernel": 0.1}
ADAMS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    dataset: Literal["synthetic", "mnist"] = "synthetic"  # synthetic: images of MNIST's size, from a seed
    seeds: Seeds = (0, 1, 2, 3, 4)  # the runs that figures are averaged over
    levels: Count = 3  # how often to prune
    steps: Count = 1000  # steps of training at each level: one pass over that many batches
    batch_size: BatchSize = 60  # images per step
    lr: Positive = 1.2e-3  # learning rate of Adam
    repeats: Count = 5  # rounds in which each way runs once
    trial_steps: Count = 200  # steps of the trials that choose PyTorch's threads and Adam
    bound: bool = False  # also say what the time of a step is spent on
    out: Folder = "results/benchmarks/lottery"  # folder for results.jsonl


class Outcome(NamedTuple):
    """The masks of each kernel and the trained params, (seeds, levels + 1, ...), by "fc1/kernel"."""

    masks: dict[str, np.ndarray]
    params: dict[str, np.ndarray]


def images(config: Config) -> dict[str, Any]:
    """Return the fields of a `Split`: noise with labels from a random linear map, to be learned; or MNIST."""
    size = config.steps * config.batch_size
    if config.dataset == "mnist":
        data = datasets.load("mnist", train=size, test=1)
        return {"x": data.x_train, "y": data.y_train, "mean": data.mean, "std": data.std}
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (size, 28, 28, 1), np.uint8)
    pixels = x.reshape(size, -1)
    mean, std = float(pixels.mean() / 255), float(pixels.std() / 255)
    y = ((pixels / np.float32(255) - mean) @ rng.normal(size=(784, 10)).astype(np.float32)).argmax(1)
    return {"x": x, "y": y.astype(np.int32), "mean": mean, "std": std}


def torch_start(config: Config, data: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """Return what `TorchLoop` begins from: the same weights and images, in the same order."""
    named, size = jax_lottery.by_path(params), len(data["y"])
    mean, std = np.float32(data["mean"]), np.float32(data["std"])
    orders = jax_lottery.batches(config.seeds, config.steps, config.batch_size)
    return {
        "images": (data["x"].reshape(size, -1) / np.float32(255) - mean) / std,
        "labels": data["y"].astype(np.int64),
        "weights": [{name: leaf[i] for name, leaf in named.items()} for i in range(len(config.seeds))],
        "orders": orders.astype(np.int64),
    }


def agreement(one: Outcome, other: Outcome) -> tuple[float, float]:
    """Return the fraction of mask entries that agree, and the largest difference of the params."""
    same = [np.mean(one.masks[name] == other.masks[name]) for name in one.masks]
    sizes = [mask.size for mask in one.masks.values()]
    apart = [np.abs(one.params[name] - other.params[name]).max() for name in one.params]
    return float(np.average(same, weights=sizes)), float(max(apart))


def why_no_torch() -> str | None:
    """Return why PyTorch is not measured, or None."""
    if not TORCH:
        return "PyTorch is not installed (pip install torch), so it is left out."
    if jax.default_backend() != "cpu":
        return "PyTorch is measured on CPUs only, so it is left out."
    return None


def best_settings(worker: Any, steps: int) -> dict[str, tuple[int, str]]:
    """Return the thread count and Adam of the fastest loop with Adam as it comes, and of the fastest."""
    cores = os.cpu_count() or 1
    choices = [(threads, adam) for threads in sorted({1, max(1, cores // 2), cores}) for adam in ADAMS]
    tried: dict[tuple[int, str], float] = dict.fromkeys(choices, np.inf)
    for _ in range(3):
        for threads, adam in choices:
            seconds = worker("trial", threads, ADAMS[adam], steps)
            tried[threads, adam] = min(tried[threads, adam], seconds)
    plain = [choice for choice in choices if choice[1] == "default"]
    return {"torch": min(plain, key=tried.__getitem__), "torch best": min(choices, key=tried.__getitem__)}


def started(config: Config, stack: contextlib.ExitStack) -> tuple[dict[str, Worker], Worker | None]:
    """Return a worker process for each way, and one for the parts of a step; they end with the stack."""
    data = images(config)
    params = jax_lottery.initial(data, config.seeds)
    common = {"rates": RATES, "levels": config.levels, "lr": config.lr}

    def start(target: str, **settings: Any) -> Worker:
        return stack.enter_context(Worker(f"experiments.benchmarks.{target}", **settings))

    ours = {"data": data, "params": params, "batch_size": config.batch_size}
    seeds = {"seeds": config.seeds} | common
    workers = {way: start("parts.jax_lottery:JaxRuns", way=way, **ours, **seeds) for way in OURS}
    if why_no_torch() is None:
        workers["torch"] = start(
            "peers.torch_lottery:TorchLoop",
            **torch_start(config, data, params),
            **common,
        )
    if not config.bound:
        return workers, None
    ours["params"] = jax.tree.map(lambda leaf: leaf[0], params)
    return workers, start("parts.bound:Parts", **ours, steps=config.steps, lr=config.lr)


DESIGN = Design(factors=("figure", "way", "over", "part"), figures=("ratios", "masks", "params"))


def run(config: Config) -> list[dict[str, Any]]:
    """Run the benchmark, writes its lines, and returns them."""
    results = Results(config.out, "benchmarks.lottery", config, design=DESIGN)
    with results, contextlib.ExitStack() as stack:
        workers, parts = started(config, stack)
        # What compiles may do so at the same time; what is timed has the machine for itself.
        for worker in workers.values():
            worker.ask("outcome")
        ran = {way: Outcome(*worker.answer()) for way, worker in workers.items()}
        for way in list(workers)[1:]:
            masks, params = agreement(ran["spread"], ran[way])
            results.write(figure="agreement", way=way, masks=masks, params=params)

        turns: dict[str, Callable[[], float]] = {way: partial(workers[way], "measure") for way in OURS}
        settings = dict.fromkeys(OURS, "") | {"spread": f"devices: {workers['spread']('devices')}"}
        if "torch" in workers:
            best = best_settings(workers["torch"], min(config.trial_steps, config.steps))
            version = workers["torch"]("version")
            for way, (threads, adam) in best.items():
                turns[way] = partial(workers["torch"], "measure", threads, ADAMS[adam])
                settings[way] = f"PyTorch {version.partition('+')[0]}, {adam} Adam, threads: {threads}"
        seconds: dict[str, list[float]] = {way: [] for way in turns}
        for _ in tqdm(range(config.repeats), unit="round"):
            for way, turn in turns.items():
                seconds[way].append(turn())
        for way in turns:
            for over in ("alone", "torch", "torch best"):
                if over in turns:
                    ratios = np.divide(seconds[over], seconds[way]).tolist()
                    results.write(figure="speed", way=way, settings=settings[way], over=over, ratios=ratios)
        if parts is not None:
            for name, fractions in parts("measure", config.repeats).items():
                results.write(figure="bound", part=name, ratios=fractions)
    return results.lines


def shown(ratios: Sequence[float]) -> str:
    """Return the median, least and most, as in "3.52 (3.41-3.60)"."""
    low, middle, high = (f"{f(ratios):.2f}" for f in (np.min, np.median, np.max))
    return f"{middle} ({low}-{high})"


def summarise(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines as tables of at most 80 columns."""
    agreement = [
        [TITLES[line["way"]], f"{line['masks']:.3%}", f"{line['params']:.1e}"]
        for line in lines
        if line["figure"] == "agreement"
    ]
    text = [tables.text([["against spread", "masks that are the same", "params differ by"], *agreement])]
    speed = [line for line in lines if line["figure"] == "speed"]
    columns = [
        over for over in ("alone", "torch", "torch best") if any(line["over"] == over for line in speed)
    ]
    text += ["", "times as fast as the way above the column: median of rounds (least-most)"]
    rows = [["", *(TITLES[over].split(", ")[-1] for over in columns)]]
    ways = {line["way"]: line["settings"] for line in speed}
    for way in ways:
        own = {line["over"]: shown(line["ratios"]) for line in speed if line["way"] == way}
        rows.append([TITLES[way], *(own[over] for over in columns)])
    text.append(tables.text(rows))
    text += [f"{TITLES[way]}: {settings}" for way, settings in ways.items() if settings]
    if bound := [line for line in lines if line["figure"] == "bound"]:
        rows = [[line["part"], shown(line["ratios"])] for line in bound]
        text += ["", tables.text([["parts of a step: one seed, one core", "fraction of it"], *rows])]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    # The workers share an accelerator with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with datasets.explain_missing_data():
        lines = run(config)
    data = {"mnist": "MNIST", "synthetic": "synthetic images of MNIST's size"}[config.dataset]
    print(f"\n{len(config.seeds)} seeds of LeNet-300-100 on {data}, on {jax.devices()[0].device_kind}")
    print(f"{config.levels + 1} trainings of {config.steps} steps each, {config.repeats} rounds\n")
    print(summarise(lines))
    if reason := why_no_torch():
        print(reason)
    print(f"\nWrote results.jsonl to {config.out}")


if __name__ == "__main__":
    main()
