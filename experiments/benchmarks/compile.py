"""What compiling costs: the time to trace, lower and compile a train step that prunes, over the dense step's.

The network is a transformer decoder in plain JAX, each layer with attention to itself and to a memory, 10
kernels in 6 shapes. It is trained with Adam. Ways, each in a process of its own, which has compiled nothing
before:

- keep_masked: fixed masks;
- wrap_optax: masks that follow a schedule, global and layerwise;
- jit(prune_once): masks alone, and layerwise;
- prune_once: the same without jit, on its first call, which runs it as well.

    python -m experiments.benchmarks.compile
    python -m experiments.benchmarks.compile --kernels 120,480 --rounds 3

Times are CPU time of the process, which other work on the machine changes least. Figures are medians over
rounds, in each of which every way is measured once. "per kernel" is the time over the number of kernels, as a
multiple of the first dense step's. "lines" are those of StableHLO in the lowered program, per kernel.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.benchmarks.parts.machine import machine
from experiments.run.limits import Range
from experiments.run.settings import Count, Settings, parse
from experiments.show.tables import titled

KERNELS_IN_LAYER = 10
EXAMPLES, WORDS, WIDTH, MEMORY_WIDTH, HEADS, HEAD_WIDTH = 2, 8, 32, 24, 4, 8


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    # of the network, 10 in each layer; the ways are measured for each of these numbers
    kernels: tuple[Annotated[int, Range(at_least=10)], ...] = (120,)
    rounds: Count = 5  # in which each way is measured once


SMALL = Config(kernels=(10,), rounds=1)


def network(layers: int) -> dict[str, Any]:
    """Return the params of a decoder: kernels in 6 shapes, and scales of norms."""
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.asarray(rng.standard_normal(shape, np.float32) / 8)}

    def attention(source: int) -> dict[str, Any]:
        return {
            "query": kernel(WIDTH, HEADS, HEAD_WIDTH),
            "key": kernel(source, HEADS, HEAD_WIDTH),
            "value": kernel(source, HEADS, HEAD_WIDTH),
            "out": kernel(HEADS, HEAD_WIDTH, WIDTH),
        }

    def layer() -> dict[str, Any]:
        feed_forward = {"up": kernel(WIDTH, 4 * WIDTH), "down": kernel(4 * WIDTH, WIDTH)}
        norms = {f"norm{number}": {"scale": jnp.ones(WIDTH)} for number in range(3)}
        return {"attend": attention(WIDTH), "read": attention(MEMORY_WIDTH), **feed_forward, **norms}

    return {f"layer{number}": layer() for number in range(layers)}


def apply(params: Any, x: jax.Array, memory: jax.Array) -> jax.Array:
    """Run the decoder: x (examples, words, width), memory (examples, words, memory width) -> like x."""

    def attend(p: Any, x: jax.Array, source: jax.Array) -> jax.Array:
        query = jnp.einsum("bqd,dhk->bhqk", x, p["query"]["kernel"])
        key = jnp.einsum("bsd,dhk->bhsk", source, p["key"]["kernel"])
        value = jnp.einsum("bsd,dhk->bhsk", source, p["value"]["kernel"])
        shares = jax.nn.softmax(jnp.einsum("bhqk,bhsk->bhqs", query, key) / HEAD_WIDTH**0.5)
        return jnp.einsum("bhqs,bhsk,hkd->bqd", shares, value, p["out"]["kernel"])

    for p in params.values():
        norms = [p[f"norm{number}"]["scale"] for number in range(3)]
        y = norms[0] * jax.nn.standardize(x)
        x = x + attend(p["attend"], y, y)
        x = x + attend(p["read"], norms[1] * jax.nn.standardize(x), memory)
        y = norms[2] * jax.nn.standardize(x)
        x = x + jax.nn.gelu(y @ p["up"]["kernel"]) @ p["down"]["kernel"]
    return x


def step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Return a train step."""

    def run(params: Any, opt_state: Any, x: jax.Array, memory: jax.Array) -> Any:
        grads = jax.grad(lambda params: jnp.mean(apply(params, x, memory) ** 2))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return run


def _pruner(scope: str) -> jp.Pruner:
    schedule = jp.schedules.cubic(0.9, begin_step=10, end_step=100)
    return jp.pruner(jp.scores.magnitude, schedule, every=5, scope=scope)


def _prune(scope: str) -> Callable[[Any], Any]:
    return lambda params: jp.prune_once(params, jp.scores.magnitude, sparsity=0.9, scope=scope)


ADAM = optax.adam(1e-3)
STEPS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "dense": lambda params: ADAM,
    "keep_masked": lambda params: jp.keep_masked(ADAM, jp.ones_masks(params)),
    "wrap_optax": lambda params: jp.wrap_optax(ADAM, _pruner("global")),
    "wrap_optax, layerwise": lambda params: jp.wrap_optax(ADAM, _pruner("layerwise")),
}
PRUNINGS = {"jit(prune_once)": "global", "jit(prune_once), layerwise": "layerwise"}
EAGER = {"prune_once": "global", "prune_once, layerwise": "layerwise"}
WAYS = (*STEPS, *PRUNINGS, *EAGER)


def measure(way: str, kernels: int) -> dict[str, Any]:
    """Return the CPU seconds that a way takes in this process, and the lines of its program."""
    params = network(kernels // KERNELS_IN_LAYER)
    if way in EAGER:
        begin = time.process_time()
        jax.block_until_ready(_prune(EAGER[way])(params))
        return {"way": way, "seconds": time.process_time() - begin, "lines": None}
    if way in STEPS:
        optimizer = STEPS[way](params)
        x, memory = (jnp.ones((EXAMPLES, WORDS, width)) for width in (WIDTH, MEMORY_WIDTH))
        function, args = step(optimizer), (params, optimizer.init(params), x, memory)
    else:
        function, args = _prune(PRUNINGS[way]), (params,)
    begin = time.process_time()
    lowered = jax.jit(function).lower(*args)
    lowered.compile()
    seconds = time.process_time() - begin
    return {"way": way, "seconds": seconds, "lines": lowered.as_text().count("\n")}


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each number of kernels and each way."""
    # A new process for each measurement, so that nothing is compiled or traced before.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        measured = {
            kernels: [
                {way: pool.submit(measure, way, kernels).result() for way in WAYS}
                for _ in range(config.rounds)
            ]
            for kernels in config.kernels
        }
    return [line for kernels, rounds in measured.items() for line in summarise(kernels, rounds)]


def summarise(kernels: int, rounds: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a line for each way: its time over that of the dense step, from what each round measured."""
    lines = []
    for way in rounds[0]:
        ratios = [one[way]["seconds"] / one["dense"]["seconds"] for one in rounds]
        line = {
            "way": way,
            "kernels": kernels,
            "over_dense": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "seconds": statistics.median(one[way]["seconds"] for one in rounds),
            "lines": rounds[0][way]["lines"],
        }
        lines.append(line)
    return lines


def rows(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table: a row for each number of kernels and each way."""
    table = [["", "kernels", "x dense", "(least-most)", "per kernel", "lines"]]
    dense = lines[0]["seconds"] / lines[0]["kernels"]
    for line in lines:
        cells = [line["way"], f"{line['kernels']}", f"{line['over_dense']:.2f}"]
        cells.append(f"({line['least']:.2f}-{line['most']:.2f})")
        cells.append(f"{line['seconds'] / line['kernels'] / dense:.2f}")
        cells.append("" if line["lines"] is None else f"{line['lines'] / line['kernels']:.0f}")
        table.append(cells)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(machine(), end="\n\n")
    title = "CPU time to trace, lower and compile a step of kernels in 6 shapes"
    print(titled(title, rows(lines), lines))


if __name__ == "__main__":
    main()
