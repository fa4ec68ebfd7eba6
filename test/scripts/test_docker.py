"""The files in docker/ parse, are pinned, and pass on only flags that the server has.

No image is built here. What Docker would only say at build time is checked as far as reading goes:
sources that are copied exist and reach the builder, base images have versions, and the cluster's
services fit together.
"""

from __future__ import annotations

import fnmatch
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
INSTRUCTIONS = {
    "ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT",
    "CMD", "USER",
}  # fmt: skip


class ComposeLoader(yaml.SafeLoader):
    """Reads Compose's own `!reset`."""


ComposeLoader.add_constructor("!reset", lambda _loader, _node: None)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    logical = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in logical if line.strip()]


def exec_form(arguments: str) -> list[str]:
    words = json.loads(arguments)
    assert isinstance(words, list)
    return words


def compose(name: str) -> dict[str, Any]:
    # A subclass of SafeLoader: nothing but plain data is made.
    document: dict[str, Any] = yaml.load((DOCKER / name).read_text(), Loader=ComposeLoader)
    return document


def health_checks() -> list[list[str]]:
    found = []
    for path in DOCKERFILES:
        (text,) = [a for name, a in instructions(path) if name == "HEALTHCHECK"]
        found.append(exec_form(text[text.index("[") :]))
    workers = compose("compose.yaml")["services"]
    return [
        *found,
        *(workers[name]["healthcheck"]["test"][1:] for name in ("worker-1", "worker-2")),
    ]


@pytest.mark.parametrize("command", health_checks())
def test_a_health_check_asks_the_server_and_no_proxy(command: list[str]) -> None:
    """Docker hands the proxy of its own configuration to containers."""

    statuses = [200, 503]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = re.sub(r":\d+/", f":{server.server_port}/", command[-1])
        for is_healthy in (True, False):
            result = subprocess.run(
                [sys.executable, *command[1:-1], here],
                env={**os.environ, **proxies},
                capture_output=True,
                timeout=30,
                check=False,
            )
            assert (result.returncode == 0) is is_healthy, result.stderr
        server.shutdown()


def flags_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_well_formed_and_pinned(path: Path) -> None:
    found = instructions(path)
    assert {name for name, _ in found} <= INSTRUCTIONS
    arguments = dict(re.findall(r"(\w+)=(\S+)", "\n".join(a for n, a in found if n == "ARG")))
    (base,) = [a for name, a in found if name == "FROM"]
    image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
    name, _, tag = image.partition(":")
    assert name
    assert tag not in ("", "latest")
    assert re.search(r"\d", tag)
    for form in ("ENTRYPOINT", "HEALTHCHECK"):
        (text,) = [a for name, a in found if name == form]
        assert exec_form(text[text.index("[") :])  # else SIGTERM ends in a shell


def test_the_base_image_holds_the_release_that_is_pinned() -> None:
    (pin,) = re.findall(r'"sglang==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    text = (DOCKER / "Dockerfile").read_text()
    assert f"lmsysorg/sglang:v{pin}" in text
    assert f"startswith('{pin}')" in text


def test_the_cuda_image_gets_every_dependency() -> None:
    """It is installed without resolving, so what pyproject.toml asks for must be named."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    assert block is not None
    wanted = {re.split(r"[=><]", item)[0] for item in re.findall(r'"([^"]+)"', block[1])}
    (install,) = [a for n, a in instructions(DOCKER / "Dockerfile") if n == "RUN"]
    # SGLang's image has these two: SGLang itself, and what torch needs.
    missing = {name for name in wanted - {"sglang", "numpy"} if name not in install}
    assert missing == set()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_not_ignored(path: Path) -> None:
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for name, arguments in instructions(path):
        if name != "COPY":
            continue
        *sources, _target = arguments.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not is_ignored(source.removeprefix("./"), ignored), source


def is_ignored(name: str, patterns: list[str]) -> bool:
    """The last pattern that matches counts, as in a .dockerignore."""
    result = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        if fnmatch.fnmatch(name, wanted) or name.startswith(f"{wanted}/"):
            result = not pattern.startswith("!")
    return result


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_any_user_may_write_the_volume(name: str) -> None:
    """Docker makes a user that it doesn't know a member of group 0."""
    found = instructions(DOCKER / name)
    assert ("VOLUME", "/var/lib/tiered_kv") in found
    commands = "\n".join(a for n, a in found if n == "RUN")
    assert re.search(r"(chmod|install -d -m) 775 .*/var/lib/tiered_kv", commands)
    users = [a for n, a in found if n == "USER"]
    assert all(re.fullmatch(r"\d+:0", user) for user in users)


def test_secrets_and_history_stay_behind() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (".git/config", ".env", ".venv/bin/python", "benchmark/results/x.json"):
        assert is_ignored(name, patterns), name


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_starts_with_flags_that_the_server_has(name: str, server_flags: set[str]) -> None:
    words = []
    for instruction, arguments in instructions(DOCKER / name):
        if instruction in ("ENTRYPOINT", "CMD"):
            words += exec_form(arguments)
    assert "--tiered-kv" in words
    assert flags_of(words) <= server_flags


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_workers_get_flags_that_the_server_has(name: str, server_flags: set[str]) -> None:
    services = compose(name)["services"]
    for worker in ("worker-1", "worker-2"):
        words = services[worker]["command"]
        assert all(isinstance(word, str) for word in words)
        assert flags_of(words) <= server_flags


def test_the_cluster_fits_together() -> None:
    document = compose("compose.yaml")
    services = document["services"]
    assert set(services) == {"worker-1", "worker-2", "router"}
    disks, gpus = [], []
    for name in ("worker-1", "worker-2"):
        worker = services[name]
        assert worker["healthcheck"]["test"][0] == "CMD"
        volumes = dict(reversed(volume.split(":")) for volume in worker["volumes"])
        disks.append(volumes["/var/lib/tiered_kv"])
        assert set(volumes.values()) <= set(document["volumes"])
        gpus += worker["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        assert services["router"]["depends_on"][name] == {"condition": "service_healthy"}
        assert f"http://{name}:30000" in services["router"]["command"]
        assert (ROOT / worker["build"]["dockerfile"]).exists()
    # A disk tier has one owner at a time, and a GPU one server.
    assert len(set(disks)) == len(set(gpus)) == 2
    ports = [instructions(DOCKER / name) for name in ("Dockerfile", "Dockerfile.router")]
    assert [dict(found)["EXPOSE"] for found in ports] == ["30000", "8000"]
    assert services["router"]["ports"] == ["127.0.0.1:8000:8000"]


def test_the_cpu_cluster_overrides_services_that_exist() -> None:
    base, cpu = compose("compose.yaml")["services"], compose("compose.cpu.yaml")["services"]
    assert set(cpu) <= set(base)
    for worker in cpu.values():
        assert worker["deploy"] is None
        assert (ROOT / worker["build"]["dockerfile"]).exists()
