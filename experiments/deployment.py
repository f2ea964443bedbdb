"""What to try before a network is deployed, in the order of effort.

LeNet is made smaller and quicker step by step:

- eager: as it is trained, run op by op;
- compiled: the same network under `jit`, and exported as StableHLO;
- int8: its kernels as 8-bit integers in the file;
- smaller: another architecture, half as wide, trained from labels;
- distilled: the same taught by LeNet, in 8 bits;
- channels: LeNet pruned to that width, tuned with LeNet as its teacher,
  compacted, in 8 bits;
- weights: LeNet pruned weight by weight, tuned likewise, in 8 bits.

All networks train for as many epochs in all. 8-bit values are what the file
holds; they are computed with in float32.

    python -m experiments.deployment                  # digits, embedded
    python -m experiments.deployment --dataset mnist
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.lenet import LAYERS, file_bytes
from experiments.networks.small import LeNet
from experiments.report.design import Design
from experiments.run import stopping, study
from experiments.run.results import Results
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Share, Sparsity, parse
from experiments.show import tables
from experiments.training import distill, loops

HALF = (5, 10, 25)  # the widths that half of the channels leave
STEPS = {
    "eager": "op by op",
    "compiled": "compiled",
    "int8": "int8",
    "smaller": "half as wide",
    "distilled": "half as wide, taught, int8",
    "channels": "channels pruned, taught, int8",
    "weights": "weights pruned, taught, int8",
}


@dataclass(frozen=True)
class Config(study.Settings):
    """Flags of the study."""

    epochs: Count = 15  # of LeNet
    tune_epochs: Natural = 5  # after pruning; a smaller architecture trains for both
    sparsity: Sparsity = 0.9  # of the weights, where they are pruned one by one
    temperature: Positive = 4.0  # of the teacher's answers
    alpha: Share = 0.9  # the teacher's share of the loss
    lr: Positive = 1.2e-3  # learning rate of Adam
    batch_size: BatchSize = 64  # images per step, and in a call that is timed
    rounds: Count = 20  # times that each call is measured
    out: Folder = "results/deployment"  # folder for results.jsonl


class Network(NamedTuple):
    """One step's networks, of all seeds.

    Attributes:
      accuracy: (seeds,), of what is deployed.
      of_seed: from a seed's number to a function, its params, and masks of these or None.
      int8: whether the file has 8-bit kernels.
    """

    accuracy: np.ndarray
    of_seed: Callable[[int], tuple[Callable[..., Any], Any, Any]]
    int8: bool


def applied(model: LeNet) -> Callable[..., Any]:
    """Return the model as a function of params and images."""
    return lambda params, x: model.apply({"params": params}, x)


def networks(config: Config, train: loops.Split, test: loops.Split, bar: tqdm) -> dict[str, Network]:
    """Return the networks of each step but the first, by its name."""
    lenet, narrow = (LeNet(jax.default_backend() == "cpu", widths) for widths in ((10, 20, 50), HALF))
    keys = [loops.seed_keys(config.seeds, purpose) for purpose in range(5)]
    mix = distill.Mix(config.temperature, config.alpha)
    fit, fit_narrow = (
        distill.fitter(model, optax.adam(config.lr), config.batch_size, train) for model in (lenet, narrow)
    )
    accuracy, accuracy_narrow = (loops.evaluator(model, test) for model in (lenet, narrow))

    def plain(model: LeNet, accuracy: Any, params: Any, masks: Any = None, int8: bool = True) -> Network:
        params = as_int8(params) if int8 else params

        def of_seed(index: int) -> tuple[Any, Any, Any]:
            return applied(model), *jax.tree.map(operator.itemgetter(index), (params, masks))

        return Network(accuracy(params), of_seed, int8)

    bar.set_description("LeNet")
    init = loops.init(lenet, train, keys[0])
    ones = jp.ones_masks(init)
    dense = fit(init, ones, keys[1], config.epochs, bar)
    answers = loops.answerer(lenet, train)(dense)
    found = {
        "compiled": plain(lenet, accuracy, dense, int8=False),
        "int8": plain(lenet, accuracy, dense),
    }

    bar.set_description(STEPS["smaller"])
    init = loops.init(narrow, train, keys[2])
    whole, epochs = jp.ones_masks(init), config.epochs + config.tune_epochs
    alone = fit_narrow(init, whole, keys[3], epochs, bar)
    found["smaller"] = plain(narrow, accuracy_narrow, alone, int8=False)
    taught = fit_narrow(init, whole, keys[3], epochs, bar, answers, mix)
    found["distilled"] = plain(narrow, accuracy_narrow, taught)

    bar.set_description(STEPS["channels"])
    image, _ = test.batch(jnp.arange(1))
    first = jax.tree.map(operator.itemgetter(0), dense)
    # With convolutions as such: channels cannot be told apart once patches are gathered.
    convolving = applied(LeNet(im2col=False))
    structure = jp.structures.channels(jp.channel_groups(convolving, first, image))
    halve = partial(jp.prune_once, sparsity=0.5, structure=structure, scope="layerwise")
    masks = jax.jit(jax.vmap(lambda params: halve(params, jp.scores.magnitude)))(dense)
    params = as_int8(fit(dense, masks, keys[4], config.tune_epochs, bar, answers, mix))

    def compacted(index: int, trees: Any = (params, masks)) -> tuple[Any, Any, Any]:
        own, kept = jax.tree.map(operator.itemgetter(index), trees)
        small = jp.compact(convolving, own, kept, image)
        return applied(narrow), small.params, small.masks  # it is a LeNet half as wide

    found["channels"] = Network(accuracy(params), compacted, int8=True)

    bar.set_description(STEPS["weights"])
    masks = distill.prune(dense, ones, config.sparsity)
    tuned = fit(dense, masks, keys[4], config.tune_epochs, bar, answers, mix)
    found["weights"] = plain(lenet, accuracy, tuned, masks)
    return found


def as_int8(params: Any) -> Any:
    """Return params as they come back from a file of 8-bit integers, for each seed by itself."""
    return jax.vmap(jp.quantization.as_int8)(params)


def figures(network: Network, index: int, image: jax.Array) -> dict[str, Any]:
    """Return what one seed's network costs to hold and to run."""
    apply, params, masks = network.of_seed(index)
    # Of the convolutions themselves: the products that compute them on a CPU multiply by zeros too.
    convolving = applied(LeNet(False, tuple(params[name]["kernel"].shape[-1] for name in LAYERS[:3])))
    return {
        "accuracy": float(network.accuracy[index]),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "nonzero": jp.metrics.nonzeros(params if masks is None else masks),
        "macs": jp.metrics.macs(convolving, params, image).total,
        "file_bytes": file_bytes(params, masks, network.int8),
        "program_bytes": len(jp.export.stablehlo(apply, params, image, frozen=True).to_bytes()),
    }


def speeds(found: dict[str, Network], images: jax.Array, rounds: int) -> dict[str, float]:
    """Return how many times as fast as LeNet under jit each step is, of the first seed, by medians."""
    calls = {step: (*network.of_seed(0)[:2], images) for step, network in found.items()}
    times = jp.metrics.latency(calls, rounds=rounds)
    # Op by op takes so much longer that taking turns with the others would change nothing.
    times |= jp.metrics.latency({"eager": calls["compiled"]}, rounds=rounds, compiled=False)
    return {step: times["compiled"].median / times[step].median for step in STEPS}


DESIGN = Design(
    factors=("step",),
    figures=("accuracy", "nonzero", "macs", "file_bytes", "program_bytes", "speed_up"),
    percent=("accuracy",),
)


def run(config: Config) -> list[dict[str, Any]]:
    """Run the study, writes its lines, and returns them."""
    train, test = config.load(size=28)
    image, images = (test.batch(jnp.arange(size) % len(test.y))[0] for size in (1, config.batch_size))
    total = 3 * config.epochs + 4 * config.tune_epochs
    with (
        Results(config.out, "deployment", config, design=DESIGN) as results,
        tqdm(total=total, unit="epoch") as bar,
    ):
        found = networks(config, train, test, bar)
        speed = speeds(found, images, config.rounds)
        for step in STEPS:
            network = found["compiled" if step == "eager" else step]
            for index, seed in enumerate(config.seeds):
                line = {"step": step, "seed": seed} | figures(network, index, image)
                line |= {"speed_up": speed[step]} if index == 0 else {}
                results.write(**line)
    return results.lines


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as a table of at most 80 columns; means over seeds."""
    rows = [["", "nonzero", "MACs", "file", "program", "speed", "accuracy %"]]
    for step, title in STEPS.items():
        own = [line for line in lines if line["step"] == step]
        means = (np.mean([line[key] for line in own]) for key in ("nonzero", "macs", "file_bytes"))
        row = [title, *(f"{mean:,.0f}" for mean in means), f"{own[0]['program_bytes']:,}"]
        rows.append([*row, f"{own[0]['speed_up']:.2f}", tables.cell(own)])
    return tables.text(rows, gap=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out):
        lines = run(config)
        seeds, device = len(config.seeds), jax.devices()[0].device_kind
        print(f"\nLeNet on {config.data}, {seeds} seeds; bytes of the file and of the exported program")
        print(f"(float32); how many times as fast batches of {config.batch_size} are, {device}")
        print(summarise(lines))
    print(f"\nWrote results.jsonl to {config.out}")


if __name__ == "__main__":
    main()
