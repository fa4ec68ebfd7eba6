"""scripts/serve passes on what it is given, adds what is missing, and says clearly what is wrong.

The interpreter is a stand-in that prints the command line it gets, so nothing is installed and no
server starts. scripts/lib/announce.py runs for real, against a small HTTP server.
"""

from __future__ import annotations

import http.server
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.server import free_port

SCRIPTS = Path(__file__).parents[2] / "scripts"
DEMO = "/models/SmolLM2-135M-Instruct"
FAKE_PYTHON = f"""#!/bin/bash
case "$*" in
    *launch_server*) printf '%s\\n' "$@"; echo "no_proxy=$no_proxy" >&2 ;;
    *get_demo_model*) echo {DEMO} ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    # An empty CUDA_VISIBLE_DEVICES means no GPU, whatever the machine has.
    return {**os.environ, "TIERED_KV_PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}


def serve(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "serve"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def flags_of_server(environment: dict[str, str], *flags: str) -> list[str]:
    if not any(flag.startswith("--port") for flag in flags):
        flags = (*flags, "--port", str(free_port()))
    result = serve(environment, *flags)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    assert words[:2] == ["-m", "sglang.launch_server"]
    return words[2:]


def test_defaults(environment: dict[str, str]) -> None:
    words = flags_of_server(environment)
    assert words[:11] == [
        *("--tiered-kv", "--host", "127.0.0.1"),
        *("--model-path", DEMO, "--served-model-name", "SmolLM2-135M-Instruct"),
        *("--max-total-tokens", "16384", "--skip-server-warmup", "--sleep-on-idle"),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ("--host", "0.0.0.0"),
        ("--host=0.0.0.0",),
        ("--served-model-name", "mine"),
        ("--max-total-tokens", "5000"),
        ("--model", "some/model"),
    ],
)
def test_what_the_user_gives_comes_once(environment: dict[str, str], flags: tuple[str]) -> None:
    words = flags_of_server(environment, *flags)
    name = flags[0].partition("=")[0]
    assert [word.partition("=")[0] for word in words].count(name) == 1
    assert " ".join(flags) in " ".join(words)


def test_another_model_gets_neither_the_demo_model_nor_its_name(
    environment: dict[str, str], tmp_path: Path
) -> None:
    words = flags_of_server(environment, "--model-path", str(tmp_path))
    assert DEMO not in words
    assert "--served-model-name" not in words


def test_memory_fraction_replaces_the_small_pool(environment: dict[str, str]) -> None:
    assert "--max-total-tokens" not in flags_of_server(environment, "--mem-fraction-static", "0.5")


def test_a_config_file_is_not_overridden(environment: dict[str, str]) -> None:
    words = flags_of_server(environment, "--config", "c.yaml", "--port", str(port := free_port()))
    assert words == ["--tiered-kv", "--config", "c.yaml", "--port", str(port)]


def test_values_with_spaces_survive(environment: dict[str, str]) -> None:
    words = flags_of_server(environment, "--served-model-name", "two words")
    assert words[words.index("--served-model-name") + 1] == "two words"


def test_help_names_the_flags_and_starts_nothing(environment: dict[str, str]) -> None:
    result = serve(environment, "--port", "1", "--help")
    assert result.returncode == 0
    for text in ("--model-path", "--tiered-kv-disk-dir", "TIERED_KV_VENV"):
        assert text in result.stdout
    assert "-m\nsglang.launch_server" not in result.stdout


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("[serve] error: ")
    return lines[0]


def test_a_port_in_use(environment: dict[str, str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        message = one_sentence(serve(environment, "--port", str(port)))
    assert f"port {port} of 127.0.0.1 is in use" in message


def test_a_port_that_is_no_number(environment: dict[str, str]) -> None:
    assert "--port http is not a number" in one_sentence(serve(environment, "--port", "http"))


def test_a_model_folder_that_is_not_there(environment: dict[str, str]) -> None:
    message = one_sentence(
        serve(environment, "--port", str(free_port()), "--model-path", "./nowhere")
    )
    assert "--model-path ./nowhere: there is no such folder" in message


def test_an_interpreter_that_is_not_there(environment: dict[str, str]) -> None:
    environment["TIERED_KV_PYTHON"] = "/nowhere/python"
    message = one_sentence(serve(environment, "--port", str(free_port())))
    assert "TIERED_KV_PYTHON=/nowhere/python" in message


@pytest.mark.parametrize(
    ("host", "listed", "expected"),
    [
        ("0.0.0.0", None, "127.0.0.1"),
        ("127.0.0.1", "intranet", "intranet,127.0.0.1"),
        ("::", "", "::1"),
    ],
)
def test_the_server_reaches_itself_behind_a_proxy(
    environment: dict[str, str], host: str, listed: str | None, expected: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        environment.pop(name, None)
    if listed is not None:
        environment["NO_PROXY"] = listed
    result = serve(environment, "--host", host, "--port", str(free_port()))
    assert f"no_proxy={expected}" in result.stderr.splitlines()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers like a server that is up, and asks for the key on all but /health."""

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == "Bearer secret" or self.path == "/health"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        if self.path == "/v1/models" and allowed:
            self.wfile.write(json.dumps({"data": [{"id": "it's mine"}]}).encode())

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server_url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


#: Where nothing listens.
PROXIES = dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
)


def announce(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPTS / "lib" / "announce.py"), *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_curl_line_is_ready_to_paste(server_url: str) -> None:
    result = announce("--pid", str(os.getpid()), "--url", server_url, "--api-key", "secret")
    assert result.returncode == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("curl ")]
    words = shlex.split(line)
    assert f"{server_url}/v1/chat/completions" in words
    assert "Authorization: Bearer secret" in words
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's mine"


def test_behind_a_proxy_it_sees_its_server_and_the_curl_line_works(server_url: str) -> None:
    key = ("--api-key", "secret")
    result = announce("--pid", str(os.getpid()), "--url", server_url, *key, **PROXIES)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("curl ")]
    answer = subprocess.run(
        ["bash", "-c", f"{line} -f"], env={**os.environ, **PROXIES}, timeout=30, check=False
    )
    assert answer.returncode == 0


def test_a_server_that_dies_is_noticed() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    result = announce("--pid", str(gone.pid), "--url", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "ended before it was ready" in result.stderr
