"""Pruning of trained networks without training them: calibration, and what is done with it.

A network is trained once for each seed, and every method starts from the same weights. A few hundred
training examples, without their labels, are the calibration set. Parts of the study:

- entries: every method at several sparsities, the same for all layers;
- nm: the same methods for 2:4;
- channels: half of some channels, hidden units or heads, and the network compacted;
- budgets: one sparsity for all layers, OWL's, or those that measured layer errors suggest;
- statistics: BatchNorm's running statistics as they were, or estimated again;
- calibration: the size and the seed of the calibration set, and one that the network writes itself;
- bits: weights of few bits, with and without pruning.

    python -m experiments.one_shot                              # CNN with BatchNorm, digits, embedded
    python -m experiments.one_shot --dataset tiny_shakespeare   # a small GPT of characters

The dense networks are kept in the results folder, and so is every line: the same command with more parts,
methods or seeds adds to them. A run that was stopped resumes after its last finished
epoch or line.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import jax
from tqdm import tqdm

import jaxprune as jp
from experiments.one_shot import cases, methods, show
from experiments.one_shot.cases import NETWORKS
from experiments.one_shot.methods import METHODS, Calibrated, Pruned
from experiments.report.design import SPARSITY, Design
from experiments.run import stopping
from experiments.run.checkpoint import forget
from experiments.run.limits import Items, OneOf, Range
from experiments.run.results import Results, layers
from experiments.run.settings import (
    BatchSize,
    Count,
    Folder,
    Positive,
    Seeds,
    Settings,
    Sparsity,
    parse,
)
from experiments.training import steps

PARTS = ("entries", "nm", "channels", "budgets", "statistics", "calibration", "bits")


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the study."""

    # digits are embedded; the text is downloaded once
    dataset: Literal["digits", "tiny_shakespeare"] = "digits"
    parts: tuple[Annotated[str, OneOf(PARTS)], ...] = PARTS  # what to run
    seeds: Seeds = (0, 1, 2)  # the dense networks that figures are averaged over
    # of entries and nm
    methods: Annotated[tuple[Annotated[str, OneOf(tuple(METHODS))], ...], Items(empty=True)] = tuple(METHODS)
    sparsities: tuple[Sparsity, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of entries
    budget: Annotated[float, Range(at_least=0, at_most=0.9)] = (
        0.7  # of the part budgets: what all layers lose together
    )
    examples: Count | None = (
        None  # in the calibration set; the default is the network's, as of the next eight
    )
    sizes: tuple[Count, ...] | None = None  # of the calibration sets that are compared
    draws: Count = 3  # calibration sets of each size, for each dense network
    more: Count | None = None  # examples that recover-more is calibrated and tuned on
    recover_steps: Count | None = None  # of tuning the survivors
    epochs: Count | None = None  # of the dense network
    lr: Positive | None = None  # its learning rate, at the peak of one cycle
    batch_size: BatchSize | None = None  # images, or windows of text, per step of its training
    train_size: Count | None = None  # use this many training images, or characters, only
    test_size: Count | None = None  # use this many test images, or characters, only
    dense: Folder | None = None  # the folder of the dense networks (default: dense, in the results)
    no_times: bool = False  # leave out how long methods take, so that two runs write the same lines
    fresh: bool = False  # start over, the dense networks too, whatever the folders hold
    out: Folder | None = None  # folder of the results (default: results/one_shot/<dataset>)


# What a line of results may differ in from another run's and still be of the same study.
_NOT_SETTINGS = (
    "parts",
    "seeds",
    "methods",
    "sparsities",
    "budget",
    "sizes",
    "draws",
    "dense",
    "no_times",
    "fresh",
    "out",
)
_DENSE_SETTINGS = ("dataset", "epochs", "lr", "batch_size", "train_size")
_BITS = (4, 3)
NM = jp.structures.nm(2, 4)


def settings(config: Config) -> Any:
    """Return the flags as a Config, with the network's defaults where they were left out.

    It is an Any to the type checker, to which the fields filled in could still be None.
    """
    network = NETWORKS[config.dataset]
    names = ("examples", "sizes", "more", "recover_steps", "epochs", "lr", "batch_size")
    own = {name: getattr(network, name) for name in names if getattr(config, name) is None}
    out = config.out or f"results/one_shot/{config.dataset}"
    return dataclasses.replace(config, out=out, dense=config.dense or f"{out}/dense", **own)


class Unit(NamedTuple):
    """One figure to be had: with the seed, what a line of results is known by.

    Attributes:
      part: of the study, or "dense".
      method: what prunes.
      pattern: what is removed: "entries", "2:4", or the name of channels.
      sparsity: the share of the entries, or units, that was asked to go.
      examples: in the calibration set.
      draw: which calibration set of that size; each dense network has others.
      source: whose the calibration set is, "data" or "own samples".
      bits: of a weight.
    """

    part: str
    method: str
    pattern: str = "entries"
    sparsity: float = 0.0
    examples: int = 0
    draw: int = 0
    source: str = "data"
    bits: int = 32


def units(chosen: Any) -> list[Unit]:
    """Return all that a seed is asked for, in order."""
    makers = {
        "entries": _entries,
        "nm": _nm,
        "channels": _channels,
        "budgets": _budgets,
        "statistics": _statistics,
        "calibration": _calibration,
        "bits": _bits,
    }
    return [Unit("dense", "dense"), *(unit for part in chosen.parts for unit in makers[part](chosen))]


def _count(chosen: Any, method: str) -> int:
    return chosen.more if METHODS[method].more else chosen.examples


def _entries(chosen: Any) -> Iterator[Unit]:
    for sparsity in chosen.sparsities:
        for name in chosen.methods:
            yield Unit("entries", name, sparsity=sparsity, examples=_count(chosen, name))


def _nm(chosen: Any) -> Iterator[Unit]:
    for name in chosen.methods:
        yield Unit("nm", name, "2:4", 0.5, _count(chosen, name))


def _channels(chosen: Any) -> Iterator[Unit]:
    for name in NETWORKS[chosen.dataset].channels:
        for method in methods.CHANNEL_METHODS:
            yield Unit("channels", method, name, 0.5, chosen.examples)


def _budgets(chosen: Any) -> Iterator[Unit]:
    for method in methods.BUDGETED:
        for way in methods.BUDGETS:
            yield Unit("budgets", f"{method}, {way}", sparsity=chosen.budget, examples=chosen.examples)


def _statistics(chosen: Any) -> Iterator[Unit]:
    for sparsity in chosen.sparsities if NETWORKS[chosen.dataset].normalised else ():
        for method in methods.RE_ESTIMATED:
            for name in (method, f"{method}, re-estimated"):
                yield Unit("statistics", name, sparsity=sparsity, examples=chosen.examples)


def _calibration(chosen: Any) -> Iterator[Unit]:
    samples = NETWORKS[chosen.dataset].writes
    for method in methods.COMPARED:
        for count in chosen.sizes:
            for draw in range(chosen.draws):
                for source in ("data", "own samples")[: 1 + samples]:
                    yield Unit("calibration", method, "entries", 0.5, count, draw, source)


def _bits(chosen: Any) -> Iterator[Unit]:
    for bits in _BITS:
        for sparsity in (0.0, 0.5):
            for method in methods.ROUNDED:
                yield Unit("bits", method, sparsity=sparsity, examples=chosen.examples, bits=bits)


class Study:
    """A dense network of one seed, and what is made of it."""

    def __init__(
        self, task: cases.Task, score: Callable[[Any], steps.Score], dense: Any, seed: int, timed: bool
    ):
        self.task, self.score, self.dense, self.seed, self.timed = task, score, dense, seed, timed
        self.dense_loss = score(dense).loss
        self.calibrated = lru_cache(maxsize=8)(self._calibrated)

    def _calibrated(self, examples: int, draw: int, source: str) -> Calibrated:
        seed = 1000 * self.seed + draw
        if source == "own samples":
            x = cases.sampled_windows(self.task, self.dense, examples, seed)
        else:
            x = cases.calibration_set(self.task, examples, seed)
        return cases.calibrated(self.task, self.dense, x, seed)

    def figures(self, unit: Unit) -> dict[str, Any]:
        """Return what a line says of a unit beside its name."""
        if unit.part == "dense":
            return self.scored(self.dense)
        network, begin = self.calibrated(unit.examples, unit.draw, unit.source), time.perf_counter()
        if unit.part == "channels":
            pruned, more = methods.halved(network, self.task.network.channels[unit.pattern], unit.method)
        else:
            pruned, more = self.pruned(network, unit), {}
        jax.block_until_ready(pruned.variables)
        seconds = time.perf_counter() - begin
        jp.check_pruned(pruned.variables, pruned.masks)
        if self.timed:
            more |= {"seconds": seconds}
        return self.scored(pruned.variables) | more | {"layers": layers(pruned.masks["params"])}

    def pruned(self, network: Calibrated, unit: Unit) -> Pruned:
        """Prune single entries, n of each m, or bits."""
        if unit.part == "budgets":
            method, way = unit.method.split(", ")
            return methods.budgeted(network, method, way, unit.sparsity)
        if unit.part == "statistics":
            name, _, again = unit.method.partition(", ")
            pruned = METHODS[name].prune(network, unit.sparsity, None)
            return methods.re_estimated(self.task.train_mode, network, pruned) if again else pruned
        if unit.part == "bits":
            return methods.rounded(network, unit.method, unit.sparsity, unit.bits)
        return METHODS[unit.method].prune(network, unit.sparsity, NM if unit.pattern == "2:4" else None)

    def scored(self, variables: Any) -> dict[str, float]:
        """Return the figures of a network on the test split; the gap is to the dense one's loss."""
        score = self.score(variables)
        return score._asdict() | {"gap": score.loss - self.dense_loss}


DESIGN = Design(
    factors=("part", "method", "pattern", "source"),
    levels=("sparsity", "examples", "draw", "bits"),
    figures=("loss", "accuracy", "gap", "seconds", "params", "macs", "compaction_error"),
    percent=("accuracy", "sparsity"),
    baseline={"method": "dense"},
    axes=(SPARSITY,),
)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, write its lines, and return those that were asked for."""
    chosen = settings(config)
    wanted = units(chosen)
    figures = DESIGN.figures
    if chosen.dataset == "digits":
        figures = ("accuracy", "loss", *figures[2:])
    results = Results(
        chosen.out,
        "one_shot",
        chosen,
        design=DESIGN._replace(figures=figures),
        resume=not chosen.fresh,
        adds=True,
        may_differ=_NOT_SETTINGS,
    )
    with results, tqdm(unit="network") as bar:
        for seed in chosen.seeds if chosen.fresh else ():
            forget(f"{chosen.dense}/seed-{seed}")
        missing = {
            seed: [unit for unit in wanted if not results.done(seed=seed, **unit._asdict())]
            for seed in chosen.seeds
        }
        bar.total = sum(map(len, missing.values()))
        if not bar.total:
            return _asked(results.lines, wanted, chosen)
        network = NETWORKS[chosen.dataset]._replace(recover_steps=chosen.recover_steps)
        task = cases.load(chosen.dataset, chosen.train_size, chosen.test_size)._replace(network=network)
        score = steps.scorer(task.apply, task.test, min(len(task.test.y), 2 * network.chunk))
        dense = cases.Dense(task, chosen.dense, {name: getattr(chosen, name) for name in _DENSE_SETTINGS})
        for seed, left in missing.items():
            if not left:
                continue
            bar.set_description(f"dense, seed {seed}")
            study = Study(task, score, dense.variables(seed, bar), seed, not chosen.no_times)
            for unit in left:
                bar.set_description(f"{unit.part}, {unit.method}, seed {seed}")
                results.write(**unit._asdict(), seed=seed, **study.figures(unit), note=task.note)
                bar.update()
    return _asked(results.lines, wanted, chosen)


def _asked(lines: Sequence[dict[str, Any]], wanted: Sequence[Unit], chosen: Any) -> list[dict[str, Any]]:
    names = set(wanted)
    return [
        line
        for line in lines
        if line["seed"] in chosen.seeds and Unit(**{name: line[name] for name in Unit._fields}) in names
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out or "results/one_shot"):
        lines = run(config)
        chosen = settings(config)
        print(f"\n{NETWORKS[chosen.dataset].title} on {lines[0]['note']}")
        print(show.summarise(lines, chosen))
        pictures = show.plot(lines, chosen)
    print(f"\nWrote {' and '.join(['results.jsonl', *pictures])} to {chosen.out}")
