"""Pruning of whole channels, heads and hidden units, down to networks that are really smaller.

A dense network is trained once. Its coupled channels are read off its function; then, for each
method and each target, as few go as leave at most 1 / target of the multiply-adds, counted in the
compacted network, which is trained on:

- global, local, isomorphic: one pruning by magnitude, ranking all groups of channels together, each
  by itself, or those of one kind together; then tuning;
- random: as local, but which channels go is drawn: a control;
- iterative: several rounds of both, in as many epochs;
- gradual: pruned gradually while the dense network trains on under a group lasso, in as many
  epochs, and compacted at the end;
- scratch: the small network from new weights, in as many epochs at the dense network's learning
  rate: a control.

--ranking says which of the first three iterative and scratch go by. Gradual has local's widths.

    python -m experiments.channel_pruning                              # LeNet, digits, embedded
    python -m experiments.channel_pruning --dataset cifar10            # ResNet-20
    python -m experiments.channel_pruning --dataset tiny_shakespeare   # a small language model

The dense network is kept in the results folder, and so is every line: the same command with more
methods, targets or seeds adds to them. A run that was stopped, by SIGKILL, SIGTERM (status 143) or a
full disk, resumes after its last epoch of the dense network, or its last finished method.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.channel_pruning import cutting, show
from experiments.channel_pruning.cutting import NETWORKS, RANKINGS, Cut, Small
from experiments.report.design import Axis, Design
from experiments.run import saved_recipes, stopping
from experiments.run.checkpoint import Checkpoints, forget
from experiments.run.limits import FlagError, Items, OneOf, Range
from experiments.run.results import Results
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Seeds, Settings, parse
from experiments.training import steps

METHODS = ("global", "local", "isomorphic", "random", "iterative", "gradual", "scratch")


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the study."""

    # digits are embedded; the others are downloaded once
    dataset: Literal["digits", "cifar10", "tiny_shakespeare"] = "digits"
    # by default lenet, resnet20 or decoder, whichever fits
    network: Literal["lenet", "resnet20", "resnet56", "vit", "decoder"] | None = None
    seeds: Seeds = (0,)  # the runs that figures are averaged over
    # ways to prune, or the controls
    methods: Annotated[tuple[Annotated[str, OneOf(METHODS)], ...], Items(empty=True)] = METHODS
    # how many times fewer multiply-adds; the default is the network's, as of the next five
    targets: tuple[Annotated[float, Range(above=1)], ...] | None = None
    epochs: Count | None = None  # of the dense network
    lr: Positive | None = None  # its learning rate, at the peak of one cycle
    tune_epochs: Natural | None = None  # of each pruned network
    tune_lr: Positive | None = None  # the learning rate of tuning, at the peak of one cycle
    batch_size: BatchSize | None = None  # images, or pieces of text, per step
    ranking: Literal["global", "local", "isomorphic"] = "isomorphic"  # what iterative and scratch prune by
    multiple_of: Count = 1  # round widths up to a multiple of this many channels, heads or hidden units
    rounds: Count = 3  # of iterative pruning; at most the epochs of tuning
    penalty: Annotated[float, Range(at_least=0)] = 1e-4  # weight of gradual's group lasso
    batch_sizes: tuple[BatchSize, ...] = (1, 64)  # to measure times at
    timing_runs: Natural = 20  # calls timed of each network; 0 for none
    train_size: Count | None = None  # use this many training images, or characters, only
    test_size: Count | None = None  # use this many test images, or characters, only
    dense: Folder | None = None  # the folder of the dense networks (default: dense, in the results)
    fresh: bool = False  # start over, the dense network too, whatever the folders hold
    out: Folder | None = None  # folder of the results (default: results/channel_pruning/<network>)


# What a line of results may differ in from another run's and still be of the same study.
_NOT_SETTINGS = ("methods", "targets", "seeds", "timing_runs", "dense", "fresh", "out")
_GRADUAL_ENDS = 0.6  # of the steps of gradual pruning; after it the masks rest
_GRADUAL_UPDATES = 20


def settings(config: Config) -> Any:
    """Return the flags as a Config, with the network's defaults where they were left out.

    It is an Any to the type checker, to which the fields filled in could still be None.

    Raises:
      FlagError: the network is for another data set.
    """
    fitting = {"digits": "lenet", "cifar10": "resnet20", "tiny_shakespeare": "decoder"}
    name = config.network or fitting[config.dataset]
    network = NETWORKS[name]
    if network.dataset != config.dataset:
        raise FlagError(f"{name} is for --dataset {network.dataset}, got {config.dataset}")
    names = ("targets", "epochs", "lr", "tune_epochs", "tune_lr", "batch_size")
    own = {name: getattr(network, name) for name in names if getattr(config, name) is None}
    out = config.out or f"results/channel_pruning/{name}"
    chosen = dataclasses.replace(config, network=name, out=out, **own)
    return dataclasses.replace(chosen, dense=chosen.dense or f"{out}/dense")


def dense_settings(chosen: Any, seed: int) -> dict[str, Any]:
    """Return what a dense network depends on: what its checkpoint is kept under."""
    names = ("dataset", "network", "epochs", "lr", "batch_size", "train_size")
    return {name: getattr(chosen, name) for name in names} | {"seed": seed}


class Run(NamedTuple):
    """What a method gives for a target.

    Attributes:
      small: the compacted network.
      variables: its own, after all training.
      before: its score after the last pruning, before any training of the small network; None if
        there is nothing to compare.
    """

    small: Small
    variables: Any
    before: steps.Score | None


def recipe(method: str, cut: Cut, multiple_of: int, end_step: int | None = None) -> jp.recipes.Recipe:
    """Return what is pruned to where `cut` came to: at once, or along a cubic schedule."""
    ranking, sparsity = RANKINGS.get(method, RANKINGS["local"]), cut.sparsity
    prune: dict[str, Any] = {"score": ranking.scores.__name__, "scope": ranking.scope, "sparsity": sparsity}
    channels: dict[str, Any] = {"normalize": "mean", "multiple_of": multiple_of}
    if end_step is not None:
        del channels["normalize"]  # each group is ranked by itself
        prune["sparsity"] = {"cubic": {"sparsity": sparsity, "begin_step": 0, "end_step": end_step}}
        prune["every"] = max(1, end_step // _GRADUAL_UPDATES)
    return jp.recipes.parse({"prune": prune | {"structure": {"channels": channels}}})


class Study:
    """A network, its data, and one seed's dense training."""

    def __init__(self, chosen: Any, results: Results):
        self.chosen, self.results = chosen, results
        self.network = NETWORKS[chosen.network]
        self.task = cutting.load(self.network, chosen.train_size, chosen.test_size)
        self.steps = steps.steps_per_epoch(self.task.train, chosen.batch_size)
        shapes = jax.eval_shape(self.task.init, jax.random.key(0))
        self.example, _ = self.task.test.batch(jnp.arange(1))
        spared, multiple_of = self.network.spared, chosen.multiple_of
        self.cutter = cutting.Cutter(self.task.apply, shapes, self.example, spared, multiple_of)
        self.params = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        self._dense_logits = jax.jit(cutting.evaluation(self.task.apply))
        self.score = self.scorer(self.task.apply)

    def scorer(self, apply: steps.Apply) -> Any:
        """Return `score(variables)` on the test split."""
        chunk = 50 if self.network.dataset == "tiny_shakespeare" else 500
        return steps.scorer(apply, self.task.test, min(chunk, len(self.task.test.y)))

    def optimizer(self, peak: float, epochs: int) -> optax.GradientTransformation:
        """Return the network's, in one cycle of the learning rate."""
        return self.network.optimizer(steps.one_cycle(peak, max(1, epochs * self.steps)))

    def fitter(self, apply: steps.Apply, optimizer: optax.GradientTransformation) -> Any:
        """Return `fit(variables, key, epochs, opt_state=None, after=None)`."""
        return steps.fitter(apply, optimizer, self.chosen.batch_size, self.task.train, self.network.augment)

    def dense(self, seed: int, bar: tqdm) -> Any:
        """Return the dense network's variables, trained, or as far as they were, read."""
        folder, epochs = f"{self.chosen.dense}/seed-{seed}", self.chosen.epochs
        optimizer = self.optimizer(self.chosen.lr, epochs)

        def start(key: jax.Array) -> steps.State:
            variables = self.task.init(key)
            return steps.State(variables, optimizer.init(variables["params"]))

        with Checkpoints(folder, dense_settings(self.chosen, seed)) as checkpoints:
            shapes = jax.eval_shape(start, _key(seed, "init"))
            template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            if (found := checkpoints.restore(template)) is not None:
                state, lines = jax.tree.map(jnp.asarray, found[0]), found[1]
            else:
                state, lines = jax.jit(start)(_key(seed, "init")), []
            bar.update(len(lines))

            def after(_: int, state: steps.State, loss: float) -> None:
                lines.append({"epoch": len(lines) + 1, "loss": loss})
                checkpoints.save(len(lines), state, lines)
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()

            fit = self.fitter(self.task.apply, optimizer) if len(lines) < epochs else None
            while fit is not None and len(lines) < epochs:
                key = jax.random.fold_in(_key(seed, "dense"), len(lines))
                state = fit(state.variables, key, 1, state.opt_state, after)
        return state.variables

    def run(self, method: str, target: float, dense: Any, seed: int, bar: tqdm) -> Run:
        """Prune by a method to 1 / target of the multiply-adds, and trains what is left."""
        most, epochs, peak = self.cutter.macs / target, self.chosen.tune_epochs, self.chosen.tune_lr
        if method == "iterative":
            return self._iterative(target, dense, seed, bar)
        if method == "gradual":
            return self._gradual(target, self.cutter.cut("local", dense, most), dense, seed, bar)
        ranking = method if method in RANKINGS else self.chosen.ranking
        cut = self.cutter.cut(ranking, dense, most, _key(seed, "random"))
        own = recipe(ranking, cut, self.chosen.multiple_of)
        saved_recipes.save_method(self.results.unfinished, f"{method}-{target:g}x-seed-{seed}", own)
        small = cutting.compact(self.task.apply, dense, cut.masks, self.example)
        variables, before = small.compacted.params, None
        if method == "scratch":
            variables, peak = small.compacted.shrink(self.task.init(_key(seed, "scratch"))), self.chosen.lr
        else:
            before = self.scorer(small.apply)(variables)
        fit = self.fitter(small.apply, self.optimizer(peak, epochs))
        state = fit(variables, _key(seed, "tune"), epochs, after=lambda *_: bar.update())
        return Run(small, state.variables, before)

    def _iterative(self, target: float, dense: Any, seed: int, bar: tqdm) -> Run:
        """Prune and tune in rounds of one cycle: the optimizer's state shrinks with the network."""
        optimizer, opt_state = self.optimizer(self.chosen.tune_lr, self.chosen.tune_epochs), None
        parts = cutting.shares(self.chosen.tune_epochs, self.chosen.rounds)
        result = None
        for number, part in enumerate(parts, start=1):
            most = self.cutter.macs / target ** (number / len(parts))
            cut = self.cutter.cut(self.chosen.ranking, dense, most)
            small = cutting.compact(self.task.apply, dense, cut.masks, self.example)
            variables, plan = small.compacted.params, small.compacted.plan.under("params")
            before = self.scorer(small.apply)(variables)
            if opt_state is not None:
                opt_state = jax.jit(plan.shrink)(opt_state)
            fit = self.fitter(small.apply, optimizer)
            key = jax.random.fold_in(_key(seed, "tune"), number)
            state = fit(variables, key, part, opt_state, lambda *_: bar.update())
            dense = jax.jit(small.compacted.expand)(state.variables)
            opt_state = jax.jit(plan.expand)(state.opt_state)
            result = Run(small, state.variables, before)
        assert result is not None
        return result

    def _gradual(self, target: float, cut: Cut, dense: Any, seed: int, bar: tqdm) -> Run:
        """Prune inside the optimizer, along a cubic schedule, to as many units as `cut` removes."""
        epochs = self.chosen.tune_epochs
        groups = self.cutter.groups.under("params")
        end = max(1, round(_GRADUAL_ENDS * epochs * self.steps))
        own = recipe("gradual", cut, self.chosen.multiple_of, end)
        saved_recipes.save_method(self.results.unfinished, f"gradual-{target:g}x-seed-{seed}", own)
        pruner = own.pruner(dense["params"], groups=groups)
        penalty = cutting.penalised(groups, self.chosen.penalty)
        inner = optax.chain(penalty, self.optimizer(self.chosen.tune_lr, epochs))
        fit = self.fitter(self.task.apply, jp.wrap_optax(inner, pruner))
        state = fit(dense, _key(seed, "tune"), epochs, after=lambda *_: bar.update())
        masks = jp.ones_masks(dense) | {"params": optax.tree.get(state.opt_state, "masks")}
        jp.check_pruned(state.variables, masks)
        small = cutting.compact(self.task.apply, state.variables, masks, self.example)
        return Run(small, small.compacted.params, None)

    def figures(self, run: Run) -> dict[str, Any]:
        """Return all that is reported of a run but its method."""
        small, variables = run.small.compacted, run.variables
        macs = jp.metrics.macs(small.apply, variables, self.example).total
        logits, masked = jax.jit(small.apply), jax.jit(small.expand)(variables)
        errors, speed_ups = [], {}
        for size in self.chosen.batch_sizes:
            x, _ = self.task.test.batch(jnp.arange(size) % len(self.task.test.y))
            difference = self._dense_logits(masked, x) - logits(variables, x)
            errors.append(float(jnp.abs(difference).max()))
            calls = {"dense": (self._dense_logits, masked, x), "small": (logits, variables, x)}
            speed_ups[str(size)] = cutting.speed_up(calls, self.chosen.timing_runs)
        before = run.before and self.measures(run.before)
        return {
            **self.measures(self.scorer(run.small.apply)(variables)),
            "before": before,
            "params": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
            "macs": macs,
            "macs_ratio": self.cutter.macs / macs,
            "compaction_error": max(errors, default=None),
            "stayed": [str(stayed) for stayed in small.not_removed],
            "speed_up": speed_ups,
            "widths": self.cutter.widths(small.plan),
        }

    def measures(self, score: steps.Score) -> dict[str, float]:
        """Return a score's figures; for a text, bits per character too."""
        text = self.network.dataset == "tiny_shakespeare"
        return score._asdict() | ({"bits": score.loss / math.log(2)} if text else {})


def _key(seed: int, purpose: str) -> jax.Array:
    purposes = ("init", "dense", "tune", "random", "scratch")
    return jax.random.fold_in(jax.random.key(seed), purposes.index(purpose))


DESIGN = Design(
    factors=("method",),
    levels=("target",),
    figures=("accuracy", "loss", "before.accuracy", "params", "macs", "macs_ratio"),
    percent=("accuracy", "before.accuracy"),
    baseline={"method": "dense"},
    axes=(
        Axis("compression (parameters)", "params", "dense / x"),
        Axis("times fewer multiply-adds", "macs_ratio", "ratio"),
    ),
)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, writes its lines, and returns those of the methods, targets and seeds asked for."""
    chosen = settings(config)
    wanted = [("dense", 1.0), *((m, target) for target in chosen.targets for m in chosen.methods)]
    text = NETWORKS[chosen.network].dataset == "tiny_shakespeare"
    results = Results(
        chosen.out,
        "channel_pruning",
        chosen,
        design=DESIGN._replace(figures=("bits", *DESIGN.figures)) if text else DESIGN,
        resume=not chosen.fresh,
        adds=True,
        may_differ=_NOT_SETTINGS,
    )
    with results, tqdm(unit="epoch") as bar:
        for seed in chosen.seeds if chosen.fresh else ():
            forget(f"{chosen.dense}/seed-{seed}")

        def done(method: str, target: float, seed: int) -> bool:
            return results.done(method=method, target=target, seed=seed)

        missing = {s: [(m, t) for m, t in wanted if not done(m, t, s)] for s in chosen.seeds}
        bar.total = sum(
            chosen.epochs * bool(pairs) + chosen.tune_epochs * len([p for p in pairs if p[0] != "dense"])
            for pairs in missing.values()
        )
        study = Study(chosen, results) if any(missing.values()) else None
        for seed, pairs in missing.items():
            if study is None or not pairs:
                continue
            bar.set_description(f"dense, seed {seed}")
            dense = study.dense(seed, bar)
            for method, target in pairs:
                bar.set_description(f"{method} {target:g}x, seed {seed}")
                line: dict[str, Any] = {"method": method, "target": target, "seed": seed}
                if method == "dense":
                    line |= study.measures(study.score(dense))
                    line |= {"params": study.params, "macs": study.cutter.macs, "macs_ratio": 1.0}
                else:
                    line |= study.figures(study.run(method, target, dense, seed, bar))
                results.write(**line, note=study.task.note)
    asked = {(*pair, seed) for pair in wanted for seed in chosen.seeds}
    return [line for line in results.lines if (line["method"], line["target"], line["seed"]) in asked]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out or "results/channel_pruning"):
        lines = run(config)
        chosen = settings(config)
        print(f"\n{chosen.network} on {lines[0]['note']}")
        print(show.summarise(lines, chosen))
        if chosen.methods:
            print(f"\n{show.widths(lines, chosen.targets[0])}")
        show.plot(lines, chosen)
    print(f"\nWrote results.jsonl and accuracy.png to {chosen.out}")
