"""Two real workers and their store behind the real gateway, watched by a real Prometheus.

The gateway has the flags of docker/compose.yaml, Prometheus the configuration and the rules of
docker/prometheus/.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from harness.demo_model import host_size
from harness.gateway import Gateway
from harness.metrics import scrape
from harness.prometheus import DASHBOARDS, Prometheus, has, panel_queries
from harness.prompts import story
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from harness.stores import Process, valkey_server
from support.engines import engine_or_skip
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

DEVICE_TOKENS, HOST_TOKENS = 2048, 2048
CHAT = "/v1/chat/completions"
# Panels without numbers here, and why.
SILENT = {
    "Limit of writing through": "there is none on CPUs",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("store")
    with engine_or_skip(lambda: valkey_server(folder, maxmemory="1gb")) as server:
        yield server


@pytest.fixture(scope="module")
def workers(
    store: Process, make_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """As in the images: /health computes nothing. Both start at once."""
    started = []
    for name in ("worker-1", "worker-2"):
        disk = tmp_path_factory.mktemp(name)
        args = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(HOST_TOKENS)]
        args += ["--tiered-kv-disk-dir", disk, "--tiered-kv-disk-size", "1GB", "--enable-metrics"]
        args += [*FLOAT32, "--max-total-tokens", DEVICE_TOKENS, "--served-model-name", "demo"]
        args += ["--tiered-kv-store", f"valkey://127.0.0.1:{store.port}"]
        env = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
        started.append(make_server(name, *args, env=env))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Server.start, started))
    yield started
    for server in started:
        server.kill_9()


@pytest.fixture(scope="module")
def gateway(workers: list[Server], logs: Path) -> Iterator[Gateway]:
    urls = {worker.url for worker in workers}
    with Gateway(sorted(urls), logs / "gateway.log") as up:
        up.wait_healthy(urls, 60)
        yield up


@pytest.fixture(scope="module")
def prometheus(workers: list[Server], gateway: Gateway, logs: Path) -> Iterator[Prometheus]:
    if not has("prometheus"):
        pytest.skip("there is no prometheus of 2.49 or later")
    targets = {
        "workers": [f"127.0.0.1:{worker.port}" for worker in workers],
        "gateway": [f"127.0.0.1:{gateway.metrics_port}"],
    }
    with Prometheus(targets, logs / "prometheus") as up:
        yield up


BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    "/v1/completions": {"model": "demo", "prompt": "Hello", "max_tokens": 4},
    "/generate": {"text": "Hello", "sampling_params": {"max_new_tokens": 4}},
}


def reported(path: str, answer: requests.Response) -> Any:
    """The class that the server went by."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    report = body["meta_info" if path == "/generate" else "metadata"]["tiered_kv"]
    return (report if path == "/generate" else report[0])["slo"]["class"]


@pytest.mark.parametrize("path", BODIES)
def test_objectives_arrive_in_the_body_and_not_in_headers(path: str, gateway: Gateway) -> None:
    body = {**BODIES[path], "slo": {"class": "batch", "report": True}, "priority": 1}
    assert reported(path, gateway.post(path, body)) == "batch"
    by_header = {**BODIES[path], "slo": {"report": True}}
    answer = gateway.post(path, by_header, headers={"x-slo-class": "batch"})
    assert reported(path, answer) == "standard"
    refused = gateway.post(path, {**body, "slo": {"class": "gold"}})
    assert refused.status_code == 400
    assert "slo.class must be one of" in refused.text


def test_what_travels_in_custom_params_arrives(gateway: Gateway) -> None:
    slo = {"custom_params": {"slo": {"class": "batch", "report": True}}}
    body = BODIES["/generate"]
    body = {**body, "sampling_params": {**body["sampling_params"], **slo}}
    assert reported("/generate", gateway.post("/generate", body)) == "batch"


def test_salts_arrive(gateway: Gateway) -> None:
    """The same prompt under another salt or key is a miss."""
    prompt = story("salts", 30)

    def cached(**fields: str) -> int:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": "demo", "messages": messages, "max_tokens": 1, **fields}
        usage = gateway.post(CHAT, body, "salts").json()["usage"]
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    assert cached() == 0
    assert cached() > 200
    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") > 200
    assert cached(extra_key="b") == 0


class Conversation:
    """Grows by a question and its answer with each turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.messages = [{"role": "user", "content": f"{name}. {story(name, 24)}"}]
        self.cached: list[int] = []

    def turn(self, gateway: Gateway, **fields: Any) -> None:
        body = {"model": "demo", "messages": self.messages, "max_tokens": 8, "temperature": 0}
        answer = gateway.post(CHAT, {**body, **fields}, self.name)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        found = answer.json()
        details = found["usage"]["prompt_tokens_details"] or {}
        self.cached.append(details.get("cached_tokens", 0))
        reply = found["choices"][0]["message"]["content"]
        self.messages += [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": story(f"{self.name} {len(self.cached)}", 2)},
        ]


def share_found(talks: list[Conversation], since: int) -> float:
    """Of the turns since that one: those of which most was found in some tier."""
    found = [cached > 200 for talk in talks for cached in talk.cached[since:]]
    return sum(found) / len(found)


def test_every_panel_has_numbers(
    workers: list[Server], gateway: Gateway, prometheus: Prometheus
) -> None:
    """Under a load that uses each tier: more than the devices hold, then from disk alone."""
    talks = [Conversation(f"watched {n}") for n in range(12)]
    classes = ["interactive", "standard", "batch"]
    queries = panel_queries(DASHBOARDS / "tiered_kv.json", "30s")
    assert len(queries) > 25
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(1.0):
            seen.update(q.panel for q in queries if prometheus.has_numbers(q.expression))

    with ThreadPoolExecutor(5) as pool:
        watch = pool.submit(look)
        for turn in range(3):
            if turn == 2:  # nothing but the disks has it now
                for worker in workers:
                    worker.flush_cache()
            slo = [{"class": classes[n % 3]} for n in range(len(talks))]
            list(pool.map(lambda t, s: t.turn(gateway, slo=s), talks, slo))
        time.sleep(3)
        stop.set()
        watch.result()
    # Not all: on busy cores some pages come later than computing takes.
    assert share_found(talks, since=1) > 0.5
    assert {q.panel for q in queries} - seen == set(SILENT)
    tiers = prometheus.ask("sum by (tier) (sglang:tiered_kv_hit_tokens_total) > 0")
    assert {sample["metric"]["tier"] for sample in tiers} >= {"device", "host", "disk"}
    assert prometheus.alerts("firing") == set()


def test_conversations_go_on_when_their_worker_is_killed(
    workers: list[Server], gateway: Gateway, prometheus: Prometheus
) -> None:
    """With requests in flight on both: no client sees an error, another worker finds in the store
    what the dead one had, and the answers are the same."""
    talks = [Conversation(f"orphan {n}") for n in range(6)]
    dead, alive = workers
    with ThreadPoolExecutor(len(talks)) as pool:
        for _ in range(2):
            list(pool.map(lambda t: t.turn(gateway), talks))
        had_read = scrape(alive).of(names.HIT_TOKENS, tier="store")
        turns = [pool.submit(talk.turn, gateway, max_tokens=48) for talk in talks]
        time.sleep(1.5)
        dead.kill_9()
        for turn in turns:
            turn.result()
        gateway.wait_healthy({alive.url}, 30)
        list(pool.map(lambda t: t.turn(gateway), talks))
    assert share_found(talks, since=2) > 0.5
    # Those that had their home on the dead worker are in the store.
    assert scrape(alive).of(names.HIT_TOKENS, tier="store") > had_read + 200
    assert "WorkerDown" in prometheus.alerts("pending")
    for talk in talks:
        again = Conversation(talk.name)
        again.turn(gateway)
        assert again.messages[1] == talk.messages[1]
