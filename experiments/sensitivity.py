"""How much each layer can spare, alone, and what the answer is worth.

A network is trained. Then, one layer at a time, it is pruned by magnitude at several
levels, and its accuracy on held-out training images is measured, without any tuning:

- weights: single weights of a layer;
- filters: whole columns of a layer's kernel by their L1 norm; not of the last layer;
- channels: coupled channels, with their biases and all that reads them.

From that come targets: each layer at the highest level that costs no more than a
tolerance, when it alone is pruned. The network is pruned to these (by-layer), and to as
few weights, or just fewer, by one sparsity for all layers (uniform) and by one ranking of
all (global); test accuracies are from before and after a little fine-tuning. In the
global ranking of filters and channels norms are divided by their number or mean, which
makes those of different layers comparable.

A run that was stopped resumes after its last finished method when the same command is
given again.

    python -m experiments.sensitivity                       # LeNet, digits, embedded
    python -m experiments.sensitivity --dataset mnist
    python -m experiments.sensitivity --network mlp         # LeNet-300-100
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.data import datasets
from experiments.networks.small import MLP, LeNet
from experiments.report.design import COMPRESSION, Axis, Design
from experiments.run import stopping, study
from experiments.run.limits import OneOf, Range
from experiments.run.results import layers
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Sparsity, parse
from experiments.show import figures, tables
from experiments.training import loops
from jaxprune import plots

_KINDS = ("weights", "filters", "channels")
_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Config(study.Settings):
    """Flags of the study."""

    network: Literal["lenet", "mlp"] = "lenet"  # LeNet, or the perceptron 300-100-10
    kinds: tuple[Annotated[str, OneOf(_KINDS)], ...] = _KINDS  # of pruning
    levels: tuple[Sparsity, ...] = _LEVELS  # sparsities tried
    # drops in accuracy allowed to each layer
    tolerances: tuple[Annotated[float, Range(at_least=0)], ...] = (0.005, 0.01, 0.02, 0.05)
    epochs: Count | None = None  # of the dense network (default: 8, for digits 60)
    tune_epochs: Natural | None = None  # of fine-tuning (default: 1, for digits 5)
    lr: Positive = 1.2e-3  # learning rate of Adam
    batch_size: BatchSize = 60  # images per step
    # share of the training images that the analysis measures on
    held_out: Annotated[float, Range(above=0, below=1)] = 1 / 6
    out: Folder | None = None  # folder of the results (default: results/sensitivity/<network>)
    fresh: bool = False  # start over instead of resuming a stopped run


METHODS = ("by-layer", "uniform", "global")
_EPOCHS = {"mnist": (8, 1), "digits": (60, 5)}
MODELS = {"lenet": LeNet(), "mlp": MLP()}
_TITLES = {"lenet": "LeNet", "mlp": "LeNet-300-100"}


class Kind(NamedTuple):
    """What is pruned: keywords of `jaxprune.prune_once`, besides the scores.

    Attributes:
      structure: for the analysis, by-layer and uniform.
      ranked_globally: for global, where norms of groups of different sizes are made comparable.
      where: which leaves take part.
    """

    structure: jp.Structure
    ranked_globally: jp.Structure
    where: Callable[[str, Any], bool] = jp.kernels


def kinds(network: str, params: Any, image: jax.Array) -> dict[str, Kind]:
    """Return the kinds of pruning, for a network's params or their shapes."""
    # The same network: LeNet's own convolutions, not products of patches.
    model = LeNet(im2col=False) if network == "lenet" else MODELS[network]
    groups = jp.channel_groups(lambda params, x: model.apply({"params": params}, x), params, image)
    last = {"lenet": "fc2/*", "mlp": "fc3/*"}[network]
    columns = jp.structures.slices(axis=-1, norm=1)
    single = jp.structures.elements()
    return {
        "weights": Kind(single, single),
        "filters": Kind(
            columns,
            jp.structures.slices(axis=-1, norm=jnp.mean),
            jp.all_of(jp.kernels, jp.not_(jp.matching(last))),
        ),
        "channels": Kind(
            jp.structures.channels(groups, norm=1),
            jp.structures.channels(groups, norm=1, normalize=jnp.mean),
        ),
    }


def settings(config: Config) -> tuple[int, int, str]:
    """Return the epochs of training and of tuning, and the folder; those asked for or those that fit."""
    epochs, tune_epochs = _EPOCHS[config.dataset]
    return (
        epochs if config.epochs is None else config.epochs,
        tune_epochs if config.tune_epochs is None else config.tune_epochs,
        config.out or f"results/sensitivity/{config.network}",
    )


def _accuracy(model: Any) -> Callable[[Any, loops.Split], jax.Array]:
    """Return `accuracy(params, split)`."""

    def hits(log_probs: jax.Array, y: jax.Array) -> jax.Array:
        return log_probs.argmax(-1) == y

    def accuracy(params: Any, split: loops.Split) -> jax.Array:
        def predict(x: jax.Array) -> Any:
            return model.apply({"params": params}, x)

        return loops.total(hits, predict, split, 500) / len(split.y)

    return accuracy


DESIGN = Design(
    factors=("figure", "kind", "method", "layer"),
    levels=("tolerance", "level"),
    figures=("accuracy", "held_out_accuracy", "before", "drop", "sparsity", "achieved"),
    percent=(
        *("accuracy", "held_out_accuracy", "before", "drop", "sparsity", "achieved"),
        *("tolerance", "level"),
    ),
    baseline={"method": "dense"},
    axes=(COMPRESSION, Axis("sparsity of one layer", "achieved", "x")),
)


class Study(study.Study):
    """A network, its data, and what is measured of both."""

    def __init__(self, config: Config):
        self.epochs, self.tune_epochs, self.out = settings(config)
        super().__init__(config, "sensitivity", DESIGN, self.out)
        size = 28 if config.network == "lenet" else None
        data = datasets.load(config.dataset, size=size, train=config.train_size, test=config.test_size)
        train, test = loops.splits(data)
        self.train, self.held_out = loops.hold_out(train, config.held_out)
        self.model, self.note = MODELS[config.network], data.note
        adam = optax.adam(config.lr)
        self.fit = loops.masked_fitter(self.model, adam, config.batch_size, self.train)
        self.accuracy = loops.evaluator(self.model, test)
        self.init = loops.init(self.model, train, self.keys(0))
        self.right = _accuracy(self.model)
        self.image, _ = test.batch(jnp.arange(1))
        own = jax.eval_shape(lambda tree: study.at(0, tree), self.init)
        self.kinds = kinds(config.network, own, self.image)

    def train_dense(self) -> Any:
        """Return the dense network of each seed, trained, after writing its figures."""
        ones = jp.ones_masks(self.init)
        dense = self.once(
            "dense", self.epochs, lambda: self.fit(self.init, ones, self.keys(1), self.epochs, self.bar)
        )
        if self.missing("dense", 0, figure="dense"):
            accuracies = self.accuracy(dense)
            same = {"figure": "dense", "method": "dense", "note": self.note}
            self.add(lambda index: {"accuracy": float(accuracies[index])}, **same)
        return dense

    def compare(self, name: str, dense: Any) -> None:
        """Analyse one kind of pruning, prune to the targets that gives, and write the figures."""
        kind, each = self.kinds[name], [study.at(index, dense) for index in range(len(self.config.seeds))]
        self.bar.set_description(f"sensitivity of {name}")
        found = [self.analyse(params, kind) for params in each]
        if not self.results.done(figure="sensitivity", kind=name):
            self.results.add(
                [line for i, result in enumerate(found) for line in self.points(name, i, result)]
            )
        for tolerance in self.config.tolerances:
            targets = [_targets(result, tolerance) for result in found]
            if None in targets:  # some network has no layer that can take the lowest level
                self.bar.update(len(METHODS) * self.tune_epochs)
                continue
            masks = [self.masks(p, kind, t or {}) for p, t in zip(each, targets, strict=True)]
            for method in METHODS:
                cell = {"figure": "pruned", "kind": name, "method": method, "tolerance": tolerance}
                if self.missing(f"{name}, {tolerance:g}", self.tune_epochs, **cell):
                    given = targets if method == "by-layer" else [None] * len(each)
                    self.tune_and_record(dense, [own[method] for own in masks], given, **cell)

    def points(self, name: str, index: int, result: jp.Sensitivity) -> Iterator[dict[str, Any]]:
        """Yield the lines of a seed's analysis."""
        for point in result.points:
            yield {
                "figure": "sensitivity",
                "kind": name,
                "layer": point.name,
                "level": point.sparsity,
                "achieved": point.achieved,
                "kept": point.kept,
                "units": point.size,
                "notes": list(point.notes),
                "held_out_accuracy": point.metric,
                "drop": point.drop,
                "seed": self.config.seeds[index],
                "note": self.note,
            }

    def tune_and_record(self, dense: Any, masks: list[Any], targets: list[Any], **cell: Any) -> None:
        """Tune the pruned network of each seed and write its figures."""
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
        before = self.accuracy(jp.apply_masks(dense, together))
        tuned = self.fit(dense, together, self.keys(2), self.tune_epochs, self.bar)
        after = self.accuracy(tuned)
        self.add(
            lambda index: {
                "targets": targets[index],
                "sparsity": jp.metrics.sparsity(masks[index]).prunable,
                "before": float(before[index]),
                "accuracy": float(after[index]),
                "layers": layers(masks[index]),
            },
            **cell,
            note=self.note,
        )

    def analyse(self, params: Any, kind: Kind) -> jp.Sensitivity:
        """Return the sensitivities of one seed's network."""
        return jp.sensitivity(
            self.right,  # one function for all seeds, which compiles once
            params,
            self.held_out,
            levels=self.config.levels,
            structure=kind.structure,
            where=kind.where,
            metric="held-out accuracy",
        )

    def masks(self, params: Any, kind: Kind, targets: Mapping[str, float]) -> dict[str, Any]:
        """Return the masks of each method, with as many weights: those that the targets leave."""
        by_layer = jp.prune_once(
            params,
            jp.scores.magnitude,
            targets,
            scope="layerwise",
            structure=kind.structure,
            where=kind.where,
        )

        def left(masks: Any) -> int:
            kernels = [m for path, m in _leaves(masks).items() if jp.kernels(path, m)]
            return jp.metrics.nonzeros(kernels)

        def match(scope: str, structure: jp.Structure) -> Any:
            most = left(by_layer)
            return jp.budget(
                left, params, at_most=most, scope=scope, structure=structure, where=kind.where
            ).masks

        return {
            "by-layer": by_layer,
            "uniform": match("layerwise", kind.structure),
            "global": match("global", kind.ranked_globally),
        }


def _leaves(tree: Any) -> dict[str, Any]:
    return dict(zip(jp.leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, write its lines, and return them."""
    sensitivity = Study(config)
    cells = len(config.kinds) * len(config.tolerances) * len(METHODS)
    with sensitivity.running(sensitivity.epochs + cells * sensitivity.tune_epochs, "epoch"):
        dense = sensitivity.train_dense()
        for name in config.kinds:
            sensitivity.compare(name, dense)
    return sensitivity.results.lines


def _targets(result: jp.Sensitivity, tolerance: float) -> dict[str, float] | None:
    """Return the targets, or None if no layer stays within the tolerance."""
    try:
        return jp.distributions.from_sensitivity(result, tolerance)
    except ValueError:
        return None


def summarise(lines: Sequence[Mapping[str, Any]], config: Config) -> str:
    """Return the lines as tables of at most 80 columns, means and standard deviations over seeds."""
    dense = [line for line in lines if line["figure"] == "dense"]
    points = [line for line in lines if line["figure"] == "sensitivity"]
    levels = sorted({line["level"] for line in points})
    text = [f"dense: {tables.cell(dense)} % of the test images", ""]
    text.append("drop in held-out accuracy with one layer pruned, points, means over seeds")
    for kind in config.kinds:
        own = [line for line in points if line["kind"] == kind]
        rows = [[kind, *(f"{level:.0%}" for level in levels)]]
        for layer in dict.fromkeys(line["layer"] for line in own):
            drops = [
                np.mean([x["drop"] for x in own if (x["layer"], x["level"]) == (layer, level)])
                for level in levels
            ]
            rows.append([layer, *(f"{100 * drop:.1f}" for drop in drops)])
        text.append(tables.text(rows))
    for kind in config.kinds:
        text += ["", f"{kind}: test accuracy in %, before | after tuning, means (and s.d.) over seeds"]
        text.append(tables.text([["tolerance", "sparsity", *METHODS], *_comparison(lines, config, kind)]))
    return "\n".join(text)


def _comparison(lines: Sequence[Mapping[str, Any]], config: Config, kind: str) -> Iterator[list[str]]:
    """Yield the accuracies of one kind, a row for each tolerance."""
    for tolerance in config.tolerances:
        own = [line for line in lines if line["figure"] == "pruned" and _is(line, kind, tolerance)]
        if not own:  # in some seed's network no layer can take the lowest level
            yield [f"{tolerance:.1%}", *["-"] * (1 + len(METHODS))]
            continue
        row = [f"{tolerance:.1%}"]
        row.append(f"{np.mean([x['sparsity'] for x in own if x['method'] == 'by-layer']):.1%}")
        for method in METHODS:
            before, after = (
                100 * np.array([line[figure] for line in own if line["method"] == method])
                for figure in ("before", "accuracy")
            )
            row.append(f"{before.mean():.1f} | {after.mean():.2f} ({after.std():.1f})")
        yield row


def plot_drops(lines: Sequence[Mapping[str, Any]], config: Config) -> None:
    """Draw the drops of each layer against its sparsity, as `sensitivity.png`."""
    panels: dict[str, dict[str, plots.Line]] = {}
    for kind in config.kinds:
        own = [x for x in lines if x["figure"] == "sensitivity" and x["kind"] == kind]
        panels[f"% of its {kind} pruned, of one layer alone"] = {
            layer: (
                [100 * level for level in config.levels],
                [[x["drop"] for x in own if (x["layer"], x["level"]) == (layer, v)] for v in config.levels],
            )
            for layer in dict.fromkeys(line["layer"] for line in own)
        }
    title = f"{_TITLES[config.network]}, {config.dataset}: sensitivity; {len(config.seeds)} seeds"
    figure = plots.panels(panels, y="drop in held-out accuracy (points)", title=title, percent=True)
    figures.save(figure, Path(settings(config)[2]) / "sensitivity.png")


def plot(lines: Sequence[Mapping[str, Any]], config: Config) -> None:
    """Draw accuracies against compression of the weights, as `untuned.png` and `tuned.png`."""
    pruned = [line for line in lines if line["figure"] == "pruned"]
    for figure, name in (("before", "untuned"), ("accuracy", "tuned")):
        panels: dict[str, dict[str, plots.Line]] = {}
        for kind in config.kinds:
            cells = [[line for line in pruned if _is(line, kind, t)] for t in config.tolerances]
            for method in METHODS if any(cells) else ():
                own = [[line for line in cell if line["method"] == method] for cell in cells if cell]
                panels.setdefault(f"compression ({kind})", {})[method] = (
                    [1 / (1 - float(np.mean([line["sparsity"] for line in cell]))) for cell in own],
                    [[line[figure] for line in cell] for cell in own],
                )
        if not panels:
            continue
        title = f"{_TITLES[config.network]} pruned by sensitivity, {name}, {config.dataset}; "
        title += f"{len(config.seeds)} seeds"
        path = Path(settings(config)[2]) / f"{name}.png"
        figures.against_compression(path, title, panels, figures.accuracies(lines, figure="dense"))


def _is(line: Mapping[str, Any], kind: str, tolerance: float) -> bool:
    return (line["kind"], line["tolerance"]) == (kind, tolerance)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    loops.use_cores(config.seeds)
    with stopping.exit_with_message(settings(config)[2]):
        lines = run(config)
        print(f"\n{_TITLES[config.network]} on {lines[0]['note']}")
        print(summarise(lines, config))
        plot_drops(lines, config)
        plot(lines, config)
    print(f"\nWrote results.jsonl and plots to {settings(config)[2]}")


if __name__ == "__main__":
    main()
