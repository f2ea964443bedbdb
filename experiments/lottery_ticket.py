"""Lottery tickets: iterative pruning with rewinding, and what it is compared with.

LeNet-300-100 trains, loses a fifth of its remaining weights in every layer
(a tenth in the last), is rewound to its initial weights and trains again,
level after level. The same masks, or as sparse ones, train as controls:

- ticket: the masks found, on the initial weights;
- reinit: the same masks, on other random weights;
- random: shuffled masks, as many weights in each layer, initial weights;
- shuffled: as random, with as many inputs to each neuron as the ticket's;
- one-shot: masks found in one step from the dense network, initial weights;
- one-shot-tune: the same masks on the dense network's trained weights;
- tune: iterative pruning that goes on from the trained weights for a few
  epochs instead of rewinding;
- learning-rate: the same for all epochs, learning-rate rewinding.

All seeds of a level train in one compiled program. A run that was stopped, by
SIGKILL, SIGTERM (status 143) or a full disk, resumes after its last finished
level when the same command is given again.

    python -m experiments.lottery_ticket                    # digits, embedded
    python -m experiments.lottery_ticket --dataset mnist
    python -m experiments.lottery_ticket --preset article   # an article's run
"""

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.networks.small import MLP
from experiments.report.design import Axis, Design
from experiments.run import saved_recipes, stopping, study
from experiments.run.checkpoint import Checkpoints, forget
from experiments.run.limits import Items, OneOf
from experiments.run.results import Results, layers
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Seeds, parse
from experiments.show import figures, tables
from experiments.training import loops
from jaxprune import plots

CHAINS = ("ticket", "tune", "learning-rate")
BRANCHES = ("reinit", "random", "shuffled", "one-shot", "one-shot-tune")
METHODS = (CHAINS[0], *BRANCHES, *CHAINS[1:])


@dataclass(frozen=True)
class Config(study.Settings):
    """Flags of the study."""

    # frankle: the paper's rates and initialisation, Adam 1.2e-3, batches of 60; article: 40 levels of a tenth
    # in all layers, Adam 1e-3, batches of 32, 10 epochs a level, ticket and tune only
    preset: Literal["frankle", "article"] = "frankle"
    # by default the preset's; ticket is always among them
    methods: Annotated[tuple[Annotated[str, OneOf(METHODS)], ...], Items(empty=True)] | None = None
    seeds: Seeds = (0, 1, 2, 3, 4)  # the runs that figures are averaged over
    levels: Count | None = None  # how often to prune
    # the levels at which the controls train that share the ticket's masks or sparsity
    branch_levels: Annotated[tuple[Count, ...], Items(empty=True)] | None = None
    epochs: Count | None = None  # epochs of training at each level
    lr: Positive | None = None  # learning rate of Adam
    batch_size: BatchSize | None = None  # images per step
    tune_epochs: Natural | None = None  # epochs of fine-tuning at each level
    rewind_epoch: Natural = 0  # rewind to the weights after this epoch (late rewinding)
    out: Folder = "results/lottery_ticket"  # folder for results.jsonl, the plot and checkpoints
    fresh: bool = False  # start over instead of resuming a stopped run

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_most("branch_levels", "levels")
        self.below("rewind_epoch", "epochs")


class Preset(NamedTuple):
    """What a preset stands for, where flags say nothing else."""

    methods: tuple[str, ...]
    levels: int
    branch_levels: tuple[int, ...]
    epochs: int
    tune_epochs: int
    lr: float
    batch_size: int
    rate: float
    last_rate: float
    glorot: bool


PRESETS = {
    "frankle": Preset(
        methods=("ticket", "reinit", "random", "one-shot", "one-shot-tune", "tune"),
        levels=19,
        branch_levels=(3, 7, 12, 15, 19),
        epochs=20,
        tune_epochs=5,
        lr=1.2e-3,
        batch_size=60,
        rate=0.2,
        last_rate=0.1,
        glorot=True,
    ),
    "article": Preset(
        methods=("ticket", "tune"),
        levels=40,
        branch_levels=(),
        epochs=10,
        tune_epochs=10,
        lr=1e-3,
        batch_size=32,
        rate=0.1,
        last_rate=0.1,
        glorot=False,
    ),
}


def settings(config: Config) -> Preset:
    """Return the preset with what the flags change.

    Raises:
      FlagError: a flag does not go with what the preset gives.
    """
    preset = PRESETS[config.preset]
    given = {name: getattr(config, name, None) for name in preset._fields}
    chosen = preset._replace(**{name: value for name, value in given.items() if value is not None})
    if config.branch_levels is None:
        reached = tuple(level for level in chosen.branch_levels if level <= chosen.levels)
        chosen = chosen._replace(branch_levels=reached)
    # A flag must go with what the preset gives as well.
    filled = {name: value for name, value in chosen._asdict().items() if hasattr(config, name)}
    dataclasses.replace(config, **filled)
    return chosen


def recipe(rate: float, last_rate: float, last: str) -> jp.recipes.Recipe:
    """Return magnitude pruning of each layer by a fraction of what is left, per level."""
    rates = {f"fc{index}/kernel": rate for index in (1, 2, 3)} | {last: last_rate}
    prune = {"score": "magnitude", "sparsity": {"per_path": rates}, "scope": "layerwise", "of": "remaining"}
    return jp.recipes.parse({"prune": prune})


def vmapped(pruner: jp.Pruner) -> jp.Pruner:
    """Return the pruner for params with a leading seed axis; each seed is pruned on its own."""
    return pruner._replace(init=jax.jit(jax.vmap(pruner.init)), update=jax.jit(jax.vmap(pruner.update)))


class Study:
    """The data, the network and the compiled programs of a run."""

    def __init__(self, config: Config):
        self.config, self.settings = config, settings(config)
        train, test = config.load()
        train, held_out = loops.hold_out(train, 1 / 12)
        model, adam = MLP(glorot=self.settings.glorot), optax.adam(self.settings.lr)
        batch_size = self.settings.batch_size
        self.accuracy = loops.evaluator(model, test)
        late, epochs = config.rewind_epoch, self.settings.epochs

        def whole_run(epochs: int, begin: int = 0) -> Callable[..., loops.Fit]:
            optimizer_of = loops.fixed(adam)
            return loops.whole_run(model, optimizer_of, batch_size, epochs, train, held_out, begin)

        self.fit, self.tune = whole_run(epochs, begin=late), whole_run(self.settings.tune_epochs)
        init_keys, other_keys, self.mask_keys, self.train_keys, self.tune_keys = (
            loops.seed_keys(config.seeds, purpose) for purpose in range(5)
        )
        self.init = loops.init(model, train, init_keys)
        self.other_init = loops.init(model, train, other_keys)
        if late:
            ones = jp.ones_masks(self.init)
            self.init = whole_run(late)(self.init, ones, self.train_keys).params
            self.other_init = whole_run(late)(self.other_init, ones, self.train_keys).params
        self.recipe = recipe(self.settings.rate, self.settings.last_rate, "fc3/kernel")
        pruner = self.recipe.pruner(jax.tree.map(operator.itemgetter(0), self.init))
        self.pruner = vmapped(pruner)
        # The level is traced, so this is compiled once for all of them.
        self.one_shot = jax.jit(
            lambda dense, level: jax.vmap(lambda params: jp.prune_rounds(params, pruner, level))(dense)
        )

    def dense_ticket(self, trained: Any) -> jp.Ticket:
        """Return level 0, from which every chain starts."""
        state = self.pruner.init(self.init)
        return jp.Ticket(0, self.init, trained, state, jp.metrics.sparsity(state.masks))

    def chain(self, method: str, after: jp.Ticket | None, fits: list[loops.Fit]) -> Iterator[jp.Ticket]:
        """Return the levels of a chain after a ticket; each one's `Fit` is put into `fits`."""

        def trainer(fit, keys):
            def train(params, masks):
                fits[:] = [fit(params, masks, keys)]
                return fits[0].params

            return train

        options: dict[str, Any] = {
            "ticket": {},
            "tune": {"rewind": "nothing", "tune": trainer(self.tune, self.tune_keys)},
            "learning-rate": {"rewind": "learning_rate"},
        }[method]
        train = trainer(self.fit, self.train_keys)
        levels = self.settings.levels
        return jp.lottery_ticket(train, self.init, self.pruner, levels, after=after, **options)

    def branch(self, method: str, ticket: jp.Ticket, dense: Any) -> tuple[Any, loops.Fit]:
        """Return masks and training of a control of a ticket; `dense` is the trained dense network."""
        masks, start, fit, keys = ticket.masks, self.init, self.fit, self.train_keys
        if method == "reinit":
            start = self.other_init
        elif method in ("random", "shuffled"):
            within = None if method == "random" else -1
            keys_here = jax.vmap(lambda key: jax.random.fold_in(key, ticket.level))(self.mask_keys)
            masks = jax.vmap(lambda key, mask: jp.shuffled_masks(key, mask, within))(keys_here, masks)
        else:
            masks = self.one_shot(dense, ticket.level)
        if method == "one-shot-tune":
            start, fit, keys = dense, self.tune, self.tune_keys
        return masks, fit(jp.rewind(start, masks), masks, keys)

    def lines(self, method: str, level: int, masks: Any, fit: loops.Fit) -> list[dict[str, Any]]:
        """Return the figures of a level, a line per seed."""
        at_end, stopped = self.accuracy(fit.params), self.accuracy(fit.best)
        tuned = method in ("tune", "one-shot-tune")
        begin = 0 if tuned else self.config.rewind_epoch
        lines = []
        for index, seed in enumerate(self.config.seeds):
            own, params = jax.tree.map(operator.itemgetter(index), (masks, fit.params))
            jp.check_pruned(params, own)
            achieved = jp.metrics.sparsity(own)
            losses = np.asarray(fit.losses[index])
            lines.append(
                {
                    "method": method,
                    "level": level,
                    "seed": seed,
                    "kept_weights": jp.metrics.nonzeros({k: v["kernel"] for k, v in own.items()}),
                    "density": 1 - achieved.prunable,
                    "sparsity_model": achieved.model,
                    "collapsed": jp.metrics.collapsed(own),
                    "accuracy": float(at_end[index]),
                    "early_stop_accuracy": float(stopped[index]),
                    "early_stop_epoch": begin + int(losses.argmin()) + 1,
                    "held_out_losses": [round(float(loss), 5) for loss in losses],
                    "layers": layers(own),
                }
            )
        return lines


DESIGN = Design(
    factors=("method",),
    levels=("level",),
    figures=("accuracy", "early_stop_accuracy", "density", "sparsity_model", "kept_weights"),
    percent=("accuracy", "early_stop_accuracy", "density", "sparsity_model"),
    baseline={"level": 0},
    axes=(Axis("compression (weights)", "density", "1 / x"), Axis("density", "density", "x")),
)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, or what is left of it, writes its lines, and returns them."""
    chosen = settings(config)
    folder = Path(config.out) / "checkpoints"
    chains = [method for method in CHAINS if method == "ticket" or method in chosen.methods]
    branches = [method for method in BRANCHES if method in chosen.methods]
    same = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "fresh")}
    total = 1 + len(chains) * chosen.levels + len(branches) * len(chosen.branch_levels)
    with contextlib.ExitStack() as stack:
        own = Results(config.out, "lottery_ticket", config, design=DESIGN, resume=not config.fresh)
        results = stack.enter_context(own)
        for method in CHAINS if config.fresh else ():
            forget(folder / method)
        # First, so that a folder of other settings is refused before anything is trained or written.
        stores = {method: stack.enter_context(Checkpoints(folder / method, same)) for method in chains}
        study = Study(config)
        results.drop_lines()  # the checkpoints have them, up to their last whole levels
        saved_recipes.save_method(results.unfinished, "ticket", study.recipe)
        bar = stack.enter_context(tqdm(total=total, unit="run"))

        def measured(method: str, level: int, masks: Any, fit: loops.Fit) -> list[dict[str, Any]]:
            """Return a level's lines; the first seed's masks of a method's last level are kept."""
            new = study.lines(method, level, masks, fit)
            if level and level == max(chosen.branch_levels if method in BRANCHES else (chosen.levels,)):
                first = jax.tree.map(operator.itemgetter(0), masks)
                new[0]["masks"] = results.keep_masks(method, first)
            return new

        def add(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
            results.add(new)
            bar.update(len(new) // len(config.seeds))
            return new

        dense = study.init
        for method, checkpoints in stores.items():
            bar.set_description(method)
            # Training starts over at the last level of this chain that was finished.
            ticket, own = study.dense_ticket(dense), []
            after = None if method == "ticket" else ticket
            if saved := checkpoints.restore((ticket, dense)):
                (after, dense), own = saved
                add(own)
            fits: list[loops.Fit] = []
            for ticket in study.chain(method, after, fits):
                level = int(ticket.level)
                dense = ticket.trained if level == 0 else dense
                own += add(measured(method, level, ticket.masks, fits[0]))
                if method == "ticket" and level in chosen.branch_levels:
                    for branch in branches:
                        own += add(measured(branch, level, *study.branch(branch, ticket, dense)))
                checkpoints.save(level, (ticket, dense), own)
    return results.lines


def summarise(lines: Sequence[dict[str, Any]], config: Config) -> str:
    """Return the lines as tables of at most 80 columns, means and standard deviations over seeds."""
    chosen = settings(config)
    left = {line["level"]: line["density"] for line in lines if line["method"] == "ticket"}
    shown = sorted({0, *(chosen.branch_levels or left)})
    rows = {level: f"{level:>2}: {left[level]:>7.2%}" for level in shown}
    methods = [method for method in METHODS if any(line["method"] == method for line in lines)]
    text = ["accuracy in % after the last epoch, mean and s.d. over seeds"]
    text.append(tables.by_method(lines, rows, "level", methods, heading="level: left"))
    text += ["", "the ticket where early stopping on held-out images would have stopped"]
    stopped = [["level: left", "epoch", "accuracy %"]]
    for level, label in rows.items():
        epochs = [x["early_stop_epoch"] for x in lines if (x["method"], x["level"]) == ("ticket", level)]
        accuracy = tables.cell(lines, "early_stop_accuracy", method="ticket", level=level)
        stopped.append([label, f"{np.mean(epochs):.1f}", accuracy])
    return "\n".join([*text, tables.text(stopped)])


def plot(lines: Sequence[dict[str, Any]], config: Config) -> None:
    """Draw accuracy against compression of the weights, as `accuracy.png`."""
    curves: dict[str, plots.Line] = {}
    for method in METHODS:
        own = [line for line in lines if line["method"] == method and line["level"]]
        levels = [[line for line in own if line["level"] == x] for x in sorted({x["level"] for x in own})]
        if levels:
            compressions = [1 / level[0]["density"] for level in levels]
            curves[method] = compressions, [[line["accuracy"] for line in level] for level in levels]
    epochs = settings(config).epochs
    panels = {"compression (weights)": curves}
    title = f"LeNet-300-100, {config.data}; {epochs} epochs a level, {len(config.seeds)} seeds"
    dense = figures.accuracies(lines, level=0)
    figures.against_compression(Path(config.out) / "accuracy.png", title, panels, dense)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    loops.use_cores(config.seeds)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        print(f"\nLeNet-300-100 on {config.data}, {settings(config).epochs} epochs a level")
        print(summarise(lines, config))
        plot(lines, config)
    print(f"\nWrote results.jsonl and accuracy.png to {config.out}")


if __name__ == "__main__":
    main()
