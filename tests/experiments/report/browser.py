"""A headless Chromium that looks at a page from disk: sizes, colour schemes, what it said and what it asked for."""

import base64
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


class Browser:
    """One process; ``open`` loads a page anew, and waits until its figures are drawn."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                         "--force-color-profile=srgb", "--no-first-run", "--disable-background-networking"):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        self.cdp("Network.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.driver.quit()

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def js(self, script: str, *arguments: Any) -> Any:
        """The value of the script's ``return``."""
        return self.driver.execute_script(script, *arguments)

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1, mobile: bool = False) -> None:
        """Set the size of the window in CSS pixels, and the colour scheme that the reader prefers."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path) -> None:
        """Load a page from disk and wait until it says that it is ready."""
        self.driver.get(page.resolve().as_uri())
        self.ready(1)

    def ready(self, times: int, seconds: float = 90) -> None:
        """Wait until the page has drawn all its figures so many times."""
        self.until(f"return Number(document.body.dataset.ready || 0) >= {times}", seconds)

    def until(self, script: str, seconds: float = 30) -> Any:
        """Wait until a script returns something true, which is returned."""
        end = time.monotonic() + seconds
        while not (found := self.js(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}; the console says {self.console()}"
            time.sleep(0.03)
        return found

    def until_true(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until something outside of the page holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"not within {seconds} s; the console says {self.console()}"
            time.sleep(0.03)

    def console(self) -> list[str]:
        """What the page has said to the console since the last call: messages of all levels, and errors."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def asked_for(self) -> list[str]:
        """The addresses that were asked for since the last call, but for what the page's own policy stopped."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        stopped = {
            event["params"]["requestId"]
            for event in events
            if event["method"] == "Network.loadingFailed" and event["params"].get("blockedReason") == "csp"
        }
        asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in asked if request["requestId"] not in stopped]

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window."""
        self.cdp("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        """Touch a place of the window."""
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
        self.cdp("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.cdp("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=False)

    def picture(self, file: Path, *, clip: dict[str, float] | None = None) -> None:
        """The whole page, or a part of it, as PNG."""
        size = self.cdp("Page.getLayoutMetrics")["cssContentSize"]
        area = clip or {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        found = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, clip={**area, "scale": 1})
        file.write_bytes(base64.b64decode(found["data"]))


def find() -> None:
    """Skip where there is no Chromium or no driver; in CI that is a failure."""
    missing = [name for name, found in (("chromium", CHROMIUM), ("chromium-driver", DRIVER)) if not found]
    if missing:
        reason = f"needs {' and '.join(missing)} (Debian: apt-get install {' '.join(missing)})"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
