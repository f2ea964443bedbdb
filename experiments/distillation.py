"""Distillation: what a teacher is worth to a smaller, an untrained and a pruned network.

Three parts, to be run together or apart:

- student: an article's. LeNet teaches a student of conv -> flatten -> linear,
  as it is there (linear in the pixels) and with a relu; and the true ratios of
  parameters, multiply-adds and file size. The article's loss is the sum of
  hard and soft cross-entropy, whose gradients are twice as large: labels at
  twice the rate are its control.
- few: LeNet-300-100 learns from few images, from their labels or from a
  teacher that has seen all images, at several temperatures.
- pruning: LeNet-300-100 is pruned level after level by magnitude and tuned
  after each, by labels or by the dense network's answers too, for the same
  epochs; with all images and with few, there also by a teacher that has
  seen all.

A run that was stopped resumes when the same command is given again, after its last
finished student, temperature, or way of tuning with all its levels.

    python -m experiments.distillation                   # digits, embedded
    python -m experiments.distillation --dataset mnist
    python -m experiments.distillation --dataset mnist --parts few
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.lenet import PRESETS as LENET
from experiments.lenet import file_bytes, optimizers
from experiments.networks.small import MLP, LeNet
from experiments.report.design import COMPRESSION, SPARSITY, Axis, Design
from experiments.run import stopping, study
from experiments.run.limits import FlagError, OneOf
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Share, Sparsity, parse
from experiments.show import figures, tables
from experiments.training import distill, loops
from experiments.training.distill import Mix

PARTS = ("student", "few", "pruning")
STUDENTS = {"conv-linear": False, "conv-relu-linear": True}  # whether there is a relu
# What the student learns from; the last from the flags.
LABELS, TWICE, SUM, MIX = "labels", "labels, 2x rate", "labels + T=1", "mix"
DENSE, TAUGHT = "dense teacher", "full teacher"


class Sizes(NamedTuple):
    """What a data set fixes; every field can be given as a flag, and then wins."""

    epochs: int
    tune_epochs: int
    few: int
    few_epochs: int
    few_tune_epochs: int
    teacher_epochs: int
    student_epochs: int
    student_batch_size: int


SIZES = {
    "digits": Sizes(30, 10, 100, 150, 50, 20, 20, 64),
    "mnist": Sizes(5, 3, 500, 150, 50, 10, 20, 256),
}


@dataclass(frozen=True)
class Config(study.Settings):
    """Flags of the study."""

    parts: tuple[Annotated[str, OneOf(PARTS)], ...] = PARTS  # which parts to run
    temperatures: tuple[Positive, ...] = (1.0, 2.0, 4.0, 8.0)  # of the part few
    temperature: Positive = 4.0  # of the other parts
    alpha: Share = 0.9  # the teacher's share of the loss; labels have the rest
    # fractions removed, level after level, biases not counted
    sparsities: tuple[Sparsity, ...] = (0.8, 0.9, 0.95, 0.98, 0.99)
    epochs: Count | None = None  # of dense LeNet-300-100 on all images
    tune_epochs: Natural | None = None  # of tuning after each level, on all images
    few: Count | None = None  # how many images are few
    few_epochs: Count | None = None  # of dense LeNet-300-100 on few images
    few_tune_epochs: Natural | None = None  # of tuning after each level, on few images
    teacher_epochs: Count | None = None  # of LeNet, the student's teacher
    student_epochs: Count | None = None  # of every student
    student_batch_size: BatchSize | None = None  # images per step of every student
    lr: Positive = 1.2e-3  # learning rate of Adam, for LeNet-300-100
    batch_size: BatchSize = 60  # images per step, for LeNet-300-100
    out: Folder = "results/distillation"  # folder for results.jsonl and the plots
    fresh: bool = False  # start over instead of resuming a stopped run


def settings(config: Config) -> Sizes:
    """Return the data set's settings with what the flags change."""
    given = {name: getattr(config, name) for name in Sizes._fields}
    return SIZES[config.dataset]._replace(**{k: v for k, v in given.items() if v is not None})


def student_mixes(config: Config) -> dict[str, Mix]:
    """Return what a student learns from, by name."""
    return {
        LABELS: distill.LABELS,
        TWICE: Mix(scale=2),
        # Half the sum of hard and soft cross-entropy, but for a constant, is this mixture.
        SUM: Mix(temperature=1, alpha=0.5, scale=2),
        MIX: Mix(config.temperature, config.alpha),
    }


class Dense(NamedTuple):
    """LeNet-300-100, trained on some images by their labels.

    Attributes:
      init, params: before and after, with a leading seed axis.
      images: those it was trained on.
      fit: trains such networks on them; see `distill.fitter`.
    """

    init: Any
    params: Any
    images: loops.Split
    fit: Callable[..., Any]


DESIGN = Design(
    factors=("part", "network", "images", "method"),
    levels=("temperature", "sparsity"),
    figures=("accuracy", "accuracy_before_tuning", "achieved", "achieved_model"),
    percent=("accuracy", "accuracy_before_tuning", "sparsity", "achieved", "achieved_model"),
    baseline={"part": "dense"},
    axes=(COMPRESSION, SPARSITY, Axis("temperature", "temperature", "ratio")),
)


class Study(study.Study):
    """What the parts share: the settings and the dense networks."""

    def __init__(self, config: Config):
        super().__init__(config, "distillation", DESIGN)
        self.sizes = settings(config)

    def lines(
        self, accuracies: np.ndarray, own: Callable[[int], dict[str, Any]] | None = None, **same: Any
    ) -> list[dict[str, Any]]:
        """Return a line for each seed: what is the same for all, and `own(index)`."""
        return [
            same | {"seed": seed, "accuracy": float(accuracies[index])} | (own(index) if own else {})
            for index, seed in enumerate(self.config.seeds)
        ]

    def train_dense(self) -> None:
        """Train the dense networks on all images and on few, for the parts that start from them."""
        train, test = self.config.load()
        if not 1 <= self.sizes.few <= len(train.y):
            raise FlagError(f"few must be 1 to {len(train.y)} images, got {self.sizes.few}.")
        few = train._replace(x=train.x[: self.sizes.few], y=train.y[: self.sizes.few])
        self.accuracy = loops.evaluator(MLP(), test)
        self.dense = {
            "all": self._dense("all", train, self.sizes.epochs, 0),
            "few": self._dense("few", few, self.sizes.few_epochs, 2),
        }
        # What the network that has seen all images says of the few.
        self.told = loops.answerer(MLP(), few)(self.dense["all"].params)

    def _dense(self, images: str, split: loops.Split, epochs: int, purpose: int) -> Dense:
        fit = distill.fitter(MLP(), optax.adam(self.config.lr), self.config.batch_size, split)
        init = loops.init(MLP(), split, self.keys(purpose))
        ones, keys = jp.ones_masks(init), self.keys(purpose + 1)
        params = self.once(f"dense-{images}", epochs, lambda: fit(init, ones, keys, epochs, self.bar))
        same = {"part": "dense", "images": images, "method": LABELS, "sparsity": 0.0}
        if self.missing(f"dense, {images} images", 0, **same):
            same |= {"train_images": len(split.y), "epochs": epochs}
            self.results.add(self.lines(self.accuracy(params), **same))
        return Dense(init, params, split, fit)


# --- the parts


def student(of: Study) -> None:
    """Train the article's student with LeNet as its teacher."""
    sizes, config = of.sizes, of.config
    train, test = config.load(size=28)
    im2col = jax.default_backend() == "cpu"
    lenet = dataclasses.replace(
        LENET["digits" if config.dataset == "digits" else "sane"], epochs=sizes.teacher_epochs
    )
    # The article's rate and momentum.
    networks: dict[str, tuple] = {
        "LeNet": (LeNet(im2col), optimizers(lenet, len(train.y))[0], lenet.batch_size, lenet.epochs)
    }
    for name, relu in STUDENTS.items():
        own = distill.Student(relu, im2col), optax.sgd(0.01, 0.2)
        networks[name] = (*own, sizes.student_batch_size, sizes.student_epochs)
    answers = None
    for number, (name, (model, optimizer, batch_size, epochs)) in enumerate(networks.items()):
        fit = distill.fitter(model, optimizer, batch_size, train)
        accuracy = loops.evaluator(model, test)
        init = loops.init(model, train, of.keys(10 + 2 * number))
        first = jax.tree.map(operator.itemgetter(0), init)
        image, _ = train.batch(jnp.arange(1))
        # Of the convolutions themselves: the products that compute them on a CPU multiply by zeros too.
        convolving = model.clone(im2col=False)
        costs = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(first)),
            "macs": jp.metrics.macs(
                lambda params, x, m=convolving: m.apply({"params": params}, x), first, image
            ).total,
        }
        for method, mix in ({LABELS: distill.LABELS} if name == "LeNet" else student_mixes(config)).items():
            keys, ones = of.keys(11 + 2 * number), jp.ones_masks(init)
            same = {"part": "student", "network": name, "method": method}
            if name == "LeNet":
                make = partial(fit, init, ones, keys, epochs, of.bar, None, mix)
                params = of.once("teacher", epochs, make)
                answers = loops.answerer(model, train)(params)
                if not of.missing(f"{name}, {method}", 0, **same):
                    continue
            elif of.missing(f"{name}, {method}", epochs, **same):
                params = fit(init, ones, keys, epochs, of.bar, answers, mix)
            else:
                continue

            def size(index: int, params: Any = params) -> dict[str, int]:
                return {"file_bytes": file_bytes(jax.tree.map(operator.itemgetter(index), params))}

            same |= {"mix": mix._asdict(), "epochs": epochs}
            of.results.add(of.lines(accuracy(params), size, **same, **costs))


def few(of: Study) -> None:
    """Train LeNet-300-100 on few images, with the network that has seen all as its teacher."""
    config, dense = of.config, of.dense["few"]
    for temperature in config.temperatures:
        mix = Mix(temperature, config.alpha)
        ones, keys, epochs = jp.ones_masks(dense.init), of.keys(3), of.sizes.few_epochs
        same = {"part": "few", "images": "few", "method": TAUGHT, "temperature": temperature}
        if not of.missing(f"few images, T={temperature:g}", epochs, **same):
            continue
        # The same first weights and order of images as by labels: those of the dense network.
        params = dense.fit(dense.init, ones, keys, epochs, of.bar, of.told, mix)
        same |= {"train_images": len(dense.images.y), "epochs": epochs}
        of.results.add(of.lines(of.accuracy(params), **same))


def pruning(of: Study) -> None:
    """Prune LeNet-300-100 level after level and tune it after each, with a teacher and without."""
    for images, epochs in (("all", of.sizes.tune_epochs), ("few", of.sizes.few_tune_epochs)):
        dense = of.dense[images]
        mix, ways = Mix(of.config.temperature, of.config.alpha), {}
        ways[LABELS] = (None, distill.LABELS)
        ways[DENSE] = (loops.answerer(MLP(), dense.images)(dense.params), mix)
        if images == "few":
            ways[TAUGHT] = (of.told, mix)
        for method, (answers, mix) in ways.items():
            chain = {"part": "pruning", "images": images, "method": method}
            title, cost = f"{images} images, {method}", epochs * len(of.config.sparsities)
            if not of.missing(title, cost, **chain):
                continue
            params, masks, lines = dense.params, jp.ones_masks(dense.params), []
            for level, sparsity in enumerate(sorted(of.config.sparsities), start=1):
                of.bar.set_description(f"{images} images, {method} {sparsity:.0%}")
                masks = distill.prune(params, masks, sparsity)
                before = of.accuracy(jp.apply_masks(params, masks))
                keys = of.keys(100 + level)
                params = dense.fit(params, masks, keys, epochs, of.bar, answers, mix)
                same = chain | {"sparsity": sparsity, "train_images": len(dense.images.y), "epochs": epochs}
                figures = distill.figures(params, masks, before)
                lines += of.lines(of.accuracy(params), figures, **same)
            of.results.add(lines)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, writes its lines, and returns them."""
    sizes, parts, levels = settings(config), set(config.parts), len(config.sparsities)
    total = (sizes.epochs + sizes.few_epochs) * bool(parts & {"few", "pruning"})
    students = sizes.student_epochs * len(STUDENTS) * len(student_mixes(config))
    total += (sizes.teacher_epochs + students) * ("student" in parts)
    total += len(config.temperatures) * sizes.few_epochs * ("few" in parts)
    total += levels * (2 * sizes.tune_epochs + 3 * sizes.few_tune_epochs) * ("pruning" in parts)
    distillation = Study(config)
    with distillation.running(total, "epoch"):
        if parts & {"few", "pruning"}:
            distillation.train_dense()
        for name, part in (("student", student), ("few", few), ("pruning", pruning)):
            if name in parts:
                part(distillation)
    return distillation.results.lines


# --- tables and plots


def summarise(lines: Sequence[dict[str, Any]], config: Config) -> str:
    """Return the lines as tables of at most 80 columns, means and standard deviations over seeds."""
    text = ["accuracy in %, mean and s.d. over seeds"]

    def own(**keys: Any) -> list[dict[str, Any]]:
        return [line for line in lines if all(line.get(key) == value for key, value in keys.items())]

    if "student" in config.parts:
        teacher = own(part="student", network="LeNet")
        rows = [["", "parameters", "", "MACs", "", "file, bytes", ""]]
        for name in ("LeNet", *STUDENTS):
            row = [name]
            for figure in ("parameters", "macs", "file_bytes"):
                dense, size = (
                    np.mean([line[figure] for line in some])
                    for some in (teacher, own(part="student", network=name))
                )
                row += [f"{size:,.0f}", f"(1/{dense / size:.2f})"]
            rows.append(row)
        students, methods = {name: name for name in STUDENTS}, list(student_mixes(config))
        epochs = own(part="student", network=list(STUDENTS)[-1])[0]["epochs"]
        text += ["", tables.text(rows), "", f"taught by LeNet ({tables.cell(teacher)}), {epochs} epochs"]
        text.append(tables.by_method(own(part="student"), students, "network", methods, heading="student"))
    for images in ("all", "few") if set(config.parts) & {"few", "pruning"} else ():
        dense = own(part="dense", images=images)
        count = dense[0]["train_images"]
        text += ["", f"LeNet-300-100 on {count} images, {dense[0]['epochs']} epochs: {tables.cell(dense)}"]
        if images == "few" and "few" in config.parts:
            text += ["", "the same, taught by the network that has seen all"]
            rows = [["temperature", "accuracy", "more than by labels"]]
            for temperature in config.temperatures:
                group = own(part="few", temperature=temperature)
                gain = [a["accuracy"] - b["accuracy"] for a, b in zip(group, dense, strict=True)]
                rows.append([f"T={temperature:g}", tables.cell(group), tables.percent(gain)])
            text.append(tables.text(rows))
        if "pruning" in config.parts:
            group = own(part="pruning", images=images)
            rows = {s: f"{s:.1%}" for s in sorted(config.sparsities)}
            methods = list(dict.fromkeys(line["method"] for line in group))
            text += ["", f"pruned level after level, {group[0]['epochs']} epochs of tuning after each"]
            text.append(tables.by_method(group, rows, "sparsity", methods, heading="sparsity"))
    return "\n".join(text)


def plot(lines: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """Draw accuracy against compression, `pruning-all.png` and `pruning-few.png`, for the part pruning."""
    names = []
    for images in ("all", "few") if "pruning" in config.parts else ():
        group = [line for line in lines if (line["part"], line.get("images")) == ("pruning", images)]
        methods = list(dict.fromkeys(line["method"] for line in group))
        names.append(f"pruning-{images}.png")
        title = f"LeNet-300-100, {config.data}, {group[0]['train_images']} images; "
        title += f"{group[0]['epochs']} epochs a level, {len(config.seeds)} seeds"
        panels = {"compression (weights)": figures.by_method(group, methods)}
        dense = figures.accuracies(lines, part="dense", images=images)
        figures.against_compression(Path(config.out) / names[-1], title, panels, dense)
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    loops.use_cores(config.seeds)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        print(f"\n{config.data}; T={config.temperature:g}, alpha={config.alpha:g} unless stated otherwise")
        print(summarise(lines, config))
        print(f"\nWrote {', '.join(['results.jsonl', *plot(lines, config)])} to {config.out}")


if __name__ == "__main__":
    main()
