"""./scripts/serve for real: it says when it is ready, its curl line works, Ctrl-C stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.server import START_TIMEOUT_S, free_port, group_alive

SERVE = Path(__file__).parents[2] / "scripts" / "serve"

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.long]


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def curl_line(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for line in self.lines():
                if line.startswith("curl "):
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.5)
        raise AssertionError("no curl line:\n" + "\n".join(self.lines()[-40:]))

    def interrupt(self) -> None:
        """What a terminal does on Ctrl-C: SIGINT to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(60)


@pytest.fixture
def running(tmp_path: Path, demo_model: Path) -> Iterator[Running]:
    log = tmp_path / "serve.log"
    port = str(free_port())
    flags = ["--port", port, "--host", "0.0.0.0", "--tiered-kv-disk-dir", str(tmp_path / "disk")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(SERVE), *flags],
            env={**os.environ, "TIERED_KV_PYTHON": sys.executable},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Running(process, log)
    yield server
    if group_alive(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_from_start_to_ctrl_c(running: Running) -> None:
    command = running.curl_line()
    answer = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True
    )
    choice = json.loads(answer.stdout)["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"

    n_before = len(running.log.read_text(errors="replace"))
    running.interrupt()
    deadline = time.monotonic() + 30
    while group_alive(running.process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not group_alive(running.process.pid), "processes outlived the server"
    assert "Traceback" not in running.log.read_text(errors="replace")[n_before:]
