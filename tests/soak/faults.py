"""Stops every study that can go on, again and again, and compares what it ends with with a run that was not.

Each study runs once undisturbed. Then it is stopped at random: by SIGKILL at a moment, by SIGKILL just
before one of its changes of files, by SIGTERM; its clock jumps; and now and then a checkpoint is damaged
before it goes on. Whenever a run comes to its end, and at last, its lines, masks, recipes and networks must
be those of the undisturbed one, to the bit; none lost, none doubled. Meanwhile the results of an earlier
run in the same folder must stay as they are.

    python -m tests.soak.faults --kills 20 --seed 0
    python -m tests.soak.faults --kills 5 --only lottery_ticket,gradual
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.studies import runs


def stop_again_and_again(runner: runs.Runner, name: str, stops: int, rng: random.Random) -> str:
    """Run a study with so many stops, check each end and what it leaves, and return a line of the table."""
    whole, again, broken = (runner.folder / f"{name}-{which}" for which in ("whole", "again", "broken"))
    runner.finish(runner.study(name, whole), whole)
    began = time.monotonic()
    runner.finish(runner.study(name, again), again)  # compiled programs are in the cache now
    runs.check_same(again, whole)
    takes = time.monotonic() - began
    done: Counter[str] = Counter()
    ended, longest = 0, 0.0
    while sum(done[kind] for kind in ("kill", "kill at a file", "SIGTERM")) < stops:
        kind = rng.choice(("kill", "kill at a file", "SIGTERM"))
        before: tuple = (runs.jumping_clock, rng.randrange(1000)) if rng.random() < 0.5 else ()
        if kind == "kill at a file":
            before = (runs.kill_at, broken, rng.randrange(1, 60))
        process = runner.study(name, broken, *before)
        if kind != "kill at a file":
            process.join(rng.uniform(0.05, 1.0) * takes)
            if process.exitcode is None:
                asked = time.monotonic()
                os.kill(process.pid, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
                process.join()
                longest = max(longest, time.monotonic() - asked)
        process.join()
        said = runner.log(broken).read_text()
        assert done["damage"] or "is damaged" not in said, said[-3000:]
        if process.exitcode == 0:
            runs.check_same(broken, whole)
            ended += 1
            if name in ("lottery_ticket", "channel_pruning"):  # else the next one begins anew
                shutil.rmtree(broken)
            continue
        if (broken / "results.jsonl").exists():  # of the run before, or just now this one's
            assert runs.lines(broken) == runs.lines(whole)
        expected = {"SIGTERM": 143}.get(kind, -signal.SIGKILL)
        early = kind == "SIGTERM" and process.exitcode == -signal.SIGTERM  # before the study's own code ran
        assert process.exitcode == expected or early, (kind, process.exitcode, said[-3000:])
        if kind == "SIGTERM" and not early:
            assert "Stopped by SIGTERM." in said and "Traceback" not in said, said[-3000:]
        done[kind] += 1
        if (levels := runs.steps(broken)) and rng.random() < 0.3:
            done["damage"] += 1
            runs.damage(rng.choice(levels), rng)
    runner.finish(runner.study(name, broken), broken, damaged=done["damage"] > 0)
    runs.check_same(broken, whole)
    kinds = (f"{done[kind]:>14}" for kind in ("kill", "kill at a file", "SIGTERM", "damage"))
    return f"{name:<16}{len(runs.lines(whole)):>6}{takes:>7.1f}{''.join(kinds)}{ended + 1:>6}{longest:>9.1f}"


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(runs.STUDIES), help="studies, comma-separated")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    if unknown := sorted(set(names) - set(runs.STUDIES)):
        parser.error(f"no study {', '.join(unknown)}; studies are {', '.join(runs.STUDIES)}")
    print(
        "study            lines  takes          kill  kill at a file  SIGTERM        damage  ends  longest",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        runner = runs.Runner(Path(folder))
        for name in names:
            rng = random.Random(f"{chosen.seed} {name}")
            print(stop_again_and_again(runner, name, chosen.kills, rng), flush=True)
    print("every run that was stopped ended as the one that was not, to the bit")


if __name__ == "__main__":
    sys.exit(main())
