"""The CPU image built from nothing but Debian and PyPI, and served from, by a user without rights.

    docker info && python -m pytest -m long test/scripts/test_docker_run.py

wants root, debootstrap, a Docker daemon (DOCKER_HOST) with BuildKit, 25 GB of disk, and the two
archives. Where the base image that the Dockerfile names can be pulled, TIERED_KV_TEST_BASE
names it instead of Debian's own Python; TIERED_KV_TEST_IMAGE names an image that is built already.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEBIAN = "http://deb.debian.org/debian"
PACKAGES = "python3,python3-pip,python3-venv,python3-dev,ca-certificates"
BASE, IMAGE = "tiered-kv-test/python:debian", "tiered-kv-test:cpu"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
# A number that no password file knows, which may write to /tmp and the volume only.
HARDENED = (
    "--user", "12345", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL",
    "--security-opt", "no-new-privileges", "--memory", "6g", "--pids-limit", "512",
)  # fmt: skip
START_S = 600.0

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(5400)]


def docker(*words: str, timeout_s: float = 900.0) -> str:
    result = subprocess.run(
        ["docker", *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
    )
    assert result.returncode == 0, f"docker {words[0]}: {result.stderr[-4000:]}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    reason = what_is_missing()
    if reason:
        pytest.skip(reason)
    if built := os.environ.get("TIERED_KV_TEST_IMAGE"):
        return built
    folder = tmp_path_factory.mktemp("image")
    base = os.environ.get("TIERED_KV_TEST_BASE") or import_debian(folder)
    secrets = index_secrets(folder)
    proxies = [n for n in ("http_proxy", "https_proxy", "no_proxy") if n in os.environ]
    docker(
        *("build", "--network", "host", "-f", str(ROOT / "docker/Dockerfile.cpu"), "-t", IMAGE),
        *("--build-arg", f"PYTHON_IMAGE={base}"),
        *(word for name in proxies for word in ("--build-arg", name)),
        *(word for name, path in secrets.items() for word in ("--secret", f"id={name},src={path}")),
        str(ROOT),
        timeout_s=3600,
    )
    return IMAGE


def what_is_missing() -> str | None:
    if shutil.which("docker") is None:
        return "there is no docker"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0:
        return "no Docker daemon answers"
    if os.environ.get("TIERED_KV_TEST_IMAGE") or os.environ.get("TIERED_KV_TEST_BASE"):
        return None
    if os.getuid() != 0 or shutil.which("debootstrap") is None:
        return "the base image is made by root with debootstrap"
    try:
        urllib.request.urlopen(f"{DEBIAN}/dists/bookworm/Release", timeout=30).close()
    except OSError as error:
        return f"Debian's archive is out of reach: {error}"
    return None


def import_debian(folder: Path) -> str:
    """Debian's Python as a base image, trusting the certificates that this machine trusts."""
    root = folder / "debian"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root, DEBIAN],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=1800,
    )
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()  # an image for Python has none
    bundle = Path(os.environ.get("SSL_CERT_FILE", f"/{CERTIFICATES}"))
    if bundle.exists():
        shutil.copy(bundle, root / CERTIFICATES)
    archive = folder / "debian.tar"
    subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
    shutil.rmtree(root)
    docker("import", "-c", f"ENV SSL_CERT_FILE=/{CERTIFICATES} PIP_CERT=/{CERTIFICATES}",
           str(archive), BASE)  # fmt: skip
    archive.unlink()
    return BASE


def index_secrets(folder: Path) -> dict[str, Path]:
    """This machine's package index, as files that the build sees and the image does not keep."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {name.rpartition(".")[2]: value.strip("'") for name, _, value in
             (line.partition("=") for line in lines)}  # fmt: skip
    url = found.get("index-url")
    if url is None:
        return {}
    pip, uv = folder / "pip.conf", folder / "uv.toml"
    settings = configparser.ConfigParser(interpolation=None)
    settings["global"] = {k: v for k, v in found.items() if k in ("index-url", "trusted-host")}
    with pip.open("w") as file:
        settings.write(file)
    uv.write_text(f"[[index]]\nurl = {json.dumps(url)}\ndefault = true\n")
    return {"pip": pip, "uv": uv}


class Container:
    def __init__(self, *options: str, arguments: tuple[str, ...] = (), image: str) -> None:
        self.name = f"tiered-kv-test-{uuid.uuid4().hex[:8]}"
        published = ("-d", "--name", self.name, "-p", "127.0.0.1::30000")
        docker("run", *published, *options, image, *arguments)

    def state(self) -> Any:
        return json.loads(docker("inspect", self.name))[0]["State"]

    def wait_healthy(self) -> float:
        """Seconds until Docker's own check is content."""
        start = time.monotonic()
        while self.state()["Health"]["Status"] != "healthy":
            assert self.state()["Running"], self.logs()
            assert time.monotonic() < start + START_S, self.logs()
            time.sleep(1)
        return time.monotonic() - start

    def logs(self) -> str:
        result = subprocess.run(
            ["docker", "logs", "--tail", "200", self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return result.stdout

    def exit_code(self, timeout_s: float) -> int:
        return int(docker("wait", self.name, timeout_s=timeout_s))

    def stop(self, grace_s: int = 120) -> float:
        """Seconds that it took."""
        start = time.monotonic()
        docker("stop", "-t", str(grace_s), self.name)
        return time.monotonic() - start

    def cached_tokens(self, prompt: str) -> int:
        """Answers one chat: how many of the prompt's tokens were not computed."""
        usage = self.usage(prompt, 4)
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    def usage(self, prompt: str, n_tokens: int) -> Any:
        """Of a chat that is answered with `n_tokens`."""
        address = docker("port", self.name, "30000")
        body = {
            "model": "demo", "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=300) as answer:
            return json.loads(answer.read())["usage"]


@pytest.fixture
def run(image: str) -> Iterator[Callable[..., Container]]:
    containers: list[Container] = []

    def start(*options: str, arguments: tuple[str, ...] = ()) -> Container:
        containers.append(Container(*options, arguments=arguments, image=image))
        return containers[-1]

    yield start
    for container in containers:
        docker("rm", "--force", "--volumes", container.name)


@contextlib.contextmanager
def volume() -> Iterator[str]:
    name = f"tiered-kv-test-{uuid.uuid4().hex[:8]}"
    docker("volume", "create", name)
    try:
        yield name
    finally:
        docker("volume", "rm", "--force", name)


def test_what_was_computed_survives_a_stop_and_a_kill(run: Callable[..., Container]) -> None:
    with volume() as disk:
        server = run(*HARDENED, "-v", f"{disk}:/var/lib/tiered_kv")
        times = {"first start": server.wait_healthy()}
        prompt = "Tell me of the sea, and of those who sail it. " * 40
        assert server.cached_tokens(prompt) == 0
        assert server.cached_tokens(prompt) > 300

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.usage, "And of those who do not.", 100)
            time.sleep(1)
            times["stop with a request"] = server.stop()
            assert answer.result()["completion_tokens"] == 100
        assert server.state()["ExitCode"] == 0, server.logs()
        docker("start", server.name)
        times["second start"] = server.wait_healthy()
        assert server.cached_tokens(prompt) > 300  # nothing but the disk has it

        docker("kill", server.name)
        assert server.state()["ExitCode"] == 137
        docker("start", server.name)
        times["start after SIGKILL"] = server.wait_healthy()
        assert server.cached_tokens(prompt) > 300
        print({what: f"{seconds:.0f} s" for what, seconds in times.items()})
        docker("rm", "--force", "--volumes", server.name)


def test_more_than_the_container_may_have_is_refused(run: Callable[..., Container]) -> None:
    """The scheduler refuses it, which SGLang ends by SIGKILL."""
    server = run(*HARDENED, arguments=(*model_of(), "--tiered-kv-host-size", "7GB"))
    assert server.exit_code(START_S) == 1
    assert "the host tier wants 7.00 GB per rank" in server.logs()


def test_a_value_that_makes_no_sense_is_refused(run: Callable[..., Container]) -> None:
    server = run(*HARDENED, arguments=(*model_of(), "--tiered-kv-host-size", "much"))
    assert server.exit_code(START_S) == 2


def test_a_server_that_is_starting_can_be_stopped(run: Callable[..., Container]) -> None:
    server = run(*HARDENED)
    time.sleep(8)
    assert server.stop() < 30
    assert server.state()["ExitCode"] == 0


def test_its_bytecode_is_compiled(image: str) -> None:
    program = """
import importlib.util, pathlib, torch
sources = [str(p) for p in pathlib.Path(torch.__file__).parents[1].rglob("*.py")]
missing = [p for p in sources if not pathlib.Path(importlib.util.cache_from_source(p)).exists()]
print(len(missing) / len(sources))
"""
    share = docker("run", "--rm", "--entrypoint", "python3", image, "-c", program)
    assert float(share) < 0.01


def test_nothing_runs_as_root(image: str) -> None:
    assert docker("run", "--rm", "--entrypoint", "id", image, "-u") == "10001"


def model_of() -> tuple[str, ...]:
    return (
        "--model-path",
        "/opt/models/models/SmolLM2-135M-Instruct",
        "--max-total-tokens",
        "4096",
    )
