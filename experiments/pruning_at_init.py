"""Pruning at initialisation, to the point where layers collapse.

A network loses all but 1/c of its weights before any training, by one of

- random: as many in each layer in proportion;
- erk: random, with Erdos-Renyi densities;
- magnitude: all layers ranked together by |w|;
- snip: by |w g| on one batch;
- grasp: by w (H g) on one batch;
- synflow-1: by synaptic flow, in one step;
- synflow: by synaptic flow, in 100 rounds;

and then trains. A layer that keeps nothing has collapsed; a network through
which no path leads is cut, and predicts one class whatever it is shown. Layers
may be emptied here (`floor=0`), which the library otherwise prevents. A run that
was stopped resumes after its last finished method when the same command is
given again.

    python -m experiments.pruning_at_init                  # digits, embedded
    python -m experiments.pruning_at_init --dataset mnist
    python -m experiments.pruning_at_init --network deep   # 784-100x6-10
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from experiments.networks.small import MLP
from experiments.report.design import Axis, Design
from experiments.run import saved_recipes, stopping, study
from experiments.run.limits import Range
from experiments.run.settings import BatchSize, Count, Folder, Positive, Seeds, parse
from experiments.show import figures, tables
from experiments.training import loops


@dataclass(frozen=True)
class Config(study.Settings):
    """Flags of the study."""

    network: Literal["lenet", "deep"] = "lenet"  # lenet is 300-100-10; deep is six times 100, then 10
    seeds: Seeds = (0, 1, 2, 3, 4)  # the runs that figures are averaged over
    # c: 1/c of the weights stays
    compressions: tuple[Annotated[float, Range(above=1)], ...] = (10, 20, 50, 100, 300, 1000)
    epochs: Count | None = None  # of training after pruning (default: 8, for digits 60)
    score_images: Count = 1000  # images in the batch of snip and grasp
    rounds: Count = 100  # of synflow
    lr: Positive = 1.2e-3  # learning rate of Adam
    batch_size: BatchSize = 60  # images per step
    out: Folder = "results/pruning_at_init"  # folder for results.jsonl and the plot
    fresh: bool = False  # start over instead of resuming a stopped run


NETWORKS = {"lenet": (300, 100, 10), "deep": (100,) * 6 + (10,)}
METHODS = ("random", "erk", "magnitude", "snip", "grasp", "synflow-1", "synflow")


def epochs(config: Config) -> int:
    """Return the epochs asked for; a small data set takes more of them."""
    return {"mnist": 8, "digits": 60}[config.dataset] if config.epochs is None else config.epochs


def recipe(method: str, compression: float, rounds: int) -> jp.recipes.Recipe:
    """Return what a method prunes by."""
    sparsity = 1 - 1 / compression
    # After k of n rounds the density is d^(k/n).
    levels = {"geometric": 1 - (1 - sparsity) ** (1 / rounds)}
    methods: dict[str, dict[str, Any]] = {
        "random": {"scope": "layerwise"},
        "erk": {"score": "random", "scope": "layerwise", "sparsity": {"erk": sparsity}},
        "synflow-1": {"score": "synflow"},
        "synflow": {"sparsity": levels},
    }
    default = {"score": method, "sparsity": sparsity, "floor": 0}
    return jp.recipes.parse({"prune": default | methods.get(method, {})})


def criteria(
    widths: tuple[int, ...], batch: tuple[jax.Array, jax.Array], compression: float, rounds: int
) -> dict[str, Callable[[Any, jax.Array], Any]]:
    """Return `masks(params, key)` for each method, which keep 1/compression of the weights."""
    raw = MLP(widths, logits=True)

    def loss_fn(params, batch, temperature=1.0):
        x, y = batch
        logits: Any = raw.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits / temperature, y).mean()

    def apply_fn(params, x):
        return raw.apply({"params": params}, x)

    params = jax.eval_shape(lambda key: raw.init(key, batch[0])["params"], jax.random.key(0))

    def masks_of(method: str) -> Callable[[Any, jax.Array], Any]:
        own = recipe(method, compression, rounds)
        # The only loss that a score here is made of is that of GraSP, which takes it at a temperature.
        given = {"loss_fn": partial(loss_fn, temperature=200.0), "apply_fn": apply_fn, "x": batch[0]}
        pruner, times = own.pruner(params, **given), 1 if own.once else rounds

        def masks(params: Any, key: jax.Array) -> Any:
            grads = jax.grad(loss_fn)(params, batch) if method == "snip" else None
            data = {"batch": batch} if "batch" in (pruner.takes or ()) else {}
            return jp.prune_rounds(params, pruner, times, key=key, grads=grads, **data)

        return masks

    return {method: masks_of(method) for method in METHODS}


def connected(widths: tuple[int, ...], masks: Any, x: jax.Array) -> jax.Array:
    """Return whether a path of kept weights leads from the input to the output."""

    def ones(path, mask):
        return jnp.where(mask & (path[-1].key == "kernel"), 1.0, 0.0)

    paths = jax.tree_util.tree_map_with_path(ones, masks)
    outputs: Any = MLP(widths, logits=True).apply({"params": paths}, jnp.ones_like(x[:1]))
    return jnp.sum(outputs) > 0


DESIGN = Design(
    factors=("method",),
    levels=("compression",),
    figures=("accuracy", "density", "connected"),
    percent=("accuracy", "density"),
    baseline={"method": "dense"},
    axes=(Axis("compression (weights)", "compression", "ratio"),),
)


class Study(study.Study):
    """The data, the network, and its training."""

    def __init__(self, config: Config):
        super().__init__(config, "pruning_at_init", DESIGN)
        train, test = config.load()
        train, held_out = loops.hold_out(train, 1 / 12)
        self.widths = NETWORKS[config.network]
        model, optimizer_of = MLP(self.widths), loops.fixed(optax.adam(config.lr))
        self.accuracy = loops.evaluator(model, test)
        self.fit = loops.whole_run(model, optimizer_of, config.batch_size, epochs(config), train, held_out)
        self.init = loops.init(model, train, self.keys(0))
        self.batch = train.batch(jnp.arange(min(config.score_images, len(train.y))))

    def train_and_record(self, method: str, compression: float, masks_of: Callable[..., Any]) -> None:
        """Prune, train, and write the figures, a line per seed."""
        if not self.missing(f"{method} {compression:g}x", 1, method=method, compression=compression):
            return
        masks = masks_of(self.init, self.keys(2))
        accuracies = self.accuracy(self.fit(self.init, masks, self.keys(1)).params)

        def of_seed(index: int, own: Any) -> dict[str, Any]:
            return {
                "density": 1 - jp.metrics.sparsity(own).prunable,
                "collapsed": jp.metrics.collapsed(own),
                "connected": bool(connected(self.widths, own, self.batch[0])),
                "accuracy": float(accuracies[index]),
            }

        last = compression == max(self.config.compressions, default=None)
        self.add_masked(masks, of_seed, last, method, compression=compression)
        self.bar.update()


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, write its lines, and return them."""
    at_init = Study(config)
    with at_init.running(1 + len(METHODS) * len(config.compressions), "run"):
        at_init.train_and_record("dense", 1, lambda params, keys: jp.ones_masks(params))
        for compression in config.compressions:
            for method in METHODS:
                own = recipe(method, compression, config.rounds)
                saved_recipes.save_method(at_init.results.unfinished, f"{method}-{compression:g}x", own)
            found = criteria(at_init.widths, at_init.batch, compression, config.rounds)
            for method, masks_of in found.items():
                at_init.train_and_record(method, compression, jax.jit(loops.over_seeds(masks_of)))
    return at_init.results.lines


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as tables of at most 80 columns, means and standard deviations over seeds."""
    rows = {c: f"{c:g}x" for c in sorted({line["compression"] for line in lines} - {1})}
    text = [f"dense: {tables.cell(lines, method='dense')} %", "", "accuracy in %, mean and s.d. over seeds"]
    text += [tables.by_method(lines, rows, "compression", METHODS, heading="compression")]
    text += ["", "networks that are cut, of all seeds (in brackets: with an empty layer)"]
    counts = [["compression", *METHODS]]
    for compression, label in rows.items():
        cells = []
        for method in METHODS:
            own = [x for x in lines if (x["method"], x["compression"]) == (method, compression)]
            cut, empty = sum(not x["connected"] for x in own), sum(bool(x["collapsed"]) for x in own)
            cells.append(f"{cut}/{len(own)} ({empty})")
        counts.append([label, *cells])
    return "\n".join([*text, tables.text(counts)])


def plot(lines: Sequence[dict[str, Any]], config: Config) -> None:
    """Draw accuracy against compression of the weights, as `accuracy.png`."""
    name = {"lenet": "LeNet-300-100", "deep": "MLP 100x6"}[config.network]
    panels = {"compression (weights)": figures.by_method(lines, METHODS, "compression")}
    title = (
        f"{name} pruned at initialisation, {config.data}; {epochs(config)} epochs, {len(config.seeds)} seeds"
    )
    dense = figures.accuracies(lines, method="dense")
    figures.against_compression(Path(config.out) / "accuracy.png", title, panels, dense)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    loops.use_cores(config.seeds)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        widths = "-".join(map(str, NETWORKS[config.network]))
        print(f"\n{widths} on {config.data}, pruned at initialisation, then {epochs(config)} epochs")
        print(summarise(lines))
        plot(lines, config)
    print(f"\nWrote results.jsonl and accuracy.png to {config.out}")


if __name__ == "__main__":
    main()
