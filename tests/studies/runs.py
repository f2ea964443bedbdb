"""Runs of studies in processes of their own, which are stopped at any moment, and what they leave."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments.run.results import UNFINISHED
from tests.support.commands import command_module

_SMALL = ["--train-size", "200", "--test-size", "100"]
_RECIPE = str(Path(__file__).parents[2] / "experiments" / "recipes" / "two-four.yaml")

# Small runs of all studies that go on where they were stopped. No times are measured.
STUDIES = {
    "lottery_ticket": "--seeds 0,1 --levels 2 --branch-levels 2 --epochs 1 --tune-epochs 1 "
    "--methods ticket,reinit,tune",
    "channel_pruning": "--epochs 4 --tune-epochs 1 --targets 2 --rounds 1 --methods local,scratch "
    "--timing-runs 0 --batch-sizes 8 --batch-size 50",
    "lenet": "--seeds 0,1 --amounts 0.3,0.6 --rounds 1 --tune-epochs 1 --epochs 2 --timing-runs 0",
    "gradual": "--seeds 0,1 --sparsities 0.9 --epochs 2 --tune-epochs 1 --begin-epoch 0 --end-epoch 1 "
    "--mask-updates 4",
    "dynamic_sparse": "--seeds 0,1 --sparsities 0.9 --epochs 3 --mask-updates 3",
    "pruning_at_init": "--seeds 0,1 --compressions 10 --epochs 2 --rounds 3",
    "sensitivity": "--network mlp --seeds 0,1 --kinds weights,channels --levels 0.5,0.9 --tolerances 0.5,0.9 "
    "--epochs 3 --tune-epochs 1",
    "distillation": "--seeds 0,1 --temperatures 2 --sparsities 0.8,0.9 --epochs 2 --tune-epochs 1 --few 50 "
    "--few-epochs 2 --few-tune-epochs 1 --teacher-epochs 1 --student-epochs 1",
    "one_shot": "--seeds 0,1 --parts entries,statistics --methods magnitude,wanda,alps --sparsities 0.5 "
    "--epochs 3 --batch-size 50 --examples 50 --no-times",
    "recipe": f"{_RECIPE} --seeds 0,1,2 --epochs 2 --tune-epochs 1",
}

_SHIFTS = (-1e9, -86400.0, 0.0, 3600.0, 1e9)


def flags(study: str, folder: Path) -> list[str]:
    """Return the command line of a study's small run."""
    return [*STUDIES[study].split(), *_SMALL, "--out", str(folder)]


def kill_at(folder: Path, number: int, word: str = "") -> None:
    """Kill this process just before its n-th change of files below a folder whose path contains `word`."""
    seen = 0
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & writes:
                return
        elif event not in changes:
            return
        name = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else ""
        if str(name).startswith(str(folder)) and word in str(name):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def jumping_clock(seed: int) -> None:
    """Make this process's clock jump back and forth at every look, by seconds and by decades."""
    rng, now = random.Random(seed), time.time
    time.time = lambda: now() + rng.choice(_SHIFTS)


def study(name: str, folder: Path, log: Path, before: Callable[..., None] | None, args: tuple) -> None:
    """Run a study to its end, in a process of its own, with all that it says in a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if before is not None:
        before(*args)
    command_module(name).main(flags(name, folder))


class Runner:
    """Starts processes from a server that has imported everything; the folder is for logs and programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *(command_module(name).__name__ for name in STUDIES)])

    def start(self, target: Callable[..., None], *args: object):
        """Return a process that calls a function of a module."""
        process = self._context.Process(target=target, args=args)
        process.start()
        return process

    def study(self, name: str, folder: Path, before: Callable[..., None] | None = None, *args: object):
        """Return a study's small run; `before(*args)` is called in its process."""
        return self.start(study, name, folder, self.log(folder), before, args)

    def log(self, folder: Path) -> Path:
        """Return what the last run with this folder has said."""
        return self.folder / f"{folder.name}.log"

    def finish(self, process, folder: Path, damaged: bool = False) -> None:
        """Wait for a good end, for which no checkpoint was found damaged unless one may be."""
        process.join()
        said = self.log(folder).read_text()
        assert process.exitcode == 0, said[-3000:]
        assert damaged or "is damaged" not in said, said[-3000:]


def lines(folder: Path) -> list[dict]:
    """Return the lines of a run that has ended, but for where they were written, and by which process."""
    out = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for line in out:
        del line["command"]
        line["config"] = {k: v for k, v in line["config"].items() if k not in ("out", "dense")}
    return out


def files(folder: Path) -> dict[str, bytes]:
    """Return the files that belong to the lines of a run that has ended: masks, recipes, networks."""
    assert not (folder / UNFINISHED).exists()
    kept = [*folder.glob("masks/*"), *folder.glob("recipes/*"), *folder.glob("*.jaxprune")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(kept)}


def check_same(folder: Path, whole: Path) -> None:
    """Check that a run that was stopped, and has ended, is as one that was not, to the bit."""
    assert lines(folder) == lines(whole)
    assert files(folder) == files(whole)
    assert not list(folder.rglob("*tmp*"))


def steps(folder: Path) -> list[Path]:
    """Return the folders of the checkpoints, the last level of each chain last."""
    found = [path for path in folder.glob("*/*/*") if path.name.isdigit()]
    return sorted(found, key=lambda path: (path.parent, int(path.name)))


def damage(step: Path, rng: random.Random) -> str:
    """Cut, empty, delete or flip a bit of one file of a checkpoint, most likely a large one; say which."""
    files = [path for path in sorted(step.rglob("*")) if path.is_file()]
    (file,) = rng.choices(files, [path.stat().st_size + 1 for path in files])
    data = bytearray(file.read_bytes())
    kind = rng.choice(("delete", "empty", "cut", "flip", "flip", "zero"))
    if kind == "delete":
        file.unlink()
    else:
        if kind == "flip" and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        changed = {"empty": b"", "cut": bytes(data[: len(data) // 2]), "zero": bytes(len(data))}
        file.write_bytes(changed.get(kind, bytes(data)))
    return f"{kind} {file.relative_to(step)}"
