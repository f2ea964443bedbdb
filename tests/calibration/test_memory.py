"""How much memory `prune_layers` takes beside the network and its result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.calibration.memory import DEPTH, HIDDEN, TOKENS, VOCAB, WIDTH

PROC = Path("/proc/self/clear_refs")


@pytest.mark.skipif(not os.access(PROC, os.W_OK), reason="this system does not tell the most resident memory")
def test_a_mapped_network_takes_the_memory_of_one_block(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # else the C library keeps freed arrays of up to 32 MB
    }
    command = [sys.executable, "-W", "error", "-m", "tests.calibration.memory", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["layers"] == 2 * DEPTH
    in_block = 2 * WIDTH * HIDDEN
    # Pages of the file that were read, bfloat16, count as resident; so does what is returned: weights in
    # bfloat16, and masks of one byte each.
    given = 2 * (DEPTH * in_block + VOCAB * WIDTH)
    returned = (2 + 1) * DEPTH * in_block
    block = 4 * in_block  # in float32, as the network multiplies by it
    gram_and_factor = 2 * 4 * HIDDEN**2
    activations = 4 * TOKENS * (WIDTH + HIDDEN)
    working = found["peak"] - given - returned
    assert working <= 1.5 * (block + gram_and_factor + activations), working / 2**20
    assert found["left"] < 2**20, "arrays stay on the device after the run"
