"""`docker compose up` without a GPU: everything of docs/cluster.md comes up and knows the rest.

    docker compose version && python -m pytest -m long test/scripts/test_docker_compose.py

wants what test_docker_run.py wants; TIERED_KV_TEST_IMAGE and TIERED_KV_TEST_BASE name its images.
Valkey's and Prometheus' images are stood in for by Debian's packages (redis-server, prometheus);
Grafana, which Debian lacks, is left out where its image cannot be had.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = ("-f", str(ROOT / "docker/compose.yaml"), "-f", str(ROOT / "docker/compose.cpu.yaml"))
GATEWAY, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:9090"
STAND_INS = {
    "store": "RUN {apt} redis-server && ln -s /usr/bin/redis-server /usr/bin/valkey-server "
    "&& ln -s /usr/bin/redis-cli /usr/bin/valkey-cli",
    # Debian 12's does not know the configuration.
    "prometheus": "RUN echo deb http://deb.debian.org/debian trixie main >> /etc/apt/sources.list "
    "&& apt-get update && cd /tmp && apt-get download prometheus && dpkg -x prometheus_*.deb / "
    '&& mkdir /prometheus\nENTRYPOINT ["prometheus"]',
}
APT = "apt-get update && apt-get install -y --no-install-recommends"
START_S = 1500.0

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]


def docker(*words: str, given: str | None = None, timeout_s: float = 1800) -> str:
    result = subprocess.run(
        ["docker", *words],
        input=given,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, f"docker {' '.join(words[:2])}: {result.stderr[-4000:]}"
    return result.stdout.strip()


def compose(*words: str, timeout_s: float = 1800) -> str:
    return docker("compose", *FILES, *words, timeout_s=timeout_s)


def is_here(image: str) -> bool:
    found = subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False)
    return found.returncode == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    base, image = (os.environ.get(f"TIERED_KV_TEST_{n}") for n in ("BASE", "IMAGE"))
    if base is None or image is None:
        pytest.skip("TIERED_KV_TEST_BASE and TIERED_KV_TEST_IMAGE name no images")
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    for name, lines in STAND_INS.items():
        if not is_here(services[name]["image"]):
            text = f"FROM {base}\n{lines.format(apt=APT)}\n"
            build = ("build", "--network", "host", "-t", services[name]["image"], "-")
            docker(*build, given=text)
    docker("tag", image, "sglang-tiered-kv:cpu")
    docker(
        *("build", "--network", "host", "--build-arg", f"PYTHON_IMAGE={base}"),
        *("-f", str(ROOT / "docker/Dockerfile.gateway"), "-t", "sglang-tiered-kv-gateway"),
        str(ROOT),
    )
    left_out = () if is_here(services["grafana"]["image"]) else ("--scale", "grafana=0")
    try:
        compose("up", "-d", "--no-build", "--pull", "never", *left_out, timeout_s=START_S)
        yield
    finally:
        print(compose("ps", "-a"))
        compose("down", "--volumes")


def fetch(url: str, body: dict[str, Any] | None = None, session: str = "") -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "x-session-id": session}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers), timeout=300) as answer:
        return json.loads(answer.read())


def chat(prompt: str, session: str) -> dict[str, int]:
    """By tier, how many of the prompt's tokens were not computed."""
    body = {
        "model": "SmolLM2-135M-Instruct",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": prompt}],
        "slo": {"class": "batch", "report": True},
    }
    answer = fetch(f"{GATEWAY}/v1/chat/completions", body, session)
    (report,) = answer["metadata"]["tiered_kv"]
    assert report["slo"]["class"] == "batch"
    cached: dict[str, int] = report["cached_tokens"]
    return cached


def seconds_until(condition: Callable[[], bool], timeout_s: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_s
        time.sleep(0.5)
    return time.monotonic() - began


def value_of(query: str) -> float:
    """0 if there is none."""
    url = f"{PROMETHEUS}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    found = fetch(url)["data"]["result"]
    return float(found[0]["value"][1]) if found else 0.0


def healthy() -> int:
    """Workers that the gateway sends requests to; none before it listens."""
    try:
        return sum(w["is_healthy"] for w in fetch(f"{GATEWAY}/workers")["workers"])
    except OSError:  # Docker takes connections to a published port before the service does.
        return 0


def test_the_cluster_serves_shares_and_is_watched(cluster: None) -> None:
    assert seconds_until(lambda: healthy() == 2, START_S) < START_S
    prompt = "Tell me of the sea, and of those who sail it. " * 40
    assert sum(chat(prompt, "a").values()) == 0
    assert sum(chat(prompt, "a").values()) > 300
    requests_of = "smg_worker_requests_total > 0"
    seconds_until(lambda: value_of(f"count({requests_of})") >= 1, 60)
    assert value_of('sum(up{job="workers"})') == 2
    seconds_until(lambda: value_of("sum(sglang:tiered_kv_prompt_tokens_total)") > 600, 60)
    time.sleep(5)  # what was computed is on its way to the store

    first = fetch(f"{PROMETHEUS}/api/v1/query?query=topk(1,smg_worker_requests_total)")
    home = first["data"]["result"][0]["metric"]["worker"].split("//")[1].split(":")[0]
    compose("kill", home)
    found = chat(prompt, "a")
    assert found["store"] + found["device"] > 300  # nobody computed it on this one
    seconds_until(lambda: healthy() == 1, 60)
