"""What a call outside `jit` costs: how many programs it compiles, and its CPU time.

    python -m experiments.benchmarks.eager

A network loses half of its channels, chosen globally by their L2 norm, outside of `jit`. A call is measured
after JAX has forgotten all that it compiled, and once more. The time of pruning is also given as multiples of
the time that the same choice takes in numpy, that of the other calls as multiples of tracing the function's
gradient once (`jax.make_jaxpr(jax.grad(...))`), which JAX has forgotten as well. All are CPU times of the
process, medians of rounds in which all calls take turns. `compact` does not verify; `table` counts units.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.benchmarks.graph import ResNet50
from experiments.benchmarks.parts.machine import machine
from experiments.networks.large import ResNet
from experiments.run.limits import OneOf, Range
from experiments.run.settings import Count, Settings, parse
from experiments.show.tables import text
from jaxprune.graph.groups import ChannelGroups
from jaxprune.tree.leaves import array_leaves

NETWORKS = {"resnet50": ResNet50, "resnet20": ResNet, "resnet8": lambda: ResNet(8, widths=(4, 8, 8))}
SHARE = 0.5  # of the channels goes
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Config(Settings):
    """What is measured."""

    network: Annotated[str, OneOf(tuple(NETWORKS))] = "resnet50"
    image: Annotated[int, Range(at_least=8)] = 224  # its height and width
    rounds: Count = 5  # measurements of each call


class Compilations:
    """Counts the programs that JAX compiles in a `with` block."""

    def __enter__(self) -> "Compilations":
        self.number, self._counting = 0, True
        # Public listeners cannot be removed one by one, so this one stays, and stops counting.
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception: object) -> None:
        self._counting = False

    def _listen(self, event: str, duration_secs: float, **details: Any) -> None:
        self.number += self._counting and event == _COMPILED


def choose_in_numpy(groups: ChannelGroups, params: Any, share: float) -> dict[str, np.ndarray]:
    """Choose channels as `prune_once` does by magnitude with `structures.channels`, in plain numpy.

    Returns:
      The masks by path. A unit's score is the mean of the L2 norms of its slices in each weight; the lowest
      units of all groups go, one of each group stays.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in array_leaves(params).items()}
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in leaves.items()}
    scores = {}
    for group in groups.removable():
        norms = []
        for member in group.members:
            if member.path in (group.weights or ()):
                others = tuple(axis for axis in range(len(member.shape)) if axis != member.axis)
                squares = np.square(leaves[member.path]).sum(axis=others)
                norms.append(np.sqrt(squares[member.indices].sum(axis=1)))
        if norms:
            scores[group.name] = np.mean(norms, axis=0)
    names = np.repeat(list(scores), [len(of_group) for of_group in scores.values()])
    units = np.concatenate([np.arange(len(of_group)) for of_group in scores.values()])
    left = {name: len(of_group) for name, of_group in scores.items()}
    to_go = round(share * len(units))
    dropped: dict[str, list[int]] = {name: [] for name in scores}
    for place in np.argsort(np.concatenate(list(scores.values())), kind="stable"):
        name = str(names[place])
        if to_go and left[name] > 1:
            dropped[name].append(int(units[place]))
            left[name] -= 1
            to_go -= 1
    for group in groups.removable():
        for member in group.members:
            if not member.divisor and dropped.get(group.name):
                slices = member.indices[dropped[group.name]].ravel()
                np.moveaxis(masks[member.path], member.axis, 0)[slices] = False
    return masks


def measure(call: Callable[[], Any]) -> tuple[int, float, float]:
    """Return the compilations and the CPU seconds of a first call, and the seconds of a second one."""
    jax.clear_caches()
    with Compilations() as compiled:
        first = _cpu_seconds(call)
    return compiled.number, first, _cpu_seconds(call)


def _cpu_seconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    result = call()
    arrays = [
        leaf for leaf in jax.tree.leaves(getattr(result, "params", result)) if isinstance(leaf, jax.Array)
    ]
    jax.block_until_ready(arrays)
    return time.process_time() - began


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each call."""
    module = NETWORKS[config.network]()
    x = jax.random.normal(jax.random.key(1), (1, config.image, config.image, 3))
    params = jax.jit(module.init)(jax.random.key(0), x)
    apply_fn = module.apply
    groups = jp.channel_groups(apply_fn, params, x)
    structure = jp.structures.channels(groups)

    def prune() -> Any:
        with warnings.catch_warnings():  # one unit of each group stays, which prune_once says
            warnings.simplefilter("ignore", UserWarning)
            return jp.prune_once(params, jp.scores.magnitude, SHARE, structure=structure)

    masks = prune()
    small = jp.compact(apply_fn, params, masks, x, verify=False)

    def traced_gradient() -> Any:
        jax.clear_caches()
        jax.make_jaxpr(jax.grad(lambda params, x: jnp.sum(apply_fn(params, x))))(params, x)

    calls = {
        "channel_groups": lambda: jp.channel_groups(apply_fn, params, x),
        "prune_once": prune,
        "apply_masks": lambda: jp.apply_masks(params, masks),
        "compact": lambda: jp.compact(apply_fn, params, masks, x, verify=False),
        "shrink": lambda: small.shrink(params),
        "expand": lambda: small.expand(small.params),
        "summary": lambda: jp.metrics.summary(apply_fn, params, x, masks=masks),
        "table": lambda: jp.metrics.table(masks, structure=structure),
    }
    baselines = {
        "numpy": lambda: choose_in_numpy(groups, params, SHARE),
        "gradient": traced_gradient,
    }
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in calls}
    seconds: dict[str, list[float]] = {name: [] for name in baselines}
    for _ in range(config.rounds):
        for name, call in baselines.items():
            seconds[name].append(_cpu_seconds(call))
        for name, call in calls.items():
            found[name].append(measure(call))
    lines = []
    for name, rounds in found.items():
        compiled, first, second = (float(np.median(column)) for column in zip(*rounds, strict=True))
        over = "numpy" if name == "prune_once" else "gradient"
        baseline = float(np.median(seconds[over]))
        ratios = {"first_over": first / baseline, "second_over": second / baseline}
        figures = {"compilations": int(compiled), "first": first, "second": second}
        lines.append({"call": name, **figures, "over": over, "baseline": baseline, **ratios})
    return lines


def rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table."""
    table: list[tuple[str, ...]] = [("call", "compiled", "over", "first", "again")]
    for line in lines:
        ratios = (f"{line[name]:.2f}" for name in ("first_over", "second_over"))
        table.append((line["call"], str(line["compilations"]), line["over"], *ratios))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    config = parse(Config, argv, __doc__)
    print(machine())
    print(f"CPU time of calls outside jit, {config.network}, images of {config.image}:")
    lines = run(config)
    print(text(rows(lines)))
    baselines = {line["over"]: line["baseline"] for line in lines}
    ratio = baselines["gradient"] / baselines["numpy"]
    print(f"Tracing the gradient takes {ratio:.1f} times as long as the choice in numpy.")


if __name__ == "__main__":
    main()
