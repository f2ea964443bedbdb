"""Gradual pruning while training, against one-shot pruning and tuning.

LeNet-300-100 trains for the same number of epochs in every way:

- gradual: `wrap_optax` prunes along Zhu and Gupta's cubic schedule, with one
  ranking for all layers ("global") or the same sparsity in each ("layers");
- one-shot: dense training, one global pruning by magnitude, fine-tuning in
  what is left of the budget;
- random: masks drawn at the start, the same sparsity in each layer, never
  changed.

A run that was stopped resumes after its last finished method when the same
command is given again.

    python -m experiments.gradual                  # digits, embedded
    python -m experiments.gradual --dataset mnist
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import optax

import jaxprune as jp
from experiments.networks.small import MLP
from experiments.report.design import COMPRESSION, SPARSITY, Design
from experiments.run import saved_recipes, stopping, study
from experiments.run.limits import Items
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Sparsity, parse
from experiments.show import figures, tables
from experiments.training import loops


@dataclass(frozen=True)
class Config(study.Settings):
    """Flags of the study."""

    # fractions removed, biases not counted
    sparsities: Annotated[tuple[Sparsity, ...], Items(empty=True)] = (0.8, 0.9, 0.95, 0.98)
    epochs: Count = 13  # the budget of every method
    tune_epochs: Natural = 3  # of these, the epochs of fine-tuning after one-shot pruning
    begin_epoch: Natural = 1  # gradual pruning begins after this epoch
    end_epoch: Natural = 10  # and reaches its target after this one
    mask_updates: Count = 40  # how often gradual pruning updates the masks in between
    lr: Positive = 1.2e-3  # learning rate of Adam
    batch_size: BatchSize = 60  # images per step
    out: Folder = "results/gradual"  # folder for results.jsonl and the plot
    fresh: bool = False  # start over instead of resuming a stopped run

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_most("tune_epochs", "epochs")
        self.at_most("begin_epoch", "end_epoch")
        self.at_most("end_epoch", "epochs")


METHODS = {
    "global": "gradual global",
    "layerwise": "gradual layers",
    "one-shot": "one-shot, tune",
    "random": "random static",
}


def recipe(config: Config, method: str, sparsity: float, steps_per_epoch: int) -> jp.recipes.Recipe:
    """Return what a method prunes by: along the cubic schedule in steps, or in one go."""
    if method == "one-shot":
        return jp.recipes.parse({"prune": {"score": "magnitude", "sparsity": sparsity}})
    if method == "random":
        return jp.recipes.parse({"prune": {"score": "random", "sparsity": sparsity, "scope": "layerwise"}})
    begin, end = config.begin_epoch * steps_per_epoch, config.end_epoch * steps_per_epoch
    cubic = {"sparsity": sparsity, "begin_step": begin, "end_step": end}
    every = max(1, (end - begin) // config.mask_updates)
    prune = {"score": "magnitude", "sparsity": {"cubic": cubic}, "scope": method, "every": every}
    return jp.recipes.parse({"prune": prune})


DESIGN = Design(
    factors=("method",),
    levels=("sparsity",),
    figures=("accuracy", "achieved", "achieved_model", "kept"),
    percent=("sparsity", "accuracy", "achieved", "achieved_model"),
    baseline={"method": "dense"},
    axes=(COMPRESSION, SPARSITY),
)


class Study(study.Study):
    """The data, the network, and its training."""

    def __init__(self, config: Config):
        super().__init__(config, "gradual", DESIGN)
        self.train, test = config.load()
        self.model, self.adam = MLP(), optax.adam(config.lr)
        self.fit = loops.masked_fitter(self.model, self.adam, config.batch_size, self.train)
        self.accuracy = loops.evaluator(self.model, test)
        self.init = loops.init(self.model, self.train, self.keys(0))
        self.ones = jp.ones_masks(self.init)

    def dense(self) -> Any:
        """Train without pruning, and return the params from which one-shot pruning starts."""
        config = self.config
        before = config.epochs - config.tune_epochs
        half_trained = self.once(
            "half-trained", before, lambda: self.fit(self.init, self.ones, self.keys(1), before, self.bar)
        )
        if self.missing("dense", config.tune_epochs, method="dense", sparsity=0.0):
            params = self.fit(half_trained, self.ones, self.keys(2), config.tune_epochs, self.bar)
            self.record("dense", 0.0, params, self.ones)
        return half_trained

    def prune(self, method: str, sparsity: float, half_trained: Any) -> None:
        """Prune by a method, train, and write the figures."""
        config = self.config
        own = recipe(config, method, sparsity, -(-len(self.train.y) // config.batch_size))
        saved_recipes.save_method(self.results.unfinished, f"{method}-{sparsity:g}", own)
        epochs = config.tune_epochs if method == "one-shot" else config.epochs
        title = f"{METHODS[method]} {sparsity:.0%}"
        if not self.missing(title, epochs, method=method, sparsity=sparsity):
            return
        pruner = own.pruner(study.at(0, self.init))
        if method in ("global", "layerwise"):
            tx = jp.wrap_optax(self.adam, pruner)
            gradually = loops.fitter(self.model, tx, config.batch_size, self.train)
            params, opt_state = gradually(self.init, self.keys(1), epochs, self.bar)
            self.record(method, sparsity, params, optax.tree.get(opt_state, "masks"))
            return
        prune = partial(jp.prune_rounds, pruner=pruner, rounds=1)
        if method == "one-shot":
            masks, start, keys = jax.vmap(prune)(half_trained), half_trained, self.keys(2)
        else:
            masks, start, keys = jax.vmap(prune)(self.init, key=self.keys(3)), self.init, self.keys(1)
        self.record(method, sparsity, self.fit(start, masks, keys, epochs, self.bar), masks)

    def record(self, method: str, sparsity: float, params: Any, masks: Any) -> None:
        """Write the figures of a method, a line per seed."""
        accuracies = self.accuracy(params)

        def of_seed(index: int, kept: Any) -> dict[str, Any]:
            jp.check_pruned(study.at(index, params), kept)
            achieved = jp.metrics.sparsity(kept)
            return {
                "achieved": achieved.prunable,
                "achieved_model": achieved.model,
                "kept": jp.metrics.nonzeros(kept),
                "accuracy": float(accuracies[index]),
            }

        last = sparsity == max(self.config.sparsities, default=None)
        self.add_masked(masks, of_seed, last, method, sparsity=sparsity)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, write its lines, and return them."""
    gradual = Study(config)
    total = config.epochs + len(config.sparsities) * (3 * config.epochs + config.tune_epochs)
    with gradual.running(total, "epoch"):
        half_trained = gradual.dense()
        for sparsity in config.sparsities:
            for method in METHODS:
                gradual.prune(method, sparsity, half_trained)
    return gradual.results.lines


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as a table of at most 80 columns, means and standard deviations over seeds."""
    rows = {sparsity: f"{sparsity:.0%}" for sparsity in sorted({line["sparsity"] for line in lines} - {0.0})}
    table = tables.by_method(lines, rows, "sparsity", METHODS, heading="sparsity")
    missed = {x["achieved"] for x in lines if round(x["achieved"], 4) != round(x["sparsity"], 4)}
    note = [f"achieved: {', '.join(f'{x:.2%}' for x in sorted(missed))}"] if missed else []
    text = [f"dense: {tables.cell(lines, method='dense')} %", "", "accuracy in %, mean and s.d. over seeds"]
    return "\n".join([*text, table, *note])


def plot(lines: Sequence[dict[str, Any]], config: Config) -> None:
    """Draw accuracy against compression of the weights, as `accuracy.png`."""
    panels = {"compression (weights)": figures.by_method(lines, METHODS)}
    title = f"LeNet-300-100, {config.data}; {config.epochs} epochs in all, {len(config.seeds)} seeds"
    dense = figures.accuracies(lines, method="dense")
    figures.against_compression(Path(config.out) / "accuracy.png", title, panels, dense)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        print(f"\nLeNet-300-100 on {config.data}, {config.epochs} epochs with every method")
        print(summarise(lines))
        plot(lines, config)
    print(f"\nWrote results.jsonl and accuracy.png to {config.out}")


if __name__ == "__main__":
    main()
