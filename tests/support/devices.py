"""Running a piece of a test on eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path


def on_eight_devices(code: str) -> str:
    """Return what some code prints, in a process of its own: the number of devices is fixed when JAX starts.

    Raises:
      AssertionError: it failed, or printed that something did; warnings are errors.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0 and "FAILED" not in done.stdout, f"{done.stdout}\n{done.stderr}"
    return done.stdout
