"""The memory that pruning takes beyond the params, as multiples of their bytes.

XLA's own analysis of compiled programs, which nothing has to run for. Programs:

- one-shot: global masks of float32 kernels in 30 uneven leaves, under jit;
- train step: Adam on a perceptron, with donated params and state, and the update of masks inside.

Ways: jaxprune with bool masks (masked), with masks of one bit per entry (packed), the step without
pruning (dense), and what jaxpruner does, restated: one vector of all scores, argsorted (argsort).
Temporaries are what the program needs besides its arguments and results at its worst moment,
gradients included; masks are what it keeps between steps; new is what it returns and was not
given, donated arguments aside. Extra is new and temporaries.

    python -m experiments.benchmarks.memory
    python -m experiments.benchmarks.memory --millions 200
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.benchmarks.parts import jax_steps
from experiments.benchmarks.parts.machine import machine
from experiments.run.limits import Range
from experiments.run.settings import BatchSize, Count, Settings, parse
from experiments.show.tables import titled


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    millions: Annotated[float, Range(above=0, at_most=10_000)] = 20.0  # of params in the one-shot program
    leaves: Count = 30  # of these
    width: BatchSize = 3600  # units of each hidden layer of the train step's network


SMALL = Config(millions=0.02, leaves=3, width=16)


def kernels(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Return kernels of uneven sizes, the largest thirty times the smallest: shapes alone."""
    shares = np.linspace(1, config.leaves, config.leaves)
    sizes = config.millions * 1e6 * shares / shares.sum()
    return {
        f"layer{number:02d}/kernel": jax.ShapeDtypeStruct((round(size / 16) or 1, 16), jnp.float32)
        for number, size in enumerate(sizes)
    }


def argsort_masks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return `jax_steps.argsort_masks` of kernels by path."""
    layers = {name: {"kernel": kernel} for name, kernel in params.items()}
    return jax_steps.argsort_masks(layers, jnp.float32(0.9))


def one_shots() -> dict[str, Callable[[Any], Any]]:
    """Return masks of the params, in each way."""

    def ours(params: Any) -> Any:
        return jp.prune_once(params, jp.scores.magnitude, sparsity=0.9)

    def packed(params: Any) -> Any:
        return jp.pack_masks(ours(params))

    return {"masked": ours, "packed": packed, "argsort": argsort_masks}


def steps() -> dict[str, tuple[Callable, Callable]]:
    """Return `init(params)` and the train step, in each way."""
    adam, schedule = optax.adam(1e-3), jp.schedules.cubic(0.9, begin_step=0, end_step=10_000)
    pruner = jp.pruner(jp.scores.magnitude, schedule, every=jax_steps.EVERY)
    optimizers = {
        "dense": adam,
        "masked": jp.wrap_optax(adam, pruner),
        "packed": jp.wrap_optax(adam, pruner, packed=True),
    }
    ways = {way: (tx.init, jax_steps.train_step(tx)) for way, tx in optimizers.items()}
    return ways | {"argsort": jax_steps.argsort_step(adam, schedule)}


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each program and way, in bytes."""
    lines = []
    params = kernels(config)
    for way, function in one_shots().items():
        masks = jax.eval_shape(function, params)
        lines.append(_line("one-shot", way, params, masks, function, params))
    layers = jax.eval_shape(lambda: jax_steps.init(jax.random.key(0), (784, *[config.width] * 3, 10)))
    x, y = jax.ShapeDtypeStruct((64, 784), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    for way, (begin, step) in steps().items():
        state = jax.eval_shape(begin, layers)
        masks = optax.tree.get(state, "masks", ())
        lines.append(_line("train step", way, layers, masks, step, layers, state, x, y, donate=(0, 1)))
    return lines


def _line(
    program: str, way: str, params: Any, masks: Any, function: Any, *arguments: Any, donate: Any = ()
) -> dict[str, Any]:
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    found: Any = compiled.memory_analysis()
    return {
        "program": program,
        "way": way,
        "params": _bytes(params),
        "masks": _bytes(masks),
        "new": int(found.output_size_in_bytes - found.alias_size_in_bytes),
        "temporaries": int(found.temp_size_in_bytes),
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table: multiples of the params' bytes."""
    table: list[tuple[str, ...]] = [("program", "way", "masks", "new", "temporaries", "extra")]
    for line in lines:
        if "remark" in line:
            continue
        parts = [line["masks"], line["new"], line["temporaries"], line["new"] + line["temporaries"]]
        table.append((line["program"], line["way"], *(f"{part / line['params']:.2f}" for part in parts)))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(machine())
    print(titled("memory beyond the params, as multiples of their bytes", rows(lines), lines))


if __name__ == "__main__":
    main()
