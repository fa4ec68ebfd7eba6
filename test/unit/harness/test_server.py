"""Servers of the harness, with a program in the server's place that takes the same flags."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.server import Server, ServerError, group_alive
from harness.servers import servers_up

#: Answers like a server; the flags after the port say how it misbehaves.
PROGRAM = """
import http.server, os, signal, subprocess, sys, threading, time

flags = sys.argv[1:]
port = int(flags[flags.index("--port") + 1])
print("Decode batch, #running-req: 3, token usage: 0.1", flush=True)
if "--leak" in flags:
    print("ERROR: memory leak detected", flush=True)
if "--refuse" in flags:
    sys.exit("error: it refuses")
if "--deaf" in flags:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "--orphan" in flags:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
busy = [503] * flags.count("--busy")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.send_response(busy.pop() if busy else 200)
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

Make = Callable[..., Server]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def make(*flags: str, name: str = "server", **fields: object) -> Server:
        log = tmp_path / f"{name}.log"
        return Server(flags, log, tmp_path, launcher=(str(program),), **fields)  # type: ignore[arg-type]

    return make


def pid_of(server: Server) -> int:
    assert server.process is not None
    return server.process.pid


def test_it_is_up_when_it_is_entered_and_gone_when_it_is_left(make: Make, tmp_path: Path) -> None:
    with make("--flag", "7") as server:
        assert server.get("/health").status_code == 200
        assert server.start_seconds > 0
        group = pid_of(server)
        command = server.log_text().splitlines()[0]
        assert f"--model-path {tmp_path} --host 127.0.0.1 --port {server.port}" in command
        assert command.endswith("--flag 7")
        assert server.decode_sizes() == [3]
        assert command not in server.tail()
    assert server.process is None
    assert not group_alive(group)


def test_a_restart_keeps_port_and_log(make: Make) -> None:
    with make() as server:
        first, port = pid_of(server), server.port
        server.restart()
        assert pid_of(server) != first
        assert server.port == port
        assert server.get("/health").status_code == 200
    assert server.decode_sizes() == [3, 3]


def test_a_server_that_ends_before_it_is_up_says_why(make: Make) -> None:
    with pytest.raises(ServerError, match="ended with code 1 before it was up") as error:
        make("--refuse").start()
    assert "error: it refuses" in str(error.value)
    refused = make("--refuse").launch()
    assert refused.wait_for_refusal(30) == 1
    assert refused.process is None


def test_one_that_does_not_refuse_is_stopped(make: Make) -> None:
    server = make().launch()
    group = pid_of(server)
    with pytest.raises(ServerError, match="did not refuse to start"):
        server.wait_for_refusal(0.5)
    assert not group_alive(group)


def test_one_that_ignores_sigterm_is_killed_and_an_error(make: Make) -> None:
    server = make("--deaf").start()
    group = pid_of(server)
    with pytest.raises(ServerError, match="ignored SIGTERM for 0 s"):
        server.stop(0.3)
    assert not group_alive(group)


def test_processes_that_outlive_it_are_killed_and_an_error(make: Make) -> None:
    server = make("--orphan").start()
    group = pid_of(server)
    with pytest.raises(ServerError, match="processes of the server outlived it"):
        server.stop(1.0)
    deadline = time.monotonic() + 5
    while group_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_alive(group)


def test_an_error_inside_leaves_nothing_behind_and_is_the_one_that_is_raised(make: Make) -> None:
    server = make("--leak").start()
    group = pid_of(server)

    def fail() -> None:
        with contextlib.ExitStack() as stack:
            stack.push(server)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not group_alive(group)


def test_trouble_in_the_log_is_an_error_unless_it_is_expected(make: Make) -> None:
    with (
        pytest.raises(ServerError, match="the log tells of trouble:\nERROR: memory leak"),
        make("--leak"),
    ):
        pass
    with make("--leak", name="expected", expected=("memory leak",)) as server:
        assert server.trouble() == []


def test_a_flush_is_asked_for_until_the_server_is_idle(make: Make) -> None:
    with make("--busy", "--busy") as server:
        server.flush_cache()
    server = make(*["--busy"] * 100, name="busy").start()
    with pytest.raises(ServerError, match="/flush_cache: 503"):
        server.flush_cache(0.5)
    server.stop()


def test_several_are_started_in_turn_and_all_stopped(make: Make) -> None:
    ready: list[tuple[str, int]] = []
    servers = {name: make(name=name) for name in ("first", "second")}

    def note(server: Server) -> None:
        ready.append((server.log.stem, sum(s.process is not None for s in servers.values())))

    with servers_up(servers, note) as up:
        assert up == servers
        assert ready == [("first", 1), ("second", 2)]
        groups = [pid_of(server) for server in up.values()]
        assert all(map(group_alive, groups))
    assert not any(map(group_alive, groups))


def test_several_are_started_at_once_and_all_stopped(make: Make) -> None:
    launched: list[int] = []
    servers = {name: make(name=name) for name in ("first", "second")}

    def note(_server: Server) -> None:
        launched.append(sum(s.process is not None for s in servers.values()))

    with servers_up(servers, note, at_once=True) as up:
        assert up == servers
        assert launched == [2, 2]
        groups = [pid_of(server) for server in up.values()]
    assert not any(map(group_alive, groups))
    refused = {"first": make(name="first"), "second": make("--refuse", name="second")}
    with pytest.raises(ServerError, match="before it was up"), servers_up(refused, at_once=True):
        pass
    assert all(server.process is None for server in refused.values())


def test_if_one_of_several_fails_none_stays(make: Make) -> None:
    servers = {"first": make(name="first"), "second": make("--refuse", name="second")}
    groups: list[int] = []
    with (
        pytest.raises(ServerError, match="before it was up"),
        servers_up(servers, lambda server: groups.append(pid_of(server))),
    ):
        pass
    (first,) = groups
    assert not group_alive(first)
    assert all(server.process is None for server in servers.values())


def test_kill_9_ends_all_of_its_processes(make: Make) -> None:
    server = make("--orphan").start()
    group = pid_of(server)
    server.kill_9()
    deadline = time.monotonic() + 5
    while group_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_alive(group)
    server.kill_9()
