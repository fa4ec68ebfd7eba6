"""A real server under load, watched by a real Chromium: what it does shows, and its end and return.

The server has an administrator's key. Pools are small, so that prefixes leave the device, requests
wait, and some are parked. TIERED_KV_VIEW_PICTURES names a folder for the pictures of docs/view.md.

Needs Debian's chromium and chromium-driver, and selenium (`pip install .[browser]`).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import requests

from harness.client import post_generate, request_body
from harness.demo_model import host_size
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server, free_port
from support_view.browser import Page, chromium
from tiered_kv.view.recording import read_recording

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1200)]

KEY = "an administrator's key"
TENANTS = ("blue", "green", "red")
CLASSES = ("interactive", "standard", "batch")


@pytest.fixture(scope="module")
def server(
    make_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    disk = tmp_path_factory.mktemp("disk")
    server = make_server(
        "view",
        *FLOAT32,
        *("--page-size", 16, "--max-total-tokens", 3072, "--chunked-prefill-size", 256),
        *("--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(6144)),
        *("--tiered-kv-disk-dir", disk, "--tiered-kv-disk-size", "1GB"),
        *("--tiered-kv-iteration-policy", "slack", "--tiered-kv-tenant-from", "body"),
        *("--admin-api-key", KEY, "--served-model-name", "SmolLM2-135M-Instruct"),
    )
    with server:
        yield server


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "admin.key"
    path.write_text(f"{KEY}\n")
    return path


@contextmanager
def shown(server: Server, key_file: Path, *more: object) -> Iterator[str]:
    """The address of a page that shows `server`."""
    port = free_port()
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "tiered_kv.view", "--url", url, "--key-file", str(key_file)]
    command += ["--port", str(port), *map(str, more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "Showing" in process.stdout.readline()
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait(30)


class Load:
    """Conversations on a few shared instructions, until it is stopped."""

    def __init__(self, server: Server, prompts: PromptMaker, n_clients: int = 14) -> None:
        self._server = server
        self._prompts = prompts
        self._is_over = threading.Event()
        self.n_answered = 0
        self._threads = [
            threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(n_clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(120)

    def _client(self, n: int) -> None:
        for turn in itertools.count():
            shared = self._prompts.tokens(f"instructions {n % 4}", 192)
            own = self._prompts.tokens(f"client {n} {turn // 3}", 64 * (1 + turn % 3))
            slo = {
                "class": CLASSES[n % 3],
                "tenant": TENANTS[n % 4 % 3],
                "tbt_ms": 60 * (1 + n % 5),
            }
            body = request_body(
                shared + own, 24 + 8 * (n % 4), sampling_params={"custom_params": {"slo": slo}}
            )
            with suppress(requests.RequestException):
                if post_generate(self._server, body).status_code == 200:
                    self.n_answered += 1
            if self._is_over.is_set():
                return


def keep(page: Page, name: str) -> None:
    folder = os.environ.get("TIERED_KV_VIEW_PICTURES")
    if folder:
        page.picture(Path(folder) / f"{name}.png")


def test_what_the_server_does_shows(
    server: Server, key_file: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    recording = tmp_path / "seen.jsonl.gz"
    with chromium() as page, shown(server, key_file, "--every", 0.5, "--record", recording) as url:
        page.open(url)
        page.wait(lambda: page.text("#state") == "live")
        assert "Nothing is cached yet" in page.text("#forest .empty")
        with Load(server, prompts) as load:
            page.wait(lambda: len(page.prefixes()) >= 8, 120)
            page.wait(lambda: page.all("path.waiting"), 120)
            page.wait(lambda: page.all("[data-lane=running] .chip"), 120)
            page.wait(lambda: page.all(".flow.moving"), 120)
            page.wait(lambda: load.n_answered >= 20, 240)
            open_a_shared_prefix(page)
            page.wait(lambda: page.text("#details-body table"), 120)
            page.wait(lambda: page.all("[data-lane=parked] .chip"), 120)
            assert page.wrong_layout() == []
            keep(page, "view_tiers")
            page.resize(1920, 1080)
            page.click("#theme")
            page.click("input[value=gang]")
            page.wait(lambda: "requests" in page.text("#legend"), 120)
            page.resize(1920, 1080)
            assert page.wrong_layout() == []
            keep(page, "view_gangs_dark")
            page.click("#theme")
            page.click("input[value=tenant]")
            page.wait(lambda: any(tenant in page.text("#legend") for tenant in TENANTS), 60)
        assert page.errors() == []
    check_recording(recording)


def open_a_shared_prefix(page: Page) -> None:
    """Clicks on the largest prefix that others go on from."""
    script = """
        const cells = [...document.querySelectorAll('g.cell[data-name]')];
        cells.sort((a, b) => b.getBoundingClientRect().height - a.getBoundingClientRect().height);
        return cells[0].querySelector('rect.body');
    """
    page.wait(lambda: clicked(page, script))
    name = page.text("#details-title").removeprefix("Prefix ")
    assert name in page.prefixes()
    details = page.text("#details-body")
    for word in ("tokens", "pages", "on device", "on host", "on disk", "last use", "next use"):
        assert word in details


def clicked(page: Page, script: str) -> bool:
    from selenium.common.exceptions import WebDriverException

    with suppress(WebDriverException):  # drawn anew meanwhile
        page.run(script).click()
    return page.text("#details-title") != "Prefix"


def check_recording(path: Path) -> None:
    """All the while totals were exact, and no snapshot took a millisecond of the scheduler."""
    snapshots = [line.snapshot for line in read_recording(path) if line.snapshot is not None]
    assert len(snapshots) > 20
    for snapshot in snapshots:
        forest = snapshot["forest"]
        shown_tokens = sum(prefix["tokens"] for prefix in forest["prefixes"])
        assert forest["tokens"] == shown_tokens + forest["rest"]["tokens"]
        assert forest["count"] == len(forest["prefixes"]) + forest["rest"]["count"]
    costs = [snapshot["scheduler_us"] for snapshot in snapshots]
    print(f"us of the scheduler: median {np.median(costs):.0f}, most {max(costs)}")
    assert np.quantile(costs, 0.99) < 1000
    waited = [row for s in snapshots for row in s["requests"]["waiting"]["rows"]]
    assert {row["tenant"] for row in waited} <= set(TENANTS)
    assert any(s["requests"]["parked"]["count"] for s in snapshots)
    states = {
        state for s in snapshots for p in s["forest"]["prefixes"] for state in p["tiers"].values()
    }
    assert {"resident", "absent"} <= states
    assert "text" not in json.dumps(snapshots)


def test_without_the_key_it_says_what_to_do(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tiered_kv.view", "--once", "--json"]
    command += ["--url", f"http://127.0.0.1:{server.port}"]
    environment = {name: v for name, v in os.environ.items() if name != "TIERED_KV_VIEW_KEY"}
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 2
    assert "wants its administrator's key; give it by --key-file" in refused.stderr
    environment["TIERED_KV_VIEW_KEY"] = KEY
    given = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(given.stdout)["version"] == 1
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {KEY}"
        url = f"http://127.0.0.1:{server.port}/tiered_kv/snapshot"
        assert session.get(url, params={"n": 1}).status_code == 400
        assert session.get(url, headers={"Origin": "http://elsewhere"}).status_code == 403
        assert session.get(url).status_code == 200


def test_a_server_that_is_killed_and_comes_back(
    server: Server, key_file: Path, prompts: PromptMaker
) -> None:
    def answered() -> None:
        assert post_generate(server, request_body(prompts.tokens("back", 200), 4)).ok

    with chromium() as page, shown(server, key_file) as url:
        answered()
        page.open(url)
        page.wait(page.prefixes, 60)
        before = set(page.prefixes())
        server.kill_9()
        page.wait(lambda: page.text("#state") == "disconnected", 60)
        assert "No server answers" in page.text("#banner")
        assert set(page.prefixes()) == before
        keep(page, "view_disconnected")
        server.start()
        page.wait(lambda: page.text("#state") == "live", 60)
        page.wait(lambda: not page.prefixes(), 60)
        answered()
        page.wait(page.prefixes, 60)
        assert page.errors() == []
