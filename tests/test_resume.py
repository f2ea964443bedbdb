"""A lottery-ticket run killed at random moments ends as if it never was, to the bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import lottery_ticket
from experiments._checkpoint import Checkpoints

FLAGS = ["--seeds", "0,1", "--levels", "4", "--branch-levels", "2,4", "--epochs", "2", "--tune-epochs", "1"]
FLAGS += ["--train-size", "300", "--test-size", "100", "--methods", "ticket,reinit,one-shot,tune"]
KILLS = 20


def lines(folder):
    text = (folder / "results.jsonl").read_text().splitlines()
    out = []
    for line in map(json.loads, text):
        del line["config"]["out"]
        out.append(line)
    return out


def last_states(folder):
    out = {}
    for chain in sorted((folder / "checkpoints").iterdir()):
        with ocp.CheckpointManager(chain) as manager:
            step = manager.latest_step()
            restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
            out[chain.name] = step, [np.asarray(leaf) for leaf in jax.tree.leaves(restored["state"])]
    return out


def run(folder):
    """Runs the study with its output in a file; each call is a process of its own."""
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    lottery_ticket.main([*FLAGS, "--out", str(folder)])


def finish(process):
    process.join()
    assert process.exitcode == 0


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run in a new process, from a server that has imported everything already."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "experiments.lottery_ticket"])

    def start(folder):
        process = context.Process(target=run, args=(folder,))
        process.start()
        return process

    return start


def test_killed_at_random_moments_it_ends_bit_identical(start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(whole))
    began = time.monotonic()
    finish(start(tmp_path / "again"))  # compiled programs are in the cache now
    assert lines(tmp_path / "again") == lines(whole)
    takes = time.monotonic() - began

    rng = random.Random(0)
    kills, ends, levels = 0, 0, set()
    while kills < KILLS:
        process = start(broken)
        # Anywhere in what is left of a run: starting, training, writing a level.
        process.join(rng.uniform(0.1, 1.0) * takes)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            levels.add(
                tuple(sorted(p.name for p in (broken / "checkpoints").glob("*/*") if p.name.isdigit()))
            )
        else:
            # It came to its end before; begin again.
            assert process.exitcode == 0, broken.with_suffix(".log").read_text()[-3000:]
            assert lines(broken) == lines(whole)
            broken.rename(tmp_path / f"ended{ends}")
            ends += 1
    assert len(levels) > 2  # the kills met the run at different levels

    finish(start(broken))
    assert lines(broken) == lines(whole)
    ours, theirs = last_states(broken), last_states(whole)
    assert ours.keys() == theirs.keys() == {"ticket", "tune"}
    for chain, (step, leaves) in theirs.items():
        assert ours[chain][0] == step == 4
        for mine, other in zip(ours[chain][1], leaves, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_other_settings_are_refused_and_fresh_starts_over(tmp_path):
    folder, config = tmp_path / "checkpoints", {"lr": 0.1, "seeds": (0, 1)}
    state = {"w": np.arange(3.0), "level": np.int32(2)}
    with Checkpoints(folder, config) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(0, state, [{"accuracy": 0.5}])
        checkpoints.save(
            1, {"w": np.arange(3.0) + 1, "level": np.int32(3)}, [{"accuracy": 0.5}, {"accuracy": 0.6}]
        )
    with Checkpoints(folder, config) as checkpoints:
        restored, found = checkpoints.restore(state)
    assert restored["w"].tolist() == [1.0, 2.0, 3.0]
    assert int(restored["level"]) == 3
    assert found == [{"accuracy": 0.5}, {"accuracy": 0.6}]
    with pytest.raises(SystemExit, match=r"other settings \(lr\).*--fresh"):
        Checkpoints(folder, config | {"lr": 0.2})


def test_a_refused_run_leaves_the_old_results_alone(tmp_path):
    flags = ["--levels", "0", "--epochs", "1", "--seeds", "0", "--train-size", "100", "--methods", "ticket"]
    lottery_ticket.main([*flags, "--out", str(tmp_path)])
    before = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"other settings \(lr\)"):
        lottery_ticket.main([*flags, "--lr", "0.5", "--out", str(tmp_path)])
    assert (tmp_path / "results.jsonl").read_text() == before
    lottery_ticket.main([*flags, "--lr", "0.5", "--fresh", "--out", str(tmp_path)])
    assert (tmp_path / "results.jsonl").read_text() != before


def test_a_write_that_was_cut_short_is_no_level(tmp_path):
    folder = Path(tmp_path / "checkpoints")
    state = {"w": np.arange(3.0)}
    with Checkpoints(folder, {}) as checkpoints:
        checkpoints.save(0, state, [])
    # What a kill leaves of a level that was being written.
    (folder / "1.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(folder, {}) as checkpoints:
        restored, _ = checkpoints.restore(state)
    assert restored["w"].tolist() == [0.0, 1.0, 2.0]
