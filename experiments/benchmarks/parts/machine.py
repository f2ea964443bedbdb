"""The machine that figures are of."""

import importlib.util
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax

TORCH = importlib.util.find_spec("torch") is not None
NO_TORCH = "PyTorch is not installed (pip install torch), so its rows are left out."


def machine() -> str:
    """Return the processor, its cores that this process may use, the device and the versions.

    Example:
      >>> from experiments.benchmarks.parts.machine import machine
      >>> " cores, Python " in machine()
      True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = jax.devices()
    return (
        f"{_processor()}, {cores} cores, Python {platform.python_version()}, jax {jax.__version__}, "
        f"jaxlib {version('jaxlib')}, {len(devices)} x {devices[0].device_kind}"
    )


def _processor() -> str:
    """Return the processor's name; Linux tells it in a file, other systems through Python."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
