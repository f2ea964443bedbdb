"""XLA's own analysis of the cost of a compiled function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxprune.tracing.jaxprs import abstract, split_static
from jaxprune.tree.checks import check_function


class Cost(NamedTuple):
    """XLA's own analysis of a compiled function; None where the platform gives no figure.

    Attributes:
      flops: operations by XLA's count: two for each multiply-add that reads an input rather than padding, and
        one for most elementwise operations, which `macs` does not count.
      bytes_accessed: bytes read and written by all fused operations.
      peak_memory: the most bytes held at once by arguments, outputs and temporaries.
      arguments, outputs, temporaries: the bytes of each.
    """

    flops: int | None
    bytes_accessed: int | None
    peak_memory: int | None
    arguments: int | None
    outputs: int | None
    temporaries: int | None


def cost(function: Callable[..., Any], *arguments: Any) -> Cost:
    """Compile a function and ask XLA what it costs, to compare with `macs`.

    XLA counts the program after its own optimisations, on the default device: the body of a loop counts
    once, and calls of libraries (oneDNN, cuBLAS) may count nothing.

    Args:
      function: a function of pytrees of arrays.
      *arguments: arrays or `jax.ShapeDtypeStruct`; bools and strings are static.

    Raises:
      TypeError: not a function.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> found = jp.metrics.cost(lambda x, w: x @ w, jnp.ones((5, 3)), jnp.ones((3, 2)))
      >>> found.arguments, found.outputs
      (84, 40)
    """
    check_function(function, "cost", "of arrays")
    arrays, rebuild = split_static(arguments)
    shapes = {name: abstract(leaf) for name, leaf in arrays.items()}
    compiled = jax.jit(lambda arrays: function(*rebuild(arrays))).lower(shapes).compile()
    analysis = compiled.cost_analysis() or {}
    if isinstance(analysis, list):  # one for each program on some platforms
        analysis = analysis[0]
    memory = compiled.memory_analysis()

    def number(found: Any) -> int | None:
        return None if found is None else int(found)

    return Cost(
        number(analysis.get("flops")),
        number(analysis.get("bytes accessed")),
        *(
            number(getattr(memory, name, None))
            for name in (
                "peak_memory_in_bytes",
                "argument_size_in_bytes",
                "output_size_in_bytes",
                "temp_size_in_bytes",
            )
        ),
    )
