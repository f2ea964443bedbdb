"""Starts the processes of one run on this machine, and stops them all when one fails."""

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

_LAST_LINES = 15


def free_address() -> str:
    """Return an address of this machine that nothing listens on yet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def launch(commands: Sequence[Sequence[str]], quiet: bool = False) -> None:
    """Run commands side by side until all have ended; the first one alone prints, its errors only if `quiet`.

    Raises:
      SystemExit: one has failed; the others are killed, and its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [os.path.join(folder, str(number)) for number in range(len(commands))]
        processes = []
        try:
            for number, command in enumerate(commands):
                with open(logs[number], "wb") as log:
                    out = None if number == 0 and not quiet else subprocess.DEVNULL
                    error = None if number == 0 else log
                    processes.append(subprocess.Popen(command, stdout=out, stderr=error))
            with ThreadPoolExecutor(len(processes)) as pool:
                ends = {pool.submit(process.wait): i for i, process in enumerate(processes)}
                try:
                    for end in as_completed(ends):
                        if code := end.result():
                            raise SystemExit(_message(ends[end], len(processes), code, logs[ends[end]]))
                finally:  # before the pool waits for its threads, and they for the processes
                    _kill(processes)
        finally:
            _kill(processes)


def _kill(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _message(number: int, count: int, code: int, log: str) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    with open(log, encoding="utf-8", errors="replace") as file:
        last = "".join(file.readlines()[-_LAST_LINES:]).strip()
    others = "; the others were stopped" if count > 1 else ""
    where = "What it said is above" if number == 0 else f"Its last lines:\n{last or '(none)'}"
    return f"process {number} of {count} {how}{others}. {where}"
