"""How many Python functions of jaxprune a call of it runs, and in how many of its files.

    python -m experiments.benchmarks.python_calls

Counted are the `call` events of `sys.setprofile` whose code lies in the package: functions, lambdas and
comprehensions as Python runs them, and a generator expression each time that it is entered or resumed. Beside
it stand those of named functions alone, which are what a reader steps through, and how many functions and
files were visited. The counts are exact. They differ with the version of Python, which runs comprehensions as
functions before 3.12, and with that of JAX. Each call is made once before it is counted; before it is traced
again, JAX forgets its traces.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.run.limits import Range
from experiments.run.settings import Count, Settings, parse

PACKAGE = os.path.dirname(os.path.abspath(jp.__file__)) + os.sep


@dataclass(frozen=True)
class Config(Settings):
    """What is counted."""

    leaves: Count = 8  # leaves of the params that are pruned
    width: Annotated[int, Range(at_least=2)] = 16  # of each leaf, which is square, and of the MLP


class Calls(NamedTuple):
    """What one call ran.

    Attributes:
      calls: all calls of the package's code.
      named: those of functions with names, neither lambdas nor comprehensions.
      functions: how many different ones.
      files: how many files they lie in.
    """

    calls: int
    named: int
    functions: int
    files: int


def count(function: Callable[[], Any]) -> Calls:
    """The calls of the package's code that a function makes."""
    codes: Counter[Any] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            codes[frame.f_code] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return Calls(
        calls=sum(codes.values()),
        named=sum(number for code, number in codes.items() if not code.co_name.startswith("<")),
        functions=len(codes),
        files=len({code.co_filename for code in codes}),
    )


def warm(function: Callable[[], Any]) -> Calls:
    """The same of a second call, as JAX finds it in its caches."""
    function()
    return count(function)


def traced(function: Callable[..., Any], *arguments: Any) -> Calls:
    """The same of tracing a function for the second time, of which JAX remembers nothing."""
    # New functions each time, because jax keeps what it traced by function.
    jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments)
    jax.clear_caches()
    return count(lambda: jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments))


def run(config: Config) -> dict[str, Calls]:
    """The counts, by what is called."""
    draw, width = np.random.RandomState(0), config.width

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    params = {f"w{number}": leaf(width, width) for number in range(config.leaves)}

    def prune(params: Any) -> Any:
        return jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)

    schedule = jp.schedules.cubic(0.5, begin_step=0, end_step=100)
    optimizer = jp.wrap_optax(optax.adam(1e-3), jp.pruner(jp.scores.magnitude, schedule, every=10))
    state = optimizer.init(params)

    mlp = {"hidden": leaf(width, width), "out": leaf(width, width)}
    x = jnp.ones((1, width))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["hidden"]) @ params["out"]

    structure = jp.structures.channels(jp.channel_groups(apply, mlp, x))
    masks = jp.prune_once(mlp, jp.scores.magnitude, sparsity=0.5, structure=structure)
    return {
        f"prune_once of {config.leaves} leaves": warm(lambda: prune(params)),
        f"prune_once of {config.leaves} leaves, traced": traced(prune, params),
        f"wrap_optax(adam).update of {config.leaves} leaves, traced": traced(
            optimizer.update, params, state, params
        ),
        "compact of an MLP of two layers": warm(lambda: jp.compact(apply, mlp, masks, x)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the counts."""
    config = parse(Config, argv, __doc__)
    print(f"{'':<45}{'calls':>8}{'named':>8}{'functions':>11}{'files':>7}")
    for name, found in run(config).items():
        print(f"{name:<45}{found.calls:>8,}{found.named:>8,}{found.functions:>11,}{found.files:>7,}")


if __name__ == "__main__":
    main()
