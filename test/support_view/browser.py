"""A real Chromium, without a screen, and what tests ask of the page in it."""

from __future__ import annotations

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
#: What must not happen on the page: text that is cut off by what is around it, or lies on another.
CHECK_LAYOUT = """
const wrong = [];
const page = document.documentElement;
if (page.scrollWidth > window.innerWidth || page.scrollHeight > window.innerHeight)
  wrong.push(`the page is ${page.scrollWidth} x ${page.scrollHeight}`);
const inside = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1
  && inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
for (const section of document.querySelectorAll("section")) {
  const frame = section.getBoundingClientRect();
  if (frame.right > window.innerWidth + 1 || frame.bottom > window.innerHeight + 1)
    wrong.push(`${section.id} leaves the window`);
  for (const text of section.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect();
    if (text.textContent && !inside(box, frame)) wrong.push(`${section.id}: "${text.textContent}" leaves it`);
  }
}
for (const cell of document.querySelectorAll("g.cell")) {
  const frame = cell.querySelector("rect.body").getBoundingClientRect();
  const squares = cell.querySelector(".where").getBoundingClientRect();
  for (const text of cell.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    if (!text.textContent) continue;
    if (box.right > frame.right + 1) wrong.push(`"${text.textContent}" leaves its prefix`);
    if (squares.width && text.parentNode === cell && box.right > squares.left + 1
        && box.bottom > squares.top && box.top < squares.bottom)
      wrong.push(`"${text.textContent}" lies on its squares`);
  }
}
for (const svg of document.querySelectorAll("#queue svg, #tiers svg, #history svg")) {
  const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent).map((t) => [t.textContent, t.getBoundingClientRect()]);
  for (const [i, [one, a]] of texts.entries()) for (const [other, b] of texts.slice(i + 1)) {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
      wrong.push(`"${one}" lies on "${other}"`);
  }
}
return wrong;
"""


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
        script = "return [...document.querySelectorAll('g.cell[data-name]')].map(c => c.dataset.name)"
        found: list[str] = self.run(script)
        return found

    def colours(self) -> set[str]:
        script = "return [...document.querySelectorAll('g.cell[data-name] rect.body')].map(r => r.getAttribute('fill'))"
        return set(self.run(script))

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
                raise AssertionError(f"not within {timeout_s:.0f} s; {self.text('#state')}: {self.text('#banner')!r}")
            time.sleep(0.2)
        return found

    def picture(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


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
