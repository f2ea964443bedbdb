"""The time of choosing global masks, as a multiple of reading the scores once.

Kernels of 30 uneven leaves are pruned by magnitude. One reading is jnp.sum(jnp.abs(leaf)) of each.
Ways, each to masks, under jit where JAX makes them:

- jaxprune: prune_once, global; in bfloat16; with masks to start from; and layerwise;
- argsort: what jaxpruner does, restated: one vector of all scores, argsorted;
- sort: the threshold by jnp.sort of that vector;
- histogram: no masks, but a single pass of 2,048 bins by scatter, of the several it would take;
- numpy.partition: the threshold, of a vector on the host;
- torch: torch.nn.utils.prune.global_unstructured, and torch.topk; left out where PyTorch is not
  installed.

    python -m experiments.benchmarks.selection
    python -m experiments.benchmarks.selection --millions 200

The contenders take turns, round after round, PyTorch in a process of its own. Figures are medians of
the ratios within a round, with their quartiles. jaxprune's masks are compared with numpy's argsort,
entry by entry, first.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.benchmarks.parts.jax_steps import argsort_masks
from experiments.benchmarks.parts.machine import NO_TORCH, TORCH, machine
from experiments.benchmarks.parts.turns import Worker
from experiments.run.limits import Range
from experiments.run.settings import Count, Natural, Settings, Sparsity, parse
from experiments.show.tables import titled

READ = "read once"
RIVALS = ("torch global_unstructured", "torch.topk")


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    millions: Annotated[float, Range(above=0, at_most=10_000)] = 20.0  # of params
    leaves: Count = 30  # of these, the largest thirty times the smallest
    sparsity: Sparsity = 0.9  # of the masks
    rounds: Count = 7  # in which each way has one turn
    device_only: bool = False  # leave out numpy's partition and check, which take long for many params
    seed: Natural = 0  # of the params


SMALL = Config(millions=0.02, leaves=3, rounds=2)


def shapes(config: Config) -> list[tuple[int, int]]:
    """Return the leaves' shapes, about square."""
    shares = np.linspace(1, config.leaves, config.leaves)
    sides = np.sqrt(config.millions * 1e6 * shares / shares.sum())
    return [(round(side), round(side)) for side in sides]


def ways(sparsity: float) -> dict[str, Callable[[Any], Any]]:
    """Return each way: a function of kernels by path to masks, or to what the module says above."""

    def prune(params: Any, **how: Any) -> Any:
        return jp.prune_once(params, jp.scores.magnitude, sparsity=sparsity, **how)

    def joined(params: Any) -> jax.Array:
        return jnp.concatenate([jnp.abs(leaf).ravel() for leaf in params.values()])

    def by_sort(params: Any) -> Any:
        scores = joined(params)
        least = jnp.sort(scores)[round(sparsity * scores.size)]
        return {name: jnp.abs(leaf) >= least for name, leaf in params.items()}

    def histogram(params: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(joined(params), jnp.int32)
        return jnp.zeros(2048, jnp.int32).at[bits >> 20].add(1)

    def argsort(params: Any) -> Any:
        layers = {name: {"kernel": leaf} for name, leaf in params.items()}
        return argsort_masks(layers, jnp.float32(sparsity))

    return {
        READ: lambda params: sum(jnp.sum(jnp.abs(leaf)) for leaf in params.values()),
        "jaxprune": prune,
        "jaxprune, bfloat16": prune,
        "jaxprune, from masks": lambda params: prune(params, masks=jax.tree.map(lambda p: p > -1, params)),
        "jaxprune, layerwise": lambda params: prune(params, scope="layerwise"),
        "argsort": argsort,
        "sort": by_sort,
        "histogram": histogram,
    }


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each way: the ratios of its times to those of one reading."""
    rng = np.random.default_rng(config.seed)
    drawn = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes(config)]
    params = {f"layer{i:02d}/kernel": jnp.asarray(leaf) for i, leaf in enumerate(drawn)}
    host = np.abs(np.concatenate([leaf.ravel() for leaf in drawn]))
    count, memory = round(config.sparsity * host.size), {}
    calls: dict[str, Callable[[], Any]] = {}
    for way, function in ways(config.sparsity).items():
        given = params
        if way.endswith("bfloat16"):
            given = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
        compiled = jax.jit(function).lower(given).compile()
        found: Any = compiled.memory_analysis()
        memory[way] = found.temp_size_in_bytes / (4 * host.size)
        calls[way] = lambda compiled=compiled, given=given: jax.block_until_ready(compiled(given))
    if not config.device_only:
        _check(calls["jaxprune"](), host, count)
        calls["numpy.partition"] = lambda: np.partition(host, count)
    times: dict[str, list[float]] = {way: [] for way in calls}
    with ExitStack() as stack:
        theirs: Any = None
        if TORCH:
            target = "experiments.benchmarks.peers.torch_selection:TorchSelection"
            settings = {"shapes": shapes(config), "seed": config.seed, "sparsity": config.sparsity}
            theirs = stack.enter_context(Worker(target, **settings))
            times |= {way: [] for way in RIVALS}
        for _ in range(config.rounds + 1):
            for way, call in calls.items():
                began = time.perf_counter()
                call()
                times[way].append(time.perf_counter() - began)
            if TORCH:
                for way in RIVALS:
                    times[way].append(theirs("seconds", way))
    # The first round warms up.
    ratios = {way: [t / r for t, r in zip(ts, times[READ], strict=True)][1:] for way, ts in times.items()}
    lines: list[dict[str, Any]] = [
        {"way": way, "ratios": values, "temporaries": memory.get(way)} for way, values in ratios.items()
    ]
    ours = np.array(ratios["jaxprune"])
    rivals = {
        way: float(np.median(np.array(ratios[way]) / ours)) for way in ("argsort", *RIVALS) if way in ratios
    }
    faster = ", ".join(f"{ratio:.0f} x as fast as {way}" for way, ratio in rivals.items())
    exact = f"jaxprune's masks are numpy's, all {host.size:,} entries."
    if config.device_only:
        exact = f"Masks of {host.size:,} entries, not compared with numpy's."
    lines.append({"remark": f"{exact}\nIt is {faster}."})
    if not TORCH:
        lines.append({"remark": NO_TORCH})
    return lines


def _check(masks: Any, scores: np.ndarray, count: int) -> None:
    """Compare masks with a stable argsort. Raises RuntimeError."""
    expected = np.ones(scores.size, bool)
    expected[np.argsort(scores, kind="stable")[:count]] = False
    got = np.concatenate([np.asarray(mask).ravel() for mask in masks.values()])
    if not np.array_equal(got, expected):
        raise RuntimeError(
            f"{int((got != expected).sum())} of {scores.size} entries differ from numpy's argsort."
        )


def rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table: multiples of one reading, and temporaries as multiples of the params' bytes."""
    table: list[tuple[str, ...]] = [("way", "x read", "(quartiles)", "temporaries")]
    for line in lines:
        if "remark" not in line:
            low, middle, high = np.percentile(line["ratios"], [25, 50, 75])
            used = "-" if line["temporaries"] is None else f"{line['temporaries']:.2f}"
            table.append((line["way"], f"{middle:.1f}", f"({low:.1f}-{high:.1f})", used))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(machine())
    title = f"{config.sparsity:.0%} of {config.millions:g} M params in {config.leaves} leaves pruned"
    print(titled(title, rows(lines), lines))


if __name__ == "__main__":
    main()
