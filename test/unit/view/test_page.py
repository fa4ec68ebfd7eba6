"""A recording replayed into the page's own server, in this process and as a command.

What the page makes of it is for a browser: test/integration/test_view.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from support_view.recorded import NOWHERE, record
from tiered_kv.view.__main__ import main
from tiered_kv.view.hub import Hub
from tiered_kv.view.page import STATIC, make_page
from tiered_kv.view.recording import Line, Recorder, read_recording
from tiered_kv.view.source import NoSnapshotError, Replay
from tiered_kv.view.table import table

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "sglang", "transformers", "triton"}:
            raise ImportError(f"the page imports {name}")
sys.meta_path.insert(0, Block())
from tiered_kv.view.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("view") / "story.jsonl.gz"
    return path, record(path, 4, lost=1)


async def frames_of(hub: Hub, n: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async for frame in hub.watch():
        found.append(frame)
        if len(found) == n:
            break
    await hub.stop()
    return found


def test_a_replay(recording: tuple[Path, list[dict[str, Any]]]) -> None:
    path, snapshots = recording
    frames = asyncio.run(frames_of(Hub(Replay(path, speed=20)), 5))
    assert [frame["state"] for frame in frames] == ["live"] * 4 + ["disconnected"]
    assert [frame["snapshot"] for frame in frames[:4]] == snapshots
    assert any(edge["bytes_per_s"] > 0 for frame in frames for edge in frame["edges"])


def test_the_source_is_asked_once_for_all_and_only_while_somebody_looks() -> None:
    class Counting:
        about: dict[str, Any] = {"kind": "live", "name": "s"}  # noqa: RUF012
        asked = 0

        async def snapshots(self) -> AsyncIterator[dict[str, Any] | NoSnapshotError]:
            while True:
                self.asked += 1
                yield NOWHERE
                await asyncio.sleep(0.02)

    async def look() -> tuple[int, int]:
        source = Counting()
        hub = Hub(source)
        viewers = [asyncio.create_task(anext(hub.watch())) for _ in range(10)]
        await asyncio.gather(*viewers)
        asked = source.asked
        for _ in range(3):
            await asyncio.sleep(0.1)
        del viewers
        later = source.asked
        await asyncio.sleep(0.2)
        await hub.stop()
        return asked, source.asked - later

    asked, when_nobody_looked = asyncio.run(look())
    assert asked < 5  # not for each of ten; on a busy machine more than once
    assert when_nobody_looked <= 1


def test_what_is_seen_is_recorded_without_anybody_looking(tmp_path: Path) -> None:
    class Two:
        about: dict[str, Any] = {}  # noqa: RUF012

        async def snapshots(self) -> AsyncIterator[dict[str, Any] | NoSnapshotError]:
            yield NOWHERE
            yield NoSnapshotError("Gone.")

    async def run() -> None:
        hub = Hub(Two(), Recorder(tmp_path / "r.jsonl"))
        hub.start()
        await asyncio.sleep(0.1)
        await hub.stop()

    asyncio.run(run())
    first, second = read_recording(tmp_path / "r.jsonl")
    assert first.snapshot == NOWHERE
    assert second == Line(second.at_s, None, "Gone.")


def test_the_page_and_its_parts(recording: tuple[Path, list[dict[str, Any]]]) -> None:
    page = make_page(Hub(Replay(recording[0])), ["127.0.0.1", "localhost"])
    with TestClient(page, base_url="http://127.0.0.1:30080") as client:
        index = client.get("/")
        assert index.status_code == 200
        assert "default-src 'none'" in index.headers["content-security-policy"]
        named = re.findall(r'(?:src|href)="(static/[^"]+)"', index.text)
        modules = [
            f"static/{name}"
            for file in STATIC.glob("*.js")
            for name in re.findall(r'from "\./(\w+\.js)"', file.read_text())
        ]
        assert len(named) == 3
        assert len(set(modules)) >= 7
        for part in {*named, *modules}:
            answer = client.get(f"/{part}")
            assert answer.status_code == 200, part
            assert answer.headers["content-type"].split(";")[0] in ("text/css", "text/javascript")
        about = client.get("/about").json()
        assert about["kind"] == "replay"
        assert client.get("/static/../page.py").status_code == 404
        assert client.get("/about", headers={"host": "evil.example"}).status_code == 400
        # Nothing is fetched from elsewhere.
        texts = [file.read_text() for file in STATIC.glob("*.*") if "d3" not in file.name]
        assert not [t for t in texts if re.search(r"https?://(?!www\.w3\.org)", t)]


def test_the_charting_library_is_there_with_its_licence() -> None:
    (library,) = STATIC.glob("d3-*.min.js")
    assert "v7.9.2" in library.read_text()[:80]
    assert library.stat().st_size < 300_000
    assert "Permission to use, copy, modify" in (STATIC / "d3-LICENSE").read_text()


def test_a_table_for_terminals(recording: tuple[Path, list[dict[str, Any]]]) -> None:
    text = table(recording[1][0])
    first = recording[1][0]["forest"]["prefixes"][0]
    assert first["name"] in text
    assert f"{first['tokens_with_below']:,}" in text
    assert "device to host" in text
    assert "40 waiting" in text
    assert "Nothing is cached yet." in table(NOWHERE)
    assert max(map(len, text.splitlines())) <= 100


def test_the_command_without_torch_and_sglang(
    recording: tuple[Path, list[dict[str, Any]]],
) -> None:
    """The page is served, and events come, in a process in which they cannot be imported."""
    import httpx

    from harness.server import free_port

    port = free_port()
    command = [sys.executable, "-c", BLOCKED, "--replay", str(recording[0]), "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
            transport = httpx.HTTPTransport(retries=20)
            client = httpx.Client(transport=transport, trust_env=False, timeout=30)
            with client, client.stream("GET", f"http://127.0.0.1:{port}/events") as response:
                lines = response.iter_lines()
                data = next(line for line in lines if line.startswith("data: "))
                # Somebody still looks when it is told to end: that is no error.
                process.terminate()
                list(lines)
        finally:
            process.terminate()
        _, errors = process.communicate(timeout=30)
    assert json.loads(data.removeprefix("data: "))["snapshot"]["version"] == 1
    assert errors == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--json"], "--json goes with --once"),
        (["--every", "0"], "--every must be from"),
        (["--replay", "x", "--record", "y"], "exclude each other"),
        (["--url", "nonsense"], "--url must be like"),
        (["--key-file", "/nonexistent"], "--key-file /nonexistent cannot be read"),
        (["--once", "--url", "http://127.0.0.1:9"], "No server answers at http://127.0.0.1:9"),
    ],
)
def test_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.pop("TIERED_KV_VIEW_KEY", None)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
