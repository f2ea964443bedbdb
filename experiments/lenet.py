"""LeNet pruned at random, by magnitude, and by channels: the founding study.

Train to convergence; then K times prune a fraction of what remains in each
layer and fine-tune for N epochs. Three experiments, at 10 to 70 % per round:
random and L1 on single weights of all four layers, and L1 on the output
channels of conv1, conv2 and fc1. Biases are never pruned. A run that was
stopped goes on with its finished fractions when the same command is given again.

    python -m experiments.lenet                    # digits, embedded
    python -m experiments.lenet --dataset mnist    # the article's settings
    python -m experiments.lenet --dataset mnist --preset sane
"""

import dataclasses
import operator
import tempfile
from collections.abc import Callable, Sequence
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
from experiments.networks.small import LeNet
from experiments.run import saved_recipes, stopping
from experiments.run.limits import Items
from experiments.run.results import Results, layers
from experiments.run.settings import Count, Folder, Natural, Seeds, Settings, Sparsity, parse
from experiments.show import figures
from experiments.training import loops


@dataclass(frozen=True)
class Training:
    """What a preset fixes; every field can be given as a flag, and then wins."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    cosine: bool
    tune_batch_size: int
    tune_lr: float


PRESETS = {
    # The article's: SGD, learning rate .01, momentum .5, batches of 1024, and of 512 to fine-tune.
    "article": Training(80, 1024, 0.01, 0.5, False, 512, 0.01),
    # A rate that decays to 0, and small batches.
    "sane": Training(20, 128, 0.05, 0.9, True, 128, 0.01),
    # For the 1437 training images of the embedded digits.
    "digits": Training(40, 64, 0.05, 0.9, True, 64, 0.02),
}


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the study."""

    dataset: Literal["digits", "mnist"] = "digits"  # digits is embedded; mnist is downloaded once
    # training settings; by default digits for digits and article for mnist
    preset: Literal["article", "sane", "digits"] | None = None
    seeds: Seeds = (0, 1, 2)  # the runs that figures are averaged over
    # fractions of the remaining pruned per round; '' for dense only
    amounts: Annotated[tuple[Sparsity, ...], Items(empty=True)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    rounds: Count = 3  # K, how often it prunes and fine-tunes
    tune_epochs: Natural = 4  # N, epochs of each fine-tuning
    epochs: Count | None = None  # epochs of dense training; by default the preset's
    train_size: Count | None = None  # use this many training images only
    test_size: Count | None = None  # use this many test images only
    timing_runs: Natural = 5  # timed passes over the training images; 0 for none (the article: 20)
    out: Folder = "results/lenet"  # folder for results.jsonl and plots
    fresh: bool = False  # start over instead of resuming a stopped run


class Method(NamedTuple):
    """One of the three experiments."""

    title: str
    score: Callable[..., Any]
    where: Callable[[str, Any], bool]
    structure: jp.Structure
    units: Callable[[Any], int]

    def prune(self, params: Any, masks: Any, key: jax.Array, counts: dict[str, int]) -> Any:
        """Masks with so many more units of each layer removed.

        The floor is 0, as in the article, where conv1 loses its last channel at 70 %.
        """
        return jp.prune_once(
            params, self.score, count=counts, scope="layerwise", where=self.where,
            structure=self.structure, masks=masks, floor=0, key=key,
        )  # fmt: skip

    def sizes(self, params: Any) -> dict[str, int]:
        """The units of each layer that takes part, by path; `params` of one network."""
        leaves = zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True)
        return {path: self.units(leaf) for path, leaf in leaves if self.where(path, leaf)}


METHODS = {
    "random": Method("random weights", jp.scores.random, jp.kernels, jp.structures.elements(), np.size),
    "l1": Method("L1 weights", jp.scores.magnitude, jp.kernels, jp.structures.elements(), np.size),
    "structured": Method(
        "L1 channels",
        jp.scores.magnitude,
        jp.matching("conv1/kernel", "conv2/kernel", "fc1/kernel"),
        jp.structures.slices(axis=-1, norm=1),
        lambda kernel: kernel.shape[-1],
    ),
}


def recipe(name: str, amount: float) -> jp.recipes.Recipe:
    """What a method prunes by, round after round; as `Method.prune` with its counts."""
    methods: dict[str, dict[str, Any]] = {
        "random": {"score": "random"},
        "l1": {"score": "magnitude"},
        "structured": {
            "score": "magnitude",
            "where": ["conv1/kernel", "conv2/kernel", "fc1/kernel"],
            "structure": {"slices": {"axis": -1, "norm": 1}},
        },
    }
    same = {"sparsity": amount, "of": "remaining", "scope": "layerwise", "floor": 0}
    return jp.recipes.parse({"prune": methods[name] | same})


LAYERS = ("conv1", "conv2", "fc1", "fc2")

# Multiply-adds per weight: how many positions it is applied at. VALID convolutions shrink 28x28 to
# 24x24 and 12x12 to 8x8; the article counts each output as large as its input.
POSITIONS = {"conv1": 24 * 24, "conv2": 8 * 8, "fc1": 1, "fc2": 1}
ARTICLE_POSITIONS = {"conv1": 28 * 28, "conv2": 12 * 12, "fc1": 1, "fc2": 1}

# Accuracies of the article on MNIST, by fraction per round, to print beside ours.
ARTICLE = {
    "random": {0.1: 0.9744, 0.2: 0.9665, 0.3: 0.9524, 0.4: 0.9194, 0.5: 0.8529, 0.6: 0.4458, 0.7: 0.1365},
    "l1": {0.1: 0.9824, 0.2: 0.9818, 0.3: 0.9781, 0.4: 0.9698, 0.5: 0.9543, 0.6: 0.8555, 0.7: 0.7565},
    "structured": {0.1: 0.9781, 0.2: 0.9667, 0.3: 0.9477, 0.4: 0.9228, 0.5: 0.7530, 0.6: 0.5095, 0.7: 0.1135},
}


class Size(NamedTuple):
    """What is left of the network; the same for every seed.

    Attributes:
      nonzero: parameters that are not pruned, biases included.
      macs, article_macs: multiply-adds of one image by the unpruned weights, counted truly and as
        the article does.
      alive: output channels of conv1, conv2 and fc1 with any weight left.
    """

    nonzero: int
    macs: int
    article_macs: int
    alive: tuple[int, int, int]


def measure(masks: Any) -> Size:
    """Counts what masks leave of LeNet.

    Args:
      masks: masks of one network (no seed axis).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = LeNet().init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))["params"]
      >>> measure(jp.ones_masks(params))[:3]
      (21840, 480500, 932500)
    """
    kept = {layer: int(np.sum(masks[layer]["kernel"])) for layer in LAYERS}
    c1, c2, f1 = (int(np.any(masks[a]["kernel"], axis=tuple(range(masks[a]["kernel"].ndim - 1))).sum())
                  for a in LAYERS[:3])  # fmt: skip
    return Size(
        nonzero=jp.metrics.nonzeros(masks),
        macs=sum(POSITIONS[layer] * kept[layer] for layer in LAYERS),
        article_macs=sum(ARTICLE_POSITIONS[layer] * kept[layer] for layer in LAYERS),
        alive=(c1, c2, f1),
    )


def without_dead_channels(params: Any, masks: Any, split: loops.Split) -> dict[str, Any]:
    """Takes the dead channels out of a masked LeNet and measures what is left.

    A dead channel still gives relu(bias), which is folded into the biases of the next layer.

    Returns:
      The small network's parameters, multiply-adds of one image and accuracy, and the largest
      difference of its log-probabilities from those of the masked network; empty if a layer has
      no channel left.
    """
    if min(measure(masks).alive) == 0:
        return {}
    model = LeNet(im2col=False)

    def apply(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    images, _ = split.batch(jnp.arange(2))
    small = jp.compact(apply, params, masks, images, fold_constants=True)

    @jax.jit
    def compare(split):
        def part(index):
            images, labels = split.batch(index)
            got = small.apply(small.params, images)
            gap = jnp.abs(got - apply(jp.apply_masks(params, masks), images)).max()
            return jnp.mean(jnp.argmax(got, -1) == labels), gap

        accuracy, gap = jax.lax.map(part, jnp.arange(len(split.y))[:, None])
        return accuracy.mean(), gap.max()

    accuracy, gap = compare(split)
    report = small.report(images[:1])
    assert report.macs is not None
    return {
        "compact_params": report.params[1],
        "compact_macs": report.macs[1],
        "compact_accuracy": float(accuracy),
        "compact_difference": float(gap),
    }


def file_bytes(params: Any, masks: Any = None, int8: bool = False) -> int:
    """Bytes of a file of the params (`jp.io.save`), from which zeros are left out."""
    with tempfile.TemporaryDirectory() as folder:
        return jp.io.save(Path(folder) / "params", params, masks, int8=int8)


def optimizers(training: Training, train_size: int) -> tuple[Any, Any]:
    """The optimizers of dense training and of fine-tuning."""
    steps = training.epochs * -(-train_size // training.batch_size)
    rate = optax.cosine_decay_schedule(training.lr, steps) if training.cosine else training.lr
    return optax.sgd(rate, training.momentum), optax.sgd(training.tune_lr, training.momentum)


def timer(model: LeNet, split: loops.Split, runs: int) -> Callable[[Any, Any], float]:
    """`ratio(dense, pruned)`: time of the dense forward passes over that of the masked ones.

    The passes alternate, so that both meet the same noise; the ratio is of the medians.
    """

    @jax.jit
    def forward(params, split):
        index = jnp.arange(len(split.y) // 100 * 100).reshape(-1, 100)

        def part(index):
            log_probs: Any = model.apply({"params": params}, split.batch(index)[0])
            return jnp.sum(log_probs)

        return jax.lax.map(part, index)

    def ratio(dense, pruned):
        calls = {"dense": (forward, dense, split), "pruned": (forward, pruned, split)}
        times = jp.metrics.latency(calls, rounds=runs, compiled=False)  # compiled already
        return times["dense"].median / times["pruned"].median

    return ratio


def run(config: Config) -> list[dict[str, Any]]:
    """Runs the study, writes its lines, and returns them."""
    preset = config.preset or ("digits" if config.dataset == "digits" else "article")
    training = PRESETS[preset]
    if config.epochs is not None:
        training = dataclasses.replace(training, epochs=config.epochs)
    data = datasets.load(config.dataset, size=28, train=config.train_size, test=config.test_size)
    train_split, test_split = loops.splits(data)
    model = LeNet(im2col=jax.default_backend() == "cpu")
    dense_optimizer, tune_optimizer = optimizers(training, len(train_split.y))
    train = loops.masked_fitter(model, dense_optimizer, training.batch_size, train_split)
    tune = loops.masked_fitter(model, tune_optimizer, training.tune_batch_size, train_split)
    accuracy = loops.evaluator(model, test_split)
    speed = timer(model, train_split, config.timing_runs)

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), tree)

    epochs = training.epochs + len(METHODS) * len(config.amounts) * config.rounds * config.tune_epochs
    results = Results(config.out, "lenet", config, resume=not config.fresh)
    with results, tqdm(total=epochs, unit="epoch") as bar:

        def record(method: str, amount: float, params: Any, masks: Any, before: np.ndarray) -> None:
            size, after = measure(first(masks)), accuracy(params)
            compacted = {}
            if method == "structured":
                compacted = without_dead_channels(first(params), first(masks), test_split)
            ratio = speed(first(dense), first(params)) if config.timing_runs else None
            kept = [layers(jax.tree.map(operator.itemgetter(i), masks)) for i in range(len(config.seeds))]
            lines = []
            for index, seed in enumerate(config.seeds):
                own = file_bytes(jax.tree.map(operator.itemgetter(index), params))
                line = {
                    "method": method,
                    "amount": amount,
                    "seed": seed,
                    "preset": preset,
                    "training": dataclasses.asdict(training),
                    "accuracy": float(after[index]),
                    "accuracy_before_last_tuning": float(before[index]),
                    **size._asdict(),
                    **(compacted if index == 0 else {}),
                    "file_ratio": dense_bytes[index] / own,
                    "masked_speed_up": ratio,
                    "layers": kept[index],
                }
                if index == 0 and amount == max(config.amounts, default=None):
                    line["masks"] = results.keep_masks(method, first(masks))
                lines.append(line)
            results.add(lines)

        bar.set_description("dense")
        init = loops.init(model, train_split, loops.seed_keys(config.seeds, purpose=0))
        ones, keys = jp.ones_masks(init), loops.seed_keys(config.seeds, purpose=1)
        dense = results.once("dense", lambda: train(init, ones, keys, training.epochs, bar))
        bar.update(training.epochs - bar.n)
        dense_bytes = [
            file_bytes(jax.tree.map(operator.itemgetter(i), dense)) for i in range(len(config.seeds))
        ]
        if not results.done(method="dense"):
            record("dense", 0.0, dense, ones, accuracy(dense))

        for name, method in METHODS.items():
            prune = jax.jit(jax.vmap(method.prune, in_axes=(0, 0, 0, None)))
            for amount in config.amounts:
                saved_recipes.save_method(results.unfinished, f"{name}-{amount:g}", recipe(name, amount))
                if results.done(method=name, amount=amount):
                    bar.update(config.rounds * config.tune_epochs)
                    continue
                bar.set_description(f"{method.title} {amount:.0%}")
                params, masks, left = dense, ones, method.sizes(first(dense))
                before = np.zeros(len(config.seeds))
                for number in range(config.rounds):
                    keys = loops.seed_keys(config.seeds, purpose=2 + number)
                    counts = {path: jp.selection.removed_count(amount, n) for path, n in left.items()}
                    left = {path: n - counts[path] for path, n in left.items()}
                    masks = prune(params, masks, keys, counts)
                    before = accuracy(jp.apply_masks(params, masks))
                    params = tune(params, masks, keys, config.tune_epochs, bar)
                record(name, amount, params, masks, before)
    return results.lines


def summarise(lines: Sequence[dict[str, Any]], dataset: str) -> str:
    """The lines as tables of at most 80 columns, means and standard deviations over seeds."""
    dense = [line for line in lines if line["method"] == "dense"]
    base = dense[0]
    text = [
        f"dense: {_mean(dense)} %, {base['nonzero']:,} parameters, {base['macs']:,} MACs",
        "MACs* counts as the article does, each convolution's output as large as its",
        f"input: {base['article_macs']:,}. Time is of masked networks: masks make nothing faster.",
    ]
    known = dataset == "mnist"
    if len(lines) == len(dense):  # no amounts were asked for
        return text[0]
    for name, method in METHODS.items():
        text += ["", f"{method.title}, {len(dense)} seeds"]
        article = f"{'article':>9}" if known else ""
        text.append(f"pruned  nonzero  size x  MACs x  MACs* x  {'accuracy %':>13}{article}  file x  time x")
        for amount in sorted({line["amount"] for line in lines if line["method"] == name}):
            group = [line for line in lines if line["method"] == name and line["amount"] == amount]
            one, speed = group[0], group[0]["masked_speed_up"]
            macs, article_macs = (_ratio(base[k], one[k]) for k in ("macs", "article_macs"))
            published = ARTICLE[name].get(amount)
            article = f"{'' if published is None else f'{100 * published:.2f}':>9}" if known else ""
            text.append(
                f"{amount:>6.0%}  {one['nonzero']:>7}  {base['nonzero'] / one['nonzero']:>6.2f}  {macs:>6}"
                f"  {article_macs:>7}  {_mean(group):>13}{article}"
                f"  {np.mean([line['file_ratio'] for line in group]):>6.2f}"
                f"  {'-' if speed is None else f'{speed:.2f}':>6}"
            )
    text += ["", "L1 channels: the network without the dead channels, of the first seed, and the"]
    text.append("largest difference of its log-probabilities from the masked network's")
    text.append("pruned conv1,conv2,fc1 parameters  size x     MACs  MACs x  accuracy %  differs")
    for line in lines:
        if line["method"] == "structured" and line["seed"] == dense[0]["seed"]:
            alive = ",".join(map(str, line["alive"]))
            collapsed = "compact_params" not in line
            text.append(
                f"{line['amount']:>6.0%} {alive:>15} "
                + ("collapsed: a layer has no channel left" if collapsed else
                   f"{line['compact_params']:>10}  {dense[0]['nonzero'] / line['compact_params']:>6.2f}"
                   f"  {line['compact_macs']:>7}  {_ratio(dense[0]['macs'], line['compact_macs']):>6}"
                   f"  {100 * line['compact_accuracy']:>10.2f}  {line['compact_difference']:>7.0e}")
            )  # fmt: skip
    return "\n".join(text)


def plot(lines: Sequence[dict[str, Any]], config: Config, note: str) -> None:
    """Accuracy against compression and against theoretical speed-up, as `accuracy.png`."""
    dense = [line for line in lines if line["method"] == "dense"]
    compression, speed_up = {}, {}
    for name, method in METHODS.items():
        own = [line for line in lines if line["method"] == name]
        grouped = [[line for line in own if line["amount"] == a] for a in sorted({x["amount"] for x in own})]
        # A layer without channels: the network is cut in two, and its size means nothing.
        grouped = [group for group in grouped if min(group[0]["alive"]) > 0]
        if not grouped:
            continue
        y = np.array([[line["accuracy"] for line in group] for group in grouped])
        sizes, macs = ([dense[0][k] / group[0][k] for group in grouped] for k in ("nonzero", "macs"))
        compression[method.title], speed_up[method.title] = figures.Curve(sizes, y), figures.Curve(macs, y)
    figures.panels(
        path=Path(config.out) / "accuracy.png",
        title=f"LeNet, {note}; {config.rounds} rounds of pruning and tuning, {len(dense)} seeds",
        curves=[
            ("compression (parameters)", compression),
            ("theoretical speed-up (MACs)", speed_up),
        ],
        baseline=np.array([line["accuracy"] for line in dense]),
    )


def _mean(group: Sequence[dict[str, Any]]) -> str:
    return loops.percent([line["accuracy"] for line in group])


def _ratio(dense: int, pruned: int) -> str:
    return f"{dense / pruned:.2f}" if pruned else "-"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        note = "MNIST" if config.dataset == "mnist" else "digits"
        print(f"\nLeNet on {note}")
        print(summarise(lines, config.dataset))
        plot(lines, config, note)
    print(f"\nWrote results.jsonl and accuracy.png to {config.out}")


if __name__ == "__main__":
    main()
