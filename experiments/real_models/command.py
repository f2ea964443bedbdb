"""Other people's models, pruned and compacted: what is reached, and whether it is right.

Each model is built small and at random, its coupled channels are found, 30 % of the units of every group that
can lose some are pruned by magnitude, and the network is compacted. The small network is compared with the
masked one, and again with the dense one at random values of the small params, put back among zeros.

    python -m experiments.real_models --list
    python -m experiments.real_models --only "haiku/*,keras/VGG16"
    python -m experiments.real_models                       # hours; what is done is not done again
    python -m experiments.real_models --page docs/results/real-models.md

Every model runs in a process of its own, with a limit of time and of memory; models whose libraries are not
installed are left out, and named. The extra `models` has the libraries. What earlier versions reached lies in
experiments/real_models/baseline.csv, and what has become worse since is listed.
"""

import fnmatch
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from experiments.real_models import measure, page, table
from experiments.real_models.case import Model
from experiments.real_models.catalog import MODELS
from experiments.run import stopping
from experiments.run.limits import FlagError, Items, Range
from experiments.run.results import Results
from experiments.run.settings import Count, File, Folder, Natural, Positive, Settings, parse

ROOT = Path(__file__).resolve().parents[2]
BASELINE = "experiments/real_models/baseline.csv"


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the command."""

    # models of these names, with * and ?; all by default
    only: Annotated[tuple[str, ...], Items(empty=True)] = ()
    list: bool = False  # print the models' names and libraries, and measure nothing
    again: bool = False  # measure models that are done again
    retry: bool = False  # measure models again that failed, or ran out of time or memory
    # of the units of every group that can lose some
    fraction: Annotated[float, Range(above=0, below=1)] = 0.3
    seed: Natural = 0  # of params and inputs
    timeout: Count = 600  # seconds for one model
    memory: Positive = 12.0  # gigabytes for one model
    jobs: Annotated[int, Range(at_least=1, at_most=64)] = 1  # models at a time
    baseline: str = BASELINE  # a table of what was reached before; - for none
    csv: File | None = None  # write the figures as such a table
    page: File | None = None  # write a page in Markdown, and its picture beside it
    fresh: bool = False  # start over, whatever is done
    out: Folder = "results/real-models"  # folder for results.jsonl


_MAY_DIFFER = tuple(field for field in Config.__dataclass_fields__ if field not in ("fraction", "seed"))


def chosen(patterns: Sequence[str]) -> list[Model]:
    """Return the models of some names, in the order of the list.

    Raises:
      FlagError: a pattern that fits no model.
    """
    names = [model.name for model in MODELS]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise FlagError(f"--only: no model is called {pattern!r}; --list prints the names")
    return [
        model
        for model in MODELS
        if not patterns or any(fnmatch.fnmatchcase(model.name, pattern) for pattern in patterns)
    ]


def in_process(model: Model, config: Config) -> dict[str, Any]:
    """Measure a model in a process of its own; `status` says if it ran out of time or memory, or died."""
    command = measure.arguments(model.name, config.fraction, config.seed, config.memory)
    line = {"model": model.name, "kind": model.kind, "ours": model.ours, "note": model.note}
    line |= {"packages": model.versions(), "fraction": config.fraction, "seed": config.seed, "seconds": {}}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=measure.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            output, errors = process.communicate(timeout=config.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return line | {"status": "timeout", "reason": f"it took more than {config.timeout} seconds"}
        except BaseException:
            process.kill()
            raise
    found = measure.read(output)
    if found is not None:
        return found
    last = (errors.strip().splitlines() or [""])[-1]
    if measure.out_of_memory(errors):
        return line | {"status": "memory", "reason": f"{config.memory:g} gigabytes were not enough"}
    return line | {"status": "died", "reason": f"exit status {process.returncode}: {last[:300]}"}


def measure_all(models: Sequence[Model], config: Config, results: Results) -> None:
    """Measure those that are not done, and writes a line for each as soon as it is there."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    done = table.latest(results.lines)
    ended = ("ok", "wrong", "refused", "broken")
    left = [
        model
        for model in models
        if config.again
        or model.name not in done
        or (config.retry and done[model.name]["status"] not in ended)
    ]
    with ThreadPoolExecutor(config.jobs) as pool, tqdm(total=len(left), unit="model") as bar:
        waiting = {pool.submit(in_process, model, config): model for model in left}
        try:
            for future in as_completed(waiting):
                line = future.result()
                results.write(**line)
                bar.set_description(line["model"], refresh=False)
                bar.write(table.row(line))
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the models and returns the latest line of each, those of earlier runs included."""
    models = chosen(config.only)
    missing = {model.name: model.missing() for model in models if model.missing()}
    if len(missing) == len(models):
        packages = sorted({package for some in missing.values() for package in some})
        raise FlagError(f"--only: none of the models' libraries is installed: {', '.join(packages)}")
    there = [model for model in models if model.name not in missing]
    with Results(
        config.out, "real_models", config, resume=not config.fresh, adds=True, may_differ=_MAY_DIFFER
    ) as results:
        print(table.heading())
        measure_all(there, config, results)
        lines = results.lines
    if missing:
        print(f"\nNot installed, so left out: {', '.join(missing)}")
    order = {model.name: number for number, model in enumerate(MODELS)}
    latest = table.latest(lines)
    return sorted(latest.values(), key=lambda line: order.get(line["model"], len(order)))


def names(models: Sequence[Model]) -> str:
    """Return the models with their libraries, and whose code they are."""
    rows = []
    for model in models:
        missing = model.missing()
        there = (
            f"not installed: {', '.join(missing)}"
            if missing
            else ", ".join(f"{package} {number}" for package, number in model.versions().items())
        )
        rows.append(f"{model.name:<48}{'ours' if model.ours else '':<6}{there}")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = parse(Config, argv, __doc__)
    with stopping.exit_with_message(config.out):
        if config.list:
            print(names(chosen(config.only)))
            return
        baseline = None if config.baseline == "-" else table.read_baseline(ROOT / config.baseline)
        lines = run(config)
        print(f"\n{table.summarise(lines)}")
        if baseline is not None:
            print(f"\n{table.compared(lines, baseline)}")
        if config.csv is not None:
            table.write_csv(lines, Path(config.csv))
        if config.page is not None:
            page.write(lines, baseline, Path(config.page))
    print(f"\nWrote results.jsonl to {config.out}")
