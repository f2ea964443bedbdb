"""`python -m experiments.hf.large`, small: killed and resumed, on eight devices, its counts by hand."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.hf import plan
from tests.support.devices import on_eight_devices

SMALL = ["--params", "tiny", "--windows", "8", "--length", "16", "--method", "magnitude"]


def start(folder: Path, out: str, checkpoint: Path) -> subprocess.Popen:
    paths = ["--folder", str(folder), "--out", out, "--checkpoint", str(checkpoint)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
        # What one of the processes has compiled, the others read.
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "experiments.hf.large", *SMALL, *paths]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc")
def test_a_run_that_was_killed_ends_with_the_same_files(tmp_path):
    dense, layers = tmp_path / "dense", tmp_path / "layers"
    killed = start(dense, str(tmp_path / "killed"), layers)
    while not (layers / "layer-00003.npz").exists():
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for out, folder in (("resumed", layers), ("whole", tmp_path / "others")):
        run = start(dense, str(tmp_path / out), folder)
        text = run.communicate(timeout=300)[0]
        assert run.returncode == 0 and "GiB were resident (VmHWM)" in text
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()


DEVICES = """
from pathlib import Path
import jax, numpy as np
from experiments.hf import large
config = large.Config(params="tiny", windows=8, length=16, method="wanda", devices=8, save="orbax",
                      folder={dense!r}, out={out!r})
found = large.run(config)
assert found["gram"] <= 1e-6 and found["gap"] <= found["gram"], found
again = large.restore_orbax(Path({out!r}), jax.sharding.Mesh(np.array(jax.devices()[:3]), ("data",)))
eight = large.restore_orbax(Path({out!r}), large.data_mesh(8))
pairs = list(zip(jax.tree.leaves(again), jax.tree.leaves(eight), strict=True))
assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
assert {{len(a.sharding.device_set) for a, _ in pairs}} == {{3}}
assert any(not a.is_fully_replicated for _, a in pairs)
print("layers", found["layers"])
"""


def test_tokens_shared_out_to_eight_devices_give_the_same(tmp_path):
    dense, out = str(tmp_path / "dense"), str(tmp_path / "pruned")
    text = on_eight_devices(DEVICES.format(dense=dense, out=out))
    assert text.endswith("layers 14\n")
    assert "Gram matrices differ by at most" in text


def test_the_plan_counts_7b_as_by_hand():
    config, tokens = plan.LARGER["7B"], plan.LARGER_WINDOWS * plan.LARGER_LENGTH
    found = {name: operations / 1e15 for name, operations in plan.work(config, tokens).items()}
    in_block = 4 * 4096**2 + 3 * 4096 * 11008
    assert np.isclose(found["forward"], 32 * 2 * in_block * tokens / 1e15)
    assert round(found["forward"], 1) == 3.4 and round(found["Gram"], 1) == 2.9
    assert plan.memory(config, tokens).gram == 2 * 4 * 11008**2
