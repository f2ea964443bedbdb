"""What pruning costs and gains on an accelerator, as one page in Markdown, within a time limit.

The parts are other benchmarks at sizes for an accelerator, each in a process of its own:

- selection of 20 M and of 200 M params; an argsort, a sort and a histogram beside it;
- a train step of 29 M params with and without masks;
- a forward pass of ResNet-50 and of a ViT, in bfloat16, without half of their channels;
- sparse inference by `sparsify`;
- compiling a train step of 120 kernels.

    bash experiments/benchmarks/gpu.sh
    python -m experiments.benchmarks.gpu
    python -m experiments.benchmarks.gpu --small --only selection,sparse --seconds 60

Each part has its share of the time that is left, so that what one does not use is for those after it. A part
that takes longer is ended, and the page says so. The page is written after each part. All parts wait for
the device before they read the clock (jax.block_until_ready), and figures are ratios within one run.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

from experiments.run.limits import OneOf
from experiments.run.settings import File, Positive, Settings, parse

_ROOT = Path(__file__).parents[2]


class Part(NamedTuple):
    """A part of the page.

    Attributes:
      title: its heading.
      flags: of the benchmark, its name first.
      small: the same for sizes that run anywhere in seconds.
      share: of the time, beside the shares of the other parts.
    """

    title: str
    flags: str
    small: str
    share: float


PARTS = {
    "selection": Part(
        "Masks of 20 M params",
        "selection --millions 20 --rounds 5",
        "selection --millions 0.02 --leaves 3 --rounds 2",
        3,
    ),
    "large-selection": Part(
        "Masks of 200 M params",
        "selection --millions 200 --rounds 3 --device-only",
        "selection --millions 0.02 --leaves 3 --rounds 2 --device-only",
        5,
    ),
    "step": Part(
        "A train step",
        "train_step --networks large --ways copy,masked,packed,fixed --rounds 5",
        "train_step --networks lenet --ways copy,fixed --rounds 2 --turn 0.001",
        4,
    ),
    "compaction": Part(
        "Compacted networks",
        "compaction --networks resnet50,vit-base --dtype bfloat16",
        "compaction --networks tiny --dtype bfloat16 --batch 2 --rounds 2",
        6,
    ),
    "sparse": Part(
        "Sparse inference",
        "sparse_inference --batches 1,64,512 --sparsities 0.9,0.98 --ways masked,measure",
        "sparse_inference --width 64 --layers 1 --batches 4 --sparsities 0.95 --ways measure --rounds 2",
        3,
    ),
    "compile": Part(
        "Compiling a train step", "compile --kernels 120 --rounds 1", "compile --kernels 24 --rounds 1", 4
    ),
}


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    only: tuple[Annotated[str, OneOf(tuple(PARTS))], ...] = tuple(PARTS)  # of these parts, in this order
    seconds: Positive = 460.0  # for all parts together
    small: bool = False  # sizes that take seconds, on a CPU as well; their figures mean nothing
    out: File = "results/gpu.md"  # the page


SMALL = Config(only=("selection",), small=True)


def device() -> str:
    """Return the accelerator, its driver and the versions, without holding the accelerator afterwards."""
    asked = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind, 'of', d[0].platform)"
    found = _process([sys.executable, "-c", asked], 120.0)
    kind = (
        found.output.strip().splitlines()[-1:] if found.status == 0 else ["a device that JAX does not find"]
    )
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        driver = f"; nvidia-smi: {'; '.join(_process(query, 20.0).output.strip().splitlines())}"
    versions = f"jax {version('jax')}, jaxlib {version('jaxlib')}, Python {platform.python_version()}"
    return f"{''.join(kind)}{driver}; {versions}"


class Ended(NamedTuple):
    """A process that has ended: its exit status, None where it was ended, and what it printed."""

    status: int | None
    output: str


def _process(command: Sequence[str], seconds: float) -> Ended:
    """Run a command for a time at most, then end it and all that it started."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Worker processes of a part share the accelerator with it.
    env = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    ) as running:
        try:
            output = running.communicate(timeout=seconds)[0]
        except BaseException as error:
            os.killpg(running.pid, signal.SIGKILL)  # its own session: it and its workers, nothing else
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Ended(None, running.communicate()[0])
        return Ended(running.returncode, output)


def section(name: str, small: bool, seconds: float) -> str:
    """Run a part; return its section of the page."""
    part = PARTS[name]
    benchmark, *flags = (part.small if small else part.flags).split()
    words = ["-m", f"experiments.benchmarks.{benchmark}", *flags]
    began = time.monotonic()
    ended = _process([sys.executable, *words], seconds)
    took = time.monotonic() - began
    said = [f"## {part.title}", f"`python {' '.join(words)}`, {took:.0f} s"]
    if ended.status is None:
        said.append(f"Cut off after {seconds:.0f} s, its share of the time; what it had printed:")
    elif ended.status:
        said.append(f"It ended with status {ended.status}:")
    shown = ended.output.rstrip() if ended.status == 0 else "\n".join(ended.output.splitlines()[-20:])
    return "\n\n".join([*said, f"```text\n{shown}\n```"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    end = time.monotonic() + config.seconds
    head = f"# On an accelerator\n\n{device()}. Figures are ratios within one run."
    if config.small:
        head += " Run with --small: the figures mean nothing."
    page, out = [head], Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(config.only):
        shares = [PARTS[other].share for other in config.only[number:]]
        seconds = max(end - time.monotonic(), 0.0) * shares[0] / sum(shares)
        page.append(section(name, config.small, seconds))
        print(page[-1], end="\n\n", flush=True)
        out.write_text("\n\n".join(page) + "\n")
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
