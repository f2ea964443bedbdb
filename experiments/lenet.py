"""LeNet pruned at random, by magnitude, and by channels: the founding study.

Train to convergence; then K times prune a fraction of what remains in each
layer and fine-tune for N epochs. Three experiments, at 10 to 70 % per round:
random and L1 on single weights of all four layers, and L1 on the output
channels of conv1, conv2 and fc1. Biases are never pruned. For each fraction
the networks of all methods and seeds are tuned side by side. A run that was
stopped resumes after its last finished fraction when the same command is given again.

    python -m experiments.lenet                    # digits, embedded
    python -m experiments.lenet --dataset mnist    # the article's settings
    python -m experiments.lenet --dataset mnist --preset sane
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.networks.small import LeNet
from experiments.report.design import Axis, Design
from experiments.run import saved_recipes, stopping, study
from experiments.run.limits import Items
from experiments.run.settings import Count, Folder, Natural, Sparsity, parse
from experiments.show import figures, tables
from experiments.training import loops
from jaxprune import plots


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
class Config(study.Settings):
    """Flags of the study."""

    # training settings; by default digits for digits and article for mnist
    preset: Literal["article", "sane", "digits"] | None = None
    # fractions of the remaining pruned per round; '' for dense only
    amounts: Annotated[tuple[Sparsity, ...], Items(empty=True)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    rounds: Count = 3  # K, how often it prunes and fine-tunes
    tune_epochs: Natural = 4  # N, epochs of each fine-tuning
    epochs: Count | None = None  # epochs of dense training; by default the preset's
    timing_runs: Natural = 5  # timed passes over the training images; 0 for none (the article: 20)
    out: Folder = "results/lenet"  # folder for results.jsonl and plots
    fresh: bool = False  # start over instead of resuming a stopped run


METHODS = {"random": "random weights", "l1": "L1 weights", "structured": "L1 channels"}


def recipe(method: str, amount: float) -> jp.recipes.Recipe:
    """Return what a method prunes by, round after round.

    The floor is 0, as in the article, where conv1 loses its last channel at 70 %.
    """
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
    return jp.recipes.parse({"prune": methods[method] | same})


CHUNK = 120  # images evaluated at once: their patches fit the cache

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
    """Count what masks of one network, without a seed axis, leave of LeNet.

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


def without_dead_channels(
    params: Any, masks: Any, answers: np.ndarray, split: loops.Split
) -> list[dict[str, Any]]:
    """Take the dead channels out of masked LeNets, and measure what is left.

    A dead channel still gives relu(bias), which is folded into the biases of the next layer.

    Args:
      params, masks: of all seeds, on a leading axis; every seed has as many channels alive.
      answers: (seeds, n, 10), the masked networks' log-probabilities of the images of `split`.

    Returns:
      By seed the small network's parameters, multiply-adds of one image and accuracy, and the largest
      difference of its log-probabilities from the masked network's; empty if a layer has no channel left.
    """
    widths = measure(study.at(0, masks)).alive
    if min(widths) == 0:
        return [{} for _ in answers]
    model, (image, _) = LeNet(im2col=False), split.batch(jnp.arange(1))

    def apply(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    def compact(*own: Any) -> jp.Compacted:
        # Nothing is compared here, because all test images are below.
        return jp.compact(apply, *own, image, fold_constants=True, verify=False)

    small = [compact(*study.at(index, (params, masks))) for index in range(len(answers))]
    # What is left is a LeNet again, of fewer channels.
    narrow = loops.answerer(LeNet(im2col=False, widths=widths), split, CHUNK)
    found = narrow(study.stack([one.params for one in small]))
    reports = [one.report(image) for one in small]
    return [
        {
            "compact_params": report.params[1],
            "compact_macs": report.macs and report.macs[1],
            "compact_accuracy": float(accuracy),
            "compact_difference": float(difference),
        }
        for report, accuracy, difference in zip(
            reports, loops.accuracy(found, split), np.abs(found - answers).max(axis=(1, 2)), strict=True
        )
    ]


def updated(pruners: Sequence[jp.Pruner], states: Sequence[Any], params: Any, keys: jax.Array) -> list[Any]:
    """Return the states of networks' pruners after one more update; params have a leading axis of networks.

    Not under `jit`: choosing masks of so few weights takes milliseconds, compiling it seconds.
    """
    with warnings.catch_warnings():
        # The floor is 0 on purpose, and the tables say which layers have collapsed.
        warnings.filterwarnings("ignore", "layer collapse", UserWarning)
        return [
            pruner.update(state, study.at(index, params), key=keys[index])
            for index, (pruner, state) in enumerate(zip(pruners, states, strict=True))
        ]


def file_bytes(params: Any, masks: Any = None, int8: bool = False) -> int:
    """Return the bytes of a file of the params (`jp.io.save`), from which zeros are left out."""
    with tempfile.TemporaryDirectory() as folder:
        return jp.io.save(Path(folder) / "params", params, masks, int8=int8)


def optimizers(training: Training, train_size: int) -> tuple[Any, Any]:
    """Return the optimizers of dense training and of fine-tuning."""
    steps = training.epochs * -(-train_size // training.batch_size)
    rate = optax.cosine_decay_schedule(training.lr, steps) if training.cosine else training.lr
    return optax.sgd(rate, training.momentum), optax.sgd(training.tune_lr, training.momentum)


def timer(model: LeNet, split: loops.Split, runs: int) -> Callable[[Any, Any], float]:
    """Return `ratio(dense, pruned)`: time of the dense forward passes over that of the masked ones.

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


DESIGN = Design(
    factors=("method",),
    levels=("amount",),
    figures=("accuracy", "accuracy_before_last_tuning", "nonzero", "macs"),
    percent=("amount", "accuracy", "accuracy_before_last_tuning", "compact_accuracy"),
    baseline={"method": "dense"},
    axes=(
        Axis("compression (parameters)", "nonzero", "dense / x"),
        Axis("times fewer multiply-adds", "macs", "dense / x"),
    ),
)


class Study(study.Study):
    """The data, the network, and its training."""

    def __init__(self, config: Config):
        super().__init__(config, "lenet", DESIGN)
        self.preset = config.preset or ("digits" if config.dataset == "digits" else "article")
        training = PRESETS[self.preset]
        self.training = training if config.epochs is None else replace(training, epochs=config.epochs)
        self.train, self.test = config.load(size=28)
        self.model = LeNet(im2col=jax.default_backend() == "cpu")
        dense, tuned = optimizers(self.training, len(self.train.y))
        self.fit = loops.masked_fitter(self.model, dense, training.batch_size, self.train)
        self.tune = loops.masked_fitter(self.model, tuned, training.tune_batch_size, self.train)
        self.answers = loops.answerer(self.model, self.test, CHUNK)
        self.speed = timer(self.model, self.train, config.timing_runs)

    def train_dense(self) -> None:
        """Train the dense network of each seed and write its figures."""
        init = loops.init(self.model, self.train, self.keys(0))
        self.ones, epochs = jp.ones_masks(init), self.training.epochs
        self.dense = self.once(
            "dense", epochs, lambda: self.fit(init, self.ones, self.keys(1), epochs, self.bar)
        )
        self.dense_bytes = [file_bytes(study.at(i, self.dense)) for i in range(len(self.config.seeds))]
        if self.missing("dense", 0, method="dense"):
            answers = self.answers(self.dense)
            self.record("dense", 0.0, self.dense, self.ones, answers, answers)

    def prune(self, amount: float) -> None:
        """Prune and tune for some rounds, all methods and seeds side by side, and write the figures."""
        config, recipes = self.config, {method: recipe(method, amount) for method in METHODS}
        for method, own in recipes.items():
            saved_recipes.save_method(self.results.unfinished, f"{method}-{amount:g}", own)
        # The last method's lines are written last, so where they are, all are.
        cost, last = config.rounds * config.tune_epochs, [*METHODS][-1]
        if not self.missing(f"{amount:.0%}", cost, method=last, amount=amount):
            return
        seeds, first = len(config.seeds), study.at(0, self.dense)
        pruners = [own.pruner(first) for own in recipes.values()]
        states = [pruner.init(first) for pruner in pruners]
        # From here on, in lists or on a leading axis: the networks of all seeds, for each method in turn.
        pruners = [pruner for pruner in pruners for _ in range(seeds)]
        states = [state for state in states for _ in range(seeds)]
        params = jax.tree.map(lambda leaf: np.concatenate([leaf] * len(METHODS)), self.dense)
        masks, before = None, None
        for number in range(config.rounds):
            keys = jnp.concatenate([self.keys(2 + number)] * len(METHODS))
            states = updated(pruners, states, params, keys)
            masks = study.stack([state.masks for state in states])
            before = self.answers(jp.apply_masks(params, masks))
            params = self.tune(params, masks, keys, config.tune_epochs, self.bar)
            params = jax.tree.map(np.asarray, params)
        found = (params, masks, before, self.answers(params))
        for index, method in enumerate(METHODS):
            own = jax.tree.map(lambda leaf, start=index * seeds: leaf[start : start + seeds], found)
            if not self.results.done(method=method, amount=amount):
                self.record(method, amount, *own)

    def record(
        self, method: str, amount: float, params: Any, masks: Any, before: np.ndarray, after: np.ndarray
    ) -> None:
        """Write the figures of a method, a line per seed; counts and times are those of the first seed.

        All have a leading seed axis. `before` and `after` the last tuning are log-probabilities of the
        test images.
        """
        first, size = study.at(0, params), measure(study.at(0, masks))
        accuracies = loops.accuracy(np.stack([before, after]), self.test)
        compacted = [{}] * len(after)
        if method == "structured":
            compacted = without_dead_channels(params, masks, after, self.test)
        speed = self.speed(study.at(0, self.dense), first) if self.config.timing_runs else None

        def of_seed(index: int, _: Any) -> dict[str, Any]:
            return {
                "preset": self.preset,
                "training": asdict(self.training),
                "accuracy": float(accuracies[1, index]),
                "accuracy_before_last_tuning": float(accuracies[0, index]),
                **size._asdict(),
                **compacted[index],
                "file_ratio": self.dense_bytes[index] / file_bytes(study.at(index, params)),
                "masked_speed_up": speed,
            }

        last = amount == max(self.config.amounts, default=None)
        self.add_masked(masks, of_seed, last, method, amount=amount)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, write its lines, and return them."""
    loops.use_cores(range(len(METHODS) * len(config.seeds)))
    lenet = Study(config)
    tuning = len(config.amounts) * config.rounds * config.tune_epochs
    with lenet.running(lenet.training.epochs + tuning, "epoch"):
        lenet.train_dense()
        for amount in config.amounts:
            lenet.prune(amount)
    return lenet.results.lines


def summarise(lines: Sequence[dict[str, Any]], dataset: str) -> str:
    """Return the lines as tables of at most 80 columns, means and standard deviations over seeds."""
    dense = [line for line in lines if line["method"] == "dense"]
    base, size = dense[0], f"{dense[0]['nonzero']:,} parameters, {dense[0]['macs']:,} MACs"
    text = [f"dense: {tables.cell(dense)} %, {size}"]
    if len(lines) == len(dense):  # no amounts were asked for
        return text[0]
    text.append("MACs* counts as the article does, each convolution's output as large as its")
    text.append(f"input: {base['article_macs']:,}. Time is of masked networks: masks make nothing faster.")
    for method, title in METHODS.items():
        heads = ["pruned", "nonzero", "size x", "MACs x", "MACs* x", "accuracy %"]
        heads += ["article"] * (dataset == "mnist")
        rows = [[*heads, "file x", "time x"]]
        for amount in sorted({line["amount"] for line in lines if line["method"] == method}):
            group = [line for line in lines if (line["method"], line["amount"]) == (method, amount)]
            one, speed = group[0], group[0]["masked_speed_up"]
            row = [f"{amount:.0%}", f"{one['nonzero']}"]
            row += [_ratio(base[key], one[key]) for key in ("nonzero", "macs", "article_macs")]
            row.append(tables.cell(group))
            if dataset == "mnist":
                published = ARTICLE[method].get(amount)
                row.append("" if published is None else f"{100 * published:.2f}")
            row.append(f"{np.mean([line['file_ratio'] for line in group]):.2f}")
            rows.append([*row, "-" if speed is None else f"{speed:.2f}"])
        text += ["", f"{title}, {len(dense)} seeds", tables.text(rows)]
    text += ["", f"L1 channels, {len(dense)} seeds: the networks without the dead channels, and the largest"]
    text.append("difference of their log-probabilities from the masked networks'")
    rows = [["pruned", "conv1,conv2,fc1", "nonzero", "size x", "MACs", "MACs x", "accuracy %", "differs"]]
    structured = [line for line in lines if line["method"] == "structured"]
    for amount in sorted({line["amount"] for line in structured}):
        group = [line for line in structured if line["amount"] == amount]
        one = group[0]
        row = [f"{amount:.0%}", ",".join(map(str, one["alive"]))]
        if "compact_params" in one:
            row += [f"{one['compact_params']}", _ratio(base["nonzero"], one["compact_params"])]
            row += [f"{one['compact_macs']}", _ratio(base["macs"], one["compact_macs"])]
            row.append(tables.cell(group, "compact_accuracy"))
            row.append(f"{max(line['compact_difference'] for line in group):.0e}")
        else:
            row += [*["-"] * 4, "collapsed", "-"]
        rows.append(row)
    return "\n".join([*text, tables.text(rows)])


def plot(lines: Sequence[dict[str, Any]], config: Config) -> None:
    """Draw accuracy against compression and against theoretical speed-up, as `accuracy.png`.

    Networks that have lost channels are drawn twice, masked and compacted. Compacted they are as accurate and
    smaller, because the weights that read the dead channels are gone as well.
    """
    dense = [line for line in lines if line["method"] == "dense"]
    shown = [(title, method, "", "accuracy") for method, title in METHODS.items() if method != "structured"]
    shown.append((f"{METHODS['structured']}, masked", "structured", "", "accuracy"))
    shown.append((f"{METHODS['structured']}, compacted", "structured", "compact_", "compact_accuracy"))
    sizes = (
        ("compression (parameters)", "nonzero", {"": "nonzero", "compact_": "compact_params"}),
        ("theoretical speed-up (MACs)", "macs", {"": "macs", "compact_": "compact_macs"}),
    )
    panels: dict[str, dict[str, plots.Line]] = {}
    for label, of_dense, keys in sizes:
        panels[label] = {}
        for title, method, kind, accuracy in shown:
            own = [line for line in lines if line["method"] == method]
            groups = [[x for x in own if x["amount"] == a] for a in sorted({x["amount"] for x in own})]
            # Without channels in a layer the network is cut in two, and its size means nothing.
            groups = [group for group in groups if min(group[0]["alive"]) > 0]
            if groups:
                ratios = [dense[0][of_dense] / group[0][keys[kind]] for group in groups]
                panels[label][title] = ratios, [[line[accuracy] for line in group] for group in groups]
    title = f"LeNet, {config.data}; {config.rounds} rounds of pruning and tuning, {len(dense)} seeds"
    own = [line["accuracy"] for line in dense]
    figures.against_compression(Path(config.out) / "accuracy.png", title, panels, own)


def _ratio(dense: int, pruned: int) -> str:
    return f"{dense / pruned:.2f}" if pruned else "-"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        print(f"\nLeNet on {config.data}")
        print(summarise(lines, config.dataset))
        plot(lines, config)
    print(f"\nWrote results.jsonl and accuracy.png to {config.out}")


if __name__ == "__main__":
    main()
