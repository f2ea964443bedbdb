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

A run that was stopped goes on with what it had finished, method by method, when the same
command is given again.

    python -m experiments.sensitivity                       # LeNet, digits, embedded
    python -m experiments.sensitivity --dataset mnist
    python -m experiments.sensitivity --network mlp         # LeNet-300-100
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.data import datasets
from experiments.networks.small import MLP, LeNet
from experiments.run import stopping
from experiments.run.limits import OneOf, Range
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

_KINDS = ("weights", "filters", "channels")
_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the study."""

    dataset: Literal["digits", "mnist"] = "digits"  # digits is embedded; mnist is downloaded once
    network: Literal["lenet", "mlp"] = "lenet"  # LeNet, or the perceptron 300-100-10
    seeds: Seeds = (0, 1, 2)  # the runs that figures are averaged over
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
    train_size: Count | None = None  # use this many training images only
    test_size: Count | None = None  # use this many test images only
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
    """The kinds of pruning, for a network's params or their shapes."""
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
    """The epochs of training and of tuning, and the folder; those asked for or those that fit."""
    epochs, tune_epochs = _EPOCHS[config.dataset]
    return (
        epochs if config.epochs is None else config.epochs,
        tune_epochs if config.tune_epochs is None else config.tune_epochs,
        config.out or f"results/sensitivity/{config.network}",
    )


def _accuracy(model: Any) -> Callable[[Any, loops.Split], jax.Array]:
    """`accuracy(params, split)`."""

    def hits(log_probs: jax.Array, y: jax.Array) -> jax.Array:
        return log_probs.argmax(-1) == y

    def accuracy(params: Any, split: loops.Split) -> jax.Array:
        def predict(x: jax.Array) -> Any:
            return model.apply({"params": params}, x)

        return loops.total(hits, predict, split, 500) / len(split.y)

    return accuracy


class Study:
    """A network, its data, and what is measured of both."""

    def __init__(self, config: Config):
        size = 28 if config.network == "lenet" else None
        data = datasets.load(config.dataset, size=size, train=config.train_size, test=config.test_size)
        train, test = loops.splits(data)
        self.train, self.held_out = loops.hold_out(train, config.held_out)
        self.config, self.model, self.note = config, MODELS[config.network], data.note
        self.epochs, self.tune_epochs, self.out = settings(config)
        adam = optax.adam(config.lr)
        self.fit = loops.masked_fitter(self.model, adam, config.batch_size, self.train)
        self.accuracy = loops.evaluator(self.model, test)
        self.init = loops.init(self.model, train, loops.seed_keys(config.seeds, purpose=0))
        self.right = _accuracy(self.model)
        self.image, _ = test.batch(jnp.arange(1))
        own = jax.eval_shape(lambda tree: jax.tree.map(operator.itemgetter(0), tree), self.init)
        self.kinds = kinds(config.network, own, self.image)

    def keys(self, purpose: int) -> jax.Array:
        """A key for each seed."""
        return loops.seed_keys(self.config.seeds, purpose)

    def analyse(self, params: Any, kind: Kind) -> jp.Sensitivity:
        """The sensitivities of one seed's network."""
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
        """The masks of each method, with as many weights: those that the targets leave."""
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
    """Runs the study, writes its lines, and returns them."""
    study = Study(config)
    cells = len(config.kinds) * len(config.tolerances) * len(METHODS)
    total = study.epochs + cells * study.tune_epochs
    results = Results(study.out, "sensitivity", config, resume=not config.fresh)
    with results, tqdm(total=total, unit="epoch") as bar:

        def line(index: int, **figures: Any) -> dict[str, Any]:
            return figures | {"seed": config.seeds[index], "note": study.note}

        bar.set_description("dense")
        ones = jp.ones_masks(study.init)
        dense = results.once("dense", lambda: study.fit(study.init, ones, study.keys(1), study.epochs, bar))
        bar.update(study.epochs - bar.n)
        if not results.done(figure="dense"):
            same = {"figure": "dense", "method": "dense"}
            results.add([line(i, **same, accuracy=float(x)) for i, x in enumerate(study.accuracy(dense))])
        each = [jax.tree.map(operator.itemgetter(index), dense) for index in range(len(config.seeds))]
        for name in config.kinds:
            kind = study.kinds[name]
            bar.set_description(f"sensitivity of {name}")
            found = [study.analyse(params, kind) for params in each]
            points = []
            for index, result in enumerate(found):
                for point in result.points:
                    own = {"layer": point.name, "level": point.sparsity, "achieved": point.achieved}
                    own |= {"kept": point.kept, "units": point.size, "notes": list(point.notes)}
                    own |= {"held_out_accuracy": point.metric, "drop": point.drop}
                    points.append(line(index, figure="sensitivity", kind=name, **own))
            if not results.done(figure="sensitivity", kind=name):
                results.add(points)
            for tolerance in config.tolerances:
                bar.set_description(f"{name}, {tolerance:g}")
                targets = [_targets(result, tolerance) for result in found]
                if None in targets:  # some network has no layer that can take the lowest level
                    bar.update(len(METHODS) * study.tune_epochs)
                    continue
                masks = [study.masks(p, kind, t or {}) for p, t in zip(each, targets, strict=True)]
                for method in METHODS:
                    cell = {"figure": "pruned", "kind": name, "method": method, "tolerance": tolerance}
                    if results.done(**cell):
                        bar.update(study.tune_epochs)
                        continue
                    own = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(m[method] for m in masks))
                    before = study.accuracy(jp.apply_masks(dense, own))
                    after = study.accuracy(study.fit(dense, own, study.keys(2), study.tune_epochs, bar))
                    results.add(
                        [
                            line(
                                index,
                                **cell,
                                targets=targets[index] if method == "by-layer" else None,
                                sparsity=jp.metrics.sparsity(mask).prunable,
                                before=float(before[index]),
                                accuracy=float(after[index]),
                                layers=layers(mask),
                            )
                            for index, mask in enumerate(m[method] for m in masks)
                        ]
                    )
    return results.lines


def _targets(result: jp.Sensitivity, tolerance: float) -> dict[str, float] | None:
    """None if no layer stays within the tolerance."""
    try:
        return jp.distributions.from_sensitivity(result, tolerance)
    except ValueError:
        return None


def summarise(lines: Sequence[Mapping[str, Any]], config: Config) -> str:
    """The lines as tables of at most 80 columns, means and standard deviations over seeds."""
    dense = [line for line in lines if line["figure"] == "dense"]
    text = [f"dense: {tables.cell(dense)} % of the test images", ""]
    points = [line for line in lines if line["figure"] == "sensitivity"]
    levels = sorted({line["level"] for line in points})
    width = max(18, *(len(line["layer"]) for line in points))
    fitting = (80 - width) // 6
    text.append("drop in held-out accuracy with one layer pruned, points, means over seeds")
    for start in range(0, len(levels), fitting):
        some = levels[start : start + fitting]
        text.append(" " * width + "".join(f"{level:>6.0%}" for level in some))
        for kind in config.kinds:
            text.append(kind)
            for layer in dict.fromkeys(line["layer"] for line in points if line["kind"] == kind):
                own = [line for line in points if (line["kind"], line["layer"]) == (kind, layer)]
                drops = [np.mean([x["drop"] for x in own if x["level"] == level]) for level in some]
                text.append(f"  {layer:<{width - 2}}" + "".join(f"{100 * drop:>6.1f}" for drop in drops))
    for kind in config.kinds:
        text += ["", *_comparison(lines, config, kind)]
    return "\n".join(text)


def _comparison(lines: Sequence[Mapping[str, Any]], config: Config, kind: str) -> list[str]:
    """Accuracies of one kind, by tolerance and method."""
    text = [
        f"{kind}: test accuracy in %, before | after tuning, means (and s.d.) over seeds",
        "tolerance  sparsity" + "".join(f"{method:>20}" for method in METHODS),
    ]
    for tolerance in config.tolerances:
        own = [
            x for x in lines if x["figure"] == "pruned" and (x["kind"], x["tolerance"]) == (kind, tolerance)
        ]
        if not own:
            text.append(f"{tolerance:>9.1%}  no layer, of some seed, can take the lowest level")
            continue
        sparsity = np.mean([line["sparsity"] for line in own if line["method"] == "by-layer"])
        row = f"{tolerance:>9.1%}{sparsity:>10.1%}"
        for method in METHODS:
            before, after = (
                100 * np.array([line[figure] for line in own if line["method"] == method])
                for figure in ("before", "accuracy")
            )
            row += f"{before.mean():.1f} | {after.mean():.2f} ({after.std():.1f})".rjust(20)
        text.append(row)
    return text


def plot_drops(lines: Sequence[Mapping[str, Any]], config: Config) -> None:
    """The drops of each layer against its sparsity, as `sensitivity.png`."""
    panels = []
    for kind in config.kinds:
        own = [x for x in lines if x["figure"] == "sensitivity" and x["kind"] == kind]
        curves = {}
        for layer in dict.fromkeys(line["layer"] for line in own):
            cells = [
                [x["drop"] for x in own if (x["layer"], x["level"]) == (layer, v)] for v in config.levels
            ]
            curves[layer] = figures.Curve([100 * level for level in config.levels], np.array(cells))
        panels.append((f"% of its {kind} pruned, of one layer alone", curves))
    figures.panels(
        Path(settings(config)[2]) / "sensitivity.png",
        f"{_TITLES[config.network]}, {config.dataset}: sensitivity; {len(config.seeds)} seeds",
        panels,
        figure="drop in held-out accuracy (points)",
        logarithmic=False,
    )


def plot(lines: Sequence[Mapping[str, Any]], config: Config) -> None:
    """Accuracies against compression of the weights, as `untuned.png` and `tuned.png`."""
    pruned = [line for line in lines if line["figure"] == "pruned"]
    for figure, name in (("before", "untuned"), ("accuracy", "tuned")):
        panels = []
        for kind in config.kinds:
            cells = {t: [line for line in pruned if _is(line, kind, t)] for t in config.tolerances}
            cells = {tolerance: cell for tolerance, cell in cells.items() if cell}
            if not cells:
                continue
            curves = {}
            for method in METHODS:
                own = [[line for line in cell if line["method"] == method] for cell in cells.values()]
                x = [1 / (1 - float(np.mean([line["sparsity"] for line in cell]))) for cell in own]
                curves[method] = figures.Curve(x, np.array([[line[figure] for line in cell] for cell in own]))
            panels.append((f"compression ({kind})", curves))
        if not panels:
            continue
        figures.panels(
            Path(settings(config)[2]) / f"{name}.png",
            f"{_TITLES[config.network]} pruned by sensitivity, {name}, {config.dataset}; "
            f"{len(config.seeds)} seeds",
            panels,
            baseline=np.array([line["accuracy"] for line in lines if line["figure"] == "dense"]),
        )


def _is(line: Mapping[str, Any], kind: str, tolerance: float) -> bool:
    return (line["kind"], line["tolerance"]) == (kind, tolerance)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study from the command line."""
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
