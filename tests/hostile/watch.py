"""Watch that hostile input never runs code, writes, or takes much memory or time."""

import os
import sys
import time
import tracemalloc
from contextlib import contextmanager

# What no file, recipe or flag may lead to. Audit events of Python: see its library reference.
FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
    *("pickle.find_class", "code.__new__", "ctypes.dlopen", "os.kill"),
    *("socket.connect", "socket.bind", "urllib.Request", "webbrowser.open", "shutil.rmtree"),
    *("os.remove", "os.rename", "os.rmdir", "os.chmod", "os.symlink", "os.link", "os.truncate", "os.mkdir"),
)
SECONDS = 20  # of CPU, on a busy machine; what is found takes minutes

_state = {"on": False, "hooked": False, "seen": [], "writes": None}


def _hook(event, arguments):
    if not _state["on"]:
        return
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in FORBIDDEN or writes:
        own = _state["writes"]
        if (
            own is not None
            and event in ("open", "os.mkdir")
            and os.path.realpath(arguments[0]).startswith(own)
        ):
            return
        _state["seen"].append((event, repr(arguments)[:200]))
        raise RuntimeError(f"hostile input led to {event}")


@contextmanager
def watched(peak=None, writes=None):
    """Raise AssertionError if the block does something forbidden, takes over `peak` bytes or too long.

    Writing below the folder `writes` is allowed.
    """
    if not _state["hooked"]:
        sys.addaudithook(_hook)  # stays, and does nothing outside of such blocks
        _state["hooked"] = True
    _state["seen"].clear()
    _state["writes"] = None if writes is None else os.path.realpath(writes) + os.sep
    started = time.process_time()
    if peak is not None:
        tracemalloc.start()
    _state["on"] = True
    try:
        yield
    finally:
        _state["on"] = False
        most = tracemalloc.get_traced_memory()[1]
        if peak is not None:
            tracemalloc.stop()
        assert not _state["seen"], f"it led to {_state['seen']}"
        assert peak is None or most <= peak, f"it took {most:,} bytes, {peak:,} are allowed"
        assert time.process_time() - started < SECONDS, f"it took {time.process_time() - started:.0f} s"
