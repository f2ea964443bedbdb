"""How much faster a network is without half of its channels, against its multiply-adds.

ResNet-20 and a small ViT lose half of their coupled channels by magnitude and are compacted. The
speed-up of the forward pass is set beside the ratio of multiply-adds, which it could be at most if
every width ran at the same rate. Cuts:

- each group: half of every group of coupled channels, the residual stream's included;
- blocks of 16: as many from all groups together, what stays rounded up to multiples of 16;
- inside: half of each group that is inside a block (heads and hidden units), the stream whole.

A CPU works on 8 or 16 numbers at once, so a convolution of 8 output channels takes about as long
as one of 16; ResNet-20's first stage has 16. "wide" is ResNet-20 with twice the channels.
"+ sparsify" is the network of the row above after `jp.sparsify(small.apply, small.params, None, x)`,
which computes such convolutions in forms that fill the vectors; the first row has the dense network so.
torch-pruning cuts half of each group of the same ResNet-20 in PyTorch, and is compared with its own
dense network; without it (pip install torch torch-pruning) its row is left out.

    python -m experiments.benchmarks.compaction
    python -m experiments.benchmarks.compaction --networks vit --rounds 31
    python -m experiments.benchmarks.compaction --networks resnet50,vit-base --dtype bfloat16

The last is for an accelerator: ResNet-50 and ViT-B/16, on images of 224 x 224.

Dense and compacted take turns in one process. "of it" is the speed-up over the ratio of MACs; gap is
the largest difference between its outputs and the masked network's; cost is the time to find the
groups, rank and cut them, or to choose the forms, in dense forward passes, compiling included.
"""

import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.benchmarks.graph import ResNet50
from experiments.benchmarks.parts.machine import machine
from experiments.benchmarks.parts.turns import Worker
from experiments.channel_pruning import cutting
from experiments.networks.large import ResNet, ViT
from experiments.run.limits import OneOf
from experiments.run.settings import BatchSize, Count, Settings, Sparsity, parse
from experiments.show.tables import titled
from experiments.training import steps
from jaxprune.graph import ChannelGroups

NETWORKS = ("resnet20", "wide", "vit", "tiny", "resnet50", "vit-base")
NO_TORCH = "torch-pruning is not installed (pip install torch torch-pruning): its row is left out."


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    # of these, in this order
    networks: tuple[Annotated[str, OneOf(NETWORKS)], ...] = ("resnet20", "wide", "vit")
    dtype: Literal["float32", "bfloat16"] = "float32"  # of params and images
    batch: BatchSize = 64  # images in a forward pass
    share: Sparsity = 0.5  # of the channels that goes
    rounds: Count = 9  # measurements of each


SMALL = Config(networks=("tiny",), batch=2, rounds=2)
SPARSIFIED = " + sparsify"
TITLES = {
    "resnet20": "ResNet-20",
    "wide": "wide ResNet-20",
    "vit": "ViT",
    "tiny": "ViT, tiny",
    "resnet50": "ResNet-50",
    "vit-base": "ViT-B/16",
}


class Cut(NamedTuple):
    """A way to choose channels: what is ranked together, rounded to what, and which are spared."""

    scope: str
    multiple_of: int = 1
    spared: Callable[..., bool] | None = None


def cuts(name: str) -> dict[str, Cut]:
    """Return the cuts of a network."""
    found = {"each group": Cut("layerwise")}
    if name in ("vit", "tiny", "vit-base"):
        return found | {"inside": Cut("layerwise", spared=cutting.NETWORKS["vit"].spared)}
    return found | {"blocks of 16": Cut("global", 16)}


def model(name: str) -> Any:
    """Return the flax module."""
    if name == "vit":
        return ViT()
    if name == "tiny":
        return ViT(patch=8, dim=16, depth=1, heads=2, mlp=16)
    if name == "vit-base":
        return ViT(patch=16, dim=768, depth=12, heads=12, mlp=3072, classes=1000)
    if name == "resnet50":
        return ResNet50()
    return ResNet(20, widths=(32, 64, 128) if name == "wide" else (16, 32, 64))


def measure(name: str, config: Config) -> list[dict[str, Any]]:
    """Return a line for each cut of a network."""
    module = model(name)
    side = 224 if name in ("resnet50", "vit-base") else 32
    x = jax.random.normal(jax.random.key(1), (config.batch, side, side, 3)).astype(config.dtype)
    variables = jax.jit(module.init)(jax.random.key(0), x[:1])
    variables = jax.tree.map(lambda leaf: leaf.astype(config.dtype), variables)
    logits: Any = module.apply if name == "resnet50" else cutting.evaluation(steps.flax_apply(module))
    calls: dict[str, tuple[Any, ...]] = {"dense": (logits, variables, x)}
    masked, costs = {"dense": variables}, {"dense": 0.0}
    for way, cut in cuts(name).items():
        began = time.perf_counter()
        masked[way], small = compacted(logits, variables, x[:1], cut, config.share)
        costs[way] = time.perf_counter() - began
        calls[way] = (small.apply, small.params, x)
    for way, (apply, params, _) in list(calls.items()):
        began = time.perf_counter()
        fast = jp.sparsify(apply, params, None, x, rounds=config.rounds)
        costs[f"{way}{SPARSIFIED}"] = time.perf_counter() - began
        calls[f"{way}{SPARSIFIED}"] = (fast.apply, fast.params, x)
    times = jp.metrics.latency(calls, rounds=config.rounds)
    macs = {way: jp.metrics.macs(*calls[way]).total for way in masked}
    found = []
    for way, reference in masked.items():
        want = logits(reference, x)
        for row in (way, f"{way}{SPARSIFIED}")[way == "dense" :]:
            apply, params, _ = calls[row]
            line = {
                "network": TITLES[name],
                "cut": row,
                "macs_ratio": macs["dense"] / macs[way],
                "speed_up": times["dense"].median / times[row].median,
                "low": times["dense"].median / times[row].high,
                "high": times["dense"].median / times[row].low,
                "gap": float(jnp.max(jnp.abs(apply(params, x) - want))),
                "cost": costs[row] / times["dense"].median,
            }
            found.append(line)
    return found


def compacted(logits: Any, variables: Any, example: jax.Array, cut: Cut, share: float) -> tuple[Any, Any]:
    """Return the masked variables and the smaller network."""
    groups = jp.channel_groups(logits, variables, example, split="major")
    groups = groups if cut.spared is None else groups.without(cut.spared)
    groups = ChannelGroups(groups.removable(), groups.whole)
    structure = jp.structures.channels(groups, normalize=jnp.mean, multiple_of=cut.multiple_of)

    @jax.jit
    def choose(variables: Any) -> Any:
        with warnings.catch_warnings():  # rounding widths up misses the share, as it is meant to
            warnings.simplefilter("ignore", UserWarning)
            return jp.prune_once(variables, jp.scores.magnitude, share, scope=cut.scope, structure=structure)

    masks = choose(variables)
    return jp.apply_masks(variables, masks), jp.compact(logits, variables, masks, example, verify=False)


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each network and cut."""
    lines = [line for name in config.networks for line in measure(name, config)]
    if "resnet20" not in config.networks:
        return lines
    if not all(importlib.util.find_spec(name) for name in ("torch", "torch_pruning")):
        return [*lines, {"remark": NO_TORCH}]
    target = "experiments.benchmarks.peers.torch_channels:TorchChannels"
    with Worker(target, widths=(16, 32, 64), batch=config.batch, share=config.share) as worker:
        found = worker("measure", config.rounds)
    low, middle, high = np.percentile(found.pop("speed_up"), [25, 50, 75]).tolist()
    spread = {"speed_up": middle, "low": low, "high": high}
    return [*lines, {"network": TITLES["resnet20"], "cut": "torch-pruning", **found, **spread}]


def rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table."""
    table: list[tuple[str, ...]] = [
        ("network", "cut", "MACs x", "speed x", "quartiles", "of it", "gap", "cost")
    ]
    for line in lines:
        if "remark" in line:
            continue
        below = line["cut"].endswith(SPARSIFIED) and line["macs_ratio"] != 1  # its network's own row is above
        cut = SPARSIFIED if below else line["cut"]
        spread = f"{line['low']:.2f}-{line['high']:.2f}"
        share = f"{line['speed_up'] / line['macs_ratio']:.2f}"
        ratios = f"{line['macs_ratio']:.2f}", f"{line['speed_up']:.2f}"
        gap = f"{line['gap']:.0e}" if "gap" in line else "-"
        table.append((line["network"], cut, *ratios, spread, share, gap, f"{line['cost']:.0f}"))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(machine())
    title = f"a forward pass on {config.batch} images without {config.share:.0%} of the channels"
    print(titled(title, rows(lines), lines))


if __name__ == "__main__":
    main()
