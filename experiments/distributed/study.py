"""A transformer trained and pruned on many devices, in one process or several.

Params, optimizer state and masks are sharded over the devices (FSDP), and with --tensor heads and
hidden units as well; so is the batch. A cubic schedule prunes by magnitude, one ranking for all
matrices, inside the optimizer: the masks lie where the params lie, and choosing them moves a few
numbers between devices, no weights.

    python -m experiments.distributed                                # all devices there are
    python -m experiments.distributed --devices 8 --tensor 2         # simulated, 4 x 2
    python -m experiments.distributed --devices 8 --processes 4      # as on 4 machines
    python -m experiments.distributed --devices 8 --processes 4 --check

On a cluster, each process i of n is started by itself, on the same data:

    python -m experiments.distributed --coordinator HOST:PORT --processes n --process-id i

--check runs on one device, on --devices in one process, and in --processes, and compares masks. Those
made of the same params are the same to the bit, whatever the mesh: they are chosen by integers. It
fails if they are not. Training is another matter, because sums of floating-point gradients depend on
their order, and so on the number of devices. With --reproducible the order is fixed: gradients of
--parts parts of each batch, each worked out on one device, are added in pairs, pairs of pairs and so
on. Then whole runs are the same to the bit as well, as far as the compiler makes the same of one part
everywhere, which the check tells; it demands --tensor 1, as XLA sums over "tensor". Without it masks
differ in a few entries.

By default the text is Python's own help (no download); --dataset tiny_shakespeare downloads once.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from tqdm import trange

import jaxprune as jp
from experiments.distributed import sharded_training
from experiments.distributed.launch import free_address, launch
from experiments.distributed.sharded_training import feed, fingerprint, gather
from experiments.networks.large import Decoder
from experiments.report.design import Design
from experiments.run import saved_recipes, stopping
from experiments.run.limits import FlagError
from experiments.run.results import Results, layers
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Settings, Sparsity, parse
from experiments.show import tables
from experiments.training import steps


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the study."""

    # python_help comes with Python; the other is downloaded once
    dataset: Literal["python_help", "tiny_shakespeare"] = "python_help"
    fsdp: Count | None = None  # devices that params and batch are sharded over; by default what is left
    tensor: Count = 1  # devices that heads and hidden units are split over
    devices: Count | None = None  # simulate so many on the CPU, in all processes together
    processes: Count = 1  # start so many on this machine; with --process-id, so many there are
    coordinator: str | None = None  # host:port of process 0, on a cluster
    process_id: Natural | None = None  # of this process, on a cluster; counted from 0
    reproducible: bool = False  # the same sums of gradients on any number of devices
    parts: Count = 8  # of each batch, with --reproducible; a power of 2 that --fsdp divides
    check: bool = False  # compare one device, --devices in one process, and --processes
    steps: Count = 400  # of training
    batch_size: BatchSize = 64  # pieces of text per step
    context: Count = 64  # characters per piece
    dim: Count = 64  # width of the network
    depth: Count = 2  # its blocks
    heads: Count = 4  # of attention
    hidden: Count = 128  # units of each MLP
    lr: Positive = 3e-3  # learning rate of AdamW, at the peak of one cycle
    sparsity: Sparsity = 0.9  # of all matrices but the embedding, at the end
    mask_updates: Count = 20  # how often masks are updated, between .1 and .7 of the steps
    seed: Natural = 0  # of the first params and of the batches
    probe: str | None = None  # a run's folder: make masks of its first and last params too
    out: Folder = "results/distributed"  # folder of the results

    def __post_init__(self) -> None:
        super().__post_init__()
        self.below("process_id", "processes")


_BEGIN, _END = 0.1, 0.7  # of the steps: when pruning begins and ends
_FIRST, _LAST = "first.jp", "last.jp"


def recipe(config: Config) -> jp.recipes.Recipe:
    """Return what a run prunes by."""
    begin, end = round(_BEGIN * config.steps), max(1, round(_END * config.steps))
    cubic = {"sparsity": config.sparsity, "begin_step": begin, "end_step": end}
    every = max(1, (end - begin) // config.mask_updates)
    return jp.recipes.parse({"prune": {"score": "magnitude", "sparsity": {"cubic": cubic}, "every": every}})


def set_up(config: Config) -> None:
    """Make JAX see the devices, and the other processes; it must come before anything else of JAX."""
    if config.reproducible or config.devices:
        # Simulated devices wait for one another in threads of one pool, which must not run out of them. And a
        # CPU's products are cut up by their number: it must not depend on the devices for these to agree.
        os.environ["PJRT_NPROC"] = str(4 * max(config.parts, config.devices or 1))
    if config.devices is not None:
        if config.devices % config.processes:
            raise SystemExit(
                f"--devices {config.devices} cannot be shared out to {config.processes} processes"
            )
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", config.devices // config.processes)
            # Simulated devices share threads. Steps sent ahead can take those that one's last device needs.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
        except RuntimeError:
            raise SystemExit(
                "--devices has to be set before JAX is used: run the study as a command"
            ) from None
    if config.process_id is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(config.coordinator, config.processes, config.process_id)


DESIGN = Design(
    levels=("devices", "processes"), figures=("loss", "sparsity", "params"), percent=("sparsity",)
)


def train(config: Config) -> dict[str, Any]:
    """Train and prunes on all devices; process 0 writes, and all return the line of results."""
    if jax.process_index() > 0:
        return _train(config)[0]
    with Results(config.out, "distributed", config, design=DESIGN) as results:
        line, masks = _train(config)
        results.write(**line, masks=results.keep_masks("last", masks))
    return line


def _train(config: Config) -> tuple[dict[str, Any], Any]:
    """Return the line, and the masks at the end; process 0 writes the params."""
    mesh = make_mesh(config)
    if config.dim % config.heads:
        raise FlagError(f"--dim {config.dim} cannot be shared out to {config.heads} heads (--heads)")
    text = sharded_training.load_text(config.dataset)
    if config.context >= (length := min(len(text.train), len(text.validation)) - 1):
        raise FlagError(f"--context {config.context} is too long for the text: it must be below {length:,}")
    sizes = (config.context, config.dim, config.depth, config.heads, config.hidden)
    model, own, leads = Decoder(len(text.vocabulary), *sizes), recipe(config), jax.process_index() == 0

    def init() -> Any:
        return model.init(jax.random.key(config.seed), jnp.zeros((1, config.context), jnp.int32))["params"]

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    rate = steps.one_cycle(config.lr, config.steps)
    adamw = optax.adamw(rate, weight_decay=0.05, mask=steps.kernels)
    tx = jp.wrap_optax(adamw, own.pruner(jax.eval_shape(init)))
    state, specs = sharded_training.start(init, tx, mesh)
    first, value = gather(state.params), jnp.nan
    gradients = jax.value_and_grad(loss)
    if config.reproducible:
        gradients = sharded_training.reproducible_gradients(loss, mesh, specs, config.parts)
    step = sharded_training.stepper(gradients, tx, state, literal=config.reproducible)
    for number in trange(config.steps, unit="step", disable=not leads):
        starts = np.random.default_rng((config.seed, number)).integers(
            len(text.train) - config.context, size=config.batch_size
        )
        state, value = step(state, *feed(text.train, starts, config.context, mesh))

    places = np.linspace(0, len(text.validation) - config.context - 1, 4 * config.batch_size).astype(int)
    evaluate = jax.jit(loss)
    losses = [
        float(evaluate(state.params, *feed(text.validation, some, config.context, mesh)))
        for some in np.split(places, 4)
    ]
    shardings = sharded_training.on_mesh(specs, mesh)
    sharded_training.check_shardings(state, shardings)
    params, masks = gather(state.params), gather(optax.tree.get(state.opt_state, "masks"))
    jp.check_pruned(params, masks)
    if leads:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        jp.io.save(Path(config.out) / _FIRST, first)
        jp.io.save(Path(config.out) / _LAST, params, masks)
        saved_recipes.save_method(config.out, "pruning", own)
    multihost_utils.sync_global_devices("params are written")
    line: dict[str, Any] = {
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "train_loss": float(value),
        "loss": float(np.mean(losses)),
        "sparsity": jp.metrics.sparsity(masks).prunable,
        "programs": step._cache_size(),
        "first_params": fingerprint(first),
        "last_params": fingerprint(params),
        "last_masks": fingerprint(masks),
        "layers": layers(masks),
        "note": text.note,
    }
    probe = sharded_training.prober(shardings)
    for name in (_FIRST, _LAST) if config.probe else ():
        saved = jp.io.load(Path(str(config.probe)) / name, like=params).params
        line[f"probe_{name}"] = probe(jax.tree.map(np.asarray, saved))
    return line, masks


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """Return the mesh, once its sides are known to fit the devices, the batch and the parts.

    Raises:
      FlagError: they do not.
    """
    count = jax.device_count()
    fsdp = config.fsdp or count // config.tensor
    if fsdp * config.tensor != count:
        raise FlagError(f"--fsdp {fsdp} times --tensor {config.tensor} is not the number of devices, {count}")
    if config.batch_size % fsdp:
        raise FlagError(f"--batch-size {config.batch_size} cannot be shared out to {fsdp} devices")
    if config.reproducible:
        if config.tensor > 1:
            raise FlagError("--reproducible needs --tensor 1: what lies on several devices is summed by XLA")
        parts = config.parts
        if parts % fsdp or parts & (parts - 1) or config.batch_size % parts:
            raise FlagError(f"--parts {parts} must be a power of 2 that {fsdp} divides, and divide the batch")
    return sharded_training.make_mesh(fsdp, config.tensor)


# --- the check


class Layout(NamedTuple):
    """Where a run runs.

    Attributes:
      name: for the table, and of its folder.
      devices, processes: how many, over all.
      tensor: how many devices heads and hidden units are split over.
    """

    name: str
    devices: int
    processes: int
    tensor: int


def layouts(config: Config) -> list[Layout]:
    """Return the layouts that are compared."""
    devices = config.devices or 8
    several = Layout("processes", devices, max(2, config.processes), config.tensor)
    return [Layout("one", 1, 1, 1), Layout("devices", devices, 1, config.tensor), several]


def check(config: Config) -> list[dict[str, Any]]:
    """Run in turn on one device, on several, and in several processes.

    Returns:
      A line for each, with the fraction of its masks' entries that are not those of one device.

    Raises:
      SystemExit: a process has failed, or masks of the same params differ.
    """
    lines, kept = [], []
    for layout in layouts(config):
        out = Path(config.out) / layout.name
        places = {
            "fsdp": None,
            "tensor": layout.tensor,
            "devices": layout.devices,
            "processes": layout.processes,
        }
        probe = str(Path(config.out) / "one")
        own = dataclasses.replace(config, **places, check=False, probe=probe, out=str(out))
        print(f"{layout.devices} devices, {layout.processes} processes", file=sys.stderr)
        start_processes(own, quiet=True)
        line = line_of(out)
        kept.append(jax.tree.leaves(jp.io.load(out / line["masks"]).params))
        pairs = list(zip(kept[0], kept[-1], strict=True))
        differing = sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in pairs)
        lines.append(line | {"layout": layout.name, "differing": differing / line["params"]})
    for name in (_FIRST, _LAST):
        if len({line[f"probe_{name}"] for line in lines}) > 1:
            raise SystemExit(f"{summarise(lines)}\n\nmasks of the same params ({name}) differ")
    return lines


def line_of(folder: Path) -> dict[str, Any]:
    """Return the line that a run left in its folder."""
    (text,) = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(text)


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """Return the lines as a table of at most 80 columns."""
    rows = [["devices", "processes", "mesh", "loss", "sparsity", "params", "masks"]]
    for line in lines:
        row = [str(line["devices"]), str(line["processes"]), "x".join(map(str, line["mesh"].values()))]
        row += [f"{line['loss']:.4f}", f"{line['sparsity']:.4%}"]
        rows.append([*row, line["last_params"][:12], line["last_masks"][:12]])
    return tables.text(rows)


def start_processes(config: Config, quiet: bool = False) -> None:
    """Run the study in processes of its own on this machine, as many as the config says."""
    address, commands = free_address(), []
    for number in range(config.processes):
        several = {"process_id": number, "coordinator": address} if config.processes > 1 else {}
        flags = as_flags(dataclasses.replace(config, **several))
        commands.append([sys.executable, "-m", "experiments.distributed", *flags])
    launch(commands, quiet)


def as_flags(config: Config) -> list[str]:
    """Return the flags that make a config."""
    flags = []
    for field in dataclasses.fields(config):
        name, value = field.name.replace("_", "-"), getattr(config, field.name)
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    config = parse(Config, argv, __doc__)
    if (config.coordinator is None) != (config.process_id is None):
        raise SystemExit("a process of a cluster needs both --coordinator and --process-id")
    starts_others = config.check or (config.processes > 1 and config.process_id is None)
    if not starts_others:
        set_up(config)  # before SIGTERM is caught: JAX's processes catch it as well
    with stopping.exit_with_message(config.out):
        if config.check:
            lines = check(config)
            print(f"\n{lines[0]['note']}, {lines[0]['params']:,} params")
            print(summarise(lines))
            print("masks of the same params: the same to the bit")
            for line in lines[1:]:
                print(
                    f"masks of the run on {line['layout']}: {line['differing']:.4%} not those of one device"
                )
        elif starts_others:
            start_processes(config)
        else:
            line = train(config)
            if jax.process_index() == 0:
                print(f"\n{line['note']}, {line['params']:,} params")
                print(summarise([line]))
                print(f"\nWrote results.jsonl, the params and the masks to {config.out}")
