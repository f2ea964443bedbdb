"""A headless browser for tests: Chrome's own protocol over a pipe, without a driver or a network."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # pages are our own, and root has no sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name leads anywhere
    "--remote-debugging-pipe",
)
# Chrome reads commands from descriptor 3 and writes to 4; so early in a process they may be in use.
_START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_SECONDS = 90


class NoBrowser(Exception):
    """Why there is none to test with."""


class Browser:
    """One page of a browser.

    Attributes:
      events: everything the page has reported, as (method, parameters).
    """

    def __init__(self, folder: Path):
        """Starts the browser; `folder` is for its profile.

        Raises:
          NoBrowser: none is installed, or it does not start.
        """
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            raise NoBrowser(f"no browser is installed (looked for {', '.join(NAMES)})")
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        flags = [*FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(commands), str(answers), found, *flags],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._answers: Queue[dict[str, Any] | None] = Queue()
        self._session: str | None = None
        self._number = 0
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        try:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        except (NoBrowser, OSError):
            self.close()
            raise NoBrowser(f"{found} does not start here") from None
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def _listen(self) -> None:
        rest = b""
        while data := os.read(self._read, 1 << 16):
            *messages, rest = (rest + data).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.put(message)
                else:
                    self.events.append((message["method"], message["params"]))
        self._answers.put(None)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        try:
            answer = self._answers.get(timeout=_SECONDS)
        except Empty:
            answer = None
        if answer is None:
            raise NoBrowser(f"the browser said nothing to {method}")
        assert answer["id"] == self._number, answer
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Opens a file in a window of a width, and waits until it has loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=file.absolute().as_uri())
        wait = """new Promise(done => document.readyState === "complete" ? done(location.href)
                  : addEventListener("load", () => done(location.href)))"""
        assert self.run(wait) == file.absolute().as_uri()

    def run(self, code: str) -> Any:
        """The value of an expression of JavaScript in the page, a promise's if it is one."""
        found = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        """Ends the browser."""
        if self._process.poll() is None and self._session:
            self._session = None
            try:
                self.send("Browser.close")
            except (NoBrowser, OSError):
                self._process.kill()
        elif self._process.poll() is None:
            self._process.kill()
        self._process.wait(_SECONDS)
        os.close(self._write)
        self._reader.join(_SECONDS)
        os.close(self._read)
