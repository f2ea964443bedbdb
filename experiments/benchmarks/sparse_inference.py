"""What sparse kernels do to the time of a call, at which sparsity and batch: against dense.

A multi-layer perceptron is pruned by magnitude, and called as it is (dense), with its zeros (masked), by
`jp.sparsify` with measured forms (measure) and by its rule (rule), and with every kernel as
`jax.experimental.sparse.BCSR` written by hand (bcsr). Beside them, in processes of their own, the same
network on SciPy's and PyTorch's compressed rows, where these are installed.

    python -m experiments.benchmarks.sparse_inference
    python -m experiments.benchmarks.sparse_inference --batches 64 --sparsities 0.95,0.98
    python -m experiments.benchmarks.sparse_inference --layers 1 --ways csr,windows --width 1024
    python -m experiments.benchmarks.sparse_inference --structure blocks --ways blocks,compact,measure
    python -m experiments.benchmarks.sparse_inference --scan --batches 64 --ways masked,measure,bcsr

With --scan the layers are stacked, and the network runs through them with `lax.scan`: dense, masked and
in the forms of `sparsify`. BCSR by hand, SciPy and PyTorch have one kernel after the other all the same.

All calls are compiled, warm and taken in turn; figures are medians, or what --quantile says, as ratios to
dense: 2.0 is twice as fast.

Beside them is what bounds the ratio of any form:

- bytes: the bytes of the dense kernels, over those of the entries that are left, with an index of one byte
  each. It is the bound where memory is all that counts: one row of inputs.
- gathers: the time of the dense call, over that of reading the input of each entry by its index and of
  multiplying by it, in XLA's best loop of that kind, from the second cache and on one core. A dense product
  has all cores. Not stated for more than 8 rows of inputs, where another loop reads an index once for
  several rows.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.benchmarks.parts.jax_steps import bcsr_network, init, network, to_bcsr
from experiments.benchmarks.parts.turns import Worker
from experiments.run.limits import OneOf, Range
from experiments.run.settings import BatchSize, Count, Settings, Share, Sparsity, parse
from experiments.show import tables
from jaxprune.sparse.forms import stored_entries

PEERS = ("scipy", "torch")
BOUNDS = ("bytes", "gathers")
FORMS = ("csr", "padded", "windows", "blocks", "compact")


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    width: BatchSize = 2048  # units of the input and of each layer
    layers: Annotated[int, Range(at_least=1, at_most=1000)] = 3  # kernels
    scan: bool = False  # whether the layers are stacked and run by a scan
    batches: tuple[BatchSize, ...] = (1, 8, 64, 512)  # rows in a call
    sparsities: tuple[Sparsity, ...] = (0.8, 0.9, 0.95, 0.98, 0.99)  # of all kernels together
    structure: Literal["entries", "blocks", "units"] = "entries"  # what is pruned; blocks are 64 x 64
    # what runs beside dense
    ways: tuple[Annotated[str, OneOf(("masked", "measure", "rule", "bcsr", *FORMS, *PEERS))], ...] = (
        "masked",
        "measure",
        "rule",
        "bcsr",
        *PEERS,
    )
    rounds: Count = 9  # measurements of each
    quantile: Share = 0.5  # of these; 0.1 on a machine that is busy with other work


SMALL = Config(width=64, batches=(4,), sparsities=(0.95,), ways=("masked", "rule"), rounds=2)


def pruned(config: Config, sparsity: float) -> tuple[Any, Any]:
    """Return params with He's initialisation, and masks."""
    params = init(jax.random.key(0), (config.width,) * (config.layers + 1))
    structure = {
        "entries": jp.structures.elements,
        "blocks": partial(jp.structures.blocks, (64, 64)),
        "units": partial(jp.structures.slices, axis=-1),
    }[config.structure]()
    return params, jp.prune_once(params, jp.scores.magnitude, sparsity=sparsity, structure=structure)


def scanned(params: Any, x: jax.Array) -> jax.Array:
    """Return `network` of stacked layers, for x >= 0, which relu leaves as it is."""

    def layer(x: Any, p: Any) -> tuple[Any, None]:
        return jax.nn.relu(x) @ p["kernel"] + p["bias"], None

    return jax.lax.scan(layer, x, params["layers"])[0]


def stacked(layers: Any) -> Any:
    """Return the layers of `network` as `scanned` takes them."""
    return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers.values())}


def timer(function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """Return the seconds of a compiled call, over as many in a row as take about two milliseconds."""
    run = jax.jit(function)

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(run(*arguments))
        return (time.perf_counter() - start) / repeats

    seconds(2)
    repeats = max(1, min(1000, math.ceil(2e-3 / seconds(1))))
    return lambda: seconds(repeats)


def gather_seconds() -> float:
    """Return the seconds of an entry's product, where its input is read by an index of one byte.

    It is the loop that "windows" runs, over entries that stay in the second cache: XLA has nothing faster.
    """
    lanes, steps, times = 2048, 64, 50
    rng = np.random.default_rng(0)
    starts, x = jnp.arange(steps) * 4, jnp.asarray(rng.standard_normal(512, dtype=np.float32))
    indices = jnp.asarray(rng.integers(0, 256, (steps, lanes)).astype(np.uint8))
    values = jnp.asarray(rng.standard_normal((steps, lanes), dtype=np.float32))

    @jax.jit
    def run(entries: Any, x: Any) -> Any:
        def step(total: Any, entry: Any) -> Any:
            start, index, value = entry
            window = jax.lax.dynamic_slice_in_dim(x, start, 256)
            return total + value * window.at[index].get(mode="promise_in_bounds"), None

        def again(_: Any, total: Any) -> Any:
            return jax.lax.scan(step, total, entries)[0]

        return jax.lax.fori_loop(0, times, again, jnp.zeros(lanes))

    best = math.inf
    for _ in range(100):  # the least of many short ones: that which nothing else disturbed
        began = time.perf_counter()
        jax.block_until_ready(run((starts, indices, values), x))
        best = min(best, time.perf_counter() - began)
    return best / (lanes * steps * times)


def case(config: Config, batch: int, sparsity: float, gather: float | None) -> list[dict[str, Any]]:
    """Return a line for each way at one batch and sparsity, and for each bound.

    `gather` is `gather_seconds()`, or None where that loop is not what bounds the time.
    """
    params, masks = pruned(config, sparsity)
    masked = jp.apply_masks(params, masks)
    x = jax.random.normal(jax.random.key(1), (batch, config.width))
    x = jnp.abs(x) if config.scan else x
    want = np.asarray(network(masked, x))
    run = (scanned, stacked(params), stacked(masks)) if config.scan else (network, params, masks)
    turns, notes = {"dense": timer(*run[:2], x)}, {}
    leaves = zip(jp.leaf_paths(masked), jax.tree.leaves(masked), strict=True)
    kernels = {path: np.asarray(leaf) for path, leaf in leaves if path.endswith("kernel")}
    left = {path: np.count_nonzero(kernel) for path, kernel in kernels.items()}
    kept = {"layers/kernel": sum(left.values())} if config.scan else left

    def check(way: str, output: Any) -> None:
        gap = float(np.max(np.abs(np.asarray(output) - want)))
        if not gap < 1e-3:
            raise RuntimeError(f"{way} at {sparsity:.0%} differs from the masked network by {gap}.")

    with ExitStack() as stack:
        for way in config.ways:
            if way in PEERS:
                if find_spec(way) is None:
                    continue
                biases = [np.asarray(layer["bias"]) for layer in masked.values()]
                settings = {"library": way, "kernels": [*kernels.values()], "biases": biases}
                settings["x"] = np.asarray(x)
                peer = stack.enter_context(Worker("experiments.benchmarks.peers.sparse:Peer", **settings))
                check(way, peer("output"))
                turns[way] = partial(peer, "measure")
                continue
            function, given = run[0], jp.apply_masks(*run[1:])
            if way == "bcsr":
                function, given = bcsr_network, to_bcsr(masked)
            elif way != "masked":
                paths = [path for path in jp.leaf_paths(run[1]) if path.endswith("kernel")]
                choose: Any = way if way in ("measure", "rule") else dict.fromkeys(paths, way)
                try:
                    fast = jp.sparsify(*run, x, choose=choose)
                except ValueError as error:  # this form does not suit these masks
                    notes[way] = str(error)
                    continue
                function, given = fast.apply, fast.params
                notes[way] = ", ".join(dict.fromkeys(fast.forms.values()))
                if small := fast.params.kernels:
                    entries = sum(stored_entries(small[path]) for path in small)
                    stored = entries / sum(kept[path] for path in small)
                    notes[way] += f", {stored:.2f} stored for each left"
            check(way, jax.jit(function)(given, x))
            turns[way] = timer(function, given, x)
        seconds: dict[str, list[float]] = {way: [] for way in turns}
        names = list(turns)
        for number in range(config.rounds):
            first = number % len(names)
            for way in names[first:] + names[:first]:
                seconds[way].append(turns[way]())
    typical = {way: float(np.quantile(times, config.quantile)) for way, times in seconds.items()}
    entries, size = sum(left.values()), sum(kernel.size for kernel in kernels.values())
    item = x.dtype.itemsize
    least = {"bytes": typical["dense"] * (entries * (item + 1)) / (size * item)}
    if gather is not None and batch <= 8:
        least["gathers"] = batch * entries * gather
        notes["gathers"] = f"{gather * 1e9:.2f} ns an entry"
    typical |= least
    return [
        {
            "batch": batch,
            "sparsity": sparsity,
            "way": way,
            "speed_up": typical["dense"] / typical[way],
            "seconds": typical[way],
            "note": notes.get(way, ""),
        }
        for way in (*turns, *least)
    ]


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each batch, sparsity and way: `speed_up` is how many times faster than dense."""
    pairs = itertools.product(config.batches, config.sparsities)
    gather = gather_seconds() if jax.default_backend() == "cpu" else None
    return [line for batch, sparsity in pairs for line in case(config, batch, sparsity, gather)]


def notes(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each batch and sparsity the forms that `sparsify` chose, and what a gather takes."""
    return [
        f"batch {line['batch']}, {line['sparsity']:.0%}, {line['way']}: {line['note']}"[:80]
        for line in lines
        if line["way"] in ("measure", "rule", "gathers") and line["note"]
    ]


def rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the figures, header first: a row for each batch and sparsity, a column for each way or bound."""
    ways = [way for way in dict.fromkeys(line["way"] for line in lines) if way != "dense"]
    ways.sort(key=lambda way: way in BOUNDS)
    found = [("batch", "sparsity", *ways)]
    for (batch, sparsity), some in itertools.groupby(lines, lambda line: (line["batch"], line["sparsity"])):
        by = {line["way"]: f"{line['speed_up']:.2f}" for line in some}
        found.append((str(batch), f"{sparsity:.0%}", *(by.get(way, "-") for way in ways)))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    of = "medians" if config.quantile == 0.5 else f"{config.quantile:g} quantiles"
    where = " in a scan" if config.scan else ""
    print(f"{config.layers} kernels of {config.width} x {config.width}{where}, {config.structure} pruned,")
    print(f"{jax.devices()[0].device_kind}; times faster than dense, {of} of {config.rounds}")
    lines = run(config)
    print("\n".join([tables.text(rows(lines), labels=2), *notes(lines)]))


if __name__ == "__main__":
    main()
