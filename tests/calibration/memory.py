"""A network of 20 million params pruned from a mapped file, run in a process of its own by test_memory."""

import gc
import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxprune as jp

WIDTH, HIDDEN, DEPTH, VOCAB, TOKENS, BATCHES = 512, 2048, 3, 27_000, 8192, 16


def apply_fn(params: Any, tokens: Any) -> Any:
    x = jnp.take(params["embed"], tokens, axis=0).astype(jnp.float32)
    for layer in params["layers"]:
        hidden = jax.nn.relu(x @ jnp.asarray(layer["up"]).astype(jnp.float32).T)
        x = x + hidden @ jnp.asarray(layer["down"]).astype(jnp.float32).T
    return x @ jnp.asarray(params["head"]).astype(jnp.float32)


def mapped(file: str, depth: int) -> Any:
    """Write random params in bfloat16, and return them as views of the mapped file."""
    rng, size = np.random.default_rng(0), WIDTH * HIDDEN
    with open(file, "wb") as out:
        for _ in range(2 * depth + -(-VOCAB // HIDDEN)):
            out.write((rng.random(size, np.float32) - 0.5).astype(ml_dtypes.bfloat16).tobytes())
    flat = np.memmap(file, np.uint8, "r").view(np.ndarray).view(ml_dtypes.bfloat16).reshape(-1, size)
    layers = [
        {"up": flat[2 * n].reshape(HIDDEN, WIDTH), "down": flat[2 * n + 1].reshape(WIDTH, HIDDEN)}
        for n in range(depth)
    ]
    return {
        "layers": layers,
        "embed": flat[2 * depth :].reshape(-1)[: VOCAB * WIDTH].reshape(VOCAB, WIDTH),
        "head": np.ones((WIDTH, 2), np.float32),
    }


def resident(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def run(folder: str) -> None:
    """Print what was resident at most, beyond what was after a run that compiled all programs, in bytes."""
    rng = np.random.default_rng(1)
    batches = list(rng.integers(0, VOCAB, (BATCHES, TOKENS // BATCHES)).astype(np.int32))
    prune = partial(jp.prune_layers, apply_fn, solver=jp.solvers.sparsegpt(), sparsity=0.5)
    prune(mapped(f"{folder}/few", 2), batches)
    params = mapped(f"{folder}/all", DEPTH)
    gc.collect()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # VmHWM counts from here
    before = resident("VmRSS")
    done = prune(params, batches)
    found = {"peak": resident("VmHWM") - before, "layers": len(done.report.rows)}
    del done
    gc.collect()
    found["left"] = sum(array.nbytes for array in jax.live_arrays())
    print(json.dumps(found))


if __name__ == "__main__":
    run(sys.argv[1])
