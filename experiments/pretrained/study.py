"""Networks that others have trained, pruned without training.

The weights come with a package, and so do the data that they are judged on; nothing is downloaded. Every
method prunes the same network, on calibration sets without labels, of which there are several draws. Parts
of the study:

- entries: every method at several sparsities, the same for all layers;
- nm: the same methods for 2:4;
- channels: half of some units, and the network compacted.

    python -m experiments.pretrained --network g2p
    python -m experiments.pretrained --network magika --files /usr/share

The last product before the output stays dense, and so do tables that are looked up. The same command with
more parts, methods, sparsities or draws adds to the results. A run that was stopped resumes after its last
line.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import jaxprune as jp
from experiments.one_shot import methods
from experiments.one_shot.methods import METHODS, Calibrated, Pruned, Recovery
from experiments.pretrained import g2p, magika, show
from experiments.pretrained.network import Pretrained
from experiments.report.design import SPARSITY, Design
from experiments.run import stopping
from experiments.run.limits import FlagError, Items, OneOf
from experiments.run.results import Results, layers
from experiments.run.settings import Count, Folder, Settings, Sparsity, parse

NETWORKS: dict[str, Callable[..., Pretrained]] = {"g2p": g2p.load, "magika": magika.load}
PARTS = ("entries", "nm", "channels")
NM = jp.structures.nm(2, 4)
_RESAMPLED = 1000  # times


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the study."""

    network: Annotated[str, OneOf(tuple(NETWORKS))] = "g2p"  # which
    parts: tuple[Annotated[str, OneOf(PARTS)], ...] = PARTS  # what to run
    # of entries and nm
    methods: Annotated[tuple[Annotated[str, OneOf(tuple(METHODS))], ...], Items(empty=True)] = tuple(METHODS)
    sparsities: tuple[Sparsity, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of entries
    draws: Count = 5  # calibration sets that figures are averaged over
    # magika: files of these folders (default: Python's library, installed packages, /usr/share)
    files: Annotated[tuple[str, ...], Items(empty=True)] = ()
    test_size: Count | None = None  # use this many test examples only; of magika, files of each type
    examples: Count | None = None  # in a calibration set; the default is the network's, as of the next
    more: Count | None = None  # in the larger one of recover-more
    recover_steps: Count = 600  # of tuning the survivors
    no_times: bool = False  # leave out how long methods take, so that two runs write the same lines
    fresh: bool = False  # start over, whatever the folder holds
    out: Folder | None = None  # folder of the results (default: results/pretrained/<network>)

    def __post_init__(self):
        super().__post_init__()
        if self.files and self.network != "magika":
            raise FlagError(f"--files: {self.network} reads no files; only magika does")


# What a line of results may differ in from another run's and still be of the same study.
_NOT_SETTINGS = ("parts", "methods", "sparsities", "draws", "no_times", "fresh", "out")


class Unit(NamedTuple):
    """One figure to be had, and what a line of results is known by.

    Attributes:
      part: of the study, or "dense".
      method: what prunes.
      pattern: what is removed: "entries", "2:4", or the name of channels.
      sparsity: the share of the entries, or units, that was asked to go.
      draw: which calibration set.
    """

    part: str
    method: str
    pattern: str = "entries"
    sparsity: float = 0.0
    draw: int = 0


def units(config: Config, network: Pretrained) -> list[Unit]:
    """Return all that is asked for, in order."""
    makers = {"entries": _entries, "nm": _nm, "channels": _channels}
    found = [Unit("dense", "dense")]
    for draw in range(config.draws):
        for part in config.parts:
            found += [unit._replace(draw=draw) for unit in makers[part](config, network)]
    return found


def _entries(config: Config, network: Pretrained) -> Iterator[Unit]:
    del network
    for sparsity in config.sparsities:
        for name in config.methods:
            yield Unit("entries", name, sparsity=sparsity)


def _nm(config: Config, network: Pretrained) -> Iterator[Unit]:
    del network
    for name in config.methods:
        yield Unit("nm", name, "2:4", 0.5)


def _channels(config: Config, network: Pretrained) -> Iterator[Unit]:
    del config
    for name in network.channels:
        for method in methods.CHANNEL_METHODS:
            yield Unit("channels", method, name, 0.5)


class Study:
    """A trained network, and what is made of it."""

    def __init__(self, config: Config, network: Pretrained):
        self.config, self.network = config, network
        self.dense = network.evaluate(network.params)
        self.calibrated = lru_cache(maxsize=2)(self._calibrated)

    def _calibrated(self, draw: int, more: bool) -> Calibrated:
        network = self.network
        make = network.more if more else network.calibration
        if make is None:
            raise FlagError(f"--methods: {network.name} has no larger calibration set to recover more on")
        batches, weights = make(draw)
        recovery = Recovery(
            batches, self.config.recover_steps, lambda path, leaf: True, network.recover_rate, draw
        )
        return Calibrated(network.apply_fn, network.params, batches, recovery, weights)

    def figures(self, unit: Unit) -> dict[str, Any]:
        """Return what a line says of a unit beside its name."""
        if unit.part == "dense":
            return self.scored(self.network.params) | {"data": self.network.data}
        more = unit.part != "channels" and METHODS[unit.method].more
        network, begin = self.calibrated(unit.draw, more), time.perf_counter()
        pruned, found = self.pruned(network, unit)
        jax.block_until_ready(pruned.variables)
        if not self.config.no_times:
            found |= {"seconds": time.perf_counter() - begin}
        jp.check_pruned(pruned.variables, pruned.masks)
        of_layers, of_params = jp.metrics.sparsity(pruned.masks, network.norms.where)
        found |= {"of_layers": of_layers, "of_params": of_params, "layers": layers(pruned.masks)}
        return self.scored(pruned.variables) | found

    def pruned(self, network: Calibrated, unit: Unit) -> tuple[Pruned, dict[str, Any]]:
        """Prune single entries, n of each m, or units; return what more there is to say as well."""
        if unit.part == "channels":
            return methods.halved(network, self.network.channels[unit.pattern], unit.method)
        structure = NM if unit.pattern == "2:4" else None
        return METHODS[unit.method].prune(network, unit.sparsity, structure), {}

    def scored(self, params: Any) -> dict[str, float]:
        """Return the errors of a network as a share of the units, and their gap to the dense network's.

        `low` and `high` are the ends of the 95 % bootstrap interval of the gap: test examples are drawn with
        replacement, the same ones for both networks.
        """
        own = self.network.evaluate(params)
        low, high = np.quantile(gaps(own, self.dense, _RESAMPLED), (0.025, 0.975))
        error, dense = (float(each[:, 0].sum() / each[:, 1].sum()) for each in (own, self.dense))
        found = {"error": error, "gap": error - dense, "low": float(low), "high": float(high)}
        return found | ({"changed": float(own[:, 2].mean())} if own.shape[1] == 3 else {})


def gaps(own: np.ndarray, dense: np.ndarray, times: int, seed: int = 0) -> np.ndarray:
    """Return how much more errors a network makes than the dense one, on examples drawn with replacement.

    Args:
      own, dense: (examples, 2 or more), errors and units of each.
      times: how often to draw.
      seed: of the draws.

    Example:
      >>> gaps(np.array([[1, 2], [1, 2]]), np.array([[0, 2], [0, 2]]), 3).tolist()
      [0.5, 0.5, 0.5]
    """
    count = len(own)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=times)
    (errors, units), (dense_errors, dense_units) = (drawn @ own[:, :2]).T, (drawn @ dense[:, :2]).T
    return errors / units - dense_errors / dense_units


DESIGN = Design(
    factors=("part", "method", "pattern"),
    levels=("sparsity", "draw"),
    figures=(
        "error", "gap", "low", "high", "changed", "of_layers", "of_params", "params", "macs",
        "compaction_error", "seconds",
    ),
    percent=("error", "gap", "low", "high", "changed", "of_layers", "of_params", "sparsity"),
    baseline={"method": "dense"},
    axes=(SPARSITY,),
)  # fmt: skip


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, write its lines, and return those that were asked for."""
    sizes = {"test": config.test_size, "examples": config.examples, "more": config.more}
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if config.files:
        given["folders"] = config.files
    network = NETWORKS[config.network](**given)
    wanted = units(config, network)
    results = Results(
        folder(config),
        "pretrained",
        config,
        design=DESIGN,
        resume=not config.fresh,
        adds=True,
        may_differ=_NOT_SETTINGS,
    )
    with results, tqdm(unit="network") as bar:
        if others := {line["note"] for line in results.lines} - {network.note}:
            raise FlagError(
                f"{folder(config)} has results of other data: {others.pop()}, and now {network.note}. "
                "Start over with --fresh, or write elsewhere with --out"
            )
        missing = [unit for unit in wanted if not results.done(**unit._asdict())]
        bar.total = len(missing)
        study = Study(config, network) if missing else None
        for unit in missing:
            assert study is not None
            bar.set_description(f"{unit.part}, {unit.method}, draw {unit.draw}")
            results.write(**unit._asdict(), **study.figures(unit), note=network.note)
            bar.update()
    names = set(wanted)
    return [line for line in results.lines if Unit(**{k: line[k] for k in Unit._fields}) in names]


def folder(config: Config) -> str:
    """Return the folder of the results."""
    return config.out or f"results/pretrained/{config.network}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(folder(config)):
        lines = run(config)
        print(f"\n{show.summarise(lines)}")
        pictures = show.plot(lines, folder(config))
    print(f"\nWrote {' and '.join(['results.jsonl', *pictures])} to {folder(config)}")
