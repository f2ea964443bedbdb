"""The memory that `recover` takes, block by block and whole, as the system counts it.

A residual network of equal blocks lies in mapped files, with random masks, and is tuned for a few steps. The
peak is that of the resident memory (VmHWM), above what was resident after a warm-up with a narrow network.

    python -m tests.calibration.recover_memory block
    python -m tests.calibration.recover_memory whole
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp

WIDTH, HIDDEN, DEPTH, ROWS, BATCHES = 512, 1024, 10, 64, 6
RESULT = 4 * DEPTH * 2 * WIDTH * HIDDEN  # bytes
BLOCK = 4 * 2 * WIDTH * HIDDEN
ACTIVATIONS = 4 * BATCHES * ROWS * WIDTH  # of all batches, between two blocks

# Each array is then a mapping of its own, which counts only as long as it lives. The C library reads these
# once, when a process starts.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def resident(kind: str) -> int:
    """Return the resident memory in bytes: now (VmRSS), or the most so far (VmHWM)."""
    return int(re.findall(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def network(params, x):
    """Return the outputs of all blocks."""
    for block in params:
        x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    return x


def mapped(folder: Path, name: str, *shape: int) -> np.ndarray:
    """Return random weights that lie in a file."""
    weights = np.random.default_rng(0).standard_normal(shape, np.float32) / shape[0] ** 0.5
    np.save(folder / f"{name}.npy", weights)
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def tune(folder: Path, width: int, hidden: int, by_block: bool):
    """Return a call of `recover`."""
    params = [
        {"up": mapped(folder, f"up{n}", width, hidden), "down": mapped(folder, f"down{n}", hidden, width)}
        for n in range(DEPTH)
    ]
    masks = jax.tree.map(lambda leaf: np.random.default_rng(1).random(leaf.shape) < 0.5, params)
    rows = np.random.default_rng(2).standard_normal((BATCHES, ROWS, width), np.float32)
    for leaf in jax.tree.leaves(params):
        np.sum(leaf)  # so that its pages are resident before
    return lambda: jp.recover(
        network,
        params,
        masks,
        list(rows),
        optax.adam(1e-4),
        teacher=params,
        steps=4,
        every=2,
        by_block=by_block,
    )


def main(by_block: bool) -> None:
    """Print the peak, and what it is made of, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tune(Path(folder), 32, 64, by_block)()
        work = tune(Path(folder), WIDTH, HIDDEN, by_block)
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
        before = resident("VmRSS")
        done = work()
        report = {
            "peak": resident("VmHWM") - before,
            "result": RESULT,
            "block": BLOCK,
            "activations": ACTIVATIONS,
        }
        print(json.dumps(report | {"better": done.report.after < done.report.before}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=["block", "whole"])
    way = parser.parse_args().way
    if not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
    main(way == "block")
