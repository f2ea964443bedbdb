"""All benchmarks of speed and memory, one after another, as a page of tables in Markdown.

    python -m experiments.benchmarks
    python -m experiments.benchmarks --only train_step,memory
    python -m experiments.benchmarks --small --out /tmp/small.md

The page names the machine and, above each table, the command that makes it alone. --small takes
sizes that run in seconds, to see that everything works; its figures mean nothing.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from experiments.benchmarks.parts.machine import machine
from experiments.run.limits import OneOf
from experiments.run.settings import File, Settings, parse
from experiments.show.tables import markdown, remarks, titled

NAMES = ("selection", "train_step", "sweep", "compaction", "sparse_inference", "convolutions", "memory")


@dataclass(frozen=True)
class Config(Settings):
    """Flags of all benchmarks together."""

    only: tuple[Annotated[str, OneOf(NAMES)], ...] = NAMES  # of these, in this order
    small: bool = False  # sizes that take seconds
    out: File = "results/benchmarks.md"  # the page


def section(name: str, small: bool) -> str:
    """Run a benchmark; its part of the page, after printing it as a plain table."""
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    lines = module.run(module.SMALL if small else module.Config())
    title, table = (module.__doc__ or name).strip().partition("\n")[0].rstrip("."), module.rows(lines)
    print(titled(f"{name}: {title}", table, lines), end="\n\n", flush=True)
    command = f"`python -m experiments.benchmarks.{name}`"
    said = [" ".join(remark.split()) for remark in remarks(lines)]
    return "\n\n".join([f"## {title}", command, markdown(table), *said])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks from the command line."""
    config = parse(Config, argv, __doc__)
    # Benchmarks with worker processes share an accelerator with this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(machine(), end="\n\n")
    head = f"# Benchmarks\n\n{machine()}. Times are ratios within one run."
    if config.small:
        head += " Run with --small: the figures mean nothing."
    page = "\n\n".join([head, *(section(name, config.small) for name in config.only)])
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page + "\n")
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
