"""The founding study, the whole command, beside what PyTorch's training epochs alone take.

- jaxprune: the command `python -m experiments.lenet`, from the start of Python
  to its end: imports, compiling, training, choosing masks, evaluation,
  compaction, timed passes, tables, files and the plot. JAX's persistent
  compilation cache is off.
- torch: a plain loop with torch.nn.utils.prune that trains the same networks
  (same seeds, amounts, rounds, epochs, batch sizes, learning rates, dropout),
  one after another, from images in memory. Only its epochs are timed. Short
  trials choose 1 thread or 2, and SGD as it comes or fused, whichever is
  fastest. Without PyTorch (pip install torch) this part is left out.

They take turns, round after round, in processes of their own. Figures are
medians of the ratios within rounds; those of the time of all cores together
(", CPUs") depend less on what else the machine does. With --shares it also
says what the command's time is spent on, from one more run of it.

    python -m experiments.benchmarks.main_study
    python -m experiments.benchmarks.main_study --rounds 1 --shares
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import lenet
from experiments.benchmarks.parts.machine import NO_TORCH, TORCH, machine
from experiments.benchmarks.parts.turns import Worker
from experiments.data import datasets
from experiments.run.settings import Count, Natural, Settings, Sparsity, parse
from experiments.show import tables


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark; its study is on digits, by default as `experiments.lenet` has it."""

    seeds: tuple[Natural, ...] = lenet.Config.seeds
    amounts: tuple[Sparsity, ...] = lenet.Config.amounts
    prunings: Count = lenet.Config.rounds  # how often a network is pruned and tuned
    epochs: Count = lenet.PRESETS["digits"].epochs  # of dense training
    tune_epochs: Natural = lenet.Config.tune_epochs
    train_size: Count | None = None  # use this many training images only
    rounds: Count = 5  # rounds in which each way runs once
    trial_epochs: Count = 4  # epochs of each trial that chooses PyTorch's threads and SGD
    shares: bool = False  # also say what the command's time is spent on


SMALL = Config(
    seeds=(0,),
    amounts=(0.5,),
    prunings=1,
    epochs=1,
    tune_epochs=1,
    train_size=70,
    rounds=1,
    trial_epochs=1,
)


def flags(config: Config, out: str) -> list[str]:
    """Return the command line of the study."""
    words = ["--dataset", "digits", "--out", out, "--rounds", str(config.prunings)]
    words += ["--seeds", ",".join(map(str, config.seeds)), "--amounts", ",".join(map(str, config.amounts))]
    words += ["--epochs", str(config.epochs), "--tune-epochs", str(config.tune_epochs)]
    return words + (["--train-size", str(config.train_size)] if config.train_size else [])


def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="main-study-")


def command(config: Config) -> tuple[float, float, dict[str, list[float]]]:
    """Return the same of the whole command as `TorchStudy.measure` of the epochs."""
    environment = {name: os.environ[name] for name in os.environ if name != "JAX_COMPILATION_CACHE_DIR"}
    with _folder() as folder:
        words = [sys.executable, "-m", "experiments.lenet", *flags(config, folder)]
        began, cpu_began = time.perf_counter(), _cpu_of_children()
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_of_children() - cpu_began
        if ran.returncode:
            raise RuntimeError(f"the study ended with status {ran.returncode}:\n{ran.stderr}")
        found: dict[str, list[float]] = {}
        for line in map(json.loads, (Path(folder) / "results.jsonl").read_text().splitlines()):
            name = line["method"] if line["method"] == "dense" else f"{line['method']} {line['amount']:g}"
            found.setdefault(name, []).append(line["accuracy"])
    return seconds, cpu_seconds, found


def _cpu_of_children() -> float:
    """Return the processors' seconds of all child processes that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def torch_study(config: Config) -> Worker:
    """Return a process with `TorchStudy` on the study's data."""
    data = datasets.load("digits", size=28, train=config.train_size)

    def images(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        normalised = (x / np.float32(255) - np.float32(data.mean)) / np.float32(data.std)
        return normalised.astype(np.float32), y.astype(np.int64)

    return Worker(
        "experiments.benchmarks.peers.torch_lenet:TorchStudy",
        train=images(data.x_train, data.y_train),
        test=images(data.x_test, data.y_test),
        seeds=config.seeds,
        amounts=config.amounts,
        rounds=config.prunings,
        epochs=config.epochs,
        tune_epochs=config.tune_epochs,
        settings=vars(lenet.PRESETS["digits"]),
    )


def fastest(worker: Worker, epochs: int) -> tuple[int, bool]:
    """Return the number of threads, 1 or 2, and whether SGD is fused, that suit PyTorch's epochs best."""
    choices = [(threads, fused) for threads in (1, 2) for fused in (False, True)]
    tried: dict[tuple[int, bool], float] = dict.fromkeys(choices, np.inf)
    for _ in range(3):
        for choice in choices:
            tried[choice] = min(tried[choice], worker("trial", *choice, epochs))
    return min(choices, key=tried.__getitem__)


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each way and, with --shares, for each part of the command's time."""
    taken: dict[str, list[float]] = {"jaxprune": [], "torch": []}
    used: dict[str, list[float]] = {"jaxprune": [], "torch": []}
    accuracies: dict[str, dict[str, list[float]]] = {}
    settings = {"jaxprune": "the whole command", "torch": ""}
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(torch_study(config)) if TORCH else None
        threads, fused = fastest(worker, config.trial_epochs) if worker else (0, False)
        for _ in tqdm(range(config.rounds), unit="round"):
            found = {"jaxprune": command(config)}
            if worker:
                found["torch"] = worker("measure", threads, fused)
            for way, (seconds, cpu_seconds, accuracies[way]) in found.items():
                taken[way].append(seconds)
                used[way].append(cpu_seconds)
        if worker:
            version, sgd = worker("version").partition("+")[0], "fused" if fused else "plain"
            settings["torch"] = f"PyTorch {version}, epochs alone, {sgd} SGD, threads: {threads}"
    lines = [
        {
            "way": way,
            "settings": settings[way],
            "seconds": taken[way],
            "cpu_seconds": used[way],
            "accuracies": _means(accuracies[way]),
        }
        for way in accuracies
    ]
    if config.shares:
        with Worker("experiments.benchmarks.parts.study_shares:Shares") as worker, _folder() as folder:
            spent = worker("measure", flags(config, folder))
        parts = sorted(spent.items(), key=lambda item: -item[1])
        lines += [{"part": part, "share": seconds / sum(spent.values())} for part, seconds in parts]
    return lines


def _means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean accuracy of the dense networks, and of each method over its amounts."""
    names = ("dense", *lenet.METHODS)
    own = {name: [values for key, values in found.items() if key.split()[0] == name] for name in names}
    return {name: float(np.mean(values)) for name, values in own.items() if values}


def summarise(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines as tables of at most 80 columns."""
    ways = {line["way"]: line for line in lines if "way" in line}
    first, *others = ways
    names = list(ways[first]["accuracies"])
    heads = [f"{other} / this{what}" for other in others for what in ("", ", CPUs")]
    rows = [["", *heads, *(f"{name} %" for name in names)]]
    for line in ways.values():
        row = [line["way"]]
        for other in others:
            for key in ("seconds", "cpu_seconds"):
                ratios = np.divide(ways[other][key], line[key])
                row.append(f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})")
        rows.append([*row, *(f"{100 * line['accuracies'][name]:.2f}" for name in names)])
    text = [tables.text(rows), *(f"{way}: {line['settings']}" for way, line in ways.items())]
    if not others:
        text.append(NO_TORCH)
    if parts := [line for line in lines if "part" in line]:
        rows = [["part of the command", "share"], *([line["part"], f"{line['share']:.1%}"] for line in parts)]
        text += ["", tables.text(rows)]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(f"\nThe founding study on digits, {len(config.seeds)} seeds, on {machine()}")
    print(f"accuracies are means over the amounts; {config.rounds} rounds: median (least-most)\n")
    print(summarise(lines))


if __name__ == "__main__":
    main()
