"""The bound on the memory of `recover` block by block, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of memory")
def test_block_by_block_takes_the_memory_of_one_block():
    """Beyond the result: of one block 12 times its params, two sets of activations, and the compiler.

    The 12 are: the params given and the teacher's (2), those tuned, before and after a step, and the best
    (3), Adam's moments before and after (4), gradients and updates (2), masks and arrays of one batch (1).
    """
    command = [sys.executable, "-m", "tests.calibration.recover_memory", "block"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(said.stdout)
    compiler = 32 * 2**20
    bound = found["result"] + 12 * found["block"] + 2 * found["activations"] + compiler
    assert found["better"]
    assert found["result"] < found["peak"] < bound < 3.5 * found["result"]
