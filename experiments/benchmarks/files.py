"""How large files of pruned networks are, and how long they take.

Weights are pruned at random places, the worst case for any code of where they are. Sizes and times are
ratios to the dense network's safetensors file, times of the same rounds. `bound` is what the kept values
and the entropy of their places take, below which no file can be.

    python -m experiments.benchmarks.files
    python -m experiments.benchmarks.files --export    # also of LeNet, exported: needs jaxprune[onnx]
"""

import io
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.networks.small import LeNet
from experiments.run.limits import Range
from experiments.run.settings import Count, Settings, Sparsity, parse
from experiments.show import tables


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    millions: Annotated[float, Range(above=0, at_most=10_000)] = 16.0  # millions of float32 params
    sparsities: tuple[Sparsity, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)  # of the params, one file each
    rounds: Count = 5  # how often each file is written and read, in turn; the ratio is of the medians
    export: bool = False  # also the sizes of LeNet, dense, masked and compacted, in each format


def numpy_bytes(params: Any) -> int:
    """Return the bytes of a compressed numpy file."""
    file = io.BytesIO()
    np.savez_compressed(file, **dict(zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True)))
    return file.tell()


def bound(sparsity: float) -> float:
    """Return the least share of a float32 file: the kept values, and the entropy of their places."""
    places = sum(-p * math.log2(p) for p in (sparsity, 1 - sparsity) if p)
    return 1 - sparsity + places / 32


def run(config: Config) -> list[dict[str, float]]:
    """Return a dict of ratios for each sparsity."""
    width = max(8, round(math.sqrt(config.millions * 1e6 / 4)))
    rng = np.random.default_rng(0)
    params = {
        f"layer{n}": {
            "kernel": rng.standard_normal((width, width), np.float32),
            "bias": np.ones(width, np.float32),
        }
        for n in range(4)
    }
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        file, dense_file = Path(folder) / "params", Path(folder) / "params.safetensors"
        dense = jp.io.save_safetensors(dense_file, params)
        for sparsity in config.sparsities:
            masks = {
                name: {"kernel": _mask(rng, (width, width), sparsity), "bias": np.ones(width, bool)}
                for name in params
            }
            pruned = jax.tree.map(lambda p, m: np.where(m, p, np.float32(0)), params, masks)
            small = jp.io.save(file, pruned, masks, int8=True) / dense
            ours = jp.io.save(file, pruned, masks) / dense
            saving = _ratio(
                lambda masks=masks: jp.io.save(file, params, masks),
                lambda: jp.io.save_safetensors(dense_file, params),
                config.rounds,
            )
            loading = _ratio(
                lambda: jp.io.load(file), lambda: jp.io.load_safetensors(dense_file), config.rounds
            )
            lines.append(
                {
                    "sparsity": sparsity,
                    "bound": bound(sparsity),
                    "ours": ours,
                    "int8": small,
                    "numpy": numpy_bytes(pruned) / dense,
                    "save": saving,
                    "load": loading,
                }
            )
    return lines


def _mask(rng: np.random.Generator, shape: tuple[int, int], sparsity: float) -> np.ndarray:
    return rng.permutation(math.prod(shape)).reshape(shape) >= jp.selection.removed_count(
        sparsity, math.prod(shape)
    )


def _ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return float(np.median(times[::2]) / np.median(times[1::2]))


def summarise(lines: Sequence[dict[str, float]]) -> str:
    """Return the ratios as a table."""
    sizes, times = ("bound", "ours", "int8", "numpy"), ("save", "load")
    text = [
        "ratios to dense safetensors. Sizes: the entropy bound, jp.io.save, the same with",
        "8-bit values, numpy compressed. Times: jp.io.save, jp.io.load",
    ]
    rows = [["sparsity", *sizes, *times]]
    for line in lines:
        cells = [f"{line[head]:.4f}" for head in sizes] + [f"{line[head]:.2f}" for head in times]
        rows.append([f"{line['sparsity']:.0%}", *cells])
    return "\n".join([*text, tables.text(rows)])


def exported() -> list[tuple[str, tuple[int, int, int]]]:
    """Return the bytes of LeNet in each format: dense, with half of its channels masked, and without them."""
    model, x = LeNet(im2col=False), jnp.ones((1, 28, 28, 1))

    def apply(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    params = model.init(jax.random.key(0), x)["params"]
    structure = jp.structures.channels(jp.channel_groups(apply, params, x))
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=structure, scope="layerwise")
    small = jp.compact(apply, params, masks, x)
    networks = (apply, params), (apply, jp.apply_masks(params, masks)), (small.apply, small.params)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        formats: dict[str, Callable[[Any, Any], int]] = {
            "safetensors": lambda apply, params: jp.io.save_safetensors(file, params),
            "jp.io.save": lambda apply, params: jp.io.save(file, params),
            "StableHLO, params frozen": lambda apply, params: jp.export.stablehlo(
                apply, params, x, frozen=True
            ).save(file),
            "StableHLO, params apart": lambda apply, params: jp.export.stablehlo(apply, params, x).save(file),
            "ONNX": lambda apply, params: len(jp.export.onnx(apply, params, x)),
        }
        return [
            (name, (size(*networks[0]), size(*networks[1]), size(*networks[2])))
            for name, size in formats.items()
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    print(summarise(run(config)))
    if config.export:
        print("\nbytes of LeNet; half of each layer's channels masked, or gone")
        rows = [[name, *(f"{size:,}" for size in sizes)] for name, sizes in exported()]
        print(tables.text([["", "dense", "masked", "compacted"], *rows]))


if __name__ == "__main__":
    main()
