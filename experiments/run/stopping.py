"""How a study ends when it is stopped, or cannot write: with one sentence, and nothing half written.

A run that is killed leaves what it had finished; see `Results` and `Checkpoints`. SIGTERM, with which
clusters take a machine back, does the same more politely: `exit_with_message` says what is kept and ends
the command with status 143. Python sees the signal between two of its own instructions, so a compiled
program that runs, a level or an epoch of training, comes to its end first. Should SIGKILL follow before
that, nothing is lost but what was under way.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: there two runs in one folder are not told apart
    fcntl = None

from experiments.data.datasets import explain_missing_data

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_A_FILE = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class Preempted(SystemExit):
    """SIGTERM has come; as the end of a command it gives status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class _Signal:
    """Whether SIGTERM has come, and how many blocks are not to be cut by it."""

    came = False
    shields = 0


def _on_sigterm(number: int, frame: Any) -> None:
    del number, frame
    _Signal.came = True
    if not _Signal.shields:
        raise Preempted


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Protect a short block, such as writing a file, from SIGTERM: the run ends right after it."""
    _Signal.shields += 1
    try:
        yield
    finally:
        _Signal.shields -= 1
    # Also where the signal came before, and what it raised was swallowed, as in a destructor.
    if _Signal.came and not _Signal.shields:
        raise Preempted


@contextlib.contextmanager
def exit_with_message(folder: str | Path) -> Iterator[None]:
    """End a command with a message and no traceback, where the message says all.

    On SIGTERM, with status 143; where its files cannot be written to `folder`; where its data cannot be had,
    or its flags do not go together.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _on_sigterm) if main else None
    try:
        with explain_missing_data():
            yield
    except Preempted as stop:
        kept = _kept(stop) or "Nothing that it had finished is lost."
        print(f"\nStopped by SIGTERM. {kept}", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (*_FULL, *_FORBIDDEN, *_A_FILE):
            raise
        raise SystemExit(f"{_problem(error, folder)} {_kept(error)}".rstrip()) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            _Signal.came = False


def keep(error: BaseException, kept: str) -> None:
    """Add what a run leaves to the exception that ends it, for the message."""
    vars(error)["kept"] = f"{_kept(error)} {kept}".strip()


def _kept(error: BaseException) -> str:
    return vars(error).get("kept", "")


def _problem(error: OSError, folder: str | Path) -> str:
    """Return what could not be written, why, and what to do."""
    name = error.filename
    if not isinstance(name, str) or Path(name).name.startswith("."):  # a file of ours under another name
        name = folder
    reason = os.strerror(error.errno or 0)
    if error.errno in _FULL:
        return f"{name} cannot be written: {reason}. Make room and give the same command again."
    if error.errno in _A_FILE:
        return (
            f"{name} cannot be a folder: there is a file in its place. Give another --out, or move the file."
        )
    return f"{name} cannot be written: {reason}. Give another --out, or make it writable."


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Make a folder, and keeps other runs from writing to it.

    The lock is the operating system's: it ends with the process, however that ends, so nobody has to clear
    it away. The file `.lock` stays and means nothing by itself. Where a file system has no
    locks, or on Windows, two runs are not told apart.

    Raises:
      SystemExit: another run has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                number = file.read().strip()
                process = f" (process {number})" if number else ""
                raise SystemExit(
                    f"{folder} is being written by another run{process}. Wait until it has ended, or give "
                    "another --out."
                ) from None
            except OSError:
                pass
        with contextlib.suppress(OSError):  # on a full disk the message goes without the number
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield
