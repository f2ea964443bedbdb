"""Runs a pruning recipe: what, how much and when is read from a YAML file.

A recipe whose schedule counts steps prunes while the network trains. Any other
prunes the trained network, once for a plain number, else level by level, and
trains on each time. A recipe that calibrates prunes it layer by layer, and
nothing is trained after. If the recipe distills, the dense network is the teacher;
if it has a stopping rule, that is looked at after each epoch, or level, on
images held out from the training: pruning that goes below the accuracy floor is
taken back.

    python -m experiments.recipe experiments/recipes/gradual-magnitude.yaml
    python -m experiments.recipe RECIPE --dataset mnist --model lenet

The pruned network is left in one small file for each seed, which
`jaxprune.io.load` reads. A run that was stopped resumes after its last finished seed
when the same command is given again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.data import datasets
from experiments.networks.small import MLP, LeNet
from experiments.report.design import Design
from experiments.run import stopping
from experiments.run.results import Results, layers
from experiments.run.settings import BatchSize, Count, Folder, Positive, Seeds, Settings, parse
from experiments.show import tables
from experiments.training import loops
from experiments.training.distill import LABELS, Mix, Taught, losses


@dataclass(frozen=True)
class Config(Settings):
    """Flags of a run."""

    recipe: str  # a YAML file; one that an earlier run left in its folder brings its flags with it
    dataset: Literal["digits", "mnist"] = "digits"  # digits is embedded; mnist is downloaded once
    model: Literal["mlp", "lenet"] = "mlp"  # mlp is LeNet-300-100
    seeds: Seeds = (0,)  # the runs that figures are averaged over
    epochs: Count = 15  # of the dense network; of a recipe in steps, of each network
    tune_epochs: Count = 5  # of training after each pruning
    levels: Count | None = None  # how often to prune, if nothing stops it (default: 1 for a number, else 10)
    rewind: Literal["weights", "nothing"] = "nothing"  # what a level starts from; weights are the first ones
    lr: Positive = 1.2e-3  # learning rate of Adam
    batch_size: BatchSize = 60  # images per step
    score_images: Count = 500  # images for scores that need gradients or the loss, or for calibration
    train_size: Count | None = None  # use this many training images only
    test_size: Count | None = None  # use this many test images only
    out: Folder = "results/recipe"  # folder for results.jsonl, recipe.yaml and the networks
    fresh: bool = False  # start over instead of resuming a stopped run


class Run(NamedTuple):
    """A pruned network.

    Attributes:
      params, masks: of the network.
      level: how many prunings, or epochs, lie behind it.
      reason: why pruning stopped before its schedule; None if it did not.
    """

    params: Any
    masks: Any
    level: int
    reason: str | None = None


class Study:
    """A recipe, the data, the network, and one seed's training."""

    def __init__(self, config: Config, recipe: jp.recipes.Recipe):
        self.config, self.recipe = config, recipe
        size = 28 if config.model == "lenet" and config.dataset == "digits" else None
        data = datasets.load(config.dataset, size=size, train=config.train_size, test=config.test_size)
        train, self.test = loops.splits(data)
        self.train, self.held_out = loops.hold_out(train, 1 / 12)
        self.steps = -(-len(self.train.y) // config.batch_size)
        self.example = self.train.batch(jnp.arange(1))[0]
        self.batch = self.train.batch(jnp.arange(min(config.score_images, len(self.train.y))))
        lenet = config.model == "lenet"
        self.model: Any = LeNet(im2col=jax.default_backend() == "cpu") if lenet else MLP()
        # The same function, as XLA has it: its convolutions are what is analysed and counted.
        self.plain: Any = LeNet(im2col=False) if lenet else self.model
        self.adam = optax.adam(config.lr)
        self.init = jax.jit(lambda key: self.model.init(key, self.example)["params"])
        self._untaught = jnp.zeros((len(self.train.y), 10))

    def apply(self, params: Any, x: jax.Array) -> Any:
        """Return the network in evaluation mode."""
        return self.plain.apply({"params": params}, x)

    def loss(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Return what scores of the loss are made of."""
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(self.apply(params, x), y).mean()

    def accuracy(self, params: Any, split: loops.Split) -> float:
        """Return the accuracy on a split, in [0, 1]."""
        return int(_correct(self.model, params, split)) / len(split.y)

    def macs(self, masks: Any) -> int:
        """Return the multiply-adds of one image that the masks leave."""
        shapes = jax.eval_shape(lambda: jax.tree.map(lambda mask: jnp.zeros(mask.shape), masks))
        return jp.metrics.macs(self.apply, shapes, self.example, masks=masks).total

    def pruner(self, params: Any, seed: int) -> jp.Pruner:
        """Return the recipe's, whose scores get a batch if they read one."""
        key = loops.seed_keys((seed,), purpose=3)[0]
        pruner = self.recipe.pruner(params, key=key, loss_fn=self.loss, apply_fn=self.apply, x=self.example)
        if pruner.takes is not None and "batch" not in pruner.takes:
            return pruner

        def update(state: Any, params: Any, **inputs: Any) -> Any:
            return pruner.update(state, params, **{"batch": self.batch, **inputs})

        return pruner._replace(update=update)

    def mix(self, teacher: Any) -> tuple[Any, Mix]:
        """Return a teacher's answers, and how the recipe learns from them."""
        if self.recipe.distillation is None or teacher is None:
            return self._untaught, LABELS
        return _answers(self.model, teacher, self.train), Mix(**self.recipe.distillation)

    def fit(
        self, params: Any, masks: Any, key: jax.Array, epochs: int, bar: tqdm, teacher: Any = None
    ) -> Any:
        """Train under fixed masks."""
        answers, mix = self.mix(teacher)
        params = jp.apply_masks(params, masks)
        opt_state: Any = jp.keep_masked(self.adam, masks).init(params)
        run = _masked_epoch(self.model, self.config.lr, self.config.batch_size)
        for number in range(epochs):
            own = jax.random.fold_in(key, number)
            params, opt_state = run(params, opt_state, own, answers, mix, self.train)
            bar.update()
        return params

    def stops(self, params: Any, masks: Any) -> tuple[str | None, bool]:
        """Return why to stop, and whether it is that the accuracy fell too low."""
        accuracy, stop = self.accuracy(params, self.held_out), self.recipe.stop
        macs = None if stop.macs is None else self.macs(masks)
        low = stop.accuracy is not None and accuracy < stop.accuracy
        return stop.reached(accuracy=accuracy, macs=macs), low

    def by_calibration(self, dense: Any) -> Run:
        """Prune a trained network layer by layer."""
        images = self.batch[0]
        batches = [images[start : start + 100] for start in range(0, len(images), 100)]
        done = self.recipe.prune_layers(self.apply, dense, batches)
        return Run(done.params, done.masks, 1)

    def in_levels(self, dense: Any, first: Any, seed: int, bar: tqdm) -> Run:
        """Prune a trained network, once or level by level, and trains on."""
        pruner, key = self.pruner(dense, seed), loops.seed_keys((seed,), purpose=2)[0]

        @jax.jit
        def update(state: Any, params: Any, key: jax.Array) -> Any:
            return pruner.update(state, params, grads=jax.grad(self.loss)(params, self.batch), key=key)

        state = pruner.init(dense)
        last = Run(dense, state.masks, 0)
        for level in range(1, levels(self.config, self.recipe) + 1):
            state = update(state, last.params, jax.random.fold_in(key, level))
            if jp.metrics.nonzeros(state.masks) == jp.metrics.nonzeros(last.masks):
                return last._replace(reason="nothing more is removed")
            start = first if self.config.rewind == "weights" else last.params
            epochs = self.config.epochs if self.config.rewind == "weights" else self.config.tune_epochs
            params = self.fit(start, state.masks, jax.random.fold_in(key, level), epochs, bar, dense)
            reason, low = self.stops(params, state.masks)
            if low:
                return last._replace(reason=reason)
            last = Run(params, state.masks, level, reason)
            if reason is not None:
                return last
        return last

    def in_steps(self, dense: Any, first: Any, seed: int, bar: tqdm) -> Run:
        """Train from the first weights with pruning inside the optimizer."""
        tx = jp.wrap_optax(self.adam, self.pruner(first, seed))
        run = _epoch(self.model, self.config.batch_size, lambda opt_state: tx)
        key = loops.seed_keys((seed,), purpose=1)[0]
        opt_state: Any = tx.init(first)
        answers, mix = self.mix(dense)
        # Masks that a recipe starts from are already in the state.
        params, reason = jp.apply_masks(first, opt_state.pruner.masks), None
        before = params, opt_state.inner, opt_state.pruner.masks
        for number in range(self.config.epochs):
            own = jax.random.fold_in(key, number)
            params, opt_state = run(params, opt_state, own, answers, mix, self.train)
            bar.update()
            if reason is not None:
                continue
            masks = optax.tree.get(opt_state, "masks")
            if jp.metrics.sparsity(masks, self.recipe.where).prunable:
                reason, low = self.stops(params, masks)
                if low:
                    params, inner, masks = before
                    opt_state = jp.KeepMaskedState(inner, masks)
                elif reason is not None:
                    opt_state = jp.KeepMaskedState(opt_state.inner, masks)
                if reason is not None:  # for the rest the masks stay
                    run = _masked_epoch(self.model, self.config.lr, self.config.batch_size)
            before = params, opt_state.inner, masks
        return Run(params, optax.tree.get(opt_state, "masks"), self.config.epochs, reason)

    def figures(self, params: Any, masks: Any) -> dict[str, Any]:
        """Return all that is reported of a network."""
        jp.check_pruned(params, masks)
        achieved = jp.metrics.sparsity(masks, self.recipe.where)
        return {
            "sparsity": achieved.prunable,
            "sparsity_model": achieved.model,
            "kept": jp.metrics.nonzeros(masks),
            "macs": self.macs(masks),
            "accuracy": self.accuracy(params, self.test),
            "held_out_accuracy": self.accuracy(params, self.held_out),
            "layers": layers(masks),
        }

    def compacted(self, pruned: Run) -> dict[str, Any]:
        """Measure the network without its dead channels; nothing where none, or a whole layer, is dead."""
        if jp.metrics.collapsed(pruned.masks):
            return {}
        small = jp.compact(
            self.apply, pruned.params, pruned.masks, self.example, fold_constants=True, verify=False
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(small.params))
        if size == sum(leaf.size for leaf in jax.tree.leaves(pruned.params)):
            return {}
        x, _ = self.test.batch(jnp.arange(min(100, len(self.test.y))))
        gap = jnp.abs(small.apply(small.params, x) - self.apply(pruned.params, x)).max()
        macs = jp.metrics.macs(small.apply, small.params, self.example).total
        return {"compact_params": size, "compact_macs": macs, "compact_difference": float(gap)}


def levels(config: Config, recipe: jp.recipes.Recipe) -> int:
    """Return how often to prune at most."""
    if config.levels is not None:
        return config.levels
    return 1 if recipe.once else 10


# What does not depend on the recipe is compiled once, however many are run.


@partial(jax.jit, static_argnums=0)
def _correct(model: Any, params: Any, split: loops.Split) -> jax.Array:
    predict = partial(model.apply, {"params": params})
    return loops.total(lambda log_probs, y: log_probs.argmax(-1) == y, predict, split, 500)


@partial(jax.jit, static_argnums=0)
def _answers(model: Any, params: Any, split: loops.Split) -> jax.Array:
    return jax.lax.map(
        lambda index: model.apply({"params": params}, split.batch(index[None])[0])[0],
        jnp.arange(len(split.y)),
        batch_size=500,
    )


@lru_cache(maxsize=8)
def _masked_epoch(model: Any, lr: float, batch_size: int) -> Callable[..., Any]:
    adam = optax.adam(lr)
    return _epoch(model, batch_size, lambda opt_state: jp.keep_masked(adam, opt_state.masks))


def _epoch(model: Any, batch_size: int, optimizer_of: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return `run(params, opt_state, key, answers, mix, split)`, with an optimizer made from its state."""

    @loops.jit
    def run(params, opt_state, key, answers, mix, split):
        taught = Taught(split, answers, mix)
        tx = optimizer_of(opt_state)
        return loops.epoch(model, tx, batch_size, params, opt_state, key, taught, losses)

    return lambda params, opt_state, key, answers, mix, split: run(
        params, opt_state, key, answers, Mix(*map(jnp.float32, mix)), split
    )


DESIGN = Design(
    factors=("method",),
    figures=("accuracy", "held_out_accuracy", "sparsity", "sparsity_model", "macs"),
    percent=("accuracy", "held_out_accuracy", "sparsity", "sparsity_model"),
    baseline={"method": "dense"},
)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the recipe for each seed, writes lines and networks, and returns the lines."""
    recipe = jp.recipes.load(config.recipe)
    study = Study(config, recipe)
    end, total = recipe.end_step, config.epochs * study.steps
    if end is not None and end > total:
        raise jp.recipes.RecipeError(
            f"{config.recipe}: it prunes until step {end:,}, and {config.epochs} epochs have {total:,} "
            f"steps: ask for --epochs {-(-end // study.steps)} or more."
        )
    epochs = config.epochs if recipe.calibrates else 2 * config.epochs
    if end is None and not recipe.calibrates:
        each = config.epochs if config.rewind == "weights" else config.tune_epochs
        epochs = config.epochs + levels(config, recipe) * each
    bar = tqdm(total=len(config.seeds) * epochs, unit="epoch")
    results = Results(config.out, "recipe", config, recipe.data, design=DESIGN, resume=not config.fresh)
    with results, bar:
        for seed in config.seeds:
            if results.done(seed=seed):
                bar.update(epochs)
                continue
            first = study.init(loops.seed_keys((seed,), purpose=0)[0])
            ones = jp.ones_masks(first)
            bar.set_description(f"dense, seed {seed}")
            dense = study.fit(first, ones, loops.seed_keys((seed,), purpose=1)[0], config.epochs, bar)
            whole = {"method": "dense", "seed": seed, **study.figures(dense, ones)}
            bar.set_description(f"{Path(config.recipe).stem}, seed {seed}")
            if recipe.calibrates:
                pruned = study.by_calibration(dense)
            elif end is None:
                pruned = study.in_levels(dense, first, seed, bar)
            else:
                pruned = study.in_steps(dense, first, seed, bar)
            size = jp.io.save(results.file(f"seed-{seed}.jaxprune"), pruned.params, pruned.masks)
            dense_size = 4 * sum(leaf.size for leaf in jax.tree.leaves(pruned.params))
            figures = study.figures(pruned.params, pruned.masks)
            figures |= {"level": pruned.level, "stopped": pruned.reason, **study.compacted(pruned)}
            figures |= {"file_bytes": size, "dense_bytes": dense_size}
            results.add([whole, {"method": "pruned", "seed": seed, **figures}])
    return results.lines


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as a table of at most 80 columns, and why pruning stopped."""
    rows = [["seed", "network", "sparsity", "of model", "kept", "MACs", "accuracy %", "file x"]]
    for line in lines:
        row = [str(line["seed"]), line["method"], f"{line['sparsity']:.2%}", f"{line['sparsity_model']:.2%}"]
        row += [f"{line['kept']:,}", f"{line['macs']:,}", f"{100 * line['accuracy']:.2f}"]
        rows.append([*row, f"{line['dense_bytes'] / line['file_bytes']:.1f}" if "file_bytes" in line else ""])
    text = [tables.text(rows, labels=2)]
    text += ["", "without the channels that are dead:"] * any("compact_macs" in line for line in lines)
    for line in lines:
        if "compact_macs" in line:
            text.append(
                f"seed {line['seed']}: {line['compact_params']:,} parameters, {line['compact_macs']:,} MACs, "
                f"outputs differ by at most {line['compact_difference']:.0e}"
            )
    for line in lines:
        if line.get("stopped"):
            text.append(f"seed {line['seed']} stopped: {line['stopped']}")
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a recipe from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out):
        try:
            lines = run(config)
        except (jp.recipes.RecipeError, FileNotFoundError, PermissionError) as error:
            raise SystemExit(str(error)) from None
        print(f"\n{config.recipe}: {config.model} on {config.dataset}")
        print(summarise(lines))
    print(f"\nWrote results.jsonl, recipe.yaml and seed-*.jaxprune to {config.out}")


if __name__ == "__main__":
    main()
