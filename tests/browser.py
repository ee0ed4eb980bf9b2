"""A headless Chromium of the system, by selenium: what a reader of a report sees and does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-dev-shm-usage",
    "force-prefers-reduced-motion",
    "window-size=1280,900",
)
SECONDS = 30.0
"""A report is given up after so long."""


def no_browser() -> str:
    """Why none can be driven here, or ""."""
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium is installed (Debian: apt-get install chromium chromium-driver)"
    if not shutil.which("chromedriver"):
        return "no chromedriver is installed (Debian: apt-get install chromium-driver)"
    return "" if find_spec("selenium") else "selenium is not installed"


class Page:
    """An open report."""

    def __init__(self, driver: Any, downloads: Path | None) -> None:
        self.driver, self.downloads = driver, downloads

    def load(self, report: Path) -> None:
        """Open the file and wait until its last chart is drawn."""
        self.driver.get(report.resolve().as_uri())
        self.wait("return document.documentElement.dataset.ready || !trouble.hidden")

    def times(self) -> tuple[float, float]:
        """Seconds from opening to the samples, and to the last chart."""
        data = self.run("return {...document.documentElement.dataset}")
        return int(data["samples"]) / 1000, int(data["ready"]) / 1000

    def busy(self, report: Path) -> float:
        """Seconds of the page's main thread on a processor until the file is open and drawn."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        before = self._spent()
        self.load(report)
        return self._spent() - before

    def _spent(self) -> float:
        found = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return float(next(m["value"] for m in found if m["name"] == "TaskDuration"))

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> Any:
        """What a script returns once that is true."""
        end = time.monotonic() + SECONDS
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"still not: {script}"
            time.sleep(0.02)
        return found

    def find(self, selector: str) -> Any:
        """The first element."""
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements, at once."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )

    def complaints(self) -> list[str]:
        """What the console has said since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def like(self, dark: bool = False, width: int = 1280) -> None:
        """As on a screen of that width, in that scheme of colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@contextmanager
def opened(report: Path, downloads: Path | None = None) -> Iterator[Page]:
    """A report in a browser of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for switch in SWITCHES:
        options.add_argument(f"--{switch}")
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        page = Page(driver, downloads)
        page.load(report)
        yield page
    finally:
        driver.quit()
