"""The cluster's router loses no request when a worker dies, and sees it when it is back.

The router is the real one, in an environment of its own, with the flags of docker/compose.yaml. The
workers are not: they answer what the router asks, at once.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


class ComposeLoader(yaml.SafeLoader):
    """Reads Compose's own `!reset`."""


ComposeLoader.add_constructor("!reset", lambda _loader, _node: None)


@pytest.fixture(scope="module")
def router_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the router's locked version, installed as Dockerfile.router does."""
    folder = tmp_path_factory.mktemp("router")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    constraints = ROOT / "docker/constraints.txt"
    install = [folder / "bin/python", "-m", "pip", "install", "-q", "-c", constraints]
    result = subprocess.run(
        [*install, "sglang-router"], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.skip(f"no package index: {result.stderr.strip().splitlines()[-1:]}")
    return folder / "bin/python"


class Worker:
    """Says that it is healthy, and answers a chat with its name."""

    def __init__(self, name: str, port: int) -> None:
        self.name, self.port, self.n_chats = name, port, 0
        worker = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                # A process that dies leaves no connection open.
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.answer({"model_path": "demo", "data": [{"id": "demo"}]})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                worker.n_chats += 1
                message = {"role": "assistant", "content": worker.name}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.answer({"id": "1", "object": "chat.completion", "choices": [choice]})

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def die(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flags_of_compose() -> list[str]:
    document = yaml.load((ROOT / "docker/compose.yaml").read_text(), Loader=ComposeLoader)
    words = document["services"]["router"]["command"]
    return [word for word in words if not word.startswith("http") and word != "--worker-urls"]


@contextlib.contextmanager
def router(python: Path, flags: list[str], ports: list[int]) -> Iterator[str]:
    port = free_port()
    urls = [f"http://127.0.0.1:{worker}" for worker in ports]
    words = [
        python,
        "-m",
        "sglang_router.launch_router",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    metrics = ["--prometheus-port", str(free_port())]
    process = subprocess.Popen(
        [*words, *metrics, "--log-level", "warn", "--worker-urls", *urls, *flags],
        env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
    )
    try:
        here = f"http://127.0.0.1:{port}"
        wait_until(lambda: fetch(f"{here}/readiness")[0] == 200, 60.0)
        yield here
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Any, timeout_s: float) -> float:
    """Seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + timeout_s
        time.sleep(0.2)
    return time.monotonic() - start


def fetch(url: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def chat(here: str, number: int) -> int:
    messages = [{"role": "user", "content": f"{number}: " + "the same long prompt " * 50}]
    return fetch(f"{here}/v1/chat/completions", {"model": "demo", "messages": messages})[0]


def healthy(here: str) -> set[int]:
    """The ports of the workers that the router counts as healthy."""
    found = json.loads(fetch(f"{here}/workers")[1])["workers"]
    return {int(worker["url"].rpartition(":")[2]) for worker in found if worker["is_healthy"]}


def test_no_request_is_lost_when_a_worker_dies(router_python: Path) -> None:
    workers = [Worker(name, free_port()) for name in ("first", "second")]
    with router(router_python, flags_of_compose(), [w.port for w in workers]) as here:
        assert [chat(here, n) for n in range(4)] == [200] * 4
        # The one that has had the prompts is the one that the router sends the next to.
        preferred = max(workers, key=lambda worker: worker.n_chats)
        other = next(worker for worker in workers if worker is not preferred)
        preferred.die()
        assert [chat(here, n) for n in range(20)] == [200] * 20
        assert other.n_chats >= 20
        wait_until(lambda: healthy(here) == {other.port}, 30.0)
        again = Worker(preferred.name, preferred.port)
        wait_until(lambda: healthy(here) == {other.port, again.port}, 30.0)
        other.die()
        assert [chat(here, n) for n in range(20)] == [200] * 20
        again.die()


def test_the_defaults_would_lose_it(router_python: Path) -> None:
    """What the flags are for: delete them when this fails."""
    workers = [Worker(name, free_port()) for name in ("first", "second")]
    with router(router_python, ["--policy", "cache_aware"], [w.port for w in workers]) as here:
        assert chat(here, 0) == 200
        preferred = max(workers, key=lambda worker: worker.n_chats)
        preferred.die()
        assert chat(here, 0) != 200
        for worker in workers:
            if worker is not preferred:
                worker.die()
