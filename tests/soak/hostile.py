"""Hostile input, for as long as one likes: recipes, files, flags, pages of results, and values in Python.

    python -m tests.soak.hostile --seconds 600 --seed 0
    python -m tests.soak.hostile --only files --seed 12345 --cases 1

Whatever comes in ends in what it should or in a message of jaxprune's own: no code is run, nothing is
written, memory and time are bounded, no other exception is raised. It stops at the first case that breaks
this, and says how to make it again. The tests run some cases too.
"""

import argparse
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.quick import compile_quickly

if __name__ == "__main__":
    compile_quickly()

from tests.hostile import files, flags, pages, recipes, values
from tests.hostile.watch import watched

TARGETS = ("recipes", "files", "flags", "pages", "values")
MEMORY = 8 << 30  # bytes of address space that the command may take beside what it has when it begins


def cases(folder: Path, target: str) -> Callable[[int], str]:
    """Return `case(number)` of a target, which says how the case ended, with what it needs in a folder."""
    if target == "values":
        return lambda number: values.case(number, watched)
    at = folder / target
    at.mkdir()
    if target == "files":
        valid = files.Files(at)
        return lambda number: valid.case(number, at, watched)
    if target == "pages":
        pages.prepare(at)
    module = {"recipes": recipes, "flags": flags, "pages": pages}[target]
    return lambda number: module.case(number, at, watched)


def numbers(seed: int, count: int | None, seconds: float) -> Iterator[int]:
    """The numbers of cases: so many, or for so long."""
    end = time.monotonic() + seconds
    number = seed
    while (number < seed + count) if count is not None else (time.monotonic() < end):
        yield number
        number += 1


def main() -> None:
    """Runs cases from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together (default: 600)")
    parser.add_argument("--cases", type=int, help="so many of each target, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case (default: 0)")
    parser.add_argument("--only", choices=TARGETS, help="one of them")
    chosen = parser.parse_args()
    names = [chosen.only] if chosen.only else TARGETS
    with tempfile.TemporaryDirectory() as folder:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        warnings.simplefilter("ignore")
        print(f"{'target':<9}{'inputs':>9}{'seconds':>9}  how they ended")
        for target in names:
            started, found, case = time.monotonic(), Counter(), cases(Path(folder), target)
            for number in numbers(chosen.seed, chosen.cases, chosen.seconds / len(names)):
                try:
                    found[case(number)] += 1
                except BaseException:
                    print(f"{target}: python -m tests.soak.hostile --only {target} --seed {number} --cases 1")
                    raise
            said = ", ".join(f"{count:,} {how}" for how, count in found.most_common())
            print(f"{target:<9}{found.total():>9,}{time.monotonic() - started:>9.0f}  {said}", flush=True)


if __name__ == "__main__":
    main()
