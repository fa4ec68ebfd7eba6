"""The files in docker/ parse, are pinned, and pass on only flags that the server has.

No image is built here. What Docker would only say at build time is checked as far as reading goes:
sources that are copied exist and reach the builder, base images have versions, and the cluster's
services fit together.
"""

from __future__ import annotations

import asyncio
import fnmatch
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
#: What the images have besides: the demo model's tools, clients of shared stores.
EXTRAS = ("demo", "valkey", "mooncake")
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
    environment = (ROOT / "scripts" / "lib" / "environment.sh").read_text()
    (pin,) = re.findall(r"^SGLANG_ON_GPUS=([\d.]+) ", environment, re.MULTILINE)
    text = (DOCKER / "Dockerfile").read_text()
    assert f"lmsysorg/sglang:v{pin}" in text
    assert f"startswith('{pin}')" in text


def locked() -> dict[str, str]:
    """The version of each package that the images may have."""
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def test_every_dependency_is_locked_to_a_version_that_will_do() -> None:
    versions = locked()
    described = project()
    inputs = (DOCKER / "requirements.in").read_text().splitlines()
    wanted = [
        *described["dependencies"],
        *(line for extra in EXTRAS for line in described["optional-dependencies"][extra]),
        *(line for line in inputs if not line.startswith("#")),
    ]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_nothing_is_installed_but_locked_versions(path: Path) -> None:
    found = [command for command in commands(path) if " pip install " in command]
    assert found
    for command in found:
        is_locked = "constraints.txt" in command or "-r docker/ours.txt" in command
        assert is_locked or "--no-deps ." in command, command


def test_the_cpu_image_has_bytecode() -> None:
    """The server's user cannot write it, and each start would compile everything."""
    installs = [c for c in commands(DOCKER / "Dockerfile.cpu") if c.startswith("uv pip install ")]
    assert len(installs) == 2
    assert all("--compile-bytecode" in command for command in installs)


def commands(path: Path) -> list[str]:
    """What RUN instructions run, one by one."""
    runs = (re.sub(r"--mount=\S+\s+", "", a) for name, a in instructions(path) if name == "RUN")
    return [re.sub(r"\s+", " ", part).strip() for run in runs for part in run.split("&&")]


def test_the_cuda_image_gets_what_sglangs_lacks() -> None:
    """What SGLang depends on too is in its image, except in a version that we ask for."""
    (listed,) = re.findall(r"\^\(([\w|-]+)\)==", (DOCKER / "Dockerfile").read_text())
    wanted = [d for d in project()["dependencies"] if not d.startswith("sglang")]
    wanted += project()["optional-dependencies"]["valkey"]
    theirs = with_dependencies("sglang")
    newer = {r.name for r in map(Requirement, wanted) if r.specifier}
    lacking = with_dependencies(*wanted) - theirs
    assert set(listed.split("|")) == lacking | with_dependencies(*(newer & theirs))


def test_the_cpu_image_has_the_clients_of_stores() -> None:
    (install,) = [c for c in commands(DOCKER / "Dockerfile.cpu") if "-r pyproject.toml" in c]
    assert re.findall(r"--extra (\w+)", install) == list(EXTRAS)


def with_dependencies(*requirements: str) -> set[str]:
    """These distributions, as they are installed here, and whatever they need."""
    found: set[str] = set()
    left = [Requirement(line) for line in requirements]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        if name in found:
            continue
        found.add(name)
        needs = (Requirement(line) for line in metadata.requires(name) or [])
        left += [
            r
            for r in needs
            if r.marker is None
            or any(r.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras))
        ]
    return found


def test_debians_packages_do_not_end_the_build_of_the_cuda_image() -> None:
    """pip ends at what it cannot uninstall, as at the cryptography of Debian."""
    (install,) = [c for c in commands(DOCKER / "Dockerfile") if "-r docker/ours.txt" in c]
    assert {"--ignore-installed", "--no-deps"} <= set(install.split())


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
    assert re.search(r"chmod 775 .*/var/lib/tiered_kv", commands)
    assert re.search(r"chown \S+:0 .*/var/lib/tiered_kv", commands)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_server_runs_as_root(path: Path) -> None:
    """By number, which Kubernetes can check, and with a name and a home that any other has too."""
    found = instructions(path)
    assert [a for n, a in found if n == "USER"][-1] == "10001:0"
    environment = " ".join(a for n, a in found if n == "ENV").split()
    assert "HOME=/tmp" in environment
    assert any(setting.startswith("USER=") for setting in environment)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_a_servers_entry_is_its_parent(name: str) -> None:
    """As process 1 the server could not end itself, and a refusal would look like a success."""
    (text,) = [a for n, a in instructions(DOCKER / name) if n == "ENTRYPOINT"]
    entry = "/opt/sglang-tiered-kv/docker/entry.py"
    assert exec_form(text)[:5] == ["python3", entry, "python3", "-m", "sglang.launch_server"]
    assert ("COPY", "docker/entry.py ./docker/entry.py") in instructions(DOCKER / name)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_a_server_that_is_busy_is_not_called_sick(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's own answer to a health check, in the image's environment: at once, of no model."""
    from sglang.srt.entrypoints import http_server

    variable = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
    found = " ".join(a for n, a in instructions(DOCKER / name) if n == "ENV").split()
    monkeypatch.setenv(variable, dict(word.split("=") for word in found)[variable])
    manager = SimpleNamespace(gracefully_exit=False, server_status=http_server.ServerStatus.Up)
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))
    request = cast(Any, SimpleNamespace(url=SimpleNamespace(path="/health")))

    def answer() -> int:
        status: int = asyncio.run(http_server.health_generate(request)).status_code
        return status

    assert answer() == 200
    manager.gracefully_exit = True
    assert answer() == 503


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
    assert {"worker-1", "worker-2", "gateway"} <= set(services)
    disks, gpus = [], []
    for name in ("worker-1", "worker-2"):
        worker = services[name]
        assert worker["healthcheck"]["test"][0] == "CMD"
        volumes = dict(reversed(volume.split(":")) for volume in worker["volumes"])
        disks.append(volumes["/var/lib/tiered_kv"])
        assert set(volumes.values()) <= set(document["volumes"])
        gpus += worker["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        assert services["gateway"]["depends_on"][name] == {"condition": "service_healthy"}
        assert f"http://{name}:30000" in services["gateway"]["command"]
        assert (ROOT / worker["build"]["dockerfile"]).exists()
    # A disk tier has one owner at a time, and a GPU one server.
    assert len(set(disks)) == len(set(gpus)) == 2
    # Up to 25 s of an idle server, and what its requests still take.
    graces = {services[name]["stop_grace_period"] for name in ("worker-1", "worker-2")}
    assert graces == {"180s"}
    ports = [instructions(DOCKER / name) for name in ("Dockerfile", "Dockerfile.gateway")]
    assert [dict(found)["EXPOSE"] for found in ports] == ["30000", "8000 29000"]
    assert services["gateway"]["ports"] == ["127.0.0.1:8000:8000"]


def test_the_cpu_cluster_overrides_services_that_exist() -> None:
    base, cpu = compose("compose.yaml")["services"], compose("compose.cpu.yaml")["services"]
    assert set(cpu) <= set(base)
    for worker in (cpu["worker-1"], cpu["worker-2"]):
        # Pinned memory needs a right that not every daemon has, and only a GPU needs it.
        assert {"deploy", "ulimits", "ipc"} <= set(worker)
        assert worker["deploy"] is worker["ulimits"] is worker["ipc"] is None
        assert (ROOT / worker["build"]["dockerfile"]).exists()


def test_a_request_finds_out_that_a_worker_died() -> None:
    """It is tried five times: fewer failures must be enough to leave the worker out."""
    words = compose("compose.yaml")["services"]["gateway"]["command"]
    flags = dict(itertools.pairwise(words))
    assert 1 <= int(flags["--cb-failure-threshold"]) < 5
    assert (
        int(flags["--health-check-interval-secs"]) * int(flags["--health-failure-threshold"]) <= 15
    )


def test_models_that_are_downloaded_are_kept() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        settings = " ".join(a for n, a in instructions(DOCKER / name) if n == "ENV").split()
        (home,) = [s.partition("=")[2] for s in settings if s.startswith("HF_HOME=")]
        for worker in ("worker-1", "worker-2"):
            assert f"models:{home}" in compose("compose.yaml")["services"][worker]["volumes"]
