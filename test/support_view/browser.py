"""A real Chromium, without a screen, and what tests ask of the page in it."""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--no-first-run", "--hide-scrollbars"),
)
#: Returns a sentence for each text that is cut off by what is around it, or lies on another.
CHECK_LAYOUT = Path(__file__).with_name("layout.js").read_text()


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        time.sleep(1.0)  # transitions

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def text(self, selector: str) -> str:
        return str(self.driver.find_element("css selector", selector).text)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def prefixes(self) -> list[str]:
        """The names of those that are drawn."""
        script = (
            "return [...document.querySelectorAll('g.cell[data-name]')].map(c => c.dataset.name)"
        )
        found: list[str] = self.run(script)
        return found

    def colours(self) -> set[str]:
        bodies = "[...document.querySelectorAll('g.cell[data-name] rect.body')]"
        return set(self.run(f"return {bodies}.map(r => r.getAttribute('fill'))"))

    def wrong_layout(self) -> list[str]:
        found: list[str] = self.run(CHECK_LAYOUT)
        return found

    def errors(self) -> list[str]:
        """What the browser complained of since the last call, but that a server is away."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if "net::ERR" not in e["message"]]

    def wait(self, what: Callable[[], Any], timeout_s: float = 30.0) -> Any:
        """`what()` once it is true."""
        deadline = time.monotonic() + timeout_s
        while not (found := what()):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not within {timeout_s:.0f} s; {self.text('#state')}: {self.text('#banner')!r}"
                )
            time.sleep(0.2)
        return found

    def picture(self, path: Path) -> None:
        """As a PNG of at most 256 colours, without what shows up under the pointer."""
        from PIL import Image

        self.run("document.getElementById('tip').hidden = true")
        data = io.BytesIO(self.driver.get_screenshot_as_png())
        Image.open(data).convert("RGB").quantize(256).save(path, optimize=True)


@contextmanager
def chromium() -> Iterator[Page]:
    """Debian's `chromium` and `chromium-driver`; skips the test where they are missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,800"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            page = Page(driver)
            page.resize(1280, 800)
            yield page
        finally:
            driver.quit()
