"""A headless browser for tests: Debian's chromium, driven by selenium without a network."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox",  # pages are our own, and root has no sandbox
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost",  # no name leads anywhere
    *("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--disable-component-update", "--disable-extensions", "--disable-sync", "--no-first-run"),
)


class NoBrowser(Exception):
    """Why there is no browser to test with."""


class Browser:
    """One page of a browser."""

    def __init__(self, folder: Path):
        """Start the browser; `folder` is for its profile.

        Raises:
          NoBrowser: chromium or its driver is not installed, or does not start.
        """
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        driver = shutil.which("chromedriver")
        if found is None or driver is None:
            missing = " and ".join(["a browser"] * (found is None) + ["chromedriver"] * (driver is None))
            raise NoBrowser(f"{missing} not installed (in Debian: chromium and chromium-driver)")
        options = webdriver.ChromeOptions()
        options.binary_location = found
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        os.environ["SE_OFFLINE"] = "true"  # selenium never downloads a driver or a browser
        try:
            self._driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        except WebDriverException as error:
            raise NoBrowser(f"{found} does not start here: {error.msg}") from None

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of a width, and wait until it has loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.complaints(), self.requests()  # those of earlier pages are dropped
        self._driver.get(file.absolute().as_uri())
        assert self.run("location.href") == file.absolute().as_uri()

    def run(self, code: str) -> Any:
        """Return the value of an expression of JavaScript in the page."""
        return self._driver.execute_script(f"return ({code});")

    def complaints(self) -> list[dict[str, Any]]:
        """Return what the page has logged or thrown since the last look."""
        return self._driver.get_log("browser")

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for since the last look."""
        messages = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [parameters["request"]["url"] for parameters in sent]

    def close(self) -> None:
        """End the browser."""
        self._driver.quit()
