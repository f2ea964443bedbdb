"""Worker processes that take turns, so that what is compared never shares a process.

JAX and PyTorch both keep pools of threads, and how one is set up (devices, threads, affinity) holds
for a whole process. Here each contender has a process of its own, which imports its own framework
alone and waits in a blocking read while another has its turn: an idle pool takes no core.

This module imports nothing but the standard library, so that a worker has nothing else either.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[3]


class Worker:
    """An object in a process of its own: `worker("method", *args)` calls a method of it.

    It ends with the `with` block, or with the process that started it.
    """

    def __init__(self, target: str, **settings: Any):
        """Start the process and make the object of a class, "module:Class", from pickled settings."""
        self._pipe, theirs = multiprocessing.Pipe()
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = f"from experiments.benchmarks.parts.turns import serve; serve({theirs.fileno()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
            )
        self._pipe.send((target, settings))
        self._owed = True

    def ask(self, method: str, *args: Any) -> None:
        """Call a method without waiting for its result, which `answer` then gives."""
        if self._owed:
            self.answer()
        self._pipe.send((method, args))
        self._owed = True

    def __call__(self, method: str, *args: Any) -> Any:
        """Return the method's result."""
        self.ask(method, *args)
        return self.answer()

    def answer(self) -> Any:
        """Return the result of what was asked for last. Raises RuntimeError, with the worker's traceback."""
        self._owed = False
        try:
            done, result = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"a worker process ended with status {self._process.wait()}.") from None
        if not done:
            raise RuntimeError(f"a worker process raised:\n{result}")
        return result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.wait()


def serve(descriptor: int) -> None:
    """Return what a worker process runs: makes the object, then calls its methods until the pipe closes."""
    with Connection(descriptor) as pipe:
        made: Any = None
        while True:
            try:
                name, given = pipe.recv()
            except EOFError:
                return
            try:
                if made is None:
                    module, _, class_name = name.partition(":")
                    made = getattr(importlib.import_module(module), class_name)(**given)
                    pipe.send((True, None))
                else:
                    pipe.send((True, getattr(made, name)(*given)))
            except Exception:  # whatever it is, told to the process that asked
                pipe.send((False, traceback.format_exc()))
