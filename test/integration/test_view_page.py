"""The page in a real Chromium, on a recording: how it looks, and its use without a mouse.

Needs Debian's chromium and chromium-driver, and selenium (`pip install .[browser]`); no server.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.server import free_port
from support_view.browser import Page, chromium
from support_view.recorded import NOWHERE, record
from tiered_kv.view.recording import Line, Recorder

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("view") / "story.jsonl"
    return path, record(path, 40)


@pytest.fixture
def page(browser: Page, recording: tuple[Path, list[dict[str, Any]]]) -> Iterator[Page]:
    with replayed(recording[0]) as url:
        browser.open(url)
        browser.wait(browser.prefixes)
        yield browser
    browser.resize(1280, 800)


class replayed:  # noqa: N801
    """`with replayed(path) as url`."""

    def __init__(self, path: Path) -> None:
        self._port = free_port()
        command = [sys.executable, "-m", "tiered_kv.view", "--replay", str(path)]
        self._command = [*command, "--port", str(self._port)]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert "Showing" in self._process.stdout.readline()
        return f"http://127.0.0.1:{self._port}/"

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080), (1440, 900)])
@pytest.mark.parametrize("colour", ["tier", "gang", "tenant", "age"])
def test_nothing_overlaps_or_is_cut_off(page: Page, size: tuple[int, int], colour: str) -> None:
    page.resize(*size)
    page.click(f"input[value={colour}]")
    page.run("document.querySelector('g.cell[data-name]').dispatchEvent(new MouseEvent('click'))")
    page.resize(*size)
    assert page.wrong_layout() == []
    assert len(page.colours()) > 1
    assert page.errors() == []


def test_light_and_dark(page: Page) -> None:
    theme = "return document.documentElement.dataset.theme"
    back = "return getComputedStyle(document.body).backgroundColor"
    before = page.run(theme), page.run(back)
    page.click("#theme")
    after = page.run(theme), page.run(back)
    assert {before[0], after[0]} == {"light", "dark"}
    assert before[1] != after[1]
    page.click("#theme")


def test_without_a_mouse(page: Page) -> None:
    page.run("document.querySelector('g.cell[tabindex=\"0\"]').focus()")
    at = "return document.activeElement.dataset.name"
    first = page.run(at)
    page.press("\ue014")  # right: to what goes on from it
    second = page.run(at)
    assert second not in (None, first)
    page.press("\ue007")
    assert page.text("#details-title") == f"Prefix {second}"
    page.press("\ue012")
    assert page.run(at) == first
    page.press("\ue015")
    assert page.run(at) not in (first, second)
    page.press("\ue013", "+")
    assert "All prefixes" in page.text("#crumbs")
    shown = page.prefixes()
    assert shown[0] == first
    page.press("\ue00c")
    assert page.text("#crumbs") == ""
    assert len(page.prefixes()) > len(shown)


def test_what_is_drawn_is_what_the_snapshot_says(
    page: Page, recording: tuple[Path, list[dict[str, Any]]]
) -> None:
    snapshots = recording[1]
    names = {p["name"] for s in snapshots for p in s["forest"]["prefixes"]}
    assert set(page.prefixes()) <= names
    requests = snapshots[0]["requests"]
    assert f"{requests['waiting']['count']} in all" in page.text("#queue-counts")
    assert len(page.all("path.waiting")) == len(requests["waiting"]["rows"])
    assert "parked 15" in page.text("#lanes-body")
    assert len(page.all("g.edge")) == 4
    assert page.all(".flow.moving")


def test_an_idle_server_says_so(browser: Page, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "idle.jsonl")
    recorder.add(Line(1.0, NOWHERE))
    recorder.add(Line(60.0, NOWHERE))
    recorder.close()
    with replayed(tmp_path / "idle.jsonl") as url:
        browser.open(url)
        browser.wait(lambda: browser.text("#state") == "replay")
        assert "Nothing is cached yet" in browser.text("#forest .empty")
        assert browser.text("#queue .empty") == "Nobody waits."
        assert "Nobody decodes." in browser.text("#lanes-body")
        assert "No request has finished" in browser.text("#history .empty")
        assert browser.wrong_layout() == []


def test_a_server_that_is_away_and_back_as_another(browser: Page, tmp_path: Path) -> None:
    """The recording begins anew after its end: as a server that was restarted."""
    record(tmp_path / "lost.jsonl", 6, lost=8)
    with replayed(tmp_path / "lost.jsonl") as url:
        browser.open(url)
        browser.wait(browser.prefixes)
        browser.run("document.querySelector('g.cell').dispatchEvent(new MouseEvent('click'))")
        opened = browser.text("#details-title")
        browser.wait(lambda: browser.text("#state") == "disconnected")
        assert "No server answers; start it." in browser.text("#banner")
        assert browser.text("#details-title") == opened != "Prefix"
        assert browser.prefixes()
        assert browser.all("body.stale")
        assert browser.wrong_layout() == []
        browser.wait(lambda: browser.text("#state") == "replay")
        assert not browser.all("#banner:not([hidden])")
        assert not browser.all("body.stale")
        assert browser.text("#details-title") == "Prefix"
        assert browser.errors() == []


def test_the_pages_own_server_goes_and_comes_back(
    browser: Page, recording: tuple[Path, list[dict[str, Any]]]
) -> None:
    first = replayed(recording[0])
    with first as url:
        browser.open(url)
        browser.wait(browser.prefixes)
    browser.wait(lambda: browser.text("#state") == "page lost")
    assert "does not answer" in browser.text("#banner")
    with first:
        browser.wait(lambda: browser.text("#state") == "replay")
        assert not browser.all("#banner:not([hidden])")
