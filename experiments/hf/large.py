"""A decoder of a billion parameters pruned layer by layer, and how much memory that takes.

    python -m experiments.hf.large --folder large/dense --out large/pruned --checkpoint large/layers

The folder is made if it is not there: random weights in bfloat16, Hugging Face's layout. It is opened
memory-mapped, calibrated on random tokens, and pruned. Each solved layer is saved in --checkpoint, so that a
run that was killed goes on and ends with the same bits. Printed at the end: the share of the time by kind of
layer, and the most resident memory of the process as the system counts it, mapped pages included. Random
weights are of no use, but take as much memory and time as trained ones, which are pruned by
`python -m experiments.one_shot hf`.

    python -m experiments.hf.large --plan                        # and 7B and 70B, from rates measured here
    python -m experiments.hf.large --params tiny --devices 8     # tokens sharded, compared with one device
    python -m experiments.hf.large --params tiny --save orbax    # sharded files, restored on any devices
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from experiments.hf import plan, random_checkpoint
from experiments.hf.opened import Model, open_model, write_model
from experiments.run.limits import FlagError
from experiments.run.settings import Count, Folder, Natural, Settings, Sparsity, parse
from experiments.show import tables

METHODS: dict[str, Callable[[], Any]] = {
    "sparsegpt": jp.solvers.sparsegpt,
    "alps": jp.solvers.alps,
    "wanda": lambda: jp.solvers.mask_only(jp.scores.wanda),
    "magnitude": lambda: jp.solvers.mask_only(jp.scores.magnitude),
}


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the command."""

    params: Literal["1b", "20m", "tiny"] = "1b"  # how many the network has, if --folder has to be made
    folder: Folder = "results/large/dense"  # the dense network, made if it is not there
    out: Folder | None = None  # where the pruned network is written
    save: Literal["safetensors", "orbax"] = "safetensors"  # as what --out is written
    checkpoint: Folder | None = None  # where solved layers are saved, and taken up again
    method: Literal["sparsegpt", "alps", "wanda", "magnitude"] = "sparsegpt"  # how layers are solved
    sparsity: Sparsity = 0.5  # of each layer
    windows: Count = 16  # pieces of text to calibrate on
    length: Count = 512  # tokens of each
    devices: Count = 1  # simulate so many on the CPU, and compare with one
    plan: bool = False  # measure rates, and print what larger networks take
    seed: Natural = 0  # of weights and tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows % self.devices:
            raise FlagError(
                f"--windows: must be a multiple of {self.devices} (--devices), got {self.windows}"
            )


class Taken(NamedTuple):
    """What a layer took.

    Attributes:
      row: of the report.
      seconds: since the layer before, with its part of the forward pass and its Gram matrix.
    """

    row: Any
    seconds: float


def run(config: Config) -> dict[str, Any]:
    """Prune, write and print; return the figures."""
    use_devices(config.devices)
    folder = Path(config.folder)
    if not folder.exists():
        random_checkpoint.make(folder, random_checkpoint.SIZES[config.params], config.seed)
    model = open_model(folder)
    mesh = data_mesh(config.devices) if config.devices > 1 else None
    batches = windows(config, model.config.vocab)
    start, taken = reset_peak(), list[Taken]()
    done = prune(config, model, sharded(batches, mesh), config.checkpoint, taken)
    peak = resident("VmHWM")
    figures: dict[str, Any] = {
        "peak": peak,
        "start": start,
        "layers": len(taken),
        "error": _mean_error(taken),
    }
    print(f"\n{tables.text(time_by_kind(taken))}\n")
    print(
        f"At most {peak / 2**30:.2f} GiB were resident (VmHWM), {start / 2**30:.2f} before the first layer."
    )
    if config.out is not None:
        if config.save == "orbax":
            save_orbax(Path(config.out), {"params": done.params, "masks": done.masks}, mesh)
        else:
            write_model(config.out, model, done.params, done.masks)
        figures["peak"] = resident("VmHWM")
        print(f"Written to {config.out}; with that, {figures['peak'] / 2**30:.2f} GiB (VmHWM).")
    if mesh is not None:
        figures |= compared(config, model, batches, mesh, done)
    if config.plan:
        print(f"\n{tables.text(planned(config, model, peak - start))}")
    return figures


def use_devices(number: int) -> None:
    """Make JAX see so many CPUs; it must come before anything else of JAX."""
    if number == 1:
        return
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        raise SystemExit("--devices has to be set before JAX is used: run it as a command") from None


def data_mesh(number: int) -> Mesh:
    """Return a mesh of so many devices, over which XLA works out how each array is sharded."""
    return jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,))


def windows(config: Config, vocab: int) -> list[np.ndarray]:
    """Return random tokens, with as many windows in a batch as there are devices."""
    shape = (config.windows // config.devices, config.devices, config.length)
    rng = np.random.default_rng(config.seed)
    return list(rng.integers(0, vocab, shape).astype(np.int32))


def sharded(batches: Sequence[np.ndarray], mesh: Mesh | None) -> list[Any]:
    """Return the batches with their windows shared out to the devices of a mesh."""
    if mesh is None:
        return list(batches)
    return [jax.device_put(batch, NamedSharding(mesh, P("data"))) for batch in batches]


def prune(
    config: Config, model: Model, batches: Sequence[Any], checkpoint: str | None, taken: list[Taken]
) -> Any:
    """Prune the network; `taken` gets an entry for each layer."""
    last = time.perf_counter()

    def progress(row: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        taken.append(Taken(row, now - last))
        last = now
        print(f"{row.name:28} error {row.error:.4f}  {resident('VmHWM') / 2**30:6.2f} GiB", flush=True)

    return jp.prune_layers(
        model.apply_fn,
        model.params,
        batches,
        METHODS[config.method](),
        config.sparsity,
        checkpoint=checkpoint,
        progress=progress,
    )


def resident(key: str) -> int:
    """Return what the system says of this process's memory in bytes: "VmHWM" is the most, "VmRSS" now."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def reset_peak() -> int:
    """Make the system count the most resident memory from now on, and return what is resident now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return resident("VmRSS")


def time_by_kind(taken: Sequence[Taken]) -> list[tuple[str, ...]]:
    """Return a table of the share of the time by kind of layer, the header first."""
    total = sum(each.seconds for each in taken)
    kinds: dict[str, list[Taken]] = {}
    for each in taken:
        kinds.setdefault(each.row.name.split("/")[2], []).append(each)
    rows = [("layer", "number", "outputs x inputs", "time", "error")]
    for name, some in kinds.items():
        row, seconds = some[0].row, sum(each.seconds for each in some)
        rows.append(
            (
                name,
                str(len(some)),
                f"{row.outputs} x {row.inputs}",
                f"{seconds / total:.1%}",
                f"{np.mean([each.row.error for each in some]):.3f}",
            )
        )
    return rows


def _mean_error(taken: Sequence[Taken]) -> float:
    return float(np.mean([each.row.error for each in taken]))


def compared(
    config: Config, model: Model, batches: Sequence[np.ndarray], mesh: Mesh, done: Any
) -> dict[str, Any]:
    """Compare with one device: Gram matrices, masks chosen by Wanda on them, and the pruned network."""
    one, many = (
        jp.calibrate(model.apply_fn, model.params, some, statistics="gram")
        for some in (list(batches), sharded(batches, mesh))
    )
    far, differ, gap, of = 0.0, 0, 0.0, 0
    for path in one.paths:
        weight = np.abs(_leaf(model.params, path).astype(np.float64))
        for single, other in zip(one.layers(path), many.layers(path), strict=True):
            grams = [np.asarray(each.gram, np.float64)[0] for each in (single, other)]
            far = max(far, float(np.max(np.abs(grams[1] - grams[0])) / np.max(np.abs(grams[0]))))
            found = _masks_that_differ(weight, grams, config.sparsity)
            differ, gap, of = differ + found[0], max(gap, found[1]), of + weight.size
    print("\nThe same on one device:")
    alone = prune(config, model, batches, None, [])
    pairs = zip(jax.tree.leaves(alone.masks), jax.tree.leaves(done.masks), strict=True)
    pruned = sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in pairs)
    print(
        f"\n{config.devices} devices and one: Gram matrices differ by at most {far:.1e} of their largest "
        f"entry.\nOf {of:,} entries {differ} are pruned by Wanda on one side alone; their scores are within "
        f"{gap:.1e} of the cut.\nAfter {config.method}, layer by layer, {pruned} entries differ."
    )
    return {"gram": far, "differ": differ, "gap": gap, "pruned_differ": pruned}


def _leaf(params: Any, path: str) -> Any:
    for key in path.split("/"):
        params = params[int(key)] if isinstance(params, list) else params[key]
    return params


def _masks_that_differ(weight: np.ndarray, grams: Sequence[np.ndarray], sparsity: float) -> tuple[int, float]:
    """Return how many entries Wanda prunes with one Gram matrix alone, and how far from the cut they are."""
    scores = [weight * np.sqrt(np.diagonal(gram)) for gram in grams]
    count = round(sparsity * weight.size)
    cuts = [np.partition(score, count, axis=None)[count] for score in scores]
    differ = (scores[0] < cuts[0]) != (scores[1] < cuts[1])
    gaps = np.abs(scores[0] - cuts[0])[differ] / cuts[0]
    return int(differ.sum()), float(np.max(gaps, initial=0.0))


def save_orbax(folder: Path, tree: Any, mesh: Mesh | None) -> None:
    """Write a tree by Orbax, each leaf in as many pieces as the mesh has devices, where that fits."""
    import orbax.checkpoint as ocp

    def placed(leaf: Any) -> Any:
        return np.ascontiguousarray(leaf) if mesh is None else jax.device_put(leaf, _sharding(leaf, mesh))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), jax.tree.map(placed, tree))


def restore_orbax(folder: Path, mesh: Mesh) -> Any:
    """Read what `save_orbax` wrote, on whatever number of devices it was, onto those of a mesh."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder.absolute()).item_metadata.tree
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf, mesh)), saved
        )
        return checkpointer.restore(folder.absolute(), wanted)


def _sharding(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Share out the first axis, if the devices divide it."""
    whole = not leaf.shape or leaf.shape[0] % mesh.size
    return NamedSharding(mesh, P() if whole else P("data"))


def planned(config: Config, model: Model, taken: int) -> list[tuple[str, ...]]:
    """Return the table of what this network and larger ones take; `taken` is the memory of this run."""
    tokens = config.windows * config.length
    held = plan.memory(model.config, tokens)
    overhead = (taken - held.network - held.result) / held.working
    return plan.table(config.params, model.config, tokens, plan.rates(model.config, tokens), overhead)


def main() -> None:
    """Run with flags of the command line."""
    run(parse(Config, description=(__doc__ or "").split("\n\n")[0]))


if __name__ == "__main__":
    main()
