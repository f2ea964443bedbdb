"""What pruning a trained decoder by calibration costs beside its parts, and beside PyTorch.

    python -m experiments.benchmarks.calibration
    python -m experiments.benchmarks.calibration --peer mine.py

`prune_layers` with SparseGPT prunes half of a decoder with random weights, layer by layer. The parts alone
are compiled programs one after another: the network on all batches, the Gram matrices of what its layers
read, and one factorisation of each. Queries, keys and values share one Gram matrix.

PyTorch is the paper's loop in `peers/torch_sparsegpt.py`, in a process of its own with as many threads; it is
left out where torch is not installed. A peer is a Python file with a class Peer that is made and called as
TorchDecoder there.

All take turns, compiled before. Figures are medians of the ratios within a round, with the least and the
most. Compiling takes place in the first run, and its seconds are said below.
"""

import contextlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxprune as jp
from experiments.benchmarks.parts.turns import Worker
from experiments.run.settings import Count, File, Settings, parse
from jaxprune.calibration.solvers.factors import damped_factor

SPARSITY, VOCABULARY, HEAD = 0.5, 256, 64


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    width: Count = 512  # of the decoder, a multiple of 64
    layers: Count = 4
    batches: Count = 16
    length: Count = 512  # tokens of each batch
    rounds: Count = 5  # in which all take their turn
    peer: File | None = None  # a Python file with another implementation


SMALL = Config(width=64, layers=2, batches=2, length=16, rounds=1)


def make_params(config: Config) -> dict[str, Any]:
    """Return the weights of a decoder, in numpy."""
    rng, width = np.random.default_rng(0), config.width

    def kernel(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))

    shapes = dict.fromkeys(("q", "k", "v", "out"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    layers = [{name: kernel(*shape) for name, shape in shapes.items()} for _ in range(config.layers)]
    return {"embed": kernel(VOCABULARY, width), "layers": layers, "head": kernel(width, VOCABULARY)}


def forward(params: Any, tokens: jax.Array) -> jax.Array:
    """Return the logits of a decoder."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        y = _norm(x)
        split = (*x.shape[:2], -1, HEAD)
        q, k, v = (jnp.reshape(y @ layer[name], split) for name in "qkv")
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / np.float32(np.sqrt(HEAD))
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        y = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), v)
        x = x + y.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(_norm(x) @ layer["up"]) @ layer["down"]
    return x @ params["head"]


def _norm(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-5))


def make_parts(config: Config, params: Any, batches: Sequence[jax.Array]) -> dict[str, Callable[[], Any]]:
    """Return the forward passes, the Gram products and the factorisations, each as a function."""
    apply = jax.jit(forward)
    keys = jax.random.split(jax.random.key(0), 2)
    # By width, how many Gram matrices a block has: of q, k and v together, of out and of up; of down.
    widths = {config.width: 3, 4 * config.width: 1}
    rows = {
        width: jax.random.normal(key, (config.length, width)) for key, width in zip(keys, widths, strict=True)
    }
    add = jax.jit(lambda total, x: total + jnp.matmul(x.T, x, precision="highest"))
    factor = jax.jit(lambda gram: damped_factor(gram[None], 0.01))
    made = {width: add(jnp.eye(width), x) for width, x in rows.items()}

    def forwards() -> None:
        for batch in batches:
            jax.block_until_ready(apply(params, batch))

    def grams() -> None:
        for width, times in widths.items():
            for _ in range(times * config.layers):
                total = jnp.zeros((width, width))
                for _ in batches:
                    total = add(total, rows[width])
                jax.block_until_ready(total)

    def factors() -> None:
        for width, times in widths.items():
            for _ in range(times * config.layers):
                jax.block_until_ready(factor(made[width]))

    return {"forward passes": forwards, "Gram products": grams, "factorisations": factors}


class FromFile:
    """An implementation from a Python file, in a worker process."""

    def __init__(self, file: str, settings: dict[str, Any]):
        """Make its `Peer`."""
        spec = importlib.util.spec_from_file_location("peer", file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{file} is no Python file.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.peer = module.Peer(**settings)

    def prune(self) -> float:
        """Return the seconds that it takes."""
        return self.peer.prune()


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run(config: Config) -> list[str]:
    """Return the table's lines."""
    host = make_params(config)
    rng = np.random.default_rng(1)
    tokens = [rng.integers(0, VOCABULARY, (1, config.length)) for _ in range(config.batches)]
    params = jax.tree.map(jnp.asarray, host)
    batches = [jnp.asarray(each, jnp.int32) for each in tokens]

    def prune() -> None:
        done = jp.prune_layers(forward, params, batches, jp.solvers.sparsegpt(), sparsity=SPARSITY)
        jax.block_until_ready(done.params)

    parts = make_parts(config, params, batches)
    first = _seconds(prune)
    for part in parts.values():
        part()
    settings = {
        "params": host,
        "batches": tokens,
        "heads": config.width // HEAD,
        "sparsity": SPARSITY,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    times: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        peers: dict[str, Any] = {}
        if importlib.util.find_spec("torch"):
            target = "experiments.benchmarks.peers.torch_sparsegpt:TorchDecoder"
            peers["PyTorch"] = stack.enter_context(Worker(target, **settings))
        if config.peer is not None:
            target = "experiments.benchmarks.calibration:FromFile"
            peers["peer"] = stack.enter_context(Worker(target, file=str(config.peer), settings=settings))
        for number in range(config.rounds + 1):
            now = {"prune_layers": _seconds(prune)} | {name: _seconds(part) for name, part in parts.items()}
            now |= {name: peer("prune") for name, peer in peers.items()}
            if number:  # a round to warm up
                for name, value in now.items():
                    times.setdefault(name, []).append(value)
    times["the parts together"] = [sum(each) for each in zip(*(times[name] for name in parts), strict=True)]
    lines = [f"{'':<32}{'time of prune_layers over its':>32}"]
    for name in ("the parts together", *parts, *peers):
        ratios = [a / b for a, b in zip(times["prune_layers"], times[name], strict=True)]
        cell = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"{name:<32}{cell:>32}")
    lines.append("")
    again = statistics.median(times["prune_layers"])
    lines.append(f"The first run takes {first - again:.1f} s more, compiling; later runs {again:.1f} s.")
    if "PyTorch" not in peers:
        lines.append("PyTorch is not installed, and is left out.")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    config = parse(Config, argv, __doc__)
    for line in run(config):
        print(line, flush=True)


if __name__ == "__main__":
    main()
