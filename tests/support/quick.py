"""XLA's flags for tests, which compile thousands of programs that run a few times."""

import os
import re
from importlib.metadata import version

_FLAGS = ["--xla_backend_optimization_level=0"]
if tuple(map(int, re.findall(r"\d+", version("jaxlib"))[:2])) < (0, 11):
    # XLA leaves a process that gives it a flag which it does not know, or not any more.
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]


def compile_quickly() -> None:
    """Set them, before JAX starts, unless XLA_FLAGS of one's own are there.

    Compiling takes a quarter of the time. The passes that rewrite and fuse operations, which are those that
    could break a zero, are left alone.
    """
    os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
