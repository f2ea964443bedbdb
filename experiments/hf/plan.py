"""What pruning a decoder layer by layer takes: arithmetic and memory, counted from its sizes."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.hf.llama import LLAMA, LlamaConfig
from jaxprune.calibration.solvers.factors import damped_factor


def _sizes(width: int, hidden: int, layers: int, key_heads: int, vocab: int) -> LlamaConfig:
    return LLAMA.configure(
        {
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 128,
            "num_key_value_heads": key_heads,
            "vocab_size": vocab,
        }
    )


LARGER = {"7B": _sizes(4096, 11008, 32, 32, 32000), "70B": _sizes(8192, 28672, 80, 8, 32000)}
"""Llama 2."""

LARGER_WINDOWS, LARGER_LENGTH = 128, 2048
"""The calibration set that is usual for them."""


class Product(NamedTuple):
    """A product of a block.

    Attributes:
      name: of the leaf.
      outputs, inputs: of its matrix.
      reads_anew: whether no product before it reads the same rows.
    """

    name: str
    outputs: int
    inputs: int
    reads_anew: bool


def products(config: LlamaConfig) -> list[Product]:
    """Return the products of a block."""
    queries, keys = config.heads * config.head, config.key_heads * config.head
    return [
        Product("query", queries, config.width, True),
        Product("key", keys, config.width, False),
        Product("value", keys, config.width, False),
        Product("out", config.width, queries, True),
        Product("gate", config.hidden, config.width, True),
        Product("up", config.hidden, config.width, False),
        Product("down", config.width, config.hidden, True),
    ]


def work(config: LlamaConfig, tokens: int) -> dict[str, float]:
    """Return the floating-point operations of SparseGPT on all layers, by what they are for.

    A Gram matrix takes 2 n^2 a token; a Cholesky factor n^3 / 3, and each product makes two, to find out the
    damping and in the solver; the sweep m n^2 for m outputs; and the two errors in the report three products
    of 2 m n^2.
    """
    each = products(config)
    of_block = {
        "forward": sum(2.0 * p.outputs * p.inputs * tokens for p in each),
        "Gram": sum(2.0 * p.inputs**2 * tokens for p in each if p.reads_anew),
        "factor": sum(2 * p.inputs**3 / 3 for p in each),
        "sweep": sum(1.0 * p.outputs * p.inputs**2 for p in each),
        "errors": sum(6.0 * p.outputs * p.inputs**2 for p in each),
    }
    return {name: config.depth * operations for name, operations in of_block.items()}


class Bytes(NamedTuple):
    """Memory, in bytes.

    Attributes:
      block: the weights of a block, in float32.
      gram: the largest Gram matrix and its factor, in float32.
      activations: what lies between two products at most, for all tokens: the residual stream, and the hidden
        units of an FFN.
      network: all weights as they lie in the file, in bfloat16.
      result: the pruned weights, and masks of one byte for each weight that a product reads.
    """

    block: int
    gram: int
    activations: int
    network: int
    result: int

    @property
    def working(self) -> int:
        """What the layer that is being solved needs, beside the network and the result."""
        return self.block + self.gram + self.activations


def memory(config: LlamaConfig, tokens: int) -> Bytes:
    """Return what pruning a decoder holds."""
    each = products(config)
    in_block = sum(p.outputs * p.inputs for p in each)
    every = sum(math.prod(shape) for shape in LLAMA.shapes(config).values())
    return Bytes(
        block=4 * in_block,
        gram=2 * 4 * max(p.inputs for p in each) ** 2,
        activations=4 * tokens * (config.width + config.hidden),
        network=2 * every,
        result=3 * in_block * config.depth,
    )


def rates(config: LlamaConfig, tokens: int) -> dict[str, float]:
    """Measure floating-point operations per second here, on matrices of the sizes of the FFN."""
    rng, tokens = np.random.default_rng(0), min(tokens, 2048)
    rows = jnp.asarray(rng.standard_normal((tokens, config.hidden), np.float32))
    weight = jnp.asarray(rng.standard_normal((1, config.width, config.hidden), np.float32))
    inputs, outputs = config.hidden, config.width
    count = jnp.asarray([inputs * outputs // 2], jnp.int32)
    solver, pattern = jp.solvers.sparsegpt(), jp.solvers.Pattern()
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    gram = product(rows.T, rows)[None]
    factor = _seconds(jax.jit(lambda gram: damped_factor(gram, 0.01)[0]), gram)
    solved = _seconds(jax.jit(lambda w, h, c: solver(w, h, c, pattern)), weight, gram, count)
    errors = _seconds(product, weight[0], gram[0])
    return {
        "forward": 2 * tokens * inputs * outputs / _seconds(product, rows, weight[0].T),
        "Gram": 2 * tokens * inputs**2 / _seconds(product, rows.T, rows),
        "factor": inputs**3 / 3 / factor,
        # The solver factorises as well, and the clock of a small matrix is coarse.
        "sweep": outputs * inputs**2 / max(solved - factor, solved / 10),
        "errors": 2 * outputs * inputs**2 / errors,
    }


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the shortest of three times, after one call that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def table(
    name: str, config: LlamaConfig, tokens: int, measured: Mapping[str, float], overhead: float
) -> list[tuple[str, ...]]:
    """Return rows of what this network and larger ones take, the header first.

    Args:
      name: of this network.
      config: its sizes.
      tokens: of its calibration set; larger ones are given 128 x 2,048.
      measured: operations per second, from `rates`.
      overhead: how much more than `Bytes.working` this network took.
    """
    every = {f"{name}, {tokens:,} tokens": (config, tokens)}
    more = LARGER_WINDOWS * LARGER_LENGTH
    every |= {f"{size}, {more:,} tokens": (larger, more) for size, larger in LARGER.items()}
    columns = [_column(*each, measured, overhead) for each in every.values()]
    own = columns[0]["seconds"]
    header = ("", *every)
    labels = [label for label in columns[0] if label != "seconds"]
    rows = [(label, *(str(column[label]) for column in columns)) for label in labels]
    return [
        header,
        *rows,
        ("time here, relative to the first", *(f"{c['seconds'] / own:.3g}" for c in columns)),
    ]


def _column(
    config: LlamaConfig, tokens: int, measured: Mapping[str, float], overhead: float
) -> dict[str, Any]:
    operations, held = work(config, tokens), memory(config, tokens)
    seconds = {name: operations[name] / measured[name] for name in operations}
    total = sum(seconds.values())
    return {
        "weights of a block, float32, GB": f"{held.block / 1e9:.2f}",
        "largest H and its factor, GB": f"{held.gram / 1e9:.2f}",
        "activations between two products, GB": f"{held.activations / 1e9:.2f}",
        "so a layer needs on the device, GB": f"{overhead * held.working / 1e9:.2f}",
        "the network in bfloat16, mapped, GB": f"{held.network / 1e9:.2f}",
        "the result with masks, on the host, GB": f"{held.result / 1e9:.2f}",
        **{
            f"PFLOP of {name} (share of time)": f"{each / 1e15:.2g} ({seconds[name] / total:.0%})"
            for name, each in operations.items()
        },
        "seconds": total,
    }
