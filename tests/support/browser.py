"""Pages of reports: their data, and a headless Chromium; tests that ask for one are skipped where there is none."""

import base64
import contextlib
import gzip
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1400",
)


def data_of(page: Path) -> dict[str, Any]:
    """What the script of a report's page reads, of its one decomposition."""
    (packed,) = re.findall(r'<script id="data" type="text/plain">(.*?)</script>', page.read_text())
    found = json.loads(gzip.decompress(base64.b85decode(packed.translate(str.maketrans(",.", "<&")))))
    return found["sides"][0] | {"words": found["words"]}


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A selenium driver with a new profile, which keeps logs of the console and of the network."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_binary = shutil.which("chromedriver")
    if binary is None or driver_binary is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_binary))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, page: Path) -> None:
    """Opens it and waits until its script says that all is drawn."""
    driver.get("about:blank")
    for log in ("browser", "performance"):
        driver.get_log(log)  # forgotten
    driver.get(page.as_uri())
    wait_for(driver, "return document.documentElement.dataset.drawn === 'true'")


def wait_for(driver: Any, script: str, seconds: float = 60) -> Any:
    """What the script returns, once that is true."""
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(script)):
        assert time.monotonic() < end, f"not within {seconds} seconds: {script}"
        time.sleep(0.05)
    return value


def work(driver: Any) -> float:
    """Seconds of processor time that the page's thread has taken, however busy the machine is; counted from the first
    call on, and anew for each page."""
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def requests(driver: Any) -> list[str]:
    """The addresses of all requests since the page was opened."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
