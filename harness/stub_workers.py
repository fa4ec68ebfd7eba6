"""Workers for the gateway that compute nothing, in processes that can be killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from harness.child_process import ChildProcess
from harness.server import free_port

PROGRAM = Path(__file__).with_name("stub_worker.py")


class StubWorker(ChildProcess):
    """`with StubWorker(name) as worker:` runs one in a process of its own."""

    def __init__(self, name: str, port: int | None = None) -> None:
        self.name, self.port = name, port or free_port()

    def __enter__(self) -> StubWorker:
        self.launch()
        deadline = time.monotonic() + 30
        while True:
            try:
                requests.get(f"{self.url}/health", timeout=5)
                return self
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def launch(self) -> None:
        command = [sys.executable, str(PROGRAM), self.name, str(self.port)]
        self.process = subprocess.Popen(command)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def received(self) -> list[dict[str, Any]]:
        """The POSTs so far: `path`, `headers` (names in lower case), `body`."""
        found: list[dict[str, Any]] = requests.get(f"{self.url}/received", timeout=5).json()
        return found

    def asked(self) -> Sequence[str]:
        """The paths of the GETs so far."""
        found: list[str] = requests.get(f"{self.url}/asked", timeout=5).json()
        return found
