"""Runs that are killed, preempted, short of room or not alone lose nothing, and say what has happened.

`python -m tests.soak.faults` does the same to every study, at many more moments.
"""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gradual, lottery_ticket
from experiments.report import read
from experiments.run import stopping
from experiments.run.checkpoint import Checkpoints, forget
from experiments.run.results import Results
from jaxprune.recipes.document import from_yaml
from tests.studies import runs


@dataclass(frozen=True)
class Config:
    """Of a study that is done in no time."""

    seeds: tuple[int, ...] = (0, 1)
    lr: float = 0.1
    out: str = ""
    fresh: bool = False


UNITS = 3
MASKS = {"kernel": np.arange(12).reshape(3, 4) % 3 == 0}


def toy(folder, config=Config(), **options):
    """What a study does: something trained once, units of lines, masks, a network."""
    with Results(folder, "toy", config, **{"resume": True, **options}) as results:
        dense = results.once("dense", lambda: {"w": np.arange(5.0) * config.lr})
        for unit in range(UNITS):
            if not results.done(unit=unit):
                accuracy = dense["w"][unit]
                figures = [{"unit": unit, "seed": seed, "accuracy": accuracy} for seed in config.seeds]
                figures[0]["masks"] = results.keep_masks(f"unit-{unit}", MASKS)
                results.add(figures)
        results.file("network").write_bytes(b"weights")
    return results.lines


def toy_stopped(folder, config=Config(), units=1):
    """The same, which comes to nothing after some units."""
    with Results(folder, "toy", config, resume=True) as results:
        for unit in range(units):
            results.add([{"unit": unit, "seed": seed, "accuracy": 0.125} for seed in config.seeds])
        raise RuntimeError("stopped")


def toy_preempted(folder, done):
    with stopping.exit_with_message(folder), Results(folder, "toy", Config(), resume=True) as results:
        results.write(unit=0)
        with stopping.shielded():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("whole")
        done.append("too much")


def preempted_at_once(folder):
    with stopping.exit_with_message(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


def killed(function, folder, number, *args):
    runs.kill_at(folder, number)
    function(folder, *args)


def toy_levels(folder):
    """The same with checkpoints: each level's state is made of the one before."""
    with Checkpoints(folder, {"a": 1}) as checkpoints:
        w = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
        state, found = {"w": w, "level": np.int32(0)}, []
        if saved := checkpoints.restore(state):
            state, found = saved
        for level in range(len(found), 4):
            state = {"w": state["w"] * 1.5 + level, "level": np.int32(level)}
            found = [*found, {"level": level, "sum": float(state["w"].sum())}]
            checkpoints.save(level, state, found)
    return state, found


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            patch.setenv(name, "")
        yield runs.Runner(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runner):
    """A lottery-ticket run that nothing befell."""
    folder = runner.folder / "whole"
    runner.finish(runner.study("lottery_ticket", folder), folder)
    return folder


@contextlib.contextmanager
def tmpfs(folder, options):
    """A small disk of its own."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def text(folder):
    return (folder / "results.jsonl").read_text()


# --- killed


def test_killed_at_any_change_of_its_files_results_are_the_old_ones_or_the_new(runner, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    toy(old)
    toy(new, Config(lr=0.2))
    folder, kills = tmp_path / "run", 0
    for number in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        toy(folder)
        process = runner.start(killed, toy, folder, number, Config(lr=0.2))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert runs.lines(folder) in (runs.lines(old), runs.lines(new))
        toy(folder, Config(lr=0.2))
        runs.check_same(folder, new)
        assert (folder / "network").read_bytes() == b"weights"
    assert kills > 15


def test_killed_at_any_change_of_a_checkpoint_it_is_the_level_before(runner, tmp_path):
    state, found = toy_levels(tmp_path / "whole")
    kills = 0
    for number in range(1, 1000, 5):
        folder = tmp_path / str(number)
        process = runner.start(killed, toy_levels, folder, number)
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        again, lines = toy_levels(folder)
        assert lines == found
        np.testing.assert_array_equal(again["w"], state["w"])
        assert not list(folder.glob("*tmp*"))
    assert kills > 5


def test_a_lottery_run_stopped_in_every_way_ends_bit_identical(runner, whole, tmp_path):
    broken, rng, takes = tmp_path / "broken", random.Random(0), 0.0
    began = time.monotonic()
    # In the middle of a checkpoint's writing.
    process = runner.study("lottery_ticket", broken, runs.kill_at, broken, 3, "orbax-checkpoint-tmp")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(broken.rglob("*.orbax-checkpoint-tmp*"))
    takes = time.monotonic() - began

    # Preempted once it has saved something, with a clock that jumps.
    process = runner.study("lottery_ticket", broken, runs.jumping_clock, 0)
    while process.is_alive() and not runs.steps(broken):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    said = runner.log(broken).read_text()
    assert "Stopped by SIGTERM. " in said
    assert "The same command resumes from there." in said
    assert "Traceback" not in said
    assert not list(broken.rglob("*tmp*"))

    # Killed at a random moment.
    process = runner.study("lottery_ticket", broken)
    process.join(rng.uniform(0.3, 0.8) * takes)
    process.kill()
    process.join()

    # What was saved last is damaged; its time says that it is yet to come.
    last = runs.steps(broken)[-1]
    for file in last.rglob("metadata"):
        file.write_text(file.read_text().replace("0", "1", 1))
    os.utime(last, (2**32, 2**32))
    process = runner.study("lottery_ticket", broken, runs.jumping_clock, 1)
    runner.finish(process, broken, damaged=True)
    assert f"{last} is damaged" in runner.log(broken).read_text()
    runs.check_same(broken, whole)

    # Other settings are refused before anything is trained or written.
    before = text(broken)
    with pytest.raises(SystemExit, match=r"holds a run with other settings \(lr\).*--fresh"):
        lottery_ticket.main([*runs.flags("lottery_ticket", broken), "--lr", "0.5"])
    assert text(broken) == before
    assert not (broken / "unfinished").exists()


def test_a_study_of_units_goes_on_with_its_finished_ones(runner, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    runner.finish(runner.study("gradual", whole), whole)
    # Before what was trained once is kept; and before the second method's masks are.
    for number, word in ((2, "kept"), (5, "masks")):
        process = runner.study("gradual", broken, runs.kill_at, broken, number, word)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (broken / "results.jsonl").exists()
    kept = (broken / "unfinished" / "results.jsonl").read_text().split("\n")
    methods = [json.loads(line)["method"] for line in kept if line]
    assert methods == ["dense", "dense", "global", "global"]
    runner.finish(runner.study("gradual", broken), broken)
    runs.check_same(broken, whole)


# --- lines


def test_a_failed_run_leaves_the_earlier_results_and_what_it_had(tmp_path):
    toy(tmp_path)
    before = text(tmp_path)
    with pytest.raises(RuntimeError):
        toy_stopped(tmp_path, Config(lr=0.5))
    assert text(tmp_path) == before
    lines, notes = read.read([tmp_path])
    assert len(lines) == 2 * UNITS
    assert any("of a run that has not ended, was left out" in note for note in notes)
    assert len(read.read([tmp_path / "unfinished"])[0]) == 2
    with pytest.raises(SystemExit, match=r"other settings \(lr\).*--fresh to start over"):
        toy(tmp_path)
    assert len(toy(tmp_path, Config(lr=0.5))) == 2 * UNITS
    assert json.loads(text(tmp_path).splitlines()[0])["accuracy"] == 0.125  # not run again
    assert from_yaml((tmp_path / "recipe.yaml").read_text(), "").plain()["config"]["lr"] == 0.5
    with pytest.raises(RuntimeError):
        toy_stopped(tmp_path)
    assert toy(tmp_path, resume=False)[0]["accuracy"] == 0


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_unit_is_no_result(tmp_path, cut):
    with pytest.raises(RuntimeError):
        toy_stopped(tmp_path, units=2)
    file = tmp_path / "unfinished" / "results.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * (60 - cut) // 60])
    if cut < 50:
        assert 1 <= len(read.read([tmp_path])[0]) <= 4
    with Results(tmp_path, "toy", Config(), resume=True) as results:
        units = [line["unit"] for line in results.lines]
        assert units == ([0, 0] if cut < 30 else [])
    assert [json.loads(line)["unit"] for line in text(tmp_path).splitlines()] == units


def test_lines_that_are_damaged_are_refused(tmp_path):
    with pytest.raises(RuntimeError):
        toy_stopped(tmp_path)
    file = tmp_path / "unfinished" / "results.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"unit"', b"unit", 1))
    with pytest.raises(SystemExit, match=r"results.jsonl cannot be resumed from .* or --fresh to start over"):
        toy(tmp_path)
    assert len(toy(tmp_path, resume=False)) == 2 * UNITS


def test_lines_are_added_to_those_of_a_finished_run(tmp_path):
    options = {"adds": True, "may_differ": ("seeds", "out", "fresh")}
    toy(tmp_path, **options)
    before = text(tmp_path)
    with Results(tmp_path, "toy", Config(seeds=(7,)), resume=True, **options) as results:
        assert results.done(unit=0, seed=1)
        results.write(unit=0, seed=7)
    assert text(tmp_path).startswith(before)
    with pytest.raises(SystemExit, match=r"other settings \(lr\)"):
        toy(tmp_path, Config(lr=0.2), **options)
    (tmp_path / "unfinished" / "recipes").mkdir(parents=True)  # all that a kill may leave
    toy(tmp_path, **options)
    assert len(text(tmp_path).splitlines()) == 2 * UNITS + 1


# --- checkpoints


def test_other_settings_are_refused_and_fresh_starts_over(tmp_path):
    folder, config = tmp_path / "checkpoints", {"lr": 0.1, "seeds": (0, 1)}
    state = {"w": np.arange(3.0), "level": np.int32(2)}
    with Checkpoints(folder, config) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(0, state, [{"accuracy": 0.5}])
        state |= {"w": np.arange(3.0) + 1, "level": np.int32(3)}
        checkpoints.save(1, state, [{"accuracy": 0.5}, {"accuracy": 0.6}])
    with Checkpoints(folder, config) as checkpoints:
        restored, found = checkpoints.restore(state)
    assert restored["w"].tolist() == [1.0, 2.0, 3.0]
    assert int(restored["level"]) == 3
    assert found == [{"accuracy": 0.5}, {"accuracy": 0.6}]
    with pytest.raises(SystemExit, match=r"other settings \(lr\).*--fresh"):
        Checkpoints(folder, config | {"lr": 0.2})
    forget(folder)
    with Checkpoints(folder, config | {"lr": 0.2}) as checkpoints:
        assert checkpoints.restore(state) is None


# What orbax leaves of a reading that failed may complain once more when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_never_gone_on_with(tmp_path, capsys):
    state, found = toy_levels(tmp_path / "whole")
    rng, said = random.Random(0), []
    for number in range(40):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        levels = sorted(path for path in folder.iterdir() if path.name.isdigit())
        assert [path.name for path in levels] == ["2", "3"]
        for path in levels[-rng.choice((1, 1, 2)) :]:
            runs.damage(path, rng)
        again, lines = toy_levels(folder)
        assert lines == found
        np.testing.assert_array_equal(again["w"], state["w"])
        said.append(capsys.readouterr().err)
    assert sum("3 is damaged" in text for text in said) > 10
    assert any("2 is damaged" in text and "starting over" in text for text in said)
    gc.collect()


# --- not alone


def hold(folder, ready):
    with stopping.locked(folder):
        ready.set()
        time.sleep(60)


def test_a_second_run_in_a_folder_is_refused_until_the_first_one_ends(runner, tmp_path):
    ready = multiprocessing.get_context("forkserver").Event()
    process = runner.start(hold, tmp_path, ready)
    assert ready.wait(60)
    said = rf"{tmp_path} is being written by another run \(process {process.pid}\)"
    with pytest.raises(SystemExit, match=said):
        gradual.main(["--seeds", "0", "--train-size", "100", "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    process.kill()
    process.join()
    toy(tmp_path)
    with Checkpoints(tmp_path / "levels", {}), pytest.raises(SystemExit, match="another run"):
        Checkpoints(tmp_path / "levels", {})
    with stopping.locked(tmp_path / "levels"), pytest.raises(SystemExit, match="another run"):
        forget(tmp_path / "levels")


# --- preempted


def test_sigterm_waits_for_a_files_end(tmp_path, capsys):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    before, done = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as stop:
        toy_preempted(tmp_path, done)
    assert (stop.value.code, done) == (143, ["whole"])
    said, kept = capsys.readouterr().err, tmp_path / "unfinished"
    assert f"Stopped by SIGTERM. 1 line of results is kept in {kept}. The same command resumes" in said
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(SystemExit) as stop:
        preempted_at_once(tmp_path)
    assert stop.value.code == 143
    assert "Nothing that it had finished is lost" in capsys.readouterr().err
    assert len(toy(tmp_path)) == 1 + 2 * (UNITS - 1)


# --- no room, no right


def limited(folder, size, queue):
    """Runs the toy study with files that may not grow beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        with stopping.exit_with_message(folder):
            toy(folder)
    except SystemExit as end:
        queue.put(str(end))
    else:
        queue.put(None)


def test_a_file_that_may_not_grow_ends_in_one_sentence_and_the_run_goes_on(runner, tmp_path):
    toy(tmp_path / "whole")
    folder, said = tmp_path / "run", []
    queue = multiprocessing.get_context("forkserver").Queue()
    for size in range(40, 4000, 330):
        runner.start(limited, folder, size, queue).join()
        said.append(queue.get(timeout=60))
        if said[-1] is None:
            break
        assert "cannot be written: File too large. Make room and give the same command again." in said[-1]
        assert "kept in" in said[-1] or "lines" not in said[-1]
    assert said[-1] is None and len(said) > 3
    runs.check_same(folder, tmp_path / "whole")


def test_a_full_disk_ends_in_one_sentence_and_the_run_goes_on(runner, whole, tmp_path):
    with tmpfs(tmp_path / "disk", "size=2500k") as disk:
        process = runner.study("lottery_ticket", disk / "run")
        process.join()
        said = runner.log(disk / "run").read_text()
        assert process.exitcode == 1, said
        assert "cannot be written: No space left on device. Make room and give the same command" in said
        assert "Traceback" not in said
        assert not list(disk.rglob("*orbax-checkpoint-tmp*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        runner.finish(runner.study("lottery_ticket", disk / "run"), disk / "run")
        runs.check_same(disk / "run", whole)


def test_no_thread_speaks_of_a_full_disk_in_its_own_words(tmp_path, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_value))
    state = [np.random.default_rng(i).normal(size=(300, 100)) for i in range(24)]
    for run in range(4):  # whether one did was a matter of chance
        with tmpfs(tmp_path / "disk", "size=2500k") as disk, Checkpoints(disk / str(run), {}) as levels:
            with pytest.raises(OSError, match="No space left"):
                levels.save(0, state, [])
            time.sleep(0.2)
    assert not unraisable


def test_levels_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        f"{dtype} {shape}": rng.integers(0, 2, shape).astype(jnp.dtype(dtype))
        for dtype in ("bool", "float32", "bfloat16", "int8", "uint32")
        for shape in [(), (0, 3), (5,), (3, 1, 7)]
    }
    state |= {"level": 3, "rate": 0.5}
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(0, state, [])
        restored, _ = checkpoints.restore(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert all(restored[name].dtype == np.asarray(state[name]).dtype for name in state)
        assert checkpoints.restore(state | {"more": np.zeros(1)}) is None


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    with tmpfs(tmp_path / "disk", "ro") as disk:
        message = rf"{disk}.* cannot be written: Read-only file system. Give another"
        for folder in (disk, disk / "new"):
            with pytest.raises(SystemExit, match=message), stopping.exit_with_message(folder):
                toy(folder)


@pytest.mark.parametrize("below", ["", "/x"])
def test_a_folder_that_is_a_file_is_refused(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    refused = pytest.raises(SystemExit, match=f"{file}.* cannot be a folder")
    with refused, stopping.exit_with_message(tmp_path):
        toy(Path(f"{file}{below}"))
    assert file.read_text() == "mine"


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(ConnectionError), stopping.exit_with_message(tmp_path):
        raise ConnectionError(errno.ECONNREFUSED, "no")
