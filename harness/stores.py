"""Real shared stores for tests and demonstrations: Valkey or Redis, and Mooncake, on this machine.

What they run on is looked for, and installed where that is possible: from Debian as root, and
Mooncake's wheel from PyPI into a cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from harness.child_process import ChildProcess
from harness.server import free_port

MOONCAKE_PACKAGE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
MOONCAKE_LIBRARIES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")
_INSTALL_TIMEOUT_S = 300
_START_TIMEOUT_S = 30.0


class StoreMissingError(Exception):
    """An engine is not here and cannot be installed; the message says how to."""


class Process(ChildProcess):
    """A server of a store. `with` starts and ends it."""

    def __init__(self, command: Sequence[str], log: Path, port: int) -> None:
        self.command = list(command)
        self.log = log
        self.port = port

    def __enter__(self) -> Process:
        return self.start()

    def launch(self) -> Process:
        """Starts it; waits for nothing."""
        assert self.process is None, "it runs already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        return self

    def start(self) -> Process:
        """Starts it, and waits until it listens."""
        self.launch()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            assert self.process is not None
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.kill_9()
        raise AssertionError(f"{self.command[0]} did not start: {self.log.read_text()[-2000:]}")

    def freeze(self) -> None:
        """It does not answer until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


def apt_install(*packages: str) -> None:
    """Raises StoreMissingError if that is not possible here."""
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    sentence = f"install {' '.join(packages)}: `{' '.join(command)}` as root"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise StoreMissingError(sentence)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (command, ["apt-get", "update"], command):
        done = subprocess.run(
            step, env=environment, capture_output=True, timeout=_INSTALL_TIMEOUT_S, check=False
        )
        if step is command and done.returncode == 0:
            return
    raise StoreMissingError(sentence)


# -- Valkey or Redis -----------------------------------------------------------------------------


@functools.cache
def valkey_binary() -> str:
    """Valkey's server, or Redis's. Raises StoreMissingError."""
    names = ("valkey-server", "redis-server")
    for attempt in range(2):
        for name in names:
            found = shutil.which(name)
            if found is not None:
                return found
        if attempt == 0:
            apt_install("redis-server")
    raise StoreMissingError("install valkey-server or redis-server")


def valkey_server(folder: Path, maxmemory: str = "256mb", policy: str = "allkeys-lru") -> Process:
    """A server that keeps nothing when it ends. Raises StoreMissingError."""
    port = free_port()
    command = [valkey_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--maxmemory", maxmemory, "--maxmemory-policy", policy, "--dir", str(folder)]
    return Process(command, folder / "valkey.log", port)


# -- Mooncake ------------------------------------------------------------------------------------

_OWN_MEMORY = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 16 << 20, "tcp", "", sys.argv[1])
print("owner", code, flush=True)
while code == 0:
    time.sleep(3600)
"""


@functools.cache
def mooncake_folder() -> Path:
    """Where Mooncake's package is, importable with that folder in the path.

    Raises StoreMissingError.
    """
    if shutil.which("ldconfig", path="/sbin:/usr/sbin") is not None:
        known = subprocess.run(
            ["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False
        ).stdout
        if "libibverbs.so.1" not in known:
            apt_install(*MOONCAKE_LIBRARIES)
    found = importlib.util.find_spec("mooncake")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent.parent
    cache = os.environ.get("TIERED_KV_CACHE_DIR") or Path.home() / ".cache" / "tiered_kv"
    folder = Path(cache) / "python" / MOONCAKE_PACKAGE
    if not (folder / "mooncake").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        done = subprocess.run(
            [*command, MOONCAKE_PACKAGE],
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise StoreMissingError(f"pip install {MOONCAKE_PACKAGE}")
    # Appended: what is installed with it there must not hide the environment's own.
    sys.path.append(str(folder))
    return folder


def mooncake_environment() -> dict[str, str]:
    """What a process needs that imports Mooncake. Raises StoreMissingError."""
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(mooncake_folder())]))}


class Mooncake:
    """A master, and memory in `n_owners` processes of their own.

    Raises StoreMissingError.
    """

    def __init__(self, folder: Path, n_owners: int = 2, owner_bytes: int = 256 << 20) -> None:
        package = mooncake_folder() / "mooncake"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        command = [str(package / "mooncake_master"), "--rpc_address=127.0.0.1"]
        command += [f"--rpc_port={self.port}", "--metrics_host=127.0.0.1"]
        command += [f"--metrics_port={free_port()}", "--client_ttl=3"]
        self.master = Process(command, folder / "master.log", self.port)
        own = [sys.executable, "-c", _OWN_MEMORY, self.address, str(owner_bytes)]
        self.owners = [Process(own, folder / f"owner{n}.log", self.port) for n in range(n_owners)]

    def __enter__(self) -> Mooncake:
        os.environ.update(mooncake_environment())
        self.master.start()
        for owner in self.owners:
            owner.launch()
        for owner in self.owners:
            wait_for_text(owner.log, "owner 0")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in [*self.owners, self.master]:
            process.kill_9()


def wait_for_text(log: Path, text: str, timeout_s: float = _START_TIMEOUT_S) -> None:
    """Until a log has it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if log.exists() and text in log.read_text(errors="replace"):
            return
        time.sleep(0.1)
    raise AssertionError(f"{log} does not say {text!r}: {log.read_text()[-2000:]}")
