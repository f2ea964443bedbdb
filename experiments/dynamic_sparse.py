"""Dynamic sparse training against static masks, gradual pruning and a dense net.

LeNet-300-100 trains for the same number of epochs in every way, with the same
number of weights at the end:

- static: random masks, Erdos-Renyi densities, never changed;
- set: these masks move during three quarters of the training, the smallest
  weights for random ones (SET);
- rigl: the same, for those with the largest gradient (RigL);
- gradual: from dense, along the cubic schedule, all layers ranked together;
- dense: nothing is pruned.

All seeds of a method train in one compiled program. A run that was stopped
resumes after its last finished method when the same command is given again.

    python -m experiments.dynamic_sparse                  # digits, embedded
    python -m experiments.dynamic_sparse --dataset mnist
"""

from collections.abc import Callable, Sequence
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
from experiments.run.limits import Range
from experiments.run.settings import BatchSize, Count, Folder, Positive, Seeds, parse
from experiments.show import figures, tables
from experiments.training import loops


@dataclass(frozen=True)
class Config(study.Settings):
    """Flags of the study."""

    seeds: Seeds = (0, 1, 2, 3, 4)  # the runs that figures are averaged over
    # fractions removed, biases not counted
    sparsities: tuple[Annotated[float, Range(above=0, below=1)], ...] = (0.9, 0.95, 0.98, 0.99)
    epochs: Count | None = None  # the budget of every method (default: 10, for digits 60)
    mask_updates: Count = 60  # how often masks move, or gradual pruning goes on
    # of the weights, moved in an update at the start
    fraction: Annotated[float, Range(above=0, at_most=1)] = 0.3
    lr: Positive = 1.2e-3  # learning rate of Adam
    batch_size: BatchSize = 60  # images per step
    out: Folder = "results/dynamic_sparse"  # folder for results.jsonl and the plot
    fresh: bool = False  # start over instead of resuming a stopped run


METHODS = ("static", "set", "rigl", "gradual")


def epochs(config: Config) -> int:
    """Return the epochs asked for; a small data set takes more of them."""
    return {"mnist": 10, "digits": 60}[config.dataset] if config.epochs is None else config.epochs


def moves(config: Config, steps: int) -> dict[str, Any]:
    """Return when masks move, and how much of them."""
    end = steps * 3 // 4
    return {"every": max(1, end // config.mask_updates), "end_step": end, "fraction": config.fraction}


def recipe(config: Config, method: str, sparsity: float, steps: int) -> jp.recipes.Recipe:
    """Return what a method prunes by: random masks, which move or not, or the cubic schedule from dense."""
    if method == "gradual":
        begin, end = steps // 10, steps * 3 // 4
        cubic = {"sparsity": sparsity, "begin_step": begin, "end_step": end}
        every = max(1, (end - begin) // config.mask_updates)
        return jp.recipes.parse(
            {"prune": {"score": "magnitude", "sparsity": {"cubic": cubic}, "every": every}}
        )
    prune: dict[str, Any] = {"score": "random", "scope": "layerwise", "sparsity": {"erk": sparsity}}
    if method != "static":
        prune["rewire"] = {method: moves(config, steps)}
    return jp.recipes.parse({"prune": prune})


def sparse_optimizers(config: Config, steps: int) -> dict[str, Callable[..., Any]]:
    """Return an optimizer for each method of sparse training, as a function of first masks and a key.

    As `recipe`, but with masks that are given, so that each is compiled once for all sparsities.
    """
    adam, when = optax.adam(config.lr), moves(config, steps)
    return {
        "static": loops.fixed(adam),
        "set": lambda masks, key: jp.wrap_optax(adam, jp.set_(masks, seed=key, **when)),
        "rigl": lambda masks, key: jp.wrap_optax(adam, jp.rigl(masks, **when)),
    }


DESIGN = Design(
    factors=("method",),
    levels=("sparsity",),
    figures=("accuracy", "achieved", "moved"),
    percent=("sparsity", "accuracy", "achieved"),
    baseline={"method": "dense"},
    axes=(COMPRESSION, SPARSITY),
)


class Study(study.Study):
    """The data, the network, and its training."""

    def __init__(self, config: Config):
        super().__init__(config, "dynamic_sparse", DESIGN)
        train, test = config.load()
        self.train, self.held_out = loops.hold_out(train, 1 / 12)
        self.steps = epochs(config) * -(-len(self.train.y) // config.batch_size)
        self.model = MLP()
        self.accuracy = loops.evaluator(self.model, test)
        self.init = loops.init(self.model, self.train, self.keys(0))

    def fitter(self, optimizer_of: Any) -> Callable[..., loops.Fit]:
        """Return the training with an optimizer, which is made from the first masks and a key."""
        config = self.config
        split = self.train, self.held_out
        return loops.whole_run(self.model, optimizer_of, config.batch_size, epochs(config), *split)

    def train_and_record(
        self, method: str, sparsity: float, start: Any, fit: Callable[..., loops.Fit]
    ) -> None:
        """Train from masks and write the figures, a line per seed."""
        if not self.missing(f"{method} {sparsity:.0%}", 1, method=method, sparsity=sparsity):
            return
        fitted = fit(self.init, start, self.keys(1))
        accuracies = self.accuracy(fitted.params)

        def of_seed(index: int, masks: Any) -> dict[str, Any]:
            params, before = study.at(index, (fitted.params, start))
            jp.check_pruned(params, masks)
            pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(before), strict=True)
            return {
                "achieved": jp.metrics.sparsity(masks).prunable,
                "kept": {path: int(m.sum()) for path, m in _kernels(masks).items()},
                "moved": sum(int((new & ~old).sum()) for new, old in pairs),
                "accuracy": float(accuracies[index]),
            }

        last = sparsity == max(self.config.sparsities, default=None)
        self.add_masked(fitted.masks, of_seed, last, method, sparsity=sparsity)
        self.bar.update()


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, write its lines, and return them."""
    dynamic = Study(config)
    ones = jp.ones_masks(dynamic.init)
    with dynamic.running(1 + len(METHODS) * len(config.sparsities), "run"):
        # These depend on the sparsity by their masks alone, so each is compiled once.
        optimizers = sparse_optimizers(config, dynamic.steps)
        fits = {method: dynamic.fitter(optimizer) for method, optimizer in optimizers.items()}
        dynamic.train_and_record("dense", 0.0, ones, fits["static"])
        for sparsity in config.sparsities:
            for method in METHODS:
                own = recipe(config, method, sparsity, dynamic.steps)
                saved_recipes.save_method(dynamic.results.unfinished, f"{method}-{sparsity:g}", own)
            masks = jax.vmap(partial(erk_masks, sparsity=sparsity))(dynamic.init, dynamic.keys(2))
            for method, fit in fits.items():
                dynamic.train_and_record(method, sparsity, masks, fit)
            pruner = recipe(config, "gradual", sparsity, dynamic.steps).pruner(study.at(0, dynamic.init))
            tx = jp.wrap_optax(optax.adam(config.lr), pruner)
            dynamic.train_and_record("gradual", sparsity, ones, dynamic.fitter(lambda masks, key, tx=tx: tx))
    return dynamic.results.lines


def erk_masks(params: Any, key: jax.Array, sparsity: float) -> Any:
    """Return random masks with Erdos-Renyi densities."""
    densities = jp.distributions.erk(params, sparsity)
    return jp.prune_once(params, jp.scores.random, densities, key=key, scope="layerwise")


def _kernels(masks: Any) -> dict[str, Any]:
    leaves = dict(zip(jp.leaf_paths(masks), jax.tree.leaves(masks), strict=True))
    return {path: mask for path, mask in leaves.items() if jp.kernels(path, mask)}


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as a table of at most 80 columns, means and standard deviations over seeds."""
    rows = {s: f"{s:.0%}" for s in sorted({line["sparsity"] for line in lines} - {0.0})}
    text = [f"dense: {tables.cell(lines, method='dense')} %", "", "accuracy in %, mean and s.d. over seeds"]
    return "\n".join([*text, tables.by_method(lines, rows, "sparsity", METHODS, heading="sparsity")])


def plot(lines: Sequence[dict[str, Any]], config: Config) -> None:
    """Draw accuracy against compression of the weights, as `accuracy.png`."""
    panels = {"compression (weights)": figures.by_method(lines, METHODS)}
    title = f"LeNet-300-100, {config.data}; {epochs(config)} epochs in all, {len(config.seeds)} seeds"
    dense = figures.accuracies(lines, method="dense")
    figures.against_compression(Path(config.out) / "accuracy.png", title, panels, dense)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    loops.use_cores(config.seeds)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        print(f"\nLeNet-300-100 on {config.data}, {epochs(config)} epochs with every method")
        print(summarise(lines))
        plot(lines, config)
    print(f"\nWrote results.jsonl and accuracy.png to {config.out}")


if __name__ == "__main__":
    main()
