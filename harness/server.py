"""A real SGLang server in a process group of its own, started the way a user starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

LAUNCH_SERVER = ("-m", "sglang.launch_server")
#: `sglang serve`, through the interpreter that runs the tests.
SGLANG_SERVE = ("-c", "from sglang.cli.main import main; main()", "serve")

#: What every server of the tests has in common. `--sleep-on-idle` keeps an idle one off the cores.
BASE_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native"),
    *("--skip-server-warmup", "--sleep-on-idle", "--max-running-requests", "16"),
)
FLOAT32 = ("--dtype", "float32")
#: For tests that say which tier serves: what is stored is loaded, whatever computing would cost.
ALWAYS_LOAD = ("--tiered-kv-load-policy", "always")

START_TIMEOUT_S = 600.0
#: SGLang looks for a SIGTERM every 5 s, and gives its schedulers 15 s to end by themselves; 0.5.23
#: then closes its HTTP server before the process ends.
STOP_TIMEOUT_S = 60.0

#: Lines of a log that no test may cause, unless it says that it expects them.
TROUBLE = re.compile(r"Traceback \(most recent call last\)|\bERROR\b|[Ll]eak|IntegrityError")
DECODE_LINE = re.compile(r"Decode batch, #running-req: (\d+)")
#: The command line, and the arguments that SGLang prints at the start: four hundred names.
NOT_A_MESSAGE = re.compile(r"^\$ |server_args=ServerArgs\(")
LOG_LINE_WIDTH_MAX = 500
#: SGLang 0.5.23 asks itself for something at its start, on a busy machine before it listens.
UPSTREAMS = (("post-warmup freeze_gc failed", "requests.exceptions.ConnectionError"),)


class ServerError(AssertionError):
    """The server did not do what a test relies on; the message ends with the log's tail."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def group_alive(group: int) -> bool:
    """Whether any process of that group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def bypass_proxies() -> None:
    """Servers are on this machine, where no proxy would find them.

    Holds for every client in this process, and for what SGLang asks itself in the servers.
    """
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))


bypass_proxies()


def _outside(lines: Iterable[str], passages: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Those of `lines` that are not between the texts of a passage."""
    end = None
    for line in lines:
        if end is None:
            end = next((last for first, last in passages if first in line), None)
            if end is None:
                yield line
        elif end in line:
            end = None


@dataclass
class Server:
    """`with Server(args, log) as server:` starts it, waits until it answers, and stops it.

    args: the server's flags, without model path, host and port. env: added to this process's
    environment. expected: regular expressions for log lines that look like trouble but are wanted;
    passages: texts between whose lines, the two included, nothing is trouble.
    """

    args: Sequence[str]
    log: Path
    model: Path
    env: Mapping[str, str] = field(default_factory=dict)
    launcher: Sequence[str] = LAUNCH_SERVER
    expected: Sequence[str] = ()
    passages: Sequence[tuple[str, str]] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    start_seconds: float = 0.0
    _launched_at: float = 0.0

    # -- life ---------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill_9()
            return
        if self.process is not None:
            self.stop()
        self.check_log()

    def launch(self) -> Server:
        """Starts the process without waiting for anything."""
        assert self.process is None, "the server runs already"
        self._launched_at = time.monotonic()
        command = [sys.executable, *self.launcher, "--model-path", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *self.args]
        # Threads that spin while they wait make servers on a busy machine crawl.
        defaults = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = {**os.environ, **defaults, **self.env}
        # Byte code that is compiled anew in every process would double the time of a start.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return self

    def start(self) -> Server:
        """Starts the process and waits until it has answered a health check."""
        self.launch()
        try:
            self.wait_until_up()
        except BaseException:
            self.kill_9()
            raise
        return self

    def wait_until_up(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when a server that was launched has answered a health check.

        Raises ServerError.
        """
        self._wait_until_healthy(self._launched_at + timeout_s)
        self.start_seconds = time.monotonic() - self._launched_at

    def _wait_until_healthy(self, deadline: float) -> None:
        assert self.process is not None
        while time.monotonic() < deadline:
            code = self.process.poll()
            if code is not None:
                raise ServerError(
                    f"the server ended with code {code} before it was up{self.tail()}"
                )
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=30).status_code == 200:
                    return
            time.sleep(0.2)
        raise ServerError(f"the server was not up after {START_TIMEOUT_S:.0f} s{self.tail()}")

    def wait_for_refusal(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """The exit code of a server that is expected not to start."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ServerError(f"the server did not refuse to start{self.tail()}") from None
        finally:
            self.kill_9()
        return code

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, as a service manager sends it; every process of the group must go."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_9()
            raise ServerError(
                f"the server ignored SIGTERM for {timeout_s:.0f} s{self.tail()}"
            ) from None
        while group_alive(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        alive = group_alive(self.process.pid)
        self.kill_9()
        if alive:
            raise ServerError(f"processes of the server outlived it{self.tail()}")

    def kill_9(self) -> None:
        """SIGKILL to all of its processes at once."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 10
        while group_alive(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.process = None

    def restart(self) -> Server:
        """Stop by SIGTERM and start with the same flags, on the same port, into the same log."""
        self.stop()
        return self.start()

    # -- HTTP ---------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any = None, timeout_s: float = 120) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=timeout_s)

    def get(self, path: str, timeout_s: float = 30) -> requests.Response:
        return requests.get(f"{self.url}{path}", timeout=timeout_s)

    def flush_cache(self, timeout_s: float = 30) -> None:
        """Empties device and host. Refused by the server while a request runs, so asked again."""
        deadline = time.monotonic() + timeout_s
        while (response := self.post("/flush_cache")).status_code != 200:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"/flush_cache: {response.status_code} {response.text}{self.tail()}"
                )
            time.sleep(0.2)

    # -- log ----------------------------------------------------------------------------------

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 60) -> str:
        """For error messages: what the log ends with, on lines of their own."""
        end = [line[:LOG_LINE_WIDTH_MAX] for line in self.messages()[-lines:]]
        return "\n".join([f"\n--- end of {self.log}", *end])

    def messages(self) -> list[str]:
        return [line for line in self.log_text().splitlines() if not NOT_A_MESSAGE.search(line)]

    def decode_sizes(self) -> list[int]:
        """How many requests decoded in each iteration, with `--decode-log-interval 1`."""
        return [int(n) for n in DECODE_LINE.findall(self.log_text())]

    def trouble(self) -> list[str]:
        """Log lines that tell of an error, a leak or a traceback and are not `expected`."""
        return [
            line
            for line in _outside(self.messages(), (*UPSTREAMS, *self.passages))
            if TROUBLE.search(line) and not any(re.search(e, line) for e in self.expected)
        ]

    def check_log(self) -> None:
        trouble = self.trouble()
        if trouble:
            raise ServerError("the log tells of trouble:\n" + "\n".join(trouble[:20]) + self.tail())
