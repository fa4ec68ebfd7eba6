"""Process 1 of the images: its exit code says how the server ended, and it hands signals on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ENTRY = Path(__file__).parents[2] / "docker/entry.py"
NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
ENDS_LIKE_SGLANG = "import os, signal, sys; os.kill(os.getpid(), signal.SIGKILL); sys.exit(0)"
DRAINS_LIKE_SGLANG = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
print("ready", flush=True)
time.sleep(60)
"""


def has_namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0
    except FileNotFoundError:
        return False


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def code_of(command: list[str], *before: str) -> int:
    words = [*before, sys.executable, str(ENTRY), *command]
    return subprocess.run(words, timeout=60, check=False).returncode


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", 0),
        ("raise SystemExit(2)", 2),
        (ENDS_LIKE_SGLANG, 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV),
    ],
    ids=["success", "its own code", "SIGKILL to itself", "another signal"],
)
def test_the_exit_code_says_how_the_server_ended(program: str, expected: int) -> None:
    assert code_of(python(program)) == expected


@pytest.mark.skipif(not has_namespaces(), reason="this user may not make a process namespace")
def test_process_1_fails_where_the_server_does() -> None:
    """Without the entry the kernel ignores the signal, and a failure ends with 0."""
    bare = subprocess.run([*NAMESPACE, *python(ENDS_LIKE_SGLANG)], timeout=60, check=False)
    assert bare.returncode == 0
    assert code_of(python(ENDS_LIKE_SGLANG), *NAMESPACE) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_is_no_failure(number: signal.Signals) -> None:
    """While the server starts, too: the child has no handler then."""
    sleeps = "print('ready', flush=True); import time; time.sleep(60)"
    default = f"import signal; signal.signal({int(number)}, signal.SIG_DFL); {sleeps}"
    with started(python(default)) as entry:
        entry.send_signal(number)
        assert entry.wait(timeout=30) == 0


def test_a_server_that_was_asked_to_stop_may_end_by_sigkill() -> None:
    with started(python(DRAINS_LIKE_SGLANG)) as entry:
        entry.send_signal(signal.SIGTERM)
        assert entry.wait(timeout=30) == 0


def test_signals_are_not_blocked_in_the_server() -> None:
    program = "import signal, sys; sys.exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    assert code_of(python(program)) == 0


@pytest.mark.skipif(not has_namespaces(), reason="this user may not make a process namespace")
def test_processes_without_a_parent_leave_no_zombies() -> None:
    """The grandchild ends after its parent: process 1 inherits it."""
    program = """
import pathlib, subprocess, sys, time
subprocess.run(["sh", "-c", "(sleep 0.3) & exit 0"])
time.sleep(1)
states = [p.read_text() for p in pathlib.Path("/proc").glob("[0-9]*/stat")]
sys.exit(sum(state.rpartition(")")[2].split()[0] == "Z" for state in states))
"""
    assert code_of(python(program), *NAMESPACE, "--mount-proc") == 0


def started(command: list[str]) -> subprocess.Popen[str]:
    """The entry, once its child has said something."""
    words = [sys.executable, str(ENTRY), *command]
    entry = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert entry.stdout is not None
    assert entry.stdout.readline() == "ready\n"
    return entry
