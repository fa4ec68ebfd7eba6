"""The cluster's gateway (smg) in a process of its own, as docker/compose.yaml starts it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from harness.child_process import ChildProcess
from harness.server import ServerError, free_port

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 30.0
#: The header by which a conversation says which one it is.
SESSION_HEADER = "x-session-id"


def compose_flags() -> list[str]:
    """The gateway's flags in docker/compose.yaml, without the workers."""
    document = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    flags: list[str] = document["services"]["gateway"]["command"]
    first = flags.index("--worker-urls")
    rest = next(i for i in range(first + 1, len(flags)) if flags[i].startswith("--"))
    return flags[:first] + flags[rest:]


@dataclass
class Gateway(ChildProcess):
    """`with Gateway(urls, log) as gateway:` starts it and waits until it takes requests.

    waits_for_workers: without, it only has to listen.
    """

    worker_urls: Sequence[str]
    log: Path
    flags: Sequence[str] = field(default_factory=compose_flags)
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    waits_for_workers: bool = True
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Gateway:
        command = [sys.executable, "-m", "smg.launch_router", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--prometheus-host", "127.0.0.1"]
        command += ["--prometheus-port", str(self.metrics_port)]
        command += ["--worker-urls", *self.worker_urls] if self.worker_urls else []
        command += _without_metrics_port(self.flags)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            self.wait_until(self._is_ready, START_TIMEOUT_S)
        except BaseException:
            self.kill_9()
            raise
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(
        self,
        path: str,
        body: dict[str, Any],
        session: str | None = None,
        timeout_s: float = 240,
        headers: dict[str, str] | None = None,
    ) -> requests.Response:
        sent = {**(headers or {}), **({SESSION_HEADER: session} if session else {})}
        return requests.post(f"{self.url}{path}", json=body, headers=sent, timeout=timeout_s)

    def healthy(self) -> set[str]:
        """The addresses of the workers that it sends requests to."""
        answer = requests.get(f"{self.url}/workers", timeout=10).json()
        return {worker["url"] for worker in answer["workers"] if worker["is_healthy"]}

    def wait_healthy(self, urls: set[str], timeout_s: float) -> float:
        """Seconds until it sends requests to exactly these workers."""
        return self.wait_until(lambda: self.healthy() == urls, timeout_s)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until the condition holds."""
        assert self.process is not None
        began = time.monotonic()
        while not condition():
            if self.process.poll() is not None or time.monotonic() > began + timeout_s:
                tail = self.log.read_text(errors="replace").splitlines()[-30:]
                raise ServerError("\n".join([f"waited {timeout_s:.0f} s; {self.log}:", *tail]))
            time.sleep(0.05)
        return time.monotonic() - began

    def _is_ready(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            answer = requests.get(f"{self.url}/readiness", timeout=5)
            return answer.status_code == 200 or not self.waits_for_workers
        return False


def _without_metrics_port(flags: Sequence[str]) -> list[str]:
    """That port is taken when two gateways run on one machine."""
    kept = list(flags)
    while "--prometheus-port" in kept:
        at = kept.index("--prometheus-port")
        del kept[at : at + 2]
    return kept
