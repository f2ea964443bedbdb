"""Gradual pruning while training, against one-shot pruning and tuning.

LeNet-300-100 trains for the same number of epochs in every way:

- gradual: `wrap_optax` prunes along Zhu and Gupta's cubic schedule, with one
  ranking for all layers ("global") or the same sparsity in each ("layers");
- one-shot: dense training, one global pruning by magnitude, fine-tuning in
  what is left of the budget;
- random: masks drawn at the start, the same sparsity in each layer, never
  changed.

A run that was stopped goes on with what it had finished, method by method, when
the same command is given again.

    python -m experiments.gradual                  # digits, embedded
    python -m experiments.gradual --dataset mnist
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.data import datasets
from experiments.networks.small import MLP
from experiments.run import saved_recipes, stopping
from experiments.run.limits import Items
from experiments.run.results import Results, layers
from experiments.run.settings import (
    BatchSize,
    Count,
    Folder,
    Natural,
    Positive,
    Seeds,
    Settings,
    Sparsity,
    parse,
)
from experiments.show import figures, tables
from experiments.training import loops


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the study."""

    dataset: Literal["digits", "mnist"] = "digits"  # digits is embedded; mnist is downloaded once
    seeds: Seeds = (0, 1, 2)  # the runs that figures are averaged over
    # fractions removed, biases not counted
    sparsities: Annotated[tuple[Sparsity, ...], Items(empty=True)] = (0.8, 0.9, 0.95, 0.98)
    epochs: Count = 13  # the budget of every method
    tune_epochs: Natural = 3  # of these, the epochs of fine-tuning after one-shot pruning
    begin_epoch: Natural = 1  # gradual pruning begins after this epoch
    end_epoch: Natural = 10  # and reaches its target after this one
    mask_updates: Count = 40  # how often gradual pruning updates the masks in between
    lr: Positive = 1.2e-3  # learning rate of Adam
    batch_size: BatchSize = 60  # images per step
    train_size: Count | None = None  # use this many training images only
    test_size: Count | None = None  # use this many test images only
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
    """What a method prunes by: along the cubic schedule in steps, or in one go."""
    if method == "one-shot":
        return jp.recipes.parse({"prune": {"score": "magnitude", "sparsity": sparsity}})
    if method == "random":
        return jp.recipes.parse({"prune": {"score": "random", "sparsity": sparsity, "scope": "layerwise"}})
    begin, end = config.begin_epoch * steps_per_epoch, config.end_epoch * steps_per_epoch
    cubic = {"sparsity": sparsity, "begin_step": begin, "end_step": end}
    every = max(1, (end - begin) // config.mask_updates)
    prune = {"score": "magnitude", "sparsity": {"cubic": cubic}, "scope": method, "every": every}
    return jp.recipes.parse({"prune": prune})


def run(config: Config) -> list[dict[str, Any]]:
    """Runs the study, writes its lines, and returns them."""
    data = datasets.load(config.dataset, train=config.train_size, test=config.test_size)
    train_split, test_split = loops.splits(data)
    steps_per_epoch = -(-len(train_split.y) // config.batch_size)
    model, adam = MLP(), optax.adam(config.lr)
    fit = loops.masked_fitter(model, adam, config.batch_size, train_split)
    accuracy = loops.evaluator(model, test_split)
    init = loops.init(model, train_split, loops.seed_keys(config.seeds, purpose=0))
    keys, tune_keys, mask_keys = (loops.seed_keys(config.seeds, purpose=p) for p in (1, 2, 3))
    ones = jp.ones_masks(init)
    before = config.epochs - config.tune_epochs

    total = before + config.tune_epochs
    total += len(config.sparsities) * (3 * config.epochs + config.tune_epochs)
    results = Results(config.out, "gradual", config, resume=not config.fresh)
    with results, tqdm(total=total, unit="epoch") as bar:

        def record(method: str, sparsity: float, params: Any, masks: Any) -> None:
            figures, lines = accuracy(params), []
            for index, seed in enumerate(config.seeds):
                own = jax.tree.map(operator.itemgetter(index), (params, masks))
                jp.check_pruned(*own)
                achieved = jp.metrics.sparsity(own[1])
                line = {
                    "method": method,
                    "sparsity": sparsity,
                    "achieved": achieved.prunable,
                    "achieved_model": achieved.model,
                    "kept": jp.metrics.nonzeros(own[1]),
                    "seed": seed,
                    "accuracy": float(figures[index]),
                    "layers": layers(own[1]),
                }
                if index == 0 and sparsity == max(config.sparsities, default=None):
                    line["masks"] = results.keep_masks(method, own[1])
                lines.append(line)
            results.add(lines)

        def missing(method: str, sparsity: float) -> bool:
            if results.done(method=method, sparsity=sparsity):
                bar.update(config.tune_epochs if method in ("dense", "one-shot") else config.epochs)
                return False
            bar.set_description(f"{METHODS.get(method, method)} {sparsity:.0%}")
            return True

        bar.set_description("dense")
        half_trained = results.once("half-trained", lambda: fit(init, ones, keys, before, bar))
        bar.update(before - bar.n)
        if missing("dense", 0.0):
            record("dense", 0.0, fit(half_trained, ones, tune_keys, config.tune_epochs, bar), ones)
        for sparsity in config.sparsities:
            pruners = {}
            for method in METHODS:
                own = recipe(config, method, sparsity, steps_per_epoch)
                pruners[method] = own.pruner(jax.tree.map(operator.itemgetter(0), init))
                saved_recipes.save_method(results.unfinished, f"{method}-{sparsity:g}", own)
            for scope in ("global", "layerwise"):
                if not missing(scope, sparsity):
                    continue
                tx = jp.wrap_optax(adam, pruners[scope])
                gradually = loops.fitter(model, tx, config.batch_size, train_split)
                params, opt_state = gradually(init, keys, config.epochs, bar)
                record(scope, sparsity, params, optax.tree.get(opt_state, "masks"))

            if missing("one-shot", sparsity):
                prune = partial(jp.prune_rounds, pruner=pruners["one-shot"], rounds=1)
                masks = jax.vmap(prune)(half_trained)
                params = fit(half_trained, masks, tune_keys, config.tune_epochs, bar)
                record("one-shot", sparsity, params, masks)
            if missing("random", sparsity):
                prune = partial(jp.prune_rounds, pruner=pruners["random"], rounds=1)
                masks = jax.vmap(prune)(init, key=mask_keys)
                record("random", sparsity, fit(init, masks, keys, config.epochs, bar), masks)
    return results.lines


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as a table of at most 80 columns, means and standard deviations over seeds."""
    text = [f"dense: {tables.cell(lines, method='dense')} %", "", "accuracy in %, mean and s.d. over seeds"]
    text.append("sparsity  achieved" + "".join(f"{title:>15}" for title in METHODS.values()))
    for sparsity in sorted({line["sparsity"] for line in lines} - {0.0}):
        achieved = {round(line["achieved"], 4) for line in lines if line["sparsity"] == sparsity}
        text.append(
            f"{sparsity:>8.0%}  {'/'.join(f'{x:.2%}' for x in sorted(achieved)):>8}"
            + "".join(f"{tables.cell(lines, method=method, sparsity=sparsity):>15}" for method in METHODS)
        )
    return "\n".join(text)


def plot(lines: Sequence[dict[str, Any]], config: Config, data: str) -> None:
    """Accuracy against compression of the weights, as `accuracy.png`."""
    curves = figures.by_method(lines, list(METHODS), sorted(config.sparsities))
    curves = {METHODS[method]: curve for method, curve in curves.items()}
    figures.panels(
        Path(config.out) / "accuracy.png",
        f"LeNet-300-100, {data}; {config.epochs} epochs in all, {len(config.seeds)} seeds",
        [("compression (weights)", curves)],
        baseline=np.array([line["accuracy"] for line in lines if line["method"] == "dense"]),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        data = {"mnist": "MNIST", "digits": "digits"}[config.dataset]
        print(f"\nLeNet-300-100 on {data}, {config.epochs} epochs with every method")
        print(summarise(lines))
        plot(lines, config, data)
    print(f"\nWrote results.jsonl and accuracy.png to {config.out}")


if __name__ == "__main__":
    main()
