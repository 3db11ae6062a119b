"""Headless Chromium for the tests of pages: nothing it asks for leaves this machine, and everything is on record."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

INSTALL = "install it (Debian: apt-get install chromium chromium-driver); tests of pages are never skipped"

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


@contextlib.contextmanager
def chromium(width: int = 1200, height: int = 800) -> Iterator[Chrome]:
    """A new browser with an empty profile; sizes in pixels. RuntimeError where there is none installed."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, path in paths.items():
        if path is None:
            raise RuntimeError(f"{name} is not on the PATH: {INSTALL}")
    options = ChromeOptions()
    options.binary_location = str(paths["chromium"])
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        for argument in (*ARGUMENTS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = Chrome(options, ChromeService(str(paths["chromedriver"])))  # named, so that none is looked for online
        try:
            driver.get("about:blank")
            requests(driver)  # those of the browser's own first page
            yield driver
        finally:
            driver.quit()


def requests(driver: Chrome) -> list[str]:
    """The addresses that the page has asked for since the last call, those within the browser (blob:, data:) too."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [message["params"]["request"]["url"] for message in messages
            if message["method"] == "Network.requestWillBeSent"]


def complaints(driver: Chrome) -> list[str]:
    """What the page has written to the console since the last call: errors of scripts, breaches of its policy."""
    return [entry["message"] for entry in driver.get_log("browser")]
